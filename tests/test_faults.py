"""Faults, again and again: kills, signals, full disks, two runs in one folder.

A trial runs train.py in a process of its own, at a random moment something happens to it, and then the advice
of its messages is followed until the run has ended. In the end, weights and losses must be those of a run
that nobody disturbed, bit for bit. FAULTS=20 makes 20 times the trials."""

import contextlib
import json
import os
import random
import resource
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FORKS, ROOT, read_rows, write_corpus

TIMES = int(os.environ.get("FAULTS", 1))
KNOBS = dict(
    n_layer=2, n_head=2, n_embd=32, ff_dim=64, block_size=16, total_batch=128, batch_size=8, max_steps=30,
    bag_size="3", superposition_ratio=0.4, learning_rate=0.01, warmup_steps=4, eval_interval=5,
    log_interval=2, eval_positions=160, save_interval=4, device="cpu", dtype="float32", compile="off",
)  # fmt: skip
KINDS = {
    "dense": [],
    "moe": ["--n_expert=4", "--top_k=2", "--balance_bias", "--balance_rate=0.01", "--qk_norm"],
    "muon": ["--optimizer=muon", "--bag_size=4-2", "--batch_size=4"],
    "mixed": ["--dataset={lab}/text:0.5,{lab}/other:0.5", "--document_bags"],
}
LEARNED = "phase", "loss", "val_loss", "lr", "grad_norm", "data_tokens", "flops"


# ---- processes


def script(argv, out, err, largest_file):
    """Run a script of the repository in this process, as Python would, with its output in files."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    for fd, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
    sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115
    if largest_file:  # beyond it, writing fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    sys.argv, code = argv, 0
    try:
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
        print(e.code if isinstance(e.code, str) else "", end="", file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Lab:
    """A folder with corpora, and a run of each kind that nobody disturbed."""

    def __init__(self, folder):
        self.folder, self.n, self.unbroken, self.seconds = folder, 0, {}, {}
        for seed, name in enumerate(("text", "other")):
            rng = random.Random(seed)
            tokens = rng.choices(range(20), [1, *[5] * 19], k=6500)
            write_corpus(folder / name, tokens[:6000], tokens[6000:], 20)
            meta = json.loads((folder / name / "meta.json").read_text())
            meta |= {"separator": 0, "encoding": "gpt2", "vocabulary": "v" * 64}
            (folder / name / "meta.json").write_text(json.dumps(meta))
        self.start(["sample.py"])[1]()  # starts the server
        for kind in KINDS:
            began, out_dir = time.monotonic(), folder / kind
            ended = self.run(self.train(out_dir, kind))
            assert ended.code == 0, ended
            self.seconds[kind], self.unbroken[kind] = time.monotonic() - began, outcome(out_dir)

    def train(self, out_dir, kind="dense", *more):
        knobs = KNOBS | {"dataset": self.folder / "text", "out_dir": out_dir}
        argv = ["train.py", *(f"--{key}={value}" for key, value in knobs.items()), *KINDS[kind]]
        return [arg.format(lab=self.folder) for arg in argv] + list(more)

    def start(self, argv, largest_file=0):
        """-> the process, and a function that waits for it -> its code, out and err."""
        self.n += 1
        out, err = (self.folder / f"{self.n}.{name}" for name in ("out", "err"))
        process = FORKS.Process(target=script, args=(argv, out, err, largest_file))
        process.start()

        def wait():
            process.join(60)
            assert process.exitcode is not None, "it hangs"
            texts = [path.read_text() if path.exists() else "" for path in (out, err)]
            return SimpleNamespace(code=process.exitcode, out=texts[0], err=texts[1])

        return process, wait

    def run(self, argv, **options):
        return self.start(argv, **options)[1]()

    def finish(self, argv, out_dir, kind):
        """Start `argv`, and again as its messages advise, until the run ends, as the unbroken run did."""
        extra = []
        for _ in range(3):
            ended = self.run([*argv, *extra])
            if ended.code == 0:
                break
            assert refused(ended), ended
            extra = ["--resume"] if "(--resume)" in ended.err else ["--overwrite"]
        assert ended.code == 0, ended
        rows, weights = outcome(out_dir)
        wanted, same = self.unbroken[kind]
        # a run that was stopped has one more row, of the step before
        assert all(rows.get(step) == row for step, row in wanted.items()) and weights == same


def outcome(out_dir):
    """What a run has learned: its rows by step, without the clock, and the weights of last.pt."""
    rows = read_rows(out_dir)
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    state = torch.load(Path(out_dir) / "last.pt", weights_only=True)["model"]
    weights = {name: t.numpy().tobytes() for name, t in state.items()}
    return {row["step"]: [row.get(key) for key in LEARNED] for row in rows}, weights


def refused(ended):
    """Whether a process said in one line what is wrong."""
    return ended.code == 1 and ended.err.startswith("error: ") and "\n" not in ended.err.strip()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"))


def trials(n):
    """A generator of random numbers and a kind for each trial."""
    kinds = list(KINDS)
    return [(random.Random(i), kinds[i % len(kinds)]) for i in range(n * TIMES)]


# ---- faults


def test_a_run_that_was_ended_resumes_bit_for_bit(lab, tmp_path):
    """Killed at any moment, or told to stop, which saves the step."""
    saved = 0
    for i, (rng, kind) in enumerate(trials(6)):
        run, number = tmp_path / f"{i}", (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)[i % 3]
        process, wait = lab.start(lab.train(run, kind))
        killed = number == signal.SIGKILL
        while not (killed or (run / "metrics.jsonl").exists()) and process.is_alive():
            time.sleep(0.01)
        time.sleep(rng.random() * (lab.seconds[kind] if killed else 0.2))
        with contextlib.suppress(ProcessLookupError):  # it has finished
            os.kill(process.pid, number)
        ended = wait()
        assert ended.code in (0, 1, 130, -number) and ended.err == "", ended
        if "stopped by" in ended.out:
            saved += 1
            state = torch.load(run / "last.pt", weights_only=True)
            assert state["step"] == read_rows(run)[-1]["step"]
        lab.finish(lab.train(run, kind), run, kind)
    assert saved


def test_a_full_disk_is_said_and_with_room_the_run_resumes(lab, tmp_path):
    checkpoint = os.path.getsize(lab.folder / "dense" / "last.pt")  # 500 bytes are half a log
    sizes = [500, checkpoint - 1, *(rng.randrange(500, checkpoint) for rng, _ in trials(1))]
    for i, size in enumerate(sizes):
        argv = lab.train(tmp_path / f"{i}")
        ended = lab.run(argv, largest_file=size)
        assert refused(ended) and "cannot write" in ended.err, ended
        assert not list((tmp_path / f"{i}").glob("*.tmp"))
        lab.finish(argv, tmp_path / f"{i}", "dense")


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]])
def test_of_two_runs_in_a_folder_one_has_it_and_the_other_says_so(lab, tmp_path, more):
    for i, (rng, _) in enumerate(trials(1)):
        run = tmp_path / f"{i}"
        if more:
            lab.run(lab.train(run))
        argv = lab.train(run, "dense", *more)
        first = lab.start(argv)[1]
        time.sleep(rng.choice([0, rng.random() * lab.seconds["dense"]]))
        both = [lab.run(argv), first()]
        done = [ended for ended in both if ended.code == 0]
        assert done and len(done) + sum(map(refused, both)) == 2, both
        assert outcome(run) == lab.unbroken["dense"]
