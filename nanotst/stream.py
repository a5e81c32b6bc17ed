"""The token stream: one corpus, in one shuffled order, without replacement, by one cursor.

Superposition reads the corpus in runs of L*s tokens, s the bag size, a run for each row of the batch, in an order
drawn from the seed, anew for each epoch. At the switch the runs not yet read in that epoch are cut into rows of L
tokens, which are shuffled in their turn, so that rows of recovery are as unlike their neighbours as a baseline's:

    corpus          | run 0 | run 1 | run 2 | run 3 | run 4 | run 5 | ...
    superposition     4, 0, 5 ...               R runs a step, R = rows of the global batch
    recovery          1b, 3a, 2c, 1a ...        R rows of L tokens a step

What is read next is a function of the cursor alone, the tokens consumed so far: no text is read twice within an
epoch, none is skipped or repeated at the switch, a resumed run goes on where it was, and the rows of a batch can be
dealt out to any number of ranks and micro-batches without changing what is trained on.
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

    tokens (N,); block_size L; bag_size s of superposition and its number of steps; n_rows R rows of the global batch,
    of which this process serves `rows` (a range). Stops with a one-line message if the corpus is too short.
    """

    def __init__(self, tokens, block_size, bag_size, superposition_steps, n_rows, rows, seed=0, device="cpu"):
        self.tokens, self.block_size, self.n_rows, self.rows, self.seed, self.device = (
            tokens, block_size, n_rows, rows, seed, device)
        self.run = block_size * bag_size  # tokens
        self.n_runs = (len(tokens) - bag_size) // self.run  # the last one is followed by its target
        self.epoch_tokens = self.n_runs // n_rows * n_rows * self.run  # whole steps of superposition
        if not self.epoch_tokens:
            fail(f"the corpus has {len(tokens):,} tokens, too few for {n_rows} rows of {block_size} x bag_size {bag_size}; "
                 "use smaller ones or more text")
        self.switch = superposition_steps * n_rows * self.run  # the cursor at which recovery begins
        self.known = None, None  # (epoch, recovery?), and its order
        self.worker = ThreadPoolExecutor(1)
        self.ahead = None, None  # (cursor, bag size), and what the thread reads there

    def step_tokens(self, bag_size):
        """Tokens that one step consumes, over all rows."""
        return self.n_rows * self.block_size * bag_size

    def order(self, epoch, recovery):
        """Where each row of an epoch, or of the rest of it that superposition left to recovery, starts: (n,) tokens."""
        key, starts = self.known
        if key != (epoch, recovery):
            runs = np.random.default_rng([self.seed, epoch]).permutation(self.n_runs)[:self.epoch_tokens // self.run]
            starts = runs * self.run
            if recovery:
                if epoch == self.switch // self.epoch_tokens:
                    starts = starts[self.switch % self.epoch_tokens // self.run:]
                starts = (starts[:, None] + np.arange(0, self.run, self.block_size)).ravel()
                starts = np.random.default_rng([self.seed, epoch, 1]).permutation(starts)
            self.known = (epoch, recovery), starts
        return starts

    def read(self, cursor, bag_size):
        """The rows of this process at `cursor`, tokens consumed by all rows so far: (rows, (L+1)*s) int32.

        The last bag of a row is only a target; some other row has it as input.
        """
        epoch, place = divmod(cursor, self.epoch_tokens)
        recovery = cursor >= self.switch
        if recovery and epoch == self.switch // self.epoch_tokens:
            place -= self.switch % self.epoch_tokens
        first, n = place // (self.block_size * bag_size), (self.block_size + 1) * bag_size
        starts = self.order(epoch, recovery)[first:first + self.n_rows]  # (R,)
        out = torch.empty(len(self.rows), n, dtype=torch.int32, pin_memory=self.device.startswith("cuda"))
        for row, i in zip(out.numpy(), self.rows):
            row[:] = self.tokens[starts[i]:starts[i] + n]
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
