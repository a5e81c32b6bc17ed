"""tools/evaluate.py against plain loops: losses by position, errors, seeds, other text."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, read_rows, write_corpus

import train
from model import GPT, GPTConfig
from nanotst import UserError
from nanotst.checkpoint import load_checkpoint, load_model
from nanotst.configurator import parse
from nanotst.corpus import open_corpus
from nanotst.stream import validation_rows
from tools import evaluate


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
    """The corpus, the checkpoints of two seeds of a baseline and of TST, and their last validation losses."""
    folder = tmp_path_factory.mktemp("runs")
    corpus, paths, losses = write_bytes(folder / "text", 0), [], []
    for bag_size in (1, 3):
        for seed in (1, 2):
            out_dir = str(folder / f"s{bag_size}_{seed}")
            knobs = dict(dataset=corpus, out_dir=out_dir, bag_size=bag_size, seed=seed)
            train.main(train.Config(**TINY | knobs | dict(eval_positions=480)))
            paths.append(f"{out_dir}/last.pt")
            losses.append(read_rows(out_dir)[-1]["val_loss"])
    return corpus, paths, losses


@pytest.fixture
def said(capsys):
    """said(ARGV ...) is what python -m tools.evaluate ARGV prints."""

    def command(*argv):
        capsys.readouterr()
        evaluate.main(parse(evaluate.Config, [*argv, "--device=cpu"]))
        return capsys.readouterr().out

    return command


def cells(text, start):
    """The cells of the table line that starts so, a column for each side and each difference."""
    line = next(line for line in text.splitlines() if re.match(rf"\| *{start} \|", line))
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def number(cell):
    """The number in a cell, without its error."""
    return float(cell.split(" ±")[0])


@pytest.mark.parametrize("own", [{}, dict(n_expert=4, top_k=2, attention_window=5)])
def test_losses_are_those_of_a_plain_loop(own, monkeypatch):
    """Each row and position by itself, whatever the number of rows computed at once."""
    torch.manual_seed(0)
    c = GPTConfig(50, 12, n_layer=2, n_head=2, n_embd=16, ff_dim=32, **own)
    model = GPT(c).eval()
    rows = torch.randint(50, (7, 13), dtype=torch.int32)
    expected = torch.empty(7, 12)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)  # so that predictions differ from token to token
        for i, row in enumerate(rows.long()):
            for p in range(12):
                expected[i, p] = F.cross_entropy(model(row[None, : p + 1])[0, -1], row[p + 1])
    assert expected.std() > 0.5
    buckets = [expected[:, a:b].mean(1) for a, b in ((0, 1), (1, 2), (2, 4), (4, 8), (8, 12))]
    expected = torch.stack([*buckets, expected.mean(1)], 1).double().numpy()
    for logits in (1, 2 * 12 * 50, 2**25):
        monkeypatch.setattr(evaluate, "LOGITS", logits)
        found = evaluate.losses_of(model, rows, "cpu")
        assert found == pytest.approx(expected, abs=2e-5)


def test_buckets_double_and_cover_all_positions():
    assert evaluate.buckets_of(1) == [(1, 1)]
    assert evaluate.buckets_of(11) == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 11)]


def test_errors_are_those_of_independent_blocks_and_of_seeds():
    rng, n = np.random.default_rng(0), evaluate.BLOCKS
    rows = rng.normal(3, 2, (n, 4))
    mean, error = evaluate.mean_and_error(rows[None])
    assert mean == pytest.approx(rows.mean(0))
    assert error == pytest.approx(rows.std(0, ddof=1) / math.sqrt(n))
    # rows that say the same as their neighbours say nothing new
    assert evaluate.mean_and_error(np.repeat(rows, 10, axis=0)[None])[1] == pytest.approx(error)
    assert evaluate.mean_and_error(rows[None, :1])[1] == pytest.approx(0)  # unknown, and not shown
    # paired: what both sides share in a row cancels
    mean, error = evaluate.mean_and_error(rows[None] + 1, rows[None])
    assert mean == pytest.approx(1) and error == pytest.approx(0, abs=1e-12)
    two, one = rows[None] + np.array([-1.0, 1.0])[:, None, None], rows[None]  # seeds 2 apart
    for side, base, seeds in ((two, one, 1), (one, two, 1), (two, two, math.sqrt(2))):
        assert evaluate.mean_and_error(side, base)[1] == pytest.approx(seeds)


def test_the_loss_is_the_one_that_training_logs(runs, said):
    _, paths, losses = runs
    text = said(*paths, "--labels=plain,plain,TST,TST", "--eval_positions=480")
    assert "30 validation rows of 16 tokens" in text and "context" not in text
    assert cells(text, "nats per token") == ["plain", "TST", "TST - plain"]
    assert cells(text, "seeds") == ["2", "2", ""] and cells(text, "bag size") == ["1", "3", ""]
    plain, tst = sum(losses[:2]) / 2, sum(losses[2:]) / 2
    found = [number(cell) for cell in cells(text, "all positions")]
    assert found == pytest.approx([plain, tst, tst - plain], abs=2e-4)
    bits = [number(cell) for cell in cells(text, "bits per byte")[:2]]
    assert bits == pytest.approx([plain / math.log(2) / 2, tst / math.log(2) / 2], abs=1e-4)


def test_text_of_another_kind(runs, said, tmp_path):
    """Its own bytes per token count; another vocabulary is refused."""
    _, paths, _ = runs
    other = write_bytes(tmp_path / "other", 7, bytes_per_token=4.0)
    text = said(paths[0], paths[2], f"--dataset={other}")
    nats, bits = (number(cells(text, row)[1]) for row in ("all positions", "bits per byte"))
    assert bits == pytest.approx(nats / math.log(2) / 4, abs=1e-3)
    foreign = write_corpus(tmp_path / "foreign", range(90), range(90), 100)
    with pytest.raises(UserError, match="another vocabulary"):
        said(paths[0], f"--dataset={foreign}")


def test_two_checkpoints_of_a_run_are_two_sides_on_rows_that_fit_both(runs, said):
    path, saved = runs[1][0], load_checkpoint(runs[1][0])
    saved["config"]["block_size"] = 8
    torch.save(saved, short := path.replace("last.pt", "short.pt"))
    text = said(path, short, "--eval_positions=480")
    assert "60 validation rows of 8 tokens" in text
    assert cells(text, "nats per token") == [path, short, f"{short} - {path}"]


def test_a_mixture_is_evaluated_by_its_parts_and_what_differs_in_training_is_said(
    runs, run, said, tmp_path
):
    other = write_bytes(tmp_path / "other", 7)
    mixture = dict(dataset=f"{runs[0]}:0.5,{other}:0.5", out_dir=str(tmp_path / "mixed"))
    row = run(**mixture, eval_positions=480, learning_rate=0.02)[-1]
    mixed = str(tmp_path / "mixed" / "last.pt")
    text = said(mixed, runs[1][2], "--labels=mixed,s3_1", "--eval_positions=480")
    assert "learning_rate 0.02 (mixed), 0.01 (s3_1)" in text
    for name in ("text", "other"):
        part = text[text.index(f"{name}: 30 validation rows") :]
        loss = number(cells(part, "all positions")[0])
        assert loss == pytest.approx(row[f"val_loss_{name}"], abs=1e-4)


def test_the_loss_by_context_is_the_mean_of_all_seeds(runs, said):
    corpus, paths, _ = runs
    text = said(*paths, "--labels=plain,plain,TST,TST", "--by_position", "--eval_positions=480")
    rows = validation_rows(open_corpus(corpus).val, 480, 16)  # (n, 17)
    losses = [evaluate.losses_of(load_model(path)[0], rows, "cpu").mean(0) for path in paths]
    plain, tst = sum(losses[:2]) / 2, sum(losses[2:]) / 2
    for i, context in enumerate(("1", "2", "3-4", "5-8", "9-16")):
        found = [number(cell) for cell in cells(text, f"context {context}")]
        assert found == pytest.approx([plain[i], tst[i], tst[i] - plain[i]], abs=1e-4)


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--labels=a", "--labels has 1 labels for 2 checkpoints"),
        ("missing.pt", "there is no checkpoint missing.pt"),
    ],
)
def test_what_cannot_work_is_one_line(argument, words, runs, said):
    with pytest.raises(UserError, match=words):
        said(runs[1][0], runs[1][2], argument)
