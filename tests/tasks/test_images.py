"""Families, splits and the sampler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalr import data, tasks
from metalr.config import TaskConfig, TrainConfig
from metalr.errors import ConfigError, DataError
from metalr.runs.setup import set_up
from metalr.tasks import images

SUBSETS = [name for name, family in tasks.FAMILIES.items() if family.classes == "subset"]


def sampler(dataset, family, part="train", way=None, shot=2, query=3):
    splits = tasks.make_splits(dataset, family)
    split = getattr(splits, part)
    pool, sample = tasks.make_sampler(split, way or (3 if family in SUBSETS else 10), shot, query)
    return split, pool, jax.jit(sample)


@pytest.fixture(scope="module")
def numbered():
    """Images that carry their own identity: every pixel is the image's number, its class the label."""
    labels = np.tile(np.arange(10), 24)
    images = np.broadcast_to(np.arange(240, dtype=np.uint8)[:, None, None], (240, 6, 6))
    return data.from_arrays(images, labels, name="numbered")


@pytest.mark.parametrize("family", list(tasks.FAMILIES))
def test_parts_are_disjoint_on_every_axis_that_is_held_out(blobs, family):
    splits = tasks.make_splits(blobs, family)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        one, other = splits[a], splits[b]
        rows = [{image.tobytes() for image in part.images} for part in (one, other)]
        assert not rows[0] & rows[1], "images"
        held_out = tasks.FAMILIES[family].held_out
        if "angles" in held_out:
            assert not set(one.angles) & set(other.angles)
            assert all(degrees == 30 and start % 30 == 0 for start, degrees in (*one.angles, *other.angles))
        if "permutations" in held_out:
            (first, count), (second, more) = one.permutations, other.permutations
            assert first + count <= second or second + more <= first
        if "gains" in held_out:
            assert all(a[1] <= b[0] or b[1] <= a[0] for a in one.gains for b in other.gains)
        if "orders" in held_out:
            assert not set(one.orders[0]) & set(other.orders[0])
        if "classes" in held_out and (family == "classes" or 2 in (a, b)):
            assert not set(one.class_ids) & set(other.class_ids)


def test_digits_holds_out_the_last_digits(blobs):
    splits = tasks.make_splits(blobs, "digits")
    assert splits.train.class_ids == splits.val.class_ids == (0, 1, 2, 3, 4, 5)
    assert splits.test.class_ids == (6, 7, 8, 9)


def test_hash_depends_on_family_and_data_only(blobs):
    hashes = {family: tasks.make_splits(blobs, family).sha256 for family in tasks.FAMILIES}
    assert len(set(hashes.values())) == len(hashes)
    assert tasks.make_splits(blobs, "rotated").sha256 == hashes["rotated"]
    other = data.from_arrays(blobs.train_images[:-1], blobs.train_labels[:-1])
    assert tasks.make_splits(other, "rotated").sha256 != hashes["rotated"]


@pytest.mark.parametrize("family", list(tasks.FAMILIES))
def test_episode_shapes_labels_and_range(blobs, family):
    _, pool, sample = sampler(blobs, family)
    episode = sample(pool, jax.random.key(0))
    way = int(episode.support_y.max()) + 1
    assert episode.support_x.shape == (2 * way, 8, 8, 1)
    assert episode.query_x.shape == (3 * way, 8, 8, 1)
    assert episode.support_x.dtype == jnp.float32
    np.testing.assert_array_equal(np.bincount(episode.support_y), [2] * way)
    np.testing.assert_array_equal(np.bincount(episode.query_y), [3] * way)
    assert 0 <= float(episode.support_x.min()) <= float(episode.support_x.max()) <= 1 + 1e-6


def test_support_and_query_never_share_an_image(numbered):
    _, pool, sample = sampler(numbered, "permuted", shot=5, query=10)
    for seed in range(20):
        episode = sample(pool, jax.random.key(seed))
        support, query = ({round(float(v) * 255) for v in x[:, 0, 0, 0]} for x in (episode.support_x, episode.query_x))
        assert len(support) == 50
        assert len(query) == 100
        assert not support & query
        for x, y in ((episode.support_x, episode.support_y), (episode.query_x, episode.query_y)):
            np.testing.assert_array_equal(np.round(np.asarray(x[:, 0, 0, 0]) * 255).astype(int) % 10, y)


def test_every_image_is_drawn_equally_often():
    counts = np.zeros(7)
    draw = jax.jit(jax.vmap(lambda key: images.choose(key, 7, 3)))
    chosen = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    assert all(len(set(row)) == 3 for row in chosen[:200].tolist())
    for place in range(3):  # in every place, not only overall
        counts = np.bincount(chosen[:, place], minlength=7) / 4000
        np.testing.assert_allclose(counts, 1 / 7, atol=0.03)


@pytest.mark.parametrize("family", ["digits", "relabeled", "classes"])
def test_labels_are_shuffled(blobs, family):
    _, pool, sample = sampler(blobs, family)
    orders = {tuple(sample(pool, jax.random.key(seed)).support_y.tolist()) for seed in range(5)}
    assert len(orders) == 5
    assert all(list(order) != sorted(order) for order in orders)  # sorted rows would leak the label


@pytest.mark.parametrize("way", [3, 5, 7, 10, 15])
def test_label_orders_of_different_residues_never_meet(way):
    modulus = 7 if way >= 7 else 3

    def orders(residues):
        draw = jax.vmap(lambda key: images._label_order(key, way, residues, modulus))
        return np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(1), 500)))

    seen = [{tuple(o) for o in orders((residue,)).tolist()} for residue in range(modulus)]
    for i in range(modulus):
        assert all(sorted(order) == list(range(way)) for order in seen[i])
        assert not any(seen[i] & seen[j] for j in range(i))
    if way == 3:
        assert len(set.union(*seen)) == 6  # all orders are reached


def test_one_transform_per_episode(numbered):
    """Under a permutation every image of an episode moves alike, and another episode moves otherwise."""
    ramp = data.from_arrays(
        np.broadcast_to(np.arange(36, dtype=np.uint8).reshape(6, 6), (240, 6, 6)), numbered_labels()
    )
    _, pool, sample = sampler(ramp, "permuted")
    episodes = [sample(pool, jax.random.key(seed)) for seed in range(3)]
    for episode in episodes:
        x = np.concatenate([episode.support_x, episode.query_x]).reshape(-1, 36)
        assert (x == x[0]).all()
        assert sorted(np.round(x[0] * 255).astype(int).tolist()) == list(range(36))
    assert not np.array_equal(episodes[0].support_x[0], episodes[1].support_x[0])


def test_one_factor_per_episode_from_the_part_s_own_bands(numbered):
    for part, arcs in images.ARCS.items():
        _, pool, sample = sampler(numbered, "scaled", part, shot=1, query=1)
        _, _, unscaled = sampler(
            numbered, "permuted", part, shot=1, query=1
        )  # images of one value each stay what they are
        for seed in range(20):
            x, before = (draw(pool, jax.random.key(seed)).support_x[:, 0, 0, 0] for draw in (sample, unscaled))
            gain = float(x.sum() / before.sum())
            np.testing.assert_allclose(x, gain * before, rtol=1e-5)
            band = 6 * np.log10(gain / images.GAINS[0])
            assert any(arc - 1e-3 <= band <= arc + 1 + 1e-3 for arc in arcs)


def test_a_hardly_distorted_episode_is_the_plain_one_mirrored_or_not(blobs):
    split = tasks.make_splits(blobs, "classes").train
    pool, plain = tasks.make_sampler(split, 3, 2, 2)

    def images(sample, seed):
        episode = sample(pool, jax.random.key(seed))
        return np.concatenate([episode.support_x, episode.query_x])[..., 0]

    _, hardly = tasks.make_sampler(split, 3, 2, 2, distort=1e-5)
    plain, hardly = jax.jit(plain), jax.jit(hardly)
    mirrored = []
    for seed in range(8):
        before, after = images(plain, seed), images(hardly, seed)
        mirrored.append(not np.allclose(before, after, atol=1e-3))
        np.testing.assert_allclose(after, before[:, :, ::-1] if mirrored[-1] else before, atol=1e-3)
    assert 0 < sum(mirrored) < 8
    _, strongly = tasks.make_sampler(split, 3, 2, 2, distort=0.5)
    before, after = images(plain, 0), images(jax.jit(strongly), 0)
    assert np.abs(after - (before[:, :, ::-1] if mirrored[0] else before)).mean() > 0.02
    for family, strength in (("rotated", 0.1), ("classes", 1.5)):
        other = tasks.make_splits(blobs, family).train
        with pytest.raises(ConfigError, match="tasks.distort: expected 0..1 in the family 'classes'"):
            tasks.make_sampler(other, 3, 2, 2, distort=strength)


def test_label_noise_changes_support_labels_only_and_as_many_as_asked(blobs):
    split = tasks.make_splits(blobs, "rotated").train
    pool, plain = tasks.make_sampler(split, 10, 20, 2)
    for noise in (0.4, 1.0):
        _, noisy = tasks.make_sampler(split, 10, 20, 2, label_noise=noise)
        before, after = (
            jax.jit(jax.vmap(sample, (None, 0)))(pool, jax.random.split(jax.random.key(0), 20))
            for sample in (plain, noisy)
        )
        for name in ("support_x", "query_x", "query_y"):
            assert np.array_equal(getattr(before, name), getattr(after, name))
        changed = before.support_y != after.support_y
        assert abs(float(changed.mean()) - 0.9 * noise) < 0.02  # one in ten is drawn as it was
        assert set(np.unique(after.support_y[changed]).tolist()) == set(range(10))
    with pytest.raises(ConfigError, match="tasks.label_noise: expected 0..1"):
        tasks.make_sampler(split, 10, 2, 2, label_noise=1.5)


def test_label_noise_is_in_every_split(blobs_npz):
    config = TrainConfig(data=str(blobs_npz), tasks=TaskConfig("rotated", 10, 2, 2))
    noisy = dataclasses.replace(config, tasks=dataclasses.replace(config.tasks, label_noise=1.0))
    for part in ("train", "validation", "test"):
        one, other = (
            np.asarray(sample(pool, jax.random.key(0)).support_y)
            for pool, sample in (getattr(set_up(c).parts, part) for c in (config, noisy))
        )
        assert not np.array_equal(one, other), part


def test_only_meta_training_is_distorted(blobs_npz):
    config = TrainConfig(data=str(blobs_npz), tasks=TaskConfig("classes", 2, 2, 2))
    distorted = dataclasses.replace(config, tasks=dataclasses.replace(config.tasks, distort=0.3))
    for part, same in (("train", False), ("validation", True), ("test", True)):
        one, other = (
            np.asarray(sample(pool, jax.random.key(0)).support_x)
            for pool, sample in (getattr(set_up(c).parts, part) for c in (config, distorted))
        )
        assert np.array_equal(one, other) == same, part


def numbered_labels():
    return np.tile(np.arange(10), 24)


def test_class_splits_of_the_data_are_kept():
    split = np.array(["train"] * 4 + ["val"] * 4)
    dataset = data.from_arrays(
        np.random.default_rng(0).integers(0, 256, (8, 20, 6, 6), dtype=np.uint8), class_split=split
    )
    parts = tasks.make_splits(dataset, "classes")
    assert [part.class_ids for part in parts] == [(0, 1, 2, 3), (4, 5), (6, 7)]  # no test classes: val gives half
    assert parts.train.classes == 16  # quarter turns


def test_what_cannot_be_sampled_is_refused(blobs):
    splits = tasks.make_splits(blobs, "digits")
    for way, shot, query, message in (
        (7, 1, 1, "tasks.way: expected at most 6"),
        (1, 1, 1, "tasks.way: expected at least 2"),
        (3, 0, 1, "tasks.shot: expected at least 1"),
        (3, 30, 30, r"tasks.shot \+ tasks.query: expected at most 50"),
    ):
        with pytest.raises(ConfigError, match=message):
            tasks.make_sampler(splits.train, way, shot, query)
    with pytest.raises(ConfigError, match="uses all 10 classes, got 5"):
        tasks.make_sampler(tasks.make_splits(blobs, "permuted").train, 5, 1, 1)
    with pytest.raises(ConfigError, match=r"tasks.family: expected one of .*'digits'.*got 'digit'"):
        tasks.make_splits(blobs, "digit")
    flat = data.from_arrays(np.zeros((20, 4, 6), np.uint8), np.arange(20) % 2)
    with pytest.raises(DataError, match="expected square"):
        tasks.make_splits(flat, "rotated")
    few = data.from_arrays(np.zeros((20, 4, 4), np.uint8), np.arange(20) % 2)
    with pytest.raises(DataError, match="needs 4 or more"):
        tasks.make_splits(few, "digits")


def test_classes_need_not_be_turned():
    flat = data.from_arrays(np.zeros((60, 4, 6), np.uint8), np.arange(60) % 6)
    with pytest.raises(DataError, match="expected square ones.*--tasks.turns False"):
        tasks.make_splits(flat, "classes")
    splits = tasks.make_splits(flat, "classes", turns=False)
    assert splits.train.classes == len(splits.train.class_ids)
    pool, sample = tasks.make_sampler(splits.train, 2, 1, 2)
    assert sample(pool, jax.random.key(0)).support_x.shape == (2, 4, 6, 1)
    square = data.from_arrays(np.zeros((60, 4, 4), np.uint8), np.arange(60) % 6)
    assert tasks.make_splits(square, "classes").sha256 != tasks.make_splits(square, "classes", turns=False).sha256
    with pytest.raises(ConfigError, match="tasks.turns: expected True, because family 'rotated' turns no classes"):
        tasks.make_splits(square, "rotated", turns=False)


def test_a_sampler_made_inside_jit_leaves_no_tracer_behind(blobs):
    split = tasks.make_splits(blobs, "rotated").train

    @jax.jit
    def drawn(key):
        pool, sample = tasks.make_sampler(split, 10, 2, 2)
        return sample(pool, key).support_x

    x = drawn(jax.random.key(0))
    pool, sample = tasks.make_sampler(split, 10, 2, 2)
    np.testing.assert_allclose(jax.jit(sample)(pool, jax.random.key(0)).support_x, x, atol=1e-6)


def test_samplers_of_all_sizes_share_one_copy_of_the_images(blobs):
    split = tasks.make_splits(blobs, "rotated").train
    pools = [tasks.make_sampler(split, 10, shot, 2)[0] for shot in (1, 5)]
    assert pools[0].images is pools[1].images
    assert pools[0].images.shape == (len(split.images), 64)
