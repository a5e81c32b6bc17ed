"""The token stream: one corpus, in one shuffled order, without replacement, by one cursor.

The corpus is cut into runs of L*s tokens, s the bag size of superposition. A row of superposition is one run, a row
of recovery an s-th of one. The runs are dealt to R readers (R = rows of the global batch) in an order drawn from the
seed, anew for each epoch:

    corpus    | run 0 | run 1 | run 2 | run 3 | run 4 | run 5 | ...
    reader 0    4 0 ...                            a step takes L*s tokens from each reader's current run,
    reader 1    5 2 ...                            or L in recovery: then s steps go through one run

What is read next is a function of the cursor alone, the tokens consumed so far: no text is read twice within an
epoch, none is skipped or repeated at the switch, a resumed run goes on where it was, and readers can be dealt out
to any number of ranks and micro-batches without changing what is trained on.
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

    tokens (N,); block_size L; bag_size s of superposition; n_rows R readers in all, of which this process serves
    `rows` (a range). Stops with a one-line message if an epoch would have less than one run for each reader.
    """

    def __init__(self, tokens, block_size, bag_size, n_rows, rows, seed=0, device="cpu"):
        self.tokens, self.block_size, self.n_rows, self.rows, self.seed, self.device = (
            tokens, block_size, n_rows, rows, seed, device)
        self.run = block_size * bag_size  # tokens
        self.n_runs = (len(tokens) - bag_size) // self.run  # the last one is followed by its target
        self.epoch_runs = self.n_runs // n_rows  # runs of an epoch for one reader
        if not self.epoch_runs:
            fail(f"the corpus has {len(tokens):,} tokens, too few for {n_rows} rows of {block_size} x bag_size {bag_size}; "
                 "use smaller ones or more text")
        self.order = None, None  # epoch, and its order of runs
        self.worker = ThreadPoolExecutor(1)
        self.ahead = None, None  # (cursor, bag size), and what the thread reads there

    def step_tokens(self, bag_size):
        """Tokens that one step consumes, over all readers."""
        return self.n_rows * self.block_size * bag_size

    def epoch(self, cursor):
        """How many times the corpus has been read, as a fraction."""
        return cursor / (self.n_rows * self.epoch_runs * self.run)

    def read(self, cursor, bag_size):
        """The rows of this process at `cursor`, tokens consumed by all readers so far: (rows, (L+1)*s) int32.

        The last bag of a row is only a target; in the next row it is read as input, or it begins another run.
        """
        runs_done, offset = divmod(cursor // self.n_rows, self.run)  # of each reader
        epoch, nth = divmod(runs_done, self.epoch_runs)
        known, order = self.order
        if known != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n_runs)
            self.order = epoch, order
        n = (self.block_size + 1) * bag_size
        out = torch.empty(len(self.rows), n, dtype=torch.int32, pin_memory=self.device.startswith("cuda"))
        for row, reader in zip(out.numpy(), self.rows):
            start = order[reader * self.epoch_runs + nth] * self.run + offset
            row[:] = self.tokens[start:start + n]
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
