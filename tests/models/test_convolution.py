"""Convolution as patches: values and derivatives of three orders against lax.conv, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalr.models.convolution import conv_as_patches

pytestmark = pytest.mark.numerical


def plain(x, kernel, window_strides, padding):
    return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
    ("size", "padding"), [((7, 7), "SAME"), ((5, 6), "VALID"), ((5, 6), ((2, 1), (0, 3))), ((1, 1), "SAME")]
)
@pytest.mark.parametrize(
    ("window", "strides"), [((3, 3), (2, 2)), ((3, 3), (1, 1)), ((2, 3), (3, 1)), ((1, 1), (2, 2))]
)
def test_derivatives_of_three_orders(size, window, strides, padding):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 4)
        x, kernel, u, v = (
            jax.random.normal(key, (2, *size, 3) if i % 2 == 0 else (*window, 3, 4), jnp.float64)
            for i, key in enumerate(keys)
        )

        def orders(conv):
            def loss(x, kernel):
                return jnp.sum(jnp.sin(conv(x, kernel, strides, padding)))

            def along(x, kernel):
                gx, gk = jax.grad(loss, (0, 1))(x, kernel)
                return jnp.vdot(gx, u) + jnp.vdot(gk, v)

            def third(x, kernel):
                gx, gk = jax.grad(along, (0, 1))(x, kernel)
                return jnp.sum(gx**2) + jnp.sum(gk**2)

            return conv(x, kernel, strides, padding), *(jax.grad(f, (0, 1))(x, kernel) for f in (loss, along, third))

        ours, theirs = jax.jit(lambda: orders(conv_as_patches))(), jax.jit(lambda: orders(plain))()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), ours, theirs)


def test_vmapped_over_one_kernel_a_task():
    keys = jax.random.split(jax.random.key(0))
    x, kernels = jax.random.normal(keys[0], (5, 2, 7, 7, 3)), jax.random.normal(keys[1], (5, 3, 3, 3, 4))
    ours, theirs = (
        jax.vmap(jax.grad(lambda x, k, conv=conv: jnp.sum(conv(x, k, (2, 2), "SAME") ** 2)))(x, kernels)
        for conv in (conv_as_patches, plain)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
