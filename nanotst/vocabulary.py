"""The vocabulary of a checkpoint: how its token ids become text again, wherever its corpus lies now."""

import os
from pathlib import Path

import numpy as np

from nanotst import UserError
from nanotst.formats import DATA, sha256_of
from nanotst.tokenizer import Tokenizer, get_tokenizer


def tokenizer_of(path, checkpoint, data=""):
    """The Tokenizer of the corpus that the checkpoint at `path`, a file or a run's folder, was trained on.
    Only a vocabulary in a rank file needs the corpus. Its folder is `data` or, if that is empty, looked for
    where it was in training, beside the run's folder and in data/."""
    meta, was = checkpoint["meta"], data or str(checkpoint.get("data"))
    name = os.path.basename(os.path.normpath(was))
    places = *Path(path).resolve().parents[:3], DATA
    folders = [was, *(os.path.join(place, name) for place in places)]
    if data and not any(map(os.path.isdir, folders)):
        raise UserError(f"--data={data} is no folder")
    if meta.get("characters"):
        return character_tokenizer(meta["characters"])
    encoding, todo = meta.get("encoding"), "give its folder, --data=FOLDER"
    if not isinstance(encoding, str):
        raise UserError(f"the corpus of {path} names no encoding, so its tokens cannot become text")
    if not encoding.endswith((".model", ".tiktoken")):
        return get_tokenizer(encoding)
    files = [os.path.join(folder, encoding) for folder in folders]
    if not (file := next(filter(os.path.isfile, files), None)):
        where = ", ".join(folders)
        raise UserError(f"{encoding}, the vocabulary of {path}, is in none of {where}: {todo}")
    tokenizer, name = get_tokenizer(os.path.abspath(file)), f"rank file {sha256_of(file)[:16]}"
    # an old checkpoint has no hash
    if meta.get("vocabulary", name) != name or tokenizer.vocab_size != meta["vocab_size"]:
        raise UserError(f"{file} is not the vocabulary of {path}: {todo}")
    return tokenizer


def character_tokenizer(characters):
    """The vocabulary of a corpus of characters, such as nanoGPT's Shakespeare. It has no separator."""
    ids = {c: i for i, c in enumerate(characters)}

    def encode(text):
        if unknown := next((c for c in text if c not in ids), None):
            raise UserError(
                f"the prompt holds {unknown!r}, none of the corpus's {len(ids)} characters"
            )
        return np.array([ids[c] for c in text], dtype=np.int64)

    def decode_bytes(tokens):
        return "".join(characters[i] for i in np.ravel(tokens)).encode("utf-8", "replace")

    return Tokenizer("characters", len(characters), None, encode, decode_bytes)
