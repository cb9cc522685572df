"""How tasks are laid out over devices: the same code for CPU cores, GPUs and TPUs.

The tasks of a meta-batch are independent, so they are split over all local devices. CPU cores become devices of
their own with single-threaded products (`use_all_cores`), which beats one device with threads.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from metalr.models import Apply, Model

AXIS = "tasks"
VMAPPED_TASKS = 64  # tasks evaluated together on accelerators


def use_all_cores() -> None:
    """Make every CPU core a JAX device. Programs call this first; it does nothing once JAX runs.

    Settings that the user made (XLA_FLAGS, jax_num_cpu_devices) stay. The command line and the experiments call it;
    importing metalr as a library changes no setting.
    """
    flag = "xla_cpu_multi_thread_eigen"
    if jax._src.xla_bridge.backends_are_initialized() or jax.config.jax_num_cpu_devices > 0:  # type: ignore[attr-defined]
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}=false".strip()
    jax.config.update("jax_num_cpu_devices", cores)


def use_compilation_cache(folder: os.PathLike | str) -> None:
    """Keep compiled programs in `folder` between processes, unless the user chose a folder already."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def task_mesh(tasks: int) -> Mesh:
    """A mesh over the most local devices that divide `tasks` evenly."""
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if tasks % n == 0)
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count])


def split_tasks(
    function: Callable[..., Any], mesh: Mesh, replicated: int, *, mean: bool
) -> Callable[..., Any]:
    """`function` with its arguments after the first `replicated` split over the mesh along their leading axis.

    mean: average the results over devices (gradients); otherwise they are put together along their leading axis.
    """
    if mesh.size == 1:
        return function

    def per_device(*args: Any) -> Any:
        result = function(*args)
        return jax.lax.pmean(result, AXIS) if mean else result

    @functools.wraps(function)
    def split(*args: Any) -> Any:
        specs = tuple(P() if i < replicated else P(AXIS) for i in range(len(args)))
        out = P() if mean else P(AXIS)
        return jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*args)

    return split


def by_platform(model: Model, function: Callable[..., Any], *args: Any) -> Any:
    """`function(apply, vmapped_tasks, *args)` in the form that suits the platform it is lowered for.

    On CPUs: the model's CPU form, and tasks one by one (per-task products are fastest alone); elsewhere: the
    standard form, many tasks at once.
    """
    cpu: Apply = model.cpu_apply or model.apply
    return jax.lax.platform_dependent(
        *args,
        cpu=functools.partial(function, cpu, 1),
        default=functools.partial(function, model.apply, VMAPPED_TASKS),
    )


def map_tasks(function: Callable[..., Any], tasks: Any, vmapped: int) -> Any:
    """`function` over the leading axis of `tasks`, `vmapped` of them at a time."""
    return jax.lax.map(function, tasks, batch_size=None if vmapped == 1 else vmapped)


def mean_over_tasks(function: Callable[..., Any], tasks: Any, vmapped: int) -> Any:
    """The mean of `function` over the leading axis of `tasks`; keeps one running sum, not every task's result."""
    count = jax.tree.leaves(tasks)[0].shape[0]
    if vmapped > 1:
        return jax.tree.map(lambda v: v.mean(0), jax.vmap(function)(tasks))

    def body(total: Any, task: Any) -> tuple[Any, None]:
        return jax.tree.map(jax.numpy.add, total, function(task)), None

    zeros = jax.tree.map(
        lambda v: jax.numpy.zeros(v.shape, v.dtype),
        jax.eval_shape(function, jax.tree.map(lambda v: v[0], tasks)),
    )
    total, _ = jax.lax.scan(body, zeros, tasks)
    return jax.tree.map(lambda v: v / count, total)
