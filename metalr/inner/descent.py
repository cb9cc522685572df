"""The learned hyperparameters as an optax transformation: one step of gradient descent as the outer loop shaped it.

The direction is the gradient, clipped per layer, or another optimizer's step; momentum smooths it; rates scale it;
decay shrinks the weights. What the spec does not choose costs nothing: with rates alone, a step is -rate * gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalr.errors import ConfigError
from metalr.inner import hyperparameters, optimizers
from metalr.inner.hyperparameters import RatesSpec
from metalr.inner.registry import HYPERPARAMETERS, Now
from metalr.trees import path_name
from metalr.types import Params, Rates

TINY = 1e-12  # added to mean squares before their logarithm is taken


class DescentState(NamedTuple):
    """State of `optimizer`. links: by name, of the chosen rows of HYPERPARAMETERS; base: optax's own."""

    steps: jax.Array  # [] int32
    links: dict[str, Any]
    base: Any = ()


def optimizer(
    spec: RatesSpec, rates: Rates, steps: int | jax.Array | None = None, *, tensors: Sequence[str] | None = None
) -> optax.GradientTransformation:
    """Gradient descent with the given actual hyperparameters, as an optax transformation for any training loop.

    Works on any pytree with the tensors' names that they were made for; differentiable in them.

    Args:
      steps: the length of the fine-tune (may be traced), over which a schedule with knots is spread; default:
        spec.steps.
      tensors: names of all tensors that the rates were made for; default: those of the tree that it is used on. With
        them, a tree that is a part of it (optax.multi_transform, optax.masked) is seen to be one.

    Its `init` raises ConfigError for a tensor that has no fitting rate, and for a part of a tree where that would
    change what a step is: prediction needs every layer's gradient, clipping the whole of a layer's. Its `update` for
    params that are None where a link or prediction needs them. A base that looks at the loss takes value=loss in it.
    """
    base = optimizers.base_of(spec.base)
    looks = isinstance(base, optax.GradientTransformationExtraArgs)  # at the loss, too
    links = {name: link for name in spec.chosen if (link := HYPERPARAMETERS[name].link) is not None}

    def init(params: Params) -> DescentState:
        _check_part(spec, params, tensors)
        _check_rates(spec, rates, params)
        states = {name: link.init(params) for name, link in links.items()}
        return DescentState(jnp.zeros((), jnp.int32), states, base.init(params))

    def update(
        grads: Params, state: DescentState, params: Params | None = None, **more: Any
    ) -> tuple[Params, DescentState]:
        if params is None and (spec.predicted or any(link.needs_params for link in links.values())):
            raise ConfigError("params: expected the current params in update(grads, state, params), got None")
        now = hyperparameters.at_step(spec, rates, state.steps, steps)
        states = dict(state.links)
        factors: dict[str, dict[str, jax.Array]] = {}

        def layer(path: tuple[Any, ...]) -> str | None:
            return hyperparameters.layer_of(spec, path)

        def value(name: str, path: tuple[Any, ...]) -> jax.Array | None:
            of = layer(path)
            if of is None:
                return None
            factor = factors.get(name, {}).get(of)
            return now[f"{name}:{of}"] if factor is None else now[f"{name}:{of}"] * factor

        def through(stage: str, updates: Params) -> Params:
            for name, link in links.items():
                if HYPERPARAMETERS[name].stage == stage:
                    see = Now(functools.partial(value, name), layer)
                    updates, states[name] = link.update(updates, states[name], params, see)
            return updates

        grads = through("loss", grads)
        if spec.predicted:
            factors = _predicted(spec, now, grads, params)
        given = more if looks else {}
        direction, base_state = base.update(through("gradient", grads), state.base, params, **given)
        direction = through("direction", direction)

        def scale(path: tuple[Any, ...], direction: jax.Array) -> jax.Array:
            group, of = hyperparameters.group_of(spec, path), layer(path)
            if group is None or of is None:
                return jnp.zeros_like(direction)
            rate = now[group]
            if spec.granularity == "channel":
                rate = rate.reshape((1,) * (direction.ndim - 1) + rate.shape)
            return -rate * factors.get("rate", {}).get(of, 1.0) * direction

        updates = through("update", jax.tree_util.tree_map_with_path(scale, direction))
        return updates, DescentState(state.steps + 1, states, base_state)

    made = optax.GradientTransformationExtraArgs if looks else optax.GradientTransformation
    return made(init, update)


class FineTune(NamedTuple):
    """What learned hyperparameters make of the inner loop: its optimizer, and the options of `inner.make_step`."""

    optimizer: optax.GradientTransformation
    options: dict[str, Any]


def fine_tune(
    spec: RatesSpec, rates: Rates, support: int, *, dropout: bool = False, of_steps: int | jax.Array | None = None
) -> FineTune:
    """The inner loop that actual hyperparameters stand for: optimizer, minibatches and dropout together.

    Args:
      support: examples of the support set.
      dropout: whether the model has some; a learned rate replaces it.
      of_steps: as in `optimizer`.
    """
    rates = hyperparameters.of_size(spec, rates, support)
    drop = hyperparameters.dropout(spec, rates, dropout)
    return FineTune(optimizer(spec, rates, of_steps), {"batch_size": spec.minibatch(support), "dropout": drop})


def _check_rates(spec: RatesSpec, rates: Rates, params: Params) -> None:
    """Raises ConfigError for a tensor that has no fitting rate."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        group = hyperparameters.group_of(spec, path)
        if group is None:
            continue
        shape = jnp.shape(rates[group])[bool(spec.times) :] if group in rates else None
        fitting = {"parameter": leaf.shape, "channel": leaf.shape[-1:]}.get(spec.granularity, ())
        if shape != fitting:
            got = "none" if shape is None else f"one of shape {list(shape)}"
            raise ConfigError(
                f"rates: expected a rate for {path_name(path)!r} of shape {list(fitting)}, have {got}; groups: "
                f"{sorted(rates)}"
            )


def _check_part(spec: RatesSpec, params: Params, tensors: Sequence[str] | None) -> None:
    """Raises ConfigError for a part of the tree that does not have what the chosen hyperparameters look at together."""
    if tensors is None or not (spec.predicted or spec.clip is not None):
        return
    found = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    layers = {hyperparameters.layer_name(name) for name in found}
    missing = [name for name in tensors if name not in found]
    if not spec.predicted:
        missing = [name for name in missing if hyperparameters.layer_name(name) in layers]
    if missing:
        what = "predicted from the gradients of all layers" if spec.predicted else "clipped by whole layers' norms"
        raise ConfigError(
            f"params: expected {'the whole tree' if spec.predicted else 'whole layers'}, because steps are {what}; "
            f"missing {missing}; use as_optax() on all of them, and mask what should not move after it"
        )


def _squares(spec: RatesSpec, tree: Params) -> dict[str, tuple[jax.Array, int]]:
    """Sum of squares and number of elements of each layer that adapts."""
    found: dict[str, tuple[jax.Array, int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        layer = hyperparameters.layer_of(spec, path)
        if layer is not None:
            total, count = found.get(layer, (0.0, 0))
            found[layer] = total + jnp.square(leaf).sum(), count + leaf.size
    return found


def _predicted(spec: RatesSpec, now: Rates, grads: Params, params: Params) -> dict[str, dict[str, jax.Array]]:
    """Factors of each layer's "rate" and "decay" (ALFA, Baik et al. 2020, eq. 5 and section 3.2).

    The paper feeds means, which vanish for large layers; here it is the logarithm of the root mean square, through a
    network with one hidden layer.
    """
    seen = [
        0.5 * jnp.log(total / count + TINY)
        for tree in (grads, params)
        for total, count in _squares(spec, tree).values()
    ]
    hidden = jax.nn.relu(jnp.stack(seen) @ now["predict:hidden/kernel"] + now["predict:hidden/bias"])
    factors = jnp.exp(hidden @ now["predict:out/kernel"] + now["predict:out/bias"])
    names = list(_squares(spec, params))
    return {
        "rate": dict(zip(names, factors, strict=False)),
        "decay": dict(zip(names, factors[len(names) :], strict=False)),
    }
