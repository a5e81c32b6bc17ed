"""The language model: a Llama decoder, optionally with Qwen3's qk-norm and mixture-of-experts (MoE) layers.

The computation is exactly that of Llama, Mistral, Mixtral or Qwen3, so other tools can read its checkpoints.
This file is plain PyTorch, and every edit takes effect: Linear.forward, Attention.attend, MoE.mix,
BagEmbedding.forward and Head.bag_loss have faster twins in nanotst/, used only where they agree with it.

Dimensions: B rows, L positions, N = B*L, C width (n_embd), H heads, K key/value heads, D head_dim, F width of
the MLP (ff_dim), V vocabulary, s bag size (1 in ordinary training), E experts, k experts per position.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tst


@dataclass
class GPTConfig:
    """Shape of a model. 0 means n_embd / n_head for head_dim, n_head for n_kv_head, 8/3 n_embd for ff_dim."""

    vocab_size: int
    block_size: int  # L, positions the transformer sees
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int = 0  # key/value heads; fewer than n_head is grouped-query attention
    head_dim: int = 0
    ff_dim: int = 0  # width of the MLP, or of one expert in a MoE
    qk_norm: bool = False  # RMSNorm on each head's queries and keys, as in Qwen3
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    attention_window: int = 0  # positions each one attends to, itself included; 0: all so far
    n_expert: int = 0  # 0: dense
    top_k: int = 0  # experts per position
    balance_bias: bool = False  # MoE: add a bias to the choice of experts to even out their load
    checkpoint_activations: bool = False  # recompute blocks in the backward pass: 1/3 more FLOPs

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.ff_dim = self.ff_dim or math.ceil(8 / 3 * self.n_embd / 64) * 64
        E, k = self.n_expert, self.top_k
        for wrong, message in (
            (self.attention_window < 0, "attention_window must not be negative"),
            (self.head_dim % 2, "head_dim must be even for rotary positions"),
            (self.n_head % self.n_kv_head, "n_head must be a multiple of n_kv_head"),
            (self.balance_bias and not E, "balance_bias needs a mixture: give n_expert and top_k"),
            (E and not 1 <= k <= E, "top_k must be between 1 and n_expert"),
            (E and (self.ff_dim | self.n_embd) % 8, "experts take widths in multiples of 8"),
        ):
            if wrong:
                raise ValueError(f"{message}, got {self}")

    @property
    def padded_vocab_size(self):
        """Rows of embedding and head: V rounded up, since matrix products like multiples of 64."""
        return math.ceil(self.vocab_size / 64) * 64

    @property
    def std(self):
        """Standard deviation of initial weights: 0.02 at C = 576, and it follows the width."""
        return 0.5 / math.sqrt(self.n_embd)

    @property
    def residual_std(self):
        """The same for what is added to the residual stream, which then keeps its scale with depth."""
        return self.std / math.sqrt(2 * self.n_layer)


class Init(NamedTuple):
    """How a parameter begins, and what it is. Each module names its own parameters in self.init:

        self.init = {"gate": 0.5}                          a scale that begins at 0.5
        self.init = {"mix": Init("matrix", nn.init.eye_)}  any function that fills a tensor in place

    Kinds: "scale" (no weight decay, no FLOPs), "matrix" (for Muon), "embedding", "head", "router", "expert".
    """

    kind: str
    fill: Callable


def normal(kind, std):
    return Init(kind, partial(nn.init.normal_, std=std))


def rotary(block_size, head_dim, theta):
    """cos and sin of the rotary angles at positions 0..L-1: (L, 1, D/2) each, float32."""
    freq = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # (D/2,)
    angle = torch.arange(block_size, dtype=torch.float32)[:, None, None] * freq  # (L, 1, D/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + D/2]) of (B, L, H, D) queries or keys by their position's angle."""
    a, b = x.chunk(2, dim=-1)  # (B, L, H, D/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in float32, result in the dtype of x."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.init = {"weight": 1.0}

    def forward(self, x):
        y = F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
        return y.to(x.dtype)  # CUDA's autocast gives float32


class Linear(nn.Linear):
    """x @ weight.T, without a bias. std: of the initial weights."""

    def __init__(self, n_in, n_out, std, kind="matrix"):
        super().__init__(n_in, n_out, bias=False)
        self.init = {"weight": normal(kind, std)}

    def forward(self, x):
        return F.linear(x, self.weight)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.n_head, config.n_kv_head, config.n_kv_head
        self.head_dim, self.window = config.head_dim, config.attention_window
        self.qkv = Linear(config.n_embd, sum(self.heads) * config.head_dim, config.std)
        self.out = Linear(config.n_head * config.head_dim, config.n_embd, config.residual_std)
        norm = partial(RMSNorm, config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x, cos, sin):
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B, L, H+K+K, D)
        q, k, v = qkv.split(self.heads, dim=2)  # (B, L, H, D), (B, L, K, D) twice
        q = rotate(self.q_norm(q), cos, sin).transpose(1, 2)  # (B, H, L, D)
        k = rotate(self.k_norm(k), cos, sin).transpose(1, 2)  # (B, K, L, D)
        y = self.attend(q, k, v.transpose(1, 2))  # (B, H, L, D)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, L, C)

    def attend(self, q, k, v):
        """q (B, H, L, D), k and v (B, K, L, D) -> (B, H, L, D). Query head h reads key/value head h*K // H;
        with a window, a position sees itself and the window - 1 positions before it."""
        L = q.size(2)
        mask = visible(L, self.window, q.device) if 0 < self.window < L else None  # (L, L)
        how = dict(is_causal=mask is None, enable_gqa=q.size(1) != k.size(1))
        return F.scaled_dot_product_attention(q, k, v, mask, **how)


def visible(L, window, device):
    """Whether position i sees position j: (L, L) bool."""
    return torch.ones(L, L, dtype=torch.bool, device=device).tril().triu(1 - (window or L))


def swiglu(x):
    """silu(gate) * up, which lie side by side: (..., 2F) -> (..., F)."""
    gate, up = x.chunk(2, dim=-1)
    return gate * gate.sigmoid() * up  # the compiled F.silu computes its exponential twice


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = Linear(config.n_embd, 2 * config.ff_dim, config.std)
        self.down = Linear(config.ff_dim, config.n_embd, config.residual_std)

    def forward(self, x):
        return self.down(swiglu(self.gate_up(x)))  # (B, L, C)


class Router(Linear):
    """Logits of the experts, in float32 (TF32 on CUDA) whatever the rest is in: (N, C) -> (N, E)."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class MoE(nn.Module):
    """Mixture of experts as in Qwen3: every position goes to the k most probable of E small MLPs, whose
    probabilities are renormalised to 1. No position is dropped.

    forward returns (y (B, L, C), statistics in float32):
        balance_loss  E * sum_e f_e P_e, which is k when balanced. P_e: mean probability of expert e;
                      f_e: share of positions that chose it, load_share (E,) (train.py passes the
                      previous step's, so how a batch is split does not matter) or else this batch's
        z_loss        mean squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906)
        load          (E,) positions that chose each expert, N*k in total
        entropy       mean entropy of a position's probabilities, nats
    """

    def __init__(self, config):
        super().__init__()
        E, C = config.n_expert, config.n_embd
        self.top_k = config.top_k
        self.router = Router(C, E, config.std, "router")
        self.gate_up = nn.Parameter(torch.empty(E, C, 2 * config.ff_dim))
        self.down = nn.Parameter(torch.empty(E, config.ff_dim, C))
        self.init = {"gate_up": normal("expert", config.std)}
        self.init["down"] = normal("expert", config.residual_std)
        self.register_buffer("bias", torch.zeros(E) if config.balance_bias else None)

    def forward(self, x, load_share=None):
        shape, x = x.shape, x.flatten(0, 1)  # (N, C)
        logits = self.router(x)  # (N, E)
        probs = logits.softmax(-1)
        scores = probs if self.bias is None else probs + self.bias  # see GPT.balance_experts
        experts = scores.topk(self.top_k).indices  # (N, k)
        weights = probs.gather(-1, experts)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        y, load = self.mix(x, experts, weights)
        load_share = load / len(x) if load_share is None else load_share  # (E,)
        return y.view(shape), {
            "balance_loss": probs.size(1) * (load_share * probs.mean(0)).sum(),
            "z_loss": logits.logsumexp(-1).square().mean(),
            "load": load,
            "entropy": -(probs * probs.clamp(min=1e-20).log()).sum(-1).mean().detach(),
        }

    def mix(self, x, experts, weights):
        """Weighted sum of each position's experts: x (N, C), experts and weights (N, k) -> (N, C), load (E,).
        Runs every expert on every position: simple, right, and slow."""
        y = 0
        for e, (gate_up, down) in enumerate(zip(self.gate_up, self.down)):
            weight = (weights * (experts == e)).sum(-1, keepdim=True)  # (N, 1), 0 if not chosen
            y = y + weight * (swiglu(x @ gate_up) @ down)  # (N, C)
        return y, F.one_hot(experts, len(self.down)).sum((0, 1)).float()


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Also returns the MoE's statistics, {} if dense."""

    def __init__(self, config):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MoE(config) if config.n_expert else MLP(config)

    def forward(self, x, cos, sin, load_share=None):
        x = x + self.attn(self.attn_norm(x), cos, sin)  # (B, L, C)
        h = self.mlp_norm(x)  # (B, L, C)
        y, routing = self.mlp(h, load_share) if isinstance(self.mlp, MoE) else (self.mlp(h), {})
        return x + y, routing


class BagEmbedding(nn.Embedding):
    """Mean embedding of each bag: (B, L, s) -> (B, L, C). A bag of one token is a look-up."""

    def __init__(self, config):
        super().__init__(config.padded_vocab_size, config.n_embd)
        self.init = {"weight": normal("embedding", config.std)}

    def forward(self, bags, share=None):
        return tst.embed_bags(bags, self.weight, share)


class Head(Linear):
    """Hidden states (B, L, C) to logits (B, L, V) or, given labels (B, L, s), to their loss. Rows of the
    weight beyond vocab_size are padding."""

    def __init__(self, config):
        super().__init__(config.n_embd, config.padded_vocab_size, config.std, "head")
        self.vocab_size = config.vocab_size

    def forward(self, x, labels=None, weights=None, loss="mce"):
        return self.logits(x) if labels is None else self.bag_loss(x, labels, weights, loss)

    def logits(self, x):
        return F.linear(x, self.weight)[..., : self.vocab_size]  # (B, L, V)

    def bag_loss(self, x, labels, weights, loss):
        if loss == "mce":
            return tst.multi_hot_cross_entropy(self.logits(x), labels, weights)
        return tst.LOSSES[loss](self.logits(x), labels)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = BagEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.head = Head(config)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        for _, p, init in self.inits():
            init.fill(p)
        self.init_buffers()

    def inits(self):
        """Yield (name, parameter, Init) of every parameter. Raises ValueError for one without an Init."""
        for full_name, p in self.named_parameters():  # a tied head is the embedding
            path, _, name = full_name.rpartition(".")
            module = self.get_submodule(path)
            init = getattr(module, "init", {}).get(name)
            if init is None:
                where = f'self.init = {{"{name}": a number or an Init}} in {type(module).__name__}'
                raise ValueError(f"{full_name} has no initial value; set {where}, see model.Init")
            if not isinstance(init, Init):
                init = Init("scale", partial(nn.init.constant_, val=init))
            yield full_name, p, init

    def init_buffers(self):
        """Fill everything that is not a parameter."""
        with torch.device(self.norm.weight.device):
            cos, sin = rotary(self.config.block_size, self.config.head_dim, self.config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for block in self.blocks if self.config.balance_bias else ():
            block.mlp.bias.zero_()

    def forward(self, bags, labels=None, weights=None, loss="mce", load_shares=None, share=None):
        """Token ids (B, L, s) or (B, L) to logits (B, L, V) or, with labels (B, L, n_out), (loss, routing).

        loss is one of tst.LOSSES in nats ("mce" with one label is cross-entropy), routing the statistics of
        the MoE layers, None if dense. weights (n_out,): label weights within a bag (mce only). load_shares
        (n_layer, E): see MoE. share (B, L, s): see tst.embed_bags.
        """
        bags = bags if bags.dim() == 3 else bags.unsqueeze(-1)  # (B, L, s), tokens are bags of one
        x = self.embed(bags, share)  # (B, L, C)
        cos, sin = self.cos[: x.size(1)].to(x.dtype), self.sin[: x.size(1)].to(x.dtype)
        load_shares = [None] * len(self.blocks) if load_shares is None else load_shares
        routing, recompute = [], self.config.checkpoint_activations and self.training
        for block, load_share in zip(self.blocks, load_shares):
            args = x, cos, sin, load_share
            x, stats = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
            routing.append(stats)
        x = self.norm(x)
        if labels is None:
            return self.head(x)  # (B, L, V)
        routing = {key: torch.stack([r[key] for r in routing]) for key in routing[0]}
        return self.head(x, labels, weights, loss), routing or None

    def balance_experts(self, load, rate):
        """Move each expert's bias by `rate`: down if its load was above the mean, else up (arXiv 2408.15664).
        load (n_layer, E), over a whole step and all ranks."""
        for block, n in zip(self.blocks, load):
            block.mlp.bias += rate * torch.sign(n.mean() - n)

    def n_params(self, active=False, without=()):
        """Parameters without padding; active: only the experts of a position; without: kinds to leave out."""
        c, total = self.config, 0
        for _, p, (kind, _) in self.inits():
            n, kind = p.numel(), "head" if p is self.head.weight else kind  # also a tied embedding
            if kind in ("embedding", "head"):
                n -= c.n_embd * (c.padded_vocab_size - c.vocab_size)
            if kind == "expert" and active:
                n = n * c.top_k // c.n_expert
            total += 0 if kind in without else n
        return total

    def flops_per_position(self):
        """FLOPs of one position in a training step, as in the PaLM paper, appendix B: 6 per active weight of
        a matrix product, 12*H*D*L per layer for attention (with a window, its length for L)."""
        c = self.config
        seen = min(c.block_size, c.attention_window or c.block_size)
        attention = 12 * c.n_layer * c.n_head * c.head_dim * seen
        return 6 * self.n_params(active=True, without=("embedding", "scale")) + attention

    @torch.no_grad()
    def generate(self, tokens, n, temperature=1.0, top_k=None, generator=None):
        """Yield n more tokens, each (B,), after the prompt (B, T). temperature 0: the likeliest token."""
        for _ in range(n):
            logits = self(tokens[:, -self.config.block_size :])[:, -1].float()  # (B, V)
            if top_k:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
                logits[logits < kth] = -torch.inf
            new = logits.argmax(-1)  # (B,)
            if temperature:
                p = (logits / temperature).softmax(-1)  # (B, V)
                new = torch.multinomial(p, 1, generator=generator)[:, 0]
            tokens = torch.cat((tokens, new[:, None]), dim=1)
            yield new
