"""Turn finished runs into the small form that results/ holds: a table of runs, and thinned curves.

runs.csv starts with name and label, the knobs that differ between runs, and the results; machine, versions,
command, corpus, model and all other knobs follow. curves.csv holds those rows of metrics.jsonl that a picture
needs. python -m tools.plot results/NAME reads both.
"""

import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from nanotst import UserError
from nanotst.configurator import entry_point
from tools.runs import FREE, NUMBERS, describe, final, load_metrics, read_table, write_table
from train import Config as Knobs


@dataclass
class Config:
    """Usage: python -m tools.keep RUN [RUN ...] --out_dir=results/NAME [--key=value ...]

    A run is named after its folder, with the folder above if two of the given runs have one name. Runs that
    are already kept stay, unless a new one has the same name.
    """

    runs: list[str]  # run folders of train.py
    out_dir: str = "results/mine"  # folder of runs.csv and curves.csv
    labels: str = ""  # comma-separated, one for all or one each; equal labels are seeds of one side
    curves: str = "all"  # runs whose curves are kept: names and labels, comma-separated; all; none
    points: int = 40  # rows of a curve, besides those with a validation loss or at a switch


WHERE = {"device": "machine", "dtype": "precision", "world_size": "ranks"}  # other names for these
LEFT_OUT = {"step", "lr", "grad_norm", "epoch", "mfu", "positions_per_second"}  # others stay
NOT_KNOBS = ("out_dir", "resume", "allow_changes", "overwrite")  # nothing about a finished run


def names_of(paths):
    """Names of run folders."""
    paths = [Path(path).resolve() for path in paths]
    for names in ([p.name for p in paths], [f"{p.parent.name}/{p.name}" for p in paths]):
        if len(set(names)) == len(names):
            return names
    raise UserError("two runs have the same name; keep them in different folders")


def cells(row, but=()):
    """The numbers of a row as text, floats with nine digits, which tell all float32 apart."""
    numbers = {k: v for k, v in row.items() if type(v) in (int, float) and k not in but}
    return {k: f"{v:.9g}" if type(v) is float else str(v) for k, v in numbers.items()}


def without_folders(text):
    """`text` without the folders of absolute paths, which mean nothing on another machine."""
    return re.sub(r"(^|[=:,\s])(?:[A-Za-z]:)?[/\\](?:[^/\\\s=,]+[/\\])*", r"\1", text)


def summary(folder, name, label, rows):
    """A run's row of runs.csv: {column: text}."""
    facts, described = describe(folder)
    facts = {k: without_folders(v) for k, v in facts.items() if k not in NOT_KNOBS}
    best = min((row for row in rows if "val_loss" in row), key=lambda row: row["val_loss"])
    ends = {"steps": final(rows)["step"], "val_loss": 0.0, "best_val_loss": best["val_loss"]}
    ends |= {"best_step": best["step"]} | final(rows)
    rates = [row["positions_per_second"] for row in rows if "positions_per_second" in row]
    where = {WHERE.get(k, k): str(v) for k, v in described["versions"].items()}
    where["positions_per_second"] = str(round(statistics.median(rates))) if rates else ""
    where["command"] = " ".join(without_folders(arg) for arg in described["command"])
    return {"run": name, "label": label} | cells(ends, LEFT_OUT) | where | facts


def thinned(rows, points):
    """The rows of a curve: about `points` of them, and those with a validation loss and around a switch."""
    every = len(rows) // points + 1
    sizes = [row.get("bag_size") for row in rows]
    switches = [i for i in range(1, len(rows)) if sizes[i] != sizes[i - 1]]
    kept = {*range(0, len(rows), every), *switches, *(i - 1 for i in switches), len(rows) - 1}
    return [row for i, row in enumerate(rows) if i in kept or "val_loss" in row]


def columns_of(runs):
    """The columns of runs.csv: who, the knobs that differ, and all others as `summary` orders them."""
    learned = [key for key in Knobs.__dataclass_fields__ if key not in FREE]
    differ = [key for key in learned if len({run.get(key) for run in runs}) > 1]
    return list(dict.fromkeys(["run", "label", *differ, *(key for run in runs for key in run)]))


def main(config):
    names, out_dir = names_of(config.runs), Path(config.out_dir)
    labels = config.labels.split(",") if config.labels else names
    labels = labels * len(names) if len(labels) == 1 else labels
    if len(labels) != len(names):
        raise UserError(f"--labels has {len(labels)} labels for {len(names)} runs")
    runs = {line["run"]: line for line in read_table(out_dir / "runs.csv")}
    points = [row for row in read_table(out_dir / "curves.csv") if row["run"] not in names]
    for folder, name, label in zip(config.runs, names, labels):
        rows = load_metrics(folder)
        runs[name] = summary(folder, name, label, rows)
        if {"all", name, label} & set(config.curves.split(",")):
            curve = thinned(rows, config.points)
            points += [{"run": name} | cells(row, LEFT_OUT - {"step"}) for row in curve]
        print(f"{name}: kept as {label}, val_loss {runs[name]['val_loss']}")
    write_table(out_dir / "runs.csv", columns_of(runs.values()), runs.values())
    columns = dict.fromkeys(["run", *NUMBERS, *(key for row in points for key in row)])
    write_table(out_dir / "curves.csv", list(columns), points)
    print(f"{out_dir}: {len(runs)} runs, curves of {len({row['run'] for row in points})}")


if __name__ == "__main__":
    entry_point(main, Config)
