"""`metalr compare`: finished runs beside their rivals, in a folder that can be stopped and gone on with.

The folder holds config.json, searches.jsonl (a line a finished search of a task), results.json, and a lock while it
goes on. results.json has a row for every method and cost, and what follows from them: what it costs to catch up, and
after how many tasks meta-training has paid.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from metalr import data, models, report, tasks
from metalr.comparison import rivals
from metalr.comparison.rivals import Field, Key, Scores, Searched
from metalr.config import CompareConfig, SpaceConfig, TrainConfig
from metalr.config.files import check_literals, differences, from_json, read_config
from metalr.errors import ConfigError, one_line
from metalr.evaluation import protocol
from metalr.inner import Objective, hyperparameters, optimizers
from metalr.learner import Learner, artifact
from metalr.models import Model
from metalr.runs import training
from metalr.runs.job import Job, stoppable
from metalr.runs.progress import ConsoleReporter, Reporter
from metalr.runs.provenance import command, peak_memory, provenance
from metalr.runs.sources import load
from metalr.search import fit, searchers
from metalr.search import trials as trials_lib
from metalr.storage import folders, sealed
from metalr.tasks import Tasks
from metalr.trees import count

SEARCHES = "searches.jsonl"
FILES = {"config.json", SEARCHES, "results.json", *folders.OWN}
JOB = Job("comparison", frozenset(FILES))
WARM = "tpe+"  # TPE that tries the learned rates first
PORTFOLIO = "portfolio"  # rivals.PORTFOLIOS
FEW_SHOTS = 20  # images a class, up to which a result calls itself few-shot


class _Parts(NamedTuple):
    """A comparison's parts, checked.

    choosing: example-gradients of the runs by which the settings of meta-training were chosen.
    paid_once: name of an init -> example-gradients of its training.
    """

    learners: list[Learner]
    joint: list[Learner]
    choosing: float
    field: Field
    space: SpaceConfig
    searchers: list[str]
    paid_once: dict[str, float]
    facts: dict[str, Any]


def run(
    runs: Sequence[Path],
    config: CompareConfig,
    *,
    pretrained: Sequence[Path] = (),
    choosing: Sequence[Path] = (),
    model: Model | None = None,
    given: Tasks | None = None,
    objective: Objective | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Compare finished runs of one setting, which differ in their seed only, with everything else.

    Args:
      runs: run folders; scores are averaged over them.
      pretrained: run folders of a jointly pre-trained init of the same network (--inner.algorithm joint), which differ
        in their seed only.
      choosing: folders of runs, or of whole sweeps, that were tried on meta-validation tasks before these settings were
        chosen. What they cost is charged to the break-even count, which is given with and without it; the runs compared
        are not charged twice.
      model, given, objective: the network, the tasks and the objective of your own that the runs are of, if they are.

    Raises:
      MetalrError: runs that do not fit together, a setting that cannot work, a signal, or the disk refuses.
    """

    tried = _tried(choosing, [*runs, *pretrained])

    def make() -> _Parts:
        return _set_up(runs, config, pretrained, tried, Own(model, given, objective))

    def record(folder: Path) -> dict[str, Any]:
        of = {"runs": runs, "pretrained": pretrained, "choosing": tried}
        places = {name: [_record(path, folder) for path in paths] for name, paths in of.items()}
        return places | {"config": config.to_json()}

    def carry_out(parts: _Parts, folder: Path) -> dict[str, Any]:
        return _carry_out(parts, config, folder, reporter or ConsoleReporter())

    return JOB.begin(config, "compare", make, carry_out, record)


def resume(
    folder: Path,
    *,
    model: Model | None = None,
    given: Tasks | None = None,
    objective: Objective | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Go on with a comparison that was stopped or killed, with its own settings; finished searches are kept.

    Raises:
      MetalrError: no comparison, a finished one, or one in use.
    """
    config, recorded = JOB.stored(
        folder,
        lambda stored: (
            from_json(stored["config"], CompareConfig),
            {name: stored.get(name) or [] for name in ("runs", "pretrained", "choosing")},
        ),
    )
    runs, pretrained, choosing = ([_locate(place, folder) for place in places] for places in recorded.values())
    JOB.refuse_finished(folder)

    def make() -> _Parts:
        return _set_up(runs, config, pretrained, choosing, Own(model, given, objective), folder)

    def carry_out(parts: _Parts, folder: Path) -> dict[str, Any]:
        return _carry_out(parts, config, folder, reporter or ConsoleReporter())

    return JOB.go_on(folder, make, carry_out)


def _record(run: Path, folder: Path) -> dict[str, str]:
    """Where a run stands, and the hash of what it learned, by which it is known again."""
    return folders.place(run, folder) | {"sha256": sealed.sha256(run / "artifact" / artifact.FACTS)}


def _locate(recorded: dict[str, str], folder: Path) -> Path:
    """Where a recorded run stands now. Raises ConfigError if it is in none of its places."""
    tried = folders.places(recorded, folder)
    for place in map(Path, tried):
        file = place / "artifact" / artifact.FACTS
        if file.is_file() and sealed.sha256(file) == recorded.get("sha256"):
            return place
    raise ConfigError(f"resume: {folder}: expected the run that it was begun with, found it in none of {tried}")


def _check(config: CompareConfig) -> None:
    """Raises ConfigError for settings that cannot work, whatever the runs are."""
    from_json(config.to_json(), CompareConfig)  # the types, as in a config file
    check_literals(config)
    for name, values in (("lengths", config.lengths), ("budgets", config.budgets)):
        if not values or not all(0 < value < np.inf for value in values):
            raise ConfigError(f"{name}: expected one or more positive numbers, got {values}")
    if config.tasks < 2 or config.tuning_tasks < 2 or config.searched == 1 or not 0 <= config.searched <= config.tasks:
        raise ConfigError(
            "tasks, tuning_tasks, searched: expected at least 2, at least 2, and 0 or 2..tasks, got "
            f"{config.tasks}, {config.tuning_tasks}, {config.searched}"
        )
    names = [*searchers.SEARCHERS, WARM, PORTFOLIO]
    unknown = sorted(set(config.searchers) - set(names))
    if unknown or not config.searchers:
        raise ConfigError(f"searchers: expected some of {names}, got {unknown or 'none'}")
    for name, once in (("searchers", config.searchers), ("rivals", config.rivals)):
        if len(set(once)) < len(once):
            raise ConfigError(f"{name}: expected each once, got {once}")
    for name in config.rivals:
        optimizers.without_search(name, "rivals")
    for name in ("batch_size", "shot", "query"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed: expected 0 <= seed < 2^32, got {config.seed}")
    if set(config.searchers) - {"grid"} and config.searched:
        searchers.import_optuna()
    config.space.check()


def _set_up(
    runs: Sequence[Path],
    config: CompareConfig,
    pretrained: Sequence[Path],
    choosing: Sequence[Path],
    own: Own,
    resumed: Path | None = None,
) -> _Parts:
    """Check everything, before anything is written. resumed: the comparison's folder, which knows its data."""
    _check(config)
    learners, trained = load_runs(runs, own)
    joint, joint_trained = load_runs(pretrained, own, "pretrained") if pretrained else ([], [])
    if joint and jax.tree.map(np.shape, joint[0].init) != jax.tree.map(np.shape, learners[0].init):
        raise ConfigError(f"pretrained: {pretrained[0]}: expected the same network as in {runs[0]}, found another")
    if config.widths is not None:
        learners = _on_another_network(learners, config, pretrained)
    elif config.fan_in:
        raise ConfigError(f"fan_in: expected 0 without --widths of another network, got {config.fan_in}")
    made = from_json(trained[0]["config"])
    if made.outer.part == "validation" and (config.part == "validation" or config.early_stopping):
        what = "part: expected test" if config.part == "validation" else "early_stopping: expected False"
        raise ConfigError(f"{what} with runs that learned on meta-validation tasks (outer.part)")
    for path, found in zip(pretrained, joint_trained, strict=True):
        _check_pretrained(f"pretrained: {path}", from_json(found["config"]), made)
        if _data_sha256(found) != _data_sha256(trained[0]):
            raise ConfigError(f"pretrained: {path}: expected the data of the runs, {made.data!r}, got other data")
    loaded = _loaded(made, config, own, runs[0], resumed)
    if isinstance(loaded, data.Dataset):
        field, facts = _field_of_images(made, config, learners[0], loaded)
    else:
        field, facts = _field_of_tasks(made, config, learners[0], loaded)
    try:
        hyperparameters.check_steps(learners[0].spec, max(field.lengths))
    except ConfigError as error:
        raise ConfigError(f"lengths: in {error}") from error
    spec = dataclasses.replace(learners[0].spec, batch_size=field.minibatch)
    own_searchers = _fitting_searchers(config, learners[0])
    paid_once = {
        name: float(np.mean([_paid(results) for results in of]))
        for name, of in (("learned", trained), ("pre-trained", joint_trained))
        if of
    }
    return _Parts(
        [dataclasses.replace(learner, spec=spec) for learner in learners],
        joint,
        sum(_paid(_results(path, "choosing")) for path in choosing),
        field,
        config.space,
        own_searchers,
        {"random": 0.0} | paid_once,
        facts,
    )


def _loaded(
    trained: TrainConfig, config: CompareConfig, own: Own, run: Path, resumed: Path | None
) -> Tasks | data.Dataset:
    """What the held-out tasks are drawn from: what was given, the data of the runs, or other data."""
    if own.given is not None:
        return own.given
    if config.data is None:
        return load(trained, run)
    if data.is_table(config.data):
        raise ConfigError(
            f"data: expected images, got the table {config.data}; runs of a table are compared on their own table, "
            "which --data leaves out"
        )
    return data.load(config.data) if resumed is None else data.load_recorded(resumed, config.data)


def _fitting_searchers(config: CompareConfig, learner: Learner) -> list[str]:
    """The searchers that can be asked for these rates. Raises ConfigError if none can, or the network forbids it."""
    if not config.searched:
        return []
    if learner.model.uses_support:
        raise ConfigError(
            "searched: expected 0 with model.norm support, whose predictions need the support set, got "
            f"{config.searched}"
        )
    warm = rivals.as_trial(learner, config.space) is not None
    fitting = [name for name in config.searchers if warm or name != WARM]
    if not fitting:
        raise ConfigError(
            f"searchers: expected others with inner.base {learner.spec.base}, because {WARM} tries the learned rates "
            f"as Adam's, got {config.searchers}"
        )
    return fitting


def _check_pretrained(where: str, joint: TrainConfig, trained: TrainConfig) -> None:
    """Raises ConfigError unless an init was pre-trained jointly, and on the tasks that the runs were trained on."""
    if joint.inner.algorithm != "joint":
        raise ConfigError(f"{where}: expected a run of --inner.algorithm joint, got {joint.inner.algorithm}")
    for name, (other, own) in differences(joint, trained).items():
        if name.startswith("tasks.") and name not in ("tasks.shot", "tasks.shots", "tasks.query"):
            raise ConfigError(f"{where}: expected {name} {own!r} as in the runs, got {other!r}")


def _on_another_network(
    learners: Sequence[Learner], config: CompareConfig, pretrained: Sequence[Path]
) -> list[Learner]:
    """The learned rates on an mlp of other widths. Raises ConfigError where there is none, or no rate for a layer."""
    own = learners[0].model
    if own.name != "mlp":
        raise ConfigError(f"widths: expected runs of an mlp, got {own.name}; in Python: learned.for_network")
    if pretrained:
        raise ConfigError("pretrained: expected none with --widths of another network, which has no such init")
    assert config.widths is not None
    trained = own.settings["widths"]
    if len(config.widths) > 1 and len(trained) == 1:
        raise ConfigError(
            f"widths: expected one hidden layer, as the runs have ({trained}), because no rate was learned for one "
            f"behind another, got {config.widths}; train on two or more"
        )
    settings = own.settings | {"widths": config.widths}
    assert own.way is not None
    assert own.input_shape is not None
    other = models.build(own.name, own.way, own.input_shape, **settings)
    return [learner.for_network(other, fan_in=config.fan_in) for learner in learners]


class Own(NamedTuple):
    """What runs have of the user's own, which no file can bring back."""

    model: Model | None = None
    given: Tasks | None = None
    objective: Objective | None = None


def _results(path: Path, setting: str) -> dict[str, Any]:
    """What a finished run found. Raises ConfigError for one that is not finished."""
    try:
        found = json.loads((path / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: {path}: expected a finished run: {one_line(error)}") from error
    if "training" not in found:
        raise ConfigError(f"{setting}: {path}: expected a run of metalr train, found results of something else")
    return found


def _tried(choosing: Sequence[Path], compared: Sequence[Path]) -> list[Path]:
    """The runs that settings were chosen between, each once, without those compared, which are charged already."""
    every = [path for given in choosing for path in (_swept(given) if (given / "drawn.jsonl").is_file() else [given])]
    own = {path.resolve() for path in compared}
    return [*{path.resolve(): path for path in every if path.resolve() not in own}.values()]


def _swept(sweep: Path) -> list[Path]:
    """The finished runs of a sweep. Raises ConfigError if there are none."""
    found = sorted(file.parent for file in (sweep / "runs").glob("*/results.json"))
    if not found:
        raise ConfigError(f"choosing: {sweep}: expected a sweep with finished runs, found none")
    return found


def _paid(results: dict[str, Any]) -> float:
    """Example-gradients of a run's meta-training, validations and what it started from among them."""
    return float(results["training"]["example_gradients"])


def load_runs(runs: Sequence[Path], own: Own, setting: str = "runs") -> tuple[list[Learner], list[dict[str, Any]]]:
    """The learners of finished runs and their results. Raises ConfigError unless they differ in their seed only."""
    if not runs:
        raise ConfigError(f"{setting}: expected at least one run folder, got none")
    if len({Path(path).resolve() for path in runs}) < len(runs):
        raise ConfigError(f"{setting}: expected different run folders, got {[str(path) for path in runs]}")
    configs = [read_config(path) for path in runs]
    for path, config in zip(runs, configs, strict=True):
        free = ("seed", "evaluation", "data", *training.JOB.may_change)
        changed = [
            name
            for name in differences(configs[0], config)
            if not any(name == one or name.startswith(f"{one}.") for one in free)
        ]
        changed = [
            name for name in changed if name != "init" or not (config.init and configs[0].init)
        ]  # each seed's own
        if changed:
            raise ConfigError(
                f"{setting}: expected runs that differ in their seed only, {path} also in {sorted(changed)}"
            )
    same = [seed for seed, init in collections.Counter((c.seed, str(c.init)) for c in configs).items() if init > 1]
    if same:
        raise ConfigError(
            f"{setting}: expected runs of different seeds, because each counts as one more, got {same[0][0]} twice"
        )
    results = [_results(path, setting) for path in runs]
    for path, found in zip(runs, results, strict=True):
        if (found.get("data", {}).get("source") == folders.OWN_TASKS) != (own.given is not None):
            whose = "data that it names" if own.given is not None else "tasks of your own; pass them as given=..."
            raise ConfigError(f"{setting}: {path} is of {whose}")
        if own.given is not None and own.given.sha256 != _data_sha256(found):
            raise ConfigError(f"given: expected the tasks of {path}, got others ({own.given.name!r}, by facts)")
        if _data_sha256(found) != _data_sha256(results[0]):
            raise ConfigError(
                f"{setting}: expected runs that differ in their seed only, {path} has other data than {runs[0]}"
            )
    return [artifact.load(path / "artifact", own.model, own.objective) for path in runs], results


def _data_sha256(results: dict[str, Any]) -> Any:
    return results.get("data", {}).get("sha256")


def regime(shot: int) -> str:
    """What tables call tasks with so many support examples, of each class where there are classes."""
    return "few-shot" if shot <= FEW_SHOTS else "full"


def _field_of_images(
    trained: TrainConfig, config: CompareConfig, learner: Learner, dataset: data.Dataset
) -> tuple[Field, dict[str, Any]]:
    """The held-out image tasks, and what a result says of them."""
    shot, query = (getattr(config, name) or getattr(trained.tasks, name) for name in ("shot", "query"))
    family, way = config.family or trained.tasks.family, trained.tasks.way
    if dataset.shape != learner.model.image_shape:
        raise ConfigError(f"data: expected images of shape {learner.model.input_shape}, got {dataset.shape}")
    splits = tasks.make_splits(dataset, family, turns=trained.tasks.turns)
    noise = trained.tasks.label_noise if config.label_noise is None else config.label_noise
    parts = tasks.make_samplers(splits, way, shot, query, label_noise=noise)
    field = _field(config, learner, parts.test, parts.validation, way * shot)
    return field, {
        "family": family,
        "regime": regime(shot),
        "data": str(dataset),
        "data_sha256": dataset.sha256,
        "split_sha256": splits.sha256,
        "trained_on": {"data": trained.data, "family": trained.tasks.family},
        "tasks": config.tasks,
        "searched_tasks": config.searched,
        "support": way * shot,
        "query": way * query,
        "label_noise": noise,
    }


def _field_of_tasks(
    trained: TrainConfig, config: CompareConfig, learner: Learner, given: Tasks
) -> tuple[Field, dict[str, Any]]:
    """The held-out tasks of a table or of Python, and what a result says of them."""
    for name in ("data", "family", "shot", "query", "label_noise"):
        if getattr(config, name) is not None:
            raise ConfigError(f"{name}: expected None, with tasks that are no images, got {getattr(config, name)!r}")
    if given.standardisation is not None and not given.standardisation.same_as(learner.standardisation):
        raise ConfigError("given: expected tasks that are standardised as those of the runs, got others")
    test, validation = given.sampler("test"), given.sampler("validation")
    shapes = jax.eval_shape(test[1], test[0], jax.random.key(0))
    support, query = count(shapes.support_y), count(shapes.query_y)
    field = _field(config, learner, test, validation, support)
    return field, {
        "family": given.name,
        "regime": regime(support // (learner.model.classes if learner.objective.targets == "classes" else 1)),
        "data": given.name,
        "data_sha256": given.sha256,
        "split_sha256": given.sha256,
        "trained_on": {"data": trained.data, "family": given.name},
        "tasks": config.tasks,
        "held_out_tasks": config.tasks if field.groups is None else len(np.unique(field.groups)),
        "searched_tasks": config.searched,
        "support": support,
        "query": query,
    }


def _field(config: CompareConfig, learner: Learner, test: Any, validation: Any, support: int) -> Field:
    """test, validation: (pool, sampler) each; support: examples of a support set."""
    size = min(config.batch_size or learner.spec.minibatch(support) or support, support)
    keys = protocol.episode_keys(config.seed, config.tasks)
    tuning = protocol.episode_keys(config.seed, config.tuning_tasks)
    if config.part == "validation":  # all methods meet tasks of meta-validation, other ones than those tuned on
        test, (keys, tuning) = validation, _two_parts(config, *validation)
    pool, sample = test
    groups = protocol.groups_of(sample, pool, keys)
    return Field(
        test,
        validation,
        keys,
        tuning,
        support,
        count(fit.hold_out(jax.jit(sample)(pool, keys[0]), by_class=learner.objective.of_classes).train_y),
        tuple(sorted({max(1, round(length * (support // size))) for length in config.lengths})),
        size,
        learner.objective,
        config.early_stopping,
        groups,
    )


def _two_parts(config: CompareConfig, pool: Any, sample: Any) -> tuple[jax.Array, jax.Array]:
    """Keys of meta-validation tasks to be judged on, and of others to be tuned on.

    Where tasks can be counted, every other task is for tuning: their keys would draw the same ones again.

    Raises ConfigError where there is one task alone.
    """
    wanted = config.tasks, config.tuning_tasks
    keys = protocol.episode_keys(config.seed, sum(wanted))
    groups = protocol.groups_of(sample, pool, keys)
    if groups is None:
        return keys[: config.tasks], keys[config.tasks :]
    while True:
        known = np.unique(groups)
        if len(known) < 2:
            raise ConfigError("part: expected test, because there is one meta-validation task alone, got validation")
        judged = np.isin(groups, known[::2])
        if judged.sum() >= wanted[0] and (~judged).sum() >= wanted[1]:
            return keys[judged][: wanted[0]], keys[~judged][: wanted[1]]
        keys = protocol.episode_keys(config.seed, 2 * len(keys))
        groups = protocol.groups_of(sample, pool, keys)
        assert groups is not None


def _carry_out(parts: _Parts, config: CompareConfig, folder: Path, reporter: Reporter) -> dict[str, Any]:
    began = time.perf_counter()
    folders.remember_data(folder, config.data or parts.facts["trained_on"]["data"], parts.facts["data_sha256"])
    left_out = sorted({*config.searchers} - {*parts.searchers}) if config.searched else []
    if left_out:
        base = parts.learners[0].spec.base
        names = ", ".join(left_out)
        reporter.line(f"left out    {names}, which tries the learned rates as Adam's: these scale {base}")
    with stoppable(f"stopped; finished searches are kept; go on with: metalr compare --resume {folder}") as between:
        rows = _single(parts, config, reporter, between)
        if config.searched:
            rows += _searches(parts, config, folder, between, reporter)
    reference, objective = rows[: len(parts.field.lengths)], parts.field.objective
    results = {
        "command": command(),
        "config": config.to_json(),
        "provenance": provenance(),
        "seeds": [learner.facts.get("seed") for learner in parts.learners],
        **parts.facts,
        "part": config.part,
        "searchers_left_out": left_out,
        "choosing_example_gradients": round(parts.choosing),
        "metric": {"name": objective.choose_by, "maximise": objective.maximise},
        "rows": [_row(row, reference, objective, parts.field.groups) for row in rows],
        "conclusions": [_conclusion(row, reference, objective, parts.choosing) for row in rows[len(reference) :]],
        "seconds": round(time.perf_counter() - began, 1),
        "peak_memory_bytes": peak_memory(),
    }
    folders.write_json(folder / "results.json", results)
    return results | {"folder": str(folder)}


def _single(parts: _Parts, config: CompareConfig, reporter: Reporter, between: Callable[[], None]) -> list[Scores]:
    """All methods that take one run a task; learned init and rates first."""
    learners, field = parts.learners, parts.field
    alone = learners[0].rates_alone
    model = learners[0].model
    runs, rate_free = rivals.baselines(model, field), rivals.rate_free_runs(model, field)
    of_learners = rivals.learned_runs(learners, field)
    inits: dict[str, rivals.Inits] = {"random": [None]}
    inits |= {} if alone else {"learned": [learner.init for learner in learners]}
    inits |= {"pre-trained": [learner.init for learner in parts.joint]} if parts.joint else {}
    methods: list[tuple[str, Callable[[], list[Scores]]]] = [
        ("learned", lambda: rivals.learned(learners, field, of_learners, random_init=alone))
    ]
    if not alone:
        methods.append(("learned", lambda: rivals.learned(learners, field, of_learners, random_init=True)))
    for name, of in inits.items():
        for baseline in (rivals.unsearched, rivals.tuned):
            methods.append((name, functools.partial(baseline, name, of, field, runs)))
        for optimizer in config.rivals if name != "learned" else ():  # rivals of all that was learned
            methods.append((name, functools.partial(rivals.without_search, name, of, field, rate_free, optimizer)))
    rows: list[Scores] = []
    with reporter.bar("methods without a search", len(methods)) as advance:
        for origin, method in methods:
            between()
            rows += [row._replace(paid_once=row.paid_once + parts.paid_once[origin]) for row in method()]
            last = rows[-1]
            steps = last.chosen.get("steps", last.steps)
            advance(1, f"{last.method}: {report.shown(last.mean, field.objective.choose_by)} after {steps} steps")
    return rows


def _searches(
    parts: _Parts, config: CompareConfig, folder: Path, between: Callable[[], None], reporter: Reporter
) -> list[Scores]:
    """What every task's own searches find at every budget."""
    inits: dict[str, rivals.Inits] = {"random": [None]}
    inits |= {"pre-trained": [learner.init for learner in parts.joint]} if parts.joint else {}
    warm = rivals.as_trial(parts.learners[0], parts.space)
    own = {"random": [name for name in parts.searchers if name != PORTFOLIO]}
    own |= {origin: [name for name in own["random"] if name == "grid"] for origin in inits if origin != "random"}
    portfolios = [*rivals.PORTFOLIOS] if PORTFOLIO in parts.searchers else []
    known = _read_searches(folder / SEARCHES)
    total = config.searched * sum(len(names) + len(portfolios) for names in own.values())
    total += config.tuning_tasks * len(inits) if portfolios else 0
    with reporter.bar("searches", total, len(known)) as advance:

        def keep(key: Key, found: Searched) -> None:
            row = dict(zip(("init", "searcher", "task"), key, strict=True)) | found._asdict()
            folders.append_rows(folder / SEARCHES, [row | {"trials": [trial.to_json() for trial in found.trials]}])
            advance(1, f"task {key[2]}, {key[1]} from the {key[0]} init")

        def search(
            field: Field, wanted: dict[str, list[str]], first: dict[str, list[dict[str, Any]]]
        ) -> dict[Key, Searched]:
            return rivals.searched(
                parts.learners[0].model, field, parts.space, wanted, inits, first=first, cells=max(config.budgets),
                known=known, keep=keep, between=between,
            )  # fmt: skip

        field = parts.field._replace(keys=parts.field.keys[: config.searched])
        found = search(field, own, {WARM: [warm]} if warm else {})
        tuned: dict[str, list[Searched]] = {}
        if portfolios:
            validation = field._replace(sampler=field.val_sampler, keys=field.val_keys)
            grids = search(validation, {origin: [rivals.GRID_OF_VALIDATION] for origin in inits}, {})
            for origin in inits:
                numbers = range(config.tuning_tasks)
                tuned[origin] = [grids[(origin, rivals.GRID_OF_VALIDATION, task)] for task in numbers]
                cells = rivals.portfolio(tuned[origin], config.space, max(rivals.PORTFOLIOS.values()), field.objective)
                first = {name: cells[:size] for name, size in rivals.PORTFOLIOS.items()}
                found |= search(field, {origin: portfolios}, first)
    rows: list[Scores] = []
    for origin, names in own.items():
        for name in [*names, *portfolios]:
            each = [found[(origin, name, task)] for task in range(config.searched)]
            extra = parts.paid_once["learned"] if name == WARM else parts.paid_once[origin]
            if name in portfolios:
                new = _rows_of_portfolio(f"{origin} init + {name}", each, field.objective)
                extra += sum(trials_lib.cost(one.trials, grid=True)[0] for one in tuned[origin])
            else:
                new = _rows_of_search(f"{origin} init + ", name, each, parts, config.budgets)
            rows += [row._replace(paid_once=extra) for row in new]
    return rows


def _read_searches(file: Path) -> dict[Key, Searched]:
    """The finished searches of a comparison. Raises ConfigError for a file of something else."""
    known = {}
    try:
        for row in folders.read_rows(file):
            trials = [trials_lib.Trial.from_json(trial) for trial in row["trials"]]
            again = row["again"], row["again_example_gradients"]
            known[(row["init"], row["searcher"], row["task"])] = Searched(trials, *again)
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{file}: not the searches of a comparison: {one_line(error)}") from error
    return known


def _rows_of_search(
    title: str, name: str, found: Sequence[Searched], parts: _Parts, budgets: Sequence[float]
) -> list[Scores]:
    """A search at every budget, its winner trained again on all, and of a grid the best cell on the test part."""
    grid, title = name == "grid", title + {WARM: "tpe, learned rates first"}.get(name, name)
    cell = rivals.mean_cost(parts.space.fitting(parts.field.train), parts.field.train)
    within = {f"{title}, {len(found[0].trials)} cells": np.inf} if grid else {
        f"{title}, cost of {budget:g} cells": budget * cell for budget in sorted(budgets)
    }  # fmt: skip
    best_of = functools.partial(rivals.best_of, grid=grid, objective=parts.field.objective)
    rows = [best_of(text, found, budget) for text, budget in within.items()]
    rows.append(best_of(f"{[*within][-1]}, trained again on all", found, choose="again"))
    return [*rows, best_of(f"{title}, best cell on the test part", found, choose="test")] if grid else rows


def _rows_of_portfolio(title: str, found: Sequence[Searched], objective: Objective) -> list[Scores]:
    """The best of a portfolio's cells, and trained again on all; of one cell, where nothing is chosen, that alone."""
    again = rivals.best_of(f"{title}, trained again on all", found, choose="again", objective=objective)
    if len(found[0].trials) > 1:
        return [rivals.best_of(title, found, objective=objective), again]
    cost = float(np.mean([one.again_example_gradients for one in found]))
    return [again._replace(method=title, example_gradients=cost, naive_example_gradients=cost)]


def _row(
    row: Scores, reference: list[Scores], objective: Objective, groups: np.ndarray | None = None
) -> dict[str, Any]:
    """A row as JSON: its score, and the learned method's difference, at no more cost and at its longest run.

    groups: of the episodes, as of protocol.half_width.
    """
    facts = protocol.row(row.method, row.steps, row.scores, objective.choose_by, groups=groups) | {
        "tasks": row.scores.shape[1],
        "example_gradients": round(row.example_gradients),
        "naive_example_gradients": round(row.naive_example_gradients),
        "paid_once_example_gradients": round(row.paid_once),
        "seconds": round(row.seconds, 4),
        "compile_seconds": None if row.compile_seconds is None else round(row.compile_seconds, 2),
        "chosen": row.chosen,
    }
    spent = row.steps, row.example_gradients
    affordable = [one for one in reference if report.tables.no_dearer((one.steps, one.example_gradients), spent)]
    for name, against in (("at_equal_cost", affordable), ("at_the_end", reference)):
        if against:
            facts[f"learned_minus_this_{name}"] = protocol.difference_of(against[-1].scores, row.scores, groups)
    return facts


def _conclusion(row: Scores, reference: list[Scores], objective: Objective, choosing: float) -> dict[str, Any]:
    """The cost at which the learned method is as good as this row, and the tasks after which it has paid.

    choosing: what was spent on choosing the settings of meta-training, charged in one of the two break-even counts.
    """
    number = row.scores.shape[1]
    first = next(
        (one for one in reference if not objective.better(row.mean, float(one.scores[:, :number].mean()))), None
    )
    facts = {"method": row.method, "steps": row.steps, objective.choose_by: protocol.rounded(row.mean)}
    if first is None:
        return facts | {"learned_reaches_it_with": None}
    saved = row.example_gradients - first.example_gradients

    def break_even(extra: float) -> int | None:
        owed = max(0.0, first.paid_once + extra - row.paid_once)
        return None if saved <= 0 else int(np.ceil(owed / saved))

    return facts | {
        "learned_reaches_it_with": round(first.example_gradients),
        "share_of_its_cost": round(first.example_gradients / row.example_gradients, 5),
        "share_of_its_naive_cost": round(first.example_gradients / row.naive_example_gradients, 5),
        "break_even_tasks": break_even(0.0),
        "break_even_tasks_with_choosing": break_even(choosing),
    }
