"""What a config stands for: every part checked and made, before anything is compiled or written."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalr import data, models, outer, tasks
from metalr.config import ModelConfig, SearchConfig, TrainConfig
from metalr.config.files import check_literals, differences, from_json
from metalr.errors import ConfigError, one_line
from metalr.evaluation import small_grid
from metalr.inner import hyperparameters
from metalr.inner.descent import promoting
from metalr.inner.hyperparameters import RatesSpec
from metalr.inner.objective import CROSS_ENTROPY, Objective
from metalr.models import Model
from metalr.outer import Method, algorithms, loop
from metalr.types import Episode

OWN_TASKS = "tasks given in Python"  # the source of a Tasks


class Source(NamedTuple):
    """Where tasks come from, as plain JSON values that travel with every result.

    Attributes:
      name, source, sha256: of the data, or of a Tasks.
      split_sha256: says whether two results are of the same splits; splits: what each part holds.
      text: the data in a line; tasks: what one task is, in a line.
    """

    name: str
    source: str
    sha256: str
    split_sha256: str
    splits: list[dict[str, Any]]
    text: str
    tasks: str


class Setup(NamedTuple):
    """The parts of a run.

    Attributes:
      samplers: by part of the split: "train", "val", "test".
      support, query: examples of one task.
      learned: whether the outer loop changes the rates.
    """

    source: Source
    model: Model
    spec: RatesSpec
    method: Method
    phases: loop.Phases
    optimizer: optax.GradientTransformation
    samplers: dict[str, tuple[Any, Callable[[Any, jax.Array], Episode]]]
    learned: bool
    objective: Objective
    support: int
    query: int


def set_up(
    config: TrainConfig,
    model: Model | None = None,
    dataset: data.Dataset | None = None,
    *,
    given: tasks.Tasks | None = None,
    objective: Objective = CROSS_ENTROPY,
) -> Setup:
    """Check a config and make its parts.

    Args:
      model: a network of your own, instead of config.model.
      dataset: the data, if it is loaded already; default: what config.data names.
      given: tasks of your own, in place of the data and config.tasks; they come with a model.
      objective: what is minimised and measured.

    Raises:
      MetalrError: naming the setting, what was expected and what came.
    """
    check_choices_of(config, model)
    row = algorithms.algorithm_row(config.inner.algorithm)
    inner_settings = dataclasses.asdict(config.inner)
    shares = {name: getattr(config.outer, name) for name in ("multi_step", "first_order_share")}
    row = row._replace(**{k: v for k, v in (inner_settings | shares).items() if k in row._fields and v is not None})
    if config.outer.learns == "init":
        if config.inner.learned:
            raise ConfigError("inner.learned: expected None or False with outer.learns init, got True")
        row = row._replace(learned=False)
    same = ({field.name for field in dataclasses.fields(RatesSpec)} & set(inner_settings)) - {"steps"}
    spec = RatesSpec(
        **{name: getattr(row, name, inner_settings[name]) for name in same},
        positive=not config.inner.signed,
        steps=config.inner.steps,
        initial=config.inner.rate,
    )
    for name, seed in (("seed", config.seed), ("evaluation.seed", config.evaluation.seed)):
        if not 0 <= seed < 2**32:
            raise ConfigError(f"{name}: expected 0 <= seed < 2^32, got {seed}")
    if row.meta_gradient != "query" and row.learned:
        raise ConfigError(
            f"inner.learned: expected False with {config.inner.algorithm}, whose meta-gradient does not move rates, "
            "got True"
        )
    if config.outer.learns == "rates" and not row.learned:
        raise ConfigError(
            f"outer.learns: expected both or init with fixed rates ({config.inner.algorithm}), got 'rates'"
        )
    if row.meta_gradient == "implicit" and row.proximal is None:
        raise ConfigError("inner.proximal: expected a positive number with an implicit meta-gradient, got None")
    if config.curve_steps < config.inner.steps:
        raise ConfigError(
            f"evaluation.steps: expected at least inner.steps ({config.inner.steps}), at which results are reported, "
            f"got {config.curve_steps}"
        )
    for name in ("multi_step", "first_order_share"):
        if not 0 <= getattr(row, name) <= 1:
            raise ConfigError(f"outer.{name}: expected a share of the outer steps, 0..1, got {getattr(row, name)}")
    for name in ("last", "solver_steps"):
        if getattr(config.inner, name) < 1:
            raise ConfigError(f"inner.{name}: expected at least 1, got {getattr(config.inner, name)}")
    if config.outer.validate_every < 1:
        raise ConfigError(f"outer.validate_every: expected at least 1, got {config.outer.validate_every}")
    if config.outer.checkpoint_every < 1:
        raise ConfigError(f"outer.checkpoint_every: expected at least 1, got {config.outer.checkpoint_every}")
    if config.outer.meta_batch < 1:
        raise ConfigError(f"outer.meta_batch: expected at least 1, got {config.outer.meta_batch}")
    try:
        hyperparameters.check_steps(spec, config.curve_steps)
    except ConfigError as error:
        raise ConfigError(f"evaluation.{error}") from error
    for name in ("episodes", "validation_episodes"):
        if getattr(config.evaluation, name) < 2:
            raise ConfigError(f"evaluation.{name}: expected at least 2, got {getattr(config.evaluation, name)}")
    if config.grid.run:
        if given is not None:
            raise ConfigError("grid.run: expected False with tasks of your own, got True")
        grid_of(config)
    optimizer = loop.make_optimizer(
        steps=config.outer.steps,
        init_rate=None if config.outer.learns == "rates" else config.outer.init_rate,
        rates_rate=config.outer.rates_rate if row.learned else None,
        clip=config.outer.clip,
        schedule=config.outer.schedule,
        base=optax_by_name(config.outer.optimizer),
    )
    if given is None:
        dataset = data.load(config.data) if dataset is None else dataset
        source, samplers = _of_images(config, dataset)
        model = model_of(config.model, config.tasks.way, dataset, model)
        support, query = config.tasks.way * config.tasks.shot, config.tasks.way * config.tasks.query
    else:
        assert model is not None
        given.check(model, objective)
        source, samplers, support, query = _of_tasks(given)
    spec = dataclasses.replace(spec, head=model.head)
    outer.initial_shapes(model, spec)
    chosen: tuple[str, int] = config.inner.derivative, config.inner.last
    if config.inner.derivative == "auto":
        chosen = outer.choose_derivative(spec, model, config.inner.last)
    method = Method(row.meta_gradient, row.first_order, *chosen, config.inner.solver_steps)
    if row.multi_step and (row.meta_gradient != "query" or method.derivative in ("truncated", "forward")):
        raise ConfigError(
            f"outer.multi_step: expected 0 with {config.inner.algorithm} and inner.derivative {method.derivative}"
            f"{' (what auto picks here)' if config.inner.derivative == 'auto' else ''}, which see the last step only, "
            f"got {row.multi_step}"
        )
    phases = loop.Phases(
        round(row.first_order_share * config.outer.steps),
        round(row.multi_step * config.outer.steps),
        config.outer.learns == "rates",
        () if row.learned else ("rates",),
    )
    return Setup(source, model, spec, method, phases, optimizer, samplers, row.learned, objective, support, query)


def _of_images(config: TrainConfig, dataset: data.Dataset) -> tuple[Source, dict[str, Any]]:
    """A family of image tasks and its samplers. Raises MetalrError."""
    t, splits = config.tasks, tasks.make_splits(dataset, config.tasks.family, turns=config.tasks.turns)
    shape = (t.way, t.shot, t.query)
    samplers = {part.part: tasks.make_sampler(part, *shape, label_noise=t.label_noise) for part in splits}
    if t.distort:
        samplers["train"] = tasks.make_sampler(splits.train, *shape, distort=t.distort, label_noise=t.label_noise)
    described = f"{t.family} {t.way}-way {t.shot}-shot, {t.query} query images a class"
    facts = [part.describe() for part in splits]
    return Source(dataset.name, dataset.source, dataset.sha256, splits.sha256, facts, str(dataset), described), samplers


def _of_tasks(given: tasks.Tasks) -> tuple[Source, dict[str, Any], int, int]:
    """Tasks of the user's own: where they come from, their samplers, and the sizes of support and query set."""
    names = {"train": "train", "val": "validation", "test": "test"}
    samplers = {name: given.sampler(part) for name, part in names.items()}
    pool, sample = samplers["train"]
    shapes = jax.eval_shape(sample, pool, jax.random.key(0))
    support, query = (jax.tree.leaves(field)[0].shape[0] for field in (shapes.support_y, shapes.query_y))
    facts = json.loads(json.dumps(dict(given.facts)))
    described = f"{given.name}, {support} support and {query} query examples"
    text = f"{given.name}: tasks of your own"
    return Source(given.name, OWN_TASKS, given.sha256, given.sha256, [facts], text, described), samplers, support, query


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
    elif config.task is None:
        unused |= {f"tasks.{field.name}": "only with --task" for field in dataclasses.fields(config.tasks)}
    changed = differences(default, config)
    for name, why in unused.items():
        if name in changed:
            expected, got = changed[name]
            raise ConfigError(f"{name}: expected {expected!r}, because nothing else is used here ({why}), got {got!r}")


def _unused_in_training(config: TrainConfig) -> dict[str, str]:
    """Settings of a run that its other settings leave nothing to do: dotted name -> why."""
    inner, row = config.inner, algorithms.algorithm_row(config.inner.algorithm)
    learned = row.learned if inner.learned is None else inner.learned
    unused: dict[str, str] = {}
    if inner.derivative not in ("auto", "truncated"):
        unused["inner.last"] = "only with inner.derivative truncated"
    if row.meta_gradient != "implicit":
        unused["inner.solver_steps"] = "only with inner.algorithm imaml"
    if row.meta_gradient != "query":
        why = f"{inner.algorithm} does not differentiate through the inner steps"
        unused |= {"inner.derivative": why, "inner.last": why, "inner.first_order": why}
    if not (row.per_step if inner.per_step is None else inner.per_step):
        unused["inner.extend"] = "only with rates for every step"
    if not learned or config.outer.learns == "init":
        unused["outer.rates_rate"] = "rates do not learn"
    if config.outer.learns == "rates":
        unused["outer.init_rate"] = "the init does not learn"
    if not config.grid.run:
        unused |= {f"grid.{field.name}": "only with --grid.run" for field in dataclasses.fields(config.grid)[1:]}
    return unused


def model_of(config: ModelConfig, way: int, dataset: data.Dataset, given: Model | None = None) -> Model:
    """The network for a dataset: the given one if it fits, or what the config says. Raises ConfigError."""
    if given is None:
        return models.build(config.name, way, dataset.shape, **config.settings())
    if (given.way, given.input_shape) != (way, dataset.shape):
        raise ConfigError(
            f"model: expected {way} outputs for images of shape {list(dataset.shape)}, got {given.way} for "
            f"{None if given.input_shape is None else list(given.input_shape)}"
        )
    return given


def optax_by_name(name: str, setting: str = "outer.optimizer") -> Callable[[Any], optax.GradientTransformation]:
    """optax.NAME, if it makes a descent optimizer from a learning rate alone, a schedule too. Else ConfigError."""
    maker, expected = getattr(optax, name, None), f"{setting}: expected an optax optimizer made from a learning rate"
    if not callable(maker):
        near = difflib.get_close_matches(name, [other for other in dir(optax) if other.islower()], 1)
        raise ConfigError(f"{expected}, such as 'adam'; optax has no {name!r}{f', but {near[0]!r}' if near else ''}")
    try:
        optimizer = promoting(maker(optax.constant_schedule(1e-3)))
        params = {"w": jnp.ones(2)}
        updates, _ = optimizer.update(params, optimizer.init(params), params)  # the gradient of w^2 / 2
        falls = bool((updates["w"] < 0).all())
    except Exception as error:  # whatever another function of optax makes of a learning rate
        raise ConfigError(
            f"{expected}, such as 'adam', got {name!r}: {type(error).__name__}: {one_line(error)[:200]}"
        ) from error
    if not falls:
        raise ConfigError(f"{expected}, such as 'adam', got {name!r}, whose step does not go down")
    return maker


def grid_of(config: TrainConfig) -> small_grid.Grid:
    """The small grid; always with the trained number of steps among its own."""
    values = dataclasses.asdict(config.grid)
    values.pop("run")
    values["steps"] = tuple(sorted({*values["steps"], config.inner.steps}))
    return small_grid.Grid(**values)


def task_cost(config: TrainConfig, setup: Setup) -> float:
    """Example-gradients of one task: those of its inner steps, and one of its query set; docs/long.md."""
    support, query = setup.support, setup.query
    steps, method = config.inner.steps, setup.method
    if method.meta_gradient == "joint":
        return support + query
    solver = 2 * (method.solver_steps + 2) * support if method.meta_gradient == "implicit" else 0
    numbers = sum(leaf.size for leaf in outer.initial_shapes(setup.model, setup.spec).rates.values())
    exact = {
        "reverse": 3 * steps,
        "remat": 4 * steps,
        "forward": (2 * numbers + 1) * steps,
        "truncated": steps + 3 * min(method.last, steps),
    }[method.derivative]
    simple = method.first_order or method.meta_gradient != "query"
    share = 1.0 if simple else setup.phases.first_order_until / config.outer.steps
    return (share * steps + (1 - share) * exact) * min(config.inner.batch_size or support, support) + solver + query


def describe(config: TrainConfig, setup: Setup) -> str:
    """The first lines of a run: data, device, task split, and how the gradient is taken where that is not plain."""
    devices = jax.local_devices()
    return (
        f"data    {setup.source.text}\n"
        f"device  {len(devices)} x {devices[0].device_kind} ({jax.default_backend()})\n"
        f"tasks   {setup.source.tasks}; split {setup.source.split_sha256[:12]}"
    )
