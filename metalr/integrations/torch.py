"""What was learned, in PyTorch: the init as a state dict, the learned hyperparameters as an optimizer. Imports no jax.

    from metalr.integrations import torch as metalr_torch

    learned = metalr_torch.load("runs/mine")
    module = learned.module()                    # or your own: learned.load_into(module, names={...})
    optimizer = learned.optimizer(module, steps=5)
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()

Needs the extra `torch`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metalr.errors import ArtifactError, ConfigError, one_line
from metalr.storage import sealed

try:
    import torch
except ImportError as error:
    raise ConfigError("metalr.integrations.torch: expected PyTorch; pip install 'metalr[torch]'") from error

FORMAT = 2  # the newest artifact that is read
TENSORS, FACTS = "learner.safetensors", "metalr.json"
EPS_ROOT = 1e-8  # inside Adam's square root, as in training
KINDS = ("momentum", "decay", "clip", "proximal")
Names = Mapping[str, str] | Callable[[str], str | None] | None


@dataclasses.dataclass(frozen=True)
class Learned:
    """A learned init and hyperparameters, as numpy arrays in the layout of Flax.

    Attributes:
      init: tensor's name, "dense_0/kernel" -> array.
      rates: name -> actual hyperparameter, as in metalr.Learner.rates.
      spec: the choices about them, as in metalr.inner.hyperparameters.RatesSpec.
      model: name, way, input_shape, head and settings of the network.
      facts: where it comes from.
      standardisation: x_mean and x_deviation of one input, and y_mean and y_deviation of one target, as far as training
        standardised them; the network's numbers are those then: see inputs, targets and outputs.
    """

    init: dict[str, np.ndarray]
    rates: dict[str, np.ndarray]
    spec: dict[str, Any]
    model: dict[str, Any]
    facts: dict[str, Any]
    standardisation: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs [n, …] in your own units as the network takes them; as they are if training did not standardise."""
        return self._less("x", x)

    def targets(self, y: torch.Tensor) -> torch.Tensor:
        """Targets [n, …] in your own units as the loss takes them; as they are if training did not standardise them."""
        return self._less("y", y)

    def outputs(self, outputs: torch.Tensor) -> torch.Tensor:
        """The network's outputs [n, …] in the targets' own units."""
        mean, deviation = self._units("y", outputs)
        return outputs if mean is None else outputs * deviation + mean

    def _less(self, what: str, value: torch.Tensor) -> torch.Tensor:
        value = torch.as_tensor(value)  # arrays of numpy too
        value = value if value.is_floating_point() or f"{what}_mean" not in self.standardisation else value.float()
        mean, deviation = self._units(what, value)
        return value if mean is None else (value - mean) / deviation

    def _units(self, what: str, like: torch.Tensor) -> tuple[Any, Any]:
        """(mean, deviation) of "x" or "y" as tensors like that one; (None, None) where training did not standardise."""
        found = (self.standardisation.get(f"{what}_{of}") for of in ("mean", "deviation"))
        mean, deviation = (None if value is None else torch.from_numpy(value).to(like) for value in found)
        return mean, deviation

    def module(self) -> torch.nn.Module:
        """The network in PyTorch, with the learned init: for mlp, conv4 and rnn (gru).

        It takes float images 0..1 as PyTorch has them, [n, channels, height, width] (mlp: any [n, …] in the order of
        Flax, channels last), and gives logits [n, way].

        Raises ConfigError for a network that it cannot build: build your own, and give it to `load_into`.
        """
        made = _module(self.model)
        self.load_into(made, names=lambda name: name.replace(".", "/"), layout=False)
        return made

    def state_dict(self, module: torch.nn.Module, names: Names = None) -> dict[str, torch.Tensor]:
        """The learned init under your module's names, in PyTorch's layouts: kernels [out, in], convolutions OIHW.

        Args:
          names: your parameter's name -> learned tensor's name, as a mapping or a function; default: "dense_0.weight"
            is "dense_0/kernel" (of a norm "/scale"), and "dense_0.bias" is "dense_0/bias".

        Where a layer follows flattened images, PyTorch flattens [channels, height, width] and Flax [height, width,
        channels]: permute in your module's forward, as `module` does.

        Raises ConfigError for a parameter that no learned tensor fits.
        """
        return {name: _towards(self.init[of], param) for name, param, of in self._matched(module, names)}

    def load_into(self, module: torch.nn.Module, names: Names = None, *, layout: bool = True) -> None:
        """Copy the learned init into a module of yours. Arguments as of `state_dict`; layout=False: as Flax has it."""
        with torch.no_grad():
            for _, param, of in self._matched(module, names, layout=layout):
                value = self.init[of]
                param.copy_(_towards(value, param) if layout else torch.from_numpy(np.array(value)))

    def optimizer(
        self,
        module: torch.nn.Module,
        steps: int | None = None,
        names: Names = None,
        *,
        default: float | None = None,
        support: int | None = None,
    ) -> LearnedDescent:
        """An optimizer with one parameter group a tensor: its learned rate in each step, momentum, decay and so on.

        Args:
          steps: the length of your fine-tune, over which a schedule with knots is stretched; default: as trained.
          names: as of `state_dict`.
          default: the rate of parameters that no learned tensor is like; None refuses them.
          support: the examples of your task, if rates go with them (inner.support_power); default: as trained.

        Raises ConfigError for a parameter without a rate, rates that are predicted (alfa), a base that is not here, and
        unless steps and support are None or integers of at least 1.
        """
        if self.spec["predicted"]:
            raise ConfigError("optimizer: expected rates that are not predicted, which PyTorch's optimizers cannot be")
        if self.spec["base"] not in ("sgd", "adam"):
            raise ConfigError(f"optimizer: expected rates of base sgd or adam in PyTorch, got {self.spec['base']!r}")
        for name, value in (("steps", steps), ("support", support)):
            if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
                raise ConfigError(f"{name}: expected an integer of at least 1, got {value!r}")
        ratios = {"horizon_power": self.spec["steps"] / (steps or self.spec["steps"])}
        if self.spec.get("support"):
            ratios["support_power"] = (support or self.spec["support"]) / self.spec["support"]
        elif support is not None:
            raise ConfigError(f"support: expected None with rates that do not go with it, got {support!r}")
        flat = isinstance(module, _Flax)
        matched = self._matched(module, names, layout=not flat, lost=default is not None)
        groups = []
        for name, param, of in matched:
            layer = of.rpartition("/")[0] or of if of else name.rpartition(".")[0]
            shared = "all" if self.spec["granularity"] == "shared" else layer
            group: dict[str, Any] = {"params": [param], "name": name, "learned": of, "layer": shared}
            rate = self._rate(of) if of else np.array(default, np.float32)
            for kind, ratio in ratios.items():
                power = self._of_layer(kind, shared, default=not of)
                if rate is not None and power is not None:
                    rate = rate * ratio ** power.reshape(power.shape + (1,) * (rate.ndim - power.ndim))
                    rate = _within(rate, self.spec)
            group["lr"] = float(np.mean(rate)) if rate is not None else 0.0
            group["rates"] = None if rate is None else _rates_towards(rate, self.spec, param, layout=not flat)
            of_layer = {kind: self._of_layer(kind, shared, default=not of) for kind in KINDS}
            group |= {kind: _number(value) if rate is not None else None for kind, value in of_layer.items()}
            groups.append(group)
        return LearnedDescent(groups, self.spec, self.spec["steps"] if steps is None else steps)

    def _of_layer(self, kind: str, layer: str, *, default: bool) -> np.ndarray | None:
        """What a layer learned beside its rates; where none is like it, the mean of all layers, as in JAX."""
        own = self.rates.get(f"{kind}:{layer}")
        known = [value for name, value in self.rates.items() if name.startswith(f"{kind}:")]
        return np.mean(known, axis=0) if own is None and default and known else own

    def _group_of(self, tensor: str) -> str | None:
        """The name of a tensor's rate; None if it does not adapt."""
        head = self.spec["head"]
        in_head = tensor == head or tensor.startswith(f"{head}/")
        if (self.spec["adapts"] == "head" and not in_head) or (self.spec["adapts"] == "body" and in_head):
            return None
        granularity = self.spec["granularity"]
        if granularity == "shared":
            return "all"
        return tensor.rpartition("/")[0] or tensor if granularity == "layer" else tensor

    def _rate(self, tensor: str) -> np.ndarray | None:
        group = self._group_of(tensor)
        return None if group is None else self.rates[group]

    def _matched(
        self, module: torch.nn.Module, names: Names, *, layout: bool = True, lost: bool = False
    ) -> list[tuple[str, torch.nn.Parameter, str]]:
        """(your name, your parameter, learned tensor or "" if `lost` ones are allowed) for each parameter."""
        found = []
        for name, param in module.named_parameters():
            if names is None and isinstance(module, _Flax):
                of: str | None = name.replace(".", "/")
            elif names is None:
                of = self._usual(name)
            else:
                of = names(name) if callable(names) else names.get(name)
            if of is None and lost:
                found.append((name, param, ""))
                continue
            if of not in self.init:
                raise ConfigError(
                    f"{name}: expected a learned tensor for it, one of {[*self.init]}, got {of!r}; say with names="
                )
            shape = _shape_towards(self.init[of].shape) if layout else self.init[of].shape
            if tuple(param.shape) != shape:
                raise ConfigError(f"{name}: expected shape {list(shape)} for {of}, got {list(param.shape)}")
            found.append((name, param, of))
        return found

    def _usual(self, name: str) -> str | None:
        layer, _, last = name.rpartition(".")
        layer = layer.replace(".", "/")
        for candidate in {"weight": ("kernel", "scale"), "bias": ("bias",)}.get(last, (last,)):
            if f"{layer}/{candidate}" in self.init:
                return f"{layer}/{candidate}"
        return None


class LearnedDescent(torch.optim.Optimizer):
    """Gradient descent as metalr.inner.descent does it: pull, clipping, Adam's direction, momentum, rates, decay.

    Each parameter is a group of its own; group["lr"] shows the mean of its rates. Setting it has no effect: the learned
    rates of each step are in group["rates"], [times, …] or […].
    """

    def __init__(self, groups: Iterable[dict[str, Any]], spec: Mapping[str, Any], steps: int) -> None:
        """steps: over which a schedule with knots is stretched."""
        if steps < 1:
            raise ConfigError(f"steps: expected at least 1, got {steps}")
        self.spec, self.of_steps = dict(spec), steps
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads: dict[int, torch.Tensor] = {}
        squares: dict[str, torch.Tensor] = {}
        active = [g for g in self.param_groups if g["rates"] is not None and g["params"][0].grad is not None]
        for i, group in enumerate(active):
            param = group["params"][0]
            grads[i] = param.grad
            if group["proximal"] is not None:
                start = self.state[param].setdefault("start", param.detach().clone())
                grads[i] = grads[i] + group["proximal"] * (param - start)
            squares[group["layer"]] = squares.get(group["layer"], 0.0) + grads[i].square().sum()
        for i, group in enumerate(active):
            param, direction = group["params"][0], grads[i]
            taken = self.state[param].get("step", 0)
            if group["clip"] is not None:
                norm = squares[group["layer"]].sqrt()
                direction = direction * torch.clamp(group["clip"] / torch.clamp(norm, min=1e-30), max=1.0)
            if self.spec["base"] == "adam":
                direction = self._adam(param, direction, taken + 1)
            if group["momentum"] is not None:
                state = self.state[param]
                velocity = state.get("velocity")
                direction = direction if velocity is None else group["momentum"] * velocity + direction
                state["velocity"] = direction.clone()
            change = -_at_step(group["rates"], self.spec, taken, self.of_steps) * direction
            if group["decay"] is not None:
                change = change - group["decay"] * param
            param.add_(change)
            self.state[param]["step"] = taken + 1
        return loss

    def _adam(self, param: torch.Tensor, grad: torch.Tensor, count: int) -> torch.Tensor:
        """Adam's direction (Kingma & Ba 2015, algorithm 1), with a number inside the root as in training."""
        state = self.state[param]
        first = state.get("first", torch.zeros_like(param)) * 0.9 + 0.1 * grad
        second = state.get("second", torch.zeros_like(param)) * 0.999 + 0.001 * grad.square()
        state["first"], state["second"] = first, second
        scale = torch.sqrt(second / (1 - 0.999**count) + EPS_ROOT) + 1e-8
        return first / (1 - 0.9**count) / scale


def load(path: Path | str) -> Learned:
    """Read an artifact folder, or a run folder with one, after checking its hashes. Imports no jax.

    Raises ArtifactError: missing, damaged, or of a newer format.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load as parse

    path = Path(path)
    if not (path / FACTS).is_file() and (path / "artifact" / FACTS).is_file():
        path = path / "artifact"
    facts = sealed.read_manifest(path, FACTS, FORMAT)
    try:
        tensors = parse(sealed.read_file(path, TENSORS, facts, 1 << 32))
    except SafetensorError as error:
        raise ArtifactError(f"{path / TENSORS}: not a safetensors file: {one_line(error)}") from error
    parts: dict[str, dict[str, np.ndarray]] = {"init": {}, "rates": {}, "standardisation": {}}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "standardisation" and "/" in rest:
            raise ArtifactError(f"{path}: expected a learner of one array of inputs, got one of several ({rest})")
        parts[kind][rest] = value
    own = facts["rates"], facts["model"], facts.get("facts", {}), parts["standardisation"]
    return Learned(parts["init"], parts["rates"], *own)


def init_of(module: torch.nn.Module, names: Mapping[str, str] | Callable[[str], str]) -> dict[str, Any]:
    """A module's weights in Flax's layout, as nested dicts of numpy arrays: the init of a model of the same network.

    `metalr.models.starting_from(model, init_of(module, names))` then learns rates for somebody's pre-trained weights.

    Args:
      names: your parameter's name -> "layer/tensor", as the model's init has it: "fc1.weight" -> "dense_0/kernel".
    """
    tree: dict[str, Any] = {}
    for name, param in module.named_parameters():
        path = names(name) if callable(names) else names.get(name)
        if not path:
            raise ConfigError(f"names: expected a name for {name!r}, got none")
        value = param.detach().cpu().numpy()
        at, (*parents, last) = tree, path.split("/")
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = np.ascontiguousarray(value.transpose({1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[value.ndim]))
    return tree


def _shape_towards(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Flax's shape in PyTorch's layout."""
    return {2: lambda s: (s[1], s[0]), 4: lambda s: (s[3], s[2], s[0], s[1])}.get(len(shape), lambda s: s)(shape)


def _towards(value: np.ndarray, param: torch.Tensor) -> torch.Tensor:
    """A learned tensor in PyTorch's layout, dtype and device."""
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(value.ndim, tuple(range(value.ndim)))
    return torch.from_numpy(np.ascontiguousarray(value.transpose(axes))).to(param)


def _rates_towards(rate: np.ndarray, spec: Mapping[str, Any], param: torch.Tensor, *, layout: bool) -> torch.Tensor:
    """A rate with its time axis in front, in a form that multiplies the parameter."""
    timed = bool(spec["per_step"] or spec["knots"])
    if rate.ndim == 0 and timed:  # a default
        return torch.tensor(float(rate)).to(param).reshape(1)
    each = rate if timed else rate[None]
    if spec["granularity"] == "parameter" and layout:
        axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(each.ndim - 1, tuple(range(each.ndim - 1)))
        each = each.transpose(0, *(a + 1 for a in axes))
    elif spec["granularity"] == "channel" and layout and param.ndim > 1:  # outputs come first in PyTorch
        each = each.reshape(len(each), -1, *(1,) * (param.ndim - 1))
    made = torch.from_numpy(np.ascontiguousarray(each)).to(param)
    return made if timed else made[0]


def _at_step(rates: torch.Tensor, spec: Mapping[str, Any], step: int, of_steps: int) -> torch.Tensor:
    """The rate of one step, as metalr.inner.hyperparameters.at_step."""
    if not (spec["per_step"] or spec["knots"]) or len(rates) == 1:
        return rates if not (spec["per_step"] or spec["knots"]) else rates[0]
    if spec["knots"]:
        place = min(step / max(of_steps - 1, 1), 1.0) * (spec["knots"] - 1)
        before = min(int(place), spec["knots"] - 2)
        share, one, other = place - before, rates[before], rates[before + 1]
        return one ** (1 - share) * other**share if spec["positive"] else one * (1 - share) + other * share
    if step < spec["steps"]:
        return rates[step]
    if spec["extend"] == "error":
        raise ConfigError(f"steps: expected at most the {spec['steps']} trained steps; extend is 'error'")
    return rates.mean(0) if spec["extend"] == "mean" else rates[-1]


def _within(rate: np.ndarray, spec: Mapping[str, Any]) -> np.ndarray:
    """A rate within its bounds, as metalr.inner.hyperparameters has them."""
    lowest, highest = spec["lowest"], spec["highest"]
    return np.clip(rate, -np.inf if lowest is None else lowest, np.inf if highest is None else highest)


def _number(value: np.ndarray | None) -> float | None:
    return None if value is None else float(value)


class _Flax(torch.nn.Module):
    """A network with the names and layouts of Flax."""

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Parameters by path: "dense_0/kernel" is self.dense_0.kernel."""
        for path, shape in shapes.items():
            at: torch.nn.Module = self
            *parents, last = path.split("/")
            for parent in parents:
                if not hasattr(at, parent):
                    at.add_module(parent, torch.nn.Module())
                at = getattr(at, parent)
            at.register_parameter(last, torch.nn.Parameter(torch.zeros(shape)))


def _dense(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return x @ layer.kernel + layer.bias


class _Mlp(_Flax):
    def __init__(self, model: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = model["settings"]
        sizes = [math.prod(model["input_shape"]), *self.settings["widths"], model["way"]]
        names = [*(f"dense_{i}" for i in range(len(sizes) - 2)), "head"]
        shapes: dict[str, tuple[int, ...]] = {}
        for name, inputs, outputs in zip(names, sizes[:-1], sizes[1:], strict=True):
            shapes |= {f"{name}/kernel": (inputs, outputs), f"{name}/bias": (outputs,)}
        self.tensors(shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(len(x), -1)
        for i in range(len(self.settings["widths"])):
            x = torch.relu(_dense(getattr(self, f"dense_{i}"), x))
            x = torch.nn.functional.dropout(x, self.settings["dropout"], self.training)
        return _dense(self.head, x)


class _Conv4(_Flax):
    def __init__(self, model: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = model["settings"]
        height, width, inputs = model["input_shape"]
        channels = self.settings["channels"]
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(self.settings["layers"]):
            shapes |= {f"conv_{i}/kernel": (3, 3, inputs, channels), f"conv_{i}/bias": (channels,)}
            if self.settings["norm"] != "none":
                shapes |= {f"norm_{i}/scale": (channels,), f"norm_{i}/bias": (channels,)}
            height, width, inputs = -(-height // 2), -(-width // 2), channels
        self.tensors(shapes | {"head/kernel": (height * width * inputs, model["way"]), "head/bias": (model["way"],)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(self.settings["layers"]):
            conv = getattr(self, f"conv_{i}")
            padding = [p for size in (x.shape[3], x.shape[2]) for p in _same(size)]  # last axis first
            kernel = conv.kernel.permute(3, 2, 0, 1)
            x = torch.nn.functional.conv2d(torch.nn.functional.pad(x, padding), kernel, conv.bias, stride=2)
            if self.settings["norm"] != "none":
                norm, axes = getattr(self, f"norm_{i}"), (2, 3) if self.settings["norm"] == "instance" else (0, 2, 3)
                mean = x.mean(axes, keepdim=True)
                variance = (x * x).mean(axes, keepdim=True) - mean * mean
                x = (x - mean) * torch.rsqrt(torch.clamp(variance, min=0) + 1e-5)
                x = x * norm.scale[None, :, None, None] + norm.bias[None, :, None, None]
            x = torch.relu(x)
        return _dense(self.head, x.permute(0, 2, 3, 1).reshape(len(x), -1))


def _same(size: int) -> tuple[int, int]:
    """Padding of a 3-wide convolution with stride 2 that gives ceil(size / 2), as Flax's "SAME"."""
    total = max((-(-size // 2) - 1) * 2 + 3 - size, 0)
    return total // 2, total - total // 2


class _Gru(_Flax):
    def __init__(self, model: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.width = model["settings"]["width"]
        self.tensors(tensors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.permute(0, 2, 3, 1).reshape(len(x), x.shape[2], -1)  # one row of the image a time step
        cell: Any = self.GRUCell_0
        state = torch.zeros(len(x), self.width).to(x)
        for t in range(rows.shape[1]):
            row = rows[:, t]
            reset = torch.sigmoid(_dense(cell.ir, row) + state @ cell.hr.kernel)
            update = torch.sigmoid(_dense(cell.iz, row) + state @ cell.hz.kernel)
            new = torch.tanh(_dense(getattr(cell, "in"), row) + reset * _dense(cell.hn, state))
            state = (1 - update) * new + update * state
        return _dense(self.head, state)


def _module(model: Mapping[str, Any]) -> torch.nn.Module:
    name, settings = model["name"], model["settings"]
    if settings.get("head_start", "learned") != "learned" or settings.get("dtype", "float32") != "float32":
        raise ConfigError(f"module: expected a learned head and float32, got {settings}; build your own module")
    if name == "mlp":
        return _Mlp(model)
    if name == "conv4" and settings["norm"] != "support":
        return _Conv4(model)
    if name == "rnn" and settings["cell"] == "gru":
        _, width, channels = model["input_shape"]
        inputs, size = width * channels, settings["width"]
        shapes: dict[str, tuple[int, ...]] = {}
        for gate in "rzn":
            shapes |= {f"GRUCell_0/i{gate}/kernel": (inputs, size), f"GRUCell_0/i{gate}/bias": (size,)}
            shapes |= {f"GRUCell_0/h{gate}/kernel": (size, size)}
        shapes |= {"GRUCell_0/hn/bias": (size,), "head/kernel": (size, model["way"]), "head/bias": (model["way"],)}
        return _Gru(model, shapes)
    raise ConfigError(f"module: expected mlp, conv4 or rnn (gru), got {name} {settings}; build your own module")
