"""Knobs from config files and the command line, checked against a dataclass, for every script.

    python train.py config/curves.py --bag_size=4 --compile=off

Later values win. A config file is Python, but it is read, not run: it holds assignments of strings, numbers
and arithmetic on numbers. The dataclass gives the knobs, their types and their help:

    steps: int = 100  # the comment on a field's line is its help text
    runs: list[str]  # a field without a default is positional; a list takes all that remain
    loss: Literal["mce", "bce"] = "mce"  # one of these
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import sys
import time
import traceback
from typing import Annotated, Literal, TypeVar, get_args, get_origin

from nanotst import UserError

T = TypeVar("T")
Free = Annotated[T, "free"]  # Free[int]: may differ on resume, since training stays the same
Bags = Annotated[T, "bags"]  # Bags[int]: has no effect without superposition
RENAMED = {"tokens_per_second": "positions_per_second", "z_coef": "router_z_coef"}  # November 2026
LARGEST = {int: 2**63, float: 1e30}  # float32 ends at 3.4e38
WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
ARITHMETIC = ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Constant


def entry_point(main, cls, argv=None, known=None):
    """Call main(knobs). An error that the user can act on is printed as one line, with exit status 1.

    known(knobs): dict of values for knobs that the command line does not give."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not if it is closed, or a notebook's
            stream.reconfigure(errors="replace")  # the terminal may lack a character
    argv = sys.argv[1:] if argv is None else argv
    try:
        config = parse(cls, argv)
        main(parse(cls, argv, known(config)) if known else config)
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it exits
        sys.exit(1)
    except (UserError, OSError) as e:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)  # or torchrun ends rank 0 before it says what they all met
        text = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else str(e)
        sys.exit(f"error: {' '.join(text.splitlines())}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:
        full = isinstance(e, MemoryError) or re.search("out of memory|allocate memory", str(e))
        if full and hasattr(cls, "checkpoint_activations"):
            todo = "use a smaller --batch_size (same total batch) or --checkpoint_activations"
            sys.exit(f"error: out of memory: {todo}")
        if "RANK" not in os.environ:
            raise
        traceback.print_exc()
        os._exit(1)  # Python's own exit waits for threads, and NCCL for ranks that are gone


def parse(cls, argv, known=()):
    """A `cls` from --key=value (--flag alone is True), positional arguments and, for a class without these,
    config files. Missing values come from `known`, then the defaults. Raises UserError for anything else."""
    if "-h" in argv or "--help" in argv:
        print(help_text(cls))
        sys.exit(0)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    positional = [field for field in fields.values() if field.default is dataclasses.MISSING]
    values, takes_positional = dict(known), bool(positional)
    for arg in argv:
        given = {}
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            given = {key.replace("-", "_"): value if equals else True}
        elif positional and positional[0].type == list[str]:
            values.setdefault(positional[0].name, []).append(arg)
        elif positional:
            values[positional.pop(0).name] = arg
        elif not takes_positional and (os.path.isfile(arg) or arg.endswith(".py")):
            given = read_file(arg)
        else:
            raise UserError(f"{arg!r} is neither a config file nor --key=value, see --help")
        for key, value in given.items():
            values[key] = typed(fields, key, value, arg)
    if missing := [field.name.upper() for field in positional if field.name not in values]:
        raise UserError(f"{missing[0]} is missing, see --help")
    return cls(**values)


def renamed(values):
    """A dict of knobs or metrics of an old run with today's names for its keys."""
    return {RENAMED.get(key, key): value for key, value in values.items()}


def marked(cls, mark):
    """Names of the fields of a dataclass that carry a mark, Free or Bags."""
    name = mark.__metadata__
    return {f.name for f in dataclasses.fields(cls) if getattr(f.type, "__metadata__", ()) == name}


def type_of(field):
    """The type of a field, without its mark."""
    return get_args(field.type)[0] if get_origin(field.type) is Annotated else field.type


def typed(fields, key, value, where):
    """`value`, a string from the command line or a literal from a file, in the type of its field. Raises
    UserError, which names `where` it was given."""
    if key not in fields:
        close = difflib.get_close_matches(key.lower(), fields, 2)
        hint = f", did you mean {' or '.join(close)}?" if close else ", see --help"
        raise UserError(f"{where}: unknown key {key!r}{hint}")
    kind, given = type_of(fields[key]), f"got {value!r:.60}"
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UserError(f"{where}: {key} must be one of {', '.join(get_args(kind))}, {given}")
        return value
    if kind == int | str:  # such as bag_size, 4 or "8-4-2"
        kind = int if str(value).isdecimal() else str
    with contextlib.suppress(ValueError, KeyError, OverflowError):
        if kind in (int, float) and type(value) in (int, float, str):
            number = float(value)  # 2e6 is a fine way to write a count
            value = int(number) if kind is int and number.is_integer() else number
        elif kind is bool and isinstance(value, str):
            value = WORDS[value.lower()]
    if type(value) is not kind:
        raise UserError(f"{where}: {key} takes {kind.__name__}, {given}; write --{key}=VALUE")
    if kind in LARGEST and not abs(value) < LARGEST[kind]:
        raise UserError(f"{where}: {key} takes a finite number below {LARGEST[kind]:g}, {given}")
    # the shell leaves ~ as it is after the = of --out_dir=~/x
    return re.sub(r"^~(?=/|$)", os.path.expanduser("~"), value) if kind is str else value


def read_file(path):
    """{key: value} of the assignments in a config file. Raises UserError if it holds anything else."""
    try:
        with open(path, "rb") as f:
            tree = ast.parse(f.read(), path)  # bytes: UTF-8 in any locale, byte-order mark or not
    except (SyntaxError, ValueError) as e:
        raise UserError(f"{path} is not Python: {e}") from None
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        try:
            (target,) = node.targets
            kinds = {type(n) for n in ast.walk(node.value)}  # no minus: 8-4-2 would be 2
            if ast.Sub in kinds or not all(issubclass(kind, ARITHMETIC) for kind in kinds):
                raise ValueError
            values[target.id] = eval(compile(ast.Expression(node.value), path, "eval"))
        except (AttributeError, ValueError, TypeError, ArithmeticError):
            wanted = 'a config file holds only assignments such as `bag_size = "8-4-2"`'
            raise UserError(f"{path}:{node.lineno}: {wanted}") from None
    return values


def help_text(cls):
    """The --help page of a dataclass: its docstring, headings between the fields, and a comment on each."""
    lines, fields = [inspect.getdoc(cls)], {f.name: f for f in dataclasses.fields(cls)}
    line = re.compile(r"^    (?:# (.*)|(\w+): [^#\n]*(?:# (.*))?)$", re.M)
    for heading, key, text in line.findall(inspect.getsource(cls)):
        if heading:
            lines += ["", heading]
        elif key in fields:
            default, kind = fields[key].default, type_of(fields[key])
            if os.path.isabs(str(default)):  # a folder of the repository
                default = os.path.relpath(default)
            shown = key.upper() if default is dataclasses.MISSING else f"--{key}={default}"
            choices = f" [{', '.join(get_args(kind))}]" if get_origin(kind) is Literal else ""
            lines.append(f"  {shown:33} ".replace("\n", "\\n") + text + choices)
    return "\n".join(lines)
