"""Many ranks: DDP and FSDP2 train as one process does, checkpoints of any number of ranks, ranks that fail.

What takes several processes is run once, by four of them that do one training run after the other (`ranks`),
or by torchrun; the rest by one rank in this process.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY, read_rows
from test_train import free_port
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor

import train
from model import GPT, BagEmbedding, GPTConfig, Head, Linear, Router
from nanotst import UserError, checkpoint, log, machine, parallel
from nanotst.checkpoint import load_checkpoint

# Nothing divides by the ranks: width 26 and 3 heads of 6, 50 tokens, 5 experts, of which one rank of four has
# none
DENSE = dict(n_embd=26, n_head=3, head_dim=6, ff_dim=42, qk_norm=True, checkpoint_activations=True)
MOE = dict(
    n_embd=24,
    ff_dim=40,
    n_expert=5,
    top_k=2,
    balance_bias=True,
    balance_rate=0.01,
    balance_coef=0.1,
)
TIED = dict(n_embd=26, n_head=3, head_dim=6, tie_embeddings=True)
KINDS = {"dense": DENSE, "moe": MOE, "tied": TIED}
LONG = dict(
    max_steps=40,
    total_batch=192,
    batch_size=0,
    warmup_steps=4,
    eval_interval=10,
    eval_positions=176,
)
SHORT = {
    **LONG,
    "max_steps": 12,
    "eval_interval": 6,
}  # 12 rows a step, 11 of validation; 5 steps on bags

SAME = [  # (kind, ranks, knobs)
    ("dense", 4, dict(parallel="ddp", batch_size=1)),
    ("dense", 4, dict(parallel="fsdp", batch_size=1)),
    ("moe", 4, dict(parallel="ddp", batch_size=1)),
    ("moe", 2, dict(parallel="fsdp", checkpoint_activations=True)),
    ("moe", 4, dict(parallel="fsdp", batch_size=1)),
    ("moe", 4, dict(parallel="fsdp", shard_size=2, batch_size=3)),
    ("tied", 2, dict(parallel="fsdp", batch_size=2)),
]
A_PROCESS = """
import json, os, shutil, sys, train
from nanotst.machine import StopSignals
me = int(sys.argv[1])
for job in json.load(sys.stdin):
    if me < job["ranks"]:
        if me == 0 and job["copy"]:
            shutil.copytree(job["copy"], job["knobs"]["out_dir"])
        os.environ |= dict(RANK=str(me), LOCAL_RANK=str(me), WORLD_SIZE=str(job["ranks"]))
        if job["knobs"]["parallel"] == "auto":  # without ranks
            del os.environ["RANK"], os.environ["WORLD_SIZE"]
        StopSignals.stop = lambda self, step: step == job["stop"]
        try:
            train.main(train.Config(**job["knobs"]))
        except SystemExit:
            assert job["stop"]
"""


def job(corpus, folder, name, ranks, stop=None, copy=None, **knobs):
    knobs = {
        **TINY,
        "threads": 1,
        "parallel": "auto",
        "dataset": corpus,
        "out_dir": f"{folder}/{name}",
        **knobs,
    }
    return dict(ranks=ranks, stop=stop, copy=copy and f"{folder}/{copy}", knobs=knobs)


@pytest.fixture(scope="module")
def ranks(corpus, tmp_path_factory):
    """A folder with all runs of SAME, by name, and the runs they are compared with."""
    folder, jobs = tmp_path_factory.mktemp("ranks"), []
    for kind, knobs in KINDS.items():
        jobs.append(job(corpus, folder, f"{kind} long", 1, **LONG, **knobs))
        jobs.append(job(corpus, folder, f"{kind} short", 1, **SHORT, **knobs))
    for kind, n, knobs in SAME:
        jobs.append(job(corpus, folder, name_of(kind, n, knobs), n, **LONG | knobs, **KINDS[kind]))
    start_ranks(jobs)
    return folder


def name_of(kind, n, knobs):
    return " ".join([kind, str(n), *(f"{key}={value}" for key, value in knobs.items())])


def start_ranks(jobs):
    """Four processes that do the jobs one after the other, each with as many of them as it has ranks. They
    meet each time anew in one store, which this process keeps as torchrun does."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "OMP_NUM_THREADS": "1",
    }
    env["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    pipes = dict(
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", A_PROCESS, str(i)], cwd=ROOT, env=env, **pipes)
        for i in range(4)
    ]
    try:
        for process in processes:
            process.stdin.write(json.dumps(jobs))
            process.stdin.close()
            process.stdin = None
        for process in processes:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
    finally:
        for process in processes:  # one that hangs
            process.kill()


def assert_same_losses(rows, wanted):
    """And norms of the gradients before they are clipped, which a wrong factor would show in; each to
    1e-5."""
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, other in zip(rows, wanted):
        assert row.keys() == other.keys()
        for key in {
            "loss",
            "val_loss",
            "grad_norm",
            "max_violation",
            "router_entropy",
        } & row.keys():
            assert row[key] == pytest.approx(other[key], rel=1e-5), (row["step"], key)


@pytest.mark.parametrize("kind, n, knobs", SAME, ids=[name_of(*case) for case in SAME])
def test_ranks_train_as_one_process_does(ranks, kind, n, knobs):
    """40 steps across the switch, in float32, from the same initial weights."""
    wanted = read_rows(ranks / f"{kind} long")
    assert (
        len({row["phase"] for row in wanted}) == 2 and min(row["grad_norm"] for row in wanted) > 0
    )
    assert_same_losses(read_rows(ranks / name_of(kind, n, knobs)), wanted)


# ---- one rank in this process


@pytest.fixture
def a_rank(monkeypatch):
    """This process is the only rank of a run."""
    env = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    for key, value in env.items():
        monkeypatch.setenv(key, value)

    def new():
        monkeypatch.setenv("MASTER_PORT", free_port())

    new()
    yield new
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def fsdp(run, a_rank):
    def start(**knobs):
        a_rank()
        try:
            return run(parallel="fsdp", threads=1, **knobs)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return start


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_weights_sharded_or_not(a_rank, tiny, kind):
    config = checkpoint.model_config(vars(tiny(n_layer=2, **KINDS[kind])), {"vocab_size": 50})
    torch.manual_seed(5)
    plain, after = GPT(config), torch.get_rng_state()
    torch.manual_seed(5)
    model = parallel.build(config, machine.Machine.start(tiny(parallel="fsdp", threads=1)))
    assert torch.equal(torch.get_rng_state(), after)
    for (name, t), (_, wanted) in zip(model.state_dict().items(), plain.state_dict().items()):
        assert torch.equal(t.full_tensor() if isinstance(t, DTensor) else t, wanted), name
    assert all(
        torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers())
    )  # the rotary tables, too
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert (model.head.weight is model.embed.weight) == config.tie_embeddings


def test_no_more_than_one_whole_parameter_is_made(a_rank, tiny, monkeypatch):
    """The rest is on the meta device, or the part of a rank."""
    alive, most, init = [], [], GPT.init_weight

    def watch(self, name, p):
        import weakref

        if not p.is_meta:
            alive[:] = [w for w in alive if w() is not None] + [weakref.ref(p)]
            most.append(len(alive))
        init(self, name, p)

    monkeypatch.setattr(GPT, "init_weight", watch)
    machine_ = machine.Machine.start(tiny(parallel="fsdp", threads=1))
    parallel.build(GPTConfig(50, 16, 3, 2, 16), machine_)
    assert len(most) > 20 and max(most) <= 2  # the last one, until the next has taken its name


def test_bfloat16_is_where_the_unsharded_run_has_it(fsdp, run, a_rank, tmp_path, monkeypatch):
    """Routers and the embedding compute from float32 weights, the others from bfloat16; the losses are as
    close as that, and master weights, moments and norms of gradients are float32."""
    seen = {}
    for cls in (Router, BagEmbedding, Linear, Head):

        def watch(self, *args, forward=cls.forward, name=cls.__name__):
            seen.setdefault(name, set()).add(self.weight.dtype)
            return forward(self, *args)

        monkeypatch.setattr(cls, "forward", watch)
    rows = fsdp(dtype="bfloat16", **MOE)
    assert seen["Router"] == seen["BagEmbedding"] == {torch.float32}
    assert seen["Linear"] == seen["Head"] == {torch.bfloat16}
    saved = load_checkpoint(str(tmp_path / "run" / "last.pt"))
    moments = [t for kept in saved["optimizer"][0]["state"].values() for t in kept.values()]
    assert {t.dtype for t in [*saved["model"].values(), *moments]} == {torch.float32}
    monkeypatch.delenv("RANK")
    plain = run(dtype="bfloat16", out_dir=str(tmp_path / "plain"), **MOE)
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in plain], rel=2e-3)
    assert [r["grad_norm"] for r in rows] == pytest.approx(
        [r["grad_norm"] for r in plain], rel=2e-2
    )


def test_units_are_compiled_one_by_one_before_the_first_step(fsdp, monkeypatch):
    """Embedding and head have a graph for bags, tokens and evaluation; the blocks share one, but for
    evaluation."""
    import functools

    counter, seen, multiplier = CompileCounterWithBackend("eager"), [], train.rate_multiplier
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(
        train, "rate_multiplier", lambda *a: seen.append(counter.frame_count) or multiplier(*a)
    )
    torch.compiler.reset()
    fsdp(compile="on", n_layer=3)
    assert seen + [counter.frame_count] == [seen[0]] * 11 and 6 <= seen[0] <= 8


def test_what_begins_anew_at_the_switch_is_the_same_sharded(fsdp, run, tmp_path, monkeypatch):
    anew = dict(reinit_at_switch="embedding,head,optimizer", **DENSE)
    rows = fsdp(**anew)
    monkeypatch.delenv("RANK")
    plain = run(out_dir=str(tmp_path / "plain"), **anew)
    assert_same_losses(rows, plain)
    assert rows[-1]["loss"] != pytest.approx(
        run(out_dir=str(tmp_path / "x"), **DENSE)[-1]["loss"], rel=1e-3
    )


@pytest.fixture
def folder(fsdp, tmp_path):
    fsdp(max_steps=4)
    return tmp_path / "run" / "last.pt"


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(parallel="fsdp", optimizer="muon"), "optimizer=muon works on whole matrices"),
        (dict(parallel="fsdp", shard_size=2), "shard_size 2 .* divide 1 ranks"),
        (dict(parallel="ddp", shard_size=1), "shard_size 1 is for parallel=fsdp"),
        (dict(shard_size=-1), "shard_size"),
        (
            dict(parallel="fsdp", n_embd=32, resume=True, allow_changes=True),
            "last.pt does not fit this model",
        ),
        (dict(parallel="fsdp", max_steps=5, resume=True), "max_steps 4 -> 5"),
        (dict(parallel="fsdp"), "already holds a run"),
    ],
)
def test_what_cannot_work_is_one_line(run, folder, a_rank, knobs, words):
    a_rank()
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(UserError, match=words) as e:
        run(**{"max_steps": 4, **knobs})
    assert "\n" not in str(e.value) and sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ranks_come_from_torchrun(run, how):
    with pytest.raises(UserError, match=f"parallel={how} needs ranks: torchrun"):
        run(parallel=how)


def test_a_restarted_process_goes_on_with_its_own_run_alone(tiny, tmp_path, monkeypatch):
    """Not with the run of another torchrun, whose folder was given by mistake."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 1")
    config = tiny()
    folder = log.RunFolder(config.out_dir, machine.Machine("cpu", "float32"))
    folder.begin(False, False)
    assert folder.after_restart(config) == config  # the first process
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    anew = folder.after_restart(config)
    assert (anew.resume, anew.overwrite) == (False, True)  # there is no checkpoint yet
    Path(folder.last).write_bytes(b"")
    goes_on = folder.after_restart(tiny(overwrite=True))
    assert (goes_on.resume, goes_on.overwrite) == (True, False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 2")
    assert folder.after_restart(config) == config
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # of torchrun without --rdzv_id
    assert folder.after_restart(config) == config


# ---- torchrun


@pytest.fixture
def torchrun():
    """torchrun(ranks, [options, script], arguments) starts it, for this test alone."""
    started = []

    def start(n, script, arguments):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={n}",
        ]
        process = subprocess.Popen(
            [*command, *script, *arguments], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()  # it ends its ranks
            process.communicate()


def arguments(corpus, folder, **knobs):
    knobs = {**TINY, **SHORT, "threads": 1, "dataset": corpus, "out_dir": str(folder), **knobs}
    return [f"--{key}={value}" for key, value in knobs.items()]


BREAKS = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
import train
from nanotst.configurator import entry_point
from nanotst.machine import as_one

def breaks(step, c, multiplier=train.rate_multiplier):
    rank, restarts = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if (rank, restarts, step) == (1, 0, 1):  # before the first checkpoint
        os.kill(os.getpid(), signal.SIGKILL)
    if (rank, restarts, step) == (0, 1, 8):
        raise ZeroDivisionError("a bug of rank 0")
    return multiplier(step, c)

train.rate_multiplier = breaks
run(as_one(train.main), train.Config)
"""


def test_a_run_whose_ranks_are_killed_or_fail_goes_on_by_itself(torchrun, corpus, ranks, tmp_path):
    """torchrun --max-restarts: once from the beginning, once from a checkpoint, to the unbroken run's
    losses."""
    (tmp_path / "breaks.py").write_text(BREAKS)
    knobs = arguments(corpus, tmp_path / "run", parallel="fsdp", save_interval=3, **MOE)
    process = torchrun(2, ["--max-restarts=2", str(tmp_path / "breaks.py")], knobs)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert_same_losses(read_rows(tmp_path / "run"), read_rows(ranks / "moe short"))
    assert "going on from the beginning" in out and "last.pt" in out
    assert "ZeroDivisionError: a bug of rank 0" in out
    assert (
        out.count("error: another rank has ended or hangs") == 2
    )  # rank 0's, then rank 1's: no tracebacks
    assert out.count("Traceback") == 1


def test_sigterm_saves_before_torchrun_kills(torchrun, corpus, tmp_path):
    """All ranks agree on the step, without asking each other in every step."""
    knobs = arguments(
        corpus, tmp_path / "run", parallel="fsdp", max_steps=100_000, batch_size=1, **DENSE
    )
    process = torchrun(2, ["train.py"], knobs)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert (
        "stopped by SIGTERM after step" in out
        and 'Traceback (most recent call last):\n  File "train.py' not in out
    )
    saved = load_checkpoint(str(tmp_path / "run" / "last.pt"))
    assert saved["step"] == read_rows(tmp_path / "run")[-1]["step"] < 100_000


def test_an_error_that_all_ranks_meet_is_printed_once(torchrun, corpus, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("of another run")
    process = torchrun(2, ["train.py"], arguments(corpus, tmp_path / "run"))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.findall("^error: .*", out, re.M) == re.findall(
        "^error: .*run already holds.*", out, re.M
    )
    assert out.count("error: ") == 1 + out.count("error: <N/A>")  # torchrun's own
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "of another run"
