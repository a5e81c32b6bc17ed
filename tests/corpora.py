"""Shared by the tests of data/: text to prepare, and a plain reader of the corpora."""

import hashlib
import io
import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet

SEPARATOR = "\n<|endoftext|>\n"
WORDS = ["the", "then", "in", "other", "winter", "été", "中文", "x=1;", "12345", "don't"]


def make_documents(n=300, seed=0):
    """n different documents with empty lines, tabs and double spaces in them."""
    rng, words = random.Random(seed), [*WORDS, "\n", "\n\n\n", "", "", "\t"]
    return [
        f"document {i} of {seed} " + " ".join(rng.choices(words, k=rng.randrange(5, 200))) + "."
        for i in range(n)
    ]


def json_lines(documents):
    return "".join(json.dumps({"text": d}) + "\n" for d in documents)


def parquet(table):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(table), sink, row_group_size=7)
    return sink.getvalue()


def dataset(folder):
    """-> (meta, {split: documents, each a list of ids}), checked against each other."""
    folder = Path(folder)
    meta = json.loads((folder / "meta.json").read_text())
    splits = {}
    for split in ("train", "val"):
        names = sorted(n for n in meta["sha256"] if n.startswith(split))
        data = [(folder / n).read_bytes() for n in names]
        assert [hashlib.sha256(d).hexdigest() for d in data] == [meta["sha256"][n] for n in names]
        ids = np.frombuffer(b"".join(data), dtype=meta["dtype"])
        assert len(ids) == meta[f"{split}_tokens"]
        assert ids[-1] == meta["separator"] and ids.max() < meta["vocab_size"]
        ends = np.flatnonzero(ids == meta["separator"])
        splits[split] = [d[:-1].tolist() for d in np.split(ids, ends + 1)[:-1]]
    return meta, splits


def byte_documents(folder):
    """{split: documents} of a corpus of bytes."""
    splits = dataset(folder)[1].items()
    return {split: [bytes(d).decode() for d in documents] for split, documents in splits}


def contents(folder):
    """{name: bytes} of all files below a folder; empty if there is no folder."""
    files = (p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
