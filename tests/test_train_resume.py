"""The life of a run: stopped and resumed, its checkpoints, its folder, and what goes wrong on the way."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    LEARNED,
    MOE,
    SWITCH,
    column,
    command_line,
    load,
    read_rows,
    slow_clock,
    stopped_run,
)

import train
from nanotst import UserError, log, machine

# ---- stop and resume


@pytest.mark.parametrize("kind", [{}, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("after", [SWITCH - 1, SWITCH, SWITCH + 1])
def test_stopped_and_resumed_is_the_unbroken_run_bit_for_bit(run, tmp_path, after, kind):
    """At the switch and one step to either side."""
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    unbroken = run(out_dir=whole, **kind)
    stopped_run(run, after, out_dir=parts, **kind)
    assert load(parts)["step"] == len(read_rows(parts)) == after
    resumed = run(out_dir=parts, resume=True, **kind)
    assert column(resumed, *LEARNED) == column(unbroken, *LEARNED)
    a, b = load(whole)["model"], load(parts)["model"]
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_changing_the_training_on_resume_must_be_asked_for(run, tiny):
    run()
    changes = dict(max_steps=12, bag_size=2, superposition_ratio=0.5, bag_weights="power")
    for key, value in (changes | dict(learning_rate=0.02, seed=1)).items():
        with pytest.raises(UserError, match=f"{key} .* -> {value}.*--allow_changes"):
            run(resume=True, **{key: value})
    knobs = dict(max_steps=12, learning_rate=0.002, weight_decay=0.3, beta2=0.99)
    rows = run(resume=True, allow_changes=True, **knobs)
    assert rows[10]["step"] == 11 and rows[10]["lr"] == 0.002
    groups = load(tiny().out_dir)["optimizer"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(tuple(group["betas"]) == (0.9, 0.99) for group in groups)


def test_a_batch_that_changes_after_the_switch_does_not_repeat_it(run, monkeypatch):
    resets, knobs = [], dict(reinit_at_switch="embedding")
    monkeypatch.setattr(train, "reinitialise", lambda *args: resets.append(args))
    run(**knobs)
    rows = run(resume=True, allow_changes=True, total_batch=256, max_steps=12, **knobs)
    assert len(resets) == 1 and rows[-1]["phase"] == "recovery"
    assert rows[11]["positions"] == 10 * 128 + 2 * 256
    assert rows[11]["data_tokens"] - rows[9]["data_tokens"] == 2 * 256
    assert rows[11]["flops"] / rows[11]["positions"] == rows[0]["flops"] / 128


def test_fading_goes_on_in_a_new_epoch(run, monkeypatch):
    shares, lerp = [], torch.lerp
    stopped_run(run, 2, fade=1.0)
    monkeypatch.setattr(torch, "lerp", lambda a, b, w: shares.append(w) or lerp(a, b, w))
    run(resume=True, allow_changes=True, total_batch=256, fade=1.0)
    assert shares == [0.5, 0.25]  # of four steps on bags


# ---- checkpoints


def test_what_a_checkpoint_holds_is_taken_up(run, tiny):
    """The best loss and the seconds so far; initial weights are not read again."""
    run(max_steps=6, superposition_ratio=0.5)
    path, best = Path(tiny().out_dir, "last.pt"), Path(tiny().out_dir, "best.pt")
    torch.save(load(path.parent) | {"best_val": 0.0, "seconds": 1000.0}, path)
    best.unlink()
    knobs = dict(resume=True, allow_changes=True, max_steps=12, init_from="no/such/file")
    assert run(superposition_ratio=0.5, **knobs)[-1]["seconds"] > 1000
    assert train.knobs_of_run(tiny(resume=True))["init_from"] == "no/such/file"  # still known
    assert not best.exists() and load(path.parent)["best_val"] == 0.0


def test_checkpoints_come_by_step_and_by_time(run, monkeypatch):
    """By time at rows that are written anyway, the first within a minute, then every five minutes; none where
    save_interval is 0. Here a step takes 20 seconds."""
    saves, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda x, file: saves.append(x["step"]) or save(x, file))
    knobs = dict(eval_interval=100, superposition_ratio=0.0)
    run(save_interval=3, log_interval=4, **knobs)
    assert sorted({*saves}) == [3, 6, 9, 10]
    slow_clock(monkeypatch, 20.0)
    for save_interval, wanted in ((100, [4, 20, 25]), (0, [25])):
        saves.clear()
        knobs |= dict(save_interval=save_interval, overwrite=True, log_interval=2, max_steps=25)
        rows = run(**knobs)
        assert sorted({*saves}) == wanted
        assert [row["step"] for row in rows] == [1, *range(2, 25, 2), 25]


def test_ranks_agree_when_to_save_and_to_stop(monkeypatch):
    """Any rank's clock decides when to save, any rank's signal when to stop."""
    others = torch.tensor([0, 0])
    reduce = lambda answer, op, group: answer.copy_(torch.maximum(answer, others))
    monkeypatch.setattr(machine.dist, "all_reduce", reduce)
    monkeypatch.setattr(machine.dist, "new_group", lambda backend: backend)
    signals = machine.StopSignals(machine.Machine("cpu", "float32", distributed=True))
    for said in ([0, 0], [0, 1], [1, 0]):
        others[:] = torch.tensor(said)
        assert [signals.stop(7), signals.save_due] == said
    assert signals.reason == "a signal to another rank after step 7"


# ---- what goes wrong on the way


def test_weights_that_are_not_finite_never_replace_a_checkpoint(run, tiny, monkeypatch):
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def broken_in_step_6(parameters, *args):
        parameters = list(parameters)
        steps.append(1)
        if len(steps) == 6:
            parameters[0].grad.fill_(math.nan)
        return clip(parameters, *args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken_in_step_6)
    with pytest.raises(UserError, match="not finite|nan"):
        run(save_interval=1)
    assert all(p.isfinite().all() for p in load(tiny().out_dir)["model"].values())


def test_a_validation_loss_that_is_not_finite_stops_the_run(run, tiny):
    """The training loss, of the weights before the step, still is; nothing is written."""
    with pytest.raises(UserError, match="step 1 is not finite: .*'val_loss': nan"):
        run(learning_rate=1e10, warmup_steps=0, eval_interval=1)
    files = set(os.listdir(tiny().out_dir))
    assert not files & {"metrics.jsonl", "last.pt", "best.pt"}


def test_a_damaged_log_is_one_line_that_helps(run, tiny):
    run()
    path = Path(tiny().out_dir, "metrics.jsonl")
    for line in (b'{"step": 1\n', b"\xff\xfe\n", b"[1]\n"):
        whole = path.read_bytes()
        path.write_bytes(line + whole)
        with pytest.raises(UserError, match="metrics.jsonl is damaged; move it away"):
            run(resume=True)
        path.write_bytes(whole)
    path.unlink()
    assert run(resume=True, allow_changes=True, max_steps=12)[-1]["step"] == 12


def test_rows_younger_than_the_checkpoint_are_written_again(run, tiny):
    """And half a line of a killed process."""
    unbroken = run()
    path = Path(tiny().out_dir, "metrics.jsonl")
    lines = path.read_text().splitlines(True)
    path.write_text("".join(lines) + json.dumps({"step": 11, "loss": 99.0}) + '\n{"step": 12, "lo')
    assert run(resume=True) == unbroken


def test_the_log_is_on_the_disk_before_a_checkpoint_is_written(run, tiny, monkeypatch):
    done, fsync, save = [], os.fsync, torch.save
    path = tiny().out_dir + "/metrics.jsonl"

    def synced(fd):
        if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
            done.append(len(read_rows(tiny().out_dir)))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(torch, "save", lambda *a: done.append("save") or save(*a))
    run(log_interval=100, eval_interval=100, superposition_ratio=0.0)  # rows of steps 1 and 10
    assert done[:2] == [2, "save"]


def test_a_resumed_run_keeps_its_fit_and_its_separator(run, tiny, tmp_path):
    """Even if the file of the fit is gone; a corpus that has changed is refused."""
    fit, corpus = tmp_path / "fit.json", shutil.copytree(tiny().dataset, tmp_path / "corpus")
    knobs = dict(bag_weights="fitted", fitted=str(fit), dataset=str(corpus))
    fit.write_text('{"c0": 0.0, "a": 2.0, "k": -2.0}')
    wanted = run(out_dir=str(tmp_path / "whole"), **knobs)
    stopped_run(run, 2, **knobs)
    fit.unlink()
    assert column(run(resume=True, **knobs), *LEARNED) == column(wanted, *LEARNED)
    fit.write_text('{"c0": 1.0, "a": 0.0, "k": -2.0}')  # read with --allow_changes
    meta = json.loads((corpus / "meta.json").read_text())
    (corpus / "meta.json").write_text(json.dumps(meta | {"separator": 1}))
    with pytest.raises(
        UserError, match="does not hold the corpus of .*separator None there, 1 here"
    ):
        run(**knobs, resume=True, allow_changes=True)


# ---- the folder of a run


def test_a_folder_with_a_checkpoint_or_a_log_holds_a_run(run, tiny):
    """A damaged log that was moved away must not cost the checkpoint, and a run that was killed before its
    first save is not told to resume."""
    before, folder = run(), Path(tiny().out_dir)
    config = json.loads((folder / "config.json").read_text())
    assert config["config"] == vars(tiny()) and config["versions"]["torch"] == torch.__version__
    with pytest.raises(UserError, match="already holds a run.*--resume.*--overwrite.*--out_dir"):
        run(max_steps=4)
    assert read_rows(folder) == before
    (folder / "metrics.jsonl").rename(folder / "log")
    with pytest.raises(UserError, match="already holds a run.*--resume"):
        run()
    (folder / "log").rename(folder / "metrics.jsonl")
    for name in ("last.pt", "best.pt"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="already holds a run: --overwrite it"):
        run()
    with pytest.raises(UserError, match="there is no checkpoint.*start without --resume"):
        run(resume=True)
    assert len(run(max_steps=4, overwrite=True)) == 4


def test_a_folder_in_which_another_process_trains_is_refused(run, tiny):
    """The lock is the system's: it ends with the process that holds it."""
    lock = Path(tiny().out_dir, "lock")
    lock.parent.mkdir()
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX)"
    command = [sys.executable, "-c", f"{code}; print(flush=True); sys.stdin.read()", str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="run is in use by another process"):
            run()
    assert run()[-1]["step"] == 10


def test_a_run_is_overwritten_only_when_the_new_one_has_warmed_up(run, tiny, monkeypatch):
    before, weights = run(), Path(tiny().out_dir, "last.pt").read_bytes()

    def no_memory(*args):
        raise UserError("out of memory")

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        run(overwrite=True, max_steps=4, wandb_project="x")
    monkeypatch.setattr(machine.Machine, "compile", no_memory)
    with pytest.raises(UserError, match="out of memory"):
        run(overwrite=True, max_steps=4)
    assert read_rows(tiny().out_dir) == before
    assert Path(tiny().out_dir, "last.pt").read_bytes() == weights


def test_a_restarted_process_resumes_its_own_run_alone(tiny, monkeypatch):
    """Not another torchrun's, and not the one to be overwritten, if ranks died before it was."""
    start = lambda: log.RunFolder(tiny().out_dir, machine.Machine("cpu", "float32"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 0")
    old, config = start(), tiny(overwrite=True)
    old.acquire(False, False)
    old.replace(False, 0, {})
    Path(old.last).write_bytes(b"old")
    old.lock.close()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 1")
    assert start().after_restart(config) == config  # the first process
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    folder = start()
    assert folder.after_restart(config) == config  # its first process died in the warm-up
    folder.acquire(False, True)
    assert Path(folder.last).read_bytes() == b"old"
    folder.replace(False, 0, {})
    assert not os.path.exists(folder.last)
    again = folder.after_restart(config)
    assert (again.resume, again.overwrite) == (False, True)  # there is no checkpoint yet
    Path(folder.last).write_bytes(b"new")
    again = folder.after_restart(config)
    assert (again.resume, again.overwrite) == (True, False)


def test_resuming_needs_no_other_knob(run, tiny, tmp_path, monkeypatch):
    """Knobs that are not given are those of the run; one that is given and differs is still refused."""
    wanted = run(out_dir=str(tmp_path / "whole"))
    stopped_run(run, 1)
    here = f"--out_dir={tiny().out_dir}"
    with pytest.raises(SystemExit, match="^error: .*other settings: seed 1337 -> 5"):
        command_line(monkeypatch, here, "--resume", "--seed=5")
    command_line(monkeypatch, here, "--resume")
    assert column(read_rows(tiny().out_dir), *LEARNED) == column(wanted, *LEARNED)
    config = Path(tiny().out_dir, "config.json")
    for damaged in ("{", '{"config": 3}'):
        config.write_text(damaged)
        with pytest.raises(SystemExit, match="^error: .*config.json"):
            command_line(monkeypatch, here, "--resume")


@pytest.mark.filterwarnings("ignore")
def test_wandb_continues_its_run(run, tmp_path, monkeypatch):
    for name, value in dict(WANDB_MODE="offline", WANDB_DIR=tmp_path, HOME=tmp_path).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for more in ({}, dict(resume=True, allow_changes=True, max_steps=12)):
        run(wandb_project="x", **more)
    ids = {path.name.rpartition("-")[2] for path in tmp_path.glob("wandb/offline-run-*")}
    assert len(ids) == 1
