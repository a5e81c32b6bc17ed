"""How fast it is, as ratios measured in one run.

    python -m tools.bench                              in sizes that suit a CPU, or the GPU if there is one
    python -m tools.bench --parts=loss,step --json=bench.json
    python -m tools.bench --parts=nanogpt --nanogpt=FOLDER     against train.py of a clone of karpathy/nanoGPT

Within a part the variants take turns, one repetition each, so that a machine whose speed drifts slows all of
them; the table gives medians. Memory is the peak above what was held before the call: of the allocator on
CUDA, of the process on Linux.
"""

import ctypes
import dataclasses
import itertools
import json
import math
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as train.py

import numpy as np
import torch
import torch.nn.functional as F

from model import GPT
from nanotst import UserError
from nanotst.checkpoint import model_config
from nanotst.configurator import entry_point, read_file
from nanotst.kernels import linear_loss, linear_multi_hot_cross_entropy, use_twins
from nanotst.machine import Machine
from nanotst.stream import TokenStream
from tst import LOSSES, bags_and_labels, multi_hot_cross_entropy, phase_list

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    """Usage: python -m tools.bench [--key=value ...]"""

    parts: str = "roofline,loss,step,moe,loader"  # of roofline, loss, step, moe, loader, nanogpt
    device: str = "auto"  # auto, cpu, cuda
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of matrix products
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto is on for cuda
    shape: str = ""  # of step and nanogpt, a file of config/; empty: gpt2_124m, for nanogpt curves
    rows: int = (
        0  # of a micro-batch in step and nanogpt; 0: as in the config, on a CPU see CPU_CONTEXT
    )
    bag_sizes: str = "1,2,4,8,16"  # of step
    positions: int = 0  # of loss; 0: 8192 on cuda, else 4096
    losses: str = ""  # of loss: further ones of tst.LOSSES, such as mce_alt,bce,hinge
    repeats: int = 7  # of each variant; in nanogpt, runs of each trainer, at most 3
    threads: int = 0  # CPU threads; 0: PyTorch's choice
    plain: bool = False  # measure the plain code of model.py and tst.py, without faster twins
    profile: str = (
        ""  # write a trace of steps at all bag sizes here, for chrome://tracing or Perfetto
    )
    json: str = ""  # write all figures to this file
    nanogpt: str = ""  # folder of a clone of karpathy/nanoGPT


# Of the corpora that configs name, none of which needs to be there: bytes, GPT-2's tokens (padded, as
# in nanoGPT), Llama 3's.
VOCAB_SIZES = {
    "python_source": 256,
    "english": 256,
    "openwebtext": 50304,
    "dclm": 128256,
    "dclm:0.5,fineweb_edu:0.5": 128256,
}
CPU_CONTEXT = 256  # on a CPU a config of a longer context is measured as one row of this length


class Bench:
    """The machine, its clock and memory, and the figures found so far."""

    def __init__(self, c):
        self.c = c
        self.machine = Machine.start(c)
        self.device, self.cuda = self.machine.device, self.machine.device_type == "cuda"
        self.dtype = getattr(torch, self.machine.dtype)
        self.compiled = (
            c.compile == "on" or c.compile == "auto" and self.cuda and self.compiler_works()
        )
        name = self.machine.name
        if not self.cuda:
            amx = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
            name += f", {torch.backends.cpu.get_cpu_capability()}{amx}"
        self.figures = {"device": name, "torch": str(torch.__version__), "dtype": self.machine.dtype,
                        "compiled": self.compiled, "command": sys.argv}  # fmt: skip
        how = "compiled" if self.compiled else "eager"
        print(f"{name}, torch {torch.__version__}, {self.machine.dtype}, {how}")

    def compiler_works(self):
        """Whether torch.compile has what it needs here, a C compiler for example: tried on two operations."""
        try:
            torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=self.device))
            return True
        except Exception as e:
            reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
            print(f"torch.compile does not work here ({reason}); all is measured without it")
            return False

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, variants, repeats=None):
        """Median seconds of each of {name: function}, run in turn; one unmeasured call each comes first."""
        times = {name: [] for name in variants}
        for variant in variants.values():
            variant()
        for _ in range(repeats or self.c.repeats):
            for name, variant in variants.items():
                self.wait()
                start = time.perf_counter()
                variant()
                self.wait()
                times[name].append(time.perf_counter() - start)
        return {name: statistics.median(ts) for name, ts in times.items()}

    def extra_memory(self, variant):
        """Peak bytes that a variant needs above what is held before it, None where this cannot be told. On a
        CPU it is memory of the process, holes between the tensors included."""
        self.wait()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            variant()
            self.wait()
            return torch.cuda.max_memory_allocated() - before
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed must count anew
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")  # resets the peak, VmHWM
            before = memory_of("/proc/self/status", "VmRSS")
            variant()
            return memory_of("/proc/self/status", "VmHWM") - before
        except (OSError, AttributeError):
            return None

    def free_memory(self):
        """Bytes that may still be allocated, as far as can be told."""
        if self.cuda:
            return torch.cuda.mem_get_info()[0]
        return (
            memory_of("/proc/meminfo", "MemAvailable")
            if os.path.exists("/proc/meminfo")
            else math.inf
        )

    def table(self, title, rows):
        """Print rows, dicts of column to number or text, under a title, and keep them as figures."""
        self.figures[title] = rows
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)
        cells = [columns] + [[text(row.get(column, "")) for column in columns] for row in rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        print(f"\n{title}")
        for line in cells:
            print("  " + "  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip())


def memory_of(path, key):
    """The bytes that a file of /proc gives for `key`."""
    with open(path) as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))


def read_shape(b, name, **changes):
    """config/NAME.py with `changes`, as it is measured here: (GPTConfig, rows of a micro-batch)."""
    path = ROOT / "config" / f"{name}.py"
    if not path.is_file():
        raise UserError(
            f"no shape {name!r}: config/ holds {', '.join(sorted(p.stem for p in path.parent.glob('*.py')))}"
        )
    knobs = read_file(str(path)) | changes
    if knobs["dataset"] not in VOCAB_SIZES:
        raise UserError(
            f"{path}: add the vocabulary of {knobs['dataset']} to VOCAB_SIZES in tools/bench.py"
        )
    shape = model_config(knobs, {"vocab_size": VOCAB_SIZES[knobs["dataset"]]})
    rows = knobs.get("batch_size") or knobs["total_batch"] // knobs["block_size"]
    if not b.cuda and shape.block_size > CPU_CONTEXT:
        shape, rows = dataclasses.replace(shape, block_size=CPU_CONTEXT), 1
    return shape, b.c.rows or rows


def roofline(b):
    """The two ceilings of this machine: rate of a large matrix product, and of a large copy (read plus
    written)."""
    n = 8192 if b.cuda else 2048
    x, y = (torch.randn(n, n, device=b.device, dtype=b.dtype) for _ in range(2))
    big = torch.randn(2**30 if b.cuda else 2**26, device=b.device)
    t = b.seconds({"product": lambda: x @ y, "copy": lambda: big.clone()})
    b.table("roofline", [{"matrix product": f"{n} x {n}", "TFLOP/s": 2 * n**3 / t["product"] / 1e12,
                          "copy GB/s": 2 * big.nbytes / t["copy"] / 1e9}])  # fmt: skip


def loss(b):
    """The loss alone, forward and backward, from hidden states: V 50,304, C 256 (768 on CUDA). `products` are
    the three matrix products that every form needs, and nothing else."""
    N, C, V = (8192, 768, 50304) if b.cuda else (4096, 256, 50304)
    N = b.c.positions or N
    hidden = torch.randn(N, C, device=b.device, dtype=b.dtype, requires_grad=True)
    weight = (torch.randn(V, C, device=b.device) * 0.02).requires_grad_()

    @torch.no_grad()
    def products():
        w = weight.to(b.dtype)
        z = hidden @ w.T
        hidden.grad, weight.grad = z @ w, (z.T @ hidden).float()

    def logits():
        return (hidden @ weight.to(b.dtype).T).float()

    def paper(labels):  # one cross-entropy per label of the bag, each with its own softmax
        z = logits()
        return sum(F.cross_entropy(z, labels[:, i]) for i in range(labels.size(1))) / labels.size(1)

    kinds = {
        "cross-entropy": lambda y: F.cross_entropy(logits(), y[:, 0]),
        "paper's loop": paper,
        "plain MCE": lambda y: multi_hot_cross_entropy(logits(), y),
        "fused MCE": lambda y: linear_multi_hot_cross_entropy(hidden, weight, y),
    }
    for name in filter(None, b.c.losses.split(",")):
        kinds[f"chunked {name}"] = lambda y, f=LOSSES[name]: linear_loss(f, hidden, weight, y)
    if b.compiled:
        kinds = {name: torch.compile(f, dynamic=False) for name, f in kinds.items()}
    variants = {("products", 1): products}
    for name, f in kinds.items():
        for s in (1,) if name == "cross-entropy" else (1, 8, 16):
            needed = (
                (s + 10) * 4 * N * V
            )  # bytes of the paper's loop, as measured: mostly a softmax a label
            if name == "paper's loop" and not b.compiled and needed > b.free_memory():
                print(f"  left out: {name} at s = {s}, which needs {needed / 1e9:.0f} GB")
                continue
            labels = torch.randint(0, V, (N, s), device=b.device)

            def variant(f=f, labels=labels):
                hidden.grad = weight.grad = None
                f(labels).backward()

            variants[name, s] = variant
    t = b.seconds(variants)
    memory = {}
    for key, variant in variants.items():
        hidden.grad = weight.grad = None  # or its predecessor's would be freed in the measured call
        memory[key] = b.extra_memory(variant) or 0
    base = "cross-entropy", 1
    b.table(f"loss alone, N {N}, V {V}, C {C}", [
        {"variant": name, "s": s, "ms": t[name, s] * 1e3, "time / cross-entropy": t[name, s] / t[base],
         "extra MB": memory[name, s] / 1e6, "memory / cross-entropy": memory[name, s] / (memory[base] or 1)}
        for name, s in variants])  # fmt: skip


def make_step(b, shape, rows, seed=0):
    """A model of `shape`, a GPTConfig, and a function that runs one training step of it at a given bag
    size."""
    torch.manual_seed(seed)
    with torch.device(b.device):
        model = GPT(shape)
    if not b.c.plain:
        use_twins(model, b.machine, [(s, s) for s in map(int, b.c.bag_sizes.split(","))])
    compiled = b.compiled and not (shape.n_expert and b.dtype == torch.float32)  # as train.py
    forward = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    words = dict(high=shape.vocab_size, dtype=torch.int32, device=b.device)

    def step(s):
        tokens = torch.randint(size=(rows, (shape.block_size + 1) * s), **words)
        bags, labels = bags_and_labels(tokens, s, s)
        with b.machine.autocast():
            loss, router = forward(bags, labels)
        (loss + 0.001 * router["balance_loss"].mean() if router else loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def steps(b):
    """A whole training step at several bag sizes."""
    name = b.c.shape or "gpt2_124m"
    shape, rows = read_shape(b, name)
    model, step = make_step(b, shape, rows)
    positions = rows * shape.block_size
    sizes, first = [int(s) for s in b.c.bag_sizes.split(",")], {}
    for s in sizes:
        start = time.perf_counter()
        step(s)
        b.wait()
        first[s] = time.perf_counter() - start
    t = b.seconds({s: lambda s=s: step(s) for s in sizes})
    table = []
    for s in sizes:
        memory = b.extra_memory(lambda s=s: step(s)) or 0
        flops = positions * model.flops_per_position() / t[s]
        mfu = {"MFU": flops / b.machine.peak_flops} if b.machine.peak_flops else {}
        table.append({"s": s, "ms": t[s] * 1e3, f"time / s = {sizes[0]}": t[s] / t[sizes[0]],
                      "positions/s": round(positions / t[s]), "data tokens/s": round(s * positions / t[s]),
                      "TFLOP/s": flops / 1e12, **mfu, "extra MB": memory / 1e6,
                      "first call s": first[s]})  # fmt: skip
    title = f"{name}: {model.n_params():,} parameters, {rows} rows of {shape.block_size}"
    b.table(f"training step, {title}", table)
    if b.c.profile:
        with torch.profiler.profile() as profiler:
            for s in sizes:
                step(s)
        profiler.export_chrome_trace(b.c.profile)
        print(f"  trace of steps at s = {b.c.bag_sizes} in {b.c.profile}")


def moe(b):
    """A mixture of experts against a dense model with as many active parameters. Shapes of their own: no
    config has both."""
    if b.cuda:
        base, wide, variants = ("gpt2_124m", dict(qk_norm=True)), 2048, ((16, 2), (64, 8), (128, 8))
    else:
        base, wide, variants = (
            ("curves", dict(n_head=2, n_embd=128, qk_norm=True)),
            384,
            ((8, 2), (32, 4)),
        )
    rows, kinds = 32, {"dense": dict(ff_dim=wide)}
    for n_expert, top_k in variants:
        kinds[f"{n_expert} experts, top {top_k}"] = dict(
            ff_dim=wide // top_k, n_expert=n_expert, top_k=top_k
        )
    models = {}
    for name, changes in kinds.items():
        shape, _ = read_shape(b, base[0], **base[1], **changes)
        models[name] = make_step(b, shape, rows)
    t = b.seconds({name: lambda step=step: step(1) for name, (_, step) in models.items()})
    positions, table = rows * shape.block_size, []
    for name, (model, _) in models.items():
        table.append({"model": name, "parameters": model.n_params(), "active": model.n_params(active=True),
                      "ms": t[name] * 1e3, "tokens/s / dense": t["dense"] / t[name],
                      "positions/s": round(positions / t[name])})  # fmt: skip
    b.table("mixture of experts against dense at equal active parameters", table)


def loader(b):
    """What the token stream delivers, against what a step of part `step` would consume (tokens at s = 16)."""
    rows, L = 64, 1024
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "train.bin")
        np.random.default_rng(0).integers(0, 50257, 100_000_000, dtype=np.uint16).tofile(path)
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        reads = {}
        for s in (1, 4, 16):
            phases, number = phase_list(10**6, [s], 1.0), itertools.count()
            stream = TokenStream(
                [(tokens, Fraction(1))], L, phases, rows, range(rows), device=b.device
            )
            reads[s] = lambda stream=stream, number=number: stream.read(next(number)).to(b.device)
        t = b.seconds(reads, repeats=20)
        rate = lambda s: rows * L * s / t[s] / 1e6
        table = [{"s": s, "ms": t[s] * 1e3, "million tokens/s": rate(s)} for s in t]
        b.table(f"loader, {rows} rows of {L}, uint16", table)


WITH_PEAK_MEMORY = """
import atexit, resource, runpy, sys
def peak():
    cuda = "torch" in sys.modules and sys.modules["torch"].cuda
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("peak bytes", cuda.max_memory_allocated() if cuda and cuda.is_initialized() else of_process)
atexit.register(peak)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TRAINER = [sys.executable, "-c", WITH_PEAK_MEMORY, "train.py"]  # of the folder it is started in


def write_words(folder, vocab_size):
    """A corpus that both trainers can read, 4 million words as frequent as in a language (Zipf's law): speed
    does not depend on what they say."""
    n_tokens = {"train": 4_000_000, "val": 100_000}
    for split, n in n_tokens.items():
        words = vocab_size ** np.random.default_rng(0).random(n) - 1
        words.astype(np.uint16).tofile(os.path.join(folder, f"{split}.bin"))
    meta = {f"{split}_tokens": n for split, n in n_tokens.items()}
    meta |= {"vocab_size": vocab_size, "dtype": "uint16", "bytes_per_token": 1.0}
    with open(os.path.join(folder, "meta.json"), "w") as f:
        json.dump(meta, f)
    with open(os.path.join(folder, "meta.pkl"), "wb") as f:
        pickle.dump({"vocab_size": vocab_size}, f)


def time_trainer(command, folder, pattern):
    """Run a trainer in its folder: (median ms of its steps from the ninth on, peak bytes)."""
    out = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found = [float(ms) for step, ms in re.findall(pattern, out.stdout, re.M) if int(step) > 8]
    if not found or out.returncode:
        said = " ".join((out.stderr or out.stdout).split())[-300:]
        raise UserError(f"train.py in {folder} gave no times: {said}")
    return statistics.median(found), int(re.search(r"^peak bytes (\d+)", out.stdout, re.M)[1])


def nanogpt(b):
    """train.py against nanoGPT's own: same layers, heads, width, context, batch and text, in turn. Memory is
    the peak of the allocator on CUDA, of the process (compiler included) on a CPU."""
    if not b.c.nanogpt or not os.path.exists(os.path.join(b.c.nanogpt, "train.py")):
        raise UserError("--nanogpt must name a clone of karpathy/nanoGPT")
    name = b.c.shape or "curves"
    shape, rows = read_shape(b, name)
    if shape.vocab_size > 2**16:
        raise UserError(
            f"nanoGPT reads uint16 tokens, and {name} has a vocabulary of {shape.vocab_size:,}"
        )
    layers, heads, width, context = shape.n_layer, shape.n_head, shape.n_embd, shape.block_size
    times, memory = {"nanoGPT": [], "nanoTST": []}, {}
    with tempfile.TemporaryDirectory() as folder:
        write_words(folder, shape.vocab_size)
        common = [f"--dataset={folder}", f"--block_size={context}", f"--device={b.machine.device_type}",
                  "--eval_interval=100000", "--log_interval=1"]  # fmt: skip
        theirs = [*TRAINER, *common, f"--out_dir={folder}/theirs", f"--batch_size={rows}",
                  f"--n_layer={layers}", f"--n_head={heads}", f"--n_embd={width}", "--dropout=0.0",
                  "--gradient_accumulation_steps=1", "--max_iters=40", "--eval_iters=1",
                  f"--compile={b.cuda and b.compiled}"]  # fmt: skip  # its README: not on a CPU
        ours = [*TRAINER, f"config/{name}.py", *common, f"--out_dir={folder}/ours", "--overwrite",
                "--bag_size=1", f"--total_batch={rows * context}", "--batch_size=0", "--max_steps=40",
                "--eval_positions=1", "--save_interval=0", f"--dtype={b.c.dtype}",
                f"--compile={b.c.compile}"]  # fmt: skip
        for _ in range(min(3, b.c.repeats)):
            runs = {"nanoGPT": time_trainer(theirs, b.c.nanogpt, r"^iter (\d+):.*time ([\d.]+)ms"),
                    "nanoTST": time_trainer(ours, ROOT, r"^step +(\d+)/.*\| ([\d.]+) ms \|")}  # fmt: skip
            for label, (ms, memory[label]) in runs.items():
                times[label].append(ms)

    # of a position, in matrices of blocks and head, and in attention
    flops = {"nanoGPT": 6 * width * (12 * layers * width + shape.vocab_size) + 12 * layers * width * context,
             "nanoTST": GPT(shape).flops_per_position()}  # fmt: skip
    ms, peak = {label: statistics.median(ts) for label, ts in times.items()}, b.machine.peak_flops
    table = []
    for label, t in ms.items():
        rate = rows * context / t * 1e3
        mfu = {"MFU": rate * flops[label] / peak} if peak else {}
        table.append({"trainer": label, "ms a step": t, "tokens/s": round(rate),
                      "tokens/s / nanoGPT": ms["nanoGPT"] / t, **mfu, "peak MB": memory[label] / 1e6,
                      "runs": " ".join(f"{one:.0f}" for one in times[label])})  # fmt: skip
    shape = f"{layers} layers, width {width}, context {context}, {rows} rows"
    b.table(f"against nanoGPT's train.py, {name}: {shape}", table)


PARTS = {
    "roofline": roofline,
    "loss": loss,
    "step": steps,
    "moe": moe,
    "loader": loader,
    "nanogpt": nanogpt,
}


def main(config):
    for key in ("repeats", "rows", "positions"):
        if getattr(config, key) < (key == "repeats"):
            raise UserError(
                f"{key} must be at least {int(key == 'repeats')}, got {getattr(config, key)}"
            )
    parts = config.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"parts are {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if unknown := set(config.losses.split(",")) - {"", *LOSSES}:
        raise UserError(f"losses are {', '.join(LOSSES)}, got {', '.join(sorted(unknown))}")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){,7}", config.bag_sizes):
        raise UserError(
            f"bag_sizes are at most eight numbers like 1,8,16, got {config.bag_sizes!r}"
        )
    sys.stdout.reconfigure(
        line_buffering=True
    )  # a table is there as soon as it is known, through a pipe, too
    b = Bench(config)
    for part in parts:
        torch.compiler.reset()  # its limit of 8 graphs counts all models together
        PARTS[part](b)
        if config.json:  # after each part, for a run that is cut short
            with open(config.json, "w") as f:
                json.dump(b.figures, f, indent=1)


if __name__ == "__main__":
    entry_point(main, Config)
