"""Turn finished runs into the small form that results/ holds: a table of runs, and thinned curves.

runs.csv starts with name and label, the knobs that differ between runs, and the results; machine, versions,
command, corpus, model and all other knobs follow. curves.csv holds those rows of metrics.jsonl that a picture
needs. python -m tools.plot results/NAME reads both.
"""

import csv
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for python tools/keep.py

from nanotst import UserError
from nanotst.configurator import entry_point
from nanotst.files import write_safely
from tools.runs import FREE, NUMBERS, describe, final, load_metrics, read_table
from train import Config as Knobs


@dataclass
class Config:
    """Usage: python -m tools.keep RUN [RUN ...] --out_dir=results/NAME [--key=value ...]

    python -m tools.keep out/baseline out/tst --out_dir=results/mine
    python -m tools.keep out/sweep/* --out_dir=results/mine --labels=sweep --curves=none    more of them

    A run is named after its folder, with as many of the folders above as tell the given runs apart. Runs that
    are already kept stay, unless a new one has the same name.
    """

    runs: list[str]  # run folders of train.py
    out_dir: str = ""  # folder of runs.csv and curves.csv, such as results/NAME
    labels: str = ""  # comma-separated, one for all or one each; equal labels are seeds of one side
    curves: str = (
        "all"  # runs whose curves are kept: all, none, or names and labels, comma-separated
    )
    points: int = 40  # rows of a curve, besides those with a validation loss or around a switch


WHERE = {"device": "machine", "dtype": "precision", "world_size": "ranks"}  # other names for these
LEFT_OUT = {"step", "lr", "grad_norm", "epoch", "mfu", "positions_per_second"}  # others stay
NOT_KNOBS = ("out_dir", "resume", "allow_changes", "overwrite")  # nothing about a finished run


def names_of(paths):
    """Names of run folders: the last component, or as many of the last ones as tell them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same run is given twice")


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
    sizes, every = [row.get("bag_size") for row in rows], len(rows) // points + 1
    kept = {i for i, row in enumerate(rows) if "val_loss" in row or i % every == 0}
    for i in range(1, len(rows)):
        if sizes[i] != sizes[i - 1]:
            kept.update(range(i - 2, i + 4))
    return [row for i, row in enumerate(rows) if i in kept or i == len(rows) - 1]


def columns_of(runs):
    """The columns of runs.csv: who, the knobs that differ, what came out, all other knobs."""
    known = dict.fromkeys(key for run in runs for key in run)
    knobs = [key for key in Knobs.__dataclass_fields__ if key in known]
    differ = [key for key in knobs if key not in FREE and len({run.get(key) for run in runs}) > 1]
    other = [key for key in known if key not in knobs]
    return list(dict.fromkeys([*other[:2], *differ, *other, *knobs]))


def write_table(path, columns, lines):
    """Write a CSV file of lines, dicts of text."""

    def write(path):
        with open(path, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)

    write_safely(path, write)


def main(config):
    if not config.out_dir:
        raise UserError("--out_dir must name a folder, such as results/NAME")
    names = names_of(config.runs)
    labels = config.labels.split(",") if config.labels else names
    labels = labels * len(names) if len(labels) == 1 else labels
    if len(labels) != len(names):
        raise UserError(f"--labels has {len(labels)} labels for {len(names)} runs")
    chosen = set(names) if config.curves == "all" else set(config.curves.split(",")) - {"none"}
    if unknown := chosen - {*names, *labels}:
        raise UserError(f"--curves: {min(unknown)} is no name or label of these runs")
    out_dir, curves = Path(config.out_dir), {}
    read = lambda path: read_table(path) if path.exists() else []
    runs = {line["run"]: line for line in read(out_dir / "runs.csv")}
    for line in read(out_dir / "curves.csv"):
        curves.setdefault(line["run"], []).append(line)
    for folder, name, label in zip(config.runs, names, labels):
        rows = load_metrics(folder)
        runs[name] = line = summary(folder, name, label, rows)
        curves.pop(name, None)
        if chosen & {name, label}:
            points = thinned(rows, config.points)
            curves[name] = [{"run": name} | cells(row, LEFT_OUT - {"step"}) for row in points]
        print(f"{name}: kept as {label}, val_loss {line['val_loss']}")
    out_dir.mkdir(parents=True, exist_ok=True)
    write_table(out_dir / "runs.csv", columns_of(runs.values()), runs.values())
    lines = [line for name in runs for line in curves.get(name, [])]
    columns = dict.fromkeys(["run", *NUMBERS, *(key for line in lines for key in line)])
    write_table(out_dir / "curves.csv", list(columns), lines)
    print(f"{out_dir}: {len(runs)} runs, curves of {len(curves)}")


if __name__ == "__main__":
    entry_point(main, Config)
