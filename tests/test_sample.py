"""sample.py: what it prints, and what it says about a checkpoint, a prompt or a knob that cannot work."""

import base64
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, write_corpus

import sample
import train
from nanotst import UserError
from nanotst.checkpoint import load_model
from nanotst.configurator import entry_point

TEXT = b"the cat sat on the mat. " * 300


def train_on(folder, tokens, meta, vocab_size=256, **knobs):
    """Train on tokens whose corpus has `meta`, too -> path of the checkpoint."""
    dataset = write_corpus(folder / "corpus", tokens[:6000], tokens[6000:], vocab_size)
    path = Path(dataset, "meta.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | meta))
    if meta.get("encoding") == "tokenizer.model":
        rank_file(folder / "corpus" / "tokenizer.model")
    train.main(train.Config(**TINY | {"dataset": dataset, "out_dir": f"{folder}/run", **knobs}))
    return f"{folder}/run/last.pt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of bytes, after a few steps on a text that repeats itself."""
    folder = tmp_path_factory.mktemp("bytes")
    return train_on(folder, list(TEXT), {"encoding": "bytes"}, max_steps=30)


def say(capsys, **knobs):
    """What sample.py prints."""
    capsys.readouterr()
    sample.main(sample.Config(**{"device": "cpu", **knobs}))
    return capsys.readouterr().out


def change(path, **values):
    """Rewrite entries of a checkpoint."""
    torch.save(torch.load(path, weights_only=True) | values, path)


def test_greedy_text_is_the_likeliest_byte_again_and_again(checkpoint, capsys):
    text = say(capsys, checkpoint=checkpoint, prompt="the c", n_tokens=12, temperature=0)
    model, _ = load_model(checkpoint)
    tokens = list(b"the c")
    for _ in range(12):
        logits = model(torch.tensor(tokens[-16:])[None])[0, -1]  # 16 is its block_size
        tokens.append(logits.argmax().item())
    assert text == bytes(tokens).decode("utf-8", "replace") + "\n" + "-" * 40 + "\n"


def test_seed_temperature_and_top_k(checkpoint, capsys):
    text = lambda **knobs: say(capsys, checkpoint=checkpoint, prompt="the c", n_tokens=60, **knobs)
    assert text(temperature=1.5, seed=1) == text(temperature=1.5, seed=1)
    assert text(temperature=1.5, seed=1) != text(temperature=1.5, seed=2)
    greedy = text(temperature=0)
    assert text(temperature=0.01, top_k=0) == text(temperature=50.0, top_k=1) == greedy
    assert text(temperature=1e-6) == greedy
    nearly_uniform = text(temperature=1e6, top_k=0)
    assert sum(character not in set(TEXT.decode()) for character in nearly_uniform) > 20
    whole = text(temperature=5.0, top_k=0)
    assert whole == text(temperature=5.0, top_k=256) == text(temperature=5.0, top_k=100_000)


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(device="cuda:x"), "PyTorch sees cpu"),
        (dict(prompt=""), "prompt is empty"),
        (dict(checkpoint="no/such/file"), "no checkpoint"),
        (dict(temperature=-1.0), "temperature must be 0"),
        (dict(top_k=-1), "top_k must be at least 0"),
        (dict(prompt="FILE:no/such/file"), "No such file .*no/such/file"),
    ],
)
def test_what_cannot_work_is_one_line(checkpoint, knobs, words):
    with pytest.raises((UserError, OSError), match=words) as e:
        sample.main(sample.Config(**{"checkpoint": checkpoint, "device": "cpu", **knobs}))
    assert "\n" not in str(e.value)


def test_the_defaults_of_train_and_sample_fit_each_other():
    assert sample.Config().checkpoint == train.Config().out_dir


def test_a_prompt_may_be_in_a_file(checkpoint, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_bytes("a\r\nb".encode("utf-8-sig"))  # from Windows
    prompt = f"FILE:{tmp_path}/prompt.txt"
    assert say(capsys, checkpoint=checkpoint, prompt=prompt, n_tokens=0).startswith("a\r\nb\n---")


def test_a_prompt_beyond_the_context_is_said(checkpoint, capsys):
    sample.main(sample.Config(checkpoint=checkpoint, prompt="x" * 50, n_tokens=2, device="cpu"))
    assert "sees the last 16 of the prompt's 50 tokens" in capsys.readouterr().err


def test_half_a_character_is_shown_and_the_separator_ends_a_text(checkpoint, capsys, monkeypatch):
    text = lambda data, n: (
        monkeypatch.setattr("model.GPT.generate", lambda *a: (torch.tensor([b]) for b in data))
        or say(capsys, checkpoint=checkpoint, prompt="-", n_samples=n)
    )
    assert text("é€".encode()[:-1], 1).startswith("-é\ufffd\n---")
    assert text(b"abc\0def", 2) == 2 * ("-abc\n" + "-" * 40 + "\n")


def test_a_terminal_of_any_encoding(checkpoint, monkeypatch):
    """Characters that it lacks do not end the program."""
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="cp1252"))
    argv = [f"--checkpoint={checkpoint}", "--prompt=日本語é", "--n_tokens=3"]
    entry_point(sample.main, sample.Config, argv)
    sys.stdout.flush()
    assert printed.getvalue().startswith(b"???\xe9")


# ---- vocabularies


def rank_file(path, more=(b"th", b"the")):
    tokens = [*(bytes([b]) for b in range(256)), *more]
    lines = (f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
    path.write_text("".join(lines))


@pytest.fixture
def of_rank_file(tmp_path):
    """The checkpoint of a corpus with a rank file of 256 bytes, 2 merges and the separator."""
    meta = {"encoding": "tokenizer.model", "separator": 258}
    return train_on(tmp_path, list(TEXT), meta, vocab_size=259, max_steps=1, bag_size=1)


def test_the_vocabulary_is_where_the_corpus_was_or_in_data(
    of_rank_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir("/")
    knobs = dict(checkpoint=str(of_rank_file), prompt="the", n_tokens=3)
    text = lambda **more: say(capsys, **knobs, **more)[:3] == "the"
    assert text()
    (tmp_path / "corpus").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="tokenizer.model, the vocabulary of .*--data=FOLDER"):
        text()
    assert text(data=str(tmp_path / "elsewhere"))
    rank_file(tmp_path / "elsewhere" / "tokenizer.model", (b"an", b"and"))  # of equal size
    with pytest.raises(UserError, match="is not the vocabulary of"):
        text(data=str(tmp_path / "elsewhere"))


def test_a_vocabulary_of_characters(tmp_path, capsys):
    """A list of strings in the corpus's meta, as of nanoGPT's Shakespeare."""
    characters = ["\n", " ", "a", "b", "é", "€"]
    tokens = [2, 3, 4, 5, 1, 0] * 1200
    path = train_on(tmp_path, tokens, {}, vocab_size=6, max_steps=1, bag_size=1)
    with pytest.raises(UserError, match="names no encoding"):
        say(capsys, checkpoint=path)
    change(path, meta=torch.load(path, weights_only=True)["meta"] | {"characters": characters})
    text = say(capsys, checkpoint=path, prompt="aé€", n_tokens=20).split("\n---")[0]
    assert text.startswith("aé€") and len(text) == 23 and set(text) <= set(characters)
    with pytest.raises(UserError, match="the prompt holds 'z', which is not in the corpus"):
        say(capsys, checkpoint=path, prompt="abz")
