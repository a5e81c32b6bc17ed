"""Stands in for train.py in tests of tools/sweep.py and tools/compare.py, with losses in closed form.

A baseline of n steps ends at 5 - log2(n) / 4, TST where one of 1.6 n steps would, both higher as s, r and the
rate are off 4, 0.3 and 0.01; a seed adds 0.01 times itself. A run whose dataset is no file fails.
"""

import json
import math
import os
import signal
import sys
import time


def names(folder):
    """Runs in the folder of a sweep or comparison."""
    return sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))


def cells(text):
    """{first cell: the other cells} of the tables in a text."""
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def end_of(steps, seed=1, s=1, r=0.3, rate=0.01):
    """The final loss."""
    off = 0.02 * abs(s - 4) ** 1.5 + abs(r - 0.3) if s > 1 else 0
    return (
        5 - math.log2(steps * (1.6 if s > 1 else 1)) / 4 + off + 10 * abs(rate - 0.01) + 0.01 * seed
    )


def main():
    given = dict(arg[2:].partition("=")[::2] for arg in sys.argv[1:] if arg.startswith("--"))
    at = lambda name: os.path.join(given["out_dir"], name)
    number = lambda key, default: float(given.get(key, default))
    with open(at("starts.jsonl"), "a") as f:
        names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        f.write(json.dumps([sys.argv[1:], {name: os.environ.get(name) for name in names}]) + "\n")
    if "dataset" in given and not os.path.exists(given["dataset"]):
        sys.exit(f"error: no corpus {given['dataset']}")
    steps, s = int(given["max_steps"]), int(given.get("bag_size", "1"))
    r, rate = number("superposition_ratio", 0.3), number("learning_rate", 0.01)
    end = end_of(steps, int(given.get("seed", "1")), s, r, rate)
    switch = round(r * steps) if s > 1 else 0
    stopped, step, rows = [], 0, []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    if "resume" in given:
        with open(at("last.pt")) as f, open(at("metrics.jsonl")) as log:
            step = int(f.read())
            rows = log.readlines()[:step]
    with open(at("metrics.jsonl"), "w") as f:
        f.writelines(rows)
        while step < steps and not stopped:
            step += 1
            if step % max(1, steps // 100) and step not in (switch, steps):
                continue
            time.sleep(number("warmup_steps", 0) / 1000)
            loss = end + (steps - step) / steps
            row = dict(step=step, bag_size=s if step <= switch else 1, loss=loss, positions=step)
            row |= dict(data_tokens=step + (s - 1) * min(step, switch), flops=step * 1e9)
            f.write(json.dumps(row | dict(val_loss=loss, seconds=float(step))) + "\n")
            f.flush()
            if step % 10 == 0 or stopped:
                with open(at("last.pt"), "w") as last:
                    last.write(str(step))
    if stopped:
        print(f"stopped after step {step}")
        sys.exit(1)


if __name__ == "__main__":
    main()
