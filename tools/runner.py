"""Trains many runs of train.py side by side. tools/sweep.py and tools/compare.py use it.

Each run has a folder with its settings (sweep.json) and what it printed (log.txt). Finished runs are skipped,
interrupted ones resumed, failed ones tried again.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import train
from nanotst import UserError
from nanotst.configurator import read_file, typed
from nanotst.files import write_safely
from tools.runs import BAGS, FREE, load_metrics, renamed

TRAINER = train.__file__
KNOBS = {field.name: field for field in dataclasses.fields(train.Config)}
COMMAS = {"dataset", "reinit_at_switch"}  # one value of these may hold commas
SHORT = dict(bag_size="s", superposition_ratio="r", learning_rate="lr", seed="seed")  # in names


@dataclass(eq=False)
class Member:
    """One run among several."""

    name: str
    point: dict  # the knobs that tell it from the others
    settings: dict  # all knobs that change what is learned
    arguments: list  # for train.py
    folder: Path

    def rows(self):
        """Its log so far; nothing if that is damaged, which train.py says when it resumes."""
        try:
            return load_metrics(self.folder)
        except UserError:
            return []

    def end(self):
        """The last row of a finished run, else None."""
        last = self.rows()[-1:]
        finished = last and last[0]["step"] >= self.settings["max_steps"] and "val_loss" in last[0]
        return last[0] if finished else None


def places(argv, config):
    """A command line that the tool's dataclass `config` can read: train.py's --key=value become places."""
    own = {field.name for field in dataclasses.fields(config)} | {"help"}
    is_own = lambda arg: arg[2:].partition("=")[0].replace("-", "_") in own
    return [arg[2:] if arg.startswith("--") and not is_own(arg) else arg for arg in argv]


def alternatives(key, text):
    """The values in "a,b,c", or in "a;b,c;d" if one value may hold commas."""
    return text.removesuffix(";").split(";") if key in COMMAS or ";" in text else text.split(",")


def read_arguments(arguments, own):
    """(settings, config files, grid): all knobs as the config files set them, and {knob: values given}. `own`
    is the tool's dataclass, for suggestions where a knob is misspelt."""
    known = {field.name: field for field in dataclasses.fields(own)} | KNOBS
    settings, files, grid = {name: field.default for name, field in KNOBS.items()}, [], {}
    for arg in arguments:
        if arg.endswith(".py"):
            files.append(arg)
            for key, value in read_file(arg).items():
                settings[key] = typed(KNOBS.get(key), key, value, arg, KNOBS)
            continue
        key, equals, text = arg.partition("=")
        key, where = key.replace("-", "_"), f"--{arg}"
        values = alternatives(key, text) if equals else [True]
        grid[key] = list(dict.fromkeys(typed(KNOBS.get(key), key, v, where, known) for v in values))
    return settings, files, grid


def is_ordinary(settings):
    """Whether a run is a baseline: it has no superposition."""
    return settings["bag_size"] == 1 or settings["superposition_ratio"] == 0


def make_member(settings, files, chosen, varied, out_dir):
    """The run with the knobs `chosen` over `settings`, named by those in `varied`. A baseline has no knobs of
    superposition."""
    full = {k: v for k, v in (settings | chosen).items() if k not in FREE}
    ordinary = {"bag_size": 1} if is_ordinary(full) else {}
    if ordinary:
        full = {k: v for k, v in full.items() if k not in BAGS} | ordinary
        chosen = {k: v for k, v in chosen.items() if k not in BAGS}
    point = ordinary if BAGS & set(varied) else {}
    point = point | {k: chosen[k] for k in varied if k in chosen}
    last = lambda value: as_text(value).rstrip("/").rpartition("/")[2]  # of a path
    name = "_".join(f"{SHORT.get(k, k + '=')}{last(v)}" for k, v in point.items())
    name = re.sub(r"[^\w.+=-]", "-", name) or "run"
    arguments = [*files, *(f"--{k}={v}" for k, v in (chosen | ordinary).items())]
    return Member(name, point, full, arguments, Path(out_dir) / name)


def as_text(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def find_folders(members, out_dir):
    """Give each member the folder in out_dir that holds its settings, if there is one. UserError if another
    run is in its way."""
    there = {}
    for path in sorted(Path(out_dir).glob("*/sweep.json")):
        settings = renamed(json.loads(path.read_text()))
        # a knob that is younger than a run had its default
        there[path.parent] = {k: f.default for k, f in KNOBS.items() if k not in FREE} | settings
    for member in members:
        now = member.settings
        old = {f: {k: settings[k] for k in now} for f, settings in there.items()}
        if same := [folder for folder, settings in old.items() if settings == now]:
            member.folder = same[0]
        elif member.folder in there or (member.folder / "metrics.jsonl").exists():
            was = old.get(member.folder, {})
            differ = ", ".join(f"{k} {was[k]} instead of {now[k]}" for k in was if was[k] != now[k])
            what = f"{member.folder} holds another run" + (f", with {differ}" if differ else "")
            raise UserError(f"{what}: give another --out_dir, or move it away")


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def find_gpus():
    """Values for CUDA_VISIBLE_DEVICES: the GPUs that this process may use."""
    if own := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return own.split(",")
    return [str(i) for i in range(torch.cuda.device_count())]


def start(member, threads, gpu):
    """Train a member in a process of its own, in a session of its own: Ctrl-C reaches it through us alone."""
    folder = member.folder
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, TRAINER, *member.arguments]
    command += [f"--out_dir={folder}", f"--threads={threads}"]
    if (folder / "last.pt").exists():
        command.append("--resume")
    elif (folder / "metrics.jsonl").exists():  # interrupted before its first checkpoint
        command.append("--overwrite")
    settings = json.dumps(member.settings, indent=1)
    write_safely(folder / "sweep.json", lambda path: Path(path).write_text(settings))
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    env |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    with open(folder / "log.txt", "a") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        output = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        return subprocess.Popen(command, env=env, start_new_session=True, **output)


def reason(failed):
    """Why the first of the runs that failed did, as the end of a message."""
    return "".join(f": {why}" for why in list(failed.values())[:1])


def interrupt(number, frame):
    raise KeyboardInterrupt


def run_members(members, jobs=0, threads=0):
    """Train the members that are not done, `jobs` at a time (0: one per GPU, or one). Returns {name: why} of
    those that failed."""
    waiting = [member for member in members if member.end() is None]
    done, gpus = len(members) - len(waiting), find_gpus() or [None]
    if done:
        print(f"{done} of {len(members)} runs are done already")
    jobs = max(1, min(jobs or len(gpus), len(waiting)))
    threads = threads or max(1, cores() // jobs)
    free = [gpus[i % len(gpus)] for i in range(jobs)]
    running, failed = {}, {}  # member: (process, GPU); name: why
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, interrupt)
    try:
        while waiting or running:
            while waiting and free:
                member, gpu = waiting.pop(0), free.pop(0)
                running[member] = start(member, threads, gpu), gpu
            time.sleep(0.02)
            for member in [member for member in running if running[member][0].poll() is not None]:
                process, gpu = running.pop(member)
                free.append(gpu)
                if (end := member.end()) and not process.returncode:
                    done += 1
                    loss, count = (
                        f"val loss {end['val_loss']:.4f}",
                        f"{done} of {len(members)} done",
                    )
                    print(f"{member.name}: {loss}; {count}", flush=True)
                else:
                    log = member.folder / "log.txt"
                    failed[member.name] = why = (
                        log.read_text(errors="replace").strip().splitlines()[-1]
                    )
                    said = f"{member.name} failed (exit {process.returncode}, {log}): {why}"
                    print(said, flush=True)
    finally:
        if running:
            print(f"\nstopping {len(running)} runs at a checkpoint", flush=True)
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    return failed
