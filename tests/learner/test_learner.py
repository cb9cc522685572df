"""A learner on held-out tasks: what it evaluates is what it adapts, and tasks that it cannot take are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metalr
from metalr import inner, models, outer
from metalr.errors import ConfigError, DataError
from metalr.inner import hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.types import Episode


def learner(**settings):
    model = models.mlp(1, (6,), widths=(5,))
    spec = RatesSpec(**({"granularity": "layer", "steps": 2, "initial": 0.05} | settings))
    meta = outer.initial(model, spec, jax.random.key(0))
    rates = hyperparameters.actual(spec, meta.rates)
    if spec.knots:
        rates = {name: value * jnp.linspace(1, 0.1, spec.knots) for name, value in rates.items()}
    return metalr.Learner(model, spec, meta.init, rates, objective=inner.OBJECTIVES["squared_error"])


def lines(outputs=1, shape=(6,)):
    def sample(key):
        x = jax.random.normal(key, (8, *shape))
        y = jnp.tile(x.reshape(8, -1)[:, :1], (1, outputs))
        return Episode(x[:4], y[:4], x[4:], y[4:])

    return metalr.Tasks(sample, sample, sample)


def classes(count, dtype=jnp.int32):
    def sample(key):
        x = jax.random.normal(key, (2 * count, 6))
        y = jnp.arange(2 * count, dtype=dtype) % count
        return Episode(x[:count], y[:count], x[count:], y[count:])

    return metalr.Tasks(sample, sample, sample)


def test_the_last_point_of_a_curve_is_what_adapt_gives():
    """A schedule with knots is stretched over the steps that are asked for, in both."""
    learned, tasks = learner(knots=2), lines()
    curve = learned.evaluate(tasks, episodes=3, steps=30)
    pool, sample = tasks.sampler("test")
    for key, score in zip(metalr.evaluation.protocol.episode_keys(0, 3), curve.tasks[:, -1], strict=True):
        task = sample(pool, key)
        fast = learned.adapt(task.support_x, task.support_y, steps=30)
        expected = np.square(learned.apply(fast, task.query_x) - task.query_y).mean()
        np.testing.assert_allclose(score, expected, rtol=1e-4)


def test_rates_that_go_no_further_are_evaluated_as_far_as_they_go():
    learned = learner(per_step=True, extend="error")
    assert learned.evaluate(lines(), episodes=2).steps[-1] == 2
    assert learner(per_step=True).evaluate(lines(), episodes=2).steps[-1] == 10


def test_tasks_that_a_network_cannot_take_are_refused():
    learned = learner()
    with pytest.raises(ConfigError, match="tasks: their episodes do not fit the learner's network: "):
        learned.evaluate(lines(shape=(7,)), episodes=2)
    with pytest.raises(ConfigError, match=r"expected outputs of the targets' shape"):
        learned.evaluate(lines(outputs=3), episodes=2)
    of_classes = dataclasses.replace(learned, model=models.mlp(3, (6,), widths=(5,)), objective=inner.CROSS_ENTROPY)
    of_classes = dataclasses.replace(of_classes, init=of_classes.model.init(jax.random.key(0)))
    assert of_classes.evaluate(classes(2), episodes=2).mean.shape == (11,)
    with pytest.raises(DataError, match=r"tasks: expected labels 0..2, got some up to 4"):
        of_classes.evaluate(classes(5), episodes=2)


def test_images_are_floats():
    model = models.mlp(2, (3, 3, 1), widths=(4,))
    spec = RatesSpec("layer", steps=2, initial=0.1)
    meta = outer.initial(model, spec, jax.random.key(0))
    learned = metalr.Learner(model, spec, meta.init, hyperparameters.actual(spec, meta.rates))

    def sample(key):
        x = jax.random.randint(key, (4, 3, 3, 1), 0, 256).astype(jnp.uint8)
        return Episode(x[:2], jnp.arange(2), x[2:], jnp.arange(2))

    with pytest.raises(DataError, match="tasks: expected images as float 0..1, got uint8; divide them by 255"):
        learned.evaluate(metalr.Tasks(sample, sample, sample), episodes=2)
