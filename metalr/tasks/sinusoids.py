"""Sine curves: a regression task each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from metalr.errors import check_whole
from metalr.tasks.samplers import second_key
from metalr.tasks.sets import Sample, Tasks
from metalr.types import Episode


def sinusoid(shot: int = 10, query: int = 10) -> Tasks:
    """Sine curves of random amplitude 0.1..5 and phase 0..pi, inputs -5..5 (Finn et al. 2017, section 5.1).

    Inputs and targets are [n, 1] float32. The three splits draw from the same distribution with keys of their own.
    """
    check_whole("shot", shot)
    check_whole("query", query)

    def of(part: int) -> Sample:
        def sample(key: jax.Array) -> Episode:
            amplitude_key, phase_key, x_key = jax.random.split(jax.random.fold_in(second_key(key), part), 3)
            amplitude = jax.random.uniform(amplitude_key, dtype=jnp.float32, minval=0.1, maxval=5.0)
            phase = jax.random.uniform(phase_key, dtype=jnp.float32, minval=0.0, maxval=jnp.pi)
            x = jax.random.uniform(x_key, (shot + query, 1), jnp.float32, minval=-5.0, maxval=5.0)
            y = amplitude * jnp.sin(x - phase)
            return Episode(x[:shot], y[:shot], x[shot:], y[shot:])

        return sample

    facts = {"shot": shot, "query": query, "amplitude": [0.1, 5.0], "phase": [0.0, float(np.pi)], "x": [-5.0, 5.0]}
    return Tasks(of(0), of(1), of(2), name="sinusoid", facts=facts)
