"""examples/slurm.sh, with a scontrol and an srun that only print what they are asked for."""

import os
import subprocess

from conftest import ROOT


def test_a_job_starts_one_torchrun_per_node_and_resumes_its_own_run(tmp_path):
    for name, script in (("scontrol", "echo node7; echo node8"), ("srun", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"NNODES": "2", "JOB_ID": "31", "JOB_NODELIST": "node[7-8]", "GPUS_ON_NODE": "4"}
    env = os.environ | {f"SLURM_{key}": value for key, value in slurm.items()}
    env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": f"{tmp_path}/python"}
    (tmp_path / "python").symlink_to("/bin/true")  # does not know --shutdown-timeout

    train = ["train.py", "config/moe_10b_a1b.py", f"--out_dir={tmp_path}/out"]

    def submit(restarts="0"):
        command = ["bash", "examples/slurm.sh", *train[1:]]
        env["SLURM_RESTART_COUNT"] = restarts
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr
        return done.stdout.split()

    options = {"--nnodes=2", "--nproc_per_node=4", "--rdzv_endpoint=node7:29500", "--rdzv_id=31.0"}
    assert options <= set(submit()) and submit()[-3:] == train
    assert submit("1")[-4:] == [*train, "--overwrite"]  # lost before its first checkpoint
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last.pt").write_text("")
    assert submit()[-4:] == submit("1")[-4:] == [*train, "--resume"]
