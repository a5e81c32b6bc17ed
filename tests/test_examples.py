"""The small scripts of examples/ that nothing else tests."""

import subprocess

import numpy as np
import pytest
from conftest import ROOT, write_corpus

import train
from examples import small_corpus
from nanotst import UserError
from nanotst.configurator import parse
from nanotst.corpus import open_corpus
from tools import compare, sweep
from tools.runner import places


def test_a_small_corpus_is_blocks_of_a_large_one(tmp_path):
    write_corpus(tmp_path / "large", np.arange(6400), range(64), 6400)
    small_corpus.main(
        small_corpus.Config(str(tmp_path / "large"), str(tmp_path / "small"), tokens=640)
    )
    small = open_corpus(str(tmp_path / "small"))
    assert small.train[:].tolist() == [100 * i + j for i in range(64) for j in range(10)]
    assert small.val[:].tolist() == list(range(64)) and small.meta["vocab_size"] == 6400
    with pytest.raises(UserError, match="must lie in 64..6400, got 9000"):
        small_corpus.main(
            small_corpus.Config(str(tmp_path / "large"), str(tmp_path / "no"), tokens=9000)
        )


def test_the_experiments_of_the_paper_are_command_lines_that_work(tmp_path):
    """Every experiment of examples/paper.sh, with a Python that only writes down what it is asked for."""
    log = tmp_path / "log"
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nfor argument; do printf "%s\\n" "$argument" >> {log}; done\necho "" >> {log}\n'
    )
    python.chmod(0o755)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bag_size.csv").write_text(
        "run,bag_size,seed\ns1_seed1,1,1\ns2_seed1,2,1\n"
    )
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "OUT": str(tmp_path / "out")}
    script = str(ROOT / "examples" / "paper.sh")
    done = subprocess.run(["bash", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    calls = [call.split("\n") for call in log.read_text().strip().split("\n\n")]
    for _, name, *arguments in calls:
        if name in ("tools.sweep", "tools.compare"):
            tool = {"tools.sweep": sweep, "tools.compare": compare}[name]
            c = parse(tool.Config, places(arguments, tool.Config))
            if name == "tools.sweep":  # all of its runs have names of their own
                members, varied = sweep.plan(c.arguments, tmp_path / c.out_dir)
                sweep.axes_of(members, varied, c)
            else:
                members = compare.Plan(c).members()
            for member in members:  # all values of the grid
                train.check(parse(train.Config, member.arguments), 1)
    names = [call[1] for call in calls]
    assert names.count("tools.sweep") > 15 and "tools.compare" in names and "tools.fit_mi" in names
    assert [name for name in names if "evaluate" in name or "export" in name or "lm_eval" in name] == [
        "tools.evaluate", "tools.evaluate", "examples.lm_eval_local.make_tasks",
        "tools.export", "lm_eval", "tools.export", "lm_eval",
    ]  # fmt: skip
    evaluated = next(call for call in calls if call[1] == "tools.evaluate")
    assert evaluated[2:5] == [
        f"{tmp_path}/out/runs/s1_seed1/last.pt", f"{tmp_path}/out/runs/s2_seed1/last.pt",
        "--labels=baseline,TST",
    ]  # fmt: skip
    unknown = subprocess.run(
        ["bash", script, "nothing"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert unknown.returncode == 1 and "no experiment nothing; there are rates" in unknown.stderr
