"""The vocabulary of a checkpoint: how its token ids become text again, wherever its corpus lies now."""

import os
from pathlib import Path

import numpy as np

from nanotst import UserError
from nanotst.tokenizer import Tokenizer, get_tokenizer

DATA = str(Path(__file__).resolve().parents[1] / "data")


def tokenizer_of(path, checkpoint, data=""):
    """The Tokenizer of the corpus on which a checkpoint, loaded from `path`, was trained.

    Only a vocabulary in a rank file needs the corpus. Its folder is `data`; if that is not given, it is
    looked for where it was in training, beside the run's folder, and in the repository's data/.
    """
    meta, was = checkpoint["meta"], checkpoint["data"]
    if data and not (os.path.isdir(data) or os.path.isdir(os.path.join(DATA, data))):
        raise UserError(f"--data={data} is no folder")
    if "characters" in meta:
        return character_tokenizer(meta["characters"])
    encoding = meta.get("encoding")
    if not encoding:
        raise UserError(
            f"the corpus of {path} names no encoding in its meta.json, so tokens cannot become text"
        )
    if not encoding.endswith((".model", ".tiktoken")):
        return get_tokenizer(encoding)

    if data:
        places = [data, os.path.join(DATA, data)]
    else:
        run, name = Path(path).resolve().parent, os.path.basename(os.path.normpath(was))
        places = [was, *(str(folder / name) for folder in run.parents[:2]), os.path.join(DATA, name)]
    for place in places:
        if os.path.isfile(os.path.join(place, encoding)):
            tokenizer = get_tokenizer(encoding, folder=place)
            if tokenizer.vocab_size != meta["vocab_size"]:
                raise UserError(
                    f"{os.path.join(place, encoding)} has {tokenizer.vocab_size} tokens, {path} was trained "
                    f"on {meta['vocab_size']}: give the folder of its corpus, --data=FOLDER"
                )
            return tokenizer
    raise UserError(
        f"{encoding}, the vocabulary of {path}, is in none of {', '.join(dict.fromkeys(places))}: "
        "give the folder of its corpus, --data=FOLDER"
    )


def character_tokenizer(characters):
    """The vocabulary of a corpus of characters, such as nanoGPT's Shakespeare. It has no separator."""
    ids = {character: i for i, character in enumerate(characters)}

    def encode(text):
        if unknown := next((character for character in text if character not in ids), None):
            raise UserError(
                f"the corpus has no character {unknown!r} among its {len(ids)}; leave it out of the prompt"
            )
        return np.array([ids[character] for character in text], dtype=np.int64)

    def decode_bytes(tokens):
        return "".join(characters[i] for i in np.asarray(tokens).reshape(-1)).encode("utf-8", "replace")

    return Tokenizer("characters", len(characters), None, encode, decode_bytes)
