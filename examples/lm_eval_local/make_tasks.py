"""Two tasks for lm-eval, made of the validation split of a prepared corpus: text that no run was trained on.

    python -m examples.lm_eval_local.make_tasks --dataset=python_source --out_dir=out/tasks
    python -m tools.export out/tst/best.pt out/hf
    HF_HUB_OFFLINE=1 lm_eval --model hf --model_args pretrained=out/hf,dtype=float32 --device cpu \\
        --include_path out/tasks --tasks last_word,swapped_words --batch_size 32

last_word       a passage that ends where a sentence or a line does, without its last word, which has four
                letters or more and stands in the passage before: of LAMBADA's passages, the kind that can be
                guessed from what stands further back
swapped_words   a sentence or a line, and the same with two neighbouring words swapped: which is likelier?

Everything is local: the task files beside this script are copied to out_dir, with the place of their data
filled in. Lengths are in bytes, so the same tasks serve models of any vocabulary.
"""

import json
import random
import re
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanotst import UserError
from nanotst.configurator import entry_point
from nanotst.corpus import open_corpus
from nanotst.vocabulary import tokenizer_of

CLOSING = """["'”’)\\]]*"""  # what may follow a full stop
LAST_WORD = re.compile(rf"(?<=\S )[^\W\d]\w{{3,}}(?=[.!?]{CLOSING}\s|[^\w\n]*\n)")
END = re.compile(rf"(?:(?<=[.!?])|(?<=[.!?]{CLOSING[:-1]}))\s+|\n")  # of a sentence or of a line
# two words with only a space between and after
PAIR = re.compile(r"(?<=\s)([^\W\d_]+) (?=([^\W\d_]+)(?!\S))")
FEWEST_WORDS = 5  # of a sentence


@dataclass
class Config:
    """Usage: python -m examples.lm_eval_local.make_tasks --dataset=NAME --out_dir=FOLDER [--key=value ...]

    Makes the tasks last_word and swapped_words for lm-eval of a corpus's validation split.
    """

    dataset: str = "python_source"  # a prepared corpus, a folder in data/ or its path
    out_dir: str = "out/tasks"  # the task files and their data go here
    n_items: int = 1000  # of each task, at most, chosen from all of the text
    max_bytes: int = 128  # of a passage or a sentence; a model of bytes sees block_size of them
    seed: int = 1337  # of what is chosen, and of the words that are swapped


def documents(corpus):
    """Yield the texts of the validation split."""
    tokenizer = tokenizer_of(corpus.folder, {"meta": corpus.meta, "data": corpus.folder})
    tokens, separator = corpus.val[:], corpus.meta["separator"]
    ends = [] if separator is None else np.flatnonzero(tokens == separator).tolist()
    for start, end in zip([0, *(i + 1 for i in ends)], [*ends, len(tokens)]):
        yield tokenizer.decode(tokens[start:end])


def last_words(text, max_bytes):
    """Yield the passages of a text whose last word stands in them before: {context, word}. They do not
    overlap, and have max_bytes / 2 to max_bytes bytes."""
    used = 0  # characters of the text
    for match in LAST_WORD.finditer(text):
        passage = text[max(used, match.end() - max_bytes) : match.end()]
        passage = passage.encode()[-max_bytes:].decode(errors="ignore")
        if len(passage) < match.end():  # does not begin with the text: leave out a part of a word
            passage = re.sub(r"^\S*\s+", "", passage)
        context, word = passage[: -len(match[0]) - 1], match[0]
        if len(passage.encode()) >= max_bytes / 2 and re.search(rf"\b{word}\b", context):
            used = match.end()
            yield {"context": context, "word": word}


def swapped_words(text, max_bytes, rng):
    """Yield the sentences and lines of a text in which two words can be swapped: {choices: [sentence,
    swapped]}. The first word is left in its place, or a capital letter would tell."""
    for sentence in map(str.strip, END.split(text)):
        if len(sentence.split()) < FEWEST_WORDS or len(sentence.encode()) > max_bytes:
            continue
        pairs = [match for match in PAIR.finditer(sentence) if match[1].lower() != match[2].lower()]
        if pairs:
            match = rng.choice(pairs)
            before, after = sentence[: match.start()], sentence[match.end(2) :]
            yield {"choices": [sentence, f"{before}{match[2]} {match[1]}{after}"]}


def write_task(name, items, folder):
    """Write the data of a task, and the task file."""
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    task = string.Template((Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8"))
    place = json.dumps(folder.as_posix(), ensure_ascii=False)[
        1:-1
    ]  # in YAML's quotes it looks the same
    (folder / f"{name}.yaml").write_text(task.substitute(folder=place), encoding="utf-8")


def main(config):
    c = config
    if c.n_items < 1 or c.max_bytes < 16:
        raise UserError("n_items must be at least 1 and max_bytes at least 16")
    rng, passages, sentences = random.Random(c.seed), {}, {}  # by what may not be there twice
    for text in documents(open_corpus(c.dataset)):
        passages |= {item["context"]: item for item in last_words(text, c.max_bytes)}
        sentences |= {item["choices"][0]: item for item in swapped_words(text, c.max_bytes, rng)}
    found = {"last_word": list(passages.values()), "swapped_words": list(sentences.values())}
    if empty := [name for name, items in found.items() if not items]:
        raise UserError(
            f"{empty[0]}: the validation split of {c.dataset} has nothing for it; try a larger --max_bytes"
        )
    folder = Path(c.out_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in found.items():
        chosen = random.Random(c.seed).sample(items, min(c.n_items, len(items)))
        write_task(name, chosen, folder)
        print(f"{name}: {len(chosen):,} of {len(items):,} that were found")
    tasks = f"--include_path {c.out_dir} --tasks {','.join(found)}"
    print(f"HF_HUB_OFFLINE=1 lm_eval --model hf --model_args pretrained=EXPORTED_FOLDER {tasks}")


if __name__ == "__main__":
    entry_point(main, Config)
