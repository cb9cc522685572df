"""Meta-gradients: how the init and the rates should change so that adapted params do better on the query set.

An algorithm is a row of ALGORITHMS, a choice for each question; there are no subclasses.
"""

from __future__ import annotations

import functools
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
    "meta_sgd_layer": Algorithm(
        "layer", False, True, False, "all", "query", "Li et al. 2017, one rate a layer"
    ),
    "lslr": Algorithm("tensor", True, True, False, "all", "query", "Antoniou et al. 2019, section 4"),
}


def algorithm_row(name: str) -> Algorithm:
    """The row of that name. Raises ConfigError for an unknown one."""
    if name not in ALGORITHMS:
        raise ConfigError(f"inner.algorithm: expected one of {tuple(ALGORITHMS)}, got {name!r}")
    return ALGORITHMS[name]


def initial(model: Model, spec: RatesSpec, key: jax.Array) -> MetaParams:
    """Meta-parameters to start from: a random init of the model, and all rates at spec.initial."""
    init = model.init(key)
    return MetaParams(init, rates_lib.initial_raw(spec, init))


def query_logits(
    apply: Apply,
    spec: RatesSpec,
    meta: MetaParams,
    episode: Episode,
    *,
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
      first_order, meta_gradient: as in Algorithm.
      remat: recompute inner steps in the backward pass instead of keeping them.
      plain: never use the factored form (it gives the same gradients; tests compare).

    Returns:
      (gradients shaped like `meta`, {"loss", "accuracy"}: means over tasks of the query set after adaptation).
    """
    dropout = bool(model.settings.get("dropout"))
    if (
        meta_gradient == "query"
        and not plain
        and factored.pays(model, spec, episodes.support_y.shape[1], spec.steps)
    ):

        def batch_loss(meta: MetaParams) -> tuple[jax.Array, jax.Array]:
            rates = rates_lib.actual(spec, meta.rates)
            run = functools.partial(factored.query_logits, steps=spec.steps, first_order=first_order)
            logits = jax.vmap(lambda e: run(meta.init, rates, spec, e.support_x, e.support_y, e.query_x))(
                episodes
            )
            return inner.cross_entropy(logits, episodes.query_y), inner.accuracy(logits, episodes.query_y)

        (loss, accuracy), grads = jax.value_and_grad(batch_loss, has_aux=True)(meta)
        return grads, {"loss": loss, "accuracy": accuracy}

    def by_tasks(apply: Apply, vmapped: int, meta: MetaParams, tasks: tuple[Episode, jax.Array]):  # type: ignore[no-untyped-def]
        def one(task: tuple[Episode, jax.Array]):  # type: ignore[no-untyped-def]
            episode, key = task

            def loss(meta: MetaParams) -> tuple[jax.Array, jax.Array]:
                logits = query_logits(
                    apply, spec, meta, episode, first_order=first_order, dropout=dropout, remat=remat, key=key
                )
                return inner.cross_entropy(logits, episode.query_y), inner.accuracy(logits, episode.query_y)

            if meta_gradient == "reptile":
                return reptile(apply, spec, meta, episode, dropout, key)
            (value, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(meta)
            return grads, {"loss": value, "accuracy": accuracy}

        return devices.mean_over_tasks(one, tasks, vmapped)

    return devices.by_platform(model, by_tasks, meta, (episodes, keys))


def reptile(
    apply: Apply, spec: RatesSpec, meta: MetaParams, episode: Episode, dropout: bool, key: jax.Array
) -> tuple[MetaParams, dict[str, jax.Array]]:
    """The Reptile direction init - adapted (Nichol et al. 2018, algorithm 2), as if it were a gradient.

    Rates get a zero gradient: they do not learn.
    """
    optimizer = rates_lib.optimizer(spec, rates_lib.actual(spec, meta.rates))
    fast, _ = inner.adapt(
        apply,
        meta.init,
        episode.support_x,
        episode.support_y,
        optimizer,
        spec.steps,
        dropout=dropout,
        key=key,
    )
    logits = apply(fast, episode.query_x)
    grads = MetaParams(jax.tree.map(jnp.subtract, meta.init, fast), jax.tree.map(jnp.zeros_like, meta.rates))
    metrics = {
        "loss": inner.cross_entropy(logits, episode.query_y),
        "accuracy": inner.accuracy(logits, episode.query_y),
    }
    return grads, metrics
