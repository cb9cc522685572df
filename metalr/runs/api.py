"""`metalr.meta_train`: meta-training on tasks of one's own, in one call."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from metalr.config import EvaluationConfig, GridConfig, InnerConfig, OuterConfig, TrainConfig
from metalr.errors import ConfigError
from metalr.inner import Objective, objective_of
from metalr.learner import Learner, load
from metalr.models import Model
from metalr.runs import training
from metalr.runs.progress import Reporter
from metalr.tasks import Tasks


def meta_train(
    tasks: Tasks,
    model: Model,
    *,
    objective: str | Objective = "cross_entropy",
    algorithm: str = "meta_sgd_layer",
    steps: int = 5,
    outer_steps: int = 2000,
    meta_batch: int = 16,
    seed: int = 0,
    out: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    inner: InnerConfig | None = None,
    outer: OuterConfig | None = None,
    evaluation: EvaluationConfig | None = None,
    grid: GridConfig | None = None,
    reporter: Reporter | None = None,
) -> Learner:
    """Meta-train on tasks of your own; what was learned, which also stands in the run folder.

    It does what `metalr train` does: validation on meta-validation tasks (the best init and rates are kept),
    checkpoints, an exact resume, a policy for divergence, progress, an artifact, and results.json with the adaptation
    curve on fixed meta-test tasks.

    Args:
      tasks: samplers of the three splits; `Tasks.check` is called first.
      model: the network: models.from_function, or from_linen and from_nnx for images.
      objective: "cross_entropy", "squared_error", "binary_cross_entropy", or an Objective of your own.
      algorithm: a row of metalr.outer.algorithms.ALGORITHMS; "meta_sgd_layer" learns one rate a layer.
      steps: inner steps; outer_steps: meta-updates; meta_batch: tasks a meta-update.
      out: the run folder; default runs/tasks, numbered if taken.
      resume: go on with the run in `out`, which was stopped or killed; with no run there, begin one.
      overwrite: replace a run in `out`.
      inner, outer, evaluation, grid: all other settings, as the command line has them. What the arguments above say
        is not taken from them.
      reporter: where progress goes; default: the terminal.

    Raises:
      MetalrError: a setting, the tasks or the model cannot work (nothing is written then), training diverged, a signal
        asked to stop, or the disk refuses.
    """
    if not isinstance(tasks, Tasks):
        raise ConfigError(f"tasks: expected a metalr.Tasks, got {type(tasks).__name__}")
    if not isinstance(model, Model):
        raise ConfigError(f"model: expected a metalr.models.Model, such as from_function(init, apply), got {model!r}")
    found, changed = objective_of(objective), {"algorithm": algorithm, "steps": steps}
    given: dict[str, Any] = {"steps": outer_steps, "meta_batch": meta_batch}
    config = TrainConfig(
        data=tasks.name,
        objective=found.name,
        inner=dataclasses.replace(inner or InnerConfig(), **changed),  # type: ignore[arg-type]
        outer=dataclasses.replace(outer or OuterConfig(), **given),
        evaluation=evaluation or EvaluationConfig(),
        grid=grid or GridConfig(),
        seed=seed,
        out=None if out is None else Path(out),
        overwrite=overwrite,
    )
    begun = config.out is not None and (config.out / "config.json").is_file()
    if resume and begun:
        assert config.out is not None
        finished = (config.out / "results.json").is_file()
        if finished:
            return load(config.out, model, found)
        results = training.resume(config.out, config, model=model, reporter=reporter, given=tasks, objective=found)
    else:
        results = training.run(
            config, name=tasks.name.replace(" ", "_").replace("/", "_"), model=model, reporter=reporter, given=tasks,
            objective=found,
        )  # fmt: skip
    return load(results["folder"], model, found)
