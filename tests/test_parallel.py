"""Many ranks: DDP and FSDP2 train as one process does, checkpoints of any number of ranks, ranks that fail.

What takes several processes is run once, by four of them that do one training run after the other (`ranks`),
or by torchrun; the rest by one rank in this process.
"""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import ROOT, TINY, read_rows
from test_train import column, free_port
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

import sample
import train
from model import GPT, BagEmbedding, GPTConfig, Head, Linear, Router
from nanotst import UserError, checkpoint, log, machine, parallel, sharded
from nanotst.checkpoint import load_checkpoint
from tools import export

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
GOES_ON = [  # (kind, parallel and ranks before step 7, those after it)
    *(("moe", "fsdp 4", after) for after in ("fsdp 1", "fsdp 2", "fsdp 3", "ddp 2", "none 1")),
    ("dense", "fsdp 2", "fsdp 4"),
    ("dense", "none 1", "fsdp 4"),
]
STOP = 7  # two steps after the switch

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
    """A folder with all runs of SAME and GOES_ON, by name, and those they are compared with."""
    folder, jobs = tmp_path_factory.mktemp("ranks"), []
    for kind, knobs in KINDS.items():
        jobs.append(job(corpus, folder, f"{kind} long", 1, **LONG, **knobs))
        jobs.append(job(corpus, folder, f"{kind} short", 1, **SHORT, **knobs))
    for kind, n, knobs in SAME:
        jobs.append(job(corpus, folder, name_of(kind, n, knobs), n, **LONG | knobs, **KINDS[kind]))
    for kind, before in dict.fromkeys((kind, before) for kind, before, _ in GOES_ON):
        how, n = before.replace("none", "auto").split()
        knobs = {**SHORT, **KINDS[kind], "parallel": how}
        jobs.append(job(corpus, folder, f"{kind} {before}", int(n), STOP, **knobs))
    for kind, before, after in GOES_ON:
        how, n = after.replace("none", "auto").split()
        knobs = {**SHORT, **KINDS[kind], "parallel": how, "resume": True}
        jobs.append(
            job(
                corpus, folder, f"{kind} {before} {after}", int(n), copy=f"{kind} {before}", **knobs
            )
        )
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


@pytest.mark.parametrize(
    "kind, before, after", GOES_ON, ids=[" to ".join(case[1:]) for case in GOES_ON]
)
def test_any_number_of_ranks_goes_on_from_a_checkpoint(ranks, kind, before, after):
    """Sharded or not, from sharded or not: with the text, the moments and the shares of experts where they
    were."""
    there = ranks / f"{kind} {before} {after}"
    assert_same_losses(read_rows(there), read_rows(ranks / f"{kind} short"))
    assert len(read_rows(ranks / f"{kind} {before}")) == STOP
    form = "last.dcp" if after.startswith("fsdp") else "last.pt"  # one form alone, the new one
    assert [name for name in ("last.pt", "last.dcp") if (there / name).exists()] == [form]


def test_every_checkpoint_is_the_same_dict(ranks):
    """Of a run on four ranks, as one process reads it, and of the same run in one process."""
    mine, plain = (
        load_checkpoint(f"{ranks}/moe fsdp 4/last.dcp"),
        load_checkpoint(f"{ranks}/moe short/last.pt"),
    )
    assert (
        mine["step"] == STOP and mine.keys() == plain.keys() and mine["stream"] == plain["stream"]
    )
    shapes = [
        [getattr(x, "shape", None) for x in tree_leaves(saved["optimizer"])]
        for saved in (mine, plain)
    ]
    assert shapes[0] == shapes[1]
    later = load_checkpoint(f"{ranks}/moe fsdp 4 fsdp 3/last.dcp")
    for name, t in plain["model"].items():
        torch.testing.assert_close(later["model"][name], t, rtol=1e-3, atol=1e-5)


def test_sample_and_export_read_a_sharded_checkpoint(ranks, tmp_path, capsys):
    path = shutil.copytree(f"{ranks}/dense fsdp 2/last.dcp", tmp_path / "last.dcp")
    state = torch.load(next(path.glob("step_*/state.pt")), weights_only=True)
    state["meta"]["encoding"] = "bytes"  # the tiny corpus has no vocabulary
    torch.save(state, next(path.glob("step_*/state.pt")))
    sign(path)
    sample.main(sample.Config(checkpoint=str(path), prompt="\n", n_tokens=5, device="cpu"))
    assert capsys.readouterr().out.startswith("\n")
    export.main(export.Config(str(path), str(tmp_path / "hf")))
    assert (tmp_path / "hf" / "model.safetensors").exists()


def sign(path):
    """Bring the manifest up to date with changed files."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: sharded.sha256_of(path / name) for name in manifest["files"]}
    (path / "manifest.json").write_text(json.dumps(manifest))


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
    saved = load_checkpoint(str(tmp_path / "run" / "last.dcp"))
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


def test_an_interrupted_sharded_run_goes_on_bit_for_bit(fsdp, tmp_path, monkeypatch):
    unbroken = fsdp(out_dir=str(tmp_path / "whole"), **MOE)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(machine.StopSignals, "stop", lambda self, step: step == 5)
        fsdp(**MOE)
    keys = "step", "loss", "val_loss", "grad_norm", "lr", "data_tokens", "max_violation"
    assert column(fsdp(resume=True, **MOE), *keys) == column(unbroken, *keys)


def test_what_begins_anew_at_the_switch_is_the_same_sharded(fsdp, run, tmp_path, monkeypatch):
    anew = dict(reinit_at_switch="embedding,head,optimizer", **DENSE)
    rows = fsdp(**anew)
    monkeypatch.delenv("RANK")
    plain = run(out_dir=str(tmp_path / "plain"), **anew)
    assert_same_losses(rows, plain)
    assert rows[-1]["loss"] != pytest.approx(
        run(out_dir=str(tmp_path / "x"), **DENSE)[-1]["loss"], rel=1e-3
    )


def test_a_checkpoint_is_a_copy_of_its_moment(fsdp, tmp_path, monkeypatch):
    """A thread writes it, slowly, while training goes on and changes the weights."""
    write = checkpoint.write_folder

    def slowly(path, state, *args):
        if path.endswith("last.dcp") and state["step"] == 4:
            time.sleep(1)
        write(path, state, *args)
        if path.endswith("last.dcp") and state["step"] == 4:
            shutil.copytree(path, tmp_path / "copy.dcp")

    monkeypatch.setattr(checkpoint, "write_folder", slowly)
    fsdp(save_interval=4, eval_interval=100)
    monkeypatch.undo()
    for key, value in dict(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1"
    ).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        patch.setattr(machine.StopSignals, "stop", lambda self, step: step == 4)
        fsdp(out_dir=str(tmp_path / "stopped"), eval_interval=100)
    a, b = (load_checkpoint(str(tmp_path / name)) for name in ("copy.dcp", "stopped/last.dcp"))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


@pytest.mark.parametrize("where", ["a part", "the manifest"])
def test_the_last_good_checkpoint_stays_until_the_new_one_is_whole(
    fsdp, tmp_path, monkeypatch, where
):
    """The disk fills up in the second save."""
    import errno

    full, saves = OSError(errno.ENOSPC, "No space left on device"), []
    module, name = (
        (dcp.FileSystemWriter, "write_data") if where == "a part" else (sharded, "write_safely")
    )
    real = getattr(module, name)

    def fill(*args, **kwargs):
        saves.append(1)
        if len(saves) > 1:
            raise full
        return real(*args, **kwargs)

    unbroken = fsdp(out_dir=str(tmp_path / "whole"))
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="last.dcp.*disk is full.*untouched"),
    ):
        patch.setattr(module, name, fill)
        fsdp(save_interval=3, eval_interval=100)
    assert load_checkpoint(str(tmp_path / "run" / "last.dcp"))["step"] == 3
    assert fsdp(resume=True)[-1]["loss"] == unbroken[-1]["loss"]
    assert len(os.listdir(tmp_path / "run" / "last.dcp")) == 2  # the manifest, and what it names


def test_weights_that_are_not_finite_never_replace_a_sharded_checkpoint(
    fsdp, tmp_path, monkeypatch
):
    step = torch.optim.AdamW.step

    def spoil(self, *args):
        step(self, *args)
        p = self.param_groups[0]["params"][0]
        if self.state[p]["step"] == 6:
            p.detach().to_local()[0, 0] = float("nan")

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(UserError, match="not finite"):
        fsdp(save_interval=1)
    assert all(
        t.isfinite().all()
        for t in load_checkpoint(str(tmp_path / "run/last.dcp"))["model"].values()
    )


@pytest.fixture
def folder(fsdp, tmp_path):
    fsdp(max_steps=4)
    return tmp_path / "run" / "last.dcp"


def test_every_flipped_bit_in_a_sharded_checkpoint_is_found(fsdp, folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {Path(name).name for name in manifest["files"]} == {
        ".metadata",
        "state.pt",
        "__0_0.distcp",
    }
    for file in (folder / name for name in manifest["files"]):
        whole = file.read_bytes()
        for damaged in (
            bytes([whole[0] ^ 1]) + whole[1:],
            whole[:-1] + bytes([whole[-1] ^ 128]),
            whole[:-5],
        ):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=f"last.dcp is damaged: .*{re.escape(file.name)}"):
                load_checkpoint(str(folder))
        with pytest.raises(UserError, match="last.dcp is damaged"):
            fsdp(max_steps=4, resume=True)
        file.unlink()
        with pytest.raises(UserError, match="last.dcp is damaged"):
            load_checkpoint(str(folder))
        file.write_bytes(whole)
    load_checkpoint(str(folder))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"files": {}}', '{"files": {"../x/y": "0"}}', '{"files": {"a/b": 1}}']
)
def test_a_damaged_manifest_is_one_line(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="last.dcp is damaged: its manifest.json") as e:
        load_checkpoint(str(folder))
    assert "\n" not in str(e.value)


def test_a_folder_without_a_manifest_is_no_checkpoint(fsdp, folder):
    """A rank was killed in the first save: the run starts anew, over what was left."""
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="there is no checkpoint .*last.dcp"):
        load_checkpoint(str(folder))
    with pytest.raises(UserError, match="no last.dcp to go on from"):
        fsdp(max_steps=4)
    fsdp(max_steps=4, overwrite=True)
    assert load_checkpoint(str(folder))["step"] == 4 and len(os.listdir(folder)) == 2


def test_a_sharded_checkpoint_cannot_run_code(folder, tmp_path):
    """DCP would unpickle its .metadata."""

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was run"),)

    metadata = next(folder.glob("step_*/.metadata"))
    for code in (Code(), pickle.loads(metadata.read_bytes())):
        if not isinstance(code, Code):
            code.planner_data = Code()
        metadata.write_bytes(pickle.dumps(code))
        sign(folder)
        with pytest.raises(UserError, match="last.dcp is not a checkpoint"):
            load_checkpoint(str(folder))
    assert not (tmp_path / "was run").exists()


def test_of_two_forms_the_later_step_counts(fsdp, run, folder, tmp_path, monkeypatch):
    """A run that is sharded now was killed before it could remove what it was saved as before."""
    with monkeypatch.context() as patch:
        patch.delenv("RANK")
        run(max_steps=6, out_dir=str(tmp_path / "other"))
    shutil.copy(tmp_path / "other" / "last.pt", folder.parent)
    assert checkpoint.newest(str(folder)) == str(folder.parent / "last.pt")
    (tmp_path / "other" / "last.pt").unlink()
    assert checkpoint.newest(str(tmp_path / "other" / "last.dcp")) is None


def test_initial_weights_from_either_form(fsdp, run, folder, tmp_path, monkeypatch):
    wanted = load_checkpoint(str(folder))["model"]
    frozen = dict(learning_rate=1e-30, max_steps=2, superposition_ratio=0.5)
    fsdp(init_from=str(folder), out_dir=str(tmp_path / "sharded"), **frozen)
    with monkeypatch.context() as patch:
        patch.delenv("RANK")
        run(init_from=str(folder), out_dir=str(tmp_path / "plain"), **frozen)
    fsdp(init_from=str(tmp_path / "plain" / "last.pt"), out_dir=str(tmp_path / "again"), **frozen)
    export.main(export.Config(str(folder), str(tmp_path / "hf")))
    fsdp(init_from=f"hf:{tmp_path}/hf", out_dir=str(tmp_path / "hugging"), **frozen)
    hugging = load_checkpoint(f"{tmp_path}/hugging/last.dcp")["model"]
    assert all(
        torch.equal(hugging[name][:50], t[:50]) for name, t in wanted.items()
    )  # without the padding
    for path in ("sharded/last.dcp", "plain/last.pt", "again/last.dcp"):
        got = load_checkpoint(str(tmp_path / path))["model"]
        assert all(torch.equal(got[name], wanted[name]) for name in wanted), path


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(parallel="fsdp", optimizer="muon"), "optimizer=muon works on whole matrices"),
        (dict(parallel="fsdp", shard_size=2), "shard_size 2 .* divide 1 ranks"),
        (dict(parallel="ddp", shard_size=1), "shard_size 1 is for parallel=fsdp"),
        (dict(shard_size=-1), "shard_size"),
        (
            dict(parallel="fsdp", n_embd=32, resume=True, allow_changes=True),
            "last.dcp does not fit this model",
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
    assert "going on from the beginning" in out and "last.dcp" in out
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
    saved = load_checkpoint(str(tmp_path / "run" / "last.dcp"))
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
