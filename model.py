"""The language model: a Llama decoder, optionally with Qwen3's qk-norm and mixture-of-experts (MoE) layers.

Parameter names are our own; the computation is exactly Llama's (dense) and Qwen3-MoE's (MoE), so a checkpoint
can be handed to the tools that people already use. Read it top down; nothing dense depends on the class MoE.

Dimensions: B rows, L positions, C width (n_embd), H heads, K key/value heads, D head_dim, F width of the MLP
(ff_dim), V vocabulary, s bag size (1 in ordinary training), E experts, k experts per position (top_k).

Initialisation, all without biases:

    parameter                           distribution              why
    embed, head                         N(0, 0.5 / sqrt(C))       0.02 at C = 576, and it follows the width
    qkv, gate_up, router                N(0, 0.5 / sqrt(C))
    attention out, MLP down             the same / sqrt(2 n_layer)  the residual stream keeps its scale with depth
    norms                               1
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tst import embed_bags, linear_multi_hot_cross_entropy, tall_product


@dataclass
class GPTConfig:
    """Shape of a model. Zeros are filled in: head_dim = n_embd / n_head, n_kv_head = n_head, ff_dim = 8/3 n_embd."""
    vocab_size: int
    block_size: int  # L, positions the transformer sees
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int = 0  # key/value heads; fewer than n_head is grouped-query attention
    head_dim: int = 0
    ff_dim: int = 0  # width of the MLP; of one expert in a MoE
    qk_norm: bool = False  # RMSNorm on each head's queries and keys, as in Qwen3
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    n_expert: int = 0  # 0: dense
    top_k: int = 0  # experts per position
    balance_bias: bool = False  # MoE: choose experts by probability plus a bias that evens out their load
    checkpoint_activations: bool = False  # recompute each block in the backward pass: less memory, 1/3 more FLOPs

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.ff_dim = self.ff_dim or math.ceil(8 / 3 * self.n_embd / 64) * 64
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        if self.n_expert and not 1 <= self.top_k <= self.n_expert:
            raise ValueError(f"top_k must be between 1 and n_expert {self.n_expert}, got {self.top_k}")
        if self.n_expert and (self.ff_dim % 8 or self.n_embd % 8):
            raise ValueError("a mixture of experts needs n_embd and ff_dim in multiples of 8 (16 bytes, for grouped_mm)")

    @property
    def padded_vocab_size(self):
        """Rows of the embedding and the head: matrix products like multiples of 64. The loss leaves them out."""
        return math.ceil(self.vocab_size / 64) * 64


def rotary(block_size, head_dim, theta):
    """cos and sin of the rotary angles at positions 0..L-1: 2 tensors (L, D/2), float32."""
    freq = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # (D/2,)
    angle = torch.arange(block_size, dtype=torch.float32)[:, None] * freq  # (L, D/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + D/2]) of queries or keys by their position's angle: (B, L, H, D) -> same."""
    a, b = x.chunk(2, dim=-1)  # (B, L, H, D/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in float32, result in the dtype of x."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps).to(x.dtype)  # CUDA's autocast gives float32


class Linear(nn.Linear):
    """x @ weight.T. On a CPU with a faster gradient of the weight, see tall_product."""

    def forward(self, x):
        return LinearOnCPU.apply(x, self.weight.to(x.dtype)) if x.device.type == "cpu" else super().forward(x)


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


def attention(q, k, v):
    """Causal attention: q (B, H, L, D), k and v (B, K, L, D), query head h with key/value head h * K // H -> (B, H, L, D)."""
    if q.device.type != "cpu" or q.size(2) > 512:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    if q.size(1) != k.size(1):
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    return ShortAttention.apply(q, k, v)


class ShortAttention(torch.autograd.Function):
    """Causal attention of short rows on a CPU, where PyTorch's kernels have a slow backward pass: (B, H, L, D) each.
    Keeps the numerators of the softmax in the dtype of q, so that the backward pass takes no exponentials."""

    @staticmethod
    def forward(ctx, q, k, v):
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k, v = (q * q.size(-1) ** -0.5).contiguous(), k.contiguous(), v.contiguous()  # here, or in each product again
        future = torch.full((q.size(2), q.size(2)), -torch.inf, dtype=wide, device=q.device).triu(1)  # (L, L)
        z = q @ k.transpose(-2, -1) + future  # (B, H, L, L)
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
        return dz @ k * q.size(-1) ** -0.5, dz.transpose(-2, -1) @ q, p.transpose(-2, -1) @ dy


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.n_head, config.n_kv_head, config.n_kv_head
        self.head_dim = config.head_dim
        self.qkv = Linear(config.n_embd, sum(self.heads) * config.head_dim, bias=False)
        self.out = Linear(config.n_head * config.head_dim, config.n_embd, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin):
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B, L, H+K+K, D)
        q, k, v = qkv.split(self.heads, dim=2)  # (B, L, H, D), (B, L, K, D) twice
        q = rotate(self.q_norm(q), cos, sin).transpose(1, 2)  # (B, H, L, D)
        k = rotate(self.k_norm(k), cos, sin).transpose(1, 2)  # (B, K, L, D)
        y = attention(q, k, v.transpose(1, 2))  # (B, H, L, D)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, L, C)


def swiglu(x):
    """silu(gate) * up of both side by side, (..., 2F) -> (..., F). Written out, since the compiled backward pass of
    F.silu takes its exponential twice."""
    gate, up = x.chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = Linear(config.n_embd, 2 * config.ff_dim, bias=False)
        self.down = Linear(config.ff_dim, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(swiglu(self.gate_up(x)))  # (B, L, C)


class Take(torch.autograd.Function):
    """Rows x[index // k]. Every row is taken k times, and `inverse` says where its copies went, so the backward
    pass is a look-up and a sum over k, in a fixed order, instead of a scatter with atomic additions."""

    @staticmethod
    def forward(ctx, x, index, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[index // k]  # (n, C) -> (n*k, C)

    @staticmethod
    def backward(ctx, grad):
        inverse, = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.k)).sum(1), None, None, None  # (n*k, C) -> (n, C)


grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public since torch 2.10


class MoE(nn.Module):
    """Mixture of experts as in Qwen3: every position goes to the k most probable of E small MLPs.

    Router in float32 (TF32 on CUDA): softmax over all experts, top k, their weights renormalised to 1. No expert has a capacity
    and no position is dropped. Positions are sorted by expert, so that two grouped matrix products over the
    stacked weights do all experts at once: one graph whatever the routing, and an expert nobody chose has a zero
    gradient rather than none, which is what DDP needs. On a CPU each expert's rows are filled up to a multiple of 64.

    forward returns (y (B, L, C), statistics), the statistics being float32 tensors:
        balance_loss  E * sum_e f_e P_e, f_e the share of positions that chose expert e (they sum to k), P_e its
                      mean probability; k when balanced, as in Qwen3, where its coefficient is 0.001
        z_loss        mean squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906)
        load          (E,) positions that chose each expert, sum B*L*k
        entropy       mean entropy of the router's probabilities at a position, nats
    """

    def __init__(self, config):
        super().__init__()
        E, C, H = config.n_expert, config.n_embd, config.ff_dim
        self.top_k, self.balance_bias = config.top_k, config.balance_bias
        self.router = nn.Linear(C, E, bias=False)
        self.gate_up = nn.Parameter(torch.empty(E, C, 2 * H))
        self.down = nn.Parameter(torch.empty(E, H, C))
        if self.balance_bias:  # added to the probabilities for the choice alone, see GPT.balance_experts
            self.register_buffer("bias", torch.zeros(E))

    def forward(self, x):
        B, L, C = x.shape
        device, k, E = x.device.type, self.top_k, self.gate_up.size(0)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x, N = x.flatten(0, 1).to(dtype), B * L  # (N, C)
        with torch.autocast(device, enabled=False):
            logits = F.linear(x.float(), self.router.weight.float())  # (N, E)
        probs = logits.softmax(-1)
        if self.balance_bias:
            experts = (probs + self.bias).topk(k).indices  # (N, k)
            weights = probs.gather(-1, experts)
        else:
            weights, experts = probs.topk(k)  # (N, k) each
        weights = (weights / weights.sum(-1, keepdim=True)).to(dtype)

        chosen, order = experts.flatten().sort(stable=True)  # (N*k,) the (position, choice) pairs, by expert
        ends = torch.searchsorted(chosen, torch.arange(E, device=x.device), right=True, out_int32=True)  # (E,) of its pairs
        load = ends.diff(prepend=ends.new_zeros(1))  # (E,)
        multiple = 64 if device == "cpu" else 1  # a CPU prepares a product anew for each number of rows: have few of them
        room = -(-load // multiple) * multiple  # (E,) rows of each expert, some of them empty
        offsets = room.cumsum(0, dtype=torch.int32)  # (E,) ends of its rows
        row = torch.arange(N * k, device=x.device) + ((offsets - room) - (ends - load))[chosen]  # (N*k,) of each pair in order
        M = N * k + min(E, N * k) * (multiple - 1)  # room for all, whatever the routing
        row_of = torch.empty_like(order).scatter_(0, order, row)  # (N*k,) where each pair is
        pair_of = torch.zeros(M, dtype=order.dtype, device=x.device).scatter_(0, row, order)  # (M,) what is where
        filled = torch.zeros(M, 1, dtype=dtype, device=x.device).index_fill_(0, row, 1)  # an empty row gets no gradient

        rows = Take.apply(x, pair_of, row_of, k)  # (M, C)
        rows = swiglu(grouped_mm(rows, self.gate_up.to(dtype), offs=offsets))  # (M, F)
        rows = grouped_mm(rows, self.down.to(dtype), offs=offsets)  # (M, C)
        rows = rows * (Take.apply(weights.view(-1, 1), pair_of, row_of, 1) * filled)
        y = Take.apply(rows, row_of, pair_of, 1).view(B, L, k, C).sum(2)  # (B, L, C)
        load = load.float()

        return y, {
            "balance_loss": E * (load / (B * L) * probs.mean(0)).sum(),
            "z_loss": logits.logsumexp(-1).square().mean(),
            "load": load,
            "entropy": -(probs * probs.clamp(min=1e-20).log()).sum(-1).mean().detach(),
        }


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Also returns the MoE's router statistics, None if dense."""

    def __init__(self, config):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MoE(config) if config.n_expert else MLP(config)

    def forward(self, x, cos, sin):
        x = x + self.attn(self.attn_norm(x), cos, sin)  # (B, L, C)
        y = self.mlp(self.mlp_norm(x))  # (B, L, C), from a MoE together with its statistics
        y, router = y if isinstance(y, tuple) else (y, None)
        return x + y, router


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        cos, sin = rotary(config.block_size, config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos[:, None], persistent=False)  # (L, 1, D/2)
        self.register_buffer("sin", sin[:, None], persistent=False)
        self.init_weights()

    def init_weights(self):
        """Draw all weights anew, as in the table at the top of this file."""
        std = 0.5 / math.sqrt(self.config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 1:  # norms
                nn.init.ones_(p)
            elif name.endswith(("attn.out.weight", "mlp.down.weight", "mlp.down")):
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer))
            else:
                nn.init.normal_(p, std=std)

    def forward(self, bags, labels=None, weights=None):
        """Token ids to logits, or to the loss.

        bags (B, L, s), ordinary tokens being bags of one, or (B, L) for short.
        Without labels: logits (B, L, V).
        With labels (B, L, s), and weights (s,) over a bag's labels, uniform if None: (loss, router), where loss
        is the multi-hot cross-entropy in nats (the usual cross-entropy at s = 1) and router the statistics of
        the MoE layers, None for a dense model.
        """
        bags = bags if bags.dim() == 3 else bags.unsqueeze(-1)  # (B, L, s)
        x = embed_bags(bags, self.embed.weight)  # (B, L, C)
        cos, sin = self.cos[:x.size(1)].to(x.dtype), self.sin[:x.size(1)].to(x.dtype)
        routers = []
        for block in self.blocks:
            if self.config.checkpoint_activations and self.training:
                x, router = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x, router = block(x, cos, sin)
            routers.append(router)
        x = self.norm(x)
        if labels is None:
            return self.head(x)[..., :self.config.vocab_size]  # (B, L, V)
        loss = linear_multi_hot_cross_entropy(x, self.head.weight, labels, weights, vocab_size=self.config.vocab_size)
        if self.config.n_expert:
            return loss, {key: torch.stack([r[key] for r in routers]) for key in routers[0]}
        return loss, None

    @torch.no_grad()
    def balance_experts(self, load, rate):
        """Move each expert's bias by `rate` towards an even load: down if it had more than the mean, else up
        (auxiliary-loss-free balancing, arXiv 2408.15664). load (n_layer, E), over a whole step and all ranks."""
        for block, n in zip(self.blocks, load):
            block.mlp.bias += rate * torch.sign(n.mean() - n)

    def n_params(self, active=False, embedding=True):
        """Number of parameters, without padding. active: of the experts, only the top_k that a position uses."""
        c, n = self.config, sum(p.numel() for p in self.parameters())
        table = c.n_embd * c.vocab_size
        n -= (1 if c.tie_embeddings else 2) * c.n_embd * (c.padded_vocab_size - c.vocab_size)
        if active and c.n_expert:
            n -= c.n_layer * (c.n_expert - c.top_k) * 3 * c.n_embd * c.ff_dim
        return n if embedding else n - table * (not c.tie_embeddings)

    def flops_per_position(self):
        """FLOPs of one position of a training step, forward and backward: 6 per active weight of a matrix product
        (the embedding is a look-up) and 12 * H * D * L per layer for attention, as in the PaLM paper's appendix B,
        causality not deducted. The same for bags and tokens: a bag's mean adds about 6*s*C, under 0.1 %."""
        c = self.config
        norms = sum(p.numel() for p in self.parameters() if p.dim() == 1)
        return 6 * (self.n_params(active=True, embedding=False) - norms) + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size

    @torch.no_grad()
    def generate(self, tokens, n, temperature=1.0, top_k=None, generator=None):
        """Yield n further tokens, each (B,), after the prompt (B, T). temperature 0 takes the likeliest token."""
        for _ in range(n):
            logits = self(tokens[:, -self.config.block_size:])[:, -1].float()  # (B, V)
            if temperature == 0:
                new = logits.argmax(-1)
            else:
                if top_k:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits[logits < kth] = -torch.inf
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            tokens = torch.cat((tokens, new[:, None]), dim=1)
            yield new
