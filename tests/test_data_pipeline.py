"""From documents to shards: resuming, limits, corpora that are in the way, and the Hugging Face hub, which is
a fake here."""

import errno
import hashlib
import os
import runpy
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zstandard
from conftest import ROOT, write_corpus
from corpora import byte_documents, contents, dataset, json_lines, make_documents, parquet
from test_tokenizer import write_ranks

from data import hub as data_hub
from data import writer
from data.text import prepare as text
from data.writer import token_count
from nanotst import UserError
from nanotst.corpus import open_corpus
from nanotst.tokenizer import get_tokenizer


@pytest.fixture
def inputs(tmp_path):
    """Three files of 60 documents, about 30 kB each."""
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.jsonl").write_text(json_lines(make_documents(60, i)))
    return tmp_path / "in"


def prepare(inputs, out, **knobs):
    knobs = dict(val_fraction=0.1, shard_tokens="20k") | knobs
    text.main(text.Config(inputs=[str(inputs)], out_dir=str(out), **knobs))


def fill(folder, value=1):
    out = writer.Writer(str(folder), get_tokenizer("bytes"), {})
    for split, ids in (("train", [value, value, 0]), ("val", [value, 0])):
        out.add(split, np.array(ids), len(ids))
    out.publish()


class Stop(Exception):
    pass


def stop_after(n, monkeypatch, noted=True):
    """Stop a preparation when it has finished n shards, with or without a note of the last one."""
    write_json = writer.write_json

    def write_and_stop(path, value):
        stop = len(value.get("shards", ())) >= n
        if noted or not stop:
            write_json(path, value)
        if stop:
            raise Stop

    monkeypatch.setattr(writer, "write_json", write_and_stop)


# ------------------------------------------------------------------------------------------------ shards


@pytest.mark.parametrize("val, noted", [(False, True), (True, True), (True, False)])
def test_stopped_after_every_shard_and_started_again(tmp_path, inputs, monkeypatch, val, noted):
    """The same files, and no shard that was noted is made again."""
    held_out = tmp_path / "v.jsonl"
    held_out.write_text(json_lines(make_documents(60, 1)[:40]))  # copies of training documents
    knobs = dict(val=str(held_out) if val else "")
    prepare(inputs, tmp_path / "whole", **knobs)
    unfinished, before, n_stops = tmp_path / "out" / "unfinished.tmp", {}, 0
    for n_shards in range(1, 100):
        with monkeypatch.context() as patch, suppress(Stop):
            stop_after(n_shards, patch, noted)
            prepare(inputs, tmp_path / "out", **knobs)
            break
        names = writer.read_json(unfinished / "progress.json").get("shards", ())
        shards = {name: (unfinished / name).stat().st_ino for name in names}
        assert before.items() <= shards.items()
        before, n_stops = shards, n_stops + 1
    assert n_stops > 3 and not unfinished.exists()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    # shards hold what one file holds
    prepare(inputs, tmp_path / "one", **knobs, shard_tokens="0")
    assert byte_documents(tmp_path / "out") == byte_documents(tmp_path / "one")
    train = [
        len(data) for name, data in sorted(contents(tmp_path / "out").items()) if "train" in name
    ]
    assert len(train) > 3 and min(train[:-1]) >= 20_000 and max(train) < 23_000
    assert len(open_corpus(str(tmp_path / "out")).train) == sum(train)


KILLED = """
import os, signal, sys
from data.text import prepare
replace = os.replace
def die(source, target):
    if target.endswith("train_00002.bin"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = die
prepare.entry_point(prepare.main, prepare.Config)
"""


def test_killed_while_a_shard_is_written_and_started_again(tmp_path, inputs):
    """A process that ends by kill -9, and the same command."""
    argv = [
        str(inputs),
        "--val_fraction=0.1",
        "--shard_tokens=20k",
        f"--out_dir={tmp_path / 'out'}",
    ]
    killed = subprocess.run([sys.executable, "-c", KILLED, *argv], cwd=ROOT, capture_output=True)
    names = {path.name for path in (tmp_path / "out" / "unfinished.tmp").iterdir()}
    assert killed.returncode == -signal.SIGKILL and "train_00002.bin.tmp" in names
    command = [sys.executable, "data/text/prepare.py", *argv]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "resuming after " in ended.stdout
    prepare(inputs, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_kill_while_the_files_move_into_place(tmp_path, inputs, monkeypatch):
    prepare(inputs, tmp_path / "whole")
    prepare(inputs, tmp_path / "out", val_fraction=0.5)  # another corpus is there before
    replace = os.replace
    for n_moved in range(4):
        moved = []

        def die(source, target, n_moved=n_moved, moved=moved):
            if os.path.dirname(target) == str(tmp_path / "out"):
                moved.append(target)
                if len(moved) > n_moved:
                    raise Stop
            replace(source, target)

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(os, "replace", die)
            prepare(inputs, tmp_path / "out", overwrite=True)
        assert not (tmp_path / "out" / "meta.json").exists()
    prepare(inputs, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# ------------------------------------------------------------------------------------- what is in the way


def test_another_corpus_is_only_replaced_when_asked_for(tmp_path, inputs, capsys):
    out = tmp_path / "out"
    prepare(inputs, out)
    before = contents(out)
    prepare(inputs, out)
    assert "out is prepared already; --overwrite prepares it again" in capsys.readouterr().out
    with pytest.raises(UserError, match="another corpus .shard_tokens 20000 there, 0 here.*--over"):
        prepare(inputs, out, shard_tokens="0")
    (inputs / "0.jsonl").write_text(json_lines(make_documents(60, 77)))
    with pytest.raises(UserError, match="out holds another corpus .files .* there, .* here"):
        prepare(inputs, out)
    assert contents(out) == before
    prepare(inputs, out, shard_tokens="0", overwrite=True)  # leaves no shards behind
    assert sorted(contents(out)) == ["meta.json", "train.bin", "val.bin"]
    foreign = Path(write_corpus(tmp_path / "foreign", range(99), range(9), 99))
    for _ in range(2):  # with a meta.json that does not say what it was made from, and without
        before = contents(foreign)
        with pytest.raises(UserError, match="foreign holds another corpus"):
            prepare(inputs, foreign)
        assert contents(foreign) == before
        (foreign / "meta.json").unlink(missing_ok=True)


def test_an_unfinished_corpus_of_something_else_is_neither_resumed_nor_lost(
    tmp_path, inputs, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(1, patch)
        prepare(inputs, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="another corpus .val_fraction 0.1 there, 0.2 here"):
        prepare(inputs, tmp_path / "out", val_fraction=0.2)
    assert contents(tmp_path / "out") == before
    prepare(inputs, tmp_path / "out", val_fraction=0.2, overwrite=True)
    prepare(inputs, tmp_path / "whole", val_fraction=0.2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_writer_that_fails_leaves_the_former_corpus_and_starts_again(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    fill(tmp_path / "out")
    old = contents(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="cannot write .*train_00000.bin: No space left"):
            fill(tmp_path / "out", 2)
        assert contents(tmp_path / "out") == old
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(1, patch)
        fill(tmp_path / "out", 2)
    assert contents(tmp_path / "out").items() > old.items()
    fill(tmp_path / "out", 3)
    assert byte_documents(tmp_path / "out") == {"train": ["\3\3"], "val": ["\3"]}


def test_each_shard_is_shuffled_in_an_order_of_its_own(tmp_path):
    out = writer.Writer(str(tmp_path), get_tokenizer("bytes"), {}, shard_tokens=64, seed=5)
    for split in ("train", "train", "val"):
        for i in range(1, 33):
            out.add(split, np.array([i, 0]), 2)
    out.publish()
    names = "train_00000.bin", "train_00001.bin", "val.bin"
    orders = [(tmp_path / name).read_bytes().replace(b"\0", b"") for name in names]
    assert len({bytes(range(1, 33)), *orders}) == 4
    assert all(sorted(order) == list(range(1, 33)) for order in orders)


def test_token_counts_in_words():
    words = {"10B": 10**10, "2.5M": 2_500_000, "100_000": 10**5, "1e9": 10**9, "3 k": 3000}
    words |= {"0": 0, "0.5k": 500, str(2**48): 2**48}
    assert {written: token_count(written, "tokens") for written in words} == words
    for wrong in ("", "ten", "-1", "10X", "1e", "nan", "0.5", "1e400", "9" * 400, "1000T"):
        with pytest.raises(UserError, match="--tokens takes a number of tokens such as 10B"):
            token_count(wrong, "tokens")


# --------------------------------------------------------------------------------------------- the hub


def zst(documents):
    return zstandard.ZstdCompressor().compress(json_lines(documents).encode())


def rows(documents):
    return parquet({"text": documents})


CORPORA = {
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample/100BT/{}.parquet", rows, "sample/100BT"),
    "dclm": ("mlfoundations/dclm-baseline-1.0", "shard_0{}/processed.jsonl.zst", zst, ""),
}


FEW = dict(encoding="bytes", tokens="0", val_tokens="5k", shard_tokens="20k")


class Hub:
    """What data/hub.py uses of huggingface_hub, for one repository of four files of 60 documents."""

    def __init__(self, corpus):
        self.script = f"{ROOT}/data/{corpus}/prepare.py"
        self.repo, self.name, pack, self.folder = CORPORA[corpus]
        self.documents = {self.name.format(i): make_documents(60, i) for i in range(4)}
        self.files = {name: pack(documents) for name, documents in self.documents.items()}
        self.files["sample/100BT/README.md"] = b"no data"
        self.newest, self.asked, self.fetched, self.missing = "c1", [], [], set()
        self.HfApi = lambda: self

    def dataset_info(self, repo, revision):
        assert repo == self.repo
        self.asked.append(revision)
        return SimpleNamespace(sha=revision if revision == "c1" else self.newest)

    def list_repo_tree(self, repo, folder, recursive, revision, repo_type):
        assert (repo, recursive, repo_type) == (self.repo, True, "dataset")
        names = [n for n in self.files if n.startswith(folder or "")]
        return [SimpleNamespace(path=name, size=len(self.files[name])) for name in names]

    def hf_hub_download(self, repo, name, repo_type, revision, local_dir):
        assert (repo, repo_type) == (self.repo, "dataset")
        if name in self.missing:
            raise ConnectionError(f"no\n{name}")
        self.fetched.append(name)
        path = Path(local_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.files[name])
        return str(path)

    def prepare(self, out, **knobs):
        where = self.script, self.repo, self.name[-8:], self.folder
        data_hub.main(data_hub.Config(out_dir=str(out), **FEW | knobs), *where)


@pytest.fixture
def hub(request, monkeypatch):
    fake = Hub(getattr(request, "param", "fineweb_edu"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


@pytest.mark.parametrize("hub", CORPORA, indirect=True)
def test_a_corpus_from_the_hub(tmp_path, hub, monkeypatch):
    knobs = [f"--{key}={value}" for key, value in FEW.items()]
    monkeypatch.setattr(sys, "argv", [hub.script, *knobs, f"--out_dir={tmp_path / 'out'}"])
    runpy.run_path(hub.script, run_name="__main__")
    assert sorted(hub.fetched) == sorted(hub.documents) and hub.asked == [None]
    splits = byte_documents(tmp_path / "out")
    # the first file in the order of the seed is held out, each training document is there once
    order = sorted(hub.documents, key=lambda n: hashlib.sha256(f"0 {n}".encode()).digest())
    assert hub.fetched == order and set(splits["val"]) < set(hub.documents[order[0]])
    assert 5_000 <= sum(len(d.encode()) + 1 for d in splits["val"]) < 6_500
    train = [d for name in order[1:] for d in hub.documents[name]]
    assert sorted(splits["train"]) == sorted(train) and splits["train"] != train
    # an input has shards of its own
    meta, _ = dataset(tmp_path / "out")
    shards = [n for n in sorted(meta["sha256"]) if n.startswith("train")]
    for n in shards:
        documents = (tmp_path / "out" / n).read_bytes().decode().split("\0")[:-1]
        assert len({document.split()[3] for document in documents}) == 1
    assert len(shards) > 5
    assert meta["source"] == [f"{hub.repo} at c1, seed 0"]
    # other seeds give other orders
    hub.prepare(tmp_path / "seed", seed=1)
    assert byte_documents(tmp_path / "seed")["train"] != splits["train"]


def test_limits_of_a_corpus_from_the_hub(tmp_path, hub):
    """Reading ends with the document that fills the limit, and what is not needed is not fetched."""
    hub.prepare(tmp_path / "out", tokens="45k", val_tokens="1M")
    sizes = [len(d.encode()) + 1 for d in byte_documents(tmp_path / "out")["train"]]
    assert 45_000 <= sum(sizes) < 45_000 + max(sizes) and len(hub.fetched) < 4


def test_a_corpus_from_the_hub_that_is_stopped(tmp_path, hub, monkeypatch):
    knobs, out = dict(revision="v1", val_tokens="20k"), tmp_path / "out"
    hub.prepare(tmp_path / "whole", **knobs)
    hub.missing = {hub.fetched[2]}
    with pytest.raises(
        UserError, match=r"^fetching .* failed \(ConnectionError: no\n.*\); the same"
    ):
        hub.prepare(out, **knobs)
    shards = {p.name: p.stat().st_ino for p in (out / "unfinished.tmp").glob("*.bin")}
    assert len(shards) > 1
    assert not list((out / "unfinished.tmp").rglob("*.parquet"))  # done with, so removed
    hub.missing, hub.newest = set(), "c2"  # the branch moves on, the preparation does not
    for n in (1, 2):  # in the middle of a file
        with monkeypatch.context() as patch, pytest.raises(Stop):
            stop_after(len(shards) + n, patch)
            hub.prepare(out, **knobs)
        assert list((out / "unfinished.tmp").rglob("*.parquet"))  # not to be fetched again
    del hub.fetched[:]
    hub.prepare(out, **knobs)
    assert contents(out) == contents(tmp_path / "whole") and len(hub.fetched) <= 2
    assert shards["train_00000.bin"] == (out / "train_00000.bin").stat().st_ino
    # after a kill between the last shard of the validation split, which fills its limit, and the next file
    knobs |= dict(revision="c1")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(1, patch)
        hub.prepare(tmp_path / "early", **knobs)
    hub.prepare(tmp_path / "early", **knobs)
    assert byte_documents(tmp_path / "early") == byte_documents(out)


def test_a_finished_corpus_from_the_hub_is_known_without_a_network(tmp_path, hub, capsys):
    hub.prepare(tmp_path / "out")
    before, hub.HfApi = contents(tmp_path / "out"), None
    hub.prepare(tmp_path / "out")
    assert "is prepared already" in capsys.readouterr().out
    ranks = write_ranks(tmp_path / "tiny.model")
    for other in (dict(seed=1), dict(revision="v1"), dict(tokens="9k"), dict(encoding=ranks)):
        (knob,) = other
        with pytest.raises(UserError, match=rf"another corpus \({knob} [^,]* there, [^,]* here\)"):
            hub.prepare(tmp_path / "out", **other)
    assert contents(tmp_path / "out") == before
