"""Tokenizers, the dataset writer and the two prepare scripts. Everything is made in a temporary folder."""

import base64
import errno
import gzip
import importlib.util
import json
import lzma
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from token_files import TokenFiles, token_dtype
from tokenizer import get_tokenizer


def load(name):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


text, python_source = load("text"), load("python_source")


def write_ranks(path, n_filler=0):
    """A rank file: the 256 bytes, a few merges, and n_filler tokens that no text has."""
    tokens = [bytes([b]) for b in range(256)] + [b"th", b" t", b"he", b" th", b" the", b"in", b"er", b"\n\n"]
    tokens += [b"\xff" + i.to_bytes(3, "big") for i in range(n_filler)]
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    return str(path)


@pytest.fixture
def ranks(tmp_path):
    return write_ranks(tmp_path / "tiny.model")


def dataset(folder):
    """-> (meta, {split: list of documents, each a list of ids})."""
    meta = json.loads((Path(folder) / "meta.json").read_text())
    splits = {}
    for split in ("train", "val"):
        ids = np.fromfile(Path(folder) / f"{split}.bin", dtype=meta["dtype"])
        assert (
            len(ids) == meta[f"{split}_tokens"]
            and ids[-1] == meta["separator"]
            and ids.max() < meta["vocab_size"]
        )
        ends = np.flatnonzero(ids == meta["separator"])
        splits[split] = [d[:-1].tolist() for d in np.split(ids, ends + 1)[:-1]]
    return meta, splits


def byte_documents(folder):
    meta, splits = dataset(folder)
    return {split: [bytes(d).decode() for d in documents] for split, documents in splits.items()}


def make_corpus(n=300, seed=0):
    rng = random.Random(seed)
    words = "the then in other winter \u00e9t\u00e9 \u4e2d\u6587 x=1; 12345 don't \n \n\n   \t".split(" ")
    return [f"document {i} " + " ".join(rng.choices(words, k=rng.randrange(5, 200))) + "." for i in range(n)]


def leftovers(folder):
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


# ------------------------------------------------------------------------------------- tokenizer.py

HARD = "the caf\u00e9 \u4e2d\u6587 \U0001f600 <|endoftext|> <|end_of_text|>\n\n\ttabs\r\n" + "a" * 50


def test_bytes_round_trip():
    t = get_tokenizer("bytes")
    assert (t.vocab_size, t.separator, t.name) == (256, 0, "bytes")
    ids = t.encode(HARD)
    assert ids.tolist() == list(HARD.encode()) and ids.dtype == np.int64
    assert t.decode(ids) == HARD
    assert t.encode("a\0b").tolist() == [97, 98]  # the separator never comes from text
    assert t.decode([0xE4, 0xB8]) == "\ufffd" and t.decode_bytes([0xE4, 0xB8]) == b"\xe4\xb8"
    assert len(t.encode("")) == 0 and t.encode("\ud800").tolist() == [ord("?")]


def test_rank_file_round_trip(ranks):
    t = get_tokenizer(ranks)
    assert (t.vocab_size, t.separator, t.rank_file) == (265, 264, ranks)
    ids = t.encode(HARD)
    assert t.decode(ids) == HARD and len(ids) < len(HARD.encode())
    assert t.separator not in ids  # "<|endoftext|>" in the text is ordinary text
    assert t.encode(" the").tolist() == [260]
    assert t.decode([264]) == "<|endoftext|>"
    assert t.decode([97, 300, 98]) == "a\ufffdb"  # a padded row of a model
    assert get_tokenizer("tiny.model", folder=os.path.dirname(ranks)).encode(HARD).tolist() == ids.tolist()


def test_llama3_special_tokens(tmp_path):
    t = get_tokenizer(write_ranks(tmp_path / "tokenizer.model", n_filler=128000 - 264))
    assert (t.vocab_size, t.separator) == (128256, 128001)
    assert t.decode([128000, 128001, 128006, 128007, 128009]) == (
        "<|begin_of_text|><|end_of_text|><|start_header_id|><|end_header_id|><|eot_id|>"
    )
    assert t.decode([128010, 128255]) == "<|reserved_special_token_5|><|reserved_special_token_250|>"


def test_tokenizer_errors(tmp_path, monkeypatch):
    import tiktoken

    (tmp_path / "bad.model").write_bytes(b"\n\x0e\x0a\x05<unk>\x15 0 0\n")
    (tmp_path / "short.model").write_text("YQ== 0\n")

    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    for name, message in [
        (str(tmp_path / "bad.model"), "not a tiktoken rank file"),
        (str(tmp_path / "short.model"), "all 256 bytes"),
        (str(tmp_path / "none.model"), "no such rank file"),
        ("gpt3", "unknown encoding 'gpt3'"),
        ("gpt2", "TIKTOKEN_CACHE_DIR"),
    ]:
        with pytest.raises(SystemExit, match=message) as e:
            get_tokenizer(name)
        assert "\n" not in str(e.value)


# -------------------------------------------------------------------------------------- token_files.py


def test_dtype_by_vocabulary():
    sizes = [256, 257, 65536, 65537, 128256]
    assert [token_dtype(v).name for v in sizes] == ["uint8", "uint16", "uint16", "uint32", "uint32"]
    assert token_dtype(50257).newbyteorder("<") == token_dtype(50257)


def fill(folder, value):
    with TokenFiles(str(folder), get_tokenizer("bytes")) as files:
        files.add("train", np.full(9, value), 9)
        files.add("val", np.full(4, value), 4)


@pytest.mark.parametrize("before", [False, True])
def test_failure_leaves_no_half_dataset(tmp_path, before):
    out = tmp_path / "out"
    if before:
        fill(out, 1)
    old = {n: (out / n).read_bytes() for n in leftovers(out)}
    with pytest.raises(KeyboardInterrupt):
        with TokenFiles(str(out), get_tokenizer("bytes")) as files:
            files.add("train", np.full(9, 2), 9)
            assert "meta.json.tmp" not in leftovers(out) and before == ("meta.json" in leftovers(out))
            raise KeyboardInterrupt
    assert {n: (out / n).read_bytes() for n in leftovers(out)} == old


def test_disk_full(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="the disk is full"):
        fill(tmp_path / "out", 1)
    assert leftovers(tmp_path / "out") == []


def test_killed_between_renames_is_no_dataset(tmp_path, monkeypatch):
    fill(tmp_path, 1)
    replace = os.replace

    def die(source, target):
        if target.endswith("val.bin"):
            raise KeyboardInterrupt  # train.bin is new, val.bin is old
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, 2)
    assert "meta.json" not in leftovers(tmp_path)


# ------------------------------------------------------------------------------------- text/prepare.py


def test_documents_separators_and_meta(tmp_path):
    (tmp_path / "a.txt").write_bytes(
        "\ufeffone\nline <|endoftext|>\n<|endoftext|>\r\n\n<|endoftext|>\n"
        "tw\0o\r\n\n<|endoftext|>\nthree\n".encode()
    )
    (tmp_path / "v.txt").write_text("h\u00e9ld")
    text.main([str(tmp_path), f"--val={tmp_path / 'v.txt'}", f"--out_dir={tmp_path / 'out'}"])
    assert byte_documents(tmp_path / "out") == {
        "train": ["one\nline <|endoftext|>", "two\r\n", "three"],
        "val": ["h\u00e9ld"],
    }
    meta, _ = dataset(tmp_path / "out")
    assert set(meta) == {
        "vocab_size",
        "dtype",
        "train_tokens",
        "val_tokens",
        "train_bytes",
        "val_bytes",
        "bytes_per_token",
        "encoding",
        "separator",
        "source",
    }
    assert (meta["val_bytes"], meta["val_tokens"], meta["bytes_per_token"], meta["encoding"]) == (
        6,
        6,
        1.0,
        "bytes",
    )
    assert meta["train_bytes"] == meta["train_tokens"]  # the NUL is not counted either
    assert leftovers(tmp_path / "out") == ["meta.json", "train.bin", "val.bin"]


def test_all_formats_agree(tmp_path):
    documents = make_corpus(40)
    joined = "\n<|endoftext|>\n".join(documents).encode()
    rows = "".join(json.dumps({"id": 1, "body": d}) + "\n" for d in documents).encode()
    files = {"a.txt": joined, "a.md": joined, "a.jsonl": rows}
    files |= {f"{n}.gz": gzip.compress(d) for n, d in list(files.items())}
    files |= {f"{n}.xz": lzma.compress(d) for n, d in list(files.items()) if not n.endswith(".gz")}
    seen = set()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        out = tmp_path / ("out_" + name)
        text.main([str(tmp_path / name), "--val_fraction=0.3", "--field=body", f"--out_dir={out}"])
        splits = byte_documents(out)
        assert sorted(splits["train"] + splits["val"]) == sorted(documents)
        assert not set(splits["train"]) & set(splits["val"])
        seen.add(((out / "train.bin").read_bytes(), (out / "val.bin").read_bytes()))
    assert len(seen) == 1 and len(files) == 9


def test_output_does_not_depend_on_workers(tmp_path, ranks, monkeypatch):
    monkeypatch.setattr(text, "BATCH", 2000)  # many batches from little text
    source = tmp_path / "a.jsonl"
    documents = make_corpus()
    source.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    bins = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        text.main(
            [
                str(source),
                f"--encoding={ranks}",
                "--val_fraction=0.1",
                f"--workers={workers}",
                f"--out_dir={out}",
            ]
        )
        bins.append((out / "train.bin").read_bytes())
    assert bins[0] == bins[1]
    meta, splits = dataset(out)
    assert (meta["encoding"], meta["dtype"]) == ("tokenizer.model", "uint16")
    t = get_tokenizer(meta["encoding"], folder=str(out))  # the copy beside the .bin files
    decoded = {split: [t.decode(d) for d in splits[split]] for split in splits}
    assert [d for d in documents if d in set(decoded["train"])] == decoded["train"]  # in order
    assert sorted(decoded["train"] + decoded["val"]) == sorted(documents)
    assert meta["val_bytes"] == sum(len(d.encode()) + 1 for d in decoded["val"])
    assert meta["bytes_per_token"] == meta["val_bytes"] / meta["val_tokens"] > 1
    assert 10 < len(decoded["val"]) < 60


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_long_documents_are_cut_without_changing_tokens(tmp_path, ranks, monkeypatch, suffix):
    long = [" ".join(make_corpus(60, seed)) for seed in (1, 2)]
    long[1] = " ".join(long[1].split())  # one line
    texts = ["\n<|endoftext|>\n".join(long), "".join(json.dumps({"text": d}) + "\n" for d in long)]
    (tmp_path / f"a{suffix}").write_text(texts[suffix == ".jsonl"])
    (tmp_path / "v.txt").write_text("val")
    monkeypatch.setattr(text, "PIECE", 1000)
    text.main(
        [
            str(tmp_path / f"a{suffix}"),
            f"--val={tmp_path / 'v.txt'}",
            f"--encoding={ranks}",
            f"--out_dir={tmp_path / 'out'}",
        ]
    )
    assert dataset(tmp_path / "out")[1]["train"] == [get_tokenizer(ranks).encode(d).tolist() for d in long]
    # no place between two words: cut between characters, every byte kept
    (tmp_path / "b.txt").write_text("\u4e2d" * 2000 + "\U0001f600" * 700 + "<|endoftext|>" * 300)
    text.main([str(tmp_path / "b.txt"), f"--val={tmp_path / 'v.txt'}", f"--out_dir={tmp_path / 'out'}"])
    assert byte_documents(tmp_path / "out")["train"] == [(tmp_path / "b.txt").read_text()]


def test_validation_choice_is_by_content(tmp_path):
    documents = make_corpus(200)
    vals = []
    for i, order in enumerate((documents, documents[::-1] + documents[:50] + ["one more"])):
        (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(order))
        text.main([str(tmp_path / "a.txt"), "--val_fraction=0.1", f"--out_dir={tmp_path / str(i)}"])
        splits = byte_documents(tmp_path / str(i))
        assert not set(splits["train"]) & set(splits["val"])
        vals.append(set(splits["val"]) - {"one more"})
    assert vals[0] == vals[1] and 8 < len(vals[0]) < 40


def test_copies_of_val_documents_are_left_out_of_training(tmp_path):
    (tmp_path / "a.txt").write_text("x y\n<|endoftext|>\nheld\n<|endoftext|>\nz")
    (tmp_path / "v.txt").write_text("held\n<|endoftext|>\nother")
    text.main([str(tmp_path / "a.txt"), f"--val={tmp_path / 'v.txt'}", f"--out_dir={tmp_path / 'out'}"])
    assert byte_documents(tmp_path / "out") == {"train": ["x y", "z"], "val": ["held", "other"]}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.txt", None, "no such file or folder"),
        ("empty/.hidden.txt", b"x", "no text files in"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl:3 is not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n["text"]\n', r"a\.jsonl:2 has no text in field 'text'"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1 has no text in field 'text'"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1 is not valid JSON"),
        ("a.txt", b"12345\n<|endoftext|>\n12\xff", r"a\.txt is not UTF-8 text \(byte 22\)"),
        ("a.txt.gz", gzip.compress(os.urandom(500))[:100], r"cannot read .*a\.txt\.gz"),
        ("a.txt.xz", b"not xz", r"cannot read .*a\.txt\.xz"),
        ("a.txt", b"all one document", "1 documents for training and 0 held out"),
        ("a.txt", b"\n\n", "0 documents for training and 0 held out"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    argument = path.parent if name.startswith("empty") else path
    with pytest.raises(SystemExit, match=message) as e:
        text.main([str(argument), "--val_fraction=0.000001", f"--out_dir={tmp_path / 'out'}"])
    assert "\n" not in str(e.value)
    assert leftovers(tmp_path / "out") == []


# ---------------------------------------------------------------------------- python_source/prepare.py


def make_tree(root, n=400):
    """n distinct modules, exact copies of ten, and files that must be left out."""
    for i in range(n):
        folder = root / f"package{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        code = "".join(f"def function_{i}_{j}(argument): return argument + {i * 100 + j}\n" for j in range(5))
        (folder / f"m{i}.py").write_text(code)
        if i < 10:
            (folder / f"copy{i}.py").write_text(code)
    (root / "package0" / "__init__.py").write_text("")
    (root / "package0" / "nul.py").write_bytes(b"# \0 " + b"x" * 100)
    (root / "package0" / "latin.py").write_bytes(b"# \xe9 " + b"x" * 100)
    (root / "package0" / "notes.txt").write_text("x" * 100)
    return [("", str(root))]


def test_python_source(tmp_path, capsys):
    roots = make_tree(tmp_path / "tree")
    python_source.main([f"--out_dir={tmp_path / 'a'}"], roots)
    output = capsys.readouterr().out
    assert "10 duplicates" in output and "1 not UTF-8" in output and "1 holds NUL" in output
    assert "warning: less than 5 MB" in output
    splits = byte_documents(tmp_path / "a")
    originals = {p.read_text() for p in (tmp_path / "tree").rglob("m*.py")}
    assert len(splits["train"]) + len(splits["val"]) == 400
    assert set(splits["train"]) | set(splits["val"]) == originals and splits["val"]
    # elsewhere, with one more package: same files held out, the others in the same order
    make_tree(tmp_path / "elsewhere")
    folders = ["more"] + [f"elsewhere/package{i}" for i in (2, 0, 1)]
    roots = [("", str(tmp_path / folder)) for folder in folders]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "new.py").write_text("a_new_module = 1\n" * 9)
    python_source.main([f"--out_dir={tmp_path / 'b'}"], roots)
    again = byte_documents(tmp_path / "b")
    for split in ("train", "val"):
        assert [d for d in again[split] if "a_new_module" not in d] == splits[split]
    # a limit takes the first files of the same order
    python_source.main([f"--out_dir={tmp_path / 'c'}", "--max_mb=0.06"], roots)
    fewer = byte_documents(tmp_path / "c")["train"]
    assert 0 < len(fewer) < 390 and fewer == again["train"][: len(fewer)]
    assert sum(os.path.getsize(tmp_path / "c" / f"{s}.bin") for s in ("train", "val")) <= 60_000


def test_near_copies_are_not_validated_on(tmp_path, capsys):
    roots = make_tree(tmp_path / "tree")
    python_source.main([f"--out_dir={tmp_path / 'a'}"], roots)
    val = byte_documents(tmp_path / "a")["val"]
    # a copy of a held-out file with other hash, on the training side: the held-out file goes
    for i in range(100):
        copy = val[0] + f"# {i}\n"
        (tmp_path / "tree" / "package1" / "near.py").write_text(copy)
        python_source.main([f"--out_dir={tmp_path / 'b'}"], roots)
        splits = byte_documents(tmp_path / "b")
        if copy in splits["train"]:
            break
    assert val[0] not in splits["val"] and splits["val"] == val[1:]
    assert "1 held out but nearly in training" in capsys.readouterr().out
