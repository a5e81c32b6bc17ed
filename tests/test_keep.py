"""tools/keep.py: what is kept of finished runs, and that it gives the same table as the runs."""

import csv
import json

import pytest
from conftest import ROOT

from nanotst import UserError
from nanotst.configurator import RENAMED, parse
from tools import keep, plot, runs

KNOBS = dict(out_dir="out/x", seed=1, bag_size=4, superposition_ratio=0.3, schedule="wsd")
KNOBS |= dict(learning_rate=0.008, n_layer=2, dataset="mine", threads=1, max_steps=200, loss="mce")
KNOBS |= dict(decay_ratio=0.2)
VERSIONS = dict(python="3.11", torch="2.13", device="x86_64", dtype="bfloat16", world_size=1)


def rows_of(steps=200, switch=60, bag_size=4, validate=20):
    """Rows of a run with a loss that says its step, as train.py would log every step."""
    rows, data = [], 0
    for step in range(1, steps + 1):
        s = bag_size if step <= switch else 1
        data += 64 * s
        row = dict(step=step, phase="x", bag_size=s, loss=5 - step / 100 + 1 / 3, lr=0.1, epoch=0.5)
        row |= dict(positions=64 * step, data_tokens=data, flops=step * 10**13, seconds=step / 7)
        row |= dict(positions_per_second=100.0 + (step == steps) * 10**6, my_metric=step / 2)
        if step % validate == 0:
            row |= dict(val_loss=4.9 - step / 100, val_bpb=2 - step / 300, val_loss_code=2.0)
        rows.append(row)
    return rows


def write(folder, rows, command=(), **knobs):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = dict(config=KNOBS | knobs, versions=VERSIONS, command=["train.py", *command])
    described |= dict(parameters=7, active_parameters=5)
    described["data"] = dict(vocab_size=256, encoding="bytes", train_tokens=1000, fingerprint="f")
    (folder / "config.json").write_text(json.dumps(described))
    return str(folder)


def main(*args):
    keep.main(parse(keep.Config, [str(arg) for arg in args]))


def read(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture
def pair(tmp_path):
    rows = rows_of(bag_size=1)
    rows[-1]["val_loss"] = 9.0  # the best one is 3.1, at step 180
    baseline = write(tmp_path / "base", rows, bag_size=1)
    return [baseline, write(tmp_path / "tst", rows_of(), command=["--bag_size=4"])]


def test_a_row_says_how_the_run_ended_and_all_that_made_it(pair, tmp_path):
    main(*pair, f"--out_dir={tmp_path}/kept", "--labels=baseline,TST")
    base, tst = read(tmp_path / "kept" / "runs.csv")
    first = ["run", "label", "bag_size", "steps", "val_loss"]  # what differs comes first
    assert list(base)[:5] == first
    assert [list(run.values())[:2] for run in (base, tst)] == [["base", "baseline"], ["tst", "TST"]]
    assert (tst["steps"], float(tst["val_loss"])) == ("200", 2.9)
    assert (base["val_loss"], base["best_val_loss"], base["best_step"]) == ("9", "3.1", "180")
    assert (tst["positions"], tst["data_tokens"]) == (str(64 * 200), str(64 * (4 * 60 + 140)))
    assert tst["flops"] == "2000000000000000"  # counts are exact
    assert tst["positions_per_second"] == "100"  # the median: one odd row does not count
    assert [tst["machine"], tst["precision"], tst["ranks"]] == ["x86_64", "bfloat16", "1"]
    assert [tst["parameters"], tst["vocab_size"], tst["fingerprint"]] == ["7", "256", "f"]
    assert tst["command"] == "train.py --bag_size=4" and "out_dir" not in tst
    assert all(tst[key] == str(value) for key, value in KNOBS.items() if key != "out_dir")


def test_a_metric_needs_no_registration(pair, tmp_path, capsys):
    main(*pair, f"--out_dir={tmp_path}/kept")
    (_, line), curve = read(tmp_path / "kept" / "runs.csv"), read(tmp_path / "kept" / "curves.csv")
    assert (line["my_metric"], line["val_loss_code"]) == ("100", "2")
    assert all(float(row["my_metric"]) == int(row["step"]) / 2 for row in curve)
    plot.main(parse(plot.Config, [f"{tmp_path}/kept", "--plot=no"]))
    assert "my_metric" not in capsys.readouterr().out.partition("Not the same")[2]


def test_kept_runs_stay_except_those_of_the_same_name(pair, tmp_path):
    main(*pair, f"--out_dir={tmp_path}/kept")
    write(tmp_path / "base", rows_of(steps=100, bag_size=1), bag_size=1, n_layer=3)
    main(pair[0], f"--out_dir={tmp_path}/kept", "--curves=none")
    table, curves = read(tmp_path / "kept" / "runs.csv"), read(tmp_path / "kept" / "curves.csv")
    ends = [(run["run"], run["steps"], run["n_layer"]) for run in table]
    assert ends == [("base", "100", "3"), ("tst", "200", "2")]
    assert {row["run"] for row in curves} == {"tst"}
    assert list(table[0])[2:4] == ["bag_size", "n_layer"]


def test_names_tell_runs_apart(tmp_path):
    folders = [write(tmp_path / a / "seed1", rows_of()) for a in ("fast", "slow")]
    main(*folders, f"--out_dir={tmp_path}/kept")
    names = [run["run"] for run in read(tmp_path / "kept" / "runs.csv")]
    assert names == ["fast/seed1", "slow/seed1"]
    with pytest.raises(UserError, match="one run is given twice"):
        main(folders[0], folders[0], f"--out_dir={tmp_path}/kept")
    with pytest.raises(UserError, match="3 labels for 2 runs"):
        main(*folders, f"--out_dir={tmp_path}/kept", "--labels=a,b,c")


def test_no_folder_of_the_machine_is_kept(tmp_path):
    command = ["--out_dir=/mnt/out/x", "/home/me/my.py", "--dataset=C:\\texts\\mine", "config/a.py"]
    knobs = dict(dataset="/mnt/disk/mine", init_from="hf:/opt/llama")
    main(write(tmp_path / "run", rows_of(), command, **knobs), f"--out_dir={tmp_path}/kept")
    (line,) = read(tmp_path / "kept" / "runs.csv")
    assert line["command"] == "train.py --out_dir=x my.py --dataset=mine config/a.py"
    assert (line["dataset"], line["init_from"]) == ("mine", "hf:llama")


def test_a_thinned_curve_keeps_ends_switches_and_validation():
    rows = rows_of(steps=2000, switch=650, validate=200)  # no validation around the switch
    steps = [row["step"] for row in keep.thinned(rows, 20)]
    assert len(steps) <= 20 + 10 + 7 and steps == sorted(set(steps))
    assert {1, 650, 651, 2000, *range(200, 2001, 200)} <= set(steps)
    assert max(b - a for a, b in zip(steps, steps[1:])) <= 101


def test_kept_runs_give_the_table_of_the_runs(pair, tmp_path, capsys):
    plot.main(parse(plot.Config, [*pair, "--labels=baseline,TST", "--plot=no"]))
    of_runs = capsys.readouterr().out
    main(*pair, f"--out_dir={tmp_path}/kept", "--labels=baseline,TST")
    capsys.readouterr()
    plot.main(parse(plot.Config, [f"{tmp_path}/kept", "--plot=no"]))
    assert capsys.readouterr().out == of_runs and "At the switch" in of_runs


def test_kept_runs_are_chosen_by_name_or_label(pair, tmp_path, capsys):
    main(*pair, f"--out_dir={tmp_path}/kept", "--labels=baseline,TST", "--curves=TST")
    for wanted in ("tst", "TST", "t*"):
        (run,) = runs.read_runs([f"{tmp_path}/kept/{wanted}"])
        assert (run["name"], run["label"], run["facts"]["n_layer"]) == ("tst", "TST", "2")
    with pytest.raises(UserError, match="no run of the name or label nothing is kept there"):
        runs.read_runs([f"{tmp_path}/kept/nothing"])
    base, _ = runs.read_runs([f"{tmp_path}/kept"])  # without a curve
    assert [(row["step"], row["val_loss"]) for row in base["rows"]] == [(200, 9)]
    plot.main(parse(plot.Config, [f"{tmp_path}/kept", "--plot=no"]))
    assert "1 of 2 runs have no curve" in capsys.readouterr().err


def test_the_table_of_a_sweep_is_not_taken_for_kept_runs(tmp_path):
    (tmp_path / "runs.csv").write_text("run,seed,step,val_loss\nseed1,1,20,3.0\n")
    with pytest.raises(UserError, match="not the folder of a run"):
        runs.read_runs([tmp_path])


def test_the_committed_results_are_read():
    """Older code wrote them, with columns such as tokens_per_second, z_coef and fitted_c0."""
    for path in ROOT.glob("results/*/runs.csv"):
        found = runs.read_runs([path.parent])
        assert found and any(len(run["rows"]) > 1 for run in found)
        assert not any(RENAMED.keys() & run["facts"].keys() for run in found)
