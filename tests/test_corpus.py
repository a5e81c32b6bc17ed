"""corpus.py and formats.py on corpora written here by other means, whole and damaged."""

import hashlib
import json
import os
import pickle
import shutil
import struct
import threading
import zlib

import numpy as np
import pytest

from nanotst import UserError, corpus, formats
from nanotst.corpus import check_same, check_vocabulary, open_corpus

TRAIN = np.random.default_rng(0).integers(0, 300, 1000)
VAL = np.random.default_rng(1).integers(0, 300, 70)


def ours(folder, train=TRAIN, val=VAL, cuts=None, bits=16, hashed=True, **changes):
    """Our format: one file to a split, or shards that end at `cuts`."""
    folder.mkdir(parents=True)
    sha256 = {}
    for split, ids in (("train", np.asarray(train)), ("val", np.asarray(val))):
        parts = np.split(ids, cuts) if cuts and split == "train" else [ids]
        for i, part in enumerate(parts):
            name = f"{split}_{i:05d}.bin" if cuts else f"{split}.bin"
            data = b"".join(int(x).to_bytes(bits // 8, "little") for x in part)
            (folder / name).write_bytes(data)
            sha256[name] = hashlib.sha256(data).hexdigest()
    meta = dict(
        vocab_size=300,
        dtype=f"uint{bits}",
        train_tokens=len(train),
        val_tokens=len(val),
        bytes_per_token=2.5,
    )
    meta |= (
        dict(encoding="gpt2", separator=0, source=["a test"])
        | ({"sha256": sha256} if hashed else {})
        | changes
    )
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


def nanogpt(folder, train=TRAIN, val=VAL, pickled=None):
    folder.mkdir()
    for split, ids in (("train", train), ("val", val)):
        (folder / f"{split}.bin").write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    if pickled is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(pickled))
    return str(folder)


def llm_c(
    folder, shards, val=VAL, magic=20240520, version=1, code="H", name="fineweb_{}_{:06d}.bin"
):
    folder.mkdir()
    for i, ids in enumerate([val, *shards]):
        header = struct.pack("<256i", magic, version, len(ids), *[0] * 253)
        path = folder / name.format("train" if i else "val", i)
        path.write_bytes(header + struct.pack(f"<{len(ids)}{code}", *ids))
    return str(folder)


def flip(path, bit):
    with open(path, "r+b") as f:
        f.seek(bit // 8)
        byte = f.read(1)[0] ^ 1 << bit % 8
        f.seek(bit // 8)
        f.write(bytes([byte]))


def refused(folder, *says):
    """open_corpus ends in one line that holds all of `says`."""
    with pytest.raises(UserError) as error:
        open_corpus(str(folder))
    assert "\n" not in str(error.value)
    assert all(text in str(error.value) for text in says), str(error.value)


@pytest.fixture
def large(monkeypatch):
    """Every corpus counts as large; its fingerprint reads two blocks, the first and the last."""
    monkeypatch.setattr(corpus, "LARGE", 0)
    monkeypatch.setattr(corpus, "N_BLOCKS", 2)
    monkeypatch.setattr(corpus, "BLOCK", 8)


# ---------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("cuts", [None, [1], [250, 500, 750], [1, 2, 3, 999]])
def test_every_slice_is_that_of_the_concatenated_files(tmp_path, cuts):
    c = open_corpus(
        ours(
            tmp_path / "x",
            TRAIN[:40],
            cuts=[n % 40 for n in sorted(cuts)] if cuts and cuts[-1] < 4 else None,
        )
    )
    for start in range(-3, 44):
        for stop in range(-3, 44):
            assert c.train[start:stop].tolist() == TRAIN[:40][start:stop].tolist()
    c = open_corpus(ours(tmp_path / "y", cuts=cuts))
    assert len(c.train) == 1000 and len(c.val) == 70 and c.train[:].tolist() == TRAIN.tolist()
    for start, stop in np.random.default_rng(2).integers(0, 1001, (300, 2)):
        assert c.train[start:stop].tolist() == TRAIN[start:stop].tolist()
    with pytest.raises(ValueError):
        c.train[::2]


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_dtypes(tmp_path, bits):
    ids = TRAIN % 256
    c = open_corpus(ours(tmp_path / "x", ids, ids[:9], bits=bits, vocab_size=256))
    assert c.train[3:700].dtype == f"uint{bits}" and c.train[3:700].tolist() == ids[3:700].tolist()
    with pytest.raises(ValueError):
        c.train[:5][0] = 1  # a reader cannot damage the corpus


def test_meta_is_plain_and_whole(tmp_path):
    c = open_corpus(ours(tmp_path / "x", unknown_key=[1]))
    assert json.loads(json.dumps(c.meta)) == c.meta
    assert (
        c.folder == str(tmp_path / "x")
        and c.vocab_size == 300
        and c.bytes_per_token == 2.5
        and not c.note
    )
    assert {
        k: c.meta[k] for k in ("encoding", "separator", "train_tokens", "val_tokens", "vocabulary")
    } == dict(encoding="gpt2", separator=0, train_tokens=1000, val_tokens=70, vocabulary="gpt2")
    assert c.meta["fingerprint"] == c.fingerprint and not c.meta.keys() & {
        "unknown_key",
        "sha256",
        "dtype",
    }


def test_four_keys_are_enough(tmp_path):
    folder = ours(tmp_path / "x", hashed=False)
    keys = ("vocab_size", "dtype", "train_tokens", "val_tokens")
    meta = json.loads((tmp_path / "x" / "meta.json").read_text())
    (tmp_path / "x" / "meta.json").write_text(json.dumps({k: meta[k] for k in keys}))
    c = open_corpus(folder)
    assert c.bytes_per_token is None and c.meta["encoding"] is None and c.meta["separator"] is None


def test_nanogpt_without_meta_pkl_is_gpt2_and_says_so(tmp_path):
    c = open_corpus(nanogpt(tmp_path / "x", TRAIN + 49000))
    assert (
        c.train[:].tolist() == (TRAIN + 49000).tolist()
        and c.val[10:20].tolist() == VAL[10:20].tolist()
    )
    assert (c.vocab_size, c.meta["encoding"], c.meta["separator"], c.bytes_per_token) == (
        50257,
        "gpt2",
        50256,
        None,
    )
    assert "neither meta.json nor meta.pkl" in c.note


def test_nanogpt_characters(tmp_path):
    characters = [chr(200 + i) for i in range(300)]
    meta = {
        "vocab_size": 300,
        "itos": dict(enumerate(characters)),
        "stoi": {c: i for i, c in enumerate(characters)},
    }
    c = open_corpus(nanogpt(tmp_path / "x", pickled=meta))
    assert c.vocab_size == 300 and c.meta["encoding"] is None and c.meta["characters"] == characters
    assert c.bytes_per_token is None and c.train[:].tolist() == TRAIN.tolist()
    c = open_corpus(
        nanogpt(tmp_path / "y", [0, 1], [1, 0], {"vocab_size": 2, "itos": {0: "\n", 1: "a"}})
    )
    assert c.bytes_per_token == 1.0
    assert (
        "characters" not in open_corpus(nanogpt(tmp_path / "z", pickled={"vocab_size": 400})).meta
    )


def test_llm_c_shards(tmp_path):
    shards = [TRAIN[:100] + 50000 - 43, TRAIN[100:101], TRAIN[101:]]  # up to 50256
    c = open_corpus(llm_c(tmp_path / "x", shards))
    whole = np.concatenate(shards)
    assert c.train[:].tolist() == whole.tolist() and c.val[:].tolist() == VAL.tolist()
    assert c.train[90:110].tolist() == whole[90:110].tolist()
    assert (c.vocab_size, c.meta["encoding"], c.meta["separator"], c.bytes_per_token) == (
        50257,
        "gpt2",
        50256,
        None,
    )


def test_llm_c_llama_3(tmp_path):
    c = open_corpus(llm_c(tmp_path / "x", [TRAIN + 127955], magic=20240801, version=7, code="I"))
    assert c.train[:].tolist() == (TRAIN + 127955).tolist()
    assert (c.vocab_size, c.meta["encoding"], c.meta["separator"]) == (128256, None, 128000)


def test_shards_are_in_order_of_their_numbers(tmp_path):
    name = "edu_fineweb_{}_{}.bin"
    c = open_corpus(
        llm_c(tmp_path / "x", [[i] for i in range(12)], name=name)
    )  # 10 comes after 9, not after 1
    assert c.train[:].tolist() == list(range(12))


def test_threads_share_a_corpus(tmp_path, monkeypatch, large):
    monkeypatch.setattr(corpus, "OPEN_FILES", 3)
    c, wrong = open_corpus(ours(tmp_path / "x", cuts=list(range(10, 1000, 10)))), []

    def read(seed):
        for start in np.random.default_rng(seed).integers(0, 970, 500):
            if c.train[start : start + 30].tolist() != TRAIN[start : start + 30].tolist():
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong and len(c.train.maps) <= 3


# ------------------------------------------------------------------------------------------ where it is found


def test_a_raw_folder_in_the_working_directory_hides_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "DATA", str(tmp_path / "data"))
    prepared = ours(tmp_path / "data" / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert open_corpus("mine").folder == prepared
    shutil.rmtree(tmp_path / "mine")
    assert open_corpus("mine").folder == prepared
    here = ours(tmp_path / "mine")
    assert open_corpus("mine").folder == here  # a path comes first if it holds a corpus
    (tmp_path / "mine" / "meta.json").write_text("{")
    refused("mine", f"{here}/meta.json")  # and is not passed over for being damaged


def test_missing_corpus_names_the_script_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "data" / "mine" / "prepare.py").touch()
    refused("mine", f"run python {tmp_path}/data/mine/prepare.py first")
    monkeypatch.chdir(tmp_path)
    refused("mine", "run python data/mine/prepare.py first")
    for name in ("other", "", "a\0b", str(tmp_path / "no" / "where"), "x" * 5000):
        refused(name, "run python data/text/prepare.py first")


# ----------------------------------------------------------------------------------------------- fingerprints


def test_fingerprint_is_of_the_tokens(tmp_path):
    gpt2 = dict(vocab_size=50257, separator=50256)
    same = [
        ours(tmp_path / "a", **gpt2),
        ours(tmp_path / "b", hashed=False, **gpt2),
        ours(tmp_path / "c", cuts=[17, 400], **gpt2),
        ours(tmp_path / "d", bits=32, **gpt2),
        nanogpt(tmp_path / "e"),
        llm_c(tmp_path / "f", [TRAIN[:999], TRAIN[999:]]),
        shutil.copytree(tmp_path / "a", tmp_path / "g"),
    ]
    changed = TRAIN.copy()
    changed[500] += 1
    others = [
        ours(tmp_path / "h", changed, **gpt2),
        ours(tmp_path / "i", TRAIN[::-1], **gpt2),
        ours(tmp_path / "j", val=VAL[::-1], **gpt2),
        ours(tmp_path / "k", TRAIN[:-1], np.append(TRAIN[-1], VAL), **gpt2),  # another cut
        ours(tmp_path / "l"),  # another vocabulary
    ]
    assert len({open_corpus(str(folder)).fingerprint for folder in same}) == 1
    assert len({open_corpus(str(folder)).fingerprint for folder in [same[0], *others]}) == 6


def test_fingerprint_of_a_large_corpus_is_of_blocks(tmp_path, large):
    folders = [
        ours(tmp_path / "a"),
        ours(tmp_path / "b", cuts=[10, 400]),
        ours(tmp_path / "c", hashed=False),
    ]
    assert len({open_corpus(folder).fingerprint for folder in folders}) == 1
    last = TRAIN.copy()
    last[-1] += 1
    assert (
        open_corpus(ours(tmp_path / "d", last)).fingerprint != open_corpus(folders[0]).fingerprint
    )


def test_another_corpus_than_the_checkpoints(tmp_path):
    c = open_corpus(ours(tmp_path / "a"))
    check_same(c, open_corpus(ours(tmp_path / "b", cuts=[5])).meta, "last.pt")
    other = open_corpus(ours(tmp_path / "c", TRAIN[::-1]))
    with pytest.raises(UserError, match="last.pt: as many tokens, but others"):
        check_same(c, other.meta, "last.pt")
    check_vocabulary(c, other.meta, "last.pt")
    other = open_corpus(ours(tmp_path / "d", TRAIN[1:], encoding="r50k_base"))
    with pytest.raises(
        UserError, match="vocabulary r50k_base there, gpt2 here, train_tokens 999 there, 1000 here"
    ):
        check_same(c, other.meta, "last.pt")
    with pytest.raises(UserError, match="last.pt: vocabulary r50k_base there, gpt2 here"):
        check_vocabulary(c, other.meta, "last.pt")
    with pytest.raises(UserError):
        check_same(c, {}, "last.pt")


def test_rank_files_of_one_name_are_compared_by_what_they_hold(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder, ids, ranks in zip(
        folders, (TRAIN, TRAIN[1:], TRAIN[1:]), (b"YQ== 0", b"YQ== 0", b"Yg== 0")
    ):
        ours(folder, ids, encoding="tokenizer.model")
        (folder / "tokenizer.model").write_bytes(ranks)
    a, b, c = (open_corpus(str(folder)) for folder in folders)
    check_vocabulary(a, b.meta, "last.pt")
    with pytest.raises(UserError, match="another vocabulary"):
        check_vocabulary(a, c.meta, "last.pt")
    nameless = [
        open_corpus(ours(tmp_path / name, ids, encoding=None))
        for name, ids in (("d", TRAIN), ("e", TRAIN[1:]))
    ]
    check_vocabulary(nameless[0], nameless[0].meta, "last.pt")
    with pytest.raises(UserError, match="no encoding to compare"):
        check_vocabulary(nameless[0], nameless[1].meta, "last.pt")


# --------------------------------------------------------------------------------------------- damaged tokens


@pytest.mark.parametrize("cuts", [None, [7, 14]])
def test_every_flipped_bit_is_found(tmp_path, cuts):
    ours(tmp_path / "x", TRAIN[:20], VAL[:5], cuts, vocab_size=2**16)  # so that no id is beyond it
    for path in sorted((tmp_path / "x").glob("*.bin")):
        for bit in range(8 * path.stat().st_size):
            flip(path, bit)
            refused(tmp_path / "x", f"{path} is damaged")
            flip(path, bit)
    open_corpus(str(tmp_path / "x"))


def test_every_flipped_bit_of_a_foreign_corpus_shows_by_its_fingerprint(tmp_path):
    folder = nanogpt(tmp_path / "x", TRAIN[:20], VAL[:10], {"vocab_size": 2**16})
    before = open_corpus(folder).meta
    for bit in range(8 * 40):
        flip(tmp_path / "x" / "train.bin", bit)
        with pytest.raises(UserError, match="as many tokens, but others"):
            check_same(open_corpus(folder), before, "last.pt")
        flip(tmp_path / "x" / "train.bin", bit)
    check_same(open_corpus(folder), before, "last.pt")


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    "damage, says",
    [
        (cut, "{} holds 999 tokens, meta.json says 1,000"),
        (lambda path: path.write_bytes(path.read_bytes() + b"xx"), "{} holds 1,001 tokens"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "{} is cut short"),
        (lambda path: path.write_bytes(b""), "{} is cut short"),
        (lambda path: path.unlink(), "train.bin"),
        (lambda path: (path.unlink(), path.mkdir()), "train.bin"),
        (lambda path: (path.unlink(), path.symlink_to(path)), "cannot read {}"),
        (
            lambda path: path.write_bytes(
                struct.pack("<1000H", *[*range(299), 300] * 3, *range(100))
            ),
            "{}: id 300 of token 299 is beyond the vocabulary of 300",
        ),
        (lambda path: path.write_bytes(b"\xff" * 2000), "{}: id 65535 of token 0"),
    ],
)
@pytest.mark.parametrize("hashed", [False, True])
def test_damaged_token_files(tmp_path, damage, says, hashed):
    ours(tmp_path / "x", hashed=hashed)
    path = tmp_path / "x" / "train.bin"
    damage(path)
    refused(tmp_path / "x", "train.bin" if hashed else says.format(path))


def test_an_id_beyond_the_vocabulary_in_val(tmp_path):
    refused(nanogpt(tmp_path / "x", val=[1, 2, 50257]), "val.bin: id 50257 of token 2")


def test_missing_and_left_over_shards(tmp_path):
    folder = tmp_path / "x"
    ours(folder, cuts=[300, 600])
    (folder / "train_00003.bin").write_bytes(b"xx")  # of a former corpus: it has no hash
    assert open_corpus(str(folder)).train[:].tolist() == TRAIN.tolist()
    (folder / "train_00001.bin").unlink()
    refused(folder, "cannot read", "train_00001.bin")
    folder = tmp_path / "y"
    ours(folder, cuts=[300, 600], hashed=False)
    open_corpus(str(folder))
    (folder / "train_00003.bin").write_bytes(b"xx")
    refused(folder, "train_00000.bin to train_00003.bin: they hold 1,001 tokens")
    (folder / "train_00003.bin").unlink()
    (folder / "train_00001.bin").unlink()
    refused(folder, "not all from train_0 to train_00002.bin")
    (folder / "train.bin").write_bytes(b"xx")
    refused(folder, "more than one corpus")
    folder = tmp_path / "z"
    ours(folder, hashed=False)
    (folder / "my_train.bin").write_bytes(b"xx")  # not a name of ours
    assert open_corpus(str(folder)).train[:].tolist() == TRAIN.tolist()


@pytest.mark.parametrize(
    "at, value", [(0, 20240521), (0, 20240801), (1, 2), (2, 400), (2, 402), (2, 0), (2, -401)]
)
def test_headers_that_lie(tmp_path, at, value):
    llm_c(tmp_path / "x", [TRAIN[:400], TRAIN[400:801], TRAIN[801:]])
    path = tmp_path / "x" / "fineweb_train_000002.bin"
    data = bytearray(path.read_bytes())
    data[4 * at : 4 * at + 4] = struct.pack("<i", value)
    path.write_bytes(data)
    refused(tmp_path / "x", f"{path}: its header")


def test_a_foreign_file_that_is_cut(tmp_path):
    llm_c(tmp_path / "x", [TRAIN[:400], TRAIN[400:]])
    path = tmp_path / "x" / "fineweb_train_000001.bin"
    whole = path.read_bytes()
    for n in (0, 1, 3, 4, 11, 12, 1023, 1024, 1025, 1026, len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        refused(tmp_path / "x", str(path))


def test_what_is_no_format_at_all(tmp_path):
    (tmp_path / "x").mkdir()
    for split in ("train", "val"):
        (tmp_path / "x" / f"a_{split}.bin").write_bytes(bytes(4000))
    refused(tmp_path / "x", "a_train.bin", "begins with 0")
    llm_c(tmp_path / "y", [TRAIN])
    shutil.copy(
        tmp_path / "y" / "fineweb_train_000001.bin", tmp_path / "y" / "other_train_000001.bin"
    )
    refused(tmp_path / "y", "more than one corpus")
    llm_c(tmp_path / "z", [TRAIN])
    (tmp_path / "z" / "fineweb_val_000000.bin").unlink()
    refused(tmp_path / "z", "val")


TEXT, LLAMA = b"def main():\n    pass\0" * 100, struct.pack("<600I", *range(127000, 127600))


@pytest.mark.parametrize("data", [TEXT, LLAMA])
def test_our_files_without_their_meta_json_are_not_taken_for_gpt2_tokens(tmp_path, data):
    (tmp_path / "x").mkdir()
    for split in ("train", "val"):
        (tmp_path / "x" / f"{split}.bin").write_bytes(data)
    refused(tmp_path / "x", "lost its meta.json")


def test_a_preparation_that_was_killed_leaves_no_corpus(tmp_path):
    nanogpt(tmp_path / "x")
    (tmp_path / "x" / "unfinished.tmp").mkdir()
    (tmp_path / "x" / "prepare.py").touch()
    refused(tmp_path / "x", f"run python {tmp_path}/x/prepare.py first")


# ---------------------------------------------------------------------------------------------- large corpora


def test_files_of_a_large_corpus_are_opened_when_read(tmp_path, monkeypatch, large):
    c = open_corpus(ours(tmp_path / "x", cuts=list(range(10, 1000, 10))))
    assert not c.train.maps and not c.val.maps  # what the fingerprint read is closed again
    opened, plain = [], corpus.TokenFile.open
    monkeypatch.setattr(
        corpus.TokenFile, "open", lambda f, large: opened.append(f.path[-9:]) or plain(f, large)
    )
    c.train[500:510], c.train[501:502], c.train[515:525]
    assert opened == ["00050.bin", "00051.bin", "00052.bin"]


def test_few_files_stay_open(tmp_path, monkeypatch, large):
    monkeypatch.setattr(corpus, "OPEN_FILES", 4)
    hashed = []
    monkeypatch.setattr(
        corpus, "sha256_of", lambda path: hashed.append(path) or formats.sha256_of(path)
    )
    c = open_corpus(ours(tmp_path / "x", cuts=list(range(10, 1000, 10))))
    first = c.train[20:25]
    for _ in range(2):
        for i in range(0, 1000, 10):
            assert c.train[i : i + 10].tolist() == TRAIN[i : i + 10].tolist()
            assert len(c.train.maps) <= 4
    assert first.tolist() == TRAIN[20:25].tolist()  # a slice outlives its file
    assert (
        len(hashed) == len(set(hashed)) == 101
    )  # each of 100 files and val once, though opened often


def test_damage_in_a_large_corpus_is_found_when_it_is_read(tmp_path, large):
    ours(tmp_path / "x", cuts=list(range(10, 1000, 10)))
    path = tmp_path / "x" / "train_00050.bin"
    flip(path, 3)
    c = open_corpus(str(tmp_path / "x"))
    assert c.train[490:500].tolist() == TRAIN[490:500].tolist()
    for _ in range(2):  # and again: it is never taken for verified
        with pytest.raises(UserError, match=f"{path} is damaged"):
            c.train[495:505]


def test_a_header_and_an_id_of_a_large_corpus_are_checked_when_read(tmp_path, large):
    llm_c(tmp_path / "x", [TRAIN[:400], TRAIN[400:500], [50257], TRAIN[500:]])
    path = tmp_path / "x" / "fineweb_train_000002.bin"
    flip(path, 8 * 8)
    c = open_corpus(str(tmp_path / "x"))
    assert c.train[300:400].tolist() == TRAIN[300:400].tolist()
    with pytest.raises(UserError, match=f"{path}: its header"):
        c.train[399:401]
    with pytest.raises(UserError, match="fineweb_train_000003.bin: id 50257 of token 0"):
        c.train[500:501]


def test_a_file_replaced_while_it_is_in_use_is_not_read(tmp_path, large):
    c = open_corpus(ours(tmp_path / "x", cuts=[300, 600], hashed=False))
    path = tmp_path / "x" / "train_00001.bin"
    os.utime(path, (1, 1))
    with pytest.raises(UserError, match=f"{path} was replaced"):
        c.train[299:301]
    path.unlink()
    with pytest.raises(UserError, match=f"cannot read {path}"):
        c.train[299:301]


@pytest.fixture
def parts(tmp_path, large):
    """A large corpus of four parts with checksums -> its folder, its ids."""
    ids = np.random.default_rng(3).integers(0, 2**16, 100_000)
    folder = tmp_path / "parts"
    ours(folder, ids, vocab_size=2**16)
    meta = json.loads((folder / "meta.json").read_text())
    for split in ("train", "val"):
        with open(corpus.write_sums(str(folder / f"{split}.bin")), "rb") as f:
            meta["sha256"][f"{split}.crc"] = hashlib.sha256(f.read()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder, ids


def test_checksums_are_the_crc32_of_64_kb(parts):
    data = (parts[0] / "train.bin").read_bytes()
    sums = struct.unpack("<4I", (parts[0] / "train.crc").read_bytes())
    assert sums == tuple(zlib.crc32(data[i : i + 65536]) for i in range(0, 200_000, 65536))


def test_each_part_is_compared_when_it_is_first_read(parts, monkeypatch):
    folder, ids = parts
    c, compared, crc32 = open_corpus(str(folder)), [], zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data: compared.append(len(data)) or crc32(data))
    assert c.train[32768:32769].tolist() == ids[32768:32769].tolist() and compared == [65536]
    for start, stop in (
        (32768, 65536),
        (0, 10),
        (99_990, 100_000),
    ):  # the fingerprint saw the outer parts
        c.train[start:stop]
    assert compared == [65536]
    assert c.train[65535:65537].tolist() == ids[65535:65537].tolist() and compared == [65536] * 2
    assert c.train[:].tolist() == ids.tolist() and compared == [65536] * 2


@pytest.mark.parametrize("part", [0, 1, 2, 3])
def test_a_flipped_bit_is_found_by_parts_and_only_where_it_is(parts, part):
    folder, ids = parts
    where = f"train.bin is damaged: in the 64 KB from byte {65536 * part:,}"
    for bit in np.random.default_rng(part).integers(0, 8 * min(65536, 200_000 - 65536 * part), 20):
        flip(folder / "train.bin", 8 * 65536 * part + int(bit))
        if part in (0, 3):  # in the fingerprint
            refused(folder, where)
        else:
            c = open_corpus(str(folder))
            assert c.train[:32768].tolist() == ids[:32768].tolist()
            for _ in range(2):
                with pytest.raises(UserError, match=where):
                    c.train[32768 * part - 1 : 32768 * part + 2]
        flip(folder / "train.bin", 8 * 65536 * part + int(bit))


def test_damaged_checksums_are_not_believed(parts):
    folder, ids = parts
    whole = (folder / "train.crc").read_bytes()
    for bit in range(8 * len(whole)):
        flip(folder / "train.crc", bit)
        refused(folder, "train.crc is damaged")
        flip(folder / "train.crc", bit)
    (folder / "train.crc").write_bytes(whole[:-4])
    refused(folder, "train.crc is damaged")
    (folder / "train.crc").unlink()
    refused(folder, "cannot read", "train.crc")


# --------------------------------------------------------------------------------------- damaged descriptions

HASH = '"' + "0" * 64 + '"'
WRONG = r"""
vocab_size    null 0 -1 300.0 "300" true [300] {} 16777217 1e308 NaN 1000000000000000000000000000000000000
dtype         null "float16" "int16" "uint64" "object" "U4" ">u2" "<u2" "u2" "" "uint16,uint8" 16 ["u2"] {}
train_tokens  null 0 -1000 999 1001 1000.0 "1000" true 281474976710656 Infinity [] {}
val_tokens    null 0 71 "70" {"a":1} [70]
train_bytes   0 -1 1.5 "9"
bytes_per_token  0 -1.0 "4" true NaN Infinity -Infinity 1e300 [4.0]
encoding      5 "" [] {} true
separator     -1 300 1.0 "0" false [0] 1000000000000000000000000000000000000
source        "text" [1] {} 3
sha256        [] "x" 5 {"train.bin":5} {"train.bin":"0"} {"train.bin":null} {"train.bin":{"a":HASH}}
sha256        {"a":HASH} {"../train.bin":HASH} {"/etc/passwd":HASH} {"a/b.bin":HASH} {"..\\b.bin":HASH}
sha256        {"\u0000.bin":HASH} {"train.bin\n":HASH}
sha256        {"train.bin":HASH} {"val.bin":HASH} {"train.bin":HASH,"val.bin":HASH}
"""
WRONG = [
    (key, value) for key, *values in map(str.split, WRONG.strip().splitlines()) for value in values
]


@pytest.mark.parametrize("key, value", WRONG)
def test_wrong_values_in_meta_json(tmp_path, key, value):
    ours(tmp_path / "x", **{key: json.loads(value.replace("HASH", HASH))})
    refused(tmp_path / "x", str(tmp_path / "x"))


@pytest.mark.parametrize("key", ["vocab_size", "dtype", "train_tokens", "val_tokens"])
def test_missing_values_in_meta_json(tmp_path, key):
    ours(tmp_path / "x")
    path = tmp_path / "x" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in meta.items() if k != key}))
    refused(tmp_path / "x", f"{path}: {key} must be")


NO_META = [b"", b"{", b"null", b"[]", b"5", b'"text"', b"NaN", b"\xff\xfe", bytes(100), b"{} {}"]
NO_META += [
    b"{'vocab_size': 300}",
    b'{"vocab_size": "caf\xe9"}',
    b"\x80\x04}.",
    b" " * 2**24 + b"{}",
]
NO_META += [b'{"vocab_size": "\\ud800"}', b'{"vocab_size": 1' + b"0" * 5000 + b"}"]
NO_META += [b"[" * 100_000, b'{"a":' * 100_000, b'{"vocab_size": ' + b"[" * 900 + b"]" * 900 + b"}"]
NO_META += [
    b'{"seal": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"encoding": "' + b"x" * 10_000 + b'"}',
]


@pytest.mark.parametrize("data", NO_META, ids=range(len(NO_META)))
def test_meta_json_that_is_none(tmp_path, data):
    ours(tmp_path / "x")
    (tmp_path / "x" / "meta.json").write_bytes(data)
    refused(tmp_path / "x", f"{tmp_path}/x/meta.json")


def test_meta_json_cut_or_with_a_flipped_bit_is_the_same_or_refused(tmp_path):
    folder = ours(tmp_path / "x", source=None)
    path = tmp_path / "x" / "meta.json"
    path.write_text(json.dumps(formats.sealed(json.loads(path.read_text()))))
    whole, before = path.read_bytes(), open_corpus(folder).meta
    for n in range(0, len(whole), 11):
        path.write_bytes(whole[:n])
        refused(folder, str(path))
    path.write_bytes(whole)
    for bit in range(8 * len(whole)):
        flip(path, bit)
        try:
            assert open_corpus(folder).meta == before  # such as for the bit in "seal" itself
        except UserError as e:
            assert "\n" not in str(e)
        flip(path, bit)
    path.write_text(json.dumps(json.loads(whole) | {"separator": 5}, indent=2))
    refused(folder, "meta.json was damaged or edited", "remove its seal")


def test_meta_json_that_cannot_be_read(tmp_path):
    ours(tmp_path / "x")
    (tmp_path / "x" / "meta.json").unlink()
    (tmp_path / "x" / "meta.json").mkdir()
    refused(tmp_path / "x", f"cannot read {tmp_path}/x/meta.json")


def test_a_damaged_rank_file_is_found(tmp_path):
    ours(tmp_path / "x", encoding="tokenizer.model")
    meta = json.loads((tmp_path / "x" / "meta.json").read_text())
    meta["sha256"]["tokenizer.model"] = hashlib.sha256(b"YQ== 0").hexdigest()
    (tmp_path / "x" / "meta.json").write_text(json.dumps(meta))
    refused(tmp_path / "x", "cannot read", "tokenizer.model")
    (tmp_path / "x" / "tokenizer.model").write_bytes(b"YQ== 0")
    assert open_corpus(str(tmp_path / "x")).meta["vocabulary"].startswith("rank file ")
    (tmp_path / "x" / "tokenizer.model").write_bytes(b"YQ== 1")
    refused(tmp_path / "x", "tokenizer.model is damaged")


class Code:
    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


PICKLED = [Code(), {"vocab_size": 300, "x": Code()}, {"vocab_size": np.int64(300)}, {}, [], 300]
PICKLED += [{"vocab_size": n} for n in (None, 0, -1, True, 2**16 + 1, 300.0, "300")]
PICKLED += [
    {"vocab_size": 2, "itos": itos} for itos in ({0: "a"}, {0: "a", 2: "b"}, {0: "a", 1: "a"})
]
PICKLED += [{"vocab_size": 2, "itos": itos} for itos in ({0: "a", 1: 5}, {0: "a", 1: ""}, {}, 7)]


@pytest.mark.parametrize("pickled", PICKLED, ids=range(len(PICKLED)))
def test_meta_pkl_is_not_trusted(tmp_path, monkeypatch, pickled):
    monkeypatch.chdir(tmp_path)
    refused(nanogpt(tmp_path / "x", pickled=pickled), f"{tmp_path}/x/meta.pkl")
    assert not os.path.exists("code_was_run")


def test_meta_pkl_with_a_flipped_bit_is_read_or_refused(tmp_path):
    folder = nanogpt(
        tmp_path / "x", [0, 1, 2], [2, 1], {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}}
    )
    path = tmp_path / "x" / "meta.pkl"
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        refused(folder, str(path))
    path.write_bytes(whole)
    for bit in range(8 * len(whole)):
        flip(path, bit)
        try:
            assert open_corpus(folder).train[:].tolist() == [0, 1, 2]
        except UserError as e:
            assert "\n" not in str(e)
        flip(path, bit)


@pytest.mark.parametrize(
    "make, knobs, vocab_size",
    [
        (
            nanogpt,
            dict(pickled={"vocab_size": 300, "itos": {i: chr(i + 40) for i in range(300)}}),
            300,
        ),
        (nanogpt, {}, 50257),
        (llm_c, {}, 50257),
        (llm_c, dict(magic=20240801, version=7, code="I"), 128256),
    ],
    ids=["nanoGPT's characters", "nanoGPT's tokens", "llm.c", "llm.c of Llama 3"],
)
def test_a_corpus_of_others_trains_as_ours_of_the_same_tokens(
    run, tmp_path, make, knobs, vocab_size
):
    shards = {"shards": [TRAIN[:600], TRAIN[600:]]} if make is llm_c else {}
    theirs = make(tmp_path / "theirs", **shards, **knobs)
    same = ours(
        tmp_path / "ours",
        vocab_size=vocab_size,
        bytes_per_token=None,
        encoding=None,
        separator=None,
    )
    small = dict(n_embd=8, ff_dim=8, max_steps=4, warmup_steps=1, eval_interval=2, log_interval=1)
    rows = [
        run(dataset=path, out_dir=str(tmp_path / f"run_{i}"), **small)
        for i, path in enumerate((theirs, same))
    ]
    assert [len(r) for r in rows] == [4, 4] and "val_loss" in rows[0][-1]
    for one, other in zip(*rows):
        assert all(one[key] == other[key] for key in ("loss", "grad_norm", "data_tokens"))
        assert one.get("val_loss") == other.get("val_loss")


def test_a_default_corpus_of_other_packages_says_so_each_time(tmp_path):
    other = "NOT THE PINNED CORPUS: 9,000 Python files of the packages installed here"
    assert other in open_corpus(ours(tmp_path / "other", source=[other])).note
    assert not open_corpus(ours(tmp_path / "pinned", source=["12,878 Python files"])).note
