"""Token Superposition Training of a transformers causal language model. The method comes from tst.py alone.

    python examples/hf_tst.py --model=FOLDER --text=FILE --bag_size=4 --out=out/hf_tst

FOLDER holds a tokenizer, config.json and, unless --from_scratch, weights; a name on the Hugging Face hub does, too.
For models that take inputs_embeds and end in a plain linear head: Llama, Qwen3, Qwen3-MoE, Mixtral and most others
(not: scaled embeddings, capped logits). dataloader.py reads the text; any reader of (L+1)*s tokens a row would do.

Dimensions: B rows (batch_size), L positions (block_size), s bag size, C width, V vocabulary.
"""

import argparse
import os
import sys

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from dataloader import TokenStream
from tst import bag_size_at, bags_and_labels, embed_bags, linear_multi_hot_cross_entropy


def main(argv=None):
    """Train, save to --out, and return the loss of every step in nats per token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("model", ""), ("text", ""), ("out", ""), ("bag_size", 4), ("superposition_ratio", 0.3),
                          ("steps", 1000), ("batch_size", 32), ("block_size", 512), ("lr", 1e-3), ("warmup", 100),
                          ("seed", 1337)):
        parser.add_argument(f"--{name}", type=type(default), default=default, required=name in ("model", "text"))
    parser.add_argument("--from_scratch", action="store_true", help="take config.json alone, draw random weights")
    args = parser.parse_args(argv)
    B, L = args.batch_size, args.block_size

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.from_scratch:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.to(device).train()
    trunk, head, embedding = model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings()
    n_expert = getattr(model.config, "num_experts", 0) or getattr(model.config, "num_local_experts", 0)
    options = {"output_router_logits": True} if n_expert else {}

    with open(args.text, encoding="utf-8") as f:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tokens = np.array(tokenizer(f.read(), add_special_tokens=False, verbose=False).input_ids)  # (N,)
    superposition_steps, cursor = round(args.superposition_ratio * args.steps), 0
    stream = TokenStream(tokens, L, args.bag_size, superposition_steps, B, range(B), args.seed, device)

    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.95))
    losses = []
    for step in range(args.steps):
        s = bag_size_at(step, args.bag_size, superposition_steps)
        bags, labels = bags_and_labels(stream.read(cursor, s).to(device), s)  # (B, L, s) each
        cursor += stream.step_tokens(s)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            out = trunk(inputs_embeds=embed_bags(bags, embedding.weight), use_cache=False, **options)  # (B, L, C)
            loss = objective = linear_multi_hot_cross_entropy(out.last_hidden_state, head.weight, labels)
            if n_expert:
                balance = load_balancing_loss_func(out.router_logits, n_expert, model.config.num_experts_per_tok)
                objective = loss + model.config.router_aux_loss_coef * balance
        decay = max(1, round(0.1 * args.steps))  # warmup, constant, linear end
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup), (args.steps - step) / decay)
        objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step + 1}/{args.steps} | s {s} | loss {losses[-1]:.4f}", flush=True)
    if args.out:
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
    return losses


if __name__ == "__main__":
    main()
