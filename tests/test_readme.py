"""The pages: their diffs apply and train, their links and the tests they name exist."""

import importlib
import re
import runpy
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, read_rows, run_forks

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RESULTS = sorted(ROOT.glob("results/**/README.md"))
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "examples/recipes.md", *RESULTS]
CHANGES = re.findall(r"`(--\S+)`[^\n]*\n+```diff\n(.*?)```", CONTRIBUTING, re.S)


def train_all(me, folder, knobs):
    """With each change in turn, by the code in `folder`."""
    for name in [
        name for name in sys.modules if name.split(".")[0] in ("model", "nanotst", "train", "tst")
    ]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    train = importlib.import_module("train")
    assert train.__file__.startswith(str(folder))
    for i, (knob, _) in enumerate(CHANGES):
        key, value = knob[2:].split("=")
        train.main(train.Config(**knobs, **{key: value}, out_dir=f"{folder}/run{i}"))


def apply_diff(diff, folder, *options):
    command = ["git", "apply", *options, "-"]
    subprocess.run(command, cwd=folder, input=diff, text=True, check=True)


def test_the_four_changes_apply_alone_and_one_after_the_other_and_train(corpus, tmp_path):
    for name in ("tst.py", "model.py", "train.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nanotst", tmp_path / "nanotst")
    assert len(CHANGES) == 4
    for _, diff in CHANGES:
        apply_diff(diff, tmp_path, "--check")
    for _, diff in CHANGES:
        apply_diff(diff, tmp_path)
    run_forks(train_all, 1, tmp_path, TINY | {"dataset": corpus, "threads": 1})
    assert [read_rows(tmp_path / f"run{i}")[-1]["step"] for i in range(4)] == [10] * 4


def test_the_corpus_that_the_readme_names_is_the_one_that_is_made():
    hashes = runpy.run_path(str(ROOT / "data/python_source/prepare.py"))["SHA256"]
    assert len(hashes) == 2 and all(digest in README for digest in hashes.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_traps_name_tests_that_exist():
    traps = (ROOT / "TRAPS.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", traps)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test


def test_the_readme_is_neither_long_nor_squeezed():
    assert 11_000 <= len(README.encode()) <= 14_000
