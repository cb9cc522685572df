"""The same run for several seeds of meta-training, and for several variants: what experiment documents report."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metalr.config import GridConfig, TrainConfig
from metalr.errors import ConfigError, one_line
from metalr.evaluation import protocol, small_grid
from metalr.inner import hyperparameters
from metalr.learner import artifact
from metalr.runs import evaluating
from metalr.runs.setup import set_up
from metalr.runs.training import FILES, resume, run
from metalr.storage import folders


def run_seeds(config: TrainConfig, name: str, seeds: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """The same run for several seeds of meta-training, on the same held-out tasks.

    Writes folder/results/NAME.json (rows averaged over seeds, every seed's own results) and
    folder/artifacts/NAME (the first seed's).

    Raises:
      MetalrError: as `run`; no seeds, or the same one twice.
    """
    _check_seeds(seeds)
    parent = config.out or Path("runs") / name
    configs = [dataclasses.replace(config, seed=seed, out=parent / f"seed{seed}") for seed in seeds]
    for each in configs:
        set_up(each)
        folders.check_free(each.out, FILES, overwrite=each.overwrite)
    _make(folder / "results")
    per_seed = [run(each, name=name) for each in configs]
    metric = per_seed[0]["metric"]["name"]
    summary = _head(name, seeds, per_seed[0]) | {
        "transductive": per_seed[0]["transductive"],
        "metric": per_seed[0]["metric"],
        "curve": over_seeds([r["curve"] for r in per_seed], metric),
        "comparison": over_seeds([r["comparison"] for r in per_seed], metric) if config.grid.run else [],
        "runs": [{k: v for k, v in r.items() if k not in ("folder", "splits", "provenance")} for r in per_seed],
    }
    for results in summary["runs"]:
        results.get("grid", {}).pop("cells", None)  # hundreds of rows a seed; they stay in the run folder
    folders.write_json(folder / "results" / f"{name}.json", summary)
    learner = artifact.load(Path(per_seed[0]["folder"]) / "artifact")
    artifact.save(folder / "artifacts" / name, learner, overwrite=True)
    return summary


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"folder: {folder}: cannot be written: {one_line(error)}") from error


def _check_seeds(seeds: tuple[int, ...]) -> None:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds: expected at least one, all different, got {seeds}")


def _head(name: str, seeds: tuple[int, ...], results: dict[str, Any]) -> dict[str, Any]:
    """How a results file over seeds begins: what was run, and where."""
    return {"name": name, "seeds": list(seeds)} | {k: results[k] for k in ("command", "provenance", "split_sha256")}


def run_study(
    variants: dict[str, TrainConfig],
    name: str,
    seeds: tuple[int, ...],
    folder: Path,
    *,
    horizons: Sequence[int] = (),
    grid: GridConfig = GridConfig(steps=(1, 5, 10, 50), batch_sizes=(8, 32, 128)),  # noqa: B008
) -> dict[str, Any]:
    """Variants of a run, each for several seeds, at the steps they were trained for; a row each.

    Runs that finished in runs/NAME are not run again, and one that was stopped goes on, so a study can be stopped too.
    Writes folder/results/NAME.json.

    Args:
      horizons, grid: also compare fine-tunes of these lengths with the best cell of a grid; see evaluating.horizons.

    Raises:
      MetalrError: as `run`; no seeds, or the same one twice. Checked for all variants before any is trained.
    """
    _check_seeds(seeds)
    if horizons:
        small_grid.check(dataclasses.replace(grid, steps=tuple(horizons)))
    for config in variants.values():
        for seed in seeds:
            setup = set_up(dataclasses.replace(config, seed=seed))
        if horizons:
            hyperparameters.check_steps(setup.spec, max(horizons))
    _make(folder / "results")
    rows: list[dict[str, Any]] = []
    random_grids: dict[Any, Any] = {}
    for variant, base in variants.items():
        found, lengths = [], []
        for seed in seeds:
            out = Path("runs") / name / variant.replace(" ", "_").replace("/", "_") / f"seed{seed}"
            config = dataclasses.replace(base, seed=seed, out=out)
            results = _run_once(config, name)
            found.append(results)
            if horizons:
                setup = set_up(config)
                key = (
                    config.data, config.objective, config.model, config.tasks, config.table, config.evaluation,
                    config.inner.batch_size, str(setup.model.settings),
                )  # fmt: skip
                learner = artifact.load(out / "artifact")
                at, random_grids[key] = evaluating.horizons(
                    learner, setup, config, horizons, grid, random_grids.get(key)
                )
                lengths.append(at)
        at_trained = [next(p for p in r["curve"] if p["steps"] == base.inner.steps) for r in found]
        training = [r["training"] for r in found]
        metric = found[0]["metric"]["name"]
        rows.append(
            {
                "variant": variant,
                "family": base.tasks.family,
                **over_seeds([[point] for point in at_trained], metric)[0],
                f"{metric}_of_seeds": [point[metric] for point in at_trained],
                "example_gradients": training[0]["example_gradients"],
                "seconds": round(float(np.median([t["seconds"] for t in training])), 1),
                "rates": found[0]["rates"],
                "rates_health": found[0]["rates_health"],
                "horizons": over_seeds(lengths, metric) if horizons else [],
            }
        )
    summary = _head(name, seeds, found[0]) | {"rows": rows}
    folders.write_json(folder / "results" / f"{name}.json", summary)
    return summary


def _run_once(config: TrainConfig, name: str) -> dict[str, Any]:
    assert config.out is not None
    finished = config.out / "results.json"
    if not finished.is_file():
        return resume(config.out, config) if (config.out / "config.json").is_file() else run(config, name=name)
    results = json.loads(finished.read_text())
    if results["config"] != config.to_json():
        raise ConfigError(f"{config.out}: expected a run with this study's settings, found another; move it away")
    return results


def over_seeds(rows: list[list[dict[str, Any]]], metric: str = "accuracy") -> list[dict[str, Any]]:
    """Rows averaged over seeds, with the lowest and highest seed; what seeds chose differently is listed by seed.

    Intervals of several seeds are over meta-training seeds and tasks together (protocol.over_seeds_and_tasks); those
    over tasks alone stay beside them.
    """
    merged = []
    for same in zip(*rows, strict=True):
        scores = [math.nan if row[metric] is None else row[metric] for row in same]  # None: it diverged
        row: dict[str, Any] = {}
        for name, first in same[0].items():
            values = [row[name] for row in same]
            if any(isinstance(value, float) for value in values):
                row[name] = protocol.rounded(np.mean([math.nan if value is None else value for value in values]))
            else:
                row[name] = first if all(value == first for value in values) else values
        for name, interval in ((metric, "ci95"), ("learned_minus_this", "difference_ci95")):
            if interval in row and len(same) > 1:
                row[f"{interval}_over_tasks"] = row[interval]
                numbers = [[math.nan if r[key] is None else r[key] for r in same] for key in (name, interval)]
                row[interval] = protocol.rounded(protocol.over_seeds_and_tasks(*numbers))
        ends = {"lowest_seed": np.min(scores), "highest_seed": np.max(scores)}
        merged.append(row | {name: protocol.rounded(value) for name, value in ends.items()})
    return merged
