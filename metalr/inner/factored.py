"""The inner loop of a ReLU stack without ever building an adapted kernel.

With one rate per tensor, a dense kernel after s steps is exactly W0 - sum_j A_j^T B_j, where A_j holds the support
activations that entered the layer in step j and B_j the rate times the errors that left it. So `x @ W` is
`x @ W0 - (x @ A^T) @ B`: W0 is shared by all tasks, whose rows go through one large matrix product, and the first
layer, whose A is the support set itself in every step, multiplies by W0 once for all steps. A bias that shares its
kernel's rate has moved by the sum of B's rows, so it adapts as if every activation had one more entry, 1:
`x @ W0 + b0 - (x @ A^T + 1) @ B`.

`inner.adapt` with `descent.optimizer` is the plain form of the same computation and the oracle of its tests.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalr.inner import hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.inner.objective import Loss, alike, cross_entropy, squared_error
from metalr.models import Model
from metalr.types import Params, Rates

LOSSES = (cross_entropy, squared_error)  # whose gradients by the outputs this form knows
FEW_ROWS = 8  # a kernel is updated by that many images in one fused loop, rather than by a product and a difference
LOW_RANK_SHARE = 2.0  # activations and errors may be this much larger than a kernel: shared products are that good


def pays(model: Model, spec: RatesSpec, loss: Loss, support: int, steps: int) -> bool:
    """Whether this form applies to the model, rates and loss, and is the cheaper one for this support set."""
    if not model.relu_stack or model.input_shape is None:
        return False
    first = int(np.prod(model.input_shape))
    return (
        loss in LOSSES
        and not model.dropout
        and spec.only_rates
        and spec.granularity not in ("channel", "parameter")
        and support <= first // 2
        and steps <= 16
    )


def cpu_group(support: int) -> int:
    """Tasks to vmap together on a CPU: enough rows for large products, few enough for a core's cache."""
    return max(4, 80 // support)


def query_logits(
    params: Params,
    rates: Rates,
    spec: RatesSpec,
    support_x: jax.Array,
    support_y: jax.Array,
    query_x: jax.Array,
    steps: int,
    *,
    first_order: bool = False,
    every_step: bool = False,
    of_steps: int | None = None,
    loss: Loss = cross_entropy,
) -> jax.Array:
    """Logits on the query set after adapting to the support set.

    Args:
      params: the init of a `relu_stack` model.
      rates: actual rates, of granularity "shared", "layer" or "tensor".
      support_x, query_x: [support or query, …] numbers; flattened.
      support_y: [support] int for cross_entropy, [support] or [support, outputs] float for squared_error.
      steps: static number of inner steps.
      first_order: as in `inner.adapt`.
      every_step: also give the logits before each step.
      of_steps: over how many steps a schedule with knots is spread; default: spec.steps.
      loss: one of LOSSES.

    Returns:
      [query, way], or [steps + 1, query, way] if every_step.
    """
    stack = _Stack(params, rates, spec, support_x, support_y, steps, first_order, of_steps, loss)
    query_x = _floats(query_x, params)
    on_query = stack.products(query_x)  # each set apart, because joining them would copy every image
    layers = stack.start()
    seen = [stack.forward(layers, on_query)[0]] if every_step else []
    for step in range(steps):
        layers = stack.step(layers, step)
        if every_step:
            seen.append(stack.forward(layers, on_query)[0])
    return jnp.stack(seen) if every_step else stack.forward(layers, on_query)[0]


class Factors(NamedTuple):
    """A fine-tuned stack whose first kernel is not formed: it is the init's less x.T @ errors.

    Attributes:
      x: [support, inputs], what was fine-tuned on; errors: [support, outputs of the first layer], times the rates.
      bias: [outputs of the first layer].
      rest: (kernel, bias) of each later layer, fine-tuned.
    """

    x: jax.Array
    errors: jax.Array
    bias: jax.Array
    rest: list[tuple[jax.Array, jax.Array]]


def factors(
    params: Params,
    rates: Rates,
    spec: RatesSpec,
    support_x: jax.Array,
    support_y: jax.Array,
    steps: int,
    loss: Loss = cross_entropy,
) -> Factors:
    """What `adapt` gives, without ever writing a first kernel. Arguments as of `adapt`."""
    stack = _Stack(params, rates, spec, support_x, support_y, steps, False, steps, loss)
    first, rest = stack.start()
    layers: _Layers = first, [_Formed(layer.kernel, layer.bias) for layer in rest]  # wanted in the end anyway
    for step in range(steps):
        layers = stack.step(layers, step)
    first, rest = layers
    bias = first.bias - first.errors.sum(0) if stack.one_rate else first.bias
    return Factors(stack.x, first.errors, bias, [(layer.kernel, layer.bias) for layer in rest])


def outputs(params: Params, found: Factors, x: jax.Array) -> jax.Array:
    """Outputs [n, outputs] of the fine-tuned stack for inputs [n, …]. params: those that it started from."""
    x = _floats(x, params)
    kernel = params[_layer_names(params)[0]]["kernel"]
    z = jnp.dot(x, kernel) - jnp.dot(jnp.dot(x, found.x.T), found.errors) + found.bias[None]
    for kernel, bias in found.rest:
        z = jnp.dot(jax.nn.relu(z), kernel) + bias[None]
    return z


def adapt(
    params: Params,
    rates: Rates,
    spec: RatesSpec,
    support_x: jax.Array,
    support_y: jax.Array,
    steps: int,
    loss: Loss = cross_entropy,
) -> Params:
    """Params after `steps` steps on the support set; the first kernel is built once, at the end. Arguments as above.

    A schedule with knots is spread over these steps.
    """
    found = factors(params, rates, spec, support_x, support_y, steps, loss)
    names = _layer_names(params)
    first = params[names[0]]["kernel"] - jnp.dot(found.x.T, found.errors), found.bias
    formed = zip(names, [first, *found.rest], strict=True)
    return {name: {"kernel": kernel, "bias": bias} for name, (kernel, bias) in formed}


def _floats(x: jax.Array, params: Params) -> jax.Array:
    """[rows, inputs]; integers become the params' dtype, as a product with them would make of them."""
    x = x.reshape(x.shape[0], -1)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(params["head"]["kernel"].dtype)


def _layer_names(params: Params) -> list[str]:
    """dense_0, dense_1, …, head."""
    body = sorted((name for name in params if name != "head"), key=lambda n: int(n.rpartition("_")[2]))
    return [*body, "head"]


class _Stack:
    """The layers' names, the support set and what does not change from step to step."""

    def __init__(
        self,
        params: Params,
        rates: Rates,
        spec: RatesSpec,
        support_x: jax.Array,
        support_y: jax.Array,
        steps: int,
        first_order: bool,
        of_steps: int | None,
        loss: Loss,
    ) -> None:
        self.names = _layer_names(params)
        self.params, self.rates, self.spec, self.steps, self.first_order = params, rates, spec, steps, first_order
        self.of_steps = of_steps
        self.one_rate = spec.granularity != "tensor"  # for a layer's kernel and bias
        self.x = _floats(support_x, params)
        outputs = params["head"]["bias"].shape[0]
        self.classes = loss is cross_entropy
        if self.classes:
            self.targets = jax.nn.one_hot(support_y, outputs, dtype=self.x.dtype)
        else:
            shape = len(self.x), outputs
            self.targets = alike(jnp.zeros(shape, self.x.dtype), support_y)[1].reshape(shape)
        self.on_support = self.products(self.x)

    def products(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The only products with the first kernel, and with the support images, that any step needs."""
        gram = jnp.dot(x, self.x.T)
        return jnp.dot(x, self.params[self.names[0]]["kernel"]), gram + 1 if self.one_rate else gram

    def start(self) -> _Layers:
        first = _First(self.params[self.names[0]]["bias"], jnp.zeros_like(self.on_support[0]), self.one_rate)
        return first, [_later(self.params[name], len(self.x) * self.steps, self.one_rate) for name in self.names[1:]]

    def forward(self, layers: _Layers, products: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        """Logits, and what entered each later layer."""
        first, rest = layers
        z, inputs = first.forward(*products), []
        for layer in rest:
            inputs.append(jax.nn.relu(z))
            z = layer.forward(inputs[-1])
        return z, inputs

    def step(self, layers: _Layers, index: int) -> _Layers:
        """The layers after one more inner step."""
        first, rest = layers[0], list(layers[1])
        now = hyperparameters.at_step(self.spec, self.rates, index, self.of_steps)
        logits, inputs = self.forward(layers, self.on_support)
        # The loss's gradient by the outputs: of the mean over examples, and of the mean over all numbers.
        error = (
            (jax.nn.softmax(logits) - self.targets) / len(self.x)
            if self.classes
            else 2 * (logits - self.targets) / self.targets.size
        )
        for i in reversed(range(len(rest))):
            a, delta = jax.lax.stop_gradient((inputs[i], error)) if self.first_order else (inputs[i], error)
            error = rest[i].backward(error) * (inputs[i] > 0).astype(error.dtype)
            rest[i] = rest[i].updated(a, delta, *_rates(self.spec, now, self.names[1 + i]))
        delta = jax.lax.stop_gradient(error) if self.first_order else error
        return first.updated(delta, *_rates(self.spec, now, self.names[0])), rest


def _rates(spec: RatesSpec, now: Rates, layer: str) -> tuple[jax.Array | float, jax.Array | float]:
    """The rates of a layer's kernel and bias; 0 where it does not adapt."""
    keys = ((jax.tree_util.DictKey(layer), jax.tree_util.DictKey(tensor)) for tensor in ("kernel", "bias"))
    groups = [hyperparameters.group_of(spec, path) for path in keys]
    kernel, bias = (0.0 if group is None else now[group] for group in groups)
    return kernel, bias


class _First(NamedTuple):
    """The first layer: the products with its kernel are given; its errors, times the rates, add up."""

    bias: jax.Array  # [out], adapted unless it shares the kernel's rate: then the products see to it
    errors: jax.Array  # [support, out]
    one_rate: bool

    def forward(self, product: jax.Array, gram: jax.Array) -> jax.Array:
        return product + self.bias[None] - jnp.dot(gram, self.errors)

    def updated(self, delta: jax.Array, kernel_rate: jax.Array | float, bias_rate: jax.Array | float) -> _First:
        bias = self.bias if self.one_rate else self.bias - bias_rate * delta.sum(0)
        return _First(bias, self.errors + kernel_rate * delta, self.one_rate)


class _LowRank(NamedTuple):
    """A later layer as its shared kernel and the activations and errors of the steps so far."""

    kernel: jax.Array  # [in, out], not adapted
    bias: jax.Array  # [out], as in _First
    a: jax.Array  # [rows so far, in]
    b: jax.Array  # [rows so far, out]
    one_rate: bool

    def forward(self, x: jax.Array) -> jax.Array:
        z = jnp.dot(x, self.kernel) + self.bias[None]
        if not len(self.a):
            return z
        gram = jnp.dot(x, self.a.T)
        return z - jnp.dot(gram + 1 if self.one_rate else gram, self.b)

    def backward(self, error: jax.Array) -> jax.Array:
        back = jnp.dot(error, self.kernel.T)
        return back - jnp.dot(jnp.dot(error, self.b.T), self.a) if len(self.a) else back

    def updated(
        self, activation: jax.Array, delta: jax.Array, kernel_rate: jax.Array | float, bias_rate: jax.Array | float
    ) -> _LowRank:
        a, b = jnp.concatenate([self.a, activation]), jnp.concatenate([self.b, kernel_rate * delta])
        bias = self.bias if self.one_rate else self.bias - bias_rate * delta.sum(0)
        return _LowRank(self.kernel, bias, a, b, self.one_rate)


class _Formed(NamedTuple):
    """A later layer as its adapted kernel: cheaper where the kernel is small beside the support set."""

    kernel: jax.Array  # [in, out], adapted
    bias: jax.Array  # [out]

    def forward(self, x: jax.Array) -> jax.Array:
        return jnp.dot(x, self.kernel) + self.bias[None]

    def backward(self, error: jax.Array) -> jax.Array:
        return jnp.dot(error, self.kernel.T)

    def updated(
        self, activation: jax.Array, delta: jax.Array, kernel_rate: jax.Array | float, bias_rate: jax.Array | float
    ) -> _Formed:
        if len(delta) <= FEW_ROWS:
            change = sum(a[:, None] * d[None] for a, d in zip(activation, kernel_rate * delta, strict=True))
        else:
            change = kernel_rate * jnp.dot(activation.T, delta)
        kernel = self.kernel - change
        return _Formed(kernel, self.bias - bias_rate * delta.sum(0))


_Layers = tuple[_First, list[_Formed | _LowRank]]


def _later(layer: Params, rows: int, one_rate: bool) -> _Formed | _LowRank:
    kernel, bias = layer["kernel"], layer["bias"]
    if rows * sum(kernel.shape) < LOW_RANK_SHARE * kernel.size:
        return _LowRank(kernel, bias, kernel[:0].T[:, :0].reshape(0, kernel.shape[0]), kernel[:0], one_rate)
    return _Formed(kernel, bias)
