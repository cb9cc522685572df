"""What all tasks are drawn by: samplers of the three splits, and their keys."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalr.types import Episode

PARTS = ("train", "validation", "test")
Sample = Callable[..., Episode]  # key -> Episode, or (pool, key) -> Episode; traceable by jax
Sampler = Callable[[Any, jax.Array], Episode]  # (pool, key) -> Episode


class Part(NamedTuple):
    """One split's tasks: what they are drawn from, an argument of compiled programs, and `sample(pool, key)`."""

    pool: Any
    sample: Callable[[Any, jax.Array], Episode]


class Parts(NamedTuple):
    """The tasks of meta-training, meta-validation and meta-test."""

    train: Part
    validation: Part
    test: Part


@dataclasses.dataclass(frozen=True)
class OfCountedTasks:
    """A sampler of tasks that can be counted, which says which of them a key draws: two keys may draw the same.

    Attributes:
      sample: (pool, key) -> Episode.
      task_of: (pool, key) -> int32 [], traceable by jax.
    """

    sample: Callable[[Any, jax.Array], Episode]
    task_of: Callable[[Any, jax.Array], jax.Array]

    def __call__(self, pool: Any, key: jax.Array) -> Episode:
        return self.sample(pool, key)

    @functools.cached_property
    def tasks_of(self) -> Callable[[Any, jax.Array], jax.Array]:
        """(pool, keys [n]) -> [n] int32; compiled once."""
        return jax.jit(jax.vmap(self.task_of, (None, 0)))


def second_key(key: jax.Array) -> jax.Array:
    """The key of what goes on beside sampling with `key`: an episode's inner loop, a random init.

    JAX's fold_in(key, i) is split(key, n)[i], so a small number would give a key that the sampler uses too.
    """
    return jax.random.fold_in(key, 0x1AFE)


def choose(key: jax.Array, count: int | jax.Array, k: int) -> jax.Array:
    """k different integers below `count`, in random order: [k] int32. `count` may be traced.

    Floyd's algorithm (Bentley and Floyd 1987), whose cost does not depend on `count`, then a shuffle.
    """
    draw_key, order_key = jax.random.split(key)
    last = count - k + jnp.arange(k)
    draws = jax.random.randint(draw_key, (k,), 0, last + 1)

    def body(i: jax.Array, chosen: jax.Array) -> jax.Array:
        taken = ((chosen == draws[i]) & (jnp.arange(k) < i)).any()
        return chosen.at[i].set(jnp.where(taken, last[i], draws[i]))

    chosen = jax.lax.fori_loop(0, k, body, jnp.zeros(k, draws.dtype))
    return jax.random.permutation(order_key, chosen)
