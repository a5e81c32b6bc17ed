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


def test_a_small_corpus_is_blocks_of_a_large_one(tmp_path):
    large = write_corpus(tmp_path / "large", np.arange(6400), range(64), 6400)
    make = lambda tokens: small_corpus.main(
        small_corpus.Config(large, str(tmp_path / "small"), tokens=tokens)
    )
    with pytest.raises(UserError, match="must lie in 64..6400, got 9000"):
        make(9000)
    make(640)
    small = open_corpus(str(tmp_path / "small"))
    assert small.train[:].tolist() == [100 * i + j for i in range(64) for j in range(10)]
    assert small.val[:].tolist() == list(range(64)) and small.meta["vocab_size"] == 6400


def test_the_experiments_of_the_paper_are_command_lines_that_work(tmp_path):
    """Every experiment of examples/paper.sh, with a Python that only writes down what it is asked for."""
    log, python, out = (tmp_path / name for name in ("log", "python", "out"))
    lines = f'for argument; do printf "%s\\n" "$argument" >> {log}; done\necho "" >> {log}\n'
    python.write_text(f"#!/bin/sh\n{lines}")
    python.chmod(0o755)
    out.mkdir()
    (out / "bag_size.csv").write_text("run,bag_size,seed\ns1_seed1,1,1\ns2_seed1,2,1\n")
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "OUT": str(out)}
    command = ["bash", str(ROOT / "examples" / "paper.sh")]
    start = lambda *experiments: subprocess.run(
        [*command, *experiments], cwd=ROOT, env=env, capture_output=True, text=True
    )
    done = start()
    assert done.returncode == 0 and not done.stderr
    calls = [call.split("\n") for call in log.read_text().strip().split("\n\n")]
    for _, name, *arguments in calls:
        if name == "tools.sweep":
            c = parse(sweep.Config, sweep.as_positional(arguments, sweep.Config))
            members, _ = sweep.plan(c.arguments, tmp_path / c.out_dir)
        elif name == "tools.compare":
            members = compare.plan(
                parse(compare.Config, sweep.as_positional(arguments, compare.Config))
            )
        else:
            continue
        for member in members:  # all values of the grid
            train.check(parse(train.Config, member.arguments), 1)
            own_text = c.out_dir.startswith(
                (f"{out}/english", f"{out}/vocabulary", f"{out}/repeat")
            )
            assert (member.settings["dataset"] == "python_source") != own_text
        folders = [member.folder for member in members]
        assert len(set(folders)) == len(folders)
    names = [call[1] for call in calls]
    assert names.count("tools.sweep") > 15 and "tools.compare" in names and "tools.fit_mi" in names
    assert names[-2:] == ["tools.export", "lm_eval"] and names.count("tools.evaluate") == 2
    evaluated = next(call for call in calls if call[1] == "tools.evaluate")
    checkpoints = [f"{out}/runs/s{s}_seed1/last.pt" for s in (1, 2)]
    assert evaluated[2:5] == [*checkpoints, "--labels=baseline,TST"]
    unknown = start("nothing")
    assert unknown.returncode == 1 and "no experiment nothing; there are rates" in unknown.stderr
