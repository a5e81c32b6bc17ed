"""Train a grid of runs, several at a time, and set their final losses side by side.

    python -m tools.sweep config/curves.py --bag_size=1,2,4 --superposition_ratio=0.2,0.3 --seed=1,2 --jobs=2

Any knob of train.py may take several values, between commas; dataset and reinit_at_switch, of which one value
may hold commas, between semicolons ('--reinit_at_switch=;embedding,head;optimizer' is three). Combinations
that are one and the same run are trained once: ordinary training (bag size 1, or no superposition) has no use
for the knobs of superposition, nor AdamW for Muon's.

Start the same command again, or a larger grid in the same out_dir, and it goes on: what is done is skipped,
what was cut off is resumed, what failed is tried again. Ctrl-C stops all runs at a checkpoint.

At the end out_dir holds table.md, runs.csv and sweep.png: mean and spread of the seeds by two of the knobs,
as in the paper's tables of superposition_ratio and bag_size.
"""

import csv
import dataclasses
import itertools
import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanotst import UserError
from nanotst.configurator import entry_point
from tools.picture import COLORS, new_figure, save_picture, tidy
from tools.runner import (
    IDLE,
    SHORT,
    SUPERPOSITION,
    TRAINER,
    as_text,
    find_folders,
    knobs_of,
    make_member,
    places,
    read_arguments,
    run_members,
)
from tools.runs import FREE, markdown_table


@dataclass
class Config:
    """Usage: python -m tools.sweep [CONFIG.py ...] --key=VALUE[,VALUE ...] ... [--jobs=N]

    The keys are those of train.py; several values make a grid. Those of dataset and reinit_at_switch stand
    between semicolons, since a value of these may hold commas. Beside them:"""

    arguments: list[str]  # config files and knobs of train.py

    # Runs
    out_dir: str = "out/sweep"  # each run gets a folder in it
    jobs: int = 0  # runs at a time; 0: one per GPU, or one
    threads: int = 0  # CPU threads of a run; 0: its share of the cores
    gpus: str = (
        "auto"  # numbers of the GPUs to share out among the runs, such as 0,2; auto: all; none
    )
    train: bool = True  # False: only tabulate what is there

    # Table and picture
    rows: str = ""  # the knob that varies along the rows; empty: superposition_ratio if it varies
    columns: str = ""  # and along the columns; empty: bag_size if it varies
    best_of: str = (
        "learning_rate"  # each cell takes the best of this knob's values; none: no choice
    )
    plot: bool = True  # write sweep.png (needs matplotlib)


# --------------------------------------------------------------------------------------------------- the grid


def plan(arguments, out_dir, trainer=TRAINER):
    """(members, varied): the distinct runs of a grid, and the knobs with several values, the seed last."""
    knobs = knobs_of(trainer)
    settings, files, grid = read_arguments(arguments, knobs, Config)
    varied = sorted((k for k, values in grid.items() if len(values) > 1), key=lambda k: k == "seed")
    if free := [k for k in varied if k in FREE]:
        raise UserError(f"--{free[0]} takes one value: nothing is learned otherwise with another")
    distinct = {}
    for values in itertools.product(*grid.values()):
        member = make_member(settings, files, dict(zip(grid, values)), varied, out_dir)
        distinct.setdefault(json.dumps(member.settings, sort_keys=True), member)
    members = list(distinct.values())
    names = [member.name for member in members]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(
            f"two runs would be called {twice.pop()}: a folder's name cannot tell them apart"
        )
    find_folders(members, out_dir, knobs)
    if len(members) < (combinations := math.prod(map(len, grid.values()))):
        print(
            f"{combinations} combinations are {len(members)} runs: some differ in what does nothing there"
        )
    return members, [k for k in varied if any(k in member.point for member in members)]


# -------------------------------------------------------------------------------------------------- the table


@dataclass
class Group:
    """The runs of one point that differ by their seeds alone."""

    point: dict  # without the seed
    losses: list  # final validation losses of the runs that are done
    planned: int  # runs
    note: str = ""  # what was chosen as best

    @property
    def mean(self):
        return float(np.mean(self.losses)) if self.losses else math.nan

    @property
    def sd(self):
        return float(np.std(self.losses, ddof=1)) if len(self.losses) > 1 else math.nan

    @property
    def whole(self):
        return len(self.losses) == self.planned and math.isfinite(self.mean)

    def text(self):
        if not self.losses:
            return "not done"
        n = f"{len(self.losses)}" + (
            "" if len(self.losses) == self.planned else f" of {self.planned}"
        )
        spread = f" ± {self.sd:.4f}" if len(self.losses) > 1 else ""
        return f"{self.mean:.4f}{spread} ({n}{', ' + self.note if self.note else ''})"


def groups_of(members):
    """Groups of the members, in their order."""
    groups = {}
    for member in members:
        point = {k: v for k, v in member.point.items() if k != "seed"}
        group = groups.setdefault(json.dumps(point), Group(point, [], 0))
        group.planned += 1
        if (end := member.end()) is not None:
            group.losses.append(end["val_loss"])
    return list(groups.values())


def take_best(groups, knob):
    """(groups, edges): of those that differ in `knob` alone, the one with the lowest mean, its value as the
    note; and how many times that value was the lowest or highest, so that a better one may lie beyond."""
    alike, edges = {}, 0
    for group in groups:
        rest = {k: v for k, v in group.point.items() if k != knob}
        alike.setdefault(json.dumps(rest, sort_keys=True), []).append(group)
    chosen = []
    for rest, candidates in alike.items():
        best = min(candidates, key=lambda g: (not g.whole, g.mean if g.losses else math.inf))
        values = [g.point[knob] for g in candidates if knob in g.point]
        note = f"{SHORT.get(knob, knob)} {as_text(best.point[knob])}" if knob in best.point else ""
        edges += (
            len(values) > 1 and is_scale(values) and best.point[knob] in (min(values), max(values))
        )
        chosen.append(dataclasses.replace(best, point=json.loads(rest), note=note))
    return chosen, edges


@dataclass
class Table:
    """One table of the report: cells by (row value, column value), and baselines that have neither."""

    title: str
    rows: str  # knobs; "" for a single row
    columns: str
    cells: dict
    baselines: list

    @property
    def row_values(self):
        return ordered(row for row, _ in self.cells)

    @property
    def column_values(self):
        return ordered(column for _, column in self.cells)

    @property
    def best(self):
        whole = [group for group in [*self.cells.values(), *self.baselines] if group.whole]
        return min(whole, key=lambda group: group.mean, default=None)

    @property
    def limits(self):
        """(lowest, highest) loss to show: all but what lies far above most, which would press the rest
        together."""
        means = [
            group.mean
            for group in [*self.cells.values(), *self.baselines]
            if math.isfinite(group.mean)
        ]
        low, most = np.quantile(means, (0, 0.75)) if means else (0, 1)
        baselines = [group.mean for group in self.baselines if math.isfinite(group.mean)]
        return low, max([min(max(means, default=1), low + 3 * (most - low)), *baselines])


def ordered(values):
    """Distinct values, numbers by size and everything else as it came."""
    values = list(dict.fromkeys(values))
    return sorted(values) if all(isinstance(v, (int, float)) for v in values) else values


def axes_of(varied, config):
    """(rows, columns, others): which of the varied knobs, seed and best_of apart, stand where."""
    for key in (config.rows, config.columns):
        if key and key not in varied:
            raise UserError(
                f"{key} does not vary here; what varies: {', '.join(varied) or 'nothing'}"
            )
        if key == "seed":
            raise UserError("seed is no axis: a cell is the mean of the seeds")
    if config.rows and config.rows == config.columns:
        raise UserError("rows and columns must be two knobs")
    free = [
        k
        for k in varied
        if k != "seed" and (k != config.best_of or k in (config.rows, config.columns))
    ]
    if (
        not free and config.best_of in varied
    ):  # nothing else varies: then it is what the table is about
        free = [config.best_of]
    first = lambda k: (
        k != config.columns,
        k == config.rows,
        k != "bag_size",
        k == "superposition_ratio",
    )
    columns, *free = sorted(free, key=first) or [""]
    rows, *others = sorted(free, key=lambda k: (k != config.rows, k != "superposition_ratio")) or [
        ""
    ]
    return rows, columns, others


def everywhere(groups, knobs):
    """The groups, those in which one of the knobs does nothing at each of its values. Ordinary training stays
    as it is, without the knobs of superposition."""
    for knob in knobs:
        values = dict.fromkeys(group.point[knob] for group in groups if knob in group.point)
        old, groups = groups, []
        for g in old:
            stays = knob in g.point or knob in SUPERPOSITION and g.point.get("bag_size") == 1
            groups += (
                [g]
                if stays
                else [dataclasses.replace(g, point=g.point | {knob: v}) for v in values]
            )
    return groups


def tables_of(members, varied, config):
    """(tables, edges): the final losses by rows and columns, one table for each combination of what varies
    besides."""
    groups, edges = groups_of(members), 0
    rows, columns, others = axes_of(varied, config)
    groups = everywhere(groups, IDLE.keys() & {rows, columns, *others})
    if config.best_of in varied and config.best_of not in (rows, columns):
        groups, edges = take_best(groups, config.best_of)
    axes = {rows, columns} - {""}
    whole = [group for group in groups if {*axes, *others} <= group.point.keys()]
    tables = []
    for combination in dict.fromkeys(
        [tuple(group.point[k] for k in others) for group in whole] or [()]
    ):
        here = dict(zip(others, combination))
        # ordinary training has no knobs of superposition, and belongs to every table
        mine = [g for g in groups if all(g.point.get(k, v) == v for k, v in here.items())]
        grid = [g for g in mine if axes <= g.point.keys()]
        cells = {(g.point.get(rows, ""), g.point.get(columns, "")): g for g in grid}
        baselines, across, down = [g for g in mine if not axes <= g.point.keys()], columns, rows
        if (
            rows and len(values := {column for _, column in cells}) == 1
        ):  # then the rows stand side by side
            here |= {columns: values.pop()}
            cells, across, down = {("", row): g for (row, _), g in cells.items()}, rows, ""
        title = ", ".join(f"{k} {as_text(v)}" for k, v in here.items())
        tables.append(Table(title, down, across, cells, baselines))
    return tables, edges


def markdown(tables, edges, config):
    """The tables as text."""
    lines = []
    for table in tables:
        lines += [f"**{table.title}**", ""] * bool(table.title)
        lowest = (
            table.best and table.best.mean
        )  # of a whole group, which may stand in several cells
        is_best = lambda group, lowest=lowest: group.whole and group.mean == lowest
        mark = lambda group, is_best=is_best: (
            f"**{group.text()}**" if is_best(group) else group.text()
        )
        for group in table.baselines:
            about = {k: v for k, v in group.point.items() if k != "bag_size"}
            name = "".join(f", {k} {as_text(v)}" for k, v in about.items())
            lines += [f"ordinary training{name}: {mark(group)}", ""]
        corner = " \\ ".join(k for k in (table.rows, table.columns) if k) or "run"
        cells = [
            [corner, *(as_text(v) if table.columns else "val loss" for v in table.column_values)]
        ]
        for row in table.row_values:
            found = [table.cells.get((row, column)) for column in table.column_values]
            cells.append(
                [
                    as_text(row) if table.rows else "val loss",
                    *(mark(g) if g else "-" for g in found),
                ]
            )
        lines += [markdown_table(cells), ""]
    lines.append(
        "Validation loss at the end in nats per token: mean ± standard deviation of the seeds (how many); "
        "the lowest mean in bold."
    )
    if any(g.note for table in tables for g in [*table.cells.values(), *table.baselines]):
        beyond = (
            f"; for {edges} that is the lowest or highest tried, and a better one may lie beyond"
            * bool(edges)
        )
        lines.append(f"Each cell at its best {config.best_of}{beyond}.")
    return "\n".join(lines)


def write_csv(members, path):
    """One line a run: the knobs that vary, then how it ended."""
    knobs = list(dict.fromkeys(k for member in members for k in member.point))
    results = [
        "val_loss",
        "val_bpb",
        "loss",
        "step",
        "positions",
        "data_tokens",
        "flops",
        "seconds",
    ]
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["run", *knobs, *results])
        for member in members:
            end = member.end() or {}
            cells = [member.point.get(k, "") for k in knobs] + [end.get(k, "") for k in results]
            writer.writerow([member.folder.name, *cells])


def write_results(tool, config, text, members, draw, failed):
    """Print `text`, and write it with the command as table.md, the members' ends as runs.csv and what `draw`
    writes to a path as TOOL.png, to config.out_dir. UserError, after all that can be written: matplotlib is
    missing, or runs failed."""
    out_dir = Path(config.out_dir)
    print(text)
    command = f"python -m tools.{tool} {shlex.join(sys.argv[1:])}"
    (out_dir / "table.md").write_text(f"{text}\n\n`{command}`\n")
    write_csv(members, out_dir / "runs.csv")
    if config.plot:
        draw(out_dir / f"{tool}.png")
    print(f"\nwrote {out_dir}/table.md, runs.csv{f', {tool}.png' if config.plot else ''}")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(members)} runs failed; the same command tries them again"
        )


# ------------------------------------------------------------------------------------------------ the picture


def draw(tables, path):
    """Curves over the columns with bands of the seeds, a line for each row; beside them, where there are
    several rows, a map of the differences from the baseline."""
    maps = any(len(t.row_values) > 1 and len(t.column_values) > 1 for t in tables)
    width, panels = (14, 2) if maps else (7, 1)
    look = dict(squeeze=False, width_ratios=(1, 1.15)[:panels])
    fig, axes_of_tables = new_figure((width, 4.6 * len(tables)), len(tables), panels, **look)
    for table, axes in zip(tables, axes_of_tables):
        draw_curves(axes[0], table)
        if maps:
            draw_map(fig, axes[1], table)
        if table.title:
            axes[0].set_title(table.title, loc="left", fontsize=10)
    save_picture(fig, path)


def is_scale(values):
    """Whether values are numbers, so that a line may join them."""
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def draw_curves(ax, table):
    """A line for each row, with a band of one standard deviation of the seeds; points where columns are no
    numbers."""
    from matplotlib import colormaps

    columns, rows = table.column_values, table.row_values
    numbers = is_scale(columns) and len(columns) > 1
    colors = [COLORS[1 + i % (len(COLORS) - 1)] for i in range(len(rows))]
    if is_scale(rows) and len(rows) > 3:  # their order can be seen
        colors = [colormaps["viridis"](0.9 * i / (len(rows) - 1)) for i in range(len(rows))]
    for i, (row, color) in enumerate(zip(rows, colors)):
        label = f"{SHORT.get(table.rows, table.rows)} {as_text(row)}" if table.rows else None
        aside = 0 if numbers else 0.12 * (i - (len(rows) - 1) / 2)
        places = {column: (column if numbers else j) + aside for j, column in enumerate(columns)}
        groups = {places[c]: table.cells[row, c] for c in columns if (row, c) in table.cells}
        groups = {x: group for x, group in groups.items() if math.isfinite(group.mean)}
        x, mean = np.array(list(groups), float), np.array([g.mean for g in groups.values()])
        sd = np.nan_to_num([g.sd for g in groups.values()])
        ax.plot(x, mean, "o-" if numbers else "o", color=color, ms=5, lw=1.6, label=label, zorder=3)
        if numbers:
            ax.fill_between(x, mean - sd, mean + sd, color=color, alpha=0.15, lw=0, zorder=2)
        else:
            ax.errorbar(x, mean, sd, fmt="none", color=color, capsize=3, zorder=2)
        for at, group in groups.items() if len(rows) <= 3 else ():  # few enough to show each seed
            ax.plot(
                [at] * len(group.losses), group.losses, "_", color=color, alpha=0.7, ms=7, zorder=2
            )
    # where bag sizes vary alone, ordinary training is that of 1
    ones = [table.cells.get((row, 1)) for row in rows if table.columns == "bag_size"]
    ordinary = table.baselines or [group for group in ones if group]
    for group, style in zip(
        (g for g in ordinary if math.isfinite(g.mean)), itertools.cycle(("--", ":", "-."))
    ):
        about = "".join(f", {k} {as_text(v)}" for k, v in group.point.items() if k != "bag_size")
        ax.axhline(
            group.mean, color="black", ls=style, lw=1.3, label=f"ordinary training{about}", zorder=1
        )
        sd = np.nan_to_num(group.sd)
        ax.axhspan(group.mean - sd, group.mean + sd, color="black", alpha=0.08, lw=0, zorder=0)
    if numbers and min(columns) > 0 and max(columns) / min(columns) > 20:
        ax.set_xscale("log")
    ax.set_xticks(columns if numbers else range(len(columns)), [as_text(v) for v in columns])
    ax.minorticks_off()
    ax.margins(x=0.05 if numbers else 0.15)
    low, high = table.limits
    high += 0.1 * (high - low)
    if above := sum(group.mean > high for group in table.cells.values()):
        ax.set_ylim(low - 0.1 * (high - low), high)
        look = dict(xycoords="axes fraction", ha="right", fontsize=9, color="0.4")
        ax.annotate(f"{above} means lie above", (0.99, 1.01), **look)
    ax.set(xlabel=table.columns or "all runs", ylabel="validation loss (nats per token)")
    tidy(ax)
    if table.rows or ordinary:
        ax.legend(fontsize=9, edgecolor="none", framealpha=0.8)


def draw_map(fig, ax, table):
    """Losses by rows and columns; where there is a baseline, blue is better than it, and red worse."""
    rows, columns = table.row_values, table.column_values
    means = np.full((len(rows), len(columns)), np.nan)
    for (row, column), group in table.cells.items():
        means[rows.index(row), columns.index(column)] = group.mean
    baseline = min((g.mean for g in table.baselines if g.whole), default=None)
    if baseline is None:
        image = ax.imshow(means, cmap="viridis", aspect="auto", origin="lower")
        fig.colorbar(image, label="validation loss (nats per token)")
    else:
        bound = max(1e-9, *(abs(limit - baseline) for limit in table.limits))
        look = dict(cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto", origin="lower")
        image = ax.imshow(means - baseline, **look)
        beyond = "max" if np.nanmax(means) - baseline > bound else "neither"
        fig.colorbar(image, label="difference from ordinary training (nats)", extend=beyond)
    for (row, column), group in table.cells.items():
        if math.isfinite(group.mean):
            red, green, blue, _ = image.to_rgba(group.mean - (baseline or 0))
            look = dict(
                weight="bold" if group is table.best else "normal",
                ha="center",
                va="center",
                fontsize=9,
            )
            look["color"] = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "black"
            ax.text(columns.index(column), rows.index(row), f"{group.mean:.3f}", **look)
    ax.set_xticks(range(len(columns)), [as_text(v) for v in columns])
    ax.set_yticks(range(len(rows)), [as_text(v) for v in rows])
    ax.set(xlabel=table.columns, ylabel=table.rows)


def main(config, trainer=TRAINER):
    members, varied = plan(config.arguments, config.out_dir, trainer)
    axes_of(varied, config)  # before hours of training
    if config.best_of not in {"none", *knobs_of(trainer)} - {"seed"}:
        raise UserError(
            f"--best_of takes a knob of train.py but the seed, or none, got {config.best_of!r}"
        )
    failed = {}
    if config.train:
        failed = run_members(members, config.jobs, config.threads, config.gpus, trainer)
    if all(member.end() is None for member in members):
        why = "".join(f": {why}" for why in list(failed.values())[:1])
        raise UserError(f"none of {len(members)} runs is done{why}")
    tables, edges = tables_of(members, varied, config)
    text = markdown(tables, edges, config)
    write_results("sweep", config, text, members, lambda path: draw(tables, path), failed)


if __name__ == "__main__":
    entry_point(main, Config, places(sys.argv[1:], Config))
