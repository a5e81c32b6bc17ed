"""One model on many ranks: DDP, or FSDP2 where its states do not fit on each. The only file that wraps a
model; model.py knows nothing of it, and there is no tensor, pipeline or expert parallelism.

    ddp   every rank holds all of it: 16 bytes a parameter (float32 weight, gradient and two moments), 20
          where gradients are summed over micro-steps beside DDP's buckets
    fsdp  every rank holds a part of each of these and gathers one unit after the other: embedding, blocks,
          head. With shard_size N the parts are spread over N neighbouring ranks, say those of a node, and
          each such group holds them all (hybrid sharding): weights are then gathered within the node alone.

Where the ranks compute in bfloat16, a block's and the head's weights are cast before they are gathered, which
halves the traffic and the memory of a gathered unit. Autocast alone would gather float32 and keep its cast
copies of the whole model until the end of the forward pass. It stays on: it says what is computed in
bfloat16, the policy only where the cast is made. What the unsharded run reads in float32 is gathered in
float32: the routers, and the embedding, whose bags are averaged in it. Gradients are reduced, and summed over
micro-steps, in float32."""

import dataclasses
import functools
import math
import warnings

import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel as DDP

from model import GPT
from nanotst import UserError


def check_size(shape, machine):
    """Raises UserError for a model whose weights, gradients and moments this machine cannot hold."""
    try:
        with torch.device("meta"):  # without memory; two small ones, for any number of layers
            one, two = (GPT(dataclasses.replace(shape, n_layer=n)).n_params() for n in (1, 2))
    except (RuntimeError, TypeError) as e:  # of sizes beyond 64 bits
        raise UserError(f"there is no such model: {' '.join(str(e).split())[:100]}") from None
    n_params = one + (shape.n_layer - 1) * (two - one)
    needed = 16 * n_params + 4 * shape.block_size * shape.head_dim  # bytes; the rotary tables, too
    memory = machine.memory * (machine.shard_size if machine.parallel == "fsdp" else 1)
    if memory and needed > memory:
        hint = " --parallel=fsdp spreads them over the ranks, or" * (machine.parallel == "ddp")
        raise UserError(
            f"training {n_params:,} parameters takes {needed / 1e9:,.0f} GB, here are {memory / 1e9:,.0f};"
            f"{hint} give a smaller model: n_embd, n_layer, ff_dim, n_expert or block_size"
        )


def build(config, machine):
    """A new GPT on the machine's device, sharded if that is asked for. A seed gives the same weights either
    way, and no rank ever holds more than one whole parameter of a sharded model."""
    if machine.parallel != "fsdp":
        with torch.device(machine.device):
            return GPT(config)
    with torch.device("meta"):
        model = GPT(config)
    shard(model, machine)
    model.to_empty(device=machine.device)
    model.init_buffers()
    with torch.device(machine.device):
        # Without sharding each weight is drawn twice: by PyTorch's constructor, then by init_weights. Draw
        # the first ones here, too, so that the generator is in the same state
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.Linear(layer.in_features, layer.out_features, bias=False)
            elif isinstance(layer, nn.Embedding):
                nn.Embedding(layer.num_embeddings, layer.embedding_dim)
    init_weights(model)
    return model


def init_weights(model, parts=("",)):
    """model.init_weights, for a model that may be sharded: each rank draws one whole parameter at a time."""
    for name, p in model.named_parameters():
        if name.startswith(tuple(parts)):
            whole = torch.empty(p.shape, device=p.device)
            model.init_weight(name, whole)
            copy_part(p, whole)


def shard(model, machine):
    """Shard a model over the ranks, in place, by units whose own forward does the work."""
    ranks, n = machine.world_size, machine.shard_size
    shape, names = (
        ((ranks,), ("shard",)) if n == ranks else ((ranks // n, n), ("replicate", "shard"))
    )
    mesh = init_device_mesh(machine.device_type, shape, mesh_dim_names=names)
    # cast_forward_inputs would round the shares of experts, and autocast casts what has to be
    policy = functools.partial(
        MixedPrecisionPolicy, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    exact, low = (
        policy(),
        policy(param_dtype=torch.bfloat16 if machine.dtype == "bfloat16" else None),
    )
    warnings.filterwarnings(
        "ignore", message=".*returned a view tensor"
    )  # nothing is added to it in place
    # always resharded: units that stay gathered after an evaluation would have other parameters than the
    # optimizer
    unit = functools.partial(fully_shard, mesh=mesh, reshard_after_forward=True)
    for block in model.blocks:
        if model.config.n_expert:
            unit(block.mlp.router, mp_policy=exact)
        unit(block, mp_policy=low)
    if model.config.tie_embeddings:  # one parameter cannot be in two units
        unit([model.embed, model.head], mp_policy=exact)
    else:
        unit(model.embed, mp_policy=exact)
        unit(model.head, mp_policy=low)
    unit(model, mp_policy=exact)  # the last norm


def wrap(model, machine):
    """The model as it is trained by all ranks together."""
    if machine.parallel != "ddp":
        return model
    warnings.filterwarnings(
        "ignore", message=".*broadcast_buffers"
    )  # torch 2.11 does not know its new name
    device_ids = [machine.local_rank] if machine.device_type == "cuda" else None
    return DDP(model, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def sync_gradients(model, wanted):
    """Whether gradients travel in the next backward pass, said before its forward pass: with the last
    micro-step is enough. FSDP reduces them in each, since it would have to keep them whole until then: 4
    bytes for each parameter of the model on each rank, which are what it is there to save."""
    if isinstance(model, DDP):
        model.require_backward_grad_sync = wanted
    elif isinstance(model, FSDPModule):
        model.set_requires_all_reduce(
            wanted
        )  # of hybrid sharding: the sum over groups of ranks can wait


def clip_gradients(model, limit):
    """Scale the gradients so that their norm is at most `limit` (0: any). Returns the norm before that, of
    the whole model."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def compile_units(model):
    """Compile a sharded model, in place: each unit's forward by itself, since FSDP's hooks between the units,
    and before and after a router, cannot be part of a graph. Blocks share one graph."""
    for unit in (model.embed, *model.blocks, model.head):
        unit.forward = torch.compile(
            unit.forward, dynamic=False, fullgraph=not model.config.n_expert
        )


@torch.no_grad()
def copy_part(mine, whole):
    """mine.copy_(whole), where mine may be a sharded tensor, of which this rank has a part."""
    if isinstance(mine, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            mine.shape, mine.device_mesh, mine.placements
        )
        whole = whole[tuple(slice(a, a + n) for a, n in zip(offset, shape))]
        mine = mine.to_local()
    mine.copy_(whole)
