"""Checkpoints as Hugging Face folders, for transformers, vLLM, lm-eval and others.

    python -m tools.export out/run/best.pt out/hf [--dtype=bfloat16]
    python train.py --init_from=hf:out/hf ...        # the way back

A dense model becomes a Llama, or a Mistral with attention_window; a mixture of experts becomes a Mixtral.
With qk_norm they become Qwen3 and Qwen3-MoE. Weights are cut (q|k|v, gate|up), never permuted or rescaled.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nanotst import UserError
from nanotst.checkpoint import load_model
from nanotst.configurator import entry_point
from nanotst.huggingface import KINDS, import_transformers, model_type_of, tensor_table
from nanotst.tokenizer import LLAMA3_PATTERN
from nanotst.vocabulary import tokenizer_of

FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
TOLERANCE = 1e-4  # largest difference of logits, relative to the largest logit


@dataclass
class Config:
    """Usage: python -m tools.export CHECKPOINT FOLDER [--key=value ...]

    Writes configuration, weights and, for bytes, gpt2 and rank files, the tokenizer. The folder appears only
    if transformers computes the same logits from it; this takes 8 bytes of memory for each parameter.
    """

    checkpoint: str  # such as out/run/best.pt
    folder: str  # new folder for the Hugging Face model
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the exported weights
    data: str = ""  # folder of the corpus if it has moved; needed for the vocabulary of a rank file
    overwrite: bool = False  # replace an earlier export


@torch.no_grad()
def save_hf(
    model, folder, dtype="float32", overwrite=False, files=(), separator=None, balance_coef=0.0
):
    """Write a GPT as a Hugging Face folder, rounding the model's weights to dtype. files: {name: dict} of
    JSON files; separator: id of the token between documents; balance_coef: weight of the balance loss. Raises
    UserError, and changes nothing, if transformers computes other logits than the model or if the folder
    holds anything but an earlier export."""
    from safetensors.torch import save_file

    folder, c, tensors = Path(folder).resolve(), model.config, {}
    if c.balance_bias:
        raise UserError("transformers has no model with the router bias of balance_bias")
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if there - FILES or there and not overwrite:
        what = f"{folder} holds {min(there - FILES or there)}; choose another folder"
        raise UserError(f"{what}, or --overwrite one that holds an earlier export alone")
    for p in model.parameters():
        p.copy_(p.to(getattr(torch, dtype)))
    for ours, (names, views) in tensor_table(model).items():
        for name, view in zip(names, views(model.get_parameter(ours))):
            tensors[name] = view.to(getattr(torch, dtype), copy=True).contiguous()
    kind = model_type_of(c)
    architecture, names = KINDS[kind]
    config = {name: getattr(c, knob) for knob, name in names.items()}
    config |= {
        "model_type": kind,
        "architectures": [architecture],
        "torch_dtype": dtype,
        "max_position_embeddings": c.block_size,
        "bos_token_id": separator,
        "eos_token_id": separator,
        "rope_theta": c.rope_theta,  # read by transformers before version 5
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "sliding_window": c.attention_window or None,
    }
    if c.qk_norm:
        config |= {"use_sliding_window": c.attention_window > 0, "max_window_layers": 0}
    if c.n_expert:
        config |= {"norm_topk_prob": True, "router_aux_loss_coef": balance_coef}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        del tensors
        for name, value in {"config.json": config, **dict(files)}.items():
            (new / name).write_text(json.dumps(value, indent=1, ensure_ascii=False), "utf-8")
        compare(model, new)
        if folder.exists():
            folder.rename(Path(temporary, "old"))
        new.rename(folder)


def compare(model, folder):
    """Raise UserError unless transformers computes the model's logits from a folder, in float32 on random
    tokens. With experts the best of three rows counts, since rounding may choose other ones."""
    c, auto = model.config, import_transformers().AutoModelForCausalLM
    theirs = auto.from_pretrained(folder, dtype=torch.float32)
    short = min(c.block_size, max(64, 2 * c.attention_window))
    shape = (3, short) if c.n_expert else (1, c.block_size)
    tokens = torch.randint(c.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    ours = model.eval()(tokens)  # (rows, L, V)
    difference = (ours - theirs(tokens, use_cache=False).logits).abs().amax((1, 2)).min()
    if not difference <= TOLERANCE * (largest := ours.abs().max()):
        what = f"logits up to {largest:.3g} differ by {difference:.3g}. Nothing was exported"
        raise UserError(f"{type(theirs).__name__} does not compute the same as this model: {what}")


def tokenizer_files(tokenizer, block_size):
    """{file name: dict} with which transformers gives the ids of a Tokenizer. One difference is intended: the
    names of special tokens, such as <|endoftext|>, are read as those tokens. Raises UserError for other
    vocabularies than bytes, GPT-2 and rank files."""
    import tokenizers as hf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    n, pattern = tokenizer.separator, LLAMA3_PATTERN
    if tokenizer.name == "bytes":  # the separator takes the place of NUL, which no text holds
        tokens[0], n = b"<|endoftext|>", 256
    elif tokenizer.name in ("gpt2", "r50k_base"):
        from tiktoken_ext.openai_public import r50k_pat_str as pattern
    elif not tokenizer.rank_file:
        raise UserError(f"the rules of {tokenizer.name} are not known here")
    elif tokens[n] == b"<|end_of_text|>":  # Llama 3, where <|begin_of_text|> is before it
        n -= 1
    letters = bytes_to_unicode()  # GPT-2's printable letter for each byte
    vocab = {"".join(letters[b] for b in token): i for i, token in enumerate(tokens[:n])}
    merges = [(token[:i], token[i:]) for token in vocab for i in range(1, len(token))]
    merges = [pair for pair in merges if vocab.keys() >= {*pair}]  # by the rank of the whole
    theirs = hf.Tokenizer(hf.models.BPE(vocab, merges, ignore_merges=True))
    pieces = hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated")
    to_letters = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = hf.pre_tokenizers.Sequence([pieces, to_letters])
    theirs.decoder = hf.decoders.ByteLevel()
    special = [token.decode() for token in tokens[n:] or tokens[:1]]
    theirs.add_special_tokens([hf.AddedToken(t, normalized=False, special=True) for t in special])
    text = tokenizer.decode(range(1, n))  # every token once
    if theirs.encode(text).ids != tokenizer.encode(text).tolist():
        raise UserError(f"transformers splits text differently from {tokenizer.name}")
    name = tokens[tokenizer.separator].decode()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": name, "eos_token": name}
    settings |= {"model_max_length": block_size, "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": json.loads(theirs.to_str()), "tokenizer_config.json": settings}


def main(c):
    import_transformers().utils.logging.disable_progress_bar()
    model, saved = load_model(c.checkpoint)
    files, length = {}, model.config.block_size
    try:
        files = tokenizer_files(tokenizer_of(c.checkpoint, saved, c.data), length)
    except UserError as e:  # such as a rank file that has moved
        print(f"exported without a tokenizer: {e}")
    separator, coef = saved["meta"].get("separator"), saved["config"].get("balance_coef", 0.0)
    save_hf(model, c.folder, c.dtype, c.overwrite, files, separator=separator, balance_coef=coef)
    print(f"{c.folder}: {model_type_of(model.config)}, {c.dtype}, texts of up to {length} tokens")


if __name__ == "__main__":
    entry_point(main, Config)
