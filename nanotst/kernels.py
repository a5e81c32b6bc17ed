"""Faster and smaller forms of a few lines of plain PyTorch, with their values and gradients. Needs torch
alone.

To learn the method, skip this file: tst.py and model.py say what is computed, this one how to do it without
waste. Each function names the plain lines that it equals, and is tested against them. What they save: memory
(never all logits, never a copy of a bag's embeddings), passes over memory, and, on a CPU, the slow cases of
PyTorch's kernels.

Dimensions as in model.py: B rows, L positions, N = B*L, C width, V vocabulary, s labels of a bag, E experts,
k experts of a position, M rows of experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def compute_dtype(x):
    """The dtype of matrix products on x: that of autocast where it is on, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# -------------------------------------------------------------------------------------------- matrix products


def tall_product(a, b):
    """Equals a.T @ b: (N, m), (N, n) -> (m, n), in the dtype of a.

    Where N is much larger than m and n, as in the gradients of small matrices, a CPU is faster with a batch
    of products of N/16 rows, and the sum of those in float32 is more exact. It is faster still if the
    narrower factor is the transposed one."""
    m, n = a.size(1), b.size(1)
    if a.device.type == "cpu" and len(a) % 16 == 0 and 16 * m * n <= len(a) * (m + n):
        if m > n:
            return tall_product(b, a).T
        parts = a.unflatten(0, (16, -1)).transpose(1, 2) @ b.unflatten(0, (16, -1))  # (16, m, n)
        return parts.sum(0, dtype=torch.promote_types(a.dtype, torch.float32)).to(a.dtype)
    return a.T @ b


def linear(x, weight):
    """Equals F.linear(x, weight): (..., m), (n, m) -> (..., n). On a CPU the gradient of the weight is a
    tall_product."""
    if x.device.type != "cpu":
        return F.linear(x, weight)
    x = x.to(compute_dtype(x))  # what autocast does with the operands of F.linear
    return LinearOnCPU.apply(x, weight.to(x.dtype))


class LinearOnCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T  # (..., m), (n, m) -> (..., n)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, tall_product(dy.flatten(0, -2), x.flatten(0, -2))


# ---------------------------------------------------------------------------------------------- bag embedding


def embed_bags(bags, weight, share=None):
    """Equals tst.embed_bags: F.embedding(bags, weight).mean(-2), the mean in float32.

    bags (B, L, s), weight (V, C) -> (B, L, C) in the dtype of weight, or of autocast where that is on. share
    (B, L, s): a weighted mean, (F.embedding(bags, weight) * share[..., None]).sum(-2)."""
    small = bags.device.type == "cpu" and weight.dtype == torch.float32 and weight.size(0) <= 1024
    lookup = EmbedBagsOfSmallVocabulary.apply if small else _embed_bags
    share = None if share is None else share.flatten(0, -2)  # (N, s)
    x = lookup(bags.flatten(0, -2), weight, share, compute_dtype(weight))  # (N, C)
    return x.view(*bags.shape[:-1], -1)  # (B, L, C)


def _embed_bags(bags, weight, share, dtype):
    if bags.size(-1) == 1:
        return F.embedding(bags.squeeze(-1), weight).to(dtype)  # (N, s), (V, C) -> (N, C)
    if bags.device.type == "cpu" and weight.dtype == torch.float32:
        # Never holds (N, s, C), in eager mode either, where nothing would fuse the lines below.
        mode = "mean" if share is None else "sum"
        return F.embedding_bag(bags, weight, mode=mode, per_sample_weights=share).to(dtype)
    x = F.embedding(
        bags, weight
    )  # (N, s, C); torch.compile fuses look-up, mean and cast into one kernel
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.mean(-2, dtype=wide) if share is None else (x.to(wide) * share[..., None]).sum(-2)
    ).to(dtype)


class EmbedBagsOfSmallVocabulary(torch.autograd.Function):
    """_embed_bags with a backward pass that is one matrix product, with the (N, V) counts of tokens in bags.
    For few words it is faster on a CPU than adding N*s rows one by one, and its time hardly grows with s."""

    @staticmethod
    def forward(ctx, bags, weight, share, dtype):
        ctx.save_for_backward(bags, share)
        ctx.vocab_size, ctx.dtype = weight.size(0), weight.dtype
        return _embed_bags(bags, weight, share, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        bags, share = ctx.saved_tensors
        rows = torch.arange(bags.size(0), device=grad.device)[:, None]
        one = torch.ones((), dtype=grad.dtype, device=grad.device)
        one = one if share is None else share.to(grad.dtype)
        counts = grad.new_zeros(bags.size(0), ctx.vocab_size)  # (N, V)
        counts.index_put_((rows, bags), one, accumulate=True)
        grad_weight = tall_product(counts, grad).to(ctx.dtype)  # (V, C)
        return None, grad_weight / bags.size(1) if share is None else grad_weight, None, None


# -------------------------------------------------------------------------------------------------- attention


def causal_attention(q, k, v, window=0):
    """Equals F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).

    q (B, H, L, D), k and v (B, K, L, D), query head h with key/value head h * K // H -> (B, H, L, D). window:
    a position sees itself and the window - 1 positions before it, 0: all of them."""
    L = q.size(2)
    if q.device.type != "cpu" or L > 512:
        mask = visible(L, window, q.device) if 0 < window < L else None  # (L, L)
        causal, gqa = mask is None, q.size(1) != k.size(1)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa
        )
    if q.size(1) != k.size(1):
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    return ShortAttention.apply(q, k, v, window)


def visible(L, window, device):
    """Whether position i sees position j: (L, L) bool."""
    i = torch.arange(L, device=device)
    back = i[:, None] - i  # (L, L)
    return (back >= 0) & (back < (window or L))


class ShortAttention(torch.autograd.Function):
    """Causal attention of short rows on a CPU, where PyTorch's kernels have a slow backward pass: (B, H, L,
    D) each. Keeps the numerators of the softmax in the dtype of q, so that the backward pass takes no
    exponentials."""

    @staticmethod
    def forward(ctx, q, k, v, window):
        wide = torch.promote_types(q.dtype, torch.float32)
        q = (q * q.size(-1) ** -0.5).contiguous()  # all three here, or in each product again
        k, v = k.contiguous(), v.contiguous()
        hidden = torch.zeros(q.size(2), q.size(2), dtype=wide, device=q.device)  # (L, L)
        hidden = hidden.masked_fill(~visible(q.size(2), window, q.device), -torch.inf)
        z = q @ k.transpose(-2, -1) + hidden  # (B, H, L, L)
        p = (z - z.amax(-1, keepdim=True)).exp().to(q.dtype)  # not yet divided by their sum
        scale = 1 / p.sum(-1, keepdim=True, dtype=wide)  # (B, H, L, 1)
        ctx.save_for_backward(q, k, v, p, scale)
        return (p @ v * scale).to(q.dtype)  # (B, H, L, D)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, p, scale = ctx.saved_tensors
        dy = (dy * scale).to(p.dtype)
        dp = dy @ v.transpose(-2, -1)  # (B, H, L, L)
        dz = (p * (dp - (p * dp).sum(-1, keepdim=True, dtype=scale.dtype) * scale)).to(p.dtype)
        return dz @ k * q.size(-1) ** -0.5, dz.transpose(-2, -1) @ q, p.transpose(-2, -1) @ dy, None


# ------------------------------------------------------------------------------- rows of a mixture of experts


class Placement(NamedTuple):
    """Where the N*k (position, expert) pairs stand when sorted by expert, in M rows. An expert's rows are
    filled up to a multiple of 64 on a CPU, which prepares a product anew for each number of rows: have few of
    them."""

    offsets: torch.Tensor  # (E,) int32, where each expert's rows end
    row_of: torch.Tensor  # (N*k,) the row of each pair
    pair_of: torch.Tensor  # (M,) the pair in each row, 0 in an empty one
    filled: torch.Tensor  # (M, 1) 1, or 0 in an empty row
    load: torch.Tensor  # (E,) positions that chose each expert, float32


def place_rows(experts, n_expert, dtype):
    """The Placement of the chosen experts (N, k). Plainly: experts.flatten().sort(stable=True), one expert's
    rows behind the other's. One graph whatever the routing: M is its upper bound."""
    (N, k), device = experts.shape, experts.device
    multiple = 64 if device.type == "cpu" else 1
    chosen, order = experts.flatten().sort(stable=True)  # (N*k,) the pairs, by expert
    numbers = torch.arange(n_expert, device=device)
    ends = torch.searchsorted(chosen, numbers, right=True, out_int32=True)  # (E,)
    load = ends.diff(prepend=ends.new_zeros(1))  # (E,)
    room = -(-load // multiple) * multiple  # (E,) rows of each expert, some of them empty
    offsets = room.cumsum(0, dtype=torch.int32)  # (E,)
    shift = (offsets - room) - (ends - load)  # (E,)
    row = torch.arange(N * k, device=device) + shift[chosen]  # (N*k,) of each pair in order
    M = N * k + min(n_expert, N * k) * (multiple - 1)  # room for all
    row_of = torch.empty_like(order).scatter_(0, order, row)  # (N*k,)
    pair_of = torch.zeros(M, dtype=order.dtype, device=device).scatter_(0, row, order)  # (M,)
    filled = torch.zeros(M, 1, dtype=dtype, device=device).index_fill_(0, row, 1)  # (M, 1)
    return Placement(offsets, row_of, pair_of, filled, load.float())


def rows_of_experts(x, place):
    """Equals x[place.pair_of // k], the positions in the order of their experts: (N, C) -> (M, C)."""
    return Take.apply(x, place.pair_of, place.row_of, len(place.row_of) // len(x))


def sum_of_experts(rows, weights, place):
    """Equals (weights[..., None] * rows[place.row_of].view(N, k, C)).sum(1): rows (M, C), weights (N, k) ->
    (N, C)."""
    weight = Take.apply(weights.view(-1, 1), place.pair_of, place.row_of, 1)  # (M, 1)
    rows = rows * (weight * place.filled)  # an empty row gets no gradient
    return (
        Take.apply(rows, place.row_of, place.pair_of, 1).unflatten(0, weights.shape).sum(1)
    )  # (N, C)


class Take(torch.autograd.Function):
    """Rows x[index // k]. Every row is taken k times, and `inverse` says where its copies went, so the
    backward pass is a look-up and a sum over k, in a fixed order, instead of a scatter with atomic
    additions."""

    @staticmethod
    def forward(ctx, x, index, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[index // k]  # (n, C) -> (n*k, C)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return (
            grad[inverse].unflatten(0, (-1, ctx.k)).sum(1),
            None,
            None,
            None,
        )  # (n*k, C) -> (n, C)


_grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public since torch 2.10


def grouped_product(x, weight, offsets):
    """Equals torch.cat([x[a:b] @ w for a, b, w in zip([0, *offsets], offsets, weight)]): (M, m), (E, m, n) ->
    (M, n)."""
    return _grouped_mm(x, weight.to(x.dtype), offs=offsets)


# ---------------------------------------------------------------------------------- losses from hidden states


def linear_loss(loss, hidden, weight, labels, vocab_size=None, chunk_rows=None, ignore_index=-100):
    """Equals loss(hidden @ weight[:vocab_size].T, labels), without ever holding all logits, by autograd.

    loss (a function of tst.LOSSES): logits (n, V), labels (n, s) -> its mean over the positions that have a
    label. hidden (..., C), weight (V, C), labels (..., s) -> scalar. Each chunk's logits are made once more
    for its gradients.
    """
    dtype = compute_dtype(hidden)
    hidden, labels = hidden.flatten(0, -2).to(dtype), labels.flatten(0, -2)  # (N, C), (N, s)
    weight = weight[:vocab_size]  # (V, C)
    has_label = (labels != ignore_index).any(-1)  # (N,)
    total = has_label.sum().clamp(min=1)

    def of_chunk(h, w, y, n_labelled):
        # w is cast here, so that the sum of its gradients over the chunks is in its own dtype, float32
        return loss(h @ w.to(dtype).T, y, ignore_index=ignore_index) * n_labelled / total

    mean = 0.0
    n = chunk_rows or rows_of_chunk(weight)
    for h, y, some in zip(hidden.split(n), labels.split(n), has_label.split(n)):
        mean = mean + checkpoint(of_chunk, h, weight, y, some.sum(), use_reentrant=False)
    return mean


def rows_of_chunk(weight):
    """Positions of a chunk, so that it holds about 2^26 logits (on CUDA, which wants to be filled, 2^29), in
    multiples of 64, which a CPU multiplies fastest."""
    return max(64, (2**29 if weight.device.type == "cuda" else 2**26) // weight.size(0) // 64 * 64)


def linear_multi_hot_cross_entropy(
    hidden, weight, labels, weights=None, ignore_index=-100, vocab_size=None, chunk_rows=None
):
    """Equals tst.multi_hot_cross_entropy(hidden @ weight.T, labels, weights), without ever holding all
    logits.

    hidden (..., C), weight (V, C), labels (..., s), weights (s,) or None -> scalar in nats, float32.

    Works through chunks of positions. Each chunk's logits are turned into the gradients of `hidden` and
    `weight` at once, in the forward pass, so memory is that of one chunk, and one matrix product and one
    log-sum-exp serve all s labels. Matrix products run in the dtype of `hidden` (or of autocast), softmax and
    sums in float32, or float64 for float64 inputs.

    vocab_size: rows of `weight` from here on are padding and get no probability. chunk_rows: positions a
    chunk. The gradients are made before the incoming one is known: create_graph=True raises RuntimeError, and
    float16 with a loss scaler would overflow.
    """
    dtype = compute_dtype(hidden)
    # N is the side along which compiled loops are vectors
    labels = labels.flatten(0, -2).T.long().contiguous()  # (s, N)
    wide = torch.promote_types(dtype, torch.float32)
    if weights is None:  # made on the device: a copy from the host would be waited for in each step
        weights = torch.full(
            (labels.size(0),), 1 / labels.size(0), dtype=wide, device=labels.device
        )
    weights = weights.to(wide)
    valid = labels != ignore_index  # (s, N)
    # how much each label counts in the loss
    coef = valid * (weights / valid.sum(1).clamp(min=1))[:, None]  # (s, N)
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return LinearMCE.apply(
        hidden.flatten(0, -2), weight, labels.where(valid, 0), coef, dtype, vocab_size or weight.size(0),
        chunk_rows or rows_of_chunk(weight), with_grad,
    )  # fmt: skip


class LinearMCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, coef, dtype, vocab_size, chunk_rows, with_grad):
        w = weight.to(dtype)  # (V, C)
        wide = coef.dtype  # float32, or float64
        total = coef.sum(0)  # (N,), 1/N where every label is valid
        share = coef / total.clamp(
            min=torch.finfo(wide).tiny
        )  # (s, N), a position's own label distribution
        # (s, N), equal labels taken together
        share = sum(own * (labels == label) for own, label in zip(share, labels))
        total = total[:, None]  # (N, 1)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        grad_h, grad_w = [], None
        for a in range(0, hidden.size(0), chunk_rows):
            rows = slice(a, a + chunk_rows)
            h = hidden[rows].to(dtype)  # (n, C)
            z = h @ w.T  # (n, V)
            if vocab_size < z.size(-1):
                z[:, vocab_size:] = -torch.inf
            y = labels[:, rows].T  # (n, s)
            label_z = z.gather(1, y)  # (n, s)
            lse = softmax_(z, wide)  # (n, 1), and z holds the softmax from here on
            label_log_p = label_z.to(wide) - lse  # (n, s)
            loss = loss - (coef[:, rows].T * label_log_p).sum()
            if not with_grad:
                continue
            # d loss / d z = total * (softmax - label distribution). The factor `total` goes to the narrow
            # side of each product, (n, C), and the labels' entries are written anew rather than added to:
            # fewer passes over (n, V).
            dz = z  # (n, V)
            label_dz = (label_log_p.exp() - share[:, rows].T).to(dtype)  # (n, s)
            dz[torch.arange(len(dz), device=dz.device)[:, None], y] = label_dz
            grad_h.append((dz @ w) * total[rows].to(dtype))  # (n, C)
            scaled = h * total[rows].to(dtype)
            if grad_w is None:
                grad_w = tall_product(dz, scaled).to(wide)  # (V, C)
            elif dtype == wide:
                grad_w.addmm_(dz.T, scaled)
            else:  # products in bfloat16, their sum over the chunks in float32
                grad_w += dz.T @ scaled
            del z, dz  # or the next chunk's would be made beside it
        if with_grad:
            ctx.save_for_backward(torch.cat(grad_h).to(hidden.dtype), grad_w.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "linear_multi_hot_cross_entropy cannot be differentiated twice (create_graph=True): "
                "its gradients are computed in the forward pass; use multi_hot_cross_entropy"
            )
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad_loss.to(grad_h.dtype), grad_w * grad_loss.to(grad_w.dtype), *[None] * 6


def softmax_(z, wide):
    """Turn logits (n, V) into z.softmax(-1), in place but computed in dtype `wide`. Returns their logsumexp:
    (n, 1)."""
    if torch.compiler.is_compiling():  # fused, and without a wide (n, V)
        lse = z.to(wide).logsumexp(-1, keepdim=True)
        z.copy_((z.to(wide) - lse).exp())
        return lse
    lse = []  # each line below is a pass: on a CPU, through the cache instead of memory, by blocks of rows
    for block in z.split(max(1, 2**20 // z.size(1)) if z.device.type == "cpu" else len(z)):
        p = block.softmax(-1, dtype=wide)
        # p.amax() >= 1 / V
        lse.append(block.amax(-1, keepdim=True).to(wide) - p.amax(-1, keepdim=True).log())
        block.copy_(p)
    return torch.cat(lse)
