"""Optimizers that nobody chooses a rate for: in the inner loop they do what a plain loop of optax does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalr import inner, models
from metalr.errors import ConfigError
from metalr.inner import optimizers

pytestmark = pytest.mark.numerical

MODEL = models.mlp(3, (4,), widths=(8,))
X = jax.random.normal(jax.random.key(0), (30, 4))
Y = (X[:, 0] > 0).astype(jnp.int32) + (X[:, 1] > 1)
INIT = MODEL.init(jax.random.key(1))


def plain(make, steps, evaluated):
    tx = make()
    params, state = INIT, tx.init(INIT)
    for _ in range(steps):
        value, grads = jax.value_and_grad(lambda p: inner.cross_entropy(MODEL.apply(p, X), Y))(params)
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params, value=value)
        params = optax.apply_updates(params, updates)
    return evaluated(state, params) if evaluated else params


@pytest.mark.parametrize("name", optimizers.WITHOUT_SEARCH)
def test_in_the_inner_loop_it_is_what_optax_does(name):
    makers = {
        "adam_cosine": lambda: optax.adam(optax.cosine_decay_schedule(1e-3, 12)),
        "mechanize": lambda: optax.contrib.mechanize(optax.adam(1.0), weight_decay=0.0),
    }
    row = optimizers.without_search(name)
    expected = plain(makers.get(name, getattr(optax.contrib, name, None)), 12, row.evaluated)
    found, seen = jax.jit(
        lambda init: inner.adapt(
            MODEL.apply, init, X, Y, row.make(12), 12, evaluated=row.evaluated, observe=lambda p: p["head"]["bias"]
        )
    )(INIT)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), found, expected)
    np.testing.assert_array_equal(seen[-1], found["head"]["bias"])
    loss = inner.cross_entropy(MODEL.apply(found, X), Y)
    assert float(loss) <= float(inner.cross_entropy(MODEL.apply(INIT, X), Y))


def test_the_loss_reaches_only_those_that_ask_for_it():
    """momo's step is loss over squared gradient (Schaipp et al. 2023, algorithm 1, first step with beta 0)."""
    row = optimizers.with_value(optax.contrib.momo(learning_rate=1e6, beta=0.0))
    found, _ = inner.adapt(MODEL.apply, INIT, X, Y, row, 1)
    value, grads = jax.value_and_grad(lambda p: inner.cross_entropy(MODEL.apply(p, X), Y))(INIT)
    size = value / optax.tree.norm(grads, squared=True)
    expected = jax.tree.map(lambda w, g: w - size * g, INIT, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected)


def test_names_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="rivals: expected one of .*'momo_adam'.*, got 'adam'"):
        optimizers.without_search("adam", "rivals")
