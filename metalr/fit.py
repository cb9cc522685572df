"""Fine-tuning one network on one task's data by minibatches, epoch by epoch: what a hyperparameter search repeats.

Learning rates and seeds go side by side in one program, epochs are snapshots of one trajectory, and every batch size
is compiled once; the step is `inner`'s, as for learned rates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalr import devices, inner
from metalr.errors import ConfigError
from metalr.models import Apply, Model
from metalr.types import Episode, Params

SCORED_AT_ONCE = 1000  # images; bounds the memory of a validation
Optimizer = Callable[[jax.Array], optax.GradientTransformation]


class Arrays(NamedTuple):
    """One task's data for a search: what is trained on, what chooses, and what nothing is chosen by."""

    train_x: Any  # [train, height, width, channels] uint8 0..255 or float32 0..1
    train_y: Any  # [train] int32, 0..way-1
    val_x: Any  # [validation, …] as train_x
    val_y: Any  # [validation] int32
    test_x: Any  # [test, …] as train_x
    test_y: Any  # [test] int32


class Point(NamedTuple):
    """Accuracies at the end of an epoch, 0..1."""

    epoch: int
    validation: np.ndarray  # [rates, seeds]
    test: np.ndarray  # [rates, seeds]


def hold_out(episode: Episode, share: float = 0.2, seed: int = 0) -> Arrays:
    """A task's support set as training and validation part, stratified by class; the query set is the test part.

    A class with n images gives round(share * n) of them, but keeps one at least. Where that leaves nothing to validate
    on (one image a class), the training part is the validation part too: nothing else is there to choose by.

    Raises ConfigError unless 0 < share < 1.
    """
    if not 0 < share < 1:
        raise ConfigError(f"validation: expected a share between 0 and 1, got {share}")
    x, y, test_x, test_y = (np.asarray(v) for v in episode)
    rng = np.random.default_rng(seed)
    held = np.zeros(len(y), bool)
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        held[rng.permutation(rows)[: min(round(share * len(rows)), len(rows) - 1)]] = True
    chosen = held if held.any() else ~held
    return Arrays(x[~held], y[~held], x[chosen], y[chosen], test_x, test_y)


def unit(x: jax.Array) -> jax.Array:
    """Pixels as float32, 0..1: bytes are scaled, floats stay. So a large set can stay on the device as bytes."""
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x


def accuracy(apply: Apply, params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Share of correct predictions, some images at a time: [] float32."""
    size = min(SCORED_AT_ONCE, len(y))
    groups = -(-len(y) // size)
    fill = groups * size - len(y)
    x = jnp.pad(x, [(0, fill), *[(0, 0)] * (x.ndim - 1)]).reshape(groups, size, *x.shape[1:])
    y = jnp.pad(y, (0, fill), constant_values=-1).reshape(groups, size)  # -1 is never predicted

    def correct(group: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (apply(params, unit(group[0])).argmax(-1) == group[1]).sum()

    return jax.lax.map(correct, (x, y)).sum() / np.float32(groups * size - fill)


class Program(NamedTuple):
    """The compiled parts for one batch size; the leading axes of carry are [rates, seeds]."""

    start: Callable[..., Any]  # (init, seeds of inits or None, rates) -> carry
    epoch: Callable[..., Any]  # (carry, x, y, rates, keys, number) -> carry
    score: Callable[..., jax.Array]  # (carry, x, y) -> [rates, seeds]


def make_program(model: Model, optimizer: Optimizer, batch_size: int) -> Program:
    """Programs that train with optimizer(rate) in minibatches of `batch_size`, an incomplete last one left out."""

    def both(function: Callable[..., Any], over_seeds: Sequence[int | None], over_rates: Sequence[int | None]) -> Any:
        return jax.vmap(jax.vmap(function, in_axes=tuple(over_seeds)), in_axes=tuple(over_rates))

    def start(init: Params, rates: jax.Array) -> inner.Carry:
        """init: [seeds, …] leaves."""
        return both(lambda p, rate: (p, optimizer(rate).init(p)), (0, None), (None, 0))(init, rates)

    def epoch(
        carry: inner.Carry, x: jax.Array, y: jax.Array, rates: jax.Array, keys: jax.Array, number: jax.Array
    ) -> inner.Carry:
        steps = len(y) // batch_size

        def in_form(apply: Apply, _: int, carry: inner.Carry, x: jax.Array) -> inner.Carry:
            def on_bytes(params: Params, x: jax.Array, **options: Any) -> jax.Array:
                return apply(params, unit(x), **options)

            def one(carry: inner.Carry, rate: jax.Array, key: jax.Array) -> inner.Carry:
                step = inner.make_step(
                    on_bytes, x, y, optimizer(rate), steps,
                    batch_size=batch_size, key=jax.random.fold_in(key, number), dropout=model.dropout,
                )  # fmt: skip
                return inner.take(step, carry, 0, steps)

            if len(keys) > 1:
                return both(one, (0, None, 0), (0, 0, None))(carry, rates, keys)
            single = jax.tree.map(lambda v: v[:, 0], carry)  # an order that all rates share is drawn once
            return jax.tree.map(lambda v: v[:, None], jax.vmap(lambda c, r: one(c, r, keys[0]))(single, rates))

        return devices.by_platform(model, in_form, carry, x)

    def score(carry: inner.Carry, x: jax.Array, y: jax.Array) -> jax.Array:
        def in_form(apply: Apply, _: int, params: Params, x: jax.Array) -> jax.Array:
            return both(lambda p: accuracy(apply, p, x, y), (0,), (0,))(params)

        return devices.by_platform(model, in_form, carry[0], x)

    return Program(jax.jit(start), jax.jit(epoch, donate_argnums=0), jax.jit(score))


def trajectory(
    program: Program,
    arrays: Arrays,
    init: Params,
    rates: Sequence[float],
    keys: jax.Array,
    epochs: Sequence[int],
) -> Iterator[Point]:
    """Train at all `rates` from `init`; give the accuracies at the end of each of `epochs` (ascending).

    Args:
      arrays: on the device that shall do the work.
      init: params with a leading axis [seeds].
      keys: [seeds]; the order of the minibatches and dropout come from them.
    """
    rates_array = np.asarray(rates, np.float32)
    carry = program.start(init, rates_array)
    for number in range(max(epochs)):
        carry = program.epoch(carry, arrays.train_x, arrays.train_y, rates_array, keys, np.int32(number))
        if number + 1 in epochs:
            validation, test = (
                program.score(carry, x, y) for x, y in ((arrays.val_x, arrays.val_y), (arrays.test_x, arrays.test_y))
            )
            yield Point(number + 1, np.asarray(validation), np.asarray(test))
