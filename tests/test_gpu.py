"""tools/gpu.py: every part of it, on the CPU in tiny settings, so that it works where a GPU is at hand."""

import csv
import importlib
import json
import runpy
import signal
from types import SimpleNamespace

import pytest
import torch

import train
from nanotst import UserError, configurator
from tools import gpu

TEXT = "\n<|endoftext|>\n".join(
    " ".join(
        f"{verb} the {noun} {i}," for verb in ("see", "hear", "follow") for noun in ("cat", "dog")
    )
    * 6
    for i in range(60)
)
LAUNCH = gpu.launch


def launch_here(command, say, seconds=0.0):
    """As gpu.launch, in this process, which has imported everything already."""
    where, *arguments = command if command[0] != "-m" else command[1:]
    if where == "torch.distributed.run":
        return LAUNCH(command, say)
    say(f"{where} in this process")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if where == "train.py":
            train.main(configurator.parse(train.Config, arguments))
        elif where.startswith("tools."):
            tool = importlib.import_module(where)
            tool.main(configurator.parse(tool.Config, arguments))
        else:
            script = runpy.run_path(str(gpu.ROOT / where))
            script["main"](configurator.parse(script["Config"], arguments))
        return 0
    except (UserError, SystemExit) as e:
        say(f"error: {e}")
        return 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def dry(tmp_path, monkeypatch):
    """dry(parts, ...) does parts of the tool in a folder of its own -> the folder of its results."""
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(gpu.ROOT)
    monkeypatch.setattr(gpu, "launch", launch_here)

    def run(parts, **knobs):
        text, folder = str(tmp_path / "text.txt"), str(tmp_path / "dry")
        gpu.main(gpu.Config(**{"text": text, "parts": parts, "dry_run": folder, **knobs}))
        return tmp_path / "dry" / "results"

    return run


def kept(results):
    with open(results / "runs.csv", newline="") as f:
        return {row["run"]: row for row in csv.DictReader(f)}


def commands(results):
    return [
        line for line in (results / "log.txt").read_text().splitlines() if line.startswith("$ ")
    ]


def test_the_first_call_as_a_process_of_its_own(dry, monkeypatch):
    """From text to table through the real command lines."""
    monkeypatch.undo()
    monkeypatch.chdir(gpu.ROOT)
    results = dry("pair")
    assert [row["bag_size"] for row in kept(results).values()] == ["1", "4"]
    assert "english_s4_30_lr0.003_seed1337" in (results / "pair.md").read_text()
    log = (results / "log.txt").read_text()
    assert f"torch {torch.__version__}" in log and "TST: 9 of 30 steps on bags of 4" in log


def test_pair_is_kept_and_not_trained_again(dry):
    results = dry("pair")
    names = {"english_s1_30_lr0.003_seed1337", "english_s4_30_lr0.003_seed1337"}
    assert set(kept(results)) == names and (results / "pair.md").exists()
    trained = [line for line in commands(results) if "train.py" in line]
    assert len(trained) == 2
    dry("pair")
    assert [line for line in commands(results) if "train.py" in line] == trained


def test_a_run_sharded_over_one_rank_comes_to_the_same(dry):
    results = dry("fsdp")
    plain, sharded = kept(results).values()
    assert [plain["label"] + " FSDP", "fsdp"] == [sharded["label"], sharded["parallel"]]
    assert float(sharded["val_loss"]) == pytest.approx(float(plain["val_loss"]), rel=1e-5)
    assert (results / "fsdp.md").exists()


def losses_by_rate(monkeypatch, best):
    """Train nothing: the loss of a run is lowest at the learning rate best[is it on bags?], and for s = 6."""

    def train(g, run):
        if run.learning_rate > 0.02:
            raise UserError("the loss is nan")
        if run.name not in g.losses():
            new = not (g.results / "runs.csv").exists()
            with open(g.results / "runs.csv", "a") as f:
                f.write("run,val_loss\n" * new)
                away = abs(torch.tensor(run.learning_rate / best[run.bag_size > 1]).log().item())
                f.write(f"{run.name},{2 + away + 0.01 * abs(run.bag_size - 6)}\n")
        return run

    monkeypatch.setattr(gpu.Session, "train", train)
    monkeypatch.setattr(gpu.Session, "draw", lambda g, name, runs: drawn.update({name: runs}))
    drawn = {}
    return drawn


def test_the_sweep_goes_on_until_the_best_rate_has_worse_neighbours(dry, monkeypatch):
    drawn = losses_by_rate(monkeypatch, {False: 0.012, True: 0.0015})
    dry("sweep")
    rates = {s: [run.learning_rate for run in drawn["sweep"] if run.bag_size == s] for s in (1, 4)}
    assert sorted(rates[1]) == [0.0015, 0.003, 0.006, 0.012]  # 0.024 was tried and has no loss
    assert sorted(rates[4]) == [0.00075, 0.0015, 0.003, 0.006]
    assert all(run.max_steps == 10 for run in drawn["sweep"])


def test_later_parts_go_by_the_best_rate_and_bag_size_found(dry, monkeypatch):
    drawn = losses_by_rate(monkeypatch, {False: 0.006, True: 0.0015})
    dry("seeds,bags,sweep,long")  # done in their own order
    assert {(run.bag_size, run.learning_rate, run.max_steps) for run in drawn["bags"]} == {
        (1, 0.006, 10), (2, 0.0015, 10), (4, 0.0015, 10), (6, 0.0015, 10), (8, 0.0015, 10)
    }  # fmt: skip
    seeds = [(run.bag_size, run.learning_rate, run.max_steps, run.seed) for run in drawn["seeds"]]
    assert seeds == [(1, 0.006, 30, seed) for seed in (1337, 1, 2)] + [
        (6, 0.0015, 30, seed) for seed in (1337, 1, 2)
    ]
    long = [(run.bag_size, run.learning_rate, run.max_steps) for run in drawn["long"]]
    assert long == [(1, 0.006, 30), (1, 0.006, 45), (1, 0.006, 60), (6, 0.0015, 30)]


def test_all_training_parts_really_train(dry):
    results = dry("sweep,bags,seeds,long,moe")
    for name in ("sweep", "bags", "seeds", "long", "moe"):
        assert (results / f"{name}.md").exists(), name
    runs = kept(results)
    kinds = {(name.split("_")[0], row["bag_size"]) for name, row in runs.items()}
    assert kinds == {("english", s) for s in "12468"} | {("moe", "1"), ("moe", "4")}
    assert len({row["seed"] for row in runs.values()}) == 3


def test_all_benches(dry, tmp_path):
    clone = tmp_path / "nanoGPT"
    clone.mkdir()
    (clone / "train.py").write_text(
        "for i in range(20):\n    print(f'iter {i}: loss 1.0, time 3.00ms, mfu 1%')\n"
    )
    results = dry("bench", nanogpt=str(clone))
    for name in gpu.BENCHES:
        figures = json.loads((results / f"{name}.json").read_text())
        assert any(
            isinstance(rows, list) and rows and isinstance(rows[0], dict)
            for rows in figures.values()
        ), name
    before = len(commands(results))
    dry("bench", nanogpt=str(clone))
    assert len(commands(results)) == before


def test_a_bench_that_fails_does_not_stop_the_others(dry, monkeypatch):
    def only_moe(command, say, seconds=0.0):
        return (
            launch_here(command, say) if "--parts=moe" in command or "prepare" in command[0] else 1
        )

    monkeypatch.setattr(gpu, "launch", only_moe)
    with pytest.raises(UserError, match="bench_270m, bench_600m, bench_124m, bench_loss failed"):
        dry("bench")


def test_what_is_cut_short_goes_on_from_its_checkpoint(dry, monkeypatch, capsys):
    now, left = [0.0], []
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def stopped_at_step_10(command, say, seconds):
        """The time is up while train.py runs, which is as if SIGTERM came."""
        left.append(seconds)
        if command[0] != "train.py":
            return launch_here(command, say)
        now[0] += 540
        with monkeypatch.context() as m:
            m.setattr(train.StopSignals, "stop", lambda self, step: step == 10)
            m.setattr(train.StopSignals, "reason", "SIGTERM")
            return launch_here(command, say)

    monkeypatch.setattr(gpu, "launch", stopped_at_step_10)
    with pytest.raises(gpu.TimeIsUp, match="stopped after 9 minutes; the same command goes on"):
        dry("pair", minutes=9)
    assert left == [540, 540] and "stopped by SIGTERM after step 10" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "launch", launch_here)
    results = dry("pair", minutes=9)
    assert "after step 10 of 30" in capsys.readouterr().out
    assert [row["steps"] for row in kept(results).values()] == ["30", "30"]


def test_nothing_is_begun_after_the_time_is_up(dry, monkeypatch):
    now = iter([0.0])
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: next(now, 601.0)))
    monkeypatch.setattr(gpu, "launch", None)
    with pytest.raises(gpu.TimeIsUp):
        dry("pair", minutes=10)


def test_without_a_gpu_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU; --dry_run=FOLDER"):
        gpu.main(gpu.Config(text="text.txt"))
    assert not list(tmp_path.iterdir())


def test_an_unknown_part_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="pair, sweep, bags, seeds, long, moe, fsdp, bench, or all, got curve"
    ):
        gpu.main(gpu.Config(text="text.txt", parts="curve", dry_run="dry"))
    assert not list(tmp_path.iterdir())


def test_launch_asks_a_process_to_end_when_the_time_is_up():
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(7)))\n"
        "print('begun', flush=True)\n"
        "time.sleep(60)"
    )
    said = []
    alarm = gpu.threading.Timer  # rings as soon as the process is ready for it

    class Ready(list):
        def append(self, line):
            super().append(line)
            if line == "begun":
                rings[0].function()

    rings, said = [], Ready()

    def timer(seconds, function):
        rings.append(alarm(seconds, function))
        return rings[0]

    with pytest.MonkeyPatch.context() as m:
        m.setattr(gpu.threading, "Timer", timer)
        assert gpu.launch(["-c", program], said.append, seconds=50.0) == 7
    assert said == ["begun", "saved"] and rings[0].interval == 50.0


def test_launch_gives_the_output_line_by_line_and_the_exit_status():
    said = []
    assert (
        gpu.launch(
            ["-c", "import sys; print('a'); print('b', file=sys.stderr); sys.exit(3)"], said.append
        )
        == 3
    )
    assert sorted(said) == ["a", "b"]
