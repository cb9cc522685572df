"""Rates for a fine-tune of 200 minibatch steps: what does each way of taking the derivative give, at what cost?

    python experiments/derivatives.py

Rates alone are learned, from new random inits: a schedule of 4 knots a layer for Adam's direction, 8 numbers. They
start from 0.1, which is far too large: a fine-tune is rough there. The row "as it starts" learns nothing. Family
`rotated`, all ten digits with 20 images each (minibatches of 32), an MLP of one layer of 64, 40 outer steps of 4 tasks,
60 meta-test tasks, five seeds.
Expected: see results/derivatives.json and docs/long.md; about half an hour on one CPU core.
"""

from metalr.cli.documents import study
from metalr.config import EvaluationConfig, InnerConfig, ModelConfig, OuterConfig, TaskConfig, TrainConfig

START = 0.1
LEARNED = OuterConfig(
    steps=40, meta_batch=4, learns="rates", rates_rate=0.1, validate_every=10, checkpoint_every=10, on_divergence="skip"
)
AS_IT_STARTS = OuterConfig(steps=1, meta_batch=1, learns="rates", rates_rate=1e-12, validate_every=1)
WAYS: dict[str, tuple[dict[str, object], OuterConfig]] = {
    "as it starts": ({"derivative": "remat"}, AS_IT_STARTS),
    "remat": ({"derivative": "remat"}, LEARNED),
    "truncated, last 10": ({"derivative": "truncated", "last": 10}, LEARNED),
    "forward": ({"derivative": "forward"}, LEARNED),
    "evolution, 4 pairs": ({"derivative": "evolution"}, LEARNED),
}
VARIANTS = {
    way: TrainConfig(
        tasks=TaskConfig(family="rotated", way=10, shot=20, query=20),
        model=ModelConfig(widths=(64,), dropout=0.0),
        inner=InnerConfig(steps=200, batch_size=32, base="adam", rate=START, knots=4, **options),  # type: ignore[arg-type]
        outer=outer,
        evaluation=EvaluationConfig(episodes=60, validation_episodes=20, steps=200, seed=1),
    )
    for way, (options, outer) in WAYS.items()
}

if __name__ == "__main__":
    study(VARIANTS, "derivatives", seeds=(0, 1, 2, 3, 4))
