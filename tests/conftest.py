"""Shared by all tests: the repository on sys.path, one thread, a fixed seed, a tiny corpus and a tiny
training run."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

TINY = dict(
    n_layer=1,
    n_head=2,
    n_embd=16,
    ff_dim=32,
    block_size=16,
    total_batch=128,
    batch_size=8,
    max_steps=10,
    bag_size=3,
    superposition_ratio=0.4,
    learning_rate=0.01,
    warmup_steps=2,
    eval_interval=5,
    log_interval=1,
    eval_positions=160,
    save_interval=0,
    device="cpu",
    dtype="float32",
    compile="off",
)


@pytest.fixture(autouse=True)
def same_every_time(monkeypatch):
    """No variables of a launcher, one thread, a fixed seed; signal handlers are restored."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def write_corpus(folder, train_tokens, val_tokens, vocab_size):
    """A prepared corpus: train.bin, val.bin, meta.json."""
    folder.mkdir()
    meta = dict(vocab_size=vocab_size, dtype="uint16", bytes_per_token=2.0)
    for split, tokens in (("train", train_tokens), ("val", val_tokens)):
        np.asarray(tokens, dtype=np.uint16).tofile(folder / f"{split}.bin")
        meta[f"{split}_tokens"] = len(tokens)
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folder of 6,000 tokens in which a token says much about the next; V = 50, not a multiple of
    anything."""
    rng = np.random.default_rng(0)
    tokens = np.cumsum(rng.choice([1, 1, 1, 7, 20], 6500)) % 50
    return write_corpus(tmp_path_factory.mktemp("data") / "tiny", tokens[:6000], tokens[6000:], 50)


@pytest.fixture
def tiny(corpus, tmp_path):
    """tiny(key=value, ...) -> the Config of a run of a second or less."""

    out_dir = str(tmp_path / "run")
    return lambda **knobs: train.Config(**TINY | {"dataset": corpus, "out_dir": out_dir} | knobs)


@pytest.fixture
def run(tiny):
    """run(key=value, ...) trains in this process -> the rows of its metrics.jsonl."""

    def start(**knobs):
        config = tiny(**knobs)
        train.main(config)
        return read_rows(config.out_dir)

    return start


def read_rows(out_dir):
    with open(os.path.join(out_dir, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


# ---- runs

MOE = dict(n_expert=4, top_k=2, balance_bias=True, balance_rate=0.01, qk_norm=True)
SWITCH = 4  # the tiny run takes 4 steps on bags of 3, then 6 on tokens
LEARNED = "step", "loss", "val_loss", "lr", "grad_norm", "positions", "data_tokens", "flops"


def column(rows, *keys):
    return [[row[key] for key in keys if key in row] for row in rows]


def load(out_dir, name="last.pt"):
    return torch.load(Path(out_dir) / name, weights_only=True)


def patched_steps(monkeypatch, before):
    """Call before(step) at the beginning of each step."""
    multiplier = train.rate_multiplier
    watch = lambda step, c: (before(step), multiplier(step, c))[1]
    monkeypatch.setattr(train, "rate_multiplier", watch)


def slow_clock(monkeypatch, seconds):
    """A clock on which each step takes this long and nothing else takes any time."""
    clock = [0.0]
    patched_steps(monkeypatch, lambda step: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])


def stopped_run(run, after, number=signal.SIGTERM, **knobs):
    """Run until the system asks the process to end in the middle of step `after`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patched_steps(patch, lambda step: step == after - 1 and os.kill(os.getpid(), number))
        run(**knobs)
    assert stopped.value.code == 1


def command_line(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


# ---- processes: forks of a server that has imported torch, since importing takes longer than training

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "sample", "torch._dynamo"])


def run_forks(work, n, *args):
    """work(i, *args) in n processes at once, which must all end well."""
    processes = [FORKS.Process(target=work, args=(i, *args)) for i in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    ended = [process.exitcode for process in processes]
    for process in processes:  # one that hangs
        process.kill()
    assert ended == [0] * n


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def be_rank(me, n, port, parallel):
    """Set the variables of a launcher, or none for parallel=auto -> whether there is a rank `me` of `n`."""
    if me < n:
        os.environ |= dict(RANK=str(me), LOCAL_RANK=str(me), WORLD_SIZE=str(n))
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        if parallel == "auto":
            del os.environ["RANK"], os.environ["WORLD_SIZE"]
    return me < n
