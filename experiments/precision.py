"""Does it cost accuracy if the network computes in bfloat16?

    python experiments/precision.py

`--model.dtype bfloat16`: matrix products and activations in bfloat16, as accelerators are fast at; params, rates, norms
and the loss stay float32. An MLP on family `rotated` (10-way 5-shot) and a conv net of 16 channels on `digits` (3-way
5-shot), of the bundled MNIST subset, 5 inner steps, 300 outer steps of 8 tasks, 5 seeds, the same 600 meta-test tasks
for both.
Expected: see results/precision.json and docs/choosing.md; about 35 minutes on one CPU core, where bfloat16 is slow.
"""

from metalr.cli.documents import study
from metalr.config import ModelConfig, OuterConfig, TaskConfig, TrainConfig

NETWORKS = {
    "mlp": (TaskConfig(family="rotated", way=10, shot=5), ModelConfig()),
    "conv4": (TaskConfig(family="digits", way=3, shot=5), ModelConfig(name="conv4", channels=16)),
}
VARIANTS = {
    f"{name} {dtype}": TrainConfig(
        tasks=tasks,
        model=ModelConfig(model.name, channels=model.channels, dtype=dtype),
        outer=OuterConfig(steps=300, meta_batch=8, validate_every=100),
    )
    for name, (tasks, model) in NETWORKS.items()
    for dtype in ("float32", "bfloat16")
}

if __name__ == "__main__":
    study(VARIANTS, "precision", seeds=(0, 1, 2, 3, 4))
