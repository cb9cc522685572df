"""Does it cost accuracy if a GPU takes matrix products with TF32? Emulated on a CPU.

    python experiments/tf32.py

NVIDIA GPUs take float32 products with TF32 by default in JAX: each factor keeps 10 of its 23 bits of mantissa, sums are
float32. Here all factors are rounded so, of products in the network and of those in its first and second derivatives.
(GPUs may cut bits off instead, and sum in another order; a GPU itself is not measured here.) The MLP and the tasks of
experiments/precision.py: `rotated`, 10-way 5-shot, of the bundled MNIST subset, 5 inner steps, 300 outer steps of 8
tasks, 5 seeds, the same 600 meta-test tasks for both.
Expected: see results/tf32.json and docs/choosing.md; about 15 minutes on one CPU core.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import metalr
from metalr import models
from metalr.config import OuterConfig
from metalr.evaluation import protocol
from metalr.runs.provenance import command, provenance

HERE = Path(__file__).parent
SEEDS = (0, 1, 2, 3, 4)
EPISODES = 600


def rounded(x: jax.Array) -> jax.Array:
    """The nearest number that TF32 holds; its derivative is that of the identity."""
    return x + jax.lax.stop_gradient(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10) - x)


@jax.custom_vjp
def rounding_errors(x: jax.Array) -> jax.Array:
    """The identity, whose incoming derivative is rounded before it enters other products."""
    return x


rounding_errors.defvjp(lambda x: (x, None), lambda _, error: (rounded(error),))


def tf32_dot_general(a: jax.Array, b: jax.Array, *args: Any, **options: Any) -> jax.Array:
    return rounding_errors(jax.lax.dot_general(rounded(a), rounded(b), *args, **options))


class Mlp(nn.Module):
    dot_general: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(128, dot_general=self.dot_general)(x.reshape(len(x), -1)))
        return nn.Dense(10, dot_general=self.dot_general, name="head")(x)


VARIANTS = {"mlp float32": jax.lax.dot_general, "mlp TF32, emulated": tf32_dot_general}


def main() -> None:
    tasks = metalr.Tasks.from_images("mnist12k", "rotated", 10, 5)
    rows: list[dict[str, Any]] = []
    first: np.ndarray | None = None
    for variant, dot_general in VARIANTS.items():
        model = models.from_linen(Mlp(dot_general), np.zeros((1, 28, 28, 1), np.float32))
        scores = []
        for seed in SEEDS:
            learned = metalr.meta_train(
                tasks, model, outer=OuterConfig(steps=300, meta_batch=8, validate_every=100), seed=seed
            )
            scores.append(np.asarray(learned.evaluate(tasks, EPISODES, 5).tasks)[:, -1])
            print(f"{variant}, seed {seed}: {100 * scores[-1].mean():.2f} %", flush=True)
        of_seeds = np.array(scores)
        mean, ci95, _ = protocol.interval(of_seeds)
        row: dict[str, Any] = {"variant": variant, "accuracy": protocol.rounded(mean), "ci95": protocol.rounded(ci95)}
        if first is None:
            first = of_seeds
        else:
            row["minus_float32"], row["difference_ci95"], _ = map(protocol.rounded, protocol.interval(of_seeds - first))
        rows.append(row)
    facts = {"name": "tf32", "seeds": list(SEEDS), "command": command(), "provenance": provenance(), "rows": rows}
    (HERE / "results" / "tf32.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
