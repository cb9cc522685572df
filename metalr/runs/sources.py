"""What config.data names: images or a table; the tasks they make, their samplers, and what results say of them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from metalr import data, models, tasks
from metalr.config import TrainConfig
from metalr.errors import ConfigError
from metalr.inner.objective import objective_of
from metalr.models import Model
from metalr.storage import folders

TABLE = "tasks of a table"


class Source(NamedTuple):
    """Where tasks come from, as plain JSON values that travel with every result.

    Attributes:
      name, source, sha256: of the data, or of a Tasks.
      split_sha256: says whether two results are of the same splits; splits: what each part holds.
      text: the data in a line; tasks: what one task is, in a line.
      relabels: whether a task's labels are in an order that says nothing about the task.
      pixels: whether inputs are images, 0..1.
    """

    name: str
    source: str
    sha256: str
    split_sha256: str
    splits: list[dict[str, Any]]
    text: str
    tasks: str
    relabels: bool = False
    pixels: bool = True

    @property
    def columns(self) -> dict[str, Any]:
        """Names of columns, as far as they are known: features, targets, and of a table what was read."""
        found: dict[str, Any] = {}
        for facts in self.splits:
            found |= {name: facts[name] for name in ("features", "targets", "table") if name in facts}
        table = found.get("table")
        return found if table is None else {"features": table["features"], "targets": table["target"]} | found


def load(config: TrainConfig, folder: Path | None = None, where: str | None = None) -> data.Dataset | tasks.Tasks:
    """What config.data names: images, or the tasks of a table.

    Args:
      folder: a run that was begun with it: then it is known by its content, wherever it stands now.
      where: where it stands now, if that is known.

    Raises MetalrError: it is not there, damaged, or has other content.
    """
    read = _reader(config)
    if folder is None:
        return read(where or config.data)
    if folders.data_of(folder).get("given") == folders.OWN_TASKS:
        raise ConfigError(
            f"{folder}: is of tasks given in Python; go on with metalr.meta_train(..., out={str(folder)!r}, "
            f"resume=True), evaluate with metalr.load({str(folder)!r}, ...).evaluate(tasks)"
        )
    return data.load_recorded(folder, config.data, where, read)


def with_data_of(config: TrainConfig, folder: Path) -> TrainConfig:
    """The settings with the data that a run was begun with, wherever it stands now: known by its content.

    Raises MetalrError if it is not in any of its places.
    """
    return dataclasses.replace(config, data=data.find_recorded(folder, config.data, None, _reader(config))[0])


def _reader(config: TrainConfig) -> Callable[[str], Any]:
    return functools.partial(table_tasks, config) if data.is_table(config.data) else data.load


def table_tasks(config: TrainConfig, path: str) -> tasks.Tasks:
    """The tasks of a table as config.table and config.objective say. Raises MetalrError."""
    columns, targets = config.table, objective_of(config.objective).targets
    numeric = targets == "numbers"
    for name in ("task_column", "target"):
        if not getattr(columns, name):
            raise ConfigError(f"data.{name}: expected the name of a column of {path}, got none")
    table = data.read_table(
        path, target=columns.target, task_column=columns.task_column, features=columns.features, classes=not numeric
    )
    if not numeric and len(table.classes) < 2:
        raise ConfigError(
            f"data.target: expected two classes or more in {columns.target[0]!r}, got {list(table.classes)}"
        )
    if targets == "binary" and len(table.classes) != 2:
        raise ConfigError(f"objective: expected two classes with {config.objective}, got {list(table.classes)}")
    choice = columns.standardise
    if choice == "auto":
        choice = "both" if numeric else "inputs"
    own = tasks.Tasks.from_arrays(
        table.x, table.y, table.task, shot=columns.shot, query=columns.query, standardise=choice, name="table"
    )
    facts = {"target": list(columns.target), "features": list(table.features), "classes": list(table.classes)}
    return dataclasses.replace(own, facts={**own.facts, "table": facts | {"task_column": columns.task_column}})


def model_of_table(config: TrainConfig, given: tasks.Tasks, head_start: str, views: int) -> Model:
    facts = given.facts.get("table")
    if facts is None:
        raise ConfigError("model: expected a network with tasks of your own, got None")
    if config.model.name != "mlp":
        raise ConfigError(f"model.name: expected mlp with a table, got {config.model.name!r}")
    targets = objective_of(config.objective).targets
    outputs = 1 if targets == "binary" else len(facts["classes"]) or len(facts["target"])
    if head_start != "learned" and targets != "classes":
        raise ConfigError(f"inner.head_start: expected learned with {config.objective}, got {head_start!r}")
    head = {"head_start": head_start, "views": views}
    return models.build("mlp", outputs, (len(facts["features"]),), **config.model.settings(), **head)


def of_images(config: TrainConfig, dataset: data.Dataset) -> tuple[Source, tasks.Parts, dict[int, tasks.Parts]]:
    """A family of image tasks, its samplers, and those of tasks.shots: size of a support set -> samplers.

    Raises MetalrError.
    """
    t, splits = config.tasks, tasks.make_splits(dataset, config.tasks.family, turns=config.tasks.turns)

    def of_shot(shot: int) -> tasks.Parts:
        return tasks.make_samplers(splits, t.way, shot, t.query, distort=t.distort, label_noise=t.label_noise)

    sizes = {t.way * shot: of_shot(shot) for shot in t.shots}
    described = f"{t.family} {t.way}-way {t.shot}-shot, {t.query} query images per class"
    if t.shots:
        described += f"; meta-training with {', '.join(map(str, t.shots))} support images per class"
    facts = [part.describe() for part in splits]
    relabels = tasks.FAMILIES[t.family].labels != "fixed"
    described_by = splits.sha256, facts, str(dataset), described, relabels
    return Source(dataset.name, dataset.source, dataset.sha256, *described_by), of_shot(t.shot), sizes


def of_tasks(given: tasks.Tasks, checked: tasks.Checked) -> tuple[Source, tasks.Parts, int, int]:
    """Tasks of a table or of Python: where they come from, their samplers, and the sizes of support and query set."""
    pool, sample = given.sampler("train")
    shapes = jax.eval_shape(sample, pool, jax.random.key(0))
    support, query = (jax.tree.leaves(field)[0].shape[0] for field in (shapes.support_y, shapes.query_y))
    facts = json.loads(json.dumps(dict(given.facts)))
    described = f"{given.name}, {support} support and {query} query examples"
    kind = TABLE if "table" in facts else folders.OWN_TASKS
    text = f"{given.name}: {kind}\n" + "\n".join(f"        {line}" for line in str(checked).splitlines())
    source = Source(given.name, kind, given.sha256, given.sha256, [facts], text, described, pixels=checked.pixels)
    return source, given.parts, support, query
