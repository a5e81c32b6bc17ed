"""export.py against transformers and lm-eval: the same logits, tokens and ids, both ways. Nothing needs a network."""
import base64
import json
import math
import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import torch
import torch.nn.functional as F

from safetensors.torch import load_file, save_file

import export
from conftest import ROOT
from model import GPT, GPTConfig
from tokenizer import _bpe_tokenizer, get_tokenizer

DENSE = dict(vocab_size=100, block_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=48, head_dim=16, ff_dim=80,
             rope_theta=5000.0, norm_eps=1e-6)
SHAPES = {
    "llama": DENSE,
    "llama_tied": DENSE | {"tie_embeddings": True, "n_kv_head": 0, "head_dim": 0, "norm_eps": 1e-5},
    "qwen3": DENSE | {"qk_norm": True},
    "qwen3_moe": DENSE | {"qk_norm": True, "n_expert": 6, "top_k": 2, "ff_dim": 32},
    "mixtral": DENSE | {"n_expert": 4, "top_k": 3, "ff_dim": 32},
}
ARCHITECTURE = {"llama": "LlamaForCausalLM", "llama_tied": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM",
                "qwen3_moe": "Qwen3MoeForCausalLM", "mixtral": "MixtralForCausalLM"}
TEXTS = ["Hello world, it's 12345 o'clock.  Two  spaces\n\n\tand a tab ", "", "   ", "a" * 70, "it'S WE'LL thE interim",
         "naïve café — Ā ā 日本語 한국어 🙂👩‍👩‍👧 \u00ad\u200b", "def f(x):\n    return x**2  # \r\n\r\n", "\x01\x7f ~~~ !!??\n \n"]


def build(shape, seed=0):
    """A GPT whose weights, norms included, are large enough for every part to matter."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1, 0.3) if p.dim() == 1 else p.normal_(0, 1.5 / math.sqrt(p.size(-1)))
    return model


def save(model, folder, **options):
    export.save_hf(model.state_dict(), model.config, str(folder), **options)
    return str(folder)


def tensors_of(folder):
    return {name: t for path in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_the_same(name, tmp_path):
    import transformers
    model = build(SHAPES[name])
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(save(model, tmp_path), output_loading_info=True)
    assert not any(info.values()), info  # no missing, unexpected or mismatched tensor
    assert type(theirs).__name__ == ARCHITECTURE[name] and theirs.dtype == torch.float32
    for length in (1, 7, 64):
        tokens = torch.randint(100, (3, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            a, b = model(tokens), theirs(tokens).logits
        assert a.shape == b.shape == (3, length, 100)
        print(f"{name} {length}: {(a - b).abs().max() / a.std():.1e} of the standard deviation")
        assert (a - b).abs().max() < 1e-4 * a.std()
    prompt = tokens[:, :5]
    ours = torch.stack(list(model.generate(prompt, 20, temperature=0)), 1)
    assert torch.equal(theirs.generate(prompt, max_new_tokens=20, do_sample=False)[:, 5:], ours)


@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back(name, tmp_path):
    model, other = build(SHAPES[name]), build(SHAPES[name], seed=1)
    first = save(model, tmp_path / "first", shard_bytes=20_000)
    assert len(list(Path(first).glob("model-*.safetensors"))) > 3
    export.load_hf(other, first)
    second, third = save(other, tmp_path / "second"), save(other, tmp_path / "third", shard_bytes=20_000)
    a, b = tensors_of(first), tensors_of(second)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for path in Path(first).iterdir():  # sharded alike, the files are the same bytes
        assert path.read_bytes() == (Path(third) / path.name).read_bytes()
    tokens = torch.arange(60).view(2, 30)
    assert torch.equal(model(tokens), other(tokens))


@pytest.mark.parametrize("name", SHAPES)
def test_folders_written_by_transformers_load(name, tmp_path):
    import transformers
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**export.hf_config(GPTConfig(**SHAPES[name]))))
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    model, tokens = build(SHAPES[name]), torch.arange(64).view(2, 32)
    export.load_hf(model, str(tmp_path))
    with torch.no_grad():
        a, b = model(tokens), theirs.eval()(tokens).logits
    assert (a - b).abs().max() < 1e-4 * a.std()


def test_bfloat16_rounds_the_weights_and_nothing_else(tmp_path):
    import transformers
    model = build(SHAPES["qwen3_moe"])
    folder = save(model, tmp_path, dtype="bfloat16")
    assert transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    other = build(SHAPES["qwen3_moe"], seed=1)
    export.load_hf(other, folder)
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        rows = 100 if name in ("embed.weight", "head.weight") else None  # not the vocabulary's padding
        assert torch.equal(p[:rows].bfloat16().float(), q[:rows]) and q.dtype == torch.float32


def edit(folder, **changes):
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v != "absent"}))


@pytest.mark.parametrize("knob, value", [
    ("n_layer", 1), ("n_kv_head", 4), ("n_embd", 64), ("head_dim", 12), ("ff_dim", 64), ("rope_theta", 1e4), ("norm_eps", 1e-5),
    ("qk_norm", False), ("tie_embeddings", True), ("n_expert", 8), ("top_k", 1), ("vocab_size", 99)])
def test_another_shape_names_the_knob(knob, value, tmp_path):
    shape = SHAPES["qwen3_moe"]
    folder = save(build(shape), tmp_path)
    with pytest.raises(SystemExit) as e:
        export.load_hf(build(shape | {knob: value}), folder)
    said = "vocab_size 100, the corpus 99" if knob == "vocab_size" else f"--{knob}={shape.get(knob, False)} (now {value})"
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("changes, said", [
    ({"norm_topk_prob": False}, "norm_topk_prob"), ({"norm_topk_prob": "absent"}, "norm_topk_prob"),
    ({"attention_bias": True}, "attention_bias"), ({"mlp_only_layers": [0]}, "mlp_only_layers"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5000.0}}, "rope_type=llama3"),
    ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type=yarn"),
    ({"model_type": "gpt2"}, "model_type gpt2"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"hidden_size": "absent"}, "hidden_size"), ({"use_sliding_window": True}, "use_sliding_window")])
def test_what_the_model_lacks_is_refused(changes, said, tmp_path):
    model = build(SHAPES["qwen3_moe"])
    edit(save(model, tmp_path), **changes)
    with pytest.raises(SystemExit, match=said) as e:
        export.load_hf(model, str(tmp_path))
    assert "\n" not in str(e.value)


def test_configs_of_older_transformers(tmp_path):
    model, other = build(SHAPES["llama_tied"]), build(SHAPES["llama_tied"], seed=1)
    folder = save(model, tmp_path)
    edit(folder, rope_scaling=None, **dict.fromkeys(("rope_parameters", "num_key_value_heads", "head_dim", "mlp_bias"), "absent"))
    export.load_hf(other, folder)
    assert torch.equal(model(torch.arange(9)[None]), other(torch.arange(9)[None]))


def test_broken_folders(tmp_path):
    model = build(SHAPES["llama"])
    with pytest.raises(SystemExit, match="config.json"):
        export.load_hf(model, str(tmp_path / "none"))
    folder = save(model, tmp_path)
    tensors = tensors_of(folder)
    path = Path(folder) / "model.safetensors"
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, path)
    with pytest.raises(SystemExit, match="q_proj.bias has no counterpart"):
        export.load_hf(model, folder)
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, path)
    with pytest.raises(SystemExit, match="lacks model.norm.weight"):
        export.load_hf(model, folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SystemExit, match="cannot read the weights"):
        export.load_hf(model, folder)
    path.unlink()
    with pytest.raises(SystemExit, match="cannot read the weights"):
        export.load_hf(model, folder)


def test_balance_bias_is_not_exported_silently(tmp_path):
    model = build(SHAPES["qwen3_moe"] | {"balance_bias": True})
    save(model, tmp_path / "zero")
    model.blocks[0].mlp.bias += 0.1
    with pytest.raises(SystemExit, match="balance_bias"):
        save(model, tmp_path / "moved")


# ----------------------------------------------------------------------------------------------------------- tokenizer


def rank_file(path):
    """The 256 bytes, some merges in which order matters, and one token that no merge makes ("quux")."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [b"th", b" t", b"he", b" th", b" the", b"in", b"er", b"ter", b"inter", b"the", b"\n\n", b"\xe6\x97", b"quux", b"12",
               b"ab", b"bc", b"abc"]
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    return str(path)


def check_tokenizer(tokenizer, texts):
    import tokenizers
    theirs = tokenizers.Tokenizer.from_str(json.dumps(export.hf_tokenizer(tokenizer)))
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert theirs.encode(text).ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)
    return theirs


def test_byte_tokenizer():
    everything = "".join(map(chr, range(1, 0x3000)))
    theirs = check_tokenizer(get_tokenizer("bytes"), [*TEXTS, everything])
    assert theirs.encode("a\0b").ids == [97, 98]  # dropped, as by tokenizer.py
    assert theirs.encode("a<|endoftext|>b").ids == [97, 0, 98]


def test_gpt2_tokenizer(tmp_path):
    """GPT-2's splitting rules, with a small vocabulary in place of its own, which would need a network."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    ranks = {base64.b64decode(t): int(i) for t, i in map(str.split, open(rank_file(tmp_path / "tiny.model")))}
    bpe = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})
    code = [p.read_text(encoding="utf-8").replace("<|endoftext|>", "") for p in sorted(ROOT.glob("*.py"))]
    everything = "".join(map(chr, [*range(1, 0x3000), *range(0x1F300, 0x1F700)]))
    theirs = check_tokenizer(_bpe_tokenizer("gpt2", bpe), [*TEXTS, *code, everything])
    assert theirs.encode("a<|endoftext|>").ids[-1] == len(ranks)


@pytest.mark.parametrize("llama3", [False, True])
def test_rank_file_tokenizer(llama3, tmp_path, monkeypatch):
    if llama3:  # its special tokens, without its 128,000 others
        monkeypatch.setattr("tokenizer.LLAMA3_RANKS", 273)
    tokenizer = get_tokenizer(rank_file(tmp_path / "tiny.model"))
    assert tokenizer.vocab_size == 273 + (256 if llama3 else 1)
    theirs = check_tokenizer(tokenizer, [*TEXTS, "quux quuxx abcabc bcab interther the\n\n\nthe 1212 日日"])
    assert theirs.token_to_id("<|end_of_text|>" if llama3 else "<|endoftext|>") == tokenizer.separator


def test_unknown_encodings_have_no_tokenizer():
    assert export.hf_tokenizer(get_tokenizer("bytes").__class__("cl100k_base", 100277, 100257, None, None)) is None


# --------------------------------------------------------------------------------------------- checkpoints, evaluation


@pytest.fixture
def checkpoint(tmp_path):
    """A byte model, and what export.py reads of a checkpoint of train.py (test_hf_tst.py takes a real one)."""
    model = build(SHAPES["qwen3"] | {"vocab_size": 256, "block_size": 128})
    config = {k: v for k, v in vars(model.config).items() if k != "vocab_size"} | {"balance_coef": 0.001}
    path = tmp_path / "best.pt"
    torch.save({"model": model.state_dict(), "config": config, "data": str(tmp_path),
                "meta": {"vocab_size": 256, "encoding": "bytes", "separator": 0}}, path)
    return model, str(path)


def test_command_line(checkpoint, tmp_path, capsys):
    import transformers
    model, path = checkpoint
    folder = str(tmp_path / "hf")
    export.main([path, folder])
    assert "Qwen3ForCausalLM, float32" in capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Hi Ā!").input_ids
    assert ids == list("Hi Ā!".encode()) and tokenizer.decode(ids) == "Hi Ā!"
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.config.eos_token_id == 0 and theirs.config.max_position_embeddings == 128
    with pytest.raises(SystemExit, match="already holds a model"):
        export.main([path, folder])
    export.main([path, folder, "--overwrite", "--dtype=bfloat16"])
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(SystemExit, match="no checkpoint"):
        export.main([str(tmp_path / "none.pt"), str(tmp_path / "other")])


@pytest.mark.parametrize("there", [True, False])
def test_rank_file_of_a_checkpoint(there, checkpoint, tmp_path, capsys):
    _, path = checkpoint
    tokenizer = get_tokenizer(rank_file(tmp_path / "tokenizer.model"))
    model = build(SHAPES["llama"] | {"vocab_size": tokenizer.vocab_size})
    saved = torch.load(path) | {"model": model.state_dict(), "data": "moved"}
    saved["config"] |= {k: v for k, v in vars(model.config).items() if k != "vocab_size"}
    saved["meta"] = {"vocab_size": tokenizer.vocab_size, "encoding": "tokenizer.model", "separator": tokenizer.separator}
    torch.save(saved, path)
    export.main([path, str(tmp_path / "hf")] + [f"--data={tmp_path}"] * there)
    assert (tmp_path / "hf" / "tokenizer.json").exists() == there
    assert there or "no tokenizer is written: no such rank file" in capsys.readouterr().out


def test_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(SystemExit, match="pip install safetensors"):
        export.load_hf(None, str(tmp_path))


def test_lm_eval_scores_an_exported_model(checkpoint, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager
    model, path = checkpoint
    export.main([path, str(tmp_path / "hf")])
    rows = [{"question": f"{a} and {b} make", "choices": [str(a + b), "a lot", "nothing é"], "answer": a % 3}
            for a in range(4) for b in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text(f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {tmp_path}/rows.jsonl}}, cache_dir: {tmp_path}/cache}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
""")
    results = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(tmp_path / "hf"), "dtype": "float32"}, device="cpu", batch_size=4,
        tasks=["sums"], task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0, log_samples=True)

    def log_likelihood(question, choice):
        ids = torch.tensor(list(f"{question} {choice}".encode()))
        n = len(question.encode())
        with torch.no_grad():
            return -F.cross_entropy(model(ids[None, :-1])[0, n - 1:], ids[n:], reduction="sum").item()

    right = 0
    for row, sample in zip(rows, sorted(results["samples"]["sums"], key=lambda s: s["doc_id"])):
        expected = [log_likelihood(row["question"], choice) for choice in row["choices"]]
        assert [float(r[0]) for r in sample["filtered_resps"]] == pytest.approx(expected, rel=1e-4)
        right += expected.index(max(expected)) == row["answer"]
    assert results["results"]["sums"]["acc,none"] == pytest.approx(right / len(rows))
