"""The vocabulary of a checkpoint: how its token ids become text again, wherever its corpus lies now."""

import os
from pathlib import Path

import numpy as np

from nanotst import UserError
from nanotst.formats import DATA, sha256_of
from nanotst.tokenizer import Tokenizer, get_tokenizer


def tokenizer_of(path, checkpoint, data=""):
    """The Tokenizer of the corpus on which a checkpoint, loaded from `path`, was trained.

    Only a vocabulary in a rank file needs the corpus. Its folder is `data`; if that is not given, it is
    looked for where it was in training, beside the run's folder, and in the repository's data/.
    """
    meta = checkpoint["meta"]
    if data and not any(map(os.path.isdir, (data, os.path.join(DATA, data)))):
        raise UserError(f"--data={data} is no folder")
    if meta.get("characters"):
        return character_tokenizer(meta["characters"])
    encoding = meta.get("encoding")
    if not isinstance(encoding, str):
        raise UserError(f"the corpus of {path} names no encoding, so its tokens cannot become text")
    if not encoding.endswith((".model", ".tiktoken")):
        return get_tokenizer(encoding)

    todo = "give the folder of its corpus, --data=FOLDER"
    if data:
        places = [data, os.path.join(DATA, data)]
    else:
        run, was = Path(path).resolve().parent, str(checkpoint.get("data"))
        name = os.path.basename(os.path.normpath(was))
        places = [
            was,
            *(str(folder / name) for folder in run.parents[:2]),
            os.path.join(DATA, name),
        ]
    file = next(filter(os.path.isfile, (os.path.join(place, encoding) for place in places)), None)
    if not file:
        where = ", ".join(dict.fromkeys(places))
        raise UserError(f"{encoding}, the vocabulary of {path}, is in none of {where}: {todo}")
    tokenizer = get_tokenizer(os.path.abspath(file))
    known = str(meta.get("vocabulary"))
    if known.startswith("rank file"):
        same = known == f"rank file {sha256_of(file)[:16]}"
    else:  # an older checkpoint
        same = tokenizer.vocab_size == meta.get("vocab_size")
    if not same:
        raise UserError(f"{file} is another vocabulary than that of {path}: {todo}")
    return tokenizer


def character_tokenizer(characters):
    """The vocabulary of a corpus of characters, such as nanoGPT's Shakespeare. It has no separator."""
    ids = {character: i for i, character in enumerate(characters)}

    def encode(text):
        if unknown := next((character for character in text if character not in ids), None):
            raise UserError(
                f"the prompt holds {unknown!r}, none of the corpus's {len(ids)} characters"
            )
        return np.array([ids[character] for character in text], dtype=np.int64)

    def decode_bytes(tokens):
        return "".join(characters[i] for i in np.asarray(tokens).reshape(-1)).encode(
            "utf-8", "replace"
        )

    return Tokenizer("characters", len(characters), None, encode, decode_bytes)
