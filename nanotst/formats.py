"""What lies in the folder of a prepared corpus: its token files, in order, and what is known of them.

Formats that are read as they are, all little-endian:

    our own           meta.json, and train.bin, val.bin or train_00000.bin, train_00001.bin, val_00000.bin ...
    nanoGPT           train.bin, val.bin in uint16; meta.pkl with the vocabulary, or GPT-2 tokens without it
    llm.c, and        X_train_000001.bin, X_val_000000.bin ..., each with a header of 256 int32 (magic,
    modded-nanogpt    version, number of tokens), then GPT-2 tokens in uint16 or Llama-3 tokens in uint32
"""

import contextlib
import hashlib
import json
import os
import pickle
import pickletools
import re
import reprlib
from dataclasses import dataclass, field

import numpy as np

from nanotst import UserError

DATA = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data")
TOKEN_FILE = re.compile(
    r"(.+_)?(train|val)(?:_(\d{1,9}))?\.bin"
)  # whose, split, number of the shard
LLM_C = {  # magic: version, dtype, and what is in it. The separator stands before each document
    20240520: (1, "<u2", dict(vocab_size=50257, encoding="gpt2", separator=50256)),
    20240801: (7, "<u4", dict(vocab_size=128256, encoding=None, separator=128000)),
}
LARGEST_META = 2**24  # bytes of meta.json or meta.pkl
AGAIN = "prepare the corpus again"


@dataclass
class Found:
    """A corpus as its folder describes it; the token files themselves are not yet looked at."""

    folder: str  # absolute
    files: dict  # "train", "val": names of the token files, in order
    meta: dict
    dtype: np.dtype
    header: tuple = ()  # magic and version that each file begins with
    sha256: dict = field(default_factory=dict)  # name of a file: its hash
    note: str = ""  # what was guessed, or is wrong with it


def find(name):
    """The corpus in the folder `name` or else in data/`name` -> Found. UserError where there is none."""
    places = [
        name,
        os.path.join(DATA, name),
    ]  # raw text in the working directory does not hide data/NAME
    for folder in places:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a zero byte in the name
            names = os.listdir(folder)
            if "meta.json" in names:
                return read_ours(os.path.abspath(folder), names)
            if (
                any(map(TOKEN_FILE.fullmatch, names)) and "unfinished.tmp" not in names
            ):  # killed at its end
                return read_foreign(os.path.abspath(folder), names)
    scripts = filter(os.path.isfile, (os.path.join(folder, "prepare.py") for folder in places))
    script = next(scripts, os.path.join(DATA, "text", "prepare.py"))
    script = script.removeprefix(os.getcwd() + os.sep)
    raise UserError(
        f"no prepared corpus in {name!r} or in data/; prepare it: run python {script} first"
    )


def shards(folder, names, ours):
    """The token files among `names` -> {"train": names in order, "val": ...}."""
    found = {}
    for split in ("train", "val"):
        files = [
            m
            for m in map(TOKEN_FILE.fullmatch, names)
            if m and m[2] == split and not (ours and m[1])
        ]
        files.sort(key=lambda m: (m[1] or "", int(m[3] or -1)))
        if not files:
            raise UserError(f"{folder} has no {split}.bin and no shards of it; {AGAIN}")
        first, last = files[0], files[-1]
        if (first[1], first[3] is None) != (last[1], last[3] is None):
            raise UserError(
                f"{folder} holds more than one corpus: {first[0]} and {last[0]}; keep one there"
            )
        if ours and last[3] and int(last[3]) != len(files) - 1:
            raise UserError(
                f"{folder} has {len(files)} files, not all from {split}_0 to {last[0]}; {AGAIN}"
            )
        found[split] = [m[0] for m in files]
    return found


# ------------------------------------------------------------------------------------------------------- ours


def is_count(value):
    return type(value) is int and 0 < value < 2**48


def is_sha256(value):
    """{name of a file in the folder: its hash}; a name is no path."""
    return type(value) is dict and all(
        re.fullmatch(r"[\w.-]+\.(bin|crc|model)", name)
        and re.fullmatch("[0-9a-f]{64}", str(digest))
        for name, digest in value.items()
    )


SCHEMA = {  # of meta.json: what each value has to be, in words and as a test
    "vocab_size": ("a number from 1 to 2^24", lambda v: is_count(v) and v <= 2**24),
    "dtype": ("uint8, uint16 or uint32", lambda v: v in ("uint8", "uint16", "uint32")),
    "train_tokens": ("a number of tokens", is_count),
    "val_tokens": ("a number of tokens", is_count),
}
OPTIONAL = {  # these may be null, or missing
    "train_bytes": ("a number of bytes", is_count),
    "val_bytes": ("a number of bytes", is_count),
    "bytes_per_token": ("a number above 0", lambda v: type(v) in (int, float) and 0 < v < 2**20),
    "encoding": ("a name", lambda v: type(v) is str and 0 < len(v) < 4096),
    "separator": ("a token id", lambda v: type(v) is int and 0 <= v < 2**24),
    "source": (
        "a list of lines",
        lambda v: type(v) is list and all(type(line) is str for line in v),
    ),
    "sha256": ("hashes, by names of files in this folder", is_sha256),
}


def sealed(meta):
    """A meta.json with a hash of itself, by which a flipped bit in it shows."""
    rest = {key: value for key, value in meta.items() if key != "seal"}
    return rest | {"seal": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def read_ours(folder, names):
    path = os.path.join(folder, "meta.json")
    try:
        read = json.loads(contents(path))
        if type(read) is not dict:
            raise UserError(f"{path} holds no object; {AGAIN}")
        if "seal" in read and read != sealed(read):
            raise UserError(
                f"{path} was damaged or edited; {AGAIN}, or remove its seal to take it as it is"
            )
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON ({e}); {AGAIN}") from None
    meta = {key: read.get(key) for key in (SCHEMA | OPTIONAL)}
    for key, (what, valid) in (SCHEMA | OPTIONAL).items():
        if not (valid(meta[key]) or key in OPTIONAL and meta[key] is None):
            raise UserError(f"{path}: {key} must be {what}, got {reprlib.repr(meta[key])}; {AGAIN}")
    if (meta["separator"] or 0) >= meta["vocab_size"]:
        raise UserError(f"{path}: separator {meta['separator']} is beyond the vocabulary; {AGAIN}")
    sha256, dtype = meta.pop("sha256") or {}, np.dtype(meta.pop("dtype")).newbyteorder("<")
    # with hashes, only files that have one are of this corpus: shards of a former one may still lie there
    files = shards(folder, sha256 or names, ours=True)
    meta["vocabulary"] = vocabulary = meta["encoding"]
    if (
        vocabulary in sha256 or vocabulary in names
    ):  # a rank file: others of the same name hold other tokens
        digest = sha256_of(os.path.join(folder, vocabulary))
        if digest != sha256.get(vocabulary, digest):
            raise damaged(os.path.join(folder, vocabulary))
        meta["vocabulary"] = f"rank file {digest[:16]}"
    note = (meta["source"] or [""])[0]
    note = f"{folder}: {note}" if note.startswith("NOT THE PINNED CORPUS") else ""
    return Found(folder, files, meta, dtype, sha256=sha256, note=note)


# ----------------------------------------------------------------------------------------------------- others


def read_foreign(folder, names):
    """What llm.c, modded-nanogpt or nanoGPT wrote. The header tells which."""
    files = shards(folder, names, ours=False)
    path = os.path.join(folder, files["train"][0])
    start = contents(path, 2**16)
    magic = int.from_bytes(start[:4], "little")
    meta = dict.fromkeys(("bytes_per_token", "encoding", "separator", "vocabulary"))
    if magic in LLM_C:
        version, dtype, known = LLM_C[magic]
        meta |= known | {"vocabulary": known["encoding"] or "Llama 3"}
        return Found(folder, files, meta, np.dtype(dtype), (magic, version))
    if files["train"] != ["train.bin"]:
        raise UserError(
            f"{path} has no header of llm.c's (it begins with {magic}), and no meta.json is there"
        )
    if "meta.pkl" in names:
        return Found(
            folder, files, meta | read_pickle(os.path.join(folder, "meta.pkl")), np.dtype("<u2")
        )
    # files of ours that lost their meta.json must not pass for GPT-2 tokens: text in bytes, or ids in 32 bits
    halves = np.frombuffer(start[: len(start) // 4 * 4], "<u2")
    if len(start) >= 512 and (not set(start) & set(range(1, 9)) or halves[1::2].max() < 4):
        raise UserError(
            f"{folder} has lost its meta.json (train.bin holds no GPT-2 tokens); {AGAIN}"
        )
    note = f"{folder} has neither meta.json nor meta.pkl: its tokens are taken as GPT-2's, as nanoGPT does"
    meta |= LLM_C[20240520][2] | {"vocabulary": "gpt2"}
    return Found(folder, files, meta, np.dtype("<u2"), note=note)


# what a pickle of dicts, lists, strings and numbers is made of. Anything else could run code of its choosing
PLAIN = re.compile(
    "PROTO|FRAME|STOP|MARK|MEMOIZE|BINPUT|(LONG_)?BINGET|EMPTY_DICT|SETITEMS?|EMPTY_LIST|APPENDS?|"
    "(SHORT_)?BINUNICODE|BININT[12]?|NONE"
)


def read_pickle(path):
    """nanoGPT's meta.pkl: vocab_size and, of a vocabulary of characters, itos."""
    data = contents(path)
    try:
        for code, _, _ in pickletools.genops(data):
            if not PLAIN.fullmatch(code.name):
                raise ValueError(f"it holds {code.name}")
        read = pickle.loads(data)
        n, itos = read["vocab_size"], read.get("itos")
        characters = itos if itos is None else [itos[i] for i in range(len(itos))]
    except Exception as e:  # there is hardly one that a damaged pickle cannot raise
        raise UserError(f"{path} is not nanoGPT's meta.pkl ({type(e).__name__}: {e})") from None
    if not (is_count(n) and n <= 2**16):
        raise UserError(
            f"{path}: vocab_size must be a number from 1 to 2^16, got {reprlib.repr(n)}"
        )
    if characters is None:
        return dict(vocab_size=n)
    if (
        not all(type(c) is str and c for c in characters)
        or not len(set(characters)) == len(characters) == n
    ):
        raise UserError(f"{path}: itos does not hold {n} different characters")
    digest = hashlib.sha256(json.dumps(characters).encode()).hexdigest()
    one_byte = all(c.isascii() and len(c) == 1 for c in characters)
    return dict(
        vocab_size=n,
        characters=characters,
        vocabulary=f"characters {digest[:16]}",
        bytes_per_token=1.0 if one_byte else None,
    )


# ------------------------------------------------------------------------------------------------------ files


@contextlib.contextmanager
def readable(path):
    """What the system says of a file that cannot be read, as a UserError."""
    try:
        yield
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None


def contents(path, n=LARGEST_META):
    """The first n bytes of a file: of meta.json or meta.pkl, all that counts."""
    with readable(path), open(path, "rb") as f:
        return f.read(n)


def sha256_of(path):
    digest = hashlib.sha256()
    with readable(path), open(path, "rb") as f:
        for block in iter(lambda: f.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()


def damaged(path, where="as a whole"):
    return UserError(f"{path} is damaged: {where} it is not what was prepared; {AGAIN}")
