"""A checker for any implementation of Token Superposition Training. See Config for what it takes.

    python -m tools.traps FILE.py --loss=NAME [--split=NAME] [--embed=NAME]

Each check prints a line: ok, a note, or what is wrong and which row of TRAPS.md explains it. A function's
later checks build on its earlier ones, so its first trap ends them. The exit status is 1 after a trap.
"""

import math
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for python tools/traps.py

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for python tools/traps.py
from nanotst import UserError
from nanotst.configurator import entry_point

B, L, N, V, C = 2, 5, 6, 97, 16


@dataclass
class Config:
    """Usage: python -m tools.traps FILE.py --loss=NAME [--split=NAME] [--embed=NAME]

    Tries the traps of TRAPS.md on your own functions; wrap them in FILE.py where they have another form.
    """

    file: str  # Python file that defines the functions
    loss: str = ""  # name of loss(logits (N, V), labels (N, s)) -> scalar
    split: str = ""  # name of split(tokens (B, s*(L+1)), s) -> bags (B, L, s), labels (B, L, s)
    embed: str = ""  # name of embed(bags (B, L, s), weight (V, C)) -> (B, L, C)


# Each check yields (what should hold, whether it does, what was found, the row of TRAPS.md).


def check_loss(loss):
    labels, log_v = distinct(4), math.log(V)
    own = weights_of(loss, labels).gather(1, labels)  # (N, s)
    yield "each label counts at its position", own.min() > 1e-3, "not so", "Bag labels flattened"
    for s in (2, 4, 8, 1):
        value = float(loss(torch.zeros(N, V), distinct(s)))
        known = {"Labels summed": s * log_v, "Divided by s twice": log_v / s}
        known["The log of the summed"] = log_v - math.log(s)
        row = next((row for row, x in known.items() if near(value, x)), "Another loss")
        yield (
            f"s = {s}: zero logits cost {log_v:.4f}, log V",
            near(value, log_v),
            f"{value:.4f}",
            row,
        )
    z, labels = torch.randn(N, V), distinct(1)
    value, right = float(loss(z, labels)), float(F.cross_entropy(z, labels[:, 0]))
    yield (
        f"s = 1 is cross-entropy, {right:.4f}",
        near(value, right),
        f"{value:.4f}",
        "s = 1 is a second",
    )
    labels = distinct(4)
    right = weights_of(loss, labels).gather(1, labels)[0, :2].sum()
    labels[:, 1] = labels[:, 0]
    value, what = weights_of(loss, labels)[0, labels[0, 0]], "a label twice in a bag has weight"
    yield f"{what} {right:.3f}", near(value, right), f"{value:.3f}", "Labels as a set"
    z, labels = torch.randn(N, V), distinct(3)
    own = weights_of(loss, labels).gather(1, labels).mean(0)  # (3,)
    right = sum(own[i] * F.cross_entropy(z[: N - i], labels[: N - i, i]) for i in (0, 1))
    labels[N - 1, 1], labels[:, 2] = -100, -100
    try:
        value, what = float(loss(z, labels)), "ignored labels leave the paper's loop,"
        yield f"{what} {right:.4f}", near(value, right), f"{value:.4f}", "Ignored labels averaged"
    except (IndexError, RuntimeError, ValueError):
        print(
            "note  ignored labels (-100) are not supported; only padding and document bags need them"
        )


def check_split(split):
    for s in (1, 2, 4):
        tokens = torch.arange(B * s * (L + 1)).view(B, -1)
        bags, labels = split(tokens, s)
        found, right = (tuple(bags.shape), tuple(labels.shape)), (B, L, s)
        yield (
            f"s = {s}: two shapes {right}",
            found == (right, right),
            found,
            "Keeping the data budget",
        )
        shared = int((bags[..., None] == labels[..., None, :]).any(-1).sum(-1).max())
        yield (
            f"s = {s}: a bag holds none of its labels",
            shared == 0,
            f"{shared} of {s}",
            "The target is",
        )
        right = (bags == tokens[:, :-s].view(B, L, s)).all()
        right &= (labels.sort(-1).values == tokens[:, s:].view(B, L, s)).all()
        yield (
            f"s = {s}: bags, labels follow each other",
            right,
            "tokens lost or repeated",
            "The loader",
        )


def check_embed(embed):
    weight, bags = torch.randn(V, C), torch.arange(B * 30).view(B, 30, 1)
    right = weight[bags[..., 0]]  # (B, 30, C)
    yield (
        "s = 1 is a look-up",
        torch.equal(embed(bags, weight), right),
        "not so",
        "s = 1 is a second",
    )
    for s in (2, 4, 16):
        x, what = (
            embed(bags.repeat(1, 1, s), weight),
            f"{s} identical tokens are 1 times that token",
        )
        times = f"{(x * right).sum() / right.square().sum():.3f} times"
        yield what, torch.allclose(x, right, atol=1e-5), times, "The sum of embeddings"
    bags, weight = torch.randint(V, (B, 30, 32)), torch.randn(V, C).bfloat16()
    exact = weight.double()[bags].mean(-2)  # (B, 30, C)
    right = torch.allclose(embed(bags, weight.float()).double(), exact, atol=1e-5)
    yield "other tokens give their mean", right, "something else", "The sum of embeddings"
    off = float(((embed(bags, weight).double() - exact).abs() / exact.abs()).max() * 2**8)
    yield "a bfloat16 table is rounded once", off < 1.01, f"{off:.0f} times", "The mean in bfloat16"


def distinct(s):
    """Labels (N, s) that are all different."""
    return torch.randperm(V)[: N * s].view(N, s)


def weights_of(loss, labels):
    """The weight that a loss puts on each word at each position, from its gradient: (N, V)."""
    z = torch.randn(N, V, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(z, labels), z)
    return z.detach().softmax(-1) - N * gradient


def near(a, b):
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4)


def check(**functions):
    """Try the functions, any of loss=, split= and embed=, and print a line for each check. Returns whether
    all hold."""
    torch.manual_seed(0)
    checks, trapped = {"loss": check_loss, "split": check_split, "embed": check_embed}, False
    for kind, function in functions.items():
        for what, right, found, row in checks[kind](function):
            print(
                f"ok    {what}" if right else f"TRAP  {what}; yours: {found}. TRAPS.md: {row} ..."
            )
            if not right:
                trapped = True
                break
    return not trapped


def main(config):
    path = Path(config.file)
    names = {k: getattr(config, k) for k in ("loss", "split", "embed") if getattr(config, k)}
    if not path.is_file() or not names:
        raise UserError(f"{path} is not a file, or --loss=, --split= and --embed= are missing")
    sys.path.insert(0, str(path.parent))  # for what the file imports
    there = runpy.run_path(str(path))
    if missing := [name for name in names.values() if name not in there]:
        raise UserError(f"{path} has no function {missing[0]}")
    if not check(**{kind: there[name] for kind, name in names.items()}):
        sys.exit(1)


if __name__ == "__main__":
    entry_point(main, Config)
