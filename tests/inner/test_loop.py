"""The inner loop against closed forms, and all its options against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalr import inner, models
from metalr.errors import ConfigError
from metalr.inner import descent, hyperparameters, optimizers
from metalr.inner.hyperparameters import RatesSpec
from metalr.types import Episode

pytestmark = pytest.mark.smoke
MODEL = models.mlp(3, (4, 4, 1), widths=(5,), dropout=0.0)
X = jax.random.uniform(jax.random.key(1), (6, 4, 4, 1))
Y = jnp.array([0, 1, 2, 0, 1, 2])
PARAMS = MODEL.init(jax.random.key(0))


def sgd(rate):
    spec = RatesSpec("shared", initial=rate)
    return descent.optimizer(spec, hyperparameters.actual(spec, hyperparameters.initial_raw(spec, PARAMS)))


def same(a, b, **tolerance):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, **tolerance), a, b)


def test_is_gradient_descent():
    expected = PARAMS
    for _ in range(3):
        grads = jax.grad(lambda p: inner.cross_entropy(MODEL.apply(p, X), Y))(expected)
        expected = jax.tree.map(lambda p, g: p - 0.5 * g, expected, grads)
    fast, _ = inner.adapt(MODEL.apply, PARAMS, X, Y, sgd(0.5), 3)
    same(fast, expected, rtol=1e-5, atol=1e-6)


def test_closed_form_on_a_linear_softmax():
    """One step on a linear model from zero weights: W = rate * x^T (onehot - 1/way) / n."""
    model = models.mlp(3, (4, 4, 1), widths=())
    zeros = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
    fast, _ = inner.adapt(model.apply, zeros, X, Y, sgd(0.7), 1)
    error = jax.nn.one_hot(Y, 3) - 1 / 3
    np.testing.assert_allclose(fast["head"]["kernel"], 0.7 * X.reshape(6, -1).T @ error / 6, atol=1e-6)
    np.testing.assert_allclose(fast["head"]["bias"], 0.7 * error.mean(0), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"remat": True}, {"batch_size": 6, "key": jax.random.key(0)}])
def test_scan_and_loop_are_the_same(options, monkeypatch):
    looped, seen = inner.adapt(MODEL.apply, PARAMS, X, Y, sgd(0.5), 4, observe=jax.tree.leaves, **options)
    monkeypatch.setattr(inner, "UNROLLED_STEPS", 0)
    scanned, seen_too = inner.adapt(MODEL.apply, PARAMS, X, Y, sgd(0.5), 4, observe=jax.tree.leaves, **options)
    same(looped, scanned, rtol=1e-5, atol=1e-6)
    same(seen, seen_too, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unrolled", [0, 8])
@pytest.mark.parametrize("at", [(0, 2, 5), (1, 5), (3,)])
def test_observing_some_steps(unrolled, at, monkeypatch):
    monkeypatch.setattr(inner, "UNROLLED_STEPS", unrolled)

    def observe(params):
        return inner.cross_entropy(MODEL.apply(params, X), Y)

    _, every = inner.adapt(MODEL.apply, PARAMS, X, Y, sgd(0.5), 5, observe=observe)
    _, some = inner.adapt(MODEL.apply, PARAMS, X, Y, sgd(0.5), 5, observe=observe, observe_at=at)
    assert every.shape == (6,)
    np.testing.assert_allclose(some, every[np.array(at)], rtol=1e-6)
    assert every[-1] < every[0]


@pytest.mark.parametrize("name", ["adam", "momo_adam", "schedule_free_sgd"])
def test_scores_after_traced_numbers_of_steps_are_those_of_the_curve(name):
    """Also of an optimizer that looks at the loss, and of one that predicts with other params; in minibatches."""
    row = optimizers.WITHOUT_SEARCH.get(name)
    tx = optax.adam(1e-2) if row is None else row.make(12)
    options = {"batch_size": 2, "key": jax.random.key(3), "evaluated": row and row.evaluated}
    episode = Episode(X, Y, X[:4], Y[:4])
    score = dataclasses.replace(inner.CROSS_ENTROPY, choose_by="loss", maximise=False)
    curve = inner.adaptation_curve(MODEL.apply, PARAMS, episode, tx, 12, objective=score, **options)

    @jax.jit
    def after(stops):
        return inner.scores_after(MODEL.apply, PARAMS, episode, tx, stops, 12, objective=score, **options)

    for stops in ([0, 3, 4, 12], [1, 2, 9, 10]):
        np.testing.assert_allclose(after(jnp.array(stops)), curve[np.array(stops)], rtol=1e-5)
    assert after._cache_size() == 1


def test_minibatches_cover_each_epoch_once():
    seen = []

    def apply(params, x, key=None):
        jax.debug.callback(lambda v: seen.append(tuple(np.round(np.asarray(v)[:, 0, 0, 0]).astype(int))), x)
        return MODEL.apply(params, x)

    images = jnp.broadcast_to(jnp.arange(6.0)[:, None, None, None], X.shape)
    inner.adapt(apply, PARAMS, images, Y, sgd(1e-4), 6, batch_size=2, key=jax.random.key(0))
    jax.effects_barrier()
    epochs = [sorted(sum(seen[i : i + 3], ())) for i in (0, 3)]
    assert epochs == [[0, 1, 2, 3, 4, 5]] * 2
    assert seen[:3] != seen[3:]


def test_dropout_draws_a_new_mask_each_step():
    model = models.mlp(3, (4, 4, 1), widths=(50,), dropout=0.5)
    params = model.init(jax.random.key(0))
    run = lambda seed: inner.adapt(  # noqa: E731
        model.apply, params, X, Y, sgd(0.5), 2, dropout=True, key=jax.random.key(seed)
    )[0]
    same(run(0), run(0), rtol=0, atol=0)
    assert not np.allclose(run(0)["head"]["kernel"], run(1)["head"]["kernel"])


def test_any_optax_optimizer():
    _, losses = inner.adapt(
        MODEL.apply, PARAMS, X, Y, optax.adam(1e-2), 50, observe=lambda p: inner.cross_entropy(MODEL.apply(p, X), Y)
    )
    assert losses[-1] < 0.5 * losses[0]


def test_zero_steps_change_nothing():
    same(inner.adapt(MODEL.apply, PARAMS, X, Y, sgd(0.5), 0)[0], PARAMS, rtol=0, atol=0)


def test_bad_arguments():
    with pytest.raises(ConfigError, match=r"batch_size: expected 1\.\.6 .* got 7"):
        inner.adapt(MODEL.apply, PARAMS, X, Y, sgd(0.5), 1, batch_size=7, key=jax.random.key(0))
    for at in ([3, 1], [1, 4], [1, 1], []):
        with pytest.raises(ConfigError, match=r"observe_at: expected numbers of steps that ascend, of 0..3, got \["):
            inner.adapt(MODEL.apply, PARAMS, X, Y, sgd(0.5), 3, observe=lambda p: 0.0, observe_at=at)
    with pytest.raises(ConfigError, match="key: expected a jax.random.key"):
        inner.adapt(MODEL.apply, PARAMS, X, Y, sgd(0.5), 1, batch_size=2)
