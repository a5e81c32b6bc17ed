"""examples/slurm.sh, with a scontrol and a srun that only say what they were asked for."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def submit(tmp_path):
    """submit(arguments, restarts) -> the command that srun would start on each node."""
    for name, script in (("scontrol", "echo node7; echo node8"), ("srun", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    def run(*arguments, restarts=""):
        slurm = {"NNODES": "2", "JOB_ID": "31", "JOB_NODELIST": "node[7-8]", "GPUS_ON_NODE": "4"}
        env = {
            **os.environ,
            **{f"SLURM_{key}": value for key, value in slurm.items()},
            "PYTHON": sys.executable,
        }
        env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | (
            {"SLURM_RESTART_COUNT": restarts} if restarts else {}
        )
        script = str(ROOT / "examples/slurm.sh")
        done = subprocess.run(
            ["bash", script, *arguments], env=env, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and not done.stderr
        return done.stdout.split()

    return run


def test_one_torchrun_a_node_which_meet_at_the_first(submit, tmp_path):
    command = submit("config/moe_10b_a1b.py", f"--out_dir={tmp_path}/out")
    assert {
        "--nnodes=2",
        "--nproc_per_node=4",
        "--rdzv_endpoint=node7:29500",
        "--rdzv_id=31.0",
    } <= set(command)
    assert command[-3:] == ["train.py", "config/moe_10b_a1b.py", f"--out_dir={tmp_path}/out"]


@pytest.mark.parametrize(
    "there, restarts, how",
    [
        ("last.pt", "", "--resume"),
        ("last.dcp/manifest.json", "1", "--resume"),
        ("log", "1", "--overwrite"),
    ],
)
def test_a_job_goes_on_with_its_own_run(submit, tmp_path, there, restarts, how):
    path = tmp_path / "out" / there
    path.parent.mkdir(parents=True)
    path.write_text("")
    assert submit(f"--out_dir={tmp_path}/out", restarts=restarts)[-1] == how
