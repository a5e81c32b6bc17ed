"""Trains many runs of train.py side by side. tools/sweep.py and tools/compare.py use it.

Each run has a folder, which also holds what it printed (log.txt), and is known by its knobs in config.json.
Finished runs are skipped, interrupted ones resumed, failed ones tried again.
"""

import dataclasses
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import train
from nanotst import UserError
from nanotst.configurator import parse, renamed
from tools.plot import save_picture
from tools.runs import BAGS, ENDS, FREE, is_baseline, load_metrics, read_runs, write_table

TRAINER = train.__file__
COMMAS = {"dataset", "reinit_at_switch"}  # one value of these may hold commas
SHORT = dict(bag_size="s", superposition_ratio="r", learning_rate="lr", seed="seed")  # in names


@dataclass(eq=False)
class Member:
    """One run among several."""

    point: dict  # the knobs that tell it from the others
    settings: dict  # all knobs that change what is learned
    arguments: list  # for train.py
    folder: Path

    def end(self):
        """The last row of a finished run, else None."""
        try:
            rows = load_metrics(self.folder)
        except UserError:  # none yet, or a damaged one, as train.py says when it resumes
            return None
        finished = rows and rows[-1]["step"] >= self.settings["max_steps"]
        return rows[-1] if finished and "val_loss" in rows[-1] else None


def places(argv, config):
    """A command line that the tool's dataclass `config` can read: train.py's --key=value become places."""
    own = {field.name for field in dataclasses.fields(config)} | {"help"}
    is_own = lambda arg: arg[2:].partition("=")[0].replace("-", "_") in own
    return [arg[2:] if arg.startswith("--") and not is_own(arg) else arg for arg in argv]


def read_grid(arguments):
    """(config files, {knob: its values as text}), from "a,b,c", or "a;b,c;d" if one value may hold commas."""
    files, grid = [arg for arg in arguments if arg.endswith(".py")], {}
    for arg in arguments:
        if arg not in files:
            key, equals, text = arg.partition("=")
            key, separator = key.replace("-", "_"), ";" if key in COMMAS or ";" in text else ","
            values = text.removesuffix(";").split(separator) if equals else ["True"]
            grid[key] = list(dict.fromkeys(values))
    return files, grid


def make_member(files, chosen, varied, out_dir):
    """The run with the knobs `chosen`, named by those in `varied`. A baseline has no knobs of
    superposition."""
    arguments = lambda: [*files, *(f"--{knob}={value}" for knob, value in chosen.items())]
    settings = vars(parse(train.Config, arguments()))
    point = {knob: settings[knob] for knob in varied}
    if is_baseline(settings):
        one = {"bag_size": 1}
        drop = lambda knobs: {knob: v for knob, v in knobs.items() if knob not in BAGS}
        settings, chosen = drop(settings) | one, drop(chosen) | one
        point = (one if BAGS & point.keys() else {}) | drop(point)
    settings = {knob: value for knob, value in settings.items() if knob not in FREE}
    name = "_".join(f"{SHORT.get(knob, knob + '=')}{value}" for knob, value in point.items())
    name = re.sub(r"[^\w.+=-]", "-", name) or "run"
    return Member(point, settings, arguments(), Path(out_dir) / name)


def plan(arguments, out_dir):
    """(members, varied): the distinct runs of a grid, and the knobs with several values, the seed last."""
    files, grid = read_grid(arguments)
    varied = sorted((k for k, values in grid.items() if len(values) > 1), key=lambda k: k == "seed")
    if free := [knob for knob in varied if knob in FREE]:
        raise UserError(f"--{free[0]} takes one value: it does not change what is learned")
    distinct = {}
    for values in itertools.product(*grid.values()):
        member = make_member(files, dict(zip(grid, values)), varied, out_dir)
        distinct.setdefault(tuple(member.settings.items()), member)
    find_folders(distinct.values(), out_dir)
    return list(distinct.values()), varied


def find_folders(members, out_dir):
    """Give each member the folder in out_dir that holds its settings, if there is one. UserError if another
    run is in its way."""
    there = {}  # folder: settings, where a knob that is younger than the run has its default
    for path in sorted(Path(out_dir).glob("*/config.json")):
        there[path.parent] = vars(train.Config()) | renamed(json.loads(path.read_text())["config"])
    for member in members:
        own = member.settings.items()
        if same := [folder for folder, settings in there.items() if own <= settings.items()]:
            member.folder = same[0]
        elif (member.folder / "metrics.jsonl").exists():
            todo = "give another --out_dir, or move it away"
            raise UserError(f"{member.folder} holds a run with other knobs: {todo}")


def start(member, threads, gpu):
    """Train a member in a process of its own, in a session of its own: Ctrl-C reaches it through us alone."""
    folder = member.folder
    folder.mkdir(parents=True, exist_ok=True)
    own = f"--out_dir={folder}", f"--threads={threads}"
    command = [sys.executable, TRAINER, *member.arguments, *own]
    if (folder / "last.pt").exists():
        command.append("--resume")
    elif (folder / "metrics.jsonl").exists():  # interrupted before its first checkpoint
        command.append("--overwrite")
    env = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": gpu, "PYTHONUNBUFFERED": "1"}
    with open(folder / "log.txt", "a") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        output = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        return subprocess.Popen(command, env=os.environ | env, start_new_session=True, **output)


def run_members(members, jobs=0, threads=0):
    """Train the members that are not done, `jobs` at a time (0: one per GPU, or one). Returns why each that
    failed did."""
    waiting = [member for member in members if member.end() is None]
    if done := len(members) - len(waiting):
        print(f"{done} of {len(members)} runs are done already")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    gpus = gpus or [""]  # the CPU
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = max(1, min(jobs or len(gpus), len(waiting)))
    threads = threads or max(1, cores // jobs)
    free = [gpus[i % len(gpus)] for i in range(jobs)]
    running, failed = {}, []  # member: (process, GPU)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)
    try:
        while waiting or running:
            while waiting and free:
                member, gpu = waiting.pop(0), free.pop(0)
                running[member] = start(member, threads, gpu), gpu
            time.sleep(0.02)
            for member in [member for member in running if running[member][0].poll() is not None]:
                process, gpu = running.pop(member)
                free.append(gpu)
                log = member.folder / "log.txt"
                if (end := member.end()) and not process.returncode:
                    done += 1
                    said = f"val loss {end['val_loss']:.4f}; {done} of {len(members)} done"
                else:
                    failed.append(log.read_text(errors="replace").strip().splitlines()[-1])
                    said = f"failed (exit {process.returncode}, {log}): {failed[-1]}"
                print(f"{member.folder.name}: {said}", flush=True)
    finally:
        if running:
            print(f"\nstopping {len(running)} runs at a checkpoint", flush=True)
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    return failed


def finished(members, failed):
    """The finished ones, as tools/runs.py reads them. UserError if there are none."""
    done = [member for member in members if member.end()]
    if not done:
        raise UserError(f"none of {len(members)} runs is done: {failed[0]}")
    runs = read_runs([member.folder for member in done])
    for run, member in zip(runs, done):
        run["facts"] |= {k: str(v) for k, v in member.point.items()}
    return runs


def write_results(tool, config, text, members, draw, failed):
    """Print `text` and write it as table.md, the ends of the members as runs.csv, and the figure that draw()
    makes as TOOL.png. UserError, after all that: some runs failed."""
    out_dir, command = Path(config.out_dir), f"python -m tools.{tool} {shlex.join(sys.argv[1:])}"
    print(text)
    (out_dir / "table.md").write_text(f"{text}\n\n`{command}`\n", encoding="utf-8")
    knobs = dict.fromkeys(k for member in members for k in member.point)
    lines = [{"run": m.folder.name} | m.point | (m.end() or {}) for m in members]
    write_table(out_dir / "runs.csv", ["run", *knobs, "step", *ENDS], lines)
    if config.plot:
        save_picture(draw(), out_dir / f"{tool}.png")
    print(f"\nwrote {out_dir}/table.md, runs.csv{f', {tool}.png' * config.plot}")
    if failed:
        todo = "the same command tries them again"
        raise UserError(f"{len(failed)} of {len(members)} runs failed; {todo}")
