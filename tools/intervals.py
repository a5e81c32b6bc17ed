"""What the spread of the seeds says about a result: the one statistical method of tools/.

All intervals are 95 % intervals by Student's t, with the variance of both sides pooled. Seeds are not paired:
runs of one seed share their initial weights but not the order of their text.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Interval:
    """A value with its 95 % interval; the bounds are NaN if there are too few seeds."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def text(self, show="{:+.4f}".format):
        bounds = f" (95 % {show(self.low)} to {show(self.high)})"
        return show(self.value) + ("" if math.isnan(self.low + self.high) else bounds)


def student_t(freedom):
    """Two-sided 95 % quantile of Student's t: 12.71 for one degree of freedom, 2.78 for four."""
    angle = np.linspace(0, math.pi / 2, 200_001)  # t = sqrt(freedom) * tan(angle)
    density = np.cos(angle) ** (freedom - 1)
    below = np.cumsum(density[1:] + density[:-1])  # trapezoids
    return math.sqrt(freedom) * math.tan(np.interp(0.95 * below[-1], below, angle[1:]))


def seeds_text(losses):
    """Mean, standard deviation and number of the seeds: 1.4652 ± 0.0048 (3)."""
    spread = f" ± {np.std(losses, ddof=1):.4f} ({len(losses)})" if len(losses) > 1 else ""
    return f"{np.mean(losses):.4f}{spread}"


def difference(ours, theirs):
    """Interval of mean(ours) - mean(theirs), two lists of losses; its bounds need two seeds of each."""
    value = float(np.mean(ours) - np.mean(theirs))
    if min(len(ours), len(theirs)) < 2:
        return Interval(value)
    freedom = len(ours) + len(theirs) - 2
    variance = sum(np.var(side) * len(side) for side in (ours, theirs)) / freedom
    half = student_t(freedom) * math.sqrt(variance * (1 / len(ours) + 1 / len(theirs)))
    return Interval(value, value - half, value + half)


def first_zero(points):
    """x where y of the points [(x, y)] first falls to zero, linear between them; inf if it does not."""
    for (x0, y0), (x1, y1) in zip(points[:1] + points, points):
        if y1 <= 0:
            return np.interp(0, [y1, y0], [x1, x0])
    return math.inf


def speedup(lengths, differences):
    """Interval of the length at which a baseline would end as low as a run, from Intervals of the run's loss
    minus the losses of baselines of ascending `lengths`. Linear over log length; 0 or inf if it is shorter or
    longer than all of them. Its bounds are where theirs are zero."""

    def crossing(minus):
        if np.isnan(minus).any():
            return math.nan
        missing = first_zero(list(zip(np.log(lengths), np.negative(minus))))
        return 0.0 if minus[0] > 0 else math.exp(missing)

    return Interval(*map(crossing, zip(*((d.value, d.high, d.low) for d in differences))))


def times(factor, lengths):
    """A speed-up as text. Bounds, where `lengths` do not reach, are rounded to the safe side."""
    if factor == math.inf:
        return f"> {math.floor(100 * lengths[-1] + 1e-6) / 100:.2f}x"
    return f"{factor:.2f}x" if factor else f"< {math.ceil(100 * lengths[0] - 1e-6) / 100:.2f}x"
