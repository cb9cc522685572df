"""Hyperparameter search on the same inner loop, models and held-out tasks that learned rates are judged on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalr.errors import ConfigError
from metalr.evaluation import protocol
from metalr.inner import optimizers
from metalr.inner.objective import CROSS_ENTROPY, Objective
from metalr.models import Model
from metalr.outer import devices
from metalr.spaces import GridConfig
from metalr.tasks import Pool, Sampler
from metalr.types import Params


def check(grid: GridConfig) -> None:
    """Raises ConfigError for a grid that is empty or contradictory, or has an optimizer that optax does not have."""
    grid.check()
    for name in grid.optimizers:
        optimizers.by_name(name, "grid.optimizers")


class Cell(NamedTuple):
    """One cell of a grid, scored on held-out tasks.

    tasks: [tasks] float64, the objective's score on each task's query set.
    example_gradients: of one task's run of this cell alone.
    """

    init: str
    optimizer: str
    learning_rate: float
    batch_size: int
    steps: int
    tasks: np.ndarray
    example_gradients: int

    @property
    def score(self) -> float:
        """Mean over tasks."""
        return float(self.tasks.mean())

    def row(self, metric: str = "accuracy", groups: np.ndarray | None = None) -> dict:
        """The cell as JSON values: the score, under the metric's name, with its 95 % CI over tasks.

        groups: as of protocol.half_width.
        """
        facts = {k: v for k, v in self._asdict().items() if k != "tasks"}
        mean, ci95, _ = protocol.interval(self.tasks[None], groups)
        return facts | {metric: protocol.rounded(mean), "ci95": protocol.rounded(ci95)}


Programs = dict[tuple[str, int], protocol.Evaluator]  # by optimizer and batch size


def programs_of(
    grid: GridConfig,
    model: Model,
    sample: Sampler,
    support: int,
    objective: Objective = CROSS_ENTROPY,
) -> Programs:
    """The programs of a grid: `evaluate(pool, init or None, rate or rates, keys)`; None: from random inits."""
    check(grid)
    batch_sizes = sorted({min(size, support) for size in grid.batch_sizes})
    return {
        (name, batch_size): protocol.make_baseline(
            model,
            sample,
            optimizers.by_name(name),
            sorted(grid.steps),
            batch_size=None if batch_size == support else batch_size,
            random_init=None,
            objective=objective,
        )
        for name, batch_size in itertools.product(grid.optimizers, batch_sizes)
    }


def run_grid(
    grid: GridConfig,
    model: Model,
    pool: Pool,
    sample: Sampler,
    support: int,
    keys: jax.Array,
    *,
    init: Params | None,
    objective: Objective = CROSS_ENTROPY,
    known: Sequence[Cell] = (),
    keep: Callable[[list[Cell]], None] = lambda cells: None,
    programs: Programs | None = None,
) -> tuple[list[Cell], dict[str, float]]:
    """Score every cell on the tasks of `keys`.

    Steps are snapshots of one trajectory, and one compilation serves all learning rates (on accelerators one dispatch,
    side by side), so the grid costs far less than its cells alone; both costs are given.

    Args:
      grid: every combination; batch sizes larger than the support set become the whole set.
      support: number of support examples of a task.
      init: start every task from these params; None draws a new random init for every task.
      objective: what is minimised, and what a cell's score is.
      known: cells of an earlier call with the same arguments, which are not run again.
      programs: of `programs_of` with the same arguments, for several calls.
      keep: called with the cells of each dispatch (all steps of its rates) as soon as they are there.

    Returns:
      (cells, cost): cost has, for one task, "naive_example_gradients" (each cell alone), "example_gradients" (as
      done), and for all tasks "seconds" with compilation.
    """
    check(grid)
    cells: list[Cell] = []
    began = time.perf_counter()
    origin, steps = "random" if init is None else "learned", sorted(grid.steps)
    found = {cell[:5]: cell for cell in known}
    start = None if init is None else jax.tree.map(jnp.asarray, init)
    programs = programs_of(grid, model, sample, support, objective) if programs is None else programs
    for (name, batch_size), evaluator in programs.items():
        wanted = {rate: [(origin, name, rate, batch_size, n) for n in steps] for rate in grid.learning_rates}
        missing = [rate for rate, cells_of in wanted.items() if not all(key in found for key in cells_of)]
        for rates in devices.at_once(missing):
            given = np.asarray(rates[0] if len(rates) == 1 else rates, np.float32)
            curve = evaluator(pool, start, given, keys)
            tasks = curve.tasks.reshape(len(keys), len(rates), len(steps))
            fresh = [
                Cell(*key, tasks[:, i, j], key[4] * batch_size)
                for i, rate in enumerate(rates)
                for j, key in enumerate(wanted[rate])
            ]
            keep(fresh)
            found |= {cell[:5]: cell for cell in fresh}
        cells += [found[key] for cells_of in wanted.values() for key in cells_of]
    cost = {
        "naive_example_gradients": float(sum(cell.example_gradients for cell in cells)),
        "example_gradients": float(
            sum(batch_size for _, batch_size in programs) * max(grid.steps) * len(grid.learning_rates)
        ),
        "seconds": time.perf_counter() - began,
    }
    return cells, cost


def best(cells: Sequence[Cell], steps: int | None = None, objective: Objective = CROSS_ENTROPY) -> Cell:
    """The cell with the best score on these very tasks, which flatters the grid; at `steps` steps if given.

    Raises ConfigError if no cell has that number of steps.
    """
    fitting = [cell for cell in cells if steps is None or cell.steps == steps]
    if not fitting:
        raise ConfigError(f"grid.steps: expected {steps} among them, got {sorted({c.steps for c in cells})}")
    return objective.best(fitting, lambda cell: cell.score)
