"""Validation loss of trained models by position in the context, and on text that they were not trained on.

A model trained on bags has seen fewer steps of ordinary text. Does it still use what is far back? This is the
loss for each amount of context, on the same rows of the validation split for all models. The token at
position p (from 0) predicts the next one from p + 1 tokens of context.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nanotst import UserError
from nanotst.checkpoint import load_model
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

    python -m tools.evaluate out/baseline/best.pt out/tst/best.pt --by_position --dataset=english
    python -m tools.evaluate b1/best.pt b2/best.pt t1/best.pt t2/best.pt --labels=baseline,baseline,TST,TST

    Checkpoints with the same label are seeds of one side, whose losses are averaged. The others are compared
    with the first side."""

    checkpoints: list[str]  # best.pt or last.pt, as train.py writes them
    labels: str = ""  # a label for each checkpoint, comma-separated; empty: names of their folders
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


def losses_of(model, rows, device):
    """Next-token loss, nats, on each row (n, L+1) by bucket and, last, over all positions: (n, K+1)."""
    model.to(device).eval()
    use_twins(model, Machine(device, "float32"))
    losses, length = [], rows.size(1) - 1
    for part in rows.split(max(1, LOGITS // (length * model.config.vocab_size))):
        tokens = part.to(device).long()  # (B, L+1)
        with torch.no_grad():
            logits = model(tokens[:, :-1]).float()  # (B, L, V)
        loss = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        losses.append(loss.cpu().double().numpy())
    model.cpu()  # room for the next one
    losses = np.concatenate(losses)  # (n, L)
    parts = [losses[:, first - 1 : last].mean(1) for first, last in buckets_of(length)]
    return np.stack([*parts, losses.mean(1)], axis=1)


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


def table_of(losses, bag_sizes, names, bytes_per_token):
    """Markdown, a column for each side and each difference. losses: {label: (seeds, n, K)}, names: (K,)."""
    baseline, *others = losses
    columns = [["nats per token", "seeds", "bag size", *names, "bits per byte"]]

    def cells(sign, *sides):
        pairs = zip(*mean_and_error(*sides))
        return [f"{loss:{sign}.4f}" + f" ± {error:.4f}" * bool(error) for loss, error in pairs]

    for label, side in losses.items():
        bits = side[..., -1].mean() / math.log(2) / (bytes_per_token or math.nan)
        columns.append([label, str(len(side)), bag_sizes[label], *cells("", side), f"{bits:.4f}"])
    for label in others:
        differences = cells("+", losses[label], losses[baseline])
        columns.append([f"{label} - {baseline}", "", "", *differences, ""])
    return markdown_table(list(zip(*columns)))


def main(c):
    paths, runs = [Path(path).resolve() for path in c.checkpoints], []
    labels = [(path if path.is_dir() else path.parent).name for path in paths]
    if c.labels or len(set(labels)) < len(labels):
        labels = c.labels.split(",") if c.labels else c.checkpoints
    if len(labels) != len(c.checkpoints):
        raise UserError(f"--labels has {len(labels)} labels for {len(c.checkpoints)} checkpoints")
    for path, label in zip(c.checkpoints, labels):
        model, saved = load_model(path)
        facts = {k: str(v) for k, v in (saved["meta"] | saved["config"]).items() if v != ""}
        runs.append(dict(path=path, label=label, model=model, meta=saved["meta"], facts=facts))
    spec, device = c.dataset or runs[0]["facts"]["dataset"], pick_device(c.device)
    block_size = min(run["model"].config.block_size for run in runs)
    text, buckets = open_mixture(spec), buckets_of(block_size)
    span = lambda first, last: f"{first:,}-{last:,}" if first < last else f"{first}"
    names = [f"context {span(*bucket)}" for bucket in buckets] + ["all positions"]
    names = names if c.by_position else names[-1:]
    bag_sizes = {run["label"]: run["facts"]["bag_size"] for run in runs}
    for run in runs:
        check_vocabulary(text, run["meta"], run["path"])
    for name, corpus, _ in text.parts:  # several if the checkpoints read a mixture
        rows = validation_rows(corpus.val, c.eval_positions, block_size)  # (n, L+1)
        losses = {label: [] for label in bag_sizes}
        for run in runs:
            found = losses_of(run["model"], rows, device)  # (n, K)
            losses[run["label"]].append(found[:, -len(names) :])
        losses = {label: np.stack(seeds) for label, seeds in losses.items()}
        print(f"{name or spec}: {len(rows):,} validation rows of {block_size:,} tokens\n")
        print(table_of(losses, bag_sizes, names, corpus.bytes_per_token), end="\n\n")
    print(ABOUT_ERRORS, *notes_on_differences(runs), sep="\n")


if __name__ == "__main__":
    entry_point(main, Config)
