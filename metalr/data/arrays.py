"""Image-classification data in memory: checked arrays, the bundled MNIST subset, the decoded cache.

Reading other formats (IDX files, TFDS folders, downloads) is `metalr.data.sources`; this module never touches the
network and never picks another dataset than the one it was asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from metalr.errors import ConfigError, DataError, StorageError, one_line
from metalr.storage import folders

BUNDLED = "mnist12k"
PARTS = ("train_images", "train_labels", "test_images", "test_labels")
ROUNDING = 1e-4  # interpolated images exceed 1 by a little
BYTE_ROUNDING = 1e-3  # of 255: floats this close to whole numbers are bytes that were divided by 255
MOST_CHANNELS = 4  # a last axis that is longer is not taken for channels where another one may be
SPLIT_NAMES = ("train", "val", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels, split into a train and a test part as their publisher split them.

    Attributes:
      name: what `load` calls it.
      train_images, test_images: [n, height, width, channels], uint8 0..255 or float32 0..1. Test may be empty (n = 0).
      train_labels, test_labels: int32 [n], 0..classes-1.
      class_split: for many-class data, "train" | "val" | "test" for each class, or None.
      source: where the data came from, in words.
      class_names: what the classes were called, or None if they were the numbers 0..classes-1.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_split: tuple[str, ...] | None
    source: str
    class_names: tuple[str, ...] | None = None

    @property
    def classes(self) -> int:
        """How many classes there are: one more than the highest label."""
        return 1 + int(max(self.train_labels.max(initial=-1), self.test_labels.max(initial=-1)))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels

    @property
    def sha256(self) -> str:
        """Hash of all the content that training can see (not of the name or source)."""
        return _content_sha256(self)

    def __str__(self) -> str:
        return (
            f"{self.name}: {len(self.train_images):,} train + {len(self.test_images):,} test images, "
            f"{'x'.join(map(str, self.shape))}, {self.classes} classes ({self.source})"
        )


@lru_cache(maxsize=16)
def _content_sha256(dataset: Dataset) -> str:
    digest = hashlib.sha256(json.dumps(dataset.class_split).encode())
    for part in PARTS:
        array = np.ascontiguousarray(getattr(dataset, part))
        digest.update(f"{part}{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def check_images(images: np.ndarray, what: str = "images") -> np.ndarray:
    """[n, height, width, channels] from uint8 0..255, float 0..1 or bool, channel axis optional.

    Floats that are bytes divided by 255 become uint8, which takes a quarter of the memory; others stay float32.

    Raises:
      DataError: any other dtype, rank, or a non-finite or out-of-range pixel; channels that do not come last.
    """
    images = np.asarray(images)
    if images.dtype == bool:
        images = images * np.uint8(255)
    if images.ndim not in (3, 4):
        raise DataError(
            f"{what}: expected shape [n, height, width] or [n, height, width, channels], got {images.shape}"
        )
    if 0 in images.shape[1:]:
        raise DataError(f"{what}: expected images of at least one pixel, got shape {images.shape}")
    if images.ndim == 4:
        _, height, width, channels = images.shape
        if channels > MOST_CHANNELS and (height <= MOST_CHANNELS or width == channels != height):
            raise DataError(
                f"{what}: expected channels in the last axis, got shape {images.shape}, where they seem to come first; "
                f"pass {what}.transpose(0, 2, 3, 1)"
            )
    if images.dtype != np.uint8:
        check_pixels(images, what)
        images = np.clip(np.asarray(images, np.float32), 0, 1)
        scaled = images * np.float32(255)
        if np.abs(scaled - np.round(scaled)).max(initial=0) < BYTE_ROUNDING:
            images = np.round(scaled).astype(np.uint8)
    return images if images.ndim == 4 else images[..., None]


def check_pixels(images: np.ndarray, what: str) -> None:
    """Raises DataError unless `images` is uint8, or float, finite and within 0..1 (up to rounding)."""
    if images.dtype == np.uint8:
        return
    if not np.issubdtype(images.dtype, np.floating):
        raise DataError(f"{what}: expected dtype uint8 (0..255) or float (0..1), got {images.dtype}")
    if images.size and not np.isfinite(images).all():
        raise DataError(f"{what}: expected finite pixels, got {int((~np.isfinite(images)).sum())} non-finite")
    if images.size and (images.min() < -ROUNDING or images.max() > 1 + ROUNDING):
        raise DataError(
            f"{what}: expected float pixels within 0..1, got {images.min():.4g}..{images.max():.4g}; "
            "divide by 255, or pass uint8"
        )


def check_labels(labels: np.ndarray, count: int, what: str = "labels") -> np.ndarray:
    """[count] labels: integers or strings.

    Raises:
      DataError: another shape or dtype.
    """
    labels = np.asarray(labels)
    if labels.shape != (count,):
        raise DataError(f"{what}: expected shape [{count}], one label an image, got {labels.shape}")
    if labels.dtype.kind not in "iuUST":
        raise DataError(f"{what}: expected integers or strings, got {labels.dtype}")
    if labels.dtype.kind in "iu":
        if labels.max(initial=0) > np.iinfo(np.int64).max:
            raise DataError(f"{what}: expected integers of 64 bits with a sign, got {labels.max()}")
        return labels.astype(np.int64)  # as those of the other part: int64 beside uint64 would become floats
    return labels


def number_classes(labels: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels of any kind as (int32 0..classes-1 in the order of their values, the names of the classes)."""
    values, numbers = np.unique(labels, return_inverse=True)
    names = tuple(v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in values.tolist())
    return numbers.reshape(labels.shape).astype(np.int32), names


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    test_images: np.ndarray | None = None,
    test_labels: np.ndarray | None = None,
    class_split: np.ndarray | None = None,
    min_per_class: int = 0,
    name: str = "arrays",
    source: str = "arrays given by the user",
) -> Dataset:
    """A Dataset from a user's own arrays.

    Args:
      images: uint8 0..255, float 0..1 or bool, [n, height, width] or [n, height, width, channels]; or, with no labels,
        one row a class: [classes, n, height, width] or [classes, n, height, width, channels].
      labels: [n] integers or strings; classes are numbered in their order, and keep their names.
      test_images, test_labels: the test part. Without one, the last sixth of every class becomes it, unless
        `class_split` is given (whole classes are held out then, and the test part is empty). Where no class of the
        test part is in the training part (Omniglot's own layout), the classes are held out: a class split is made of
        them, whose validation classes are the last fifth of the training part's.
      class_split: "train" | "val" | "test" for each class, in the order of their labels; "test" may be missing.
      min_per_class: leave out classes with fewer images; `source` says which.

    Raises:
      DataError: arrays of a wrong shape, dtype or range.
    """
    images = np.asarray(images)
    if labels is None:
        if images.ndim not in (4, 5) or (images.ndim == 4 and images.shape[-1] <= MOST_CHANNELS < images.shape[-2]):
            raise DataError(
                "images: without labels, expected [classes, n, height, width] or [classes, n, height, width, "
                "channels], "
                f"got shape {images.shape}"
            )
        labels = np.repeat(np.arange(images.shape[0]), images.shape[1])
        images = images.reshape(-1, *images.shape[2:])
    images = check_images(images)
    labels = check_labels(labels, len(images))
    if not len(images):
        raise DataError("images: expected at least one image, got none")
    if images.dtype == np.uint8 and images.max() == 1:
        raise DataError("images: expected uint8 0..255, got 0 and 1 alone; pass images.astype(bool), or floats 0..1")
    if (test_images is None) != (test_labels is None):
        raise DataError("test_images and test_labels: expected both or neither, got one")
    if test_images is None or test_labels is None:
        test_images, test_labels = images[:0], labels[:0]
        has_test = False
    else:
        has_test = True
        test_images = check_images(test_images, "test_images")
        test_labels = check_labels(test_labels, len(test_images), "test_labels")
        if test_images.shape[1:] != images.shape[1:]:
            raise DataError(f"test_images: expected images of {images.shape[1:]}, got {test_images.shape[1:]}")
        if len(test_labels) and (test_labels.dtype.kind in "iu") != (labels.dtype.kind in "iu"):
            raise DataError(f"test_labels: expected labels as in the training part, got {test_labels.dtype}")
        if test_images.dtype != images.dtype:  # bytes beside floats that are none
            images, test_images = (v / np.float32(255) if v.dtype == np.uint8 else v for v in (images, test_images))
    split = None if class_split is None else np.asarray(class_split)
    if min_per_class > 1:
        images, labels, test_images, test_labels, split, left_out = _without_small(
            images, labels, test_images, test_labels, split, min_per_class
        )
        source += f"; left out, with fewer than {min_per_class} images: {', '.join(left_out)}" if left_out else ""
    numbers, names = number_classes(np.concatenate([labels, test_labels]))
    labels, test_labels = numbers[: len(labels)], numbers[len(labels) :]
    new = np.setdiff1d(test_labels, labels)
    if has_test and new.size and split is None:
        if np.intersect1d(test_labels, labels).size:
            raise DataError(
                f"test_labels: expected classes of the training part, or none of them; got {names[new[0]]!r} in the "
                "test "
                "part alone, beside shared ones"
            )
        known = np.unique(labels)
        split = np.full(len(names), "test", "<U5")
        split[known] = "train"
        split[known[len(known) - max(1, len(known) // 5) :]] = "val"
        images, labels = np.concatenate([images, test_images]), np.concatenate([labels, test_labels])
        test_images, test_labels = images[:0], labels[:0]
    elif split is None and not has_test:
        held_out = last_sixth(labels)
        test_images, test_labels = images[held_out], labels[held_out]
        images, labels = images[~held_out], labels[~held_out]
    if split is not None:
        found = sorted(set(split.ravel().tolist()))
        if split.shape != (len(names),) or not set(found) <= set(SPLIT_NAMES):
            raise DataError(
                f"class_split: expected one of {SPLIT_NAMES} for each of {len(names)} classes, "
                f"got shape {split.shape} with {found[:5]}"
            )
        if not {"train", "val"} <= set(found) or ("test" not in found and (split == "val").sum() < 2):
            raise DataError(
                "class_split: expected classes of 'train', of 'val', and of 'test' (or two of 'val', which are halved "
                f"then), got {dict(zip(*np.unique(split, return_counts=True), strict=True))}"
            )
    trivial = names == tuple(map(str, range(len(names))))
    given_split = None if split is None else tuple(map(str, split))
    return Dataset(name, images, labels, test_images, test_labels, given_split, source, None if trivial else names)


def _without_small(
    images: np.ndarray,
    labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    split: np.ndarray | None,
    least: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, list[str]]:
    """Without the classes of fewer than `least` images in the part that has them (training first); and their names."""
    values, counts = np.unique(labels, return_counts=True)
    only_test, test_counts = np.unique(test_labels[~np.isin(test_labels, values)], return_counts=True)
    small = np.concatenate([values[counts < least], only_test[test_counts < least]])
    every = np.unique(np.concatenate([labels, test_labels]))
    if len(small) == len(every):
        raise DataError(f"min_per_class: expected some class with at least {least} images, got none")
    keep, keep_test = ~np.isin(labels, small), ~np.isin(test_labels, small)
    if split is not None and len(split) == len(every):
        split = split[~np.isin(every, small)]
    return images[keep], labels[keep], test_images[keep_test], test_labels[keep_test], split, [str(v) for v in small]


def last_sixth(labels: np.ndarray) -> np.ndarray:
    """Which examples are the last sixth (rounded down) of their class, in the given order: [n] bool of labels [n]."""
    counts = np.bincount(labels)
    rank = np.empty(len(labels), np.int64)  # position of each example within its class
    rank[np.argsort(labels, kind="stable")] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank >= counts[labels] - counts[labels] // 6


def from_npz(path: Path | str, name: str | None = None, *, min_per_class: int = 0) -> Dataset:
    """A Dataset from an .npz with `images` and `labels` (and, optionally, the other arguments of from_arrays).

    Arrays named train_images/train_labels are taken too, and `split` for class_split.

    Raises:
      DataError: the file is missing, is no .npz, holds pickled objects or lacks an array.
    """
    path = Path(path)
    arrays = read_npz(path)
    if "images" not in arrays and "train_images" not in arrays:
        raise DataError(f"{path}: expected an array `images` (and `labels`), got {sorted(arrays)}")
    return from_arrays(
        arrays["images"] if "images" in arrays else arrays["train_images"],
        arrays.get("labels", arrays.get("train_labels")),
        test_images=arrays.get("test_images"),
        test_labels=arrays.get("test_labels"),
        class_split=arrays.get("class_split", arrays.get("split")),
        min_per_class=min_per_class,
        name=name or path.stem,
        source=path.name,  # what is in it is in the hash
    )


NPY = b"\x93NUMPY"  # how a single array begins


def read_npz(path: Path) -> Mapping[str, np.ndarray]:
    """All arrays of an .npz; never unpickles. Raises DataError with the path when that cannot be done."""
    if not path.is_file():
        raise DataError(f"{path}: expected an .npz file, found none")
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                one = file.read(len(NPY)) == NPY
                got = "a single array; use numpy.savez" if one else "a file of another kind"
                raise DataError(f"{path}: expected an .npz of named arrays, got {got}")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected an .npz of plain arrays, got: {one_line(error)}") from error


def bundled() -> Dataset:
    """The real MNIST subset inside the package: 1,000 train and 200 test images of every digit."""
    dataset = from_npz(Path(__file__).parent / "bundled" / f"{BUNDLED}.npz")
    return dataclasses.replace(dataset, source="bundled subset of MNIST, CC BY-SA 3.0")


def cache_dir() -> Path:
    """METALR_CACHE_DIR, or the user's own cache folder."""
    if given := os.environ.get("METALR_CACHE_DIR"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "metalr"


TFDS_NAME = re.compile(r"(\w[\w-]*)(?:/(\w[\w.-]*))?(?::(\d+\.\d+\.\d+))?")  # NAME, NAME/CONFIG, NAME/CONFIG:VERSION


def _folder_name(name: str) -> str | None:
    """The folder of a prepared dataset within the cache; None for what is no name of one: a path, or an .npz.

    Of a TFDS name, NAME/CONFIG:VERSION, "/" and ":" become "-".
    """
    if TFDS_NAME.fullmatch(name):
        name = name.replace("/", "-").replace(":", "-")
    plain = name != "" and all(c.isalnum() or c in "-_." for c in name)
    return name if plain and not name.startswith(".") and not name.lower().endswith(".npz") else None


def cached_path(name: str, setting: str = "data.name") -> Path:
    """Where the decoded arrays of a prepared dataset stand. Raises DataError for a name that is a path.

    setting: what messages call it.
    """
    folder = _folder_name(name)
    if folder is None:
        raise DataError(f"{setting}: expected letters, digits, '-', '_' and '.', and no ending .npz, got {name!r}")
    return cache_dir() / "datasets" / folder


def write_cache(dataset: Dataset, *, overwrite: bool = True) -> Path:
    """Save decoded arrays to the cache, whole or not at all; replaces an older copy. Returns the folder.

    overwrite: False refuses to replace other content, with a ConfigError.
    """
    target = cached_path(dataset.name)
    if not overwrite and (target / "dataset.json").is_file():
        with contextlib.suppress(DataError):  # a damaged one is mended
            there = read_cache(dataset.name)
            if there.sha256 != dataset.sha256:
                raise ConfigError(
                    f"data {dataset.name!r}: expected a new name, got that of other data ({there}); give another name, "
                    "or overwrite them"
                )

    def fill(part: Path) -> None:
        for key in PARTS:
            np.save(part / f"{key}.npy", getattr(dataset, key))
        facts = {key: getattr(dataset, key) for key in ("source", "class_split", "sha256", "class_names")}
        (part / "dataset.json").write_text(json.dumps(facts, indent=1))

    try:
        folders.make(target.parent, parents=True)
        folders.build_folder(target, fill)
    except StorageError as error:
        raise DataError(f"{target}: cannot write the data cache: {one_line(error)}") from error
    return target


def read_cache(name: str) -> Dataset:
    """Memory-mapped arrays of a prepared dataset, checked against their hash.

    Raises:
      DataError: not prepared, or the cached copy is damaged; says which command mends it.
    """
    path = cached_path(name)
    mend = f"run `metalr data prepare {name}` (or `metalr data import FILE.npz --name {name}`)"
    if not path.is_dir():
        have = ", ".join(names()) or "none"
        raise DataError(f"data {name!r}: expected a prepared dataset, have {have}; {mend}")
    try:
        facts = json.loads((path / "dataset.json").read_text())
        arrays = {key: np.load(path / f"{key}.npy", mmap_mode="r", allow_pickle=False) for key in PARTS}
        split = tuple(facts["class_split"]) if facts["class_split"] else None
        names_of = tuple(facts["class_names"]) if facts["class_names"] else None
        dataset = Dataset(name=path.name, class_split=split, source=facts["source"], class_names=names_of, **arrays)
        intact = dataset.sha256 == facts["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: the cached copy is damaged ({one_line(error)}); {mend}") from error
    if not intact:
        raise DataError(f"{path}: the cached copy is damaged (sha256 differs); {mend}")
    return dataset


def remove(name: str) -> Path:
    """Remove a prepared or imported dataset from the cache; its folder. Raises DataError if there is none."""
    if name == BUNDLED:
        raise DataError(f"data {name!r}: expected a prepared dataset, got the one inside the package")
    path = cached_path(name)
    if not path.is_dir():
        raise DataError(f"data {name!r}: expected a prepared dataset, have {', '.join(names()[1:]) or 'none'}")
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be removed: {one_line(error)}") from error
    return path


def stored_bytes(name: str) -> int:
    """How much a dataset takes on the disk; 0 of the bundled one, which is part of the package."""
    path = cached_path(name)
    return sum(file.stat().st_size for file in path.iterdir()) if name != BUNDLED and path.is_dir() else 0


def names() -> list[str]:
    """What `load` can give without further preparation."""
    folder = cache_dir() / "datasets"
    prepared = [p.name for p in folder.iterdir() if (p / "dataset.json").is_file()] if folder.is_dir() else []
    return [BUNDLED, *sorted(name for name in prepared if not name.startswith("."))]


def load_recorded(folder: Path, name: str, given: str | None = None, read: Callable[[str], Any] | None = None) -> Any:
    """As `find_recorded`, without the place."""
    return find_recorded(folder, name, given, read)[1]


def find_recorded(
    folder: Path, name: str, given: str | None = None, read: Callable[[str], Any] | None = None
) -> tuple[str, Any]:
    """(place, data) that a run folder was begun with, wherever it stands now: known by its content, not by its path.

    Args:
      name: what the run's config calls it.
      given: where it stands now; default: where it stood, from here or from the run folder.
      read: place -> what has a `sha256`; default: `load`.

    Raises:
      DataError: it is not there. ConfigError: what is there has other content.
    """
    recorded = folders.data_of(folder)
    begun = recorded.get("sha256")
    if begun is None:
        return given or name, (read or load)(given or name)
    missing: list[str] = []
    others: list[str] = []
    for place in [given] if given else list(dict.fromkeys([name, *folders.places(recorded, folder)])):
        try:
            found = (read or load)(place)
        except DataError as error:
            missing.append(one_line(error))
            continue
        if found.sha256 == begun:
            return place, found
        others.append(f"{place} (sha256 {found.sha256[:12]})")
    wanted = f"data: expected the data that {folder} was begun with (sha256 {begun[:12]})"
    if others:
        raise ConfigError(f"{wanted}, found others: {', '.join(others)}; say where they are with --data")
    raise DataError(f"{wanted}, found none; say where they are with --data: {'; '.join(missing)}")


def load(name: str) -> Dataset:
    """The dataset of that name: "mnist12k" (bundled), one that was prepared or imported, or a path to an .npz.

    Raises:
      DataError: there is none; the message names the command that prepares it.
    """
    if name == BUNDLED:
        return bundled()
    if name.lower().endswith(".npz"):
        return from_npz(Path(name).expanduser())
    path = Path(name).expanduser()
    named = _folder_name(name) is not None
    if path.exists() and not (named and cached_path(name).is_dir()):
        raise DataError(
            f"data: {name}: expected a file .npz, .csv or .parquet, or the name of a prepared dataset; folders of "
            "pictures and IDX files are imported first: `metalr data import FOLDER`"
        )
    if not named:
        raise DataError(f"data: {name}: no such file")
    return read_cache(name)
