"""dataloader.py on a corpus whose tokens are their own positions, so what was read is known exactly."""
import json

import numpy as np
import pytest
import torch

from conftest import write_corpus
from dataloader import TokenStream, load_meta, load_tokens, validation_rows

N, R, L, S = 1000, 6, 4, 3  # runs of 12 tokens: 83 of them, with 3 more tokens for the last target; 13 for each reader


def stream(rows=range(R), n=N, seed=5):
    return TokenStream(np.arange(n, dtype=np.uint16), L, S, R, rows, seed)


def text_of(reader, epochs=3, seed=5):
    """The tokens that a reader goes through, written down as plain loops."""
    return [token for epoch in range(epochs) for run in np.random.default_rng([seed, epoch]).permutation(83)[13 * reader:][:13]
            for token in range(12 * run, 12 * run + 12)]


def test_stream_equals_a_plain_loop():
    """A reader goes on where it was, each row ends with one bag that is only a target, a new epoch has a new order."""
    s, cursor, at = stream(), 0, 0
    texts = [text_of(reader) for reader in range(R)]
    for bag_size in [3] * 15 + [1] * 30:
        rows = s.read(cursor, bag_size)
        for reader in range(R):
            start = texts[reader][at]
            assert rows[reader].tolist() == list(range(start, start + (L + 1) * bag_size))
        at += L * bag_size
        cursor += s.step_tokens(bag_size)
    assert cursor == R * at and at > 13 * 12  # an epoch and more


def test_recovery_goes_on_at_the_token_after_superposition():
    """Trap 9: no replay, no gap. Whatever the step of the switch, the inputs of a reader are its text in order."""
    for switch in range(5):
        s, cursor, inputs = stream(), 0, [[] for _ in range(R)]
        for bag_size in [3] * switch + [1] * 9:
            for reader, row in enumerate(s.batch(cursor, bag_size, 1)):
                inputs[reader] += row[:L * bag_size].tolist()
            cursor += s.step_tokens(bag_size)
        assert inputs == [text_of(reader)[:len(inputs[reader])] for reader in range(R)]


def test_no_token_is_read_twice_within_an_epoch():
    s, cursor, read = stream(n=6 * 168 + 3), 0, []
    for bag_size in [3] * 10 + [1] * 12:  # 6 readers x 168 tokens
        read += s.read(cursor, bag_size)[:, :L * bag_size].flatten().tolist()
        cursor += s.step_tokens(bag_size)
    assert s.epoch(cursor) == 1 and sorted(read) == list(range(6 * 168))


def test_order_is_the_seeds():
    assert torch.equal(stream().read(0, 3), stream().read(0, 3))
    assert not torch.equal(stream().read(0, 3), stream(seed=6).read(0, 3))
    assert not torch.equal(stream().read(0, 3), stream().read(13 * 12 * R, 3))  # the next epoch


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_out_the_rows_of_one_batch(ranks):
    """Trap 12: what is trained on does not depend on how many ranks there are."""
    parts = [stream(range(i * R // ranks, (i + 1) * R // ranks)) for i in range(ranks)]
    for cursor, bag_size in ((0, 3), (72, 3), (144, 1), (6 * 164, 1)):
        assert torch.equal(torch.cat([p.batch(cursor, bag_size, 1) for p in parts]), stream().read(cursor, bag_size))


def test_rows_read_ahead_are_the_rows_read_at_once():
    s, direct, cursor = stream(), stream(), 0
    phases = [3, 3, 1, 1, 1]
    for bag_size, following in zip(phases, phases[1:] + [1]):
        assert torch.equal(s.batch(cursor, bag_size, following), direct.read(cursor, bag_size))
        cursor += s.step_tokens(bag_size)
    assert torch.equal(s.batch(0, 3, 3), direct.read(0, 3))  # not what was read ahead
    assert torch.equal(s.batch(s.step_tokens(3), 1, 1), direct.read(s.step_tokens(3), 1))  # nor here: another bag size


def test_validation_rows_are_fixed_and_evenly_spaced():
    rows = validation_rows(np.arange(100, dtype=np.uint16), 5, 9)
    assert rows.dtype == torch.int32
    assert rows.tolist() == [list(range(i, i + 10)) for i in (0, 22, 45, 67, 90)]


def test_corpus_is_read_back(tmp_path):
    folder = write_corpus(tmp_path / "x", range(50), range(7), 50)
    assert load_tokens(folder, "train").tolist() == list(range(50)) and load_tokens(folder, "val").tolist() == list(range(7))
    with pytest.raises(ValueError):
        load_tokens(folder, "train")[0] = 1  # the corpus cannot be damaged by its reader


def break_meta(folder):
    (folder / "meta.json").write_text("{")


def shorten(folder):
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-2])


def lose_a_key(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != "dtype"}))


@pytest.mark.parametrize("damage, message", [
    (break_meta, "no prepared corpus"), (lambda f: (f / "meta.json").unlink(), "prepare"), (shorten, "holds 49 tokens"),
    (lambda f: (f / "train.bin").unlink(), "cannot read .*train.bin"), (lose_a_key, "no prepared corpus")])
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
