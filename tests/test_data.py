"""data/text/prepare.py and the files it writes. Everything is made in a temporary folder."""

import errno
import gzip
import hashlib
import json
import lzma
import os
import re
import sys
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from corpora import SEPARATOR, byte_documents, contents, dataset, json_lines, make_documents
from test_tokenizer import write_ranks

from data import documents, pipeline
from data.text import prepare as text
from data.token_files import TokenFiles
from nanotst import UserError
from nanotst.corpus import open_corpus, smallest_dtype
from nanotst.tokenizer import get_tokenizer


def prepare(*inputs, out, **knobs):
    text.main(text.Config(inputs=[str(i) for i in inputs], out_dir=str(out), **knobs))


# ---------------------------------------------------------------------------------------- the writer


def test_dtype_by_vocabulary():
    sizes = [256, 257, 65536, 65537, 128256]
    assert [smallest_dtype(v).name for v in sizes] == [
        "uint8",
        "uint16",
        "uint16",
        "uint32",
        "uint32",
    ]
    assert smallest_dtype(50257).newbyteorder("<") == smallest_dtype(50257)


def fill(folder, value):
    with TokenFiles(str(folder), get_tokenizer("bytes")) as files:
        for split, n in (("train", 9), ("val", 4)):
            files.add(split, np.full(n, value), n)
            files.end_document(split)


@pytest.mark.parametrize("before", [False, True])
def test_a_failure_leaves_the_corpus_before_it_or_none(tmp_path, before):
    out = tmp_path / "out"
    if before:
        fill(out, 1)
    old = contents(out)
    with pytest.raises(KeyboardInterrupt):
        with TokenFiles(str(out), get_tokenizer("bytes")) as files:
            files.add("train", np.full(9, 2), 9)
            assert before == (out / "meta.json").exists()
            raise KeyboardInterrupt
    assert contents(out) == old


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="writing in .*out failed: the disk is full"):
        fill(tmp_path / "out", 1)
    assert contents(tmp_path / "out") == {}


def test_a_disk_that_cannot_hold_the_corpus_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(SEPARATOR.join(make_documents(50)))
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="out needs 0 MB or more, 0 MB are free there"):
        prepare(tmp_path / "a.txt", out=tmp_path / "out")
    assert contents(tmp_path / "out") == {}


def test_killed_between_renames_is_no_corpus(tmp_path, monkeypatch):
    fill(tmp_path, 1)
    replace = os.replace

    def die(source, target):
        if target == str(tmp_path / "val.bin"):
            raise KeyboardInterrupt  # train.bin is new, val.bin is old
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, 2)
    assert not (tmp_path / "meta.json").exists()


def test_two_preparations_at_once_are_kept_apart(tmp_path):
    with TokenFiles(str(tmp_path), get_tokenizer("bytes")) as files:
        with pytest.raises(UserError, match="another preparation is writing"):
            fill(tmp_path, 1)
        for split in ("train", "val"):
            files.add(split, np.full(5, 7), 5)
    assert (tmp_path / "train.bin").read_bytes() == bytes([7]) * 5


# ---------------------------------------------------------------------------- documents and formats


def test_documents_separators_and_meta(tmp_path):
    (tmp_path / "a.txt").write_bytes(
        "\ufeff<|endoftext|>\none\nline <|endoftext|>\n<|endoftext|>\r\n\n<|endoftext|>\n"
        "tw\0o\r\n\n<|endoftext|>\nthree\n".encode()
    )
    (tmp_path / "v.txt").write_text("h\u00e9ld")
    prepare(tmp_path, val=str(tmp_path / "v.txt"), out=tmp_path / "out")
    assert byte_documents(tmp_path / "out") == {
        "train": ["one\nline <|endoftext|>", "two\r\n", "three"],
        "val": ["h\u00e9ld"],
    }
    meta, _ = dataset(tmp_path / "out")
    counts = {f"{split}_{unit}" for split in ("train", "val") for unit in ("tokens", "bytes")}
    assert set(meta) == counts | {
        "vocab_size", "dtype", "bytes_per_token", "encoding", "separator", "source", "sha256", "seal",
    }  # fmt: skip
    assert (meta["val_bytes"], meta["val_tokens"], meta["bytes_per_token"]) == (6, 6, 1.0)
    assert meta["encoding"] == "bytes"
    assert meta["train_bytes"] == meta["train_tokens"]  # the NUL is not counted either
    assert sorted(contents(tmp_path / "out")) == ["meta.json", "train.bin", "val.bin"]
    assert open_corpus(str(tmp_path / "out")).meta["train_tokens"] == meta["train_tokens"]


def test_all_formats_agree(tmp_path):
    texts = make_documents(40)
    joined = SEPARATOR.join(texts).encode()
    rows = "".join(json.dumps({"id": 1, "body": d}) + "\n" for d in texts).encode()
    files = {"a.txt": joined, "a.MD": joined, "a.jsonl": rows, "A.NDJSON": rows}
    files |= {"bom.txt": b"\xef\xbb\xbf" + joined, "bom.jsonl": b"\xef\xbb\xbf" + rows}
    files |= {"crlf.txt": joined.replace(SEPARATOR.encode(), b"\r\n<|endoftext|>\r\n")}
    frames = [zstandard.ZstdCompressor().compress(part) for part in (rows[:999], rows[999:])]
    files |= {
        "a.jsonl.ZST": b"".join(frames),
        "a.txt.gz": gzip.compress(joined),
        "b.jsonl.XZ": lzma.compress(rows),
    }
    table = pyarrow.table({"id": list(range(40)), "body": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.Parquet", row_group_size=7)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    seen = set()
    for name in [*files, "a.Parquet"]:
        out = tmp_path / ("out_" + name)
        prepare(tmp_path / name, val_fraction=0.3, field="body", out=out)
        splits = byte_documents(out)
        assert sorted(splits["train"] + splits["val"]) == sorted(texts)
        assert not set(splits["train"]) & set(splits["val"])
        seen.add(((out / "train.bin").read_bytes(), (out / "val.bin").read_bytes()))
    assert len(seen) == 1


@pytest.mark.parametrize(
    "package, name", [("zstandard", "a.txt.zst"), ("pyarrow.parquet", "a.parquet")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, name):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf"{name} needs the package .*: pip install {package.split('.')[0]}$"
    ):
        prepare(tmp_path / name, out=tmp_path / "out")


def test_what_is_read_and_left_out_is_said(tmp_path, capsys):
    folder = tmp_path / "texts"
    for name in ("a.txt", "B.TXT", "notes.docx", ".hidden.txt", "sub/c.md"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(SEPARATOR.join(make_documents(20, len(name))))
    for link, target in (
        ("gone.txt", "/nowhere/x.txt"),
        ("self.txt", "self.txt"),
        ("linked", str(tmp_path)),
    ):
        (folder / link).symlink_to(target)
    os.mkfifo(folder / "pipe.txt")
    (folder / "prepare.py").symlink_to(text.__file__)
    prepare(folder, val_fraction=0.3, out=tmp_path / "out")
    said = capsys.readouterr().out
    for line in (
        "left out, another kind of file: 1: .*notes.docx",
        "left out, hidden: 1: .*hidden.txt",
        "left out, a broken link: 2: .*gone.txt, .*self.txt",
        "left out, a link to a folder: 1: .*linked",
        "left out, not a regular file: 1: .*pipe.txt",
        "left out, this program: 1: .*prepare.py",
        "reading 3 text files: .*B.TXT, .*a.txt, .*c.md",
    ):
        assert re.search(line, said), line
    splits = byte_documents(tmp_path / "out")
    assert len(splits["train"] + splits["val"]) == 60


def test_a_file_of_another_kind_that_was_named_is_read_as_text_and_that_is_said(tmp_path, capsys):
    (tmp_path / "x.json").write_text(SEPARATOR.join(make_documents(30)))
    (tmp_path / "y.csv").write_text("a,b")
    prepare(tmp_path / "x.json", val=str(tmp_path / "y.csv"), out=tmp_path / "out")
    assert re.search(r"^\S*x\.json, \S*y\.csv: read as plain text$", capsys.readouterr().out, re.M)
    assert byte_documents(tmp_path / "out") == {"train": make_documents(30), "val": ["a,b"]}


def test_separators_inside_lines_and_few_documents_are_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(make_documents(30)))
    (tmp_path / "v.txt").write_text("held out")
    prepare(tmp_path / "a.txt", val=str(tmp_path / "v.txt"), out=tmp_path / "out")
    said = capsys.readouterr().out
    assert "a.txt: the separator <|endoftext|> stands inside lines, 29 times" in said
    assert "warning: only 1 documents (9 tokens) are held out" in said


BOOK = {
    "empty lines": "".join(f"Paragraph {i}: {d}\n\n" for i, d in enumerate(make_documents(400))),
    "line ends": "".join(
        f"Line {i}: {' '.join(d.split())}\n" for i, d in enumerate(make_documents(400))
    ),
    "words": "".join(f"Word {i} {' '.join(d.split())} " for i, d in enumerate(make_documents(400))),
}


@pytest.mark.parametrize("where", BOOK)
def test_one_long_text_is_cut_by_itself(tmp_path, capsys, where):
    (tmp_path / "book.txt").write_text(BOOK[where])
    prepare(tmp_path / "book.txt", out=tmp_path / "out")
    assert f"the text is cut at {where} into documents of 2 kB or more" in capsys.readouterr().out
    _, splits = dataset(tmp_path / "out")
    sizes = [len(d) for split in splits.values() for d in split]
    assert len(sizes) > 50 and len(splits["val"]) >= 3
    assert max(sizes) < 6000  # of 2,000 bytes or more, and the last one of what is left
    assert sum(size < 1500 for size in sizes) <= 1
    # nothing is lost but line ends
    every = sorted(bytes(d).decode() for split in splits.values() for d in split)
    start = {d: "".join(BOOK[where].split()).index("".join(d.split())) for d in every}
    assert "".join("".join(d.split()) for d in sorted(every, key=start.get)) == "".join(
        BOOK[where].split()
    )


def few(folder, how):
    """25 short documents in a file, 22 books of one document each, or 400 documents in a file."""
    texts = [f"{i} {d[:60]}" for i, d in enumerate(make_documents(25 if how == "short" else 22))]
    texts = make_documents(400) if how == "400" else texts
    folder.mkdir()
    if how == "books":
        for i, d in enumerate(texts):
            (folder / f"{i}.txt").write_text(d)
    else:
        name = "a.txt" if how == "400" else "a.jsonl"
        (folder / name).write_text(SEPARATOR.join(texts) if how == "400" else json_lines(texts))
    return texts


@pytest.mark.parametrize("how, n_val", [("short", 2.5), ("books", 2.2), ("400", 20)])
def test_of_few_documents_more_are_held_out(tmp_path, capsys, how, n_val):
    texts = few(tmp_path / "in", how)
    prepare(tmp_path / "in", out=tmp_path / "out")
    assert f"{len(texts)} documents are few: {n_val / len(texts):.1%} of them are held out" in (
        capsys.readouterr().out
    )
    splits = byte_documents(tmp_path / "out")
    assert sorted(splits["train"] + splits["val"]) == sorted(texts)
    assert 1 <= len(splits["val"]) < 3 * n_val


@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("how", ["short", "books", "400"])
def test_where_the_hash_picks_none_or_all_one_document_is_held_out(
    tmp_path, capsys, how, val_fraction
):
    texts = few(tmp_path / "in", how)
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        prepare(tmp_path / "in", val_fraction=val_fraction, workers=workers, out=out)
        assert "so one is held out: that with the smallest hash" in capsys.readouterr().out
        smallest = min(texts, key=lambda d: hashlib.blake2b(d.encode(), digest_size=8).digest())
        assert byte_documents(out)["val"] == [smallest]
        assert len(byte_documents(out)["train"]) == len(texts) - 1
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")


def test_many_documents_are_held_out_as_val_fraction_says(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(text, "MANY_DOCUMENTS", 400)
    texts = few(tmp_path / "in", "400")
    prepare(tmp_path / "in", val_fraction=text.Config.val_fraction, out=tmp_path / "out")
    assert "are few" not in capsys.readouterr().out
    hashes = [
        int.from_bytes(hashlib.blake2b(d.encode(), digest_size=8).digest(), "big") for d in texts
    ]
    held_out = [d for d, key in zip(texts, hashes) if key < 0.005 * 2**64]
    assert byte_documents(tmp_path / "out")["val"] == held_out != []


def test_output_does_not_depend_on_workers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "BATCH", 2000)  # many batches from little text
    ranks, texts = write_ranks(tmp_path / "tiny.model"), make_documents()
    (tmp_path / "a.jsonl").write_text(json_lines(texts))
    bins = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        prepare(tmp_path / "a.jsonl", encoding=ranks, val_fraction=0.1, workers=workers, out=out)
        bins.append(contents(out))
    assert bins[0] == bins[1]
    assert "warning: " + get_tokenizer(ranks).note in capsys.readouterr().out
    meta, splits = dataset(out)
    assert (meta["encoding"], meta["dtype"]) == ("tokenizer.model", "uint16")
    t = get_tokenizer(meta["encoding"], folder=str(out))  # the copy beside the .bin files
    decoded = {split: [t.decode(d) for d in splits[split]] for split in splits}
    assert [d for d in texts if d in set(decoded["train"])] == decoded["train"]  # in order
    assert sorted(decoded["train"] + decoded["val"]) == sorted(texts)
    assert meta["val_bytes"] == sum(len(d.encode()) + 1 for d in decoded["val"])
    assert meta["bytes_per_token"] == meta["val_bytes"] / meta["val_tokens"] > 1
    assert 10 < len(decoded["val"]) < 60


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_long_documents_are_cut_without_changing_tokens(tmp_path, monkeypatch, suffix):
    ranks = write_ranks(tmp_path / "tiny.model")
    long = [" ".join(make_documents(60, seed)) for seed in (1, 2)]
    long[1] = " ".join(long[1].split())  # one line
    (tmp_path / f"a{suffix}").write_text(
        SEPARATOR.join(long) if suffix == ".txt" else json_lines(long)
    )
    (tmp_path / "v.txt").write_text("val")
    monkeypatch.setattr(documents, "PIECE", 1000)
    prepare(
        tmp_path / f"a{suffix}", val=str(tmp_path / "v.txt"), encoding=ranks, out=tmp_path / "out"
    )
    assert dataset(tmp_path / "out")[1]["train"] == [
        get_tokenizer(ranks).encode(d).tolist() for d in long
    ]
    # no place between two words: cut between characters, every byte kept
    (tmp_path / "b.txt").write_text("\u4e2d" * 2000 + "\U0001f600" * 700 + "<|endoftext|>" * 300)
    prepare(tmp_path / "b.txt", val=str(tmp_path / "v.txt"), out=tmp_path / "out")
    assert byte_documents(tmp_path / "out")["train"] == [(tmp_path / "b.txt").read_text()]


@pytest.mark.parametrize("piece", [20, 64, 100_000])
@pytest.mark.parametrize("separator", ["<|endoftext|>", ""])
def test_documents_do_not_depend_on_the_blocks_that_are_read(
    tmp_path, monkeypatch, piece, separator
):
    """Against splitting the whole text at its lines."""
    lines = [" ".join(d.split())[: 3 * i] for i, d in enumerate(make_documents(30))]
    content = "\n".join(
        line for i, d in enumerate(lines) for line in (d, d[:9], *[separator] * (i % 3))
    )
    expected, current = [], []
    for line in [*content.split("\n"), separator]:
        if line == separator:
            expected += ["\n".join(current)] * bool("".join(current).strip())
            current = []
        else:
            current.append(line)
    (tmp_path / "a.txt").write_text(content)
    monkeypatch.setattr(documents, "PIECE", piece)
    options, found = documents.Options(separator), [""]
    for part, last, _ in documents.read_documents(str(tmp_path / "a.txt"), options):
        found[-1] += part
        if last:
            found.append("")
    assert found[:-1] == expected


def test_validation_choice_is_by_content(tmp_path):
    texts = make_documents(200)
    vals = []
    for i, order in enumerate((texts, texts[::-1] + texts[:50] + ["one more"])):
        (tmp_path / "a.txt").write_text(SEPARATOR.join(order))
        prepare(tmp_path / "a.txt", val_fraction=0.1, out=tmp_path / str(i))
        splits = byte_documents(tmp_path / str(i))
        assert not set(splits["train"]) & set(splits["val"])
        vals.append(set(splits["val"]) - {"one more"})
    assert vals[0] == vals[1] and 8 < len(vals[0]) < 40


def test_copies_of_val_documents_are_left_out_of_training(tmp_path):
    (tmp_path / "a.txt").write_text(SEPARATOR.join(["x y", "held", "z", "seen"]))
    (tmp_path / "v.txt").write_text(SEPARATOR.join(["held", "other"]))
    (tmp_path / "w.txt").write_text("seen")
    val = f"{tmp_path / 'v.txt'},{tmp_path / 'w.txt'}"
    prepare(tmp_path / "a.txt", val=val, out=tmp_path / "out")
    assert byte_documents(tmp_path / "out") == {
        "train": ["x y", "z"],
        "val": ["held", "other", "seen"],
    }


ZSTD = zstandard.ZstdCompressor().compress(json_lines(make_documents(5)).encode())


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.txt", None, "no such file or folder"),
        ("empty/.hidden.txt", b"x", "no text files in"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl:3 is not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n["text"]\n', r"a\.jsonl:2 has no text in field 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 7}\n', r"a\.jsonl:2 has no text in field 'text'"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1 has no text in field 'text'"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1 is not valid JSON"),
        (
            "a.jsonl",
            b'{"text":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
            r"a\.jsonl:1 (is not|has no)",
        ),
        ("a.txt", b"12345\n<|endoftext|>\n12\xff", r"a\.txt is not UTF-8 text \(byte 22\)"),
        (
            "a.txt",
            b"\xef\xbb\xbf12345\n<|endoftext|>\n12\xff",
            r"a\.txt is not UTF-8 text \(byte 25\)",
        ),
        ("a.txt", "text".encode("utf-16"), r"a\.txt is UTF-16, not UTF-8"),
        ("a.jsonl", "{}".encode("utf-16"), r"a\.jsonl is UTF-16, not UTF-8"),
        ("a.txt.gz", gzip.compress(os.urandom(500))[:100], r"cannot read .*a\.txt\.gz"),
        ("a.txt.xz", b"not xz", r"cannot read .*a\.txt\.xz"),
        ("a.txt.zst", b"not zstd", r"cannot read .*a\.txt\.zst"),
        ("a.jsonl.zst", ZSTD[:-1], r"cannot read .*a\.jsonl\.zst: it is cut short"),
        ("a.parquet", b"PAR1" + bytes(99) + b"PAR1", r"cannot read .*a\.parquet"),
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
    with pytest.raises(UserError, match=message) as e:
        prepare(argument, val_fraction=0.000001, out=tmp_path / "out")
    assert "\n" not in str(e.value)
    assert contents(tmp_path / "out") == {}


def test_a_parquet_file_without_the_column_or_with_something_else_in_it_is_refused(tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["x", "y"], "n": [1, 2]}), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match="a.parquet has no text in column 'n'"):
        prepare(tmp_path / "a.parquet", field="n", out=tmp_path / "out")
    with pytest.raises(UserError, match="a.parquet has no column 'body'"):
        prepare(tmp_path / "a.parquet", field="body", out=tmp_path / "out")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_without_text_are_counted_and_left_out(tmp_path, capsys, suffix):
    texts = make_documents(20)
    rows = [None, *texts[:9], "", " \n", "\0", *texts[9:], None]
    if suffix == ".jsonl":
        (tmp_path / "a.jsonl").write_text(json_lines(rows))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    prepare(tmp_path / f"a{suffix}", val_fraction=0.3, out=tmp_path / "out")
    assert "\n5 empty documents were left out\n" in capsys.readouterr().out
    splits = byte_documents(tmp_path / "out")
    assert sorted(splits["train"] + splits["val"]) == sorted(texts)
    assert dataset(tmp_path / "out")[0]["source"] == [f"{tmp_path / 'a'}{suffix}: 20 documents"]


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_memory_does_not_grow_with_the_size_of_a_file(tmp_path, monkeypatch, suffix):
    """The peak for 16 MB is that for 2 MB, but for what the noise of batches makes of it."""
    monkeypatch.setattr(pipeline, "BATCH", 100_000)
    texts = [f"{i} " + "word " * 1600 for i in range(2000)]
    peaks = []
    for n in (250, 2000):
        path, out = tmp_path / f"{n}{suffix}", tmp_path / f"out{n}"
        path.write_text(SEPARATOR.join(texts[:n]) if suffix == ".txt" else json_lines(texts[:n]))
        tracemalloc.start()
        prepare(path, shard_tokens="1M", workers=1, out=out)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert sum(p.stat().st_size for p in out.glob("*.bin")) > 8000 * n
    assert peaks[1] < 1.5 * peaks[0] < 8e6
