"""Finished trials: the best within a budget, and scikit-learn's names."""

import json
import math

import pytest

from metalr.inner import OBJECTIVES
from metalr.search import trials as trials_lib


def trial(number, validation, cost=10, **more):
    return trials_lib.Trial(number, 0.1, 16, 2, (validation,), (0.5,), {2: validation}, cost, 1.0, **more)


def test_best_within_a_budget():
    trials = [trial(0, 0.2), trial(1, 0.6), trial(2, 0.6), trial(3, 0.9)]
    assert trials_lib.best(trials).number == 3
    assert trials_lib.best(trials, 39).number == 1
    assert trials_lib.best(trials, 5).number == 0  # one run is always made


def test_a_pruned_trial_has_the_epochs_that_it_ran():
    assert trial(0, 0.9, pruned=True)._replace(epochs=30).params["epochs"] == 2


def test_epochs_of_a_grid_are_snapshots():
    one, three = trial(0, 0.1, 100), trial(1, 0.2, 300)._replace(epochs=3)
    assert trials_lib.cost([one, three], grid=True) == (300, 400)
    assert trials_lib.cost([one, three], grid=False) == (400, 400)


def test_of_an_error_the_lowest_is_best_and_a_diverged_run_is_never_the_best():
    error = OBJECTIVES["squared_error"]
    trials = [trial(0, float("nan")), trial(1, 0.6), trial(2, 0.2), trial(3, float("inf"))]
    assert trials_lib.best(trials, objective=error).number == 2
    assert trials_lib.result_of(trials, error).cv_results_["rank_test_score"] == [3, 2, 1, 3]
    again = trials_lib.Trial.from_json(json.loads(json.dumps(trials[0].to_json(), allow_nan=False)))
    assert math.isnan(again.score)
    assert math.isnan(again.curve[2])


def test_results_have_scikit_learn_names():
    two = trial(0, 0.2)._replace(validation=(0.2, 0.4), test=(0.1, 0.3))
    found = trials_lib.result_of([trial(1, 0.3)._replace(validation=(0.5, 0.5), test=(0.6, 0.8)), two])
    assert (found.best_index_, found.best_score_) == (1, 0.5)
    assert found.best_params_ == {"learning_rate": 0.1, "batch_size": 16, "epochs": 2}
    assert found.cv_results_["mean_test_score"] == pytest.approx([0.3, 0.5])
    assert found.cv_results_["std_test_score"] == pytest.approx([0.1, 0.0])
    assert found.cv_results_["split1_test_score"] == [0.4, 0.5]
    assert found.cv_results_["rank_test_score"] == [2, 1]
    assert found.cv_results_["final_test_score"] == pytest.approx([0.2, 0.7])
