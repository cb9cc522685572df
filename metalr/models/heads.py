"""Where a fine-tune's output layer starts: as it was learned, or in a way that fits any number of classes.

All but "learned" keep one column of the output layer (or none) in the init, and make as many as a task has classes when
its fine-tune begins. So a learner meets tasks with more or fewer classes than it was trained with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalr.data import transforms
from metalr.errors import ConfigError, check_whole
from metalr.models.model import Model
from metalr.types import Params

VIEW_STRENGTH = 0.5  # as `tasks.distort` counts; more gave no more on Omniglot's meta-validation tasks
NOT_SHOWN = -1e6  # the logit of a class without examples: below all others, and finite, so that losses are
Layer = dict[str, jax.Array]  # {"kernel": [inputs, outputs], "bias": [outputs]}


class HeadStart(NamedTuple):
    """One row.

    Attributes:
      start: (the init's head, features [support, inputs] or None, labels [support] int, way) -> the head that the
        fine-tune starts from, with `way` outputs.
      features: whether `start` looks at the features that enter the head.
      source: paper and place.
    """

    start: Callable[[Layer, jax.Array | None, jax.Array, int], Layer]
    features: bool
    source: str


def _shared(head: Layer, features: Any, labels: jax.Array, way: int) -> Layer:
    return {"kernel": jnp.repeat(head["kernel"], way, 1), "bias": jnp.repeat(head["bias"], way)}


def _zero(head: Layer, features: Any, labels: jax.Array, way: int) -> Layer:
    return jax.tree.map(jnp.zeros_like, _shared(head, features, labels, way))


def _prototypes(head: Layer, features: jax.Array | None, labels: jax.Array, way: int) -> Layer:
    """Logits 2 c.x - |c|^2 with the classes' mean features c: minus the squared distance, but for what all share.

    A class that the support set does not show has no mean, and is never predicted.
    """
    assert features is not None
    members = jax.nn.one_hot(labels, way, dtype=features.dtype)
    shown = members.sum(0)
    centres = members.T @ features / jnp.maximum(shown, 1)[:, None]
    return {"kernel": 2 * centres.T, "bias": jnp.where(shown > 0, -jnp.square(centres).sum(1), NOT_SHOWN)}


HEAD_STARTS = {
    "shared": HeadStart(_shared, False, "one vector for all classes: UNICORN-MAML, Ye & Chao 2022, section 5"),
    "zero": HeadStart(_zero, False, "Kao et al. 2022, section 4"),
    "prototypes": HeadStart(_prototypes, True, "Proto-MAML, Triantafillou et al. 2020, section 3"),
}


def with_head_start(build: Callable[[int], Model], way: int, name: str, views: int = 0) -> Model:
    """The model whose fine-tunes start as the row of that name says.

    Args:
      build: number of outputs -> the model with a head that is learned as it is.
      views: the features that a row looks at are those of the support set's images and of so many distorted copies of
        each, always the same ones. With few images a class, its mean is a better one then.

    Raises ConfigError for an unknown name, a model whose head is no dense layer of its own, or views of what are no
    images, or for a row that looks at no features.
    """
    if name not in HEAD_STARTS:
        raise ConfigError(f"inner.head_start: expected one of {('learned', *HEAD_STARTS)}, got {name!r}")
    row, plain, narrow = HEAD_STARTS[name], build(way), build(1)
    check_whole("inner.views", views, least=0)
    if views and not row.features:
        raise ConfigError(f"inner.views: expected 0 with inner.head_start {name}, which sees no images, got {views}")
    if views and not plain.takes_images:
        raise ConfigError(f"inner.views: expected 0 with inputs of shape {plain.input_shape}, no images, got {views}")

    def start(init: Params, x: Any, y: jax.Array) -> Params:
        """x: the support set's inputs, as `apply` takes them; y: [support] int."""
        head = init[plain.head]
        features = None
        if row.features:
            inputs = head["kernel"].shape[0]
            eye = {"kernel": jnp.eye(inputs, dtype=head["kernel"].dtype), "bias": jnp.zeros(inputs, head["bias"].dtype)}
            wide = build(inputs)
            if views:
                keys = jax.random.split(jax.random.key(0), views)
                copies = jax.vmap(lambda key: transforms.each_its_own(key, x, VIEW_STRENGTH, plain.image_shape))(keys)
                x, y = jnp.concatenate([x[None], copies]).reshape(-1, *x.shape[1:]), jnp.tile(y, views + 1)
            features = (wide.cpu_apply or wide.apply)(init | {plain.head: eye}, x)  # the fast form on GPUs too
        return init | {plain.head: row.start(head, features, y, way)}

    return dataclasses.replace(
        plain,
        init=narrow.init,
        start=start,
        settings=plain.settings | {"head_start": name} | ({"views": views} if views else {}),
        of_way=lambda ways: with_head_start(build, ways, name, views),
    )
