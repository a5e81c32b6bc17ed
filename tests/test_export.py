"""tools/export.py and --init_from=hf: against transformers: the same logits and ids, both ways."""

import base64
import json
import math
import os
import re
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import tiktoken
import tokenizers
import torch
import transformers
from conftest import write_corpus
from safetensors.torch import load_file, save_file
from tiktoken_ext.openai_public import r50k_pat_str

from model import GPT, Attention, GPTConfig
from nanotst import UserError
from nanotst.configurator import parse
from nanotst.huggingface import load_hf
from nanotst.tokenizer import _bpe_tokenizer, get_tokenizer
from nanotst.vocabulary import character_tokenizer
from tools import export

DENSE = dict(
    vocab_size=100, block_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=48, head_dim=16, ff_dim=80,
    rope_theta=5000.0, norm_eps=1e-6,
)  # fmt: skip
MOE = DENSE | {"n_expert": 6, "top_k": 2, "ff_dim": 32}
QWEN3_MOE = MOE | {"qk_norm": True}
TIED = DENSE | {"tie_embeddings": True, "n_kv_head": 0, "head_dim": 0, "norm_eps": 1e-5}
SHAPES = {
    "LlamaForCausalLM": DENSE,
    "LlamaForCausalLM tied": TIED,
    "Qwen3ForCausalLM": DENSE | {"qk_norm": True},
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "MixtralForCausalLM": MOE,
    "MistralForCausalLM": DENSE | {"attention_window": 7},
    "MixtralForCausalLM window": MOE | {"attention_window": 7},
    "Qwen3ForCausalLM window": DENSE | {"qk_norm": True, "attention_window": 7},
    "Qwen3MoeForCausalLM window": QWEN3_MOE | {"attention_window": 7},
}


def build(shape, seed=0):
    """A GPT whose weights, norms included, are large enough for every part to matter."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1, 0.3) if p.dim() == 1 else p.normal_(0, 1.5 / math.sqrt(p.size(-1)))
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(shape name) -> (the model, its folder), made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = str(tmp_path_factory.mktemp("hf") / "model")
            made[name] = build(SHAPES[name]), folder
            export.save_hf(made[name][0], folder)
        return made[name]

    return get


def copy_of(folder, to, tensors=None, drop=(), **changes):
    """A copy of an exported folder with other tensors or other settings in its config.json."""
    os.makedirs(to, exist_ok=True)
    save_file(tensors or load_file(f"{folder}/model.safetensors"), f"{to}/model.safetensors")
    config = json.loads(Path(folder, "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if key not in drop}
    Path(to, "config.json").write_text(json.dumps(config))
    return str(to)


def refused(model, folder):
    """The message with which a folder is refused, a single line."""
    with pytest.raises(UserError) as e:
        load_hf(model, str(folder))
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_the_same(name, exported):
    model, folder = exported(name)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, info = load(folder, output_loading_info=True)
    assert not any(info.values()), info  # no missing, unexpected or mismatched tensor
    assert type(theirs).__name__ == name.split()[0] and theirs.dtype == torch.float32
    tokens = torch.randint(100, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = model(tokens), theirs(tokens).logits
    assert a.shape == b.shape == (3, 64, 100) and (a - b).abs().max() < 1e-4 * a.std()
    config = json.loads(Path(folder, "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0  # old, new


@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_is_bit_equal(name, exported, tmp_path):
    """By way of the shards that transformers writes."""
    model, folder = exported(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    other, tokens = build(SHAPES[name], seed=1), torch.arange(60).view(2, 30)
    load_hf(other, str(tmp_path / "shards"))
    assert torch.equal(model(tokens), other(tokens))
    export.save_hf(other, str(tmp_path / "again"))
    for path in Path(folder).iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_bfloat16_rounds_the_weights_and_nothing_else(tmp_path):
    model, folder = build(QWEN3_MOE), str(tmp_path / "hf")
    before = [p.clone() for p in model.parameters()]
    export.save_hf(model, folder, "bfloat16")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    other = build(QWEN3_MOE, seed=1)
    load_hf(other, folder)
    for p, q in zip(before, other.parameters()):
        rows = 100 if p.size(0) == 128 else None  # without the vocabulary's padding
        assert torch.equal(p[:rows].bfloat16().float(), q[:rows])


# -------------------------------------------------------------------------------- folders as initial weights


OTHER = dict(
    n_layer=1, n_kv_head=4, n_embd=64, head_dim=12, ff_dim=64, rope_theta=1e4, norm_eps=1e-5
)
OTHER |= dict(qk_norm=False, tie_embeddings=True, n_expert=8, top_k=1, attention_window=8)


@pytest.mark.parametrize("knob, value", OTHER.items())
def test_another_shape_names_the_knob(knob, value, exported):
    _, folder = exported(name := "Qwen3MoeForCausalLM window")
    said = refused(build(SHAPES[name] | {knob: value}), folder)
    assert f"set --{knob}={SHAPES[name].get(knob, False)} (now {value})" in said


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_parameters.*rope_scaling"),
        ({"rope_theta": 4000.0}, "4000.0.*5000.0"),
        ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, "window"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"model_type": "gpt2"}, "model_type gpt2"),
        ({"hidden_size": "x"}, "hidden_size|n_embd=x"),
    ],
)
def test_what_the_model_lacks_and_contradictions_are_refused(changes, said, exported, tmp_path):
    model, folder = exported("Qwen3MoeForCausalLM")
    assert re.search(said, refused(model, copy_of(folder, tmp_path, **changes)))


def test_older_configs_load_with_the_defaults_of_transformers(exported, tmp_path):
    model, folder = exported("LlamaForCausalLM tied")
    other, tokens = build(TIED, seed=1), torch.arange(9)[None]
    absent = "rope_parameters", "num_key_value_heads", "head_dim", "mlp_bias", "sliding_window"
    load_hf(other, copy_of(folder, tmp_path, rope_scaling=None, drop=absent))
    assert torch.equal(model(tokens), other(tokens))


def test_a_tied_model_has_one_head(exported, tmp_path):
    """It may be there twice, but not as two matrices."""
    model, folder = exported("LlamaForCausalLM tied")
    tensors = load_file(f"{folder}/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    load_hf(other := build(TIED, seed=1), copy_of(folder, tmp_path, tensors))
    assert torch.equal(other.embed.weight[:100], model.embed.weight[:100])
    tensors["lm_head.weight"][0, 0] += 1
    assert "lm_head.weight is another" in refused(model, copy_of(folder, tmp_path, tensors))


def test_the_index_decides_where_a_tensor_is(exported, tmp_path):
    model, folder = exported("LlamaForCausalLM")
    tensors = load_file(f"{folder}/model.safetensors")
    copy_of(folder, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    places = {name: "b" if name < "model.layers.1" else "a" for name in tensors}
    a, b = ({name: t for name, t in tensors.items() if places[name] == file} for file in "ab")
    save_file(a | {"lm_head.weight": torch.zeros(100, 48)}, tmp_path / "a")
    save_file(b, tmp_path / "b")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    load_hf(other := build(DENSE, seed=1), str(tmp_path))
    assert torch.equal(model(torch.arange(9)[None]), other(torch.arange(9)[None]))
    (tmp_path / "b").unlink()
    assert f"{tmp_path}/b" in refused(other, tmp_path)


def test_damaged_weights_are_refused(exported, tmp_path):
    model, folder = exported("LlamaForCausalLM")
    tensors, norm = load_file(f"{folder}/model.safetensors"), "model.norm.weight"
    for changes, said in (
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, "q_proj.bias"),
        ({norm: torch.ones(49)}, f"{norm} is torch.float32 (49,)"),
        ({norm: torch.full((48,), math.nan)}, "finite floats (48,)"),
        ({norm: torch.ones(48, dtype=torch.int8)}, "int8"),
        ({norm: torch.ones(48).to(torch.float8_e4m3fn)}, "float8"),
    ):
        assert said in refused(model, copy_of(folder, tmp_path, tensors | changes))
    del tensors[norm]
    assert f"lacks {norm}" in refused(model, copy_of(folder, tmp_path, tensors))
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(model, tmp_path)
    assert "none/config.json" in refused(model, tmp_path / "none")


def test_a_parameter_that_the_folder_lacks_is_named(exported, monkeypatch):
    """A fork may add one; it keeps its initial value."""
    model, said = build(DENSE, seed=1), []
    model.norm.gate = torch.nn.Parameter(torch.tensor(0.5))
    load_hf(model, exported("LlamaForCausalLM")[1], said.append)
    assert "norm.gate" in said[0] and model.norm.gate == 0.5 and len(said) == 1


@pytest.mark.parametrize("tie", [False, True])
def test_padding_of_the_vocabulary_is_left_out(tie, tmp_path):
    """An embedding of 128 rows serves a corpus of 100 tokens if its tokenizer has no more than these."""
    shape, said, folder = TIED if tie else DENSE, [], str(tmp_path / "hf")
    export.save_hf(theirs := build(shape | {"vocab_size": 128}), folder)

    def tokenizer(n):
        words = tokenizers.models.WordLevel({str(i): i for i in range(n)}, unk_token="0")
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))
        fast.save_pretrained(folder)

    tokenizer(98)
    load_hf(model := build(shape, seed=1), folder, said.append)
    assert said == [f"{folder}: left out rows 100 to 127 of the embedding, padding"]
    tokens = torch.arange(60).view(2, 30)
    assert torch.allclose(model(tokens), theirs(tokens)[..., :100], atol=1e-4)
    assert "vocab_size is 128" in refused(build(shape | {"vocab_size": 129}), folder)
    tokenizer(101)
    assert "tokenizer has 101 tokens, the corpus 100: prepare" in refused(model, folder)


# ------------------------------------------------------------------------------------------- what is exported


def gate(attention, config):
    attention.gate, attention.init = torch.nn.Parameter(torch.zeros(config.n_embd)), {"gate": 0.0}
    attention.out.register_forward_hook(lambda *args: args[2] * attention.gate.sigmoid())


def window_beyond_the_first_positions(attention, config):
    attention.window = 40


@pytest.mark.parametrize("fork", [gate, window_beyond_the_first_positions])
def test_a_fork_that_computes_something_else_is_refused(fork, monkeypatch, tmp_path):
    """Whatever was there before stays, and nothing is left behind."""
    folder = tmp_path / "hf"
    export.save_hf(build(DENSE), str(folder))
    before, init = {path: path.read_bytes() for path in folder.iterdir()}, Attention.__init__
    both = lambda self, config: (init(self, config), fork(self, config))[0]
    monkeypatch.setattr(Attention, "__init__", both)
    with pytest.raises(UserError, match="does not compute the same as this model: logits up to"):
        export.save_hf(build(DENSE), str(folder), overwrite=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["hf"]
    with pytest.raises(UserError, match="balance_bias"):  # a router's bias that is still 0
        export.save_hf(build(MOE | {"balance_bias": True}), str(tmp_path / "moe"))


def test_what_may_be_replaced(tmp_path):
    """An earlier export, if asked; nothing that holds anything else."""
    model, folder = build(DENSE), tmp_path / "hf"
    export.save_hf(model, str(folder), files={"tokenizer.json": {}})
    with pytest.raises(UserError, match="holds config.json; choose another folder, or --overwrite"):
        export.save_hf(model, str(folder))
    export.save_hf(model, str(folder), overwrite=True)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    (folder / "last.pt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds last.pt; choose another folder"):
            export.save_hf(model, str(folder), overwrite=overwrite)
    assert (folder / "last.pt").read_text() == "precious"


# -------------------------------------------------------------------------------------------------- tokenizer

MERGES = b"th| t|he| th| the|in|er|ter|inter|the|\n\n|\xe6\x97|quux|12|ab|bc|abc".split(b"|")
TOKENS = [bytes([b]) for b in range(256)] + MERGES  # "quux" is no merge of two tokens
TEXTS = [
    "Hello world, it's 12345 o'clock.  Two  spaces\n\n\tand a tab ", "", "   ", "a" * 70,
    "it'S WE'LL thE interim", "naïve café — Ā ā 日本語 한국어 🙂👩‍👩‍👧 \u00ad\u200b",
    "def f(x):\n    return x**2  # \r\n\r\n", "\x01\x7f ~~~ !!??\n \n",
    "quux quuxx abcabc bcab interther the\n\n\nthe 1212 日日", "".join(map(chr, range(1, 0x3000))),
]  # fmt: skip


def rank_file(path):
    lines = (f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(TOKENS))
    path.write_text("".join(lines))
    return get_tokenizer(str(path))


def gpt2(path):
    """GPT-2's splitting rules with a small vocabulary, since its own would need a network."""
    ranks = {token: i for i, token in enumerate(TOKENS)}
    special = {"<|endoftext|>": len(ranks)}
    options = dict(pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
    bpe = tiktoken.Encoding("gpt2", **options)
    return _bpe_tokenizer("gpt2", bpe, bpe.eot_token)


@pytest.mark.parametrize("name", ["bytes", "gpt2", "rank file", "Llama 3"])
def test_transformers_gives_the_same_ids(name, tmp_path, monkeypatch):
    if name == "Llama 3":  # its special tokens, with a smaller vocabulary
        monkeypatch.setattr("nanotst.tokenizer.LLAMA3_RANKS", len(TOKENS))
    make = {"bytes": lambda path: get_tokenizer("bytes"), "gpt2": gpt2}.get(name, rank_file)
    tokenizer = make(tmp_path / "tiny.model")
    files = export.tokenizer_files(tokenizer, 128)
    for file, value in files.items():
        (tmp_path / file).write_text(json.dumps(value))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size and theirs.model_max_length == 128
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        assert theirs(text).input_ids == ids and theirs.decode(ids) == tokenizer.decode(ids)
    separator = "<|end_of_text|>" if name == "Llama 3" else "<|endoftext|>"
    assert theirs(f"a{separator}a").input_ids == [97, tokenizer.separator, 97]
    assert theirs.bos_token_id == theirs.eos_token_id == tokenizer.separator


def test_a_vocabulary_without_known_rules_is_refused():
    with pytest.raises(UserError, match="the rules of characters are not known here"):
        export.tokenizer_files(character_tokenizer("abc"), 16)


# ----------------------------------------------------------------------------------------------- command line


def command(*argv):
    """python -m tools.export ARGV, in this process."""
    export.main(parse(export.Config, [str(arg) for arg in argv]))


def test_command_line(run, tmp_path, capsys):
    """A run on a corpus with a rank file, which is found where it was or where --data says."""
    tokenizer = rank_file(tmp_path / "tokenizer.model")
    corpus, text = tmp_path / "corpus", [1 + i % 200 for i in range(4000)]
    write_corpus(corpus, text, text, tokenizer.vocab_size)
    (tmp_path / "tokenizer.model").rename(corpus / "tokenizer.model")
    meta = json.loads((corpus / "meta.json").read_text()) | {"encoding": "tokenizer.model"}
    meta["separator"] = tokenizer.separator
    (corpus / "meta.json").write_text(json.dumps(meta))
    run(dataset=str(corpus), max_steps=1, bag_size=1, n_expert=2, top_k=1, balance_coef=0.07)
    path, folder = tmp_path / "run" / "last.pt", tmp_path / "hf"
    command(path, folder)
    assert f"{folder}: mixtral, float32, texts of up to 16 tokens" in capsys.readouterr().out
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) == tokenizer.vocab_size
    theirs = transformers.AutoConfig.from_pretrained(folder)
    assert theirs.eos_token_id == tokenizer.separator and theirs.max_position_embeddings == 16
    assert theirs.router_aux_loss_coef == 0.07
    corpus.rename(tmp_path / "elsewhere")
    command(path, folder, "--overwrite")
    assert "exported without a tokenizer: " in capsys.readouterr().out
    assert not (folder / "tokenizer.json").exists()
    command(path, folder, "--overwrite", f"--data={tmp_path / 'elsewhere'}")
    assert (folder / "tokenizer.json").exists()


def test_a_missing_package_is_one_line(exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for start in (lambda: command(tmp_path / "last.pt", tmp_path), lambda: load_hf(None, "")):
        with pytest.raises(UserError, match=r'pip install "transformers>=4.57,<6"'):
            start()
