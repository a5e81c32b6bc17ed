"""tools/keep.py: what is kept of finished runs, and that a picture of what is kept is that of the runs."""

import csv
import json

import pytest

from nanotst import UserError
from nanotst.configurator import parse
from tools import keep, plot, runs

KNOBS = dict(
    out_dir="out/x", seed=1, bag_size=4, learning_rate=0.008, n_layer=2, dataset="mine", threads=1
)
VERSIONS = dict(
    python="3.11", torch="2.13", device="x86_64, 1 threads", dtype="bfloat16", world_size=1
)


def rows_of(steps=200, every=1, switch=60, bag_size=4, validate=20):
    """Rows of a run with a loss that says its step, as train.py would log them every `every` steps."""
    rows, data = [], 0
    for step in range(1, steps + 1):
        s = bag_size if step <= switch else 1
        data += 64 * s
        row = dict(
            step=step,
            bag_size=s,
            loss=5 - step / 100 + 1 / 3,
            lr=0.1,
            epoch=0.5,
            max_violation=0.25,
        )
        row |= dict(positions=64 * step, data_tokens=data, flops=step * 10**13, seconds=step / 7)
        row["positions_per_second"] = 100.0 + (step == steps) * 10**6
        if step % validate == 0:
            row |= dict(
                val_loss=4.9 - step / 100, val_bpb=(4.9 - step / 100) / 3, val_loss_code=2.0
            )
        if step % every == 0 or step in (1, switch, switch + 1) or "val_loss" in row:
            rows.append(row)
    return rows


def write(folder, rows, command=(), data=None, **knobs):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dict(vocab_size=256, encoding="bytes", train_tokens=1000, val_tokens=100) | (data or {})
    described = dict(
        config=KNOBS | knobs, versions=VERSIONS, command=["train.py", *command], data=data
    )
    (folder / "config.json").write_text(
        json.dumps(described | dict(parameters=7, active_parameters=5))
    )
    return str(folder)


def main(*args):
    keep.main(parse(keep.Config, [str(arg) for arg in args]))


def read(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture
def pair(tmp_path):
    baseline = write(tmp_path / "base", rows_of(bag_size=1), bag_size=1)
    return [baseline, write(tmp_path / "tst", rows_of(), command=["--bag_size=4"])]


# ------------------------------------------------------------------------------------------------ the table


def test_a_row_says_how_the_run_ended_and_all_that_made_it(pair, tmp_path):
    main(*pair, f"--out_dir={tmp_path}/kept", "--labels=baseline,TST")
    base, tst = read(tmp_path / "kept" / "runs.csv")
    assert (base["run"], base["label"], tst["run"], tst["label"]) == (
        "base",
        "baseline",
        "tst",
        "TST",
    )
    assert (tst["steps"], float(tst["val_loss"]), float(tst["val_loss_code"])) == ("200", 2.9, 2.0)
    assert (tst["positions"], tst["data_tokens"]) == (str(64 * 200), str(64 * (4 * 60 + 140)))
    assert tst["flops"] == "2000000000000000"  # counts are exact
    assert tst["positions_per_second"] == "100"  # the median: one odd row does not count
    assert (tst["torch"], tst["machine"], tst["precision"]) == (
        "2.13",
        "x86_64, 1 threads",
        "bfloat16",
    )
    assert (tst["parameters"], tst["active_parameters"], tst["vocab_size"]) == ("7", "5", "256")
    assert tst["command"] == "train.py --bag_size=4"
    assert {key: tst[key] for key in KNOBS if key != "out_dir"} == {
        key: str(value) for key, value in KNOBS.items() if key != "out_dir"
    }
    assert "out_dir" not in tst


def test_the_best_loss_is_the_lowest_and_not_the_last(tmp_path):
    rows = rows_of()
    rows[-1]["val_loss"] = 9.0  # the row before it with a validation loss is step 180
    main(write(tmp_path / "run", rows), f"--out_dir={tmp_path}/kept")
    (run,) = read(tmp_path / "kept" / "runs.csv")
    assert float(run["val_loss"]) == 9.0
    assert (float(run["best_val_loss"]), run["best_step"]) == (pytest.approx(3.1), "180")


def test_knobs_that_differ_come_first_and_follow_as_the_folder_grows(pair, tmp_path):
    first = lambda: list(read(tmp_path / "kept" / "runs.csv")[0])[:5]
    main(*pair, f"--out_dir={tmp_path}/kept")
    assert first() == ["run", "label", "bag_size", "steps", "val_loss"]
    more = write(
        tmp_path / "deep", rows_of(), n_layer=3, threads=2, new_knob="yes"
    )  # threads change nothing
    main(more, f"--out_dir={tmp_path}/kept")
    assert first() == ["run", "label", "bag_size", "n_layer", "new_knob"]
    assert [run["n_layer"] for run in read(tmp_path / "kept" / "runs.csv")] == ["2", "2", "3"]
    assert [run["new_knob"] for run in read(tmp_path / "kept" / "runs.csv")] == ["", "", "yes"]


def test_a_run_of_the_same_name_is_replaced_where_it_stands(pair, tmp_path, capsys):
    main(*pair, f"--out_dir={tmp_path}/kept")
    write(tmp_path / "base", rows_of(steps=100, bag_size=1), bag_size=1)
    main(pair[0], f"--out_dir={tmp_path}/kept")
    assert "base: replaced" in capsys.readouterr().out
    table, curves = read(tmp_path / "kept" / "runs.csv"), read(tmp_path / "kept" / "curves.csv")
    assert [(run["run"], run["steps"]) for run in table] == [("base", "100"), ("tst", "200")]
    last = {row["run"]: row["step"] for row in curves}
    assert last == {"base": "100", "tst": "200"}


def test_names_tell_runs_apart(tmp_path):
    folders = [write(tmp_path / a / "seed1", rows_of()) for a in ("fast", "slow")]
    main(*folders, f"--out_dir={tmp_path}/kept")
    assert [run["run"] for run in read(tmp_path / "kept" / "runs.csv")] == [
        "fast/seed1",
        "slow/seed1",
    ]
    with pytest.raises(UserError, match="given twice"):
        main(folders[0], folders[0], f"--out_dir={tmp_path}/kept")


def test_no_folder_of_the_machine_is_kept(tmp_path):
    command = [
        "--out_dir=/mnt/disk/out/x",
        "/home/me/configs/my.py",
        "--dataset=C:\\texts\\mine",
        "config/a.py",
    ]
    run = write(
        tmp_path / "run",
        rows_of(),
        command=command,
        dataset="/mnt/disk/mine",
        init_from="hf:/opt/llama",
    )
    main(run, f"--out_dir={tmp_path}/kept")
    (line,) = read(tmp_path / "kept" / "runs.csv")
    assert line["command"] == "train.py --out_dir=x my.py --dataset=mine config/a.py"
    assert (line["dataset"], line["init_from"]) == ("mine", "hf:llama")


def test_corpora_are_told_apart_by_what_is_in_them(tmp_path):
    hashes = [dict(sha256={"train.bin": a, "val.bin": "0"}) for a in ("1", "2", "1")]
    folders = [write(tmp_path / f"run{i}", rows_of(), data=data) for i, data in enumerate(hashes)]
    main(*folders, f"--out_dir={tmp_path}/kept")
    one, two, three = (run["fingerprint"] for run in read(tmp_path / "kept" / "runs.csv"))
    assert one == three != two


# ----------------------------------------------------------------------------------------------- the curves


@pytest.mark.parametrize("points", [20, 60])
def test_a_thinned_curve_keeps_ends_switch_and_validation(points):
    rows = rows_of(steps=2000, switch=600, validate=200)
    kept = keep.thinned(rows, points)
    steps = [row["step"] for row in kept]
    assert len(steps) <= points and steps == sorted(set(steps))
    assert {1, 599, 600, 601, 602, 2000, *range(200, 2001, 200)} <= set(steps)
    gaps = [b - a for a, b in zip(steps, steps[1:])]
    assert max(gaps) <= 2000 / (points - 16) * 3  # what room is left is used evenly
    assert all(row in rows for row in kept)


def test_a_short_curve_is_kept_whole_and_a_long_one_keeps_its_last_validation():
    assert keep.thinned(rows_of(steps=30, switch=10), 60) == rows_of(steps=30, switch=10)
    many = keep.thinned(
        rows_of(steps=1000, switch=1, validate=1), 20
    )  # more validation rows than room
    assert len(many) <= 20 and many[-1]["step"] == 1000


def test_every_switch_of_a_bag_size_that_steps_down_is_kept():
    rows = rows_of(steps=400, switch=0, validate=100)
    for row in rows:
        row["bag_size"] = 8 if row["step"] <= 100 else 4 if row["step"] <= 180 else 1
    pairs = [(old["step"], new["step"]) for old, new in plot.switches(keep.thinned(rows, 20))]
    assert pairs == [(100, 101), (180, 181)]


def test_curves_are_kept_of_the_runs_that_are_asked_for(pair, tmp_path, capsys):
    out = f"--out_dir={tmp_path}/kept"
    main(*pair, out, "--labels=baseline,TST", "--curves=TST")
    assert {row["run"] for row in read(tmp_path / "kept" / "curves.csv")} == {"tst"}
    main(*pair[:1], out, "--curves=all")
    main(
        *pair[:1], out, "--curves=none"
    )  # replaced: no curve of another run is left under its name
    assert {row["run"] for row in read(tmp_path / "kept" / "curves.csv")} == {"tst"}
    assert len(read(tmp_path / "kept" / "runs.csv")) == 2
    plot.main(parse(plot.Config, [str(tmp_path / "kept"), "--no_plot"]))
    assert "1 runs of 2 are kept without a curve: left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="--curves: other is no name or label"):
        main(*pair, out, "--curves=other")


# ---------------------------------------------------------------------------------------- plot reads it all


def test_what_is_kept_gives_the_table_of_the_runs(pair, tmp_path, capsys):
    args = ["--labels=baseline,TST", "--no_plot"]
    plot.main(parse(plot.Config, [*pair, *args]))
    of_runs = capsys.readouterr().out
    main(*pair, f"--out_dir={tmp_path}/kept", "--labels=baseline,TST")
    capsys.readouterr()
    plot.main(parse(plot.Config, [str(tmp_path / "kept"), "--no_plot"]))
    assert capsys.readouterr().out == of_runs
    assert "| " in of_runs and "At the switch" in of_runs


def test_kept_runs_are_chosen_by_name_or_label(pair, tmp_path):
    main(*pair, f"--out_dir={tmp_path}/kept", "--labels=baseline,TST")
    for wanted in ("tst", "TST"):
        (run,) = runs.read_runs([f"{tmp_path}/kept/{wanted}", pair[0]][:1])
        assert (run["name"], run["label"]) == ("tst", "TST")
        assert run["facts"]["n_layer"] == "2" and "val_loss" not in run["facts"]
    both = runs.read_runs(
        [f"{tmp_path}/kept/TST", pair[1]]
    )  # beside the run itself: nothing differs
    for run in both:
        run["label"] = run["label"] or "again"
    assert runs.notes_on_differences(both) == []
    with pytest.raises(UserError, match="no curve of nothing is kept there"):
        runs.read_runs([f"{tmp_path}/kept/nothing"])


@pytest.mark.parametrize(
    "file, damage, message",
    [
        (
            "curves.csv",
            lambda text: text.replace("tst,60,4", "tst,sixty,4"),
            "a row of tst does not hold numbers",
        ),
        ("curves.csv", lambda text: text + "tst,1\n", "row .* has not the columns"),
        (
            "curves.csv",
            lambda text: text.replace("\ntst,", "\nghost,"),
            "ghost is in curves.csv and not in runs.csv",
        ),
        ("runs.csv", lambda text: text + "half a row\n", "row 4 has not the columns"),
    ],
)
def test_damage_is_named(pair, tmp_path, file, damage, message):
    main(*pair, f"--out_dir={tmp_path}/kept")
    path = tmp_path / "kept" / file
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=message):
        runs.read_runs([tmp_path / "kept"])


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "--out_dir must name a folder"),
        (["--out_dir={}/kept", "--labels=a,b,c"], "3 labels for 1 runs"),
        (["--out_dir={}/kept", "--points=1"], "points must be at least 2"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path, args, message):
    with pytest.raises(UserError, match=message):
        main(write(tmp_path / "run", rows_of()), *[arg.format(tmp_path) for arg in args])


def test_a_run_without_config_is_not_kept(tmp_path):
    folder = write(tmp_path / "run", rows_of())
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(UserError, match="run has no config.json"):
        main(folder, f"--out_dir={tmp_path}/kept")
    assert not (tmp_path / "kept").exists()
