"""corpus.py and formats.py on corpora that are written here by other means, whole and damaged."""

import hashlib
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from nanotst import UserError, corpus, formats
from nanotst.corpus import check_same, check_vocabulary, open_corpus

TRAIN = np.random.default_rng(0).integers(0, 300, 1000)
VAL = np.random.default_rng(1).integers(0, 300, 70)
GPT2 = dict(vocab_size=50257, separator=50256)


def ours(folder, train=TRAIN, val=VAL, cuts=None, bits=16, hashed=True, **changes):
    """Our format: one file per split, or shards that end at `cuts`."""
    folder.mkdir(parents=True)
    sha256 = {}
    for split, ids in (("train", np.asarray(train)), ("val", np.asarray(val))):
        parts = np.split(ids, cuts) if cuts and split == "train" else [ids]
        for i, part in enumerate(parts):
            name = f"{split}_{i:05d}.bin" if cuts else f"{split}.bin"
            data = b"".join(int(x).to_bytes(bits // 8, "little") for x in part)
            (folder / name).write_bytes(data)
            sha256[name] = hashlib.sha256(data).hexdigest()
    meta = dict(vocab_size=300, dtype=f"uint{bits}", train_tokens=len(train), val_tokens=len(val))
    meta |= dict(bytes_per_token=2.5, encoding="gpt2", separator=0, source=["a test"])
    meta |= ({"sha256": sha256} if hashed else {}) | changes
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


def nanogpt(folder, train=TRAIN, val=VAL, pickled=None):
    folder.mkdir()
    for split, ids in (("train", train), ("val", val)):
        (folder / f"{split}.bin").write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    if pickled is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(pickled))
    return str(folder)


def llm_c(folder, shards, magic=20240520, version=1, code="H", name="fineweb_{}_{:06d}.bin"):
    folder.mkdir()
    for i, ids in enumerate([VAL, *shards]):
        header = struct.pack("<256i", magic, version, len(ids), *[0] * 253)
        path = folder / name.format("train" if i else "val", i)
        path.write_bytes(header + struct.pack(f"<{len(ids)}{code}", *ids))
    return str(folder)


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


@pytest.mark.parametrize("cuts", [None, [1], [2, 4, 39]])
def test_every_slice_is_one_of_the_concatenated_files(tmp_path, cuts):
    c = open_corpus(ours(tmp_path / "x", TRAIN[:40], cuts=cuts))
    assert len(c.train) == 40 and len(c.val) == 70
    for start in range(-3, 44):
        for stop in range(-3, 44):
            assert c.train[start:stop].tolist() == TRAIN[:40][start:stop].tolist()


def test_meta_is_plain_and_four_keys_of_meta_json_are_enough(tmp_path):
    c = open_corpus(ours(tmp_path / "x", unknown_key=[1]))
    assert json.loads(json.dumps(c.meta)) == c.meta
    assert (c.folder, c.meta["vocab_size"], c.bytes_per_token) == (str(tmp_path / "x"), 300, 2.5)
    wanted = dict(encoding="gpt2", separator=0, train_tokens=1000, val_tokens=70, vocabulary="gpt2")
    assert wanted.items() <= c.meta.items() and c.meta["fingerprint"] == c.fingerprint
    assert not c.meta.keys() & {"unknown_key", "sha256", "dtype"}
    few = dict(vocab_size=300, dtype="uint16", train_tokens=1000, val_tokens=70)
    (tmp_path / "x" / "meta.json").write_text(json.dumps(few))
    c = open_corpus(str(tmp_path / "x"))
    assert c.bytes_per_token is None and c.meta["encoding"] is None and c.meta["separator"] is None


def test_nanogpt_tokens_and_characters(tmp_path):
    c = open_corpus(nanogpt(tmp_path / "x", TRAIN + 49000))
    assert c.train[:].tolist() == (TRAIN + 49000).tolist() and c.val[:].tolist() == VAL.tolist()
    assert dict(encoding="gpt2", bytes_per_token=None, **GPT2).items() <= c.meta.items()
    assert "its tokens are taken for GPT-2's" in c.meta["source"][0]
    characters = [chr(200 + i) for i in range(300)]
    pickled = {"vocab_size": 300, "itos": dict(enumerate(characters)), "stoi": {}}
    c = open_corpus(nanogpt(tmp_path / "y", pickled=pickled))
    assert c.meta["vocab_size"] == 300 and c.meta["encoding"] is None and c.bytes_per_token is None
    assert c.meta["characters"] == characters and c.train[:].tolist() == TRAIN.tolist()
    c = open_corpus(nanogpt(tmp_path / "w", pickled={"vocab_size": 400}))
    assert "characters" not in c.meta


def test_llm_c_shards_are_in_order_of_their_numbers(tmp_path):
    """10 after 9, not after 1."""
    c = open_corpus(llm_c(tmp_path / "x", [[i] for i in range(12)], name="edu_fineweb_{}_{}.bin"))
    assert c.train[:].tolist() == list(range(12)) and c.val[:].tolist() == VAL.tolist()
    assert dict(encoding="gpt2", bytes_per_token=None, **GPT2).items() <= c.meta.items()
    c = open_corpus(llm_c(tmp_path / "y", [TRAIN + 127955], magic=20240801, version=7, code="I"))
    assert c.train[:].tolist() == (TRAIN + 127955).tolist()
    wanted = dict(vocab_size=128256, encoding=None, separator=128000, vocabulary="Llama 3")
    assert wanted.items() <= c.meta.items()


def test_a_corpus_of_many_files_keeps_few_open(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "OPEN_FILES", 3)
    before = len(os.listdir("/proc/self/fd"))
    c = open_corpus(ours(tmp_path / "x", cuts=list(range(10, 1000, 10))))
    first = c.train[20:25]
    assert c.train[:].tolist() == TRAIN.tolist() and len(os.listdir("/proc/self/fd")) <= before + 6
    assert first.tolist() == TRAIN[20:25].tolist()  # a slice outlives its file


def test_a_file_that_changes_while_it_is_in_use_is_one_line(tmp_path):
    c = open_corpus(ours(tmp_path / "x", cuts=[300, 600]))
    path = tmp_path / "x" / "train_00001.bin"
    assert c.train[299:301].tolist() == TRAIN[299:301].tolist()
    os.truncate(path, 10)
    with pytest.raises(UserError, match=f"{path} has changed while it was in use"):
        c.train[299:600]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        c.train[299:301]


def test_a_raw_folder_in_the_working_directory_hides_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "DATA", str(tmp_path / "data"))
    prepared = ours(tmp_path / "data" / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert open_corpus("mine").folder == prepared
    shutil.rmtree(tmp_path / "mine")
    here = ours(tmp_path / "mine")
    assert open_corpus("mine").folder == here  # a path comes first if it holds a corpus
    (tmp_path / "mine" / "meta.json").write_text("{")
    refused("mine", f"{here}/meta.json")  # and is not passed over if it is damaged


def test_a_missing_corpus(tmp_path):
    for name in ("other", "", "a\0b", str(tmp_path / "no" / "where"), "text"):
        refused(name, f"no prepared corpus in {name!r} or in data/; run its prepare.py")
    nanogpt(tmp_path / "x")  # a preparation that was killed at its end
    (tmp_path / "x" / "unfinished.tmp").mkdir()
    refused(tmp_path / "x", "no prepared corpus")


def test_the_fingerprint_depends_on_the_tokens_alone(tmp_path):
    same = [
        ours(tmp_path / "a", **GPT2),
        ours(tmp_path / "c", cuts=[17, 400], **GPT2),
        ours(tmp_path / "d", bits=32, **GPT2),
        nanogpt(tmp_path / "e"),
        llm_c(tmp_path / "f", [TRAIN[:999], TRAIN[999:]]),
    ]
    others = [
        ours(tmp_path / "i", TRAIN[::-1], **GPT2),
        ours(tmp_path / "j", val=VAL[::-1], **GPT2),
        ours(tmp_path / "k", TRAIN[:-1], np.append(TRAIN[-1], VAL), **GPT2),  # another cut
        ours(tmp_path / "l"),  # another vocabulary
    ]
    # by hand, since checkpoints hold it
    hashes = [hashlib.sha256(struct.pack(f"<{len(x)}H", *x)).hexdigest() for x in (TRAIN, VAL)]
    wanted = hashlib.sha256(repr([50257, 1000, 70, *hashes]).encode()).hexdigest()[:32]
    assert {open_corpus(folder).fingerprint for folder in same} == {wanted}
    assert len({open_corpus(folder).fingerprint for folder in [same[0], *others]}) == 5


def test_the_fingerprint_of_a_large_corpus_covers_blocks(tmp_path, large):
    folders = [ours(tmp_path / "a"), ours(tmp_path / "b", cuts=[10, 400])]
    blocks = [struct.pack("<16H", *x[:8], *x[-8:]) for x in (TRAIN, VAL)]
    hashes = [hashlib.sha256(block).hexdigest() for block in blocks]
    wanted = hashlib.sha256(repr([300, 1000, 70, *hashes]).encode()).hexdigest()[:32]
    assert {open_corpus(folder).fingerprint for folder in folders} == {wanted}
    # a split shorter than a block is read as a whole, for each of them
    hashes[1] = hashlib.sha256(struct.pack("<10H", *VAL[:5], *VAL[:5])).hexdigest()
    wanted = hashlib.sha256(repr([300, 1000, 5, *hashes]).encode()).hexdigest()[:32]
    assert open_corpus(ours(tmp_path / "c", val=VAL[:5])).fingerprint == wanted


def test_another_corpus_than_the_checkpoints(tmp_path):
    c = open_corpus(ours(tmp_path / "a"))
    check_same(c, open_corpus(ours(tmp_path / "b", cuts=[5])).meta, "last.pt")
    other = open_corpus(ours(tmp_path / "c", TRAIN[::-1]))
    with pytest.raises(UserError, match="last.pt: as many tokens, but others"):
        check_same(c, other.meta, "last.pt")
    check_vocabulary(c, other.meta, "last.pt")
    other = open_corpus(ours(tmp_path / "d", TRAIN[1:], encoding="r50k_base"))
    words = "vocabulary r50k_base there, gpt2 here, train_tokens 999 there, 1000 here"
    with pytest.raises(UserError, match=words):
        check_same(c, other.meta, "last.pt")
    with pytest.raises(UserError, match="last.pt: vocabulary r50k_base there, gpt2 here"):
        check_vocabulary(c, other.meta, "last.pt")


def test_rank_files_of_one_name_are_compared_by_their_contents(tmp_path):
    ranks = {"a": b"YQ== 0", "b": b"YQ== 0", "c": b"Yg== 0"}
    for name, content in ranks.items():
        ours(tmp_path / name, TRAIN[name > "a" :], encoding="tokenizer.model")
        (tmp_path / name / "tokenizer.model").write_bytes(content)
    a, b, c = (open_corpus(str(tmp_path / name)) for name in ranks)
    check_vocabulary(a, b.meta, "last.pt")
    with pytest.raises(UserError, match="another vocabulary"):
        check_vocabulary(a, c.meta, "last.pt")
    d, e = (open_corpus(ours(tmp_path / n, x, encoding=None)) for n, x in zip("de", (TRAIN, VAL)))
    check_vocabulary(d, d.meta, "last.pt")
    with pytest.raises(UserError, match="no encoding to compare"):
        check_vocabulary(d, e.meta, "last.pt")


@pytest.mark.parametrize("cuts", [None, [7, 14]])
def test_every_flipped_bit_is_found(tmp_path, cuts):
    ours(tmp_path / "x", TRAIN[:20], VAL[:5], cuts, vocab_size=2**16)  # so that no id is beyond it
    for path in sorted((tmp_path / "x").glob("*.bin")):
        whole = path.read_bytes()
        for bit in range(0, 8 * len(whole), 5):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            refused(tmp_path / "x", f"{path} is damaged")
        path.write_bytes(whole)
    open_corpus(str(tmp_path / "x"))


DAMAGES = [  # the file's bytes become these
    (lambda data: data[:-2], "train has 999 tokens, meta.json says 1,000"),
    (lambda data: data + b"xx", "train has 1,001 tokens"),
    (lambda data: data[:-1], "{} is cut short"),
    (lambda data: b"", "{} is cut short"),
    (lambda data: bytes(598) + b"\x2c\1" * 701, "{}: id 300 from token 0 on is beyond the"),
]


def test_damaged_token_files(tmp_path):
    path = Path(ours(tmp_path / "x", hashed=False), "train.bin")
    whole = path.read_bytes()
    for damage, says in DAMAGES:
        path.write_bytes(damage(whole))
        refused(path.parent, says.format(path))


def test_missing_and_left_over_shards(tmp_path):
    folder = tmp_path / "x"
    ours(folder, cuts=[300, 600])
    (folder / "train_00003.bin").write_bytes(b"xx")  # of a former corpus: it has no hash
    assert open_corpus(str(folder)).train[:].tolist() == TRAIN.tolist()
    (folder / "train_00001.bin").unlink()
    with pytest.raises(FileNotFoundError, match="train_00001.bin"):
        open_corpus(str(folder))
    folder = tmp_path / "y"
    ours(folder, cuts=[300, 600], hashed=False)
    (folder / "train_00003.bin").write_bytes(b"xx")
    refused(folder, "train has 1,001 tokens")
    (folder / "train.bin").write_bytes(b"xx")
    refused(folder, "several corpora")
    folder = tmp_path / "z"
    llm_c(folder, [[1], [2], [3]])
    (folder / "fineweb_train_000002.bin").unlink()
    refused(folder, "lacks shards between fineweb_train_000001.bin and fineweb_train_000003.bin")
    shutil.rmtree(folder)
    llm_c(folder, [])
    refused(folder, "has no train.bin")


def test_a_foreign_file_that_is_cut_or_whose_header_lies(tmp_path):
    llm_c(tmp_path / "x", [TRAIN[:400], TRAIN[400:801], TRAIN[801:]])
    path = tmp_path / "x" / "fineweb_train_000001.bin"
    whole = path.read_bytes()
    for at, value in ((0, 20240801), (1, 2), (2, 401)):
        path.write_bytes(whole[: 4 * at] + struct.pack("<i", value) + whole[4 * at + 4 :])
        refused(tmp_path / "x", f"{path}: its header")
    for n in (1823, 1025, 1024, 12, 3, 0):
        path.write_bytes(whole[:n])
        refused(tmp_path / "x", str(path))
    path.write_bytes(bytes(4000))
    refused(tmp_path / "x", path.name, "magic 0")


def test_a_meta_json_that_is_wrong(tmp_path):
    wrong = [{"dtype": x} for x in (None, "float16", ["u2"])] + [{"train_tokens": "1000"}]
    wrong += [{"vocab_size": x} for x in (None, 0, 300.0, True)]
    for i, values in enumerate(wrong):
        refused(ours(tmp_path / f"{i}", **values), f"{tmp_path}/{i}")
    for text in ("", "{", "null", "[]", "\x80", '{"dtype": "uint8"}'):
        (tmp_path / "0" / "meta.json").write_text(text, encoding="latin-1")
        refused(tmp_path / "0", f"{tmp_path}/0/meta.json describes no corpus")


class Code:
    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


PICKLED = [Code(), {"vocab_size": 300, "x": Code()}, {"vocab_size": np.int64(300)}, {}, []]
PICKLED += [{"vocab_size": 2, "itos": itos} for itos in ({0: "a"}, 7)]


def test_meta_pkl_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nanogpt(tmp_path / "x")
    for pickled in PICKLED:
        (tmp_path / "x" / "meta.pkl").write_bytes(pickle.dumps(pickled))
        refused("x", f"{tmp_path}/x/meta.pkl is not nanoGPT's")
    assert not os.path.exists("code_was_run")
