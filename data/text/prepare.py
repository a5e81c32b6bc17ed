"""Your own text files as a corpus. See Config."""

import math
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from data.documents import SUFFIXES, Options, kind  # noqa: E402
from data.pipeline import File, Group, prepare, read_pieces, token_count  # noqa: E402
from nanotst import UserError  # noqa: E402
from nanotst.configurator import entry_point  # noqa: E402
from nanotst.tokenizer import get_tokenizer  # noqa: E402

FEW_DOCUMENTS = (
    20  # with fewer than these, text is cut into documents by itself; to be held out at least
)
MANY_DOCUMENTS = 4000  # from here on --val_fraction as it is holds out enough of them
CUT_AT = "empty lines", "line ends"  # the first of these that a text has enough of, or else words
CUT = 2_000, 64_000  # bytes of such a document, at least and at most
NAMES = 5  # of files left out that are said


@dataclass
class Config:
    """Your own text files as a corpus.

        python data/text/prepare.py FILE_OR_FOLDER ... [--encoding=gpt2] [--val=FILE] [--out_dir=data/mine]

    Files are .txt, .md and .py (documents separated by a line that holds exactly the separator), .jsonl and
    .ndjson (an object with a text field per line), each also as .gz, .xz or .zst, and .parquet (a column of
    text). Folders are searched for these names, hidden ones left out. The line end before a separator and at
    the end of a file is not part of the document. A text without separators, one book, is cut at empty lines.
    Memory does not grow with the input, and a large corpus that was stopped goes on when it is started again.
    Documents keep their order, so shuffle them beforehand if it means something (all of one author, then all
    of the next).
    """

    inputs: list[str]  # files and folders
    encoding: str = (
        "bytes"  # bytes, a name that tiktoken knows such as gpt2, or the path of a rank file
    )
    out_dir: str = str(HERE)  # folder to write to
    val: str = ""  # files and folders to validate on, separated by commas
    val_fraction: float = 0.005  # of documents to validate on, without --val; of few, 20 or 10 %
    separator: str = "<|endoftext|>"  # the line between documents; empty: an empty line
    field: str = "text"  # field of JSON objects, or column of parquet files
    shard_tokens: str = "100M"  # a larger corpus becomes several files of this many tokens
    workers: int = 0  # tokenising threads; 0: one a core


def find_files(arguments):
    """Paths in a fixed order, each file once, and {why left out: [paths]}."""
    paths, left_out = [], {}
    for argument in arguments:
        if not os.path.exists(argument):
            link = f" (a link to {os.readlink(argument)})" if os.path.islink(argument) else ""
            raise UserError(f"no such file or folder: {argument}{link}")
        if not os.path.isdir(argument):
            paths.append(argument)  # named by hand: any suffix will do
            continue
        for folder, subfolders, names in os.walk(argument, onerror=cannot_read):
            for name in sorted([*subfolders, *names]):
                path = os.path.join(folder, name)
                is_folder = name in subfolders
                if name.startswith("."):
                    why = "hidden"
                elif is_folder:
                    why = "a link to a folder" if os.path.islink(path) else ""
                elif not name.lower().endswith(SUFFIXES):
                    why = "another kind of file"
                elif not os.path.isfile(path):
                    why = "a broken link" if os.path.islink(path) else "not a regular file"
                else:
                    why = (
                        "this program"
                        if os.path.realpath(path) == os.path.realpath(__file__)
                        else ""
                    )
                if why:
                    left_out.setdefault(why, []).append(path)
                elif not is_folder:
                    paths.append(path)
            subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
    return list({os.path.realpath(p): p for p in paths}.values()), left_out


def cannot_read(error):
    raise UserError(f"cannot read {error.filename}: {error.strerror}")


def some(paths):
    """Names for people: the first few, and how many more."""
    more = f" and {len(paths) - NAMES:,} more" if len(paths) > NAMES else ""
    return ", ".join(paths[:NAMES]) + more


def settle_documents(files, options, val_fraction):
    """Set options.cut if the text has (nearly) no separators. -> the share of documents to hold out."""
    keys, found = look_at(files, options)
    if can_be_cut(files, options) and len(keys) < FEW_DOCUMENTS and found["bytes"] >= 2 * CUT[0]:
        size = min(max(found["bytes"] // 1000, CUT[0]), CUT[1])
        many = found["bytes"] // (2 * size)
        options.cut, options.cut_at = size, next((w for w in CUT_AT if found[w] > many), "words")
        print(
            f"{len(keys)} documents in {found['bytes'] / 1e6:,.1f} MB or more are too few to hold some of "
            f"them out: the text is cut at {options.cut_at} into documents of {size / 1000:.0f} kB or more. "
            "Give --val=FILE, or a --separator, for another way"
        )
        keys, _ = look_at(files, options)
    if len(keys) >= MANY_DOCUMENTS:
        return val_fraction
    if keys and val_fraction == Config.val_fraction:
        val_fraction = min(0.1, FEW_DOCUMENTS / len(keys))
        print(
            f"{len(keys):,} documents are few: {val_fraction:.1%} of them are held out (see --val_fraction)"
        )
    distinct = sorted(set(keys))
    if len(distinct) > 1 and not distinct[0] < val_fraction * 2**64 <= distinct[-1]:
        val_fraction = math.nextafter(distinct[0] / 2**64, 1)
        print("that would be none or all, so one is held out: that with the smallest hash")
    return val_fraction


def look_at(files, options):
    """-> (keys of the first documents, at most MANY_DOCUMENTS; Counter of what would be places to cut at)"""
    keys, found, may_cut = [], Counter(), can_be_cut(files, options)
    for piece in read_pieces(Group("", files), 0, 0, (), options, 0.0):
        if piece.last and piece.split != "empty":
            keys.append(int.from_bytes(piece.key, "big"))
        if may_cut and len(keys) < FEW_DOCUMENTS:
            found["bytes"] += len(piece.text.encode())
            found["line ends"] += piece.text.count("\n")
            found["empty lines"] += piece.text.count("\n\n") + piece.text.count("\n\r\n")
            if found["bytes"] >= 1000 * CUT[1]:
                break
        if len(keys) >= MANY_DOCUMENTS:
            break
    return keys, found


def can_be_cut(files, options):
    """Few files of plain text may be books; other files say themselves where a document ends."""
    return (
        not options.cut
        and len(files) < FEW_DOCUMENTS
        and all(kind(f.name) == "text" for f in files)
    )


def main(config):
    if not 0 < config.val_fraction < 1 or config.workers < 0:
        raise UserError("--val_fraction is between 0 and 1, --workers at least 0")
    val_paths, val_left_out = find_files([v for v in config.val.split(",") if v])
    found, left_out = find_files(config.inputs)
    for why, some_paths in val_left_out.items():
        left_out.setdefault(why, []).extend(some_paths)
    held_out = {os.path.realpath(p) for p in val_paths}
    paths = [p for p in found if os.path.realpath(p) not in held_out]
    for why, some_paths in left_out.items():
        print(f"left out, {why}: {len(some_paths):,}: {some(some_paths)}")
    for arguments, some_paths in ((config.inputs, paths), (config.val.split(","), val_paths)):
        if arguments != [""] and not some_paths:
            raise UserError(
                f"no text files in {' '.join(arguments)} (looked for {' '.join(SUFFIXES)})"
            )
    if other := [p for p in paths + val_paths if not p.lower().endswith(SUFFIXES)]:  # named by hand
        print(f"{some(other)}: read as plain text")
    kinds = ", ".join(
        f"{n:,} {k} file{'s' * (n > 1)}" for k, n in Counter(map(kind, paths)).items()
    )
    print(f"reading {kinds}: {some(paths)}" + f"; held out: {some(val_paths)}" * bool(val_paths))

    tokenizer = get_tokenizer(config.encoding)
    options, val_fraction = Options(config.separator, config.field), config.val_fraction
    files, val_files = (
        [
            File(os.path.abspath(p), os.path.getsize(p), str(os.stat(p).st_mtime_ns))
            for p in some_paths
        ]
        for some_paths in (paths, val_paths)
    )
    groups = [Group("val", val_files), Group("train", files)] if val_files else [Group("", files)]
    if not val_files:
        val_fraction = settle_documents(files, options, val_fraction)
    prepare(
        groups,
        tokenizer,
        config.out_dir,
        options,
        val_fraction=val_fraction,
        workers=config.workers,
        shard_tokens=token_count(config.shard_tokens, "shard_tokens"),
    )


if __name__ == "__main__":
    entry_point(main, Config)
