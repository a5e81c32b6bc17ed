"""Initial weights from a Hugging Face folder, and the tables of names that tools/export.py shares.

    python train.py --init_from=hf:FOLDER ...

Weights keep their values: nothing is permuted or rescaled, and fused matrices (q|k|v, gate|up, the stack of
experts) are put together from their parts. transformers interprets config.json, so a setting that the file
leaves out has the default of transformers.
"""

import json
from itertools import groupby
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from nanotst import UserError
from nanotst.checkpoint import all_finite
from nanotst.parallel import copy_part

KINDS = "llama", "mistral", "qwen3", "mixtral", "qwen3_moe"  # model_type in config.json
NAMES = {  # our knob: its name in config.json
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "ff_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
MIXTRAL = NAMES | {"n_expert": "num_local_experts", "top_k": "num_experts_per_tok"}
QWEN3_MOE = MIXTRAL | {"n_expert": "num_experts", "ff_dim": "moe_intermediate_size"}
PLAIN = {  # settings that our model does not have, and the value that it implies
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "quantization_config": None,
}


def import_transformers():
    """The module transformers. Raises UserError if it is not installed."""
    try:
        import transformers

        return transformers
    except ImportError as e:
        todo = 'pip install "transformers>=4.57,<6"'
        raise UserError(f"Hugging Face models need transformers ({e}): {todo}") from None


def model_type_of(c):
    """The model_type of a GPTConfig."""
    if c.n_expert:
        return "qwen3_moe" if c.qk_norm else "mixtral"
    return "qwen3" if c.qk_norm else "mistral" if c.attention_window else "llama"


def config_names(kind):
    """{our knob: its name in config.json} for a model_type."""
    return {"mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE}.get(kind, NAMES)


def tensor_table(c):
    """A list of (transformers' tensor name, our name, view), grouped by our name. view(our tensor) has the
    shape of transformers' tensor and shares our memory."""

    def rows(a, b):
        return lambda t: t[a:b]

    def expert(e, a=None, b=None):
        return lambda t: t[e, :, a:b].T  # ours (in, out), transformers' (out, in)

    whole, F, V = rows(None, None), c.ff_dim, c.vocab_size
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    layer = [
        ("input_layernorm.weight", "attn_norm.weight", whole),
        ("self_attn.q_proj.weight", "attn.qkv.weight", rows(0, q)),
        ("self_attn.k_proj.weight", "attn.qkv.weight", rows(q, q + kv)),
        ("self_attn.v_proj.weight", "attn.qkv.weight", rows(q + kv, None)),
        ("self_attn.o_proj.weight", "attn.out.weight", whole),
        ("post_attention_layernorm.weight", "mlp_norm.weight", whole),
    ]
    for norm in ("q_norm", "k_norm") if c.qk_norm else ():
        layer.append((f"self_attn.{norm}.weight", f"attn.{norm}.weight", whole))
    if c.n_expert:
        moe = "mlp" if c.qk_norm else "block_sparse_moe"
        names = ("gate_proj", "up_proj", "down_proj") if c.qk_norm else ("w1", "w3", "w2")
        gate, up, down = (f"{moe}.experts.{{}}.{name}.weight" for name in names)
        layer.append((f"{moe}.gate.weight", "mlp.router.weight", whole))
        for e in range(c.n_expert):
            layer.append((gate.format(e), "mlp.gate_up", expert(e, 0, F)))
            layer.append((up.format(e), "mlp.gate_up", expert(e, F, None)))
        layer += [(down.format(e), "mlp.down", expert(e)) for e in range(c.n_expert)]
    else:
        layer.append(("mlp.gate_proj.weight", "mlp.gate_up.weight", rows(0, F)))
        layer.append(("mlp.up_proj.weight", "mlp.gate_up.weight", rows(F, None)))
        layer.append(("mlp.down_proj.weight", "mlp.down.weight", whole))
    table = [("model.embed_tokens.weight", "embed.weight", rows(0, V))]
    for i in range(c.n_layer):
        table += [(f"model.layers.{i}.{hf}", f"blocks.{i}.{us}", view) for hf, us, view in layer]
    table.append(("model.norm.weight", "norm.weight", whole))
    return table + [("lm_head.weight", "head.weight", rows(0, V))] * (not c.tie_embeddings)


def load_hf(model, folder, say=print):
    """Copy the weights of a Hugging Face folder (safetensors, one file or several) into a GPT.

    Rows of the embedding without a token are left out; `say` prints that. Raises UserError if the shapes
    differ (it names the knobs to set), the folder contradicts itself, or its model does what ours does not.
    """
    transformers = import_transformers()
    from safetensors import SafetensorError

    try:
        check_config(model.config, Path(folder), transformers, say)
        fill(model, Path(folder), say)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as e:
        raise UserError(f"cannot load {folder}: {' '.join(str(e).split())[:300]}") from None


def check_config(c, folder, transformers, say):
    """Raise ValueError unless a GPTConfig computes what the folder's config.json describes."""
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = written.get("model_type")
    if kind not in KINDS:
        raise ValueError(f"its model_type {kind} is none of {', '.join(KINDS)}")
    try:
        config = transformers.AutoConfig.for_model(**written)
    except Exception as e:  # of many classes
        raise ValueError(f"transformers refuses its config.json: {e!r}") from None
    scaling = getattr(config, "rope_parameters", None) or config.rope_scaling or {}
    rope = dict(scaling)
    theta = rope.pop("rope_theta", getattr(config, "rope_theta", None))
    if written.get("rope_parameters") and written.get("rope_scaling"):
        raise ValueError("it has rope_parameters and rope_scaling; remove the wrong one")
    if written.get("rope_theta", theta) != theta:
        raise ValueError(f"its rope_theta is both {written['rope_theta']} and {theta}")
    if rope.pop("rope_type", rope.pop("type", "default")) != "default" or any(rope.values()):
        raise ValueError(f"this model cannot scale rotary positions as in {scaling}")
    for key, value in PLAIN.items():
        if getattr(config, key, value) not in (value, None):
            raise ValueError(f"it has {key}={getattr(config, key)}, this model {key}={value}")
    window = getattr(config, "use_sliding_window", kind != "llama") and config.sliding_window
    usual = "sliding_attention" if window else "full_attention"
    if set(getattr(config, "layer_types", None) or [usual]) != {usual}:
        raise ValueError("its sliding_window holds for some layers only; here all layers share one")
    knobs = {ours: getattr(config, name) for ours, name in config_names(kind).items()}
    knobs = {"n_expert": 0, "top_k": 0} | knobs
    knobs |= {"qk_norm": "qwen3" in kind, "rope_theta": theta, "attention_window": window or 0}
    rows = knobs.pop("vocab_size")
    if wrong := [key for key, value in knobs.items() if getattr(c, key) != value]:
        todo = " ".join(f"--{key}={knobs[key]}" for key in wrong)
        now = ", ".join(str(getattr(c, key)) for key in wrong)
        raise ValueError(f"it has another shape; set {todo} (now {now})")
    if rows != c.vocab_size:  # the rest of a larger embedding may be padding
        n = len(transformers.AutoTokenizer.from_pretrained(folder))
        if not n <= c.vocab_size < rows:
            what = f"its vocab_size is {rows} and its tokenizer has {n} tokens"
            raise ValueError(f"{what}, the corpus {c.vocab_size}: prepare it with that tokenizer")
        say(f"{folder}: left out rows {c.vocab_size} to {rows - 1} of the embedding, padding")


def fill(model, folder, say):
    """Copy a folder's weights into a GPT, sharded or not. Raises ValueError for weights that do not fit."""
    from safetensors import safe_open

    table, ours = tensor_table(model.config), dict(model.named_parameters())
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if one.exists() or not index.exists():
        file = safe_open(one, "pt")
        files = dict.fromkeys(file.keys(), file)
    else:  # the index decides where a tensor is
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        opened = {name: safe_open(folder / name, "pt") for name in set(files.values())}
        files = {name: opened[file] for name, file in files.items()}

    def read(name):
        return files[name].get_tensor(name)

    heads = "lm_head.weight", "model.embed_tokens.weight"
    if model.config.tie_embeddings and heads[0] in files:
        if not torch.equal(*map(read, heads)):
            raise ValueError("it ties its embeddings, but its lm_head.weight is another matrix")
        del files[heads[0]]
    names = {name for name, _, _ in table}
    if wrong := names ^ {name for name in files if "rotary_emb" not in name}:
        there = "lacks" if wrong & names else "has a tensor unknown to this model,"
        raise ValueError(f"it {there} {min(wrong & names or wrong)}")
    for us, parts in groupby(table, key=lambda row: row[1]):
        p = ours.pop(us)
        # a sharded parameter is whole in memory while it is filled
        whole = torch.zeros(p.shape) if isinstance(p, DTensor) else p.detach()
        for name, _, view in parts:
            target, source = view(whole), read(name)
            source = source[: len(target)] if name in heads else source  # without the padding
            if source.shape != target.shape:
                shapes = f"{tuple(source.shape)}, its config.json implies {tuple(target.shape)}"
                raise ValueError(f"its {name} is {shapes}")
            if not source.is_floating_point() or source.itemsize < 2 or not all_finite([source]):
                raise ValueError(f"its {name} is quantized ({source.dtype}) or not finite")
            target.copy_(source)
        if isinstance(p, DTensor):
            copy_part(p, whole)
    for name in ours:  # added by a fork
        say(f"{folder} has no {name}, which keeps its initial values")
