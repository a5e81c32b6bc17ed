"""What runs differently on CUDA, on one GPU: `make test-cuda`, which takes minutes, most of them compiling.

References are float64, or the CPU. Bounds are relative norms of the difference that TF32 and bfloat16 meet.
NANOTST_CUDA_DRY_RUN=1 runs the same on the CPU, so that this file is known to work before a GPU is paid for.
"""

import copy
import functools
import itertools
import os
import socket

import pytest
import torch

import train
from model import GPT, GPTConfig
from nanotst import kernels
from nanotst.machine import Machine
from tst import LOSSES, bags_and_labels, embed_bags, multi_hot_cross_entropy

# before CUDA starts, for --deterministic
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DEVICE = "cpu" if os.environ.get("NANOTST_CUDA_DRY_RUN") else "cuda"
HEAD = {"float32": 3e-3, "bfloat16": 2e-2}  # bounds of the losses' gradients
WHOLE = {"float32": 3e-2, "bfloat16": 5e-2}  # of a whole model's


@pytest.fixture(autouse=True)
def as_in_training(monkeypatch):
    """TF32 as in training, and no settings or graphs of another test."""
    torch.set_float32_matmul_precision("high")
    torch.compiler.reset()
    if DEVICE == "cpu":  # traces without compiling, which would take ten minutes
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(True)


def distance(x, y):
    """Relative norm of x - y, in float64."""
    x, y = x.detach().double().cpu(), y.detach().double().cpu()
    return ((x - y).norm() / y.norm()).item()


def words(V, *shape):
    return torch.randint(V, shape, device=DEVICE)


def with_gradients(f, *tensors):
    """f(*tensors) and the gradients of the tensors, which are left as they are."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    value = f(*tensors)
    value.backward()
    return value, *(t.grad for t in tensors)


# ----------------------------------------------------------------------- losses and bag embedding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "V, words_known, s, compiled",
    [(V, known, s, False) for (V, known), s in itertools.product(
        [(512, 512), (50304, 50257), (128256, 128256)], [1, 4, 8])]
    + [(512, 512, 4, True), (50304, 50257, 8, True), (128256, 128256, 1, True)],
)  # fmt: skip
def test_fused_loss(V, words_known, s, compiled, dtype):
    """Against the plain loss in float64, with repeated and ignored labels, and a shorter last chunk."""
    hidden = torch.randn(300, 64, device=DEVICE).to(getattr(torch, dtype))  # (N, C)
    weight = torch.randn(V, 64, device=DEVICE) * 0.1  # (V, C)
    labels = words(words_known, 300, s)  # (N, s)
    labels[:50] = labels[:50, :1]
    labels[100:150, -1] = labels[290:] = -100

    def fused(h, w):
        return kernels.linear_multi_hot_cross_entropy(
            h, w, labels, vocab_size=words_known, chunk_rows=128
        )

    def plain(h, w):
        return multi_hot_cross_entropy(h @ w[:words_known].T, labels)

    found = with_gradients(torch.compile(fused) if compiled else fused, hidden, weight)
    value, grad_h, grad_w = with_gradients(plain, hidden.double(), weight.double())
    assert found[0].item() == pytest.approx(value.item(), rel=1e-3)
    assert distance(found[1], grad_h) < HEAD[dtype]
    assert distance(found[2], grad_w) < HEAD[dtype]


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"mce"}))
def test_other_losses_by_chunks(name):
    hidden, weight = torch.randn(300, 64, device=DEVICE), torch.randn(512, 64, device=DEVICE) * 0.1
    labels = words(512, 300, 4)
    labels[:30, 1:] = labels[40:50] = -100

    def chunked(h, w):
        return kernels.linear_loss(LOSSES[name], h, w, labels, chunk_rows=128)

    found = with_gradients(chunked, hidden, weight)
    wanted = with_gradients(
        lambda h, w: LOSSES[name](h @ w.T, labels), hidden.double(), weight.double()
    )
    assert found[0].item() == pytest.approx(wanted[0].item(), rel=1e-3)
    assert distance(found[1], wanted[1]) < 1e-2 and distance(found[2], wanted[2]) < 1e-2


@pytest.mark.parametrize(
    "V, s, compiled", [(256, 1, False), (50304, 4, False), (256, 4, True), (50304, 16, True)]
)
def test_bag_embedding(V, s, compiled):
    """Mean, and mean of the own document's tokens, against a look-up in float64."""
    embed = GPT(GPTConfig(V, 64, 1, 1, 64)).to(DEVICE).embed
    bags, share = words(V, 4, 64, s), torch.rand(4, 64, s, device=DEVICE).softmax(-1)  # (B, L, s)
    grad = torch.randn(4, 64, 64, device=DEVICE)  # (B, L, C)
    run = torch.compile(embed) if compiled else embed
    for weights in (None, share):
        embed.weight.grad = None
        x = run(bags, weights)  # (B, L, C)
        x.backward(grad)
        table = embed.weight.detach().double().requires_grad_()
        wanted = embed_bags(bags, table, None if weights is None else weights.double())
        wanted.backward(grad.double())
        assert distance(x, wanted) < 1e-6 and distance(embed.weight.grad, table.grad) < 1e-5


# --------------------------------------------------------------------- attention and whole models


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "L, heads, kv_heads, window", [(512, 4, 4, 0), (1024, 8, 2, 0), (300, 4, 2, 64)]
)
def test_attention(L, heads, kv_heads, window, compiled):
    """Grouped heads and a window, in bfloat16, against a plain softmax in float64. Compiled, a window is flex
    attention's, whose gradients test_whole_model compares."""
    c = GPTConfig(64, L, 1, heads, 32 * heads, n_kv_head=kv_heads, attention_window=window)
    model = GPT(c).to(DEVICE)
    attention, D = model.blocks[0].attn, c.head_dim
    if compiled and window:
        attention.__class__ = kernels.WindowAttention
    x = torch.randn(2, L, c.n_embd, device=DEVICE)  # (B, L, C)
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
        found = (torch.compile(attention) if compiled else attention)(x, model.cos, model.sin)

    q, k, v = (x.double() @ attention.qkv.weight.detach().double().T).unflatten(-1, (-1, D)).split(
        [heads, kv_heads, kv_heads], 2)  # (B, L, H, D), (B, L, K, D) twice  # fmt: skip
    cos, sin = model.cos.double(), model.sin.double()  # (L, 1, D/2)
    turned = []
    for t in (q, k):
        a, b = t.chunk(2, -1)
        turned.append(torch.cat((a * cos - b * sin, b * cos + a * sin), -1))
    k, v = (t.repeat_interleave(heads // kv_heads, 2) for t in (turned[1], v))  # (B, L, H, D)
    z = torch.einsum("blhd,bmhd->bhlm", turned[0], k) / D**0.5  # (B, H, L, L)
    back = torch.arange(L, device=DEVICE)[:, None] - torch.arange(L, device=DEVICE)  # (L, L)
    p = z.masked_fill((back < 0) | (back >= (window or L)), -torch.inf).softmax(-1)
    y = torch.einsum("bhlm,bmhd->blhd", p, v).flatten(2)  # (B, L, C)
    assert distance(found, y @ attention.out.weight.double().T) < 1e-2


SHAPES = {
    "dense": dict(n_kv_head=2, qk_norm=True),
    "tied, window": dict(tie_embeddings=True, attention_window=40),
    "mixture": dict(n_expert=8, ff_dim=64, qk_norm=True),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_model(name, dtype):
    """Loss and gradients of bags against the CPU in float32: eager, and compiled in bfloat16. There a mixture
    uses all experts, since rounding would send some positions to other ones."""
    low, own = dtype == "bfloat16", SHAPES[name]
    own = own | dict(top_k=8 if low else 2) if name == "mixture" else own
    plain = GPT(GPTConfig(500, 128, 2, 4, 64, **own))
    model = copy.deepcopy(plain).to(DEVICE)
    kernels.use_twins(model, Machine(DEVICE, dtype), [(4, 4)])
    tokens = torch.randint(500, (4, 129 * 4))  # (B, L*s + s)
    loss, _ = plain(*bags_and_labels(tokens, 4, 4))
    loss.backward()
    net = torch.compile(model, dynamic=False, fullgraph=True) if low else model
    with torch.autocast(DEVICE, torch.bfloat16, enabled=low):
        found, _ = net(*bags_and_labels(tokens.to(DEVICE), 4, 4))
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=2e-3)
    for (key, p), wanted in zip(model.named_parameters(), plain.parameters()):
        if not low or "router" not in key:  # small, and mostly rounding
            assert distance(p.grad, wanted.grad) < WHOLE[dtype], key


def test_peak_memory_does_not_grow_with_the_bag():
    hidden, weight = torch.randn(8192, 64, device=DEVICE), torch.randn(16384, 64, device=DEVICE)
    peaks = []
    for s in (1, 8, 16):
        fused = functools.partial(
            kernels.linear_multi_hot_cross_entropy, labels=words(16384, 8192, s)
        )
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with_gradients(fused, hidden, weight)
        peaks.append(torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 1)
    assert max(peaks) < 1.05 * min(peaks)


# ------------------------------------------------------------------------------------- whole runs


def losses(rows):
    return [row["loss"] for row in rows] + [row["val_loss"] for row in rows if "val_loss" in row]


@pytest.mark.parametrize(
    "knobs", [{}, dict(n_expert=4, top_k=2, qk_norm=True)], ids=["dense", "mixture"]
)
def test_as_many_graphs_as_kinds_of_step(run, monkeypatch, knobs):
    """One for bags, one for ordinary steps, one for evaluation, and none after the warm-up."""
    graphs = torch._dynamo.utils.counters["stats"]
    after_warm_up, compile_model = [], Machine.compile

    def compile_and_count(*args):
        compiled = compile_model(*args)
        after_warm_up.append(graphs["unique_graphs"])
        return compiled

    monkeypatch.setattr(Machine, "compile", compile_and_count)
    graphs.clear()
    run(device=DEVICE, dtype="bfloat16", compile="on", n_layer=2, **knobs)
    assert after_warm_up == [3] and graphs["unique_graphs"] == 3


@pytest.mark.parametrize("batch_size", [8, 4, 2])  # 1, 2 and 4 micro-steps
def test_cuda_graphs_train_like_eager_code(run, tmp_path, batch_size):
    """Across the switch and with evaluations between the steps."""
    knobs = dict(device=DEVICE, dtype="float32", batch_size=batch_size, eval_interval=2)
    eager = run(**knobs, compile="off", out_dir=str(tmp_path / "eager"))
    graphs = run(**knobs, compile="graphs", out_dir=str(tmp_path / "graphs"))
    assert losses(graphs) == pytest.approx(losses(eager), rel=2e-3)


def test_deterministic_runs_are_bit_equal_and_so_is_a_resumed_one(run, tmp_path, monkeypatch):
    knobs = dict(
        device=DEVICE, dtype="bfloat16", compile="on", deterministic=True, n_embd=64, ff_dim=64
    )
    first = run(**knobs, out_dir=str(tmp_path / "first"))
    assert losses(first) == losses(run(**knobs, out_dir=str(tmp_path / "second")))
    with monkeypatch.context() as m, pytest.raises(SystemExit):  # the switch comes after step 4
        m.setattr(train.StopSignals, "stop", lambda self, step: step == 3)
        run(**knobs, out_dir=str(tmp_path / "third"))
    assert losses(first) == losses(run(**knobs, out_dir=str(tmp_path / "third"), resume=True))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_rank_trains_like_no_ranks(run, monkeypatch, tmp_path, parallel):
    knobs = dict(device=DEVICE, dtype="float32", compile="on", batch_size=4)
    alone = run(**knobs, out_dir=str(tmp_path / "alone"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    ranked = run(**knobs, out_dir=str(tmp_path / parallel), parallel=parallel)
    assert losses(ranked) == pytest.approx(losses(alone), rel=2e-3)
