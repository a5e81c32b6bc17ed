"""Checkpoints to Hugging Face folders, and back as initial weights.

    python -m tools.export out/run/best.pt out/hf [--dtype=bfloat16]    for transformers, lm-eval ...
    python train.py --init_from=hf:out/hf ...

                            dense                    MoE
    without qk_norm         LlamaForCausalLM         MixtralForCausalLM
    the same, windowed      MistralForCausalLM       MixtralForCausalLM
    with qk_norm            Qwen3ForCausalLM         Qwen3MoeForCausalLM

The numbers stay what they are: nothing is permuted or rescaled, fused matrices are only cut (q|k|v, gate|up,
the stack of experts) and the vocabulary's padding is left out.
"""

import json
import os
import shutil
from dataclasses import dataclass
from typing import Literal

import torch

from model import GPT
from nanotst import UserError
from nanotst.checkpoint import all_finite, load_checkpoint, model_config
from nanotst.configurator import entry_point
from nanotst.huggingface import (
    INSTALL,
    KINDS,
    import_packages,
    model_type_of,
    one_line,
    tensor_table,
)
from nanotst.tokenizer import LLAMA3_PATTERN
from nanotst.vocabulary import tokenizer_of

LIST = "nanotst_export.json"  # names every file of an export: what may be replaced


@dataclass
class Config:
    """Usage: python -m tools.export CHECKPOINT FOLDER [--key=value ...]

    Writes a checkpoint of train.py as a Hugging Face model: configuration, weights and, where its rules are
    known, the tokenizer. The folder must be new, empty or an earlier export.
    """

    checkpoint: str  # such as out/run/best.pt
    folder: str  # where the Hugging Face model goes
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights in the files
    data: str = (
        ""  # folder of the corpus if it has moved since; only a vocabulary in a rank file needs it
    )
    overwrite: bool = False  # replace the export that is in the folder


# ----------------------------------------------------------------------------------------- config and tensors


def hf_config(c, dtype="float32", separator=None, balance_coef=0.001):
    """The config.json of a GPTConfig c, a dict. separator: id of the token between documents, if known."""
    kind = model_type_of(c)
    config = {
        "architectures": [KINDS[kind][2]],
        "model_type": kind,
        "torch_dtype": dtype,
        "vocab_size": c.vocab_size,
        "hidden_size": c.n_embd,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "intermediate_size": c.ff_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.block_size,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_dropout": 0.0,
        "rope_theta": c.rope_theta,  # where transformers before version 5 looks for it, and others still do
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "bos_token_id": separator,
        "eos_token_id": separator,
    }
    window = c.attention_window or None
    if kind == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    elif c.qk_norm:
        config |= {
            "attention_bias": False,
            "use_sliding_window": bool(window),
            "max_window_layers": 0,
        }
    if kind != "llama":
        config |= {"sliding_window": window}
    if kind == "mixtral":
        config |= {"num_local_experts": c.n_expert}
    if kind == "qwen3_moe":
        config |= {
            "num_experts": c.n_expert,
            "moe_intermediate_size": c.ff_dim,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if c.n_expert:
        config |= {
            "num_experts_per_tok": c.top_k,
            "output_router_logits": False,
            "router_aux_loss_coef": balance_coef,
        }
    return config


# ------------------------------------------------------------------------------------------------ to a folder


def save_hf(
    state, c, folder, dtype="float32", overwrite=False, extra=None, shard_bytes=5 * 10**9, **options
):
    """Write a Hugging Face model. state: a GPT's state_dict, c: its GPTConfig, extra: {file name: dict} of
    further JSON files, options: of hf_config. Raises UserError for a model that transformers has no like of,
    and for a folder that holds anything else than an earlier export."""
    safetensors, hub = import_packages()
    check_weights(state, c)
    kind, table = getattr(torch, dtype), {hf: (us, view) for hf, us, view in tensor_table(c)}
    shapes = {
        hf: torch.empty(view(state[us]).shape, dtype=kind, device="meta")
        for hf, (us, view) in table.items()
    }
    plan = hub.split_torch_state_dict_into_shards(shapes, max_shard_size=shard_bytes)
    files = dict(extra or {})
    if plan.is_sharded:
        files["model.safetensors.index.json"] = {
            "metadata": plan.metadata,
            "weight_map": plan.tensor_to_filename,
        }
    files["config.json"] = hf_config(c, dtype, **options)  # last: before it, the folder is no model
    make_room(folder, plan.metadata["total_size"], overwrite)
    try:
        write_json(folder, LIST, {"files": sorted([*plan.filename_to_tensors, *files])})
        for name, tensors in plan.filename_to_tensors.items():  # one at a time is copied
            shard = {}
            for hf in tensors:
                us, view = table[hf]
                shard[hf] = view(state[us]).to(
                    kind, copy=True, memory_format=torch.contiguous_format
                )
            safetensors.torch.save_file(
                shard, os.path.join(folder, name), metadata={"format": "pt"}
            )
        for name, value in files.items():
            write_json(folder, name, value)
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(
            f"cannot write the model in {folder}, which is unfinished now: {one_line(e)}"
        ) from None


def check_weights(state, c):
    """Raise UserError for weights that are not those of a GPTConfig c, or that no other program could use."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in GPT(c).state_dict().items()}
    for name, shape in shapes.items():
        if getattr(state.get(name), "shape", None) != shape:
            raise UserError(f"the checkpoint's {name} does not fit its configuration")
    if not all_finite(state.values()):
        raise UserError("the weights in the checkpoint are not finite; use another one")
    if any(name.endswith("mlp.bias") and bias.any() for name, bias in state.items()):
        raise UserError(
            "a model trained with balance_bias has no counterpart: there no bias helps to choose experts"
        )


def make_room(folder, n_bytes, overwrite):
    """Make the folder, or empty it of an earlier export. Whatever else is in it is a UserError and stays."""
    if folder.endswith((".safetensors", ".gguf", ".bin", ".pt", ".pth")):
        raise UserError(
            f"{folder} is named like a file of another kind, an export is a folder: choose another name"
        )
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"{folder} is a file: choose another name")
    there = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    try:
        with open(os.path.join(folder, LIST), encoding="utf-8") as f:
            ours = {LIST, *json.load(f)["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if others := sorted(there - ours):
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UserError(
            f"{folder} holds {', '.join(others[:3])}{more}, which no export wrote: choose another folder"
        )
    if there and not overwrite:
        raise UserError(f"{folder} already holds an export: choose another folder or --overwrite")
    os.makedirs(folder, exist_ok=True)
    free = shutil.disk_usage(folder).free + sum(
        os.path.getsize(os.path.join(folder, name)) for name in there
    )
    if free < n_bytes:
        raise UserError(
            f"the model takes {n_bytes / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free"
        )
    for name in sorted(
        there, key=lambda name: (name != "config.json", name == LIST)
    ):  # at once no model any more
        os.remove(os.path.join(folder, name))


def write_json(folder, name, value):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)


# -------------------------------------------------------------------------------------------------- tokenizer


def hf_tokenizer(tokenizer):
    """tokenizer.json (a dict) that gives the ids of a Tokenizer; None for one whose rules are not known here.

    One difference is wanted: the names of special tokens, such as <|endoftext|>, are read as those tokens.
    """
    if not (tokenizer.name in ("bytes", "gpt2", "r50k_base") or tokenizer.rank_file):
        return None
    try:
        from tokenizers import AddedToken
        from transformers.convert_slow_tokenizer import TikTokenConverter
    except ImportError:
        raise UserError(f"it needs: {INSTALL}") from None
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    n, pattern = tokenizer.separator, LLAMA3_PATTERN
    if (
        tokenizer.name == "bytes"
    ):  # NUL is the separator. It takes the place of the byte, which no text holds
        tokens[0], n = b"<|endoftext|>", 256
    elif not tokenizer.rank_file:
        from tiktoken_ext.openai_public import r50k_pat_str as pattern
    elif (
        tokens[n] == b"<|end_of_text|>"
    ):  # of Llama 3, whose first special token is <|begin_of_text|>
        n -= 1
    converter = TikTokenConverter({token: i for i, token in enumerate(tokens[:n])}, pattern)
    converter.load_tiktoken_bpe = lambda ranks: (
        ranks
    )  # by a path, it might get an older vocabulary from a cache
    theirs = converter.converted()
    special = tokens[n:] or tokens[:1]
    theirs.add_special_tokens(
        [AddedToken(name.decode(), normalized=False, special=True) for name in special]
    )
    text = tokenizer.decode(range(1, n))  # every token once
    if (
        theirs.get_vocab_size() != tokenizer.vocab_size
        or theirs.encode(text).ids != tokenizer.encode(text).tolist()
    ):
        return None
    return json.loads(theirs.to_str())


def tokenizer_files(path, saved, block_size, data=""):
    """({file name: dict} of a checkpoint's tokenizer, empty if there is none; lines to say about it)."""
    try:
        tokenizer = tokenizer_of(path, saved, data)
        theirs = hf_tokenizer(tokenizer)
    except (
        UserError
    ) as e:  # a rank file that is not where it was, a package that is not installed ...
        return {}, [f"no tokenizer is written: {e}"]
    if not theirs:
        return {}, [f"no tokenizer is written: the rules of {tokenizer.name} are not known here"]
    name = next(
        token["content"] for token in theirs["added_tokens"] if token["id"] == tokenizer.separator
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name,
        "eos_token": name,
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    notes = [f"the text {name} is read as the separator; none is put before a text by itself"]
    if tokenizer.name == "bytes":
        notes.append(
            "llama.cpp's converter does not know a vocabulary of bytes: no GGUF file can be made of this"
        )
    elif tokenizer.rank_file and tokenizer.vocab_size != 128256:
        notes.append(
            "llama.cpp's converter does not know this vocabulary: no GGUF file can be made of this"
        )
    return {"tokenizer.json": theirs, "tokenizer_config.json": settings}, notes


def main(config):
    c = config
    saved = load_checkpoint(c.checkpoint)
    shape, meta = model_config(saved["config"], saved["meta"]), saved["meta"]
    files, notes = tokenizer_files(c.checkpoint, saved, shape.block_size, c.data)
    options = {
        "separator": meta.get("separator"),
        "balance_coef": saved["config"].get("balance_coef"),
    }
    if shape.n_expert and type(options["balance_coef"]) is not float:
        raise UserError(f"{c.checkpoint}: its configuration has no balance_coef")
    save_hf(saved["model"], shape, c.folder, c.dtype, c.overwrite, files, **options)
    for note in notes:
        print(note)
    print(
        f"{c.folder}: {KINDS[model_type_of(shape)][2]}, {c.dtype}, texts of up to {shape.block_size} tokens"
    )


if __name__ == "__main__":
    entry_point(main, Config)
