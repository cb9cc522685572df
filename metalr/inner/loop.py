"""The inner loop: fine-tune params on one task's support set, by any optax transformation.

Learned hyperparameters and the optimizers of the search baselines go through this same code. All functions are pure
and work under jit, vmap and grad; `factored` has the form for ReLU stacks that never builds the adapted kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metalr.errors import ConfigError
from metalr.inner.objective import CROSS_ENTROPY, Loss, Objective, cross_entropy
from metalr.models import Apply, predict
from metalr.trees import count
from metalr.types import Episode, Params

Carry = tuple[Params, Any]  # params and the optimizer's state
Step = Callable[[Carry, "int | jax.Array"], Carry]  # (carry, number of the step) -> carry
UNROLLED_STEPS = 8  # up to here a Python loop compiles to faster code than a scan; measured in benchmarks/README.md


def make_step(
    apply: Apply,
    support_x: Any,
    support_y: Any,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    loss: Loss = cross_entropy,
    batch_size: int | None = None,
    key: jax.Array | None = None,
    dropout: bool | jax.Array = False,
    first_order: bool = False,
) -> Step:
    """One inner step, `step((params, state), number) -> (params, state)`, for numbers 0 … steps - 1. As in `adapt`."""
    support = count(support_y)
    if batch_size is not None and not 1 <= batch_size <= support:
        raise ConfigError(f"batch_size: expected 1..{support} (the support set's size), got {batch_size}")
    if key is None and (dropout is not False or batch_size is not None):
        raise ConfigError("key: expected a jax.random.key, because of dropout or minibatches; got None")
    keys: Any = (None, None) if key is None else (jax.random.fold_in(key, 0), jax.random.fold_in(key, 1))
    batch_key, drop_key = keys
    if batch_size is not None:
        batches = support // batch_size
        epochs = jnp.arange(max(1, -(-steps // batches)))  # all orders at once: a sort in every step costs more
        orders = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(batch_key, epoch), support))(epochs)

    looks = isinstance(optimizer, optax.GradientTransformationExtraArgs)  # at the loss, too

    @functools.partial(jax.jit, inline=True)  # so that the steps of an unrolled loop are traced once
    def gradient(now: Params, x: Any, y: Any, drop: dict[str, Any]) -> tuple[dict[str, jax.Array], Params]:
        def of(params: Params) -> jax.Array:
            return loss(apply(params, x, **drop), y)

        if not looks:
            return {}, jax.grad(of)(now)
        value, grads = jax.value_and_grad(of)(now)
        return {"value": value}, grads

    def step(carry: Carry, number: int | jax.Array) -> Carry:
        now, state = carry
        x, y = support_x, support_y
        if batch_size is not None:
            start = number // batches, number % batches * batch_size
            rows = jax.lax.dynamic_slice(orders, start, (1, batch_size))[0]
            x, y = jax.tree.map(lambda v: v[rows], (x, y))
        drop: dict[str, Any] = {}
        if dropout is not False:
            drop["key"] = jax.random.fold_in(drop_key, number)
        if not isinstance(dropout, bool):
            drop["dropout"] = dropout
        more, grads = gradient(now, x, y, drop)
        if first_order:
            grads = jax.lax.stop_gradient(grads)
        updates, state = optimizer.update(grads, state, now, **more)
        return optax.apply_updates(now, updates), state

    return step


def take(step: Step, carry: Carry, first: int, last: int, *, remat: bool = False) -> Carry:
    """Steps number first … last - 1. remat: recompute each in the backward pass instead of keeping its activations."""
    step = jax.checkpoint(step) if remat else step
    if last - first > UNROLLED_STEPS:
        return jax.lax.scan(lambda c, number: (step(c, number), None), carry, jnp.arange(first, last))[0]
    for number in range(first, last):
        carry = step(carry, number)
    return carry


def adapt(
    apply: Apply,
    params: Params,
    support_x: Any,
    support_y: Any,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    observe: Callable[[Params], Any] | None = None,
    observe_at: Sequence[int] | None = None,
    remat: bool = False,
    evaluated: Callable[[Any, Params], Params] | None = None,
    **options: Any,
) -> tuple[Params, Any]:
    """Take `steps` optimizer steps on the support set.

    Args:
      apply: (params, x, key=None) -> outputs.
      params: where to start, a pytree of float arrays.
      support_x, support_y: inputs and targets, any pytrees of arrays with a leading axis [support].
      optimizer: `descent.optimizer(...)`, or any optax transformation. One with extra arguments
        (optax.GradientTransformationExtraArgs) also gets the loss, update(..., value=loss).
      steps: static number of steps.
      observe: called with the params after some steps; its results are stacked. Default: nothing.
      observe_at: after which numbers of steps, ascending. Default: 0, 1, …, steps.
      evaluated: (state, params) -> the params that are observed and returned, such as
        optax.contrib.schedule_free_eval_params. Default: the params themselves.
      remat: recompute each step in the backward pass: memory for one step's activations instead of all steps'.
      loss: (outputs of `apply`, targets) -> [] float.
      batch_size: size of a minibatch; epochs are reshuffled, an incomplete last batch is left out. Default: all.
      key: for minibatches and dropout; needed by either.
      dropout: True gives `apply` a key of its own in every step; a rate ([] float) also gives it dropout=rate.
      first_order: treat the inner gradients as constants in the meta-gradient; the rates that scale them still
        learn (Finn et al. 2017, section 5.2).

    Returns:
      (params after the last step, observations with a leading axis as long as observe_at, or None).

    Raises:
      ConfigError: a batch size outside 1..support, no key where one is needed, or an observe_at that does not ascend
        within 0..steps.
    """
    step = make_step(apply, support_x, support_y, optimizer, steps, **options)
    carry = (params, optimizer.init(params))

    def final(carry: Carry) -> Params:
        return carry[0] if evaluated is None else evaluated(carry[1], carry[0])

    if observe is None:
        return final(take(step, carry, 0, steps, remat=remat)), None
    stops = list(range(steps + 1)) if observe_at is None else check_stops(observe_at, steps)
    if len(stops) == steps + 1 and steps > UNROLLED_STEPS:
        one = jax.checkpoint(step) if remat else step

        def body(carry: Carry, number: jax.Array) -> tuple[Carry, Any]:
            carry = one(carry, number)
            return carry, observe(final(carry))

        first = observe(final(carry))
        carry, rest = jax.lax.scan(body, carry, jnp.arange(steps))
        return final(carry), jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)
    seen, done = [], 0
    for stop in stops:
        carry, done = take(step, carry, done, stop, remat=remat), stop
        seen.append(observe(final(carry)))
    carry = take(step, carry, done, steps, remat=remat)
    return final(carry), jax.tree.map(lambda *v: jnp.stack(v), *seen)


def check_stops(at: Sequence[int], steps: int) -> list[int]:
    """Numbers of steps to look after, as a list. Raises ConfigError unless they ascend, within 0..steps."""
    stops = [int(number) for number in at]
    if not stops or stops != sorted(set(stops)) or stops[0] < 0 or stops[-1] > steps:
        raise ConfigError(f"observe_at: expected numbers of steps that ascend, of 0..{steps}, got {list(at)}")
    return stops


def scores_after(
    apply: Apply,
    params: Params,
    episode: Episode,
    optimizer: optax.GradientTransformation,
    stops: jax.Array,
    most: int,
    *,
    objective: Objective = CROSS_ENTROPY,
    evaluated: Callable[[Any, Params], Params] | None = None,
    **options: Any,
) -> jax.Array:
    """As `adaptation_curve`, after numbers of steps that may be traced: one program for all, with one step in it.

    It has no derivative in reverse mode.

    Args:
      stops: [points] int, ascending.
      most: no stop is beyond it; static.

    Returns: [points] float32.
    """
    step = make_step(apply, episode.support_x, episode.support_y, optimizer, most, loss=objective.loss, **options)

    def to(reached: tuple[Carry, jax.Array], stop: jax.Array) -> tuple[tuple[Carry, jax.Array], jax.Array]:
        carry, done = reached
        carry = jax.lax.fori_loop(done, stop, lambda number, carry: step(carry, number), carry)
        now = carry[0] if evaluated is None else evaluated(carry[1], carry[0])
        outputs = predict(apply, now, episode.support_x, episode.query_x)
        return (carry, stop), objective.score(outputs, episode.query_y)

    stops = jnp.asarray(stops)
    begun = (params, optimizer.init(params)), jnp.zeros((), stops.dtype)
    return jax.lax.scan(to, begun, stops)[1]


def adaptation_curve(
    apply: Apply,
    params: Params,
    episode: Episode,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    objective: Objective = CROSS_ENTROPY,
    **options: Any,
) -> jax.Array:
    """The objective's score on one episode's query set after 0, 1, …, steps inner steps (or those in observe_at).

    Returns: [steps + 1] float32.
    """

    def observe(now: Params) -> jax.Array:
        return objective.score(predict(apply, now, episode.support_x, episode.query_x), episode.query_y)

    support = episode.support_x, episode.support_y
    _, curve = adapt(apply, params, *support, optimizer, steps, observe=observe, loss=objective.loss, **options)
    return curve
