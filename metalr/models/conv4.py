"""The convolutional network of few-shot classification."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from metalr.errors import ConfigError, check_whole
from metalr.models.convolution import conv_as_patches
from metalr.models.flax import dtype_setting, layer_dtype, linen_apply, logits, network
from metalr.models.mlp import MOST_LAYERS
from metalr.models.model import Apply, Model, WithSupport

NORMS = ("batch", "support", "instance", "none")


def conv4(
    way: int,
    input_shape: tuple[int, int, int] = (28, 28, 1),
    *,
    channels: int = 64,
    layers: int = 4,
    norm: str = "batch",
    dtype: str = "float32",
) -> Model:
    """The few-shot standard: `layers` blocks of 3x3 stride-2 convolution, norm, ReLU; then a dense head.

    norm "batch" uses the statistics of all images given together, which is transductive on a query set (as in
    MAML's published code): one image at a time, predictions are worthless. "support" uses those of the task's support
    set for queries too, so that a prediction depends on its image and the task alone. "instance" uses each image's own;
    "none" leaves it out. Source: Vinyals et al. 2016
    (section 4.1.1) and Finn et al. 2017 (section 5.2), with strides in place of pooling.
    """
    if norm not in NORMS:
        raise ConfigError(f"model.norm: expected one of {NORMS}, got {norm!r}")
    check_whole("model.channels", channels)
    if not 1 <= layers <= MOST_LAYERS:
        raise ConfigError(f"model.layers: expected 1..{MOST_LAYERS}, got {layers}")
    settings = {"channels": channels, "layers": layers, "norm": norm} | dtype_setting(dtype)
    plain, patched = (_Conv4(way, channels, layers, norm, dtype, patches) for patches in (False, True))
    wrapped: Callable[[Apply], Apply] = WithSupport if norm == "support" else lambda apply: apply
    return network(
        "conv4", plain, input_shape, way, settings,
        apply=wrapped(linen_apply(plain)), cpu_apply=wrapped(linen_apply(patched)), transductive=norm == "batch",
    )  # fmt: skip


class _Conv4(nn.Module):
    way: int
    channels: int
    layers: int
    norm: str
    dtype: str
    patches: bool  # convolution as patches times a matrix

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, support: jax.Array | None = None) -> jax.Array:
        known = 0  # images in front, whose statistics hold for all
        if support is not None:
            x, known = jnp.concatenate([support, x]), len(support)
        for i in range(self.layers):
            x = nn.Conv(
                self.channels,
                (3, 3),
                strides=2,
                dtype=layer_dtype(self.dtype),
                name=f"conv_{i}",
                conv_general_dilated=conv_as_patches if self.patches else jax.lax.conv_general_dilated,
            )(x)
            if self.norm != "none":
                x = _Norm(per_image=self.norm == "instance", name=f"norm_{i}")(x, known)
            x = nn.relu(x)
        x = x[known:]
        head = nn.Dense(self.way, dtype=layer_dtype(self.dtype), name="head")
        return logits(head(x.reshape(x.shape[0], -1)), self.dtype)


class _Norm(nn.Module):
    """Normalise each channel by the statistics of this very input; keeps no running averages.

    The variance is that of one pass, mean(x^2) - mean(x)^2: fast, and lost where a channel's mean is hundreds of times
    its deviation, as no layer of images in 0..1 has it.

    known: if not 0, the statistics are of that many images, the first ones.
    """

    per_image: bool

    @nn.compact
    def __call__(self, x: jax.Array, known: int = 0) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        scale, bias = scale[None, None, None], bias[None, None, None]
        axes, given = (1, 2) if self.per_image else (0, 1, 2), x.dtype
        x = x.astype(jnp.promote_types(given, jnp.float32))  # sums of squares need more digits than bfloat16 has
        seen = x[:known] if known else x
        mean = seen.mean(axes, keepdims=True)
        variance = jnp.square(seen).mean(axes, keepdims=True) - jnp.square(mean)
        slope = scale * jax.lax.rsqrt(jnp.maximum(variance, 0) + 1e-5)
        return (x * slope + (bias - mean * slope)).astype(given)
