"""Finished runs of a hyperparameter search: what they cost, which is best, and how scikit-learn would show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from metalr.inner import CROSS_ENTROPY, Objective


class Trial(NamedTuple):
    """One finished run of a search.

    Attributes:
      epochs: those asked for; a pruned run took fewer.
      validation, test: the objective's score for each seed after the last epoch (accuracy, say); NaN if it diverged.
        Only `validation` is chosen by.
      curve: epoch -> mean validation score, where it was looked at.
      example_gradients: cost of this run alone, over all seeds.
      seconds: of this run; for a cell of a grid, its share of the trajectory up to there, other rates beside it.
      attributes: what Optuna keeps about the run.
    """

    number: int
    learning_rate: float
    batch_size: int
    epochs: int
    validation: tuple[float, ...]
    test: tuple[float, ...]
    curve: dict[int, float]
    example_gradients: int
    seconds: float
    pruned: bool = False
    attributes: dict[str, Any] = {}  # noqa: RUF012 (never changed)

    @property
    def score(self) -> float:
        """Mean validation score over seeds."""
        return float(np.mean(self.validation))

    @property
    def params(self) -> dict[str, Any]:
        """The hyperparameters that give this score, as in best_params_; epochs are those that were run."""
        return {"learning_rate": self.learning_rate, "batch_size": self.batch_size, "epochs": max(self.curve)}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, which `from_json` takes; None for a score that is not finite."""
        curve = {epoch: _finite(value) for epoch, value in self.curve.items()}
        scores = {name: [_finite(value) for value in getattr(self, name)] for name in ("validation", "test")}
        return self._asdict() | scores | {"curve": curve}

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Trial:
        """What `to_json` gave. Raises TypeError, KeyError or ValueError for anything else."""
        curve = {int(epoch): _number(value) for epoch, value in facts["curve"].items()}
        same = {name: tuple(_number(value) for value in facts[name]) for name in ("validation", "test")}
        return cls(**facts | same | {"curve": curve})


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def cost(trials: Sequence[Trial], grid: bool) -> tuple[int, int]:
    """(example-gradients as done, each run alone): the epochs of a grid are snapshots of one trajectory."""
    alone = sum(trial.example_gradients for trial in trials)
    if not grid:
        return alone, alone
    longest: dict[tuple[float, int], int] = {}
    for trial in trials:
        key = trial.learning_rate, trial.batch_size
        longest[key] = max(longest.get(key, 0), trial.example_gradients)
    return sum(longest.values()), alone


def in_order(trials: Sequence[Trial]) -> list[Trial]:
    """By number."""
    return sorted(trials, key=lambda trial: trial.number)


def within(trials: Sequence[Trial], budget: float) -> list[Trial]:
    """The trials, in their order, that finished within a budget of example-gradients; the first is always in."""
    ordered = in_order(trials)
    spent = np.cumsum([trial.example_gradients for trial in ordered])
    return [trial for i, trial in enumerate(ordered) if i == 0 or spent[i] <= budget]


def seconds(trials: Sequence[Trial], grid: bool) -> float:
    """How long they took together. grid: those of one trajectory are snapshots of it, and the last one has its time."""
    return sum({(t.learning_rate, t.batch_size) if grid else t.number: t.seconds for t in in_order(trials)}.values())


def best(trials: Sequence[Trial], budget: float = np.inf, objective: Objective = CROSS_ENTROPY) -> Trial:
    """The trial with the best validation score `within` a budget; of equal ones the earliest wins."""
    return objective.best(within(trials, budget), lambda trial: trial.score)


class SearchResult(NamedTuple):
    """The outcome under scikit-learn's names (GridSearchCV): seeds take the place of its splits.

    Attributes:
      best_params_, best_score_, best_index_: of the trial with the best mean validation score.
      cv_results_: name -> list over trials; "mean_test_score" is scikit-learn's word for the validation score (in the
        metric's own direction: an error is not turned into its negative); "final_test_score" is the score on the test
        part, which nothing was chosen by.
    """

    best_params_: dict[str, Any]
    best_score_: float
    best_index_: int
    cv_results_: dict[str, list[Any]]


def result_of(trials: Sequence[Trial], objective: Objective = CROSS_ENTROPY) -> SearchResult:
    """Trials as scikit-learn would show them."""
    ordered = in_order(trials)
    chosen = best(ordered, objective=objective)
    scores = np.array([trial.score for trial in ordered])
    seeds = range(len(ordered[0].validation))
    with np.errstate(invalid="ignore"):  # of runs that diverged: NaN
        deviations = [float(np.std(trial.validation)) for trial in ordered]
    columns: dict[str, list[Any]] = {
        **{f"param_{name}": [t.params[name] for t in ordered] for name in ordered[0].params},
        "params": [t.params for t in ordered],
        **{f"split{i}_test_score": [t.validation[i] for t in ordered] for i in seeds},
        "mean_test_score": scores.tolist(),
        "std_test_score": deviations,
        "rank_test_score": [1 + sum(objective.better(other, score) for other in scores) for score in scores],
        "final_test_score": [float(np.mean(t.test)) for t in ordered],
        "mean_fit_time": [t.seconds for t in ordered],
        "example_gradients": [t.example_gradients for t in ordered],
        "pruned_after": [max(t.curve) if t.pruned else None for t in ordered],
    }
    return SearchResult(chosen.params, chosen.score, ordered.index(chosen), columns)
