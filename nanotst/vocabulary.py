"""The vocabulary of a checkpoint: how its token ids become text again, wherever its corpus lies now."""

import os
from pathlib import Path

import numpy as np

from nanotst import UserError
from nanotst.formats import DATA, sha256_of
from nanotst.tokenizer import Tokenizer, get_tokenizer


def tokenizer_of(path, checkpoint, data=""):
    """The Tokenizer of the corpus that the checkpoint at `path` was trained on. Only a vocabulary in a rank
    file needs the corpus. Its folder is `data` or, if that is empty, looked for where it was in training,
    beside the run's folder and in the repository's data/."""
    meta, folders = checkpoint["meta"], [data, os.path.join(DATA, data)]
    if data and not any(map(os.path.isdir, folders)):
        raise UserError(f"--data={data} is no folder")
    if meta.get("characters"):
        return character_tokenizer(meta["characters"])
    encoding = meta.get("encoding")
    if not isinstance(encoding, str):
        raise UserError(f"the corpus of {path} names no encoding, so its tokens cannot become text")
    if not encoding.endswith((".model", ".tiktoken")):
        return get_tokenizer(encoding)
    if not data:
        was, run = str(checkpoint.get("data")), Path(path).resolve().parent
        name = os.path.basename(os.path.normpath(was))
        beside = [str(folder / name) for folder in run.parents[:2]]
        folders = [was, *beside, os.path.join(DATA, name)]
    files = [os.path.join(folder, encoding) for folder in folders]
    file, todo = next(filter(os.path.isfile, files), None), "give its folder, --data=FOLDER"
    if not file:
        where = ", ".join(folders)
        raise UserError(f"{encoding}, the vocabulary of {path}, is in none of {where}: {todo}")
    if meta.get("vocabulary") != f"rank file {sha256_of(file)[:16]}":
        raise UserError(f"{file} is another vocabulary than that of {path}: {todo}")
    return get_tokenizer(os.path.abspath(file))


def character_tokenizer(characters):
    """The vocabulary of a corpus of characters, such as nanoGPT's Shakespeare. It has no separator."""
    ids = {character: i for i, character in enumerate(characters)}

    def encode(text):
        if unknown := next((character for character in text if character not in ids), None):
            what = f"none of the corpus's {len(ids)} characters"
            raise UserError(f"the prompt holds {unknown!r}, {what}")
        return np.array([ids[character] for character in text], dtype=np.int64)

    def decode_bytes(tokens):
        text = "".join(characters[i] for i in np.asarray(tokens).reshape(-1))
        return text.encode("utf-8", "replace")

    return Tokenizer("characters", len(characters), None, encode, decode_bytes)
