"""Twins (nanotst/kernels.py, cpu.py) against the plain code and plain loops, in values and gradients; their
savings, mostly memory; and the trial that leaves out a twin whose plain code has changed."""

import copy
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import tst
from model import GPT, Attention, BagEmbedding, GPTConfig, Head, Linear, MoE, RMSNorm, swiglu
from nanotst import kernels
from nanotst.cpu import AttentionOnCPU, BagEmbeddingOnCPU, LinearOnCPU, tall_product
from nanotst.kernels import (
    FusedHead,
    GroupedMoE,
    WindowAttention,
    linear_multi_hot_cross_entropy,
    use_twins,
)
from nanotst.machine import Machine
from tst import LOSSES, bag_weights

N, C, V = 20, 12, 37  # positions, width, vocabulary: not multiples of anything
CPU, BFLOAT16 = Machine("cpu", "float32"), Machine("cpu", "bfloat16")
PLAIN = {Linear, Attention, BagEmbedding, Head, MoE}
TWINS = {LinearOnCPU, AttentionOnCPU, BagEmbeddingOnCPU, FusedHead, GroupedMoE}
SHAPE = dict(vocab_size=50, block_size=12, n_layer=2, n_head=2, n_embd=16, ff_dim=32)
EXPERTS = dict(n_expert=4, top_k=2)


class BigOperations(TorchDispatchMode):
    """Counts, by name and size, the operations that return at least `size` numbers, and all matrix products.
    `most`: how many tensors of that size were in memory at once."""

    def __init__(self, size):
        super().__init__()
        self.size, self.counts, self.living, self.most = size, Counter(), {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and (out.numel() >= self.size or "mm" in func.__name__):
            self.counts[func.__name__, out.numel()] += 1
            if out.numel() >= self.size:
                ref = StorageWeakRef(out.untyped_storage())
                self.living = {k: r for k, r in self.living.items() if not r.expired()}
                self.living[ref.cdata] = ref
                self.most = max(self.most, len(self.living))
        return out


def value_and_gradients(f, inputs, *args, upstream=None):
    """f(*inputs, *args) and the gradients of its product with `upstream` by the inputs."""
    out = f(*inputs, *args)
    return out, *torch.autograd.grad(out, inputs, upstream)


def assert_same(f, reference, inputs, *args, upstream=None, **tolerance):
    got = value_and_gradients(f, inputs, *args, upstream=upstream)
    wanted = value_and_gradients(reference, inputs, *args, upstream=upstream)
    assert_close(got, wanted, **tolerance)


def leaves(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


# ---- the trial


def classes(model):
    return {type(module) for module in model.modules()} & (PLAIN | TWINS)


CASES = {  # (knobs of the model, loss of bags, document bags)
    "default": ({}, "mce", False),
    "documents, window, groups": (dict(n_head=4, n_kv_head=2, attention_window=5), "mce", True),
    "large vocabulary, long rows": (dict(vocab_size=5000, block_size=600), "mce_alt", True),
    "experts": (dict(**EXPERTS, balance_bias=True), "hinge", False),
    "many experts, tied": (dict(n_expert=20, top_k=9, tie_embeddings=True), "bce", True),
}


@pytest.mark.parametrize("machine", [CPU, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_unedited_all_twins_are_used(case, machine, capsys):
    knobs, loss, documents = CASES[case]
    model, before = GPT(GPTConfig(**SHAPE | knobs)), torch.get_rng_state()
    names, precision = list(model.state_dict()), torch.get_float32_matmul_precision()
    use_twins(model, machine, [(4, 4), (1, 3), (2, 1)], loss, documents)
    assert classes(model) == (TWINS if "n_expert" in knobs else TWINS - {GroupedMoE})
    assert capsys.readouterr().out == "" and list(model.state_dict()) == names
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_float32_matmul_precision() == precision


def smoothed(logits, labels, weights=None, mce=tst.multi_hot_cross_entropy):
    return 0.99 * mce(logits, labels, weights) - 0.01 * logits.log_softmax(-1).mean()


def softcapped(self, q, k, v, attend=Attention.attend):
    return attend(self, 50 * (q / 50).tanh(), k, v)


def sharper(self, x, experts, weights, mix=MoE.mix):
    y, load = mix(self, x, experts, weights)
    return 0.999 * y, load


def grown(self, x, extra, weights=None):
    raise TypeError("other arguments now")


def shortened(bags, weight, share=None, embed=tst.embed_bags):
    return 0.999 * embed(bags, weight, share)


def scaled(self, x):
    return F.linear(x, self.weight) * 1.001


EDITS = {  # (where, name, new, twin that is left out)
    "smoothing": (tst, "multi_hot_cross_entropy", smoothed, FusedHead),
    "mean": (tst, "embed_bags", shortened, BagEmbeddingOnCPU),
    "linear": (Linear, "forward", scaled, LinearOnCPU),
    "softcap": (Attention, "attend", softcapped, AttentionOnCPU),
    "experts": (MoE, "mix", sharper, GroupedMoE),
    "arguments": (AttentionOnCPU, "attend", grown, AttentionOnCPU),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_small_edit_leaves_its_twin_out_and_the_line_names_it(edit, monkeypatch, capsys):
    where, name, new, twin = EDITS[edit]
    monkeypatch.setattr(where, name, new)
    model = GPT(GPTConfig(**SHAPE | EXPERTS))
    use_twins(model, BFLOAT16, [(4, 4)])
    assert classes(model) == TWINS - {twin} | {twin.__base__}
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{name} " in said and "has changed, so it runs" in said


def test_rank_0_decides_for_all(monkeypatch):
    class Second(Machine):  # a rank that hears rank 0's verdicts
        def from_master(self, value):
            assert value is None
            return [LinearOnCPU.replaces]

    monkeypatch.setattr(kernels, "agree", None)
    model = GPT(GPTConfig(**SHAPE))
    use_twins(model, Second("cpu", "float32", rank=1), [(4, 4)])
    assert classes(model) == TWINS - {GroupedMoE, LinearOnCPU} | {Linear}


def test_a_module_with_a_class_of_its_own_is_left_alone():
    class Mine(Linear):
        pass

    model = GPT(GPTConfig(**SHAPE))
    model.blocks[0].attn.qkv.__class__ = Mine
    use_twins(model, CPU)
    assert type(model.blocks[0].attn.qkv) is Mine and type(model.blocks[0].attn.out) is LinearOnCPU


RUN_EDITS = {
    "loss": EDITS["smoothing"][:3],
    "bags": EDITS["mean"][:3],
    "norm": (RMSNorm, "forward", lambda self, x, f=RMSNorm.forward: f(self, x) * 0.99),
    "attention": (Attention, "forward", lambda self, *a, f=Attention.forward: f(self, *a) * 0.9),
}


@pytest.mark.parametrize("compiled", [False, True])
def test_every_edit_changes_the_losses(compiled, monkeypatch, capsys):
    def losses():
        """The loss of one batch in bfloat16 and the norms of its gradients."""
        torch.compiler.reset()
        torch.manual_seed(0)
        net = model = GPT(GPTConfig(**SHAPE | dict(n_layer=1)))
        use_twins(model, BFLOAT16, [(3, 3)])
        if compiled:
            net = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        with BFLOAT16.autocast():
            loss = net(torch.randint(50, (4, 12, 3)), torch.randint(50, (4, 12, 3)))[0]
        loss.backward()
        return [loss.item(), *(p.grad.norm().item() for p in model.parameters())]

    seen, lines = {"unedited": losses()}, {}
    for edit, (where, name, new) in RUN_EDITS.items():
        with monkeypatch.context() as patch:
            patch.setattr(where, name, new)
            seen[edit], lines[edit] = losses(), capsys.readouterr().out
    assert len({tuple(values) for values in seen.values()}) == 5
    assert {edit for edit in lines if "has changed" in lines[edit]} == {"loss", "bags"}


def test_plain_trains_without_twins_to_the_same_losses(run, monkeypatch):
    knobs = dict(EXPERTS, max_steps=5, overwrite=True)
    fused = [row["loss"] for row in run(**knobs)]
    for twin in TWINS:
        names = [name for name in vars(twin) if name in ("forward", "attend", "mix", "bag_loss")]
        monkeypatch.setattr(twin, names[0], None)
    assert [row["loss"] for row in run(plain=True, **knobs)] == pytest.approx(fused, rel=1e-5)


# ---- twins and their plain modules


@pytest.mark.parametrize("knobs", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("n_in, n_out", [(1, 1), (3, 3), (4, 1), (1, 5)])
def test_a_model_of_twins_is_the_plain_model(knobs, loss, n_in, n_out):
    """In values and gradients, at other shapes than those of the trial, with ignored labels and shares."""
    plain = GPT(GPTConfig(**SHAPE | knobs))
    use_twins(twin := copy.deepcopy(plain), CPU)
    bags, labels = torch.randint(50, (3, 7, n_in)), torch.randint(50, (3, 7, n_out))
    labels[0, 5:] = -100
    share = torch.rand(3, 7, n_in)
    results = []
    for model in (plain, twin):
        value, routing = model(bags, labels, None, loss, None, share / share.sum(-1, keepdim=True))
        value.backward()
        results.append([value, routing, {name: p.grad for name, p in model.named_parameters()}])
    assert_close(*results, rtol=1e-4, atol=1e-5)


TALL, OTHER = [(128, 3, 5), (4096, 8, 16), (4096, 16, 8)], [(100, 3, 5), (48, 40, 40)]


@pytest.mark.parametrize("n, m, k", TALL + OTHER)
def test_tall_product_is_the_product_of_the_transposed(n, m, k):
    a, b = torch.randn(n, m, dtype=torch.float64), torch.randn(n, k, dtype=torch.float64)
    wanted = torch.stack([(a[:, i, None] * b).sum(0) for i in range(m)])
    assert_close(tall_product(a, b), wanted)
    got = tall_product(a.bfloat16(), b.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.double() - wanted).norm() <= 0.01 * wanted.norm()


def test_tall_product_takes_parts_of_tall_matrices_alone():
    """Parts are never larger than the factors."""
    with BigOperations(1) as seen:
        tall_product(torch.randn(128, 3), torch.randn(128, 5))
        tall_product(torch.randn(64, 500), torch.randn(64, 400))
    assert ("bmm.default", 16 * 3 * 5) in seen.counts
    assert max(numel for _, numel in seen.counts) == 500 * 400


@pytest.mark.parametrize("V", [64, 1088])
def test_bag_embedding_never_holds_the_embeddings_of_all_tokens(V):
    table, bags = (
        GPT(GPTConfig(**SHAPE | dict(vocab_size=V, n_embd=300))).embed,
        torch.randint(V, (2, 16, 8)),
    )
    table.__class__ = BagEmbeddingOnCPU
    with BigOperations(2 * 16 * 8 * 300) as big:
        table(bags).sum().backward()
    assert not [name for name, numel in big.counts if numel == 2 * 16 * 8 * 300]


# ---- attention


def attention(window=0):
    layer = Attention(GPTConfig(**SHAPE | dict(attention_window=window)))
    layer.__class__ = AttentionOnCPU
    return layer.attend


def loop_attention(q, k, v, window=0):
    """One head after another: scores, minus infinity where a position sees nothing, softmax, sum."""
    groups, L = q.size(1) // k.size(1), q.size(2)
    unseen = torch.ones(L, L).triu(1) + torch.ones(L, L).tril(-(window or L)) > 0  # (L, L)
    heads = []
    for h in range(q.size(1)):
        scores = q[:, h] @ k[:, h // groups].mT / math.sqrt(q.size(3))  # (B, L, L)
        heads.append(scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v[:, h // groups])
    return torch.stack(heads, dim=1)  # (B, H, L, D)


@pytest.mark.parametrize("L, H, K, window", [(300, 4, 4, 70), (40, 4, 2, 3), (130, 2, 1, 600)])
def test_a_window_by_blocks_equals_a_loop_over_heads(monkeypatch, L, H, K, window):
    """Traced; eager, the plain code runs. On a CPU torch refuses the backward pass that it has."""
    layer = WindowAttention(GPTConfig(**SHAPE | dict(attention_window=window)))
    inputs = leaves((2, H, L, 8), (2, K, L, 8), (2, K, L, 8))
    upstream = torch.randn(2, H, L, 8, dtype=torch.float64)
    traced = torch.compile(layer.attend, backend="eager", fullgraph=True)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    wanted = value_and_gradients(loop_attention, inputs, window, upstream=upstream)
    assert_close(value_and_gradients(traced, inputs, upstream=upstream), wanted)
    assert torch.equal(layer.attend(*inputs), Attention.attend(layer, *inputs))


def test_a_window_by_blocks_is_tried_as_it_is_traced(monkeypatch):
    config = GPTConfig(**SHAPE | dict(n_head=4, n_kv_head=2, attention_window=5))
    trial = lambda: kernels.agree([WindowAttention], config, BFLOAT16, [(4, 4)], "mce", False)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    assert trial()  # a CPU would refuse the backward pass
    monkeypatch.setattr(Attention, "attend", softcapped)
    assert not trial()


def test_a_window_by_blocks_is_only_where_it_can_compile(monkeypatch):
    tried, shape = [], SHAPE | dict(n_embd=32, attention_window=5)
    monkeypatch.setattr(kernels, "agree", lambda twins, *case: not tried.append(twins))
    for device, changes in (
        ("cuda", {}),
        ("cuda", dict(head_dim=8)),
        ("cuda", dict(attention_window=12)),
        ("cuda", dict(attention_window=0)),
        ("cpu", {}),
    ):
        use_twins(GPT(GPTConfig(**shape | changes)), Machine(device, "float32"))
    assert [WindowAttention in twins for twins in tried] == [True, False, False, False, False]


@pytest.mark.parametrize("L", [1, 7, 512, 513])  # short rows and long ones have their own code
@pytest.mark.parametrize("H, K, window", [(4, 4, 0), (4, 2, 3), (3, 1, 600), (2, 2, 1)])
def test_attention_equals_a_loop_over_heads(L, H, K, window):
    inputs = leaves((1, H, L, 8), (1, K, L, 8), (1, K, L, 8))
    upstream = torch.randn(1, H, L, 8, dtype=torch.float64)
    wanted = value_and_gradients(loop_attention, inputs, window, upstream=upstream)
    assert_close(value_and_gradients(attention(window), inputs, upstream=upstream), wanted)
    narrow = [x.detach().bfloat16().requires_grad_() for x in inputs]
    got = value_and_gradients(attention(window), narrow, upstream=upstream.bfloat16())
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == torch.bfloat16 and (x - y).norm() <= 0.015 * y.norm() + 1e-5


def test_attention_survives_scores_whose_exponential_does_not():
    q, k, v = leaves((1, 1, 6, 4), (1, 1, 6, 4), (1, 1, 6, 4), dtype=torch.float32)
    q, k = (200 * q).detach().requires_grad_(), (200 * k).detach().requires_grad_()
    got, wanted = attention()(q, k, v), loop_attention(q.double(), k.double(), v.double())
    assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(got.sum(), (q, k, v)))


def test_bfloat16_attention_sums_in_float32():
    """Even attention over i+1 values, the first 256 of which are 1: all but the sum i+1 is exact, up to the
    last rounding; many sums above 256 would differ in bfloat16. Then the gradient of the last of 512
    positions, whose value is 1 in n places: a score's is (value - n / 512) / 512."""
    L, n = 512, 301
    q, k, v, upstream = (torch.zeros(1, 1, L, 4).bfloat16() for _ in range(4))
    v[:, :, :256] = 1
    exact = torch.tensor([min(1, 256 / (i + 1)) for i in range(L)], dtype=torch.float64)
    assert torch.equal(attention()(q, k, v)[0, 0, :, 0], exact.bfloat16())
    v = torch.zeros_like(v)
    q[..., 0], v[:, :, :n, 0], upstream[:, :, -1, 0] = 2, 1, 512  # 2 times 1 / sqrt(4)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    _, _, grad, _ = value_and_gradients(attention(), inputs, upstream=upstream)
    assert torch.equal(grad[0, 0, :, 0], (v[0, 0, :, 0].double() - n / L).bfloat16())


# ---- rows of a mixture of experts

ROUTINGS = [(6, 2, 4, 4), (200, 2, 4, 4), (100, 3, 16, 5), (5, 1, 1, 1), (1, 4, 4, 4), (3, 1, 9, 2)]


@pytest.mark.parametrize("n, k, n_expert, used", ROUTINGS)
def test_grouped_experts_are_each_positions_weighted_sum(n, k, n_expert, used):
    layer = MoE(GPTConfig(**SHAPE | dict(n_expert=n_expert, top_k=k)))
    layer.__class__ = GroupedMoE
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    experts = torch.stack([torch.randperm(used)[:k] for _ in range(n)])

    def loop(x, weights, gate_up, down):
        rows = [
            sum(w * (swiglu(row @ gate_up[e]) @ down[e]) for w, e in zip(ws, es))
            for row, ws, es in zip(x, weights, experts)
        ]
        return torch.stack(rows)

    inputs = [*leaves((n, 16), (n, k), dtype=torch.float32), layer.gate_up, layer.down]
    grouped = lambda x, weights, *_: layer.mix(x, experts, weights)[0]
    assert_same(grouped, loop, inputs, upstream=torch.randn(n, 16), rtol=1e-4, atol=1e-5)
    load = layer.mix(*inputs[:1], experts, inputs[1])[1]
    assert torch.equal(load, experts.flatten().bincount(minlength=n_expert).float())


# ---- losses from hidden states: against the same loss of all logits


def chunked(name, chunk_rows, **knobs):
    """The loss `name` of hidden states, weight, labels and weights, by kernels.py."""
    how = dict(chunk_rows=chunk_rows, **knobs)
    if name == "mce":
        return lambda *args: linear_multi_hot_cross_entropy(*args, **how)
    return lambda *args: kernels.linear_loss(LOSSES[name], *args, **how)


def plain(name):
    """The same loss of all logits."""
    return lambda hidden, weight, labels, *weights: LOSSES[name](
        hidden @ weight.T, labels, *weights
    )


every_loss = pytest.mark.parametrize("name", LOSSES)


def operands(s, dtype=torch.float64):
    labels = torch.randint(V, (N, s))
    labels[:, -1] = labels[:, 0]  # repeated labels in every bag
    return leaves((N, C), (V, C), dtype=dtype), labels


def with_holes(s):
    labels = operands(s)[1].where(torch.rand(N, s) < 0.6, -100)
    labels[5] = -100  # a position without any label
    labels[14:] = -100  # chunks without any
    return labels


EXACT = dict(rtol=1e-11, atol=1e-13)


@every_loss
@pytest.mark.parametrize("rows", [1, 7, N, N + 1, None])
@pytest.mark.parametrize("s", [1, 5])
def test_chunks_change_nothing(name, rows, s):
    """With all labels, with some and with none, weighted and not, whatever gradient comes in."""
    (inputs, labels), holes = operands(s), with_holes(s)
    upstream = torch.tensor(-3.0).double()
    for some in (labels, holes, torch.full((N, s), -100)):
        for weights in ([], [bag_weights("power", s)]) if name == "mce" else ([],):
            args = inputs, some, *weights
            assert_same(chunked(name, rows), plain(name), *args, upstream=upstream, **EXACT)


@every_loss
def test_padding_rows_get_no_probability_and_no_gradient(name):
    (hidden, weight), labels = operands(4)
    padding = torch.full((27, C), 5.0, dtype=weight.dtype)
    padded = torch.cat((weight.detach(), padding)).requires_grad_()
    got = value_and_gradients(chunked(name, 7, vocab_size=V), [hidden, padded], labels)
    loss, grad_h, grad_w = value_and_gradients(plain(name), [hidden, weight], labels)
    assert_close((*got[:2], got[2][:V]), (loss, grad_h, grad_w))
    assert not got[2][V:].any()


@every_loss
def test_many_chunks_in_bfloat16_are_as_exact_as_one(name):
    """The head's gradients are summed over the chunks in float32; in bfloat16, 64 of them lose a digit."""
    inputs, labels = leaves((2048, C), (V, C), dtype=torch.float32), torch.randint(V, (2048, 3))
    wanted = value_and_gradients(plain(name), inputs, labels)
    errors = []
    for rows in (2048, 32):
        with torch.autocast("cpu", torch.bfloat16):
            got = value_and_gradients(chunked(name, rows), inputs, labels)
        assert all(x.dtype == torch.float32 for x in got)
        errors.append([((x - y).norm() / y.norm()).item() for x, y in zip(got, wanted)])
    assert max(errors[0]) < 0.015 and errors[1][2] < 1.25 * errors[0][2]


def compiled_graphs(f):
    """f compiled without a gap, and the list that will hold its graphs."""
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    return torch.compile(f, backend=backend, fullgraph=True, dynamic=False), graphs


def sizes_of(nodes):
    values = [getattr(node, "meta", {}).get("val") for node in nodes]
    return [value.numel() for value in values if isinstance(value, torch.Tensor)]


LONG = 400  # positions, so many that nothing but all their logits is as large as those


@every_loss
def test_all_logits_are_never_held_at_once(name):
    """Neither in one tensor nor, of one chunk after another, for the backward pass."""
    inputs, labels = leaves((LONG, 2), (V, 2), dtype=torch.float32), torch.randint(V, (LONG, 3))
    kept = {}

    def keep(t):
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    with BigOperations(LONG * 3 + 1) as big:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = chunked(name, 7)(*inputs, labels)
        loss.backward()
    assert all(numel <= LONG * 3 for _, numel in big.counts)  # the labels, or the logits of a chunk
    assert 0 < sum(kept.values()) < 4 * LONG * V / 2


@every_loss
def test_compiled_equals_eager_and_never_holds_all_logits_at_once_either(name):
    torch.compiler.reset()
    inputs, labels = leaves((LONG, 2), (V, 2), dtype=torch.float32), torch.randint(V, (LONG, 3))
    weights, chunk = [bag_weights("power", 3)] if name == "mce" else [], 150
    compiled, graphs = compiled_graphs(chunked(name, chunk))
    assert_same(compiled, chunked(name, chunk), inputs, labels, *weights, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 2  # forward and backward
    for graph in graphs:
        made = sizes_of(node for node in graph.graph.nodes if node.op == "call_function")
        assert made and max(made) <= chunk * V
    kept = sizes_of(
        graphs[0].graph.output_node().args[0]
    )  # the loss, and what its backward pass reads
    assert kept and sum(kept) < LONG * V / 3


# ---- multi-hot cross-entropy, whose gradient is written by hand


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_logits_cost_log_v(dtype, compiled):
    """Not log V / s, not log V - log s, and not rounded to bfloat16, which would be 0.04 % off."""
    torch.compiler.reset()
    form = chunked("mce", 7)
    form = torch.compile(form, backend="aot_eager", fullgraph=True) if compiled else form
    hidden, weight = torch.zeros(N, C, dtype=dtype), torch.randn(V, C, dtype=dtype)
    loss = form(hidden, weight, torch.randint(V, (N, 3)), bag_weights("power", 3))
    assert_close(loss.item(), math.log(V), rtol=1e-6, atol=0)


def test_the_logits_of_a_chunk_are_gone_before_the_next_ones_are_made():
    n = 30_000  # more than a block of the softmax
    inputs, labels = leaves((2 * n, 2), (V, 2), dtype=torch.float32), torch.randint(V, (2 * n, 1))
    with BigOperations(n * V) as seen:
        chunked("mce", n)(*inputs, labels)
    assert seen.most == 1


def test_large_vocabulary_takes_several_blocks_and_chunks():
    """Of 50,257 words a block of the softmax holds 20 rows. The logits are so large that most labels have
    probability 0 in float32, but not minus infinity for its logarithm."""
    hidden = (30 * torch.randn(70, 4, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(50257, 4, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(0, 50257, (70, 3)), bag_weights("power", 3)
    wanted = value_and_gradients(plain("mce"), [hidden, weight], labels, weights)
    narrow = [hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()]
    for inputs, bound in (([hidden, weight], 1e-7), (narrow, 1e-5)):
        got = value_and_gradients(chunked("mce", 45), inputs, labels, weights)
        for x, y in zip(got, wanted, strict=True):
            assert (x - y).norm() < bound * y.norm()


def test_second_derivative_is_refused():
    (hidden, weight), labels = operands(2)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(chunked("mce", 7)(hidden, weight, labels), hidden, create_graph=True)


@pytest.mark.parametrize("with_grad, products", [(True, 3), (False, 1)])
def test_cost_does_not_grow_with_the_bag(with_grad, products):
    """One product with the head (and two for its gradients) and one softmax serve all s labels."""
    counts = []
    for s in (1, 2, 5, 16):
        (hidden, weight), labels = operands(s)
        with BigOperations(N * V) as seen, torch.set_grad_enabled(with_grad):
            linear_multi_hot_cross_entropy(hidden, weight, labels, chunk_rows=N)
        counts.append(seen.counts)
    assert all(c == counts[0] for c in counts)
    assert sum(n for (name, _), n in counts[0].items() if "mm" in name) == products
    assert max(size for _, size in counts[0]) == N * V
