"""What a config stands for: every part checked and made, before anything is compiled or written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from metalr import data, models, outer, tasks
from metalr.config import GridConfig, InnerConfig, ModelConfig, SearchConfig, TrainConfig
from metalr.config.files import check_literals, differences, from_json
from metalr.errors import ConfigError, check_choices, check_seed
from metalr.evaluation import small_grid
from metalr.inner import hyperparameters, optimizers
from metalr.inner.hyperparameters import RatesSpec
from metalr.inner.objective import CROSS_ENTROPY, Objective, objective_of
from metalr.models import Model
from metalr.outer import (
    Evolution,
    Forward,
    Implicit,
    Joint,
    Method,
    Reptile,
    Reverse,
    TaskSize,
    algorithms,
    devices,
    loop,
)
from metalr.runs import loggers
from metalr.runs.sources import Source, load, model_of_table, of_images, of_tasks

CLASSES_START, NUMBERS_START = 0.1, 0.01  # rates: a squared error is steeper than a cross-entropy


DERIVATIVES: dict[str, Callable[[bool, InnerConfig], Method]] = {  # (first order?, settings) -> the way
    "reverse": lambda simple, inner: Reverse(simple),
    "remat": lambda simple, inner: Reverse(simple, remat=True),
    "truncated": lambda simple, inner: Reverse(simple, remat=True, last=inner.last),
    "forward": lambda simple, inner: Forward(simple),
    "evolution": lambda simple, inner: Evolution(inner.pairs),
}


RATES_ONLY = ("rates", "rates_of_init")  # of outer.learns: the init does not learn


class Amount(NamedTuple):
    """How much data tasks of meta-training have: the size of their support set, and who draws such tasks."""

    support: int
    train: tasks.Sampler
    validation: tasks.Sampler


class Setup(NamedTuple):
    """The parts of a run.

    Attributes:
      parts: what each split is drawn from, and who draws.
      support, query: examples of one task.
      sizes: of tasks that meta-training and validation go over instead (tasks.shots).
      learned: whether the outer loop changes the rates.
    """

    source: Source
    model: Model
    spec: RatesSpec
    method: Method
    phases: loop.Phases
    optimizer: optax.GradientTransformation
    parts: tasks.Parts
    learned: bool
    objective: Objective
    support: int
    query: int
    sizes: tuple[Amount, ...] = ()
    standardisation: tasks.Standardisation | None = None
    prefetch: Callable[[jax.Array], None] | None = None

    @property
    def amounts(self) -> tuple[Amount, ...]:
        """What meta-training and validation go over: tasks of one size, or of several."""
        return self.sizes or (_amount(self.support, self.parts),)


def _amount(support: int, parts: tasks.Parts) -> Amount:
    return Amount(support, parts.train.sample, parts.validation.sample)


class Settings(NamedTuple):
    """What a config says by itself, without its data."""

    row: algorithms.Algorithm
    spec: RatesSpec
    objective: Objective
    optimizer: optax.GradientTransformation


def check_settings(config: TrainConfig, model: Model | None = None, objective: Objective | None = None) -> Settings:
    """Check all of a config that needs no data. Arguments, and what is raised, are those of `set_up`."""
    objective = objective_of(config.objective) if objective is None else objective
    if config.outer.calibrate:
        objective = objective.calibrated()
    check_choices_of(config, model)
    row = _row_of(config)
    spec = _spec_of(config, row, objective)
    _check_rules(config, row)
    _check_counts(config, row)
    try:
        hyperparameters.check_steps(spec, config.curve_steps)
    except ConfigError as error:
        raise ConfigError(f"evaluation.{error}") from error
    loggers.check(config.loggers)
    if config.grid.run:
        grid_of(config)
    optimizer = loop.make_optimizer(
        steps=config.outer.steps,
        init_rate=None if config.outer.learns in RATES_ONLY else config.outer.init_rate,
        rates_rate=config.outer.rates_rate if row.learned else None,
        clip=config.outer.clip,
        schedule=config.outer.schedule,
        base=optimizers.by_name(config.outer.optimizer, "outer.optimizer"),
    )
    return Settings(row, spec, objective, optimizer)


def set_up(
    config: TrainConfig,
    model: Model | None = None,
    given: data.Dataset | tasks.Tasks | None = None,
    *,
    objective: Objective | None = None,
) -> Setup:
    """Check a config and make its parts.

    Args:
      model: a network of your own, instead of config.model.
      given: the data, or tasks of your own (with a model); default: what config.data names.
      objective: one of your own, instead of config.objective.

    Raises:
      MetalrError: naming the setting, what was expected and what came.
    """
    row, spec, objective, optimizer = check_settings(config, model, objective)
    given = load(config) if given is None else given
    standardisation = prefetch = None
    if isinstance(given, data.Dataset):
        if objective.name != CROSS_ENTROPY.name:
            raise ConfigError(f"objective: expected {CROSS_ENTROPY.name} with images, got {objective.name!r}")
        source, parts, by_size = of_images(config, given)
        model = model_of(config.model, config.tasks.way, given, model, row.head_start, config.inner.views)
        support, query = config.tasks.way * config.tasks.shot, config.tasks.way * config.tasks.query
    else:
        if model is None:
            model = model_of_table(config, given, row.head_start, config.inner.views)
        elif row.head_start != "learned":
            raise ConfigError(f"inner.head_start: expected learned with a network of your own, got {row.head_start!r}")
        standardisation, prefetch = given.standardisation, given.prefetch
        if standardisation is not None:
            objective = objective.in_units(standardisation.outputs)
        source, parts, support, query = of_tasks(given, given.check(model, objective))
        by_size = {}
    spec = dataclasses.replace(spec, head=model.head)
    if config.inner.support_power is not None:
        spec = dataclasses.replace(spec, support_power=config.inner.support_power, support=support)
    outer.initial_shapes(model, spec)
    method = _method_of(config, row, spec, model)
    if model.start is not None and not isinstance(method, Reverse):
        raise ConfigError(
            f"inner.head_start: expected learned with {config.inner.algorithm} and {method}, which need a head that "
            f"stays what it is, got {row.head_start!r}"
        )
    if row.multi_step and not (isinstance(method, Reverse) and method.last is None):
        raise ConfigError(
            f"outer.multi_step: expected 0 with {config.inner.algorithm} and inner.derivative {config.inner.derivative}"
            f"{f' ({method})' if config.inner.derivative == 'auto' else ''}, which see the last step only, "
            f"got {row.multi_step}"
        )
    phases = loop.Phases(
        round(row.first_order_share * config.outer.steps),
        round(row.multi_step * config.outer.steps),
        config.outer.learns == "rates",
        config.inner.horizons,
        (*(() if row.learned else ("rates",)), *(("init",) if config.outer.learns == "rates_of_init" else ())),
    )
    if config.outer.part == "validation":
        parts, prefetch = parts._replace(train=parts.validation), None
        by_size = {size: of._replace(train=of.validation) for size, of in by_size.items()}
    amounts = tuple(_amount(size, of) for size, of in by_size.items())
    rest = row.learned, objective, support, query, amounts, standardisation, prefetch
    return Setup(source, model, spec, method, phases, optimizer, parts, *rest)


def _row_of(config: TrainConfig) -> algorithms.Algorithm:
    """The algorithm's row with what the settings change of it. Raises ConfigError."""
    row = algorithms.algorithm_row(config.inner.algorithm)
    shares = {name: getattr(config.outer, name) for name in ("multi_step", "first_order_share")}
    changed = dataclasses.asdict(config.inner) | shares
    row = row._replace(**{k: v for k, v in changed.items() if k in row._fields and v is not None})
    if config.outer.learns == "init":
        if config.inner.learned:
            raise ConfigError("inner.learned: expected None or False with outer.learns init, got True")
        row = row._replace(learned=False)
    return row


def _spec_of(config: TrainConfig, row: algorithms.Algorithm, objective: Objective) -> RatesSpec:
    """What is learned of the inner loop; without the name of the head and the size of tasks, which others know.

    Raises ConfigError.
    """
    given = dataclasses.asdict(config.inner)
    same = ({field.name for field in dataclasses.fields(RatesSpec)} & set(given)) - {"steps", "support_power"}
    start = NUMBERS_START if objective.targets == "numbers" else CLASSES_START
    if optimizers.needs_no_rate(config.inner.base):
        start = 1.0
    return RatesSpec(
        **{name: getattr(row, name, given[name]) for name in same},
        positive=not config.inner.signed,
        steps=config.inner.steps,
        initial=start if config.inner.rate is None else config.inner.rate,
    )


def _check_rules(config: TrainConfig, row: algorithms.Algorithm) -> None:
    """Raises ConfigError for settings that contradict the algorithm or each other."""
    if row.meta_gradient != "query" and row.learned:
        raise ConfigError(
            f"inner.learned: expected False with {config.inner.algorithm}, whose meta-gradient does not move rates, "
            "got True"
        )
    learns = config.outer.learns
    if learns in RATES_ONLY and not row.learned:
        raise ConfigError(
            f"outer.learns: expected both or init with fixed rates ({config.inner.algorithm}), got {learns!r}"
        )
    if learns == "rates_of_init" and config.init is None:
        raise ConfigError("init: expected a run or an artifact with outer.learns rates_of_init, got None")
    if config.outer.part == "validation" and learns not in RATES_ONLY:
        raise ConfigError(
            f"outer.part: expected train unless outer.learns is one of {RATES_ONLY} (an init that learned on "
            f"meta-validation tasks could not be chosen by them), got validation with {learns}"
        )
    if config.inner.derivative == "evolution" and learns not in RATES_ONLY and row.meta_gradient == "query":
        raise ConfigError(
            f"inner.derivative: expected evolution only with outer.learns one of {RATES_ONLY} (it moves few numbers, "
            f"not an init), got it with {learns}"
        )
    if config.inner.derivative == "evolution" and config.inner.signed:
        raise ConfigError(
            "inner.signed: expected False with inner.derivative evolution, whose noise is a share of positive rates, "
            "got True"
        )
    if row.meta_gradient == "implicit" and row.proximal is None:
        raise ConfigError("inner.proximal: expected a positive number with an implicit meta-gradient, got None")
    if config.curve_steps < config.inner.steps:
        raise ConfigError(
            f"evaluation.steps: expected at least inner.steps ({config.inner.steps}), at which results are reported, "
            f"got {config.curve_steps}"
        )
    _check_horizons(config, row)
    _check_sizes(config)


LEAST = {  # of settings that count something
    "inner.last": 1, "inner.pairs": 1, "inner.solver_steps": 1, "outer.validate_every": 1, "outer.checkpoint_every": 1,
    "outer.meta_batch": 1, "evaluation.episodes": 2, "evaluation.validation_episodes": 2,
}  # fmt: skip


def _check_counts(config: TrainConfig, row: algorithms.Algorithm) -> None:
    """Raises ConfigError for numbers out of their range."""
    for name, seed in (("seed", config.seed), ("evaluation.seed", config.evaluation.seed)):
        check_seed(name, seed)
    for name in ("multi_step", "first_order_share"):
        if not 0 <= getattr(row, name) <= 1:
            raise ConfigError(f"outer.{name}: expected a share of the outer steps, 0..1, got {getattr(row, name)}")
    for name, least in LEAST.items():
        section, _, field = name.partition(".")
        value = getattr(getattr(config, section), field)
        if value < least:
            raise ConfigError(f"{name}: expected at least {least}, got {value}")
    if not 0 <= config.evaluation.shown_tasks <= 3:
        raise ConfigError(f"evaluation.shown_tasks: expected 0 to 3, got {config.evaluation.shown_tasks}")


def _check_horizons(config: TrainConfig, row: algorithms.Algorithm) -> None:
    """Raises ConfigError for horizons that cannot be trained at, and for a power that could not be learned."""
    check_choices("inner.horizons", config.inner.horizons, empty=True)
    if config.inner.horizons and (row.multi_step or row.meta_gradient == "joint" or min(config.inner.horizons) < 1):
        raise ConfigError(
            "inner.horizons: expected numbers of inner steps of at least 1, an algorithm that takes inner steps, and "
            f"outer.multi_step 0; got {config.inner.horizons}, {config.inner.algorithm}, {row.multi_step}"
        )
    longest = max((config.inner.steps, *config.inner.horizons))
    if config.inner.extend == "error" and longest > config.inner.steps:
        raise ConfigError(
            f"inner.horizons: expected at most inner.steps {config.inner.steps} with inner.extend error, got {longest}"
        )
    if config.inner.horizon_power is not None and len(config.inner.horizons) < 2:
        raise ConfigError(
            "inner.horizon_power: expected None unless inner.horizons are two or more, from which it is learned, got "
            f"{config.inner.horizon_power}"
        )


def _check_sizes(config: TrainConfig) -> None:
    """Raises ConfigError for sizes of tasks that are none, and for a power that could not be learned from them."""
    check_choices("tasks.shots", config.tasks.shots, empty=True)
    if config.inner.support_power is not None and len(config.tasks.shots) < 2:
        raise ConfigError(
            "inner.support_power: expected None unless tasks.shots are two or more, from which it is learned, got "
            f"{config.inner.support_power}"
        )


def _method_of(config: TrainConfig, row: algorithms.Algorithm, spec: RatesSpec, model: Model) -> Method:
    """The way to the meta-gradient, with its options."""
    inner, simple = config.inner, row.first_order
    if row.meta_gradient != "query":
        others: dict[str, Method] = {"joint": Joint(), "reptile": Reptile(), "implicit": Implicit(inner.solver_steps)}
        return others[row.meta_gradient]
    if inner.derivative == "auto":
        longest = dataclasses.replace(spec, steps=max((spec.steps, *inner.horizons)))
        return outer.choose_derivative(longest, model, inner.last, first_order=simple)
    return DERIVATIVES[inner.derivative](simple, inner)


def check_choices_of(config: TrainConfig | SearchConfig, model: Model | None) -> None:
    """Raises ConfigError for a wrong type, for none of a setting's choices, and if a network of your own is missing."""
    if model is None and config.model.own:
        raise ConfigError("model: these settings are of a network of your own; expected it as model=..., got None")
    named = config if model is None else dataclasses.replace(config, model=type(config)().model)
    from_json(named.to_json(), type(named))  # the types, as in a config file
    check_literals(named)
    _check_used(named, type(named)())


def _check_used(config: TrainConfig | SearchConfig, default: TrainConfig | SearchConfig) -> None:
    """Raises ConfigError for a setting that was given and does nothing beside the others: it would be ignored."""
    unused: dict[str, str] = {}  # dotted name -> why
    if not config.model.own:
        taken = {"name", *config.model.settings()}
        for field in dataclasses.fields(config.model):
            if field.name not in taken:
                unused[f"model.{field.name}"] = f"the network {config.model.name} takes {sorted(taken - {'name'})}"
    if isinstance(config, TrainConfig):
        unused |= _unused_in_training(config)
        if data.is_table(config.data):
            why = "a table's tasks are its rows by --data.task-column, with --data.shot and --data.query"
            unused |= {f"tasks.{field.name}": why for field in dataclasses.fields(config.tasks)}
        else:
            why = f"only with --data FILE.csv or FILE.parquet, and not with {config.data}"
            unused |= {f"table.{field.name}": why for field in dataclasses.fields(config.table)}
    elif config.task is None:
        unused |= {f"tasks.{field.name}": "only with --task" for field in dataclasses.fields(config.tasks)}
    else:
        unused |= {"tasks.shots": "a search is of one task", "tasks.distort": "only meta-training tasks are distorted"}
    changed = differences(default, config)
    for name, why in unused.items():
        if name in changed:
            expected, got = changed[name]
            name = name.replace("table.", "data.")  # as the flags have it
            raise ConfigError(f"{name}: expected {expected!r}, because nothing else is used here ({why}), got {got!r}")


def _unused_in_training(config: TrainConfig) -> dict[str, str]:
    """Settings of a run that its other settings leave nothing to do: dotted name -> why."""
    inner, row = config.inner, algorithms.algorithm_row(config.inner.algorithm)
    learned = row.learned if inner.learned is None else inner.learned
    unused: dict[str, str] = {}
    if inner.derivative not in ("auto", "truncated"):
        unused["inner.last"] = "only with inner.derivative truncated"
    if inner.derivative != "evolution":
        unused["inner.pairs"] = "only with inner.derivative evolution"
    else:
        why = "with evolution, no derivative goes through the inner steps"
        unused |= {"inner.first_order": why, "outer.first_order_share": why}
    if (inner.head_start or row.head_start) != "prototypes":
        unused["inner.views"] = "only with inner.head_start prototypes"
    if row.meta_gradient != "implicit":
        unused["inner.solver_steps"] = "only with inner.algorithm imaml"
    if row.meta_gradient != "query":
        why = f"{inner.algorithm} does not differentiate through the inner steps"
        unused |= dict.fromkeys(("inner.derivative", "inner.last", "inner.first_order", "outer.first_order_share"), why)
    elif row.first_order if inner.first_order is None else inner.first_order:
        unused["outer.first_order_share"] = "all outer steps are first order"
    if row.meta_gradient not in ("query", "implicit"):
        unused["outer.calibrate"] = f"{inner.algorithm} has no query loss"
    if not (row.per_step if inner.per_step is None else inner.per_step):
        unused["inner.extend"] = "only with rates for every step"
    if not learned or config.outer.learns == "init":
        unused |= dict.fromkeys(("outer.rates_rate", "inner.lowest", "inner.highest"), "rates do not learn")
    if config.outer.learns in RATES_ONLY:
        unused["outer.init_rate"] = "the init does not learn"
    if config.outer.part == "validation":
        unused["tasks.distort"] = "only meta-training tasks are distorted, and outer.part is validation"
    if not config.grid.run:
        unused |= {f"grid.{field.name}": "only with --grid.run" for field in dataclasses.fields(config.grid)[1:]}
    return unused


def model_of(
    config: ModelConfig,
    way: int,
    dataset: data.Dataset,
    given: Model | None = None,
    head_start: str = "learned",
    views: int = 0,
) -> Model:
    """The network for a dataset: the given one if it fits, or what the config says. Raises ConfigError."""
    if given is None:
        return models.build(config.name, way, dataset.shape, **config.settings(), head_start=head_start, views=views)
    if head_start != "learned":
        raise ConfigError(f"inner.head_start: expected learned with a network of your own, got {head_start!r}")
    if (given.way, given.input_shape) != (way, dataset.shape):
        raise ConfigError(
            f"model: expected {way} outputs for images of shape {list(dataset.shape)}, got {given.way} for "
            f"{None if given.input_shape is None else list(given.input_shape)}"
        )
    return given


def grid_of(config: TrainConfig) -> GridConfig:
    """The small grid; always with the trained number of steps among its own. Raises ConfigError for a bad one."""
    small_grid.check(config.grid)
    return dataclasses.replace(config.grid, steps=tuple(sorted({*config.grid.steps, config.inner.steps})))


def task_cost(config: TrainConfig, setup: Setup) -> float:
    """Example-gradients of one task: of where it starts, its inner steps, and its query set; docs/long.md."""
    method = setup.method
    numbers = sum(leaf.size for leaf in outer.initial_shapes(setup.model, setup.spec).rates.values())
    share = setup.phases.first_order_until / config.outer.steps
    start = setup.model.settings.get("head_start", models.LEARNED_HEAD)
    looked_at = config.inner.views + 1 if start in models.HEAD_STARTS and models.HEAD_STARTS[start].features else 0

    def of_variant(support: int, steps: int) -> float:
        size = TaskSize(min(config.inner.batch_size or support, support), support, setup.query, numbers)
        cost = method.cost(steps, size)
        if share and isinstance(method, (Reverse, Forward)):
            cost = share * dataclasses.replace(method, first_order=True).cost(steps, size) + (1 - share) * cost
        return cost + looked_at * support

    horizons = setup.phases.horizons or (config.inner.steps,)
    costs = [of_variant(amount.support, steps) for amount in setup.amounts for steps in horizons]
    return sum(costs) / len(costs)


def describe(config: TrainConfig, setup: Setup) -> str:
    """The first lines of a run: data, device, task split."""
    local = devices.local_devices()
    return (
        f"data    {setup.source.text}\n"
        f"device  {len(local)} x {local[0].device_kind} ({local[0].platform})\n"
        f"tasks   {setup.source.tasks}; split {setup.source.split_sha256[:12]}"
    )
