"""examples/hf_tst.py: a transformers model has the losses of train.py from the same weights and text."""

import os
import shutil

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import torch
import transformers
from conftest import ROOT, write_corpus
from safetensors.torch import load_file
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from examples import hf_tst
from model import GPT, GPTConfig
from nanotst import UserError
from nanotst.configurator import parse
from nanotst.tokenizer import get_tokenizer
from tools import export

LLAMA = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ff_dim=64)
MOE = LLAMA | dict(n_head=2, n_kv_head=1, ff_dim=32, n_expert=4, top_k=2, qk_norm=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Path of a text file; the folder "data" beside it is a corpus of train.py with the same text."""
    path = tmp_path_factory.mktemp("hf_tst") / "text.txt"
    path.write_text((ROOT / "tst.py").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    tokens = get_tokenizer("bytes").encode(path.read_text(encoding="utf-8"))
    write_corpus(path.parent / "data", tokens, tokens, 256)
    return path


def write_model(folder, shape, balance_coef=0.0):
    """A model of bytes with its tokenizer, as tools.export writes them."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=256, block_size=16, **shape))
    files = export.tokenizer_files(get_tokenizer("bytes"), 16)
    export.save_hf(model, str(folder), files=files, balance_coef=balance_coef)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("hf_tst") / "llama", LLAMA)


def example(text, model, **knobs):
    """The losses of the example, from its command line."""
    usual = dict(max_steps=4, batch_size=4, block_size=16, device="cpu")
    knobs = usual | knobs | {"model": model, "text": text}
    return hf_tst.main(parse(hf_tst.Config, [f"--{key}={value}" for key, value in knobs.items()]))


@pytest.mark.parametrize("shape", [LLAMA, MOE], ids=["llama", "qwen3_moe"])
def test_losses_equal_train_py(shape, text, tmp_path, run):
    """5 of 20 steps in superposition, then a second epoch; both end with the same model. Without the balance
    loss: train.py takes the experts' loads from the step before, transformers from this one."""
    folder = write_model(tmp_path / "start", shape)
    knobs = dict(bag_size=4, superposition_ratio=0.25, max_steps=20, batch_size=8, block_size=16)
    knobs |= dict(warmup_steps=4, learning_rate=3e-3, seed=7)
    losses = example(text, folder, out=tmp_path / "end", **knobs)
    knobs |= dict(total_batch=8 * 16, weight_decay=0.1, balance_coef=0.0, router_z_coef=0.0)
    knobs |= dict(init_from=f"hf:{folder}", dataset=str(text.parent / "data"), decay_ratio=0.1)
    rows = run(**knobs, **shape)
    expected = [row["loss"] for row in rows if "loss" in row]
    n = 20 if shape is LLAMA else 10  # later, rounding may send a position to other experts
    assert losses[:n] == pytest.approx(expected[:n], abs=1e-4) and len(losses) == 20
    assert losses == pytest.approx(expected, abs=0.02)
    assert losses[-1] < losses[5] - 0.3  # it has learned something
    last = str(tmp_path / "run" / "last.pt")
    export.main(export.Config(last, str(tmp_path / "end_of_train")))
    ours, theirs = (load_file(tmp_path / x / "model.safetensors") for x in ("end_of_train", "end"))
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], atol=0.05 if n < 20 else 1e-3, rtol=0)


def test_the_balance_loss_of_the_model_counts(text, tmp_path):
    """By the coefficient in its config.json: experts are chosen more evenly with a large one than with 0."""
    tokens, unbalanced = torch.tensor([list(text.read_bytes()[:512])]), []
    for coef in (0.0, 1.0):
        folder, out = write_model(tmp_path / f"start_{coef}", MOE, coef), tmp_path / f"end_{coef}"
        knobs = dict(max_steps=40, batch_size=8, learning_rate=1e-2, warmup_steps=0)
        example(text, folder, out=out, **knobs)
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        logits = model(tokens, output_router_logits=True).router_logits
        unbalanced.append(load_balancing_loss_func(logits, 4, 2).item())  # 2 if all are alike
    assert unbalanced[1] < unbalanced[0] - 0.02


def test_from_scratch(text, llama):
    """The seed decides, not the weights in the folder; with bags or without, the loss begins at log V."""
    first = example(text, llama, from_scratch=True)
    assert first == example(text, llama, from_scratch=True)
    assert first != example(text, llama, from_scratch=True, seed=5)
    assert first[0] == pytest.approx(5.545, abs=0.1)  # log 256


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(model="no/such/folder"), "no/such/folder"),
        (dict(text="no/such/file"), "No such file.*no/such/file"),
        (dict(block_size=4000), "too few"),
        (dict(learning_rate=1e20), "not finite, so nothing was saved"),
    ],
)
def test_what_cannot_work_is_one_line(knobs, words, text, llama, tmp_path):
    with pytest.raises((UserError, OSError), match=words):  # an entry point prints both
        example(**dict(text=text, model=llama, out=tmp_path / "out") | knobs)
    assert not (tmp_path / "out").exists()


def test_a_model_that_changes_its_embeddings_is_refused(text, llama, tmp_path):
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    size = dict(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    transformers.Gemma3TextConfig(**size, **heads).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="Gemma3ForCausalLM changes its embeddings"):
        example(text, str(tmp_path), from_scratch=True)
