"""Corpora from the Hugging Face hub, by whole files: reading rows from the hub is soon refused (HTTP 429).

huggingface_hub does the fetching. It resumes broken downloads, retries, and checks what it got. HF_ENDPOINT,
HF_TOKEN and HF_HOME mean what they always do.
"""

import hashlib
import os

from data.documents import Options, needs
from data.pipeline import prepare, token_count
from data.writer import PROGRESS, Writer, prepared, read_json
from nanotst import UserError
from nanotst.corpus import differing
from nanotst.tokenizer import get_tokenizer


def prepare_from_hub(repo, suffix, config):
    """The corpus of a repository on the hub. `config` is the Config of its prepare script."""
    if config.seed < 0:
        raise UserError("--seed must be at least 0")
    knobs = {key: getattr(config, key) for key in ("folder", "revision", "seed", "encoding")}
    for key in ("tokens", "val_tokens", "shard_tokens"):
        knobs[key] = token_count(getattr(config, key), key)
    knobs["repo"], tokenizer = repo, get_tokenizer(config.encoding)
    if prepared(config.out_dir, knobs, config.overwrite):
        return
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # two bars at once are unreadable
    needs("pyarrow", repo)  # before anything is fetched
    hub = needs("huggingface_hub", repo)
    begun = read_json(os.path.join(config.out_dir, PROGRESS)).get("knobs", {})
    revision = config.revision if differing(knobs, begun, knobs) else begun["commit"]
    files, knobs["commit"] = list_files(hub, repo, suffix, config, revision)
    size = sum(f.size for f in files) / 1e9
    print(f"{repo}/{config.folder} at {knobs['commit']}: {len(files):,} files, {size:,.1f} GB")
    out = Writer(config.out_dir, tokenizer, knobs, knobs["shard_tokens"], config.seed)
    out.source = [f"{repo} at {knobs['commit']}, seed {config.seed}"]
    where = dict(repo_type="dataset", revision=knobs["commit"], local_dir=out.folder)

    def fetch(name):
        print(f"fetching {name}")
        return ask(f"fetching {name} of {repo}", hub.hf_hub_download, repo, name, **where)

    inputs = [("train" if i else "val", [f.path]) for i, f in enumerate(files)]
    limits = dict(val=knobs["val_tokens"], train=knobs["tokens"])
    prepare(inputs, out, Options(), fetch=fetch, limits=limits, workers=config.workers)


def list_files(hub, repo, suffix, config, revision):
    """-> (files of a folder, commit). The order depends on the seed: the first files are a sample of all."""
    api, doing = hub.HfApi(), f"listing {repo}/{config.folder}"
    commit = ask(doing, api.dataset_info, repo, revision=revision or None).sha
    where = dict(recursive=True, revision=commit, repo_type="dataset")
    tree = ask(doing, lambda: list(api.list_repo_tree(repo, config.folder or None, **where)))
    files = [f for f in tree if f.path.endswith(suffix)]
    if len(files) < 2:
        raise UserError(f"{repo}/{config.folder} has {len(files)} files *{suffix}, two are needed")
    files.sort(key=lambda f: hashlib.sha256(f"{config.seed} {f.path}".encode()).digest())
    return files, commit


def ask(doing, function, *args, **kwargs):
    """Call huggingface_hub. Its errors are of many classes, and all the network's or the hub's."""
    try:
        return function(*args, **kwargs)
    except Exception as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{doing} failed ({type(e).__name__}: {reason})") from e
