"""Reads training runs for all of tools/: metrics.jsonl and config.json, or what tools/keep.py kept of them.

A run is a dict of name, label, rows (as in metrics.jsonl), validated (the rows with a validation loss) and
facts (knobs, corpus, model, machine and command, as text). One in a run folder has a path.
"""

import csv
import io
import json
import os
import sys
from fnmatch import fnmatch
from pathlib import Path

from nanotst import UserError
from nanotst.configurator import Bags, Free, marked, renamed
from nanotst.files import write_text
from train import Config

# Knobs that change nothing that is learned. A resumed run has its corpus and its weights already, so two are
# free in train.py that are not free here.
FREE = marked(Config, Free) - {"dataset", "init_from"}
LEARNED = [knob for knob in Config.__dataclass_fields__ if knob not in FREE]
BAGS = marked(Config, Bags)  # idle without superposition
CORPUS = ("encoding", "vocab_size", "bytes_per_token", "train_tokens", "val_tokens", "fingerprint")
MODEL = ("parameters", "active_parameters")
WHERE = {"device": "machine", "dtype": "precision", "world_size": "ranks"}  # knobs have these names
ENDS = ("positions", "data_tokens", "flops", "seconds", "val_loss", "val_bpb")
NUMBERS = ("step", "bag_size", "loss", *ENDS)
IN_TABLE = {"bag_size", "superposition_ratio", "max_steps", "seed", "dataset"}  # need no note


def load_metrics(folder):
    """Rows (dicts, ascending step) of a run folder. A torn last line (of a killed process) is skipped with a
    note. UserError: no such run, or a bad line, as file:line."""
    path, rows = Path(folder) / "metrics.jsonl", []
    if not path.exists():
        raise UserError(f"{folder}: no metrics.jsonl there, so it is not the folder of a run")
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    for n, line in enumerate(lines, 1):
        try:
            row = {k: v for k, v in renamed(json.loads(line)).items() if v is not None}
            if "step" not in row or {type(row.get(k, 0)) for k in NUMBERS} - {int, float}:
                raise TypeError
            rows.append(row)
        except (ValueError, TypeError, AttributeError):
            if n < len(lines) or line.endswith("}"):
                raise UserError(f"{path}:{n}: not a row of train.py: {line[:40]!r}") from None
            print(f"note: {path}:{n}: torn last line skipped", file=sys.stderr)
    return rows


def read_facts(path):
    """The facts in a config.json. A knob that is younger than the run had its default."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        facts = {WHERE.get(k, k): v for k, v in described.get("versions", {}).items()}
        facts["command"] = " ".join(described.get("command", []))
        facts |= {key: described["data"].get(key) for key in CORPUS}
        facts |= {key: described.get(key) for key in MODEL}
        facts |= vars(Config()) | renamed(described["config"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged, so how the run was made is not known") from None
    return {k: str(v) for k, v in facts.items() if v not in (None, "")}


def read_table(path):
    """The rows of runs.csv or curves.csv as dicts of text, without empty cells; none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as f:
        return [renamed({k: v for k, v in line.items() if v}) for line in csv.DictReader(f)]


def write_table(path, first, lines):
    """Write a CSV file of lines, dicts. The columns in `first` are the first ones."""
    columns = dict.fromkeys([*first, *(key for line in lines for key in line)])
    table = io.StringIO()
    writer = csv.DictWriter(table, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, table.getvalue())


def read_folder(path):
    """The run in a run folder. If it has no config.json, what its rows tell of it."""
    rows = load_metrics(path)
    if (path / "config.json").exists():
        facts = read_facts(path / "config.json")
    else:
        print(f"note: {path} has no config.json and is taken for finished", file=sys.stderr)
        most = lambda key: str(max((row.get(key, 1) for row in rows), default=1))
        facts = {"max_steps": most("step"), "bag_size": most("bag_size")}
    return dict(rows=rows, facts=facts, path=path.resolve())


def read_kept(folder, wanted):
    """Runs that tools/keep.py kept in `folder` and whose name or label matches the pattern `wanted`. The rows
    of a run without a curve are its last one alone."""
    curves, runs = {}, []
    for line in read_table(folder / "curves.csv"):
        name = line.pop("run")
        curves.setdefault(name, []).append({key: float(v) for key, v in line.items()})
    for line in read_table(folder / "runs.csv"):
        name, label = line.pop("run"), line.pop("label", "")
        if fnmatch(name, wanted) or fnmatch(label, wanted):
            last = {key: float(line[key]) for key in ENDS if key in line}
            rows = curves.get(name, [{"step": float(line["steps"])} | last])
            runs.append(dict(name=name, label=label, rows=rows, facts=line))
    if not runs:
        raise UserError(f"{folder}: no run of the name or label {wanted} is kept there")
    return runs


def read_runs(paths, labels=""):
    """The runs that `paths` name: run folders, folders of tools/keep.py, or KEPT/PATTERN. A new run has the
    name of its folder, with the folders above that not all share. `labels`, separated by commas, are one for
    each run or one for all."""
    runs = []
    for path in map(Path, paths):
        kept = next((p for p in (path, *path.parents) if (p / "curves.csv").exists()), None)
        if kept and not (path / "metrics.jsonl").exists():
            runs += read_kept(kept, "*" if path == kept else path.relative_to(kept).as_posix())
        else:
            runs.append(read_folder(path))
    folders = [run["path"] for run in runs if "path" in run]
    if len(set(folders)) < len(folders):
        raise UserError("one run is given twice")
    for run in runs:
        if "path" in run:
            shared = os.path.commonpath([path.parent for path in folders])
            run["name"] = run["label"] = run["path"].relative_to(shared).as_posix()
    labels = labels.split(",") if labels else [run["label"] for run in runs]
    labels = labels * len(runs) if len(labels) == 1 else labels
    if len(labels) != len(runs):
        raise UserError(f"--labels has {len(labels)} labels for {len(runs)} runs")
    for run, label in zip(runs, labels):
        run["label"] = label
        run["validated"] = [row for row in run["rows"] if "val_loss" in row]
        if not run["validated"]:
            raise UserError(f"{run['name']}: no validation rows")
    return runs


def is_baseline(facts):
    """Whether a run with these knobs has no superposition."""
    return str(facts["bag_size"]) == "1" or float(facts.get("superposition_ratio", 1)) == 0


def tokenizers_of(runs):
    """The distinct tokenizers of runs."""
    return {tuple(run["facts"].get(key) for key in ("encoding", "vocab_size")) for run in runs}


def measure_of(runs):
    """The loss by which runs compare: val_loss, or val_bpb if their tokenizers differ."""
    if len(tokenizers_of(runs)) == 1:
        return "val_loss"
    for run in runs:
        if "val_bpb" not in run["validated"][-1]:
            raise UserError(f"{run['name']} has no val_bpb, by which different tokenizers compare")
    return "val_bpb"


def notes_on_differences(runs):
    """Sentences that name what differs between runs apart from the columns of the table."""
    found = []
    for fact in ("vocab_size", "train_tokens", "val_tokens", *LEARNED, "parameters"):
        labels = {}  # of each value; a knob that is younger than a run is no difference
        empty = "none" if getattr(Config, fact, None) == "" else None
        for run in runs:
            if (value := run["facts"].get(fact, empty)) and fact not in IN_TABLE:
                labels.setdefault(value, {})[run["label"]] = None
        if len(labels) > 1:
            few = sum(map(len, labels.values())) < 5
            said = [f"{v} ({', '.join(who)})" if few else v for v, who in labels.items()]
            found.append(f"{fact} {', '.join(said)}")
    notes = [f"Not the same in all runs: {'; '.join(found)}."] if found else []
    if len(tokenizers_of(runs)) > 1:
        notes.append("Nats per token of different tokenizers do not compare; bits per byte do.")
    return notes


def markdown_table(cells):
    """A markdown table of rows of cells, the header first."""
    cells = [cells[0], ["-:"] * len(cells[0]), *cells[1:]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    justify = lambda cell, width: cell.rjust(width, "-" if cell == "-:" else " ")
    return "\n".join("| " + " | ".join(map(justify, row, widths)) + " |" for row in cells)
