"""train.py, run whole in this process on a tiny model: steps, data, losses and what is said."""

import functools
import json
import math
import os
import re
import runpy
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    LEARNED,
    MOE,
    ROOT,
    SWITCH,
    column,
    command_line,
    load,
    patched_steps,
    read_rows,
    slow_clock,
    stopped_run,
    write_corpus,
)
from torch._dynamo.testing import CompileCounterWithBackend

import train
from model import GPT, GPTConfig
from nanotst import UserError, log, machine, parallel
from nanotst.configurator import entry_point
from nanotst.stream import permute

TST = (0, SWITCH, 3, 3), (SWITCH, 10, 1, 1)  # start, stop, tokens read, tokens predicted


def shuffled(items, key):
    return [items[i] for i in permute(np.arange(len(items)), len(items), key)]


def tokens_of(dataset, split="train"):
    return np.fromfile(f"{dataset}/{split}.bin", dtype=np.uint16).astype(np.int64)


def tiny_model(config, **more):
    """The model of a tiny run, with its initial weights."""
    torch.manual_seed(config.seed)
    return GPT(GPTConfig(50, 16, config.n_layer, 2, 16, ff_dim=32, **more))


def watched_forward(monkeypatch, look):
    """Call look(model, *arguments) before each forward pass."""
    forward = GPT.forward
    watch = lambda model, *args: (look(model, *args), forward(model, *args))[1]
    monkeypatch.setattr(GPT, "forward", watch)


def with_separator(dataset, folder, separator=0):
    """A copy of a corpus in which a token separates documents."""
    shutil.copytree(dataset, folder)
    meta = json.loads((folder / "meta.json").read_text()) | {"separator": separator}
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


# ---- the method as a whole


def plain_training(config, phases=TST, weights=None, make_optimizers=None):
    """Training of the tiny model with nothing but PyTorch's own functions and Python loops. weights of the
    labels of a bag, the same if None. -> a dict per step, and the validation loss."""
    data, model = tokens_of(config.dataset), tiny_model(config)
    optimizers = (make_optimizers or plain_adamw)(model, config)
    n_in, tail = phases[0][2], max(n_out for *_, n_out in phases)
    starts = range(0, len(data) - tail - 16 * n_in + 1, 16 * n_in)  # of rows of 16 positions
    order, log = shuffled(starts, (config.seed, 0, 0, 0)), []
    for p, (start, stop, read, predicted) in enumerate(phases):
        if p:  # what the phase before leaves, cut into rows of this one
            order = [row + 16 * read * i for row in order for i in range(n_in // read)]
            order, n_in = shuffled(order, (config.seed, 0, 0, p)), read
        for step in range(start, stop):
            at, order = order[:8], order[8:]
            inputs = torch.stack([torch.tensor(data[i : i + 16 * read]).view(16, read) for i in at])
            labels = [[data[i + (j + 1) * read :][:predicted] for j in range(16)] for i in at]
            labels = torch.tensor(np.array(labels)).flatten(0, 1)  # (8 * 16, predicted)
            logits = model(inputs).flatten(0, 1)
            share = weights if weights and predicted > 1 else [1 / predicted] * predicted
            share = share(step) if callable(share) else share
            loss = sum(w * F.cross_entropy(logits, labels[:, i]) for i, w in enumerate(share))
            model.zero_grad()
            loss.backward()
            norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
            for parameter in model.parameters():
                parameter.grad *= min(1.0, config.grad_clip / norm) if config.grad_clip else 1.0
            for group in (group for one in optimizers for group in one.param_groups):
                full = group.setdefault("full", group["lr"])
                group["lr"] = full * (0.5 if step == 0 else 1)  # 2 steps of warmup
            [optimizer.step() for optimizer in optimizers]
            log.append({"loss": loss.item(), "grad_norm": norm})
    return log, plain_validation(model, config)


def plain_adamw(model, config, without=()):
    decay = {"params": [], "weight_decay": config.weight_decay}, {"params": [], "weight_decay": 0.0}
    for parameter in model.parameters():
        if not any(parameter is p for p in without):
            decay[parameter.dim() == 1]["params"].append(parameter)
    return [torch.optim.AdamW(decay, lr=0.01, betas=(0.9, 0.95))]


def plain_muon(model, config):
    """The four matrices of the only block by Muon, the rest by AdamW."""
    block = model.blocks[0]
    matrices = block.attn.qkv, block.attn.out, block.mlp.gate_up, block.mlp.down
    matrices = [layer.weight for layer in matrices]
    how = dict(lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [torch.optim.Muon(matrices, **how), *plain_adamw(model, config, matrices)]


@torch.no_grad()
def plain_validation(model, config):
    """Mean next-token loss of 10 rows of 16 positions, evenly spaced over the 500 validation tokens."""
    data = torch.tensor(tokens_of(config.dataset, "val"))
    starts = [int(i * (500 - 17) / 9) for i in range(10)]
    rows = torch.stack([data[i : i + 17] for i in starts])
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).item()


def assert_plain(rows, plain, rel=1e-5):
    log, val_loss = plain
    for key, factor in (("loss", 1), ("grad_norm", 10)):
        wanted = [row[key] for row in log]
        assert [row[key] for row in rows] == pytest.approx(wanted, rel=factor * rel)
    assert rows[-1]["val_loss"] == pytest.approx(val_loss, rel=rel)


@pytest.mark.parametrize(
    "knobs, phases",
    [
        (dict(), TST),
        (dict(bag_size=1, seed=2), [(0, 10, 1, 1)]),
        (dict(superposition="input"), [(0, 4, 3, 1), (4, 10, 1, 1)]),
        (dict(superposition="output"), [(0, 4, 1, 3), (4, 10, 1, 1)]),
        (dict(superposition_ratio=1.0), [(0, 10, 3, 3)]),
        (dict(bag_size="4-2"), [(0, 2, 4, 4), (2, 4, 2, 2), (4, 10, 1, 1)]),
        (dict(grad_clip=0.1), TST),  # acts in every step
        (dict(grad_clip=0.0), TST),  # off
    ],
)
def test_training_equals_a_plain_loop(run, tiny, knobs, phases):
    """Weights, optimizer moments, learning-rate schedule and place in the text continue through the switch; a
    change of any of them at step 4 would show in the losses after it."""
    plain, rows = plain_training(tiny(**knobs), phases), run(**knobs)
    assert min(row["grad_norm"] for row in plain[0]) > 0.1
    assert_plain(rows, plain)
    for start, stop, *n in phases:
        assert {row["bag_size"] for row in rows[start:stop]} == {max(n)}


@pytest.mark.parametrize(
    "knobs, weigh",
    [
        (dict(bag_weights="power"), lambda i: 1 / i),
        (dict(bag_weights="fitted", fitted={"c0": 0.0, "a": 2.0, "k": -2}), lambda i: i**-2),
    ],
)
def test_weights_of_a_bag_reach_the_loss(run, tiny, tmp_path, knobs, weigh):
    if "fitted" in knobs:
        (tmp_path / "fit.json").write_text(json.dumps(knobs["fitted"]))
        knobs = knobs | {"fitted": str(tmp_path / "fit.json")}
    weights = [weigh(i) for i in (1, 2, 3)]
    assert_plain(run(**knobs), plain_training(tiny(), weights=[w / sum(weights) for w in weights]))


def test_weights_fade_to_the_first_label(run, tiny, tmp_path):
    """Over all four steps on bags, the last of which keeps a quarter of the other labels' weight."""
    other = lambda step: (4 - step) / 4 / 3
    weights = lambda step: [1 - 2 * other(step), other(step), other(step)]
    assert_plain(run(fade=1.0), plain_training(tiny(), weights=weights))
    unfaded = run(fade=0.2, out_dir=str(tmp_path / "unfaded"))
    assert_plain(unfaded, plain_training(tiny()))  # the last step begins with a quarter left


def test_muon_equals_a_plain_loop(run, tiny):
    rows = run(optimizer="muon", matrix_learning_rate=0.02)
    assert_plain(rows, plain_training(tiny(), make_optimizers=plain_muon), 1e-3)


@pytest.mark.parametrize("bag_size, ratio", [(3, 0.4), (4, 1.0), (5, 0.0)])
def test_same_flops_and_exactly_so_much_more_text(run, tmp_path, bag_size, ratio):
    """At every step the FLOPs of the baseline; at the end 1 + r(s-1) times its tokens."""
    base = run(bag_size=1, out_dir=str(tmp_path / "base"))
    rows = run(bag_size=bag_size, superposition_ratio=ratio)
    keys = "step", "flops", "positions", "lr"
    assert column(rows, *keys) == column(base, *keys)
    assert base[-1]["positions"] == base[-1]["data_tokens"] == 10 * 128
    assert rows[-1]["data_tokens"] == 128 * (10 + round(10 * ratio) * (bag_size - 1))


def test_rows_of_both_phases(run, monkeypatch):
    monkeypatch.setattr(machine.Machine, "peak_flops", 1e9)
    rows = run()
    phases = ["superposition"] * 4 + ["recovery"] * 6
    assert [row["phase"] for row in rows] == phases
    always = "step phase bag_size loss lr grad_norm positions data_tokens flops seconds epoch mfu"
    assert all({*always.split(), "positions_per_second"} <= row.keys() for row in rows)
    evaluated = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in evaluated] == [5, 10]
    for row in evaluated:
        assert row["val_bpb"] == pytest.approx(row["val_loss"] / math.log(2) / 2.0)
    for row in rows:  # of 6,000 tokens an epoch reads 124 rows of 48
        assert row["epoch"] == row["data_tokens"] / (124 * 48)
        flops = row["flops"] / row["positions"]
        assert row["mfu"] == pytest.approx(row["positions_per_second"] * flops / 1e9)
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_validation_does_not_know_the_phase(run, tiny, tmp_path):
    """The same weights (a learning rate of nothing) have the same validation loss under any bag size and in
    both phases: the next-token loss of the same rows. 10 rows in batches of 4 leave a rest of 2."""
    wanted, knobs = plain_validation(tiny_model(tiny()), tiny()), dict(learning_rate=1e-30)
    for s, weights in ((1, "uniform"), (3, "uniform"), (4, "first")):
        knobs |= dict(bag_size=s, bag_weights=weights, out_dir=str(tmp_path / f"{s}"))
        rows = run(eval_interval=2, batch_size=4, **knobs)
        losses = [row["val_loss"] for row in rows if "val_loss" in row]
        assert len(losses) == 5 and len(set(losses)) == 1
        assert losses[0] == pytest.approx(wanted, rel=1e-6)


def test_best_checkpoint_holds_the_best_model(run, tiny, monkeypatch):
    ruined = lambda step, c: 1.0 if step < 8 else 300.0
    monkeypatch.setattr(train, "rate_multiplier", ruined)
    rows = run(max_steps=12, eval_interval=4)
    best = min((row["val_loss"], row["step"]) for row in rows if "val_loss" in row)
    checkpoint = load(tiny().out_dir, "best.pt")
    assert (checkpoint["best_val"], checkpoint["step"]) == best and best[1] < 12
    model = tiny_model(tiny())
    model.load_state_dict(checkpoint["model"])  # keys without a wrapper's prefix
    assert plain_validation(model, tiny()) == pytest.approx(best[0], rel=1e-5)


# ---- micro-batches and ranks


@pytest.mark.parametrize("kind", [{}, MOE], ids=["dense", "moe"])
def test_eight_micro_steps_equal_one(run, tmp_path, kind):
    knobs = dict(balance_coef=0.1, **kind)
    reference = run(**knobs)  # of 8 rows at once
    for batch_size in (1, 0):
        rows = run(batch_size=batch_size, out_dir=str(tmp_path / f"{batch_size}"), **knobs)
        for row, wanted in zip(rows, reference, strict=True):
            for key in row.keys() - {"phase", "seconds", "positions_per_second"}:
                assert row[key] == pytest.approx(wanted[key], rel=1e-4), key


# ---- compilation in the loop


def test_all_graphs_are_compiled_before_the_first_step_and_none_after(run, monkeypatch):
    """one graph for bags, one for tokens, one for evaluation."""
    counter, seen = CompileCounterWithBackend("eager"), []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(parallel, "SHALLOW", 1)  # a model of so many layers is not deep
    patched_steps(monkeypatch, lambda step: seen.append(counter.frame_count))
    run(compile="on", batch_size=4)
    assert seen + [counter.frame_count] == [3] * 11


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_cuda_graphs_find_the_gradients_where_they_were(run, monkeypatch, tmp_path):
    """Across a compilation that failed, micro-steps, evaluations and the switch; however deep the model is.
    The graphs themselves need CUDA, see tests/cuda."""
    wanted = run(batch_size=4, out_dir=str(tmp_path / "eager"))
    modes, places, compile_, clip = [], set(), torch.compile, train.clip_gradients

    def compiled(f, mode=None, **how):
        modes.append(mode)
        look(f)
        if len(modes) == 1:
            raise OSError("a broken cache")
        return compile_(f, backend="eager", **how)

    def look(model):
        places.add(tuple(p.grad.data_ptr() for p in model.parameters()))

    def clip_and_look(model, limit):
        look(model)
        return clip(model, limit)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(train, "clip_gradients", clip_and_look)
    monkeypatch.setattr(parallel, "SHALLOW", 0)
    with torch.compiler.config.patch(force_disable_caches=False):  # puts back what the run changes
        rows = run(compile="graphs", batch_size=4)
    got, wanted = (column(r, "loss", "grad_norm") for r in (rows, wanted))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert modes == ["reduce-overhead"] * 2 and len(places) == 1


@pytest.mark.parametrize("n_expert", [0, 4])
def test_the_blocks_of_a_deep_model_share_a_graph(run, monkeypatch, tmp_path, n_expert):
    """Embedding and head have a graph each for bags, tokens and evaluation; the blocks one for training and
    one for evaluation."""
    knobs = dict(n_layer=5, n_embd=8, n_expert=n_expert, top_k=min(n_expert, 2), dtype="bfloat16")
    wanted = run(**knobs, out_dir=str(tmp_path / "eager"))
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(parallel, "SHALLOW", 4)
    torch.compiler.reset()
    rows = run(**knobs, compile="on")
    got, wanted = (column(r, "loss", "grad_norm") for r in (rows, wanted))
    np.testing.assert_allclose(got, wanted, rtol=1e-2)
    assert counter.frame_count == 8


def test_float32_experts_train_eagerly_and_say_so(run, monkeypatch, capsys):
    """Their grouped products compile in bfloat16 only; a CPU without it meets this in `make moe`."""
    monkeypatch.setattr(torch, "compile", None)
    assert len(run(compile="on", dtype="float32", n_expert=4, top_k=2)) == 10
    assert "experts compile in bfloat16 only" in capsys.readouterr().out


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


@pytest.mark.parametrize("coefs", [(0.0, 0.0), (0.3, 0.7)])
def test_balance_and_z_loss_are_trained_on_but_not_reported(run, tiny, coefs):
    """The loss column stays the cross-entropy, comparable with a dense run's. Both are means over the layers;
    in the second step the shares of experts are those of the first."""
    knobs = dict(n_layer=2, n_expert=4, top_k=2, max_steps=2, bag_size=1, warmup_steps=0)
    rows = run(balance_coef=coefs[0], router_z_coef=coefs[1], learning_rate=1e-30, **knobs)
    model = tiny_model(tiny(n_layer=2), n_expert=4, top_k=2)
    seen, data = [], tokens_of(tiny().dataset)
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda m, args: seen.append(m.router(args[0])))
    order = shuffled(range(0, 5999 - 15, 16), (tiny().seed, 0, 0, 0))
    shares = torch.full((2, 4), 0.5)
    for row in rows:
        at, order = order[:8], order[8:]
        x = torch.stack([torch.tensor(data[i : i + 17]) for i in at])
        seen.clear()
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        logits = torch.stack(seen).flatten(1, -2)  # (2, N, E)
        probs = logits.softmax(-1)
        balance = 4 * (shares * probs.mean(1)).sum(1).mean()
        z_loss = logits.logsumexp(-1).square().mean()
        model.zero_grad()
        (loss + coefs[0] * balance + coefs[1] * z_loss).backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
        shares = F.one_hot(probs.topk(2).indices, 4).sum((1, 2)) / 128


def test_the_bias_of_experts_moves_by_the_rate_in_each_step(run, tiny):
    """Up for those that were chosen too seldom, down for the others."""
    run(**(MOE | dict(balance_rate=0.25, max_steps=1, superposition_ratio=0.0)))
    biases = [v for name, v in load(tiny().out_dir)["model"].items() if name.endswith("mlp.bias")]
    for bias in biases:
        assert bias.abs().max() > 0 and set(bias.tolist()) <= {-0.25, 0.0, 0.25}
    assert len(biases) == 1


# ---- the command line and its knobs


def test_command_line(tiny, tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.py"
    config.write_text("".join(f"{key} = {value!r}\n" for key, value in vars(tiny()).items()))
    more = "--bag_size=4", "--max_steps=3", "--superposition_ratio=0.67"
    command_line(monkeypatch, str(config), *more)
    assert [row["data_tokens"] for row in read_rows(tiny().out_dir)] == [512, 1024, 1152]
    out = capsys.readouterr().out
    assert "2 of 3 steps on bags of 4" in out and "3.00 x the text" in out


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(bag_size=0), "bag_size must be at least 1"),
        (dict(seed=-1), "seed must be at least 0"),
        (dict(superposition_ratio=1.1), "superposition_ratio must be in 0..1"),
        (dict(superposition_ratio=0.01), "has no steps; use a larger superposition_ratio"),
        (dict(fade=-0.1), "fade must be in 0..1"),
        (dict(beta2=1.0), "beta2 must be at least 0 and below 1"),
        (dict(learning_rate=0.0), "learning_rate must be positive"),
        (dict(balance_bias=True), "balance_bias needs a mixture"),
        (dict(reinit_at_switch=","), "reinit_at_switch takes embedding, head, optimizer"),
        (dict(reinit_at_switch="head", tie_embeddings=True), "tied to the embedding"),
        (dict(fitted="fit.json", bag_weights="power"), "is for bag_weights=fitted"),
        (dict(bag_weights="fitted", fitted=__file__), "is not a file of tools.fit_mi"),
        (dict(loss="bce", bag_weights="power"), "is for loss=mce"),
        (dict(n_head=3), "n_embd 16 is no multiple of n_head 3"),
        (dict(batch_size=3), "total_batch 128 must be a multiple of batch_size 3 x"),
        (dict(n_expert=2), "top_k"),
        (dict(n_embd=1_000_000), "parameters takes .* GB.*n_embd"),
        (dict(document_bags=True), "document_bags needs a document separator"),
        (dict(bag_size=100), "corpus 1 of 1 has 6,000 tokens"),
        (dict(block_size=512, total_batch=512, batch_size=1), "validation"),
        (dict(dataset="no/such/folder"), "no prepared corpus"),
        (dict(init_from="no/such/file"), "no/such/file"),
        (dict(resume=True, dataset="no/such/folder"), "there is no checkpoint"),
    ],
)
def test_what_cannot_work_is_one_line_that_names_the_knob(run, tiny, knobs, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=words) as e:
        run(**knobs)
    assert "\n" not in str(e.value)
    assert not os.path.exists(tiny().out_dir)  # nothing was begun


def test_learning_rate_by_hand(tiny):
    def rates(max_steps, **knobs):
        c = tiny(max_steps=max_steps, **knobs)
        return [2 * train.rate_multiplier(step, c) for step in range(max_steps)]

    wsd = dict(max_steps=20, warmup_steps=4, decay_ratio=0.25, min_lr_ratio=0.1)
    # the last of 5 steps of decay is not yet the end
    wanted = [0.5, 1.0, 1.5] + [2.0] * 13 + [1.64, 1.28, 0.92, 0.56]
    assert rates(**wsd) == pytest.approx(wanted)
    wanted = [2.0, 2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)]
    assert rates(max_steps=5, warmup_steps=1, schedule="cosine") == pytest.approx(wanted)


# ---- what a row says


def test_the_peak_of_a_gpu_is_that_in_bfloat16(monkeypatch):
    """989 TFLOP/s, dense, by NVIDIA's data sheet. In float32 there is no MFU."""
    monkeypatch.setattr(machine.Machine, "name", "NVIDIA H100 80GB HBM3")
    dtypes = "bfloat16", "float32"
    assert [machine.Machine("cpu", d).peak_flops for d in dtypes] == [989e12, None]


def test_the_clock_counts_what_was_trained_since_the_last_row(run, monkeypatch):
    slow_clock(monkeypatch, 1.0)
    rows = run(log_interval=4, eval_interval=100)
    assert column(rows, "step", "seconds") == [[1, 1.0], [4, 4.0], [5, 5.0], [8, 8.0], [10, 10.0]]
    assert {row["positions_per_second"] for row in rows} == {128.0}


@pytest.mark.parametrize("dtype, wanted", [("bfloat16", torch.bfloat16), ("float32", False)])
def test_products_are_in_the_dtype_asked_for(run, monkeypatch, dtype, wanted):
    seen = set()
    dtype_now = lambda: torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    watched_forward(monkeypatch, lambda model, *args: seen.add(dtype_now()))
    run(dtype=dtype, plain=True, max_steps=2, superposition_ratio=0.5)
    assert seen == {wanted}


# ---- what is said


def test_what_is_probably_a_mistake_is_said(run, capsys):
    def said(**knobs):
        run(overwrite=True, **knobs)
        return capsys.readouterr().out

    assert "note" not in said() and "TST: 4 of 10 steps on bags of 3" in said()
    assert "6 steps of warmup and 5 of decay do not fit" in said(warmup_steps=6, decay_ratio=0.5)
    assert "note" not in said(warmup_steps=6, decay_ratio=0.5, schedule="cosine")
    assert "ordinary training, without superposition" in said(bag_size=1)
    long = said(max_steps=50, log_interval=50, total_batch=1280, batch_size=80)
    assert re.search("reads its text 1[0-9] times.*fewer steps", long)
    run(resume=True, allow_changes=True, bag_size=2, max_steps=50)
    out = capsys.readouterr().out
    assert "is finished: step 50 of 50" in out and "TST" not in out


def test_the_line_of_a_row_follows_the_present_pace_and_may_hold_more():
    row = dict(step=100, bag_size=2, loss=1.0, lr=0.1, grad_norm=1.0, positions_per_second=1e3)
    line = log.progress(row | {"seconds": 1e6, "a_new_metric": 3.0}, 400, 0.5)
    wanted = "step 100/400 | s 2 | loss 1.0000 | lr 1.00e-01 | norm 1.00 | 500.0 ms | 1.0k pos/s"
    assert line == wanted + " | eta 2m30s"


# ---- the machine


def test_the_variables_of_the_launcher_are_one_set(monkeypatch):
    assert machine.launcher() == (0, 0, 1, 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="are not all set: use torchrun, or unset"):
        machine.launcher()
    for key, value in dict(RANK="3", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2").items():
        monkeypatch.setenv(key, value)
    assert machine.launcher() == (3, 1, 4, 2)


def test_ranks_that_do_not_find_each_other_are_one_line(monkeypatch):
    def fail(*args, **more):
        raise RuntimeError("Unable to find address for:\nnope0")

    monkeypatch.setattr(machine.dist, "rendezvous", fail)
    with pytest.raises(UserError, match="for: nope0.; check MASTER_ADDR.*GLOO_SOCKET_IFNAME"):
        machine.join("cpu")


@pytest.mark.parametrize(
    "given, wanted",
    [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_threads_that_wait_spin_briefly_unless_the_user_decides(monkeypatch, given, wanted):
    """Set before torch is imported."""
    monkeypatch.setattr(os, "environ", dict(given))
    users = runpy.run_path(str(ROOT / "nanotst/__init__.py"))["USERS_ENVIRONMENT"]
    assert os.environ.get("GOMP_SPINCOUNT") == wanted and users == given
    for script in ("train.py", "tools/bench.py", "examples/hf_tst.py"):
        source = (ROOT / script).read_text()
        first = re.search(r"\n(from nanotst import|import train|import torch)", source)[1]
        assert first != "import torch"  # train imports nanotst first


def test_out_of_memory_is_one_line():
    def main(config):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(SystemExit, match="^error: out of memory: use a smaller --batch_size"):
        entry_point(main, train.Config, [])


# ---- at the switch, and within documents


@pytest.mark.parametrize("parts", ["embedding,head", "head,optimizer"])
def test_parts_that_are_reset_at_the_switch(run, tmp_path, monkeypatch, parts):
    """Just before the first ordinary step: the named weights are those of another draw, the others those that
    superposition left, and the optimizer has forgotten its moments or not. A run resumed there does the
    same."""
    seen, forward = [], train.reinitialise

    def watch(model, optimizer, names, seed):
        before = {name: p.clone() for name, p in model.state_dict().items()}
        forward(model, optimizer, names, seed)
        new = model.state_dict().items()
        changed = {name for name, p in new if not torch.equal(p, before[name])}
        seen.append((changed, sum(len(o.state) for o in optimizer) == 0, seed))

    monkeypatch.setattr(train, "reinitialise", watch)
    knobs = dict(reinit_at_switch=parts, seed=5)
    rows, other = run(**knobs), dict(out_dir=str(tmp_path / "other"))
    wanted = {name for name in ("embed.weight", "head.weight") if name[:4] in parts}
    assert seen == [(wanted, "optimizer" in parts, 6)]
    assert column(rows[:4], "loss") == column(run(seed=5, **other)[:4], "loss")
    stopped_run(run, 4, overwrite=True, **other, **knobs)
    resumed = run(resume=True, **other, **knobs)
    assert column(resumed, *LEARNED) == column(rows, *LEARNED)
    run(bag_size="4-2", overwrite=True, **knobs)  # where ordinary training begins
    run(bag_size=1, overwrite=True, **knobs)  # which has no switch
    assert len(seen) == 3


def test_bags_within_documents_equal_a_plain_loop(run, tiny, tmp_path):
    """Of a bag the tokens of its last token's document are averaged, of its labels those count: a loop over
    them."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 50, 6500)
    tokens[rng.random(6500) < 0.2] = 0  # the separator, which begins a document
    folder = write_corpus(tmp_path / "text", tokens[:6000], tokens[6000:], 50)
    folder = with_separator(folder, tmp_path / "documents")
    row = run(dataset=folder, document_bags=True, max_steps=2, superposition_ratio=0.5)[0]
    model = tiny_model(tiny())
    losses = [[], [], []]  # by place in the bag
    for start in shuffled(range(0, 5997 - 47, 48), (tiny().seed, 0, 0, 0))[:8]:
        text = tokens[start : start + 51].tolist()
        document = np.cumsum([token == 0 for token in text]).tolist()
        x = []
        for j in range(16):
            bag = [i for i in range(3 * j, 3 * j + 3) if document[i] == document[3 * j + 2]]
            x.append(sum(model.embed.weight[text[i]] for i in bag) / len(bag))
        handle = model.embed.register_forward_hook(lambda *_, x=x: torch.stack(x)[None])
        log_p = model(torch.zeros(1, 16, dtype=torch.long))[0].log_softmax(-1)  # (16, V)
        handle.remove()
        for i in range(3, 51):
            j, k = divmod(i - 3, 3)
            if document[i] == document[3 * j + 2]:
                losses[k].append(-log_p[j, text[i]].item())
    assert row["loss"] == pytest.approx(sum(map(np.mean, losses)) / 3, rel=1e-5)


@pytest.mark.parametrize("mode, n_in, n_out", [("full", 3, 3), ("input", 3, 1), ("output", 1, 3)])
def test_bags_have_the_loss_of_the_knob_in_every_mode(
    run, tiny, tmp_path, monkeypatch, mode, n_in, n_out
):
    """And ordinary steps, as all evaluations, cross-entropy. With document_bags, bags are masked in every
    mode, too."""
    seen = set()

    def look(model, bags, labels, weights=None, loss="mce", load_shares=None, bag_share=None):
        seen.add((bags.shape[-1], labels.shape[-1], loss, bag_share is not None))

    watched_forward(monkeypatch, look)
    knobs = dict(superposition=mode, loss="hinge", document_bags=True, plain=True)
    run(dataset=with_separator(tiny().dataset, tmp_path / "separated"), **knobs)
    assert seen == {(n_in, n_out, "hinge", True), (1, 1, "mce", False)}
