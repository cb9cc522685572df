"""Characters never seen in meta-training: a small conv net, one inner step, a rate a tensor.

    python experiments/omniglot.py 5way_1shot | 5way_5shot | 20way_1shot [with _cpu behind]

Needs Omniglot's published train and validation characters, imported as `omniglot` (metalr data import FILE --name
omniglot; the parts' classes in it): 1,028 characters for meta-training, 86 of the others for choosing and 86 for the
1,000 meta-test tasks, each in four quarter turns. conv4 with 64 channels and batch-statistics norm (transductive).
Every meta-training episode goes through one random affine map, and each image through a weaker one of its own.
Expected: see results/omniglot_*.json and docs/choosing.md; one seed, two to three minutes on one NVIDIA H200. Settings
that end in _cpu are for one busy core: half an hour (5-way 5-shot) to an hour and a quarter (20-way 1-shot).
"""

import sys

from metalr.cli.documents import experiment
from metalr.config import EvaluationConfig, InnerConfig, ModelConfig, OuterConfig, TaskConfig, TrainConfig


def config(way: int, shot: int, query: int, meta_batch: int, steps: int, validation: int, every: int) -> TrainConfig:
    return TrainConfig(
        data="omniglot",
        tasks=TaskConfig(family="classes", way=way, shot=shot, query=query, distort=0.5),
        model=ModelConfig(name="conv4"),
        inner=InnerConfig(algorithm="lslr", rate=0.4, steps=1),
        outer=OuterConfig(
            steps=steps, meta_batch=meta_batch, init_rate=4e-3, validate_every=every,
            checkpoint_every=500 if every == 1000 else every,
        ),
        evaluation=EvaluationConfig(episodes=1000, validation_episodes=validation, steps=3),
    )  # fmt: skip


CONFIGS = {
    "5way_1shot": config(5, 1, 5, 32, 40000, 200, 2500),
    "5way_5shot": config(5, 5, 5, 32, 24000, 200, 2500),
    "20way_1shot": config(20, 1, 3, 32, 36000, 200, 2500),
    "5way_1shot_cpu": config(5, 1, 5, 8, 32000, 400, 1000),
    "5way_5shot_cpu": config(5, 5, 5, 8, 10000, 400, 1000),
    "20way_1shot_cpu": config(20, 1, 3, 4, 26000, 200, 1000),
}

if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in CONFIGS:
        sys.exit(f"usage: python experiments/omniglot.py {' | '.join(CONFIGS)}")
    name = sys.argv.pop(1)
    experiment(CONFIGS[name], f"omniglot_{name}", seeds=(0,))
