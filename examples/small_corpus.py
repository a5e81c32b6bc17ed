"""A small corpus cut out of a large one, to see what repeated text does: blocks from all over its training
split, and the same validation split.

    python -m examples.small_corpus python_source out/small --tokens=1000000
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanotst import UserError
from nanotst.configurator import entry_point
from nanotst.corpus import open_corpus

BLOCKS = 64  # of text that stands together


@dataclass
class Config:
    """Usage: python -m examples.small_corpus CORPUS FOLDER --tokens=N"""

    corpus: str  # a prepared one, in data/ or elsewhere
    folder: str  # to write to
    tokens: int = 1_000_000  # of the training split


def main(config):
    corpus, folder = open_corpus(config.corpus), Path(config.folder)
    size, apart = config.tokens // BLOCKS, len(corpus.train) // BLOCKS
    if not 0 < size <= apart:
        raise UserError(f"--tokens must lie in {BLOCKS}..{apart * BLOCKS}, got {config.tokens}")
    train = np.concatenate([corpus.train[i * apart : i * apart + size] for i in range(BLOCKS)])
    folder.mkdir(parents=True, exist_ok=True)
    for split, tokens in (("train", train), ("val", corpus.val[:])):
        tokens.tofile(folder / f"{split}.bin")
    keys = ("vocab_size", "encoding", "separator", "bytes_per_token")
    meta = {key: corpus.meta[key] for key in keys} | {"dtype": train.dtype.name}
    meta |= {"train_tokens": len(train), "val_tokens": len(corpus.val)}
    meta["source"] = [
        f"{config.tokens:,} tokens of {corpus.meta['train_tokens']:,}",
        *(corpus.meta["source"] or []),
    ]
    if os.path.isfile(ranks := os.path.join(corpus.folder, meta["encoding"] or "")):
        shutil.copy(ranks, folder)  # a vocabulary of its own
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


if __name__ == "__main__":
    entry_point(main, Config)
