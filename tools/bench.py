"""How fast it is, as ratios measured in one run.

    python bench.py                                     all parts, shapes that suit a CPU, or a GPU where there is one
    python bench.py --parts=loss,step --json=bench.json
    python bench.py --parts=nanogpt --nanogpt=FOLDER    against a clone of karpathy/nanoGPT, its own train.py

Within a part the variants take turns, one repetition each, so that a machine whose speed drifts slows all of them;
the table gives medians. Memory is the peak above what was held before the call: of the allocator on CUDA, of the
process on Linux.
"""

import contextlib
import ctypes
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

import numpy as np
import torch
import torch.nn.functional as F
from configurator import fail, one_of, parse, pick_device
from dataloader import TokenStream, load_meta, load_tokens

from model import GPT, GPTConfig
from train import PEAK_FLOPS, has_fast_bfloat16, keep_freed_memory
from tst import bags_and_labels, linear_multi_hot_cross_entropy, multi_hot_cross_entropy

PARTS = ("roofline", "loss", "step", "moe", "loader", "nanogpt")


@dataclass
class Config:
    """Usage: python bench.py [--key=value ...]"""

    parts: str = "roofline,loss,step,moe,loader"  # of roofline, loss, step, moe, loader, nanogpt
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = "auto"  # of matrix products: auto, bfloat16, float32
    compile: str = "auto"  # auto (as train.py: on for cuda), on, off
    shape: str = "auto"  # of step and nanogpt: curves (config/curves.py), wide, 124m, 270m, 600m; auto: 124m, for nanogpt curves
    rows: int = 0  # rows of a micro-batch in parts step and nanogpt; 0: by shape and device
    bag_sizes: str = "1,2,4,8,16"  # of part step
    repeats: int = 7
    threads: int = 0  # CPU threads; 0: PyTorch's choice
    profile: str = (
        ""  # write a trace of a step at each bag size to this file, for chrome://tracing or Perfetto
    )
    json: str = ""  # write all figures to this file
    nanogpt: str = ""  # folder of a clone of karpathy/nanoGPT


SHAPES = {  # GPTConfig, and rows of a micro-batch on a CPU and on a GPU
    "curves": (dict(vocab_size=256, block_size=128, n_layer=2, n_head=1, n_embd=64), 128, 512),
    "wide": (dict(vocab_size=256, block_size=256, n_layer=4, n_head=4, n_embd=256), 16, 256),
    "124m": (dict(vocab_size=50304, block_size=1024, n_layer=12, n_head=12, n_embd=768, ff_dim=2048), 1, 64),
    "270m": (dict(vocab_size=128256, block_size=2048, n_layer=30, n_head=9, n_embd=576, ff_dim=1536), 1, 16),
    "600m": (dict(vocab_size=128256, block_size=2048, n_layer=32, n_head=15, n_embd=960, ff_dim=2560), 1, 16),
}


class Bench:
    """Device, dtype, clock and memory of this run, and the figures found so far."""

    def __init__(self, c):
        self.c = c
        self.device = pick_device(c.device).split(":")[0]
        self.cuda = self.device == "cuda"
        self.dtype = getattr(
            torch,
            c.dtype if c.dtype != "auto" else "bfloat16" if has_fast_bfloat16(self.device) else "float32",
        )
        self.compiled = c.compile == "on" or c.compile == "auto" and self.cuda
        if c.threads:
            torch.set_num_threads(c.threads)
        if not self.cuda:
            keep_freed_memory()  # as train.py
        instructions = torch.backends.cpu.get_cpu_capability() + ", AMX" * torch.cpu._is_amx_tile_supported()
        name = (
            torch.cuda.get_device_name()
            if self.cuda
            else f"{torch.get_num_threads()} CPU threads, {instructions}"
        )
        self.peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
        self.figures = {
            "device": name,
            "torch": torch.__version__,
            "dtype": str(self.dtype),
            "compiled": self.compiled,
            "command": sys.argv,
        }
        print(f"{name}, torch {torch.__version__}, {self.dtype}, {'compiled' if self.compiled else 'eager'}")

    def autocast(self):
        on = self.dtype == torch.bfloat16
        return torch.autocast(self.device, torch.bfloat16) if on else contextlib.nullcontext()

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, variants, repeats=None):
        """Median seconds of each of {name: function}, run in turn; one unmeasured call each comes first."""
        times = {name: [] for name in variants}
        for run in variants.values():
            run()
        for _ in range(repeats or self.c.repeats):
            for name, run in variants.items():
                self.wait()
                start = time.perf_counter()
                run()
                self.wait()
                times[name].append(time.perf_counter() - start)
        return {name: statistics.median(ts) for name, ts in times.items()}

    def extra_memory(self, run):
        """Peak bytes that `run` needs above what is held before it, None where this cannot be told. On a CPU it is memory
        of the process, holes between the tensors included."""
        self.wait()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            self.wait()
            return torch.cuda.max_memory_allocated() - before
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed must count anew
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")  # resets the peak, VmHWM
            before = memory_of("/proc/self/status", "VmRSS")
            run()
            return memory_of("/proc/self/status", "VmHWM") - before
        except (OSError, AttributeError):
            return None

    def free_memory(self):
        """Bytes that may still be allocated, as far as can be told."""
        if self.cuda:
            return torch.cuda.mem_get_info()[0]
        return memory_of("/proc/meminfo", "MemAvailable") if os.path.exists("/proc/meminfo") else math.inf

    def table(self, title, rows):
        """Print rows, dicts of column to number or text, under a title, and keep them as figures."""
        self.figures[title] = rows
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [columns] + [
            [
                f"{row.get(c, ''):.3g}" if isinstance(row.get(c), float) else str(row.get(c, ""))
                for c in columns
            ]
            for row in rows
        ]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        print(f"\n{title}")
        for line in cells:
            print("  " + "  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip())


def memory_of(path, key):
    """The bytes that a file of /proc gives for `key`."""
    with open(path) as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))


def roofline(b):
    """The two ceilings of this machine: rate of a large matrix product, and of a large copy (read plus written)."""
    n = 8192 if b.cuda else 2048
    x, y = (
        torch.randn(n, n, device=b.device, dtype=b.dtype),
        torch.randn(n, n, device=b.device, dtype=b.dtype),
    )
    big = torch.randn(2**30 if b.cuda else 2**26, device=b.device)
    t = b.seconds({"product": lambda: x @ y, "copy": lambda: big.clone()})
    b.table(
        "roofline",
        [
            {
                "matrix product": f"{n} x {n}",
                "TFLOP/s": 2 * n**3 / t["product"] / 1e12,
                "copy GB/s": 2 * big.nbytes / t["copy"] / 1e9,
            }
        ],
    )


def loss(b):
    """The loss alone, forward and backward, from hidden states: V 50,304, C 256 (768 on CUDA). `products` are the three
    matrix products that every form needs, and nothing else."""
    N, C, V = (8192, 768, 50304) if b.cuda else (4096, 256, 50304)
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
    if b.compiled:
        kinds = {name: torch.compile(f, dynamic=False) for name, f in kinds.items()}
    variants = {("products", 1): products}
    for name, f in kinds.items():
        for s in (1,) if name == "cross-entropy" else (1, 8, 16):
            needed = (
                (s + 10) * 4 * N * V
            )  # bytes of the paper's loop, as measured: mostly a softmax for each label
            if name == "paper's loop" and not b.compiled and needed > b.free_memory():
                print(f"  left out: {name} at s = {s}, which needs {needed / 1e9:.0f} GB")
                continue
            labels = torch.randint(0, V, (N, s), device=b.device)

            def run(f=f, labels=labels):
                hidden.grad = weight.grad = None
                f(labels).backward()

            variants[name, s] = run
    t = b.seconds(variants)
    memory = {}
    for key, run in variants.items():
        hidden.grad = weight.grad = None  # or its predecessor's would be freed in the measured call
        memory[key] = b.extra_memory(run)
    base = "cross-entropy", 1
    b.table(
        f"loss alone, N {N}, V {V}, C {C}",
        [
            {
                "variant": name,
                "s": s,
                "ms": t[name, s] * 1e3,
                "time / cross-entropy": t[name, s] / t[base],
                "extra MB": (memory[name, s] or 0) / 1e6,
                "memory / cross-entropy": (memory[name, s] or 0) / (memory[base] or 1),
            }
            for name, s in variants
        ],
    )


def make_step(b, shape, rows, seed=0):
    """A model of `shape` and a function that runs one training step of it at a given bag size."""
    torch.manual_seed(seed)
    with torch.device(b.device):
        model = GPT(GPTConfig(**shape))
    compiled = b.compiled and not ("n_expert" in shape and b.dtype == torch.float32)  # as train.py
    run = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(bag_size):
        tokens = torch.randint(
            0,
            shape["vocab_size"],
            (rows, (shape["block_size"] + 1) * bag_size),
            dtype=torch.int32,
            device=b.device,
        )
        bags, labels = bags_and_labels(tokens, bag_size)
        with b.autocast():
            loss, router = run(bags, labels)
        (loss + 0.001 * router["balance_loss"].mean() if router else loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def steps(b):
    """A whole training step at several bag sizes."""
    name = b.c.shape if b.c.shape != "auto" else "124m"
    shape, cpu_rows, cuda_rows = SHAPES[name]
    shape = dict(shape)
    rows = b.c.rows or (cuda_rows if b.cuda else cpu_rows)
    if not b.cuda and name != "curves":
        shape["block_size"] = 256
    model, step = make_step(b, shape, rows)
    positions = rows * shape["block_size"]
    sizes, compiling = [int(s) for s in b.c.bag_sizes.split(",")], {}
    for s in sizes:
        start = time.perf_counter()
        step(s)
        b.wait()
        compiling[s] = time.perf_counter() - start
    t = b.seconds({s: lambda s=s: step(s) for s in sizes})
    table = []
    for s in sizes:
        memory = b.extra_memory(lambda: step(s))
        flops = positions * model.flops_per_position() / t[s]
        table.append(
            {
                "s": s,
                "ms": t[s] * 1e3,
                f"time / s = {sizes[0]}": t[s] / t[sizes[0]],
                "positions/s": round(positions / t[s]),
                "data tokens/s": round(s * positions / t[s]),
                "TFLOP/s": flops / 1e12,
                **({"MFU": flops / b.peak} if b.peak else {}),
                "extra MB": (memory or 0) / 1e6,
                "first call s": compiling[s],
            }
        )
    b.table(
        f"training step, {name}: {model.n_params():,} parameters, {rows} rows of {shape['block_size']}", table
    )
    if b.c.profile:
        with torch.profiler.profile() as profiler:
            for s in sizes:
                step(s)
        profiler.export_chrome_trace(b.c.profile)
        print(f"  trace of steps at s = {b.c.bag_sizes} in {b.c.profile}")


def moe(b):
    """A mixture of experts against a dense model with as many active parameters."""
    if b.cuda:
        shape = dict(vocab_size=50304, block_size=1024, n_layer=12, n_head=12, n_embd=768, qk_norm=True)
        rows, wide, variants = 32, 2048, ((16, 2), (64, 8), (128, 8))
    else:
        shape = dict(vocab_size=256, block_size=128, n_layer=2, n_head=2, n_embd=128, qk_norm=True)
        rows, wide, variants = 32, 384, ((8, 2), (32, 4))
    models = {"dense": make_step(b, {**shape, "ff_dim": wide}, rows)}
    for n_expert, top_k in variants:
        models[f"{n_expert} experts, top {top_k}"] = make_step(
            b, {**shape, "ff_dim": wide // top_k, "n_expert": n_expert, "top_k": top_k}, rows
        )
    t = b.seconds({name: lambda step=step: step(1) for name, (_, step) in models.items()})
    b.table(
        "mixture of experts against dense at equal active parameters",
        [
            {
                "model": name,
                "parameters": model.n_params(),
                "active": model.n_params(active=True),
                "ms": t[name] * 1e3,
                "tokens/s / dense": t["dense"] / t[name],
                "positions/s": round(rows * shape["block_size"] / t[name]),
            }
            for name, (model, _) in models.items()
        ],
    )


def loader(b):
    """What the token stream delivers, against what a step of part `step` would consume (tokens at s = 16)."""
    rows, L = 64, 1024
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "train.bin")
        np.random.default_rng(0).integers(0, 50257, 100_000_000, dtype=np.uint16).tofile(path)
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        streams = {
            s: TokenStream(tokens, L, s, 10**6, rows, range(rows), device=b.device) for s in (1, 4, 16)
        }
        t = b.seconds({s: lambda s=s: streams[s].read(0, s).to(b.device) for s in streams}, repeats=20)
        b.table(
            f"loader, {rows} rows of {L}, uint16",
            [{"s": s, "ms": t[s] * 1e3, "million tokens/s": rows * L * s / t[s] / 1e6} for s in t],
        )


WITH_PEAK_MEMORY = """
import atexit, resource, runpy, sys, torch
def peak():
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("peak bytes", torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else kilobytes * 1024)
atexit.register(peak)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def nanogpt(b):
    """train.py against nanoGPT's own: same layers, heads, width, context, batch and text, in turn. Memory is the peak of
    the allocator on CUDA, of the process (compiler included) on a CPU."""
    if not b.c.nanogpt or not os.path.exists(os.path.join(b.c.nanogpt, "train.py")):
        fail("--nanogpt must name a clone of karpathy/nanoGPT")
    here = os.path.dirname(os.path.abspath(__file__))
    source = os.path.join(here, "data", "python_source")
    name = b.c.shape if b.c.shape != "auto" else "curves"
    shape, cpu_rows, cuda_rows = SHAPES[name]
    rows = b.c.rows or (cuda_rows if b.cuda else cpu_rows)
    layers, heads, width, context = (shape[k] for k in ("n_layer", "n_head", "n_embd", "block_size"))
    common = [
        f"--n_layer={layers}",
        f"--n_head={heads}",
        f"--n_embd={width}",
        f"--block_size={context}",
        f"--device={b.device}",
    ]
    mode = ["--compile=True"] if b.cuda else ["--compile=False"]  # as its README says for a CPU
    times, memory = {"nanoGPT": [], "nanoTST": []}, {}
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # one corpus that both can read: uint16, with the shape's vocabulary
        meta = load_meta(source) | {"dtype": "uint16", "vocab_size": shape["vocab_size"]}
        for split in ("train", "val"):
            load_tokens(source, split).astype(np.uint16).tofile(os.path.join(folder, f"{split}.bin"))
        with open(os.path.join(folder, "meta.json"), "w") as f:
            json.dump(meta, f)
        with open(os.path.join(folder, "meta.pkl"), "wb") as f:
            pickle.dump({"vocab_size": shape["vocab_size"]}, f)
        trainer = [sys.executable, "-c", WITH_PEAK_MEMORY, "train.py"]
        theirs = [
            *trainer,
            f"--dataset={folder}",
            f"--out_dir={folder}/out",
            "--dropout=0.0",
            f"--batch_size={rows}",
            "--gradient_accumulation_steps=1",
            "--eval_iters=1",
            "--eval_interval=100000",
            "--log_interval=1",
            "--max_iters=40",
            *common,
            *mode,
        ]
        ours = [
            *trainer,
            f"--dataset={folder}",
            f"--out_dir={folder}/ours",
            "--overwrite",
            "--bag_size=1",
            "--eval_interval=100000",
            "--eval_positions=1",
            "--log_interval=1",
            "--max_steps=40",
            f"--total_batch={rows * context}",
            f"--dtype={b.c.dtype}",
            f"--compile={b.c.compile}",
            *common,
        ]
        for _ in range(3):
            for label, command, cwd, pattern in (
                ("nanoGPT", theirs, b.c.nanogpt, r"^iter (\d+):.*time ([\d.]+)ms"),
                ("nanoTST", ours, here, r"^step +(\d+)/.*\| ([\d.]+) ms \|"),
            ):
                out = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
                found = [float(m[1]) for m in re.findall(pattern, out.stdout, re.M) if int(m[0]) > 8]
                if not found:
                    fail(f"{label} gave no times: {' '.join((out.stderr or out.stdout).split())[-200:]}")
                times[label].append(statistics.median(found))
                memory[label] = int(re.search(r"^peak bytes (\d+)", out.stdout, re.M)[1])
    ms = {label: statistics.median(ts) for label, ts in times.items()}
    b.table(
        f"against nanoGPT's train.py, {name}: {layers} layers, width {width}, context {context}, {rows} rows",
        [
            {
                "trainer": label,
                "ms a step": ms[label],
                "tokens/s": round(rows * context / ms[label] * 1e3),
                "tokens/s / nanoGPT": ms["nanoGPT"] / ms[label],
                "peak MB": memory[label] / 1e6,
                "runs": " ".join(f"{t:.0f}" for t in times[label]),
            }
            for label in ms
        ],
    )


def main(config):
    parts = config.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        fail(f"parts are {', '.join(PARTS)}, got {', '.join(unknown)}")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){,7}", config.bag_sizes):
        fail(f"bag_sizes are at most eight numbers like 1,8,16, got {config.bag_sizes!r}")
    one_of(
        config,
        shape=("auto", *SHAPES),
        device=("auto", "cpu", "cuda"),
        dtype=("auto", "bfloat16", "float32"),
        compile=("auto", "on", "off"),
    )
    sys.stdout.reconfigure(
        line_buffering=True
    )  # a table is there as soon as it is known, through a pipe, too
    torch.set_float32_matmul_precision("high")  # as train.py
    b = Bench(config)
    for part in parts:
        torch.compiler.reset()  # its limit of 8 graphs counts all models together
        {"roofline": roofline, "loss": loss, "step": steps, "moe": moe, "loader": loader, "nanogpt": nanogpt}[
            part
        ](b)
        if config.json:  # after each part, for a run that is cut short
            with open(config.json, "w") as f:
                json.dump(b.figures, f, indent=1)


if __name__ == "__main__":
    main(parse(Config, sys.argv[1:]))
