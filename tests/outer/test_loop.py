"""The outer loop: determinism, one compilation, devices, divergence."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalr import models, outer, tasks
from metalr.errors import ConfigError
from metalr.inner.hyperparameters import RatesSpec
from metalr.outer import loop
from metalr.types import MetaParams

METHOD = outer.Reverse()


@pytest.fixture(scope="module")
def parts(blobs):
    model, spec = models.mlp(10, (8, 8, 1), widths=(16,), dropout=0.0), RatesSpec("layer", steps=2)
    pool, sample = tasks.make_sampler(tasks.make_splits(blobs, "permuted").train, 10, 2, 3)
    optimizer = loop.make_optimizer(steps=12, init_rate=1e-2, rates_rate=1e-2)
    chunk = loop.make_chunk(model, spec, METHOD, optimizer, sample, meta_batch=4)
    return model, spec, pool, optimizer, chunk


def finish(parts, seed, every):
    model, spec, pool, optimizer, chunk = parts
    state = loop.start(model, spec, optimizer, jax.random.key(seed))
    losses = []
    for part in loop.run_chunks(chunk, state, pool, jax.random.key(seed), 12, (every,)):
        losses += part.metrics["loss"].tolist()
        state = part.state
    return [np.asarray(v) for v in jax.tree.leaves(state)], losses


def test_same_seed_same_bits(parts):
    (a, losses), (b, losses_too) = finish(parts, 0, 6), finish(parts, 0, 6)
    assert all((x == y).all() for x, y in zip(a, b, strict=True))
    assert losses == losses_too
    assert finish(parts, 1, 6)[1] != losses


def test_chunks_do_not_matter(parts):
    (a, losses), (b, losses_too), (c, _) = finish(parts, 0, 12), finish(parts, 0, 5), finish(parts, 0, 1)
    assert losses == losses_too
    assert len(losses) == 12
    assert all((x == y).all() and (x == z).all() for x, y, z in zip(a, b, c, strict=True))


def test_second_chunk_does_not_compile(parts):
    model, spec, pool, optimizer, chunk = parts
    state = loop.start(model, spec, optimizer, jax.random.key(0))
    state, _ = chunk(state, pool, jax.random.key(0), 3)
    size = chunk._cache_size()
    for count in (3, 0, 1):
        state, _ = chunk(state, pool, jax.random.key(0), count)
    assert chunk._cache_size() == size


def test_a_part_without_a_rate_does_not_move(parts, blobs):
    model, spec, pool, _, _ = parts
    _, sample = tasks.make_sampler(tasks.make_splits(blobs, "permuted").train, 10, 2, 3)
    optimizer = loop.make_optimizer(steps=4, init_rate=None, rates_rate=1e-2)
    state = loop.start(model, spec, optimizer, jax.random.key(0))
    before = jax.tree.map(np.asarray, state.meta)
    state, _ = loop.make_chunk(model, spec, METHOD, optimizer, sample, meta_batch=2)(state, pool, jax.random.key(0), 4)
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (before.init, state.meta.init)), strict=True))
    assert all((a != b).all() for a, b in zip(*map(jax.tree.leaves, (before.rates, state.meta.rates)), strict=True))


def after(parts, blobs, steps, spec=None, method=METHOD, **phases):
    """Meta-parameters after some outer steps."""
    model, own_spec, pool, _, _ = parts
    spec = spec or own_spec
    _, sample = tasks.make_sampler(tasks.make_splits(blobs, "permuted").train, 10, 2, 3)
    optimizer = loop.make_optimizer(steps=9, init_rate=1e-2, rates_rate=1e-1, schedule="constant")
    chunk = loop.make_chunk(model, spec, method, optimizer, sample, meta_batch=2, phases=loop.Phases(**phases))
    state, _ = chunk(loop.start(model, spec, optimizer, jax.random.key(0)), pool, jax.random.key(0), steps)
    return jax.tree.map(np.asarray, state.meta)


def same(a, b):
    return all(np.allclose(x, y, rtol=1e-5, atol=1e-7) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_derivative_order_annealing(parts, blobs):
    first = outer.Reverse(first_order=True)
    assert same(after(parts, blobs, 3, first_order_until=3), after(parts, blobs, 3, method=first))
    assert same(after(parts, blobs, 3, first_order_until=0), after(parts, blobs, 3))
    mixed = after(parts, blobs, 3, first_order_until=1)
    assert not same(mixed, after(parts, blobs, 3))
    assert not same(mixed, after(parts, blobs, 3, method=first))


def test_multi_step_loss_fades_out(parts, blobs):
    assert not same(after(parts, blobs, 1, multi_step_until=2), after(parts, blobs, 1))
    one_step = RatesSpec("layer", steps=1)
    assert same(after(parts, blobs, 3, one_step, multi_step_until=9), after(parts, blobs, 3, one_step))


def test_a_fresh_init_in_every_step_teaches_the_rates_alone(parts, blobs):
    start, end = after(parts, blobs, 0, fresh_init=True), after(parts, blobs, 5, fresh_init=True)
    assert same(start.init, end.init)
    assert not same(start.rates, end.rates)
    assert not same(end.rates, after(parts, blobs, 5).rates)


def test_rates_stay_within_their_bounds(parts, blobs):
    spec = RatesSpec("layer", steps=2, positive=False, lowest=0.0, highest=0.12)
    rates = after(parts, blobs, 9, spec).rates
    assert all(0 <= float(value) <= 0.12 for value in rates.values())
    assert any(float(value) in (0.0, pytest.approx(0.12)) for value in rates.values())


def test_divergence_names_the_step(parts, blobs):
    model, spec, pool, _, _ = parts
    _, sample = tasks.make_sampler(tasks.make_splits(blobs, "permuted").train, 10, 2, 3)
    optimizer = loop.make_optimizer(steps=20, init_rate=1e30, rates_rate=1e-2, clip=None)
    state = loop.start(model, spec, optimizer, jax.random.key(0))
    chunk = loop.make_chunk(model, spec, METHOD, optimizer, sample, meta_batch=2)
    with pytest.raises(loop.DivergedError, match=r"outer step \d+: loss .*lower outer.init_rate"):
        list(loop.run_chunks(chunk, state, pool, jax.random.key(0), 20, (10,)))


def test_a_step_that_is_not_finite_changes_nothing(parts, blobs):
    model, spec, pool, optimizer, _ = parts
    _, good = tasks.make_sampler(tasks.make_splits(blobs, "permuted").train, 10, 2, 3)

    def sample(pool, key):
        episode, bad = good(pool, key), jax.random.bernoulli(key, 0.2)
        return episode._replace(query_x=jax.numpy.where(bad, jax.numpy.inf, episode.query_x))

    results = {}
    for policy in loop.POLICIES:
        chunk = loop.make_chunk(model, spec, METHOD, optimizer, sample, meta_batch=2, on_divergence=policy)
        state = loop.start(model, spec, optimizer, jax.random.key(0))
        state, metrics = chunk(state, pool, jax.random.key(0), 12)
        finite = np.asarray(metrics["finite"])[:12]
        assert all(np.isfinite(v).all() for v in jax.tree.leaves(jax.tree.map(np.asarray, state)))
        results[policy] = int(state.step), finite
    first = int(np.argmin(results["skip"][1]))
    assert results["skip"][0] == 12
    assert 0 < results["skip"][1].sum() < 12
    assert results["stop"][0] == first
    assert not results["stop"][1][first:].any()
    keys = loop.task_keys(jax.random.key(0), first, 2)
    state = loop.start(model, spec, optimizer, jax.random.key(0))
    bad = loop.failing_tasks(loop.make_gradient(model, spec, METHOD, sample), state.meta, pool, first, 0, keys)
    assert bad == np.flatnonzero(jax.vmap(lambda key: jax.random.bernoulli(key, 0.2))(keys)).tolist()


def test_an_update_that_is_not_finite_is_said_to_be_so():
    """Loss and gradient are finite in that step: the message must not deny its own numbers."""
    metrics = {"loss": np.float32([0.5385]), "gradient_norm": np.float32([1.2])}
    text = str(loop.DivergedError(3, metrics, 0, None))
    assert "loss 0.5385 and gradient norm 1.2 are finite, the init or rates after the update are not" in text
    assert "expected finite numbers" not in text


@pytest.mark.parametrize("phase", ["fresh_init", "first_order_until", "multi_step_until"])
def test_failing_tasks_are_those_of_the_step_as_it_was(phase, parts, blobs):
    """With the init, the order and the step weights that the failing step had."""
    model, spec, pool, _, _ = parts
    _, sample = tasks.make_sampler(tasks.make_splits(blobs, "permuted").train, 10, 2, 3)
    phases = loop.Phases(**{phase: True if phase == "fresh_init" else 10})
    optimizer = loop.make_optimizer(steps=5, init_rate=1e-2, rates_rate=1e-2)
    chunk = loop.make_chunk(model, spec, METHOD, optimizer, sample, meta_batch=2, phases=phases)
    start = loop.start(model, spec, optimizer, jax.random.key(0))
    bad_init = start.meta.init | {"head": jax.tree.map(lambda v: v * np.nan, start.meta.init["head"])}
    gradient = jax.jit(loop.make_gradient(model, spec, METHOD, sample, phases))
    key = jax.random.key(0)
    keys = loop.task_keys(key, 0, 2)
    # Where every step draws its own init, the one in the state is never used.
    now = loop.trained_from(model, phases, start.meta._replace(init=bad_init), key, 0)
    assert loop.failing_tasks(gradient, now, pool, 0, 0, keys) == ([] if phase == "fresh_init" else [0, 1])
    one = gradient(loop.trained_from(model, phases, start.meta, key, 0), pool, 0, 0, keys)[1]["loss"]
    _, metrics = chunk(start, pool, key, 1)
    np.testing.assert_allclose(metrics["loss"][0], one, rtol=1e-5)


def test_every_outer_step_draws_one_of_the_horizons(parts, blobs):
    model, spec, pool, _, _ = parts
    _, sample = tasks.make_sampler(tasks.make_splits(blobs, "permuted").train, 10, 2, 3)
    drawn = jax.jit(loop.make_gradient(model, spec, METHOD, sample, loop.Phases(horizons=(1, 3))))
    each = [
        jax.jit(loop.make_gradient(model, dataclasses.replace(spec, steps=steps), METHOD, sample)) for steps in (1, 3)
    ]  # fmt: skip
    meta, seen = loop.start(model, spec, optax.sgd(1.0), jax.random.key(0)).meta, set()
    keys = loop.task_keys(jax.random.key(0), 0, 2)
    of_each = [float(gradient(meta, pool, 0, 0, keys)[1]["loss"]) for gradient in each]
    assert of_each[0] != pytest.approx(of_each[1])
    for number in range(8):
        variant = loop.drawn_variant(jax.random.key(0), number, 2)
        loss = float(drawn(meta, pool, number, variant, keys)[1]["loss"])
        assert loss == pytest.approx(of_each[int(variant)], rel=1e-5)
        seen.add(int(variant))
    assert seen == {0, 1}


def test_each_seed_draws_horizons_of_its_own(parts, blobs):
    """Drawn alike for all seeds, they would be a part of chance that no interval over seeds sees."""
    draws = np.array(
        [[int(loop.drawn_variant(jax.random.key(seed), number, 4)) for number in range(100)] for seed in (0, 1)]
    )
    assert 0.15 < (draws[0] == draws[1]).mean() < 0.35  # a quarter
    assert all(15 < (draws[0] == kind).sum() < 35 for kind in range(4))
    # The step takes what was drawn: its loss is that of the variant.
    model, spec, pool, _, _ = parts
    _, sample = tasks.make_sampler(tasks.make_splits(blobs, "permuted").train, 10, 2, 3)
    phases, optimizer = loop.Phases(horizons=(1, 3)), optax.sgd(0.0)
    chunk = loop.make_chunk(model, spec, METHOD, optimizer, sample, meta_batch=2, phases=phases)
    gradient = jax.jit(loop.make_gradient(model, spec, METHOD, sample, phases))
    for seed in (0, 1):
        key, state = jax.random.key(seed), loop.start(model, spec, optimizer, jax.random.key(0))
        variants = [int(loop.drawn_variant(key, number, 2)) for number in range(4)]
        expected = [
            float(gradient(state.meta, pool, number, variant, loop.task_keys(key, number, 2))[1]["loss"])
            for number, variant in enumerate(variants)
        ]
        _, metrics = chunk(state, pool, key, 4)
        np.testing.assert_allclose(metrics["loss"][:4], expected, rtol=1e-5)


def test_every_outer_step_draws_tasks_of_one_of_the_sizes(parts, blobs):
    model, spec, pool, _, _ = parts
    train = tasks.make_splits(blobs, "permuted").train
    samplers = [tasks.make_sampler(train, 10, shot, 3)[1] for shot in (1, 2)]
    drawn = jax.jit(loop.make_gradient(model, spec, METHOD, samplers, loop.Phases(horizons=(1, 3))))
    meta, keys = (
        loop.start(model, spec, optax.sgd(1.0), jax.random.key(0)).meta,
        loop.task_keys(jax.random.key(0), 0, 2),
    )
    of_each = {
        (size, steps): float(jax.jit(loop.make_gradient(model, dataclasses.replace(spec, steps=steps), METHOD, sample))(
            meta, pool, 0, 0, keys)[1]["loss"])
        for size, sample in enumerate(samplers) for steps in (1, 3)
    }  # fmt: skip
    assert len(set(of_each.values())) == 4
    seen = set()
    for number in range(24):
        variant = loop.drawn_variant(jax.random.key(0), number, 4)
        loss = float(drawn(meta, pool, number, variant, keys)[1]["loss"])
        (of,) = [variant for variant, value in of_each.items() if loss == pytest.approx(value, rel=1e-5)]
        seen.add(of)
    assert seen == {*of_each}


@pytest.mark.parametrize("learns", ["both", "init", "rates"])
def test_the_norm_that_is_clipped_is_of_what_learns(learns):
    init_rate, rates_rate = (None if learns == "rates" else 1.0), (None if learns == "init" else 1.0)
    optimizer = loop.make_optimizer(
        steps=5, init_rate=init_rate, rates_rate=rates_rate, clip=1.0, schedule="constant", base=optax.sgd
    )
    meta = MetaParams({"w": jnp.zeros(())}, {"all": jnp.zeros(())})
    grads = MetaParams({"w": jnp.full((), 3.0)}, {"all": jnp.full((), 4.0)})
    updates, _ = optimizer.update(grads, optimizer.init(meta), meta)
    expected = {"both": (-0.6, -0.8), "init": (-1.0, 0.0), "rates": (0.0, -1.0)}[learns]
    np.testing.assert_allclose((updates.init["w"], updates.rates["all"]), expected, rtol=1e-6)


def test_the_norm_in_the_log_is_of_what_learns(parts, blobs):
    model, spec, pool, _, _ = parts
    _, sample = tasks.make_sampler(tasks.make_splits(blobs, "permuted").train, 10, 2, 3)
    gradient = loop.make_gradient(model, spec, METHOD, sample)
    state = loop.start(model, spec, optax.sgd(1.0), jax.random.key(0))
    keys = loop.task_keys(jax.random.key(0), 0, 2)
    whole, _ = gradient(state.meta, pool, 0, 0, keys)
    for phases, learning in (
        (loop.Phases(fixed=("rates",)), whole.init),
        (loop.Phases(fixed=("init",)), whole.rates),
    ):
        chunk = loop.make_chunk(model, spec, METHOD, optax.sgd(1.0), sample, meta_batch=2, phases=phases)
        start = loop.start(model, spec, optax.sgd(1.0), jax.random.key(0))
        _, metrics = chunk(start, pool, jax.random.key(0), 1)
        np.testing.assert_allclose(metrics["gradient_norm"][0], optax.tree.norm(learning), rtol=1e-4)


def test_a_full_device_names_the_settings_to_lower(parts):
    _, _, pool, _, _ = parts

    def chunk(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes")

    state = loop.TrainState((), (), np.int32(4))
    with pytest.raises(loop.OutOfMemoryError, match=r"outer step 4: not enough memory; lower outer.meta_batch"):
        next(loop.run_chunks(chunk, state, pool, jax.random.key(0), 9, (9,)))


def test_unknown_policy(parts):
    model, spec, _, optimizer, _ = parts
    with pytest.raises(ConfigError, match="outer.on_divergence: expected one of"):
        loop.make_chunk(model, spec, METHOD, optimizer, lambda *_: None, 2, on_divergence="ignore")


DEVICES = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from metalr import data, models, outer, tasks
from metalr.inner.hyperparameters import RatesSpec
from metalr.outer import loop
model, spec = models.mlp(10, widths=(16,), dropout=0.0), RatesSpec("layer", steps=2)
pool, sample = tasks.make_sampler(tasks.make_splits(data.bundled(), "permuted").train, 10, 2, 3)
optimizer = loop.make_optimizer(steps=5, init_rate=1e-2, rates_rate=1e-2)
chunk = loop.make_chunk(model, spec, outer.Reverse(), optimizer, sample, meta_batch=4)
state = loop.start(model, spec, optimizer, jax.random.key(0))
compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
chunk(loop.start(model, spec, optimizer, jax.random.key(0)), pool, jax.random.key(0), 0)
first = sum("backend_compile" in name for name in compiled)
state, metrics = chunk(state, pool, jax.random.key(0), 5)
state, _ = chunk(state, pool, jax.random.key(0), 0)
assert 0 < first == sum("backend_compile" in name for name in compiled), compiled
print(jax.local_device_count(), *metrics["loss"][:5].tolist())
"""


def test_number_of_devices_does_not_change_the_result():
    def losses(count):
        call = [sys.executable, "-c", DEVICES, str(count)]
        done = subprocess.run(call, capture_output=True, text=True, check=True)
        found, *values = done.stdout.split()
        return int(found), np.array(values, float)

    (one, alone), (two, split) = losses(1), losses(2)
    assert (one, two) == (1, 2)
    np.testing.assert_allclose(alone, split, rtol=1e-4)


def test_one_device_a_core():
    code = "from metalr.outer import devices; devices.use_all_cores(); import jax; print(jax.local_device_count())"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # its own are kept
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert int(done.stdout) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_rate": 0.0}, "outer.init_rate: expected a positive number, got 0.0"),
        ({"rates_rate": float("nan")}, "outer.rates_rate: expected a positive number"),
        ({"clip": -1.0}, "outer.clip: expected a positive number"),
        ({"schedule": "linear"}, "outer.schedule: expected one of"),
        ({"steps": 0}, "outer.steps: expected at least 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        loop.make_optimizer(**({"steps": 5, "init_rate": 1e-3, "rates_rate": 1e-3} | settings))
