"""configurator.py: what may be written in config files and on the command line, and what is said about the
rest."""

import dataclasses
import importlib
import io
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import train
from nanotst import UserError, configurator
from nanotst.configurator import entry_point, help_text, parse, validate

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


@pytest.fixture
def file(tmp_path):
    def write(text, name="a.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def error(*argv):
    with pytest.raises(UserError) as e:
        parse(Knobs, argv)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("bag_size", ["4", "4.0", "+4", "0_4", "4e0", "0.4e1"])
def test_values_of_the_command_line_get_the_type_of_their_field(bag_size):
    argv = [f"--bag-size={bag_size}", "--learning_rate=2", "--out_dir=a_b=c", "--compile"]
    knobs = parse(Knobs, argv)
    assert knobs == Knobs(4, 2.0, "a_b=c", True)
    assert [type(value) for value in vars(knobs).values()] == [int, float, str, bool]


def test_switches_and_strings():
    for value, wanted in (("true", True), ("False", False), ("0", False), ("yes", True)):
        assert parse(Knobs, [f"--compile={value}"]).compile is wanted
    for value in ("1", "", "True"):
        assert parse(Knobs, [f"--out_dir={value}"]).out_dir == value


def test_mistakes_on_the_command_line_are_one_line():
    for value in ("1.5", "15e-1", "", "True", "x"):
        assert f"bag_size takes int, got {value!r}" in error(f"--bag_size={value}")
    assert "learning_rate takes float" in error("--learning_rate=fast")
    assert "compile takes bool" in error("--compile=2")
    assert "write --bag_size=VALUE" in error("--bag_size")
    assert "unknown key" in error("--bag_size 4")
    assert "neither a config file nor --key=value" in error("4")
    for typo in ("bag_sizes", "size", "bagsize", "bag_szie", "Bag_Size"):
        assert "did you mean bag_size?" in error(f"--{typo}=4")
    for nothing_like_it in ("xyz", ""):
        unknown = f"unknown key {nothing_like_it!r}, see --help"
        assert error(f"--{nothing_like_it}=4").endswith(unknown)


def test_config_file(file):
    path = file(
        '"""A docstring."""\n# a comment\nbag_size = 2**4 * 1024 // 4  # arithmetic\n'
        'learning_rate = 2 * (1e-3 + 1)\nout_dir = "out/a"\ncompile = True\n'
    )
    assert parse(Knobs, [path]) == Knobs(4096, 2.002, "out/a", True)
    assert parse(Knobs, [file("bag_size = 2e6\nlearning_rate = -1\n")]) == Knobs(2_000_000, -1.0)


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "bag_size = int('4')",
        "bag_size = __import__('os').getpid() + 1",
        "bag_size += 1",
        "bag_size = other",
        "a.b = 1",
        "bag_size = learning_rate = 1",
        "bag_size: int = 4",
        "if True: bag_size = 2",
        "bag_size = 1 / 0",
        "bag_size = 'a' + 1",
    ],
)
def test_config_file_is_not_run(file, line):
    """Anything but an assignment of a value is refused, with its line number."""
    path = file(f"learning_rate = 1.0\n\n{line}\n")
    assert f"{path}:3: a config file holds assignments" in error(path)


def test_mistakes_in_a_config_file_name_the_file(file):
    for line, words in (
        ("bag_size = 1.5", "bag_size takes int, got 1.5"),
        ("bag_size = 10**400", "takes a finite number"),
        ("out_dir = 4", "takes str"),
        ("compile = 1", "takes bool"),
        ("bag_size = True", "takes int"),
        ("learning_rate = [1.0]", "takes float"),
        ("bag_sizes = 4", "did you mean bag_size?"),
        ("bag_size = (", "is not Python"),
    ):
        path = file(line + "\n")
        assert words in error(path) and path in error(path)


def test_later_ones_win(file):
    a, b = file("bag_size = 2\nlearning_rate = 2.0\n", "a.py"), file("bag_size = 3\n", "b.py")
    assert parse(Knobs, []) == Knobs()
    assert parse(Knobs, [a, b]) == Knobs(3, 2.0)
    assert parse(Knobs, [b, a]) == Knobs(2, 2.0)
    assert parse(Knobs, [a, "--bag_size=4", b]) == Knobs(3, 2.0)
    assert parse(Knobs, [a, "--bag_size=4", "--bag_size=5"]) == Knobs(5, 2.0)


def test_help_lists_every_knob_of_training(capsys):
    with pytest.raises(SystemExit) as e:
        parse(train.Config, ["--bag_size=4", "--help"])
    assert e.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [m[1] for line in lines if (m := re.match(r"  --(\w+)=", line))]
    assert shown == list(train.Config.__dataclass_fields__)
    assert any(re.match(r"  --bag_size=1 .*ordinary training", line) for line in lines)
    assert any(re.match(r"  --schedule=wsd .*\[wsd, cosine\]", line) for line in lines)
    assert help_text(Places).splitlines()[1].split() == ["FOLDER", "the", "first", "one"]


CONFIGS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("config/*.py"))


@pytest.mark.parametrize("argv", [[], *([path] for path in CONFIGS)], ids=["defaults", *CONFIGS])
def test_the_repositorys_configs_are_valid(argv, monkeypatch):
    monkeypatch.chdir(ROOT)
    train.check(parse(train.Config, argv), world_size=1)


@dataclass
class Places:
    """Usage: places FOLDER FILE [FILE ...]"""

    folder: str  # the first one
    files: list[str]  # all that remain
    loss: Literal["mce", "bce"] = "mce"  # what is minimised
    bag_size: int | str = 1  # 4, or 8-4-2


def test_fields_without_a_default_are_given_by_their_place():
    assert parse(Places, ["out", "--loss=bce", "a.py", "b"]) == Places("out", ["a.py", "b"], "bce")
    for argv, words in (
        ([], "FOLDER is missing"),
        (["out"], "FILES is missing"),
    ):
        with pytest.raises(UserError, match=words):
            parse(Places, argv)


def test_choices_and_numbers_that_may_be_words(file):
    def bag_size(value):
        return parse(Places, ["a", "b", f"--bag_size={value}"]).bag_size

    assert bag_size("4") == 4 and bag_size("8-4-2") == "8-4-2"
    with pytest.raises(UserError, match="loss must be one of mce, bce, got 'mse'"):
        parse(Places, ["a", "b", "--loss=mse"])


@pytest.mark.parametrize("value", ["nan", "-inf", "1e400", "1e31"])
def test_no_knob_takes_what_is_not_a_finite_number(file, value):
    assert "finite" in error(f"--learning_rate={value}")
    assert "a config file holds" in error(file("learning_rate = float('nan')\n"))
    with pytest.raises(UserError, match="finite"):
        validate(Knobs(learning_rate=float(value)))
    assert "finite" in error("--bag_size=" + "9" * 30)


def test_a_config_file_may_hold_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.py"
    path.write_bytes("\ufeff# Größe\nout_dir = 'größe'\r\nbag_size = 4\r\n".encode())
    assert parse(Knobs, [str(path)]) == Knobs(bag_size=4, out_dir="größe")


def test_a_tilde_after_the_equals_sign_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for given, wanted in (("~/x", "/home/me/x"), ("~", "/home/me"), ("a~/x", "a~/x"), ("~x", "~x")):
        assert parse(Knobs, [f"--out_dir={given}"]).out_dir == wanted


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

    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as train.py sets it for its imports
    try:
        with pytest.raises(SystemExit, match=line):
            entry_point(main, Knobs, [])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        entry_point(lambda config: 1 / 0, Knobs, [])


@pytest.mark.parametrize("stream", [None, io.StringIO()], ids=["closed", "a notebook's"])
def test_any_stdout_will_do(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    entry_point(print, Knobs, [])


def test_ranks_of_a_node_wait_for_the_first_to_say_what_they_all_met(monkeypatch, capsys):
    """torchrun ends them meanwhile."""
    waited = []
    monkeypatch.setattr(configurator.time, "sleep", waited.append)
    before = signal.getsignal(signal.SIGTERM)
    for rank in ("0", "1", ""):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit, match="unknown key"):
            entry_point(print, Knobs, ["--x=1"])
    assert waited == [10] and signal.signal(signal.SIGTERM, before) is signal.SIG_DFL


# ---- all scripts

SCRIPTS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(ROOT.glob("**/*.py"))
    if not path.relative_to(ROOT).parts[0].startswith((".", "out"))
    and not path.name.startswith("test_")
    if "class Config:" in (text := path.read_text(encoding="utf-8"))
    and 'if __name__ == "__main__":' in text
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_knob_of_every_script_has_a_help_text(name):
    page, config = help_text(importlib.import_module(name).Config), sys.modules[name].Config
    for field in dataclasses.fields(config):
        place = field.default is dataclasses.MISSING
        shown = field.name.upper() if place else rf"--{field.name}=\S*"
        assert re.search(rf"^  {shown} +\S", page, re.M), f"{field.name} of {name} has no help text"


def test_scripts_are_found():
    assert {"train", "sample", "tools.plot", "data.text.prepare"} <= set(SCRIPTS)
