"""One model on many ranks: DDP, or FSDP2 where its states do not fit on each GPU. No other parallelism.

    ddp   every rank holds everything: 16 bytes per parameter (float32 weight, gradient and two moments), 20
          where gradients of several micro-steps are summed beside DDP's buckets
    fsdp  every rank holds a part of each and gathers one unit after another: embedding, blocks, head. With
          shard_size N, each group of N ranks (a node, say) holds all parts, so it gathers within itself

In bfloat16, blocks and head are cast before they are gathered, which halves traffic and memory; autocast
alone would keep cast copies of the model until the forward pass ends. Routers and the embedding, whose bags
are averaged in float32, are gathered in float32. Gradients are reduced, and summed, in float32."""

import copy
import functools
import math
import warnings

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel as DDP

from model import GPT
from nanotst import UserError

SHALLOW = 16  # layers of a model that is compiled as a whole


def check_size(shape, machine):
    """Raise UserError for a model whose weights, gradients and moments do not fit in memory."""
    with torch.device("meta"):  # takes no memory
        n_params = GPT(shape).n_params()
    needed = 16 * n_params  # bytes
    memory = machine.memory * (machine.shard_size if machine.parallel == "fsdp" else 1)
    if memory and needed > memory:
        size = f"{n_params:,} parameters takes {needed / 1e9:,.0f} GB, but there are {memory / 1e9:,.0f}"
        todo = "use --parallel=fsdp on several GPUs or lower n_embd, n_layer, ff_dim or n_expert"
        raise UserError(f"training {size}; {todo}")


def build(config, machine, prepare=None):
    """A new GPT on the machine's device, sharded under FSDP, one whole parameter at a time. A seed gives the
    same weights either way. prepare(model) runs before sharding."""
    sharded = machine.parallel == "fsdp"
    with torch.device("meta" if sharded else machine.device):
        model = GPT(config)
    if prepare:
        prepare(model)
    if sharded:
        for layer in model.modules():  # draw what the constructors of an unsharded model draw
            if hasattr(layer, "reset_parameters"):
                copy.deepcopy(layer).to_empty(device=machine.device).reset_parameters()
        shard(model, machine)
        model.to_empty(device=machine.device)
        model.init_buffers()
        init_weights(model)
    return model


def init_weights(model, parts=("",)):
    """Initialise the parameters whose names start with one of `parts`, whole, one after another."""
    for name, p, init in model.inits():
        if name.startswith(tuple(parts)):
            whole = torch.empty(p.shape, device=p.device)
            init.fill(whole)
            copy_part(p, whole)


def shard(model, machine):
    """Shard a model over the ranks, in place, in units whose own forward does the work."""
    ranks, n = machine.world_size, machine.shard_size
    shape, names = ((ranks // n, n), ("replicate", "shard")) if n < ranks else ((n,), ("shard",))
    mesh = init_device_mesh(machine.device_type, shape, mesh_dim_names=names)
    how = dict(reduce_dtype=torch.float32, cast_forward_inputs=False)  # autocast casts inputs
    exact = MixedPrecisionPolicy(**how)
    low = MixedPrecisionPolicy(torch.bfloat16, **how) if machine.dtype == "bfloat16" else exact
    # units change no view in place; those left gathered would have other parameters than the optimizer
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    unit = functools.partial(fully_shard, mesh=mesh, reshard_after_forward=True)
    for block in model.blocks:
        if model.config.n_expert:
            unit(block.mlp.router, mp_policy=exact)
        unit(block, mp_policy=low)
    tied = model.config.tie_embeddings  # one parameter cannot be in two units
    unit([model.embed, model.head] if tied else model.embed, mp_policy=exact)
    if not tied:
        unit(model.head, mp_policy=low)
    unit(model, mp_policy=exact)  # the last norm


def wrap(model, machine):
    """The model as all ranks train it together."""
    if machine.parallel != "ddp":
        return model
    warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # torch 2.11 has no other name
    return DDP(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def sync_gradients(model, wanted):
    """Set before forward whether the next backward synchronises gradients; once per step is enough. FSDP
    always reduces them, or it would keep them whole; only the sum over groups of ranks can wait."""
    if isinstance(model, DDP):
        model.require_backward_grad_sync = wanted
    elif isinstance(model, FSDPModule):
        model.set_requires_all_reduce(wanted)


def clip_gradients(model, limit):
    """Scale the gradients to a norm of at most `limit` (0: any). Returns the whole model's norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def compile_model(model, how, sharded=False):
    """The model compiled as one graph or, if it is sharded or deep, unit by unit in place. how: on, or graphs
    for CUDA graphs. FSDP's hooks between units cannot be part of a graph, and a deep model's blocks share one
    graph, which compiles in a fraction of the time (results/bench)."""
    if not sharded and (how == "graphs" or len(model.blocks) <= SHALLOW):
        mode = "reduce-overhead" if how == "graphs" else None
        return torch.compile(model, dynamic=False, fullgraph=True, mode=mode)
    whole = not model.config.n_expert
    for unit in (model.embed, *model.blocks, model.head):
        unit.forward = torch.compile(unit.forward, dynamic=False, fullgraph=whole)
    return model


@torch.no_grad()
def copy_part(mine, whole):
    """mine.copy_(whole), where `mine` may be sharded, and `whole` the Parts of a checkpoint."""
    index = ...
    if isinstance(mine, DTensor):
        where = mine.shape, mine.device_mesh, mine.placements
        shape, offset = compute_local_shape_and_global_offset(*where)
        index, mine = tuple(slice(a, a + n) for a, n in zip(offset, shape)), mine.to_local()
    mine.copy_(whole[index])
