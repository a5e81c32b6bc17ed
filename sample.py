"""Text from a trained model, printed as it is made.

    python sample.py --checkpoint=out/tst/best.pt --prompt="def main(" --n_tokens=300
"""

import codecs
import sys
from dataclasses import dataclass

import torch

from checkpoint import load_model
from configurator import fail, parse, pick_device
from tokenizer import get_tokenizer


@dataclass
class Config:
    """Usage: python sample.py --checkpoint=FILE [--key=value ...]"""

    checkpoint: str = "out/tst/best.pt"  # as train.py wrote it, best.pt or last.pt
    prompt: str = "\n"  # the text to continue, or FILE:path
    n_samples: int = 1
    n_tokens: int = 500  # tokens to add to the prompt
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 50  # choose among the likeliest k tokens; 0: among all
    seed: int = 1337
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def main(config):
    c = config
    device = pick_device(c.device)
    model, checkpoint = load_model(c.checkpoint)
    model.to(device).eval()
    if "encoding" not in checkpoint["meta"]:
        fail(f"the corpus of {c.checkpoint} names no encoding in its meta.json, so tokens cannot become text")
    tokenizer = get_tokenizer(checkpoint["meta"]["encoding"], folder=checkpoint["data"])
    prompt = c.prompt
    if prompt.startswith("FILE:"):
        with open(prompt[5:], encoding="utf-8") as f:
            prompt = f.read()
    ids = tokenizer.encode(prompt)
    if not len(ids):
        fail("the prompt is empty; give at least one character")
    tokens = torch.tensor(ids, device=device)[None]  # (1, T)
    generator = torch.Generator(device).manual_seed(c.seed)
    for _ in range(c.n_samples):
        print(prompt, end="", flush=True)
        text = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
        for token in model.generate(tokens, c.n_tokens, c.temperature, c.top_k, generator):
            if token.item() == tokenizer.separator:  # the end of the document
                break
            print(text.decode(tokenizer.decode_bytes(token.tolist())), end="", flush=True)
        print("\n" + "-" * 40)


if __name__ == "__main__":
    try:
        main(parse(Config, sys.argv[1:]))
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(1)
    except (OSError, UnicodeError) as e:
        fail(e)
