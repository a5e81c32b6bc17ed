"""Reads training runs for all of tools/: metrics.jsonl and config.json, or what tools/keep.py kept of them.

A run is a dict of name, label (None if it has none), rows (as in metrics.jsonl) and facts (knobs, corpus and
model, as text).
"""

import csv
import io
import json
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
BAGS = marked(Config, Bags)  # idle without superposition
CORPUS = ("encoding", "vocab_size", "bytes_per_token", "train_tokens", "val_tokens", "fingerprint")
MODEL = ("parameters", "active_parameters")
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


def describe(folder):
    """(facts of a run folder, its config.json)."""
    path = Path(folder) / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        facts = {key: described["data"].get(key) for key in CORPUS}
        facts |= {key: described.get(key) for key in MODEL} | renamed(described["config"])
        facts["max_steps"] = int(facts["max_steps"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is missing or damaged, so how it was made is not known") from None
    return {k: str(v) for k, v in facts.items() if v not in (None, "")}, described


def read_table(path):
    """The rows of runs.csv or curves.csv as dicts of text, without empty cells; none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as f:
        return [renamed({k: v for k, v in line.items() if v}) for line in csv.DictReader(f)]


def write_table(path, columns, lines):
    """Write a CSV file with these columns of lines, dicts."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, table.getvalue())


def numbers(line, keys):
    """Those `keys` of a row of text that it has, as numbers."""
    known = {key: line[key] for key in keys if key in line}
    return {key: int(v) if v.isdigit() else float(v) for key, v in known.items()}


def read_folder(path):
    """The run in a run folder. If it has no config.json, what its rows tell of it."""
    rows = load_metrics(path)
    if (path / "config.json").exists():
        facts = describe(path)[0]
    else:
        print(f"note: {path} has no config.json and is taken for finished", file=sys.stderr)
        most = lambda key: str(max((row.get(key, 1) for row in rows), default=1))
        facts = {"max_steps": most("step"), "bag_size": most("bag_size")}
    return dict(name=path.resolve().name, label=None, rows=rows, facts=facts, path=str(path))


def read_kept(folder, wanted):
    """Runs that tools/keep.py kept in `folder` and whose name or label matches the pattern `wanted`. The rows
    of a run without a curve are its last one alone."""
    rows, runs = {}, []
    for line in read_table(folder / "curves.csv"):
        rows.setdefault(line.pop("run"), []).append(numbers(line, line))
    for line in read_table(folder / "runs.csv"):
        if not {"label", "steps", "max_steps", "bag_size"} <= line.keys():
            todo = "name the folders of its runs"
            raise UserError(f"{folder / 'runs.csv'} was not written by tools.keep; {todo}")
        name, label = line["run"], line["label"]
        if fnmatch(name, wanted) or fnmatch(label, wanted):
            last = {"step": int(line["steps"])} | numbers(line, ENDS)
            runs.append(dict(name=name, label=label, rows=rows.get(name, [last]), facts=line))
    if not runs:
        raise UserError(f"{folder}: no run of the name or label {wanted} is kept there")
    return runs


def read_runs(paths):
    """The runs that `paths` name: run folders, folders of tools/keep.py, or KEPT/PATTERN."""
    runs = []
    for path in map(Path, paths):
        kept = next((p for p in (path, *path.parents) if (p / "runs.csv").exists()), None)
        if kept and not (path / "metrics.jsonl").exists():
            runs += read_kept(kept, "*" if path == kept else path.relative_to(kept).as_posix())
        else:
            runs.append(read_folder(path))
    names = [run["name"] for run in runs]
    for run in runs:
        if names.count(run["name"]) > 1:
            run["name"] = run.get("path", run["name"])
        if not any("val_loss" in row for row in run["rows"]):
            raise UserError(f"{run['name']}: no validation rows")
    return runs


def is_baseline(facts):
    """Whether a run with these knobs has no superposition."""
    return str(facts["bag_size"]) == "1" or float(facts.get("superposition_ratio", 1)) == 0


def final(rows):
    """The last row with a validation loss."""
    return next(row for row in reversed(rows) if "val_loss" in row)


def tokenizers_of(runs):
    """The distinct tokenizers of runs."""
    return {tuple(run["facts"].get(key) for key in ("encoding", "vocab_size")) for run in runs}


def measure_of(runs):
    """The loss by which runs compare: val_loss, or val_bpb if their tokenizers differ."""
    if len(tokenizers_of(runs)) == 1:
        return "val_loss"
    for run in runs:
        if "val_bpb" not in final(run["rows"]):
            raise UserError(f"{run['name']} has no val_bpb, by which different tokenizers compare")
    return "val_bpb"


def notes_on_differences(runs):
    """Sentences that name what differs between runs apart from the columns of the table."""
    found = []
    for fact in ("vocab_size", *CORPUS[3:5], *Config.__dataclass_fields__, "parameters"):
        values = {}  # value: labels; a knob that is younger than a run is no difference
        for run in runs:
            if fact in run["facts"] and fact not in FREE | IN_TABLE:
                values.setdefault(run["facts"][fact], {})[run["label"]] = None
        if len(values) > 1:
            few = sum(map(len, values.values())) < 5
            said = [f"{v} ({', '.join(labels)})" if few else v for v, labels in values.items()]
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
