"""What a hostile week found (tests/campaign.py), one small case of each kind, and what people are told."""

import contextlib
import errno
import importlib
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_rows
from matplotlib.figure import Figure

import train
from model import GPT
from nanotst import UserError, checkpoint, configurator, log, parallel
from nanotst.configurator import help_text, parse
from tools.picture import save_picture
from tools.runs import load_metrics

SCRIPTS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(ROOT.glob("**/*.py"))
    if not path.relative_to(ROOT).parts[0].startswith((".", "out"))
    and not path.name.startswith("test_")
    if "class Config:" in (text := path.read_text(encoding="utf-8"))
    and 'if __name__ == "__main__":' in text
]


def test_scripts_are_found():
    assert {"train", "sample", "tools.plot", "data.text.prepare", "tests.campaign"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_knob_of_every_script_has_a_help_text(name):
    config = importlib.import_module(name).Config
    page = help_text(config)
    for field in config.__dataclass_fields__.values():
        shown = field.name.upper() if configurator.is_place(field) else rf"--{field.name}=\S*"
        assert re.search(rf"^  {shown} +\S", page, re.M), f"{field.name} of {name} has no help text"


# ---- what does not fit, and what works but hardly as it was meant


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(n_embd=1_000_000), "parameters takes .* GB.*n_embd"),
        (dict(n_layer=10**9), "parameters takes .* GB"),
        (dict(n_embd=10**12), "there is no such model"),
        (dict(ff_dim=2**62), "there is no such model"),
        (dict(threads=10**6), "threads must be at most 1024"),
        (
            dict(matrix_learning_rate=1e308, optimizer="muon"),
            "matrix_learning_rate takes .* up to 1e",
        ),
        (dict(reinit_at_switch=","), "reinit_at_switch takes embedding, head, optimizer"),
        (dict(superposition_ratio=0.01), "has no steps; use a larger superposition_ratio"),
    ],
    ids=str,
)
def test_what_this_machine_cannot_hold_is_one_line(run, tiny, knobs, words):
    with pytest.raises(UserError, match=words) as e:
        run(**knobs)
    assert "\n" not in str(e.value) and not os.path.exists(tiny().out_dir)


def test_the_largest_model_that_fits_is_not_refused(tiny):
    """16 bytes a parameter, and the rotary tables."""
    c = tiny(n_layer=3)
    shape = checkpoint.model_config(vars(c), {"vocab_size": 50})
    needed = 16 * GPT(shape).n_params() + 4 * c.block_size * shape.head_dim
    for memory, way, shards, words in (
        (needed, "none", 4, None),
        (0, "none", 4, None),  # not known
        (needed - 1, "none", 4, "here are .*; give a smaller model"),
        (needed - 1, "ddp", 4, "--parallel=fsdp spreads them"),  # each of the ranks holds all
        (needed // 2 + 1, "fsdp", 2, None),
        (needed // 2 - 1, "fsdp", 2, "here are .*; give a smaller model"),
    ):
        machine = type("Stub", (), dict(memory=memory, parallel=way, shard_size=shards))
        with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
            parallel.check_size(shape, machine)


def test_a_warmup_that_never_ends_is_said(run, capsys):
    run(warmup_steps=10)
    assert "note: warmup_steps 10 is not below max_steps 10" in capsys.readouterr().out


def test_a_vocabulary_that_dwarfs_the_model_is_said(tiny, capsys):
    """Before anything is compiled: such a run takes hours on a CPU."""
    c = tiny()
    machine = train.Machine("cpu", "float32")
    for vocab_size in (50, 50_257):
        shape = checkpoint.model_config(vars(c), {"vocab_size": vocab_size})
        with torch.device("meta"):
            log.warn(c, machine, GPT(shape))
    out = capsys.readouterr().out
    assert (
        re.search(r"note: 99\.\d% of the work .* 50,257 tokens.*--encoding=bytes", out)
        and out.count("\n") == 1
    )


# ---- files that are not what they should be


def refuse(run, words, **knobs):
    with pytest.raises(UserError, match=words) as e:
        run(**knobs)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "key, value",
    [("step", 0), ("step", 11), ("step", 2**60), ("seconds", math.nan), ("best_val", math.nan)],
)
def test_numbers_out_of_range_in_a_checkpoint_are_refused(run, tiny, key, value):
    run()
    path = tiny().out_dir + "/last.pt"
    torch.save(torch.load(path, weights_only=True) | {key: value}, path)
    refuse(run, "last.pt cannot be resumed.*out of range", resume=True)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
def test_weights_of_another_kind_are_not_cast(run, tiny, dtype):
    run()
    path = tiny().out_dir + "/last.pt"
    saved = torch.load(path, weights_only=True)
    saved["model"]["norm.weight"] = saved["model"]["norm.weight"].to(dtype)
    torch.save(saved, path)
    refuse(run, "last.pt does not fit this model.*norm.weight", resume=True)


def test_weights_that_ran_away_are_not_saved(run, tiny):
    """At 1e30 the squares in a norm are infinite, and a loss after RMSNorm can look finite."""
    refuse(
        run,
        "weights after step 1 are not finite",
        learning_rate=1e30,
        max_steps=1,
        warmup_steps=0,
        bag_size=1,
    )
    assert not os.path.exists(tiny().out_dir + "/last.pt")


@pytest.mark.parametrize(
    "step", ["NaN", "true", "null", '"3"', "[1]", "9" * 5000], ids=lambda s: s[:9]
)
def test_a_row_of_no_step_is_damage(run, tiny, step):
    run()
    path = Path(tiny().out_dir, "metrics.jsonl")
    path.write_text(path.read_text() + '{"step": ' + step + "}\n")
    refuse(run, "metrics.jsonl is damaged", resume=True)


MOE = dict(n_expert=4, top_k=2)


@pytest.mark.parametrize(
    "knobs, change, words",
    [
        (
            MOE,
            lambda saved: saved["shares"].fill_(math.nan),
            "its shares of experts are .*not finite",
        ),
        (
            {},
            lambda saved: saved["stream"]["cut"].__setitem__(3, 7),
            "its place in the text is another run's",
        ),
        ({}, lambda saved: saved["stream"]["cut"].pop(), "its place in the text is another run's"),
        ({}, lambda saved: moments(saved)["exp_avg"].fill_(math.nan), "a moment is not finite"),
        ({}, lambda saved: moments(saved).update(exp_avg_sq=[[1.0]]), "exp_avg_sq is no tensor"),
        (
            {},
            lambda saved: moments(saved).update(step=torch.tensor(5)),
            "step is no tensor of floating",
        ),
    ],
    ids=["shares", "cut", "shorter cut", "nan moment", "list of a moment", "step"],
)
def test_what_else_can_be_wrong_in_a_checkpoint(run, tiny, knobs, change, words):
    run(**knobs)
    path = tiny().out_dir + "/last.pt"
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)
    before = Path(tiny().out_dir, "metrics.jsonl").read_bytes()
    refuse(run, "last.pt.*" + words, resume=True, **knobs)
    assert Path(tiny().out_dir, "metrics.jsonl").read_bytes() == before


def moments(saved):
    return saved["optimizer"][0]["state"][0]


def test_a_picture_of_no_known_kind_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot draw .*last.pt: Format 'pt' is not supported"):
        save_picture(Figure(), tmp_path / "last.pt")
    save_picture(Figure(), tmp_path / "last.png")
    assert (tmp_path / "last.png").read_bytes()[1:4] == b"PNG"


def test_knobs_of_a_mixture_of_experts_do_nothing_to_a_dense_model(run):
    assert len(run(balance_rate=0.1, router_z_coef=0.1)) == 10


def test_deep_nesting_in_a_log_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("[" * 100_000 + '\n{"step": 1}\n')
    with pytest.raises(UserError, match="metrics.jsonl:1: not a JSON object"):
        load_metrics(tmp_path)


@pytest.mark.parametrize("value", ["0x" + "f" * 5000, "[0x" + "f" * 5000 + "]", "-0x" + "f" * 5000])
@pytest.mark.parametrize("key", ["max_steps", "learning_rate", "loss", "bag_size"])
def test_a_number_that_python_does_not_print_is_one_line(tmp_path, key, value):
    path = tmp_path / "config.py"
    path.write_text(f"{key} = {value}\n")
    with pytest.raises(UserError, match="thousands of digits"):
        parse(train.Config, [str(path)])


# ---- the folder of a run


def test_what_a_folder_holds_is_looked_at_under_its_lock(run, tiny, monkeypatch):
    """Another process may come to its end between a look and the lock; its files must not be mixed with
    ours."""
    lock = log.RunFolder._lock

    def late(self):
        monkeypatch.setattr(log.RunFolder, "_lock", lock)
        run()  # the other one
        self.lock = None
        lock(self)

    monkeypatch.setattr(log.RunFolder, "_lock", late)
    refuse(run, "already holds a run.*--resume")
    assert len(read_rows(tiny().out_dir)) == 10


def test_a_full_disk_while_a_row_is_written(run, tiny, monkeypatch):
    class Full:
        def __enter__(self):
            raise OSError(errno.ENOSPC, "No space left on device")

        def __exit__(self, *error): ...

    def full_after_step_6(path, mode="r", **options):
        rows = Path(tiny().out_dir, "metrics.jsonl")
        if mode == "a" and rows.exists() and len(read_rows(tiny().out_dir)) == 6:
            return Full()
        return open(path, mode, **options)

    monkeypatch.setattr(log, "open", full_after_step_6, raising=False)
    words = "cannot write .*metrics.jsonl: the disk is full"
    refuse(run, words + "; .*last.pt is untouched: make room and use --resume", save_interval=4)
    refuse(run, words + "; make room$", overwrite=True)
    monkeypatch.undo()
    assert len(run(overwrite=True)) == 10


# ---- the command line


def test_an_error_is_one_line_whatever_a_path_holds(capsys):
    def main(config):
        raise UserError("no a\nb\r\nc")

    with pytest.raises(SystemExit, match="^error: no a b c$"):
        configurator.entry_point(main, train.Config, [])

    def main(config):
        os.remove("/no/such\nfile")

    with pytest.raises(SystemExit, match="^error: /no/such file: No such file or directory$"):
        configurator.entry_point(main, train.Config, [])


def test_interrupted_imports_print_nothing():
    """train.py imports torch first, which takes seconds."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", str(ROOT / "train.py"), "--dataset=no/such"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "torch" not in (line := process.stderr.readline()) and line:  # one of its modules is done
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (
        "Traceback" not in err
        and "error" not in err
        and not out
        and process.returncode == -signal.SIGINT
    )


def test_interrupted_after_the_imports_is_130(monkeypatch):
    """What a script set for the time of its imports is put back."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)

    def main(config):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    try:
        with pytest.raises(SystemExit) as e:
            configurator.entry_point(main, train.Config, [])
        assert e.value.code == 130
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_works_without_a_key(run, tmp_path, monkeypatch, mode):
    for name, value in dict(
        WANDB_MODE=mode, WANDB_DIR=tmp_path, HOME=tmp_path, NETRC="/nonexistent"
    ).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert len(run(wandb_project="x")) == 10
    assert any(tmp_path.glob("wandb/offline-run-*")) == (mode == "offline")


def command_line(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def test_resuming_needs_no_other_knob(run, tiny, tmp_path, monkeypatch):
    """Knobs that are not given are those of the run; one that is given and differs is still refused."""
    wanted = run(out_dir=str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        multiplier = train.rate_multiplier
        patch.setattr(
            train, "rate_multiplier", lambda *a: os.kill(os.getpid(), 15) or multiplier(*a)
        )
        run()
    assert len(read_rows(tiny().out_dir)) == 1
    here = f"--out_dir={tiny().out_dir}"
    with pytest.raises(
        SystemExit, match="last.pt was trained with other settings: seed 1337 -> 5; leave"
    ):
        command_line(monkeypatch, here, "--resume", "--seed=5")
    command_line(monkeypatch, here, "--resume")
    rows = read_rows(tiny().out_dir)
    assert [row["loss"] for row in rows] == [row["loss"] for row in wanted]
    config = Path(tiny().out_dir, "config.json")
    whole = config.read_text()
    for damaged in ("{", "[]", '{"config": 3}', whole.replace('"seed": 1337', '"seed": "x"')):
        config.write_text(damaged)
        with pytest.raises(SystemExit, match="^error: .*config.json"):
            command_line(monkeypatch, here, "--resume")


def test_config_json_is_json_without_nan(run, tiny):
    run()
    text = Path(tiny().out_dir, "config.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))
