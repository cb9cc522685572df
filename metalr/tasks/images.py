"""Task families over image-classification data, their disjoint splits, and the sampler `key -> Episode`.

A family says what one task is; a split says which part of its classes, images and transforms belongs to
meta-training, meta-validation and meta-test. One transform is drawn per episode and shared by all its classes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalr.data import Dataset, last_sixth, transforms
from metalr.errors import ConfigError, DataError, check_whole
from metalr.tasks.samplers import Part, Parts, choose, second_key
from metalr.types import Episode

Shape = tuple[int, int, int]  # height, width, channels
LEAST_CLASSES = 6  # of a dataset whose classes are split at random: with fewer, meta-validation would have none
ARC = 30  # degrees; the circle's 12 arcs are dealt to the splits in turn
ARCS = {"train": (0, 2, 4, 6, 8, 10), "val": (1, 5, 9), "test": (3, 7, 11)}
PERMUTATIONS = {
    "train": (0, 1 << 30),
    "val": (1 << 30, 1 << 29),
    "test": (1 << 31, 1 << 30),
}  # (first id, how many)


GAINS = 0.01, 1.0  # pixels stay within 0..1; the range is cut into 12 bands of equal ratio, dealt as the arcs are


class Family(NamedTuple):
    """What one task is. See FAMILIES.

    Attributes:
      classes: "all" classes in every task, or a "subset" of `way` of them.
      transform: a row of TRANSFORMS, what is done to a task's images.
      labels: "fixed" (the class is the label), "random" (all orders in all splits), or "order" (random, and the
        orders themselves are held out).
      held_out: what else is held out beside images: the axes that the family claims to generalise over.
    """

    classes: str
    transform: str
    labels: str
    held_out: tuple[str, ...]


FAMILIES = {
    "digits": Family("subset", "rotation", "random", ("classes", "angles")),
    "rotated": Family("all", "rotation", "fixed", ("angles",)),
    "permuted": Family("all", "permutation", "fixed", ("permutations",)),
    "relabeled": Family("all", "rotation", "order", ("angles", "orders")),
    "scaled": Family("all", "scale", "fixed", ("gains",)),
    "classes": Family("subset", "turns", "random", ("classes",)),
}


@dataclasses.dataclass(frozen=True, eq=False)
class TaskSplit:
    """The tasks of one part ("train", "val" or "test") of a family over a dataset.

    Attributes:
      images: [n, height, width, channels], uint8 or float32; the part's own images, sorted by class.
      first, count: int32 [classes]; where each class begins in `images` and how many it has.
      class_ids: the dataset's labels of those classes; class_names: what they are called.
      angles: (start, degrees) of each arc that a rotation may come from.
      permutations: (first, count) of the permutation ids.
      gains: (lowest, highest) of each band that a factor may come from.
      orders: (residues allowed, modulus) for the label orders: see _label_order.
      turns: whether a family that turns its classes does so.
    """

    family: str
    part: str
    images: np.ndarray
    first: np.ndarray
    count: np.ndarray
    class_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    angles: tuple[tuple[int, int], ...]
    permutations: tuple[int, int]
    gains: tuple[tuple[float, float], ...]
    orders: tuple[tuple[int, ...], int]
    image_sha256: str
    turns: bool = True

    @property
    def classes(self) -> int:
        """How many classes a task can choose from (each turn of a class counts as one)."""
        return len(self.class_ids) * (4 if self.transform == "turns" else 1)

    @property
    def transform(self) -> str:
        """What is done to a task's images: as in Family, "none" where turning is left out."""
        transform = FAMILIES[self.family].transform
        return "none" if transform == "turns" and not self.turns else transform

    @functools.cached_property
    def pool(self) -> Pool:
        """The part's arrays on the device, once for samplers of all sizes."""
        with jax.ensure_compile_time_eval():  # arrays for good, also if it is first asked for inside jit
            images = jnp.asarray(self.images.reshape(len(self.images), -1))
            return Pool(images, jnp.asarray(self.first), jnp.asarray(self.count))

    def describe(self) -> dict:
        """Everything that defines the part, as plain JSON values; images by their hash."""
        family = FAMILIES[self.family]
        facts: dict = {"part": self.part, "classes": list(self.class_ids), "images": int(self.count.sum())}
        facts["image_sha256"] = self.image_sha256
        if family.transform == "turns" and not self.turns:
            facts["turns"] = False
        axis = TRANSFORMS[family.transform].axis
        if axis is not None:
            facts[axis] = json.loads(json.dumps(getattr(self, axis)))
        if family.labels == "order":
            facts["orders"] = [list(self.orders[0]), self.orders[1]]
        return facts


class Splits(NamedTuple):
    """Disjoint parts of one family over one dataset."""

    train: TaskSplit
    val: TaskSplit
    test: TaskSplit

    @property
    def sha256(self) -> str:
        """The hash that travels with every result made on these splits."""
        facts = [self.train.family, *(part.describe() for part in self)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def make_splits(dataset: Dataset, family: str, seed: int = 0, *, turns: bool = True) -> Splits:
    """Deal the dataset's classes, images and transforms to meta-train, meta-validation and meta-test.

    Meta-test images come from the dataset's test part, except in the family "classes", where whole classes are held
    out: by the dataset's own class split, or 64/16/20 % by `seed`. Meta-validation images are the last sixth of each
    class's training images. "digits" holds out the last 40 % of the classes (digits 6-9).

    Args:
      turns: False leaves the family "classes" its images upright, each class one class; they need not be square then.

    Raises:
      ConfigError: no such family. DataError: the dataset is too small or of the wrong kind for it.
    """
    if family not in FAMILIES:
        raise ConfigError(f"tasks.family: expected one of {tuple(FAMILIES)}, got {family!r}")
    kind = FAMILIES[family]
    if not turns and kind.transform != "turns":
        raise ConfigError(f"tasks.turns: expected True, because family {family!r} turns no classes, got False")
    square = TRANSFORMS[kind.transform].square and (kind.transform != "turns" or turns)
    if square and dataset.shape[0] != dataset.shape[1]:
        raise DataError(
            f"{dataset.name}: family {family!r} turns images; expected square ones, got {dataset.shape}; "
            "import them with --size, or leave turning out (--tasks.turns False)"
        )
    parts = _split_by_class(dataset, seed) if family == "classes" else _split_by_image(dataset, kind)
    modulus = 7 if dataset.classes >= 7 else 3
    if kind.labels == "order" and dataset.classes < 3:
        raise DataError(f"{dataset.name}: family {family!r} needs 3 or more classes, got {dataset.classes}")
    residues = {"train": tuple(range(modulus - 2)), "val": (modulus - 2,), "test": (modulus - 1,)}
    bands = np.geomspace(*GAINS, 13).round(6).tolist()
    splits = []
    for part, (images, labels, class_ids) in parts.items():
        order = np.argsort(labels, kind="stable")
        count = np.array([np.sum(labels == c) for c in class_ids], np.int32)
        if not len(class_ids) or not count.all():
            if not len(class_ids):
                raise DataError(f"{dataset.name}: class_split: expected a class of meta-{part}, got none")
            empty = [dataset.class_names[c] if dataset.class_names else str(c) for c in class_ids[count == 0]]
            raise DataError(
                f"{dataset.name}: family {family!r} leaves a class of meta-{part} without images: "
                f"{', '.join(empty[:5])}; leave such classes out (metalr data import FILE.npz "
                "--min-per-class N)"
            )
        images = np.ascontiguousarray(images[order])
        splits.append(
            TaskSplit(
                family=family,
                part=part,
                images=images,
                first=(np.cumsum(count) - count).astype(np.int32),
                count=count,
                class_ids=tuple(int(c) for c in class_ids),
                class_names=tuple(dataset.class_names[c] if dataset.class_names else str(c) for c in class_ids),
                angles=tuple((ARC * arc, ARC) for arc in ARCS[part]),
                permutations=PERMUTATIONS[part],
                gains=tuple((bands[arc], bands[arc + 1]) for arc in ARCS[part]),
                orders=(residues[part], modulus),
                image_sha256=hashlib.sha256(images.tobytes()).hexdigest(),
                turns=turns,
            )
        )
    return Splits(*splits)


def _split_by_image(dataset: Dataset, kind: Family) -> dict:
    if not len(dataset.test_labels):
        raise DataError(f"{dataset.name}: expected a test part, got none; give test_images and test_labels")
    labels = dataset.train_labels
    classes = np.arange(dataset.classes)
    val = last_sixth(labels)
    known = classes
    new = classes
    if "classes" in kind.held_out:
        held = round(0.4 * len(classes))
        if held < 2 or len(classes) - held < 2:
            raise DataError(f"{dataset.name}: holding out 40 % of the classes needs 4 or more, got {len(classes)}")
        known, new = classes[:-held], classes[-held:]

    def part(images: np.ndarray, labels: np.ndarray, keep: np.ndarray, ids: np.ndarray) -> tuple:
        keep = keep & np.isin(labels, ids)
        return images[keep], labels[keep], ids

    everything = np.ones(len(dataset.test_labels), bool)
    return {
        "train": part(dataset.train_images, labels, ~val, known),
        "val": part(dataset.train_images, labels, val, known),
        "test": part(dataset.test_images, dataset.test_labels, everything, new),
    }


def _split_by_class(dataset: Dataset, seed: int) -> dict:
    if dataset.class_split is not None:
        assigned = np.array(dataset.class_split)
        if "test" not in assigned:  # published without test classes: validation classes serve for both
            first_half = np.cumsum(assigned == "val") <= np.sum(assigned == "val") // 2
            assigned = np.where((assigned == "val") & ~first_half, "test", assigned)
    else:
        if dataset.classes < LEAST_CLASSES:  # one of them for meta-validation
            raise DataError(
                f"{dataset.name}: family 'classes' needs {LEAST_CLASSES} or more classes, got {dataset.classes}"
            )
        shuffled = np.random.default_rng(seed).permutation(dataset.classes)
        cuts = np.ceil(np.array([0.64, 0.80]) * dataset.classes).astype(int)
        assigned = np.empty(dataset.classes, "<U5")
        for part, ids in zip(("train", "val", "test"), np.split(shuffled, cuts), strict=True):
            assigned[ids] = part
    images = np.concatenate([dataset.train_images, dataset.test_images])
    labels = np.concatenate([dataset.train_labels, dataset.test_labels])
    parts = {}
    for part in ("train", "val", "test"):
        ids = np.flatnonzero(assigned == part)
        keep = np.isin(labels, ids)
        parts[part] = (images[keep], labels[keep], ids)
    return parts


class Pool(NamedTuple):
    """A split's arrays on the device: the sampler's argument, so that jit never bakes images into a program."""

    images: jax.Array  # [n, height * width * channels] uint8 0..255 or float32 0..1
    first: jax.Array  # [classes] int32
    size: jax.Array  # [classes] int32; images of each class


def make_sampler(
    split: TaskSplit, way: int, shot: int, query: int, *, distort: float = 0.0, label_noise: float = 0.0
) -> Part:
    """The split's arrays and a jit-able `sample(pool, key) -> Episode` with way*shot support, way*query query images.

    Support and query are one draw without replacement; their rows are shuffled.

    Args:
      distort: 0..1; above 0, every episode goes through one random affine map of about that strength, and half of
        them are mirrored: classes that no data has; every image through a weaker one of its own too. For meta-training
        in the family "classes", where no angle is held out and no label is fixed.
      label_noise: share of the support labels, 0..1, that are drawn anew, each label as likely; query labels stay.

    Raises:
      ConfigError: more ways than classes, fewer than the family's fixed number, too few images in a class, label_noise
        outside 0..1, or distort outside 0..1 or in another family.
    """
    if not 0 <= label_noise <= 1:
        raise ConfigError(f"tasks.label_noise: expected 0..1, got {label_noise}")
    if not 0 <= distort <= 1 or (distort and FAMILIES[split.family].transform != "turns"):
        raise ConfigError(
            f"tasks.distort: expected 0..1 in the family 'classes', 0 in the others, got {distort} in {split.family!r}"
        )
    kind = FAMILIES[split.family]
    for name, value, least in (("way", way, 2), ("shot", shot, 1), ("query", query, 1)):
        check_whole(f"tasks.{name}", value, least)
    if kind.classes == "all" and way != split.classes:
        raise ConfigError(f"tasks.way: family {split.family!r} uses all {split.classes} classes, got {way}")
    if way > split.classes:
        raise ConfigError(f"tasks.way: expected at most {split.classes} (classes of meta-{split.part}), got {way}")
    need, have = shot + query, int(split.count.min())
    if need > have:
        small = [name for name, count in zip(split.class_names, split.count.tolist(), strict=True) if count < need]
        raise ConfigError(
            f"tasks.shot + tasks.query: expected at most {have} (the smallest class of meta-{split.part}), got {need}; "
            f"{len(small)} of its {len(split.count)} classes have fewer images: {', '.join(small[:5])}"
            f"{', …' if len(small) > 5 else ''}; lower one, or leave such classes out (metalr data import FILE.npz "
            "--min-per-class N)"
        )
    height, width, channels = split.images.shape[1:]

    def sample(pool: Pool, key: jax.Array) -> Episode:
        class_key, label_key, image_key, transform_key, row_key = jax.random.split(key, 5)
        chosen = jnp.arange(way)
        if kind.classes == "subset":
            chosen = choose(class_key, split.classes, way)
        turns = jnp.zeros(way, jnp.int32)
        if split.transform == "turns":
            chosen, turns = chosen // 4, chosen % 4
        labels = jnp.arange(way)
        if kind.labels == "order":
            labels = _label_order(label_key, way, *split.orders)
        picks = jax.vmap(choose, (0, 0, None))(jax.random.split(image_key, way), pool.size[chosen], need)
        rows = pool.first[chosen][:, None] + picks  # [way, shot + query]
        labels, turns = (jnp.broadcast_to(v[:, None], rows.shape) for v in (labels, turns))

        def shuffled(key: jax.Array, of: slice) -> tuple[jax.Array, ...]:
            order = jax.random.permutation(key, way * (of.stop - of.start))
            return tuple(v[:, of].reshape(-1)[order] for v in (rows, labels, turns))

        support_key, query_key = jax.random.split(row_key)
        parts = shuffled(support_key, slice(0, shot)), shuffled(query_key, slice(shot, need))
        rows, labels, turns = (jnp.concatenate(v) for v in zip(*parts, strict=True))
        pixels = _transform(split, transform_key, pool.images[rows], turns, (height, width, channels))
        if distort:
            pixels = transforms.distort(transform_key, pixels, distort, (height, width, channels))
        x, y = pixels.reshape(-1, height, width, channels), labels.astype(jnp.int32)
        support_y = y[: way * shot]
        if label_noise:
            wrong_key, drawn_key = jax.random.split(second_key(label_key))
            drawn = jax.random.randint(drawn_key, support_y.shape, 0, way)
            support_y = jnp.where(jax.random.bernoulli(wrong_key, label_noise, support_y.shape), drawn, support_y)
        return Episode(x[: way * shot], support_y, x[way * shot :], y[way * shot :])

    return Part(split.pool, sample)


def make_samplers(
    splits: Splits, way: int, shot: int, query: int, *, distort: float = 0.0, label_noise: float = 0.0
) -> Parts:
    """The samplers of all parts; only meta-training is distorted. See make_sampler."""
    train, *others = splits
    noisy = functools.partial(make_sampler, way=way, shot=shot, query=query, label_noise=label_noise)
    return Parts(noisy(train, distort=distort), *(noisy(split) for split in others))


def _label_order(key: jax.Array, way: int, residues: tuple[int, ...], modulus: int) -> jax.Array:
    """A random order of `way` labels whose Lehmer digits sum to one of `residues` modulo `modulus`: [way] int32.

    Every order has exactly one Lehmer code, so splits with different residues never share an order, whatever
    `way`; modulus 2 would split by the parity of the permutation.
    """
    digit_key, residue_key = jax.random.split(key)
    sizes = jnp.arange(way, 0, -1)
    digits = jax.random.randint(digit_key, (way,), 0, sizes)
    free = way - modulus  # the digit with exactly `modulus` values takes up the residue
    target = jax.random.choice(residue_key, jnp.array(residues))
    digits = digits.at[free].set((target - digits.sum() + digits[free]) % modulus)

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        order, taken = carry
        rank = jnp.cumsum(~taken) - 1  # rank of each label among those left
        label = jnp.argmax((rank == digits[i]) & ~taken)
        return order.at[i].set(label), taken.at[label].set(True)

    order, _ = jax.lax.fori_loop(0, way, body, (jnp.zeros(way, jnp.int32), jnp.zeros(way, bool)))
    return order


def _transform(
    split: TaskSplit,
    key: jax.Array,
    pixels: jax.Array,
    turns: jax.Array,
    shape: Shape,
) -> jax.Array:
    """The episode's images, transformed: uint8 0..255 or float 0..1 [n, pixels] -> float32 [n, pixels], 0..1."""
    height, width, channels = shape
    images = pixels.reshape(-1, height * width, channels)
    changed = TRANSFORMS[split.transform].apply(split, key, images, turns, shape)
    pixels = changed.reshape(-1, height * width * channels).astype(jnp.float32)
    return pixels / 255 if split.images.dtype == np.uint8 else pixels


def _unchanged(split: TaskSplit, key: jax.Array, images: jax.Array, turns: jax.Array, shape: Shape) -> jax.Array:
    return images


def _rotation(split: TaskSplit, key: jax.Array, images: jax.Array, turns: jax.Array, shape: Shape) -> jax.Array:
    arc_key, angle_key = jax.random.split(key)
    start, degrees = jnp.array(split.angles, jnp.float32)[jax.random.randint(arc_key, (), 0, len(split.angles))]
    return transforms.rotate(images, start + degrees * jax.random.uniform(angle_key), shape)


def _permutation(split: TaskSplit, key: jax.Array, images: jax.Array, turns: jax.Array, shape: Shape) -> jax.Array:
    first, count = split.permutations
    identity = jnp.uint32(first) + jax.random.randint(key, (), 0, count).astype(jnp.uint32)
    return images[:, jax.random.permutation(jax.random.fold_in(jax.random.key(0), identity), images.shape[1])]


def _scale(split: TaskSplit, key: jax.Array, images: jax.Array, turns: jax.Array, shape: Shape) -> jax.Array:
    band_key, gain_key = jax.random.split(key)
    low, high = jnp.log(jnp.array(split.gains))[jax.random.randint(band_key, (), 0, len(split.gains))]
    return images * jnp.exp(jax.random.uniform(gain_key, minval=low, maxval=high))


def _turns(split: TaskSplit, key: jax.Array, images: jax.Array, turns: jax.Array, shape: Shape) -> jax.Array:
    index = np.arange(shape[0] * shape[1]).reshape(shape[:2])
    orders = jnp.array([np.rot90(index, k).reshape(-1) for k in range(4)])
    return jax.vmap(lambda image, turn: image[orders[turn]])(images, turns)


class Transform(NamedTuple):
    """What is done to the images of a task.

    Attributes:
      apply: (split, key of the episode, images [n, height * width, channels] as they are stored, quarter turns [n],
        (height, width, channels)) -> the same shape, uint8 or float.
      square: whether images must be square.
      axis: the field of TaskSplit that says what a part may draw, and so stands in the split's hash; None: nothing.
    """

    apply: Callable[[TaskSplit, jax.Array, jax.Array, jax.Array, Shape], jax.Array]
    square: bool = False
    axis: str | None = None


TRANSFORMS = {
    "none": Transform(_unchanged),
    "rotation": Transform(_rotation, square=True, axis="angles"),  # by one angle
    "permutation": Transform(_permutation, axis="permutations"),  # of pixels
    "scale": Transform(_scale, axis="gains"),  # by one factor
    "turns": Transform(_turns, square=True),  # quarter turns of each class, which make four classes of one
}
