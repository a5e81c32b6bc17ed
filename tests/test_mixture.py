"""mixture.py, and mixtures in the stream."""

import json
from fractions import Fraction

import numpy as np
import pytest
from conftest import write_corpus

from nanotst import UserError
from nanotst.mixture import Pattern, open_mixture
from nanotst.stream import TokenStream
from tst import Phase

HALVES = [Fraction(1, 2), Fraction(1, 2)]
UNEVEN = [Fraction(7, 10), Fraction(1, 4), Fraction(1, 20)]
MANY = [Fraction(n, 129) for n in (40, 1, 1, 40, 3, 1, 3, 40)]


@pytest.mark.parametrize("shares", [[Fraction(1)], HALVES, UNEVEN, MANY])
def test_shares_hold_over_any_stretch(shares):
    pattern, n = Pattern(shares), 400
    corpora = pattern.corpus[np.arange(n) % pattern.n]
    for i, share in enumerate(shares):
        count = np.concatenate([[0], np.cumsum(corpora == i)])  # its rows before each row
        assert (pattern.rows_before(np.arange(n + 1), i) == count).all()
        assert abs(count - np.arange(n + 1) * float(share)).max() < 1


def test_each_row_is_of_one_corpus_and_each_corpus_is_read_once(tmp_path):
    """Three corpora with distinct tokens, through a switch: an epoch of each reads every token once."""
    tokens = np.arange(3000), np.arange(1100) + 10_000, np.arange(400) + 20_000
    phases = [Phase(0, 7, 3, 3), Phase(7, 90, 1, 1)]
    s = TokenStream(list(zip(tokens, UNEVEN)), 4, phases, 20, range(20), seed=3)
    read = [[], [], []]
    for step in range(60):
        n_in = 3 if step < 7 else 1
        rows = s.read(step).numpy()
        assert (rows // 10_000 == rows[:, :1] // 10_000).all()
        assert np.bincount(rows[:, 0] // 10_000).tolist() == [14, 5, 1]  # of 20, in every step
        for row in rows:
            read[row[0] // 10_000] += (row[: 4 * n_in] % 10_000).tolist()
    for tokens, order in zip(read, s.orders):
        n = min(order.epoch_tokens, len(tokens))
        assert len(set(tokens[:n])) == n  # nothing twice in an epoch
    assert sorted(read[0][: s.orders[0].epoch_tokens]) == list(range(s.orders[0].epoch_tokens))


def test_ranks_and_resuming_change_nothing():
    sources = [(np.arange(2000), HALVES[0]), (np.arange(2000) + 10_000, HALVES[1])]
    phases = [Phase(0, 3, 2, 2), Phase(3, 30, 1, 1)]
    whole = TokenStream(sources, 4, phases, 6, range(6), seed=3)
    parts = [TokenStream(sources, 4, phases, 6, range(i, i + 2), seed=3) for i in (0, 2, 4)]
    later = TokenStream(sources, 4, phases, 6, range(6), seed=3, state=whole.state(), step=9)
    for step in (0, 2, 3, 9, 10):
        assert np.array_equal(np.concatenate([p.read(step) for p in parts]), whole.read(step))
        assert np.array_equal(later.read(step), whole.read(step))


def test_corpora_of_one_length_have_orders_of_their_own():
    sources = [(np.arange(4000), share) for share in HALVES]
    one, other = TokenStream(sources, 4, [Phase(0, 9, 1, 1)], 6, range(6)).orders
    assert not np.array_equal(one.starts(0, np.arange(50)), other.starts(0, np.arange(50)))


@pytest.fixture
def corpora(tmp_path):
    rng = np.random.default_rng(0)
    changes = dict(a={"bytes_per_token": 4.0}, b={}, c={"vocab_size": 60}, d={"separator": 3})
    for name, values in (changes | {name: {"encoding": None} for name in "ef"}).items():
        tokens = np.cumsum(rng.choice([1, 7, 20], 4500)) % 50
        write_corpus(tmp_path / name, tokens[:4000], tokens[4000:], 50)
        path = tmp_path / name / "meta.json"
        meta = json.loads(path.read_text()) | {"encoding": "toy", "source": [name]} | values
        path.write_text(json.dumps(meta))
    return {name: str(tmp_path / name) for name in "abcdef"}


@pytest.mark.parametrize(
    "spec, words",
    [
        ("{a}:0.5,{b}:0.4", "sum to 1, not 9/10"), ("{a}:1.0,{b}:0", "positive"),
        ("{a}:0.5,{b}", "NAME:SHARE"), ("{a},{b}", "NAME:SHARE"), ("{a}:1/2,{b}:1/0", "NAME:SHARE"),
        ("{a}:nan,{b}:0.5", "NAME:SHARE"),
        ("{a}:0.00001,{b}:0.99999", "at most four"), ("{a}:0.3333,{b}:0.3333", "sum to 1, not 3333/5000"),
        ("{a}:0.5,{e}:0.5", "vocabulary toy there, None here"), ("{e}:0.5,{f}:0.5", "name no encoding"),
        ("{a}:0.5,{d}:0.5", "separator None there, 3 here"), ("{a}:0.5,{c}:0.5", "vocab_size 50 there"),
        ("{b}:0.5,{a}:0.25,{d}:0.25", "separator None there"), ("{a}:0.5,no/such:0.5", "no prepared corpus"),
    ],
)  # fmt: skip
def test_mixtures_that_cannot_be_are_one_line(corpora, spec, words):
    with pytest.raises(UserError, match=words) as e:
        open_mixture(spec.format(**corpora))
    assert "\n" not in str(e.value)


def test_a_run_on_a_mixture(run, tiny, corpora, tmp_path, capsys):
    """Its validation loss is the weighted mean of what runs on its parts have for the same weights, and it
    names their sources. Another mixture of the same corpora is another corpus."""
    spec = "{a}:0.25,{b}:0.75".format(**corpora)
    knobs = dict(learning_rate=1e-30, max_steps=4, superposition_ratio=0.5)
    row = run(dataset=spec, **knobs)[-1]
    assert "corpus {a}: a\ncorpus {b}: b\n".format(**corpora) in capsys.readouterr().out
    for name in "ab":
        alone = run(dataset=corpora[name], out_dir=str(tmp_path / f"only_{name}"), **knobs)
        assert alone[-1]["val_loss"] == row[f"val_loss_{name}"]
    mean = 0.25 * row["val_loss_a"] + 0.75 * row["val_loss_b"]
    assert row["val_loss"] == pytest.approx(mean)
    data = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert [part["share"] for part in data["mixture"]] == ["1/4", "3/4"]
    assert data["bytes_per_token"] == 0.25 * 4 + 0.75 * 2
    assert data["source"] == ["a", "b"] and data["train_tokens"] == 8000
    with pytest.raises(UserError, match="does not hold the corpus"):
        run(dataset="{a}:0.5,{b}:0.5".format(**corpora), resume=True, **knobs)
    assert run(dataset=spec, resume=True, **knobs)[-1] == row
