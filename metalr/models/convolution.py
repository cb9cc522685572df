"""Convolution as patches times a matrix, the form that CPUs run fastest, with both its transposes written out.

`lax.conv` with one kernel a task lowers to a slow grouped convolution on CPUs, and even a single one is slower than
this. Convolution, its input gradient and its kernel gradient are bilinear and each other's derivatives, so three
functions with rules in terms of one another give derivatives of any order in reverse mode (there is no forward mode),
every product in its fastest form.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class _Geometry(NamedTuple):
    """Static shape of a convolution. image: (height, width); window, strides, outputs: (rows, columns)."""

    image: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    before: tuple[int, ...]  # padding above and left
    padded: tuple[int, ...]
    outputs: tuple[int, ...]


def conv_as_patches(
    x: jax.Array, kernel: jax.Array, window_strides: Sequence[int], padding: Any, **_: Any
) -> jax.Array:
    """`lax.conv_general_dilated` for NHWC and HWIO without dilation or groups.

    Shapes: x [n, h, w, c], kernel [kh, kw, c, o] -> [n, h', w', o].
    """
    image, window, strides = x.shape[1:3], kernel.shape[:2], tuple(window_strides)
    pads = jax.lax.padtype_to_pads(image, window, strides, padding) if isinstance(padding, str) else padding
    padded = tuple(size + low + high for size, (low, high) in zip(image, pads, strict=True))
    outputs = tuple((p - k) // s + 1 for p, k, s in zip(padded, window, strides, strict=True))
    return _conv(x, kernel, _Geometry(image, window, strides, (pads[0][0], pads[1][0]), padded, outputs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: jax.Array, kernel: jax.Array, g: _Geometry) -> jax.Array:
    """[n, h, w, c], [kh, kw, c, o] -> [n, h', w', o]."""
    y = jnp.dot(_patches(x, g), kernel.reshape(-1, kernel.shape[-1]))
    return y.reshape(x.shape[0], *g.outputs, kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _kernel_gradient(x: jax.Array, dy: jax.Array, g: _Geometry) -> jax.Array:
    """[n, h, w, c], [n, h', w', o] -> [kh, kw, c, o].

    A product that contracts rows runs at less than half the rate, so the narrower factor is transposed by itself; the
    barriers keep XLA from joining transposes and product again.
    """
    patches, errors = _patches(x, g), dy.reshape(-1, dy.shape[-1])
    if len(patches) > patches.shape[1] > errors.shape[1]:  # with fewer rows, transposing costs what it saves
        flat = jax.lax.optimization_barrier(jnp.dot(jax.lax.optimization_barrier(errors.T), patches)).T
    else:
        flat = jnp.dot(patches.T, errors)
    return flat.reshape(*g.window, x.shape[-1], dy.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _input_gradient(dy: jax.Array, kernel: jax.Array, g: _Geometry) -> jax.Array:
    """[n, h', w', o], [kh, kw, c, o] -> [n, h, w, c]."""
    out = kernel.shape[-1]
    windows = jnp.dot(dy.reshape(-1, out), kernel.reshape(-1, out).T)
    image = jax.ShapeDtypeStruct((len(dy), *g.image, kernel.shape[2]), windows.dtype)
    (dx,) = jax.linear_transpose(lambda x: _patches(x, g), image)(windows)
    return dx


def _patches(x: jax.Array, g: _Geometry) -> jax.Array:
    """[n * h' * w', kh * kw * c]: every window as a row."""
    after = [p - b - s for p, b, s in zip(g.padded, g.before, g.image, strict=True)]
    x = jnp.pad(x, ((0, 0), (g.before[0], after[0]), (g.before[1], after[1]), (0, 0)))
    (sh, sw), (rows, columns) = g.strides, g.outputs
    windows = [
        x[:, i : i + sh * (rows - 1) + 1 : sh, j : j + sw * (columns - 1) + 1 : sw]
        for i in range(g.window[0])
        for j in range(g.window[1])
    ]
    return jnp.concatenate(windows, -1).reshape(-1, g.window[0] * g.window[1] * x.shape[-1])


def _both(function: Any) -> Any:
    return lambda a, b, g: (function(a, b, g), (a, b))


_conv.defvjp(_both(_conv), lambda g, ab, dy: (_input_gradient(dy, ab[1], g), _kernel_gradient(ab[0], dy, g)))
_kernel_gradient.defvjp(_both(_kernel_gradient), lambda g, ab, dk: (_input_gradient(ab[1], dk, g), _conv(ab[0], dk, g)))
_input_gradient.defvjp(_both(_input_gradient), lambda g, ab, dx: (_conv(dx, ab[1], g), _kernel_gradient(dx, ab[0], g)))
