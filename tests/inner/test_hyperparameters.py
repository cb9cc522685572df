"""Rates: groups, shapes, steps beyond the trained ones, the optax transformation."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalr.errors import ConfigError
from metalr.inner import descent, hyperparameters
from metalr.inner.hyperparameters import RatesSpec

pytestmark = pytest.mark.smoke
PARAMS = {
    "dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
    "head": {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(4)},
}
GROUPS = {
    "shared": {"all"},
    "layer": {"dense_0", "head"},
    "tensor": {"dense_0/kernel", "dense_0/bias", "head/kernel", "head/bias"},
    "parameter": {"dense_0/kernel", "dense_0/bias", "head/kernel", "head/bias"},
}


@pytest.mark.parametrize(
    ("granularity", "per_step", "positive"), list(itertools.product(GROUPS, (False, True), (False, True)))
)
def test_groups_shapes_and_first_values(granularity, per_step, positive):
    spec = RatesSpec(granularity, per_step=per_step, positive=positive, steps=3, initial=0.05)
    raw = hyperparameters.initial_raw(spec, PARAMS)
    assert set(raw) == GROUPS[granularity]
    for group, value in hyperparameters.actual(spec, raw).items():
        own = PARAMS[group.split("/")[0]][group.split("/")[1]].shape if granularity == "parameter" else ()
        assert value.shape == ((3,) if per_step else ()) + own
        np.testing.assert_allclose(value, 0.05, rtol=1e-6)
        assert not value.weak_type


@pytest.mark.parametrize(
    ("adapts", "groups"), [("head", {"head"}), ("body", {"dense_0"}), ("all", {"dense_0", "head"})]
)
def test_only_adapting_layers_have_rates(adapts, groups):
    spec = RatesSpec("layer", adapts=adapts)
    raw = hyperparameters.initial_raw(spec, PARAMS)
    assert set(raw) == groups
    updates, _ = descent.optimizer(spec, hyperparameters.actual(spec, raw)).update(
        PARAMS, descent.optimizer(spec, raw).init(PARAMS)
    )
    moved = {layer for layer in PARAMS if bool((updates[layer]["kernel"] != 0).any())}
    assert moved == groups


def test_names_with_colons_are_names():
    """Those of Keras have them: a rate is a rate, whatever its tensor is called."""
    for granularity in ("layer", "tensor", "parameter"):
        spec = RatesSpec(granularity, steps=2, initial=0.1, momentum=0.5)
        raw = hyperparameters.initial_raw(spec, {"dense/kernel:0": jnp.ones((2, 2)), "w:0": jnp.ones(2)})
        actual = hyperparameters.actual(spec, raw)
        rates = {name: value for name, value in actual.items() if not name.startswith("momentum")}
        assert len(rates) == 2
        for value in rates.values():
            np.testing.assert_allclose(value, 0.1, rtol=1e-6)
        assert set(hyperparameters.summary(spec, actual)) == set(actual)
        assert set(hyperparameters.health(spec, actual)) == set(rates)
    with pytest.raises(ConfigError, match="expected names that do not begin as those of learned .*, got 'clip:0'"):
        hyperparameters.initial_raw(RatesSpec("tensor"), {"clip:0": jnp.ones(2)})


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="expected path names that differ, got two of the name 'a/b'"):
        hyperparameters.initial_raw(RatesSpec("tensor"), {"a/b": jnp.ones((3, 2)), "a": {"b": jnp.ones(2)}})


@pytest.mark.parametrize(("adapts", "group"), [("head", "head"), ("body", "body")])
def test_a_head_may_be_one_tensor(adapts, group):
    raw = hyperparameters.initial_raw(RatesSpec("tensor", adapts=adapts), {"body": jnp.ones(3), "head": jnp.ones(2)})
    assert list(raw) == [group]


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 2.0}, {"steps": float("nan")}, {"knots": 2.0}, {"batch_size": 2.5}, {"initial": "0.1"},
        {"momentum": "0.5"}, {"steps": True},
    ],
)  # fmt: skip
def test_numbers_are_of_their_kind(settings):
    with pytest.raises(ConfigError, match="expected"):
        RatesSpec(**settings)


def test_momentum_keeps_the_dtype_of_its_state():
    params = {"head": jnp.ones(3, jnp.bfloat16)}
    spec = RatesSpec("shared", momentum=0.5)
    tx = descent.optimizer(spec, hyperparameters.actual(spec, hyperparameters.initial_raw(spec, PARAMS)))
    state = tx.init(params)
    _, later = tx.update(params, state, params)
    assert jax.tree.map(lambda v: v.dtype, later) == jax.tree.map(lambda v: v.dtype, state)


def test_unknown_head():
    with pytest.raises(ConfigError, match=r"model.head: expected a layer 'last'.*\['dense_0', 'head'\]"):
        hyperparameters.initial_raw(RatesSpec(adapts="body", head="last"), PARAMS)


@pytest.mark.parametrize(("extend", "beyond"), [("hold", 0.3), ("mean", 0.2), ("error", 0.3)])
def test_steps_beyond_the_trained_ones(extend, beyond):
    spec = RatesSpec("shared", per_step=True, steps=3, extend=extend)
    values = {"all": jnp.array([0.1, 0.2, 0.3])}
    got = [float(hyperparameters.at_step(spec, values, step)["all"]) for step in range(5)]
    np.testing.assert_allclose(got, [0.1, 0.2, 0.3, beyond, beyond], rtol=1e-6)
    traced = jax.vmap(lambda step: hyperparameters.at_step(spec, values, step)["all"])(jnp.arange(5))
    np.testing.assert_allclose(traced, got, rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"knots": 2}, {"granularity": "tensor"}, {"granularity": "shared"}])
def test_a_horizon_power_lets_rates_fall_with_the_length(settings):
    spec = RatesSpec(**{"granularity": "layer", "steps": 4, "initial": 0.2, "horizon_power": 0.5} | settings)
    assert spec.of_length
    rates = hyperparameters.actual(spec, hyperparameters.initial_raw(spec, PARAMS))
    groups = [name for name in rates if hyperparameters.kind_of(name) == "rate"]
    for steps, expected in ((4, 0.2), (None, 0.2), (16, 0.1), (1, 0.4)):
        now = hyperparameters.at_step(spec, rates, 0, steps)
        np.testing.assert_allclose([now[group] for group in groups], expected, rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"knots": 2}, {"granularity": "tensor"}, {"granularity": "shared"}])
def test_a_support_power_lets_rates_go_with_the_size_of_the_support_set(settings):
    spec = RatesSpec(**{"granularity": "layer", "initial": 0.2, "support_power": 0.5, "support": 8} | settings)
    rates = hyperparameters.actual(spec, hyperparameters.initial_raw(spec, PARAMS))
    groups = [name for name in rates if hyperparameters.kind_of(name) == "rate"]
    for support, expected in ((8, 0.2), (None, 0.2), (2, 0.1), (32, 0.4)):
        of_size = hyperparameters.of_size(spec, rates, support)
        np.testing.assert_allclose([np.max(of_size[group]) for group in groups], expected, rtol=1e-6)
    falls = hyperparameters.actual(
        spec, {k: -v if "power" in k else v for k, v in hyperparameters.raw_of(spec, rates).items()}
    )
    assert float(np.max(hyperparameters.of_size(spec, falls, 2)[groups[0]])) == pytest.approx(0.4)
    bounded = dataclasses.replace(spec, highest=0.3)
    assert float(np.max(hyperparameters.of_size(bounded, rates, 32)[groups[0]])) == pytest.approx(0.3)


def test_a_support_power_needs_the_size_that_rates_are_for():
    for settings in ({"support_power": 0.1}, {"support": 5}, {"support": 0, "support_power": 0.1}):
        with pytest.raises(ConfigError, match="rates.support: expected"):
            RatesSpec(**settings)
    with pytest.raises(ConfigError, match="inner.support_power: expected a finite number .*got inf"):
        RatesSpec(support_power=np.inf, support=4)


def test_each_knot_has_a_power_of_its_own():
    spec = RatesSpec("layer", steps=4, knots=2, initial=0.2, horizon_power=0.5)
    rates = dict(hyperparameters.actual(spec, hyperparameters.initial_raw(spec, PARAMS)))
    rates["horizon_power:head"] = jnp.array([0.5, 1.0])
    at = [float(hyperparameters.at_step(spec, rates, step, 16)["head"]) for step in (0, 15)]
    np.testing.assert_allclose(at, [0.1, 0.05], rtol=1e-6)
    assert len(hyperparameters.summary(spec, rates)["horizon_power:head"]) == 2


def test_error_is_an_explicit_rule():
    spec = RatesSpec("shared", per_step=True, steps=3, extend="error")
    hyperparameters.check_steps(spec, 3)
    with pytest.raises(ConfigError, match="steps: expected at most the 3 trained steps, got 4"):
        hyperparameters.check_steps(spec, 4)
    for bad, message in (
        (-1, "at least 0"),
        (2.5, "a whole number"),
        (True, "a whole number"),
        (2**31, "fewer than 2"),
    ):
        with pytest.raises(ConfigError, match=f"steps: expected {message}"):
            hyperparameters.check_steps(spec, bad)


def test_optimizer_is_gradient_descent_in_any_loop():
    spec = RatesSpec("tensor", per_step=True, steps=2)
    values = {group: jnp.array([i + 1.0, 10.0 * (i + 1)]) for i, group in enumerate(sorted(GROUPS["tensor"]))}
    tx = optax.chain(descent.optimizer(spec, values))
    state, params = tx.init(PARAMS), PARAMS
    for step in range(3):
        updates, state = jax.jit(tx.update)(PARAMS, state, params)
        np.testing.assert_allclose(updates["dense_0"]["bias"], -(1.0, 10.0, 10.0)[step])
        np.testing.assert_allclose(updates["head"]["kernel"], -(4.0, 40.0, 40.0)[step])
        params = optax.apply_updates(params, updates)


def test_optimizer_refuses_other_params():
    spec = RatesSpec("tensor")
    tx = descent.optimizer(spec, hyperparameters.actual(spec, hyperparameters.initial_raw(spec, PARAMS)))
    with pytest.raises(ConfigError, match="expected a rate for 'other/kernel'"):
        tx.init({"other": {"kernel": jnp.ones(2)}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "neuron"}, "rates.granularity: expected one of"),
        ({"extend": "repeat"}, "rates.extend: expected one of"),
        ({"adapts": "tail"}, "rates.adapts: expected one of"),
        ({"steps": 0}, "inner.steps: expected at least 1"),
        ({"initial": 0.0}, "inner.rate: expected 0 < rate"),
        ({"initial": 1e4}, "inner.rate: expected 0 < rate"),
        ({"initial": float("nan")}, "inner.rate: expected 0 < rate"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        RatesSpec(**settings)
