"""tools/compare.py, with a trainer whose losses are known in the place of train.py."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest

from nanotst import UserError
from nanotst.configurator import parse
from tools import compare, plot, runner, sweep

# A baseline of n steps ends at 5 - log2(n) / 4, TST where one of 1.6 times its steps does; seeds 1, 2, 3 end
# 0.01 below, at and above that.
STUB = """
import json, math, os, sys

class Config:
    out_dir: str = "out"
    threads: int = 0
    seed: int = 1337
    bag_size: int = 1
    superposition_ratio: float = 0.25
    learning_rate: float = 0.01
    max_steps: int = 400
    superposition: str = "full"

given = dict(arg[2:].partition("=")[::2] for arg in sys.argv[1:])
steps, seed, s = int(given.get("max_steps", 400)), int(given["seed"]), int(given["bag_size"])
with open(given["out_dir"] + "/metrics.jsonl", "w") as f:
    for step in (steps // 2, steps):
        loss = 5 - math.log2(step * (1.6 if s > 1 else 1)) / 4 + 0.01 * (seed - 2)
        tokens = step + 0.25 * steps * (s - 1) * ("superposition" not in given)
        row = dict(step=step, bag_size=s if step <= steps // 4 else 1, loss=loss, val_loss=loss)
        f.write(json.dumps(row | dict(positions=step, data_tokens=tokens, flops=step * 1e9)) + chr(10))
open(given["out_dir"] + "/rate", "w").write(given.get("learning_rate", ""))
"""


@pytest.fixture
def compared(tmp_path):
    """compared("--key=value", ...) -> the folder it leaves."""
    trainer = tmp_path / "stub.py"
    trainer.write_text(STUB)

    def start(*arguments):
        argv = ["--bag_size=4", "--plot=no", f"--out_dir={tmp_path}/out", *arguments]
        compare.main(parse(compare.Config, runner.places(argv, compare.Config)), trainer)
        return tmp_path / "out"

    return start


def names(folder):
    return sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))


def lines(text):
    """{first words: the other cells} of the table in a text."""
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line[:1] == "|"
    ]
    return {row[0]: row[1:] for row in rows}


def test_three_comparisons_of_known_runs(compared, capsys):
    out = compared("--seeds=1,2,3", "--lengths=1,1.5,2")
    printed = capsys.readouterr().out
    # 400 steps: TST reads 1 + 0.25 * 3 = 1.75 tokens a position, so the baseline for equal data takes 700
    expected = [
        f"s1_max_steps={steps}_seed{i}" for steps in (400, 600, 700, 800) for i in (1, 2, 3)
    ]
    assert names(out) == sorted(expected + [f"s4_r0.25_max_steps=400_seed{i}" for i in (1, 2, 3)])
    loss = lambda steps: 5 - np.log2(steps) / 4
    table = lines(printed)
    assert table["TST, s 4, r 0.25"] == ["400", "1x", "1x", f"{loss(640):.4f} ± 0.0100 (3)", ""]
    higher = loss(400) - loss(640)
    assert table["baseline, equal FLOPs"] == [
        "400",
        "1x",
        "0.571x",
        f"{loss(400):.4f} ± 0.0100 (3)",
        f"-{higher:.4f}",
    ]
    assert table["baseline, equal data"][:3] == ["700", "1.75x", "1x"] and len(table) == 6
    assert f"Equal FLOPs: TST minus baseline -{higher:.4f} (95 % -0.1" in printed
    assert "Equal loss: a baseline needs 1.60 times the FLOPs of TST (95 % 1." in printed
    data = loss(640) - loss(700)
    assert f"Equal data: TST minus baseline +{data:.4f} (95 % +0.0" in printed
    assert "which takes 1.75 times the FLOPs." in printed
    assert "Learning rate: TST 0.01, baseline 0.01." in printed
    assert printed.split("\nwrote")[0].strip().splitlines()[-1] in (out / "table.md").read_text()
    with open(out / "runs.csv", newline="") as f:
        assert [row["max_steps"] for row in csv.DictReader(f)] == ["400"] * 6 + ["600"] * 3 + [
            "700"
        ] * 3 + ["800"] * 3


def test_more_seeds_and_lengths_only_add_runs(compared, capsys):
    out = compared("--seeds=1", "--lengths=1,2")
    first = {name: (out / name / "metrics.jsonl").stat().st_mtime_ns for name in names(out)}
    printed = capsys.readouterr().out
    assert (
        "(no interval: one seed of TST and of each baseline)" in printed and "95 %" not in printed
    )
    compared("--seeds=1,2", "--lengths=1,1.5,2")
    assert len(names(out)) == 2 * 5
    assert all(
        (out / name / "metrics.jsonl").stat().st_mtime_ns == time for name, time in first.items()
    )


def test_the_baseline_has_its_own_rate(compared, capsys):
    out = compared("--seeds=1", "--learning_rate=0.02", "--baseline_learning_rate=0.03")
    rates = {name: (out / name / "rate").read_text() for name in names(out)}
    assert {rate for name, rate in rates.items() if name.startswith("s1")} == {"0.03"}
    assert rates["s4_r0.25_max_steps=400_seed1"] == "0.02"
    assert "Learning rate: TST 0.02, baseline 0.03." in capsys.readouterr().out


def test_tst_without_more_data_has_the_baseline_of_equal_flops_for_equal_data(compared, capsys):
    out = compared("--seeds=1", "--superposition=output")
    assert not any("700" in name for name in names(out))
    assert "baseline, equal FLOPs, equal data" in lines(capsys.readouterr().out)
    assert not any("equal data" in key for key in lines(printed_without(compared, capsys)))


def printed_without(compared, capsys):
    compared("--seeds=1", "--superposition=output", "--equal_data=no")
    return capsys.readouterr().out


def test_beyond_the_longest_baseline_there_is_only_a_bound(compared, capsys):
    compared("--seeds=1,2", "--lengths=1,1.25", "--equal_data=no")
    assert "needs more than 1.25 times the FLOPs of TST" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bag_size=1"], "no superposition to compare"),
        (["--learning_rate=0.1,0.2"], "--learning_rate takes one value here"),
        (["--seed=1"], "give --seeds, not --seed"),
        (["--seeds=1,x"], "--seeds takes numbers between commas, got '1,x'"),
        (["--lengths=2"], "--lengths needs 1, for equal FLOPs, and another"),
        (["--lengths=1"], "and another, for equal loss; got 1"),
        (["--lengths=1,1.008"], "more than 1 % apart; of 400 steps 1,1.008 are \\[400, 403\\]"),
        (["--lengths=1,1.0001"], "more than 1 % apart"),
        (["--lengths=1,inf"], "finite numbers that make a step or more, got 1,inf"),
        (["--lengths=1,nan"], "finite numbers that make a step or more"),
        (["--lengths=1,0.001"], "finite numbers that make a step or more"),
        (["--lengths=-1,1"], "finite numbers that make a step or more"),
        (["--train=no"], "no run of TST is done"),
    ],
)
def test_what_cannot_work_is_one_line(compared, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        compared(*arguments)
    assert not names(tmp_path / "out")


def test_a_failed_seed_is_left_out_and_said(compared, tmp_path, capsys):
    stub = tmp_path / "stub.py"
    stub.write_text(
        STUB.replace("with open", "if (s, seed) == (4, 2): sys.exit('diverged')\nwith open")
    )
    with pytest.raises(UserError, match="1 of \\d+ runs failed; the same command tries them again"):
        compared()
    assert lines(capsys.readouterr().out)["TST, s 4, r 0.25"][3].endswith("(2 of 3)")


def failing(stub, condition):
    stub.write_text(STUB.replace("with open", f"if {condition}: sys.exit('diverged')\nwith open"))


def test_one_surviving_seed_of_a_side_makes_no_interval(compared, tmp_path, capsys):
    failing(tmp_path / "stub.py", "s == 4 and seed > 1")
    with pytest.raises(UserError, match="2 of 15 runs failed"):
        compared()
    printed = capsys.readouterr().out
    assert printed.count("(no interval: one seed of TST)") == 3 and "95 %" not in printed


def test_a_length_without_a_finished_run_takes_nothing_from_the_others(compared, tmp_path, capsys):
    failing(tmp_path / "stub.py", "steps == 800")
    with pytest.raises(UserError, match="3 of 9 runs failed"):
        compared("--lengths=1,2", "--equal_data=no", "--plot")
    printed = capsys.readouterr().out
    assert lines(printed)["baseline"] == ["800", "-", "-", sweep.Group({}, [], 3).text(), ""]
    assert f"Equal FLOPs: TST minus baseline -{np.log2(1.6) / 4:.4f} (95 % " in printed
    assert "needs more than 1.00 times the FLOPs of TST" in printed
    assert {path.name for path in (tmp_path / "out").glob("*.*")} >= {
        "table.md",
        "runs.csv",
        "compare.png",
    }


def test_the_baseline_for_equal_data_may_be_one_that_is_there(compared, capsys):
    """TST's data takes 700 steps, and 705 are less than 1 % more."""
    out = compared("--seeds=1", "--lengths=1,1.7625")
    assert "baseline, equal data" in lines(capsys.readouterr().out)
    assert not any("700" in name for name in names(out))


def sides(tst, baselines):
    """Sides with these final losses, {steps: losses}, and FLOPs in proportion to steps."""

    def side(steps, losses):
        losses = np.array(losses, float)
        group = SimpleNamespace(mean=losses.mean())
        return SimpleNamespace(losses=losses, group=group, steps=steps, of=lambda key: 1e9 * steps)

    return side(100, tst), {steps: side(steps, losses) for steps, losses in baselines.items()}


def test_intervals_are_those_of_students_t():
    tst, baselines = sides([1, 2, 3], {100: [11, 12, 13], 200: [5, 6, 7]})
    half = lambda draws: np.subtract(*np.quantile(draws, (0.975, 0.025))) / 2
    (own,) = compare.possible_means([tst], np.random.default_rng(0))
    assert half(own) == pytest.approx(4.303 / np.sqrt(3), rel=0.02)  # two degrees of freedom
    first, second = compare.possible_means(list(baselines.values()), np.random.default_rng(0))
    assert half(first) == pytest.approx(
        2.776 / np.sqrt(3), rel=0.02
    )  # four, for both lengths together
    assert half(second) == pytest.approx(2.776 / np.sqrt(3), rel=0.02)
    assert (np.median(own), np.median(first), np.median(second)) == pytest.approx(
        (2, 12, 6), abs=0.05
    )


def test_intervals_shrink_with_the_spread_and_hold_the_value():
    three = lambda mean, d: [mean - d, mean, mean + d]
    runs = lambda d: sides(three(3, d), {100: three(3.2, d), 200: three(2.8, d)})
    wide, narrow = (compare.results_of(*runs(d))[1] for d in (0.02, 0.002))
    assert (wide.value, narrow.value) == pytest.approx((np.sqrt(2), np.sqrt(2)))
    assert wide.low < narrow.low < wide.value < narrow.high < wide.high
    exact = compare.results_of(*sides([3.0], {100: [3.2], 200: [2.8]}))[1]
    assert exact.low == exact.high == pytest.approx(np.sqrt(2))
    _, alone = compare.results_of(*sides([3.0], {100: three(3.2, 0.02), 200: three(2.8, 0.02)}))
    assert alone.low == alone.high  # fewer seeds never give a narrower interval, but none


def test_factors_are_the_speed_ups_of_tools_plot():
    rng, flops = np.random.default_rng(0), np.array([1.0, 1.5, 2.0])
    ends, own = 3 + 0.1 * rng.standard_normal((3, 200)), 3 + 0.1 * rng.standard_normal(200)
    ends[1, 0] = ends[0, 0] = own[0]
    row = lambda flops, loss: [dict(step=1, flops=flops, val_loss=loss)]
    for loss, losses, found in zip(own, ends.T, compare.factors(own, ends, flops), strict=True):
        relation, factor = plot.speedup(row(1, loss), [row(*pair) for pair in zip(flops, losses)])
        assert found == pytest.approx({">": np.inf, "<": 0}.get(relation, factor))


def test_picture(compared, monkeypatch):
    figures, save = [], compare.save_picture
    monkeypatch.setattr(compare, "save_picture", lambda *to: (figures.append(to[0]), save(*to)))
    out = compared("--plot")
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    left, middle, right = figures[0].axes
    loss, tst = lambda steps: 5 - np.log2(steps) / 4, "TST, s 4, r 0.25"

    assert [ax.get_title() for ax in (left, middle, right)] == [
        "Equal FLOPs",
        "Equal loss",
        "Equal data",
    ]
    for ax, expected in [
        (left, {tst: ([0.5, 1], [320, 640]), "baseline": ([0.5, 1], [200, 400])}),
        (right, {tst: ([500 / 700, 1], [320, 640]), "baseline": ([0.5, 1], [350, 700])}),
    ]:
        named = {line.get_label(): line for line in ax.get_lines() if line.get_label() in expected}
        for label, (x, steps) in expected.items():
            assert list(named[label].get_xdata()) == pytest.approx(x)
            assert list(named[label].get_ydata()) == pytest.approx([loss(n) for n in steps])
            assert named[label].get_color() == compare.COLORS[label == tst]
        low, high = ax.get_ylim()
        assert low < loss(700) and loss(400) < high
        names = [text.get_text() for text in ax.get_legend().get_texts()]
        assert names == [f"{tst} (3 seeds)", "baseline (3 seeds)"]

    ends = {tuple(line.get_xdata()): list(line.get_ydata()) for line in middle.get_lines()}
    lengths = (1.0, 1.5, 1.75, 2.0)
    assert ends[lengths] == pytest.approx([loss(400 * length) for length in lengths])
    assert middle.get_xscale() == "log" and list(middle.get_xticks()) == list(lengths)
    assert [text.get_text() for text in middle.get_xticklabels()] == ["1", "1.5", "1.75", "2"]
    arrow, said = middle.texts  # from where TST ends to where a baseline ends as low
    assert (*arrow.xyann, *arrow.xy) == pytest.approx((1, loss(640), 1.6, loss(640)), rel=1e-3)
    assert said.get_text() == "1.60x"
    assert (
        json.loads((out / "s1_max_steps=600_seed1" / "sweep.json").read_text())["max_steps"] == 600
    )
