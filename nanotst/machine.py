"""The machine a run is on: device, dtype, threads, ranks, compilation, and what ends it: signals, ranks that
fail."""

import contextlib
import ctypes
import os
import platform
import re
import signal
import sys
import time
import traceback
import uuid
import zlib
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nanotst import UserError
from nanotst.parallel import compile_units

# How long a rank waits for one that hangs. Of one that has died the others learn at once: from gloo by its
# closed connection, from torchrun by a signal, and after 30 more seconds by SIGKILL. What all may have to
# wait for is one that is slow: a compilation, a checkpoint of one file.
TIMEOUT = timedelta(minutes=20)
# dense bfloat16 FLOPs a second by a part of the GPU's name; of the SXM form, so the MFU of a PCIe card is
# shown too low
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "B200": 2250e12,
}


def pick_device(name, local_rank=0):
    """The device that a knob names, as torch knows it: auto (a GPU if there is one), cpu, mps, cuda (the
    rank's own GPU) or cuda:N. Raises UserError if it is not there."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps, but PyTorch sees no Apple GPU")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return name
    name = name if ":" in name else f"cuda:{local_rank}"
    if not torch.cuda.is_available() or int(name[5:]) >= torch.cuda.device_count():
        raise UserError(f"device={name}, but PyTorch sees {torch.cuda.device_count()} CUDA GPUs")
    return name


def has_fast_bfloat16(device):
    """Whether matrix products in bfloat16 beat float32 here."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def keep_freed_memory():
    """Have glibc keep what is freed for the next step. By default large tensors go back to the system, and a
    step on a CPU spends much of its time on faulting their pages in again."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap, too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: and never shrink it


@dataclass
class Machine:
    """One process of a run. Under torchrun there are world_size of them, on one node or several, rank 0 being
    the master: it alone prints, and it alone writes files, but for the parts of a sharded checkpoint."""

    device: str  # as torch knows it
    dtype: str  # of matrix products: bfloat16, float32
    rank: int = 0
    local_rank: int = 0  # on its node: the number of its GPU
    world_size: int = 1
    distributed: bool = False  # started by torchrun
    parallel: str = "none"  # or ddp, fsdp: see nanotst/parallel.py
    shard_size: int = 1  # ranks that share one set of weights

    @classmethod
    def start(cls, c):
        """Find out where we are, join the other ranks, set threads. c: the knobs device, dtype, threads,
        parallel, shard_size."""
        env = {key: int(os.environ.get(key, default)) for key, default in
               (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))}  # fmt: skip
        distributed = "RANK" in os.environ
        if distributed and c.device.startswith("cuda:"):
            raise UserError("torchrun gives each rank a GPU of its own; use --device=cuda")
        parallel, shard_size = getattr(c, "parallel", "auto"), getattr(c, "shard_size", 0)
        if parallel != "auto" and not distributed:
            raise UserError(
                f"parallel={parallel} needs ranks: torchrun --standalone --nproc_per_node=N train.py"
            )
        parallel = "none" if not distributed else "ddp" if parallel == "auto" else parallel
        if shard_size and (parallel != "fsdp" or env["WORLD_SIZE"] % shard_size):
            raise UserError(
                f"shard_size {shard_size} is for parallel=fsdp and must divide {env['WORLD_SIZE']} ranks"
            )
        device = pick_device(c.device, env["LOCAL_RANK"])
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        if distributed:
            how = {"backend": "gloo", "timeout": TIMEOUT}
            if device.startswith("cuda"):
                how |= {"backend": "nccl", "device_id": torch.device(device)}
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                store = meet(env["RANK"], env["WORLD_SIZE"])
                how |= {"store": store, "rank": env["RANK"], "world_size": env["WORLD_SIZE"]}
            dist.init_process_group(**how)
        if c.threads < 0:
            raise UserError(f"threads must not be negative, got {c.threads}")
        if c.threads > 1024:
            raise UserError(f"threads must be at most 1024, got {c.threads}")
        if c.threads or distributed and device == "cpu":  # torchrun's own choice is a single thread
            cores = (
                len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            )
            torch.set_num_threads(c.threads or max(1, cores // env["LOCAL_WORLD_SIZE"]))
        if device == "cpu":
            keep_freed_memory()
        torch.set_float32_matmul_precision("high")  # TF32 where float32 is left on CUDA
        dtype = (
            c.dtype if c.dtype != "auto" else "bfloat16" if has_fast_bfloat16(device) else "float32"
        )
        ranks = env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]
        return cls(device, dtype, *ranks, distributed, parallel, shard_size or env["WORLD_SIZE"])

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
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"

    @property
    def peak_flops(self):
        """Of one device in bfloat16, None if it is not in the table or the run is not in bfloat16."""
        known = (flops for name, flops in PEAK_FLOPS.items() if name in self.name)
        return next(known, None) if self.dtype == "bfloat16" else None

    @property
    def memory(self):
        """Bytes of one device, of a CPU a rank's share; 0 if that is not known."""
        if self.device_type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            n_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            return n_bytes // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return 0

    def versions(self):
        """What a run's results may depend on, as plain values."""
        return {"python": platform.python_version(), "torch": str(torch.__version__), "device": self.name,
                "dtype": self.dtype, "world_size": self.world_size, "parallel": self.parallel}  # fmt: skip

    def autocast(self):
        return torch.autocast(self.device_type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def say(self, *words):
        if self.master:
            print(*words, flush=True)

    def mean(self, x):
        """Mean of a tensor over the ranks, a new tensor; x itself is left with their sum."""
        if self.distributed:
            dist.all_reduce(x)
        return x / self.world_size

    def from_master(self, value):
        """A plain value as rank 0 has it, for all ranks."""
        box = [value]
        if self.distributed:
            dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def compile(self, model, wanted, warm_up):
        """The model compiled, or as it is: (model, compiled?). wanted: auto (on CUDA), on, off.
        warm_up(model) runs each graph once, so that nothing is compiled later. If compiling fails, the run
        goes on without it, unless it is sharded: ranks cannot take back a half of what they did together."""
        wanted = wanted == "on" or wanted == "auto" and self.device_type == "cuda"
        if wanted and model.config.n_expert and self.dtype == "float32":
            self.say(
                "experts compile in bfloat16 only (torch's grouped_mm); going on without torch.compile"
            )
            wanted = False
        if not wanted:
            warm_up(model)
            return model, False
        self.say("compiling, which takes a minute or more; --compile=off starts at once")
        started = time.perf_counter()
        if self.parallel == "fsdp":
            compile_units(model)
            warm_up(model)
            self.say(f"compiled in {time.perf_counter() - started:.0f} s")
            return model, True
        for again in (True, False):
            try:
                compiled = torch.compile(model, dynamic=False, fullgraph=True)
                warm_up(compiled)
                self.say(f"compiled in {time.perf_counter() - started:.0f} s")
                return compiled, True
            except (torch.OutOfMemoryError, UserError):
                raise
            except Exception as e:
                # a process that was killed while compiling may have left a broken cache behind
                self.say(
                    f"torch.compile failed ({type(e).__name__}: {' '.join(str(e).split())[:100]})"
                    + ("; trying again without its cache" if again else "")
                )
                torch.compiler.reset()
                model.zero_grad()
                torch.compiler.config.force_disable_caches = True
        self.say(
            "going on without torch.compile; a C++ compiler and Triton (for CUDA) are what it usually misses"
        )
        warm_up(model)
        return model, False

    def leave(self):
        """Wait for the other ranks (rank 0 may still be writing), then leave the group. Delete the DDP
        wrapper before: with the last reference to the group, it would hold Python's lock while it waits for
        a thread that waits for the same lock."""
        if self.distributed:
            dist.barrier()
            dist.destroy_process_group()


def meet(rank, ranks):
    """A store for the ranks that are alive. torchrun keeps one store through all its restarts, with the
    addresses of processes that have died, at which a new one would wait for a partner in vain; and its
    restart counts may differ between nodes (pytorch issue 135712). So rank 0 answers each of the others by a
    name that nobody has had before."""
    store = agent_store(TIMEOUT)
    me, deadline, missing = (
        uuid.uuid4().hex,
        time.monotonic() + TIMEOUT.total_seconds(),
        set(range(1, ranks)),
    )
    if rank:
        store.set(f"hello {rank}", me)
        me = store.get(f"welcome {me}").decode()  # waits for it
        store.set(f"{me} {rank}", "")
    while missing and not rank:
        missing = {r for r in missing if not store.check([f"{me} {r}"])}
        for r in missing:
            if store.check(
                [f"hello {r}"]
            ):  # maybe from the dead: then the living one is yet to come
                store.set(f"welcome {store.get(f'hello {r}').decode()}", me)
        if time.monotonic() > deadline:
            raise RuntimeError(f"timed out: ranks {sorted(missing)} have not come")
        time.sleep(0.02)
    return dist.PrefixStore(me, store)


def agent_store(timeout):
    """The store of the torchrun that has started this process."""
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(*where, is_master=False, timeout=timeout)


class StopSignals:
    """Whether the run was asked to end, by Ctrl-C or SIGTERM. Ranks have to stop together, so they ask each
    other, about every `seconds` seconds, at a step that all of them know from the time before."""

    def __init__(self, machine, seconds=2.0):
        self.machine, self.seconds, self.received = machine, seconds, []
        self.next_step, self.last_step, self.asked_at = 0, 0, time.perf_counter()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(number, lambda n, frame: self.received.append(signal.Signals(n).name))

    def stop(self, step):
        """After step number `step`: whether to end here. The same answer on all ranks."""
        if not self.machine.distributed:
            return bool(self.received)
        if step < self.next_step:
            return False
        pace = (time.perf_counter() - self.asked_at) / max(
            1, step - self.last_step
        )  # seconds a step
        until = max(1, int(self.seconds / max(pace, 1e-6))) if self.machine.master else 0
        answer = torch.tensor(
            [float(bool(self.received)), float(until)], device=self.machine.device
        )
        dist.all_reduce(answer)
        stopping, until = answer.tolist()
        self.next_step, self.last_step, self.asked_at = step + int(until), step, time.perf_counter()
        return stopping > 0

    @property
    def reason(self):
        return self.received[0] if self.received else "a signal to another rank"


# ------------------------------------------------------------------------------------------ ranks that fail

PARTNER_LOST = (
    r"(?i)closed by peer|reset by peer|broken pipe|timed out|timeout|remote process|remote error"
)


def as_one(main):
    """main, whose ranks fail as one. An error that many of them meet is printed once, a rank whose partner
    has died says so in a line instead of a traceback, and no rank that has failed waits for anybody."""

    def ranked(config):
        try:
            return main(config)
        except Exception as e:
            if "RANK" not in os.environ or isinstance(e, torch.OutOfMemoryError):
                raise
            if not isinstance(e, (UserError, OSError)):
                leave_at_once(e)
            if first_to_say(str(e)):
                raise
            sys.exit(1)

    return ranked


def leave_at_once(e):
    """End this process: Python's own end would wait for threads, and NCCL for ranks that are gone."""
    lost = isinstance(e, RuntimeError) and re.search(PARTNER_LOST, str(e))
    if not lost:
        traceback.print_exception(e)
    elif first_to_say("a rank is lost"):
        why = " ".join(str(e).split())
        said = "error: another rank has ended or hangs, and this one cannot go on without it"
        print(
            f"{said} ({why[:100]}{' ... ' + why[-100:] if len(why) > 200 else why[100:]})",
            file=sys.stderr,
        )
    sys.stderr.flush()
    os._exit(1)


def first_to_say(text):
    """Whether this rank is the first to say this, by a counter in torchrun's store. True if the store cannot
    be reached."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    try:
        store = agent_store(timedelta(seconds=5))
        return store.add(f"said {attempt} {zlib.crc32(text.encode())}", 1) == 1
    except (RuntimeError, ValueError, KeyError):
        return True
