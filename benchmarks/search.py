"""Seconds a cell of a small grid search on one few-shot task: metalr's grid beside one cell at a time.

    python benchmarks/search.py [--tasks N] [--json]

The quickstart's grid (4 learning rates x 1, 5, 20 steps x 2 batch sizes x Adam and SGD) on the quickstart's tasks
(10-way 5-shot, reference MLP without dropout). metalr: `search.run_grid` on all tasks, compilation included: steps
are snapshots of one trajectory, one program serves all rates, and tasks share devices. The others run every cell of a
few tasks alone, warm: a jit-compiled step in a Python loop (JAX), and PyTorch. Before timing, all must give the same
accuracy in the cells that draw no minibatches. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

from metalr.outer import devices

devices.use_all_cores()

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
import torch
import torch.nn.functional as F
import torch_peers

from metalr import data, inner, models, tasks
from metalr.config import GridConfig
from metalr.evaluation import (
    protocol,
    small_grid,
)
from metalr.inner import optimizers
from metalr.trees import named_arrays
from metalr.types import Episode

GRID = GridConfig(steps=(1, 5, 20), batch_sizes=(10, 50))
WAY, SHOT, ALONE = 10, 5, 3  # tasks of the one-cell-at-a-time loops
Cell = tuple[str, int, float, int]  # optimizer, batch size, learning rate, steps
Alone = Callable[[Cell, Episode, int], float]


def batches(batch_size: int, steps: int, seed: int) -> list[np.ndarray]:
    """Rows of each step's minibatch; epochs reshuffled."""
    support, rng = WAY * SHOT, np.random.default_rng(seed)
    each = support // batch_size
    orders = [rng.permutation(support) for _ in range(-(-steps // each))]
    return [orders[s // each][s % each * batch_size :][:batch_size] for s in range(steps)]


def in_jax(model: models.Model, init: Any) -> Alone:
    """A jit-compiled step in a Python loop; the rate is an argument, so each optimizer and batch size compiles once."""

    def step_of(name: str) -> Callable[..., Any]:
        @jax.jit
        def step(params: Any, state: Any, x: jax.Array, y: jax.Array, rate: jax.Array) -> Any:
            grads = jax.grad(lambda p: inner.cross_entropy(model.apply(p, x), y))(params)
            updates, state = optimizers.by_name(name)(rate).update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return step

    steps = {name: step_of(name) for name in GRID.optimizers}
    score = jax.jit(lambda p, x, y: inner.accuracy(model.apply(p, x), y))

    def run(cell: Cell, e: Episode, seed: int) -> float:
        name, batch_size, rate, count = cell
        params, state = init, optimizers.by_name(name)(rate).init(init)
        for rows in batches(batch_size, count, seed):
            params, state = steps[name](params, state, e.support_x[rows], e.support_y[rows], np.float32(rate))
        return float(score(params, e.query_x, e.query_y))

    return run


def in_torch(init: Any) -> Alone:
    """The loop that a PyTorch user writes."""
    start = torch_peers.to_torch({k.removeprefix("init/"): v for k, v in named_arrays(init, "init").items()})
    makers = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}

    def run(cell: Cell, e: Episode, seed: int) -> float:
        name, batch_size, rate, count = cell
        params = {n: v.clone().requires_grad_() for n, v in start.items()}
        optimizer = makers[name](params.values(), lr=rate)
        sx, sy, qx, qy = (torch.from_numpy(np.array(v)) for v in e)
        for rows in map(torch.from_numpy, batches(batch_size, count, seed)):
            optimizer.zero_grad()
            F.cross_entropy(torch_peers.mlp(params, sx[rows]), sy[rows].long()).backward()
            optimizer.step()
        with torch.no_grad():
            return float((torch_peers.mlp(params, qx).argmax(-1) == qy).float().mean())

    return run


def rows_of(count: int) -> list[dict[str, Any]]:
    model = models.mlp(WAY, dropout=0.0)
    split = tasks.make_splits(data.bundled(), "relabeled").test
    pool, sample = tasks.make_sampler(split, WAY, SHOT, 15)
    keys = protocol.episode_keys(0, count)
    init = jax.tree.map(jnp.asarray, model.init(jax.random.key(0)))
    few = [jax.tree.map(np.asarray, jax.jit(sample)(pool, key)) for key in keys[:ALONE]]
    cells = list(itertools.product(GRID.optimizers, GRID.batch_sizes, GRID.learning_rates, GRID.steps))

    began = time.perf_counter()
    ours, _ = small_grid.run_grid(GRID, model, pool, sample, WAY * SHOT, keys, init=init)
    seconds = {f"metalr, {count} tasks, with compilation": (time.perf_counter() - began) / (len(cells) * count)}
    expected = {(c.optimizer, c.batch_size, c.learning_rate, c.steps): c.tasks[:ALONE] for c in ours}
    for name, run in (
        ("JAX, one cell at a time", in_jax(model, init)),
        ("PyTorch, one cell at a time", in_torch(init)),
    ):
        for cell in cells:  # also compiles
            if cell[1] == WAY * SHOT and cell[3] <= 5:  # later, rounding decides single predictions
                got = [run(cell, e, 0) for e in few]
                if np.abs(np.mean(got) - np.mean(expected[cell])) > 0.01:
                    raise SystemExit(
                        f"{name}: {cell}: accuracy {np.mean(got):.4f}, metalr {np.mean(expected[cell]):.4f}"
                    )
            else:
                run(cell, few[0], 0)
        began = time.perf_counter()
        for cell, e in itertools.product(cells, few):
            run(cell, e, 0)
        seconds[f"{name}, {ALONE} tasks, warm"] = (time.perf_counter() - began) / (len(cells) * ALONE)
    first = next(iter(seconds.values()))
    return [
        {
            "system": system,
            "cells": len(cells),
            "milliseconds_a_cell_and_task": round(1e3 * value, 4),
            "times_metalr": round(value / first, 2),
        }
        for system, value in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=600)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    rows = rows_of(options.tasks)
    print(json.dumps(rows, indent=1) if options.json else "\n".join(map(str, rows)))
    measure.save("search", rows)


if __name__ == "__main__":
    main()
