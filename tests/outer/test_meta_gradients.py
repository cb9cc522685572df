"""Meta-gradients: closed forms, finite differences, and one contract over the whole table of algorithms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalr import inner, models, outer, tasks
from metalr.errors import ConfigError
from metalr.evaluation import protocol
from metalr.inner import hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.outer import Forward, Implicit, Joint, Reptile, Reverse, algorithms, loop
from metalr.types import Episode, MetaParams

# A quadratic: the "network" puts out its weights, the loss is curvature/2 * |w - target of the label|^2.
CURVATURE = 1.7
TARGETS = jnp.array([[1.0, -2.0, 0.5], [0.3, 0.8, -1.0]])
QUADRATIC = models.Model(
    name="custom",
    init=lambda key: {"layer": {"w": jax.random.normal(key, (3,))}},
    apply=lambda params, x, key=None: jnp.broadcast_to(params["layer"]["w"][None], (x.shape[0], 3)),
    input_shape=(1, 1, 1),
    way=3,
)
IMAGE = jnp.zeros((1, 1, 1, 1, 1))
EPISODE = Episode(IMAGE, jnp.array([[0]]), IMAGE, jnp.array([[1]]))


def quadratic_loss(w, labels):
    return CURVATURE / 2 * jnp.sum(jnp.square(w - TARGETS[labels])) / w.shape[0]


def quadratic_gradient(steps, rate, method=Reverse()):  # noqa: B008 - frozen
    spec = RatesSpec("shared", steps=steps, initial=rate)
    meta = outer.initial(QUADRATIC, spec, jax.random.key(0))
    quadratic = inner.Objective("quadratic", quadratic_loss)
    keys = jax.random.split(jax.random.key(0), 1)
    grads, _ = outer.meta_gradient(QUADRATIC, spec, meta, EPISODE, keys, method, objective=quadratic)
    return np.asarray(meta.init["layer"]["w"]), np.asarray(grads.init["layer"]["w"]), float(grads.rates["all"])


@pytest.mark.numerical
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_maml_fomaml_and_rate_gradients_in_closed_form(steps):
    rate, a = 0.2, CURVATURE
    (support, query), shrink = np.asarray(TARGETS), 1 - rate * a
    w, maml, rate_gradient = quadratic_gradient(steps, rate)
    adapted = support + shrink**steps * (w - support)
    np.testing.assert_allclose(maml, shrink**steps * a * (adapted - query), rtol=1e-5)
    # d adapted / d rate = -steps a shrink^(steps-1) (w - support); the learned number is log(rate)
    by_rate = a * (adapted - query) @ (-steps * a * shrink ** (steps - 1) * (w - support))
    np.testing.assert_allclose(rate_gradient, rate * by_rate, rtol=1e-5)
    # First order: the init's gradient passes through unchanged; each step's gradient is a constant times the rate.
    w, fomaml, rate_gradient = quadratic_gradient(steps, rate, Reverse(first_order=True))
    np.testing.assert_allclose(fomaml, a * (adapted - query), rtol=1e-5)
    inner_gradients = sum(a * shrink**s * (w - support) for s in range(steps))
    np.testing.assert_allclose(rate_gradient, rate * a * (adapted - query) @ -inner_gradients, rtol=1e-5)


@pytest.mark.numerical
def test_reptile_points_from_the_adapted_params():
    w, direction, rate_gradient = quadratic_gradient(3, 0.2, Reptile())
    support = np.asarray(TARGETS[0])
    np.testing.assert_allclose(direction, w - (support + (1 - 0.2 * CURVATURE) ** 3 * (w - support)), rtol=1e-5)
    assert rate_gradient == 0


def spec_of(row, **settings):
    return RatesSpec(
        row.granularity, per_step=row.per_step, adapts=row.adapts, predicted=row.predicted, decay=row.decay,
        proximal=row.proximal, steps=2, initial=0.3, **settings,
    )  # fmt: skip


def test_all_that_is_drawn_at_the_start_is_the_seeds_own():
    """What all seeds share, no interval over seeds sees."""
    spec = RatesSpec("layer", steps=2, predicted=True)
    one, same, other = (outer.initial(SMOOTH, spec, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    for name in ("dense_0", "head"):
        assert not np.array_equal(one.init[name]["kernel"], other.init[name]["kernel"])
    assert not np.array_equal(one.rates["predict:hidden/kernel"], other.rates["predict:hidden/kernel"])
    assert not np.any(other.rates["predict:out/kernel"])  # factors of one: the rates as they are


def method_of(row):
    others = {"joint": Joint(), "reptile": Reptile(), "implicit": Implicit()}
    return others.get(row.meta_gradient, Reverse(row.first_order))


def toy_episodes(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(5), 2)
    x = jax.random.uniform(keys[0], (3, 8, 4, 4, 1), dtype)
    y = jnp.tile(jnp.arange(8) % 2, (3, 1))
    return Episode(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:])


SMOOTH = models.Model(  # no kinks, so that finite differences are good to many digits
    name="custom",
    init=lambda key: {
        "dense_0": {"kernel": 0.3 * jax.random.normal(key, (16, 4)), "bias": jnp.zeros(4)},
        "head": {"kernel": 0.3 * jax.random.normal(jax.random.fold_in(key, 1), (4, 2)), "bias": jnp.zeros(2)},
    },
    apply=lambda p, x, key=None: (
        jnp.tanh(x.reshape(x.shape[0], -1) @ p["dense_0"]["kernel"] + p["dense_0"]["bias"][None]) @ p["head"]["kernel"]
        + p["head"]["bias"][None]
    ),
    input_shape=(4, 4, 1),
    way=2,
)


def _along(t):
    return lambda value, step: value + t * step


SECOND_ORDER = [n for n, row in algorithms.ALGORITHMS.items() if not row.first_order]


@pytest.mark.numerical
@pytest.mark.parametrize("name", SECOND_ORDER)
@pytest.mark.parametrize("positive", [True, False])
def test_finite_differences_for_init_and_rates(name, positive):
    row = algorithms.ALGORITHMS[name]
    with jax.enable_x64(True):
        spec = spec_of(row, positive=positive)
        meta = jax.tree.map(lambda v: v.astype(jnp.float64), outer.initial(SMOOTH, spec, jax.random.key(0)))
        episodes, keys = toy_episodes(jnp.float64), jax.random.split(jax.random.key(0), 3)
        gradient = jax.jit(lambda meta: outer.meta_gradient(SMOOTH, spec, meta, episodes, keys))
        grads, _ = gradient(meta)
        for part in ("init", "rates"):
            leaves, tree = jax.tree.flatten(getattr(meta, part))
            noise = [jax.random.normal(jax.random.key(i), leaf.shape, jnp.float64) for i, leaf in enumerate(leaves)]
            direction = jax.tree.unflatten(tree, noise)

            def loss(t, part=part, direction=direction):
                moved = jax.tree.map(_along(t), getattr(meta, part), direction)
                return gradient(meta._replace(**{part: moved}))[1]["loss"]

            numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
            exact = sum(jnp.vdot(g, u) for g, u in zip(jax.tree.leaves(getattr(grads, part)), noise, strict=True))
            np.testing.assert_allclose(exact, numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", list(algorithms.ALGORITHMS))
def test_batched_tasks_are_a_python_loop(name):
    """A ReLU stack, so that the fast form is met where there is one; and a network that has none."""
    row, spec = algorithms.ALGORITHMS[name], spec_of(algorithms.ALGORITHMS[name])
    model = SMOOTH if name in ("maml", "alfa") else models.mlp(2, (4, 4, 1), widths=(6,), dropout=0.0)
    with jax.enable_x64(True):
        meta = jax.tree.map(lambda v: v.astype(jnp.float64), outer.initial(model, spec, jax.random.key(0)))
        episodes, keys = toy_episodes(jnp.float64), jax.random.split(jax.random.key(0), 3)
        fast, plain = (
            jax.jit(functools.partial(outer.meta_gradient, model, spec, method=method_of(row), plain=plain))
            for plain in (False, True)
        )
        together, metrics = fast(meta, episodes, keys)
        alone = [plain(meta, jax.tree.map(lambda v, i=i: v[i : i + 1], episodes), keys[i : i + 1]) for i in range(3)]
        mean = jax.tree.map(lambda *v: sum(v) / 3, *alone)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), together, mean[0])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), metrics, mean[1])


@pytest.mark.parametrize("name", list(algorithms.ALGORITHMS))
def test_contract_of_every_algorithm(name, blobs):
    """Learns on a toy family; compiles once; every leaf that should move does; works in evaluation."""
    row = algorithms.ALGORITHMS[name]
    # The implicit gradient is right near a minimum only, so adaptation has to get there.
    changed = {"steps": 16, "initial": 0.1} if row.meta_gradient == "implicit" else {"steps": 3}
    spec = dataclasses.replace(spec_of(row), **changed)
    # Nothing is the same in all permuted tasks, so there is nothing to pre-train on jointly.
    splits = tasks.make_splits(blobs, "rotated" if row.meta_gradient == "joint" else "permuted")
    model = models.mlp(10, blobs.shape, widths=(32,), dropout=0.0)
    pool, sample = tasks.make_sampler(splits.train, 10, 3, 5)
    learned_rates = 3e-2 if row.learned else None
    optimizer = loop.make_optimizer(steps=120, init_rate=2e-3, rates_rate=learned_rates, schedule="constant")
    state = loop.start(model, spec, optimizer, jax.random.key(0))
    first = jax.tree.map(np.asarray, state.meta)
    chunk = loop.make_chunk(model, spec, method_of(row), optimizer, sample, meta_batch=8)
    before = chunk._cache_size()
    for _ in range(6):
        state, _ = chunk(state, pool, jax.random.key(1), 20)
    assert chunk._cache_size() == before + 1, "recompiled"

    def moved(a, b):
        """The share of numbers that are others now. A hidden unit may be dead, a pixel blank in every image."""
        return jax.tree.map(lambda a, b: float((np.asarray(a) != np.asarray(b)).mean()), a, b)

    init_moved = moved(first.init, state.meta.init)
    assert min(jax.tree.leaves(init_moved)) > 0.5, init_moved
    rates_moved = moved(first.rates, state.meta.rates)
    if row.learned:
        assert min(jax.tree.leaves(rates_moved)) > (0.5 if row.granularity == "parameter" or row.predicted else 0.99)
    else:
        assert max(jax.tree.leaves(rates_moved)) == 0, rates_moved
    test_pool, test_sample = tasks.make_sampler(splits.test, 10, 3, 5)
    evaluator = protocol.make_evaluator(model, spec, test_sample, spec.steps)
    keys = protocol.episode_keys(0, 40)
    scores = [
        evaluator(test_pool, m.init, hyperparameters.actual(spec, m.rates), keys).mean for m in (first, state.meta)
    ]
    assert abs(scores[0][0] - 0.1) < 0.06  # before adaptation: chance
    assert scores[1][-1] > scores[0][-1] + 0.05, (scores[0][-1], scores[1][-1])


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ({}, {"horizon": 0}, "horizon: expected at least 1, got 0"),
        ({}, {"method": Forward(), "step_weights": jnp.ones(2)}, "step_weights: expected None with Forward"),
        ({}, {"method": Reverse(last=1), "step_weights": jnp.ones(2)}, "step_weights: expected None with Reverse"),
        ({}, {"step_weights": jnp.ones(3)}, r"step_weights: expected one for each of 2 steps, got shape \[3\]"),
        ({}, {"method": Implicit()}, "inner.proximal: expected a start with Implicit"),
    ],
)
def test_what_a_way_cannot_do_is_refused_and_not_ignored(spec, settings, message):
    spec = RatesSpec("layer", steps=2, **spec)
    meta = outer.initial(SMOOTH, spec, jax.random.key(0))
    with pytest.raises(ConfigError, match=message):
        outer.meta_gradient(SMOOTH, spec, meta, toy_episodes(), jax.random.split(jax.random.key(0), 3), **settings)


@pytest.mark.parametrize("method", [Forward(), Reptile(), Joint(), Implicit()])
def test_a_head_that_is_made_for_each_task_takes_a_way_that_goes_through_it(method):
    model = models.build("mlp", 2, (4, 4, 1), widths=(3,), head_start="zero")
    spec = RatesSpec("layer", steps=2, proximal=0.5)
    meta = outer.initial(model, spec, jax.random.key(0))
    with pytest.raises(ConfigError, match="inner.head_start: expected 'learned' with"):
        outer.meta_gradient(model, spec, meta, toy_episodes(), jax.random.split(jax.random.key(0), 3), method)


def test_dropout_is_active_in_meta_training():
    model = models.mlp(2, (4, 4, 1), widths=(8,), dropout=0.5)
    spec = RatesSpec("layer", steps=2)
    meta = outer.initial(model, spec, jax.random.key(0))
    losses = [
        float(outer.meta_gradient(model, spec, meta, toy_episodes(), jax.random.split(jax.random.key(s), 3))[1]["loss"])
        for s in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.numerical
def test_remat_changes_nothing():
    spec = RatesSpec("layer", steps=10)
    meta = outer.initial(SMOOTH, spec, jax.random.key(0))
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = (
        outer.meta_gradient(SMOOTH, spec, meta, toy_episodes(), keys, Reverse(remat=remat)) for remat in (False, True)
    )
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-5, atol=1e-6), a, b)


def test_meta_params_is_a_pytree_of_init_and_rates():
    meta = outer.initial(SMOOTH, RatesSpec("layer"), jax.random.key(0))
    assert isinstance(jax.tree.map(lambda v: v, meta), MetaParams)
    assert inner.accuracy(jnp.eye(2), jnp.array([0, 0])) == 0.5


def test_unknown_algorithm():
    with pytest.raises(ConfigError, match=r"inner.algorithm: expected one of .*'maml'.*got 'mamml'"):
        algorithms.algorithm_row("mamml")
