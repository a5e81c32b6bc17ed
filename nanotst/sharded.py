"""The checkpoint of a sharded run: a folder in which every rank has written its part.

    last.dcp/manifest.json  the step, and the files of the checkpoint with their sha256
    last.dcp/step_500.0/    state.pt: the dict of the checkpoint, its sharded tensors on the meta device,
                            without their data; and the data, as torch.distributed.checkpoint (DCP) writes it

The manifest is written last and replaced at once. What it names is whole, and whatever else is in the folder
does not count, so the last good checkpoint is there until the new one is complete. Any number of ranks can
read it, or one process without ranks. All ranks must see the same file system."""

import glob
import json
import os
import pathlib
import pickle
import shutil
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from nanotst import UserError
from nanotst.files import sync_folder, why_not_written, write_safely
from nanotst.formats import sha256_of

MANIFEST = "manifest.json"


def map_tensors(f, x, key=""):
    """Nested dicts and lists with f(key, tensor) in the place of each tensor; key is where it stands, such as
    .model.head.weight."""
    if torch.is_tensor(x):
        return f(key, x)
    if isinstance(x, dict):
        return {k: map_tensors(f, v, f"{key}.{k}") for k, v in x.items()}
    if isinstance(x, list):
        return [map_tensors(f, v, f"{key}.{i}") for i, v in enumerate(x)]
    return x


def of_all_ranks(value, group=None):
    """A plain value of each rank: a list."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


# ---------------------------------------------------------------------------------------------------- writing


def copy_to_host(state):
    """A copy of a dict of tensors and plain values in host memory, in two: (the dict, in which sharded
    tensors are on the meta device; {key: those tensors})."""
    parts = {}

    def copy(key, t):
        t = t.detach()
        on_host = t.clone() if t.device.type == "cpu" else t.to("cpu")
        if not isinstance(t, DTensor):
            return on_host
        parts[key] = on_host
        return torch.empty(t.shape, dtype=t.dtype, device="meta")

    return map_tensors(copy, state), parts


def write_folder(path, state, parts, group):
    """Write what copy_to_host gave, by all ranks together. Raises UserError, on all of them, if one could
    not, and then the checkpoint before it is still there."""
    rank = dist.get_rank(group)
    folder = together(path, group, lambda: new_folder(path, state), rank == 0)[0]

    def write():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP's about its own calls
            # nothing is copied ahead: all is on the host, and DCP would make a CUDA stream in this thread
            writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0)
            dcp.save(parts, storage_writer=writer, process_group=group)  # syncs its files
        mine = glob.glob(f"{glob.escape(folder)}/__{rank}_*")
        mine += [f"{folder}/.metadata", f"{folder}/state.pt"] * (rank == 0)
        return {os.path.relpath(file, path): sha256_of(file) for file in mine}

    def commit():
        manifest = {"step": state["step"], "files": dict(sorted(files.items()))}
        sync_folder(folder)
        sync_folder(path)
        write_safely(f"{path}/{MANIFEST}", lambda name: write_json(name, manifest))
        for old in glob.glob(f"{glob.escape(path)}/step_*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)

    files = {name: digest for part in together(path, group, write) for name, digest in part.items()}
    together(path, group, commit, rank == 0)


def together(path, group, work, mine=True):
    """work() on all ranks for which it is `mine`: its results by rank. UserError on all ranks if one
    fails."""
    result, error = None, None
    if mine:
        try:
            result = work()
        except UserError as e:
            error = str(e)
        except (Exception, dcp.CheckpointException) as e:  # DCP's is no Exception
            cause = next(
                (e for e, _ in getattr(e, "failures", {}).values()), e
            )  # in DCP's errors: by rank
            error = why_not_written(path, cause, os.path.exists(f"{path}/{MANIFEST}"))
    results = of_all_ranks((result, error), group)
    if error := next((error for _, error in results if error), None):
        raise UserError(error)
    return [result for result, _ in results]


def new_folder(path, state):
    """Make the folder for a checkpoint inside `path`, with all that is not sharded in it. What the manifest
    names is not written over, though a resumed run may come to the same step again."""
    os.makedirs(path, exist_ok=True)
    i = 0
    while os.path.exists(folder := f"{path}/step_{state['step']}.{i}"):
        i += 1
    os.mkdir(folder)
    with open(f"{folder}/state.pt", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    return folder


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)


# ---------------------------------------------------------------------------------------------------- reading


def open_folder(path, verify=True):
    """The folder that the manifest names. verify: its files' checksums, which the ranks of a run share out
    among them. Raises UserError if one is wrong, FileNotFoundError if there is no manifest."""
    try:
        with open(f"{path}/{MANIFEST}", encoding="utf-8") as f:
            files = dict(json.load(f)["files"])
        (folder,) = {os.path.dirname(name) for name in files}
        if os.path.basename(folder) != folder or not all(
            isinstance(digest, str) for digest in files.values()
        ):
            raise ValueError("it names something else")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path} is damaged: its {MANIFEST} is no list of files ({str(e)[:100]})"
        ) from None
    wrong = None
    if verify:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for name in sorted(files)[rank::ranks]:
            if not os.path.isfile(f"{path}/{name}") or sha256_of(f"{path}/{name}") != files[name]:
                wrong = name
        wrong = next(filter(None, of_all_ranks(wrong)), None)
    if wrong:
        raise UserError(
            f"{path} is damaged: {wrong} is missing or its checksum is wrong; use another checkpoint"
        )
    return f"{path}/{folder}"


def read_parts(path, wanted):
    """Fill the tensors of wanted, {key: tensor}, which may be sharded in any way or whole. Every rank reads
    what it needs, and asks none of the others."""
    if not wanted:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP's, that no other process takes part
            dcp.load(wanted, storage_reader=Reader(open_folder(path, verify=False)), no_dist=True)
    except (Exception, dcp.CheckpointException) as e:
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:100]}"
        raise UserError(
            f"{path} is not a checkpoint of this repository, or is damaged ({reason})"
        ) from None


class Reader(dcp.FileSystemReader):
    """DCP's reader of folders, but one that runs no code from a file: DCP unpickles .metadata as it is."""

    def read_metadata(self, *args, **kwargs):
        with open(os.path.join(self.path, ".metadata"), "rb") as f:
            metadata = DescriptionOfTensors(f).load()
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class DescriptionOfTensors(pickle.Unpickler):
    OF_DCP = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
    OTHERS = (
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
    )

    def find_class(self, module, name):
        found = None
        if module in self.OF_DCP or (module, name) in self.OTHERS:
            found = super().find_class(module, name)
            if (
                module in self.OF_DCP and getattr(found, "__module__", None) != module
            ):  # what it has imported
                found = None
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        elif module.split(".")[0] == "pathlib" and name.endswith("Path"):  # where it was written
            found = pathlib.PurePath
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name} describes no tensor")
        return found
