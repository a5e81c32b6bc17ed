"""Compare training runs: a table, and validation loss drawn at equal FLOPs, equal data and equal time."""

import math
import sys
from dataclasses import dataclass
from itertools import cycle, pairwise

import numpy as np

from nanotst import UserError
from nanotst.configurator import entry_point
from tools.intervals import Interval, difference, first_zero, seeds_text, speedup, times
from tools.runs import (
    BAGS,
    ENDS,
    is_baseline,
    markdown_table,
    measure_of,
    notes_on_differences,
    read_runs,
)


@dataclass
class Config:
    """Usage: python -m tools.plot RUN [RUN ...] [--key=value ...]

    python -m tools.plot out/b1 out/b2 out/t1 out/t2 --labels=baseline,baseline,TST,TST
    python -m tools.plot results/moe/TST out/mine       kept runs of some names or labels, and a new run
    python -m tools.plot 'results/paper/runs/s?_seed?' --by=bag_size    final losses minus the baseline's

    Runs of one label, length and bag size are seeds of one side: they share a colour and a line of the table.
    A run that was stopped early has no speed-up and is nobody's baseline. Runs with different tokenizers
    compare in bits per byte.
    """

    runs: list[str]  # run folders, kept folders, or KEPT/PATTERN of names or labels
    out: str = "curves.png"  # the picture; its ending sets the format
    labels: str = ""  # comma-separated, one for all or one each; equal labels are seeds of one side
    panels: str = "flops,data,time"  # panels of the picture
    by: str = ""  # knob for the x-axis of a picture of final losses, one line per model size
    plot: bool = True  # also draw the picture (needs matplotlib)


PANELS = {  # title, key of the rows, label of the x-axis
    "flops": ("Equal FLOPs", "flops", "FLOPs"),
    "data": ("Equal data", "data_tokens", "data tokens"),
    "time": ("Equal time", "seconds", "seconds of training"),
}
UNITS = {"val_loss": "nats per token", "val_bpb": "bits per byte"}
# Okabe and Ito's colours, which the colour-blind can tell apart
COLORS = "#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
LOOKS = [dict(color=color, marker=marker) for color, marker in zip(COLORS, "osD^vPX")]


class Side:
    """Runs that differ by seed alone. y is the loss that counts."""

    def __init__(self, runs, y="val_loss"):
        self.runs, self.y = runs, y
        self.label, self.facts = runs[0]["label"], runs[0]["facts"]
        seeds = [{row["step"]: row for row in run["validated"]} for run in runs]
        steps = sorted(set.intersection(*map(set, seeds)))  # where all were validated
        rows = [seed[step] for seed in seeds for step in steps]
        keys = [key for key in ("step", *ENDS) if all(key in row for row in rows)]
        values = np.array([[row[key] for row in rows] for key in keys])
        values = values.reshape(len(keys), len(runs), len(steps))
        self.seeds = dict(zip(keys, values))  # (n_seed, n_step) each
        self.mean = dict(zip(keys, values.mean(1)))  # (n_step,) each
        self.end = {key: mean[-1] for key, mean in self.mean.items()}
        self.losses = self.seeds[y][:, -1]
        bagged = [row for row in runs[0]["rows"] if row.get("bag_size", 1) > 1]
        self.switch = bagged[-1] if bagged else {"step": 0}  # the last row on bags
        self.planned = int(self.facts["max_steps"])
        self.finished = self.end["step"] >= self.planned  # else its learning rate has not decayed
        self.is_baseline = is_baseline(self.facts)


def sides_of(runs):
    """Sides: runs of one label, length and bag size."""
    alike = {}
    for run in runs:
        key = run["label"], run["validated"][-1]["step"], run["facts"]["bag_size"]
        alike.setdefault(key, []).append(run)
    return [Side(seeds, measure_of(runs)) for seeds in alike.values()]


def lengths_of(sides):
    """The finished baselines by ascending FLOPs, the best of each length."""
    done = [side for side in sides if side.is_baseline and side.finished]
    best = {side.end["flops"]: side for side in sorted(done, key=lambda side: -side.end[side.y])}
    return [best[flops] for flops in sorted(best)]


def reached(side, loss, until=math.inf):
    """FLOPs from which a side stays at or below a loss up to step `until`; inf if it does not."""
    early = side.mean["step"] <= until
    flops, gap = side.mean["flops"][early], side.mean[side.y][early] - loss
    last = max(np.flatnonzero(gap > 0), default=0)
    return first_zero(flops[last:], gap[last:])


def speedup_of(side, baselines):
    """(Interval, text) of the FLOPs that a baseline needs to end at the loss where a side ends, over the
    side's own.

    With a decaying learning rate a run shows what its FLOPs buy at its end alone, so the ends of baselines of
    several lengths are compared. One length gives a lower bound: where the side meets the baseline's end."""
    if side.is_baseline or not side.finished or not baselines:
        return Interval(math.nan), "-"
    lengths = [end.end["flops"] / side.end["flops"] for end in baselines]
    if len(lengths) == 1:
        bound = baselines[0].end["flops"] / reached(side, baselines[0].end[side.y])
        return Interval(math.inf), times(math.inf, [bound]) if bound else "not reached"
    gain = speedup(lengths, [difference(side.losses, end.losses) for end in baselines])
    return gain, gain.text(lambda value: times(value, lengths))


def undecayed_speedup(side, longest):
    """The same, wrongly read off a baseline before its learning rate decays; None if it is not above 1."""
    constant = longest.facts.get("schedule") == "wsd"
    until = longest.planned * (1 - float(longest.facts["decay_ratio"])) if constant else 0
    factor = reached(longest, side.end[side.y], until) / side.end["flops"]
    return factor if 1 < factor < math.inf else None


def exchange_rate(side, gain):
    """Interval of the tokens in bags worth one ordinary token, if a baseline takes `gain` times a side's
    positions to end as low: what the side read in bags, over what the baseline reads beyond the side's other
    tokens."""
    in_bags = side.switch["data_tokens"]
    worth = lambda factor: factor * side.end["positions"] - (side.end["data_tokens"] - in_bags)
    rate = lambda factor: math.inf if worth(factor) <= 0 else in_bags / worth(factor)
    return Interval(rate(gain.value), rate(gain.high), rate(gain.low))


def met_again(side, baseline):
    """When after the last switch a side meets a baseline's validation loss at equal FLOPs, as text."""
    own, base, switch = side.mean, baseline.mean, side.switch["step"]
    gap = own[side.y] - np.interp(own["flops"], base["flops"], base[side.y])
    after = (own["step"] > switch) & (own["flops"] >= base["flops"][0])
    steps = first_zero(own["step"][after], gap[after]) - switch
    return "not met" if steps == math.inf else f"met about {steps:,.0f} steps after the switch"


def about(side, baselines):
    """A line about TST: its switch, and how it ends compared with the baselines."""
    said, switch = [], side.switch["step"]
    pairs = [pair for run in side.runs for pair in pairwise(run["rows"])]
    if jumps := [(a["loss"], b["loss"]) for a, b in pairs if a["step"] == switch]:
        old, new = np.mean(jumps, axis=0)
        jump = f"{old:.3f} -> {new:.3f} ({new - old:+.3f})"
        said.append(f"training loss {jump} after step {switch:,.0f}")
    for near in baselines:
        minus = difference(side.losses, near.losses).text()
        if math.isclose(near.end["flops"], side.end["flops"], rel_tol=0.01):
            said.append(f"equal FLOPs {minus}")
            said.append(f"the baseline's validation loss {met_again(side, near)}")
        if math.isclose(near.end["data_tokens"], side.end["data_tokens"], rel_tol=0.01):
            said.append(f"equal data {minus}")
    gain, text = speedup_of(side, baselines)
    if 0 < gain.value < math.inf:
        rate = exchange_rate(side, gain).text("{:.2f}".format)
        said.append(f"equal loss: a baseline needs {text} the FLOPs")
        said.append(f"exchange rate: {rate} tokens read in bags are worth one ordinary token")
    if baselines and (false := undecayed_speedup(side, baselines[-1])):
        said.append(f"read off the longest baseline before its decay {false:.2f}x, which is wrong")
    return f"- {side.label}: {'; '.join(said) or 'nothing to compare it with'}."


def line(side, baselines):
    """Cells of the table."""
    end = side.end
    return [
        side.label,
        side.facts["bag_size"],
        "0" if side.is_baseline else side.facts.get("superposition_ratio", "-"),
        f"{end['step']:,.0f}" + f" of {side.planned:,}" * (not side.finished),
        seeds_text(side.seeds["val_loss"][:, -1]),
        f"{end['val_bpb']:.4f}" if "val_bpb" in end else "-",
        f"{end['data_tokens'] / 1e6:,.2f}M",
        f"{end['flops']:.3g}",
        f"{end['seconds'] / 60:,.1f} min",
        speedup_of(side, baselines)[1],
    ]


def table(runs):
    """The comparison as markdown: a line for each side, and what TST does against the baselines."""
    sides = sides_of(runs)
    baselines = lengths_of(sides)
    header = "run, bag size, r, steps, val loss, bits/byte, data tokens, FLOPs, time, speed-up"
    cells = [header.split(", "), *(line(side, baselines) for side in sides)]
    notes = [
        "Validation loss in nats per token, mean ± standard deviation (seeds). Speed-up in FLOPs at equal "
        "loss, between the ends of finished baselines; a lower bound if all have one length.",
        *notes_on_differences(runs),
    ]
    if lines := [about(side, baselines) for side in sides if not side.is_baseline]:
        notes.append("At the switch, and against the baselines:\n\n" + "\n".join(lines))
    return "\n\n".join([markdown_table(cells), *notes])


def new_figure(size, columns):
    """(figure, axes) of `size` in inches. UserError if matplotlib is missing, which tables do not need."""
    try:
        from matplotlib.figure import Figure  # without pyplot it needs no display
    except ImportError:
        raise UserError("pictures need matplotlib (pip install matplotlib)") from None
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    for ax in axes:
        ax.grid(color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_picture(figure, path):
    """Write a picture; the ending of its name sets the format."""
    try:
        figure.savefig(path)
    except ValueError as e:  # an ending that matplotlib does not know
        raise UserError(f"cannot draw {path}: {' '.join(str(e).split())[:200]}") from None


def draw(runs, panels=tuple(PANELS)):
    """A figure with panels of validation loss: means thick, seeds thin, switches dotted, last values in the
    legend."""
    fig, axes = new_figure((1 + 4 * len(panels), 4.8), len(panels))
    sides = sorted(sides_of(runs), key=lambda side: not side.is_baseline)
    looks = dict(zip(dict.fromkeys(side.label for side in sides), cycle(LOOKS)))
    for ax, panel in zip(axes, panels):
        title, x, name = PANELS[panel]
        for side in sides:
            look, y, n = looks[side.label], side.y, len(side.runs)
            label = side.label + f" ({n} seeds)" * (n > 1) + f": {side.end[y]:.3f}"
            ax.plot(side.mean[x], side.mean[y], label=label, ms=4, markevery=0.05, lw=1.8, **look)
            thin = dict(color=look["color"], alpha=0.45)
            ax.plot(side.seeds[x].T, side.seeds[y].T, lw=0.8, **thin)
            if x in side.switch:
                ax.axvline(side.switch[x], ls=":", label="end of superposition", **thin)
        ax.set(title=title, xlabel=name, xlim=(0, None))
    losses = np.concatenate([side.mean[side.y] for side in sides])
    low, high = np.nanquantile(losses, (0, 0.7))  # the first losses are too high to show
    pad = 0.08 * (high - low) or 0.05
    axes[0].set(ylim=(low - pad, high + pad), ylabel=f"validation loss ({UNITS[sides[0].y]})")
    known = dict(zip(*reversed(axes[0].get_legend_handles_labels())))
    look = dict(loc="outside lower center", ncols=2 * len(panels) - 1, frameon=False)
    fig.legend(known.values(), known, **look)
    return fig


class Points:
    """The final losses of a sweep by the values of some knobs and the bag size. A baseline has no other knobs
    of superposition."""

    def __init__(self, runs, knobs):
        self.knobs = list(dict.fromkeys([*knobs, "bag_size"]))
        self.losses, y = {}, measure_of(runs)
        for run in runs:
            point = tuple(run["facts"].get(knob, "-") for knob in self.knobs)
            point = self.baseline(point) if is_baseline(run["facts"]) else point
            self.losses.setdefault(point, []).append(run["validated"][-1][y])  # one for each seed
        self.gains = {  # Intervals of the loss minus the baseline's with the same other knobs
            point: difference(losses, self.losses[self.baseline(point)])
            for point, losses in self.losses.items()
            if self.baseline(point) in self.losses.keys() - {point}
        }

    def baseline(self, point):
        """The values for a baseline."""
        idle = dict.fromkeys(BAGS, "-") | {"bag_size": "1"}
        return tuple(idle.get(knob, value) for knob, value in zip(self.knobs, point))

    def table(self):
        """A line for each point as markdown."""
        cells = [[*self.knobs, "val loss", "minus baseline"]]
        for point, losses in self.losses.items():
            gain = self.gains[point].text() if point in self.gains else "-"
            cells.append([*point, seeds_text(losses), gain])
        what = "Final validation loss in nats per token (bits per byte if tokenizers differ), "
        what += "mean ± standard deviation (seeds). Differences with 95 % confidence intervals."
        return f"{markdown_table(cells)}\n\n{what}"

    def draw(self):
        """A figure over the first knob, a line for each combination of the others: differences from the
        baselines (bars: 95 %) if it is a knob of superposition, else losses (bars: standard deviation)."""
        fig, (ax,) = new_figure((7, 4.6), 1)
        ax.set(xlabel=self.knobs[0], ylabel="final validation loss")
        if self.knobs[0] in BAGS and self.gains:
            values = {p: (gain.value, gain.high - gain.value) for p, gain in self.gains.items()}
            ax.axhline(0, color=COLORS[0], ls="--", label="baseline")
            ax.set(ylabel="final validation loss minus the baseline's")
        else:
            sd = lambda losses: np.std(losses, ddof=min(1, len(losses) - 1))
            values = {p: (np.mean(losses), sd(losses)) for p, losses in self.losses.items()}
        lines = {}
        for (x, *others), value in values.items():
            named = [f"{knob} {v}" for knob, v in zip(self.knobs[1:], others) if v != "-"]
            lines.setdefault(", ".join(named) or "TST", []).append((x, *value))
        ax.xaxis.update_units([point[0] for point in values])  # sets their order
        for look, (name, dots) in zip(cycle(LOOKS[1:]), lines.items()):
            ax.errorbar(*zip(*dots), label=name, capsize=3, **look)
        ax.legend(frameon=False)
        return fig


def main(config):
    runs, panels = read_runs(config.runs, config.labels), config.panels.split(",")
    if unknown := set(panels) - set(PANELS):
        raise UserError(f"--panels takes some of {', '.join(PANELS)}, not {min(unknown)!r}")
    if config.by:
        try:
            runs.sort(key=lambda run: float(run["facts"][config.by]))
        except (KeyError, ValueError):
            raise UserError(f"--by={config.by} is not a number in all runs") from None
        points = Points(runs, [config.by, "parameters"])
        print("\n\n".join([points.table(), *notes_on_differences(runs)]))
        picture = points.draw
    else:
        drawn = [run for run in runs if "path" in run or len(run["rows"]) > 1]
        if bare := len(runs) - len(drawn):
            print(f"note: {bare} of {len(runs)} runs have no curve; left out", file=sys.stderr)
        if not drawn:
            raise UserError("there is nothing to draw; --by=KNOB compares final losses alone")
        print(table(drawn))
        picture = lambda: draw(drawn, panels)
    if config.plot:
        save_picture(picture(), config.out)
        print(f"\nwrote {config.out}")


if __name__ == "__main__":
    entry_point(main, Config)
