"""Learned init and rates beside everything else that people do, on the same held-out tasks, score beside cost.

Three kinds of rivals: fine-tunes with one setting for all tasks (`of_lengths`), one rate tuned on meta-validation tasks
(`tuned`), and searches that every task pays for itself (`searched`). All use the learner's network, the same support
sets and query sets, and minibatches of the same inner loop.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from metalr import models
from metalr.evaluation import protocol
from metalr.inner import CROSS_ENTROPY, Objective, hyperparameters, optimizers
from metalr.learner import Learner
from metalr.models import Model
from metalr.outer import devices
from metalr.search import fit, searchers
from metalr.search import trials as trials_lib
from metalr.spaces import SpaceConfig
from metalr.tasks import Pool, Sampler, second_key
from metalr.trees import count
from metalr.types import Params

UNSEARCHED_RATE = 1e-3  # Adam as most people start it
WIDENINGS, WIDER = 6, 10**0.5  # how often, and by what factor, the range of a tuned rate grows
TUNED = {  # optimizer -> the rates that its range begins with; adam_cosine goes down to zero over the fine-tune
    "adam": (3e-4, 1e-3, 3e-3, 1e-2),
    "adam_cosine": (3e-4, 1e-3, 3e-3, 1e-2),
    "sgd": (1e-2, 3e-2, 1e-1, 3e-1),
}
PORTFOLIOS = {"portfolio of 1": 1, "portfolio of 4": 4}  # searchers that try so many cells, in their order
GRID_OF_VALIDATION = "grid, meta-validation"  # on the tasks that portfolios are made from
Inits = Sequence[Params | None]  # one for each seed of what made them; None: a random init for each task


class Field(NamedTuple):
    """The held-out tasks that all rivals meet.

    Attributes:
      sampler: pool and sampler of meta-test tasks; val_sampler: of meta-validation tasks.
      keys: [tasks]; val_keys: [tasks], for what is tuned across tasks.
      support: support examples of a task; searches train on `train` of them, and choose by the others.
      lengths: numbers of inner steps of the fine-tunes that are reported, ascending.
      batch_size: of minibatches of all runs that are not searched; support: no minibatches.
      objective: what all of them minimise, and are scored by.
      early_stopping: a method stops at the length, of those up to the one reported, that was best on meta-validation
        tasks, if it is tuned at all.
      groups: [tasks] int, as of protocol.half_width: which of `keys` draw the same task.
    """

    sampler: tuple[Pool, Sampler]
    val_sampler: tuple[Pool, Sampler]
    keys: jax.Array
    val_keys: jax.Array
    support: int
    train: int
    lengths: tuple[int, ...]
    batch_size: int
    objective: Objective = CROSS_ENTROPY
    early_stopping: bool = False
    groups: np.ndarray | None = None

    @property
    def minibatch(self) -> int | None:
        """The batch size as the inner loop takes it."""
        return None if self.batch_size >= self.support else self.batch_size


class Scores(NamedTuple):
    """One method at one cost.

    Attributes:
      steps: of a run without a search, or the most that it may take; None for a search.
      scores: [learners, tasks] float64, the objective's score (accuracy, say); one row for what no learner is part of.
      example_gradients: of one task, as done; naive_example_gradients: with each cell of a grid run alone.
      seconds: of one task on one device; without compilation, but a search's first trials have it.
      paid_once: example-gradients that all tasks share: meta-training, pre-training, tuning.
      chosen: what a search or tuning chose.
    """

    method: str
    steps: int | None
    scores: np.ndarray
    example_gradients: float
    naive_example_gradients: float
    seconds: float
    compile_seconds: float | None
    paid_once: float = 0.0
    chosen: dict[str, Any] = {}  # noqa: RUF012 (never changed)

    @property
    def tasks(self) -> np.ndarray:
        """Mean over learners: [tasks] float64."""
        return self.scores.mean(0)

    @property
    def mean(self) -> float:
        """Over learners and tasks."""
        return float(self.scores.mean())


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
    method: str, starts: Sequence[Any], field: Field, run: Callable[[Any], np.ndarray], *, separate: bool = False
) -> list[Scores]:
    """Scores of `method` at every length.

    Args:
      starts: what is averaged over: learners, or just one thing.
      run: start -> [tasks, lengths].
      separate: whether each length is a fine-tune of its own, or all are points of one; for the seconds of each.
    """
    with stopwatch() as read:
        found = np.stack([run(start) for start in starts])
        seconds, compiled = read()
    a_step = seconds * devices.task_mesh(len(field.keys)).size / (len(starts) * len(field.keys))
    a_step /= sum(field.lengths) if separate else max(field.lengths)
    costs = [float(steps * field.batch_size) for steps in field.lengths]
    return [
        Scores(method, steps, found[:, :, i], cost, cost, a_step * steps, compiled)
        for i, (steps, cost) in enumerate(zip(field.lengths, costs, strict=True))
    ]


LearnedRuns = Callable[[Learner, bool, bool], np.ndarray]


def learned_runs(learners: Sequence[Learner], field: Field) -> LearnedRuns:
    """(learner, from random inits?, on meta-validation tasks?) -> [tasks, lengths]. One program for all lengths.

    A schedule is stretched over each length. Random inits have a program of their own: in the factored form all tasks
    share the first kernel of an init that is the same for them.
    """
    model, spec = learners[0].model, learners[0].spec

    @functools.cache
    def evaluator(random_init: bool, val: bool) -> protocol.Evaluator:
        return protocol.make_evaluator(
            model, spec, (field.val_sampler if val else field.sampler)[1], field.lengths[-1], at=field.lengths,
            separate=spec.of_length, random_init=random_init, objective=field.objective,
        )  # fmt: skip

    def run(learner: Learner, random_init: bool, val: bool) -> np.ndarray:
        pool, keys = (field.val_sampler[0], field.val_keys) if val else (field.sampler[0], field.keys)
        return evaluator(random_init, val)(pool, learner.init, learner.rates, keys).tasks

    return run


def learned(learners: Sequence[Learner], field: Field, runs: LearnedRuns, *, random_init: bool = False) -> list[Scores]:
    """The learned rates from the learned init, or from a random one.

    With early stopping, the number of steps is chosen with the first learner, as a tuned rate is from the first init.
    """
    separate = learners[0].spec.of_length
    method = f"{'random' if random_init else 'learned'} init + {learners[0].kind_of_rates}"
    rows = of_lengths(method, learners, field, lambda one: runs(one, random_init, False), separate=separate)
    if not field.early_stopping:
        return rows
    scores = runs(learners[0], random_init, True).mean(0)
    paid = (sum(field.lengths) if separate else field.lengths[-1]) * len(field.val_keys) * field.batch_size
    return [row._replace(paid_once=float(paid)) for row in _stopped_early(rows, scores.tolist(), field)]


def _one_program(
    model: Model,
    field: Field,
    optimizer: Callable[..., Any],
    *,
    separate: bool,
    val: bool = False,
    evaluated: Any = None,
) -> Callable[[Params | None, Any], np.ndarray]:
    """(init, rate or rates) -> [tasks, (rates,) lengths], with an optimizer as of protocol.make_baseline.

    An init of None: random ones. val: on meta-validation tasks.
    """
    (pool, sample), keys = (field.val_sampler, field.val_keys) if val else (field.sampler, field.keys)
    evaluate = protocol.make_baseline(
        model, sample, optimizer, field.lengths, separate=separate, batch_size=field.minibatch, random_init=None,
        objective=field.objective, evaluated=evaluated,
    )  # fmt: skip
    return lambda init, rates: evaluate(pool, init, np.asarray(rates, np.float32), keys).tasks


Baselines = Callable[[str, bool], Callable[[Params | None, Sequence[float]], np.ndarray]]


def baselines(model: Model, field: Field) -> Baselines:
    """(optimizer, on meta-validation tasks?) -> (init, rates) -> [rates, tasks, lengths]. An init of None: random ones.

    Runs with fixed rates. Each is compiled once for all lengths and inits (and, on accelerators, for each number of
    rates side by side); share it between those of one network.
    """

    @functools.cache
    def of(optimizer: str, val: bool) -> Callable[[Params | None, Sequence[float]], np.ndarray]:
        separate = optimizer == "adam_cosine"
        make = optimizers.adam_cosine if separate else optimizers.by_name(optimizer)
        evaluate = _one_program(model, field, make, separate=separate, val=val)

        def run(init: Params | None, rates: Sequence[float]) -> np.ndarray:
            found = []
            for few in devices.at_once(rates):
                curves = evaluate(init, few[0] if len(few) == 1 else few)
                found.append(curves.reshape(len(curves), len(few), -1))
            return np.concatenate(found, axis=1).swapaxes(0, 1)

        return run

    return of


def unsearched(name: str, inits: Inits, field: Field, runs: Baselines) -> list[Scores]:
    """Adam at 1e-3 from every init."""
    run = runs("adam", False)
    method = f"{name} init, no search (Adam {UNSEARCHED_RATE:g})"
    return of_lengths(method, inits, field, lambda init: run(init, [UNSEARCHED_RATE])[0])


RateFree = Callable[[str], Callable[[Params | None], np.ndarray]]


def rate_free_runs(model: Model, field: Field) -> RateFree:
    """Name of a row of optimizers.WITHOUT_SEARCH -> init -> [tasks, lengths]. As `baselines`, with no rate to give."""

    @functools.cache
    def of(optimizer: str) -> Callable[[Params | None], np.ndarray]:
        row, most = optimizers.without_search(optimizer), field.lengths[-1]
        evaluate = _one_program(
            model, field, lambda _, steps=most: row.make(steps), separate=row.of_length, evaluated=row.evaluated
        )
        return lambda init: evaluate(init, 0.0)

    return of


def without_search(name: str, inits: Inits, field: Field, runs: RateFree, optimizer: str) -> list[Scores]:
    """From every init, an optimizer that nobody chooses a rate for; a row of optimizers.WITHOUT_SEARCH."""
    separate = optimizers.without_search(optimizer).of_length
    return of_lengths(f"{name} init, no search ({optimizer})", inits, field, runs(optimizer), separate=separate)


def tuned(name: str, inits: Inits, field: Field, runs: Baselines) -> list[Scores]:
    """From every init, the optimizer and rate that did best on meta-validation tasks at that very length.

    They are chosen from the first init. An optimizer's best rate at an end of its range widens the range, until none
    is (or WIDENINGS times). With early stopping, the length is chosen with them, of those up to the one reported. The
    cost of the tuning is in paid_once, as that of meta-training.
    """
    first = inits[0]
    found: dict[tuple[str, float], np.ndarray] = {}  # (optimizer, rate) -> score at each length
    wanted = [(optimizer, rate) for optimizer, rates in TUNED.items() for rate in rates]
    for _ in range(WIDENINGS + 1):
        for optimizer in dict.fromkeys(optimizer for optimizer, _ in wanted):
            rates = [rate for name, rate in wanted if name == optimizer]
            scores = runs(optimizer, True)(first, rates).mean(1)
            found |= {(optimizer, rate): score for rate, score in zip(rates, scores, strict=True)}
        cells = sorted(found)
        by_length = [{cell: float(found[cell][at]) for cell in cells} for at in range(len(field.lengths))]
        best = [field.objective.best(cells, scores.__getitem__) for scores in by_length]
        of_each = {
            field.objective.best([cell for cell in cells if cell[0] == optimizer], scores.__getitem__)
            for scores in by_length
            for optimizer in TUNED
        }
        wanted = [beyond for cell in sorted(of_each) if (beyond := _beyond(cell, cells)) is not None]
        if not wanted:
            break
    whole, each = field.lengths[-1], sum(field.lengths)
    steps = sum(each if optimizer == "adam_cosine" else whole for optimizer, _ in found)
    cost = steps * len(field.val_keys) * field.batch_size

    def of_cell(cell: tuple[str, float]) -> list[Scores]:
        run, separate = runs(cell[0], False), cell[0] == "adam_cosine"
        return of_lengths(
            f"{name} init + one tuned rate", inits, field, lambda init: run(init, [cell[1]])[0], separate=separate
        )

    of_cells = {cell: of_cell(cell) for cell in sorted(set(best))}
    rows = [
        of_cells[cell][at]._replace(paid_once=float(cost), chosen={"optimizer": cell[0], "learning_rate": cell[1]})
        for at, cell in enumerate(best)
    ]
    if not field.early_stopping:
        return rows
    scores = [by_length[at][cell] for at, cell in enumerate(best)]
    return _stopped_early(rows, scores, field)


def _stopped_early(rows: Sequence[Scores], scores: Sequence[float], field: Field) -> list[Scores]:
    """For each length, the row of the length up to it with the best score; of equal ones the shortest.

    rows, scores: at each length, on the tasks that all rivals meet, and on average on meta-validation tasks.
    """
    best = [field.objective.best(range(at + 1), scores.__getitem__) for at in range(len(rows))]
    return [
        rows[i]._replace(steps=most, chosen=rows[i].chosen | {"steps": rows[i].steps})
        for i, most in zip(best, field.lengths, strict=True)
    ]


def _beyond(cell: tuple[str, float], cells: Sequence[tuple[str, float]]) -> tuple[str, float] | None:
    """The next rate beyond a cell that stands at an end of its optimizer's range; None for one inside."""
    optimizer, rate = cell
    rates = [other for name, other in cells if name == optimizer]
    if min(rates) < rate < max(rates):
        return None
    return optimizer, rate * (WIDER if rate == max(rates) else 1 / WIDER)


Key = tuple[str, str, int]  # (name of the init, searcher, number of the task)


class Searched(NamedTuple):
    """One task's search; again: score of the winner trained anew on the whole support set (scikit-learn's refit)."""

    trials: list[trials_lib.Trial]
    again: float
    again_example_gradients: int


def searched(
    model: Model,
    field: Field,
    space: SpaceConfig,
    wanted: Mapping[str, Sequence[str]],
    inits: Mapping[str, Inits],
    *,
    first: Mapping[str, Sequence[dict[str, Any]]],
    cells: float,
    known: dict[Key, Searched],
    keep: Callable[[Key, Searched], None] = lambda key, found: None,
    between: Callable[[], None] = lambda: None,
) -> dict[Key, Searched]:
    """Every task's own searches, with 20 % of its support set (of each class) to choose by; tasks go side by side.

    Args:
      space: batches larger than a task's training part become all of it.
      wanted: name of an init -> searchers from it; "tpe+" is TPE that tries `first` first, a portfolio tries no more.
      inits: name -> params, of which tasks take turns; None draws a random init for each task.
      first: searcher -> hyperparameters that it tries first.
      cells: budget of a search that is not a grid, in mean cells of the grid.
      known, keep: searches of an earlier call; called with each search that ends, by one thread at a time.
      between: called before every epoch; what it raises ends everything.
    """
    pool, sample = field.sampler
    program, draw = fit.make_programs(model, "adam", objective=field.objective), jax.jit(sample)
    jobs = [
        (origin, searcher, task)
        for task in range(len(field.keys))
        for origin, names in wanted.items()
        for searcher in names
        if (origin, searcher, task) not in known
    ]
    done, one_at_a_time = dict(known), threading.Lock()

    def run(job: Key, device: Any, go_on: Callable[[], None]) -> None:
        found = search_one(job, device, go_on)
        with one_at_a_time:
            done[job] = found
            keep(job, found)

    def search_one(job: Key, device: Any, go_on: Callable[[], None]) -> Searched:
        origin, searcher, task = job
        episode = draw(pool, field.keys[task])
        init_key, key = jax.random.split(second_key(field.keys[task]))  # as in `evaluate`: its random init too
        start = inits[origin][task % len(inits[origin])]
        x = models.unit(episode.support_x) if model.takes_images else episode.support_x
        begun = model.begin(model.init(init_key) if start is None else start, x, episode.support_y)
        init = jax.tree.map(lambda v: jnp.asarray(v)[None], begun)
        arrays = jax.tree.map(jnp.asarray, fit.hold_out(episode, by_class=field.objective.of_classes))
        train = count(arrays.train_y)  # with label noise, classes and so parts differ in size from task to task
        fitting = space.fitting(train)
        given = [one | {"batch_size": fitting.nearest(one["batch_size"])} for one in first.get(searcher, ())]
        limit = {"trials": len(given)} if searcher in PORTFOLIOS else {"budget": cells * mean_cost(fitting, train)}
        arrays, init, keys = jax.device_put((arrays, init, key[None]), device)
        problem = searchers.Problem(arrays, init, keys, program, field.objective)
        trials = searchers.search(
            _engine(searcher), fitting, problem, devices=[device], seed=task, between=go_on, first=given, **limit,
        )  # fmt: skip
        best = trials_lib.best(trials, objective=field.objective)
        whole = jax.device_put(arrays._replace(train_x=episode.support_x, train_y=episode.support_y), device)
        size = field.support if best.batch_size == train else best.batch_size  # all of it stays all of it
        (point,) = fit.trajectory(
            program(size), whole, init, [best.learning_rate], keys, [best.params["epochs"]], go_on
        )
        cost = best.params["epochs"] * (field.support // size) * size
        return Searched(trials, float(point.test.mean()), cost)

    devices.spread(run, jobs, devices.local_devices(), between)
    return done


def _engine(searcher: str) -> str:
    """The key of searchers.SEARCHERS that carries out one of a comparison's searchers."""
    if searcher in PORTFOLIOS:
        return "random"  # of which only what is given first is tried
    return "grid" if searcher == GRID_OF_VALIDATION else searcher.rstrip("+")


def portfolio(found: Sequence[Searched], space: SpaceConfig, size: int, objective: Objective) -> list[dict[str, Any]]:
    """The cells of a grid that together did best on tasks of meta-validation, greedily: the best one for all first.

    Feurer et al. 2022 (auto-sklearn 2.0, section 3.1): each cell is added whose portfolio has the best mean over tasks,
    where a task's score is that of its best member. A cell that is not finite in a task counts as its worst one there;
    a task in which none is does not count.

    Args:
      found: the grid of each task.
      space: the grid. Its batch sizes stand for those of tasks that are smaller than they are.
      size: how many cells at most.
    """
    sign = 1.0 if objective.maximise else -1.0
    scores: dict[tuple[Any, ...], np.ndarray] = {}  # by what a cell is in each task
    cells = []
    for batch, rate, epochs in itertools.product(space.batch_sizes, space.learning_rates, space.epochs):
        own = [_cell_of(one, batch, rate, epochs) for one in found]
        what = tuple(tuple(sorted(trial.params.items())) for trial in own)
        if what not in scores:  # batches of all of a small task are one cell
            scores[what] = sign * np.array([np.mean(trial.test) for trial in own])
            cells.append({"batch_size": batch, "learning_rate": rate, "epochs": epochs})
    table = np.stack([*scores.values()], axis=1)  # [tasks, cells]
    finite = np.isfinite(table)
    table = table[finite.any(1)] if finite.any() else np.zeros_like(table)
    worst = np.min(table, axis=1, keepdims=True, initial=np.inf, where=np.isfinite(table))
    table = np.where(np.isfinite(table), table, worst)
    best, chosen = np.full(len(table), -np.inf), list[int]()
    for _ in range(min(size, len(cells))):
        means = np.maximum(best[:, None], table).mean(0)
        chosen.append(max((i for i in range(len(cells)) if i not in chosen), key=lambda i: means[i]))
        best = np.maximum(best, table[:, chosen[-1]])
    return [cells[i] for i in chosen]


def _cell_of(found: Searched, batch: int, rate: float, epochs: int) -> trials_lib.Trial:
    """The trial of a task's grid that a cell of the whole space is there."""
    sizes = sorted({trial.params["batch_size"] for trial in found.trials})
    own = SpaceConfig(batch_sizes=tuple(sizes)).nearest(batch)
    return next(
        trial
        for trial in found.trials
        if (trial.params["batch_size"], trial.params["learning_rate"], trial.params["epochs"]) == (own, rate, epochs)
    )


def mean_cost(space: SpaceConfig, train: int) -> float:
    """Example-gradients of a cell of the grid, on average."""
    return float(np.mean(space.epochs) * np.mean([train // size * size for size in space.batch_sizes]))


def best_of(
    method: str,
    found: Sequence[Searched],
    budget: float = np.inf,
    *,
    grid: bool = False,
    choose: str = "validation",
    objective: Objective = CROSS_ENTROPY,
) -> Scores:
    """What each task's search found within a budget of example-gradients.

    choose: by "validation"; by the "test" part itself, which flatters the search; or "again": by validation, and
    trained anew on the whole support set (of the whole search, whatever the budget).
    """
    spent, naive, seconds, chosen = [], [], [], []

    def by_test(trial: trials_lib.Trial) -> float:
        return float(np.mean(trial.test))

    for one in found:
        within = trials_lib.within(one.trials, budget)
        done, alone = trials_lib.cost(within, grid)
        again = one.again_example_gradients if choose == "again" else 0
        spent.append(done + again)
        naive.append(alone + again)
        seconds.append(trials_lib.seconds(within, grid))
        best = objective.best(within, by_test if choose == "test" else lambda t: t.score)
        chosen.append(best)
    again = choose == "again"
    scores = np.array([[one.again if again else np.mean(t.test) for one, t in zip(found, chosen, strict=True)]])
    return Scores(
        method,
        None,
        scores,
        float(np.mean(spent)),
        float(np.mean(naive)),
        float(np.mean(seconds)),
        None,
        chosen={"median_learning_rate": float(np.median([trial.learning_rate for trial in chosen]))},
    )


def as_trial(learner: Learner, space: SpaceConfig) -> dict[str, Any] | None:
    """The learned rates as hyperparameters of a search: their geometric mean, the middle epochs, the smallest batch.

    None where they scale something else than Adam's direction, which is what is searched.
    """
    if learner.spec.base != "adam":
        return None
    means = [
        np.log(np.maximum(np.abs(values), 1e-8)).mean()
        for name, values in hyperparameters.summary(learner.spec, learner.rates).items()
        if hyperparameters.kind_of(name) == "rate"
    ]
    rate = min(max(float(np.exp(np.mean(means))), min(space.learning_rates)), max(space.learning_rates))
    epochs = sorted(space.epochs)[len(space.epochs) // 2]
    return {"learning_rate": rate, "batch_size": min(space.batch_sizes), "epochs": epochs}
