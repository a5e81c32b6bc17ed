"""The folder of a run: its lock, config.json, metrics.jsonl; and what a run prints."""

import dataclasses
import json
import os
from pathlib import Path

from nanotst import UserError
from nanotst.configurator import renamed
from nanotst.files import read_json, write_text
from nanotst.machine import one_line
from nanotst.sharded import of_all_ranks, remove_parts, together


class RunFolder:
    """The folder of a run. Only the master writes; on other ranks the methods do nothing. The training
    process holds `lock`; the system releases it when that process ends."""

    def __init__(self, out_dir, machine):
        self.out_dir, self.machine, self.wandb = out_dir, machine, None
        names = "metrics.jsonl", "config.json", "last.pt", "best.pt"
        self.metrics, self.config, self.last, self.best = (os.path.join(out_dir, n) for n in names)

    def after_restart(self, c):
        """The knobs c, or, if torchrun has restarted this process after a rank died, those that resume the
        run. The id of torchrun (--rdzv_id) in config.json tells whether it is ours. UserError: no run."""
        name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        restarts = of_all_ranks(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))  # per node
        ours = name != "none" and read_json(self.config).get("torchrun") == name
        # as the master sees it: on a shared file system the others may not see a file yet
        ours, saved = self.machine.from_master((ours, os.path.exists(self.last)))
        if ours and max(restarts) != "0":
            self.machine.say(f"restarted by torchrun: resuming {self.out_dir}")
            c = dataclasses.replace(c, resume=saved, overwrite=not saved)
        if c.resume and not saved:
            raise UserError(f"there is no checkpoint {self.last}; start without --resume")
        return c

    def acquire(self, resume, overwrite):
        """Lock the folder. UserError, on all ranks, if it is in use or a run would be lost."""
        together(lambda: self.machine.master and self._acquire(resume, overwrite))

    def _acquire(self, resume, overwrite):
        os.makedirs(self.out_dir, exist_ok=True)
        self.lock = open(os.path.join(self.out_dir, "lock"), "a")  # noqa: SIM115 closing unlocks
        try:
            import fcntl

            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            todo = "wait for it or choose another --out_dir"
            raise UserError(f"{self.out_dir} is in use by another process; {todo}") from None
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        held = map(os.path.exists, (self.last, self.best, self.metrics))
        if not (resume or overwrite) and any(held):
            todo = "--resume it, " * os.path.exists(self.last)
            todo += "--overwrite it or choose another --out_dir"
            raise UserError(f"{self.out_dir} already holds a run: {todo}")

    def replace(self, resume, step, described, wandb_project=""):
        """Remove the run that is overwritten, or on resume the rows after `step`; write config.json."""
        if not self.machine.master:
            return
        if wandb_project:
            described["wandb_id"] = self._start_wandb(wandb_project, resume, described)
        if resume:
            self._keep_rows(step)
        else:
            for path in (self.last, self.best, self.metrics):
                Path(path).unlink(missing_ok=True)
                remove_parts(path)
        described["torchrun"] = os.environ.get("TORCHELASTIC_RUN_ID")
        write_text(self.config, json.dumps(described, indent=1, allow_nan=False))

    def _keep_rows(self, step):
        """Drop the rows after `step`, which will be written again, and half a line of a killed process."""
        kept = []
        try:
            with open(self.metrics, encoding="utf-8") as f:
                whole = [line for line in f if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= step]
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError):
            todo = "move it away, and --resume continues without its rows"
            raise UserError(f"{self.metrics} is damaged; {todo}") from None
        write_text(self.metrics, "".join(kept))

    def _start_wandb(self, project, resume, described):
        """Start logging to Weights & Biases -> id of its run, which a resumed run continues."""
        known = read_json(self.config).get("wandb_id") if resume else None
        name = os.path.basename(os.path.abspath(self.out_dir))
        how = dict(id=known, resume="allow", config=described)
        try:
            import wandb

            self.wandb = wandb.init(project=project, name=name, **how)
        except Exception as e:  # ImportError, wandb.errors.Error, and what the network throws
            todo = "pip install wandb, use `wandb login`, or WANDB_MODE=offline"
            raise UserError(f"wandb: {one_line(e)}; {todo}") from None
        return self.wandb.id

    def add(self, row, line, sync=False):
        """Append a row, a dict, to metrics.jsonl and print `line`. sync: wait until it is on the disk."""
        if not self.machine.master:
            return
        try:
            with open(self.metrics, "a", encoding="utf-8") as f:
                f.write(json.dumps(row, allow_nan=False) + "\n")
                f.flush()
                if sync:
                    os.fsync(f.fileno())
        except OSError as e:
            raise UserError(f"cannot write {self.metrics}: {e.strerror}; make room") from None
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        self.machine.say(line)

    def finish(self):
        if self.wandb:
            self.wandb.finish()


def knobs_of_run(c):
    """With --resume, the knobs of the run in out_dir, from its config.json."""
    path = os.path.join(c.out_dir, "config.json")
    if not c.resume or not os.path.exists(path):
        return {}
    saved = read_json(path).get("config")
    if not isinstance(saved, dict):
        raise UserError(f"{path} is damaged; move it away, and give --resume all knobs")
    saved, of_command = renamed(saved), {"out_dir", "resume", "allow_changes", "overwrite"}
    return {key: saved[key] for key in vars(c).keys() & saved.keys() - of_command}


def progress(row, max_steps, seconds_per_step):
    """The line printed for a row of metrics.jsonl."""
    eta = int(seconds_per_step * (max_steps - row["step"]))
    line = f"step {row['step']:>{len(str(max_steps))}}/{max_steps} | s {row['bag_size']}"
    line += f" | loss {row['loss']:.4f}"
    line += f" | val {row['val_loss']:.4f}" if "val_loss" in row else ""
    line += f" ({row['val_bpb']:.4f} bits/byte)" if "val_bpb" in row else ""
    line += f" | lr {row['lr']:.2e} | norm {row['grad_norm']:.2f} | {seconds_per_step * 1e3:.1f} ms"
    line += f" | {row['positions_per_second'] / 1e3:.1f}k pos/s"
    line += f" | mfu {row['mfu']:.1%}" if "mfu" in row else ""
    if "max_violation" in row:
        line += f" | max vio {row['max_violation']:.2f}, dead {row['dead_experts_worst']}"
    return line + f" | eta {eta // 60}m{eta % 60:02d}s"


def router_metrics(load, entropy):
    """Columns about the MoE routers: load (n_layer, E) positions by expert, entropy (n_layer,) nats."""
    violation = load.amax(1) / load.mean(1) - 1  # (n_layer,) of the busiest expert
    dead = (load == 0).sum(1)  # (n_layer,)
    return {
        "max_violation": violation.mean().item(),
        "max_violation_worst": violation.max().item(),
        "router_entropy": entropy.mean().item(),
        "router_entropy_worst": entropy.min().item(),
        "dead_experts": dead.float().mean().item(),
        "dead_experts_worst": dead.max().item(),
    }


def describe_run(c, machine, model, stream, compiled, micro_steps, step):
    """Say what is trained, on what, on how much text, and which settings are probably mistakes."""
    say, tokens = machine.say, stream.tokens_at(c.max_steps)
    active = f" ({model.n_params(active=True):,} active)" if c.n_expert else ""
    ranks = f", {machine.world_size} ranks" if machine.distributed else ""
    how = f"{machine.dtype}, {'compiled' if compiled else 'eager'}, {machine.name}"
    say(f"{model.n_params():,} parameters{active}, {how}{ranks}")
    if step >= c.max_steps:
        say(f"{c.out_dir} is finished: step {step:,} of {c.max_steps:,}")
        bags = "; lower --superposition_ratio in proportion, or bags return" * (c.bag_size != 1)
        say(f"to train longer, use --resume --allow_changes --max_steps=N{bags}")
        return
    if step:
        say(f"resuming {c.out_dir} after step {step:,} of {c.max_steps:,}")
    if bagged := [p for p in stream.phases if p.bag_size > 1]:
        steps, sizes = sum(p.stop - p.start for p in bagged), [str(p.bag_size) for p in bagged]
        first = f"TST: {steps:,} of {c.max_steps:,} steps on bags of {'-'.join(sizes)}"
        first += ", then ordinary training" * (steps < c.max_steps)
        more = f"{tokens / c.max_steps / c.total_batch:.2f} x the text of a baseline"
        say(f"{first}; {more} at the same FLOPs")
    else:
        say("ordinary training, without superposition")
    epochs = tokens / stream.epoch_tokens
    size = f"{c.total_batch:,} positions (micro-steps per rank: {micro_steps})"
    say(f"{c.max_steps:,} steps of {size}; {tokens:,} tokens, {epochs:.2f} epochs of the corpus")
    decay = round(c.decay_ratio * c.max_steps) if c.schedule == "wsd" else 0
    if c.warmup_steps + decay > c.max_steps:
        say(f"note: {c.warmup_steps} steps of warmup and {decay} of decay do not fit in max_steps")
    if epochs > 8:
        say(f"note: the run reads its text {epochs:.0f} times; use more text or fewer steps")
