"""tools/plan.py: memory against what PyTorch's allocator counted, FLOPs and text against counts by hand."""

import re
from dataclasses import replace

import pytest
import torch

import train
from model import GPT
from nanotst import UserError
from nanotst.checkpoint import model_config
from nanotst.configurator import parse
from tools.plan import Config, memory, plan

# Rows of results/plan/README.md: knobs, vocabulary, measured MB, and how many ranks shared the step how
SMALL = "n_layer=4 n_head=4 n_kv_head=2 n_embd=128 device=cpu "
MOE = " n_expert=8 top_k=2 ff_dim=192 qk_norm=True"
AGAIN = " checkpoint_activations=True"
MEASURED = [
    ("dtype=float32 block_size=256 total_batch=2048 n_embd=256", 256, 287.2, "auto"),
    ("dtype=bfloat16 block_size=1024 total_batch=2048", 4096, 159.9, "auto"),
    ("dtype=bfloat16 block_size=1024 total_batch=4096 batch_size=2", 4096, 167.2, "auto"),
    ("dtype=float32 block_size=128 total_batch=512 batch_size=2 n_embd=256", 16384, 243.4, "auto"),
    ("dtype=float32 block_size=64 total_batch=64 tie_embeddings=True", 16384, 55.1, "auto"),
    ("dtype=float32 block_size=32 total_batch=32 n_embd=256 optimizer=muon", 1024, 47.1, "auto"),
    ("dtype=bfloat16 block_size=256 total_batch=2048 n_layer=6" + AGAIN, 256, 59.7, "auto"),
    ("dtype=float32 block_size=640 total_batch=1280" + MOE, 1024, 138.6, "auto"),
    ("dtype=bfloat16 block_size=640 total_batch=1280" + AGAIN + MOE, 1024, 61.3, "auto"),
    ("dtype=bfloat16 block_size=640 total_batch=2560", 8192, 124.0, "ddp"),
    ("dtype=float32 block_size=64 total_batch=256 batch_size=1 n_embd=256", 1024, 78.4, "ddp"),
    ("dtype=bfloat16 block_size=640 total_batch=2560", 8192, 95.7, "fsdp"),
    ("dtype=float32 block_size=64 total_batch=256 batch_size=1 n_embd=256", 1024, 54.5, "fsdp"),
    ("compile=on dtype=bfloat16 block_size=640 total_batch=2560 n_embd=256", 1024, 149.5, "auto"),
    ("compile=on dtype=bfloat16 block_size=640 total_batch=2560 n_embd=256" + AGAIN, 1024, 89.5, "auto"),
    ("compile=on dtype=bfloat16 n_layer=6 n_embd=384 block_size=64 total_batch=256 batch_size=1",
     1024, 254.1, "ddp"),
]  # fmt: skip


def config(*words):
    return parse(Config, [word if word.endswith(".py") else f"--{word}" for word in words])


@pytest.fixture
def text_of(capsys):
    """text_of(WORDS ...) is what the command prints."""

    def printed(*words):
        plan(config(*words), [f"--{word}" if "=" in word else word for word in words])
        return capsys.readouterr().out

    return printed


def shape(c, vocab_size=128256):
    with torch.device("meta"):
        return GPT(model_config(vars(c), {"vocab_size": vocab_size}))


@pytest.mark.parametrize("knobs, vocab_size, measured, parallel", MEASURED)
def test_planned_memory_is_within_15_percent_of_the_measured(knobs, vocab_size, measured, parallel):
    ranks = 1 if parallel == "auto" else 2
    c = config(*(SMALL + "compile=off " + knobs).split(), f"gpus={ranks}", f"parallel={parallel}")
    rows = c.total_batch // c.block_size // ranks
    batch_size = c.batch_size or rows
    parts = memory(c, shape(c, vocab_size), batch_size, rows // batch_size)
    assert sum(parts.values()) / 1e6 == pytest.approx(measured, rel=0.15)


def test_the_3b_model_as_counted_by_hand(text_of):
    c, n = config("config/dense_3b.py"), 3_337_766_912
    ways = [("ddp", 8), ("fsdp", 8), ("fsdp", 64)]
    cases = (replace(c, parallel=parallel, gpus=gpus) for parallel, gpus in ways)
    ddp, fsdp, wide = (memory(case, shape(c), 1, 128) for case in cases)
    assert (ddp["weights"], ddp["moments"], ddp["gathered"]) == (4 * n, 8 * n, 0)
    assert (fsdp["weights"], fsdp["moments"]) == (n / 2, n)
    assert fsdp["gathered"] == wide["gathered"] > 0  # whatever the shards
    matrices = n - 128256 * 2048 - (2 * 36 + 1) * 2048  # all but the embedding and the norms
    flops = (6 * matrices + 12 * 36 * 2048 * 2048) * 20000 * 2**21
    days = flops / (0.4 * 989e12 * 8) / 86400
    text = text_of("config/dense_3b.py", "gpus=8")
    assert f"{flops:.3g} FLOPs: {days:.2f} days of 8 H100" in text
    assert f"{20000 * 2**21 * (1 + 0.3 * 5) / 1e9:.4g} billion tokens, 2.50 x" in text


def test_muon_keeps_one_moment_of_matrices_alone():
    """Embedding, head, routers, experts and norms keep AdamW's two."""
    c = config(*SMALL.split(), *MOE.split(), "optimizer=muon")
    moments = memory(c, shape(c, 256), 1, 1)["moments"]
    parameters = dict(shape(c, 256).named_parameters())
    matrices = [n for n in parameters if n.endswith(("attn.qkv.weight", "attn.out.weight"))]
    sizes = {name: p.numel() for name, p in parameters.items()}
    assert moments == 8 * sum(sizes.values()) - 4 * sum(sizes[name] for name in matrices)


@pytest.mark.parametrize(
    "name, gpus, way",
    [("dense_270m", 8, "DDP"), ("dense_3b", 8, "FSDP"), ("moe_10b_a1b", 64, "FSDP")],
)
def test_ddp_where_the_states_fit_and_fsdp_where_they_do_not(name, gpus, way, text_of):
    text = text_of(f"config/{name}.py", f"gpus={gpus}", "learning_rate=1e-4")
    assert f"recommended: {way}, " in text
    start, *words = text.splitlines()[-1].split()
    assert start == ("sbatch" if gpus > 8 else "torchrun")
    c = parse(train.Config, words[words.index(f"config/{name}.py") :])  # what train.py takes
    assert c.learning_rate == 1e-4 and c.parallel == ("fsdp" if way == "FSDP" else "auto")
    train.check(c, gpus)


def test_the_largest_micro_batch_fits_and_the_next_one_does_not(text_of):
    words = "config/dense_600m.py", "gpu_memory=40"
    c, rows = config(*words), int(re.search(r"\| +DDP \| +(\d+)", text_of(*words))[1])
    ddp = replace(c, parallel="ddp")
    parts = [memory(ddp, shape(c), n, 128 // n) for n in (rows, 2 * rows)]
    small, large = (sum(each.values()) for each in parts)
    assert small <= (40 - c.reserve) * 1e9 / 1.05 < large


def test_what_fits_nowhere_is_said_and_muon_is_not_sharded(text_of):
    assert "too much" in (text := text_of("config/moe_10b_a1b.py", "gpus=1"))
    assert text.endswith("nothing fits; take more GPUs, or a shorter block_size\n")
    text = text_of("config/dense_270m.py", "optimizer=muon")  # works on whole matrices
    assert "DDP" in text and "FSDP" not in text
    text = text_of("config/dense_270m.py", "parallel=fsdp")  # as asked for
    assert "FSDP" in text and "DDP" not in text


def test_cuda_graphs_keep_gradients_as_several_micro_steps_do():
    c = config(*SMALL.split(), "compile=on")
    once, twice = (memory(c, shape(c), 4, n) for n in (1, 2))
    assert memory(replace(c, compile="graphs"), shape(c), 4, 1) == twice != once


@pytest.mark.parametrize(
    "words, said",
    [
        ("gpu=abacus", "gpu must be one of .*H100"),
        ("gpus=7", "must be a multiple of .* x 7 ranks"),  # train.check
        ("gpus=12", "a multiple of 8"),
        ("shard_size=3", "a multiple of 8, and of shard_size"),
        ("mfu=0", "mfu must be positive, got 0"),
        ("dataset=nowhere", "nowhere"),
        ("compile=graphs", "compile=graphs is for one GPU"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words, said, text_of):
    with pytest.raises(UserError, match=said):
        text_of("config/dense_3b.py", words)
