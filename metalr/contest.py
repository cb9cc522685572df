"""`metalr compare`: finished runs beside their rivals, in a folder that can be stopped and gone on with.

The folder holds config.json, searches.jsonl (a line a finished search of a task), results.json, and a lock while it
goes on. results.json has a row for every method and cost, and what follows from them: what it costs to catch up, and
after how many tasks meta-training has paid.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metalr import artifact, data, evaluate, folders, preemption, rivals, searchers, tasks
from metalr.config import CompareConfig, TrainConfig, differences, from_json, read_config
from metalr.errors import ConfigError, StoppedError, one_line
from metalr.progress import ConsoleReporter, Reporter
from metalr.provenance import command, provenance
from metalr.rivals import Field, Key, Scores

FILES = {"config.json", "searches.jsonl", "results.json", folders.LOCK}


def run(
    runs: Sequence[Path],
    config: CompareConfig,
    *,
    pretrained: Path | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Compare finished runs of one setting, which differ in their seed only, with everything else.

    Args:
      runs: run folders; accuracies are averaged over them.
      pretrained: the run folder of a jointly pre-trained init of the same network (--inner.algorithm joint).
      resume: go on in config.out with what an earlier call left there.

    Raises:
      MetalrError: runs that do not fit together, a setting that cannot work, a signal, or the disk refuses.
    """
    reporter = reporter or ConsoleReporter()
    if not resume:
        folders.check_free(config.out, FILES, overwrite=config.overwrite)
    learners, trained = load_runs(runs)
    joint = load_runs([pretrained])[0] if pretrained else []
    if joint and jax.tree.map(np.shape, joint[0].init) != jax.tree.map(np.shape, learners[0].init):
        raise ConfigError(f"pretrained: {pretrained}: expected the same network as in {runs[0]}, found another")
    field, facts = make_field(trained, config, learners[0])
    space = searchers.Space(**dataclasses.asdict(config.space))
    unknown = set(config.searchers) - {*searchers.SEARCHERS, "tpe+"}
    if unknown:
        raise ConfigError(f"searchers: expected some of {[*searchers.SEARCHERS, 'tpe+']}, got {sorted(unknown)}")
    if set(config.searchers) - {"grid"} and config.searched:
        searchers.import_optuna()
    setting = {"runs": [str(path) for path in runs], "pretrained": str(pretrained), **config.to_json()}
    folder = folders.claim(config.out, "compare")
    with folders.locked(folder), preemption.watch() as asked:
        if resume:
            _same_setting(folder, setting)
            folders.sweep(folder)
        else:
            folders.clear(folder, FILES)
            folders.write_json(folder / "config.json", setting)
        began = time.perf_counter()
        inits = {"random": None} | ({"pre-trained": joint[0].init} if joint else {})
        rows = _single(learners, joint, field, reporter)
        if config.searched:
            rows += _searches(learners, field, space, config, inits, folder, asked, reporter)
        results = {
            "command": command(),
            "config": setting,
            "provenance": provenance(),
            "seeds": [learner.facts.get("seed") for learner in learners],
            **facts,
            "rows": [_row(row, rows[: len(field.lengths)]) for row in rows],
            "conclusions": conclusions(rows, len(field.lengths), trained),
            "seconds": round(time.perf_counter() - began, 1),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        folders.write_json(folder / "results.json", results)
    return results | {"folder": str(folder)}


def load_runs(runs: Sequence[Path]) -> tuple[list[artifact.Learner], list[dict[str, Any]]]:
    """The learners of finished runs and their results. Raises ConfigError unless they differ in their seed only."""
    if not runs:
        raise ConfigError("runs: expected at least one run folder, got none")
    configs = [read_config(path) for path in runs]
    for path, config in zip(runs, configs, strict=True):
        changed = set(differences(configs[0], config)) - {"seed", "out", "overwrite"}
        if changed:
            raise ConfigError(f"runs: expected runs that differ in their seed only, {path} also in {sorted(changed)}")
    results = []
    for path in runs:
        try:
            results.append(json.loads((path / "results.json").read_text()))
        except (OSError, ValueError) as error:
            raise ConfigError(f"runs: {path}: expected a finished run: {one_line(error)}") from error
    return [artifact.load(path / "artifact") for path in runs], results


def make_field(
    trained: list[dict[str, Any]], config: CompareConfig, learner: artifact.Learner
) -> tuple[Field, dict[str, Any]]:
    """The held-out tasks, and what a result says of them."""
    first: TrainConfig = from_json(trained[0]["config"])
    shape = {name: getattr(config, name) or getattr(first.tasks, name) for name in ("shot", "query")}
    family, way = config.family or first.tasks.family, first.tasks.way
    dataset = data.load(config.data or first.data)
    if (*dataset.shape,) != (*learner.model.input_shape,):
        raise ConfigError(f"data: expected images of shape {learner.model.input_shape}, got {dataset.shape}")
    splits = tasks.make_splits(dataset, family)
    samplers = {part.part: tasks.make_sampler(part, way, shape["shot"], shape["query"]) for part in splits}
    if config.tasks < 2 or not 0 <= config.searched <= config.tasks or config.tuning_tasks < 2:
        raise ConfigError(
            f"tasks, searched, tuning_tasks: expected at least 2, 0..tasks and at least 2, got {config.tasks}, "
            f"{config.searched}, {config.tuning_tasks}"
        )
    support = way * shape["shot"]
    size = min(config.batch_size, support)
    lengths = tuple(sorted({max(1, round(length * (support // size))) for length in config.lengths}))
    field = Field(
        samplers["test"],
        samplers["val"],
        evaluate.episode_keys(config.seed, config.tasks),
        evaluate.episode_keys(config.seed, config.tuning_tasks),
        support,
        lengths,
        size,
    )
    return field, {
        "family": family,
        "regime": "few-shot" if size == support else "full",
        "data": str(dataset),
        "split_sha256": splits.sha256,
        "trained_on": {"data": first.data, "family": first.tasks.family},
        "tasks": config.tasks,
        "searched_tasks": config.searched,
        "support": support,
        "query": way * shape["query"],
    }


def _single(
    learners: list[artifact.Learner], joint: list[artifact.Learner], field: Field, reporter: Reporter
) -> list[Scores]:
    """All methods that take one run a task; learned init and rates first."""
    model = learners[0].model
    random_init = learners[0].facts.get("outer", {}).get("learns") == "rates"
    rows = rivals.learned(learners, field, random_init=random_init)
    reporter.line(f"{rows[0].method}: {100 * rows[-1].accuracy.mean():.2f} % after {rows[-1].steps} steps")
    if not random_init:
        one = learners[:1]  # parts of the learned method: the first seed says enough
        rows += rivals.learned(one, field, random_init=True)
        rows += rivals.unsearched("learned", model, [each.init for each in one], field)
        rows += rivals.tuned("learned", model, [each.init for each in one], field)
    rows += rivals.unsearched("random", model, [None], field)
    if joint:
        rows += rivals.unsearched("pre-trained", model, [each.init for each in joint], field)
    for row in rows[len(field.lengths) - 1 :: len(field.lengths)]:
        reporter.line(f"{row.method}: {100 * row.accuracy.mean():.2f} % after {row.steps} steps")
    return rows


def _searches(
    learners: list[artifact.Learner],
    field: Field,
    space: searchers.Space,
    config: CompareConfig,
    inits: dict[str, Any],
    folder: Path,
    asked: Any,
    reporter: Reporter,
) -> list[Scores]:
    """What every task's own searches find at every budget."""
    file = folder / "searches.jsonl"
    wanted: dict[str, Sequence[str]] = {"random": [*config.searchers]}
    if "pre-trained" in inits and "grid" in config.searchers:
        wanted["pre-trained"] = ["grid"]
    warm = rivals.as_trial(learners[0], space)
    if warm is None:
        wanted = {origin: [name for name in names if name != "tpe+"] for origin, names in wanted.items()}
    known = {}
    for row in folders.read_rows(file):
        known[(row["init"], row["searcher"], row["task"])] = [searchers.Trial.from_json(t) for t in row["trials"]]
    few = field._replace(keys=field.keys[: config.searched])
    total = config.searched * sum(map(len, wanted.values()))
    with reporter.bar("searches", total, len(known)) as advance:

        def keep(key: Key, trials: list[searchers.Trial]) -> None:
            row = {"init": key[0], "searcher": key[1], "task": key[2], "trials": [t.to_json() for t in trials]}
            folders.append_rows(file, [row])
            advance(1, f"task {key[2]}, {key[1]} from the {key[0]} init")
            if asked():
                raise StoppedError(f"stopped, and saved; go on with the same command and --resume, in {folder}")

        found = rivals.searched(
            learners[0].model, few, space, wanted, inits,
            first={"random": [warm] if warm else []}, budget=max(config.budgets), known=known, keep=keep,
        )  # fmt: skip
    rows = []
    for origin, names in wanted.items():
        for name in names:
            searches = [found[(origin, name, task)] for task in range(config.searched)]
            title = f"{origin} init + " + {"tpe+": "tpe, learned rates first"}.get(name, name)
            if name == "grid":
                rows.append(rivals.best_of(f"{title}, {len(searches[0])} cells", searches))
                rows.append(rivals.best_of(f"{title}, best cell on the test part", searches, on_test=True))
                continue
            cell = rivals.mean_cost(space.fitting(_train_part(searches)), _train_part(searches))
            rows += [rivals.best_of(f"{title}, {budget:g} runs", searches, budget * cell) for budget in config.budgets]
    return rows


def _train_part(searches: list[list[searchers.Trial]]) -> int:
    """Images that a search trained on, from what a trial cost."""
    trial = searches[0][0]
    return trial.example_gradients // max(trial.curve)


def _row(row: Scores, reference: list[Scores]) -> dict[str, Any]:
    """A row as JSON: accuracy, and the learned method's difference, at its best length and at an equal cost."""
    count = len(row.accuracy)
    mean, ci95 = evaluate.paired(row.accuracy, np.zeros(count))
    facts: dict[str, Any] = {
        "method": row.method,
        "steps": row.steps,
        "tasks": count,
        "accuracy": round(mean, 6),
        "ci95": round(ci95, 6),
        "seeds": [round(value, 6) for value in row.seeds],
        "example_gradients": round(row.example_gradients),
        "seconds": round(row.seconds, 4),
        "compile_seconds": round(row.compile_seconds, 2),
        "chosen": row.chosen,
    }
    affordable = [one for one in reference if one.example_gradients <= row.example_gradients * 1.001]
    for name, against in (("at_equal_cost", affordable), ("at_the_end", reference)):
        if against:
            difference = evaluate.paired(against[-1].accuracy[:count], row.accuracy)
            facts[f"learned_minus_this_{name}"] = [round(value, 6) for value in difference]
    return facts


def conclusions(rows: list[Scores], lengths: int, trained: list[dict[str, Any]]) -> dict[str, Any]:
    """What follows: the cost at which learned runs reach each rival's accuracy, and when meta-training has paid."""
    learned = rows[:lengths]
    cost = [results["training"]["example_gradients"] for results in trained]
    reached = []
    for row in rows[lengths:]:
        first = next((o for o in learned if o.accuracy[: len(row.accuracy)].mean() >= row.accuracy.mean()), None)
        saved = None if first is None else row.example_gradients - first.example_gradients
        reached.append(
            {
                "method": row.method,
                "steps": row.steps,
                "accuracy": round(float(row.accuracy.mean()), 6),
                "example_gradients": round(row.example_gradients),
                "learned_reaches_it_with": None if first is None else round(first.example_gradients),
                "share_of_its_cost": None
                if first is None
                else round(first.example_gradients / row.example_gradients, 5),
                "break_even_tasks": None if not saved or saved <= 0 else int(np.ceil(np.mean(cost) / saved)),
            }
        )
    return {"meta_training_example_gradients": cost, "rivals": reached}


def _same_setting(folder: Path, setting: dict[str, Any]) -> None:
    try:
        stored = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"resume: {folder}: expected a comparison, found none: {one_line(error)}") from error
    changed = {name for name in setting if name not in ("out", "overwrite") and stored.get(name) != setting[name]}
    if changed:
        raise ConfigError(f"resume: {folder}: expected the same settings, got other {sorted(changed)}")
    if (folder / "results.json").exists():
        raise ConfigError(f"resume: {folder}: this comparison is finished (it has results.json)")
