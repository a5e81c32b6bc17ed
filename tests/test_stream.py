"""stream.py on a corpus whose tokens are their own positions, so what was read is known exactly."""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import torch

from nanotst import UserError
from nanotst.stream import TokenStream, permute, validation_rows
from tst import Phase, bags_and_labels, phase_list

R, L = 6, 4  # rows of a batch, positions of a row
LISTS = {
    "ordinary": [Phase(0, 9, 1, 1)],
    "TST": [Phase(0, 5, 3, 3), Phase(5, 30, 1, 1)],
    "TST alone": [Phase(0, 40, 3, 3)],
    "switch in the second epoch": [Phase(0, 18, 3, 3), Phase(18, 90, 1, 1)],
    "input only": [Phase(0, 5, 3, 1), Phase(5, 30, 1, 1)],
    "output only": [Phase(0, 5, 1, 3), Phase(5, 30, 1, 1)],
    "stepping down": [Phase(0, 3, 8, 8), Phase(3, 5, 4, 4), Phase(5, 8, 2, 2), Phase(8, 30, 1, 1)],
}
lists = pytest.mark.parametrize("phases", LISTS.values(), ids=LISTS.keys())


def stream(phases, rows=range(R), n=1000, seed=5, **more):
    return TokenStream([(np.arange(n, dtype=np.uint32), 1)], L, phases, R, rows, seed, **more)


def phase_of(phases, step):
    return [p for p in phases if p.start <= step][-1]


# ---- the permutation


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 83, 1000, 4097])
def test_a_permutation_holds_every_number_once(n):
    for key in ((0,), (5, 1), (5, 2)):
        assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


def test_a_permutation_may_be_asked_for_any_part_and_is_its_keys():
    whole = permute(np.arange(1000), 1000, (7, 3))
    assert permute(np.array([999, 3, 3]), 1000, (7, 3)).tolist() == whole[[999, 3, 3]].tolist()
    assert (permute(np.arange(1000), 1000, (7, 4)) != whole).mean() > 0.98


def test_a_permutation_shuffles():
    """Against what chance would give: where a number goes is even over all places (chi-squared of 16 bins),
    and neighbours do not stay neighbours."""
    places = np.stack([permute(np.arange(64), 64, (key,)) for key in range(2000)])  # (2000, 64)
    for column in places.T:
        counts = np.bincount(column // 4, minlength=16)
        chi_squared = ((counts - 125) ** 2 / 125).sum()
        assert chi_squared < 50  # 15 degrees of freedom: chance exceeds 50 once in 10^5
    assert 0.02 < (np.abs(np.diff(places, axis=1)) == 1).mean() < 0.04  # 1/32


# ---- what is read


def starts_by_hand(phases, n, seed=5):
    """Where every row starts, a list per step: the order written down as lists that are shuffled, used up and
    cut."""
    run = L * phases[0].n_in
    n_runs = (n - max(p.n_out for p in phases)) // run

    def shuffled(items, epoch, p):
        return [items[i] for i in permute(np.arange(len(items)), len(items), (seed, 0, epoch, p))]

    def cut(rows, epoch, p):
        """Rows of phase p - 1 into those of phase p."""
        length, pieces = L * phases[p].n_in, phases[p - 1].n_in // phases[p].n_in
        return shuffled([row + i * length for row in rows for i in range(pieces)], epoch, p)

    epoch, p, steps = 0, 0, []
    left = shuffled([run * i for i in range(n_runs)], 0, 0)
    for step in range(phases[-1].stop):
        while step >= phases[p].stop:
            p += 1
            left = cut(left, epoch, p)
        rows = []
        while len(rows) < R:
            if not left:  # the next epoch, cut down from its runs to the rows of this phase
                epoch += 1
                left = shuffled([run * i for i in range(n_runs)], epoch, 0)
                for q in range(1, p + 1):
                    left = cut(left, epoch, q)
            rows.append(left.pop(0))
        steps.append(rows)
    return steps


@lists
@pytest.mark.parametrize("n", [1000, 403, 398])  # 398: 33 runs of 12, the last without 3 targets
def test_stream_equals_a_plain_loop(phases, n):
    """Nothing is replayed or left out, wherever the switches are, in later epochs too."""
    s = stream(phases, n=n)
    for step, starts in enumerate(starts_by_hand(phases, n)):
        p = phase_of(phases, step)
        assert s.batch(step).tolist() == [list(range(a, a + L * p.n_in + p.n_out)) for a in starts]


@lists
def test_every_token_is_read_once_in_an_epoch(phases):
    """The input of the positions, over a whole epoch and through all switches in it."""
    s, read, step = stream(phases), [], 0
    while len(read) < s.epoch_tokens:
        p = phase_of(phases, step)
        read += bags_and_labels(s.read(step), p.n_in, p.n_out)[0].flatten().tolist()
        step += 1
        assert s.tokens_at(step) == len(read)
    assert sorted(read[: s.epoch_tokens]) == list(range(s.epoch_tokens))
    # the last run alone is left out
    assert s.epoch_tokens >= 1000 - max(p.n_out for p in phases) - L * phases[0].n_in


@lists
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_out_the_rows_of_one_batch(phases, ranks):
    """What is trained on does not depend on how many ranks there are."""
    parts = [stream(phases, rows=range(i * R // ranks, (i + 1) * R // ranks)) for i in range(ranks)]
    for step in (0, 4, 5, 8, 29):
        assert torch.equal(torch.cat([p.batch(step) for p in parts]), stream(phases).read(step))


def test_rows_read_ahead_are_the_rows_read_at_once():
    s, direct = stream(LISTS["TST"]), stream(LISTS["TST"])
    for step in (3, 4, 5, 6, 3, 4, 20):  # in order, back, and far away: not what was read ahead
        assert torch.equal(s.batch(step), direct.read(step))


# ---- resuming


@lists
@pytest.mark.parametrize("step", [0, 4, 5, 6, 20])
def test_a_stream_continues_where_it_was(phases, step):
    before = stream(phases)
    after = stream(phases, state=before.state(), step=step)
    for i in range(step, step + 3):
        assert torch.equal(after.read(i), before.read(i))
    assert after.tokens_at(step) == before.tokens_at(step)


@pytest.mark.parametrize("step", [4, 5])
def test_a_later_switch_stays_in_the_same_epoch(step):
    """Superposition made longer on the way, also exactly at its old end: nothing is read twice or left."""
    short, long = [Phase(0, 5, 3, 3), Phase(5, 30, 1, 1)], [Phase(0, 8, 3, 3), Phase(8, 30, 1, 1)]
    s = stream(long, state=stream(short).state(), step=step)
    assert s.phases == long and s.first_step == 0
    read = [t for i in range(step) for t in stream(short).read(i)[:, : 3 * L].flatten().tolist()]
    while len(read) < s.epoch_tokens:
        p = phase_of(long, step)
        read += s.read(step)[:, : p.n_in * L].flatten().tolist()
        step += 1
    assert sorted(read[: s.epoch_tokens]) == list(range(s.epoch_tokens))


@pytest.mark.parametrize(
    "wanted, changes",
    [
        ([Phase(0, 30, 3, 3)], {}),  # bags after tokens: rows cannot be joined again
        (LISTS["TST"], {"seed": 6}),
    ],
)
def test_where_rows_are_cut_in_another_way_a_new_epoch_begins(wanted, changes):
    first = stream([Phase(0, 30, 1, 1)])
    second = stream(wanted, state=first.state(), step=10, **changes)
    assert second.tokens_at(10) == first.tokens_at(10) == 10 * R * L
    assert second.tokens_at(11) - second.tokens_at(10) == R * L * phase_of(wanted, 10).n_in
    shuffle = stream(wanted, **changes).read(0)
    assert not torch.equal(second.read(10), shuffle)  # one of its own
    again = stream(wanted, state=second.state(), step=12, **changes)
    assert torch.equal(again.read(12), second.read(12))


def test_a_finished_run_may_be_opened_and_made_longer():
    done = stream(LISTS["TST"])
    assert stream(LISTS["TST"], state=done.state(), step=30).tokens_at(30) == done.tokens_at(30)
    longer = stream([Phase(0, 5, 3, 3), Phase(5, 60, 1, 1)], state=done.state(), step=30)
    assert torch.equal(longer.read(29), done.read(29)) and longer.phases[-1].stop == 60


# ---- size


@pytest.mark.parametrize("n", [10**8, 10**10, 10**12])
def test_memory_does_not_grow_with_the_corpus(n):
    phases = phase_list(10**6, [8, 4], 0.5)
    tracemalloc.start()
    tokens = np.broadcast_to(np.uint16(0), n)  # takes no memory
    s = TokenStream([(tokens, 1)], 1024, phases, 64, range(64), 1)
    for step in (0, 300_000, 700_000):
        s.batch(step)
    s.worker.shutdown()
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 2**20  # and a batch of 64 x 1024 x 8 int32 lies in torch's memory
    starts = s.orders[0].starts(2, np.arange(9))
    assert starts.min() >= 0 and starts.max() < n


@pytest.mark.parametrize("n_in, n_out", [(100, 100), (10**18, 1), (1, 10**6)])
def test_a_corpus_too_short_is_one_line(n_in, n_out):
    with pytest.raises(UserError, match="corpus 1 of 1 has 1,000 tokens, too few for 6 rows"):
        stream([Phase(0, 9, n_in, n_out)])


def test_a_corpus_of_a_small_share_may_be_small():
    """Of 6 rows, 2 of 16 tokens are the second corpus's: 40 tokens hold them, and 20 do not."""
    shares = Fraction(3, 4), Fraction(1, 4)
    two = lambda n: [(np.arange(m), share) for m, share in zip((1000, n), shares)]
    assert TokenStream(two(40), 16, [Phase(0, 9, 1, 1)], 6, range(6)).orders[1].n_stretches == 2
    with pytest.raises(UserError, match="corpus 2 of 2 has 20 tokens, too few for 2 rows"):
        TokenStream(two(20), 16, [Phase(0, 9, 1, 1)], 6, range(6))


def test_an_epoch_of_a_mixture_ends_with_the_first_corpus_that_is_read():
    """1,000 and 400 tokens, in stretches of 4; three quarters of all rows are the first's."""
    sources = [(np.arange(1000), Fraction(3, 4)), (np.arange(400), Fraction(1, 4))]
    s = TokenStream(sources, 4, [Phase(0, 9, 1, 1)], 4, range(4))
    assert s.epoch_tokens == 996 * 4 // 3  # the second one would last for 396 * 4


def test_validation_rows_are_fixed_and_evenly_spaced():
    rows = validation_rows(np.arange(100, dtype=np.uint16), 50, 9)
    assert rows.dtype == torch.int32
    assert rows.tolist() == [list(range(i, i + 10)) for i in (0, 22, 45, 67, 90)]
