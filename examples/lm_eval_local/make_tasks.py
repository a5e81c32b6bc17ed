"""Two tasks for lm-eval from the validation split of a prepared corpus, which no run was trained on.

    python -m examples.lm_eval_local.make_tasks --dataset=python_source --out_dir=out/tasks
    python -m tools.export out/tst/best.pt out/hf
    HF_HUB_OFFLINE=1 lm_eval --model hf --model_args pretrained=out/hf,dtype=float32 --device cpu \\
        --include_path out/tasks --tasks last_word,swapped_words --batch_size 32

last_word       predict the last word, of four letters or more, of a passage that ends with a sentence or a
                line; the word occurs earlier in the passage, as in LAMBADA
swapped_words   tell a sentence or a line from its copy with two neighbouring words swapped

Lengths are in bytes, so the same tasks serve models of any vocabulary.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanotst import UserError
from nanotst.configurator import entry_point
from nanotst.corpus import open_corpus
from nanotst.vocabulary import tokenizer_of

CLOSING = """["'”’)\\]]*"""  # what may follow a full stop
LAST_WORD = re.compile(rf"(?<=\S )[^\W\d]\w{{3,}}(?=[.!?]{CLOSING}\s|[^\w\n]*\n)")
END = re.compile(rf"(?:(?<=[.!?])|(?<=[.!?]{CLOSING[:-1]}))\s+|\n")  # end of a sentence or a line
PAIR = re.compile(r"(?<=\s)([^\W\d_]+) (?=([^\W\d_]+)(?!\S))")  # two words with a space between
SEED = 1337


@dataclass
class Config:
    """Usage: python -m examples.lm_eval_local.make_tasks --dataset=NAME --out_dir=FOLDER [--key=value ...]"""

    dataset: str = "python_source"  # prepared corpus, a folder in data/ or its path
    out_dir: str = "out/tasks"  # folder for the task files and their data
    n_items: int = 1000  # most items per task, chosen from the whole text
    max_bytes: int = 128  # length of a passage or sentence; a byte model sees block_size of them


def last_words(text, max_bytes):
    """Yield {context, word} for passages whose last word occurs earlier in them. They do not overlap and have
    max_bytes / 2 to max_bytes bytes."""
    used = 0  # characters of the text
    for match in LAST_WORD.finditer(text):
        passage = text[max(used, match.end() - max_bytes) : match.end()]
        passage = passage.encode()[-max_bytes:].decode(errors="ignore")
        if len(passage) < match.end():  # begins within the text: leave out the part of a word
            passage = re.sub(r"^\S*\s+", "", passage)
        context, word = passage[: -len(match[0]) - 1], match[0]
        if len(passage.encode()) >= max_bytes / 2 and re.search(rf"\b{word}\b", context):
            used = match.end()
            yield {"context": context, "word": word}


def swapped_words(text, max_bytes, rng):
    """Yield {choices: [sentence, swapped]} for sentences and lines. The first word stays in its place, since
    its capital letter would give the swap away."""
    for sentence in map(str.strip, END.split(text)):
        pairs = [match for match in PAIR.finditer(sentence) if match[1].lower() != match[2].lower()]
        if pairs and len(sentence.split()) >= 5 and len(sentence.encode()) <= max_bytes:
            match = rng.choice(pairs)
            before, after = sentence[: match.start()], sentence[match.end(2) :]
            yield {"choices": [sentence, f"{before}{match[2]} {match[1]}{after}"]}


def main(c):
    corpus, rng = open_corpus(c.dataset), random.Random(SEED)
    tokenizer = tokenizer_of(corpus.folder, {"meta": corpus.meta, "data": corpus.folder})
    tokens, separator = corpus.val[:], corpus.meta["separator"]
    passages, sentences = {}, {}  # by their text, so that none occurs twice
    for part in np.split(tokens, np.flatnonzero(tokens == separator)):
        text = tokenizer.decode(part[part != separator])
        passages |= {item["context"]: item for item in last_words(text, c.max_bytes)}
        sentences |= {item["choices"][0]: item for item in swapped_words(text, c.max_bytes, rng)}
    if not passages or not sentences:
        raise UserError("the validation split has nothing for one of the tasks; raise --max_bytes")
    folder = Path(c.out_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in (("last_word", passages), ("swapped_words", sentences)):
        chosen = random.Random(SEED).sample(list(items.values()), min(c.n_items, len(items)))
        lines = "".join(json.dumps(item) + "\n" for item in chosen)
        (folder / f"{name}.jsonl").write_text(lines)
        task = (Path(__file__).parent / f"{name}.yaml").read_text("utf-8")
        (folder / f"{name}.yaml").write_text(task.replace("$folder", folder.as_posix()), "utf-8")
        print(f"{name}: {len(chosen):,} of {len(items):,} items in {folder}")


if __name__ == "__main__":
    entry_point(main, Config)
