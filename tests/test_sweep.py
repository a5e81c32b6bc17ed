"""tools/sweep.py, with tests/stub_trainer.py in the place of train.py."""

import csv
import json
import os
import signal
import sys
import threading
import time

import pytest
import stub_trainer
from stub_trainer import end_of, lines, names

from nanotst import UserError
from nanotst.configurator import parse
from tools import sweep

STEPS = 20
GIVEN = [f"--max_steps={STEPS}", "--learning_rate=0.01", "--plot=no"]


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """swept("--key=a,b", ...) runs a sweep in this process -> its folder."""
    monkeypatch.setattr(sweep, "TRAINER", stub_trainer.__file__)

    def start(*arguments):
        argv = [*GIVEN, f"--out_dir={tmp_path}/sweep", *arguments]
        sweep.main(parse(sweep.Config, sweep.as_positional(argv, sweep.Config)))
        return tmp_path / "sweep"

    return start


def starts(folder):
    """[(arguments, environment)] of every start of the stub in a run folder."""
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


def test_ratio_zero_is_the_baseline(swept):
    out = swept("--bag_size=4", "--superposition_ratio=0,0.3")
    assert names(out) == ["r0.3", "s1"]
    ((arguments, _),) = starts(out / "s1")
    assert "--bag_size=1" in arguments and not any("position" in arg for arg in arguments)
    assert names(swept("--bag_size=1,4")) == ["r0.3", "s1"]  # a run is known by its settings


def test_values_with_commas_are_separated_by_semicolons(tmp_path):
    grid = ["reinit_at_switch=;embedding,head", "bag_size=2", "dataset=dclm:0.5,fineweb_edu:0.5"]
    (_, member), varied = sweep.plan(grid, tmp_path)
    assert member.folder.name == "reinit_at_switch=embedding-head"
    assert (
        varied == ["reinit_at_switch"] and "--reinit_at_switch=embedding,head" in member.arguments
    )
    assert "--dataset=dclm:0.5,fineweb_edu:0.5" in member.arguments


def test_config_files_are_passed_on_and_known(tmp_path):
    (tmp_path / "c.py").write_text("max_steps = 30\nbag_size = 3\nthreads = 2\n")
    (member, _), _ = sweep.plan([f"{tmp_path}/c.py", "seed=1,2"], tmp_path)
    assert member.arguments == [f"{tmp_path}/c.py", "--seed=1"]
    assert (member.settings["max_steps"], member.settings["bag_size"]) == (30, 3)
    assert "threads" not in member.settings  # changes nothing that is learned
    assert "dataset" in member.settings


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bag_sizes=1,2"], "unknown key 'bag_sizes', did you mean bag_size"),
        (["--max_steps=10,many"], "max_steps takes int, got 'many'"),
        (["--max_steps"], "write --max_steps=VALUE"),
        (["--eval_interval=5,10"], "--eval_interval takes one value"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(swept, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        swept(*arguments)
    assert not (tmp_path / "sweep").exists()


def test_finished_runs_are_skipped_and_a_grid_may_grow(swept, capsys):
    out = swept("--bag_size=2", "--seed=1,2")
    swept("--bag_size=2,4", "--seed=1,2")
    assert "2 of 4 runs are done already" in capsys.readouterr().out
    assert names(out) == ["s4_seed1", "s4_seed2", "seed1", "seed2"]
    assert all(len(starts(out / name)) == 1 for name in names(out))


def test_interrupted_runs_resume_or_start_again(swept):
    out = swept("--seed=1,2,3")
    for seed, steps in ((1, 14), (2, 4)):
        log = out / f"s1_seed{seed}" / "metrics.jsonl"
        rows = log.read_text().splitlines(keepends=True)[:steps]
        log.write_text("".join(rows) + '{"step": 15, "lo')
    (out / "s1_seed1" / "last.pt").write_text("10")
    (out / "s1_seed2" / "last.pt").unlink()
    swept("--seed=1,2,3")
    flags = [
        [arg for arg in starts(out / f"s1_seed{i}")[-1][0] if "=" not in arg] for i in (1, 2, 3)
    ]
    assert (
        flags == [["--resume"], ["--overwrite"], ["--overwrite"]]
        and len(starts(out / "s1_seed3")) == 1
    )


def test_a_failed_run_is_reported_and_tried_again(swept, tmp_path, capsys):
    missing, there = tmp_path / "missing", tmp_path / "there"
    with pytest.raises(UserError, match="none of 2 runs is done"):
        swept(f"--dataset={missing};{there}")
    there.write_text("")
    with pytest.raises(UserError, match="1 of 2 runs failed; the same command tries them again"):
        swept(f"--dataset={missing};{there}")
    printed = capsys.readouterr().out
    assert "missing: failed (exit 1, " in printed and f": error: no corpus {missing}\n" in printed
    assert [row[0] for row in lines(printed)] == ["dataset", str(there)]
    missing.write_text("")
    swept(f"--dataset={missing};{there}")
    assert len(lines(capsys.readouterr().out)) == 3


def test_another_run_in_the_folder_is_not_touched(swept, tmp_path):
    (tmp_path / "sweep" / "exported").mkdir(parents=True)
    (tmp_path / "sweep" / "exported" / "config.json").write_text('{"model_type": "llama"}')
    swept("--seed=1,2", "--max_steps=10")
    with pytest.raises(UserError, match="s1_seed1 holds a run with other knobs: give another"):
        swept("--seed=1,2")
    (tmp_path / "sweep" / "s2").mkdir()
    (tmp_path / "sweep" / "s2" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="s2 holds a run with other knobs"):
        swept("--bag_size=2,3")


def test_runs_of_older_code_are_recognised(swept, capsys):
    """A knob that is younger than a run had its default; one had another name."""
    path = swept("--seed=1,2", "--router_z_coef=0.1") / "s1_seed1" / "config.json"
    described = json.loads(path.read_text())  # without most knobs
    described["config"]["z_coef"] = described["config"].pop("router_z_coef")
    path.write_text(json.dumps(described))
    swept("--seed=1,2", "--router_z_coef=0.1")
    assert "2 of 2 runs are done already" in capsys.readouterr().out


def test_ctrl_c_stops_the_runs_at_a_checkpoint_and_the_next_start_resumes(swept, tmp_path):
    arguments = ["--seed=1,2", "--jobs=2", "--min_lr_ratio=0.02", "--max_steps=40"]
    logs = [tmp_path / "sweep" / f"s1_seed{i}" / "metrics.jsonl" for i in (1, 2)]

    def interrupt():
        while not all(log.exists() and log.stat().st_size for log in logs):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)  # does as Ctrl-C

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        swept(*arguments)
    thread.join()
    for log in logs:
        assert "stopped after step" in (log.parent / "log.txt").read_text()
        assert 0 < int((log.parent / "last.pt").read_text()) < 40
    swept(*arguments)
    for log in logs:
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert steps == list(range(1, 41)) and "--resume" in starts(log.parent)[-1][0]


def test_jobs_share_cores_and_gpus(swept, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(12))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    out = swept("--seed=1,2,3,4")
    found = [starts(out / name)[0] for name in names(out)]
    assert {env["CUDA_VISIBLE_DEVICES"] for _, env in found} == {"0", "3"}
    assert all("--threads=6" in given and env["OMP_NUM_THREADS"] == "6" for given, env in found)


@pytest.fixture
def figures(monkeypatch):
    """The pictures that are drawn."""
    figures, save = [], sweep.save_picture
    monkeypatch.setattr(sweep, "save_picture", lambda *to: (figures.append(to[0]), save(*to)))
    return figures


def curves(figure):
    """{label: (x, y)} of the lines with error bars."""
    lines = {bars.get_label(): bars.lines[0] for bars in figure.axes[0].containers}
    return {label: tuple(map(list, line.get_data())) for label, line in lines.items()}


def test_a_grid_trains_each_distinct_run_once_and_tabulates_it(swept, figures, capsys):
    out = swept("--superposition_ratio=0.2,0.3", "--bag_size=1,2,4", "--seed=1,3", "--plot")
    bagged = [f"r{r}_s{s}" for r in (0.2, 0.3) for s in (2, 4)]
    assert names(out) == [f"{point}_seed{i}" for point in (*bagged, "s1") for i in (1, 3)]
    printed = capsys.readouterr().out
    head, *table = lines(printed)
    assert head == ["superposition_ratio", "bag_size", "val loss", "minus baseline"]
    base, best = end_of(STEPS, 2), end_of(STEPS, 2, s=4)
    assert table[0] == ["-", "1", f"{base:.4f} ± 0.0141 (2)", "-"]
    half = 4.30265 * 0.01 * 2**0.5  # Student's t, two degrees of freedom
    minus = [best - base + x for x in (0, -half, half)]
    gain = "{:+.4f} (95 % {:+.4f} to {:+.4f})".format(*minus)
    assert ["0.3", "4", f"{best:.4f} ± 0.0141 (2)", gain] in table
    written = (out / "table.md").read_text()
    assert lines(written) == [head, *table] and "`python -m tools.sweep" in written
    with open(out / "runs.csv", newline="") as f:
        rows = {row["run"]: row for row in csv.DictReader(f)}
    assert len(rows) == 10 and rows["s1_seed1"]["superposition_ratio"] == ""
    assert float(rows["r0.3_s4_seed1"]["val_loss"]) == end_of(STEPS, 1, s=4)

    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    for s in (2, 4):  # differences from the baseline
        gains = [end_of(STEPS, 2, s, r) - base for r in (0.2, 0.3)]
        assert curves(figures[0])[f"bag_size {s}"][1] == pytest.approx(gains)
    assert figures[0].axes[0].get_xlabel() == "superposition_ratio"


def test_each_point_is_compared_with_the_baseline_of_its_other_knobs(swept, figures, capsys):
    swept("--learning_rate=0.01,0.02", "--bag_size=1,4", "--plot")
    _, *table = lines(capsys.readouterr().out)
    gain = f"{end_of(STEPS, s=4) - end_of(STEPS):+.4f}"  # at either rate
    assert [(rate, s, minus) for rate, s, _, minus in table] == [
        (rate, *side) for rate in ("0.01", "0.02") for side in (("1", "-"), ("4", gain))
    ]
    losses = {s: [end_of(STEPS, 1337, s, rate=rate) for rate in (0.01, 0.02)] for s in (1, 4)}
    drawn = curves(figures[0])  # a rate is tuned by the losses themselves
    assert {s: drawn[f"bag_size {s}"][1] for s in (1, 4)} == losses
    labels = [label.get_text() for label in figures[0].axes[0].get_xticklabels()]
    assert labels == ["0.01", "0.02"]


def test_the_command_in_the_table_can_be_pasted(swept, monkeypatch):
    arguments = ["--reinit_at_switch=;embedding;head", "--bag_size=2"]
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
    command = (swept(*arguments) / "table.md").read_text().splitlines()[-1].strip("`")
    assert command == "python -m tools.sweep '--reinit_at_switch=;embedding;head' --bag_size=2"


def test_without_matplotlib_the_table_is_there_all_the_same(swept, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pictures need matplotlib"):
        swept("--seed=1,2", "--plot")
    assert lines(capsys.readouterr().out)
