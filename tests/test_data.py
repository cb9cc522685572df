"""Datasets: what is accepted, what is refused and how, the bundled subset, the cache."""

import numpy as np
import pytest

from metalr import data
from metalr.errors import DataError

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


def test_class_major_images_need_no_labels():
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
        (IMAGES, LABELS + 0.5, "labels: expected an integer dtype, got float64"),
        (IMAGES, LABELS - 1, "labels: expected labels from 0"),
        (IMAGES, LABELS * 2, "labels: expected every class.*none for 1"),
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
    with pytest.raises(DataError, match="expected letters"):
        data.load("../etc")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"<html>"])
def test_bad_npz(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.npz: expected an \.npz of plain arrays"):
        data.load(str(tmp_path / "x.npz"))
    np.savez(tmp_path / "y.npz", pixels=IMAGES)
    with pytest.raises(DataError, match=r"expected an array `images`.*\['pixels'\]"):
        data.load(str(tmp_path / "y.npz"))
    with pytest.raises(DataError, match=r"z\.npz: expected an \.npz file, found none"):
        data.load(str(tmp_path / "z.npz"))


def test_pickled_arrays_are_never_loaded(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.array([{"a": 1}], object))
    with pytest.raises(DataError, match="plain arrays"):
        data.load(str(tmp_path / "x.npz"))
