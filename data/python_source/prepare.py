"""The default corpus: 200 MB of Python source as bytes, the same on every machine. See Config."""

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from data.token_files import TokenFiles  # noqa: E402
from nanotst import UserError  # noqa: E402
from nanotst.configurator import entry_point  # noqa: E402
from nanotst.tokenizer import get_tokenizer  # noqa: E402

WHEELS = HERE / "wheels.txt"
# What the wheels come to. Whoever changes wheels.txt or a rule below makes another corpus and another value.
SHA256 = {
    "train.bin": "e8a93dc0041d26c4716a50ef3f865db89740f86d1038295c181cac2ddee11a9b",
    "val.bin": "082c54de40b4e67971c43b74789f8dfdbd5a3bb570058ea38ce8f563086548b1",
}
OTHER = "NOT THE PINNED CORPUS: "  # begins meta.json's first source line where no wheels were read
MIN_FILE, MAX_FILE = 64, 1_000_000  # bytes: empty __init__.py files, and tables written by programs
GENERATED = re.compile(
    rb"(?i)auto-?generated|automatically (generated|created)|generated (by|from|using)|do not (edit|modify)"
)
HEAD = 1000  # bytes of a file in which it would say that a program wrote it
WORDS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_# \t\r\n"
MAX_TABLE = 0.45  # share of other bytes than those: above, a file is mostly numbers
VAL_FRACTION = 0.015  # of the files
LONG_LINE = 30  # bytes: shorter lines ("else:", "import os") repeat everywhere
MAX_SEEN = {
    "train": 0.5,
    "val": 0.2,
}  # of the long lines of a file may stand in training files before it


@dataclass
class Config:
    """The default corpus: Python source code as bytes (vocabulary 256), the same on every machine.

        python data/python_source/prepare.py [--key=value ...]

    pip fetches the wheels that wheels.txt names with their hashes (80 MB, some seconds), and the .py files in
    them are taken. Where the index cannot be reached, the Python packages of this machine are taken instead,
    with a warning: losses on them compare with nobody else's, and private packages among them are read too.

    Files are known by the hash of their content. It gives their order, the files held out for validation, and
    what is left out beyond --max_mb.
    """

    source: Literal["wheels", "installed"] = (
        "wheels"  # the pinned wheels, or what is installed here
    )
    max_mb: float = 200.0  # stop at this many MB of source
    out_dir: str = str(HERE)  # folder to write to


def fetch_wheels(folder):
    """The wheels of wheels.txt, by pip, which checks the hashes. -> "" or why there is no network."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += [
        "--only-binary",
        ":all:",
        "--platform",
        "any",
        "--implementation",
        "py",
        "--abi",
        "none",
    ]
    command += [
        "--python-version",
        "3.12",
    ]  # or pip would refuse wheels that this Python is too old for
    command += [
        "--retries",
        "1",
        "--require-hashes",
        "--requirement",
        str(WHEELS),
        "--dest",
        folder,
    ]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode == 0:
        return ""
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    last = errors[-1] if errors else (lines or ["no output"])[-1]
    if "DO NOT MATCH THE HASHES" in result.stderr:
        wheel = re.search(r"^\s+(\S+==\S+)", result.stderr, re.M)
        name = wheel[1] if wheel else "a wheel"
        raise UserError(
            f"{name} is not the file that {WHEELS.name} pins (its sha256 differs), so nothing was taken: "
            "look at the package index that pip uses, or use --source=installed"
        )
    if "No module named pip" in result.stderr:
        raise UserError(
            "pip fetches the wheels, and this Python has none: python -m ensurepip, or --source=installed"
        )
    missing = "No matching distribution found for" in result.stderr
    if not re.search(r"\(from versions: (?!none\))", result.stderr):  # or an index answers
        if missing and os.environ.get("PIP_NO_INDEX", "").lower() not in (
            "",
            "0",
            "no",
            "off",
            "false",
        ):
            return "pip is told to ask no package index (PIP_NO_INDEX)"
        broken = re.search(
            r"connection broken by '(\w+)|(\w+Error)\(.*Max retries exceeded", result.stderr
        )
        if broken:
            return f"the package index cannot be reached ({broken[1] or broken[2]})"
    if missing:
        raise UserError(
            f"{last}: the wheel was withdrawn, or the index that pip uses lacks it; see {WHEELS.name}"
        )
    raise UserError(f"pip download failed: {last}")


def wheel_files(folder):
    """Yield (package, name, read) for every .py file in the wheels, which are zip files."""
    for path in sorted(Path(folder).glob("*.whl")):
        archive = zipfile.ZipFile(path)  # stays open for `read`
        for name in archive.namelist():
            if name.endswith(".py"):
                yield (
                    path.name.split("-")[0],
                    name,
                    lambda archive=archive, name=name: archive.read(name),
                )


def source_roots():
    """(label, folder) pairs: the standard library, then the package folders of this interpreter and, in a
    virtual environment, of the one it was made from."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    packages = [
        sysconfig.get_path(kind, vars=v) for kind in ("purelib", "platlib") for v in ({}, base)
    ]
    packages += [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")]
    roots = {os.path.realpath(sysconfig.get_path("stdlib")): "standard library"}
    for path in packages:
        roots.setdefault(os.path.realpath(path), "")
    return [(label, path) for path, label in roots.items()]


def installed_files(roots):
    """Yield (package, path, read) for every .py file below the roots."""
    for label, root in roots:
        for folder, subfolders, names in os.walk(root):
            # the package folder lies inside the standard library's and is a root of its own
            subfolders[:] = [
                s for s in subfolders if s not in ("site-packages", "dist-packages", "__pycache__")
            ]
            top = os.path.relpath(folder, root).split(os.sep)[0]
            for name in names:
                if name.endswith(".py"):
                    path = os.path.join(folder, name)
                    yield label or (name if top == "." else top), path, Path(path).read_bytes


def unusable(data):
    """Why a file is left out, or ""."""
    if not MIN_FILE <= len(data) <= MAX_FILE:
        return "too small" if len(data) < MIN_FILE else "too large"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    if b"\0" in data:  # NUL is the separator
        return "with NUL bytes"
    if GENERATED.search(data[:HEAD]):
        return "generated by programs"
    return "mostly numbers" if len(data.translate(None, WORDS)) > MAX_TABLE * len(data) else ""


def distinct_files(files, dropped):
    """[(hash, package, read)] in the order of the hashes. The files themselves are not kept in memory."""
    found = {}
    for package, _, read in files:
        try:
            data = read()
        except OSError:
            dropped["unreadable"] += 1
            continue
        reason, key = unusable(data), hashlib.sha256(data).digest()
        if not reason and key in found:
            reason = "duplicates"
        if reason:
            dropped[reason] += 1
        else:
            found[key] = (package, read)
    return [(key, *found[key]) for key in sorted(found)]


def choose(found, max_bytes, dropped):
    """Yield (split, package, data) of the corpus in its order, training files first.

    Packages carry files that differ in a few lines only (a model made from another, generated siblings, pip's
    _vendor folder), which no content hash catches. A training file that mostly repeats those before it is
    left out. A held-out file would measure memory: it is compared with all training files and the held-out
    ones before it.
    """
    seen, held_out, total = set(), [], 0

    def repeats(data, split):
        lines = [line for line in data.split(b"\n") if len(line) >= LONG_LINE]
        if sum(line in seen for line in lines) > MAX_SEEN[split] * len(lines):
            return True
        seen.update(lines)
        return False

    for i, (key, package, read) in enumerate(found):
        data = read()
        # by the end of the hash, since its beginning gives the order
        split = "val" if int.from_bytes(key[-8:], "big") < VAL_FRACTION * 2**64 else "train"
        if split == "train" and repeats(data, split):
            dropped["near-copies of others"] += 1
            continue
        if total + len(data) + 1 > max_bytes:
            dropped["over --max_mb"] = len(found) - i
            break
        total += len(data) + 1
        if split == "train":
            yield split, package, data
        else:
            held_out.append((package, data))
    for package, data in held_out:
        if repeats(data, "val"):
            dropped["held out but nearly in training"] += 1
        else:
            yield "val", package, data


def main(config, roots=None):
    start, dropped = time.time(), Counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        pinned = config.source == "wheels"
        if pinned and (problem := fetch_wheels(folder)):
            print(
                f"warning: {problem}. Taking the packages of this machine instead: LOSSES WILL DIFFER"
            )
            pinned = False
        if pinned:
            files, of = wheel_files(folder), f"the wheels in {WHEELS.name}"
        else:
            roots = roots or source_roots()
            files, of = installed_files(roots), f"Python {sys.version.split()[0]} as installed"
            print(*(f"reading {label or 'packages'}: {root}" for label, root in roots), sep="\n")
        n_files, total = write(config, files, of, pinned, dropped)
    print(
        "files left out: "
        + (", ".join(f"{n:,} {reason}" for reason, n in dropped.most_common()) or "none")
    )
    if total < 5e6:
        print(
            "warning: less than 5 MB of source; a model learns it by heart soon. "
            "Use data/text/prepare.py with text of your own"
        )
    print(f"{n_files['val']:,} whole files held out for validation; {time.time() - start:.1f} s")


def write(config, files, of, pinned, dropped):
    """The corpus in out_dir. -> files of each split, bytes in all. An error if it is not the known one."""
    packages, n_files = Counter(), Counter()
    found = distinct_files(files, dropped)
    with TokenFiles(config.out_dir, get_tokenizer("bytes")) as out:
        for split, package, data in choose(found, config.max_mb * 1e6, dropped):
            out.add(split, np.frombuffer(data + b"\0", dtype=np.uint8), len(data) + 1)
            out.end_document(split)
            packages[package] += len(data)
            n_files[split] += 1
        total = packages.total()
        made_of = f"{n_files.total():,} Python files, {total / 1e6:.1f} MB, of {of}: {len(packages)} packages"
        out.source = [
            made_of if pinned else OTHER + made_of,
            "largest: "
            + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in packages.most_common(8)),
        ]
        out.close_shard()
        if pinned and config.max_mb == Config.max_mb and out.sha256() != SHA256:
            raise UserError(
                f"the wheels are the pinned ones, but the corpus has sha256 {out.sha256()} and not {SHA256}. "
                f"If {WHEELS.name} or a rule was changed on purpose, put these into {__file__}"
            )
    print(*out.source, out.summary(), sep="\n")
    if pinned:
        print(*(f"sha256 of {name}: {value}" for name, value in out.sha256().items()), sep="\n")
    return n_files, total


if __name__ == "__main__":
    entry_point(main, Config)
