"""From files to a corpus, for all prepare scripts but python_source's.

A preparation that was stopped resumes after its finished shards. It writes the same files as one that was
not, whatever the number of workers.
"""

import hashlib
import os
import re
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data.documents import PIECE, kind, needs, pieces, read_documents
from nanotst import UserError
from nanotst.corpus import smallest_dtype

AHEAD = 64  # documents that are tokenised ahead of the one being written
SAID = {"train": "documents for training", "val": "documents held out for validation"}
FEW_DOCUMENTS, FEW_TOKENS = 20, 1_000_000  # a validation split below both is noisy


def prepare(
    inputs, out, options, *, fetch=None, keep=True, limits=None, val_fraction=0.0, workers=0
):
    """Tokenise `inputs` and write them with the Writer `out`, from where an earlier preparation stopped.

    inputs: [(split, names)]. The split is "train", "val", or "" to choose by a hash of each document. Each
    input has its own shards. The names are paths, or fetch(name) returns the path of a file, which is removed
    when its shards are finished unless keep is set. limits: {split: tokens}, 0 for all.
    """
    limits = limits or {}
    if out.tokenizer.note:
        print(f"warning: {out.tokenizer.note}")
    bar = needs("tqdm", "preparing").tqdm(unit=" tokens", unit_scale=True, disable=None)
    with out, ThreadPoolExecutor(workers or os.cpu_count()) as pool, bar:
        state = out.state
        notes = state["notes"] = Counter(state["notes"])
        if state["shards"]:
            print(f"resuming after {len(state['shards'])} finished shards in {out.folder}")
        for i in range(state["inputs"], len(inputs)):
            split, names = inputs[i]
            limit = limits.get(split) or float("inf")
            if out.n_tokens[split] >= limit:  # true for "val" after a kill before the next file
                state["documents"] = 0
                continue
            paths = [fetch(name) for name in names] if fetch else names
            documents = choose(paths, split, options, val_fraction, state)
            for place, key, seen, ids, n_bytes in tokenised(documents, out.tokenizer, pool):
                state["documents"] += 1
                notes.update(seen)
                notes[SAID.get(place, place)] += 1
                if split == place == "val":
                    state["held_out"][key] = True
                if place in SAID:
                    bar.update(len(ids))
                    out.add(place, ids, n_bytes)
                if out.n_tokens[split] >= limit:
                    break
            state.update(inputs=i + 1, documents=0)
            out.close_shards()
            for path in [] if keep else paths:
                os.remove(path)
        for split, n in limits.items():
            if out.n_tokens[split] < n:
                print(f"warning: there are only {out.n_tokens[split]:,} tokens for {split}")
        used = [(name, split) for split, names in inputs[: state["inputs"]] for name in names]
        out.source += [name + ", held out" * (split == "val") for name, split in used[:50]]
    print(*(f"{n:,} {what}" for what, n in list(notes.items())[:20] if n), sep="\n")
    if notes[SAID["val"]] < FEW_DOCUMENTS and out.n_tokens["val"] < FEW_TOKENS:
        print(
            "warning: validation loss will be noisy (see --val and --val_fraction to hold out more)"
        )


def choose(paths, split, options, val_fraction=0.0, state=None):
    """Yield (place, hash, text, what to say) of documents, without those in finished shards. The place is
    "train", "val", or the reason why a document is left out.

    A hash of the text alone decides which documents are held out for validation, so two copies land on the
    same side.
    """
    skip, held_out = (state["documents"], state["held_out"]) if state else (0, ())
    for path in paths:
        for text in read_documents(path, options):
            if skip:
                skip -= 1
                continue
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
    separator, dtype = np.array([tokenizer.separator]), smallest_dtype(tokenizer.vocab_size)

    def encode(place, key, text, notes):
        ids = np.concatenate([*map(tokenizer.encode, pieces(text)), separator]).astype(dtype)
        return place, key, notes, ids, len(text.encode("utf-8", "replace")) + 1

    waiting = deque()
    for document in documents:
        waiting.append(pool.submit(encode, *document))
        while len(waiting) > (
            AHEAD if len(document[2]) < PIECE else 0
        ):  # long ones fill the memory
            yield waiting.popleft().result()
    for result in waiting:
        yield result.result()


def token_count(text, knob):
    """The number that is written as 10B, 500M, 1e9 or 100_000."""
    pattern = r"(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([kKmMbBtT]?)"
    match = re.fullmatch(pattern, text.strip().replace("_", ""))
    n = float(match[1]) * 1000 ** " kmbt".index(match[2].lower() or " ") if match else -1
    if not (n == 0 or 1 <= n <= 2**48):
        raise UserError(f"--{knob} takes a number of tokens such as 10B or 500M, got {text!r}")
    return int(n)
