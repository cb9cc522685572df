"""The held-out protocol."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalr import inner, models, outer, tasks
from metalr.errors import ConfigError
from metalr.evaluation import protocol
from metalr.inner import descent, hyperparameters
from metalr.inner.hyperparameters import RatesSpec


@pytest.mark.parametrize(
    "model",
    [
        models.mlp(10, (8, 8, 1), widths=(16,), dropout=0.0),
        models.conv4(10, (8, 8, 1), channels=4, layers=2),
        models.rnn(10, (8, 8, 1), width=8),
    ],
    ids=["factored", "plain", "recurrent"],
)
def test_curve_is_the_mean_of_single_episodes(blobs, model):
    pool, sample = tasks.make_sampler(tasks.make_splits(blobs, "rotated").test, 10, 2, 3)
    spec = RatesSpec("layer", initial=0.3)
    meta = outer.initial(model, spec, jax.random.key(0))
    actual = hyperparameters.actual(spec, meta.rates)
    keys = protocol.episode_keys(3, 6)
    curve = protocol.make_evaluator(model, spec, sample, 7)(pool, meta.init, actual, keys)
    assert curve.tasks.shape == (6, 8)
    optimizer = descent.optimizer(spec, actual)
    single = jax.jit(lambda key: inner.adaptation_curve(model.apply, meta.init, sample(pool, key), optimizer, 7))
    one_by_one = np.array([single(key) for key in keys])
    np.testing.assert_allclose(curve.tasks, one_by_one, atol=0.034)  # one prediction of 30 may round over
    np.testing.assert_allclose(curve.mean, curve.tasks.mean(0))
    np.testing.assert_allclose(curve.ci95, 2.5705818 * curve.tasks.std(0, ddof=1) / np.sqrt(6))  # t, 5 degrees


@pytest.mark.parametrize(
    "options", [{"knots": 3}, {"horizon_power": 0.4, "base": "adam", "batch_size": 7}, {"per_step": True}]
)
def test_fine_tunes_of_several_lengths_are_each_what_it_is_alone(blobs, options):
    """By one program, in which the length is traced: a schedule is stretched over it, rates go with its power."""
    pool, sample = tasks.make_sampler(tasks.make_splits(blobs, "rotated").test, 10, 2, 3)
    model = models.mlp(10, (8, 8, 1), widths=(16,), dropout=0.0)
    spec = RatesSpec("layer", initial=0.05, steps=5, **options)
    init = model.init(jax.random.key(0))
    rates = hyperparameters.actual(spec, hyperparameters.initial_raw(spec, init))
    falling = jnp.array([4.0, 1.0, 0.2, 2.0, 1.0])[: max(1, spec.times)]
    rates = {k: v if hyperparameters.kind_of(k) != "rate" or not spec.times else v * falling for k, v in rates.items()}
    keys, loss = protocol.episode_keys(3, 4), dataclasses.replace(inner.CROSS_ENTROPY, choose_by="loss", maximise=False)
    together = protocol.make_evaluator(model, spec, sample, 11, at=[1, 3, 11], separate=True, objective=loss)
    found = together(pool, init, rates, keys)
    for steps, curve in found.each_point():
        alone = protocol.make_evaluator(model, spec, sample, steps, at=[steps], of_steps=steps, objective=loss)
        np.testing.assert_allclose(curve.tasks, alone(pool, init, rates, keys).tasks, rtol=2e-4)
        assert curve.steps.tolist() == [steps]
    assert together._program(4)._cache_size() == 1
    with pytest.raises(ConfigError, match="of_steps: expected None with separate, got 3"):
        protocol.make_evaluator(model, spec, sample, 3, of_steps=3, separate=True)


@pytest.mark.parametrize(("family", "way"), [("digits", 4), ("relabeled", 10), ("classes", 3)])
def test_accuracy_before_adaptation_is_chance_where_labels_are_shuffled(blobs, family, way):
    """Even for an init that knows the classes: it cannot know the labels."""
    split = tasks.make_splits(blobs, family).test
    pool, sample = tasks.make_sampler(split, way, 2, 8)
    model, spec = models.mlp(way, (8, 8, 1), widths=(16,), dropout=0.0), RatesSpec("layer", initial=0.3)
    init = model.init(jax.random.key(0))
    trained, _ = inner.adapt(model.apply, init, *sample(pool, jax.random.key(9))[:2], optax.adam(1e-2), 100)
    evaluator = protocol.make_evaluator(model, spec, sample, 1)
    curve = evaluator(
        pool,
        trained,
        hyperparameters.actual(spec, hyperparameters.initial_raw(spec, init)),
        protocol.episode_keys(0, 400),
    )
    assert abs(curve.mean[0] - 1 / way) < max(4 * curve.ci95[0], 0.01)


def test_more_episodes_keep_the_first_ones():
    a, b = (jax.random.key_data(protocol.episode_keys(5, n)) for n in (3, 8))
    np.testing.assert_array_equal(a, b[:3])
    assert not np.array_equal(a, jax.random.key_data(protocol.episode_keys(6, 3)))
    with pytest.raises(ConfigError, match="evaluation.episodes: expected at least 2"):
        protocol.episode_keys(0, 1)


def test_paired_difference():
    mean, ci95 = protocol.difference_of(np.array([0.5, 0.7, 0.9]), np.array([0.4, 0.5, 0.6]))
    np.testing.assert_allclose((mean, ci95), (0.2, 4.3026527 * 0.1 / np.sqrt(3)), atol=1e-6)


def test_an_interval_over_seeds_and_tasks_is_wider_than_either():
    """By hand: t of 2 degrees of freedom is 4.3027; the means 0.1 apart have a standard deviation of 0.1."""
    both = protocol.over_seeds_and_tasks([0.5, 0.6, 0.7], [0.03, 0.04, 0.05])
    assert both == pytest.approx(np.hypot(4.302653 * 0.1 / np.sqrt(3), 0.04), rel=1e-6)
    assert protocol.over_seeds_and_tasks([0.6, 0.6], [0.04, 0.04]) == pytest.approx(0.04)


def test_a_row_says_what_its_interval_is_over():
    scores = np.array([[0.5, 0.7, 0.9], [0.4, 0.6, 0.8]])
    one, two = protocol.row("x", 5, scores[0], "mse"), protocol.row("x", 5, scores, "mse", reference=scores + 0.1)
    assert (one["mse"], "ci95_over_tasks" in one) == (0.7, False)
    assert one["ci95"] == pytest.approx(float(protocol.half_width(scores[0])), abs=1e-6)
    assert two["mse_of_seeds"] == [0.7, 0.6]
    between = protocol.half_width(np.array([0.7, 0.6]))
    assert two["ci95"] == pytest.approx(np.hypot(between, one["ci95"]), abs=1e-5)
    assert two["ci95_over_tasks"] == pytest.approx(one["ci95"], abs=1e-6)
    assert two["learned_minus_this"] == pytest.approx(0.1)
    assert two["difference_ci95"] == pytest.approx(0.0, abs=1e-6)


def test_a_difference_of_unequal_numbers_of_seeds():
    """Paired by task; the seeds' part is that of two samples."""
    two, three = np.array([[0.6, 0.8], [0.7, 0.9]]), np.array([[0.5, 0.6], [0.4, 0.7], [0.6, 0.8]])
    mean, ci95 = protocol.difference_of(two, three)
    assert mean == pytest.approx(0.75 - 0.6, abs=1e-6)
    seeds = [protocol.half_width(one.mean(1)) for one in (two, three)]
    tasks = protocol.half_width(two.mean(0) - three.mean(0))
    assert ci95 == pytest.approx(np.sqrt(seeds[0] ** 2 + seeds[1] ** 2 + tasks**2), abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.23456789e-8, -7.7e-12, 0.0123456789, 0.895333, 2.302585093, 12345.678912])
def test_small_numbers_keep_six_digits(value):
    """Scores are chosen by: those of errors in metres or volts may all be small."""
    found = protocol.rounded(value)
    assert found == pytest.approx(value, rel=6e-6, abs=0)
    assert found == round(value, 6) or abs(value) < 0.1


def test_runs_that_diverged_are_null_in_json():
    row = protocol.row("x", 5, np.array([0.5, np.inf, np.nan]), "mse", np.zeros(3))
    assert [row[name] for name in ("mse", "ci95", "learned_minus_this", "difference_ci95")] == [None] * 4


def test_an_interval_over_tasks_that_come_again_is_that_of_their_means():
    """Episodes of the same task say less than as many tasks: equal numbers of each give the means' interval."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=6)
    groups = np.tile(np.arange(6), 50)
    values = means[groups] + 0.1 * rng.normal(size=300)
    values -= 0.0
    by_task = np.array([values[groups == task].mean() for task in range(6)])
    np.testing.assert_allclose(protocol.half_width(values, groups), protocol.half_width(by_task), rtol=1e-9)
    assert protocol.half_width(values, groups) > 5 * protocol.half_width(values)
    np.testing.assert_allclose(protocol.half_width(values, np.arange(300)), protocol.half_width(values))
    assert np.isnan(protocol.half_width(values, np.zeros(300, int)))
    row = protocol.row("x", 5, np.stack([values, values + 0.1]), "mse", values[None], groups=groups)
    assert row["ci95_over_tasks"] == pytest.approx(float(protocol.half_width(by_task)), abs=1e-6)
    alone = protocol.row("x", 5, values, "mse", groups=np.zeros(300, int))
    assert alone["ci95"] is None
    curve = protocol.curve_of(values[:, None], [5], groups)
    assert curve.ci95[0] == pytest.approx(float(protocol.half_width(by_task)))
