"""Compare training runs: a table, and validation loss drawn at equal FLOPs, equal data and equal time.

Reads run folders of train.py and what tools/keep.py kept of such runs in results/. A note names what differs
between the runs (model, corpus, learning rate); different tokenizers compare in bits per byte.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for python tools/plot.py

from nanotst import UserError
from nanotst.configurator import entry_point
from tools.intervals import difference, seeds_text, speedup, times
from tools.picture import COLORS, MARKERS, new_figure, save_picture, tidy
from tools.runs import ENDS, final, markdown_table, measure_of, notes_on_differences, read_runs


@dataclass
class Config:
    """Usage: python -m tools.plot RUN [RUN ...] [--key=value ...]

    python -m tools.plot out/b1 out/b2 out/t1 out/t2 --labels=baseline,baseline,TST,TST
    python -m tools.plot 'results/moe/tst_*' out/mine   kept runs of some names or labels, and a new run
    python -m tools.plot results/sizes --by=bag_size    final losses minus the baseline's, by bag size

    Runs of one label, length and bag size are seeds of one configuration: they share a colour, and the table
    has a line for their mean. A run that was stopped early has no speed-up and is nobody's baseline.
    """

    runs: list[str]  # run folders, kept folders, or KEPT/PATTERN of names or labels
    out: str = "curves.png"  # the picture; its ending sets the format
    labels: str = ""  # comma-separated, one for each run; equal labels are seeds of one side
    panels: str = "flops,data,time"  # panels of the picture
    by: str = ""  # knob for the x-axis of a picture of final losses, one line per model size
    no_plot: bool = False  # table without a picture


PANELS = {  # title, key of the rows, label of the x-axis
    "flops": ("Equal FLOPs", "flops", "FLOPs"),
    "data": ("Equal data", "data_tokens", "data tokens"),
    "time": ("Equal time", "seconds", "seconds of training"),
}


def curve(rows, x, y):
    """[(x, y)] of the rows that have both."""
    return [(row[x], row[y]) for row in rows if x in row and y in row]


def mean_rows(seeds):
    """Means over the seeds at the steps where all have a validation row."""
    seeds = [{row["step"]: row for row in rows if "val_loss" in row} for rows in seeds]
    mean = []
    for step in sorted(set.intersection(*map(set, seeds))):
        rows = [seed[step] for seed in seeds]
        keys = [key for key in ENDS if all(key in row for row in rows)]
        mean.append({"step": step} | {k: sum(row[k] for row in rows) / len(rows) for k in keys})
    return mean


class Side:
    """Runs that differ by seed alone, with the means of their rows. y is the loss that counts."""

    def __init__(self, runs, y="val_loss"):
        self.runs, self.label, self.y, self.facts = runs, runs[0]["label"], y, runs[0]["facts"]
        first = runs[0]["rows"]
        self.rows = mean_rows([run["rows"] for run in runs]) if len(runs) > 1 else first
        self.end, self.losses = final(self.rows), [final(run["rows"])[y] for run in runs]
        self.bagged = [row for row in first if row.get("bag_size", 1) > 1]
        self.switch = self.bagged[-1]["step"] if self.bagged else 0
        self.bags = "-".join(dict.fromkeys(str(row["bag_size"]) for row in self.bagged)) or "1"
        self.planned = int(self.facts["max_steps"])
        self.finished = self.end["step"] >= self.planned  # else its learning rate has not decayed


def sides_of(runs):
    """Sides: runs of one label, length and bag size."""
    alike = {}
    for run in runs:
        key = run["label"], final(run["rows"])["step"], run["facts"]["bag_size"]
        alike.setdefault(key, []).append(run)
    return [Side(seeds, measure_of(runs)) for seeds in alike.values()]


def reached(side, loss, until=math.inf):
    """FLOPs from which a side stays at or below a loss up to step `until`, linear between its validation
    rows; inf if it does not."""
    at, before = math.inf, None
    rows = [row for row in side.rows if row["step"] <= until]
    for flops, own in reversed(curve(rows, "flops", side.y)):
        if own > loss:
            return at if before is None else flops + (at - flops) * (own - loss) / (own - before)
        at, before = flops, own
    return at


def lengths_of(baselines):
    """Baselines by ascending FLOPs, the best of each length (within 1 %)."""
    best = []
    for side in sorted(baselines, key=lambda side: side.end["flops"]):
        if best and side.end["flops"] <= 1.01 * best[-1].end["flops"]:
            side = min(best.pop(), side, key=lambda side: side.end[side.y])
        best.append(side)
    return best


def equal(side, baselines, key):
    """The baselines with as many FLOPs, or data_tokens, as a side."""
    return [b for b in baselines if abs(b.end[key] / side.end[key] - 1) < 0.01]


def speedup_text(side, baselines):
    """FLOPs that a baseline needs to end at the loss where a side ends, over the side's own.

    With a decaying learning rate a run shows what its FLOPs buy at its end alone, so the ends of baselines of
    several lengths are compared. One length gives a lower bound: where the side meets the baseline's end."""
    ends = lengths_of(baselines)
    if side.bags == "1" or not side.finished or not ends:
        return "-"
    if len(ends) > 1:
        lengths = [end.end["flops"] / side.end["flops"] for end in ends]
        factor = speedup(lengths, [difference(side.losses, end.losses) for end in ends])
        return factor.text(lambda value: times(value, lengths))
    at = reached(side, ends[0].end[side.y])
    return "not reached" if at == math.inf else times(math.inf, [ends[0].end["flops"] / at])


def undecayed_speedup(side, baselines):
    """The same, wrongly read off the longest baseline before its learning rate decays, or None."""
    longest = max(baselines, key=lambda side: side.end["flops"])
    decay = float(longest.facts["decay_ratio"]) if longest.facts["schedule"] == "wsd" else 0
    at = reached(longest, side.end[side.y], longest.planned * (1 - decay))
    return at / side.end["flops"] if side.end["flops"] < at < math.inf else None


def switches(rows):
    """[(row, row)] for each switch: the last logged row on larger bags, the first on smaller ones."""
    rows = [row for row in rows if "loss" in row and "bag_size" in row]
    return [pair for pair in zip(rows, rows[1:]) if pair[0]["bag_size"] != pair[1]["bag_size"]]


def met_again(side, baseline):
    """When after the last switch a side meets a baseline's validation loss at equal FLOPs, as text."""
    base, gaps = curve(baseline.rows, "flops", side.y), []
    for row in side.rows:
        if row["step"] > side.switch and side.y in row and row["flops"] >= base[0][0]:
            gaps.append((row[side.y] - np.interp(row["flops"], *zip(*base)), row["step"]))
            if gaps[-1][0] <= 0:
                step = np.interp(0, *zip(*reversed(gaps[-2:])))
                return f"met about {step - side.switch:,.0f} steps later"
    return "not met"


def table_line(name, side, baselines):
    """Cells of the table for a run or the mean of several."""
    show = lambda key, text, scale=1: text.format(side.end[key] / scale) if key in side.end else "-"
    return [
        name,
        side.bags,
        "0" if side.bags == "1" else side.facts["superposition_ratio"],
        f"{side.end['step']:,}" + ("" if side.finished else f" of {side.planned:,}"),
        seeds_text([final(run["rows"])["val_loss"] for run in side.runs]),
        show("val_bpb", "{:.4f}"),
        show("data_tokens", "{:,.2f}M", 1e6),
        show("flops", "{:.3g}"),
        show("seconds", "{:,.1f} min", 60),
        speedup_text(side, baselines),
    ]


def against_baselines(side, baselines):
    """A line on TST: the switch, and the difference at equal FLOPs."""
    said = []
    for pairs in zip(*(switches(run["rows"]) for run in side.runs)):
        old, new = (np.mean([pair[i]["loss"] for pair in pairs]) for i in (0, 1))
        step = pairs[0][0]["step"]
        said.append(f"training loss {old:.3f} -> {new:.3f} ({new - old:+.3f}) after step {step:,}")
    for near in equal(side, lengths_of(baselines), "flops"):
        said.append(f"the baseline's validation loss {met_again(side, near)}")
        said.append(f"at the end {difference(side.losses, near.losses).text()}")
    return f"- {side.label}: {'; '.join(said)}."


def table(runs):
    """The comparison as markdown."""
    sides, y = sides_of(runs), measure_of(runs)
    baselines = [side for side in sides if side.bags == "1" and side.finished]
    header = "run, bag size, r, steps, val loss, bits/byte, data tokens, FLOPs, time, speed-up"
    cells = [header.split(", ")]
    for run in runs:
        name = run["name"] + (f" ({run['label']})" if run["label"] != run["name"] else "")
        cells.append(table_line(name, Side([run], y), baselines))
    for side in sides:
        if len(side.runs) > 1:
            cells.append(table_line(f"{side.label}, mean", side, baselines))
    lengths = len(lengths_of(baselines))
    how = ("no finished baseline is given", "one baseline length, so a lower bound")
    how = how[lengths] if lengths < 2 else f"between the ends of baselines of {lengths} lengths"
    losses = "Validation loss in nats per token, mean ± standard deviation (seeds)"
    notes = [f"{losses}. Speed-up in FLOPs at equal loss: {how}.", *notes_on_differences(runs)]
    if lines := [against_baselines(side, baselines) for side in sides if side.bags != "1"]:
        notes.append("At the switch, and at equal FLOPs:\n\n" + "\n".join(lines))
    return "\n\n".join([markdown_table(cells), *notes])


def draw_panel(ax, sides, x):
    """Validation losses over x: means thick, seeds thin, switches dotted, last values in the legend."""
    from matplotlib.ticker import EngFormatter

    labels = [side.label for side in sides]
    for side in sides:
        i, many = labels.index(side.label), len(side.runs) > 1
        color = COLORS[i % len(COLORS)]
        line = lambda rows, y, **look: ax.plot(*zip(*curve(rows, x, y)), **look)
        for run in side.runs if many else []:
            line(run["rows"], side.y, color=color, lw=0.8, alpha=0.45)
        look = dict(color=color, marker=MARKERS[i % len(MARKERS)], ms=4, markevery=0.05, lw=1.8)
        label = side.label + f" ({len(side.runs)} seeds)" * many
        line(side.rows, side.y, label=f"{label}: {side.end[side.y]:.3f}", **look)
        if side.bagged:
            ax.axvline(side.bagged[-1][x], color=color, ls=":", label="end of superposition")
    losses = [loss for side in sides for _, loss in curve(side.rows, x, side.y)]
    low, high = np.nanquantile(losses, (0, 0.7))  # the first losses are too high to show
    pad = 0.08 * (high - low) or 0.05
    ax.set(xlim=(0, None), ylim=(low - pad, high + pad))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    tidy(ax)


def draw(runs, panels=tuple(PANELS)):
    """A figure with panels of validation loss."""
    size, without = (1 + 4 * len(panels), 4.8), "--no_plot prints the table alone"
    fig, axes = new_figure(size, 1, len(panels), without, sharey=True, squeeze=False)
    sides = sorted(sides_of(runs), key=lambda side: side.bags != "1")
    for ax, panel in zip(axes[0], panels):
        title, key, name = PANELS[panel]
        draw_panel(ax, sides, key)
        ax.set(title=title, xlabel=name)
    unit = "nats per token" if sides[0].y == "val_loss" else "bits per byte"
    axes[0, 0].set_ylabel(f"validation loss ({unit})")
    known = dict(zip(*reversed(ax.get_legend_handles_labels())))
    columns = 2 * len(panels) - 1
    fig.legend(known.values(), known, loc="outside lower center", ncols=columns, frameon=False)
    return fig


def gains_by(runs, knob):
    """{parameters: {value of the knob: Interval of the final loss minus the baseline's of that size}}."""
    y, sizes = measure_of(runs), {}
    for run in runs:
        facts = run["facts"]
        try:
            at = None if facts["bag_size"] == "1" else float(facts[knob])  # None: a baseline
        except (KeyError, ValueError):
            raise UserError(f"--by={knob} is not a number in {run['name']}") from None
        sides = sizes.setdefault(int(facts["parameters"]), {None: []})
        sides.setdefault(at, []).append(final(run["rows"])[y])
    gains = {}
    for size, sides in sorted(sizes.items()):
        if not (baseline := sides.pop(None)):
            raise UserError(f"--by={knob}: there is no baseline of {size:,} parameters")
        gains[size] = {at: difference(sides[at], baseline) for at in sorted(sides)}
    return gains


def draw_by(gains, knob):
    """A figure of what gains_by gives, a line for each size."""
    fig, ax = new_figure((7, 4.6), without="--no_plot prints the numbers alone")
    ax.axhline(0, color=COLORS[0], lw=1.3, label="baseline")
    for i, (size, sides) in enumerate(gains.items()):
        x = [at + 0.08 * (i - (len(gains) - 1) / 2) for at in sides]  # so that no bar hides another
        half = [gain.high - gain.value for gain in sides.values()]  # NaN, so no bar, without seeds
        values, label = [gain.value for gain in sides.values()], f"{size / 1e6:.2g}M parameters"
        look = dict(color=COLORS[1 + i % 6], fmt=f"{MARKERS[i % len(MARKERS)]}-", capsize=3)
        ax.errorbar(x, values, half, label=label, **look)
    ax.set_xticks(sorted({at for sides in gains.values() for at in sides}))
    ax.set(xlabel=knob, ylabel="final validation loss minus the baseline's")
    ax.set_title("bars: 95 % confidence intervals where there are several seeds", fontsize=9)
    ax.legend(frameon=False)
    tidy(ax)
    return fig


def main(config):
    runs, panels = read_runs(config.runs), config.panels.split(",")
    if unknown := set(panels) - set(PANELS):
        raise UserError(f"--panels takes some of {', '.join(PANELS)}, not {min(unknown)!r}")
    if not config.by:
        drawn = [run for run in runs if "path" in run or len(run["rows"]) > 1]
        if bare := len(runs) - len(drawn):
            print(f"note: {bare} of {len(runs)} runs are kept without a curve", file=sys.stderr)
        if not (runs := drawn):
            raise UserError("there is nothing to draw; --by=KNOB compares final losses alone")
    labels = config.labels.split(",") if config.labels else [r["label"] or r["name"] for r in runs]
    if len(labels) != len(runs):
        raise UserError(f"--labels has {len(labels)} labels for {len(runs)} runs")
    for run, label in zip(runs, labels):
        run["label"] = label
    if config.by:
        gains = gains_by(runs, config.by)
        for size, sides in gains.items():
            said = (f"{config.by} {at:g}: {gain.text()}" for at, gain in sides.items())
            print(f"{size:,} parameters: {'; '.join(said)}")
            alike = [run for run in runs if run["facts"]["parameters"] == str(size)]
            print("\n".join(notes_on_differences(alike)))
    else:
        print(table(runs))
    if not config.no_plot:
        save_picture(draw_by(gains, config.by) if config.by else draw(runs, panels), config.out)
        print(f"\nwrote {config.out}")


if __name__ == "__main__":
    entry_point(main, Config)
