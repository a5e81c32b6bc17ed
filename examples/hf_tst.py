"""Token Superposition Training of a transformers causal language model.

    python -m examples.hf_tst --model=FOLDER --text=FILE --bag_size=4 --out=out/hf_tst

The method is tst.py. From nanotst/ come a loss that never holds all logits (tst.multi_hot_cross_entropy of
the logits is the same) and the order of reading (any reader of L*n_in + n_out tokens a row would do).

Dimensions: B rows (batch_size), L positions (block_size), s bag size, C width, V vocabulary.
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from nanotst import UserError
from nanotst.configurator import entry_point
from nanotst.kernels import linear_multi_hot_cross_entropy
from nanotst.machine import pick_device
from nanotst.stream import TokenStream
from tst import bags_and_labels, embed_bags, phase_at, phase_list


@dataclass
class Config:
    """Usage: python -m examples.hf_tst --model=FOLDER --text=FILE [--key=value ...]

    For models that take inputs_embeds and end in a plain linear head: Llama, Qwen3, Qwen3-MoE, Mixtral and
    most others. One that does more, such as cap its logits, is refused.
    """

    model: str = ""  # folder of a model and its tokenizer, or a name on the Hugging Face hub
    text: str = ""  # a file of UTF-8 text to train on
    out: str = ""  # folder for the trained model; without it, nothing is kept
    from_scratch: bool = False  # take the model's config.json alone, draw random weights
    bag_size: int = 4  # s; 1 is ordinary training
    superposition_ratio: float = 0.3  # r, the share of the steps on bags
    max_steps: int = 1000  # of the optimizer
    batch_size: int = 32  # rows of a step
    block_size: int = 512  # L, positions of a row
    learning_rate: float = 1e-3  # after warmup, before the decay over the last tenth of the steps
    warmup_steps: int = 100  # over which the rate rises
    seed: int = 1337  # of the order of the text, and of random weights
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def load(c):
    """The model, in float32, and its tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(c.model)
        if c.from_scratch:
            shape = AutoConfig.from_pretrained(c.model)
            return AutoModelForCausalLM.from_config(shape, dtype=torch.float32), tokenizer
        return AutoModelForCausalLM.from_pretrained(c.model, dtype=torch.float32), tokenizer
    except (OSError, ValueError) as e:
        raise UserError(f"cannot load {c.model}: {' '.join(str(e).split())[:200]}") from None


def read_tokens(path, tokenizer, n_rows):
    """The token ids of a text file: (N,). n_rows of the model's embedding, which they may not exceed."""
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
    except UnicodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    tokens = np.array(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, np.int64)
    if tokens.max(initial=0) >= n_rows:
        raise UserError(
            f"the tokenizer gives id {tokens.max()}, the model's embedding has {n_rows} rows"
        )
    return tokens


@torch.no_grad()
def check_plain(model, trunk, embedding, head, tokens):
    """Raise UserError unless embedding, trunk and head are all that the model does to tokens (1, L)."""
    hidden = trunk(
        inputs_embeds=embedding.weight[tokens], use_cache=False
    ).last_hidden_state  # (1, L, C)
    ours, theirs = F.linear(hidden, head.weight), model(tokens, use_cache=False).logits  # (1, L, V)
    if not torch.allclose(ours, theirs, atol=1e-3 * theirs.abs().max().item()):
        raise UserError(f"{type(model).__name__} does more than embedding, trunk and linear head")


def main(config):
    """Train, save to c.out, and return the loss of every step in nats per token."""
    c = config
    for key in ("model", "text"):
        if not getattr(c, key):
            raise UserError(f"--{key}= is missing, see --help")
    if min(c.max_steps, c.batch_size, c.block_size) < 1 or c.warmup_steps < 0:
        raise UserError(
            "max_steps, batch_size and block_size must be at least 1, warmup_steps at least 0"
        )
    try:
        phases = phase_list(c.max_steps, [c.bag_size], c.superposition_ratio)
    except ValueError as e:
        raise UserError(str(e)) from None

    torch.manual_seed(c.seed)
    device = pick_device(c.device)
    model, tokenizer = load(c)
    model.to(device).eval()
    trunk, head, embedding = (
        model.get_decoder(),
        model.get_output_embeddings(),
        model.get_input_embeddings(),
    )
    n_expert = getattr(model.config, "num_experts", 0) or getattr(
        model.config, "num_local_experts", 0
    )
    options = {"output_router_logits": True} if n_expert else {}
    tokens = read_tokens(c.text, tokenizer, len(embedding.weight))  # (N,)
    sources = [(tokens, Fraction(1))]  # one corpus, which gives every row
    stream = TokenStream(
        sources, c.block_size, phases, c.batch_size, range(c.batch_size), c.seed, device
    )
    check_plain(
        model, trunk, embedding, head, torch.from_numpy(tokens[: c.block_size]).to(device)[None]
    )
    model.train()

    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=c.learning_rate,
        betas=(0.9, 0.95),
    )
    losses = []
    for step in range(c.max_steps):
        phase = phase_at(phases, step)
        bags, labels = bags_and_labels(
            stream.batch(step), phase.n_in, phase.n_out
        )  # (B, L, s) each
        with torch.autocast(
            device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")
        ):
            x = embed_bags(bags, embedding.weight)  # (B, L, C)
            out = trunk(inputs_embeds=x, use_cache=False, **options)
            loss = objective = linear_multi_hot_cross_entropy(
                out.last_hidden_state, head.weight, labels
            )
            if n_expert:
                balance = load_balancing_loss_func(
                    out.router_logits, n_expert, model.config.num_experts_per_tok
                )
                objective = loss + model.config.router_aux_loss_coef * balance
        decay = max(1, round(0.1 * c.max_steps))  # warmup, constant, linear end
        share = min(1, (step + 1) / max(1, c.warmup_steps), (c.max_steps - step) / decay)
        for group in optimizer.param_groups:
            group["lr"] = c.learning_rate * share
        objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0 or step == c.max_steps - 1:
            print(
                f"step {step + 1}/{c.max_steps} | s {phase.n_out} | loss {losses[-1]:.4f}",
                flush=True,
            )
    if c.out:
        model.save_pretrained(c.out)
        tokenizer.save_pretrained(c.out)
    return losses


if __name__ == "__main__":
    entry_point(main, Config)
