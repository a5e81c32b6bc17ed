"""data/documents.py and data/text/prepare.py: from files to documents, and which are held out."""

import gzip
import hashlib
import json
import lzma
import os
import re
import sys
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from corpora import (
    SEPARATOR,
    byte_documents,
    contents,
    dataset,
    json_lines,
    make_documents,
    parquet,
)
from test_tokenizer import write_ranks

from data import documents
from data.text import prepare as text
from nanotst import UserError
from nanotst.tokenizer import get_tokenizer


def prepare(*inputs, out, **knobs):
    text.main(text.Config(inputs=[str(i) for i in inputs], out_dir=str(out), **knobs))


def all_documents(folder):
    return [d for split in byte_documents(folder).values() for d in split]


# ------------------------------------------------------------------------------------------ documents


def test_separators_meta_and_held_out_files(tmp_path, capsys):
    """Files of --val are no training files, and copies of documents in them are left out of training."""
    (tmp_path / "a.txt").write_bytes(
        "\ufeff<|endoftext|>\none\nline <|endoftext|>\n<|endoftext|>\r\n\n<|endoftext|>\nh\u00e9ld\n"
        "<|endoftext|>\ntw\0o\r\n\n<|endoftext|>\nseen\n<|endoftext|>\nthree\n".encode()
    )
    (tmp_path / "v.txt").write_text("h\u00e9ld")
    (tmp_path / "w.txt").write_text("seen")
    val = [f"{tmp_path / name}" for name in ("v.txt", "w.txt")]
    prepare(tmp_path, val=",".join(val), out=tmp_path / "out")
    assert "\n2 copies of held-out documents left out" in capsys.readouterr().out
    assert byte_documents(tmp_path / "out") == {
        "train": ["one\nline <|endoftext|>", "two\r\n", "three"],
        "val": ["h\u00e9ld", "seen"],
    }
    meta, _ = dataset(tmp_path / "out")
    assert (meta["val_bytes"], meta["val_tokens"], meta["bytes_per_token"]) == (11, 11, 1.0)
    assert (meta["encoding"], meta["dtype"], meta["vocab_size"]) == ("bytes", "uint8", 256)
    assert meta["train_bytes"] == meta["train_tokens"]  # the NUL is not counted either
    assert meta["source"] == [*(f"{v}, held out" for v in val), f"{tmp_path / 'a.txt'}"]
    assert sorted(contents(tmp_path / "out")) == ["meta.json", "train.bin", "val.bin"]


def test_all_formats_agree(tmp_path, capfd):
    """In a folder whose name is not UTF-8, too. Rows without text are counted and left out."""
    texts, folder, seen = make_documents(40), tmp_path / os.fsdecode(b"caf\xe9"), set()
    few = [None, *texts[:9], "", " \n", "\0", *texts[9:], None]
    joined = SEPARATOR.join(texts).encode()
    rows = "".join(json.dumps({"id": 1, "body": d}) + "\n" for d in few).encode()
    files = {"a.txt": joined, "a.MD": joined, "a.jsonl": rows, "A.NDJSON": rows, "a.json": rows}
    files |= {"bom.txt": b"\xef\xbb\xbf" + joined, "bom.jsonl": b"\xef\xbb\xbf" + rows}
    files |= {"crlf.txt": joined.replace(SEPARATOR.encode(), b"\r\n<|endoftext|>\r\n")}
    frames = [zstandard.ZstdCompressor().compress(part) for part in (rows[:999], rows[999:])]
    files |= {"a.jsonl.ZST": b"\x50\x2a\x4d\x18\x04\0\0\0note".join(frames)}  # a frame without text
    files |= {"a.txt.gz": gzip.compress(joined), "a.json.gz": gzip.compress(rows)}
    table = {"body.x": ["wrong"] * 45, "body": pyarrow.array(few).dictionary_encode()}
    files |= {"b.jsonl.XZ": lzma.compress(rows), "a.Parquet": parquet(table)}
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
        out = folder / ("out_" + name)
        prepare(folder / name, val_fraction=0.3, field="body", out=out)
        assert sorted(all_documents(out)) == sorted(texts)
        seen.add(((out / "train.bin").read_bytes(), (out / "val.bin").read_bytes()))
        counted = "\n5 empty documents left out\n" in capfd.readouterr().out
        assert counted == (documents.kind(name) != "text")
    assert len(seen) == 1


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
    options = documents.Options(separator)
    assert list(documents.read_documents(str(tmp_path / "a.txt"), options)) == expected


def test_long_documents_are_tokenised_in_pieces_with_the_same_tokens(tmp_path, monkeypatch):
    tokenizer = get_tokenizer(write_ranks(tmp_path / "tiny.model"))
    long = " ".join(make_documents(60, 1))
    expected = tokenizer.encode(long).tolist(), tokenizer.encode(" ".join(long.split())).tolist()
    monkeypatch.setattr(documents, "PIECE", 1000)
    for document, ids in zip((long, " ".join(long.split())), expected):
        parts = list(documents.pieces(document))
        assert "".join(parts) == document and max(len(p.encode()) for p in parts) <= 1002
        assert [i for part in parts for i in tokenizer.encode(part)] == ids
    # no place between two words: cut between characters, every byte kept
    hard = "\u4e2d" * 2000 + "\U0001f600" * 700 + "<|endoftext|>" * 300
    assert "".join(documents.pieces(hard)) == hard
    assert list(documents.pieces("\ud800 x")) == ["? x"]  # half a surrogate pair, possible in JSON


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
        ("a.jsonl", b"[" * 100_000 + b"]" * 100_000, r"a\.jsonl:1 (is not|has no)"),
        ("a.txt", b"x\n<|endoftext|>\nnear\xff", r"a\.txt is not UTF-8 text.*b'near\\xff'"),
        ("a.txt", "text".encode("utf-16"), r"a\.txt is not UTF-8 text"),
        ("a.txt.gz", gzip.compress(bytes(range(256)), mtime=0)[:100], r"cannot read .*a\.txt\.gz"),
        ("a.txt.xz", b"not xz", r"cannot read .*a\.txt\.xz"),
        ("a.txt.zst", b"not zstd", r"cannot read .*a\.txt\.zst"),
        ("a.jsonl.zst", ZSTD[:-1], r"cannot read .*a\.jsonl\.zst: Truncated"),
        ("a.parquet", b"PAR1" + bytes(99) + b"PAR1", r"cannot read .*a\.parquet"),
        ("a.parquet", parquet({"text": [1, 2]}), r"a\.parquet has no text in field 'text'"),
        ("a.parquet", parquet({"body": ["x"]}), r"a\.parquet has no column 'text'"),
        ("a.txt", b"all one document", "0 tokens to train on and 17 held out for validation"),
        ("a.txt", b"\n\n", "0 tokens to train on and 0 held out for validation"),
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
    assert len(str(e.value).splitlines()) == 1
    assert contents(tmp_path / "out") == {}


def test_a_small_file_of_much_text_is_never_in_memory_as_a_whole(tmp_path):
    path, many = tmp_path / "many.parquet", pyarrow.table({"text": ["a" * 10**6] * 99})
    pyarrow.parquet.write_table(many, path, dictionary_pagesize_limit=2**21)  # stored once
    del many
    found = documents.read_documents(str(path), documents.Options())
    arrow = [pyarrow.total_allocated_bytes() for _ in found]
    assert len(arrow) == 99 and max(arrow) < 60e6


@pytest.mark.parametrize("name", ["a.txt.zst", "a.parquet"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"x")
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{name} needs the package .*: pip install pyarrow$"):
        prepare(tmp_path / name, out=tmp_path / "out")


def test_memory_does_not_grow_with_the_size_of_a_file(tmp_path):
    """The peak for 2 MB is the peak for 0.5 MB; the lower of two, as other threads allocate, too."""
    texts, peaks = [f"{i} " + "word " * 1600 for i in range(250)], {60: [], 250: []}
    for n in (60, 250, 60, 250):
        (tmp_path / f"{n}.txt").write_text(SEPARATOR.join(texts[:n]))
        out = tmp_path / f"out{n}_{len(peaks[n])}"
        tracemalloc.start()
        prepare(tmp_path / f"{n}.txt", shard_tokens="100k", out=out)
        peaks[n].append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert min(peaks[250]) < 1.5 * min(peaks[60]) and len(all_documents(out)) == 250


# ------------------------------------------------------------------------------------- what is read


def test_what_is_read_and_left_out_is_said(tmp_path, capsys):
    folder, texts = tmp_path / "texts", make_documents(30)
    for name in ("a.txt", "B.TXT", "notes.docx", "settings.json", ".hidden.txt", "sub/c.md"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(f"{name} 1{SEPARATOR}{name} 2")
    for link, target in (("gone.txt", "/nowhere/x.txt"), ("linked", str(tmp_path))):
        (folder / link).symlink_to(target)
    (folder / "prepare.py").symlink_to(text.__file__)
    (tmp_path / "x.csv").write_text("<|endoftext|>".join(texts))
    (tmp_path / "y.log").write_text("a,b")
    prepare(folder, tmp_path / "x.csv", val=str(tmp_path / "y.log"), out=tmp_path / "out")
    said = capsys.readouterr().out
    assert "left out, hidden or of another kind (6): " in said
    for name in (".hidden.txt", "gone.txt", "linked", "notes.docx", "prepare.py"):
        assert f"{folder / name}" in said
    assert re.search("reading .4.: .*B.TXT, .*a.txt, .*c.md, .*x.csv", said)
    assert f"29 separators inside lines of {tmp_path / 'x.csv'} taken as text" in said
    assert "1 documents held out for validation" in said
    read = [f"{name} {i}" for name in ("B.TXT", "a.txt", "sub/c.md") for i in (1, 2)]
    expected = {"train": [*read, "<|endoftext|>".join(texts)], "val": ["a,b"]}
    assert byte_documents(tmp_path / "out") == expected


# ---------------------------------------------------------------------------------- what is held out

PARTS = [" ".join(d.split()) for d in make_documents(400)]
BOOK = {"empty lines": "\n\n".join(PARTS), "line ends": "\n".join(PARTS), "words": " ".join(PARTS)}


@pytest.mark.parametrize("where", BOOK)
def test_one_long_text_is_cut_by_itself(tmp_path, capsys, where):
    (tmp_path / "book.txt").write_text(BOOK[where])
    prepare(tmp_path / "book.txt", out=tmp_path / "out")
    assert "(1): the text is cut after 2,000 bytes" in capsys.readouterr().out
    splits = byte_documents(tmp_path / "out")
    every = sorted((d for split in splits.values() for d in split), key=BOOK[where].index)
    assert len(every) > 15 and splits["val"]
    smallest = {"empty lines": 2000, "line ends": 6000, "words": 7900}[where]
    assert all(smallest <= len(d.encode()) < smallest + 2000 for d in every[:-1])
    assert "".join("".join(every).split()) == "".join(BOOK[where].split())  # nothing else is lost
    if where != "words":
        assert all(d.split("\n")[-1] in PARTS for d in every)  # no line is cut


def hash_of(document):
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "big")


@pytest.mark.parametrize("n", [25, 390, 400])
def test_a_hash_of_the_text_decides_what_is_held_out(tmp_path, monkeypatch, capsys, n):
    """Whatever the order, copies land on the same side, and of few documents more are held out."""
    monkeypatch.setattr(text, "MANY_DOCUMENTS", 400)
    texts = make_documents(n)
    for order in (texts, texts[::-1] + texts[: n // 50]):
        (tmp_path / "a.txt").write_text(SEPARATOR.join(order))
        prepare(tmp_path / "a.txt", out=tmp_path / "out", overwrite=True)
        splits = byte_documents(tmp_path / "out")
        share = min(0.1, 20 / len(order)) if n < 400 else 0.005
        assert splits["val"] == [d for d in order if hash_of(d) < share * 2**64] != []
        assert splits["train"] == [d for d in order if hash_of(d) >= share * 2**64]
        said = f"only {len(order)} documents, so {share:.1%} are held out"
        assert (said in capsys.readouterr().out) == (n < 400)
    if n == 25:
        prepare(tmp_path / "a.txt", val_fraction=1e-9, out=tmp_path / "one")
        assert set(byte_documents(tmp_path / "one")["val"]) == {min(texts, key=hash_of)}


def test_a_rank_file_is_copied_beside_the_tokens(tmp_path):
    ranks, texts, out = write_ranks(tmp_path / "tiny.model"), make_documents(), tmp_path / "out"
    (tmp_path / "a.jsonl").write_text(json_lines(texts))
    prepare(tmp_path / "a.jsonl", encoding=ranks, val_fraction=0.1, out=out)
    meta, splits = dataset(out)
    assert (meta["encoding"], meta["dtype"]) == ("tokenizer.model", "uint16")
    t = get_tokenizer(str(out / meta["encoding"]))
    decoded = {split: [t.decode(d) for d in splits[split]] for split in splits}
    assert [d for d in texts if d in set(decoded["train"])] == decoded["train"]  # in order
    assert sorted(decoded["train"] + decoded["val"]) == sorted(texts)
    assert meta["val_bytes"] == sum(len(d.encode()) + 1 for d in decoded["val"])
    assert meta["bytes_per_token"] == meta["val_bytes"] / meta["val_tokens"] > 1
