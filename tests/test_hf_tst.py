"""examples/hf_tst.py: a transformers model has the losses of train.py from the same weights and text."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import torch
from conftest import ROOT, write_corpus
from safetensors.torch import load_file

from examples import hf_tst
from model import GPT, GPTConfig
from nanotst import UserError
from nanotst.configurator import parse
from nanotst.huggingface import read_json
from nanotst.tokenizer import get_tokenizer
from tools import export

SHAPES = {
    "llama": dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ff_dim=64),
    "qwen3_moe": dict(
        n_layer=2, n_head=2, n_kv_head=1, n_embd=32, ff_dim=32, qk_norm=True, n_expert=4, top_k=2
    ),
}


@pytest.fixture
def text(tmp_path):
    """Path of a text file. The folder beside it, "data", holds the same as a corpus of train.py."""
    path, text = tmp_path / "text.txt", (ROOT / "tst.py").read_text(encoding="utf-8")[:3000]
    path.write_text(text, encoding="utf-8")
    tokens = get_tokenizer("bytes").encode(text)
    write_corpus(tmp_path / "data", tokens, tokens, 256)
    return path


def write_model(folder, shape, balance_coef=0.0):
    """A model of bytes with its tokenizer, as tools.export writes them."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=256, block_size=16, **shape))
    tokenizer = {
        "tokenizer.json": export.hf_tokenizer(get_tokenizer("bytes")),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    export.save_hf(
        model.state_dict(),
        model.config,
        str(folder),
        extra=tokenizer,
        separator=0,
        balance_coef=balance_coef,
    )
    return str(folder)


def example(**knobs):
    """The losses of the example, from the command line of these knobs."""
    return hf_tst.main(parse(hf_tst.Config, [f"--{key}={value}" for key, value in knobs.items()]))


@pytest.mark.parametrize("name", SHAPES)
def test_losses_equal_train_py(name, text, tmp_path, run):
    """5 of 20 steps in superposition, then a second epoch; both end with the same model.

    Without the balance loss: train.py takes its shares from the step before, transformers from this one.
    """
    folder = write_model(tmp_path / "start", SHAPES[name])
    knobs = dict(
        bag_size=4,
        superposition_ratio=0.25,
        max_steps=20,
        batch_size=8,
        block_size=16,
        warmup_steps=4,
    )
    knobs |= dict(learning_rate=5e-3)
    rows = run(
        **SHAPES[name], **knobs, dataset=str(tmp_path / "data"), init_from=f"hf:{folder}", total_batch=128,
        balance_coef=0.0,
    )  # fmt: skip
    expected = [row["loss"] for row in rows]
    losses = example(model=folder, text=text, out=tmp_path / "end", device="cpu", **knobs)
    print(
        f"{name}: losses differ by at most {max(abs(a - b) for a, b in zip(losses, expected)):.1e}"
    )
    assert losses == pytest.approx(expected, abs=1e-4) and len(losses) == 20
    assert losses[-1] < losses[5] - 0.3  # it has learned something

    export.main(export.Config(str(tmp_path / "run" / "last.pt"), str(tmp_path / "end_of_train")))
    ours, theirs = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("end_of_train", "end")
    )
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-3, rtol=0)


def test_the_balance_loss_of_the_model_counts(text, tmp_path):
    """By the coefficient in its config.json: experts are chosen more evenly at a large one than at zero."""
    import transformers
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    tokens, unbalanced = torch.tensor([list(text.read_bytes()[:512])]), []
    for coef in (0.0, 1.0):
        folder = write_model(tmp_path / f"start_{coef}", SHAPES["qwen3_moe"], coef)
        out = tmp_path / f"end_{coef}"
        knobs = dict(
            model=folder,
            text=text,
            out=out,
            device="cpu",
            max_steps=20,
            batch_size=8,
            block_size=16,
        )
        example(**knobs, learning_rate=1e-2, warmup_steps=0)
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        logits = model(tokens, output_router_logits=True).router_logits
        unbalanced.append(
            load_balancing_loss_func(logits, 4, 2).item()
        )  # 2 if all are chosen alike
    assert unbalanced[1] < unbalanced[0] - 0.02


@pytest.mark.parametrize("name", SHAPES)
def test_from_scratch(name, text, tmp_path):
    """The weights of the folder are not looked at, the seed decides."""
    folder = write_model(tmp_path / "model", SHAPES[name])
    os.remove(os.path.join(folder, "model.safetensors"))
    knobs = dict(
        model=folder,
        text=text,
        from_scratch=True,
        max_steps=4,
        batch_size=4,
        block_size=16,
        device="cpu",
    )
    first = example(**knobs)
    assert first == example(**knobs) != example(**knobs, seed=5)
    assert first[0] == pytest.approx(5.545, abs=0.1)  # log 256


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(model=""), "--model= is missing"),
        (dict(text=""), "--text= is missing"),
        (dict(model="no/such/folder"), "cannot load no/such/folder"),
        (dict(batch_size=0), "batch_size and block_size must be at least 1"),
        (dict(superposition_ratio=0.01), "has no steps"),
        (dict(block_size=4000), "too few"),
    ],
)
def test_what_cannot_work_is_one_line(knobs, words, text, tmp_path):
    usual = dict(
        model=write_model(tmp_path / "model", SHAPES["llama"]),
        text=text,
        max_steps=4,
        block_size=16,
    )
    with pytest.raises(UserError, match=words) as e:
        example(**{**usual, "batch_size": 4, "device": "cpu", **knobs})
    assert "\n" not in str(e.value)


def test_text_that_the_model_cannot_read_is_one_line(text, tmp_path):
    """Text of another encoding, and ids beyond the embedding."""
    folder = write_model(tmp_path / "model", SHAPES["llama"])
    knobs = dict(model=folder, text=text, max_steps=4, block_size=16, batch_size=4, device="cpu")
    text.write_bytes("é".encode("latin-1") * 3000)
    with pytest.raises(UserError, match="is not UTF-8 text"):
        example(**knobs)
    text.write_text("i" * 3000)
    tokenizer = read_json(folder, "tokenizer.json")
    tokenizer["model"]["vocab"]["i"] = 300
    export.write_json(folder, "tokenizer.json", tokenizer)
    with pytest.raises(UserError, match="gives id 300, the model's embedding has 256 rows"):
        example(**knobs)


def test_a_model_that_does_more_is_refused(text, tmp_path, monkeypatch):
    """One that caps its logits would train towards another loss than its own."""
    import transformers

    theirs = transformers.Gemma2Config(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5,
    )  # fmt: skip
    folder = write_model(tmp_path / "model", SHAPES["llama"])
    theirs.save_pretrained(folder)
    with pytest.raises(UserError, match="Gemma2ForCausalLM does more than"):
        example(
            model=folder,
            text=text,
            from_scratch=True,
            max_steps=4,
            block_size=16,
            batch_size=4,
            device="cpu",
        )
