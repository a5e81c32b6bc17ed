"""
Your own text files as a dataset.

    python data/text/prepare.py FILE_OR_FOLDER ... [--encoding=gpt2] [--val=FILE] [--out_dir=data/text]

Files are .txt, .md and .py (documents separated by a line that holds exactly the separator), or .jsonl
(one object with a text field per line), each also as .gz or .xz; folders are searched for these names,
hidden ones left out. The line end before a separator and at the end of a file is not part of the document.
Everything streams: memory does not grow with the input. Documents keep their order, so shuffle them
beforehand if it means something (all of one author, then all of the next).
"""
import argparse
import gzip
import hashlib
import json
import lzma
import os
import re
import sys
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
from token_files import TokenFiles
from tokenizer import get_tokenizer

SUFFIXES = tuple(kind + packed for kind in (".txt", ".md", ".py", ".jsonl") for packed in ("", ".gz", ".xz"))
PIECE = 256 * 1024   # bytes: longer documents are tokenised in pieces of at most this size
BATCH = 1024 * 1024  # bytes of text handed to a worker at a time


def find_files(arguments: list[str]) -> list[str]:
    """Paths in a fixed order, each file once. SystemExit if one does not exist or none is found."""
    paths = []
    for argument in arguments:
        if not os.path.exists(argument):
            raise SystemExit(f"error: no such file or folder: {argument}")
        if os.path.isfile(argument):
            paths.append(argument)  # named by hand: any suffix will do
            continue
        for folder, subfolders, names in os.walk(argument):
            subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
            paths += [os.path.join(folder, n) for n in sorted(names) if n.endswith(SUFFIXES) and n[0] != "."]
    if not paths:
        raise SystemExit(f"error: no text files in {' '.join(arguments)} (looked for {' '.join(SUFFIXES)})")
    return list({os.path.realpath(p): p for p in paths}.values())


def cut_point(data: bytes) -> int:
    """data: the next PIECE + 2 bytes of a long document -> where to cut it, at most PIECE.

    Before a single space between two words, because the split patterns of GPT-2, its successors and
    Llama 3 all start a new piece of text there, so the tokens are those of the uncut document. Text
    without such a place (base64, Chinese) is cut at a line end, or else between two characters, and its
    tokens may differ from the uncut ones there."""
    if match := re.match(rb"(?s).*[A-Za-z](?= [A-Za-z])", data):
        return match.end()
    cut = data.rfind(b"\n", 0, PIECE) + 1 or PIECE
    while cut > 1 and data[cut] & 0xC0 == 0x80:  # inside of a UTF-8 character
        cut -= 1
    return cut


def text_pieces(file, path: str, separator: bytes):
    """Yield (text, last piece of its document?), at most PIECE bytes each."""
    buffer, offset, line_start, started = bytearray(), 0, True, False

    def decode(data: bytes) -> str:
        try:
            return data.decode("utf-8-sig" if offset == 0 else "utf-8")
        except UnicodeDecodeError as e:
            raise SystemExit(f"error: {path} is not UTF-8 text (byte {offset + e.start:,})") from None

    while True:
        line = file.readline(PIECE)  # bounded: a file may be one line
        at_separator = line_start and line.rstrip(b"\r\n") == separator
        if not line or at_separator:
            text = decode(bytes(buffer)).removesuffix("\n").removesuffix("\r")
            if started or text.strip():
                yield text, True
            offset, started = offset + len(buffer) + len(line), False
            buffer.clear()
        else:
            buffer += line
            while len(buffer) > PIECE + 2:
                cut = cut_point(buffer[:PIECE + 2])
                yield decode(bytes(buffer[:cut])), False
                offset, started = offset + cut, True
                del buffer[:cut]
        if not line:
            return
        line_start = line.endswith(b"\n")


def jsonl_pieces(file, path: str, field: str):
    """Like text_pieces, of a file with one JSON object per line."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as e:  # also UnicodeDecodeError
            raise SystemExit(f"error: {where} is not valid JSON: {e}") from None
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise SystemExit(f"error: {where} has no text in field '{field}' (see --field)")
        data = text.encode("utf-8", errors="replace")  # JSON can hold half a surrogate pair: becomes "?"
        start = 0
        while len(data) - start > PIECE + 2:
            cut = start + cut_point(data[start:start + PIECE + 2])
            yield data[start:cut].decode(), False
            start = cut
        if start or text.strip():
            yield data[start:].decode(), True


def read_pieces(paths: list[str], args, progress):
    """Yield (path, text, first, last) of all files: the pieces of each document in order."""
    separator = args.separator.encode()
    for path in paths:
        try:
            with open(path, "rb") as raw:
                file = {".gz": gzip.open, ".xz": lzma.open}.get(os.path.splitext(path)[1], lambda f: f)(raw)
                is_jsonl = path.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz"))
                pieces = jsonl_pieces(file, path, args.field) if is_jsonl else text_pieces(file, path, separator)
                first = True
                for text, last in pieces:
                    progress(raw.tell(), len(text))
                    # NUL is no text, and the separator of the byte vocabulary
                    yield path, text.replace("\0", ""), first, last
                    first = last
                progress(os.path.getsize(path), 0, done=True)
        except (lzma.LZMAError, zlib.error, EOFError, OSError) as e:
            reason = getattr(e, "strerror", None) or str(e) or "truncated"
            raise SystemExit(f"error: cannot read {path}: {reason}") from None


def assign_splits(paths: list[str], val_paths: list[str], val_fraction: float, args, progress, counts: Counter):
    """Yield (split, text, last). Documents are chosen for validation by a hash of their first piece, so
    the choice depends on nothing else, and two copies of a document land on the same side. With --val
    the copies in training of its documents are left out."""
    held_out, split = set(), ""
    for group in (val_paths, paths):
        for path, text, first, last in read_pieces(group, args, progress):
            if first:
                key = hashlib.blake2b(text.encode(), digest_size=8).digest()
                if group is val_paths:
                    split = "val"
                    held_out.add(key)
                elif val_paths:
                    split = "" if key in held_out else "train"
                else:
                    split = "val" if int.from_bytes(key, "big") < val_fraction * 2**64 else "train"
                counts[split] += 1
                counts["file", path] += 1
            if split:
                yield split, text, last


def in_batches(pieces):
    """Group pieces to lists of about BATCH bytes, so that handing over short documents costs little."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_batch(tokenizer, batch) -> list[tuple[str, np.ndarray, int]]:
    """-> (split, ids (T,), bytes) per piece, a separator after each document."""
    separator = np.array([tokenizer.separator])
    out = []
    for split, text, last in batch:
        ids = tokenizer.encode(text)
        out.append((split, np.concatenate([ids, separator]) if last else ids, len(text.encode()) + last))
    return out


def map_in_order(function, items, workers: int):
    """Like map(), in threads, with at most 2 * workers results waiting. Threads are enough, since
    tiktoken releases the interpreter lock while it works; order, and so the output, stays the same."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Progress:
    """A line on stderr: share of the input read (as stored, so known for compressed files), MB of text
    per second, time left."""

    def __init__(self, paths: list[str]):
        self.total = max(1, sum(os.path.getsize(p) for p in paths))
        self.files, self.text, self.start, self.shown = 0, 0, time.time(), time.time()

    def __call__(self, position: int, n_text: int, done: bool = False):
        """position: in the current file, stored bytes; n_text: characters read since the last call."""
        self.text += n_text
        now, share = time.time(), (self.files + position) / self.total
        if now - self.shown > (0.5 if sys.stderr.isatty() else 10) and share > 0:
            self.shown, seconds = now, now - self.start
            print(f"{share:6.1%}  {self.text / 1e6 / seconds:.1f} MB/s  {seconds * (1 / share - 1):.0f} s left  ",
                  end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
        if done:
            self.files += position


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="FILE_OR_FOLDER")
    add("--encoding", default="bytes", help="bytes (default), gpt2 or another name of tiktoken, or a rank file")
    add("--out_dir", default=str(HERE), help="default: the folder of this script")
    add("--val", action="append", default=[], help="file or folder to validate on; may be repeated")
    add("--val_fraction", type=float, default=0.005, help="of the documents, without --val (default 0.005)")
    add("--separator", default="<|endoftext|>",
        help="the line between documents (default <|endoftext|>); '' is an empty line")
    add("--field", default="text", help="field of .jsonl objects (default text)")
    add("--workers", type=int, default=min(16, os.cpu_count() or 1), help="tokenising threads (default: cores)")
    args = parser.parse_args(argv)
    if not 0 < args.val_fraction < 1 or args.workers < 1:
        parser.error("--val_fraction is between 0 and 1, --workers at least 1")

    val_paths = find_files(args.val) if args.val else []
    held_out = {os.path.realpath(p) for p in val_paths}
    paths = [p for p in find_files(args.inputs) if os.path.realpath(p) not in held_out]
    tokenizer = get_tokenizer(args.encoding)
    start, counts = time.time(), Counter()
    with TokenFiles(args.out_dir, tokenizer) as files:
        pieces = assign_splits(paths, val_paths, args.val_fraction, args, Progress(val_paths + paths), counts)
        workers = 1 if args.encoding == "bytes" else args.workers  # bytes are a copy, not work
        for batch in map_in_order(lambda b: encode_batch(tokenizer, b), in_batches(pieces), workers):
            for split, ids, n_bytes in batch:
                files.add(split, ids, n_bytes)
        n_train, n_val = counts["train"], counts["val"]
        if not n_train or not n_val:
            raise SystemExit(f"error: {n_train:,} documents for training and {n_val:,} held out for validation: "
                             "give --val=FILE, another --val_fraction, or a --separator that splits the text")
        lines = [f"{p}: {counts['file', p]:,} documents{', held out' * (i < len(val_paths))}"
                 for i, p in enumerate(val_paths + paths)]
        files.source = lines[:50] + [f"and {len(lines) - 50:,} more files"] * (len(lines) > 50)
    copies = f", {counts['']:,} left out as copies of those" * bool(counts[""])
    print(f"{n_train:,} documents for training, {n_val:,} held out{copies}")
    print(files.summary())
    print(f"{time.time() - start:.1f} s")


if __name__ == "__main__":
    main()
