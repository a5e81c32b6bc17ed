"""How fast training is, as ratios measured in one run.

    python -m tools.bench                              sizes that suit the GPU, or the CPU if there is none
    python -m tools.bench --parts=loss,step --json=bench.json
    python -m tools.bench --parts=nanogpt --nanogpt=FOLDER     against a clone of karpathy/nanoGPT

The variants of a part take turns, so a machine whose speed drifts slows all of them alike; medians are shown.
Memory is the peak that PyTorch's allocator holds above what it held before the call.
"""

import itertools
import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import train  # before torch: it sets how threads wait and how memory grows on CUDA

# isort: split
import numpy as np
import torch
import torch.nn.functional as F

from model import GPT
from nanotst import USERS_ENVIRONMENT, UserError
from nanotst.checkpoint import model_config
from nanotst.configurator import entry_point, parse
from nanotst.kernels import linear_multi_hot_cross_entropy, use_twins
from nanotst.machine import Machine
from nanotst.optim import make_optimizer
from nanotst.parallel import clip_gradients, compile_model
from nanotst.stream import TokenStream
from tools.runs import markdown_table
from tst import bags_and_labels, multi_hot_cross_entropy, phase_list

ROOT = Path(train.__file__).parent
os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler need not report its stages


@dataclass
class Config:
    """Usage: python -m tools.bench [--key=value ...]"""

    parts: str = "roofline,loss,step,moe,loader"  # any of these, and nanogpt
    device: str = "auto"  # auto, cpu, cuda
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # dtype of matrix products
    compile: Literal["auto", "on", "off", "graphs"] = "auto"  # as in train.py
    shape: str = ""  # step, nanogpt: a file of config/; empty: gpt2_124m on cuda, else curves
    rows: int = 0  # step, moe, nanogpt: rows of a micro-batch; 0: the config's
    bag_sizes: str = "1,2,4,8,16"  # step: bag sizes
    positions: int = 0  # loss: positions; 0: 8192 on cuda, else 4096
    repeats: int = 7  # repetitions of each variant; for nanogpt runs of each trainer, at most 3
    threads: int = 0  # CPU threads; 0: PyTorch's choice
    json: str = ""  # file for all figures
    nanogpt: str = ""  # folder of a clone of karpathy/nanoGPT


# The corpora that configs name need not be there: bytes, GPT-2's tokens (padded as in nanoGPT), Llama 3's.
VOCAB_SIZES = dict.fromkeys(["python_source", "english"], 256) | {"openwebtext": 50304}
VOCAB_SIZES |= dict.fromkeys(["dclm", "dclm:0.5,fineweb_edu:0.5"], 128256)


class Bench:
    """The machine, its clock and memory, and the figures found so far."""

    def __init__(self, c):
        self.c, self.machine = c, Machine.start(c)
        self.device, self.cuda = self.machine.device, self.machine.device_type == "cuda"
        self.wait = torch.cuda.synchronize if self.cuda else lambda: None
        self.dtype = getattr(torch, self.machine.dtype)
        self.compiled = self.cuda if c.compile == "auto" else c.compile != "off"
        self.shape = c.shape or ("gpt2_124m" if self.cuda else "curves")
        self.bag_sizes = [int(s) for s in c.bag_sizes.split(",")]
        self.figures = self.machine.versions() | {"compiled": self.compiled, "command": sys.argv}
        print(", ".join(f"{key} {value}" for key, value in self.figures.items()))

    def seconds(self, variants):
        """Median seconds of {name: function}, called in turn after one call that does not count. On CUDA five
        calls are timed together: training, too, seldom waits for the GPU."""
        times, calls = {name: [] for name in variants}, 5 if self.cuda else 1
        for variant in variants.values():
            variant()
        for _ in range(self.c.repeats):
            for name, variant in variants.items():
                self.wait()
                start = time.perf_counter()
                for _ in range(calls):
                    variant()
                self.wait()
                times[name].append((time.perf_counter() - start) / calls)
        return {name: statistics.median(ts) for name, ts in times.items()}

    def table(self, title, rows):
        """Print rows, dicts of column to number or text, and keep them. Adds ratios to the first row."""
        self.figures[title] = rows
        for key in ("ms", "MB", "tokens/s"):
            for row in rows if key in rows[0] else ():
                row[f"{key} / first"] = row[key] / rows[0][key]
        text = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
        cells = [list(rows[0]), *([text(value) for value in row.values()] for row in rows)]
        print(f"\n{title}\n\n{markdown_table(cells)}")


def extra_memory(variant, cuda):
    """The most bytes that a call has allocated and not yet freed."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        variant()
    # not profiler.events(), which adds memory up by operator and so loses its order
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))


def busy_seconds(variant):
    """Seconds that the GPU's kernels take in a call."""
    with torch.profiler.profile() as profiler:
        variant()
        torch.cuda.synchronize()
    on_gpu = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.time_range.elapsed_us() for e in on_gpu if not e.is_user_annotation) / 1e6


def roofline(b):
    """Two ceilings of this machine: the rates of a large matrix product and of a large copy."""
    n = 8192 if b.cuda else 2048
    x, y = (torch.randn(n, n, device=b.device, dtype=b.dtype) for _ in range(2))
    big = torch.randn(2**30 if b.cuda else 2**26, device=b.device)
    t = b.seconds({"product": lambda: x @ y, "copy": lambda: big.clone()})
    rates = {f"TFLOP/s of {n} x {n}": 2 * n**3 / t["product"] / 1e12}
    b.table("roofline", [rates | {"copy GB/s": 2 * big.nbytes / t["copy"] / 1e9}])


def loss(b):
    """The loss alone, forward and backward, from hidden states."""
    N, C, V = b.c.positions or (8192 if b.cuda else 4096), 768 if b.cuda else 256, 50304
    hidden = torch.randn(N, C, device=b.device, dtype=b.dtype, requires_grad=True)  # (N, C)
    weight = (torch.randn(V, C, device=b.device) * 0.02).requires_grad_()  # (V, C)
    logits = lambda: (hidden @ weight.to(b.dtype).T).float()  # (N, V)

    def cross_entropies(labels):  # the paper's loop; with one label, ordinary cross-entropy
        z = logits()
        return sum(F.cross_entropy(z, y) for y in labels.T) / labels.size(1)

    def once(f, labels):
        hidden.grad = weight.grad = None
        f(labels).backward()

    kinds = {
        "cross-entropies": cross_entropies,
        "plain MCE": lambda labels: multi_hot_cross_entropy(logits(), labels),
        "fused MCE": lambda labels: linear_multi_hot_cross_entropy(hidden, weight, labels),
    }
    variants, rows = {}, []
    for (name, f), s in itertools.product(kinds.items(), (1, 8, 16)):
        # the paper's loop keeps a softmax for each label
        if f != cross_entropies or s == 1 or (s + 10) * 4 * N * V < 0.8 * b.machine.memory:
            f = torch.compile(f, dynamic=False) if b.compiled else f
            variants[name, s] = partial(once, f, torch.randint(V, (N, s), device=b.device))
    for (name, s), seconds in b.seconds(variants).items():
        hidden.grad = weight.grad = None  # or the gradients before would be freed in this call
        megabytes = extra_memory(variants[name, s], b.cuda) / 1e6
        rows.append({"loss": name, "s": s, "ms": seconds * 1e3, "MB": megabytes})
    b.table(f"loss alone, N {N}, V {V}, C {C}", rows)


def read_shape(b, name, **changes):
    """(GPTConfig, rows of a micro-batch, knobs) of config/NAME.py with `changes`."""
    arguments = [str(ROOT / "config" / f"{name}.py"), f"--compile={b.c.compile}"]
    knobs = replace(parse(train.Config, arguments), **changes)
    rows = b.c.rows or knobs.batch_size or knobs.total_batch // knobs.block_size
    return model_config(vars(knobs), {"vocab_size": VOCAB_SIZES.get(knobs.dataset)}), rows, knobs


class Step:
    """A training step: forward and backward on a micro-batch of bags of s tokens, then update(), a fixed
    part. b, name, changes: see read_shape."""

    def __init__(self, b, name, **changes):
        self.b, (shape, self.rows, knobs) = b, read_shape(b, name, **changes)
        torch.manual_seed(0)
        with torch.device(b.device):
            self.model = self.net = GPT(shape)
        use_twins(self.model, b.machine, [(s, s) for s in b.bag_sizes])
        if b.compiled and not (shape.n_expert and b.dtype == torch.float32):  # which cannot compile
            self.net = compile_model(self.model, b.c.compile)
        self.optimizer = make_optimizer(self.model, knobs, b.machine.device_type)
        self.positions = self.rows * shape.block_size
        self.micro_steps = max(1, knobs.total_batch // self.positions)  # of the config's step

    def __call__(self, s):
        self.optimizer.zero_grad()
        shape = self.model.config
        size = self.rows, (shape.block_size + 1) * s
        tokens = torch.randint(shape.vocab_size, size, dtype=torch.int32, device=self.b.device)
        with self.b.machine.autocast():
            loss, routing = self.net(*bags_and_labels(tokens, s, s))
        (loss + 0.001 * routing["balance_loss"].mean() if routing else loss).backward()
        self.update()

    def update(self):
        clip_gradients(self.model, 1.0)
        self.optimizer.step()


def time_steps(b, title, variants):
    """Table of {name: (Step, s)}. The config's step has more micro-steps and one update: a second MFU."""
    calls, rows = {name: partial(step, s) for name, (step, s) in variants.items()}, []
    times = b.seconds(calls | {step: step.update for step, _ in variants.values()})
    for name, (step, _) in variants.items():
        seconds, update, n = times[name], times[step], step.micro_steps
        flops = step.positions * step.model.flops_per_position()
        row = {"": name, "active parameters": step.model.n_params(active=True)}
        row |= {"ms": seconds * 1e3, "ms of update": update * 1e3}
        row |= {"positions/s": round(step.positions / seconds), "TFLOP/s": flops / seconds / 1e12}
        if peak := b.machine.peak_flops:
            whole = n * seconds - (n - 1) * update
            row |= {"MFU": flops / seconds / peak, f"at {n} micro-steps": n * flops / whole / peak}
        if b.cuda:
            row["busy"] = busy_seconds(calls[name]) / seconds  # share of the time, of its kernels
        rows.append(row)
    b.table(title, rows)


def step(b):
    """A training step at several bag sizes."""
    one = Step(b, b.shape)
    title = f"training step, {b.shape}, {one.rows} rows of {one.model.config.block_size}"
    time_steps(b, title, {f"s {s}": (one, s) for s in b.bag_sizes})


def moe(b):
    """A mixture of experts against a dense model with as many active parameters."""
    name, changes, ff_dim, kinds = "curves", dict(n_head=2, n_embd=128), 384, [(8, 2), (32, 4)]
    if b.cuda:
        name, changes, ff_dim, kinds = "gpt2_124m", {}, 2048, [(16, 2), (64, 8), (128, 8)]
    changes |= dict(qk_norm=True, batch_size=32)
    variants = {}
    for n, k in [(0, 1), *kinds]:
        kind = f"{n} experts, top {k}" if n else "dense"
        variants[kind] = Step(b, name, n_expert=n, top_k=k, ff_dim=ff_dim // k, **changes), 1
    time_steps(b, "mixture of experts against dense at equal active parameters", variants)


def loader(b):
    """Tokens that the stream reads."""
    rows, L, reads = 64, 1024, {}
    tokens = np.resize(np.arange(50257, dtype=np.uint16), 100_000_000)  # any text will do
    for s in (1, 4, 16):
        stream = TokenStream([(tokens, 1)], L, phase_list(10**6, [s], 1.0), rows, range(rows))
        reads[s] = map(stream.read, range(10**6)).__next__
    times = b.seconds(reads).items()
    table = [{"s": s, "million tokens/s": rows * L * s / t / 1e6} for s, t in times]
    b.table(f"loader, {rows} rows of {L}, uint16", table)


def time_trainer(folder, arguments):
    """Median ms of the steps of a train.py, nanoGPT's or ours, from the ninth on."""
    how = dict(cwd=folder, env=USERS_ENVIRONMENT, capture_output=True, text=True)
    out = subprocess.run([sys.executable, "train.py", *arguments.split()], **how)
    steps = re.findall(r"^(?:iter|step) +(\d+)[:/].* ([\d.]+) ?ms\b", out.stdout, re.M)
    found = [float(ms) for step, ms in steps if int(step) > 8]
    if not found or out.returncode:
        raise UserError(f"train.py in {folder} gave no times: {out.stderr[-300:]}")
    return statistics.median(found)


def nanogpt(b):
    """train.py against nanoGPT's own, in turn, with the same shape, batch and text: random words, as frequent
    as in a language (Zipf's law)."""
    if not Path(b.c.nanogpt, "configurator.py").exists():
        raise UserError("--nanogpt must name a clone of karpathy/nanoGPT")
    shape, rows, _ = read_shape(b, b.shape)
    L, V, n_runs = shape.block_size, shape.vocab_size, min(3, b.c.repeats)
    words = (V ** np.random.default_rng(0).random(4_000_000) - 1).astype(np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            words.tofile(f"{folder}/{split}.bin")
        Path(folder, "meta.pkl").write_bytes(pickle.dumps({"vocab_size": V}))
        common = f"--dataset={folder} --block_size={L} --device={b.machine.device_type}"
        common += f" --eval_interval=100000 --log_interval=1 --out_dir={folder}/out"
        theirs = f"{common} --batch_size={rows} --n_layer={shape.n_layer} --n_head={shape.n_head}"
        theirs += f" --n_embd={shape.n_embd} --gradient_accumulation_steps=1"
        theirs += f" --max_iters=40 --eval_iters=1 --compile={b.cuda and b.compiled}"
        ours = f"config/{b.shape}.py {common} --overwrite --bag_size=1 --total_batch={rows * L}"
        ours += " --batch_size=0 --max_steps=40 --eval_positions=1 --save_interval=0"
        ours += f" --dtype={b.c.dtype} --compile={b.c.compile}"
        trainers = {"nanoGPT": (b.c.nanogpt, theirs), "nanoTST": (ROOT, ours)}
        runs = [{name: time_trainer(*how) for name, how in trainers.items()} for _ in range(n_runs)]
    table = []
    for name in trainers:
        times = [run[name] for run in runs]
        row = {"trainer": name, "ms": statistics.median(times), "runs": str(times)}
        table.append(row | {"tokens/s": round(rows * L / row["ms"] * 1e3)})
    b.table(f"against nanoGPT's train.py, {b.shape}, {rows} rows of {L}", table)


PARTS = {part.__name__: part for part in (roofline, loss, step, moe, loader, nanogpt)}


def main(c):
    parts = c.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"parts are {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    b = Bench(c)
    for part in parts:
        torch.compiler.reset()  # its limit of 8 graphs counts all models together
        PARTS[part](b)
        if c.json:  # after each part, for a run that is cut short
            Path(c.json).write_text(json.dumps(b.figures, indent=1))


if __name__ == "__main__":
    entry_point(main, Config)
