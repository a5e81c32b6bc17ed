"""Text from a trained model, printed as it is generated.

python sample.py --checkpoint=out/tst --prompt="def main(" --n_tokens=300
"""

import codecs
import sys
from dataclasses import dataclass
from pathlib import Path

from nanotst import UserError  # before torch: it says what is missing

# isort: split
import torch

from nanotst.checkpoint import find_checkpoint, load_model
from nanotst.configurator import entry_point
from nanotst.kernels import use_twins
from nanotst.machine import Machine, pick_device
from nanotst.vocabulary import tokenizer_of


@dataclass
class Config:
    """Usage: python sample.py --checkpoint=FILE_OR_FOLDER [--key=value ...]"""

    checkpoint: str = "out/run"  # train.py's out_dir (best.pt, or last.pt) or a checkpoint in it
    prompt: str = "\n"  # text to continue, or FILE:path
    n_samples: int = 1  # number of texts
    n_tokens: int = 500  # tokens to add to the prompt
    temperature: float = 0.8  # below 1, likely tokens become likelier; 0: always the likeliest
    top_k: int = 50  # choose among the k likeliest tokens; 0: among all
    seed: int = 1337  # seed of the choices
    data: str = ""  # folder of a corpus that has moved; only a vocabulary in a rank file needs it
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def main(c):
    if c.temperature and not 1e-6 <= c.temperature <= 1e6:
        raise UserError(f"temperature must be 0 or in 1e-6..1e6, got {c.temperature}")
    if c.top_k < 0:
        raise UserError(f"top_k must be at least 0, got {c.top_k}")
    prompt = c.prompt
    if prompt.startswith("FILE:"):
        # read as bytes, which keeps its line ends
        prompt = Path(prompt[5:]).read_bytes().decode("utf-8-sig", "replace")
    device, path = pick_device(c.device), find_checkpoint(c.checkpoint)
    model, checkpoint = load_model(path)
    model.to(device).eval()
    use_twins(model, Machine(device, "float32"))
    tokenizer = tokenizer_of(path, checkpoint, c.data)
    ids = tokenizer.encode(prompt)
    if not len(ids):
        raise UserError("the prompt is empty; give at least one character")
    if len(ids) > model.config.block_size:
        seen = f"the last {model.config.block_size} of the prompt's {len(ids)} tokens"
        print(f"the model sees {seen}", file=sys.stderr)
    tokens = torch.tensor(ids, device=device)[None]  # (1, T)
    generator = torch.Generator(device).manual_seed(c.seed)
    for _ in range(c.n_samples):
        print(prompt, end="", flush=True)
        text = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end in a character
        for token in model.generate(tokens, c.n_tokens, c.temperature, c.top_k, generator):
            if token.item() == tokenizer.separator:  # the end of the document
                break
            print(text.decode(tokenizer.decode_bytes(token.tolist())), end="", flush=True)
        print(text.decode(b"", final=True) + "\n" + "-" * 40)


if __name__ == "__main__":
    entry_point(main, Config)
