"""Rates for real fine-tunes: trained for 200 minibatch steps, do they hold at 400 and 1,000?

    python experiments/long_horizon.py

Families `permuted` and `rotated`, all ten digits with 50 images each (minibatches of 32), the reference MLP 784-128-10
without dropout. Learned a layer: a schedule of 4 knots for Adam's direction, stretched over each fine-tune; the same
for SGD with a learned momentum. Beside it, at every length, the best of 7 fixed rates for Adam and SGD, chosen on the
same 30 meta-test tasks.
Expected: see results/long_horizon.json and docs/long.md; about 40 minutes on 2 CPU cores.
"""

from metalr.cli.documents import study
from metalr.config import EvaluationConfig, InnerConfig, OuterConfig, TaskConfig, TrainConfig

ADAM = InnerConfig(steps=200, batch_size=32, base="adam", rate=3e-3, knots=4)
MOMENTUM = InnerConfig(steps=200, batch_size=32, rate=0.03, momentum=0.8, knots=4)
VARIANTS = {
    f"{family}: {name}, 4 knots": TrainConfig(
        tasks=TaskConfig(family=family, way=10, shot=50, query=20),
        inner=inner,
        outer=OuterConfig(steps=250, meta_batch=4, validate_every=25, checkpoint_every=25, rates_rate=0.1),
        evaluation=EvaluationConfig(episodes=30, validation_episodes=20, steps=200),
    )
    for family, name, inner in (
        ("permuted", "adam", ADAM),
        ("rotated", "adam", ADAM),
        ("permuted", "momentum", MOMENTUM),
    )
}
GRID = {"learning_rates": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3), "optimizers": ("adam", "sgd")}

if __name__ == "__main__":
    study(VARIANTS, "long_horizon", horizons=(200, 400, 1000), grid=GRID)
