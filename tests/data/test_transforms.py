"""Geometric maps of images."""

import jax
import jax.numpy as jnp
import numpy as np

from metalr.data import transforms


def test_rotation_by_right_angles_is_exact():
    images = jax.random.uniform(jax.random.key(0), (2, 5, 5))
    for quarter in range(4):
        turned = transforms.rotate(images.reshape(2, 25, 1), jnp.float32(90 * quarter), (5, 5, 1)).reshape(2, 5, 5)
        np.testing.assert_allclose(turned, jnp.rot90(images, quarter, (1, 2)), atol=1e-4)


def test_affine_reads_every_pixel_from_where_the_map_takes_it():
    image = jnp.arange(35.0).reshape(1, 35, 1)
    shape = (5, 7, 1)
    moved = transforms.affine(image, jnp.eye(2), shape, (1.0, -2.0)).reshape(5, 7)
    expected = np.zeros((5, 7))
    expected[:4, 2:] = np.arange(35).reshape(5, 7)[1:, :5]
    np.testing.assert_allclose(moved, expected, atol=1e-4)
    mirrored = transforms.affine(image, jnp.diag(jnp.array([1.0, -1.0])), shape).reshape(5, 7)
    np.testing.assert_allclose(mirrored, np.arange(35).reshape(5, 7)[:, ::-1], atol=1e-4)


def test_distortion_gives_each_image_a_map_of_its_own_around_a_shared_one():
    shape = (9, 9, 1)
    one = jax.random.uniform(jax.random.key(0), (1, 9, 9, 1)).reshape(1, -1)
    copies = jnp.repeat(one, 40, 0)
    distorted = np.asarray(transforms.distort(jax.random.key(1), copies, 0.5, shape))
    assert distorted.shape == copies.shape
    assert distorted.dtype == np.float32
    assert len(np.unique(distorted.round(4), axis=0)) == 40
    others = [np.asarray(transforms.distort(jax.random.key(seed), copies, 0.5, shape)).mean(0) for seed in range(2, 8)]
    within = np.abs(distorted - distorted.mean(0)).mean()
    between = np.mean([np.abs(other - distorted.mean(0)).mean() for other in others])
    assert within > 0.02
    assert between > 0.02
    np.testing.assert_array_equal(distorted, transforms.distort(jax.random.key(1), copies, 0.5, shape))


def test_pixels_from_a_product_are_those_of_the_left_map_first():
    """What `distort` says of shared @ own; a mirror and a quarter turn are exact and do not commute."""
    image, shape = jax.random.uniform(jax.random.key(0), (1, 25, 1)), (5, 5, 1)
    mirror, turn = jnp.diag(jnp.array([1.0, -1.0])), jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    both = transforms.affine(image, mirror @ turn, shape)
    mirrored_first = transforms.affine(transforms.affine(image, mirror, shape), turn, shape)
    turned_first = transforms.affine(transforms.affine(image, turn, shape), mirror, shape)
    np.testing.assert_allclose(both, mirrored_first, atol=1e-6)
    assert not np.allclose(both, turned_first, atol=0.1)
