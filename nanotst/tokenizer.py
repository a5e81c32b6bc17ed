"""Text to token ids and back.

get_tokenizer(name) takes
  "bytes"                   the 256 byte values; needs no vocabulary file
  "gpt2", "cl100k_base" ..  an encoding of tiktoken, which downloads its vocabulary once
  a path                    a local tiktoken rank file, such as Llama 3's tokenizer.model. Llama 3's pattern
                            splits the text. Rank files name no special tokens: 128,000 ranks get Llama 3's,
                            any other number a single <|endoftext|>

The name is "encoding" in a corpus's meta.json. A corpus made with a rank file keeps a copy of it."""

import base64
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tiktoken

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
    separator: int | None  # after every document; also a start token
    encode: Callable[[str], np.ndarray]  # str -> (T,) int64; "<|endoftext|>" is ordinary text
    decode_bytes: Callable[..., bytes]  # ids -> bytes; a token may be a part of a character
    rank_file: str = ""  # path, if the vocabulary came from a local file

    def decode(self, ids):
        """ids: (T,) -> text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def get_tokenizer(name):
    """The Tokenizer of an encoding or rank file. Raises UserError if there is no such vocabulary."""
    if name == "bytes":
        return _byte_tokenizer()
    if os.path.isfile(name):
        return _rank_file_tokenizer(name)
    if name not in (known := tiktoken.list_encoding_names()):
        raise UserError(f"no encoding or rank file {name!r}; known: bytes, {', '.join(known)}")
    try:
        bpe = tiktoken.get_encoding(name)
    except Exception as e:  # requests, urllib3, hash and file errors have one remedy
        todo = "set TIKTOKEN_CACHE_DIR to a folder that has it, or use --encoding=bytes"
        raise UserError(f"cannot fetch {name!r} ({type(e).__name__}); {todo}") from None
    return _bpe_tokenizer(name, bpe, bpe.eot_token)


def _byte_tokenizer():
    def encode(text):
        # NUL is the separator, so text must not hold it; half a surrogate pair becomes "?"
        data = text.encode("utf-8", errors="replace").replace(b"\0", b"")
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)

    return Tokenizer("bytes", 256, 0, encode, lambda ids: bytes(np.ravel(ids).tolist()))


def _bpe_tokenizer(name, bpe, separator, rank_file=""):
    """bpe: a tiktoken.Encoding."""

    def encode(text):
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair becomes "?"
        return bpe.encode_to_numpy(text, disallowed_special=()).astype(np.int64)

    def one(i):
        try:
            return bpe.decode_single_token_bytes(i)
        except KeyError:  # an id without a token: a gap in a vocabulary, or a padded row of a model
            return "\ufffd".encode()

    decode_bytes = lambda ids: b"".join(map(one, np.ravel(ids).tolist()))
    return Tokenizer(name, bpe.n_vocab, separator, encode, decode_bytes, rank_file)


def _rank_file_tokenizer(path):
    """A rank file has a line "base64-of-the-token rank" for each token."""
    try:  # not by tiktoken.load, which keeps a copy by path and reads that when the file has changed
        with open(path, "rb") as f:
            pairs = [line.split() for line in f.read().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        n = len(ranks)
        # tiktoken aborts on text whose bytes it lacks
        if set(ranks.values()) != set(range(n)) or not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError("needs ranks 0..N-1 and all 256 bytes")
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is not a tiktoken rank file ({e})") from None
    names, separator = ["<|endoftext|>"], n
    if n == LLAMA3_RANKS:  # ids 128000 to 128255, in the order of the Llama 3 release
        reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
        names = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:4], "<|start_header_id|>"]
        names += ["<|end_header_id|>", reserved[4], "<|eot_id|>", *reserved[5:]]
        separator = n + 1
    special = {token: n + i for i, token in enumerate(names)}
    how = dict(pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return _bpe_tokenizer(path, tiktoken.Encoding(path, **how), separator, path)
