"""The small values that pass between the modules."""

from __future__ import annotations

from typing import Any, NamedTuple, NewType

import jax
import numpy as np

Params = Any  # a pytree of float arrays, as flax makes them
# Learned hyperparameters by name, see metalr.inner.hyperparameters: as the inner loop uses them, and in the raw form
# that the outer loop moves (logarithms, say). inner.hyperparameters.actual and raw_of turn one into the other.
Rates = NewType("Rates", dict[str, jax.Array])
RawRates = NewType("RawRates", dict[str, jax.Array])


class Episode(NamedTuple):
    """One task's data: what is adapted to, and what the adapted network is judged on.

    Each field is any pytree of arrays with a leading axis [support] or [query], the examples. A leading axis [tasks]
    may stand before (a meta-batch). Image families give images [n, height, width, channels] float32, 0..1, and
    labels [n] int32, 0..way-1.
    """

    support_x: Any
    support_y: Any
    query_x: Any
    query_y: Any


class MetaParams(NamedTuple):
    """What the outer loop learns."""

    init: Params
    rates: RawRates


class Curve(NamedTuple):
    """The objective's score (accuracy, say) on held-out tasks after some numbers of inner steps."""

    steps: np.ndarray  # [points] int, ascending: after how many steps
    mean: np.ndarray  # [points] float; of several rates side by side [rates, points]
    ci95: np.ndarray  # as mean; half-width over tasks
    tasks: np.ndarray  # [episodes, points] float64 (or [episodes, rates, points]): the score on each query set
    groups: np.ndarray | None = None  # [episodes] int: which task each is of, if tasks can be counted; None: all differ

    @property
    def different_tasks(self) -> int:
        """How many different tasks the episodes are of."""
        return len(self.tasks if self.groups is None else np.unique(self.groups))

    def each_point(self) -> list[tuple[int, Curve]]:
        """Every number of steps, and a curve of that point alone."""
        alone = (
            self._replace(**{name: getattr(self, name)[..., i : i + 1] for name in ("steps", "mean", "ci95", "tasks")})
            for i in range(len(self.steps))
        )
        return list(zip(self.steps.tolist(), alone, strict=True))
