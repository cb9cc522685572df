"""Run folders: what may be overwritten, seeds, and one policy for every row of a comparison."""

import dataclasses
import json

import pytest

from metalr import runs
from metalr.config import EvaluationConfig, GridConfig, InnerConfig, ModelConfig, OuterConfig, TaskConfig, TrainConfig
from metalr.errors import ConfigError


@pytest.fixture
def small(blobs_npz):
    return TrainConfig(
        data=str(blobs_npz),
        tasks=TaskConfig(family="permuted", way=10, shot=2, query=3),
        model=ModelConfig(widths=(16,)),
        outer=OuterConfig(steps=4, meta_batch=2),
        evaluation=EvaluationConfig(episodes=6, validation_episodes=2),
    )


def run(config, **changes):
    return runs.run(dataclasses.replace(config, **changes), name="x", reporter=runs.ConsoleReporter(quiet=True))


def test_only_a_run_is_overwritten(small, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("my own")
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match=r"expected a run to overwrite, found other files: \['thesis.txt'\]"):
        run(small, out=mine, overwrite=True)
    assert (mine / "config.json").read_text() == "my own"
    first = run(small, out=tmp_path / "run")
    again = run(small, out=tmp_path / "run", overwrite=True)
    assert first["curve"] == again["curve"]


def test_default_folders_are_numbered(small):
    assert [run(small)["folder"] for _ in range(2)] == ["runs/x", "runs/x-2"]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_all_rows_of_a_comparison_follow_one_policy(small, dropout):
    """MAML's learned rate is its fixed first one, so "learned rates" and the grid's SGD cell are the same thing."""
    results = run(
        small,
        model=ModelConfig(widths=(16,), dropout=dropout),
        inner=InnerConfig(algorithm="maml", steps=3),
        evaluation=EvaluationConfig(episodes=200, validation_episodes=2),
        grid=GridConfig(run=True, learning_rates=(0.1,), steps=(3,), batch_sizes=(1000,), optimizers=("sgd",)),
    )
    rows = {row["method"]: row for row in results["comparison"] if row["steps"] == 3}
    learned, cell = rows["learned init + learned rates"], rows["learned init + grid, best cell at 3 steps"]
    assert abs(learned["accuracy"] - cell["accuracy"]) < (0.03 if dropout else 1e-3)


def test_seeds_are_checked_before_any_is_trained(small, tmp_path):
    for seeds, message in (((), "seeds: expected"), ((1, 1), "seeds: expected"), ((0, -1), "seed: expected 0 <= seed")):
        with pytest.raises(ConfigError, match=message):
            runs.run_seeds(dataclasses.replace(small, out=tmp_path / "s"), "x", seeds, tmp_path)
    assert not (tmp_path / "s").exists()


def test_seeds_are_averaged_and_their_choices_listed(small, tmp_path):
    config = dataclasses.replace(small, out=tmp_path / "s", grid=GridConfig(run=True, steps=(1,), batch_sizes=(5,)))
    results = runs.run_seeds(config, "x", (0, 1), tmp_path)
    assert json.loads((tmp_path / "results" / "x.json").read_text())["seeds"] == [0, 1]
    assert (tmp_path / "artifacts" / "x" / "metalr.json").is_file()
    for row, *each in zip(results["comparison"], *(r["comparison"] for r in results["runs"]), strict=True):
        assert row["accuracy"] == pytest.approx(sum(r["accuracy"] for r in each) / 2, abs=1e-5)
        cells = [r["cell"] for r in each]
        assert row["cell"] == (cells[0] if cells[0] == cells[1] else cells)
