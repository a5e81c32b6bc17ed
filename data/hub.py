"""Corpora on the Hugging Face hub: whole files, fetched one ahead of the one being read.

huggingface_hub does the fetching: it goes on where a connection broke, tries again, and checks what came.
Reading rows from the hub instead is refused after a while (HTTP 429). HF_ENDPOINT, HF_TOKEN and HF_HOME mean
what they always do.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass

from data.documents import Options, needs
from data.pipeline import File, Group, prepare, token_count, vocabulary
from data.token_files import FETCHED, UNFINISHED
from nanotst import UserError
from nanotst.corpus import differing
from nanotst.tokenizer import get_tokenizer


@dataclass
class HubFile(File):
    repo: str = ""
    revision: str = ""
    folder: str = ""  # to fetch to, or "" for the hub's own cache, where files stay

    must_be_fetched = True

    @property
    def stays(self):
        return not self.folder

    @property
    def lies_in(self):
        return self.folder or needs("huggingface_hub.constants", self.repo).HF_HUB_CACHE

    def is_here(self):
        if self.folder:
            return os.path.exists(os.path.join(self.folder, self.name))
        find = needs("huggingface_hub", self.repo).try_to_load_from_cache
        return isinstance(
            find(self.repo, self.name, revision=self.revision, repo_type="dataset"), str
        )

    def fetch(self):
        hub = needs("huggingface_hub", self.repo)
        needs("tqdm", self.repo).tqdm.write(f"fetching {self.name} ({self.size / 1e9:.2f} GB)")
        return ask(
            f"fetching {self.name} of {self.repo}",
            hub.hf_hub_download,
            self.repo,
            self.name,
            repo_type="dataset",
            revision=self.revision,
            local_dir=self.folder or None,
        )

    def release(self):
        if self.folder:
            with suppress(FileNotFoundError):  # before the last stop
                os.remove(os.path.join(self.folder, self.name))


def prepare_from_hub(repo, suffix, config):
    """The corpus of a prepare script over a repository of the hub. `config` is its Config."""
    if config.seed < 0:
        raise UserError("--seed is at least 0")
    sizes = {
        n: token_count(getattr(config, n), n) for n in ("tokens", "val_tokens", "shard_tokens")
    }
    tokenizer = get_tokenizer(config.encoding)
    knobs = dict(
        repo=repo, revision=config.revision, folder=config.folder, seed=config.seed, **sizes
    )
    knobs["encoding"] = vocabulary(tokenizer)
    if prepared_already(config.out_dir, knobs):
        print(f"{config.out_dir} is prepared already; remove its meta.json to do it again")
        return
    needs(
        "zstandard" if suffix.endswith(".zst") else "pyarrow.parquet", repo
    )  # before anything is fetched
    files = list_files(repo, suffix, config)
    revision = files[0].revision
    size = sum(f.size for f in files)
    print(
        f"{repo}/{config.folder} at {revision}: {len(files):,} files, {size / 1e9:,.1f} GB; "
        f"{files[0].name} is validated on"
    )
    if not config.keep:
        print(
            "each file is removed when its tokens are written (--keep leaves it in the hub's cache)"
        )
    groups = [
        Group("val", files[:1], sizes["val_tokens"]),
        Group("train", files[1:], sizes["tokens"]),
    ]
    prepare(
        groups,
        tokenizer,
        config.out_dir,
        Options(seed=config.seed),
        workers=config.workers,
        shard_tokens=sizes["shard_tokens"],
        seed=config.seed,
        source=[f"{repo} at {revision}, seed {config.seed}"],
        knobs=knobs,
    )


def prepared_already(out_dir, knobs):
    """Whether the corpus is there. UserError if another one is."""
    if os.path.exists(os.path.join(out_dir, UNFINISHED)):
        return False
    try:
        with open(os.path.join(out_dir, "meta.json"), encoding="utf-8") as f:
            saved = json.load(f).get("knobs", {})
    except FileNotFoundError:
        return False
    except ValueError:  # damaged
        saved = {}
    if different := differing(knobs, saved, knobs):
        raise UserError(
            f"{out_dir} holds a corpus of other knobs ({different}): choose another --out_dir, or remove its "
            "meta.json"
        )
    return True


def list_files(repo, suffix, config):
    """The HubFiles of a folder in an order that depends on the seed: the first ones are a sample of all."""
    hub = needs("huggingface_hub", repo)
    needs("huggingface_hub.utils", repo).disable_progress_bars()  # two bars at once are unreadable
    api, doing = hub.HfApi(), f"listing {repo}/{config.folder}"
    revision = ask(doing, api.dataset_info, repo, revision=config.revision or None).sha
    tree = ask(
        doing,
        lambda: list(
            api.list_repo_tree(
                repo, config.folder or None, recursive=True, revision=revision, repo_type="dataset"
            )
        ),
    )
    folder = "" if config.keep else os.path.join(config.out_dir, UNFINISHED, FETCHED)
    files = [
        HubFile(f.path, f.size, f.blob_id, repo, revision, folder)
        for f in tree
        if f.path.endswith(suffix)
    ]
    if len(files) < 2:
        raise UserError(
            f"{repo}/{config.folder} has {len(files)} files *{suffix}; two or more are needed"
        )
    return sorted(files, key=lambda f: hashlib.sha256(f"{config.seed} {f.name}".encode()).digest())


def ask(doing, function, *args, **kwargs):
    """A call of huggingface_hub. Its errors are of many classes and all the network's or the hub's."""
    try:
        return function(*args, **kwargs)
    except Exception as e:
        reason = " ".join(str(e).split())[:200]
        status = getattr(getattr(e, "response", None), "status_code", None)
        refused = status in range(400, 500) and status not in (
            408,
            429,
        )  # time-out, too many requests
        again = "" if refused else "; start again to go on"
        raise UserError(f"{doing} failed ({type(e).__name__}: {reason}){again}") from e
