"""The same run for several seeds of meta-training: what an experiment document reports."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from metalr import artifact
from metalr.config import TrainConfig
from metalr.errors import ConfigError, one_line
from metalr.runs import check_folder, run, write_json
from metalr.setup import set_up


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
