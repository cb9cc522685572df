"""Digits never seen in meta-training, one image each: does a learned init with learned rates beat a tuned one?

    python experiments/mnist_digits_3way_1shot.py

Tasks are 3 of the digits under one random rotation, labels shuffled. Meta-training sees digits 0-5; the 600 meta-test
tasks are made of test images of digits 6-9 at angles that were not trained. Network: 4 convolutions of 32 channels
with batch-statistics norm (transductive).
Expected: 80.1 ± 0.8 % after 5 steps (the best grid cell from a random init: 61.7 %), in about
15 minutes for 3 seeds and the grid on 2 busy CPU cores; from results/mnist_digits_3way_1shot.json.
"""

from metalr.cli.documents import experiment
from metalr.config import GridConfig, InnerConfig, ModelConfig, OuterConfig, TaskConfig, TrainConfig

CONFIG = TrainConfig(
    data="mnist",
    tasks=TaskConfig(family="digits", way=3, shot=1),
    model=ModelConfig(name="conv4", channels=32),
    inner=InnerConfig(algorithm="meta_sgd_layer"),
    outer=OuterConfig(steps=2000, meta_batch=16),
    grid=GridConfig(run=True, batch_sizes=(1000,), steps=(1, 5, 20)),
)

if __name__ == "__main__":
    experiment(CONFIG, "mnist_digits_3way_1shot")
