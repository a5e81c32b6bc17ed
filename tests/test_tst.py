"""tst.py against plain loops: what Token Superposition Training promises, function by function."""
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from tst import (BAG_WEIGHTS, bag_size_at, bag_weights, bags_and_labels, embed_bags, fold,
                 linear_multi_hot_cross_entropy, multi_hot_cross_entropy, tall_product)

N, C, V = 20, 12, 37  # positions, width, vocabulary: not multiples of anything
BAG_SIZES = [1, 2, 3, 4, 5, 8, 12, 16]


# ---- phase, folding, input, target

def test_phase_is_a_function_of_the_step():
    assert [bag_size_at(step, 4, 3) for step in range(6)] == [4, 4, 4, 1, 1, 1]
    assert bag_size_at(0, 4, 0) == 1  # no superposition at all


def test_fold_keeps_the_order_of_tokens():
    assert fold(torch.arange(12).view(2, 6), 3).tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
    for bag_size in (4, 0, -1):
        with pytest.raises(ValueError, match="do not fold"):
            fold(torch.zeros(2, 6), bag_size)


@pytest.mark.parametrize("s", BAG_SIZES)
def test_target_is_the_next_bag_and_shares_no_token_with_the_input(s):
    """Trap 1. Tokens are their own positions in the stream, so equality of tokens is equality of positions."""
    bags, labels = bags_and_labels(torch.arange(5 * s)[None], s)
    assert bags.shape == labels.shape == (1, 4, s)
    for j in range(4):
        assert bags[0, j].tolist() == list(range(j * s, (j + 1) * s))
        assert labels[0, j].tolist() == list(range((j + 1) * s, (j + 2) * s))


# ---- the embedding of a bag

@pytest.mark.parametrize("V, dtype", [(V, torch.float32), (1500, torch.float32), (V, torch.float64)])  # three codes on a CPU
@pytest.mark.parametrize("s", BAG_SIZES)
def test_bag_embedding_is_the_mean_in_value_and_gradient(s, V, dtype):
    bags = torch.randint(5, (2, 3, s), dtype=torch.int32)  # 5 ids: many a token is in a bag more than once
    table, upstream = torch.randn(V, C, dtype=dtype, requires_grad=True), torch.randn(2, 3, C, dtype=dtype)
    out = embed_bags(bags, table)
    out.backward(upstream)
    for b in range(2):
        for j in range(3):
            mean = sum(table[token].double() for token in bags[b, j].tolist()) / s
            assert_close(out[b, j].double(), mean, rtol=1e-5, atol=1e-6)
    grad = torch.zeros(V, C, dtype=torch.float64)
    for b in range(2):
        for j in range(3):
            for token in bags[b, j].tolist():
                grad[token] += upstream[b, j].double() / s
    assert_close(table.grad.double(), grad, rtol=1e-5, atol=1e-6)
    table.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        embed_bags(bags, table).backward(upstream.bfloat16())
    assert_close(table.grad.double(), grad, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bag_of_one_is_an_embedding_look_up_bit_for_bit(dtype):
    """Trap 3, input side."""
    tokens, table = torch.randint(V, (2, 5)), torch.randn(V, C, dtype=dtype)
    assert torch.equal(embed_bags(tokens[..., None], table), F.embedding(tokens, table))


@pytest.mark.parametrize("s", BAG_SIZES)
def test_identical_tokens_give_the_single_tokens_embedding(s):
    """Trap 4: no 1/sqrt(s), no signal of the place in the bag, no sum in bfloat16 (exact: the sum is in float32)."""
    table = torch.randn(V, C)
    bags = torch.arange(V)[None, :, None].expand(1, V, s)
    assert torch.equal(embed_bags(bags, table.bfloat16())[0], table.bfloat16())
    assert_close(embed_bags(bags, table)[0], table, rtol=s * 2**-23, atol=0)  # the float32 sum itself rounds
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embed_bags(bags, table)[0], table.bfloat16())


@pytest.mark.parametrize("s", BAG_SIZES)
def test_bfloat16_mean_errs_by_one_final_rounding(s):
    """Trap 4, mixed bags."""
    table, bags = torch.randn(V, C).bfloat16(), torch.randint(V, (2, 30, s))
    exact = table.double()[bags].mean(-2)
    assert (embed_bags(bags, table).double() - exact).abs().le(exact.abs() * 2**-8 + 1e-6).all()


# ---- the weights of a bag's labels

BY_HAND = {"uniform": lambda i: 1, "power": lambda i: 1 / i, "exponential": lambda i: math.exp(-i),
           "first": lambda i: float(i == 1), "fitted": lambda i: 3.63 + 1.35 * i**-1.25}


@pytest.mark.parametrize("s", BAG_SIZES)
@pytest.mark.parametrize("kind", BAG_WEIGHTS)
def test_bag_weights(kind, s):
    by_hand = [BY_HAND[kind](i) for i in range(1, s + 1)]
    assert_close(bag_weights(kind, s), torch.tensor([w / sum(by_hand) for w in by_hand]))


def test_bag_weights_refuse_another_kind_and_take_the_constant_of_the_fit():
    with pytest.raises(ValueError, match="uniform, power"):
        bag_weights("unifrom", 4)
    assert_close(bag_weights("fitted", 2, c0=0.0)[1] / bag_weights("fitted", 2, c0=0.0)[0], torch.tensor(2**-1.25))


# ---- the loss: the readable form and the fused form, against the paper's loop of cross-entropies

def loop_of_cross_entropies(hidden, weight, labels, weights):
    """The definition in the paper: a cross-entropy for each place i in the bag, summed by weight."""
    logits, loss = (hidden @ weight.T).flatten(0, -2), 0.0
    for i, w in enumerate(weights.tolist()):
        labels_i = labels.flatten(0, -2)[:, i].long()
        if (labels_i != -100).any():
            loss = loss + w * F.cross_entropy(logits, labels_i)
    return loss


def readable(hidden, weight, labels, weights=None):
    return multi_hot_cross_entropy(hidden @ weight.T, labels, weights)


def fused(chunk_rows):
    return lambda hidden, weight, labels, weights=None: linear_multi_hot_cross_entropy(
        hidden, weight, labels, weights, chunk_rows=chunk_rows)


both_forms = pytest.mark.parametrize("form", [readable, fused(7)], ids=["readable", "fused"])


def operands(s, dtype=torch.float64):
    labels = torch.randint(V, (N, s))
    labels[:, -1] = labels[:, 0]  # repeated labels in every bag
    return torch.randn(N, C, dtype=dtype, requires_grad=True), torch.randn(V, C, dtype=dtype, requires_grad=True), labels


def value_and_gradients(form, hidden, weight, *args, upstream=1.0):
    loss = form(hidden, weight, *args)
    return loss, *torch.autograd.grad(upstream * loss, (hidden, weight))


def assert_same(form, reference, *args, **tolerance):
    for got, wanted in zip(value_and_gradients(form, *args), value_and_gradients(reference, *args), strict=True):
        assert_close(got, wanted, **tolerance)


@both_forms
@pytest.mark.parametrize("s", BAG_SIZES)
@pytest.mark.parametrize("kind", BAG_WEIGHTS)
def test_loss_equals_the_loop_of_cross_entropies(form, kind, s):
    assert_same(form, loop_of_cross_entropies, *operands(s), bag_weights(kind, s), rtol=1e-11, atol=1e-13)


@both_forms
def test_weights_are_uniform_by_default(form):
    args = operands(4)
    assert_close(form(*args), form(*args, torch.full((4,), 0.25)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [1, 3, N - 1, N, N + 1, None])
def test_chunks_change_nothing(rows):
    assert_same(fused(rows), loop_of_cross_entropies, *operands(5), bag_weights("power", 5), rtol=1e-11, atol=1e-13)


@both_forms
@pytest.mark.parametrize("kind", BAG_WEIGHTS)
@pytest.mark.parametrize("s", BAG_SIZES)
def test_zero_logits_cost_log_v(form, kind, s):
    """Trap 2: not log V / s, not log V - log s."""
    loss = form(torch.zeros(N, C), torch.randn(V, C), torch.randint(V, (N, s)), bag_weights(kind, s))
    assert_close(loss.item(), math.log(V), rtol=1e-6, atol=0)


@both_forms
def test_one_label_is_ordinary_cross_entropy(form):
    """Trap 3, output side."""
    def ordinary(hidden, weight, labels):
        return F.cross_entropy(hidden @ weight.T, labels[:, 0])
    assert_same(form, ordinary, *operands(1), rtol=1e-13, atol=1e-15)
    assert_same(form, ordinary, *operands(1, torch.float32), rtol=1e-5, atol=1e-7)


def test_one_label_is_ordinary_cross_entropy_bit_for_bit():
    """Trap 3, output side, readable form, float32."""
    logits, labels = torch.randn(64, V), torch.randint(V, (64, 1))
    assert torch.equal(multi_hot_cross_entropy(logits, labels), F.cross_entropy(logits, labels[:, 0]))


@both_forms
def test_a_label_that_occurs_twice_counts_twice(form):
    """Trap 5. At zero logits the gradient of the loss by the logits is 1/V minus the label distribution."""
    A, B, D = 3, 11, 30
    logits = torch.zeros(1, V, dtype=torch.float64, requires_grad=True)
    grad, = torch.autograd.grad(form(logits, torch.eye(V, dtype=torch.float64), torch.tensor([[A, A, B, D]])), logits)
    distribution = 1 / V - grad[0]
    assert_close(distribution[[A, B, D]], torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64))
    assert distribution.abs().gt(1e-12).sum() == 3


def with_holes(s):
    hidden, weight, labels = operands(s)
    labels = labels.where(torch.rand(N, s) < 0.6, -100)
    labels[5] = -100  # a position without any label
    return hidden, weight, labels


@both_forms
@pytest.mark.parametrize("kind", BAG_WEIGHTS)
@pytest.mark.parametrize("s", BAG_SIZES)
def test_ignored_labels_leave_the_mean_of_their_own_offset(form, kind, s):
    """Trap 6: each place in the bag has its own number of valid labels."""
    assert_same(form, loop_of_cross_entropies, *with_holes(s), bag_weights(kind, s), rtol=1e-11, atol=1e-13)


@both_forms
def test_an_offset_without_labels_counts_zero(form):
    """Trap 6: zero, not NaN, and the other offsets keep their weights."""
    hidden, weight, labels = with_holes(4)
    labels[:, 0] = -100  # with weights "first" nothing is left
    for kind in ("power", "first"):
        args = hidden, weight, labels, bag_weights(kind, 4)
        for got, wanted in zip(value_and_gradients(form, *args), value_and_gradients(
                lambda *a: hidden.sum() * 0 + weight.sum() * 0 + loop_of_cross_entropies(*a), *args), strict=True):
            assert_close(got, wanted, rtol=1e-11, atol=1e-13)


@both_forms
def test_batch_dimensions_are_flattened(form):
    hidden, weight, labels = operands(3)
    assert_close(form(hidden.view(4, 5, C), weight, labels.view(4, 5, 3)), form(hidden, weight, labels))


# ---- the fused form alone

def test_padding_rows_get_no_probability_and_no_gradient():
    hidden, weight, labels = operands(4)
    padded = torch.cat((weight.detach(), torch.full((27, C), 5.0, dtype=weight.dtype))).requires_grad_()
    got = value_and_gradients(lambda h, w, y: linear_multi_hot_cross_entropy(h, w, y, vocab_size=V, chunk_rows=7),
                              hidden, padded, labels)
    loss, grad_h, grad_w = value_and_gradients(fused(7), hidden, weight, labels)
    assert_close(got[:2], (loss, grad_h))
    assert_close(got[2][:V], grad_w)
    assert not got[2][V:].any()


def test_large_vocabulary_takes_several_blocks_and_chunks():
    """Of 50,257 words a block of the softmax holds 20 rows. The logits are so large that most labels have probability 0
    in float32, but not minus infinity for its logarithm."""
    hidden = (30 * torch.randn(70, 4, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(50257, 4, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(0, 50257, (70, 3)), bag_weights("power", 3)
    assert_same(fused(45), loop_of_cross_entropies, hidden, weight, labels, weights, rtol=1e-7, atol=1e-12)
    narrow = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    for got, wanted in zip(value_and_gradients(fused(45), *narrow, labels, weights),
                           value_and_gradients(loop_of_cross_entropies, hidden, weight, labels, weights)):
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_incoming_gradient_scales_both_gradients():
    args = *operands(4), bag_weights("power", 4)
    _, *once = value_and_gradients(fused(7), *args)
    _, *thrice = value_and_gradients(fused(7), *args, upstream=-3.0)
    assert_close(thrice, [-3 * g for g in once])


def test_without_gradients_the_value_is_the_same():
    args = operands(4)
    with torch.no_grad():
        loss = fused(7)(*args)
    assert not loss.requires_grad and torch.equal(loss, fused(7)(*args).detach())


def test_bfloat16_autocast_is_close_to_float32():
    args = *operands(8, torch.float32), bag_weights("power", 8)
    wanted = value_and_gradients(fused(7), *args)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_gradients(fused(7), *args)
    assert all(g.dtype == torch.float32 for g in got)
    for g, w in zip(got, wanted):
        assert (g - w).norm() < 0.01 * w.norm()


def test_second_derivative_is_refused():
    hidden, weight, labels = operands(2)
    with pytest.raises(RuntimeError, match="multi_hot_cross_entropy"):
        torch.autograd.grad(fused(7)(hidden, weight, labels), hidden, create_graph=True)


def test_compiled_equals_eager():
    compiled = torch.compile(fused(7), backend="aot_eager", fullgraph=True)
    assert_same(compiled, fused(7), *operands(4, torch.float32), bag_weights("power", 4), rtol=1e-5, atol=1e-7)


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


@pytest.mark.parametrize("with_grad, products", [(True, 3), (False, 1)])
def test_cost_does_not_grow_with_the_bag(with_grad, products):
    """Trap 7: one product with the head (and two for its gradients) and one softmax serve all s labels."""
    counts = []
    for s in BAG_SIZES:
        hidden, weight, labels = operands(s)
        with BigOperations(N * V) as seen, torch.set_grad_enabled(with_grad):
            linear_multi_hot_cross_entropy(hidden, weight, labels, chunk_rows=N)
        counts.append(seen.counts)
    assert all(c == counts[0] for c in counts)
    assert sum(n for (name, _), n in counts[0].items() if "mm" in name) == products
    assert max(size for _, size in counts[0]) == N * V


# ---- gradients of weights

@pytest.mark.parametrize("n, m, k", [(128, 3, 5), (4096, 8, 16), (4096, 16, 8), (100, 3, 5), (48, 40, 40)])  # in parts, and at once
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
