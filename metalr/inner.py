"""The inner loop: fine-tune params on one task's support set, by any optax transformation.

Learned rates and the optimizers of the search baselines go through this same code. All functions are pure and
work under jit, vmap and grad; `factored` has the form for ReLU stacks that never builds the adapted kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalr.errors import ConfigError
from metalr.models import Apply
from metalr.types import Episode, Params

Loss = Callable[[jax.Array, jax.Array], jax.Array]
UNROLLED_STEPS = 8  # up to here a Python loop compiles to faster code than a scan; measured in benchmarks/README.md


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean softmax cross-entropy. logits: [n, way] float; labels: [n] int; result: [] float."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of correct predictions. logits: [n, way] float; labels: [n] int; result: [] float32, 0..1."""
    return (logits.argmax(-1) == labels).mean(dtype=jnp.float32)


def adapt(
    apply: Apply,
    params: Params,
    support_x: jax.Array,
    support_y: jax.Array,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    loss: Loss = cross_entropy,
    observe: Callable[[Params], Any] | None = None,
    observe_at: Sequence[int] | None = None,
    batch_size: int | None = None,
    key: jax.Array | None = None,
    dropout: bool = False,
    first_order: bool = False,
    remat: bool = False,
) -> tuple[Params, Any]:
    """Take `steps` optimizer steps on the support set.

    Args:
      apply: (params, x, key=None) -> logits.
      params: where to start, a pytree of float arrays.
      support_x: [support, height, width, channels] float32.
      support_y: [support] int32.
      optimizer: `rates.optimizer(...)`, or any optax transformation.
      steps: static number of steps.
      loss: (outputs of `apply`, labels) -> [] float.
      observe: called with the params after some steps; its results are stacked. Default: nothing.
      observe_at: after which numbers of steps, ascending. Default: 0, 1, …, steps.
      batch_size: size of a minibatch; epochs are reshuffled, an incomplete last batch is left out. Default: all.
      key: for minibatches and dropout; needed by either.
      dropout: give `apply` a key of its own in every step.
      first_order: treat the inner gradients as constants in the meta-gradient; the rates that scale them still
        learn (Finn et al. 2017, section 5.2).
      remat: recompute each step in the backward pass: memory for one step's activations instead of all steps'.

    Returns:
      (params after the last step, observations with a leading axis as long as observe_at, or None).

    Raises:
      ConfigError: a batch size outside 1..support, or no key where one is needed.
    """
    support = support_y.shape[0]
    if batch_size is not None and not 1 <= batch_size <= support:
        raise ConfigError(f"batch_size: expected 1..{support} (the support set's size), got {batch_size}")
    if key is None and (dropout or batch_size is not None):
        raise ConfigError("key: expected a jax.random.key, because of dropout or minibatches; got None")

    keys = None if key is None else (jax.random.fold_in(key, 0), jax.random.fold_in(key, 1))  # minibatches, dropout
    wanted = np.arange(steps + 1) if observe_at is None else np.asarray(observe_at)

    def step(carry: tuple[Params, Any], index: int | jax.Array) -> tuple[Params, Any]:
        now, state = carry
        x, y = support_x, support_y
        if batch_size is not None and keys is not None:
            epoch, batch = index // (support // batch_size), index % (support // batch_size)
            order = jax.random.permutation(jax.random.fold_in(keys[0], epoch), support)
            rows = jax.lax.dynamic_slice_in_dim(order, batch * batch_size, batch_size)
            x, y = x[rows], y[rows]
        drop = {"key": jax.random.fold_in(keys[1], index)} if dropout and keys is not None else {}
        grads = jax.grad(lambda p: loss(apply(p, x, **drop), y))(now)
        if first_order:
            grads = jax.lax.stop_gradient(grads)
        updates, state = optimizer.update(grads, state, now)
        return optax.apply_updates(now, updates), state

    def look(carry: tuple[Params, Any], taken: int | jax.Array) -> Any:
        """The observation after `taken` steps; zeros where none is wanted."""
        if observe is None:
            return None
        if not isinstance(taken, jax.Array):
            return observe(carry[0]) if taken in wanted else None
        blank = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), jax.eval_shape(observe, carry[0]))
        if len(wanted) == steps + 1:
            return observe(carry[0])
        return jax.lax.cond((taken == wanted).any(), lambda: observe(carry[0]), lambda: blank)

    if remat:
        step = jax.checkpoint(step)
    carry = (params, optimizer.init(params))
    seen = [look(carry, 0)]
    if steps <= UNROLLED_STEPS:
        for index in range(steps):
            carry = step(carry, index)
            seen.append(look(carry, index + 1))
        kept = [seen[i] for i in wanted]
        return carry[0], jax.tree.map(lambda *v: jnp.stack(v), *kept) if observe else None

    def body(carry: tuple[Params, Any], index: jax.Array) -> tuple[tuple[Params, Any], Any]:
        carry = step(carry, index)
        return carry, look(carry, index + 1)

    carry, rest = jax.lax.scan(body, carry, jnp.arange(steps))
    if observe is None:
        return carry[0], None
    start = seen[0] if seen[0] is not None else jax.tree.map(lambda v: jnp.zeros_like(v[0]), rest)
    return carry[0], jax.tree.map(lambda first, v: jnp.concatenate([first[None], v])[wanted], start, rest)


def adaptation_curve(
    apply: Apply,
    params: Params,
    episode: Episode,
    optimizer: optax.GradientTransformation,
    steps: int,
    **options: Any,
) -> jax.Array:
    """Query accuracy of one episode after 0, 1, …, steps inner steps (or those in observe_at): [steps + 1] float32."""

    def observe(now: Params) -> jax.Array:
        return accuracy(apply(now, episode.query_x), episode.query_y)

    _, curve = adapt(apply, params, episode.support_x, episode.support_y, optimizer, steps, observe=observe, **options)
    return curve
