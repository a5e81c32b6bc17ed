"""tools/evaluate.py against plain loops: losses by position, errors, seeds, other text."""

import json
import math
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, read_rows, write_corpus

import train
from model import GPT, GPTConfig
from nanotst import UserError
from nanotst.checkpoint import load_model
from nanotst.configurator import parse
from nanotst.corpus import open_corpus
from nanotst.stream import validation_rows
from tools import evaluate

SHAPES = {
    "dense": dict(n_layer=2, n_head=2, n_embd=16, ff_dim=32),
    "moe": dict(n_layer=2, n_head=2, n_embd=16, ff_dim=32, n_expert=4, top_k=2, attention_window=5),
}


def build(name="dense", vocab_size=50, block_size=12):
    """A model whose predictions differ much from token to token."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=block_size, **SHAPES[name])).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return model


def write_bytes(folder, seed, bytes_per_token=2.0):
    """A corpus of 6,500 ids that names the vocabulary of bytes, without which none can be compared."""
    tokens = np.cumsum(np.random.default_rng(seed).choice([1, 1, 1, 7, 20], 6500)) % 256
    write_corpus(folder, tokens[:6000], tokens[6000:], 256)
    meta = json.loads((folder / "meta.json").read_text())
    meta |= {"encoding": "bytes", "bytes_per_token": bytes_per_token}
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The corpus, the checkpoints of two seeds of a baseline and of TST, and the last rows of their logs."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    folder = tmp_path_factory.mktemp("runs")
    corpus, paths, ends = write_bytes(folder / "text", 0), [], []
    for bag_size in (1, 3):
        for seed in (1, 2):
            out_dir = str(folder / f"s{bag_size}_{seed}")
            knobs = dict(
                dataset=corpus, out_dir=out_dir, bag_size=bag_size, seed=seed, eval_positions=480
            )
            train.main(train.Config(**TINY | knobs))
            paths.append(f"{out_dir}/last.pt")
            ends.append(read_rows(out_dir)[-1])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return corpus, paths, ends


def command(tmp_path, *argv):
    """python -m tools.evaluate ARGV, in this process -> what it keeps of each corpus."""
    file = tmp_path / "kept.json"
    evaluate.main(parse(evaluate.Config, [*argv, f"--json={file}", "--device=cpu"]))
    return json.loads(file.read_text())["corpora"]


@pytest.mark.parametrize("name", SHAPES)
def test_losses_are_those_of_a_plain_loop(name, monkeypatch):
    """Each row and position by itself, whatever the number of rows that are computed at once."""
    model = build(name)
    rows = torch.randint(50, (7, 13), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    expected = torch.empty(7, 12)
    with torch.no_grad():
        for i, row in enumerate(rows.long()):
            for p in range(12):
                expected[i, p] = F.cross_entropy(model(row[None, : p + 1])[0, -1], row[p + 1])
    for logits in (1, 2 * 12 * 50, 2**25):
        monkeypatch.setattr(evaluate, "LOGITS", logits)
        torch.testing.assert_close(
            evaluate.position_losses(model, rows, "cpu"), expected, atol=2e-5, rtol=1e-5
        )
    assert expected.std() > 0.5


def test_buckets_double_and_cover_all_positions():
    assert evaluate.buckets_of(1) == [(1, 1)]
    assert evaluate.buckets_of(16) == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16)]
    assert evaluate.buckets_of(11)[-1] == (9, 11)
    losses = torch.rand(5, 11)
    found = evaluate.bucket_losses(losses, evaluate.buckets_of(11))
    for i, row in enumerate(losses.double().tolist()):
        means = [
            row[0],
            row[1],
            sum(row[2:4]) / 2,
            sum(row[4:8]) / 4,
            sum(row[8:11]) / 3,
            sum(row) / 11,
        ]
        assert found[i] == pytest.approx(means, abs=1e-12)


def test_errors_are_those_of_independent_blocks():
    """With as many rows as blocks the textbook's; rows that say the same as their neighbours say nothing new,
    and neither does a part of a block more or less matter much."""
    rng = np.random.default_rng(0)
    rows = rng.normal(3, 2, (evaluate.BLOCKS, 4))
    mean, error = evaluate.mean_and_error(rows)
    assert mean == pytest.approx(rows.mean(0))
    assert error == pytest.approx(rows.std(0, ddof=1) / math.sqrt(evaluate.BLOCKS))
    same = evaluate.mean_and_error(np.repeat(rows, 10, axis=0))
    assert same[0] == pytest.approx(mean) and same[1] == pytest.approx(error)
    few = evaluate.mean_and_error(rows[:3])[1]
    assert few == pytest.approx(rows[:3].std(0, ddof=1) / math.sqrt(3))
    assert np.isnan(evaluate.mean_and_error(rows[:1])[1]).all()
    many = rng.normal(3, 2, (400, 1037, 1))  # 1037 rows are no multiple of the blocks
    found = np.array([evaluate.mean_and_error(rows)[1] for rows in many])
    assert np.sqrt((found**2).mean()) == pytest.approx(2 / math.sqrt(1037), rel=0.03)


def test_the_loss_is_the_one_that_training_logs(runs, tmp_path):
    """Of each checkpoint by itself, and as the mean of a side's seeds; in bits per byte, too."""
    _, paths, ends = runs
    kept = command(tmp_path, *paths, "--labels=plain,plain,TST,TST", "--eval_positions=480")
    (result,) = kept.values()
    assert result["baseline"] == "plain" and result["rows"] == 30 and result["bytes_per_token"] == 2
    for label, rows in (("plain", ends[:2]), ("TST", ends[2:])):
        side, losses = result["sides"][label], [row["val_loss"] for row in rows]
        assert [seed[-1] for seed in side["loss_of_seeds"]] == pytest.approx(losses, abs=2e-5)
        assert side["loss"][-1] == pytest.approx(sum(losses) / 2, abs=2e-5)
        assert side["error_of_seeds"][-1] == pytest.approx(abs(losses[0] - losses[1]) / 2, abs=2e-5)
        assert side["bits_per_byte"][-1] == pytest.approx(side["loss"][-1] / math.log(2) / 2)
    difference = result["sides"]["TST"]["difference"]
    by_hand = (
        sum(row["val_loss"] for row in ends[2:]) / 2 - sum(row["val_loss"] for row in ends[:2]) / 2
    )
    assert difference["loss"][-1] == pytest.approx(by_hand, abs=4e-5)


def test_differences_are_paired_by_row(runs, tmp_path):
    """A side against itself differs by nothing and has no error, though the loss varies from row to row; the
    error of two sides is that of their difference in each row."""
    corpus, paths, _ = runs
    (result,) = command(tmp_path, paths[0], paths[0], paths[2], "--labels=a,b,c").values()
    assert result["baseline"] == "a" and min(result["sides"]["a"]["error_of_text"]) > 0.01
    difference = result["sides"]["b"]["difference"]
    assert set(difference["loss"]) == set(difference["error_of_text"]) == {0}
    assert set(difference["error_of_seeds"]) == {None}

    rows = validation_rows(open_corpus(corpus).val, 2**19, 16)
    losses = []
    for path in (paths[0], paths[2]):
        with torch.no_grad():
            logits = load_model(path)[0].eval()(rows[:, :-1])
        losses.append(
            F.cross_entropy(logits.mT, rows[:, 1:].long(), reduction="none").double().numpy()
        )
    last = (losses[1] - losses[0])[:, 8:].mean(1)  # 9 to 16 tokens of context
    assert result["context"][-2] == [9, 16]
    difference = result["sides"]["c"]["difference"]
    assert difference["loss"][-2] == pytest.approx(last.mean(), abs=1e-5)
    assert difference["error_of_text"][-2] == pytest.approx(
        last.std(ddof=1) / math.sqrt(len(last)), rel=1e-3
    )


def test_errors_hold_what_is_known_of_the_seeds():
    rng = np.random.default_rng(0)
    two, one = rng.normal(size=(2, 60, 3)), rng.normal(size=(1, 60, 3))
    spread = evaluate.error_of_seeds(two.mean(1))
    for side, base in ((two, one), (one, two)):
        assert evaluate.compare(side, base)[2] == pytest.approx(spread)
    assert evaluate.compare(two, two[:, ::-1])[2] == pytest.approx(spread * math.sqrt(2))
    assert np.isnan(evaluate.compare(one, one)[2]).all()
    assert evaluate.together(
        np.array([3.0, math.nan, math.nan]), np.array([4.0, 2.0, math.nan])
    ) == (pytest.approx([5, 2, math.nan], nan_ok=True))


ALONE = "± of {} is of the text alone, and that of a difference lacks their part, as one checkpoint"
SEEDS = "A side's loss is the mean of its seeds, of which the error holds that of their spread."


@pytest.mark.parametrize(
    "which, labels, known, said, unsaid",
    [
        ([0, 1, 2, 3], "a,a,b,b", ["b", "a"], [SEEDS], ["alone"]),
        ([0, 1, 2], "a,a,b", ["a"], [SEEDS, ALONE.format("b")], []),
        ([0, 2, 3], "a,b,b", ["b"], [SEEDS, ALONE.format("a")], []),
        (
            [0, 2],
            "a,b",
            [],
            ["of the text alone: with one checkpoint a side, a difference may"],
            [SEEDS],
        ),
        (
            [0],
            "a",
            None,
            ["of the text alone: one checkpoint does not show how far seeds spread"],
            [SEEDS],
        ),
        ([0, 1], "a,a", None, [SEEDS], ["alone", "difference"]),
    ],
)
def test_of_whom_the_spread_of_seeds_is_not_known_is_said(
    runs, tmp_path, capsys, which, labels, known, said, unsaid
):
    paths = [runs[1][i] for i in which]
    (result,) = command(tmp_path, *paths, f"--labels={labels}", "--eval_positions=480").values()
    printed = capsys.readouterr().out
    assert all(words in printed for words in said) and not any(words in printed for words in unsaid)
    if known is None:
        assert "minus" not in printed
        return
    a, b = (result["sides"][label] for label in "ab")
    difference = b["difference"]
    assert difference["seeds_known_of"] == known
    seeds = [{"a": a, "b": b}[label]["error_of_seeds"][-1] for label in known]
    assert difference["error_of_seeds"][-1] == (
        pytest.approx(math.hypot(*seeds)) if known else None
    )
    error = math.hypot(difference["error_of_text"][-1], *seeds)
    assert f"{difference['loss'][-1]:+.4f} ± {error:.4f} |" in printed


def test_one_row_shows_no_error_of_the_text(runs, tmp_path, capsys):
    (result,) = command(tmp_path, *runs[1][:2], "--labels=a,a", "--eval_positions=16").values()
    side, printed = result["sides"]["a"], capsys.readouterr().out
    assert result["rows"] == 1 and "One row does not show how far texts differ" in printed
    assert f"{side['loss'][-1]:.4f} ± {side['error_of_seeds'][-1]:.4f} |" in printed


def test_without_matplotlib_the_numbers_are_there_all_the_same(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="needs the package matplotlib; leave --out away"):
        command(tmp_path, runs[1][0], f"--out={tmp_path / 'never.png'}")
    assert "nats per token" in capsys.readouterr().out


def test_text_of_another_kind(runs, tmp_path, capsys):
    """Its own bytes per token count; what is another vocabulary is refused."""
    _, paths, _ = runs
    other = write_bytes(tmp_path / "other", 7, bytes_per_token=4.0)
    kept = command(tmp_path, paths[0], paths[2], f"--dataset={other}")
    said = capsys.readouterr().out
    side = kept[other]["sides"]["s3_1"]
    assert side["bits_per_byte"][-1] == pytest.approx(side["loss"][-1] / math.log(2) / 4)
    assert kept[other]["fingerprint"] == open_corpus(other).fingerprint
    assert f"Trained on another corpus than {other}: s1_1, s3_1." in said
    assert "context" not in said  # unless --by_position

    foreign = write_corpus(tmp_path / "foreign", range(90), range(90), 100)
    with pytest.raises(UserError, match="another vocabulary"):
        command(tmp_path, paths[0], f"--dataset={foreign}")


def test_a_mixture_is_evaluated_by_its_parts(runs, run, tmp_path):
    corpus, _, _ = runs
    other = write_bytes(tmp_path / "other", 7)
    spec = f"{corpus}:0.5,{other}:0.5"
    row = run(dataset=spec, out_dir=str(tmp_path / "mixed"), eval_positions=480)[-1]
    kept = command(tmp_path, str(tmp_path / "mixed" / "last.pt"), "--eval_positions=480")
    for name in ("text", "other"):
        (side,) = kept[name]["sides"].values()
        assert side["loss"][-1] == pytest.approx(row[f"val_loss_{name}"], abs=2e-5)


def test_other_lengths_of_row(runs, tmp_path, capsys):
    """A longer one goes on where the trained one ends: what comes before is the same."""
    corpus, paths, _ = runs
    checkpoint = evaluate.load_checkpoint(paths[0])
    rows = validation_rows(open_corpus(corpus).val, 400, 40)
    long, usual = (evaluate.build(paths[0], checkpoint, n, "cpu") for n in (40, 16))
    losses = evaluate.position_losses(long, rows, "cpu")
    torch.testing.assert_close(losses[:, :16], evaluate.position_losses(usual, rows[:, :17], "cpu"))

    kept = command(tmp_path, paths[0], "--block_size=40", "--eval_positions=400", "--by_position")
    assert "longer than in training, 16" in (said := capsys.readouterr().out)
    assert "33-40" in said and "minus" not in said  # there is no other side
    (result,) = kept.values()
    expected = evaluate.bucket_losses(losses, evaluate.buckets_of(40)).mean(0)
    assert result["sides"]["s1_1"]["loss"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_table_and_the_picture_show_what_is_kept(runs, tmp_path, capsys):
    _, paths, _ = runs
    labels = "--labels=plain,plain,TST,TST"
    kept = command(
        tmp_path, *paths, labels, "--by_position", f"--out={tmp_path / 'by_position.png'}"
    )
    (name, result), said = next(iter(kept.items())), capsys.readouterr().out
    assert (tmp_path / "by_position.png").stat().st_size > 10_000
    plain, tst = result["sides"].values()
    for i, context in enumerate(("1", "2", "3-4", "5-8", "9-16")):
        line = next(
            line
            for line in said.splitlines()
            if line.startswith("|") and f" {context} |" in line[:12]
        )
        error = math.hypot(plain["error_of_text"][i], plain["error_of_seeds"][i])
        assert f"{plain['loss'][i]:.4f} ± {error:.4f}" in line
        assert f"{tst['difference']['loss'][i]:+.4f} ± " in line
    left, right = evaluate.draw(result, name, trained=16).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert drawn == {"plain (2 seeds)": plain["loss"][:-1], "TST (2 seeds)": tst["loss"][:-1]}
    assert list(right.lines[0].get_ydata()) == tst["difference"]["loss"][:-1]


def test_what_differs_in_training_is_said(run, tmp_path, capsys):
    paths = []
    for name, rate in (("a", 0.01), ("b", 0.02)):
        run(out_dir=str(tmp_path / name), learning_rate=rate)
        paths.append(str(tmp_path / name / "best.pt"))
    command(tmp_path, *paths)
    assert "Not the same in all runs: learning_rate 0.01 (a), 0.02 (b)." in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--labels=a"], "--labels has 1 labels for 2 checkpoints"),
        (["--baseline=x"], "--baseline=x is none of s1_1, s3_1"),
        (["--dataset=no/such/corpus"], "no prepared corpus in 'no/such/corpus'"),
        (["--block_size=5000"], "block_size 5000 is longer than the 500 validation tokens"),
        (["--block_size=-1"], "block_size must not be negative"),
        (["--eval_positions=0"], "eval_positions at least 1"),
        (["missing.pt"], "there is no checkpoint missing.pt"),
    ],
)
def test_what_cannot_work_is_one_line(argv, words, runs, tmp_path):
    _, paths, _ = runs
    with pytest.raises(UserError, match=words) as e:
        command(tmp_path, paths[0], paths[2], *argv)
    assert "\n" not in str(e.value)
