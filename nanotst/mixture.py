"""What a run reads: one corpus, or a mixture of several, such as dclm:0.5,fineweb_edu:0.5.

Each row of a batch comes from one corpus. A fixed pattern decides which, so that the shares hold at any time
to within one row. All of this is a function of the row's number, as in stream.py."""

import hashlib
import math
import os
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from nanotst import UserError
from nanotst.corpus import Corpus, check_vocabulary, differing, open_corpus

LONGEST_PATTERN = 10_000  # rows


@dataclass(frozen=True)
class Mixture:
    parts: list  # (name, Corpus, share as a Fraction)
    meta: dict  # plain values for a checkpoint, as in Corpus

    folder = property(lambda self: self.parts[0][1].folder)  # it holds the vocabulary
    fingerprint, bytes_per_token = Corpus.fingerprint, Corpus.bytes_per_token


def open_mixture(spec, say=print):
    """Open the corpora of the knob `dataset`: NAME, or NAME:SHARE,NAME:SHARE ... with shares that sum to 1.
    Raises UserError for other shares, or corpora of different vocabularies. say: prints their sources."""
    named = [(spec, ":", "1")]
    if "," in spec:
        named = [part.strip().rpartition(":") for part in spec.split(",")]
    try:
        shares = [Fraction(share) for *_, share in named]  # 0.5 or 1/2
    except (ValueError, ZeroDivisionError):
        raise UserError(f"dataset={spec}: write NAME:SHARE,NAME:SHARE") from None
    if min(shares) <= 0 or sum(shares) != 1:
        raise UserError(f"dataset={spec}: shares must be positive and sum to 1, not {sum(shares)}")
    if math.lcm(*(share.denominator for share in shares)) > LONGEST_PATTERN:
        raise UserError(f"dataset={spec}: give shares with at most four digits")
    corpora = [open_corpus(name) for name, *_ in named]
    first = corpora[0]
    for corpus in corpora:
        if corpus.meta["source"]:
            say(f"corpus {corpus.folder}: {corpus.meta['source'][0]}")
    if len(corpora) == 1:
        return Mixture([("", first, Fraction(1))], first.meta)
    for other in corpora[1:]:
        check_vocabulary(other, first.meta, first.folder)
        if what := differing(other.meta, first.meta, ("separator",)):
            raise UserError(f"{other.folder} divides documents unlike {first.folder}: {what}")
    names = [os.path.basename(corpus.folder) for corpus in corpora]
    names = names if len(set(names)) == len(names) else map(str, range(len(names)))
    parts = list(zip(names, corpora, shares))
    metas, rate = [corpus.meta for corpus in corpora], None
    if all(meta["bytes_per_token"] for meta in metas):
        rate = sum(float(share) * corpus.bytes_per_token for _, corpus, share in parts)
    whole = "".join(f"{corpus.fingerprint} {share} " for _, corpus, share in parts)
    meta = first.meta | {
        "fingerprint": hashlib.sha256(whole.encode()).hexdigest()[:32],
        "train_tokens": sum(meta["train_tokens"] for meta in metas),
        "val_tokens": sum(meta["val_tokens"] for meta in metas),
        "bytes_per_token": rate,
        "source": [line for meta in metas for line in meta["source"] or ()],
        "mixture": [{"name": n, "share": str(share), "meta": c.meta} for n, c, share in parts],
    }
    return Mixture(parts, meta)


class Pattern:
    """Which corpus each row of a run comes from. shares: Fractions that sum to 1.

    It repeats after as many rows as their common denominator. Each row goes to the corpus whose next row is
    due first, among those behind their share (Tijdeman, "The chairman assignment problem", 1980)."""

    def __init__(self, shares):
        self.n = math.lcm(*(share.denominator for share in shares))
        read, order = [0] * len(shares), []
        for row in range(self.n):
            behind = [i for i, share in enumerate(shares) if share * (row + 1) > read[i]]
            order.append(min(behind, key=lambda i: (read[i] + 1) / shares[i]))
            read[order[-1]] += 1
        self.corpus = np.array(order)  # (n,) of each row, by number
        counts = np.cumsum(self.corpus == np.arange(len(shares))[:, None], axis=1)
        self.before = np.pad(counts, ((0, 0), (1, 0)))  # (corpora, n + 1) rows of each before it

    def rows_before(self, row, corpus):
        """How many rows of a corpus come before each row of the run: numbers, or (m,) -> (m,)."""
        return row // self.n * self.before[corpus, -1] + self.before[corpus, row % self.n]
