"""MAML++'s stabilisers one at a time: what does each add to rates of their own for every tensor and step?

    python experiments/stabilisers.py

Family `permuted`, 10-way 10-shot of the bundled MNIST subset, the reference MLP without dropout, 5 inner steps, 500
outer steps of 8 tasks, 3 seeds. "plain" has a constant outer rate and second order throughout.
Expected: see results/stabilisers.json and docs/choosing.md; about 5 minutes on 2 CPU cores.
"""

from metalr.cli.documents import study
from metalr.config import InnerConfig, OuterConfig, TaskConfig, TrainConfig

OUTER = OuterConfig(steps=500, meta_batch=8, validate_every=125)
SWITCHES = {
    "plain": {"schedule": "constant"},
    "multi-step loss": {"schedule": "constant", "multi_step": 0.3},
    "derivative-order annealing": {"schedule": "constant", "first_order_share": 0.3},
    "cosine": {},
    "all three": {"multi_step": 0.3, "first_order_share": 0.3},
}
VARIANTS = {
    name: TrainConfig(
        tasks=TaskConfig(family="permuted", way=10, shot=10),
        inner=InnerConfig(algorithm="lslr"),
        outer=OuterConfig(**{**OUTER.__dict__, **switch}),
    )
    for name, switch in SWITCHES.items()
}

if __name__ == "__main__":
    study(VARIANTS, "stabilisers")
