"""The outer loop in a run folder: metrics, validations, checkpoints, and what it goes on from."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from metalr import models, outer
from metalr.config import TrainConfig
from metalr.errors import ConfigError, StoppedError
from metalr.evaluation import protocol
from metalr.inner import OBJECTIVES, hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.learner import artifact
from metalr.learner.learner import LEARNED
from metalr.outer import devices, loop, processes
from metalr.runs import pictures
from metalr.runs.loggers import Log
from metalr.runs.progress import Reporter
from metalr.runs.setup import Setup, task_cost
from metalr.storage import checkpoints, folders
from metalr.tasks import Sampler, second_key
from metalr.trees import path_name
from metalr.types import Curve, MetaParams, Params, Rates

MOST_SKIPPED = 50  # updates in a row that on_divergence "skip" passes over

Asked = Callable[[], bool]


def layout_of(config: TrainConfig) -> devices.Layout:
    """Of the work of a run over devices."""
    return devices.Layout(config.mesh.tasks, config.mesh.params)


def mesh_of(config: TrainConfig) -> Mesh:
    """The devices that a run trains on. Raises ConfigError for a mesh that they cannot be."""
    for name in ("tasks", "params"):
        value = getattr(config.mesh, name)
        if value is not None and value < 1:
            raise ConfigError(f"mesh.{name}: expected at least 1, got {value}")
    if config.mesh.params > 1 and config.grid.run:
        raise ConfigError(f"mesh.params: expected 1 with grid.run, whose cells are not split, got {config.mesh.params}")
    return devices.task_mesh(config.outer.meta_batch, all_processes=True, layout=layout_of(config))


def _check_same_kind(config: TrainConfig, came: RatesSpec, wanted: RatesSpec) -> None:
    """Raises ConfigError for rates of config.init that mean something else under these settings."""
    same = ["positive", "knots", "base"]
    same += ["steps"] * (wanted.horizon_power is not None) + ["support"] * (wanted.support_power is not None)
    for name in same:
        if getattr(came, name) != getattr(wanted, name):
            raise ConfigError(
                f"init: {config.init}: its rates are of another kind: expected {name} {getattr(wanted, name)!r} as in "
                f"these settings, got {getattr(came, name)!r}"
            )


def _check_same_columns(config: TrainConfig, came: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ConfigError where config.init read its numbers from other columns, or in another order."""
    of_both = [(name, wanted.get(name), came.get(name)) for name in ("features", "targets")]
    of_both.append(("classes", *(facts.get("table", {}).get("classes") for facts in (wanted, came))))
    for name, expected, got in of_both:
        if None not in (expected, got) and expected != got:
            raise ConfigError(
                f"init: {config.init}: expected {name} {expected}, in this order, as in these tasks, got {got}"
            )


class WarmStart(NamedTuple):
    """What meta-training starts from in place of a random init, and what a result says of it."""

    meta: MetaParams
    facts: dict[str, Any]


def warm_start(config: TrainConfig, setup: Setup) -> WarmStart | None:
    """The init and rates of config.init; None if there is none. Raises ConfigError unless they fit the settings."""
    if config.init is None:
        return None
    learner = artifact.load(
        config.init,
        None if setup.model.name in models.MODELS else setup.model,
        None if setup.objective.name in OBJECTIVES else setup.objective,
    )
    if config.outer.learns == "rates" and not learner.rates_alone:
        raise ConfigError(
            f"init: {config.init}: expected rates that were learned alone with outer.learns rates, which draws random "
            "inits, got a learned init; outer.learns rates_of_init learns rates for it"
        )
    shapes = outer.initial_shapes(setup.model, setup.spec)

    def described(tree: Any) -> dict[str, tuple[Any, str]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {path_name(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}

    _check_same_columns(config, learner.facts, setup.source.columns)
    takes_rates = learner.kind_of_rates == LEARNED
    for part, wanted, found in (("init", shapes.init, learner.init), ("rates", shapes.rates, learner.rates)):
        if part == "rates" and not takes_rates:
            continue
        wanted, found = described(wanted), described(found)
        wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        if wrong:
            raise ConfigError(
                f"init: {config.init}: its {part} do not fit these settings: expected {wrong[0]} "
                f"{wanted.get(wrong[0], 'to be absent')}, got {found.get(wrong[0], 'none')}"
            )
    if takes_rates:
        _check_same_kind(config, learner.spec, setup.spec)
    raw = jax.tree.map(
        jnp.asarray,
        hyperparameters.raw_of(setup.spec, learner.rates)
        if takes_rates
        else hyperparameters.initial_raw(setup.spec, learner.init, second_key(_start_key(config))),
    )
    facts = {
        "folder": str(config.init),
        "takes": "init and rates" if takes_rates else "init",
        "example_gradients": learner.facts.get("example_gradients", 0),
    }
    return WarmStart(MetaParams(jax.tree.map(jnp.asarray, learner.init), raw), facts)


class Trained(NamedTuple):
    """What meta-training found best: the init and the actual rates; and its facts, as results.json has them."""

    init: Params
    rates: Rates
    facts: dict[str, Any]


def meta_train(
    config: TrainConfig,
    setup: Setup,
    folder: Path,
    reporter: Reporter,
    asked: Asked = lambda: False,
    *,
    name: str = "",
    warm: WarmStart | None = None,
    log: Log = Log(),  # noqa: B008 - a tuple
) -> Trained:
    """Run the outer loop; keep the init and rates that did best on meta-validation tasks.

    Goes on from the newest whole checkpoint in folder/checkpoints; appends a line an outer step to
    folder/metrics.jsonl, which is first cut back to that step.

    Args:
      asked: whether to save and stop, asked between dispatches; in all processes of a run, or in none.
      warm: where to start, unless there is a checkpoint.
      log: gets numbers after so many outer steps: means over a dispatch, and those of each validation, with a picture.

    Raises:
      StoppedError, DivergedError (the last finite state is saved), StorageError.
    """
    step_key, mesh = _step_key(config), mesh_of(config)
    pool, _ = setup.parts.train
    chunk = _chunk(config, setup, mesh)
    run, resumed = _begun(config, setup, folder, reporter, name, warm, mesh)
    steps, every = config.outer.steps, _every(config)

    def before(first: int, last: int) -> None:
        if setup.prefetch is not None:
            keys = [loop.task_keys(step_key, step, config.outer.meta_batch) for step in range(first, last)]
            setup.prefetch(jnp.concatenate(keys))

    with _open_log(folder, run.progress.metrics_bytes) as lines:
        book = _Book(config, setup, folder, lines, log, run, _validator(config, setup))
        if warm is not None and not resumed:
            book.validate(0.0)  # it may be better than all that comes
            book.save()  # so that resuming never needs what it started from
        if book.due():
            book.validate(0.0)
        try:
            with reporter.bar("meta-training", steps, int(run.state.step)) as advance:
                chunks = loop.run_chunks(chunk, run.state, pool, step_key, steps, every, stop=asked, before=before)
                _keep_books([book], chunks, advance)
        except loop.DivergedError as error:
            run.state = error.state
            book.save()
            raise error.noted(_diagnosis(config, setup, run.state.meta, error.step)) from None
        done = int(run.state.step)
        if done < steps:
            book.save()
            own = setup.source.source == folders.OWN_TASKS
            raise stopped(folder, f"after {done} of {steps} outer steps", config, own)
    return Trained(*run.best, _training_facts(config, setup, run.progress))


def meta_train_together(
    configs: Sequence[TrainConfig],
    setup: Setup,
    places: Sequence[Path],
    reporter: Reporter,
    asked: Asked = lambda: False,
    *,
    logs: Sequence[Log],
    name: str = "",
    warm: WarmStart | None = None,
) -> list[Trained]:
    """`meta_train` for several seeds, whose outer steps are one program; what each gives. Seconds are shared out.

    All begin anew. If one diverges or somebody asks to stop, all are saved, and each can go on alone.

    Args:
      configs, places, logs: of each seed; the settings are the same but for the seed. places: run folders.
    """
    first, count = configs[0], len(configs)
    if setup.prefetch is not None or jax.process_count() > 1:
        raise ConfigError("seeds: expected one after the other with tasks drawn on the host, or several processes")
    mesh, (pool, _) = mesh_of(first), setup.parts.train
    chunk = _chunk(first, setup, mesh, seeds=count)
    runs = [
        _begun(config, setup, place, reporter, name, warm, mesh)[0]
        for config, place in zip(configs, places, strict=True)
    ]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(run.state for run in runs))
    keys = jnp.stack([_step_key(config) for config in configs])
    steps, every, validator = first.outer.steps, _every(first), _validator(first, setup)
    with contextlib.ExitStack() as stack:
        books = []
        for config, place, log, run in zip(configs, places, logs, runs, strict=True):
            lines = stack.enter_context(_open_log(place, 0))
            books.append(_Book(config, setup, place, lines, log, run, validator))

        def save() -> None:
            for book in books:
                book.save()

        if warm is not None:
            for book in books:
                book.validate(0.0)  # it may be better than all that comes
            save()  # so that resuming never needs what they started from
        try:
            with reporter.bar(f"meta-training of {count} seeds", steps, 0) as advance:
                chunks = loop.run_chunks(chunk, state, pool, keys, steps, every, stop=asked)
                _keep_books(books, chunks, advance)
        except loop.DivergedError as error:
            save()
            raise error.noted(f" (one of {count} seeds; all were saved)") from None
        done = int(runs[0].state.step)
        if done < steps:
            save()
            raise stopped(places[0], f"after {done} of {steps} outer steps", first)
    return [
        Trained(*run.best, _training_facts(config, setup, run.progress))
        for config, run in zip(configs, runs, strict=True)
    ]


def _keep_books(books: Sequence[_Book], chunks: Iterator[loop.Chunk], advance: Callable[[int, str], None]) -> None:
    """Go through all chunks of outer steps: write them down, validate and save what is due.

    books: of one run; or of several seeds, whose chunks have an axis of them, and whose seconds are shared out.
    """
    config, several = books[0].config, len(books) > 1
    for part in chunks:
        began, count = time.perf_counter(), part.metrics["loss"].shape[-1]
        parts = [part.of_seed(i, len(books)) for i in range(len(books))] if several else [part]
        for book, own in zip(books, parts, strict=True):
            book.write_steps(own)
            if not count:
                book.run.progress.compile_seconds += own.seconds
        done = min(int(own.state.step) for own in parts)
        if not count or done < part.first + count:  # that compiled; or one of several diverged, which is raised next
            continue
        for book, own in zip(books, parts, strict=True):
            if book.due():
                here = time.perf_counter()
                book.validate(own.seconds)
                book.run.progress.validation_seconds += time.perf_counter() - here
        for book, own in zip(books, parts, strict=True):
            book.run.progress.step_seconds += own.seconds
            book.run.progress.seconds += own.seconds + (time.perf_counter() - began) / len(books)
        if done % config.outer.checkpoint_every == 0 or done == config.outer.steps:
            began = time.perf_counter()
            for book in books:
                book.save()
            for book in books:
                book.run.progress.seconds += (time.perf_counter() - began) / len(books)
        advance(count, books[0].note(part))


def _every(config: TrainConfig) -> tuple[int, int]:
    return config.outer.validate_every, config.outer.checkpoint_every


def _start_key(config: TrainConfig) -> jax.Array:
    """Of what a run starts from."""
    return jax.random.fold_in(jax.random.key(config.seed), 0)


def _step_key(config: TrainConfig) -> jax.Array:
    """What the tasks of all outer steps are drawn from."""
    return jax.random.fold_in(jax.random.key(config.seed), 1)


def _samplers(setup: Setup) -> Sampler | tuple[Sampler, ...]:
    """What draws the tasks of meta-training: one sampler, or one for each size of tasks."""
    several = tuple(amount.train for amount in setup.amounts)
    return several if len(several) > 1 else several[0]


def _chunk(config: TrainConfig, setup: Setup, mesh: Mesh, seeds: int = 0) -> loop.ChunkFunction:
    return loop.make_chunk(
        setup.model,
        setup.spec,
        setup.method,
        setup.optimizer,
        _samplers(setup),
        config.outer.meta_batch,
        phases=setup.phases,
        on_divergence=config.outer.on_divergence,
        objective=setup.objective,
        mesh=mesh,
        seeds=seeds,
    )


@dataclasses.dataclass
class Progress:
    """What a run has counted and found so far, as JSON values; it is in every checkpoint.

    Attributes:
      score, best_step: of the best validation, and the outer step that it stood at.
      metrics_bytes: size of metrics.jsonl.
      step_times: seconds of an outer step, in the last dispatches.
      seconds, step_seconds, validation_seconds: of all but compilation; of outer steps; of validations.
      skipped: outer steps that changed nothing, because something was not finite.
      validations: [outer step, score, seconds] each.
      validated_steps: number of inner steps -> score, of the best validation.
      warm_start: what the run started from, if not from a random init.
    """

    name: str
    score: float | None = None
    best_step: int | None = None
    metrics_bytes: int = 0
    step_times: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    step_seconds: float = 0.0
    validation_seconds: float = 0.0
    compile_seconds: float = 0.0
    skipped: int = 0
    validations: list[Any] = dataclasses.field(default_factory=list)
    validated_steps: dict[str, Any] = dataclasses.field(default_factory=dict)
    warm_start: dict[str, Any] | None = None


@dataclasses.dataclass
class _Run:
    """What a run has come to; all of it is in its checkpoints.

    Attributes:
      best: the init and actual rates that did best on meta-validation tasks so far.
    """

    state: loop.TrainState
    best: tuple[Params, Rates]
    progress: Progress


def _begun(
    config: TrainConfig, setup: Setup, folder: Path, reporter: Reporter, name: str, warm: WarmStart | None, mesh: Mesh
) -> tuple[_Run, bool]:
    """A run before its first step, or as its newest whole checkpoint has it; and whether that was found."""
    state = loop.start(setup.model, setup.spec, setup.optimizer, _start_key(config), warm.meta if warm else None, mesh)
    run = _Run(state, loop.learned(setup.spec, state.meta), Progress(name, warm_start=warm.facts if warm else None))
    store = folder / "checkpoints"
    folders.make(store)
    like = {"state": run.state, "best": run.best}
    found = checkpoints.load(store, like, reporter.line)
    if jax.process_count() > 1:
        found = checkpoints.shared(found, like, processes.from_first_process)
    if found is None:
        return run, False
    tree, facts = found
    if config.mesh.params > 1:  # the best so far is for validation and the artifact, which are each process's own
        tree = {"state": devices.place(tree["state"], mesh), "best": devices.local(tree["best"])}
    else:
        tree = jax.tree.map(jnp.asarray, tree)
    reporter.line(f"resumed at outer step {int(tree['state'].step)}")
    known = {field.name for field in dataclasses.fields(Progress)}  # of another version there may be others
    counted = dataclasses.replace(run.progress, **{name: value for name, value in facts.items() if name in known})
    return _Run(tree["state"], tree["best"], counted), True


Validator = Callable[[Params, Rates], list[tuple[int, Curve]]]


def _validator(config: TrainConfig, setup: Setup) -> Validator:
    """(number of steps, the score after them on fixed meta-validation tasks: a curve of one point), for each.

    Once for each size of tasks, which have a program each.
    """
    pool, _ = setup.parts.validation
    keys = protocol.episode_keys(config.evaluation.seed, config.evaluation.validation_episodes)
    at = sorted(setup.phases.horizons) or [setup.spec.steps]
    evaluators = [
        protocol.make_evaluator(
            setup.model, setup.spec, amount.validation, at[-1], at=at, separate=at != [setup.spec.steps],
            random_init=setup.phases.fresh_init, objective=setup.objective, layout=layout_of(config),
        )
        for amount in setup.amounts
    ]  # fmt: skip
    return lambda init, rates: [point for of in evaluators for point in of(pool, init, rates, keys).each_point()]


class _Book:
    """Keeps the books of a run: lines of metrics.jsonl, validations, checkpoints; tells loggers."""

    def __init__(
        self,
        config: TrainConfig,
        setup: Setup,
        folder: Path,
        lines: RawIOBase,
        log: Log,
        run: _Run,
        validator: Validator,
    ) -> None:
        self.config, self.setup, self.folder, self.lines = config, setup, folder, lines
        self.log, self.run, self.validator = log, run, validator
        self.metric = setup.objective.choose_by
        self.skipped_in_a_row = 0
        self.validated = ""

    def write_steps(self, part: loop.Chunk) -> None:
        """A line for each outer step of a chunk. Raises DivergedError if too many in a row were skipped."""
        run, count = self.run, len(part.metrics["loss"])
        run.state = part.state
        done = int(part.state.step)
        for i in range(count):
            finite = bool(part.metrics["finite"][i])
            self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
            run.progress.skipped += not finite
            _write_line(self.lines, self.folder, _step_line(done - count + i, part.metrics, i))
            if self.skipped_in_a_row == MOST_SKIPPED:
                raise loop.DivergedError(done - count + i, part.metrics, i, part.state)
        if count:
            self.log.numbers(done, {name: float(v.mean()) for name, v in part.metrics.items() if name != "finite"})
            run.progress.step_times = [*run.progress.step_times[-99:], part.seconds / count]

    def due(self) -> bool:
        """Whether the run stands at a validation that it has not had; also where another seed's divergence cut it off.

        See meta_train_together.
        """
        outer, done = self.config.outer, int(self.run.state.step)
        had = self.run.progress.validations
        return done > (had[-1][0] if had else 0) and (done % outer.validate_every == 0 or done == outer.steps)

    def validate(self, seconds: float) -> None:
        """Score on meta-validation tasks, and keep what is best. seconds: of the last chunk."""
        run, setup = self.run, self.setup
        done = int(run.state.step)
        init, rates = loop.learned(setup.spec, run.state.meta)
        found = self.validator(init, rates)
        tasks, groups = np.mean([curve.tasks[:, 0] for _, curve in found], axis=0), found[0][1].groups
        score = float(tasks.mean())
        line: dict[str, Any] = {"step": done, f"validation_{self.metric}": protocol.rounded(score)}
        line |= {name: of(setup.spec, rates) for name, of in hyperparameters.SHOWN.items()}
        _write_line(self.lines, self.folder, line)
        self.log.numbers(done, {name: value for name, value in line.items() if name != "step"})
        title = f"rates after {done} outer steps"
        self.log.picture(done, "rates", functools.partial(pictures.heat_map, line["rates"], title))
        if run.progress.score is None or setup.objective.better(score, run.progress.score):
            run.best, run.progress.score, run.progress.best_step = (init, rates), score, done
            run.progress.validated_steps = {
                str(steps): protocol.rounded(float(np.mean([curve.mean[0] for of, curve in found if of == steps])))
                for steps, _ in found
            }
        run.progress.validations.append([done, protocol.rounded(score), round(run.progress.seconds + seconds, 2)])
        width = float(protocol.half_width(tasks, groups))  # none where there is one task alone
        self.validated = f"validation {score:.3f}" + (f" ± {width:.3f}" if np.isfinite(width) else "")

    def save(self) -> None:
        """A checkpoint of what the run has come to."""
        run = self.run
        run.progress.metrics_bytes = _flush(self.lines, self.folder)
        tree = devices.local({"state": run.state, "best": run.best})
        checkpoints.save(self.folder / "checkpoints", int(run.state.step), tree, dataclasses.asdict(run.progress))

    def note(self, part: loop.Chunk) -> str:
        """What the progress bar shows."""
        shown = dict.fromkeys(("loss", self.metric))  # once, if the loss itself chooses
        return "  ".join([*(f"{name} {part.metrics[name].mean():.3f}" for name in shown), self.validated])


def _training_facts(config: TrainConfig, setup: Setup, progress: Progress) -> dict[str, Any]:
    assert progress.score is not None  # the last outer step is followed by a validation
    warm, earlier = float(np.median(progress.step_times or [np.nan])), progress.warm_start
    own = round(config.outer.steps * config.outer.meta_batch * task_cost(config, setup))
    minibatches = [min(config.inner.batch_size or of.support, of.support) for of in setup.amounts]
    validated = len(progress.validations) * config.evaluation.validation_episodes * sum(minibatches)
    validated *= sum(setup.phases.horizons or (config.inner.steps,))
    numbers = {
        k: round(getattr(progress, k), 4) for k in ("seconds", "step_seconds", "validation_seconds", "compile_seconds")
    }
    return {
        "name": progress.name,
        "outer_steps": config.outer.steps,
        "best_step": progress.best_step,
        f"validation_{setup.objective.choose_by}": protocol.rounded(progress.score),
        "validations": progress.validations,
        "validated_steps": progress.validated_steps,  # of best_step
        **numbers,
        # Of a step once it is compiled; and in all, with compilation, validation and everything between.
        "tasks_per_second": round(config.outer.meta_batch / warm, 1),
        "tasks_per_second_in_all": round(
            config.outer.steps * config.outer.meta_batch / (progress.seconds + progress.compile_seconds), 1
        ),
        "skipped_updates": progress.skipped,
        # With its validations, and what it started from.
        "example_gradients": own + validated + (earlier["example_gradients"] if earlier else 0),
        "validation_example_gradients": validated,
    } | ({"warm_start": earlier} if earlier else {})


def _step_line(step: int, metrics: dict[str, np.ndarray], i: int) -> dict[str, Any]:
    values = {name: float(v[i]) for name, v in metrics.items() if name != "finite"}
    line = {name: protocol.rounded(v) for name, v in values.items()}
    return {"step": step, **line} | ({} if metrics["finite"][i] else {"skipped": True})


def _diagnosis(config: TrainConfig, setup: Setup, meta: MetaParams, step: int) -> str:
    """Which tasks of a step that was not finite are to blame, and the rates it had, in words."""
    pool, _ = setup.parts.train
    key = _step_key(config)
    keys = loop.task_keys(key, step, config.outer.meta_batch)
    local = jax.tree.map(jnp.asarray, devices.local(meta))
    samplers = _samplers(setup)
    gradient = loop.make_gradient(setup.model, setup.spec, setup.method, samplers, setup.phases, setup.objective)
    variant = loop.drawn_variant(key, step, len(loop.variants(samplers, setup.phases)))
    now = loop.trained_from(setup.model, setup.phases, local, key, step)
    bad = loop.failing_tasks(gradient, now, pool, step, variant, keys)
    rates = hyperparameters.summary(setup.spec, hyperparameters.actual(setup.spec, local.rates))
    blame = f"tasks {bad} of {config.outer.meta_batch}" if bad else "the update, no single task"
    return f" ({blame}; rates {json.dumps(rates)})"


def _open_log(folder: Path, size: int) -> RawIOBase:
    """metrics.jsonl for appending, cut back to `size` bytes."""
    try:
        log = (folder / "metrics.jsonl").open("ab", buffering=0)  # what a full disk refuses is known at once
        log.truncate(min(size, log.tell()))
        return log
    except OSError as error:
        folders.refuse(folder / "metrics.jsonl", error)


def _write_line(log: RawIOBase, folder: Path, line: dict[str, Any]) -> None:
    try:
        content = json.dumps(line).encode() + b"\n"
        if log.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        folders.refuse(folder / "metrics.jsonl", error)


def _flush(log: RawIOBase, folder: Path) -> int:
    """Bring the log to the disk; its size."""
    try:
        os.fsync(log.fileno())
        return log.tell()
    except OSError as error:
        folders.refuse(folder / "metrics.jsonl", error)


def stopped(folder: Path, where: str, config: TrainConfig, own_tasks: bool = False) -> StoppedError:
    """The error of a run that was asked to stop, with how to go on."""
    how = f"metalr train --resume {shlex.quote(str(folder))}"
    if config.model.own:
        how = f"metalr.runs.resume({str(folder)!r}, model=...)"
    if own_tasks:
        how = f"metalr.meta_train(..., out={str(folder)!r}, resume=True)"
    return StoppedError(f"stopped {where}, and saved; go on with: {how}")
