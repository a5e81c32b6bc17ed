"""The writer of all prepare scripts. A corpus is a folder with

    train.bin, val.bin   token ids, flat and little-endian: uint8, uint16 or uint32 by vocabulary size. Every
                         document is followed by one separator token. A large corpus has train_00000.bin,
                         train_00001.bin ... instead, and val_00000.bin ... if there are several of those
    meta.json            vocab_size, dtype, train_tokens, val_tokens, train_bytes, val_bytes (UTF-8 bytes of
                         text, a separator counted as one), bytes_per_token (of val), encoding, separator,
                         source (lines for people: what was taken), sha256 (of the other files), seal; from
                         the hub also knobs, by which a second preparation sees whether it would be the same
    tokenizer.model      only with encoding "tokenizer.model": a copy of the rank file
    train.crc, val.crc   only of a large corpus: checksums of the parts of each token file (nanotst/corpus.py)

Until a corpus is complete its files lie in unfinished.tmp, with a note of how far it got after every shard.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from array import array
from collections import Counter
from contextlib import contextmanager, suppress

import numpy as np

from nanotst import UserError
from nanotst.corpus import LARGE, smallest_dtype, sums_name, write_sums
from nanotst.files import sync_folder
from nanotst.formats import sealed, sha256_of

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two preparations apart there
    fcntl = None

UNFINISHED = "unfinished.tmp"
FETCHED = "files"  # in there: the input, where it is fetched. Who fetches checks whether it is still right
SPLITS = ("train", "val")
OURS = re.compile(r"(train|val)(_\d{5,})?\.(bin|crc)|tokenizer\.model")


class TokenFiles:
    """with TokenFiles(out_dir, tokenizer) as files: files.add(split, ids, n_bytes); files.end_document(split)

    Leaving the block without an error moves the files into place, meta.json last, and a folder without
    meta.json is no corpus: a preparation that fails, is killed or fills the disk leaves either the corpus
    before it or none.

    With `shard_tokens`, end_document() closes the shard once it has that many tokens. What is in `state` is
    kept with it, and the next TokenFiles with the same `job` goes on from there. With a `seed`, the documents
    of a shard are shuffled.
    """

    def __init__(self, out_dir, tokenizer, shard_tokens=0, seed=None, job=None):
        if not out_dir:
            raise UserError("out_dir must name a folder")
        self.out_dir, self.tokenizer = out_dir, tokenizer
        self.folder = os.path.join(out_dir, UNFINISHED)
        self.fetched = os.path.join(self.folder, FETCHED)
        self.dtype = smallest_dtype(tokenizer.vocab_size)
        self.shard_tokens, self.seed = shard_tokens, seed
        self.state = {"job": json.loads(json.dumps(job)), "shards": [], "meta": None}
        self.source, self.knobs = [], None  # of meta.json, to be filled by the caller
        self.open = {}  # split -> the Shard being written
        self.n_tokens, self.n_bytes = Counter(), Counter()  # of each split so far

    def __enter__(self):
        with self._writing():
            os.makedirs(self.folder, exist_ok=True)
            self._lock()
            if (before := self._unfinished()) is None:
                self._clear()
            else:
                self.state = before
                for shard in before["shards"]:
                    self.n_tokens[shard["split"]] += shard["tokens"]
                    self.n_bytes[shard["split"]] += shard["bytes"]
        return self

    def add(self, split, ids, n_bytes):
        """ids: (T,), separators included; n_bytes: of the text they stand for, separators as one each."""
        with self._writing():
            if split not in self.open:
                self.open[split] = Shard(os.path.join(self.folder, f"{split}.tmp"))
            self.open[split].add(ids.astype(self.dtype, copy=False), n_bytes)
        self.n_tokens[split] += len(ids)
        self.n_bytes[split] += n_bytes

    def end_document(self, split):
        """Every document ends with this call. -> whether it also closed a shard."""
        if split in self.open:
            self.open[split].ends.append(self.open[split].n_tokens)
        full = self.shard_tokens and any(
            s.n_tokens >= self.shard_tokens for s in self.open.values()
        )
        if full:
            self.close_shard()
        return bool(full)

    def close_shard(self):
        """What was added since the last shard becomes files, whole and on the disk, and `state` is kept."""
        with self._writing():
            for split, shard in sorted(self.open.items()):
                number = sum(s["split"] == split for s in self.state["shards"])
                path = os.path.join(self.folder, f"{split}_{number:05d}.bin")
                seed = None if self.seed is None else (self.seed, number, SPLITS.index(split))
                sha256 = shard.close(path, self.dtype, seed)
                sums = sha256_of(write_sums(path))
                self.state["shards"].append(
                    dict(
                        split=split,
                        tokens=shard.n_tokens,
                        bytes=shard.n_bytes,
                        sha256=sha256,
                        sums=sums,
                    )
                )
            self.open = {}
            self._write_whole("progress.json", json.dumps(self.state))

    def sha256(self):
        """{name: sha256} of the closed shards, and of the checksums that a large corpus gets."""
        hashes, large = {}, self.n_tokens.total() * self.dtype.itemsize > LARGE
        for split in SPLITS:
            shards = [s for s in self.state["shards"] if s["split"] == split]
            for i, shard in enumerate(shards):
                name = f"{split}_{i:05d}.bin" if len(shards) > 1 else f"{split}.bin"
                hashes[name] = shard["sha256"]
                if large:
                    hashes[sums_name(name)] = shard["sums"]
        return hashes

    def __exit__(self, error_type, error, traceback):
        try:
            if error is None and self.state["meta"] is None:
                self._finish()
            if error is None:
                self._publish()
        finally:
            for shard in self.open.values():
                shard.abandon()
            done = (
                self.state["meta"] is not None
                or bool(self.state["shards"])
                or os.path.isdir(self.fetched)
            )
            if self.state["job"] is None or not done:
                self._clear(and_folder=True)  # nobody could go on from it
            elif os.path.isdir(self.folder):
                n = len(self.state["shards"])
                kept = (
                    f"{n} finished shards are kept"
                    if n
                    else "no shard is finished, what was fetched is kept"
                )
                print(f"{kept}: the same command goes on from there", file=sys.stderr)
            self._unlock()

    def _finish(self):
        """Close the last shard and settle what meta.json will say."""
        for split in SPLITS:
            if not self.n_tokens[split]:
                raise UserError(f"no text for {split}.bin; nothing written")
        if self.open:
            self.close_shard()
        encoding, sha256 = self.tokenizer.name, self.sha256()
        if self.tokenizer.rank_file:
            encoding = "tokenizer.model"
            with open(self.tokenizer.rank_file, "rb") as f:
                ranks = f.read()
            sha256[encoding] = hashlib.sha256(ranks).hexdigest()
            with self._writing():
                self._write_whole(encoding, ranks)
        self.state["meta"] = dict(
            vocab_size=self.tokenizer.vocab_size,
            dtype=self.dtype.name,
            train_tokens=self.n_tokens["train"],
            val_tokens=self.n_tokens["val"],
            train_bytes=self.n_bytes["train"],
            val_bytes=self.n_bytes["val"],
            bytes_per_token=self.n_bytes["val"] / self.n_tokens["val"],
            encoding=encoding,
            separator=self.tokenizer.separator,
            source=self.source,
            sha256=sha256,
        )
        if self.knobs:
            self.state["meta"]["knobs"] = self.knobs
        self.state["meta"] = sealed(self.state["meta"])
        with self._writing():
            self._write_whole("progress.json", json.dumps(self.state))

    def _publish(self):
        """Move the files into place. A process killed in here does the rest when it is started again."""
        meta = self.state["meta"]
        names = list(meta["sha256"])
        with self._writing():
            stale = [n for n in os.listdir(self.out_dir) if OURS.fullmatch(n)]
            # the old meta.json goes first: it must never describe new tokens
            for name in ["meta.json", *(n for n in stale if n not in names)]:
                with suppress(FileNotFoundError):
                    os.remove(os.path.join(self.out_dir, name))
            for name in names:
                source = re.sub(
                    r"^(train|val)\.", r"\1_00000.", name
                )  # a single shard needs no number
                with suppress(FileNotFoundError):  # moved before the process was killed
                    os.replace(os.path.join(self.folder, source), os.path.join(self.out_dir, name))
            sync_folder(self.out_dir)
            self._write_whole("meta.json", json.dumps(meta, indent=2) + "\n")
            os.replace(
                os.path.join(self.folder, "meta.json"), os.path.join(self.out_dir, "meta.json")
            )
            sync_folder(self.out_dir)
            self._clear(and_folder=True)

    def summary(self):
        """Lines for the end of a prepare script."""
        lines = []
        for split in SPLITS:
            n = sum(s["split"] == split for s in self.state["shards"])
            name = f"{split}.bin" if n == 1 else f"{split}_*.bin ({n} shards)"
            lines.append(
                f"{os.path.join(self.out_dir, name)}: {self.n_tokens[split]:,} tokens of {self.dtype.name}, "
                f"{self.n_bytes[split] / 1e6:,.1f} MB of text"
            )
        return "\n".join(lines)

    def _unfinished(self):
        """The state of an unfinished preparation of the same job, or None. UserError for another job's."""
        try:
            with open(os.path.join(self.folder, "progress.json"), encoding="utf-8") as f:
                state = json.load(f)
        except FileNotFoundError:
            return None
        if state["job"] is None:  # of a script that does not go on
            return None
        if state["job"] != self.state["job"]:
            raise UserError(
                f"{self.folder} holds {len(state['shards'])} finished shards of other input or other knobs: "
                "give the same ones to go on with it, or remove that folder"
            )
        counts = Counter()
        for shard in state["shards"] if state["meta"] is None else []:
            path = os.path.join(self.folder, f"{shard['split']}_{counts[shard['split']]:05d}.bin")
            counts[shard["split"]] += 1
            if (
                not os.path.exists(path)
                or os.path.getsize(path) != shard["tokens"] * self.dtype.itemsize
            ):
                print(f"{path} is damaged: all shards are made again", file=sys.stderr)
                return None
        return state

    def _write_whole(self, name, content):
        path = os.path.join(self.folder, name)
        with open(f"{path}.new", "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())  # a rename may reach the disk before the data it names
        os.replace(f"{path}.new", path)
        sync_folder(self.folder)

    def _clear(self, and_folder=False):
        if and_folder:
            self._unlock()
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for name in os.listdir(self.folder):
            if name not in ("lock", FETCHED):
                os.remove(os.path.join(self.folder, name))

    def _lock(self):
        self.lock = open(os.path.join(self.folder, "lock"), "w")  # noqa: SIM115 (held open on purpose)
        try:
            if fcntl:
                fcntl.flock(
                    self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB
                )  # the system frees it with the process
        except BlockingIOError:
            raise UserError(f"another preparation is writing in {self.out_dir}") from None
        except OSError:
            pass  # a file system without locks

    def _unlock(self):
        self.lock.close()

    @contextmanager
    def _writing(self):
        """What goes wrong in here is the output's fault and is said so."""
        try:
            yield
        except OSError as e:
            full = e.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
            reason = "the disk is full" if full else e.strerror or e
            raise UserError(f"writing in {self.out_dir} failed: {reason}") from None


class Shard:
    """Tokens of one split, written to a temporary file, and where its documents end."""

    def __init__(self, path):
        self.path, self.file = path, open(path, "wb")  # noqa: SIM115 (closed by close or abandon)
        self.n_tokens = self.n_bytes = 0
        self.ends = array("q")
        self.sha256 = hashlib.sha256()

    def add(self, ids, n_bytes):
        self.file.write(ids.data)
        self.sha256.update(ids.data)
        self.n_tokens += len(ids)
        self.n_bytes += n_bytes

    def close(self, path, dtype, seed):
        """The file as `path`, on the disk, its documents shuffled if there is a seed. -> its sha256."""
        self.file.flush()
        if seed is not None:
            unshuffled = np.memmap(self.path, dtype, mode="r")
            self.file.close()
            self.sha256, starts = hashlib.sha256(), array("q", [0]) + self.ends
            self.file = open(f"{self.path}.shuffled", "wb")  # noqa: SIM115
            for i in np.random.default_rng(seed).permutation(len(self.ends)):
                document = unshuffled[starts[i] : self.ends[i]]
                self.file.write(document.data)
                self.sha256.update(document.data)
            del unshuffled
            self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.file.name, path)
        with suppress(FileNotFoundError):
            os.remove(self.path)
        return self.sha256.hexdigest()

    def abandon(self):
        with suppress(OSError):  # closing flushes, which fails again on a full disk
            self.file.close()
        for path in (self.path, f"{self.path}.shuffled"):
            with suppress(OSError):
                os.remove(path)
