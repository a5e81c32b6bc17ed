"""Optimizers over a model's parameters, and the schedule of their rates.

To add one: a function in OPTIMIZERS, which makes it from the model and the knobs. Each group of parameters
has its own rate, group["initial_lr"]; the schedule is a multiplier on all of them.
"""

import math

import torch
from torch.distributed.tensor import DTensor

from nanotst import UserError


class Optimizers(list):
    """Several torch optimizers as one, each for some of the parameters."""

    @property
    def param_groups(self):
        return [group for optimizer in self for group in optimizer.param_groups]

    def step(self):
        for optimizer in self:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self:
            optimizer.zero_grad()

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self]

    def forget(self):
        """Drop all moments and counters."""
        for optimizer in self:
            optimizer.state.clear()

    def load_state_dict(self, state):
        """Moments and counters of state_dict(); rates, decay and betas stay as configured. Raises ValueError
        or KeyError for the state of another optimizer."""
        if not isinstance(state, list) or len(state) != len(self):
            raise ValueError("the state of another optimizer")
        for optimizer, saved in zip(self, state):
            settings = [
                {k: v for k, v in group.items() if k != "params"}
                for group in optimizer.param_groups
            ]
            optimizer.load_state_dict(saved)
            for group, now in zip(optimizer.param_groups, settings):
                group.update(now)


def adamw(parameters, c, device_type):
    """AdamW, fused; weight decay for matrices, not for norms."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device_type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=fused)


def all_adamw(model, c, device_type):
    return [adamw(list(model.parameters()), c, device_type)]


def muon(model, c, device_type):
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for the rest: embedding, head, norms,
    routers, and the stacked weights of experts. Muon's steps are scaled to the size of AdamW's (arXiv
    2502.16982), so that one learning_rate serves both, unless matrix_learning_rate gives Muon its own."""
    named = dict(model.blocks.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() == 2 and "router" not in name]
    if any(
        isinstance(p, DTensor) for p in matrices
    ):  # each of its products would be a gathering of its own
        raise UserError(
            "optimizer=muon works on whole matrices, and parallel=fsdp has parts: use adamw, or ddp"
        )
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices,
            lr=c.matrix_learning_rate or c.learning_rate,
            weight_decay=c.weight_decay,
            momentum=c.beta2,
            adjust_lr_fn="match_rms_adamw",
        ),
        adamw(others, c, device_type),
    ]


OPTIMIZERS = {"adamw": all_adamw, "muon": muon}
SCHEDULES = ("wsd", "cosine")


def make_optimizer(model, c, device_type):
    """The optimizer that the knobs name, for all parameters of the model."""
    optimizers = Optimizers(OPTIMIZERS[c.optimizer](model, c, device_type))
    for group in optimizers.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizers


def set_rates(optimizer, multiplier):
    """Set the rate of each group to its own times the multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


def rate_multiplier(step, c):
    """What each rate is multiplied by in step number `step` (from 0) of c.max_steps, the same in all phases:
    warmup, then constant with a linear end (wsd, as in the paper) or half a cosine."""
    if step < c.warmup_steps:
        return (step + 1) / c.warmup_steps
    if c.schedule == "cosine":
        left = 0.5 + 0.5 * math.cos(
            math.pi * (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
        )
    else:
        left = min(1.0, (c.max_steps - step) / max(1, round(c.decay_ratio * c.max_steps)))
    return c.min_lr_ratio + (1 - c.min_lr_ratio) * left
