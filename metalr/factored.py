"""The inner loop of a ReLU stack without ever building an adapted kernel.

With one rate per tensor, a dense kernel after s steps is exactly W0 - sum_j A_j^T B_j, where A_j holds the support
activations that entered the layer in step j and B_j the rate times the errors that left it. So `x @ W` is
`x @ W0 - (x @ A^T) @ B`: W0 is shared by all tasks, whose rows go through one large matrix product, and the first
layer, whose A is the support set itself in every step, multiplies by W0 once for all steps.

`inner.adapt` with `rates.optimizer` is the plain form of the same computation and the oracle of its tests.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from metalr import rates as rates_lib
from metalr.models import Model
from metalr.rates import RatesSpec
from metalr.types import Params, Rates

PRODUCT = jax.lax.Precision.DEFAULT


def pays(model: Model, spec: RatesSpec, support: int, steps: int) -> bool:
    """Whether this form applies to the model and rates, and is the cheaper one for this support set."""
    first = model.input_shape[0] * model.input_shape[1] * model.input_shape[2]
    return (
        model.relu_stack
        and not model.settings.get("dropout")
        and spec.granularity != "parameter"
        and support <= first // 2
        and steps <= 16
    )


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
) -> jax.Array:
    """Logits on the query set after adapting to the support set.

    Args:
      params: the init of a `relu_stack` model.
      rates: actual rates, of granularity "shared", "layer" or "tensor".
      support_x, query_x: [support or query, height, width, channels] float.
      support_y: [support] int.
      steps: static number of inner steps.
      first_order: as in `inner.adapt`.
      every_step: also give the logits before each step.

    Returns:
      [query, way], or [steps + 1, query, way] if every_step.
    """
    support = support_y.shape[0]
    layers = [*sorted((k for k in params if k != "head"), key=lambda k: int(k.rpartition("_")[2])), "head"]
    x = jnp.concatenate([support_x, query_x]).reshape(support + query_x.shape[0], -1)
    first = jnp.dot(x, params[layers[0]]["kernel"])  # the only product with the first kernel
    gram = jnp.dot(x, x[:support].T)
    stack = [_Layer(params[name]["kernel"], params[name]["bias"]) for name in layers]
    stack[0] = _First(first[:support], gram[:support], params[layers[0]]["bias"])
    query_first = (first[support:], gram[support:])
    targets = jax.nn.one_hot(support_y, params["head"]["bias"].shape[0], dtype=x.dtype)

    def forward(first_layer: _First, rest: list[_Layer]) -> tuple[jax.Array, list[jax.Array]]:
        inputs = []
        z = first_layer.forward()
        for layer in rest:
            inputs.append(jax.nn.relu(z))
            z = layer.forward(inputs[-1])
        return z, inputs

    def query(current: list) -> jax.Array:
        return forward(current[0].on(*query_first), current[1:])[0]

    seen = [query(stack)] if every_step else []
    for step in range(steps):
        now = rates_lib.at_step(spec, rates, step)
        logits, inputs = forward(stack[0], stack[1:])
        error = (jax.nn.softmax(logits) - targets) / support
        updated = []
        for name, layer, activation in reversed(list(zip(layers, stack, [None, *inputs], strict=True))):
            groups = [_group(spec, name, tensor) for tensor in ("kernel", "bias")]
            kernel_rate, bias_rate = (None if group is None else now[group] for group in groups)
            a, delta = jax.lax.stop_gradient((activation, error)) if first_order else (activation, error)
            updated.append(layer.updated(a, delta, kernel_rate, bias_rate))
            if activation is not None:
                error = layer.backward(error) * (activation > 0)
        stack = updated[::-1]
        if every_step:
            seen.append(query(stack))
    return jnp.stack(seen) if every_step else query(stack)


def _group(spec: RatesSpec, layer: str, tensor: str) -> str | None:
    return rates_lib.group_of(spec, (jax.tree_util.DictKey(layer), jax.tree_util.DictKey(tensor)))


class _First:
    """The first layer: products with the kernel and the Gram matrix are given, errors add up."""

    def __init__(self, base, gram, bias, errors=None):  # type: ignore[no-untyped-def]
        self.base, self.gram, self.bias, self.errors = base, gram, bias, errors

    def on(self, base: jax.Array, gram: jax.Array) -> _First:
        return _First(base, gram, self.bias, self.errors)

    def forward(self) -> jax.Array:
        z = self.base + self.bias
        return z if self.errors is None else z - jnp.dot(self.gram, self.errors)

    def updated(self, _, delta, kernel_rate, bias_rate) -> _First:  # type: ignore[no-untyped-def]
        bias = self.bias if bias_rate is None else self.bias - bias_rate * delta.sum(0)
        errors = self.errors
        if kernel_rate is not None:
            errors = kernel_rate * delta if errors is None else errors + kernel_rate * delta
        return _First(self.base, self.gram, bias, errors)


class _Layer:
    """Any later layer: the shared kernel, and the activations and errors of the steps so far."""

    def __init__(self, kernel, bias, a=None, b=None):  # type: ignore[no-untyped-def]
        self.kernel, self.bias, self.a, self.b = kernel, bias, a, b

    def forward(self, x: jax.Array) -> jax.Array:
        z = jnp.dot(x, self.kernel) + self.bias
        return z if self.a is None else z - jnp.dot(jnp.dot(x, self.a.T), self.b)

    def backward(self, error: jax.Array) -> jax.Array:
        back = jnp.dot(error, self.kernel.T)
        return back if self.a is None else back - jnp.dot(jnp.dot(error, self.b.T), self.a)

    def updated(self, activation, delta, kernel_rate, bias_rate) -> _Layer:  # type: ignore[no-untyped-def]
        bias = self.bias if bias_rate is None else self.bias - bias_rate * delta.sum(0)
        if kernel_rate is None:
            return _Layer(self.kernel, bias, self.a, self.b)
        a, b = activation, kernel_rate * delta
        if self.a is not None:
            a, b = jnp.concatenate([self.a, a]), jnp.concatenate([self.b, b])
        return _Layer(self.kernel, bias, a, b)
