"""Validation loss of trained models by position in the context, and on text that they were not trained on.

A model trained on bags has seen fewer steps of ordinary text. Does it still use what is far back? This is the
loss for each amount of context, on the same rows of the validation split for all models. The token at
position p (from 0) predicts the next one from p + 1 tokens of context.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import GPT
from nanotst import UserError
from nanotst.checkpoint import find_checkpoint, load_checkpoint, load_weights, model_config
from nanotst.configurator import entry_point
from nanotst.corpus import check_vocabulary
from nanotst.kernels import use_twins
from nanotst.machine import Machine, pick_device
from nanotst.mixture import open_mixture
from nanotst.stream import validation_rows
from tools.runs import markdown_table, notes_on_differences

BLOCKS = 50  # blocks of neighbouring rows, whose means count as independent
LOGITS = 2**25  # logits computed at once
ABOUT_ERRORS = """± is one standard error; for a difference, of both sides on the same rows. It includes the
spread of seeds only for sides with several. With one seed, a difference may be no more than that spread."""


@dataclass
class Config:
    """Usage: python -m tools.evaluate CHECKPOINT [CHECKPOINT ...] [--key=value ...]

    python -m tools.evaluate out/baseline/best.pt out/tst/best.pt --by_position
    python -m tools.evaluate b1/best.pt b2/best.pt t1/best.pt t2/best.pt --labels=baseline,baseline,TST,TST
    python -m tools.evaluate out/baseline/best.pt out/tst/best.pt --dataset=english

    Checkpoints with the same label are seeds of one side, whose losses are averaged. The first side is the
    one that the others are compared with.
    """

    checkpoints: list[str]  # best.pt or last.pt, as train.py writes them
    labels: str = ""  # a label for each checkpoint, comma-separated; empty: their folders
    dataset: str = ""  # a corpus with the same vocabulary; empty: the first checkpoint's
    by_position: bool = False  # show the loss by tokens of context, too
    eval_positions: int = 2**19  # positions to evaluate, spread over the validation split
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def buckets_of(block_size):
    """[(first, last)] tokens of context, doubling: 1, 2, 3-4, 5-8 ... up to block_size."""
    ends = [1]
    while ends[-1] < block_size:
        ends.append(min(2 * ends[-1], block_size))
    return [(start + 1, end) for start, end in zip([0, *ends], ends)]


@torch.no_grad()
def position_losses(model, rows, device):
    """Next-token loss of rows (n, L+1) at each position, in float32: (n, L), nats."""
    out, length = [], rows.size(1) - 1
    for part in rows.split(max(1, LOGITS // (length * model.config.vocab_size))):
        tokens = part.to(device).long()  # (B, L+1)
        logits = model(tokens[:, :-1]).float()  # (B, L, V)
        out.append(F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").cpu())
    return torch.cat(out)


def mean_and_error(side, base=None):
    """Mean loss of a side, or its difference to a baseline, and the standard error: (K,) each.

    side, base (seeds, n, K): losses in K buckets of the same n rows. Neighbouring rows are often from one
    document, so the text's part of the error comes from the means of BLOCKS blocks. The seeds' part needs two
    seeds; a side with one adds nothing."""
    paired = side.mean(0) - (0 if base is None else base.mean(0))  # (n, K)
    parts = np.array_split(paired, min(BLOCKS, len(paired)))
    samples = [np.stack([part.mean(0) for part in parts]), side.mean(1)]  # (m, K) each
    samples += [] if base is None else [base.mean(1)]
    errors = [s.std(0, ddof=1) / math.sqrt(len(s)) for s in samples if len(s) > 1]
    return paired.mean(0), np.sqrt(np.square(errors).sum(0))


def read_checkpoints(c):
    """A dict for each: name (its path), label, saved (the checkpoint), facts (knobs and corpus as text)."""
    paths = [find_checkpoint(path) for path in c.checkpoints]
    folders = [Path(path).resolve().parent.name for path in paths]
    labels = folders if len(set(folders)) == len(folders) else paths
    labels = c.labels.split(",") if c.labels else labels
    if len(labels) != len(paths):
        raise UserError(f"--labels has {len(labels)} labels for {len(paths)} checkpoints")
    runs = [dict(name=p, label=label, saved=load_checkpoint(p)) for p, label in zip(paths, labels)]
    for run in runs:
        known = (run["saved"]["meta"] | run["saved"]["config"]).items()
        run["facts"] = {key: str(value) for key, value in known if value != ""}
    return runs


def losses_of(run, rows, device):
    """Mean loss on each row (n, L+1) by bucket and, last, over all positions: (n, K+1)."""
    shape = model_config(run["saved"]["config"], run["saved"]["meta"])
    model = GPT(replace(shape, block_size=rows.size(1) - 1))
    load_weights(model, run["saved"]["model"], run["name"])
    use_twins(model, Machine(device, "float32"))
    losses = position_losses(model.to(device).eval(), rows, device).double().numpy()  # (n, L)
    parts = [losses[:, first - 1 : last].mean(1) for first, last in buckets_of(losses.shape[1])]
    return np.stack([*parts, losses.mean(1)], axis=1)


def tables(losses, bag_sizes, buckets, bytes_per_token):
    """Markdown: the loss of each side over all positions, and by tokens of context."""

    def cell(label, i, base=None):
        loss, error = (x[i] for x in mean_and_error(losses[label], base))
        return f"{loss:{'' if base is None else '+'}.4f}" + f" ± {error:.4f}" * bool(error)

    baseline, *others = losses
    whole = [["", "seeds", "bag size", "nats per token", "bits per byte", f"minus {baseline}"]]
    for label, side in losses.items():
        bits = side[..., -1].mean() / math.log(2) / (bytes_per_token or math.nan)
        row = [label, str(len(side)), bag_sizes[label], cell(label, -1), f"{bits:.4f}"]
        whole.append([*row, cell(label, -1, losses[baseline]) if label != baseline else ""])
    parts = [["context", *losses, *(f"{label} - {baseline}" for label in others)]]
    for i, (first, last) in enumerate(buckets):
        differences = [cell(label, i, losses[baseline]) for label in others]
        context = f"{first:,}-{last:,}" if first < last else f"{first}"
        parts.append([context, *(cell(label, i) for label in losses), *differences])
    return markdown_table(whole), markdown_table(parts)


def main(c):
    device, runs = pick_device(c.device), read_checkpoints(c)
    spec = c.dataset or runs[0]["saved"]["config"]["dataset"]
    block_size = min(run["saved"]["config"]["block_size"] for run in runs)
    text, buckets = open_mixture(spec), buckets_of(block_size)
    bag_sizes = {run["label"]: run["facts"]["bag_size"] for run in runs}
    for run in runs:
        check_vocabulary(text, run["saved"]["meta"], run["name"])
    for name, corpus, _ in text.parts:  # several if the checkpoints read a mixture
        rows = validation_rows(corpus.val, c.eval_positions, block_size)  # (n, L+1)
        losses = {label: [] for label in bag_sizes}
        for run in runs:
            losses[run["label"]].append(losses_of(run, rows, device))
        losses = {label: np.stack(seeds) for label, seeds in losses.items()}
        whole, parts = tables(losses, bag_sizes, buckets, corpus.bytes_per_token)
        print(f"{name or spec}: {len(rows):,} validation rows of {block_size:,} tokens\n")
        print(f"{whole}\n" + f"\n{parts}\n" * c.by_position)
    print(ABOUT_ERRORS, *notes_on_differences(runs), sep="\n")


if __name__ == "__main__":
    entry_point(main, Config)
