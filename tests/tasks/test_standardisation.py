"""Standardised tables: means of meta-training tasks only, numbers in the user's units on the outside, kept in files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metalr
from metalr.config import EvaluationConfig, OuterConfig
from metalr.errors import ConfigError, DataError
from metalr.runs.progress import ConsoleReporter
from metalr.tasks import Standardisation

RNG = np.random.default_rng(0)
STORE = np.repeat(np.arange(20), 12)
X = {"size": RNG.uniform(100, 900, (240, 2)), "open": RNG.integers(0, 2, (240, 1))}
Y = 5000 + X["size"].sum(1) * (1 + STORE % 3)


def tasks(standardise="both", **options):
    return metalr.Tasks.from_arrays(X, Y, STORE, shot=5, query=5, standardise=standardise, **options)


def network():
    def init(key):
        return {"head": {"kernel": 0.1 * jax.random.normal(key, (3, 1)), "bias": jnp.zeros(1)}}

    def apply(params, x):
        both = jnp.concatenate([x["size"], x["open"]], axis=1)
        return both @ params["head"]["kernel"] + params["head"]["bias"][None]

    return metalr.models.from_function(init, apply)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return metalr.meta_train(
        tasks(), network(), objective="squared_error", outer_steps=200, out=tmp_path_factory.mktemp("s") / "run",
        outer=OuterConfig(validate_every=50), evaluation=EvaluationConfig(episodes=50, validation_episodes=20),
        reporter=ConsoleReporter(quiet=True),
    )  # fmt: skip


def test_means_are_of_the_meta_training_tasks_only():
    made = tasks()
    kept = np.isin(STORE.astype(str), made.facts["tasks"]["train"])
    assert 0 < kept.sum() < len(STORE)
    np.testing.assert_allclose(made.standardisation.x_mean["size"], X["size"][kept].mean(0), rtol=1e-6)
    np.testing.assert_allclose(made.standardisation.y_deviation, Y[kept].std(), rtol=1e-6)
    assert made.facts["standardise"] == "both"
    assert tasks("inputs").standardisation.y_mean is None
    assert tasks("none").standardisation is None


def test_rows_of_another_width_are_refused_and_not_broadcast():
    wide = np.arange(24, dtype=np.float32).reshape(8, 3)
    s = Standardisation.of(wide, wide[:, :2], "both")
    for wrong in (wide[:, :1], wide[:, 0], wide[:3, 0]):
        with pytest.raises(DataError, match=r"inputs: expected shape \[n, 3\] as in training, got"):
            s.inputs(wrong)
    for wrong in (wide[:, :1], wide[:2, 0]):
        with pytest.raises(DataError, match=r"support_y: expected shape \[n, 2\] as in training, got"):
            s.targets(wrong, "support_y")
    one = Standardisation.of(wide, wide[:, :1], "both")
    np.testing.assert_array_equal(one.targets(wide[:, 0]), one.targets(wide[:, :1])[:, 0])
    flat = Standardisation.of(wide, wide[:, 0], "both")
    np.testing.assert_array_equal(flat.targets(wide[:, 0]), flat.targets(wide[:, :1])[:, 0])


def test_a_constant_of_float64_has_no_deviation():
    s = Standardisation.of(np.full((10, 2), 0.1), np.ones(10), "inputs")
    np.testing.assert_array_equal(s.x_deviation, [1, 1])


def test_there_and_back():
    s = Standardisation.of(X, Y, "both")
    np.testing.assert_allclose(s.outputs(s.targets(Y)), Y, rtol=1e-6)
    assert np.abs(np.asarray(s.inputs(X)["size"]).mean(0)).max() < 1e-5
    constant = Standardisation.of(np.full((4, 1), 7.0), Y[:4], "inputs")
    np.testing.assert_array_equal(constant.inputs(np.full((2, 1), 7.0)), np.zeros((2, 1)))
    again = Standardisation.from_named(s.named())
    assert s.same_as(again)
    assert not s.same_as(Standardisation.of(X, Y + 1, "both"))
    assert Standardisation.from_named({}) is None


def test_a_learner_speaks_the_units_of_its_user(learned):
    rows = np.flatnonzero(STORE == 1)
    x = jax.tree.map(lambda v: v[rows], X)
    fast = learned.adapt(jax.tree.map(lambda v: v[:8], x), Y[rows][:8], steps=30)
    predicted = np.asarray(learned.apply(fast, jax.tree.map(lambda v: v[8:], x)))[:, 0]
    assert np.abs(predicted - Y[rows][8:]).mean() < 0.4 * np.abs(Y[rows] - Y.mean()).mean()


def test_metrics_are_in_the_units_of_the_targets(learned):
    """The mse of evaluate is the mean square of what a user would compute by hand."""
    made = tasks("none")
    raw, own = learned.evaluate(made, episodes=20, steps=5), learned.evaluate(tasks(), episodes=20, steps=5)
    np.testing.assert_allclose(raw.mean, own.mean, rtol=1e-3)
    pool, sample = made.sampler("test")
    from metalr.evaluation import protocol

    by_hand = []
    for key in protocol.episode_keys(0, 20):
        e = sample(pool, key)
        by_hand.append(
            np.square(
                np.asarray(learned.apply(learned.adapt(e.support_x, e.support_y), e.query_x))[:, 0] - e.query_y
            ).mean()
        )
    np.testing.assert_allclose(raw.tasks[:, 5], by_hand, rtol=2e-3)


def test_what_was_learned_keeps_it(learned, tmp_path):
    metalr.save(tmp_path / "a", learned)
    again = metalr.load(tmp_path / "a", model=network())
    assert learned.standardisation.same_as(again.standardisation)
    x = jax.tree.map(lambda v: v[:6], X)
    np.testing.assert_array_equal(learned.apply(learned.adapt(x, Y[:6]), x), again.apply(again.adapt(x, Y[:6]), x))
    np.testing.assert_allclose(again.evaluate(tasks(), 10).mean, learned.evaluate(tasks(), 10).mean)


def test_what_does_not_fit_is_refused(learned):
    with pytest.raises(ConfigError, match="standardise: expected one of"):
        tasks("all")
    with pytest.raises(ConfigError, match='expected float targets with "both", got integers'):
        metalr.Tasks.from_arrays(X, STORE % 2, STORE, standardise="both")
    with pytest.raises(ConfigError, match="their standardisation is another one"):
        learned.evaluate(tasks(seed=5), episodes=5)
    with pytest.raises(ConfigError, match="mixture: expected task sets that are standardised alike"):
        metalr.tasks.mixture(tasks(), tasks("none"))
    with pytest.raises(ConfigError, match=r'standardise: expected names of x without "/", got \'km/h\''):
        Standardisation.of({"km/h": np.ones((4, 2))}, Y[:4], "inputs")
    with pytest.raises(DataError, match="x: expected the structure"):
        learned.apply(learned.init, X["size"])
