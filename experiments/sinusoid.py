"""Sine curves from ten points: the first experiment of MAML's paper, with fixed and with learned inner rates.

    python experiments/sinusoid.py [--seeds 0 1 2 3 4] [--outer-steps 10000]

Finn et al. 2017, section 5.1 and figure 3: amplitude 0.1..5, phase 0..pi, inputs -5..5, 10 support points, squared
error, a network 1-40-40-1 with ReLUs. The paper meta-trains MAML with one inner step at a fixed rate of 0.01 for 70,000
iterations of 25 tasks; here it is 10,000 for every method. All methods meet the same 600 meta-test tasks. Beside them:
an init pre-trained on all tasks with no inner loop, fine-tuned at the rate that did best on meta-validation tasks.
Expected: see results/sinusoid.json and docs/own_tasks.md; about 25 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metalr
from metalr.config import EvaluationConfig, InnerConfig, OuterConfig
from metalr.evaluation import protocol
from metalr.inner import objective_of
from metalr.runs.provenance import command, provenance

AT = (0, 1, 5, 10)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
METHODS = {
    "MAML, 1 step": {"algorithm": "maml", "steps": 1, "inner": InnerConfig(rate=0.01)},
    "MAML, 5 steps": {"algorithm": "maml", "steps": 5, "inner": InnerConfig(rate=0.01)},
    "learned rates, a layer": {"algorithm": "meta_sgd_layer", "steps": 5, "inner": InnerConfig(rate=0.01)},
    "learned rates, a tensor and step": {"algorithm": "lslr", "steps": 5, "inner": InnerConfig(rate=0.01)},
    "pre-trained, one tuned rate": {"algorithm": "joint", "steps": 5, "inner": InnerConfig(rate=0.01)},
}


def network() -> metalr.models.Model:
    """1-40-40-1 with ReLUs, as two plain functions; the init is that of MAML's published code."""
    sizes, names = (1, 40, 40, 1), ("dense_0", "dense_1", "head")

    def init(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, len(names))
        return {
            name: {"kernel": 0.01 * jax.random.truncated_normal(k, -2, 2, (a, b)), "bias": jnp.zeros(b)}
            for name, k, a, b in zip(names, keys, sizes[:-1], sizes[1:], strict=True)
        }

    def apply(params: dict[str, Any], x: jax.Array) -> jax.Array:
        for name in names[:-1]:
            x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
        return x @ params["head"]["kernel"] + params["head"]["bias"][None]

    return metalr.models.from_function(init, apply)


def curve(learned: metalr.Learner, tasks: metalr.Tasks, tuned: bool) -> tuple[np.ndarray, dict[str, Any]]:
    """[600 tasks, points of AT] squared errors on the meta-test tasks, and what was tuned."""
    error = objective_of("squared_error")
    keys = protocol.episode_keys(0, 600)
    pool, sample = tasks.sampler("test")
    if not tuned:
        run = protocol.make_evaluator(learned.model, learned.spec, sample, max(AT), at=AT, objective=error)
        return run(pool, learned.init, learned.rates, keys).tasks, {}
    val_pool, val_sample = tasks.sampler("validation")
    on_val = protocol.make_baseline(learned.model, val_sample, optax.sgd, AT, objective=error)
    val_keys = protocol.episode_keys(0, 200)
    scores = [on_val(val_pool, learned.init, np.float32(rate), val_keys).mean[-1] for rate in RATES]
    best = RATES[int(np.nanargmin(scores))]
    assert best not in (RATES[0], RATES[-1]), f"the best rate, {best}, is on an edge: widen RATES"
    run = protocol.make_baseline(learned.model, sample, optax.sgd, AT, objective=error)
    return run(pool, learned.init, np.float32(best), keys).tasks, {"rate": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--outer-steps", type=int, default=10_000)
    options = parser.parse_args()
    tasks, model = metalr.tasks.sinusoid(shot=10), network()
    rows = []
    for method, settings in METHODS.items():
        per_seed, chosen = [], []
        for seed in options.seeds:
            learned = metalr.meta_train(
                tasks, model, objective="squared_error", outer_steps=options.outer_steps, meta_batch=25, seed=seed,
                outer=OuterConfig(validate_every=1000, checkpoint_every=1000), evaluation=EvaluationConfig(steps=10),
                out=Path("runs/sinusoid") / method.replace(" ", "_").replace(",", "") / f"seed{seed}", resume=True,
                **settings,
            )  # fmt: skip
            errors, facts = curve(learned, tasks, method.startswith("pre-trained"))
            per_seed.append(errors)
            chosen.append(facts)
        for point, steps in enumerate(AT):
            means = [float(errors[:, point].mean()) for errors in per_seed]
            over_tasks = [float(protocol.half_width(errors[:, point])) for errors in per_seed]
            both = protocol.over_seeds_and_tasks(means, over_tasks) if len(means) > 1 else over_tasks[0]
            rows.append(
                {
                    "method": method, "steps": steps, "mse": round(float(np.mean(means)), 5), "ci95": round(both, 5),
                    "ci95_over_tasks": round(float(np.mean(over_tasks)), 5),
                    "mse_of_seeds": [round(m, 5) for m in means], "chosen": chosen,
                }
            )  # fmt: skip
            print(f"{method:36} {steps:3} steps  {rows[-1]['mse']:8.4f} ± {both:.4f}", flush=True)
        facts = {"name": "sinusoid", "seeds": options.seeds, "outer_steps": options.outer_steps, "episodes": 600}
        head = {"command": command(), "provenance": provenance(), "split_sha256": tasks.sha256}
        whole = (options.seeds, options.outer_steps) == ([0, 1, 2, 3, 4], 10_000)
        folder = Path(__file__).parent / "results" if whole else Path("runs/sinusoid")
        (folder / "sinusoid.json").write_text(json.dumps(facts | head | {"lines": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
