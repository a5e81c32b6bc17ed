"""Compare training runs by their metrics.jsonl: a table, and validation loss at equal FLOPs, data and time.

    python plot.py out/baseline out/tst
    python plot.py out/b1 out/b2 out/t1 out/t2 --labels=baseline,baseline,TST,TST --table=results.md

A RUN is a run folder or a metrics.jsonl. Runs under one label, of one length and bag size, count as seeds of one
configuration: they share a colour, and the table gets a line with their mean, standard deviation and range. Give finished
runs of one model: a run stopped before its learning rate has decayed ends too high, and as a baseline it would flatter
the others; and equal positions are equal FLOPs only within one model. The table needs no matplotlib.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito, colour-blind safe
MARKERS = "osD^vPX"


def load_metrics(path):
    """Rows (dicts, ascending step) of a run folder or metrics.jsonl, as the run finally went.

    A resumed run writes some steps twice: where steps go back, the earlier rows from there on are dropped, and rows
    of one step become one row in which later values win. A torn last line (a killed process) is skipped with a note
    on stderr. FileNotFoundError: no such run or no metrics.jsonl. ValueError: an unreadable line, as file:line.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such run")
    if path.is_dir():
        path = path / "metrics.jsonl"
        if not path.exists():
            raise FileNotFoundError(f"{path.parent}: no metrics.jsonl in this folder")
    lines = [(n, line) for n, line in enumerate(path.read_text(errors="replace").split("\n"), 1) if line.strip()]
    rows = []
    for n, line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            if n != lines[-1][0]:
                raise ValueError(f"{path}:{n}: not a JSON object: {line[:40]!r}") from None
            print(f"note: {path}:{n}: torn last line skipped", file=sys.stderr)
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), (int, float)):
            raise ValueError(f"{path}:{n}: not a JSON object with a step")
        row = {key: value for key, value in row.items() if value is not None}
        if rows and row["step"] < rows[-1]["step"]:
            rows = [old for old in rows if old["step"] < row["step"]]
        if rows and row["step"] == rows[-1]["step"]:
            row = rows.pop() | row
        rows.append(row)
    return rows


def final(rows):
    """The last row with a validation loss. ValueError if there is none."""
    for row in reversed(rows):
        if "val_loss" in row:
            return row
    raise ValueError("no validation rows")


def bag_size_of(rows):
    """Largest bag size of the run: 1 for a baseline."""
    return max((row.get("bag_size", 1) for row in rows), default=1)


def superposition_ratio(rows):
    """Share of the steps so far spent in superposition, as measured: 0 for a baseline."""
    bag_size = bag_size_of(rows)
    if bag_size == 1:
        return 0.0
    # Data per position is exactly 1 + r(s-1), whatever the logging interval; the steps of logged rows only bracket r.
    # Bags in the output alone read no extra data: those runs are left to the steps.
    last = next((row for row in reversed(rows) if row.get("positions") and "data_tokens" in row), None)
    if last and last["data_tokens"] > last["positions"]:
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
        keys = [key for key in ("val_loss", "val_bpb", "positions", "data_tokens", "flops", "seconds")
                if all(key in row for row in rows)]
        mean.append({"step": step} | {key: sum(row[key] for row in rows) / len(rows) for key in keys})
    return mean


def baseline_ends(baselines):
    """[(FLOPs, loss)] at the end of the baselines, the lowest loss of each length (FLOPs within 1 %)."""
    lengths = []
    for end in sorted(point for rows in baselines for point in curve([final(rows)], "flops") if point[0] > 0):
        if lengths and end[0] <= 1.01 * lengths[-1][0]:
            lengths[-1] = min(lengths[-1], end, key=lambda point: point[1])
        else:
            lengths.append(end)
    return lengths


def speedup(tst, baselines):
    """(relation, factor): the FLOPs a baseline needs for a loss of the run `tst`, over the FLOPs `tst` needs for it.

    With a decaying learning rate a run shows what its FLOPs can buy only at its end. So with baselines of several
    lengths the ends are compared: the FLOPs at which a baseline would end at tst's final loss, linear in loss over
    log FLOPs between neighbouring lengths ("="); beyond the longest or the shortest baseline only a bound (">", "<").
    With one length it is the point from which tst stays at or below the baseline's final loss, linear between its
    validation rows (">=": ending there, with its decay done, tst would have been lower still), or "not reached".
    "unknown": no FLOPs in the rows, or no baselines.
    """
    ends, points = baseline_ends(baselines), [p for p in curve(tst, "flops") if p[0] > 0]
    if not ends or "flops" not in final(tst):
        return "unknown", None
    if not points or not math.isfinite(final(tst)["val_loss"]):
        return "not reached", None  # diverged
    if len(ends) == 1:
        (base_flops, target), start = ends[0], len(points)
        while start and points[start - 1][1] <= target:
            start -= 1
        if start == len(points):
            return "not reached", None
        flops, loss = points[start]
        if start:  # before the first validation row nothing is known: then its own FLOPs are the cautious answer
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


def grouped(runs):
    """Lists of runs that differ by seed alone, as far as the rows show: same label, length and bag size."""
    groups = {}
    for run in runs:
        groups.setdefault((run["label"], final(run["rows"])["step"], bag_size_of(run["rows"])), []).append(run)
    return list(groups.values())


def table(runs):
    """The comparison as a markdown table. `runs`: dicts of name, label, rows and baseline (bool)."""
    finite = [run for run in runs if run["baseline"] and math.isfinite(final(run["rows"])["val_loss"])]
    baselines = [mean_run([run["rows"] for run in group]) for group in grouped(finite)]  # seeds averaged, then the best

    def line(name, rows, run, spread=""):
        end = final(rows)
        relation, factor = ("unknown", None) if run["baseline"] else speedup(rows, baselines)
        show = lambda key, text, scale=1: text.format(end[key] / scale) if key in end else "-"
        return [name, str(bag_size_of(run["rows"])), f"{superposition_ratio(run['rows']):.3g}", f"{end['step']:,}",
                show("val_loss", "{:.4f}") + spread, show("val_bpb", "{:.4f}"), show("data_tokens", "{:,.2f}M", 1e6),
                show("flops", "{:.3g}"), show("seconds", "{:,.1f} min", 60),
                "-" if relation == "unknown" else relation if factor is None
                else f"{'' if relation == '=' else relation + ' '}{factor:.2f}x"]

    cells = [["run", "bag size", "r", "steps", "val loss", "bits/byte", "data tokens", "FLOPs", "time", "speed-up"]]
    for run in runs:
        label = "" if run["label"] == run["name"] else f" ({run['label']})"
        cells.append(line(run["name"] + label, run["rows"], run))
    for group in (group for group in grouped(runs) if len(group) > 1):
        losses = [final(run["rows"])["val_loss"] for run in group]
        cells.append(line(f"{group[0]['label']}, mean of {len(group)}", mean_run([run["rows"] for run in group]),
                          group[0], f" (sd {np.std(losses, ddof=1):.4f}, range {max(losses) - min(losses):.4f})"))
    cells.insert(1, ["-:"] * len(cells[0]))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.rjust(width, "-" if cell == "-:" else " ") for cell, width in zip(row, widths))
             + " |" for row in cells]
    lengths = len(baseline_ends(baselines))
    how = {0: "no baseline with FLOPs given",
           1: "one baseline length, so a lower bound: where the curve reaches the baseline's final loss"}.get(
        lengths, f"final losses against baselines of {lengths} lengths, interpolated over log FLOPs")
    return "\n".join(lines + ["", f"Validation loss in nats per token. Speed-up in FLOPs at equal loss ({how})."])


def loss_limits(groups, means):
    """y limits that show the end of the runs: validation losses from a third of their ordinary training on.

    Superposition is left out of the choice: its next-token loss lies far above, and falls soon after the switch.
    """
    losses = []
    for group, rows in zip(groups, means):
        switch = max((row["step"] for row in group[0]["rows"] if row.get("bag_size", 1) > 1), default=0)
        start = switch + (rows[-1]["step"] - switch) / 3
        losses += [loss for step, loss in curve(rows, "step") if step >= start]
    low, high = min(losses, default=0), max(losses, default=1)
    pad = 0.08 * (high - low) or 0.05
    return low - pad, high + pad


def draw(runs, out, title=None):
    """Write three panels of validation loss, against positions, data and time, to `out`. ImportError: no matplotlib."""
    try:
        from matplotlib.figure import Figure  # without pyplot: draws with Agg, needs no display
        from matplotlib.lines import Line2D
    except ImportError:
        raise ImportError("drawing needs the package matplotlib; --no_plot prints the table alone") from None
    groups = grouped(runs)
    means = [group[0]["rows"] if len(group) == 1 else mean_run([run["rows"] for run in group]) for group in groups]
    low, high = loss_limits(groups, means)
    labels = list(dict.fromkeys(run["label"] for run in sorted(runs, key=lambda run: not run["baseline"])))
    style = {label: (COLORS[i % len(COLORS)], MARKERS[(i + i // len(COLORS)) % len(MARKERS)]) for i, label in enumerate(labels)}
    counts = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
    times = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
    panels = (("Equal FLOPs", "positions", "transformer positions", counts),
              ("Equal data", "data_tokens", "data tokens", counts), ("Equal time", "seconds", "training time", times))
    fig = Figure(figsize=(13, 4.8), layout="constrained", dpi=150)
    axes = fig.subplots(1, 3, sharey=True)
    for ax, (heading, key, quantity, units) in zip(axes, panels):
        longest = max((x for run in runs for x, _ in curve(run["rows"], key)), default=0)
        scale, unit = next((unit for unit in units if longest >= 2 * unit[0]), units[-1])
        ends = []
        for group, mean in zip(groups, means):
            color, marker = style[group[0]["label"]]

            def plot(rows, y, **look):
                points = curve(rows, key, y)
                every = len(points) // 20 + 1  # at most 20 markers a curve, one of them at its end
                ax.plot([x / scale for x, _ in points], [y for _, y in points], color=color,
                        markevery=((len(points) - 1) % every, every), **look)

            one = group[0]["rows"]  # training loss and switch of one seed stand for all
            bagged = [row for row in one if row.get("bag_size", 1) > 1]
            # the training loss of superposition is another quantity, and is not drawn
            plot([row for row in one if row.get("bag_size", 1) == 1], "loss", lw=0.6, alpha=0.25, zorder=1)
            if len(group) > 1:
                for run in group:
                    plot(run["rows"], "val_loss", lw=0.8, alpha=0.45, zorder=2)
            plot(mean, "val_loss", lw=1.8, marker=marker, ms=4, zorder=3)
            if bagged and key in bagged[-1]:
                ax.axvline(bagged[-1][key] / scale, color=color, ls=":", lw=1.3, zorder=0)
            ends += [(loss, x / scale, color) for x, loss in curve([final(mean)], key)]
        right = 1.22 * longest / scale or 1
        placed = []  # final values stand beside the ends of their curves, pushed up where they would overlap
        for loss, x, color in sorted(ends):
            y = min(max(loss, low), high)
            for other_x, other_y in placed:
                if abs(other_x - x) < 0.2 * right:
                    y = max(y, other_y + 0.045 * (high - low))
            placed.append((x, y))
            ax.annotate(f"{loss:.3f}", (x, y), (7, 0), textcoords="offset points", va="center", color=color, fontsize=9,
                        bbox=dict(boxstyle="round,pad=0.1", fc="white", ec="none", alpha=0.7), zorder=4)
        ax.set(title=heading, xlabel=f"{quantity} ({unit})", xlim=(0, right), ylim=(low, high))
        ax.grid(color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("validation loss (nats per token)")
    handles = []
    for label, (color, marker) in style.items():
        count = sum(run["label"] == label for run in runs)
        handles.append(Line2D([], [], color=color, marker=marker, ms=5, lw=1.8,
                              label=label + (f" ({count} runs)" if count > 1 else "")))
    handles.append(Line2D([], [], color="0.6", lw=0.8, label="training loss, ordinary steps"))
    if any(bag_size_of(run["rows"]) > 1 for run in runs):
        handles.append(Line2D([], [], color="0.4", lw=1.3, ls=":", label="end of superposition"))
    fig.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False)
    if title:
        fig.suptitle(title)
    fig.savefig(out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a metrics.jsonl")
    parser.add_argument("--out", default="curves.png", help="picture; its ending sets the format (default %(default)s)")
    parser.add_argument("--baseline", metavar="NAME", help="name or label of the baselines (default: bag size 1)")
    parser.add_argument("--labels", metavar="A,B", help="one label per run; equal labels are seeds of one side")
    parser.add_argument("--title", help="heading of the picture")
    parser.add_argument("--table", metavar="FILE", help="write the table as markdown, too")
    parser.add_argument("--no_plot", action="store_true", help="print the table alone")
    args = parser.parse_intermixed_args(argv)
    try:
        folders = [path.parent if path.is_file() else path for path in map(Path, args.runs)]
        names = [path.resolve().name for path in folders]
        names = [str(path) if names.count(name) > 1 else name for path, name in zip(folders, names)]
        labels = args.labels.split(",") if args.labels else names
        if len(labels) != len(names):
            raise ValueError(f"--labels has {len(labels)} labels for {len(names)} runs")
        if args.baseline and args.baseline not in names + labels:
            raise ValueError(f"--baseline={args.baseline} is none of {', '.join(dict.fromkeys(names + labels))}")
        runs = []
        for path, name, label in zip(args.runs, names, labels):
            rows = load_metrics(path)
            if not any("val_loss" in row for row in rows):
                raise ValueError(f"{path}: no validation rows")
            baseline = args.baseline in (name, label) if args.baseline else bag_size_of(rows) == 1
            runs.append(dict(name=name, label=label, rows=rows, baseline=baseline))
        text = table(runs)
        print(text)
        if args.table:
            Path(args.table).write_text(text + "\n")
        if not args.no_plot:
            draw(runs, args.out, args.title)
            print(f"wrote {args.out}")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"plot.py: {error}")


if __name__ == "__main__":
    main()
