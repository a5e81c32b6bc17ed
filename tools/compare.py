"""The paper's three comparisons of TST with ordinary training, from one command.

    python -m tools.compare config/curves.py --seeds=1,2,3 --lengths=1,1.5,2 --jobs=2

equal FLOPs   a baseline of as many steps: which one ends lower?
equal loss    baselines of several lengths, each with its own decay: how many FLOPs does one need to end where
              TST ends? Interpolated between their ends, over the logarithm of FLOPs
equal data    a baseline that reads as many tokens as TST, in more steps: what is the data worth without TST?

Both sides should train at their own best learning rates, which python -m tools.sweep shows. Run the same
command again to resume; more lengths or seeds only add runs. tools/intervals.py says what the intervals mean.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for python tools/compare.py

from nanotst import UserError
from nanotst.configurator import entry_point
from tools import runner
from tools.intervals import Interval, difference, seeds_text, speedup, times
from tools.picture import COLORS, new_figure, save_picture, tidy
from tools.plot import Side, draw_panel, equal, lengths_of, undecayed_speedup
from tools.runner import as_text, places
from tools.runs import markdown_table
from tools.sweep import write_results


@dataclass
class Config:
    """Usage: python -m tools.compare [CONFIG.py ...] [--key=value ...] [--seeds=1,2,3] [--lengths=1,1.5,2]

    The keys are those of train.py and say what TST trains. Other knobs:"""

    arguments: list[str]  # config files and knobs of train.py

    seeds: str = "1,2,3"  # seeds of either side
    lengths: str = "1,1.5,2"  # steps of the baselines, in multiples of TST's
    equal_data: bool = True  # a baseline that reads as much as TST
    baseline_learning_rate: float = 0.0  # learning rate of the baselines; 0: TST's
    out_dir: str = "out/compare"  # a folder with a folder for each run, and the results
    jobs: int = 0  # runs at a time; 0: one per GPU, or one
    threads: int = 0  # CPU threads per run; 0: an equal share of the cores
    plot: bool = True  # picture as compare.png (needs matplotlib)


def numbers(text, kind, knob):
    try:
        return sorted({kind(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"--{knob} takes numbers separated by commas, not {text!r}") from None


class Plan:
    """Makes the members: TST, and baselines of any number of steps."""

    def __init__(self, config):
        self.settings, self.files, grid = runner.read_arguments(config.arguments, Config)
        if several := [key for key, values in grid.items() if len(values) > 1]:
            raise UserError(f"--{several[0]} takes one value; tools.sweep compares several")
        if "seed" in grid:
            raise UserError("give --seeds, not --seed")
        self.given = {key: values[0] for key, values in grid.items()}
        self.settings |= self.given
        if runner.is_ordinary(self.settings):
            raise UserError("there is no superposition to compare: give a --bag_size above 1")
        self.seeds, self.out_dir = numbers(config.seeds, int, "seeds"), config.out_dir
        self.rate = config.baseline_learning_rate or self.settings["learning_rate"]
        lengths = numbers(config.lengths, float, "lengths")
        if 1 not in lengths or len(lengths) < 2 or lengths[0] <= 0:
            wanted = "takes 1 and other lengths, such as 1,1.5,2"
            raise UserError(f"--lengths {wanted}, not {config.lengths}")
        self.steps = self.settings["max_steps"]
        self.lengths = [round(length * self.steps) for length in lengths]

    def members(self, **knobs):
        """A member for each seed."""
        varied = ["bag_size", "superposition_ratio", "max_steps", "seed"]
        chosen = {key: self.settings[key] for key in varied} | self.given | knobs
        make = lambda seed: runner.make_member(
            self.settings, self.files, chosen | {"seed": seed}, varied, self.out_dir
        )
        members = [make(seed) for seed in self.seeds]
        runner.find_folders(members, self.out_dir)
        return members

    def baselines(self, steps):
        return self.members(bag_size=1, max_steps=steps, learning_rate=self.rate)


def side_of(label, members):
    """The finished members as a Side, or None."""
    done = [dict(label=label, rows=m.rows(), facts=m.settings) for m in members if m.end()]
    return Side(done) if done else None


def train_sides(config):
    """(TST, [baselines by ascending steps], all members, {run that failed: why})."""
    plan = Plan(config)
    train = lambda members: runner.run_members(members, config.jobs, config.threads)
    members = plan.members()
    baselines = {steps: plan.baselines(steps) for steps in plan.lengths}
    failed = train(sum(baselines.values(), members))
    s, r = (as_text(plan.settings[key]) for key in ("bag_size", "superposition_ratio"))
    tst = side_of(f"TST, s {s}, r {r}", members)
    if not tst or not side_of("baseline", baselines[plan.steps]):
        wanted = "TST and the baseline of as many steps need a finished run each"
        raise UserError(wanted + runner.reason(failed))
    steps = round(plan.steps * tst.end["data_tokens"] / tst.end["positions"])
    if config.equal_data and all(abs(steps / length - 1) > 0.01 for length in baselines):
        print(f"a baseline takes {steps:,} steps to read as much data as TST")
        baselines[steps] = plan.baselines(steps)
        failed |= train(baselines[steps])
    sides = [side_of("baseline", baselines[steps]) for steps in sorted(baselines)]
    return tst, lengths_of(filter(None, sides)), sum(baselines.values(), members), failed


def exchange_rate(tst, gain):
    """Interval of the tokens in bags worth one ordinary token, if a baseline takes `gain` times TST's
    positions to end as low: what TST read in bags, over what the baseline reads beyond TST's other tokens."""
    in_bags = tst.bagged[-1]["data_tokens"]
    worth = lambda factor: factor * tst.end["positions"] - (tst.end["data_tokens"] - in_bags)
    rate = lambda factor: in_bags / worth(factor) if worth(factor) > 0 else math.inf
    return Interval(rate(gain.value), rate(gain.high), rate(gain.low))


def report(tst, baselines, lengths):
    """(table and what came out, as text; Interval of the speed-up at equal loss)."""
    against = [difference(tst.losses, baseline.losses) for baseline in baselines]
    gain = speedup(lengths, against)
    cells = [["run", "steps", "FLOPs", "data", "val loss", "TST minus it"]]
    for side, minus in zip([tst, *baselines], ["", *(interval.text() for interval in against)]):
        kinds = (("flops", "equal FLOPs"), ("data_tokens", "equal data"))
        kinds = [name for key, name in kinds if side in equal(tst, baselines, key)]
        ratios = [f"{side.end[key] / tst.end[key]:.3g}x" for key in ("flops", "data_tokens")]
        name, steps = ", ".join([side.label, *kinds]), f"{side.end['step']:,}"
        cells.append([name, steps, *ratios, seeds_text(side.losses), minus])
    factor = gain.text(lambda factor: times(factor, lengths))
    said = f"Equal loss: a baseline needs {factor} the FLOPs of TST."
    if false := undecayed_speedup(tst, baselines):
        said += f" Read off the longest one before its decay, that would be {false:.2f}x, which is wrong."
    if 0 < gain.value < math.inf:
        rate = exchange_rate(tst, gain).text("{:.2f}".format)
        said += f" Exchange rate: {rate} tokens read in bags are worth one ordinary token."
    losses = "Final validation loss in nats per token, mean ± standard deviation (seeds)"
    rates = [as_text(side.facts["learning_rate"]) for side in (tst, baselines[0])]
    rates = f"Learning rate: TST {rates[0]}, baseline {rates[1]}."
    return f"{markdown_table(cells)}\n\n{said}\n\n{losses}. {rates}", gain


def draw(tst, baselines, lengths, gain, path):
    """Three panels, one for each comparison."""
    fig, (left, middle, right) = new_figure((14, 4.6), 1, 3)
    left.set(title="Equal FLOPs", xlabel="FLOPs", ylabel="validation loss (nats per token)")
    right.set(title="Equal data", xlabel="data tokens")
    for ax, key in ((left, "flops"), (right, "data_tokens")):
        if found := equal(tst, baselines, key):
            draw_panel(ax, [found[0], tst], key)
            ax.legend(fontsize=9, frameon=False)
    ends = [np.mean(baseline.losses) for baseline in baselines]
    middle.plot(lengths, ends, "o-", color=COLORS[0], label="ends of baselines")
    for at, side in zip(lengths, baselines):
        middle.plot([at] * len(side.losses), side.losses, "_", color=COLORS[0], alpha=0.5)
    label = f"{tst.label}: {times(gain.value, lengths)}"
    middle.axhline(np.mean(tst.losses), color=COLORS[1], label=label)
    if gain.low < gain.high:
        bounds = np.clip((gain.low, gain.high), lengths[0], lengths[-1])
        middle.axvspan(*bounds, color=COLORS[1], alpha=0.1, lw=0, label="95 % of the speed-up")
    middle.set_xscale("log")
    middle.set_xticks(lengths, [f"{at:.3g}" for at in lengths])
    middle.minorticks_off()
    middle.set(title="Equal loss", xlabel="FLOPs, in multiples of TST's")
    middle.legend(fontsize=9, frameon=False)
    tidy(middle)
    save_picture(fig, path)


def main(config):
    tst, baselines, members, failed = train_sides(config)
    lengths = [baseline.end["flops"] / tst.end["flops"] for baseline in baselines]
    text, gain = report(tst, baselines, lengths)
    picture = lambda path: draw(tst, baselines, lengths, gain, path)
    write_results("compare", config, text, members, picture, failed)


if __name__ == "__main__":
    entry_point(main, Config, places(sys.argv[1:], Config))
