"""Your own text files as a corpus. See Config."""

import hashlib
import math
import os
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from data.documents import SUFFIXES, Options, kind  # noqa: E402
from data.writer import Writer, choose, prepare, prepared, token_count  # noqa: E402
from nanotst import UserError  # noqa: E402
from nanotst.configurator import entry_point  # noqa: E402
from nanotst.tokenizer import get_tokenizer  # noqa: E402

FEW_DOCUMENTS = 20  # text of fewer documents is cut into more; as many are held out at least
MANY_DOCUMENTS = 4000  # from here on --val_fraction by default holds out enough
CUT = 2_000, 64_000  # smallest and largest size of the documents that text is cut into, in bytes


@dataclass
class Config:
    """Your own text files as a corpus.

        python data/text/prepare.py FILE_OR_FOLDER ... [--encoding=gpt2] [--val=FILE] [--out_dir=data/mine]

    Files are .txt, .md and .py (a line that holds only the separator ends a document), .jsonl, .ndjson and
    .json (an object with a text field per line), each also as .gz, .xz or .zst, and .parquet (a column of
    text). Folders are searched for these names, except for plain .json; hidden files are left out. A text
    without separators, such as a book, is cut at empty lines. Documents keep their order, so shuffle them
    beforehand if it means something (all of one author, then all of the next). The same command resumes a
    preparation that was stopped.
    """

    inputs: list[str]  # files and folders
    encoding: str = "bytes"  # bytes, a name that tiktoken knows, or a rank file, split as Llama 3's
    out_dir: str = str(HERE)  # folder to write to
    overwrite: bool = False  # whether another corpus in out_dir may be replaced
    val: str = ""  # files and folders to validate on, separated by commas
    val_fraction: float = 0.005  # share of documents to validate on; more if there are few
    separator: str = "<|endoftext|>"  # line between documents; an empty line if empty
    field: str = "text"  # field of JSON objects, or column of parquet files
    shard_tokens: str = "100M"  # tokens in a file of the corpus


def find_files(arguments):
    """-> (paths in a fixed order, paths left out)"""
    found, left_out = [], []
    for argument in arguments:
        if not os.path.exists(argument):
            raise UserError(f"no such file or folder: {argument}")
        if not os.path.isdir(argument):
            found.append(argument)  # named by hand: any suffix will do
        for path in sorted(Path(argument).rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(argument).parts)
            text = path.name.lower().endswith(SUFFIXES) and path.is_file()
            if text and not hidden and not path.samefile(__file__):
                found.append(str(path))
            elif path.is_symlink() or not path.is_dir():
                left_out.append(str(path))
    if arguments and not found:
        raise UserError(f"no text files in {' '.join(arguments)} (looked for {' '.join(SUFFIXES)})")
    return list(dict.fromkeys(map(os.path.abspath, found))), left_out


def settle_documents(paths, options):
    """Set options.cut if the text has hardly any separators, and options.val_fraction if there are few
    documents."""

    def first_hashes():
        chosen = choose(paths, "train", options)
        hashes = (int(key, 16) for place, key, *_ in chosen if place == "train")
        return list(islice(hashes, MANY_DOCUMENTS))

    hashes, size = first_hashes(), sum(map(os.path.getsize, paths))
    plain = size >= 2 * CUT[0] and all(kind(path) == "text" for path in paths)
    if plain and (n := len(hashes)) < FEW_DOCUMENTS:
        options.cut = min(max(size // 1000, CUT[0]), CUT[1])
        what = f"the text is cut after {options.cut:,} bytes, at empty lines"
        print(f"too few documents ({n}): {what}")
        hashes = first_hashes()
    if not 0 < (n := len(hashes)) < MANY_DOCUMENTS:
        return
    if options.val_fraction == Config.val_fraction:
        options.val_fraction = share = min(0.1, FEW_DOCUMENTS / n)
        print(f"only {n:,} documents, so {share:.1%} are held out (see --val_fraction)")
    # one at least
    options.val_fraction = max(options.val_fraction, math.nextafter(min(hashes) / 2**64, 1))


def main(config):
    val_paths, left_out = find_files([v for v in config.val.split(",") if v])
    found, more = find_files(config.inputs)
    paths = [path for path in found if path not in val_paths]
    said = {"left out, hidden or of another kind": more + left_out, "reading": paths}
    said["held out"] = val_paths
    for what, names in said.items():
        if names:
            print(f"{what} ({len(names):,}): {', '.join(names[:5])}{', ...' * (len(names) > 5)}")

    tokenizer = get_tokenizer(config.encoding)
    n_shard = token_count(config.shard_tokens, "shard_tokens")
    files = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths + val_paths]
    digest = hashlib.sha256(repr(files).encode()).hexdigest()
    knobs = dict(files=digest[:16], val=len(val_paths), shard_tokens=n_shard)
    for key in ("encoding", "val_fraction", "separator", "field"):
        knobs[key] = getattr(config, key)
    if prepared(config.out_dir, knobs, config.overwrite):
        return
    options = Options(config.separator, config.field, config.val_fraction)
    inputs = [("val", val_paths, 0), ("train", paths, 0)]
    if not val_paths:
        inputs = [("", paths, 0)]
        settle_documents(paths, options)
    out = Writer(config.out_dir, tokenizer, knobs, n_shard)
    out.source = [*(f"{path}, held out" for path in val_paths), *paths][:50]
    prepare(inputs, out, options)


if __name__ == "__main__":
    entry_point(main, Config)
