"""The token stream: one corpus, in one shuffled order, without replacement, through all phases of a run.

The first phase reads the corpus in stretches of L*n_in tokens, one for each row of the batch, in a new order
in each epoch. At a switch, the stretches not yet read in that epoch are cut into the shorter rows of the next
phase, and these are shuffled again, so that rows of recovery are as unlike their neighbours as a baseline's:

    stretches       |   0   |   1   |   2   |   3   |   4   |   5   | ...    of the corpus
    superposition     4, 0, 5 ...               R stretches per step, R = rows of the global batch
    recovery          1b, 3a, 2c, 1a ...        R rows of L tokens per step

The place of a row is computed, not stored: a pure function of seed, epoch, phase and the row's number. So
memory and start-up time do not grow with the corpus; within an epoch no text is read twice or skipped, also
not at a switch; a resumed run continues where it was; and the rows of a batch can be dealt out to any number
of ranks and micro-batches.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, replace
from functools import lru_cache
from itertools import accumulate, groupby

import numpy as np
import torch

from nanotst import UserError
from nanotst.mixture import Pattern
from tst import Phase, check_phases, phase_at

ROUNDS = 6  # of the Feistel network
AT_ONCE = 16  # steps whose places are computed together


@lru_cache(64)
def round_keys(key):
    return np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)


def permute(i, n, key):
    """Places of the numbers i (m,) in the shuffle of 0..n-1 by `key`, a tuple of integers: (m,) int64.

    A Feistel network permutes the numbers below a power of 4, at most 4n of them. A number that leaves
    0..n-1 is sent through again until it is back. Nothing is stored."""
    half = np.uint64(max(3, (int(n - 1).bit_length() + 1) // 2))  # bits of each half
    mask = (np.uint64(1) << half) - np.uint64(1)
    x, away = np.array(i, dtype=np.uint64), slice(None)
    while True:
        left, right = x[away] >> half, x[away] & mask
        for key_of_round in round_keys(key):
            # multiply, fold, multiply: mixes all bits
            h = (right + key_of_round) * np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ ((h ^ (h >> np.uint64(32))) & mask)
        x[away] = left << half | right
        away = np.flatnonzero(x >= n)
        if not len(away):
            return x.astype(np.int64)


class Order:
    """Where the rows of one corpus start. spans: (n_in, number of rows that it gives) of each phase; the last
    phase has no end. tail: tokens after the last row, which are only targets. key: the shuffles' seed."""

    def __init__(self, n_tokens, block_size, spans, tail, key):
        self.row_tokens = [block_size * n_in for n_in, _ in spans]  # by phase
        self.n_stretches = max(0, n_tokens - tail) // self.row_tokens[0]
        self.epoch_tokens = self.n_stretches * self.row_tokens[0]
        tokens = (block_size * n_in * n_rows for n_in, n_rows in spans[:-1])
        self.begins = [0, *accumulate(tokens)]  # tokens read before each phase
        self.key = key

    def starts(self, phase, i):
        """Start, in tokens, of rows number i (m,) of a phase (its index): (m,)."""
        length, n = self.row_tokens, self.epoch_tokens
        read = self.begins[phase] + i * length[phase]  # (m,) tokens read before each row
        epochs, out = read // n, np.empty(len(i), np.int64)
        for epoch in range(int(epochs.min()), int(epochs.max()) + 1):
            here, key = epochs == epoch, (*self.key, epoch)
            # unread tokens that each phase finds; Python's integers, since permute is slower with numpy's
            left = [n - min(max(0, begin - epoch * n), n) for begin in self.begins]
            # the rows by number, from the first that the phase cuts from them
            row, offset = (read[here] - (epoch + 1) * n + left[phase]) // length[phase], 0
            for p in range(phase, 0, -1):  # back to the row of the previous phase each is cut from
                row = permute(row, left[p] // length[p], (*key, p))
                row, piece = np.divmod(row, length[p - 1] // length[p])
                # that phase numbers from where it began itself, so skip the rows it has read
                row = row + (left[p - 1] - left[p]) // length[p - 1]
                offset = offset + piece * length[p]
            out[here] = permute(row, self.n_stretches, (*key, 0)) * length[0] + offset
        return out


class TokenStream:
    """Batches of the training corpus.

    sources: [(tokens, share of all rows, a Fraction)], tokens with a length and slices; phases from
    tst.phase_list; n_rows: rows of the global batch; this process reads `rows` of them (a range). state: what
    state() returned when the run stopped after `step` steps. Raises UserError if a corpus is too short."""

    def __init__(
        self, sources, block_size, phases, n_rows, rows, seed=0, device="cpu", state=None, step=0
    ):
        self.tokens, shares = zip(*sources)
        self.block_size, self.n_rows, self.rows, self.device = block_size, n_rows, rows, device
        ratios = [n for share in shares for n in share.as_integer_ratio()]
        self.cut = [block_size, n_rows, seed, *ratios]
        # the order is read from step first_step on, after tokens_before tokens in an earlier order
        self.phases, self.first_step, self.tokens_before = phases, 0, 0
        if state:
            self._resume(state, step)
        self.pattern = Pattern(shares)
        # rows before each phase, numbered through the run, so that shares hold across switches
        steps = (p.stop - p.start for p in self.phases)
        self.rows_before = [0, *accumulate(n_rows * n for n in steps)]
        self.orders = [self._order(i, seed) for i in range(len(sources))]
        epochs = [order.epoch_tokens / share for order, share in zip(self.orders, shares)]
        self.epoch_tokens = int(min(epochs))  # until the first corpus has been read
        self.places = lru_cache(2)(self._places)  # by phase and block of its steps
        self.worker = ThreadPoolExecutor(1)
        self.ahead = None, None  # a step, and what the thread reads for it

    def _order(self, corpus, seed):
        """The order of a corpus, given by its number."""
        bounds = [int(self.pattern.rows_before(row, corpus)) for row in self.rows_before]
        spans = [(p.n_in, b - a) for p, a, b in zip(self.phases, bounds, bounds[1:])]
        tail, n_tokens = max(p.n_out for p in self.phases), len(self.tokens[corpus])
        order = Order(n_tokens, self.block_size, spans, tail, (seed + corpus, self.first_step))
        # rows of a batch that come from this corpus, rounded up
        n_rows = -(-self.n_rows * int(self.pattern.before[corpus, -1]) // self.pattern.n)
        if order.n_stretches < n_rows:
            which = f"corpus {corpus + 1} of {len(self.tokens)} has {n_tokens:,} tokens"
            todo = "lower total_batch, block_size or bag_size, or use more text"
            raise UserError(f"{which}, too few for {n_rows} rows; {todo}")
        return order

    def state(self):
        """What a checkpoint needs to continue the stream: plain values."""
        state = dict(cut=self.cut, phases=[astuple(p) for p in self.phases])
        return state | dict(first_step=self.first_step, tokens_before=self.tokens_before)

    def _resume(self, state, step):
        """Continue the order of `state`: with its phases up to `step`, and the wanted ones from there on. If
        they cannot follow each other, or rows are cut in another way, a new epoch begins."""
        past, wanted, cut = [Phase(*p) for p in state["phases"]], self.phases, self.cut
        self.phases, self.cut = past, state["cut"]
        self.first_step, self.tokens_before = state["first_step"], state["tokens_before"]
        read, self.cut = self.tokens_at(step), cut
        future = [replace(p, start=max(p.start, step)) for p in wanted if p.stop > step]
        future = future or [replace(wanted[-1], start=step, stop=step + 1)]  # a finished run
        both = [replace(p, stop=min(p.stop, step)) for p in past if p.start < step] + future
        alike = [list(group) for _, group in groupby(both, lambda p: (p.n_in, p.n_out))]
        joined = [replace(group[0], stop=group[-1].stop) for group in alike]
        if state["cut"] == self.cut:
            with suppress(ValueError):
                check_phases(joined)
                self.phases = joined
                return
        self.phases, self.first_step, self.tokens_before = future, step, read

    def tokens_at(self, step):
        """Tokens of text read before step number `step`, over all ranks."""
        last = replace(self.phases[-1], stop=step)  # the last phase never ends
        read = (max(0, min(step, p.stop) - p.start) * p.n_in for p in [*self.phases[:-1], last])
        return self.tokens_before + sum(read) * self.cut[0] * self.cut[1]

    def read(self, step):
        """The rows of this process in step number `step`: (rows, L*n_in + n_out) int32. The last n_out tokens
        of a row are only a target; some other row has them as input."""
        phase = phase_at(self.phases, step)
        n, pinned = self.block_size * phase.n_in + phase.n_out, self.device.startswith("cuda")
        out = torch.empty(len(self.rows), n, dtype=torch.int32, pin_memory=pinned)
        block, i = divmod(step - phase.start, AT_ONCE)
        places = self.places(phase, block)[i * len(out) :]
        for row, (corpus, start) in zip(out.numpy(), places):
            row[:] = self.tokens[corpus][start : start + n]
        return out

    def _places(self, phase, block):
        """[(corpus, start)] of the rows of this process in AT_ONCE steps of a phase, since calls of numpy
        cost more than the numbers in them."""
        p = self.phases.index(phase)
        steps = np.arange(block * AT_ONCE, (block + 1) * AT_ONCE)[:, None]  # in the phase
        before = self.rows_before[p]
        rows = (before + steps * self.n_rows + np.asarray(self.rows, np.int64)).ravel()  # (m,)
        corpora = self.pattern.corpus[rows % self.pattern.n]  # (m,)
        starts = np.empty_like(rows)
        for n, order in enumerate(self.orders):
            here = np.flatnonzero(corpora == n)
            if len(here):  # rows of this corpus, numbered from the start of the phase
                first = self.pattern.rows_before(before, n)
                starts[here] = order.starts(p, self.pattern.rows_before(rows[here], n) - first)
        return list(zip(corpora.tolist(), starts.tolist()))

    def batch(self, step):
        """The rows of `step` on the device, (rows, L*n_in + n_out); a thread reads the next step's."""
        key, ahead = self.ahead
        rows = ahead.result() if key == step else self.read(step)
        self.ahead = step + 1, self.worker.submit(self.read, step + 1)
        return rows.to(self.device, non_blocking=True)


def validation_rows(tokens, positions, block_size):
    """Fixed rows, evenly spaced over the validation split, with at most this number of positions in all:
    (n, L+1) int32. Raises UserError if the split is shorter than a row."""
    if len(tokens) <= block_size:
        n = len(tokens)
        raise UserError(f"block_size {block_size} needs more validation text than {n} tokens")
    n_rows = max(1, min(positions, len(tokens)) // block_size)
    starts = np.linspace(0, len(tokens) - block_size - 1, n_rows).astype(np.int64)
    rows = np.stack([tokens[i : i + block_size + 1] for i in starts])
    return torch.from_numpy(rows.astype(np.int32))
