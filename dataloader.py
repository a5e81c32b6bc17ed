"""The token stream: one corpus, read in order, without replacement, by one cursor.

R readers (R = rows of the global batch) stand evenly spaced round the corpus and all move on together:

    corpus   |.............................................|     N tokens
    readers   ^0          ^1          ^2          ^3             reader i starts at i * N/R
              --->        --->        --->        --->           a step moves each by L*s tokens

A batch is thus a sample of the whole corpus even where neighbouring documents resemble each other, no text is
read twice until every reader has come to where the next one started (an epoch), and what is read next is a
function of the cursor alone. So a run resumes where it was, and the readers can be dealt out to any number of
ranks and micro-batches without changing what is trained on. Superposition reads s times as fast, nothing else.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from configurator import fail


def load_meta(folder):
    """The meta.json of a prepared corpus. Stops with a one-line message where there is none."""
    try:
        with open(os.path.join(folder, "meta.json")) as f:
            meta = json.load(f)
        for key in ("vocab_size", "dtype", "train_tokens", "val_tokens", "bytes_per_token"):
            meta[key]  # what training relies on
        return meta
    except (OSError, ValueError, KeyError, TypeError) as e:
        script = os.path.join(folder, "prepare.py")
        todo = f"run python {script} first" if os.path.exists(script) else "prepare it with data/text/prepare.py"
        fail(f"no prepared corpus in {folder} ({type(e).__name__}); {todo}")


def load_tokens(folder, split):
    """The tokens of a split, "train" or "val", as a read-only memory map (N,)."""
    meta = load_meta(folder)
    path = os.path.join(folder, f"{split}.bin")
    try:
        tokens = np.memmap(path, dtype=meta["dtype"], mode="r")
    except (OSError, ValueError) as e:
        fail(f"cannot read {path}: {e}")
    if len(tokens) != meta[f"{split}_tokens"]:
        fail(f"{path} holds {len(tokens)} tokens, its meta.json says {meta[f'{split}_tokens']}; prepare the corpus again")
    return tokens


class TokenStream:
    """Batches of the training corpus.

    tokens (N,), n_rows R readers in all, of which this process serves `rows` (a range), block_size L.
    """

    def __init__(self, tokens, n_rows, rows, block_size, device="cpu"):
        self.tokens, self.n_rows, self.rows, self.block_size, self.device = tokens, n_rows, rows, block_size, device
        self.spacing = len(tokens) // n_rows  # tokens of an epoch for one reader
        self.worker = ThreadPoolExecutor(1)
        self.ahead = None, None

    def step_tokens(self, bag_size):
        """Tokens that one step consumes, over all readers."""
        return self.n_rows * self.block_size * bag_size

    def epoch(self, cursor):
        """How many times the corpus has been read, as a fraction."""
        return cursor / (self.spacing * self.n_rows)

    def read(self, cursor, bag_size):
        """The rows of this process at `cursor`, tokens consumed by all readers so far: (rows, (L+1)*s) int32.

        The last bag of a row is only a target; the same reader's next row begins with it.
        """
        n = (self.block_size + 1) * bag_size
        out = torch.empty(len(self.rows), n, dtype=torch.int32, pin_memory=self.device.startswith("cuda"))
        rows = out.numpy()
        for row, reader in zip(rows, self.rows):
            start = (reader * self.spacing + cursor // self.n_rows) % len(self.tokens)
            if start + n <= len(self.tokens):
                row[:] = self.tokens[start:start + n]
            else:  # the end of the corpus: go on at its beginning
                row[:] = self.tokens[np.arange(start, start + n) % len(self.tokens)]
        return out

    def batch(self, cursor, bag_size, next_bag_size):
        """The rows at `cursor` on the device, (rows, (L+1)*s), while a thread reads those after it."""
        key, ahead = self.ahead
        rows = ahead.result() if key == (cursor, bag_size) else self.read(cursor, bag_size)
        following = cursor + self.step_tokens(bag_size), next_bag_size
        self.ahead = following, self.worker.submit(self.read, *following)
        return rows.to(self.device, non_blocking=True)


def validation_rows(tokens, n_rows, block_size):
    """Fixed rows of L+1 tokens, evenly spaced over the validation split: (n_rows, L+1) int32."""
    starts = np.linspace(0, len(tokens) - block_size - 1, n_rows).astype(np.int64)
    return torch.from_numpy(np.stack([tokens[i:i + block_size + 1] for i in starts]).astype(np.int32))
