"""Devices: meshes, and tensors that are split over them."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalr import models
from metalr.config import MeshConfig, TrainConfig
from metalr.errors import ConfigError
from metalr.outer import devices
from metalr.runs import training


@pytest.mark.parametrize("tasks", [1, 2, 6, 7])
def test_mesh_divides_the_tasks(tasks):
    assert tasks % devices.task_mesh(tasks).size == 0


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(tasks=0), "mesh.tasks: expected at least 1, got 0"),
        (MeshConfig(params=-1), "mesh.params: expected at least 1, got -1"),
        (MeshConfig(params=1000), "mesh: expected at most .* devices of a process, got mesh.tasks auto x mesh.params"),
        (MeshConfig(tasks=1000), "mesh: expected at most .* devices of a process, got mesh.tasks 1000"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(mesh, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        training.run(TrainConfig(mesh=mesh, out=tmp_path / "x"), name="x")
    assert not (tmp_path / "x").exists()


def test_only_what_runs_here_is_traced(monkeypatch):
    """Tracing the forms of platforms that are not here would cost as much again for each of them."""
    model, traced = models.conv4(3, (8, 8, 1), channels=2, layers=1), []

    def doubled(apply, group, x):
        traced.append(("lax.conv" if apply is model.apply else "products", group))
        return 2 * x

    @jax.jit
    def program(x):
        return devices.by_platform(model, doubled, x, accelerator_group=lambda: 7)

    assert float(program(jnp.float32(3))) == 6
    forms = {"cpu": ("products", 1), "cuda": ("products", 7)}
    assert traced == [forms.get(devices._traced_platform(), ("lax.conv", 7))]
    traced.clear()
    with devices.every_platform(True):
        assert float(program(jnp.float32(3))) == 6
    assert traced == [("products", 1), ("products", 7), ("lax.conv", 7)]
    for platform, form in {**forms, "tpu": ("lax.conv", 7)}.items():
        traced.clear()
        monkeypatch.setattr(devices, "_traced_platform", lambda platform=platform: platform)
        jax.eval_shape(lambda x: devices.by_platform(model, doubled, x, accelerator_group=lambda: 7), jnp.float32(3))
        assert traced == [form]


class _Device(NamedTuple):
    platform: str
    platform_version: str

    @property
    def client(self):
        return self


@pytest.mark.parametrize(
    ("device", "platform"),
    [
        (_Device("gpu", "PJRT C API\ncuda 13000"), "cuda"),
        (_Device("gpu", "PJRT C API\nrocm 60000"), "gpu"),
        (_Device("tpu", "PJRT C API\nTFRT TPU v5 lite"), "tpu"),
        (_Device("cpu", "cpu"), "cpu"),
    ],
)
def test_programs_are_traced_for_the_default_device(monkeypatch, device, platform):
    monkeypatch.setattr(
        jax, "local_devices", lambda backend=None: [device] if backend is None else [_Device("tpu", "")]
    )
    assert devices._traced_platform() == platform
    with devices.every_platform(True):
        assert devices._traced_platform() is None
    with jax.default_device("tpu"):
        assert devices._traced_platform() == "tpu"
        assert devices.local_devices() == [_Device("tpu", "")]
    with jax.default_device(jax.devices("cpu")[0]):
        assert devices._traced_platform() == "cpu"


def with_devices(count, code, *arguments):
    """What `code` prints as JSON at its end, in a process with so many CPU devices."""
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    fast = os.environ.get("XLA_FLAGS", "")  # what conftest found to compile sooner
    flags = {"XLA_FLAGS": f"{fast} --xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0"}
    given = [sys.executable, "-c", code, *map(str, arguments)]
    env = clean | flags | {"JAX_NUM_CPU_DEVICES": str(count)}
    ended = subprocess.run(given, env=env, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


TRAINED = """
import json, pathlib, sys
import numpy as np
import metalr
from metalr import runs
from metalr.config import EvaluationConfig, MeshConfig, ModelConfig, OuterConfig, TaskConfig, TrainConfig, InnerConfig
from metalr.outer import devices
from metalr.runs import progress, training
devices.SMALLEST_SPLIT = 256

def config(out, **mesh):
    return TrainConfig(
        tasks=TaskConfig(way=3, query=3), model=ModelConfig(widths=(16,)), inner=InnerConfig(steps=2),
        outer=OuterConfig(steps=4, meta_batch=2, validate_every=4), mesh=MeshConfig(**mesh),
        evaluation=EvaluationConfig(4, 4, steps=2, shown_tasks=0), out=pathlib.Path(sys.argv[1]) / out,
    )

quiet = progress.ConsoleReporter(quiet=True)
split = training.run(config("split", tasks=2, params=2), name="split", reporter=quiet)
plain = training.run(config("plain"), name="plain", reporter=quiet)  # 2 tasks, on 2 of 4 devices; 4 to evaluate
learner = metalr.load(plain["folder"])
x = np.random.default_rng(0).uniform(size=(4, 3, 28, 28, 1)).astype(np.float32)
learner.adapt(x, np.tile(np.arange(3), (4, 1)))
print(json.dumps([split["curve"], plain["curve"]]))
"""


def test_tensors_that_are_split_give_the_same_run(tmp_path):
    split, plain = with_devices(4, TRAINED, tmp_path)
    assert [point["accuracy"] for point in split] == [point["accuracy"] for point in plain]
    losses = []
    for name in ("split", "plain"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    np.testing.assert_allclose(*losses, atol=2e-6)


LOWERED = """
import json
import jax, jax.numpy as jnp
from metalr import models
from metalr.inner.hyperparameters import RatesSpec
from metalr.outer import Reverse, devices, initial_shapes, loop
from metalr.types import Episode

model = models.mlp(4, (16, 16, 1), widths=(2048, 2048))
spec = RatesSpec(steps=2, head=model.head)

def sample(pool, key):
    which, labels = jax.random.permutation(key, 16), jnp.arange(16) % 4
    return Episode(pool[which[:8]], labels[which[:8]], pool[which[8:]], labels[which[8:]])

optimizer = loop.make_optimizer(steps=10, init_rate=1e-3, rates_rate=1e-2)
mesh = devices.task_mesh(4, layout=devices.Layout(tasks=2, params=4))
meta = initial_shapes(model, spec)
state = loop.TrainState(meta, jax.eval_shape(optimizer.init, meta), jax.ShapeDtypeStruct((), jnp.int32))
state = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state,
    devices.shardings(state, mesh),
)
chunk = loop.make_chunk(model, spec, Reverse(remat=True), optimizer, sample, 4, mesh=mesh)
pool = jax.ShapeDtypeStruct((16, 16, 16, 1), jnp.float32)
compiled = chunk.lower(state, pool, jax.random.key(0), jnp.int32(1)).compile()
memory, text = compiled.memory_analysis(), compiled.as_text()
numbers = sum(leaf.size for leaf in jax.tree.leaves(meta.init))
print(json.dumps([numbers, memory.argument_size_in_bytes, memory.temp_size_in_bytes, text.count("all-gather(")]))
"""


def test_a_model_too_large_for_one_device_takes_a_quarter_of_the_memory_on_four():
    """Of the init, Adam's moments and what a second-order step keeps; lowered for 2 x 4 devices, nothing is run."""
    numbers, kept, between, gathers = with_devices(8, LOWERED)
    assert numbers > 4e6
    assert kept < 0.26 * 3 * 4 * numbers  # the init and two moments
    assert between < 0.5 * 3 * 4 * numbers  # without the split it is more than twice the kept
    assert gathers > 0
