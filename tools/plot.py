"""Compare training runs: a table, and validation loss at equal FLOPs, data and time. Reads what train.py
writes, or what tools/keep.py has kept of it in results/.

Where runs differ in more than the table shows (model, corpus, learning rate) a note names it, and runs of
different tokenizers are compared in bits per byte.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanotst import UserError, configurator
from tools.picture import COLORS, MARKERS, new_figure, save_picture, tidy
from tools.runs import final, markdown_table, measure_of, notes_on_differences, read_runs


@dataclass
class Config:
    """Usage: python -m tools.plot RUN [RUN ...] [--key=value ...]

    python -m tools.plot out/baseline out/tst
    python -m tools.plot out/b1 out/b2 out/t1 out/t2 --labels=baseline,baseline,TST,TST --table=table.md
    python -m tools.plot results/curves              what is kept there, drawn again
    python -m tools.plot results/moe/TST out/mine    kept runs of one name or label, and a new run

    Runs of one label, length and bag size count as seeds of one configuration: they share a colour, and the
    table gets a line with their mean, standard deviation and range. Give finished runs: one that was stopped
    before its learning rate has decayed ends too high, and as a baseline it would flatter the others.
    """

    runs: list[str]  # run folders, metrics.jsonl files, kept folders, or KEPT/NAME, KEPT/LABEL
    out: str = "curves.png"  # the picture; its ending sets the format
    table: str = ""  # write the table to this file, too, as markdown
    labels: str = (
        ""  # one label for each run, comma-separated; equal labels are seeds of one configuration
    )
    baseline: str = ""  # name or label of the baselines; empty: the runs of bag size 1
    title: str = ""  # heading of the picture
    no_plot: bool = False  # print the table alone, which needs no matplotlib


# ---------------------------------------------------------------------------------------------- measurements


def bag_size_of(rows):
    """Largest bag size of the run: 1 for a baseline."""
    return max((row.get("bag_size", 1) for row in rows), default=1)


def superposition_ratio(rows):
    """Share of the steps so far spent in superposition, as measured: 0 for a baseline."""
    bag_size = bag_size_of(rows)
    if bag_size == 1:
        return 0.0
    # Data per position is exactly 1 + r(s-1), whatever the logging interval; the steps of logged rows only
    # bracket r. Bags in the output alone read no extra data, and bags that shrink read less: these go by
    # steps.
    last = next(
        (row for row in reversed(rows) if row.get("positions") and "data_tokens" in row), None
    )
    sizes = {row.get("bag_size", 1) for row in rows} - {1}
    if last and last["data_tokens"] > last["positions"] and len(sizes) == 1:
        return (last["data_tokens"] / last["positions"] - 1) / (bag_size - 1)
    return max(row["step"] for row in rows if row.get("bag_size", 1) > 1) / max(rows[-1]["step"], 1)


def curve(rows, x, y="val_loss"):
    """[(x, y)] of the rows that know both, finite."""
    points = [(row[x], row[y]) for row in rows if x in row and y in row]
    return [point for point in points if all(map(math.isfinite, point))]


def mean_run(runs):
    """One run's rows from several seeds: means over the steps at which every seed has a validation row."""
    by_step = [{row["step"]: row for row in rows if "val_loss" in row} for rows in runs]
    mean = []
    for step in sorted(set.intersection(*map(set, by_step))):
        rows = [run[step] for run in by_step]
        keys = ("val_loss", "val_bpb", "positions", "data_tokens", "flops", "seconds")
        keys = [key for key in keys if all(key in row for row in rows)]
        mean.append(
            {"step": step} | {key: sum(row[key] for row in rows) / len(rows) for key in keys}
        )
    return mean


def baseline_ends(baselines, y="val_loss"):
    """[(FLOPs, loss)] at the end of the baselines, the lowest loss of each length (FLOPs within 1 %)."""
    lengths = []
    for end in sorted(
        point for rows in baselines for point in curve([final(rows)], "flops", y) if point[0] > 0
    ):
        if lengths and end[0] <= 1.01 * lengths[-1][0]:
            lengths[-1] = min(lengths[-1], end, key=lambda point: point[1])
        else:
            lengths.append(end)
    return lengths


def speedup(tst, baselines, y="val_loss"):
    """(relation, factor): the FLOPs a baseline needs for a loss of the run `tst`, over the FLOPs `tst` needs.

    With a decaying learning rate a run shows what its FLOPs can buy only at its end. So with baselines of
    several lengths the ends are compared: the FLOPs at which a baseline would end at tst's final loss, linear
    in loss over log FLOPs between neighbouring lengths ("="); beyond the longest or the shortest only a bound
    (">", "<"). With one length it is the point from which tst stays at or below the baseline's final loss,
    linear between its validation rows (">=": ending there, decayed, tst would have been lower still), or "not
    reached". "unknown": no FLOPs in the rows, or no baselines.
    """
    ends, points = baseline_ends(baselines, y), [p for p in curve(tst, "flops", y) if p[0] > 0]
    if not ends or "flops" not in final(tst):
        return "unknown", None
    if not points or not math.isfinite(final(tst)[y]):
        return "not reached", None  # diverged
    if len(ends) == 1:
        (base_flops, target), start = ends[0], len(points)
        while start and points[start - 1][1] <= target:
            start -= 1
        if start == len(points):
            return "not reached", None
        flops, loss = points[start]
        if start:  # before the first validation row nothing is known: take its own FLOPs
            f0, l0 = points[start - 1]
            flops = f0 + (flops - f0) * (l0 - target) / (l0 - loss)
        return ">=", base_flops / flops
    tst_flops, target = points[-1]
    if target > ends[0][1]:
        return "<", ends[0][0] / tst_flops
    for (f0, l0), (f1, l1) in zip(ends, ends[1:]):
        if l0 >= target >= l1:
            share = (l0 - target) / (l0 - l1) if l0 > l1 else 0
            return "=", f0 * (f1 / f0) ** share / tst_flops
    return ">", ends[-1][0] / tst_flops


def switches(rows):
    """[(row, row)] for each switch: the last logged row on larger bags, and the first on smaller ones."""
    logged = [row for row in rows if "loss" in row and "bag_size" in row]
    return [(old, new) for old, new in zip(logged, logged[1:]) if new["bag_size"] < old["bag_size"]]


def met_again(tst, baseline, switch, y="val_loss"):
    """(relation, steps): how long after step `switch` the run `tst` is at the loss that the baseline has at
    the same FLOPs, linear between validation rows ("="); at most so many steps, where its first validation
    row after the switch is there already ("<="); "not met"; or "unknown": no baseline, or no FLOPs."""
    base, before = curve(baseline, "flops", y), None
    for row in (row for row in tst if row["step"] > switch and y in row and "flops" in row):
        if not base or not base[0][0] <= row["flops"] <= 1.001 * base[-1][0]:
            continue
        gap = row[y] - np.interp(row["flops"], *zip(*base))
        if gap <= 0:
            if before is None:
                return "<=", row["step"] - switch
            step, old = before
            return "=", step + (row["step"] - step) * old / (old - gap) - switch
        before = row["step"], gap
    return ("not met" if before else "unknown"), None


def grouped(runs):
    """Lists of runs that differ by seed alone, as far as the rows show: same label, length and bag size."""
    groups = {}
    for run in runs:
        alike = run["label"], final(run["rows"])["step"], bag_size_of(run["rows"])
        groups.setdefault(alike, []).append(run)
    return list(groups.values())


def mean_of(group):
    """The rows of a group: those of its one run, or the mean of its seeds."""
    return group[0]["rows"] if len(group) == 1 else mean_run([run["rows"] for run in group])


# ----------------------------------------------------------------------------------------------------- table


def table_line(name, rows, run, baselines, y, spread=""):
    """The cells of one line of the table."""
    end = final(rows)
    relation, factor = ("unknown", None) if run["baseline"] else speedup(rows, baselines, y)
    gain = {"unknown": "-", "=": ""}.get(relation, relation) + (f" {factor:.2f}x" if factor else "")
    show = lambda key, text, scale=1: text.format(end[key] / scale) if key in end else "-"
    bags = dict.fromkeys(str(row["bag_size"]) for row in run["rows"] if row.get("bag_size", 1) > 1)
    cells = [
        name,
        "-".join(bags) or "1",
        f"{superposition_ratio(run['rows']):.3g}",
        f"{end['step']:,}",
    ]
    cells += [show("val_loss", "{:.4f}") + spread, show("val_bpb", "{:.4f}")]
    cells += [
        show("data_tokens", "{:,.2f}M", 1e6),
        show("flops", "{:.3g}"),
        show("seconds", "{:,.1f} min", 60),
    ]
    return [*cells, gain.strip()]


def switch_line(group, baselines, y):
    """What the switch does to a group of runs: the jump of training loss, and how soon it is made good."""
    seeds = [switches(run["rows"]) for run in group]
    if not seeds[0] or len(set(map(len, seeds))) > 1:
        return None
    jumps = []
    for pairs in zip(*seeds):  # of one switch
        old, new = (np.mean([pair[i]["loss"] for pair in pairs]) for i in (0, 1))
        jumps.append(
            f"{old:.3f} -> {new:.3f} ({new - old:+.3f}) after step {pairs[0][0]['step']:,}"
        )
    end = final(group[0]["rows"]).get("flops", 0)
    nearest = lambda rows: (
        round(abs(final(rows).get("flops", 0) / (end or 1) - 1), 2),
        final(rows)[y],
    )
    baseline = min(baselines, key=nearest, default=[])  # of baselines of one length the best
    relation, steps = met_again(mean_of(group), baseline, seeds[0][-1][0]["step"], y)
    said = {
        "=": f"; validation loss is the baseline's at equal FLOPs about {steps or 0:,.0f} steps later",
        "<=": f"; validation loss is below the baseline's at equal FLOPs by {steps or 0:,} steps later",
        "not met": "; validation loss stays above the baseline's at equal FLOPs",
    }
    return f"- {group[0]['label']}: training loss {', '.join(jumps)}{said.get(relation, '')}."


def table(runs):
    """The comparison as a markdown table. `runs`: dicts of name, label, rows, facts and baseline (bool)."""
    y = measure_of(runs)
    finite = [
        run for run in runs if run["baseline"] and math.isfinite(final(run["rows"])["val_loss"])
    ]
    baselines = [mean_of(group) for group in grouped(finite)]  # seeds averaged, then the best
    header = ["run", "bag size", "r", "steps", "val loss", "bits/byte", "data tokens", "FLOPs"]
    header += ["time", "speed-up"]
    cells = [header]
    for run in runs:
        label = "" if run["label"] == run["name"] else f" ({run['label']})"
        cells.append(table_line(run["name"] + label, run["rows"], run, baselines, y))
    for group in (group for group in grouped(runs) if len(group) > 1):
        losses = [final(run["rows"])["val_loss"] for run in group]
        spread = f" (sd {np.std(losses, ddof=1):.4f}, range {max(losses) - min(losses):.4f})"
        name = f"{group[0]['label']}, mean of {len(group)}"
        cells.append(table_line(name, mean_of(group), group[0], baselines, y, spread))
    lines = [markdown_table(cells)]

    lengths = len(baseline_ends(baselines, y))
    how = f"final losses against baselines of {lengths} lengths, interpolated over log FLOPs"
    if lengths < 2:
        how = "one baseline length, so a lower bound: where the curve reaches the baseline's final loss"
        how = how if lengths else "no baseline with FLOPs given"
    notes = [f"Validation loss in nats per token. Speed-up in FLOPs at equal loss ({how})."]
    notes += notes_on_differences(runs)
    if switched := [line for group in grouped(runs) if (line := switch_line(group, baselines, y))]:
        notes.append("At the switch:\n\n" + "\n".join(switched))
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes)


# --------------------------------------------------------------------------------------------------- picture


def loss_limits(groups, means, y="val_loss"):
    """y limits that show the end of the runs: validation losses from a third of their ordinary training on.

    Superposition is left out of the choice: its next-token loss lies far above.
    """
    losses = []
    for group, rows in zip(groups, means):
        switch = max(
            (row["step"] for row in group[0]["rows"] if row.get("bag_size", 1) > 1), default=0
        )
        start = switch + (rows[-1]["step"] - switch) / 3
        losses += [loss for step, loss in curve(rows, "step", y) if step >= start]
    low, high = min(losses, default=0), max(losses, default=1)
    pad = 0.08 * (high - low) or 0.05
    return low - pad, high + pad


def panels_of(runs):
    """(heading, key of the rows, what it counts, [(scale, its name)]) of the three panels."""
    counts = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
    times = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
    panels = [
        ("Equal FLOPs", "positions", "transformer positions", counts),
        ("Equal data", "data_tokens", "data tokens", counts),
        ("Equal time", "seconds", "training time", times),
    ]
    ends = [final(run["rows"]) for run in runs]
    costs = [
        end["flops"] / end["positions"] for end in ends if end.get("flops") and end.get("positions")
    ]
    if costs and max(costs) > 1.01 * min(
        costs
    ):  # equal positions are equal FLOPs within one model only
        powers = [(10.0**n, f"10$^{{{n}}}$") for n in range(24, 5, -3)]
        panels[0] = ("Equal FLOPs", "flops", "FLOPs", powers)
    return panels


def draw_group(ax, group, mean, x_of, y, color, marker, noisy):
    """The curves of one configuration: validation loss, that of its seeds, where bags end, and, if `noisy`,
    training loss (one run stands for all). x_of(row): where a row stands, None if that is not known."""

    def line(rows, key, scale=1.0, **look):
        points = [
            (x_of(row), row[key] * scale) for row in rows if key in row and x_of(row) is not None
        ]
        points = [point for point in points if all(map(math.isfinite, point))]
        every = len(points) // 20 + 1  # at most 20 markers a curve, one of them at its end
        look |= dict(color=color, markevery=((len(points) - 1) % every, every))
        ax.plot([x for x, _ in points], [loss for _, loss in points], **look)

    first = group[0]["rows"]
    bagged = [
        row for row in first if row.get("bag_size", 1) > 1
    ]  # their training loss is another quantity
    ordinary = [row for row in first if row.get("bag_size", 1) == 1]
    per_nat = 1.0 if y == "val_loss" else final(first)[y] / final(first)["val_loss"]
    if noisy:
        line(ordinary, "loss", per_nat, lw=0.6, alpha=0.2, zorder=1, label="training loss")
    for run in group if len(group) > 1 else ():
        line(run["rows"], y, lw=0.8, alpha=0.45, zorder=2, label="one seed")
    line(mean, y, lw=1.8, marker=marker, ms=4, zorder=3, label=group[0]["label"])
    if bagged and x_of(bagged[-1]) is not None:
        ax.axvline(x_of(bagged[-1]), color=color, ls=":", lw=1.3, zorder=0, label="switch")


def label_ends(ax, ends, width, low, high):
    """Write final values beside the ends of curves, [(loss, x, color)], moved up where they would overlap."""
    placed = []
    for loss, x, color in sorted(ends):
        y = min(max(loss, low), high)
        for other_x, other_y in placed:
            if abs(other_x - x) < 0.2 * width:
                y = max(y, other_y + 0.045 * (high - low))
        placed.append((x, y))
        box = dict(boxstyle="round,pad=0.1", fc="white", ec="none", alpha=0.7)
        look = dict(
            textcoords="offset points", va="center", color=color, fontsize=9, bbox=box, zorder=4
        )
        ax.annotate(f"{loss:.3f}", (x, y), (7, 0), **look)


def draw(runs, title=""):
    """A figure of three panels of validation loss: against positions (or FLOPs), data and time."""
    fig, axes = new_figure((13, 4.8), 1, 3, "--no_plot prints the table alone", sharey=True)
    from matplotlib.lines import Line2D  # here, as new_figure says it if there is no matplotlib

    y, groups = measure_of(runs), grouped(runs)
    means = [mean_of(group) for group in groups]
    low, high = loss_limits(groups, means, y)
    noisy = len(runs) <= 2  # more curves are drawn without the training loss, which would hide them
    labels = list(
        dict.fromkeys(run["label"] for run in sorted(runs, key=lambda run: not run["baseline"]))
    )
    style = {}
    for i, label in enumerate(labels):
        style[label] = COLORS[i % len(COLORS)], MARKERS[(i + i // len(COLORS)) % len(MARKERS)]

    for ax, (heading, key, quantity, units) in zip(axes, panels_of(runs)):
        longest = max((x for run in runs for x, _ in curve(run["rows"], key, y)), default=0)
        scale, unit = next((unit for unit in units if longest >= 2 * unit[0]), units[-1])
        x_of = lambda row, key=key, scale=scale: row[key] / scale if key in row else None
        width, ends = 1.22 * longest / scale or 1, []
        for group, mean in zip(groups, means):
            color, marker = style[group[0]["label"]]
            draw_group(ax, group, mean, x_of, y, color, marker, noisy)
            ends += [(loss, x / scale, color) for x, loss in curve([final(mean)], key, y)]
        label_ends(ax, ends, width, low, high)
        ax.set(title=heading, xlabel=f"{quantity} ({unit})", xlim=(0, width), ylim=(low, high))
        tidy(ax)
    axes[0].set_ylabel(
        f"validation loss ({'nats per token' if y == 'val_loss' else 'bits per byte'})"
    )

    handles = []
    for label, (color, marker) in style.items():
        count = sum(run["label"] == label for run in runs)
        text = label + (f" ({count} runs)" if count > 1 else "")
        handles.append(Line2D([], [], color=color, marker=marker, ms=5, lw=1.8, label=text))
    if noisy:
        handles.append(Line2D([], [], color="0.6", lw=0.8, label="training loss, ordinary steps"))
    if any(bag_size_of(run["rows"]) > 1 for run in runs):
        handles.append(Line2D([], [], color="0.4", lw=1.3, ls=":", label="end of superposition"))
    wide = (
        sum(len(handle.get_label()) + 8 for handle in handles) > 150
    )  # characters that fit in a line
    fig.legend(
        handles=handles,
        loc="outside lower center",
        ncols=4 if wide else len(handles),
        frameon=False,
    )
    if title:
        fig.suptitle(title)
    return fig


def main(config):
    runs = read_runs(config.runs)
    labels = (
        config.labels.split(",") if config.labels else [run["label"] or run["name"] for run in runs]
    )
    if len(labels) != len(runs):
        raise UserError(f"--labels has {len(labels)} labels for {len(runs)} runs")
    names = [run["name"] for run in runs] + labels
    if config.baseline and config.baseline not in names:
        raise UserError(
            f"--baseline={config.baseline} is none of {', '.join(dict.fromkeys(names))}"
        )
    for run, label in zip(runs, labels):
        run["label"] = label
        named = config.baseline in (run["name"], label)
        run["baseline"] = named if config.baseline else bag_size_of(run["rows"]) == 1
    text = table(runs)
    print(text)
    if config.table:
        Path(config.table).write_text(text + "\n", encoding="utf-8")
    if not config.no_plot:
        save_picture(draw(runs, config.title), config.out)
        print(f"\nwrote {config.out}")


if __name__ == "__main__":
    configurator.entry_point(main, Config)
