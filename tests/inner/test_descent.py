"""The learned hyperparameters as a transformation: each against its formula, in any optax loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalr import inner, models
from metalr.errors import ConfigError
from metalr.inner import descent, hyperparameters, optimizers
from metalr.inner.hyperparameters import RatesSpec

pytestmark = [pytest.mark.numerical, pytest.mark.smoke]
PARAMS = {
    "dense_0": {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([0.1, 0.2])},
    "head": {"kernel": jnp.array([[2.0, 1.0], [-1.0, 0.5]]), "bias": jnp.array([0.0, -0.3])},
}
GRADS = jax.tree.map(lambda v: jnp.cos(3 * v), PARAMS)


def take(spec, steps=1, params=PARAMS, of_steps=None, **changed):
    values = hyperparameters.actual(spec, hyperparameters.initial_raw(spec, params)) | changed
    tx = descent.optimizer(spec, values, of_steps)
    state, seen = tx.init(params), []
    for _ in range(steps):
        updates, state = jax.jit(tx.update)(GRADS, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


def close(a, b):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-5, atol=1e-7), a, b)


def test_momentum_is_heavy_ball():
    seen = take(RatesSpec("layer", momentum=0.9, initial=0.1), 3)
    reference = optax.sgd(0.1, momentum=0.9)
    state, params = reference.init(PARAMS), PARAMS
    for ours in seen:
        updates, state = reference.update(GRADS, state)
        params = optax.apply_updates(params, updates)
        close(ours, params)


NEEDING_NO_RATE = [name for name in optimizers.WITHOUT_SEARCH if optimizers.needs_no_rate(name)]


@pytest.mark.parametrize("name", [*NEEDING_NO_RATE, "lion", "rmsprop"])
def test_rates_of_one_leave_another_optimizer_as_it_comes(name):
    row = optimizers.WITHOUT_SEARCH.get(name)
    reference = row.make(0) if row else optimizers.by_name(name)(1.0)
    spec = RatesSpec("layer", base=name, initial=1.0)
    ours = descent.optimizer(spec, hyperparameters.actual(spec, hyperparameters.initial_raw(spec, PARAMS)))

    def loss(params):
        return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))

    def run(optimizer):
        state, params = optimizer.init(PARAMS), PARAMS
        for _ in range(3):
            value, grads = jax.value_and_grad(loss)(params)
            more = {"value": value} if isinstance(optimizer, optax.GradientTransformationExtraArgs) else {}
            updates, state = optimizer.update(grads, state, params, **more)
            params = optax.apply_updates(params, updates)
        return params

    close(run(ours), run(reference))


def test_a_base_that_looks_at_the_loss_says_so():
    spec = RatesSpec("layer", base="momo_adam", initial=1.0)
    ours = descent.optimizer(spec, hyperparameters.actual(spec, hyperparameters.initial_raw(spec, PARAMS)))
    with pytest.raises(
        ConfigError, match=r"value: expected update\(grads, state, params, value=loss\) with base momo_a"
    ):
        ours.update(GRADS, ours.init(PARAMS), PARAMS)
    for base in ("cocob", "dog", "prodigy"):  # which do without it
        spec = RatesSpec("layer", base=base, initial=1.0)
        ours = descent.optimizer(spec, hyperparameters.actual(spec, hyperparameters.initial_raw(spec, PARAMS)))
        updates, _ = ours.update(GRADS, ours.init(PARAMS), PARAMS)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


def test_decay_is_decoupled():
    (ours,) = take(RatesSpec("layer", decay=0.01, initial=0.1))
    close(ours, jax.tree.map(lambda w, g: 0.99 * w - 0.1 * g, PARAMS, GRADS))


def test_adam_scales_by_layer():
    (ours,) = take(RatesSpec("layer", base="adam"), dense_0=jnp.array(0.2), head=jnp.array(0.05))
    reference = optax.scale_by_adam(eps_root=optimizers.EPS_ROOT)
    direction, _ = reference.update(GRADS, reference.init(PARAMS))
    for layer, rate in (("dense_0", 0.2), ("head", 0.05)):
        close(ours[layer], jax.tree.map(lambda w, d, r=rate: w - r * d, PARAMS[layer], direction[layer]))


def test_clip_is_a_norm_a_layer():
    (ours,) = take(RatesSpec("layer", clip=0.5, initial=1.0))
    for layer in PARAMS:
        moved = jax.tree.map(lambda a, b: a - b, PARAMS[layer], ours[layer])
        np.testing.assert_allclose(optax.tree.norm(moved), 0.5, rtol=1e-5)
    (ours,) = take(RatesSpec("layer", clip=50.0, initial=1.0))
    close(ours, jax.tree.map(lambda w, g: w - g, PARAMS, GRADS))


def test_proximal_pulls_to_the_start():
    first, second = take(RatesSpec("shared", proximal=2.0, initial=0.1), 2)
    close(first, jax.tree.map(lambda w, g: w - 0.1 * g, PARAMS, GRADS))
    close(second, jax.tree.map(lambda w, g, w0: w - 0.1 * (g + 2.0 * (w - w0)), first, GRADS, PARAMS))


def test_prediction_starts_at_one_and_then_scales_each_layer():
    spec = RatesSpec("layer", predicted=True, decay=0.01, initial=0.1)
    close(take(spec)[0], take(RatesSpec("layer", decay=0.01, initial=0.1))[0])
    bias = jnp.log(jnp.array([2.0, 3.0, 5.0, 7.0]))  # rates of both layers, then decays
    (ours,) = take(spec, **{"predict:out/bias": bias})
    for layer, rate, decay in (("dense_0", 2, 5), ("head", 3, 7)):
        expected = jax.tree.map(
            lambda w, g, r=rate, d=decay: (1 - 0.01 * d) * w - 0.1 * r * g, PARAMS[layer], GRADS[layer]
        )
        close(ours[layer], expected)


@pytest.mark.parametrize("granularity", ["channel", "parameter"])
def test_wide_rates_have_the_shape_of_what_they_scale(granularity):
    spec = RatesSpec(granularity)
    values = hyperparameters.initial_raw(spec, PARAMS)
    assert values["head/kernel"].shape == ((2,) if granularity == "channel" else (2, 2))
    (ours,) = take(spec, **{"head/kernel": jnp.broadcast_to(jnp.array([1.0, 0.0]), values["head/kernel"].shape)})
    np.testing.assert_allclose(
        ours["head"]["kernel"], PARAMS["head"]["kernel"] - GRADS["head"]["kernel"] * jnp.array([1.0, 0.0])[None]
    )


@pytest.mark.parametrize(("of_steps", "expected"), [(3, [1.0, 0.1, 0.01]), (5, [1.0, 0.1**0.5, 0.1, 0.1**1.5, 0.01])])
def test_a_schedule_stretches_over_any_number_of_steps(of_steps, expected):
    spec = RatesSpec("shared", knots=3, steps=3)
    values = {"all": jnp.array([1.0, 0.1, 0.01])}
    got = [float(hyperparameters.at_step(spec, values, n, of_steps)["all"]) for n in range(of_steps + 1)]
    np.testing.assert_allclose(got, [*expected, 0.01], rtol=1e-5)
    signed = RatesSpec("shared", knots=2, steps=3, positive=False)
    middle = hyperparameters.at_step(signed, {"all": jnp.array([1.0, -1.0])}, jnp.int32(1))["all"]
    np.testing.assert_allclose(middle, 0.0, atol=1e-7)


def test_bounds_are_projected_and_zero_rates_are_reported():
    spec = RatesSpec("layer", positive=False, lowest=0.0, highest=0.2)
    raw = {"dense_0": jnp.array(-0.3), "head": jnp.array(0.4)}
    projected = hyperparameters.project(spec, raw)
    assert [float(projected[k]) for k in raw] == [0.0, pytest.approx(0.2)]
    assert hyperparameters.health(spec, projected)["dense_0"] == {"negative": 0.0, "dead": 1.0}
    assert hyperparameters.health(RatesSpec(positive=False), raw)["dense_0"] == {"negative": 1.0, "dead": 0.0}
    logs = hyperparameters.project(
        RatesSpec("layer", lowest=0.01, highest=0.5), {"head": jnp.array(3.0), "b": jnp.array(-9.0)}
    )
    np.testing.assert_allclose([jnp.exp(logs["head"]), jnp.exp(logs["b"])], [0.5, 0.01], rtol=1e-5)


def test_a_learned_dropout_rate_has_a_derivative():
    model = models.mlp(3, (4, 4, 1), widths=(50,))
    params, x = model.init(jax.random.key(0)), jnp.ones((64, 4, 4, 1))

    def spread(rate):
        noisy = model.apply(params, x, key=jax.random.key(1), dropout=rate)
        return jnp.square(noisy - model.apply(params, x)).mean()

    assert float(spread(jnp.array(0.6))) > float(spread(jnp.array(0.1))) > 0
    assert float(jax.grad(spread)(jnp.array(0.3))) > 0
    spec = RatesSpec("layer", dropout=0.2)
    value = hyperparameters.dropout(spec, hyperparameters.actual(spec, hyperparameters.initial_raw(spec, params)), True)
    np.testing.assert_allclose(value, 0.2, rtol=1e-6)
    assert hyperparameters.dropout(RatesSpec(), {}, False) is False
    fast, _ = inner.adapt(
        model.apply, params, x, jnp.arange(64) % 3, optax.sgd(0.1), 2, dropout=value, key=jax.random.key(0)
    )
    assert not np.allclose(fast["head"]["kernel"], params["head"]["kernel"])


def test_params_are_needed_by_decay():
    spec = RatesSpec("layer", decay=0.1)
    tx = descent.optimizer(spec, hyperparameters.actual(spec, hyperparameters.initial_raw(spec, PARAMS)))
    with pytest.raises(ConfigError, match=r"params: expected the current params in update"):
        tx.update(GRADS, tx.init(PARAMS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"knots": 1}, "inner.knots: expected 0"),
        ({"knots": 4, "per_step": True}, "inner.knots: expected 0 with per_step"),
        ({"lowest": 0.5}, r"inner.rate: expected within the bounds 0\.5\.\.inf, got 0\.1"),
        ({"lowest": 0.0}, "inner.lowest: expected above 0 for positive rates"),
        ({"momentum": 1.0}, "inner.momentum: expected 0 < momentum < 1"),
        ({"decay": -0.1}, "inner.decay: expected 0 < decay < 1"),
        ({"clip": 0.0}, "inner.clip: expected a positive number"),
        ({"base": "lions"}, "inner.base: expected an optax optimizer .* optax has no 'lions', but 'lion'"),
        ({"base": "schedule_free_sgd"}, "inner.base: expected an optimizer whose steps can be multiplied"),
        ({"batch_size": 0}, "inner.batch_size: expected at least 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        RatesSpec(**settings)
