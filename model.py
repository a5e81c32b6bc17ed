"""The language model: a Llama decoder, optionally with Qwen3's qk-norm and mixture-of-experts (MoE) layers.

Parameter names are our own; the computation is exactly Llama's (dense) and Qwen3-MoE's (MoE), so a checkpoint
can be handed to the tools that people already use. Read it top down; nothing dense depends on the class MoE.

Dimensions: B rows, L positions, C width (n_embd), H heads, K key/value heads, D head_dim, F width of the MLP
(ff_dim), V vocabulary, s bag size (1 in ordinary training), E experts, k experts per position (top_k).

Initialisation, all without biases:

    parameter                 distribution               why
    embed, head               N(0, 0.5 / sqrt(C))        0.02 at C = 576, and it follows the width
    qkv, gate_up, router      N(0, 0.5 / sqrt(C))
    attention out, MLP down   the same / sqrt(2 n_layer) the residual stream keeps its scale with depth
    norms                     1
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanotst import kernels
from tst import LOSSES


@dataclass
class GPTConfig:
    """Shape of a model. Zeros are filled in: head_dim = n_embd / n_head, n_kv_head = n_head, ff_dim = 8/3
    n_embd."""

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
    attention_window: int = 0  # positions that a position sees, itself included; 0: all before it
    n_expert: int = 0  # 0: dense
    top_k: int = 0  # experts per position
    balance_bias: bool = (
        False  # MoE: choose experts by probability plus a bias that evens out their load
    )
    checkpoint_activations: bool = False  # recompute blocks in the backward pass: 1/3 more FLOPs

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.ff_dim = self.ff_dim or math.ceil(8 / 3 * self.n_embd / 64) * 64
        if self.attention_window < 0:
            raise ValueError(f"attention_window must not be negative, got {self.attention_window}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}"
            )
        if self.balance_bias and not self.n_expert:
            raise ValueError(
                "balance_bias belongs to a mixture of experts: give n_expert and top_k, too"
            )
        if self.n_expert and not 1 <= self.top_k <= self.n_expert:
            raise ValueError(
                f"top_k must be between 1 and n_expert {self.n_expert}, got {self.top_k}"
            )
        if self.n_expert and (self.ff_dim % 8 or self.n_embd % 8):
            raise ValueError(
                "a mixture of experts needs n_embd and ff_dim in multiples of 8 (16 bytes, for grouped_mm)"
            )

    @property
    def padded_vocab_size(self):
        """Rows of the embedding and the head: matrix products like multiples of 64. The loss leaves them
        out."""
        return math.ceil(self.vocab_size / 64) * 64


def rotary(block_size, head_dim, theta):
    """cos and sin of the rotary angles at positions 0..L-1: 2 tensors (L, D/2), float32."""
    freq = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # (D/2,)
    angle = torch.arange(block_size, dtype=torch.float32)[:, None] * freq  # (L, D/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + D/2]) of queries or keys by their position's angle: (B, L, H, D) ->
    same."""
    a, b = x.chunk(2, dim=-1)  # (B, L, H, D/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in float32, result in the dtype of x."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
        return y.to(x.dtype)  # CUDA's autocast gives float32


class Linear(nn.Linear):
    """x @ weight.T, without a bias."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return kernels.linear(x, self.weight)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.n_head, config.n_kv_head, config.n_kv_head
        self.head_dim, self.window = config.head_dim, config.attention_window
        self.qkv = Linear(config.n_embd, sum(self.heads) * config.head_dim)
        self.out = Linear(config.n_head * config.head_dim, config.n_embd)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin):
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B, L, H+K+K, D)
        q, k, v = qkv.split(self.heads, dim=2)  # (B, L, H, D), (B, L, K, D) twice
        q = rotate(self.q_norm(q), cos, sin).transpose(1, 2)  # (B, H, L, D)
        k = rotate(self.k_norm(k), cos, sin).transpose(1, 2)  # (B, K, L, D)
        y = kernels.causal_attention(q, k, v.transpose(1, 2), self.window)  # (B, H, L, D)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, L, C)


def swiglu(x):
    """silu(gate) * up of both side by side, (..., 2F) -> (..., F). Written out, since the compiled backward
    pass of F.silu takes its exponential twice."""
    gate, up = x.chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = Linear(config.n_embd, 2 * config.ff_dim)
        self.down = Linear(config.ff_dim, config.n_embd)

    def forward(self, x):
        return self.down(swiglu(self.gate_up(x)))  # (B, L, C)


class Router(nn.Linear):
    """Logits of the experts, in float32 (TF32 on CUDA) whatever the rest is in: (N, C) -> (N, E)."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class MoE(nn.Module):
    """Mixture of experts as in Qwen3: every position goes to the k most probable of E small MLPs.

    Router in float32: softmax over all experts, top k, their weights renormalised to 1. No expert has a
    capacity and no position is dropped. Positions are sorted by expert, so that two grouped matrix products
    over the stacked weights do all experts at once: one graph whatever the routing, and an expert nobody
    chose has a zero gradient rather than none, which is what DDP needs.

    forward returns (y (B, L, C), statistics), the statistics being float32 tensors:
        balance_loss  E * sum_e f_e P_e, which is k when balanced. P_e: mean probability of expert e here;
                      f_e: share of positions that chose it, load_share (E,) if given, else of those here.
                      train.py gives that of the step before, over all ranks and micro-steps, so that the
                      loss does not depend on how a batch is cut; Qwen3 takes each micro-batch's own
        z_loss        mean squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906)
        load          (E,) positions that chose each expert, sum B*L*k
        entropy       mean entropy of the router's probabilities at a position, nats
    """

    def __init__(self, config):
        super().__init__()
        E, C = config.n_expert, config.n_embd
        self.top_k, self.balance_bias = config.top_k, config.balance_bias
        self.router = Router(C, E, bias=False)
        self.gate_up = nn.Parameter(torch.empty(E, C, 2 * config.ff_dim))
        self.down = nn.Parameter(torch.empty(E, config.ff_dim, C))
        if (
            self.balance_bias
        ):  # added to the probabilities for the choice alone, see GPT.balance_experts
            self.register_buffer("bias", torch.zeros(E))

    def forward(self, x, load_share=None):
        (B, L, C), k, E = x.shape, self.top_k, self.gate_up.size(0)
        x = x.flatten(0, 1).to(kernels.compute_dtype(x))  # (N, C)
        logits = self.router(x)  # (N, E)
        probs = logits.softmax(-1)
        if self.balance_bias:
            experts = (probs + self.bias).topk(k).indices  # (N, k)
            weights = probs.gather(-1, experts)
        else:
            weights, experts = probs.topk(k)  # (N, k) each
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)

        place = kernels.place_rows(experts, E, x.dtype)
        rows = kernels.rows_of_experts(x, place)  # (M, C), sorted by expert
        rows = swiglu(kernels.grouped_product(rows, self.gate_up, place.offsets))  # (M, F)
        rows = kernels.grouped_product(rows, self.down, place.offsets)  # (M, C)
        y = kernels.sum_of_experts(rows, weights, place).view(B, L, C)

        load_share = place.load / (B * L) if load_share is None else load_share  # (E,)
        return y, {
            "balance_loss": E * (load_share * probs.mean(0)).sum(),
            "z_loss": logits.logsumexp(-1).square().mean(),
            "load": place.load,
            "entropy": -(probs * probs.clamp(min=1e-20).log()).sum(-1).mean().detach(),
        }


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Also returns the MoE's statistics, None if dense."""

    def __init__(self, config):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MoE(config) if config.n_expert else MLP(config)

    def forward(self, x, cos, sin, load_share=None):
        x = x + self.attn(self.attn_norm(x), cos, sin)  # (B, L, C)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(self.mlp_norm(x)), None
        y, routing = self.mlp(self.mlp_norm(x), load_share)  # (B, L, C)
        return x + y, routing


class BagEmbedding(nn.Embedding):
    """Mean embedding of each bag: (B, L, s) -> (B, L, C). A bag of one token is a look-up. See
    tst.embed_bags."""

    def forward(self, bags, share=None):
        return kernels.embed_bags(bags, self.weight, share)


class Head(Linear):
    """Logits (B, L, V) of hidden states (B, L, C); or, with labels (B, L, s), their loss, without holding all
    logits. Its rows beyond vocab_size are padding and get no probability."""

    def __init__(self, config):
        super().__init__(config.n_embd, config.padded_vocab_size)
        self.vocab_size = config.vocab_size

    def forward(self, x, labels=None, weights=None, loss="mce"):
        if labels is None:
            return F.linear(x, self.weight)[..., : self.vocab_size]  # (B, L, V)
        if loss == "mce":
            return kernels.linear_multi_hot_cross_entropy(
                x, self.weight, labels, weights, vocab_size=self.vocab_size
            )
        return kernels.linear_loss(LOSSES[loss], x, self.weight, labels, vocab_size=self.vocab_size)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = BagEmbedding(config.padded_vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.head = Head(config)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        for name in ("cos", "sin"):  # (L, 1, D/2)
            angles = torch.empty(config.block_size, 1, config.head_dim // 2)
            self.register_buffer(name, angles, persistent=False)
        self.init_weights()
        self.init_buffers()

    def init_weights(self):
        """Draw all weights anew, as in the table at the top of this file."""
        for name, p in self.named_parameters():
            self.init_weight(name, p)

    def init_weight(self, name, p):
        std = 0.5 / math.sqrt(self.config.n_embd)
        if p.dim() == 1:  # norms
            nn.init.ones_(p)
        elif name.endswith(("attn.out.weight", "mlp.down.weight", "mlp.down")):
            nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer))
        else:
            nn.init.normal_(p, std=std)

    def init_buffers(self):
        """Fill all that is no parameter."""
        with torch.device(self.cos.device):
            angles = rotary(self.config.block_size, self.config.head_dim, self.config.rope_theta)
        for buffer, values in zip((self.cos, self.sin), angles):
            buffer.copy_(values[:, None])
        for block in self.blocks:
            if self.config.balance_bias:
                block.mlp.bias.zero_()

    def forward(
        self, bags, labels=None, weights=None, loss="mce", load_shares=None, bag_share=None
    ):
        """Token ids to logits, or to the loss.

        bags (B, L, s), ordinary tokens being bags of one, or (B, L) for short. Without labels: logits (B, L,
        V). With labels (B, L, n_out): (loss, routing), where loss is one of tst.LOSSES, in nats ("mce" is the
        usual cross-entropy for one label), and routing the statistics of the MoE layers, None for a dense
        model. weights (n_out,) of a bag's labels, uniform if None, belong to "mce". load_shares (n_layer, E):
        see MoE. bag_share (B, L, s): see tst.embed_bags.
        """
        bags = bags if bags.dim() == 3 else bags.unsqueeze(-1)  # (B, L, s)
        x = self.embed(bags, bag_share)  # (B, L, C)
        cos, sin = self.cos[: x.size(1)].to(x.dtype), self.sin[: x.size(1)].to(x.dtype)
        routing = []  # of each block
        load_shares = [None] * len(self.blocks) if load_shares is None else load_shares
        for block, load_share in zip(self.blocks, load_shares):
            if self.config.checkpoint_activations and self.training:
                x, of_block = checkpoint(block, x, cos, sin, load_share, use_reentrant=False)
            else:
                x, of_block = block(x, cos, sin, load_share)
            routing.append(of_block)
        x = self.norm(x)
        if labels is None:
            return self.head(x)  # (B, L, V)
        loss = self.head(x, labels, weights, loss)
        if self.config.n_expert:
            return loss, {key: torch.stack([r[key] for r in routing]) for key in routing[0]}
        return loss, None

    @torch.no_grad()
    def balance_experts(self, load, rate):
        """Move each expert's bias by `rate` towards an even load: down if it had more than the mean, else up
        (auxiliary-loss-free balancing, arXiv 2408.15664). load (n_layer, E), over a whole step and all
        ranks."""
        for block, n in zip(self.blocks, load):
            block.mlp.bias += rate * torch.sign(n.mean() - n)

    def n_params(self, active=False, embedding=True):
        """Number of parameters, without padding. active: of the experts, only the top_k that a position
        uses."""
        c, n = self.config, sum(p.numel() for p in self.parameters())
        table = c.n_embd * c.vocab_size
        n -= (1 if c.tie_embeddings else 2) * c.n_embd * (c.padded_vocab_size - c.vocab_size)
        if active and c.n_expert:
            n -= c.n_layer * (c.n_expert - c.top_k) * 3 * c.n_embd * c.ff_dim
        return n if embedding else n - table * (not c.tie_embeddings)

    def flops_per_position(self):
        """FLOPs of one position of a training step, forward and backward: 6 per active weight of a matrix
        product (the embedding is a look-up) and 12 * H * D * L per layer for attention (of a window, its
        length), as in the PaLM paper's appendix B, causality not deducted. The same for bags and tokens: a
        bag's mean adds about 6*s*C, under 0.1 %."""
        c = self.config
        norms = sum(p.numel() for p in self.parameters() if p.dim() == 1)
        return 6 * (
            self.n_params(active=True, embedding=False) - norms
        ) + 12 * c.n_layer * c.n_head * c.head_dim * min(
            c.block_size, c.attention_window or c.block_size
        )

    @torch.no_grad()
    def generate(self, tokens, n, temperature=1.0, top_k=None, generator=None):
        """Yield n further tokens, each (B,), after the prompt (B, T). temperature 0 takes the likeliest
        token."""
        for _ in range(n):
            logits = self(tokens[:, -self.config.block_size :])[:, -1].float()  # (B, V)
            if temperature == 0:
                new = logits.argmax(-1)
            else:
                if top_k:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits[logits < kth] = -torch.inf
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[
                    :, 0
                ]
            tokens = torch.cat((tokens, new[:, None]), dim=1)
            yield new
