"""plot.py: what is read from metrics.jsonl, and speed-ups on runs whose speed-up is known in closed form."""
import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import plot  # noqa: E402

FLOPS, POSITIONS, SECONDS = 1e9, 64, 0.5  # per step


def rows_of(losses, bag_size=1, switch=0, every=10):
    """Rows with validation losses `losses` after every `every` steps; bag_size until step `switch`."""
    rows = []
    for i, loss in enumerate(losses, 1):
        step = i * every
        bag = bag_size if step <= switch else 1
        rows.append(dict(step=step, phase="superposition" if bag > 1 else "recovery", bag_size=bag, loss=loss + 0.1,
                         val_loss=loss, val_bpb=loss / 3, positions=step * POSITIONS, flops=step * FLOPS,
                         data_tokens=POSITIONS * (step + (bag_size - 1) * min(step, switch)), seconds=step * SECONDS))
    return rows


def write(folder, rows, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return str(folder)


def ending_at(loss, steps):
    return rows_of([loss], every=steps)


# ---- reading

def test_a_folder_and_its_file_are_the_same_run(tmp_path):
    rows = rows_of([3.0, 2.0])
    folder = write(tmp_path / "run", rows)
    assert plot.load_metrics(folder) == plot.load_metrics(folder + "/metrics.jsonl") == rows


def test_torn_last_line_is_skipped_with_a_note(tmp_path, capsys):
    rows = rows_of([3.0, 2.0])
    assert plot.load_metrics(write(tmp_path / "run", rows, '{"step": 30, "val_l')) == rows
    assert "metrics.jsonl:3: torn last line skipped" in capsys.readouterr().err


@pytest.mark.parametrize("line", ['{"step": 30, "val_l\n', "[1]\n", '{"loss": 1.0}\n'])
def test_bad_line_elsewhere_names_file_and_line(tmp_path, line):
    folder = write(tmp_path / "run", rows_of([3.0, 2.0]), line + '{"step": 40}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3: "):
        plot.load_metrics(folder)


def test_resume_drops_what_was_written_after_the_checkpoint(tmp_path):
    first, second = rows_of([5.0, 4.0, 3.5, 3.4]), rows_of([5.0, 4.0, 3.0, 2.9, 2.8])
    rows = plot.load_metrics(write(tmp_path / "run", first + second[2:3]))  # back from 40 to 30
    assert [row["val_loss"] for row in rows] == [5.0, 4.0, 3.0] and plot.final(rows)["step"] == 30
    assert plot.load_metrics(write(tmp_path / "twice", first + second[1:4] + second[2:])) == second
    rows = plot.load_metrics(write(tmp_path / "stale", first + [dict(step=30, loss=1.0)]))
    assert rows[-1] == dict(step=30, loss=1.0)  # not mixed with the validation loss of before


def test_rows_of_one_step_become_one_and_nulls_are_absent(tmp_path):
    rows = [dict(step=1, loss=3.0), dict(step=1, val_loss=2.5, mfu=None), dict(step=1, loss=2.0)]
    assert plot.load_metrics(write(tmp_path / "run", rows)) == [dict(step=1, loss=2.0, val_loss=2.5)]


def test_final_is_the_last_validation_row():
    assert plot.final(rows_of([3.0, 2.0]) + [dict(step=25, loss=1.0)])["val_loss"] == 2.0
    with pytest.raises(ValueError, match="no validation rows"):
        plot.final([dict(step=1, loss=1.0)])


def test_superposition_ratio_is_measured():
    assert plot.superposition_ratio(rows_of([3.0] * 10)) == 0
    # by data it is exact although the rows only say that the switch lies in 30..39
    assert plot.superposition_ratio(rows_of([3.0] * 10, bag_size=6, switch=33)) == pytest.approx(0.33)
    no_counts = [{k: v for k, v in row.items() if k != "data_tokens"} for row in rows_of([3.0] * 10, 6, 30)]
    assert plot.superposition_ratio(no_counts) == pytest.approx(0.3)
    output_only = [row | dict(data_tokens=row["positions"]) for row in rows_of([3.0] * 10, 6, 30)]
    assert plot.superposition_ratio(output_only) == pytest.approx(0.3)


# ---- speed-up at equal loss

def test_one_baseline_length_gives_the_crossing():
    # loss = 5 - step/25 crosses 3 at step 50 of a baseline of 100 steps; halfway between rows in the second case
    tst = rows_of([5 - step / 25 for step in range(10, 101, 10)], bag_size=4, switch=20)
    assert plot.speedup(tst, [ending_at(3.0, 100)]) == (">=", pytest.approx(2.0))
    assert plot.speedup(tst, [ending_at(2.8, 110)]) == (">=", pytest.approx(2.0))
    rates = [ending_at(3.0, 100), ending_at(3.1, 100)]  # one length, and the better of them counts
    assert plot.speedup(tst, rates) == (">=", pytest.approx(2.0))


def test_crossing_counts_only_where_the_curve_stays_below():
    tst = rows_of([4.0, 2.9, 3.2, 2.8], bag_size=2, switch=10)  # from 3.2 to 2.8: at 3.0 in step 35
    assert plot.speedup(tst, [ending_at(3.0, 70)]) == (">=", pytest.approx(2.0))
    assert plot.speedup(tst[:3], [ending_at(3.0, 70)]) == ("not reached", None)


def test_not_reached_and_unknown():
    base = [ending_at(3.0, 100)]
    assert plot.speedup(ending_at(3.1, 100), base) == ("not reached", None)
    assert plot.speedup(ending_at(math.nan, 100), base) == ("not reached", None)
    assert plot.speedup(ending_at(2.5, 50), base) == (">=", 2.0)  # below from its first row on
    assert plot.speedup(ending_at(2.5, 50), []) == ("unknown", None)
    assert plot.speedup([dict(step=1, val_loss=2.0)], base) == ("unknown", None)


@pytest.mark.parametrize("loss, steps, expected", [
    (3.0, 100, ("=", 2.0)),             # the loss of the middle length, 200 steps
    (2.5, 200, ("=", math.sqrt(2))),    # halfway in loss between 200 and 400 steps: 200 * sqrt(2)
    (3.75, 200, ("=", 2 ** 0.25 / 2)),  # slower than the baseline: 100 * 2**(1/4)
    (2.0, 100, ("=", 4.0)),
    (1.9, 100, (">", 4.0)),             # better than the longest
    (4.1, 100, ("<", 1.0)),             # worse than the shortest
])
def test_several_lengths_compare_the_ends(loss, steps, expected):
    baselines = [ending_at(2.0, 400), ending_at(4.1, 100), ending_at(4.0, 100), ending_at(3.0, 200)]
    relation, factor = plot.speedup(rows_of([9.0, loss], every=steps // 2), baselines)
    assert (relation, factor) == (expected[0], pytest.approx(expected[1]))


def test_lengths_within_a_percent_are_one():
    assert plot.baseline_ends([ending_at(3.0, 1000), ending_at(3.2, 1008)]) == [(1000 * FLOPS, 3.0)]
    assert len(plot.baseline_ends([ending_at(3.0, 1000), ending_at(3.2, 1020)])) == 2


def test_best_learning_rate_of_the_baseline_counts(tmp_path, capsys):
    """Baselines of one length that are not seeds of each other are not averaged: TST is compared with the best."""
    runs = [write(tmp_path / "good", rows_of([5, 4, 3.0])), write(tmp_path / "bad", rows_of([5, 4, 3.5])),
            write(tmp_path / "tst", rows_of([6, 4, 3.2], 4, 10))]
    plot.main([*runs, "--no_plot"])
    assert "not reached" in capsys.readouterr().out


def test_diverged_baseline_seed_does_not_count():
    assert plot.baseline_ends([ending_at(3.0, 100), ending_at(math.nan, 100)]) == [(100 * FLOPS, 3.0)]


# ---- the command

@pytest.fixture
def six(tmp_path):
    paths = [write(tmp_path / f"b{i}", rows_of([5, 4, 3.0 + i / 10])) for i in range(3)]
    return paths + [write(tmp_path / f"t{i}", rows_of([6, 3.6, 2.6 + i / 10], 4, 10)) for i in range(3)]


def test_table_with_labels(six, tmp_path, capsys):
    plot.main([*six, "--labels=base,base,base,TST,TST,TST", "--no_plot", f"--table={tmp_path}/t.md"])
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "t.md").read_text()
    cells = {line[0]: line[1:] for line in
             ([cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines())}
    assert cells["b0 (base)"] == ["1", "0", "30", "3.0000", "1.0000", "0.00M", "3e+10", "0.2 min", "-"]
    assert cells["base, mean of 3"][3] == "3.1000 (sd 0.1000, range 0.2000)"
    assert cells["TST, mean of 3"][:4] == ["4", "0.333", "30", "2.7000 (sd 0.1000, range 0.2000)"]
    # mean curve 3.6 -> 2.7 passes 3.1 after 5/9 of the ten steps from 20 to 30
    assert cells["TST, mean of 3"][-1] == f">= {30 / (20 + 50 / 9):.2f}x"


def test_table_with_a_diverged_seed(six, tmp_path, capsys):
    six[1] = write(tmp_path / "diverged", rows_of([5, 4, math.nan]))
    plot.main([*six, "--labels=base,base,base,TST,TST,TST", "--no_plot"])
    lines = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("|")}
    assert "nan (sd nan" in lines["base, mean of 3"]
    assert ">=" in lines["TST, mean of 3"]  # compared with the two others


def test_baseline_by_name(six, capsys):
    plot.main([six[0], six[1], "--baseline=b1", "--no_plot"])
    b0, b1 = capsys.readouterr().out.splitlines()[2:4]
    assert ">= 1.0" in b0 and b1.split("|")[-2].strip() == "-"


def test_picture_is_written(six, tmp_path):
    odd = write(tmp_path / "odd", [dict(step=1, val_loss=3.0, positions=5), dict(step=2, val_loss=math.nan)])
    out = tmp_path / "curves.png"
    plot.main([*six, odd, "--labels=base,base,base,TST,TST,TST,odd", f"--out={out}", "--title=six and an odd one"])
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000


def test_loss_limits_leave_superposition_out(six):
    runs = [dict(name=str(i), label=str(i), rows=plot.load_metrics(path), baseline=i < 3) for i, path in enumerate(six)]
    low, high = plot.loss_limits([[run] for run in runs], [run["rows"] for run in runs])
    assert 2.4 < low < 2.6 and 5 < high < 6  # the superposition row at 6.0 is above


def test_without_matplotlib_the_error_names_it(six, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="needs the package matplotlib"):
        plot.main([six[0]])
    assert "b0" in capsys.readouterr().out  # the table is there all the same


@pytest.mark.parametrize("args, message", [
    (["{}/nope"], "nope: no such run"), (["{}/empty"], "empty: no metrics.jsonl"),
    (["{}/train"], "train: no validation rows"), (["{}/run", "--labels=a,b"], "2 labels for 1 run"),
    (["{}/run", "--baseline=x"], "--baseline=x is none of run"),
])
def test_errors_are_one_line(tmp_path, args, message):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "train", [dict(step=1, loss=1.0)])
    write(tmp_path / "run", rows_of([1.0]))
    with pytest.raises(SystemExit, match=message) as error:
        plot.main([arg.format(tmp_path) for arg in args] + ["--no_plot"])
    assert str(error.value).startswith("plot.py: ") and "\n" not in str(error.value)
