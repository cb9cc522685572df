"""The table of learned hyperparameters beside the rates: a row each, with all that the inner loop needs to know of it.

A row says where its value may lie, in which raw form it is learned, and what it does to a step: a small transformation
with a state of its own. `inner.descent` chains those that a spec chooses, in the order of STAGES and of this table. A
new hyperparameter is a row here, a field of RatesSpec (its start), and a flag of config.InnerConfig.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalr.types import Params

Path = tuple[Any, ...]  # of a tensor in a pytree
STAGES = ("loss", "gradient", "direction", "update")  # what is minimised; before Adam; after it; after the rates


class Now(NamedTuple):
    """What a link sees of one step.

    Attributes:
      value: path of a tensor -> the hyperparameter's actual value for it now, [] float; None if it does not adapt.
      layer: path of a tensor -> the name of what it shares the value with; None if it does not adapt.
    """

    value: Callable[[Path], jax.Array | None]
    layer: Callable[[Path], str | None]


class Link(NamedTuple):
    """One transformation of the chain.

    Attributes:
      init: params -> its state, a pytree; () for none.
      update: (updates, state, params, Now) -> (updates, state).
      needs_params: whether `update` looks at the params.
    """

    init: Callable[[Params], Any]
    update: Callable[[Params, Any, Params, Now], tuple[Params, Any]]
    needs_params: bool = False


class Raw(NamedTuple):
    """In which form a value is learned, so that any real number stands for an allowed one.

    Attributes:
      of: actual -> raw, of numpy or of a number; traced: the same of jax arrays; actual: raw -> actual.
    """

    of: Callable[[Any], Any]
    traced: Callable[[jax.Array], jax.Array]
    actual: Callable[[jax.Array], jax.Array]


LOGARITHM = Raw(np.log, jnp.log, jnp.exp)
IDENTITY = Raw(float, lambda value: value, lambda value: value)
LOGIT = Raw(lambda share: float(np.log(share / (1 - share))), jax.scipy.special.logit, jax.nn.sigmoid)


class Hyperparameter(NamedTuple):
    """One row.

    Attributes:
      raw: the form it is learned in.
      highest, lowest: its actual value is between these, and neither of them.
      source: paper and place.
      stage: where its link stands; None for what is no part of an update.
      link: what it does to a step.
      of_layers: one value for each layer (or for all, if rates are shared); otherwise a single one, NAME:all.
      timed: with the rates' time axis in front, if they have one; otherwise [].
    """

    raw: Raw
    highest: float
    source: str
    stage: str | None = None
    link: Link | None = None
    of_layers: bool = True
    timed: bool = False
    lowest: float = 0.0


def _nothing(params: Params) -> tuple[()]:
    return ()


def _pull(grads: Params, start: Params, params: Params, now: Now) -> tuple[Params, Params]:
    """Add lambda * (w - start) to the gradient."""

    def pulled(path: Path, g: jax.Array, w: jax.Array, w0: jax.Array) -> jax.Array:
        pull = now.value(path)
        return g if pull is None else g + pull * (w - w0)

    return jax.tree_util.tree_map_with_path(pulled, grads, params, start), start


def _clip(grads: Params, state: Any, _: Params, now: Now) -> tuple[Params, Any]:
    """Gradients whose norm, per layer, is at most the learned one."""
    squares: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        layer = now.layer(path)
        if layer is not None:
            squares[layer] = squares.get(layer, 0.0) + jnp.square(leaf).sum()

    def scale(path: Path, grad: jax.Array) -> jax.Array:
        layer, largest = now.layer(path), now.value(path)
        if layer is None or largest is None:
            return grad
        square = squares[layer]
        over = square > jnp.square(largest)
        safe = jnp.where(over, square, 1.0)  # the root's derivative at zero is infinite
        return grad * jnp.where(over, largest * jax.lax.rsqrt(safe), 1.0)

    return jax.tree_util.tree_map_with_path(scale, grads), state


def _smooth(directions: Params, velocity: Params, _: Params, now: Now) -> tuple[Params, Params]:
    """The velocity, momentum * velocity + direction, in place of the direction."""

    def smoothed(path: Path, v: jax.Array, d: jax.Array) -> jax.Array:
        momentum = now.value(path)
        return d if momentum is None else (momentum * v + d).astype(v.dtype)  # the state keeps its own

    velocity = jax.tree_util.tree_map_with_path(smoothed, velocity, directions)
    return velocity, velocity


def _shrink(updates: Params, state: Any, params: Params, now: Now) -> tuple[Params, Any]:
    """Take a share of the weight off, whatever the rate."""

    def shrunk(path: Path, update: jax.Array, param: jax.Array) -> jax.Array:
        decay = now.value(path)
        return update if decay is None else update - decay * param

    return jax.tree_util.tree_map_with_path(shrunk, updates, params), state


HYPERPARAMETERS = {
    "proximal": Hyperparameter(
        LOGARITHM, np.inf, "iMAML, Rajeswaran et al. 2019, eq. 3", "loss", Link(lambda params: params, _pull, True)
    ),
    "clip": Hyperparameter(
        LOGARITHM, np.inf, "Pascanu et al. 2013, algorithm 1", "gradient", Link(_nothing, _clip)
    ),
    "momentum": Hyperparameter(
        LOGIT, 1.0, "Polyak 1964", "direction", Link(lambda params: jax.tree.map(jnp.zeros_like, params), _smooth)
    ),
    "decay": Hyperparameter(
        LOGARITHM, 1.0, "decoupled, Loshchilov & Hutter 2019", "update", Link(_nothing, _shrink, True)
    ),
    "horizon_power": Hyperparameter(
        LOGARITHM, np.inf, "rates that fall with the square root of the number of steps have 1/2: Zinkevich 2003",
        timed=True,
    ),
    "support_power": Hyperparameter(
        IDENTITY, np.inf, "rates that grow with the batch have 1 (Goyal et al. 2017, section 2.1) or 1/2 (Hoffer "
        "et al. 2017)", timed=True, lowest=-np.inf,
    ),
    "dropout": Hyperparameter(LOGIT, 1.0, "Gaussian, Srivastava et al. 2014, section 10", of_layers=False),
}  # fmt: skip
