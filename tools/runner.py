"""Runs of train.py side by side: which there are to do, and doing them. tools/sweep.py and tools/compare.py
stand on this.

A run is known by its settings, which stand in its folder (sweep.json), beside metrics.jsonl and what it
printed (log.txt). What is done is skipped, what was cut off is resumed from its checkpoint, what failed is
tried again.
"""

import ast
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nanotst import UserError
from nanotst.configurator import read_file, typed, value_of
from tools.runs import FREE, load_metrics

TRAINER = Path(__file__).resolve().parents[1] / "train.py"
# without superposition, these knobs change nothing
SUPERPOSITION = {
    "bag_size",
    "superposition_ratio",
    "superposition",
    "loss",
    "bag_weights",
    "fitted",
}
SUPERPOSITION |= {"document_bags", "reinit_at_switch"}
# and these where another knob has another value: {knob: (the other, that value, what to take it for)}
IDLE = {"fitted": ("bag_weights", "fitted", ""), "matrix_learning_rate": ("optimizer", "muon", 0.0)}
COMMAS = {"dataset", "reinit_at_switch"}  # one value of these may hold commas
OURS = {"resume", "overwrite", "allow_changes"}  # a member's folder decides these
SHORT = {
    "bag_size": "s",
    "superposition_ratio": "r",
    "learning_rate": "lr",
    "seed": "seed",
}  # in names


@dataclass(eq=False)
class Member:
    """One run among several."""

    name: str
    point: dict  # the knobs that tell it from the others
    settings: dict  # all knobs of the trainer that matter to what is learned
    arguments: list  # for the trainer
    folder: Path

    @property
    def steps(self):
        return self.settings["max_steps"]

    def rows(self):
        return load_metrics(self.folder) if (self.folder / "metrics.jsonl").exists() else []

    def end(self):
        """Its last row of metrics.jsonl, or None while it is not done."""
        try:
            return next(
                (row for row in self.rows() if row["step"] >= self.steps and "val_loss" in row),
                None,
            )
        except UserError:
            return None  # damaged, of which the trainer tells when it is to go on

    def step(self):
        """The last step in its log so far, from the end of the file: asked for often."""
        try:
            with open(self.folder / "metrics.jsonl", "rb") as f:
                f.seek(max(0, f.seek(0, os.SEEK_END) - 4096))
                steps = re.findall(rb'"step": (\d+)', f.read())
        except FileNotFoundError:
            return 0
        return int(steps[-1]) if steps else 0


# ------------------------------------------------------------------------------------------------- which runs


def knobs_of(trainer):
    """{name: field} of the trainer's Config. Its source is read, not run: it is a program of its own. Choices
    that the source does not spell out are left for the trainer to check."""
    tree = ast.parse(Path(trainer).read_bytes(), str(trainer))
    config = next(
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config"
    )
    kinds = {"int": int, "float": float, "bool": bool, "int | str": int | str}
    fields = []
    for node in config.body:
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            kind = kinds.get(
                re.sub(r"^(Free|Bags)\[(.*)\]$", r"\2", ast.unparse(node.annotation)), str
            )
            fields.append((node.target.id, kind, dataclasses.field(default=value_of(node.value))))
    return {
        field.name: field
        for field in dataclasses.fields(dataclasses.make_dataclass("Knobs", fields))
    }


def places(argv, config):
    """A command line with the trainer's --key=value turned into places: the dataclass `config`, which reads
    it, knows the tool's own knobs only, and takes the rest as a list."""
    own = {field.name for field in dataclasses.fields(config)} | {"help"}
    is_own = lambda arg: (
        not arg.startswith("--") or arg[2:].partition("=")[0].replace("-", "_") in own
    )
    return [arg if is_own(arg) else arg[2:] for arg in argv]


def alternatives(key, text):
    """The values in "a,b,c", or, of a knob in COMMAS or where there is a semicolon, in "a;b,c;d" (a last,
    empty one is none)."""
    return text.removesuffix(";").split(";") if key in COMMAS or ";" in text else text.split(",")


def read_arguments(arguments, knobs, own):
    """(settings, config files, grid): all knobs as the config files set them, and the values given for some.
    `own`: the tool's dataclass, whose knobs may have been meant by a misspelt one."""
    settings, files, grid = {name: field.default for name, field in knobs.items()}, [], {}
    known = {field.name: field for field in dataclasses.fields(own)} | knobs
    for arg in arguments:
        if arg.endswith(".py"):
            files.append(arg)
            for key, value in read_file(arg).items():
                settings[key] = typed(knobs.get(key), key, value, arg, knobs)
            continue
        key, equals, text = arg.partition("=")
        key, where = key.replace("-", "_"), f"--{arg}"
        if key in OURS:
            raise UserError(
                f"{where}: runs go on, or start anew, as their folders say; leave --{key} out"
            )
        if key in knobs and not equals and knobs[key].type is not bool:
            raise UserError(f"{where}: write --{key}=VALUE")
        values = alternatives(key, text) if equals else [True]
        grid[key] = list(dict.fromkeys(typed(knobs.get(key), key, v, where, known) for v in values))
    return settings, files, grid


def is_ordinary(settings):
    """Whether a run has no superposition, so that it is the baseline."""
    return settings["bag_size"] == 1 or settings["superposition_ratio"] == 0


def make_member(settings, files, chosen, varied, out_dir):
    """The run with the knobs `chosen` over `settings`, told from its neighbours by those in `varied`."""
    full = {k: v for k, v in (settings | chosen).items() if k not in FREE}
    idle = {k for k, (reader, value, _) in IDLE.items() if k in full and full[reader] != value}
    full |= {k: IDLE[k][2] for k in idle}
    ordinary = {"bag_size": 1} if is_ordinary(full) else {}
    if ordinary:
        idle |= SUPERPOSITION
        full = {k: v for k, v in full.items() if k not in SUPERPOSITION} | ordinary
    chosen = {k: v for k, v in chosen.items() if k not in idle}
    point = (ordinary if SUPERPOSITION & set(varied) else {}) | {
        k: chosen[k] for k in varied if k in chosen
    }
    chosen |= ordinary
    words = [
        f"{SHORT.get(k, k + '=')}{as_text(v).rstrip('/').rpartition('/')[2]}"
        for k, v in point.items()
    ]
    name = re.sub(r"[^\w.+=-]", "-", "_".join(words)) or "run"
    arguments = [*files, *(f"--{k}={v}" for k, v in chosen.items())]
    return Member(name, point, full, arguments, Path(out_dir) / name)


def as_text(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def changed_knobs(old, new, knobs):
    """What settings differ, as text. A knob that the trainer got since has had its default."""
    old = {key: old.get(key, knobs[key].default) for key in new}
    return [f"{key} {old[key]} instead of {new[key]}" for key in new if old[key] != new[key]]


def find_folders(members, out_dir, knobs):
    """Give each member the folder in out_dir that holds its settings, if there is one. UserError if another
    run is where it would go."""
    there = {
        path.parent: json.loads(path.read_text())
        for path in sorted(Path(out_dir).glob("*/sweep.json"))
    }
    for member in members:
        same = [
            path for path, old in there.items() if not changed_knobs(old, member.settings, knobs)
        ]
        if same:
            member.folder = same[0]
        elif member.folder in there or (member.folder / "metrics.jsonl").exists():
            different = changed_knobs(there.get(member.folder, {}), member.settings, knobs)
            raise UserError(
                f"{member.folder} holds another run"
                + (f", with {', '.join(different)}" if member.folder in there else "")
                + ": give another --out_dir, or move it away"
            )


# ------------------------------------------------------------------------------------------------- doing them


@dataclass
class Job:
    """A member that is being trained."""

    member: Member
    process: subprocess.Popen
    begin: int  # where in log.txt it began
    gpu: str | None

    def last_line(self):
        with open(self.member.folder / "log.txt", errors="replace") as f:
            f.seek(self.begin)
            lines = [line.strip() for line in re.split(r"[\n\r]", f.read()) if line.strip()]
        return lines[-1] if lines else "it printed nothing"


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def find_gpus(text):
    """Identifiers for CUDA_VISIBLE_DEVICES: of the knob `gpus`, or all that this process may use."""
    if text != "auto":
        return [""] if text == "none" else text.split(",")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return (
        [] if done.returncode else done.stdout.split()
    )  # without its driver it prints a message there


def start(member, trainer, threads, gpu):
    """Train it in a process of its own -> Job. If another process trains it already, train.py's lock ends
    this one."""
    folder = member.folder
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(trainer),
        *member.arguments,
        f"--out_dir={folder}",
        f"--threads={threads}",
    ]
    if (folder / "last.pt").exists():
        command.append("--resume")
    elif (folder / "metrics.jsonl").exists():  # it never came to a checkpoint
        command.append("--overwrite")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with open(folder / "log.txt", "a") as log:
        (folder / "sweep.tmp").write_text(json.dumps(member.settings, indent=1))
        os.replace(folder / "sweep.tmp", folder / "sweep.json")
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        begin = log.tell()
        output = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        # in a session of its own, the terminal's Ctrl-C reaches it through us alone, once
        process = subprocess.Popen(command, env=environment, start_new_session=True, **output)
    return Job(member, process, begin, gpu)


def stop(jobs):
    """Ask training to save and end, and wait for that; a second Ctrl-C kills it."""
    if not jobs:
        return
    print(f"\nstopping {len(jobs)} at a checkpoint; Ctrl-C again kills them", flush=True)
    for job in jobs:
        job.process.terminate()
    try:
        for job in jobs:
            job.process.wait()
    except KeyboardInterrupt:
        for job in jobs:
            if job.process.poll() is None:
                os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()


@contextmanager
def signals_as_interrupts():
    """Whoever is told to end, or loses its terminal, does as after Ctrl-C."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    wanted = [
        n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN
    ]  # nohup
    old = {number: signal.signal(number, interrupt) for number in wanted}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Progress:
    """One line: what is done and running, and when the rest will be. On a terminal it is kept up to date;
    elsewhere it is printed once for every run that ends. Work is counted in steps, which is fair among runs
    of one model."""

    def __init__(self, members):
        self.members, self.failed = members, {}  # {name: why}
        self.steps = {member.name: member.step() for member in members}
        self.made, self.busy = 0, 0.0  # steps since we began, and seconds of all runs together
        self.began = self.looked_at = time.monotonic()

    def look(self, running):
        """See how far the runs are."""
        now = time.monotonic()
        self.busy, self.looked_at = self.busy + len(running) * (now - self.looked_at), now
        for m in self.members:
            if m in running or self.steps[m.name] < m.steps:
                # after a kill a run goes on from its checkpoint, before the last step that it had logged
                self.made += max(0, (step := m.step()) - self.steps[m.name])
                self.steps[m.name] = step

    def line(self, running):
        self.look(running)
        done = sum(self.steps[m.name] >= m.steps for m in self.members if m not in running)
        left = [m.steps - self.steps[m.name] for m in self.members if m.name not in self.failed]
        parts = [f"{done} of {len(self.members)} done"]
        parts += [f"{len(self.failed)} failed"] * bool(self.failed)
        parts += [
            ", ".join(f"{m.name} {self.steps[m.name] / m.steps:.0%}" for m in running)
        ] * bool(running)
        if not self.made:
            return " | ".join([*parts, "eta unknown"])
        # all of it at the pace of all runs together, but the longest one at that of one run
        work = max(sum(left) * (self.looked_at - self.began), max(left, default=0) * self.busy)
        minutes = math.ceil(work / self.made / 60)
        return " | ".join([*parts, f"eta {minutes // 60}h{minutes % 60:02d}m"])

    def say(self, running, event=""):
        terminal, late = sys.stdout.isatty(), time.monotonic() - self.looked_at > 1
        if event:
            print(f"\r\033[K{event}" if terminal else event)
        if event or terminal and late:
            line = self.line(running)
            if terminal:
                print(
                    f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True
                )
            else:
                print(line, flush=True)
        elif late:
            self.look(running)


def run_members(members, jobs=0, threads=0, gpus="none", trainer=TRAINER):
    """Train those that are not done, `jobs` at a time (0: one a GPU, or one). Returns {name: why} of those
    that failed; the others go on."""
    waiting = [member for member in members if member.end() is None]
    if skipped := len(members) - len(waiting):
        print(f"{skipped} of {len(members)} runs are done already")
    gpus = find_gpus(gpus)
    jobs = max(1, min(jobs or len(gpus) or 1, len(waiting)))
    threads = threads or max(1, cores() // jobs)
    free = [gpus[i % len(gpus)] if gpus else None for i in range(jobs)]
    progress, running = Progress(members), []

    with signals_as_interrupts():
        try:
            while waiting or running:
                while waiting and free:
                    running.append(start(waiting.pop(0), trainer, threads, free.pop(0)))
                time.sleep(0.02)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    free.append(job.gpu)
                    member, code, end = job.member, job.process.returncode, job.member.end()
                    if end is None or code:
                        progress.failed[member.name] = why = job.last_line()
                        event = (
                            f"{member.name} failed (exit {code}, {member.folder}/log.txt): {why}"
                        )
                    else:
                        event = f"{member.name}: val loss {end['val_loss']:.4f}"
                    progress.say([job.member for job in running], event)
                progress.say([job.member for job in running])
        finally:
            stop(running)
    if sys.stdout.isatty():
        print()
    return progress.failed
