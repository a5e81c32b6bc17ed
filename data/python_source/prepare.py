"""The default corpus: 200 MB of Python source as bytes, the same on every machine. See Config."""

import functools
import hashlib
import os
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
OTHER = "NOT THE PINNED CORPUS: "  # begins meta.json's source if no wheels were read
MIN_FILE, MAX_FILE = 64, 1_000_000  # bytes: empty __init__.py files, and tables written by programs
GENERATED = re.compile(
    rb"(?i)auto-?generated|automatically (generated|created)|generated (by|from|using)|do not (edit|modify)"
)
HEAD = 1000  # bytes of a file in which it would say that a program wrote it
WORDS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_# \t\r\n"
MAX_TABLE = 0.45  # share of other bytes: above, a file is mostly numbers
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

    The hash of its content decides where a file comes, and whether it is held out for validation.
    """

    source: Literal["wheels", "installed"] = "wheels"  # pinned wheels, or packages installed here
    max_mb: float = 200.0  # largest size of the corpus in MB
    overwrite: bool = False  # whether another corpus in out_dir may be replaced
    out_dir: str = str(HERE)  # folder to write to


def fetch_wheels(folder):
    """Have pip fetch the wheels, whose hashes it checks. -> "", or why there is no network."""
    # with the version, since pip refuses wheels that this Python is too old for
    options = "download --quiet --no-deps --only-binary :all: --platform any --implementation py --abi none"
    options += " --python-version 3.12 --retries 1 --require-hashes --requirement"
    command = [sys.executable, "-m", "pip", *options.split(), str(WHEELS), "--dest", folder]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    said = result.stderr
    if result.returncode == 0:
        return ""
    if not re.search(r"\(from versions: (?!none\))", said):  # or else an index answered
        if re.search("connection broken|Max retries exceeded", said):
            return "the package index cannot be reached"
        if "No matching distribution" in said and os.environ.get("PIP_NO_INDEX"):
            return "pip may ask no package index (PIP_NO_INDEX)"
    reason = [*re.findall("ERROR: (.*)", said), *said.strip().splitlines()[-1:], "no output"][0]
    raise UserError(
        f"pip cannot fetch the files that {WHEELS.name} pins: {reason[:200]}; look at pip (python -m "
        "ensurepip installs it) and its package index, or use --source=installed"
    )


def wheel_files(folder):
    """Yield a function that returns the content, for each .py file in the wheels (zip files)."""
    for path in Path(folder).glob("*.whl"):
        archive = zipfile.ZipFile(path)  # stays open
        for name in archive.namelist():
            if name.endswith(".py"):
                yield functools.partial(archive.read, name)


def installed_files(roots):
    """Yield the same for each .py file below the roots."""
    for root in roots:
        yield from (path.read_bytes for path in Path(root).rglob("*.py") if path.is_file())


def usable(data):
    """Whether a file is text that people wrote."""
    return (
        MIN_FILE <= len(data) <= MAX_FILE
        and data.decode("utf-8", "ignore").encode() == data
        and b"\0" not in data  # the separator
        and not GENERATED.search(data[:HEAD])
        and len(data.translate(None, WORDS)) <= MAX_TABLE * len(data)
    )


def choose(files, max_bytes):
    """Yield (split, data) in the order of the corpus, training files first.

    Packages hold files that differ in a few lines only (copied models, generated siblings, pip's _vendor
    folder), which no hash of the content catches. A training file that mostly repeats earlier ones is left
    out. A held-out file would measure memory: it is compared with all training files and earlier held-out
    ones.
    """
    found, seen, held_out, total = {}, set(), [], 0
    for read in files:
        if usable(data := read()):
            found[hashlib.sha256(data).digest()] = read  # not the data, to save memory

    def repeats(data, split):
        lines = [line for line in data.split(b"\n") if len(line) >= LONG_LINE]
        if sum(line in seen for line in lines) > MAX_SEEN[split] * len(lines):
            return True
        seen.update(lines)
        return False

    for key in sorted(found):
        data = found[key]()
        # by the end of the hash, since its beginning gives the order
        split = "val" if int.from_bytes(key[-8:], "big") < VAL_FRACTION * 2**64 else "train"
        if split == "train" and repeats(data, split):
            continue
        total += len(data) + 1
        if total > max_bytes:
            break
        if split == "train":
            yield split, data
        else:
            held_out.append(data)
    yield from (("val", data) for data in held_out if not repeats(data, "val"))


def main(config, roots=None):
    knobs = dict(source=config.source, max_mb=config.max_mb, wheels=sha256_of(WHEELS)[:16])
    if prepared(config.out_dir, knobs, config.overwrite):
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        files, made_of = wheel_files(folder), f"the wheels in {WHEELS.name}"
        if config.source == "wheels" and (problem := fetch_wheels(folder)):
            print(
                f"warning: {problem}. Taking the packages of this machine instead: LOSSES WILL DIFFER"
            )
            knobs["source"] = "installed"
        if knobs["source"] == "installed":
            roots = roots or set(map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))
            files, made_of = installed_files(roots), OTHER + ", ".join(sorted(roots))
        write(config, knobs, files, made_of)


def write(config, knobs, files, made_of):
    """Write the corpus to out_dir. UserError if the pinned wheels do not give the known one."""
    digests, n = {name: hashlib.sha256() for name in SHA256}, 0
    with Writer(config.out_dir, get_tokenizer("bytes"), knobs) as out:
        for split, data in choose(files, config.max_mb * 1e6):
            document = np.frombuffer(data + b"\0", np.uint8)
            out.add(split, document, len(document))
            digests[f"{split}.bin"].update(document)
            n += 1
        sha256 = {name: digest.hexdigest() for name, digest in digests.items()}
        if knobs["source"] == "wheels" and config.max_mb == Config.max_mb and sha256 != SHA256:
            raise UserError(
                f"the wheels are the pinned ones, but the corpus has sha256 {sha256} and not {SHA256}. If "
                f"{WHEELS.name} or a rule was changed on purpose, put these into {__file__}"
            )
        out.source = [made_of, f"{n:,} Python files"]
    print(*out.source, *(f"sha256 of {name}: {value}" for name, value in sha256.items()), sep="\n")
    if out.n_tokens.total() < 5e6:
        print(
            "warning: a model soon learns 5 MB by heart. Use data/text/prepare.py with text of your own"
        )


if __name__ == "__main__":
    entry_point(main, Config)
