"""Knobs from config files and the command line, checked against a dataclass. Every script reads its knobs in
this way.

    python train.py config/curves.py --bag_size=4 --compile=off

Later ones win. A config file is Python made of plain assignments. It is read, not run: only numbers, strings,
and arithmetic on numbers are taken. Every key must be a field of the dataclass and every value of its type:

    steps: int = 100  # the comment on a field's line is its text in --help
    runs: list[str]  # a field without a default is given by its place, a list takes all that remain
    loss: Literal["mce", "bce"] = "mce"  # one of these
"""

import ast
import dataclasses
import difflib
import inspect
import io
import math
import operator
import os
import re
import signal
import sys
import textwrap
import tokenize
from typing import Annotated, Literal, TypeVar, get_args, get_origin

from nanotst import UserError

ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
T = TypeVar("T")
Free = Annotated[
    T, "free"
]  # Free[int]: may differ when a run is resumed; changes nothing that is learned
Bags = Annotated[T, "bags"]  # Bags[int]: does nothing without superposition
LARGEST_FILE = 2**20  # bytes of a config file
LARGEST = 1e30  # number of a knob: float32 ends at 3.4e38


def entry_point(main, cls, argv=None, known=None):
    """An entry point: main(the knobs of the command line), with what a user can act on printed as one line,
    exit 1. known(knobs): values of the knobs that the command line does not give, a dict."""
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # whatever the terminal's encoding, a text never ends the program
        stream.reconfigure(errors="replace")
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    ):  # a script may have set it, for its imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            config = parse(cls, argv)
            config = parse(cls, argv, known(config)) if known else config
        except UserError:
            if int(
                os.environ.get("RANK", 0)
            ):  # all ranks have the same command line, and rank 0 says it
                sys.exit(1)
            raise
        main(config)
    except UserError as e:
        sys.exit(f"error: {' '.join(str(e).splitlines())}")  # a path may hold a line end
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone
        # or Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        text = f"{e.filename}: {e.strerror}" if e.filename and e.strerror else str(e)
        sys.exit(f"error: {' '.join(text.splitlines())}")


def parse(cls, argv, known=()):
    """A `cls` with the values of the arguments: --key=value, places, and, for a class without places, config
    files. What they do not give is as in `known`, or by default.

    --flag alone sets a bool to True, -h or --help prints a page and exits. Raises UserError for what it does
    not understand.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text(cls))
        sys.exit(0)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    places = [name for name, field in fields.items() if is_place(field)]
    values, positional = dict(known), []
    for arg in argv:
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            key = key.replace("-", "_")
            field = fields.get(key)
            if field and not equals and type_of(field) is not bool:
                raise UserError(f"{arg}: write --{key}=VALUE")
            values[key] = typed(field, key, value if equals else True, arg, fields)
        elif places:
            positional.append(arg)
        elif os.path.isfile(arg) or arg.endswith(".py"):
            for key, value in read_file(arg).items():
                values[key] = typed(fields.get(key), key, value, arg, fields)
        else:
            raise UserError(f"{arg!r} is neither a config file nor --key=value, see --help")
    for name in places:
        if name in values:
            raise UserError(f"{name} is given by its place, without --{name}=, see --help")
        takes = len(positional) if type_of(fields[name]) == list[str] else 1
        taken, positional = positional[:takes], positional[takes:]
        if not taken:
            raise UserError(f"{name.upper()} is missing, see --help")
        values[name] = taken if type_of(fields[name]) == list[str] else taken[0]
    if positional:
        raise UserError(f"do not know what to do with {positional[0]!r}, see --help")
    return cls(**values)


def validate(config):
    """Raise UserError unless each value of a config made in Python is what the command line would take."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    for key, field in fields.items():
        typed(field, key, getattr(config, key), "config", fields)


def marked(cls, mark):
    """Names of the fields of a dataclass that carry a mark, Free or Bags."""
    name = mark.__metadata__
    return {f.name for f in dataclasses.fields(cls) if getattr(f.type, "__metadata__", ()) == name}


def type_of(field):
    """The type of a field, without its mark."""
    return get_args(field.type)[0] if get_origin(field.type) is Annotated else field.type


def is_place(field):
    """Whether a field is given by its place."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def typed(field, key, value, where, fields):
    """`value`, a string from the command line or a literal from a file, in the type of its field."""
    if field is None:
        close = [k for k in fields if len(key) > 2 and (key.lower() in k or k in key.lower())]
        close = close or difflib.get_close_matches(key.lower(), fields, 2)
        raise UserError(
            f"{where}: unknown key {key!r}"
            + (f", did you mean {' or '.join(close)}?" if close else ", see --help")
        )
    kind = type_of(field)
    if get_origin(kind) is Literal:
        if value not in get_args(kind) or type(value) is not str:
            raise UserError(
                f"{where}: {key} must be one of {', '.join(get_args(kind))}, got {abbreviated(value)}"
            )
        return value
    if kind == int | str:  # such as bag_size, 4 or "8-4-2"
        number = (
            type(value) is int or type(value) is str and re.fullmatch(r"[+-]?\d+", value.strip())
        )
        kind = int if number else str
    wrong = UserError(f"{where}: {key} takes {kind.__name__}, got {abbreviated(value)}")
    if isinstance(value, str) and kind is not str:
        text = value.strip().replace("_", "")
        try:
            if kind is bool:
                words = {
                    "true": True,
                    "1": True,
                    "yes": True,
                    "false": False,
                    "0": False,
                    "no": False,
                }
                value = words[text.lower()]
            elif kind is int and re.fullmatch(r"[+-]?\d+(\.\d*)?e\+?\d+", text, re.I):
                value = float(text)  # 2e6 is a fine way to write a count
            else:
                value = kind(text)
        except (ValueError, KeyError):
            raise wrong from None
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is float and type(value) is int and abs(value) < 2**1023:
        value = float(value)
    if type(value) is not kind:
        raise wrong
    if kind is int and abs(value) >= 2**63 or kind is float and not abs(value) <= LARGEST:
        what = "of 64 bits" if kind is int else f"up to {LARGEST:g}"
        raise UserError(f"{where}: {key} takes a finite number {what}, got {abbreviated(value)}")
    return value


def abbreviated(value):
    """The beginning of a value, for people."""
    try:
        return f"{value!r:.60}"
    except ValueError:  # Python prints no number of more than 4300 digits
        return "a number of thousands of digits"


def read_file(path):
    """{key: value} of the assignments in a config file. Raises UserError for a file that holds anything
    else."""
    try:
        with open(path, "rb") as f:
            source = f.read(LARGEST_FILE + 1)
        if len(source) > LARGEST_FILE:
            raise UserError(f"{path} is too large for a config file")
        tree = ast.parse(
            source, path
        )  # from bytes: UTF-8 whatever the locale, a byte-order mark or none
    except OSError as e:
        raise UserError(f"cannot read the config file {path}: {e.strerror}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise UserError(f"{path} is not Python: {e}") from None
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        try:
            (target,) = node.targets
            values[target.id] = value_of(node.value)
        except (
            AttributeError,
            ValueError,
            TypeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ):
            raise UserError(
                f"{path}:{node.lineno}: a config file holds assignments such as `bag_size = 4` "
                "and nothing else"
            ) from None
    return values


def value_of(node):
    """Value of a literal, or of arithmetic on numbers. Raises ValueError for anything else, and for huge
    powers."""
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = value_of(node.left), value_of(node.right)
        if not all(type(x) in (int, float) for x in (left, right)):
            raise ValueError("arithmetic is for numbers")
        if isinstance(node.op, ast.Pow) and abs(right) * math.log2(abs(left) + 2) > 1024:
            raise ValueError("a power beyond all knobs")
        return ARITHMETIC[type(node.op)](left, right)
    return ast.literal_eval(node)


def help_text(cls):
    """The dataclass as a --help page: its docstring, the comment lines between the fields as headings, the
    comment of a field, on its line or within its brackets, as its description."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokens
        if token.type == tokenize.COMMENT
    }
    fields = {
        node.lineno: node
        for node in ast.parse(source).body[0].body
        if isinstance(node, ast.AnnAssign)
    }
    lines, kinds = (
        [inspect.getdoc(cls)],
        {field.name: type_of(field) for field in dataclasses.fields(cls)},
    )
    for n in sorted(comments | fields):
        if node := fields.get(n):
            name = node.target.id
            text = " ".join(comments.pop(i) for i in range(n, node.end_lineno + 1) if i in comments)
            if get_origin(kinds[name]) is Literal:
                text += f" [{', '.join(get_args(kinds[name]))}]"
            default = node.value and ast.get_source_segment(source, node.value).strip(chr(34))
            if isinstance(node.value, ast.Call):  # not as it is written: a folder
                default = os.path.relpath(getattr(cls, name))
            shown = name.upper() if default is None else f"--{name}={default}"
            lines.append(f"  {shown}".ljust(36) + text)
        elif n in comments:
            lines += ["", comments[n]]
    return "\n".join(lines)
