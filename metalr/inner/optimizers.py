"""Optimizers of optax by name, made from a learning rate: for searches, grids, rivals and the outer loop alike."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metalr.errors import ConfigError, one_line
from metalr.types import Params

Make = Callable[[Any], optax.GradientTransformation]  # learning rate ([] float, a number or a schedule) -> optimizer

# Optimizers whose update of a weight depends on that weight's own gradients, and is the rate times a direction: name ->
# the direction. Runs that differ in their rate only can then go side by side as one wide network (search.fit).
DIRECTIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: promoting(optax.scale_by_adam()),
    "sgd": optax.identity,
}


def promoting(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer of optax that works under jax_numpy_dtype_promotion "strict" too; optax's own Adam does not."""

    def init(params: Params) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.init(params)

    def update(grads: Params, state: Any, params: Params | None = None, **more: Any) -> tuple[Params, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(grads, state, params, **more)

    return optax.GradientTransformation(init, update)


def by_name(name: str, setting: str = "optimizer") -> Make:
    """rate -> optax.NAME(rate), for any optimizer of optax that is made from a learning rate alone.

    Args:
      name: "adam", "sgd", "lamb", and so on.
      setting: what messages call it.

    Raises ConfigError for a name that optax does not have, or one that does not go down on a parabola.
    """
    maker, expected = getattr(optax, name, None), f"{setting}: expected an optax optimizer made from a learning rate"
    if not callable(maker):
        near = difflib.get_close_matches(name, [other for other in dir(optax) if other.islower()], 1)
        raise ConfigError(f"{expected}, such as 'adam'; optax has no {name!r}{f', but {near[0]!r}' if near else ''}")
    try:
        optimizer = promoting(maker(optax.constant_schedule(1e-3)))
        params = {"w": jnp.ones(2)}
        updates, _ = optimizer.update(params, optimizer.init(params), params)  # the gradient of w^2 / 2
        falls = bool((updates["w"] < 0).all())
    except Exception as error:  # whatever another function of optax makes of a learning rate
        raise ConfigError(
            f"{expected}, such as 'adam', got {name!r}: {type(error).__name__}: {one_line(error)[:200]}"
        ) from error
    if not falls:
        raise ConfigError(f"{expected}, such as 'adam', got {name!r}, whose step does not go down")
    return lambda rate: promoting(maker(rate))
