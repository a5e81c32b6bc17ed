"""Train a GPT with Token Superposition Training, or without (bag_size=1).

    python train.py config/curves.py --bag_size=4 --out_dir=out/tst
    torchrun --standalone --nproc_per_node=8 train.py config/dense_270m.py

The script reads from top to bottom: knobs, checks, set-up, loop. Everything about superposition is in tst.py and
in the three lines marked TST below.
"""

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import platform
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # the phases differ in tensor sizes

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from checkpoint import load_checkpoint, model_config, write_safely
from configurator import fail, one_of, parse, pick_device
from dataloader import TokenStream, load_meta, load_tokens, validation_rows
from model import GPT
from tst import BAG_WEIGHTS, bag_size_at, bag_weights, bags_and_labels

# -----------------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Usage: python train.py [CONFIG.py ...] [--key=value ...]"""

    # Run
    out_dir: str = "out/run"  # metrics.jsonl, config.json and checkpoints go here
    dataset: str = "python_source"  # a folder in data/, or the path of one, that holds train.bin, val.bin, meta.json
    resume: bool = False  # go on from out_dir's last checkpoint, exactly
    allow_changes: bool = False  # with --resume: let knobs that change the training differ from the checkpoint's
    overwrite: bool = False  # start anew in an out_dir that holds a run
    init_from: str = ""  # initial weights: a checkpoint of this repository, or hf:FOLDER, a Hugging Face model
    seed: int = 1337

    # Token superposition: the first superposition_ratio of the steps train on bags of bag_size tokens
    bag_size: int = 1  # s; 1 is ordinary training
    superposition_ratio: float = 0.3  # r
    bag_weights: str = "uniform"  # loss weights within a bag: uniform, power, exponential, first, fitted
    fitted_c0: float = 3.63  # the constant of the fitted weights c0 + 1.35 i^-1.25; 0 leaves the decay alone

    # Model
    n_layer: int = 2
    n_head: int = 1
    n_kv_head: int = 0  # 0: n_head; fewer is grouped-query attention
    n_embd: int = 64
    head_dim: int = 0  # 0: n_embd / n_head
    ff_dim: int = 0  # width of the MLP, or of one expert; 0: 8/3 n_embd, rounded up to 64
    qk_norm: bool = False
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    checkpoint_activations: bool = False  # less memory for a third more FLOPs

    # Mixture of experts
    n_expert: int = 0  # 0: dense
    top_k: int = 0  # experts per position
    balance_coef: float = 0.001  # of the load-balancing loss, which is top_k when balanced
    z_coef: float = 0.0  # of the router's z-loss
    balance_bias: bool = False  # choose experts by probability plus a bias that evens out their load
    balance_rate: float = 0.001  # what an expert's bias moves by in a step

    # Batch and schedule
    block_size: int = 128  # L, positions in a row
    total_batch: int = 8192  # positions per optimizer step over all ranks; a bag is one position
    batch_size: int = 0  # rows per micro-batch of a rank; accumulation follows from the two above; 0: all rows at once
    max_steps: int = 2000
    learning_rate: float = 8e-3
    schedule: str = "wsd"  # warmup, constant, linear decay; or cosine
    warmup_steps: int = 100
    decay_ratio: float = 0.1  # wsd: the last part of the steps, in which the rate falls
    min_lr_ratio: float = 0.0  # the rate at the end, as a part of learning_rate
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1  # of matrices, not of norms
    grad_clip: float = 1.0  # 0: off

    # Evaluation and logs
    eval_interval: int = 100  # steps
    eval_positions: int = 131072  # of the fixed validation batch
    log_interval: int = 20  # steps
    save_interval: int = 500  # steps between checkpoints; 0: only at the end
    wandb_project: str = ""  # log to Weights & Biases, too

    # Machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # of matrix products: auto, bfloat16, float32; weights are float32
    compile: str = "auto"  # auto, on, off; auto is on for cuda
    threads: int = 0  # CPU threads of a rank; 0: PyTorch's choice, or a rank's share of the cores


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "B200": 2250e12}

# knobs that may differ when a run is resumed: they do not change what is learned (batch_size does with experts, whose load
# is balanced within a micro-batch)
FREE_ON_RESUME = {"out_dir", "resume", "allow_changes", "overwrite", "init_from", "batch_size", "eval_interval",
                  "log_interval", "save_interval", "wandb_project", "device", "compile", "threads",
                  "checkpoint_activations"}


def check(config, world_size):
    """Stop with a one-line message for a combination that cannot work. Nothing has been built yet."""
    c = config
    for key in ("bag_size", "n_layer", "n_head", "n_embd", "block_size", "total_batch", "max_steps", "eval_interval",
                "eval_positions", "log_interval"):
        if getattr(c, key) < 1:
            fail(f"{key} must be at least 1, got {getattr(c, key)}")
    for key in ("superposition_ratio", "decay_ratio", "min_lr_ratio"):
        if not 0 <= getattr(c, key) <= 1:
            fail(f"{key} must lie in 0..1, got {getattr(c, key)}")
    one_of(c, bag_weights=BAG_WEIGHTS, schedule=("wsd", "cosine"), dtype=("auto", "bfloat16", "float32"),
           compile=("auto", "on", "off"))
    for key in ("batch_size", "n_kv_head", "head_dim", "ff_dim", "n_expert", "top_k", "warmup_steps", "weight_decay",
                "grad_clip", "save_interval", "threads"):
        if not getattr(c, key) >= 0:
            fail(f"{key} must not be negative, got {getattr(c, key)}")
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(c, key) < 1:
            fail(f"{key} must be at least 0 and below 1, got {getattr(c, key)}")
    if not 0 <= c.seed < 2**63:
        fail(f"seed must lie in 0..2^63 - 1, got {c.seed}")
    if world_size > 1 and c.device.startswith("cuda:"):
        fail("torchrun gives each rank a GPU of its own; use --device=cuda")
    if not c.learning_rate > 0:
        fail(f"learning_rate must be positive, got {c.learning_rate}")
    if c.n_embd % c.n_head and not c.head_dim:
        fail(f"n_embd {c.n_embd} must be a multiple of n_head {c.n_head} unless head_dim is given")
    batch_size = c.batch_size or 1
    if c.total_batch % (batch_size * c.block_size * world_size):
        fail(f"total_batch {c.total_batch} positions must be a multiple of batch_size {batch_size} x block_size "
             f"{c.block_size} x {world_size} ranks = {batch_size * c.block_size * world_size}")


def learning_rate_at(step, c):
    """Learning rate of step number `step` (from 0) of c.max_steps, the same in both phases: warmup, then
    constant with a linear end (wsd, as in the paper) or half a cosine."""
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    if c.schedule == "cosine":
        left = 0.5 + 0.5 * math.cos(math.pi * (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps))
    else:
        left = min(1.0, (c.max_steps - step) / max(1, round(c.decay_ratio * c.max_steps)))
    return c.learning_rate * (c.min_lr_ratio + (1 - c.min_lr_ratio) * left)


def router_metrics(load, entropy):
    """What the MoE routers did in a step. load (n_layer, E) positions by expert, entropy (n_layer,) nats.
    Max violation is the busiest expert's load over the mean, minus 1."""
    violation = load.amax(1) / load.mean(1) - 1  # (n_layer,)
    dead = (load == 0).sum(1)  # (n_layer,)
    return {"max_violation": violation.mean().item(), "max_violation_worst": violation.max().item(),
            "router_entropy": entropy.mean().item(), "router_entropy_worst": entropy.min().item(),
            "dead_experts": dead.float().mean().item(), "dead_experts_worst": dead.max().item()}


def progress(row, c, seconds_per_step):
    """A row of metrics.jsonl as one line for the eye."""
    eta = int(row["seconds"] / row["step"] * (c.max_steps - row["step"]))
    parts = [f"step {row['step']:>{len(str(c.max_steps))}}/{c.max_steps}", f"s {row['bag_size']}", f"loss {row['loss']:.4f}"]
    if "val_loss" in row:
        parts.append(f"val {row['val_loss']:.4f} ({row['val_bpb']:.4f} bits/byte)")
    parts += [f"lr {row['lr']:.2e}", f"norm {row['grad_norm']:.2f}", f"{seconds_per_step * 1e3:.1f} ms",
              f"{row['tokens_per_second'] / 1e3:.1f}k tok/s"]
    if "mfu" in row:
        parts.append(f"mfu {row['mfu']:.1%}")
    if "max_violation" in row:
        parts.append(f"max vio {row['max_violation']:.2f}, dead {row['dead_experts_worst']}")
    return " | ".join([*parts, f"eta {eta // 60}m{eta % 60:02d}s"])


def has_fast_bfloat16(device):
    """Whether matrix products in bfloat16 beat float32 here."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def keep_freed_memory():
    """Have glibc keep what is freed for the next step. By default large tensors go back to the system, and a step on a CPU
    spends much of its time on faulting their pages in again."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap, too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: and never shrink it


def main(config):
    # ------------------------------------------------------------------------------------------------- machine
    c = config
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, master = int(os.environ.get("LOCAL_RANK", 0)), rank == 0
    distributed = "RANK" in os.environ  # started by torchrun
    check(c, world_size)
    c.batch_size = c.batch_size or c.total_batch // (c.block_size * world_size)
    say = print if master else lambda *args, **kwargs: None

    device = pick_device(c.device, local_rank)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    device_type = device.split(":")[0]
    if distributed:
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    if c.threads or distributed and device_type == "cpu":  # torchrun's own choice is a single thread
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(c.threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))
    if device_type == "cpu":
        keep_freed_memory()
    dtype = c.dtype if c.dtype != "auto" else "bfloat16" if has_fast_bfloat16(device) else "float32"
    autocast = (torch.autocast(device_type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext())
    torch.set_float32_matmul_precision("high")  # TF32 where float32 is left on CUDA

    # ---------------------------------------------------------------------------------------------------- data
    folder = c.dataset if os.path.isdir(c.dataset) else os.path.join(os.path.dirname(__file__) or ".", "data", c.dataset)
    meta = load_meta(folder)
    train_tokens, val_tokens = load_tokens(folder, "train"), load_tokens(folder, "val")
    superposition_steps = round(c.superposition_ratio * c.max_steps) if c.bag_size > 1 else 0
    n_rows = c.total_batch // c.block_size  # rows of a global batch
    if len(val_tokens) <= c.block_size:
        fail(f"block_size {c.block_size} is longer than the {len(val_tokens)} validation tokens")
    rows = range(rank * n_rows // world_size, (rank + 1) * n_rows // world_size)
    stream = TokenStream(train_tokens, c.block_size, c.bag_size, superposition_steps, n_rows, rows, c.seed, device)
    # the fixed validation batch: never more than the corpus has, the same whatever the phase and the world size
    val_rows = validation_rows(val_tokens, max(1, min(c.eval_positions, len(val_tokens)) // c.block_size), c.block_size)

    # --------------------------------------------------------------------------------------------------- model
    torch.manual_seed(c.seed)
    with torch.device(device):
        model = GPT(model_config(dataclasses.asdict(c), meta))
    if c.init_from.startswith("hf:") and not c.resume:
        from export import load_hf  # needs a package that training does not
        load_hf(model, c.init_from[3:])
    elif c.init_from and not c.resume:
        try:
            model.load_state_dict(load_checkpoint(c.init_from)["model"])
        except (RuntimeError, KeyError) as e:
            fail(f"{c.init_from} does not fit this model: {' '.join(str(e).split())[:200]}")
    weights = bag_weights(c.bag_weights, c.bag_size, c0=c.fitted_c0).to(device)  # (s,)

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": c.weight_decay},
                                   {"params": others, "weight_decay": 0.0}],
                                  lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=device_type in ("cpu", "cuda"))

    # ------------------------------------------------------------------------------------- state, new or resumed
    step, cursor, seconds, best_val = 0, 0, 0.0, math.inf
    log_path, last_path = os.path.join(c.out_dir, "metrics.jsonl"), os.path.join(c.out_dir, "last.pt")
    if c.resume:
        saved = load_checkpoint(last_path, mmap=False)  # the file will be replaced, and must not be held until then
        free = FREE_ON_RESUME - ({"batch_size"} if c.n_expert and c.balance_coef else set())
        changed = [f"{key} {saved['config'][key]} -> {value}" for key, value in dataclasses.asdict(c).items()
                   if key not in free and saved["config"].get(key, value) != value]
        if changed and not c.allow_changes:
            fail(f"{last_path} was trained with other settings: {', '.join(changed)}; "
                 "give the same ones, or --allow_changes")
        if saved["meta"] != meta:
            fail(f"the corpus in {folder} is not the one {last_path} was trained on")
        try:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, KeyError, ValueError) as e:
            fail(f"{last_path} does not fit this model: {' '.join(str(e).split())[:200]}")
        for group, decay in zip(optimizer.param_groups, (c.weight_decay, 0.0)):  # as configured, should it differ
            group.update(weight_decay=decay, betas=(c.beta1, c.beta2))
        step, cursor, seconds, best_val = saved["step"], saved["cursor"], saved["seconds"], saved["best_val"]
        recut = any(saved["config"][key] != getattr(c, key) for key in ("block_size", "bag_size", "total_batch", "seed"))
        if recut or step < superposition_steps or cursor < saved["switch"]:  # whole runs up to the switch, wherever it is now
            unit = n_rows * stream.run
            cursor = -(-cursor // unit) * unit
            stream.switch = cursor + max(0, superposition_steps - step) * unit
        else:
            stream.switch = saved["switch"]
        torch.set_rng_state(saved["rng"])
        if master and os.path.exists(log_path):  # rows after the checkpoint will be written again
            with open(log_path) as f:
                lines = [line for line in f if line.endswith("\n")]  # a killed process may have left half a line
            try:
                kept = [line for line in lines if json.loads(line)["step"] <= step]
            except (ValueError, KeyError, TypeError):
                fail(f"{log_path} is damaged; move it away to resume without the rows before step {step}")
            write_safely(log_path, lambda path: Path(path).write_text("".join(kept)))
        del saved
    elif os.path.exists(log_path) and not c.overwrite:
        fail(f"{c.out_dir} already holds a run: go on with it (--resume), replace it (--overwrite) or choose another --out_dir")
    elif master:
        os.makedirs(c.out_dir, exist_ok=True)
        for name in ("metrics.jsonl", "last.pt", "best.pt"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(c.out_dir, name))
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "device": torch.cuda.get_device_name()
                if device_type == "cuda" else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
                "dtype": dtype, "world_size": world_size}
    if master:
        described = {"config": dataclasses.asdict(c), "versions": versions, "command": sys.argv, "data": meta,
                     "parameters": model.n_params(), "active_parameters": model.n_params(active=True)}
        write_safely(os.path.join(c.out_dir, "config.json"), lambda path: Path(path).write_text(json.dumps(described, indent=1)))

    # ------------------------------------------------------------------------------- compilation, warmed up
    raw_model = model  # checkpoints hold its keys
    micro_steps = len(rows) // c.batch_size
    val_mine = val_rows[rank::world_size]

    def forward(run, tokens, bag_size):
        """Rows (B, (L+1)*s) -> what is minimised, the cross-entropy in it (nats), the routers' statistics."""
        bags, labels = bags_and_labels(tokens, bag_size)  # TST: (B, L, s) each
        with autocast:
            loss, router = run(bags, labels, weights if bag_size > 1 else None)
        if router is None:
            return loss, loss, None
        return loss + c.balance_coef * router["balance_loss"].mean() + c.z_coef * router["z_loss"].mean(), loss, router

    def mean_over_ranks(x):
        if distributed:
            dist.all_reduce(x)
        return x / world_size

    def evaluate(run, rows):
        """Ordinary next-token loss, nats per token, whatever the phase, of this rank's rows (n, L+1) and the others'."""
        run.eval()
        total = torch.tensor([0.0, len(rows)], device=device)  # sum of the rows' losses, number of rows
        with torch.no_grad():
            for part in rows.split(c.batch_size):
                tokens = F.pad(part, (0, 0, 0, c.batch_size - len(part))).to(device)  # one shape, so one graph
                labels = tokens[:, 1:, None].long()  # (B, L, 1)
                labels[len(part):] = -100
                with autocast:
                    total[0] += run(tokens[:, :-1, None], labels)[0] * len(part)
        run.train()
        loss_sum, n = mean_over_ranks(total).tolist()
        return loss_sum / n

    def warm_up(run):
        """Run every graph once before the clock starts: one per phase, one for evaluation."""
        for bag_size in dict.fromkeys((bag_size_at(step, c.bag_size, superposition_steps), 1)):
            objective, *_ = forward(run, stream.read(0, bag_size)[:c.batch_size].to(device), bag_size)  # any text will do
            objective.backward()
            optimizer.zero_grad()
        evaluate(run, val_mine[:1])

    compiled = c.compile == "on" or c.compile == "auto" and device_type == "cuda"
    if compiled and c.n_expert and dtype == "float32":
        say("experts compile in bfloat16 only (torch's grouped_mm); going on without torch.compile")
        compiled = False
    if compiled:
        started = time.perf_counter()
        for again in (True, False):
            try:
                model = torch.compile(raw_model, dynamic=False, fullgraph=True)
                warm_up(model)
                say(f"compiled in {time.perf_counter() - started:.0f} s")
                break
            except torch.OutOfMemoryError:
                raise
            except Exception as e:  # a process that was killed while compiling may have left a broken cache behind
                say(f"torch.compile failed ({type(e).__name__}: {' '.join(str(e).split())[:100]})"
                    + ("; trying again without its cache" if again else ""))
                torch.compiler.reset()
                optimizer.zero_grad()
                torch.compiler.config.force_disable_caches = True
        else:
            say("going on without torch.compile; a C++ compiler and Triton (for CUDA) are what it usually misses")
            model, compiled = raw_model, False
    if not compiled:
        warm_up(model)
    if distributed:
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")  # its new name is not known to torch 2.11
        ddp = DDP(model, device_ids=[local_rank] if device_type == "cuda" else None, broadcast_buffers=False,
                  gradient_as_bucket_view=True)
    else:
        ddp = model

    # ----------------------------------------------------------------------------------------------- description
    flops_per_step = raw_model.flops_per_position() * c.total_batch
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in versions["device"]), None)
    active = f" ({raw_model.n_params(active=True):,} active)" if c.n_expert else ""
    say(f"{raw_model.n_params():,} parameters{active}, {dtype}, {'compiled' if compiled else 'eager'}, {versions['device']}"
        f"{f', {world_size} ranks' if distributed else ''}")
    if superposition_steps:
        say(f"TST: {superposition_steps:,} of {c.max_steps:,} steps on bags of {c.bag_size}, then ordinary training; "
            f"{1 + superposition_steps / c.max_steps * (c.bag_size - 1):.2f} x the text of a baseline at the same FLOPs")
    run_tokens = c.total_batch * (superposition_steps * c.bag_size + c.max_steps - superposition_steps)
    say(f"{c.max_steps:,} steps of {c.total_batch:,} positions, {micro_steps} micro-step{'s' * (micro_steps > 1)} a rank; "
        f"{run_tokens:,} tokens, {run_tokens / stream.epoch_tokens:.2f} epochs of the corpus")
    wandb_run = None
    if master and c.wandb_project:
        try:
            import wandb
            wandb_run = wandb.init(project=c.wandb_project, name=os.path.basename(c.out_dir), config=described)
        except ImportError:
            fail("--wandb_project needs: pip install wandb")

    # ------------------------------------------------------------------------------------------------------ loop
    stop_signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(number, lambda n, frame: stop_signals.append(signal.Signals(n).name))

    def save(name):
        state = {"model": raw_model.state_dict(), "step": step, "cursor": cursor, "switch": stream.switch,
                 "seconds": seconds, "best_val": best_val, "rng": torch.get_rng_state(), "config": dataclasses.asdict(c),
                 "meta": meta, "data": folder, "versions": versions}
        if name == "last.pt":  # best.pt is never resumed, and moments are twice the size of the weights
            state["optimizer"] = optimizer.state_dict()
        write_safely(os.path.join(c.out_dir, name), lambda path: torch.save(state, path))

    stopping, clock, logged_at = False, time.perf_counter(), step
    while step < c.max_steps:
        bag_size = bag_size_at(step, c.bag_size, superposition_steps)  # TST: the phase
        tokens = stream.batch(cursor, bag_size, bag_size_at(step + 1, c.bag_size, superposition_steps))
        lr = learning_rate_at(step, c)
        for group in optimizer.param_groups:
            group["lr"] = lr

        loss_sum, load, entropy = 0.0, 0.0, 0.0
        for i, part in enumerate(tokens.split(c.batch_size)):  # micro-steps, (B, (L+1)*s) each
            if distributed:  # gradients travel once, with the last one
                ddp.require_backward_grad_sync = i == micro_steps - 1
            objective, loss, router = forward(ddp, part, bag_size)
            (objective / micro_steps).backward()
            loss_sum += loss.detach()
            if router:
                load += router["load"]
                entropy += router["entropy"]
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), c.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        if c.n_expert and c.balance_bias:
            load = mean_over_ranks(load)
            raw_model.balance_experts(load, c.balance_rate)
        step += 1
        cursor += stream.step_tokens(bag_size)  # TST: s times as much text

        # ------------------------------------------------------------------------------------------- log, save
        finished = step == c.max_steps
        evaluate_now = finished or step % c.eval_interval == 0
        save_now = finished or c.save_interval > 0 and step % c.save_interval == 0
        log_now = (evaluate_now or save_now or step % c.log_interval == 0 or step in (1, superposition_steps, superposition_steps + 1))
        stopping = bool(stop_signals)
        if distributed:  # together, at a row of the log, by what all of them know: a signal may come at any time
            stopping = log_now and mean_over_ranks(torch.tensor(float(stopping), device=device)).item() > 0
        if not (log_now or stopping):
            continue

        loss = mean_over_ranks(loss_sum / micro_steps).item()  # waits for the device
        elapsed = time.perf_counter() - clock
        seconds += elapsed
        rate = (step - logged_at) * c.total_batch / elapsed  # positions per second since the last row
        row = {"step": step, "phase": "superposition" if step <= superposition_steps else "recovery", "bag_size": bag_size,
               "loss": loss, "lr": lr, "grad_norm": grad_norm.item(), "positions": step * c.total_batch,
               "data_tokens": cursor, "epoch": cursor / stream.epoch_tokens, "flops": step * flops_per_step, "seconds": seconds,
               "tokens_per_second": rate}
        if peak and dtype == "bfloat16":
            row["mfu"] = rate * raw_model.flops_per_position() / (peak * world_size)
        if c.n_expert:
            load = load if c.balance_bias else mean_over_ranks(load)
            row |= router_metrics(load, mean_over_ranks(entropy / micro_steps))
        if not (math.isfinite(loss) and math.isfinite(row["grad_norm"])):  # never saved
            fail(f"the loss is {loss} and its gradient's norm {row['grad_norm']} at step {step}; lower learning_rate and "
                 f"start anew, or --resume from the last checkpoint with --allow_changes")
        if evaluate_now:
            row["val_loss"] = evaluate(model, val_mine)
            row["val_bpb"] = row["val_loss"] / math.log(2) / meta["bytes_per_token"]
        if master:
            with open(log_path, "a") as f:
                f.write(json.dumps(row) + "\n")
            if wandb_run:
                wandb_run.log(row, step=step)
            say(progress(row, c, elapsed / (step - logged_at)), flush=True)
            if evaluate_now and row["val_loss"] < best_val:
                best_val = row["val_loss"]
                save("best.pt")
            if save_now or stopping:
                save("last.pt")
        if stopping:
            say(f"stopped by {stop_signals[0] if stop_signals else 'a signal to another rank'} after step {step}; go on with --resume")
            break
        clock, logged_at = time.perf_counter(), step

    if wandb_run:
        wandb_run.finish()
    if distributed:
        dist.barrier()  # rank 0 may still be writing
        del ddp  # with the last reference to the group, it would wait for a thread that waits for Python's lock
        dist.destroy_process_group()
    if stopping:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main(parse(Config, sys.argv[1:]))
    except torch.OutOfMemoryError:
        fail("out of GPU memory; give a smaller --batch_size (the total batch stays the same), or --checkpoint_activations")
    except OSError as e:
        fail(e)
