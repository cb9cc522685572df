"""The kinds of network by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from metalr.errors import ConfigError
from metalr.models.conv4 import conv4
from metalr.models.heads import with_head_start
from metalr.models.mlp import mlp
from metalr.models.model import Model
from metalr.models.rnn import rnn
from metalr.models.transformer import transformer

LEARNED_HEAD = "learned"  # a fine-tune starts from the head in the init


class Kind(NamedTuple):
    """One row.

    Attributes:
      make: (way, input_shape, **settings) -> Model. Its settings are those of config.MODEL_SETTINGS.
      any_shape: whether inputs may be vectors, [n, features], beside images.
    """

    make: Callable[..., Model]
    any_shape: bool = False


MODELS = {"mlp": Kind(mlp, any_shape=True), "conv4": Kind(conv4), "rnn": Kind(rnn), "transformer": Kind(transformer)}


def build(name: str, way: int, input_shape: tuple[int, ...], **settings: Any) -> Model:
    """The model of that name. Raises ConfigError for an unknown name or setting.

    Args:
      way: number of outputs: classes, or targets.
      head_start, views: in settings: "learned", or a row of heads.HEAD_STARTS; as of heads.with_head_start.
      input_shape: (height, width, channels) of images; an mlp takes inputs of any shape, (features,) say.
    """
    if name not in MODELS:
        raise ConfigError(f"model.name: expected one of {tuple(MODELS)}, got {name!r}")
    _check_shape(name, input_shape, way)
    head_start, views = settings.pop("head_start", LEARNED_HEAD), settings.pop("views", 0)

    def of(outputs: int) -> Model:
        try:
            return MODELS[name].make(outputs, input_shape, **settings)
        except TypeError as error:
            raise ConfigError(f"model {name}: {error}") from error

    if head_start != LEARNED_HEAD:
        return with_head_start(of, way, head_start, views)
    if views:
        raise ConfigError(f"inner.views: expected 0 with inner.head_start {LEARNED_HEAD}, got {views!r}")
    return of(way)


def _check_shape(name: str, input_shape: Any, way: Any) -> None:
    """Raises ConfigError unless these are the shape of an image (or of a vector, if the kind takes it) and classes."""
    if (
        not isinstance(input_shape, (tuple, list))
        or len(input_shape) not in ((1, 3) if MODELS[name].any_shape else (3,))
        or not all(isinstance(n, (int, np.integer)) and n > 0 for n in input_shape)
    ):
        raise ConfigError(f"input_shape: expected (height, width, channels), all positive, got {input_shape!r}")
    if not isinstance(way, (int, np.integer)) or way < 1 + (len(input_shape) == 3):
        raise ConfigError(f"way: expected at least 2 classes, got {way!r}")
