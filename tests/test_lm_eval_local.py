"""examples/lm_eval_local: what the tasks are made of, and lm-eval's scores against our own."""

import json
import os
import random
import re
from collections import Counter

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from examples.lm_eval_local import make_tasks
from model import GPT, GPTConfig
from nanotst import UserError
from nanotst.configurator import parse
from nanotst.tokenizer import get_tokenizer
from tools import export

WORDS = [
    "tree",
    "river",
    "stone",
    "naïve",
    "walks",
    "walked",
    "sleeps",
    "mother",
    "Brother",
    "a",
    "an",
    "of",
]
WORDS += ["é", "中文", "x_1", "don't", "{{word}}", "$folder"]


def make_text(n_sentences, seed):
    """Sentences of few words, so that the last one often stood before, and lines, quotes, empty lines."""
    rng = random.Random(seed)
    ends = [". ", ".\n", "! ", "?\n\n", ',"\n', '." ', "\n    ", ".”\n"]
    sentences = [
        " ".join(rng.choices(WORDS, k=rng.randrange(3, 12))) + rng.choice(ends)
        for _ in range(n_sentences)
    ]
    return "".join(sentences)


@pytest.fixture
def held_out(tmp_path):
    """Texts of the validation split of a corpus in tmp_path/corpus."""
    documents = [make_text(60, seed) for seed in range(5)] + ["Too short to be of use.", ""]
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, texts in (("train", [make_text(9, 99)]), ("val", documents)):
        (folder / f"{split}.bin").write_bytes("".join(f"{text}\0" for text in texts).encode())
    sizes = {
        f"{split}_tokens": (folder / f"{split}.bin").stat().st_size for split in ("train", "val")
    }
    meta = {"vocab_size": 256, "dtype": "uint8", "encoding": "bytes", "separator": 0} | sizes
    (folder / "meta.json").write_text(json.dumps(meta))
    return documents


def make(tmp_path, **knobs):
    """The command -> {task: its items}."""
    knobs = {"dataset": tmp_path / "corpus", "out_dir": tmp_path / "tasks"} | knobs
    make_tasks.main(parse(make_tasks.Config, [f"--{key}={value}" for key, value in knobs.items()]))
    read = lambda name: (
        (tmp_path / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    )
    return {
        name: [json.loads(line) for line in read(name)] for name in ("last_word", "swapped_words")
    }


def test_last_words_are_of_held_out_text_and_stood_before(held_out, tmp_path):
    items, where = make(tmp_path)["last_word"], []
    for item in items:
        passage, word = f"{item['context']} {item['word']}", item["word"]
        assert 64 <= len(passage.encode()) <= 128
        assert word in re.split(r"\W+", item["context"])
        assert len(word) >= 4 and not set(word) & set(" .,!?\n")
        document = next(i for i, text in enumerate(held_out) if passage in text)
        start = held_out[document].index(passage)
        assert held_out[document][start + len(passage)] in ".,!?\n"
        assert start == 0 or held_out[document][start - 1].isspace()  # it begins with a whole word
        where.append((document, start, start + len(passage)))
    where.sort()
    assert all(a[0] < b[0] or a[2] <= b[1] for a, b in zip(where, where[1:]))  # no overlaps
    print(f"{len(items)} passages")
    assert len(items) > 30 and len({item["word"] for item in items}) > 5


def test_swapped_words_are_neighbours_in_a_held_out_sentence(held_out, tmp_path):
    items = make(tmp_path)["swapped_words"]
    for item in items:
        sentence, swapped = item["choices"]
        assert any(sentence in text for text in held_out) and "\n" not in sentence
        assert len(sentence.encode()) == len(swapped.encode()) <= 128
        a, b = sentence.split(), swapped.split()
        different = [i for i, (x, y) in enumerate(zip(a, b)) if x != y]
        i, j = different
        assert j == i + 1 and i >= 1 and (a[i], a[j]) == (b[j], b[i]) and len(a) == len(b) >= 5
        assert a[i].isalpha() and a[j].isalpha()
    print(f"{len(items)} pairs")
    assert len(items) > 100 and len({item["choices"][0] for item in items}) == len(items)


def test_the_choice_is_that_of_the_seed(held_out, tmp_path):
    first = make(tmp_path, n_items=20)
    assert first == make(tmp_path, n_items=20) != make(tmp_path, n_items=20, seed=5)
    assert {len(items) for items in first.values()} == {20}
    long = make(tmp_path, max_bytes=300)["last_word"]
    assert (
        Counter(len(item["context"].encode()) + len(item["word"]) > 128 for item in long)[True] > 5
    )


def test_lm_eval_scores_are_our_own(held_out, tmp_path):
    """accuracy and perplexity of both tasks, from the task files and an exported model alone."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=256, block_size=128, n_layer=1, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        model.head.weight.mul_(30)
    tokenizer = {
        "tokenizer.json": export.hf_tokenizer(get_tokenizer("bytes")),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
        },
    }
    export.save_hf(
        model.state_dict(), model.config, str(tmp_path / "hf"), extra=tokenizer, separator=0
    )
    items = make(tmp_path, n_items=40)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "hf"), "dtype": "float32"},
        device="cpu",
        batch_size=8,
        tasks=list(items),
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )["results"]

    @torch.no_grad()
    def score(context, continuation):
        """The log-likelihood of the continuation, and whether it is what greedy decoding gives."""
        start = list(context.encode()) or [0]
        ids = torch.tensor(start + list(continuation.encode()))
        logits = model(ids[None, :-1])[0, len(start) - 1 :]  # (T, V)
        wanted = ids[len(start) :]
        return -F.cross_entropy(logits, wanted, reduction="sum").item(), torch.equal(
            logits.argmax(-1), wanted
        )

    words = [score(item["context"], f" {item['word']}") for item in items["last_word"]]
    found = results["last_word"]
    assert found["perplexity,none"] == pytest.approx(
        np.exp(-np.mean([s for s, _ in words])), rel=1e-3
    )
    assert found["acc,none"] == pytest.approx(np.mean([greedy for _, greedy in words]))
    pairs = [
        [score("", choice)[0] for choice in item["choices"]] for item in items["swapped_words"]
    ]
    right = np.mean([a > b for a, b in pairs])
    assert results["swapped_words"]["acc,none"] == pytest.approx(right) and 0.2 < right < 0.8


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(n_items=0), "n_items must be at least 1"),
        (dict(max_bytes=4), "max_bytes at least 16"),
        (dict(max_bytes=16), "swapped_words: the validation split of .* has nothing for it"),
        (dict(dataset="no/such/corpus"), "no prepared corpus in 'no/such/corpus'"),
    ],
)
def test_what_cannot_work_is_one_line(knobs, words, held_out, tmp_path):
    with pytest.raises(UserError, match=words) as e:
        make(tmp_path, **knobs)
    assert "\n" not in str(e.value) and not (tmp_path / "tasks").exists()
