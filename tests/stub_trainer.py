"""Stands in for train.py in tests of tools/sweep.py and tools/compare.py, with losses in closed form.

A baseline of n steps ends at 5 - log2(n) / 4, TST where one of 1.6 n steps would, both higher as s, r and the
rate are off 4, 0.3 and 0.01; a seed adds 0.01 times itself. A run whose dataset is no file fails.
A row takes min_lr_ratio seconds.
"""

import json
import math
import re
import signal
import sys
import time
from os import environ
from pathlib import Path


def names(folder):
    """Runs in the folder of a sweep or comparison."""
    return sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))


def lines(text):
    """The cells of all lines of the tables in a text, but for the header's rule."""
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if "-:" not in row[0]]


def end_of(steps, seed=1, s=1, r=0.3, rate=0.01):
    """The final loss."""
    off = 0.02 * abs(s - 4) ** 1.5 + abs(r - 0.3) if s > 1 else 0
    length = steps * (1.6 if s > 1 else 1)
    return 5 - math.log2(length) / 4 + off + 10 * abs(rate - 0.01) + 0.01 * seed


def main():
    c = dict(bag_size=1, superposition_ratio=0.3, seed=1337, schedule="wsd", decay_ratio=0.1)
    for arg in sys.argv[1:]:
        key, _, text = arg[2:].partition("=")
        c[key] = json.loads(text) if re.fullmatch(r"[\d.e-]+", text) else text
    folder = Path(c.pop("out_dir"))
    log, last = folder / "metrics.jsonl", folder / "last.pt"
    (folder / "config.json").write_text(json.dumps(dict(config=c, data={})))
    env = {name: environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    with open(folder / "starts.jsonl", "a") as f:
        f.write(json.dumps([sys.argv[1:], env]) + "\n")
    if "dataset" in c and not Path(c["dataset"]).exists():
        sys.exit(f"error: no corpus {c['dataset']}")
    steps, s, r = c["max_steps"], c["bag_size"], c["superposition_ratio"]
    end = end_of(steps, c["seed"], s, r, c["learning_rate"])
    switch = round(r * steps) if s > 1 else 0
    stopped, step = [], int(last.read_text()) if "resume" in c else 0
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    rows = log.read_text().splitlines(True)[:step] if step else []
    with open(log, "w") as f:
        f.writelines(rows)
        while step < steps and not stopped:
            step += 1
            if step % max(1, steps // 100) and step not in (switch, steps):
                continue
            time.sleep(c.get("min_lr_ratio", 0))
            loss = end + (steps - step) / steps
            row = dict(step=step, bag_size=s if step <= switch else 1, loss=loss, positions=step)
            row |= dict(data_tokens=step + (s - 1) * min(step, switch), flops=step * 1e9)
            f.write(json.dumps(row | dict(val_loss=loss, seconds=float(step))) + "\n")
            f.flush()
            if step % 10 == 0 or stopped:
                last.write_text(str(step))
    if stopped:
        sys.exit(f"stopped after step {step}")


if __name__ == "__main__":
    main()
