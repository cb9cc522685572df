"""From a config to a run folder: config.json, metrics.jsonl, results.json, artifact/.

Everything that can be refused is refused before the folder is made.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from metalr import artifact, data, evaluate, models, outer, search, tasks, train
from metalr import rates as rates_lib
from metalr.config import TrainConfig
from metalr.errors import ConfigError, MetalrError, one_line
from metalr.models import Model
from metalr.outer import Algorithm
from metalr.rates import RatesSpec
from metalr.tasks import Pool, Sampler, Splits
from metalr.types import Curve, Params, Rates

CHUNK = 50  # outer steps a dispatch: progress moves, and the time outside the compiled program stays below 1 %


class Setup(NamedTuple):
    """All that a config stands for, checked, before anything is compiled or written."""

    dataset: data.Dataset
    splits: Splits
    model: Model
    spec: RatesSpec
    algorithm: Algorithm
    optimizer: optax.GradientTransformation
    samplers: dict[str, tuple[Pool, Sampler]]


def set_up(config: TrainConfig) -> Setup:
    """Check a config and make its parts.

    Raises:
      MetalrError: naming the setting, what was expected and what came.
    """
    row = outer.algorithm_row(config.inner.algorithm)
    given = {k: v for k, v in dataclasses.asdict(config.inner).items() if k in row._fields and v is not None}
    row = row._replace(**given)
    spec = RatesSpec(
        granularity=row.granularity,
        per_step=row.per_step,
        positive=not config.inner.signed,
        steps=config.inner.steps,
        initial=config.inner.rate,
        extend=config.inner.extend,
        adapts=row.adapts,
    )
    if config.seed < 0 or config.evaluation.seed < 0:
        raise ConfigError(f"seed: expected 0 or more, got {min(config.seed, config.evaluation.seed)}")
    if config.outer.validate_every < 1:
        raise ConfigError(f"outer.validate_every: expected at least 1, got {config.outer.validate_every}")
    if config.outer.meta_batch < 1:
        raise ConfigError(f"outer.meta_batch: expected at least 1, got {config.outer.meta_batch}")
    rates_lib.check_steps(spec, config.evaluation.steps)
    for episodes in (config.evaluation.episodes, config.evaluation.validation_episodes):
        evaluate.episode_keys(0, episodes)
    if config.grid.run:
        _grid(config)
    optimizer = train.make_optimizer(
        steps=config.outer.steps,
        init_rate=config.outer.init_rate,
        rates_rate=config.outer.rates_rate if row.learned and row.meta_gradient == "query" else None,
        clip=config.outer.clip,
        schedule=config.outer.schedule,
        base=optax_by_name(config.outer.optimizer),
    )
    dataset = data.load(config.data)
    splits = tasks.make_splits(dataset, config.tasks.family)
    model = models.build(config.model.name, config.tasks.way, dataset.shape, **config.model.settings())
    shape = (config.tasks.way, config.tasks.shot, config.tasks.query)
    samplers = {part.part: tasks.make_sampler(part, *shape) for part in splits}
    return Setup(dataset, splits, model, spec, row, optimizer, samplers)


def optax_by_name(name: str) -> Callable[[Any], optax.GradientTransformation]:
    """optax.NAME, if it is made from a learning rate alone. Raises ConfigError otherwise."""
    maker = getattr(optax, name, None)
    try:
        assert maker is not None
        maker(1e-3).init  # noqa: B018
    except Exception as error:
        raise ConfigError(f"outer.optimizer: expected an optax optimizer such as 'adam', got {name!r}") from error
    return maker


class Reporter(Protocol):
    """Where lines of progress go: a rich console, or plain lines."""

    def line(self, text: str) -> None:
        """Print a line."""
        ...

    def bar(self, text: str, total: int) -> Any:
        """A context manager that gives `advance(count, note)`."""
        ...


class ConsoleReporter:
    """Progress bar on a terminal, plain lines otherwise; `quiet` prints nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def bar(self, text: str, total: int) -> Iterator[Callable[[int, str], None]]:
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console) as progress:
                bar = progress.add_task(text, total=total, note="")
                yield lambda count, note: progress.update(bar, advance=count, note=note)
            return
        done, shown = 0, -1

        def advance(count: int, note: str) -> None:
            nonlocal done, shown
            done += count
            if (tenth := 10 * done // total) > shown:  # ten lines at most in a log
                shown = tenth
                self.line(f"{text} {done}/{total}  {note}")

        yield advance


def run(config: TrainConfig, *, name: str, reporter: Reporter | None = None) -> dict[str, Any]:
    """Meta-train, evaluate on held-out tasks, compare if asked to; leave a run folder; return its results.

    Args:
      name: names the default folder runs/NAME.

    Raises:
      MetalrError: a setting cannot work (nothing is written then), or training diverged.
    """
    reporter = reporter or ConsoleReporter()
    setup = set_up(config)
    folder = make_folder(config, name)
    began = time.perf_counter()
    reporter.line(describe(config, setup))
    (folder / "config.json").write_text(json.dumps(config.to_json(), indent=1))
    init, rates, training = meta_train(config, setup, folder, reporter)
    learner = artifact.Learner(setup.model, setup.spec, init, rates, learner_facts(config, setup, training))
    artifact.save(folder / "artifact", learner, overwrite=True)
    curve, seconds = held_out(
        learner, setup, config.evaluation.episodes, config.evaluation.steps, config.evaluation.seed
    )
    results = {
        "name": name,
        "command": command(),
        "config": config.to_json(),
        "provenance": provenance(),
        "data": {"name": setup.dataset.name, "source": setup.dataset.source, "sha256": setup.dataset.sha256},
        "split_sha256": setup.splits.sha256,
        "splits": [part.describe() for part in setup.splits],
        "transductive": setup.model.transductive,
        "training": training,
        "rates": rates_lib.summary(setup.spec, rates),
        "curve": curve_rows(curve),
        "evaluation_seconds": round(seconds, 3),
    }
    if config.grid.run:
        results["comparison"], results["grid"] = compare(config, setup, learner, curve, reporter)
    results["seconds"] = round(time.perf_counter() - began, 2)
    results["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    write_json(folder / "results.json", results)
    results["folder"] = str(folder)
    return results


def run_seeds(config: TrainConfig, name: str, seeds: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """The same run for several seeds of meta-training, on the same held-out tasks.

    Writes folder/results/NAME.json (rows averaged over seeds, every seed's own results) and
    folder/artifacts/NAME (the first seed's).

    Raises:
      MetalrError: as `run`; no seeds, or the same one twice.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds: expected at least one, all different, got {seeds}")
    per_seed = []
    for seed in seeds:
        out = (config.out or Path("runs") / name) / f"seed{seed}"
        results = run(dataclasses.replace(config, seed=seed, out=out), name=name)
        per_seed.append(results)
    summary = {
        "name": name,
        "command": per_seed[0]["command"],
        "seeds": list(seeds),
        "provenance": per_seed[0]["provenance"],
        "split_sha256": per_seed[0]["split_sha256"],
        "transductive": per_seed[0]["transductive"],
        "curve": over_seeds([r["curve"] for r in per_seed]),
        "comparison": over_seeds([r["comparison"] for r in per_seed]) if config.grid.run else [],
        "runs": [{k: v for k, v in r.items() if k not in ("folder", "splits", "provenance")} for r in per_seed],
    }
    for results in summary["runs"]:
        results.get("grid", {}).pop("cells", None)  # hundreds of rows a seed; they stay in the run folder
    (folder / "results").mkdir(parents=True, exist_ok=True)
    write_json(folder / "results" / f"{name}.json", summary)
    learner = artifact.load(Path(per_seed[0]["folder"]) / "artifact")
    artifact.save(folder / "artifacts" / name, learner, overwrite=True)
    return summary


def over_seeds(rows: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows averaged over seeds: accuracy, the mean of the CIs over tasks, and the spread (lowest, highest) of seeds."""
    merged = []
    for same in zip(*rows, strict=True):
        accuracies = [row["accuracy"] for row in same]
        means = {
            k: round(float(np.mean([row[k] for row in same])), 6) for k in same[0] if isinstance(same[0][k], float)
        }
        merged.append(same[0] | means | {"lowest_seed": min(accuracies), "highest_seed": max(accuracies)})
    return merged


def meta_train(
    config: TrainConfig, setup: Setup, folder: Path, reporter: Reporter
) -> tuple[Params, Rates, dict[str, Any]]:
    """Run the outer loop; keep the init and rates that did best on meta-validation tasks.

    Appends a line an outer step to folder/metrics.jsonl. Returns (init, actual rates, facts for results.json).
    """
    key = jax.random.key(config.seed)
    pool, sample = setup.samplers["train"]
    val_pool, val_sample = setup.samplers["val"]
    state = train.start(setup.model, setup.spec, setup.optimizer, jax.random.fold_in(key, 0))
    chunk = train.make_chunk(
        setup.model,
        setup.spec,
        setup.algorithm,
        setup.optimizer,
        sample,
        config.outer.meta_batch,
        remat=config.inner.remat,
    )
    validate = evaluate.make_evaluator(setup.model, setup.spec, val_sample, setup.spec.steps)
    val_keys = evaluate.episode_keys(config.evaluation.seed, config.evaluation.validation_episodes)
    steps, every = config.outer.steps, min(CHUNK, config.outer.validate_every)
    best: tuple[float, Params, Rates, int] | None = None
    seconds: list[tuple[int, float]] = []
    began = time.perf_counter()
    with (folder / "metrics.jsonl").open("a") as log, reporter.bar("meta-training", steps) as advance:
        done = validated = 0
        note = ""
        for part in train.run_chunks(chunk, state, pool, jax.random.fold_in(key, 1), steps, every):
            count = len(part.metrics["loss"])
            for i in range(count):
                line = {"step": done + i} | {name: round(float(v[i]), 6) for name, v in part.metrics.items()}
                log.write(json.dumps(line) + "\n")
            done += count
            seconds.append((count, part.seconds))
            if done // config.outer.validate_every > validated or done == steps:
                validated = done // config.outer.validate_every
                init, rates = train.learned(setup.spec, part.state.meta)
                score = float(validate(val_pool, init, rates, val_keys).mean[-1])
                facts = {"step": done, "validation_accuracy": round(score, 6)}
                facts["rates"] = rates_lib.summary(setup.spec, rates) if setup.spec.granularity != "parameter" else {}
                log.write(json.dumps(facts) + "\n")
                log.flush()
                if best is None or score > best[0]:
                    best = (score, init, rates, done)
                note = f"validation {score:.3f}"
            advance(
                count,
                f"loss {part.metrics['loss'].mean():.3f}  accuracy {part.metrics['accuracy'].mean():.3f}  {note}",
            )
    assert best is not None
    score, init, rates, step = best
    total = time.perf_counter() - began
    warm = [s / n for n, s in seconds[1:]] or [seconds[0][1] / seconds[0][0]]
    facts = {
        "outer_steps": steps,
        "best_step": step,
        "validation_accuracy": round(score, 6),
        "seconds": round(total, 2),
        "compile_seconds": round(max(0.0, seconds[0][1] - seconds[0][0] * float(np.median(warm))), 2),
        "tasks_per_second": round(config.outer.meta_batch / float(np.median(warm)), 1),
        "example_gradients": steps * config.outer.meta_batch * task_cost(config),
    }
    return init, rates, facts


def task_cost(config: TrainConfig) -> int:
    """Example-gradients of one task's adaptation and query gradient, second derivatives counted as one more each."""
    support, query = config.tasks.way * config.tasks.shot, config.tasks.way * config.tasks.query
    return 2 * config.inner.steps * support + query


def held_out(learner: artifact.Learner, setup: Setup, episodes: int, steps: int, seed: int) -> tuple[Curve, float]:
    """The adaptation curve of a learner on the fixed meta-test tasks, and the seconds it took with compilation."""
    began = time.perf_counter()
    pool, sample = setup.samplers["test"]
    evaluator = evaluate.make_evaluator(learner.model, learner.spec, sample, steps)
    curve = evaluator(pool, learner.init, learner.rates, evaluate.episode_keys(seed, episodes))
    return curve, time.perf_counter() - began


def curve_rows(curve: Curve) -> list[dict[str, float]]:
    """A curve as JSON rows: steps, accuracy, ci95."""
    return [
        {"steps": i, "accuracy": round(float(m), 6), "ci95": round(float(c), 6)}
        for i, (m, c) in enumerate(zip(curve.mean, curve.ci95, strict=True))
    ]


def _grid(config: TrainConfig) -> search.Grid:
    values = dataclasses.asdict(config.grid)
    values.pop("run")
    values["steps"] = tuple(sorted({*values["steps"], config.inner.steps}))
    return search.Grid(**values)


def compare(
    config: TrainConfig, setup: Setup, learner: artifact.Learner, curve: Curve, reporter: Reporter
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The learned init and rates beside ablations, no search, and the best cells of the small grid.

    Every row is of the same tasks; a grid's best cell is the one that did best on these very tasks, which flatters it.

    Returns:
      (rows, facts of the grid with all cells).
    """
    grid, steps = _grid(config), config.inner.steps
    support = config.tasks.way * config.tasks.shot
    pool, sample = setup.samplers["test"]
    keys = evaluate.episode_keys(config.evaluation.seed, config.evaluation.episodes)
    cells, costs = {}, {}
    for origin, init in (("random", None), ("learned", learner.init)):
        reporter.line(f"grid search from the {origin} init, {len(keys)} tasks")
        cells[origin], costs[origin] = search.run_grid(grid, setup.model, pool, sample, support, keys, init=init)
    reference = curve.tasks[:, min(steps, curve.tasks.shape[1] - 1)]
    rows: list[dict[str, Any]] = []

    def add(method: str, taken: int, task_accuracy: np.ndarray, cost: float, cell: search.Cell | None = None) -> None:
        mean, ci95 = evaluate.paired(task_accuracy, np.zeros_like(task_accuracy))
        difference, difference_ci95 = evaluate.paired(reference, task_accuracy)
        chosen = cell.row() if cell else {}
        rows.append(
            {
                "method": method,
                "steps": taken,
                "accuracy": round(mean, 6),
                "ci95": round(ci95, 6),
                "learned_minus_this": round(difference, 6),
                "difference_ci95": round(difference_ci95, 6),
                "example_gradients": cost,
                "cell": {k: chosen[k] for k in ("optimizer", "learning_rate", "batch_size") if chosen},
            }
        )

    add("learned init + learned rates", steps, reference, steps * support)
    if curve.tasks.shape[1] - 1 > steps:
        longest = curve.tasks.shape[1] - 1
        add("learned init + learned rates", longest, curve.tasks[:, longest], longest * support)
    random_rates = evaluate.make_baseline(setup.model, sample, lambda _: learner.as_optax(), [steps], random_init=True)
    add(
        "random init + learned rates",
        steps,
        random_rates(pool, learner.init, 0.0, keys).tasks[:, 0],
        steps * support,
    )
    for origin in ("random", "learned"):
        same = search.best(cells[origin], steps)
        cost = sum(cell.example_gradients for cell in cells[origin] if cell.steps == steps)
        add(f"{origin} init + grid, best cell at {steps} steps", steps, same.tasks, cost, same)
        best = search.best(cells[origin])
        naive = costs[origin]["naive_example_gradients"]
        add(f"{origin} init + grid, best cell of all", best.steps, best.tasks, naive, best)
    unsearched = [cell for cell in cells["random"] if (cell.optimizer, cell.learning_rate) == ("adam", 1e-3)]
    if unsearched:
        cell = max(unsearched, key=lambda cell: (cell.steps, cell.batch_size == min(32, support)))
        add("random init, no search (Adam 1e-3)", cell.steps, cell.tasks, cell.example_gradients, cell)
    all_cells = [cell.row() for origin in cells for cell in cells[origin]]
    return rows, {
        "cells": all_cells,
        "cost_per_task": costs,
        "chosen": "best cell on the meta-test tasks themselves",
    }


def describe(config: TrainConfig, setup: Setup) -> str:
    """The first lines of a run: data, device, task split, expected time."""
    devices = jax.local_devices()
    t = config.tasks
    seconds = expected_seconds(config, setup)
    return (
        f"data    {setup.dataset}\n"
        f"device  {len(devices)} x {devices[0].device_kind} ({jax.default_backend()})\n"
        f"tasks   {t.family} {t.way}-way {t.shot}-shot, {t.query} query images a class; split {setup.splits.sha256[:12]}\n"
        f"time    about {max(1, round(seconds / 60))} min expected, from this machine's speed"
    )


def expected_seconds(config: TrainConfig, setup: Setup) -> float:
    """A rough estimate for the whole run: arithmetic over this machine's measured rate of matrix products."""
    x = np.ones((1024, 1024), np.float32)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    began = time.perf_counter()
    product(x).block_until_ready()
    rate = 2 * 1024**3 / (time.perf_counter() - began) * jax.local_device_count()
    params = jax.eval_shape(setup.model.init, jax.random.key(0))
    uses = {"mlp": 1, "conv4": 40, "rnn": 28}[config.model.name]  # of each weight, an image
    per_example = 6 * uses * sum(leaf.size for leaf in jax.tree.leaves(params))
    examples = config.outer.steps * config.outer.meta_batch * task_cost(config)
    if config.grid.run:
        grid, support = _grid(config), config.tasks.way * config.tasks.shot
        batches = sum(min(size, support) for size in grid.batch_sizes)
        runs = 2 * len(grid.learning_rates) * len(grid.optimizers) * config.evaluation.episodes
        examples += runs * max(grid.steps) * batches
    return 20 + examples * per_example / (0.4 * rate)  # 20 s to compile; the share of the rate that is reached


def learner_facts(config: TrainConfig, setup: Setup, training: dict[str, Any]) -> dict[str, Any]:
    """What an artifact says of its own making."""
    return {
        "tasks": dataclasses.asdict(config.tasks),
        "data": {"name": setup.dataset.name, "sha256": setup.dataset.sha256},
        "split_sha256": setup.splits.sha256,
        "algorithm": config.inner.algorithm,
        "seed": config.seed,
        "outer": dataclasses.asdict(config.outer),
        "validation_accuracy": training["validation_accuracy"],
    }


def make_folder(config: TrainConfig, name: str) -> Path:
    """Make the run folder. Raises ConfigError if it exists and config.overwrite is off."""
    folder = config.out
    if folder is None:
        folder, count = Path("runs") / name, 2
        while folder.exists() and not config.overwrite:
            folder, count = Path("runs") / f"{name}-{count}", count + 1
    elif folder.exists() and not folder.is_dir():
        raise ConfigError(f"out: {folder}: expected a folder, found a file")
    elif folder.exists() and any(folder.iterdir()) and not config.overwrite:
        raise ConfigError(f"out: {folder}: exists and is not empty; choose another, or pass --overwrite")
    try:
        if config.overwrite and folder.exists():
            for old in ("config.json", "metrics.jsonl", "results.json"):
                (folder / old).unlink(missing_ok=True)
            shutil.rmtree(folder / "artifact", ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: {folder}: cannot be written: {one_line(error)}") from error
    return folder


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all. Raises MetalrError if the disk refuses."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(value, indent=1) + "\n")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise MetalrError(f"{path}: cannot be written: {one_line(error)}") from error


def command() -> str:
    """The command line of this process, as a person would type it again."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def provenance() -> dict[str, Any]:
    """Commit (of the source checkout, if this is one), versions and machine."""

    def git(*args: str) -> str:
        call = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return call.stdout.strip() if call.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "metalr", "..") else "")
    except OSError:
        commit = ""
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.machine(),
    )
    devices = jax.local_devices()
    return {
        "commit": commit or "not a checkout",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "optax": optax.__version__},
        "machine": f"{model}, {len(devices)} x {devices[0].device_kind}, {platform.system()}",
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
