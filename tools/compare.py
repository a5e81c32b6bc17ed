"""The paper's three comparisons of TST with ordinary training, from one command."""

import sys
from dataclasses import dataclass

import train
from nanotst import UserError
from nanotst.configurator import entry_point, parse
from tools import sweep
from tools.plot import draw, table
from tools.runs import is_baseline


@dataclass
class Config:
    """Usage: python -m tools.compare [CONFIG.py ...] [--key=value ...] [--seeds=1,2,3] [--lengths=1,1.5,2]

    equal FLOPs   a baseline of as many steps: which one ends lower?
    equal loss    baselines of several lengths, each with its own decay: how many FLOPs does one need to end
                  where TST ends? Interpolated between their ends, over the logarithm of FLOPs
    equal data    a baseline that reads as many tokens as TST, in more steps: what is the data worth without
                  TST?

    The keys are train.py's and say what TST trains. Both sides should train at their own best learning rates,
    which python -m tools.sweep shows. Run the same command again to resume; more lengths or seeds only add
    runs. At the end out_dir holds table.md, runs.csv and compare.png. Other knobs:
    """

    arguments: list[str]  # config files and knobs of train.py

    seeds: str = "1,2,3"  # seeds of either side
    lengths: str = "1,1.5,2"  # steps of the baselines, in multiples of TST's
    baseline_learning_rate: float = 0.0  # learning rate of the baselines; 0: TST's
    out_dir: str = "out/compare"  # a folder with a folder for each run, and the results
    jobs: int = 0  # runs at a time; 0: one per GPU, or one
    threads: int = 0  # CPU threads per run; 0: an equal share of the cores
    plot: bool = True  # picture as compare.png (needs matplotlib)


def plan(config):
    """The members: TST, and the baselines of all lengths."""
    given = [arg if arg.endswith(".py") else f"--{arg}" for arg in config.arguments]
    several = [arg for arg in given if "," in arg and arg[2:].split("=")[0] not in sweep.COMMAS]
    if several := several + [arg for arg in given if arg.startswith("--seed")]:
        todo = "--seeds, --lengths and --baseline_learning_rate vary here, all knobs in tools.sweep"
        raise UserError(f"{several[0]}: {todo}")
    tst = parse(train.Config, given)
    if is_baseline(vars(tst)):
        raise UserError("there is no superposition to compare: give a --bag_size above 1")
    as_much = sum((phase.stop - phase.start) * phase.n_in for phase in train.check(tst, 1))
    try:
        lengths = [round(float(x) * tst.max_steps) for x in config.lengths.split(",")]
        if min(lengths) < 1:
            raise ValueError
    except ValueError:
        raise UserError(f"--lengths takes numbers above 0, not {config.lengths}") from None
    if all(abs(as_much / length - 1) > 0.01 for length in lengths):
        lengths.append(as_much)
    baseline = {"bag_size": 1, "learning_rate": config.baseline_learning_rate or tst.learning_rate}
    sides = [{}, *(baseline | {"max_steps": steps} for steps in sorted({*lengths}))]
    choices = [side | {"seed": seed} for side in sides for seed in config.seeds.split(",")]
    varied = ["bag_size", "superposition_ratio", "max_steps", "seed"]
    return sweep.members_of(given, choices, varied, config.out_dir)


def main(config):
    members = plan(config)
    runs = sweep.run_members(members, config.jobs, config.threads)
    for run in runs:
        run["label"] = "baseline" if is_baseline(run["facts"]) else "TST"
    picture = lambda: draw(runs, ["flops", "data"])
    sweep.write_results("compare", config, members, table(runs), picture)


if __name__ == "__main__":
    entry_point(main, Config, sweep.as_positional(sys.argv[1:], Config))
