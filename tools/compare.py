"""The paper's three comparisons of TST with ordinary training, from one command.

    python -m tools.compare config/curves.py --seeds=1,2,3 --lengths=1,1.5,2 --jobs=2

equal FLOPs   as many steps of the same model: which ends lower?
equal loss    baselines of several lengths, each with its learning rate decayed: how many FLOPs does one need
              to end where TST ends? Interpolated between their ends, over the logarithm of FLOPs
equal data    a baseline that reads as many tokens as TST did, in more steps: what is the data worth without
              TST?

Each side should be at its own best learning rate, which python -m tools.sweep finds. A second start goes on
where the first was cut, as in tools/sweep.py; longer or more baselines and more seeds only add runs.

Intervals say how far the seeds leave the results open: where the true means, those of endlessly many seeds,
lie with 95 %, by Student's t, with one variance for TST and one for the baselines of all lengths. That takes
two seeds of TST, and two of a baseline. They know nothing of other data or models.
"""

import itertools
import math
import sys
from dataclasses import dataclass

import numpy as np

from nanotst import UserError
from nanotst.configurator import entry_point
from tools.picture import COLORS, MARKERS, new_figure, save_picture, tidy
from tools.plot import draw_group, loss_limits, mean_of
from tools.runner import (
    TRAINER,
    as_text,
    find_folders,
    is_ordinary,
    knobs_of,
    make_member,
    places,
    read_arguments,
    run_members,
)
from tools.runs import markdown_table
from tools.sweep import Group, write_results

DRAWS = 100_000  # of the means, for the intervals: enough for the digits shown


@dataclass
class Config:
    """Usage: python -m tools.compare [CONFIG.py ...] [--key=value ...] [--seeds=1,2,3] [--lengths=1,1.5,2]

    The keys are those of train.py, and say what TST trains. Beside them:"""

    arguments: list[str]  # config files and knobs of train.py

    # Runs
    seeds: str = "1,2,3"  # of either side
    lengths: str = "1,1.5,2"  # steps of the baselines, in multiples of TST's
    equal_data: bool = True  # and a baseline as long as it takes to read TST's data
    baseline_learning_rate: float = 0.0  # the baselines' own; 0: the same as TST's
    out_dir: str = "out/compare"  # each run gets a folder in it; table.md, runs.csv, compare.png
    jobs: int = 0  # runs at a time; 0: one per GPU, or one
    threads: int = 0  # CPU threads of a run; 0: its share of the cores
    gpus: str = (
        "auto"  # numbers of the GPUs to share out among the runs, such as 0,2; auto: all; none
    )
    train: bool = True  # False: only tabulate what is there
    plot: bool = True  # write compare.png (needs matplotlib)


# --------------------------------------------------------------------------------------------------- the runs


@dataclass
class Side:
    """TST, or the baselines of one length: runs that differ by their seeds alone."""

    name: str
    members: list

    def __post_init__(self):
        self.ends = [end for end in (member.end() for member in self.members) if end is not None]
        self.losses = [end["val_loss"] for end in self.ends]
        self.group = Group({}, self.losses, len(self.members))

    @property
    def steps(self):
        return self.members[0].steps

    def of(self, key):
        """FLOPs, data_tokens or the like at the end."""
        return self.ends[0][key]

    def runs(self):
        """As tools/plot.py takes them."""
        return [dict(label=self.name, rows=m.rows()) for m in self.members if m.end() is not None]


def numbers(text, kind, name):
    try:
        values = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"--{name} takes numbers between commas, got {text!r}") from None
    return values


class Plan:
    """Makes the members: TST, and baselines of any number of steps."""

    def __init__(self, config, trainer):
        self.knobs, self.out_dir, self.rate = (
            knobs_of(trainer),
            config.out_dir,
            config.baseline_learning_rate,
        )
        self.settings, self.files, grid = read_arguments(config.arguments, self.knobs, Config)
        if several := [key for key, values in grid.items() if len(values) > 1]:
            raise UserError(
                f"--{several[0]} takes one value here; python -m tools.sweep compares several"
            )
        if "seed" in grid:
            raise UserError("give --seeds, not --seed")
        self.given = {key: values[0] for key, values in grid.items()}
        self.settings |= self.given
        self.seeds = numbers(config.seeds, int, "seeds")
        if is_ordinary(self.settings):
            raise UserError(
                "the settings have no superposition to compare: give a --bag_size above 1"
            )

    def members(self, **knobs):
        """One for each seed, named by what tells them apart."""
        varied = ["bag_size", "superposition_ratio", "max_steps", "seed"]
        of_all = {key: self.settings[key] for key in varied} | self.given | knobs
        one = lambda seed: make_member(
            self.settings, self.files, of_all | {"seed": seed}, varied, self.out_dir
        )
        members = [one(seed) for seed in self.seeds]
        find_folders(members, self.out_dir, self.knobs)
        return members

    def baselines(self, steps):
        rate = {"learning_rate": self.rate} if self.rate else {}
        return self.members(bag_size=1, max_steps=steps, **rate)


def close(a, b):
    """Whether two lengths are too much alike to be baselines of their own."""
    return max(a, b) <= 1.01 * min(a, b)


def baseline_steps(text, steps):
    """The steps of the baselines, from the knob `lengths`."""
    lengths = numbers(text, float, "lengths")
    if not all(0 < length < math.inf for length in lengths) or round(lengths[0] * steps) < 1:
        raise UserError(f"--lengths takes finite numbers that make a step or more, got {text}")
    if 1 not in lengths or len(lengths) < 2:
        raise UserError(
            f"--lengths needs 1, for equal FLOPs, and another, for equal loss; got {text}"
        )
    baselines = [round(length * steps) for length in lengths]
    if any(close(*pair) for pair in itertools.pairwise(baselines)):
        raise UserError(
            f"--lengths must be more than 1 % apart; of {steps:,} steps {text} are {baselines}"
        )
    return baselines


def train_sides(config, trainer):
    """(TST, its baselines by steps, the steps of that for equal data or None, {run that failed: why})."""
    plan = Plan(config, trainer)
    steps = plan.settings["max_steps"]
    baselines = {length: plan.baselines(length) for length in baseline_steps(config.lengths, steps)}
    tst = plan.members()
    machine = dict(jobs=config.jobs, threads=config.threads, gpus=config.gpus, trainer=trainer)
    train = lambda members: run_members(members, **machine) if config.train else {}
    failed = train([*tst, *itertools.chain(*baselines.values())])
    for name, members in (("TST", tst), ("the baseline of as many steps", baselines[steps])):
        if all(member.end() is None for member in members):
            why = "".join(f": {why}" for why in list(failed.values())[:1])
            raise UserError(f"no run of {name} is done{why}")

    equal_data = None
    if config.equal_data:
        end = next(end for end in (member.end() for member in tst) if end)
        wanted = round(
            steps * end["data_tokens"] / end["positions"]
        )  # a baseline reads a token a position
        nearest = min(baselines, key=lambda length: abs(length - wanted))
        equal_data = nearest if close(nearest, wanted) else wanted
        if equal_data not in baselines:
            print(f"to read as much data as TST, a baseline takes {wanted:,} steps")
            baselines[equal_data] = plan.baselines(equal_data)
            failed |= train(baselines[equal_data])
    s, r = (as_text(plan.settings[key]) for key in ("bag_size", "superposition_ratio"))
    sides = {length: Side("baseline", members) for length, members in sorted(baselines.items())}
    return Side(f"TST, s {s}, r {r}", tst), sides, equal_data, failed


# ------------------------------------------------------------------------------------------------ the results


def freedom(sides):
    """Degrees of freedom of the one variance of some sides."""
    return sum(len(side.losses) - 1 for side in sides)


def possible_means(sides, rng):
    """What the true means of sides of one variance could be, given their seeds: a list of (DRAWS,)."""
    squares = sum(((np.array(side.losses) - side.group.mean) ** 2).sum() for side in sides)
    sd = np.sqrt(squares / rng.chisquare(freedom(sides), DRAWS))
    return [
        side.group.mean + sd * rng.standard_normal(DRAWS) / math.sqrt(len(side.losses))
        for side in sides
    ]


@dataclass
class Result:
    """A number, and between what it lies with 95 %. A speed-up that the baselines' lengths do not reach is 0
    or inf."""

    value: float
    low: float
    high: float


def factors(own, ends, flops):
    """The FLOPs at which a baseline would end at TST's loss `own` (D,), linear in loss over log FLOPs between
    neighbours of the losses `ends` (n, D) at ascending `flops` (n,) -> (D,); 0 or inf where none does."""
    out = np.full_like(own, np.inf)
    for f0, f1, l0, l1 in reversed(
        list(zip(flops, flops[1:], ends, ends[1:]))
    ):  # the shortest one counts
        share = np.clip((l0 - own) / np.where(l0 > l1, l0 - l1, 1), 0, 1)
        out = np.where((l0 >= own) & (own >= l1), f0 * (f1 / f0) ** share, out)
    return np.where(own > ends[0], 0.0, out)


def results_of(tst, baselines, seed=0):
    """({steps: TST's loss minus the baseline's}, the speed-up at equal loss), of baselines that are done."""
    rng, sides = np.random.default_rng(seed), list(baselines.values())
    flops = [side.of("flops") / tst.of("flops") for side in sides]
    own, ends = np.array([tst.group.mean]), np.array([[side.group.mean] for side in sides])
    means = [*(own - ends), factors(own, ends, flops)]
    draws = means
    if freedom([tst]) and freedom(sides):
        (own,), ends = possible_means([tst], rng), np.array(possible_means(sides, rng))
        draws = [*(own - ends), factors(own, ends, flops)]
    bounds = [np.quantile(draw, (0.025, 0.975), method="nearest") for draw in draws]
    *against, gain = [
        Result(float(mean[0]), *map(float, pair)) for mean, pair in zip(means, bounds)
    ]
    return dict(zip(baselines, against)), gain


def sentences(tst, baselines, equal_data, against, gain, same_rate):
    """What came out, for people."""
    lengths = [side.of("flops") / tst.of("flops") for side in baselines.values()]
    both = (("TST", [tst]), ("each baseline", baselines.values()))
    single = [name for name, sides in both if not freedom(sides)]

    def times(x):
        bounds = {0.0: f"less than {min(lengths):.2f}", math.inf: f"more than {max(lengths):.2f}"}
        return bounds.get(x, f"{x:.2f}")

    def within(result, show):
        if single:
            return f" (no interval: one seed of {' and of '.join(single)})"
        return f" (95 % {show(result.low)} to {show(result.high)})" * (result.low != result.high)

    signed = "{:+.4f}".format
    difference = lambda result: f"TST minus baseline {signed(result.value)}{within(result, signed)}"

    yield f"Equal FLOPs: {difference(against[tst.steps])}."
    yield f"Equal loss: a baseline needs {times(gain.value)} times the FLOPs of TST{within(gain, times)}."
    if equal_data in against:
        cost = baselines[equal_data].of("flops") / tst.of("flops")
        yield f"Equal data: {difference(against[equal_data])}, which takes {cost:.2f} times the FLOPs."
    yield (
        "Validation loss in nats per token, mean ± standard deviation of the seeds (how many). Intervals are "
        f"from the spread of the seeds alone. {same_rate}"
    )


def table(tst, baselines, equal_data, against):
    """One line for TST and for each length of the baseline."""
    cells = [["run", "steps", "FLOPs", "data", "val loss", "TST minus it"]]
    for side in (tst, *baselines.values()):
        is_for = ["equal FLOPs"] * (side.steps == tst.steps) + ["equal data"] * (
            side.steps == equal_data
        )
        name = tst.name if side is tst else ", ".join([side.name, *is_for])
        ratio = lambda key, side=side: f"{side.of(key) / tst.of(key):.3g}x" if side.ends else "-"
        minus = f"{against[side.steps].value:+.4f}" if side is not tst and side.ends else ""
        line = [
            name,
            f"{side.steps:,}",
            ratio("flops"),
            ratio("data_tokens"),
            side.group.text(),
            minus,
        ]
        cells.append(line)
    return markdown_table(cells)


# ------------------------------------------------------------------------------------------------ the picture


def draw(tst, baselines, equal_data, gain, path):
    """Three panels, one for each comparison."""
    fig, (left, middle, right) = new_figure((14, 4.6), 1, 3)
    draw_curves(left, [tst, baselines[tst.steps]], "flops", tst)
    left.set(
        title="Equal FLOPs",
        xlabel="FLOPs, in those of TST's run",
        ylabel="validation loss (nats per token)",
    )
    draw_ends(middle, tst, baselines, gain)
    if equal_data in baselines:
        draw_curves(right, [tst, baselines[equal_data]], "data_tokens", tst)
        right.set(title="Equal data", xlabel="tokens read, in those of TST's run")
    else:
        right.set_axis_off()
    for ax in (left, middle, right):
        tidy(ax)
    save_picture(fig, path)


def draw_curves(ax, sides, key, unit):
    """Validation loss of two sides over `key`, their seeds thin and their means thick."""
    groups = [side.runs() for side in sides]
    means = [mean_of(group) for group in groups]
    for group, mean, color, marker in zip(groups, means, (COLORS[1], COLORS[0]), MARKERS):
        x_of = lambda row: row[key] / unit.of(key) if key in row else None
        draw_group(ax, group, mean, x_of, "val_loss", color, marker, noisy=False)
    ax.set_ylim(loss_limits(groups, means))
    handles, labels = ax.get_legend_handles_labels()
    names = [f"{side.name} ({len(side.losses)} seeds)" for side in sides]
    known = dict(zip(labels, handles))
    ax.legend(
        [known[side.name] for side in sides], names, fontsize=9, edgecolor="none", framealpha=0.8
    )


def draw_ends(ax, tst, baselines, gain):
    """Where the baselines of each length end, and where TST does; the way between is the speed-up."""
    x = [side.of("flops") / tst.of("flops") for side in baselines.values()]
    for at, side, color, marker, label in [
        *((at, side, COLORS[0], MARKERS[1], "baseline") for at, side in zip(x, baselines.values())),
        (1.0, tst, COLORS[1], MARKERS[0], tst.name),
    ]:
        sd = np.nan_to_num(side.group.sd)
        known = label in ax.get_legend_handles_labels()[1]
        look = dict(
            fmt=marker, ms=6, capsize=3, color=color, label=None if known else label, zorder=3
        )
        ax.errorbar(at, side.group.mean, sd, **look)
        ax.plot([at] * len(side.losses), side.losses, "_", color=color, alpha=0.5, zorder=2)
    ax.plot(x, [side.group.mean for side in baselines.values()], color=COLORS[0], lw=1.4, zorder=1)
    loss, end = tst.group.mean, min(gain.value, max(x))
    if gain.value == 0:
        ax.annotate(
            f"less than {min(x):.2f}x",
            (1, loss),
            (12, -4),
            textcoords="offset points",
            color=COLORS[1],
        )
    else:
        ax.annotate(
            "", (end, loss), (1, loss), arrowprops=dict(arrowstyle="->", color=COLORS[1], lw=1.4)
        )
        said = f"{gain.value:.2f}x" if gain.value < math.inf else f"more than {end:.2f}x"
        ax.annotate(
            said,
            (math.sqrt(end), loss),
            (0, -14),
            textcoords="offset points",
            color=COLORS[1],
            ha="center",
        )
    low, high = np.clip((gain.low, gain.high), min(x), max(x))
    if low < high:
        ax.axvspan(
            low, high, color=COLORS[1], alpha=0.1, lw=0, zorder=0, label="95 % of the speed-up"
        )
    ax.set_xscale("log")
    ax.set_xticks(x, [f"{at:.3g}" for at in x])
    ax.minorticks_off()
    ax.margins(0.12)
    ax.legend(fontsize=9, edgecolor="none", framealpha=0.8)
    ax.set(title="Equal loss", xlabel="FLOPs of the run, in those of TST's")


def main(config, trainer=TRAINER):
    tst, baselines, equal_data, failed = train_sides(config, trainer)
    done = {steps: side for steps, side in baselines.items() if side.ends}
    against, gain = results_of(tst, done)
    own, other = (
        side.members[0].settings.get("learning_rate") for side in (tst, baselines[tst.steps])
    )
    same_rate = f"Learning rate: TST {own:g}, baseline {other:g}." if own else ""
    text = table(tst, baselines, equal_data, against)
    text += "\n\n" + "\n\n".join(sentences(tst, done, equal_data, against, gain, same_rate))
    members = [member for side in (tst, *baselines.values()) for member in side.members]
    picture = lambda path: draw(tst, done, equal_data, gain, path)
    write_results("compare", config, text, members, picture, failed)


if __name__ == "__main__":
    entry_point(main, Config, places(sys.argv[1:], Config))
