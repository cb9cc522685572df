"""Geometric maps of images."""

import jax
import jax.numpy as jnp
import numpy as np

from metalr import transforms


def test_rotation_by_right_angles_is_exact():
    images = jax.random.uniform(jax.random.key(0), (2, 5, 5))
    for quarter in range(4):
        turned = transforms.rotate(images.reshape(2, 25, 1), jnp.float32(90 * quarter), (5, 5, 1)).reshape(2, 5, 5)
        np.testing.assert_allclose(turned, jnp.rot90(images, quarter, (1, 2)), atol=1e-4)
