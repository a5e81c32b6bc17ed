"""tools/plot.py and tools/runs.py: what is read of a run, what a comparison says, and what the picture shows.

Speed-ups and recoveries are checked on runs for which they are known in closed form, pictures by their axes.
"""

import json
import math
import sys

import pytest

from nanotst import UserError
from nanotst.configurator import parse
from tools import plot, runs

FLOPS, POSITIONS, SECONDS = 1e9, 64, 0.5  # per step


def rows_of(losses, bag_size=1, switch=0, every=10):
    """Rows with validation losses `losses` after every `every` steps; bag_size until step `switch`."""
    rows = []
    for i, loss in enumerate(losses, 1):
        step = i * every
        bag = bag_size if step <= switch else 1
        row = dict(step=step, phase="superposition" if bag > 1 else "recovery", bag_size=bag)
        row |= dict(loss=loss + 0.1, val_loss=loss, val_bpb=loss / 3, val_loss_other=7.0)
        row |= dict(positions=step * POSITIONS, flops=step * FLOPS, seconds=step * SECONDS)
        row |= dict(data_tokens=POSITIONS * (step + (bag_size - 1) * min(step, switch)))
        rows.append(row)
    return rows


def write(folder, rows, tail="", **knobs):
    """A run folder with these rows, and with a config.json if knobs are given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    if knobs:
        data = dict(
            vocab_size=256, encoding="bytes", train_tokens=1000, val_tokens=100, bytes_per_token=1.0
        )
        data |= {key: knobs.pop(key) for key in data if key in knobs}
        described = dict(
            config=knobs, data=data, parameters=10 * knobs.get("n_layer", 1), versions={}
        )
        (folder / "config.json").write_text(json.dumps(described))
    return str(folder)


def run_of(rows, label="run", baseline=False, **facts):
    return dict(
        name=label, label=label, rows=rows, baseline=baseline, facts=facts or {"n_layer": "1"}
    )


def ending_at(loss, steps):
    return rows_of([loss], every=steps)


def main(*args):
    plot.main(parse(plot.Config, [str(arg) for arg in args]))


# -------------------------------------------------------------------------------------------------- reading


def test_a_folder_and_its_file_are_the_same_run(tmp_path):
    rows = rows_of([3.0, 2.0])
    folder = write(tmp_path / "run", rows)
    assert runs.load_metrics(folder) == runs.load_metrics(folder + "/metrics.jsonl") == rows


def test_torn_last_line_is_skipped_with_a_note(tmp_path, capsys):
    rows = rows_of([3.0, 2.0])
    assert runs.load_metrics(write(tmp_path / "run", rows, '{"step": 30, "val_l')) == rows
    assert "metrics.jsonl:3: torn last line skipped" in capsys.readouterr().err


@pytest.mark.parametrize("line", ['{"step": 30, "val_l\n', "[1]\n", '{"loss": 1.0}\n'])
def test_bad_line_elsewhere_names_file_and_line(tmp_path, line):
    folder = write(tmp_path / "run", rows_of([3.0, 2.0]), line + '{"step": 40}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:3: "):
        runs.load_metrics(folder)


def test_resume_drops_what_was_written_after_the_checkpoint(tmp_path):
    first, second = rows_of([5.0, 4.0, 3.5, 3.4]), rows_of([5.0, 4.0, 3.0, 2.9, 2.8])
    rows = runs.load_metrics(write(tmp_path / "run", first + second[2:3]))  # back from 40 to 30
    assert [row["val_loss"] for row in rows] == [5.0, 4.0, 3.0] and runs.final(rows)["step"] == 30
    assert runs.load_metrics(write(tmp_path / "twice", first + second[1:4] + second[2:])) == second
    rows = runs.load_metrics(write(tmp_path / "stale", first + [dict(step=30, loss=1.0)]))
    assert rows[-1] == dict(step=30, loss=1.0)  # not mixed with the validation loss of before


def test_rows_of_one_step_become_one_and_nulls_are_absent(tmp_path):
    rows = [dict(step=1, loss=3.0), dict(step=1, val_loss=2.5, mfu=None), dict(step=1, loss=2.0)]
    assert runs.load_metrics(write(tmp_path / "run", rows)) == [
        dict(step=1, loss=2.0, val_loss=2.5)
    ]


def test_final_is_the_last_validation_row():
    assert runs.final(rows_of([3.0, 2.0]) + [dict(step=25, loss=1.0)])["val_loss"] == 2.0
    with pytest.raises(UserError, match="no validation rows"):
        runs.final([dict(step=1, loss=1.0)])


def test_superposition_ratio_is_measured():
    assert plot.superposition_ratio(rows_of([3.0] * 10)) == 0
    # by data it is exact although the rows only say that the switch lies in 30..39
    assert plot.superposition_ratio(rows_of([3.0] * 10, bag_size=6, switch=33)) == pytest.approx(
        0.33
    )
    no_counts = [
        {k: v for k, v in row.items() if k != "data_tokens"} for row in rows_of([3.0] * 10, 6, 30)
    ]
    assert plot.superposition_ratio(no_counts) == pytest.approx(0.3)
    output_only = [row | dict(data_tokens=row["positions"]) for row in rows_of([3.0] * 10, 6, 30)]
    assert plot.superposition_ratio(output_only) == pytest.approx(0.3)


def test_superposition_ratio_of_a_bag_size_that_steps_down():
    rows, data = rows_of([3.0] * 10), 0
    for row, s in zip(rows, (8, 8, 4, 2, 1, 1, 1, 1, 1, 1)):
        data += 10 * s * POSITIONS
        row |= dict(bag_size=s, data_tokens=data)
    assert plot.superposition_ratio(rows) == pytest.approx(0.4)
    assert "|    8-4-2 | 0.4 |" in plot.table([run_of(rows)])


# ---------------------------------------------------------------------------------- speed-up at equal loss


def test_one_baseline_length_gives_the_crossing():
    # loss = 5 - step/25 crosses 3 at step 50 of a baseline of 100 steps; halfway between rows in the second
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


@pytest.mark.parametrize(
    "loss, steps, expected",
    [
        (3.0, 100, ("=", 2.0)),  # the loss of the middle length, 200 steps
        (2.5, 200, ("=", math.sqrt(2))),  # halfway in loss between 200 and 400 steps: 200 * sqrt(2)
        (3.75, 200, ("=", 2**0.25 / 2)),  # slower than the baseline: 100 * 2**(1/4)
        (2.0, 100, ("=", 4.0)),
        (1.9, 100, (">", 4.0)),  # better than the longest
        (4.1, 100, ("<", 1.0)),  # worse than the shortest
    ],
)
def test_several_lengths_compare_the_ends(loss, steps, expected):
    baselines = [ending_at(2.0, 400), ending_at(4.1, 100), ending_at(4.0, 100), ending_at(3.0, 200)]
    relation, factor = plot.speedup(rows_of([9.0, loss], every=steps // 2), baselines)
    assert (relation, factor) == (expected[0], pytest.approx(expected[1]))


def test_lengths_within_a_percent_are_one():
    assert plot.baseline_ends([ending_at(3.0, 1000), ending_at(3.2, 1008)]) == [(1000 * FLOPS, 3.0)]
    assert len(plot.baseline_ends([ending_at(3.0, 1000), ending_at(3.2, 1020)])) == 2


def test_diverged_baseline_seed_does_not_count():
    assert plot.baseline_ends([ending_at(3.0, 100), ending_at(math.nan, 100)]) == [
        (100 * FLOPS, 3.0)
    ]


# -------------------------------------------------------------------------------------------- at the switch


def test_switches_are_where_the_bag_size_falls():
    rows = rows_of([6.0, 5.0, 4.0, 3.0, 2.0])
    for row, s in zip(rows, (8, 8, 4, 4, 1)):
        row["bag_size"] = s
    assert [(old["step"], new["step"]) for old, new in plot.switches(rows)] == [(20, 30), (40, 50)]
    assert plot.switches(rows_of([3.0, 2.0])) == []


def test_met_again_is_where_the_curves_cross_after_the_switch():
    base = rows_of([5 - step / 20 for step in range(10, 61, 10)])  # 4.5, 4.0, 3.5, 3.0, 2.5, 2.0
    # below the baseline while bagged, which does not count; then gaps of +0.6 at 40, -0.2 at 50
    tst = rows_of([4.0, 5.0, 4.5, 3.6, 2.3, 1.9], bag_size=2, switch=25)
    assert plot.met_again(tst, base, switch=25) == ("=", pytest.approx(47.5 - 25))
    assert plot.met_again(tst[:2] + rows_of([9, 9, 3.4])[2:], base, switch=25) == ("<=", 5)
    assert plot.met_again(tst[:4], base, switch=25) == ("not met", None)
    assert plot.met_again(tst, [], switch=25) == ("unknown", None)


def test_met_again_compares_at_equal_flops_not_at_equal_steps():
    base = rows_of([5 - step / 20 for step in range(10, 61, 10)])
    tst = rows_of([9.0, 9.0, 3.8, 3.1, 2.1], bag_size=2, switch=20)
    for row in tst:
        row["flops"] = (
            row["flops"] / 2
        )  # half the batch: step 50 of tst is step 25 of the baseline, 3.75
    # at 30 against 4.25, below
    assert plot.met_again(tst, base, switch=20) == ("<=", 10)


def test_the_table_tells_spike_and_recovery_of_the_mean_of_seeds(tmp_path, capsys):
    base = write(tmp_path / "base", rows_of([5.0, 4.5, 4.0, 3.5, 3.0]))
    one = write(tmp_path / "t1", rows_of([5.0, 4.0, 4.9, 3.4, 2.9], 2, 20))
    two = write(tmp_path / "t2", rows_of([5.0, 4.2, 5.1, 3.4, 2.9], 2, 20))
    main(base, one, two, "--labels=baseline,TST,TST", "--no_plot")
    # training loss is validation loss + 0.1; the gap goes from +1 at 30 to -0.1 at 40
    said = "- TST: training loss 4.200 -> 5.100 (+0.900) after step 20; validation loss is the baseline's"
    assert f"{said} at equal FLOPs about 19 steps later." in capsys.readouterr().out


# ----------------------------------------------------------------------------------- what may be compared


def test_runs_of_one_configuration_differ_in_nothing():
    same = [
        run_of(
            rows_of([3.0]), "a", True, n_layer="2", seed="1", bag_size="1", threads="1", out_dir="x"
        )
    ]
    same += [
        run_of(
            rows_of([3.0]),
            "b",
            False,
            n_layer="2",
            seed="2",
            bag_size="4",
            threads="2",
            out_dir="y",
        )
    ]
    assert runs.notes_on_differences(same) == []


def test_a_note_names_the_knobs_and_the_corpus_that_differ(tmp_path, capsys):
    dense = write(
        tmp_path / "dense", rows_of([3.0]), n_layer=2, n_expert=0, seed=1, learning_rate=0.01
    )
    moe = write(tmp_path / "moe", rows_of([2.0]), n_layer=2, n_expert=8, seed=2, learning_rate=0.01)
    main(dense, moe, "--no_plot")
    note = "Not the same in all runs: n_expert 0 (dense), 8 (moe).\n"
    assert note in capsys.readouterr().out
    other = write(
        tmp_path / "other",
        rows_of([2.0]),
        train_tokens=999,
        n_layer=2,
        n_expert=0,
        learning_rate=0.01,
    )
    main(dense, other, "--no_plot")
    out = capsys.readouterr().out
    assert (
        "corpus 1000 + 100 tokens (dense), 999 + 100 tokens (other)" in out
        and "bits per byte count" not in out
    )


def test_a_knob_that_is_younger_than_a_run_is_no_difference():
    old, new = (
        run_of(rows_of([3.0]), "old", n_layer="2"),
        run_of(rows_of([3.0]), "new", n_layer="2", loss="mce"),
    )
    assert runs.notes_on_differences([old, new]) == []


def test_runs_of_one_folder_name_are_told_apart_by_their_paths(tmp_path):
    one, two = (write(tmp_path / name / "tst", rows_of([3.0])) for name in ("a", "b"))
    assert [run["name"] for run in runs.read_runs([one, two])] == [one, two]
    assert [run["name"] for run in runs.read_runs([one])] == ["tst"]


def test_a_run_without_config_is_named(tmp_path, capsys):
    known, blind = (
        write(tmp_path / "known", rows_of([3.0]), n_layer=2),
        write(tmp_path / "blind", rows_of([3.0])),
    )
    main(known, blind, "--no_plot")
    assert "not known to be the same: blind." in capsys.readouterr().out


def test_different_tokenizers_compare_in_bits_per_byte():
    # by nats the second run is the better one, by bits per byte the first
    bytes_run = run_of(rows_of([5, 4, 3.0]), "bytes", True, vocab_size="256", encoding="bytes")
    words = [row | dict(val_bpb=2 * row["val_bpb"]) for row in rows_of([4, 3, 2.0])]
    words_run = run_of(words, "words", False, vocab_size="50257", encoding="gpt2")
    both = [bytes_run, words_run]
    assert (
        runs.measure_of(both) == "val_bpb" and runs.measure_of([bytes_run, bytes_run]) == "val_loss"
    )
    text = plot.table(both)
    assert (
        "tokenizer bytes of 256 (bytes), gpt2 of 50257 (words)" in text
        and "bits per byte count here" in text
    )
    assert "not reached" in text
    ax = plot.draw(both).axes[0]
    assert ax.get_ylabel() == "validation loss (bits per byte)"
    assert list(line_of(ax, "words").get_ydata()) == [row["val_bpb"] for row in words]
    scale = words[-1]["val_bpb"] / words[-1]["val_loss"]
    assert list(lines_of(ax, "training loss")[1].get_ydata()) == pytest.approx(
        [scale * r["loss"] for r in words]
    )


def test_different_tokenizers_without_bits_per_byte_are_refused():
    bare = [dict(step=1, val_loss=2.0)]
    both = [run_of(bare, "a", True, vocab_size="256"), run_of(bare, "b", False, vocab_size="512")]
    with pytest.raises(UserError, match="compare in bits per byte, and a has no val_bpb"):
        plot.table(both)


# -------------------------------------------------------------------------------------------------- picture


def lines_of(ax, label):
    return [line for line in ax.get_lines() if line.get_label() == label]


def line_of(ax, label):
    (line,) = lines_of(ax, label)
    return line


@pytest.fixture
def pair():
    """A baseline, and a run on bags until step 40 of 100."""
    base = rows_of([5 - step / 25 for step in range(10, 101, 10)])
    tst = rows_of([6 - step / 25 for step in range(10, 101, 10)], bag_size=3, switch=40)
    return [run_of(base, "baseline", True), run_of(tst, "TST")]


@pytest.mark.parametrize(
    "panel, key, scale, xlabel",
    [
        (0, "positions", 1e3, "transformer positions (thousands)"),
        (1, "data_tokens", 1e3, "data tokens (thousands)"),
        (2, "seconds", 1, "training time (seconds)"),
    ],
)
def test_each_panel_stands_on_its_own_count(pair, panel, key, scale, xlabel):
    ax = plot.draw(pair).axes[panel]
    assert ax.get_xlabel() == xlabel
    for run in pair:
        line = line_of(ax, run["label"])
        assert list(line.get_xdata()) == pytest.approx([row[key] / scale for row in run["rows"]])
        assert list(line.get_ydata()) == [row["val_loss"] for row in run["rows"]]


def test_training_loss_is_drawn_of_ordinary_steps_alone(pair):
    for ax, key, scale in zip(
        plot.draw(pair).axes, ("positions", "data_tokens", "seconds"), (1e3, 1e3, 1)
    ):
        base, tst = lines_of(ax, "training loss")
        assert len(base.get_xdata()) == 10
        ordinary = pair[1]["rows"][4:]
        assert list(tst.get_xdata()) == pytest.approx([row[key] / scale for row in ordinary])
        assert list(tst.get_ydata()) == [row["loss"] for row in ordinary]


def test_the_switch_stands_at_the_last_row_on_bags(pair):
    last = pair[1]["rows"][3]
    for ax, x in zip(
        plot.draw(pair).axes, (last["positions"] / 1e3, last["data_tokens"] / 1e3, last["seconds"])
    ):
        assert list(line_of(ax, "switch").get_xdata()) == pytest.approx(
            [x, x]
        )  # one, of the run with bags


def test_final_values_stand_at_the_ends_of_their_curves(pair):
    for ax in plot.draw(pair).axes:
        texts = {text.get_text(): text for text in ax.texts}
        assert set(texts) == {"1.000", "2.000"}
        for run, text in zip(pair, (texts["1.000"], texts["2.000"])):
            line = line_of(ax, run["label"])
            assert text.xy == pytest.approx((line.get_xdata()[-1], line.get_ydata()[-1]))
            assert text.get_color() == line.get_color()


def test_final_values_that_would_overlap_are_moved_apart():
    close = [run_of(ending_at(loss, 10), str(loss)) for loss in (3.0, 3.001, 3.002)]
    ax = plot.draw([*close, run_of(rows_of([4.0]), "far")]).axes[0]
    low, high = ax.get_ylim()
    heights = sorted(text.xy[1] for text in ax.texts)
    assert all(b - a >= 0.044 * (high - low) for a, b in zip(heights, heights[1:]))


def test_seeds_are_drawn_thin_around_their_mean(pair):
    base = [run_of(rows_of([5, 4, loss]), "baseline", True) for loss in (3.0, 3.2)]
    ax = plot.draw([*base, pair[1]]).axes[0]
    assert list(line_of(ax, "baseline").get_ydata()) == pytest.approx([5, 4, 3.1])
    assert [list(line.get_ydata()) for line in lines_of(ax, "one seed")] == [
        [5, 4, 3.0],
        [5, 4, 3.2],
    ]
    assert not lines_of(ax, "training loss")  # among many curves it would hide them


def test_different_models_stand_on_flops(pair):
    large = [row | dict(flops=3 * row["flops"]) for row in pair[0]["rows"]]
    ax = plot.draw([pair[1], run_of(large, "large", True)]).axes[0]
    assert ax.get_title() == "Equal FLOPs" and ax.get_xlabel().startswith("FLOPs")
    assert list(line_of(ax, "large").get_xdata()) == pytest.approx(
        [row["flops"] / 1e9 for row in large]
    )


def test_loss_limits_leave_superposition_out():
    base = [[run_of(rows_of([5, 4, 3.0 + i / 10]))] for i in range(3)]
    tst = [[run_of(rows_of([6, 3.6, 2.6 + i / 10], 4, 10))] for i in range(3)]
    low, high = plot.loss_limits(base + tst, [group[0]["rows"] for group in base + tst])
    assert 2.4 < low < 2.6 and 5 < high < 6  # the superposition row at 6.0 is above


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def six(tmp_path):
    paths = [write(tmp_path / f"b{i}", rows_of([5, 4, 3.0 + i / 10]), n_layer=1) for i in range(3)]
    tst = [rows_of([6, 3.6, 2.6 + i / 10], 4, 10) for i in range(3)]
    return paths + [write(tmp_path / f"t{i}", rows, n_layer=1) for i, rows in enumerate(tst)]


LABELS = "--labels=base,base,base,TST,TST,TST"


def test_table_with_labels(six, tmp_path, capsys):
    main(*six, LABELS, "--no_plot", f"--table={tmp_path}/t.md")
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "t.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]
    cells = {line[0]: line[1:] for line in lines}
    assert cells["b0 (base)"] == [
        "1",
        "0",
        "30",
        "3.0000",
        "1.0000",
        "0.00M",
        "3e+10",
        "0.2 min",
        "-",
    ]
    assert cells["base, mean of 3"][3] == "3.1000 (sd 0.1000, range 0.2000)"
    assert cells["TST, mean of 3"][:4] == ["4", "0.333", "30", "2.7000 (sd 0.1000, range 0.2000)"]
    # mean curve 3.6 -> 2.7 passes 3.1 after 5/9 of the ten steps from 20 to 30
    assert cells["TST, mean of 3"][-1] == f">= {30 / (20 + 50 / 9):.2f}x"


def test_best_learning_rate_of_the_baseline_counts(tmp_path, capsys):
    """Baselines of one length that are not seeds of each other are not averaged: TST meets the best."""
    good, bad = (
        write(tmp_path / "good", rows_of([5, 4, 3.0])),
        write(tmp_path / "bad", rows_of([5, 4, 3.5])),
    )
    main(good, bad, write(tmp_path / "tst", rows_of([6, 4, 3.2], 4, 10)), "--no_plot")
    assert "not reached" in capsys.readouterr().out


def test_table_with_a_diverged_seed(six, tmp_path, capsys):
    six[1] = write(tmp_path / "diverged", rows_of([5, 4, math.nan]))
    main(*six, LABELS, "--no_plot")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    lines = {line.split("|")[1].strip(): line for line in rows}
    assert "nan (sd nan" in lines["base, mean of 3"]
    assert ">=" in lines["TST, mean of 3"]  # compared with the two others


def test_baseline_by_name(six, capsys):
    main(six[0], six[1], "--baseline=b1", "--no_plot")
    b0, b1 = capsys.readouterr().out.splitlines()[2:4]
    assert ">= 1.0" in b0 and b1.split("|")[-2].strip() == "-"


def test_picture_is_written(six, tmp_path):
    odd = write(
        tmp_path / "odd", [dict(step=1, val_loss=3.0, positions=5), dict(step=2, val_loss=math.nan)]
    )
    out = tmp_path / "curves.png"
    main(*six, odd, LABELS + ",odd", f"--out={out}", "--title=six and an odd one")
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000


def test_without_matplotlib_the_error_names_it(six, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="needs the package matplotlib"):
        main(six[0])
    assert "b0" in capsys.readouterr().out  # the table is there all the same


@pytest.mark.parametrize(
    "args, message",
    [
        (["{}/nope"], "nope: no such run"),
        (["{}/empty"], "empty: no metrics.jsonl"),
        (["{}/train"], "train: no validation rows"),
        (["{}/run", "--labels=a,b"], "2 labels for 1 run"),
        (["{}/run", "--baseline=x"], "--baseline=x is none of run"),
        (["{}/broken"], "broken/config.json is not the config.json of a run"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path, args, message):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "train", [dict(step=1, loss=1.0)])
    write(tmp_path / "run", rows_of([1.0]))
    write(tmp_path / "broken", rows_of([1.0]))
    (tmp_path / "broken" / "config.json").write_text('{"config": 3}')
    with pytest.raises(UserError, match=message) as error:
        main(*[arg.format(tmp_path) for arg in args], "--no_plot")
    assert "\n" not in str(error.value)
