"""Meta-gradients: how the init and the rates should change so that adapted params do better on the query set."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalr import inner, models
from metalr.errors import ConfigError
from metalr.inner import factored, hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.inner.objective import CROSS_ENTROPY, Objective
from metalr.models import Apply, Model, predict
from metalr.outer import devices, directions
from metalr.types import Episode, MetaParams

DERIVATIVES = ("reverse", "remat", "truncated", "forward")
AT_ONCE_STEPS = 16  # up to here "auto" keeps every step's activations
AT_ONCE_BYTES = 1 << 28  # what "auto" lets the params that a task's derivative keeps take
FORWARD_NUMBERS = 32  # learned numbers up to which "auto" prefers forward mode to truncation; it keeps params for each


class Method(NamedTuple):
    """How a meta-gradient is taken: static choices.

    Attributes:
      meta_gradient, first_order: as in Algorithm.
      derivative: through the inner steps: "reverse" keeps the activations of every step; "remat" only the params and
        computes a step again; "truncated" does so for the `last` steps alone; "forward" carries derivatives along
        (exact for the rates, first order for the init), with memory that does not grow with steps.
      last: steps that "truncated" differentiates.
      solver_steps: of conjugate gradient, for meta_gradient "implicit".
    """

    meta_gradient: str = "query"
    first_order: bool = False
    derivative: str = "reverse"
    last: int = 10
    solver_steps: int = 5


def choose_derivative(spec: RatesSpec, model: Model, last: int = Method().last) -> tuple[str, int]:
    """What "auto" stands for: the fastest derivative whose memory is bounded, and how many steps "truncated" takes.

    Every derivative keeps copies of the params: one for each step that is differentiated, or (forward) one for each
    learned number. A task's copies take at most AT_ONCE_BYTES, or are one; see docs/long.md.

    Args:
      last: the most steps that "truncated" may differentiate.
    """
    init = jax.eval_shape(model.init, jax.random.key(0))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(init))
    if spec.steps * size <= AT_ONCE_BYTES:
        return ("reverse" if spec.steps <= AT_ONCE_STEPS else "remat"), last
    numbers = sum(leaf.size for leaf in initial_shapes(model, spec).rates.values())
    if numbers <= FORWARD_NUMBERS and numbers * size <= AT_ONCE_BYTES:
        return "forward", last
    return "truncated", min(last, max(1, AT_ONCE_BYTES // size))


def initial_shapes(model: Model, spec: RatesSpec) -> MetaParams:
    """Shapes and dtypes of `initial`, which costs nothing. Raises ConfigError as it does."""
    return jax.eval_shape(lambda: initial(model, spec, jax.random.key(0)))


def initial(model: Model, spec: RatesSpec, key: jax.Array) -> MetaParams:
    """Meta-parameters to start from: a random init of the model, and all hyperparameters at the spec's values."""
    if spec.head != model.head:
        raise ConfigError(f"rates.head: expected the model's head {model.head!r}, got {spec.head!r}")
    if spec.dropout is not None and not model.learned_dropout:
        raise ConfigError(f"inner.dropout: expected None with the model {model.name!r}, which takes no dropout rate")
    init = model.init(key)
    models.check_dtypes(init, f"model {model.name!r}")
    return MetaParams(init, hyperparameters.initial_raw(spec, init))


def query_logits(
    apply: Apply,
    spec: RatesSpec,
    meta: MetaParams,
    episode: Episode,
    method: Method = Method(),  # noqa: B008 - a tuple
    *,
    loss: inner.Loss = inner.cross_entropy,
    dropout: bool = False,
    every_step: bool = False,
    key: jax.Array | None = None,
) -> jax.Array:
    """Outputs [query, …] of one episode after spec.steps steps from meta.init: the plain form.

    every_step: [steps + 1, query, …], before each step and after the last.
    """
    remat = method.derivative in ("remat", "truncated")
    if not every_step:
        last = method.last if method.derivative == "truncated" else None
        options = {"loss": loss, "first_order": method.first_order}
        fast = directions.adapted(apply, spec, meta, episode, key, dropout=dropout, remat=remat, last=last, **options)
        return predict(apply, fast, episode.support_x, episode.query_x)
    rates = hyperparameters.actual(spec, meta.rates)
    step, start = directions.step_of(
        apply, spec, rates, episode, key, loss=loss, first_order=method.first_order,
        dropout=hyperparameters.dropout(spec, rates, dropout),
    )  # fmt: skip
    carry, seen = (meta.init, start(meta.init)), [predict(apply, meta.init, episode.support_x, episode.query_x)]
    for number in range(spec.steps):
        carry = inner.take(step, carry, number, number + 1, remat=remat)
        seen.append(predict(apply, carry[0], episode.support_x, episode.query_x))
    return jnp.stack(seen)


def meta_gradient(
    model: Model,
    spec: RatesSpec,
    meta: MetaParams,
    episodes: Episode,
    keys: jax.Array,
    method: Method = Method(),  # noqa: B008 - a tuple
    *,
    objective: Objective = CROSS_ENTROPY,
    step_weights: jax.Array | None = None,
    plain: bool = False,
) -> tuple[MetaParams, dict[str, jax.Array]]:
    """The mean meta-gradient over a batch of episodes.

    Args:
      model, spec, method: static choices.
      meta: init and raw rates.
      episodes: with a leading axis [tasks].
      keys: [tasks] keys, for minibatches and dropout in the inner loop (active if the model has any).
      objective: its loss is that of support and query set alike.
      step_weights: [steps] float: the loss is the sum of these times the query losses after 1, 2, … steps, instead of
        that after the last one (Antoniou et al. 2019, section 4).
      plain: never use the factored form (it gives the same gradients; tests compare).

    Returns:
      (gradients shaped like `meta`, what the objective measures: means over tasks of the query set after adaptation).

    Raises ConfigError for a method that there is not.
    """
    for choice, known in (("derivative", DERIVATIVES), ("meta_gradient", ("query", *directions.DIRECTIONS))):
        if getattr(method, choice) not in known:
            raise ConfigError(f"{choice}: expected one of {known}, got {getattr(method, choice)!r}")
    dropout = model.dropout
    support = jax.tree.leaves(episodes.support_y)[0].shape[1]
    name = method.meta_gradient if method.meta_gradient != "query" else method.derivative
    fast = name in ("reverse", "remat") and objective.name in factored.OBJECTIVES and not plain
    fast = fast and factored.pays(model, spec, support, spec.steps)
    loss = objective.loss
    if name == "forward":
        model = dataclasses.replace(model, cpu_apply=None)  # that form may have no forward mode: conv4's has not

    def one(apply: Apply, meta: MetaParams, episode: Episode, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        every = step_weights is not None
        if fast:
            rates = hyperparameters.actual(spec, meta.rates)
            data = episode.support_x, episode.support_y, episode.query_x
            logits = factored.query_logits(
                meta.init, rates, spec, *data, spec.steps, first_order=method.first_order, every_step=every,
                objective=objective.name,
            )  # fmt: skip
        else:
            logits = query_logits(
                apply, spec, meta, episode, method, loss=loss, dropout=dropout, every_step=every, key=key
            )
        final = logits[-1] if every else logits
        metrics = objective.measure(final, episode.query_y)
        value = metrics["loss"]
        if step_weights is not None:
            value = step_weights @ jax.vmap(lambda each: loss(each, episode.query_y))(logits[1:])
        return value, metrics

    def mean_of_group(apply: Apply, tasks: tuple[Episode, jax.Array]) -> tuple[MetaParams, dict[str, jax.Array]]:
        if name in directions.DIRECTIONS:
            own: dict[str, Any] = {
                "implicit": {"solver_steps": method.solver_steps},
                "forward": {"first_order": method.first_order},
            }
            direction, options = directions.DIRECTIONS[name], own.get(name, {})
            each = devices.vmap_group(
                lambda task: direction(apply, spec, meta, *task, objective=objective, dropout=dropout, **options), tasks
            )
            return jax.tree.map(lambda v: v.mean(0), each)

        def mean_loss(meta: MetaParams) -> tuple[jax.Array, dict[str, jax.Array]]:
            losses, metrics = devices.vmap_group(lambda task: one(apply, meta, *task), tasks)
            return losses.mean(), jax.tree.map(lambda v: v.mean(), metrics)

        grads, metrics = jax.grad(mean_loss, has_aux=True)(meta)
        return grads, metrics

    return devices.mean_over_tasks(
        model, mean_of_group, (episodes, keys), cpu_group=factored.cpu_group(support) if fast else 1
    )
