"""The factored form against the plain one: logits and meta-gradients, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalr import inner, models
from metalr.inner import descent, factored, hyperparameters
from metalr.inner.hyperparameters import RatesSpec

LOSS = inner.cross_entropy
pytestmark = pytest.mark.numerical


def problem(widths, support, seed=0):
    model = models.mlp(3, (6, 6, 1), widths=widths, dropout=0.0)
    keys = jax.random.split(jax.random.key(seed), 3)
    params = jax.tree.map(lambda v: v.astype(jnp.float64), model.init(keys[0]))
    x = jax.random.uniform(keys[1], (support + 4, 6, 6, 1), jnp.float64)
    y = jnp.arange(support + 4) % 3
    return model, params, x[:support], y[:support], x[support:], y[support:]


@pytest.mark.parametrize("granularity", ["shared", "layer", "tensor"])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("adapts", ["all", "head", "body"])
def test_same_gradients_as_the_plain_form(granularity, per_step, first_order, adapts):
    with jax.enable_x64(True):
        model, params, sx, sy, qx, qy = problem((20, 9), support=3)
        spec = RatesSpec(granularity, per_step=per_step, steps=3, initial=0.3, adapts=adapts)
        raw = hyperparameters.initial_raw(spec, params)

        def fast(params, raw):
            logits = factored.query_logits(
                params, hyperparameters.actual(spec, raw), spec, sx, sy, qx, 3, first_order=first_order
            )
            return inner.cross_entropy(logits, qy)

        def plain(params, raw):
            optimizer = descent.optimizer(spec, hyperparameters.actual(spec, raw))
            adapted, _ = inner.adapt(model.apply, params, sx, sy, optimizer, 3, first_order=first_order)
            return inner.cross_entropy(model.apply(adapted, qx), qy)

        ours, oracle = (jax.value_and_grad(f, (0, 1))(params, raw) for f in (fast, plain))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), ours, oracle)


@pytest.mark.parametrize(("dtype", "rate"), [(np.uint8, 1e-5), (np.int32, 1e-5), (bool, 0.1)])
def test_integer_inputs_are_numbers_and_leave_targets_as_they_are(dtype, rate):
    """Columns of counts, or of zeros and ones: products of theirs neither wrap around nor round targets."""
    model = models.mlp(1, (6,), widths=(5,), dropout=0.0)
    params = model.init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (7, 6))
    x = x > 0.5 if dtype is bool else (200 * x).astype(dtype)
    y = jnp.linspace(-0.9, 0.9, 7)[:, None]
    spec = RatesSpec("layer", initial=rate)
    values, loss = hyperparameters.actual(spec, hyperparameters.initial_raw(spec, params)), inner.squared_error
    ours = factored.query_logits(params, values, spec, x[:3], y[:3], x[3:], 3, loss=loss)
    optimizer = descent.optimizer(spec, values)
    plain, _ = inner.adapt(model.apply, params, x[:3].astype(jnp.float32), y[:3], optimizer, 3, loss=loss)
    expected = model.apply(plain, x[3:].astype(jnp.float32))
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    found = factored.factors(params, values, spec, x[:3], y[:3], 3, loss)
    np.testing.assert_allclose(factored.outputs(params, found, x[3:]), expected, rtol=1e-4)
    assert not np.allclose(expected, model.apply(params, x[3:].astype(jnp.float32)), rtol=1e-2)


@pytest.mark.parametrize("share", [0.0, 1e9])  # all later layers as formed kernels, all as low-rank
@pytest.mark.parametrize("widths", [(), (7,), (20, 9)])
def test_both_ways_to_keep_a_layer_and_every_step(share, widths, monkeypatch):
    monkeypatch.setattr(factored, "LOW_RANK_SHARE", share)
    with jax.enable_x64(True):
        model, params, sx, sy, qx, _ = problem(widths, support=6)
        spec = RatesSpec("layer", initial=0.3)
        values = hyperparameters.actual(spec, hyperparameters.initial_raw(spec, params))
        ours = factored.query_logits(params, values, spec, sx, sy, qx, 4, every_step=True)
        for step in range(5):
            fast, _ = inner.adapt(model.apply, params, sx, sy, descent.optimizer(spec, values), step)
            np.testing.assert_allclose(ours[step], model.apply(fast, qx), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("granularity", ["shared", "layer", "tensor"])
@pytest.mark.parametrize(("widths", "adapts"), [((), "all"), ((7,), "body"), ((20, 9), "head"), ((20, 9), "all")])
def test_adapted_params_are_those_of_the_plain_form(widths, adapts, granularity):
    with jax.enable_x64(True):
        model, params, sx, sy, _, _ = problem(widths, support=6)
        spec = RatesSpec(granularity, per_step=True, steps=4, initial=0.3, adapts=adapts)
        values = hyperparameters.actual(spec, hyperparameters.initial_raw(spec, params))
        ours = factored.adapt(params, values, spec, sx, sy, 4)
        plain, _ = inner.adapt(model.apply, params, sx, sy, descent.optimizer(spec, values), 4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), ours, plain)


def test_applies_only_where_it_is_exact():
    mlp, spec = models.mlp(3, dropout=0.0), RatesSpec("layer")
    assert factored.pays(mlp, spec, LOSS, 15, 5)
    assert not factored.pays(models.mlp(3, dropout=0.2), spec, LOSS, 15, 5)
    assert not factored.pays(models.conv4(3), spec, LOSS, 15, 5)
    assert not factored.pays(mlp, RatesSpec("parameter"), LOSS, 15, 5)
    assert not factored.pays(mlp, spec, LOSS, 600, 5)
    assert not factored.pays(mlp, spec, LOSS, 15, 100)
    assert factored.pays(mlp, spec, inner.squared_error, 15, 5)
    assert not factored.pays(mlp, spec, lambda outputs, y: 100 * inner.squared_error(outputs, y), 15, 5)
