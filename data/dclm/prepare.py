"""DCLM-baseline as tokens. See Config in data/hub.py."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from data.hub import Config, prepare_from_hub  # noqa: E402
from nanotst.configurator import entry_point  # noqa: E402


def main(config):
    prepare_from_hub(config, HERE, "mlfoundations/dclm-baseline-1.0", ".jsonl.zst")


if __name__ == "__main__":
    entry_point(main, Config)
