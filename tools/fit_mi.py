"""Mutual information of tokens by distance in a corpus, and bag weights fitted to it.

    python -m tools.fit_mi --dataset=python_source --out=out/fitted.json
    python train.py --dataset=python_source --bag_size=8 --bag_weights=fitted --fitted=out/fitted.json

How much does a token tell about the one d places later? I(d) = H(x_t) + H(x_t+d) - H(x_t, x_t+d), in nats.
The curve c0 + a d^k is fitted to it and weights the i-th token of a bag by c0 + a i^k.

Counting is biased: most of the V^2 pairs are seen once or never, and that looks like information, 1 nat for
ten million GPT-2 tokens. Two corrections:

1. Grassberger's entropy (arXiv physics/0307138), which suffices while most pairs are seen several times.
2. Its error is measured on pairs that share nothing, the text and its segments in random order. There the
   first correction takes away C and leaves an error E. At distance d it takes away C(d), so E C(d) / C is
   subtracted, at most E: tokens that depend on each other form fewer pairs, each seen more often.

The second is a rule of thumb. If other --tokens change the result, there are too few.
"""

import json
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch

from nanotst import UserError
from nanotst.configurator import entry_point
from nanotst.corpus import open_corpus
from nanotst.files import write_text

SEGMENT = 64  # tokens that stay together when the text is shuffled: keeps repetitions


@dataclass
class Config:
    """Usage: python -m tools.fit_mi --dataset=NAME [--key=value ...]"""

    dataset: str = "python_source"  # a folder in data/, or the path of one
    out: str = "out/fitted.json"  # the fit, for train.py's --fitted
    tokens: int = 10_000_000  # tokens of training text, in ten blocks from all over it
    max_distance: int = 32  # largest distance d


def entropies(keys):
    """Nats of the distribution of keys, by Grassberger's estimate and the plain one: (2,)."""
    few = keys.max() < 2**22  # a table of counts is faster than sorting
    n = np.bincount(keys) if few else np.unique(keys, return_counts=True)[1]
    n = n[n > 0]
    # G(2m) = G(2m+1) = digamma(m + 1/2) + log 2
    g = torch.digamma(torch.from_numpy(n // 2 + 0.5)).numpy() + math.log(2)
    return math.log(len(keys)) - np.array([n @ g, n @ np.log(n)]) / len(keys)


def information(x, y, vocab_size):
    """Mutual information of pairs of tokens (N,), (N,), by both estimates: (2,) nats."""
    return entropies(x) + entropies(y) - entropies(x * vocab_size + y)


def mutual_information(blocks, vocab_size, distances):
    """Corrected and plain information at each distance, (distances,) nats each, within blocks of text (n, T).
    Pairs do not reach from one block into the next."""
    blocks = np.asarray(blocks, np.int64)
    length = min(SEGMENT, -(-blocks.shape[1] // 100))  # a thousand segments even of little text
    segments = blocks[:, : blocks.shape[1] // length * length].reshape(-1, length)
    shuffled = np.random.default_rng(0).permutation(segments)
    left, plain = information(segments.ravel(), shuffled.ravel(), vocab_size)
    taken = max(plain - left, 0) or math.inf  # few pairs, each seen often: nothing to take away
    pairs = ((blocks[:, :-d].ravel(), blocks[:, d:].ravel()) for d in distances)
    better, counted = np.array([information(x, y, vocab_size) for x, y in pairs]).T
    return better - left * np.clip((counted - better) / taken, 0, 1), counted


def fit(distances, values):
    """(c0, a, k), the least squares of c0 + a d^k with c0 >= 0: information is never negative."""
    d, y = np.asarray(distances, float), np.asarray(values, float)

    def solve(k):  # linear in c0 and a
        power = d**k
        (c0, a), *_ = np.linalg.lstsq(np.stack([np.ones_like(d), power], 1), y, rcond=None)
        if c0 < 0:
            c0, a = 0.0, (power @ y) / (power @ power)
        return ((c0 + a * power - y) ** 2).sum(), c0, a, k

    return min(map(solve, np.arange(-6, -0.02, 1e-3)))[1:]


def main(c):
    corpus = open_corpus(c.dataset)
    n = min(c.tokens, len(corpus.train)) // 10
    if c.max_distance < 4 or n < 10 * c.max_distance:
        raise UserError(f"max_distance must be at least 4 and at most a tenth of a block, {n:,}")
    starts = np.linspace(0, len(corpus.train) - n, 10).astype(int)
    blocks = np.stack([corpus.train[i : i + n] for i in starts])
    distances = list(range(1, c.max_distance + 1))
    corrected, plain = mutual_information(blocks, corpus.vocab_size, distances)
    c0, a, k = map(float, fit(distances, corrected))
    result = {"c0": c0, "a": a, "k": k, "unit": "nats", "distances": distances}
    result |= {"information": corrected.tolist(), "plain": plain.tolist(), "tokens": blocks.size}
    result |= {"dataset": corpus.folder, "fingerprint": corpus.fingerprint, "command": sys.argv}
    print("   d  information  as counted")
    for row in zip(distances, corrected, plain):
        print("{:4}  {:11.4f}  {:10.4f}".format(*row))
    print(f"fit: {c0:.4f} + {a:.4f} d^{k:.4f}")
    write_text(c.out, json.dumps(result, indent=1) + "\n")
    print(f"wrote {c.out}; train with --bag_weights=fitted --fitted={c.out}")


if __name__ == "__main__":
    entry_point(main, Config)
