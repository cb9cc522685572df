"""A learner on held-out tasks: what it evaluates is what it adapts, and tasks that it cannot take are refused."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metalr
from metalr import inner, models, outer
from metalr.config import EvaluationConfig
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


def test_a_table_is_judged_over_its_tasks_and_not_over_episodes():
    rng = np.random.default_rng(0)
    x, task = rng.normal(size=(400, 6)), np.repeat(np.arange(20), 20)
    y = x[:, :1] * np.linspace(1, 9, 20)[task][:, None]
    tasks = metalr.Tasks.from_arrays(x, y, task, shot=5, query=5, test=0.3)
    learned = learner()
    few, many = (learned.evaluate(tasks, episodes=episodes, steps=1) for episodes in (60, 2000))
    assert len({*many.groups.tolist()}) == 6
    assert many.ci95[1] > 0.5 * few.ci95[1]
    by_task = [many.tasks[many.groups == group, 1].mean() for group in range(6)]
    np.testing.assert_allclose(many.ci95[1], metalr.evaluation.protocol.half_width(np.array(by_task)), rtol=0.15)


def test_a_learner_that_standardises_is_judged_over_tasks_too():
    rng = np.random.default_rng(0)
    x, task = rng.normal(size=(400, 6)), np.repeat(np.arange(20), 20)
    y = x[:, :1] * np.linspace(1, 9, 20)[task][:, None]
    plain, own = (
        metalr.Tasks.from_arrays(x, y, task, shot=5, query=5, test=0.3, standardise=choice)
        for choice in ("none", "both")
    )
    learned = dataclasses.replace(learner(), standardisation=own.standardisation)
    curves = [learned.evaluate(tasks, episodes=60, steps=1) for tasks in (plain, own)]
    np.testing.assert_allclose(curves[0].tasks, curves[1].tasks, rtol=1e-4)
    np.testing.assert_allclose(curves[0].ci95, curves[1].ci95, rtol=1e-3)
    np.testing.assert_array_equal(curves[0].groups, curves[1].groups)


def test_nothing_is_no_support_set():
    learned = learner()
    with pytest.raises(DataError, match="support_x: expected one example or more, got none"):
        learned.adapt(np.zeros((0, 6)), np.zeros((0, 1)))
    with pytest.raises(DataError, match="x: expected one example or more, got none"):
        learned.apply(learned.init, np.zeros((0, 6)))


def test_what_a_network_of_ones_own_does_not_take_is_said_plainly():
    model = models.from_function(
        lambda key: {"head": {"kernel": jnp.ones((3, 1))}}, lambda params, x: x["values"] @ params["head"]["kernel"]
    )
    spec = RatesSpec("layer", steps=1, initial=0.1)
    meta = outer.initial(model, spec, jax.random.key(0))
    rates = hyperparameters.actual(spec, meta.rates)
    learned = metalr.Learner(model, spec, meta.init, rates, objective=inner.OBJECTIVES["squared_error"])
    x, y = {"values": np.ones((4, 3))}, np.ones((4, 1))
    fast = learned.adapt(x, y)
    with pytest.raises(DataError, match="support_x: expected inputs that the network takes, .* KeyError: 'values'"):
        learned.adapt({"other": np.ones((4, 3))}, y)
    with pytest.raises(DataError, match="x: expected inputs that the network takes, .* dot_general"):
        learned.apply(fast, {"values": np.ones((4, 5))})


def test_columns_of_a_frame_are_those_of_training_in_their_order():
    frame = pytest.importorskip("pandas").DataFrame(np.ones((4, 6)), columns=list("abcdef"))
    learned = dataclasses.replace(learner(), facts={"features": list("abcdef")})
    learned.adapt(frame, np.ones((4, 1)))
    with pytest.raises(DataError, match=r"support_x: expected the columns \['a', .*, in this order, got \['b', 'a'"):
        learned.adapt(frame[list("bacdef")], np.ones((4, 1)))


def spectra(low, high, standardise="none"):
    """A learner of tasks of classes whose inputs have three axes, and the rows that it was made for."""
    rng = np.random.default_rng(0)
    x = rng.uniform(low, high, (120, 4, 5, 2)).astype(np.float32)
    y, task = np.tile(np.arange(3), 40), np.repeat(np.arange(6), 20)
    made = metalr.Tasks.from_arrays(x, y, task, shot=6, query=6, standardise=standardise)
    model = models.from_linen(nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(3)]), x[:1], head="layers_1")
    return made, model, x, y


@pytest.mark.parametrize(("low", "high", "standardise"), [(-3, 3, "none"), (0, 1, "inputs"), (-3, 3, "inputs")])
def test_inputs_of_three_axes_are_taken_as_training_had_them(low, high, standardise, tmp_path):
    """Spectrograms and bands of satellites are no pixels: in their own units, standardised as in training."""
    made, model, x, y = spectra(low, high, standardise)
    learned = metalr.meta_train(
        made, model, steps=1, outer_steps=2, meta_batch=2, out=tmp_path / "a", evaluation=EvaluationConfig(4, 4)
    )
    assert not learned.classifies_images
    given = x if made.standardisation is None else np.asarray(made.standardisation.inputs(x))
    by_hand = jax.tree.map(
        lambda p, g: p - learned.rates["layers_1"] * g, learned.init,
        jax.grad(lambda p: inner.cross_entropy(model.apply(p, given[:6]), y[:6]))(learned.init),
    )  # fmt: skip
    fast = learned.adapt(x[:6], y[:6], 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), fast, by_hand)
    for outputs in (learned.apply(fast, x), learned.predictor(x[:6], y[:6], 1)(x)):
        np.testing.assert_allclose(outputs, model.apply(by_hand, given), rtol=1e-3, atol=1e-5)


def test_images_of_ones_own_are_taken_in_all_forms(tmp_path):
    made, model, x, y = spectra(0, 1)
    learned = metalr.meta_train(
        made, model, steps=1, outer_steps=2, meta_batch=2, out=tmp_path / "a", evaluation=EvaluationConfig(4, 4)
    )
    assert learned.classifies_images
    bytes_ = np.round(255 * x).astype(np.uint8)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        learned.adapt(bytes_[:6], y[:6]), learned.adapt(bytes_[:6].astype(np.float32) / 255, y[:6]),
    )  # fmt: skip


def test_an_objective_of_ones_own_on_classes_has_the_checks_of_classes():
    mine = inner.Objective("mine", lambda logits, labels: inner.cross_entropy(logits, labels), targets="classes")
    model = models.mlp(3, (2, 2, 1), widths=(4,))
    spec = RatesSpec("layer", steps=2)
    init = model.init(jax.random.key(0))
    rates = hyperparameters.actual(spec, hyperparameters.initial_raw(spec, init))
    own, known = (metalr.Learner(model, spec, init, rates, objective=of) for of in (mine, inner.CROSS_ENTROPY))
    x = np.random.default_rng(0).integers(0, 256, (6, 2, 2, 1), np.uint8)
    y = np.arange(6) % 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), own.adapt(x, y), known.adapt(x, y))
    for wrong in (y - 1, y + 1):
        with pytest.raises(DataError, match=r"support_y: expected labels 0..2"):
            own.adapt(x, wrong)


def test_targets_have_the_shape_of_the_outputs():
    learned = learner()
    x, y = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32), np.arange(4, dtype=np.float32)
    jax.tree.map(np.testing.assert_array_equal, learned.adapt(x, y), learned.adapt(x, y[:, None]))
    for wrong in (np.stack([y, y], 1), y[:, None, None]):
        with pytest.raises((ConfigError, DataError), match="expected outputs of the targets' shape"):
            learned.adapt(x, wrong)
    with pytest.raises(
        DataError, match=r"expected shape \[n, 6\], got \[2, 2, 6\]; jax.vmap\(learned.adapt\) takes several"
    ):
        learned.adapt(x.reshape(2, 2, 6), y.reshape(2, 2))
    several = jax.vmap(learned.adapt)(x.reshape(2, 2, 6), y.reshape(2, 2))
    for task in 0, 1:
        alone = learned.adapt(x[2 * task :][:2], y[2 * task :][:2])
        jax.tree.map(lambda a, b, task=task: np.testing.assert_allclose(a[task], b, rtol=1e-5), several, alone)
    with pytest.raises(ConfigError, match=r"tasks: expected a metalr.Tasks, got NoneType"):
        learned.evaluate(None)
    for seed in (1.5, -1, 2**32):
        with pytest.raises(ConfigError, match=r"evaluation seed: expected 0 <= seed < 2\^32, got"):
            learned.evaluate(lines(), 5, seed=seed)
