"""bench.py: that it runs, and that its tables hold what their columns say."""

import json

import bench
import pytest


def test_step_table(tmp_path):
    path = tmp_path / "bench.json"
    bench.main(
        bench.Config(
            parts="step",
            device="cpu",
            dtype="float32",
            compile="off",
            shape="curves",
            rows=2,
            repeats=1,
            bag_sizes="1,3",
            json=str(path),
        )
    )
    figures = json.loads(path.read_text())
    ((title, rows),) = [(key, value) for key, value in figures.items() if key.startswith("training step")]
    assert "2 rows of 128" in title and [row["s"] for row in rows] == [1, 3]
    for row in rows:
        assert row["positions/s"] == pytest.approx(2 * 128 / row["ms"] * 1e3, rel=1e-3)
        assert row["data tokens/s"] == pytest.approx(row["s"] * row["positions/s"], rel=1e-3)
        assert row["time / s = 1"] == pytest.approx(row["ms"] / rows[0]["ms"])


@pytest.mark.parametrize(
    "wrong, word",
    [
        (dict(bag_sizes="1,x"), "bag_sizes"),
        (dict(parts="lost"), "roofline, loss"),
        (dict(shape="big"), "curves"),
        (dict(dtype="int8"), "bfloat16"),
        (dict(parts="nanogpt"), "clone of karpathy/nanoGPT"),
    ],
)
def test_what_it_does_not_know_is_one_line(wrong, word):
    with pytest.raises(SystemExit, match=word):
        bench.main(bench.Config(device="cpu", **wrong))
