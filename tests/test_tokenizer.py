"""Vocabularies: bytes, tiktoken's, rank files."""

import base64

import numpy as np
import pytest

from nanotst import UserError, tokenizer
from nanotst.tokenizer import get_tokenizer

MERGES = [b"th", b" t", b"he", b" th", b" the", b"in", b"er", b"\n\n"]
HARD = "the café 中文 \U0001f600 <|endoftext|> <|end_of_text|>\n\n\ttabs\r\n" + "a" * 50


def write_ranks(path):
    """A rank file: the 256 bytes and a few merges."""
    tokens = [bytes([b]) for b in range(256)] + MERGES
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    return str(path)


def test_bytes_round_trip():
    t = get_tokenizer("bytes")
    assert (t.vocab_size, t.separator, t.name) == (256, 0, "bytes")
    ids = t.encode(HARD)
    assert ids.tolist() == list(HARD.encode()) and ids.dtype == np.int64
    assert t.decode(ids) == HARD
    assert t.encode("a\0b").tolist() == [97, 98]  # the separator never comes from text
    assert t.decode([0xE4, 0xB8]) == "\ufffd" and t.decode_bytes([0xE4, 0xB8]) == b"\xe4\xb8"
    assert len(t.encode("")) == 0 and t.encode("\ud800").tolist() == [ord("?")]


def test_rank_file_round_trip(tmp_path):
    ranks = write_ranks(tmp_path / "tiny.model")
    t = get_tokenizer(ranks)
    assert (t.vocab_size, t.separator, t.rank_file) == (265, 264, ranks)
    ids = t.encode(HARD)
    assert t.decode(ids) == HARD and len(ids) < len(HARD.encode())
    assert t.separator not in ids  # "<|endoftext|>" in the text is ordinary text
    assert t.encode("a\ud800").tolist() == [ord("a"), ord("?")]
    assert t.encode(" the").tolist() == [260] and t.decode([264]) == "<|endoftext|>"
    assert t.decode([97, 300, 98]) == "a\ufffdb"  # a padded row of a model


def test_llama3_special_tokens(tmp_path, monkeypatch):
    assert tokenizer.LLAMA3_RANKS == 128_000
    monkeypatch.setattr(tokenizer, "LLAMA3_RANKS", n := 264)
    t = get_tokenizer(write_ranks(tmp_path / "tokenizer.model"))
    assert (t.vocab_size, t.separator) == (n + 256, n + 1)
    special = "<|begin_of_text|><|end_of_text|><|start_header_id|><|end_header_id|><|eot_id|>"
    assert t.decode([n, n + 1, n + 6, n + 7, n + 9]) == special
    reserved = [t.decode([n + i]) for i in (2, 5, 8, 10, 255)]
    assert reserved == [f"<|reserved_special_token_{i}|>" for i in (0, 3, 4, 5, 250)]


def test_errors_are_one_line(tmp_path, monkeypatch):
    import tiktoken

    (tmp_path / "bad.model").write_bytes(b"\n\x0e\x0a\x05<unk>\x15 0 0\n")
    (tmp_path / "short.model").write_text("YQ== 0\n")

    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    for name, message in [
        (str(tmp_path / "bad.model"), "not a tiktoken rank file"),
        (str(tmp_path / "short.model"), "all 256 bytes"),
        (str(tmp_path / "none.model"), "no encoding or rank file"),
        ("gpt3", "no encoding or rank file 'gpt3'; known: bytes, .*gpt2"),
        ("gpt2", "TIKTOKEN_CACHE_DIR"),
    ]:
        with pytest.raises(UserError, match=message) as e:
            get_tokenizer(name)
        assert "\n" not in str(e.value)
