"""Checkpoints: files that are whole or not there, and the way back from them to a model or a run.

    last.pt    of a run that is not sharded: one file of torch.save, a dict
    last.dcp/  of a sharded one: a folder in which every rank has written its part
        manifest.json   the step, and the files of the checkpoint with their sha256; it is written last, and
                        replaced at once, so what it names is whole, and nothing else in the folder counts
        step_500.0/     state.pt, the same dict with the sharded tensors left out (they are on the meta device),
                        and these tensors in the files of torch.distributed.checkpoint

load_checkpoint gives the same dict for both, and either can be resumed by any number of ranks, sharded or not. All
ranks must see the same file system.
"""

import contextlib
import dataclasses
import errno
import glob
import json
import math
import os
import pickle
import shutil
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from model import GPT, GPTConfig
from nanotst import UserError
from nanotst.corpus import check_same, check_vocabulary
from nanotst.formats import sha256_of
from nanotst.parallel import copy_part
from nanotst.stream import is_state

MANIFEST = "manifest.json"
FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


def write_safely(path, write):
    """Call write(temporary path), sync, rename: a killed process or a full disk leaves the old file as it
    was."""
    temporary = f"{path}.tmp"
    try:
        write(temporary)
        with open(temporary, "r+b") as f:  # open for writing, or Windows does not sync
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path) or ".")
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise UserError(why_not_written(path, e, os.path.exists(path))) from None


def why_not_written(path, error, kept):
    """A line about an error in writing. kept: whether the checkpoint before it is there."""
    error = next((e for e, _ in getattr(error, "failures", {}).values()), error)  # of DCP: by rank
    free = shutil.disk_usage(os.path.dirname(path) or ".").free
    full = isinstance(error, RuntimeError) or getattr(error, "errno", None) in FULL
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    reason = f"the disk is full, or nearly ({free / 1e9:.1f} GB are free)" if full else reason
    old = "; the one before it is untouched" if kept else ""
    todo = ": make room and use --resume" if full and kept else ": make room" if full else ""
    return f"cannot write {path}: {reason}{old}{todo}"


def sync_folder(folder):
    """Have the names in a folder reach the disk, after the files they name."""
    if os.name == "posix":  # Windows cannot open a folder
        fd = os.open(folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


# ----------------------------------------------------------------------------------------------------- saving


class Saver:
    """Writes a run's checkpoints. All ranks call the same methods.

    An unsharded checkpoint is written by the master, while the others wait for it in the next step. A sharded one
    holds training only until its tensors are copied to host memory; a thread of each rank writes the copy while
    training goes on. That is dcp.async_save done by hand, for the manifest has to follow the files. It is sound
    since the threads talk over a gloo group of their own, never over the one that training uses, and since at
    most one step's checkpoints are being written: before the next save, and at the end, wait() has to be passed.
    """

    def __init__(self, machine):
        self.machine, self.pending, self.step = machine, [], None
        if machine.parallel == "fsdp":
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
            self.worker = ThreadPoolExecutor(1)

    def save(self, path, state):
        """Write a dict of tensors and plain values that load_checkpoint reads. Raises UserError, and leaves the
        old checkpoint, for weights that are not finite."""
        if not all(of_all_ranks(all_finite(state["model"].values()))):
            raise UserError(f"the weights after step {state['step']} are not finite; {path} was not written")
        if self.machine.parallel != "fsdp":
            if self.machine.master:
                save_file(path, state)
                drop_other_form(path)
            return
        if self.step != state["step"]:  # best and last of one step may wait for the thread together
            self.wait()
        copies = {}

        def cut(key, t):
            if not isinstance(t, DTensor):
                return t.detach().clone()
            t = t.detach()
            copies[key] = t.clone() if t.device.type == "cpu" else t.to("cpu")
            return torch.empty(t.shape, dtype=t.dtype, device="meta")

        rest, self.step = map_tensors(cut, state), state["step"]
        self.pending.append(self.worker.submit(self._write, path, rest, copies))

    def wait(self):
        """Until all is written. Raises UserError, on all ranks, if something could not be."""
        pending, self.pending = self.pending, []
        for future in pending:
            future.result()

    def _write(self, path, rest, copies):
        """The folder of a sharded checkpoint, by all ranks."""
        folder = self._together(path, lambda: new_folder(path, rest), master=True)[0]

        def write():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about DCP's own use of deprecated storages
                writer = dcp.FileSystemWriter(folder)  # syncs its files
                dcp.save(copies, storage_writer=writer, process_group=self.group)
            names = glob.glob(f"{folder}/__{dist.get_rank(self.group)}_*")
            names += [f"{folder}/.metadata", f"{folder}/state.pt"] if self.machine.master else []
            return {os.path.relpath(name, path): sha256_of(name) for name in names}

        files = {name: digest for part in self._together(path, write) for name, digest in part.items()}
        manifest = json.dumps({"step": rest["step"], "files": dict(sorted(files.items()))}, indent=1)

        def commit():
            sync_folder(folder)
            sync_folder(path)
            write_safely(f"{path}/{MANIFEST}", lambda name: write_text(name, manifest))
            for old in glob.glob(f"{path}/step_*"):
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)
            drop_other_form(path)

        self._together(path, commit, master=True)

    def _together(self, path, work, master=False):
        """work() on all ranks, or on the master alone -> its results by rank. UserError on all if one failed."""
        result, error = None, None
        if self.machine.master or not master:
            try:
                result = work()
            except UserError as e:
                error = str(e)
            except Exception as e:  # a full disk, whatever DCP makes of it, or a bug: said by all
                error = why_not_written(path, e, exists(path))
        results = [None] * self.machine.world_size
        dist.all_gather_object(results, (result, error), group=self.group)
        errors = [error for _, error in results if error]
        if errors:
            raise UserError(errors[0])
        return [result for result, _ in results]


def new_folder(path, rest):
    """Make the folder for a checkpoint inside `path`, with all that is not sharded in it. One name is never used
    twice: what the manifest names is not written over."""
    os.makedirs(path, exist_ok=True)
    i = 0
    while os.path.exists(folder := os.path.join(path, f"step_{rest['step']}.{i}")):
        i += 1
    os.mkdir(folder)
    with open(os.path.join(folder, "state.pt"), "wb") as f:
        torch.save(rest, f)
        f.flush()
        os.fsync(f.fileno())
    return folder


def save_file(path, state):
    def write(temporary):
        with open(temporary, "wb") as f:  # through a file of ours, errors keep their errno
            torch.save(state, f)

    write_safely(path, write)


def write_text(path, text):
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


def forms(path):
    """The file and the folder that a checkpoint may be: last.pt, last.dcp."""
    stem = os.path.splitext(path)[0]
    return f"{stem}.pt", f"{stem}.dcp"


def drop_other_form(path):
    """A run that is sharded now and was not before, or the other way round, leaves one checkpoint, not two."""
    for other in forms(path):
        if other != path:
            remove(other)


def exists(path):
    return os.path.exists(os.path.join(path, MANIFEST) if path.endswith(".dcp") else path)


def remove(path):
    """Remove a checkpoint of either form, if it is there. Without its manifest a folder is none any more."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(path, MANIFEST) if os.path.isdir(path) else path)
    shutil.rmtree(path, ignore_errors=True)


def newest(path):
    """The form in which a checkpoint is there, None if in neither: the one of the later step, if a run was killed
    before it could remove the other."""
    there = [form for form in forms(path) if exists(form)]
    return max(there, key=step_of) if len(there) > 1 else there[0] if there else None


def step_of(path):
    try:
        return read(path, verify=False)["step"]
    except (UserError, KeyError):
        return -1


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


# ---------------------------------------------------------------------------------------------------- loading


def load_checkpoint(path, mmap=True):
    """A checkpoint as train.py writes it, a file or a folder, on the CPU, its checksums verified. Only tensors and
    plain values are unpickled. Raises UserError for one that is missing, damaged or something else."""
    saved, wanted = read(path, mmap), {}

    def room(key, t):
        if not t.is_meta:
            return t
        return wanted.setdefault(key, torch.empty(t.shape, dtype=t.dtype))

    saved = map_tensors(room, saved)
    read_parts(path, wanted)
    return saved


def read(path, mmap=True, verify=True):
    """A checkpoint whose sharded tensors, if it has any, are still on the meta device: read_parts reads them."""
    try:
        folder = os.path.isdir(path)
        file = os.path.join(open_folder(path, verify), "state.pt") if folder else path
        if verify and not folder:
            with zipfile.ZipFile(path) as z:
                damaged = z.testzip()  # reads all of it: torch itself does not check the sums
            if damaged:
                raise UserError(f"{path} is damaged: the checksum of {damaged} is wrong; use another checkpoint")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except UserError:
        raise
    except Exception as e:
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:100]}"
        raise UserError(f"{path} is not a checkpoint of this repository, or is damaged ({reason})") from None
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(k), dict) for k in ("model", "config", "meta")
    ):
        raise UserError(f"{path} is not a checkpoint of this repository")
    return checkpoint


def open_folder(path, verify=True):
    """The folder that the manifest of a sharded checkpoint names. verify: its files' checksums, which the ranks of
    a run share among them."""
    try:
        with open(os.path.join(path, MANIFEST), encoding="utf-8") as f:
            files = dict(json.load(f)["files"])
        (folder,) = {os.path.dirname(name) for name in files}
        if os.path.basename(folder) != folder:
            raise ValueError("it names files elsewhere")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is damaged: its {MANIFEST} is no list of files ({e})") from None
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if verify and dist.is_initialized() else (0, 1)
    wrong = None
    for name in sorted(files)[rank::ranks] if verify else ():
        file = os.path.join(path, name)
        if not os.path.isfile(file) or sha256_of(file) != files[name]:
            wrong = name
    wrong = next(filter(None, of_all_ranks(wrong) if verify else ()), None)
    if wrong:
        raise UserError(f"{path} is damaged: {wrong} is missing, or its checksum is wrong; use another checkpoint")
    return os.path.join(path, folder)


def of_all_ranks(value):
    """A plain value of each rank: a list."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def read_parts(path, wanted):
    """Read sharded tensors of a checkpoint that read() has opened: wanted is {key: tensor to fill}, whole tensors
    or parts of any sharding. Every rank reads what it needs, and asks none of the others."""
    if not wanted:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that no other process takes part
            dcp.load(wanted, storage_reader=Reader(open_folder(path, verify=False)), no_dist=True)
    except Exception as e:
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:100]}"
        raise UserError(f"{path} is not a checkpoint of this repository, or is damaged ({reason})") from None


class Reader(dcp.FileSystemReader):
    """DCP's reader of folders, but it runs no code that a file may hold: DCP unpickles .metadata."""

    def read_metadata(self, *args, **kwargs):
        with open(os.path.join(self.path, ".metadata"), "rb") as f:
            metadata = Unpickler(f).load()
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Unpickler(pickle.Unpickler):
    """Of descriptions of tensors alone."""

    MODULES = {"torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"}
    NAMES = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}

    def find_class(self, module, name):
        found = None
        if module in self.MODULES or (module, name) in self.NAMES:
            found = super().find_class(module, name)
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None or module in self.MODULES and getattr(found, "__module__", None) != module:
            raise pickle.UnpicklingError(f"{module}.{name} describes no tensor")
        return found


def load_model(path):
    """The model of a checkpoint, with its weights, on the CPU, and the checkpoint."""
    checkpoint = load_checkpoint(path)
    model = GPT(model_config(checkpoint["config"], checkpoint["meta"]))
    load_weights(model, checkpoint["model"], path)
    return model, checkpoint


def load_weights(model, state, path):
    """Put the weights of a checkpoint, whole or not yet read, into a model, sharded or not. Raises UserError if
    they are others, or not finite."""
    own, later = model.state_dict(), {}
    wrong = own.keys() ^ state.keys() or {n for n in own if getattr(state[n], "shape", None) != own[n].shape}
    if wrong:
        name = min(wrong, key=str)
        there, here = (getattr(x.get(name), "shape", "missing") for x in (state, own))
        there, here = (list(x) if isinstance(x, torch.Size) else x for x in (there, here))
        raise UserError(f"{path} does not fit this model: its {name!s:.60} is {there}, the model's {here}")
    for name, t in own.items():
        take(t, state[name], f".model.{name}", later)
    read_parts(path, later)
    if not all(of_all_ranks(all_finite(model.state_dict().values()))):
        raise UserError(f"the weights in {path} are not finite; use another checkpoint")


def take(mine, saved, key, later):
    """Fill a tensor of ours with a saved one, now or, if that is not yet read, with the others in `later`."""
    if saved.is_meta:
        later[key] = mine
    else:
        copy_part(mine, saved)


def all_finite(tensors):
    """Whether no number in the tensors is NaN or infinite; of sharded ones, in the parts of this rank."""
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    # NaN and inf stay in a sum
    sums = [t.sum(dtype=torch.float64) for t in parts if t.is_floating_point() and t.numel()]
    return all(map(math.isfinite, torch.stack(sums).tolist())) if sums else True


def model_config(config, meta):
    """GPTConfig from the knobs of a run (a dict) and the meta of its corpus."""
    fields = {f.name: f.type for f in dataclasses.fields(GPTConfig)}
    knobs = {k: v for k, v in config.items() if k in fields} | {"vocab_size": meta.get("vocab_size")}
    try:
        for key, value in knobs.items():
            if type(value) is not fields[key]:
                raise ValueError(f"{key} takes {fields[key].__name__}, got {value!r:.60}")
        return GPTConfig(**knobs)
    except (ValueError, TypeError, ZeroDivisionError) as e:
        raise UserError(str(e)) from None


def load_initial(path, model, corpus):
    """Put the weights of a checkpoint into a new model. Raises UserError unless it computes the same function
    of the same vocabulary: what no shape shows, such as rope_theta, is compared, too."""
    saved = read(path)
    check_vocabulary(corpus, saved["meta"], path)
    theirs = dataclasses.asdict(model_config(saved["config"], saved["meta"]))
    ours = dataclasses.asdict(model.config)
    compared = ours.keys() - {"block_size", "checkpoint_activations"}
    changed = [f"{key} {theirs[key]} -> {ours[key]}" for key in sorted(compared) if theirs[key] != ours[key]]
    if changed:
        raise UserError(
            f"{path} does not fit this model: it was trained with other settings, {', '.join(changed)}"
        )
    load_weights(model, saved["model"], path)


# ---------------------------------------------------------------------------------------- going on with a run

RESUMED = {
    "step": int,
    "stream": dict,
    "seconds": float,
    "best_val": float,
    "rng": torch.Tensor,
    "optimizer": list,
}


def resume(path, model, optimizer, c, corpus, free):
    """Put a run's last checkpoint into model and optimizer; returns the checkpoint, without them.

    c: the knobs as now given, of which those not in `free` must be the ones it was trained with, unless there
    is allow_changes. Raises UserError for other settings, another corpus, or a file that is no such
    checkpoint."""
    saved = read(path, mmap=False)  # the file will be replaced, and must not be held until then
    for key, kind in RESUMED.items():
        if type(saved.get(key)) is not kind:
            raise UserError(f"{path} cannot be resumed: its {key} is missing or no {kind.__name__}")
    if not is_state(saved["stream"]):
        raise UserError(f"{path} cannot be resumed: its stream is no place in a corpus")
    if c.n_expert and getattr(saved.get("shares"), "shape", None) != (c.n_layer, c.n_expert):
        raise UserError(f"{path} cannot be resumed: its shares of experts are missing or of another shape")
    changed = [
        f"{key} {saved['config'][key]} -> {value}"
        for key, value in dataclasses.asdict(c).items()
        if key not in free and saved["config"].get(key, value) != value
    ]
    if changed and not c.allow_changes:
        raise UserError(
            f"{path} was trained with other settings: {', '.join(changed)}; give the same ones, or "
            "--allow_changes"
        )
    check_same(corpus, saved["meta"], path)
    load_weights(model, saved.pop("model"), path)
    load_moments(optimizer, saved.pop("optimizer"), path)
    try:
        torch.set_rng_state(saved["rng"])
    except (RuntimeError, TypeError) as e:
        raise UserError(
            f"{path} cannot be resumed: its rng is not a state of torch's generator ({e})"
        ) from None
    return saved


def load_moments(optimizer, state, path):
    """Put what optimizer.state_dict() gave, its tensors whole or not yet read, into an optimizer whose parameters
    are sharded or not. Raises UserError if it is that of another one."""
    later = {}
    try:
        for i, (ours, theirs) in enumerate(zip(optimizer, state)):
            parameters = [p.detach() for group in ours.param_groups for p in group["params"]]
            numbers = [n for group in theirs["param_groups"] for n in group["params"]]
            for n, p in zip(numbers, parameters):
                kept = theirs["state"].get(n, {})
                for key, t in kept.items():
                    if not torch.is_tensor(t) or not t.dim():
                        continue
                    if t.shape != p.shape:  # it would be read beyond its end
                        raise ValueError("a moment has another shape than its parameter")
                    if t.is_meta or isinstance(p, DTensor):
                        kept[key] = torch.zeros_like(p)
                        take(kept[key], t, f".optimizer.{i}.state.{n}.{key}", later)
        read_parts(path, later)
        optimizer.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as e:
        raise UserError(f"{path} does not fit this optimizer: {' '.join(str(e).split())[:200]}") from None
