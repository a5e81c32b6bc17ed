"""A small corpus cut out of a large one, to see what repeated text does: blocks from all over its training
split, and the same validation split.

    python -m examples.small_corpus python_source out/small --tokens=1000000
"""

import os
from dataclasses import dataclass

from data.writer import Writer, prepared
from nanotst import UserError
from nanotst.configurator import entry_point
from nanotst.corpus import open_corpus
from nanotst.tokenizer import Tokenizer

BLOCKS = 64  # contiguous pieces of text


@dataclass
class Config:
    """Usage: python -m examples.small_corpus CORPUS FOLDER --tokens=N"""

    corpus: str  # prepared corpus, in data/ or elsewhere
    folder: str  # folder to write to
    tokens: int = 1_000_000  # tokens of the training split
    overwrite: bool = False  # whether another corpus in the folder may be replaced


def main(config):
    corpus = open_corpus(config.corpus)
    meta, n, knobs = corpus.meta, config.tokens, dict(of=corpus.fingerprint, tokens=config.tokens)
    size, apart = n // BLOCKS, len(corpus.train) // BLOCKS
    if not 0 < size <= apart:
        raise UserError(f"--tokens must lie in {BLOCKS}..{apart * BLOCKS}, got {n}")
    if prepared(config.folder, knobs, config.overwrite):
        return
    name, ranks = meta["encoding"], os.path.join(corpus.folder, meta["encoding"] or "")
    ranks = ranks if os.path.isfile(ranks) else ""
    tokenizer = Tokenizer(name, meta["vocab_size"], meta["separator"], None, None, ranks)
    with Writer(config.folder, tokenizer, knobs) as out:
        for i in range(BLOCKS):
            out.add("train", corpus.train[i * apart : i * apart + size], 0)
        out.add("val", corpus.val[:], round(len(corpus.val) * (corpus.bytes_per_token or 0)))
        out.source = [f"{n:,} tokens of {meta['train_tokens']:,}", *(meta.get("source") or [])]


if __name__ == "__main__":
    entry_point(main, Config)
