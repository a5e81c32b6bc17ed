"""DCLM-baseline as tokens. See Config in data/hub.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import hub  # noqa: E402

if __name__ == "__main__":
    hub.command(__file__, "mlfoundations/dclm-baseline-1.0", ".jsonl.zst")
