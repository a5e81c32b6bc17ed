"""Initial weights from a Hugging Face folder, and the tables of names that tools/export.py shares.

    python train.py --init_from=hf:FOLDER ...

transformers interprets config.json, so a setting that the file leaves out has the default of transformers.
"""

import json
from pathlib import Path

import torch

from nanotst import UserError
from nanotst.checkpoint import all_finite
from nanotst.parallel import copy_part

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
KINDS = {  # model_type in config.json: (class in transformers, names of our knobs)
    "llama": ("LlamaForCausalLM", NAMES),
    "mistral": ("MistralForCausalLM", NAMES),
    "qwen3": ("Qwen3ForCausalLM", NAMES),
    "mixtral": ("MixtralForCausalLM", MIXTRAL),
    "qwen3_moe": ("Qwen3MoeForCausalLM", QWEN3_MOE),
}


def import_transformers():
    """The module transformers. Raises UserError if it is not installed."""
    try:
        import transformers
    except ImportError as e:
        raise UserError(f'{e}: pip install "transformers>=4.57,<6"') from None
    return transformers


def model_type_of(c):
    """The model_type of a GPTConfig."""
    if c.n_expert:
        return "qwen3_moe" if c.qk_norm else "mixtral"
    return "qwen3" if c.qk_norm else "mistral" if c.attention_window else "llama"


def tensor_table(model):
    """{our tensor: (names of its parts in transformers, a function that cuts it into them)}."""
    c = model.config
    mixtral = model_type_of(c) == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    mlp, end = "block_sparse_moe" if mixtral else "mlp", "" if c.n_expert else ".weight"
    mlps = [f"{mlp}.experts.{e}" for e in range(c.n_expert)] or [mlp]
    heads = [c.n_head * c.head_dim] + 2 * [c.n_kv_head * c.head_dim]
    whole, three = lambda t: [t], lambda t: t.split(heads)
    rows = lambda t: [t[: c.vocab_size]]  # without the padding
    matrices = lambda t: t.mT if c.n_expert else [t]  # ours (expert, in, out), theirs (out, in)
    halves = lambda t: [half for matrix in matrices(t) for half in matrix.chunk(2)]
    layer = {
        "attn_norm.weight": (["input_layernorm.weight"], whole),
        "attn.qkv.weight": ([f"self_attn.{x}_proj.weight" for x in "qkv"], three),
        "attn.q_norm.weight": (["self_attn.q_norm.weight"], whole),
        "attn.k_norm.weight": (["self_attn.k_norm.weight"], whole),
        "attn.out.weight": (["self_attn.o_proj.weight"], whole),
        "mlp_norm.weight": (["post_attention_layernorm.weight"], whole),
        "mlp.router.weight": ([f"{mlp}.gate.weight"], whole),
        f"mlp.gate_up{end}": ([f"{m}.{half}.weight" for m in mlps for half in (gate, up)], halves),
        f"mlp.down{end}": ([f"{m}.{down}.weight" for m in mlps], matrices),
    }
    table = {
        "embed.weight": (["model.embed_tokens.weight"], rows),
        "norm.weight": (["model.norm.weight"], whole),
        "head.weight": (["lm_head.weight"], rows),
    }
    for i in range(c.n_layer):
        for ours, (theirs, views) in layer.items():
            table[f"blocks.{i}.{ours}"] = [f"model.layers.{i}.{name}" for name in theirs], views
    return {ours: table[ours] for ours, _ in model.named_parameters() if ours in table}


def load_hf(model, folder, say=print):
    """Copy the weights of a Hugging Face folder (safetensors) into a GPT; `say` prints what is left out.
    Raises UserError if the folder's model is another or contradicts itself."""
    transformers = import_transformers()
    try:
        check_config(model.config, Path(folder), transformers, say)
        fill(model, Path(folder), say)
    except Exception as e:  # a damaged folder raises errors of many classes
        raise UserError(f"cannot load {folder}: {' '.join(str(e).split())[:300]}") from e


def check_config(c, folder, transformers, say):
    """Raise ValueError unless a GPTConfig computes what the folder's config.json describes."""
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = written.get("model_type")
    if kind not in KINDS:
        raise ValueError(f"its model_type {kind} is none of {', '.join(KINDS)}")
    config = transformers.AutoConfig.for_model(**written)
    rope = dict(getattr(config, "rope_parameters", None) or config.rope_scaling or {})
    theta = rope.pop("rope_theta", getattr(config, "rope_theta", None))
    scaled = rope.pop("rope_type", rope.pop("type", "default")) != "default" or any(rope.values())
    twice = written.get("rope_parameters") and written.get("rope_scaling")
    if scaled or twice or written.get("rope_theta", theta) != theta:
        found = {key: value for key, value in written.items() if key.startswith("rope_")}
        raise ValueError(f"only one rope_theta without scaling works, its config.json has {found}")
    window = getattr(config, "use_sliding_window", kind != "llama") and config.sliding_window
    layers = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    needed = {"hidden_act": "silu", "norm_topk_prob": True, "layer_types": layers}
    for key, value in needed.items():
        if (found := getattr(config, key, None)) not in (value, None):
            raise ValueError(f"it has {key}={found}, this model {key}={value}")
    knobs = {"n_expert": 0, "top_k": 0, "rope_theta": theta, "attention_window": window or 0}
    knobs |= {ours: getattr(config, name) for ours, name in KINDS[kind][1].items()}
    knobs["qk_norm"] = "qwen3" in kind
    rows = knobs.pop("vocab_size")
    if wrong := [key for key, value in knobs.items() if getattr(c, key) != value]:
        todo = " ".join(f"--{key}={knobs[key]}" for key in wrong)
        now = ", ".join(str(getattr(c, key)) for key in wrong)
        raise ValueError(f"it has another shape; set {todo} (now {now})")
    if rows != c.vocab_size:  # the rest of a larger embedding may be padding
        n = len(transformers.AutoTokenizer.from_pretrained(folder))
        if not n <= c.vocab_size < rows:
            sizes = f"vocab_size is {rows}, its tokenizer has {n} tokens, the corpus {c.vocab_size}"
            raise ValueError(f"its {sizes}: prepare the corpus with that tokenizer")
        say(f"{folder}: left out rows {c.vocab_size} to {rows - 1} of the embedding, padding")


@torch.no_grad()
def fill(model, folder, say):
    """Copy a folder's weights into a GPT, sharded or not. Raises ValueError for weights that do not fit."""
    from safetensors import safe_open

    one, index = "model.safetensors", folder / "model.safetensors.index.json"
    if index.exists() and not (folder / one).exists():  # the index decides where a tensor is
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    else:
        files = dict.fromkeys(safe_open(folder / one, "pt").keys(), one)
    opened = {file: safe_open(folder / file, "pt") for file in set(files.values())}
    read = lambda name: opened[files[name]].get_tensor(name)
    heads = "lm_head.weight", "model.embed_tokens.weight"
    if model.config.tie_embeddings and heads[0] in files:
        if not torch.equal(*map(read, heads)):
            raise ValueError("it ties its embeddings, but its lm_head.weight is another matrix")
        del files[heads[0]]
    table = tensor_table(model)
    expected = {name for names, _ in table.values() for name in names}
    if wrong := expected ^ {name for name in files if "rotary_emb" not in name}:
        there = "lacks" if wrong & expected else "has a tensor unknown to this model,"
        raise ValueError(f"it {there} {min(wrong & expected or wrong)}")
    for ours, p in model.named_parameters():
        if ours not in table:
            say(f"{folder} has no {ours}, which keeps its initial values")
            continue
        whole = torch.zeros(p.shape)  # p may be sharded
        names, views = table[ours]
        for name, target in zip(names, views(whole)):
            source = read(name)
            source = source[: len(target)] if name in heads else source  # without the padding
            exact = source.is_floating_point() and source.itemsize > 1 and all_finite([source])
            if source.shape != target.shape or not exact:
                found = f"its {name} is {source.dtype} {tuple(source.shape)}"
                raise ValueError(f"{found}; needed are finite floats {tuple(target.shape)}")
            target.copy_(source)
        copy_part(p, whole)
