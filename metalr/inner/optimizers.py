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


EPS_ROOT = 1e-8  # inside Adam's square root: without it the derivative at a zero gradient is NaN
# What learned rates multiply, with the derivative of it; `base_of` has all others, without.
DIFFERENTIATED: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": optax.identity,
    "adam": lambda: promoting(optax.scale_by_adam(eps_root=EPS_ROOT)),
}


class WithoutSearch(NamedTuple):
    """An optimizer that is used as it comes: nobody chooses a rate for it.

    Attributes:
      make: number of steps of the fine-tune (may be traced) -> optimizer, at its own defaults.
      source: paper.
      evaluated: (state, params) -> the params that predictions are made with; None: the params themselves.
      of_length: whether `make` looks at the number of steps, so that each length is a run of its own.
      needs_loss: whether its update cannot do without value=loss.
    """

    make: Callable[[int | jax.Array], optax.GradientTransformation]
    source: str
    evaluated: Callable[[Any, Params], Params] | None = None
    of_length: bool = False
    needs_loss: bool = False


def _contrib(name: str, **settings: Any) -> Callable[[int | jax.Array], optax.GradientTransformation]:
    return lambda steps: with_value(getattr(optax.contrib, name)(**settings))


WITHOUT_SEARCH = {
    "adam_cosine": WithoutSearch(
        lambda steps: adam_cosine(1e-3, steps),
        "Loshchilov & Hutter 2017, Adam 1e-3 with a cosine to zero", of_length=True,
    ),
    "momo_adam": WithoutSearch(_contrib("momo_adam"), "Schaipp et al. 2023", needs_loss=True),
    "momo": WithoutSearch(_contrib("momo"), "Schaipp et al. 2023", needs_loss=True),
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


def needs_no_rate(name: str) -> bool:
    """Whether a base takes steps of its own size, so that rates of 1 leave it as it comes."""
    row = WITHOUT_SEARCH.get(name)
    return row is not None and row.evaluated is None and not row.of_length


def base_of(name: str, setting: str = "inner.base") -> optax.GradientTransformation:
    """What learned rates multiply: a transformation whose update is a direction, which a step goes against.

    "sgd" (the gradient) and "adam" (Kingma & Ba 2015, algorithm 1) are differentiated through. So is no other: those
    have square roots and maxima whose derivative at zero is not a number. Their steps count as given, as in a
    first-order meta-gradient, and rates, init and all else learn.

    Args:
      name: one of these; an optimizer that needs no rate (WITHOUT_SEARCH, but for those that predict with other params,
        and adam_cosine), whose own steps are multiplied; or any optimizer of optax, as it is at a rate of 1.

    Raises ConfigError for any other name.
    """
    if name in DIFFERENTIATED:
        return DIFFERENTIATED[name]()
    if name in WITHOUT_SEARCH and not needs_no_rate(name):
        raise ConfigError(f"{setting}: expected an optimizer whose steps can be multiplied, got {name!r}")
    made = WITHOUT_SEARCH[name].make(0) if needs_no_rate(name) else with_value(by_name(name, setting)(1.0))

    def update(grads: Params, state: Any, params: Params | None = None, **more: Any) -> tuple[Params, Any]:
        if "value" not in more and name in WITHOUT_SEARCH and WITHOUT_SEARCH[name].needs_loss:
            raise ConfigError(f"value: expected update(grads, state, params, value=loss) with base {name}, got none")
        given = jax.lax.stop_gradient((grads, params, more))
        updates, state = made.update(given[0], state, given[1], **given[2])
        return jax.tree.map(jnp.negative, jax.lax.stop_gradient(updates)), state

    return optax.GradientTransformationExtraArgs(made.init, update)


def adam_cosine(rate: Any, steps: int | jax.Array) -> optax.GradientTransformation:
    """Adam whose rate goes from `rate` to zero over `steps` steps, as half a cosine (Loshchilov & Hutter 2017).

    steps: may be traced.
    """
    decay = optax.cosine_decay_schedule(1.0, 1)  # of the share that is done

    def negative_rate(count: jax.Array) -> jax.Array:
        return -rate * decay(count / steps)

    return promoting(optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(negative_rate)))


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
        with jax.ensure_compile_time_eval():  # it may be asked for inside a function that is being compiled
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
