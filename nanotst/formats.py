"""What is in the folder of a prepared corpus: its token files, in order, and what is known about them.

Formats that are read as they are, all little-endian:

    our own           meta.json, and train.bin, val.bin or train_00000.bin, train_00001.bin, val_00000.bin ...
    nanoGPT           train.bin, val.bin in uint16; meta.pkl with the vocabulary, or GPT-2 tokens without it
    llm.c, and        X_train_000001.bin, X_val_000000.bin ..., each with a header of 256 int32 (magic,
    modded-nanogpt    version, number of tokens), then GPT-2 tokens in uint16 or Llama-3 tokens in uint32
"""

import hashlib
import json
import os
import pickle
import re

import numpy as np

from nanotst import UserError

DATA = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data")
TOKEN_FILE = re.compile(r"(.+_)?(train|val)(?:_(\d{1,9}))?\.bin")  # whose, split, shard
GPT2 = dict(vocab_size=50257, encoding="gpt2", separator=50256, vocabulary="gpt2")
LLAMA3 = dict(vocab_size=128256, separator=128000, vocabulary="Llama 3")
# magic: version, dtype, and what is in it. The separator is in front of each document
LLM_C = {20240520: (1, "<u2", GPT2), 20240801: (7, "<u4", LLAMA3)}
AGAIN = "prepare the corpus again"


def find(name):
    """The corpus in the folder `name`, or else in data/`name` -> (absolute folder, {split: names of its token
    files}, meta, their dtype, the magic and version of each or (), {name: sha256}), or UserError."""
    # raw text in the working directory doesn't hide data/NAME
    for folder in map(os.path.abspath, (name, os.path.join(DATA, name))):
        names = os.listdir(folder) if os.path.isdir(folder) else []
        if "meta.json" in names:
            return folder, *read_ours(folder, names)
        # without unfinished.tmp, which a preparation leaves if it is killed at its end
        if any(map(TOKEN_FILE.fullmatch, names)) and "unfinished.tmp" not in names:
            return folder, *read_foreign(folder, names)
    todo = "run its prepare.py, or data/text/prepare.py on your own text"
    raise UserError(f"no prepared corpus in {name!r} or in data/; {todo}")


def shards(folder, names):
    """The token files among `names` -> {"train": names in order, "val": ...}."""
    found, number = {}, lambda m: int(m[3] or -2)  # train.bin is the only one
    for split in ("train", "val"):
        files = [m for m in map(TOKEN_FILE.fullmatch, names) if m and m[2] == split]
        files.sort(key=lambda m: (m[1] or "", number(m)))
        if not files:
            raise UserError(f"{folder} has no {split}.bin and no shards of it; {AGAIN}")
        first, last = files[0], files[-1]
        if first[1] != last[1] or number(last) - number(first) != len(files) - 1:
            between = f"between {first[0]} and {last[0]}"
            raise UserError(f"{folder} lacks shards {between}, or holds several corpora")
        found[split] = [m[0] for m in files]
    return found


def read_ours(folder, names):
    path = os.path.join(folder, "meta.json")
    try:
        with open(path, encoding="utf-8") as f:
            read = json.load(f)
        dtype = np.dtype({"uint8": "u1", "uint16": "<u2", "uint32": "<u4"}[read["dtype"]])
        counts = ("vocab_size", "train_tokens", "val_tokens")
        if not all(type(read[key]) is int and read[key] > 0 for key in counts):
            raise ValueError(f"{', '.join(counts)} must be whole numbers above 0")
        keys = (*counts, "encoding", "separator", "bytes_per_token", "source")
        meta = {key: read.get(key) for key in keys}
        sha256 = read.get("sha256") or {}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} describes no corpus ({type(e).__name__}: {e}); {AGAIN}") from None
    # files without a hash are of a former corpus, unless there are no hashes at all
    files = shards(folder, [n for n in sha256 or names if n.startswith(("train", "val"))])
    meta["vocabulary"] = vocabulary = meta["encoding"]
    if vocabulary in names or vocabulary in sha256:  # rank files may share a name
        meta["vocabulary"] = f"rank file {sha256_of(os.path.join(folder, vocabulary))[:16]}"
    return files, meta, dtype, (), sha256


def read_foreign(folder, names):
    """What llm.c, modded-nanogpt or nanoGPT wrote. The header tells which."""
    files = shards(folder, names)
    path = os.path.join(folder, files["train"][0])
    with open(path, "rb") as f:
        magic = int.from_bytes(f.read(4), "little")
    meta = dict.fromkeys(("bytes_per_token", "encoding", "separator", "vocabulary", "source"))
    if magic in LLM_C:
        version, dtype, known = LLM_C[magic]
        return files, meta | known, np.dtype(dtype), (magic, version), {}
    if files["train"] != ["train.bin"]:
        raise UserError(f"{path} has no header of llm.c (magic {magic}), and no meta.json")
    known = GPT2 | {"source": ["no meta.json or meta.pkl: its tokens are taken for GPT-2's"]}
    if "meta.pkl" in names:
        known = read_pickle(os.path.join(folder, "meta.pkl"))
    return files, meta | known, np.dtype("<u2"), (), {}


class PlainUnpickler(pickle.Unpickler):
    """Dicts, lists, strings and numbers need no classes; anything else could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def read_pickle(path):
    """nanoGPT's meta.pkl: vocab_size and, for a vocabulary of characters, itos -> what is known of it."""
    try:
        with open(path, "rb") as f:
            read = PlainUnpickler(f).load()
        n = read["vocab_size"]
        if read.get("itos") is None:
            return dict(vocab_size=n)
        characters = [read["itos"][i] for i in range(n)]
    except Exception as e:  # a damaged pickle can raise anything
        raise UserError(f"{path} is not nanoGPT's meta.pkl ({type(e).__name__}: {e})") from None
    name = f"characters {hashlib.sha256(json.dumps(characters).encode()).hexdigest()[:16]}"
    return dict(vocab_size=n, characters=characters, vocabulary=name)


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()
