"""The learned inner-loop learning rates: which parameters share one, and how it changes over steps.

Rates are a flat dict, group name -> array. A group is the whole network ("all"), a layer ("dense_0") or a tensor
("dense_0/kernel"); a tensor without a group does not adapt. The outer loop learns `raw` rates (logarithms if they
must stay positive); everything else sees the actual ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalr.errors import ConfigError
from metalr.types import Params, Rates

GRANULARITIES = ("shared", "layer", "tensor", "parameter")
EXTENDS = ("hold", "mean", "error")
ADAPTS = ("all", "head", "body")
MAX_RATE = 1e3


@dataclasses.dataclass(frozen=True)
class RatesSpec:
    """The static choices about rates.

    Attributes:
      granularity: what shares one rate: "shared" (MAML, Finn et al. 2017, eq. 1), "layer", "tensor" (with per_step:
        LSLR of MAML++, Antoniou et al. 2019, section 4), or "parameter" (Meta-SGD, Li et al. 2017, eq. 2).
      per_step: a rate of its own for every inner step.
      positive: learn the logarithm, so that rates stay above zero; otherwise rates may turn negative.
      steps: how many inner steps are trained.
      initial: the rate that training starts from.
      extend: the rate of a step beyond the trained ones: "hold" the last, the "mean" of all, or an "error".
        Only matters with per_step.
      adapts: "all" layers, only the "head" (ANIL, Raghu et al. 2020), or only the "body" (BOIL, Oh et al. 2021).
      head: the output layer's name, for `adapts`.
    """

    granularity: str = "layer"
    per_step: bool = False
    positive: bool = True
    steps: int = 5
    initial: float = 0.1
    extend: str = "hold"
    adapts: str = "all"
    head: str = "head"

    def __post_init__(self) -> None:
        for name, allowed in (("granularity", GRANULARITIES), ("extend", EXTENDS), ("adapts", ADAPTS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"rates.{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        if self.steps < 1:
            raise ConfigError(f"inner.steps: expected at least 1, got {self.steps}")
        if not 0 < self.initial <= MAX_RATE:
            raise ConfigError(f"inner.rate: expected 0 < rate <= {MAX_RATE:g}, got {self.initial}")


def group_of(spec: RatesSpec, path: tuple[Any, ...]) -> str | None:
    """The group of the tensor at a pytree path, or None if it does not adapt."""
    tensor = path_name(path)
    in_head = tensor == spec.head or tensor.startswith(f"{spec.head}/")
    if (spec.adapts == "head" and not in_head) or (spec.adapts == "body" and in_head):
        return None
    if spec.granularity == "shared":
        return "all"
    return tensor.rpartition("/")[0] or tensor if spec.granularity == "layer" else tensor


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as one string: "dense_0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def initial_raw(spec: RatesSpec, params: Params) -> Rates:
    """Raw rates to start meta-training from, all equal to spec.initial.

    Each value has the shape [] (or that of the tensor, for "parameter"), with [steps] in front if per_step; float32
    or the dtype of the parameters.

    Raises:
      ConfigError: nothing in `params` adapts (there is no layer of the name spec.head).
    """
    raw: Rates = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        group = group_of(spec, path)
        if group is not None:
            shape = (spec.steps,) * spec.per_step + (leaf.shape if spec.granularity == "parameter" else ())
            start = np.log(spec.initial) if spec.positive else spec.initial
            raw[group] = jnp.full(shape, start, leaf.dtype)
    names = {path_name(path).split("/")[0] for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    has_head = any(path_name(p).startswith(f"{spec.head}/") for p, _ in jax.tree_util.tree_leaves_with_path(params))
    if not raw or (spec.adapts != "all" and not has_head):
        raise ConfigError(f"model.head: expected a layer {spec.head!r} for adapts={spec.adapts}, got {sorted(names)}")
    return raw


def actual(spec: RatesSpec, raw: Rates) -> Rates:
    """The learning rates that raw ones stand for. Same shapes."""
    return {group: jnp.exp(value) if spec.positive else value for group, value in raw.items()}


def at_step(spec: RatesSpec, rates: Rates, step: int | jax.Array) -> Rates:
    """The actual rates of one step (0-based; may be traced), without the step axis."""
    if not spec.per_step:
        return rates
    last = jnp.minimum(step, spec.steps - 1)

    def pick(value: jax.Array) -> jax.Array:
        held = value[last]
        return jnp.where(step < spec.steps, held, value.mean(0)) if spec.extend == "mean" else held

    return {group: pick(value) for group, value in rates.items()}


def check_steps(spec: RatesSpec, steps: int) -> None:
    """Raises ConfigError if `steps` is negative or goes beyond the trained ones where the spec forbids that."""
    if not isinstance(steps, (int, np.integer)) or steps < 0:
        raise ConfigError(f"steps: expected an integer of at least 0, got {steps!r}")
    if spec.per_step and spec.extend == "error" and steps > spec.steps:
        raise ConfigError(
            f"steps: expected at most the {spec.steps} trained steps, got {steps}; use extend='hold' or 'mean'"
        )


class RatesState(NamedTuple):
    """State of `optimizer`: how many steps were taken. steps: int32 []."""

    steps: jax.Array


def optimizer(spec: RatesSpec, rates: Rates) -> optax.GradientTransformation:
    """Gradient descent with the given actual rates, as an optax transformation for any training loop.

    Works on any pytree with the tensors' names that the rates were made for; differentiable in the rates.
    """

    def init(params: Params) -> RatesState:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            group = group_of(spec, path)
            shape = jnp.shape(rates[group])[spec.per_step :] if group in rates else None
            if group is not None and (shape is None or shape not in ((), leaf.shape)):
                got = "none" if shape is None else f"one of shape {list(shape)}"
                raise ConfigError(
                    f"rates: expected a rate for {path_name(path)!r} of shape {list(leaf.shape)}, have {got}; "
                    f"groups: {sorted(rates)}"
                )
        return RatesState(jnp.zeros((), jnp.int32))

    def update(grads: Params, state: RatesState, params: Params | None = None) -> tuple[Params, RatesState]:
        now = at_step(spec, rates, state.steps)

        def scale(path: tuple[Any, ...], grad: jax.Array) -> jax.Array:
            group = group_of(spec, path)
            return jnp.zeros_like(grad) if group is None else -now[group] * grad

        return jax.tree_util.tree_map_with_path(scale, grads), RatesState(state.steps + 1)

    return optax.GradientTransformation(init, update)


def summary(spec: RatesSpec, rates: Rates) -> dict[str, float | list[float]]:
    """Mean rate of each group (a list over steps if per_step), for logs and for people."""
    axes = {group: tuple(range(int(spec.per_step), np.ndim(value))) for group, value in rates.items()}
    return {group: np.asarray(value).mean(axis=axes[group]).tolist() for group, value in rates.items()}
