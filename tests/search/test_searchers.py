"""Searchers: cells of a grid are runs of their own; searches that go on are those that were never stopped."""

import jax
import numpy as np
import pytest

from metalr import models
from metalr.config import SpaceConfig
from metalr.errors import ConfigError
from metalr.search import fit, searchers
from metalr.search import trials as trials_lib
from metalr.types import Episode

SPACE = SpaceConfig(learning_rates=(1e-3, 1e-2), epochs=(1, 3), batch_sizes=(16, 64))


@pytest.fixture(scope="module", params=[1, 2], ids=["one seed", "two seeds"])
def problem(blobs, request):
    episode = Episode(blobs.train_images[:200], blobs.train_labels[:200], blobs.test_images, blobs.test_labels)
    model = models.mlp(10, (8, 8, 1), widths=(16,), dropout=0.2)
    keys = jax.random.split(jax.random.key(0), request.param)
    arrays = jax.tree.map(jax.numpy.asarray, fit.hold_out(episode, by_class=True))
    return searchers.Problem(arrays, jax.vmap(model.init)(keys), keys, fit.make_programs(model, "adam"))


def same(a, b):
    assert [t._replace(seconds=0) for t in a] == [t._replace(seconds=0) for t in b]


def test_the_grid_is_its_cells_alone(problem):
    trials = searchers.search("grid", SPACE, problem)
    assert [t.number for t in trials] == list(range(8))
    assert len({(t.learning_rate, t.batch_size, t.epochs) for t in trials}) == 8
    for trial in trials:
        space = SpaceConfig((trial.learning_rate,), (trial.epochs,), (trial.batch_size,))
        alone = searchers.search("grid", space, problem)[0]
        assert alone.validation == pytest.approx(trial.validation, abs=1.5 / 40)  # one prediction may round over
        assert alone.test == pytest.approx(trial.test, abs=1.5 / 300)
        an_epoch = {16: 160, 64: 128}[trial.batch_size]  # an incomplete last batch is left out
        assert alone.example_gradients == trial.example_gradients == trial.epochs * an_epoch * len(problem.keys)
    assert trials_lib.cost(trials, grid=True)[0] == len(problem.keys) * 2 * 3 * (160 + 128)


def test_what_is_known_is_not_run_again(problem):
    whole, seen = searchers.search("grid", SPACE, problem), []
    same(searchers.search("grid", SPACE, problem, known=whole[:5], finished=seen.append), whole)
    assert sorted(t.number for t in seen) == [5, 6, 7]
    seen.clear()
    same(searchers.search("grid", SPACE, problem, known=whole, finished=seen.append), whole)
    assert not seen


@pytest.mark.parametrize("searcher", ["random", "tpe", "asha"])
def test_a_search_that_goes_on_is_the_one_never_stopped(problem, searcher):
    space = SpaceConfig((1e-4, 1.0), (1, 3), (16, 64))
    whole = searchers.search(searcher, space, problem, trials=14, seed=5)
    seen = []
    rows = [trials_lib.Trial.from_json(t.to_json()) for t in whole[:12]]
    same(searchers.search(searcher, space, problem, trials=14, seed=5, known=rows, finished=seen.append), whole)
    assert [t.number for t in seen] == [12, 13]
    assert len({t.learning_rate for t in whole}) == 14
    assert all(1e-4 <= t.learning_rate <= 1 and t.batch_size in (16, 64) for t in whole)
    if searcher == "asha":
        assert 0 < sum(t.pruned for t in whole) < 14
        assert all(max(t.curve) < t.epochs == 3 for t in whole if t.pruned)
    study = searchers.to_optuna(whole, space, searchers.SEARCHERS[searcher])
    assert [t.params["learning_rate"] for t in study.trials] == [t.learning_rate for t in whole]
    assert study.best_trial.number == trials_lib.best([t for t in whole if not t.pruned]).number


def test_first_trials_are_those_given(problem):
    first = [{"learning_rate": 0.02, "batch_size": 64, "epochs": 3}, {"learning_rate": 0.03}]
    trials = searchers.search("tpe", SpaceConfig((1e-3, 1e-1), (1, 3), (16, 64)), problem, trials=3, first=first)
    assert trials[0].params == first[0]
    assert trials[1].learning_rate == 0.03


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rates": ()}, "space.learning_rates: expected at least one value, got none"),
        ({"epochs": (3, 3)}, "space.epochs: expected different values"),
        ({"batch_sizes": (0,)}, "space.batch_sizes: expected positive"),
        ({"learning_rates": (np.nan,)}, "space.learning_rates: expected positive"),
    ],
)
def test_empty_or_contradictory_spaces(settings, message):
    with pytest.raises(ConfigError, match=message):
        SpaceConfig(**settings).check()


def test_refusals(problem, monkeypatch):
    with pytest.raises(ConfigError, match="searcher: expected one of .*, got 'bayes'"):
        searchers.search("bayes", SPACE, problem)
    with pytest.raises(ConfigError, match=r"space.batch_sizes: expected at most 160 \(the training part\), got 1000"):
        searchers.search("grid", SpaceConfig(batch_sizes=(1000,)), problem)
    assert SpaceConfig(batch_sizes=(32, 500, 1000)).fitting(160).batch_sizes == (32, 160)
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'metalr\[search\]'"):
        searchers.search("tpe", SPACE, problem)


def test_an_error_in_a_report_ends_the_search(problem):
    def finished(trial):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        searchers.search("grid", SPACE, problem, finished=finished)
    epochs = []

    def between():
        epochs.append(1)
        if len(epochs) == 3:
            raise RuntimeError("stop between")

    for searcher in ("grid", "asha"):
        epochs.clear()
        with pytest.raises(RuntimeError, match="stop between"):
            searchers.search(searcher, SpaceConfig((1e-3,), (9,), (16,)), problem, between=between)
        assert len(epochs) == 3


def test_a_budget_ends_the_search(problem):
    space = SpaceConfig((1e-3, 1e-1), (1, 2), (16,))
    found = searchers.search("random", space, problem, budget=500 * len(problem.keys))
    spent = [t.example_gradients for t in found]
    assert sum(spent[:-1]) < 500 * len(problem.keys) <= sum(spent)
