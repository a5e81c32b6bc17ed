"""Train a GPT with Token Superposition Training, or without (bag_size=1).

    python train.py config/curves.py --bag_size=4 --out_dir=out/tst
    torchrun --standalone --nproc_per_node=8 train.py config/dense_270m.py

The script reads from top to bottom: knobs, checks, and main: set up, loop, log. Superposition enters in the
lines marked TST: the phases, the phase of a step, bags and labels, their weights. Which text a phase reads is
nanotst/stream.py.
"""

import dataclasses
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback
# the phases differ in tensor sizes
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.nn.functional as F

from nanotst import UserError
from nanotst.checkpoint import Saver, load_initial, model_config, resume
from nanotst.configurator import Bags, Free, entry_point, marked, validate
from nanotst.huggingface import load_hf
from nanotst.kernels import use_twins
from nanotst.log import RunFolder, describe_run, knobs_of_run, progress, router_metrics, warn
from nanotst.machine import Machine, StopSignals, as_one
from nanotst.mixture import open_mixture
from nanotst.optim import OPTIMIZERS, SCHEDULES, make_optimizer, rate_multiplier, set_rates
from nanotst.parallel import build, check_size, clip_gradients, init_weights, sync_gradients, wrap
from nanotst.stream import TokenStream, validation_rows
from tst import (
    BAG_WEIGHTS,
    LOSSES,
    MODES,
    bag_weights,
    bags_and_labels,
    phase_at,
    phase_list,
    within_documents,
)

# ------------------------------------------------------------------------------------------------------ knobs


@dataclass
class Config:
    """Usage: python train.py [CONFIG.py ...] [--key=value ...]"""

    # Run
    out_dir: Free[str] = "out/run"  # metrics.jsonl, config.json and checkpoints go here
    dataset: Free[str] = "python_source"  # a corpus, in data/ or elsewhere, or several, A:0.5,B:0.5
    resume: Free[bool] = (
        False  # go on from out_dir's last checkpoint, exactly; knobs not given are the run's
    )
    allow_changes: Free[bool] = False  # with --resume: let knobs differ that change the training
    overwrite: Free[bool] = False  # start anew in an out_dir that holds a run
    init_from: Free[str] = (
        ""  # initial weights: a checkpoint of ours, or hf:FOLDER of Hugging Face's
    )
    seed: int = 1337  # of initial weights and of the order of the text

    # Token superposition: the first superposition_ratio of the steps train on bags of bag_size tokens
    bag_size: Bags[int | str] = 1  # s; 1 is ordinary training, 8-4-2 steps down
    superposition_ratio: Bags[float] = 0.3  # r
    superposition: Bags[Literal[MODES]] = (
        "full"  # bags in the input and the target, or in one of them alone
    )
    loss: Bags[Literal[tuple(LOSSES)]] = (
        "mce"  # loss of bags; ordinary steps always use cross-entropy
    )
    bag_weights: Bags[Literal[BAG_WEIGHTS]] = "uniform"  # of the tokens of a bag in the loss mce
    document_bags: Bags[bool] = (
        False  # bags mix no documents: only that of a bag's last token counts
    )
    reinit_at_switch: Bags[str] = (
        ""  # drawn anew at the switch: embedding,head,optimizer (it hurts)
    )
    fitted: Bags[str] = ""  # file of tools.fit_mi with c0, a, k of c0 + a i^k; empty: the paper's

    # Model
    n_layer: int = 2  # blocks
    n_head: int = 1  # heads of attention
    n_kv_head: int = 0  # 0: n_head; fewer is grouped-query attention
    n_embd: int = 64  # width
    head_dim: int = 0  # 0: n_embd / n_head
    ff_dim: int = 0  # width of the MLP, or of one expert; 0: 8/3 n_embd, rounded up to 64
    qk_norm: bool = False  # RMSNorm on each head's queries and keys, as in Qwen3
    tie_embeddings: bool = False  # one matrix for embedding and head
    rope_theta: float = 10000.0  # base of the rotary angles
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    attention_window: int = 0  # positions that a position sees, itself included; 0: all before it
    checkpoint_activations: Free[bool] = False  # less memory for a third more FLOPs

    # Mixture of experts
    n_expert: int = 0  # 0: dense
    top_k: int = 0  # experts per position
    balance_coef: float = 0.001  # of the load-balancing loss, which is top_k when balanced
    router_z_coef: float = 0.0  # of the router's z-loss
    balance_bias: bool = (
        False  # choose experts by probability plus a bias that evens out their load
    )
    balance_rate: float = 0.001  # by how much an optimizer step moves an expert's bias

    # Batch and schedule
    block_size: int = 128  # L, positions in a row
    total_batch: int = 8192  # positions per optimizer step over all ranks; a bag is one position
    batch_size: Free[int] = (
        0  # rows per micro-batch of a rank, accumulation follows from it; 0: all rows at once
    )
    max_steps: int = 2000  # of the whole run; schedule and phases follow from it
    optimizer: Literal[tuple(OPTIMIZERS)] = (
        "adamw"  # muon: for matrices of blocks, AdamW for the rest
    )
    learning_rate: float = 8e-3  # the peak
    matrix_learning_rate: float = 0.0  # of the matrices that Muon trains; 0: learning_rate
    schedule: Literal[SCHEDULES] = "wsd"  # warmup, constant, linear decay; or cosine
    warmup_steps: int = 100  # over which the rate rises from 0
    decay_ratio: float = 0.1  # wsd: last share of the steps, over which the rate falls
    min_lr_ratio: float = 0.0  # the rate at the end, as a share of learning_rate
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # AdamW's decay of the mean squared gradient; Muon's momentum
    weight_decay: float = 0.1  # of matrices, not of norms
    grad_clip: float = 1.0  # largest norm of the gradient; 0: off

    # Evaluation and logs
    eval_interval: Free[int] = 100  # steps between validation losses
    eval_positions: int = 131072  # of the fixed validation rows; of each corpus at most
    log_interval: Free[int] = 20  # steps between rows of metrics.jsonl
    save_interval: Free[int] = 500  # steps between checkpoints; 0: only at the end
    wandb_project: Free[str] = ""  # log to Weights & Biases, too

    # Machine
    device: Free[str] = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "bfloat16", "float32"] = (
        "auto"  # of matrix products; weights are float32
    )
    compile: Free[Literal["auto", "on", "off"]] = "auto"  # torch.compile; auto is on for cuda
    plain: Free[bool] = False  # only the plain code of model.py and tst.py, without faster twins
    threads: Free[int] = (
        0  # CPU threads of a rank; 0: PyTorch's choice, or a rank's share of the cores
    )
    parallel: Free[Literal["auto", "ddp", "fsdp"]] = (
        "auto"  # fsdp spreads the model over the ranks; auto: ddp
    )
    shard_size: Free[int] = (
        0  # fsdp: ranks that share one set of weights, such as those of a node; 0: all
    )


def read_fit(path):
    """{"c0", "a", "k"} of a file that tools.fit_mi wrote."""
    try:
        with open(path, encoding="utf-8") as f:
            fit = json.load(f)
        fit = {key: float(fit[key]) for key in ("c0", "a", "k")}
        if not all(0 <= fit["c0"] + fit["a"] * i ** fit["k"] < math.inf for i in range(1, 65)):
            raise ValueError("c0 + a i^k is negative or infinite for an i up to 64")
        return fit
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(
            f"fitted={path} is not a file of tools.fit_mi ({type(e).__name__}: {e})"
        ) from None


REINIT = {"embedding": "embed.", "head": "head.", "optimizer": None}  # names of weights


def reinitialise(model, optimizer, parts, seed):
    """Draw the named parts of the model anew, forget the optimizer's moments: what one had better not do."""
    torch.manual_seed(seed)
    if names := [REINIT[part] for part in parts if REINIT[part]]:
        init_weights(model, names)
    if "optimizer" in parts:
        optimizer.forget()


def name_of(phase, phases):
    """What metrics.jsonl calls a phase."""
    if phase.bag_size > 1:
        return "superposition"
    return "recovery" if any(p.bag_size > 1 for p in phases) else "ordinary"


def check(c, world_size):
    """The phases of the run. Raises UserError for a combination of knobs that cannot work."""
    validate(c)
    for key in ("n_layer", "n_head", "n_embd", "block_size", "total_batch", "max_steps", "eval_interval",
                "eval_positions", "log_interval"):  # fmt: skip
        if getattr(c, key) < 1:
            raise UserError(f"{key} must be at least 1, got {getattr(c, key)}")
    for key in ("superposition_ratio", "decay_ratio", "min_lr_ratio"):
        if not 0 <= getattr(c, key) <= 1:
            raise UserError(f"{key} must lie in 0..1, got {getattr(c, key)}")
    for key in ("seed", "batch_size", "n_kv_head", "head_dim", "ff_dim", "n_expert", "top_k", "warmup_steps",
                "weight_decay", "grad_clip", "save_interval", "matrix_learning_rate",
                "shard_size"):  # fmt: skip
        if not getattr(c, key) >= 0:
            raise UserError(f"{key} must not be negative, got {getattr(c, key)}")
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(c, key) < 1:
            raise UserError(f"{key} must be at least 0 and below 1, got {getattr(c, key)}")
    for key in ("learning_rate", "norm_eps", "rope_theta"):
        if not getattr(c, key) > 0:
            raise UserError(f"{key} must be positive, got {getattr(c, key)}")
    if not c.out_dir:
        raise UserError("out_dir must name a folder")
    if c.reinit_at_switch and (unknown := set(c.reinit_at_switch.split(",")) - REINIT.keys()):
        raise UserError(
            f"reinit_at_switch takes {', '.join(REINIT)}, between commas, got {min(unknown)!r}"
        )
    if c.tie_embeddings and "head" in c.reinit_at_switch.split(","):
        raise UserError(
            "reinit_at_switch=head: with tie_embeddings the head is the embedding, name that"
        )
    if c.fitted and c.bag_weights != "fitted":
        raise UserError(f"fitted={c.fitted} belongs to bag_weights=fitted, not to {c.bag_weights}")
    if c.loss != "mce" and c.bag_weights != "uniform":
        raise UserError(f"bag_weights={c.bag_weights} belongs to loss=mce, not to loss={c.loss}")
    if c.n_embd % c.n_head and not c.head_dim:
        raise UserError(
            f"n_embd {c.n_embd} must be a multiple of n_head {c.n_head} unless head_dim is given"
        )
    batch_size = c.batch_size or 1
    if c.total_batch % (batch_size * c.block_size * world_size):
        raise UserError(
            f"total_batch {c.total_batch} positions must be a multiple of batch_size {batch_size} x "
            f"block_size {c.block_size} x {world_size} ranks = {batch_size * c.block_size * world_size}"
        )
    try:
        return phase_list(
            c.max_steps, bag_sizes(c.bag_size), c.superposition_ratio, c.superposition
        )
    except ValueError as e:
        raise UserError(
            f"bag_size={c.bag_size}, superposition_ratio={c.superposition_ratio}: {e}"
        ) from None


def bag_sizes(bag_size):
    """[8, 4, 2] for the knob 8-4-2, [4] for 4."""
    try:
        sizes = [int(s) for s in str(bag_size).split("-")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UserError(
            f"bag_size must be at least 1, or several numbers such as 8-4-2, got {bag_size!r}"
        )
    return sizes


@torch.no_grad()
def evaluate(net, rows, batch_size, machine):
    """Ordinary next-token loss, nats per token, whatever the phase, of this rank's rows (n, L+1) and the
    others'. Rows of -1 fill up a batch, so that there is one graph, and as many batches on all ranks."""
    net.eval()
    total = torch.zeros(2, device=machine.device)  # sum of the rows' losses, number of rows
    for part in rows.split(batch_size):
        tokens = F.pad(part, (0, 0, 0, batch_size - len(part)), value=-1).to(
            machine.device
        )  # (B, L+1)
        n = (tokens[:, 0] >= 0).sum()
        labels = tokens[:, 1:, None].long()  # (B, L, 1)
        with machine.autocast():
            loss = net(tokens[:, :-1, None].clamp(min=0), labels.masked_fill(labels < 0, -100))[0]
        total += torch.stack((loss * n, n))
    net.train()
    loss_sum, n = machine.mean(total).tolist()
    return loss_sum / n


def main(c):
    # -------------------------------------------------------------------------------- machine, corpus, phases
    phases = check(
        c, int(os.environ.get("WORLD_SIZE", 1))
    )  # TST: the steps on bags, then ordinary ones
    fit = read_fit(c.fitted) if c.fitted else {}
    machine = Machine.start(c)
    device, world_size, say = machine.device, machine.world_size, machine.say
    folder = RunFolder(c.out_dir, machine)
    c = folder.after_restart(c)
    corpus = open_mixture(c.dataset, say)
    if c.document_bags and corpus.meta["separator"] is None:
        raise UserError(f"document_bags needs a separator of documents, and {c.dataset} names none")
    n_rows = c.total_batch // c.block_size  # rows of a global batch
    first, end = (rank * n_rows // world_size for rank in (machine.rank, machine.rank + 1))
    rows = range(first, end)  # those of this rank
    batch_size = c.batch_size or len(rows)  # rows of a micro-batch
    micro_steps = len(rows) // batch_size
    read = dict(n_rows=n_rows, rows=rows, seed=c.seed, device=device)
    sources = [(part.train, share) for _, part, share in corpus.parts]
    stream = TokenStream(sources, c.block_size, phases, **read)
    # the fixed validation rows of each corpus, the same whatever the phase and the world size: this rank's,
    # filled up with rows of -1, since all ranks have to run as many batches
    val = [validation_rows(part.val, c.eval_positions, c.block_size) for _, part, _ in corpus.parts]
    val = [F.pad(rows, (0, 0, 0, -len(rows) % world_size), value=-1) for rows in val]
    val_mine = [rows[machine.rank :: world_size] for rows in val]

    # ---------------------------------------------------------------------------------- model, new or resumed
    shape = model_config(dataclasses.asdict(c), corpus.meta)
    check_size(shape, machine)
    torch.manual_seed(c.seed)
    kinds = [(p.n_in, p.n_out) for p in phases]
    twins = lambda model: c.plain or use_twins(model, machine, kinds, c.loss, c.document_bags)
    model = build(shape, machine, prepare=twins)
    if c.init_from.startswith("hf:") and not c.resume:
        load_hf(model, c.init_from[3:], say)
    elif c.init_from and not c.resume:
        load_initial(c.init_from, model, corpus)
    optimizer = make_optimizer(model, c, machine.device_type)
    folder.begin(c.resume, c.overwrite)
    saver = Saver(machine)
    step, seconds, best_val = 0, 0.0, math.inf
    # MoE: the share of positions that chose each expert in the step before, of all ranks and micro-steps, so
    # that the balance loss is the same however a batch is cut; (n_layer, E), even before the first step
    load_shares = None
    if c.n_expert:
        load_shares = torch.full((c.n_layer, c.n_expert), c.top_k / c.n_expert, device=device)
    if c.resume:
        saved = resume(folder.newest(), model, optimizer, c, corpus, marked(Config, Free))
        step, seconds, best_val = saved["step"], saved["seconds"], saved["best_val"]
        load_shares = saved["shares"].to(device) if c.n_expert else None
        stream = TokenStream(
            sources, c.block_size, phases, **read, state=saved["stream"], step=step
        )
        if (
            saved["stream"] != stream.state() and not c.allow_changes
        ):  # no knob has changed, so it is damaged
            raise UserError(
                f"{folder.newest()} cannot be resumed: its place in the text is another run's"
            )
        if saved.get("fit", fit) != fit and not c.allow_changes:
            was = f"this run has begun with {saved['fit']}"
            raise UserError(
                f"fitted={c.fitted} holds {fit}, and {was}: put it back, or --allow_changes"
            )
        folder.keep_rows(step)
    phases = stream.phases
    described = {
        "config": dataclasses.asdict(c), "versions": machine.versions(), "command": sys.argv,
        "data": corpus.meta, "parameters": model.n_params(), "active_parameters": model.n_params(active=True),
    }  # fmt: skip
    folder.describe(described, c.wandb_project)

    # ---------------------------------------------------------------------- compilation, warmed up, and ranks
    kinds = dict.fromkeys(
        (p.n_in, p.n_out) for p in phases if p.stop > step
    )  # each is a graph of its own
    # TST: of the tokens of a bag in the loss
    weights = {
        n: bag_weights(c.bag_weights, n, **fit).to(device) for _, n in kinds if n > 1
    }  # (n_out,)

    def forward(net, tokens, n_in, n_out):
        """Rows (B, L*n_in + n_out) -> what is minimised, the loss of tokens in it, experts' statistics."""
        bags, labels = bags_and_labels(tokens, n_in, n_out)  # TST: (B, L, n_in), (B, L, n_out)
        kind, bag_share = "mce", None
        if n_in > 1 or n_out > 1:
            kind = c.loss
            if c.document_bags:
                bag_share, labels = within_documents(tokens, n_in, n_out, corpus.meta["separator"])
        with machine.autocast():
            loss, routing = net(bags, labels, weights.get(n_out), kind, load_shares, bag_share)
        if routing is None:
            return loss, loss, None
        balance = (
            c.balance_coef * routing["balance_loss"].mean()
            + c.router_z_coef * routing["z_loss"].mean()
        )
        return loss + balance, loss, routing

    def warm_up(net):
        for n_in, n_out in kinds:
            first = next(p.start for p in phases if (p.n_in, p.n_out) == (n_in, n_out))
            tokens = stream.read(first)[:batch_size].to(device)  # any text will do
            forward(net, tokens, n_in, n_out)[0].backward()
            optimizer.zero_grad()
        evaluate(net, val_mine[0][:1], batch_size, machine)

    warn(c, machine, model)  # before minutes of compiling
    raw_model = model  # checkpoints hold its keys
    model, compiled = machine.compile(raw_model, c.compile, warm_up)
    shared = wrap(model, machine)
    describe_run(c, machine, raw_model, stream, compiled, micro_steps, step)

    # --------------------------------------------------------------------------------------------------- loop
    flops_per_step = raw_model.flops_per_position() * c.total_batch
    switches = {p.stop for p in phases} | {
        p.start + 1 for p in phases
    }  # the last and the first step of each
    signals, stopping, clock, logged_at = StopSignals(machine), False, time.perf_counter(), step
    while step < c.max_steps:
        phase = phase_at(phases, step)  # TST
        if c.reinit_at_switch and step == phase.start > 0 and phase.bag_size == 1:
            reinitialise(raw_model, optimizer, c.reinit_at_switch.split(","), c.seed + 1)
        set_rates(optimizer, rate_multiplier(step, c))
        loss_sum, load, entropy = 0.0, 0.0, 0.0
        micro_batches = stream.batch(step).split(batch_size)  # (B, L*n_in + n_out) each
        for i, part in enumerate(micro_batches):
            sync_gradients(shared, i == micro_steps - 1)  # they travel once, with the last one
            objective, loss, routing = forward(shared, part, phase.n_in, phase.n_out)
            (objective / micro_steps).backward()
            loss_sum += loss.detach()
            if routing:
                load += routing["load"]
                entropy += routing["entropy"]
        grad_norm = clip_gradients(raw_model, c.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if c.n_expert:
            load = machine.mean(load)  # (n_layer, E), of a rank
            load_shares = load / (len(rows) * c.block_size)
            if c.balance_bias:
                raw_model.balance_experts(load, c.balance_rate)
        step += 1

        # ------------------------------------------------------------------------------------------ log, save
        stopping = step < c.max_steps and signals.stop(
            step
        )  # a finished run has nothing to go on with
        evaluate_now = step == c.max_steps or step % c.eval_interval == 0
        save_now = (
            stopping or step == c.max_steps or c.save_interval > 0 and step % c.save_interval == 0
        )
        if not (evaluate_now or save_now or step % c.log_interval == 0 or step in switches):
            continue

        loss = machine.mean(loss_sum / micro_steps).item()  # waits for the device
        elapsed = time.perf_counter() - clock
        seconds += elapsed
        rate = (
            (step - logged_at) * c.total_batch / elapsed
        )  # positions per second since the last row
        row = {
            "step": step, "phase": name_of(phase, phases),
            "bag_size": phase.bag_size, "loss": loss, "lr": optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm.item(), "positions": step * c.total_batch,
            "data_tokens": stream.tokens_at(step), "epoch": stream.tokens_at(step) / stream.epoch_tokens,
            "flops": step * flops_per_step, "seconds": seconds, "positions_per_second": rate,
        }  # fmt: skip
        if machine.peak_flops:
            row["mfu"] = rate * raw_model.flops_per_position() / (machine.peak_flops * world_size)
        if c.n_expert:
            row |= router_metrics(load, machine.mean(entropy / micro_steps))
        if evaluate_now:
            losses = [evaluate(model, rows, batch_size, machine) for rows in val_mine]
            row["val_loss"] = sum(
                loss * float(share) for loss, (*_, share) in zip(losses, corpus.parts)
            )
            row |= {
                f"val_loss_{name}": loss for loss, (name, *_) in zip(losses, corpus.parts) if name
            }
            if corpus.bytes_per_token:
                row["val_bpb"] = row["val_loss"] / math.log(2) / corpus.bytes_per_token
        # the loss is that of the weights before this step; those after it are tried before they are saved
        after = row.get("val_loss", 0.0)
        if save_now and not evaluate_now:
            after = evaluate(model, val_mine[0][:batch_size], batch_size, machine)
        if not all(
            map(math.isfinite, (loss, row["grad_norm"], after))
        ):  # the same on all ranks; never saved
            raise UserError(
                f"the loss is not finite at step {step} (before it {loss}, its gradient {row['grad_norm']}, "
                f"after it {after}); lower learning_rate and start anew, or --resume with --allow_changes"
            )
        folder.add(row, progress(row, c.max_steps, elapsed / (step - logged_at)))
        state = {
            "model": raw_model.state_dict(), "step": step, "stream": stream.state(), "seconds": seconds,
            "fit": fit, "shares": load_shares, "rng": torch.get_rng_state(), "config": dataclasses.asdict(c),
            "meta": corpus.meta, "data": corpus.folder, "versions": described["versions"],
            "best_val": min(best_val, row.get("val_loss", best_val)),
        }  # fmt: skip
        if state["best_val"] < best_val:  # never resumed, and moments are twice the weights' size
            saver.save(folder.best, state)
        if save_now:
            saver.save(folder.last, state | {"optimizer": optimizer.state_dict()})
        best_val = state["best_val"]
        if stopping:
            saver.wait()
            say(f"stopped by {signals.reason} after step {step}; go on with --resume")
            break
        clock, logged_at = time.perf_counter(), step

    saver.wait()
    folder.finish()
    del shared
    machine.leave()
    if stopping:
        sys.exit(1)


if __name__ == "__main__":
    try:
        entry_point(as_one(main), Config, known=knobs_of_run)
    except (
        MemoryError,
        RuntimeError,
    ) as e:  # torch.OutOfMemoryError is a RuntimeError, and so is the CPU's
        if not isinstance(e, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(
            e
        ):
            raise
        sys.exit("error: out of memory; give a smaller --batch_size (the total batch stays the same), or "
                 "--checkpoint_activations")  # fmt: skip
