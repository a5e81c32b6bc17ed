"""Large corpora: shards, stopping and going on, the Hugging Face hub. No network but this machine's own."""

import hashlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from corpora import byte_documents, contents, dataset, json_lines, make_documents
from huggingface_hub import constants as huggingface_constants
from killed_preparations import campaign
from test_tokenizer import write_ranks

from data import hub as data_hub
from data import pipeline, token_files
from data.dclm import prepare as dclm
from data.fineweb_edu import prepare as fineweb_edu
from data.pipeline import File, Group, token_count
from data.text import prepare as text
from data.token_files import TokenFiles
from nanotst import UserError
from nanotst.corpus import open_corpus
from nanotst.tokenizer import get_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def inputs(tmp_path):
    """Five files of 60 documents, about 30 kB each."""
    for i in range(5):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i}.jsonl").write_text(json_lines(make_documents(60, i)))
    return tmp_path / "in"


def prepare(inputs, out, **knobs):
    knobs = dict(val_fraction=0.1, shard_tokens="20k", workers=2) | knobs
    text.main(text.Config(inputs=[str(inputs)], out_dir=str(out), **knobs))


def test_shards_hold_what_one_file_holds(tmp_path, inputs):
    prepare(inputs, tmp_path / "one", shard_tokens="0")
    prepare(inputs, tmp_path / "many")
    assert byte_documents(tmp_path / "many") == byte_documents(tmp_path / "one")
    meta, _ = dataset(tmp_path / "many")
    names = [n for n in sorted(meta["sha256"]) if n.startswith("train")]
    assert len(names) > 5 and names == [f"train_{i:05d}.bin" for i in range(len(names))]
    sizes = [(tmp_path / "many" / n).stat().st_size for n in names]
    assert min(sizes[:-1]) >= 20_000 and max(sizes) < 23_000
    corpus = open_corpus(str(tmp_path / "many"))
    assert len(corpus.train) == meta["train_tokens"] and len(corpus.val) == meta["val_tokens"]


def test_an_old_corpus_leaves_no_shards_behind(tmp_path, inputs):
    prepare(inputs, tmp_path / "out")
    prepare(inputs, tmp_path / "out", shard_tokens="0")
    assert sorted(contents(tmp_path / "out")) == ["meta.json", "train.bin", "val.bin"]


def test_a_large_corpus_gets_checksums_of_its_parts(tmp_path, inputs, monkeypatch):
    monkeypatch.setattr(token_files, "LARGE", 50_000)
    prepare(inputs, tmp_path / "out")
    meta, _ = dataset(tmp_path / "out")
    names = set(contents(tmp_path / "out"))
    assert {n for n in names if n.endswith(".crc")} == {
        n[:-3] + "crc" for n in names if n.endswith(".bin")
    }
    assert set(meta["sha256"]) == names - {"meta.json"}


class Stop(Exception):
    pass


@pytest.mark.parametrize("workers", [1, 3])
def test_stopped_after_every_shard_and_started_again(tmp_path, inputs, monkeypatch, workers):
    """The same files, no shard made twice, and what was read is not tokenised again."""
    monkeypatch.setattr(pipeline, "BATCH", 3000)
    prepare(inputs, tmp_path / "whole")
    expected, tokenised = contents(tmp_path / "whole"), []
    encode, close = pipeline.encode_batch, TokenFiles.close_shard

    def encode_and_count(tokenizer, batch, separator):
        tokenised.append(sum(len(piece.text) for piece in batch))
        return encode(tokenizer, batch, separator)

    def close_and_stop(self):
        close(self)
        raise Stop

    monkeypatch.setattr(pipeline, "encode_batch", encode_and_count)
    monkeypatch.setattr(TokenFiles, "close_shard", close_and_stop)
    for n_shards in range(1, 100):
        try:
            prepare(inputs, tmp_path / "out", workers=workers)
        except Stop:
            state = json.loads((tmp_path / "out" / "unfinished.tmp" / "progress.json").read_text())
            assert sum(s["split"] == "train" for s in state["shards"]) == n_shards
        else:
            break
    assert n_shards > 5
    assert contents(tmp_path / "out") == expected
    n_text = sum(
        len(d) for documents in byte_documents(tmp_path / "out").values() for d in documents
    )
    assert (
        sum(tokenised) < n_text + n_shards * (2 * workers + 2) * 3000 + 3000
    )  # plus what was under way


def test_a_kill_while_the_files_move_into_place(tmp_path, inputs, monkeypatch):
    prepare(inputs, tmp_path / "whole")
    expected, replace, moved = contents(tmp_path / "whole"), os.replace, []
    prepare(inputs, tmp_path / "out", val_fraction=0.5)  # another corpus is there before
    for stop_at in range(4):

        def die(source, target, stop_at=stop_at):
            if os.path.dirname(target) == str(tmp_path / "out"):
                moved.append(target)
                if len(moved) > stop_at:
                    raise Stop
            replace(source, target)

        monkeypatch.setattr(os, "replace", die)
        moved.clear()
        with pytest.raises(Stop):
            prepare(inputs, tmp_path / "out")
        assert not (tmp_path / "out" / "meta.json").exists()
    monkeypatch.setattr(os, "replace", replace)
    prepare(inputs, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


@pytest.fixture
def stopped(tmp_path, inputs, monkeypatch):
    """A preparation in tmp_path / "out" that was stopped after its first shard."""
    close = TokenFiles.close_shard

    def close_and_stop(self):
        close(self)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(TokenFiles, "close_shard", close_and_stop)
        with pytest.raises(Stop):
            prepare(inputs, tmp_path / "out")
    return tmp_path / "out" / "unfinished.tmp"


def test_an_unfinished_preparation_of_something_else_is_neither_gone_on_with_nor_lost(
    inputs, stopped
):
    before, knobs = contents(stopped), {}
    for change in ("knob", "input"):
        if change == "knob":
            knobs = dict(val_fraction=0.2)
        else:
            (inputs / "0.jsonl").write_text(json_lines(make_documents(60, 77)))
        with pytest.raises(
            UserError, match="holds 2 finished shards of other input or other knobs"
        ):
            prepare(inputs, stopped.parent, **knobs)
        assert contents(stopped) == before


def test_a_damaged_shard_is_not_gone_on_with(tmp_path, inputs, stopped, capsys):
    shard = stopped / "train_00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    prepare(inputs, tmp_path / "whole")
    prepare(inputs, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert "train_00000.bin is damaged: all shards are made again" in capsys.readouterr().err


def test_limits_and_shuffled_shards(tmp_path, inputs):
    """Documents of a shard change their order, by the seed; reading ends with the document that fills the
    limit."""
    files = [File(str(p), p.stat().st_size) for p in sorted(inputs.iterdir())]
    groups = [Group("val", files[:1], 5_000), Group("train", files[1:], 70_000)]
    found = {}
    for name, seed in (("order", None), ("a", 1), ("again", 1), ("b", 2)):
        knobs = dict(workers=1 + (name == "again"), shard_tokens=20_000, seed=seed)
        pipeline.prepare(
            groups, get_tokenizer("bytes"), str(tmp_path / name), text.Options(), **knobs
        )
        found[name] = byte_documents(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "again")
    train = [d for seed in (1, 2, 3, 4) for d in make_documents(60, seed)]
    n = len(found["order"]["train"])
    assert found["order"]["train"] == train[:n]
    size = [sum(len(d.encode()) + 1 for d in train[: n - k]) for k in (0, 1)]
    assert size[0] >= 70_000 > size[1]
    assert found["order"]["val"] == make_documents(60, 0)[: len(found["order"]["val"])]
    shard = [
        len(d) for d in (tmp_path / "order" / "train_00000.bin").read_bytes().split(b"\0")[:-1]
    ]
    for name in ("a", "b"):
        for split in ("train", "val"):
            assert found[name][split] != found["order"][split]
            assert sorted(found[name][split]) == sorted(found["order"][split])
        assert sorted(found[name]["train"][: len(shard)]) == sorted(
            train[: len(shard)]
        )  # within shards
    assert found["a"] != found["b"]


def test_token_counts_in_words():
    for written, n in (
        ("10B", 10**10),
        ("2.5M", 2_500_000),
        ("100_000", 10**5),
        ("1e9", 10**9),
        ("3 k", 3000),
        ("0", 0),
        ("0.5k", 500),
        (str(2**48), 2**48),
    ):
        assert token_count(written, "tokens") == n
    for wrong in ("", "ten", "-1", "10X", "1e", "nan"):
        with pytest.raises(UserError, match="--tokens takes a number of tokens such as 10B"):
            token_count(wrong, "tokens")
    for wrong in ("0.5", "0.0001k", "1e400", "9" * 400, "1e300T", "1000T"):
        with pytest.raises(UserError, match=r"--tokens is 0 or from 1 to 2\^48 tokens, got"):
            token_count(wrong, "tokens")


def test_killed_at_random_moments(tmp_path):
    """A short form of killed_preparations.py: real processes and kill -9."""
    (tmp_path / "in.jsonl").write_text(json_lines(make_documents(6000)))
    command = [sys.executable, str(ROOT / "data/text/prepare.py"), str(tmp_path / "in.jsonl")]
    assert (
        campaign([*command, "--shard_tokens=100k", "--val_fraction=0.02"], tmp_path, kills=4) == []
    )


# ------------------------------------------------------------------------------------- the hub


class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks of the hub, for one repository of small files."""

    daemon_threads = True

    def __init__(self, repo, files):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repo, self.files, self.sha = repo, files, "0123456789abcdef" * 2 + "01234567"
        self.cut = set()  # files whose next connection breaks half way
        self.missing = set()
        self.log = []  # (name, first byte sent)
        self.asked = []  # paths, for what the newest commit is or that of a tag
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, unquote(self.path.split("?")[0])
        api, resolve = f"/api/datasets/{hub.repo}", f"/datasets/{hub.repo}/resolve/{hub.sha}/"
        if path in (api, f"{api}/revision/v1"):
            hub.asked.append(path)
            self.answer(200, json.dumps({"id": hub.repo, "sha": hub.sha}).encode())
        elif path.startswith(f"{api}/tree/{hub.sha}"):
            folder = path.removeprefix(f"{api}/tree/{hub.sha}").strip("/")
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": f"{i:040x}"}
                for i, (name, data) in enumerate(hub.files.items())
                if name.startswith(folder)
            ]
            self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        elif (
            path.startswith(resolve)
            and path.removeprefix(resolve) in hub.files.keys() - hub.missing
        ):
            self.send_file(path.removeprefix(resolve))
        else:
            self.answer(404, X_Error_Code="EntryNotFound")

    def send_file(self, name):
        hub = self.server
        data, start = hub.files[name], 0
        headers = dict(
            ETag=f'"{hashlib.sha256(data).hexdigest()}"',
            X_Repo_Commit=hub.sha,
            Accept_Ranges="bytes",
        )
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET":
            hub.log.append((name, start))
            if name in hub.cut:
                hub.cut.discard(name)
                self.send_response(200)
                for key, value in {"Content-Length": len(data), **headers}.items():
                    self.send_header(key.replace("_", "-"), str(value))
                self.end_headers()
                self.wfile.write(data[: len(data) // 4 * 3])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
        self.answer(206 if start else 200, data[start:], **headers)


def parquet(documents, noise=b""):
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"text": documents, "noise": [noise, *[b""] * (len(documents) - 1)]})
    pyarrow.parquet.write_table(table, sink, row_group_size=20)
    return sink.getvalue().to_pybytes()


def zst(documents, noise=b""):
    skipped = b"\x50\x2a\x4d\x18" + len(noise).to_bytes(4, "little") + noise  # a frame without text
    return skipped + zstandard.ZstdCompressor().compress(json_lines(documents).encode())


SCRIPTS = {
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample/100BT/{}.parquet", parquet),
    "dclm": ("mlfoundations/dclm-baseline-1.0", "global-shard_0{}/shard_processed.jsonl.zst", zst),
}


# a prepare script that hands over little at a time, and is stopped when it has that many finished shards
STOPPED = """
import runpy, sys
from data import pipeline, token_files
sys.argv, most = sys.argv[1:-1], int(sys.argv[-1])
close = token_files.TokenFiles.close_shard
def close_and_stop(self):
    close(self)
    if len(self.state["shards"]) >= most:
        raise KeyboardInterrupt
pipeline.BATCH, token_files.TokenFiles.close_shard = 3000, close_and_stop
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(params=SCRIPTS)
def hub(request, tmp_path):
    """A hub of six files of 60 documents and a file of another kind; hub.prepare(out, ...) runs the script.

    One file is larger than the 10 MB that huggingface_hub writes at a time, and so can be gone on with."""
    repo, name, pack = SCRIPTS[request.param]
    noise = random.Random(0).randbytes(15_000_000)
    server = Hub(
        repo, {name.format(i): pack(make_documents(60, i), noise * (i == 5)) for i in range(6)}
    )
    server.files["sample/100BT/README.md"] = b"no data"
    server.name = name
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= dict(
        HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_XET="1"
    )
    environment |= dict(PYTHONPATH=str(ROOT))

    def prepare(out, stop_at=0, **knobs):
        knobs = dict(encoding="bytes", tokens="0", val_tokens="5k", shard_tokens="50k") | knobs
        command = [str(ROOT / "data" / request.param / "prepare.py"), f"--out_dir={out}"]
        command += [f"--{key}={value}" for key, value in knobs.items()]
        command = ["-c", STOPPED, *command, str(stop_at)] if stop_at else command
        return subprocess.run(
            [sys.executable, *command],
            env=environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    server.prepare = prepare
    yield server
    server.shutdown()
    server.server_close()


def test_from_the_hub_with_broken_connections(tmp_path, hub):
    ranks = write_ranks(tmp_path / "tiny.model")
    first = hub.prepare(tmp_path / "smooth", workers=1)
    assert first.returncode == 0, first.stderr
    assert len(hub.log) == len({name for name, _ in hub.log}) == 6  # each file once
    smooth = contents(tmp_path / "smooth")
    meta, _ = dataset(tmp_path / "smooth")
    splits = byte_documents(tmp_path / "smooth")
    # one file is validated on and no other, each training document is there once, in another order
    by_file = {hub.name.format(i): make_documents(60, i) for i in range(6)}
    (val,) = (name for name, documents in by_file.items() if splits["val"][0] in documents)
    assert set(splits["val"]) < set(by_file[val]) and len(splits["val"]) > 5
    train = [d for name, documents in by_file.items() if name != val for d in documents]
    assert sorted(splits["train"]) == sorted(train) and splits["train"] != train
    assert len([n for n in meta["sha256"] if n.startswith("train")]) > 2
    assert f"{val}: {len(splits['val'])} documents, held out" in meta["source"]
    assert meta["source"][0] == f"{hub.repo} at {hub.sha}, seed 0"

    # a connection breaks half way, and another file is not there at first
    hub.log.clear()
    large = max(by_file, key=lambda name: len(hub.files[name]))
    hub.cut, hub.missing = {large}, {next(name for name in by_file if name not in (val, large))}
    stopped = hub.prepare(tmp_path / "broken")
    assert stopped.returncode == 1
    assert (
        "no shard is finished, what was fetched is kept: the same command goes on" in stopped.stderr
    )
    assert "error: fetching" in stopped.stderr and "RemoteEntryNotFoundError" in stopped.stderr
    hub.missing = set()
    assert hub.prepare(tmp_path / "broken").returncode == 0
    assert contents(tmp_path / "broken") == smooth
    # the rest of the broken file was asked for, and nothing again after the stop
    assert sorted(hub.log) == sorted([(name, 0) for name in by_file] + [(large, 10 * 2**20)])

    # finished is finished, and something else is not taken for it
    hub.log.clear(), hub.asked.clear()
    assert "is prepared already" in hub.prepare(tmp_path / "broken").stdout
    for other in (dict(seed=1), dict(revision="v1"), dict(tokens="9k"), dict(encoding=ranks)):
        refused = hub.prepare(tmp_path / "broken", **other)
        assert refused.returncode == 1 and not hub.log and not hub.asked
        (knob,) = other
        assert re.search(
            rf"holds a corpus of other knobs \({knob} [^,]* there, [^,]* here\): choose another --out_dir",
            refused.stderr,
        )
    assert contents(tmp_path / "broken") == smooth


def test_from_the_hub_stopped_after_finished_shards(tmp_path, hub):
    """Gone on with in the middle of a file: the same files, no finished shard made again."""
    assert hub.prepare(tmp_path / "whole", shard_tokens="20k").returncode == 0
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        unfinished, before = out / "unfinished.tmp", {}
        for stop_at in (2, 5):
            assert hub.prepare(out, stop_at, workers=workers, shard_tokens="20k").returncode != 0
            state = json.loads((unfinished / "progress.json").read_text())
            assert len(state["shards"]) >= stop_at and state["place"][2] > 0
            shards = {p.name: p.stat().st_ino for p in unfinished.glob("*.bin")}
            assert len(shards) == len(state["shards"]) and before.items() < shards.items()
            before = shards
        hub.log.clear()
        resumed = hub.prepare(out, workers=workers, shard_tokens="20k")
        assert f"going on after {len(shards)} finished shards" in resumed.stdout
        assert len(hub.log) < 6
        moved = {p.stat().st_ino for p in out.glob("*.bin")}
        assert set(before.values()) <= moved
        assert contents(out) == contents(tmp_path / "whole")


def test_a_revision_of_the_repository(tmp_path, hub):
    assert hub.prepare(tmp_path / "out", revision="v1", tokens="9k").returncode == 0
    assert hub.asked == [f"/api/datasets/{hub.repo}/revision/v1"]
    assert hub.prepare(tmp_path / "none", revision="v2").returncode == 1
    assert not (tmp_path / "none" / "meta.json").exists()


@pytest.mark.parametrize("script, package", [(dclm, "zstandard"), (fineweb_edu, "pyarrow.parquet")])
def test_a_missing_package_is_said_before_anything_is_fetched(
    tmp_path, monkeypatch, script, package
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(data_hub, "list_files", None)
    config = script.Config(out_dir=str(tmp_path / "out"), encoding="bytes")
    with pytest.raises(UserError, match=f"needs the package {package.split('.')[0]}: pip install"):
        script.main(config)


def test_starting_again_is_proposed_where_it_can_help():
    for status, helps in (
        (None, True),
        (503, True),
        (429, True),
        (408, True),
        (404, False),
        (401, False),
    ):
        error = OSError("no")
        error.response = status and SimpleNamespace(status_code=status)

        def refuse(error=error):
            raise error

        with pytest.raises(UserError, match="^fetching x failed [(]OSError: no[)]") as e:
            data_hub.ask("fetching x", refuse)
        assert str(e.value).endswith("; start again to go on") == helps


def test_the_disk_that_fetched_files_lie_on_is_measured(tmp_path, monkeypatch):
    """For three files of 400 MB, one of them to validate on: what is needed is said where nothing is free."""
    monkeypatch.setattr(huggingface_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def which(path):
        return os.path.relpath(path, tmp_path).split(os.sep)[0]

    def needed(on, limit=0, stays=False, shard_tokens=10**6, seed=None, n_here=0, one_disk=True):
        folder = "" if stays else str(tmp_path / "out" / "unfinished.tmp" / "files")
        files = [
            data_hub.HubFile(f"{i}.parquet", 400 * 10**6, "", "a/b", "", folder) for i in range(3)
        ]
        monkeypatch.setattr(data_hub.HubFile, "is_here", lambda self: self in files[:n_here])
        monkeypatch.setattr(pipeline, "disk_of", lambda path: one_disk or which(path))
        monkeypatch.setattr(pipeline, "existing", lambda path: path)
        monkeypatch.setattr(
            pipeline.shutil,
            "disk_usage",
            lambda path: SimpleNamespace(free=0 if which(path) == on else 1e15),
        )
        groups = [Group("val", files[:1], 1000), Group("train", files[1:], limit)]
        with pytest.raises(UserError, match=f"{on} needs .* MB or more, 0 MB are free there") as e:
            pipeline.prepare(
                groups,
                get_tokenizer("bytes"),
                str(tmp_path / "out"),
                text.Options(),
                shard_tokens=shard_tokens,
                seed=seed,
            )
        return re.search(r"needs (.*) MB or", str(e.value))[1]

    assert needed("out") == "1,600"  # 800 MB of tokens, and a file that is read while another comes
    assert needed("out", limit=10**6) == "801"  # one file to train on is enough
    assert needed("out", shard_tokens=0) == "2,000"  # no file is removed before the end
    assert (
        needed("out", shard_tokens=0, seed=0) == "2,800"
    )  # and the 800 MB are written again to shuffle them
    assert needed("out", stays=True) == "2,000"
    assert needed("out", stays=True, n_here=2) == "1,200"
    assert needed("out", stays=True, one_disk=False) == "800"
    assert needed("hub", stays=True, one_disk=False) == "1,200"
