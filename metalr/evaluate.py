"""Held-out evaluation: the same fixed episodes for every method, the whole adaptation curve, CIs over tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from metalr import devices, factored, inner
from metalr import rates as rates_lib
from metalr.errors import ConfigError
from metalr.models import Apply, Model
from metalr.rates import RatesSpec
from metalr.tasks import Pool, Sampler
from metalr.types import Curve, Episode, Params, Rates

Z95 = 1.96
Evaluator = Callable[..., Curve]


def episode_keys(seed: int, episodes: int) -> jax.Array:
    """The keys of the fixed evaluation episodes: [episodes]. A prefix stays the same when more are asked for.

    Raises ConfigError for fewer than 2 episodes.
    """
    if episodes < 2:
        raise ConfigError(f"evaluation episodes: expected at least 2 for a confidence interval, got {episodes}")
    root = jax.random.fold_in(jax.random.key(seed), 0x7E57)
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(np.arange(episodes))


def curve_of(tasks: Any) -> Curve:
    """Mean and 95 % half-width over tasks. tasks: [tasks, steps + 1] accuracies, 0..1."""
    tasks = np.asarray(tasks, np.float64)
    return Curve(tasks.mean(0), Z95 * tasks.std(0, ddof=1) / np.sqrt(len(tasks)), tasks)


def paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of a - b over tasks and its 95 % half-width. a, b: [tasks], on the same tasks in the same order."""
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return float(difference.mean()), float(Z95 * difference.std(ddof=1) / np.sqrt(len(difference)))


def make_evaluator(model: Model, spec: RatesSpec, sample: Sampler, steps: int) -> Evaluator:
    """A compiled `evaluate(pool, init, rates, keys) -> Curve` for actual learned rates, to `steps` inner steps.

    One compilation serves every call with the same number of keys. Raises ConfigError where spec.extend forbids
    so many steps.
    """
    rates_lib.check_steps(spec, steps)

    def plain(apply: Apply, episode: Episode, key: jax.Array, init: Params, rates: Rates) -> jax.Array:
        optimizer = rates_lib.optimizer(spec, rates)
        return inner.adaptation_curve(apply, init, episode, optimizer, steps, key=key, dropout=model.dropout)

    return _compiled(model, spec, sample, plain, steps)


def make_baseline(
    model: Model,
    sample: Sampler,
    optimizer: Callable[[jax.Array], optax.GradientTransformation],
    at: Sequence[int],
    *,
    batch_size: int | None = None,
    random_init: bool = False,
) -> Evaluator:
    """A compiled `evaluate(pool, init, learning_rate, keys) -> Curve` for optimizer(learning_rate) as inner loop.

    at: after which numbers of steps, ascending, the curve has an entry.
    random_init: ignore `init` and draw a new one for every task. Dropout is active in training if the model has it.
    """

    def plain(apply: Apply, episode: Episode, key: jax.Array, init: Params, learning_rate: jax.Array) -> jax.Array:
        init_key, step_key = jax.random.split(key)
        start = model.init(init_key) if random_init else init
        return inner.adaptation_curve(
            apply,
            start,
            episode,
            optimizer(learning_rate),
            max(at),
            observe_at=at,
            batch_size=batch_size,
            key=step_key,
            dropout=model.dropout,
        )

    return _compiled(model, None, sample, plain, max(at))


def _compiled(
    model: Model, spec: RatesSpec | None, sample: Sampler, plain: Callable[..., jax.Array], steps: int
) -> Evaluator:
    def curves(pool: Pool, init: Params, rates: Any, keys: jax.Array) -> jax.Array:
        episodes = jax.eval_shape(sample, pool, keys[0])
        if spec is not None and factored.pays(model, spec, episodes.support_y.shape[0], steps):

            def fast(key: jax.Array) -> jax.Array:
                e = sample(pool, key)
                logits = factored.query_logits(
                    init, rates, spec, e.support_x, e.support_y, e.query_x, steps, every_step=True
                )
                return jax.vmap(inner.accuracy, (0, None))(logits, e.query_y)

            return devices.map_tasks(fast, keys, min(32, len(keys)))

        def by_tasks(apply: Apply, group: int, keys: jax.Array) -> jax.Array:
            def one(key: jax.Array) -> jax.Array:
                return plain(apply, sample(pool, key), jax.random.fold_in(key, 1), init, rates)

            return devices.map_tasks(one, keys, group)

        return devices.by_platform(model, by_tasks, keys)

    compiled: dict[int, Callable[..., jax.Array]] = {}

    def evaluate(pool: Pool, init: Params, rates: Any, keys: jax.Array) -> Curve:
        if len(keys) not in compiled:
            mesh = devices.task_mesh(len(keys))
            compiled[len(keys)] = jax.jit(devices.split_tasks(curves, mesh, replicated=3, mean=False))
        return curve_of(compiled[len(keys)](pool, init, rates, keys))

    return evaluate
