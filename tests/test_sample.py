"""sample.py: what it prints, and what it says about a checkpoint, a prompt or a device that will not do."""
import json

import pytest
import torch

import sample
from checkpoint import load_model
from conftest import write_corpus


@pytest.fixture
def checkpoint(run, tmp_path):
    """A model of bytes, after a few steps on a text that repeats itself."""
    text = b"the cat sat on the mat. " * 300
    folder = write_corpus(tmp_path / "bytes", list(text[:6000]), list(text[6000:]), 256)
    meta = json.loads((tmp_path / "bytes" / "meta.json").read_text())
    (tmp_path / "bytes" / "meta.json").write_text(json.dumps(meta | {"encoding": "bytes"}))
    run(dataset=folder, max_steps=30)
    return str(tmp_path / "run" / "last.pt")


def test_greedy_text_is_the_likeliest_byte_again_and_again(checkpoint, capsys):
    capsys.readouterr()
    sample.main(sample.Config(checkpoint=checkpoint, prompt="the c", n_tokens=12, temperature=0, device="cpu"))
    model, _ = load_model(checkpoint)
    tokens = list(b"the c")
    for _ in range(12):
        tokens.append(model(torch.tensor(tokens[-16:])[None])[0, -1].argmax().item())  # 16 is its block_size
    assert capsys.readouterr().out.startswith(bytes(tokens).decode("utf-8", "replace"))


def test_same_seed_same_text(checkpoint, capsys):
    texts = []
    for seed in (1, 1, 2):
        capsys.readouterr()
        sample.main(sample.Config(checkpoint=checkpoint, n_tokens=40, temperature=1.5, seed=seed, device="cpu"))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("knobs, words", [(dict(device="cuda:x"), "cuda:N"), (dict(prompt=""), "prompt is empty"),
                                          (dict(checkpoint="no/such/file"), "no checkpoint")])
def test_what_cannot_work_is_one_line(checkpoint, knobs, words):
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        sample.main(sample.Config(**{"checkpoint": checkpoint, "device": "cpu", **knobs}))


def test_a_corpus_without_encoding_is_one_line(run, tmp_path):
    run()
    with pytest.raises(SystemExit, match="names no encoding"):
        sample.main(sample.Config(checkpoint=str(tmp_path / "run" / "last.pt"), device="cpu"))
