"""Heads that fit any number of classes: their formulas and gradients; learners that meet other numbers of classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metalr
from metalr import inner, models, outer
from metalr.data import transforms
from metalr.errors import ConfigError, DataError
from metalr.evaluation import protocol
from metalr.inner import descent, hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.models import heads
from metalr.outer import Reverse
from metalr.types import Episode

SHAPE = (4, 4, 1)
Y = jnp.array([0, 0, 1, 1, 2, 2])
X = jax.random.uniform(jax.random.key(3), (6, *SHAPE))


def model(name, kind="mlp"):
    settings = {"mlp": {"widths": (8,)}, "conv4": {"channels": 3, "layers": 2}}[kind]
    return models.build(kind, 3, SHAPE, **settings, head_start=name)


def test_prototypes_are_the_nearest_mean():
    """Logits are minus the squared distance to the class's mean features, up to what all classes share."""
    net = model("prototypes")
    fast = net.begin(net.init(jax.random.key(0)), X, Y)
    features = jax.nn.relu(X.reshape(6, -1) @ fast["dense_0"]["kernel"] + fast["dense_0"]["bias"][None])
    centres = jnp.stack([features[c == Y].mean(0) for c in range(3)])
    distances = jnp.square(features[:, None] - centres[None]).sum(-1)
    logits = net.apply(fast, X)
    expected = -distances + jnp.square(features).sum(-1, keepdims=True)
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=1e-5)


def test_with_views_the_means_are_over_copies_too():
    plain, net = model("prototypes"), models.build("mlp", 3, SHAPE, widths=(8,), head_start="prototypes", views=3)
    init = net.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(0), 3)
    copies = [transforms.each_its_own(key, X, heads.VIEW_STRENGTH, SHAPE) for key in keys]
    assert all(float(jnp.abs(copy - X).max()) > 0.01 for copy in copies)
    expected = plain.begin(init, jnp.concatenate([X, *copies]), jnp.concatenate([Y] * 4))
    jax.tree.map(np.testing.assert_array_equal, net.begin(init, X, Y), expected)
    assert not np.allclose(expected["head"]["kernel"], plain.begin(init, X, Y)["head"]["kernel"])


def test_a_learner_looks_at_views_from_then_on(tmp_path):
    learned = learner("prototypes")
    seeing = learned.with_views(4)
    x, y = np.asarray(X), np.asarray(Y)
    fast = seeing.adapt(x, y)
    assert not np.allclose(fast["head"]["kernel"], learned.adapt(x, y)["head"]["kernel"])
    loaded = metalr.load(metalr.save(tmp_path / "a", seeing))
    card = (tmp_path / "a" / "README.md").read_text()
    assert "for any number of classes (prototypes), of each support image and 4 distorted copies of it" in card
    jax.tree.map(np.testing.assert_array_equal, loaded.adapt(x, y), fast)
    np.testing.assert_allclose(seeing.predictor(x, y)(x), seeing.apply(fast, x), rtol=1e-4, atol=1e-5)
    back = loaded.with_views(0)
    assert back.model.settings == learned.model.settings
    jax.tree.map(np.testing.assert_array_equal, back.adapt(x, y), learned.adapt(x, y))
    two = seeing.adapt(x[:4], y[:4])  # other numbers of classes keep them
    expected = seeing.model.of_way(2).begin(learned.init, jnp.asarray(x[:4]), jnp.asarray(y[:4]))
    assert two["head"]["kernel"].shape == expected["head"]["kernel"].shape == (8, 2)


def test_views_of_what_has_none_are_refused():
    with pytest.raises(ConfigError, match="inner.views: expected 0 with inner.head_start shared"):
        learner("shared").with_views(2)
    with pytest.raises(ConfigError, match="inner.views: expected 0 with inner.head_start learned"):
        models.build("mlp", 3, SHAPE, widths=(8,), views=2)
    with pytest.raises(ConfigError, match=r"inner.views: expected 0 with inputs of shape \(6,\), no images"):
        models.build("mlp", 3, (6,), widths=(8,), head_start="prototypes", views=2)
    with pytest.raises(ConfigError, match="inner.views: expected a whole number"):
        models.build("mlp", 3, SHAPE, widths=(8,), head_start="prototypes", views=0.5)
    own = models.starting_from(model("prototypes"), model("prototypes").init(jax.random.key(0)))
    spec = RatesSpec("layer", steps=1)
    rates = hyperparameters.actual(spec, hyperparameters.initial_raw(spec, own.init(jax.random.key(0))))
    with pytest.raises(ConfigError, match="views: expected a network of metalr's own, got 'custom'"):
        metalr.Learner(own, spec, own.init(jax.random.key(0)), rates).with_views(2)


def test_a_class_that_was_not_shown_is_never_predicted():
    """Also where a fine-tune is traced, and so has as many outputs as in training."""
    net, spec = model("prototypes"), RatesSpec("layer", steps=2, initial=0.1)
    init = net.init(jax.random.key(0))
    learned = metalr.Learner(net, spec, init, hyperparameters.actual(spec, hyperparameters.initial_raw(spec, init)))
    two = jnp.where(Y == 1, 2, Y)  # nothing of class 1
    fast = net.begin(init, X, two)
    assert not (net.apply(fast, X).argmax(-1) == 1).any()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(fast))
    few = X[:4]
    traced = jax.jit(lambda x, y: learned.apply(learned.adapt(x, y), X))(few, Y[:4])
    alone = learned.apply(learned.adapt(np.asarray(few), np.asarray(Y[:4])), np.asarray(X))
    assert (traced.shape, alone.shape) == ((6, 3), (6, 2))
    np.testing.assert_allclose(traced[:, :2], alone, rtol=1e-3, atol=1e-4)
    assert (traced[:, 2] < traced[:, :2].min(1) - 1e3).all()


@pytest.mark.parametrize("name", heads.HEAD_STARTS)
@pytest.mark.parametrize("kind", ["mlp", "conv4"])
def test_heads_start_as_they_say_and_fit_any_number_of_classes(name, kind):
    net = model(name, kind)
    init = net.init(jax.random.key(0))
    assert init["head"]["kernel"].shape[1] == 1
    for ways in (2, 3, 7):
        other = net.of_way(ways)
        fast = other.begin(init, X, Y % ways)
        assert other.apply(fast, X).shape == (6, ways)
        if name != "prototypes":
            columns = np.asarray(fast["head"]["kernel"])
            np.testing.assert_array_equal(columns, columns[:, :1].repeat(ways, 1))
            assert (columns == 0).all() == (name == "zero")


@pytest.mark.parametrize("name", heads.HEAD_STARTS)
def test_a_curve_of_tasks_with_other_numbers_of_classes_is_that_of_their_fine_tunes(blobs, name):
    net = models.build("mlp", 3, (8, 8, 1), widths=(8,), head_start=name)
    spec = RatesSpec("layer", steps=2, initial=0.3)
    init = net.init(jax.random.key(0))
    learned = metalr.Learner(net, spec, init, hyperparameters.actual(spec, hyperparameters.initial_raw(spec, init)))
    for way in (2, 4):
        tasks = metalr.Tasks.from_images(blobs, "classes", way, 2, 3)
        pool, sample = tasks.sampler("test")
        sample = jax.jit(sample)
        curve = learned.evaluate(tasks, episodes=4, steps=2)
        for key, found in zip(protocol.episode_keys(0, 4), curve.tasks, strict=True):
            episode = sample(pool, key)
            fast = learned.adapt(episode.support_x, episode.support_y)
            predicted = learned.apply(fast, episode.query_x).argmax(-1)
            assert found[-1] == pytest.approx(float((predicted == episode.query_y).mean()), abs=1e-6)


def test_a_curve_counts_classes_that_some_tasks_do_not_show():
    """A table in which one class is rare: tasks without it have the outputs that the others have."""
    rng = np.random.default_rng(0)
    x, task = rng.normal(size=(800, 2)).astype(np.float32), np.repeat(np.arange(20), 40)
    y = np.where(rng.random(800) < 0.05, 2, (x[:, 0] > 0).astype(int))
    tasks = metalr.Tasks.from_arrays(x, y, task, shot=6, query=6)
    pool, sample = tasks.sampler("test")
    keys = protocol.episode_keys(0, 20)
    classes = [int(sample(pool, key).support_y.max()) + 1 for key in keys]
    assert {2, 3} == set(classes)
    net, spec = models.build("mlp", 3, (2,), widths=(8,), head_start="shared"), RatesSpec("layer", steps=2, initial=0.3)
    init = net.init(jax.random.key(0))
    learned = metalr.Learner(net, spec, init, hyperparameters.actual(spec, hyperparameters.initial_raw(spec, init)))
    for seed in (0, 3):
        keys = protocol.episode_keys(seed, 20)
        of_three = protocol.make_evaluator(net, spec, sample, 2)(pool, init, learned.rates, keys)
        np.testing.assert_array_equal(learned.evaluate(tasks, 20, 2, seed).tasks, of_three.tasks)


@pytest.mark.parametrize(("name", "views"), [*((name, 0) for name in heads.HEAD_STARTS), ("prototypes", 2)])
def test_the_meta_gradient_goes_through_the_head_start(name, views):
    """Plain form against finite differences, in x64; the factored form against the plain one."""
    with jax.enable_x64(True):
        net = models.build("mlp", 3, (40, 40, 1), widths=(5,), head_start=name, views=views)
        spec = RatesSpec("tensor", steps=2, initial=0.1)
        meta = outer.initial(net, spec, jax.random.key(0))
        meta = jax.tree.map(lambda v: v.astype(jnp.float64), meta)
        x = jax.random.uniform(jax.random.key(1), (1, 12, 40, 40, 1), jnp.float64)
        y = jnp.tile(jnp.arange(6) % 3, 2)[None]
        episodes, keys = Episode(x[:, :6], y[:, :6], x[:, 6:], y[:, 6:]), jax.random.split(jax.random.key(2), 1)

        def found(meta, plain):
            return outer.meta_gradient(net, spec, meta, episodes, keys, Reverse(), plain=plain)

        found = jax.jit(found, static_argnums=1)
        (grads, metrics), (fast, _) = (found(meta, plain) for plain in (True, False))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10), grads, fast)
        noise = jax.tree.map(lambda v: jax.random.normal(jax.random.key(7), v.shape, v.dtype), meta)
        moved = [jax.tree.map(lambda v, n, t=t: v + t * n, meta, noise) for t in (1e-6, -1e-6)]
        numeric = (found(moved[0], True)[1]["loss"] - found(moved[1], True)[1]["loss"]) / 2e-6
        along = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(noise), strict=True))
        np.testing.assert_allclose(along, numeric, rtol=1e-4, atol=1e-7)
        assert np.isfinite(float(metrics["loss"]))


def learner(name="shared"):
    net = model(name)
    spec = RatesSpec("layer", steps=3, initial=0.3)
    meta = outer.initial(net, spec, jax.random.key(0))
    return metalr.Learner(net, spec, meta.init, hyperparameters.actual(spec, meta.rates))


@pytest.mark.parametrize("name", heads.HEAD_STARTS)
def test_a_learner_meets_more_and_fewer_classes_than_it_was_trained_with(name, tmp_path):
    learned = learner(name)
    loaded = metalr.load(metalr.save(tmp_path / "a", learned))
    for ways in (2, 3, 5):
        x, y = np.random.default_rng(0).random((2 * ways, 4, 4), np.float32), np.arange(2 * ways) % ways
        fast = learned.adapt(x, y)
        assert learned.apply(fast, x).shape == (2 * ways, ways)
        jax.tree.map(np.testing.assert_array_equal, fast, loaded.adapt(x, y))
        net = learned.model.of_way(ways)
        images = jnp.asarray(x)[..., None]
        start = net.begin(learned.init, images, jnp.asarray(y))
        expected, _ = inner.adapt(
            net.apply, start, images, jnp.asarray(y), descent.optimizer(learned.spec, learned.rates), 3
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), fast, expected)
        learned.save_params(tmp_path / "fast.safetensors", fast)
        again = loaded.load_params(tmp_path / "fast.safetensors")
        np.testing.assert_array_equal(loaded.apply(again, x), learned.apply(fast, x))
    with pytest.raises(DataError, match="at least one image of each class"):
        learned.adapt(x, y + 1)


def test_another_start_holds_for_any_number_of_classes():
    """Rates that were learned alone, for somebody's weights: evaluated from these, and not from random ones."""
    net = models.build("mlp", 3, (6,), widths=(8,), head_start="prototypes")
    start = net.init(jax.random.key(5))
    model, spec = models.starting_from(net, start), RatesSpec("layer", steps=2, head=net.head)
    for way in (3, 5):
        fresh = model.of_way(way).init(jax.random.key(1))
        assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (fresh, start)), strict=True))
    rates = hyperparameters.actual(spec, hyperparameters.initial_raw(spec, start))
    alone = metalr.Learner(model, spec, start, rates, {"outer": {"learns": "rates"}})
    with_init = metalr.Learner(model, spec, start, rates)

    def sample(key):
        x = jax.random.normal(key, (8, 6))
        y = jnp.arange(8) % 4
        return metalr.Episode(x[:4], y[:4], x[4:], y[4:])

    made = metalr.Tasks(sample, sample, sample)
    np.testing.assert_allclose(alone.evaluate(made, 5).mean, with_init.evaluate(made, 5).mean, rtol=1e-6)


def test_what_has_no_number_for_each_class_is_refused():
    net = model("shared")
    with pytest.raises(ConfigError, match="inner.granularity: expected shared, layer or tensor"):
        outer.initial(net, RatesSpec("parameter"), jax.random.key(0))
    with pytest.raises(ConfigError, match="inner.head_start: expected one of"):
        model("none")
