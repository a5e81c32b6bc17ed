"""dataloader.py on a corpus whose tokens are their own positions, so what was read is known exactly."""

import json

import numpy as np
import pytest
import torch

from conftest import write_corpus
from dataloader import TokenStream, load_meta, load_tokens, validation_rows

N, R, L, S = (
    1000,
    6,
    4,
    3,
)  # runs of 12 tokens: 83 of them, with 3 more tokens for the last target; 78 in an epoch
EPOCH = 78 * 12


def stream(switch=5, rows=range(R), n=N, seed=5):
    """Superposition ends after step number `switch`."""
    return TokenStream(np.arange(n, dtype=np.uint16), L, S, switch, R, rows, seed)


def starts_by_hand(switch, seed=5):
    """Where every row starts, a list per step, for two epochs: the order written down as plain loops."""
    steps = []
    for epoch in range(2):
        runs = [12 * run for run in np.random.default_rng([seed, epoch]).permutation(83)[:78]]
        while runs and len(steps) < switch:  # superposition takes 6 runs
            steps.append(runs[:6])
            del runs[:6]
        rows = [run + offset for run in runs for offset in (0, 4, 8)]  # what it left, as rows of 4
        rows = list(np.random.default_rng([seed, epoch, 1]).permutation(rows))
        while rows:
            steps.append(rows[:6])
            del rows[:6]
    return steps


@pytest.mark.parametrize("switch", [0, 1, 5, 13, 20])
def test_stream_equals_a_plain_loop(switch):
    """Trap 9: no replay, no gap, wherever the switch is, in the second epoch too."""
    s, cursor = stream(switch), 0
    for step, starts in enumerate(starts_by_hand(switch)):
        bag_size = S if step < switch else 1
        rows = s.batch(cursor, bag_size, S if step + 1 < switch else 1)
        assert rows.tolist() == [list(range(start, start + (L + 1) * bag_size)) for start in starts]
        cursor += s.step_tokens(bag_size)
    assert cursor == 2 * EPOCH


@pytest.mark.parametrize("switch", [0, 4, 13])
def test_every_token_is_read_once_in_an_epoch(switch):
    s, cursor, read = stream(switch, n=EPOCH + 3), 0, []
    while cursor < EPOCH:
        bag_size = S if cursor < switch * R * L * S else 1
        read += s.read(cursor, bag_size)[:, : L * bag_size].flatten().tolist()
        cursor += s.step_tokens(bag_size)
    assert cursor == EPOCH and sorted(read) == list(range(EPOCH))


def test_order_is_the_seeds():
    assert torch.equal(stream().read(0, 3), stream().read(0, 3))
    assert not torch.equal(stream().read(0, 3), stream(seed=6).read(0, 3))
    assert not torch.equal(stream(0).read(0, 1), stream(0).read(EPOCH, 1))  # the next epoch


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_out_the_rows_of_one_batch(ranks):
    """Trap 12: what is trained on does not depend on how many ranks there are."""
    parts = [stream(rows=range(i * R // ranks, (i + 1) * R // ranks)) for i in range(ranks)]
    for cursor, bag_size in ((0, 3), (72, 3), (5 * 72, 1), (EPOCH, 1)):
        assert torch.equal(
            torch.cat([p.batch(cursor, bag_size, 1) for p in parts]), stream().read(cursor, bag_size)
        )


def test_rows_read_ahead_are_the_rows_read_at_once():
    s, direct, cursor = stream(2), stream(2), 0
    phases = [3, 3, 1, 1, 1]
    for bag_size, following in zip(phases, phases[1:] + [1]):
        assert torch.equal(s.batch(cursor, bag_size, following), direct.read(cursor, bag_size))
        cursor += s.step_tokens(bag_size)
    assert torch.equal(s.batch(0, 3, 3), direct.read(0, 3))  # not what was read ahead
    assert torch.equal(
        s.batch(s.step_tokens(3), 1, 1), direct.read(s.step_tokens(3), 1)
    )  # nor here: another bag size


def test_validation_rows_are_fixed_and_evenly_spaced():
    rows = validation_rows(np.arange(100, dtype=np.uint16), 5, 9)
    assert rows.dtype == torch.int32
    assert rows.tolist() == [list(range(i, i + 10)) for i in (0, 22, 45, 67, 90)]


def test_corpus_is_read_back(tmp_path):
    folder = write_corpus(tmp_path / "x", range(50), range(7), 50)
    assert load_tokens(folder, "train").tolist() == list(range(50)) and load_tokens(
        folder, "val"
    ).tolist() == list(range(7))
    with pytest.raises(ValueError):
        load_tokens(folder, "train")[0] = 1  # the corpus cannot be damaged by its reader


def break_meta(folder):
    (folder / "meta.json").write_text("{")


def shorten(folder):
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-2])


def lose_a_key(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != "dtype"}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (break_meta, "no prepared corpus"),
        (lambda f: (f / "meta.json").unlink(), "prepare"),
        (shorten, "holds 49 tokens"),
        (lambda f: (f / "train.bin").unlink(), "cannot read .*train.bin"),
        (lose_a_key, "no prepared corpus"),
    ],
)
def test_damaged_corpus_is_one_line(tmp_path, damage, message):
    folder = tmp_path / "x"
    write_corpus(folder, range(50), range(7), 50)
    damage(folder)
    with pytest.raises(SystemExit, match=message) as error:
        load_tokens(str(folder), "train")
    assert "\n" not in str(error.value)


def test_missing_corpus_names_the_script_that_makes_it(tmp_path):
    (tmp_path / "prepare.py").touch()
    with pytest.raises(SystemExit, match=f"run python {tmp_path}/prepare.py first"):
        load_meta(str(tmp_path))
