"""From tokens to a corpus, which is a folder with

    train.bin, val.bin   token ids, flat, little-endian: uint8, uint16 or uint32 by vocabulary size. Each
                         document ends with a separator. Several shards are train_00000.bin and so on
    meta.json            vocab_size, dtype, encoding, separator, train_tokens, val_tokens, train_bytes,
                         val_bytes (UTF-8 bytes of text, one for a separator), bytes_per_token (of val),
                         source (lines for people), sha256 (of the other files), knobs (what it was made from)
    tokenizer.model      copy of the rank file, only with encoding "tokenizer.model"

Until it is complete it lies in unfinished.tmp.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from nanotst import UserError
from nanotst.corpus import differing, smallest_dtype
from nanotst.files import sync_folder, write_safely
from nanotst.formats import sha256_of

SPLITS = ("train", "val")
UNFINISHED, PROGRESS = "unfinished.tmp", "unfinished.tmp/progress.json"
OURS = re.compile(r"(train|val)(_\d{5,})?\.bin|tokenizer\.model|meta\.json")


def prepared(out_dir, knobs, overwrite=False):
    """Whether out_dir holds the finished corpus of these knobs. UserError if it holds another one."""
    if overwrite:
        return False
    meta, begun = (read_json(os.path.join(out_dir, name)) for name in ("meta.json", PROGRESS))
    if saved := meta or begun:
        other = differing(knobs, saved.get("knobs") or {}, knobs)
    else:
        other = ", ".join(path.name for path in Path(out_dir).glob("*.bin"))
    if other:
        todo = "choose another folder, or replace it with --overwrite"
        raise UserError(f"{out_dir} holds another corpus ({other}): {todo}")
    if meta:
        print(f"{out_dir} is prepared already; --overwrite prepares it again")
    return bool(meta)


def read_json(path):
    """The object in a file; {} if the file is missing or damaged."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


class Writer:
    """with Writer(out_dir, tokenizer, knobs) as out: out.add(split, ids, n_bytes)

    Leaving the block without an error moves the files into place, meta.json last: a preparation that fails,
    is killed or fills the disk leaves the former corpus or none. `knobs`, a dict of plain values, says what
    the corpus is made from; ask prepared() first. The document that fills shard_tokens ends a shard, which is
    held in memory until then. With a seed the documents of a shard are shuffled.
    """

    def __init__(self, out_dir, tokenizer, knobs, shard_tokens=0, seed=None):
        self.out_dir, self.tokenizer, self.knobs = out_dir, tokenizer, knobs
        self.shard_tokens, self.seed, self.source = shard_tokens or float("inf"), seed, []
        self.folder = os.path.join(out_dir, UNFINISHED)
        self.dtype = smallest_dtype(tokenizer.vocab_size)
        self.open = {split: [] for split in SPLITS}  # documents that are not yet in a file
        self.n_open = dict.fromkeys(SPLITS, 0)  # tokens in them
        self.state = dict(knobs=knobs, shards={})
        self.state |= {what: dict.fromkeys(SPLITS, 0) for what in ("tokens", "bytes")}

    def __enter__(self):
        return self

    def resume(self, **state):
        """Keep the finished shards of a preparation that was stopped. -> where it was, or else `state`."""
        saved = read_json(os.path.join(self.out_dir, PROGRESS))
        self.state = saved if saved.get("knobs") == self.knobs else self.state | state
        return self.state

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
                write_safely(path, lambda path, tokens=tokens: Path(path).write_bytes(tokens))
                self.state["shards"][name] = hashlib.sha256(tokens).hexdigest()
            self.open[split], self.n_open[split] = [], 0
        write_json(os.path.join(self.out_dir, PROGRESS), self.state)

    def __exit__(self, error, *_):
        if error is None:
            self.publish()
        elif self.state["shards"]:
            n = len(self.state["shards"])
            print(f"{n} finished shards are kept: the same command resumes", file=sys.stderr)

    def publish(self):
        """Move the files into place. After a kill in here the same command does the rest."""
        n_train, n_val = self.state["tokens"].values()
        if not (n_train and n_val):
            shutil.rmtree(self.folder, ignore_errors=True)
            raise UserError(
                f"{n_train:,} tokens to train on and {n_val:,} held out for validation: give --val=FILE, "
                "another --val_fraction, or a --separator that splits the text"
            )
        self.close_shards()
        tokenizer, shards = self.tokenizer, self.state["shards"]
        many = [split for split in SPLITS if f"{split}_00001.bin" in shards]
        # a single shard needs no number
        names = {s: s if s.startswith(tuple(many)) else s.replace("_00000", "") for s in shards}
        meta = dict(vocab_size=tokenizer.vocab_size, dtype=self.dtype.name, encoding=tokenizer.name)
        meta |= dict(separator=tokenizer.separator, train_tokens=n_train, val_tokens=n_val)
        meta |= {f"{split}_bytes": n or None for split, n in self.state["bytes"].items()}
        meta |= dict(bytes_per_token=(meta["val_bytes"] or 0) / n_val or None, source=self.source)
        meta |= dict(knobs=self.knobs, sha256={names[s]: digest for s, digest in shards.items()})
        if tokenizer.rank_file:
            copy = os.path.join(self.folder, "tokenizer.model")
            write_safely(copy, lambda path: shutil.copyfile(tokenizer.rank_file, path))
            meta["encoding"] = names["tokenizer.model"] = "tokenizer.model"
            meta["sha256"]["tokenizer.model"] = sha256_of(copy)
        # meta.json goes first, since it must not describe other files
        for name in sorted(os.listdir(self.out_dir)):
            if OURS.fullmatch(name) and name not in meta["sha256"]:
                os.remove(os.path.join(self.out_dir, name))
        for finished, name in names.items():
            with suppress(FileNotFoundError):  # moved before a kill
                os.replace(os.path.join(self.folder, finished), os.path.join(self.out_dir, name))
        sync_folder(self.out_dir)
        write_json(os.path.join(self.out_dir, "meta.json"), meta)
        shutil.rmtree(self.folder)
        print(f"{self.out_dir}: {n_train:,} tokens to train on, {n_val:,} to validate on")


def write_json(path, value):
    text = json.dumps(value, indent=2) + "\n"
    write_safely(path, lambda temporary: Path(temporary).write_text(text, "utf-8"))
