"""Token Superposition Training (TST) as pure functions. Needs torch alone: copy this file into any trainer.

Efficient Pre-Training with Token Superposition, Peng, Gigant, Quesnelle, arXiv 2605.06546.

    tokens   t0 t1 t2 | t3 t4 t5 | t6 t7 t8 | t9 ...        a row of (L+1)*s tokens, here s = 3
    input    mean of      mean of    mean of
             their embeddings  ...                          (B, L, s) -> (B, L, C)
    target   {t3 t4 t5}   {t6 t7 t8} {t9 ...}               the next bag, not the next token

For the first r of the steps the transformer sees bags; after that s = 1, which is ordinary next-token
training. There is no second code path: a bag of one token is a token, and the loss below is then cross-entropy.

Dimensions: B rows, L positions the transformer sees, s bag size, C width, V vocabulary, N = B*L.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

BAG_WEIGHTS = ("uniform", "power", "exponential", "first", "fitted")


def bag_size_at(step, bag_size, superposition_steps):
    """Bag size of step number `step` (the first is 0): `bag_size` in superposition, then 1 (recovery).

    A function of the step alone, so a run that is stopped and resumed cannot be in the wrong phase.
    """
    return bag_size if step < superposition_steps else 1


def fold(tokens, bag_size):
    """Fold each row into bags of contiguous tokens: (B, L*s) -> (B, L, s).

    Raises ValueError if a row does not divide into whole bags.
    """
    if bag_size < 1 or tokens.size(-1) % bag_size:
        raise ValueError(f"rows of {tokens.size(-1)} tokens do not fold into bags of {bag_size}")
    return tokens.unflatten(-1, (-1, bag_size))


def bags_and_labels(tokens, bag_size):
    """Split rows of (L+1)*s tokens into input bags and their labels, the bags that follow (the paper's section 3).

    (B, (L+1)*s) -> two views, (B, L, s) each. The shift is a whole bag: shifted by one token, an input bag
    would hold s-1 of the s labels it has to predict.
    """
    bags = fold(tokens, bag_size)  # (B, L+1, s)
    return bags[:, :-1], bags[:, 1:]


def embed_bags(bags, weight):
    """Mean embedding of each bag: (B, L, s) token ids, (V, C) table -> (B, L, C).

    The mean is taken in float32 and returned in the dtype of the table, or of autocast where that is on.
    A bag of one token is exactly an embedding look-up.
    """
    device = bags.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    small = device == "cpu" and weight.dtype == torch.float32 and weight.size(0) <= 1024
    lookup = _EmbedBagsOfSmallVocabulary.apply if small else _embed_bags
    return lookup(bags.flatten(0, -2), weight, dtype).view(*bags.shape[:-1], -1)  # (B, L, C)


def _embed_bags(bags, weight, dtype):
    if bags.size(-1) == 1:
        return F.embedding(bags.squeeze(-1), weight).to(dtype)  # (N, s), (V, C) -> (N, C)
    if bags.device.type == "cpu" and weight.dtype == torch.float32:
        # Never holds (N, s, C), in eager mode either, where nothing would fuse the two lines below.
        return F.embedding_bag(bags, weight, mode="mean").to(dtype)
    x = F.embedding(bags, weight)  # (N, s, C); torch.compile fuses look-up, mean and cast into one kernel
    return x.mean(-2, dtype=torch.promote_types(x.dtype, torch.float32)).to(dtype)


class _EmbedBagsOfSmallVocabulary(torch.autograd.Function):
    """_embed_bags with a backward pass that is one matrix product, with the (N, V) counts of tokens in bags. For few
    words it is faster on a CPU than adding N*s rows one by one, and its time hardly grows with s."""

    @staticmethod
    def forward(ctx, bags, weight, dtype):
        ctx.save_for_backward(bags)
        ctx.vocab_size, ctx.dtype = weight.size(0), weight.dtype
        return _embed_bags(bags, weight, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        bags, = ctx.saved_tensors
        rows = torch.arange(bags.size(0), device=grad.device)[:, None]
        one = torch.ones((), dtype=grad.dtype, device=grad.device)
        counts = grad.new_zeros(bags.size(0), ctx.vocab_size).index_put_((rows, bags), one, accumulate=True)  # (N, V)
        return None, tall_product(counts, grad).to(ctx.dtype) / bags.size(1), None  # (V, C)


def tall_product(a, b):
    """a.T @ b: (N, m), (N, n) -> (m, n), in the dtype of a. Where N is much larger than m and n, as in the gradients of small
    matrices, a CPU is faster with a batch of products of N/16 rows, and the sum of those in float32 is more exact. It
    is faster still if the narrower factor is the transposed one."""
    if a.device.type == "cpu" and len(a) % 16 == 0 and 16 * a.size(1) * b.size(1) <= len(a) * (a.size(1) + b.size(1)):
        if a.size(1) > b.size(1):
            return tall_product(b, a).T
        parts = a.unflatten(0, (16, -1)).transpose(1, 2) @ b.unflatten(0, (16, -1))  # (16, m, n)
        return parts.sum(0, dtype=torch.promote_types(a.dtype, torch.float32)).to(a.dtype)
    return a.T @ b


def bag_weights(kind, bag_size, c0=3.63, a=1.35, k=-1.25):
    """Weight of the i-th token (i = 1..s) of the target bag in the loss, normalised to 1: (s,) float32.

    uniform 1, power 1/i, exponential exp(-i), first only i = 1, fitted c0 + a * i^k. The defaults of `fitted`
    are the paper's fit to the mutual information of tokens at distance i on DCLM, in which c0 dominates and
    makes the weights almost uniform; c0 = 0 keeps the decay alone. Raises ValueError for another kind.
    """
    i = torch.arange(1, bag_size + 1, dtype=torch.float64)
    if kind == "uniform":
        w = torch.ones_like(i)
    elif kind == "power":
        w = 1 / i
    elif kind == "exponential":
        w = torch.exp(-i)
    elif kind == "first":
        w = (i == 1).double()
    elif kind == "fitted":
        w = c0 + a * i**k
    else:
        raise ValueError(f"unknown bag weights {kind!r}, choose one of {', '.join(BAG_WEIGHTS)}")
    return (w / w.sum()).float()


def multi_hot_cross_entropy(logits, labels, weights=None, ignore_index=-100):
    """Multi-hot cross-entropy, MCE (the paper's section 3): the readable reference for the fused form below.

        MCE = sum_i w_i CE(z, y_i) = logsumexp(z) - sum_i w_i z[y_i]

    logits (..., V), labels (..., s), weights (s,) summing to 1 (uniform if None) -> scalar in nats. A label
    that occurs twice in a bag counts twice. For s = 1 this is F.cross_entropy.

    With ignored labels each offset i is averaged over the positions where it is valid, then the offsets are
    averaged by weight, as in the paper's loop of s cross-entropies; an offset that is valid nowhere counts zero.
    """
    log_p = F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    labels = labels.flatten(0, -2).long()  # (N, s)
    if weights is None:  # made on the device: a copy from the host would be waited for in each step
        weights = torch.full((labels.size(-1),), 1 / labels.size(-1), device=labels.device)
    valid = labels != ignore_index  # (N, s)
    label_log_p = log_p.gather(-1, labels.where(valid, 0)).where(valid, 0)  # (N, s)
    return -(weights * label_log_p.sum(0) / valid.sum(0).clamp(min=1)).sum()


def linear_multi_hot_cross_entropy(hidden, weight, labels, weights=None, ignore_index=-100, vocab_size=None,
                                   chunk_rows=None):
    """MCE of the logits `hidden @ weight.T`, without ever holding them all.

    hidden (..., C), weight (V, C), labels (..., s), weights (s,) or None -> scalar in nats, float32.

    Works through chunks of positions. Each chunk's logits are turned into the gradients of `hidden` and
    `weight` at once, in the forward pass, so memory is that of one chunk, and one matrix product and one
    log-sum-exp serve all s labels. Matrix products run in the dtype of `hidden` (or of autocast), softmax and
    sums in float32, or float64 for float64 inputs.

    vocab_size: rows of `weight` from here on are padding and get no probability. chunk_rows: positions a chunk.
    The gradients are made before the incoming one is known: create_graph=True raises RuntimeError, and float16 with
    a loss scaler would overflow.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    labels = labels.flatten(0, -2).T.long().contiguous()  # (s, N): N is the side along which compiled loops are vectors
    if weights is None:  # made on the device: a copy from the host would be waited for in each step
        weights = torch.full((labels.size(0),), 1 / labels.size(0), device=labels.device)
    valid = labels != ignore_index  # (s, N)
    weights = weights.to(torch.promote_types(dtype, torch.float32))
    coef = valid * (weights / valid.sum(1).clamp(min=1))[:, None]  # (s, N): how much each label counts in the loss
    if chunk_rows is None:  # multiples of 64 rows multiply fastest on a CPU; a GPU wants to be filled
        chunk_rows = max(64, (2**29 if device == "cuda" else 2**26) // weight.size(0) // 64 * 64)
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearMCE.apply(hidden.flatten(0, -2), weight, labels.where(valid, 0), coef, dtype,
                            vocab_size or weight.size(0), chunk_rows, with_grad)


def softmax_(z, wide):
    """Turn logits (n, V) into their softmax, in place but computed in dtype `wide`. Returns their log-sum-exp in `wide`: (n, 1)."""
    if torch.compiler.is_compiling():  # fused, and without a wide (n, V)
        lse = z.to(wide).logsumexp(-1, keepdim=True)
        z.copy_((z.to(wide) - lse).exp())
        return lse
    lse = []  # each line below is a pass: on a CPU, through the cache instead of memory, by blocks of rows
    for block in z.split(max(1, 2**20 // z.size(1)) if z.device.type == "cpu" else len(z)):
        p = block.softmax(-1, dtype=wide)
        lse.append(block.amax(-1, keepdim=True).to(wide) - p.amax(-1, keepdim=True).log())  # p.amax() is at least 1 / V
        block.copy_(p)
    return torch.cat(lse)


class _LinearMCE(torch.autograd.Function):

    @staticmethod
    def forward(ctx, hidden, weight, labels, coef, dtype, vocab_size, chunk_rows, with_grad):
        w = weight.to(dtype)  # (V, C)
        wide = coef.dtype  # float32, or float64
        total = coef.sum(0)  # (N,), 1/N where every label is valid
        share = coef / total.clamp(min=torch.finfo(wide).tiny)  # (s, N), a position's own label distribution
        share = sum(own * (labels == label) for own, label in zip(share, labels))  # (s, N), equal labels taken together
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
            # d loss / d z = total * (softmax - label distribution). The factor `total` goes to the narrow side of each
            # product, (n, C), and the labels' entries are written anew rather than added to: fewer passes over (n, V).
            dz = z  # (n, V)
            dz[torch.arange(len(dz), device=dz.device)[:, None], y] = (label_log_p.exp() - share[:, rows].T).to(dtype)
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
            raise RuntimeError("linear_multi_hot_cross_entropy cannot be differentiated twice (create_graph=True): "
                               "its gradients are computed in the forward pass; use multi_hot_cross_entropy")
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad_loss.to(grad_h.dtype), grad_w * grad_loss.to(grad_w.dtype), *[None] * 6
