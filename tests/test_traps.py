"""tools/traps.py: tst.py passes, and each broken version is told by the name of its row in TRAPS.md."""

import re

import pytest
from conftest import ROOT

from nanotst import UserError
from nanotst.configurator import parse
from tools import traps

SHIFTED = "return x[:, :-s].unflatten(1, (-1, s)), {}.unflatten(1, (-1, s))"
FLAT = "return F.cross_entropy(z, y.flatten()[: len(z)], reduction='sum') / y.numel()"
SET = "return F.cross_entropy(z, F.normalize(torch.zeros_like(z).scatter(1, y, 1), 1))"
SMOOTHED = "return mce(z, y) if s > 1 else F.cross_entropy(z, y[:, 0], label_smoothing=0.1)"
POOLED = "return F.cross_entropy(z.repeat_interleave(s, 0), y.flatten())"
SHORT = "return bags_and_labels(x[:, : x.size(1) // 2 // s * s + s], s, s)"
ROUNDED = "return sum(w[x[..., i]] for i in range(x.size(-1))) / x.size(-1)"
BROKEN = {  # row of TRAPS.md: (kind, the function)
    "Labels summed": ("loss", "return s * mce(z, y)"),
    "Divided by s twice": ("loss", "return mce(z, y) / s"),
    "Bag labels flattened": ("loss", FLAT),
    "The log of the summed probabilities": ("loss", "return summed_probability(z, y)"),
    "Labels as a set": ("loss", SET),
    "Another loss": ("loss", "return binary_cross_entropy(z, y)"),
    "s = 1 is a second code path": ("loss", SMOOTHED),
    "Ignored labels averaged": ("loss", POOLED),
    "The target is shifted by one token": ("split", SHIFTED.format("x[:, 1 : 1 - s or None]")),
    "The loader reads": ("split", SHIFTED.format("(x[:, s:] + s)")),
    "Keeping the data budget": ("split", SHORT),
    "The sum of embeddings": ("embed", "return F.embedding(x, w).sum(-2)"),
    "The mean in bfloat16": ("embed", ROUNDED),
}
FORM = {"loss": "(z, y):\n    s = y.size(1)\n", "split": "(x, s):\n", "embed": "(x, w):\n"}


def check(path, capsys, **functions):
    """The lines that the checker prints for these functions, and its exit status."""
    argv = [f"--{kind}={name}" for kind, name in functions.items()]
    with pytest.raises(SystemExit) as ended:
        traps.main(parse(traps.Config, [str(path), *argv]))
    return capsys.readouterr().out.splitlines(), ended.value.code


def write(path, form, body):
    path.write_text(
        "import torch\nimport torch.nn.functional as F\nfrom tst import *\n"
        f"mce = multi_hot_cross_entropy\ndef mine{form}    {body}\n"
    )


def test_our_own_functions_pass(tmp_path, capsys):
    write(tmp_path / "a.py", FORM["split"], "return bags_and_labels(x, s, s)")
    names = dict(loss="multi_hot_cross_entropy", split="mine", embed="embed_bags")
    lines, status = check(tmp_path / "a.py", capsys, **names)
    assert status == 0 and len(lines) > 15 and all(line.startswith("ok  ") for line in lines)
    write(tmp_path / "b.py", FORM["loss"], "return mce(z, y, bag_weights('power', s))")
    assert check(tmp_path / "b.py", capsys, loss="mine")[1] == 0  # other weights are fine


@pytest.mark.parametrize("row", BROKEN)
def test_a_broken_version_is_told_by_name(row, tmp_path, capsys):
    kind, body = BROKEN[row]
    write(tmp_path / "broken.py", FORM[kind], body)
    lines, status = check(tmp_path / "broken.py", capsys, **{kind: "mine"})
    assert status == 1 and lines[-1].startswith("TRAP")
    told = lines[-1].split("TRAPS.md: ")[1].removesuffix(" ...")
    assert row.startswith(told) and len(told) > 8
    assert re.search(rf"^\| \*\*{re.escape(row)}", (ROOT / "TRAPS.md").read_text("utf-8"), re.M)


def test_a_loss_without_ignored_labels_gets_a_note(tmp_path, capsys):
    write(tmp_path / "a.py", FORM["loss"], "return -z.log_softmax(1).gather(1, y).mean()")
    lines, status = check(tmp_path / "a.py", capsys, loss="mine")
    assert status == 0 and lines[-1].startswith("note  ignored labels (-100) are not supported")


def test_what_cannot_be_checked_is_one_line(tmp_path):
    write(tmp_path / "a.py", FORM["loss"], "return mce(z, y)")
    for argv, words in (
        (["none.py", "--loss=mine"], "is not a file"),
        (["a.py"], "--loss=, --split= and --embed= are missing"),
        (["a.py", "--loss=yours"], "has no function yours"),
    ):
        with pytest.raises(UserError, match=words):
            traps.main(parse(traps.Config, [str(tmp_path / argv[0]), *argv[1:]]))
