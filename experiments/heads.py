"""Where the output layer starts: learned as the rest of the init, or from the class means of each task.

    python experiments/heads.py

Omniglot (see omniglot.py for the data), 20-way 1-shot, conv4 with 64 channels, one inner step, 1,500 outer steps of 4
tasks: 6,000 tasks seen. One seed, 200 meta-test tasks.
Expected: see results/heads.json; six minutes a row on one CPU core.
"""

from metalr.cli.documents import study
from metalr.config import EvaluationConfig, InnerConfig, ModelConfig, OuterConfig, TaskConfig, TrainConfig

VARIANTS = {
    f"{start} output layer" if start == "learned" else f"output layer from {start}": TrainConfig(
        data="omniglot",
        tasks=TaskConfig(family="classes", way=20, shot=1, query=3, distort=0.5),
        model=ModelConfig(name="conv4"),
        inner=InnerConfig(algorithm="lslr", rate=0.4, steps=1, head_start=None if start == "learned" else start),
        outer=OuterConfig(steps=1500, meta_batch=4, init_rate=4e-3, validate_every=500, checkpoint_every=1500),
        evaluation=EvaluationConfig(episodes=200, validation_episodes=100, steps=2, shown_tasks=0),
    )
    for start in ("learned", "prototypes")
}

if __name__ == "__main__":
    study(VARIANTS, "heads", seeds=(0,))
