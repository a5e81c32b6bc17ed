"""What a run of train.py needs before you ask for GPUs: memory, FLOPs, days, and the command that starts it.

    python -m tools.plan config/dense_3b.py --gpus=8
    python -m tools.plan config/moe_10b_a1b.py --gpus=64 --gpu_memory=80 --mfu=0.35

Memory is what a step holds at its worst moment, within 15 % of what PyTorch's allocator counted
(results/plan). CUDA, NCCL and fragmentation are a guess, --reserve. A GB is 10^9 bytes.
"""

import itertools
import sys
from dataclasses import dataclass, replace
from typing import Literal

import torch

import train
from model import GPT
from nanotst import UserError
from nanotst.checkpoint import model_config
from nanotst.configurator import entry_point
from nanotst.machine import PEAK_FLOPS
from nanotst.mixture import open_mixture
from tools.bench import VOCAB_SIZES
from tools.runs import markdown_table

MARGIN = 1.05  # free memory wanted for each byte planned
PARTS = "weights", "moments", "gathered", "gradients", "activations", "loss"  # of memory


@dataclass
class Config(train.Config):
    """Usage: python -m tools.plan CONFIG.py [--key=value ...] [--gpus=64] [--gpu=H100]

    All knobs of train.py, and these:"""

    gpus: int = 8  # GPUs in total; more than 8 are nodes of 8
    gpu: Literal[tuple(PEAK_FLOPS)] = "H100"  # kind of GPU
    gpu_memory: float = 80.0  # GB of one GPU
    mfu: float = 0.4  # assumed share of the peak FLOPs
    reserve: float = 6.0  # GB of each GPU for CUDA, NCCL and fragmentation
    vocab_size: int = 0  # 0: the dataset's, or as in tools/bench.py if it is not prepared yet


def memory(c, gpt, rows, micro_steps):
    """{part: bytes} of one GPU at the worst moment of a step: the loss, or the backward pass of the last or
    the first block. rows: of a micro-batch of n positions; e: bytes of its numbers."""
    m, e, n = gpt.config, 4 if c.dtype == "float32" else 2, rows * gpt.config.block_size
    cpu, fsdp, eager = c.device == "cpu", c.parallel == "fsdp", c.compile == "off"
    shards = (c.shard_size or c.gpus) if fsdp else 1
    block = sum(p.numel() for p in gpt.blocks[0].parameters())
    params, table, C = sum(p.numel() for p in gpt.parameters()), gpt.embed.weight.numel(), m.n_embd
    matrices = sum(p.numel() for _, p, init in gpt.inits() if init.kind == "matrix")
    moments = 8 * params - 4 * matrices * (c.optimizer == "muon")  # Muon has one
    gathered = (4 * e + 4) * max(block, table) * fsdp  # two units, and gradients to be summed

    # Bytes per position that a block keeps for its backward pass. Compiled code keeps the inputs of matrix
    # products and what attention saves. Eager code also keeps a norm's input and quotient in float32, and
    # the sigmoid and a product in SwiGLU.
    q, kv, heads = m.n_head * m.head_dim, m.n_kv_head * m.head_dim, m.n_head * m.block_size
    norm = C * (8 if eager else e)
    softmax = cpu and m.block_size <= 512  # the CPU's own attention keeps it
    # queries, keys and values, some of them twice, and the result
    attention = e * (4 * q + heads) if softmax else 3 * e * (q + kv)
    attention += norm + e * C + 8 * (q + kv) * (m.qk_norm and eager)
    mlp = e * (C + (5 if eager else 3) * m.ff_dim)
    if m.n_expert:  # on a CPU each expert has empty rows, up to a multiple of 64
        top_k = m.top_k + 63 * min(m.n_expert, n * m.top_k) / n * cpu
        mlp = top_k * (mlp + e * C) + 4 * C * eager
    kept = attention + mlp + norm
    inside = kept + 2 * e * (m.ff_dim + C) * max(1, m.top_k)  # gradients, too
    if softmax:
        inside = max(inside, attention + 12 * heads)
    each = e * C if c.checkpoint_activations else kept

    chunk = min(n * table // C, 2**26 if cpu else 2**29)  # logits that the fused loss holds at once
    by_parts = cpu and 16 * table <= n * (table / C + C)  # how the head's gradient is summed
    loss = e * chunk + (1 + 16 * by_parts) * (4 if e == 4 else 6) * table

    # Float32 gradients come during the backward pass, unless micro-steps are summed or DDP has its buckets;
    # with both there are two of each. A compiled graph returns them all at its end; CUDA graphs keep them.
    total = 4 * params / shards
    held = total * ((micro_steps > 1 or c.compile == "graphs") + (c.parallel == "ddp"))
    last = held + total * (not eager and not fsdp) if held else total
    worst = max(
        (held, n * (m.n_layer * each + 5 * e * C), loss),
        (held, n * ((m.n_layer - 1) * each + inside), 0),
        (last, n * inside, 0),
        key=sum,
    )
    return dict(zip(PARTS, (total, moments / shards, gathered, *worst)))


def plan(c, argv):
    """Print the plan. c: the knobs in argv. Raises UserError where train.py would."""
    if c.gpus < 1 or c.gpus > 8 and c.gpus % 8 or c.gpus % (c.shard_size or 1):
        raise UserError("gpus must be 1 to 8 or a multiple of 8, and of shard_size")
    if c.gpus > 1 and c.compile == "graphs":
        raise UserError("compile=graphs is for one GPU")
    if c.mfu <= 0:
        raise UserError(f"mfu must be positive, got {c.mfu:g}")
    phases = train.check(replace(c, batch_size=0), c.gpus)  # batch_size is chosen below
    try:
        vocab_size = c.vocab_size or open_mixture(c.dataset).meta["vocab_size"]
    except UserError:
        if not (vocab_size := VOCAB_SIZES.get(c.dataset)):
            raise
    with torch.device("meta"):
        gpt = GPT(model_config(vars(c), {"vocab_size": vocab_size}))
    kinds = {"ddp": "DDP", "fsdp": "FSDP"} if c.gpus > 1 else {"auto": "one GPU"}
    excluded = "fsdp" if c.optimizer == "muon" else {"ddp": "fsdp", "fsdp": "ddp"}.get(c.parallel)
    kinds.pop(excluded, None)

    positions = c.total_batch * c.max_steps
    tokens = sum((p.stop - p.start) * p.n_in for p in phases) * c.total_batch
    flops = gpt.flops_per_position() * positions
    days = flops / (c.mfu * PEAK_FLOPS[c.gpu] * c.gpus) / 86400
    print(f"{gpt.n_params():,} parameters, {gpt.n_params(active=True):,} active")
    print(f"{flops:.3g} FLOPs: {days:.2f} days of {c.gpus} {c.gpu} at an MFU of {c.mfu:g}")
    print(f"{tokens / 1e9:.4g} billion tokens, {tokens / positions:.2f} x the baseline's\n")
    rank_rows = c.total_batch // c.block_size // c.gpus
    cells, advice = [["GB of a GPU", "rows", *PARTS, "total", ""]], ""
    for recompute, kind in itertools.product((False, True), kinds):
        way = replace(c, parallel=kind, checkpoint_activations=recompute)
        name = kinds[kind] + ", recomputing" * recompute
        for rows in (n for n in range(rank_rows, 0, -1) if rank_rows % n == 0):
            parts = memory(way, gpt, rows, rank_rows // rows)
            if fits := MARGIN * sum(parts.values()) <= (c.gpu_memory - c.reserve) * 1e9:
                break  # the largest micro-batch that fits
        if fits and not advice:  # the first that fits
            advice = f"recommended: {name}, {rank_rows // rows} micro-steps of {rows} rows\n"
            by_default = kind == "ddp" and c.parallel == "auto"
            way = replace(way, batch_size=rows, parallel="auto" if by_default else kind)
            advice += command(c, argv, way)
        parts["total"] = sum(parts.values()) + c.reserve * 1e9
        sizes = [f"{size / 1e9:.1f}" for size in parts.values()]
        cells.append([name, str(rows), *sizes, "" if fits else "too much"])
    print(markdown_table(cells))
    print(f"\n{advice or 'nothing fits; take more GPUs, or a shorter block_size'}")


def command(c, argv, way):
    """The command line that starts the run. way: c with the recommended knobs."""
    start = "python train.py"
    if c.gpus > 1:
        start = f"torchrun --standalone --nproc_per_node={c.gpus} train.py"
    if c.gpus > 8:
        start = f"sbatch --nodes={c.gpus // 8} examples/slurm.sh"
    own = Config.__annotations__  # not the knobs of train.py
    given = [a for a in argv if a[2:].split("=")[0].replace("-", "_") not in own]
    knobs = [key for key, value in vars(way).items() if getattr(c, key) != value]
    return " ".join([start, *given, *(f"--{key}={getattr(way, key)}" for key in knobs)])


if __name__ == "__main__":
    entry_point(lambda c: plan(c, sys.argv[1:]), Config)
