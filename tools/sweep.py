"""Train a grid of runs, several at a time, and tabulate their final losses.

    python -m tools.sweep config/curves.py --bag_size=1,2,4 --superposition_ratio=0.2,0.3 --seed=1,2 --jobs=2

Any knob of train.py may take several values, separated by commas; by semicolons for dataset and
reinit_at_switch, where one value may hold commas ('--reinit_at_switch=;embedding,head;optimizer' is three
values). Baselines (bag size 1, or ratio 0) are trained once, whatever the knobs of superposition.

Run the same command again, or a larger grid in the same out_dir, to resume: finished runs are skipped,
interrupted ones resumed, failed ones tried again. Ctrl-C stops all runs at a checkpoint.

At the end out_dir holds table.md, runs.csv and sweep.png. bag_size makes the columns of the table,
superposition_ratio the rows.
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

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for python tools/sweep.py

from nanotst import UserError
from nanotst.configurator import entry_point
from tools import runner
from tools.intervals import difference, seeds_text
from tools.picture import COLORS, new_figure, save_picture, tidy
from tools.runner import SHORT, as_text, places, read_arguments
from tools.runs import BAGS, ENDS, FREE, markdown_table


@dataclass
class Config:
    """Usage: python -m tools.sweep [CONFIG.py ...] --key=VALUE[,VALUE ...] ... [--jobs=N]

    The keys are those of train.py; several values make a grid. dataset and reinit_at_switch separate values
    by semicolons. Other knobs:"""

    arguments: list[str]  # config files and knobs of train.py

    # Runs
    out_dir: str = "out/sweep"  # a folder with a folder for each run
    jobs: int = 0  # runs at a time; 0: one per GPU, or one
    threads: int = 0  # CPU threads per run; 0: an equal share of the cores
    gpus: str = "auto"  # GPU numbers such as 0,2; auto: all; none
    train: bool = True  # False: table of the finished runs, no training

    # Table and picture
    best_of: str = "learning_rate"  # knob whose best value each cell shows; none: no choice
    plot: bool = True  # picture as sweep.png (needs matplotlib)


# --------------------------------------------------------------------------------------------------- the grid


def plan(arguments, out_dir):
    """(members, varied): the distinct runs of a grid, and the knobs with several values, the seed last."""
    settings, files, grid = read_arguments(arguments, runner.knobs_of(runner.TRAINER), Config)
    varied = sorted((k for k, values in grid.items() if len(values) > 1), key=lambda k: k == "seed")
    if free := [k for k in varied if k in FREE]:
        raise UserError(f"--{free[0]} takes one value: it does not change what is learned")
    distinct = {}
    for values in itertools.product(*grid.values()):
        member = runner.make_member(settings, files, dict(zip(grid, values)), varied, out_dir)
        distinct.setdefault(json.dumps(member.settings, sort_keys=True), member)
    members = list(distinct.values())
    names = [member.name for member in members]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two runs would be named {min(twice)}; rename what the path ends in")
    runner.find_folders(members, out_dir)
    return members, [k for k in varied if any(k in member.point for member in members)]


# -------------------------------------------------------------------------------------------------- the table


@dataclass
class Group:
    """The runs of one point, which differ by their seeds alone."""

    point: dict  # without the seed
    losses: list  # final validation losses of the finished runs
    planned: int = 0  # runs
    note: str = ""  # value that was chosen as best

    @property
    def mean(self):
        return float(np.mean(self.losses)) if self.losses else math.nan

    @property
    def whole(self):
        return len(self.losses) == self.planned and math.isfinite(self.mean)

    def text(self):
        missing = len(self.losses) < self.planned
        notes = [f"{len(self.losses)} of {self.planned} done"] * missing + [self.note] * bool(
            self.note
        )
        mean = seeds_text(self.losses) if self.losses else "-"
        return mean + (f" ({', '.join(notes)})" if notes else "")


def groups_of(members):
    groups = {}
    for member in members:
        point = {k: v for k, v in member.point.items() if k != "seed"}
        group = groups.setdefault(json.dumps(point), Group(point, []))
        group.planned += 1
        if end := member.end():
            group.losses.append(end["val_loss"])
    return list(groups.values())


def take_best(groups, knob):
    """The lowest mean among the groups that differ in `knob` alone, with its value noted."""
    alike, chosen = {}, []
    for group in groups:
        rest = {k: v for k, v in group.point.items() if k != knob}
        alike.setdefault(json.dumps(rest), []).append(group)
    for rest, candidates in alike.items():
        best = min(candidates, key=lambda g: (not g.whole, g.mean if g.losses else math.inf))
        if len(candidates) > 1:
            value, values = best.point[knob], [g.point[knob] for g in candidates]
            best.note = f"{SHORT.get(knob, knob)} {as_text(value)}"
            if is_scale(values) and value in (min(values), max(values)):
                best.note += ", an edge"
        chosen.append(dataclasses.replace(best, point=json.loads(rest)))
    return chosen


@dataclass
class Table:
    """Groups by (value of the row's knob, value of the column's), and baselines, which have neither."""

    title: str
    rows: str  # a knob; "" for a single row
    columns: str
    cells: dict
    baselines: list

    def values(self, axis):
        """Distinct values along an axis (0: rows), numbers in order."""
        values = list(dict.fromkeys(key[axis] for key in self.cells))
        return sorted(values) if is_scale(values) else values

    def best(self):
        whole = [group for group in [*self.cells.values(), *self.baselines] if group.whole]
        return min(whole, key=lambda group: group.mean, default=None)

    def baseline(self):
        """The group of the baseline, if there is just one."""
        cells = [g for (_, s), g in self.cells.items() if self.columns == "bag_size" and s == 1]
        done = [group for group in cells + self.baselines if group.losses]
        return done[0] if len(done) == 1 else None


def is_scale(values):
    return all(type(value) in (int, float) for value in values)


def axes_of(members, varied, best_of):
    """(rows, columns, others): the knobs that vary, by their place in the tables."""
    free = [k for k in varied if k not in ("seed", best_of)] or [k for k in varied if k != "seed"]
    free.sort(key=lambda k: (k != "bag_size", k == "superposition_ratio"))
    columns, *free = free or [""]
    free.sort(key=lambda k: k != "superposition_ratio")
    rows, *others = free or [""]
    sizes = {member.point.get("bag_size") for member in members} - {1}
    if columns == "bag_size" and rows in BAGS and len(sizes) == 1:
        return "", rows, [*others, columns]  # its other value is the baselines'
    return rows, columns, others


def tables_of(members, varied, best_of):
    """One Table for each combination of what is neither row nor column."""
    rows, columns, others = axes_of(members, varied, best_of)
    groups, tables, baselines = groups_of(members), {}, []
    if best_of in varied and best_of not in (rows, columns):
        groups = take_best(groups, best_of)
    for group in groups:
        if {rows, columns, *others} - {""} <= group.point.keys():
            here = tuple((k, group.point[k]) for k in others)
            place = group.point.get(rows, ""), group.point.get(columns, "")
            tables.setdefault(here, {})[place] = group
        else:
            baselines.append(group)  # it has none of the knobs of superposition
    found = []
    for here, cells in (tables or {(): {}}).items():
        title = ", ".join(f"{k} {as_text(v)}" for k, v in here)
        own = [(k, v) for k, v in here if k not in BAGS]
        mine = [g for g in baselines if all(g.point[k] == v for k, v in own)]
        found.append(Table(title, rows, columns, cells, mine))
    return found


def name_of(group):
    knobs = [f", {k} {as_text(v)}" for k, v in group.point.items() if k != "bag_size"]
    return "".join(["baseline", *knobs])


def markdown(tables, best_of):
    """The tables as text."""
    parts, notes = [], ""
    for table in tables:
        best, baseline, columns = table.best(), table.baseline(), table.values(1)
        show = lambda group, best=best: f"**{group.text()}**" if group is best else group.text()
        parts += [f"**{table.title}**"] * bool(table.title)
        parts += [f"{name_of(group)}: {show(group)}" for group in table.baselines]
        corner = " \\ ".join(k for k in (table.rows, table.columns) if k) or "run"
        cells = [[corner, *map(as_text, columns)]]
        for row in table.values(0):
            groups = [table.cells.get((row, column)) for column in columns]
            cells.append([as_text(row) or "val loss", *(show(g) if g else "-" for g in groups)])
        if baseline and not table.rows:
            done = [
                difference(g.losses, baseline.losses).text() if g.losses else "-" for g in groups
            ]
            cells.append(["minus baseline", *done])
        parts.append(markdown_table(cells))
        notes += "".join(group.note for group in [*table.cells.values(), *table.baselines])
    losses = "Final validation loss in nats per token, mean ± standard deviation (seeds)"
    parts.append(f"{losses}; the lowest in bold.")
    if notes:
        edge = " An edge is the lowest or highest tried: a better one may lie beyond."
        parts.append(f"Each cell is at its best {best_of}.{edge if 'edge' in notes else ''}")
    return "\n\n".join(parts)


def write_results(tool, config, text, members, draw, failed):
    """Print `text` and write it as table.md, the ends of the members as runs.csv, and TOOL.png by draw(path).
    UserError, after all that: some runs failed."""
    out_dir, keys = Path(config.out_dir), ("step", *ENDS)
    print(text)
    command = f"python -m tools.{tool} {shlex.join(sys.argv[1:])}"
    (out_dir / "table.md").write_text(f"{text}\n\n`{command}`\n", encoding="utf-8")
    knobs = list(dict.fromkeys(k for member in members for k in member.point))
    with open(out_dir / "runs.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, ["run", *knobs, *keys])
        writer.writeheader()
        for member in members:
            end = {k: v for k, v in (member.end() or {}).items() if k in keys}
            writer.writerow({"run": member.folder.name} | member.point | end)
    if config.plot:
        draw(out_dir / f"{tool}.png")
    print(f"\nwrote {out_dir}/table.md, runs.csv{f', {tool}.png' if config.plot else ''}")
    if failed:
        said = f"{len(failed)} of {len(members)} runs failed"
        raise UserError(f"{said}; the same command tries them again")


# ------------------------------------------------------------------------------------------------ the picture


def draw(tables, path):
    """A panel for each table."""
    fig, axes = new_figure((7, 4.6 * len(tables)), len(tables), squeeze=False)
    for table, (ax,) in zip(tables, axes):
        draw_table(ax, table)
        ax.set_title(table.title, loc="left", fontsize=10)
    save_picture(fig, path)


def draw_table(ax, table):
    """A line over the columns for each row (points if these are no numbers), with one standard deviation."""
    columns = table.values(1)
    numbers = is_scale(columns) and len(columns) > 1
    for i, row in enumerate(table.values(0)):
        done = [(j, table.cells.get((row, column))) for j, column in enumerate(columns)]
        done = [(j, group) for j, group in done if group and group.losses]
        x = [columns[j] if numbers else j + 0.1 * i for j, _ in done]
        sd = [np.std(g.losses, ddof=1) if len(g.losses) > 1 else 0 for _, g in done]
        look = dict(color=COLORS[1 + i % 6], fmt="o-" if numbers else "o", capsize=3)
        label = f"{SHORT.get(table.rows, table.rows)} {as_text(row)}" if table.rows else None
        ax.errorbar(x, [g.mean for _, g in done], sd, label=label, **look)
    for group, style in zip(table.baselines, itertools.cycle(("--", ":", "-."))):
        ax.axhline(group.mean, color="black", ls=style, lw=1.3, label=name_of(group))
    if numbers and min(columns) > 0 and max(columns) / min(columns) > 20:
        ax.set_xscale("log")
    ax.set_xticks(columns if numbers else range(len(columns)), map(as_text, columns))
    ax.minorticks_off()
    ax.set(xlabel=table.columns or "all runs", ylabel="validation loss (nats per token)")
    tidy(ax)
    if table.rows or table.baselines:
        ax.legend(fontsize=9, frameon=False)


def main(config):
    members, varied = plan(config.arguments, config.out_dir)
    if config.best_of not in {"none", *runner.knobs_of(runner.TRAINER)}:
        raise UserError(f"--best_of takes a knob of train.py, or none, but not {config.best_of!r}")
    failed = {}
    if config.train:
        failed = runner.run_members(members, config.jobs, config.threads, config.gpus)
    if all(member.end() is None for member in members):
        why = "".join(f": {why}" for why in list(failed.values())[:1])
        raise UserError(f"none of {len(members)} runs is done{why}")
    tables = tables_of(members, varied, config.best_of)
    text = markdown(tables, config.best_of)
    write_results("sweep", config, text, members, lambda path: draw(tables, path), failed)


if __name__ == "__main__":
    entry_point(main, Config, places(sys.argv[1:], Config))
