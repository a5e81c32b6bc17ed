"""A hostile week, repeated on demand: kills, signals, damaged files, full disks, wrong commands.

    python -m tests.campaign                              everything, as in results/reliability
    python -m tests.campaign --parts=flips,signals        some of it
    python -m tests.campaign --parts=flips --only=17      one trial again; its folder is kept

Each trial is a process of its own, which runs the real script on a tiny model, one thread, and ends in one of

    bit-equal     it went on, if need be by the advice of its own messages, and its weights and losses are
                  those of the run that nobody disturbed
    one line      it said what is wrong and left with status 1, and every file is as it was before
    traceback     a traceback, more than one line, or a crash
    silent        it went on and came to something else, or left without a word
    lost          it cannot go on, or what it had saved is gone

The processes are forks of one that has imported torch, since importing takes longer than the training; those
that are meant to die during the imports, and those under torchrun, are started as a user would.
Everything is drawn from the seed, but where a kill falls depends on the machine, too.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401 what a step imports, once for all forks

from nanotst import UserError, configurator, formats, optim  # noqa: E402
from nanotst.checkpoint import load_checkpoint  # noqa: E402
from nanotst.corpus import open_corpus  # noqa: E402


@dataclass
class Config:
    """Usage: python -m tests.campaign [--key=value ...]"""

    parts: str = "all"  # of those of TRIALS and cost, comma-separated
    share: float = 1.0  # of each part's trials
    only: int = -1  # the number of a single trial
    seed: int = 1  # of all that is drawn
    jobs: int = 1  # trials at a time
    out: str = ""  # write the report here, such as results/reliability/README.md


TRIALS = {  # part: trials
    "kills": 250, "signals": 40, "truncations": 40, "flips": 100, "full_disks": 15, "two_runs": 30,
    "commands": 200, "metas": 60, "checkpoints": 40, "logs": 20, "configs": 20, "ranks": 12,
}  # fmt: skip
VERDICTS = ("bit-equal", "one line", "traceback", "silent", "lost")
LEARNED = (
    "step",
    "phase",
    "bag_size",
    "loss",
    "val_loss",
    "lr",
    "grad_norm",
    "data_tokens",
    "flops",
)
KNOBS = dict(
    n_layer=2, n_head=2, n_embd=32, ff_dim=64, block_size=16, total_batch=128, batch_size=8, max_steps=30,
    bag_size="3", superposition_ratio=0.4, learning_rate=0.01, warmup_steps=4, eval_interval=5,
    log_interval=2, eval_positions=160, save_interval=4, device="cpu", dtype="float32", compile="off",
)  # fmt: skip
KINDS = {  # each with a reference that nobody disturbs
    "dense": [],
    "moe": ["--n_expert=4", "--top_k=2", "--balance_bias", "--balance_rate=0.01", "--qk_norm"],
    "muon": ["--optimizer=muon", "--bag_size=4-2", "--batch_size=4"],
    "mixed": ["--dataset={text}:0.5,{other}:0.5", "--document_bags"],
}
HALF = 17  # steps of a run that is to go on
PATIENCE = 120  # seconds until a process counts as hanging


# ---------------------------------------------------------------------------------------- processes


@dataclass
class Ended:
    """What a process left: its status (negative: the signal that ended it) and what it printed."""

    code: int
    out: str
    err: str

    @property
    def crashed(self):
        """A traceback, or an end that no signal of ours explains."""
        ours = (0, 1, 130, -signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL)
        return "Traceback" in self.out + self.err or self.code not in ours

    @property
    def refused(self):
        """One line of what is wrong, and status 1. Progress bars do not count."""
        lines = [line for line in self.err.splitlines() if line.strip() and "%|" not in line]
        return self.code == 1 and len(lines) == 1 and lines[0].startswith("error: ")


class Process:
    """A script that runs in a fork of this process, or (real) in a Python of its own."""

    def __init__(self, argv, cwd, real=False, stop_after=0, memory=8 << 30):
        """argv: such as ["train.py", "--resume"] or ["tools.plot", ...]. stop_after: it sends itself SIGTERM
        in that step. memory: bytes that it may use."""
        self.files = [tempfile.TemporaryFile("w+", errors="replace", dir=cwd) for _ in (1, 2)]  # noqa: SIM115
        self.real, self.code, self.started = None, None, time.monotonic()
        if real:
            names = ["-m", argv[0]] if not argv[0].endswith(".py") else [str(ROOT / argv[0])]
            out, err = self.files
            self.real = subprocess.Popen(
                [sys.executable, *names, *argv[1:]], cwd=cwd, stdout=out, stderr=err
            )
            self.pid = self.real.pid
            return
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                code = self._script(argv, cwd, stop_after, memory)
            finally:
                os._exit(code)

    def _script(self, argv, cwd, stop_after, memory):
        """In the fork: what Python does with a script, and the status it would leave."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        os.chdir(cwd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for n, file in enumerate(self.files, 1):
            os.dup2(file.fileno(), n)
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
        if stop_after:
            multiplier = optim.rate_multiplier

            def stop(step, c):
                if step == stop_after - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return multiplier(step, c)

            optim.rate_multiplier = stop
        sys.argv = argv
        try:
            if argv[0].endswith(".py"):
                runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
            else:
                sys.modules.pop(argv[0], None)
                runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
            return 0
        except SystemExit as e:
            if isinstance(e.code, str):
                print(e.code, file=sys.stderr)
            return e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    def poll(self):
        """The status, None while it runs."""
        if self.code is None and self.real:
            self.code = self.real.poll()
        elif self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def kill(self, number=signal.SIGKILL):
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, patience=PATIENCE):
        """Ended. A process that hangs is killed, and that is a crash."""
        until, pause = time.monotonic() + patience, 0.001
        while self.poll() is None and time.monotonic() < until:
            time.sleep(pause)
            pause = min(0.05, pause * 1.3)
        hung = self.poll() is None
        if hung:
            self.kill()
            while self.poll() is None:
                time.sleep(0.01)
        self.seconds = time.monotonic() - self.started
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return Ended(
            -signal.SIGABRT if hung else self.code, texts[0], texts[1] + "it hung\n" * hung
        )


# ---------------------------------------------------------------------------------------------- lab


class Lab:
    """A folder with corpora, a run of each kind that nobody disturbs, and half of one."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.text, self.other = self.folder / "text", self.folder / "other"
        words = ["the", "cat", "sat", "on", "a", "mat", "while", "seven", "red", "boats", "sailed"]
        for seed, path in enumerate((self.text, self.other)):
            rng, source = random.Random(seed), self.folder / f"{path.name}.txt"
            documents = (" ".join(rng.choices(words, k=rng.randrange(20, 80))) for _ in range(300))
            source.write_text("\n<|endoftext|>\n".join(documents))
            argv = ["data/text/prepare.py", str(source), f"--out_dir={path}", "--val_fraction=0.1"]
            self.expect(self.run(argv, self.folder))
        self.config = self.folder / "tiny.py"
        self.config.write_text("".join(f"{key} = {value!r}\n" for key, value in KNOBS.items()))
        self.unbroken, self.seconds = {}, {}
        for kind in KINDS:
            whole, half = self.folder / f"{kind}_whole", self.folder / f"{kind}_half"
            seconds = []
            for again in ([], ["--overwrite"]):  # the faster one tells how long a run takes
                process = Process(self.train(whole, kind, *again), self.folder)
                self.expect(process.wait())
                seconds.append(process.seconds)
            self.seconds[kind] = min(seconds)
            self.unbroken[kind] = self.outcome(whole)
            stopped = self.run(self.train(half, kind), self.folder, stop_after=HALF)
            assert "stopped by SIGTERM" in stopped.out, stopped

    def expect(self, ended):
        assert ended.code == 0, f"the campaign cannot begin: {ended}"

    def run(self, argv, cwd, **options):
        return Process(argv, cwd, **options).wait()

    def train(self, out_dir, kind="dense", *more):
        argv = [
            "train.py",
            str(self.config),
            f"--dataset={self.text}",
            f"--out_dir={out_dir}",
            *KINDS[kind],
        ]
        return [arg.format(text=self.text, other=self.other) for arg in argv] + list(more)

    def outcome(self, out_dir):
        """What a run has learned: its rows by step, without the clock, and the weights of last.pt."""
        rows = self.rows(out_dir)
        state = torch.load(Path(out_dir) / "last.pt", weights_only=True)["model"]
        weights = {name: t.numpy().tobytes() for name, t in state.items()}
        return rows, weights

    def rows(self, out_dir):
        """Of metrics.jsonl, by step, what was learned."""
        with open(Path(out_dir) / "metrics.jsonl") as f:
            rows = [json.loads(line) for line in f]
        assert [row["step"] for row in rows] == sorted({row["step"] for row in rows}), (
            "rows are mixed up"
        )
        return {row["step"]: [row.get(key) for key in LEARNED] for row in rows}

    def half(self, folder, kind="dense"):
        """A copy of half a run, in `folder`."""
        shutil.copytree(self.folder / f"{kind}_half", folder / "run")
        return folder / "run"

    def finish(self, argv, cwd):
        """Start `argv`, and again as its messages advise, until the run has ended -> [Ended, ...]."""
        tried, extra = [], []
        for _ in range(4):
            tried.append(self.run([*argv, *extra], cwd))
            if tried[-1].code == 0 or not tried[-1].refused:
                break
            extra = ["--resume"] if "(--resume)" in tried[-1].err else ["--overwrite"]
        return tried

    def went_on(self, ended, out_dir, kind):
        """The verdict on a run that should have come to its end."""
        if any(e.crashed for e in ended):
            return "traceback"
        if ended[-1].code != 0:
            return "lost"
        (rows, weights), (wanted, same) = self.outcome(out_dir), self.unbroken[kind]
        # a run that was stopped has a row more, of the step before it was
        equal = weights == same and all(rows.get(step) == row for step, row in wanted.items())
        return "bit-equal" if equal else "silent"

    def refused_or_equal(self, ended, out_dir, before, kind="dense"):
        """The verdict on a run that met something damaged: `before` is what the folder held."""
        if ended.crashed:
            return "traceback"
        if ended.code == 0:
            return self.went_on([ended], out_dir, kind)
        if not ended.refused:
            return "silent" if not ended.err else "traceback"
        return "one line" if contents(out_dir) == before else "lost"


def contents(folder):
    """{name: bytes} of the files in a folder; whose lock it was last does not count."""
    return {
        p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file() and p.name != "lock"
    }


def flip(data, rng):
    """One bit of it, somewhere."""
    data = bytearray(data)
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    return bytes(data), f"byte {at} of {len(data)}"


# -------------------------------------------------------------------------------------------- parts
# Each takes the lab, an empty folder, a generator and the trial's number, and returns its verdict, what was
# done, and the last process that ended.


def kills(lab, folder, rng, i):
    """kill -9 at a random moment, in one of ten trials of a Python that is still importing, in one of three
    once more after --resume; then the advice of the messages is followed."""
    kind, real = rng.choice(list(KINDS)), i % 10 == 0
    argv, where = lab.train(folder / "run", kind), []
    for extra in ([], ["--resume"])[: 1 + (rng.random() < 0.3)]:
        if extra and not (folder / "run" / "last.pt").exists():
            break
        process = Process([*argv, *extra], folder, real=real and not extra)
        time.sleep(rng.random() * (4 if real and not extra else 0.9 * lab.seconds[kind]))
        running = process.poll() is None
        process.kill()
        ended = process.wait()
        names = set(contents(folder / "run")) if (folder / "run").exists() else set()
        saving = any(name.endswith(".tmp") for name in names)
        training = "metrics.jsonl" in names
        where.append(
            "after its end" if not running else
            "saving" if saving else "training" if training else "start-up"
        )  # fmt: skip
        if ended.crashed:
            return "traceback", f"{kind}, killed {where}", ended
    tried = lab.finish(argv, folder)
    return (
        lab.went_on(tried, folder / "run", kind),
        f"{kind}, killed: {', '.join(where)}",
        tried[-1],
    )


def signals(lab, folder, rng, i):
    """Ctrl-C or SIGTERM at a random moment, in one of three trials twice. Eight are real processes, some of
    them still importing, and two are two ranks under torchrun that log and save rarely."""
    number = (signal.SIGINT, signal.SIGTERM)[i % 2]
    if i in (0, 1):
        return torchrun_signal(lab, folder, rng, number)
    kind, real = rng.choice(list(KINDS)), i < 10
    argv = lab.train(folder / "run", kind)
    process = Process(argv, folder, real=real)
    time.sleep(rng.random() * (8 if real else lab.seconds[kind]))
    process.kill(number)
    if rng.random() < 0.3:
        time.sleep(rng.random() * 0.05)
        process.kill(number)
    ended, what = process.wait(), f"{kind}, {number.name}{', real' * real}"
    if ended.crashed or ended.err.count("\n") > 1:
        return "traceback", what, ended
    if "stopped by" in ended.out:
        last = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        if load_checkpoint(folder / "run" / "last.pt")["step"] != last["step"]:
            return "lost", what + ", heeded, but not saved", ended
        what += ", heeded"
    tried = lab.finish(argv, folder)
    return lab.went_on(tried, folder / "run", kind), what, tried[-1]


def torchrun_signal(lab, folder, rng, number):
    """It must be heeded between two rows that are far apart: "bit-equal" here means that what was saved is
    the step in which it stopped. (Two ranks against one: tests/test_train.py.)"""
    rare = [
        "--max_steps=1000000",
        "--log_interval=100000",
        "--eval_interval=100000",
        "--save_interval=0",
    ]
    argv = lab.train(folder / "run", "dense", *rare, "--batch_size=4", "--threads=1")
    argv = [
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / argv[0]),
        *argv[1:],
    ]
    process, until = Process(argv, folder, real=True), time.monotonic() + PATIENCE
    while not (folder / "run" / "metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.1)  # its first row comes with the first step
    time.sleep(3 + 3 * rng.random())
    process.kill(number)
    ended = process.wait()
    saved = "stopped by" in ended.out and (folder / "run" / "last.pt").exists()
    what = f"two ranks, {number.name} to torchrun"
    if not saved:
        return "lost", what, ended
    # torchrun itself reports the signal it was sent, in its own way; what the ranks print counts
    ranks = [line for line in ended.err.splitlines() if line.startswith(("[rank", "error:"))]
    step = load_checkpoint(folder / "run" / "last.pt")["step"]
    last = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    return ("traceback" if ranks else "bit-equal" if step == last else "lost"), what, ended


def truncations(lab, folder, rng, i):
    """last.pt is cut somewhere; --resume, then --init_from, sample and export read it."""
    run = lab.half(folder)
    path = run / "last.pt"
    whole = path.read_bytes()
    keep = rng.choice([0, 1, len(whole) - 1, rng.randrange(len(whole))])
    path.write_bytes(whole[:keep])
    verdict, what, ended = read_damaged(lab, folder, run, i, f"cut to {keep} of {len(whole)} bytes")
    if verdict == "one line" and ("Traceback" in ended.err or path.read_bytes() != whole[:keep]):
        verdict = "lost"
    return verdict, what, ended


def read_damaged(lab, folder, run, i, what, name="last.pt"):
    """What each reader of a damaged checkpoint says of it."""
    reader = ("--resume", "--resume", "--init_from", "sample", "export")[i % 5]
    path, before = run / name, contents(run)
    argv = {
        "--resume": lab.train(run, "dense", "--resume"),
        "--init_from": lab.train(folder / "new", "dense", f"--init_from={path}"),
        "sample": ["sample.py", f"--checkpoint={path}", "--n_tokens=3", "--prompt=the"],
        "export": ["tools.export", str(path), str(folder / "hf")],
    }[reader]
    ended = lab.run(argv, folder)
    what = f"{what}, {reader}"
    if reader == "--resume":
        return lab.refused_or_equal(ended, run, before), what, ended
    if ended.code == 0:  # only if what was read is what had been written
        return "silent", what, ended
    return ("one line" if ended.refused and contents(run) == before else "traceback"), what, ended


def flips(lab, folder, rng, i):
    """A bit of a checkpoint or of the corpus."""
    if i % 2:
        run = lab.half(folder)
        data, where = flip((run / "last.pt").read_bytes(), rng)
        good = run_of_checkpoint(run / "last.pt")
        (run / "last.pt").write_bytes(data)
        verdict, what, ended = read_damaged(lab, folder, run, i // 2, f"last.pt, {where}")
        if verdict == "silent" and ended.code == 0:  # in a byte that means nothing?
            with contextlib.suppress(UserError):
                verdict = "bit-equal" if run_of_checkpoint(run / "last.pt") == good else verdict
        return verdict, what, ended
    copy = folder / "text"
    shutil.copytree(lab.text, copy)
    name = rng.choice(["train.bin", "train.bin", "val.bin", "meta.json"])
    data, where = flip((copy / name).read_bytes(), rng)
    (copy / name).write_bytes(data)
    if i % 4:
        run, more = lab.half(folder), ["--resume"]
    else:
        run, more = folder / "run", []
        run.mkdir()
    before = contents(run)
    ended = lab.run(lab.train(run, "dense", f"--dataset={copy}", *more), folder)
    return lab.refused_or_equal(ended, run, before), f"{name}, {where} {more}", ended


def run_of_checkpoint(path):
    """All that is in a checkpoint, as text."""
    torch.set_printoptions(profile="full", precision=17)
    return repr(load_checkpoint(path, mmap=False))


def full_disks(lab, folder, rng, i):
    """A file system of its own that is full after some steps: at config.json, a row or a checkpoint. With
    room, the run goes on."""
    kind = rng.choice(list(KINDS))
    disk = folder / "disk"
    disk.mkdir()
    needed = sum(map(len, contents(lab.folder / f"{kind}_whole").values())) // 1024
    size = rng.choice([4, 8, rng.randrange(4, needed), rng.randrange(needed // 2, needed)]) // 4 * 4
    libc, argv = ctypes.CDLL(None, use_errno=True), lab.train(disk / "run", kind)

    def mount(size, flags):
        options = f"size={size}k".encode()
        if libc.mount(b"tmpfs", bytes(disk), b"tmpfs", flags, options):
            raise OSError(ctypes.get_errno(), "mounting a tmpfs takes root: try unshare -rm")

    mount(size, 0)
    try:
        full = lab.run(argv, folder)
        what = f"{kind}, {size} kB"
        if not full.refused:
            return "traceback" if full.crashed or full.code else "silent", what + ", not full", full
        if "disk is full" not in full.err or str(disk) not in full.err:
            return "silent", what + ", does not say that the disk is full, or where", full
        left = [name for name in contents(disk / "run") if name.endswith(".tmp")]
        mount(100_000, 32)  # MS_REMOUNT
        tried = lab.finish(argv, folder)
        verdict = lab.went_on(tried, disk / "run", kind)
        return "lost" if left else verdict, f"{what}: {full.err.strip()}", tried[-1]
    finally:
        libc.umount2(bytes(disk), 2)


def two_runs(lab, folder, rng, i):
    """Two processes in one folder, the second up to a run later: new, to resume, or one over the other. One
    has it, and the other says so."""
    how = ("new", "--resume", "--overwrite")[i % 3]
    run = folder / "run" if how == "new" else lab.half(folder)
    argv = lab.train(run, "dense", *([] if how == "new" else [how]))
    first = Process(argv, folder)
    time.sleep(rng.choice([0, rng.random() * 0.05, rng.random() * lab.seconds["dense"]]))
    second = Process(argv, folder)
    both = [first.wait(), second.wait()]
    what = f"{how}: " + " / ".join(e.err.strip() or f"status {e.code}" for e in both)
    if any(e.crashed for e in both):
        return "traceback", what, both[1]
    done = [e for e in both if e.code == 0]
    refused = [e for e in both if e.refused]
    if not done or len(done) + len(refused) != 2:
        return "lost", what, both[1]
    return lab.went_on(done, run, "dense"), what, both[1]


# ------------------------------------------------------------------------------ damaged files of text


WRONG = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.0, -0.5, 1e308, math.nan, math.inf, "", "x", "256",
    "\ud800", "../../etc/passwd", "x" * 100_000, [], [1], {}, {"a": 1}, [[[[]]]],
]  # fmt: skip


def metas(lab, folder, rng, i):
    """meta.json as it should not be, in one of three with a seal that fits; --resume or a new run."""
    copy = folder / "text"
    shutil.copytree(lab.text, copy)
    path = copy / "meta.json"
    meta = json.loads(path.read_text())
    key = rng.choice([key for key in meta if key != "seal"])
    how = rng.choice(["value", "value", "value", "value", "gone", "text"])
    if how == "text":
        whole = path.read_bytes()
        damaged, what = rng.choice([
            (whole[: rng.randrange(len(whole))], "cut"), (b"", "empty"), (b"\xff" + whole, "not UTF-8"),
            (b"[" * 200_000, "deep"), (b"[]", "a list"), (b"null", "null"), (b"\0" * 500, "zeros"),
            (b'{"a":' * 100_000, "deep"), (b"1" * 100_000, "a long number"), (whole + b"}", "a brace more"),
            (b"\xef\xbb\xbf" + whole, "a byte-order mark"), (whole.decode().encode("utf-16"), "UTF-16"),
        ])  # fmt: skip
        path.write_bytes(damaged)
    else:
        value = rng.choice(WRONG) if how == "value" else None
        what = f"{key} = {value!r:.40}" if how == "value" else f"no {key}"
        meta = {k: v for k, v in meta.items() if k != key} | (
            {key: value} if how == "value" else {}
        )
        seal = rng.choice(["kept", "none", "fits"])
        meta = {k: v for k, v in meta.items() if k != "seal" or seal == "kept"}
        if seal == "fits":
            with contextlib.suppress(ValueError, UnicodeError):
                meta = formats.sealed(meta)
        path.write_text(json.dumps(meta))
        what += f", seal {seal}"
    run, more = (lab.half(folder), ["--resume"]) if i % 2 else (folder / "run", [])
    run.mkdir(exist_ok=True)
    before = contents(run)
    ended = lab.run(lab.train(run, "dense", f"--dataset={copy}", *more), folder)
    return lab.refused_or_equal(ended, run, before), f"{what} {more}", ended


def checkpoints(lab, folder, rng, i):
    """last.pt with a field that is missing, or of another type, shape or value, and valid checksums."""
    kind = rng.choice(["dense", "moe", "muon"])
    run = lab.half(folder, kind)
    saved = torch.load(run / "last.pt", weights_only=True)
    key = rng.choice(sorted(saved))
    inner = rng.choice(["", "", "an entry"])
    holder = saved
    what = key
    while inner and isinstance(holder[key], dict | list) and holder[key]:
        holder = holder[key]
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        what += f"[{key!r}]"
    old = holder[key]
    if torch.is_tensor(old):
        new = rng.choice([
            "gone", None, 1.0, old.flatten()[:1].clone(), old[None].clone(), torch.zeros(0),
            torch.full_like(old, math.nan) if old.is_floating_point() else old.double(),
            old.to(torch.complex64) if old.is_floating_point() else old.float(), old.tolist(),
        ])  # fmt: skip
    else:
        new = rng.choice(["gone", *WRONG[:-1], torch.zeros(3)])
        while what == "step" and type(new) is int and 0 < new <= KNOBS["max_steps"]:
            new = rng.choice(WRONG)  # a step that a run can have would be what was meant
    if isinstance(new, str) and new == "gone" and isinstance(holder, dict):
        del holder[key]
        what += " gone"
    else:
        holder[key] = new
        what += f" = {new!r:.40}"
    torch.save(saved, run / "last.pt")
    before = contents(run)
    if i % 4 == 3:
        argv = rng.choice([
            ["sample.py", f"--checkpoint={run / 'last.pt'}", "--n_tokens=3", "--prompt=the"],
            ["tools.export", str(run / "last.pt"), str(folder / "hf")],
            lab.train(folder / "new", kind, f"--init_from={run / 'last.pt'}"),
        ])  # fmt: skip
        ended = lab.run(argv, folder)
        if ended.code == 0:  # the field does not matter there
            return "bit-equal", f"{kind}: {what}, {argv[0]}", ended
        return "one line" if ended.refused else "traceback", f"{kind}: {what}, {argv[0]}", ended
    ended = lab.run(lab.train(run, kind, "--resume"), folder)
    return lab.refused_or_equal(ended, run, before, kind), f"{kind}: {what}", ended


LINES = {  # of metrics.jsonl
    "half a line": b'{"step": 1\n',
    "not UTF-8": b"\xff\xfe\n",
    "a list": b"[1]\n",
    "null": b"null\n",
    "NaN": b"NaN\n",
    "deep": b"[" * 100_000 + b"\n",
    "zeros": b"\0" * 4096 + b"\n",
    "an empty line": b"\n",
    "no step": b'{"loss": 1.0}\n',
    "a step of text": b'{"step": "x"}\n',
    "a step of null": b'{"step": null}\n',
    "a list of a step": b'{"step": [1]}\n',
    "a step of NaN": b'{"step": NaN, "val_loss": 1}\n',
    "a step that is true": b'{"step": true}\n',
    "a long number": b"1" * 10_000 + b"\n",
    "a long step": b'{"step": ' + b"9" * 10_000 + b"}\n",
}
CONFIGS = {
    "a tower of powers": b"max_steps = 9**9**9\n",
    "a long sum": b"max_steps = " + b"1+" * 3000 + b"1\n",
    "a long list": b"bag_size = [1] * 10**10\n",
    "a long string": b"max_steps = 'x' * 10**9\n",
    "an import": b"import os\n",
    "not UTF-8": b"\xff\xfe\n",
    "10^400": b"max_steps = 10**400\n",
    "6000 digits": b"max_steps = " + b"9" * 6000,
    "5000 hexadecimal digits": b"max_steps = 0x" + b"f" * 5000 + b"\n",
    "a list of them": b"max_steps = [0x" + b"f" * 5000 + b"]\n",
    "brackets": b"max_steps = " + b"(" * 5000 + b"\n",
    "signs": b"max_steps = " + b"-" * 10_000 + b"1\n",
    "1 / 0": b"max_steps = 1 / 0\n",
    "a zero byte": b"\0\n",
    "infinity": b"learning_rate = 1e999\n",
    "a half": b"max_steps = 2 ** -1\n",
    "a complex number": b"learning_rate = (-8) ** 0.5\n",
    "2 MB": b"x" * 2_000_000,
    "no value": b"max_steps: int\n",
    "two targets": b"max_steps = seed = 3\n",
    "a pair": b"(a, b) = 1, 2\n",
    "nested": b"max_steps = {1: [2, {3}]}\n",
}


def logs(lab, folder, rng, i):
    """metrics.jsonl with something else in it: --resume, or plot."""
    run = lab.half(folder)
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    what, line = rng.choice(list(LINES.items()))
    lines.insert(rng.randrange(len(lines)), line)
    path.write_bytes(b"".join(lines))
    before = contents(run)
    if i % 3 == 2:
        ended = lab.run(["tools.plot", str(run), "--no_plot"], folder)
        good = ended.code == 0 or ended.refused
        return "one line" if good and not ended.crashed else "traceback", f"{what}, plot", ended
    ended = lab.run(lab.train(run, "dense", "--resume"), folder)
    verdict = lab.refused_or_equal(ended, run, before)
    if verdict == "one line":  # its advice: without the log, the weights come to the same
        path.rename(run / "old.jsonl")
        again = lab.run(lab.train(run, "dense", "--resume"), folder)
        same = again.code == 0 and lab.outcome(run)[1] == lab.unbroken["dense"][1]
        verdict = "one line" if same else "lost"
    return verdict, what, ended


def configs(lab, folder, rng, i):
    """A config file that is none."""
    what, text = rng.choice(list(CONFIGS.items()))
    path = folder / "config.py"
    path.write_bytes(text)
    (folder / "run").mkdir()
    ended = lab.run(lab.train(folder / "run", "dense", str(path)), folder, memory=4 << 30)
    return lab.refused_or_equal(ended, folder / "run", {}), what, ended


def ranks(lab, folder, rng, i):
    """Two or four ranks under torchrun, one of which is killed, three times at random moments: torchrun
    starts them again, and "bit-equal" here means the losses of one process without ranks, to 1e-5."""
    kind, n = ("dense", "moe")[i % 2], rng.choice([2, 4])
    way = ("fsdp", "ddp", "fsdp")[i % 3]
    knobs = [f"--batch_size={8 // n // 2}", f"--parallel={way}", "--threads=1"]
    argv = ["torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "--max_restarts=3"]
    train = lab.train(folder / "run", kind, *knobs)
    process = Process([*argv, str(ROOT / train[0]), *train[1:]], folder, real=True)
    kills, until = 0, time.monotonic() + 5 * PATIENCE
    while kills < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(rng.random() * rng.choice([2, 12]))
        if len(workers := children(process.pid)) == n:
            os.kill(rng.choice(workers), signal.SIGKILL)
            kills += 1
            while process.poll() is None and set(workers) & set(children(process.pid)):
                time.sleep(0.05)
    ended = process.wait(5 * PATIENCE)
    what = f"{kind}, {n} ranks, {way}, killed {kills} times"
    if ended.code:
        return "lost", what, ended
    rows, (wanted, _) = lab.rows(folder / "run"), lab.unbroken[kind]
    close = lambda a, b: a == b or isinstance(a, float) and math.isclose(a, b, rel_tol=1e-5)
    same = all(step in rows and all(map(close, rows[step], row)) for step, row in wanted.items())
    return "bit-equal" if same else "silent", what, ended


def children(pid):
    """The processes that a process has started, while they live."""
    with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/task/{pid}/children") as f:
        return [int(child) for child in f.read().split()]
    return []


# ---------------------------------------------------------------------------------------- command lines


def command(lab, folder, rng, i):
    """(argv that works, its dataclass) of a tool."""
    half, whole = lab.folder / "dense_half", lab.folder / "dense_whole"
    tools = {
        "train.py": lab.train(
            folder / "run", rng.choice(list(KINDS)), "--max_steps=3", "--superposition_ratio=0.7"
        ),
        "sample.py": [
            "sample.py",
            f"--checkpoint={whole / 'best.pt'}",
            "--n_tokens=3",
            "--prompt=the",
        ],
        "tools.evaluate": ["tools.evaluate", str(whole / "best.pt"), "--eval_positions=160"],
        "tools.plan": ["tools.plan", str(lab.config), f"--dataset={lab.text}"],
        "tools.plot": ["tools.plot", str(whole), str(half), "--no_plot"],
        "tools.export": ["tools.export", str(whole / "last.pt"), str(folder / "hf")],
        "tools.sweep": ["tools.sweep", str(lab.config), "--train=False", "--seed=1,2"],
        "tools.compare": ["tools.compare", str(lab.config), "--train=False"],
        "tools.keep": ["tools.keep", str(whole), f"--out_dir={folder / 'kept'}"],
        "tools.fit_mi": [
            "tools.fit_mi",
            f"--dataset={lab.text}",
            f"--out={folder / 'f.json'}",
            "--plot=False",
        ],
        "tools.bench": [
            "tools.bench",
            "--parts=loss",
            "--positions=32",
            "--repeats=1",
            "--bag_sizes=1",
        ],
        "data/text/prepare.py": [
            "data/text/prepare.py",
            str(lab.folder / "text.txt"),
            f"--out_dir={folder / 'p'}",
        ],
    }
    name = ("train.py", rng.choice(list(tools)))[i % 2]
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    return tools[name], module.Config


NUMBERS = ("int", "float")
MUST = [  # be refused: of which kinds of knobs, and what is given
    (("int", "float", "str"), "--KNOB"),
    (("int", "float", "str"), "--KNOBzz=1"),
    (NUMBERS, "--KNOB=abc"),
    (NUMBERS, "--KNOB="),
    (("int",), "--KNOB=1.5"),
    (("int",), "--KNOB=1" + "0" * 30),
    (("float",), "--KNOB=nan"),
    (("float",), "--KNOB=inf"),
    (("bool",), "--KNOB=maybe"),
    (("Literal",), "--KNOB=zzz"),
    (("",), "--zzz=1"),
    (("",), "--=1"),
    (("",), "--"),
]
MAY = [  # be refused, or work
    (NUMBERS, "--KNOB=-1"),
    (NUMBERS, "--KNOB=0"),
    (NUMBERS, "--KNOB=1000"),
    (("int",), f"--KNOB={2**62}"),
    (("float",), "--KNOB=1e308"),
    (("float",), "--KNOB=1e-320"),
    (("bool",), "--KNOB"),
    (("str",), "--KNOB="),
    (("str",), "--KNOB=,"),
    (("str",), "--KNOB=."),
    (("str",), "--KNOB=a\nb"),
    (("str",), "--KNOB=\u4e2d\U0001f600"),
    (("str",), "--KNOB=\udcff"),  # a byte that is not UTF-8
    (("str",), "--KNOB=/dev/null/x"),
    (("str",), "--KNOB=" + "x" * 5000),
    (("str",), "--KNOB=last.pt"),
]


def commands(lab, folder, rng, i):
    """A command line that works, with something done to it that must be refused, or that may be."""
    argv, config = command(lab, folder, rng, i)
    shutil.copy(lab.folder / "dense_whole" / "last.pt", folder)
    knobs, places = {"": [""]}, 0
    for field in dataclasses.fields(config):
        places += configurator.is_place(field)
        if not configurator.is_place(field):
            kind = field.type.__name__ if field.type in (int, float, bool, str) else "Literal"
            knobs.setdefault(kind, []).append(field.name)
    hows = ["must", "must", "may", "may", "may", "as it is", "--help"] + ["less"] * places
    how, extra = rng.choice(hows), []
    if how in ("must", "may"):
        choices = [
            (kind, text) for kinds, text in (MUST if how == "must" else MAY) for kind in kinds
        ]
        more = {"must": ["-x", "", "no.py", "last.pt", "."], "may": ["--resume", "--overwrite"]}[
            how
        ]
        choices += [
            ("", text) for text in (["", "last.pt", "no/such"] * (how == "may") if places else more)
        ]
        kind, text = rng.choice([(kind, text) for kind, text in choices if kind in knobs])
        extra = [text.replace("KNOB", rng.choice(knobs[kind]))]
    elif how == "--help":
        extra = [how]
    argv = argv[:1] if how == "less" else [*argv, *extra]
    ended = lab.run(argv, folder, memory=6 << 30)
    what = f"{how}: {argv[0]} {' '.join(extra)!r:.100}"
    if ended.crashed or not (ended.code == 0 or ended.refused):
        return "traceback", what, ended
    idle = (
        argv[0] in ("tools.sweep", "tools.compare") and ended.refused
    )  # without runs there is no table
    good = {"must": ended.refused, "less": ended.refused, "may": True}.get(
        how, ended.code == 0 or idle
    )
    if ended.code == 0 and (folder / "run" / "metrics.jsonl").exists():
        good = (
            good and "NaN" not in (folder / "run" / "metrics.jsonl").read_text()
        )  # which is not JSON
    return "silent" if not good else "one line" if ended.code else "bit-equal", what, ended


# ------------------------------------------------------------------------------------ cost of verifying


def cost():
    """Lines of a table: seconds per GB of verifying a checkpoint and a corpus, beside reading them."""
    lines, rng = [], torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.pt"
        state = {f"{i}": torch.rand(2**24, generator=rng) for i in range(8)}  # 0.5 GB
        torch.save({"model": state, "config": {}, "meta": {}}, path)
        gigabytes, readers = path.stat().st_size / 1e9, {
            "torch.load alone": lambda: torch.load(path, weights_only=True),
            "load_checkpoint, which verifies": lambda: load_checkpoint(path, mmap=False),
        }  # fmt: skip
        lines += [
            f"| checkpoint, {name} | {s:.2f} |" for name, s in per_gb(readers, gigabytes).items()
        ]
        corpus = Path(folder) / "corpus"
        shutil.copytree(formats.DATA + "/python_source", corpus)
        if (corpus / "train.bin").exists():
            gigabytes = sum(p.stat().st_size for p in corpus.glob("*.bin")) / 1e9
            readers = {
                "reading the bytes alone": lambda: [
                    len(p.read_bytes()) for p in corpus.glob("*.bin")
                ],
                "open_corpus, which verifies": lambda: open_corpus(str(corpus)),
            }
            lines += [
                f"| corpus, {name} | {s:.2f} |" for name, s in per_gb(readers, gigabytes).items()
            ]
    return lines


def per_gb(readers, gigabytes, repeats=5):
    """{name: seconds per GB}, the median of interleaved repeats, from the page cache."""
    times = {name: [] for name in readers}
    for _ in range(repeats):
        for name, read in readers.items():
            started = time.process_time()
            read()
            times[name].append((time.process_time() - started) / gigabytes)
    return {name: sorted(found)[repeats // 2] for name, found in times.items()}


# ------------------------------------------------------------------------------------------- the campaign


def trial(task):
    """One trial: (part, number, seed, lab, whether its folder is kept) -> (part, number, verdict, text)."""
    part, i, seed, lab, keep = task
    folder = Path(tempfile.mkdtemp(prefix=f"{part}_{i}_", dir=lab.folder))
    rng = random.Random(f"{seed} {part} {i}")
    verdict, what, ended = globals()[part](lab, folder, rng, i)
    bad = VERDICTS.index(verdict) > 1
    said = ended.err.strip() or ended.out.strip()
    text = f"{what} | status {ended.code}: {said[-300:]}"
    if keep or bad:
        text += f"\n    kept: {folder}"
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return part, i, verdict, text


def main(c):
    parts = [*TRIALS, "cost"] if c.parts == "all" else c.parts.split(",")
    if unknown := [part for part in parts if part not in (*TRIALS, "cost")]:
        raise UserError(f"parts are {', '.join(TRIALS)}, cost, not {unknown[0]}")
    torch.set_num_threads(1)
    started, counts, where = (
        time.monotonic(),
        {part: Counter() for part in parts if part in TRIALS},
        Counter(),
    )
    folder = tempfile.mkdtemp(prefix="trials_")
    lab = Lab(folder)
    numbers = {part: range(max(1, round(c.share * TRIALS[part]))) for part in counts}
    if c.only >= 0:
        numbers = dict.fromkeys(counts, [c.only])
    tasks = [(part, i, c.seed, lab, c.only >= 0) for part in counts for i in numbers[part]]
    with multiprocessing.get_context("fork").Pool(c.jobs) as pool:
        for part, i, verdict, text in pool.imap_unordered(trial, tasks):
            counts[part][verdict] += 1
            if part == "kills" and "killed: " in text:
                where.update(text.partition("killed: ")[2].partition(" |")[0].split(", "))
            if part == "ranks":
                where["a rank under torchrun"] += int(text.partition("killed ")[2][0])
            if VERDICTS.index(verdict) > 1 or c.only >= 0:
                print(f"{part} {i}: {verdict}: {text}", flush=True)
    bad = sum(
        n
        for count in counts.values()
        for verdict, n in count.items()
        if VERDICTS.index(verdict) > 1
    )
    if not bad and c.only < 0:
        shutil.rmtree(folder)
    report = "\n".join(table(counts, where, cost() if "cost" in parts else []))
    print(f"{report}\n\n{(time.monotonic() - started) / 60:.0f} minutes")
    if c.out:
        command = " ".join(arg for arg in sys.argv[1:] if not arg.startswith("--jobs"))
        versions = (
            f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}"
        )
        text = (
            f"{INTRODUCTION}\n\n    python -m tests.campaign {command}\n\n{versions}.\n\n{report}\n"
        )
        Path(c.out).write_text(text, encoding="utf-8")
    if bad:
        raise UserError(f"{bad} trials ended badly; their folders are in {folder}")


INTRODUCTION = """# Reliability

What happens to a run that is killed, and to files that are damaged: tests/campaign.py does it, and counts.
Each trial is a real process of a real script on a tiny model on a CPU. *bit-equal*: it went on, where needed
by the advice of its own messages, and weights and losses are those of the undisturbed run (a command line: it
worked; the two signals to torchrun: the step in which the ranks stopped was saved; ranks: losses to 1e-5).
*One line*: it said what is wrong, exit status 1, and every file is as before. The last three columns should
be empty: a traceback, a crash or a hang; another result without a word; work that is gone."""


def table(counts, where, costs):
    """Lines of markdown."""
    lines = [
        "| part | tried | " + " | ".join(VERDICTS) + " |",
        "|---" + "|--:" * (1 + len(VERDICTS)) + "|",
    ]
    for part, count in counts.items():
        cells = [str(count[verdict] or "") for verdict in VERDICTS]
        lines.append(f"| {part.replace('_', ' ')} | {count.total()} | " + " | ".join(cells) + " |")
    if where:
        lines += [
            "",
            "Where the kills fell: " + ", ".join(f"{k} {n}" for k, n in where.most_common()) + ".",
        ]
    if costs:
        lines += ["", "| cost of verifying, one thread | CPU seconds per GB |", "|---|--:|", *costs]
    return lines


if __name__ == "__main__":
    configurator.entry_point(main, Config)
