"""Many ranks: DDP and FSDP2 train as one process does, and a run resumes on any number of ranks.

What takes several processes is done once, by four of them that train one job after another (`ranks`), and
once by torchrun; the rest by one rank in this process.
"""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, be_rank, free_port, read_rows, run_forks
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor

import train
from model import GPT, Attention, Head, Router
from nanotst import UserError, checkpoint, cpu, kernels, machine, parallel
from nanotst.checkpoint import load_checkpoint
from nanotst.configurator import entry_point

# Nothing divides by the ranks: width 26, 3 heads of 6, 50 tokens, 5 experts (one rank of four has none)
DENSE = dict(n_embd=26, n_head=3, head_dim=6, ff_dim=42, qk_norm=True, checkpoint_activations=True)
MOE = dict(n_embd=24, ff_dim=40, n_expert=5, top_k=2, balance_bias=True, balance_rate=0.01)
TIED = dict(n_embd=26, n_head=3, head_dim=6, tie_embeddings=True, document_bags=False)
KINDS = {"dense": DENSE, "moe": MOE | dict(balance_coef=0.1), "tied": TIED}
# 12 rows in each step, 11 of validation; 3 of 8 steps on bags
SHORT = dict(max_steps=8, total_batch=192, batch_size=0, warmup_steps=3, eval_interval=4)
SHORT |= dict(eval_positions=176, threads=1, parallel="auto")
SAME = [  # (kind, ranks, knobs)
    ("dense", 4, dict(parallel="fsdp", batch_size=1)),
    ("moe", 4, dict(parallel="ddp", batch_size=1)),
    ("moe", 4, dict(parallel="fsdp", shard_size=2, batch_size=3)),
    ("tied", 2, dict(parallel="fsdp", batch_size=2)),
]


def work(me, jobs):
    """Train, as one of four ranks, the jobs that have so many."""
    multiplier, attention = train.rate_multiplier, Attention.__init__

    def signalled(step, c):
        if (me, step) == (1, 3):  # as a node's scheduler may signal one rank alone
            signal.raise_signal(signal.SIGTERM)
        return multiplier(step, c)

    def with_gate(self, config):  # a fork's own parameter
        attention(self, config)
        self.gate = torch.nn.Parameter(torch.zeros(1))
        self.init = {"gate": 0.5}

    for job in jobs:
        if be_rank(me, job["ranks"], job["port"], job["knobs"]["parallel"]):
            train.rate_multiplier = signalled if job["signal"] else multiplier
            Attention.__init__ = with_gate if job["fork"] else attention
            try:
                train.main(train.Config(**job["knobs"]))
            except SystemExit:
                assert job["signal"]


@pytest.fixture(scope="module")
def ranks(corpus, tmp_path_factory):
    """A folder with all runs of SAME, by name, and those they are compared with."""
    folder, jobs = tmp_path_factory.mktemp("ranks"), []

    def add(name, n, signal=False, fork=False, **knobs):
        knobs = TINY | SHORT | dict(dataset=corpus, out_dir=f"{folder}/{name}") | knobs
        jobs.append(dict(ranks=n, signal=signal, fork=fork, port=free_port(), knobs=knobs))

    for kind, knobs in KINDS.items():
        add(kind, 1, **knobs)
    for kind, n, knobs in SAME:
        add(name_of(kind, n, knobs), n, **KINDS[kind] | knobs)
    add("sigterm", 2, signal=True, parallel="fsdp", max_steps=100_000, superposition_ratio=0.01)
    once = dict(max_steps=1, superposition_ratio=0.0, learning_rate=1e-30)
    add("fork", 2, fork=True, parallel="fsdp", **once)
    run_forks(work, 4, jobs)
    return folder


def name_of(kind, n, knobs):
    return " ".join([kind, str(n), *(f"{key}={value}" for key, value in knobs.items())])


def assert_same_losses(rows, wanted):
    """And norms of the gradients before clipping, in which a wrong factor would show; each to 1e-5."""
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    keys = {"loss", "val_loss", "grad_norm", "max_violation", "router_entropy"}
    for row, other in zip(rows, wanted):
        assert row.keys() == other.keys()
        for key in keys & row.keys():
            assert row[key] == pytest.approx(other[key], rel=1e-5), (row["step"], key)


@pytest.mark.parametrize("kind, n, knobs", SAME, ids=[name_of(*case) for case in SAME])
def test_ranks_train_as_one_process_does(ranks, kind, n, knobs):
    """Across the switch, in float32, from the same initial weights."""
    wanted = read_rows(ranks / kind)
    assert len({row["phase"] for row in wanted}) == 2 and min(r["grad_norm"] for r in wanted) > 0
    assert_same_losses(read_rows(ranks / name_of(kind, n, knobs)), wanted)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(ranks):
    saved = load_checkpoint(f"{ranks}/sigterm/last.pt")
    assert saved["step"] == read_rows(ranks / "sigterm")[-1]["step"] < 100_000


def test_a_forks_own_initial_value_is_there_on_every_rank(ranks):
    """Sharded models are built on the meta device, where a constructor's values are lost."""
    saved = load_checkpoint(f"{ranks}/fork/last.pt")["model"]
    assert saved["blocks.0.attn.gate"].tolist() == pytest.approx([0.5])


# ---- one rank in this process


@pytest.fixture
def a_rank(monkeypatch):
    """This process is the only rank of a run."""
    env = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("MASTER_PORT", free_port())
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def fsdp(run, a_rank, monkeypatch):
    def start(**knobs):
        rows = run(parallel="fsdp", threads=1, **knobs)
        for key in ("RANK", "WORLD_SIZE"):  # the next run is alone
            monkeypatch.delenv(key)
        return rows

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
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers()))  # rotary tables
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert (model.head.weight is model.embed.weight) == config.tie_embeddings


def test_bfloat16_is_where_the_unsharded_run_has_it(fsdp, run, tmp_path, monkeypatch):
    """Routers and the embedding compute from float32 weights, the others from bfloat16; losses are as close
    as that, and master weights, moments and norms of gradients are float32. Twins are used."""
    seen = {}
    for cls in (Router, cpu.BagEmbeddingOnCPU, cpu.LinearOnCPU, Head):

        def watch(self, *args, forward=cls.forward, name=cls.__name__):
            seen.setdefault(name, set()).add((self.weight.dtype, isinstance(self.weight, DTensor)))
            return forward(self, *args)

        monkeypatch.setattr(cls, "forward", watch)
    monkeypatch.setattr(kernels, "agree", lambda *args: True)  # or the trial would be seen
    rows = fsdp(dtype="bfloat16", **MOE)
    assert seen["Router"] == seen["BagEmbeddingOnCPU"] == {(torch.float32, False)}
    assert seen["LinearOnCPU"] == seen["Head"] == {(torch.bfloat16, False)}
    saved = load_checkpoint(str(tmp_path / "run" / "last.pt"))
    moments = [t for kept in saved["optimizer"][0]["state"].values() for t in kept.values()]
    assert {t.dtype for t in [*saved["model"].values(), *moments]} == {torch.float32}
    plain = run(dtype="bfloat16", out_dir=str(tmp_path / "plain"), **MOE)
    for key, bound in (("loss", 2e-3), ("grad_norm", 2e-2)):
        assert [r[key] for r in rows] == pytest.approx([r[key] for r in plain], rel=bound)


def test_units_are_compiled_one_by_one_before_the_first_step(fsdp, monkeypatch):
    """Embedding and head have a graph for bags, tokens and evaluation; the blocks share one, but for
    evaluation."""
    counter, seen = CompileCounterWithBackend("eager"), []
    compile_, multiplier = torch.compile, train.rate_multiplier
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile_(f, backend=counter, **how))
    count = lambda *args: seen.append(counter.frame_count) or multiplier(*args)
    monkeypatch.setattr(train, "rate_multiplier", count)
    torch.compiler.reset()
    fsdp(compile="on", n_layer=3)
    assert seen + [counter.frame_count] == [seen[0]] * 11 and 6 <= seen[0] <= 8


def test_what_is_reinitialised_at_the_switch_is_the_same_sharded(fsdp, run, tmp_path, monkeypatch):
    again = dict(reinit_at_switch="embedding,head,optimizer", **DENSE)
    rows = fsdp(**again)
    assert_same_losses(rows, run(out_dir=str(tmp_path / "plain"), **again))
    other = run(out_dir=str(tmp_path / "other"), **DENSE)
    assert rows[-1]["loss"] != pytest.approx(other[-1]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    "words, knobs",
    [
        ("optimizer=muon needs whole matrices", dict(parallel="fsdp", optimizer="muon")),
        ("shard_size 2 .* must divide 1", dict(parallel="fsdp", shard_size=2)),
        ("shard_size 1 needs parallel=fsdp", dict(parallel="ddp", shard_size=1)),
        ("compile=graphs is for one GPU, without torchrun", dict(compile="graphs")),
    ],
)
def test_what_cannot_work_is_one_line(run, a_rank, knobs, words):
    with pytest.raises(UserError, match=words) as e:
        run(**knobs)
    assert "\n" not in str(e.value)


def test_ranks_come_from_torchrun(run):
    with pytest.raises(UserError, match="parallel=fsdp needs ranks: torchrun"):
        run(parallel="fsdp")


# ---- torchrun


def breaks(step, c, multiplier=train.rate_multiplier):
    rank, restarts = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if (rank, restarts, step) == (1, 0, 5):
        Path(c.out_dir, "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return multiplier(step, c)


def a_worker(argv):
    train.rate_multiplier, sys.argv = breaks, argv
    entry_point(train.main, train.Config)


def torchrun(me, argv):
    """As torchrun --standalone --nproc_per_node=2 --max-restarts=1 does it, with forks as its workers."""
    how = dict(
        min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0"
    )
    how |= dict(run_id="tested", max_restarts=1, monitor_interval=0.1, start_method="fork")
    elastic_launch(LaunchConfig(**how), a_worker)(argv)


def test_a_run_with_a_killed_rank_resumes_by_itself(corpus, ranks, tmp_path):
    """torchrun --max-restarts: from its last checkpoint, to the losses of one process without a break."""
    knobs = TINY | SHORT | KINDS["moe"] | dict(dataset=corpus, out_dir=tmp_path / "run")
    knobs |= dict(parallel="fsdp", save_interval=3, checkpoint_activations=True)
    run_forks(torchrun, 1, ["train.py", *(f"--{key}={value}" for key, value in knobs.items())])
    assert (tmp_path / "run" / "killed").exists()
    assert_same_losses(read_rows(tmp_path / "run"), read_rows(ranks / "moe"))
