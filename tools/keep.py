"""Turn finished runs into the small form that results/ holds and tools/plot.py reads.

runs.csv has the name, label and results of each run, and all that made it; curves.csv has those rows of
metrics.jsonl that a picture needs.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanotst.configurator import entry_point
from tools.runs import LEARNED, NUMBERS, read_runs, read_table, write_table


@dataclass
class Config:
    """Usage: python -m tools.keep RUN [RUN ...] --out_dir=results/NAME [--key=value ...]

    A run is named after its folder, with the folders above that not all of the given runs share. Runs that
    are already kept stay, unless a new one has the same name.
    """

    runs: list[str]  # run folders of train.py
    out_dir: str = "results/mine"  # folder of runs.csv and curves.csv
    labels: str = ""  # comma-separated, one for all or one each; equal labels are seeds of one side
    curves: str = "all"  # runs whose curves are kept: names and labels, comma-separated; all; none
    points: int = 40  # rows of a curve, besides those with a validation loss or at a switch


LEFT_OUT = ("lr", "grad_norm", "epoch", "mfu", "positions_per_second")  # other metrics stay
# the folders of absolute paths, which mean nothing on another machine
FOLDERS = re.compile(r"(^|[=:,\s])(?:[A-Za-z]:)?[/\\](?:[^/\\\s=,]+[/\\])*")
NOT_KNOBS = ("out_dir", "resume", "allow_changes", "overwrite")  # nothing about a finished run


def cells(row):
    """The numbers of a row that are kept, as text: floats with nine digits, which tell all float32 apart."""
    numbers = {k: v for k, v in row.items() if type(v) in (int, float) and k not in LEFT_OUT}
    return {k: f"{v:.9g}" if type(v) is float else str(v) for k, v in numbers.items()}


def summary(run):
    """A run's row of runs.csv: {column: text}."""
    last = dict(run["validated"][-1])
    best = min(run["validated"], key=lambda row: row["val_loss"])
    ends = {"steps": last.pop("step"), "val_loss": last["val_loss"]}
    ends |= {"best_val_loss": best["val_loss"], "best_step": best["step"]} | last
    rates = [row["positions_per_second"] for row in run["rows"] if "positions_per_second" in row]
    rate = {"positions_per_second": str(round(np.median(rates)))} if rates else {}
    facts = {k: FOLDERS.sub(r"\1", v) for k, v in run["facts"].items() if k not in NOT_KNOBS}
    return {"run": run["name"], "label": run["label"]} | cells(ends) | rate | facts


def thinned(rows, points):
    """The rows of a curve: about `points` of them, and those with a validation loss and around a switch."""
    every, sizes = len(rows) // max(1, points) + 1, [row.get("bag_size") for row in rows]
    at_switch = lambda i: len(set(sizes[max(i - 1, 0) : i + 2])) > 1
    wanted = lambda i: i % every == 0 or at_switch(i) or "val_loss" in rows[i]
    return [row for i, row in enumerate(rows) if wanted(i)]


def main(config):
    new, out_dir = read_runs(config.runs, config.labels), Path(config.out_dir)
    runs = {line["run"]: line for line in read_table(out_dir / "runs.csv")}
    names = [run["name"] for run in new]
    points = [row for row in read_table(out_dir / "curves.csv") if row["run"] not in names]
    for run in new:
        name, label = run["name"], run["label"]
        runs[name] = summary(run)
        if {"all", name, label} & set(config.curves.split(",")):
            points += [{"run": name} | cells(row) for row in thinned(run["rows"], config.points)]
        print(f"{name}: kept as {label}, val_loss {runs[name]['val_loss']}")
    lines = list(runs.values())
    differ = [knob for knob in LEARNED if len({line.get(knob) for line in lines}) > 1]
    write_table(out_dir / "runs.csv", ["run", "label", *differ], lines)
    write_table(out_dir / "curves.csv", ["run", *NUMBERS], points)
    print(f"{out_dir}: {len(runs)} runs, curves of {len({row['run'] for row in points})}")


if __name__ == "__main__":
    entry_point(main, Config)
