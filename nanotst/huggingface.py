"""Hugging Face folders as initial weights: what they hold, and under which names.

    python train.py --init_from=hf:FOLDER ...

tools/export.py goes the other way, by the same table of tensors.

The numbers stay what they are: nothing is permuted or rescaled, fused matrices are only cut (q|k|v, gate|up,
the stack of experts). Needs safetensors, which transformers brings along.
"""

import json
import os

import torch
from torch.distributed.tensor import DTensor

from nanotst import UserError
from nanotst.checkpoint import all_finite
from nanotst.parallel import copy_part

KINDS = {  # model_type: qk_norm, MoE?, class
    "llama": (False, False, "LlamaForCausalLM"),
    "mistral": (False, False, "MistralForCausalLM"),
    "qwen3": (True, False, "Qwen3ForCausalLM"),
    "mixtral": (False, True, "MixtralForCausalLM"),
    "qwen3_moe": (True, True, "Qwen3MoeForCausalLM"),
}
INSTALL = 'pip install "transformers>=4.57,<6"'


def import_packages():
    """safetensors' save and load, and huggingface_hub, both of which transformers needs, too."""
    try:
        import huggingface_hub
        import safetensors.torch
    except ImportError:
        raise UserError(f"Hugging Face folders need: {INSTALL}") from None
    return safetensors, huggingface_hub


def model_type_of(c):
    """The model_type of a GPTConfig."""
    if c.attention_window and not c.qk_norm and not c.n_expert:
        return "mistral"
    return next(kind for kind, (*key, _) in KINDS.items() if key == [c.qk_norm, c.n_expert > 0])


def tensor_table(c):
    """Yield (Hugging Face's name, our name, view) of each of their tensors. view(our tensor) has the shape of
    theirs and shares our memory, so this one table serves both directions."""

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


def load_hf(model, folder, say=print):
    """Copy the weights of a Hugging Face folder (safetensors, in one file or several) into a GPT.

    Raises UserError, which names the knobs to set if it has another shape, or what it cannot do. An embedding
    padded beyond the tokenizer's ids is cut to the corpus's vocabulary; `say` is called with a line about it.
    """
    try:
        knobs = knobs_of(read_json(folder, "config.json"))
    except ValueError as e:
        raise UserError(f"cannot load {folder}: {one_line(e)}") from None
    c = model.config
    wrong = {key: value for key, value in knobs.items() if getattr(c, key) != value}
    rows = wrong.pop("vocab_size", c.vocab_size)
    if rows != c.vocab_size:
        check_padding(folder, rows, c.vocab_size)
        say(
            f"{folder}: rows {c.vocab_size} to {rows - 1} of the embedding and head, padding, are left out"
        )
    if wrong:
        raise UserError(
            f"{folder} has another shape, set "
            + " ".join(f"--{key}={value}" for key, value in wrong.items())
            + " (now "
            + ", ".join(f"{getattr(c, key)}" for key in wrong)
            + ")"
        )
    where = open_weights(folder)
    table, ours = (
        {hf: (us, view) for hf, us, view in tensor_table(c)},
        dict(model.named_parameters()),
    )
    if c.tie_embeddings:
        where.pop("lm_head.weight", None)
    if unknown := where.keys() - table.keys():
        raise UserError(f"{folder}: {min(unknown)} has no counterpart in this model")
    if missing := table.keys() - where.keys():
        raise UserError(f"{folder} lacks {min(missing)}")
    names = {}  # those of theirs that make up one of ours
    for name, (us, _) in table.items():
        names.setdefault(us, []).append(name)
    for us, p in ours.items():
        whole = (
            torch.zeros(p.shape) if isinstance(p, DTensor) else p.detach()
        )  # a sharded one, one at a time
        for name in names[us]:
            copy_tensor(table[name][1](whole), name, where[name], folder, rows)
        if isinstance(p, DTensor):
            copy_part(p, whole)


def copy_tensor(target, name, file, folder, rows):
    """Copy a tensor of the folder into one of ours. rows: of its embedding."""
    source = file.get_tensor(name)
    shape = tuple(target.shape)
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        shape = rows, shape[1]
    if tuple(source.shape) != shape:
        raise UserError(
            f"{folder}: {name} is {tuple(source.shape)}, by its config.json it would be {shape}"
        )
    if source.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UserError(f"{folder}: {name} is {source.dtype}; quantized weights are not read")
    if not all_finite([source]):
        raise UserError(f"{folder}: {name} holds values that are not finite")
    target.copy_(source[: len(target)])


def knobs_of(config):
    """A Hugging Face config.json as our knobs, a dict. Raises ValueError for what this model cannot do. What
    it does not say is not guessed, but for what configurations of the first Llamas leave out."""
    if not isinstance(config, dict):
        raise ValueError("its config.json holds no {...}")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"model_type {str(kind):.40} is none of {', '.join(KINDS)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"its rope_parameters are {rope!r:.40}")
    if rope.get("rope_theta", config.get("rope_theta")) != config.get(
        "rope_theta", rope.get("rope_theta")
    ):
        raise ValueError(
            f"its rope_theta is both {config['rope_theta']!r:.40} and {rope['rope_theta']!r:.40}"
        )
    plain = {
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "partial_rotary_factor": 1.0,
        "rope_type": "default",
        "norm_topk_prob": True,
        "quantization_config": None,
    }
    found = {"norm_topk_prob": kind != "qwen3_moe", "rope_type": rope.get("type")} | rope | config
    for key, value in plain.items():
        if found.get(key, value) not in (value, None):
            raise ValueError(
                f"{key}={str(found[key]):.40} has no counterpart in this model, which has {key}={value}"
            )
    qk_norm, moe, _ = KINDS[kind]
    first = kind == "llama"
    n_embd, n_head = number(config, "hidden_size"), number(config, "num_attention_heads")
    if type(tie := config.get("tie_word_embeddings", False)) is not bool:
        raise ValueError(f"its tie_word_embeddings is {str(tie):.40}")
    return {
        "vocab_size": number(config, "vocab_size"),
        "n_layer": number(config, "num_hidden_layers"),
        "n_embd": n_embd,
        "n_head": n_head,
        "n_kv_head": number(config, "num_key_value_heads", default=n_head if first else None),
        "ff_dim": number(
            config, "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"
        ),
        "head_dim": number(config, "head_dim", default=None if qk_norm else n_embd // n_head),
        "attention_window": window_of(config, kind),
        "qk_norm": qk_norm,
        "tie_embeddings": tie,
        "rope_theta": number(found, "rope_theta", kind=float, default=1e4 if first else None),
        "norm_eps": number(config, "rms_norm_eps", kind=float, default=1e-6 if first else None),
        # transformers has written both names
        "n_expert": number(config, "num_experts", "num_local_experts") if moe else 0,
        "top_k": number(config, "num_experts_per_tok") if moe else 0,
    }


def window_of(config, kind):
    """The attention window of a config.json, 0 for none. Raises ValueError unless all layers have it."""
    switch = (
        config.get("use_sliding_window", False) if kind.startswith("qwen3") else kind != "llama"
    )
    if type(switch) is not bool:
        raise ValueError(f"its use_sliding_window is {str(switch):.40}")
    if switch and kind != "mixtral" and "sliding_window" not in config:
        raise ValueError("its config.json has no sliding_window")
    if not switch or config.get("sliding_window") is None:
        return 0
    layers = config.get("layer_types") or []
    some = isinstance(layers, list) and "full_attention" in layers
    if some or kind == "qwen3" and config.get("max_window_layers") != 0:
        raise ValueError(
            "by its layer_types or max_window_layers some layers only have its sliding_window, here all do"
        )
    return number(config, "sliding_window")


def number(config, *keys, kind=int, default=None):
    """The first of the keys that a config.json holds, a positive number; ValueError if there is none."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if type(value) not in (int, kind) or not 0 < value < 2**63:
            raise ValueError(f"its {key} is {value!r:.40}, not a positive {kind.__name__}")
        return kind(value)
    if default is None:
        raise ValueError(f"its config.json has no {keys[0]}")
    return default


def open_weights(folder):
    """{tensor name: the open safetensors file that holds it}."""
    safetensors, _ = import_packages()
    names, index = ["model.safetensors"], "model.safetensors.index.json"
    try:
        if not os.path.exists(os.path.join(folder, names[0])) and os.path.exists(
            os.path.join(folder, index)
        ):
            names = sorted(set(read_json(folder, index)["weight_map"].values()))
        files = [
            safetensors.safe_open(os.path.join(folder, name), framework="pt") for name in names
        ]
        where = {name: f for f in files for name in f.keys()}  # noqa: SIM118, it is no dict
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        safetensors.SafetensorError,
    ) as e:
        raise UserError(f"cannot read the weights in {folder}: {one_line(e)}") from None
    return {name: f for name, f in where.items() if not name.endswith("rotary_emb.inv_freq")}


def check_padding(folder, theirs, ours):
    """Raise UserError unless rows ours..theirs-1 of a folder's embedding are padding: ids of no token of its
    tokenizer or, if it has none, a filling up of fewer than 1,024 rows to a multiple of 64."""
    todo = "prepare the corpus with the tokenizer of that model"
    differ = f"{folder} has vocab_size {theirs}, the corpus {ours}"
    if theirs < ours:
        raise UserError(f"{differ}: {todo}")
    if not os.path.exists(os.path.join(folder, "tokenizer.json")):
        if theirs % 64 or theirs - ours >= 1024:
            raise UserError(f"{differ}: {todo}")
        return
    try:
        tokenizer = read_json(folder, "tokenizer.json")
        vocab = tokenizer["model"]["vocab"]
        ids = list(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))
        n = max(ids + [token["id"] for token in tokenizer.get("added_tokens") or []]) + 1
        fits = n <= ours
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{differ}, and its tokenizer.json is damaged: {one_line(e)}") from None
    if not fits:
        raise UserError(f"{differ} and its tokenizer {n} tokens: {todo}")


def read_json(folder, name):
    """The value of a JSON file. Raises ValueError for one that is not there or damaged."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{name}: {getattr(e, 'strerror', None) or e}") from None


def one_line(error):
    return " ".join(str(error).split())[:200]
