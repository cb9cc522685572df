"""The multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from metalr.errors import ConfigError, check_whole
from metalr.models.flax import dtype_setting, layer_dtype, logits, network
from metalr.models.model import Model

MOST_LAYERS = 64  # a model is built from an artifact's facts before those can be trusted


def mlp(
    way: int,
    input_shape: tuple[int, ...] = (28, 28, 1),
    *,
    widths: Sequence[int] = (128,),
    dropout: float = 0.0,
    dtype: str = "float32",
) -> Model:
    """Dense-ReLU(-dropout) layers and a dense head, over inputs of any shape; by default the reference MLP 784-128-way.

    dtype, here and below: "bfloat16" computes layers in it, with params, rates, norms, logits and loss in float32.
    """
    if not isinstance(widths, Sequence) or isinstance(widths, str):
        raise ConfigError(f"model.widths: expected a tuple of layer widths, such as (64,), got {widths!r}")
    widths = tuple(widths)
    if len(widths) > MOST_LAYERS:
        raise ConfigError(f"model.widths: expected at most {MOST_LAYERS} layers, got {len(widths)}")
    for width in widths:
        check_whole("model.widths", width)
    if not 0 <= dropout < 1:
        raise ConfigError(f"model.dropout: expected 0 <= dropout < 1, got {dropout}")
    settings = {"widths": list(widths), "dropout": dropout} | dtype_setting(dtype)
    module = _Mlp(way, widths, dropout, dtype)
    return network(
        "mlp", module, input_shape, way, settings,
        any_shape=True, relu_stack=dtype == "float32", dropout=dropout > 0, learned_dropout=True,
    )  # fmt: skip


def _kernel_first(x: jax.Array, kernel: jax.Array, _: Any, precision: Any = None) -> jax.Array:
    """x [n, inputs] times kernel [inputs, outputs], asked for the other way round.

    It is the same where kernels are stored as they are here; where `fit` keeps them as [rates, outputs, inputs], XLA
    needs no transposed copy of them in every step.
    """
    return jax.lax.dot_general(kernel, x, (((0,), (1,)), ((), ())), precision=precision).T


class _Mlp(nn.Module):
    way: int
    widths: tuple[int, ...]
    dropout: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, dropout: jax.Array | None = None) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths):
            dense = nn.Dense(width, dtype=layer_dtype(self.dtype), name=f"dense_{i}", dot_general=_kernel_first)
            x = nn.relu(dense(x))
            if dropout is None:
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
            else:  # Gaussian noise of dropout's variance: its rate has a derivative
                deviation = jnp.sqrt(dropout / (1 - dropout)).astype(x.dtype)
                x = x * (1 + deviation * jax.random.normal(self.make_rng("dropout"), x.shape, x.dtype))
        return logits(nn.Dense(self.way, dtype=layer_dtype(self.dtype), name="head")(x), self.dtype)
