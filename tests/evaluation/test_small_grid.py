"""The grid: every cell is what a run of that cell alone gives."""

import jax
import numpy as np
import pytest

from metalr import models, tasks
from metalr.config import GridConfig
from metalr.errors import ConfigError
from metalr.evaluation import protocol, small_grid
from metalr.inner import optimizers


@pytest.fixture(scope="module")
def setting(blobs):
    pool, sample = tasks.make_sampler(tasks.make_splits(blobs, "relabeled").test, 10, 2, 3)
    return models.mlp(10, (8, 8, 1), widths=(16,), dropout=0.0), pool, sample, protocol.episode_keys(0, 8)


@pytest.mark.parametrize("from_init", [False, True])
def test_cells_are_what_each_alone_gives(setting, from_init):
    model, pool, sample, keys = setting
    init = model.init(jax.random.key(4)) if from_init else None
    grid = GridConfig(learning_rates=(1e-2, 1e-1), steps=(2, 6), batch_sizes=(5, 99), optimizers=("adam",))
    cells, cost = small_grid.run_grid(grid, model, pool, sample, 20, keys, init=init)
    assert len(cells) == 8
    assert {cell.batch_size for cell in cells} == {5, 20}
    assert all(cell.example_gradients == cell.steps * cell.batch_size for cell in cells)
    for cell in (cells[0], cells[-1]):
        batch = None if cell.batch_size == 20 else cell.batch_size
        alone = protocol.make_baseline(
            model,
            sample,
            optimizers.by_name(cell.optimizer),
            [cell.steps],
            batch_size=batch,
            random_init=init is None,
        )
        expected = alone(pool, init, np.float32(cell.learning_rate), keys).tasks[:, 0]
        np.testing.assert_allclose(cell.tasks, expected, atol=0.034)  # one prediction of 30 may round over
    assert cost["naive_example_gradients"] == sum(c.example_gradients for c in cells)
    assert cost["example_gradients"] == (5 + 20) * 6 * 2


def test_rates_side_by_side_are_one_dispatch_and_the_same_cells(setting, monkeypatch):
    """As on accelerators."""
    model, pool, sample, keys = setting
    grid = GridConfig(learning_rates=(1e-2, 3e-2, 1e-1), steps=(2, 6), batch_sizes=(5,), optimizers=("adam",))
    found, dispatches = [], []
    for side_by_side in (False, True):
        if side_by_side:
            monkeypatch.setattr(small_grid.devices, "at_once", lambda values: [list(values)] if values else [])
        cells, _ = small_grid.run_grid(grid, model, pool, sample, 20, keys, init=None, keep=dispatches.append)
        found.append(cells)
    assert [cell[:5] for cell in found[0]] == [cell[:5] for cell in found[1]]
    assert [len(cells) for cells in dispatches] == [2, 2, 2, 6]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.tasks, other.tasks, atol=0.034)


def test_random_and_learned_inits_are_one_program(setting):
    model, pool, sample, keys = setting
    grid = GridConfig(learning_rates=(1e-2, 1e-1), steps=(2,), batch_sizes=(5,), optimizers=("sgd",))
    programs = small_grid.programs_of(grid, model, sample, 20)
    scores = []
    for init in (None, jax.device_get(model.init(jax.random.key(4)))):
        cells, _ = small_grid.run_grid(grid, model, pool, sample, 20, keys, init=init, programs=programs)
        scores.append([cell.tasks.tolist() for cell in cells])
    assert scores[0] != scores[1]
    assert [program._program(len(keys))._cache_size() for program in programs.values()] == [1]


def test_best(setting):
    def cell(steps, score):
        return small_grid.Cell("random", "adam", 0.1, 5, steps, np.full(4, score), 5)

    cells = [cell(1, 0.2), cell(5, 0.6), cell(5, 0.4), cell(20, 0.7)]
    assert small_grid.best(cells).score == pytest.approx(0.7)
    assert small_grid.best(cells, 5).score == pytest.approx(0.6)
    with pytest.raises(ConfigError, match=r"grid.steps: expected 3 among them, got \[1, 5, 20\]"):
        small_grid.best(cells, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rates": ()}, "grid.learning_rates: expected at least one value"),
        ({"learning_rates": (0.1, 0.1)}, "grid.learning_rates: expected different values"),
        ({"learning_rates": (-0.1,)}, "grid.learning_rates: expected positive"),
        ({"steps": (0,)}, "grid.steps, grid.batch_sizes: expected 1 or more"),
        (
            {"optimizers": ("lions",)},
            "grid.optimizers: expected an optax optimizer .* optax has no 'lions', but 'lion'",
        ),
    ],
)
def test_bad_grids(settings, message):
    with pytest.raises(ConfigError, match=message):
        small_grid.check(GridConfig(**settings))
