"""Twins: subclasses of the modules in model.py that compute the same, faster or in less memory.

tst.py and model.py say what is computed, so nobody has to read this file. A twin is used only where a trial
finds that it agrees with them: every edit there takes effect. Twins save memory (never all logits or every
expert on every position), passes over memory and, in nanotst/cpu.py, PyTorch's slow cases on a CPU.

Dimensions as in model.py; n positions in a chunk, M rows of experts.
"""

import copy
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import tst
from model import GPT, Attention, Head, MoE, swiglu
from nanotst.cpu import TWINS_ON_CPU, compute_dtype, tall_product

BOUNDS = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.05}  # largest relative error in a trial


def use_twins(model, machine, kinds=(), loss="mce", document_bags=False):
    """Turn modules of the model into their twins where these agree with the plain code, and print a line for
    each twin that does not. Call it before the model is sharded, wrapped or compiled.

    kinds: every (n_in, n_out) of the run's phases; loss, document_bags: as in train.py. Parameters keep their
    names, so checkpoints do not depend on twins."""
    c, here = model.config, TWINS_ON_CPU if machine.device_type == "cpu" else []
    if machine.device_type == "cuda" and 0 < c.attention_window < c.block_size and c.head_dim >= 16:
        here = [WindowAttention]
    groups = [[FusedHead, *here], *([[GroupedMoE]] if c.n_expert else [])]
    case = c, machine, list(dict.fromkeys([*kinds, (1, 1)])), loss, document_bags
    changed = None
    if machine.master:  # all of a group at once, one by one only if that fails
        failing = [group for group in groups if not agree(group, *case)]
        changed = [t.replaces for group in failing for t in group if not agree([t], *case)]
    changed = machine.from_master(changed)
    for twin in [twin for group in groups for twin in group if twin.replaces not in changed]:
        swap(model, twin)
    for name in changed:
        machine.say(f"{name} has changed, so it runs without its faster twin")


def swap(model, twin):
    """Give the twin's class to all modules of exactly the class that it replaces."""
    for module in model.modules():
        if type(module) is twin.__base__:
            module.__class__ = twin


def agree(twins, config, machine, kinds, loss, document_bags):
    """Whether losses and gradients of a small model are the same with the twins and without: in float64
    (float32 for experts, whose products are not in float64) and in the dtype of the run."""
    experts = GroupedMoE in twins
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the CPU's, which fork_rng puts back
        plain = GPT(small_config(config, experts))
        batches = [batch(plain.config, *kind, loss, document_bags) for kind in kinds]
    plain.to(machine.device)
    mine = copy.deepcopy(plain)
    for twin in twins:
        swap(mine, twin)
    if WindowAttention in twins:  # which is itself only when traced
        attention = mine.blocks[0].attn
        attention.attend = torch.compile(attention.attend, backend="eager", fullgraph=True)
    mine.head.chunk_rows = batches[0][0][..., 0].numel() // 2  # two chunks
    exact = "float32" if experts or machine.device_type == "mps" else "float64"
    good, precision = True, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    for dtype in (exact, machine.dtype):
        wanted = outcome(plain, batches, dtype, machine)
        try:
            got = outcome(mine, batches, dtype, machine)
            good &= all((x - y).norm() <= BOUNDS[dtype] * y.norm() for x, y in zip(got, wanted))
        except (TypeError, ValueError, RuntimeError):  # other arguments now, or other shapes
            good = False
    torch.set_float32_matmul_precision(precision)
    return good


def small_config(config, with_experts):
    """A model that takes every branch which the run's takes, in milliseconds."""
    L = 16 * math.ceil(min(config.block_size, 512) / 16)  # longer rows have no twin
    V = 37 if config.padded_vocab_size <= 1024 else 1030  # see BagEmbeddingOnCPU
    K = 4 if config.n_kv_head == config.n_head else 2
    E = min(config.n_expert, max(8, config.top_k)) if with_experts else 0
    small = dict(vocab_size=V, block_size=L, n_layer=1, n_embd=16, n_head=4, head_dim=8, ff_dim=16)
    small |= dict(n_kv_head=K, n_expert=E, balance_bias=E > 0 and config.balance_bias)
    return dataclasses.replace(config, checkpoint_activations=False, **small)


def batch(config, n_in, n_out, loss, document_bags):
    """Random arguments of GPT.forward for a phase, as train.py passes them."""
    L, V, bagged = config.block_size, config.vocab_size, max(n_in, n_out) > 1
    B = math.ceil(512 / L)  # N is large and a multiple of 16: see tall_product
    bags = torch.randint(V, (B, L, n_in), dtype=torch.int32)
    labels = torch.randint(V, (B, L, n_out), dtype=torch.int32)
    labels = labels.masked_fill(torch.rand(labels.shape) < 0.1, -100)
    weights = tst.bag_weights("power", n_out) if n_out > 1 and loss == "mce" else None
    share = torch.rand(bags.shape).softmax(-1) if document_bags and bagged else None
    return bags, labels, weights, loss if bagged else "mce", None, share


def outcome(model, batches, dtype, machine):
    """Losses of a model and its gradients, the routers' included."""
    model.to(torch.float64 if dtype == "float64" else torch.float32)
    results = []
    for args in batches:
        args = [x.to(machine.device) if torch.is_tensor(x) else x for x in args]
        model.zero_grad()
        with torch.autocast(machine.device_type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss, routing = model(*args)
            with torch.no_grad():
                results += [loss.clone(), model(*args)[0]]
        (loss + routing["balance_loss"].sum() if routing else loss).backward()
        results += [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        results += [routing["load"]] if routing else []
    return results


class GroupedMoE(MoE):
    """Runs the chosen experts alone: positions are sorted by expert, then two grouped products do all experts
    at once. One graph whatever the routing; an unchosen expert has a zero gradient, as DDP needs."""

    replaces = "MoE.mix"

    def mix(self, x, experts, weights):
        (N, k), x = experts.shape, x.to(compute_dtype(x))
        offsets, row_of, pair_of, filled, load = place_rows(experts, len(self.down), x.dtype)
        rows = Take.apply(x, pair_of, row_of, k)  # (M, C), sorted by expert
        rows = swiglu(F.grouped_mm(rows, self.gate_up.to(x.dtype), offs=offsets))  # (M, F)
        rows = F.grouped_mm(rows, self.down.to(x.dtype), offs=offsets)  # (M, C)
        weight = Take.apply(weights.view(-1, 1), pair_of, row_of, 1)  # (M, 1)
        rows = rows * (weight * filled)  # an empty row gets no gradient
        return Take.apply(rows, row_of, pair_of, 1).unflatten(0, (N, k)).sum(1), load  # (N, C)


def place_rows(experts, n_expert, dtype):
    """Sort the N*k pairs (position, chosen expert), (N, k), by expert into M rows. A CPU prepares a product
    again for each new number of rows, so there experts get multiples of 64. Returns
        offsets (E,)   int32, where each expert's rows end
        row_of (N*k,)  the row of each pair
        pair_of (M,)   the pair in each row, 0 in an empty one
        filled (M, 1)  1, or 0 in an empty row
        load (E,)      positions that chose each expert, float32
    """
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
    return offsets, row_of, pair_of, filled, load.float()


class Take(torch.autograd.Function):
    """Rows x[index // k]. Every row is taken k times, and `inverse` says where its copies went, so the
    backward pass is a look-up and a sum over k, in a fixed order, not a scatter with atomic additions."""

    @staticmethod
    def forward(ctx, x, index, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[index // k]  # (N, C) -> (N*k, C)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.k)).sum(1), None, None, None  # (N, C)


class WindowAttention(Attention):
    """Skips the keys outside the window block by block; a dense mask rules flash attention out. Eager, it
    would be slow, so the plain code runs there; on a CPU it has no backward pass."""

    replaces = "Attention.attend"

    def attend(self, q, k, v):
        if not torch.compiler.is_compiling():
            return super().attend(q, k, v)
        L = q.size(2)
        seen = lambda b, h, i, j: (j <= i) & (i - j < self.window)
        # traced, the layers share one mask
        mask = create_block_mask(seen, None, None, L, L, device=q.device)
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))


class FusedHead(Head):
    """Never holds all logits at once."""

    replaces = "tst.multi_hot_cross_entropy or Head.bag_loss"
    chunk_rows = None

    def bag_loss(self, x, labels, weights, loss):
        how = dict(vocab_size=self.vocab_size, chunk_rows=self.chunk_rows)
        if loss == "mce":
            return linear_multi_hot_cross_entropy(x, self.weight, labels, weights, **how)
        return linear_loss(tst.LOSSES[loss], x, self.weight, labels, **how)


def rows_of_chunk(weight):
    """Positions in a chunk, which then holds about 2^26 logits (2^29 on CUDA, which needs more to be busy): a
    multiple of 64, which a CPU multiplies fastest."""
    return max(64, (2**29 if weight.device.type == "cuda" else 2**26) // weight.size(0) // 64 * 64)


def linear_loss(loss, hidden, weight, labels, vocab_size=None, chunk_rows=None, ignore_index=-100):
    """Equals loss(hidden @ weight[:vocab_size].T, labels): hidden (..., C), weight (V, C), labels (..., s) ->
    scalar. loss: one of tst.LOSSES. Each chunk's logits are computed again for its gradients."""
    dtype = compute_dtype(hidden)
    hidden, labels = hidden.flatten(0, -2).to(dtype), labels.flatten(0, -2)  # (N, C), (N, s)
    weight = weight[:vocab_size]  # (V, C)
    has_label = (labels != ignore_index).any(-1)  # (N,)
    total = has_label.sum().clamp(min=1)

    def of_chunk(h, w, y, n_labelled):
        # w is cast here, so that its gradients are summed over the chunks in its own dtype, float32
        return loss(h @ w.to(dtype).T, y, ignore_index=ignore_index) * n_labelled / total

    mean = 0.0
    chunks = (x.split(chunk_rows or rows_of_chunk(weight)) for x in (hidden, labels, has_label))
    for h, y, some in zip(*chunks):
        mean = mean + checkpoint(of_chunk, h, weight, y, some.sum(), use_reentrant=False)
    return mean


def linear_multi_hot_cross_entropy(
    hidden, weight, labels, weights=None, ignore_index=-100, vocab_size=None, chunk_rows=None
):
    """Equals tst.multi_hot_cross_entropy(hidden @ weight.T, labels, weights) without ever holding all logits.

    hidden (..., C), weight (V, C), labels (..., s), weights (s,) or None -> scalar in nats, float32. Rows of
    `weight` from vocab_size on are padding. chunk_rows: positions in a chunk.

    Each chunk of positions turns its logits into the gradients of `hidden` and `weight` in the forward pass,
    so memory is one chunk's; one product and one log-sum-exp serve all s labels. Products run in the dtype of
    `hidden` (or of autocast), softmax and sums in float32 or float64. There is no second derivative."""
    dtype = compute_dtype(hidden)
    # compiled loops are vectorised along N
    labels = labels.flatten(0, -2).T.long().contiguous()  # (s, N)
    s, wide = labels.size(0), torch.promote_types(dtype, torch.float32)
    if weights is None:  # filled on the device: copying from the host would stall every step
        weights = torch.full((s,), 1 / s, dtype=wide, device=labels.device)
    valid = labels != ignore_index  # (s, N)
    share = weights.to(wide) / valid.sum(1).clamp(min=1)  # (s,), of each valid label
    coef = valid * share[:, None]  # (s, N)
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    sizes = vocab_size or weight.size(0), chunk_rows or rows_of_chunk(weight)
    hidden, labels = hidden.flatten(0, -2), labels.where(valid, 0)  # (N, C), (s, N)
    return LinearMCE.apply(hidden, weight, labels, coef, dtype, *sizes, with_grad)


class LinearMCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, coef, dtype, vocab_size, chunk_rows, with_grad):
        w = weight.to(dtype)  # (V, C)
        wide = coef.dtype  # float32, or float64
        total = coef.sum(0)  # (N,), 1/N where every label is valid
        share = coef / total.clamp(min=torch.finfo(wide).tiny)  # (s, N), each position sums to 1
        share = sum(own * (labels == y) for own, y in zip(share, labels))  # equal labels added up
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
            # side of each product, (n, C), and the labels' entries are overwritten: fewer passes over (n, V).
            label_dz = (label_log_p.exp() - share[:, rows].T).to(dtype)  # (n, s)
            z[torch.arange(len(z), device=z.device)[:, None], y] = label_dz
            grad_h.append((z @ w) * total[rows].to(dtype))  # (n, C)
            scaled = h * total[rows].to(dtype)  # (n, C)
            if grad_w is None:
                grad_w = tall_product(z, scaled).to(wide)  # (V, C)
            elif dtype == wide:
                grad_w.addmm_(z.T, scaled)
            else:  # products in bfloat16, their sum over the chunks in float32
                grad_w += z.T @ scaled
            del z  # or it would still be there when the next chunk's is made
        if with_grad:
            ctx.save_for_backward(torch.cat(grad_h).to(hidden.dtype), grad_w.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError("the fused loss has no second derivative; train with --plain")
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad_loss.to(grad_h.dtype), grad_w * grad_loss.to(grad_w.dtype), *[None] * 6


def softmax_(z, wide):
    """Turn logits (n, V) into z.softmax(-1), in place, computed in dtype `wide`. Returns logsumexp (n, 1)."""
    if torch.compiler.is_compiling():  # fused, and without a wide (n, V)
        lse = z.to(wide).logsumexp(-1, keepdim=True)
        z.copy_((z.to(wide) - lse).exp())
        return lse
    lse = []  # each line below is a pass; blocks of rows keep it in a CPU's cache
    for block in z.split(max(1, 2**20 // z.size(1)) if z.device.type == "cpu" else len(z)):
        p = block.softmax(-1, dtype=wide)  # its maximum is at least 1 / V
        lse.append(block.amax(-1, keepdim=True).to(wide) - p.amax(-1, keepdim=True).log())
        block.copy_(p)
    return torch.cat(lse)
