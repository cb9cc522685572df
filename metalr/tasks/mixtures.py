"""Tasks that each come from one of several task sets."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalr.errors import ConfigError
from metalr.tasks.samplers import PARTS, OfCountedTasks, Sampler, second_key
from metalr.tasks.sets import Sample, Tasks
from metalr.types import Episode


def mixture(*parts: Tasks, weights: tuple[float, ...] | None = None) -> Tasks:
    """Tasks that each come from one of several task sets of the same shapes, drawn by `weights` (default: equal)."""
    if len(parts) < 2:
        raise ConfigError(f"mixture: expected at least 2 task sets, got {len(parts)}")
    given = (1.0,) * len(parts) if weights is None else tuple(weights)
    good = len(given) == len(parts) and all(isinstance(w, Real) and 0 < w < np.inf for w in given)
    if not good:
        raise ConfigError(f"weights: expected a positive number for each of {len(parts)} task sets, got {weights}")
    shares = np.asarray(given, float)
    first, *rest = (each.standardisation for each in parts)
    if any(other is not first and not (first and first.same_as(other)) for other in rest):
        raise ConfigError("mixture: expected task sets that are standardised alike, got some that are not")
    for part in PARTS:
        shapes = [jax.eval_shape(each.sampler(part)[1], each.sampler(part)[0], jax.random.key(0)) for each in parts]
        for other, each in zip(shapes[1:], parts[1:], strict=True):
            if other != shapes[0]:
                raise ConfigError(
                    f"mixture: expected task sets of the same shapes and dtypes, got {shapes[0]} of {parts[0].name} "
                    f"and {other} of {each.name}"
                )
    log_shares = np.log(shares / shares.sum()).astype(np.float32)
    name = " + ".join(each.name for each in parts)

    def drawn(key: jax.Array) -> jax.Array:
        own = jax.random.fold_in(second_key(key), zlib.crc32(name.encode()))  # a mixture of mixtures draws twice
        return jax.random.categorical(own, jnp.asarray(log_shares))

    def task_of(part: str) -> Callable[[Any, jax.Array], jax.Array]:
        samplers = [each.sampler(part).sample for each in parts]

        def of(sample: Sampler, pool: Any, key: jax.Array) -> jax.Array:
            if isinstance(sample, OfCountedTasks):
                return sample.task_of(pool, key).astype(jnp.int32)
            return (jax.random.bits(key) >> 8).astype(jnp.int32)  # no task comes twice

        def counted(pools: Any, key: jax.Array) -> jax.Array:
            which = drawn(key)
            branches = [lambda pools, i=i, one=one: of(one, pools[i], key) for i, one in enumerate(samplers)]
            return which + len(parts) * jax.lax.switch(which, branches, pools)

        return counted

    def of(part: str) -> Sample:
        samplers = [each.sampler(part)[1] for each in parts]

        def sample(pools: Any, key: jax.Array) -> Episode:
            which = drawn(key)
            branches = [lambda pools, key, i=i, one=one: one(pools[i], key) for i, one in enumerate(samplers)]
            return jax.lax.switch(which, branches, pools, key)

        return sample

    def prefetch(keys: jax.Array) -> None:
        for each in parts:
            if each.prefetch is not None:
                each.prefetch(keys)

    ahead = prefetch if any(each.prefetch is not None for each in parts) else None
    pool = {part: [each.sampler(part)[0] for each in parts] for part in PARTS}
    facts = {"of": [{"name": each.name, **each.facts} for each in parts], "weights": shares.tolist()}
    counted = {part: task_of(part) for part in PARTS} if any(each.task_of is not None for each in parts) else None
    return Tasks(of("train"), of("validation"), of("test"), pool, name, facts, first, ahead, counted)
