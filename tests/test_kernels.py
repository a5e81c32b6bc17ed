"""nanotst/kernels.py: each function against the plain lines that its docstring says it equals, in values and
gradients, and what it promises beyond them, which is mostly memory."""

import ast
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import tst
from nanotst import kernels
from nanotst.kernels import (
    Take,
    causal_attention,
    compute_dtype,
    embed_bags,
    grouped_product,
    linear,
    linear_loss,
    linear_multi_hot_cross_entropy,
    place_rows,
    rows_of_experts,
    sum_of_experts,
    tall_product,
)
from tst import BAG_WEIGHTS, LOSSES, bag_weights

N, C, V = 20, 12, 37  # positions, width, vocabulary: not multiples of anything
BAG_SIZES = [1, 2, 3, 4, 5, 8, 12, 16]


class BigOperations(TorchDispatchMode):
    """Counts the operations that return at least `size` numbers, by name, and all matrix products."""

    def __init__(self, size):
        super().__init__()
        self.size, self.counts = size, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and (out.numel() >= self.size or "mm" in func.__name__):
            self.counts[func.__name__, out.numel()] += 1
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


# ---- the file


def test_the_file_imports_torch_and_the_standard_library_alone():
    tree = ast.parse(Path(kernels.__file__).read_text(encoding="utf-8"))
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}


def test_products_run_in_the_dtype_of_autocast_where_it_is_on():
    x = torch.zeros(1)
    assert compute_dtype(x) == torch.float32 and compute_dtype(x.double()) == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(x) == torch.bfloat16


# ---- matrix products


@pytest.mark.parametrize(
    "n, m, k", [(128, 3, 5), (4096, 8, 16), (4096, 16, 8), (100, 3, 5), (48, 40, 40)]
)  # in parts, and at once
def test_tall_product_is_the_product_of_the_transposed(n, m, k):
    a, b = torch.randn(n, m, dtype=torch.float64), torch.randn(n, k, dtype=torch.float64)
    wanted = torch.stack([(a[:, i, None] * b).sum(0) for i in range(m)])
    assert_close(tall_product(a, b), wanted)
    got = tall_product(a.bfloat16(), b.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.double() - wanted).norm() <= 0.01 * wanted.norm()


def test_tall_product_takes_no_parts_larger_than_its_factors():
    a, b = torch.randn(64, 500), torch.randn(64, 400)
    with BigOperations(500 * 400 + 1) as big:
        tall_product(a, b)
    assert not [name for name, numel in big.counts if numel > 500 * 400]


def test_tall_product_takes_parts_of_a_tall_matrix():
    with BigOperations(16 * 3 * 5) as big:
        tall_product(torch.randn(128, 3), torch.randn(128, 5))
    assert ("bmm.default", 16 * 3 * 5) in big.counts


@pytest.mark.parametrize("shape", [(7, 12), (4, 64, 12), (2, 3, 5, 12)])
def test_linear_is_torchs_in_value_and_gradients(shape):
    inputs = leaves(shape, (20, 12))
    upstream = torch.randn(*shape[:-1], 20, dtype=torch.float64)
    assert_same(linear, F.linear, inputs, upstream=upstream, rtol=1e-12, atol=1e-12)


def test_linear_follows_the_dtype_of_its_input():
    x, weight = torch.randn(4, 12), torch.randn(20, 12, requires_grad=True)
    y = linear(x.bfloat16(), weight)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert torch.equal(y, F.linear(x.bfloat16(), weight.bfloat16()))


def test_linear_under_autocast_is_torchs():
    inputs = leaves((4, 64, 12), (20, 12), dtype=torch.float32)
    results = []
    for f in (linear, F.linear):
        with torch.autocast("cpu", torch.bfloat16):
            out = f(*inputs)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[0], results[1], rtol=0.02, atol=0.02)


# ---- bag embedding

CASES = [
    (V, torch.float32),
    (1025, torch.float32),
    (V, torch.float64),
    (V, torch.bfloat16),
]  # all codes of a CPU


@pytest.mark.parametrize("V, dtype", CASES)
@pytest.mark.parametrize("s", BAG_SIZES)
def test_bag_embedding_is_that_of_tst_in_value_and_gradient(s, V, dtype):
    bags = torch.randint(5, (2, 16, s))  # 5 ids: many a token is in a bag more than once
    bags[0, 0] = V - 1
    inputs, upstream = leaves((V, C), dtype=dtype), torch.randn(2, 16, C, dtype=dtype)
    got, grad = value_and_gradients(lambda w: embed_bags(bags, w), inputs, upstream=upstream)
    wanted, wanted_grad = value_and_gradients(
        lambda w: tst.embed_bags(bags, w), inputs, upstream=upstream
    )
    tolerance = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 0}[dtype]
    assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert_close(grad, wanted_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("V", [V, 1025])
@pytest.mark.parametrize("s", BAG_SIZES)
def test_bag_embedding_under_autocast_is_that_of_tst(s, V):
    bags, inputs = (
        torch.randint(5, (2, 16, s), dtype=torch.int32),
        leaves((V, C), dtype=torch.float32),
    )
    upstream = torch.randn(2, 16, C).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got, grad = value_and_gradients(lambda w: embed_bags(bags, w), inputs, upstream=upstream)
        wanted, wanted_grad = value_and_gradients(
            lambda w: tst.embed_bags(bags, w), inputs, upstream=upstream
        )
    assert got.dtype == torch.bfloat16 and grad.dtype == torch.float32
    assert_close(
        got, wanted, rtol=2**-7, atol=1e-6
    )  # the order of a float32 sum may move it across a rounding
    assert_close(grad, wanted_grad, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("V, dtype", CASES)
@pytest.mark.parametrize("s", [1, 2, 5, 8])
def test_weighted_bag_embedding_is_that_of_tst_in_value_and_gradient(s, V, dtype):
    bags, share = torch.randint(5, (2, 16, s)), torch.rand(2, 16, s) * (torch.rand(2, 16, s) < 0.7)
    share[..., -1] += 0.1
    share = share / share.sum(-1, keepdim=True)
    inputs, upstream = leaves((V, C), dtype=dtype), torch.randn(2, 16, C, dtype=dtype)
    got, grad = value_and_gradients(lambda w: embed_bags(bags, w, share), inputs, upstream=upstream)
    wanted, wanted_grad = value_and_gradients(
        lambda w: tst.embed_bags(bags, w, share), inputs, upstream=upstream
    )
    tolerance = {torch.float64: 1e-7, torch.float32: 2e-6, torch.bfloat16: 0}[
        dtype
    ]  # of bags of one: 1e-8
    assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert_close(grad, wanted_grad, rtol=tolerance, atol=tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, narrow_grad = value_and_gradients(
            lambda w: embed_bags(bags, w, share), inputs, upstream=upstream.bfloat16()
        )
    assert narrow.dtype == torch.bfloat16 and narrow_grad.dtype == dtype
    assert_close(narrow, wanted.bfloat16(), rtol=2**-7, atol=1e-6)
    assert_close(narrow_grad, wanted_grad, rtol=3e-2, atol=5e-2)


@pytest.mark.parametrize("V, dtype", CASES)
def test_bag_of_one_is_an_embedding_look_up_bit_for_bit(V, dtype):
    tokens, table = torch.randint(V, (2, 5)), torch.randn(V, C, dtype=dtype)
    assert torch.equal(embed_bags(tokens[..., None], table), F.embedding(tokens, table))


@pytest.mark.parametrize("V", [V, 1025])
@pytest.mark.parametrize("s", BAG_SIZES)
def test_identical_tokens_give_the_single_tokens_embedding(s, V):
    table = torch.randn(V, C)
    bags = torch.arange(V)[None, :, None].expand(1, V, s)
    assert torch.equal(embed_bags(bags, table.bfloat16())[0], table.bfloat16())
    assert_close(
        embed_bags(bags, table)[0], table, rtol=s * 2**-23, atol=0
    )  # the float32 sum itself rounds
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embed_bags(bags, table)[0], table.bfloat16())


@pytest.mark.parametrize("s", BAG_SIZES)
def test_bfloat16_mean_errs_by_one_final_rounding(s):
    table, bags = torch.randn(V, C).bfloat16(), torch.randint(V, (2, 30, s))
    exact = table.double()[bags].mean(-2)
    assert (embed_bags(bags, table).double() - exact).abs().le(exact.abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("V", [V, 1025])
def test_bag_embedding_never_holds_the_embeddings_of_all_tokens(V):
    bags, table = torch.randint(V, (2, 16, 8)), torch.randn(V, 300, requires_grad=True)
    with BigOperations(2 * 16 * 8 * 300) as big:
        embed_bags(bags, table).sum().backward()
    assert not [name for name, numel in big.counts if numel == 2 * 16 * 8 * 300]


# ---- attention


def plain_attention(q, k, v):
    """A head after the other: scores, minus infinity for later positions, softmax, weighted sum."""
    groups, L = q.size(1) // k.size(1), q.size(2)
    later = torch.ones(L, L).triu(1).bool()  # (L, L)
    heads = []
    for h in range(q.size(1)):
        scores = q[:, h] @ k[:, h // groups].mT / math.sqrt(q.size(3))  # (B, L, L)
        heads.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v[:, h // groups])
    return torch.stack(heads, dim=1)  # (B, H, L, D)


LENGTHS = [1, 5, 512, 513]  # short rows and long ones have their own code on a CPU


@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (3, 1)])
def test_attention_equals_a_loop_over_heads_and_positions(L, H, K):
    q, k, v = leaves((2, H, L, 8), (2, K, L, 8), (2, K, L, 8), dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    upstream = torch.randn(2, H, L, 8)
    wanted = value_and_gradients(plain_attention, exact, upstream=upstream.double())
    got = value_and_gradients(causal_attention, [q, k, v], upstream=upstream)
    for x, y in zip(got, wanted, strict=True):
        assert_close(x.double(), y, rtol=1e-4, atol=1e-5)
    assert_close(got[0].double(), wanted[0], rtol=1e-5, atol=1e-5)
    if L <= 5:
        assert_close(
            value_and_gradients(causal_attention, exact, upstream=upstream.double()), wanted
        )


def test_attention_survives_scores_whose_exponential_does_not():
    q, k, v = leaves((1, 1, 6, 4), (1, 1, 6, 4), (1, 1, 6, 4), dtype=torch.float32)
    q, k = (200 * q).detach().requires_grad_(), (200 * k).detach().requires_grad_()
    got, wanted = causal_attention(q, k, v), plain_attention(q.double(), k.double(), v.double())
    assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(got.sum(), (q, k, v)))


@pytest.mark.parametrize("L", [5, 64])
def test_bfloat16_attention_is_close_to_float32(L):
    exact = leaves((2, 4, L, 8), (2, 2, L, 8), (2, 2, L, 8), dtype=torch.float32)
    narrow = [x.detach().bfloat16().requires_grad_() for x in exact]
    upstream = torch.randn(2, 4, L, 8)
    wanted = value_and_gradients(plain_attention, exact, upstream=upstream)
    got = value_and_gradients(causal_attention, narrow, upstream=upstream.bfloat16())
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == torch.bfloat16 and (x - y).norm() < 0.015 * y.norm()


def test_bfloat16_attention_sums_its_numerators_in_float32():
    """Even attention over i+1 values, of which the first 256 are 1: all but the sum i+1 is exact, up to the
    last rounding. In bfloat16 many sums above 256 would be another number."""
    L = 512
    q, k, v = (torch.zeros(1, 1, L, 4).bfloat16() for _ in range(3))
    v[:, :, :256] = 1
    exact = torch.tensor([min(1, 256 / (i + 1)) for i in range(L)], dtype=torch.float64)
    assert torch.equal(causal_attention(q, k, v)[0, 0, :, 0], exact.bfloat16())


def test_bfloat16_attention_sums_its_gradients_in_float32():
    """The gradient reaches the last of 512 evenly attended positions, whose value is 1 in n places: the
    gradient of a score is (value - n / 512) / 512, exact up to the last rounding if n is."""
    L, n = 512, 301
    q, k, v, upstream = (torch.zeros(1, 1, L, 4).bfloat16() for _ in range(4))
    q[..., 0] = 2  # times 1 / sqrt(4)
    v[:, :, :n, 0] = 1
    upstream[:, :, -1, 0] = 512
    inputs = [x.requires_grad_() for x in (q, k, v)]
    _, _, grad, _ = value_and_gradients(causal_attention, inputs, upstream=upstream)
    exact = (v[0, 0, :, 0].double() - n / L).bfloat16()
    assert torch.equal(grad[0, 0, :, 0], exact)


# ---- rows of a mixture of experts


def placement(n, k, n_expert, used=None, dtype=torch.float64):
    """The placement of n positions' k different experts, of the first `used` ones."""
    experts = torch.stack([torch.randperm(used or n_expert)[:k] for _ in range(n)])
    return experts, place_rows(experts, n_expert, dtype)


ROUTINGS = [
    (6, 2, 4, None),
    (200, 2, 4, None),
    (100, 3, 16, 5),
    (5, 1, 1, None),
    (1, 4, 4, None),
    (3, 1, 9, 2),
]


@pytest.mark.parametrize("n, k, n_expert, used", ROUTINGS)
def test_each_pair_has_a_row_of_its_expert_in_the_order_of_positions(n, k, n_expert, used):
    experts, place = placement(n, k, n_expert, used)
    pairs = experts.flatten().tolist()
    ends = place.offsets.tolist()
    begins = [0, *ends[:-1]]
    assert place.offsets.dtype == torch.int32
    assert place.load.tolist() == [pairs.count(e) for e in range(n_expert)]
    assert place.load.dtype == torch.float32
    assert [end - begin for begin, end in zip(begins, ends)] == [
        -(-pairs.count(e) // 64) * 64 for e in range(n_expert)
    ]
    for e in range(n_expert):
        rows = [place.row_of[i].item() for i, expert in enumerate(pairs) if expert == e]
        assert rows == list(range(begins[e], begins[e] + len(rows)))  # without gaps, in order
    assert ends[-1] <= len(place.pair_of) == len(place.filled)


@pytest.mark.parametrize("n, k, n_expert, used", ROUTINGS)
def test_a_row_knows_its_pair_and_whether_it_is_empty(n, k, n_expert, used):
    _, place = placement(n, k, n_expert, used, torch.bfloat16)
    row_of = place.row_of.tolist()
    assert place.filled.dtype == torch.bfloat16 and place.filled.shape == (len(place.pair_of), 1)
    for row, (pair, filled) in enumerate(zip(place.pair_of.tolist(), place.filled[:, 0].tolist())):
        assert filled == (row in row_of)
        assert pair == (row_of.index(row) if filled else 0)


def test_the_number_of_rows_depends_on_the_shape_alone():
    """It is the least that is always enough: up to 63 empty ones for each expert that may be chosen."""
    for n, k, n_expert in ((50, 2, 8), (3, 1, 9)):
        sizes = {len(placement(n, k, n_expert, used)[1].pair_of) for used in (2, 3, n_expert)}
        assert sizes == {n * k + 63 * min(n_expert, n * k)}


@pytest.mark.parametrize("n, k, n_expert, used", ROUTINGS)
def test_rows_of_experts_are_the_positions_of_their_pairs(n, k, n_expert, used):
    _, place = placement(n, k, n_expert, used)
    upstream = torch.randn(len(place.pair_of), C, dtype=torch.float64) * place.filled
    assert_same(
        lambda x: rows_of_experts(x, place),
        lambda x: x[place.pair_of // k],
        leaves((n, C)),
        upstream=upstream,
    )


@pytest.mark.parametrize("n, k, n_expert, used", ROUTINGS)
def test_sum_of_experts_is_the_weighted_sum_of_a_positions_rows(n, k, n_expert, used):
    _, place = placement(n, k, n_expert, used)

    def plain(rows, weights):
        sums = [
            sum(weights[i, j] * rows[place.row_of[i * k + j]] for j in range(k)) for i in range(n)
        ]
        return torch.stack(sums)

    inputs, upstream = (
        leaves((len(place.pair_of), C), (n, k)),
        torch.randn(n, C, dtype=torch.float64),
    )
    assert_same(
        lambda rows, weights: sum_of_experts(rows, weights, place), plain, inputs, upstream=upstream
    )


@pytest.mark.parametrize("k", [1, 3])
def test_take_is_a_look_up_in_value_and_gradient(k):
    index = torch.randperm(5 * k)
    inverse = index.argsort()
    upstream = torch.randn(5 * k, C, dtype=torch.float64)
    assert_same(
        lambda x: Take.apply(x, index, inverse, k),
        lambda x: x[index // k],
        leaves((5, C)),
        upstream=upstream,
    )


@pytest.mark.parametrize("ends", [[3, 9, 9, 16], [0, 0, 16, 16], [16, 16, 16, 16]])
def test_grouped_product_is_a_product_for_each_expert(ends):
    def plain(x, weight):
        return torch.cat([x[a:b] @ w for a, b, w in zip([0, *ends], ends, weight)])

    inputs, upstream = leaves((16, 8), (4, 8, 4), dtype=torch.float32), torch.randn(16, 4)
    offsets = torch.tensor(ends, dtype=torch.int32)
    assert_same(
        lambda x, w: grouped_product(x, w, offsets),
        plain,
        inputs,
        upstream=upstream,
        rtol=1e-5,
        atol=1e-5,
    )


def test_grouped_product_follows_the_dtype_of_its_rows():
    x, weight = torch.randn(16, 8).bfloat16(), torch.randn(2, 8, 8, requires_grad=True)
    y = grouped_product(x, weight, torch.tensor([5, 16], dtype=torch.int32))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


# ---- losses from hidden states: against the same loss of all logits


def fused(chunk_rows, **knobs):
    return lambda hidden, weight, labels, weights=None: linear_multi_hot_cross_entropy(
        hidden, weight, labels, weights, chunk_rows=chunk_rows, **knobs
    )


def loop_of_cross_entropies(hidden, weight, labels, weights=None):
    """The definition of MCE in the paper: a cross-entropy for each place i in the bag, summed by weight."""
    logits = (hidden @ weight.T).flatten(0, -2)
    loss = 0 * logits.sum()
    for i in range(labels.size(-1)):
        labels_i = labels.flatten(0, -2)[:, i].long()
        if (labels_i != -100).any():
            w = 1 / labels.size(-1) if weights is None else weights[i].item()
            loss = loss + w * F.cross_entropy(logits, labels_i)
    return loss


others = pytest.mark.parametrize("name", [name for name in LOSSES if name != "mce"])
every_loss = pytest.mark.parametrize("name", LOSSES)


def chunked(name, chunk_rows, **knobs):
    """The loss `name` of hidden states, weight and labels, by kernels.py."""
    if name == "mce":
        return fused(chunk_rows, **knobs)
    return lambda hidden, weight, labels: linear_loss(
        LOSSES[name], hidden, weight, labels, chunk_rows=chunk_rows, **knobs
    )


def plain(name, **knobs):
    """The same loss of all logits."""
    return lambda hidden, weight, labels: LOSSES[name](hidden @ weight.T, labels, **knobs)


def operands(s, dtype=torch.float64):
    labels = torch.randint(V, (N, s))
    labels[:, -1] = labels[:, 0]  # repeated labels in every bag
    return leaves((N, C), (V, C), dtype=dtype), labels


def with_holes(s):
    inputs, labels = operands(s)
    labels = labels.where(torch.rand(N, s) < 0.6, -100)
    labels[5] = -100  # a position without any label
    labels[14:] = -100  # chunks without any
    return inputs, labels


EXACT = dict(rtol=1e-11, atol=1e-13)


@every_loss
@pytest.mark.parametrize("rows", [1, 3, 7, N - 1, N, N + 1, None])
def test_chunks_change_nothing(name, rows):
    assert_same(chunked(name, rows), plain(name), *operands(5), **EXACT)
    assert_same(chunked(name, rows), plain(name), *with_holes(5), **EXACT)


@every_loss
@pytest.mark.parametrize("s", BAG_SIZES)
def test_losses_of_hidden_states_leave_out_ignored_labels(name, s):
    assert_same(chunked(name, 7), plain(name), *with_holes(s), **EXACT)


@every_loss
def test_any_other_number_can_mark_ignored_labels(name):
    inputs, labels = with_holes(4)
    labels = labels.where(labels >= 0, 7)
    assert_same(
        chunked(name, 6, ignore_index=7), plain(name, ignore_index=7), inputs, labels, **EXACT
    )


@every_loss
@pytest.mark.parametrize("s", [1, 3])
def test_without_any_label_loss_and_gradients_are_zero(name, s):
    inputs, _ = operands(s)
    value, *grads = value_and_gradients(chunked(name, 7), inputs, torch.full((N, s), -100))
    assert value.item() == 0 and not any(grad.any() for grad in grads)


@every_loss
def test_padding_rows_get_no_probability_and_no_gradient(name):
    (hidden, weight), labels = operands(4)
    padded = torch.cat(
        (weight.detach(), torch.full((27, C), 5.0, dtype=weight.dtype))
    ).requires_grad_()
    got = value_and_gradients(chunked(name, 7, vocab_size=V), [hidden, padded], labels)
    loss, grad_h, grad_w = value_and_gradients(plain(name), [hidden, weight], labels)
    assert_close(got[:2], (loss, grad_h))
    assert_close(got[2][:V], grad_w)
    assert not got[2][V:].any()


@every_loss
def test_batch_dimensions_are_flattened(name):
    (hidden, weight), labels = operands(3)
    assert_close(
        chunked(name, 7)(hidden.view(4, 5, C), weight, labels.view(4, 5, 3).int()),
        plain(name)(hidden, weight, labels),
        **EXACT,
    )


@every_loss
def test_incoming_gradient_scales_both_gradients(name):
    args = operands(4)
    _, *once = value_and_gradients(chunked(name, 7), *args)
    _, *thrice = value_and_gradients(chunked(name, 7), *args, upstream=torch.tensor(-3.0).double())
    assert_close(thrice, [-3 * g for g in once])


@every_loss
def test_without_gradients_the_value_is_the_same(name):
    (hidden, weight), labels = operands(4)
    with torch.no_grad():
        loss = chunked(name, 7)(hidden, weight, labels)
    assert not loss.requires_grad and torch.equal(
        loss, chunked(name, 7)(hidden, weight, labels).detach()
    )
    loss = chunked(name, 7)(hidden.detach(), weight.detach(), labels)
    assert not loss.requires_grad


@every_loss
@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_by_one_of_the_two_alone(name, which):
    inputs, labels = operands(4)
    inputs[1 - which] = inputs[1 - which].detach()
    (grad,) = torch.autograd.grad(chunked(name, 7)(*inputs, labels), inputs[which])
    (wanted,) = torch.autograd.grad(plain(name)(*inputs, labels), inputs[which])
    assert_close(grad, wanted, **EXACT)


@every_loss
def test_bfloat16_autocast_is_close_to_float32(name):
    args = operands(8, torch.float32)
    wanted = value_and_gradients(chunked(name, 7), *args)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_gradients(chunked(name, 7), *args)
    assert all(g.dtype == torch.float32 for g in got)
    for g, w in zip(got, wanted):
        assert (g - w).norm() < 0.01 * w.norm()


@every_loss
def test_many_chunks_in_bfloat16_are_as_exact_as_one(name):
    """The sum over chunks of the head's gradients is in float32; in bfloat16, 64 of them lose a digit."""
    inputs, labels = leaves((2048, C), (V, C), dtype=torch.float32), torch.randint(V, (2048, 3))
    wanted = value_and_gradients(plain(name), inputs, labels)[2]
    errors = []
    for rows in (2048, 32):
        with torch.autocast("cpu", torch.bfloat16):
            got = value_and_gradients(chunked(name, rows), inputs, labels)[2]
        errors.append((got - wanted).norm() / wanted.norm())
    assert errors[1] < 1.25 * errors[0]


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
@pytest.mark.parametrize("s", [1, 3])
def test_all_logits_are_never_held_at_once(name, s):
    """Neither in one tensor nor, of one chunk after the other, for the backward pass."""
    inputs, labels, kept = (
        leaves((LONG, 2), (V, 2), dtype=torch.float32),
        torch.randint(V, (LONG, s)),
        {},
    )

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
    weights = [bag_weights("power", 3)] if name == "mce" else []
    chunk = 150
    compiled, graphs = compiled_graphs(chunked(name, chunk))
    assert_same(compiled, chunked(name, chunk), inputs, labels, *weights, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 2  # forward and backward
    for graph in graphs:
        made = sizes_of(node for node in graph.graph.nodes if node.op == "call_function")
        assert made and max(made) <= chunk * V
    kept = sizes_of(
        graphs[0].graph.output_node().args[0]
    )  # what the backward pass will read, and the loss
    assert kept and sum(kept) < LONG * V / 3


# ---- multi-hot cross-entropy, by its hand-written gradient


@pytest.mark.parametrize("s", BAG_SIZES)
@pytest.mark.parametrize("kind", BAG_WEIGHTS)
def test_fused_loss_equals_the_loop_of_cross_entropies(kind, s):
    assert_same(fused(7), loop_of_cross_entropies, *operands(s), bag_weights(kind, s), **EXACT)
    assert_same(fused(7), loop_of_cross_entropies, *with_holes(s), bag_weights(kind, s), **EXACT)


@pytest.mark.parametrize("rows", [1, 3, N - 1, N, N + 1, None])
def test_chunks_change_nothing_of_a_weighted_loss(rows):
    assert_same(
        fused(rows), loop_of_cross_entropies, *operands(5), bag_weights("power", 5), **EXACT
    )


def test_weights_are_uniform_by_default():
    inputs, labels = operands(4)
    uniform = torch.full((4,), 0.25)
    assert_close(fused(7)(*inputs, labels), fused(7)(*inputs, labels, uniform), rtol=1e-12, atol=0)
    assert_same(fused(7), loop_of_cross_entropies, *operands(3), **EXACT)


@pytest.mark.parametrize("kind", BAG_WEIGHTS)
@pytest.mark.parametrize("s", BAG_SIZES)
def test_zero_logits_cost_log_v(kind, s):
    """Not log V / s, not log V - log s."""
    loss = fused(7)(
        torch.zeros(N, C), torch.randn(V, C), torch.randint(V, (N, s)), bag_weights(kind, s)
    )
    assert_close(loss.item(), math.log(V), rtol=1e-6, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_zero_logits_cost_log_v_in_bfloat16_too(compiled):
    """Softmax and its log-sum-exp are in float32: log V rounded to bfloat16 would be 0.04 % off."""
    torch.compiler.reset()
    form = torch.compile(fused(7), backend="aot_eager", fullgraph=True) if compiled else fused(7)
    hidden, weight = torch.zeros(N, C).bfloat16(), torch.randn(V, C).bfloat16()
    loss = form(hidden, weight, torch.randint(V, (N, 3)))
    assert_close(loss.item(), math.log(V), rtol=1e-6, atol=0)


class LivingAtOnce(TorchDispatchMode):
    """The largest number of tensors of `size` numbers that were in memory at once."""

    def __init__(self, size):
        super().__init__()
        self.size, self.living, self.most = size, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.size:
            ref = StorageWeakRef(out.untyped_storage())
            self.living[ref.cdata] = ref
        self.living = {key: ref for key, ref in self.living.items() if not ref.expired()}
        self.most = max(self.most, len(self.living))
        return out


def test_the_logits_of_a_chunk_are_gone_before_the_next_ones_are_made():
    inputs, labels = leaves((70, 2), (V, 2), dtype=torch.float32), torch.randint(V, (70, 3))
    with LivingAtOnce(7 * V) as seen:
        fused(7)(*inputs, labels)
    assert seen.most == 2  # logits and, while they are turned into it, their softmax


def test_one_label_is_ordinary_cross_entropy():
    def ordinary(hidden, weight, labels):
        return F.cross_entropy(hidden @ weight.T, labels[:, 0])

    assert_same(fused(7), ordinary, *operands(1), rtol=1e-13, atol=1e-15)
    assert_same(fused(7), ordinary, *operands(1, torch.float32), rtol=1e-5, atol=1e-7)


def test_a_label_that_occurs_twice_counts_twice():
    """At zero logits the gradient of the loss by the logits is 1/V minus the label distribution."""
    A, B, D = 3, 11, 30
    logits = torch.zeros(1, V, dtype=torch.float64, requires_grad=True)
    loss = fused(7)(logits, torch.eye(V, dtype=torch.float64), torch.tensor([[A, A, B, D]]))
    (grad,) = torch.autograd.grad(loss, logits)
    distribution = 1 / V - grad[0]
    assert_close(distribution[[A, B, D]], torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64))
    assert distribution.abs().gt(1e-12).sum() == 3


def test_an_offset_without_labels_counts_zero():
    """Zero, not NaN, and the other offsets keep their weights."""
    inputs, labels = with_holes(4)
    labels[:, 0] = -100  # with weights "first" nothing is left
    for kind in ("power", "first"):
        assert_same(
            fused(7), loop_of_cross_entropies, inputs, labels, bag_weights(kind, 4), **EXACT
        )


def test_large_vocabulary_takes_several_blocks_and_chunks():
    """Of 50,257 words a block of the softmax holds 20 rows. The logits are so large that most labels have
    probability 0 in float32, but not minus infinity for its logarithm."""
    hidden = (30 * torch.randn(70, 4, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(50257, 4, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(0, 50257, (70, 3)), bag_weights("power", 3)
    assert_same(
        fused(45), loop_of_cross_entropies, [hidden, weight], labels, weights, rtol=1e-7, atol=1e-12
    )
    narrow = [hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()]
    got = value_and_gradients(fused(45), narrow, labels, weights)
    wanted = value_and_gradients(loop_of_cross_entropies, [hidden, weight], labels, weights)
    for x, y in zip(got, wanted, strict=True):
        assert (x - y).norm() < 1e-5 * y.norm()


def test_bfloat16_autocast_is_close_to_float32_with_weights():
    args = *operands(8, torch.float32), bag_weights("power", 8)
    wanted = value_and_gradients(fused(7), *args)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_gradients(fused(7), *args)
    assert all(g.dtype == torch.float32 for g in got)
    for g, w in zip(got, wanted):
        assert (g - w).norm() < 0.01 * w.norm()


def test_second_derivative_is_refused():
    (hidden, weight), labels = operands(2)
    with pytest.raises(RuntimeError, match="multi_hot_cross_entropy"):
        torch.autograd.grad(fused(7)(hidden, weight, labels), hidden, create_graph=True)


@pytest.mark.parametrize("with_grad, products", [(True, 3), (False, 1)])
def test_cost_does_not_grow_with_the_bag(with_grad, products):
    """One product with the head (and two for its gradients) and one softmax serve all s labels."""
    counts = []
    for s in BAG_SIZES:
        (hidden, weight), labels = operands(s)
        with BigOperations(N * V) as seen, torch.set_grad_enabled(with_grad):
            linear_multi_hot_cross_entropy(hidden, weight, labels, chunk_rows=N)
        counts.append(seen.counts)
    assert all(c == counts[0] for c in counts)
    assert sum(n for (name, _), n in counts[0].items() if "mm" in name) == products
    assert max(size for _, size in counts[0]) == N * V


@pytest.mark.parametrize("L", [7, 600])  # both codes on a CPU
@pytest.mark.parametrize("window", [1, 3, 6, 7, 100])
def test_a_window_is_attention_to_the_positions_in_it(L, window):
    """Against a softmax over the visible positions of each query, in float64; window positions, the query's
    own among them."""
    q, k, v = (torch.randn(1, 2, L, 4, requires_grad=True) for _ in range(3))
    out, upstream = kernels.causal_attention(q, k, v, window), torch.randn(1, 2, L, 4)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    rows = []
    for i in range(L):
        seen = slice(max(0, i - window + 1), i + 1)
        p = (exact[1][:, :, seen] @ exact[0][:, :, i, :, None] / 2).softmax(2)  # (1, H, n, 1)
        rows.append((p * exact[2][:, :, seen]).sum(2))
    wanted = torch.stack(rows, 2)
    assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    out.backward(upstream)
    wanted.backward(upstream.double())
    for x, y in zip((q, k, v), exact):
        assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-5)
