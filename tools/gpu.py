"""Loss curves and speed on one CUDA GPU, part by part. See Config.

Runs are named by their knobs, such as english_s4_6000_lr0.003_seed1337, so parts that want the same run share
it. What tools/keep.py has kept is not run anew, and a run that was cut short goes on from its checkpoint.
Needs torch and numpy; without matplotlib there are tables and no pictures.
"""

import csv
import importlib.util
import math
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanotst import UserError
from nanotst.configurator import entry_point, read_file

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    """Usage: python -m tools.gpu TEXT [--parts=pair] [--key=value ...]

    TEXT is a file or folder of text, see data/text/prepare.py. Logs, tables, curves and figures go to
    results/gpu_english, checkpoints to out/gpu. Give the same command again after an interruption.

        pair    baseline and TST, as in config/gpu_english.py
        sweep   the learning rate of each, in a third of the steps, until the best has worse neighbours
        bags    s = 2, 4, 6, 8 at TST's best learning rate of the sweep, in a third of the steps
        seeds   three seeds of each at its best learning rate, TST's with the best s, in all steps
        long    baselines of 1.5 and 2 times the steps: from these the speed-up at equal loss is read
        moe     baseline and TST with a mixture of experts, as in config/gpu_moe.py
        fsdp    TST in a tenth of the steps, sharded over one rank, beside the same run without torchrun
        bench   speed and memory: against nanoGPT, of the paper's shapes, of bags, of mixtures of experts
    """

    text: str  # a file or folder
    parts: str = "pair"  # comma-separated, done in the order above; all: every part
    val: str = ""  # held-out text; empty: some of TEXT's documents are held out
    nanogpt: str = ""  # folder of a clone of karpathy/nanoGPT, for bench
    minutes: float = (
        0.0  # stop after so long, with a checkpoint; the same command then goes on; 0: never
    )
    dry_run: str = ""  # a folder: try every step on the CPU in tiny settings, with all files there


TINY = dict(n_layer=1, n_head=2, n_embd=16, ff_dim=32, block_size=16, total_batch=256, batch_size=0,
            eval_interval=5, eval_positions=256, log_interval=5, warmup_steps=2, save_interval=5,
            device="cpu", dtype="float32", compile="off")  # fmt: skip
TINY_BENCH = dict(device="cpu", dtype="float32", compile="off", shape="curves", rows=2, positions=64,
                  bag_sizes="1,2", repeats=1)  # fmt: skip
TINY_STEPS = 200  # divides the steps

BENCHES = {  # what is wanted most comes first; each is meant to take under ten minutes, compiling included
    "bench_nanogpt": dict(parts="nanogpt", shape="gpt2_124m"),
    "bench_270m": dict(parts="step", shape="dense_270m", bag_sizes="1,8,16"),
    "bench_600m": dict(parts="step", shape="dense_600m", bag_sizes="1,8,16"),
    "bench_124m": dict(parts="step", shape="gpt2_124m", bag_sizes="1,8,16"),
    "bench_moe": dict(parts="moe"),
    "bench_loss": dict(parts="roofline,loss,loader"),
}


@dataclass(frozen=True)
class Run:
    """A training run: a config, and the knobs in which the runs here differ."""

    config: str  # of config/
    bag_size: int
    max_steps: int
    learning_rate: float
    seed: int = 1337
    fsdp: bool = False

    @property
    def name(self):
        kind = self.config.removeprefix("gpu_") + "_fsdp" * self.fsdp
        return f"{kind}_s{self.bag_size}_{self.max_steps}_lr{self.learning_rate:g}_seed{self.seed}"

    @property
    def label(self):
        """What its seeds share."""
        kind = "MoE " if "moe" in self.config else ""
        kind += f"TST s={self.bag_size}" if self.bag_size > 1 else "baseline"
        return f"{kind} lr={self.learning_rate:g}" + " FSDP" * self.fsdp


class TimeIsUp(UserError):
    pass


class Session:
    """Where files go, the clock, and how commands are run."""

    def __init__(self, c):
        self.c, self.dry, self.started = c, bool(c.dry_run), time.monotonic()
        if not self.dry and not torch.cuda.is_available():
            raise UserError(
                "PyTorch sees no CUDA GPU; --dry_run=FOLDER tries everything on the CPU, in tiny settings"
            )
        folders = ("out/gpu", "results/gpu_english", "data/english")
        if self.dry:
            folders = (Path(c.dry_run, kind) for kind in ("runs", "results", "corpus"))
        self.out, self.results, self.corpus = map(Path, folders)
        self.results.mkdir(parents=True, exist_ok=True)
        self.say(f"\ncommand: python -m tools.gpu {shlex.join(sys.argv[1:])}")
        gpu = (
            "a dry run on the CPU"
            if self.dry
            else f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}"
        )
        self.say(f"torch {torch.__version__}, {gpu}, Python {platform.python_version()}")

    def say(self, line):
        print(line, flush=True)
        with open(self.results / "log.txt", "a", encoding="utf-8") as f:
            f.write(line + "\n")

    def call(self, *command):
        """Run a Python command in the repository's root, its output shown and logged. Raises TimeIsUp, or
        UserError if it fails."""
        self.say(f"\n$ python {shlex.join(command)}")
        left = self.started + 60 * self.c.minutes - time.monotonic() if self.c.minutes else math.inf
        status = launch(command, self.say, left) if left > 0 else 1
        if status and self.c.minutes and time.monotonic() >= self.started + 60 * self.c.minutes:
            raise TimeIsUp(
                f"stopped after {self.c.minutes:g} minutes; the same command goes on from there"
            )
        if status:
            raise UserError(f"{' '.join(command[:2])} failed, see above or {self.results}/log.txt")

    def prepare(self):
        """The corpus, once."""
        if (self.corpus / "meta.json").exists():
            self.say(f"{self.corpus} is there already; {self.c.text} is not read")
            return
        val = [f"--val={self.c.val}"] if self.c.val else []
        self.call("data/text/prepare.py", self.c.text, *val, f"--out_dir={self.corpus}")

    def run(self, config="gpu_english", part=1.0, **knobs):
        """The Run of a config, in `part` of its steps, with some knobs changed."""
        knobs = read_file(str(ROOT / f"config/{config}.py")) | knobs
        steps = round(knobs["max_steps"] * part / (TINY_STEPS if self.dry else 1))
        return Run(
            config, knobs["bag_size"], steps, knobs["learning_rate"], knobs.get("seed", 1337)
        )

    def train(self, run):
        """Train a run, or go on with it, and keep it, unless it is kept already. -> the run"""
        if run.name in self.losses():
            return run
        folder = self.out / run.name
        changed = {"bag_size": run.bag_size, "max_steps": run.max_steps, "learning_rate": run.learning_rate,
                   "seed": run.seed, "dataset": self.corpus} | (TINY if self.dry else {})  # fmt: skip
        begin = "--resume" if (folder / "last.pt").exists() else "--overwrite"
        knobs = [f"--{key}={value}" for key, value in changed.items()]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"] * run.fsdp
        knobs += ["--parallel=fsdp"] * run.fsdp
        self.call(
            *torchrun, "train.py", f"config/{run.config}.py", f"--out_dir={folder}", begin, *knobs
        )
        self.call(
            "-m", "tools.keep", str(folder), f"--out_dir={self.results}", f"--labels={run.label}"
        )
        return run

    def losses(self):
        """{name: final validation loss} of the runs that are kept."""
        path = self.results / "runs.csv"
        if not path.exists():
            return {}
        with open(path, newline="", encoding="utf-8") as f:
            return {row["run"]: float(row["val_loss"]) for row in csv.DictReader(f)}

    def draw(self, name, runs):
        """Table and, with matplotlib, picture of some runs."""
        runs = [str(self.results / run.name) for run in runs]
        how = ["--no_plot"] if not importlib.util.find_spec("matplotlib") else []
        files = [f"--out={self.results / name}.png", f"--table={self.results / name}.md"]
        self.call("-m", "tools.plot", *runs, *files, *how)
        if how:
            self.say(
                f"no matplotlib here: the command above, without --no_plot, draws {name}.png later"
            )

    def best(self, bagged):
        """The kept short run of lowest loss, on bags or not; what the config says if there is none yet."""
        losses = self.losses()
        tried = [run for run in self.short_runs(bagged) if run.name in losses]
        if tried:
            return min(tried, key=lambda run: losses[run.name])
        default = self.run() if bagged else self.run(bag_size=1)
        self.say(f"parts sweep and bags were not run: {default.label}, as in config/gpu_english.py")
        return default

    def short_runs(self, bagged):
        """All runs that the parts sweep and bags may do."""
        for s in BAG_SIZES if bagged else (1,):
            for rate in self.rates():
                yield self.run(part=SHORT, bag_size=s, learning_rate=rate)

    def rates(self):
        """Learning rates that may be swept: the config's, halved and doubled up to three times."""
        middle = self.run().learning_rate
        return [middle * 2.0**i for i in range(-3, 4)]


def launch(command, say, seconds=math.inf):
    """Run `python COMMAND` in the repository's root and `say` each line of its output. After `seconds` it is
    sent SIGTERM, upon which train.py writes a checkpoint. -> exit status"""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=os.environ | {"TQDM_DISABLE": "1"},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace")  # fmt: skip
    alarm = threading.Timer(min(seconds, threading.TIMEOUT_MAX), process.terminate)
    alarm.start()
    try:
        for line in process.stdout:
            say(line.rstrip())
        return process.wait()
    finally:
        alarm.cancel()
        process.terminate()  # Ctrl-C ends both; nothing happens to a process that has ended


# ------------------------------------------------------------------------------------------------------ parts

SHORT = 1 / 3  # part of the steps
BAG_SIZES = (2, 4, 6, 8)
SEEDS = (1337, 1, 2)


def pair(g):
    g.draw("pair", [g.train(g.run(bag_size=1)), g.train(g.run())])


def sweep(g):
    """Best with best: for each side the rate whose neighbours, half and double, are both worse."""
    done, rates = [], g.rates()
    for bag_size in (1, g.run().bag_size):
        losses = {}

        def try_rate(i, bag_size=bag_size, losses=losses):
            run = g.run(part=SHORT, bag_size=bag_size, learning_rate=rates[i])
            try:
                done.append(g.train(run))
                losses[i] = g.losses()[run.name]
            except TimeIsUp:
                raise
            except UserError as e:  # a rate may be too high for any loss
                g.say(f"{run.name} counts as worse than all others: {e}")
                losses[i] = math.inf

        for i in (3, 2, 4):  # the config's rate in the middle
            try_rate(i)
        while (i := min(losses, key=losses.get)) in (min(losses), max(losses)):
            further = i - 1 if i == min(losses) else i + 1
            if not 0 <= further < len(rates):
                g.say(f"the best rate, {rates[i]:g}, is the last one tried")
                break
            try_rate(further)
        if min(losses.values()) == math.inf:
            raise UserError("no run of the sweep came to its end")
        g.say(f"s = {bag_size}: best learning rate {rates[i]:g}")
    g.draw("sweep", done)


def bags(g):
    rate = g.best(bagged=True).learning_rate
    runs = [g.train(g.run(part=SHORT, bag_size=s, learning_rate=rate)) for s in BAG_SIZES]
    g.draw("bags", [g.train(replace(g.best(bagged=False), max_steps=runs[0].max_steps)), *runs])


def seeds(g):
    runs = []
    for best in (g.best(bagged=False), g.best(bagged=True)):
        runs += [g.train(replace(best, max_steps=g.run().max_steps, seed=seed)) for seed in SEEDS]
    g.draw("seeds", runs)


def long(g):
    best = g.best(bagged=False)
    baselines = [
        g.train(replace(best, max_steps=g.run(part=part).max_steps)) for part in (1, 1.5, 2)
    ]
    tst = g.train(replace(g.best(bagged=True), max_steps=g.run().max_steps))
    g.draw("long", [*baselines, tst])


def moe(g):
    g.draw("moe", [g.train(g.run("gpu_moe", bag_size=1)), g.train(g.run("gpu_moe"))])


def fsdp(g):
    """Two runs of one seed: the same losses up to rounding, and what sharding costs in tokens a second."""
    short = g.run(part=0.1)
    g.draw("fsdp", [g.train(short), g.train(replace(short, fsdp=True))])


def bench(g):
    failed = []
    for name, knobs in BENCHES.items():
        if knobs["parts"] == "nanogpt":
            if not g.c.nanogpt:
                g.say(f"{name} is left out: --nanogpt names no clone of karpathy/nanoGPT")
                continue
            knobs = knobs | {"nanogpt": g.c.nanogpt}
        path, part = g.results / f"{name}.json", g.out / f"{name}.json"
        if path.exists():
            continue
        part.parent.mkdir(parents=True, exist_ok=True)
        knobs = knobs | (TINY_BENCH if g.dry else {}) | {"json": part}
        try:
            g.call("-m", "tools.bench", *(f"--{key}={value}" for key, value in knobs.items()))
            part.replace(path)
        except TimeIsUp:
            raise
        except UserError:  # out of memory, perhaps: the others may work
            failed.append(name)
    if failed:
        raise UserError(f"{', '.join(failed)} failed, see {g.results}/log.txt")


PARTS = dict(
    pair=pair, sweep=sweep, bags=bags, seeds=seeds, long=long, moe=moe, fsdp=fsdp, bench=bench
)


def main(config):
    parts = list(PARTS) if config.parts == "all" else config.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"parts are {', '.join(PARTS)}, or all, got {', '.join(sorted(unknown))}")
    g = Session(config)
    g.prepare()
    for part in PARTS:
        if part in parts:
            g.say(f"\n---- {part}")
            PARTS[part](g)


if __name__ == "__main__":
    entry_point(main, Config)
