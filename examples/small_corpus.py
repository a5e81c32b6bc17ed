"""A small corpus cut out of a large one, to see what repeated text does. See Config."""

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
    """python -m examples.small_corpus CORPUS FOLDER --tokens=N: blocks from all over the training split, and
    the whole validation split."""

    corpus: str  # prepared corpus, in data/ or elsewhere
    folder: str  # folder to write to
    tokens: int = 1_000_000  # tokens of the training split


def main(config):
    corpus = open_corpus(config.corpus)
    meta, n, knobs = corpus.meta, config.tokens, dict(of=corpus.fingerprint, tokens=config.tokens)
    size, apart = n // BLOCKS, len(corpus.train) // BLOCKS
    if not 0 < size <= apart:
        raise UserError(f"--tokens must lie in {BLOCKS}..{apart * BLOCKS}, got {n}")
    if prepared(config.folder, knobs):
        return
    ranks = os.path.join(corpus.folder, "tokenizer.model")
    known = meta["encoding"], meta["vocab_size"], meta["separator"], None, None
    tokenizer = Tokenizer(*known, ranks if os.path.isfile(ranks) else "")
    out = Writer(config.folder, tokenizer, knobs)
    for i in range(BLOCKS):
        out.add("train", corpus.train[i * apart : i * apart + size], 0)
    out.add("val", corpus.val[:], round(len(corpus.val) * (corpus.bytes_per_token or 0)))
    out.source = [f"{n:,} tokens of {meta['train_tokens']:,}", *(meta["source"] or [])]
    out.publish()


if __name__ == "__main__":
    entry_point(main, Config)
