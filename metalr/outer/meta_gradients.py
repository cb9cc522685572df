"""Meta-gradients: how the init and the rates should change so that adapted params do better on the query set."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from metalr import models
from metalr.errors import ConfigError, check_whole
from metalr.inner import factored, hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.inner.objective import CROSS_ENTROPY, Objective
from metalr.models import Apply, Model
from metalr.outer import devices
from metalr.outer.directions import Evolution, Forward, Implicit, Method, Problem, Reverse
from metalr.tasks import second_key
from metalr.types import Episode, MetaParams

AT_ONCE_STEPS = 16  # up to here "auto" keeps every step's activations
AT_ONCE_BYTES = 1 << 28  # what "auto" lets the params that a task's derivative keeps take
FORWARD_NUMBERS = 32  # learned numbers up to which "auto" prefers forward mode to truncation; it keeps params for each


def choose_derivative(spec: RatesSpec, model: Model, last: int = 10, *, first_order: bool = False) -> Reverse | Forward:
    """What "auto" stands for: the fastest derivative whose memory is bounded.

    Every derivative keeps copies of the params: one for each step that is differentiated, or (forward) one for each
    learned number. A task's copies take at most AT_ONCE_BYTES, or are one; see docs/long.md.

    Args:
      last: the most steps that a truncated derivative may take.
      first_order: as in Reverse and Forward.
    """
    init = jax.eval_shape(model.init, jax.random.key(0))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(init))
    if spec.steps * size <= AT_ONCE_BYTES:
        return Reverse(first_order, remat=spec.steps > AT_ONCE_STEPS)
    numbers = sum(leaf.size for leaf in initial_shapes(model, spec).rates.values())
    if numbers <= FORWARD_NUMBERS and numbers * size <= AT_ONCE_BYTES:
        return Forward(first_order)
    return Reverse(first_order, remat=True, last=min(last, max(1, AT_ONCE_BYTES // size)))


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
    if model.start is not None and spec.granularity in ("channel", "parameter"):
        raise ConfigError(
            "inner.granularity: expected shared, layer or tensor with this inner.head_start, whose output layer has no "
            f"number of its own for each class, got {spec.granularity!r}"
        )
    return MetaParams(init, hyperparameters.initial_raw(spec, init, second_key(key)))


def _check(model: Model, spec: RatesSpec, method: Method, steps: int, step_weights: jax.Array | None) -> None:
    """Raises ConfigError as `meta_gradient` says."""
    name = type(method).__name__
    check_whole("horizon", steps)
    if step_weights is not None:
        if not isinstance(method, Reverse) or method.last is not None:
            raise ConfigError(f"step_weights: expected None with {method}, which looks at the last step's loss alone")
        if np.shape(step_weights) != (steps,):
            raise ConfigError(
                f"step_weights: expected one for each of {steps} steps, got shape {list(np.shape(step_weights))}"
            )
    if model.start is not None and not isinstance(method, (Reverse, Evolution)):
        raise ConfigError(
            f"inner.head_start: expected 'learned' with {name}, whose direction is that of a fine-tune's own start, "
            "got a head that is made for each task"
        )
    if isinstance(method, Implicit) and spec.proximal is None:
        raise ConfigError("inner.proximal: expected a start with Implicit, whose pull towards the init it is, got None")


def meta_gradient(
    model: Model,
    spec: RatesSpec,
    meta: MetaParams,
    episodes: Episode,
    keys: jax.Array,
    method: Method = Reverse(),  # noqa: B008 - frozen
    *,
    objective: Objective = CROSS_ENTROPY,
    step_weights: jax.Array | None = None,
    horizon: int | None = None,
    plain: bool = False,
) -> tuple[MetaParams, dict[str, jax.Array]]:
    """The mean meta-gradient over a batch of episodes.

    Args:
      model, spec: static choices.
      method: the way to it: Reverse, Forward, Evolution, Reptile, Joint or Implicit, with its options.
      meta: init and raw rates.
      episodes: with a leading axis [tasks].
      keys: [tasks] keys, for minibatches and dropout in the inner loop (active if the model has any).
      objective: its loss is that of the support set, and of the query set too unless it has a meta_loss.
      step_weights: [steps] float: the loss is the sum of these times the query losses after 1, 2, … steps, instead of
        that after the last one (Antoniou et al. 2019, section 4).
      horizon: how many inner steps are taken, at least 1; default: spec.steps.
      plain: never use the factored form (it gives the same gradients; tests compare).

    Returns:
      (gradients shaped like `meta`, what the objective measures: means over tasks of the query set after adaptation).

    Raises:
      ConfigError: step_weights of another length, or with a way that looks at the last step alone; a way that has no
        answer for the model's head (inner.head_start) or needs a hyperparameter that the spec does not have.
    """
    support = jax.tree.leaves(episodes.support_y)[0].shape[1]
    steps = spec.steps if horizon is None else horizon
    _check(model, spec, method, steps, step_weights)
    fast = isinstance(method, Reverse) and method.last is None and not plain
    fast = fast and factored.pays(model, spec, objective.loss, support, steps)
    loss, every = objective.of_query, step_weights is not None
    if isinstance(method, Forward):
        model = dataclasses.replace(model, cpu_apply=None)  # that form may have no forward mode: conv4's has not

    def one(
        way: Reverse, problem: Problem, meta: MetaParams, episode: Episode, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        if fast:
            rates = hyperparameters.actual(spec, meta.rates)
            data = episode.support_x, episode.support_y, episode.query_x
            outputs = factored.query_logits(
                problem.begun(meta, episode).init, rates, spec, *data, steps, of_steps=steps,
                first_order=way.first_order, every_step=every, loss=objective.loss,
            )  # fmt: skip
        else:
            outputs = way.outputs(problem, meta, episode, key, every_step=every)
        final = jax.tree.map(lambda v: v[-1], outputs) if every else outputs
        metrics = objective.measure(final, episode.query_y)
        value = metrics["loss"]
        if step_weights is not None:
            later = jax.tree.map(lambda v: v[1:], outputs)
            value = step_weights @ jax.vmap(lambda each: loss(each, episode.query_y))(later)
        return value, metrics

    def mean_of_group(apply: Apply, tasks: tuple[Episode, jax.Array]) -> tuple[MetaParams, dict[str, jax.Array]]:
        problem = Problem(apply, spec, objective, model.dropout, model.begin, steps)
        if not isinstance(method, Reverse):
            way = method
            each = devices.vmap_group(lambda task: way(problem, meta, *task), tasks)
            return jax.tree.map(lambda v: v.mean(0), each)

        def mean_loss(meta: MetaParams) -> tuple[jax.Array, dict[str, jax.Array]]:
            losses, metrics = devices.vmap_group(lambda task: one(method, problem, meta, *task), tasks)
            return losses.mean(), jax.tree.map(lambda v: v.mean(), metrics)

        grads, metrics = jax.grad(mean_loss, has_aux=True)(meta)
        return grads, metrics

    return devices.mean_over_tasks(
        model, mean_of_group, (episodes, keys), cpu_group=factored.cpu_group(support) if fast else 1
    )
