"""Train a grid of runs, several at a time, and tabulate their final losses."""

import dataclasses
import itertools
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
from nanotst.configurator import entry_point, parse, renamed
from nanotst.files import read_json
from tools.plot import Points, save_picture
from tools.runs import BAGS, ENDS, FREE, LEARNED, is_baseline, load_metrics, read_runs, write_table


@dataclass
class Config:
    """Usage: python -m tools.sweep [CONFIG.py ...] --key=VALUE[,VALUE ...] ... [--jobs=N]

    python -m tools.sweep config/curves.py --bag_size=1,2,4 --superposition_ratio=0.2,0.3 --seed=1,2 --jobs=2

    Any knob of train.py may take several values, separated by commas; by semicolons for dataset and
    reinit_at_switch, where one value may hold commas. Baselines (bag size 1, or ratio 0) are trained once,
    whatever the knobs of superposition. Run the same command again, or a larger grid in the same out_dir,
    to resume: finished runs are skipped, interrupted ones resumed, failed ones tried again. Ctrl-C stops all
    runs at a checkpoint. At the end out_dir holds table.md, runs.csv and sweep.png, whose x-axis is the first
    knob with several values. Other knobs:
    """

    arguments: list[str]  # config files and knobs of train.py

    out_dir: str = "out/sweep"  # a folder with a folder for each run
    jobs: int = 0  # runs at a time; 0: one per GPU, or one
    threads: int = 0  # CPU threads per run; 0: an equal share of the cores
    plot: bool = True  # picture as sweep.png (needs matplotlib)


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


def as_positional(argv, config):
    """The command line with train.py's --key=value made positional, so that `config` can read it."""
    own = {field.name for field in dataclasses.fields(config)} | {"help"}
    is_own = lambda arg: arg[2:].partition("=")[0].replace("-", "_") in own
    return [arg[2:] if arg.startswith("--") and not is_own(arg) else arg for arg in argv]


def plan(arguments, out_dir):
    """(members, varied): the runs of a grid, and the knobs with several values, the seed last."""
    files, grid = [arg for arg in arguments if arg.endswith(".py")], {}
    for key, equals, text in (arg.partition("=") for arg in arguments if arg not in files):
        key = key.replace("-", "_")
        separator = ";" if key in COMMAS or ";" in text else ","
        values = text.removesuffix(";").split(separator) if equals else ["True"]
        grid[key] = list(dict.fromkeys(values))
    varied = sorted((k for k, values in grid.items() if len(values) > 1), key=lambda k: k == "seed")
    if free := [knob for knob in varied if knob in FREE]:
        raise UserError(f"--{free[0]} takes one value: it does not change what is learned")
    choices = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    return members_of(files, choices, varied, out_dir), varied


def members_of(given, choices, varied, out_dir):
    """The distinct runs among `choices` of knobs, which win over the arguments `given`; a baseline has no
    knobs of superposition. A run has the folder in out_dir whose config.json holds its settings, or a new
    one, named by the knobs in `varied`. UserError if another run is in its way."""
    there, members = {}, {}
    flags = lambda knobs: [f"--{knob}={value}" for knob, value in knobs.items()]
    plain = lambda knobs: {"bag_size": 1} | {k: v for k, v in knobs.items() if k not in BAGS}
    for path in sorted(Path(out_dir).glob("*/config.json")):  # a younger knob has its default
        if isinstance(knobs := read_json(path).get("config"), dict):  # else not a run of train.py
            there[path.parent] = vars(train.Config()) | renamed(knobs)
    for chosen in choices:
        settings = vars(parse(train.Config, given + flags(chosen)))
        point = {knob: settings[knob] for knob in varied}
        if is_baseline(settings):
            point, settings, chosen = map(plain, (point, settings, chosen))
        settings = {knob: settings[knob] for knob in LEARNED if knob in settings}
        name = "_".join(f"{SHORT.get(knob, knob + '=')}{value}" for knob, value in point.items())
        folder = Path(out_dir) / (re.sub(r"[^\w.+=-]", "-", name) or "run")
        if same := [path for path, known in there.items() if settings.items() <= known.items()]:
            folder = same[0]
        elif (folder / "metrics.jsonl").exists():
            todo = "give another --out_dir, or move it away"
            raise UserError(f"{folder} holds a run with other knobs: {todo}")
        member = Member(point, settings, given + flags(chosen), folder)
        members.setdefault(tuple(settings.items()), member)
    return list(members.values())


def start(member, threads, gpu):
    """Train a member in a process of its own, in a session of its own: Ctrl-C reaches it through us alone."""
    folder = member.folder
    folder.mkdir(parents=True, exist_ok=True)
    own = f"--out_dir={folder}", f"--threads={threads}"
    again = "--resume" if (folder / "last.pt").exists() else "--overwrite"
    command = [sys.executable, TRAINER, *member.arguments, *own, again]
    env = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": gpu, "PYTHONUNBUFFERED": "1"}
    with open(folder / "log.txt", "a") as log:
        print("$", *command, file=log, flush=True)
        output = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        return subprocess.Popen(command, env=os.environ | env, start_new_session=True, **output)


def run_members(members, jobs=0, threads=0):
    """Train the members that are not done, `jobs` at a time (0: one per GPU, or one). Returns the finished
    ones as tools/runs.py reads them. UserError if there are none."""
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
    running = {}  # member: (process, GPU)
    for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:  # none on Windows
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
                    why = log.read_text(errors="replace").strip().splitlines()[-1]
                    said = f"failed (exit {process.returncode}, {log}): {why}"
                print(f"{member.folder.name}: {said}", flush=True)
    finally:
        if running:
            print(f"\nstopping {len(running)} runs at a checkpoint", flush=True)
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    if not done:
        raise UserError(f"none of {len(members)} runs is done")
    return read_runs([member.folder for member in members if member.end()])


def write_results(tool, config, members, text, draw):
    """Print `text` and write it as table.md, the ends of the members as runs.csv, and the figure that draw()
    makes as TOOL.png. UserError, after all that: some runs failed."""
    out_dir, command = Path(config.out_dir), f"python -m tools.{tool} {shlex.join(sys.argv[1:])}"
    print(text)
    (out_dir / "table.md").write_text(f"{text}\n\n`{command}`\n", encoding="utf-8")
    ends = [member.end() for member in members]
    knobs = dict.fromkeys(knob for member in members for knob in member.point)
    lines = [{"run": m.folder.name} | m.point | (end or {}) for m, end in zip(members, ends)]
    write_table(out_dir / "runs.csv", ["run", *knobs, "step", *ENDS], lines)
    if config.plot:
        save_picture(draw(), out_dir / f"{tool}.png")
    print(f"\nwrote {out_dir}/table.md, runs.csv{f', {tool}.png' * config.plot}")
    if failed := ends.count(None):
        todo = "the same command tries them again"
        raise UserError(f"{failed} of {len(members)} runs failed; {todo}")


def main(config):
    members, varied = plan(config.arguments, config.out_dir)
    runs = run_members(members, config.jobs, config.threads)
    points = Points(runs, [knob for knob in varied if knob != "seed"])
    write_results("sweep", config, members, points.table(), points.draw)


if __name__ == "__main__":
    entry_point(main, Config, as_positional(sys.argv[1:], Config))
