"""The learned inner-loop hyperparameters: which parameters share one, and how it changes over steps.

They are one flat dict, name -> array. A learning rate's name is its group: the whole network ("all"), a layer
("dense_0") or a tensor ("dense_0/kernel"); a tensor without a group does not adapt. Everything else has its kind in
front: "momentum:dense_0", "decay:dense_0", "clip:dense_0", "proximal:dense_0", "dropout:all", "horizon_power:…" and
"support_power:…" (how rates change with the length of a fine-tune and with its examples), and "predict:…" for the
weights of the network that predicts hyperparameters from the task. The outer loop learns `raw` values, free of
constraints; everything else sees the actual ones. `metalr.inner.descent` makes steps of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalr.errors import ConfigError, check_whole
from metalr.inner import optimizers
from metalr.inner.registry import HYPERPARAMETERS, LOGARITHM, Raw
from metalr.trees import check_names, path_name
from metalr.types import Params, Rates, RawRates

GRANULARITIES = ("shared", "layer", "tensor", "channel", "parameter")
EXTENDS = ("hold", "mean", "error")
ADAPTS = ("all", "head", "body")
MAX_RATE = 1e3
PREDICT = "predict"
DEAD = 1e-3  # a rate below this share of the one it started from no longer adapts anything


@dataclasses.dataclass(frozen=True)
class RatesSpec:
    """The static choices about the learned hyperparameters.

    Attributes:
      granularity: what shares one rate: "shared" (MAML, Finn et al. 2017, section 2.2), "layer", "tensor" (with
        per_step: LSLR of MAML++, Antoniou et al. 2019, section 4), "channel" (one for each output of a layer), or
        "parameter" (Meta-SGD, Li et al. 2017, eq. 2).
      per_step: a rate of its own for every inner step.
      knots: a schedule of that many rates instead, spread evenly over the steps of a fine-tune however many those
        are, and interpolated between them (geometrically if positive). 0: no schedule.
      positive: learn the logarithm, so that rates stay above zero; otherwise rates may turn negative.
      steps: how many inner steps are trained.
      initial: the rate that training starts from.
      extend: the rate of a step beyond the trained ones: "hold" the last, the "mean" of all, or an "error".
        Only matters with per_step.
      adapts: "all" layers, only the "head" (ANIL, Raghu et al. 2020), or only the "body" (BOIL, Oh et al. 2021).
      head: the output layer's name, for `adapts`.
      lowest, highest: bounds that rates are projected to after every outer step; None is no bound. A lowest of 0 with
        positive=False lets rates become exactly zero: a learned mask of what adapts.
      base: the direction that rates scale: the gradient ("sgd"), Adam's ("adam"), or another optimizer's steps, see
        `optimizers.base_of`.
      momentum: start of a learned heavy-ball momentum per layer (Polyak 1964), or None for none.
      decay: start of a learned weight decay per layer, the share a step takes off a weight (decoupled, Loshchilov &
        Hutter 2019; ALFA's 1 - beta, Baik et al. 2020, eq. 4), or None.
      clip: start of a learned largest gradient norm per layer (Pascanu et al. 2013, algorithm 1), or None.
      dropout: start of a learned dropout rate, as multiplicative Gaussian noise of the same variance, through which
        gradients flow (Srivastava et al. 2014, section 10; Kingma et al. 2015, section 3), or None.
      proximal: start of a learned pull per layer towards where the fine-tune began, the lambda of lambda/2 |w - init|^2
        (iMAML, Rajeswaran et al. 2019, eq. 3), or None.
      horizon_power: start of a learned power per layer (and step or knot): rates of a fine-tune of another length are
        multiplied by (steps / its steps) ** power, so that one learned schedule serves short and long ones, or None.
        It takes meta-training at several lengths.
      support_power: start of a learned power per layer (and step or knot): rates for a support set of another size are
        multiplied by (its examples / support) ** power, so that one learned schedule serves small tasks and large ones,
        or None. It takes meta-training with several sizes.
      support: the examples of the support set that the rates are for; with support_power, and only then.
      predicted: multiply each layer's rate (and decay) in every step by what a small network predicts from the
        layers' gradients and weights (ALFA, Baik et al. 2020, section 3.2).
      batch_size: images of the support set in one step, reshuffled every epoch; None (or a smaller support set): all.
    """

    granularity: str = "layer"
    per_step: bool = False
    positive: bool = True
    steps: int = 5
    initial: float = 0.1
    extend: str = "hold"
    adapts: str = "all"
    head: str = "head"
    knots: int = 0
    lowest: float | None = None
    highest: float | None = None
    base: str = "sgd"
    momentum: float | None = None
    decay: float | None = None
    clip: float | None = None
    dropout: float | None = None
    proximal: float | None = None
    horizon_power: float | None = None
    support_power: float | None = None
    support: int | None = None
    predicted: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.base not in optimizers.DIFFERENTIATED:
            optimizers.base_of(self.base)
        choices = (("granularity", GRANULARITIES), ("extend", EXTENDS), ("adapts", ADAPTS))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ConfigError(f"rates.{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        check_whole("inner.steps", self.steps)
        for name in ("initial", *HYPERPARAMETERS, "lowest", "highest"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
                known = "rate" if name == "initial" else name
                raise ConfigError(f"inner.{known}: expected a number, got {value!r}")
        if not 0 < self.initial <= MAX_RATE:
            raise ConfigError(f"inner.rate: expected 0 < rate <= {MAX_RATE:g}, got {self.initial}")
        if not isinstance(self.knots, Integral) or self.knots not in range(1025) or self.knots == 1:
            raise ConfigError(f"inner.knots: expected 0 (no schedule) or 2..1024, got {self.knots}")
        if self.knots and self.per_step:
            raise ConfigError(
                f"inner.knots: expected 0 with per_step, which has a rate for each step, got {self.knots}"
            )
        low, high = self.range
        if not low <= self.initial <= high:
            raise ConfigError(f"inner.rate: expected within the bounds {low:g}..{high:g}, got {self.initial}")
        if self.positive and low <= 0 and self.lowest is not None:
            raise ConfigError(f"inner.lowest: expected above 0 for positive rates (or signed), got {self.lowest}")
        for name, row in HYPERPARAMETERS.items():
            value = getattr(self, name)
            if value is not None and not row.lowest < value < row.highest:
                expected = f"{row.lowest:g} < {name} < {row.highest:g}"
                if not np.isfinite(row.highest):
                    expected = "a positive number" if row.lowest == 0 else "a finite number"
                raise ConfigError(f"inner.{name}: expected {expected} (or None for none), got {value}")
        if (self.support is None) != (self.support_power is None):
            raise ConfigError(
                f"rates.support: expected a number of examples with support_power, and None without, got {self.support}"
            )
        if self.support is not None:
            check_whole("rates.support", self.support)
        if self.batch_size is not None:
            check_whole("inner.batch_size", self.batch_size, note=" (or None for all)")

    @property
    def range(self) -> tuple[float, float]:
        """The bounds of an actual rate."""
        low = -np.inf if self.lowest is None else self.lowest
        return low, np.inf if self.highest is None else self.highest

    @property
    def only_rates(self) -> bool:
        """Whether a step is -rate * gradient and nothing else."""
        return self.base == "sgd" and not self.predicted and self.batch_size is None and not self.chosen

    @property
    def chosen(self) -> tuple[str, ...]:
        """The rows of HYPERPARAMETERS that are learned beside the rates, in the order of that table."""
        return tuple(name for name in HYPERPARAMETERS if getattr(self, name) is not None)

    @property
    def of_length(self) -> bool:
        """Whether the rate of a step depends on how many steps the whole fine-tune has."""
        return self.knots > 0 or self.horizon_power is not None

    @property
    def times(self) -> int:
        """Length of a rate's time axis; 0: constant over steps."""
        return self.steps if self.per_step else self.knots

    def minibatch(self, support: int) -> int | None:
        """Size of a minibatch of a support set of that size; None: all of it."""
        return self.batch_size if self.batch_size is not None and self.batch_size < support else None


def group_of(spec: RatesSpec, path: tuple[Any, ...]) -> str | None:
    """The group of the tensor at a pytree path, or None if it does not adapt."""
    tensor = path_name(path)
    if spec.adapts != "all" and _in_head(spec, tensor) != (spec.adapts == "head"):
        return None
    if spec.granularity == "shared":
        return "all"
    return layer_name(tensor) if spec.granularity == "layer" else tensor


def _in_head(spec: RatesSpec, tensor: str) -> bool:
    return tensor == spec.head or tensor.startswith(f"{spec.head}/")


def layer_name(tensor: str) -> str:
    """The layer of a tensor: "dense_0" of "dense_0/kernel"."""
    return tensor.rpartition("/")[0] or tensor


def layer_of(spec: RatesSpec, path: tuple[Any, ...]) -> str | None:
    """What shares momentum, decay and clipping with the tensor at a path: its layer (or "all" if rates are shared)."""
    group = group_of(spec, path)
    return group if group in (None, "all") else layer_name(path_name(path))


def layers(spec: RatesSpec, params: Params) -> list[str]:
    """The layers (or "all") that adapt, in the order of `params`."""
    found = (layer_of(spec, path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
    return list(dict.fromkeys(name for name in found if name is not None))


def initial_raw(spec: RatesSpec, params: Params, key: jax.Array | None = None) -> RawRates:
    """Raw values to start meta-training from, standing for spec.initial, spec.momentum and so on.

    A rate has the shape [] (that of the tensor for "parameter", its last axis for "channel"), with [steps] or [knots]
    in front; float32 or the dtype of the parameters. A row of HYPERPARAMETERS is [] for each layer, or once.

    Args:
      key: of the weights of the network that predicts rates (spec.predicted); default: that of seed 0.

    Raises:
      ConfigError: nothing in `params` adapts (there is no layer of the name spec.head), two tensors have one name, or
        one is named like a learned hyperparameter ("clip:0").
    """
    check_names(params)
    raw = RawRates({})
    paths = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in paths:
        group = group_of(spec, path)
        if group is not None:
            own = {"parameter": leaf.shape, "channel": leaf.shape[-1:]}.get(spec.granularity, ())
            start = np.log(spec.initial) if spec.positive else spec.initial
            raw[group] = jnp.full((spec.times,) * bool(spec.times) + own, start, leaf.dtype)
    taken = [group for group in raw if kind_of(group) != "rate"]
    if taken:
        raise ConfigError(
            f"params: expected names that do not begin as those of learned hyperparameters do "
            f"({', '.join(f'{kind}:' for kind in HYPERPARAMETERS)} {PREDICT}:), got {taken[0]!r}"
        )
    names = {path_name(path).split("/")[0] for path, _ in paths}
    if not raw or (spec.adapts != "all" and not any(_in_head(spec, path_name(p)) for p, _ in paths)):
        raise ConfigError(f"model.head: expected a layer {spec.head!r} for adapts={spec.adapts}, got {sorted(names)}")
    dtype, adapting = paths[0][1].dtype, layers(spec, params)
    for kind in spec.chosen:
        row = HYPERPARAMETERS[kind]
        start, shape = row.raw.of(getattr(spec, kind)), (spec.times,) * (row.timed and spec.times > 0)
        for layer in adapting if row.of_layers else ["all"]:
            raw[f"{kind}:{layer}"] = jnp.full(shape, start, dtype)
    if spec.predicted:
        wide = 2 * len(adapting)  # gradient and weight of each layer in, rate and decay out (Baik et al., section 4.1)
        key = jax.random.key(0) if key is None else key
        draw = jax.nn.initializers.he_normal()(key, (wide, wide), dtype)
        # A last layer of zeros predicts factors of one: training starts from the rates as they are.
        network = {
            "predict:hidden/kernel": draw,
            "predict:hidden/bias": jnp.full(wide, 0.1, dtype),
            "predict:out/kernel": jnp.zeros((wide, wide if spec.decay is not None else wide // 2), dtype),
            "predict:out/bias": jnp.zeros(wide if spec.decay is not None else wide // 2, dtype),
        }
        raw.update(network)
    return raw


def kind_of(name: str) -> str:
    """What a value of the dict is: "rate", a row of HYPERPARAMETERS, or "predict".

    Tensors may have colons in their names too, as those of Keras have ("dense/kernel:0").
    """
    kind, colon, _ = name.partition(":")
    return kind if colon and (kind in HYPERPARAMETERS or kind == PREDICT) else "rate"


def _raw_form(spec: RatesSpec, kind: str) -> Raw | None:
    """The form that a kind of value is learned in; None for itself."""
    if kind == "rate":
        return LOGARITHM if spec.positive else None
    return HYPERPARAMETERS[kind].raw if kind in HYPERPARAMETERS else None


def actual(spec: RatesSpec, raw: RawRates) -> Rates:
    """The hyperparameters that raw values stand for. Same names and shapes."""

    def value(kind: str, raw: jax.Array) -> jax.Array:
        form = _raw_form(spec, kind)
        return raw if form is None else form.actual(raw)

    return Rates({name: value(kind_of(name), v) for name, v in raw.items()})


def raw_of(spec: RatesSpec, actual: Rates) -> RawRates:
    """Raw values that stand for actual hyperparameters: the inverse of `actual`, up to rounding."""

    def value(kind: str, actual: jax.Array) -> jax.Array:
        form = _raw_form(spec, kind)
        return actual if form is None else form.traced(actual)

    return RawRates({name: value(kind_of(name), jnp.asarray(v)) for name, v in actual.items()})


def project(spec: RatesSpec, raw: RawRates) -> RawRates:
    """Raw values whose rates are within spec.lowest..spec.highest."""
    if spec.lowest is None and spec.highest is None:
        return raw
    low, high = (np.log(b) if b > 0 else -np.inf for b in spec.range) if spec.positive else spec.range
    return RawRates({name: jnp.clip(v, low, high) if kind_of(name) == "rate" else v for name, v in raw.items()})


def at_step(spec: RatesSpec, rates: Rates, step: int | jax.Array, of_steps: int | jax.Array | None = None) -> Rates:
    """The actual values of one step (0-based; may be traced), without the time axis.

    of_steps: how many steps the fine-tune has (may be traced), over which a schedule with knots is spread; default:
      spec.steps.
    """
    if not spec.times and spec.horizon_power is None:
        return rates

    def pick(value: jax.Array) -> jax.Array:
        held = value[jnp.minimum(step, spec.steps - 1)]
        return jnp.where(step < spec.steps, held, value.mean(0)) if spec.extend == "mean" else held

    def between(value: jax.Array) -> jax.Array:
        last = jnp.maximum(length - 1, 1) if isinstance(length, jax.Array) else max(length - 1, 1)
        place = jnp.minimum(step / last, 1.0) * (spec.knots - 1)
        before = jnp.minimum(place.astype(jnp.int32), spec.knots - 2)
        share = (place - before.astype(place.dtype)).astype(value.dtype)
        one, other = value[before], value[before + 1]
        return one ** (1 - share) * other**share if spec.positive else one * (1 - share) + other * share

    length = of_steps if isinstance(of_steps, jax.Array) else of_steps or spec.steps
    at = between if spec.knots else pick if spec.times else lambda value: value
    shorter = Rates(rates)
    if spec.horizon_power is not None:
        shorter = _times_power(spec, rates, "horizon_power", 1 / (length / spec.steps))
    return Rates({name: at(value) if kind_of(name) == "rate" else value for name, value in shorter.items()})


def of_size(spec: RatesSpec, rates: Rates, support: int | None) -> Rates:
    """Actual values for a support set of so many examples; None: of as many as they were learned for."""
    if spec.support_power is None or spec.support is None or support is None:
        return rates
    return _times_power(spec, rates, "support_power", support / spec.support)


def _times_power(spec: RatesSpec, rates: Rates, kind: str, ratio: float | jax.Array) -> Rates:
    """Actual values with each rate times ratio ** (its value of `kind`), within spec.lowest..spec.highest."""

    def multiplied(name: str, value: jax.Array) -> jax.Array:
        if kind_of(name) != "rate" or (not isinstance(ratio, jax.Array) and ratio == 1):
            return value
        own = f"{kind}:{name}"
        power = rates[own if own in rates else f"{kind}:{layer_name(name)}"]
        of = jnp.asarray(ratio, value.dtype)
        value = value * of ** power.reshape(power.shape + (1,) * (value.ndim - power.ndim))
        return value if spec.lowest is None and spec.highest is None else jnp.clip(value, *spec.range)

    return Rates({name: multiplied(name, value) for name, value in rates.items()})


def check_steps(spec: RatesSpec, steps: int) -> None:
    """Raises ConfigError if `steps` is negative or goes beyond the trained ones where the spec forbids that."""
    check_whole("steps", steps, 0)
    if steps >= 2**31:
        raise ConfigError(f"steps: expected fewer than 2^31, got {steps}")
    if spec.per_step and spec.extend == "error" and steps > spec.steps:
        raise ConfigError(
            f"steps: expected at most the {spec.steps} trained steps, got {steps}; use extend='hold' or 'mean'"
        )


def curve_steps(steps: int, extend: str) -> int:
    """How far an adaptation curve goes where nothing else is said: 10 steps, or the trained ones."""
    return steps if extend == "error" else max(10, steps)


def dropout(spec: RatesSpec, rates: Rates, has_dropout: bool) -> bool | jax.Array:
    """What the inner loop gives to the model's dropout: the learned rate, or whether it is active at all."""
    return has_dropout if spec.dropout is None else rates["dropout:all"]


def summary(spec: RatesSpec, rates: Rates) -> dict[str, float | list[float]]:
    """Mean of each hyperparameter (a list over time if it has a time axis), for logs and for people."""
    found = {}
    for name, value in rates.items():
        if kind_of(name) != PREDICT:
            timed = bool(spec.times) and (kind_of(name) == "rate" or HYPERPARAMETERS[kind_of(name)].timed)
            found[name] = np.asarray(value).mean(axis=tuple(range(timed, np.ndim(value)))).tolist()
    return found


def health(spec: RatesSpec, rates: Rates) -> dict[str, dict[str, float]]:
    """Of each group of rates, the share that is "negative" and the share that is "dead" (|rate| < DEAD * initial)."""
    values = {name: np.asarray(value) for name, value in rates.items() if kind_of(name) == "rate"}
    return {
        name: {"negative": float((v < 0).mean()), "dead": float((np.abs(v) < DEAD * spec.initial).mean())}
        for name, v in values.items()
    }


SHOWN: dict[str, Callable[[RatesSpec, Rates], Any]] = {"rates": summary, "rates_health": health}  # in logs and results
