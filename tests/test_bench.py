"""tools/bench.py: that clock and tables say what their columns promise, and that configs are its shapes."""

import json
import pickle

import numpy as np
import pytest
import torch

from model import GPT
from nanotst import UserError
from nanotst.checkpoint import model_config
from nanotst.configurator import read_file
from nanotst.corpus import open_corpus
from nanotst.machine import Machine
from tools import bench

ON_CPU = dict(device="cpu", dtype="float32", compile="off", repeats=1)


class Clock:
    """A clock that only runs when told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(bench.time, "perf_counter", lambda: self.now)

    def takes(self, *seconds):
        """A function whose calls take so long, one after the other."""
        left = list(seconds)

        def run():
            self.now += left.pop(0)

        return run


@pytest.fixture
def figures(tmp_path):
    """figures(parts="step", ...) runs the bench -> {title: rows}."""

    def of(**knobs):
        path = tmp_path / "bench.json"
        bench.main(bench.Config(**{**ON_CPU, "json": str(path), **knobs}))
        figures = json.loads(path.read_text())
        return {
            title: rows
            for title, rows in figures.items()
            if isinstance(rows, list) and title != "command"
        }

    return of


def test_variants_take_turns_after_an_unmeasured_call_and_the_median_counts(monkeypatch):
    clock, order = Clock(monkeypatch), []
    b = bench.Bench(bench.Config(**ON_CPU))
    times = {"a": clock.takes(50, 1, 9, 2), "b": clock.takes(50, 4, 5, 60)}
    noted = {
        name: lambda name=name, run=run: (order.append(name), run()) for name, run in times.items()
    }
    assert b.seconds(noted, repeats=3) == {"a": 2, "b": 5}
    assert order == ["a", "b"] * 4


def test_a_step_of_one_second_has_the_ratios_of_its_table(figures, monkeypatch):
    """s = 1 takes one second, s = 3 two; the machine could do the FLOPs of ten such steps in a second."""
    clock = Clock(monkeypatch)
    make, flops = bench.make_step, []

    def slow(b, shape, rows):
        model, _ = make(b, shape, rows)
        flops.append(model.flops_per_position() * rows * shape.block_size)
        return model, lambda s: clock.takes({1: 1.0, 3: 2.0}[s])()

    monkeypatch.setattr(bench, "make_step", slow)
    monkeypatch.setattr(Machine, "peak_flops", property(lambda self: 10 * flops[0]))
    [(title, rows)] = figures(parts="step", shape="curves", rows=2, bag_sizes="1,3").items()
    assert title == "training step, curves: 139,584 parameters, 2 rows of 128"
    one, three = rows
    assert (one["s"], one["ms"], one["time / s = 1"], one["first call s"]) == (1, 1000, 1, 1)
    assert (three["s"], three["ms"], three["time / s = 1"], three["first call s"]) == (
        3,
        2000,
        2,
        2,
    )
    assert (one["positions/s"], three["positions/s"]) == (256, 128)
    assert (one["data tokens/s"], three["data tokens/s"]) == (256, 3 * 128)
    assert one["MFU"] == pytest.approx(0.1) and three["MFU"] == pytest.approx(0.05)
    assert one["TFLOP/s"] == pytest.approx(flops[0] / 1e12)


def test_a_real_step_trains_and_without_a_known_peak_there_is_no_mfu(figures):
    b = bench.Bench(bench.Config(**ON_CPU))
    shape, rows = bench.read_shape(b, "curves")
    model, step = bench.make_step(b, shape, 2)
    before = [p.detach().clone() for p in model.parameters()]
    step(3)
    assert all((p != old).any() for p, old in zip(model.parameters(), before))
    [table] = figures(parts="step", shape="curves", rows=2, bag_sizes="1,3").values()
    assert [row["s"] for row in table] == [1, 3] and not any("MFU" in row for row in table)


def test_losses_are_timed_against_cross_entropy_of_one_label(figures):
    [(title, rows)] = figures(parts="loss", positions=32, losses="bce").items()
    assert title == "loss alone, N 32, V 50304, C 256"
    names = [
        "products",
        "cross-entropy",
        *["paper's loop"] * 3,
        *["plain MCE"] * 3,
        *["fused MCE"] * 3,
    ]
    assert [row["variant"] for row in rows] == names + ["chunked bce"] * 3
    base = rows[1]
    for row in rows:
        assert row["time / cross-entropy"] == pytest.approx(row["ms"] / base["ms"])
        assert row["memory / cross-entropy"] == pytest.approx(
            row["extra MB"] / (base["extra MB"] or 1e-6)
        )


def test_mixtures_have_the_active_parameters_of_the_dense_model_but_for_their_routers(
    figures, monkeypatch
):
    clock = Clock(monkeypatch)
    seconds, make = iter((1.0, 2.0, 4.0)), bench.make_step

    def slow(*args):
        model, t = make(*args)[0], next(seconds)
        return model, lambda s: clock.takes(t)()

    monkeypatch.setattr(bench, "make_step", slow)
    [rows] = figures(parts="moe").values()
    assert [row["tokens/s / dense"] for row in rows] == [1, 0.5, 0.25]
    assert [row["positions/s"] for row in rows] == [32 * 128, 32 * 64, 32 * 32]
    for row, n_expert in zip(rows, (0, 8, 32)):
        assert (
            row["active"] == rows[0]["active"] + 2 * 128 * n_expert
        )  # a router in each of 2 blocks


def test_loader_counts_the_tokens_of_bags(figures):
    [rows] = figures(parts="loader").values()
    assert [row["s"] for row in rows] == [1, 4, 16]
    for row in rows:
        assert row["million tokens/s"] == pytest.approx(64 * 1024 * row["s"] / row["ms"] / 1e3)


# A trainer that prints what theirs prints, or what ours does, and takes 4 ms a step, or 2.
TRAINER = """
import json, sys
ours = any(arg.startswith("--max_steps") for arg in sys.argv)
with open("arguments.txt", "a") as f:
    f.write(json.dumps(sys.argv[1:]) + "\\n")
for i in range(41):
    ms = 900 if i < 9 else 2 if ours else 4
    if ours:
        print(f"step {i}/40 | s 1 | loss 5.5 | {ms}.0 ms | 1k pos/s")
    else:
        print(f"iter {i}: loss 5.5, time {ms}.00ms, mfu 1%")
"""


def test_trainers_are_compared_by_their_steps_after_the_first_ones(figures, monkeypatch, tmp_path):
    folders = {}
    for name in ("theirs", "ours"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "train.py").write_text(TRAINER)
    (folders["ours"] / "config").symlink_to(bench.ROOT / "config")
    monkeypatch.setattr(bench, "ROOT", folders["ours"])
    monkeypatch.setattr(Machine, "peak_flops", property(lambda self: 1e9))
    monkeypatch.setattr(bench, "write_words", lambda folder, vocab_size: None)
    [(title, (theirs, ours))] = figures(
        parts="nanogpt", rows=2, repeats=3, nanogpt=str(folders["theirs"])
    ).items()
    assert title.endswith("curves: 2 layers, width 64, context 128, 2 rows")
    assert (theirs["trainer"], theirs["ms a step"], theirs["tokens/s"]) == (
        "nanoGPT",
        4,
        2 * 128 * 250,
    )
    assert (ours["trainer"], ours["ms a step"], ours["tokens/s"]) == ("nanoTST", 2, 2 * 128 * 500)
    assert (theirs["tokens/s / nanoGPT"], ours["tokens/s / nanoGPT"]) == (1, 2)
    # GPT-2's block: 4 C^2 weights in attention, 8 C^2 in its MLP; 12 C L FLOPs of attention for each layer
    assert theirs["MFU"] == pytest.approx(
        64_000 * (6 * (2 * 12 * 64**2 + 256 * 64) + 2 * 12 * 64 * 128) / 1e9
    )
    assert ours["MFU"] == pytest.approx(128_000 * 933_888 / 1e9)
    assert theirs["runs"] == "4 4 4" and theirs["peak MB"] > 10
    calls = [
        json.loads(line) for line in (folders["theirs"] / "arguments.txt").read_text().splitlines()
    ]
    assert len(calls) == 3 and "--batch_size=2" in calls[0] and "--n_layer=2" in calls[0]
    assert "--total_batch=256" in (folders["ours"] / "arguments.txt").read_text()


def test_both_trainers_can_read_the_words_and_their_frequencies_fall_as_in_a_language(tmp_path):
    bench.write_words(tmp_path, 50304)
    corpus = open_corpus(str(tmp_path))
    assert (
        corpus.vocab_size
        == pickle.loads((tmp_path / "meta.pkl").read_bytes())["vocab_size"]
        == 50304
    )
    words = np.fromfile(tmp_path / "train.bin", np.uint16)
    assert len(words) == len(corpus.train) and words.max() < 50304
    count = np.bincount(words, minlength=50304)
    assert count[:10].sum() / count[:1000].sum() == pytest.approx(
        np.log(11) / np.log(1001), abs=0.01
    )


@pytest.mark.parametrize(
    "name, parameters, rows",
    [
        ("curves", 139_584, 128),
        ("wide", 3_344_640, 16),
        ("gpt2_124m", 162_220_800, 64),
        ("dense_270m", 267_225_408, 16),
        ("dense_600m", 600_208_320, 16),
    ],
)
def test_shapes_are_those_of_the_configs(name, parameters, rows):
    b = bench.Bench(bench.Config(**ON_CPU))
    on_cpu, rows_on_cpu = bench.read_shape(b, name)
    b.cuda = True
    shape, rows_on_cuda = bench.read_shape(b, name)
    with torch.device("meta"):
        assert GPT(shape).n_params() == parameters
    knobs = read_file(str(bench.ROOT / "config" / f"{name}.py"))
    assert shape == model_config(knobs, {"vocab_size": shape.vocab_size}) and rows_on_cuda == rows
    assert (on_cpu.block_size, rows_on_cpu) == (
        (256, 1) if knobs["block_size"] > 256 else (shape.block_size, rows)
    )


def test_a_compiler_that_does_not_work_is_said_and_not_used(monkeypatch, capsys):
    def broken(function):
        raise RuntimeError("no C compiler")

    b = bench.Bench(bench.Config(**ON_CPU))
    monkeypatch.setattr(torch, "compile", broken)
    assert not b.compiler_works() and "no C compiler" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong, word",
    [
        (dict(bag_sizes="1,x"), "bag_sizes"),
        (dict(parts="lost"), "roofline, loss"),
        (dict(losses="mse"), "mce, mce_alt"),
        (dict(parts="step", shape="big"), "curves"),
        (dict(parts="nanogpt"), "clone of karpathy/nanoGPT"),
    ],
)
def test_what_it_does_not_know_is_one_line(wrong, word):
    with pytest.raises(UserError, match=word):
        bench.main(bench.Config(**{**ON_CPU, **wrong}))


@pytest.mark.parametrize(
    "knob, least", [("repeats", 1), ("rows", 0), ("positions", 0), ("threads", "negative")]
)
def test_numbers_that_cannot_be_are_one_line(knob, least):
    with pytest.raises(UserError, match=f"{knob} must .*{least}"):
        bench.main(bench.Config(parts="loss", **{knob: -1}))
