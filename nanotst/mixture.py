"""What a run reads: one corpus, or a mixture of several, such as dclm:0.5,fineweb_edu:0.5.

Each row of a batch comes from one corpus. Which one is a fixed pattern that keeps the shares exact over any
stretch of rows, to less than one row; each corpus has its own order and is read without replacement. All of
it is a function of the row's number, as in stream.py.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from nanotst import UserError
from nanotst.corpus import open_corpus

LONGEST_PATTERN = 10_000  # rows


@dataclass(frozen=True)
class Mixture:
    """parts: (name, Corpus, share as a Fraction); meta: plain values for a checkpoint, those of a single
    corpus or of the mixture."""

    parts: list
    meta: dict

    @property
    def folder(self):
        """Where the vocabulary is found; of a single corpus, where it is."""
        return self.parts[0][1].folder

    @property
    def fingerprint(self):
        return self.meta["fingerprint"]

    @property
    def bytes_per_token(self):
        return self.meta["bytes_per_token"]


def open_mixture(spec, say=print):
    """The corpora of the knob `dataset`: NAME, or NAME:SHARE,NAME:SHARE ... whose shares sum to 1. Raises
    UserError for shares that do not, or corpora of different vocabularies. say: called with
    what was guessed of a corpus."""
    if not any(":" in part[1:] and is_number(part.rpartition(":")[2]) for part in spec.split(",")):
        corpus = open_corpus(spec)
        if corpus.note:
            say(corpus.note)
        return Mixture([("", corpus, Fraction(1))], corpus.meta)
    parts = []
    for part in spec.split(","):
        name, _, share = part.rpartition(":")
        if not name or not is_number(share):
            raise UserError(f"dataset={spec}: write NAME:SHARE,NAME:SHARE, got {part!r}")
        parts.append((name, open_corpus(name), Fraction(share).limit_denominator(LONGEST_PATTERN)))
    names = [os.path.basename(os.path.normpath(name)) for name, *_ in parts]
    names = names if len(set(names)) == len(names) else [f"{i}" for i in range(len(parts))]
    shares = [share for *_, share in parts]
    n = math.lcm(*(share.denominator for share in shares))
    if sum(shares) != 1 or min(shares) <= 0 or n > LONGEST_PATTERN:
        said = f"{float(sum(shares)):g}"
        raise UserError(f"dataset={spec}: shares must be positive, of few digits, and sum to 1, not {said}")
    first = parts[0][1].meta
    for name, corpus, _ in parts:
        if corpus.note:
            say(corpus.note)
        for key in ("vocabulary", "vocab_size", "separator"):
            if corpus.meta[key] != first[key]:
                different = f"{name} has {key} {corpus.meta[key]}, {parts[0][0]} {first[key]}"
                raise UserError(f"dataset={spec}: {different}; prepare both with the same --encoding")
    parts = [(name, corpus, share) for name, (_, corpus, share) in zip(names, parts)]
    whole = "".join(f"{corpus.fingerprint} {share} " for _, corpus, share in parts)
    known = all(corpus.bytes_per_token for _, corpus, _ in parts)
    return Mixture(
        parts,
        first
        | {
            "fingerprint": hashlib.sha256(whole.encode()).hexdigest()[:32],
            "bytes_per_token": sum(float(share) * c.bytes_per_token for _, c, share in parts)
            if known
            else None,
            "train_tokens": sum(len(corpus.train) for _, corpus, _ in parts),
            "val_tokens": sum(len(corpus.val) for _, corpus, _ in parts),
            "mixture": [{"name": n, "share": str(share), "meta": corpus.meta} for n, corpus, share in parts],
        },
    )


def is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


class Pattern:
    """Which corpus each row of a run is from. shares: Fractions that sum to 1.

    The pattern repeats after as many rows as their common denominator. In it, each row goes to the corpus
    that is most behind its share.
    """

    def __init__(self, shares):
        self.n = math.lcm(*(share.denominator for share in shares))
        corpus, before = np.empty(self.n, np.int64), np.zeros((len(shares), self.n + 1), np.int64)
        for row in range(self.n):
            behind = [share * (row + 1) - int(read) for share, read in zip(shares, before[:, row])]
            corpus[row] = behind.index(max(behind))
            before[:, row + 1] = before[:, row]
            before[corpus[row], row + 1] += 1
        self.corpus = corpus  # (n,) of each row
        self.before = before  # (corpora, n + 1) rows of each corpus before it

    def corpus_of(self, row):
        """The corpus, by number, of each row: (m,) -> (m,)."""
        return self.corpus[row % self.n]

    def rows_before(self, row, corpus):
        """How many rows of a corpus come before each row of the run: numbers, or (m,) -> (m,)."""
        return row // self.n * self.before[corpus, -1] + self.before[corpus, row % self.n]
