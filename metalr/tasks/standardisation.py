"""Means and deviations of a table's columns, learned on meta-training tasks and kept with what was learned."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalr.errors import ConfigError, DataError
from metalr.trees import named_arrays, path_name

CHOICES = ("none", "inputs", "both")


@dataclasses.dataclass(frozen=True, eq=False)
class Standardisation:
    """(value - mean) / deviation of each number of an input, and of a target where targets are standardised too.

    Attributes:
      x_mean, x_deviation: float32 arrays of the shape of one input, in the structure of the inputs (one array, or
        nested dicts of them).
      y_mean, y_deviation: likewise of one target; None where targets stay as they are.
    """

    x_mean: Any
    x_deviation: Any
    y_mean: Any = None
    y_deviation: Any = None

    @classmethod
    def of(cls, x: Any, y: Any, choice: str) -> Standardisation | None:
        """Of rows x and y with a leading axis [rows]. A column that never changes keeps the deviation 1.

        choice: "none" gives None; "inputs"; or "both", for targets that are numbers on a scale.

        Raises ConfigError for another choice, integer targets with "both", or inputs that are no nested dicts.
        """
        if choice not in CHOICES:
            raise ConfigError(f"standardise: expected one of {CHOICES}, got {choice!r}")
        if choice == "none":
            return None
        for name, tree in (("x", x), ("y", y)):
            for path, _ in jax.tree_util.tree_leaves_with_path(tree):
                if not all(isinstance(key, jax.tree_util.DictKey) and isinstance(key.key, str) for key in path):
                    raise ConfigError(
                        f"standardise: expected {name} as one array or nested dicts of arrays, got {path}"
                    )
                if any("/" in key.key for key in path):  # files know them by path
                    raise ConfigError(f'standardise: expected names of {name} without "/", got {path_name(path)!r}')
        if choice == "both" and any(not np.issubdtype(leaf.dtype, np.floating) for leaf in jax.tree.leaves(y)):
            raise ConfigError(
                'standardise: expected float targets with "both", got integers; give y as floats if they are numbers, '
                'or pass "inputs" if they are classes'
            )
        parts = [_mean_and_deviation(tree) for tree in ((x, y) if choice == "both" else (x,))]
        return cls(*(value for part in parts for value in part))

    def inputs(self, x: Any, what: str = "inputs") -> Any:
        """Inputs [n, …] in units of the deviation. Raises DataError, naming `what`, for rows of another shape."""
        return _towards(x, self.x_mean, self.x_deviation, what)

    def own_inputs(self, x: Any) -> Any:
        """Standardised inputs [n, …] back in their own units."""
        return _back(x, self.x_mean, self.x_deviation)

    def targets(self, y: Any, what: str = "targets") -> Any:
        """Targets [n, …] in units of the deviation; as they are where they are not standardised. Raises DataError."""
        return y if self.y_mean is None else _towards(y, self.y_mean, self.y_deviation, what)

    def outputs(self, outputs: Any) -> Any:
        """Outputs (or targets) [n, …] back in the targets' own units."""
        return outputs if self.y_mean is None else _back(outputs, self.y_mean, self.y_deviation)

    def same_as(self, other: Standardisation | None) -> bool:
        """Whether another one has the same numbers."""
        own, theirs = self.named(), {} if other is None else other.named()
        return own.keys() == theirs.keys() and all(np.array_equal(own[name], theirs[name]) for name in own)

    def named(self) -> dict[str, np.ndarray]:
        """The arrays by name, as a file holds them; `from_named` takes them."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return named_arrays({name: tree for name, tree in parts.items() if tree is not None}, "standardisation")

    @classmethod
    def from_named(cls, arrays: dict[str, np.ndarray]) -> Standardisation | None:
        """What `named` gave; None for no arrays. Raises TypeError or KeyError for anything else."""
        trees: dict[str, Any] = {}
        for name, value in arrays.items():
            at, (*parents, last) = trees, name.split("/")[1:]
            for parent in parents:
                at = at.setdefault(parent, {})
            at[last] = value
        return cls(**trees) if trees else None


def _towards(tree: Any, mean: Any, deviation: Any, what: str) -> Any:
    wanted: Any = jax.tree.structure(mean)
    came: Any = jax.tree.structure(tree)
    if wanted != came:
        raise DataError(f"{what}: expected the structure {wanted} as in training, got {came}")

    def of(value: Any, mean: Any, deviation: Any) -> Any:
        row = value.shape[value.ndim - mean.ndim :] if value.ndim > mean.ndim else None
        single = mean.size == 1 and (value.ndim == 1 or value.shape[1:] == (1,))  # [n] or [n, 1] of one column
        if row != mean.shape and not single:  # broadcasting would make numbers of it
            shape = ", ".join(map(str, ("n", *mean.shape)))
            raise DataError(f"{what}: expected shape [{shape}] as in training, got {list(value.shape)}")
        value = value.astype(np.float32) if not jnp.issubdtype(value.dtype, jnp.floating) else value
        return (value - _beside(value, mean)) / _beside(value, deviation)

    return jax.tree.map(of, tree, mean, deviation)


def _back(tree: Any, mean: Any, deviation: Any) -> Any:
    return jax.tree.map(lambda v, m, d: v * _beside(v, d) + _beside(v, m), tree, mean, deviation)


def _beside(value: Any, row: Any) -> Any:
    """One row's numbers with as many axes as `value`, which has a row an example."""
    return row.reshape((1,) * (value.ndim - row.ndim) + row.shape) if row.ndim else row


def _mean_and_deviation(tree: Any) -> tuple[Any, Any]:
    def deviation(leaf: np.ndarray) -> np.ndarray:
        values = np.asarray(leaf, np.float64)
        found = values.std(0)
        rounding = 2.0**-40 * np.abs(values).max(0)  # of a constant
        return np.where(found > rounding, found, 1.0).astype(np.float32)

    return jax.tree.map(lambda v: np.asarray(v, np.float64).mean(0).astype(np.float32), tree), jax.tree.map(
        deviation, tree
    )
