"""Learned init and rates against grid, random, TPE and ASHA search, tuned and default rates, and other inits.

    python benchmarks/grid_search.py [--only NAME ...] [--small] [--seeds N ...]

For each case: pre-train an init jointly and meta-train, both for every seed (0 to 4), then `comparing.run` (`metalr
compare`) on held-out tasks. Settings are chosen on meta-validation tasks (`--part validation`), and what that cost is
charged; TABLES.md says when which table was drawn. Few-shot: whole support sets, up to 50 steps. Full data: 700 images
a class of MNIST's test part, minibatches of 32, up to 20 epochs, the reference grid of 27 cells, every search with 20 %
of each class to choose by. Transfer: what was learned on MNIST, on Omniglot's characters (if they were imported:
`metalr data import FILE --name omniglot`). Everything finished is kept in runs/grid_search and not run again, so the
benchmark can be stopped; it writes results/grid_search.json after every case. --only measures these cases' rows anew
and leaves the others alone (each row has its commit and machine). --small: bundled data, minutes, written to runs/.
Needs the extra `search`, and MNIST (`metalr data prepare mnist`). One to two hours a case on one CPU core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from metalr.outer import devices

devices.use_all_cores()

import measure

from metalr import data, models, runs
from metalr.config import (
    CompareConfig,
    EvaluationConfig,
    InnerConfig,
    ModelConfig,
    OuterConfig,
    SpaceConfig,
    TaskConfig,
    TrainConfig,
)
from metalr.config.files import differences, read_config
from metalr.runs import comparing
from metalr.tasks import Tasks, mixture

ROOT = Path("runs") / "grid_search"


class Case(NamedTuple):
    """What is meta-trained, and what it is compared on.

    train: None: that of the case `of`. of: the case whose runs are compared, if not its own. network: one of its own
    instead of the config's.
    begins_pretrained: each seed's meta-training starts from the same seed's pre-trained init.
    pretraining_steps: of that init; 0: twice the outer steps of meta-training; None: there is none.
    pretrained_of: the case whose pre-trained inits are taken, if not its own.
    given: data -> tasks that no config describes, with a `network`; train.data is what they are made of.
    """

    train: TrainConfig | None
    compare: CompareConfig
    of: str = ""
    network: models.Model | None = None
    begins_pretrained: bool = False
    pretraining_steps: int | None = 0
    pretrained_of: str = ""
    given: Callable[[str], Tasks] | None = None


class Bytes(nn.Module):
    """The reference MLP without its dropout, on images as they often come: 0..255, left unscaled."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(128)(255 * x.reshape(len(x), -1)))
        return nn.Dense(10, name="head")(x)


def mixed(images: str) -> Tasks:
    """Each task is a rotated one, one with its pixels permuted, or one with its labels in another order; all 5-shot."""
    dataset = data.load(images)
    return mixture(*(Tasks.from_images(dataset, family, 10, 5) for family in ("rotated", "permuted", "relabeled")))


def few_shot(
    tasks: TaskConfig,
    model: ModelConfig,
    outer: OuterConfig,
    searched: int = 20,
    images: str = "mnist",
    **compare: Any,
) -> Case:
    """All of a small support set in each step."""
    space = SpaceConfig(epochs=(5, 20, 50), batch_sizes=(8, 999))
    return Case(
        TrainConfig(
            images, tasks, model, InnerConfig(steps=5), outer,
            EvaluationConfig(episodes=100, validation_episodes=100),
        ),
        CompareConfig(
            tasks=200, searched=searched, lengths=(1, 5, 10, 20, 50), batch_size=999, space=space, tuning_tasks=40,
            **compare,
        ),
    )  # fmt: skip


def full(
    family: str,
    steps: int = 1200,
    model: ModelConfig = ModelConfig(dropout=0.2),  # noqa: B008
    label_noise: float = 0.0,
    horizon: int = 30,
    rate: float = 3e-3,
    init_rate: float = 2e-3,
    rates_rate: float = 3e-2,
    validate_every: int = 100,
    **compare: Any,
) -> Case:
    """All of a task's data, in minibatches; trained for `horizon` steps, used for thousands."""
    return Case(
        TrainConfig(
            "mnist",
            TaskConfig(family=family, way=10, shot=40, query=40, label_noise=label_noise),
            model,
            InnerConfig(steps=horizon, batch_size=32, base="adam", rate=rate, knots=3),
            OuterConfig(
                steps=steps, meta_batch=4, init_rate=init_rate, rates_rate=rates_rate, validate_every=validate_every
            ),
            EvaluationConfig(episodes=20, validation_episodes=20, steps=horizon),
        ),
        CompareConfig(
            **{"shot": 700, "query": 190, "tasks": 10, "searched": 5, "tuning_tasks": 4}
            | {"lengths": (0.05, 0.2, 1, 2, 5, 20)}
            | compare
        ),
    )


def several_horizons(case: Case, horizons: tuple[int, ...], pretraining: int, shot: int = 0, **inner: Any) -> Case:
    """From an init that was pre-trained for so many steps, at several numbers of inner steps, with rates that fall with
    them. shot: of meta-training, if not the case's."""
    assert case.train is not None
    settings = dataclasses.replace(case.train.inner, horizons=horizons, horizon_power=0.3, **inner)
    tasks = dataclasses.replace(case.train.tasks, shot=shot or case.train.tasks.shot)
    train = dataclasses.replace(case.train, inner=settings, tasks=tasks)
    return case._replace(train=train, begins_pretrained=True, pretraining_steps=pretraining)


def full_several_horizons(family: str, seed: int, searched: int = 10) -> Case:
    """The settings that were chosen for `rotated` with 7,000 images, on any family. seed: of the test tasks.

    searched: tasks of searches.
    """
    case = full(family, steps=400, rates_rate=5e-2, validate_every=50, seed=seed, searched=searched, searchers=NEW)
    return several_horizons(case, horizons=(10, 50, 200, 480), pretraining=4800, shot=500)


def few_shot_several_horizons(
    tasks: TaskConfig,
    seed: int,
    model: ModelConfig | None = None,
    images: str = "mnist",
    share: float = 1.0,
    searched: int = 20,
) -> Case:
    """The settings that were chosen for rotated 5-shot tasks, on any tasks.

    seed: of the test tasks. share: of the outer steps that were chosen, of pre-training too.
    searched: tasks of searches.
    """
    outer = OuterConfig(steps=round(600 * share), init_rate=2e-3, rates_rate=5e-2, validate_every=100)
    case = few_shot(tasks, model or MLP, outer, searched, images=images, seed=seed, searchers=NEW)
    return several_horizons(case, (1, 5, 20, 50), pretraining=round(4000 * share), base="adam", rate=3e-3, knots=3)


def rates_of_pretrained(of: str, case: Case, seed: int) -> Case:
    """The pre-trained inits of another case, and rates that are learned for them on meta-validation tasks.

    seed: of the test tasks.
    """
    assert case.train is not None
    outer = OuterConfig(
        steps=200, rates_rate=5e-2, validate_every=50, learns="rates_of_init", part="validation", calibrate=True
    )
    train = dataclasses.replace(case.train, outer=outer)
    return case._replace(train=train, compare=dataclasses.replace(case.compare, seed=seed), pretrained_of=of)


def rates_alone(seed: int, *widths: int, of: str = "", lengths: tuple[float, ...] = (0.05, 0.2, 1, 2)) -> Case:
    """Learned rates without an init, learned on two hidden layers of 64, and used on hidden layers of other widths.

    Beside more optimizers that need no rate, and a tuned rate; no searches. seed: of the test tasks. lengths: epochs.
    """
    model, rivals = ModelConfig(widths=(64, 64)), ("momo_adam", "cocob", "schedule_free_sgd", "schedule_free_adamw")
    case = full(
        "rotated", steps=200, model=model, rates_rate=5e-2, init_rate=1e-3, validate_every=50, seed=seed,
        searched=0, lengths=lengths, rivals=(*rivals, "prodigy", "adam_cosine"),
    )  # fmt: skip
    compare = dataclasses.replace(case.compare, widths=widths or None, fan_in=0.5 if widths else 0.0)
    if of:
        return Case(None, compare, of)
    case = several_horizons(case, horizons=(10, 50, 200), pretraining=0, shot=500)
    assert case.train is not None
    outer = dataclasses.replace(case.train.outer, learns="rates")
    train = dataclasses.replace(case.train, outer=outer)
    return Case(train, compare, pretraining_steps=None)


def several_amounts(of: str, case: Case, seed: int) -> Case:
    """The settings of another few-shot case, and its pre-trained inits, but meta-trained with 1, 5 and 20 images a
    class; no searches. seed: of the test tasks."""
    assert case.train is not None
    tasks = dataclasses.replace(case.train.tasks, shots=(1, 5, 20))
    inner = dataclasses.replace(case.train.inner, support_power=0.0)
    compare = dataclasses.replace(case.compare, seed=seed, searched=0)
    return case._replace(
        train=dataclasses.replace(case.train, tasks=tasks, inner=inner), compare=compare, pretrained_of=of
    )


def other_amount(of: str, shot: int, seed: int) -> Case:
    """The runs of another case on new tasks of `shot` images a class; no searches. seed: of the test tasks."""
    tasks = TaskConfig("rotated", 10, shot)
    return Case(None, few_shot(tasks, MLP, OuterConfig(), seed=seed, searched=0, shot=shot).compare, of=of)


def with_early_stopping(of: str, seed: int) -> Case:
    """The runs of another few-shot case on new tasks, where what is tuned may stop early; no searches.

    seed: of the tasks.
    """
    tasks = TaskConfig()  # the runs' own are taken
    case = few_shot(tasks, MLP, OuterConfig(), seed=seed, searched=0, early_stopping=True)
    return Case(None, dataclasses.replace(case.compare, tuning_tasks=100), of)


NEW = ("grid", "tpe", "portfolio")  # the searches of newer tables
MLP = ModelConfig()
CONV = ModelConfig(name="conv4", channels=32)
FEW_SHOT = (  # of those trained at several horizons
    "rotated 10-way 5-shot",
    "scaled 10-way 5-shot",
    "relabeled 10-way 5-shot",
    "rotated 10-way 5-shot, label noise 0.4",
    "permuted 10-way 10-shot",
    "rotated 10-way 5-shot, 8 hidden layers",
    "Fashion-MNIST, rotated 10-way 5-shot",
)
PERMUTED: dict[str, Any] = {"searched": 2, "tasks": 6, "lengths": (0.05, 0.2, 1, 2, 5, 10, 15, 20)}
ROTATED = few_shot_several_horizons(TaskConfig("rotated", 10, 5), 20261226)
FASHION = few_shot_several_horizons(TaskConfig("rotated", 10, 5), 20261205, images="fashion")
CASES = {
    "rotated, full data": full("rotated", steps=2400),
    "rotated, full data, several horizons": full_several_horizons("rotated", 20261126),
    "permuted, full data, several horizons": full_several_horizons("permuted", 20261224, searched=0),
    "rotated 10-way 5-shot": few_shot(
        TaskConfig("rotated", 10, 5), MLP, OuterConfig(steps=2000, init_rate=2e-3)
    ),
    "rotated 10-way 5-shot, several horizons": ROTATED,
    "scaled 10-way 5-shot, several horizons": few_shot_several_horizons(TaskConfig("scaled", 10, 5), 20261130),
    "relabeled 10-way 5-shot, several horizons": few_shot_several_horizons(TaskConfig("relabeled", 10, 5), 20261227),
    "rotated 10-way 5-shot, label noise 0.4, several horizons": few_shot_several_horizons(
        TaskConfig("rotated", 10, 5, label_noise=0.4), 20261202
    ),
    "permuted 10-way 10-shot, several horizons": few_shot_several_horizons(TaskConfig("permuted", 10, 10), 20261203),
    "rotated 10-way 5-shot, 8 hidden layers, several horizons": few_shot_several_horizons(
        TaskConfig("rotated", 10, 5), 20261204, ModelConfig(widths=(64,) * 8)
    ),
    "rotated 10-way 5-shot, GRU, several horizons": few_shot_several_horizons(
        TaskConfig("rotated", 10, 5), 20261222, ModelConfig(name="rnn", width=32), share=0.5, searched=0
    ),
    "Fashion-MNIST, rotated 10-way 5-shot, several horizons": FASHION,
    "Fashion-MNIST, rotated 10-way 5-shot, rates of the pre-trained init": rates_of_pretrained(
        "Fashion-MNIST, rotated 10-way 5-shot, several horizons", FASHION, 20261217
    ),
    **{
        f"{case}, early stopping": with_early_stopping(f"{case}, several horizons", 20261210 + number)
        for number, case in enumerate(FEW_SHOT)
    },
    "mixed 10-way 5-shot, several horizons": few_shot_several_horizons(TaskConfig(), 20261221)._replace(
        network=models.build("mlp", 10, (28, 28, 1), widths=(128,)), given=mixed
    ),
    "rates alone, two layers of 64": rates_alone(20261206),
    "rates alone, two layers of 64, longer": rates_alone(
        20261223, of="rates alone, two layers of 64", lengths=(1, 5, 20)
    ),
    "rates alone, one layer of 256": rates_alone(20261207, 256, of="rates alone, two layers of 64"),
    "rates alone, two layers of 256": rates_alone(20261208, 256, 256, of="rates alone, two layers of 64"),
    "rates alone, four layers of 128": rates_alone(20261209, 128, 128, 128, 128, of="rates alone, two layers of 64"),
    **{
        f"rotated 10-way {shot}-shot, trained with 5, several horizons": other_amount(
            "rotated 10-way 5-shot, several horizons", shot, seed
        )
        for shot, seed in ((1, 20261128), (20, 20261129))
    },
    "rotated 10-way 5-shot, trained with 1, 5 and 20": several_amounts(
        "rotated 10-way 5-shot, several horizons", ROTATED, 20261218
    ),
    **{
        f"rotated 10-way {shot}-shot, trained with 1, 5 and 20": other_amount(
            "rotated 10-way 5-shot, trained with 1, 5 and 20", shot, seed
        )
        for shot, seed in ((1, 20261219), (20, 20261220))
    },
    "permuted 10-way 10-shot": few_shot(
        TaskConfig("permuted", 10, 10), MLP, OuterConfig(steps=2000, init_rate=2e-3)
    ),
    "rotated to omniglot, 10-way 15-shot": Case(
        None,
        CompareConfig(
            data="omniglot", family="classes", shot=15, query=5, tasks=100, searched=6, lengths=(0.2, 1, 2, 5, 20)
        ),
        of="rotated, full data",
    ),
    "permuted, full data": full("permuted", steps=400, **PERMUTED),
    "permuted, full data, trained longer": full("permuted", **PERMUTED),
    "rotated, 1 % of the data": Case(
        None, CompareConfig(shot=7, query=100, tasks=50, searched=10, lengths=(1, 2, 5, 20)), of="rotated, full data"
    ),
    "digits 3-way 1-shot": few_shot(TaskConfig("digits", 3, 1), CONV, OuterConfig(steps=400), 10),
    "digits 3-way 5-shot": few_shot(TaskConfig("digits", 3, 5), CONV, OuterConfig(steps=300), 10),
    "rotated, full data, 8 hidden layers": full(
        "rotated", model=ModelConfig(widths=(64,) * 8, dropout=0.0), searched=2, tasks=6, tuning_tasks=2
    ),
    "rotated, full data, label noise 0.4": full("rotated", label_noise=0.4, searched=3, tasks=6),
    "rotated, full data, label noise 0.4, trained for 200 steps": full(
        "rotated", steps=300, label_noise=0.4, horizon=200, rates_rate=0.1, searched=0, tasks=6
    ),
    "rotated, full data, inputs 0 to 255": full(
        "rotated", steps=400, rate=1e-3, init_rate=1e-4, searched=3, tasks=6
    )._replace(network=models.from_linen(Bytes(), np.zeros((1, 28, 28, 1), np.float32))),
    "rotated, full data, GRU": full(
        "rotated", steps=600, model=ModelConfig(name="rnn", width=64), searched=2, tasks=6, tuning_tasks=2
    ),
}  # fmt: skip


def small(case: Case) -> Case:
    """The same in minutes: bundled data, little training, few tasks."""
    train = case.train
    if train is not None:
        query = min(train.tasks.query, 20)
        shot = min(train.tasks.shot, 10)
        train = dataclasses.replace(
            train,
            data="mnist12k",
            tasks=dataclasses.replace(train.tasks, shot=shot, query=query),
            inner=dataclasses.replace(train.inner, steps=5, horizons=(2, 5) if train.inner.horizons else ()),
            outer=dataclasses.replace(train.outer, steps=60, validate_every=30),
            evaluation=EvaluationConfig(episodes=20, validation_episodes=20),
        )
    compare = case.compare
    space = SpaceConfig((1e-3, 1e-2), (1, 2), compare.space.batch_sizes[-1:])
    changes: dict[str, Any] = {"data": None, "tasks": 8, "searched": 2, "tuning_tasks": 4, "space": space}
    changes |= {"lengths": (1, 2), "budgets": (1, 3), "shot": compare.shot and 20, "query": compare.query and 20}
    compare = dataclasses.replace(compare, **changes)
    steps = None if case.pretraining_steps is None else 0
    return case._replace(train=train, compare=compare, pretraining_steps=steps)


def trained(name: str, train: TrainConfig, root: Path, **own: Any) -> Path:
    """The run folder of `train`; a finished one of the same settings is kept, a stopped one goes on.

    own: network and tasks that no config describes, as runs.run takes them.
    """
    out = root / folder_name(name) / f"seed{train.seed}"
    if (out / "results.json").is_file():
        changed = differences(dataclasses.replace(train, out=None), read_config(out)).keys()
        changed -= {"out", "init", "outer.checkpoint_every"}  # what the result does not depend on
        if changed:
            raise SystemExit(f"{out}: expected the settings of the case, found others: {sorted(changed)}; remove it")
    else:
        if (out / "config.json").is_file():
            runs.resume(out, dataclasses.replace(train, out=out), **own)
        else:
            runs.run(dataclasses.replace(train, out=out), name=name, **own)
    return out


def folder_name(case: str) -> str:
    return case.replace(", ", "_").replace(" ", "_").replace("%", "percent")


def pretraining(train: TrainConfig, steps: int) -> TrainConfig:
    """The jointly pre-trained rival of `train`: same network and tasks, no learned rates. steps 0: twice its own."""
    steps = steps or 2 * train.outer.steps
    outer = dataclasses.replace(train.outer, steps=steps, validate_every=100, rates_rate=OuterConfig().rates_rate)
    tasks = dataclasses.replace(train.tasks, shot=min(train.tasks.shot, 40))
    # The step of pre-training that is best after five steps on validation tasks is kept: of Adam 1e-3, with which the
    # compared fine-tunes go on; of SGD 0.1 in the rows made before inputs of 0 to 255 and the GRU.
    inner = InnerConfig(algorithm="joint", steps=5, base="adam", rate=1e-3)
    return dataclasses.replace(train, tasks=tasks, inner=inner, outer=outer)


def images_of(case: Case, cases: dict[str, Case]) -> set[str]:
    """The data that a case trains on or is compared on."""
    train = (cases[case.of] if case.of else case).train
    return {name for name in (case.compare.data, train and train.data) if name is not None}


def run_case(name: str, case: Case, cases: dict[str, Case], seeds: list[int], root: Path) -> dict[str, Any]:
    source = case.of or name
    train, given = cases[source].train, cases[source].given
    assert train is not None
    own = {"model": cases[source].network, "given": None if given is None else given(train.data)}
    seeded, pretrained = [], []
    of_joint = cases[source].pretrained_of or source
    jointly, steps = cases[of_joint].train, cases[of_joint].pretraining_steps
    for seed in seeds:
        if steps is not None and jointly is not None:
            joint = dataclasses.replace(pretraining(jointly, steps), seed=seed)
            pretrained.append(trained(f"{of_joint}_joint", joint, root, **own))
        start = pretrained[-1] if cases[source].begins_pretrained else None
        seeded.append(trained(source, dataclasses.replace(train, seed=seed, init=start), root, **own))
    choosing = [  # the settings of a case that takes another's pre-trained inits began as that one's
        path.parent
        for of in dict.fromkeys((source, of_joint))
        for path in sorted((root / f"{folder_name(of)}_choosing").glob("*/results.json"))
    ]
    out = seeded[0].parent / f"compare_{folder_name(name)}"
    if (out / "results.json").is_file():
        return json.loads((out / "results.json").read_text())
    config = dataclasses.replace(case.compare, out=out)
    if (out / "config.json").is_file():
        return comparing.resume(out, **own)
    return comparing.run(seeded, config, pretrained=pretrained, choosing=choosing, **own)


def rows_of(name: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that the results file is asked for, with more columns."""
    facts = {"case": name, "family": results["family"], "regime": results["regime"]}
    made = {
        "seed": results["seeds"],
        "commit": results["provenance"]["commit"],
        "machine": results["provenance"]["machine"],
    }
    return [facts | row | made for row in results["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=CASES, metavar="CASE", help="only these; the results file keeps the others' rows"
    )
    parser.add_argument("--small", action="store_true", help="bundled data, minutes, written to runs/")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    cases = {name: small(case) for name, case in CASES.items()} if options.small else CASES
    root = ROOT / "small" if options.small else ROOT
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"cases": {}}
    stored = measure.RESULTS / "grid_search.json"
    if options.only and not options.small and stored.is_file():
        content = json.loads(stored.read_text())
        rows, facts = content["rows"], {name: content[name] for name in ("corrected", "cases") if name in content}
    for name in options.only or cases:
        missing = images_of(cases[name], cases) - {*data.names()}
        if missing:
            print(f"{name}: left out, {', '.join(missing)} is not there (metalr data list)")
            continue
        results = run_case(name, cases[name], cases, options.seeds, root)
        rows = [row for row in rows if row["case"] != name] + rows_of(name, results)
        kept = (
            "part",
            "choosing_example_gradients",
            "conclusions",
            "seconds",
            "peak_memory_bytes",
            "data",
            "trained_on",
            "support",
            "query",
            "split_sha256",
        )
        facts["cases"][name] = {key: results[key] for key in kept if key in results}
        facts["cases"][name] |= {"seeds": results["seeds"], "test_seed": results["config"]["seed"]}
        print(f"{name}: {len(results['rows'])} rows in {results['seconds']} s", flush=True)
        if options.small:
            (root / "grid_search.json").write_text(json.dumps(rows, indent=1))
        else:
            rows.sort(key=lambda row: [*cases].index(row["case"]))  # stable
            measure.save("grid_search", rows, **facts)


if __name__ == "__main__":
    main()
