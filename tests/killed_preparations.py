"""Kill a preparation again and again at random moments (kill -9), start it again each time, and compare what comes
out with that of a preparation nobody disturbed. One line a kill, and exit code 1 if anything differs.

    python tests/killed_preparations.py data/text/prepare.py TEXT --encoding=gpt2 --shard_tokens=2M

The first argument is a prepare script, the others are its own; out_dir is a temporary folder.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KILLS = 20


def finished_shards(folder):
    """{name: inode} of the shards that a preparation has noted as finished."""
    try:
        n = (folder / "unfinished.tmp" / "progress.json").read_text().count('"sha256"')
    except FileNotFoundError:
        return {}
    shards = {p.name: p.stat().st_ino for p in (folder / "unfinished.tmp").glob("*.bin")}
    return shards if len(shards) >= n else {}


def campaign(command, folder, kills, seed=0, say=lambda line: None):
    """command: a preparation without its --out_dir. -> lines about what differs, none if all is well."""
    rng, wrong = random.Random(seed), []

    def start(out):
        return subprocess.Popen([*command, f"--out_dir={out}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def whole(out):
        process = start(out)
        _, errors = process.communicate()
        if process.returncode:
            wrong.append(f"exit code {process.returncode}: {errors.decode()[-300:]}")
        return {p.name: p.read_bytes() for p in Path(out).glob("*") if p.is_file()}

    began = time.time()
    expected = whole(folder / "undisturbed")
    seconds, out = time.time() - began, folder / "killed"
    for i in range(kills):
        before, process = finished_shards(out), start(out)
        process.stderr.close()
        try:
            process.wait(rng.uniform(0.1, 0.5) * seconds)
            how = "had finished"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            how = "killed"
        after = finished_shards(out)
        say(f"{i + 1:3d} {how}: {len(before)} finished shards before, {len(after)} after")
        if how == "killed" and not (out / "meta.json").exists() and before.items() - after.items():
            wrong.append(f"kill {i + 1}: shards were made again: {sorted(before.items() - after.items())}")
    if whole(out) != expected:
        wrong.append("the files differ from those of the undisturbed preparation")
    if (out / "unfinished.tmp").exists():
        wrong.append("unfinished.tmp was left behind")
    return wrong


def main():
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        wrong = campaign([sys.executable, *sys.argv[1:]], Path(folder), KILLS, say=print)
    print(*wrong or [f"{KILLS} kills: the same files, byte for byte, and no shard made twice"], sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
