"""Token Superposition Training (TST) as pure functions. Needs torch alone: copy this file into any trainer.

Efficient Pre-Training with Token Superposition, Peng, Gigant, Quesnelle, arXiv 2605.06546.
From nanoTST, version 1.0 (November 2026), where TRAPS.md lists what goes wrong.

    tokens   t0 t1 t2 | t3 t4 t5 | t6 t7 t8 | t9 ...        a row of L*s + s tokens, here s = 3
    input    mean of      mean of    mean of
             their embeddings  ...                          (B, L, s) -> (B, L, C)
    target   {t3 t4 t5}   {t6 t7 t8} {t9 ...}               the next bag, not the next token

For the first r of the steps the transformer sees bags; after that s = 1, which is ordinary next-token
training. There is no second code path: a bag of one token is a token, and the loss below is then
cross-entropy.

Dimensions: B rows, L positions the transformer sees, s bag size, C width, V vocabulary, N = B*L.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# -------------------------------------------------------------------------------------------- phases of a run

MODES = ("full", "input", "output")


@dataclass(frozen=True)
class Phase:
    """Steps start..stop-1 of a run. A position reads `n_in` tokens as one bag and predicts the next `n_out`
    tokens; the next position starts `n_in` tokens later."""

    start: int
    stop: int
    n_in: int
    n_out: int

    @property
    def bag_size(self):
        """s, or 1 in ordinary training."""
        return max(self.n_in, self.n_out)


def phase_list(max_steps, bag_sizes, superposition_ratio, mode="full"):
    """The phases of a run: a share `superposition_ratio` of the steps on bags, then ordinary training.

    bag_sizes, [4] or, stepping down, [8, 4, 2], share the superposition steps evenly. mode "full" is the
    paper's method; its ablations are "input", which bags only the input and predicts one token, and
    "output", which reads single tokens and predicts the next s. Raises ValueError for impossible phases.
    """
    if mode not in MODES:
        raise ValueError(f"unknown superposition {mode!r}, choose one of {', '.join(MODES)}")
    if not 0 <= superposition_ratio <= 1:
        raise ValueError(f"superposition_ratio must lie in 0..1, got {superposition_ratio}")
    steps, n = round(superposition_ratio * max_steps), len(bag_sizes)
    if not superposition_ratio:
        return [Phase(0, max_steps, 1, 1)]
    phases, sizes = [], [*bag_sizes, 1] if steps < max_steps else bag_sizes
    for i, s in enumerate(sizes):
        start, stop = steps * i // n, steps * (i + 1) // n if i < n else max_steps
        kind = (1 if mode == "output" else s), (1 if mode == "input" else s)
        if phases and kind == (phases[-1].n_in, phases[-1].n_out):
            start = phases.pop().start  # equal bags are one phase, without a switch
        phases.append(Phase(start, stop, *kind))
    check_phases(phases)
    return phases


def check_phases(phases):
    """Raise ValueError unless phases follow each other and each one's bags divide into the next one's."""
    for phase in phases:
        if phase.start >= phase.stop:
            todo = "use a larger superposition_ratio"
            raise ValueError(f"the phase with bags of {phase.bag_size} has no steps; {todo}")
        if phase.n_in < 1 or phase.n_out < 1:
            raise ValueError(f"bag sizes must be at least 1, got {min(phase.n_in, phase.n_out)}")
    for before, after in zip(phases, phases[1:]):
        if before.stop != after.start:
            raise ValueError(f"a phase stops at {before.stop}, the next starts at {after.start}")
        if before.n_in % after.n_in:
            raise ValueError(f"bags of {before.n_in} do not divide into bags of {after.n_in}")


def phase_at(phases, step):
    """The phase of step number `step`, from 0. It depends on the step alone, so a resumed run cannot be in
    the wrong phase. The last phase never ends."""
    return next((phase for phase in phases if step < phase.stop), phases[-1])


# ------------------------------------------------------------------------------------------- input and target


def bags_and_labels(tokens, n_in, n_out):
    """Split rows of L*n_in + n_out tokens into input bags and their labels, the n_out tokens that follow each
    bag (the paper's section 3): (B, L*n_in + n_out) -> two views, (B, L, n_in) and (B, L, n_out).

    The shift is a whole bag: shifted by one token, an input bag would hold s-1 of the s labels it has to
    predict. Raises ValueError if a row does not divide into whole bags.
    """
    length = tokens.size(-1) - n_out
    if n_in < 1 or n_out < 1 or length < n_in or length % n_in:
        row = f"a row of {tokens.size(-1)} tokens"
        raise ValueError(f"{row} is not bags of {n_in} and the {n_out} tokens that follow")
    bags = tokens[..., :length].unflatten(-1, (-1, n_in))  # (B, L, n_in)
    return bags, tokens[..., n_in:].unfold(-1, n_out, n_in)  # (B, L, n_out)


def within_documents(tokens, n_in, n_out, separator):
    """Bags that mix no documents, with the same rows and shapes: a bag averages only the tokens in its last
    token's document, and labels from other documents are ignored.

    A separator counts as part of the document after it, even where a corpus writes it behind each document.
    So it is never a label here: ordinary steps teach where a document ends.

    tokens (B, L*n_in + n_out), cut into documents by the token `separator` -> each token's share of its bag
    (B, L, n_in), float32, and labels (B, L, n_out), -100 where ignored.
    """
    document = (tokens == separator).cumsum(-1)  # (B, L*n_in + n_out), its number in the row
    bag_document, label_document = bags_and_labels(document, n_in, n_out)
    own = bag_document[..., -1:]  # (B, L, 1)
    same = (bag_document == own).float()  # (B, L, n_in)
    labels = bags_and_labels(tokens, n_in, n_out)[1]
    return same / same.sum(-1, keepdim=True), labels.where(label_document == own, -100)


def embed_bags(bags, weight, share=None):
    """Mean embedding of each bag: (B, L, s) token ids, (V, C) table -> (B, L, C).

    The mean is taken in float32 and returned in the dtype of the table, or of autocast where that is on. A
    bag of one token is exactly an embedding look-up. share (B, L, s): weights that sum to 1 in each bag.
    """
    device = bags.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    x = F.embedding(bags, weight)  # (B, L, s, C)
    if share is not None:
        return (wide(x) * share[..., None]).sum(-2).to(dtype)
    if bags.size(-1) == 1:
        return x.squeeze(-2).to(dtype)
    return x.mean(-2, dtype=torch.promote_types(x.dtype, torch.float32)).to(dtype)


# --------------------------------------------------------------------------------------- weights within a bag

BAG_WEIGHTS = ("uniform", "power", "exponential", "first", "fitted")


def bag_weights(kind, n_out, c0=3.63, a=1.35, k=-1.25):
    """Weights of the target bag's tokens i = 1..s in the loss, normalised to 1: (s,) float32.

    uniform 1, power 1/i, exponential exp(-i), first only i = 1, fitted c0 + a * i^k. The defaults of `fitted`
    are the paper's fit to the mutual information of tokens at distance i in DCLM; c0 dominates and makes the
    weights almost uniform, c0 = 0 keeps only the decay. Raises ValueError for another kind.
    """
    i = torch.arange(1, n_out + 1, dtype=torch.float64)
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


# ----------------------------------------------------------------------------------------------------- losses
# Each takes logits (..., V) and labels (..., s), s = 1 included, and returns a scalar in nats: the mean over
# positions that have a label. Labels equal to ignore_index do not count. To add a loss, write a function and
# name it in LOSSES below.


def multi_hot_cross_entropy(logits, labels, weights=None, ignore_index=-100):
    """Multi-hot cross-entropy, MCE, the loss of the paper (its section 3).

        MCE = sum_i w_i CE(z, y_i) = logsumexp(z) - sum_i w_i z[y_i]

    weights (s,) summing to 1, uniform if None -> nats. A label that occurs twice in a bag counts twice.
    For s = 1 this is F.cross_entropy. Each offset i is averaged over the positions where its label is valid,
    then the offsets by weight, as in the paper's loop of s cross-entropies; one that is valid nowhere counts
    zero.
    """
    log_p = F.log_softmax(wide(logits), -1).flatten(0, -2)  # (N, V)
    labels = labels.flatten(0, -2).long()  # (N, s)
    if weights is None:  # filled on the device: copying from the host would stall every step
        weights = log_p.new_full((labels.size(-1),), 1 / labels.size(-1))
    valid = labels != ignore_index  # (N, s)
    label_log_p = log_p.gather(-1, labels.where(valid, 0)).where(valid, 0)  # (N, s)
    return -(weights * label_log_p.sum(0) / valid.sum(0).clamp(min=1)).sum()


def summed_probability(logits, labels, ignore_index=-100):
    """The paper's MCEAlt: minus the log of the bag's summed probability, nats. For s = 1 this is
    F.cross_entropy."""
    valid = labels != ignore_index  # (..., s)
    has_label = valid.any(-1, keepdim=True)  # (..., 1)
    log_p = F.log_softmax(wide(logits), -1)  # (..., V)
    label_log_p = log_p.gather(-1, labels.long().where(valid, 0))  # (..., s)
    label_log_p = label_log_p.masked_fill(~valid & has_label, -torch.inf)
    return mean_where(has_label, -label_log_p.logsumexp(-1, keepdim=True))


def binary_cross_entropy(logits, labels, ignore_index=-100):
    """Binary cross-entropy against the multi-hot target, nats, summed over the vocabulary. (torch's own form
    divides by V; gradients that small drown in AdamW's epsilon.)"""
    target, has_label = multi_hot(logits, labels, ignore_index)  # (..., V), (..., 1)
    loss = F.binary_cross_entropy_with_logits(wide(logits), target, reduction="none")  # (..., V)
    return mean_where(has_label, loss.sum(-1, keepdim=True))


def multi_label_hinge(logits, labels, ignore_index=-100):
    """Hinge with margin 1: each label in the bag should score 1 above every token outside it.

    mean over labels y in the bag of: sum over tokens v outside the bag of max(0, 1 - z[y] + z[v])
    """
    z = wide(logits)
    inside, has_label = multi_hot(logits, labels, ignore_index)  # (..., V), (..., 1)
    outside = 1 - inside  # (..., V)
    valid = labels != ignore_index  # (..., s)
    label_z = z.gather(-1, labels.long().where(valid, 0))  # (..., s)
    loss = 0.0
    # s passes over (..., V), not one over (..., s, V)
    for one_z, one_valid in zip(label_z.unbind(-1), valid.unbind(-1)):
        loss = loss + ((1 - one_z[..., None] + z).clamp(min=0) * outside).sum(-1) * one_valid
    return mean_where(has_label, loss[..., None] / valid.sum(-1, keepdim=True).clamp(min=1))


LOSSES = {
    "mce": multi_hot_cross_entropy,
    "mce_alt": summed_probability,
    "bce": binary_cross_entropy,
    "hinge": multi_label_hinge,
}


def wide(x):
    """x in float32, or in float64 if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def multi_hot(logits, labels, ignore_index=-100):
    """1 where a token is in the bag, else 0: (..., V); and whether a position has any label: (..., 1)."""
    valid = labels != ignore_index  # (..., s)
    target = torch.zeros_like(wide(logits))  # (..., V)
    index, one = labels.long().where(valid, 0), valid.to(target.dtype)  # (..., s) each
    return target.scatter_reduce(-1, index, one, "amax"), valid.any(-1, keepdim=True)


def mean_where(mask, x):
    """Mean of x where mask is true, 0 if it is true nowhere."""
    return x.where(mask, 0).sum() / mask.sum().clamp(min=1)


if __name__ == "__main__":  # python tst.py tries the traps on this file
    try:
        from tools.traps import check
    except ImportError:
        raise SystemExit("the checker is tools/traps.py in nanoTST") from None
    split = lambda tokens, s: bags_and_labels(tokens, s, s)
    raise SystemExit(not check(loss=multi_hot_cross_entropy, split=split, embed=embed_bags))
