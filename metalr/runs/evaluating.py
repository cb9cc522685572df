"""A learner beside the alternatives, on the same held-out tasks: ablations, no search, the small grid."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from metalr.config import GridConfig, TrainConfig
from metalr.evaluation import protocol, small_grid
from metalr.learner import Learner
from metalr.outer.devices import Layout
from metalr.runs.progress import Reporter
from metalr.runs.setup import Setup, grid_of
from metalr.types import Curve, Episode

ORDERS = 0x0D35  # folded into a task's key


def held_out(
    learner: Learner,
    setup: Setup,
    episodes: int,
    steps: int,
    seed: int,
    of_steps: int | None = None,
    layout: Layout = Layout(),  # noqa: B008 - a tuple
) -> tuple[Curve, float]:
    """The adaptation curve of a learner on the fixed meta-test tasks, and the seconds it took with compilation.

    Where rates alone were learned, every task starts from a random init of its own. of_steps: over how many steps a
    schedule with knots is stretched; default: the trained ones, after which it holds.
    """
    began = time.perf_counter()
    pool, sample = setup.parts.test
    random_init = setup.phases.fresh_init
    evaluator = protocol.make_evaluator(
        learner.model,
        learner.spec,
        sample,
        steps,
        random_init=random_init,
        of_steps=of_steps,
        objective=learner.objective,
        layout=layout,
    )
    curve = evaluator(pool, learner.init, learner.rates, protocol.episode_keys(seed, episodes))
    return curve, time.perf_counter() - began


def label_orders(learner: Learner, setup: Setup, seed: int, *, episodes: int = 100, orders: int = 5) -> dict[str, Any]:
    """How much the order of labels alone moves a task's score: which class is called 0 says nothing about the task.

    The same meta-test tasks with `orders` random orders of their labels, after the trained steps.

    Returns: orders, episodes, and spread: the standard deviation over orders, mean over tasks.
    """
    pool, sample = setup.parts.test
    way, steps = learner.model.classes, learner.spec.steps

    def reordered(given: Any, key: jax.Array) -> Episode:
        own = jax.random.fold_in(jax.random.fold_in(key, ORDERS), given[1])  # no key of the sampler's
        episode, names = sample(given[0], key), jax.random.permutation(own, way)
        return episode._replace(support_y=names[episode.support_y], query_y=names[episode.query_y])

    evaluator = protocol.make_evaluator(
        learner.model, learner.spec, reordered, steps, at=[steps], objective=learner.objective,
        random_init=setup.phases.fresh_init,
    )  # fmt: skip
    keys = protocol.episode_keys(seed, episodes)
    scores = [evaluator((pool, np.int32(order)), learner.init, learner.rates, keys).tasks for order in range(orders)]
    return {"orders": orders, "episodes": episodes, "spread": protocol.rounded(np.std(scores, axis=0, ddof=1).mean())}


def horizons(
    learner: Learner,
    setup: Setup,
    config: TrainConfig,
    lengths: Sequence[int],
    grid: GridConfig,
    random_grid: dict[int, small_grid.Cell] | None = None,
) -> tuple[list[dict[str, Any]], dict[int, small_grid.Cell]]:
    """A learner's fine-tunes of several lengths, each beside the best fixed rate found by grid at that very length.

    Schedules with knots are stretched over each length. The grid runs on the same meta-test tasks, with the learner's
    minibatches, and its best cell is chosen on them, which flatters it; grid.steps are not used.

    Args:
      random_grid: the second result of an earlier call with the same tasks, to save its time.

    Returns:
      (rows: horizon, and protocol.row with a cell; best cells from a random init).
    """
    pool, sample = setup.parts.test
    keys = protocol.episode_keys(config.evaluation.seed, config.evaluation.episodes)
    support, random_init = setup.support, setup.phases.fresh_init
    spec, model, objective = learner.spec, learner.model, learner.objective
    size = min(spec.minibatch(support) or support, support)
    grid = dataclasses.replace(grid, steps=tuple(lengths), batch_sizes=(size,))
    of_grid = small_grid.programs_of(grid, model, sample, support, objective)
    best: dict[str, dict[int, small_grid.Cell]] = {}
    for origin, init in (("random", None), ("learned", learner.init)):
        if origin == "random" and random_grid is not None:
            best[origin] = random_grid
        elif origin == "random" or not random_init:
            cells, _ = small_grid.run_grid(
                grid, model, pool, sample, support, keys, init=init, objective=objective, programs=of_grid
            )
            best[origin] = {steps: small_grid.best(cells, steps, objective) for steps in lengths}
    ascending = sorted(set(lengths))
    evaluator = protocol.make_evaluator(
        model, spec, sample, ascending[-1], at=ascending, separate=True, random_init=random_init, objective=objective
    )
    curves = dict(evaluator(pool, learner.init, learner.rates, keys).each_point())
    rows = []
    for steps in lengths:
        curve = curves[steps]
        ours = curve.tasks[:, 0]
        named: list[tuple[str, np.ndarray, dict[str, Any]]] = [
            (f"{'random' if random_init else 'learned'} init + {learner.kind_of_rates}", ours, {})
        ]
        for origin, at in best.items():
            cell = at[steps]
            chosen = {"optimizer": cell.optimizer, "learning_rate": cell.learning_rate}
            named.append((f"{origin} init + grid, best fixed rate", cell.tasks, chosen))
        for method, tasks, chosen in named:
            row = protocol.row(method, steps, tasks, objective.choose_by, ours, curve.groups)
            rows.append({"horizon": row.pop("steps"), **row, "cell": chosen})
    return rows, best["random"]


def curve_rows(curve: Curve, metric: str) -> list[dict[str, float | None]]:
    """A curve as JSON rows: steps, the metric by its name, ci95."""
    return [
        {"steps": int(n), metric: protocol.rounded(m), "ci95": protocol.rounded(c)}
        for n, m, c in zip(curve.steps, curve.mean, curve.ci95, strict=True)
    ]


def compare(
    config: TrainConfig,
    setup: Setup,
    learner: Learner,
    curve: Curve,
    reporter: Reporter,
    known: Sequence[small_grid.Cell] = (),
    keep: Callable[[list[small_grid.Cell]], None] = lambda cells: None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The learned init and rates beside ablations, no search, and the best cells of the small grid.

    Every row is of the same tasks; a grid's best cell is the one that did best on these very tasks, which flatters it.
    known, keep: as in small_grid.run_grid.

    Returns:
      (rows, facts of the grid with all cells).
    """
    grid, steps, objective = grid_of(config), config.inner.steps, setup.objective
    support = setup.support
    pool, sample = setup.parts.test
    keys = protocol.episode_keys(config.evaluation.seed, config.evaluation.episodes)
    cells, costs = {}, {}
    origins = {"random": None} | ({} if setup.phases.fresh_init else {"learned": learner.init})
    batches = {min(size, support) for size in grid.batch_sizes}
    of_grid = small_grid.programs_of(grid, setup.model, sample, support, objective)
    trajectories = len(grid.optimizers) * len(batches) * len(grid.learning_rates)
    for origin, init in origins.items():
        there = sum(cell.init == origin for cell in known) // len(grid.steps)
        title = f"grid search from the {origin} init, {len(keys)} tasks"
        with reporter.bar(title, trajectories, min(there, trajectories - 1)) as advance:

            def kept(new: list[small_grid.Cell], advance: Callable[[int, str], None] = advance) -> None:
                keep(new)
                advance(1, f"{new[0].optimizer}, rate {new[0].learning_rate:g}, batches of {new[0].batch_size}")

            cells[origin], costs[origin] = small_grid.run_grid(
                grid, setup.model, pool, sample, support, keys, init=init, objective=objective, known=known, keep=kept,
                programs=of_grid,
            )  # fmt: skip
    taken = [int(n) for n in curve.steps]
    reference = curve.tasks[:, taken.index(steps)]
    per_step = min(config.inner.batch_size or support, support)
    start = "random" if setup.phases.fresh_init else "learned"
    rows: list[dict[str, Any]] = []

    def add(method: str, taken: int, tasks: np.ndarray, cost: float, cell: small_grid.Cell | None = None) -> None:
        chosen = cell._asdict() if cell else {}
        choice = {k: chosen[k] for k in ("optimizer", "learning_rate", "batch_size") if chosen}
        row = protocol.row(method, taken, tasks, objective.choose_by, reference, curve.groups)
        rows.append(row | {"example_gradients": cost, "cell": choice})

    kind = learner.kind_of_rates
    add(f"{start} init + {kind}", steps, reference, steps * per_step)
    if taken[-1] > steps:
        add(f"{start} init + {kind}", taken[-1], curve.tasks[:, -1], taken[-1] * per_step)
    if start == "learned":
        random = protocol.make_evaluator(
            setup.model, learner.spec, sample, steps, random_init=True, at=[steps], objective=objective
        )
        found = random(pool, learner.init, learner.rates, keys).tasks[:, 0]
        add(f"random init + {kind}", steps, found, steps * per_step)
    for origin in origins:
        same = small_grid.best(cells[origin], steps, objective)
        cost = sum(cell.example_gradients for cell in cells[origin] if cell.steps == steps)
        add(f"{origin} init + grid, best cell at {steps} steps", steps, same.tasks, cost, same)
        best = small_grid.best(cells[origin], objective=objective)
        naive = costs[origin]["naive_example_gradients"]
        add(f"{origin} init + grid, best cell of all", best.steps, best.tasks, naive, best)
    unsearched = [cell for cell in cells["random"] if (cell.optimizer, cell.learning_rate) == ("adam", 1e-3)]
    if unsearched:
        cell = max(unsearched, key=lambda cell: (cell.steps, cell.batch_size == min(32, support)))
        add("random init, no search (Adam 1e-3)", cell.steps, cell.tasks, cell.example_gradients, cell)
    all_cells = [cell.row(objective.choose_by, curve.groups) for origin in cells for cell in cells[origin]]
    return rows, {
        "cells": all_cells,
        "cost_per_task": costs,
        "chosen": "best cell on the meta-test tasks themselves",
    }
