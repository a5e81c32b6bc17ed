"""checkpoint.py, sharded.py and files.py: what any number of ranks saves is loaded whole, or refused."""

import errno
import json
import math
import os
import pickle
import resource
import shutil
import threading
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import TINY, be_rank, free_port, read_rows, run_forks, write_corpus

import sample
import train
from model import GPT
from nanotst import UserError, checkpoint, files, sharded
from nanotst.checkpoint import find_checkpoint, load_checkpoint, model_config
from nanotst.machine import Machine, StopSignals
from tools import evaluate, export

# 50 tokens and 5 experts do not divide by the ranks
MOE = dict(n_embd=24, ff_dim=40, n_expert=5, top_k=2, balance_bias=True)
SHORT = dict(MOE, max_steps=12, total_batch=192, batch_size=0, eval_interval=6, eval_positions=176)
FROZEN = dict(learning_rate=1e-30, max_steps=2, superposition_ratio=0.5)
STOP = 7  # two steps after the switch
RUNS = {  # resumed: from what
    "fsdp 4": "fsdp 3",
    "auto 1": "fsdp 3",  # which is stopped two steps later
    "fsdp 2": "auto 1",
}


def work(me, folder, corpus, ports):
    """Train, as one of four ranks, "whole" and "fsdp 3", which stops, and resume as in RUNS."""
    for (name, port), stop in zip(ports.items(), (None, STOP, None, STOP + 2, None)):
        parallel, n = name.replace("whole", "auto 1").split()
        if not be_rank(me, int(n), port, parallel):
            continue
        if me == 0 and name in RUNS:
            shutil.copytree(f"{folder}/{RUNS[name]}", f"{folder}/{name}")
        StopSignals.stop = lambda self, step, stop=stop: step == stop
        knobs = TINY | SHORT | dict(dataset=corpus, out_dir=f"{folder}/{name}", parallel=parallel)
        groups = dict(shard_size=2) if n == "4" else {}  # two groups, which hold the same
        try:
            train.main(train.Config(**knobs, **groups, threads=1, resume=name in RUNS))
        except SystemExit:
            assert stop


@pytest.fixture(scope="module")
def ranks(corpus, tmp_path_factory):
    """The folder of these runs."""
    folder = tmp_path_factory.mktemp("ranks")
    ports = {name: free_port() for name in ("whole", "fsdp 3", *RUNS)}
    run_forks(work, 4, folder, corpus, ports)
    return folder


def parts_of(path):
    return sorted(Path(path).parent.glob(f"{Path(path).stem}.step_*/*"))


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_of_three_ranks_resumes_on_any_number(ranks, name):
    rows, wanted = read_rows(ranks / name), read_rows(ranks / "whole")
    assert len(rows) == (STOP + 2 if name == "auto 1" else 12)
    for row, other in zip(rows, wanted):
        for key in {"step", "loss", "val_loss", "grad_norm", "max_violation"} & row.keys():
            assert row[key] == pytest.approx(other[key], rel=1e-5), (row["step"], key)
    # and none of the parts that were there
    assert len(parts_of(ranks / name / "last.pt")) == {"fsdp 4": 4, "fsdp 2": 2}.get(name, 0)


def test_a_checkpoint_does_not_show_how_many_ranks_saved_it(ranks):
    """Names, shapes and dtypes are those of the plain model; values agree to rounding."""
    mine, plain = (load_checkpoint(f"{ranks}/{name}/last.pt") for name in ("fsdp 4", "whole"))
    shape = model_config(plain["config"], plain["meta"])
    assert mine["model"].keys() == plain["model"].keys() == GPT(shape).state_dict().keys()
    torch.testing.assert_close(mine["model"], plain["model"], rtol=1e-3, atol=1e-5)
    states = [x["optimizer"][0]["state"] for x in (mine, plain)]
    torch.testing.assert_close(*states, rtol=2e-2, atol=1e-5)
    assert mine["stream"] == plain["stream"] and mine["step"] == plain["step"]
    torch.testing.assert_close(mine["shares"], plain["shares"])
    assert torch.equal(mine["rng"], plain["rng"])


def test_a_missing_or_damaged_part_is_refused(ranks, tmp_path):
    run = shutil.copytree(ranks / "fsdp 3", tmp_path / "run")
    path, files = str(run / "last.pt"), parts_of(run / "last.pt")
    assert len(files) == 3
    for file in files:
        whole = file.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :]
        file.unlink()
        with pytest.raises(UserError, match=f"there is no checkpoint .*{file.name}"):
            load_checkpoint(path)
        for damaged in (flipped, whole[:-5]):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=f"{file.name} is not a checkpoint, or is damaged"):
                load_checkpoint(path)
        torch.save({}, file)  # readable, but without its parts
        with pytest.raises(UserError, match="last.pt is damaged: a part of .* is missing"):
            load_checkpoint(path)
        file.write_bytes(whole)
    shutil.copytree(file.parent, run / "last.step_9.0")  # left by a killed run
    assert load_checkpoint(path)["step"] == STOP


@pytest.fixture
def one_rank(monkeypatch):
    """This process is the only rank of a sharded run -> a Machine."""
    env = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    for key, value in (env | {"MASTER_PORT": free_port()}).items():
        monkeypatch.setenv(key, value)
    yield Machine.start(train.Config(**TINY, parallel="fsdp", threads=1))
    if dist.is_initialized():
        dist.destroy_process_group()


def state_at(step):
    w = torch.full((6, 2), float(step))
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    sharded_w = dist.tensor.distribute_tensor(w, mesh, [dist.tensor.Shard(0)])
    return {"model": {"w": sharded_w, "b": w[0]}, "config": {}, "meta": {}, "step": step}


def value_in(path):
    saved = load_checkpoint(str(path))
    assert set(saved["model"]["w"].flatten().tolist()) == {float(saved["step"])}
    return saved["step"]


def test_a_sharded_checkpoint_is_a_copy_of_its_step(one_rank, tmp_path, monkeypatch):
    """A thread writes it while training changes the weights."""
    saver, state, path = checkpoint.Saver(one_rank), state_at(4), str(tmp_path / "last.pt")
    trained, write = threading.Event(), sharded.write_parts
    later = lambda *args: (trained.wait(60), write(*args))
    monkeypatch.setattr(sharded, "write_parts", later)
    saver.save(path, state)
    state["model"]["w"].to_local().zero_()
    state["model"]["b"].zero_()
    trained.set()
    saver.wait()
    assert value_in(path) == 4 and load_checkpoint(path)["model"]["b"].tolist() == [4.0, 4.0]


@pytest.mark.parametrize("broken", ["rank_0.pt", "last.pt"])
def test_the_old_checkpoint_stays_until_the_new_one_is_complete(
    one_rank, tmp_path, monkeypatch, broken
):
    """The disk is full in the second save, while a part or the last file is written."""
    saver, path, save = checkpoint.Saver(one_rank), str(tmp_path / "last.pt"), torch.save
    saver.save(path, state_at(1))
    saver.wait()

    def fill(state, file):
        if os.path.basename(file.name) == f"{broken}.tmp":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill)
        saver.save(path, state_at(2))
        with pytest.raises(UserError, match="No space left on device"):
            saver.wait()
    assert value_in(path) == 1
    spoiled = state_at(3)
    spoiled["model"]["w"].to_local()[0, 0] = float("nan")
    for lost in (spoiled, state_at(3) | {"shares": torch.full((2, 4), math.nan)}):
        with pytest.raises(UserError, match="after step 3 are not finite"):
            saver.save(path, lost)
    assert value_in(path) == 1
    saver.save(path, state_at(4))
    saver.wait()
    assert value_in(path) == 4 and len(parts_of(path)) == 1


def test_a_sharded_run_resumes_bit_for_bit_and_gives_initial_weights(
    run, one_rank, tmp_path, monkeypatch
):
    def fsdp(**knobs):
        if dist.is_initialized():
            dist.destroy_process_group()
        monkeypatch.setenv("MASTER_PORT", free_port())
        return run(parallel="fsdp", threads=1, **MOE, **knobs)

    unbroken = fsdp(out_dir=str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(StopSignals, "stop", lambda self, step: step == 5)
        fsdp()
    for row, other in zip(fsdp(resume=True), unbroken, strict=True):
        assert all(row[key] == other[key] for key in ("step", "loss", "grad_norm", "max_violation"))
    # sharded from sharded, plain from sharded, sharded from plain
    fsdp(init_from=str(tmp_path / "run"), out_dir=str(tmp_path / "b"), **FROZEN)
    with monkeypatch.context() as patch:
        patch.delenv("RANK"), patch.delenv("WORLD_SIZE")
        run(init_from=f"{tmp_path}/b/last.pt", out_dir=str(tmp_path / "c"), **MOE, **FROZEN)
    fsdp(init_from=f"{tmp_path}/c/last.pt", out_dir=str(tmp_path / "d"), **FROZEN)
    models = [load_checkpoint(f"{tmp_path}/{path}")["model"] for path in ("run", "d/last.pt")]
    assert all(torch.equal(t, models[1][key]) for key, t in models[0].items() if "bias" not in key)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """The folder of a run of 4 steps."""
    folder = str(tmp_path_factory.mktemp("trained") / "run")
    train.main(train.Config(**{**TINY, "max_steps": 4, "dataset": corpus, "out_dir": folder}))
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it where `run` writes."""
    return shutil.copytree(trained, tmp_path / "run")


def change(folder, **values):
    torch.save(torch.load(folder / "last.pt", weights_only=True) | values, folder / "last.pt")


def test_the_folder_of_a_run_stands_for_its_checkpoint(folder, capsys):
    assert find_checkpoint(str(folder / "last.pt")) == str(folder / "last.pt")
    assert find_checkpoint(str(folder)) == str(folder / "best.pt")
    assert capsys.readouterr().err == f"using {folder / 'best.pt'}\n"
    (folder / "best.pt").unlink()
    sample.load_model(str(folder))
    assert capsys.readouterr().err == f"using {folder / 'last.pt'}\n"
    (folder / "last.pt").unlink()
    with pytest.raises(UserError, match="run holds neither best.pt nor last.pt$"):
        load_checkpoint(str(folder))
    with pytest.raises(UserError, match="there is no checkpoint .*last.pt"):
        load_checkpoint(str(folder / "last.pt"))


@pytest.mark.parametrize(
    "change_to, words",
    [
        ({"rng": torch.zeros(3)}, "cannot be resumed"), ({"optimizer": [{}]}, "cannot be resumed"),
        ({"optimizer": []}, "another optimizer"),
        ({"model": {}}, "does not fit this model"), ({"config": []}, "not a checkpoint of this repository"),
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_resumed_is_one_line(run, folder, change_to, words):
    change(folder, **change_to)
    with pytest.raises(UserError, match=f"last.pt.*{words}") as e:
        run(resume=True, max_steps=4)
    assert "\n" not in str(e.value)


def test_every_flipped_bit_in_a_tensor_is_found(folder):
    path, rng = folder / "last.pt", np.random.default_rng(0)
    whole, weight = path.read_bytes(), load_checkpoint(str(path))["model"]["embed.weight"]
    start = whole.index(weight.numpy().tobytes())
    for at in start + rng.integers(0, weight.nbytes, 10):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="last.pt is .*damaged: .*checksum"):
            load_checkpoint(str(path))


def test_a_checkpoint_from_before_november_2026_resumes(run, folder):
    """The router's z-loss had another name."""
    config = torch.load(folder / "last.pt", weights_only=True)["config"]
    config["z_coef"] = config.pop("router_z_coef") + 0.5
    change(folder, config=config)
    with pytest.raises(UserError, match="router_z_coef 0.5 -> 0.0"):
        run(resume=True, max_steps=4)
    assert run(resume=True, max_steps=4, router_z_coef=0.5)[-1]["step"] == 4


def test_initial_weights_are_only_of_the_same_vocabulary_and_model(run, folder, tmp_path):
    """Vocabularies of one size, too, and settings that no shape shows."""
    first, other = load_checkpoint(str(folder)), str(folder / "last.pt")
    run(init_from=other, out_dir=str(tmp_path / "b"), **FROZEN)
    second = load_checkpoint(str(tmp_path / "b"))["model"]
    assert all(torch.equal(t, second[name]) for name, t in first["model"].items())
    for knobs, words in [
        (dict(rope_theta=5e5), "settings differ, rope_theta 10000.0 -> 500000.0"),
        (dict(norm_eps=1e-3), "norm_eps"),
        (dict(n_head=4, n_kv_head=2), "n_head 2 -> 4"),
        (dict(n_embd=32), "does not fit this model"),
    ]:
        with pytest.raises(UserError, match=words):
            run(init_from=other, out_dir=str(tmp_path / "c"), **knobs)
    text = write_corpus(tmp_path / "text", np.arange(6000) % 50, range(50), 50)
    with pytest.raises(UserError, match="name no encoding"):
        run(init_from=other, out_dir=str(tmp_path / "c"), dataset=text)
    meta = json.loads(Path(text, "meta.json").read_text()) | {"encoding": "gpt2"}
    Path(text, "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="another vocabulary than .*last.pt"):
        run(init_from=other, out_dir=str(tmp_path / "c"), dataset=text)


def test_a_folder_whose_name_is_not_utf_8(run, corpus, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    data, out_dir = str(shutil.copytree(corpus, f"{folder}/data")), f"{folder}/run"
    rows = run(dataset=data, out_dir=out_dir, max_steps=4)
    assert run(dataset=data, out_dir=out_dir, max_steps=4, resume=True) == rows
    assert load_checkpoint(out_dir)["step"] == 4


class Code:
    def __reduce__(self):
        return os.mkdir, ("code was run",)


@pytest.mark.parametrize("kind", ["last.pt", "no zip file", "a part", "an older version's folder"])
def test_no_checkpoint_can_run_code(run, ranks, tmp_path, monkeypatch, kind):
    """In no command that reads one: each ends in one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "import_transformers", Mock())  # takes seconds
    folder = shutil.copytree(ranks / "fsdp 3", tmp_path / "run")
    path = str(folder / "last.pt")
    if kind == "last.pt":
        torch.save(torch.load(path, weights_only=True) | {"shares": Code()}, path)
    elif kind == "no zip file":
        Path(path).write_bytes(pickle.dumps({"model": Code()}))
    elif kind == "a part":
        torch.save({"model.head.weight": (0, Code())}, parts_of(path)[2])
    else:
        shutil.rmtree(folder)
        path = str(folder / "last.dcp")
        os.makedirs(path)
        Path(path, ".metadata").write_bytes(pickle.dumps(Code()))
    for use in (
        lambda: sample.main(sample.Config(path, device="cpu")),
        lambda: export.main(export.Config(path, "hf")),
        lambda: evaluate.main(evaluate.Config([path], device="cpu")),
        lambda: run(init_from=path, out_dir=str(tmp_path / "other"), **SHORT),
        lambda: run(resume=True, **SHORT),
    ):
        with pytest.raises(UserError, match="damaged|neither|there is no checkpoint") as e:
            use()
        assert "\n" not in str(e.value)
    assert not os.path.exists("code was run") and not os.path.exists("hf")


def test_a_file_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(("sync", os.fstat(fd).st_ino)))
    renamed = lambda a, b: done.append(("name", os.stat(a).st_ino)) or os.rename(a, b)
    monkeypatch.setattr(os, "replace", renamed)
    files.write_safely(str(tmp_path / "x"), lambda file: file.write(b"text"))
    inode, folder = os.stat(tmp_path / "x").st_ino, os.stat(tmp_path).st_ino
    assert done == [("sync", inode), ("name", inode), ("sync", folder)]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """torch.save hides the system's error in one of its own."""

    def fail(file):
        raise RuntimeError("connection closed by peer")

    path, limit = tmp_path / "last.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text("old")
    full = "cannot write .*last.pt: File too large; the old one is untouched$"
    with pytest.raises(UserError, match=full):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        try:
            files.write_safely(path, lambda file: torch.save({"x": torch.zeros(9999)}, file))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with pytest.raises(UserError, match="connection closed by peer; the old one is"):
        files.write_safely(str(path), fail)
    assert os.listdir(tmp_path) == ["last.pt"] and path.read_text() == "old"
