"""Fine-tuning one network on one task's data by minibatches, epoch by epoch: what a hyperparameter search repeats.

Learning rates go side by side in one program, epochs are snapshots of one trajectory, and every batch size is compiled
once; the step is `inner`'s, as for learned rates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalr import inner, models
from metalr.errors import ConfigError
from metalr.inner import CROSS_ENTROPY, Objective, optimizers
from metalr.models import Apply, Model
from metalr.outer import devices
from metalr.trees import count
from metalr.types import Episode, Params

SCORED_AT_ONCE = 1000  # examples; bounds the memory of a validation
VECTOR = 16  # float32 numbers in the widest CPU registers; products with a number of inputs that it divides are faster
Optimizer = Callable[[jax.Array], optax.GradientTransformation]


class Arrays(NamedTuple):
    """One task's data for a search: what is trained on, what chooses, and what nothing is chosen by."""

    train_x: Any  # pytree with a leading axis [train]; images uint8 0..255 or float32 0..1
    train_y: Any  # [train] int32, 0..way-1, or other targets
    val_x: Any  # [validation, …] as train_x
    val_y: Any  # [validation, …] as train_y
    test_x: Any  # [test, …] as train_x
    test_y: Any  # [test, …] as train_y


class Point(NamedTuple):
    """The objective's scores at the end of an epoch (accuracies, say)."""

    epoch: int
    validation: np.ndarray  # [rates, seeds]
    test: np.ndarray  # [rates, seeds]


def hold_out(episode: Episode, share: float = 0.2, seed: int = 0, *, by_class: bool) -> Arrays:
    """A task's support set as training and validation part; the query set is the test part.

    Args:
      by_class: integer labels are classes, and stratified: a class with n examples gives round(share * n) of them, one
        at least, and keeps one at least. Of other targets a random share is held out, one example at least, and one is
        kept at least. With one example (of each class) the training part is the validation part too: nothing else is
        there to choose by.

    Raises ConfigError unless 0 < share < 1.
    """
    if not 0 < share < 1:
        raise ConfigError(f"validation: expected a share between 0 and 1, got {share}")
    x, y, test_x, test_y = (jax.tree.map(np.asarray, v) for v in episode)
    rng = np.random.default_rng(seed)
    held = np.zeros(count(y), bool)
    labels = by_class and isinstance(y, np.ndarray) and y.ndim == 1 and np.issubdtype(y.dtype, np.integer)
    groups = [np.flatnonzero(y == label) for label in np.unique(y)] if labels else [np.arange(len(held))]
    for rows in groups:
        held[rng.permutation(rows)[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
    chosen = held if held.any() else ~held
    train_x, train_y = jax.tree.map(lambda v: v[~held], (x, y))
    val_x, val_y = jax.tree.map(lambda v: v[chosen], (x, y))
    return Arrays(train_x, train_y, val_x, val_y, test_x, test_y)


def outputs_of(apply: Apply, params: Params, x: Any, prepare: Callable[[Any], Any] = lambda x: x) -> Any:
    """The outputs of `apply` for all examples, some at a time, in their order.

    Groups are of one size and of real examples only, since predictions of a transductive model depend on all of them:
    the last one takes examples of the group before again, whose outputs are left out.
    """
    number = count(x)
    groups = -(-number // SCORED_AT_ONCE)
    size = -(-number // groups)
    starts = np.minimum(np.arange(groups) * size, number - size)
    again = groups * size - number  # of the last group

    def of(start: jax.Array) -> Any:
        some = jax.tree.map(lambda v: jax.lax.dynamic_slice_in_dim(v, start, size), x)
        return apply(params, prepare(some))

    def joined(outputs: jax.Array) -> jax.Array:
        before = outputs[:-1].reshape((groups - 1) * size, *outputs.shape[2:])
        return jnp.concatenate([before, outputs[-1, again:]])

    return jax.tree.map(joined, jax.lax.map(of, starts))


def without_blank_pixels(model: Model, optimizer: str, arrays: Arrays, init: Params) -> tuple[Arrays, Params]:
    """The same training on fewer inputs: pixels that are zero in every image, of all three parts, are left out.

    No gradient moves their rows of the first kernel and no prediction depends on them: scores stay what they are.
    MNIST has 65 of them. Only for ReLU stacks of images, and optimizers whose update of a weight depends on its own
    gradients.

    Args:
      arrays: of numpy, pixels [n, height, width, channels].
      init: params of `model`, with leading axes or none.

    Returns:
      (arrays, init): pixels [n, 1, inputs, 1], and as many rows in the first kernel.
    """
    if not (model.relu_stack and model.takes_images and optimizer in optimizers.DIRECTIONS):
        return arrays, init
    flat = [images.reshape(len(images), -1) for images in (arrays.train_x, arrays.val_x, arrays.test_x)]
    blank = ~np.any([images.any(axis=0) for images in flat], axis=0)
    kept = np.sort(np.argsort(blank, kind="stable")[: max(1, -(-np.sum(~blank) // VECTOR)) * VECTOR])
    x = [images[:, None, kept, None] for images in flat]
    first = next(name for name in ("dense_0", model.head) if name in init)
    layer = init[first] | {"kernel": init[first]["kernel"][..., kept, :]}
    return arrays._replace(train_x=x[0], val_x=x[1], test_x=x[2]), init | {first: layer}


class Program(NamedTuple):
    """The compiled parts for one batch size; carry holds the networks of all rates side by side."""

    start: Callable[..., Any]  # (init, rates) -> carry
    epoch: Callable[..., Any]  # (carry, x, y, rates, key, number) -> carry
    score: Callable[..., jax.Array]  # (carry, x, y) -> [rates]


class _Form(NamedTuple):
    """How networks that differ in their rate only go side by side in one step of the inner loop."""

    start: Callable[[Params, jax.Array], inner.Carry]
    make_step: Callable[..., inner.Step]  # (apply, x, y, rates, steps, **options) of inner.make_step
    params: Callable[[Params], Params]  # one rate's params in carry -> the model's


def _side_by_side(optimizer: Optimizer, objective: Objective) -> _Form:
    """The plain form: a vmap over rates, which stand in front."""

    def start(init: Params, rates: jax.Array) -> inner.Carry:
        return jax.vmap(lambda rate: (init, optimizer(rate).init(init)))(rates)

    def make_step(apply: Apply, x: jax.Array, y: jax.Array, rates: jax.Array, steps: int, **options: Any) -> inner.Step:
        def step(carry: inner.Carry, number: int | jax.Array) -> inner.Carry:
            def one(carry: inner.Carry, rate: jax.Array) -> inner.Carry:
                step = inner.make_step(apply, x, y, optimizer(rate), steps, loss=objective.loss, **options)
                return step(carry, number)

            return jax.vmap(one)(carry, rates)

        return step

    return _Form(start, make_step, lambda params: params)


def _wide(direction: Callable[[], optax.GradientTransformation], objective: Objective) -> _Form:
    """The fast form: one network as wide as all, whose loss is the sum of theirs, so each gets its own gradient.

    A kernel [inputs, outputs] is kept as [rates, outputs, inputs]: all rates' kernels are one wide matrix, so products
    are large and the input is read once, and their gradient comes out of its product in that very order. For
    optimizers whose update is elementwise, and the rate times a direction.
    """

    def turn(params: Params) -> Params:
        return jax.tree.map(jnp.transpose, params)

    def optimizer(rates: jax.Array) -> optax.GradientTransformation:
        def scaled(update: jax.Array) -> jax.Array:
            return -rates.reshape(-1, *[1] * (update.ndim - 1)) * update

        return optax.chain(direction(), optax.stateless(lambda updates, _: jax.tree.map(scaled, updates)))

    def start(init: Params, rates: jax.Array) -> inner.Carry:
        params = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], len(rates), 0), turn(init))
        return params, optimizer(rates).init(params)

    def make_step(apply: Apply, x: jax.Array, y: jax.Array, rates: jax.Array, steps: int, **options: Any) -> inner.Step:
        def together(params: Params, x: jax.Array, **options: Any) -> jax.Array:
            return jax.vmap(lambda one: apply(turn(one), x, **options))(params)

        def loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
            return jax.vmap(objective.loss, (0, None))(outputs, targets).sum()

        return inner.make_step(together, x, y, optimizer(rates), steps, loss=loss, **options)

    return _Form(start, make_step, turn)


def make_programs(
    model: Model, optimizer: str, *, objective: Objective = CROSS_ENTROPY, plain: bool = False
) -> Callable[[int], Program]:
    """Batch size -> compiled program that trains with optax.NAME in minibatches, an incomplete last one left out.

    Share it between the tasks of one model: every batch size is compiled once.

    Args:
      optimizer: a name that optimizers.by_name takes.
      objective: what is minimised, and what a score is.
      plain: never use the wide form (it gives the same; tests compare).
    """
    if model.uses_support:
        raise ConfigError(
            "model.norm: expected batch, instance or none in a search, whose training sets are too large to be part of "
            "every prediction, got support"
        )
    # Of image classification only: tasks of your own come as your network takes them, in training too.
    prepare = models.unit if model.takes_images and objective.name == CROSS_ENTROPY.name else lambda x: x
    wide = optimizer in optimizers.DIRECTIONS and model.relu_stack and not plain
    form = (
        _wide(optimizers.DIRECTIONS[optimizer], objective)
        if wide
        else _side_by_side(optimizers.by_name(optimizer), objective)
    )

    def score(carry: inner.Carry, x: jax.Array, y: jax.Array) -> jax.Array:
        def in_form(apply: Apply, _: int, params: Params, x: jax.Array) -> jax.Array:
            def one(params: Params) -> jax.Array:
                return objective.score(outputs_of(apply, form.params(params), x, prepare), y)

            return jax.vmap(one)(params)

        return devices.by_platform(model, in_form, carry[0], x)

    start, score = jax.jit(form.start), jax.jit(score)

    @functools.cache
    def program(batch_size: int) -> Program:
        def epoch(
            carry: inner.Carry, x: jax.Array, y: jax.Array, rates: jax.Array, key: jax.Array, number: jax.Array
        ) -> inner.Carry:
            steps = count(y) // batch_size

            def in_form(apply: Apply, _: int, carry: inner.Carry, x: jax.Array) -> inner.Carry:
                def prepared(params: Params, x: Any, **options: Any) -> Any:
                    return apply(params, prepare(x), **options)

                step = form.make_step(
                    prepared, x, y, rates, steps,
                    batch_size=batch_size, key=jax.random.fold_in(key, number), dropout=model.dropout,
                )  # fmt: skip
                return inner.take(step, carry, 0, steps)

            return devices.by_platform(model, in_form, carry, x)

        return Program(start, jax.jit(epoch, donate_argnums=0), score)

    return program


def trajectory(
    program: Program,
    arrays: Arrays,
    init: Params,
    rates: Sequence[float],
    keys: jax.Array,
    epochs: Sequence[int],
    between: Callable[[], None] = lambda: None,
) -> Iterator[Point]:
    """Train at all `rates` from `init`; give the scores at the end of each of `epochs` (ascending).

    Args:
      arrays: on the device that shall do the work.
      init: params with a leading axis [seeds].
      keys: [seeds]; the order of the minibatches and dropout come from them.
      between: called before every epoch; what it raises ends the training.
    """
    rates_array, seeds = np.asarray(rates, np.float32), range(len(keys))
    carries = [program.start(jax.tree.map(lambda v, seed=seed: v[seed], init), rates_array) for seed in seeds]
    for number in range(max(epochs)):
        between()
        for i in seeds:
            carries[i] = program.epoch(
                carries[i], arrays.train_x, arrays.train_y, rates_array, keys[i], np.int32(number)
            )
        if number + 1 in epochs:
            validation, test = (
                np.stack([program.score(carry, x, y) for carry in carries], axis=1)
                for x, y in ((arrays.val_x, arrays.val_y), (arrays.test_x, arrays.test_y))
            )
            yield Point(number + 1, validation, test)
