"""From a config to a run folder: config.json, metrics.jsonl, results.json, artifact/.

Everything that can be refused is refused before the folder is made.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from metalr import artifact, compare, evaluate, train
from metalr import rates as rates_lib
from metalr.config import TrainConfig
from metalr.errors import ConfigError, MetalrError, one_line
from metalr.provenance import command, provenance
from metalr.setup import Setup, describe, set_up, task_cost
from metalr.types import Params, Rates

RUN_FILES = {"config.json", "metrics.jsonl", "results.json", "artifact"}
CHUNK = 50  # outer steps a dispatch: progress moves, and little time passes outside the compiled program


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
    init, rates, training = meta_train(config, setup, folder, reporter)
    learner = artifact.Learner(setup.model, setup.spec, init, rates, learner_facts(config, setup, training))
    artifact.save(folder / "artifact", learner, overwrite=True)
    curve, seconds = compare.held_out(
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
        "curve": compare.curve_rows(curve),
        "evaluation_seconds": round(seconds, 3),
    }
    if config.grid.run:
        results["comparison"], results["grid"] = compare.compare(config, setup, learner, curve, reporter.line)
    results["seconds"] = round(time.perf_counter() - began, 2)
    results["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
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
    parent = config.out or Path("runs") / name
    configs = [dataclasses.replace(config, seed=seed, out=parent / f"seed{seed}") for seed in seeds]
    for each in configs:
        set_up(each)
        check_folder(each)
    try:
        (folder / "results").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"folder: {folder}: cannot be written: {one_line(error)}") from error
    per_seed = [run(each, name=name) for each in configs]
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
    write_json(folder / "results" / f"{name}.json", summary)
    learner = artifact.load(Path(per_seed[0]["folder"]) / "artifact")
    artifact.save(folder / "artifacts" / name, learner, overwrite=True)
    return summary


def over_seeds(rows: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows averaged over seeds, with the lowest and highest seed; what seeds chose differently is listed by seed."""
    merged = []
    for same in zip(*rows, strict=True):
        accuracies = [row["accuracy"] for row in same]
        row: dict[str, Any] = {}
        for name, first in same[0].items():
            values = [row[name] for row in same]
            if isinstance(first, float):
                row[name] = round(float(np.mean(values)), 6)
            else:
                row[name] = first if all(value == first for value in values) else values
        merged.append(row | {"lowest_seed": min(accuracies), "highest_seed": max(accuracies)})
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
    began, validating = time.perf_counter(), 0.0
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
                since = time.perf_counter()
                init, rates = train.learned(setup.spec, part.state.meta)
                score = float(validate(val_pool, init, rates, val_keys).mean[-1])
                validating += time.perf_counter() - since
                facts = {"step": done, "validation_accuracy": round(score, 6)}
                log.write(json.dumps(facts | {"rates": rates_lib.summary(setup.spec, rates)}) + "\n")
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
        "seconds": round(total, 4),
        "step_seconds": round(sum(s for _, s in seconds), 4),
        "validation_seconds": round(validating, 4),
        "compile_seconds": round(max(0.0, seconds[0][1] - seconds[0][0] * float(np.median(warm))), 2),
        "tasks_per_second": round(config.outer.meta_batch / float(np.median(warm)), 1),
        "example_gradients": steps * config.outer.meta_batch * task_cost(config),
    }
    return init, rates, facts


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


def check_folder(config: TrainConfig) -> None:
    """Raises ConfigError if config.out cannot become the run folder: it is a file, or holds something already.

    With config.overwrite it may hold a run, and nothing but a run.
    """
    folder = config.out
    try:
        if folder is None or not folder.exists():
            return
        if not folder.is_dir():
            raise ConfigError(f"out: {folder}: expected a folder, found a file")
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ConfigError(f"out: {folder}: cannot be used: {one_line(error)}") from error
    if names and not config.overwrite:
        raise ConfigError(f"out: {folder}: exists and is not empty; choose another, or pass --overwrite")
    if names and not ("metrics.jsonl" in names and names <= RUN_FILES):
        raise ConfigError(f"out: {folder}: expected a run to overwrite, found other files: {sorted(names - RUN_FILES)}")


def make_folder(config: TrainConfig, name: str) -> Path:
    """Make the run folder, empty. Raises ConfigError as check_folder, or if it cannot be written."""
    check_folder(config)
    folder = config.out
    if folder is None:
        folder, count = Path("runs") / name, 2
        while folder.exists():
            folder, count = Path("runs") / f"{name}-{count}", count + 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in RUN_FILES - {"artifact"}:
            (folder / old).unlink(missing_ok=True)
        shutil.rmtree(folder / "artifact", ignore_errors=True)
        (folder / "config.json").write_text(json.dumps(config.to_json(), indent=1))
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
