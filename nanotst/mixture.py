"""What a run reads: one corpus, or a mixture of several, such as dclm:0.5,fineweb_edu:0.5.

Each row of a batch comes from one corpus. Which one is a fixed pattern that keeps the shares at any time, to
less than one row; each corpus has its own order and is read without replacement. All of it is a function of
the row's number, as in stream.py.
"""

import hashlib
import itertools
import math
import os
import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from nanotst import UserError
from nanotst.corpus import open_corpus
from nanotst.formats import DATA

LONGEST_PATTERN = 10_000  # rows
SHARE = re.compile(r"[-+]?(\d{1,9}\.?\d{0,9}|\.\d{1,9}|\d{1,9}/[1-9]\d{0,8})")  # 0.5 or 1/2


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
    UserError for shares that do not, or corpora of different vocabularies. say: called with what was guessed
    of a corpus."""
    if not is_mixture(spec):
        corpus = open_corpus(spec)
        if corpus.note:
            say(corpus.note)
        return Mixture([("", corpus, Fraction(1))], corpus.meta)
    paths, shares = zip(*(name_and_share(part.strip(), spec) for part in spec.split(",")))
    if min(shares) <= 0 or sum(shares) != 1:
        said = " + ".join(map(str, shares)) + f" = {sum(shares)}"
        raise UserError(f"dataset={spec}: shares must be positive and sum to 1, not {said}")
    if math.lcm(*(share.denominator for share in shares)) > LONGEST_PATTERN:
        raise UserError(f"dataset={spec}: give shares of fewer digits, up to four")
    corpora = [open_corpus(path) for path in paths]
    for corpus in corpora:
        if corpus.note:
            say(corpus.note)
    check_alike(spec, paths, corpora)
    names = [os.path.basename(os.path.normpath(path)) for path in paths]
    names = names if len(set(names)) == len(names) else [f"{i}" for i in range(len(names))]
    parts = list(zip(names, corpora, shares))
    return Mixture(parts, meta_of(parts))


def is_mixture(spec):
    """Whether the knob names several corpora, and not one whose name has a comma or a colon in it."""
    alone = any(os.path.isdir(os.path.join(folder, spec)) for folder in (".", DATA))
    return not alone and ("," in spec or bool(SHARE.fullmatch(spec.rpartition(":")[2])))


def name_and_share(part, spec):
    """("dclm", Fraction(1, 2)) of dclm:0.5 or dclm:1/2."""
    name, _, share = part.rpartition(":")
    if not name or not SHARE.fullmatch(share):
        raise UserError(f"dataset={spec}: write NAME:SHARE,NAME:SHARE, got {part!r}")
    return name, Fraction(share)


def check_alike(spec, paths, corpora):
    """UserError unless ids mean the same in all of them, and no two are the same text."""
    first = corpora[0].meta
    for path, corpus in zip(paths, corpora):
        for key in ("vocabulary", "vocab_size", "separator"):
            if corpus.meta[key] != first[key]:
                different = f"{path} has {key} {corpus.meta[key]}, {paths[0]} {first[key]}"
                raise UserError(
                    f"dataset={spec}: {different}; prepare both with the same --encoding"
                )
        if corpus.meta["vocabulary"] is None:
            raise UserError(
                f"dataset={spec}: {path} names no encoding to compare; name it in its meta.json"
            )
    for (path, corpus), (other, its) in itertools.combinations(zip(paths, corpora), 2):
        if corpus.fingerprint == its.fingerprint:
            raise UserError(
                f"dataset={spec}: {path} and {other} hold the same text; give it one share"
            )


def meta_of(parts):
    """Plain values for a checkpoint, as a corpus has them, of a mixture."""
    metas = [corpus.meta for _, corpus, _ in parts]
    total = lambda key: sum(m[key] for m in metas) if all(m.get(key) for m in metas) else None
    whole = "".join(f"{corpus.fingerprint} {share} " for _, corpus, share in parts)
    known = all(corpus.bytes_per_token for _, corpus, _ in parts)
    per_token = (
        sum(float(share) * corpus.bytes_per_token for _, corpus, share in parts) if known else None
    )
    return metas[0] | {
        "fingerprint": hashlib.sha256(whole.encode()).hexdigest()[:32],
        "bytes_per_token": per_token,
        **{key: total(key) for key in ("train_tokens", "val_tokens", "train_bytes", "val_bytes")},
        "source": [line for m in metas for line in m.get("source") or ()],
        "mixture": [
            {"name": n, "share": str(share), "meta": corpus.meta} for n, corpus, share in parts
        ],
    }


class Pattern:
    """Which corpus each row of a run is from. shares: Fractions that sum to 1.

    The pattern repeats after as many rows as their common denominator. In it, each row goes to the corpus
    whose next row is due first, among those that have not had their share: like that all of them are less
    than one row off at any time (Tijdeman, "The chairman assignment problem", 1980).
    """

    def __init__(self, shares):
        self.n = math.lcm(*(share.denominator for share in shares))
        corpus, before = np.empty(self.n, np.int64), np.zeros((len(shares), self.n + 1), np.int64)
        for row in range(self.n):
            read = before[:, row].tolist()
            due = [
                (n + 1) / share if share * (row + 1) > n else math.inf
                for n, share in zip(read, shares)
            ]
            corpus[row] = due.index(min(due))
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
