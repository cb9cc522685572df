"""Grid, random, TPE and ASHA search over fine-tunes of one task, on one interface, with one account of their cost.

A searcher is a row of choices. The grid trains all learning rates of a batch size side by side and takes epochs as
snapshots; the others are Optuna's (the extra `search`), asked for one set of hyperparameters after another.
"""

from __future__ import annotations

import itertools
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from metalr.errors import ConfigError
from metalr.inner import CROSS_ENTROPY, Objective
from metalr.outer.devices import local_devices, spread
from metalr.search import fit
from metalr.search.trials import Trial, in_order
from metalr.spaces import SpaceConfig
from metalr.trees import count
from metalr.types import Params


class Searcher(NamedTuple):
    """One row of choices. sampler: an Optuna sampler's name, or None for all cells; halving: stop bad runs early."""

    sampler: str | None
    halving: bool
    source: str


SEARCHERS = {
    "grid": Searcher(None, False, "all cells"),
    "random": Searcher("RandomSampler", False, "Bergstra & Bengio 2012"),
    "tpe": Searcher("TPESampler", False, "Bergstra et al. 2011"),
    "asha": Searcher("RandomSampler", True, "Li et al. 2020, algorithm 2; stops runs, never takes one up again"),
}


class Problem(NamedTuple):
    """One task to search hyperparameters for.

    Attributes:
      arrays: the data.
      init: where every run starts; leaves with a leading axis [seeds].
      keys: [seeds]; minibatch orders and dropout come from them.
      program: batch size -> compiled program; fit.make_programs makes it, and all problems of a model share it.
      objective: the one that the programs were made for.
    """

    arrays: fit.Arrays
    init: Params
    keys: jax.Array
    program: Callable[[int], fit.Program]
    objective: Objective = CROSS_ENTROPY


Report = Callable[[Trial], None]  # called with each finished trial


def search(
    searcher: str,
    space: SpaceConfig,
    problem: Problem,
    *,
    trials: int | None = None,
    budget: float = np.inf,
    seed: int = 0,
    first: Sequence[dict[str, Any]] = (),
    known: Sequence[Trial] = (),
    finished: Report = lambda trial: None,
    between: Callable[[], None] = lambda: None,
    devices: Sequence[jax.Device] | None = None,
) -> list[Trial]:
    """Run a searcher; its trials by number.

    Args:
      searcher: a key of SEARCHERS.
      trials: how many; default: as many as the grid has cells, or without end if there is a budget.
      budget: example-gradients after which no further trial begins. The grid always runs all its cells.
      seed: of Optuna's samplers; every trial draws from (seed, number), so a search that goes on from `known` is the
        one that was never stopped.
      first: hyperparameters to try first (Optuna's enqueue_trial): {"learning_rate", "batch_size", "epochs"} or some.
      known: finished trials of an earlier call, which are not run again.
      finished: called as soon as a trial is there, one at a time; what it raises ends the search.
      between: called before every epoch, by several threads; what it raises ends the search.
      devices: where the grid's batch sizes run side by side; default: all of this process's. The other searchers run
        where the problem's arrays are.

    Raises:
      ConfigError: no such searcher, a batch larger than the training part, or no Optuna.
    """
    if searcher not in SEARCHERS:
        raise ConfigError(f"searcher: expected one of {tuple(SEARCHERS)}, got {searcher!r}")
    space.check()
    check_fits(space, count(problem.arrays.train_y))
    row = SEARCHERS[searcher]
    if row.sampler is None:
        return _grid(space, problem, known, finished, between, devices or local_devices())
    number = trials if trials is not None else space.cells if budget == np.inf else None
    return _sampled(row, space, problem, number, budget, seed, first, known, finished, between)


def check_fits(space: SpaceConfig, train: int) -> None:
    """Raises ConfigError for a batch that is larger than a training part of `train` examples."""
    if max(space.batch_sizes) > train:
        raise ConfigError(
            f"space.batch_sizes: expected at most {train} (the training part), got {max(space.batch_sizes)}"
        )


def _place(problem: Problem, device: jax.Device) -> Problem:
    arrays, init, keys = jax.device_put((problem.arrays, problem.init, problem.keys), device)
    return problem._replace(arrays=arrays, init=init, keys=keys)


def _cost(problem: Problem, batch_size: int, epochs: int) -> int:
    return epochs * (count(problem.arrays.train_y) // batch_size) * batch_size * len(problem.keys)


def _grid(
    space: SpaceConfig,
    problem: Problem,
    known: Sequence[Trial],
    finished: Report,
    between: Callable[[], None],
    devices: Sequence[jax.Device],
) -> list[Trial]:
    """All cells: a trajectory for each batch size, on as many devices as there are."""
    cells = list(itertools.product(space.batch_sizes, space.learning_rates, space.epochs))
    number = {cell: i for i, cell in enumerate(cells)}
    found = {(t.batch_size, t.learning_rate, t.epochs): t for t in known}
    one_at_a_time = threading.Lock()

    def run(batch_size: int, device: jax.Device, go_on: Callable[[], None]) -> None:
        rates = [r for r in space.learning_rates if not all((batch_size, r, e) in found for e in space.epochs)]
        if rates:
            trajectory(_place(problem, device), batch_size, rates, go_on)

    def trajectory(here: Problem, batch_size: int, rates: list[float], go_on: Callable[[], None]) -> None:
        curves: dict[float, dict[int, float]] = {rate: {} for rate in rates}
        began = time.perf_counter()
        for point in fit.trajectory(
            here.program(batch_size), here.arrays, here.init, rates, here.keys, space.epochs, go_on
        ):
            seconds = round((time.perf_counter() - began) / len(rates), 4)
            for rate, validation, test in zip(rates, point.validation, point.test, strict=True):
                scores = _floats(validation)
                curves[rate][point.epoch] = float(np.mean(scores))
                key = (batch_size, rate, point.epoch)
                if key in found:
                    continue
                cost = _cost(here, batch_size, point.epoch)
                trial = Trial(
                    number[key], rate, batch_size, point.epoch, scores, _floats(test), dict(curves[rate]), cost, seconds
                )
                with one_at_a_time:
                    found[key] = trial
                    finished(trial)

    spread(run, sorted(space.batch_sizes), devices, between)  # smallest batches first: they take longest
    return [found[cell] for cell in cells]


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def import_optuna() -> types.ModuleType:
    """Optuna. Raises ConfigError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "searcher: expected Optuna for any but the grid; pip install 'metalr[search]', or ask for the grid alone "
            "(metalr search grid, metalr compare --searchers grid)"
        ) from error
    return optuna


def _sampled(
    row: Searcher,
    space: SpaceConfig,
    problem: Problem,
    trials: int | None,
    budget: float,
    seed: int,
    first: Sequence[dict[str, Any]],
    known: Sequence[Trial],
    finished: Report,
    between: Callable[[], None],
) -> list[Trial]:
    optuna = import_optuna()
    study = to_optuna(known, space, row, problem.objective)
    done = in_order(known)
    low, high = min(space.learning_rates), max(space.learning_rates)
    while (trials is None or len(done) < trials) and sum(trial.example_gradients for trial in done) < budget:
        number = len(done)
        # A sampler of its own for every trial: what it draws depends on the seed, the number and the study alone.
        study.sampler = getattr(optuna.samplers, row.sampler or "")(seed=trial_seed(seed, number))
        if number < len(first):
            study.enqueue_trial(first[number])
        asked = study.ask()
        rate = asked.suggest_float("learning_rate", low, high, log=True)
        batch_size = asked.suggest_categorical("batch_size", list(space.batch_sizes))
        epochs = max(space.epochs) if row.halving else asked.suggest_categorical("epochs", list(space.epochs))
        looks = range(1, epochs + 1) if row.halving else [epochs]
        began, curve, pruned = time.perf_counter(), {}, False
        points = fit.trajectory(
            problem.program(batch_size), problem.arrays, problem.init, [rate], problem.keys, list(looks), between
        )
        for point in points:
            scores = _floats(point.validation[0])
            curve[point.epoch] = float(np.mean(scores))
            if row.halving:
                finite = bool(np.isfinite(curve[point.epoch]))
                if finite:
                    asked.report(curve[point.epoch], point.epoch)
                if point.epoch < epochs and (not finite or asked.should_prune()):
                    pruned = True
                    break
        if pruned or not np.isfinite(curve[point.epoch]):
            study.tell(asked, state=optuna.trial.TrialState.PRUNED if pruned else optuna.trial.TrialState.FAIL)
        else:
            study.tell(asked, curve[point.epoch])
        trial = Trial(
            number, rate, batch_size, epochs, scores, _floats(point.test[0]), curve,
            _cost(problem, batch_size, point.epoch), round(time.perf_counter() - began, 4), pruned,
            dict(study.trials[-1].system_attrs),
        )  # fmt: skip
        done.append(trial)
        finished(trial)
    return done


def trial_seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def to_optuna(
    trials: Sequence[Trial], space: SpaceConfig, row: Searcher = SEARCHERS["tpe"], objective: Objective = CROSS_ENTROPY
) -> Any:
    """An Optuna study (in memory) with these trials: for its plots, its importances, or to go on with it.

    Raises ConfigError where Optuna is not installed.
    """
    optuna = import_optuna()
    pruner = optuna.pruners.NopPruner()
    if row.halving:
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # not a line on stderr for every study
    try:
        study = optuna.create_study(direction="maximize" if objective.maximise else "minimize", pruner=pruner)
    finally:
        optuna.logging.set_verbosity(verbosity)
    low, high = min(space.learning_rates), max(space.learning_rates)
    spaces = {
        "learning_rate": optuna.distributions.FloatDistribution(low, high, log=True),
        "batch_size": optuna.distributions.CategoricalDistribution(list(space.batch_sizes)),
    }
    if not row.halving:
        spaces["epochs"] = optuna.distributions.CategoricalDistribution(list(space.epochs))
    states = optuna.trial.TrialState
    for trial in in_order(trials):
        finite = bool(np.isfinite(trial.score))
        study.add_trial(
            optuna.trial.create_trial(
                state=states.PRUNED if trial.pruned else states.COMPLETE if finite else states.FAIL,
                value=trial.score if finite else None,
                params={name: trial.params[name] for name in spaces},
                distributions=spaces,
                intermediate_values={k: v for k, v in trial.curve.items() if np.isfinite(v)} if row.halving else {},
                system_attrs=trial.attributes,
            )
        )
    return study
