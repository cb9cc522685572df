"""Pytrees of arrays by name: "dense_0/kernel" -> array, in files, messages and logs."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from metalr.errors import ArtifactError, ConfigError, DataError

INT32 = np.iinfo(np.int32)


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as one string: "dense_0/kernel"; the value of a variable of NNX goes by the variable's name."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_names(tree: Any) -> list[str]:
    """The names of a tree's leaves, in the order of its leaves."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def leaf_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf, by name."""
    return {path_name(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def as_numbers(value: Any, what: str) -> np.ndarray:
    """An array as compiled programs take it: floats as float32, integers as int32, bytes and booleans as they are.

    Raises DataError for anything that is no number, and for integers beyond 32 bits.
    """
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise DataError(f"{what}: expected numbers everywhere, got masked ones; leave these rows out, or fill them")
    found = by_column(value, what)
    if found[0][1].ndim < np.ndim(value):
        return np.stack([as_numbers(column, name).astype(np.float32) for name, column in found], axis=1)
    value = found[0][1]
    if value.dtype.kind == "f":
        return value.astype(np.float32)
    if value.dtype.kind in "iu" and value.dtype != np.uint8:
        if value.size and (value.min() < INT32.min or value.max() > INT32.max):
            raise DataError(
                f"{what}: expected integers of 32 bits, got {value.min()} to {value.max()}; give numbers as floats"
            )
        return value.astype(np.int32)
    if value.dtype.kind in "bu":
        return value
    raise DataError(f"{what}: expected numbers, got {value.dtype}; turn categories into numbers (one-hot columns, say)")


def columns_of(tree: Any) -> dict[str, list[str]]:
    """The names of the columns of each DataFrame in a pytree, by path name; "" if the tree is one."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): [str(name) for name in v.columns] for path, v in leaves if hasattr(v, "columns")}


def check_columns(tree: Any, known: Mapping[str, list[str]] | list[str] | None, what: str) -> None:
    """Raises DataError for DataFrames whose columns are others than the known ones, or in another order.

    known: as columns_of gives them, or the names alone if the tree is one DataFrame; None, and paths that it does not
    name: nothing is known.
    """
    by_path = {"": known} if isinstance(known, list) else known or {}
    for path, came in columns_of(tree).items():
        if came != by_path.get(path, came):
            name = f"{what} {path}".strip()
            raise DataError(f"{name}: expected the columns {by_path[path]}, in this order, got {came}")


def by_column(value: Any, what: str) -> list[tuple[str, np.ndarray]]:
    """An array as it is, under the name `what`; of a DataFrame with columns of several dtypes each column by itself.

    Raises DataError where a value of such a column is missing.
    """
    array = np.asarray(value)
    if array.dtype.kind != "O" or not hasattr(value, "isna"):
        return [(what, array)]
    if not hasattr(value, "columns"):
        return [(what, _of_column(value, what))]
    named = [(f"{what}: column {str(name)!r}", value.iloc[:, at]) for at, name in enumerate(value.columns)]
    return [(name, _of_column(column, name)) for name, column in named]


def _of_column(column: Any, what: str) -> np.ndarray:
    """A column of pandas as numpy has it, of a nullable dtype too. Raises DataError where a value is missing."""
    missing = column.isna().to_numpy()
    if missing.any():
        raise DataError(f"{what}: expected a number in every row, row {missing.argmax()} has none")
    kinds = {"f": np.float64, "i": np.int64, "u": np.int64, "b": np.bool_}
    return column.to_numpy(kinds.get(getattr(column.dtype, "kind", "O")))


def whole_numbers(values: Any) -> bool:
    """Whether floats are integers that have not lost digits: below 2^53, and none missing or infinite."""
    values = np.asarray(values, np.float64)
    return bool(np.isfinite(values).all() and (np.abs(values) < 2.0**53).all() and (values == np.round(values)).all())


def check_digits(values: np.ndarray, what: str) -> None:
    """Raises DataError for columns whose differences are lost in float32, such as Unix times of a few minutes.

    values: [rows] or [rows, columns] numbers; others are left to as_numbers.
    """
    if values.dtype.kind not in "fiu" or values.dtype == np.uint8 or values.ndim not in (1, 2) or not values.size:
        return
    columns = values.astype(np.float64).reshape(len(values), -1)
    if not np.isfinite(columns).all():
        return
    size, spread = np.abs(columns).max(0), columns.std(0)
    # float32 has 24 digits, of which a hundredth of the spread needs some; noise of float64 on a constant is none.
    lost = np.flatnonzero((spread > size * 2.0**-40) & (spread < 100 * size * 2.0**-24))
    if lost.size:
        at = lost[0]
        column = f" column {at}" if values.ndim == 2 else ""
        raise DataError(
            f"{what}:{column} expected numbers that float32 can tell apart, got values near {size[at]:.6g} that differ "
            f"by about {spread[at]:.2g}; subtract a constant from them (of times, the first one)"
        )


def check_names(tree: Any) -> None:
    """Raises ConfigError if two leaves have the same name, as those of {"a/b": x, "a": {"b": y}} have."""
    for name, count in collections.Counter(leaf_names(tree)).items():
        if count > 1:
            raise ConfigError(f"params: expected path names that differ, got two of the name {name!r}")


def count(tree: Any) -> int:
    """How many examples there are: the length of the leading axis of the tree's leaves."""
    return np.shape(jax.tree.leaves(tree)[0])[0]


def named_arrays(tree: Any, prefix: str) -> dict[str, np.ndarray]:
    """Leaves of a pytree as numpy arrays, under "PREFIX/NAME".

    Raises:
      ConfigError: two leaves have the same name. ArtifactError: a dtype that could be written and not read back.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    check_names(tree)
    named = {f"{prefix}/{path_name(path)}": np.asarray(leaf, order="C") for path, leaf in leaves}
    for name, value in named.items():
        if value.dtype.kind not in "fiub":  # safetensors writes bfloat16, and its reader for numpy cannot read it
            raise ArtifactError(f"{name}: expected numbers of a dtype that numpy has, got {value.dtype}")
    return named
