"""A forker's five changes: each edits a few lines in a copy of the files and trains 20 steps to its effect.
An edit is (text that is there once, text in its place)."""

import importlib
import math
import shutil
import sys

import pytest
import torch
from conftest import ROOT, TINY, read_rows

GATE = [
    (
        "        self.qkv = Linear(",
        "        self.gate = nn.Parameter(torch.empty(self.heads[0] * self.head_dim))\n"
        '        self.init = {"gate": 0.5}\n'
        "        self.qkv = Linear(",
    ),
    (
        "        return self.out(y.transpose(1, 2).flatten(2))",
        "        return self.out(self.gate.sigmoid() * y.transpose(1, 2).flatten(2))",
    ),
]
NORM = [
    ("nn.Parameter(torch.ones(dim))", "nn.Parameter(torch.ones(1))"),
    (
        "        y = F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)\n",
        "        y = self.weight * x * math.sqrt(x.size(-1)) / (x.norm(dim=-1, keepdim=True) + self.eps)\n",
    ),
]
VALUE_RESIDUAL = [
    (
        "        self.qkv = Linear(",
        "        self.mix = nn.Parameter(torch.empty(1))\n"
        '        self.init = {"mix": 0.5}\n'
        "        self.qkv = Linear(",
    ),
    ("    def forward(self, x, cos, sin):", "    def forward(self, x, cos, sin, v0=None):"),
    (
        "        q = rotate(self.q_norm(q)",
        "        v0 = v if v0 is None else v0\n"
        "        v = v + self.mix * (v0 - v)\n"
        "        q = rotate(self.q_norm(q)",
    ),
    ("(y.transpose(1, 2).flatten(2))  #", "(y.transpose(1, 2).flatten(2)), v0  #"),
    ("cos, sin, load_share=None):", "cos, sin, load_share=None, v0=None):"),
    (
        "        x = x + self.attn(self.attn_norm(x), cos, sin)",
        "        y, v0 = self.attn(self.attn_norm(x), cos, sin, v0)\n        x = x + y",
    ),
    ("        return x + y, routing", "        return x + y, routing, v0"),
    ("routing, recompute = ", "v0, routing, recompute = None, "),
    (
        "            args = x, cos, sin, load_share",
        "            args = x, cos, sin, load_share, v0",
    ),
    ("            x, stats = ", "            x, stats, v0 = "),
]
LOSS_TERM = [
    (
        "            return tst.multi_hot_cross_entropy(self.logits(x), labels, weights)",
        "            z = self.logits(x)\n"
        "            term = 0.1 * z.logsumexp(-1).square().mean() if self.training else 0\n"
        "            return tst.multi_hot_cross_entropy(z, labels, weights) + term",
    ),
]
METRIC = [
    (
        "        if c.n_expert:\n            row |=",
        '        row["head_norm"] = raw_model.head.weight.norm().item()\n'
        "        if c.n_expert:\n            row |=",
    ),
]
KNOBS = TINY | dict(max_steps=20, n_layer=2, learning_rate=0.02, threads=1)


@pytest.fixture
def fork(corpus, tmp_path, monkeypatch, capsys):
    """fork(file, edits, **knobs) -> rows, weights and printed text of a run of the edited copy."""
    ours = ("train", "model", "tst", "nanotst")

    def train(file, edits, **knobs):
        folder = tmp_path / f"copy {len(list(tmp_path.iterdir()))}"
        shutil.copytree(ROOT / "nanotst", folder / "nanotst")
        for name in ("train.py", "model.py", "tst.py"):
            shutil.copy(ROOT / name, folder)
        text = (folder / file).read_text()
        for old, new in edits:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / file).write_text(text)
        with monkeypatch.context() as patch:
            for name in [name for name in sys.modules if name.split(".")[0] in ours]:
                patch.delitem(sys.modules, name)
            patch.syspath_prepend(str(folder))
            module = importlib.import_module("train")
            assert module.__file__ == str(folder / "train.py")
            where = dict(dataset=corpus, out_dir=f"{folder}/run")
            module.main(module.Config(**KNOBS | where | knobs))
            for name in [name for name in sys.modules if name.split(".")[0] in ours]:
                del sys.modules[name]  # or the context would leave the copies of others behind
        weights = torch.load(folder / "run" / "last.pt", weights_only=True)["model"]
        return read_rows(folder / "run"), weights, capsys.readouterr().out

    return train


def column(rows, key):
    return [row[key] for row in rows]


@pytest.mark.parametrize(
    "edits, parameter, n",
    [(GATE, "blocks.1.attn.gate", 16), (VALUE_RESIDUAL, "blocks.1.attn.mix", 1)],
    ids=["gate", "value residual"],
)
def test_a_parameter_in_attention_begins_where_it_should_and_trains(fork, edits, parameter, n):
    """Twins stay in use, since nothing that they replace has changed."""
    still = dict(learning_rate=1e-30, max_steps=2, superposition_ratio=0.0)
    assert fork("model.py", edits, **still)[1][parameter].tolist() == pytest.approx([0.5] * n)
    rows, weights, said = fork("model.py", edits)
    assert "has changed" not in said and weights[parameter].sub(0.5).abs().max() > 0.01
    plain = fork("model.py", [])[0]
    assert column(rows, "loss") != column(plain, "loss")
    assert rows[-1]["val_loss"] < rows[0]["loss"] - 0.5


def test_another_norm_with_a_scalar(fork):
    rows, weights, said = fork("model.py", NORM)
    assert "has changed" not in said and weights["norm.weight"].shape == (1,)
    assert weights["norm.weight"].item() != 1 and rows[-1]["val_loss"] < rows[0]["loss"] - 0.5
    assert column(rows, "loss") != column(fork("model.py", [])[0], "loss")


def test_a_loss_term_on_every_steps_logits(fork):
    """It is in the training loss of every step, not in the validation loss, and the fused loss gives way."""
    still = dict(learning_rate=1e-30)
    rows, _, said = fork("model.py", LOSS_TERM, **still)
    plain = fork("model.py", [], **still)[0]
    assert said.count("has changed") == 1 and "Head.bag_loss has changed" in said
    for row, other in zip(rows, plain):
        assert row["loss"] - other["loss"] == pytest.approx(0.1 * math.log(50) ** 2, rel=0.15)
        assert row.get("val_loss", 0) == pytest.approx(other.get("val_loss", 0), rel=1e-6)
    trained = fork("model.py", LOSS_TERM)[0]
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.5


def test_one_more_metric_in_the_row(fork):
    rows, weights, _ = fork("train.py", METRIC)
    assert rows[-1]["head_norm"] == pytest.approx(weights["head.weight"].norm().item())
    for key in ("loss", "grad_norm"):
        assert column(rows, key) == column(fork("train.py", [])[0], key)


def test_a_parameter_without_an_initial_value_is_an_error_that_says_where(fork):
    no_value = [(GATE[0][0], GATE[0][1].replace('        self.init = {"gate": 0.5}\n', ""))]
    with pytest.raises(ValueError, match=r"blocks.0.attn.gate has no initial value; .*Attention"):
        fork("model.py", no_value)
