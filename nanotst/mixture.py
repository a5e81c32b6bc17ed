"""What a run reads: one corpus, or a mixture of several, such as dclm:0.5,fineweb_edu:0.5.

Each row of a batch comes from one corpus. A fixed pattern decides which, so that the shares hold at any time
to within one row. All of this is a function of the row's number, as in stream.py."""

import hashlib
import itertools
import math
import os
import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from nanotst import UserError
from nanotst.corpus import Corpus, differing, open_corpus

LONGEST_PATTERN = 10_000  # rows
SHARE = re.compile(r"\d*\.?\d+|\d+/[1-9]\d*")  # 0.5 or 1/2


@dataclass(frozen=True)
class Mixture:
    parts: list  # (name, Corpus, share as a Fraction)
    meta: dict  # plain values for a checkpoint, as in Corpus

    folder = property(lambda self: self.parts[0][1].folder)  # it holds the vocabulary
    fingerprint, bytes_per_token = Corpus.fingerprint, Corpus.bytes_per_token


def open_mixture(spec, say=print):
    """Open the corpora of the knob `dataset`: NAME, or NAME:SHARE,NAME:SHARE ... with shares that sum to 1.
    Raises UserError for other shares, or corpora of different vocabularies. say: prints what was guessed."""
    named = [part.strip().rpartition(":") for part in spec.split(",")]
    if len(named) == 1 and not SHARE.fullmatch(named[0][2]):
        named = [(spec, ":", "1")]
    if not all(name and SHARE.fullmatch(share) for name, _, share in named):
        raise UserError(f"dataset={spec}: write NAME:SHARE,NAME:SHARE")
    shares = [Fraction(share) for *_, share in named]
    if min(shares) <= 0 or sum(shares) != 1:
        said = " + ".join(map(str, shares)) + f" = {sum(shares)}"
        raise UserError(f"dataset={spec}: shares must be positive and sum to 1, not {said}")
    if math.lcm(*(share.denominator for share in shares)) > LONGEST_PATTERN:
        raise UserError(f"dataset={spec}: give shares of fewer digits, up to four")
    corpora = [open_corpus(name) for name, *_ in named]
    for note in filter(None, (corpus.note for corpus in corpora)):
        say(note)
    if len(corpora) == 1:
        return Mixture([("", corpora[0], Fraction(1))], corpora[0].meta)
    check_alike(spec, corpora)
    names = [os.path.basename(corpus.folder) for corpus in corpora]
    names = names if len(set(names)) == len(names) else map(str, range(len(names)))
    parts = list(zip(names, corpora, shares))
    return Mixture(parts, meta_of(parts))


def check_alike(spec, corpora):
    """UserError unless ids mean the same in all of them, and no two are the same text."""
    for a, b in itertools.combinations(corpora, 2):
        both = f"dataset={spec}: {b.folder} and {a.folder}"
        if what := differing(a.meta, b.meta, ("vocabulary", "vocab_size", "separator")):
            raise UserError(f"{both} differ, {what}; prepare both with the same --encoding")
        if a.meta["vocabulary"] is None:
            raise UserError(f"{both} name no encoding to compare; name it in their meta.json")
        if a.fingerprint == b.fingerprint:
            raise UserError(f"{both} hold the same text; give it one share")


def meta_of(parts):
    """The meta of a mixture, with the keys of a corpus."""
    metas = [corpus.meta for _, corpus, _ in parts]
    whole = "".join(f"{corpus.fingerprint} {share} " for _, corpus, share in parts)
    meta = metas[0] | {"fingerprint": hashlib.sha256(whole.encode()).hexdigest()[:32]}
    for key in ("train_tokens", "val_tokens", "train_bytes", "val_bytes"):
        meta[key] = sum(m[key] for m in metas) if all(m.get(key) for m in metas) else None
    known = all(m["bytes_per_token"] for m in metas)
    rate = sum(float(share) * c.bytes_per_token for _, c, share in parts) if known else None
    return meta | {
        "bytes_per_token": rate,
        "source": [line for m in metas for line in m.get("source") or ()],
        "mixture": [{"name": n, "share": str(share), "meta": c.meta} for n, c, share in parts],
    }


class Pattern:
    """Which corpus each row of a run comes from. shares: Fractions that sum to 1.

    The pattern repeats after as many rows as their common denominator. In it, each row goes to the corpus
    whose next row is due first, among those behind their share. So each is always less than one row off
    (Tijdeman, "The chairman assignment problem", 1980)."""

    def __init__(self, shares):
        self.n = math.lcm(*(share.denominator for share in shares))
        read, order = [0] * len(shares), []
        for row in range(self.n):
            behind = [i for i, share in enumerate(shares) if share * (row + 1) > read[i]]
            order.append(min(behind, key=lambda i: (read[i] + 1) / shares[i]))
            read[order[-1]] += 1
        self.corpus = np.array(order)  # (n,) of each row
        counts = np.cumsum(self.corpus == np.arange(len(shares))[:, None], axis=1)
        self.before = np.pad(counts, ((0, 0), (1, 0)))  # (corpora, n + 1) rows of each before it

    def corpus_of(self, row):
        """The corpus, by number, of each row: (m,) -> (m,)."""
        return self.corpus[row % self.n]

    def rows_before(self, row, corpus):
        """How many rows of a corpus come before each row of the run: numbers, or (m,) -> (m,)."""
        return row // self.n * self.before[corpus, -1] + self.before[corpus, row % self.n]
