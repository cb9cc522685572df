"""Rivals: runs of fixed rates, one after the other and side by side."""

import contextlib

import jax
import numpy as np
import pytest

import metalr
from metalr import inner, models, tasks
from metalr.comparison import rivals
from metalr.evaluation import protocol
from metalr.inner import hyperparameters
from metalr.inner.hyperparameters import RatesSpec


def test_fixed_rates_side_by_side_give_what_each_alone_gives(blobs, monkeypatch):
    """As on accelerators, where all rates are one dispatch."""
    sampler = tasks.make_sampler(tasks.make_splits(blobs, "relabeled").test, 10, 2, 3)
    keys = protocol.episode_keys(0, 4)
    model = models.mlp(10, (8, 8, 1), widths=(16,))
    field = rivals.Field(sampler, sampler, keys, keys, support=20, train=16, lengths=(1, 4), batch_size=5)
    rates, init = [0.003, 0.03, 0.1], model.init(jax.random.key(0))
    alone = rivals.baselines(model, field)("adam", False)(init, rates)
    monkeypatch.setattr(rivals.devices, "at_once", lambda values: [list(values)])
    together = rivals.baselines(model, field)("adam", False)(init, rates)
    assert alone.shape == together.shape == (3, 4, 2)
    np.testing.assert_allclose(alone, together, atol=0.034)  # one prediction of 30 may round over
    assert not np.allclose(alone[0], alone[2])
    by_length = rivals.baselines(model, field)("adam_cosine", False)(init, rates)
    assert by_length.shape == (3, 4, 2)


def test_seconds_of_a_length_are_its_share_of_what_was_run(monkeypatch):
    """Points of one fine-tune of 7 steps; or three fine-tunes, of 1, 3 and 7 steps."""
    monkeypatch.setattr(rivals, "stopwatch", lambda: contextlib.nullcontext(lambda: (77.0, 5.0)))
    keys = jax.random.split(jax.random.key(0), 1)
    field = rivals.Field(((), None), ((), None), keys, keys, support=8, train=6, lengths=(1, 3, 7), batch_size=8)
    for separate, expected in ((False, [11, 33, 77]), (True, [7, 21, 49])):
        rows = rivals.of_lengths("x", [None], field, lambda start: np.zeros((1, 3)), separate=separate)
        assert [row.seconds for row in rows] == pytest.approx(expected)
        assert rows[0].compile_seconds == 5.0


def test_one_program_serves_all_lengths_and_inits(blobs, monkeypatch):
    """Each takes an accelerator 10 to 30 seconds to compile."""
    made, make = [], protocol._compiled
    monkeypatch.setattr(protocol, "_compiled", lambda *given: made.append(make(*given)) or made[-1])
    sampler = tasks.make_sampler(tasks.make_splits(blobs, "relabeled").test, 10, 2, 3)
    keys, model = protocol.episode_keys(0, 4), models.mlp(10, (8, 8, 1), widths=(16,), dropout=0.0)
    field = rivals.Field(sampler, sampler, keys, keys, support=20, train=16, lengths=(1, 3, 7), batch_size=20)
    init, spec = model.init(jax.random.key(0)), RatesSpec("layer", initial=0.1, knots=2)
    rates = hyperparameters.actual(spec, hyperparameters.initial_raw(spec, init))
    learners = [metalr.Learner(model, spec, init, rates)]
    runs = rivals.learned_runs(learners, field)
    rows = rivals.learned(learners, field, runs) + rivals.learned(learners, field, runs, random_init=True)
    free, fixed = rivals.rate_free_runs(model, field), rivals.baselines(model, field)
    for name, inits in (("random", [None]), ("learned", [init])):
        rows += rivals.without_search(name, inits, field, free, "adam_cosine")
        rows += rivals.unsearched(name, inits, field, fixed)
    assert [row.steps for row in rows] == 6 * [1, 3, 7]
    assert [evaluator._program(4)._cache_size() for evaluator in made] == [1, 1, 1, 1]


@pytest.mark.parametrize(("objective", "best"), [("cross_entropy", [1, 1, 7, 7]), ("squared_error", [1, 3, 3, 9])])
def test_early_stopping_takes_the_shortest_of_the_best_so_far(objective, best):
    """Accuracy is the higher the better, a squared error the lower."""
    lengths, validation = (1, 3, 7, 9), [0.5, 0.4, 0.6, 0.3]
    keys = protocol.episode_keys(0, 2)
    field = rivals.Field(
        ((), None), ((), None), keys, keys, 8, 6, lengths, 8, inner.OBJECTIVES[objective], early_stopping=True
    )
    rows = [rivals.Scores("x", n, np.full((1, 2), n / 10), 8.0 * n, 8.0 * n, 0.0, None) for n in lengths]
    found = rivals._stopped_early(rows, validation, field)
    assert [row.steps for row in found] == list(lengths)  # what it may take
    assert [row.chosen["steps"] for row in found] == best
    assert [row.mean for row in found] == [n / 10 for n in best]
    assert [row.example_gradients for row in found] == [8.0 * n for n in best]
