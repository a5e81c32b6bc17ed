"""Compare training runs: a table, and validation loss drawn at equal FLOPs, equal data and equal time.

Reads run folders of train.py and what tools/keep.py kept of such runs in results/. A note names what differs
between the runs (model, corpus, learning rate); different tokenizers compare in bits per byte.
"""

import math
import sys
from dataclasses import dataclass

import numpy as np

from nanotst import UserError
from nanotst.configurator import entry_point
from tools.intervals import Interval, difference, first_zero, seeds_text, speedup, times
from tools.runs import (
    BAGS,
    ENDS,
    final,
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
    python -m tools.plot 'results/moe/tst_*' out/mine   kept runs of some names or labels, and a new run
    python -m tools.plot results/sizes --by=bag_size    final losses minus the baseline's, by bag size

    Runs of one label, length and bag size are seeds of one side: they share a colour and a line of the table.
    A run that was stopped early has no speed-up and is nobody's baseline.
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
UNITS = {"val_loss": "nats per token", "val_bpb": "bits per byte"}
BASELINE = ("bag_size", "1")  # in a point of a sweep
# Okabe and Ito's colours, which the colour-blind can tell apart
COLORS = ["#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = "osD^vPX"


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
        self.rows = mean_rows([run["rows"] for run in runs])
        self.end, self.losses = self.rows[-1], [final(run["rows"])[y] for run in runs]
        bagged = [row for row in runs[0]["rows"] if row.get("bag_size", 1) > 1]
        self.switch = bagged[-1] if bagged else {"step": 0}  # the last row on bags
        self.planned = int(self.facts["max_steps"])
        self.finished = self.end["step"] >= self.planned  # else its learning rate has not decayed
        self.is_baseline = is_baseline(self.facts)


def sides_of(runs):
    """Sides: runs of one label, length and bag size."""
    alike = {}
    for run in runs:
        key = run["label"], final(run["rows"])["step"], run["facts"]["bag_size"]
        alike.setdefault(key, []).append(run)
    return [Side(seeds, measure_of(runs)) for seeds in alike.values()]


def lengths_of(sides):
    """The finished baselines by ascending FLOPs, the best of each length."""
    done = [side for side in sides if side.is_baseline and side.finished]
    best = {side.end["flops"]: side for side in sorted(done, key=lambda side: -side.end[side.y])}
    return [best[flops] for flops in sorted(best)]


def reached(side, loss, until=math.inf):
    """FLOPs from which a side stays at or below a loss up to step `until`; inf if it does not."""
    rows = [row for row in side.rows if row["step"] <= until]
    gaps = [(flops, own - loss) for flops, own in curve(rows, "flops", side.y)]
    above = [i for i, (_, gap) in enumerate(gaps) if gap > 0]
    return first_zero(gaps[above[-1] if above else 0 :])


def speedup_of(side, baselines):
    """(Interval, text) of the FLOPs that a baseline needs to end at the loss where a side ends, over the
    side's own.

    With a decaying learning rate a run shows what its FLOPs buy at its end alone, so the ends of baselines of
    several lengths are compared. One length gives a lower bound: where the side meets the baseline's end."""
    if side.is_baseline or not side.finished or not baselines:
        return Interval(math.nan), "-"
    lengths = [end.end["flops"] / side.end["flops"] for end in baselines]
    if len(lengths) > 1:
        gain = speedup(lengths, [difference(side.losses, end.losses) for end in baselines])
        return gain, gain.text(lambda value: times(value, lengths))
    (end,) = baselines
    factor = end.end["flops"] / reached(side, end.end[side.y])
    return Interval(math.inf), times(math.inf, [factor]) if factor else "not reached"


def undecayed_speedup(side, baselines):
    """The same, wrongly read off the longest baseline before its learning rate decays, or None."""
    longest = baselines[-1]
    if longest.facts.get("schedule") != "wsd":
        return None
    high = longest.planned * (1 - float(longest.facts["decay_ratio"]))  # steps at the high rate
    at = reached(longest, side.end[side.y], high)
    return at / side.end["flops"] if side.end["flops"] < at < math.inf else None


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
    base, switch = curve(baseline.rows, "flops", side.y), side.switch["step"]
    gap = lambda row: row[side.y] - np.interp(row["flops"], *zip(*base))
    own = [row for row in side.rows if row["step"] > switch and row["flops"] >= base[0][0]]
    steps = first_zero([(row["step"], gap(row)) for row in own]) - switch
    return "not met" if steps == math.inf else f"met about {steps:,.0f} steps after the switch"


def about(side, baselines):
    """A line about TST: its switch, and how it ends compared with the baselines."""
    said, switch = [], side.switch["step"]
    logged = [[row for row in run["rows"] if "loss" in row] for run in side.runs]
    pairs = [pair for rows in logged for pair in zip(rows, rows[1:])]
    if jumps := [(a["loss"], b["loss"]) for a, b in pairs if a["step"] == switch]:
        old, new = np.mean(jumps, axis=0)
        jump = f"{old:.3f} -> {new:.3f} ({new - old:+.3f})"
        said.append(f"training loss {jump} after step {switch:,}")
    for key, what in (("flops", "FLOPs"), ("data_tokens", "data")):
        for near in baselines:
            if abs(near.end[key] / side.end[key] - 1) < 0.01:
                said.append(f"equal {what} {difference(side.losses, near.losses).text()}")
                if key == "flops":
                    said.append(f"the baseline's validation loss {met_again(side, near)}")
    gain, text = speedup_of(side, baselines)
    if 0 < gain.value < math.inf:
        rate = exchange_rate(side, gain).text("{:.2f}".format)
        said.append(f"equal loss: a baseline needs {text} the FLOPs")
        said.append(f"exchange rate: {rate} tokens read in bags are worth one ordinary token")
    if baselines and (false := undecayed_speedup(side, baselines)):
        said.append(f"read off the longest baseline before its decay {false:.2f}x, which is wrong")
    return f"- {side.label}: {'; '.join(said)}."


def line(side, baselines):
    """Cells of the table."""
    show = lambda key, text, scale=1: text.format(side.end[key] / scale) if key in side.end else "-"
    return [
        side.label,
        side.facts["bag_size"],
        "0" if side.is_baseline else side.facts.get("superposition_ratio", "-"),
        f"{side.end['step']:,}" + ("" if side.finished else f" of {side.planned:,}"),
        seeds_text([final(run["rows"])["val_loss"] for run in side.runs]),
        show("val_bpb", "{:.4f}"),
        show("data_tokens", "{:,.2f}M", 1e6),
        show("flops", "{:.3g}"),
        show("seconds", "{:,.1f} min", 60),
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
        ax.set_axisbelow(True)
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
    n = len(panels)
    fig, axes = new_figure((1 + 4 * n, 4.8), n)
    sides = sorted(sides_of(runs), key=lambda side: not side.is_baseline)
    labels = list(dict.fromkeys(side.label for side in sides))
    for ax, panel in zip(axes, panels):
        title, x, name = PANELS[panel]
        for side in sides:
            i, many = labels.index(side.label), len(side.runs) > 1
            color = COLORS[i % len(COLORS)]
            for run in side.runs if many else []:
                ax.plot(*zip(*curve(run["rows"], x, side.y)), color=color, lw=0.8, alpha=0.45)
            look = dict(color=color, marker=MARKERS[i % len(MARKERS)], ms=4, markevery=0.05, lw=1.8)
            label = side.label + f" ({len(side.runs)} seeds)" * many + f": {side.end[side.y]:.3f}"
            ax.plot(*zip(*curve(side.rows, x, side.y)), label=label, **look)
            if x in side.switch:
                ax.axvline(side.switch[x], color=color, ls=":", label="end of superposition")
        ax.set(title=title, xlabel=name, xlim=(0, None))
    losses = [row[side.y] for side in sides for row in side.rows]
    low, high = np.nanquantile(losses, (0, 0.7))  # the first losses are too high to show
    pad = 0.08 * (high - low) or 0.05
    axes[0].set(ylim=(low - pad, high + pad), ylabel=f"validation loss ({UNITS[sides[0].y]})")
    known = dict(zip(*reversed(axes[0].get_legend_handles_labels())))
    fig.legend(known.values(), known, loc="outside lower center", ncols=2 * n - 1, frameon=False)
    return fig


def points_of(runs, knobs):
    """{point: final losses of its seeds}. A point is ((knob, value), ...) and holds the bag size; a baseline
    has no other knobs of superposition."""
    points, y = {}, measure_of(runs)
    for run in runs:
        facts = run["facts"]
        if is_baseline(facts):
            facts = {k: v for k, v in facts.items() if k not in BAGS} | dict([BASELINE])
        known = [knob for knob in dict.fromkeys([*knobs, "bag_size"]) if knob in facts]
        point = tuple((knob, facts[knob]) for knob in known)
        points.setdefault(point, []).append(final(run["rows"])[y])
    return points


def gains_of(points):
    """{point: Interval of its loss minus the loss of the baseline with the same other knobs}"""
    other = lambda point: tuple(pair for pair in point if pair[0] not in BAGS)
    baselines = {other(point): losses for point, losses in points.items() if BASELINE in point}
    bagged = [point for point in points if BASELINE not in point and other(point) in baselines]
    return {point: difference(points[point], baselines[other(point)]) for point in bagged}


def points_table(points):
    """A line for each point as markdown."""
    knobs, gains = [knob for knob, _ in max(points, key=len)], gains_of(points)
    cells = [[*knobs, "val loss", "minus baseline"]]
    for point, losses in points.items():
        values = [dict(point).get(knob, "-") for knob in knobs]
        gain = gains[point].text() if point in gains else "-"
        cells.append([*values, seeds_text(losses), gain])
    what = "Final validation loss in nats per token (bits per byte if tokenizers differ), mean ± standard "
    what += "deviation (seeds). Differences with 95 % confidence intervals."
    return f"{markdown_table(cells)}\n\n{what}"


def draw_points(points):
    """A figure over the first knob, a line for each combination of the others: differences from the baselines
    (bars: 95 %) if it is a knob of superposition, else losses (bars: standard deviation)."""
    fig, (ax,) = new_figure((7, 4.6), 1)
    x, what, lines = max(points, key=len)[0][0], "final validation loss", {}
    sd = lambda losses: np.std(losses, ddof=1) if len(losses) > 1 else 0
    values = {point: (np.mean(losses), sd(losses)) for point, losses in points.items()}
    if x in BAGS and (gains := gains_of(points)):
        values = {point: (gain.value, gain.high - gain.value) for point, gain in gains.items()}
        ax.axhline(0, color=COLORS[0], ls="--", label="baseline")
        what += " minus the baseline's"
    for point, (value, bar) in values.items():
        name = ", ".join(f"{knob} {v}" for knob, v in point if knob != x) or "TST"
        lines.setdefault(name, []).append((dict(point).get(x, "-"), value, bar))
    ax.xaxis.update_units([dict(point).get(x, "-") for point in values])  # sets their order
    for i, (name, dots) in enumerate(lines.items(), 1):
        look = dict(color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], capsize=3)
        ax.errorbar(*zip(*dots), label=name, **look)
    ax.set(xlabel=x, ylabel=what)
    ax.legend(frameon=False)
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
        try:
            runs.sort(key=lambda run: float(run["facts"][config.by]))
        except (KeyError, ValueError):
            raise UserError(f"--by={config.by} is not a number in all runs") from None
        points = points_of(runs, [config.by, "parameters"])
        print("\n\n".join([points_table(points), *notes_on_differences(runs)]))
    else:
        print(table(runs))
    if not config.no_plot:
        save_picture(draw_points(points) if config.by else draw(runs, panels), config.out)
        print(f"\nwrote {config.out}")


if __name__ == "__main__":
    entry_point(main, Config)
