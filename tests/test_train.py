"""train.py, run whole in this process on a tiny model: the promises about steps, data, resuming and
failing."""

import functools
import json
import math
import os
import re
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
from conftest import ROOT, TINY, read_rows, write_corpus
from torch._dynamo.testing import CompileCounterWithBackend

import train
import tst
from model import GPT, GPTConfig
from nanotst import UserError, checkpoint, log, machine, optim, parallel
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
    return GPT(
        GPTConfig(
            vocab_size=50, block_size=16, n_layer=1, n_head=2, n_embd=16, ff_dim=config.ff_dim
        )
    )


# ---- the method as a whole


def plain_training(
    config, phases=((0, 4, 3, 3), (4, 10, 1, 1)), weights=None, make_optimizers=None
):
    """Training of the tiny model with nothing but PyTorch's own functions and Python loops. phases: start,
    stop, tokens read, tokens predicted; weights of the labels of a bag, the same if None. -> a dict per step,
    and the validation loss."""
    data = np.fromfile(config.dataset + "/train.bin", dtype=np.uint16).astype(np.int64)
    torch.manual_seed(config.seed)
    model = tiny_model(config)
    optimizers = (make_optimizers or plain_adamw)(model, config)
    n_in, tail = phases[0][2], max(n_out for *_, n_out in phases)
    run = 16 * n_in
    order = [
        run * i for i in shuffled((6000 - tail) // run, (config.seed, 0, 0, 0))
    ]  # rows of 16 positions
    log = []
    for p, (start, stop, read, predicted) in enumerate(phases):
        if p:  # what the phase before leaves, cut into rows of this one
            order = [row + 16 * read * i for row in order for i in range(n_in // read)]
            order = [order[i] for i in shuffled(len(order), (config.seed, 0, 0, p))]
            n_in = read
        for step in range(start, stop):
            at, order = order[:8], order[8:]
            inputs = torch.stack([torch.tensor(data[i : i + 16 * read]).view(16, read) for i in at])
            labels = [[data[i + (j + 1) * read :][:predicted] for j in range(16)] for i in at]
            labels = torch.tensor(np.array(labels)).flatten(0, 1)  # (8 * 16, predicted)
            logits = model(inputs).flatten(0, 1)
            share = weights if weights and predicted > 1 else [1 / predicted] * predicted
            loss = sum(w * F.cross_entropy(logits, labels[:, i]) for i, w in enumerate(share))
            model.zero_grad()
            loss.backward()
            norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
            for p_ in model.parameters():
                if config.grad_clip:
                    p_.grad *= min(1.0, config.grad_clip / norm)
            for (
                optimizer
            ) in optimizers:  # 2 steps of warmup; the last one of 10 decays, but from its full rate
                for group in optimizer.param_groups:
                    group["lr"] = (
                        group.setdefault("full", group["lr"])
                        * [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1][step]
                    )
                optimizer.step()
            log.append({"loss": loss.item(), "grad_norm": norm})
    return log, plain_validation(model, config)


def plain_adamw(model, config):
    groups = [
        {
            "params": [p for p in model.parameters() if p.dim() > 1],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0},
    ]
    return [torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))]


def plain_muon(model, config):
    """The four matrices of the only block by Muon, the rest by AdamW."""
    block = model.blocks[0]
    matrices = [block.attn.qkv, block.attn.out, block.mlp.gate_up, block.mlp.down]
    matrices = [layer.weight for layer in matrices]
    norms = [block.attn_norm.weight, block.mlp_norm.weight, model.norm.weight]
    groups = [
        {"params": [model.embed.weight, model.head.weight], "weight_decay": config.weight_decay},
        {"params": norms, "weight_decay": 0},
    ]
    muon = dict(
        lr=0.02, weight_decay=config.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return [
        torch.optim.Muon(matrices, **muon),
        torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95)),
    ]


def plain_validation(model, config):
    """Mean next-token loss of 10 rows of 16 positions, evenly spaced over the 500 validation tokens."""
    data = torch.tensor(np.fromfile(config.dataset + "/val.bin", dtype=np.uint16).astype(np.int64))
    starts = [int(i * (500 - 17) / 9) for i in range(10)]
    with torch.no_grad():
        return (
            sum(
                F.cross_entropy(model(data[None, i : i + 16])[0], data[i + 1 : i + 17])
                for i in starts
            ).item()
            / 10
        )


def assert_plain(rows, plain):
    log, val_loss = plain
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in log], rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx(
        [row["grad_norm"] for row in log], rel=1e-4
    )
    assert rows[-1]["val_loss"] == pytest.approx(val_loss, rel=1e-5)


def test_training_equals_a_plain_loop(run, tiny):
    """Weights, optimizer moments, learning-rate schedule and place in the text continue through the switch; a
    change of any of them at step 4 would show in the losses after it."""
    assert_plain(run(), plain_training(tiny()))


@pytest.mark.parametrize(
    "knobs, phases",
    [
        (dict(bag_size=1), [(0, 10, 1, 1)]),
        (dict(superposition="input"), [(0, 4, 3, 1), (4, 10, 1, 1)]),
        (dict(superposition="output"), [(0, 4, 1, 3), (4, 10, 1, 1)]),
        (dict(superposition_ratio=1.0), [(0, 10, 3, 3)]),
        (dict(superposition_ratio=0.38), [(0, 4, 3, 3), (4, 10, 1, 1)]),  # to the nearest step
        (dict(superposition_ratio=0.34), [(0, 3, 3, 3), (3, 10, 1, 1)]),
    ],
)
def test_every_mode_equals_a_plain_loop(run, tiny, knobs, phases):
    assert_plain(run(**knobs), plain_training(tiny(), phases))


def test_stepping_down_equals_a_plain_loop(run, tiny):
    phases = [(0, 2, 4, 4), (2, 4, 2, 2), (4, 10, 1, 1)]
    rows = run(bag_size="4-2")
    assert_plain(rows, plain_training(tiny(), phases))
    assert [row["bag_size"] for row in rows] == [4, 4, 2, 2, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("grad_clip", [0.0, 0.1, 1e9])
def test_gradients_are_clipped_to_their_norm_and_the_norm_before_is_logged(run, tiny, grad_clip):
    plain = plain_training(tiny(grad_clip=grad_clip))
    assert min(row["grad_norm"] for row in plain[0]) > 0.1  # so that 0.1 acts in every step
    assert_plain(run(grad_clip=grad_clip, weight_decay=0.1), plain)


@pytest.mark.parametrize(
    "knobs, weigh",
    [
        (dict(bag_weights="power"), lambda i: 1 / i),
        (dict(bag_weights="fitted"), lambda i: 3.63 + 1.35 * i**-1.25),
        (dict(bag_weights="fitted", fitted={"c0": 0.0, "a": 2.0, "k": -2}), lambda i: i**-2),
    ],
)
def test_weights_of_a_bag_reach_the_loss(run, tiny, tmp_path, knobs, weigh):
    if "fitted" in knobs:
        (tmp_path / "fit.json").write_text(json.dumps(knobs["fitted"]))
        knobs = knobs | {"fitted": str(tmp_path / "fit.json")}
    weights = [weigh(i) for i in (1, 2, 3)]
    assert_plain(run(**knobs), plain_training(tiny(), weights=[w / sum(weights) for w in weights]))


def test_muon_equals_a_plain_loop(run, tiny):
    rows = run(optimizer="muon", matrix_learning_rate=0.02)
    log, val_loss = plain_training(tiny(), make_optimizers=plain_muon)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in log], rel=1e-3)
    assert rows[-1]["val_loss"] == pytest.approx(val_loss, rel=1e-3)


def test_muon_takes_the_matrices_of_blocks_and_no_stacked_experts_or_routers(tiny):
    config = GPTConfig(50, 16, 2, 2, 16, ff_dim=32, n_expert=4, top_k=2, qk_norm=True)
    model = GPT(config)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = optim.make_optimizer(model, tiny(optimizer="muon"), "cpu")
    of_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert of_muon == {f"blocks.{i}.attn.{n}.weight" for i in (0, 1) for n in ("qkv", "out")}
    of_adamw = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert of_muon | of_adamw == set(names.values()) and not of_muon & of_adamw


@pytest.mark.parametrize("loss", ["mce_alt", "bce", "hinge"])
def test_other_losses_are_for_bags_alone(run, tiny, tmp_path, loss):
    """The first loss of a run is that of its initial weights: any loss of tst.LOSSES on the first batch."""
    rows, mce = run(loss=loss, out_dir=str(tmp_path / loss)), run(out_dir=str(tmp_path / "mce"))
    torch.manual_seed(tiny().seed)
    model = tiny_model(tiny())
    data = np.fromfile(tiny().dataset + "/train.bin", dtype=np.uint16).astype(np.int64)
    at = [48 * i for i in shuffled((6000 - 3) // 48, (tiny().seed, 0, 0, 0))][:8]
    tokens = torch.stack([torch.tensor(data[i : i + 51]) for i in at])
    bags, labels = tst.bags_and_labels(tokens, 3, 3)
    assert rows[0]["loss"] == pytest.approx(tst.LOSSES[loss](model(bags), labels).item(), rel=1e-5)
    assert rows[0]["loss"] != pytest.approx(mce[0]["loss"], rel=0.01)
    ordinary = run(loss=loss, superposition_ratio=0.0, out_dir=str(tmp_path / "ordinary"))
    assert column(ordinary, "loss") == column(run(bag_size=1, out_dir=str(tmp_path / "1")), "loss")


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
        assert (
            labels[:, :, 0] == bags[:, :, -1] + 1
        ).all()  # the next bag: neither overlap nor gap
        assert (labels[:, :-1] == bags[:, 1:]).all()
    read = torch.cat([bags.flatten() for bags, _ in steps]).tolist()
    assert (
        len(set(read)) == len(read) == rows[-1]["data_tokens"]
    )  # nothing twice, through the switch


@pytest.mark.parametrize("bag_size, ratio", [(2, 0.3), (3, 0.4), (4, 1.0), (5, 0.0)])
def test_same_flops_and_exactly_so_much_more_text(run, tmp_path, bag_size, ratio):
    """at every step the FLOPs of the baseline; at the end 1 + r(s-1) times its tokens."""
    base = run(bag_size=1, out_dir=str(tmp_path / "base"))
    tst = run(bag_size=bag_size, superposition_ratio=ratio)
    assert column(tst, "step", "flops", "positions", "lr") == column(
        base, "step", "flops", "positions", "lr"
    )
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
        "positions_per_second",
    }
    assert all(always <= row.keys() for row in rows)
    assert [row["step"] for row in rows if "val_loss" in row] == [5, 10]
    assert all(
        row["val_bpb"] == pytest.approx(row["val_loss"] / math.log(2) / 2.0)
        for row in rows
        if "val_loss" in row
    )
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


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


# ---- stop and resume


def ask_to_stop(monkeypatch, after, number=signal.SIGTERM):
    """The operating system asks the process to end in the middle of step `after`."""
    rate_multiplier = train.rate_multiplier

    def interrupted(step, c):
        if step == after - 1:
            os.kill(os.getpid(), number)
        return rate_multiplier(step, c)

    monkeypatch.setattr(train, "rate_multiplier", interrupted)


LEARNED = (
    "step",
    "phase",
    "loss",
    "val_loss",
    "lr",
    "grad_norm",
    "positions",
    "data_tokens",
    "flops",
)


@dense_and_moe
@pytest.mark.parametrize("after", [SWITCH - 1, SWITCH, SWITCH + 1])
def test_stopped_and_resumed_is_the_unbroken_run_bit_for_bit(
    run, tmp_path, monkeypatch, after, kind
):
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
        resume=True,
        allow_changes=True,
        max_steps=12,
        learning_rate=0.002,
        weight_decay=0.3,
        beta2=0.99,
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


def test_a_signal_in_the_last_step_ends_a_finished_run(run, tiny, monkeypatch, capsys):
    ask_to_stop(monkeypatch, tiny().max_steps)
    assert run()[-1]["step"] == tiny().max_steps and "--resume" not in capsys.readouterr().out


# ---- micro-batches and ranks


def assert_same_training(rows, reference):
    assert len(rows) == len(reference)
    for row, wanted in zip(rows, reference):
        assert row.keys() == wanted.keys()
        for key in row.keys() - {"phase", "seconds", "positions_per_second", "mfu"}:
            assert row[key] == pytest.approx(
                wanted[key], rel=1e-4 if key == "grad_norm" else 1e-5
            ), key


@dense_and_moe
def test_eight_micro_steps_equal_one(run, tmp_path, kind):
    once = run(batch_size=8, balance_coef=0.1, out_dir=str(tmp_path / "1x8"), **kind)
    assert_same_training(
        run(batch_size=1, balance_coef=0.1, out_dir=str(tmp_path / "8x1"), **kind), once
    )
    assert_same_training(
        run(batch_size=0, balance_coef=0.1, out_dir=str(tmp_path / "all"), **kind), once
    )


TWO_RANKS = dict(
    balance_coef=0.1, batch_size=2, eval_positions=176
)  # 2 micro-steps; 11 rows do not halve
A_RANK = """
import json, os, sys, train
from nanotst.machine import Machine
Machine.peak_flops = 1e9
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
    """{kind: rows} of runs in two processes, started as torchrun starts them; both kinds in the same two, to
    save time."""
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
                "LOCAL_WORLD_SIZE": "2",
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
def test_two_ranks_equal_one(run, two_ranks, name, monkeypatch):
    monkeypatch.setattr(machine.Machine, "peak_flops", 1e9)
    one = run(**TWO_RANKS, **KINDS[name])
    assert_same_training(two_ranks[name], one)
    for rows, ranks in ((two_ranks[name], 2), (one, 1)):  # MFU is that of all devices
        flops = rows[0]["flops"] / rows[0]["positions"]
        for row in rows:
            assert row["mfu"] == pytest.approx(row["positions_per_second"] * flops / (ranks * 1e9))


def test_ddp_is_gone_before_its_process_group(run, monkeypatch):
    """Its reducer would drop the group while it holds Python's lock, for which a thread of the group may be
    waiting."""
    for key, value in dict(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()
    ).items():
        monkeypatch.setenv(key, value)
    ddp, destroy, alive = weakref.WeakSet(), dist.destroy_process_group, []

    class Watched(parallel.DDP):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            ddp.add(self)
            alive.append(len(ddp))

    def watched_destroy():
        alive.append(len(ddp))
        destroy()

    monkeypatch.setattr(parallel, "DDP", Watched)
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
def test_training_continues_where_compilation_fails(run, tmp_path, monkeypatch, capsys):
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


@pytest.mark.parametrize("coefs", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_balance_and_z_loss_are_trained_on_but_not_reported(run, tiny, coefs):
    """The loss column stays the cross-entropy, comparable with a dense run's. Both are means over the layers;
    in the second step the shares of experts are those of the first."""
    knobs = dict(n_layer=2, n_expert=4, top_k=2, max_steps=2, bag_size=1, warmup_steps=0)
    rows = run(balance_coef=coefs[0], router_z_coef=coefs[1], learning_rate=1e-30, **knobs)
    torch.manual_seed(tiny().seed)
    model = GPT(GPTConfig(50, 16, 2, 2, 16, ff_dim=32, n_expert=4, top_k=2))
    data = np.fromfile(tiny().dataset + "/train.bin", dtype=np.uint16).astype(np.int64)
    order = [16 * i for i in shuffled(5999 // 16, (tiny().seed, 0, 0, 0))]
    shares = [[0.5] * 4] * 2
    for row in rows:
        at, order, probs, logits = order[:8], order[8:], [], []
        x = torch.stack([torch.tensor(data[i : i + 17]) for i in at])
        hooks = [
            b.mlp.register_forward_pre_hook(lambda m, a, out=logits: out.append(m.router(a[0])))
            for b in model.blocks
        ]
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        for hook in hooks:
            hook.remove()
        probs = [z.flatten(0, 1).softmax(-1) for z in logits]
        balance = [
            4 * sum(f * p for f, p in zip(share, prob.mean(0)))
            for share, prob in zip(shares, probs)
        ]
        z_loss = [z.logsumexp(-1).square().mean() for z in logits]
        model.zero_grad()
        (loss + coefs[0] * sum(balance) / 2 + coefs[1] * sum(z_loss) / 2).backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
        chosen = [prob.topk(2).indices.flatten().bincount(minlength=4) for prob in probs]
        shares = [(count / 128).tolist() for count in chosen]


# ---- the command line and its knobs


def command_line(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def test_command_line(run, tiny, tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.py"
    config.write_text("".join(f"{key} = {value!r}\n" for key, value in vars(tiny()).items()))
    command_line(
        monkeypatch, str(config), "--bag_size=4", "--max_steps=3", "--superposition_ratio=0.67"
    )
    rows = read_rows(tiny().out_dir)
    assert [row["data_tokens"] for row in rows] == [512, 1024, 1152]
    assert (
        "2 of 3 steps on bags of 4" in (out := capsys.readouterr().out) and "3.00 x the text" in out
    )


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(bag_size=0), "bag_size must be at least 1"),
        (dict(max_steps=0), "max_steps"),
        (dict(log_interval=0), "log_interval"),
        (dict(superposition_ratio=1.1), "superposition_ratio must be in 0..1"),
        (dict(beta2=-0.1), "beta2"),
        (dict(bag_weights="unifrom"), "bag_weights must be one of uniform, power"),
        (dict(schedule="linear"), "schedule"),
        (dict(dtype="float16"), "dtype"),
        (dict(compile="true"), "compile"),
        (dict(learning_rate=0.0), "learning_rate"),
        (dict(learning_rate=math.nan), "learning_rate"),
        (dict(rope_theta=0.0), "rope_theta must be positive"),
        (dict(learning_rate=1e31), r"learning_rate takes a finite number below 1e\+30"),
        (dict(balance_bias=True), "balance_bias belongs to a mixture of experts"),
        (dict(reinit_at_switch=","), "reinit_at_switch takes embedding, head, optimizer"),
        (
            dict(reinit_at_switch="head", tie_embeddings=True),
            "tied to the embedding",
        ),
        (
            dict(fitted="fit.json", bag_weights="power"),
            "is for bag_weights=fitted",
        ),
        (dict(n_head=3), "n_embd 16 is no multiple of n_head 3"),
        (dict(batch_size=3), "total_batch 128"),
        (dict(batch_size=16), "total_batch 128"),
        (dict(head_dim=5), "head_dim"),
        (dict(n_kv_head=3), "n_kv_head"),
        (dict(n_expert=2), "top_k"),
        (dict(device="cuda"), "device=cuda"),
        (dict(device="cuda:x"), "cuda:N"),
        (dict(seed=-1), "seed"),
        (dict(threads=10**6), "threads must be in 0..1024"),
        (dict(n_embd=1_000_000), "parameters takes .* GB.*n_embd"),
        (dict(superposition_ratio=0.01), "has no steps; use a larger superposition_ratio"),
        (dict(bag_weights="fitted", fitted=__file__), "is not a file of tools.fit_mi"),
        (dict(parallel="ddp"), "parallel=ddp needs ranks: torchrun"),
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
    assert second["step"] == 10 and all(
        torch.equal(first[name], second["model"][name]) for name in first
    )


def test_a_mixture_of_experts_resumes_with_other_micro_batches(run, tmp_path, monkeypatch):
    """Its balance loss is that of the whole batch, and the shares of the step before are in the
    checkpoint."""
    knobs = dict(n_expert=4, top_k=2, balance_coef=1.0)
    unbroken = run(out_dir=str(tmp_path / "whole"), **knobs)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        ask_to_stop(patch, 5)
        run(**knobs)
    assert column(run(resume=True, **knobs), *LEARNED) == column(unbroken, *LEARNED)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        ask_to_stop(patch, 5)
        run(overwrite=True, **knobs)
    resumed = run(resume=True, batch_size=2, **knobs)
    assert [r["loss"] for r in resumed] == pytest.approx([r["loss"] for r in unbroken], rel=1e-5)


def test_a_run_is_not_overwritten_unless_asked_for(run, tiny):
    before = run()
    with pytest.raises(UserError, match="--resume.*--overwrite.*--out_dir"):
        run(max_steps=4)
    assert read_rows(tiny().out_dir) == before
    assert len(run(max_steps=4, overwrite=True)) == 4


# ---- what a row says


def test_the_clock_counts_what_was_trained_since_the_last_row(run, monkeypatch):
    """A clock that moves by a second in each step."""
    clock, multiplier = [0.0], train.rate_multiplier

    def tick(step, c):
        clock[0] += 1.0
        return multiplier(step, c)

    monkeypatch.setattr(train, "rate_multiplier", tick)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    rows = run(log_interval=4, eval_interval=100)
    assert column(rows, "step", "seconds") == [[1, 1.0], [4, 4.0], [5, 5.0], [8, 8.0], [10, 10.0]]
    assert {row["positions_per_second"] for row in rows} == {128.0}


def test_epochs_are_of_what_an_epoch_reads(run):
    """Of 6,000 tokens 124 runs of 48 are read; the rest is shorter than a run and its labels."""
    assert all(row["epoch"] == row["data_tokens"] / (124 * 48) for row in run())


def test_products_are_in_the_dtype_asked_for(run, tmp_path, monkeypatch):
    seen, forward = set(), GPT.forward

    def watch(self, *args):
        seen.add(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return forward(self, *args)

    monkeypatch.setattr(GPT, "forward", watch)
    for dtype, wanted in (("bfloat16", torch.bfloat16), ("float32", False)):
        run(dtype=dtype, max_steps=2, superposition_ratio=0.5, out_dir=str(tmp_path / dtype))
        assert seen == {wanted}
        seen.clear()


def test_the_seed_is_that_of_the_initial_weights(run, tiny, tmp_path):
    for seed in (1, 2):
        run(
            seed=seed,
            max_steps=2,
            superposition_ratio=0.5,
            learning_rate=1e-30,
            out_dir=str(tmp_path / f"{seed}"),
        )
        torch.manual_seed(seed)
        wanted = tiny_model(tiny()).state_dict()
        got = load(tmp_path / f"{seed}")["model"]
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_what_a_checkpoint_holds_is_taken_up(run, tiny, tmp_path):
    """The state of torch's generator, the best loss and the seconds so far; initial weights are not read
    again."""
    run(max_steps=6, superposition_ratio=0.5)
    saved = load(tiny().out_dir)
    saved |= {
        "rng": torch.Generator().manual_seed(99).get_state(),
        "best_val": 0.0,
        "seconds": 1000.0,
    }
    torch.save(saved, tiny().out_dir + "/last.pt")
    os.remove(tiny().out_dir + "/best.pt")
    knobs = dict(resume=True, allow_changes=True, max_steps=12, init_from="no/such/file")
    rows = run(superposition_ratio=0.5, **knobs)
    assert torch.equal(torch.get_rng_state(), saved["rng"])
    assert (
        not os.path.exists(tiny().out_dir + "/best.pt") and load(tiny().out_dir)["best_val"] == 0.0
    )
    assert rows[-1]["seconds"] > 1000


# ---- what goes wrong on the way


def test_weights_that_are_not_finite_never_replace_a_checkpoint(run, tiny, monkeypatch):
    """The loss of a step is that of the weights before it: a broken gradient shows in it one step too
    late."""
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


def test_a_damaged_log_is_one_line_that_helps(run, tiny):
    run()
    path = Path(tiny().out_dir, "metrics.jsonl")
    for line in (b'{"step": 1\n', b"\xff\xfe\n", b"[1]\n", b'{"step": null}\n'):
        whole = path.read_bytes()
        path.write_bytes(line + whole)
        with pytest.raises(UserError, match="metrics.jsonl is damaged; move it away"):
            run(resume=True)
        path.write_bytes(whole)
    path.unlink()
    assert run(resume=True, allow_changes=True, max_steps=12)[-1]["step"] == 12


def test_a_log_shorter_than_its_checkpoint_is_said(run, tiny, capsys):
    """And rows younger than the checkpoint, with half a line of a killed process, are written again."""
    unbroken = run()
    path = Path(tiny().out_dir, "metrics.jsonl")
    lines = path.read_text().splitlines(True)
    path.write_text("".join(lines) + json.dumps({"step": 11, "loss": 99.0}) + '\n{"step": 12, "lo')
    capsys.readouterr()
    assert run(resume=True) == unbroken and "lacks" not in capsys.readouterr().out
    path.write_text("".join(lines[:7]))
    assert len(run(resume=True)) == 7
    assert "metrics.jsonl lacks the rows from step 7 to 10" in capsys.readouterr().out


def test_the_log_is_on_the_disk_before_a_checkpoint_is_written(run, tiny, monkeypatch):
    done, fsync, save = [], os.fsync, torch.save
    path = tiny().out_dir + "/metrics.jsonl"

    def synced(fd):
        if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
            done.append(len(read_rows(tiny().out_dir)))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(torch, "save", lambda *a: done.append("save") or save(*a))
    run(log_interval=100, eval_interval=100, superposition_ratio=0.0)  # rows of steps 1 and 10
    assert done[:2] == [2, "save"]


def test_files_of_a_resumed_run_must_be_as_they_were(run, tiny, tmp_path, monkeypatch):
    """The weights of a bag's labels, and the separator that divides documents."""
    fit, corpus = tmp_path / "fit.json", shutil.copytree(tiny().dataset, tmp_path / "separated")
    meta = json.loads((corpus / "meta.json").read_text()) | {"separator": 0}
    fit.write_text('{"c0": 0.0, "a": 2.0, "k": -2.0}')
    (corpus / "meta.json").write_text(json.dumps(meta))
    knobs = dict(bag_weights="fitted", fitted=str(fit), document_bags=True, dataset=str(corpus))
    run(**knobs)
    fit.write_text('{"c0": 1.0, "a": 2.0, "k": -2.0}')
    with pytest.raises(UserError, match="holds {'c0': 1.0, .* the run began with {'c0': 0.0"):
        run(**knobs, resume=True)
    fit.write_text('{"c0": 0.0, "a": 2.0, "k": -2.0}')
    (corpus / "meta.json").write_text(json.dumps(meta | {"separator": 1}))
    with pytest.raises(UserError, match="separator 1, but the run began with 0"):
        run(**knobs, resume=True)
    run(**knobs, resume=True, allow_changes=True)


def test_checkpoints_come_by_step_and_by_time(run, monkeypatch):
    """By time at rows that are written anyway, the first within a minute, then every five minutes; none where
    save_interval is 0. Here a step takes 20 seconds."""
    saves, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda x, file: saves.append(x["step"]) or save(x, file))
    rows = run(save_interval=3, log_interval=4, eval_interval=100, superposition_ratio=0.0)
    assert sorted({*saves}) == [3, 6, 9, 10]
    clock, multiplier = [0.0], train.rate_multiplier

    def tick(step, c):
        clock[0] += 20.0
        return multiplier(step, c)

    monkeypatch.setattr(train, "rate_multiplier", tick)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    knobs = dict(log_interval=2, eval_interval=100, max_steps=25, superposition_ratio=0.0)
    for save_interval, wanted in ((100, [4, 20, 25]), (0, [25])):
        saves.clear()
        rows = run(save_interval=save_interval, overwrite=True, **knobs)
        assert sorted({*saves}) == wanted
        assert [row["step"] for row in rows] == [1, *range(2, 25, 2), 25]


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_agree_when_to_save_and_to_stop(monkeypatch, rank):
    """Rank 0's clock decides when to save and when to ask again, any rank's signal when to stop."""
    sent, others = [], torch.zeros(3)
    monkeypatch.setattr(
        machine.dist, "all_reduce", lambda x: sent.append(x.tolist()) or x.add_(others)
    )
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    signals = machine.StopSignals(machine.Machine("cpu", "float32", rank=rank, distributed=True))
    signals.save_at = 0.0  # due by this rank's clock
    if rank:  # of rank 0: ask again after 5 steps, and no checkpoint is due
        others[1] = 5
    assert signals.stop(7) is False and signals.save_due is (rank == 0)
    assert sent.pop() == pytest.approx([0, 0, 0] if rank else [0, signals.next_step - 7, 1])
    assert rank == 0 or signals.next_step == 12
    assert signals.stop(signals.next_step - 1) is False and not sent  # nobody is asked before
    others[0] = 1  # another rank was told to stop
    assert signals.stop(signals.next_step) is True


# ---- the folder of a run


def test_a_folder_with_a_checkpoint_or_a_log_holds_a_run(run, tiny):
    """A damaged log that was moved away must not cost the checkpoint, and a run that was killed before its
    first save is not told to resume."""
    run()
    log = Path(tiny().out_dir, "metrics.jsonl")
    config = json.loads(Path(tiny().out_dir, "config.json").read_text())
    assert config["config"] == vars(tiny()) and config["versions"]["torch"] == torch.__version__
    text = log.read_text()
    log.unlink()
    with pytest.raises(UserError, match="already holds a run.*--resume"):
        run()
    assert load(tiny().out_dir)["step"] == 10
    log.write_text(text)
    for name in ("last.pt", "best.pt"):
        os.remove(Path(tiny().out_dir, name))
    with pytest.raises(UserError, match="no last.pt: replace it .--overwrite") as e:
        run()
    assert "--resume" not in str(e.value)
    with pytest.raises(UserError, match="ended before its first save; .*but with --overwrite"):
        run(resume=True)
    assert len(run(overwrite=True)) == 10


def test_a_run_is_overwritten_only_when_the_new_one_has_warmed_up(run, tiny, monkeypatch):
    before = run()
    weights = Path(tiny().out_dir, "last.pt").read_bytes()

    def no_memory(*args):
        raise UserError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="out of memory"):
        patch.setattr(machine.Machine, "compile", no_memory)
        run(overwrite=True, max_steps=4)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="pip install wandb"):
        patch.setitem(sys.modules, "wandb", None)
        run(overwrite=True, max_steps=4, wandb_project="x")
    assert read_rows(tiny().out_dir) == before
    assert Path(tiny().out_dir, "last.pt").read_bytes() == weights
    assert len(run(max_steps=4, overwrite=True)) == 4


def test_a_restarted_process_resumes_its_own_run_alone(tiny, monkeypatch):
    """Not another torchrun's, and not the one to be overwritten, if ranks died before it was."""
    start = lambda: log.RunFolder(tiny().out_dir, machine.Machine("cpu", "float32"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 0")
    old = start()
    old.begin(False, False)
    old.start(False, 0, {})
    Path(old.last).write_bytes(b"old")
    old.lock.close()
    config = tiny(overwrite=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 1")
    assert start().after_restart(config) == config  # the first process
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    folder = start()
    assert folder.after_restart(config) == config  # its first process died in the warm-up
    folder.begin(False, True)
    assert Path(folder.last).read_bytes() == b"old"
    folder.start(False, 0, {})
    assert not os.path.exists(folder.last)
    again = folder.after_restart(config)
    assert (again.resume, again.overwrite) == (False, True)  # there is no checkpoint yet
    Path(folder.last).write_bytes(b"new")
    again = folder.after_restart(config)
    assert (again.resume, again.overwrite) == (True, False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # of torchrun without --rdzv_id
    assert folder.after_restart(config) == config


def test_what_a_folder_holds_is_looked_at_under_its_lock(run, tiny, monkeypatch):
    """Another process may finish between a look and the lock; its files must not be mixed with ours."""
    lock = log.RunFolder._lock

    def late(self):
        monkeypatch.setattr(log.RunFolder, "_lock", lock)
        run()  # the other one
        self.lock = None
        lock(self)

    monkeypatch.setattr(log.RunFolder, "_lock", late)
    with pytest.raises(UserError, match="already holds a run.*--resume"):
        run()
    assert len(read_rows(tiny().out_dir)) == 10


def test_resuming_needs_no_other_knob(run, tiny, tmp_path, monkeypatch):
    """Knobs that are not given are those of the run; one that is given and differs is still refused."""
    wanted = run(out_dir=str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        ask_to_stop(patch, 1)
        run()
    here = f"--out_dir={tiny().out_dir}"
    with pytest.raises(SystemExit, match="^error: .*other settings: seed 1337 -> 5"):
        command_line(monkeypatch, here, "--resume", "--seed=5")
    command_line(monkeypatch, here, "--resume")
    assert column(read_rows(tiny().out_dir), *LEARNED) == column(wanted, *LEARNED)
    config = Path(tiny().out_dir, "config.json")
    for damaged in ("{", "[]", '{"config": 3}', config.read_text().replace(": 1337", ': "x"')):
        config.write_text(damaged)
        with pytest.raises(SystemExit, match="^error: .*config.json"):
            command_line(monkeypatch, here, "--resume")


@pytest.mark.filterwarnings("ignore")
def test_wandb_continues_its_run(run, tmp_path, monkeypatch):
    for name, value in dict(WANDB_MODE="offline", WANDB_DIR=tmp_path, HOME=tmp_path).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for more in ({}, dict(resume=True, allow_changes=True, max_steps=12)):
        run(wandb_project="x", **more)
    ids = {path.name.rpartition("-")[2] for path in tmp_path.glob("wandb/offline-run-*")}
    assert len(ids) == 1


# ---- what is said


def test_what_is_probably_a_mistake_is_said(run, tiny, capsys):
    def said(**knobs):
        run(overwrite=True, **knobs)
        return capsys.readouterr().out

    assert "note" not in said() and "TST: 4 of 10 steps on bags of 3" in said()
    assert "note: warmup_steps 10 is not below max_steps" in said(warmup_steps=10)
    assert "a decay of 5 steps overlap" in said(warmup_steps=6, decay_ratio=0.5)
    assert "note" not in said(warmup_steps=5, decay_ratio=0.5)
    assert "note" not in said(warmup_steps=6, decay_ratio=0.5, schedule="cosine")
    assert "without superposition; --bag_size=2 turns it on" in said(bag_size=1)
    assert re.search(
        "reads its text 1[0-9] times.*fewer steps", said(max_steps=500, log_interval=500)
    )
    run(resume=True, allow_changes=True, bag_size=2, max_steps=500)
    out = capsys.readouterr().out
    assert "is finished: step 500 of 500" in out and "TST" not in out
    c = tiny()
    for vocab_size in (50, 50_257):
        with torch.device("meta"):
            model = GPT(checkpoint.model_config(vars(c), {"vocab_size": vocab_size}))
        log.warn(c, machine.Machine("cpu", "float32"), model, 1.0)
    out = capsys.readouterr().out
    assert re.search(r"99\.\d% of the work .* 50,257 tokens.*--encoding=bytes", out)
    assert out.count("\n") == 1


def test_the_line_of_a_row_follows_the_present_pace_and_may_hold_more():
    row = dict(step=100, bag_size=2, loss=1.0, lr=0.1, grad_norm=1.0, positions_per_second=1e3)
    line = log.progress(row | {"seconds": 1e6, "a_new_metric": 3.0}, 400, 0.5)
    assert (
        line
        == "step 100/400 | s 2 | loss 1.0000 | lr 1.00e-01 | norm 1.00 | 500.0 ms | 1.0k pos/s | eta 2m30s"
    )


# ---- the machine


def test_the_variables_of_the_launcher_are_one_set(monkeypatch):
    one_set = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
    for given, wanted in (({}, (0, 0, 1, 0)), (one_set, (1, 1, 4, 2)), ({"LOCAL_RANK": "1"}, (0, 0, 1, 0)),
                          ({"WORLD_SIZE": "", "RANK": ""}, (0, 0, 1, 0))):  # fmt: skip
        with monkeypatch.context() as patch:
            for key, value in given.items():
                patch.setenv(key, value)
            assert machine.launcher() == wanted
    for wrong in (
        {"WORLD_SIZE": "2"},
        {"RANK": "0"},
        one_set | {"RANK": "4"},
        one_set | {"RANK": "x"},
    ):
        with monkeypatch.context() as patch:
            for key, value in wrong.items():
                patch.setenv(key, value)
            with pytest.raises(
                UserError, match="is not what torchrun sets: use torchrun, or unset"
            ):
                machine.launcher()


def test_ranks_that_do_not_find_each_other_are_one_line(monkeypatch):
    def fail(*args, **more):
        raise RuntimeError("Unable to find address for:\nnope0")

    monkeypatch.setattr(machine.dist, "rendezvous", fail)
    with pytest.raises(UserError, match="for: nope0.; check MASTER_ADDR.*GLOO_SOCKET_IFNAME"):
        machine.join("cpu")


def test_threads_that_wait_spin_briefly_unless_the_user_decides(monkeypatch):
    """Set before torch is imported."""
    for given, wanted in (
        ({}, "2000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "passive"}, None),
    ):
        with monkeypatch.context() as patch:
            for key in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
                patch.delenv(key, raising=False)
            for key, value in given.items():
                patch.setenv(key, value)
            users = runpy.run_path(str(ROOT / "nanotst/__init__.py"))["USERS_ENVIRONMENT"]
            assert os.environ.get("GOMP_SPINCOUNT") == wanted
            assert users.get("GOMP_SPINCOUNT") == given.get("GOMP_SPINCOUNT")
            os.environ.pop("GOMP_SPINCOUNT", None)
    source = (ROOT / "train.py").read_text()
    assert source.index("from nanotst import") < source.index("import torch")


def test_a_cpu_is_deterministic_anyway(run, tmp_path):
    wanted = run(out_dir=str(tmp_path / "plain"))
    assert column(run(deterministic=True), *LEARNED) == column(wanted, *LEARNED)
    assert not torch.are_deterministic_algorithms_enabled()


def test_out_of_memory_is_one_line():
    def main(config):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(UserError, match="out of memory: use a smaller --batch_size"):
        machine.as_one(main)(None)


def test_interrupted_imports_print_nothing():
    """train.py imports torch first, which takes seconds."""
    argv = [sys.executable, "-X", "importtime", str(ROOT / "train.py"), "--dataset=no/such"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "torch" not in (line := process.stderr.readline()) and line:  # one of its modules is done
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err and "error" not in err and not out
    assert process.returncode == -signal.SIGINT


# ---- at the switch, and within documents


@pytest.mark.parametrize("parts", ["embedding,head", "head,optimizer"])
def test_parts_that_are_reset_at_the_switch(run, tiny, tmp_path, monkeypatch, parts):
    """Just before the first ordinary step: the named weights are those of another draw, the others those that
    superposition left, and the optimizer has forgotten its moments or not. A run resumed there does the
    same."""
    seen, forward = [], train.reinitialise

    def watch(model, optimizer, *args):
        before = {name: p.clone() for name, p in model.state_dict().items()}
        forward(model, optimizer, *args)
        changed = {
            name for name, p in model.state_dict().items() if not torch.equal(p, before[name])
        }
        seen.append((changed, sum(len(o.state) for o in optimizer)))

    monkeypatch.setattr(train, "reinitialise", watch)
    rows = run(reinit_at_switch=parts)
    wanted = {name for name in ("embed.weight", "head.weight") if name[:4] in parts}
    assert len(seen) == 1 and seen[0][0] == wanted and (seen[0][1] == 0) == ("optimizer" in parts)
    assert column(rows[:4], "loss") == column(run(out_dir=str(tmp_path / "plain")), "loss")[:4]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        ask_to_stop(patch, 4)
        run(out_dir=str(tmp_path / "b"), reinit_at_switch=parts)
    assert column(
        run(out_dir=str(tmp_path / "b"), reinit_at_switch=parts, resume=True), *LEARNED
    ) == column(rows, *LEARNED)


def test_bags_within_documents_equal_a_plain_loop(run, tiny, tmp_path):
    """Of a bag the tokens of its last token's document are averaged, of its labels those count: a loop over
    them."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 50, 6500)
    tokens[rng.random(6500) < 0.2] = 0  # the separator, which begins a document
    folder = write_corpus(tmp_path / "documents", tokens[:6000], tokens[6000:], 50)
    meta = json.loads(Path(folder, "meta.json").read_text())
    Path(folder, "meta.json").write_text(json.dumps(meta | {"separator": 0}))
    row = run(dataset=folder, document_bags=True, max_steps=2, superposition_ratio=0.5)[0]
    torch.manual_seed(tiny().seed)
    model = tiny_model(tiny())
    at = [48 * i for i in shuffled((6000 - 3) // 48, (tiny().seed, 0, 0, 0))][:8]
    sums, counts = [0.0] * 3, [0] * 3
    for start in at:
        text = tokens[start : start + 51].tolist()
        document = np.cumsum([token == 0 for token in text]).tolist()
        x = []
        for j in range(16):
            bag = [i for i in range(3 * j, 3 * j + 3) if document[i] == document[3 * j + 2]]
            x.append(sum(model.embed.weight[text[i]] for i in bag) / len(bag))
        handle = model.embed.register_forward_hook(lambda *_, x=x: torch.stack(x)[None])
        log_p = model(torch.zeros(1, 16, dtype=torch.long))[0].log_softmax(-1)  # (16, V)
        handle.remove()
        for j in range(16):
            for k in range(3):
                i = 3 * j + 3 + k
                if document[i] == document[3 * j + 2]:
                    sums[k] -= log_p[j, text[i]].item()
                    counts[k] += 1
    assert row["loss"] == pytest.approx(sum(s / n for s, n in zip(sums, counts)) / 3, rel=1e-5)


@pytest.mark.parametrize("mode, n_in, n_out", [("full", 3, 3), ("input", 3, 1), ("output", 1, 3)])
def test_bags_have_the_loss_of_the_knob_in_every_mode(
    run, tiny, tmp_path, monkeypatch, mode, n_in, n_out
):
    """And ordinary steps, as all evaluations, cross-entropy. With document_bags, bags are masked in every
    mode, too."""
    seen, forward = set(), GPT.forward

    def watch(model, bags, labels=None, weights=None, loss="mce", load_shares=None, bag_share=None):
        seen.add((bags.shape[-1], labels.shape[-1], loss, bag_share is not None))
        return forward(model, bags, labels, weights, loss, load_shares, bag_share)

    monkeypatch.setattr(GPT, "forward", watch)
    corpus = shutil.copytree(tiny().dataset, tmp_path / "separated")
    meta = json.loads((corpus / "meta.json").read_text())
    (corpus / "meta.json").write_text(json.dumps(meta | {"separator": 0}))
    run(superposition=mode, loss="hinge", document_bags=True, dataset=str(corpus))
    assert seen == {(n_in, n_out, "hinge", True), (1, 1, "mce", False)}
    phases = [row["phase"] for row in read_rows(tiny().out_dir)]
    assert phases == ["superposition"] * 4 + ["recovery"] * 6


def test_what_is_reset_is_drawn_from_the_seed_of_the_run(run, tiny, monkeypatch):
    seeds, forward = [], train.reinitialise
    monkeypatch.setattr(
        train, "reinitialise", lambda *args: seeds.append(args[-1]) or forward(*args)
    )
    drawn = []
    for seed in (1, 1, 2):
        model = GPT(checkpoint.model_config(vars(tiny()), {"vocab_size": 50}))
        forward(model, None, ["embedding"], seed)
        drawn.append(model.embed.weight.detach())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    run(seed=5, reinit_at_switch="head")
    run(
        seed=5, reinit_at_switch="head", bag_size="4-2", overwrite=True
    )  # where ordinary training begins
    assert seeds == [6, 6]
    run(seed=5, reinit_at_switch="head", bag_size=1, overwrite=True)  # which has no switch
    assert seeds == [6, 6]


def test_the_bias_of_experts_moves_by_the_rate_in_each_step(run, tiny):
    """Up for those that were chosen too seldom, down for the others."""
    run(**(MOE | dict(balance_rate=0.25, max_steps=1, superposition_ratio=0.0)))
    biases = [v for name, v in load(tiny().out_dir)["model"].items() if name.endswith("mlp.bias")]
    assert biases and all(bias.abs().max() > 0 for bias in biases)
    for bias in biases:
        assert set(bias.tolist()) <= {-0.25, 0.0, 0.25}
