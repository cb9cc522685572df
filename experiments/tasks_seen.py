"""What more meta-training buys: accuracy on new characters against tasks seen, for three sizes of network.

    python experiments/tasks_seen.py

Omniglot, 20-way 1-shot, as in omniglot.py (its setting cpu), with 16, 32 and 64 channels. Every budget of tasks is a
training of its own, with a learning rate that falls to zero at its end: what a run along the way would give is less.
1,000 meta-test tasks of held-out validation characters. The two longest rows of 64 channels are the published runs of
omniglot.py, one on a CPU and one on a GPU. Between two budgets of one size: the b of error = a / tasks^b. It falls with
the budget, so no line is drawn beyond what was measured.
Finished runs are kept in runs/tasks_seen. One seed. Writes results/tasks_seen.json and docs/figures/tasks_seen.svg.
Expected: see results/tasks_seen.json; about 40 minutes on one CPU core.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np

from metalr import runs
from metalr.config import ModelConfig
from metalr.report import figures
from metalr.report.figures import Series
from metalr.runs.provenance import command

HERE = Path(__file__).parent
FIGURE = HERE.parent / "docs" / "figures" / "tasks_seen.svg"
BUDGETS = {16: (2_000, 8_000, 32_000), 32: (2_000, 8_000, 16_000), 64: (2_000,)}  # tasks
PUBLISHED = ("omniglot_cpu", "omniglot_gpu")  # of 64 channels


def row_of(channels: int, found: dict[str, Any], provenance: dict[str, Any], of: str) -> dict[str, Any]:
    """One training. found: a run's results; of: the results file that it stands in, if it is a published one."""
    config, training = found["config"], found["training"]
    after = next(point for point in found["curve"] if point["steps"] == config["inner"]["steps"])
    return {
        "channels": channels,
        "tasks": training["outer_steps"] * config["outer"]["meta_batch"],
        "meta_batch": config["outer"]["meta_batch"],
        "accuracy": after["accuracy"],
        "ci95": after["ci95"],
        "tasks_per_second": training["tasks_per_second"],
        "seconds": round(training["seconds"], 1),
        "machine": provenance["machine"],
        "commit": provenance["commit"],
        "of": of,
    }


def exponents(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Between neighbouring rows of one size: the b of error = a / tasks^b, and what four times the tasks did to it."""
    found = []
    for less, more in itertools.pairwise(rows):
        b = np.log(error_of(less) / error_of(more)) / np.log(more["tasks"] / less["tasks"])
        facts = {"channels": less["channels"], "from_tasks": less["tasks"], "to_tasks": more["tasks"]}
        found.append(
            facts | {"exponent": round(float(b), 3), "error_of_four_times_the_tasks": round(4 ** -float(b), 2)}
        )
    return found


def error_of(row: dict[str, Any]) -> float:
    return 1 - row["accuracy"]


def drawing(rows: list[dict[str, Any]]) -> str:
    """Accuracy against tasks seen."""
    series = []
    for channels in BUDGETS:
        own = [row for row in rows if row["channels"] == channels]
        y, ci95 = [row["accuracy"] for row in own], [row["ci95"] for row in own]
        low, high = ([v + sign * c for v, c in zip(y, ci95, strict=True)] for sign in (-1, 1))
        series.append(Series(f"{channels} channels", [row["tasks"] for row in own], y, low, high))
    return figures.standalone(
        "What more meta-training buys", "Accuracy on new Omniglot characters against tasks seen in meta-training.",
        series, x_label="tasks seen in meta-training", y_label="accuracy on new characters", log_x=True, percent=True,
    )  # fmt: skip


def main() -> None:
    document = runpy.run_path(str(HERE / "omniglot.py"))["CONFIGS"]["cpu"]
    rows: list[dict[str, Any]] = []
    for channels, budgets in BUDGETS.items():
        for tasks in budgets:
            out = Path("runs") / "tasks_seen" / f"{channels}_channels_{tasks}_tasks"
            steps = tasks // document.outer.meta_batch
            outer = dataclasses.replace(document.outer, steps=steps, validate_every=max(steps // 4, 100))
            model = ModelConfig(name="conv4", channels=channels)
            config = dataclasses.replace(document, outer=outer, model=model, out=out)
            if not (out / "results.json").is_file():
                runs.resume(out, config) if (out / "config.json").is_file() else runs.run(config, name="tasks_seen")
            found = json.loads((out / "results.json").read_text())
            rows.append(row_of(channels, found, found["provenance"], ""))
    for name in PUBLISHED:
        results = json.loads((HERE / "results" / f"{name}.json").read_text())
        rows.append(row_of(64, results["runs"][0], results["provenance"], f"{name}.json"))
    rows.sort(key=lambda row: (row["channels"], row["tasks"]))
    slopes = [slope for c in BUDGETS for slope in exponents([row for row in rows if row["channels"] == c])]
    facts = {"name": "tasks_seen", "seed": 0, "command": command(), "lines": rows, "between": slopes}
    (HERE / "results" / "tasks_seen.json").write_text(json.dumps(facts, indent=1) + "\n")
    FIGURE.write_text(drawing(rows))
    for row in rows:
        print(
            f"{row['channels']:3} channels, {row['tasks']:9,} tasks: {100 * row['accuracy']:.1f} % {row['seconds']} s"
        )
    print(json.dumps(slopes, indent=1))


if __name__ == "__main__":
    main()
