"""How fast data/text/prepare.py is beside tiktoken alone, and how much memory it needs for ever larger files.

    python tests/measured_preparation.py TEXT

TEXT, which may be packed, has lines that hold <|endoftext|> between documents. GPT-2 tokens. For the rate
one worker, and rounds of both sides alternate, since other programs may share the machine. Linux only.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import tiktoken

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data.documents import PIECE, Options, read_documents  # noqa: E402
from data.text import prepare  # noqa: E402

RATE_MB, ROUNDS = 20, 15
MEMORY_MB, TIMES = 10, (1, 4, 16)
# a script, and then its peak memory in kB. getrusage would also count what the parent held at the start
WITH_PEAK = """
import re, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(re.search("VmHWM:.*", open("/proc/self/status").read())[0])
"""
SEPARATOR = "\n<|endoftext|>\n"


def write_part(path, source, megabytes):
    """The first documents of `source` as a file of that size."""
    size = 0
    with open(path, "w", encoding="utf-8") as f:
        for text, last, _ in read_documents(source, Options()):
            size += f.write(text + SEPARATOR * last)
            if last and size >= megabytes * 1e6:
                break


def seconds(function):
    """-> (seconds of the processor, seconds of the clock)"""
    began, clock = time.process_time(), time.perf_counter()
    function()
    return time.process_time() - began, time.perf_counter() - clock


def measure_rate(source, folder):
    """Lines: each round, and the medians."""
    path = folder / "part.txt"
    write_part(path, source, RATE_MB)
    pieces = [text for text, _, _ in read_documents(str(path), Options())]
    megabytes = sum(len(p.encode()) for p in pieces) / 1e6
    encode = tiktoken.get_encoding("gpt2").encode_to_numpy
    config = prepare.Config(
        inputs=[str(path)], encoding="gpt2", workers=1, out_dir=str(folder / "out")
    )

    def alone():
        for piece in pieces:
            encode(piece, disallowed_special=())

    def pipeline():
        with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
            prepare.main(config)

    alone(), pipeline()  # once before measuring
    ratios = []
    print(f"{megabytes:.1f} MB of text, {len(pieces):,} pieces of at most {PIECE / 1024:.0f} KB")
    print(
        "MB/s by the processor's time, and by the clock: tiktoken alone, the pipeline, their ratio"
    )
    for _ in range(ROUNDS):
        rates = [[megabytes / s for s in seconds(side)] for side in (alone, pipeline)]
        ratios.append([b / a for a, b in zip(*rates)])
        print("  ".join(f"{a:5.2f} {b:5.2f} {b / a:.2f}" for a, b in zip(*rates)))
    for of, side in zip(("the processor", "the clock"), zip(*ratios)):
        low, median, high = statistics.quantiles(side)
        print(
            f"ratio by the time of {of}: median {median:.2f}, half of the rounds in {low:.2f} to {high:.2f}"
        )


def measure_memory(source, folder):
    for times in TIMES:
        path = folder / "part.txt"
        write_part(path, source, MEMORY_MB * times)
        script, out = str(ROOT / "data/text/prepare.py"), folder / "out"
        command = [
            sys.executable,
            "-c",
            WITH_PEAK,
            script,
            str(path),
            "--encoding=gpt2",
            f"--out_dir={out}",
        ]
        said = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        size, peak = path.stat().st_size / 1e6, int(said.stdout.split()[-2]) / 1024
        print(f"peak memory for a file of {size:5.1f} MB: {peak:.0f} MB")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        measure_rate(sys.argv[1], Path(folder))
        measure_memory(sys.argv[1], Path(folder))


if __name__ == "__main__":
    main()
