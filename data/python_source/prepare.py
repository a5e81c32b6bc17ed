"""
The default corpus: the Python source code on this machine. Needs no download and no vocabulary file.

    python data/python_source/prepare.py [--max_mb=200] [--out_dir=data/python_source]

Takes the .py files of the standard library and of the installed packages, as bytes (vocabulary 256).
How much there is, and so the losses, depend on what is installed; two machines compare only with the
same packages. Installed private packages are read too: look before sharing a model or the .bin files.

Files are known by the hash of their content. It gives the order (a shuffle that does not depend on where
Python is installed), the held-out files, and what is left out beyond --max_mb; so one more installed
package adds files among the others without moving any between training and validation.
"""
import argparse
import hashlib
import os
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
from token_files import TokenFiles
from tokenizer import get_tokenizer

MIN_FILE, MAX_FILE = 64, 1_000_000  # bytes: empty __init__.py files, and tables written by programs
VAL_FRACTION = 0.015                # of the files
LONG_LINE = 30                      # bytes: shorter lines ("else:", "import os") repeat everywhere
MAX_SEEN = 0.2                      # of the long lines of a held-out file may occur in training


def source_roots() -> list[tuple[str, str]]:
    """(label, folder) pairs: the standard library, then the package folders of this interpreter and,
    in a virtual environment, of the one it was made from."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    packages = [sysconfig.get_path(kind, vars=v) for kind in ("purelib", "platlib") for v in ({}, base)]
    packages += [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")]
    roots = {os.path.realpath(sysconfig.get_path("stdlib")): "standard library"}
    for path in packages:
        roots.setdefault(os.path.realpath(path), "")
    return [(label, path) for path, label in roots.items()]


def find_files(roots):
    """Yield (package, path) of every .py file below the roots."""
    for label, root in roots:
        for folder, subfolders, names in os.walk(root):
            # the package folder lies inside the standard library's and is a root of its own
            subfolders[:] = [s for s in subfolders if s not in ("site-packages", "dist-packages", "__pycache__")]
            top = os.path.relpath(folder, root).split(os.sep)[0]
            for name in names:
                if name.endswith(".py"):
                    yield label or (name if top == "." else top), os.path.join(folder, name)


def long_lines(data: bytes) -> list[bytes]:
    return [line for line in data.split(b"\n") if len(line) >= LONG_LINE]


def read(path: str) -> bytes:
    with open(path, "rb") as f:
        return f.read()


def unusable(data: bytes) -> str:
    """Why a file is left out, or ''."""
    if not MIN_FILE <= len(data) <= MAX_FILE:
        return "too small" if len(data) < MIN_FILE else "too large"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    return "holds NUL" if b"\0" in data else ""  # NUL is the separator


def choose_files(roots, max_bytes: int):
    """-> (list of (hash, package, path) in corpus order, Counter of reasons for leaving files out).
    Only hashes and paths are kept in memory, not the files."""
    found, dropped = {}, Counter()
    for package, path in find_files(roots):
        try:
            data = read(path)
        except OSError:
            dropped["unreadable"] += 1
            continue
        reason = unusable(data)
        key = hashlib.sha256(data).digest()
        if not reason and key in found:
            reason = "duplicates"
        if reason:
            dropped[reason] += 1
        else:
            found[key] = (len(data) + 1, package, path)
    chosen, total = [], 0
    for key, (size, package, path) in sorted(found.items()):
        if total + size > max_bytes:
            dropped["over --max_mb"] = len(found) - len(chosen)
            break
        chosen.append((key, package, path))
        total += size
    return chosen, dropped


def main(argv=None, roots=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_mb", type=float, default=200, help="stop at this many MB of source (default 200)")
    parser.add_argument("--out_dir", default=str(HERE), help="default: the folder of this script")
    args = parser.parse_args(argv)
    start = time.time()
    roots = roots or source_roots()
    for label, root in roots:
        print(f"reading {label or 'packages'}: {root}")
    chosen, dropped = choose_files(roots, int(args.max_mb * 1e6))

    # Held-out files are chosen by the end of the hash, since its beginning gives the order.
    held_out = [int.from_bytes(key[-8:], "big") < VAL_FRACTION * 2**64 for key, _, _ in chosen]
    val = [(package, read(path)) for (_, package, path), held in zip(chosen, held_out) if held]
    # Packages carry copies of each other's files that differ in a few lines (pip's _vendor folder, two
    # installed versions, generated siblings), which no content hash catches. A held-out file that mostly
    # repeats training lines would measure memory, so it is left out of both. The check is against all
    # training files plus the held-out files already kept.
    unseen = {line for _, data in val for line in long_lines(data)}
    seen, packages, n_files = set(), Counter(), Counter()
    with TokenFiles(args.out_dir, get_tokenizer("bytes")) as files:
        def add(split: str, package: str, data: bytes):
            files.add(split, np.frombuffer(data + b"\0", dtype=np.uint8), len(data) + 1)
            packages[package] += len(data)
            n_files[split] += 1

        for (_, package, path), held in zip(chosen, held_out):
            if not held:
                data = read(path)
                seen |= unseen.intersection(data.split(b"\n"))
                add("train", package, data)
        for package, data in val:
            lines = long_lines(data)
            if sum(line in seen for line in lines) > MAX_SEEN * len(lines):
                dropped["held out but nearly in training"] += 1
                continue
            seen.update(lines)
            add("val", package, data)

        total = sum(packages.values())
        top = [f"{name} {size / 1e6:.1f} MB" for name, size in packages.most_common(8)]
        files.source = [f"{n_files.total():,} Python files, {total / 1e6:.1f} MB, of Python "
                        f"{sys.version.split()[0]}: {len(packages)} packages", "largest: " + ", ".join(top)]
    print(*files.source, sep="\n")
    print("files left out: " + (", ".join(f"{n:,} {reason}" for reason, n in dropped.most_common()) or "none"))
    print(files.summary())
    if total < 5e6:
        print("warning: less than 5 MB of source; a model learns it by heart soon. Install more packages, or use "
              "data/text/prepare.py with text of your own")
    print(f"{n_files['val']:,} whole files held out for validation; {time.time() - start:.1f} s")


if __name__ == "__main__":
    main()
