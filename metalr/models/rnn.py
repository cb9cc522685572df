"""Recurrent networks."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from metalr.errors import ConfigError, check_whole
from metalr.models.flax import dtype_setting, layer_dtype, logits, network
from metalr.models.model import Model

CELLS = ("gru", "lstm")


def rnn(
    way: int,
    input_shape: tuple[int, int, int] = (28, 28, 1),
    *,
    cell: str = "gru",
    width: int = 128,
    dtype: str = "float32",
) -> Model:
    """A GRU or LSTM that reads the image row by row; the last state feeds a dense head."""
    if cell not in CELLS:
        raise ConfigError(f"model.cell: expected one of {CELLS}, got {cell!r}")
    check_whole("model.width", width)
    settings = {"cell": cell, "width": width} | dtype_setting(dtype)
    module = _Rnn(way, cell, width, dtype)
    return network("rnn", module, input_shape, way, settings)


class _Rnn(nn.Module):
    way: int
    cell: str
    width: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        rows = x.reshape(*x.shape[:2], -1)  # one row of the image a time step
        dtype = layer_dtype(self.dtype)
        kind = nn.GRUCell if self.cell == "gru" else nn.OptimizedLSTMCell
        cell = kind(self.width, dtype=dtype)
        zeros = jnp.zeros((x.shape[0], self.width), dtype or x.dtype)
        start: Any = zeros if self.cell == "gru" else (zeros, zeros)
        states: Any = nn.RNN(cell, name="rnn")(rows, initial_carry=start)
        return logits(nn.Dense(self.way, dtype=dtype, name="head")(states[:, -1]), self.dtype)
