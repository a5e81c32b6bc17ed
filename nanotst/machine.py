"""The machine of a run: device, dtype, ranks, compilation; and how a run ends, by a signal or an error."""

import contextlib
import ctypes
import os
import platform
import signal
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nanotst import UserError
from nanotst.parallel import compile_model
from nanotst.sharded import of_all_ranks

# Dense bfloat16 FLOPs per second by a part of the GPU's name, of SXM cards where there are several kinds
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "4090": 165e12}


def launcher():
    """(rank, local rank, ranks, ranks of this node) from torchrun's variables, (0, 0, 1, 0) without them.
    Raises UserError if some are missing, or one process would train on half of each batch."""
    if not os.environ.keys() & {"RANK", "WORLD_SIZE"}:
        return 0, 0, 1, 0
    keys = "RANK", "LOCAL_RANK", "WORLD_SIZE"
    try:
        rank, local_rank, world_size = (int(os.environ[key]) for key in keys)
    except (KeyError, ValueError):
        raise UserError(f"{', '.join(keys)} are not all set: use torchrun, or unset them") from None
    return rank, local_rank, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def pick_device(name, local_rank=0):
    """The torch device of a knob: auto (a GPU if there is one), cpu, mps, cuda (the rank's own GPU) or
    cuda:N. Raises UserError if it does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = f"cuda:{local_rank}" if name == "cuda" else name
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    here += ["mps"] * torch.backends.mps.is_available()
    if device not in here:
        raise UserError(f"there is no device={name}; PyTorch sees {', '.join(here)}")
    return device


def best_dtype(device):
    """bfloat16 where matrix products are faster in it than in float32."""
    amx, avx512 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    fast = device == "cpu" and (amx or avx512)
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def keep_freed_memory():
    """Make glibc keep freed memory for the next step, which else spends much of its time on page faults."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap, too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: and never shrink it


def join(device):
    """Meet the other ranks at the address in the environment."""
    wait = timedelta(minutes=20)  # for a rank that compiles or writes
    how = {"backend": "gloo"}
    if device.startswith("cuda"):
        how = {"backend": "nccl", "device_id": torch.device(device)}
    try:
        store, rank, ranks = next(dist.rendezvous("env://", timeout=wait))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps this store when it restarts, with the addresses of ranks that have died
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(store=store, rank=rank, world_size=ranks, timeout=wait, **how)
    except (RuntimeError, ValueError) as e:
        hint = "check MASTER_ADDR, MASTER_PORT, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        raise UserError(f"the ranks cannot reach each other ({one_line(e)}); {hint}") from None


@dataclass
class Machine:
    """One process of a run. Under torchrun there are world_size processes, on one node or several. Rank 0 is
    the master: it alone prints, and it alone writes files, except for the parts of a sharded checkpoint."""

    device: str  # as torch knows it
    dtype: str  # of matrix products: bfloat16, float32
    rank: int = 0
    world_size: int = 1
    distributed: bool = False  # started by torchrun
    parallel: str = "none"  # or ddp, fsdp: see nanotst/parallel.py
    shard_size: int = 1  # ranks that share one set of weights

    @classmethod
    def start(cls, c):
        """Join the other ranks, set threads and other state of torch. c: the knobs device, dtype, threads
        and, for training, deterministic, parallel, shard_size."""
        rank, local_rank, world_size, node_ranks = launcher()
        parallel, n = getattr(c, "parallel", "auto"), getattr(c, "shard_size", 0)
        if parallel == "auto":
            parallel = "ddp" if node_ranks else "none"
        elif not node_ranks:
            raise UserError(f"parallel={parallel} needs ranks: torchrun ..., or --parallel=auto")
        if node_ranks and c.compile == "graphs":
            raise UserError("compile=graphs is for one GPU, without torchrun")
        if n and (parallel != "fsdp" or world_size % n):
            raise UserError(f"shard_size {n} needs parallel=fsdp and must divide {world_size}")
        if node_ranks and c.device.startswith("cuda:"):
            raise UserError("torchrun gives each rank a GPU of its own; use --device=cuda")
        device = pick_device(c.device, local_rank)
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            if getattr(c, "deterministic", False):
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts
                torch.use_deterministic_algorithms(True)
                torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass has no fixed order
        else:
            keep_freed_memory()
        if node_ranks:
            join(device)
        if c.threads or node_ranks and device == "cpu":  # torchrun's own choice is a single thread
            bound = hasattr(os, "sched_getaffinity")  # SLURM and containers bind a process to cores
            cores = len(os.sched_getaffinity(0)) if bound else os.cpu_count()
            torch.set_num_threads(c.threads or max(1, cores // node_ranks))
        try:  # torch makes this folder, or fails, even if nothing is compiled
            os.makedirs(os.environ["TORCHINDUCTOR_CACHE_DIR"], exist_ok=True)
        except (KeyError, OSError):
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        torch.set_float32_matmul_precision("high")  # TF32 where CUDA still computes in float32
        dtype = best_dtype(device) if c.dtype == "auto" else c.dtype
        return cls(device, dtype, rank, world_size, node_ranks > 0, parallel, n or world_size)

    @property
    def master(self):
        return self.rank == 0

    @property
    def device_type(self):
        return self.device.split(":")[0]

    @property
    def name(self):
        """The device in words."""
        if self.device_type == "cuda":
            return torch.cuda.get_device_name()
        return f"{platform.machine()}, {torch.get_num_threads()} threads"

    @property
    def peak_flops(self):
        """FLOPs per second of one device in bfloat16, None if unknown or the run is in float32."""
        known = [flops for name, flops in PEAK_FLOPS.items() if name in self.name]
        return known[0] if known and self.dtype == "bfloat16" else None

    @property
    def memory(self):
        """Bytes of one GPU, or a rank's share of main memory; 0 if unknown, as on Windows."""
        if self.device_type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        if not hasattr(os, "sysconf"):
            return 0
        ranks = launcher()[3] or 1  # of this node
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks

    def versions(self):
        """What results may depend on, as plain values."""
        return {"python": platform.python_version(), "torch": str(torch.__version__), "device": self.name,
                "dtype": self.dtype, "world_size": self.world_size, "parallel": self.parallel}  # fmt: skip

    def autocast(self):
        return torch.autocast(self.device_type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def say(self, *words):
        if self.master:
            print(*words, flush=True)

    def mean(self, x):
        """Mean of a tensor over the ranks; x itself becomes their sum."""
        if self.distributed:
            dist.all_reduce(x)
        return x / self.world_size

    def from_master(self, value):
        """Rank 0's plain value, on all ranks."""
        return of_all_ranks(value)[0]

    def compile(self, model, wanted, warm_up):
        """(model, whether it is compiled). wanted: auto (on CUDA), on, graphs, off. warm_up(model) runs each
        graph once. If compiling fails, training continues without it, unless other ranks hold a part."""
        if wanted == "auto":
            wanted = "on" if self.device_type == "cuda" else "off"
        if wanted != "off" and model.config.n_expert and self.dtype == "float32":
            self.say("experts compile in bfloat16 only; going on without torch.compile")
            wanted = "off"
        if wanted != "off":
            self.say("compiling, which takes a minute or more; --compile=off starts at once")
        # a process that was killed while compiling may have left a broken file in the cache
        missing = "going on without torch.compile; it needs a C++ compiler, on CUDA Triton"
        for then in ("trying again without its cache", missing) if wanted != "off" else ():
            try:
                compiled = compile_model(model, wanted, self.parallel == "fsdp")
                warm_up(compiled)
                return compiled, True
            except Exception as e:
                if self.parallel == "fsdp" or isinstance(e, UserError | torch.OutOfMemoryError):
                    raise
                self.say(f"torch.compile failed ({type(e).__name__}: {one_line(e)}); {then}")
                torch.compiler.reset()
                for unit in model.modules():  # see compile_model
                    vars(unit).pop("forward", None)
                model.zero_grad(set_to_none=wanted != "graphs")
                torch.compiler.config.force_disable_caches = True
        warm_up(model)
        return model, False

    def leave(self):
        """Wait for the other ranks, rank 0 may still be writing, and leave the group. Delete the DDP wrapper
        first: with the last reference to the group, it can deadlock with a thread."""
        if self.distributed:
            dist.barrier()
            dist.destroy_process_group()


class StopSignals:
    """Whether to stop, after Ctrl-C or SIGTERM to any rank, and whether a checkpoint is due by time. Ranks
    agree over gloo, on a CPU tensor, so no step waits for a GPU; without ranks there is nothing to send."""

    def __init__(self, machine):
        self.received, self.reason, self.save_due = False, "a signal to another rank", False
        self.save_at = time.perf_counter() + 50  # soon: a crash loses little
        self.group = dist.new_group(backend="gloo") if machine.distributed else None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.received, self.reason = True, signal.Signals(number).name

    def stop(self, step):
        """Whether to stop after `step` steps. Updates save_due. Both are the same on all ranks."""
        answer = torch.tensor([self.received, time.perf_counter() > self.save_at], dtype=torch.int)
        if self.group:
            dist.all_reduce(answer, dist.ReduceOp.MAX, self.group)
        stopping, self.save_due = map(bool, answer.tolist())
        if stopping:
            self.reason += f" after step {step}"
        return stopping

    def saved(self, seconds):
        """A checkpoint was written, which took `seconds`; the next ones take at most 2 % of the time."""
        self.save_at = time.perf_counter() + max(300, 50 * seconds)


def one_line(e):
    """The beginning and the end of an error message."""
    text = " ".join(str(e).split())
    return text if len(text) < 200 else f"{text[:100]} ... {text[-100:]}"
