"""Do rates for thousands of steps get better if evolution goes on with them at such lengths?

    python experiments/evolution.py

Rates alone, for new random inits: the settings of "permuted, full data" (benchmarks/grid_search.py), learned by
derivatives at 10 to 480 steps. Their schedule is stretched over longer fine-tunes. Then evolution (no derivative, two
pairs) goes on with them for 60 outer steps of 4 tasks, at 200 and at 1,090 steps, which are five epochs. Both are
measured on the same ten meta-validation tasks of 7,000 images, up to 20 epochs. Three seeds.
Expected: see results/evolution.json and docs/long.md; 35 minutes a seed on one CPU core, full MNIST. Runs that ended
are not run again, and one that was stopped goes on.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

import metalr
from metalr import runs
from metalr.cli.commands import start_jax
from metalr.config import EvaluationConfig, InnerConfig, ModelConfig, OuterConfig, TaskConfig, TrainConfig
from metalr.evaluation import protocol
from metalr.runs.provenance import command, provenance

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
LENGTHS = (11, 44, 218, 436, 1090, 4360)
JUDGED = 10  # meta-validation tasks
SHORT = TrainConfig(
    data="mnist",
    tasks=TaskConfig("permuted", 10, 500, query=40),
    model=ModelConfig(dropout=0.2),
    inner=InnerConfig(
        steps=30, batch_size=32, base="adam", rate=3e-3, knots=3, horizons=(10, 50, 200, 480), horizon_power=0.3
    ),
    outer=OuterConfig(steps=400, meta_batch=4, rates_rate=5e-2, learns="rates", validate_every=100),
    evaluation=EvaluationConfig(episodes=4, validation_episodes=8, steps=30),
)
LONG = dataclasses.replace(
    SHORT,
    tasks=TaskConfig("permuted", 10, 700, query=100),
    inner=dataclasses.replace(SHORT.inner, horizons=(200, 1090), derivative="evolution", pairs=2),
    outer=dataclasses.replace(SHORT.outer, steps=60, rates_rate=3e-2, validate_every=20),
    evaluation=dataclasses.replace(SHORT.evaluation, validation_episodes=4),
)


def learned_by(config: TrainConfig) -> metalr.Learner:
    assert config.out is not None
    if not (config.out / "results.json").is_file():
        runs.resume(config.out, config) if (config.out / "config.json").is_file() else runs.run(
            config, name="evolution"
        )
    return metalr.load(config.out)


def judged(learned: metalr.Learner) -> np.ndarray:
    """Accuracy of a fine-tune of each length, from random inits: [tasks, lengths]."""
    pool, sample = metalr.Tasks.from_images("mnist", "permuted", 10, 700, 190).sampler("validation")
    evaluate = protocol.make_evaluator(
        learned.model, learned.spec, sample, LENGTHS[-1], random_init=True, at=LENGTHS, separate=True
    )
    return np.asarray(evaluate(pool, learned.init, learned.rates, protocol.episode_keys(5, JUDGED)).tasks)


def main() -> None:
    start_jax()
    scores: dict[str, list[np.ndarray]] = {"derivatives": [], "then evolution": []}
    for seed in SEEDS:
        parent = Path("runs") / "evolution" / f"seed{seed}"
        short = dataclasses.replace(SHORT, seed=seed, out=parent / "derivatives")
        scores["derivatives"].append(judged(learned_by(short)))
        long = dataclasses.replace(LONG, seed=seed, init=short.out, out=parent / "evolution")
        scores["then evolution"].append(judged(learned_by(long)))
    before, after = (np.array(each) for each in scores.values())
    lines: list[dict[str, Any]] = []
    for at, steps in enumerate(LENGTHS):
        line: dict[str, Any] = {"steps": steps}
        for name, values in (("derivatives", before), ("then_evolution", after), ("difference", after - before)):
            mean, ci95, _ = protocol.interval(values[:, :, at])
            line |= {name: protocol.rounded(mean), f"{name}_ci95": protocol.rounded(ci95)}
        lines.append(line)
        print(line)
    facts = {"name": "evolution", "seeds": list(SEEDS), "tasks": JUDGED, "command": command()}
    (HERE / "results" / "evolution.json").write_text(
        json.dumps(facts | {"provenance": provenance(), "lines": lines}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
