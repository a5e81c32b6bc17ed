"""What train.py is built on, one job per file. train.py can be followed without reading any of it.

stream, mixture           which text each step reads
corpus, formats           token files, and the folders that hold them
tokenizer, vocabulary     text to ids and back
optim                     AdamW, Muon, the learning-rate schedule
machine, parallel         device, ranks, signals; DDP and FSDP
checkpoint, sharded       saving, loading, resuming
log                       the folder of a run, its log, what it prints
files, configurator       atomic file writes; knobs from files and the command line
huggingface               initial weights from Hugging Face folders
kernels, cpu              faster twins of functions in tst.py and model.py
"""

import importlib.util
import os

USERS_ENVIRONMENT = dict(os.environ)  # for other people's programs that we start
# GNU's OpenMP, on which torch runs on Linux, reads GOMP_SPINCOUNT when torch is imported. By default threads
# spin while they wait for each other, and beside another job a training step then takes ten times as long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

for package in ("torch", "numpy"):  # every command imports this file first
    if importlib.util.find_spec(package) is None:
        todo = "activate the environment (source .venv/bin/activate) or pip install -r requirements.txt"
        raise SystemExit(f"error: the package {package} is missing: {todo}")


class UserError(Exception):
    """An error that the user can act on, in one line. Libraries raise it; configurator.entry_point prints it
    and exits with 1. Any other exception is a bug and keeps its traceback."""
