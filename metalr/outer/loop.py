"""The outer loop: many meta-updates per dispatch, validation on meta-validation tasks, the best init and rates kept."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from metalr.errors import ConfigError, MetalrError
from metalr.inner import hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.inner.objective import CROSS_ENTROPY, Objective
from metalr.inner.optimizers import promoting
from metalr.models import Model
from metalr.outer import devices, meta_gradients
from metalr.outer.directions import Forward, Method, Reverse
from metalr.tasks import Pool, Sampler, second_key
from metalr.types import Episode, MetaParams, Params, Rates

SCHEDULES = ("cosine", "constant")
POLICIES = ("stop", "skip")
CHUNK = 50  # most outer steps a dispatch
VARIANT = 0x1AFF  # folded into the key of an outer step: far from the numbers of its tasks, and from second_key's
DISPATCH_SECONDS = 1.0  # about how long a dispatch takes: progress moves, a signal is heard, and little is lost between


class TrainState(NamedTuple):
    """Everything that one outer step hands to the next. step: int32 []."""

    meta: MetaParams
    opt_state: Any
    step: jax.Array


class Phases(NamedTuple):
    """What changes over the outer steps, and what an outer step leaves alone.

    Attributes:
      first_order_until: outer steps before this one are first order (derivative-order annealing).
      multi_step_until: up to this outer step the query losses after all inner steps count, with weights that fade into
        the last one's.
      fresh_init: draw a new random init for every outer step instead of learning one, so that the rates stand alone.
      horizons: numbers of inner steps, of which every outer step draws one; none: always spec.steps.
      fixed: the fields of MetaParams that do not learn; what does not learn has no part in the gradient's norm.
    """

    first_order_until: int = 0
    multi_step_until: int = 0
    fresh_init: bool = False
    horizons: tuple[int, ...] = ()
    fixed: tuple[str, ...] = ()


class Chunk(NamedTuple):
    """What a chunk of outer steps gave.

    Attributes:
      metrics: numpy [steps of the chunk] arrays; of several seeds [seeds, steps], and the state has that axis too.
      first: the outer step that it began with.
    """

    state: TrainState
    metrics: dict[str, np.ndarray]
    seconds: float
    first: int = 0

    def of_seed(self, number: int, seeds: int) -> Chunk:
        """The part of one of several seeds: its steps up to one that was not finite, and its share of the time."""
        state = jax.tree.map(lambda leaf: leaf[number], self.state)
        moved = int(state.step) - self.first
        metrics = {name: value[number, :moved] for name, value in self.metrics.items()}
        return Chunk(state, metrics, self.seconds / seeds, self.first)


ChunkFunction = Callable[[TrainState, Pool, jax.Array, Any], tuple[TrainState, dict[str, jax.Array]]]


class DivergedError(MetalrError):
    """The meta-loss, a meta-gradient or a meta-parameter became NaN or infinite.

    Attributes: step (the outer step that failed) and state (the TrainState before it, all finite).
    """

    def __init__(self, step: int, metrics: dict[str, np.ndarray], at: int, state: TrainState, note: str = "") -> None:
        self.step, self.metrics, self.at, self.state = step, metrics, at, state
        loss, norm = float(metrics["loss"][at]), float(metrics["gradient_norm"][at])
        if np.isfinite(loss) and np.isfinite(norm):
            what = (
                f"loss {loss:.4g} and gradient norm {norm:.4g} are finite, the init or rates after the update are not"
            )
        else:
            what = f"loss {loss:.4g}, gradient norm {norm:.4g}; expected finite numbers"
        super().__init__(
            f"outer step {step}: {what}{note}; lower outer.init_rate, outer.rates_rate or inner.rate, set outer.clip, "
            "or set outer.on_divergence to skip"
        )

    def noted(self, note: str) -> DivergedError:
        """The same error with more words."""
        return DivergedError(self.step, self.metrics, self.at, self.state, note)


class OutOfMemoryError(MetalrError):
    """The device has not enough memory for a step."""


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

    A rate of None leaves that part as it is, and out of the norm that is clipped.
    base: makes the optimizer of either part from a schedule.

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
    given = {"init": init_rate, "rates": rates_rate}
    parts = optax.multi_transform({name: part(rate) for name, rate in given.items()}, names)
    if not clip:
        return promoting(parts)
    left = {name: optax.set_to_zero() if rate is None else optax.identity() for name, rate in given.items()}
    return promoting(optax.chain(optax.multi_transform(left, names), optax.clip_by_global_norm(clip), parts))


def start(
    model: Model,
    spec: RatesSpec,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    meta: MetaParams | None = None,
    mesh: Mesh | None = None,
) -> TrainState:
    """The state before the first outer step.

    Args:
      meta: where to start, in place of a random init and the spec's rates.
      mesh: where large tensors are made and stay, split over its axis "params", if it has one.
    """

    split = mesh is not None and devices.PARAMS in mesh.shape

    def begin(function: Callable[[Any], Any], given: Any) -> Any:
        if mesh is None or not split:
            return jax.jit(function)(given)
        return jax.jit(function, out_shardings=devices.shardings(jax.eval_shape(function, given), mesh))(given)

    if meta is None:
        meta = begin(lambda key: meta_gradients.initial(model, spec, key), key)
    elif mesh is not None and split:
        meta = devices.place(meta, mesh)
    return TrainState(meta, begin(optimizer.init, meta), jnp.zeros((), jnp.int32))


def check_alike(phases: Phases, samplers: int) -> None:
    """Raises ConfigError unless all outer steps are one computation, as is needed to run seeds side by side."""
    if phases.first_order_until or phases.multi_step_until or phases.horizons or samplers > 1:
        raise ConfigError(
            "seeds: expected settings whose outer steps are all alike to run side by side (no tasks.shots, no "
            f"inner.horizons, no outer.multi_step, no outer.first_order_share), got {phases} and {samplers} sizes of "
            "tasks"
        )


def make_chunk(
    model: Model,
    spec: RatesSpec,
    method: Method,
    optimizer: optax.GradientTransformation,
    sample: Sampler | Sequence[Sampler],
    meta_batch: int,
    *,
    phases: Phases = Phases(),  # noqa: B008 - a tuple
    on_divergence: str = "stop",
    objective: Objective = CROSS_ENTROPY,
    mesh: Mesh | None = None,
    seeds: int = 0,
) -> ChunkFunction:
    """A compiled `chunk(state, pool, key, count)`: `count` <= CHUNK outer steps in one dispatch.

    Outer step i draws its episodes, and which of the `variants` it is, from fold_in(key, i), and one program serves
    every count, so a run ends with the same bits however it is cut into chunks. Tasks are split over the devices of
    all processes, as many as divide `meta_batch`. A step whose loss, gradient or result is not finite changes no
    parameter: "stop" stays at that step (and fails it again until the chunk ends), "skip" goes on with the next.

    Args:
      sample: of tasks; or several samplers (of other sizes, say), of which every outer step draws one.
      mesh: of devices.task_mesh; default: all devices. With an axis "params" large tensors are split over it.
      seeds: several runs side by side: the state, the key and the results have a leading axis of so many; 0: none.

    Returns:
      (state, metrics): what the objective measures (query set, after adaptation) and "gradient_norm", each [CHUNK]
      float32, and "finite", [CHUNK] bool: whether the step was; entries from `count` on mean nothing.
    """
    if meta_batch < 1:
        raise ConfigError(f"outer.meta_batch: expected at least 1, got {meta_batch}")
    if seeds:
        check_alike(phases, 1 if callable(sample) else len(sample))
    if on_divergence not in POLICIES:
        raise ConfigError(f"outer.on_divergence: expected one of {POLICIES}, got {on_divergence!r}")
    gradient = make_gradient(model, spec, method, sample, phases, objective)
    mesh = devices.task_mesh(meta_batch, all_processes=True) if mesh is None else mesh
    split_gradient = devices.split_tasks(gradient, mesh, replicated=4, mean=True)
    kinds = len(variants(sample, phases))

    def finite_after(meta: MetaParams) -> jax.Array:
        """Whether all meta-parameters and the rates they stand for are finite, by one sum each."""
        actual = hyperparameters.actual(spec, meta.rates)
        return jnp.isfinite(sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves((meta, actual))))

    def step(state: TrainState, pool: Pool, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        now = trained_from(model, phases, state.meta, key, state.step)
        variant = drawn_variant(key, state.step, kinds)
        grads, metrics = split_gradient(now, pool, state.step, variant, task_keys(key, state.step, meta_batch))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.meta)
        meta = optax.apply_updates(state.meta, updates)
        meta = meta._replace(rates=hyperparameters.project(spec, meta.rates))
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & finite_after(meta)
        new = TrainState(meta, opt_state, state.step + 1)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        if on_divergence == "skip":
            kept = kept._replace(step=new.step)
        return devices.keep_placed(kept, mesh), metrics | {"gradient_norm": norm, "finite": finite}

    def chunk(
        state: TrainState, pool: Pool, key: jax.Array, count: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def body(i: jax.Array, carry: tuple[TrainState, dict[str, jax.Array]]) -> Any:
            state, metrics = carry
            state, now = step(state, pool, key)
            return state, {name: metrics[name].at[i].set(value) for name, value in now.items()}

        shapes = jax.eval_shape(step, state, pool, key)[1]
        blank = {name: jnp.zeros((CHUNK, *v.shape), v.dtype) for name, v in shapes.items()}
        return jax.lax.fori_loop(0, count, body, (state, blank))

    compiled = jax.jit(jax.vmap(chunk, (0, None, 0, None)) if seeds else chunk, donate_argnums=0)
    if mesh.size == 1:
        return compiled

    def placed(state: TrainState, pool: Pool, key: jax.Array, count: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """The first state comes from one device and the next ones from all: placed alike, one program serves both."""
        if jax.process_count() > 1:
            pool, key = devices.replicate((pool, key), mesh)
        return compiled(devices.place(state, mesh), pool, key, count)

    for name in ("lower", "_cache_size"):  # as a compiled function has
        setattr(placed, name, getattr(compiled, name))
    return placed


def task_keys(key: jax.Array, step: int | jax.Array, meta_batch: int) -> jax.Array:
    """The keys of the tasks of one outer step: [meta_batch]."""
    return jax.random.split(jax.random.fold_in(key, step), meta_batch)


def trained_from(model: Model, phases: Phases, meta: MetaParams, key: jax.Array, number: int | jax.Array) -> MetaParams:
    """The meta-parameters that outer step `number` adapts from: the state's, or a fresh init beside its rates."""
    if not phases.fresh_init:
        return meta
    return meta._replace(init=model.init(second_key(jax.random.fold_in(key, number))))


def variants(sample: Sampler | Sequence[Sampler], phases: Phases) -> list[tuple[Sampler, int | None]]:
    """What an outer step may be of: each sampler with each horizon (None: spec.steps)."""
    samplers = (sample,) if callable(sample) else tuple(sample)
    return [(one, horizon) for one in samplers for horizon in phases.horizons or (None,)]


def drawn_variant(key: jax.Array, number: int | jax.Array, count: int) -> jax.Array:
    """Which of `count` variants outer step `number` is of: int32 []; key: of the run, as for `task_keys`."""
    if count == 1:
        return jnp.zeros((), jnp.int32)
    return jax.random.randint(jax.random.fold_in(jax.random.fold_in(key, number), VARIANT), (), 0, count)


GradientFunction = Callable[[MetaParams, Pool, Any, Any, jax.Array], tuple[MetaParams, dict[str, jax.Array]]]


def make_gradient(
    model: Model,
    spec: RatesSpec,
    method: Method,
    sample: Sampler | Sequence[Sampler],
    phases: Phases = Phases(),  # noqa: B008 - a tuple
    objective: Objective = CROSS_ENTROPY,
) -> GradientFunction:
    """`gradient(meta, pool, number, variant, keys)`: of outer step `number`, as `variant` of the `variants`, over the
    tasks of `keys`.

    What does not learn (phases.fixed, and the init where every step draws one) gets zeros.

    Args:
      sample: of tasks; or several samplers (of other sizes, say), of which every outer step draws one.
    """
    kinds = variants(sample, phases)
    one_sampler = callable(sample) or len(sample) == 1

    def gradient(
        meta: MetaParams, pool: Pool, number: Any, variant: Any, keys: jax.Array
    ) -> tuple[MetaParams, dict[str, jax.Array]]:
        inner_keys = jax.vmap(second_key)(keys)

        def tasks_of(sample: Sampler) -> Episode:
            return jax.vmap(lambda key: sample(pool, key))(keys)

        alone = tasks_of(kinds[0][0]) if one_sampler else None  # once, and not again in every branch

        def of(method: Method, weights: jax.Array | None) -> tuple[MetaParams, dict[str, jax.Array]]:
            def of_variant(sample: Sampler, horizon: int | None) -> tuple[MetaParams, dict[str, jax.Array]]:
                episodes = tasks_of(sample) if alone is None else alone
                return meta_gradients.meta_gradient(
                    model, spec, meta, episodes, inner_keys, method,
                    step_weights=weights, objective=objective, horizon=horizon,
                )  # fmt: skip

            if len(kinds) == 1:
                return of_variant(*kinds[0])
            return jax.lax.switch(variant, [functools.partial(of_variant, *kind) for kind in kinds])

        def of_order(weights: jax.Array | None) -> tuple[MetaParams, dict[str, jax.Array]]:
            if not phases.first_order_until or not isinstance(method, (Reverse, Forward)) or method.first_order:
                return of(method, weights)
            simple = dataclasses.replace(method, first_order=True)
            first = number < phases.first_order_until
            return jax.lax.cond(first, lambda: of(simple, weights), lambda: of(method, weights))

        def of_phase() -> tuple[MetaParams, dict[str, jax.Array]]:
            if not phases.multi_step_until:
                return of_order(None)
            faded = jnp.minimum(number / phases.multi_step_until, 1.0)
            weights = jnp.full(spec.steps, (1 - faded) / spec.steps).at[-1].add(faded)
            return jax.lax.cond(faded < 1, lambda: of_order(weights), lambda: of_order(None))

        grads, metrics = of_phase()
        fixed = {*phases.fixed, *(("init",) if phases.fresh_init else ())}
        return grads._replace(**{name: jax.tree.map(jnp.zeros_like, getattr(grads, name)) for name in fixed}), metrics

    return gradient


def failing_tasks(
    gradient: GradientFunction, meta: MetaParams, pool: Pool, number: int, variant: int | jax.Array, keys: jax.Array
) -> list[int]:
    """Which of the tasks of `keys` have a loss or meta-gradient that is not finite. Compiles; for when one failed.

    Args:
      gradient: of `make_gradient`, as the step that failed had it.
      meta: what that step adapted from, of `trained_from`.
    """

    @jax.jit
    def finite(meta: MetaParams, pool: Pool, number: jax.Array, variant: jax.Array, keys: jax.Array) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            grads, metrics = gradient(meta, pool, number, variant, key[None])
            return jnp.isfinite(metrics["loss"]) & jnp.isfinite(optax.tree.norm(grads))

        return jax.lax.map(one, keys)

    return np.flatnonzero(~np.asarray(finite(meta, pool, np.int32(number), np.int32(variant), keys))).tolist()


def run_chunks(
    chunk: ChunkFunction,
    state: TrainState,
    pool: Pool,
    key: jax.Array,
    steps: int,
    every: Sequence[int],
    *,
    stop: Callable[[], bool] = lambda: False,
    before: Callable[[int, int], None] = lambda first, last: None,
) -> Iterator[Chunk]:
    """Outer steps state.step ... `steps`, in chunks of about DISPATCH_SECONDS that end at all multiples of `every`.

    stop: asked before every chunk; the iteration ends when it says so. The first chunk is of no steps: it compiles.
    before: called before every chunk with its first step and one that is twice as far: what may be prepared ahead.

    Raises:
      DivergedError: a step was not finite; the steps before it were given, and it has the state after those.
      OutOfMemoryError: with the settings to lower.
    """
    done, count = int(np.min(state.step)), 0
    while done < steps and not stop():
        before(done, min(done + 2 * max(count, 1), steps))
        began = time.perf_counter()
        try:
            state, measured = chunk(state, pool, key, np.int32(count))
            metrics = {name: np.asarray(value)[..., :count] for name, value in measured.items()}
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
                raise
            raise OutOfMemoryError(
                f"outer step {done}: not enough memory; lower outer.meta_batch or inner.steps, or set inner.derivative "
                "to remat, truncated or forward"
            ) from error
        seconds = time.perf_counter() - began
        reached = np.asarray(state.step) - done
        moved, several = int(reached.min()), reached.ndim > 0
        if moved < count:
            if moved or several:
                kept = metrics if several else {name: value[:moved] for name, value in metrics.items()}
                yield Chunk(state, kept, seconds, done)
            if several:
                failed = int(reached.argmin())
                metrics = {name: value[failed] for name, value in metrics.items()}
                state = Chunk(state, {}, seconds, done).of_seed(failed, 1).state
            raise DivergedError(done + moved, metrics, moved, state)
        yield Chunk(state, metrics, seconds, done)
        done += count
        fitting = max(1, int(DISPATCH_SECONDS * count / seconds))  # 1 after the chunk that compiled
        if jax.process_count() > 1:
            fitting = CHUNK  # clocks differ, and all processes must do the same
        count = min(fitting, CHUNK, steps - done, *(n - done % n for n in every))


def learned(spec: RatesSpec, meta: MetaParams) -> tuple[Params, Rates]:
    """The init and the actual rates of meta-parameters, copied off the training state (which is donated)."""
    copies = jax.tree.map(jnp.copy, (meta.init, hyperparameters.actual(spec, meta.rates)))
    return devices.local(copies)
