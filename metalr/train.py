"""The outer loop: many meta-updates per dispatch, validation on meta-validation tasks, the best init and rates kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalr import devices, outer
from metalr import rates as rates_lib
from metalr.errors import ConfigError, MetalrError
from metalr.models import Model
from metalr.outer import Algorithm
from metalr.rates import RatesSpec
from metalr.tasks import Pool, Sampler
from metalr.types import MetaParams, Params, Rates

SCHEDULES = ("cosine", "constant")


class TrainState(NamedTuple):
    """Everything that one outer step hands to the next. step: int32 []."""

    meta: MetaParams
    opt_state: Any
    step: jax.Array


class Chunk(NamedTuple):
    """What a chunk of outer steps gave. Metrics are numpy [steps of the chunk] arrays."""

    state: TrainState
    metrics: dict[str, np.ndarray]
    seconds: float


class DivergedError(MetalrError):
    """The meta-loss or a meta-parameter became NaN or infinite."""


def make_optimizer(
    *,
    steps: int,
    init_rate: float | None,
    rates_rate: float | None,
    clip: float | None = 10.0,
    schedule: str = "cosine",
    base: Callable[[Any], optax.GradientTransformation] = optax.adam,
) -> optax.GradientTransformation:
    """The outer optimizer over MetaParams: one rate for the init, one for the raw rates, global-norm clipping.

    A rate of None leaves that part as it is. base: makes the optimizer of either part from a schedule.

    Raises:
      ConfigError: a rate that is not positive, or an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"outer.schedule: expected one of {SCHEDULES}, got {schedule!r}")
    for name, value in (("init_rate", init_rate), ("rates_rate", rates_rate), ("clip", clip)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise ConfigError(f"outer.{name}: expected a positive number, got {value}")
    if steps < 1:
        raise ConfigError(f"outer.steps: expected at least 1, got {steps}")

    def part(rate: float | None) -> optax.GradientTransformation:
        if rate is None:
            return optax.set_to_zero()
        return base(optax.cosine_decay_schedule(rate, steps) if schedule == "cosine" else rate)

    names: Any = MetaParams("init", "rates")  # type: ignore[arg-type]
    parts = optax.multi_transform({"init": part(init_rate), "rates": part(rates_rate)}, names)
    return optax.chain(optax.clip_by_global_norm(clip), parts) if clip else parts


def start(model: Model, spec: RatesSpec, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first outer step."""
    meta = jax.jit(lambda key: outer.initial(model, spec, key))(key)
    return TrainState(meta, jax.jit(optimizer.init)(meta), jnp.zeros((), jnp.int32))


def make_chunk(
    model: Model,
    spec: RatesSpec,
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    sample: Sampler,
    meta_batch: int,
    *,
    remat: bool = False,
) -> Callable[[TrainState, Pool, jax.Array, int], tuple[TrainState, dict[str, jax.Array]]]:
    """A compiled `chunk(state, pool, key, count)`: `count` outer steps in one dispatch (one program a count).

    Outer step i draws its episodes from fold_in(key, i), so a run does not depend on how it is cut into chunks.
    Tasks are split over the devices of all processes, as many as divide `meta_batch`.

    Returns:
      (state, metrics): "loss", "accuracy" (query set, after adaptation), "gradient_norm", each [count] float32, and
      "finite", [count] bool: whether the new init and rates are.
    """
    if meta_batch < 1:
        raise ConfigError(f"outer.meta_batch: expected at least 1, got {meta_batch}")

    def gradient(meta: MetaParams, pool: Pool, keys: jax.Array) -> tuple[MetaParams, dict[str, jax.Array]]:
        episodes = jax.vmap(lambda key: sample(pool, key))(keys)
        return outer.meta_gradient(
            model,
            spec,
            meta,
            episodes,
            jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys),
            first_order=algorithm.first_order,
            meta_gradient=algorithm.meta_gradient,
            remat=remat,
        )

    mesh = devices.task_mesh(meta_batch, all_processes=True)
    split_gradient = devices.split_tasks(gradient, mesh, replicated=2, mean=True)

    def chunk(state: TrainState, pool: Pool, key: jax.Array, count: int) -> tuple[TrainState, dict[str, jax.Array]]:
        def finite_after(meta: MetaParams) -> jax.Array:
            """Whether all meta-parameters and the rates they stand for are finite, by one sum each."""
            actual = rates_lib.actual(spec, meta.rates)
            return jnp.isfinite(sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves((meta, actual))))

        def step(state: TrainState, _: None) -> tuple[TrainState, dict[str, jax.Array]]:
            keys = jax.random.split(jax.random.fold_in(key, state.step), meta_batch)
            grads, metrics = split_gradient(state.meta, pool, keys)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.meta)
            meta = optax.apply_updates(state.meta, updates)
            return TrainState(meta, opt_state, state.step + 1), metrics | {
                "gradient_norm": optax.tree.norm(grads),
                "finite": finite_after(meta),
            }

        return jax.lax.scan(step, state, None, length=count)

    compiled = jax.jit(chunk, static_argnums=3, donate_argnums=0)
    if jax.process_count() == 1:
        return compiled
    return lambda state, pool, key, count: compiled(*devices.replicate((state, pool, key), mesh), count)


def run_chunks(
    chunk: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    pool: Pool,
    key: jax.Array,
    steps: int,
    every: int,
) -> Iterator[Chunk]:
    """Outer steps state.step … steps, `every` at a time.

    Raises:
      DivergedError: the loss or a parameter is not finite; says at which step, and what to lower.
    """
    done = int(state.step)
    while done < steps:
        count = min(every, steps - done)
        began = time.perf_counter()
        state, measured = chunk(state, pool, key, count)
        metrics = {name: np.asarray(value) for name, value in measured.items()}
        finite = np.isfinite(metrics["loss"]) & np.isfinite(metrics["gradient_norm"]) & metrics.pop("finite")
        if not finite.all():
            step = done + int(np.argmin(finite))
            raise DivergedError(
                f"outer step {step}: loss {metrics['loss'][step - done]:.4g}, gradient norm "
                f"{metrics['gradient_norm'][step - done]:.4g}; expected finite numbers; lower outer.init_rate, "
                "outer.rates_rate or inner.rate, or set outer.clip"
            )
        done += count
        yield Chunk(state, metrics, time.perf_counter() - began)


def learned(spec: RatesSpec, meta: MetaParams) -> tuple[Params, Rates]:
    """The init and the actual rates of meta-parameters, copied off the training state (which is donated)."""
    copies = jax.tree.map(jnp.copy, (meta.init, rates_lib.actual(spec, meta.rates)))
    return copies if jax.process_count() == 1 else jax.tree.map(np.asarray, copies)
