"""What the tests of the prepare scripts share: text to prepare, and a plain reader of what they write."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np

SEPARATOR = "\n<|endoftext|>\n"


def make_documents(n=300, seed=0):
    rng = random.Random(seed)
    words = [
        "the",
        "then",
        "in",
        "other",
        "winter",
        "\u00e9t\u00e9",
        "\u4e2d\u6587",
        "x=1;",
        "12345",
        "don't",
    ]
    words += ["\n", "\n\n\n", "", "", "\t"]
    return [
        f"document {i} of {seed} " + " ".join(rng.choices(words, k=rng.randrange(5, 200))) + "."
        for i in range(n)
    ]


def json_lines(documents):
    return "".join(json.dumps({"text": d}) + "\n" for d in documents)


def dataset(folder):
    """-> (meta, {split: list of documents, each a list of ids}), after checking one against the other."""
    folder = Path(folder)
    meta = json.loads((folder / "meta.json").read_text())
    splits = {}
    for split in ("train", "val"):
        names = sorted(n for n in meta["sha256"] if n.startswith(split) and n.endswith(".bin"))
        data = [(folder / n).read_bytes() for n in names]
        for name, content in zip(names, data):
            assert hashlib.sha256(content).hexdigest() == meta["sha256"][name]
        ids = np.frombuffer(b"".join(data), dtype=meta["dtype"])
        assert len(ids) == meta[f"{split}_tokens"]
        assert ids[-1] == meta["separator"] and ids.max() < meta["vocab_size"]
        ends = np.flatnonzero(ids == meta["separator"])
        splits[split] = [d[:-1].tolist() for d in np.split(ids, ends + 1)[:-1]]
    return meta, splits


def byte_documents(folder):
    """{split: list of documents} of a corpus of bytes."""
    _, splits = dataset(folder)
    return {split: [bytes(d).decode() for d in documents] for split, documents in splits.items()}


def contents(folder):
    """{name: bytes} of all files below a folder, none if it is not there."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()
    }
