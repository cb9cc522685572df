"""Fine-tunes of many rates and seeds side by side are what each alone gives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalr import inner, models
from metalr.errors import ConfigError
from metalr.search import fit
from metalr.types import Episode


@pytest.fixture(scope="module")
def task(blobs):
    return Episode(blobs.train_images, blobs.train_labels, blobs.test_images, blobs.test_labels)


def test_hold_out_takes_the_share_of_every_class(task):
    arrays = fit.hold_out(task, 0.2, seed=3, by_class=True)
    assert (len(arrays.train_y), len(arrays.val_y), len(arrays.test_y)) == (480, 120, 300)
    assert np.bincount(arrays.val_y).tolist() == [12] * 10
    both = np.concatenate([arrays.train_x, arrays.val_x]).reshape(600, -1)
    assert len(np.unique(both, axis=0)) == len(np.unique(task.support_x.reshape(600, -1), axis=0))
    np.testing.assert_array_equal(arrays.val_x, fit.hold_out(task, 0.2, seed=3, by_class=True).val_x)
    assert (arrays.val_x != fit.hold_out(task, 0.2, seed=4, by_class=True).val_x).any()


def test_one_image_a_class_validates_on_what_it_trains_on(task):
    rows = [int(np.flatnonzero(task.support_y == c)[0]) for c in range(10)]
    arrays = fit.hold_out(task._replace(support_x=task.support_x[rows], support_y=task.support_y[rows]), by_class=True)
    np.testing.assert_array_equal(arrays.train_y, arrays.val_y)
    two = fit.hold_out(task._replace(support_x=task.support_x[:20], support_y=task.support_y[:20]), by_class=True)
    assert (len(two.train_y), len(two.val_y)) == (10, 10)
    with pytest.raises(ConfigError, match="validation: expected a share between 0 and 1, got 1"):
        fit.hold_out(task, 1, by_class=True)


def test_hold_out_of_numbers_takes_a_share_of_the_rows():
    x = {"a": np.arange(20.0, dtype=np.float32), "b": np.arange(40, dtype=np.float32).reshape(20, 2)}
    y = np.linspace(0, 1, 20, dtype=np.float32)
    arrays = fit.hold_out(Episode(x, y, x, y), 0.2, by_class=False)
    assert (len(arrays.train_y), len(arrays.val_y), len(arrays.test_y)) == (16, 4, 20)
    np.testing.assert_array_equal(np.sort(np.concatenate([arrays.train_y, arrays.val_y])), y)
    np.testing.assert_array_equal(arrays.val_x["b"][:, 0], 2 * arrays.val_x["a"])  # rows stay together
    one = fit.hold_out(Episode(x["a"][:1], y[:1], x["a"], y), by_class=False)
    np.testing.assert_array_equal(one.train_y, one.val_y)
    counts = np.arange(20, dtype=np.int32)  # whole numbers are no classes: each would be its own
    arrays = fit.hold_out(Episode(x, counts, x, counts), 0.2, by_class=False)
    assert not set(arrays.train_y) & set(arrays.val_y)
    assert len(arrays.val_y) == 4


def test_a_search_of_numbers_goes_by_its_own_objective():
    """Squared error, rates side by side in the wide form and apart in the plain one."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3)).astype(np.float32)
    y = (x @ np.array([1.0, -2.0, 0.5], np.float32))[:, None]
    arrays = fit.hold_out(Episode(x, y, x, y), by_class=False)
    model, error = models.mlp(1, (3,), widths=(8,)), inner.OBJECTIVES["squared_error"]
    keys = jax.random.split(jax.random.key(1), 1)
    init = jax.vmap(model.init)(keys)
    programs = [fit.make_programs(model, "sgd", objective=error, plain=plain)(8) for plain in (False, True)]
    found = [list(fit.trajectory(program, arrays, init, (1e-3, 3e-2), keys, (5,))) for program in programs]
    np.testing.assert_allclose(found[0][0].test, found[1][0].test, rtol=1e-4)
    assert found[0][0].test[1, 0] < 0.2 * found[0][0].test[0, 0]


@pytest.mark.parametrize("widths", [(16,), ()])
def test_without_blank_pixels_it_is_the_same(task, widths):
    rng = np.random.default_rng(0)
    live = rng.permutation(64)[:37]
    images = [np.zeros_like(v.reshape(len(v), -1)) for v in (task.support_x, task.query_x)]
    for new, old in zip(images, (task.support_x, task.query_x), strict=True):
        new[:, live[:36]] = old.reshape(len(old), -1)[:, live[:36]]
    images[1][7, live[36]] = 255  # one test image has a pixel that no other has
    x, test_x = (v.reshape(-1, 8, 8, 1) for v in images)
    arrays = fit.hold_out(task._replace(support_x=x, query_x=test_x), by_class=True)
    model = models.mlp(10, (8, 8, 1), widths=widths, dropout=0.0)
    keys = jax.random.split(jax.random.key(1), 2)
    init = jax.vmap(model.init)(keys)
    fewer, narrow = fit.without_blank_pixels(model, "adam", arrays, init)
    assert fewer.train_x.shape == (480, 1, 48, 1)
    assert fewer.test_x[7].max() == 255
    kernels = [tree["dense_0" if widths else "head"]["kernel"].shape[1] for tree in (init, narrow)]
    assert kernels == [64, 48]
    program = fit.make_programs(model, "adam")(32)
    whole, part = (
        list(fit.trajectory(program, a, i, (1e-3, 1e-2), keys, (1, 3))) for a, i in ((arrays, init), (fewer, narrow))
    )
    for one, other in zip(whole, part, strict=True):
        np.testing.assert_allclose(one.validation, other.validation, atol=1.5 / 120)  # a prediction may round over
        np.testing.assert_allclose(one.test, other.test, atol=1.5 / 300)


def test_pixels_stay_where_leaving_them_out_could_matter(task):
    arrays = fit.hold_out(task, by_class=True)
    for model, optimizer in ((models.rnn(10, (8, 8, 1)), "adam"), (models.mlp(10, (8, 8, 1)), "lamb")):
        assert fit.without_blank_pixels(model, optimizer, arrays, {}) == (arrays, {})
    model = models.mlp(10, (8, 8, 1))
    black = arrays._replace(**{part: np.zeros_like(getattr(arrays, part)) for part in ("train_x", "val_x", "test_x")})
    some, init = fit.without_blank_pixels(model, "adam", black, model.init(jax.random.key(0)))
    assert some.train_x.shape == (480, 1, 16, 1)
    assert init["dense_0"]["kernel"].shape == (16, 128)


@pytest.mark.parametrize("count", [1, 999, 1000, 1001])
def test_outputs_in_groups_are_the_outputs(count):
    rng = np.random.default_rng(0)
    x, y = rng.random((count, 2, 2, 1), np.float32), rng.integers(0, 3, count).astype(np.int32)

    def apply(params, x):
        return x.reshape(len(x), -1)[:, :3] + params[None]

    found = fit.outputs_of(apply, np.zeros(3, np.float32), jnp.asarray(x))
    np.testing.assert_array_equal(found, apply(np.zeros(3, np.float32), x))
    assert float(inner.accuracy(found, y)) == pytest.approx(float((x.reshape(count, -1)[:, :3].argmax(1) == y).mean()))


def test_predictions_that_depend_on_the_group_see_real_images_only(monkeypatch):
    monkeypatch.setattr(fit, "SCORED_AT_ONCE", 10)
    x = np.arange(1, 26, dtype=np.float32).reshape(25, 1, 1, 1)
    seen = []

    def apply(params, x):
        jax.debug.callback(lambda v: seen.append(np.sort(v.reshape(-1)).tolist()), x, ordered=True)
        return jnp.concatenate([x.reshape(-1, 1), 0 * x.reshape(-1, 1)], axis=1)

    found = fit.outputs_of(apply, None, jnp.asarray(x))
    np.testing.assert_array_equal(found[:, 0], np.arange(1, 26))
    jax.effects_barrier()
    assert seen == [list(range(1, 10)), list(range(10, 19)), list(range(17, 26))]


@pytest.mark.parametrize(
    ("optimizer", "dropout", "plain"), [("adam", 0.0, False), ("adam", 0.3, False), ("adam", 0.3, True),
     ("sgd", 0.0, False), ("rmsprop", 0.0, False)],
)  # fmt: skip
def test_side_by_side_is_alone(task, optimizer, dropout, plain):
    """Two rates, two seeds and snapshots of three epochs, against a plain loop of each."""
    model = models.mlp(10, (8, 8, 1), widths=(16,), dropout=dropout)
    arrays = fit.hold_out(task, by_class=True)
    keys = jax.random.split(jax.random.key(1), 2)
    init = jax.vmap(model.init)(keys)
    program = fit.make_programs(model, optimizer, plain=plain)(32)
    make = getattr(optax, optimizer)
    rates = (1e-2, 1e-1) if optimizer == "sgd" else (1e-3, 1e-2)
    points = list(fit.trajectory(program, arrays, init, rates, keys, (1, 3)))
    assert [point.epoch for point in points] == [1, 3]
    x, y = jnp.asarray(arrays.train_x, jnp.float32) / 255, jnp.asarray(arrays.train_y)
    for r, rate in enumerate(rates):
        for s in range(2):
            params = jax.tree.map(lambda v, s=s: v[s], init)
            carry = params, make(rate).init(params)
            for epoch in range(3):
                key = jax.random.fold_in(keys[s], epoch)
                step = jax.jit(
                    inner.make_step(model.apply, x, y, make(rate), 15, batch_size=32, key=key, dropout=model.dropout)
                )
                for number in range(15):
                    carry = step(carry, number)
            for part, of in (("val", points[1].validation), ("test", points[1].test)):
                images, labels = getattr(arrays, f"{part}_x") / np.float32(255), getattr(arrays, f"{part}_y")
                alone = float(inner.accuracy(model.apply(carry[0], images), labels))
                assert of[r, s] == pytest.approx(alone, abs=1.5 / len(labels))  # one prediction may round over
    assert (points[1].test > (0.5 if optimizer == "sgd" else 0.9)).any()
    single = list(fit.trajectory(program, arrays, jax.tree.map(lambda v: v[1:], init), rates, keys[1:], (1, 3)))
    np.testing.assert_allclose(single[1].test[:, 0], points[1].test[:, 1], atol=1.5 / 300)
