"""Learned rates for a network that they were not learned on: which of its tensors takes which of them."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalr import trees
from metalr.errors import ConfigError
from metalr.inner import hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.inner.registry import HYPERPARAMETERS
from metalr.trees import path_name
from metalr.types import Params, Rates

Names = Mapping[str, str] | Callable[[str], str | None] | str | None
BY = ("depth", "role")
MEAN = "mean"
PULLS = ("decay", "proximal")  # hyperparameters that move a weight with no gradient


class Tensor(NamedTuple):
    """A tensor of a tree. kind: "kernel", "bias", "norm" or "embedding"; place: of its layer, 0 (first) … 1 (last)."""

    name: str
    kind: str
    place: float

    @property
    def role(self) -> tuple[str, str]:
        """(kind, "first", "hidden" or "last")."""
        return self.kind, {0.0: "first", 1.0: "last"}.get(self.place, "hidden")


@dataclasses.dataclass(frozen=True)
class Matching:
    """Which learned tensors each of your tensors takes its hyperparameters from.

    Attributes:
      sources: your tensor -> learned tensors (of several the geometric mean is taken); () for the default.
      default: the rate of those; None if there are none.
      values: your tensor -> its rate, the mean over time and its elements.
      factors: your tensor -> what its learned rates are multiplied by, because its layer has another number of inputs;
        1 for all others.
    """

    sources: dict[str, tuple[str, ...]]
    default: float | None
    values: dict[str, float]
    factors: dict[str, float]

    def __str__(self) -> str:
        width = max(map(len, self.sources))
        lines = []
        for name, of in self.sources.items():
            source = ", ".join(of) if of else "default"
            if self.factors[name] != 1:
                source += f", x {self.factors[name]:.3g} for its inputs"
            lines.append(f"{name:{width}}  {self.values[name]:.4g}  {source}")
        return "\n".join(lines)


def order_of(init: Callable[[jax.Array], Params]) -> list[str]:
    """The names of a network's tensors as its init makes them; params of jit or of a file are sorted by name."""
    names: list[str] = []

    def note(key: jax.Array) -> None:
        names.extend(name for name, _ in _in_order(init(key)))

    jax.eval_shape(note, jax.random.key(0))
    return names


def tensors_of(params: Params, last: str | None = None, order: Sequence[str] = ()) -> list[Tensor]:
    """The tensors of a tree with their kinds and places; layers are in the order of the tree's own dicts.

    Args:
      last: the name of the output layer; default: the last one.
      order: the tensors' names in the order of the network, where the tree has lost it; see order_of.
    """
    names = {name: np.ndim(leaf) for name, leaf in _in_order(params)}
    if set(order) == set(names):
        names = {name: names[name] for name in order}
    prefix = "params/" if names and all(name.startswith("params/") for name in names) else ""  # Flax's outer level
    layers = list(dict.fromkeys(hyperparameters.layer_name(name.removeprefix(prefix)) for name in names))
    normalising = {
        hyperparameters.layer_name(name.removeprefix(prefix)) for name in names if name.rpartition("/")[2] == "scale"
    }
    if last in layers:
        layers.append(layers.pop(layers.index(last)))
    counted = [layer for layer in layers if layer not in normalising] or layers
    found = []
    for name, ndim in names.items():
        layer = hyperparameters.layer_name(name.removeprefix(prefix))
        before = [other for other in layers[: layers.index(layer) + 1] if other in counted]
        place = max(len(before) - 1, 0) / max(len(counted) - 1, 1)
        if layer in normalising:
            kind, place = "norm", min(max(place, 0.01), 0.99)  # between layers: never first or last
        elif "embed" in name.lower():
            kind = "embedding"
        else:
            kind = "kernel" if ndim > 1 and not name.endswith("bias") else "bias"
        found.append(Tensor(name, kind, place))
    return found


def _in_order(params: Params) -> list[tuple[str, Any]]:
    """Leaves by name: as dicts were filled where the tree is of dicts, else as jax goes, with 2 before 10.

    JAX sorts a dict's keys whenever it takes a tree apart (jit, loading), 10 before 2: those are put right too.
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    if isinstance(params, Mapping):
        walked: list[str] = []

        def walk(tree: Any, prefix: str) -> None:
            keys = sorted(tree, key=_by_number) if [*tree] == sorted(tree) else [*tree]
            for key in keys:
                value = tree[key]
                if isinstance(value, Mapping):
                    walk(value, f"{prefix}{key}/")
                else:
                    walked.extend(n for n in leaves if n == f"{prefix}{key}" or n.startswith(f"{prefix}{key}/"))

        walk(params, "")
        if sorted(walked) == sorted(leaves):
            return [(name, leaves[name]) for name in walked]
    return [(name, leaves[name]) for name in sorted(leaves, key=_by_number)]


def _by_number(name: str) -> list[int | str]:
    """A key to sort names by, in which layer_2 comes before layer_10."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


def match(
    spec: RatesSpec,
    rates: Rates,
    init: Params,
    params: Params,
    names: Names,
    default: float | str | None,
    fan_in: float = 0.0,
    head: str | None = None,
    order: Sequence[str] = (),
) -> Matching:
    """Which of the learned tensors each tensor of `params` takes its rate from. See Learner.as_optax.

    head: the output layer of `params`; default: the last one. order: of the learned tensors; see tensors_of.
    """
    if spec.predicted:
        raise ConfigError(
            "like: expected None, because these rates are predicted from the layers that they were learned on, got "
            "params of another network"
        )
    if not 0 <= fan_in <= 1:
        raise ConfigError(f"fan_in: expected a power of 0..1, got {fan_in!r}")
    learned = {each.name: each for each in tensors_of(init, spec.head, order)}
    mine = tensors_of(params, head)
    sources = _sources(learned, mine, names)
    chosen = _default_rate(spec, rates, learned, sources, default)
    shapes = trees.leaf_shapes(init), trees.leaf_shapes(params)
    inputs = {name: _inputs(each, shapes[0][name]) for name, each in learned.items()}
    factors = {
        each.name: _factor(_inputs(each, shapes[1][each.name]), [inputs[of] for of in sources[each.name]]) ** fan_in
        for each in mine
    }
    values = {name: factors[name] * float(np.mean(_combined(spec, rates, of, chosen))) for name, of in sources.items()}
    return Matching(sources, chosen, values, factors)


def _sources(learned: Mapping[str, Tensor], mine: Sequence[Tensor], names: Names) -> dict[str, tuple[str, ...]]:
    """Which learned tensors each of `mine` is like; () for none. Raises ConfigError for names that fit nothing."""
    if isinstance(names, str) and names not in BY:
        raise ConfigError(f"names: expected a mapping, a function, or one of {BY}, got {names!r}")
    if names == "role":
        return {each.name: tuple(n for n, other in learned.items() if other.role == each.role) for each in mine}
    if names == "depth":
        return {each.name: _closest(learned, each) for each in mine}
    prefix = "params/" if all(each.name.startswith("params/") for each in mine) else ""  # Flax's outer level
    own = {each.name: each.name.removeprefix(prefix) for each in mine}
    if isinstance(names, Mapping):
        unused = [key for key in names if not any(_fits(key, name) for name in own.values())]
        if unused:
            raise ConfigError(
                f"names: expected names or patterns of your tensors or layers, {[*own.values()]}, got some that fit "
                f"none: {unused}"
            )
    sources: dict[str, tuple[str, ...]] = {}
    for name, short in own.items():
        wanted: str | None = short
        if callable(names):
            wanted = names(short)
        elif isinstance(names, Mapping):
            wanted = _mapped(names, short)
        if wanted is not None and names is not None and wanted not in learned:
            raise ConfigError(f"names: {name}: expected a learned tensor, one of {[*learned]}, got {wanted!r}")
        sources[name] = (wanted,) if wanted is not None and wanted in learned else ()
    return sources


def _closest(learned: Mapping[str, Tensor], own: Tensor) -> tuple[str, ...]:
    """The learned tensor of the same kind whose layer stands at the closest place; () if there is none."""
    same = [other for other in learned.values() if other.kind == own.kind]
    closest = min((abs(other.place - own.place) for other in same), default=None)
    return tuple(other.name for other in same if abs(other.place - own.place) == closest)[:1]


def _default_rate(
    spec: RatesSpec,
    rates: Rates,
    learned: Mapping[str, Tensor],
    sources: Mapping[str, tuple[str, ...]],
    default: float | str | None,
) -> float | None:
    """The rate of tensors that are like none; None if there are none. Raises ConfigError for one that is missing."""
    lost = [name for name, of in sources.items() if not of]
    if not lost:
        return None
    if default is None:
        raise ConfigError(
            f"default: expected a rate (or 'mean' of the learned ones) for tensors that none is learned for: {lost}; "
            f"or say which they are like with names=; learned: {[*learned]}"
        )
    everywhere = [_rate(spec, rates, name) for name in learned if _group(spec, name) is not None]
    mean = float(np.exp(np.mean([np.log(max(abs(float(np.mean(rate))), 1e-12)) for rate in everywhere])))
    chosen = mean if default == MEAN else default
    if not (isinstance(chosen, (int, float)) and np.isfinite(chosen) and chosen >= 0):
        raise ConfigError(f"default: expected a rate of at least 0, or 'mean', got {default!r}")
    return float(chosen)


def _inputs(tensor: Tensor, shape: tuple[int, ...]) -> int | None:
    """How many numbers each output of a kernel is a sum over; None for what is no kernel.

    All axes but the last, as Flax lays out dense layers and convolutions; but the first one alone of an attention's
    query, key and value, [inputs, heads, outputs of each].
    """
    if tensor.kind != "kernel":
        return None
    of_attention = len(shape) == 3 and tensor.name.split("/")[-2:-1] in (["query"], ["key"], ["value"])
    return int(np.prod(shape[:1] if of_attention else shape[:-1]))


def _factor(own: int | None, learned: list[int | None]) -> float:
    """Inputs of the learned kernels (their geometric mean) over one's own; 1 for what is no kernel."""
    counts = [count for count in learned if count is not None]
    if own is None or not counts or all(count == own for count in counts):
        return 1.0
    return float(np.exp(np.mean(np.log(counts))) / own)


def _fits(key: str, name: str) -> bool:
    """Whether a key of a mapping is of a tensor: its name, its layer's, or a pattern (*) of either."""
    layer = hyperparameters.layer_name(name)
    return key in (name, layer) or fnmatch.fnmatchcase(name if "/" in key else layer, key)


def _mapped(names: Mapping[str, str], name: str) -> str | None:
    """The learned tensor of a mapping: by the tensor's name, its layer's, or the first pattern (*) that fits.

    A pattern without a slash is of layers.
    """
    layer, last = hyperparameters.layer_name(name), name.rpartition("/")[2]
    if name in names:
        return names[name]
    if layer in names:
        return f"{names[layer]}/{last}"
    for pattern, target in names.items():
        if _fits(pattern, name):
            return target if "/" in pattern else f"{target}/{last}"
    return None


def _group(spec: RatesSpec, name: str) -> str | None:
    path = tuple(jax.tree_util.DictKey(part) for part in name.split("/"))
    return hyperparameters.group_of(spec, path)


def _rate(spec: RatesSpec, rates: Rates, name: str) -> np.ndarray:
    """The rate of a learned tensor: [] or [times]; zero if it does not adapt. Means over channels and elements."""
    group = _group(spec, name)
    if group is None:
        return np.zeros((spec.times,) if spec.times else (), np.float32)
    value = np.asarray(rates[group])
    return value.mean(axis=tuple(range(bool(spec.times), value.ndim)))


def _combined(spec: RatesSpec, rates: Rates, of: tuple[str, ...], default: float | None) -> np.ndarray:
    """One rate of several learned tensors: their geometric mean where all are positive, else their mean."""
    shape = (spec.times,) if spec.times else ()
    if not of:
        assert default is not None
        return np.full(shape, default, np.float32)
    values = np.stack([_rate(spec, rates, name) for name in of])
    if len(of) == 1:
        return values[0]
    return np.exp(np.log(values).mean(0)) if (values > 0).all() else values.mean(0)


def rates_for(
    spec: RatesSpec, rates: Rates, init: Params, params: Params, matching: Matching
) -> tuple[RatesSpec, Rates]:
    """The spec and rates, a tensor each, with which descent.optimizer works on a tree like `params`."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    shapes = {path_name(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(init)}
    found: dict[str, jax.Array] = {}
    for name, of in matching.sources.items():
        same = len(of) == 1 and shapes[of[0]] == np.shape(leaves[name]) and _group(spec, of[0]) is not None
        value: Any = _combined(spec, rates, of, matching.default) * np.float32(matching.factors[name])
        if same and spec.granularity in ("channel", "parameter"):
            value = rates[str(_group(spec, of[0]))]  # element by element
        elif spec.granularity in ("channel", "parameter"):
            own = np.shape(leaves[name]) if spec.granularity == "parameter" else np.shape(leaves[name])[-1:]
            value = np.broadcast_to(value.reshape(*value.shape, *(1,) * len(own)), (*value.shape, *own))
        found[name] = jnp.asarray(value)
    granularity = spec.granularity if spec.granularity in ("channel", "parameter") else "tensor"
    adapting = {hyperparameters.layer_name(name) for name, value in found.items() if np.any(np.asarray(value) != 0)}
    for kind in spec.chosen:
        if not HYPERPARAMETERS[kind].of_layers:
            found[f"{kind}:all"] = rates[f"{kind}:all"]
            continue
        known = {name: np.asarray(value) for name, value in rates.items() if hyperparameters.kind_of(name) == kind}
        for name, of in matching.sources.items():
            layer = hyperparameters.layer_name(name)
            own = [known[key] for source in of if (key := f"{kind}:{_layer(spec, source)}") in known]
            mean = np.mean(own or list(known.values()), axis=0)  # its time axis, if it has one, stays
            if kind in PULLS and layer not in adapting:
                mean = np.zeros_like(mean)
            found.setdefault(f"{kind}:{layer}", jnp.asarray(mean, jnp.float32))
    return dataclasses.replace(spec, granularity=granularity, adapts="all"), Rates(found)


def _layer(spec: RatesSpec, name: str) -> str | None:
    path = tuple(jax.tree_util.DictKey(part) for part in name.split("/"))
    return hyperparameters.layer_of(spec, path)
