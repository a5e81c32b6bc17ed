"""Twins for CPUs, see nanotst/kernels.py: faster forms of Linear.forward, Attention.attend and
BagEmbedding.forward, where PyTorch's own kernels are slow. Dimensions as in model.py."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from model import Attention, BagEmbedding, Linear, visible


def compute_dtype(x):
    """The dtype of matrix products with x: autocast's where it is on, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def tall_product(a, b):
    """a.T @ b: (N, m), (N, n) -> (m, n), in the dtype of a.

    Where N is much larger than m and n, a CPU is faster with a batch of products over N/16 rows each, summed
    in float32, and faster still if the narrower factor is the transposed one."""
    m, n = a.size(1), b.size(1)
    if a.device.type == "cpu" and len(a) % 16 == 0 and 16 * m * n <= len(a) * (m + n):
        if m > n:
            return tall_product(b, a).T
        parts = a.unflatten(0, (16, -1)).transpose(1, 2) @ b.unflatten(0, (16, -1))  # (16, m, n)
        return parts.sum(0, dtype=torch.promote_types(a.dtype, torch.float32)).to(a.dtype)
    return a.T @ b


class LinearOnCPU(Linear):
    replaces = "Linear.forward"

    def forward(self, x):
        x = x.to(compute_dtype(x))  # as autocast does with the operands of F.linear
        return LinearFunction.apply(x, self.weight.to(x.dtype))


class LinearFunction(torch.autograd.Function):
    """F.linear, whose gradient by the weight is a tall_product."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T  # (..., m), (n, m) -> (..., n)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, tall_product(dy.flatten(0, -2), x.flatten(0, -2))


class BagEmbeddingOnCPU(BagEmbedding):
    """Never holds the (B, L, s, C) embeddings of all tokens."""

    replaces = "tst.embed_bags or BagEmbedding.forward"

    def forward(self, bags, share=None):
        look_up = SmallVocabulary.apply if len(self.weight) <= 1024 else mean_embedding
        share = None if share is None else share.flatten(0, -2)  # (N, s)
        x = look_up(bags.flatten(0, -2), self.weight, share, compute_dtype(self.weight))  # (N, C)
        return x.view(*bags.shape[:-1], -1)  # (B, L, C)


def mean_embedding(bags, weight, share, dtype):
    """tst.embed_bags: (N, s), (V, C), (N, s) or None -> (N, C)."""
    if bags.size(-1) == 1:
        return F.embedding(bags.squeeze(-1), weight).to(dtype)
    share = None if share is None else share.to(weight.dtype)
    how = dict(mode="mean" if share is None else "sum", per_sample_weights=share)
    return F.embedding_bag(bags, weight, **how).to(dtype)


class SmallVocabulary(torch.autograd.Function):
    """mean_embedding, whose backward pass is one matrix product with the (N, V) counts of tokens in bags.
    With few words that is faster than adding N*s rows one by one, and its time hardly grows with s."""

    @staticmethod
    def forward(ctx, bags, weight, share, dtype):
        ctx.save_for_backward(bags, share)
        ctx.vocab_size, ctx.dtype = weight.size(0), weight.dtype
        return mean_embedding(bags, weight, share, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        bags, share = ctx.saved_tensors
        rows = torch.arange(len(bags), device=grad.device)[:, None]
        each = grad.new_ones(()) if share is None else share.to(grad.dtype)
        counts = grad.new_zeros(len(bags), ctx.vocab_size)  # (N, V)
        counts.index_put_((rows, bags), each, accumulate=True)
        grad_weight = tall_product(counts, grad).to(ctx.dtype)  # (V, C)
        return None, grad_weight / bags.size(1) if share is None else grad_weight, None, None


class AttentionOnCPU(Attention):
    replaces = "Attention.attend"

    def attend(self, q, k, v):
        if q.size(2) > 512:
            return super().attend(q, k, v)
        if q.size(1) != k.size(1):
            k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
        return ShortAttention.apply(q, k, v, self.window)


class ShortAttention(torch.autograd.Function):
    """Causal attention over short rows, (B, H, L, D) each, for which PyTorch's backward pass is slow. Keeps
    the numerators of the softmax in the dtype of q, so the backward pass needs no exponentials."""

    @staticmethod
    def forward(ctx, q, k, v, window):
        wide = torch.promote_types(q.dtype, torch.float32)
        q = (q * q.size(-1) ** -0.5).contiguous()  # all three here, or again in each product
        k, v = k.contiguous(), v.contiguous()
        hidden = torch.where(visible(q.size(2), window, q.device), 0.0, -torch.inf)  # (L, L)
        z = q @ k.transpose(-2, -1) + hidden  # (B, H, L, L)
        p = (z - z.amax(-1, keepdim=True)).exp().to(q.dtype)  # not yet divided by its sum
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


TWINS_ON_CPU = [LinearOnCPU, BagEmbeddingOnCPU, AttentionOnCPU]
