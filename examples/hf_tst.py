"""Token Superposition Training of a causal language model of transformers.

Bags go in as inputs_embeds, and the loss takes the model's logits. Any reader of L*n_in + n_out tokens per
row may replace TokenStream. Dimensions: B rows, L positions, s bag size, C width, V vocabulary, N tokens.
"""

from dataclasses import dataclass
from pathlib import Path

from nanotst import UserError  # before torch: it sets how torch's threads wait

# isort: split
import numpy as np
import torch

from nanotst.checkpoint import all_finite
from nanotst.configurator import entry_point
from nanotst.huggingface import import_transformers
from nanotst.machine import pick_device
from nanotst.stream import TokenStream
from tst import bags_and_labels, embed_bags, multi_hot_cross_entropy, phase_at, phase_list


@dataclass
class Config:
    """Usage: python -m examples.hf_tst --model=FOLDER --text=FILE [--key=value ...]

    Trains any model that takes inputs_embeds: Llama, Qwen3, Qwen3-MoE, Mixtral and most others."""

    model: str = ""  # folder of a model and its tokenizer, or a name on the Hugging Face hub
    text: str = ""  # UTF-8 text file to train on
    out: str = ""  # folder for the trained model; empty: the model is not saved
    from_scratch: bool = False  # random initial weights, in the shape of the model's config.json
    bag_size: int = 4  # s, tokens per bag; 1 is ordinary training
    superposition_ratio: float = 0.3  # r, share of the steps on bags
    max_steps: int = 1000  # optimizer steps
    batch_size: int = 32  # rows per step
    block_size: int = 512  # L, positions per row
    learning_rate: float = 1e-3  # peak rate, between the warmup and the decay over the last 10 %
    warmup_steps: int = 100  # steps of linear warmup
    seed: int = 1337  # seed of the reading order and of random weights
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def load(c):
    """The model in float32, its tokenizer, and the tokens of the text: (N,) int64."""
    hf = import_transformers()
    tokenizer = hf.AutoTokenizer.from_pretrained(c.model)
    if c.from_scratch:
        shape = hf.AutoConfig.from_pretrained(c.model)
        model = hf.AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    else:
        model = hf.AutoModelForCausalLM.from_pretrained(c.model, dtype=torch.float32)
    text = Path(c.text).read_text(encoding="utf-8")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return model, tokenizer, np.array(tokens, np.int64)


@torch.no_grad()
def check_embeddings(model, table, tokens):
    """Raise UserError unless embeddings as inputs, of tokens (1, L), give what the model does by itself."""
    theirs = model(tokens).logits  # (1, L, V)
    ours = model(inputs_embeds=embed_bags(tokens[..., None], table)).logits
    if not torch.allclose(ours, theirs, atol=1e-3 * theirs.abs().max().item()):
        raise UserError(f"{type(model).__name__} changes its embeddings before it uses them")


def main(c):
    """Train, save to c.out, and return the loss of each step in nats per token."""
    torch.manual_seed(c.seed)
    model, tokenizer, tokens = load(c)
    device = pick_device(c.device)
    model.to(device).eval()
    table = model.get_input_embeddings().weight  # (V, C)
    check_embeddings(model, table, torch.from_numpy(tokens[None, : c.block_size]).to(device))
    model.train()
    phases = phase_list(c.max_steps, [c.bag_size], c.superposition_ratio)
    rows = range(c.batch_size)  # of each step, all on this machine
    stream = TokenStream([(tokens, 1)], c.block_size, phases, len(rows), rows, c.seed, device)

    norms = [p for p in model.parameters() if p.dim() < 2]  # without weight decay
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, c.learning_rate, (0.9, 0.95), weight_decay=0.1)
    decay = max(1, round(0.1 * c.max_steps))  # warmup, constant, linear decay
    rate = lambda i: min(1, (i + 1) / max(1, c.warmup_steps), (c.max_steps - i) / decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    balance = getattr(model.config, "router_aux_loss_coef", 0)  # of a mixture of experts
    experts = {"output_router_logits": True} if balance else {}
    losses = []
    for step in range(c.max_steps):
        phase = phase_at(phases, step)
        tokens = stream.batch(step)  # (B, L*s + s)
        bags, labels = bags_and_labels(tokens, phase.n_in, phase.n_out)  # (B, L, s) each
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled="cuda" in device):
            out = model(inputs_embeds=embed_bags(bags, table), use_cache=False, **experts)
            loss = multi_hot_cross_entropy(out.logits, labels)  # logits (B, L, V)
            objective = loss + balance * out.aux_loss if balance else loss
        objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0 or step == c.max_steps - 1:
            print(f"step {step + 1}/{c.max_steps} | s {phase.n_out} | loss {losses[-1]:.4f}")
    if not all_finite(model.parameters()):
        raise UserError("the weights are not finite, so nothing was saved; lower --learning_rate")
    if c.out:
        model.save_pretrained(c.out)
        tokenizer.save_pretrained(c.out)
    return losses


if __name__ == "__main__":
    entry_point(main, Config)
