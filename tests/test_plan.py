"""tools/plan.py against what PyTorch allocates, and against the paper's models counted by hand."""

import json
import shlex
from types import SimpleNamespace

import pytest
import torch

from model import GPT, Block, GPTConfig, rotary
from nanotst import UserError
from nanotst.configurator import parse
from nanotst.kernels import use_twins
from nanotst.machine import Machine
from tools import plan
from tools.plan import (
    Config,
    Way,
    kept_by_attention,
    kept_by_mlp,
    make_plan,
    measure,
    moments,
    peak,
)
from tools.runner import TRAINER, knobs_of, places

SMALL = ["n_layer=3", "n_head=4", "n_kv_head=2", "n_embd=128", "device=cpu", "compile=off", "max_steps=10",
         "vocab_size=1024"]  # fmt: skip
MOE = ["n_expert=8", "top_k=2", "ff_dim=192", "qk_norm=True"]


def config(*arguments, **own):
    """The Config of a command line."""
    argv = [arg if arg.startswith("config/") else f"--{arg}" for arg in arguments]
    return parse(Config, places(argv + [f"--{key}={value}" for key, value in own.items()], Config))


# Of each the peak is at another moment of the step, or in other kernels.
MEASURED = {
    "loss": "dtype=float32 block_size=256 total_batch=512",
    "loss, bfloat16, long rows": "dtype=bfloat16 block_size=640 total_batch=1280",
    "loss, bags": "dtype=float32 block_size=128 total_batch=512 bag_size=4",
    "head, micro-steps": "dtype=float32 block_size=128 total_batch=512 batch_size=2 vocab_size=16384",
    "head, tied": "dtype=float32 block_size=64 total_batch=64 vocab_size=16384 tie_embeddings=True",
    "blocks recomputed": "dtype=float32 block_size=256 total_batch=1024 checkpoint_activations=True",
    "blocks recomputed, bfloat16": "dtype=bfloat16 block_size=640 total_batch=640 n_layer=5 "
    "checkpoint_activations=True",
    "few positions": "dtype=float32 block_size=32 total_batch=32 n_embd=256",
    "muon": "dtype=float32 block_size=32 total_batch=32 n_embd=256 optimizer=muon",
    "experts": "dtype=float32 block_size=640 total_batch=1280 " + " ".join(MOE),
    "experts recomputed": "dtype=bfloat16 block_size=256 total_batch=1024 batch_size=2 "
    "checkpoint_activations=True " + " ".join(MOE),
}


@pytest.mark.parametrize("knobs", MEASURED.values(), ids=MEASURED.keys())
def test_the_planned_peak_is_within_a_tenth_of_what_the_allocator_counts(knobs):
    given = dict(arg.split("=") for arg in SMALL + knobs.split())
    found = measure(config(*(f"{key}={value}" for key, value in given.items())))
    assert found["planned"] == pytest.approx(found["measured"], rel=0.1)


@pytest.mark.parametrize("batch_size", [4, 1])  # one micro-step, or four
def test_the_planned_peak_under_ddp_counts_its_buckets(monkeypatch, batch_size):
    for key, value in dict(
        RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=0
    ).items():
        monkeypatch.setenv(key, str(value))
    knobs = ["dtype=float32", "block_size=64", "total_batch=256", f"batch_size={batch_size}"]
    found = measure(config(*SMALL, *knobs, "vocab_size=8192"))
    assert found["way"]["parallel"] == "ddp"
    assert found["planned"] == pytest.approx(found["measured"], rel=0.1)


@pytest.mark.parametrize("kind", ["dense", "experts"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [256, 640])  # the two forms of attention on a CPU
def test_what_a_block_keeps_is_what_autograd_saves(kind, dtype, block_size):
    own = dict(n_expert=8, top_k=2, qk_norm=True) if kind == "experts" else {}
    c = GPTConfig(64, block_size, 1, n_head=4, n_kv_head=2, n_embd=64, ff_dim=96, **own)
    block, held = Block(c), {}
    use_twins(SimpleNamespace(config=c, modules=block.modules), Machine("cpu", dtype))
    given = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def save(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in given:
            held[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
        return t

    x = torch.randn(2, block_size, 64, dtype=getattr(torch, dtype), requires_grad=True)
    cos, sin = (t[:, None].to(x.dtype) for t in rotary(block_size, c.head_dim, c.rope_theta))
    if dtype == "bfloat16":  # there, the float32 copy of x is kept and not x
        given.add(x.untyped_storage().data_ptr())
    for t in (cos, sin):
        given.add(t.untyped_storage().data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            y, router = block(x, cos, sin)
    if router:  # its graph is dropped with it; what the balance loss needs stays
        graph_of_entropy = 2 * 4 * 2 * block_size * c.n_expert
    else:
        graph_of_entropy = 0
    saved = sum(storage.nbytes() for storage in held.values()) - graph_of_entropy
    way = Way("cpu", 4 if dtype == "float32" else 2, compiled=False, parallel="none")
    N = 2 * block_size
    expected = N * (kept_by_attention(c, way) + kept_by_mlp(c, N, way))
    if dtype == "bfloat16":
        expected += 2 * sum(
            p.numel() for name, p in block.named_parameters() if "router" not in name
        )
    assert saved == pytest.approx(expected, rel=0.005)


# ---------------------------------------------------------------------------------------- the paper's models


def test_the_3b_model_as_counted_by_hand():
    found = make_plan(config("config/dense_3b.py", gpus=8))
    n, L = 3_337_766_912, 2048
    assert found["parameters"] == n
    matrices = n - 128256 * 2048 - (2 * 36 + 1) * 2048  # but the embedding and the norms
    assert found["flops_per_position"] == 6 * matrices + 12 * 36 * 2048 * L
    assert found["flops"] == found["flops_per_position"] * 20000 * 2**21
    assert found["tokens"] == 20000 * 2**21 * (1 + 0.3 * 5)
    assert found["days"] == pytest.approx(found["flops"] / (0.4 * 989e12 * 8) / 86400)
    ddp, fsdp = found["options"][:2]
    for part, n_bytes in dict(weights=4 * n, moments=8 * n).items():
        assert ddp["parts"][part] == n_bytes
        assert fsdp["parts"][part] == n_bytes / 8
    # summed over micro-steps before they go into buckets, or are cut
    assert ddp["parts"]["gradients"] == 8 * n and fsdp["parts"]["gradients"] == 4 * n / 8


@pytest.mark.parametrize(
    "name, gpus, parallel",
    [
        ("dense_270m", 8, "ddp"),
        ("dense_600m", 8, "ddp"),
        ("dense_3b", 8, "fsdp"),
        ("moe_10b_a1b", 64, "fsdp"),
    ],
)
def test_ddp_where_the_states_fit_and_fsdp_where_they_do_not(name, gpus, parallel):
    assert (
        make_plan(config(f"config/{name}.py", gpus=gpus))["best"]["settings"]["parallel"]
        == parallel
    )


def test_the_largest_micro_batch_fits_and_the_next_one_does_not():
    c = config("config/dense_600m.py", gpus=8, gpu_memory=40)
    found, limit = make_plan(c), (40 - c.reserve) * 1e9
    for option in found["options"]:
        assert option["fits"] and plan.MARGIN * option["bytes"] <= limit
        if option["rows"] < found["rows_of_a_rank"]:
            doubled = make_plan(
                config("config/dense_600m.py", f"batch_size={2 * option['rows']}", gpus=8)
            )
            same = next(o for o in doubled["options"] if o["way"] == option["way"])
            assert plan.MARGIN * same["as_configured"] > limit


def test_what_fits_nowhere_is_said(capsys):
    plan.main(config("config/moe_10b_a1b.py", gpus=1))
    assert "nothing fits" in capsys.readouterr().out


def test_planning_the_largest_model_allocates_no_tensors():
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        make_plan(config("config/moe_10b_a1b.py", gpus=64))
    events = [
        e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    assert sum(n for n in events if n > 0) < 1e6


def tiny(**own):
    """The sizes of a small model, for the formulas alone."""
    knobs, _, _ = plan.read_knobs(["optimizer=adamw"])
    with torch.device("meta"):
        return plan.Model.of(GPT(GPTConfig(512, 128, 4, n_head=4, n_embd=64, **own)), knobs)


def test_shards_divide_the_states_and_not_what_is_gathered():
    found = [moments(tiny(), 1, Way(parallel="fsdp", shards=n))["optimizer"] for n in (2, 8)]
    for part in ("weights", "moments", "gradients"):
        assert found[0][part] == 4 * found[1][part]
    found = [moments(tiny(), 1, Way(parallel="fsdp", shards=n))["loss"] for n in (2, 8)]
    assert found[0]["gathered"] == found[1]["gathered"] > 0


def test_muon_is_not_planned_in_shards():
    found = make_plan(config("config/dense_270m.py", "optimizer=muon", gpus=8))
    assert {option["settings"]["parallel"] for option in found["options"]} == {"ddp"}


def test_recomputing_keeps_one_input_a_block():
    kept = {
        again: moments(tiny(), 2, Way(checkpointing=again))["loss"]["kept"]
        for again in (False, True)
    }
    rest = 2 * 128 * (plan.norm(64, Way()) + 12)
    assert kept[True] - rest == 4 * 2 * 128 * 64 * 2
    assert kept[True] < kept[False] / 5


def test_the_logits_of_a_step_do_not_grow_with_the_micro_batch_or_the_bag():
    found = [moments(tiny(), rows, Way())["loss"]["logits"] for rows in (2**14, 2**15)]
    assert found[0] == found[1]
    parts = [peak(tiny(), 4, Way(), bag)[1]["kept"] for bag in (1, 16)]
    assert parts[0] == parts[1]


# ----------------------------------------------------------------------------------------- command and errors


def test_the_recommended_command_is_one_that_train_py_reads():
    for gpus in (1, 8, 64):
        found = make_plan(
            config("config/dense_3b.py", "learning_rate=1e-3", gpus=gpus, gpu_memory=80)
        )
        words = shlex.split(found["command"])
        assert words[0] == ("python" if gpus == 1 else "torchrun")
        arguments = words[words.index("train.py") + 1 :]
        keys = {arg[2:].partition("=")[0] for arg in arguments if arg.startswith("--")}
        assert keys <= set(knobs_of(TRAINER))
        assert arguments[0] == "config/dense_3b.py" and "--learning_rate=0.001" in arguments
    assert "--nnodes=8 --nproc_per_node=8" in found["command"]


def test_text_and_json_say_the_same(capsys):
    plan.main(config("config/dense_270m.py", gpus=8, json=True))
    found = json.loads(capsys.readouterr().out)
    plan.main(config("config/dense_270m.py", gpus=8))
    text = capsys.readouterr().out
    assert f"{found['parameters']:,}" in text and found["command"] in text
    assert f"{found['days']:.2f} days" in text


@pytest.mark.parametrize(
    "arguments, own, said",
    [
        (["config/dense_3b.py"], dict(gpu="abacus"), "gpu must be one of .*H100"),
        (["config/dense_3b.py"], dict(gpus=7), "must be a multiple of block_size 2048 x 7 GPUs"),
        (["config/dense_3b.py", "shard_size=3"], dict(gpus=8), "shard_size must divide the 8 GPUs"),
        (["config/dense_3b.py"], dict(mfu=40), "mfu must lie between 0 and 1"),
        (["config/dense_3b.py", "bag_size=2,4"], {}, "bag_size: one value"),
        (["config/dense_3b.py", "n_layers=4"], {}, "did you mean n_layer"),
        (["dataset=nowhere"], dict(gpus=1), "corpus nowhere is not there; give --vocab_size"),
    ],
)
def test_what_cannot_be_planned_is_an_error_of_one_line(arguments, own, said):
    with pytest.raises(UserError, match=said):
        make_plan(config(*arguments, **own))
