"""The init, the rates, or both: what carries the result?

    python experiments/what_is_learned.py

"init" keeps all rates at 0.1; "rates" draws a new random init in every outer step and for every meta-test task, so the
rates stand alone, as for people who bring their own network. Families `digits` (3-way 1-shot) and `permuted` (10-way
10-shot) of the bundled MNIST subset, the reference MLP without dropout, 5 inner steps, 500 outer steps of 8 tasks.
Expected: see results/what_is_learned.json and docs/choosing.md; about 10 minutes on 2 CPU cores.
"""

from metalr.cli.documents import study
from metalr.config import OuterConfig, TaskConfig, TrainConfig

FAMILIES = {
    "digits": TaskConfig(family="digits", way=3, shot=1),
    "permuted": TaskConfig(family="permuted", way=10, shot=10),
}
VARIANTS = {
    f"{family} {learns}": TrainConfig(
        tasks=tasks, outer=OuterConfig(steps=500, meta_batch=8, validate_every=125, learns=learns)
    )
    for family, tasks in FAMILIES.items()
    for learns in ("init", "rates", "both")
}

if __name__ == "__main__":
    study(VARIANTS, "what_is_learned", seeds=(0, 1, 2, 3, 4))
