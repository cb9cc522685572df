"""Implicit, truncated and forward-mode meta-gradients: against finite differences, closed forms and each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalr import inner, models, outer
from metalr.inner import hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.outer import Evolution, Forward, Implicit, Joint, Reverse, directions
from metalr.types import Episode

MODEL = models.mlp(3, (4, 4, 1), widths=(6,), dropout=0.0)


def _smooth(p, x, key=None):
    hidden = jnp.tanh(x.reshape(len(x), -1) @ p["dense_0"]["kernel"] + p["dense_0"]["bias"][None])
    return hidden @ p["head"]["kernel"] + p["head"]["bias"][None]


SMOOTH = dataclasses.replace(MODEL, name="custom", apply=_smooth, relu_stack=False)  # its minima are not in kinks


def episodes(tasks=2, support=6, dtype=jnp.float64):
    x = jax.random.uniform(jax.random.key(3), (tasks, support + 6, 4, 4, 1), dtype)
    y = jnp.tile(jnp.arange(support + 6) % 3, (tasks, 1))
    return Episode(x[:, :support], y[:, :support], x[:, support:], y[:, support:])


COMPILED = {}  # a program serves all values of the meta-parameters; without jit, every call compiles its loops again


def gradient(spec, method, meta=None, model=MODEL, step_weights=None, **options):
    if meta is None:
        meta = jax.tree.map(lambda v: v.astype(jnp.float64), outer.initial(MODEL, spec, jax.random.key(0)))

    def of(meta, step_weights):
        keys = jax.random.split(jax.random.key(0), 2)
        return outer.meta_gradient(model, spec, meta, episodes(), keys, method, step_weights=step_weights, **options)

    compiled = COMPILED.setdefault((spec, method, id(model), *sorted(options.items())), jax.jit(of))
    return meta, *compiled(meta, step_weights)


def close(a, b, **tolerance):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, **tolerance), a, b)


SPECS = {
    "rates": RatesSpec("layer", steps=12, initial=0.3),
    "schedule": RatesSpec("tensor", steps=12, knots=3, initial=0.3),
    "all": RatesSpec("layer", steps=12, initial=0.3, momentum=0.5, decay=0.01, clip=0.2, batch_size=3),
    "adam": RatesSpec("layer", steps=12, initial=0.03, base="adam", batch_size=3),
    "predicted": RatesSpec("layer", steps=12, initial=0.3, predicted=True, proximal=0.1),
    "horizon": RatesSpec("tensor", steps=5, initial=0.3, horizon_power=0.4),  # at 12 steps
    "size": RatesSpec("layer", steps=5, knots=2, initial=0.3, support_power=-0.4, support=2),  # with 6 examples
}
HORIZON = {"horizon": 12}


@pytest.mark.parametrize("name", SPECS)
def test_forward_mode_gives_the_exact_gradient_of_the_rates(name):
    with jax.enable_x64(True):
        spec = SPECS[name]
        options = HORIZON if name == "horizon" else {}
        _, reverse, metrics = gradient(spec, Reverse(), plain=True, **options)
        _, forward, metrics_too = gradient(spec, Forward(), **options)
        close(forward.rates, reverse.rates, rtol=1e-7, atol=1e-11)
        close(metrics, metrics_too, rtol=1e-9)
        if name == "rates":  # the init's is first order: what it is if no inner step depended on the params
            _, first, _ = gradient(spec, Reverse(first_order=True), plain=True)
            close(forward.init, first.init, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["rates", "adam"])
def test_evolution_estimates_the_exact_gradient_of_the_rates(name):
    with jax.enable_x64(True):
        _, exact, metrics = gradient(SPECS[name], Forward())
        _, found, metrics_too = gradient(SPECS[name], Evolution(pairs=1000, size=1e-4))
        close(metrics, metrics_too, rtol=1e-3)
        assert all(not leaf.any() for leaf in jax.tree.leaves(found.init))
        a, b = (jax.flatten_util.ravel_pytree(one.rates)[0] for one in (exact, found))
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(a)


@pytest.mark.parametrize("name", ["momo_adam", "cocob", "prodigy", "dog", "mechanize", "rmsprop"])
@pytest.mark.parametrize("method", [Reverse(), Forward()], ids=["reverse", "forward"])
def test_rates_on_any_base_have_a_finite_meta_gradient_where_gradients_are_zero(name, method):
    """Pixels that are blank in all images have a gradient of zero, where square roots have no derivative."""
    spec = RatesSpec("layer", steps=3, initial=1.0, base=name)
    meta = outer.initial(MODEL, spec, jax.random.key(0))
    given = jax.tree.map(lambda v: v.astype(jnp.float32) if v.dtype == jnp.float64 else v, episodes(dtype=jnp.float32))
    blank = given._replace(
        support_x=given.support_x.at[..., 0, :, :].set(0), query_x=given.query_x.at[..., 0, :, :].set(0)
    )
    keys = jax.random.split(jax.random.key(0), 2)
    grads, metrics = jax.jit(lambda meta: outer.meta_gradient(MODEL, spec, meta, blank, keys, method))(meta)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    assert bool(jnp.isfinite(metrics["loss"]))
    assert any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(grads.rates))


def test_rates_on_another_base_after_one_step_against_finite_differences():
    """After one step the base's direction does not depend on the rates, so the meta-gradient is exact."""
    spec = RatesSpec("layer", steps=1, initial=1.0, base="momo_adam")
    with jax.enable_x64(True):
        meta, grads, _ = gradient(spec, Reverse())
        for group in meta.rates:
            losses = []
            for shift in (1e-5, -1e-5):
                moved = meta._replace(rates=meta.rates | {group: meta.rates[group] + shift})
                losses.append(float(gradient(spec, Reverse(), moved)[2]["loss"]))
            np.testing.assert_allclose(grads.rates[group], (losses[0] - losses[1]) / 2e-5, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["all", "adam", "predicted", "schedule", "horizon", "size"])
def test_every_hyperparameter_against_finite_differences(name):
    with jax.enable_x64(True):
        spec = SPECS[name]
        options = HORIZON if name == "horizon" else {}
        meta, grads, _ = gradient(spec, Reverse(remat=True), **options)
        for leaf, value in meta.rates.items():
            noise = jax.random.normal(jax.random.key(1), value.shape, jnp.float64)

            def loss(t, leaf=leaf, value=value, noise=noise):
                moved = meta._replace(rates=meta.rates | {leaf: value + t * noise})
                return gradient(spec, Reverse(), moved, plain=True, **options)[2]["loss"]

            numeric = (loss(1e-6) - loss(-1e-6)) / 2e-6
            np.testing.assert_allclose(jnp.vdot(grads.rates[leaf], noise), numeric, rtol=1e-4, atol=1e-8, err_msg=leaf)


def test_a_horizon_is_the_number_of_steps_that_are_taken():
    """Without a power, a horizon of n steps is a spec of n steps; the factored form agrees."""
    with jax.enable_x64(True):
        _, expected, metrics = gradient(RatesSpec("layer", steps=7, initial=0.3), Reverse(), plain=True)
        for options in ({"plain": True}, {}):
            _, found, metrics_too = gradient(RatesSpec("layer", steps=3, initial=0.3), Reverse(), horizon=7, **options)
            close(found, expected, rtol=1e-7, atol=1e-10)
            close(metrics, metrics_too, rtol=1e-7)


def test_truncation_to_all_steps_is_exact_and_to_fewer_is_not():
    with jax.enable_x64(True):
        spec = SPECS["schedule"]
        _, exact, _ = gradient(spec, Reverse(), plain=True)
        _, whole, _ = gradient(spec, Reverse(remat=True, last=12))
        close(whole, exact, rtol=1e-9, atol=1e-12)
        _, few, metrics = gradient(spec, Reverse(remat=True, last=3))
        assert all(np.isfinite(v).all() and (np.asarray(v) != 0).any() for v in jax.tree.leaves(few))
        first_knots = np.array([few.rates[group][0] for group in few.rates])
        assert (first_knots == 0).all()  # the first steps are constants
        close(metrics, gradient(spec, Reverse())[2], rtol=1e-9)


@pytest.mark.parametrize("adapts", ["all", "head", "body"])
def test_implicit_gradient_at_a_minimum_is_the_derivative_through_the_path(adapts):
    """Enough steps to reach the proximal minimum: iMAML's gradient is then that of the whole adaptation."""
    with jax.enable_x64(True):
        spec = RatesSpec("shared", steps=400, initial=0.2, proximal=2.0, adapts=adapts)
        _, exact, _ = gradient(spec, Reverse(remat=True), model=SMOOTH)
        _, implicit, _ = gradient(spec, Implicit(solver_steps=100), model=SMOOTH)
        close(implicit.init, exact.init, rtol=1e-4, atol=1e-6)
        _, coarse, _ = gradient(spec, Implicit(solver_steps=1), model=SMOOTH)
        assert not np.allclose(coarse.init["head"]["kernel"], exact.init["head"]["kernel"], rtol=1e-4)


def test_conjugate_gradient_ends_when_nothing_is_left():
    """Many more steps than are needed, and a target of zero."""
    matrix = jnp.array([[3.0, 1.0], [1.0, 2.0]])
    for target in (jnp.array([1.0, -2.0]), jnp.zeros(2)):
        found = directions._conjugate_gradient(lambda x: matrix @ x, target, jnp.zeros(2), 500)
        np.testing.assert_allclose(found, jnp.linalg.solve(matrix, target), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [Implicit(), Forward()])
def test_directions_compile_for_convolutions(method):
    """The form that CPUs run has no forward mode."""
    model = models.conv4(3, (4, 4, 1), channels=2, layers=1, norm="none")
    spec = RatesSpec("layer", steps=2, initial=0.1, proximal=1.0)
    meta, tasks = outer.initial(model, spec, jax.random.key(0)), episodes(dtype=jnp.float32)
    keys = jax.random.split(jax.random.key(0), 2)

    def found(model):
        return jax.jit(lambda meta: outer.meta_gradient(model, spec, meta, tasks, keys, method))(meta)

    close(found(model), found(dataclasses.replace(model, cpu_apply=None)), rtol=2e-3, atol=1e-5)


def test_first_order_leaves_second_derivatives_out_in_forward_mode_too():
    with jax.enable_x64(True):
        spec = SPECS["all"]
        _, reverse, _ = gradient(spec, Reverse(first_order=True), plain=True)
        _, forward, _ = gradient(spec, Forward(first_order=True))
        close(forward.rates, reverse.rates, rtol=1e-7, atol=1e-11)
        _, exact, _ = gradient(spec, Forward())
        assert not np.allclose(exact.rates["head"], forward.rates["head"], rtol=1e-3)


@pytest.mark.parametrize("method", [Reverse(remat=True, last=10), Forward(), Evolution()])
def test_memory_does_not_grow_with_steps(method):
    """1,000 inner steps take at most twice the memory of 10."""

    model = models.mlp(3, (4, 4, 1), widths=(1024,), dropout=0.0)  # params outweigh the counting of steps

    def bytes_of(steps):
        spec = RatesSpec("layer", steps=steps, initial=0.1, knots=4, batch_size=3)
        meta = outer.initial(model, spec, jax.random.key(0))
        compiled = jax.jit(lambda meta, e: outer.meta_gradient(
            model, spec, meta, e, jax.random.split(jax.random.key(0), 2), method
        )).lower(meta, episodes(dtype=jnp.float32)).compile()  # fmt: skip
        orders = 4 * 6 * (steps // 2)  # which images are in which minibatch
        return compiled.memory_analysis().temp_size_in_bytes - orders

    assert bytes_of(1000) <= 2 * bytes_of(10)


def test_step_weights_are_the_multi_step_loss():
    with jax.enable_x64(True):
        for plain in (True, False):
            spec = RatesSpec("tensor", per_step=True, steps=3, initial=0.3)
            weights = jnp.array([0.2, 0.3, 0.5])
            meta, grads, _ = gradient(spec, Reverse(), step_weights=weights, plain=plain)
            expected = jax.tree.map(jnp.zeros_like, meta)
            for steps, weight in zip((1, 2, 3), weights, strict=True):
                short = RatesSpec("tensor", per_step=True, steps=steps, initial=0.3)
                cut = meta._replace(rates={k: v[:steps] for k, v in meta.rates.items()})
                _, part, _ = gradient(short, Reverse(), cut, plain=True)
                padded = {k: jnp.pad(v, (0, 3 - steps)) for k, v in part.rates.items()}
                expected = jax.tree.map(lambda a, b, w=weight: a + w * b, expected, part._replace(rates=padded))
            close(grads, expected, rtol=1e-9, atol=1e-12)


def test_a_multi_step_loss_of_outputs_that_are_a_tree():
    """As of the same network with one output."""
    plain = models.from_function(lambda key: {"w": jnp.full((16, 3), 0.1)}, lambda p, x: x.reshape(len(x), -1) @ p["w"])
    tree = models.from_function(plain.init, lambda params, x: {"logits": plain.apply(params, x)})
    spec, weights = RatesSpec("layer", steps=2, initial=0.1), jnp.array([0.4, 0.6])
    error = inner.OBJECTIVES["cross_entropy"].loss
    found = []
    for model, loss in ((plain, error), (tree, lambda outputs, y: error(outputs["logits"], y))):
        meta = outer.initial(model, spec, jax.random.key(0))
        objective = inner.Objective("own", loss, targets="classes")
        keys = jax.random.split(jax.random.key(0), 2)
        found.append(
            outer.meta_gradient(
                model, spec, meta, episodes(dtype=jnp.float32), keys, Reverse(), objective=objective,
                step_weights=weights,
            )[0]
        )  # fmt: skip
    close(*found, rtol=1e-6)


def test_auto_picks_by_memory():
    big = models.mlp(10, widths=(512, 512))
    picked = [outer.choose_derivative(RatesSpec("layer", steps=n), big) for n in (5, 50, 5000)]
    assert picked == [Reverse(), Reverse(remat=True), Forward()]
    assert outer.choose_derivative(RatesSpec("parameter", steps=5000), big) == Reverse(remat=True, last=10)
    assert outer.choose_derivative(RatesSpec("layer"), big, first_order=True) == Reverse(first_order=True)
    assert hyperparameters.layers(RatesSpec("layer"), MODEL.init(jax.random.key(0))) == ["dense_0", "head"]


@pytest.mark.parametrize("granularity", ["layer", "parameter"])
@pytest.mark.parametrize("steps", [1, 2, 5, 16, 17, 200, 5000])
@pytest.mark.parametrize("width", [16, 1000, 8000])
def test_auto_keeps_a_bounded_number_of_bytes_at_every_length(granularity, steps, width):
    """The copies of params that a derivative keeps: within the bound, or one."""
    model, spec = models.mlp(10, widths=(width, width)), RatesSpec(granularity, steps=steps)
    init = jax.eval_shape(model.init, jax.random.key(0))
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(init))
    numbers = sum(leaf.size for leaf in outer.initial_shapes(model, spec).rates.values())
    chosen = outer.choose_derivative(spec, model)
    copies = numbers if isinstance(chosen, Forward) else min(chosen.last or steps, steps)
    assert copies * size <= outer.AT_ONCE_BYTES or copies == 1


def test_joint_is_the_gradient_of_the_pooled_loss():
    from metalr import inner

    with jax.enable_x64(True):
        meta, found, metrics = gradient(SPECS["rates"], Joint(), model=SMOOTH)
        tasks = episodes()
        x = jnp.concatenate([tasks.support_x, tasks.query_x], axis=1).reshape(-1, 4, 4, 1)
        y = jnp.concatenate([tasks.support_y, tasks.query_y], axis=1).reshape(-1)
        expected = jax.grad(lambda p: inner.cross_entropy(_smooth(p, x), y))(meta.init)
        close(found.init, expected, rtol=1e-9)
        assert all(not np.any(v) for v in jax.tree.leaves(found.rates))
        logits = jax.vmap(lambda q: _smooth(meta.init, q))(tasks.query_x)
        close(metrics["loss"], jax.vmap(inner.cross_entropy)(logits, tasks.query_y).mean(), rtol=1e-9)
