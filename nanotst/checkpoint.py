"""Checkpoints, and how a model or a run is loaded from them.

A checkpoint is a dict of tensors and plain values in a file of torch.save, last.pt or best.pt. A sharded run
keeps its sharded tensors in a folder beside it (nanotst/sharded.py). load_checkpoint returns one dict for
both, and any number of ranks, sharded or not, can resume from either."""

import dataclasses
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from model import GPT, GPTConfig
from nanotst import UserError, sharded
from nanotst.configurator import renamed
from nanotst.corpus import check_same, check_vocabulary, differing
from nanotst.files import write_safely
from nanotst.parallel import copy_part
from nanotst.sharded import map_tensors, of_all_ranks

CHANGED = "{} {} -> {}"


class Saver:
    """Writes the checkpoints of a run. All ranks call the same methods.

    Without sharding the master writes, while the other ranks wait in the next step. A sharded run waits only
    until tensors are copied to host memory; a thread of each rank writes them, over a gloo group."""

    def __init__(self, machine):
        self.machine, self.pending = machine, []
        if machine.parallel == "fsdp":
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
            self.worker = ThreadPoolExecutor(1)

    def save(self, path, state):
        """Write a dict of tensors and plain values. Raises UserError first if weights are not finite."""
        numbers = [*state["model"].values(), state.get("shares")]  # None without experts
        if not all(of_all_ranks(all_finite(numbers))):
            lost = f"the weights after step {state['step']} are not finite"
            raise UserError(f"{lost}, so {path} was not written; lower learning_rate")
        if self.machine.parallel == "fsdp":
            self.wait()
            copy = sharded.copy_to_host(state)
            self.pending.append(self.worker.submit(sharded.write_parts, path, *copy, self.group))
        elif self.machine.master:
            write_safely(path, partial(torch.save, state))
            sharded.remove_parts(path)  # of a run that was sharded when it began

    def wait(self):
        """Wait until all is written. Raises UserError, on all ranks, if a rank could not write."""
        if self.pending:
            self.pending.pop().result()


def find_checkpoint(path):
    """The path itself or, of a run's folder, its best.pt or else last.pt, which stderr names."""
    if not os.path.isdir(path):
        return path
    for name in ("best.pt", "last.pt"):
        if os.path.exists(found := os.path.join(path, name)):
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(f"using {found}", file=sys.stderr)
            return found
    raise UserError(f"{path} holds neither best.pt nor last.pt")


def load_checkpoint(path):
    """The dict that train.py saved, on the CPU, from a file or a run's folder. Raises UserError if there is
    none or a checksum is wrong. No file can run code."""
    return map_tensors(lambda name, t: t[...], read(find_checkpoint(path)))


def read(path):
    """load_checkpoint, but sharded tensors are Parts: each rank can read its own."""
    saved = sharded.load_file(path)
    keys = ("model", "config", "meta")
    if type(saved) is not dict or any(not isinstance(saved.get(key), dict) for key in keys):
        raise UserError(f"{path} is not a checkpoint of this repository")
    saved["config"] = renamed(saved["config"])
    return sharded.open_parts(path, saved) if "folder" in saved else saved


def load_model(path):
    """The model of a checkpoint, with its weights, on the CPU, and the checkpoint."""
    checkpoint = load_checkpoint(path)
    model = GPT(model_config(checkpoint["config"], checkpoint["meta"]))
    load_weights(model, checkpoint["model"], path)
    return model, checkpoint


def load_weights(model, state, path):
    """Copy the weights of the checkpoint at `path` into a model, sharded or not, or raise UserError."""
    own = model.state_dict()
    kind = lambda t: f"{t.dtype} {list(t.shape)}" if hasattr(t, "shape") else "missing"
    for name in sorted(own.keys() | state.keys(), key=str):
        theirs, ours = kind(state.get(name)), kind(own.get(name))
        if theirs != ours:
            raise UserError(f"{path} does not fit this model: {name!s:.60} is {theirs}, not {ours}")
        copy_part(own[name], state[name])


def all_finite(tensors):
    """Whether no number in the tensors, or its square, is NaN or infinite; looks at this rank's parts."""
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
    parts = [t for t in parts if t.is_floating_point() and t.numel()]
    norms = [torch.linalg.vector_norm(t, dtype=torch.float32) for t in parts]
    return not norms or all(map(math.isfinite, torch.stack(norms).tolist()))


def model_config(config, meta):
    """GPTConfig from the knobs of a run (a dict) and the meta of its corpus."""
    keys = {field.name for field in dataclasses.fields(GPTConfig)}
    knobs = config | {"vocab_size": meta.get("vocab_size")}
    try:
        return GPTConfig(**{key: value for key, value in knobs.items() if key in keys})
    except (ValueError, TypeError, ZeroDivisionError) as e:
        raise UserError(str(e)) from None


def load_initial(path, model, corpus):
    """Copy the weights of a checkpoint into a new model. Raises UserError unless it computes the same
    function of the same vocabulary: what no shape shows, such as rope_theta, is compared, too."""
    path = find_checkpoint(path)
    saved = read(path)
    check_vocabulary(corpus, saved["meta"], path)
    theirs = dataclasses.asdict(model_config(saved["config"], saved["meta"]))
    ours = dataclasses.asdict(model.config)
    keys = sorted(ours.keys() - {"block_size", "checkpoint_activations"})
    if changed := differing(ours, theirs, keys, CHANGED):
        raise UserError(f"{path} does not fit this model: its settings differ, {changed}")
    load_weights(model, saved["model"], path)


def resume(path, model, optimizer, c, corpus, free):
    """Copy the last checkpoint of a run into model and optimizer -> the checkpoint without them.

    c: the knobs as given now; those not in `free` must be the run's, unless there is allow_changes. Raises
    UserError for other settings or another corpus, or if the state cannot be loaded."""
    saved, knobs = read(path), dataclasses.asdict(c)
    theirs, keys = knobs | saved["config"], [key for key in knobs if key not in free]
    changed = differing(knobs, theirs, keys, CHANGED)  # an old run lacks new knobs
    if changed and not c.allow_changes:
        todo = "leave out knobs and config files, or give --allow_changes"
        raise UserError(f"{path} was trained with other settings: {changed}; {todo}")
    check_same(corpus, saved["meta"], path)
    load_weights(model, saved.pop("model"), path)
    try:
        load_moments(optimizer, saved.pop("optimizer"))
        torch.set_rng_state(saved["rng"])
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{path} cannot be resumed ({e!r:.200}); use another checkpoint") from None
    # copied, since torch maps the file, which will be replaced
    return map_tensors(lambda name, t: t.clone(), saved)


def load_moments(optimizer, states):
    """Load moments and counters of an optimizer's state_dict(), tensors whole or Parts, where parameters may
    be sharded. Rates, decay and betas stay as configured. Raises ValueError for another optimizer's."""
    if len(states) != len(optimizer):
        raise ValueError("the state of another optimizer")
    for ours, theirs in zip(optimizer, states):
        parameters = [p for group in ours.param_groups for p in group["params"]]
        for n, moments in theirs["state"].items():  # as state_dict() numbers them
            for key, saved in moments.items():
                # AdamW's number of steps is a scalar
                moments[key] = torch.zeros_like(parameters[n] if saved.shape else saved)
                copy_part(moments[key], saved)
        groups = zip(ours.param_groups, theirs["param_groups"])
        groups = [mine | {"params": saved["params"]} for mine, saved in groups]
        ours.load_state_dict(theirs | {"param_groups": groups})
