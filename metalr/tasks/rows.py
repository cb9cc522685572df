"""Tasks from the rows of a table: which rows are of which task, how tasks are dealt to splits, and their sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalr.errors import ConfigError, DataError
from metalr.tasks.samplers import Sample, choose
from metalr.trees import path_name, whole_numbers
from metalr.types import Episode


class Rows(NamedTuple):
    """The rows of a table, sorted by task, and where each task of a split begins and how many rows it has."""

    x: Any
    y: Any
    first: jax.Array  # [tasks] int32
    size: jax.Array  # [tasks] int32


def _is_missing(value: Any) -> bool:
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def task_ids(task: Any) -> np.ndarray:
    """[rows] integers or strings. Raises DataError for a row without one, and for ids of several kinds."""
    ids = np.asarray(task)
    if ids.ndim != 1:
        raise DataError(f"task: expected one id a row, shape [rows], got {list(ids.shape)}")
    if ids.dtype.kind in "iuUb":
        return ids
    values = ids.ravel().tolist()
    without = [row for row, value in enumerate(values) if _is_missing(value)]
    if without:
        raise DataError(f"task: expected an id in every row, got none in {len(without)}, first in row {without[0]}")
    kinds = {type(value).__name__ for value in values}
    if ids.dtype.kind == "f" and whole_numbers(ids):
        return ids.astype(np.int64)  # as pandas has integers, once some were missing
    if kinds - {"str"} and kinds - {"int"}:
        raise DataError(f"task: expected integers or strings, got {', '.join(sorted(kinds))}")
    return ids.astype(str) if kinds == {"str"} else ids.astype(np.int64)


def check_rows(trees: Mapping[str, Any], rows: int, shape: tuple[int, ...]) -> None:
    """Raises DataError unless every column has one finite value a task id, which are of `shape`."""
    for what, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            column = f"{what} {path_name(path)}".strip()
            if leaf.shape[:1] != shape:
                raise DataError(f"{column}: expected {rows} rows, one a task id, got shape {list(leaf.shape)}")
            if np.issubdtype(leaf.dtype, np.floating) and not np.isfinite(leaf).all():
                bad = np.flatnonzero(~np.isfinite(leaf).reshape(len(leaf), -1).all(1))
                raise DataError(
                    f"{column}: expected finite values, got others in {len(bad)} rows, first in row {bad[0]}"
                )


def dealt(names: np.ndarray, counts: np.ndarray, validation: float, test: float, seed: int) -> dict[str, np.ndarray]:
    """The tasks of each split, by their places in `names`, sorted. counts: rows of each task.

    Raises DataError for tasks of one row, or too few tasks; ConfigError for shares that leave none to train on.
    """
    lonely = [str(n) for n in names[counts < 2]]
    if lonely:
        raise DataError(f"task: expected at least 2 rows of each task, got one of {', '.join(lonely[:5])}")
    if len(names) < 3:
        raise DataError(f"task: expected at least 3 tasks, one for each split, got {len(names)}")
    held = {"validation": max(1, round(validation * len(names))), "test": max(1, round(test * len(names)))}
    if not (0 < validation < 1 and 0 < test < 1) or sum(held.values()) >= len(names):
        raise ConfigError(f"validation, test: expected shares that leave tasks to train on, got {validation}, {test}")
    order = np.random.default_rng(seed).permutation(len(names))
    parts = np.split(order, [held["test"], held["test"] + held["validation"]])
    return dict(zip(("test", "validation", "train"), map(np.sort, parts), strict=True))


def row_task(rows: Rows, key: jax.Array) -> jax.Array:
    """Which task of the split a key draws: int32 []."""
    return jax.random.randint(jax.random.split(key)[0], (), 0, len(rows.first))


def row_sampler(shot: int, query: int) -> Sample:
    """(rows, key) -> an episode of one random task of the split."""
    need = shot + query

    def sample(rows: Rows, key: jax.Array) -> Episode:
        task, row_key = row_task(rows, key), jax.random.split(key)[1]
        have = rows.size[task]
        enough = choose(row_key, jnp.maximum(have, need), need)
        # Too few: a random order of them, whose first part fills the support set over and over, the rest the query set.
        order = jnp.argsort(jnp.where(jnp.arange(need) < have, jax.random.uniform(row_key, (need,)), 2.0))
        share = jnp.clip(have * shot // need, 1, jnp.maximum(have - 1, 1))
        rest = jnp.maximum(have - share, 1)
        few = jnp.concatenate([order[jnp.arange(shot) % share], order[(share + jnp.arange(query) % rest) % need]])
        picked = rows.first[task] + jnp.where(have >= need, enough, few)
        x, y = jax.tree.map(lambda v: v[picked], (rows.x, rows.y))
        parts = [
            jax.tree.map(lambda v, at=at: v[at], tree) for at in (slice(shot), slice(shot, None)) for tree in (x, y)
        ]
        return Episode(*parts)

    return sample
