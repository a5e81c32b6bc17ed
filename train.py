"""Train a GPT with Token Superposition Training, or without (bag_size=1).

    python train.py config/curves.py --bag_size=4 --out_dir=out/tst
    torchrun --standalone --nproc_per_node=8 train.py config/dense_270m.py

The script reads from top to bottom: knobs, checks, and main: set up, loop, log. Superposition enters in the
lines marked TST: the phases, the phase of a step, bags and labels, their weights. nanotst/stream.py decides
which text a phase reads.
"""

import dataclasses
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

from nanotst import UserError  # before torch: it sets how torch's threads wait

# The phases differ in tensor sizes, which would fragment the memory of a GPU
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.nn.functional as F

import tst
from nanotst.checkpoint import Saver, load_initial, model_config, resume
from nanotst.configurator import Bags, Free, entry_point, marked
from nanotst.huggingface import load_hf
from nanotst.kernels import use_twins
from nanotst.log import RunFolder, describe_run, knobs_of_run, progress, router_metrics
from nanotst.machine import Machine, StopSignals, launcher
from nanotst.mixture import open_mixture
from nanotst.optim import OPTIMIZERS, SCHEDULES, make_optimizer, rate_multiplier, set_rates
from nanotst.parallel import build, check_size, clip_gradients, init_weights, sync_gradients, wrap
from nanotst.stream import TokenStream, validation_rows

# ------------------------------------------------------------------------------------------------------ knobs


@dataclass
class Config:
    """Usage: python train.py [CONFIG.py ...] [--key=value ...]"""

    # Run
    out_dir: Free[str] = "out/run"  # folder for metrics.jsonl, config.json and checkpoints
    dataset: Free[str] = "python_source"  # a corpus in data/ or elsewhere, or several: A:0.5,B:0.5
    resume: Free[bool] = False  # resume from the last checkpoint; unset knobs keep the run's values
    allow_changes: Free[bool] = False  # with --resume: allow knobs that change the training
    overwrite: Free[bool] = False  # replace the run in out_dir
    init_from: Free[str] = ""  # initial weights: a checkpoint, or hf:FOLDER from Hugging Face
    seed: int = 1337  # seed of the initial weights and of the order of the text

    # Token superposition: the first superposition_ratio of the steps train on bags of bag_size tokens
    bag_size: Bags[int | str] = 1  # s, tokens per bag; 1 is ordinary training, 8-4-2 steps down
    superposition_ratio: Bags[float] = 0.3  # r, share of the steps
    superposition: Bags[Literal[tst.MODES]] = "full"  # bags in input and target, or in one of them
    loss: Bags[Literal[tuple(tst.LOSSES)]] = "mce"  # loss on bags; ordinary steps use cross-entropy
    bag_weights: Bags[Literal[tst.BAG_WEIGHTS]] = "uniform"  # label weights within a bag (mce only)
    fade: Bags[float] = 0.0  # weights fade to the first label in this last share of a bagged phase
    document_bags: Bags[bool] = False  # bags ignore other documents; losses depend on batch_size
    reinit_at_switch: Bags[str] = ""  # reset at the switch: embedding,head,optimizer (hurts)
    fitted: Bags[str] = ""  # tools.fit_mi's file for bag_weights=fitted; empty: the paper's fit

    # Model
    n_layer: int = 2  # blocks
    n_head: int = 1  # attention heads
    n_kv_head: int = 0  # key and value heads; 0: n_head, fewer is grouped-query attention
    n_embd: int = 64  # width
    head_dim: int = 0  # width of a head; 0: n_embd / n_head
    ff_dim: int = 0  # width of the MLP or of an expert; 0: 8/3 n_embd, rounded up to 64
    qk_norm: bool = False  # RMSNorm on each head's queries and keys, as in Qwen3
    tie_embeddings: bool = False  # one matrix for embedding and head
    rope_theta: float = 10000.0  # base of the rotary angles
    norm_eps: float = 1e-5  # epsilon in RMSNorm
    attention_window: int = 0  # positions each one attends to, itself included; 0: all so far
    checkpoint_activations: Free[bool] = False  # less memory for a third more FLOPs

    # Mixture of experts
    n_expert: int = 0  # experts per layer; 0: dense
    top_k: int = 0  # experts per position
    balance_coef: float = 0.001  # coefficient of the load-balancing loss (top_k when balanced)
    router_z_coef: float = 0.0  # coefficient of the router's z-loss
    balance_bias: bool = False  # a bias on expert choice that evens out their load
    balance_rate: float = 0.001  # change of that bias per step

    # Batch and schedule
    block_size: int = 128  # L, positions in a row
    total_batch: int = 8192  # positions per optimizer step over all ranks; a bag is one position
    batch_size: Free[int] = 0  # rows per micro-batch of a rank; 0: all its rows at once
    max_steps: int = 2000  # optimizer steps; the schedule and the phases follow from it
    optimizer: Literal[tuple(OPTIMIZERS)] = "adamw"  # muon: for matrices in blocks, else AdamW
    learning_rate: float = 8e-3  # peak learning rate
    matrix_learning_rate: float = 0.0  # Muon's peak learning rate; 0: learning_rate
    schedule: Literal[SCHEDULES] = "wsd"  # warmup, constant, linear decay; or cosine
    warmup_steps: int = 100  # steps over which the rate rises from 0
    decay_ratio: float = 0.1  # share of the steps at the end over which the rate falls (wsd)
    min_lr_ratio: float = 0.0  # final rate as a share of the peak
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # AdamW's decay of the mean squared gradient; Muon's momentum
    weight_decay: float = 0.1  # weight decay of all but norms and other scales
    grad_clip: float = 1.0  # gradient norm to clip at; 0: off

    # Evaluation and logs
    eval_interval: Free[int] = 100  # steps between validation losses
    eval_positions: int = 131072  # positions in the fixed validation rows of each corpus
    log_interval: Free[int] = 20  # steps between rows of metrics.jsonl
    save_interval: Free[int] = 500  # steps between checkpoints, some also by time; 0: at the end
    wandb_project: Free[str] = ""  # project to log to on Weights & Biases

    # Machine
    device: Free[str] = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of matrix products, not of weights
    compile: Free[Literal["auto", "on", "off", "graphs"]] = "auto"  # auto: on CUDA; or CUDA graphs
    plain: Free[bool] = False  # only the plain code of model.py and tst.py, without faster twins
    deterministic: Free[bool] = False  # bit-identical runs on CUDA too; slower
    threads: Free[int] = 0  # CPU threads of a rank; 0: PyTorch's choice
    parallel: Free[Literal["auto", "ddp", "fsdp"]] = "auto"  # fsdp shards the model; auto: ddp
    shard_size: Free[int] = 0  # fsdp: ranks that share one set of weights; 0: all


# ----------------------------------------------------------------------------------------------------- checks


REINIT = {"embedding": "embed.", "head": "head.", "optimizer": None}  # names of weights


def check(c, world_size):
    """Check the knobs and return the run's phases. Raises UserError for knobs that cannot work."""
    counts = "n_layer n_head n_embd block_size total_batch max_steps eval_interval eval_positions"
    sizes = "seed batch_size n_kv_head head_dim ff_dim n_expert top_k warmup_steps save_interval"
    sizes += " threads shard_size weight_decay grad_clip matrix_learning_rate"
    shares = "superposition_ratio fade decay_ratio min_lr_ratio"
    ranges = {
        "at least 1": (counts + " log_interval", lambda x: x >= 1),
        "at least 0": (sizes, lambda x: x >= 0),
        "in 0..1": (shares, lambda x: 0 <= x <= 1),
        "at least 0 and below 1": ("beta1 beta2", lambda x: 0 <= x < 1),
        "positive": ("learning_rate norm_eps rope_theta", lambda x: x > 0),
    }
    for words, (keys, fits) in ranges.items():
        for key in keys.split():
            if not fits(getattr(c, key)):
                raise UserError(f"{key} must be {words}, got {getattr(c, key)}")
    parts = set(c.reinit_at_switch.split(",")) if c.reinit_at_switch else set()
    if parts - REINIT.keys():
        raise UserError(f"reinit_at_switch takes {', '.join(REINIT)}, got {c.reinit_at_switch!r}")
    if c.tie_embeddings and "head" in parts:
        raise UserError("reinit_at_switch=head: tied to the embedding, so use embedding instead")
    if c.fitted and c.bag_weights != "fitted":
        raise UserError(f"fitted={c.fitted} is for bag_weights=fitted, not for {c.bag_weights}")
    if c.loss != "mce" and (c.bag_weights != "uniform" or c.fade):
        raise UserError(f"bag_weights, fade: each is for loss=mce, not for {c.loss}")
    if c.n_embd % c.n_head and not c.head_dim:
        raise UserError(f"n_embd {c.n_embd} is no multiple of n_head {c.n_head}; give head_dim")
    rows = (c.batch_size or 1) * world_size
    if c.total_batch % (rows * c.block_size):
        factors = f"batch_size {c.batch_size or 1} x block_size {c.block_size} x {world_size} ranks"
        raise UserError(f"total_batch {c.total_batch} must be a multiple of {factors}")
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", str(c.bag_size)):
        raise UserError(f"bag_size must be at least 1, or such as 8-4-2, got {c.bag_size!r}")
    bag_sizes = [int(s) for s in str(c.bag_size).split("-")]
    try:
        return tst.phase_list(c.max_steps, bag_sizes, c.superposition_ratio, c.superposition)
    except ValueError as e:
        raise UserError(f"bag_size={c.bag_size}: {e}") from None


def read_fit(path):
    """{"c0", "a", "k"} from a file that tools.fit_mi wrote."""
    try:
        with open(path, encoding="utf-8") as f:
            fit = json.load(f)
        return {key: float(fit[key]) for key in ("c0", "a", "k")}
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"fitted={path} is not a file of tools.fit_mi: {e!r}") from None


# --------------------------------------------------------------------------------------------- parts of main


def reinitialise(model, optimizer, parts, seed):
    """Reinitialise the named parts: weights or the optimizer's state. For ablations only; it hurts."""
    torch.manual_seed(seed)
    if names := [REINIT[part] for part in parts if REINIT[part]]:
        init_weights(model, names)
    if "optimizer" in parts:
        for each in optimizer:
            each.state.clear()


@torch.no_grad()
def validation_loss(net, rows, batch_size, machine):
    """Next-token loss in any phase, nats per token. rows (n, L+1): this rank's share of the validation rows,
    in whole batches. Rows of -1 do not count."""
    net.eval()
    total = torch.zeros(2, device=machine.device)  # sum of the rows' losses, number of rows
    for tokens in rows.split(batch_size):  # (B, L+1)
        tokens = tokens.to(machine.device)
        n = (tokens[:, 0] >= 0).sum()
        labels = tokens[:, 1:, None].long()  # (B, L, 1)
        with machine.autocast():
            loss = net(tokens[:, :-1, None].clamp(min=0), labels.masked_fill(labels < 0, -100))[0]
        total += torch.stack((loss * n, n))
    net.train()
    loss_sum, n = machine.mean(total).tolist()
    return loss_sum / n


def validation_metrics(net, val, batch_size, machine, corpus):
    """The columns val_loss, val_bpb and, in a mixture, val_loss_NAME. val: rows (n, L+1) of each corpus."""
    losses = [validation_loss(net, rows, batch_size, machine) for rows in val]
    row = {"val_loss": sum(x * float(share) for x, (*_, share) in zip(losses, corpus.parts))}
    if corpus.bytes_per_token:
        row["val_bpb"] = row["val_loss"] / math.log(2) / corpus.bytes_per_token
    return row | {f"val_loss_{name}": x for x, (name, *_) in zip(losses, corpus.parts) if name}


def main(c):
    # -------------------------------------------------------------------------------- phases, machine, corpus
    # TST: a run is a list of phases, each with the tokens that a position reads and predicts. Ordinary
    # training is the phase (1, 1), so there is one code path, and a baseline is a list of that phase alone.
    world_size = launcher()[2]  # knobs are checked before the ranks meet
    phases = check(c, world_size)
    # a resumed run takes its fit from the checkpoint
    fit = read_fit(c.fitted) if c.fitted and (c.allow_changes or not c.resume) else {}
    machine = Machine.start(c)
    device, say = machine.device, machine.say
    folder = RunFolder(c.out_dir, machine)
    c = folder.after_restart(c)
    corpus = open_mixture(c.dataset, say)
    separator = corpus.meta["separator"]
    if c.document_bags and separator is None:
        raise UserError(f"document_bags needs a document separator, and {c.dataset} has none")
    # The batch is a fact of the run, not of the machine: its rows are dealt out to ranks and micro-batches,
    # so that any number of ranks trains on the same rows in the same step.
    n_rows = c.total_batch // c.block_size
    per_rank = n_rows // world_size
    rows = range(machine.rank * per_rank, (machine.rank + 1) * per_rank)  # of this rank
    batch_size = c.batch_size or per_rank
    micro_steps = per_rank // batch_size
    sources = [(part.train, share) for _, part, share in corpus.parts]
    read = dict(n_rows=n_rows, rows=rows, seed=c.seed, device=device)
    open_stream = partial(TokenStream, sources, c.block_size, phases, **read)
    stream = open_stream()  # before anything is written: the text may be too short
    # The validation rows are the same in all phases and for any number of ranks, which share them. Rows of
    # -1 fill them up, so that there is one graph, and all ranks have equally many batches.
    val, whole = [], batch_size * world_size
    for _, part, _ in corpus.parts:
        all_rows = validation_rows(part.val, c.eval_positions, c.block_size)  # (n, L+1)
        all_rows = F.pad(all_rows, (0, 0, 0, -len(all_rows) % whole), value=-1)
        val.append(all_rows[machine.rank :: world_size])

    # ---------------------------------------------------------------------------------- model, new or resumed
    shape = model_config(dataclasses.asdict(c), corpus.meta)
    check_size(shape, machine)
    torch.manual_seed(c.seed)
    kinds = [(p.n_in, p.n_out) for p in phases]
    twins = lambda model: use_twins(model, machine, kinds, c.loss, c.document_bags)
    model = build(shape, machine, prepare=None if c.plain else twins)
    if c.init_from and not c.resume:
        if c.init_from.startswith("hf:"):
            load_hf(model, c.init_from[3:], say)
        else:
            load_initial(c.init_from, model, corpus)
    optimizer = make_optimizer(model, c, machine.device_type)
    folder.acquire(c.resume, c.overwrite)
    saver = Saver(machine)
    step, positions, seconds, best_val = 0, 0, 0.0, math.inf
    # MoE: the share of positions that chose each expert in the previous step, over all ranks. The balance
    # loss uses it in place of a micro-batch's own, so that it is the same however a batch is cut.
    load_shares = None
    if c.n_expert:
        load_shares = torch.full((c.n_layer, c.n_expert), c.top_k / c.n_expert, device=device)
    if c.resume:
        saved = resume(folder.last, model, optimizer, c, corpus, marked(Config, Free))
        step, seconds, best_val = saved["step"], saved["seconds"], saved["best_val"]
        positions = saved.get("positions", step * c.total_batch)
        load_shares = saved["shares"].to(device) if c.n_expert else None
        # The stream continues where it was, even if the phases ahead are now others
        stream = open_stream(state=saved["stream"], step=step)
        if not c.allow_changes:
            fit = saved["fit"]  # the run's own, even if the file has changed since
    planned, phases = phases, stream.phases  # a resumed stream may begin after the switch

    # ------------------------------------------------------------------------------------ one step, compiled
    # Each pair of sizes is a graph of its own: one for bags, one for tokens. Both are compiled now, so that
    # the switch costs no time.
    ahead = [p for p in phases if p.stop > step]
    # TST: the weights of a bag's labels in the loss, (n_out,) each
    sizes = {p.n_out for p in ahead if p.bag_size > 1}
    full = {n: tst.bag_weights(c.bag_weights, n, **fit).to(device) for n in sizes}
    first = {n: tst.bag_weights("first", n).to(device) for n in sizes}
    weights = dict(full)  # what forward reads; --fade changes them

    def forward(net, tokens, n_in, n_out):
        """Rows (B, L*n_in + n_out) -> (objective, token loss, routing statistics)."""
        bags, labels = tst.bags_and_labels(tokens, n_in, n_out)  # TST: (B, L, n_in), (B, L, n_out)
        kind, bag_share = "mce", None
        if n_in > 1 or n_out > 1:
            kind = c.loss
            if c.document_bags:
                bag_share, labels = tst.within_documents(tokens, n_in, n_out, separator)
        with machine.autocast():
            loss, routing = net(bags, labels, weights.get(n_out), kind, load_shares, bag_share)
        if routing is None:
            return loss, loss, None
        balance_loss, z_loss = routing["balance_loss"].mean(), routing["z_loss"].mean()
        return loss + c.balance_coef * balance_loss + c.router_z_coef * z_loss, loss, routing

    def warm_up(net):
        for p in ahead:  # the sizes matter, not the text
            tokens = stream.read(p.start)[:batch_size].to(device)
            forward(net, tokens, p.n_in, p.n_out)[0].backward()
            optimizer.zero_grad()
        validation_loss(net, val[0][:batch_size], batch_size, machine)

    raw_model = model  # checkpoints have its keys, without the prefixes of wrappers
    model, compiled = machine.compile(raw_model, c.compile, warm_up)
    wrapped = wrap(model, machine)
    # Memory sufficed and the compiler worked, so a run that is being overwritten can be removed now
    described = {
        "config": dataclasses.asdict(c),
        "versions": machine.versions(),
        "command": sys.argv,
        "data": corpus.meta,
        "parameters": raw_model.n_params(),
        "active_parameters": raw_model.n_params(active=True),
    }
    folder.replace(c.resume, step, described, c.wandb_project)
    describe_run(c, machine, raw_model, stream, compiled, micro_steps, step)

    # --------------------------------------------------------------------------------------------------- loop
    flops = raw_model.flops_per_position()
    # Also log the first and last step of each phase, to show the switch
    ends = {p.stop for p in phases} | {p.start + 1 for p in phases}
    after_bags = "recovery" if planned[0].bag_size > 1 else "ordinary"
    signals, stopping = StopSignals(machine), False
    clock, logged_at = time.perf_counter(), step
    while step < c.max_steps and not stopping:
        phase = tst.phase_at(phases, step)  # TST
        if c.reinit_at_switch and phase.bag_size == 1 and step == planned[-1].start > 0:
            reinitialise(raw_model, optimizer, c.reinit_at_switch.split(","), c.seed + 1)
        set_rates(optimizer, rate_multiplier(step, c))
        if c.fade and phase.n_out > 1:  # TST: no hard switch from s labels to one
            whole = tst.phase_at(planned, step)  # a resumed stream may begin within it
            n, left = phase.n_out, (whole.stop - step) / (whole.stop - whole.start)
            weights[n] = torch.lerp(first[n], full[n], min(1, left / c.fade))
        # Sums stay on the device: reading one would stall every step
        loss_sum, load, entropy = 0.0, 0.0, 0.0
        for i, tokens in enumerate(stream.batch(step).split(batch_size)):  # (B, L*n_in + n_out)
            sync_gradients(wrapped, i == micro_steps - 1)  # they travel once, with the last one
            objective, loss, routing = forward(wrapped, tokens, phase.n_in, phase.n_out)
            (objective / micro_steps).backward()
            loss_sum += loss.detach()
            if routing:
                load += routing["load"]
                entropy += routing["entropy"]
        grad_norm = clip_gradients(raw_model, c.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if c.n_expert:
            load = machine.mean(load)  # (n_layer, E), positions per rank
            load_shares = load / (len(rows) * c.block_size)
            if c.balance_bias:
                raw_model.balance_experts(load, c.balance_rate)
        step += 1
        positions += c.total_batch

        # ------------------------------------------------------------------------------------------ log, save
        # All ranks decide from the same facts, since evaluating and saving take all of them
        stopping = step < c.max_steps and signals.stop(step)
        log_now = step % c.log_interval == 0
        eval_now = step == c.max_steps or step % c.eval_interval == 0
        save_now = stopping or step == c.max_steps
        if c.save_interval:  # by time only at rows that are written anyway
            save_now |= step % c.save_interval == 0 or log_now and signals.save_due
        if not (log_now or eval_now or save_now or step in ends):
            continue

        loss = machine.mean(loss_sum / micro_steps).item()  # waits for the device
        elapsed = time.perf_counter() - clock  # without evaluation and saving
        seconds += elapsed
        rate = (step - logged_at) * c.total_batch / elapsed  # positions per second
        row = {
            "step": step,
            "phase": "superposition" if phase.bag_size > 1 else after_bags,
            "bag_size": phase.bag_size,
            "loss": loss,
            "lr": optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm.item(),
            "positions": positions,
            "data_tokens": stream.tokens_at(step),
            "epoch": stream.tokens_at(step) / stream.epoch_tokens,
            "flops": positions * flops,
            "seconds": seconds,
            "positions_per_second": rate,
        }
        if machine.peak_flops:
            row["mfu"] = rate * flops / (machine.peak_flops * world_size)
        if c.n_expert:
            row |= router_metrics(load, machine.mean(entropy / micro_steps))
        if eval_now:
            row |= validation_metrics(model, val, batch_size, machine, corpus)
        numbers = {key: row[key] for key in ("loss", "grad_norm", "val_loss") if key in row}
        if not all(map(math.isfinite, numbers.values())):
            todo = "lower learning_rate and start again, or --resume with --allow_changes"
            raise UserError(f"step {step} is not finite: {numbers}; {todo}")
        folder.add(row, progress(row, c.max_steps, elapsed / (step - logged_at)), sync=save_now)
        if is_best := row.get("val_loss", math.inf) < best_val:
            best_val = row["val_loss"]
        if is_best or save_now:
            began = time.perf_counter()
            state = {
                "model": raw_model.state_dict(),
                "step": step,
                "positions": positions,
                "stream": stream.state(),
                "seconds": seconds,
                "best_val": best_val,
                "fit": fit,
                "shares": load_shares,
                "rng": torch.get_rng_state(),
                "config": dataclasses.asdict(c),
                "meta": corpus.meta,
                "data": corpus.folder,
                "versions": described["versions"],
            }
            if is_best:  # never resumed, so without the optimizer, which is twice the model's size
                saver.save(folder.best, state)
            if save_now:
                saver.save(folder.last, state | {"optimizer": optimizer.state_dict()})
                signals.saved(time.perf_counter() - began)
        clock, logged_at = time.perf_counter(), step

    saver.wait()
    folder.finish()
    del wrapped  # DDP must be gone before the group of its ranks is, see leave
    machine.leave()
    if stopping:
        say(f"stopped by {signals.reason}; resume with --resume")
        sys.exit(1)  # not finished, as a scheduler can tell


if __name__ == "__main__":
    entry_point(main, Config, known=knobs_of_run)
