"""tools/fit_mi.py: the estimate against a chain whose information is known, and the fit of the curve."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import train
from nanotst import UserError
from tools import fit_mi

GROUP = 10  # neighbouring ids are equally frequent and follow each other in a ring


def chain(n, stay, p, rng, group=GROUP):
    """A Markov chain: with probability `stay` the next token of the ring, else a fresh one from p. With rings
    of one token it repeats itself."""
    fresh = rng.choice(len(p), size=n, p=p)
    renewed = rng.random(n) >= stay
    renewed[0] = True
    since = np.maximum.accumulate(np.where(renewed, np.arange(n), 0))
    return fresh[since] // group * group + (fresh[since] + np.arange(n) - since) % group


def known_information(d, stay, p):
    """Of that chain: d tokens on it is the one that must follow with probability stay^d, and any one
    otherwise. Both have the same p."""
    same = stay**d
    follows = p * (same + (1 - same) * p)  # of each token and the one that must follow
    other = (1 - same) * (1 - (p**2).sum())  # all other pairs together
    return (follows * np.log(same / p + 1 - same)).sum() + other * math.log(1 - same)


def zipf(vocab_size, group=GROUP):
    p = np.repeat(1 / np.arange(1, vocab_size // group + 1), group)
    return p / p.sum()


def parts_of(tokens):
    return tokens.reshape(fit_mi.BLOCKS, -1)


def test_closed_form_is_the_sum_over_the_joint_distribution():
    p, stay, d = zipf(6, 3), 0.6, 4
    ring = np.roll(np.eye(3), 1, axis=1)
    step = stay * np.kron(np.eye(2), ring) + (1 - stay) * p  # rows: from
    joint = p[:, None] * np.linalg.matrix_power(step, d)
    assert known_information(d, stay, p) == pytest.approx(
        (joint * np.log(joint / np.outer(p, p))).sum()
    )


def errors(n_chains, n, vocab_size, stay, distances, group=GROUP):
    """Of the corrected and of the plain estimate against the known information, means over some chains."""
    p, found = zipf(vocab_size, group), []
    for seed in range(n_chains):
        tokens = chain(n, stay, p, np.random.default_rng(seed), group)
        corrected, plain, _ = fit_mi.mutual_information(parts_of(tokens), vocab_size, distances)
        found.append((corrected[0], plain[0]))
    return abs(np.mean(found, axis=0) - [known_information(d, stay, p) for d in distances])


# from many pairs a cell (by table) to ninety cells a pair (by sorting)
@pytest.mark.parametrize(
    "n_chains, n, vocab_size, within",
    [(40, 2_000, 20, 0.015), (1, 100_000, 300, 0.04), (1, 100_000, 3000, 0.19)],
)
def test_correction_is_nearer_to_the_known_information_at_every_distance(
    n_chains, n, vocab_size, within
):
    corrected, plain = errors(n_chains, n, vocab_size, 0.7, (1, 2, 4, 8, 16))
    assert (corrected < within).all()
    assert (corrected < plain / 3).all()


def test_tokens_that_repeat_themselves_count_as_fewer_and_are_still_corrected():
    corrected, plain = errors(1, 100_000, 300, 0.4, (1, 2, 4, 8, 16), group=1)
    assert (corrected < plain / 3).all()
    assert (
        corrected[-1] < 0.01 < 0.3 < plain[-1]
    )  # shuffled tokens as the reference would leave most of it


@pytest.mark.parametrize("vocab_size, within", [(2, 1e-4), (20, 0.001), (256, 0.01)])
def test_kinds_of_text_one_after_another_keep_their_information(vocab_size, within):
    """Two halves without a token in common: each token tells the kind of the others, log 2, at any distance.
    Blocks beside each other are mostly of one kind: as pairs that share nothing they would not do."""
    rng, half = np.random.default_rng(0), vocab_size // 2
    tokens = np.concatenate([rng.integers(0, half, 50_000), rng.integers(half, vocab_size, 50_000)])
    corrected, plain, apart = fit_mi.mutual_information(parts_of(tokens), vocab_size, (1, 4, 16))
    assert abs(corrected[0] - math.log(2)).max() < within
    assert apart < plain[0].min() / 2
    order = np.random.default_rng(1).permutation(
        200
    )  # the same kinds as a mixture of short documents
    mixed = tokens.reshape(200, 500)[order].ravel()
    corrected, plain, _ = fit_mi.mutual_information(parts_of(mixed), vocab_size, (1,))
    assert (
        abs(corrected[0, 0] - math.log(2)) < within + 0.01
    )  # a few pairs cross into the next document


def test_the_second_correction_is_bounded_and_next_to_nothing_with_much_text():
    p = zipf(20)
    tokens = chain(1_000_000, 0.7, p, np.random.default_rng(0))
    corrected, plain, apart = fit_mi.mutual_information(parts_of(tokens), 20, (1, 8))
    taken = plain[0] - corrected[0]
    assert 0 < apart < 5e-4 and taken.min() >= 0 and taken.max() < 5e-4
    for vocab_size in (
        1,
        2,
    ):  # so few cells that the first correction can take away nothing, or less
        tokens = np.random.default_rng(0).integers(0, vocab_size, 10_000)
        corrected, plain, _ = fit_mi.mutual_information(parts_of(tokens), vocab_size, (1, 2, 3))
        assert abs(corrected - plain).max() < 1e-3


def test_pairs_far_apart_mix_all_kinds_and_keep_repetitions():
    parts = np.repeat(np.arange(fit_mi.BLOCKS), 6_400).reshape(
        fit_mi.BLOCKS, -1
    )  # one kind a block
    x, y, blocks = fit_mi.far_apart(parts)
    assert (x == blocks).all() and (np.bincount(x) == np.bincount(y)).all()
    met = (
        np.bincount(x * 10 + y, minlength=100) / fit_mi.SEGMENT
    )  # 10 segments of each pair of kinds
    assert met.sum() == 1000 and met.min() >= 1 and met.max() <= 22
    runs = np.arange(64_000).reshape(fit_mi.BLOCKS, -1)
    _, y, _ = fit_mi.far_apart(runs)
    assert (np.diff(y.reshape(-1, fit_mi.SEGMENT)) == 1).all()  # neighbours stay neighbours


def test_independent_tokens_share_nothing():
    tokens = np.random.default_rng(0).choice(500, size=50_000, p=zipf(500))
    corrected, plain, apart = fit_mi.mutual_information(parts_of(tokens), 500, (1, 5))
    assert plain[0] == pytest.approx(apart, abs=0.01) and (plain[0] > 0.3).all()
    assert abs(corrected[0]).max() < 0.01


def test_grassberger_is_unbiased_where_the_plain_entropy_is_not():
    rng, p = np.random.default_rng(0), zipf(200)
    counts = rng.multinomial(400, p, size=300)
    true = -(p * np.log(p)).sum()
    error = np.mean([fit_mi.entropy(c) for c in counts]) - true
    plain_error = np.mean([fit_mi.entropy(c, plain=True) for c in counts]) - true
    assert plain_error < -0.1 and abs(error) < abs(plain_error) / 5
    assert fit_mi.entropy(np.array([3, 3, 0]), plain=True) == pytest.approx(math.log(2))


def test_grassbergers_numbers():
    # G(n) = psi(n) + (-1)^n / 2 (psi((n+1)/2) - psi(n/2)); psi(1) = -gamma, psi(1/2) = -gamma - 2 log 2
    first = -np.euler_gamma - math.log(2)
    small = fit_mi.grassberger(np.arange(1, 6))
    assert small == pytest.approx(
        [first, first + 2, first + 2, first + 2 + 2 / 3, first + 2 + 2 / 3]
    )
    assert fit_mi.grassberger(np.array([100_000])) == pytest.approx(math.log(100_000), abs=1e-5)


def test_pairs_do_not_reach_from_one_block_into_the_next():
    """Blocks that hold one token each, another in every block: within a block a token tells nothing new."""
    parts = [np.full(50, b) for b in range(fit_mi.BLOCKS)]
    joint = fit_mi.count(np.arange(500) // 50, np.arange(500) // 50, 10)
    assert (joint == 50 * np.eye(10)).all()
    _, plain, _ = fit_mi.mutual_information(parts, 10, (7,))
    assert plain[0, 0] == pytest.approx(
        math.log(10)
    )  # 10 distinct pairs; pairs across blocks would add cells


def test_counting_by_sorting_is_counting_by_table(monkeypatch):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 30, 200) for _ in range(fit_mi.BLOCKS)]
    table = fit_mi.mutual_information(parts, 30, (1, 3))
    monkeypatch.setattr(fit_mi, "DENSE", 10)
    for a, b in zip(table, fit_mi.mutual_information(parts, 30, (1, 3))):
        assert a == pytest.approx(b, abs=1e-12)


@pytest.mark.parametrize(
    "c0, a, k", [(0.0, 1.35, -1.25), (3.63, 1.35, -1.25), (0.02, 0.5, -0.4), (0.1, 2.0, -3.0)]
)
def test_fit_finds_an_exact_curve(c0, a, k):
    d = np.arange(1, 33)
    assert fit_mi.fit(d, c0 + a * d**k) == pytest.approx([c0, a, k], abs=1e-5)


def test_fit_is_the_least_squares_and_c0_never_negative():
    d, rng = np.arange(1, 25), np.random.default_rng(3)
    y = 0.05 + 0.8 * d**-1.1 + rng.normal(0, 0.01, len(d))
    c0, a, k = fit_mi.fit(d, y)
    residual = lambda c0, a, k: ((c0 + a * d**k - y) ** 2).sum()
    for step in np.eye(3) * 1e-3:
        assert residual(c0, a, k) < min(
            residual(c0 + s * step[0], a + s * step[1], k + s * step[2]) for s in (-1, 1)
        )
    assert fit_mi.fit(d, y - 0.2)[0] == 0


def test_jackknife_is_the_standard_error_of_a_mean():
    blocks = np.random.default_rng(0).normal(size=fit_mi.BLOCKS)
    means = [blocks.mean(), *(np.delete(blocks, b).mean() for b in range(fit_mi.BLOCKS))]
    assert fit_mi.jackknife(np.array(means)) == pytest.approx(
        blocks.std(ddof=1) / math.sqrt(fit_mi.BLOCKS)
    )


def test_blocks_come_from_all_over_the_text():
    parts = fit_mi.text_blocks(np.arange(10_000), 1_000, 8)
    assert [len(part) for part in parts] == [100] * 10
    assert parts[0][0] == 0 and parts[-1][-1] == 9_999
    whole = fit_mi.text_blocks(np.arange(10_000), 10**9, 8)
    assert (np.concatenate(whole) == np.arange(10_000)).all()


@pytest.fixture
def on_a_chain(monkeypatch):
    tokens = chain(60_000, 0.7, zipf(50), np.random.default_rng(0)).astype(np.uint8)
    made = SimpleNamespace(
        train=tokens, vocab_size=50, folder="/somewhere/chain", fingerprint="f00"
    )
    monkeypatch.setattr(fit_mi, "open_corpus", lambda name: made)


def test_the_command_writes_what_train_reads(on_a_chain, tmp_path, capsys):
    out = tmp_path / "made" / "fitted.json"
    fit_mi.main(fit_mi.Config(out=str(out), max_distance=8))
    result = json.loads(out.read_text())
    assert train.read_fit(str(out)) == {key: result[key] for key in ("c0", "a", "k")}
    assert result["c0"] >= 0 and result["a"] > 0 > result["k"]
    assert (result["dataset"], result["fingerprint"], result["tokens"]) == ("chain", "f00", 60_000)
    assert result["distances"] == list(range(1, 9)) and len(result["information"]) == 8
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert f"--fitted={out}" in said
    # stay^d falls faster than any power: the best c0 is below its bound, however the text is cut
    assert result["c0"] == 0 and result["c0_interval"] is None
    assert (
        "c0 0.0000  (at its bound, without an interval)" in said and "held at its bound 0" in said
    )
    low, high = result["a_interval"]
    assert f"(95 % {low:.4f} to {high:.4f})" in said
    curve = [result["c0"] + result["a"] * d ** result["k"] for d in result["distances"]]
    assert (
        np.corrcoef(curve, result["information"])[0, 1] > 0.9
        and sorted(curve, reverse=True) == curve
    )


def test_without_matplotlib_the_file_is_there_all_the_same(on_a_chain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "f.json"
    with pytest.raises(UserError, match="needs the package matplotlib; --plot=no"):
        fit_mi.main(fit_mi.Config(out=str(out), max_distance=4))
    assert train.read_fit(str(out))


def test_intervals_cover_what_is_known(monkeypatch, tmp_path):
    """Of a chain in blocks of two kinds: c0 is the kind's, and what the chain itself tells falls with d."""
    distances, p = range(1, 7), zipf(10)
    known = [math.log(2) + known_information(d, 0.6, p) for d in distances]
    true, out, covered = fit_mi.fit(distances, known), tmp_path / "f.json", []
    assert true[0] > 0.4
    for seed in range(8):
        parts = parts_of(chain(20_000, 0.6, p, np.random.default_rng(seed)))
        tokens = (parts + 10 * (np.arange(fit_mi.BLOCKS) % 2)[:, None]).ravel()
        made = SimpleNamespace(train=tokens, vocab_size=20, folder="/chain", fingerprint="")
        monkeypatch.setattr(fit_mi, "open_corpus", lambda name, made=made: made)
        fit_mi.main(fit_mi.Config(out=str(out), max_distance=6, plot=False))
        result = json.loads(out.read_text())
        intervals = [result[f"{key}_interval"] for key in ("c0", "a", "k")]
        covered.append([low <= value <= high for value, (low, high) in zip(true, intervals)])
        assert max(high - low for low, high in intervals) < 0.4
    assert (np.sum(covered, axis=0) >= 6).all()


def test_too_little_text_is_said(on_a_chain, tmp_path):
    with pytest.raises(
        UserError, match="2,000 tokens are too few for distances up to 32: at least 3,200"
    ):
        fit_mi.main(fit_mi.Config(out=str(tmp_path / "f.json"), tokens=2_000))
    with pytest.raises(UserError, match="max_distance must be at least 4"):
        fit_mi.main(fit_mi.Config(out=str(tmp_path / "f.json"), max_distance=3))
