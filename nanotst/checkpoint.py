"""Checkpoints, and the way back from them to a model or a run.

    last.pt   of a run that is not sharded: one file of torch.save, a dict
    last.dcp  of a sharded one: a folder, see nanotst/sharded.py

Both are whole or not there, load_checkpoint gives the same dict for both, and any number of ranks, sharded or
not, can go on from either."""

import contextlib
import dataclasses
import math
import os
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from model import GPT, GPTConfig
from nanotst import UserError
from nanotst.corpus import check_same, check_vocabulary
from nanotst.files import write_safely
from nanotst.parallel import copy_part
from nanotst.sharded import (
    MANIFEST,
    copy_to_host,
    map_tensors,
    of_all_ranks,
    open_folder,
    read_parts,
    write_folder,
)
from nanotst.stream import is_state

# ----------------------------------------------------------------------------------------------------- saving


class Saver:
    """Writes a run's checkpoints. All ranks call the same methods.

    A file is written by the master, for which the others wait in the next step. A folder holds training up
    only until all is copied to host memory; a thread of each rank writes the copy while training goes on.
    This is dcp.async_save by hand, since the manifest has to follow the files. It is sound because the
    threads talk over a gloo group of their own, never over the group that training uses, and because before
    the checkpoint of another step is begun, and at the end, wait() has seen the one before it succeed."""

    def __init__(self, machine):
        self.machine, self.pending, self.step = machine, [], None
        if machine.parallel == "fsdp":
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
            self.worker = ThreadPoolExecutor(1)

    def save(self, path, state):
        """Write a dict of tensors and plain values that load_checkpoint reads. Raises UserError, and leaves
        the old checkpoint, for weights that are not finite."""
        if not all(of_all_ranks(all_finite(state["model"].values()))):
            lost = f"the weights after step {state['step']} are not finite"
            raise UserError(f"{lost}; {path} was not written, lower learning_rate")
        if self.machine.parallel == "fsdp":
            if (
                self.step != state["step"]
            ):  # best and last of one step may wait for the thread together
                self.wait()
            self.step = state["step"]
            self.pending.append(self.worker.submit(self._write, path, *copy_to_host(state)))
        elif self.machine.master:
            write_safely(path, lambda temporary: save_file(temporary, state))
            self._drop_other_form(path)

    def wait(self):
        """Until all is written. Raises UserError, on all ranks, if something could not be."""
        pending, self.pending = self.pending, []
        for future in pending:
            future.result()

    def _write(self, path, state, parts):
        write_folder(path, state, parts, self.group)
        self._drop_other_form(path)

    def _drop_other_form(self, path):
        """A run that was sharded before and is not now, or the other way round, keeps one checkpoint, not
        two."""
        for other in forms(path):
            if other != path and self.machine.master:
                remove(other)


def save_file(path, state):
    with open(path, "wb") as f:  # through a file of ours, errors keep their errno
        torch.save(state, f)


def forms(path):
    """The file and the folder that a checkpoint may be: last.pt, last.dcp."""
    stem = os.path.splitext(path)[0]
    return f"{stem}.pt", f"{stem}.dcp"


def exists(path):
    return os.path.exists(os.path.join(path, MANIFEST) if path.endswith(".dcp") else path)


def remove(path):
    """Remove a checkpoint of either form, if it is there. Without its manifest a folder is none any more."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(path, MANIFEST) if os.path.isdir(path) else path)
    shutil.rmtree(path, ignore_errors=True)


def newest(path):
    """The form in which a checkpoint is there, None if in neither. If a run was killed before it could remove
    the other one, that of the later step."""
    there = [form for form in forms(path) if exists(form)]
    if len(there) > 1:
        return max(there, key=lambda form: read(form, verify=False)["step"])
    return there[0] if there else None


# ---------------------------------------------------------------------------------------------------- loading


def find_checkpoint(path):
    """The path itself, or best.pt or else last.pt in it if it is a run's folder, which stderr then says."""
    if not os.path.isdir(path) or path.endswith(".dcp"):
        return path
    for name in ("best.pt", "last.pt"):
        if os.path.exists(found := os.path.join(path, name)):
            print(f"using {found}", file=sys.stderr)
            return found
    raise UserError(f"{path} holds neither best.pt nor last.pt")


def load_checkpoint(path, mmap=True):
    """A checkpoint as train.py writes it, a file or a folder, on the CPU, its checksums verified. Only
    tensors and plain values are unpickled. Raises UserError for one that is missing, damaged or something
    else."""
    saved, wanted = read(path, mmap), {}

    def room(key, t):
        if not t.is_meta:
            return t
        return wanted.setdefault(key, torch.empty(t.shape, dtype=t.dtype))

    saved = map_tensors(room, saved)
    read_parts(path, wanted)
    return saved


def read(path, mmap=True, verify=True):
    """A checkpoint whose sharded tensors, if it has any, are still on the meta device, for read_parts."""
    try:
        folder = os.path.isdir(path)
        file = os.path.join(open_folder(path, verify), "state.pt") if folder else path
        if verify and not folder:
            with zipfile.ZipFile(path) as z:
                damaged = z.testzip()  # reads all of it: torch itself does not check the sums
            if damaged:
                raise UserError(
                    f"{path} is damaged: the checksum of {damaged} is wrong; use another checkpoint"
                )
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except UserError:
        raise
    except Exception as e:
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:100]}"
        raise UserError(
            f"{path} is not a checkpoint of this repository, or is damaged ({reason})"
        ) from None
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(k), dict) for k in ("model", "config", "meta")
    ):
        raise UserError(f"{path} is not a checkpoint of this repository")
    return checkpoint


def load_model(path):
    """The model of a checkpoint, with its weights, on the CPU, and the checkpoint."""
    checkpoint = load_checkpoint(path)
    model = GPT(model_config(checkpoint["config"], checkpoint["meta"]))
    load_weights(model, checkpoint["model"], path)
    return model, checkpoint


def load_weights(model, state, path):
    """Put the weights of a checkpoint, whole or not yet read, into a model, sharded or not. Raises UserError
    if they are others, or not finite."""
    own, later = model.state_dict(), {}
    kinds = [{name: describe_tensor(t) for name, t in x.items()} for x in (state, own)]
    if wrong := [name for name in kinds[0] | kinds[1] if kinds[0].get(name) != kinds[1].get(name)]:
        name = min(wrong, key=str)
        there, here = (x.get(name, "missing") for x in kinds)
        raise UserError(
            f"{path} does not fit this model: its {name!s:.60} is {there}, the model's {here}"
        )
    for name, t in own.items():
        take(t, state[name], f".model.{name}", later)
    read_parts(path, later)
    if not all(of_all_ranks(all_finite(model.state_dict().values()))):
        raise UserError(f"the weights in {path} are not finite; use another checkpoint")


def describe_tensor(t):
    """Dtype and shape in words."""
    return (
        f"{t.dtype} {list(t.shape)}".removeprefix("torch.")
        if torch.is_tensor(t)
        else type(t).__name__
    )


def take(mine, saved, key, later):
    """Fill a tensor of ours with a saved one, now or, if that is not yet read, with the others in `later`."""
    if saved.is_meta:
        later[key] = mine
    else:
        copy_part(mine, saved)


def all_finite(tensors):
    """Whether no number in the tensors is NaN or infinite, or its square is, as of weights that ran away; of
    sharded ones, in the parts of this rank."""
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    norms = [
        torch.linalg.vector_norm(t, dtype=torch.float32)
        for t in parts
        if t.is_floating_point() and t.numel()
    ]
    return all(map(math.isfinite, torch.stack(norms).tolist())) if norms else True


def model_config(config, meta):
    """GPTConfig from the knobs of a run (a dict) and the meta of its corpus."""
    fields = {f.name: f.type for f in dataclasses.fields(GPTConfig)}
    knobs = {k: v for k, v in config.items() if k in fields} | {
        "vocab_size": meta.get("vocab_size")
    }
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
    changed = [
        f"{key} {theirs[key]} -> {ours[key]}"
        for key in sorted(compared)
        if theirs[key] != ours[key]
    ]
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
    last = saved["config"].get("max_steps")
    in_range = type(last) is int and 0 < saved["step"] <= last and 0 <= saved["seconds"] < math.inf
    if not in_range or math.isnan(saved["best_val"]):
        raise UserError(f"{path} cannot be resumed: its step, seconds or best_val is out of range")
    if not is_state(saved["stream"]):
        raise UserError(f"{path} cannot be resumed: its stream is no place in a corpus")
    shares = saved.get("shares")
    if c.n_expert and (
        getattr(shares, "shape", None) != (c.n_layer, c.n_expert) or not all_finite([shares])
    ):
        raise UserError(
            f"{path} cannot be resumed: its shares of experts are missing, not finite, or others"
        )
    if "z_coef" in saved["config"]:  # its name until November 2026
        saved["config"]["router_z_coef"] = saved["config"].pop("z_coef")
    changed = [
        f"{key} {saved['config'][key]} -> {value}"
        for key, value in dataclasses.asdict(c).items()
        if key not in free and saved["config"].get(key, value) != value
    ]
    if changed and not c.allow_changes:
        raise UserError(
            f"{path} was trained with other settings: {', '.join(changed)}; leave them and config files out, "
            "--resume knows the run's own, or give --allow_changes"
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
    """Put what optimizer.state_dict() gave, its tensors whole or not yet read, into an optimizer whose
    parameters are sharded or not. Raises UserError if it is that of another one."""
    later = {}
    try:
        for i, (ours, theirs) in enumerate(zip(optimizer, state)):
            parameters = [p.detach() for group in ours.param_groups for p in group["params"]]
            numbers = [n for group in theirs["param_groups"] for n in group["params"]]
            for n, p in zip(numbers, parameters):
                kept = theirs["state"].get(n, {})
                for key, t in kept.items():
                    if not torch.is_tensor(t) or not t.is_floating_point():
                        raise TypeError(f"{key} is no tensor of floating-point numbers")
                    if not t.dim():
                        continue
                    if t.shape != p.shape:  # it would be read beyond its end
                        raise ValueError("a moment has another shape than its parameter")
                    if t.is_meta or isinstance(p, DTensor):
                        kept[key] = torch.zeros_like(p)
                        take(kept[key], t, f".optimizer.{i}.state.{n}.{key}", later)
        read_parts(path, later)
        optimizer.load_state_dict(state)
        kept = [t for one in optimizer for states in one.state.values() for t in states.values()]
        kept = [t.to_local() if isinstance(t, DTensor) else t for t in kept]
        if not all(of_all_ranks(all(bool(t.isfinite().all()) for t in kept))):
            raise ValueError("a moment is not finite")
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as e:
        raise UserError(
            f"{path} does not fit this optimizer: {' '.join(str(e).split())[:200]}"
        ) from None
