"""Prepared corpora: files of token ids behind len() and [a:b], whoever wrote them (formats.py says who may).

    corpus = open_corpus("python_source")  # a folder in data/, or the path of one
    corpus.train[1000:2000]                # (1000,) ids, out of one file or over the edge of two
    corpus.meta                            # what a checkpoint remembers of it, with its fingerprint

What is verified, so that damage is found before it is trained on. A corpus is large above 1 GB of tokens:

    sizes             of all files, by their dtype and the number of tokens in meta.json, when it is opened
    headers, ids      when it is opened; of a large corpus, of whatever is read
    every byte        against "sha256" in meta.json, when it is opened. Of a large corpus whatever is read, in
                      parts of 64 KB where there are checksums of them (see write_sums), or else a whole file
                      when it is first read. Without "sha256" a flipped bit shows only by the fingerprint
    the fingerprint   against that in the checkpoint: of all tokens; of a large corpus, of 1024 blocks of 4096
"""

import bisect
import hashlib
import itertools
import mmap
import os
import struct
import threading
import zlib
from dataclasses import dataclass

import numpy as np

from nanotst import UserError
from nanotst.formats import AGAIN, damaged, find, readable, sha256_of

LARGE = 2**30  # bytes of tokens; a larger corpus is not read whole to open it
PART = 2**16  # bytes to a checksum
BLOCK, N_BLOCKS = 4096, 1024  # tokens to a block, and blocks, in the fingerprint of a large corpus
OPEN_FILES = (
    100  # that a split keeps mapped: each holds a file descriptor, of which a process has few
)
HEADER = 256 * 4  # bytes


@dataclass(frozen=True)
class Corpus:
    folder: str  # absolute
    meta: dict  # plain values, for a checkpoint
    train: "Tokens"
    val: "Tokens"
    note: str = ""  # what was guessed of it, a line for people

    @property
    def vocab_size(self):
        return self.meta["vocab_size"]

    @property
    def bytes_per_token(self):
        """Of the validation text; None where nobody knows."""
        return self.meta["bytes_per_token"]

    @property
    def fingerprint(self):
        """Equal for equal tokens, wherever they lie and in however many files."""
        return self.meta["fingerprint"]


def open_corpus(name):
    """The corpus in the folder `name` or else in data/`name`. UserError if there is none or it is damaged."""
    found = find(name)
    meta, files = found.meta, {}
    for split, names in found.files.items():
        files[split] = [
            TokenFile(
                os.path.join(found.folder, name),
                found.dtype,
                found.header,
                found.sha256.get(name),
                found.sha256.get(sums_name(name)),
            )
            for name in names
        ]
        n_tokens = sum(file.n_tokens for file in files[split])
        if n_tokens != meta.setdefault(f"{split}_tokens", n_tokens):
            whose = files[split][0].path + (
                f" to {names[-1]}: they hold" if names[1:] else " holds"
            )
            said = meta[f"{split}_tokens"]
            raise UserError(f"{whose} {n_tokens:,} tokens, meta.json says {said:,}; {AGAIN}")
    n_tokens = meta["train_tokens"] + meta["val_tokens"]
    large = n_tokens * smallest_dtype(meta["vocab_size"]).itemsize > LARGE
    train, val = (Tokens(files[split], meta["vocab_size"], large) for split in ("train", "val"))
    meta["fingerprint"] = fingerprint(train, val, meta["vocab_size"], large)
    return Corpus(found.folder, meta, train, val, found.note)


def check_same(corpus, saved, where):
    """UserError unless `saved`, the meta of the checkpoint `where`, is that of the same tokens."""
    if corpus.fingerprint != saved.get("fingerprint"):
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
        raise UserError(
            f"{corpus.folder} and {where} name no encoding to compare; name it in both meta.json"
        )


def differing(meta, saved, keys):
    different = [key for key in keys if saved.get(key) != meta.get(key)]
    return ", ".join(f"{key} {saved.get(key)} there, {meta.get(key)} here" for key in different)


def fingerprint(train, val, vocab_size, large):
    """A hash of the tokens, whatever the files; what it covers stands above."""
    dtype, parts = smallest_dtype(vocab_size), [vocab_size, len(train), len(val)]
    for tokens in (train, val):
        parts.append(hash_of(tokens, dtype, large))
        tokens.maps.clear()  # or all that was read would count as memory in use
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def hash_of(tokens, dtype, large):
    """sha256 of a split's tokens in `dtype`; of a large corpus, of blocks of them."""
    file = tokens.files[0]
    if not large and file.sha256 and len(tokens.files) == 1 and file.dtype == dtype:
        tokens[:]  # verifies the file
        return file.sha256
    starts, length, digest = range(0, len(tokens), 2**20), 2**20, hashlib.sha256()
    if large:
        last, length = max(0, len(tokens) - BLOCK), BLOCK
        starts = (i * last // (N_BLOCKS - 1) for i in range(N_BLOCKS))
    for start in starts:
        digest.update(tokens[start : start + length].astype(dtype, copy=False))
    return digest.hexdigest()


def smallest_dtype(vocab_size):
    return np.dtype("u1" if vocab_size <= 2**8 else "<u2" if vocab_size <= 2**16 else "<u4")


class Tokens:
    """The ids of a split, over all its files: len() and [a:b] -> (b-a,), read-only. Threads may share it."""

    def __init__(self, files, vocab_size, large):
        self.files, self.vocab_size, self.large = files, vocab_size, large
        self.stops = list(itertools.accumulate(file.n_tokens for file in files))
        self.may_exceed = np.iinfo(files[0].dtype).max >= vocab_size
        self.maps = {}  # number of a file: its tokens
        self.lock = threading.Lock()

    def __len__(self):
        return self.stops[-1]

    def __getitem__(self, span):
        start, stop, step = span.indices(self.stops[-1])
        if step != 1:
            raise ValueError("tokens are read without steps")
        if start >= stop:
            return np.empty(0, self.files[0].dtype)
        i = bisect.bisect_right(self.stops, start)
        if stop <= self.stops[i]:
            return self.read(i, start, stop)
        parts = []
        while start < stop:
            parts.append(self.read(i, start, min(stop, self.stops[i])))
            start, i = self.stops[i], i + 1
        return np.concatenate(parts)

    def read(self, i, start, stop):
        """[start:stop] of the split, which lies within file i."""
        file, whole = self.files[i], self.maps.get(i)
        if whole is None:
            whole = self.open(i)
        first = self.stops[i] - file.n_tokens
        start, stop = start - first, stop - first
        if file.sums is not None:
            file.check_parts(whole, start, stop)
        ids = whole[start:stop]
        if self.may_exceed and ids.max() >= self.vocab_size:
            at = int(np.argmax(ids >= self.vocab_size))
            raise UserError(
                f"{file.path}: id {ids[at]} of token {start + at:,} is beyond the vocabulary of "
                f"{self.vocab_size:,}; {AGAIN}"
            )
        return ids

    def open(self, i):
        with self.lock:
            if i not in self.maps:
                if len(self.maps) >= OPEN_FILES:
                    del self.maps[
                        next(iter(self.maps))
                    ]  # the oldest; slices still in use keep it alive
                self.maps[i] = self.files[i].open(self.large)
            return self.maps[i]


class TokenFile:
    """A file of ids, mapped and verified when it is first read."""

    def __init__(self, path, dtype, header=(), sha256=None, sums_sha256=None):
        self.path, self.dtype, self.header = path, dtype, header
        self.sha256, self.sums_sha256 = sha256, sums_sha256
        self.state = self.size_and_time()
        self.offset = HEADER if header else 0
        self.n_tokens, rest = divmod(self.state[0] - self.offset, dtype.itemsize)
        if rest or self.n_tokens <= 0:
            raise UserError(
                f"{path} is cut short: {self.state[0]:,} bytes for tokens of {dtype.name}"
            )
        self.verified = False
        self.sums = self.seen = None  # checksums of the parts (n,), and which parts were compared

    def size_and_time(self):
        with readable(self.path):
            status = os.stat(self.path)
        return status.st_size, status.st_mtime_ns

    def open(self, large):
        """Its tokens (n_tokens,)."""
        with readable(self.path), open(self.path, "rb") as f:
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        if self.size_and_time() != self.state:
            raise UserError(f"{self.path} was replaced while it was in use; start again")
        if not self.verified:
            self.verify(mapped, large)
            self.verified = True
        return np.frombuffer(mapped, self.dtype, offset=self.offset)

    def verify(self, mapped, large):
        if self.header:
            says, expected = struct.unpack_from("<3i", mapped), (*self.header, self.n_tokens)
            if says != expected:
                raise UserError(
                    f"{self.path}: its header (magic, version, tokens) is {says}, by its size it "
                    f"should be {expected}; fetch it again"
                )
        if large and self.sums_sha256:
            path = sums_name(self.path)
            with readable(path), open(path, "rb") as f:
                sums = f.read()
            if hashlib.sha256(sums).hexdigest() != self.sums_sha256 or len(sums) * PART < 4 * len(
                mapped
            ):
                raise damaged(path)
            self.seen = bytearray(len(sums) // 4)
            self.sums = np.frombuffer(sums, "<u4")
        elif self.sha256 and sha256_of(self.path) != self.sha256:
            raise damaged(self.path)

    def check_parts(self, ids, start, stop):
        """Compare the parts that hold ids[start:stop] with their checksums, those not compared before."""
        size = self.dtype.itemsize
        for part in range(start * size // PART, -(-stop * size // PART)):
            if not self.seen[part]:
                if (
                    zlib.crc32(ids.view(np.uint8)[part * PART : (part + 1) * PART])
                    != self.sums[part]
                ):
                    raise damaged(self.path, f"in the 64 KB from byte {part * PART:,} on")
                self.seen[part] = 1


def write_sums(path):
    """Write the checksums of a token file's parts beside it -> their path, which "sha256" has to name too."""
    with open(path, "rb") as f:
        sums = [zlib.crc32(part) for part in iter(lambda: f.read(PART), b"")]
    with open(sums_name(path), "wb") as f:
        f.write(np.array(sums, "<u4").tobytes())
        f.flush()
        os.fsync(f.fileno())
    return sums_name(path)


def sums_name(path):
    return path[: -len(".bin")] + ".crc"
