"""sample.py: what it prints, and what it says about a checkpoint, a prompt or a knob that will not do."""

import base64
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_corpus

import sample
from nanotst import UserError
from nanotst.checkpoint import load_model
from nanotst.configurator import entry_point as run_entry
from nanotst.configurator import parse
from nanotst.vocabulary import character_tokenizer, tokenizer_of

TEXT = b"the cat sat on the mat. " * 300


@pytest.fixture(scope="module")
def trained():
    """Where the model below is, once it is trained."""
    return {}


@pytest.fixture
def checkpoint(trained, run, tmp_path):
    """A model of bytes, after a few steps on a text that repeats itself."""
    if not trained:
        trained["path"] = train_on(run, tmp_path, list(TEXT), {"encoding": "bytes"})
    return trained["path"]


def train_on(run, tmp_path, tokens, meta, vocab_size=256, **knobs):
    """Train on tokens whose corpus says `meta`, too -> path of the checkpoint."""
    folder = write_corpus(tmp_path / "corpus", tokens[:6000], tokens[6000:], vocab_size)
    path = tmp_path / "corpus" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | meta))
    if meta.get("encoding") == "tokenizer.model":
        rank_file(tmp_path / "corpus" / "tokenizer.model")
    run(dataset=folder, **{"max_steps": 30, **knobs})
    return str(tmp_path / "run" / "last.pt")


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
        tokens.append(
            model(torch.tensor(tokens[-16:])[None])[0, -1].argmax().item()
        )  # 16 is its block_size
    assert text == bytes(tokens).decode("utf-8", "replace") + "\n" + "-" * 40 + "\n"


def test_same_seed_same_text(checkpoint, capsys):
    texts = [
        say(capsys, checkpoint=checkpoint, n_tokens=40, temperature=1.5, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_low_temperature_keeps_to_the_likeliest_and_a_high_one_does_not(checkpoint, capsys):
    """At 0.01 the text is the greedy one, at 100 nearly uniform over the bytes. Inverted: the reverse."""
    greedy, low, high = (
        say(capsys, checkpoint=checkpoint, prompt="the c", n_tokens=60, temperature=t, top_k=0)
        for t in (0, 0.01, 100)
    )
    assert low == greedy
    known = set(TEXT.decode())
    assert sum(character not in known for character in high) > 20


def test_top_k_chooses_among_k(checkpoint, capsys):
    """k = 1 is greedy at any temperature; beyond the vocabulary it leaves nothing out."""
    greedy = say(capsys, checkpoint=checkpoint, n_tokens=30, temperature=0)
    assert say(capsys, checkpoint=checkpoint, n_tokens=30, temperature=50, top_k=1) == greedy
    everything = [
        say(capsys, checkpoint=checkpoint, n_tokens=30, temperature=5, top_k=k)
        for k in (0, 256, 100000)
    ]
    assert everything[0] == everything[1] == everything[2] != greedy


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(device="cuda:x"), "cuda:N"),
        (dict(prompt=""), "prompt is empty"),
        (dict(checkpoint="no/such/file"), "no checkpoint"),
        (dict(temperature=-1.0), "temperature must be 0"),
        (dict(temperature=1e-40), "temperature must be 0"),
        (dict(temperature=1e300), "temperature must be 0"),
        (dict(temperature=float("nan")), "temperature must be 0"),
        (dict(top_k=-1), "top_k must be at least 0"),
        (dict(n_samples=0), "n_samples must be at least 1"),
        (dict(n_tokens=-1), "n_tokens must be at least 0"),
        (dict(seed=-1), "seed must be at least 0"),
        (dict(prompt="FILE:no/such/file"), "cannot read the prompt no/such/file: No such file"),
        (dict(data="no/such/folder"), "--data=no/such/folder is no folder"),
    ],
)
def test_what_cannot_work_is_one_line(checkpoint, knobs, words):
    with pytest.raises(UserError, match=words) as e:
        sample.main(sample.Config(**{"checkpoint": checkpoint, "device": "cpu", **knobs}))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "argument", ["--temperature=nan", "--seed=99999999999999999999", "--top_k=1e30"]
)
def test_numbers_no_knob_takes(argument):
    with pytest.raises(UserError, match="takes"):
        parse(sample.Config, [argument])


@pytest.mark.parametrize("temperature", [1e-6, 1e-4, 1e6])
def test_temperatures_at_the_edge_give_text(temperature, checkpoint, capsys):
    assert len(say(capsys, checkpoint=checkpoint, n_tokens=5, temperature=temperature)) > 40


def test_every_knob_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        parse(sample.Config, ["--help"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert len(lines) == len(sample.Config.__dataclass_fields__)
    assert all(len(line.split(None, 1)) == 2 for line in lines)


def test_a_prompt_file_is_taken_as_it_is(checkpoint, tmp_path, capsys):
    """Line ends stay, a byte-order mark does not count as text, other encodings are refused."""
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert say(capsys, checkpoint=checkpoint, prompt=f"FILE:{path}", n_tokens=0).startswith(
        "a\r\nb\n---"
    )
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match="it is not UTF-8"):
        say(capsys, checkpoint=checkpoint, prompt=f"FILE:{path}")


def test_a_prompt_beyond_the_context_is_said(checkpoint, capsys):
    sample.main(sample.Config(checkpoint=checkpoint, prompt="x" * 50, n_tokens=2, device="cpu"))
    assert "sees the last 16 of the prompt's 50 tokens" in capsys.readouterr().err


def test_half_a_character_at_the_end_is_shown_as_such(checkpoint, capsys, monkeypatch):
    """Bytes of a character that the text breaks off in do not vanish."""
    monkeypatch.setattr(
        "model.GPT.generate", lambda *args: (torch.tensor([b]) for b in "é€".encode()[:-1])
    )
    assert say(capsys, checkpoint=checkpoint, prompt="a").startswith("aé\ufffd\n---")


def test_the_separator_ends_a_text(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(
        "model.GPT.generate", lambda *args: (torch.tensor([b]) for b in b"abc\0def")
    )
    assert say(capsys, checkpoint=checkpoint, prompt="-", n_samples=2) == 2 * (
        "-abc\n" + "-" * 40 + "\n"
    )


def test_a_terminal_of_any_encoding(checkpoint, monkeypatch):
    """Characters that the terminal's encoding lacks do not end the program."""
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="cp1252"))
    run_entry(
        sample.main,
        sample.Config,
        [f"--checkpoint={checkpoint}", "--prompt=日本語é", "--n_tokens=3"],
    )
    sys.stdout.flush()
    assert printed.getvalue().startswith(b"???\xe9")


def test_a_corpus_without_encoding_is_one_line(run, tmp_path):
    run()
    with pytest.raises(UserError, match="names no encoding"):
        sample.main(sample.Config(checkpoint=str(tmp_path / "run" / "last.pt"), device="cpu"))


# ----------------------------------------------------------------------------------------------- vocabularies


def rank_file(path, more=(b"th", b"the")):
    tokens = [bytes([b]) for b in range(256)] + list(more)
    path.write_text(
        "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
    )


@pytest.fixture
def of_rank_file(run, tmp_path):
    """The checkpoint of a corpus with a rank file of 256 bytes, 2 merges and the separator."""
    meta = {"encoding": "tokenizer.model", "separator": 258}
    return train_on(run, tmp_path, list(TEXT), meta, vocab_size=259, max_steps=1, bag_size=1)


@pytest.mark.parametrize("was", ["absolute", "relative", "moved"])
def test_the_vocabulary_is_found_from_any_folder(was, of_rank_file, tmp_path, monkeypatch, capsys):
    """Where the corpus was, or beside the run's folder, whether the path was relative or both have moved."""
    path = Path(of_rank_file)
    if was == "relative":
        change(path, data="corpus")
    if was == "moved":
        (tmp_path / "new" / "out").mkdir(parents=True)
        (tmp_path / "corpus").rename(tmp_path / "new" / "corpus")
        path.parent.rename(tmp_path / "new" / "out" / "run")
        path = tmp_path / "new" / "out" / "run" / "last.pt"
    monkeypatch.chdir("/")
    assert say(capsys, checkpoint=str(path), prompt="the", n_tokens=3).startswith("the")


def test_data_says_where_the_vocabulary_is(of_rank_file, tmp_path, capsys):
    (tmp_path / "corpus").rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match="tokenizer.model, the vocabulary of .*, is in none of .*--data=FOLDER"
    ):
        say(capsys, checkpoint=of_rank_file)
    text = say(
        capsys, checkpoint=of_rank_file, data=str(tmp_path / "elsewhere"), prompt="the", n_tokens=3
    )
    assert text.startswith("the")


def test_another_vocabulary_is_refused(of_rank_file, tmp_path, capsys):
    """Of equal size, too, which the hash shows; an older checkpoint holds none, there the size decides."""
    file = tmp_path / "corpus" / "tokenizer.model"
    rank_file(file, (b"an", b"and"))
    with pytest.raises(UserError, match="is another vocabulary than that of"):
        say(capsys, checkpoint=of_rank_file)
    change(of_rank_file, meta={"encoding": "tokenizer.model", "separator": 258, "vocab_size": 259})
    say(capsys, checkpoint=of_rank_file, n_tokens=1)
    rank_file(file, (b"th", b"the", b" a"))
    with pytest.raises(UserError, match="is another vocabulary than that of"):
        say(capsys, checkpoint=of_rank_file)


def test_a_vocabulary_of_characters(run, tmp_path, capsys):
    """As of nanoGPT's Shakespeare: a list of strings in the corpus's meta."""
    characters = ["\n", " ", "a", "b", "é", "€"]
    tokens = [2, 3, 4, 5, 1, 0] * 1200
    path = train_on(run, tmp_path, tokens, {}, vocab_size=6, max_steps=1, bag_size=1)
    change(path, meta=torch.load(path, weights_only=True)["meta"] | {"characters": characters})
    text = say(capsys, checkpoint=path, prompt="aé€", n_tokens=20).split("\n---")[0]
    assert text.startswith("aé€") and len(text) == 23 and set(text) <= set(characters)
    with pytest.raises(UserError, match="the prompt holds 'z', none of the corpus's 6 characters"):
        say(capsys, checkpoint=path, prompt="abz")


def test_characters_there_and_back():
    tokenizer = character_tokenizer(["x", "é", "€"])
    assert tokenizer.encode("€x").tolist() == [2, 0] and tokenizer.decode([2, 0, 1]) == "€xé"


def test_an_encoding_that_is_no_name_is_one_line():
    with pytest.raises(UserError, match="names no encoding"):
        tokenizer_of("last.pt", {"meta": {"encoding": 5}})
