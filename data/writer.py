"""From documents to a corpus, for all prepare scripts. A corpus is a folder with

    train.bin, val.bin   token ids, flat, little-endian: uint8, uint16 or uint32 by vocabulary size. Each
                         document ends with a separator. Several shards are train_00000.bin and so on
    meta.json            vocab_size, dtype, encoding, separator, train_tokens, val_tokens, train_bytes,
                         val_bytes (UTF-8 bytes of text, one for a separator), bytes_per_token (of val),
                         source (lines for people), sha256 (of the other files), knobs (what it was made from)
    tokenizer.model      copy of the rank file, only with encoding "tokenizer.model"

Until it is complete, it is in unfinished.tmp. A preparation that was stopped resumes after its finished
shards, and writes the same files as one that was not.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.documents import PIECE, kind, pieces, read_documents
from nanotst import UserError
from nanotst.corpus import differing, smallest_dtype
from nanotst.files import read_json, write_safely, write_text
from nanotst.formats import sha256_of

UNFINISHED, PROGRESS = "unfinished.tmp", "unfinished.tmp/progress.json"
OURS = re.compile(r"(train|val)(_\d{5,})?\.bin|tokenizer\.model|meta\.json")
AHEAD = 64  # documents that are tokenised ahead of the one being written
SAID = {"train": "documents for training", "val": "documents held out for validation"}


def prepare(inputs, out, options, temporary=False):
    """Tokenise `inputs` and write them with the Writer `out`, from where an earlier preparation stopped.

    inputs: [(split, paths, limit)]. The split is "train", "val", or "" to choose by a hash of each document.
    It gets `limit` tokens at most, or all with 0. Each input has its own shards. temporary: remove the files
    of an input when its shards are written. Paths may come from a generator, which fetches them.
    """
    saved = read_json(os.path.join(out.out_dir, PROGRESS))
    state = out.state = saved if saved.get("knobs") == out.knobs else out.state
    notes = state["notes"] = Counter(state["notes"])
    if state["shards"]:
        print(f"resuming after {len(state['shards'])} finished shards in {out.folder}")
    bar = tqdm(unit=" tokens", unit_scale=True, disable=None)
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for i in range(state["inputs"], len(inputs)):
            split, paths, limit = inputs[i]
            limit = limit or float("inf")
            if state["tokens"].get(split, 0) >= limit:  # "val" after a kill before the next file
                state["documents"] = 0
                continue
            paths = list(paths)
            documents = choose(paths, split, options, state["held_out"])
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
            for path in paths if temporary else []:
                os.remove(path)
    out.publish()
    print(*(f"{n:,} {what}" for what, n in list(notes.items())[:20] if n), sep="\n")


def choose(paths, split, options, held_out=()):
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
            place = split or ("val" if int(key, 16) < options.val_fraction * 2**64 else "train")
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


def prepared(out_dir, knobs, overwrite=False):
    """Whether out_dir holds the finished corpus of these knobs. UserError if it holds another one."""
    if overwrite:
        return False
    meta, begun = (read_json(os.path.join(out_dir, name)) for name in ("meta.json", PROGRESS))
    other = ", ".join(path.name for path in Path(out_dir).glob("*.bin"))
    if saved := meta or begun:
        other = differing(knobs, saved.get("knobs") or {}, knobs)
    if other:
        todo = "choose another folder, or replace it with --overwrite"
        raise UserError(f"{out_dir} holds another corpus ({other}): {todo}")
    if meta:
        print(f"{out_dir} is prepared already; --overwrite prepares it again")
    return bool(meta)


class Writer:
    """out = Writer(out_dir, tokenizer, knobs); out.add(split, ids, n_bytes) for each document; out.publish()

    A preparation that stops before publish() leaves the former corpus or none. `knobs`, a dict of plain
    values, says what the corpus is made from; ask prepared() first. The document that fills shard_tokens ends
    a shard, which is held in memory until then. With a seed the documents of a shard are shuffled.
    """

    def __init__(self, out_dir, tokenizer, knobs, shard_tokens=0, seed=None):
        self.out_dir, self.tokenizer, self.knobs = out_dir, tokenizer, knobs
        self.shard_tokens, self.seed, self.source = shard_tokens or float("inf"), seed, []
        self.folder = os.path.join(out_dir, UNFINISHED)
        self.dtype = smallest_dtype(tokenizer.vocab_size)
        self.open = {"train": [], "val": []}  # documents that are not yet in a file
        self.n_open = {"train": 0, "val": 0}  # tokens in them
        self.state = dict(knobs=knobs, shards={}, tokens={**self.n_open}, bytes={**self.n_open})
        self.state |= dict(inputs=0, documents=0, notes={}, held_out={})  # that were read

    def add(self, split, ids, n_bytes):
        """ids: (T,), a document with its separator; n_bytes: of its text, one for the separator."""
        self.open[split].append(ids.astype(self.dtype, copy=False))
        self.n_open[split] += len(ids)
        self.state["tokens"][split] += len(ids)
        self.state["bytes"][split] += n_bytes
        if self.n_open[split] >= self.shard_tokens:
            self.close_shards()

    def close_shards(self):
        """Make files of what was added since the last call, and note how far the input was read."""
        for split, documents in self.open.items():
            number = sum(name.startswith(split) for name in self.state["shards"])
            if self.seed is not None:
                generator = np.random.default_rng((self.seed, number, split == "val"))
                documents = [documents[i] for i in generator.permutation(len(documents))]
            if documents:
                tokens = np.concatenate(documents)
                name = f"{split}_{number:05d}.bin"
                path = os.path.join(self.folder, name)
                write_safely(path, lambda file, tokens=tokens: file.write(tokens))
                self.state["shards"][name] = hashlib.sha256(tokens).hexdigest()
            self.open[split], self.n_open[split] = [], 0
        write_json(os.path.join(self.out_dir, PROGRESS), self.state)

    def publish(self):
        """Move the files into place, meta.json last. After a kill in here the same command does the rest."""
        self.close_shards()
        tokenizer, shards = self.tokenizer, self.state["shards"]
        n_train, n_val = self.state["tokens"].values()
        if not (n_train and n_val):
            shutil.rmtree(self.folder)
            what = f"{n_train:,} tokens to train on and {n_val:,} held out for validation"
            todo = "give --val=FILE, another --val_fraction, or a --separator that splits the text"
            raise UserError(f"{what}: {todo}")
        # a single shard needs no number
        many = tuple(name[:-10] for name in shards if name.endswith("_00001.bin"))
        names = {s: s if s.startswith(many) else s.replace("_00000", "") for s in shards}
        meta = dict(vocab_size=tokenizer.vocab_size, dtype=self.dtype.name, encoding=tokenizer.name)
        meta |= dict(separator=tokenizer.separator, train_tokens=n_train, val_tokens=n_val)
        meta |= {f"{split}_bytes": n or None for split, n in self.state["bytes"].items()}
        meta |= dict(bytes_per_token=(meta["val_bytes"] or 0) / n_val or None, source=self.source)
        meta |= dict(knobs=self.knobs, sha256={names[s]: digest for s, digest in shards.items()})
        if tokenizer.rank_file:
            copy = os.path.join(self.folder, "tokenizer.model")
            write_safely(copy, lambda file: file.write(Path(tokenizer.rank_file).read_bytes()))
            meta["encoding"] = names["tokenizer.model"] = "tokenizer.model"
            meta["sha256"]["tokenizer.model"] = sha256_of(copy)
        # meta.json goes first, since it must not describe other files
        for name in sorted(os.listdir(self.out_dir)):
            if OURS.fullmatch(name) and name not in meta["sha256"]:
                os.remove(os.path.join(self.out_dir, name))
        for finished, name in names.items():
            with suppress(FileNotFoundError):  # moved before a kill
                os.replace(os.path.join(self.folder, finished), os.path.join(self.out_dir, name))
        write_json(os.path.join(self.out_dir, "meta.json"), meta)
        shutil.rmtree(self.folder)
        print(f"{self.out_dir}: {n_train:,} tokens to train on, {n_val:,} to validate on")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")
