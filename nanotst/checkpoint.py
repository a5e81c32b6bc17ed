"""Checkpoints: files that are whole or not there, and the way back from them to a model."""

import contextlib
import dataclasses
import os
import shutil

import torch

from configurator import fail
from model import GPT, GPTConfig


def write_safely(path, write):
    """Call write(temporary path), sync, rename: a killed process or a full disk leaves the old file as it was."""
    temporary = f"{path}.tmp"
    try:
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            os.remove(temporary)
        free = shutil.disk_usage(os.path.dirname(path) or ".").free
        fail(f"cannot write {path} ({' '.join(str(e).split())[:100]}); {free / 1e9:.1f} GB are free there. "
             "The checkpoint before it is untouched: make room and use --resume")


def load_checkpoint(path, mmap=True):
    """A checkpoint as train.py writes it, on the CPU. Only tensors and plain values are unpickled."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        fail(f"there is no checkpoint {path}")
    except Exception as e:
        fail(f"{path} is not a checkpoint of this repository ({type(e).__name__}: {' '.join(str(e).split())[:100]})")
    if not isinstance(checkpoint, dict) or not {"model", "config", "meta"} <= checkpoint.keys():
        fail(f"{path} is not a checkpoint of this repository")
    return checkpoint


def load_model(path):
    """The model of a checkpoint, with its weights, on the CPU, and the checkpoint."""
    checkpoint = load_checkpoint(path)
    model = GPT(model_config(checkpoint["config"], checkpoint["meta"]))
    model.load_state_dict(checkpoint["model"])
    return model, checkpoint


def model_config(config, meta):
    """GPTConfig from the knobs of a run (a dict) and the meta.json of its corpus."""
    fields = {f.name for f in dataclasses.fields(GPTConfig)}
    try:
        return GPTConfig(vocab_size=meta["vocab_size"], **{k: v for k, v in config.items() if k in fields})
    except ValueError as e:
        fail(e)
