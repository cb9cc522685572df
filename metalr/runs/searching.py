"""A hyperparameter search in a folder of its own, which can be stopped and gone on with.

The folder holds config.json, trials.jsonl (a line a finished trial), cv_results.csv, results.json, and a lock while the
search goes on.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metalr import data, models, tasks
from metalr.config import ModelConfig, SearchConfig, SpaceConfig
from metalr.config.files import read_config
from metalr.errors import ConfigError
from metalr.evaluation import protocol
from metalr.inner import optimizers
from metalr.runs.job import Job, stoppable
from metalr.runs.progress import ConsoleReporter, Reporter
from metalr.runs.provenance import command, provenance
from metalr.runs.setup import check_choices_of, model_of
from metalr.search import fit, searchers
from metalr.search import trials as trials_lib
from metalr.storage import folders
from metalr.types import Episode

FILES = {"config.json", "trials.jsonl", "cv_results.csv", "results.json", *folders.OWN}
JOB = Job("search", frozenset(FILES), ("out", "overwrite", "data", "trials"))


def run(config: SearchConfig, *, model: models.Model | None = None, reporter: Reporter | None = None) -> dict[str, Any]:
    """Search, and leave a folder; the results.

    Args:
      model: a network of your own, instead of config.model.

    Raises:
      MetalrError: a setting cannot work (nothing is written then), a signal asked to stop, or the disk refuses.
    """
    begun = config if model is None else dataclasses.replace(config, model=ModelConfig.of(model))

    def carry_out(parts: SearchParts, folder: Path) -> dict[str, Any]:
        return _carry_out(begun, *parts, folder, reporter or ConsoleReporter())

    return JOB.begin(begun, f"search-{begun.searcher}", lambda: set_up(begun, model), carry_out)


def resume(
    folder: Path,
    config: SearchConfig | None = None,
    *,
    model: models.Model | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Go on with a search that was stopped or killed: the trials that finished are kept, and it ends as it would have.

    Args:
      config: the search's own, with more `trials` if wanted (every trial draws from the seed and its number alone, so a
        longer search is the one that was longer from the start; a finished one can go on so too), or with `data` that
        names another place of the same arrays.

    Raises:
      MetalrError: no search, a finished one, one in use, fewer trials than are done, or another changed setting.
    """
    folders.refuse_if_locked(folder)
    stored = read_config(folder, SearchConfig)
    given = config or stored
    if model is not None:
        given = dataclasses.replace(given, model=ModelConfig.of(model))
    JOB.check_changes(folder, stored, given)
    done = len(folders.read_rows(folder / "trials.jsonl"))
    if given.trials is not None and given.trials < done:
        raise ConfigError(f"trials: expected at least the {done} that are done in {folder}, got {given.trials}")
    longer = given.trials is not None and given.trials > done
    if not longer:
        JOB.refuse_finished(folder, "for more, --trials N")
    where = given.data if given.data != stored.data else None

    def make() -> SearchParts:
        return set_up(given, model, data.load_recorded(folder, stored.data, where))

    def carry_out(parts: SearchParts, folder: Path) -> dict[str, Any]:
        return _carry_out(given, *parts, folder, reporter or ConsoleReporter())

    return JOB.go_on(folder, make, carry_out, stored, given)


SearchParts = tuple[searchers.Problem, SpaceConfig, str]


def set_up(config: SearchConfig, model: models.Model | None = None, dataset: data.Dataset | None = None) -> SearchParts:
    """Check a config and make its parts, with the sha256 of its data. Raises MetalrError naming the setting."""
    check_choices_of(config, model)
    space = config.space
    space.check()
    if config.trials is not None and config.searcher == "grid":
        raise ConfigError(f"trials: expected None with grid, which takes all {space.cells} cells, got {config.trials}")
    if config.trials is not None and config.trials < 1:
        raise ConfigError(f"trials: expected at least 1, got {config.trials}")
    if config.seeds < 1 or not 0 <= config.seed < 2**32:
        raise ConfigError(f"seeds, seed: expected at least 1 and 0 <= seed < 2^32, got {config.seeds}, {config.seed}")
    if config.searcher != "grid":
        searchers.import_optuna()
    optimizers.by_name(config.optimizer)
    if dataset is None and data.is_table(config.data):
        raise ConfigError(f"data: expected images: a search takes no tables, got {config.data}")
    dataset = data.load(config.data) if dataset is None else dataset
    way = dataset.classes if config.task is None else config.tasks.way
    model = model_of(config.model, way, dataset, model)
    arrays = fit.hold_out(_episode(config, dataset), config.validation, config.seed, by_class=True)
    searchers.check_fits(space, len(arrays.train_y))
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    init = jax.jit(jax.vmap(model.init))(keys)
    arrays, init = fit.without_blank_pixels(model, config.optimizer, arrays, init)
    return (
        searchers.Problem(
            jax.tree.map(jax.numpy.asarray, arrays), init, keys, fit.make_programs(model, config.optimizer)
        ),
        space,
        dataset.sha256,
    )


def _episode(config: SearchConfig, dataset: data.Dataset) -> Episode:
    """The whole dataset as one task, or the meta-test task that is asked for."""
    if config.task is None:
        if not len(dataset.test_labels):
            raise ConfigError(f"data: expected a test part in {dataset.name}, got none; or pass --task")
        train_y, test_y = (np.asarray(v, np.int32) for v in (dataset.train_labels, dataset.test_labels))
        whole: Any = dataset.train_images, train_y, dataset.test_images, test_y
        return Episode(*whole)
    if config.task < 0:
        raise ConfigError(f"task: expected 0 or more, got {config.task}")
    split = tasks.make_splits(dataset, config.tasks.family, turns=config.tasks.turns).test
    pool, sample = tasks.make_sampler(
        split, config.tasks.way, config.tasks.shot, config.tasks.query, label_noise=config.tasks.label_noise
    )
    return jax.jit(sample)(pool, protocol.episode_keys(0, max(config.task + 1, 2))[config.task])


def _carry_out(
    config: SearchConfig,
    problem: searchers.Problem,
    space: SpaceConfig,
    sha256: str,
    folder: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    began, file = time.perf_counter(), folder / "trials.jsonl"
    folders.remember_data(folder, config.data, sha256)
    try:
        known = [trials_lib.Trial.from_json(row) for row in folders.read_rows(file)]
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{file}: not the trials of a search: {error}") from error
    total = space.cells if config.trials is None or config.searcher == "grid" else config.trials
    stop = f"stopped; finished trials are kept; go on with: metalr search --resume {folder}"
    best = None if not known else trials_lib.best(known, objective=problem.objective)
    with stoppable(stop) as between, reporter.bar(f"{config.searcher} search", total, len(known)) as advance:

        def finished(trial: trials_lib.Trial) -> None:
            nonlocal best
            folders.append_rows(file, [trial.to_json()])
            best = trial if best is None else problem.objective.best([best, trial], lambda one: one.score)
            advance(1, f"best validation {best.score:.4f}")

        trials = searchers.search(
            config.searcher, space, problem, trials=total, seed=config.seed, known=known, finished=finished,
            between=between,
        )  # fmt: skip
    found = trials_lib.result_of(trials)
    chosen, cost = trials[found.best_index_], trials_lib.cost(trials, config.searcher == "grid")
    folders.write_file(folder / "cv_results.csv", to_csv(found.cv_results_).encode())
    results = {
        "searcher": config.searcher,
        "command": command(),
        "config": config.to_json(),
        "provenance": provenance(),
        "best_params_": found.best_params_,
        "best_score_": _finite(found.best_score_),
        "best_index_": found.best_index_,
        "final_test_score": _finite(float(np.mean(chosen.test))),
        "trials": len(trials),
        **dict(zip(("example_gradients", "naive_example_gradients"), cost, strict=True)),
        "seconds": round(time.perf_counter() - began + trials_lib.seconds(known, config.searcher == "grid"), 2),
        "cv_results_": str(folder / "cv_results.csv"),
    }
    folders.write_json(folder / "results.json", results)
    return results | {"folder": str(folder)}


def _finite(value: float) -> float | None:
    """For JSON, which has no NaN: a search of which every trial diverged has found nothing."""
    return value if np.isfinite(value) else None


def to_csv(columns: dict[str, list[Any]]) -> str:
    """cv_results_ as CSV: a column for each name, a line for each trial."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()
