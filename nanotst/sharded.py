"""The checkpoint of a sharded run, to which every rank writes its part.

    last.pt                            all that is not sharded, and the shapes of the tensors that are
    last.step_500.7f31a2e0/rank_3.pt   {name: (start, part)}, what rank 3 holds of each of these

FSDP2 cuts tensors along their first dimension, so a part is tensor[start : start + len(part)].

last.pt is replaced last and names the folder of the parts, so folders left by a killed run don't count. Files
are loaded with weights_only, so none can run code. All ranks must see one file system."""

import glob
import os
import shutil
import zipfile
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nanotst import UserError
from nanotst.files import write_safely


class Parts:
    """A saved tensor in parts, [(start, part)] in order, from the files of several ranks."""

    def __init__(self, parts):
        self.parts, self.dtype = parts, parts[0][1].dtype
        self.shape = torch.Size([sum(len(t) for _, t in parts), *parts[0][1].shape[1:]])

    def __getitem__(self, index):
        """The tensor, or the part of it that slices cut along the first dimension; index: ... or slices."""
        a, b = (0, self.shape[0]) if index is ... else (index[0].start, index[0].stop)
        return torch.cat([t[max(0, a - start) : max(0, b - start)] for start, t in self.parts])


def map_tensors(f, x, name=""):
    """Nested dicts and lists with f(name, tensor) for each tensor; a name is like .model.head.weight."""
    if isinstance(x, (torch.Tensor, Parts)):
        return f(name, x)
    if isinstance(x, dict):
        return {k: map_tensors(f, v, f"{name}.{k}") for k, v in x.items()}
    if isinstance(x, list):
        return [map_tensors(f, v, f"{name}.{i}") for i, v in enumerate(x)]
    return x


def of_all_ranks(value, group=None):
    """[value of rank 0, of rank 1 ...]; plain values."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def together(work, group=None):
    """work() on every rank. A UserError of one is raised on all."""
    error = ""
    try:
        work()
    except UserError as e:
        error = str(e)
    if error := max(of_all_ranks(error, group)):
        raise UserError(error)


def load_file(path, verify=True):
    """What torch.save wrote, on the CPU. verify: its checksums, which torch ignores. Raises UserError."""
    try:
        if verify:
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(f"the checksum of {damaged} is wrong")
        # mapped, so that what no one uses is not read; torch cannot map a name that is not UTF-8
        return torch.load(path, map_location="cpu", weights_only=True, mmap=path.isprintable())
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as e:  # a damaged file can make zipfile, pickle and torch raise anything
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:100]}"
        raise UserError(f"{path} is not a checkpoint, or is damaged: {reason}") from None


def copy_to_host(state):
    """Nested dicts and lists of tensors -> (a copy in host memory, in which sharded tensors are on the meta
    device, without data; {name: (start, part)} of what this rank holds of them)."""
    parts = {}

    def copy(name, t):
        t = t.detach()
        if not isinstance(t, DTensor):
            return t.to("cpu", copy=True)
        _, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
        places = zip(t.device_mesh.get_coordinate(), t.placements)
        if not any(i for i, p in places if p.is_replicate()):  # hybrid sharding: the first group
            parts[name] = offset[0], t.to_local().to("cpu", copy=True)
        return torch.empty(t.shape, dtype=t.dtype, device="meta")

    return map_tensors(copy, state), parts


def write_parts(path, state, parts, group):
    """Write what copy_to_host gave, on all ranks. If one cannot, all raise UserError, and the old stays."""
    rank, stem = dist.get_rank(group), os.path.splitext(path)[0]
    # random, since a resumed run may save a step again
    folder = of_all_ranks(f"{stem}.step_{state['step']}.{os.urandom(4).hex()}", group)[0]
    state |= {"folder": os.path.basename(folder), "ranks": dist.get_world_size(group)}
    together(lambda: write_safely(f"{folder}/rank_{rank}.pt", partial(torch.save, parts)), group)
    together(lambda: rank == 0 and write_safely(path, partial(torch.save, state)), group)
    if rank == 0:
        remove_parts(path, folder)


def remove_parts(path, but=""):
    """Remove the folders of a checkpoint's parts, except for one."""
    for folder in glob.glob(f"{glob.escape(os.path.splitext(path)[0])}.step_*"):
        if folder != but:
            shutil.rmtree(folder, ignore_errors=True)


def open_parts(path, state):
    """The state in a checkpoint's file, with Parts for sharded tensors. Each rank verifies some of the files;
    all raise UserError if a part is damaged or missing."""
    folder = os.path.join(os.path.dirname(path), os.path.basename(state["folder"]))
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    files, load = [], lambda i: load_file(f"{folder}/rank_{i}.pt", verify=i % ranks == rank)
    together(lambda: files.extend(map(load, range(state["ranks"]))))

    def find(name, t):
        if not t.is_meta:
            return t
        parts = sorted((file[name] for file in files if name in file), key=lambda part: part[0])
        if sum(len(part) for _, part in parts) != len(t):
            raise UserError(f"{path} is damaged: a part of {name[1:]} is missing; use another")
        return Parts(parts)

    return map_tensors(find, state)
