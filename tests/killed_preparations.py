"""Kill a preparation again and again at random moments (kill -9), start it again each time, and compare what
comes out with that of a preparation nobody disturbed. One line a kill, and exit code 1 if anything differs.

    python tests/killed_preparations.py data/text/prepare.py TEXT --encoding=gpt2 --shard_tokens=2M

The first argument is a prepare script, the others are its own; out_dir is a temporary folder.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KILLS = 20


def finished_shards(out):
    """{name: inode} of the shards that a preparation has noted as finished, also when they are being
    moved."""
    try:
        shards = json.loads((out / "unfinished.tmp" / "progress.json").read_text())["shards"]
    except FileNotFoundError:
        return {}
    inodes = {
        p.name: p.stat().st_ino
        for folder in (out, out / "unfinished.tmp")
        for p in folder.glob("*.bin")
    }
    noted = [
        f"{split}_{i:05d}.bin" for split in ("train", "val") for i in range(count(shards, split))
    ]
    return {name: inodes.get(name) for name in noted}


def count(shards, split):
    return sum(shard["split"] == split for shard in shards)


def campaign(command, folder, kills, seed=0, say=lambda line: None):
    """command: a preparation without its --out_dir. -> lines about what differs, none if all is well."""
    rng, wrong, n_killed, n_resumed = random.Random(seed), [], 0, 0

    def start(out):
        return subprocess.Popen([*command, f"--out_dir={out}"], stdout=log, stderr=log)

    def finished(process):
        if process.wait():
            wrong.append(f"exit code {process.returncode}: {(folder / 'log').read_text()[-300:]}")
        return True

    with open(folder / "log", "w") as log:
        began, out = time.time(), folder / "killed"
        finished(start(folder / "undisturbed"))
        seconds = time.time() - began
        for i in range(kills):
            before, process = finished_shards(out), start(out)
            n_resumed += bool(before)
            wanted = (
                len(before) + rng.randint(0, 1) or 1
            )  # shards; by time alone a busy machine would have none
            try:
                while process.poll() is None and len(finished_shards(out)) < wanted:
                    time.sleep(0.002)
                process.wait(rng.uniform(0, 0.1) * seconds)
                how = "had finished"
                finished(process)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                how = "killed"
                n_killed += 1
            after = finished_shards(out)
            say(f"{i + 1:3d} {how}: {len(before)} finished shards before, {len(after)} after")
            if (
                how == "killed"
                and not (out / "meta.json").exists()
                and before.items() - after.items()
            ):
                wrong.append(
                    f"kill {i + 1}: shards were made again: {sorted(before.items() - after.items())}"
                )
        finished(start(out))
    if not n_killed or not n_resumed:
        wrong.append(f"nothing was tried: {n_killed} killed, {n_resumed} gone on with")
    if files(out) != files(folder / "undisturbed"):
        wrong.append("the files differ from those of the undisturbed preparation")
    if (out / "unfinished.tmp").exists():
        wrong.append("unfinished.tmp was left behind")
    return wrong


def files(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*") if p.is_file()}


def main():
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        wrong = campaign([sys.executable, *sys.argv[1:]], Path(folder), KILLS, say=print)
    print(
        *wrong or [f"{KILLS} kills: the same files, byte for byte, and no shard made twice"],
        sep="\n",
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
