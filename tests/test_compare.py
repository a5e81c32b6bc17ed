"""tools/compare.py, with tests/stub_trainer.py in the place of train.py, and tools/intervals.py."""

import math

import pytest
import stub_trainer
from stub_trainer import end_of, lines, names

from nanotst import UserError
from nanotst.configurator import parse
from tools import compare, intervals, sweep
from tools.intervals import Interval

STEPS = 400  # TST reads 1 + 0.3 * 3 = 1.9 tokens per position: the data of 760 steps


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """compared("--key=value", ...) -> the folder it leaves."""
    monkeypatch.setattr(sweep, "TRAINER", stub_trainer.__file__)

    def start(*arguments):
        argv = ["--bag_size=4", f"--max_steps={STEPS}", "--learning_rate=0.01", "--plot=no"]
        argv += [f"--out_dir={tmp_path}/out", *arguments]
        compare.main(parse(compare.Config, sweep.as_positional(argv, compare.Config)))
        return tmp_path / "out"

    return start


def test_three_comparisons_of_known_runs(compared, monkeypatch, capsys):
    figures = []
    monkeypatch.setattr(sweep, "save_picture", lambda figure, path: figures.append(figure))
    out = compared("--seeds=1,2,3", "--lengths=1,1.5,2", "--plot")
    printed = capsys.readouterr().out
    runs = [f"s1_max_steps={steps}" for steps in (400, 600, 760, 800)] + ["s4_r0.3_max_steps=400"]
    assert names(out) == [f"{run}_seed{i}" for run in runs for i in (1, 2, 3)]
    _, *table = lines(printed)
    tst = end_of(STEPS, 2, s=4)
    loss, speedup = f"{tst:.4f} ± 0.0100 (3)", table[0][-1]
    assert table[0][:5] == ["TST", "4", "0.3", "400", loss] and speedup.startswith(
        "1.60x (95 % 1.5"
    )
    assert [row[:4] for row in table[1:]] == [
        ["baseline", "1", "0", steps] for steps in ("400", "600", "760", "800")
    ]
    half = 2.77645 * 0.01 * math.sqrt(2 / 3)  # Student's t, four degrees of freedom
    for what, steps in (("FLOPs", STEPS), ("data", 760)):
        minus = [tst - end_of(steps, 2) + x for x in (0, -half, half)]
        assert f"equal {what} " + "{:+.4f} (95 % {:+.4f} to {:+.4f})".format(*minus) in printed
    assert f"equal loss: a baseline needs {speedup} the FLOPs" in printed
    # a baseline of 640 steps ends as low; 360 of its tokens are worth the 480 that TST reads in bags
    assert "exchange rate: 1.33 (95 % 1." in printed
    assert "before its decay" not in printed  # the longest one is still above TST there
    assert printed.split("\nwrote")[0].strip().splitlines()[-1] in (out / "table.md").read_text()
    assert len((out / "runs.csv").read_text().splitlines()) == 1 + 15
    assert [ax.get_title() for ax in figures[0].axes] == ["Equal FLOPs", "Equal data"]


def test_the_false_speedup_is_read_off_the_longest_baseline_before_its_decay(compared, capsys):
    compared("--seeds=1", "--lengths=1,2,16")
    # 6,400 steps decay from 5,760 on, and reach TST's loss before: log2(6400 / 640) / 4 = 1 - step / 6400
    step = 6400 * (1 - math.log2(10) / 4)
    printed = capsys.readouterr().out
    assert f"before its decay {step / 400:.2f}x, which is wrong" in printed
    assert "a baseline needs 1.60x" in printed


def test_the_baseline_has_its_own_rate_and_equal_data_is_not_trained_twice(compared, capsys):
    rates = ["--learning_rate=0.02", "--baseline_learning_rate=0.03"]
    out = compared("--seeds=1", *rates, "--lengths=1,1.91")
    assert len(names(out)) == 3 and "equal data" in (printed := capsys.readouterr().out)
    for name in names(out):
        rate = "0.03" if name.startswith("s1") else "0.02"
        assert f"--learning_rate={rate}" in (out / name / "starts.jsonl").read_text()
    assert "learning_rate 0.02 (TST), 0.03 (baseline)" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bag_size=1"], "no superposition to compare"),
        (["--learning_rate=0.1,0.2"], "--learning_rate=0.1,0.2: .*_learning_rate vary here"),
        (["--seed=1"], "--seed=1: --seeds, "),
        (["--seeds=1,x"], "seed takes int, got 'x'"),
        (["--lengths=1,x"], "--lengths takes numbers above 0, not 1,x"),
        (["--lengths=0"], "--lengths takes numbers above 0, not 0"),
        (["--max_steps=0"], "max_steps must be at least 1"),
    ],
)
def test_what_cannot_work_is_one_line(compared, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        compared(*arguments)
    assert not names(tmp_path / "out")


def test_failed_runs_are_left_out_and_said(compared, tmp_path, monkeypatch, capsys):
    out = compared("--seeds=1,2", "--lengths=1,1.9")
    capsys.readouterr()
    for run in ("s4_r0.3_max_steps=400_seed2", "s1_max_steps=760_seed1", "s1_max_steps=760_seed2"):
        (out / run / "metrics.jsonl").write_text("x\n{}\n")
        (out / run / "last.pt").unlink()
    monkeypatch.setattr(sweep, "TRAINER", f"{tmp_path}/missing.py")
    with pytest.raises(UserError, match="3 of 6 runs failed"):
        compared("--seeds=1,2", "--lengths=1,1.9")
    _, tst, baseline = lines(capsys.readouterr().out)
    assert tst[4] == f"{end_of(STEPS, 1, s=4):.4f}" and baseline[3] == "400"  # one seed
    with pytest.raises(UserError, match="none of 2 runs is done"):
        compared("--seeds=3", "--lengths=1.9")


def test_intervals_are_those_of_students_t():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 10: 2.228, 30: 2.042, 120: 1.980}
    assert {n: intervals.student_t(n) for n in table} == pytest.approx(table, abs=6e-4)
    found = intervals.difference([1, 2, 3], [11, 12, 13, 14])
    squares = 2 + 5  # of the distances from both means
    half = 2.570582 * math.sqrt(squares / 5 * (1 / 3 + 1 / 4))
    bounds = -10.5, -10.5 - half, -10.5 + half
    assert (found.value, found.low, found.high) == pytest.approx(bounds)
    assert math.isnan(intervals.difference([1, 2, 3], [4]).low)


@pytest.mark.parametrize(
    "differences, length",
    [
        ([-1, 1, 2], math.sqrt(2)),  # halfway between 1 and 2 in the logarithm
        ([-3, -1, 1], math.sqrt(8)),
        ([-1, 0, 1], 2),
        ([0.1, 1, 2], 0),
        ([-3, -2, -1], math.inf),
        ([-1, 1, -1], math.sqrt(2)),  # the shortest counts
    ],
)
def test_a_speedup_is_where_the_difference_is_zero(differences, length):
    found = intervals.speedup([1, 2, 4], list(map(Interval, differences)))
    assert found.value == pytest.approx(length) and math.isnan(found.low + found.high)


def test_the_interval_of_a_speedup_is_where_those_of_the_differences_hold_zero():
    against = [Interval(-2, -3, -1), Interval(2, 1, 3), Interval(6, 5, 7)]
    found = intervals.speedup([1, 2, 4], against)
    at = lambda share: pytest.approx(2**share)
    assert (found.value, found.low, found.high) == (at(1 / 2), at(1 / 4), at(3 / 4))


def test_bounds_are_rounded_to_the_safe_side():
    assert intervals.times(math.inf, [1.0, 1.0256]) == "> 1.02x"
    assert intervals.times(0.0, [0.5012, 2.0]) == "< 0.51x"
    assert intervals.times(math.inf, [1.0, 1.4]) == "> 1.40x"
    assert intervals.times(1.526, [1, 2]) == "1.53x"
