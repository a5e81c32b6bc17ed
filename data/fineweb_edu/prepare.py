"""FineWeb-Edu as tokens. See Config."""

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from data.hub import prepare_from_hub  # noqa: E402
from nanotst.configurator import entry_point  # noqa: E402


@dataclass
class Config:
    """FineWeb-Edu (Hugging Face hub, parquet) as tokens, in shards of 100M.

        pip install huggingface_hub pyarrow
        python data/fineweb_edu/prepare.py --tokens=10B [--encoding=path/to/llama-3/tokenizer.model]

    Files are taken in an order of the seed, documents are shuffled (row groups within a file, documents
    within a shard), and the first file is kept for validation. Stopped and started again, it goes on.
    """

    tokens: str = "10B"  # to train on; 0: all there are
    val_tokens: str = "10M"  # to validate on
    encoding: str = "gpt2"  # bytes, a name that tiktoken knows, or the path of a rank file
    folder: str = (
        "sample/100BT"  # of the repository: sample/10BT, sample/100BT, sample/350BT or data
    )
    revision: str = ""  # commit, branch or tag of the repository; empty: the newest
    seed: int = 0  # order of files and documents
    shard_tokens: str = "100M"  # tokens of a file of the corpus
    workers: int = 0  # tokenising threads; 0: one a core
    keep: bool = (
        False  # leave the files in the hub's cache instead of removing each when it is done
    )
    out_dir: str = str(HERE)  # folder to write to


def main(config):
    prepare_from_hub("HuggingFaceFW/fineweb-edu", ".parquet", config)


if __name__ == "__main__":
    entry_point(main, Config)
