"""Mutual information of tokens at a distance, on a corpus of one's own, and bag weights fitted to it.

    python -m tools.fit_mi --dataset=python_source --out=out/fitted.json
    python train.py --dataset=python_source --bag_size=8 --bag_weights=fitted --fitted=out/fitted.json

How much does a token tell about the one d places on? I(d) = H(x_t) + H(x_t+d) - H(x_t, x_t+d), in nats, over
all pairs that training reads, across documents too. Through it goes the curve c0 + a d^k, which weights the
i-th token of a bag by c0 + a i^k.

Counting is biased. A joint distribution has V^2 cells, most pairs are seen once or never, and the plain
estimate takes that for information: of GPT-2 tokens, ten million seem to share 1 nat with tokens of another
document. All of it would go into c0, and make the weights uniform. Two corrections:

1. Every entropy by Grassberger's estimator (arXiv physics/0307138): log N - sum n G(n) / N in place of
   log N - sum n log n / N. It suffices while most cells are seen several times.
2. What that leaves is measured on pairs that share no information, segments of the text against its
   segments in random order: there, the first correction takes away C and leaves an error E. At distance d it
   takes away C(d), and E C(d) / C is subtracted, at most E. (To subtract all of E would take away real
   information, too: tokens that depend on each other have fewer pairs, each seen more often.)

On English text, a vocabulary of its 2,000 most frequent tokens, at distances 1, 4 and 16, in nats:

    49 million tokens    1.173  0.130  0.048    as counted    1.186  0.163  0.084
    ten million          1.176  0.131  0.047                  1.219  0.236  0.162
    a hundred thousand   1.221  0.172  0.059                  1.770  1.078  1.025

Of ten million bytes both together take away 0.0006 nats at most. Text of several kinds, one after another,
keeps what a token tells of its kind: a hundred thousand tokens of two kinds, which share log 2 = 0.693, give
0.693 with 20 different tokens and 0.687 with 256, where 0.694 and 0.870 are counted.

The second correction is a rule of thumb. It takes away too much near by where tokens mostly repeat themselves
(2.20 nats where 2.53 are true), and far too much where many tokens are equally frequent and most pairs are
seen once: the two kinds with 2,000 tokens give 0.11. If other --tokens change the result, there are too few.

Intervals are a jackknife's: everything is estimated and fitted again with each tenth of the text left out.
They know nothing of the errors above, and are too narrow for a c0 that lies near its bound, 0.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanotst import UserError
from nanotst.configurator import entry_point
from nanotst.corpus import open_corpus
from tools.picture import COLORS, new_figure, save_picture, tidy

BLOCKS = 10  # of contiguous text; one of them is left out at a time
T_QUANTILE = 2.262  # of 95 % of Student's t with BLOCKS - 1 degrees of freedom
SEGMENT = (
    64  # tokens that stay together where the text is mixed: keeps repetitions, leaves many to mix
)
DENSE = 2**22  # cells of a joint distribution up to which they are counted in a table


@dataclass
class Config:
    """Usage: python -m tools.fit_mi --dataset=NAME [--key=value ...]"""

    dataset: str = "python_source"  # a folder in data/, or the path of one
    out: str = "out/fitted.json"  # for train.py's --fitted, with all measurements; a picture goes beside it
    tokens: int = (
        10_000_000  # of the training text, in ten blocks from all over it; fewer where it has fewer
    )
    max_distance: int = 32  # d = 1 .. max_distance
    plot: bool = True  # draw the picture (needs matplotlib)


# ------------------------------------------------------------------------------------------------ information


def grassberger(n):
    """G(n) of an array of counts, near log n: G(2m) = G(2m+1) = digamma(m + 1/2) + log 2."""
    return torch.digamma(torch.from_numpy(n // 2 + 0.5)).numpy() + math.log(2)


def entropy(counts, plain=False):
    """Nats, from how often each outcome was seen: Grassberger's estimate, or the plain one, -sum p log p."""
    of_count = np.bincount(
        counts
    )  # how many outcomes were seen n times, for each n: far fewer than outcomes
    n = np.flatnonzero(of_count)
    n = n[n > 0]
    total = (n * of_count[n]).sum()
    log = np.log(n) if plain else grassberger(n)
    return math.log(total) - (of_count[n] * n * log).sum() / total


def count(keys, blocks, size):
    """How often each key occurs in each block: (N,), (N,) block numbers -> (BLOCKS, distinct keys)."""
    if size > DENSE:
        _, keys = np.unique(keys, return_inverse=True)
        size = int(keys.max()) + 1
    return np.stack([np.bincount(keys[blocks == b], minlength=size) for b in range(BLOCKS)])


def leave_one_out(counts):
    """Counts of all blocks, then of all but each in turn: (BLOCKS, K) -> 1 + BLOCKS arrays (K,)."""
    total = counts.sum(0)
    yield total
    for block in counts:
        yield total - block


def estimates(x, y, blocks, vocab_size):
    """Information of pairs (N,), (N,) by Grassberger's entropies and by plain ones: (2, 1 + BLOCKS), of all
    text, then without each block."""
    joint = count(x * vocab_size + y, blocks, vocab_size**2)
    sides = count(x, blocks, vocab_size), count(y, blocks, vocab_size)
    found = []
    for first, second, both in zip(*map(leave_one_out, (*sides, joint))):
        found.append(
            [entropy(first, p) + entropy(second, p) - entropy(both, p) for p in (False, True)]
        )
    return np.array(found).T


def far_apart(parts):
    """Pairs of tokens that share nothing, as many as there are tokens: (BLOCKS, T) -> x, y, blocks of x.

    Segments of the text are paired with its segments in random order. So every kind of text meets every other
    as often as chance has it, while a token that repeats itself does so in x and in y, as near by.
    """
    length = min(SEGMENT, -(-parts.shape[1] // 100))  # a thousand segments even of little text
    n = parts.shape[1] // length  # of a block
    x = parts[:, : n * length].reshape(-1, length)
    y = np.random.default_rng(0).permutation(x)
    return x.ravel(), y.ravel(), np.repeat(np.arange(BLOCKS), n * length)


def mutual_information(parts, vocab_size, distances, progress=None):
    """Information of tokens at each distance in nats, from BLOCKS arrays of as many tokens.

    Returns (corrected, plain), each (1 + BLOCKS, distances), of all text, then without each block; and the
    plain information of tokens far apart, a pure error.
    """
    parts = np.stack([np.asarray(part, dtype=np.int64) for part in parts])  # (BLOCKS, T)
    blocks = np.repeat(np.arange(BLOCKS)[:, None], parts.shape[1], axis=1)
    pairs = lambda x, y, d: estimates(x.ravel(), y.ravel(), blocks[:, d:].ravel(), vocab_size)
    left_over, counted_apart = estimates(*far_apart(parts), vocab_size)
    taken_apart = counted_apart - left_over
    taken_apart[taken_apart <= 0] = np.inf  # few cells, each seen often: nothing to take away
    corrected, plain = [], []
    for i, d in enumerate(distances):
        if progress:
            progress(f"distance {d}, {i + 1} of {len(distances)}")
        better, counted = pairs(parts[:, :-d], parts[:, d:], d)
        corrected.append(better - left_over * np.clip((counted - better) / taken_apart, 0, 1))
        plain.append(counted)
    return np.array(corrected).T, np.array(plain).T, float(counted_apart[0])


# -------------------------------------------------------------------------------------------------------- fit


def fit(distances, information):
    """(c0, a, k) of the least squares of c0 + a d^k, with c0 >= 0, as information cannot be negative far
    away.

    For a given k it is linear in c0 and a, so there is k alone to search for: on a grid, then closer and
    closer.
    """
    d, y = np.asarray(distances, float), np.asarray(information, float)

    def solve(k):
        power = d**k
        centred = power - power.mean()
        a = (centred * (y - y.mean())).sum() / (centred**2).sum()
        c0 = y.mean() - a * power.mean()
        if c0 < 0:
            c0, a = 0.0, (power * y).sum() / (power**2).sum()
        return ((c0 + a * power - y) ** 2).sum(), c0, a, k

    ks = np.linspace(-6, -0.02, 300)
    while ks[-1] - ks[0] > 1e-9:
        best = int(np.argmin([solve(k)[0] for k in ks]))
        ks = np.linspace(ks[max(best - 1, 0)], ks[min(best + 1, len(ks) - 1)], 21)
    return np.array(solve(ks.mean())[1:])


def jackknife(values):
    """Standard error, from the values of all text and without each block in turn: (1 + BLOCKS, ...) ->
    (...)."""
    without = values[1:]
    return np.sqrt((BLOCKS - 1) / BLOCKS * ((without - without.mean(0)) ** 2).sum(0))


# -------------------------------------------------------------------------------------------------------- run


def text_blocks(tokens, n_tokens, max_distance):
    """BLOCKS arrays of contiguous tokens, n_tokens in all, spread evenly over the text."""
    length = min(n_tokens, len(tokens)) // BLOCKS
    if length < 10 * max_distance:
        raise UserError(
            f"{min(n_tokens, len(tokens)):,} tokens are too few for distances up to {max_distance}: "
            f"at least {10 * BLOCKS * max_distance:,} are needed"
        )
    starts = [b * (len(tokens) - length) // (BLOCKS - 1) for b in range(BLOCKS)]
    return [np.array(tokens[start : start + length]) for start in starts]


def draw(result, path):
    """The measured information and the fit, on logarithmic axes."""
    d, y = np.array(result["distances"]), np.array(result["information"])
    error = T_QUANTILE * np.array(result["standard_error"])
    c0, a, k = (result[key] for key in ("c0", "a", "k"))
    fig, ax = new_figure((7, 4.8))
    curve = np.geomspace(d[0], d[-1], 200)
    ax.plot(d, result["plain"], "s", color="0.6", ms=4, mfc="none", label="as counted")
    ax.axhline(
        result["plain_far_apart"], color="0.6", ls=":", lw=1.2, label="tokens far apart, as counted"
    )
    ax.errorbar(
        d,
        y,
        error,
        fmt="o",
        color=COLORS[2],
        ms=4,
        capsize=2,
        lw=1,
        label="corrected, with 95 % intervals",
    )
    label = f"{c0:.3g} + {a:.3g} $d^{{{k:.3g}}}$"
    ax.plot(curve, c0 + a * curve**k, color=COLORS[1], lw=1.6, label=label, zorder=1)
    ax.set(
        xscale="log", yscale="log", xlabel="distance d (tokens)", ylabel="mutual information (nats)"
    )
    positive = np.concatenate([y, result["plain"], [result["plain_far_apart"]], c0 + a * curve**k])
    ax.set_ylim(positive[positive > 0].min() / 1.6, positive.max() * 1.4)
    ticks = [t for t in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if d[0] <= t <= d[-1]]
    ax.set_xticks(ticks, map(str, ticks))
    ax.minorticks_off()
    tidy(ax)
    ax.legend(frameon=False)
    ax.set_title(
        f"{result['dataset']}: {result['tokens']:,} tokens of {result['vocab_size']:,}", fontsize=11
    )
    save_picture(fig, path)


def main(config):
    if config.max_distance < 4:
        raise UserError(
            f"max_distance must be at least 4 to fit three numbers, got {config.max_distance}"
        )
    corpus = open_corpus(config.dataset)
    parts = text_blocks(corpus.train, config.tokens, config.max_distance)
    distances = list(range(1, config.max_distance + 1))
    terminal = sys.stdout.isatty()
    progress = (lambda line: print(f"\r\033[K{line}", end="", flush=True)) if terminal else None
    values, plain, apart = mutual_information(parts, corpus.vocab_size, distances, progress)
    fits = np.array([fit(distances, row) for row in values])  # (1 + BLOCKS, 3)
    errors = jackknife(fits)
    if terminal:
        print("\r\033[K", end="")

    result = {"c0": fits[0, 0], "a": fits[0, 1], "k": fits[0, 2]}
    for i, key in enumerate(("c0", "a", "k")):
        low, high = (float(fits[0, i] + side * T_QUANTILE * errors[i]) for side in (-1, 1))
        result[f"{key}_interval"] = [max(0.0, low) if key == "c0" else low, high]  # of 95 %
    if not fits[:, 0].any():  # c0 is at its bound whatever is left out, which is no certainty of 0
        result["c0_interval"] = None
    result |= {
        "unit": "nats",
        "distances": distances,
        "information": values[0].tolist(),
        "standard_error": jackknife(values).tolist(),
        "plain": plain[0].tolist(),
        "plain_far_apart": apart,
        "dataset": Path(corpus.folder).name,
        "fingerprint": corpus.fingerprint,
        "vocab_size": corpus.vocab_size,
        "tokens": sum(map(len, parts)),
        "command": ["python -m tools.fit_mi", *sys.argv[1:]],
    }
    for line in describe(result):
        print(line)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    written = str(out)
    if config.plot:
        draw(result, out.with_suffix(".png"))
        written += f", {out.with_suffix('.png')}"
    print(f"wrote {written}; train with --bag_weights=fitted --fitted={out}")


def describe(result):
    """The result as lines for people."""
    yield "   d  information (95 %)    as counted"
    for row in zip(
        *(result[key] for key in ("distances", "information", "standard_error", "plain"))
    ):
        d, y, error, plain = row
        if d & (d - 1) == 0 or d == result["distances"][-1]:  # powers of two; the file has all
            yield f"{d:4d}  {y:.4f} ± {T_QUANTILE * error:.4f}      {plain:.4f}"
    yield f"tokens far apart, as counted: {result['plain_far_apart']:.4f}"
    for key in ("c0", "a", "k"):
        if result[f"{key}_interval"] is None:
            yield f"{key:2} {result[key]:.4f}  (at its bound, without an interval)"
            continue
        low, high = result[f"{key}_interval"]
        yield f"{key:2} {result[key]:.4f}  (95 % {low:.4f} to {high:.4f})"
    weight = lambda i: result["c0"] + result["a"] * i ** result["k"]
    for s in (2, 4, 8):
        total = sum(weight(i) for i in range(1, s + 1))
        yield f"weights of s {s}: " + " ".join(f"{weight(i) / total:.3f}" for i in range(1, s + 1))
    if result["c0"] == 0:
        yield "note: c0 is held at its bound 0; the best fit would have it below, and information cannot be"
        yield "negative. The intervals of a and k are of the fit with that bound"
    if result["k"] < -5.9 or result["k"] > -0.03:
        yield "note: k is at the end of its range, -6 to -0.02: this is no power law"


if __name__ == "__main__":
    entry_point(main, Config)
