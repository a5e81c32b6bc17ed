"""train.py, run whole in this process on a tiny model: the promises about steps, data, resuming and failing."""

import errno
import functools
import json
import math
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import train
from conftest import ROOT, TINY, read_rows, write_corpus
from model import GPT, GPTConfig
from nanotst import UserError, checkpoint, machine
from nanotst.configurator import parse
from nanotst.stream import permute

MOE = dict(n_expert=4, top_k=2, balance_bias=True, balance_rate=0.01, qk_norm=True)
KINDS = {"dense": {}, "moe": MOE}
dense_and_moe = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
SWITCH = 4  # the tiny run takes 4 steps on bags of 3, then 6 on tokens


def shuffled(n, key):
    return permute(np.arange(n), n, key).tolist()


def column(rows, *keys):
    return [[row[key] for key in keys if key in row] for row in rows]


def load(out_dir, name="last.pt"):
    return torch.load(Path(out_dir) / name, weights_only=True)


def tiny_model(config):
    return GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=1, n_head=2, n_embd=16, ff_dim=config.ff_dim))


# ---- the method as a whole


def plain_training(config):
    """Token superposition training of the tiny model with nothing but PyTorch's own functions and Python loops.
    -> a training loss per step, and the validation loss at the end."""
    data = np.fromfile(config.dataset + "/train.bin", dtype=np.uint16).astype(np.int64)
    torch.manual_seed(config.seed)
    model = tiny_model(config)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0},
        ],
        betas=(0.9, 0.95),
    )
    runs = [48 * run for run in shuffled(124, (config.seed, 0, 0, 0))]  # of 6,000 tokens; 8 a step
    rest = [run + offset for run in runs[8 * SWITCH :] for offset in (0, 16, 32)]  # what superposition leaves
    rest = [rest[i] for i in shuffled(len(rest), (config.seed, 0, 0, 1))]
    losses = []
    for step in range(10):
        s = 3 if step < SWITCH else 1
        at = runs[8 * step :][:8] if step < SWITCH else rest[8 * (step - SWITCH) :][:8]  # 8 x 16 positions
        inputs = torch.stack([torch.tensor(data[i : i + 16 * s]).view(16, s) for i in at])
        labels = torch.stack([torch.tensor(data[i + s : i + s + 16 * s]).view(16, s) for i in at])
        logits = model(inputs).flatten(0, 1)
        loss = sum(F.cross_entropy(logits, labels[:, :, i].flatten()) for i in range(s)) / s
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for (
            group
        ) in optimizer.param_groups:  # 2 steps of warmup, the last one of 10 decays, but from its full rate
            group["lr"] = 0.01 * [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1][step]
        optimizer.step()
        losses.append(loss.item())
    return losses, plain_validation(model, config)


def plain_validation(model, config):
    """Mean next-token loss of 10 rows of 16 positions, evenly spaced over the 500 validation tokens."""
    data = torch.tensor(np.fromfile(config.dataset + "/val.bin", dtype=np.uint16).astype(np.int64))
    starts = [int(i * (500 - 17) / 9) for i in range(10)]
    with torch.no_grad():
        return (
            sum(
                F.cross_entropy(model(data[None, i : i + 16])[0], data[i + 1 : i + 17]) for i in starts
            ).item()
            / 10
        )


def test_training_equals_a_plain_loop(run, tiny):
    """weights, optimizer moments, learning-rate schedule and place in the text go on through the switch; a
    change of any of them at step 4 would show in the losses after it."""
    losses, val_loss = plain_training(tiny())
    rows = run()
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert rows[-1]["val_loss"] == pytest.approx(val_loss, rel=1e-5)


def test_input_of_recovery_begins_at_the_token_after_superposition(run, tmp_path, monkeypatch):
    """Tokens are their own positions in the text."""
    seen, forward = [], GPT.forward

    def watch(self, bags, labels=None, *args):
        seen.append((self.training, bags, labels))
        return forward(self, bags, labels, *args)

    monkeypatch.setattr(GPT, "forward", watch)
    rows = run(
        dataset=write_corpus(tmp_path / "positions", range(4000), range(500), 4000),
        superposition_ratio=0.3,
        eval_interval=100,
        max_steps=10,
    )
    steps = [(bags, labels) for training, bags, labels in seen if training][
        2:
    ]  # without the two of the warm-up
    assert [bags.size(-1) for bags, _ in steps] == [3] * 3 + [1] * 7
    for bags, labels in steps:
        assert (labels[:, :, 0] == bags[:, :, -1] + 1).all()  # the next bag: neither overlap nor gap
        assert (labels[:, :-1] == bags[:, 1:]).all()
    read = torch.cat([bags.flatten() for bags, _ in steps]).tolist()
    assert len(set(read)) == len(read) == rows[-1]["data_tokens"]  # nothing twice, through the switch


@pytest.mark.parametrize("bag_size, ratio", [(2, 0.3), (3, 0.4), (4, 1.0), (5, 0.0)])
def test_same_flops_and_exactly_so_much_more_text(run, tmp_path, bag_size, ratio):
    """at every step the FLOPs of the baseline; at the end 1 + r(s-1) times its tokens."""
    base = run(bag_size=1, out_dir=str(tmp_path / "base"))
    tst = run(bag_size=bag_size, superposition_ratio=ratio)
    assert column(tst, "step", "flops", "positions", "lr") == column(base, "step", "flops", "positions", "lr")
    assert base[-1]["positions"] == base[-1]["data_tokens"] == 10 * 128
    assert tst[-1]["data_tokens"] == 128 * (10 + round(10 * ratio) * (bag_size - 1))
    assert tst[-1]["data_tokens"] / base[-1]["data_tokens"] == pytest.approx(
        1 + ratio * (bag_size - 1), rel=1e-15
    )


def test_rows_of_both_phases(run):
    rows = run()
    assert column(rows, "step", "phase", "bag_size") == (
        [[n, "superposition", 3] for n in range(1, 5)] + [[n, "recovery", 1] for n in range(5, 11)]
    )
    always = {
        "step",
        "phase",
        "bag_size",
        "loss",
        "lr",
        "grad_norm",
        "positions",
        "data_tokens",
        "flops",
        "seconds",
        "tokens_per_second",
    }
    assert all(always <= row.keys() for row in rows)
    assert [row["step"] for row in rows if "val_loss" in row] == [5, 10]
    assert all(
        row["val_bpb"] == pytest.approx(row["val_loss"] / math.log(2) / 2.0)
        for row in rows
        if "val_loss" in row
    )
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_ends_of_phases_are_logged_between_log_intervals(run):
    assert [row["step"] for row in run(log_interval=7, eval_interval=100)] == [1, 4, 5, 7, 10]


def test_it_learns(run):
    rows = run(max_steps=60, learning_rate=0.03, log_interval=20, eval_interval=20)
    assert rows[-1]["val_loss"] < math.log(50) - 1


def test_validation_does_not_know_the_phase(run, tiny, tmp_path):
    """the same weights (a learning rate of nothing) have the same validation loss under any bag size and in
    both phases: the next-token loss of the same rows. 10 rows in batches of 4 leave a rest of 2."""
    torch.manual_seed(tiny().seed)
    wanted = plain_validation(tiny_model(tiny()), tiny())
    for bag_size, weights in ((1, "uniform"), (3, "uniform"), (4, "first")):
        rows = run(
            bag_size=bag_size,
            bag_weights=weights,
            learning_rate=1e-30,
            eval_interval=2,
            batch_size=4,
            out_dir=str(tmp_path / f"{bag_size}"),
        )
        losses = [row["val_loss"] for row in rows if "val_loss" in row]
        assert len(losses) == 5 and len(set(losses)) == 1
        assert losses[0] == pytest.approx(wanted, rel=1e-6)


def test_weights_of_a_bag_reach_the_loss(run, tmp_path):
    losses = {
        run(bag_weights=kind, max_steps=4, superposition_ratio=1.0, out_dir=str(tmp_path / kind))[-1]["loss"]
        for kind in ("uniform", "power", "first")
    }
    assert len(losses) == 3


# ---- stop and resume


def ask_to_stop(monkeypatch, after, number=signal.SIGTERM):
    """The operating system asks the process to end in the middle of step `after`."""
    rate_multiplier = train.rate_multiplier

    def interrupted(step, c):
        if step == after - 1:
            os.kill(os.getpid(), number)
        return rate_multiplier(step, c)

    monkeypatch.setattr(train, "rate_multiplier", interrupted)


LEARNED = "step", "phase", "loss", "val_loss", "lr", "grad_norm", "positions", "data_tokens", "flops"


@dense_and_moe
@pytest.mark.parametrize("after", [SWITCH - 1, SWITCH, SWITCH + 1])
def test_stopped_and_resumed_is_the_unbroken_run_bit_for_bit(run, tmp_path, monkeypatch, after, kind):
    """at the switch and one step to either side."""
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    unbroken = run(out_dir=whole, **kind)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        ask_to_stop(patch, after)
        run(out_dir=parts, **kind)
    assert stopped.value.code == 1 and load(parts)["step"] == len(read_rows(parts)) == after
    resumed = run(out_dir=parts, resume=True, **kind)
    assert column(resumed, *LEARNED) == column(unbroken, *LEARNED)
    a, b = load(whole)["model"], load(parts)["model"]
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert all(math.isfinite(seconds) for (seconds,) in column(resumed, "seconds"))


def test_rows_after_the_checkpoint_are_written_again(run, tmp_path, monkeypatch):
    """a run that was killed, with rows younger than its checkpoint and half a line."""
    out_dir = str(tmp_path / "killed")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        ask_to_stop(patch, 3)
        run(out_dir=out_dir)
    with open(out_dir + "/metrics.jsonl", "a") as f:
        f.write(json.dumps({"step": 4, "loss": 99.0}) + '\n{"step": 5, "lo')
    resumed, unbroken = run(out_dir=out_dir, resume=True), run(out_dir=str(tmp_path / "whole"))
    assert column(resumed, *LEARNED) == column(unbroken, *LEARNED)


def test_micro_batches_may_change_on_resume(run, tmp_path, monkeypatch):
    unbroken = run(out_dir=str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        ask_to_stop(patch, 5)
        run()
    resumed = run(resume=True, batch_size=2, log_interval=2)
    assert resumed[-1]["loss"] == pytest.approx(unbroken[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        dict(max_steps=12),
        dict(bag_size=2),
        dict(superposition_ratio=0.5),
        dict(bag_weights="power"),
        dict(learning_rate=0.02),
        dict(seed=1),
    ],
)
def test_changing_the_training_on_resume_must_be_asked_for(run, change):
    """the phase depends on these."""
    run()
    (key,) = change
    with pytest.raises(UserError, match=f"{key} .* -> {change[key]}.*--allow_changes"):
        run(resume=True, **change)
    run(resume=True, allow_changes=True, **change)


def test_allowed_changes_take_effect(run, tiny):
    run()
    rows = run(
        resume=True, allow_changes=True, max_steps=12, learning_rate=0.002, weight_decay=0.3, beta2=0.99
    )
    assert rows[10]["step"] == 11 and rows[10]["lr"] == 0.002
    groups = load(tiny().out_dir)["optimizer"][0]["param_groups"]
    assert [(g["weight_decay"], tuple(g["betas"])) for g in groups] == [
        (0.3, (0.9, 0.99)),
        (0.0, (0.9, 0.99)),
    ]


@pytest.mark.parametrize(
    "before, after",
    [
        (dict(bag_size=1), dict(bag_size=3, superposition_ratio=0.8)),
        (dict(bag_size=1), dict(bag_size=4, superposition_ratio=0.2)),
        (dict(), dict(superposition_ratio=0.8)),
        (dict(), dict(max_steps=20)),
        (dict(superposition_ratio=1.0), dict(bag_size=2)),
        (dict(), dict(total_batch=256)),
    ],
)
def test_another_switch_on_resume_reads_on(run, tmp_path, monkeypatch, before, after):
    """Changed in either phase, and then resumed once more without a change, bit for bit."""
    run(**before)
    changed = {**before, "max_steps": 20, **after}
    one, two = str(tmp_path / "run"), tmp_path / "two"
    shutil.copytree(one, two)
    rows = run(resume=True, allow_changes=True, **changed)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        ask_to_stop(patch, 17)
        run(out_dir=str(two), resume=True, allow_changes=True, **changed)
    assert column(run(out_dir=str(two), resume=True, **changed), *LEARNED) == column(rows, *LEARNED)
    assert len(rows) == 20 and rows[-1]["data_tokens"] > rows[9]["data_tokens"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_an_error_status(run, tiny, monkeypatch, capsys, number):
    ask_to_stop(monkeypatch, 7, number)
    with pytest.raises(SystemExit) as stopped:
        run(log_interval=100, eval_interval=100)
    assert stopped.value.code == 1
    assert load(tiny().out_dir)["step"] == 7
    assert number.name in (out := capsys.readouterr().out) and "--resume" in out


# ---- micro-batches and ranks


def assert_same_training(rows, reference):
    assert len(rows) == len(reference)
    for row, wanted in zip(rows, reference):
        assert row.keys() == wanted.keys()
        for key in row.keys() - {"phase", "seconds", "tokens_per_second", "mfu"}:
            assert row[key] == pytest.approx(wanted[key], rel=1e-4 if key == "grad_norm" else 1e-5), key


# the load-balancing loss is a product of two means, and each micro-batch and rank takes its own: it is left out
@dense_and_moe
def test_eight_micro_steps_equal_one(run, tmp_path, kind):
    once = run(batch_size=8, balance_coef=0.0, out_dir=str(tmp_path / "1x8"), **kind)
    assert_same_training(run(batch_size=1, balance_coef=0.0, out_dir=str(tmp_path / "8x1"), **kind), once)
    assert_same_training(run(batch_size=0, balance_coef=0.0, out_dir=str(tmp_path / "all"), **kind), once)


TWO_RANKS = dict(
    balance_coef=0.0, batch_size=2, eval_positions=176
)  # 2 micro-steps; 11 validation rows do not halve
A_RANK = """
import json, os, sys, train
for port, knobs in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = port
    train.main(train.Config(**knobs))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope="module")
def two_ranks(corpus, tmp_path_factory):
    """{kind: rows} of runs in two processes, started as torchrun starts them; both kinds in the same two, to save time."""
    folder = tmp_path_factory.mktemp("two")
    configs = {
        name: {**TINY, **TWO_RANKS, **kind, "dataset": corpus, "out_dir": str(folder / name)}
        for name, kind in KINDS.items()
    }
    jobs = json.dumps([(free_port(), knobs) for knobs in configs.values()])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", A_RANK, jobs],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in ranks:  # one that hangs
            process.kill()
    return {name: read_rows(knobs["out_dir"]) for name, knobs in configs.items()}


@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_equal_one(run, two_ranks, name):
    assert_same_training(two_ranks[name], run(**TWO_RANKS, **KINDS[name]))


def test_ddp_is_gone_before_its_process_group(run, monkeypatch):
    """Its reducer would drop the group while it holds Python's lock, for which a thread of the group may be waiting."""
    for key, value in dict(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()
    ).items():
        monkeypatch.setenv(key, value)
    ddp, destroy, alive = weakref.WeakSet(), dist.destroy_process_group, []

    class Watched(machine.DDP):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            ddp.add(self)
            alive.append(len(ddp))

    def watched_destroy():
        alive.append(len(ddp))
        destroy()

    monkeypatch.setattr(machine, "DDP", Watched)
    monkeypatch.setattr(dist, "destroy_process_group", watched_destroy)
    run(threads=torch.get_num_threads())
    assert alive == [1, 0]


# ---- compilation in the loop


def test_all_graphs_are_compiled_before_the_first_step_and_none_after(run, monkeypatch):
    """one graph for bags, one for tokens, one for evaluation."""
    counter, seen, multiplier = CompileCounterWithBackend("eager"), [], train.rate_multiplier
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(
        train, "rate_multiplier", lambda *a: seen.append(counter.frame_count) or multiplier(*a)
    )
    run(compile="on", batch_size=4)
    assert seen + [counter.frame_count] == [3] * 11


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_training_goes_on_where_compilation_fails(run, tmp_path, monkeypatch, capsys):
    wanted = run(out_dir=str(tmp_path / "eager"))

    def broken(graph, inputs):
        raise OSError("no compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    with torch.compiler.config.patch(force_disable_caches=False):  # puts back what the run changes
        assert column(run(compile="on"), *LEARNED) == column(wanted, *LEARNED)
    assert "going on without torch.compile" in capsys.readouterr().out


# ---- mixture of experts


def test_router_metrics_by_hand():
    load = torch.tensor([[6.0, 2.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert train.router_metrics(load, torch.tensor([0.5, 1.0])) == {
        "max_violation": 1.0,
        "max_violation_worst": 2.0,
        "router_entropy": 0.75,
        "router_entropy_worst": 0.5,
        "dead_experts": 1.0,
        "dead_experts_worst": 2.0,
    }


def test_balance_and_z_loss_are_trained_on_but_not_reported(run, tmp_path):
    """The loss column stays the cross-entropy, comparable with a dense run's."""
    plain, other = (
        run(
            out_dir=str(tmp_path / str(coef)),
            max_steps=2,
            balance_coef=coef,
            z_coef=coef,
            n_expert=4,
            top_k=2,
        )
        for coef in (0.0, 1.0)
    )
    assert plain[0]["loss"] == other[0]["loss"] and plain[0]["grad_norm"] != other[0]["grad_norm"]


# ---- the command line and its knobs


def command_line(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def test_command_line(run, tiny, tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.py"
    config.write_text("".join(f"{key} = {value!r}\n" for key, value in vars(tiny()).items()))
    command_line(monkeypatch, str(config), "--bag_size=4", "--max_steps=3", "--superposition_ratio=0.67")
    rows = read_rows(tiny().out_dir)
    assert [row["data_tokens"] for row in rows] == [512, 1024, 1152]
    assert "2 of 3 steps on bags of 4" in (out := capsys.readouterr().out) and "3.00 x the text" in out


@pytest.mark.parametrize(
    "argv, words", [(["--bag_sise=4"], "did you mean bag_size"), (["--out_dir=/dev/null/x"], "/dev/null")]
)
def test_errors_of_the_command_line_are_one_line(run, corpus, monkeypatch, argv, words):
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        command_line(
            monkeypatch, f"--dataset={corpus}", "--total_batch=1024", "--batch_size=8", "--device=cpu", *argv
        )


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(bag_size=0), "bag_size must be at least 1"),
        (dict(max_steps=0), "max_steps"),
        (dict(log_interval=0), "log_interval"),
        (dict(superposition_ratio=1.1), "superposition_ratio must lie in 0..1"),
        (dict(beta2=-0.1), "beta2"),
        (dict(bag_weights="unifrom"), "bag_weights must be one of uniform, power"),
        (dict(schedule="linear"), "schedule"),
        (dict(dtype="float16"), "dtype"),
        (dict(compile="true"), "compile"),
        (dict(learning_rate=0.0), "learning_rate"),
        (dict(learning_rate=math.nan), "learning_rate"),
        (dict(n_head=3), "n_embd 16 must be a multiple of n_head 3"),
        (dict(batch_size=3), "total_batch 128"),
        (dict(batch_size=16), "total_batch 128"),
        (dict(head_dim=5), "head_dim"),
        (dict(n_kv_head=3), "n_kv_head"),
        (dict(n_expert=2), "top_k"),
        (dict(device="cuda"), "device=cuda"),
        (dict(device="cuda:x"), "cuda:N"),
        (dict(seed=-1), "seed"),
        (dict(bag_size=100), "the corpus has 6,000 tokens"),
        (dict(block_size=512, total_batch=512, batch_size=1), "validation"),
        (dict(dataset="no/such/folder"), "no prepared corpus"),
        (dict(init_from="no/such/file"), "no/such/file"),
        (dict(resume=True), "there is no checkpoint"),
    ],
)
def test_what_cannot_work_is_one_line_that_names_the_knob(run, tiny, knobs, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=words) as e:
        run(**knobs)
    assert "\n" not in str(e.value)
    assert not os.path.exists(tiny().out_dir)  # nothing was begun


def test_ranks_are_part_of_the_batch(tiny):
    train.check(tiny(batch_size=4), world_size=2)
    with pytest.raises(UserError, match="x 2 ranks"):
        train.check(tiny(batch_size=8), world_size=2)


def test_learning_rate_by_hand(tiny):
    c = tiny(max_steps=20, warmup_steps=4, decay_ratio=0.25, learning_rate=2.0, min_lr_ratio=0.1)
    wanted = (
        [0.5, 1.0, 1.5] + [2.0] * 13 + [1.64, 1.28, 0.92, 0.56]
    )  # the last of 5 steps of decay is not yet the end
    assert [2 * train.rate_multiplier(step, c) for step in range(20)] == pytest.approx(wanted)
    c = tiny(max_steps=5, warmup_steps=1, schedule="cosine", learning_rate=2.0)
    assert [2 * train.rate_multiplier(step, c) for step in range(5)] == pytest.approx(
        [2.0, 2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)]
    )


# ---- checkpoints


def saved_steps(monkeypatch):
    saves, save = [], torch.save

    def noted(state, file):
        saves.append((Path(file.name).name, state["step"]))
        save(state, file)

    monkeypatch.setattr(torch, "save", noted)
    return saves


def test_save_interval_does_not_depend_on_log_interval(run, monkeypatch):
    saves = saved_steps(monkeypatch)
    run(save_interval=3, log_interval=4, eval_interval=100)
    assert [step for name, step in saves if name.startswith("last.pt")] == [3, 6, 9, 10]


def test_checkpoints_hold_plain_values_and_the_best_model(run, tiny, monkeypatch):
    monkeypatch.setattr(
        train, "rate_multiplier", lambda step, c: 1.0 if step < 8 else 300.0
    )  # ruined after step 8
    rows = run(max_steps=12, eval_interval=4)
    best = min((row["val_loss"], row["step"]) for row in rows if "val_loss" in row)
    checkpoint = load(tiny().out_dir, "best.pt")
    assert (checkpoint["best_val"], checkpoint["step"]) == best and best[1] < 12
    model = tiny_model(tiny())
    model.load_state_dict(checkpoint["model"])  # keys without a wrapper's prefix
    assert plain_validation(model, tiny()) == pytest.approx(best[0], rel=1e-5)


def test_initial_weights_from_a_checkpoint(run, tiny, tmp_path):
    run(out_dir=str(tmp_path / "first"))
    first = load(tmp_path / "first")["model"]
    run(init_from=str(tmp_path / "first" / "last.pt"), learning_rate=1e-30)
    second = load(tiny().out_dir)
    assert second["step"] == 10 and all(torch.equal(first[name], second["model"][name]) for name in first)


def test_config_json_describes_the_run(run, tiny):
    run()
    described = json.loads((Path(tiny().out_dir) / "config.json").read_text())
    assert described["config"] == vars(tiny()) and described["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "content, words",
    [
        (lambda path: path.write_text("hello"), "is not a checkpoint"),
        (lambda path: path.write_bytes(b""), "is not a checkpoint"),
        (
            lambda path: torch.save({"model": Path("code")}, path),
            "is not a checkpoint",
        ),  # needs code to unpickle
        (lambda path: torch.save({"weights": 1}, path), ""),
        (lambda path: torch.save([1, 2], path), ""),
    ],
    ids=["text", "empty", "object", "other keys", "list"],
)
@pytest.mark.parametrize("use", ["init_from", "resume"])
def test_wrong_checkpoint_is_one_line(run, tmp_path, content, words, use):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "last.pt"
    content(path)
    with pytest.raises(UserError, match=f"last.pt.*{words}") as e:
        run(**({"resume": True} if use == "resume" else {"init_from": str(path)}))
    assert "\n" not in str(e.value)


def test_checkpoint_of_another_shape_is_one_line(run, tmp_path):
    run(out_dir=str(tmp_path / "small"))
    with pytest.raises(UserError, match="does not fit this model"):
        run(n_embd=32, init_from=str(tmp_path / "small" / "last.pt"))
    with pytest.raises(UserError, match="does not fit this model"):
        run(n_embd=32, out_dir=str(tmp_path / "small"), resume=True, allow_changes=True)


def test_a_mixture_of_experts_keeps_its_micro_batch_on_resume(run):
    """Its load is balanced within a micro-batch, so another size would be another objective."""
    run(n_expert=4, top_k=2)
    with pytest.raises(UserError, match="batch_size 8 -> 4"):
        run(n_expert=4, top_k=2, resume=True, batch_size=4)


def test_another_corpus_on_resume_is_one_line(run, corpus, tmp_path):
    other = Path(write_corpus(tmp_path / "tiny", range(50), range(50), 50))
    run(dataset=corpus)
    for name in ("train.bin", "val.bin", "meta.json"):
        (other / name).write_bytes((Path(corpus) / name).read_bytes())
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps({**meta, "train_tokens": 5000}))
    (other / "train.bin").write_bytes((other / "train.bin").read_bytes()[:10000])
    with pytest.raises(UserError, match="does not hold the corpus"):
        run(dataset=str(other), resume=True, allow_changes=True)


def test_a_run_is_not_overwritten_unless_asked_for(run, tiny):
    before = run()
    with pytest.raises(UserError, match="--resume.*--overwrite.*--out_dir"):
        run(max_steps=4)
    assert read_rows(tiny().out_dir) == before
    assert len(run(max_steps=4, overwrite=True)) == 4


# ---- what goes wrong on the way


def test_a_loss_that_is_not_finite_stops_the_run(run, tiny):
    with pytest.raises(UserError, match="not finite at step .*nan.*learning_rate"):
        run(learning_rate=1e30)
    assert all(math.isfinite(loss) for (loss,) in column(read_rows(tiny().out_dir), "loss"))


def test_weights_that_are_not_finite_never_replace_a_checkpoint(run, tiny, monkeypatch):
    """The loss of a step is that of the weights before it: a broken gradient shows in it one step too late."""
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def broken_in_step_6(parameters, *args):
        parameters = list(parameters)
        steps.append(1)
        if len(steps) == 6:
            parameters[0].grad.fill_(math.nan)
        return clip(parameters, *args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken_in_step_6)
    with pytest.raises(UserError, match="not finite|nan"):
        run(save_interval=1)
    assert all(p.isfinite().all() for p in load(tiny().out_dir)["model"].values())


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed")],
    ids=["os", "torch"],
)
def test_full_disk_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "last.pt"
    path.write_text("old")

    def fill_the_disk(temporary):
        Path(temporary).write_text("half of the n")
        raise error

    with pytest.raises(UserError, match="cannot write .*last.pt.*disk is full.*untouched") as e:
        checkpoint.write_safely(str(path), fill_the_disk)
    assert "\n" not in str(e.value)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["last.pt"]
    checkpoint.write_safely(str(path), lambda temporary: Path(temporary).write_text("new"))
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["last.pt"]


def test_run_can_be_resumed_after_the_disk_was_full(run, tiny, tmp_path, monkeypatch):
    unbroken = run(out_dir=str(tmp_path / "whole"))
    save, real = [], torch.save

    def full_from_the_second_time_on(state, path):
        save.append(path)
        if len(save) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, path)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="make room and use --resume"):
        patch.setattr(torch, "save", full_from_the_second_time_on)
        run(save_interval=3, eval_interval=100)
    assert load(tiny().out_dir)["step"] == 3
    assert run(resume=True)[-1]["loss"] == unbroken[-1]["loss"]
