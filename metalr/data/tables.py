"""Tables of one's own: a CSV or Parquet file with a row an example, read by pandas (the extra `tables`)."""

from __future__ import annotations

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metalr.errors import ConfigError, DataError, one_line
from metalr.trees import check_digits, whole_numbers

SUFFIXES = (".csv", ".parquet")


class Table(NamedTuple):
    """A table's columns as arrays.

    Attributes:
      x: [rows, features] float32.
      y: [rows] or [rows, targets] float32; of classes [rows] int32, numbered in the order of `classes`. Rows whose
        target is missing have NaN (or -1).
      task: [rows] task ids, integers or strings; empty if no column says so.
      features: the names of the columns of x.
      classes: the classes' names, or () for targets that are numbers.
    """

    x: np.ndarray
    y: np.ndarray
    task: np.ndarray
    features: tuple[str, ...]
    classes: tuple[str, ...]


def is_table(data: str) -> bool:
    """Whether `data` names a table rather than images."""
    return Path(data).suffix.lower() in SUFFIXES


def import_pandas() -> types.ModuleType:
    """Pandas. Raises ConfigError where it is not installed."""
    try:
        import pandas
    except ImportError as error:
        raise ConfigError("data: expected pandas for a table; pip install 'metalr[tables]'") from error
    return pandas


def read_table(
    path: Path | str,
    *,
    target: Sequence[str],
    task_column: str | None,
    features: Sequence[str] = (),
    classes: bool | Sequence[str] = False,
    may_lack_targets: bool = False,
    ignore_targets: bool = False,
) -> Table:
    """Read a .csv or .parquet file.

    Args:
      target: the columns to predict; one of them if they are classes.
      task_column: the column that says which task a row is of; None for the rows of one task.
      features: the columns to predict from; default: all others.
      classes: whether the target's values are classes (numbers or names); or the names they have already.
      may_lack_targets: take rows without a target, which are to be predicted. A file without a column of `target` is
        one of such rows only.
      ignore_targets: take all rows as such.

    Raises:
      ConfigError: a column that is not there. DataError: no such file, a damaged one, a feature that is no number, or
        a value that is missing.
    """
    pandas = import_pandas()
    path = Path(path)
    frame = _frame(pandas, path)
    frame.columns = names = in_file = [str(name) for name in frame.columns]
    if not isinstance(frame.index, pandas.RangeIndex) and path.suffix.lower() == ".csv":
        raise DataError(f"data: {path}: expected a value for each of {len(names)} names in its first line, got more")
    if not len(frame):
        raise DataError(f"data: {path}: expected rows, got none")
    if ignore_targets:
        names = [name for name in names if name not in target]
        frame = frame[names]
    asked: dict[str, list[Any]] = {
        "data.task_column": [task_column] * (task_column is not None),
        "data.features": list(features),
    }
    if not may_lack_targets:
        asked["data.target"] = list(target)
    for setting, wanted in asked.items():
        missing = [name for name in wanted if name not in names]
        if missing:
            raise ConfigError(f"{setting}: expected columns of {path.name}, {names}; it has no {missing[0]!r}")
        if len(set(wanted)) < len(wanted):
            raise ConfigError(f"{setting}: expected every column once, got {wanted}")
    if not target or set(target) & {task_column, *features} or (classes is not False and len(target) != 1):
        raise ConfigError(
            "data.target: expected one or more columns (one, of classes) that are neither the task's nor features, "
            f"got {list(target)}"
        )
    chosen = list(features) or [name for name in names if name not in {task_column, *target}]
    nameless = [name for name in chosen if name.startswith("Unnamed: ")] if not features else []
    if nameless:
        raise DataError(
            f"data: {path}: expected a name for every column, got {nameless[0]!r}, such as the row numbers that pandas "
            "writes: write the file with index=False, or name the columns to predict from with --data.features"
        )
    x = np.stack([_numbers(frame[name], name, path) for name in chosen], axis=1) if chosen else np.empty((0, 0))
    if not x.size:
        raise DataError(f"data: {path}: expected rows, and columns to predict from, got {len(frame)} and {chosen}")
    if task_column is None:
        ids = np.empty(0, str)
    elif frame[task_column].isna().any():
        raise DataError(
            f"data.task_column: {path}: expected a task in every row, got none in some of {task_column!r}{NA_WORDS}"
        )
    else:
        column = frame[task_column]
        if path.suffix.lower() == ".csv" and column.dtype.kind in "fiub":
            text = _text(pandas, path, in_file.index(task_column))
            if text.nunique() > column.nunique():  # 007 and 7 are one number, and two tasks
                column = text
        ids = column.to_numpy() if pandas.api.types.is_integer_dtype(column) else column.astype(str).to_numpy(str)
    if may_lack_targets:
        frame = frame.assign(**dict.fromkeys([name for name in target if name not in names], np.nan))
    y, known = _targets(frame, list(target), path, classes, may_lack_targets)
    if known and path.suffix.lower() == ".csv" and target[0] in names and frame[target[0]].dtype.kind in "fiu":
        _check_spelling(_text(pandas, path, in_file.index(target[0])), target[0], path)
    return Table(x, y, ids, tuple(chosen), known)


def output_of(value: Any, classes: Sequence[str], what: str) -> int:
    """The output that stands for a class as a table's file, pandas or numpy has it: names, or numbers.

    Raises ConfigError for one that is not among the table's classes.
    """
    whole = isinstance(value, float) and whole_numbers(value)  # as pandas has integers, once some were missing
    name = str(int(value)) if whole else str(value)
    if name not in classes:
        raise ConfigError(f"{what}: expected one of the classes {list(classes)}, got {name!r}")
    return classes.index(name)


NA_WORDS = " (words such as NA and None in a .csv are missing values; in a .parquet they are words)"


def _frame(pandas: Any, path: Path, rows: int | None = None) -> Any:
    """A file as pandas has it. rows: at most so many, where the format allows. Raises as read_table."""
    csv, written = path.suffix.lower() == ".csv", None
    try:
        if csv:
            written = pandas.read_csv(path, header=None, nrows=1, dtype=str).iloc[0].dropna()
        frame = pandas.read_csv(path, nrows=rows) if csv else pandas.read_parquet(path)
    except FileNotFoundError as error:
        raise DataError(f"data: {path}: no such file") from error
    except ImportError as error:
        raise ConfigError(f"data: {path}: {one_line(error)}; pip install 'metalr[tables]'") from error
    except (OSError, ValueError) as error:  # of pandas: ParserError, EmptyDataError, and pyarrow's, are ValueErrors
        raise DataError(f"data: {path}: not a table: {one_line(error)}") from error
    if written is not None and written.duplicated().any():  # pandas calls the second one by another name
        name = written[written.duplicated()].iloc[0]
        raise DataError(f"data: {path}: expected names of columns that differ, got {name!r} twice")
    return frame


def _text(pandas: Any, path: Path, column: int) -> Any:
    """A column of a .csv, by its place, as it is written."""
    return pandas.read_csv(path, usecols=[column], dtype=str).iloc[:, 0].str.strip()


def _check_spelling(text: Any, name: str, path: Path) -> None:
    """Raises DataError for classes that are one number written in two ways, as 1 and 01."""
    numbers: dict[float, str] = {}
    for written in sorted(set(text.dropna())):
        other = numbers.setdefault(float(written), written)
        if other != written:
            raise DataError(
                f"data.target: {path}: expected one spelling of each class in {name!r}, got {other!r} and {written!r}"
            )


def table_columns(path: Path | str) -> list[str]:
    """The names of a table's columns. Raises ConfigError and DataError as read_table."""
    return [str(name) for name in _frame(import_pandas(), Path(path), rows=0).columns]


def _numbers(column: Any, name: str, path: Path, *, may_lack: bool = False, target: bool = False) -> np.ndarray:
    """[rows] float32. target: it is to be predicted; may_lack: values may be missing."""
    if column.dtype.kind not in "fiub":
        what_to_do = (
            "for classes leave --objective out, or take binary_cross_entropy for two of them"
            if target
            else "name the columns to predict from with --data.features, or turn categories into columns of 0 and 1"
        )
        raise DataError(
            f"data: {path}: column {name!r}: expected numbers, got {column.dtype} such as {column.iloc[0]!r}; "
            f"{what_to_do}"
        )
    check_digits(column.dropna().to_numpy(np.float64), f"data: {path}: column {name!r}")
    values = column.to_numpy(np.float32)
    bad = np.flatnonzero(np.isinf(values) if may_lack else ~np.isfinite(values))
    if bad.size:
        what = "an infinite one" if np.isinf(values[bad[0]]) else "none"
        raise DataError(f"data: {path}: column {name!r}: expected a number in every row, row {bad[0] + 1} has {what}")
    return values


def _targets(
    frame: Any, target: list[str], path: Path, classes: bool | Sequence[str], may_lack: bool
) -> tuple[np.ndarray, tuple[str, ...]]:
    if classes is False:
        columns = [_numbers(frame[name], name, path, may_lack=may_lack, target=True) for name in target]
        return (columns[0] if len(columns) == 1 else np.stack(columns, axis=1)), ()
    column = frame[target[0]]
    missing = column.isna().to_numpy()
    if missing.any() and not may_lack:
        raise DataError(
            f"data.target: {path}: expected a class in every row, row {np.argmax(missing) + 1} has none{NA_WORDS}"
        )
    present = column.dropna()
    if present.dtype.kind == "f" and whole_numbers(present):
        present = present.astype(np.int64)  # integers beside missing values
    if present.dtype.kind == "f":
        raise DataError(
            f"data.target: {path}: expected classes in {target[0]!r}, got numbers such as {present.iloc[0]:g}; for "
            "numbers: --objective squared_error"
        )
    if present.dtype.kind in "mM":
        raise DataError(f"data.target: {path}: expected classes in {target[0]!r}, got times such as {present.iloc[0]}")
    values = present.astype(str).to_numpy(str).tolist()
    if classes is True:
        shown = set(present.to_numpy().tolist())
        several = sorted({type(value).__name__ for value in shown})
        if len(several) > 1:
            raise DataError(
                f"data.target: {path}: expected classes of one kind in {target[0]!r}, got {' and '.join(several)}"
            )
        found = sorted(shown)
        names = tuple(str(name) for name in found)
    else:
        names = tuple(classes)
    number = {name: i for i, name in enumerate(names)}
    unknown = sorted(set(values) - set(number))
    if unknown:
        raise DataError(f"data.target: {path}: expected one of the classes {list(names)}, got {unknown[0]!r}")
    labels = np.full(len(frame), -1, np.int32)
    labels[~missing] = [number[value] for value in values]
    return labels, names
