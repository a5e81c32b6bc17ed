"""The default corpus: 200 MB of Python source as bytes, the same on every machine. See Config."""

import hashlib
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from data.writer import Writer, prepared  # noqa: E402
from nanotst import UserError  # noqa: E402
from nanotst.configurator import entry_point  # noqa: E402
from nanotst.formats import sha256_of  # noqa: E402
from nanotst.tokenizer import get_tokenizer  # noqa: E402

WHEELS = HERE / "wheels.txt"
SHA256 = {  # of the corpus that the wheels give. Other wheels or another rule below change it
    "train.bin": "e8a93dc0041d26c4716a50ef3f865db89740f86d1038295c181cac2ddee11a9b",
    "val.bin": "082c54de40b4e67971c43b74789f8dfdbd5a3bb570058ea38ce8f563086548b1",
}
MIN_FILE, MAX_FILE = 64, 1_000_000  # bytes: empty __init__.py files, and tables written by programs
GENERATED = re.compile(
    rb"(?i)auto-?generated|automatically (generated|created)|generated (by|from|using)|do not (edit|modify)"
)
HEAD = 1000  # bytes of a file in which it would say that a program wrote it
WORDS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_# \t\r\n"
MAX_TABLE = 0.45  # share of other bytes: above, a file is mostly numbers
MAX_BYTES = 200_000_000  # of the corpus
VAL_FRACTION = 0.015  # share of the files that are held out
LONG_LINE = 30  # bytes: shorter lines ("else:", "import os") repeat everywhere
MAX_SEEN = {"train": 0.5, "val": 0.2}  # share of a file's long lines that earlier files may hold


@dataclass
class Config:
    """The default corpus: Python source code as bytes (vocabulary 256), the same on every machine.

        python data/python_source/prepare.py [--key=value ...]

    pip fetches the wheels that wheels.txt pins (80 MB, some seconds), and the corpus is their .py files.
    Without a network it is the Python packages of this machine, with a warning: losses on them cannot be
    compared with anybody else's, and private packages among them are read, too.
    """

    source: Literal["wheels", "installed"] = "wheels"  # pinned wheels, or packages installed here
    overwrite: bool = False  # whether another corpus in out_dir may be replaced
    out_dir: str = str(HERE)  # folder to write to


def fetch_wheels(folder):
    """Have pip fetch the wheels, whose hashes it checks. -> why it could not, if so"""
    # with the version, since pip refuses wheels that this Python is too old for
    options = "download --quiet --no-deps --only-binary :all: --platform any --implementation py --abi none"
    options += " --python-version 3.12 --retries 1 --require-hashes --requirement"
    command = [sys.executable, "-m", "pip", *options.split(), str(WHEELS), "--dest", folder]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    said = result.stderr.strip()
    return [*re.findall("ERROR: (.*)", said), said or "no output"][0] if result.returncode else ""


def usable(data):
    """Whether a file is text that people wrote."""
    return (
        MIN_FILE <= len(data) <= MAX_FILE
        and data.decode("utf-8", "ignore").encode() == data
        and b"\0" not in data  # the separator
        and not GENERATED.search(data[:HEAD])
        and len(data.translate(None, WORDS)) <= MAX_TABLE * len(data)
    )


def choose(files):
    """files: the content of each. -> {"train": documents, "val": documents} in the order of the corpus. The
    hash of a file's content decides its place in the order and whether it is held out for validation.

    Packages hold files that differ in a few lines only, which no hash of the content catches. A training file
    that mostly repeats earlier ones is left out, and so is a held-out file that mostly repeats any training
    file or an earlier held-out one: it would measure memory.
    """
    by_hash = {hashlib.sha256(data).digest(): data for data in files if usable(data)}
    chosen, seen, total = {"train": [], "val": []}, set(), 0

    def repeats(data, split):
        lines = [line for line in data.split(b"\n") if len(line) >= LONG_LINE]
        if sum(line in seen for line in lines) > MAX_SEEN[split] * len(lines):
            return True
        seen.update(lines)
        return False

    for key, data in sorted(by_hash.items()):
        # by the end of the hash, since its beginning gives the order
        split = "val" if int.from_bytes(key[-8:], "big") < VAL_FRACTION * 2**64 else "train"
        if split == "train" and repeats(data, split):
            continue
        total += len(data) + 1
        if total > MAX_BYTES:
            break
        chosen[split].append(data)
    chosen["val"] = [data for data in chosen["val"] if not repeats(data, "val")]
    return chosen


def main(config):
    knobs = dict(source=config.source, wheels=sha256_of(WHEELS)[:16])
    if prepared(config.out_dir, knobs, config.overwrite):
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if config.source == "wheels" and (problem := fetch_wheels(folder)):
            if "MATCH THE HASHES" in problem:
                raise UserError(f"pip got other files than {WHEELS.name} pins: {problem}")
            print(f"warning: pip cannot fetch the wheels that {WHEELS.name} pins ({problem});")
            print("the packages of this machine are taken instead: LOSSES WILL DIFFER")
            knobs["source"] = "installed"
        if knobs["source"] == "wheels":
            made_of = f"the wheels in {WHEELS.name}"
            wheels = map(zipfile.ZipFile, Path(folder).glob("*.whl"))
            files = (w.read(name) for w in wheels for name in w.namelist() if name.endswith(".py"))
        else:
            roots = sorted(set(map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))))
            made_of = f"NOT THE PINNED CORPUS: {', '.join(roots)}"
            paths = (path for root in roots for path in Path(root).rglob("*.py") if path.is_file())
            files = (path.read_bytes() for path in paths)
        chosen = choose(files)
    tokens = {split: b"\0".join([*documents, b""]) for split, documents in chosen.items()}
    sha256 = {f"{split}.bin": hashlib.sha256(data).hexdigest() for split, data in tokens.items()}
    if knobs["source"] == "wheels" and sha256 != SHA256:
        what = (
            f"the wheels are the pinned ones, but the corpus has sha256 {sha256} and not {SHA256}"
        )
        todo = f"if {WHEELS.name} or a rule was changed on purpose, put these into {__file__}"
        raise UserError(f"{what}; {todo}")
    out = Writer(config.out_dir, get_tokenizer("bytes"), knobs)
    for split, data in tokens.items():
        out.add(split, np.frombuffer(data, np.uint8), len(data))
    out.source = [made_of, f"{sum(map(len, chosen.values())):,} Python files"]
    out.publish()
    print(*out.source, *(f"sha256 of {name}: {value}" for name, value in sha256.items()), sep="\n")


if __name__ == "__main__":
    entry_point(main, Config)
