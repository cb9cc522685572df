"""Objectives: what the inner and the outer loop minimise, what is reported, and which of it chooses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from metalr.errors import ConfigError

TARGETS = ("numbers", "classes", "binary")
Choice = TypeVar("Choice")
Loss = Callable[[Any, Any], jax.Array]  # (outputs of the model, targets), each with a leading axis [n] -> [] float


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """A loss with its metrics.

    Attributes:
      name: a key of OBJECTIVES, or what you call your own. An objective of another loss has another name, because a
        folder keeps the name alone.
      loss: (outputs, targets) -> [] float, the mean over examples; of support and query sets alike.
      meta_loss: what the outer loop minimises of the query set, if that is something else.
      metrics: name -> (outputs, targets) -> [] float; reported beside the loss.
      choose_by: the metric (or "loss") that validation chooses by and that curves and tables show.
      maximise: whether more of it is better.
      targets: what it is of: "numbers", "classes" (integers, one output a class) or "binary" (0 or 1, one output).
    """

    name: str
    loss: Loss
    metrics: Mapping[str, Loss] = dataclasses.field(default_factory=dict)
    choose_by: str = "loss"
    maximise: bool = False
    targets: str = "numbers"
    meta_loss: Loss | None = None

    def __post_init__(self) -> None:
        if (
            not callable(self.loss)
            or not isinstance(self.metrics, Mapping)
            or not all(map(callable, self.metrics.values()))
        ):
            raise ConfigError(
                f"objective {self.name!r}: expected a function as loss, and metrics as name -> function, got "
                f"{self.loss!r:.80} and {self.metrics!r:.80}"
            )
        if self.targets not in TARGETS:
            raise ConfigError(f"objective {self.name!r}: targets: expected one of {TARGETS}, got {self.targets!r}")
        known = LOSSES.get(self.name)
        if known is not None and self.loss is not known:
            raise ConfigError(
                f"objective: expected a name of your own for a loss of your own, got {self.name!r}, which is metalr's"
            )
        if self.choose_by != "loss" and self.choose_by not in self.metrics:
            raise ConfigError(
                f"objective {self.name!r}: choose_by: expected one of {['loss', *self.metrics]}, got {self.choose_by!r}"
            )
        if {"loss", "gradient_norm", "finite", "step"} & set(self.metrics):
            raise ConfigError(f"objective {self.name!r}: metrics: expected other names than those of the outer loop")

    @property
    def of_classes(self) -> bool:
        """Whether integer targets say which class an example is of."""
        return self.targets != "numbers"

    def in_units(self, back: Callable[[Any], Any]) -> Objective:
        """The same loss, with metrics of back(outputs) and back(targets): in the targets' own units."""

        def of(metric: Loss) -> Loss:
            return lambda outputs, targets: metric(back(outputs), back(targets))

        return dataclasses.replace(self, metrics={name: of(metric) for name, metric in self.metrics.items()})

    @property
    def of_query(self) -> Loss:
        """What the outer loop minimises."""
        return self.meta_loss or self.loss

    def calibrated(self) -> Objective:
        """The same, but the outer loop minimises the query loss at its best temperature. Raises ConfigError.

        So a fine-tune is not held back because it would be too sure of itself, which accuracy does not mind.
        """
        if self.targets != "classes":
            raise ConfigError(f"outer.calibrate: expected False with {self.name}, which is not of classes, got True")
        return dataclasses.replace(
            self, meta_loss=lambda logits, labels: self.loss(best_scale(logits, labels) * logits, labels)
        )

    def measure(self, outputs: Any, targets: Any) -> dict[str, jax.Array]:
        """What the outer loop minimises ("loss") and all metrics, by name."""
        found = {"loss": self.of_query(outputs, targets)}
        return found | {name: metric(outputs, targets) for name, metric in self.metrics.items()}

    def score(self, outputs: Any, targets: Any) -> jax.Array:
        """What is chosen by."""
        return (self.loss if self.choose_by == "loss" else self.metrics[self.choose_by])(outputs, targets)

    def better(self, new: float, old: float) -> bool:
        """Whether one score is better than another; any number is better than none (NaN or infinite)."""
        if not math.isfinite(new) or not math.isfinite(old):
            return math.isfinite(new)
        return new > old if self.maximise else new < old

    def best(self, choices: Sequence[Choice], score: Callable[[Choice], float]) -> Choice:
        """The choice with the best score; of equal ones the first."""
        chosen = choices[0]
        for choice in choices[1:]:
            if self.better(score(choice), score(chosen)):
                chosen = choice
        return chosen


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean softmax cross-entropy. logits: [n, way] float; labels: [n] int; result: [] float."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def best_scale(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The factor (one over the temperature) of the logits with the least cross-entropy: [] float, 0.01 to 100.

    Temperature scaling (Guo et al. 2017, section 4.2), by Newton steps of at most a factor of three. It is taken as a
    constant: where it is best, the loss's derivative through it is zero (the envelope theorem).
    """
    logits = jax.lax.stop_gradient(logits)
    right = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]

    def step(_: int, scale: jax.Array) -> jax.Array:
        shares = jax.nn.softmax(scale * logits)
        mean = (shares * logits).sum(-1)
        variance = (shares * jnp.square(logits)).sum(-1) - jnp.square(mean)
        new = scale - (mean - right).mean() / (variance.mean() + 1e-8)
        return jnp.clip(new, scale / 3, 3 * scale).clip(0.01, 100)

    return jax.lax.fori_loop(0, 12, step, jnp.ones((), logits.dtype))


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of correct predictions; logits that are no numbers predict nothing, so they are wrong.

    logits: [n, way] float; labels: [n] int; result: [] float32, 0..1.
    """
    return ((logits.argmax(-1) == labels) & ~jnp.isnan(logits).any(-1)).mean(dtype=jnp.float32)


def alike(outputs: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Outputs in the shape of the targets, [n] or [n, d]. Raises ConfigError where broadcasting would pair wrongly."""
    targets = jnp.asarray(targets, outputs.dtype)
    if outputs.shape not in (targets.shape, (*targets.shape, 1)):
        raise ConfigError(
            f"objective: expected outputs of the targets' shape {list(targets.shape)}, got {list(outputs.shape)}"
        )
    return outputs.reshape(targets.shape), targets


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared error. outputs, targets: [n] or [n, d] float; outputs also [n, 1] for targets [n]; result: []."""
    outputs, targets = alike(outputs, targets)
    return jnp.square(outputs - targets).mean()


def absolute_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean absolute error, which far-off targets pull at less. Shapes as of squared_error."""
    outputs, targets = alike(outputs, targets)
    return jnp.abs(outputs - targets).mean()


def r2(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Share of the targets' variance that is explained, over this very set: at best 1; below 0 the mean is better.

    Where all targets are the same there is none to explain: 1 if the outputs are they, 0 if not (as in scikit-learn).
    """
    outputs, targets = alike(outputs, targets)
    mean = targets.mean(0, keepdims=True)
    spread, error = jnp.square(targets - mean).mean(), jnp.square(outputs - targets).mean()
    rounding = jnp.square(4 * jnp.finfo(outputs.dtype).eps * mean).mean()
    some = spread > rounding
    return jnp.where(some, 1 - error / jnp.where(some, spread, 1.0), jnp.where(error <= rounding, 1.0, 0.0))


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean sigmoid cross-entropy. logits: [n] or [n, d] float (also [n, 1] for labels [n]); labels: 0 or 1."""
    return optax.sigmoid_binary_cross_entropy(*alike(logits, labels)).mean()


def binary_accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of logits on the right side of zero; those that are no numbers are on none."""
    logits, labels = alike(logits, labels)
    return (((logits > 0) == (labels > 0.5)) & ~jnp.isnan(logits)).mean(dtype=jnp.float32)


LOSSES = {each.__name__: each for each in (cross_entropy, squared_error, absolute_error, binary_cross_entropy)}
CROSS_ENTROPY = Objective("cross_entropy", cross_entropy, {"accuracy": accuracy}, "accuracy", True, "classes")
OBJECTIVES = {
    each.name: each
    for each in (
        CROSS_ENTROPY,
        Objective("squared_error", squared_error, {"mse": squared_error, "r2": r2}, "mse"),
        Objective("absolute_error", absolute_error, {"mae": absolute_error, "mse": squared_error}, "mae"),
        Objective(
            "binary_cross_entropy", binary_cross_entropy, {"accuracy": binary_accuracy}, "accuracy", True, "binary"
        ),
    )
}


def objective_of(objective: str | Objective) -> Objective:
    """The objective of that name, or the one that is given. Raises ConfigError for an unknown name."""
    if isinstance(objective, Objective):
        return objective
    if objective not in OBJECTIVES:
        raise ConfigError(
            f"objective: expected one of {tuple(OBJECTIVES)} or a metalr.Objective(name, loss, metrics, choose_by), "
            f"got {objective!r}"
        )
    return OBJECTIVES[objective]
