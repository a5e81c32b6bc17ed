"""examples/lm_eval_local: what the tasks are made of, and lm-eval's scores against our own."""

import json
import os
import random
import re

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from examples.lm_eval_local import make_tasks
from model import GPT, GPTConfig
from nanotst import UserError
from nanotst.tokenizer import get_tokenizer
from tools import export

WORDS = "tree river stone naïve walks walked sleeps mother Brother a an of é 中文 x_1 don't {{word}} $folder"
ENDS = [". ", ".\n", "! ", "?\n\n", ',"\n', '." ', "\n    ", ".”\n"]


def make_text(n_sentences, seed):
    """Sentences of few words, so that the last one often occurred before, and lines, quotes, empty lines."""
    rng = random.Random(seed)
    sentences = [rng.choices(WORDS.split(), k=rng.randrange(3, 12)) for _ in range(n_sentences)]
    return "".join(" ".join(words) + rng.choice(ENDS) for words in sentences)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """(folder of a corpus, the texts of its validation split)."""
    documents = [make_text(60, seed) for seed in range(5)] + ["Too short to be of use.", ""]
    folder = tmp_path_factory.mktemp("lm_eval") / "corpus"
    folder.mkdir()
    meta = {"vocab_size": 256, "dtype": "uint8", "encoding": "bytes", "separator": 0}
    for split, texts in (("train", [make_text(9, 99)]), ("val", documents)):
        data = "".join(f"{text}\0" for text in texts).encode()
        (folder / f"{split}.bin").write_bytes(data)
        meta[f"{split}_tokens"] = len(data)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder, documents


def make(corpus, folder, **knobs):
    """Run the command -> {task: its items}."""
    make_tasks.main(make_tasks.Config(str(corpus), str(folder), **knobs))
    files = {path.stem: path.read_text().splitlines() for path in folder.glob("*.jsonl")}
    return {task: [json.loads(line) for line in lines] for task, lines in files.items()}


def test_the_items_are_of_held_out_text(held_out, tmp_path):
    corpus, documents = held_out
    items, places = make(corpus, tmp_path), []
    for item in items["last_word"]:
        passage, word = f"{item['context']} {item['word']}", item["word"]
        assert 64 <= len(passage.encode()) <= 128
        assert word in re.split(r"\W+", item["context"])
        assert len(word) >= 4 and not set(word) & set(" .,!?\n")
        document = next(i for i, text in enumerate(documents) if passage in text)
        start = documents[document].index(passage)
        assert documents[document][start + len(passage)] in ".,!?\n"
        assert start == 0 or documents[document][start - 1].isspace()  # begins with a whole word
        places.append((document, start, start + len(passage)))
    places.sort()
    assert all(a[0] < b[0] or a[2] <= b[1] for a, b in zip(places, places[1:]))  # no overlaps
    assert len(places) > 30 and len({item["word"] for item in items["last_word"]}) > 5
    for item in items["swapped_words"]:
        sentence, swapped = item["choices"]
        assert any(sentence in text for text in documents) and "\n" not in sentence
        assert len(sentence.encode()) == len(swapped.encode()) <= 128
        a, b = sentence.split(), swapped.split()
        i, j = (i for i, (x, y) in enumerate(zip(a, b)) if x != y)
        assert j == i + 1 and i >= 1 and (a[i], a[j]) == (b[j], b[i]) and len(a) == len(b) >= 5
        assert a[i].isalpha() and a[j].isalpha()
    sentences = {item["choices"][0] for item in items["swapped_words"]}
    assert len(sentences) == len(items["swapped_words"]) > 100


def test_a_text_gives_the_same_items_again(held_out, tmp_path):
    corpus, _ = held_out
    first = make(corpus, tmp_path, n_items=20)
    assert first == make(corpus, tmp_path, n_items=20)
    assert {len(items) for items in first.values()} == {20}
    with pytest.raises(UserError, match="the validation split has nothing for one of the tasks"):
        make(corpus, tmp_path / "new", max_bytes=16)
    assert not (tmp_path / "new").exists()


def test_lm_eval_scores_are_our_own(held_out, tmp_path):
    """Accuracy and perplexity of both tasks, from the task files and an exported model alone."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=256, block_size=128, n_layer=1, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        model.head.weight.mul_(30)
    files = export.tokenizer_files(get_tokenizer("bytes"), 128)
    export.save_hf(model, str(tmp_path / "hf"), files=files, separator=0)
    items = make(held_out[0], tmp_path / "tasks", n_items=40)
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
        """The log-likelihood of the continuation, and whether greedy decoding gives it."""
        start = list(context.encode()) or [0]
        ids = torch.tensor(start + list(continuation.encode()))
        wanted = ids[len(start) :]  # (T,)
        logits = model(ids[None, :-1])[0, len(start) - 1 :]  # (T, V)
        loss = F.cross_entropy(logits, wanted, reduction="sum")
        return -loss.item(), torch.equal(logits.argmax(-1), wanted)

    words = [score(item["context"], f" {item['word']}") for item in items["last_word"]]
    found, (scores, greedy) = results["last_word"], zip(*words)
    assert found["perplexity,none"] == pytest.approx(np.exp(-np.mean(scores)), rel=1e-3)
    assert found["acc,none"] == pytest.approx(np.mean(greedy))
    pairs = [[score("", choice)[0] for choice in x["choices"]] for x in items["swapped_words"]]
    right = np.mean([a > b for a, b in pairs])
    assert results["swapped_words"]["acc,none"] == pytest.approx(right) and 0.2 < right < 0.8
