"""From a config to a run folder, and on from where a run was stopped.

A run folder holds config.json, metrics.jsonl (a line an outer step), checkpoints/, artifact/, grid.jsonl (cells of the
grid as they finish) and results.json, and while the run goes on, a lock. Everything that can be refused is refused
before the folder is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import metalr
from metalr import models, outer, tasks
from metalr.config import ModelConfig, TrainConfig
from metalr.config.files import read_config
from metalr.errors import ConfigError, StoppedError
from metalr.evaluation import protocol, small_grid
from metalr.inner import hyperparameters
from metalr.inner.objective import Objective
from metalr.learner import Learner, artifact
from metalr.learner.learner import LEARNED
from metalr.models import Model
from metalr.outer import devices, loop, processes
from metalr.report import runs as listed
from metalr.runs import evaluating, examples, pictures, preemption
from metalr.runs.job import Job
from metalr.runs.loggers import Log, Logger, opened
from metalr.runs.progress import ConsoleReporter, Reporter
from metalr.runs.provenance import command, peak_memory, provenance
from metalr.runs.setup import Setup, describe, set_up, task_cost
from metalr.runs.sources import OWN_TASKS, TABLE, load
from metalr.storage import checkpoints, folders
from metalr.trees import path_name
from metalr.types import MetaParams, Params, Rates

FILES = {"config.json", "metrics.jsonl", "checkpoints", "artifact", "grid.jsonl", "results.json", *folders.OWN}
JOB = Job(
    "run",
    frozenset(FILES),
    (
        "out",
        "data",
        "overwrite",
        "grid",
        "evaluation.episodes",
        "evaluation.steps",
        "evaluation.shown_tasks",
        "loggers",
        "mesh",
        "outer.checkpoint_every",
    ),
    ("checkpoints",),
)
MOST_SKIPPED = 50  # updates in a row that on_divergence "skip" passes over

Asked = Callable[[], bool]


def run(
    config: TrainConfig,
    *,
    name: str,
    model: Model | None = None,
    reporter: Reporter | None = None,
    given: tasks.Tasks | None = None,
    objective: Objective | None = None,
    loggers: Sequence[Logger] = (),
) -> dict[str, Any]:
    """Meta-train, evaluate on held-out tasks, compare if asked to; leave a run folder; return its results.

    SIGTERM and SIGINT save the run at the next outer step and raise StoppedError; `resume` goes on.

    Args:
      name: names the default folder runs/NAME.
      model: a network of your own (models.from_linen, models.from_nnx), instead of config.model.
      given: tasks of your own, instead of config.data and config.tasks; with a model.
      objective: one of your own, instead of config.objective.
      loggers: your own, beside those of config.loggers.

    Raises:
      MetalrError: a setting cannot work (nothing is written then), training diverged, or the disk refuses.
    """
    begun = config if model is None else dataclasses.replace(config, model=ModelConfig.of(model))

    def make() -> tuple[Setup, WarmStart | None]:
        mesh_of(begun)
        setup = set_up(begun, model, given, objective=objective)
        return setup, warm_start(begun, setup)

    def carry_out(parts: tuple[Setup, WarmStart | None], folder: Path) -> dict[str, Any]:
        return _carry_out(begun, parts[0], folder, name, reporter or ConsoleReporter(), parts[1], loggers)

    return JOB.begin(begun, name, make, carry_out)


def resume(
    folder: Path,
    config: TrainConfig | None = None,
    *,
    model: Model | None = None,
    reporter: Reporter | None = None,
    given: tasks.Tasks | None = None,
    objective: Objective | None = None,
    loggers: Sequence[Logger] = (),
) -> dict[str, Any]:
    """Go on with a stopped or killed run from its newest whole checkpoint; it ends as if it had never stopped.

    Args:
      folder: the run folder.
      config: the run's config, with other values for JOB.may_change if wanted; default: the run's own.
      model: the network of your own that the run was started with, if it was.
      given, objective: the tasks and the objective of your own that it was started with, if it was.

    Raises:
      MetalrError: no run, a finished one, one in use, or a changed setting that the result depends on.
    """
    folders.refuse_if_locked(folder)
    stored = read_config(folder)
    begun = dataclasses.replace(config or stored, out=folder)
    if model is not None:
        begun = dataclasses.replace(begun, model=ModelConfig.of(model))
    JOB.check_changes(folder, stored, begun)
    JOB.refuse_finished(folder)
    if given is not None:
        _check_tasks(folder, given)

    def make() -> tuple[Setup, WarmStart | None]:
        where = begun.data if begun.data != stored.data else None
        mesh_of(begun)
        setup = set_up(begun, model, given or load(stored, folder, where), objective=objective)
        return setup, None if checkpoints.any_in(folder / "checkpoints") else warm_start(begun, setup)

    def carry_out(parts: tuple[Setup, WarmStart | None], folder: Path) -> dict[str, Any]:
        return _carry_out(begun, parts[0], folder, folder.name, reporter or ConsoleReporter(), parts[1], loggers)

    return JOB.go_on(folder, make, carry_out, stored, begun)


def check_same(folder: Path, config: TrainConfig, model: Model, given: tasks.Tasks) -> None:
    """Raises ConfigError unless a run is of these settings and tasks, but for what may change."""
    begun = dataclasses.replace(config, out=folder, model=ModelConfig.of(model))
    JOB.check_changes(folder, read_config(folder), begun)
    _check_tasks(folder, given)


def _check_tasks(folder: Path, given: tasks.Tasks) -> None:
    if folders.data_of(folder).get("sha256", given.sha256) != given.sha256:
        raise ConfigError(f"tasks: expected those that {folder} was begun with, got others ({given.name!r}, by facts)")


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


class WarmStart(NamedTuple):
    """What meta-training starts from in place of a random init, and what a result says of it."""

    meta: MetaParams
    facts: dict[str, Any]


def warm_start(config: TrainConfig, setup: Setup) -> WarmStart | None:
    """The init and rates of config.init; None if there is none. Raises ConfigError unless they fit the settings."""
    if config.init is None:
        return None
    learner = artifact.load(config.init, setup.model if setup.model.name == models.CUSTOM else None)
    shapes = outer.initial_shapes(setup.model, setup.spec)

    def described(tree: Any) -> dict[str, tuple[Any, str]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {path_name(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}

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
    if takes_rates and (learner.spec.positive, learner.spec.knots) != (setup.spec.positive, setup.spec.knots):
        raise ConfigError(
            f"init: {config.init}: its rates are of another kind: expected {setup.spec}, got {learner.spec}"
        )
    raw = jax.tree.map(
        jnp.asarray,
        hyperparameters.raw_of(setup.spec, learner.rates)
        if takes_rates
        else hyperparameters.initial_raw(setup.spec, learner.init),
    )
    facts = {
        "folder": str(config.init),
        "takes": "init and rates" if takes_rates else "init",
        "example_gradients": learner.facts.get("example_gradients", 0),
    }
    return WarmStart(MetaParams(jax.tree.map(jnp.asarray, learner.init), raw), facts)


def _agree(config: TrainConfig, setup: Setup) -> None:
    """Raises ConfigError unless all processes of this run are about to do the same."""
    settings = {k: v for k, v in config.to_json().items() if k not in ("out", "overwrite", "data", "init")}
    processes.check_same_in_all_processes(
        {"settings": json.dumps(settings), "data": setup.source.sha256, "jax": jax.__version__}
        | {"metalr": metalr.__version__}
    )


def _carry_out(
    config: TrainConfig, setup: Setup, folder: Path, name: str, reporter: Reporter, warm: WarmStart | None,
    loggers: Sequence[Logger],
) -> dict[str, Any]:  # fmt: skip
    began = time.perf_counter()
    own = setup.source.source == OWN_TASKS
    folders.remember_data(folder, OWN_TASKS if own else config.data, setup.source.sha256)
    with preemption.watch() as asked:
        _agree(config, setup)
        reporter.line(describe(config, setup))
        here = time.perf_counter()
        named, own_ones = (config.loggers, loggers) if jax.process_index() == 0 else ((), ())
        with opened(named, own_ones, folder, listed.flat(config.to_json()), reporter.line) as log:
            init, rates, training = meta_train(
                config, setup, folder, reporter, lambda: processes.in_any_process(asked()), name=name, warm=warm,
                log=log,
            )  # fmt: skip
            here = time.perf_counter() - here
            before = max(0.0, training["seconds"] - here)  # in earlier processes of this run
            if config.mesh.params > 1:  # of the last local mesh, for what follows here
                init, rates = devices.place((init, rates), devices.task_mesh(1, layout=layout_of(config)))
            learner = Learner(
                setup.model, setup.spec, init, rates, learner_facts(config, setup, training), setup.objective,
                setup.standardisation,
            )  # fmt: skip
            if not (folder / "config.json").is_file():
                folders.refuse(folder, FileNotFoundError(errno.ENOENT, "the run folder vanished"))
            artifact.save(folder / "artifact", learner, overwrite=True)
            curve, seconds = evaluating.held_out(
                learner, setup, config.evaluation.episodes, config.curve_steps, config.evaluation.seed,
                layout=layout_of(config),
            )  # fmt: skip
            shown = examples.of_learner(learner, setup, curve, config.evaluation.seed, config.evaluation.shown_tasks)
            if shown is not None:
                folders.write_json(folder / folders.EXAMPLES, shown)
                for task in shown["tasks"]:
                    draw = functools.partial(pictures.task, task, shown)
                    log.picture(config.outer.steps, f"held-out tasks/{task['which']}", draw)
        results = {
            "name": training.pop("name"),
            "command": command(),
            "config": config.to_json(),
            "provenance": provenance(),
            "data": {"name": setup.source.name, "source": setup.source.source, "sha256": setup.source.sha256},
            "split_sha256": setup.source.split_sha256,
            "splits": setup.source.splits,
            "transductive": setup.model.transductive,
            "training": training,
            **{name: of(setup.spec, rates) for name, of in hyperparameters.SHOWN.items()},
            "objective": setup.objective.name,
            "metric": {"name": setup.objective.choose_by, "maximise": setup.objective.maximise},
            "tasks": setup.source.tasks,
            "curve": evaluating.curve_rows(curve, setup.objective.choose_by),
            "evaluation_seconds": round(seconds, 3),
        }
        if config.grid.run:
            known, keep = _kept_cells(config, folder, asked)
            results["comparison"], results["grid"] = evaluating.compare(
                config, setup, learner, curve, reporter, known, keep
            )
    results["seconds"] = round(before + time.perf_counter() - began, 2)
    results["peak_memory_bytes"] = peak_memory()
    folders.write_json(folder / "results.json", results)
    results["folder"] = str(folder)
    return results


def _kept_cells(
    config: TrainConfig, folder: Path, asked: Asked
) -> tuple[list[small_grid.Cell], Callable[[list[small_grid.Cell]], None]]:
    """Cells of the grid that an earlier process finished, and what keeps those of this one."""
    file, of = folder / "grid.jsonl", [config.evaluation.seed, config.evaluation.episodes]
    known = []
    for facts in folders.read_rows(file):
        with contextlib.suppress(TypeError, KeyError):
            if facts.pop("tasks_of") == of:
                known.append(small_grid.Cell(**facts | {"tasks": np.array(facts["tasks"])}))

    def keep(cells: list[small_grid.Cell]) -> None:
        folders.append_rows(file, [c._asdict() | {"tasks": c.tasks.tolist(), "tasks_of": of} for c in cells])
        if asked():
            raise _stopped(folder, "in the grid", config)

    return known, keep


def _stopped(folder: Path, where: str, config: TrainConfig, own_tasks: bool = False) -> StoppedError:
    how = f"metalr train --resume {folder}"
    if config.model.own:
        how = f"metalr.runs.resume({str(folder)!r}, model=...)"
    if own_tasks:
        how = f"metalr.meta_train(..., out={str(folder)!r}, resume=True)"
    return StoppedError(f"stopped {where}, and saved; go on with: {how}")


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
) -> tuple[Params, Rates, dict[str, Any]]:
    """Run the outer loop; keep the init and rates that did best on meta-validation tasks.

    Goes on from the newest whole checkpoint in folder/checkpoints; appends a line an outer step to
    folder/metrics.jsonl, which is first cut back to that step.

    Args:
      asked: whether to save and stop, asked between dispatches; in all processes of a run, or in none.
      warm: where to start, unless there is a checkpoint.
      log: gets numbers after so many outer steps: means over a dispatch, and those of each validation, with a picture.

    Returns:
      (init, actual rates, facts for results.json).

    Raises:
      StoppedError, DivergedError (the last finite state is saved), StorageError.
    """
    key, mesh = jax.random.key(config.seed), mesh_of(config)
    pool, sample = setup.samplers["train"]
    val_pool, val_sample = setup.samplers["val"]
    chunk = loop.make_chunk(
        setup.model,
        setup.spec,
        setup.method,
        setup.optimizer,
        sample,
        config.outer.meta_batch,
        phases=setup.phases,
        on_divergence=config.outer.on_divergence,
        objective=setup.objective,
        mesh=mesh,
    )
    horizons = setup.phases.horizons or (setup.spec.steps,)
    validators = [
        protocol.make_evaluator(
            setup.model, setup.spec, val_sample, steps, of_steps=steps, at=[steps],
            random_init=setup.phases.fresh_init, objective=setup.objective, layout=layout_of(config),
        )
        for steps in horizons
    ]  # fmt: skip
    val_keys = protocol.episode_keys(config.evaluation.seed, config.evaluation.validation_episodes)
    state = loop.start(
        setup.model, setup.spec, setup.optimizer, jax.random.fold_in(key, 0), warm.meta if warm else None, mesh
    )
    best = loop.learned(setup.spec, state.meta)
    facts: dict[str, Any] = {
        "name": name, "score": None, "best_step": None, "metrics_bytes": 0, "warm": [],
        "seconds": 0.0, "step_seconds": 0.0, "validation_seconds": 0.0, "compile_seconds": 0.0, "skipped": 0,
        "validations": [], "warm_start": warm.facts if warm else None,
    }  # fmt: skip
    store = folder / "checkpoints"
    folders.make(store)
    like = {"state": state, "best": best}
    found = checkpoints.load(store, like, reporter.line)
    if jax.process_count() > 1:
        found = checkpoints.shared(found, like, processes.from_first_process)
    if found is not None:
        tree, facts = found[0], facts | found[1]
        tree = devices.place(tree, mesh) if config.mesh.params > 1 else jax.tree.map(jnp.asarray, tree)
        state, best = tree["state"], tree["best"]
        reporter.line(f"resumed at outer step {int(state.step)}")
    steps, metric = config.outer.steps, setup.objective.choose_by
    every = config.outer.validate_every, config.outer.checkpoint_every

    def save(state: loop.TrainState) -> None:
        facts["metrics_bytes"] = _flush(lines, folder)
        checkpoints.save(store, int(state.step), devices.local({"state": state, "best": best}), facts)

    with _open_log(folder, facts["metrics_bytes"]) as lines:
        in_a_row = 0
        if warm is not None and found is None:
            save(state)  # so that resuming never needs what it started from
        try:
            with reporter.bar("meta-training", steps, int(state.step)) as advance:
                step_key = jax.random.fold_in(key, 1)

                def before(first: int, last: int) -> None:
                    if setup.prefetch is not None:
                        keys = [loop.task_keys(step_key, step, config.outer.meta_batch) for step in range(first, last)]
                        setup.prefetch(jnp.concatenate(keys))

                chunks = loop.run_chunks(chunk, state, pool, step_key, steps, every, stop=asked, before=before)
                note = ""
                for part in chunks:
                    began = time.perf_counter()
                    state, count = part.state, len(part.metrics["loss"])
                    done = int(state.step)
                    for i in range(count):
                        finite = bool(part.metrics["finite"][i])
                        in_a_row = 0 if finite else in_a_row + 1
                        facts["skipped"] += not finite
                        _write_line(lines, folder, _step_line(done - count + i, part.metrics, i))
                        if in_a_row == MOST_SKIPPED:
                            raise loop.DivergedError(done - count + i, part.metrics, i, state)
                    if not count:
                        facts["compile_seconds"] += part.seconds
                        continue
                    log.numbers(done, {name: float(v.mean()) for name, v in part.metrics.items() if name != "finite"})
                    facts["warm"] = [*facts["warm"][-99:], part.seconds / count]
                    if done % every[0] == 0 or done == steps:
                        init, rates = loop.learned(setup.spec, state.meta)
                        score = float(np.mean([of(val_pool, init, rates, val_keys).mean[-1] for of in validators]))
                        line: dict[str, Any] = {"step": done, f"validation_{metric}": protocol.rounded(score)}
                        line |= {name: of(setup.spec, rates) for name, of in hyperparameters.SHOWN.items()}
                        _write_line(lines, folder, line)
                        log.numbers(done, {name: value for name, value in line.items() if name != "step"})
                        title = f"rates after {done} outer steps"
                        log.picture(done, "rates", functools.partial(pictures.heat_map, line["rates"], title))
                        if facts["score"] is None or setup.objective.better(score, facts["score"]):
                            best, facts["score"], facts["best_step"] = (init, rates), score, done
                        spent = round(facts["seconds"] + part.seconds, 2)
                        facts["validations"].append([done, protocol.rounded(score), spent])
                        note = f"validation {score:.3f}"
                        facts["validation_seconds"] += time.perf_counter() - began
                    if done % every[1] == 0 or done == steps:
                        save(state)
                    facts["step_seconds"] += part.seconds
                    facts["seconds"] += part.seconds + time.perf_counter() - began
                    shown = dict.fromkeys(("loss", metric))  # once, if the loss itself chooses
                    numbers = [f"{name} {part.metrics[name].mean():.3f}" for name in shown]
                    advance(count, "  ".join([*numbers, note]))
        except loop.DivergedError as error:
            state = error.state
            save(state)
            raise error.noted(_diagnosis(config, setup, state.meta, error.step)) from None
        if int(state.step) < steps:
            save(state)
            raise _stopped(
                folder, f"after {int(state.step)} of {steps} outer steps", config, setup.source.source == OWN_TASKS
            )
    init, rates = best
    return init, rates, _training_facts(config, setup, facts)


def _training_facts(config: TrainConfig, setup: Setup, facts: dict[str, Any]) -> dict[str, Any]:
    warm, earlier = float(np.median(facts["warm"])), facts["warm_start"]
    own = round(config.outer.steps * config.outer.meta_batch * task_cost(config, setup))
    minibatch = min(config.inner.batch_size or setup.support, setup.support)
    validated = len(facts["validations"]) * config.evaluation.validation_episodes * minibatch
    validated *= sum(setup.phases.horizons or (config.inner.steps,))
    numbers = {k: round(facts[k], 4) for k in ("seconds", "step_seconds", "validation_seconds", "compile_seconds")}
    return {
        "name": facts["name"],
        "outer_steps": config.outer.steps,
        "best_step": facts["best_step"],
        f"validation_{setup.objective.choose_by}": protocol.rounded(facts["score"]),
        "validations": facts["validations"],
        **numbers,
        # Of a step once it is compiled; and in all, with compilation, validation and everything between.
        "tasks_per_second": round(config.outer.meta_batch / warm, 1),
        "tasks_per_second_in_all": round(
            config.outer.steps * config.outer.meta_batch / (facts["seconds"] + facts["compile_seconds"]), 1
        ),
        "skipped_updates": facts["skipped"],
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
    pool, sample = setup.samplers["train"]
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    keys = loop.task_keys(key, step, config.outer.meta_batch)
    local = jax.tree.map(jnp.asarray, devices.local(meta))
    gradient = loop.make_gradient(setup.model, setup.spec, setup.method, sample, setup.phases, setup.objective)
    now = loop.trained_from(setup.model, setup.phases, local, key, step)
    bad = loop.failing_tasks(gradient, now, pool, step, keys)
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


def learner_facts(config: TrainConfig, setup: Setup, training: dict[str, Any]) -> dict[str, Any]:
    """What an artifact says of its own making."""
    of_images = setup.source.source not in (OWN_TASKS, TABLE)
    table = next((facts["table"] for facts in setup.source.splits if "table" in facts), None)
    return {
        "tasks": dataclasses.asdict(config.tasks) if of_images else {"name": setup.source.tasks},
        **({} if table is None else {"table": table}),
        "data": {"name": setup.source.name, "sha256": setup.source.sha256},
        "split_sha256": setup.source.split_sha256,
        "algorithm": config.inner.algorithm,
        "learned_rates": setup.learned,
        "seed": config.seed,
        "outer": dataclasses.asdict(config.outer),
        (name := f"validation_{setup.objective.choose_by}"): training[name],
        "example_gradients": training["example_gradients"],
    }
