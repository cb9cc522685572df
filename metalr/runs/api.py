"""`metalr.meta_train`: meta-training on tasks of one's own, in one call."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from metalr.config import EvaluationConfig, GridConfig, InnerConfig, OuterConfig, TrainConfig
from metalr.errors import ConfigError
from metalr.inner import Objective, objective_of
from metalr.learner import Learner, load
from metalr.models import Model
from metalr.report import page
from metalr.runs import training
from metalr.runs.loggers import Logger
from metalr.runs.progress import Reporter
from metalr.runs.studies import over_seeds
from metalr.storage import folders
from metalr.tasks import Tasks

Settings = TypeVar("Settings", InnerConfig, OuterConfig)


@overload
def meta_train(tasks: Tasks, model: Model, *, seed: int = 0, **settings: Any) -> Learner: ...


@overload
def meta_train(tasks: Tasks, model: Model, *, seed: Sequence[int], **settings: Any) -> list[Learner]: ...


def meta_train(  # type: ignore[misc]  # the overloads say what `seed` makes of the result, not all settings
    tasks: Tasks,
    model: Model,
    *,
    objective: str | Objective = "cross_entropy",
    algorithm: str | None = None,
    steps: int | None = None,
    outer_steps: int | None = None,
    meta_batch: int | None = None,
    seed: int | Sequence[int] = 0,
    out: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    inner: InnerConfig | None = None,
    outer: OuterConfig | None = None,
    evaluation: EvaluationConfig | None = None,
    grid: GridConfig | None = None,
    reporter: Reporter | None = None,
    loggers: Sequence[str | Logger] = (),
) -> Learner | list[Learner]:
    """Meta-train on tasks of your own; what was learned, which also stands in the run folder.

    It does what `metalr train` does: validation on meta-validation tasks (the best init and rates are kept),
    checkpoints, an exact resume, a policy for divergence, progress, an artifact, and results.json with the adaptation
    curve on fixed meta-test tasks.

    Args:
      tasks: samplers of the three splits; `Tasks.check` is called first.
      model: the network: models.mlp for rows of numbers, or your own by models.from_function, from_linen or from_nnx.
      objective: a name in metalr.inner.OBJECTIVES, such as "squared_error", or an Objective of your own.
      algorithm: a row of metalr.outer.algorithms.ALGORITHMS; default: "meta_sgd_layer", one rate per layer.
      steps: inner steps that are trained; default: 5.
      outer_steps: meta-updates; default: 2000.
      meta_batch: tasks of one meta-update; default: 16.
      seed: of meta-training; several seeds are trained one after another, in out/seed0, out/seed1 and so on, and their
        mean curve, with an interval over seeds and tasks together, stands in out/seeds.json.
      out: the run folder; default runs/NAME of the tasks, numbered if taken (of several seeds: not numbered).
      resume: go on with the run in `out`, which was stopped or killed; with no run there, begin one. Needs `out`.
      overwrite: replace a run in `out`.
      inner, outer, evaluation, grid: all other settings, as the command line has them. What the arguments above also
        say may be said in one of the two places.
      reporter: where progress goes; default: the terminal.
      loggers: where numbers go while it runs, beside metrics.jsonl: "tensorboard", "wandb", "mlflow", "trackio", or
        objects of your own with log(step, values) and close() (of one seed).

    Returns:
      A Learner; of several seeds a list of them. Each run folder has a report.html.

    Raises:
      MetalrError: a setting, the tasks or the model cannot work (nothing is written then), training diverged, a signal
        asked to stop, or the disk refuses.
    """
    if not isinstance(tasks, Tasks):
        raise ConfigError(f"tasks: expected a metalr.Tasks, got {type(tasks).__name__}")
    if not isinstance(model, Model):
        raise ConfigError(f"model: expected a metalr.models.Model, such as from_function(init, apply), got {model!r}")
    if resume and (out is None or overwrite):
        raise ConfigError(
            f"resume: expected the run folder as out, and overwrite False, got out={out!r} and overwrite={overwrite}"
        )
    for name, value, kind in (
        ("inner", inner, InnerConfig), ("outer", outer, OuterConfig), ("evaluation", evaluation, EvaluationConfig),
        ("grid", grid, GridConfig),
    ):  # fmt: skip
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{name}: expected a metalr.config.{kind.__name__}, got {value!r:.80}")
    if out is not None and not isinstance(out, (str, Path)):
        raise ConfigError(f"out: expected the path of a folder, got {out!r:.80}")
    if not isinstance(seed, (int, np.integer)):
        if not isinstance(seed, (Sequence, np.ndarray)) or isinstance(seed, str):
            raise ConfigError(f"seed: expected an integer, or several, got {seed!r}")
        seed = tuple(seed)
        if any(not isinstance(one, (int, np.integer)) for one in seed):
            raise ConfigError(f"seed: expected an integer, or several, got {seed}")
        if any(not isinstance(one, str) for one in loggers):
            raise ConfigError(
                "loggers: expected names with several seeds, got objects, which could not tell them apart"
            )

        def of_seed(one: int, folder: Path) -> Learner:
            return meta_train(
                tasks, model, objective=objective, algorithm=algorithm, steps=steps, outer_steps=outer_steps,
                meta_batch=meta_batch, seed=one, out=folder, resume=resume, overwrite=overwrite, inner=inner,
                outer=outer, evaluation=evaluation, grid=grid, reporter=reporter,
                loggers=loggers,
            )  # fmt: skip

        parent = Path("runs") / _named(tasks) if out is None else Path(out)
        return _of_seeds(of_seed, [int(one) for one in seed], parent, may_exist=resume or overwrite)
    found = objective_of(objective)
    config = TrainConfig(
        data=tasks.name,
        objective=found.name,
        inner=_with(inner or InnerConfig(), {"algorithm": ("algorithm", algorithm), "steps": ("steps", steps)}),
        outer=_with(
            outer or OuterConfig(), {"steps": ("outer_steps", outer_steps), "meta_batch": ("meta_batch", meta_batch)}
        ),
        evaluation=evaluation or EvaluationConfig(),
        grid=grid or GridConfig(),
        seed=int(seed),
        out=None if out is None else Path(out),
        overwrite=overwrite,
        loggers=tuple(one for one in loggers if isinstance(one, str)),  # type: ignore[misc]  # checked with the rest
    )
    own = [one for one in loggers if not isinstance(one, str)]
    begun = config.out is not None and (config.out / "config.json").is_file()
    if resume and begun:
        assert config.out is not None
        if (config.out / "results.json").is_file():
            training.check_same(config.out, config, model, tasks)
            training.check_found(config.out, config)
            return load(config.out, model, found)
        results = training.resume(
            config.out, config, model=model, reporter=reporter, given=tasks, objective=found, loggers=own,
        )  # fmt: skip
    else:
        results = training.run(
            config, name=_named(tasks), model=model, reporter=reporter, given=tasks, objective=found, loggers=own,
        )  # fmt: skip
    folder = Path(results["folder"])
    page.write(folder / folders.REPORT, [folder])
    return load(folder, model, found)


def _with(settings: Settings, given: dict[str, tuple[str, Any]]) -> Settings:
    """Settings with what was given as arguments of `meta_train`.

    Args:
      given: field -> (name of the argument, its value or None).

    Raises ConfigError where an argument and a field were both given, and differ.
    """
    changed: dict[str, Any] = {}
    for field, (name, value) in given.items():
        if value is None:
            continue
        own, default = getattr(settings, field), getattr(type(settings)(), field)
        if own not in (default, value):
            raise ConfigError(
                f"{name}: expected it in one place, got {value!r}, and {own!r} in {type(settings).__name__}.{field}"
            )
        changed[field] = value
    return dataclasses.replace(settings, **changed)


def _named(tasks: Tasks) -> str:
    return tasks.name.replace(" ", "_").replace("/", "_")


def _of_seeds(
    of_seed: Callable[[int, Path], Learner], seeds: Sequence[int], out: Path, *, may_exist: bool
) -> list[Learner]:
    """Train each seed in a folder of its own, and write out/seeds.json."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seed: expected one number, or several that differ, got {seeds}")
    runs = [out / f"seed{seed}" for seed in seeds]
    for folder in runs:
        folders.check_free(folder, training.FILES, overwrite=may_exist)
    learners = [of_seed(seed, folder) for seed, folder in zip(seeds, runs, strict=True)]
    results = [json.loads((folder / "results.json").read_text()) for folder in runs]
    metric = results[0]["metric"]
    curve = over_seeds([each["curve"] for each in results], metric["name"])
    kept = {name: results[0][name] for name in ("command", "provenance", "split_sha256", "objective")}
    folders.write_json(out / "seeds.json", {"seeds": list(seeds), "metric": metric, **kept, "curve": curve})
    return learners
