"""Train a grid of runs, several at a time, and tabulate their final losses.

    python -m tools.sweep config/curves.py --bag_size=1,2,4 --superposition_ratio=0.2,0.3 --seed=1,2 --jobs=2

Baselines (bag size 1, or ratio 0) are trained once, whatever the knobs of superposition. Run the same command
again, or a larger grid in the same out_dir, to resume: finished runs are skipped, interrupted ones resumed,
failed ones tried again. Ctrl-C stops all runs at a checkpoint. At the end out_dir holds table.md, runs.csv
and sweep.png, whose x-axis is the first knob with several values.
"""

import sys
from dataclasses import dataclass

from nanotst.configurator import entry_point
from tools.plot import draw_points, points_of, points_table
from tools.runner import finished, places, plan, run_members, write_results


@dataclass
class Config:
    """Usage: python -m tools.sweep [CONFIG.py ...] --key=VALUE[,VALUE ...] ... [--jobs=N]

    Any knob of train.py may take several values, separated by commas; by semicolons for dataset and
    reinit_at_switch, where one value may hold commas. Other knobs:"""

    arguments: list[str]  # config files and knobs of train.py

    out_dir: str = "out/sweep"  # a folder with a folder for each run
    jobs: int = 0  # runs at a time; 0: one per GPU, or one
    threads: int = 0  # CPU threads per run; 0: an equal share of the cores
    plot: bool = True  # picture as sweep.png (needs matplotlib)


def main(config):
    members, varied = plan(config.arguments, config.out_dir)
    failed = run_members(members, config.jobs, config.threads)
    points = points_of(finished(members, failed), [knob for knob in varied if knob != "seed"])
    draw = lambda: draw_points(points)
    write_results("sweep", config, points_table(points), members, draw, failed)


if __name__ == "__main__":
    entry_point(main, Config, places(sys.argv[1:], Config))
