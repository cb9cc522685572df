"""Optimizers of optax by name, made from a learning rate: for searches, grids, rivals and the outer loop alike."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from metalr.errors import ConfigError, one_line
from metalr.types import Params

Make = Callable[[Any], optax.GradientTransformation]  # learning rate ([] float, a number or a schedule) -> optimizer

# Optimizers whose update of a weight depends on that weight's own gradients, and is the rate times a direction: name ->
# the direction. Runs that differ in their rate only can then go side by side as one wide network (search.fit).
DIRECTIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: promoting(optax.scale_by_adam()),
    "sgd": optax.identity,
}


class WithoutSearch(NamedTuple):
    """An optimizer that is used as it comes: nobody chooses a rate for it.

    Attributes:
      make: number of steps of the fine-tune -> optimizer, at its own defaults.
      source: paper.
      evaluated: (state, params) -> the params that predictions are made with; None: the params themselves.
      of_length: whether `make` looks at the number of steps, so that each length is a run of its own.
    """

    make: Callable[[int], optax.GradientTransformation]
    source: str
    evaluated: Callable[[Any, Params], Params] | None = None
    of_length: bool = False


def _contrib(name: str, **settings: Any) -> Callable[[int], optax.GradientTransformation]:
    return lambda steps: with_value(getattr(optax.contrib, name)(**settings))


WITHOUT_SEARCH = {
    "adam_cosine": WithoutSearch(
        lambda steps: adam_cosine(1e-3, steps),
        "Loshchilov & Hutter 2017, Adam 1e-3 with a cosine to zero", of_length=True,
    ),
    "momo_adam": WithoutSearch(_contrib("momo_adam"), "Schaipp et al. 2023"),
    "momo": WithoutSearch(_contrib("momo"), "Schaipp et al. 2023"),
    "cocob": WithoutSearch(_contrib("cocob"), "Orabona & Tommasi 2017"),
    "schedule_free_sgd": WithoutSearch(
        _contrib("schedule_free_sgd"), "Defazio et al. 2024", optax.contrib.schedule_free_eval_params
    ),
    "schedule_free_adamw": WithoutSearch(
        _contrib("schedule_free_adamw"), "Defazio et al. 2024", optax.contrib.schedule_free_eval_params
    ),
    "prodigy": WithoutSearch(_contrib("prodigy"), "Mishchenko & Defazio 2023"),
    "dadapt_adamw": WithoutSearch(_contrib("dadapt_adamw"), "Defazio & Mishchenko 2023"),
    "dog": WithoutSearch(_contrib("dog"), "Ivgi et al. 2023"),
    "mechanize": WithoutSearch(
        lambda steps: with_value(optax.contrib.mechanize(optax.adam(1.0), weight_decay=0.0)), "Cutkosky et al. 2023"
    ),
}  # fmt: skip


def adam_cosine(rate: Any, steps: int) -> optax.GradientTransformation:
    """Adam whose rate goes from `rate` to zero over `steps` steps, as half a cosine (Loshchilov & Hutter 2017)."""
    decay = optax.cosine_decay_schedule(1.0, steps)
    return promoting(optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda count: -rate * decay(count))))


def without_search(name: str, setting: str = "optimizer") -> WithoutSearch:
    """The row of that name. Raises ConfigError for an unknown one."""
    if name not in WITHOUT_SEARCH:
        raise ConfigError(f"{setting}: expected one of {tuple(WITHOUT_SEARCH)}, got {name!r}")
    return WITHOUT_SEARCH[name]


def with_value(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """As `promoting`, for an optimizer that may look at the loss: the inner loop gives it value=loss."""
    full = optax.with_extra_args_support(optimizer)
    plain = promoting(full)
    return optax.GradientTransformationExtraArgs(plain.init, plain.update)


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
