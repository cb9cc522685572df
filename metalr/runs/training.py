"""From a config to a run folder, and on from where a run was stopped.

A run folder holds config.json, metrics.jsonl (a line an outer step), checkpoints/, artifact/, grid.jsonl (cells of the
grid as they finish) and results.json, and while the run goes on, a lock. Everything that can be refused is refused
before the folder is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import metalr
from metalr import tasks
from metalr.config import ModelConfig, TrainConfig
from metalr.config.files import differences, read_config
from metalr.errors import ConfigError, check_choices
from metalr.evaluation import small_grid
from metalr.inner import hyperparameters
from metalr.inner.objective import OBJECTIVES, Objective
from metalr.learner import Learner, artifact
from metalr.models import Model
from metalr.outer import devices, loop, processes
from metalr.report import runs as listed
from metalr.runs import evaluating, examples, pictures, preemption
from metalr.runs.job import Job
from metalr.runs.loggers import Log, Logger, check_side_by_side, opened
from metalr.runs.meta_training import (
    Asked,
    Trained,
    WarmStart,
    layout_of,
    mesh_of,
    meta_train,
    meta_train_together,
    stopped,
    warm_start,
)
from metalr.runs.progress import ConsoleReporter, Reporter
from metalr.runs.provenance import command, peak_memory, provenance
from metalr.runs.setup import Setup, describe, set_up
from metalr.runs.sources import TABLE, load
from metalr.storage import checkpoints, folders

FILES = {"config.json", "metrics.jsonl", "checkpoints", "artifact", "grid.jsonl", "results.json", *folders.OWN}
JOB = Job(
    "run",
    frozenset(FILES),
    (
        "out",
        "data",
        "overwrite",
        "grid",
        "evaluation.episodes",
        "evaluation.steps",
        "evaluation.shown_tasks",
        "loggers",
        "mesh",
        "outer.checkpoint_every",
    ),
    ("checkpoints",),
)


def run(
    config: TrainConfig,
    *,
    name: str,
    model: Model | None = None,
    reporter: Reporter | None = None,
    given: tasks.Tasks | None = None,
    objective: Objective | None = None,
    loggers: Sequence[Logger] = (),
) -> dict[str, Any]:
    """Meta-train, evaluate on held-out tasks, compare if asked to; leave a run folder; return its results.

    SIGTERM and SIGINT save the run at the next outer step and raise StoppedError; `resume` goes on.

    Args:
      name: names the default folder runs/NAME.
      model: a network of your own (models.from_linen, models.from_nnx), instead of config.model.
      given: tasks of your own, instead of config.data and config.tasks; with a model.
      objective: one of your own, instead of config.objective.
      loggers: your own, beside those of config.loggers.

    Raises:
      MetalrError: a setting cannot work (nothing is written then), training diverged, or the disk refuses.
    """
    begun = config if model is None else dataclasses.replace(config, model=ModelConfig.of(model))

    def make() -> tuple[Setup, WarmStart | None]:
        mesh_of(begun)
        setup = set_up(begun, model, given, objective=objective)
        return setup, warm_start(begun, setup)

    def carry_out(parts: tuple[Setup, WarmStart | None], folder: Path) -> dict[str, Any]:
        return _carry_out(begun, parts[0], folder, name, reporter or ConsoleReporter(), parts[1], loggers)

    return JOB.begin(begun, name, make, carry_out)


def resume(
    folder: Path,
    config: TrainConfig | None = None,
    *,
    model: Model | None = None,
    reporter: Reporter | None = None,
    given: tasks.Tasks | None = None,
    objective: Objective | None = None,
    loggers: Sequence[Logger] = (),
) -> dict[str, Any]:
    """Go on with a stopped or killed run from its newest whole checkpoint; it ends as if it had never stopped.

    Args:
      folder: the run folder.
      config: the run's config, with other values for JOB.may_change if wanted; default: the run's own.
      model: the network of your own that the run was started with, if it was.
      given, objective: the tasks and the objective of your own that it was started with, if it was.

    Raises:
      MetalrError: no run, a finished one, one in use, or a changed setting that the result depends on.
    """
    folders.refuse_if_locked(folder)
    stored = read_config(folder)
    begun = dataclasses.replace(config or stored, out=folder)
    if model is not None:
        begun = dataclasses.replace(begun, model=ModelConfig.of(model))
    JOB.check_changes(folder, stored, begun)
    JOB.refuse_finished(folder)
    if given is not None:
        _check_tasks(folder, given)

    def make() -> tuple[Setup, WarmStart | None]:
        where = begun.data if begun.data != stored.data else None
        mesh_of(begun)
        setup = set_up(begun, model, given or load(stored, folder, where), objective=objective)
        return setup, None if checkpoints.any_in(folder / "checkpoints") else warm_start(begun, setup)

    def carry_out(parts: tuple[Setup, WarmStart | None], folder: Path) -> dict[str, Any]:
        return _carry_out(begun, parts[0], folder, folder.name, reporter or ConsoleReporter(), parts[1], loggers)

    return JOB.go_on(folder, make, carry_out, stored, begun)


def check_same(folder: Path, config: TrainConfig, model: Model, given: tasks.Tasks) -> None:
    """Raises ConfigError unless a run is of these settings and tasks, but for what may change."""
    begun = dataclasses.replace(config, out=folder, model=ModelConfig.of(model))
    JOB.check_changes(folder, read_config(folder), begun)
    _check_tasks(folder, given)


def check_found(folder: Path, config: TrainConfig) -> None:
    """Raises ConfigError if a finished run has not found what these settings ask for."""
    for name, (old, new) in differences(read_config(folder), config).items():
        if name.startswith(("evaluation.", "grid.")):
            raise ConfigError(
                f"{name}: expected {old!r} as in {folder}, which is finished, got {new!r}; to measure more: "
                "learned.evaluate(tasks, episodes, steps), or a run of its own"
            )


def _check_tasks(folder: Path, given: tasks.Tasks) -> None:
    if folders.data_of(folder).get("sha256", given.sha256) != given.sha256:
        raise ConfigError(f"tasks: expected those that {folder} was begun with, got others ({given.name!r}, by facts)")


def _agree(config: TrainConfig, setup: Setup) -> None:
    """Raises ConfigError unless all processes of this run are about to do the same."""
    settings = {k: v for k, v in config.to_json().items() if k not in ("out", "overwrite", "data", "init")}
    processes.check_same_in_all_processes(
        {"settings": json.dumps(settings), "data": setup.source.sha256, "jax": jax.__version__}
        | {"metalr": metalr.__version__}
    )


def _carry_out(
    config: TrainConfig, setup: Setup, folder: Path, name: str, reporter: Reporter, warm: WarmStart | None,
    loggers: Sequence[Logger],
) -> dict[str, Any]:  # fmt: skip
    began = time.perf_counter()
    _remember(config, setup, folder)
    with preemption.watch() as asked:
        _agree(config, setup)
        reporter.line(describe(config, setup))
        here = time.perf_counter()
        named, own_ones = (config.loggers, loggers) if jax.process_index() == 0 else ((), ())
        with opened(named, own_ones, folder, listed.flat(config.to_json()), reporter.line) as log:
            trained = meta_train(
                config, setup, folder, reporter, lambda: processes.in_any_process(asked()), name=name, warm=warm,
                log=log,
            )  # fmt: skip
            here = time.perf_counter() - here
            spent = trained.facts["seconds"] + trained.facts["compile_seconds"]
            before = max(0.0, spent - here)  # in earlier processes of this run
            results = _judged(config, setup, folder, trained, reporter, log, asked)
    return _written(folder, results, before + time.perf_counter() - began)


def run_together(
    configs: Sequence[TrainConfig], *, name: str, reporter: Reporter | None = None
) -> list[dict[str, Any]]:
    """`run` for several seeds of the same settings, whose outer steps are one program, side by side.

    Each leaves a run folder of its own, as if it had been run alone but for the last digits. What goes on from a
    checkpoint goes on alone. On CPUs this is slower than one seed after the other (docs/runs.md).

    Args:
      configs: that differ in seed and out alone.

    Raises:
      ConfigError: other differences, fewer than 2, or settings whose steps are not the same for all seeds (see
      loop.make_chunk). Otherwise as `run`; all seeds were saved then.
    """
    first, seeds = configs[0], [config.seed for config in configs]
    check_choices("seed", seeds)
    check_side_by_side(first.loggers)
    for config in configs[1:]:
        if other := sorted(differences(first, config).keys() - {"seed", "out"}):
            raise ConfigError(f"{other[0]}: expected the same for all seeds that run together")
    for config in configs:
        folders.check_free(config.out, JOB.files, overwrite=config.overwrite)
    said = reporter or ConsoleReporter()
    parts: list[tuple[Setup, WarmStart | None]] = []

    def make() -> None:
        if not parts:  # the same for all
            mesh_of(first)
            setup = set_up(first)
            loop.check_alike(setup.phases, len(setup.amounts))
            parts.append((setup, warm_start(first, setup)))

    found: list[dict[str, Any]] = []

    def begin(taken: list[Path]) -> dict[str, Any]:
        """Take the folders, one inside the other, then train and judge all."""
        if len(taken) == len(configs):
            found.extend(_carry_out_together(configs, *parts[0], taken, name, said))
            return found[-1]
        return JOB.begin(configs[len(taken)], name, make, lambda _, folder: begin([*taken, folder]))

    begin([])
    return found


def _carry_out_together(
    configs: Sequence[TrainConfig], setup: Setup, warm: WarmStart | None, taken: Sequence[Path], name: str,
    reporter: Reporter,
) -> list[dict[str, Any]]:  # fmt: skip
    began, found = time.perf_counter(), []
    with preemption.watch() as asked, contextlib.ExitStack() as stack:
        reporter.line(describe(configs[0], setup))
        logs = []
        for config, folder in zip(configs, taken, strict=True):
            _remember(config, setup, folder)
            settings = listed.flat(config.to_json())
            logs.append(stack.enter_context(opened(config.loggers, (), folder, settings, reporter.line)))
        each = meta_train_together(configs, setup, taken, reporter, asked, name=name, warm=warm, logs=logs)
        shared = (time.perf_counter() - began) / len(configs)
        for config, folder, trained, log in zip(configs, taken, each, logs, strict=True):
            began = time.perf_counter()
            results = _judged(config, setup, folder, trained, reporter, log, asked)
            found.append(_written(folder, results, shared + time.perf_counter() - began))
    return found


def _remember(config: TrainConfig, setup: Setup, folder: Path) -> None:
    own = setup.source.source == folders.OWN_TASKS
    folders.remember_data(folder, folders.OWN_TASKS if own else config.data, setup.source.sha256)


def _judged(
    config: TrainConfig,
    setup: Setup,
    folder: Path,
    trained: Trained,
    reporter: Reporter,
    log: Log,
    asked: Asked,
) -> dict[str, Any]:
    """What meta-training gave, kept as an artifact and judged on held-out tasks: the results, but for their time."""
    init, rates, training = trained
    if config.mesh.params > 1:  # of the last local mesh, for what follows here
        init, rates = devices.place((init, rates), devices.task_mesh(1, layout=layout_of(config)))
    learner = Learner(
        setup.model, setup.spec, init, rates, learner_facts(config, setup, training), setup.objective,
        setup.standardisation,
    )  # fmt: skip
    if not (folder / "config.json").is_file():
        folders.refuse(folder, FileNotFoundError(errno.ENOENT, "the run folder vanished"))
    artifact.save(folder / "artifact", learner, overwrite=True)
    curve, seconds = evaluating.held_out(
        learner, setup, config.evaluation.episodes, config.curve_steps, config.evaluation.seed,
        layout=layout_of(config),
    )  # fmt: skip
    shown = examples.of_learner(learner, setup, curve, config.evaluation.seed, config.evaluation.shown_tasks)
    if shown is not None:
        folders.write_json(folder / folders.EXAMPLES, shown)
        for task in shown["tasks"]:
            draw = functools.partial(pictures.task, task, shown)
            log.picture(config.outer.steps, f"held-out tasks/{task['which']}", draw)
    results = {
        "name": training["name"],
        "command": command(),
        "config": config.to_json(),
        "provenance": provenance(),
        "data": {"name": setup.source.name, "source": setup.source.source, "sha256": setup.source.sha256},
        "split_sha256": setup.source.split_sha256,
        "splits": setup.source.splits,
        "transductive": setup.model.transductive,
        "training": {key: value for key, value in training.items() if key != "name"},
        **{name: of(setup.spec, rates) for name, of in hyperparameters.SHOWN.items()},
        "objective": setup.objective.name,
        "metric": {"name": setup.objective.choose_by, "maximise": setup.objective.maximise},
        "tasks": setup.source.tasks,
        "held_out_tasks": curve.different_tasks,
        "curve": evaluating.curve_rows(curve, setup.objective.choose_by),
        "evaluation_seconds": round(seconds, 3),
    }
    if config.grid.run:
        known, keep = _kept_cells(config, folder, asked, setup.source.source == folders.OWN_TASKS)
        compared = evaluating.compare(config, setup, learner, curve, reporter, known, keep)
        results["comparison"], results["grid"] = compared
    return results


def _written(folder: Path, results: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The results, with their time and memory, in the folder."""
    results["seconds"] = round(seconds, 2)
    results["peak_memory_bytes"] = peak_memory()
    folders.write_json(folder / "results.json", results)
    results["folder"] = str(folder)
    return results


def _kept_cells(
    config: TrainConfig, folder: Path, asked: Asked, own_tasks: bool
) -> tuple[list[small_grid.Cell], Callable[[list[small_grid.Cell]], None]]:
    """Cells of the grid that an earlier process finished, and what keeps those of this one."""
    file, of = folder / "grid.jsonl", [config.evaluation.seed, config.evaluation.episodes]
    known = []
    for facts in folders.read_rows(file):
        with contextlib.suppress(TypeError, KeyError):
            if facts.pop("tasks_of") == of:
                known.append(small_grid.Cell(**facts | {"tasks": np.array(facts["tasks"])}))

    def keep(cells: list[small_grid.Cell]) -> None:
        folders.append_rows(file, [c._asdict() | {"tasks": c.tasks.tolist(), "tasks_of": of} for c in cells])
        if asked():
            raise stopped(folder, "in the grid", config, own_tasks)

    return known, keep


def learner_facts(config: TrainConfig, setup: Setup, training: dict[str, Any]) -> dict[str, Any]:
    """What an artifact says of its own making."""
    of_images = setup.source.source not in (folders.OWN_TASKS, TABLE)
    shapes = {}
    if setup.objective.name not in OBJECTIVES:  # its loss may broadcast where those of metalr refuse
        pool, sample = setup.parts.train
        targets = jax.eval_shape(sample, pool, jax.random.key(0)).support_y
        shapes = {"target_shapes": [list(leaf.shape[1:]) for leaf in jax.tree.leaves(targets)]}
    return {
        "tasks": dataclasses.asdict(config.tasks) if of_images else {"name": setup.source.tasks},
        **setup.source.columns,
        **shapes,
        **({} if setup.source.pixels or not setup.model.takes_images else {"pixels": False}),
        "data": {"name": setup.source.name, "sha256": setup.source.sha256},
        "split_sha256": setup.source.split_sha256,
        "support": setup.support,
        "algorithm": config.inner.algorithm,
        "learned_rates": setup.learned,
        "seed": config.seed,
        "outer": dataclasses.asdict(config.outer),
        (name := f"validation_{setup.objective.choose_by}"): training[name],
        "validated_steps": training.get("validated_steps", {}),  # older runs that go on have none
        "example_gradients": training["example_gradients"],
    }
