"""What a run of train.py needs, before a GPU is asked for: memory, FLOPs, days, and how to start it.

    python -m tools.plan config/dense_3b.py --gpus=8
    python -m tools.plan config/moe_10b_a1b.py --gpus=64 --gpu_memory=80 --mfu=0.35
    python -m tools.plan config/wide.py --measure         a step here, and its peak beside the planned one

The model is built on the meta device: its shapes are the real ones, its weights take no memory. What a step
keeps and makes is counted tensor by tensor, from the code of model.py and nanotst/kernels.py. What is
assumed:

    gradients     in float32; from the backward pass on, with several micro-steps all the time. DDP has its
                  buckets all the time, and those of several micro-steps beside them; FSDP keeps its part.
                  A compiled model gives all of them at the end of the backward pass, beside those
    kept          for the backward pass, what autograd saves. Compiled, what torch's partitioner saved on a
                  CPU, the inputs of matrix products among it; on a GPU it may choose otherwise
    loss, logits  a chunk of logits, and the gradient of the head in float32, for a moment twice
    transient     the most gradients of activations that stand beside each other
    gathered      FSDP, of the largest unit (a block, the head): itself, the next one and its buffer in the
                  dtype of matrix products, its gradients, and those in float32 to be summed; the embedding is
                  gathered in float32
    reserve       CUDA, NCCL, fragmentation: a guess, --reserve

The parts are those at the moment of the peak, so that they add up. MFU counts the FLOPs of the model alone,
none of recomputing, attention without its causality. A GB is 10^9 bytes.
"""

import contextlib
import itertools
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import torch
from torch.distributed.tensor import DTensor

from model import GPT, GPTConfig
from nanotst import UserError
from nanotst.checkpoint import model_config
from nanotst.configurator import entry_point
from nanotst.kernels import rows_of_chunk, use_twins
from nanotst.machine import PEAK_FLOPS, Machine
from nanotst.mixture import open_mixture
from nanotst.optim import make_optimizer
from nanotst.parallel import build, clip_gradients, sync_gradients, wrap
from tools.bench import VOCAB_SIZES
from tools.runner import TRAINER, knobs_of, places, read_arguments
from tst import bags_and_labels, phase_list

ENOUGH = 8192  # positions of a micro-batch that fill a GPU: where they fit, nothing is recomputed

MARGIN = (
    1.05  # a micro-batch fits if so many times what is planned fits: plans were off by some percent
)


@dataclass
class Config:
    """Usage: python -m tools.plan CONFIG.py [--key=value ...] [--gpus=64] [--gpu=H100]

    The keys are those of train.py. Beside them:"""

    arguments: list[str]  # config files and knobs of train.py

    # Machine
    gpus: int = 8  # in all
    gpu: str = "H100"  # its peak FLOPs are taken from nanotst.machine.PEAK_FLOPS
    gpu_memory: float = 80.0  # GB of one
    gpus_per_node: int = 8  # for the command line
    mfu: float = 0.4  # share of the peak FLOPs that the model's own FLOPs will reach
    reserve: float = 6.0  # GB of each GPU for CUDA, NCCL and fragmentation
    vocab_size: int = 0  # 0: of the dataset, or, where it is not prepared yet, as in tools/bench.py

    # Output
    json: bool = False  # everything as JSON
    measure: bool = (
        False  # instead: a few steps here, their peak memory, and what was planned for it
    )


@dataclass(frozen=True)
class Way:
    """How a step is done."""

    device: str = "cuda"  # or cpu, whose kernels keep other things
    width: int = 2  # bytes of a number in matrix products: 2 bfloat16, 4 float32
    compiled: bool = True
    checkpointing: bool = False  # recompute blocks in the backward pass
    parallel: str = "ddp"  # or fsdp, or none: one process
    shards: int = 1  # GPUs that share the states
    micro_steps: int = 1

    @property
    def name(self):
        name = {"none": "one GPU"}.get(self.parallel, self.parallel.upper())
        return name + ", recomputing" * self.checkpointing


@dataclass(frozen=True)
class Model:
    """Sizes that the formulas below are about, from the real shapes."""

    config: GPTConfig
    parameters: int  # padding of the vocabulary included
    block: int  # parameters of one block
    matrices: dict  # {name: parameters} of those of its matrices that are cast to bfloat16
    table: int  # parameters of the embedding; the head has as many
    moments: int  # bytes that the optimizer keeps
    scratch: int  # bytes that its step makes

    @classmethod
    def of(cls, gpt, knobs):
        """The sizes of a GPT on the meta device, trained with the optimizer that the knobs name."""
        moments, scratch = 0, 0
        for optimizer in make_optimizer(gpt, knobs, "meta"):
            sizes = [p.numel() for group in optimizer.param_groups for p in group["params"]]
            if isinstance(
                optimizer, torch.optim.Muon
            ):  # one matrix after the other is orthogonalised
                moments += 4 * sum(sizes)
                scratch = 12 * max(sizes)  # its mean gradient, and copies in bfloat16
            else:
                moments += 8 * sum(sizes)
        block = dict(gpt.blocks[0].named_parameters())
        matrices = {
            name: p.numel() for name, p in block.items() if p.dim() > 1 and "router" not in name
        }
        return cls(gpt.config, sum(p.numel() for p in gpt.parameters()),
                   sum(p.numel() for p in block.values()), matrices, gpt.embed.weight.numel(), moments,
                   scratch)  # fmt: skip


# ------------------------------------------------------------------------- what is kept for the backward pass


def tall(n, a, b, way):
    """Bytes made by kernels.tall_product: (n, a).T @ (n, b), the result in float32 included."""
    copies = 16 if way.device == "cpu" and n % 16 == 0 and 16 * a * b <= n * (a + b) else 0
    if way.width == 4:
        return 4 * a * b * (copies + 1)
    # summed in a float32 copy; the gradient of a float32 weight is cast to float32
    return a * b * max(copies * (2 + 4) + 4, 2 + 4)


def norm(width, way, groups=1):
    """Bytes that RMSNorm of a position keeps beside its output, `groups` times `width`."""
    size, rms = groups * width, 4 * groups
    if way.compiled:
        return rms + way.width * size  # its input
    if way.device == "cpu":  # written out: the input and the quotient, in float32
        return rms + 8 * size
    return rms + 4 * size  # autocast hands it a float32 copy of its input


def kept_by_attention(c, way):
    """Bytes a position, from the block's input to the first sum."""
    e, q, kv = way.width, c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    n_bytes = norm(c.n_embd, way) + e * c.n_embd  # the input of qkv
    if way.device == "cpu" and c.block_size <= 512:  # kernels.ShortAttention
        n_bytes += (
            e * (4 * q + c.n_head * c.block_size) + 4 * c.n_head
        )  # q, k, v, result, numerators, sums
        through = 4 * (q + 2 * kv) if c.qk_norm and e == 4 and not way.compiled else 0
    else:
        through = e * (q + 2 * kv)  # qkv, of which v is a part
        n_bytes += e * (2 * q + kv) + 4 * c.n_head  # rotated q and k, the result, the log-sum-exps
    if c.qk_norm and way.compiled:
        n_bytes += 4 * (c.n_head + c.n_kv_head)
    elif c.qk_norm:
        n_bytes += norm(c.head_dim, way, c.n_head + c.n_kv_head)
        n_bytes -= 4 * (q + kv) if e == 4 else 0  # its input in float32 is a part of qkv
    return n_bytes + through


def expert_rows(c, positions, way):
    """Rows of experts for each position: top_k, and on a CPU room to fill each expert's up to 64."""
    pairs = positions * c.top_k
    return (pairs + (63 * min(c.n_expert, pairs) if way.device == "cpu" else 0)) / positions


def kept_by_mlp(c, positions, way):
    """Bytes a position, from the first sum to the block's output."""
    e, C, F = way.width, c.n_embd, c.ff_dim
    swiglu = (
        e * (3 if way.compiled else 5) * F
    )  # gate, up, result; eager: the sigmoid and a product, too
    n_bytes = norm(C, way)
    if not c.n_expert:
        return n_bytes + e * C + swiglu
    router = 8 * c.n_expert + 12  # logits and probabilities
    router += c.top_k * (4 + 8 + 8)  # weights, experts, row_of
    router += 0 if way.compiled else 4 * C  # its input, in float32
    rows = 2 * e * C + swiglu + 8 + 3 * e  # what goes in and comes out; pair_of; weights, filled
    return n_bytes + router + expert_rows(c, positions, way) * rows


# ----------------------------------------------------------------------------------------- moments of a step


def gradients_in_mlp(m, positions, way):
    """Bytes of gradients beside each other in the backward pass of a block's second half."""
    c, e, C, F = m.config, way.width, m.config.n_embd, m.config.ff_dim
    if not c.n_expert:
        return positions * e * (C + F) + max(tall(positions, C, F, way), positions * e * F)
    rows = positions * expert_rows(c, positions, way)
    weights = max(m.matrices.values()) * (4 if e == 4 else 2 + 4)  # made in bfloat16, then cast
    return positions * e * C + max(3 * rows * C * e, rows * F * e + weights)


def gradients_in_attention(m, positions, way):
    """The same of its first half."""
    c, e, q = m.config, way.width, m.config.n_head * m.config.head_dim
    if way.device == "cpu" and c.block_size <= 512:
        inside = c.n_head * c.block_size * (12 if e == 4 else 2 + 12)  # of kernels.ShortAttention
    else:
        inside = 3 * e * q + 4 * q  # of q, k and v, and that of q in float32
    return positions * (e * (c.n_embd + q) + inside)


def loss_bytes(m, positions, bag, way):
    """Bytes that kernels.LinearMCE makes in its forward pass: of a chunk of logits, and beside it."""
    e, C = way.width, m.config.n_embd
    V = m.table // C
    table = SimpleNamespace(
        device=torch.device(way.device), size=lambda dim: V
    )  # all that is asked of it
    n = min(rows_of_chunk(table), positions)
    chunks = math.ceil(positions / n)
    softmax = 0  # fused
    if not way.compiled:
        block = n if way.device == "cuda" else min(n, max(1, 2**20 // V))
        softmax = block * V * (4 if e == 4 else 8)
    later = (
        0 if e == 4 else V * C * (2 + (4 if way.device == "cpu" else 0))
    )  # a product, added in float32
    product = tall(n, V, C, way) if chunks == 1 else max(tall(n, V, C, way), 4 * V * C + later)
    waiting = 4 * V * C if chunks > 1 else 0
    weight = e * V * C if e == 2 and way.parallel != "fsdp" else 0
    of_labels = positions * bag * (8 + 8 + 4 + 4)  # ids, twice; coefficients; shares
    return {"loss": weight + max(product, waiting + softmax) + 2 * positions * C * e + of_labels,
            "logits": n * V * e}  # fmt: skip


def moments(m, rows, way, bag=1):
    """{moment of a step: {part: bytes}}, one of which is the peak. rows: of a micro-batch; bag: tokens that a
    position reads and predicts."""
    c, e, N = m.config, way.width, rows * m.config.block_size
    sharded = way.parallel == "fsdp"
    shards = way.shards if sharded else 1
    # gradients are in DDP's buckets, or of the micro-steps before; or they come during the backward pass
    stay = way.micro_steps > 1 or way.parallel == "ddp"
    all_gradients = 4 * m.parameters / shards
    of_first = m.block + (
        0 if c.tie_embeddings else m.table
    )  # block, and the embedding: the last to come
    gradients, of_head, but_first = 0, 4 * m.table / shards, all_gradients - 4 * of_first / shards
    at_end = all_gradients
    if stay:  # DDP sums those of several micro-steps before they go into its buckets
        twice = way.parallel == "ddp" and way.micro_steps > 1
        sums = all_gradients * (2 if twice else 1)
        gradients, of_head, but_first, at_end = sums, sums, sums, sums
        if way.compiled and not sharded:  # a graph gives all gradients at its end, to be added then
            but_first, at_end = (
                sums + 4 * (m.parameters - of_first),
                sums + 4 * (m.parameters - m.table),
            )
    of_mlp = (
        0
        if stay or sharded
        else 4 * sum(n for name, n in m.matrices.items() if name.startswith("mlp"))
    )
    new_table = 0 if sharded else 4 * m.table  # while it is made, or added to what is there
    states = {"weights": 4 * m.parameters / shards, "moments": m.moments / shards}
    if sharded:
        head = m.table * ((16 if c.tie_embeddings else 4 * e) + 4)
        states["gathered"] = max(m.block * (4 * e + 4), head)
        if way.micro_steps > 1:  # its part of a reduced gradient, beside the sum
            states["gathered"] += 4 * max(m.block, m.table) / shards

    inputs = N * e * c.n_embd  # of a block
    casts = (
        2 * sum(m.matrices.values()) if e == 2 and not sharded else 0
    )  # weights of a block in bfloat16
    attention = N * kept_by_attention(c, way) + casts
    block = attention + N * kept_by_mlp(c, N, way)
    kept = c.n_layer * (inputs if way.checkpointing else block)
    last = N * (norm(c.n_embd, way) + 12)  # the last norm, token ids
    if (
        way.checkpointing and way.device == "cuda" and not way.compiled and casts
    ):  # autocast's cache of them
        cached = (
            2 * c.n_layer * sum(n for name, n in m.matrices.items() if name.endswith(".weight"))
        )
    else:
        cached = 0
    # inside a block: in its MLP, and in its attention, when the MLP is done
    inside = max(
        {"kept": block, "transient": gradients_in_mlp(m, N, way)},
        {"kept": attention, "transient": gradients_in_attention(m, N, way) + of_mlp},
        key=lambda parts: sum(parts.values()),
    )
    others = kept - (inputs if way.checkpointing else block)  # of the blocks but one
    if way.checkpointing:
        inside["kept"] += inputs
    embedding = N * c.n_embd * (4 if e == 4 else 2 + 4)
    if way.device == "cuda" and not way.compiled and bag > 1:
        embedding += 4 * N * bag * c.n_embd  # the mean's gradient, for each token
    if stay or c.tie_embeddings:
        embedding += new_table
    return {
        "loss": states | {"gradients": gradients, "kept": kept + last + cached} | loss_bytes(m, N, bag, way),
        "head": states | {"gradients": gradients, "kept": kept + last, "loss": 2 * new_table + 2 * inputs},
        "last block": states | {"gradients": of_head} | inside | {"kept": others + inside["kept"]},
        "first block": states | {"gradients": but_first} | inside,
        "embedding": states | ({"gathered": 16 * m.table} if sharded else {})
                     | {"gradients": at_end, "transient": embedding},
        "optimizer": states | {"gathered": 0, "gradients": all_gradients, "transient": m.scratch},
    }  # fmt: skip


def peak(m, rows, way, bag=1):
    """(moment, {part: bytes}) of the largest sum."""
    found = moments(m, rows, way, bag)
    at = max(found, key=lambda moment: sum(found[moment].values()))
    return at, found[at]


# --------------------------------------------------------------------------------------------------- the plan


def read_knobs(arguments):
    """The knobs of train.py -> (all of them, config files, {knob: value} given beside the files)."""
    settings, files, grid = read_arguments(arguments, knobs_of(TRAINER), Config)
    if several := [key for key, values in grid.items() if len(values) > 1 and key != "dataset"]:
        raise UserError(f"{several[0]}: one value, please; a plan is of one run")
    given = {
        key: ",".join(values) if key == "dataset" else values[0] for key, values in grid.items()
    }
    return SimpleNamespace(**settings | given), files, given


def find_vocab_size(c, knobs):
    if c.vocab_size:
        return c.vocab_size
    try:
        return open_mixture(knobs.dataset).meta["vocab_size"]
    except UserError:
        if knobs.dataset in VOCAB_SIZES:
            return VOCAB_SIZES[knobs.dataset]
        raise UserError(f"the corpus {knobs.dataset} is not there; give --vocab_size=") from None


def phases_of(knobs):
    try:
        sizes = [int(s) for s in str(knobs.bag_size).split("-")]
        return phase_list(knobs.max_steps, sizes, knobs.superposition_ratio, knobs.superposition)
    except ValueError as e:
        raise UserError(f"bag_size={knobs.bag_size}: {e}") from None


def ways(c, knobs):
    """The ways to do a step that are open to the run."""
    width = 4 if knobs.dtype == "float32" else 2
    compiled = knobs.compile != "off" and not (knobs.n_expert and width == 4)
    one = Way(width=width, compiled=compiled, parallel="none")
    shards = knobs.shard_size or c.gpus
    kinds = [one] if c.gpus == 1 else [replace(one, parallel="ddp"),
                                       replace(one, parallel="fsdp", shards=shards)]  # fmt: skip
    if knobs.optimizer == "muon":  # works on whole matrices
        kinds = [way for way in kinds if way.parallel != "fsdp"]
    kinds = [way for way in kinds if knobs.parallel in ("auto", way.parallel) or c.gpus == 1]
    return [replace(way, checkpointing=again) for again in (False, True) for way in kinds]


def make_plan(c):
    """Everything that is printed, as plain values."""
    for key in ("gpus", "gpus_per_node"):
        if getattr(c, key) < 1:
            raise UserError(f"{key} must be at least 1, got {getattr(c, key)}")
    if c.gpu not in PEAK_FLOPS:
        raise UserError(f"gpu must be one of {', '.join(PEAK_FLOPS)}, got {c.gpu!r}")
    if not 0 < c.mfu <= 1:
        raise UserError(f"mfu must lie between 0 and 1, got {c.mfu}")
    knobs, files, given = read_knobs(c.arguments)
    if knobs.shard_size < 0 or knobs.shard_size and c.gpus % knobs.shard_size:
        raise UserError(f"shard_size must divide the {c.gpus} GPUs, got {knobs.shard_size}")
    shape = model_config(vars(knobs), {"vocab_size": find_vocab_size(c, knobs)})
    with torch.device("meta"):
        gpt = GPT(shape)
    m, phases, L = Model.of(gpt, knobs), phases_of(knobs), shape.block_size
    if knobs.total_batch % (L * c.gpus):
        raise UserError(
            f"total_batch {knobs.total_batch} must be a multiple of block_size {L} x {c.gpus} GPUs"
        )
    rank_rows = knobs.total_batch // (L * c.gpus)
    positions = knobs.total_batch * knobs.max_steps
    flops = gpt.flops_per_position() * positions
    tokens = sum((p.stop - p.start) * p.n_in for p in phases) * knobs.total_batch
    limit, labels = (c.gpu_memory - c.reserve) * 1e9, max(p.n_out for p in phases)

    def need(way, rows):
        at, parts = peak(m, rows, replace(way, micro_steps=rank_rows // rows), labels)
        return {
            "way": way.name,
            "rows": rows,
            "peak_at": at,
            "bytes": sum(parts.values()),
            "parts": parts,
        }

    options, sizes = [], [n for n in range(1, rank_rows + 1) if rank_rows % n == 0]
    for way in ways(c, knobs):
        needs = [need(way, rows) for rows in sizes]
        fitting = [n for n in needs if MARGIN * n["bytes"] <= limit]
        option = {
            "fits": bool(fitting),
            **(fitting[-1] if fitting else needs[0]),
            "settings": asdict(way),
        }
        if knobs.batch_size in sizes:
            option["as_configured"] = need(way, knobs.batch_size)["bytes"]
        options.append(option)
    enough = min(rank_rows, math.ceil(ENOUGH / L))
    fitting = [o for o in options if o["fits"]]
    best = next(
        (o for o in fitting if o["rows"] >= enough),
        max(fitting, key=lambda o: o["rows"], default=None),
    )
    return {
        "arguments": c.arguments, "gpus": c.gpus, "gpu": c.gpu, "gpu_memory": c.gpu_memory, "mfu": c.mfu,
        "reserve": c.reserve, "dtype": "float32" if options[0]["settings"]["width"] == 4 else "bfloat16",
        "compiled": options[0]["settings"]["compiled"], "vocab_size": shape.vocab_size,
        "parameters": gpt.n_params(), "active_parameters": gpt.n_params(active=True),
        "flops_per_position": gpt.flops_per_position(), "flops": flops, "positions": positions,
        "steps": knobs.max_steps, "total_batch": knobs.total_batch, "tokens": tokens,
        "phases": [asdict(p) for p in phases], "rows_of_a_rank": rank_rows, "batch_size": knobs.batch_size,
        "days": flops / (c.mfu * PEAK_FLOPS[c.gpu] * c.gpus) / 86400, "options": options, "best": best,
        "command": command(c, knobs, files, given, best) if best else None,
    }  # fmt: skip


def command(c, knobs, files, given, best):
    """How to start the run in the way that was found best."""
    nodes = math.ceil(c.gpus / c.gpus_per_node)
    start = "python"
    if c.gpus > 1:
        start = f"torchrun --standalone --nproc_per_node={c.gpus}"
    if nodes > 1:
        start = (f"torchrun --nnodes={nodes} --nproc_per_node={c.gpus_per_node} --rdzv_backend=c10d "
                 "--rdzv_endpoint=FIRST_NODE:29500")  # fmt: skip
    way = best["settings"]
    chosen = given | {"batch_size": best["rows"], "checkpoint_activations": way["checkpointing"]}
    if way["parallel"] == "fsdp":
        chosen["parallel"] = "fsdp"
        chosen |= {"shard_size": way["shards"]} if way["shards"] != c.gpus else {}
    from_files = vars(read_knobs(files)[0])
    changed = {key: value for key, value in chosen.items() if from_files.get(key) != value}
    return " ".join(
        [start, "train.py", *files, *(f"--{key}={value}" for key, value in changed.items())]
    )


def show(plan):
    """The plan as text."""
    gb = lambda n: f"{n / 1e9:.1f}" if n >= 5e7 else "0" if n == 0 else f"{n / 1e9:.2f}"
    active = (
        f", {plan['active_parameters']:,} active"
        if plan["active_parameters"] != plan["parameters"]
        else ""
    )
    bagged = [p for p in plan["phases"] if max(p["n_in"], p["n_out"]) > 1]
    on_bags = (f", {sum(p['stop'] - p['start'] for p in bagged):,} of them on bags of "
               + "-".join(str(max(p["n_in"], p["n_out"])) for p in bagged)) if bagged else ""  # fmt: skip
    more = plan["tokens"] / plan["positions"]
    machine = f"{plan['gpus']} x {plan['gpu']} of {plan['gpu_memory']:g} GB"
    how = f"{machine}, {plan['dtype']}, {'compiled' if plan['compiled'] else 'eager'}"
    lines = [
        f"{' '.join(plan['arguments'])} on {how}",
        f"  parameters  {plan['parameters']:,}{active}; vocabulary {plan['vocab_size']:,}",
        f"  FLOPs       {plan['flops_per_position']:.3g} a position, {plan['flops']:.3g} in the run",
        f"  steps       {plan['steps']:,} of {plan['total_batch']:,} positions{on_bags}",
        f"  text        {plan['tokens'] / 1e9:.4g} billion tokens, {more:.2f} x those of ordinary training",
        f"  time        {plan['days']:.2f} days at an MFU of {plan['mfu']:g}",
        "",
    ]
    options = plan["options"]
    parts = ["weights", "moments", "gradients", "gathered", "kept", "loss", "logits", "transient"]
    table = [["GB of a GPU at the peak of a step", *(o["way"] for o in options)],
             ["rows of a micro-batch", *(str(o["rows"]) for o in options)]]  # fmt: skip
    for part in parts:
        values = [o["parts"].get(part, 0) for o in options]
        if any(values):
            table.append(
                [part if part != "kept" else "kept for the backward pass", *map(gb, values)]
            )
    table.append(["reserve", *[gb(plan["reserve"] * 1e9)] * len(options)])
    totals = [
        gb(o["bytes"] + plan["reserve"] * 1e9) + ("" if o["fits"] else " too much") for o in options
    ]
    table += [["total", *totals], ["the peak is at", *(o["peak_at"] for o in options)]]
    if all("as_configured" in o for o in options):
        table.append([f"total with batch_size={plan['batch_size']}",
                      *(gb(o["as_configured"] + plan["reserve"] * 1e9) for o in options)])  # fmt: skip
    widths = [max(len(row[i]) for row in table) for i in range(len(options) + 1)]
    for row in table:
        lines.append(
            "  ".join([row[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(row[1:], widths[1:]))])
        )
    lines.append("")
    if plan["best"]:
        best = plan["best"]
        micro = plan["rows_of_a_rank"] // best["rows"]
        lines += [f"recommended: {best['way']}, {best['rows']} rows of a micro-batch, {micro} micro-steps",
                  f"  {plan['command']}"]  # fmt: skip
    else:
        lines.append(
            "nothing fits, not even one row: take more GPUs, larger ones, or a shorter block_size"
        )
    return "\n".join(line.rstrip() for line in lines)


# ---------------------------------------------------------------------------------------- measured beside it


def steps_here(machine, shape, knobs, rows, micro_steps, kinds, record):
    """Train a new model for three steps of each kind (n_in, n_out), as train.py does, the last ones under
    `record`. Returns whether it is compiled, and the bytes of tensors that are there between two steps."""
    torch.manual_seed(0)
    model = build(shape, machine, prepare=lambda model: use_twins(model, machine, kinds))
    optimizer = make_optimizer(model, knobs, machine.device_type)

    def forward(run, n_in, n_out):
        tokens = torch.randint(shape.vocab_size, (rows, shape.block_size * n_in + n_out), dtype=torch.int32,
                               device=machine.device)  # fmt: skip
        with machine.autocast():
            loss, router = run(*bags_and_labels(tokens, n_in, n_out))
        if router is None:
            return loss
        balance = knobs.balance_coef * router["balance_loss"].mean()
        return loss + balance + knobs.router_z_coef * router["z_loss"].mean()

    def warm_up(run):
        for kind in kinds:
            forward(run, *kind).backward()
            optimizer.zero_grad()

    run, compiled = machine.compile(model, knobs.compile, warm_up)
    run = wrap(run, machine)
    for last in (False, False, True):  # in the first two, moments and DDP's buckets are made
        with record if last else contextlib.nullcontext():
            for kind in kinds:
                for i in range(micro_steps):
                    sync_gradients(run, i == micro_steps - 1)
                    (forward(run, *kind) / micro_steps).backward()
                clip_gradients(model, knobs.grad_clip)
                optimizer.step()
                optimizer.zero_grad()
    kept = [t for one in optimizer for state in one.state.values() for t in state.values()]
    buckets = list(model.parameters()) if machine.parallel == "ddp" else []
    there = [*model.parameters(), *model.buffers(), *kept, *buckets]
    there = [t.to_local() if isinstance(t, DTensor) else t for t in there if torch.is_tensor(t)]
    return compiled, sum(t.nbytes for t in there)


@contextlib.contextmanager
def peak_of_cuda():
    torch.cuda.reset_peak_memory_stats()
    yield


def measure(c):
    """Peak bytes of tensors in a step on this machine, counted by its allocator, and as planned:
    {"measured", "planned", "peak_at", "way"}."""
    knobs, _, _ = read_knobs(c.arguments)
    shape = model_config(vars(knobs), {"vocab_size": find_vocab_size(c, knobs)})
    machine = Machine.start(knobs)
    rank_rows = knobs.total_batch // (shape.block_size * machine.world_size)
    rows = knobs.batch_size or rank_rows
    phases = phases_of(knobs)
    kinds = list(dict.fromkeys((p.n_in, p.n_out) for p in phases))
    # only in the last step: the profiler does not see what gloo's threads free, such as DDP's first buckets
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)
    record = peak_of_cuda() if machine.device_type == "cuda" else profiler
    compiled, there = steps_here(machine, shape, knobs, rows, rank_rows // rows, kinds, record)
    if machine.device_type == "cuda":
        measured = torch.cuda.max_memory_allocated()
    else:
        events = sorted(
            profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()
        )
        changes = [
            event.nbytes() for event in events if event.name() == "[memory]"
        ]  # freed: negative
        measured = there + max(itertools.accumulate(changes))
    with torch.device("meta"):
        m = Model.of(GPT(shape), knobs)
    way = Way(machine.device_type, 2 if machine.dtype == "bfloat16" else 4, compiled,
              knobs.checkpoint_activations, machine.parallel, machine.shard_size,
              rank_rows // rows)  # fmt: skip
    at, parts = peak(m, rows, way, max(n_out for _, n_out in kinds))
    machine.leave()
    return {"measured": measured, "planned": sum(parts.values()), "peak_at": at, "way": asdict(way),
            "vocab_size": shape.vocab_size}  # fmt: skip


def main(c):
    if c.measure:
        found = measure(c)
        ratio = found["planned"] / found["measured"]
        text = (f"{' '.join(c.arguments)}, {found['vocab_size']:,} words: measured "
                f"{found['measured'] / 1e6:.1f} MB, planned {found['planned'] / 1e6:.1f} MB ({ratio:.3f}), "
                f"peak at {found['peak_at']}")  # fmt: skip
        print(json.dumps(found) if c.json else text)
    else:
        plan = make_plan(c)
        print(json.dumps(plan, indent=1) if c.json else show(plan))


if __name__ == "__main__":
    entry_point(main, Config, places(sys.argv[1:], Config))
