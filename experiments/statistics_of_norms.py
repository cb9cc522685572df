"""Which statistics should a conv net normalise queries by: of all queries together, of the support set, of each image?

    python experiments/statistics_of_norms.py [--seeds 0 1 2]

Statistics of all queries together ("batch") are what MAML's published code uses. They are transductive: a prediction
depends on the other images that are given with it. Here each network is asked twice: with all queries of a task
together, and with one query at a time, as a program in use would ask. Family `digits` (3-way 5-shot, 15 queries a
class) of the bundled MNIST subset, conv4 with 16 channels, 5 inner steps, 300 outer steps of 8 tasks, 200 meta-test
tasks.
Expected: see results/statistics_of_norms.json and docs/choosing.md; 3 seeds, about 10 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metalr
from metalr import inner, models, runs
from metalr.config import EvaluationConfig, ModelConfig, OuterConfig, TaskConfig, TrainConfig
from metalr.evaluation import protocol
from metalr.inner import descent
from metalr.runs.provenance import command, provenance
from metalr.runs.setup import set_up

NORMS = ("batch", "support", "instance")
EPISODES = 200


def accuracies(learned: metalr.Learner, sampler: Any) -> np.ndarray:
    """[tasks, 2] accuracy of each meta-test task after the trained steps: queries together, and one at a time."""
    pool, sample = sampler
    model, spec = learned.model, learned.spec
    apply = model.cpu_apply or model.apply

    def one(key: jax.Array) -> jax.Array:
        episode = sample(pool, key)
        tx = descent.optimizer(spec, learned.rates)
        fast, _ = inner.adapt(apply, learned.init, episode.support_x, episode.support_y, tx, spec.steps)
        together = models.predict(apply, fast, episode.support_x, episode.query_x)
        alone = jax.lax.map(lambda x: models.predict(apply, fast, episode.support_x, x[None])[0], episode.query_x)
        return jnp.stack([inner.accuracy(logits, episode.query_y) for logits in (together, alone)])

    return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys))(protocol.episode_keys(0, EPISODES)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for norm in NORMS:
        found = []
        for seed in options.seeds:
            out = Path("runs/statistics_of_norms") / norm / f"seed{seed}"
            config = TrainConfig(
                tasks=TaskConfig(family="digits", way=3, shot=5),
                model=ModelConfig(name="conv4", channels=16, norm=norm),  # type: ignore[arg-type]
                outer=OuterConfig(steps=300, meta_batch=8, validate_every=100),
                evaluation=EvaluationConfig(episodes=EPISODES, validation_episodes=100),
                seed=seed, out=out,
            )  # fmt: skip
            if not (out / "results.json").is_file():
                runs.resume(out, config) if (out / "config.json").is_file() else runs.run(config, name="norms")
            found.append(accuracies(metalr.load(out), set_up(config).parts.test))
        for at, asked in enumerate(("together", "one at a time")):
            means = [float(values[:, at].mean()) for values in found]
            over_tasks = [float(protocol.half_width(values[:, at])) for values in found]
            both = protocol.over_seeds_and_tasks(means, over_tasks) if len(means) > 1 else over_tasks[0]
            rows.append(
                {
                    "norm": norm, "queries": asked, "accuracy": round(float(np.mean(means)), 5), "ci95": round(both, 5),
                    "ci95_over_tasks": round(float(np.mean(over_tasks)), 5),
                    "accuracy_of_seeds": [round(value, 5) for value in means],
                }
            )  # fmt: skip
            print(f"{norm:10} {asked:14} {100 * rows[-1]['accuracy']:.1f} ± {100 * both:.1f} %", flush=True)
    facts = {"name": "statistics_of_norms", "seeds": options.seeds, "episodes": EPISODES}
    head = {"command": command(), "provenance": provenance()}
    folder = Path(__file__).parent / "results" if options.seeds == [0, 1, 2] else Path("runs/statistics_of_norms")
    (folder / "statistics_of_norms.json").write_text(json.dumps(facts | head | {"lines": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
