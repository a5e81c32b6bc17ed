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
from tools.runs import BAGS, ENDS, FREE, markdown_table, write_table


@dataclass
class Config:
    """Usage: python -m tools.sweep [CONFIG.py ...] --key=VALUE[,VALUE ...] ... [--jobs=N]

    The keys are those of train.py; several values make a grid. dataset and reinit_at_switch separate values
    by semicolons. Other knobs:"""

    arguments: list[str]  # config files and knobs of train.py

    out_dir: str = "out/sweep"  # a folder with a folder for each run
    jobs: int = 0  # runs at a time; 0: one per GPU, or one
    threads: int = 0  # CPU threads per run; 0: an equal share of the cores
    plot: bool = True  # picture as sweep.png (needs matplotlib)


def plan(arguments, out_dir):
    """(members, varied): the distinct runs of a grid, and the knobs with several values, the seed last."""
    settings, files, grid = read_arguments(arguments, Config)
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


class Group:
    """The runs of one point of the grid, which differ by their seeds alone."""

    def __init__(self, point, members):
        self.point, self.members = point, members
        self.losses = [end["val_loss"] for member in members if (end := member.end())]
        self.mean = float(np.mean(self.losses)) if self.losses else math.nan
        self.whole = len(self.losses) == len(members) and math.isfinite(self.mean)

    def text(self):
        mean, done = seeds_text(self.losses) if self.losses else "-", len(self.losses)
        return mean + (
            "" if done == len(self.members) else f" ({done} of {len(self.members)} done)"
        )

    def name(self):
        knobs = [f", {k} {as_text(v)}" for k, v in self.point.items() if k != "bag_size"]
        return "".join(["baseline", *knobs])


@dataclass
class Table:
    """Groups by (value of the row's knob, value of the column's), and baselines, which have neither."""

    title: str
    rows: str  # a knob; "" for a single row
    columns: str
    cells: dict
    baselines: list

    def values(self, axis):
        """Distinct values along an axis (0: rows), in the order given."""
        return list(dict.fromkeys(key[axis] for key in self.cells))

    def baseline(self):
        """The group of the baseline, if there is just one."""
        cells = [g for (_, s), g in self.cells.items() if self.columns == "bag_size" and s == 1]
        done = [group for group in cells + self.baselines if group.losses]
        return done[0] if len(done) == 1 else None


def axes_of(members, varied):
    """(rows, columns, others): the knobs that vary, by their place in the tables."""
    free = [k for k in varied if k != "seed"]
    free.sort(key=lambda k: (k != "bag_size", k == "superposition_ratio"))
    columns, *free = free or [""]
    free.sort(key=lambda k: k != "superposition_ratio")
    rows, *others = free or [""]
    sizes = {member.point.get("bag_size") for member in members} - {1}
    if columns == "bag_size" and rows in BAGS and len(sizes) == 1:
        return "", rows, [*others, columns]  # its other value is the baselines'
    return rows, columns, others


def tables_of(members, varied):
    """One Table for each combination of what is neither row nor column."""
    rows, columns, others = axes_of(members, varied)
    points, tables, baselines = {}, {}, []
    for member in members:
        point = tuple((k, v) for k, v in member.point.items() if k != "seed")
        points.setdefault(point, []).append(member)
    for point, seeds in points.items():
        group = Group(dict(point), seeds)
        if {rows, columns, *others} - {""} <= group.point.keys():
            here = tuple((k, group.point[k]) for k in others)
            place = group.point.get(rows, ""), group.point.get(columns, "")
            tables.setdefault(here, {})[place] = group
        else:
            baselines.append(group)  # it has none of the knobs of superposition
    found = []
    for here, cells in (tables or {(): {}}).items():
        title = ", ".join(f"{k} {as_text(v)}" for k, v in here)
        own = {k: v for k, v in here if k not in BAGS}
        mine = [group for group in baselines if own.items() <= group.point.items()]
        found.append(Table(title, rows, columns, cells, mine))
    return found


def markdown(tables):
    """The tables as text."""
    parts = []
    for table in tables:
        baseline, columns = table.baseline(), table.values(1)
        whole = [group for group in [*table.cells.values(), *table.baselines] if group.whole]
        best = min(whole, key=lambda group: group.mean, default=None)
        show = lambda group, best=best: f"**{group.text()}**" if group is best else group.text()
        parts += [f"**{table.title}**"] * bool(table.title)
        parts += [f"{group.name()}: {show(group)}" for group in table.baselines]
        corner = " \\ ".join(k for k in (table.rows, table.columns) if k) or "run"
        cells = [[corner, *map(as_text, columns)]]
        for row in table.values(0):
            groups = [table.cells.get((row, column)) for column in columns]
            cells.append([as_text(row) or "val loss", *(show(g) if g else "-" for g in groups)])
        if baseline and not table.rows:
            minus = lambda g, base=baseline.losses: difference(g.losses, base).text()
            cells.append(["minus baseline", *(minus(g) if g.losses else "-" for g in groups)])
        parts.append(markdown_table(cells))
    losses = "Final validation loss in nats per token, mean ± standard deviation (seeds)"
    return "\n\n".join([*parts, f"{losses}; the lowest in bold."])


def write_results(tool, config, text, members, draw, failed):
    """Print `text` and write it as table.md, the ends of the members as runs.csv, and TOOL.png by draw(path).
    UserError, after all that: some runs failed."""
    out_dir, keys = Path(config.out_dir), ("step", *ENDS)
    print(text)
    command = f"python -m tools.{tool} {shlex.join(sys.argv[1:])}"
    (out_dir / "table.md").write_text(f"{text}\n\n`{command}`\n", encoding="utf-8")
    knobs = list(dict.fromkeys(k for member in members for k in member.point))
    ends = [{k: v for k, v in (member.end() or {}).items() if k in keys} for member in members]
    lines = [{"run": m.folder.name} | m.point | end for m, end in zip(members, ends)]
    write_table(out_dir / "runs.csv", ["run", *knobs, *keys], lines)
    if config.plot:
        draw(out_dir / f"{tool}.png")
    print(f"\nwrote {out_dir}/table.md, runs.csv{f', {tool}.png' if config.plot else ''}")
    if failed:
        said = f"{len(failed)} of {len(members)} runs failed"
        raise UserError(f"{said}; the same command tries them again")


def draw(tables, path):
    """A panel for each table: a line over the columns for each row, with one standard deviation."""
    fig, axes = new_figure((7, 4.6 * len(tables)), len(tables), squeeze=False)
    for table, ax in zip(tables, axes[:, 0]):
        columns = table.values(1)
        for i, row in enumerate(table.values(0)):
            groups = [table.cells.get((row, column)) for column in columns]
            done = [(j, group) for j, group in enumerate(groups) if group and group.losses]
            sd = [np.std(g.losses, ddof=1) if len(g.losses) > 1 else 0 for _, g in done]
            label = f"{SHORT.get(table.rows, table.rows)} {as_text(row)}" if table.rows else None
            look = dict(color=COLORS[1 + i % 6], fmt="o-", capsize=3, label=label)
            ax.errorbar([j for j, _ in done], [g.mean for _, g in done], sd, **look)
        for group, style in zip(table.baselines, itertools.cycle(("--", ":", "-."))):
            ax.axhline(group.mean, color="black", ls=style, lw=1.3, label=group.name())
        ax.set_xticks(range(len(columns)), map(as_text, columns))
        ax.set(xlabel=table.columns or "all runs", ylabel="validation loss (nats per token)")
        ax.set_title(table.title, loc="left", fontsize=10)
        tidy(ax)
        if table.rows or table.baselines:
            ax.legend(fontsize=9, frameon=False)
    save_picture(fig, path)


def main(config):
    members, varied = plan(config.arguments, config.out_dir)
    failed = runner.run_members(members, config.jobs, config.threads)
    if all(member.end() is None for member in members):
        raise UserError(f"none of {len(members)} runs is done{runner.reason(failed)}")
    tables = tables_of(members, varied)
    draw_tables = lambda path: draw(tables, path)
    write_results("sweep", config, markdown(tables), members, draw_tables, failed)


if __name__ == "__main__":
    entry_point(main, Config, places(sys.argv[1:], Config))
