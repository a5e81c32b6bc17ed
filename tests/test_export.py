"""tools/export.py against transformers and lm-eval: the same logits, tokens and ids, both ways."""

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
from conftest import ROOT, write_corpus
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig
from nanotst import UserError
from nanotst.configurator import parse
from nanotst.huggingface import knobs_of, load_hf
from nanotst.tokenizer import _bpe_tokenizer, get_tokenizer
from tools import export

DENSE = dict(
    vocab_size=100,
    block_size=64,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=48,
    head_dim=16,
    ff_dim=80,
    rope_theta=5000.0,
    norm_eps=1e-6,
)
SHAPES = {
    "llama": DENSE,
    "llama_tied": DENSE | {"tie_embeddings": True, "n_kv_head": 0, "head_dim": 0, "norm_eps": 1e-5},
    "qwen3": DENSE | {"qk_norm": True},
    "qwen3_moe": DENSE | {"qk_norm": True, "n_expert": 6, "top_k": 2, "ff_dim": 32},
    "mixtral": DENSE | {"n_expert": 4, "top_k": 3, "ff_dim": 32},
    "mistral": DENSE | {"attention_window": 7},
    "mixtral_window": DENSE | {"n_expert": 4, "top_k": 3, "ff_dim": 32, "attention_window": 7},
    "qwen3_window": DENSE | {"qk_norm": True, "attention_window": 7},
    "qwen3_moe_window": DENSE
    | {"qk_norm": True, "n_expert": 6, "top_k": 2, "ff_dim": 32, "attention_window": 7},
}
ARCHITECTURE = {
    "llama": "LlamaForCausalLM",
    "llama_tied": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "mistral": "MistralForCausalLM",
}
TEXTS = [
    "Hello world, it's 12345 o'clock.  Two  spaces\n\n\tand a tab ",
    "",
    "   ",
    "a" * 70,
    "it'S WE'LL thE interim",
    "naïve café — Ā ā 日本語 한국어 🙂👩‍👩‍👧 \u00ad\u200b",
    "def f(x):\n    return x**2  # \r\n\r\n",
    "\x01\x7f ~~~ !!??\n \n",
]


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


def command(*argv):
    """python -m tools.export ARGV, in this process."""
    export.main(parse(export.Config, [str(arg) for arg in argv]))


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


def tensors_of(folder):
    return {
        name: t
        for path in sorted(Path(folder).glob("*.safetensors"))
        for name, t in load_file(path).items()
    }


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_the_same(name, tmp_path):
    import transformers

    model = build(SHAPES[name])
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        save(model, tmp_path), output_loading_info=True
    )
    assert not any(info.values()), info  # no missing, unexpected or mismatched tensor
    assert (
        type(theirs).__name__ == ARCHITECTURE[name.removesuffix("_window")]
        and theirs.dtype == torch.float32
    )
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
    load_hf(other, first)
    second, third = (
        save(other, tmp_path / "second"),
        save(other, tmp_path / "third", shard_bytes=20_000),
    )
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
        transformers.AutoConfig.for_model(**export.hf_config(GPTConfig(**SHAPES[name])))
    )
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    model, tokens = build(SHAPES[name]), torch.arange(64).view(2, 32)
    load_hf(model, str(tmp_path))
    with torch.no_grad():
        a, b = model(tokens), theirs.eval()(tokens).logits
    assert (a - b).abs().max() < 1e-4 * a.std()


def test_bfloat16_rounds_the_weights_and_nothing_else(tmp_path):
    import transformers

    model = build(SHAPES["qwen3_moe"])
    folder = save(model, tmp_path, dtype="bfloat16")
    assert (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype
        == torch.bfloat16
    )
    other = build(SHAPES["qwen3_moe"], seed=1)
    load_hf(other, folder)
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        rows = (
            100 if name in ("embed.weight", "head.weight") else None
        )  # not the vocabulary's padding
        assert torch.equal(p[:rows].bfloat16().float(), q[:rows]) and q.dtype == torch.float32


def edit(folder, **changes):
    path = Path(folder) / "config.json"
    path.write_text(
        json.dumps(
            {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v != "absent"}
        )
    )


@pytest.mark.parametrize(
    "knob, value",
    [
        ("n_layer", 1),
        ("n_kv_head", 4),
        ("n_embd", 64),
        ("head_dim", 12),
        ("ff_dim", 64),
        ("rope_theta", 1e4),
        ("norm_eps", 1e-5),
        ("qk_norm", False),
        ("tie_embeddings", True),
        ("n_expert", 8),
        ("top_k", 1),
        ("vocab_size", 99),
    ],
)
def test_another_shape_names_the_knob(knob, value, tmp_path):
    shape = SHAPES["qwen3_moe"]
    folder = save(build(shape), tmp_path)
    with pytest.raises(UserError) as e:
        load_hf(build(shape | {knob: value}), folder)
    said = (
        "vocab_size 100, the corpus 99"
        if knob == "vocab_size"
        else f"--{knob}={shape.get(knob, False)} (now {value})"
    )
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"norm_topk_prob": "absent"}, "norm_topk_prob"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5000.0}},
            "rope_type=llama3",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_type=yarn",
        ),
        ({"model_type": "gpt2"}, "model_type gpt2"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": "absent"}, "hidden_size"),
        ({"use_sliding_window": True, "sliding_window": "x"}, "sliding_window"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_what_the_model_lacks_is_refused(changes, said, tmp_path):
    model = build(SHAPES["qwen3_moe"])
    edit(save(model, tmp_path), **changes)
    with pytest.raises(UserError, match=said) as e:
        load_hf(model, str(tmp_path))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["mistral", "mixtral_window", "qwen3_window", "qwen3_moe_window"])
def test_the_window_is_compared(name, tmp_path):
    """It changes no shape; where a folder has another one, or one in some layers only, that is said."""
    shape = SHAPES[name]
    folder = save(build(shape), tmp_path)
    for window in (0, 8):
        with pytest.raises(UserError, match=rf"set --attention_window=7 \(now {window}\)"):
            load_hf(build(shape | {"attention_window": window}), folder)
    edit(folder, layer_types=["sliding_attention", "full_attention"])
    with pytest.raises(UserError, match="some layers only"):
        load_hf(build(shape), folder)
    edit(
        folder,
        layer_types="absent",
        max_window_layers=1,
        sliding_window=7 if "qwen" in name else "absent",
    )
    if name in ("qwen3_window", "mistral"):
        with pytest.raises(UserError, match="some layers only|no sliding_window"):
            load_hf(build(shape), folder)


def test_a_tied_model_may_hold_its_head_twice(tmp_path):
    model, other = build(SHAPES["llama_tied"]), build(SHAPES["llama_tied"], seed=1)
    folder = save(model, tmp_path)
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    load_hf(other, folder)
    assert torch.equal(model(torch.arange(9)[None]), other(torch.arange(9)[None]))


def test_configs_of_older_transformers(tmp_path):
    model, other = build(SHAPES["llama_tied"]), build(SHAPES["llama_tied"], seed=1)
    folder = save(model, tmp_path)
    edit(
        folder,
        rope_scaling=None,
        **dict.fromkeys(
            ("rope_parameters", "num_key_value_heads", "head_dim", "mlp_bias"), "absent"
        ),
    )
    load_hf(other, folder)
    assert torch.equal(model(torch.arange(9)[None]), other(torch.arange(9)[None]))


def test_broken_folders(tmp_path):
    model = build(SHAPES["llama"])
    with pytest.raises(UserError, match="config.json"):
        load_hf(model, str(tmp_path / "none"))
    folder = save(model, tmp_path)
    tensors = tensors_of(folder)
    path = Path(folder) / "model.safetensors"
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, path)
    with pytest.raises(UserError, match="q_proj.bias has no counterpart"):
        load_hf(model, folder)
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, path)
    with pytest.raises(UserError, match="lacks model.norm.weight"):
        load_hf(model, folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot read the weights"):
        load_hf(model, folder)
    path.unlink()
    with pytest.raises(UserError, match="cannot read the weights"):
        load_hf(model, folder)


def test_balance_bias_is_not_exported_silently(tmp_path):
    model = build(SHAPES["qwen3_moe"] | {"balance_bias": True})
    save(model, tmp_path / "zero")
    model.blocks[0].mlp.bias += 0.1
    with pytest.raises(UserError, match="balance_bias"):
        save(model, tmp_path / "moved")


def test_the_balance_coefficient_is_exported(run, tmp_path):
    import transformers

    shape = SHAPES["mixtral"] | {"block_size": 32}
    del shape["vocab_size"]
    meta = {"vocab_size": 256, "encoding": "bytes", "separator": 0}
    _, path = put_into_a_run(run, tmp_path, shape, meta, balance_coef=0.07)
    command(path, tmp_path / "hf")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").router_aux_loss_coef == 0.07


@pytest.mark.parametrize("name", SHAPES)
def test_theta_is_where_every_version_of_transformers_looks(name):
    """Versions before 5 read the first, later ones the second; else a default holds, 1e6 for Mixtral."""
    config = export.hf_config(GPTConfig(**SHAPES[name]))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_absent_is_guessed_unless_transformers_guesses_the_same(name, tmp_path):
    """A config.json without a key is read as transformers reads it, or refused."""
    import transformers

    full = export.hf_config(GPTConfig(**SHAPES[name]))
    read = 0
    for absent in full:
        config = {key: value for key, value in full.items() if key != absent}
        if "rope" in absent:  # written in two places
            config = {key: value for key, value in config.items() if "rope" not in key}
        try:
            knobs = knobs_of(config)
        except ValueError as e:
            assert ("rope_theta" if "rope" in absent else absent.replace("_local", "")) in str(e)
            continue
        read += 1
        completed = transformers.AutoConfig.for_model(**config).to_dict()
        assert knobs == knobs_of(completed), absent
    assert read > 5


# ---------------------------------------------------------------------------------------------------- folders


def test_an_export_replaces_an_earlier_one_whole(tmp_path):
    """No shard, index or tokenizer of the earlier export stays."""
    model, folder = build(SHAPES["qwen3"]), tmp_path / "hf"
    save(model, folder, shard_bytes=20_000, extra={"tokenizer.json": {}})
    assert {"model.safetensors.index.json", "tokenizer.json"} < names(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="already holds an export"):
        save(model, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    save(model, folder, overwrite=True)
    assert names(folder) == {"config.json", "model.safetensors", export.LIST}
    save(model, folder, overwrite=True, shard_bytes=20_000)
    assert "model.safetensors" not in names(folder) and "model.safetensors.index.json" in names(
        folder
    )


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["last.pt", "config.json", "model.safetensors", ".hidden", "generation_config.json"]
)
def test_a_folder_with_anything_else_is_left_alone(name, overwrite, tmp_path):
    """A run, a model of other origin, or an export to which another program has added something."""
    model, folder = build(SHAPES["llama"]), tmp_path / "hf"
    if name == "generation_config.json":
        save(model, folder)
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("precious")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=f"holds {name}, which no export wrote"):
        save(model, folder, overwrite=overwrite)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_killed_export_can_be_replaced(tmp_path, monkeypatch):
    """What an unfinished export left is known as its own, and it is no model: config.json comes last."""
    model, folder = build(SHAPES["llama"]), tmp_path / "hf"
    write = export.write_json

    def killed(folder, name, value):
        if name == "config.json":
            raise OSError(28, "No space left on device")
        write(folder, name, value)

    monkeypatch.setattr(export, "write_json", killed)
    with pytest.raises(UserError, match="unfinished now: .*No space left"):
        save(model, folder, shard_bytes=20_000)
    monkeypatch.undo()
    assert "config.json" not in names(folder) and "model-00001-of-00012.safetensors" in names(
        folder
    )
    save(model, folder, overwrite=True)
    assert names(folder) == {"config.json", "model.safetensors", export.LIST}


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "a_file", "no_room"])
def test_places_that_cannot_take_an_export(name, tmp_path, monkeypatch):
    (tmp_path / "a_file").write_text("precious")
    if name == "no_room":
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="is a file|named like a file|1000 bytes|0.00 GB are free"):
        save(build(SHAPES["llama"]), tmp_path / name)
    assert (tmp_path / "a_file").read_text() == "precious"


def test_damaged_weights_are_not_exported(tmp_path):
    model = build(SHAPES["llama"])
    state = model.state_dict()
    with pytest.raises(UserError, match="attn.out.weight does not fit its configuration"):
        export.save_hf(
            state | {"blocks.1.attn.out.weight": torch.ones(48, 63)},
            model.config,
            str(tmp_path / "hf"),
        )
    state["norm.weight"][3] = math.nan
    with pytest.raises(UserError, match="not finite"):
        export.save_hf(state, model.config, str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "content, said",
    [
        (b"\xff\xfe{}", "config.json"),
        (b"{", "config.json"),
        (b"[" * 100_000, "config.json"),
        (b"[1]", "no {...}"),
        (b"null", "no {...}"),
        (b"{}", "model_type None"),
        (b'{"model_type": ["llama"]}', "model_type"),
    ],
)
def test_config_json_that_is_none(content, said, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=said.replace("{", "\\{")) as e:
        load_hf(None, str(tmp_path))
    assert "\n" not in str(e.value)


WRONG = ["x", "12", -1, 0, 1.5, True, [], {"a": 1}, 10**400, math.nan, math.inf]


@pytest.mark.parametrize("value", WRONG, ids=lambda v: str(v)[:8])
def test_values_of_wrong_type_are_one_line(value):
    """Each key of config.json in turn, for each kind of model: refused in one line, or of no consequence."""
    fine = [("rms_norm_eps", 1.5), ("tie_word_embeddings", True), ("use_sliding_window", True)]
    for name, shape in SHAPES.items():
        config = export.hf_config(GPTConfig(**shape))
        knobs = knobs_of(config)
        for key in config:
            try:
                changed = knobs_of(config | {key: value})
            except ValueError as e:
                assert "\n" not in str(e) and len(str(e)) < 200
            else:
                assert changed == knobs or (key, value) in fine, (name, key)


def test_an_index_that_is_damaged(tmp_path):
    model = build(SHAPES["llama"])
    folder = save(model, tmp_path, shard_bytes=20_000)
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    for content in (
        "[]",
        "{}",
        "nonsense",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {}}',
    ):
        index.write_text(content)
        with pytest.raises(UserError) as e:
            load_hf(model, folder)
        assert "\n" not in str(e.value)
    index.write_text(json.dumps(whole))
    load_hf(model, folder)
    (tmp_path / "model-00002-of-00012.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00012.safetensors"):
        load_hf(model, folder)


def test_weights_that_are_no_numbers_of_a_model(tmp_path):
    model = build(SHAPES["llama"])
    folder = save(model, tmp_path)
    tensors = tensors_of(folder)
    for value, said in (
        (torch.full((48,), math.nan), "not finite"),
        (torch.ones(48, dtype=torch.int8), "int8"),
    ):
        save_file(tensors | {"model.norm.weight": value}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=said):
            load_hf(model, folder)


# --------------------------------------------------------------------------------------- vocabulary's padding


def padded_folder(folder, ids=None, tie=False):
    """A Llama whose tables have 128 rows, for a corpus of 100 tokens: (folder, a model for that corpus)."""
    shape = SHAPES["llama_tied" if tie else "llama"]
    theirs = build(shape | {"vocab_size": 128})
    save(theirs, folder, extra={} if ids is None else {"tokenizer.json": ids})
    return theirs, build(shape, seed=1)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("tokenizer", [None, 98, 100])
def test_a_table_padded_beyond_its_tokenizer_loads(tokenizer, tie, tmp_path):
    """As public models are. The rows of no token are left out, and it is said; the others give the same."""
    said, ids = [], None
    if tokenizer:
        vocab = {str(i): i for i in range(tokenizer - 1)}
        ids = {
            "model": {"vocab": vocab},
            "added_tokens": [{"id": tokenizer - 1, "content": "<|endoftext|>"}],
        }
    theirs, model = padded_folder(tmp_path, ids, tie)
    load_hf(model, str(tmp_path), said.append)
    assert said == [f"{tmp_path}: rows 100 to 127 of the embedding and head, padding, are left out"]
    tokens = torch.arange(60).view(2, 30)
    assert model(tokens).shape == (2, 30, 100)
    assert torch.allclose(model(tokens), theirs(tokens)[..., :100], atol=1e-4)


@pytest.mark.parametrize(
    "ids",
    [
        {"model": {"vocab": {str(i): i for i in range(101)}}},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 100, "content": "b"}]},
        {"model": {"vocab": [["a", -1.0]] * 101}},
    ],
)
def test_rows_of_tokens_are_not_padding(ids, tmp_path):
    _, model = padded_folder(tmp_path, ids)
    with pytest.raises(
        UserError, match="vocab_size 128, the corpus 100 and its tokenizer 101 tokens"
    ):
        load_hf(model, str(tmp_path))


@pytest.mark.parametrize(
    "ids", [[], {}, {"model": 3}, {"model": {"vocab": {"a": "b"}}}, {"model": {"vocab": {}}}]
)
def test_padding_with_a_damaged_tokenizer_json(ids, tmp_path):
    _, model = padded_folder(tmp_path, ids)
    with pytest.raises(UserError, match="its tokenizer.json is damaged"):
        load_hf(model, str(tmp_path))


@pytest.mark.parametrize("theirs", [99, 101, 100 + 1024 + 28])
def test_other_vocabularies_are_not_padding(theirs, tmp_path):
    save(build(SHAPES["llama"] | {"vocab_size": theirs}), tmp_path)
    with pytest.raises(UserError, match=f"vocab_size {theirs}, the corpus 100: prepare the corpus"):
        load_hf(build(SHAPES["llama"]), str(tmp_path))


# -------------------------------------------------------------------------------------------------- tokenizer


def rank_file(path):
    """The 256 bytes, some merges in which order matters, and one token that no merge makes ("quux")."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [
        b"th",
        b" t",
        b"he",
        b" th",
        b" the",
        b"in",
        b"er",
        b"ter",
        b"inter",
        b"the",
        b"\n\n",
        b"\xe6\x97",
        b"quux",
        b"12",
        b"ab",
        b"bc",
        b"abc",
    ]
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

    lines = Path(rank_file(tmp_path / "tiny.model")).read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    bpe = tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": len(ranks)},
    )
    code = [
        p.read_text(encoding="utf-8").replace("<|endoftext|>", "")
        for p in sorted(ROOT.glob("*.py"))
    ]
    everything = "".join(map(chr, [*range(1, 0x3000), *range(0x1F300, 0x1F700)]))
    theirs = check_tokenizer(_bpe_tokenizer("gpt2", bpe), [*TEXTS, *code, everything])
    assert theirs.encode("a<|endoftext|>").ids[-1] == len(ranks)


@pytest.mark.parametrize("llama3", [False, True])
def test_rank_file_tokenizer(llama3, tmp_path, monkeypatch):
    if llama3:  # its special tokens, without its 128,000 others
        monkeypatch.setattr("nanotst.tokenizer.LLAMA3_RANKS", 273)
    tokenizer = get_tokenizer(rank_file(tmp_path / "tiny.model"))
    assert tokenizer.vocab_size == 273 + (256 if llama3 else 1)
    theirs = check_tokenizer(
        tokenizer, [*TEXTS, "quux quuxx abcabc bcab interther the\n\n\nthe 1212 日日"]
    )
    for name in (
        ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>") if llama3 else ("<|endoftext|>",)
    ):
        assert len(theirs.encode(f"a{name}a").ids) == 3  # a special token, not its letters
    assert (
        theirs.token_to_id("<|end_of_text|>" if llama3 else "<|endoftext|>") == tokenizer.separator
    )


def test_unknown_encodings_have_no_tokenizer():
    assert (
        export.hf_tokenizer(
            get_tokenizer("bytes").__class__("cl100k_base", 100277, 100257, None, None)
        )
        is None
    )


# ------------------------------------------------------------------------------------ checkpoints, evaluation


@pytest.fixture
def checkpoint(run, tmp_path):
    """A byte model with large weights, and a checkpoint of train.py that holds it: (model, path)."""
    shape = SHAPES["qwen3"] | {"block_size": 128}
    del shape["vocab_size"]
    return put_into_a_run(
        run, tmp_path, shape, {"vocab_size": 256, "encoding": "bytes", "separator": 0}
    )


def put_into_a_run(run, tmp_path, shape, meta, **knobs):
    """Train the shape for a step on a corpus with this meta, then put build's weights in its place."""
    corpus = tmp_path / "corpus"
    text = [1 + i % 200 for i in range(4000)]
    write_corpus(corpus, text, text, meta["vocab_size"])
    path = corpus / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | meta))
    if meta["encoding"] == "tokenizer.model":
        rank_file(corpus / "tokenizer.model")
    run(
        **shape,
        dataset=str(corpus),
        max_steps=1,
        bag_size=1,
        total_batch=shape["block_size"],
        batch_size=1,
        **knobs,
    )
    path = str(tmp_path / "run" / "last.pt")
    saved = torch.load(path, weights_only=True)
    model = build(shape | {"vocab_size": meta["vocab_size"]})
    torch.save(saved | {"model": model.state_dict()}, path)
    return model, path


def test_command_line(checkpoint, tmp_path, capsys):
    import transformers

    model, path = checkpoint
    folder = str(tmp_path / "hf")
    command(path, folder)
    said = capsys.readouterr().out
    assert "Qwen3ForCausalLM, float32, for texts of up to 128 tokens" in said
    assert "llama.cpp's converter does not know a vocabulary of bytes" in said
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Hi Ā!").input_ids
    assert ids == list("Hi Ā!".encode()) and tokenizer.decode(ids) == "Hi Ā!"
    assert (
        tokenizer.bos_token_id == tokenizer.eos_token_id == 0 and tokenizer.model_max_length == 128
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.config.eos_token_id == 0 and theirs.config.max_position_embeddings == 128
    command(path, folder, "--overwrite", "--dtype=bfloat16")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(UserError, match="no checkpoint"):
        command(tmp_path / "none.pt", tmp_path / "other")


@pytest.mark.parametrize("moved", ["not", "beside the run", "told", "gone"])
def test_rank_file_of_a_checkpoint(moved, run, tmp_path, capsys):
    """The vocabulary is found in the corpus where it was, beside the run's folder, or where --data says."""
    corpus = tmp_path / "corpus"
    tokenizer = get_tokenizer(rank_file(tmp_path / "tokenizer.model"))
    meta = {
        "encoding": "tokenizer.model",
        "separator": tokenizer.separator,
        "vocab_size": tokenizer.vocab_size,
    }
    shape = SHAPES["llama"] | {"block_size": 32}
    del shape["vocab_size"]
    _, path = put_into_a_run(run, tmp_path, shape, meta)
    if moved == "beside the run":
        (tmp_path / "new").mkdir()
        (tmp_path / "run").rename(tmp_path / "new" / "run")
        corpus.rename(tmp_path / "new" / "corpus")
        path = tmp_path / "new" / "run" / "last.pt"
    elif moved != "not":
        corpus.rename(tmp_path / "elsewhere")
    command(path, tmp_path / "hf", *([f"--data={tmp_path / 'elsewhere'}"] * (moved == "told")))
    said = capsys.readouterr().out
    assert (tmp_path / "hf" / "tokenizer.json").exists() == (moved != "gone")
    assert "llama.cpp's converter does not know this vocabulary" in said or moved == "gone"
    assert "no tokenizer is written: tokenizer.model, the vocabulary of" in said or moved != "gone"


@pytest.mark.parametrize("package", ["safetensors", "huggingface_hub"])
def test_a_missing_package_is_named_with_its_versions(package, monkeypatch, tmp_path):
    model = build(SHAPES["llama"])
    folder = save(model, tmp_path / "there")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r'pip install "transformers>=4.57,<6"'):
        load_hf(model, folder)
    with pytest.raises(UserError, match=r'pip install "transformers>=4.57,<6"'):
        save(model, tmp_path / "new")


def test_without_transformers_the_model_is_exported_and_the_tokenizer_named(
    checkpoint, tmp_path, monkeypatch, capsys
):
    _, path = checkpoint
    monkeypatch.setitem(sys.modules, "transformers.convert_slow_tokenizer", None)
    command(path, tmp_path / "hf")
    assert "no tokenizer is written: it needs: pip install" in capsys.readouterr().out
    assert names(tmp_path / "hf") == {"config.json", "model.safetensors", export.LIST}


def test_lm_eval_scores_an_exported_model(checkpoint, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    model, path = checkpoint
    command(path, str(tmp_path / "hf"))
    rows = [
        {
            "question": f"{a} and {b} make",
            "choices": [str(a + b), "a lot", "nothing é"],
            "answer": a % 3,
        }
        for a in range(4)
        for b in range(3)
    ]
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
        model="hf",
        model_args={"pretrained": str(tmp_path / "hf"), "dtype": "float32"},
        device="cpu",
        batch_size=4,
        tasks=["sums"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )

    def log_likelihood(question, choice):
        ids = torch.tensor(list(f"{question} {choice}".encode()))
        n = len(question.encode())
        with torch.no_grad():
            return -F.cross_entropy(
                model(ids[None, :-1])[0, n - 1 :], ids[n:], reduction="sum"
            ).item()

    right = 0
    for row, sample in zip(rows, sorted(results["samples"]["sums"], key=lambda s: s["doc_id"])):
        expected = [log_likelihood(row["question"], choice) for choice in row["choices"]]
        assert [float(r[0]) for r in sample["filtered_resps"]] == pytest.approx(expected, rel=1e-4)
        right += expected.index(max(expected)) == row["answer"]
    assert results["results"]["sums"]["acc,none"] == pytest.approx(right / len(rows))
