"""What should share one learning rate, and should it change over steps? Every answer at equal meta-training cost.

    python experiments/granularity.py

Families `digits` (3-way 1-shot) and `permuted` (10-way 10-shot) of the bundled MNIST subset, the reference MLP without
dropout, 5 inner steps, 500 outer steps of 8 tasks, 5 seeds, the same 600 meta-test tasks for all.
Expected: see results/granularity.json and docs/choosing.md; about 35 minutes on 2 CPU cores.
"""

from metalr.cli.documents import study
from metalr.config import InnerConfig, OuterConfig, TaskConfig, TrainConfig

RULES = {
    "shared, fixed": InnerConfig(algorithm="maml"),
    "shared": InnerConfig(granularity="shared"),
    "layer": InnerConfig(),
    "tensor": InnerConfig(granularity="tensor"),
    "channel": InnerConfig(granularity="channel"),
    "parameter": InnerConfig(granularity="parameter"),
    "layer x step": InnerConfig(per_step=True),
    "layer, 3 knots": InnerConfig(knots=3),
    "predicted (alfa)": InnerConfig(algorithm="alfa"),
}
FAMILIES = {
    "digits": TaskConfig(family="digits", way=3, shot=1),
    "permuted": TaskConfig(family="permuted", way=10, shot=10),
}
VARIANTS = {
    f"{family} {rule}": TrainConfig(
        tasks=tasks, inner=inner, outer=OuterConfig(steps=500, meta_batch=8, validate_every=125)
    )
    for family, tasks in FAMILIES.items()
    for rule, inner in RULES.items()
}

if __name__ == "__main__":
    study(VARIANTS, "granularity", seeds=(0, 1, 2, 3, 4))
