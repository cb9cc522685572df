"""The learned hyperparameters as an optax transformation: one step of gradient descent as the outer loop shaped it.

The direction is the gradient, clipped a layer, or Adam's; momentum smooths it; rates scale it; decay shrinks the
weights. What the spec does not choose costs nothing: with rates alone, a step is -rate * gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalr.errors import ConfigError
from metalr.inner import hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.inner.optimizers import promoting
from metalr.trees import path_name
from metalr.types import Params, Rates

EPS_ROOT = 1e-8  # inside Adam's square root: without it the derivative at a zero gradient is NaN
TINY = 1e-12  # added to mean squares before their logarithm is taken


class DescentState(NamedTuple):
    """State of `optimizer`. steps: int32 []; the others like params (adam: optax's own), or () if not chosen."""

    steps: jax.Array
    velocity: Any = ()
    adam: Any = ()
    start: Any = ()  # where the fine-tune began, for the proximal pull


def optimizer(
    spec: RatesSpec, rates: Rates, steps: int | None = None, *, tensors: Sequence[str] | None = None
) -> optax.GradientTransformation:
    """Gradient descent with the given actual hyperparameters, as an optax transformation for any training loop.

    Works on any pytree with the tensors' names that they were made for; differentiable in them.

    Args:
      steps: the length of the fine-tune, over which a schedule with knots is spread; default: spec.steps.
      tensors: names of all tensors that the rates were made for; default: those of the tree that it is used on. With
        them, a tree that is a part of it (optax.multi_transform, optax.masked) is seen to be one.

    Its `init` raises ConfigError for a tensor that has no fitting rate, and for a part of a tree where that would
    change
    what a step is: prediction needs every layer's gradient, clipping the whole of a layer's. Its `update` for params
    that are None where decay or prediction needs them.
    """
    adam = promoting(optax.scale_by_adam(eps_root=EPS_ROOT))

    def init(params: Params) -> DescentState:
        _check_part(spec, params, tensors)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            group = hyperparameters.group_of(spec, path)
            shape = jnp.shape(rates[group])[bool(spec.times) :] if group in rates else None
            fitting = {"parameter": leaf.shape, "channel": leaf.shape[-1:]}.get(spec.granularity, ())
            if group is not None and shape != fitting:
                got = "none" if shape is None else f"one of shape {list(shape)}"
                raise ConfigError(
                    f"rates: expected a rate for {path_name(path)!r} of shape {list(fitting)}, have "
                    f"{got}; "
                    f"groups: {sorted(rates)}"
                )
        return DescentState(
            jnp.zeros((), jnp.int32),
            velocity=() if spec.momentum is None else jax.tree.map(jnp.zeros_like, params),
            adam=adam.init(params) if spec.base == "adam" else (),
            start=() if spec.proximal is None else params,
        )

    def update(grads: Params, state: DescentState, params: Params | None = None) -> tuple[Params, DescentState]:
        if params is None and (spec.decay is not None or spec.proximal is not None or spec.predicted):
            raise ConfigError("params: expected the current params in update(grads, state, params), got None")
        now = hyperparameters.at_step(spec, rates, state.steps, steps)
        if spec.proximal is not None:
            grads = jax.tree_util.tree_map_with_path(
                lambda path, g, w, w0: (
                    g if (pull := _of_layer("proximal", spec, now, path)) is None else g + pull * (w - w0)
                ),
                grads,
                params,
                state.start,
            )
        rate_factors, decay_factors = _predicted(spec, now, grads, params) if spec.predicted else ({}, {})
        if spec.clip is not None:
            grads = _clipped(spec, now, grads)
        adam_state, velocity = state.adam, state.velocity
        if spec.base == "adam":
            grads, adam_state = adam.update(grads, adam_state)
        if spec.momentum is not None:
            velocity = jax.tree_util.tree_map_with_path(
                lambda path, v, g: g if (m := _of_layer("momentum", spec, now, path)) is None else m * v + g,
                velocity,
                grads,
            )
            grads = velocity

        def change(path: tuple[Any, ...], direction: jax.Array, param: jax.Array | None = None) -> jax.Array:
            group, layer = hyperparameters.group_of(spec, path), hyperparameters.layer_of(spec, path)
            if group is None or layer is None:
                return jnp.zeros_like(direction)
            rate = now[group]
            if spec.granularity == "channel":
                rate = rate.reshape((1,) * (direction.ndim - 1) + rate.shape)
            step = -rate * rate_factors.get(layer, 1.0) * direction
            if spec.decay is None or param is None:
                return step
            return step - now[f"decay:{layer}"] * decay_factors.get(layer, 1.0) * param

        rest = () if params is None else (params,)
        updates = jax.tree_util.tree_map_with_path(change, grads, *rest)
        return updates, DescentState(state.steps + 1, velocity, adam_state, state.start)

    return optax.GradientTransformation(init, update)


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


def _of_layer(kind: str, spec: RatesSpec, now: Rates, path: tuple[Any, ...]) -> jax.Array | None:
    layer = hyperparameters.layer_of(spec, path)
    return None if layer is None else now[f"{kind}:{layer}"]


def _squares(spec: RatesSpec, tree: Params) -> dict[str, tuple[jax.Array, int]]:
    """Sum of squares and number of elements of each layer that adapts."""
    found: dict[str, tuple[jax.Array, int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        layer = hyperparameters.layer_of(spec, path)
        if layer is not None:
            total, count = found.get(layer, (0.0, 0))
            found[layer] = total + jnp.square(leaf).sum(), count + leaf.size
    return found


def _clipped(spec: RatesSpec, now: Rates, grads: Params) -> Params:
    """Gradients whose norm, a layer, is at most the learned one."""
    squares = {layer: total for layer, (total, _) in _squares(spec, grads).items()}

    def scale(path: tuple[Any, ...], grad: jax.Array) -> jax.Array:
        layer = hyperparameters.layer_of(spec, path)
        if layer is None:
            return grad
        largest, square = now[f"clip:{layer}"], squares[layer]
        over = square > jnp.square(largest)
        safe = jnp.where(over, square, 1.0)  # the root's derivative at zero is infinite
        return grad * jnp.where(over, largest * jax.lax.rsqrt(safe), 1.0)

    return jax.tree_util.tree_map_with_path(scale, grads)


def _predicted(
    spec: RatesSpec, now: Rates, grads: Params, params: Params
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Factors of each layer's rate and decay (ALFA, Baik et al. 2020, eq. 5 and section 3.2).

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
    return dict(zip(names, factors, strict=False)), dict(zip(names, factors[len(names) :], strict=False))
