"""Validation loss of trained models by position in the context, and on text that they were not trained on.

One number hides where a model is good. A model trained on bags has seen fewer steps of ordinary text, so one
asks whether it still makes use of what stands far back: here is the loss for each amount of context, side by
side on the same rows of text, with the errors of the differences.

Every row is cut out of the validation split wherever it falls, as rows are in training; the token at position
p (from 0) has p + 1 tokens of context, itself included, from which the next one is predicted.
"""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import GPT
from nanotst import UserError
from nanotst.checkpoint import load_checkpoint, load_weights, model_config
from nanotst.configurator import entry_point
from nanotst.corpus import check_vocabulary
from nanotst.files import write_safely
from nanotst.machine import pick_device
from nanotst.mixture import open_mixture
from nanotst.stream import validation_rows
from tools.picture import COLORS, MARKERS, new_figure, save_picture, tidy
from tools.runs import CORPUS, markdown_table, notes_on_differences

BLOCKS = 50  # of neighbouring rows, whose means count as independent
LOGITS = 2**25  # at once, at most


@dataclass
class Config:
    """Usage: python -m tools.evaluate CHECKPOINT [CHECKPOINT ...] [--key=value ...]

    python -m tools.evaluate out/baseline/best.pt out/tst/best.pt --by_position --out=positions.png
    python -m tools.evaluate b1/best.pt b2/best.pt t1/best.pt t2/best.pt --labels=baseline,baseline,TST,TST
    python -m tools.evaluate out/baseline/best.pt out/tst/best.pt --dataset=english

    Checkpoints of one label are seeds of one side: their losses are averaged.
    """

    checkpoints: list[str]  # as train.py writes them, best.pt or last.pt
    labels: str = ""  # one for each checkpoint, comma-separated; equal labels are seeds of one side
    baseline: str = ""  # label of the side to compare with; empty: the first one of bag size 1
    dataset: str = (
        ""  # a corpus of the same vocabulary; empty: the one that the first was trained on
    )
    by_position: bool = False  # show the loss by the number of tokens of context, too
    block_size: int = (
        0  # positions of a row; 0: as in training; more asks for what was never trained
    )
    eval_positions: int = 2**19  # of the validation split, spread evenly over it, at most
    out: str = ""  # draw the loss by context to this file; its ending sets the format
    json: str = ""  # keep all numbers in this file
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


# ---------------------------------------------------------------------------------------------- measurements


def buckets_of(block_size):
    """[(first, last)] tokens of context, doubling: 1, 2, 3-4, 5-8 ... up to block_size."""
    ends = [1]
    while ends[-1] < block_size:
        ends.append(min(2 * ends[-1], block_size))
    return [(start + 1, end) for start, end in zip([0, *ends], ends)]


@torch.no_grad()
def position_losses(model, rows, device):
    """Next-token loss of the rows (n, L+1) at each position: (n, L) float32, nats. In float32."""
    out, length = [], rows.size(1) - 1
    for part in rows.split(max(1, LOGITS // (length * model.config.vocab_size))):
        tokens = part.to(device).long()  # (B, L+1)
        logits = model(tokens[:, :-1]).float()  # (B, L, V)
        out.append(F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").cpu())
    return torch.cat(out)


def bucket_losses(losses, buckets):
    """Mean loss of each row in each bucket and, last, over all positions: (n, L) -> (n, len(buckets) + 1)."""
    losses = losses.double().numpy()
    parts = [losses[:, first - 1 : last].mean(1) for first, last in buckets]
    return np.stack([*parts, losses.mean(1)], axis=1)


def mean_and_error(values):
    """Mean over rows (n, ...) -> (...), and its standard error. Neighbouring rows are often of one document
    and so alike: the error is that of the means of BLOCKS blocks of them (of single rows if there are fewer),
    on the default corpus three times what single rows would claim. NaN for one row."""
    parts = np.array_split(values, min(BLOCKS, len(values)))
    mean, share = values.mean(0), [len(part) / len(values) for part in parts]
    if len(parts) == 1:
        return mean, np.full_like(mean, math.nan)
    squares = sum(s**2 * (part.mean(0) - mean) ** 2 for s, part in zip(share, parts))
    return mean, np.sqrt(squares * len(parts) / (len(parts) - 1))


def error_of_seeds(seeds):
    """Standard error of the mean of seeds (m, ...) -> (...); NaN for one seed."""
    if len(seeds) == 1:
        return np.full_like(seeds[0], math.nan)
    return seeds.std(0, ddof=1) / math.sqrt(len(seeds))


def together(*errors):
    """Independent standard errors as one, of those that are known; NaN where none is."""
    known = ~np.isnan(errors)
    return np.where(known.any(0), np.sqrt(np.nansum(np.square(errors), axis=0)), math.nan)


def compare(side, base):
    """side - base in each bucket, both (seeds, n, buckets): the difference and its standard errors, of the
    text (paired: both sides read the same rows) and of the seeds, as far as known: a side of one seed adds
    nothing, and with two such sides it is NaN."""
    difference, text = mean_and_error(side.mean(0) - base.mean(0))
    return difference, text, together(error_of_seeds(side.mean(1)), error_of_seeds(base.mean(1)))


# ----------------------------------------------------------------------------------------------- checkpoints


def read_sides(c):
    """{label: list of (path, checkpoint)}, in the order given."""
    folders = [Path(path).resolve().parent.name for path in c.checkpoints]
    alone = len(set(folders)) == len(folders)
    labels = c.labels.split(",") if c.labels else folders if alone else c.checkpoints
    if len(labels) != len(c.checkpoints):
        raise UserError(f"--labels has {len(labels)} labels for {len(c.checkpoints)} checkpoints")
    sides = {}
    for label, path in zip(labels, c.checkpoints):
        sides.setdefault(label, []).append((path, load_checkpoint(path)))
    return sides


def baseline_of(sides, wanted):
    """Label of the side that the others are compared with."""
    if wanted and wanted not in sides:
        raise UserError(f"--baseline={wanted} is none of {', '.join(sides)}")
    ordinary = [label for label, side in sides.items() if side[0][1]["config"].get("bag_size") == 1]
    return wanted or next(iter(ordinary or sides))


def facts_of(checkpoint):
    """What decides whether runs compare, as text, in the form of tools/runs.py."""
    facts = checkpoint["config"] | {key: checkpoint["meta"].get(key) for key in CORPUS}
    return {key: str(value) for key, value in facts.items() if value not in (None, "")}


def build(path, checkpoint, block_size, device):
    """The model of a checkpoint, for rows of block_size positions."""
    shape = model_config(checkpoint["config"], checkpoint["meta"])
    model = GPT(dataclasses.replace(shape, block_size=block_size))
    load_weights(model, checkpoint["model"], path)
    return model.to(device).eval()


def open_text(c, sides):
    """[(name, Corpus)] to evaluate on (several, if the checkpoints read a mixture), and lines to say."""
    first = next(iter(sides.values()))[0][1]
    spec = c.dataset or first["config"].get("dataset", "")
    text = open_mixture(spec)
    for path, checkpoint in (each for side in sides.values() for each in side):
        check_vocabulary(text, checkpoint["meta"], path)
    notes = [corpus.note for _, corpus, _ in text.parts if corpus.note]
    same = lambda side: all(
        saved["meta"].get("fingerprint") == text.fingerprint for _, saved in side
    )
    if strange := [label for label, side in sides.items() if not same(side)]:
        notes.append(f"Trained on another corpus than {spec}: {', '.join(strange)}.")
    return [(name or spec, corpus) for name, corpus, _ in text.parts], notes


def evaluate(sides, baseline, corpus, block_size, positions, device):
    """Measure all sides on one corpus -> plain values, of which every list has an entry a bucket and, last,
    one of all positions."""
    rows = validation_rows(corpus.val, positions, block_size)  # (n, L+1)
    buckets = buckets_of(block_size)
    measured = {}  # label: (seeds, n, buckets + 1)
    for label, side in sides.items():
        seeds = []
        for path, checkpoint in side:
            losses = position_losses(build(path, checkpoint, block_size, device), rows, device)
            seeds.append(bucket_losses(losses, buckets))
        measured[label] = np.stack(seeds)
    result = {
        "rows": len(rows),
        "block_size": block_size,
        "val_tokens": len(corpus.val),
        "fingerprint": corpus.fingerprint,
        "bytes_per_token": corpus.bytes_per_token,
        "context": [*buckets, (1, block_size)],
        "baseline": baseline,
        "sides": {},
    }
    for label, losses in measured.items():
        mean, error = mean_and_error(losses.mean(0))
        first = sides[label][0][1]
        entry = {
            "checkpoints": [path for path, _ in sides[label]],
            "bag_size": first["config"].get("bag_size"),
            "steps": [checkpoint.get("step", 0) for _, checkpoint in sides[label]],
            "loss": mean,
            "error_of_text": error,
            "loss_of_seeds": losses.mean(1),
            "error_of_seeds": error_of_seeds(losses.mean(1)),
        }
        if corpus.bytes_per_token:
            entry["bits_per_byte"] = mean / math.log(2) / corpus.bytes_per_token
        if label != baseline:
            difference, text, seeds = compare(losses, measured[baseline])
            known = [each for each in (label, baseline) if len(sides[each]) > 1]
            entry["difference"] = {
                "loss": difference,
                "error_of_text": text,
                "error_of_seeds": seeds,
            }
            entry["difference"]["seeds_known_of"] = known
        result["sides"][label] = entry
    return plain(result)


def plain(value):
    """Arrays as lists, NaN as None: what JSON can hold."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    if isinstance(value, float):  # numpy's, too
        return float(value) if math.isfinite(value) else None
    return value


# ------------------------------------------------------------------------------------------------- for people


def with_error(entry, i, sign=""):
    """A loss and its standard error, of text and of seeds together, in one bucket."""
    errors = [
        entry[key][i] for key in ("error_of_text", "error_of_seeds") if entry[key][i] is not None
    ]
    return f"{entry['loss'][i]:{sign}.4f}" + (f" ± {math.hypot(*errors):.4f}" if errors else "")


def table(result, by_position):
    """The result as markdown: all positions, and by tokens of context."""
    sides, base = result["sides"], result["baseline"]
    cells = [["", "checkpoints", "bag size", "steps", "nats per token", "bits per byte"]]
    cells[0] += [f"minus {base}"] * (len(sides) > 1)
    for label, side in sides.items():
        bpb = f"{side['bits_per_byte'][-1]:.4f}" if "bits_per_byte" in side else "-"
        steps = " to ".join(f"{n:,}" for n in sorted({min(side["steps"]), max(side["steps"])}))
        difference = with_error(side["difference"], -1, "+") if "difference" in side else ""
        row = [
            label,
            str(len(side["checkpoints"])),
            str(side["bag_size"]),
            steps,
            with_error(side, -1),
        ]
        cells.append([*row, bpb, difference][: len(cells[0])])
    text = markdown_table(cells)
    if by_position:
        others = [label for label in sides if label != base]
        cells = [["context", *sides, *(f"{label} - {base}" for label in others)]]
        for i, (first, last) in enumerate(result["context"][:-1]):
            row = [f"{first:,}" if first == last else f"{first:,}-{last:,}"]
            row += [with_error(side, i) for side in sides.values()]
            cells.append(
                [*row, *(with_error(sides[label]["difference"], i, "+") for label in others)]
            )
        text += "\n\n" + markdown_table(cells)
    return text


def about_errors(sides, n_rows):
    """What ± holds, and of whom it does not hold how far seeds spread, as sentences."""
    paired = (
        "; that of a difference is of both sides' losses on the same rows" if len(sides) > 1 else ""
    )
    yield f"± is one standard error{paired}."
    single = [label for label, side in sides.items() if len(side) == 1]
    if len(single) < len(sides):
        yield "A side's loss is the mean of its seeds, of which the error holds that of their spread."
        if single:
            yield (
                f"± of {', '.join(single)} is of the text alone, and that of a difference lacks their part, "
                "as one checkpoint shows no spread."
            )
    elif len(sides) > 1:
        yield "± is of the text alone: with one checkpoint a side, a difference may be the seeds' spread."
    else:
        yield "± is of the text alone: one checkpoint does not show how far seeds spread."
    if n_rows == 1:
        yield "One row does not show how far texts differ: ± lacks that part."


def draw(result, title, trained):
    """A figure of two panels: loss against context, and its difference to the baseline. trained: positions
    of the rows in training."""
    fig, axes = new_figure((11, 4.6), 1, 2, "leave --out away without it")
    sides, base = result["sides"], result["baseline"]
    buckets = result["context"][:-1]
    x = [math.sqrt(first * last) for first, last in buckets]

    def line(ax, entry, factor=1.0, **look):
        loss, text, seeds = (
            np.array(entry[key][:-1], float) for key in ("loss", "error_of_text", "error_of_seeds")
        )
        error = 2 * np.nan_to_num(together(text, seeds))
        ax.plot(x, loss, lw=1.8, ms=5, **look)
        ax.fill_between(x, loss - error, loss + error, color=look["color"], alpha=0.15, lw=0)

    for i, (label, side) in enumerate(sides.items()):
        n = len(side["checkpoints"])
        name = f"{label} ({n} seed{'s' * (n > 1)})"
        look = dict(color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], label=name)
        line(axes[0], side, **look)
        if label != base:
            line(axes[1], side["difference"], **look)
    axes[1].axhline(0, color=COLORS[list(sides).index(base) % len(COLORS)], lw=1.3, label=base)
    axes[0].set(title="Loss by context", ylabel="validation loss (nats per token)")
    axes[1].set(title=f"Difference to {base}", ylabel="nats per token (below 0: better)")
    for ax in axes:
        if trained < buckets[-1][1]:
            ax.axvline(trained, color="0.4", ls=":", lw=1.3, label="longest in training")
        ax.set(xscale="log", xlabel="tokens of context")
        ax.set_xticks(
            [last for _, last in buckets], [f"{last:,}" for _, last in buckets], fontsize=8
        )
        ax.minorticks_off()
        tidy(ax)
        ax.legend(frameon=False)
    fig.suptitle(title, fontsize=11)
    return fig


def main(config):
    c = config
    if min(c.block_size, c.eval_positions - 1) < 0:
        raise UserError("block_size must not be negative, and eval_positions at least 1")
    device = pick_device(c.device)
    sides = read_sides(c)
    baseline = baseline_of(sides, c.baseline)
    checkpoints = [checkpoint for side in sides.values() for _, checkpoint in side]
    trained = min(model_config(saved["config"], saved["meta"]).block_size for saved in checkpoints)
    block_size = c.block_size or trained
    parts, notes = open_text(c, sides)
    named = [dict(name=label, label=label, facts=facts_of(saved)) for label, side in sides.items()
             for _, saved in side]  # fmt: skip
    notes += notes_on_differences(named)
    if block_size > trained:
        notes.append(f"Rows of {block_size:,} tokens are longer than in training, {trained:,}.")
    results = {}
    for name, corpus in parts:
        results[name] = result = evaluate(
            sides, baseline, corpus, block_size, c.eval_positions, device
        )
        print(
            f"{name}: {result['rows']:,} rows of {block_size:,} tokens, spread over its validation split\n"
        )
        print(table(result, c.by_position) + "\n")
    notes = [*about_errors(sides, min(result["rows"] for result in results.values())), *notes]
    for note in notes:
        print(note)
    if c.json:
        text = (
            json.dumps({"command": sys.argv, "notes": notes, "corpora": results}, indent=1) + "\n"
        )
        write_safely(c.json, lambda path: Path(path).write_text(text, encoding="utf-8"))
        print(f"wrote {c.json}")
    if c.out:
        name = next(iter(results))
        title = f"{name}: {results[name]['rows']:,} rows of {block_size:,} tokens"
        save_picture(draw(results[name], title, trained), c.out)
        print(f"wrote {c.out}" + (f", of {name} alone" if len(results) > 1 else ""))


if __name__ == "__main__":
    entry_point(main, Config)
