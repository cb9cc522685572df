"""The small values that pass between the modules."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

Params = Any  # a pytree of float arrays, as flax makes them
Rates = dict[str, jax.Array]  # name -> learned hyperparameter; see metalr.inner.hyperparameters


class Episode(NamedTuple):
    """One task's data. Leading axes (a meta-batch) may stand before every shape given here."""

    support_x: jax.Array  # [support, height, width, channels] float32, 0..1
    support_y: jax.Array  # [support] int32, 0..way-1
    query_x: jax.Array  # [query, height, width, channels] float32, 0..1
    query_y: jax.Array  # [query] int32, 0..way-1


class MetaParams(NamedTuple):
    """What the outer loop learns. `rates` are raw: inner.hyperparameters.actual turns them into hyperparameters."""

    init: Params
    rates: Rates


class Curve(NamedTuple):
    """Accuracy on held-out tasks after some numbers of inner steps."""

    steps: np.ndarray  # [points] int, ascending: after how many steps
    mean: np.ndarray  # [points] float, 0..1
    ci95: np.ndarray  # [points] float, half-width over tasks
    tasks: np.ndarray  # [tasks, points] float64, each task's own query accuracy
