"""Checkpoints as Hugging Face folders, for transformers, vLLM, lm-eval and others.

    python -m tools.export out/run/best.pt out/hf [--dtype=bfloat16]
    python train.py --init_from=hf:out/hf ...                             the way back

                            dense                    mixture of experts
    without qk_norm         LlamaForCausalLM         MixtralForCausalLM
    the same, windowed      MistralForCausalLM       MixtralForCausalLM
    with qk_norm            Qwen3ForCausalLM         Qwen3MoeForCausalLM

Weights keep their values: nothing is permuted or rescaled, fused matrices are cut (q|k|v, gate|up, the stack
of experts), and the padding of the vocabulary is left out.
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for python tools/export.py

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for python tools/export.py
from nanotst import UserError
from nanotst.checkpoint import load_model
from nanotst.configurator import entry_point
from nanotst.huggingface import config_names, import_transformers, model_type_of, tensor_table
from nanotst.tokenizer import LLAMA3_PATTERN
from nanotst.vocabulary import tokenizer_of

FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
TOLERANCE = 1e-4  # largest difference of logits, relative to the largest logit


@dataclass
class Config:
    """Usage: python -m tools.export CHECKPOINT FOLDER [--key=value ...]

    Writes a checkpoint of train.py as a Hugging Face model: configuration, weights and, for bytes, gpt2 and
    rank files, the tokenizer. The folder appears only if transformers computes the same logits from it. That
    check holds the model twice in float32: 8 bytes of memory for each parameter.
    """

    checkpoint: str  # such as out/run/best.pt
    folder: str  # new folder for the Hugging Face model
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the exported weights
    data: str = ""  # folder of the corpus if it has moved; needed for the vocabulary of a rank file
    overwrite: bool = False  # replace an earlier export


def hf_config(c, dtype="float32", separator=None, balance_coef=0.0):
    """The config.json of a GPTConfig, a dict. separator: id of the token between documents, balance_coef:
    weight of the experts' balance loss."""
    kind, transformers = model_type_of(c), import_transformers()
    settings = {name: getattr(c, knob) for knob, name in config_names(kind).items()}
    settings |= {
        "max_position_embeddings": c.block_size,
        "bos_token_id": separator,
        "eos_token_id": separator,
        "rope_theta": c.rope_theta,  # read by transformers before version 5
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "sliding_window": c.attention_window or None,
    }
    if c.qk_norm:
        settings |= {"use_sliding_window": c.attention_window > 0, "max_window_layers": 0}
    if c.n_expert:
        settings |= {"norm_topk_prob": True, "router_aux_loss_coef": balance_coef}
    config = transformers.AutoConfig.for_model(kind, **settings)
    auto = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    settings |= {"architectures": [auto[kind]], "torch_dtype": dtype}
    return config.to_diff_dict() | settings


@torch.no_grad()
def save_hf(model, folder, dtype="float32", overwrite=False, files=(), **options):
    """Write a GPT as a Hugging Face folder, rounding the model's weights to dtype. files: {file name: dict}
    of further JSON files; options: see hf_config. Raises UserError, and leaves what was there as it was, if
    transformers computes other logits than the model or if the folder holds anything but an earlier export.
    """
    from safetensors.torch import save_file

    folder, dtype = os.path.realpath(folder), getattr(torch, dtype)
    there = os.listdir(folder) if os.path.exists(folder) else []
    if others := sorted(set(there) - FILES):
        raise UserError(f"{folder} holds {others[0]}, which no export wrote; choose another folder")
    if there and not overwrite:
        raise UserError(f"{folder} holds an earlier export; choose another folder or --overwrite")
    for p in model.parameters():
        p.copy_(p.to(dtype))
    parent, state, table = os.path.dirname(folder), model.state_dict(), tensor_table(model.config)
    if missing := {us for _, us, _ in table} - state.keys():
        raise UserError(
            f"this model has no {min(missing)}, which {model_type_of(model.config)} needs"
        )
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as temporary:
        new = os.path.join(temporary, "new")
        os.mkdir(new)
        tensors = {name: view(state[us]) for name, us, view in table}
        tensors = {name: t.to(dtype, copy=True).contiguous() for name, t in tensors.items()}
        save_file(tensors, os.path.join(new, "model.safetensors"), metadata={"format": "pt"})
        del tensors
        config = hf_config(model.config, str(dtype)[6:], **options)
        for name, value in {"config.json": config, **dict(files)}.items():
            with open(os.path.join(new, name), "w", encoding="utf-8") as f:
                json.dump(value, f, indent=1, ensure_ascii=False)
        compare(model, new)
        if os.path.exists(folder):
            os.rename(folder, os.path.join(temporary, "old"))
        os.rename(new, folder)


@torch.no_grad()
def compare(model, folder):
    """Raise UserError unless transformers computes the model's logits from a folder, in float32 on random
    tokens. Rounding may send a position to other experts, so a mixture of experts has three attempts, on
    shorter rows."""
    c, transformers = model.config, import_transformers()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    length = min(c.block_size, max(64, 2 * c.attention_window)) if c.n_expert else c.block_size
    generator = torch.Generator().manual_seed(0)
    for _ in range(3 if c.n_expert else 1):
        tokens = torch.randint(c.vocab_size, (1, length), generator=generator)
        ours = model.eval()(tokens)  # (1, L, V)
        difference = (ours - theirs(tokens, use_cache=False).logits).abs().max()
        if difference <= TOLERANCE * ours.abs().max():
            return
    raise UserError(
        f"{type(theirs).__name__} does not compute the same as this model: logits up to "
        f"{ours.abs().max():.3g} differ by {difference:.3g}. Nothing was exported"
    )


def tokenizer_files(tokenizer, block_size):
    """{file name: dict} with which transformers gives the ids of a Tokenizer. One difference is intended: the
    names of special tokens, such as <|endoftext|>, are read as those tokens. Raises UserError for other
    vocabularies than bytes, GPT-2 and rank files."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast
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
    merges = []  # by the rank of the whole, then of the left part
    for token in vocab:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += sorted(
            (pair for pair in pairs if vocab.keys() >= {*pair}), key=lambda p: vocab[p[0]]
        )
    theirs = Fast(models.BPE(vocab, merges, ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = pre_tokenizers.Split(Regex(pattern), "isolated")
    theirs.pre_tokenizer = pre_tokenizers.Sequence([pieces, byte_level])
    theirs.decoder = decoders.ByteLevel()
    special = [token.decode() for token in tokens[n:] or tokens[:1]]
    theirs.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    text = tokenizer.decode(range(1, n))  # every token once
    if theirs.encode(text).ids != tokenizer.encode(text).tolist():
        raise UserError(f"transformers splits text in another way than {tokenizer.name}")
    name = tokens[tokenizer.separator].decode()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name,
        "eos_token": name,
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": json.loads(theirs.to_str()), "tokenizer_config.json": settings}


def main(config):
    c = config
    import_transformers().utils.logging.disable_progress_bar()
    model, saved = load_model(c.checkpoint)
    files, meta, length = {}, saved["meta"], model.config.block_size
    try:
        tokenizer = tokenizer_of(c.checkpoint, saved, c.data)
        files = tokenizer_files(tokenizer, length)
        if tokenizer.vocab_size not in (50257, 128256):
            print("llama.cpp does not know this vocabulary: no GGUF file can be made of this model")
    except UserError as e:  # such as a rank file that has moved
        print(f"exported without a tokenizer: {e}")
    options = {"separator": meta.get("separator")}
    options["balance_coef"] = saved["config"].get("balance_coef", 0.0)
    save_hf(model, c.folder, c.dtype, c.overwrite, files, **options)
    print(f"{c.folder}: {model_type_of(model.config)}, {c.dtype}, texts of up to {length} tokens")


if __name__ == "__main__":
    entry_point(main, Config)
