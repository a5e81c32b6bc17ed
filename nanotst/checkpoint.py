"""Checkpoints: files that are whole or not there, and the way back from them to a model or a run."""

import contextlib
import dataclasses
import errno
import math
import os
import shutil
import zipfile

import torch

from model import GPT, GPTConfig
from nanotst import UserError
from nanotst.corpus import check_same, check_vocabulary
from nanotst.stream import is_state


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
        free = shutil.disk_usage(os.path.dirname(path) or ".").free
        full = getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or not isinstance(
            e, OSError
        )
        reason = f"the disk is full, or nearly ({free / 1e9:.1f} GB are free)" if full else e.strerror or e
        kept = "; the one before it is untouched" if os.path.exists(path) else ""
        todo = ": make room and use --resume" if full and kept else ": make room" if full else ""
        raise UserError(f"cannot write {path}: {reason}{kept}{todo}") from None


def sync_folder(folder):
    """Have the names in a folder reach the disk, after the files they name."""
    if os.name == "posix":  # Windows cannot open a folder
        fd = os.open(folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values that load_checkpoint reads. Raises UserError, and leaves the
    old file, for weights that are not finite."""
    if not all_finite(state["model"].values()):
        raise UserError(f"the weights after step {state['step']} are not finite; {path} was not written")

    def write(temporary):
        with open(temporary, "wb") as f:  # through a file of ours, errors keep their errno
            torch.save(state, f)

    write_safely(path, write)


def load_checkpoint(path, mmap=True):
    """A checkpoint as train.py writes it, on the CPU, its checksums verified. Only tensors and plain values
    are unpickled. Raises UserError for a file that is missing, damaged or something else."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # reads all of it: torch itself does not check the sums
        if damaged:
            raise UserError(f"{path} is damaged: the checksum of {damaged} is wrong; use another checkpoint")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
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


def load_model(path):
    """The model of a checkpoint, with its weights, on the CPU, and the checkpoint."""
    checkpoint = load_checkpoint(path)
    model = GPT(model_config(checkpoint["config"], checkpoint["meta"]))
    load_weights(model, checkpoint["model"], path)
    return model, checkpoint


def load_weights(model, state, path):
    """Put the weights of a checkpoint into a model. Raises UserError if they are others, or not finite."""
    try:
        for name, t in state.items():
            if not t.is_floating_point():  # it would be cast
                raise TypeError(f"{name} is of {t.dtype}")
        model.load_state_dict(state)
    except (RuntimeError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{path} does not fit this model: {' '.join(str(e).split())[:200]}") from None
    if not all_finite(model.state_dict().values()):
        raise UserError(f"the weights in {path} are not finite; use another checkpoint")


def all_finite(tensors):
    """Whether no number in the tensors is NaN or infinite, or its square is, as of weights that ran away."""
    norms = [
        torch.linalg.vector_norm(t, dtype=torch.float32)
        for t in tensors
        if t.is_floating_point() and t.numel()
    ]
    return all(map(math.isfinite, torch.stack(norms).tolist())) if norms else True


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
    saved = load_checkpoint(path)
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
    saved = load_checkpoint(path, mmap=False)  # the file will be replaced, and must not be held until then
    for key, kind in RESUMED.items():
        if type(saved.get(key)) is not kind:
            raise UserError(f"{path} cannot be resumed: its {key} is missing or no {kind.__name__}")
    times = saved["step"], saved["seconds"]
    if not all(0 <= t < 2**48 for t in times) or math.isnan(saved["best_val"]):
        raise UserError(f"{path} cannot be resumed: its step, seconds or best_val is out of range")
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
    try:
        optimizer.load_state_dict(saved.pop("optimizer"))
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as e:
        raise UserError(f"{path} does not fit this optimizer: {' '.join(str(e).split())[:200]}") from None
    if any(t.dim() and t.shape != p.shape for p, t in optimizer.moments()):  # it would be read beyond its end
        raise UserError(f"{path} does not fit this optimizer: a moment has another shape than its parameter")
    try:
        torch.set_rng_state(saved["rng"])
    except (RuntimeError, TypeError) as e:
        raise UserError(
            f"{path} cannot be resumed: its rng is not a state of torch's generator ({e})"
        ) from None
    return saved
