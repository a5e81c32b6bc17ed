"""DCLM-baseline as tokens. See Config."""

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from data.hub import prepare_from_hub  # noqa: E402
from nanotst.configurator import entry_point  # noqa: E402


@dataclass
class Config:
    """DCLM-baseline (Hugging Face hub, jsonl.zst) as tokens, in shards of 100M.

        pip install huggingface_hub pyarrow
        python data/dclm/prepare.py --tokens=10B [--encoding=path/to/llama-3/tokenizer.model]

    Files are removed when their tokens are written. The same command resumes a preparation.
    """

    tokens: str = "10B"  # tokens to train on; 0 for all there are
    val_tokens: str = "10M"  # tokens to validate on, from the first file
    encoding: str = "gpt2"  # bytes, a name that tiktoken knows, or the path of a rank file
    folder: str = ""  # folder of the repository; all of it if empty
    revision: str = ""  # commit, branch or tag of the repository; the newest if empty
    seed: int = 0  # seed of the order of files and documents
    shard_tokens: str = "100M"  # tokens in a file of the corpus
    workers: int = 0  # tokenising threads; 0 for one per core
    overwrite: bool = False  # whether another corpus in out_dir may be replaced
    out_dir: str = str(HERE)  # folder to write to


def main(config):
    prepare_from_hub("mlfoundations/dclm-baseline-1.0", ".jsonl.zst", config)


if __name__ == "__main__":
    entry_point(main, Config)
