"""tools/bench.py: clock and tables say what their columns promise. The command lines of examples/gpu.sh."""

import contextlib
import itertools
import json
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import train
from model import Head
from nanotst import UserError
from nanotst.configurator import parse
from nanotst.machine import Machine
from tools import bench, sweep

ON_CPU = dict(device="cpu", dtype="float32", compile="off", repeats=1)


@pytest.fixture
def clock(monkeypatch):
    """A clock that runs only when told to: clock.now += seconds."""
    made = SimpleNamespace(now=100.0)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: made.now)
    return made


@pytest.fixture
def figures(tmp_path):
    """figures(parts="step", ...) runs the bench -> {title: rows}."""

    def of(**knobs):
        path = tmp_path / "bench.json"
        bench.main(bench.Config(**{**ON_CPU, "json": str(path), **knobs}))
        found = json.loads(path.read_text())
        return {k: rows for k, rows in found.items() if isinstance(rows, list) and k != "command"}

    return of


def test_variants_take_turns_after_an_unmeasured_call_and_the_median_counts(clock):
    b, order = bench.Bench(bench.Config(**ON_CPU | {"repeats": 3})), []
    left = {"a": [50, 1, 9, 2], "b": [50, 4, 5, 60]}

    def variant(name):
        order.append(name)
        clock.now += left[name].pop(0)

    assert b.seconds({"a": lambda: variant("a"), "b": lambda: variant("b")}) == {"a": 2, "b": 5}
    assert order == ["a", "b"] * 4


def test_a_step_has_the_ratios_of_its_table(figures, clock, monkeypatch):
    """A step of s 1 takes 2 seconds, of s 3 3 seconds, the update in it half a second; the machine could do
    the FLOPs of ten steps in two seconds."""
    made = []

    class Slow(bench.Step):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self.positions * self.model.flops_per_position())

        def __call__(self, s):
            clock.now += {1: 2.0, 3: 3.0}[s]

        def update(self):
            clock.now += 0.5

    monkeypatch.setattr(bench, "Step", Slow)
    monkeypatch.setattr(Machine, "peak_flops", property(lambda self: 5 * made[0]))
    found = figures(parts="step", shape="curves", rows=2, bag_sizes="1,3")
    ((title, (one, three)),) = found.items()
    assert title == "training step, curves, 2 rows of 128"
    assert (one[""], one["ms"], one["ms of update"], one["ms / first"]) == ("s 1", 2000, 500, 1)
    assert (three["ms"], three["ms / first"]) == (3000, 1.5)
    assert (one["positions/s"], three["positions/s"]) == (128, 85)
    assert one["MFU"] == pytest.approx(0.1)
    # the config's step is 64 of these with a single update
    assert one["at 64 micro-steps"] == pytest.approx(0.2 * 64 / (64 * 2 - 63 * 0.5))
    assert one["TFLOP/s"] == pytest.approx(made[0] / 2e12)


def test_a_real_step_trains_with_twins():
    step = bench.Step(bench.Bench(bench.Config(**ON_CPU, rows=2)), "curves")
    before = [p.detach().clone() for p in step.model.parameters()]
    step(3)
    assert all((p != old).any() for p, old in zip(step.model.parameters(), before))
    assert type(step.model.head) is not Head
    step.optimizer.zero_grad()  # frees them
    assert all(p.grad is None for p in step.model.parameters())


def test_busy_seconds_are_those_of_kernels(monkeypatch):
    kind = torch.autograd.DeviceType

    def event(device, microseconds, annotation=False):
        span = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(device_type=device, time_range=span, is_user_annotation=annotation)

    events = [event(kind.CUDA, 30.0), event(kind.CUDA, 12.0), event(kind.CPU, 500.0)]
    events.append(event(kind.CUDA, 60.0, annotation=True))
    profiler = contextlib.nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda: profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert bench.busy_seconds(lambda: None) == pytest.approx(42e-6)


def test_extra_memory_is_the_peak_of_what_is_held_together():
    x = torch.ones(100_000)  # there before the call

    def variant():
        a = x + 1
        b = a * 2
        del a
        return b + x

    assert bench.extra_memory(variant, cuda=False) == pytest.approx(800_000, rel=1e-3)


@pytest.fixture
def called_once(monkeypatch):
    """Variants take 1, 2, 3 ... seconds, and as many MB."""

    def seconds(b, variants):
        for variant in variants.values():
            variant()
        return dict(zip(variants, itertools.count(1)))

    megabytes = map((1e6).__mul__, itertools.count(1))
    monkeypatch.setattr(bench.Bench, "seconds", seconds)
    monkeypatch.setattr(bench, "extra_memory", lambda *_: next(megabytes))


def test_losses_are_timed_against_cross_entropy_of_one_label(figures, called_once):
    ((title, rows),) = figures(parts="loss", positions=32).items()
    assert title == "loss alone, N 32, V 50304, C 256"
    kinds = "cross-entropies", "plain MCE", "fused MCE"
    assert [(row["loss"], row["s"]) for row in rows] == [(k, s) for k in kinds for s in (1, 8, 16)]
    for i, row in enumerate(rows, 1):
        assert (row["ms"], row["ms / first"], row["MB"], row["MB / first"]) == (1e3 * i, i, i, i)


def test_loader_counts_the_tokens_of_bags(figures, called_once):
    (rows,) = figures(parts="loader").values()
    for row, (s, seconds) in zip(rows, ((1, 1), (4, 2), (16, 3))):
        assert (row["s"], row["million tokens/s"]) == (s, pytest.approx(0.065536 * s / seconds))


def test_mixtures_have_the_active_parameters_of_the_dense_model_but_for_their_routers(figures):
    (rows,) = figures(parts="moe", rows=1).values()
    assert [row[""] for row in rows] == ["dense", "8 experts, top 2", "32 experts, top 4"]
    for row, n_expert in zip(rows, (0, 8, 32)):  # a router in each of 2 blocks
        assert row["active parameters"] == rows[0]["active parameters"] + 2 * 128 * n_expert


@pytest.mark.parametrize(
    "line", ["step {}/40 | s 1 | {}.0 ms |", "iter {}: loss 5.5, time {}.00ms, mfu 1%"]
)
def test_a_trainer_is_timed_by_its_later_steps_in_the_users_environment(
    line, monkeypatch, tmp_path
):
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # as nanotst may set it in its own process
    monkeypatch.delitem(bench.USERS_ENVIRONMENT, "GOMP_SPINCOUNT", raising=False)
    steps = f"for i in range(17): print({line!r}.format(i, 900 if i < 9 else 2))"  # most are slow
    (tmp_path / "train.py").write_text(f"import os\n{steps}\nos.environ['GOMP_SPINCOUNT']")
    with pytest.raises(UserError, match="(?s)gave no times: .*KeyError: 'GOMP_SPINCOUNT'"):
        bench.time_trainer(tmp_path, "")
    (tmp_path / "train.py").write_text(steps)
    assert bench.time_trainer(tmp_path, "") == 2


def test_nanogpt_gets_the_same_model_and_batch(figures, monkeypatch, tmp_path):
    calls = {"ours": [], "theirs": []}

    def time_trainer(folder, arguments):
        ours = folder == bench.ROOT
        calls["ours" if ours else "theirs"].append(arguments.split())
        return 2 if ours else 4

    monkeypatch.setattr(bench, "time_trainer", time_trainer)
    (tmp_path / "configurator.py").touch()
    found = figures(parts="nanogpt", rows=2, repeats=3, nanogpt=str(tmp_path))
    ((title, (theirs, ours)),) = found.items()
    assert title == "against nanoGPT's train.py, curves, 2 rows of 128"
    assert (theirs["trainer"], theirs["ms"], theirs["tokens/s"]) == ("nanoGPT", 4, 2 * 128 * 250)
    assert (ours["trainer"], ours["ms"], ours["tokens/s"]) == ("nanoTST", 2, 2 * 128 * 500)
    assert (theirs["tokens/s / first"], ours["tokens/s / first"]) == (1, 2)
    assert len(calls["ours"]) == len(calls["theirs"]) == 3
    assert {"--batch_size=2", "--n_layer=2", "--n_embd=64"} <= set(calls["theirs"][0])
    config, *knobs = calls["ours"][0]
    c = parse(train.Config, [str(ROOT / config), *knobs])
    assert (c.total_batch, c.max_steps, c.bag_size, c.dtype) == (256, 40, 1, "float32")
    train.check(c, 1)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(parts="lost"), "roofline, loss"),
        (dict(parts="step", shape="big"), "config/big.py"),
        (dict(parts="nanogpt"), "clone of karpathy/nanoGPT"),
    ],
)
def test_what_cannot_be_measured_is_one_line(wrong, words):
    with pytest.raises((UserError, OSError), match=words):  # an entry point prints both
        bench.main(bench.Config(**{**ON_CPU, **wrong}))


# Writes down what it is asked for, and the figures that bench would
PYTHON = """#!/bin/sh
for word; do
    echo "$word" >> "$OUT/log"
    case $word in --json=*) echo {} > "${word#--json=}" ;; esac
done
echo >> "$OUT/log"
"""


def test_every_part_of_gpu_sh_is_command_lines_that_work(tmp_path):
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(PYTHON)
    python.chmod(0o755)
    env = dict(PATH=os.environ["PATH"], PYTHON=str(python), OUT=str(tmp_path), NANOGPT="clone")
    how = dict(cwd=ROOT, env=env, capture_output=True, text=True)
    script = ["bash", str(ROOT / "examples" / "gpu.sh")]
    for dry in ([], ["--dry-run"]):
        log.write_text("")
        done = subprocess.run([*script, *dry], **how)
        assert done.returncode == 0 and not done.stderr
        calls = [call.split("\n")[1:] for call in log.read_text().strip().split("\n\n")]
        assert calls[0] == ["pytest", "-q", "tests/cuda"]
        tools = [name for name, *_ in calls[1:]]
        assert tools == ["tools.bench"] * 4 * (not dry) + ["tools.sweep"] * 6  # kept figures stay
        steps = set()
        for name, *arguments in calls[1:]:
            if name == "tools.bench":
                c = parse(bench.Config, arguments)
                assert set(c.parts.split(",")) <= set(bench.PARTS)
                continue
            c = parse(sweep.Config, sweep.as_positional(arguments, sweep.Config))
            for member in sweep.plan(c.arguments, tmp_path / c.out_dir)[0]:
                run = parse(train.Config, member.arguments)
                train.check(run, 1)
                steps.add(run.max_steps)
        assert steps == ({10} if dry else {1500, 2000, 3000, 4200, 6000})
    unknown = subprocess.run([*script, "nothing"], **how)
    assert unknown.returncode == 1 and "no part nothing; there are checks" in unknown.stderr
