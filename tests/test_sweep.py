"""tools/sweep.py and the runner beneath it, with a trainer that takes no time in the place of train.py."""

import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from nanotst import UserError
from nanotst.configurator import parse
from tools import runner, sweep

ROOT = Path(__file__).resolve().parents[1]

# Its loss is lowest at s 4, r 0.3 and rate 0.01; it saves every 10 steps; its "dataset" is a file that must
# exist.
STUB = """
from __future__ import annotations
import json, os, signal, sys, time

class Config:
    out_dir: str = "out"
    resume: bool = False
    overwrite: bool = False
    threads: int = 0
    seed: int = 1337  # of everything
    bag_size: int | str = 1
    superposition_ratio: float = 0.3
    bag_weights: Literal["uniform", "power"] = "uniform"
    fitted: str = ""
    reinit_at_switch: str = ""
    learning_rate: float = 1e-2
    optimizer: str = "adamw"
    matrix_learning_rate: float = 0.0
    max_steps: int = 20
    dataset: str = ""
    pause: float = 0.0  # seconds a step
    eval_interval: int = 10

given = dict(arg[2:].partition("=")[::2] for arg in sys.argv[1:] if arg.startswith("--"))
for name in (arg for arg in sys.argv[1:] if not arg.startswith("--")):
    given = dict(line.split(" = ") for line in open(name)) | given  # a config file
at = lambda name: os.path.join(given["out_dir"], name)
steps, pause = int(given.get("max_steps", 20)), float(given.get("pause", 0))
seed, s = int(given.get("seed", 1337)), int(given.get("bag_size", "1").split("-")[0])
r, rate = float(given.get("superposition_ratio", 0.3)), float(given.get("learning_rate", 1e-2))
if given.get("dataset") and not os.path.exists(given["dataset"]):
    print("reading", flush=True)
    sys.exit(f"error: no corpus {given['dataset']}")
os.makedirs(given["out_dir"], exist_ok=True)
began = time.monotonic()
with open(at("starts.jsonl"), "a") as f:
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    f.write(json.dumps([sys.argv[1:], {name: os.environ.get(name) for name in names}]) + chr(10))
step = int(open(at("last.pt")).read()) if "resume" in given else 0
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
rows = open(at("metrics.jsonl")).readlines()[:step] if step else []  # one a step
f = open(at("metrics.jsonl"), "w")
f.writelines(rows)
while step < steps:
    step += 1
    time.sleep(pause)
    bad = 0.02 * abs(s - 4) ** 1.5 + abs(r - 0.3) + 10 * abs(rate - 0.01)
    loss = 3 + bad + 0.001 * seed + 5 / step
    if s == 1:
        loss = 3.5 + 0.001 * seed + 5 / step
    row = dict(step=step, bag_size=s, loss=loss, flops=step * 1e9, positions=step)
    if step % 10 == 0 or step == steps:
        row["val_loss"] = loss
    f.write(json.dumps(row) + chr(10))
    f.flush()
    if step % 10 == 0 or stopped:
        open(at("last.pt"), "w").write(str(step))
    if stopped:
        print(f"stopped after step {step}")
        sys.exit(1)
open(at("times"), "w").write(f"{began} {time.monotonic()}")
"""


@pytest.fixture
def trainer(tmp_path):
    path = tmp_path / "stub.py"
    path.write_text(STUB)
    return path


@pytest.fixture
def swept(tmp_path, trainer):
    """swept("--key=a,b", ...) runs a sweep in this process -> its folder."""

    def start(*arguments):
        argv = ["--plot=no", f"--out_dir={tmp_path}/sweep", *arguments]
        sweep.main(parse(sweep.Config, runner.places(argv, sweep.Config)), trainer)
        return tmp_path / "sweep"

    return start


def starts(folder):
    """[(arguments, environment)] of every start of the stub in a run folder."""
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


def names(folder):
    return sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))


def cells(text):
    """The table in a text as {first cell: the other cells}, without the line under the head."""
    lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    return {
        line[0].strip(): [cell.strip() for cell in line[1:]]
        for line in lines
        if not line[0].startswith("-")
    }


# ------------------------------------------------------------------------------------------------- the grid


def test_a_grid_trains_each_distinct_run_once(swept):
    out = swept(
        "--bag_size=1,2",
        "--superposition_ratio=0.2,0.3",
        "--seed=1,2",
        "--bag_weights=uniform,power",
    )
    ordinary = ["s1_seed1", "s1_seed2"]
    bagged = [
        f"s2_r{r}_bag_weights={w}_seed{i}"
        for r in ("0.2", "0.3")
        for w in ("power", "uniform")
        for i in (1, 2)
    ]
    assert names(out) == sorted(ordinary + bagged)
    arguments, _ = starts(out / "s1_seed1")[0]
    assert "--bag_size=1" in arguments and not any(
        "ratio" in arg or "weights" in arg for arg in arguments
    )


def test_no_superposition_is_ordinary_training_too(swept):
    assert names(swept("--bag_size=4", "--superposition_ratio=0,0.3")) == ["r0.3", "s1"]
    assert names(swept("--bag_size=1,4", "--superposition_ratio=0")) == [
        "r0.3",
        "s1",
    ]  # nothing new


def test_equal_values_are_one(trainer, tmp_path):
    members, varied = sweep.plan(["learning_rate=1e-2,0.01,0.02"], tmp_path, trainer)
    assert [member.name for member in members] == ["lr0.01", "lr0.02"] and varied == [
        "learning_rate"
    ]


def test_values_with_commas_stand_between_semicolons(swept):
    out = swept("--reinit_at_switch=;embedding,head;optimizer", "--bag_size=2")
    assert names(out) == [
        "reinit_at_switch=",
        "reinit_at_switch=embedding-head",
        "reinit_at_switch=optimizer",
    ]
    assert (
        "--reinit_at_switch=embedding,head" in starts(out / "reinit_at_switch=embedding-head")[0][0]
    )
    assert runner.alternatives("fitted", "a,b;") == ["a,b"]  # a single value with a comma


def test_one_value_of_some_knobs_may_hold_commas(trainer, tmp_path):
    both = ["reinit_at_switch=embedding,head", "dataset=dclm:0.5,fineweb_edu:0.5", "bag_size=2"]
    (member,), varied = sweep.plan(both, tmp_path, trainer)
    assert not varied and {f"--{knob}" for knob in both} == set(member.arguments)


def test_config_files_are_handed_on_and_known(swept, tmp_path):
    (tmp_path / "c.py").write_text("max_steps = 30\nbag_size = 3\n")
    out = swept(f"{tmp_path}/c.py", "--seed=1,2")
    settings = json.loads((out / "seed1" / "sweep.json").read_text())
    assert (settings["max_steps"], settings["bag_size"], settings["seed"]) == (30, 3, 1)
    assert (
        "threads" not in settings and "eval_interval" not in settings
    )  # nothing is learned otherwise
    assert '"step": 30' in (out / "seed1" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bag_sizes=1,2"], "unknown key 'bag_sizes', did you mean bag_size"),
        (["--job=2"], "unknown key 'job', did you mean jobs"),
        (["--max_steps=10,many"], "max_steps takes int, got 'many'"),
        (["--max_steps"], "write --max_steps=VALUE"),
        (["--resume", "--seed=1,2"], "leave --resume out"),
        (["--seed=1,2", "--rows=bag_size"], "bag_size does not vary here; what varies: seed"),
        (["--dataset=a/c;b/c"], "two runs would be called dataset=c"),
        (["--seed=1,2", "--columns=seed"], "seed is no axis: a cell is the mean of the seeds"),
        (
            ["--seed=1,2", "--best_of=lr"],
            "--best_of takes a knob of train.py but the seed, or none, got 'lr'",
        ),
        (["--eval_interval=5,10"], "--eval_interval takes one value: nothing is learned otherwise"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(swept, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        swept(*arguments)
    assert not (tmp_path / "sweep").exists()


def test_the_knobs_of_train_py_are_read():
    knobs = runner.knobs_of(runner.TRAINER)
    assert {
        "bag_size",
        "superposition_ratio",
        "seed",
        "max_steps",
        "out_dir",
        "threads",
    } <= knobs.keys()
    assert (knobs["max_steps"].type, knobs["superposition_ratio"].default) == (int, 0.3)


# ------------------------------------------------------------------------------------------------ going on


def test_what_is_done_is_skipped_and_a_grid_may_grow(swept, capsys):
    out = swept("--bag_size=2", "--seed=1,2")
    swept("--bag_size=2,4", "--seed=1,2")
    assert "2 of 4 runs are done already" in capsys.readouterr().out
    assert names(out) == [
        "s4_seed1",
        "s4_seed2",
        "seed1",
        "seed2",
    ]  # a run is known by its settings
    assert all(len(starts(out / name)) == 1 for name in names(out))


def test_what_was_cut_goes_on_and_what_has_no_checkpoint_starts_anew(swept, tmp_path):
    out = swept("--seed=1,2,3")
    for seed, steps in ((1, 14), (2, 4)):
        log = out / f"seed{seed}" / "metrics.jsonl"
        log.write_text(
            "".join(log.read_text().splitlines(keepends=True)[:steps]) + '{"step": 15, "lo'
        )
    (out / "seed1" / "last.pt").write_text("10")
    (out / "seed2" / "last.pt").unlink()
    swept("--seed=1,2,3")
    flags = [[arg for arg in starts(out / f"seed{i}")[-1][0] if "=" not in arg] for i in (1, 2, 3)]
    assert flags == [["--resume"], ["--overwrite"], []] and len(starts(out / "seed3")) == 1


def test_a_failed_run_is_survived_reported_and_tried_again(swept, tmp_path, capsys):
    missing, there = tmp_path / "missing", tmp_path / "there"
    there.write_text("")
    with pytest.raises(UserError, match="1 of 2 runs failed; the same command tries them again"):
        swept(f"--dataset={missing};{there}")
    printed = capsys.readouterr().out
    assert (
        f"failed (exit 1, {tmp_path}/sweep/" in printed
        and f"log.txt): error: no corpus {missing}\n" in printed
    )
    assert cells(printed)["val loss"][0] == "not done"
    missing.write_text("")
    swept(f"--dataset={missing};{there}")
    assert "not done" not in cells(capsys.readouterr().out)["val loss"][0]


def test_nothing_done_gives_the_reason(swept, tmp_path):
    with pytest.raises(UserError, match="none of 2 runs is done: error: no corpus"):
        swept(f"--dataset={tmp_path}/missing", "--seed=1,2")


def test_damaged_metrics_are_one_failed_run(swept, tmp_path, capsys):
    out = swept("--seed=1,2")
    (out / "seed1" / "metrics.jsonl").write_text("x\n{}\n")
    (out / "seed1" / "last.pt").write_text("20")
    with pytest.raises(UserError, match="1 of 2 runs failed"):
        swept("--seed=1,2")
    assert "(1 of 2)" in capsys.readouterr().out


def test_another_run_in_the_folder_is_not_touched(swept, tmp_path):
    swept("--seed=1,2", "--max_steps=10")
    with pytest.raises(
        UserError, match="seed1 holds another run, with max_steps 10 instead of 20: give another"
    ):
        swept("--seed=1,2")
    (tmp_path / "sweep" / "s2").mkdir()
    (tmp_path / "sweep" / "s2" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="s2 holds another run: give another"):
        swept("--bag_size=2,3")


def test_a_knob_that_is_younger_than_a_run_had_its_default(swept, trainer, capsys):
    swept("--seed=1,2")
    trainer.write_text(STUB.replace("    max_steps:", "    young: int = 5\n    max_steps:"))
    swept("--seed=1,2")
    assert "2 of 2 runs are done already" in capsys.readouterr().out


def test_ctrl_c_stops_the_runs_at_a_checkpoint_and_the_next_start_goes_on(swept, trainer, tmp_path):
    arguments = ["--seed=1,2", "--jobs=2", "--pause=0.02", "--max_steps=40"]
    code = f"""
import sys
from functools import partial
from nanotst.configurator import entry_point
from tools import runner, sweep
main = partial(sweep.main, trainer={str(trainer)!r})
entry_point(main, sweep.Config, runner.places(sys.argv[1:], sweep.Config))
"""
    command = [sys.executable, "-c", code, *arguments, f"--out_dir={tmp_path}/sweep"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    logs = [tmp_path / "sweep" / f"seed{i}" / "metrics.jsonl" for i in (1, 2)]
    while not all(log.exists() and log.stat().st_size for log in logs):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed = process.communicate()[0]
    assert process.returncode == 130 and "stopping 2 at a checkpoint" in printed
    for log in logs:
        assert "stopped after step" in (log.parent / "log.txt").read_text()
        assert 0 < int((log.parent / "last.pt").read_text()) < 40
    swept(*arguments[:1], "--pause=0.02", "--max_steps=40")
    for log in logs:
        assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(
            range(1, 41)
        )
        assert "--resume" in starts(log.parent)[-1][0]


# ------------------------------------------------------------------------------------------------ machine


def test_each_job_has_its_share_of_the_cores(swept, monkeypatch):
    monkeypatch.setattr(runner, "cores", lambda: 12)
    out = swept("--seed=1,2,3", "--jobs=3", "--gpus=none")
    for name in names(out):
        arguments, environment = starts(out / name)[0]
        assert "--threads=4" in arguments and environment["OMP_NUM_THREADS"] == "4"


def test_jobs_at_a_time_have_a_gpu_each(swept, monkeypatch):
    out = swept("--seed=1,2,3,4,5", "--gpus=0,3", "--pause=0.01")
    spans = []  # (GPU, begin, end) of each run
    for name in names(out):
        gpu = starts(out / name)[0][1]["CUDA_VISIBLE_DEVICES"]
        spans.append((gpu, *map(float, (out / name / "times").read_text().split())))
    pairs = [(a, b) for a, b in itertools.combinations(spans, 2) if a[1] < b[2] and b[1] < a[2]]
    assert pairs and all(
        {a[0], b[0]} == {"0", "3"} for a, b in pairs
    )  # at the same time, on another GPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert runner.find_gpus("auto") == ["2", "5"]


def test_without_gpus_none_is_seen(swept):
    out = swept("--seed=1,2", "--jobs=2", "--gpus=none")
    assert [starts(out / name)[0][1]["CUDA_VISIBLE_DEVICES"] for name in names(out)] == ["", ""]


@pytest.mark.parametrize(
    "text, code, gpus", [("0\n1\n", 0, ["0", "1"]), ("no driver is running\n", 9, [])]
)
def test_gpus_are_those_of_nvidia_smi_if_its_driver_runs(monkeypatch, tmp_path, text, code, gpus):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '{text}'\nexit {code}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runner.find_gpus("auto") == gpus


def test_progress_counts_steps(trainer, tmp_path, monkeypatch):
    members, _ = sweep.plan(["seed=1,2,3,4", "max_steps=100"], tmp_path, trainer)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = runner.Progress(members)
    assert progress.line([]) == "0 of 4 done | eta unknown"
    for member, step in zip(members, (100, 50)):
        member.folder.mkdir()
        (member.folder / "metrics.jsonl").write_text(
            f'{{"step": 1}}\n{{"step": {step}, "loss": 1}}\n'
        )
    clock[0] = 3600.0  # 150 steps an hour, 250 are left
    assert progress.line([members[1]]) == "1 of 4 done | seed2 50% | eta 1h40m"
    progress.failed["seed4"] = "why"
    assert progress.line([members[1]]) == "1 of 4 done | 1 failed | seed2 50% | eta 1h00m"


@pytest.fixture
def at(trainer, tmp_path, monkeypatch):
    """at(seconds, running, step, ...) -> the line when the members are at these steps of 1000."""
    members, _ = sweep.plan(["seed=1,2,3,4", "max_steps=1000"], tmp_path, trainer)
    progress = []

    def line(seconds, running, *steps):
        for member, step in zip(members, steps):
            member.folder.mkdir(exist_ok=True)
            (member.folder / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
        monkeypatch.setattr(time, "monotonic", lambda: seconds)
        if not progress:
            progress.append(runner.Progress(members[: len(steps)]))
        return progress[0].line(members[:running])

    return line


def test_the_time_left_after_a_kill_counts_from_the_checkpoint(at):
    assert at(0, 1, 980).endswith("eta unknown")
    at(1, 1, 760)
    assert at(3601, 1, 880).endswith(
        "88% | eta 1h01m"
    )  # 120 steps in an hour, and as many are left


def test_a_run_left_alone_cannot_share_its_work(at):
    at(0, 4, 0, 0, 0, 0)
    assert "eta 1h00m" in at(3600, 4, 500, 500, 500, 500)
    at(
        7200, 4, 1000, 1000, 1000, 500
    )  # the last one was held up, and three quarters of the work are done
    assert at(7200, 1, 1000, 1000, 1000, 500).endswith(
        "eta 1h09m"
    )  # 4 x 2 hours for 3500 steps, 500 left


# ----------------------------------------------------------------------------------------- table and picture


def test_table_has_r_by_s_with_the_best_marked(swept, capsys):
    out = swept("--bag_size=1,2,4,8", "--superposition_ratio=0.2,0.3", "--seed=1,3", "--plot")
    printed = capsys.readouterr().out
    table = cells(printed)
    assert table["superposition_ratio \\ bag_size"] == ["2", "4", "8"]
    assert table["0.3"][1] == "**3.2520 ± 0.0014 (2)**" and table["0.2"][1] == "3.3520 ± 0.0014 (2)"
    assert "ordinary training: 3.7520 ± 0.0014 (2)" in printed and printed.count("**") == 2
    written = (out / "table.md").read_text()
    assert cells(written) == table and "`python -m tools.sweep" in written
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_csv_has_a_line_for_every_run(swept):
    out = swept("--bag_size=1,4", "--superposition_ratio=0.2,0.3")
    with open(out / "runs.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(row["run"], row["bag_size"], row["superposition_ratio"]) for row in rows] == [
        ("s1", "1", ""),
        ("s4_r0.2", "4", "0.2"),
        ("s4_r0.3", "4", "0.3"),
    ]
    end = json.loads((out / "s4_r0.3" / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(rows[2]["val_loss"]) == end["val_loss"] and int(rows[2]["step"]) == 20


def test_each_cell_is_taken_at_its_best_rate(swept, capsys):
    swept("--bag_size=1,2,4", "--learning_rate=0.005,0.01,0.02", "--seed=1,2")
    printed = capsys.readouterr().out
    assert cells(printed)["val loss"][2] == "**3.2515 ± 0.0007 (2, lr 0.01)**"
    assert (
        "Each cell at its best learning_rate; for 1 that is the lowest or highest tried" in printed
    )  # ordinary
    swept("--bag_size=1,2,4", "--learning_rate=0.005,0.01,0.02", "--seed=1,2", "--best_of=none")
    table = cells(capsys.readouterr().out)
    assert (
        table["learning_rate \\ bag_size"] == ["1", "2", "4"]
        and table["0.02"][2] == "3.3515 ± 0.0007 (2)"
    )


def test_any_two_knobs_and_a_table_for_each_value_of_a_third(swept, capsys):
    swept(
        "--bag_size=1,4,8", "--bag_weights=uniform,power", "--max_steps=10,20", "--rows=bag_weights"
    )
    printed = capsys.readouterr().out
    assert "**max_steps 10**" in printed and "**max_steps 20**" in printed
    assert printed.count("bag_weights \\ bag_size") == 2
    ten = printed[printed.index("max_steps 10") : printed.index("max_steps 20")]
    assert ten.count("ordinary training") == 1 and "ordinary training, max_steps 10" in ten


def test_a_missing_seed_is_shown_and_never_the_best(swept, trainer, tmp_path, capsys):
    trainer.write_text(
        STUB.replace("stopped = []", "stopped = []\nif (s, seed) == (4, 2): sys.exit('diverged')")
    )
    with pytest.raises(UserError, match="1 of 4 runs failed"):
        swept("--bag_size=2,4", "--seed=1,2")
    two, four = cells(capsys.readouterr().out)["val loss"]
    assert two.startswith("**") and four == "3.2510 (1 of 2)"


def test_only_tabulate(swept, tmp_path, capsys):
    out = swept("--bag_size=2", "--seed=1,2")
    before = capsys.readouterr().out
    swept("--bag_size=2", "--seed=1,2,3", "--train=no")
    after = capsys.readouterr().out
    assert "(2)" in cells(before)["val loss"][0] and "(2 of 3)" in cells(after)["val loss"][0]
    assert names(out) == ["seed1", "seed2"]


def test_without_matplotlib_the_table_is_there_all_the_same(swept, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="needs the package matplotlib; --plot=no"):
        swept("--seed=1,2", "--plot")
    assert cells(capsys.readouterr().out)


def mean_loss(s, r=0.3, seeds=(1, 3)):
    """What the stub's seeds end at; bag size 1 is ordinary training."""
    bad = 0.5 if s == 1 else 0.02 * abs(s - 4) ** 1.5 + abs(r - 0.3)
    return 3 + bad + 0.001 * sum(seeds) / len(seeds) + 5 / 20


@pytest.fixture
def pictured(swept, monkeypatch):
    """pictured("--key=a,b", ...) -> the axes of the picture that a sweep writes."""

    def start(*arguments):
        figures, save = [], sweep.save_picture
        monkeypatch.setattr(sweep, "save_picture", lambda *to: (figures.append(to[0]), save(*to)))
        assert (swept(*arguments, "--plot") / "sweep.png").read_bytes().startswith(b"\x89PNG")
        return figures[0].axes

    return start


def ticks(axis):
    """{label: place} of an axis."""
    return {
        label.get_text(): place for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels())
    }


def curves(ax):
    """{label: (x, y)} of the lines that the legend names."""
    lines = (line for line in ax.get_lines() if not line.get_label().startswith("_"))
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def test_picture_of_r_by_s(pictured):
    sizes, ratios = (2, 4, 8), (0.1, 0.2, 0.3, 0.4)
    left, right, bar = pictured(
        "--bag_size=1,2,4,8", "--superposition_ratio=0.1,0.2,0.3,0.4", "--seed=1,3"
    )
    for r in ratios:
        x, y = curves(left)[f"r {r}"]
        assert x == [2, 4, 8] and y == pytest.approx([mean_loss(s, r) for s in sizes])
    assert curves(left)["ordinary training"][1] == pytest.approx([mean_loss(1)] * 2)
    assert ticks(left.xaxis) == {"2": 2, "4": 4, "8": 8} and left.get_xlabel() == "bag_size"

    (image,) = right.images
    expected = [[mean_loss(s, r) - mean_loss(1) for s in sizes] for r in ratios]
    assert np.array(image.get_array()) == pytest.approx(np.array(expected))
    assert (
        image.origin == "lower" and image.get_clim()[0] == -image.get_clim()[1]
    )  # white: ordinary training
    assert (right.get_xlabel(), right.get_ylabel()) == ("bag_size", "superposition_ratio")
    assert ticks(right.xaxis) == {"2": 0, "4": 1, "8": 2}
    assert ticks(right.yaxis) == {"0.1": 0, "0.2": 1, "0.3": 2, "0.4": 3}
    written = {text.get_position(): text for text in right.texts}
    assert len(written) == 12
    for (x, y), text in written.items():
        assert text.get_text() == f"{mean_loss(sizes[x], ratios[y]):.3f}"
        assert (text.get_weight() == "bold") == ((x, y) == (1, 2))  # s 4, r 0.3
    red, _, blue, _ = image.to_rgba(-0.5)
    assert blue > red and "difference from ordinary training" in bar.get_ylabel()


def test_picture_of_words_without_ordinary_training(pictured):
    left, right, bar = pictured("--bag_weights=uniform,power", "--bag_size=4,8")
    losses = [mean_loss(s, seeds=(1337,)) for s in (4, 8)]
    (image,) = right.images
    assert np.array(image.get_array()) == pytest.approx(np.array([losses, losses]))
    assert list(ticks(right.yaxis)) == ["uniform", "power"] and list(ticks(right.xaxis)) == [
        "4",
        "8",
    ]
    assert bar.get_ylabel() == "validation loss (nats per token)"
    assert {label: y for label, (_, y) in curves(left).items()} == {
        f"bag_weights {kind}": pytest.approx(losses) for kind in ("uniform", "power")
    }


def test_picture_of_rates_is_on_a_logarithmic_axis(pictured):
    (ax,) = pictured("--learning_rate=0.0001,0.01", "--bag_size=4", "--seed=1,3")
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "learning_rate"
    assert ticks(ax.xaxis) == {"0.0001": 0.0001, "0.01": 0.01}
    assert list(ax.get_lines()[0].get_xdata()) == [0.0001, 0.01]
    assert list(ax.get_lines()[0].get_ydata()) == pytest.approx(
        [mean_loss(4) + 0.099, mean_loss(4)]
    )


def test_picture_of_seeds_alone_shows_each(pictured):
    (ax,) = pictured("--seed=1,3")
    mean, *seeds = (
        list(line.get_ydata()) for line in ax.get_lines() if line.get_marker() in ("o", "_")
    )
    assert mean == pytest.approx([mean_loss(1)]) and ax.get_xlabel() == "all runs"
    assert [sorted(each) for each in seeds if len(each) == 2] == [
        [mean_loss(1, seeds=[i]) for i in (1, 3)]
    ]


def test_an_outlier_does_not_press_the_picture_together():
    group = lambda mean: sweep.Group({}, [mean], 1)
    usual = {(r, s): group(3 + r / 10 + s / 100) for r in range(5) for s in range(1, 5)}
    table = lambda cells, *baselines: sweep.Table(
        "", "r", "s", cells, [group(b) for b in baselines]
    )
    assert table(usual).limits == pytest.approx((3.01, 3.44))
    assert table(usual | {(9, 9): group(9.0)}).limits[1] < 4.1
    assert (
        table(usual | {(9, 9): group(9.0)}, 5.0).limits[1] == 5.0
    )  # ordinary training is always shown


def test_a_knob_that_nothing_reads_makes_no_other_run(tmp_path):
    """The file of fitted weights is read by those alone: with others a run is the one without it."""
    members, _ = sweep.plan(["bag_size=2", "bag_weights=power,fitted", "fitted=f.json"], tmp_path)
    assert [member.settings["fitted"] for member in members] == ["", "f.json"]
    (plain,), _ = sweep.plan(["bag_size=2", "bag_weights=power"], tmp_path)
    assert members[0].settings == plain.settings


def test_an_idle_knob_is_neither_named_nor_given(tmp_path):
    grid = ["bag_size=2", "bag_weights=power,fitted", "fitted=a.json,b.json"]
    power, *fitted = sweep.plan(grid, tmp_path)[0]
    assert power.name == "bag_weights=power" and "fitted" not in power.point
    assert not any("fitted" in argument for argument in power.arguments)
    assert [member.settings["fitted"] for member in (power, *fitted)] == ["", "a.json", "b.json"]


def test_a_run_without_a_knob_stands_at_each_of_its_values(swept, capsys):
    grid = ["--optimizer=adamw,muon", "--matrix_learning_rate=0.004,0.008"]
    out = swept(*grid)
    assert len(names(out)) == 3
    table = cells(capsys.readouterr().out)
    assert table["matrix_learning_rate \\ optimizer"] == ["adamw", "muon"]
    assert table["0.004"] == table["0.008"] and not table["0.004"][0].startswith("-")
    swept(*grid, "--bag_size=1,2", "--superposition_ratio=0.2,0.3")  # tables of their own
    printed = capsys.readouterr().out
    assert (
        printed.count("**optimizer adamw, matrix_learning_rate 0.004") == 1
        and "None" not in printed
    )
    swept(*grid, "--bag_size=2,4", "--best_of=optimizer")
    table = cells(capsys.readouterr().out)
    assert all(
        "(1, optimizer adamw)" in cell for cell in table["0.004"] + table["0.008"]
    )  # the first of equals


def test_rows_without_columns_are_columns(swept, capsys):
    for extra in ([], ["--rows=superposition_ratio"]):
        text = (
            swept("--bag_size=2", "--superposition_ratio=0.2,0.3", *extra) / "table.md"
        ).read_text()
        assert cells(text)["superposition_ratio"] == ["0.2", "0.3"] and "None" not in text


def test_axes_are_chosen_by_preference():
    def axes(*varied, **knobs):
        return sweep.axes_of(varied, sweep.Config([], **knobs))

    assert axes("superposition_ratio", "loss", "bag_size") == (
        "superposition_ratio",
        "bag_size",
        ["loss"],
    )
    assert axes("superposition_ratio", "loss") == ("superposition_ratio", "loss", [])
    assert axes("bag_size", "loss", rows="bag_size") == ("bag_size", "loss", [])
    assert axes("bag_size", "loss", "superposition_ratio", columns="loss")[1:] == (
        "loss",
        ["bag_size"],
    )
    assert axes("seed", "learning_rate") == ("", "learning_rate", []) and axes("seed") == (
        "",
        "",
        [],
    )
    assert axes("bag_size", "learning_rate", rows="learning_rate") == (
        "learning_rate",
        "bag_size",
        [],
    )


def test_seeds_alone_have_a_column_without_a_name(swept):
    members, varied = sweep.plan(["bag_size=2", "seed=1,2"], "nowhere")
    (table,), _ = sweep.tables_of(members, varied, sweep.Config([]))
    assert [sweep.shown(value) for value in table.column_values] == [""]


def test_the_best_of_values_without_an_order_has_no_edge(swept, capsys):
    swept("--bag_size=2,8-4-2", "--learning_rate=0.01,0.02", "--best_of=bag_size")
    printed = capsys.readouterr().out
    assert "Each cell at its best bag_size." in printed and "(1, s 2)" in printed


def test_the_command_in_the_table_can_be_pasted(swept, monkeypatch):
    arguments = ["--reinit_at_switch=;embedding;head", "--bag_size=2"]
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
    command = (swept(*arguments) / "table.md").read_text().splitlines()[-1].strip("`")
    assert command == "python -m tools.sweep '--reinit_at_switch=;embedding;head' --bag_size=2"


def test_the_knobs_of_superposition_are_those_of_that_section_of_train_py():
    section = runner.TRAINER.read_text().split("    # Token superposition")[1].split("\n\n")[0]
    assert set(re.findall(r"^    (\w+):", section, re.M)) == runner.SUPERPOSITION


def test_one_bag_size_stands_beside_no_other(swept):
    """With a single bag size above 1, what it is combined with are the columns, and its title says it."""
    text = (swept("--bag_size=1,4", "--superposition_ratio=0.2,0.3") / "table.md").read_text()
    assert "**bag_size 4**" in text and "ordinary training: " in text
    table = cells(text)
    assert table["superposition_ratio"] == ["0.2", "0.3"] and len(table["val loss"]) == 2


def test_the_picture_of_bag_sizes_shows_ordinary_training():
    table = sweep.Table("", "", "bag_size", {(None, 1): sweep.Group({}, [3.5], 1)}, [])
    figure = Figure()
    ax = figure.subplots()
    sweep.draw_curves(ax, table)
    assert [line.get_ydata()[0] for line in ax.get_lines() if line.get_linestyle() == "--"] == [3.5]
    assert ax.get_legend().get_texts()[0].get_text() == "ordinary training"
