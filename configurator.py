"""Knobs from config files and the command line, checked against a dataclass.

    python train.py config/curves.py --bag_size=4 --compile=off

Later ones win. A config file is Python made of plain assignments. It is read, not run: only numbers, strings, and
arithmetic on numbers are taken. Every key must be a field of the dataclass and every value of its type.
"""

import ast
import dataclasses
import difflib
import inspect
import operator
import os
import re
import sys

import torch

ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow}


def fail(message):
    """Stop with one line on stderr and exit status 1."""
    sys.exit(f"error: {message}")


def one_of(config, **choices):
    """Stop with a one-line message if a knob is none of its choices."""
    for key, values in choices.items():
        if getattr(config, key) not in values:
            fail(f"{key} must be one of {', '.join(values)}, got {getattr(config, key)!r}")


def pick_device(name, local_rank=0):
    """The device that a knob names, as torch knows it: auto (a GPU if there is one), cpu, mps, cuda (the rank's own GPU) or
    cuda:N. Stops with a one-line message if it is not there."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        fail(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")
    if name == "mps" and not torch.backends.mps.is_available():
        fail("device=mps, but PyTorch sees no Apple GPU")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return name
    name = name if ":" in name else f"cuda:{local_rank}"
    if not torch.cuda.is_available() or int(name[5:]) >= torch.cuda.device_count():
        fail(f"device={name}, but PyTorch sees {torch.cuda.device_count()} CUDA GPUs")
    return name


def evaluate(node):
    """Value of a literal, or of arithmetic on literals. Raises ValueError for anything else."""
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return ARITHMETIC[type(node.op)](evaluate(node.left), evaluate(node.right))
    return ast.literal_eval(node)


def read_file(path):
    """{key: value} of the assignments in a config file."""
    try:
        with open(path) as f:
            tree = ast.parse(f.read(), path)
    except OSError as e:
        fail(f"cannot read the config file {path}: {e.strerror}")
    except (SyntaxError, ValueError) as e:
        fail(f"{path} is not Python: {e}")
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        try:
            target, = node.targets
            values[target.id] = evaluate(node.value)
        except (AttributeError, ValueError, TypeError, ArithmeticError):
            fail(f"{path}:{node.lineno}: a config file holds assignments such as `bag_size = 4` and nothing else")
    return values


def typed(key, value, kind, where):
    """`value`, a string from the command line or a literal from a file, as int, float, bool or str."""
    if isinstance(value, str) and kind is not str:
        text = value.strip().replace("_", "")
        try:
            if kind is bool:
                return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
            if kind is int and re.fullmatch(r"[+-]?\d+(\.\d*)?e\+?\d+", text, re.I):  # 2e6 is a fine way to write a count
                value = float(text)
            else:
                return kind(text)
        except (ValueError, KeyError):
            fail(f"{where}: {key} takes {kind.__name__}, got {value!r}")
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        fail(f"{where}: {key} takes {kind.__name__}, got {value!r}")
    return value


def help_text(cls):
    """The dataclass as a --help page: its docstring, the comment lines between the fields as headings, the comment
    on a field's line as its description."""
    lines = [inspect.getdoc(cls)]
    for line in inspect.getsource(cls).splitlines():
        if m := re.match(r"    (\w+): \w+ = (.*?)(?:  # (.*))?$", line):
            lines.append(f"  --{m[1]}={m[2].strip(chr(34))}".ljust(36) + (m[3] or ""))
        elif m := re.match(r"    # (.*)", line):
            lines += ["", m[1]]
    return "\n".join(lines)


def parse(cls, argv):
    """A `cls` with the values of the config files and --key=value overrides in argv, in their order.

    --flag alone sets a bool to True. Stops with a one-line message for what it does not understand.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text(cls))
        sys.exit(0)
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    values = {}

    def put(key, value, where):
        if key not in kinds:
            close = [k for k in kinds if len(key) > 2 and (key.lower() in k or k in key.lower())]
            close = close or difflib.get_close_matches(key.lower(), kinds, 2)
            fail(f"{where}: unknown key {key!r}" + (f", did you mean {' or '.join(close)}?" if close else ", see --help"))
        values[key] = typed(key, value, kinds[key], where)

    for arg in argv:
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            key = key.replace("-", "_")
            if not equals and kinds.get(key) is not bool and key in kinds:
                fail(f"{arg}: write --{key}=VALUE")
            put(key, value if equals else True, arg)
        elif os.path.isfile(arg) or arg.endswith(".py"):
            for key, value in read_file(arg).items():
                put(key, value, arg)
        else:
            fail(f"{arg!r} is neither a config file nor --key=value, see --help")
    return cls(**values)
