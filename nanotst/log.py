"""What a run writes beside its checkpoints: config.json, metrics.jsonl, the line for the eye; and who may
write there."""

import contextlib
import dataclasses
import json
import os
import platform
from pathlib import Path

from nanotst import UserError
from nanotst.checkpoint import remove
from nanotst.configurator import typed
from nanotst.files import FULL, write_safely
from nanotst.sharded import of_all_ranks

with contextlib.suppress(ImportError):  # not on Windows, where a folder has no lock
    import fcntl


class RunFolder:
    """The folder of a run. Only the master writes; the other ranks call the same methods to no effect.

    metrics.jsonl holds a row per log interval; last.pt and best.pt are checkpoints; `lock` is held by the
    process that trains, and released by the system when it ends, however it ends."""

    def __init__(self, out_dir, machine):
        self.out_dir, self.machine = out_dir, machine
        self.metrics, self.last, self.best = (
            os.path.join(out_dir, n) for n in ("metrics.jsonl", "last.pt", "best.pt")
        )
        self.wandb = None

    def after_restart(self, c):
        """c with resume set, where torchrun has started this process again after a rank had died, so that the
        run goes on by itself; else c. Only where the folder's `lock` names this torchrun."""
        restarted = False
        # each node counts for itself, and not when it was another's rank that died
        again = any(of_all_ranks(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))))
        if self.machine.master and again:
            with contextlib.suppress(OSError), open(os.path.join(self.out_dir, "lock")) as f:
                restarted = f.read().endswith(f"{job()}\n")
        if not self.machine.from_master(restarted):
            return c
        last = self.newest()  # the same on all ranks
        self.machine.say(f"torchrun has started again: going on from {last or 'the beginning'}")
        return dataclasses.replace(c, resume=last is not None, overwrite=last is None)

    def newest(self):
        """The checkpoint to go on from, None if there is none, as the master sees it: on a shared file system
        the others may not see it yet."""
        there = self.machine.master and os.path.exists(self.last)
        return self.machine.from_master(self.last if there else None)

    def begin(self, resume, overwrite):
        """Lock the folder, and make room for a new run. Raises UserError, on all ranks, if it holds a run
        that would be lost."""
        error = None
        if self.machine.master:
            try:
                self._begin(resume, overwrite)
            except UserError as e:
                error = str(e)
        if error := self.machine.from_master(error):
            raise UserError(error)

    def _begin(self, resume, overwrite):
        if not resume:
            os.makedirs(self.out_dir, exist_ok=True)
        if os.path.isdir(self.out_dir):
            self._lock()  # before looking: another process could come to its end in between
        held = [p for p in (self.last, self.best, self.metrics) if os.path.exists(p)]
        last = self.last in held
        if resume and not last:
            what = "the log of a run that ended before its first save" if held else "no run"
            if os.path.isdir(os.path.join(self.out_dir, "last.dcp")):
                what = "last.dcp of an older version, commit e9f8ad9, which alone can resume it"
            start = "start without --resume" + (", but with --overwrite" if held else "")
            raise UserError(f"there is no checkpoint {self.last}: the folder holds {what}; {start}")
        if held and not resume and not overwrite:
            go_on = "go on with it (--resume), " if last else ""
            first, name = os.path.basename(held[0]), os.path.basename(self.last)
            what = "a run" if last else f"{first} of a run, but no {name} to go on from"
            todo = f"{go_on}replace it (--overwrite) or choose another --out_dir"
            raise UserError(f"{self.out_dir} already holds {what}: {todo}")
        if not resume:
            for path in held:
                remove(path)
        self._sign()  # after that: what a restarted process finds in a folder signed by it is its own

    def _lock(self):
        if "fcntl" not in globals():
            return
        path = os.path.join(self.out_dir, "lock")
        self.lock = open(path, "a+")  # noqa: SIM115 kept open, since closing it releases the lock
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.lock.seek(0)
            who = self.lock.read().strip() or "another process"
            raise UserError(
                f"{self.out_dir} is in use by {who}; wait for it or choose another"
            ) from None
        except OSError:  # a file system without locks
            return

    def _sign(self):
        if hasattr(self, "lock"):
            self.lock.truncate(0)
            self.lock.write(f"process {os.getpid()} on {platform.node()}{job()}\n")
            self.lock.flush()

    def keep_rows(self, step):
        """On resuming, drop the rows after `step`, which will be written again, and half a line of a killed
        process."""
        if not self.machine.master or not os.path.exists(self.metrics):
            return
        try:
            with open(self.metrics, encoding="utf-8") as f:
                lines = [line for line in f if line.endswith("\n")]
            kept = [line for line in lines if step_of(line) <= step]
        except (ValueError, KeyError, TypeError, RecursionError):
            todo = f"move it away, and --resume goes on without the rows up to step {step}"
            raise UserError(f"{self.metrics} is damaged; {todo}") from None
        write_safely(
            self.metrics, lambda path: Path(path).write_text("".join(kept), encoding="utf-8")
        )

    def describe(self, described, wandb_project=""):
        """Write config.json, plain values that say what this run is, and tell Weights & Biases if it is asked
        for."""
        if not self.machine.master:
            return
        text = json.dumps(described, indent=1, allow_nan=False)
        write_safely(
            os.path.join(self.out_dir, "config.json"),
            lambda path: Path(path).write_text(text, encoding="utf-8"),
        )
        if wandb_project:
            try:
                import wandb

                name = os.path.basename(os.path.abspath(self.out_dir))
                self.wandb = wandb.init(project=wandb_project, name=name, config=described)
            except ImportError:
                raise UserError("--wandb_project needs: pip install wandb") from None
            except Exception as e:  # wandb.errors.Error, and what the network throws
                raise UserError(
                    f"wandb: {' '.join(str(e).split())[:150]}; use `wandb login`, or WANDB_MODE=offline"
                ) from None

    def add(self, row, line):
        """Append a row, a dict, to metrics.jsonl, and show it as `line`."""
        if not self.machine.master:
            return
        try:
            with open(self.metrics, "a", encoding="utf-8") as f:
                f.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as e:
            full = e.errno in FULL
            reason = "the disk is full" if full else e.strerror
            todo = "; make room" * full
            if os.path.exists(self.last):
                todo = f"; {self.last} is untouched" + ": make room and use --resume" * full
            raise UserError(f"cannot write {self.metrics}: {reason}{todo}") from None
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        self.machine.say(line)

    def finish(self):
        if self.wandb:
            self.wandb.finish()


def job():
    """The torchrun that has started this process, in words: its id, or itself if it was given none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name == "none":
        name = f"{os.getppid()}@{platform.node()}"
    return f", torchrun {name}" if name else ""


def knobs_of_run(c):
    """With --resume, the knobs of the run in out_dir, from its config.json, for those that are not given."""
    path = os.path.join(c.out_dir, "config.json")
    if not c.resume or not os.path.exists(path):
        return {}
    fields = {field.name: field for field in dataclasses.fields(c)}
    for key in (
        "out_dir",
        "resume",
        "allow_changes",
        "overwrite",
        "init_from",
    ):  # not of the run as such
        del fields[key]
    try:
        with open(path, encoding="utf-8") as f:
            saved = json.load(f)["config"]
        saved.setdefault("router_z_coef", saved.get("z_coef", 0.0))  # its name until November 2026
        known = [key for key in fields if key in saved]  # an older run lacks the latest ones
        return {key: typed(fields[key], key, saved[key], path, fields) for key in known}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged; move it away, and --resume needs all knobs") from None


def step_of(line):
    """The step of a row, from its line in metrics.jsonl. ValueError, KeyError or TypeError where there is
    none."""
    step = json.loads(line)["step"]
    if type(step) is not int:
        raise TypeError("no step")
    return step


def progress(row, max_steps, seconds_per_step):
    """A row of metrics.jsonl as one line for the eye."""
    eta = int(row["seconds"] / row["step"] * (max_steps - row["step"]))
    parts = [
        f"step {row['step']:>{len(str(max_steps))}}/{max_steps}",
        f"s {row['bag_size']}",
        f"loss {row['loss']:.4f}",
    ]
    if "val_loss" in row:
        bits = f" ({row['val_bpb']:.4f} bits/byte)" if "val_bpb" in row else ""
        parts.append(f"val {row['val_loss']:.4f}{bits}")
    parts += [
        f"lr {row['lr']:.2e}",
        f"norm {row['grad_norm']:.2f}",
        f"{seconds_per_step * 1e3:.1f} ms",
        f"{row['positions_per_second'] / 1e3:.1f}k pos/s",
    ]
    if "mfu" in row:
        parts.append(f"mfu {row['mfu']:.1%}")
    if "max_violation" in row:
        parts.append(f"max vio {row['max_violation']:.2f}, dead {row['dead_experts_worst']}")
    return " | ".join([*parts, f"eta {eta // 60}m{eta % 60:02d}s"])


def router_metrics(load, entropy):
    """What the MoE routers did in a step. load (n_layer, E) positions by expert, entropy (n_layer,) nats.
    Max violation is the busiest expert's load over the mean, minus 1."""
    violation = load.amax(1) / load.mean(1) - 1  # (n_layer,)
    dead = (load == 0).sum(1)  # (n_layer,)
    return {
        "max_violation": violation.mean().item(),
        "max_violation_worst": violation.max().item(),
        "router_entropy": entropy.mean().item(),
        "router_entropy_worst": entropy.min().item(),
        "dead_experts": dead.float().mean().item(),
        "dead_experts_worst": dead.max().item(),
    }


def warn(c, machine, model):
    """What works, but hardly as it was meant."""
    if c.warmup_steps >= c.max_steps:
        machine.say(
            f"note: warmup_steps {c.warmup_steps} is not below max_steps {c.max_steps}, so the learning rate "
            "still rises when the run ends"
        )
    V, C = model.config.vocab_size, model.config.n_embd
    share = 6 * V * C / model.flops_per_position()  # of the head, in the FLOPs of a step
    if machine.device == "cpu" and share > 0.75:
        machine.say(
            f"note: {min(share, 0.999):.1%} of the work of a step is the head over {V:,} tokens; on a CPU a "
            f"corpus of bytes (--encoding=bytes) takes about {1 / (1 - share):.0f} times less for a step"
        )


def describe_run(c, machine, model, stream, compiled, micro_steps, step):
    """The opening lines: what is trained, on what, and on how much text."""
    if c.resume:
        finished = "; it is finished" if step >= c.max_steps else ""
        machine.say(f"going on with {c.out_dir} after step {step:,} of {c.max_steps:,}{finished}")
    active = f" ({model.n_params(active=True):,} active)" if c.n_expert else ""
    ranks = f", {machine.world_size} ranks" if machine.distributed else ""
    machine.say(
        f"{model.n_params():,} parameters{active}, {machine.dtype}, {'compiled' if compiled else 'eager'}, "
        f"{machine.name}{ranks}"
    )
    bagged = [p for p in stream.phases if p.bag_size > 1]
    if bagged:
        steps = sum(p.stop - p.start for p in bagged)
        extra = stream.tokens_at(c.max_steps) / (c.max_steps * c.total_batch)
        machine.say(
            f"TST: {steps:,} of {c.max_steps:,} steps on bags of {'-'.join(str(p.bag_size) for p in bagged)},"
            f" then ordinary training; {extra:.2f} x the text of a baseline at the same FLOPs"
        )
    tokens = stream.tokens_at(c.max_steps)
    machine.say(
        f"{c.max_steps:,} steps of {c.total_batch:,} positions, in {micro_steps} micro-steps a rank; "
        f"{tokens:,} tokens, {tokens / stream.epoch_tokens:.2f} epochs of the corpus"
    )
