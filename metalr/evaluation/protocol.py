"""Held-out evaluation: the same fixed episodes for every method, the whole adaptation curve, CIs over tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import special

from metalr import inner
from metalr.errors import ConfigError, check_seed, check_whole
from metalr.inner import descent, factored, hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.inner.objective import CROSS_ENTROPY, Objective
from metalr.models import Apply, Model
from metalr.outer import devices
from metalr.tasks import OfCountedTasks, Pool, Sampler, second_key
from metalr.trees import count
from metalr.types import Curve, Episode, Params, Rates


class Evaluator:
    """A compiled `evaluate(pool, init, rates, keys) -> Curve`; one program serves every call with as many keys.

    Args:
      curves: (pool, init, rates, fresh, keys) -> [tasks, ..., points]; fresh: bool [], see __call__.
      at: after which numbers of steps the curve has a point.
      layout: of tasks and params over this process's devices.
      stand_in: what goes in place of an init of None, where inits may be random; None: they may not.
      sample: what draws the episodes.
    """

    def __init__(
        self,
        curves: Callable[..., jax.Array],
        at: Sequence[int],
        layout: devices.Layout,
        *,
        stand_in: Callable[[], Any] | None,
        sample: Sampler,
    ) -> None:
        self._curves, self._at, self._layout, self._stand_in, self._sample = curves, at, layout, stand_in, sample
        self._programs: dict[int, Callable[..., jax.Array]] = {}

    def _program(self, tasks: int) -> Any:
        if tasks not in self._programs:
            mesh = devices.task_mesh(tasks, layout=self._layout)
            self._programs[tasks] = jax.jit(devices.split_tasks(self._curves, mesh, replicated=4, mean=False))
        return self._programs[tasks]

    def __call__(self, pool: Any, init: Params | None, rates: Any, keys: jax.Array) -> Curve:
        """init: None: a new random one for every task. Raises ConfigError unless the evaluator was made for that."""
        fresh = init is None
        if init is None:
            if self._stand_in is None:
                raise ConfigError(
                    "init: expected params, got None; for random ones: an evaluator made with random_init None or True"
                )
            init = self._stand_in()
        if self._layout.params > 1:
            init, rates = devices.place((init, rates), devices.task_mesh(len(keys), layout=self._layout))
        scores = self._program(len(keys))(pool, init, rates, np.bool_(fresh), keys)
        return curve_of(scores, self._at, groups_of(self._sample, pool, keys))


def episode_keys(seed: int, episodes: int) -> jax.Array:
    """The keys of the fixed evaluation episodes: [episodes]. A prefix stays the same when more are asked for.

    Raises ConfigError for fewer than 2 episodes.
    """
    check_seed("evaluation seed", seed)
    check_whole("evaluation episodes", episodes, 2, " for a confidence interval")
    root = jax.random.fold_in(jax.random.key(seed), 0x7E57)
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(np.arange(episodes))


def begin(
    model: Model, sample: Sampler, pool: Pool, init: Params, random_init: bool | jax.Array, key: jax.Array
) -> tuple[Episode, jax.Array, Params]:
    """The episode of a key, the key of its inner steps, and the params that they begin from.

    random_init: a new init instead of `init`; a traced bool leaves the choice to the compiled program.
    """
    init_key, step_key = jax.random.split(second_key(key))
    episode = sample(pool, key)
    if isinstance(random_init, jax.Array):
        start = jax.lax.cond(random_init, model.init, lambda _: init, init_key)
    else:
        start = model.init(init_key) if random_init else init
    return episode, step_key, model.begin(start, episode.support_x, episode.support_y)


def groups_of(sample: Sampler, pool: Pool, keys: jax.Array) -> np.ndarray | None:
    """Which task each key draws, [episodes] int, where tasks can be counted and some may come again; None elsewhere."""
    return np.asarray(sample.tasks_of(pool, keys)) if isinstance(sample, OfCountedTasks) else None


def curve_of(tasks: Any, steps: Sequence[int] | None = None, groups: np.ndarray | None = None) -> Curve:
    """Mean and 95 % half-width over tasks (Student's t).

    Args:
      tasks: [episodes, ..., points] scores.
      steps: after which numbers of steps; default 0, 1, 2, …
      groups: as of half_width.
    """
    tasks = np.asarray(tasks, np.float64)
    at = np.arange(tasks.shape[-1]) if steps is None else np.asarray(steps)
    return Curve(at, tasks.mean(0), half_width(tasks, groups), tasks, groups)


def points(steps: int, trained: int) -> list[int]:
    """Where a curve of `steps` steps is looked at: everywhere up to 20, else at 0, 1, 2, 5, 10, 20, 50 … and both."""
    if steps <= 20:
        return list(range(steps + 1))
    round_ones = [base * 10**power for power in range(7) for base in (1, 2, 5)]
    return sorted({0, *(n for n in (*round_ones, trained) if n < steps), steps})


def rounded(value: float) -> float | None:
    """A number for JSON, which has no NaN and no infinity: to six decimals, and to six digits of what is smaller."""
    if not np.isfinite(value):
        return None
    return round(float(value), 6) if value == 0 or abs(value) >= 0.1 else float(f"{value:.6g}")


def half_width(values: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """Half-width of the mean's 95 % confidence interval (Student's t) over the first axis.

    Args:
      values: [n >= 2, ...].
      groups: [n] int: which values are of the same task, and say less than as many tasks would. The interval is over
        tasks then (the cluster-robust variance of Liang & Zeger 1986, with Student's t of tasks - 1); of one task
        alone there is none: NaN.
    """
    _, group = np.unique(np.arange(len(values)) if groups is None else groups, return_inverse=True)
    count = int(group.max()) + 1
    with np.errstate(invalid="ignore", over="ignore"):  # of runs that diverged: NaN, which says so
        if count < 2:
            return np.full(values.shape[1:], np.nan)
        if count == len(values):
            return special.stdtrit(count - 1, 0.975) * values.std(0, ddof=1) / np.sqrt(count)
        sums = np.zeros((count, *values.shape[1:]))
        np.add.at(sums, group, values - values.mean(0))
        deviation = np.sqrt(np.square(sums).sum(0) * count / (count - 1)) / len(values)
        return special.stdtrit(count - 1, 0.975) * deviation


def over_seeds_and_tasks(means: Sequence[float], over_tasks: Sequence[float]) -> float:
    """Half-width of a method's 95 % interval over meta-training seeds and tasks together.

    The seeds' part is Student's t over the seeds' means, the tasks' part the mean half-width over tasks of one seed;
    they are added in quadrature. All seeds meet the same tasks, so the tasks' part does not shrink with more seeds.

    Args:
      means: a number for each of at least 2 seeds.
      over_tasks: the 95 % half-width over tasks of each.
    """
    return float(np.hypot(half_width(np.asarray(means, np.float64)), np.mean(over_tasks)))


def interval(scores: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float, float | None]:
    """Mean of scores [seeds, episodes], its 95 % half-width, and that over tasks alone where there are several seeds.

    With one seed the half-width is over tasks: it answers for that one artifact. With several it is over seeds and
    tasks together, and answers for the method. groups: as of half_width.
    """
    over_tasks = [float(half_width(tasks, groups)) for tasks in scores]
    if len(scores) == 1:
        return float(scores.mean()), over_tasks[0], None
    both = over_seeds_and_tasks(scores.mean(1).tolist(), over_tasks)
    return float(scores.mean()), both, float(np.mean(over_tasks))


def row(
    method: str,
    steps: int | None,
    scores: np.ndarray,
    metric: str,
    reference: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> dict[str, Any]:
    """One method in a table, as JSON values: the one schema of all comparisons.

    Args:
      scores: [seeds, episodes] (or [episodes], of one artifact) of fixed tasks.
      metric: the name that the mean goes by.
      reference: scores of the learned method on the same tasks, which this row is beside.
      groups: [episodes or more] int, as of half_width.

    Returns:
      method, steps, METRIC, ci95 (see `interval`); with several seeds also ci95_over_tasks and METRIC_of_seeds; with a
      reference also learned_minus_this and difference_ci95, paired by task.
    """
    scores = np.atleast_2d(np.asarray(scores, np.float64))
    groups = None if groups is None else groups[: scores.shape[1]]
    mean, ci95, over_tasks = interval(scores, groups)
    facts: dict[str, Any] = {"method": method, "steps": steps, metric: rounded(mean), "ci95": rounded(ci95)}
    if over_tasks is not None:
        facts |= {"ci95_over_tasks": rounded(over_tasks)}
        facts |= {f"{metric}_of_seeds": [rounded(value) for value in scores.mean(1)]}
    if reference is not None:
        difference = difference_of(reference, scores, groups)
        facts |= {"learned_minus_this": difference[0], "difference_ci95": difference[1]}
    return facts


def difference_of(reference: np.ndarray, scores: np.ndarray, groups: np.ndarray | None = None) -> list[float | None]:
    """[mean, 95 % half-width] of reference - scores, paired by episode, and by seed where both have as many.

    groups: [episodes or more] int, as of half_width.

    Where both have several seeds, and not as many, the seeds' part is that of two samples: both half-widths in
    quadrature.
    """
    reference, scores = (np.atleast_2d(np.asarray(v, np.float64)) for v in (reference, scores))
    both = min(reference.shape[1], scores.shape[1])
    reference, scores = reference[:, :both], scores[:, :both]
    groups = None if groups is None else groups[:both]
    with np.errstate(invalid="ignore"):  # of runs that diverged
        if len(reference) == len(scores) or 1 in (len(reference), len(scores)):
            mean, ci95, _ = interval(reference - scores, groups)
        else:
            by_task = reference.mean(0) - scores.mean(0)
            seeds = [half_width(one.mean(1)) for one in (reference, scores)]
            mean, ci95 = float(by_task.mean()), float(np.hypot(np.hypot(*seeds), half_width(by_task, groups)))
    return [rounded(mean), rounded(ci95)]


def make_evaluator(
    model: Model,
    spec: RatesSpec,
    sample: Sampler,
    steps: int,
    *,
    random_init: bool = False,
    of_steps: int | None = None,
    at: Sequence[int] | None = None,
    separate: bool = False,
    objective: Objective = CROSS_ENTROPY,
    layout: devices.Layout = devices.Layout(),  # noqa: B008 - a tuple
) -> Evaluator:
    """A compiled `evaluate(pool, init, rates, keys) -> Curve` for actual learned rates, to `steps` inner steps.

    One compilation serves every call with the same number of keys.

    Args:
      random_init: ignore `init` and draw a new one for every task.
      of_steps: over how many steps a schedule with knots is spread; default: the trained ones.
      at: after which numbers of steps the curve has a point, ascending; default: as `points` says.
      separate: each point is the end of a fine-tune of its own, over whose steps a schedule with knots is spread;
        otherwise all are points of one.
      objective: what adapts, and what the curve is of.
      layout: of tasks and params over this process's devices.

    Raises ConfigError where spec.extend forbids so many steps, and for both of_steps and separate.
    """
    hyperparameters.check_steps(spec, steps)
    if separate and of_steps is not None:
        raise ConfigError(f"of_steps: expected None with separate, got {of_steps}")
    at = points(steps, spec.steps) if at is None else inner.check_stops(at, steps)

    def plain(apply: Apply, episode: Episode, key: jax.Array, init: Params, rates: Rates) -> jax.Array:
        def tuned(of_steps: int | jax.Array | None) -> descent.FineTune:
            return descent.fine_tune(spec, rates, count(episode.support_y), dropout=model.dropout, of_steps=of_steps)

        if separate:
            return _each_alone(apply, init, episode, tuned, at, objective=objective, key=key)
        optimizer, more = tuned(of_steps)
        return _of_one(apply, init, episode, optimizer, at, objective=objective, key=key, **more)

    def fast(episode: Episode, init: Params, rates: Rates) -> jax.Array:
        data = episode.support_x, episode.support_y, episode.query_x
        if separate:
            each = [factored.query_logits(init, rates, spec, *data, n, of_steps=n, loss=objective.loss) for n in at]
            return jnp.stack([objective.score(logits, episode.query_y) for logits in each])
        alone = list(at) == [steps]
        logits = factored.query_logits(
            init, rates, spec, *data, steps, every_step=not alone, of_steps=of_steps, loss=objective.loss
        )
        seen = logits[None] if alone else logits[np.asarray(at)]
        return jax.vmap(objective.score, (0, None))(seen, episode.query_y)

    def fits(support: int) -> bool:
        return factored.pays(model, spec, objective.loss, support, steps)

    return _compiled(model, sample, plain, at, random_init, fast, fits, layout)


def _of_one(
    apply: Apply,
    init: Params,
    episode: Episode,
    optimizer: optax.GradientTransformation,
    at: Sequence[int],
    **options: Any,
) -> jax.Array:
    """The scores after these numbers of steps of one fine-tune: [points] float32.

    A few steps are unrolled, which is faster; more are a loop with one copy of the step, which compiles sooner.
    """
    if at[-1] <= inner.UNROLLED_STEPS or len(at) == at[-1] + 1:
        return inner.adaptation_curve(apply, init, episode, optimizer, at[-1], observe_at=at, **options)
    return inner.scores_after(apply, init, episode, optimizer, jnp.asarray(at, jnp.int32), at[-1], **options)


def _each_alone(
    apply: Apply,
    init: Params,
    episode: Episode,
    tuned: Callable[[jax.Array], descent.FineTune],
    at: Sequence[int],
    **options: Any,
) -> jax.Array:
    """The score at the end of a fine-tune of each of these lengths, by one program: [lengths] float32.

    tuned: length -> the fine-tune.
    """

    def of_length(steps: jax.Array) -> jax.Array:
        optimizer, more = tuned(steps)
        return inner.scores_after(apply, init, episode, optimizer, steps[None], max(at), **options, **more)[0]

    return jax.lax.map(of_length, jnp.asarray(at, jnp.int32))


def make_baseline(
    model: Model,
    sample: Sampler,
    optimizer: Callable[..., optax.GradientTransformation],
    at: Sequence[int],
    *,
    separate: bool = False,
    batch_size: int | None = None,
    random_init: bool | None = False,
    objective: Objective = CROSS_ENTROPY,
    evaluated: Callable[[Any, Params], Params] | None = None,
) -> Evaluator:
    """A compiled `evaluate(pool, init, learning_rate, keys) -> Curve` for an optimizer of optax as inner loop.

    optimizer: learning rate -> optimizer; with `separate`, (learning rate, number of steps) -> optimizer.
    learning_rate: [] or [rates] float32; with several, side by side in one program, the curve's arrays have an axis of
    rates before that of points.
    at: after which numbers of steps, ascending, the curve has an entry.
    separate: each entry is the end of a fine-tune of its own; otherwise all are of one.
    random_init: ignore `init` and draw a new one for every task; None: where a call's init is None, by one program.
    Dropout is active in training if the model has it.
    evaluated: as in inner.adapt.

    Raises ConfigError unless `at` ascends.
    """
    at = inner.check_stops(at, max(at, default=0))

    def plain(apply: Apply, episode: Episode, key: jax.Array, init: Params, learning_rate: jax.Array) -> jax.Array:
        more: dict[str, Any] = {"batch_size": batch_size, "dropout": model.dropout}
        options: dict[str, Any] = {"objective": objective, "key": key, "evaluated": evaluated}

        def of_rate(rate: jax.Array) -> jax.Array:
            if separate:
                return _each_alone(
                    apply, init, episode, lambda steps: descent.FineTune(optimizer(rate, steps), more), at, **options
                )
            return _of_one(apply, init, episode, optimizer(rate), at, **options, **more)

        return devices.vmap_group(of_rate, learning_rate) if learning_rate.ndim else of_rate(learning_rate)

    return _compiled(model, sample, plain, at, random_init)


def _compiled(
    model: Model,
    sample: Sampler,
    plain: Callable[..., jax.Array],
    at: Sequence[int],
    random_init: bool | None,
    fast: Callable[..., jax.Array] | None = None,
    fits: Callable[[int], bool] = lambda support: False,
    layout: devices.Layout = devices.Layout(),  # noqa: B008 - a tuple
) -> Evaluator:
    """plain(apply, episode, key, init, rates), or fast(episode, init, rates) where it fits the support set's size."""

    def curves(pool: Pool, init: Params, rates: Any, fresh: jax.Array, keys: jax.Array) -> jax.Array:
        begun = functools.partial(begin, model, sample, pool, init, fresh if random_init is None else random_init)

        def in_fast_form(key: jax.Array) -> jax.Array:
            episode, _, start = begun(key)
            assert fast is not None
            return fast(episode, start, rates)

        def by_tasks(apply: Apply, group: int, keys: jax.Array) -> jax.Array:
            return devices.map_tasks(functools.partial(one_task, apply), keys, group)

        def one_task(apply: Apply, key: jax.Array) -> jax.Array:
            episode, step_key, start = begun(key)
            return plain(apply, episode, step_key, start, rates)

        episodes = jax.eval_shape(sample, pool, keys[0])
        if fits(count(episodes.support_y)):
            return devices.map_tasks(in_fast_form, keys, min(32, len(keys)))
        alone = functools.partial(one_task, model.cpu_apply or model.apply)
        group = functools.partial(devices.fitting_group, alone, keys)
        return devices.by_platform(model, by_tasks, keys, accelerator_group=group)

    stand_in: Callable[[], Any] | None = None
    if random_init is None:
        stand_in = functools.cache(lambda: jax.jit(model.init)(jax.random.key(0)))
    elif random_init:
        stand_in = lambda: None  # noqa: E731 - params are not looked at
    return Evaluator(curves, at, layout, stand_in=stand_in, sample=sample)
