"""tools/fit_mi.py: the estimate against a chain whose information is known, and the fit of the curve."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

import train
from nanotst import UserError
from tools import fit_mi


def zipf(vocab_size, group=10):
    """Ids in groups of equal frequency."""
    p = np.repeat(1 / np.arange(1, vocab_size // group + 1), group)
    return p / p.sum()


def chain(n, stay, p, rng, group=10):
    """A Markov chain in ten blocks: with probability `stay` the next token of the ring of its group, else a
    fresh one from p. With rings of one token it repeats itself."""
    fresh = rng.choice(len(p), size=n, p=p)
    renewed = rng.random(n) >= stay
    renewed[0] = True
    since = np.maximum.accumulate(np.where(renewed, np.arange(n), 0))
    tokens = fresh[since] // group * group + (fresh[since] + np.arange(n) - since) % group
    return tokens.reshape(10, -1)


def known_information(d, stay, p):
    """Of that chain: d tokens later comes the one that must, with probability stay^d, else any, as in p."""
    same = stay**d
    follows = p * (same + (1 - same) * p)  # of each token and the one that must follow
    other = (1 - same) * (1 - (p**2).sum())  # all other pairs together
    return (follows * np.log(same / p + 1 - same)).sum() + other * math.log(1 - same)


# from many pairs for each cell (a table) to ninety cells for each pair (sorting), and one that repeats itself
@pytest.mark.parametrize(
    "n_chains, n, vocab_size, stay, group, within",
    [(40, 2_000, 20, 0.7, 10, 0.015), (1, 100_000, 300, 0.7, 10, 0.04), (1, 100_000, 3000, 0.7, 10, 0.19),
     (1, 100_000, 300, 0.4, 1, 0.1)],
)  # fmt: skip
def test_correction_is_nearer_to_the_known_information(
    n_chains, n, vocab_size, stay, group, within
):
    p, distances, found = zipf(vocab_size, group), (1, 2, 4, 8, 16), []
    for seed in range(n_chains):
        tokens = chain(n, stay, p, np.random.default_rng(seed), group)
        found.append(fit_mi.mutual_information(tokens, vocab_size, distances))
    known = [known_information(d, stay, p) for d in distances]
    corrected, plain = abs(np.mean(found, axis=0) - known)
    assert (corrected < within).all() and (corrected < plain / 3).all()


@pytest.mark.parametrize("vocab_size, within", [(2, 1e-4), (256, 0.01)])
def test_kinds_of_text_keep_their_information(vocab_size, within):
    """Two halves without a token in common: each token tells the others' kind, log 2, at any distance."""
    rng, half = np.random.default_rng(0), vocab_size // 2
    tokens = np.concatenate([rng.integers(0, half, 50_000), rng.integers(half, vocab_size, 50_000)])
    corrected, _ = fit_mi.mutual_information(tokens.reshape(10, -1), vocab_size, (1, 4, 16))
    assert abs(corrected - math.log(2)).max() < within


def test_independent_tokens_share_nothing_and_few_kinds_of_pairs_are_left_as_counted():
    tokens = np.random.default_rng(0).choice(500, size=(10, 5_000), p=zipf(500))
    corrected, plain = fit_mi.mutual_information(tokens, 500, (1, 5))
    assert (plain > 0.3).all() and abs(corrected).max() < 0.01
    for V in (1, 2, 3):  # the first correction takes away next to nothing, or less
        tokens = np.random.default_rng(0).integers(0, V, (10, 1_000))
        corrected, plain = fit_mi.mutual_information(tokens, V, (1, 2))
        assert abs(corrected - plain).max() < 1e-3


def test_pairs_do_not_reach_from_one_block_into_the_next():
    """Ten blocks that hold one token each: a pair across them would be an eleventh."""
    blocks = np.repeat(np.arange(10), 50).reshape(10, -1)
    assert fit_mi.mutual_information(blocks, 10, (7,))[1] == pytest.approx(math.log(10))


@pytest.mark.parametrize("c0, a, k", [(0.0, 1.35, -1.25), (3.63, 1.35, -1.25), (0.1, 2.0, -3.0)])
def test_fit_finds_an_exact_curve(c0, a, k):
    d = np.arange(1, 33)
    assert fit_mi.fit(d, c0 + a * d**k) == pytest.approx([c0, a, k], abs=1e-3)


def test_fit_is_the_least_squares_and_c0_never_negative():
    d, rng = np.arange(1, 25), np.random.default_rng(3)
    y = 0.05 + 0.8 * d**-1.1 + rng.normal(0, 0.01, len(d))
    best = np.array(fit_mi.fit(d, y))
    residual = lambda fit: ((fit[0] + fit[1] * d ** fit[2] - y) ** 2).sum()
    steps = [*np.eye(3) / 500, *-np.eye(3) / 500]
    assert all(residual(best) < residual(best + step) for step in steps)
    assert fit_mi.fit(d, y - 0.2)[0] == 0


def test_the_command_writes_what_train_reads(monkeypatch, tmp_path, capsys):
    tokens = chain(60_000, 0.7, zipf(50), np.random.default_rng(0)).ravel().astype(np.uint8)
    made = SimpleNamespace(train=tokens, folder="/chain", vocab_size=50, fingerprint="f00")
    monkeypatch.setattr(fit_mi, "open_corpus", lambda name: made)
    out = tmp_path / "made" / "fitted.json"
    fit_mi.main(fit_mi.Config(out=str(out), max_distance=8))
    result = json.loads(out.read_text())
    assert train.read_fit(str(out)) == {key: result[key] for key in ("c0", "a", "k")}
    assert (result["dataset"], result["fingerprint"], result["tokens"]) == ("/chain", "f00", 60_000)
    assert result["distances"] == list(range(1, 9)) and len(result["information"]) == 8
    assert f"--fitted={out}" in capsys.readouterr().out
    for wrong in (dict(tokens=2_000), dict(max_distance=3)):
        with pytest.raises(UserError, match="must be at least 4 and at most a tenth"):
            fit_mi.main(fit_mi.Config(out=str(out), **wrong))
