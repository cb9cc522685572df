"""Characters never seen in meta-training: one small conv net for tasks of any number of characters and examples.

    python experiments/omniglot.py gpu | cpu
    python experiments/omniglot.py judge gpu | cpu

Needs Omniglot's published train and validation characters, imported as `omniglot` (metalr data import FILE --name
omniglot; the parts' classes in it): 1,028 characters for meta-training, 86 of the others for choosing and 86 for
meta-test tasks, each in four quarter turns. conv4 with 64 channels and batch-statistics norm (transductive), trained on
20-way 1-shot tasks alone; its output layer starts from the mean features of each class, so that the same artifact takes
5-way and 5-shot tasks. Every meta-training episode goes through one random affine map, and each image through a weaker
one of its own. What is kept looks at VIEWS distorted copies of each support image too, which it was not trained with
(`learned.with_views`; chosen on meta-validation tasks). It is judged with them and without, on 1,000 tasks of each of
JUDGED; `judge` does that alone.

`gpu` is the published run; `cpu` sees fewer tasks.
Expected: see results/omniglot_*.json and docs/choosing.md; one seed. A minute and a half on one NVIDIA H200, half an
hour on one CPU core; judging takes some 20 minutes of a CPU core.
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
VIEWS = 32
JUDGE_SEED = 1  # of the tasks; those of 0 had been looked at while settings changed


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
    """A row for each of JUDGED, without and with views: accuracy on meta-test tasks, before and after the step."""
    import metalr

    learned = metalr.load(artifact)
    rows = []
    for way, shot in JUDGED:
        tasks = metalr.Tasks.from_images(name, "classes", way, shot, QUERY)
        for views in (0, VIEWS):
            curve = learned.with_views(views).evaluate(tasks, episodes=1000, steps=1, seed=JUDGE_SEED)
            before, after = (round(float(v), 6) for v in curve.mean)
            kind = {"way": way, "shot": shot, "views": views, "tasks": 1000, "query": QUERY, "seed": JUDGE_SEED}
            rows.append(kind | {"accuracy": after, "ci95": round(float(curve.ci95[1]), 6), "before": before})
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    judge_alone = sys.argv[1:2] == ["judge"]
    del sys.argv[1 : 1 + judge_alone]
    if sys.argv[1:] == [] or sys.argv[1] not in CONFIGS:
        sys.exit(f"usage: python experiments/omniglot.py [judge] {' | '.join(CONFIGS)}")
    name = sys.argv.pop(1)
    artifact = HERE / "artifacts" / f"omniglot_{name}"
    if not judge_alone:
        experiment(CONFIGS[name], artifact.name, seeds=(0,))
    if sys.argv[1:] == []:  # as it stands: published
        import metalr

        metalr.save(artifact, metalr.load(artifact).with_views(VIEWS), overwrite=True)
        results = HERE / "results" / f"{artifact.name}.json"
        facts = json.loads(results.read_text())
        facts["judged"] = judged(artifact, CONFIGS[name].data)
        results.write_text(json.dumps(facts, indent=1) + "\n")
