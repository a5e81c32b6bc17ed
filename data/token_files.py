"""
The writer shared by the prepare scripts. A dataset is a folder with

  train.bin, val.bin   token ids, flat and little-endian: uint8, uint16 or uint32 by vocabulary size.
                       Every document is followed by one separator token
  meta.json            vocab_size, dtype, train_tokens, val_tokens, train_bytes, val_bytes (UTF-8 bytes
                       of text, a separator counted as one), bytes_per_token (of val), encoding,
                       separator, source (lines for people: what was taken)
  tokenizer.model      only with encoding "tokenizer.model": a copy of the rank file
"""
import errno
import json
import os
from contextlib import suppress

import numpy as np


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint8, uint16, uint32 that holds vocab_size ids, little-endian."""
    for bits in (8, 16, 32):
        if vocab_size <= 2**bits:
            return np.dtype(f"<u{bits // 8}")
    raise ValueError(f"vocab_size {vocab_size} does not fit 32 bits")


class TokenFiles:
    """with TokenFiles(out_dir, tokenizer) as files: files.add("train", ids, n_bytes) ...

    Everything goes to temporary names first. Leaving the block without an error moves the files into
    place, meta.json last, and a folder without meta.json is not a dataset: a preparation that fails, is
    killed or fills the disk leaves either the previous dataset or none. Failures to write are
    SystemExit with a one-line message.
    """

    def __init__(self, out_dir: str, tokenizer):
        self.out_dir, self.tokenizer = out_dir, tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.source: list[str] = []  # to be filled by the caller
        self.n_tokens = {"train": 0, "val": 0}
        self.n_bytes = {"train": 0, "val": 0}
        self.files = {}

    def __enter__(self):
        try:
            os.makedirs(self.out_dir, exist_ok=True)
            for split in ("train", "val"):
                self.files[split] = open(self._temporary(split + ".bin"), "wb")
        except OSError as e:
            self._remove_temporaries()
            raise SystemExit(f"error: cannot write in {self.out_dir}: {e.strerror}") from None
        return self

    def add(self, split: str, ids: np.ndarray, n_bytes: int):
        """ids: (T,), separators included; n_bytes: of the text they stand for, separators as one each."""
        self.files[split].write(ids.astype(self.dtype, copy=False).data)
        self.n_tokens[split] += len(ids)
        self.n_bytes[split] += n_bytes

    def __exit__(self, error_type, error, traceback):
        try:
            if error is None:
                self._publish()
        except OSError as e:
            error = e
        finally:
            self._remove_temporaries()
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk is full" if full else error.strerror or error
            raise SystemExit(f"error: writing {self.out_dir} failed: {reason}; temporary files removed") from None

    def _publish(self):
        for split in ("val", "train"):
            if self.n_tokens[split] == 0:
                raise SystemExit(f"error: no text for {split}.bin; nothing written")
        encoding = self.tokenizer.name
        if self.tokenizer.rank_file:
            encoding = "tokenizer.model"
            with open(self.tokenizer.rank_file, "rb") as f:
                ranks = f.read()
            self.files[encoding] = open(self._temporary(encoding), "wb")
            self.files[encoding].write(ranks)
        meta = {
            "vocab_size": self.tokenizer.vocab_size,
            "dtype": self.dtype.name,
            "train_tokens": self.n_tokens["train"],
            "val_tokens": self.n_tokens["val"],
            "train_bytes": self.n_bytes["train"],
            "val_bytes": self.n_bytes["val"],
            "bytes_per_token": self.n_bytes["val"] / self.n_tokens["val"],
            "encoding": encoding,
            "separator": self.tokenizer.separator,
            "source": self.source,
        }
        names = [split + ".bin" for split in ("train", "val")]
        names += [encoding] * bool(self.tokenizer.rank_file) + ["meta.json"]
        self.files["meta.json"] = open(self._temporary("meta.json"), "wb")
        self.files["meta.json"].write((json.dumps(meta, indent=2) + "\n").encode())
        for f in self.files.values():
            f.flush()
            os.fsync(f.fileno())  # a rename may reach the disk before the data it names
            f.close()
        # the old meta.json goes first: it must never describe new tokens
        for stale in ("meta.json", "tokenizer.model"):
            with suppress(FileNotFoundError):
                os.remove(os.path.join(self.out_dir, stale))
        for name in names:
            if name == "meta.json":
                self._sync_folder()
            os.replace(self._temporary(name), os.path.join(self.out_dir, name))
        self._sync_folder()

    def _temporary(self, name: str) -> str:
        return os.path.join(self.out_dir, name + ".tmp")

    def _sync_folder(self):
        if os.name == "posix":  # Windows cannot open a folder
            fd = os.open(self.out_dir, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)

    def _remove_temporaries(self):
        for f in self.files.values():
            with suppress(OSError):  # closing flushes, which fails again on a full disk
                f.close()
        for name in ("train.bin", "val.bin", "tokenizer.model", "meta.json"):
            with suppress(OSError):
                os.remove(self._temporary(name))

    def summary(self) -> str:
        """Two lines for the end of a prepare script."""
        return "\n".join(
            f"{os.path.join(self.out_dir, split)}.bin: {self.n_tokens[split]:,} tokens of {self.dtype.name}, "
            f"{self.n_bytes[split] / 1e6:,.1f} MB of text" for split in ("train", "val"))
