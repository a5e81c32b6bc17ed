"""Prepared corpora: token files as one sequence with len() and [a:b], whoever wrote them (see formats.py).

    corpus = open_corpus("python_source")  # a folder in data/, or a path
    corpus.train[1000:2000]                # (1000,) ids, from one file or across several
    corpus.meta                            # what a checkpoint keeps of it, with its fingerprint

Opening a corpus checks the sizes of its files, their headers, and, up to 1 GB of tokens, every id and the
sha256 in meta.json. The fingerprint, which a resumed run compares, covers 1024 blocks of a larger corpus."""

import bisect
import functools
import hashlib
import os
from dataclasses import dataclass

import numpy as np

from nanotst import UserError
from nanotst.formats import AGAIN, find, sha256_of

LARGE = 2**30  # bytes of tokens
BLOCK, N_BLOCKS = 4096, 1024  # of the fingerprint of a large corpus: tokens in a block, blocks
OPEN_FILES = 100  # of a split; each takes a file descriptor
HEADER = 256 * 4  # bytes


@dataclass(frozen=True)
class Corpus:
    folder: str  # absolute
    meta: dict  # plain values, for a checkpoint
    train: "Tokens"
    val: "Tokens"

    vocab_size = property(lambda self: self.meta["vocab_size"])
    bytes_per_token = property(lambda self: self.meta["bytes_per_token"])  # of val; None if unknown
    fingerprint = property(lambda self: self.meta["fingerprint"])  # equal for equal tokens


def open_corpus(name):
    """The corpus in the folder `name`, or else in data/`name`. UserError if it is missing or damaged."""
    folder, files, meta, dtype, header, hashes = find(name)
    splits = []
    for split, names in files.items():
        paths = [os.path.join(folder, name) for name in names]
        splits.append(Tokens(paths, dtype, header, meta["vocab_size"]))
        n = len(splits[-1])
        if n != (said := meta.setdefault(f"{split}_tokens", n)):
            raise UserError(f"{folder}: {split} has {n:,} tokens, meta.json says {said:,}; {AGAIN}")
    large = sum(map(len, splits)) * smallest_dtype(meta["vocab_size"]).itemsize > LARGE
    for name, sha256 in hashes.items():
        if not large and sha256_of(path := os.path.join(folder, name)) != sha256:
            raise UserError(f"{path} is damaged: its sha256 is not the one in meta.json; {AGAIN}")
    meta["fingerprint"] = fingerprint(*splits, meta["vocab_size"], large)
    return Corpus(folder, meta, *splits)


def check_same(corpus, saved, where):
    """UserError unless `saved`, the meta of the checkpoint `where`, describes the same tokens."""
    if differing(corpus.meta, saved, ("fingerprint", "separator")):
        keys = ("vocabulary", "vocab_size", "train_tokens", "val_tokens", "separator")
        what = differing(corpus.meta, saved, keys) or "as many tokens, but others"
        raise UserError(f"{corpus.folder} does not hold the corpus of {where}: {what}")


def check_vocabulary(corpus, saved, where):
    """UserError unless ids mean the same in a corpus and in the checkpoint `where`, whose meta is `saved`."""
    if corpus.fingerprint == saved.get("fingerprint"):
        return
    if what := differing(corpus.meta, saved, ("vocabulary", "vocab_size")):
        raise UserError(f"{corpus.folder} has another vocabulary than {where}: {what}")
    if corpus.meta["vocabulary"] is None:
        raise UserError(f"{corpus.folder} and {where} name no encoding to compare; name it in both")


def differing(ours, theirs, keys, words="{} {} there, {} here"):
    """The values of two dicts that differ, in words."""
    values = [(key, theirs.get(key), ours.get(key)) for key in keys]
    return ", ".join(words.format(*three) for three in values if three[1] != three[2])


def fingerprint(train, val, vocab_size, large):
    """A hash of the tokens, whatever files they are in."""
    dtype, parts = smallest_dtype(vocab_size), [vocab_size, len(train), len(val)]
    for tokens in (train, val):
        digest, length, starts = hashlib.sha256(), 2**20, range(0, len(tokens), 2**20)
        if large:
            length, last = BLOCK, max(0, len(tokens) - BLOCK)
            starts = (i * last // (N_BLOCKS - 1) for i in range(N_BLOCKS))
        for start in starts:
            digest.update(tokens[start : start + length].astype(dtype, copy=False))
        parts.append(digest.hexdigest())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def smallest_dtype(vocab_size):
    return np.dtype("u1" if vocab_size <= 2**8 else "<u2" if vocab_size <= 2**16 else "<u4")


class Tokens:
    """The ids of a split, over all its files: len() and [a:b] -> (b-a,). Threads may share it."""

    def __init__(self, paths, dtype, header, vocab_size):
        self.paths, self.dtype, self.vocab_size = paths, dtype, vocab_size
        self.offset, self.stops = HEADER if header else 0, [0]
        self.states = [size_and_time(path) for path in paths]
        for path, (size, _) in zip(paths, self.states):
            n, rest = divmod(size - self.offset, dtype.itemsize)
            if rest or n <= 0:
                raise UserError(f"{path} is cut short: {size:,} bytes of {dtype.name}; {AGAIN}")
            says = np.fromfile(path, "<i4", 3).tolist()
            if header and says != [*header, n]:
                raise UserError(f"{path}: its header is {says}, not {[*header, n]}; fetch it again")
            self.stops.append(self.stops[-1] + n)
        open_file = lambda i: np.asarray(np.memmap(paths[i], dtype, "r", self.offset))
        self.map = functools.lru_cache(OPEN_FILES)(open_file)

    def __len__(self):
        return self.stops[-1]

    def __getitem__(self, span):
        start, stop, _ = span.indices(len(self))
        parts = []
        while start < stop:
            i = bisect.bisect_right(self.stops, start) - 1
            path, first = self.paths[i], self.stops[i]
            # reading beyond the end of a file would kill the process
            if size_and_time(path) != self.states[i]:
                raise UserError(f"{path} has changed while it was in use; start again")
            ids = self.map(i)[start - first : stop - first]
            if ids.max() >= self.vocab_size:
                what = f"id {ids.max()} from token {start - first:,} on is beyond the vocabulary"
                raise UserError(f"{path}: {what}; {AGAIN}")
            parts.append(ids)
            start = self.stops[i + 1]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])


def size_and_time(path):
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
