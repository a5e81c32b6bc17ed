"""README.md and TRAPS.md: their changes apply and train, their links and tests exist."""

import re
import runpy
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "TRAPS.md", *sorted(ROOT.glob("results/**/README.md"))]
CHANGES = re.findall(r"`(--\S+)`[^\n]*\n+```diff\n(.*?)```", README, re.S)


@pytest.mark.parametrize("knob, diff", CHANGES, ids=[knob for knob, _ in CHANGES])
def test_a_change_of_the_method_is_these_lines(corpus, tmp_path, knob, diff):
    """Apply the diff to a copy of the code, and train with what it adds."""
    for name in ("tst.py", "model.py", "train.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "nanotst", tmp_path / "nanotst", ignore=shutil.ignore_patterns("__pycache__")
    )
    done = subprocess.run(
        ["git", "apply", "--unidiff-zero", "-"],
        cwd=tmp_path,
        input=diff,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    knobs = TINY | {"dataset": corpus, "out_dir": str(tmp_path / "run"), "threads": 1}
    argv = [f"--{key}={value}" for key, value in knobs.items()] + [knob]
    done = subprocess.run(
        [sys.executable, "train.py", *argv], cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode == 0 and "step 10/10" in done.stdout, done.stderr


def test_the_corpus_that_the_readme_names_is_the_one_that_is_made():
    hashes = runpy.run_path(str(ROOT / "data/python_source/prepare.py"))["SHA256"]
    assert len(hashes) == 2 and all(digest in README for digest in hashes.values())


def test_the_readme_shows_the_four_changes():
    assert [knob.split("=")[0] for knob, _ in CHANGES] == [
        "--loss",
        "--bag_weights",
        "--schedule",
        "--optimizer",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_traps_name_tests_that_exist():
    named = re.findall(
        r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "TRAPS.md").read_text(encoding="utf-8")
    )
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), (
            f"{file}::{test}"
        )


def test_the_readme_is_short():
    assert len(README.encode()) <= 10_000
