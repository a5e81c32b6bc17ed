"""Turn finished runs into the small form that results/ holds: a table with a row a run, and thinned curves.

runs.csv begins with name and label, the knobs in which the runs differ, and what came out (the loss in the
end, the lowest, data, FLOPs, time); machine, versions and command, corpus, model and all other knobs follow.
So it is a table of results when read from the left, and no knob that made a run is lost. curves.csv has the
rows of metrics.jsonl that a picture needs. `python -m tools.plot results/NAME` reads both.
"""

import csv
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanotst import UserError, configurator
from tools import runs as finished
from tools.runs import METRICS, OUTCOME, final


@dataclass
class Config:
    """Usage: python -m tools.keep RUN [RUN ...] --out_dir=results/NAME [--key=value ...]

    python -m tools.keep out/baseline out/tst --out_dir=results/mine
    python -m tools.keep out/sweep/* --out_dir=results/mine --labels=sweep --curves=none    and others

    A run is called by its folder, with as many of the folders above as tell the given runs apart. Runs that
    are kept already stay; one of the same name is replaced.
    """

    runs: list[str]  # run folders, each with metrics.jsonl and config.json
    out_dir: str = ""  # results/NAME, where runs.csv and curves.csv are
    labels: str = (
        ""  # one for all runs, or one each, comma-separated; equal labels are seeds of one side
    )
    curves: str = "all"  # whose curves are kept: all, none, or names and labels, comma-separated
    points: int = 60  # of a curve, at most, but for what stands around a switch


CURVE = ("run", "step", "bag_size", "positions", "data_tokens", "flops", "seconds")
CURVE += ("loss", "val_loss", "val_bpb")
FORGOTTEN = (
    "out_dir",
    "resume",
    "allow_changes",
    "overwrite",
    "wandb_project",
)  # these made no difference


def names_of(paths):
    """The names of run folders: the last component, or as many of the last ones as tell all of them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same run is given twice")


def cell(value):
    """A value as text: of a float nine digits, which tell float32 apart, and all of a count."""
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def without_folders(text):
    """`text` without the folders of a path from the root: they are those of one machine."""
    return re.sub(r"(^|[=:,\s])(?:[A-Za-z]:)?[/\\](?:[^/\\\s=,]+[/\\])*", r"\1", text)


def summary(folder, name, label, rows):
    """A run's row of runs.csv, column to text: how the run ended, and what config.json knows of it."""
    facts = finished.describe(folder)
    if not facts:
        raise UserError(f"{name} has no config.json: how it was made is not known")
    described = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    versions, command = described.get("versions", {}), described.get("command", [])
    end = final(rows)
    best = min((row for row in rows if "val_loss" in row), key=lambda row: row["val_loss"])
    rates = [row["positions_per_second"] for row in rows if "positions_per_second" in row]
    out = {key: value for key, value in end.items() if key in OUTCOME or key.startswith(METRICS)}
    out |= {
        "run": name,
        "label": label,
        "steps": end["step"],
        "best_val_loss": best["val_loss"],
        "best_step": best["step"],
        "positions_per_second": round(statistics.median(rates)) if rates else None,
        "machine": versions.get("device"),
        "precision": versions.get("dtype"),
        "ranks": versions.get("world_size"),
        "torch": versions.get("torch"),
        "python": versions.get("python"),
        "command": " ".join(without_folders(arg) for arg in command if arg != "python"),
    }
    out = {key: cell(value) for key, value in out.items() if value not in (None, "")}
    return {key: without_folders(text) for key, text in facts.items() if key not in FORGOTTEN} | out


def thinned(rows, points):
    """About `points` of a run's rows: the ends and those around a switch, then validation, then the rest."""
    sizes = [row.get("bag_size") for row in rows]
    switched = [i for i in range(1, len(rows)) if sizes[i] != sizes[i - 1]]
    kept = {0, len(rows) - 1} | {i + near for i in switched for near in (-2, -1, 0, 1, 2, 3)}
    kept = {i for i in kept if 0 <= i < len(rows)}
    for wanted in ([i for i, row in enumerate(rows) if "val_loss" in row], range(len(rows))):
        more = [i for i in wanted if i not in kept]
        room = min(len(more), max(0, points - len(kept)))
        kept |= {more[i] for i in np.linspace(0, len(more) - 1, room).round().astype(int)}
    return [rows[i] for i in sorted(kept)]


def columns_of(runs):
    """The columns of runs.csv: who, the knobs that differ, what came out, the rest."""
    known = dict.fromkeys(key for run in runs for key in run)
    metrics = [key for key in known if key.startswith(METRICS)]
    where = (*finished.WHERE, *finished.CORPUS, *finished.MODEL)
    knobs = [key for key in known if key not in (*finished.WHO, *OUTCOME, *metrics, *where)]
    differ = [
        key for key in knobs if key not in finished.FREE and len({run.get(key) for run in runs}) > 1
    ]
    columns = [*finished.WHO, *differ, *OUTCOME, *metrics, *where]
    return [key for key in columns if key in known] + [key for key in knobs if key not in differ]


def write_table(path, columns, lines):
    """Write a CSV file of lines, dicts of column to text. The file is whole or as it was."""
    part = path.with_name(path.name + ".tmp")
    with open(part, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    part.replace(path)


def read_folder(out_dir):
    """What is kept already: {run: its row of runs.csv}, {run: its rows of curves.csv}."""
    runs, curves = {}, {}
    if (out_dir / "runs.csv").exists():
        runs = {line["run"]: line for line in finished.read_table(out_dir / "runs.csv")}
    if (out_dir / "curves.csv").exists():
        for line in finished.read_table(out_dir / "curves.csv"):
            curves.setdefault(line["run"], []).append(line)
    return runs, curves


def main(config):
    if not config.out_dir:
        raise UserError("--out_dir must name a folder, such as results/NAME")
    if config.points < 2:
        raise UserError(f"points must be at least 2, got {config.points}")
    names = names_of(config.runs)
    labels = config.labels.split(",") if config.labels else names
    labels = labels * len(names) if len(labels) == 1 else labels
    if len(labels) != len(names):
        raise UserError(f"--labels has {len(labels)} labels for {len(names)} runs")
    chosen = set(names) if config.curves == "all" else set(config.curves.split(",")) - {"none"}
    if unknown := chosen - {*names, *labels}:
        raise UserError(f"--curves: {min(unknown)} is no name or label of these runs")

    out_dir = Path(config.out_dir)
    runs, curves = read_folder(out_dir)
    for folder, name, label in zip(config.runs, names, labels):
        rows = finished.load_metrics(folder)
        line = summary(folder, name, label, rows)
        print(
            f"{name}: {'replaced' if name in runs else 'added'}, {label}, val_loss {line['val_loss']}"
        )
        runs[name] = line
        curves.pop(name, None)
        if chosen & {name, label}:
            keys = [
                *CURVE[1:],
                *dict.fromkeys(key for row in rows for key in row if key.startswith(METRICS)),
            ]
            points = thinned(rows, config.points)
            curves[name] = [
                {"run": name} | {key: cell(row[key]) for key in keys if key in row}
                for row in points
            ]
    out_dir.mkdir(parents=True, exist_ok=True)
    write_table(out_dir / "runs.csv", columns_of(runs.values()), runs.values())
    lines = [line for name in runs for line in curves.get(name, [])]
    if lines or (out_dir / "curves.csv").exists():
        columns = dict.fromkeys([*CURVE, *(key for line in lines for key in line)])
        write_table(out_dir / "curves.csv", list(columns), lines)
    print(f"{out_dir}: {len(runs)} runs, curves of {len(curves)}")
    if not (out_dir / "README.md").exists():
        print(f"{out_dir / 'README.md'} is missing: what was asked, and what was found")


if __name__ == "__main__":
    configurator.entry_point(main, Config)
