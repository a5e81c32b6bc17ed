"""From files to a corpus, for all prepare scripts but python_source's.

A preparation that was stopped resumes after its finished shards. It writes the same files as one that was
not, whatever the number of workers.
"""

import hashlib
import os
import re
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from tqdm import tqdm

from data.documents import PIECE, kind, pieces, read_documents
from nanotst import UserError

AHEAD = 64  # documents that are tokenised ahead of the one being written
SAID = {"train": "documents for training", "val": "documents held out for validation"}


def prepare(inputs, out, options, *, fetch=None, limits=None, val_fraction=0.0, workers=0):
    """Tokenise `inputs` and write them with the Writer `out`, from where an earlier preparation stopped.

    inputs: [(split, names)]. The split is "train", "val", or "" to choose by a hash of each document. Each
    input has its own shards. The names are paths, or fetch(name) returns the path of a file, which is removed
    when its shards are finished. limits: {split: tokens}, 0 for all.
    """
    limits = limits or {}
    if out.tokenizer.note:
        print(f"warning: {out.tokenizer.note}")
    bar = tqdm(unit=" tokens", unit_scale=True, disable=None)
    with out, ThreadPoolExecutor(workers or os.cpu_count()) as pool, bar:
        state = out.resume(inputs=0, documents=0, notes={}, held_out={})
        notes = state["notes"] = Counter(state["notes"])
        if state["shards"]:
            print(f"resuming after {len(state['shards'])} finished shards in {out.folder}")
        for i in range(state["inputs"], len(inputs)):
            split, names = inputs[i]
            limit = limits.get(split) or float("inf")
            if state["tokens"].get(split, 0) >= limit:  # "val" after a kill before the next file
                state["documents"] = 0
                continue
            paths = [fetch(name) for name in names] if fetch else names
            documents = choose(paths, split, options, val_fraction, state["held_out"])
            documents = islice(documents, state["documents"], None)
            for place, key, seen, ids, n_bytes in tokenised(documents, out.tokenizer, pool):
                state["documents"] += 1
                notes.update(seen)
                notes[SAID.get(place, place)] += 1
                if split == place == "val":
                    state["held_out"][key] = True
                if place in SAID:
                    bar.update(len(ids))
                    out.add(place, ids, n_bytes)
                if state["tokens"].get(split, 0) >= limit:
                    break
            state.update(inputs=i + 1, documents=0)
            out.close_shards()
            for path in paths if fetch else []:
                os.remove(path)
        used = [(name, split) for split, names in inputs[: state["inputs"]] for name in names]
        out.source += [name + ", held out" * (split == "val") for name, split in used[:50]]
    print(*(f"{n:,} {what}" for what, n in list(notes.items())[:20] if n), sep="\n")


def choose(paths, split, options, val_fraction=0.0, held_out=()):
    """Yield (place, hash, text, what to say) of documents. The place is "train", "val", or the reason why a
    document is left out.

    A hash of the text alone decides which documents are held out for validation, so two copies land on the
    same side.
    """
    for path in paths:
        for text in read_documents(path, options):
            notes = {"NUL bytes left out": text.count("\0")}  # a NUL separates documents of bytes
            text = text.replace("\0", "")
            if options.separator and kind(path) == "text":
                what = f"separators inside lines of {path} taken as text: a separator needs its own line"
                notes[what] = text.count(options.separator)
            key = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()
            place = split or ("val" if int(key, 16) < val_fraction * 2**64 else "train")
            if split == "train" and key in held_out:
                place = "copies of held-out documents left out"
            place = place if text.strip() else "empty documents left out"
            yield place, key, text if place in SAID else "", notes


def tokenised(documents, tokenizer, pool):
    """Yield (place, hash, what to say, ids (T,) with a separator, bytes) in order. Threads do it, since
    tiktoken releases the interpreter lock."""

    def encode(place, key, text, notes):
        ids = np.concatenate([*map(tokenizer.encode, pieces(text)), [tokenizer.separator]])
        return place, key, notes, ids, len(text.encode("utf-8", "replace")) + 1

    waiting = deque()
    for document in documents:
        waiting.append(pool.submit(encode, *document))
        ahead = AHEAD if len(document[2]) < PIECE else 0  # long ones fill the memory
        while len(waiting) > ahead:
            yield waiting.popleft().result()
    yield from (result.result() for result in waiting)


def token_count(text, knob):
    """The number that is written as 10B, 500M, 1e9 or 100_000."""
    plain = text.strip().lower().replace("_", "")
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmbt]?)", plain)
    n = float(match[1]) * 1000 ** " kmbt".index(match[2] or " ") if match else -1
    if not (n == 0 or 1 <= n <= 2**48):
        raise UserError(f"--{knob} takes a number of tokens such as 10B or 500M, got {text!r}")
    return int(n)
