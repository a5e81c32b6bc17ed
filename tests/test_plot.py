"""tools/plot.py and tools/runs.py: what they read of a run, what a comparison says, what a picture shows.

Speed-ups and recoveries are checked on runs for which they are known in closed form.
"""

import json
import math

import pytest
from stub_trainer import lines

from nanotst import UserError
from nanotst.configurator import parse
from tools import plot, runs

FLOPS, POSITIONS, SECONDS = 1e9, 64, 0.5  # per step


def rows_of(losses, bag_size=1, switch=0, every=10):
    """Rows with validation losses `losses` after every `every` steps; bags until step `switch`."""
    rows = []
    for step, loss in zip(range(every, every * len(losses) + 1, every), losses):
        row = dict(step=step, phase="x", bag_size=bag_size if step <= switch else 1)
        row |= dict(loss=loss + 0.1, val_loss=loss, val_bpb=loss / 3, val_loss_other=7.0)
        row |= dict(positions=step * POSITIONS, flops=step * FLOPS, seconds=step * SECONDS)
        rows.append(row | dict(data_tokens=POSITIONS * (step + (bag_size - 1) * min(step, switch))))
    return rows


def facts_of(rows, **knobs):
    """The facts of a run as text; max_steps as its rows have it."""
    bags = max(row.get("bag_size", 1) for row in rows)
    facts = dict(max_steps=rows[-1]["step"], bag_size=bags, superposition_ratio=0.3, schedule="wsd")
    facts |= dict(decay_ratio=0.2, parameters=1000, encoding="bytes", vocab_size=256) | knobs
    return {key: str(value) for key, value in facts.items()}


def run_of(rows, label="run", **knobs):
    facts = facts_of(rows, **knobs)
    return dict(name=label, label=label, rows=rows, validated=rows, facts=facts)


def side_of(losses, *args, **knobs):
    return plot.Side([run_of(rows_of(losses, *args, **knobs))])


def speedup_text(side, baselines):
    return plot.speedup_of(side, plot.lengths_of(baselines))[1]


def ending_at(loss, steps):
    return side_of([loss], every=steps)


def write(folder, rows, tail="", **knobs):
    """A run folder with these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    facts = facts_of(rows, **knobs) if rows else {}
    data = {key: facts.get(key) for key in runs.CORPUS} | dict(train_tokens=1000)
    described = dict(
        config=dict(max_steps=0) | facts, data=data, parameters=facts.get("parameters")
    )
    (folder / "config.json").write_text(json.dumps(described))
    return str(folder)


def main(*args):
    plot.main(parse(plot.Config, [str(arg) for arg in args]))


def test_torn_last_line_is_skipped_with_a_note(tmp_path, capsys):
    rows = rows_of([3.0, 2.0])
    assert runs.load_metrics(write(tmp_path / "run", rows, '{"step": 30, "val_l')) == rows
    assert "metrics.jsonl:3: torn last line skipped" in capsys.readouterr().err


@pytest.mark.parametrize("line", ['{"step": 30, "val_l', "[1]", '{"loss": 1.0}', '{"step": "30"}'])
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line):
    folder = write(tmp_path / "run", rows_of([3.0, 2.0]), line + '\n{"step": 40}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:3: not a row of train.py"):
        runs.load_metrics(folder)


def test_old_names_are_read(tmp_path):
    folder = write(tmp_path / "run", [dict(step=1, mfu=None, tokens_per_second=7.0)], z_coef=0.5)
    assert runs.load_metrics(folder) == [dict(step=1, positions_per_second=7.0)]
    assert runs.read_facts(tmp_path / "run" / "config.json")["router_z_coef"] == "0.5"


@pytest.mark.parametrize(
    "args, message",
    [
        (["{}/nope"], "nope: no metrics.jsonl there"),
        (["{}/train"], "train: no validation rows"),
        (["{}/run", "--labels=a,b"], "2 labels for 1 runs"),
        (["{}/run", "--panels=flops,steps"], "flops, data, time, not 'steps'"),
        (["{}/broken"], "broken/config.json is damaged"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path, args, message):
    write(tmp_path / "train", [dict(step=1, loss=1.0)])
    write(tmp_path / "run", rows_of([2.0, 1.0]))
    write(tmp_path / "broken", rows_of([1.0]))
    (tmp_path / "broken" / "config.json").write_text('{"config": 3}')
    with pytest.raises(UserError, match=message):
        main(*[arg.format(tmp_path) for arg in args], "--plot=no")


def test_one_baseline_length_gives_the_crossing():
    # loss = 5 - step / 25 is 3 at step 50; halfway between rows in the second case
    tst = side_of([5 - step / 25 for step in range(10, 101, 10)], 4, 20)
    assert speedup_text(tst, [ending_at(3.0, 100)]) == "> 2.00x"
    assert speedup_text(tst, [ending_at(2.8, 110)]) == "> 2.00x"
    rates = [ending_at(3.0, 100), ending_at(3.1, 100)]  # the better of one length counts
    assert speedup_text(tst, rates) == "> 2.00x"


@pytest.mark.parametrize(
    "loss, steps, expected",
    [
        (3.0, 100, "2.00x"),  # the loss of the middle length, 200 steps
        (2.5, 200, "1.41x"),  # halfway in loss between 200 and 400 steps: 200 * sqrt(2)
        (3.75, 200, "0.59x"),  # slower than the baseline: 100 * 2**(1/4)
        (1.9, 100, "> 4.00x"),  # better than the longest
        (4.1, 100, "< 1.00x"),  # worse than the shortest
    ],
)
def test_several_lengths_compare_the_ends(loss, steps, expected):
    baselines = [ending_at(2.0, 400), ending_at(4.1, 100), ending_at(4.0, 100), ending_at(3.0, 200)]
    tst = side_of([9.0, loss], 2, steps // 2, every=steps // 2)
    assert speedup_text(tst, baselines) == expected


def test_an_unfinished_run_has_no_speedup_and_is_no_baseline(tmp_path, capsys):
    base = write(tmp_path / "base", rows_of([5, 4, 3.0]))
    cut = write(tmp_path / "cut", rows_of([5, 4, 3.5]), max_steps=45)
    tst = write(tmp_path / "tst", rows_of([6, 4, 3.2], 4, 10))
    early = write(tmp_path / "early", rows_of([6, 4, 2.9], 4, 10), max_steps=60)
    main(base, cut, tst, early, "--plot=no")
    *_, tst, early = lines(capsys.readouterr().out)
    assert tst[-1] == "not reached"  # not read off the unfinished baseline
    assert early[-1] == "-" and early[3] == "30 of 60"


def test_a_loss_is_reached_where_the_curve_stays_below():
    # below 3 at 20, up to 4 at 30, down through 3 halfway to 40
    assert plot.reached(side_of([5, 2, 4, 2, 2]), 3) == pytest.approx(35 * FLOPS)
    assert plot.reached(side_of([5, 2, 4]), 3) == math.inf
    assert plot.reached(side_of([5, 2, 4]), 3, until=20) == pytest.approx(10 * FLOPS * 5 / 3)


def test_the_false_speedup_is_read_before_the_decay():
    # 5 - step / 100 down to 4 in step 80, where the decay of 20 % starts; then 3
    long = side_of([5 - step / 100 for step in range(10, 81, 10)] + [3.5, 3.0])
    assert plot.undecayed_speedup(ending_at(4.3, 20), long) == pytest.approx(70 / 20)
    assert plot.undecayed_speedup(ending_at(3.5, 20), long) is None  # reached in the decay
    assert plot.undecayed_speedup(ending_at(4.3, 80), long) is None  # no longer baseline


def test_met_again_is_where_the_curves_cross_after_the_switch():
    base = side_of([5 - step / 20 for step in range(10, 61, 10)])  # 4.5, 4.0, 3.5, 3.0, 2.5, 2.0
    # below the baseline while bagged, which does not count; then gaps of +0.6 at 40, -0.2 at 50
    tst = [4.0, 5.0, 4.5, 3.6, 2.3, 1.9]
    again = lambda losses: plot.met_again(side_of(losses, 2, 29), base)  # bags until step 20
    assert again(tst) == "met about 28 steps after the switch"
    assert again([9, 9, 3.4]) == "met about 10 steps after the switch"
    assert again(tst[:4]) == "not met"
    half = rows_of([9.0, 9.0, 3.8, 3.1], 2, 20)
    for row in half:
        row["flops"] /= 2  # half the batch: step 30 compares with the baseline's step 15, 4.25
    again = plot.met_again(plot.Side([run_of(half)]), base)
    assert again == "met about 10 steps after the switch"


def test_table_and_notes_of_seeds(tmp_path, capsys):
    losses = ([5, 4, 3.0], [5, 4, 3.1], [5, 4, 3.2])
    base = [write(tmp_path / f"b{i}", rows_of(end), seed=i) for i, end in enumerate(losses)]
    tst = [rows_of([6, 3.6, 2.6 + i / 10], 4, 10) for i in range(3)]
    tst = [write(tmp_path / f"t{i}", rows, superposition_ratio=0.33) for i, rows in enumerate(tst)]
    main(*base, *tst, "--labels=base,base,base,TST,TST,TST", "--plot=no")
    printed = capsys.readouterr().out
    _, base, tst = lines(printed)
    own = ["base", "1", "0", "30", "3.1000 ± 0.1000 (3)", "1.0333", "0.00M", "3e+10", "0.2 min"]
    assert base == [*own, "-"] and tst[:5] == ["TST", "4", "0.33", "30", "2.7000 ± 0.1000 (3)"]
    # the mean goes from 3.6 to 2.7, so it passes 3.1 after 5/9 of the ten steps from 20 to 30
    assert tst[-1] == "> 1.17x"
    assert "training loss 6.100 -> 3.700 (-2.400) after step 10; " in printed
    assert "equal FLOPs -0.4000 (95 % -0.62" in printed
    assert "validation loss met about 10 steps after the switch" in printed


def test_a_note_names_the_knobs_and_the_corpus_that_differ():
    tokens = dict(train_tokens=1000, seed=1, threads=1)
    dense = run_of(rows_of([3.0]), "dense", n_expert=0, **tokens)
    tokens = dict(train_tokens=999, seed=2, threads=2, young_knob=1)  # a knob may be younger
    moe = run_of(rows_of([2.0]), "moe", n_expert=8, reinit_at_switch="head", **tokens)
    differ = "train_tokens 1000 (dense), 999 (moe); n_expert 0 (dense), 8 (moe)"
    differ = differ.replace("n_expert", "reinit_at_switch none (dense), head (moe); n_expert")
    assert runs.notes_on_differences([dense, moe]) == [f"Not the same in all runs: {differ}."]


def test_runs_of_one_folder_name_are_told_apart_by_the_folders_above(tmp_path):
    one, two = (write(tmp_path / name / "x" / "tst", rows_of([3.0])) for name in ("a", "b"))
    assert [run["name"] for run in runs.read_runs([one, two])] == ["a/x/tst", "b/x/tst"]
    assert [run["name"] for run in runs.read_runs([one])] == ["tst"]


def test_different_tokenizers_compare_in_bits_per_byte():
    # by nats the second run is the better one, by bits per byte the first
    words = [row | dict(val_bpb=2 * row["val_bpb"]) for row in rows_of([4, 3, 2.0], 2, 10)]
    both = [run_of(rows_of([5, 4, 3.0]), "bytes"), run_of(words, "words", vocab_size=512)]
    text = plot.table(both)
    assert "vocab_size 256 (bytes), 512 (words)" in text and "bits per byte do." in text
    assert "not reached" in text
    ax = plot.draw(both).axes[0]
    assert ax.get_ylabel() == "validation loss (bits per byte)"
    assert list(line_of(ax, "words: 1.333").get_ydata()) == [row["val_bpb"] for row in words]
    for row in words:
        del row["val_bpb"]
    with pytest.raises(UserError, match="words has no val_bpb, by which different tokenizers"):
        plot.table(both)


def line_of(ax, label):
    (line,) = (line for line in ax.get_lines() if line.get_label() == label)
    return line


def test_each_panel_has_its_own_x_axis_curves_switch_and_ends():
    """A baseline, and a run on bags until step 40 of 100."""
    base = rows_of([5 - step / 25 for step in range(10, 101, 10)])
    tst = rows_of([6 - step / 25 for step in range(10, 101, 10)], bag_size=3, switch=40)
    figure = plot.draw([run_of(base, "baseline"), run_of(tst, "TST")], ["flops", "time"])
    assert [ax.get_xlabel() for ax in figure.axes] == ["FLOPs", "seconds of training"]
    for ax, key in zip(figure.axes, ("flops", "seconds")):
        for label, rows in (("baseline: 1.000", base), ("TST: 2.000", tst)):
            line = line_of(ax, label)
            assert list(line.get_xdata()) == [row[key] for row in rows]
            assert list(line.get_ydata()) == [row["val_loss"] for row in rows]
        assert list(line_of(ax, "end of superposition").get_xdata()) == [tst[3][key]] * 2
        low, high = ax.get_ylim()
        assert 0.5 < low < 1 and 3 < high < 4.6  # most losses on bags are above


def test_seeds_are_drawn_thin_around_their_mean():
    base = [run_of(rows_of([5, 4, loss]), "baseline") for loss in (3.0, 3.2)]
    ax = plot.draw(base).axes[0]
    assert list(line_of(ax, "baseline (2 seeds): 3.100").get_ydata()) == pytest.approx([5, 4, 3.1])
    drawn = [list(line.get_ydata()) for line in ax.get_lines()]
    assert [5, 4, 3.0] in drawn and [5, 4, 3.2] in drawn


def test_final_losses_by_a_knob(tmp_path, capsys, monkeypatch):
    figures, paths = [], []
    monkeypatch.setattr(plot, "save_picture", lambda figure, path: figures.append(figure))
    small = [(1, 3.0), (1, 3.2), (2, 2.9), (2, 2.7), (4, 3.0)]  # bag size, final loss
    for size, ends in ((1000, small), (5000, [(1, 2.0), (4, 1.8)])):
        for seed, (s, loss) in enumerate(ends):
            knobs = dict(bag_size=s, parameters=size, seed=seed)
            paths.append(write(tmp_path / f"{size}_{seed}", rows_of([loss], s), **knobs))
    main(*paths, "--by=bag_size")
    head, *table = lines(capsys.readouterr().out)
    half = 4.3027 * math.sqrt(2) / 10  # Student's t, two degrees of freedom
    gain = f"-0.3000 (95 % {-0.3 - half:+.4f} to {-0.3 + half:+.4f})"
    assert head == ["bag_size", "parameters", "val loss", "minus baseline"]
    assert table[2] == ["2", "1000", "2.8000 ± 0.1414 (2)", gain]
    small, large = (bars.lines[0] for bars in figures[0].axes[0].containers)
    assert list(small.get_ydata()) == pytest.approx([-0.3, -0.1])
    assert list(large.get_ydata()) == pytest.approx([-0.2])
    with pytest.raises(UserError, match="--by=nothing is not a number in"):
        main(*paths, "--by=nothing")


def test_picture_is_written(tmp_path):
    out = tmp_path / "curves.png"
    main(write(tmp_path / "run", rows_of([3.0, 2.0])), f"--out={out}")
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000
    with pytest.raises(UserError, match="cannot draw .*curves.xyz"):
        main(tmp_path / "run", f"--out={tmp_path}/curves.xyz")
