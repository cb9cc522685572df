"""Characters never seen in meta-training: one small conv net for tasks of any number of characters and examples.

    python experiments/omniglot.py gpu | cpu

Needs Omniglot's published train and validation characters, imported as `omniglot` (metalr data import FILE --name
omniglot; the parts' classes in it): 1,028 characters for meta-training, 86 of the others for choosing and 86 for
meta-test tasks, each in four quarter turns. conv4 with 64 channels and batch-statistics norm (transductive), trained on
20-way 1-shot tasks alone; its output layer starts from the mean features of each class, so that the same artifact takes
5-way and 5-shot tasks. Every meta-training episode goes through one random affine map, and each image through a weaker
one of its own. A run is judged on 1,000 tasks of each of JUDGED.

`gpu` is the published run; `cpu` sees fewer tasks.
Expected: see results/omniglot_*.json and docs/choosing.md; one seed. A minute and a half on one NVIDIA H200, half an
hour on one CPU core.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from metalr.cli.documents import experiment
from metalr.config import EvaluationConfig, InnerConfig, ModelConfig, OuterConfig, TaskConfig, TrainConfig

HERE = Path(__file__).parent
JUDGED = ((20, 1), (5, 1), (5, 5))  # way, shot
QUERY = 5  # images a class of the tasks that a run is judged on


def config(meta_batch: int, steps: int, every: int) -> TrainConfig:
    return TrainConfig(
        data="omniglot",
        tasks=TaskConfig(family="classes", way=20, shot=1, query=3, distort=0.5),
        model=ModelConfig(name="conv4"),
        inner=InnerConfig(algorithm="lslr", rate=0.4, steps=1, head_start="prototypes"),
        outer=OuterConfig(
            steps=steps, meta_batch=meta_batch, init_rate=4e-3, validate_every=every, checkpoint_every=min(every, 2500)
        ),
        evaluation=EvaluationConfig(episodes=1000, validation_episodes=300, steps=1, shown_tasks=0),
    )  # fmt: skip


CONFIGS = {"gpu": config(32, 23000, 2500), "cpu": config(4, 8000, 500)}


def judged(artifact: Path, name: str) -> list[dict[str, Any]]:
    """A row for each of JUDGED: accuracy on 1,000 meta-test tasks of a dataset, before and after the inner step."""
    import metalr

    learned = metalr.load(artifact)
    rows = []
    for way, shot in JUDGED:
        tasks = metalr.Tasks.from_images(name, "classes", way, shot, QUERY)
        curve = learned.evaluate(tasks, episodes=1000, steps=1)
        before, after = curve.mean.tolist()
        rows.append({"way": way, "shot": shot, "accuracy": round(after, 6), "ci95": round(float(curve.ci95[1]), 6)}
                    | {"before": round(before, 6), "tasks": 1000, "query": QUERY})  # fmt: skip
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in CONFIGS:
        sys.exit(f"usage: python experiments/omniglot.py {' | '.join(CONFIGS)}")
    name = sys.argv.pop(1)
    experiment(CONFIGS[name], f"omniglot_{name}", seeds=(0,))
    if sys.argv[1:] == []:  # as it stands: published
        results = HERE / "results" / f"omniglot_{name}.json"
        facts = json.loads(results.read_text())
        facts["judged"] = judged(HERE / "artifacts" / f"omniglot_{name}", CONFIGS[name].data)
        results.write_text(json.dumps(facts, indent=1) + "\n")
