"""What the spread of the seeds says about a result: the one statistical method of tools/.

All intervals are 95 % intervals by Student's t, with the variance of both sides pooled. Seeds are not paired:
runs of one seed share their initial weights but not the order of their text.
"""

import math
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A value with its 95 % confidence interval; the bounds are NaN if there are too few seeds."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def text(self, show="{:+.4f}".format):
        value, low, high = map(show, self)
        return value if math.isnan(self.low + self.high) else f"{value} (95 % {low} to {high})"


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
    value, half = float(np.mean(ours) - np.mean(theirs)), math.nan
    if min(len(ours), len(theirs)) > 1:
        freedom = len(ours) + len(theirs) - 2
        variance = sum(np.var(side) * len(side) for side in (ours, theirs)) / freedom
        half = student_t(freedom) * math.sqrt(variance * (1 / len(ours) + 1 / len(theirs)))
    return Interval(value, value - half, value + half)


def first_zero(x, y):
    """x where y first falls to zero, linear between the points; inf if it does not."""
    for i in range(len(y)):
        if y[i] <= 0:
            before = max(i - 1, 0)
            return np.interp(0, [y[i], y[before]], [x[i], x[before]])
    return math.inf


def speedup(lengths, differences):
    """Interval of the length at which a baseline would end as low as a run, from Intervals of the run's loss
    minus the losses of baselines of ascending `lengths`. Linear over log length; 0 or inf if it is shorter or
    longer than all of them. Its bounds are where theirs are zero."""

    def crossing(minus):
        if np.isnan(minus).any():
            return math.nan
        return 0.0 if minus[0] > 0 else math.exp(first_zero(np.log(lengths), -minus))

    value, low, high = np.transpose(differences)
    return Interval(crossing(value), crossing(high), crossing(low))


def times(factor, lengths):
    """A speed-up as text. Bounds, where `lengths` do not reach, are rounded to the safe side."""
    if factor == math.inf:
        return f"> {math.floor(100 * lengths[-1] + 1e-6) / 100:.2f}x"
    return f"{factor:.2f}x" if factor else f"< {math.ceil(100 * lengths[0] - 1e-6) / 100:.2f}x"
