"""Corpora from the Hugging Face hub, by whole files: reading rows from the hub is soon refused (HTTP 429).

huggingface_hub does the fetching. It resumes broken downloads, retries, and checks what it got. HF_ENDPOINT,
HF_TOKEN and HF_HOME mean what they always do.
"""

import contextlib
import hashlib
import os
from dataclasses import dataclass

from data.documents import Options, needs
from data.writer import PROGRESS, Writer, prepare, prepared, token_count
from nanotst import UserError
from nanotst.configurator import entry_point
from nanotst.corpus import differing
from nanotst.files import read_json
from nanotst.tokenizer import get_tokenizer


@dataclass
class Config:
    """A corpus from the Hugging Face hub as tokens, in shards of 100M.

        pip install huggingface_hub pyarrow
        python data/dclm/prepare.py --tokens=10B [--encoding=path/to/llama-3/tokenizer.model]
        python data/fineweb_edu/prepare.py --tokens=10B

    A file is removed when its tokens are written. The same command resumes a preparation.
    """

    tokens: str = "10B"  # tokens to train on; 0 for all there are
    val_tokens: str = "10M"  # tokens to validate on, from the first file
    encoding: str = "gpt2"  # bytes, a name that tiktoken knows, or a rank file, split as Llama 3's
    folder: str = ""  # folder of the repository; empty: all of DCLM, sample/100BT of FineWeb-Edu
    revision: str = ""  # commit, branch or tag of the repository; the newest if empty
    seed: int = 0  # seed of the order of files and documents
    shard_tokens: str = "100M"  # tokens in a file of the corpus
    overwrite: bool = False  # whether another corpus in out_dir may be replaced
    out_dir: str = ""  # folder to write to; empty: the one of the script


def main(config, script, repo, suffix, folder=""):
    """The corpus of the files *`suffix` of a repository, beside `script` unless `config` says otherwise."""
    out_dir, folder = config.out_dir or os.path.dirname(script), config.folder or folder
    knobs = dict(repo=repo, folder=folder, revision=config.revision, seed=config.seed)
    for key in ("tokens", "val_tokens", "shard_tokens"):
        knobs[key] = token_count(getattr(config, key), key)
    knobs["encoding"], tokenizer = config.encoding, get_tokenizer(config.encoding)
    if prepared(out_dir, knobs, config.overwrite):
        return
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # two bars at once are unreadable
    needs("pyarrow", repo)  # before anything is fetched
    hub = needs("huggingface_hub", repo)
    begun = read_json(os.path.join(out_dir, PROGRESS)).get("knobs", {})
    revision = config.revision if differing(knobs, begun, knobs) else begun["commit"]
    api, there = hub.HfApi(), f"{repo}/{folder}"
    with asking(f"listing {there}"):
        knobs["commit"] = commit = api.dataset_info(repo, revision=revision or None).sha
        where = dict(repo_type="dataset", revision=commit)
        tree = api.list_repo_tree(repo, folder or None, recursive=True, **where)
        files = [file.path for file in tree if file.path.endswith(suffix)]
    if len(files) < 2:
        raise UserError(f"{there} has {len(files)} files *{suffix}, two are needed")
    # the first files are a sample of all
    files.sort(key=lambda path: hashlib.sha256(f"{config.seed} {path}".encode()).digest())
    print(f"{there} at {commit}: {len(files):,} files")
    out = Writer(out_dir, tokenizer, knobs, knobs["shard_tokens"], config.seed)
    out.source = [f"{repo} at {commit}, seed {config.seed}"]

    def fetched(name):
        print(f"fetching {name}")
        with asking(f"fetching {name} of {repo}"):
            yield hub.hf_hub_download(repo, name, local_dir=out.folder, **where)

    inputs = [("val", fetched(files[0]), knobs["val_tokens"])]
    inputs += [("train", fetched(name), knobs["tokens"]) for name in files[1:]]
    prepare(inputs, out, Options(), temporary=True)


@contextlib.contextmanager
def asking(doing):
    """For calls of huggingface_hub. Its errors are of many classes, and all the network's or the hub's."""
    try:
        yield
    except Exception as e:
        todo = "the same command resumes"
        raise UserError(f"{doing} failed ({type(e).__name__}: {e!s:.200}); {todo}") from e


def command(*corpus):
    entry_point(lambda config: main(config, *corpus), Config)
