"""A transformer that reads an image row by row."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from metalr.errors import ConfigError, check_whole
from metalr.models.flax import dtype_setting, layer_dtype, logits, network
from metalr.models.mlp import MOST_LAYERS
from metalr.models.model import Model


def transformer(
    way: int,
    input_shape: tuple[int, int, int] = (28, 28, 1),
    *,
    width: int = 128,
    layers: int = 4,
    attention_heads: int = 4,
    dtype: str = "float32",
) -> Model:
    """Rows of the image as tokens, learned positions, `layers` blocks of attention and MLP, the mean, a dense head.

    Norms come first in each block, and the MLP is twice as wide as the tokens. Source: Dosovitskiy et al. 2021
    (section 3.1), with rows in place of square patches, and the mean in place of a class token.
    """
    check_whole("model.width", width)
    check_whole("model.attention_heads", attention_heads)
    if width % attention_heads:
        raise ConfigError(
            f"model.width: expected a positive multiple of model.attention_heads, got {width} and {attention_heads}"
        )
    if not 1 <= layers <= MOST_LAYERS:
        raise ConfigError(f"model.layers: expected 1..{MOST_LAYERS}, got {layers}")
    settings = {"width": width, "layers": layers, "attention_heads": attention_heads} | dtype_setting(dtype)
    module = _Transformer(way, width, layers, attention_heads, dtype)
    return network("transformer", module, input_shape, way, settings)


class _Transformer(nn.Module):
    way: int
    width: int
    layers: int
    attention_heads: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        dtype = layer_dtype(self.dtype)
        rows = x.reshape(*x.shape[:2], -1)
        x = nn.Dense(self.width, dtype=dtype, name="embed")(rows)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:], jnp.float32).astype(x.dtype)[None]
        for i in range(self.layers):
            attend = nn.MultiHeadDotProductAttention(self.attention_heads, dtype=dtype, name=f"attention_{i}")
            x = x + attend(nn.LayerNorm(dtype=dtype, name=f"attention_norm_{i}")(x))
            wide = nn.Dense(2 * self.width, dtype=dtype, name=f"wide_{i}")
            narrow = nn.Dense(self.width, dtype=dtype, name=f"narrow_{i}")
            x = x + narrow(nn.gelu(wide(nn.LayerNorm(dtype=dtype, name=f"norm_{i}")(x))))
        x = nn.LayerNorm(dtype=dtype, name="norm")(x).mean(1)
        return logits(nn.Dense(self.way, dtype=dtype, name="head")(x), self.dtype)
