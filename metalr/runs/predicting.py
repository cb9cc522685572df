"""`metalr adapt` and `metalr predict`: fine-tune on the task of a file, and predict for the inputs of a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metalr import data, tasks
from metalr.errors import ConfigError, DataError
from metalr.learner.learner import Learner
from metalr.learner.params import ClassNames, read_classes


class TaskFile(NamedTuple):
    """One task out of a file.

    Attributes:
      support_x, support_y: as `Learner.adapt` takes them.
      query_x: what is predicted for; query_y: their names or numbers, if they are known.
      classes: what outputs are called; None where outputs are no classes.
    """

    support_x: np.ndarray
    support_y: np.ndarray
    query_x: np.ndarray
    query_y: np.ndarray | None
    classes: ClassNames | None


def read_task(learner: Learner, path: Path) -> TaskFile:
    """Read an .npz with support_x, support_y, query_x (and query_y), or a table whose rows without a target are asked.

    Raises:
      ConfigError: arrays or columns that are missing. DataError: values that the learner does not take.
    """
    if data.is_table(str(path)):
        return _of_table(learner, path)
    if "table" in learner.facts and path.suffix.lower() != ".npz":
        kinds = ", ".join(data.SUFFIXES)
        raise ConfigError(f"{path}: expected a table ({kinds}) or an .npz, as this learner was trained on a table")
    given = data.read_npz(path)
    missing = [name for name in ("support_x", "support_y", "query_x") if name not in given]
    if missing:
        raise ConfigError(f"{path}: expected arrays support_x, support_y, query_x, missing {missing}")
    support_y, query_y = given["support_y"], given.get("query_y")
    classes = learner.facts.get("table", {}).get("classes")
    if learner.objective.targets == "binary" and classes:
        support_y = _numbered(support_y, classes, f"{path}: support_y")
        query_y = None if query_y is None else _numbered(query_y, classes, f"{path}: query_y")
    if learner.objective.targets != "classes":
        return TaskFile(given["support_x"], support_y, given["query_x"], query_y, None)
    if support_y.ndim != 1:
        raise ConfigError(f"{path}: support_y: expected one task, shape [support], got {support_y.shape}")
    support_y = data.check_labels(support_y, len(support_y), "support_y")
    shown, place = np.unique(support_y, return_inverse=True)
    outputs = _outputs_of(learner, shown, path)
    numbers = np.asarray(outputs, np.int32)[place]
    names = ClassNames(tuple(shown.tolist()), tuple(outputs))
    if query_y is not None:
        query_y = data.check_labels(query_y, len(given["query_x"]), "query_y")
        new = np.setdiff1d(query_y, shown)
        if new.size:
            raise ConfigError(f"{path}: query_y: expected labels of the support set, {shown.tolist()}, got {new[0]}")
    return TaskFile(given["support_x"], numbers, given["query_x"], query_y, names)


def _numbered(labels: np.ndarray, classes: Sequence[str], what: str) -> np.ndarray:
    """Numbers of a table's classes, of the same shape. Raises ConfigError for one that is not among them."""
    return np.array([data.output_of(label, classes, what) for label in labels.ravel()], np.int32).reshape(labels.shape)


def _outputs_of(learner: Learner, labels: np.ndarray, path: Path) -> list[int]:
    """Which output stands for each label. Raises ConfigError for labels that say nothing of it."""
    of_table = learner.facts.get("table", {}).get("classes")
    if of_table:
        return [data.output_of(label, of_table, f"{path}: support_y") for label in labels.tolist()]
    if labels.dtype.kind in "US" and all(label.isdigit() for label in labels.tolist()):
        labels = labels.astype(np.int64)  # names of numbers
    if learner.classifies_images and not (_means_outputs(learner) and np.issubdtype(labels.dtype, np.integer)):
        return list(range(len(labels)))
    if not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(f"{path}: support_y: expected the numbers of the network's outputs, got {labels[0]!r}")
    return [int(label) for label in labels]


def _means_outputs(learner: Learner) -> bool:
    """Whether the outputs meant the same in all training tasks."""
    family = tasks.FAMILIES.get(learner.facts.get("tasks", {}).get("family"))
    return family is not None and family.labels == "fixed"


def _of_table(learner: Learner, path: Path) -> TaskFile:
    table, classes = _read_table(learner, path, targets=True)
    known = table.y >= 0 if table.classes else np.isfinite(table.y.reshape(len(table.y), -1)).all(1)
    if not known.any():
        targets = learner.facts["table"]["target"]
        absent = [name for name in targets if name not in data.table_columns(path)]
        why = f"; it has no column {absent[0]!r}" if absent else ""
        raise DataError(f"{path}: expected rows with a target ({', '.join(targets)}) to fine-tune on, got none{why}")
    names = None
    if learner.objective.targets == "classes":
        shown = np.unique(table.y[known])
        names = ClassNames(tuple(classes[i] for i in shown), tuple(int(i) for i in shown))
    return TaskFile(table.x[known], table.y[known], table.x[~known], None, names)


def _read_table(learner: Learner, path: Path, *, targets: bool) -> tuple[data.Table, Sequence[str]]:
    """The table, and the names of the classes. targets: whether its targets matter."""
    columns = learner.facts.get("table")
    if columns is None:
        raise ConfigError(f"{path}: expected an .npz, because this learner was not trained on a table, got a table")
    classes = columns["classes"]

    def read(task_column: str | None) -> data.Table:
        return data.read_table(
            path, target=columns["target"], task_column=task_column, features=columns["features"],
            classes=classes or False, may_lack_targets=True, ignore_targets=not targets,
        )  # fmt: skip

    of = columns.get("task_column")
    table = read(of if targets and of in data.table_columns(path) else None)
    found = np.unique(table.task)
    if len(found) > 1:
        raise DataError(
            f"{path}: expected the rows of one task, got {len(found)} in the column {of!r}, such as {found[0]} and "
            f"{found[1]}; write each task to a file of its own"
        )
    return table, classes


def adapt(learner: Learner, path: Path, steps: int | None = None, out: Path | None = None) -> dict[str, Any]:
    """Fine-tune on a file's task and predict for its query inputs.

    Args:
      steps: inner steps; default: as many as were trained.
      out: also write the fine-tuned params there, with the names of the classes.

    Returns:
      steps, predictions (names of classes that were in the support set, or outputs), the score where the file knows
      the answers, and params (the file that was written).

    Raises MetalrError: the file does not fit the learner, or cannot be read or written.
    """
    task = read_task(learner, path)
    if not len(task.query_x) and out is None:
        what = "rows without a target" if data.is_table(str(path)) else "inputs in query_x"
        raise DataError(f"{path}: expected {what} to predict for, or --out for the fine-tuned params, got neither")
    fast = learner.adapt(task.support_x, task.support_y, steps=steps)
    result: dict[str, Any] = {"steps": learner.spec.steps if steps is None else steps, "predictions": []}
    if len(task.query_x):
        support = task.support_x if learner.model.uses_support else None
        outputs = _check_finite(np.asarray(learner.apply(fast, task.query_x, support)))
        result["predictions"] = _predictions(learner, outputs, task.classes)
        if task.query_y is not None:
            if task.classes is not None:
                hits = [a == b for a, b in zip(result["predictions"], task.query_y.tolist(), strict=True)]
                result["accuracy"] = float(np.mean(hits))
            else:
                result[learner.objective.choose_by] = _score(learner, outputs, task.query_y)
    if out is not None:
        learner.save_params(out, fast, task.classes)
        result["params"] = str(out)
    return result


def predict(learner: Learner, params: Path, inputs: Path) -> dict[str, Any]:
    """Predict with fine-tuned params for the inputs of a file: x (and support_x) of an .npz, or a table's rows.

    Returns: predictions, as `adapt`.

    Raises MetalrError: a file does not fit the learner, or cannot be read.
    """
    fast, classes = learner.load_params(params), read_classes(params)
    support = None
    if data.is_table(str(inputs)):
        x = _read_table(learner, inputs, targets=False)[0].x
    else:
        given = data.read_npz(inputs)
        if "x" not in given:
            raise ConfigError(f"{inputs}: expected an array x, got {sorted(given)}")
        x, support = given["x"], given.get("support_x")
    outputs = _check_finite(np.asarray(learner.apply(fast, x, support)))
    return {"predictions": _predictions(learner, outputs, classes)}


def _score(learner: Learner, outputs: np.ndarray, targets: np.ndarray) -> float:
    """The objective's score of outputs and targets in your own units: it takes them as the episodes had them."""
    own = learner.standardisation
    if own is not None:
        outputs, targets = own.targets(outputs), own.targets(targets)
    return float(learner.objective.score(outputs, targets))


def _predictions(learner: Learner, outputs: np.ndarray, classes: ClassNames | None) -> list[Any]:
    """Names of classes that were in the support set; what is not about classes as it is."""
    if classes is not None:
        chosen = outputs[:, list(classes.outputs)].argmax(-1)
        return [classes.names[i] for i in chosen]
    if learner.objective.targets == "binary":
        known = learner.facts.get("table", {}).get("classes") or [0, 1]
        outputs = np.array(known, dtype=object)[(outputs > 0).astype(int)]
    return (outputs[:, 0] if outputs.ndim == 2 and outputs.shape[1] == 1 else outputs).tolist()


def _check_finite(outputs: np.ndarray) -> np.ndarray:
    """Raises DataError for outputs that are no finite numbers."""
    bad = ~np.isfinite(outputs).reshape(len(outputs), -1).all(1)
    if bad.any():
        raise DataError(
            f"predictions: expected finite outputs, got others for {bad.sum()} of {len(bad)} examples, number "
            f"{bad.argmax()} first: the fine-tune diverged, or inputs are far from those of meta-training"
        )
    return outputs
