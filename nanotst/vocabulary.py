"""The vocabulary of a checkpoint: how its token ids become text again."""

import os

import numpy as np

from nanotst import UserError
from nanotst.formats import sha256_of
from nanotst.tokenizer import Tokenizer, get_tokenizer


def tokenizer_of(path, checkpoint, data=""):
    """The Tokenizer of the corpus that the checkpoint at `path` was trained on. A vocabulary in a rank file
    is read from the corpus: its folder is `data`, or else the one that was trained on."""
    meta = checkpoint["meta"]
    if meta.get("characters"):
        return character_tokenizer(meta["characters"])
    encoding, todo = meta.get("encoding"), "give the folder of its corpus, --data=FOLDER"
    if not isinstance(encoding, str):
        raise UserError(f"the corpus of {path} names no encoding, so its tokens cannot become text")
    if not encoding.endswith((".model", ".tiktoken")):
        return get_tokenizer(encoding)
    file = os.path.join(data or checkpoint.get("data", ""), encoding)
    if not os.path.isfile(file):
        raise UserError(f"{file}, the vocabulary of {path}, is missing: {todo}")
    tokenizer, name = get_tokenizer(file), f"rank file {sha256_of(file)[:16]}"
    # an old checkpoint has no hash
    if meta.get("vocabulary", name) != name or tokenizer.vocab_size != meta["vocab_size"]:
        raise UserError(f"{file} is not the vocabulary of {path}: {todo}")
    return tokenizer


def character_tokenizer(characters):
    """The vocabulary of a corpus of characters, such as nanoGPT's Shakespeare. It has no separator."""
    ids = {c: i for i, c in enumerate(characters)}

    def encode(text):
        try:
            return np.array([ids[c] for c in text], dtype=np.int64)
        except KeyError as e:
            raise UserError(f"the prompt holds {e}, which is not in the corpus") from None

    def decode_bytes(tokens):
        return "".join(characters[i] for i in np.ravel(tokens)).encode("utf-8", "replace")

    return Tokenizer("characters", len(characters), None, encode, decode_bytes)
