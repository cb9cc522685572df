"""Meta-gradients: how the init and the rates should change so that adapted params do better on the query set.

An algorithm is a row of ALGORITHMS, a choice for each question; there are no subclasses.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from metalr import devices, factored, inner
from metalr import rates as rates_lib
from metalr.errors import ConfigError
from metalr.models import Apply, Model
from metalr.rates import RatesSpec
from metalr.types import Episode, MetaParams


class Algorithm(NamedTuple):
    """One row of choices.

    Attributes:
      granularity, per_step, adapts: as in RatesSpec.
      learned: whether the outer loop changes the rates.
      first_order: whether the meta-gradient treats inner gradients as constants.
      meta_gradient: "query" (of the query loss after adaptation) or "reptile" (towards the adapted params).
      source: paper and place.
    """

    granularity: str
    per_step: bool
    learned: bool
    first_order: bool
    adapts: str
    meta_gradient: str
    source: str


ALGORITHMS = {
    "maml": Algorithm("shared", False, False, False, "all", "query", "Finn et al. 2017, algorithm 2"),
    "fomaml": Algorithm("shared", False, False, True, "all", "query", "Finn et al. 2017, section 5.2"),
    "reptile": Algorithm("shared", False, False, True, "all", "reptile", "Nichol et al. 2018, algorithm 2"),
    "anil": Algorithm("shared", False, False, False, "head", "query", "Raghu et al. 2020, section 4"),
    "boil": Algorithm("shared", False, False, False, "body", "query", "Oh et al. 2021, section 3"),
    "meta_sgd": Algorithm("parameter", False, True, False, "all", "query", "Li et al. 2017, algorithm 1"),
    "meta_sgd_layer": Algorithm("layer", False, True, False, "all", "query", "Li et al. 2017, one rate a layer"),
    "lslr": Algorithm("tensor", True, True, False, "all", "query", "Antoniou et al. 2019, section 4"),
}


def algorithm_row(name: str) -> Algorithm:
    """The row of that name. Raises ConfigError for an unknown one."""
    if name not in ALGORITHMS:
        raise ConfigError(f"inner.algorithm: expected one of {tuple(ALGORITHMS)}, got {name!r}")
    return ALGORITHMS[name]


def initial(model: Model, spec: RatesSpec, key: jax.Array) -> MetaParams:
    """Meta-parameters to start from: a random init of the model, and all rates at spec.initial."""
    if spec.head != model.head:
        raise ConfigError(f"rates.head: expected the model's head {model.head!r}, got {spec.head!r}")
    init = model.init(key)
    return MetaParams(init, rates_lib.initial_raw(spec, init))


def query_logits(
    apply: Apply,
    spec: RatesSpec,
    meta: MetaParams,
    episode: Episode,
    *,
    loss: inner.Loss = inner.cross_entropy,
    first_order: bool = False,
    dropout: bool = False,
    remat: bool = False,
    key: jax.Array | None = None,
) -> jax.Array:
    """Logits [query, way] of one episode after spec.steps steps from meta.init: the plain form."""
    optimizer = rates_lib.optimizer(spec, rates_lib.actual(spec, meta.rates))
    fast, _ = inner.adapt(
        apply,
        meta.init,
        episode.support_x,
        episode.support_y,
        optimizer,
        spec.steps,
        loss=loss,
        first_order=first_order,
        dropout=dropout,
        remat=remat,
        key=key,
    )
    return apply(fast, episode.query_x)


def meta_gradient(
    model: Model,
    spec: RatesSpec,
    meta: MetaParams,
    episodes: Episode,
    keys: jax.Array,
    *,
    loss: inner.Loss = inner.cross_entropy,
    first_order: bool = False,
    meta_gradient: str = "query",
    remat: bool = False,
    plain: bool = False,
) -> tuple[MetaParams, dict[str, jax.Array]]:
    """The mean meta-gradient over a batch of episodes.

    Args:
      model, spec: static choices.
      meta: init and raw rates.
      episodes: with a leading axis [tasks].
      keys: [tasks] keys, for dropout in the inner loop (active if the model has any).
      loss: of support and query set alike.
      first_order, meta_gradient: as in Algorithm.
      remat: recompute inner steps in the backward pass instead of keeping them.
      plain: never use the factored form (it gives the same gradients; tests compare).

    Returns:
      (gradients shaped like `meta`, {"loss", "accuracy"}: means over tasks of the query set after adaptation).
    """
    dropout = model.dropout
    support = episodes.support_y.shape[1]
    fast = meta_gradient == "query" and loss is inner.cross_entropy and not plain
    fast = fast and factored.pays(model, spec, support, spec.steps)

    def one(apply: Apply, meta: MetaParams, episode: Episode, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        if fast:
            rates = rates_lib.actual(spec, meta.rates)
            data = episode.support_x, episode.support_y, episode.query_x
            logits = factored.query_logits(meta.init, rates, spec, *data, spec.steps, first_order=first_order)
        else:
            logits = query_logits(
                apply, spec, meta, episode, loss=loss, first_order=first_order, dropout=dropout, remat=remat, key=key
            )
        return loss(logits, episode.query_y), inner.accuracy(logits, episode.query_y)

    def mean_of_group(apply: Apply, tasks: tuple[Episode, jax.Array]) -> tuple[MetaParams, dict[str, jax.Array]]:
        if meta_gradient == "reptile":
            each = jax.vmap(lambda task: reptile(apply, spec, meta, *task, loss=loss, dropout=dropout))(tasks)
            return jax.tree.map(lambda v: v.mean(0), each)

        def mean_loss(meta: MetaParams) -> tuple[jax.Array, jax.Array]:
            losses, accuracies = devices.vmap_group(lambda task: one(apply, meta, *task), tasks)
            return losses.mean(), accuracies.mean()

        (value, accuracy), grads = jax.value_and_grad(mean_loss, has_aux=True)(meta)
        return grads, {"loss": value, "accuracy": accuracy}

    return devices.mean_over_tasks(
        model, mean_of_group, (episodes, keys), cpu_group=factored.cpu_group(support) if fast else 1
    )


def reptile(
    apply: Apply,
    spec: RatesSpec,
    meta: MetaParams,
    episode: Episode,
    key: jax.Array,
    *,
    loss: inner.Loss = inner.cross_entropy,
    dropout: bool = False,
) -> tuple[MetaParams, dict[str, jax.Array]]:
    """The Reptile direction init - adapted (Nichol et al. 2018, algorithm 2), as if it were a gradient.

    Rates get a zero gradient: they do not learn. Returns (direction shaped like `meta`, {"loss", "accuracy"}).
    """
    optimizer = rates_lib.optimizer(spec, rates_lib.actual(spec, meta.rates))
    x, y = episode.support_x, episode.support_y
    fast, _ = inner.adapt(apply, meta.init, x, y, optimizer, spec.steps, loss=loss, dropout=dropout, key=key)
    logits = apply(fast, episode.query_x)
    direction = jax.tree.map(jnp.subtract, meta.init, fast)
    metrics = {
        "loss": loss(logits, episode.query_y),
        "accuracy": inner.accuracy(logits, episode.query_y),
    }
    return MetaParams(direction, jax.tree.map(jnp.zeros_like, meta.rates)), metrics
