"""A checker for any implementation of Token Superposition Training.

Each check prints a line: ok, a note, or what is wrong and which row of TRAPS.md explains it. The first trap
of a function ends its checks, since they build on each other. The exit status is 1 after a trap.
"""

import math
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from nanotst import UserError
from nanotst.configurator import entry_point

B, L, N, V, C = 2, 5, 6, 97, 16


@dataclass
class Config:
    """Usage: python -m tools.traps FILE.py --loss=NAME [--split=NAME] [--embed=NAME]

    Tries the traps of TRAPS.md on your own functions; wrap them in FILE.py if their signatures differ.
    """

    file: str  # Python file that defines the functions
    loss: str = ""  # name of loss(logits (N, V), labels (N, s)) -> scalar
    split: str = ""  # name of split(tokens (B, s*(L+1)), s) -> bags (B, L, s), labels (B, L, s)
    embed: str = ""  # name of embed(bags (B, L, s), weight (V, C)) -> (B, L, C)


# Each check yields (what should hold, whether it does, what was found, the row of TRAPS.md).


def check_loss(loss):
    labels, log_v = distinct(4), math.log(V)
    own = weights_of(loss, labels).gather(1, labels)  # (N, 4)
    yield "each label counts at its position", own.min() > 1e-3, "not so", "Bag labels flattened"
    for s in (2, 4, 8, 1):
        value = float(loss(torch.zeros(N, V), distinct(s)))
        known = {"Labels summed": s * log_v, "Divided by s twice": log_v / s}
        known["The log of the summed"] = log_v - math.log(s)
        rows = [row for row, x in known.items() if math.isclose(value, x, rel_tol=1e-3)]
        yield numbers(f"s = {s}: zero logits cost log V,", value, log_v, [*rows, "Another loss"][0])
    z, one = torch.randn(N, V), distinct(1)
    right = F.cross_entropy(z, one[:, 0])
    yield numbers("s = 1 is cross-entropy,", loss(z, one), right, "s = 1 is a second")
    labels[:, 1] = labels[:, 0]
    value = weights_of(loss, labels)[0, labels[0, 0]]
    yield numbers("a label twice in a bag has weight", value, own[0, :2].sum(), "Labels as a set")
    labels = distinct(3)
    own = weights_of(loss, labels).gather(1, labels).mean(0)  # (3,)
    right = sum(own[i] * F.cross_entropy(z[: N - i], labels[: N - i, i]) for i in (0, 1))
    labels[N - 1, 1], labels[:, 2] = -100, -100
    try:
        value, what = loss(z, labels), "ignored labels leave the paper's loop,"
        yield numbers(what, value, right, "Ignored labels averaged")
    except (IndexError, RuntimeError, ValueError):
        print("note  ignored labels (-100) are not supported; padding and document bags need them")


def check_split(split):
    for s in (1, 2, 4):
        tokens, shape = torch.arange(B * s * (L + 1)).view(B, -1), (B, L, s)
        bags, labels = split(tokens, s)
        found = tuple(bags.shape), tuple(labels.shape)
        yield f"s = {s}: two shapes {shape}", found == (shape, shape), found, "Keeping the data"
        shared = int((bags[..., None] == labels[..., None, :]).any(-1).sum(-1).max())
        yield f"s = {s}: a bag holds no label", shared == 0, f"{shared} of {s}", "The target is"
        right = torch.equal(bags, tokens[:, :-s].view(shape))
        right &= torch.equal(labels.sort(-1).values, tokens[:, s:].view(shape))
        yield f"s = {s}: no token is lost or repeated", right, "some are", "The loader"


def check_embed(embed):
    weight, bags = torch.randn(V, C), torch.arange(B * 30).view(B, 30, 1)
    token = weight[bags[..., 0]]  # (B, 30, C)
    for s in (1, 2, 4, 16):
        x, what = embed(bags.repeat(1, 1, s), weight), f"a bag with a token {s} times is that token"
        found = f"{(x * token).sum() / token.square().sum():.3f} times the token"
        yield what, torch.allclose(x, token, atol=1e-5), found, "The sum of embeddings"
    bags, weight = torch.randint(V, (B, 30, 32)), torch.randn(V, C).bfloat16()
    exact = weight.double()[bags].mean(-2)  # (B, 30, C)
    right = torch.allclose(embed(bags, weight.float()).double(), exact, atol=1e-5)
    yield "other tokens give their mean", right, "something else", "The sum of embeddings"
    off = float(((embed(bags, weight).double() - exact).abs() / exact.abs()).max() * 2**8)
    yield "a bfloat16 table is rounded once", off < 1.01, f"{off:.0f} times", "The mean in bfloat16"


def numbers(what, value, right, row):
    """A check that a number is right."""
    right, value = float(right), float(value)
    return f"{what} {right:.4f}", math.isclose(value, right, rel_tol=1e-3), f"{value:.4f}", row


def distinct(s):
    """Labels (N, s) that are all different."""
    return torch.randperm(V)[: N * s].view(N, s)


def weights_of(loss, labels):
    """The weight that a loss puts on each word at each position, from its gradient: (N, V)."""
    z = torch.randn(N, V, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(z, labels), z)
    return z.detach().softmax(-1) - N * gradient


CHECKS = {"loss": check_loss, "split": check_split, "embed": check_embed}


def check(**functions):
    """Try the functions, any of loss=, split= and embed=, and print a line for each check. Returns whether
    all hold."""
    torch.manual_seed(0)
    all_hold = True
    for kind, function in functions.items():
        for what, right, found, row in CHECKS[kind](function):
            if not right:
                print(f"TRAP  {what}; yours: {found}. TRAPS.md: {row} ...")
                all_hold = False
                break
            print(f"ok    {what}")
    return all_hold


def main(c):
    path, names = Path(c.file), {kind: getattr(c, kind) for kind in CHECKS if getattr(c, kind)}
    if not path.is_file() or not names:
        raise UserError(f"{path} is not a file, or --loss=, --split= and --embed= are missing")
    sys.path.insert(0, str(path.parent))  # for what the file imports
    there = runpy.run_path(str(path))
    if missing := names.values() - there.keys():
        raise UserError(f"{path} has no function {min(missing)}")
    sys.exit(int(not check(**{kind: there[name] for kind, name in names.items()})))


if __name__ == "__main__":
    entry_point(main, Config)
