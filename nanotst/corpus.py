"""Prepared corpora: files of token ids behind len() and [a:b], whoever wrote them.

    corpus = open_corpus("python_source")  # a folder in data/, or the path of one
    corpus.train[1000:2000]                # (1000,) ids, out of one file or over the edge of two
    corpus.meta                            # what a checkpoint remembers of it, with its fingerprint

Read without conversion, by what lies in the folder, all little-endian:

    our own             meta.json, and train.bin, val.bin or train_00000.bin, train_00001.bin, ... val_00000.bin, ...
    nanoGPT             train.bin, val.bin in uint16; meta.pkl with the vocabulary, or GPT-2 tokens without one
    llm.c, and          X_train_000001.bin, ... X_val_000000.bin, each with a header of 256 int32 (magic, version,
    modded-nanogpt      number of tokens, zeros), then GPT-2 tokens in uint16 or Llama-3 tokens in uint32

What is verified, so that damage is found before it is trained on (a corpus is large above 1 GB of tokens):

    sizes               of all files, against their dtype and the number of tokens in meta.json, when it is opened
    headers             when it is opened; of a large corpus when a file is first read
    ids                 against the vocabulary: all when it is opened; of a large corpus whatever is read
    bytes               where meta.json has "sha256": all when it is opened. Of a large corpus whatever is read, in
                        parts of 64 KB, where each file has its checksums beside it (write_sums); otherwise the
                        whole of a file when it is first read
    another corpus      a checkpoint's fingerprint against that of the tokens: all of them; of a large corpus 1024
                        blocks of 4096. Formats without "sha256" have nothing else to show a flipped bit by
"""

import bisect
import contextlib
import hashlib
import io
import itertools
import json
import mmap
import os
import pickle
import re
import reprlib
import struct
import threading
import zlib
from dataclasses import dataclass

import numpy as np

from nanotst import UserError

DATA = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data")
LARGE = 2**30  # bytes of tokens; a larger corpus is not read whole to open it
PART = 2**16  # bytes to a checksum
BLOCK, N_BLOCKS = 4096, 1024  # tokens to a block, and blocks, in the fingerprint of a large corpus
OPEN_FILES = 128  # files that a split keeps mapped: each holds a file descriptor, and a system gives out few
LARGEST_META = 2**24  # bytes of meta.json or meta.pkl

TOKEN_FILE = re.compile(r"(.+_)?(train|val)(?:_(\d{1,9}))?\.bin")  # whose, split, number of the shard
HEADER = 256 * 4  # bytes
LLM_C = {  # magic: version, dtype, and what is in it. The separator stands before each document
    20240520: (1, "<u2", dict(vocab_size=50257, encoding="gpt2", separator=50256)),
    20240801: (7, "<u4", dict(vocab_size=128256, encoding=None, separator=128000)),
}


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
    """The corpus in the folder `name`, or else in data/`name`. UserError where there is none, or a damaged one."""
    folder, names = find(name)
    ours = "meta.json" in names
    meta, dtype, sha256, magic, note = read_meta(folder, names) if ours else read_foreign(folder, names)
    files = {}
    for split in ("train", "val"):
        files[split] = [
            TokenFile(os.path.join(folder, n), dtype, magic, sha256.get(n), sha256.get(sums_name(n)))
            for n in shards(folder, sha256 or names, split, ours)
        ]
        n_tokens = sum(f.n_tokens for f in files[split])
        if ours and n_tokens != meta[f"{split}_tokens"]:
            raise UserError(
                f"{files[split][0].path} {'and those after it hold' if files[split][1:] else 'holds'} {n_tokens:,} "
                f"tokens, its meta.json says {meta[f'{split}_tokens']:,}; prepare the corpus again"
            )
        meta[f"{split}_tokens"] = n_tokens
    n_bytes = (meta["train_tokens"] + meta["val_tokens"]) * smallest_dtype(meta["vocab_size"]).itemsize
    large = n_bytes > LARGE
    train, val = (Tokens(files[split], meta["vocab_size"], large) for split in ("train", "val"))
    meta["vocabulary"] = vocabulary(folder, meta, sha256)
    meta["fingerprint"] = fingerprint(train, val, meta["vocab_size"], large)
    return Corpus(folder, meta, train, val, note)


def check_same(corpus, saved, where):
    """UserError unless `saved`, the meta of the checkpoint `where`, is of the same tokens."""
    if corpus.fingerprint != saved.get("fingerprint"):
        keys = ("vocabulary", "vocab_size", "train_tokens", "val_tokens", "separator")
        raise UserError(
            f"{corpus.folder} does not hold the corpus of {where}: "
            + (differences(corpus.meta, saved, keys) or "as many tokens, but others")
        )


def check_vocabulary(corpus, saved, where):
    """UserError unless ids mean the same in a corpus as in the checkpoint `where`, whose meta is `saved`."""
    if corpus.fingerprint == saved.get("fingerprint"):
        return
    if different := differences(corpus.meta, saved, ("vocabulary", "vocab_size")):
        raise UserError(f"{corpus.folder} has another vocabulary than {where}: {different}")
    if corpus.meta["vocabulary"] is None:
        raise UserError(f"neither {corpus.folder} nor {where} names its encoding, so they cannot be compared")


def differences(meta, saved, keys):
    return ", ".join(
        f"{key} {saved.get(key)} there, {meta[key]} here" for key in keys if saved.get(key) != meta[key]
    )


# ------------------------------------------------------------------------------------------------ reading tokens


class Tokens:
    """The ids of a split, over all its files: len() and [a:b] -> (b-a,), not to be written to. Safe in threads."""

    def __init__(self, files, vocab_size, large):
        self.files, self.large = files, large
        self.stops = list(itertools.accumulate(f.n_tokens for f in files))
        self.vocab_size = (
            vocab_size if vocab_size <= np.iinfo(files[0].dtype).max else None
        )  # no id can be beyond
        self.maps = {}  # number of the file: its tokens
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
        """[start:stop], all of which is in file i."""
        file, whole = self.files[i], self.maps.get(i)
        if whole is None:
            whole = self.open(i)
        first = self.stops[i] - file.n_tokens
        ids = whole[start - first : stop - first]
        if file.sums is not None:
            file.check_parts(whole, start - first, stop - first)
        if self.vocab_size and ids.max() >= self.vocab_size:
            at = int(np.argmax(ids >= self.vocab_size))
            raise UserError(
                f"{file.path}: id {ids[at]} of token {start - first + at:,} is beyond its vocabulary of "
                f"{self.vocab_size:,}; prepare the corpus again"
            )
        return ids

    def open(self, i):
        with self.lock:
            if i not in self.maps:
                if len(self.maps) >= OPEN_FILES:
                    del self.maps[
                        next(iter(self.maps))
                    ]  # the oldest; slices of it that are in use keep it alive
                self.maps[i] = self.files[i].open(self.large)
            return self.maps[i]


class TokenFile:
    """A file of ids, which is mapped and verified when it is first read."""

    def __init__(self, path, dtype, magic=None, sha256=None, sums_sha256=None):
        self.path, self.dtype, self.magic, self.sha256, self.sums_sha256 = (
            path,
            dtype,
            magic,
            sha256,
            sums_sha256,
        )
        self.header = HEADER if magic else 0
        self.state = self.size_and_time()
        self.n_tokens, rest = divmod(self.state[0] - self.header, dtype.itemsize)
        if rest or self.n_tokens <= 0:
            raise UserError(
                f"{path} is cut short: {self.state[0]:,} bytes are no {dtype.name} tokens"
                + (" after a header" if magic else "")
            )
        self.verified = False
        self.sums = self.seen = None  # checksums of parts (n,), and which of the parts were compared

    def size_and_time(self):
        with readable(self.path):
            status = os.stat(self.path)
        return status.st_size, status.st_mtime_ns

    def open(self, by_parts):
        """Its tokens (n_tokens,), read-only."""
        with readable(self.path), open(self.path, "rb") as f:
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        if self.size_and_time() != self.state:
            raise UserError(f"{self.path} was replaced while it was in use; start again with --resume")
        if not self.verified:
            self.verify(mapped, by_parts)
            self.verified = True
        return np.frombuffer(mapped, self.dtype, offset=self.header)

    def verify(self, mapped, by_parts):
        if self.magic:
            magic, version, n_tokens = struct.unpack_from("<3i", mapped)
            if (magic, version, n_tokens) != (self.magic, LLM_C[self.magic][0], self.n_tokens):
                raise UserError(
                    f"{self.path}: its header says magic {magic}, version {version}, {n_tokens:,} tokens; expected "
                    f"{self.magic}, {LLM_C[self.magic][0]} and, by its size, {self.n_tokens:,}"
                )
        if by_parts and self.sums_sha256:
            path = sums_name(self.path)
            with readable(path), open(path, "rb") as f:
                sums = f.read()
            if hashlib.sha256(sums).hexdigest() != self.sums_sha256 or len(sums) != 4 * -(
                -len(mapped) // PART
            ):
                raise damaged(path)
            self.seen = bytearray(len(sums) // 4)
            self.sums = np.frombuffer(sums, "<u4")
        elif self.sha256 and sha256_of(self.path) != self.sha256:
            raise damaged(self.path)

    def check_parts(self, ids, start, stop):
        """Compare the parts that hold ids[start:stop] with their checksums, unless that was done before."""
        first, last = start * self.dtype.itemsize // PART, -(-stop * self.dtype.itemsize // PART)
        if self.seen.find(0, first, last) < 0:
            return
        for part in range(first, last):
            if zlib.crc32(ids.view(np.uint8)[part * PART : (part + 1) * PART]) != self.sums[part]:
                raise damaged(self.path, f"in the 64 KB from byte {part * PART:,} on")
            self.seen[part] = 1


def fingerprint(train, val, vocab_size, large):
    """A hash of the tokens, which are widened or narrowed to the smallest dtype first; see above for what it covers."""
    digest = hashlib.sha256(f"{vocab_size} {len(train)} {len(val)}".encode())
    for tokens in (train, val):
        n = len(tokens)
        starts, length = range(0, n, 2**20), 2**20
        if large:
            starts, length = (i * max(n - BLOCK, 0) // (N_BLOCKS - 1) for i in range(N_BLOCKS)), BLOCK
        for start in starts:
            digest.update(tokens[start : start + length].astype(smallest_dtype(vocab_size), copy=False))
        tokens.maps.clear()  # or all of it would count as memory in use
    return digest.hexdigest()[:32]


def write_sums(path):
    """Write the checksums of the parts of a token file beside it -> their file, to be named in "sha256" too."""
    with open(path, "rb") as f:
        sums = [zlib.crc32(part) for part in iter(lambda: f.read(PART), b"")]
    np.array(sums, "<u4").tofile(sums_name(path))
    return sums_name(path)


def sums_name(path):
    return path[: -len(".bin")] + ".crc"


def sha256_of(path):
    digest = hashlib.sha256()
    with readable(path), open(path, "rb") as f:
        for block in iter(lambda: f.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()


def smallest_dtype(vocab_size):
    return np.dtype("u1" if vocab_size <= 2**8 else "<u2" if vocab_size <= 2**16 else "<u4")


def damaged(path, where="as a whole"):
    return UserError(f"{path} is damaged: {where} it is not what was prepared; prepare the corpus again")


@contextlib.contextmanager
def readable(path):
    """What the system says of a file that cannot be read, as a UserError."""
    try:
        yield
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None


# ---------------------------------------------------------------------------------------- what lies in a folder


def find(name):
    """-> the absolute folder of a corpus, the names of the files in it."""
    here = os.path.join(DATA, name)
    for folder in (name, here):  # raw text in a folder of the working directory does not hide data/NAME
        with contextlib.suppress(OSError, ValueError):  # ValueError: a zero byte
            names = os.listdir(folder)
            if "meta.json" in names or any(map(TOKEN_FILE.fullmatch, names)):
                return os.path.abspath(folder), names
    scripts = [os.path.join(folder, "prepare.py") for folder in (name, here)]
    script = next(filter(os.path.isfile, scripts), None)
    if script and script.startswith(os.getcwd() + os.sep):
        script = os.path.relpath(script)
    raise UserError(
        f"no prepared corpus in {name!r}, nor in data/; "
        + (f"run python {script} first" if script else "prepare it with python data/text/prepare.py")
    )


def shards(folder, names, split, ours):
    """The token files of a split among `names`, in order."""
    found = [m for m in map(TOKEN_FILE.fullmatch, names) if m and m[2] == split and not (ours and m[1])]
    found.sort(key=lambda m: (m[1] or "", int(m[3] or -1)))
    if not found:
        raise UserError(f"{folder} has no {split}.bin nor shards of it; prepare the corpus again")
    if len({(m[1], m[3] is None) for m in found}) > 1:
        raise UserError(f"{folder} holds several corpora: {found[0][0]} and {found[-1][0]}; keep one there")
    if ours and found[-1][3] and int(found[-1][3]) != len(found) - 1:
        raise UserError(
            f"{folder} has {len(found)} of the shards up to {found[-1][0]}; prepare the corpus again"
        )
    return [m[0] for m in found]


def is_count(value):
    return type(value) is int and 0 < value < 2**48


def is_sha256(value):
    """{name of a file in the folder: its hash}"""
    return type(value) is dict and all(
        re.fullmatch(r"[\w.-]+\.(bin|crc|model)", name) and re.fullmatch("[0-9a-f]{64}", str(digest))
        for name, digest in value.items()
    )


SCHEMA = {  # of meta.json: what a value has to be, in words, and its test. What may be None may be left out
    "vocab_size": ("a number from 1 to 2^24", lambda v: is_count(v) and v <= 2**24),
    "dtype": ("uint8, uint16 or uint32", lambda v: v in ("uint8", "uint16", "uint32")),
    "train_tokens": ("a number of tokens", is_count),
    "val_tokens": ("a number of tokens", is_count),
    "train_bytes": ("a number of bytes", lambda v: v is None or is_count(v)),
    "val_bytes": ("a number of bytes", lambda v: v is None or is_count(v)),
    "bytes_per_token": ("a number above 0", lambda v: v is None or type(v) in (int, float) and 0 < v < 2**20),
    "encoding": ("a name", lambda v: v is None or type(v) is str and 0 < len(v) < 4096),
    "separator": ("a token id", lambda v: v is None or type(v) is int and 0 <= v < 2**24),
    "source": ("a list of lines", lambda v: v is None or type(v) is list and all(type(x) is str for x in v)),
    "sha256": ("hashes by names of files in this folder", lambda v: v is None or is_sha256(v)),
}


def read_meta(folder, names):
    """A corpus of ours -> meta, dtype, {name: sha256}, no magic number, no note."""
    path = os.path.join(folder, "meta.json")
    try:
        read = json.loads(contents(path))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON ({e}); prepare the corpus again") from None
    if type(read) is not dict:
        raise UserError(f"{path} is no object of JSON; prepare the corpus again")
    meta = {key: read.get(key) for key in SCHEMA}
    for key, (what, valid) in SCHEMA.items():
        if not valid(meta[key]):
            raise UserError(
                f"{path}: {key} must be {what}, got {reprlib.repr(meta[key])}; prepare the corpus again"
            )
    if meta["separator"] is not None and meta["separator"] >= meta["vocab_size"]:
        raise UserError(
            f"{path}: separator {meta['separator']} is beyond the vocabulary of {meta['vocab_size']:,}"
        )
    sha256 = meta.pop("sha256") or {}
    return meta, np.dtype(meta.pop("dtype")).newbyteorder("<"), sha256, None, ""


def read_foreign(folder, names):
    """A corpus of llm.c, modded-nanogpt or nanoGPT -> meta, dtype, no hashes, magic number or None, note."""
    meta = dict.fromkeys(SCHEMA.keys() - {"dtype", "sha256"})
    name = shards(folder, names, "train", False)[0]
    path = os.path.join(folder, name)
    start = contents(path, 2**16)
    magic = int.from_bytes(start[:4], "little")
    if magic in LLM_C:
        version, dtype, known = LLM_C[magic]
        return meta | known, np.dtype(dtype), {}, magic, ""
    if name != "train.bin":
        raise UserError(f"{path} is damaged or of no format that is known here: it begins with {magic}")
    if "meta.pkl" in names:
        return meta | read_pickle(os.path.join(folder, "meta.pkl")), np.dtype("<u2"), {}, None, ""
    # our own files without their meta.json must not pass: text in bytes, or ids in 32 bits
    halves = np.frombuffer(start[: len(start) // 4 * 4], "<u2")
    if len(start) >= 512 and (not set(start) & set(range(1, 9)) or halves[1::2].max() < 4):
        raise UserError(
            f"{folder} has lost its meta.json, and train.bin holds no GPT-2 tokens; prepare it again"
        )
    note = f"{folder} has neither meta.json nor meta.pkl: its tokens are taken as GPT-2's, as nanoGPT does"
    return meta | LLM_C[20240520][2], np.dtype("<u2"), {}, None, note


def read_pickle(path):
    """vocab_size, and the characters if it has them, of nanoGPT's meta.pkl, of which no code is run."""

    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    try:
        read = Plain(io.BytesIO(contents(path))).load()
        n, known = read["vocab_size"], {}
        if "itos" in read:
            known["characters"] = [read["itos"][i] for i in range(len(read["itos"]))]
    except Exception as e:  # whatever damage makes of a pickle
        raise UserError(f"{path} is not nanoGPT's meta.pkl ({type(e).__name__}: {e})") from None
    characters = known.get("characters", [])
    if not is_count(n) or n > 2**16 or characters and len(characters) != n:
        raise UserError(
            f"{path}: vocab_size {reprlib.repr(n)} does not fit its {len(characters)} characters in uint16"
        )
    if not all(type(c) is str and c for c in characters) or len(set(characters)) < len(characters):
        raise UserError(f"{path}: itos holds something that is no character, or one twice")
    if characters and all(c.isascii() and len(c) == 1 for c in characters):
        known["bytes_per_token"] = 1.0
    return dict(vocab_size=n, **known)


def vocabulary(folder, meta, sha256):
    """What ids mean, in a word that differs where they differ; None where nobody says."""
    name = meta["encoding"]
    if meta.get("characters"):
        return f"characters {hashlib.sha256(json.dumps(meta['characters']).encode()).hexdigest()[:16]}"
    path = os.path.join(folder, name or "")
    if not name or os.path.basename(name) != name or not (name in sha256 or os.path.isfile(path)):
        return name
    digest = sha256_of(path)  # a rank file beside the tokens: many have the same name
    if digest != sha256.get(name, digest):
        raise damaged(path)
    return f"rank file {digest[:16]}"


def contents(path, n=LARGEST_META):
    """The first n bytes of a file; of meta.json and meta.pkl all, which are never so large."""
    with readable(path), open(path, "rb") as f:
        return f.read(n)
