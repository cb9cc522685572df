"""Datasets: what is accepted, what is refused and how, the bundled subset, the cache."""

import jax
import numpy as np
import pytest

from metalr import cli, data, tasks
from metalr.data import arrays
from metalr.errors import ConfigError, DataError

IMAGES = np.zeros((12, 4, 4), np.uint8)
LABELS = np.repeat(np.arange(2), 6)


def test_bundled_is_real_and_balanced():
    dataset = data.load("mnist12k")
    assert dataset.train_images.shape == (10000, 28, 28, 1)
    assert np.bincount(dataset.train_labels).tolist() == [1000] * 10
    assert np.bincount(dataset.test_labels).tolist() == [200] * 10
    assert "CC BY-SA 3.0" in str(dataset)


def test_floats_and_bytes_give_the_same_pixels():
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4), dtype=np.uint8)
    a, b = data.from_arrays(images, LABELS), data.from_arrays(images[..., None] / 255.0, LABELS)
    np.testing.assert_array_equal(a.train_images, b.train_images)
    assert a.sha256 == b.sha256


def test_last_sixth_of_each_class_is_the_test_part():
    dataset = data.from_arrays(IMAGES, LABELS)
    assert np.bincount(dataset.train_labels).tolist() == [5, 5]
    assert np.bincount(dataset.test_labels).tolist() == [1, 1]


def test_labels_of_any_kind_are_numbered_and_keep_their_names():
    names = np.array(["cat", "dog"])[LABELS]
    for labels, expected in ((names, ("cat", "dog")), (LABELS * 5 - 3, ("-3", "2")), (LABELS, None)):
        dataset = data.from_arrays(IMAGES, labels, test_images=IMAGES, test_labels=labels)
        assert dataset.train_labels.tolist() == dataset.test_labels.tolist() == LABELS.tolist()
        assert dataset.class_names == expected
        assert dataset.sha256 == data.from_arrays(IMAGES, LABELS, test_images=IMAGES, test_labels=LABELS).sha256
        data.write_cache(dataset)
        assert data.load("arrays").class_names == expected


def test_labels_of_different_integers_are_integers():
    dataset = data.from_arrays(
        IMAGES, LABELS.astype(np.int64) + 5, test_images=IMAGES, test_labels=LABELS.astype(np.uint64) + 5
    )
    assert dataset.class_names == ("5", "6")


def test_black_and_white_is_bool_and_no_uint8_of_0_and_1():
    ink = np.arange(12 * 16).reshape(12, 4, 4) % 3 == 0
    dataset = data.from_arrays(ink, LABELS)
    assert set(np.unique(dataset.train_images)) == {0, 255}
    with pytest.raises(DataError, match="expected uint8 0..255, got 0 and 1 alone; pass images.astype"):
        data.from_arrays(ink.astype(np.uint8), LABELS)


def test_classes_of_the_test_part_alone_become_a_class_split():
    """Omniglot's own layout."""
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1) * np.ones((1, 4, 4), np.uint8)
    labels = np.repeat(np.arange(20), 2)
    dataset = data.from_arrays(images[:30], labels[:30], test_images=images[30:], test_labels=labels[30:])
    assert dataset.class_split == ("train",) * 12 + ("val",) * 3 + ("test",) * 5
    np.testing.assert_array_equal(dataset.train_images[..., 0], images)
    assert len(dataset.test_images) == 0
    with pytest.raises(DataError, match="got '15' in the test part alone, beside shared ones"):
        data.from_arrays(images[:30], labels[:30], test_images=images[20:], test_labels=labels[20:])


def test_floats_that_are_no_bytes_keep_their_values():
    images = np.linspace(0, 0.01, 12 * 16).reshape(12, 4, 4)
    dataset = data.from_arrays(images, LABELS, test_images=IMAGES, test_labels=LABELS)
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.float32
    np.testing.assert_allclose(dataset.train_images[..., 0], images, rtol=1e-6)
    many, labels = np.concatenate([images] * 4), np.concatenate([LABELS] * 4)
    split = tasks.make_splits(data.from_arrays(many, labels), "permuted").train
    pool, sample = tasks.make_sampler(split, 2, 1, 1)
    seen = sample(pool, jax.random.key(0)).support_x
    assert np.isin(np.round(np.asarray(seen).ravel(), 7), np.round(images.astype(np.float32).ravel(), 7)).all()


def test_small_classes_are_named_and_can_be_left_out(tmp_path, capsys):
    labels = np.array(["big"] * 20 + ["also big"] * 20 + ["small"] * 7)
    images = np.zeros((47, 4, 4), np.uint8)
    dataset = data.from_arrays(images, labels, test_images=images, test_labels=labels)
    split = tasks.make_splits(dataset, "rotated").train
    without = data.from_arrays(images[:41], labels[:41], test_images=images, test_labels=labels)
    with pytest.raises(DataError, match="leaves a class of meta-val without images: small; leave such classes out"):
        tasks.make_splits(without, "rotated")
    with pytest.raises(ConfigError, match="1 of its 3 classes have fewer images: small; lower one, or leave"):
        tasks.make_sampler(split, 3, 5, 5)
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    cli.main(["data", "import", str(tmp_path / "x.npz"), "--min-per-class", "10"])
    assert "2 classes (x.npz; left out, with fewer than 10 images: small)" in capsys.readouterr().out
    with pytest.raises(DataError, match="min_per_class: expected some class with at least 99 images"):
        data.from_arrays(images, labels, min_per_class=99)


@pytest.mark.parametrize("split", [["train", "test"], ["val", "val"], ["train", "val"]])
def test_a_class_split_that_could_not_be_used_is_refused_at_once(split):
    with pytest.raises(DataError, match="class_split: expected classes of 'train', of 'val', and of 'test'"):
        data.from_arrays(IMAGES, LABELS, class_split=np.array(split))


def test_class_major_images_need_no_labels():
    colour = data.from_arrays(np.zeros((3, 6, 5, 5, 3), np.uint8))
    assert (colour.shape, colour.classes) == ((5, 5, 3), 3)
    dataset = data.from_arrays(np.zeros((3, 6, 4, 4), np.uint8), class_split=np.array(["train", "val", "test"]))
    assert dataset.classes == 3
    assert len(dataset.test_images) == 0


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[0], LABELS, r"images: expected shape \[n, height, width\].*got \(4, 4\)"),
        (IMAGES.astype(np.int32), LABELS, "images: expected dtype uint8.*got int32"),
        (IMAGES + 0.5 * 4, LABELS, r"images: expected float pixels within 0\.\.1, got 2\.\.2"),
        (np.full((12, 4, 4), np.nan), LABELS, "images: expected finite pixels, got 192"),
        (IMAGES, LABELS[:5], r"labels: expected shape \[12\].*got \(5,\)"),
        (IMAGES, LABELS + 0.5, "labels: expected integers or strings, got float64"),
        (np.zeros((12, 3, 32, 32), np.uint8), LABELS, r"in the last axis.*pass images.transpose\(0, 2, 3, 1\)"),
        (np.zeros((12, 8, 32, 32), np.uint8), LABELS, r"channels in the last axis.*transpose"),
        (np.zeros((12, 32, 32, 3), np.uint8), None, r"without labels, expected \[classes, n, height, width\]"),
        (IMAGES[:0], LABELS[:0], "images: expected at least one image"),
    ],
)
def test_bad_arrays_are_refused_by_name(images, labels, message):
    with pytest.raises(DataError, match=message):
        data.from_arrays(images, labels)


def test_cache_round_trip_and_damage(blobs):
    folder = data.write_cache(blobs)
    assert data.names() == ["mnist12k", "blobs"]
    again = data.load("blobs")
    assert again.sha256 == blobs.sha256
    assert isinstance(again.train_images, np.memmap)
    file = folder / "train_images.npy"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="damaged.*sha256 differs.*metalr data prepare blobs"):
        data.load("blobs")
    file.write_bytes(content[:100])
    with pytest.raises(DataError, match="damaged"):
        data.load("blobs")


def test_unknown_and_hostile_names():
    with pytest.raises(DataError, match="'nothing'.*have mnist12k.*metalr data prepare nothing"):
        data.load("nothing")
    for name in "../etc", "..":
        with pytest.raises(DataError, match=r"data: \.\..*: (no such file|expected a file \.npz, \.csv or \.parquet)"):
            data.load(name)
    for name in "../etc", "..", "":
        with pytest.raises(DataError, match="expected letters"):
            arrays.read_cache(name)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"<html>", b"shop,size\n1,2\n"])
def test_bad_npz(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.npz: expected an \.npz of named arrays, got a file of another kind"):
        data.load(str(tmp_path / "x.npz"))
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, IMAGES)
    with pytest.raises(DataError, match=r"one\.npz: expected .*, got a single array; use numpy.savez"):
        data.load(str(tmp_path / "one.npz"))
    np.savez(tmp_path / "y.npz", pixels=IMAGES)
    with pytest.raises(DataError, match=r"expected an array `images`.*\['pixels'\]"):
        data.load(str(tmp_path / "y.npz"))
    with pytest.raises(DataError, match=r"z\.npz: expected an \.npz file, found none"):
        data.load(str(tmp_path / "z.npz"))


def test_pickled_arrays_are_never_loaded(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.array([{"a": 1}], object))
    with pytest.raises(DataError, match="plain arrays"):
        data.load(str(tmp_path / "x.npz"))
