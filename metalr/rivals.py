"""Learned init and rates beside everything else that people do, on the same held-out tasks, accuracy beside cost.

Three kinds of rivals: fine-tunes with one setting for all tasks (`of_lengths`), one rate tuned on meta-validation tasks
(`tuned`), and searches that every task pays for itself (`searched`). All use the learner's network, the same support
sets and query sets, and minibatches of the same inner loop.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from metalr import evaluate, fit, search, searchers
from metalr import rates as rates_lib
from metalr.artifact import Learner
from metalr.models import Model
from metalr.tasks import Pool, Sampler
from metalr.types import Params

UNSEARCHED_RATE, UNSEARCHED_BATCH = 1e-3, 32  # Adam as most people start it
TUNED = {"adam": (3e-4, 1e-3, 3e-3, 1e-2), "sgd": (1e-2, 3e-2, 1e-1, 3e-1)}


class Field(NamedTuple):
    """The held-out tasks that all rivals meet.

    Attributes:
      sampler: pool and sampler of meta-test tasks; val_sampler: of meta-validation tasks.
      keys: [tasks]; val_keys: [tasks], for what is tuned across tasks.
      support: support images of a task.
      lengths: numbers of inner steps of the fine-tunes that are reported, ascending.
      batch_size: of minibatches of learned and unsearched runs; support: no minibatches.
    """

    sampler: tuple[Pool, Sampler]
    val_sampler: tuple[Pool, Sampler]
    keys: jax.Array
    val_keys: jax.Array
    support: int
    lengths: tuple[int, ...]
    batch_size: int

    @property
    def minibatch(self) -> int | None:
        """The batch size as the inner loop takes it."""
        return None if self.batch_size >= self.support else self.batch_size


class Scores(NamedTuple):
    """One method at one cost. accuracy: [tasks] float64, 0..1, mean over learners; seconds: of one task's run."""

    method: str
    steps: int | None
    accuracy: np.ndarray
    seeds: tuple[float, ...]  # mean accuracy with each learner
    example_gradients: float
    seconds: float
    compile_seconds: float
    chosen: dict[str, Any]


@contextlib.contextmanager
def stopwatch() -> Iterator[Callable[[], tuple[float, float]]]:
    """Gives `read()`: (seconds so far without compilation, seconds of compilation)."""
    compiled, began = 0.0, time.perf_counter()

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        nonlocal compiled
        if event.startswith("/jax/core/compile/"):
            compiled += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: (max(time.perf_counter() - began - compiled, 0.0), compiled)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def of_lengths(
    method: str, starts: Sequence[Any], field: Field, evaluators: Callable[[Any, int], np.ndarray], *, every: bool
) -> list[Scores]:
    """Scores of `method` at every length.

    Args:
      starts: what is averaged over: learners, or just one thing.
      evaluators: (start, length or 0) -> [tasks, points]; with `every` it is called once, with 0, and gives all
        lengths; otherwise it gives one.
    """
    rows = []
    lengths: Sequence[tuple[int, ...]] = [field.lengths] if every else [(length,) for length in field.lengths]
    for group in lengths:
        with stopwatch() as read:
            found = np.stack([evaluators(start, 0 if every else group[0]) for start in starts])
            seconds, compiled = read()
        tasks = len(starts) * len(field.keys)
        for i, steps in enumerate(group):
            accuracy = found[:, :, i]
            rows.append(
                Scores(
                    method, steps, accuracy.mean(0), tuple(accuracy.mean(1)), float(steps * field.batch_size),
                    seconds / tasks * steps / max(group), compiled, {},
                )
            )  # fmt: skip
    return rows


def learned(learners: Sequence[Learner], field: Field, *, random_init: bool = False) -> list[Scores]:
    """The learned rates from the learned init, or from a random one; a schedule is stretched over each length."""
    pool, sample = field.sampler
    start = "random" if random_init else "learned"
    stretched = learners[0].spec.knots > 0

    @functools.cache
    def evaluator(length: int) -> evaluate.Evaluator:
        model, spec = learners[0].model, learners[0].spec
        at = [length] if length else list(field.lengths)
        return evaluate.make_evaluator(
            model, spec, sample, at[-1], of_steps=length or None, at=at, random_init=random_init
        )

    def run(learner: Learner, length: int) -> np.ndarray:
        return evaluator(length)(pool, learner.init, learner.rates, field.keys).tasks

    return of_lengths(f"{start} init + learned rates", learners, field, run, every=not stretched)


def unsearched(name: str, model: Model, inits: Sequence[Params | None], field: Field) -> list[Scores]:
    """Adam at 1e-3, from the given inits (None: random)."""
    run = baseline(model, "adam", field, random_init=inits[0] is None)
    pool, _ = field.sampler

    def score(init: Params | None, _: int) -> np.ndarray:
        return run(pool, init, np.float32(UNSEARCHED_RATE), field.keys).tasks

    return of_lengths(f"{name} init, no search (Adam {UNSEARCHED_RATE:g})", inits, field, score, every=True)


def baseline(model: Model, optimizer: str, field: Field, *, random_init: bool, val: bool = False) -> evaluate.Evaluator:
    """Fixed-rate fine-tunes at the field's lengths."""
    run = evaluate.make_baseline(
        model, (field.val_sampler if val else field.sampler)[1], search.OPTIMIZERS[optimizer], field.lengths,
        batch_size=field.minibatch, random_init=random_init,
    )  # fmt: skip
    if not random_init:
        return run
    any_init = jax.jit(model.init)(jax.random.key(0))
    return lambda pool, _, rates, keys: run(pool, any_init, rates, keys)


def tuned(name: str, model: Model, inits: Sequence[Params], field: Field) -> list[Scores]:
    """From each init, the optimizer and rate that did best on meta-validation tasks at that very length.

    The cost of the tuning is not in example_gradients: it is paid once, as meta-training is; `chosen` has it.
    """
    runs = {o: [baseline(model, o, field, random_init=False, val=val) for val in (True, False)] for o in TUNED}
    cells = [(optimizer, rate) for optimizer, rates in TUNED.items() for rate in rates]
    best: list[list[tuple[str, float]]] = []
    for init in inits:
        found = [
            runs[o][0](field.val_sampler[0], init, np.float32(rate), field.val_keys).tasks.mean(0) for o, rate in cells
        ]
        best.append([cells[i] for i in np.argmax(found, axis=0)])  # at each length
    cost = len(cells) * len(field.val_keys) * field.lengths[-1] * field.batch_size

    def score(i: int, _: int) -> np.ndarray:
        needed = set(best[i])
        curves = {
            c: runs[c[0]][1](field.sampler[0], inits[i], np.float32(c[1]), field.keys).tasks for c in sorted(needed)
        }
        return np.stack([curves[best[i][at]][:, at] for at in range(len(field.lengths))], axis=1)

    rows = of_lengths(f"{name} init + one tuned rate", range(len(inits)), field, score, every=True)
    return [
        row._replace(chosen={"rates": [list(b[at]) for b in best], "tuning_example_gradients": cost})
        for at, row in enumerate(rows)
    ]


Key = tuple[str, str, int]  # (name of the init, searcher, number of the task)


def searched(
    model: Model,
    field: Field,
    space: searchers.Space,
    wanted: dict[str, Sequence[str]],
    inits: dict[str, Params | None],
    *,
    first: dict[str, Sequence[dict[str, Any]]],
    budget: float,
    known: dict[Key, list[searchers.Trial]],
    keep: Callable[[Key, list[searchers.Trial]], None] = lambda key, trials: None,
) -> dict[Key, list[searchers.Trial]]:
    """Every task's own searches, with 20 % of each class of its support set to choose by; tasks go side by side.

    Args:
      wanted: name of an init -> searchers from it; "tpe+" is TPE that tries `first` first.
      inits: name -> params; None draws a random init for each task.
      budget: example-gradients of a search that is not a grid, in mean cells of the grid.
      known, keep: searches of an earlier call; called with each search that ends.
    """
    pool, sample = field.sampler
    program = fit.make_programs(model, "adam")
    space = space.fitting(len(fit.hold_out(jax.jit(sample)(pool, field.keys[0])).train_y))
    jobs = [
        (origin, searcher, task)
        for task in range(len(field.keys))
        for origin, names in wanted.items()
        for searcher in names
        if (origin, searcher, task) not in known
    ]
    devices, done = list(jax.local_devices()), dict(known)

    def run(job: Key) -> None:
        origin, searcher, task = job
        device = devices.pop()
        try:
            with jax.default_device(device):
                episode = jax.jit(sample)(pool, field.keys[task])
                arrays = jax.tree.map(jnp.asarray, fit.hold_out(episode))
                keys = jax.random.split(jax.random.fold_in(field.keys[task], 2), 1)
                start = inits[origin]
                init = model.init(keys[0]) if start is None else start
                held = jax.device_put((arrays, jax.tree.map(lambda v: v[None], init), keys), device)
                problem = searchers.Problem(held[0], held[1], held[2], program)
                done[job] = _one_search(searcher, space, problem, first.get(origin, ()), budget, seed=task)
        finally:
            devices.append(device)
        keep(job, done[job])

    with ThreadPoolExecutor(len(devices)) as threads:
        for future in [threads.submit(run, job) for job in jobs]:
            try:
                future.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
    return done


def _one_search(
    searcher: str, space: searchers.Space, problem: searchers.Problem, first: Sequence[Any], budget: float, *, seed: int
) -> list[searchers.Trial]:
    """A grid, or as many trials as the budget pays for."""
    if searcher == "grid":
        return searchers.search("grid", space, problem, devices=list(problem.keys.devices()))
    limit = budget * mean_cost(space, len(problem.arrays.train_y))
    name, warm = (searcher[:-1], first) if searcher.endswith("+") else (searcher, ())
    trials: list[searchers.Trial] = []
    while sum(trial.example_gradients for trial in trials) < limit:
        trials = searchers.search(name, space, problem, trials=len(trials) + 1, seed=seed, first=warm, known=trials)
    return trials


def mean_cost(space: searchers.Space, train: int) -> float:
    """Example-gradients of a cell of the grid, on average."""
    return float(np.mean(space.epochs) * np.mean([train // size * size for size in space.batch_sizes]))


def best_of(
    method: str, searches: list[list[searchers.Trial]], budget: float = np.inf, *, on_test: bool = False
) -> Scores:
    """What each task's search found within a budget; on_test: the best on the test part itself, which flatters it."""
    if on_test:
        chosen = [max(trials, key=lambda trial: np.mean(trial.test)) for trials in searches]
    else:
        chosen = [searchers.best(trials, budget) for trials in searches]
    spent = []
    for trials in searches:
        costs = np.cumsum([trial.example_gradients for trial in sorted(trials)])
        spent.append(max(costs[0], float(costs[costs <= budget].max(initial=0))))
    accuracy = np.array([np.mean(trial.test) for trial in chosen])
    share = np.mean(spent) / np.mean([sum(t.example_gradients for t in trials) for trials in searches])
    seconds = float(np.mean([sum(t.seconds for t in trials) for trials in searches])) * float(share)
    rates = {"median_learning_rate": float(np.median([trial.learning_rate for trial in chosen]))}
    return Scores(
        method, None, accuracy, (float(accuracy.mean()),), float(np.mean(spent)), seconds, 0.0, rates
    )  # fmt: skip


def as_trial(learner: Learner, space: searchers.Space) -> dict[str, Any] | None:
    """The learned rates as hyperparameters of a search: their geometric mean, the middle epochs, the smallest batch.

    None where they scale something else than Adam's direction, as the search does.
    """
    if learner.spec.base != "adam":
        return None
    groups = {
        name: values
        for name, values in rates_lib.summary(learner.spec, learner.rates).items()
        if rates_lib.kind_of(name) == "rate"
    }
    mean = float(np.exp(np.mean([np.log(np.maximum(np.abs(v), 1e-8)).mean() for v in groups.values()])))
    mean = min(max(mean, min(space.learning_rates)), max(space.learning_rates))
    return {"learning_rate": mean, "batch_size": min(space.batch_sizes), "epochs": sorted(space.epochs)[-1]}
