"""Geometric maps of images: rotation, and any affine map about the centre. Bilinear, zeros outside."""

from __future__ import annotations

import jax
import jax.numpy as jnp

OWN = 0.6  # of `distort`'s strength: how strong each image's own map is
SHIFT = 0.1  # of the image's size, at strength 1: how far each image moves at most


def distort(key: jax.Array, pixels: jax.Array, strength: float, shape: tuple[int, int, int]) -> jax.Array:
    """All images through one map: the identity, mirrored or not, plus strength times uniform numbers in -1/2..1/2.

    Before it, each image is shifted, and after it, goes through a weaker map of its own, never mirrored: as another
    hand would have drawn it.
    """
    mirror_key, map_key, own_key = jax.random.split(key, 3)
    mirror = jnp.array([1.0, jax.random.rademacher(mirror_key, (), jnp.float32)])
    shared = jnp.diag(mirror) + strength * jax.random.uniform(map_key, (2, 2), minval=-0.5, maxval=0.5)
    return each_its_own(own_key, pixels, strength, shape, shared)


def each_its_own(
    key: jax.Array, pixels: jax.Array, strength: float, shape: tuple[int, int, int], shared: jax.Array | None = None
) -> jax.Array:
    """Each image shifted and through a weak map of its own, as another hand would have drawn it; then through `shared`.

    pixels: [n, …] numbers, height * width * channels of them each; shared: [2, 2], default: the identity; result:
    float32 of the same shape.
    """

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        map_key, shift_key = jax.random.split(key)
        own = jnp.eye(2) + strength * OWN * jax.random.uniform(map_key, (2, 2), minval=-0.5, maxval=0.5)
        shift = strength * SHIFT * jnp.array(shape[:2]) * jax.random.uniform(shift_key, (2,), minval=-1.0)
        return affine(image[None], own if shared is None else shared @ own, shape, shift)[0]

    images = pixels.reshape(len(pixels), shape[0] * shape[1], shape[2])
    return jax.vmap(one)(jax.random.split(key, len(pixels)), images).reshape(pixels.shape)


def rotate(pixels: jax.Array, degrees: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Rotate images counter-clockwise about their centre, bilinear, zeros outside.

    pixels: [n, height * width, channels] numbers; degrees: [] float; result: float32 of the same shape.
    """
    angle = jnp.deg2rad(degrees)
    matrix = jnp.array([[jnp.cos(angle), jnp.sin(angle)], [-jnp.sin(angle), jnp.cos(angle)]])
    return affine(pixels, matrix, shape)


def affine(
    pixels: jax.Array, matrix: jax.Array, shape: tuple[int, int, int], shift: jax.Array | tuple[float, float] = (0, 0)
) -> jax.Array:
    """Every pixel from where `matrix` [2, 2] takes its (y, x) about the centre, plus `shift` [2]; else as `rotate`."""
    height, width, _ = shape
    y, x = (v.reshape(-1) for v in jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"))
    y, x = y.astype(jnp.float32), x.astype(jnp.float32)
    dy, dx = y - (height - 1) / 2, x - (width - 1) / 2
    from_y = matrix[0, 0] * dy + matrix[0, 1] * dx + (height - 1) / 2 + shift[0]
    from_x = matrix[1, 0] * dy + matrix[1, 1] * dx + (width - 1) / 2 + shift[1]
    y0, x0 = jnp.floor(from_y).astype(jnp.int32), jnp.floor(from_x).astype(jnp.int32)
    rotated = jnp.zeros(pixels.shape, jnp.float32)
    for corner_y, corner_x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        at_y, at_x = y0 + corner_y, x0 + corner_x
        weight = (1 - jnp.abs(from_y - at_y.astype(jnp.float32))) * (1 - jnp.abs(from_x - at_x.astype(jnp.float32)))
        inside = (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
        source = jnp.clip(at_y, 0, height - 1) * width + jnp.clip(at_x, 0, width - 1)
        rotated += jnp.where(inside, weight, 0).astype(jnp.float32)[None, :, None] * pixels[:, source].astype(
            jnp.float32
        )
    return rotated
