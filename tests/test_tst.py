"""tst.py, the method, against plain loops and the losses of PyTorch, function by function."""

import ast
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import tst
from tst import (
    BAG_WEIGHTS,
    LOSSES,
    MODES,
    Phase,
    bag_weights,
    bags_and_labels,
    check_phases,
    embed_bags,
    phase_at,
    phase_list,
    within_documents,
)

N, C, V = 20, 12, 37  # positions, width, vocabulary: not multiples of anything
BAG_SIZES = [1, 2, 3, 4, 5, 8, 12, 16]


# ---- the file


def test_the_file_imports_torch_and_the_standard_library_alone():
    nodes = list(ast.walk(ast.parse(Path(tst.__file__).read_text(encoding="utf-8"))))
    names = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    names |= {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    names.discard("tools.traps")  # which python tst.py uses if it is there
    assert {name.split(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}


# ---- phases


def test_superposition_comes_first_and_ordinary_training_after_it():
    assert phase_list(10, [4], 0.3) == [Phase(0, 3, 4, 4), Phase(3, 10, 1, 1)]
    assert phase_list(10, [4], 0.5, "input") == [Phase(0, 5, 4, 1), Phase(5, 10, 1, 1)]
    assert phase_list(10, [4], 0.5, "output") == [Phase(0, 5, 1, 4), Phase(5, 10, 1, 1)]
    assert phase_list(10, [4], 1.0) == [Phase(0, 10, 4, 4)]


def test_bag_sizes_that_step_down_share_the_steps_evenly():
    phases = phase_list(100, [8, 4, 2], 0.3)
    assert [(p.start, p.bag_size) for p in phases] == [(0, 8), (10, 4), (20, 2), (30, 1)]
    shares = [p.stop - p.start for p in phase_list(100, [8, 4, 2], 0.4)[:3]]
    assert sum(shares) == 40 and max(shares) - min(shares) <= 1  # 40 steps do not divide by 3
    joined = phase_list(100, [8, 4, 4, 1], 0.4)  # equal bags are one phase
    assert joined == [Phase(0, 10, 8, 8), Phase(10, 30, 4, 4), Phase(30, 100, 1, 1)]


@pytest.mark.parametrize("max_steps, ratio, n", [(10, 0.38, 4), (10, 0.32, 3), (1000, 0.2999, 300)])
def test_the_superposition_steps_are_rounded_to_the_nearest(max_steps, ratio, n):
    assert phase_list(max_steps, [2], ratio)[0].stop == n


@pytest.mark.parametrize("bag_sizes, ratio", [([4], 0), ([1], 0.3), ([1], 0)])
@pytest.mark.parametrize("mode", MODES)
def test_no_superposition_is_one_phase_of_ordinary_training(bag_sizes, ratio, mode):
    assert phase_list(10, bag_sizes, ratio, mode) == [Phase(0, 10, 1, 1)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bag_sizes", [[2], [16], [8, 4, 2], [6, 3], [4, 4, 1]])
@pytest.mark.parametrize("ratio", [0.3, 0.55, 1.0])
def test_phases_cover_every_step_once(mode, bag_sizes, ratio):
    phases = phase_list(40, bag_sizes, ratio, mode)
    check_phases(phases)
    assert [step for p in phases for step in range(p.start, p.stop)] == list(range(40))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((10, [4], 0.3, "both"), "unknown superposition 'both', choose one of full, input, output"),
        ((10, [4], 0.04), "bags of 4 has no steps; use a larger superposition_ratio"),
        ((10, [8, 4, 2], 0.2), "bags of 8 has no steps"),  # two steps for three sizes
        ((10, [8, 3], 0.5), "bags of 8 do not divide into bags of 3"),
        ((10, [2, 4], 0.5), "bags of 2 do not divide into bags of 4"),  # stepping up
        ((10, [0], 0.5), "at least 1, got 0"),
        ((10, [-2], 0.5, "output"), "at least 1, got -2"),
    ],
)
def test_an_impossible_list_of_phases_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        phase_list(*arguments)


@pytest.mark.parametrize(
    "phases, message",
    [
        ([Phase(0, 3, 2, 7), Phase(4, 9, 1, 5)], "stops at 3, the next starts at 4"),
        ([Phase(0, 3, 2, 7), Phase(2, 9, 1, 5)], "stops at 3, the next starts at 2"),
        ([Phase(0, 3, 2, 7), Phase(3, 3, 1, 5)], "no steps"),
        ([Phase(0, 3, 3, 7), Phase(3, 4, 2, 5)], "bags of 3 do not divide into bags of 2"),
    ],
)
def test_phases_that_do_not_follow_each_other_are_refused(phases, message):
    """Labels need not divide: only input is used up."""
    with pytest.raises(ValueError, match=message):
        check_phases(phases)
    check_phases([Phase(0, 3, 4, 3), Phase(3, 5, 4, 5), Phase(5, 6, 1, 2)])


def test_the_phase_is_a_function_of_the_step():
    phases = phase_list(12, [4, 2], 0.5)
    assert [phase_at(phases, step).n_in for step in range(12)] == [4] * 3 + [2] * 3 + [1] * 6
    assert phase_at(phases, 12) == phase_at(phases, 10**9) == phases[-1]  # a run that is extended


# ---- input and target


@pytest.mark.parametrize("n_out", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("n_in", [1, 2, 3, 4, 7])
def test_labels_are_the_tokens_that_follow_the_bag_and_share_none_with_it(n_in, n_out):
    """Tokens are their own positions in the stream, so equality of tokens is equality of positions."""
    bags, labels = bags_and_labels(torch.arange(5 * n_in + n_out)[None], n_in, n_out)
    assert bags.shape == (1, 5, n_in) and labels.shape == (1, 5, n_out)
    for j in range(5):
        assert bags[0, j].tolist() == list(range(j * n_in, (j + 1) * n_in))
        assert labels[0, j].tolist() == list(range((j + 1) * n_in, (j + 1) * n_in + n_out))


def test_bags_and_labels_are_views_of_rows_of_any_batch():
    tokens = torch.arange(2 * 3 * 14, dtype=torch.int32).view(2, 3, 14)
    parts, one = bags_and_labels(tokens, 4, 2), bags_and_labels(tokens[1, 2], 4, 2)
    assert {t.untyped_storage().data_ptr() for t in parts} == {tokens.untyped_storage().data_ptr()}
    assert all(torch.equal(part[1, 2], own) for part, own in zip(parts, one))


NOT_WHOLE = [
    (8, 3, 3),
    (7, 4, 4),
    (4, 4, 4),
    (5, 4, 2),
    (6, 0, 1),
    (6, 1, 0),
    (6, -1, 1),
    (0, 1, 1),
]


@pytest.mark.parametrize("length, n_in, n_out", NOT_WHOLE)
def test_a_row_that_is_not_whole_bags_is_refused(length, n_in, n_out):
    with pytest.raises(ValueError, match=f"row of {length} tokens is not bags of {n_in}"):
        bags_and_labels(torch.zeros(2, length), n_in, n_out)


# ---- the embedding of a bag


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bag_of_one_is_an_embedding_look_up_bit_for_bit(dtype):
    tokens, table = torch.randint(V, (2, 5)), torch.randn(V, C, dtype=dtype)
    wanted = F.embedding(tokens, table)
    assert torch.equal(embed_bags(tokens[..., None], table), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embed_bags(tokens[..., None], table), wanted.bfloat16())


@pytest.mark.parametrize("s", BAG_SIZES)
def test_identical_tokens_give_the_single_tokens_embedding(s):
    """No 1/sqrt(s), no signal of the place in the bag, no sum in bfloat16 (exact: the sum is in float32)."""
    table = torch.randn(V, C)
    bags = torch.arange(V)[None, :, None].expand(1, V, s)
    assert torch.equal(embed_bags(bags, table.bfloat16())[0], table.bfloat16())
    assert_close(
        embed_bags(bags, table)[0], table, rtol=s * 2**-23, atol=0
    )  # the sum itself rounds
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embed_bags(bags, table)[0], table.bfloat16())


@pytest.mark.parametrize("s", BAG_SIZES)
def test_bfloat16_mean_errs_by_one_final_rounding(s):
    table, bags = torch.randn(V, C).bfloat16(), torch.randint(V, (2, 30, s))
    exact = table.double()[bags].mean(-2)
    assert (embed_bags(bags, table).double() - exact).abs().le(exact.abs() * 2**-8 + 1e-6).all()


def random_shares(*shape):
    """How much each token counts in its bag: some nothing, all together 1."""
    share = torch.rand(shape) * (torch.rand(shape) < 0.7)
    share[..., -1] += 0.1
    return share / share.sum(-1, keepdim=True)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("s", [1, 2, 3, 8, 16])
def test_bag_embedding_is_the_mean_in_value_and_gradient(s, dtype, weighted):
    """Of tokens that count equally, or by their share."""
    bags = torch.randint(5, (2, 3, s), dtype=torch.int32)  # many a token is in a bag more than once
    share = random_shares(2, 3, s) if weighted else None
    table = torch.randn(V, C, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 3, C, dtype=dtype)
    out, grad = embed_bags(bags, table, share), torch.zeros(V, C, dtype=torch.float64)
    out.backward(upstream)
    assert out.dtype == dtype
    bound = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for b in range(2):
        for j in range(3):
            weights = share[b, j].double() if weighted else torch.full((s,), 1 / s).double()
            pairs = list(zip(bags[b, j].tolist(), weights))
            mean = sum(w * table[token].double() for token, w in pairs)
            assert_close(out[b, j].double(), mean, rtol=bound, atol=bound)
            for token, w in pairs:
                grad[token] += w * upstream[b, j].double()
    assert_close(table.grad.double(), grad, rtol=10 * bound, atol=10 * bound)
    table.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        embed_bags(bags, table, share).backward(upstream.bfloat16())
    assert_close(table.grad.double(), grad, rtol=5e-2, atol=1e-1)


# ---- bags that mix no documents


@pytest.mark.parametrize("n_in, n_out", [(1, 1), (4, 4), (3, 1), (1, 3), (2, 5)])
@pytest.mark.parametrize("often", [0.1, 0.5])
def test_bags_and_labels_are_of_the_document_of_the_bags_last_token(n_in, n_out, often):
    """A document begins with its separator, 0, and ends before the next."""
    tokens = torch.randint(1, V, (3, 8 * n_in + n_out)) * (torch.rand(3, 8 * n_in + n_out) > often)
    bags, plain_labels = bags_and_labels(tokens, n_in, n_out)
    share, labels = within_documents(tokens, n_in, n_out, 0)
    assert share.shape == bags.shape and labels.shape == plain_labels.shape
    assert share.dtype == torch.float32
    for row in range(3):
        document, documents = 0, []  # of each token in the row
        for token in tokens[row].tolist():
            document += token == 0
            documents.append(document)
        for j in range(8):
            end = (j + 1) * n_in  # the bag is the tokens before it, the labels are those from it on
            same = [float(documents[i] == documents[end - 1]) for i in range(j * n_in, end)]
            assert_close(share[row, j], torch.tensor(same) / sum(same))
            for i in range(n_out):
                wanted = tokens[row, end + i] if documents[end + i] == documents[end - 1] else -100
                assert labels[row, j, i] == wanted


# ---- the weights of a bag's labels

BY_HAND = {
    "uniform": lambda i: 1,
    "power": lambda i: 1 / i,
    "exponential": lambda i: math.exp(-i),
    "first": lambda i: float(i == 1),
    "fitted": lambda i: 3.63 + 1.35 * i**-1.25,
}


@pytest.mark.parametrize("s", BAG_SIZES)
@pytest.mark.parametrize("kind", BAG_WEIGHTS)
def test_bag_weights(kind, s):
    by_hand = [BY_HAND[kind](i) for i in range(1, s + 1)]
    assert_close(bag_weights(kind, s), torch.tensor([w / sum(by_hand) for w in by_hand]))
    assert bag_weights(kind, s).sum().item() == pytest.approx(1, abs=1e-6)


def test_bag_weights_refuse_another_kind_and_take_the_constants_of_the_fit():
    with pytest.raises(ValueError, match="uniform, power"):
        bag_weights("unifrom", 4)
    assert_close(bag_weights("fitted", 2, c0=1.0, a=3.0, k=-1.0), torch.tensor([4.0, 2.5]) / 6.5)


# ---- the losses: each against plain loops or a loss of PyTorch


def loop_of_cross_entropies(logits, labels, weights=None):
    """The definition of MCE in the paper: a cross-entropy for each place i in the bag, summed by weight."""
    loss = 0 * logits.sum()
    for i in range(labels.size(1)):
        if (labels[:, i] != -100).any():
            w = 1 / labels.size(1) if weights is None else weights[i].item()
            loss = loss + w * F.cross_entropy(logits, labels[:, i].long())
    return loss


def loop_over_positions(of_position):
    """The mean of of_position(logits (V,), its labels, a list) over the positions that have labels."""

    def loss(logits, labels):
        bags = [[y for y in bag if y != -100] for bag in labels.tolist()]
        losses = [of_position(z, bag) for z, bag in zip(logits, bags, strict=True) if bag]
        return sum(losses, start=0 * logits.sum()) / max(1, len(losses))

    return loss


@loop_over_positions
def minus_log_of_summed_softmax(z, bag):
    return -sum(z.softmax(0)[y] for y in bag).log()


@loop_over_positions
def torchs_multi_label_soft_margin(z, bag):
    """Which is the mean over the vocabulary, not the sum, hence times V."""
    target = torch.tensor([[float(v in bag) for v in range(len(z))]], dtype=z.dtype)
    return F.multilabel_soft_margin_loss(z[None], target) * len(z)


@loop_over_positions
def torchs_multi_label_margin(z, bag):
    """Which divides the sum over labels by V, not by their number. Its list of labels ends at the first -1. A
    label that occurs twice counts twice."""
    target = torch.full((len(z),), -1)
    target[: len(bag)] = torch.tensor(bag)
    return F.multilabel_margin_loss(z, target) * len(z) / len(bag)


mce = LOSSES["mce"]
REFERENCES = {
    mce: loop_of_cross_entropies,
    LOSSES["mce_alt"]: minus_log_of_summed_softmax,
    LOSSES["bce"]: torchs_multi_label_soft_margin,
    LOSSES["hinge"]: torchs_multi_label_margin,
}
every_loss = pytest.mark.parametrize("loss", REFERENCES, ids=LOSSES)


def operands(s, dtype=torch.float64):
    """Logits and labels, in every bag of which a label is repeated."""
    labels = torch.randint(V, (N, s))
    labels[:, -1] = labels[:, 0]
    return torch.randn(N, V, dtype=dtype, requires_grad=True), labels


def with_holes(s):
    logits, labels = operands(s)
    labels = labels.where(torch.rand(N, s) < 0.6, -100)
    labels[5] = -100  # a position without any label
    labels[6, 0] = 0  # where what is ignored may not count as token 0, which this one is
    return logits, labels


def value_and_gradient(loss, logits, *args):
    value = loss(logits, *args)
    return value, *torch.autograd.grad(value, logits)


def assert_same(loss, reference, *args, rtol=1e-11, atol=1e-13):
    got, wanted = value_and_gradient(loss, *args), value_and_gradient(reference, *args)
    assert_close(got, wanted, rtol=rtol, atol=atol)


@every_loss
@pytest.mark.parametrize("s", BAG_SIZES)
def test_losses_equal_their_references(loss, s):
    """With all labels and with some ignored: MCE averages each place in the bag over its own valid labels;
    the others take the mean of the positions that have a label. With none, all is zero."""
    assert_same(loss, REFERENCES[loss], *operands(s))
    assert_same(loss, REFERENCES[loss], *with_holes(s))
    value, grad = value_and_gradient(loss, operands(s)[0], torch.full((N, s), -100))
    assert value.item() == 0 and not grad.any()


@every_loss
def test_any_other_number_can_mark_ignored_labels(loss):
    logits, labels = with_holes(4)
    value = loss(logits, labels.where(labels >= 0, 7), ignore_index=7)
    assert torch.equal(value, loss(logits, labels.where(labels != 7, -100)))


@every_loss
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_positions_without_labels_make_no_nan_on_the_way_back_either(loss):
    with torch.autograd.detect_anomaly():
        _, grad = value_and_gradient(loss, *with_holes(3))
    assert not grad[5].any()


@every_loss
def test_losses_flatten_batch_dimensions_and_take_short_integers(loss):
    logits, labels = with_holes(3)
    assert_close(loss(logits.view(4, 5, V), labels.view(4, 5, 3).int()), loss(logits, labels))


@every_loss
@pytest.mark.parametrize("s", [1, 4])
def test_losses_are_computed_and_returned_in_float32_for_bfloat16_logits(loss, s):
    logits, labels = operands(s, torch.float32)
    logits = (20 * logits).detach().bfloat16()
    assert loss(logits, labels).dtype == torch.float32
    assert torch.equal(loss(logits, labels), loss(logits.float(), labels))
    assert loss(logits.double(), labels).dtype == torch.float64


@every_loss
def test_losses_stay_finite_for_extreme_logits(loss):
    logits, labels = operands(4, torch.float32)
    value, grad = value_and_gradient(loss, (1e4 * logits).detach().requires_grad_(), labels)
    assert value.isfinite() and grad.isfinite().all()


# ---- multi-hot cross-entropy


@pytest.mark.parametrize("kind", BAG_WEIGHTS)
@pytest.mark.parametrize("s", BAG_SIZES)
def test_zero_logits_cost_log_v(kind, s):
    """Not log V / s, not log V - log s."""
    labels = torch.randint(V, (N, s))
    loss = mce(torch.zeros(N, V), labels, bag_weights(kind, s))
    assert_close(loss.item(), math.log(V), rtol=1e-6, atol=0)


def test_one_label_is_ordinary_cross_entropy_bit_for_bit():
    logits, labels = torch.randn(64, V), torch.randint(V, (64, 1))
    wanted = F.cross_entropy(logits, labels[:, 0])
    assert torch.equal(mce(logits, labels), wanted)


def test_a_label_that_occurs_twice_counts_twice():
    """At zero logits the gradient of the loss by the logits is 1/V minus the label distribution."""
    A, B, D = 3, 11, 30
    logits = torch.zeros(1, V, dtype=torch.float64, requires_grad=True)
    _, grad = value_and_gradient(mce, logits, torch.tensor([[A, A, B, D]]))
    distribution = 1 / V - grad[0]
    assert_close(distribution[[A, B, D]], torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64))
    assert distribution.abs().gt(1e-12).sum() == 3


@pytest.mark.parametrize("s", BAG_SIZES)
@pytest.mark.parametrize("kind", BAG_WEIGHTS)
def test_ignored_labels_leave_the_mean_of_their_own_offset(kind, s):
    """Each place in the bag has its own number of valid labels."""
    for args in (operands(s), with_holes(s)):
        assert_same(mce, loop_of_cross_entropies, *args, bag_weights(kind, s))


def test_an_offset_without_labels_counts_zero():
    """Zero, not NaN, and the other offsets keep their weights."""
    logits, labels = with_holes(4)
    labels[:, 0] = -100  # with weights "first" nothing is left
    for kind in ("power", "first"):
        args = logits, labels, bag_weights(kind, 4)
        assert_same(mce, loop_of_cross_entropies, *args)


def test_bce_and_hinge_at_zero_logits_by_hand():
    logits, labels = torch.zeros(1, V), torch.tensor([[3, 3, 11, 30]])
    assert LOSSES["bce"](logits, labels).item() == pytest.approx(V * math.log(2))
    assert LOSSES["hinge"](logits, labels).item() == V - 3
