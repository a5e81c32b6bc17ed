"""The token stream: one corpus, in one shuffled order, without replacement, whatever the phases of the run.

The first phase reads the corpus in stretches of L*n_in tokens, one for each row of the batch, shuffled anew
for each epoch. At a switch the stretches not yet read in that epoch are cut into the shorter rows of the next
phase, which are shuffled in their turn, so that rows of recovery are as unlike their neighbours as a
baseline's:

    stretches       |   0   |   1   |   2   |   3   |   4   |   5   | ...    of the corpus
    superposition     4, 0, 5 ...               R stretches a step, R = rows of the global batch
    recovery          1b, 3a, 2c, 1a ...        R rows of L tokens a step

Where a row stands is computed, not stored: a pure function of seed, epoch, phase and the row's number. So
memory and start-up time do not grow with the corpus; no text is read twice within an epoch, none is skipped
or repeated at a switch, a resumed run goes on where it was, and the rows of a batch can be dealt out to any
number of ranks and micro-batches without changing what is trained on.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, replace
from functools import lru_cache

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
    """Places of the numbers i (m,) in a shuffle of 0..n-1, which `key`, a tuple of integers, decides: (m,)
    int64.

    A Feistel network permutes the numbers below a power of 4, at most 4n of them (64, for few). One that
    leaves 0..n-1 is sent through again until it is back, which leaves a permutation of 0..n-1. Nothing is
    stored.
    """
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
    """Where each row of a corpus starts. n_tokens of the corpus; L positions of a row; spans, the phases as
    it sees them: (n_in, rows read in it), the last one's rows being without end; tail, tokens that follow the
    last row; key, integers that decide the shuffles."""

    def __init__(self, n_tokens, block_size, spans, tail, key):
        self.row_tokens = [block_size * n_in for n_in, _ in spans]  # by phase
        self.n_stretches = max(0, n_tokens - tail) // self.row_tokens[0]
        self.epoch_tokens = self.n_stretches * self.row_tokens[0]
        self.begins = [0]  # tokens read before each phase
        for length, (_, n_rows) in zip(self.row_tokens, spans[:-1]):
            self.begins.append(self.begins[-1] + length * n_rows)
        self.key = key

    def starts(self, phase, i):
        """Where the rows number i (m,) of a phase (its index) start: (m,) tokens."""
        read = (
            self.begins[phase] + i * self.row_tokens[phase]
        )  # (m,) tokens read before each of them
        epochs = read // self.epoch_tokens
        out = np.empty(len(i), np.int64)
        for epoch in range(int(epochs.min()), int(epochs.max()) + 1):
            here = epochs == epoch
            # where this phase begins in this epoch
            first = max(self.begins[phase], epoch * self.epoch_tokens)
            out[here] = self._in_epoch(epoch, phase, (read[here] - first) // self.row_tokens[phase])
        return out

    def _in_epoch(self, epoch, phase, i):
        """The same for rows number i of those that a phase reads in one epoch."""
        bounds = np.clip(self.begins, epoch * self.epoch_tokens, (epoch + 1) * self.epoch_tokens)
        # rows, by phase
        used = [int(b - a) // length for a, b, length in zip(bounds, bounds[1:], self.row_tokens)]
        pieces = [
            a // b for a, b in zip(self.row_tokens, self.row_tokens[1:])
        ]  # of a row, in the next phase
        there = [self.n_stretches]  # rows that each phase finds
        for n_used, k in zip(used, pieces):
            there.append((there[-1] - n_used) * k)
        offset = 0
        for p in range(
            phase, 0, -1
        ):  # back to the row of the phase before, of which this is a piece
            i, piece = np.divmod(permute(i, there[p], (*self.key, epoch, p)), pieces[p - 1])
            offset = offset + piece * self.row_tokens[p]
            i = i + used[p - 1]
        return permute(i, self.n_stretches, (*self.key, epoch, 0)) * self.row_tokens[0] + offset


def is_state(x):
    """Whether x is what TokenStream.state() gives."""

    def counts(values, n):
        return (
            isinstance(values, (list, tuple))
            and len(values) == n
            and all(type(v) is int and v >= 0 for v in values)
        )

    if not isinstance(x, dict) or not isinstance(x.get("phases"), list) or not x["phases"]:
        return False
    numbers, cut = [x.get("first_step"), x.get("tokens_before")], x.get("cut")
    return (
        isinstance(cut, list)
        and counts(cut, len(cut))
        and counts(numbers, 2)
        and all(counts(p, 4) for p in x["phases"])
    )


class TokenStream:
    """Batches of the training corpus.

    sources: [(tokens, share)], tokens being (N,) or anything with a length and slices, and the shares,
    Fractions that sum to 1, the part of all rows that each gives; block_size L; phases as tst.phase_list
    makes them; n_rows R rows of the global batch, of which this process serves `rows` (a range). state: what
    state() gave when this run was stopped before step `step`. Raises UserError if a corpus is too short.
    """

    def __init__(
        self, sources, block_size, phases, n_rows, rows, seed=0, device="cpu", state=None, step=0
    ):
        self.tokens, shares = zip(*sources)
        self.block_size, self.n_rows, self.rows, self.device = block_size, n_rows, rows, device
        self.cut = [
            block_size,
            n_rows,
            seed,
            *(n for share in shares for n in share.as_integer_ratio()),
        ]
        # the order below is read from step first_step on, after tokens_before tokens read in another one
        self.phases, self.first_step, self.tokens_before = phases, 0, 0
        if state:
            self._go_on(state, step)
        check_phases(self.phases)
        self.pattern = Pattern(shares)
        # each phase: rows are numbered through the run, so that shares hold across switches
        self.rows_before = [0]
        for p in self.phases:
            self.rows_before.append(self.rows_before[-1] + (p.stop - p.start) * n_rows)
        self.orders = [self._order(i, seed) for i in range(len(sources))]
        self.epoch_tokens = min(
            int(order.epoch_tokens / share) for order, share in zip(self.orders, shares)
        )
        self.known = None, None  # a phase and a block of its steps, and the places of their rows
        self.worker = ThreadPoolExecutor(1)
        self.ahead = None, None  # a step, and what the thread reads for it

    def _order(self, corpus, seed):
        """The order of a corpus, by number, which gives its part of the rows of each phase."""
        bounds = [int(self.pattern.rows_before(row, corpus)) for row in self.rows_before]
        spans = [(p.n_in, b - a) for p, a, b in zip(self.phases, bounds, bounds[1:])]
        tail, n_tokens = max(p.n_out for p in self.phases), len(self.tokens[corpus])
        order = Order(n_tokens, self.block_size, spans, tail, (seed + corpus, self.first_step))
        # rows of a batch that are of this corpus, its share rounded up
        n_rows = -(-self.n_rows * int(self.pattern.before[corpus, -1]) // self.pattern.n)
        if order.n_stretches < n_rows:
            which = (
                "the corpus"
                if len(self.tokens) == 1
                else f"corpus {corpus + 1} of {len(self.tokens)}"
            )
            raise UserError(
                f"{which} has {n_tokens:,} tokens, too few for {n_rows} rows of {self.block_size} x "
                f"bag_size {self.phases[0].n_in}; give smaller ones (or a smaller total_batch) or more text"
            )
        return order

    def state(self):
        """What a checkpoint needs to read on: plain values."""
        return {
            "cut": self.cut,
            "phases": [astuple(p) for p in self.phases],
            "first_step": self.first_step,
            "tokens_before": self.tokens_before,
        }

    def _go_on(self, state, step):
        """Take up the order of `state`: with the phases it had up to `step`, and those of now from there on.
        Where these cannot follow those, or rows are cut anew, the rest of the epoch is given up and another
        one begins."""
        past, wanted = [Phase(*p) for p in state["phases"]], self.phases
        self.phases, self.first_step, self.tokens_before = (
            past,
            state["first_step"],
            state["tokens_before"],
        )
        if state["cut"] == self.cut and past == wanted:
            return
        read = self.tokens_at(step)
        future = [replace(p, start=max(p.start, step)) for p in wanted if p.stop > step]
        future = future or [replace(wanted[-1], start=step, stop=step + 1)]  # a finished run
        joined = [replace(p, stop=min(p.stop, step)) for p in past if p.start < step]
        for p in future:
            if joined and (joined[-1].n_in, joined[-1].n_out) == (p.n_in, p.n_out):
                joined[-1] = replace(joined[-1], stop=p.stop)
            else:
                joined.append(p)
        with suppress(ValueError):
            check_phases(joined)
            if state["cut"] == self.cut:
                self.phases = joined
                return
        self.phases, self.first_step, self.tokens_before = future, step, read

    def tokens_at(self, step):
        """Tokens of text read before step number `step`, over all ranks."""
        last = self.phases[-1]
        read = sum(max(0, min(step, p.stop) - p.start) * p.n_in for p in self.phases)
        return (
            self.tokens_before
            + (read + max(0, step - last.stop) * last.n_in) * self.n_rows * self.block_size
        )

    def read(self, step):
        """The rows of this process in step number `step`: (rows, L*n_in + n_out) int32. The last n_out tokens
        of a row are only a target; some other row has them as input."""
        phase = phase_at(self.phases, step)
        n = self.block_size * phase.n_in + phase.n_out
        out = torch.empty(
            len(self.rows), n, dtype=torch.int32, pin_memory=self.device.startswith("cuda")
        )
        for row, (corpus, start) in zip(out.numpy(), self._places(phase, step)):
            row[:] = self.tokens[corpus][start : start + n]
        return out

    def _places(self, phase, step):
        """[(corpus, start)] of the rows of this process. They are computed for AT_ONCE steps together, since
        calls of numpy cost more than the numbers in them."""
        block = (step - phase.start) // AT_ONCE
        key, places = self.known
        if key != (phase, block):
            p = self.phases.index(phase)
            steps = np.arange(block * AT_ONCE, (block + 1) * AT_ONCE)[
                :, None
            ]  # since the phase began
            before = self.rows_before[p]
            rows = (
                before + steps * self.n_rows + np.asarray(self.rows, np.int64)
            ).ravel()  # (m,) in the run
            corpora = self.pattern.corpus_of(rows)  # (m,)
            starts = np.empty_like(rows)
            for i, order in enumerate(self.orders):
                here = np.flatnonzero(corpora == i)
                if len(here):  # numbers of the rows among those of that corpus in the phase
                    numbers = self.pattern.rows_before(rows[here], i) - self.pattern.rows_before(
                        before, i
                    )
                    starts[here] = order.starts(p, numbers)
            places = list(zip(corpora.tolist(), starts.tolist()))
            self.known = (phase, block), places
        first = (step - phase.start) % AT_ONCE * len(self.rows)
        return places[first : first + len(self.rows)]

    def batch(self, step):
        """The rows of `step` on the device, (rows, L*n_in + n_out), while a thread reads those of the next
        step."""
        key, ahead = self.ahead
        rows = ahead.result() if key == step else self.read(step)
        self.ahead = step + 1, self.worker.submit(self.read, step + 1)
        return rows.to(self.device, non_blocking=True)


def validation_rows(tokens, positions, block_size):
    """Fixed rows of L+1 tokens, evenly spaced over the validation split, of at most so many positions in all,
    and never more than it has: (n, L+1) int32. Raises UserError if it is shorter than a row."""
    if len(tokens) <= block_size:
        raise UserError(
            f"block_size {block_size} is longer than the {len(tokens)} validation tokens"
        )
    n_rows = max(1, min(positions, len(tokens)) // block_size)
    starts = np.linspace(0, len(tokens) - block_size - 1, n_rows).astype(np.int64)
    return torch.from_numpy(
        np.stack([tokens[i : i + block_size + 1] for i in starts]).astype(np.int32)
    )
