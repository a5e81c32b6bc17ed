"""Optimizers over a model's parameters, and the schedule of their rates.

To add an optimizer, write a function that returns a list of torch optimizers, and name it in OPTIMIZERS. Each
group of parameters has its own rate, group["initial_lr"]; the schedule multiplies all of them.
"""

import math

import torch
from torch.distributed.tensor import DTensor

from nanotst import UserError


class Optimizers(list):
    """Several torch optimizers as one, each for some of the parameters."""

    keep_gradients = False  # zero them in place; otherwise they are freed

    @property
    def param_groups(self):
        return [group for optimizer in self for group in optimizer.param_groups]

    def step(self):
        for optimizer in self:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self:
            optimizer.zero_grad(set_to_none=not self.keep_gradients)

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self]


def adamw(model, c, device_type, without=None):
    """Fused AdamW for all parameters except one kind, `without`. Norms and other scales don't decay."""
    kinds = {p: init.kind for _, p, init in model.inits() if init.kind != without}
    scales = [p for p, kind in kinds.items() if kind == "scale"]
    others = [p for p, kind in kinds.items() if kind != "scale"]
    groups = [{"params": others}, {"params": scales, "weight_decay": 0.0}]
    how = dict(weight_decay=c.weight_decay, fused=device_type in ("cpu", "cuda"))
    return [torch.optim.AdamW(groups, c.learning_rate, (c.beta1, c.beta2), **how)]


def muon(model, c, device_type):
    """Muon (Jordan et al. 2024) for matrices, AdamW for embedding, head, scales, routers and experts. Muon's
    steps are scaled to the size of AdamW's (arXiv 2502.16982), so one learning_rate serves both, unless
    matrix_learning_rate gives Muon its own."""
    matrices = [p for _, p, init in model.inits() if init.kind == "matrix"]
    if any(isinstance(p, DTensor) for p in matrices):  # it would gather them for every product
        raise UserError("optimizer=muon needs whole matrices, so parallel=ddp, not fsdp")
    how = dict(lr=c.matrix_learning_rate or c.learning_rate, weight_decay=c.weight_decay)
    how |= dict(momentum=c.beta2, adjust_lr_fn="match_rms_adamw")
    return [torch.optim.Muon(matrices, **how), *adamw(model, c, device_type, without="matrix")]


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def make_optimizer(model, c, device_type):
    """The optimizer named by the knobs, for all parameters of the model."""
    optimizers = Optimizers(OPTIMIZERS[c.optimizer](model, c, device_type))
    if c.compile == "graphs":  # CUDA graphs add to the gradients where these lie
        optimizers.keep_gradients = True
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    for group in optimizers.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizers


def set_rates(optimizer, multiplier):
    """Set each group's rate to its own times the multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


SCHEDULES = ("wsd", "cosine")


def rate_multiplier(step, c):
    """Multiplier of all rates in step number `step` (from 0) of c.max_steps, whatever the phase: warmup, then
    constant with a linear end (wsd, as in the paper) or half a cosine."""
    if step < c.warmup_steps:
        return (step + 1) / c.warmup_steps
    if c.schedule == "cosine":
        angle = math.pi * (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
        left = 0.5 + 0.5 * math.cos(angle)
    else:
        left = min(1.0, (c.max_steps - step) / max(1, round(c.decay_ratio * c.max_steps)))
    return c.min_lr_ratio + (1 - c.min_lr_ratio) * left
