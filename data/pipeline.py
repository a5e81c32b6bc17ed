"""From files to a corpus: documents, tokens, shards. What all prepare scripts but python_source's stand on.

    prepare([Group("val", files, limit), Group("train", files, limit)], tokenizer, out_dir, options)

Files are read one after the other, documents are tokenised on all cores, and every `shard_tokens` tokens a
shard is written and the place in the input is noted. A preparation that is stopped and started again goes on
from there: shards are neither made again nor different, whatever the number of workers.
"""

import hashlib
import os
import re
import shutil
import sys
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from threading import Thread
from typing import NamedTuple

import numpy as np

from data.documents import kind, read_documents
from data.token_files import SPLITS, TokenFiles
from nanotst import UserError
from nanotst.formats import sha256_of

try:
    from tqdm import tqdm
except ImportError:  # a bare machine makes the same corpus, without a bar
    tqdm = None

BATCH = 1024 * 1024  # bytes of text handed to a worker at a time
FEW_DOCUMENTS, FEW_TOKENS = 20, 1_000_000  # a validation split with less of both is warned about
# so that no disk is called too small wrongly: more bytes of text to a token than any vocabulary reaches, less
# than any has of English, and fewer stored bytes to a byte of text than zstd or parquet reach
BYTES_PER_TOKEN, LEAST_BYTES_PER_TOKEN, LEAST_STORED = 6, 3, 1 / 4


@dataclass
class File:
    """A file of documents. One that must be fetched first has methods of its own, see hub.py."""

    name: str
    size: int  # stored bytes
    version: str = ""  # differs when the content does

    must_be_fetched = False

    def fetch(self):
        """-> its path on this machine."""
        return self.name

    def release(self):
        """All its documents are in finished shards."""


@dataclass
class Group:
    """Files that are read for one purpose."""

    split: str  # "train", "val", or "" to choose by a hash of each document
    files: list
    limit: int = 0  # tokens; 0: all


class Piece(NamedTuple):
    file: int  # index in the group
    position: int  # stored bytes of the file read so far
    split: (
        str  # "train" or "val"; or why it is left out: "copies" (of a held-out document) or "empty"
    )
    key: bytes  # hash of the first piece of its document
    text: str
    last: bool  # of its document
    n_nul: int  # NUL bytes that were left out: they are no text, and the separator of the byte vocabulary


def prepare(
    groups,
    tokenizer,
    out_dir,
    options,
    *,
    val_fraction=0.0,
    workers=0,
    shard_tokens=0,
    seed=None,
    source=(),
    knobs=None,
):
    """Make the corpus, or go on with it. -> Counter of documents by split and by name of file. `source`,
    lines before those about files, and `knobs`, a dict, go to meta.json."""
    workers = workers or n_cores()
    job = describe(groups, tokenizer, options, val_fraction, shard_tokens, seed)
    with TokenFiles(out_dir, tokenizer, shard_tokens, seed, job) as out:
        state = out.state
        if not state["meta"]:  # else all is written
            check_disk(groups, tokenizer, out)
        state.setdefault("place", [0, 0, 0])  # group, file, documents of that file which are done
        state.setdefault("documents", {})
        state.setdefault("held_out", [])
        held_out = {bytes.fromhex(key) for key in state["held_out"]}
        if tokenizer.note:
            print(f"warning: {tokenizer.note}")
        if state["shards"]:
            print(f"going on after {len(state['shards'])} finished shards in {out.folder}")
        for index in range(state["place"][0], 0 if state["meta"] else len(groups)):
            write_group(out, groups, index, held_out, tokenizer, options, val_fraction, workers)
        counts = Counter(state["documents"])
        if not counts["train"] or not counts["val"]:
            raise UserError(
                f"{counts['train']:,} documents for training and {counts['val']:,} held out for validation: "
                "give --val=FILE, another --val_fraction, or a --separator that splits the text"
            )
        out.source, out.knobs = [*source, *source_lines(groups, counts)], knobs
    return report(out, counts, options)


def write_group(out, groups, index, held_out, tokenizer, options, val_fraction, workers):
    """Read, tokenise and write the files of one group, from the place in out.state on."""
    group, state = groups[index], out.state
    if state["place"][0] != index:
        state["place"] = [index, 0, 0]
    _, file, done = state["place"]
    files, n_earlier, n_released = (
        [f for g in groups for f in g.files],
        sum(len(g.files) for g in groups[:index]),
        0,
    )
    if group.limit and out.n_tokens[group.split] >= group.limit:
        return
    pieces = read_pieces(
        group, file, done, held_out if group.split == "train" else (), options, val_fraction
    )
    batches = map_in_order(
        lambda batch: encode_batch(tokenizer, batch, options.separator), in_batches(pieces), workers
    )
    with Progress(group, file, out) as progress:
        for batch in batches:
            for piece, ids, n_bytes, inline in batch:
                if piece.split in SPLITS:
                    out.add(piece.split, ids, n_bytes)
                note(state, group, piece, inline)
                if not piece.last:
                    continue
                file, done = piece.file, done + 1 if piece.file == file else 1
                state["place"] = [index, file, done]
                if group.split == piece.split == "val" and piece.key not in held_out:
                    held_out.add(piece.key)
                    state["held_out"].append(piece.key.hex())
                if out.end_document(piece.split):
                    for f in files[n_released : n_earlier + file]:
                        f.release()
                    n_released = n_earlier + file
                if group.limit and out.n_tokens[group.split] >= group.limit:
                    return
            progress.show(piece.file, piece.position)
    if group.limit:
        n = out.n_tokens[group.split]
        print(
            f"warning: {n:,} tokens for {group.split} instead of {group.limit:,}: there are no more"
        )


def note(state, group, piece, inline):
    """Count what will be said at the end."""
    name, counts = group.files[piece.file].name, state["documents"]

    def count(what, n):
        if n:
            counts[what] = counts.get(what, 0) + n

    count(f"inline {name}", inline if inline and kind(name) == "text" else 0)
    count("nul", piece.n_nul)
    count(piece.split, int(piece.last))
    count(f"file {name}", int(piece.last and piece.split != "empty"))


def read_pieces(group, file, skip, left_out, options, val_fraction):
    """Yield the Pieces of a group's files, from file number `file` and after `skip` of its documents. The
    next file is fetched meanwhile.

    Documents are chosen for validation by a hash of their first piece: the choice depends on nothing else,
    and two copies of a document land on the same side. Those in `left_out` are copies of held-out documents.
    """
    coming = in_background(group.files[file].fetch) if file < len(group.files) else None
    for index in range(file, len(group.files)):
        path = coming.result()
        if index + 1 < len(group.files):
            coming = in_background(group.files[index + 1].fetch)
        first = True
        for text, last, position in read_documents(path, options):
            if skip:
                skip -= last
                continue
            if n_nul := text.count("\0"):
                text = text.replace("\0", "")
            if first and last and not text.strip():
                key, split = b"", "empty"
            elif first:
                key = hashlib.blake2b(text.encode(), digest_size=8).digest()
                split = group.split
                if not split:
                    split = "val" if int.from_bytes(key, "big") < val_fraction * 2**64 else "train"
                elif key in left_out:
                    split = "copies"
            first = last
            yield Piece(index, position, split, key, text if split in SPLITS else "", last, n_nul)
        skip = 0


def in_background(function):
    """Its result as a Future. The thread does not hold up the end of the program."""
    future = Future()

    def work():
        try:
            future.set_result(function())
        except BaseException as e:
            future.set_exception(e)

    Thread(target=work, daemon=True).start()
    return future


def in_batches(pieces):
    """Group pieces to lists of about BATCH bytes, so that handing over short documents costs little."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH or len(batch) >= 10_000:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_batch(tokenizer, batch, separator):
    """-> [(piece, ids (T,), bytes of text, separators inside of it)], a separator token after documents."""
    end, none, out = np.array([tokenizer.separator]), np.zeros(0, dtype=np.int64), []
    for piece in batch:
        if piece.split not in SPLITS:
            out.append((piece, none, 0, 0))
            continue
        ids = tokenizer.encode(piece.text)
        n_bytes = len(piece.text.encode()) + piece.last
        inline = piece.text.count(separator) if separator else 0
        out.append(
            (
                piece._replace(text=""),
                np.concatenate([ids, end]) if piece.last else ids,
                n_bytes,
                inline,
            )
        )
    return out


def map_in_order(function, items, workers):
    """Like map(), in threads, with at most 2 * workers results waiting. Threads are enough, since tiktoken
    releases the interpreter lock while it works; order, and so the output, stays the same."""
    if workers == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Progress:
    """A bar with rate and time left: tokens if the group has a limit, else stored bytes of its files. None
    without tqdm."""

    def __init__(self, group, file, out):
        self.group, self.out = group, out
        self.before = np.cumsum([0, *(f.size for f in group.files)]).tolist()
        total = group.limit or self.before[-1]
        self.bar = tqdm and tqdm(
            desc=group.split or "train and val",
            total=total,
            initial=out.n_tokens[group.split] if group.limit else self.before[file],
            unit=" tokens" if group.limit else "B",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )

    def show(self, file, position):
        done = (
            self.out.n_tokens[self.group.split]
            if self.group.limit
            else self.before[file] + position
        )
        if self.bar:
            self.bar.update(done - self.bar.n)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar:
            self.bar.close()


def describe(groups, tokenizer, options, val_fraction, shard_tokens, seed):
    """What shards depend on, as a hash. An unfinished preparation of the same is gone on with."""
    files = [(g.split, [(f.name, f.size, f.version) for f in g.files]) for g in groups]
    limits = [
        g.limit for g in groups[:-1]
    ]  # that of the last group ends the corpus but changes no shard
    rules = (vocabulary(tokenizer), asdict(options), val_fraction, shard_tokens, seed)
    return hashlib.sha256(repr((files, limits, rules)).encode()).hexdigest()


def vocabulary(tokenizer):
    """Its name; of a rank file, wherever it lies, its content."""
    return (
        f"rank file {sha256_of(tokenizer.rank_file)[:16]}"
        if tokenizer.rank_file
        else tokenizer.name
    )


def check_disk(groups, tokenizer, out):
    """UserError if what is still to be written cannot fit. How much text there is shows only when it is read,
    so this is the least that is needed."""
    per_byte = 1 if tokenizer.name == "bytes" else 1 / BYTES_PER_TOKEN
    n_tokens = [g.limit or per_byte * sum(f.size for f in g.files) for g in groups]
    twice = 0 if out.shard_tokens or out.seed is None else max(n_tokens)  # the shard being shuffled
    n_tokens = max(sum(n_tokens) + twice - out.n_tokens.total(), 0)
    needs = {disk_of(out.out_dir): [out.out_dir, n_tokens * out.dtype.itemsize]}
    coming = [
        f
        for g in groups
        for f in least_files(g, tokenizer)
        if f.must_be_fetched and not f.is_here()
    ]
    if out.shard_tokens and not any(f.stays for f in coming):  # while one is read, another comes
        coming = sorted(coming, key=lambda f: f.size)[-2:]
    for file in coming:
        needs.setdefault(disk_of(file.lies_in), [file.lies_in, 0])[1] += file.size
    for folder, need in needs.values():
        free = shutil.disk_usage(existing(folder)).free
        if free < need:
            raise UserError(
                f"{folder} needs {need / 1e6:,.0f} MB or more, {free / 1e6:,.0f} MB are free there"
            )


def least_files(group, tokenizer):
    """Those that a group will read, or fewer: its limit of tokens may need more."""
    least = group.limit * LEAST_STORED * (1 if tokenizer.name == "bytes" else LEAST_BYTES_PER_TOKEN)
    sizes = np.cumsum([0, *(f.size for f in group.files[:-1])])  # before each file
    return [
        f for f, before in zip(group.files, sizes.tolist()) if not group.limit or before < least
    ]


def existing(folder):
    """The folder, or the nearest one above it that is there."""
    while not os.path.exists(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    return folder


def disk_of(folder):
    return os.stat(existing(folder)).st_dev


def n_cores():
    """Of those this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def source_lines(groups, counts):
    """What was taken, for meta.json: the first fifty files."""
    lines = [
        f"{f.name}: {counts[f'file {f.name}']:,} documents{', held out' * (g.split == 'val')}"
        for g in groups
        for f in g.files
        if counts[f"file {f.name}"]
    ]
    return lines[:50] + [f"and {len(lines) - 50:,} more files"] * (len(lines) > 50)


def report(out, counts, options):
    """Say what was made, and what may be wrong with it."""
    copies = f", {counts['copies']:,} left out as copies of those" * bool(counts["copies"])
    print(f"{counts['train']:,} documents for training, {counts['val']:,} held out{copies}")
    print(out.summary())
    if counts["val"] < FEW_DOCUMENTS and out.n_tokens["val"] < FEW_TOKENS:
        print(
            f"warning: only {counts['val']} documents ({out.n_tokens['val']:,} tokens) are held out: "
            "validation loss will be noisy. A larger --val_fraction or --val=FILE gives more"
        )
    if counts["empty"]:
        print(f"{counts['empty']:,} empty documents were left out")
    if counts["nul"]:
        print(f"{counts['nul']:,} NUL bytes were left out of the text")
    inline = {
        name.removeprefix("inline "): n for name, n in counts.items() if name.startswith("inline ")
    }
    for name, n in list(inline.items())[:5]:
        print(
            f"warning: {name}: the separator {options.separator} stands inside lines, {n:,} times, and was "
            "taken as text there: only a line that holds nothing else separates documents"
        )
    if len(inline) > 5:
        print(f"warning: and so in {len(inline) - 5:,} more files")
    return counts


def token_count(text, knob):
    """The number that is written as 10B, 500M, 1e9 or 100_000."""
    match = re.fullmatch(
        r"(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([kKmMbBtT]?)", text.strip().replace("_", "")
    )
    if not match:
        raise UserError(f"--{knob} takes a number of tokens such as 10B or 500M, got {text!r}")
    n = float(match[1]) * 1000 ** " kmbt".index(match[2].lower() or " ")
    if 0 < n < 1 or n > 2**48:
        raise UserError(f"--{knob} is 0 or from 1 to 2^48 tokens, got {text!r}")
    return int(n)
