"""Text to token ids and back.

get_tokenizer(name) takes
  "bytes"                   the 256 byte values; needs no vocabulary file and no package
  "gpt2", "cl100k_base" ..  an encoding of tiktoken, which downloads its vocabulary once
  a path                    a local tiktoken rank file, such as Llama 3's tokenizer.model. It holds neither a
                            split pattern nor special tokens: 128,000 ranks get Llama 3's; any other number
                            gets Llama 3's pattern and a single <|endoftext|>, which `note` says

The name is "encoding" in a corpus's meta.json. A corpus made with a rank file keeps a copy of it, so
get_tokenizer(meta["encoding"], folder=CORPUS_FOLDER) opens the right one."""

import base64
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from nanotst import UserError

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_RANKS = 128000


@dataclass(frozen=True)
class Tokenizer:
    name: str
    vocab_size: int
    separator: int | None  # written after every document; also a start token
    encode: Callable[[str], np.ndarray]  # str -> (T,) int64; "<|endoftext|>" is ordinary text
    decode_bytes: Callable[..., bytes]  # ids -> bytes; a token may be a part of a character
    rank_file: str = ""  # path, if the vocabulary came from a local file
    note: str = ""  # a line for people about what was guessed

    def decode(self, ids) -> str:
        """ids: (T,) -> text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def get_tokenizer(name: str, folder: str = "") -> Tokenizer:
    """The Tokenizer of an encoding or rank file; folder: where a relative rank file is looked for first.
    Raises UserError if there is no such vocabulary."""
    if name == "bytes":
        return _byte_tokenizer()
    for path in (os.path.join(folder, name), name):
        if os.path.isfile(path):
            return _rank_file_tokenizer(path)
    if name.endswith((".model", ".tiktoken")) or os.path.dirname(name):
        raise UserError(f"no such rank file: {os.path.join(folder, name)}")
    tiktoken = _import_tiktoken(name)
    known = ["bytes", "a path of a rank file", *tiktoken.list_encoding_names()]
    if name not in known:
        raise UserError(f"unknown encoding '{name}'; known: {', '.join(known)}")
    try:
        return _bpe_tokenizer(name, tiktoken.get_encoding(name))
    except Exception as e:  # requests, urllib3, hash and file errors have one remedy
        raise UserError(
            f"the vocabulary of '{name}' could not be fetched ({type(e).__name__}); set "
            "TIKTOKEN_CACHE_DIR to a folder that has it, or prepare the corpus with --encoding=bytes"
        ) from None


def _ids(ids) -> list[int]:
    return np.asarray(ids, dtype=np.int64).reshape(-1).tolist()


def _byte_tokenizer() -> Tokenizer:
    def encode(text: str) -> np.ndarray:
        # NUL is the separator, so text must not hold it; half a surrogate pair becomes "?"
        data = text.encode("utf-8", errors="replace").replace(b"\0", b"")
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)

    return Tokenizer("bytes", 256, 0, encode, lambda ids: bytes(_ids(ids)))


def _bpe_tokenizer(name: str, bpe, separator: int | None = None, rank_file: str = "") -> Tokenizer:
    """bpe: a tiktoken.Encoding."""

    def encode(text: str) -> np.ndarray:
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair becomes "?"
        return bpe.encode_to_numpy(text, disallowed_special=()).astype(np.int64)

    def one(i: int) -> bytes:
        try:
            return bpe.decode_single_token_bytes(i)
        except KeyError:  # an id without a token: a gap in a vocabulary, or a padded row of a model
            return "\ufffd".encode()

    separator = bpe.eot_token if separator is None else separator
    decode_bytes = lambda ids: b"".join(map(one, _ids(ids)))
    return Tokenizer(name, bpe.n_vocab, separator, encode, decode_bytes, rank_file)


def _rank_file_tokenizer(path: str) -> Tokenizer:
    """A rank file has a line "base64-of-the-token rank" for each token."""
    # not by tiktoken.load, which keeps a copy by path and reads that when the file has changed
    try:
        with open(path, "rb") as f:
            pairs = [line.split() for line in f.read().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        n = len(ranks)
        # tiktoken aborts on text whose bytes it lacks
        if set(ranks.values()) != set(range(n)) or not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError("needs ranks 0..N-1 and all 256 bytes")
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is not a tiktoken rank file ({e})") from None
    names, separator, note = ["<|endoftext|>"], n, ""
    if n == LLAMA3_RANKS:  # ids 128000 to 128255, in the order of the Llama 3 release
        reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
        names = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:4], "<|start_header_id|>"]
        names += ["<|end_header_id|>", reserved[4], "<|eot_id|>", *reserved[5:]]
        separator = n + 1
    else:
        note = (
            f"{path} has {n:,} ranks, not Llama 3's {LLAMA3_RANKS:,}: text is split by Llama 3's pattern all "
            "the same, which may not be its model's, and the one special token is <|endoftext|>"
        )
    bpe = _import_tiktoken(path).Encoding(
        os.path.basename(path),
        pat_str=LLAMA3_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={token: n + i for i, token in enumerate(names)},
    )
    return replace(_bpe_tokenizer(path, bpe, separator, path), note=note)


def _import_tiktoken(name: str):
    try:
        import tiktoken  # only here: bytes must work without it
    except ImportError:
        raise UserError(
            f"'{name}' needs: pip install tiktoken (or prepare the corpus with --encoding=bytes)"
        ) from None
    return tiktoken
