"""Objectives: values by hand, refusals, and the fast form with squared error against the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalr import inner, models, outer
from metalr.errors import ConfigError
from metalr.inner import factored
from metalr.inner.hyperparameters import RatesSpec
from metalr.types import Episode

pytestmark = pytest.mark.numerical


def test_values_by_hand():
    error = inner.OBJECTIVES["squared_error"]
    outputs, targets = jnp.array([[1.0], [3.0]]), jnp.array([0.0, 1.0])
    found = error.measure(outputs, targets)
    assert {name: float(v) for name, v in found.items()} == {"loss": 2.5, "mse": 2.5, "r2": 1 - 2.5 / 0.25}
    absolute = inner.OBJECTIVES["absolute_error"]
    found = absolute.measure(jnp.array([[1.0], [5.0]]), targets)
    assert {name: float(v) for name, v in found.items()} == {"loss": 2.5, "mae": 2.5, "mse": 8.5}
    binary = inner.OBJECTIVES["binary_cross_entropy"]
    assert float(binary.score(jnp.array([2.0, -1.0, 0.5]), jnp.array([1, 0, 0]))) == pytest.approx(2 / 3)
    assert float(binary.loss(jnp.zeros(4), jnp.array([0, 1, 1, 0]))) == pytest.approx(np.log(2))
    assert float(inner.CROSS_ENTROPY.score(jnp.eye(3), jnp.array([0, 1, 0]))) == pytest.approx(2 / 3)


def test_what_is_no_number_predicts_nothing():
    logits = jnp.array([[jnp.nan, 0.0], [1.0, 0.0], [-jnp.inf, 0.0]])
    assert float(inner.accuracy(logits, jnp.array([0, 0, 1]))) == pytest.approx(2 / 3)
    binary = inner.OBJECTIVES["binary_cross_entropy"].metrics["accuracy"]
    assert float(binary(jnp.array([jnp.nan, -1.0]), jnp.array([0, 0]))) == 0.5


@pytest.mark.parametrize(
    ("outputs", "r2"), [([1.3], 0.0), ([1.0], 1.0), ([0.1, 0.1, 0.1], 1.0), ([0.1, 0.2, 0.1], 0.0)]
)
def test_no_variance_is_explained_where_there_is_none(outputs, r2):
    targets = jnp.full(len(outputs), 1.0 if len(outputs) == 1 else 0.1)
    assert float(inner.OBJECTIVES["squared_error"].metrics["r2"](jnp.array(outputs), targets)) == r2


def test_better_is_more_or_less():
    assert inner.CROSS_ENTROPY.better(0.6, 0.5)
    error = inner.OBJECTIVES["squared_error"]
    assert error.better(0.5, 0.6)
    assert not error.better(0.6, 0.5)
    assert error.better(9.0, float("nan"))
    assert not error.better(float("nan"), 9.0)
    assert not error.better(float("inf"), float("nan"))


def test_targets_that_broadcasting_would_pair_wrongly_are_refused():
    with pytest.raises(ConfigError, match=r"expected outputs of the targets' shape \[4\], got \[4, 2\]"):
        inner.squared_error(jnp.zeros((4, 2)), jnp.zeros(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: inner.Objective("x", 5), "expected a function as loss, and metrics as name -> function, got 5"),
        (lambda: inner.Objective("x", inner.squared_error, [1]), r"metrics as name -> function, got .* and \[1\]"),
        (
            lambda: inner.Objective("x", inner.squared_error, targets="class"),
            "targets: expected one of .*, got 'class'",
        ),
        (lambda: inner.Objective("x", inner.squared_error, {}, "mse"), r"choose_by: expected one of \['loss'\]"),
        (lambda: inner.Objective("x", inner.squared_error, {"loss": inner.squared_error}), "expected other names"),
        (
            lambda: inner.Objective("squared_error", lambda outputs, y: 100 * inner.squared_error(outputs, y)),
            "objective: expected a name of your own for a loss of your own, got 'squared_error'",
        ),
        (lambda: inner.objective_of("mean_squared"), "objective: expected one of .*'squared_error'"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("granularity", ["shared", "layer", "tensor"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_the_fast_form_with_squared_error_is_the_plain_one(granularity, outputs):
    """ReLU stacks on vectors: gradients of init and rates, in float64."""

    def init(key):
        keys = jax.random.split(key, 2)
        return {
            "dense_0": {"kernel": 0.4 * jax.random.normal(keys[0], (20, 7)), "bias": jnp.ones(7)},
            "head": {"kernel": 0.4 * jax.random.normal(keys[1], (7, outputs)), "bias": jnp.zeros(outputs)},
        }

    def apply(p, x):
        hidden = jax.nn.relu(x @ p["dense_0"]["kernel"] + p["dense_0"]["bias"][None])
        return hidden @ p["head"]["kernel"] + p["head"]["bias"][None]

    model = models.from_function(init, apply, input_shape=(20,), relu_stack=True)
    spec = RatesSpec(granularity, steps=3, initial=0.05)
    assert factored.pays(model, spec, inner.squared_error, support=5, steps=3)  # otherwise both would be the plain form
    with jax.enable_x64(True):
        meta = jax.tree.map(lambda v: v.astype(jnp.float64), outer.initial(model, spec, jax.random.key(0)))
        x = jax.random.normal(jax.random.key(1), (4, 9, 20), jnp.float64)
        y = jnp.sin(x[..., :outputs])
        y = y[..., 0] if outputs == 1 else y
        episodes = Episode(x[:, :5], y[:, :5], x[:, 5:], y[:, 5:])
        keys = jax.random.split(jax.random.key(2), 4)
        objective = inner.OBJECTIVES["squared_error"]
        fast, plain = (
            jax.jit(functools.partial(outer.meta_gradient, model, spec, objective=objective, plain=p))(
                meta, episodes, keys
            )
            for p in (False, True)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), fast, plain)


def test_the_best_temperature_is_where_the_loss_is_least():
    rng = np.random.default_rng(0)
    labels = jnp.asarray(rng.integers(0, 4, 60))
    logits = 9 * jnp.asarray(rng.normal(size=(60, 4)), jnp.float32) + 12 * jax.nn.one_hot(labels, 4)
    scale = inner.objective.best_scale(logits, labels)
    losses = [float(inner.objective.cross_entropy(by * scale * logits, labels)) for by in (0.9, 0.97, 1, 1.03, 1.1)]
    assert losses == sorted(losses[:3], reverse=True) + sorted(losses[3:])
    np.testing.assert_allclose(inner.objective.best_scale(3 * logits, labels), scale / 3, rtol=1e-4)
    right = 5 * jax.nn.one_hot(labels, 4)  # the more sure the better
    assert float(inner.objective.best_scale(right, labels)) > 3
    assert float(inner.objective.best_scale(-right, labels)) == pytest.approx(0.01)


@pytest.mark.numerical
def test_a_calibrated_meta_loss_has_the_derivative_of_the_least_loss():
    """By finite differences of the loss at its best temperature, which moves with the logits."""
    rng = np.random.default_rng(1)
    labels = jnp.asarray(rng.integers(0, 3, 40))
    start, way = (jnp.asarray(rng.normal(size=(40, 3)), jnp.float32) for _ in range(2))
    start = start + jax.nn.one_hot(labels, 3)
    objective = inner.CROSS_ENTROPY.calibrated()

    def loss(t):
        return objective.of_query(start + t * way, labels)

    numeric = (loss(0.01) - loss(-0.01)) / 0.02
    np.testing.assert_allclose(jax.grad(loss)(0.0), numeric, rtol=2e-2)
    assert objective.measure(start, labels)["loss"] == loss(0.0)
    assert objective.loss is inner.CROSS_ENTROPY.loss
    with pytest.raises(ConfigError, match="outer.calibrate: expected False with squared_error"):
        inner.OBJECTIVES["squared_error"].calibrated()
