"""configurator.py: what may be written in config files and on the command line, and what is said about the
rest."""

import importlib
import re
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

import train
from nanotst import UserError, configurator
from nanotst.configurator import entry_point, help_text, parse

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Knobs:
    """Usage: knobs"""

    # Sizes
    bag_size: int = 1  # tokens in a bag
    learning_rate: float = 0.1

    # Switches
    out_dir: str = "out"
    compile: bool = False


@dataclass
class Places:
    """Usage: places FOLDER FILE [FILE ...]"""

    folder: str  # the first one
    files: list[str]  # all that remain
    loss: Literal["mce", "bce"] = "mce"  # what is minimised
    bag_size: int | str = 1  # 4, or 8-4-2


@pytest.fixture
def file(tmp_path):
    def write(text, name="a.py"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def error(*argv, cls=Knobs):
    with pytest.raises(UserError) as e:
        parse(cls, argv)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("bag_size", ["4", "4.0", "+4", "0.4e1"])
def test_values_of_the_command_line_get_the_type_of_their_field(bag_size):
    argv = [f"--bag-size={bag_size}", "--learning_rate=2", "--out_dir=a_b=c", "--compile"]
    knobs = parse(Knobs, argv)
    assert knobs == Knobs(4, 2.0, "a_b=c", True)
    assert [type(value) for value in vars(knobs).values()] == [int, float, str, bool]


@pytest.mark.parametrize(
    "argument, wanted",
    [
        ("--compile=true", True),
        ("--compile=False", False),
        ("--out_dir=1", "1"),
        ("--out_dir=~/x", "/home/me/x"),  # the shell leaves it as it is
        ("--out_dir=a~/x", "a~/x"),
    ],
)
def test_switches_and_strings(monkeypatch, argument, wanted):
    monkeypatch.setenv("HOME", "/home/me")
    key = argument[2:].partition("=")[0]
    assert getattr(parse(Knobs, [argument]), key) == wanted


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--bag_size=1.5", "bag_size takes int, got '1.5'"),
        ("--bag_size", "write --bag_size=VALUE"),
        ("--bag_size=" + "9" * 30, "takes a finite number"),
        ("--learning_rate=fast", "learning_rate takes float"),
        *((f"--learning_rate={x}", "finite") for x in ("nan", "-inf", "1e400", "1e31")),
        ("--compile=2", "compile takes bool"),
        ("--bag_size 4", "unknown key"),
        ("4", "neither a config file nor --key=value"),
        ("--bag_sizes=4", "did you mean bag_size?"),
        ("--xyz=4", "unknown key 'xyz', see --help"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(argument, words):
    assert words in error(argument)


def test_config_file(file):
    path = file(
        '\ufeff"""A docstring."""\n# Größe\r\nbag_size = 2**4 * 1024 // 4  # arithmetic\n'
        'learning_rate = 2 * (1e-3 + 1)\nout_dir = "größe"\ncompile = True\n'
    )
    assert parse(Knobs, [path]) == Knobs(4096, 2.002, "größe", True)
    assert parse(Knobs, [file("bag_size = 2e6\nlearning_rate = -1\n")]) == Knobs(2_000_000, -1.0)


LINES = (
    "import os",
    "bag_size = int('4')",
    "bag_size = other",
    "bag_size = 1 / 0",
    "bag_size = 8-4-2",  # a difference, not the text 8-4-2
    "bag_size: int = 4",
)


@pytest.mark.parametrize("line", LINES)
def test_config_file_is_not_run(file, line):
    """Anything but an assignment of a value is refused, with its line number."""
    path = file(f"learning_rate = 1.0\n\n{line}\n")
    assert f"{path}:3: a config file holds only assignments" in error(path)


@pytest.mark.parametrize(
    "line, words",
    [
        ("bag_size = 1.5", "bag_size takes int, got 1.5"),
        ("bag_size = 10**400", "takes a finite number"),
        ("compile = 1", "takes bool"),
        ("bag_size = True", "takes int"),
        ("bag_size = (", "is not Python"),
    ],
)
def test_mistakes_in_a_config_file_name_the_file(file, line, words):
    path = file(line + "\n")
    assert words in error(path) and path in error(path)


def test_later_ones_win(file):
    a, b = file("bag_size = 2\nlearning_rate = 2.0\n", "a.py"), file("bag_size = 3\n", "b.py")
    assert parse(Knobs, []) == Knobs()
    assert parse(Knobs, [b, a]) == Knobs(2, 2.0)
    assert parse(Knobs, [a, "--bag_size=4", b]) == Knobs(3, 2.0)
    assert parse(Knobs, [a, "--bag_size=4", "--bag_size=5"]) == Knobs(5, 2.0)


def test_fields_without_a_default_are_given_by_their_place():
    assert parse(Places, ["out", "--loss=bce", "a.py", "b"]) == Places("out", ["a.py", "b"], "bce")
    assert "FOLDER is missing" in error(cls=Places)
    assert "FILES is missing" in error("out", cls=Places)


def test_choices_and_numbers_that_may_be_words():
    bag_size = lambda value: parse(Places, ["a", "b", f"--bag_size={value}"]).bag_size
    assert bag_size("4") == 4 and bag_size("8-4-2") == "8-4-2"
    assert "loss must be one of mce, bce, got 'mse'" in error("a", "b", "--loss=mse", cls=Places)


CONFIGS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("config/*.py"))


@pytest.mark.parametrize("argv", [[], *([path] for path in CONFIGS)], ids=["defaults", *CONFIGS])
def test_the_repositorys_configs_are_valid(argv, monkeypatch):
    monkeypatch.chdir(ROOT)
    train.check(parse(train.Config, argv), world_size=1)


# ---- entry points


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("do\nthis\r\nnow"), "error: do this now"),  # a path may hold a line end
        (OSError(2, "No such file", "x\n.bin"), "error: x .bin: No such file"),
        (KeyboardInterrupt(), "^130$"),
    ],
)
def test_an_entry_point_prints_what_the_user_can_act_on(error, line):
    def main(config):
        raise error

    with pytest.raises(SystemExit, match=line):
        entry_point(main, Knobs, [])


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        entry_point(lambda config: 1 / 0, Knobs, [])


# ---- help

SCRIPTS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(ROOT.glob("**/*.py"))
    if not path.relative_to(ROOT).parts[0].startswith((".", "out", "test"))
    and {"class Config:", 'if __name__ == "__main__":'} <= set(path.read_text().splitlines())
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_knob_of_every_script_has_a_help_text(name):
    config = importlib.import_module(name).Config
    page, at = help_text(config), 0
    for field in fields(config):  # in their order
        shown = field.name.upper() if field.default is MISSING else rf"--{field.name}=\S*"
        found = re.compile(rf"^  {shown} +\S", re.M).search(page, at)
        assert found, f"{field.name} of {name} has no help text"
        at = found.start()


def test_help(capsys):
    with pytest.raises(SystemExit) as e:
        parse(train.Config, ["--bag_size=4", "--help"])
    assert e.value.code == 0
    page = capsys.readouterr().out
    assert re.search(r"^  --bag_size=1 .*ordinary training", page, re.M)
    assert re.search(r"^  --schedule=wsd .*\[wsd, cosine\]$", page, re.M)
    assert {"train", "sample", "tools.plot", "data.text.prepare"} <= set(SCRIPTS)


def test_ranks_of_a_node_wait_for_the_first_to_say_what_they_all_met(monkeypatch):
    waited = []
    monkeypatch.setattr(configurator.time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit, match="unknown key"):
            entry_point(print, Knobs, ["--x=1"])
    assert waited == [10]


def test_help_shows_folders_from_the_working_directory(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = help_text(importlib.import_module("data.text.prepare").Config)
    assert re.search(r"^  --out_dir=data/text ", page, re.M)


def test_output_that_is_closed_or_a_notebooks(monkeypatch):
    """pythonw and a closed stdout give None; a notebook's stream cannot change its encoding."""
    for stream in (None, object()):
        monkeypatch.setattr("sys.stdout", stream)
        entry_point(lambda c: None, train.Config, [])
