"""Checkpoints to Hugging Face folders, and back as initial weights.

    python export.py out/run/best.pt out/hf [--dtype=bfloat16]      then out/hf is a model for transformers, vLLM,
    python train.py --init_from=hf:out/hf ...                       llama.cpp's converter, lm-eval ...

                            dense                    MoE
    without qk_norm         LlamaForCausalLM         MixtralForCausalLM
    with qk_norm            Qwen3ForCausalLM         Qwen3MoeForCausalLM

The numbers stay what they are: nothing is permuted or rescaled, fused matrices are only cut (q|k|v, gate|up, the
stack of experts) and the vocabulary's padding is left out. Needs `pip install safetensors`, not transformers.
"""

import argparse
import glob
import json
import os

import torch

from checkpoint import load_checkpoint, model_config
from configurator import fail
from tokenizer import LLAMA3_PATTERN, get_tokenizer

KINDS = {(False, False): ("llama", "LlamaForCausalLM"), (True, False): ("qwen3", "Qwen3ForCausalLM"),
         (False, True): ("mixtral", "MixtralForCausalLM"), (True, True): ("qwen3_moe", "Qwen3MoeForCausalLM")}


def import_safetensors():
    try:
        import safetensors.torch
        return safetensors
    except ImportError:
        fail("Hugging Face folders need: pip install safetensors")


def hf_config(c, dtype="float32", separator=None, balance_coef=0.001):
    """The config.json of a GPTConfig c, as a dict. separator: id of the token between documents, where known."""
    kind, architecture = KINDS[c.qk_norm, c.n_expert > 0]
    config = {
        "architectures": [architecture], "model_type": kind, "torch_dtype": dtype,
        "vocab_size": c.vocab_size, "hidden_size": c.n_embd, "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head, "head_dim": c.head_dim,
        "intermediate_size": c.ff_dim, "hidden_act": "silu", "max_position_embeddings": c.block_size,
        "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tie_embeddings, "attention_dropout": 0.0,
        "rope_theta": c.rope_theta,  # where transformers before version 5 looks for it, and others still do
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "bos_token_id": separator, "eos_token_id": separator,
    }
    if kind == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    elif kind == "mixtral":
        config |= {"sliding_window": None, "num_local_experts": c.n_expert}
    else:
        config |= {"attention_bias": False, "use_sliding_window": False}
    if kind == "qwen3_moe":
        config |= {"num_experts": c.n_expert, "moe_intermediate_size": c.ff_dim, "norm_topk_prob": True,
                   "decoder_sparse_step": 1, "mlp_only_layers": []}
    if c.n_expert:
        config |= {"num_experts_per_tok": c.top_k, "output_router_logits": False, "router_aux_loss_coef": balance_coef}
    return config


def tensor_table(c):
    """Yield (Hugging Face's name, our name, view) of each of their tensors. view(our tensor) has the shape of theirs
    and shares our memory, so this one table serves both directions."""
    def rows(a, b):
        return lambda t: t[a:b]

    def expert(e, a=None, b=None):
        return lambda t: t[e, :, a:b].T  # ours (in, out), theirs (out, in)

    whole, F, D = rows(None, None), c.ff_dim, c.head_dim
    cuts = 0, c.n_head * D, (c.n_head + c.n_kv_head) * D, (c.n_head + 2 * c.n_kv_head) * D
    yield "model.embed_tokens.weight", "embed.weight", rows(0, c.vocab_size)
    for i in range(c.n_layer):
        hf, us = f"model.layers.{i}", f"blocks.{i}"
        yield f"{hf}.input_layernorm.weight", f"{us}.attn_norm.weight", whole
        for name, a, b in zip("qkv", cuts, cuts[1:]):
            yield f"{hf}.self_attn.{name}_proj.weight", f"{us}.attn.qkv.weight", rows(a, b)
        yield f"{hf}.self_attn.o_proj.weight", f"{us}.attn.out.weight", whole
        for name in ("q_norm", "k_norm") if c.qk_norm else ():
            yield f"{hf}.self_attn.{name}.weight", f"{us}.attn.{name}.weight", whole
        yield f"{hf}.post_attention_layernorm.weight", f"{us}.mlp_norm.weight", whole
        if not c.n_expert:
            yield f"{hf}.mlp.gate_proj.weight", f"{us}.mlp.gate_up.weight", rows(0, F)
            yield f"{hf}.mlp.up_proj.weight", f"{us}.mlp.gate_up.weight", rows(F, 2 * F)
            yield f"{hf}.mlp.down_proj.weight", f"{us}.mlp.down.weight", whole
            continue
        moe = f"{hf}.mlp" if c.qk_norm else f"{hf}.block_sparse_moe"
        gate, up, down = ("gate_proj", "up_proj", "down_proj") if c.qk_norm else ("w1", "w3", "w2")
        yield f"{moe}.gate.weight", f"{us}.mlp.router.weight", whole
        for e in range(c.n_expert):
            yield f"{moe}.experts.{e}.{gate}.weight", f"{us}.mlp.gate_up", expert(e, 0, F)
            yield f"{moe}.experts.{e}.{up}.weight", f"{us}.mlp.gate_up", expert(e, F, 2 * F)
            yield f"{moe}.experts.{e}.{down}.weight", f"{us}.mlp.down", expert(e)
    yield "model.norm.weight", "norm.weight", whole
    if not c.tie_embeddings:
        yield "lm_head.weight", "head.weight", rows(0, c.vocab_size)


def save_hf(state, c, folder, dtype="float32", separator=None, balance_coef=0.001, shard_bytes=5e9):
    """Write config.json and the weights, in place of those in the folder. state: a GPT's state_dict, c: its GPTConfig.

    Stops with a one-line message for a model that transformers has no counterpart of.
    """
    safetensors = import_safetensors()
    if any(name.endswith("mlp.bias") and bias.any() for name, bias in state.items()):
        fail("a model trained with balance_bias has no counterpart: there no bias takes part in the choice of experts")
    shards, size, total, kind = [[]], 0, 0, getattr(torch, dtype)
    for hf, us, view in tensor_table(c):
        n = view(state[us]).numel() * kind.itemsize
        if shards[-1] and size + n > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((hf, us, view))
        size, total = size + n, total + n
    os.makedirs(folder, exist_ok=True)
    for pattern in ("config.json", "model*.safetensors*", "tokenizer*.json"):
        for path in glob.glob(os.path.join(glob.escape(folder), pattern)):
            os.remove(path)
    where = {}
    for i, shard in enumerate(shards):  # one at a time is copied
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {hf: view(state[us]).to(kind, copy=True, memory_format=torch.contiguous_format) for hf, us, view in shard}
        try:
            safetensors.torch.save_file(tensors, os.path.join(folder, name), metadata={"format": "pt"})
        except (OSError, safetensors.SafetensorError) as e:
            fail(f"cannot write {os.path.join(folder, name)}: {e}")
        where |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        write_json(folder, "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    write_json(folder, "config.json", hf_config(c, dtype, separator, balance_coef))  # last: before it, this is no model


def write_json(folder, name, value):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)


# -------------------------------------------------------------------------------------------------------- the way back


def knobs_of(config):
    """A Hugging Face config.json (a dict) as our knobs. Raises ValueError for what this model cannot do."""
    kinds = {kind: key for key, (kind, _) in KINDS.items()}
    kind = config.get("model_type")
    if kind not in kinds:
        raise ValueError(f"model_type {kind} is none of {', '.join(kinds)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    plain = {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "hidden_act": "silu",
             "mlp_only_layers": [], "decoder_sparse_step": 1, "partial_rotary_factor": 1.0, "rope_type": "default"}
    if kind == "mixtral":
        plain["sliding_window"] = None
    found = {"norm_topk_prob": kind != "qwen3_moe", "rope_type": rope.get("type")} | rope | config
    for key, value in (plain | {"norm_topk_prob": True}).items():
        if found.get(key, value) not in (value, None):
            raise ValueError(f"{key}={found[key]} has no counterpart in this model, which has {key}={value}")
    qk_norm, moe = kinds[kind]
    n_head, ff = config["num_attention_heads"], "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"
    knobs = {
        "vocab_size": config["vocab_size"], "n_layer": config["num_hidden_layers"], "n_embd": config["hidden_size"],
        "n_head": n_head, "n_kv_head": config.get("num_key_value_heads") or n_head, "ff_dim": config[ff],
        "head_dim": config.get("head_dim") or (128 if kind == "qwen3" else config["hidden_size"] // n_head),
        "qk_norm": qk_norm, "tie_embeddings": config.get("tie_word_embeddings", False),
        "rope_theta": float(found.get("rope_theta") or (1e6 if kind == "mixtral" else 1e4)),
        "norm_eps": config.get("rms_norm_eps", 1e-5 if kind == "mixtral" else 1e-6), "n_expert": 0, "top_k": 0,
    }
    if moe:
        knobs["n_expert"] = config.get("num_experts") or config["num_local_experts"]  # transformers has written both names
        knobs["top_k"] = config["num_experts_per_tok"]
    return knobs


def load_hf(model, folder):
    """Copy the weights of a Hugging Face folder (safetensors, in one file or several) into a GPT.

    Stops with a one-line message that names the knobs to set if it has another shape, or what it cannot do.
    """
    safetensors = import_safetensors()
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            knobs = knobs_of(json.load(f))
    except (OSError, ValueError) as e:
        fail(f"cannot load {folder}: {e}")
    except KeyError as e:
        fail(f"cannot load {folder}: its config.json has no {e}")
    wrong = {key: value for key, value in knobs.items() if getattr(model.config, key) != value}
    if "vocab_size" in wrong:
        fail(f"{folder} has vocab_size {knobs['vocab_size']}, the corpus {model.config.vocab_size}: prepare the corpus "
             "with the tokenizer of that model")
    if wrong:
        fail(f"{folder} has another shape, set " + " ".join(f"--{key}={value}" for key, value in wrong.items())
             + " (now " + ", ".join(f"{getattr(model.config, key)}" for key in wrong) + ")")

    names, index = ["model.safetensors"], os.path.join(folder, "model.safetensors.index.json")
    try:
        if not os.path.isfile(os.path.join(folder, names[0])) and os.path.isfile(index):
            with open(index, encoding="utf-8") as f:
                names = sorted(set(json.load(f)["weight_map"].values()))
        files = [safetensors.safe_open(os.path.join(folder, name), framework="pt") for name in names]
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as e:
        fail(f"cannot read the weights in {folder}: {e}")
    where = {name: f for f in files for name in f.keys() if not name.endswith("rotary_emb.inv_freq")}
    table, ours = {hf: (us, view) for hf, us, view in tensor_table(model.config)}, dict(model.named_parameters())
    if model.config.tie_embeddings:
        where.pop("lm_head.weight", None)
    if unknown := where.keys() - table.keys():
        fail(f"{folder}: {min(unknown)} has no counterpart in this model")
    if missing := table.keys() - where.keys():
        fail(f"{folder} lacks {min(missing)}")
    for name, (us, view) in table.items():
        target, source = view(ours[us].detach()), where[name].get_tensor(name)
        if target.shape != source.shape:
            fail(f"{folder}: {name} is {tuple(source.shape)}, by its config.json it would be {tuple(target.shape)}")
        target.copy_(source)


# ----------------------------------------------------------------------------------------------------------- tokenizer


def byte_characters():
    """GPT-2's printable stand-in for each byte value, in which tokenizer.json spells tokens: list of 256 strings."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def merge_of(token, ranks):
    """The pair whose merge makes `token` (bytes) when byte pairs are merged by ascending rank, None if none does."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank == len(ranks):
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts) if len(parts) == 2 else None


def hf_tokenizer(tokenizer):
    """tokenizer.json (a dict) that gives the ids of a Tokenizer; None for encodings whose rules are not known here.

    One difference is wanted: the names of special tokens, such as <|endoftext|>, are read as those tokens.
    """
    characters, n = byte_characters(), tokenizer.separator
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    before = by_bytes
    if tokenizer.name == "bytes":  # NUL is the separator. It takes the place of the byte, which no text holds
        tokens, merges, special = [bytes([b]) for b in range(256)], [], {0: "<|endoftext|>"}
    elif tokenizer.name in ("gpt2", "r50k_base") or tokenizer.rank_file:
        tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        n -= tokens[n] == b"<|end_of_text|>"  # of Llama 3, whose first special token is <|begin_of_text|>
        special = {i: tokens[i].decode() for i in range(n, len(tokens))}
        ranks = {token: i for i, token in enumerate(tokens[:n])}
        merges = [" ".join("".join(characters[b] for b in part) for part in pair)
                  for token in tokens[:n] if (pair := merge_of(token, ranks))]
        before = by_bytes | {"use_regex": True}  # splits text as GPT-2 does
        if tokenizer.rank_file:
            split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
            before = {"type": "Sequence", "pretokenizers": [split, by_bytes]}
    else:
        return None
    vocab = {special.get(i) or "".join(characters[b] for b in token): i for i, token in enumerate(tokens)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": text} | flags for i, text in special.items()],
        "pre_tokenizer": before, "decoder": by_bytes,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": True, "vocab": vocab, "merges": merges},  # a token that is a word needs no merges
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="such as out/run/best.pt")
    parser.add_argument("folder", help="where the Hugging Face model goes")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--data", default="", help="the corpus, for its rank file (default: where it was in training)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in the folder")
    args = parser.parse_args(argv)
    saved = load_checkpoint(args.checkpoint)
    config, meta = model_config(saved["config"], saved["meta"]), saved["meta"]
    if os.path.exists(os.path.join(args.folder, "config.json")) and not args.overwrite:
        fail(f"{args.folder} already holds a model: choose another folder or --overwrite")
    separator, encoding = meta.get("separator"), meta.get("encoding")  # a corpus made by other means may lack them
    save_hf(saved["model"], config, args.folder, args.dtype, separator, saved["config"]["balance_coef"])
    tokenizer, reason = None, "its rules are not known here" if encoding else "the corpus names none"
    try:
        tokenizer = encoding and hf_tokenizer(get_tokenizer(encoding, folder=args.data or saved["data"]))
    except SystemExit as e:  # a rank file that is not where it was, tiktoken is not installed ...
        reason = str(e).removeprefix("error: ")
    if tokenizer:
        name = next(token["content"] for token in tokenizer["added_tokens"] if token["id"] == separator)
        write_json(args.folder, "tokenizer.json", tokenizer)
        write_json(args.folder, "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": name, "eos_token": name,
            "model_max_length": config.block_size, "clean_up_tokenization_spaces": False})
    else:
        print(f"no tokenizer is written: {reason}")
    print(f"{args.folder}: {KINDS[config.qk_norm, config.n_expert > 0][1]}, {args.dtype}")


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        fail(e)
