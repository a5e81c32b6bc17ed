"""Finished runs, as all of tools/ reads them: the rows of metrics.jsonl with config.json beside them, or what
tools/keep.py has kept of both in results/. And what differs between runs that are to be compared.
"""

import csv
import hashlib
import json
import sys
from pathlib import Path

from nanotst import UserError

# The columns of a kept runs.csv; all others are knobs of train.py.
WHO = ("run", "label")
OUTCOME = (
    "steps",
    "val_loss",
    "val_bpb",
    "best_val_loss",
    "best_step",
    "positions",
    "data_tokens",
    "flops",
)
OUTCOME += ("seconds", "positions_per_second")
WHERE = ("machine", "precision", "ranks", "torch", "python", "command")
METRICS = (
    "val_loss_",
    "max_violation",
    "router_entropy",
    "dead_experts",
)  # how further measurements begin
CORPUS = ("encoding", "vocab_size", "bytes_per_token", "train_tokens", "val_tokens", "fingerprint")
MODEL = ("parameters", "active_parameters")

# No note is made of what the table shows, and of knobs that do not change what is learned.
SHOWN = (
    "bag_size",
    "superposition_ratio",
    "max_steps",
    "seed",
    "active_parameters",
    "dataset",
    *CORPUS[:-1],
)
FREE = (
    "out_dir",
    "resume",
    "allow_changes",
    "overwrite",
    "eval_interval",
    "log_interval",
    "save_interval",
)
FREE += ("batch_size", "wandb_project", "device", "compile", "threads", "checkpoint_activations")


def load_metrics(path):
    """Rows (dicts, ascending step) of a run folder or metrics.jsonl, as the run finally went.

    A resumed run writes some steps twice: where steps go back, the earlier rows from there on are dropped,
    and rows of one step become one row in which later values win. A torn last line (a killed process) is
    skipped with a note on stderr. UserError: no such run, no metrics.jsonl, or an unreadable line, as
    file:line.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run")
    if path.is_dir():
        path = path / "metrics.jsonl"
        if not path.exists():
            raise UserError(f"{path.parent}: no metrics.jsonl in this folder")
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = []
    for n, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if n != lines[-1][0]:
                raise UserError(f"{path}:{n}: not a JSON object: {line[:40]!r}") from None
            print(f"note: {path}:{n}: torn last line skipped", file=sys.stderr)
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), (int, float)):
            raise UserError(f"{path}:{n}: not a JSON object with a step")
        row = {key: value for key, value in row.items() if value is not None}
        if "tokens_per_second" in row:  # its name until November 2026
            row["positions_per_second"] = row.pop("tokens_per_second")
        if rows and row["step"] < rows[-1]["step"]:
            rows = [old for old in rows if old["step"] < row["step"]]
        if rows and row["step"] == rows[-1]["step"]:
            row = rows.pop() | row
        rows.append(row)
    return rows


def describe(folder):
    """What config.json in a run folder says of the run, {} if there is none: its knobs, and of corpus and
    model what decides whether runs compare. All values are text, as in runs.csv."""
    path = Path(folder) / "config.json"
    if not path.exists():
        return {}
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        facts = described["config"] | {key: described.get(key) for key in MODEL}
        facts |= {key: described["data"].get(key) for key in CORPUS}
        if files := described["data"].get("sha256"):  # of all token files
            files = json.dumps(files, sort_keys=True).encode()
            facts["fingerprint"] = facts["fingerprint"] or hashlib.sha256(files).hexdigest()[:16]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is not the config.json of a run") from None
    return {key: str(value) for key, value in facts.items() if value not in (None, "")}


def read_table(path):
    """The lines of a CSV file as dicts of column to text, without the empty cells."""
    with open(path, newline="", encoding="utf-8") as f:
        lines = list(csv.DictReader(f))
    for n, line in enumerate(lines, 2):
        if None in line or None in line.values() or not line.get("run"):
            raise UserError(f"{path}: row {n} has not the columns of the first line")
    return [{key: value for key, value in line.items() if value} for line in lines]


def read_kept(folder, wanted=None):
    """The runs whose curves keep.py has kept in `folder`, or those whose name or label is `wanted`."""
    known = {line["run"]: line for line in read_table(folder / "runs.csv")}
    rows = {}
    for line in read_table(folder / "curves.csv"):
        name = line.pop("run")
        try:
            numbers = {
                key: int(text) if text.isdigit() else float(text) for key, text in line.items()
            }
            rows.setdefault(name, []).append({"step": numbers.pop("step")} | numbers)
        except (ValueError, KeyError):
            raise UserError(
                f"{folder / 'curves.csv'}: a row of {name} does not hold numbers"
            ) from None
    if unknown := rows.keys() - known.keys():
        raise UserError(f"{folder}: {min(unknown)} is in curves.csv and not in runs.csv")
    chosen = [line for line in known.values() if wanted in (None, line["run"], line.get("label"))]
    drawn = [line for line in chosen if line["run"] in rows]
    if not drawn:
        raise UserError(f"{folder}: no curve of {wanted or 'any run'} is kept there")
    if bare := len(chosen) - len(drawn):
        print(
            f"note: {folder}: {bare} runs of {len(chosen)} are kept without a curve: left out",
            file=sys.stderr,
        )
    runs = []
    for line in drawn:
        measured = [key for key in line if key in WHO + OUTCOME + WHERE or key.startswith(METRICS)]
        facts = {key: value for key, value in line.items() if key not in measured}
        runs.append(
            dict(name=line["run"], label=line.get("label"), rows=rows[line["run"]], facts=facts)
        )
    return runs


def read_runs(paths):
    """The runs that `paths` name, as dicts of name, label (None where none is kept), rows and facts."""
    runs = []
    for path in map(Path, paths):
        if (path / "curves.csv").exists():
            runs += read_kept(path)
            continue
        kept = [
            parent
            for parent in path.parents
            if not path.exists() and (parent / "curves.csv").exists()
        ]
        if kept:
            runs += read_kept(kept[0], path.relative_to(kept[0]).as_posix())
            continue
        rows, folder = load_metrics(path), path.parent if path.is_file() else path
        runs.append(
            dict(
                name=folder.resolve().name,
                path=folder,
                label=None,
                rows=rows,
                facts=describe(folder),
            )
        )
    names = [run["name"] for run in runs]
    for run in runs:
        if names.count(run["name"]) > 1 and "path" in run:
            run["name"] = str(run["path"])
        if not any("val_loss" in row for row in run["rows"]):
            raise UserError(f"{run['name']}: no validation rows")
    return runs


def final(rows):
    """The last row with a validation loss. UserError if there is none."""
    for row in reversed(rows):
        if "val_loss" in row:
            return row
    raise UserError("no validation rows")


def tokenizer_of(run):
    """What a run's tokens are, as text; None if it is not known."""
    size = run["facts"].get("vocab_size")
    return f"{run['facts'].get('encoding', 'unknown')} of {size}" if size else None


def corpus_of(run):
    """How much text a run has, as text; None if it is not known."""
    sizes = [run["facts"].get(f"{split}_tokens") for split in ("train", "val")]
    return " + ".join(sizes) + " tokens" if all(sizes) else None


def measure_of(runs):
    """The loss by which these runs compare: val_loss, or val_bpb if their tokenizers differ."""
    if len({tokenizer_of(run) for run in runs} - {None}) < 2:
        return "val_loss"
    for run in runs:
        if not any("val_bpb" in row for row in run["rows"]):
            raise UserError(
                f"different tokenizers compare in bits per byte, and {run['name']} has no val_bpb"
            )
    return "val_bpb"


def notes_on_differences(runs):
    """Sentences that name what differs between the runs and is no column of the table."""
    sides = {"tokenizer": tokenizer_of, "corpus": corpus_of}
    for knob in dict.fromkeys(key for run in runs for key in run["facts"]):
        if knob not in SHOWN + FREE:
            sides[knob] = lambda run, knob=knob: run["facts"].get(knob)
    found = []
    for what, value_of in sides.items():
        values = {}
        for run in runs:
            values.setdefault(value_of(run), {})[run["label"]] = None
        values.pop(None, None)  # not known, such as a knob that is younger than the run
        if len(values) > 1:
            few = sum(map(len, values.values())) < 5
            said = [
                f"{value} ({', '.join(labels)})" if few else value
                for value, labels in values.items()
            ]
            found.append(f"{what} {', '.join(said)}")
    notes = [f"Not the same in all runs: {'; '.join(found)}."] if found else []
    if measure_of(runs) == "val_bpb":
        notes.append(
            "Nats per token of different tokenizers do not compare: bits per byte count here."
        )
    blind = list(dict.fromkeys(run["name"] for run in runs if not run["facts"]))
    if blind and len(runs) > 1:
        notes.append(
            f"Without config.json, model and corpus are not known to be the same: {', '.join(blind)}."
        )
    return notes


def markdown_table(cells):
    """Rows of cells, the first being the header, as a table."""
    cells = [cells[0], ["-:"] * len(cells[0]), *cells[1:]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    justify = lambda cell, width: cell.rjust(width, "-" if cell == "-:" else " ")
    return "\n".join("| " + " | ".join(map(justify, row, widths)) + " |" for row in cells)
