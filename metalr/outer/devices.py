"""How tasks are laid out over devices: the same code for CPU cores, GPUs and TPUs.

The tasks of a meta-batch are independent, so they are split over all local devices. CPU cores become devices of
their own with single-threaded products (`use_all_cores`), which beats one device with threads.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from metalr.errors import ConfigError
from metalr.models import Apply, Model

AXIS, PARAMS = "tasks", "params"
SETTINGS: Any = jax.config  # its options are not in its type
ACCELERATOR_BYTES = 64 << 30  # of the tasks vmapped together there, by `bytes_of`; XLA keeps far less at once
SMALLEST_SPLIT = 1 << 14  # numbers of a tensor that is worth splitting over devices


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _default_device() -> jax.Device:
    """Where JAX computes what is put on no device: jax.default_device, if it is set."""
    chosen = SETTINGS.jax_default_device
    return jax.local_devices(backend=chosen)[0] if isinstance(chosen, str) else chosen or jax.local_devices()[0]


def local_devices() -> list[jax.Device]:
    """This process's devices of the default device's platform: those that work is laid out over."""
    return jax.local_devices(backend=_default_device().platform)


def use_all_cores() -> None:
    """Make every CPU core a JAX device. Programs call this first; it does nothing once JAX runs.

    Settings that the user made (XLA_FLAGS, jax_num_cpu_devices) stay. The command line and the experiments call it;
    importing metalr as a library changes no setting.
    """
    flags, flag = os.environ.get("XLA_FLAGS", ""), "--xla_cpu_multi_thread_eigen"
    if SETTINGS.jax_num_cpu_devices > 0 or flag in flags:
        return
    with contextlib.suppress(RuntimeError):  # JAX runs already
        jax.config.update("jax_num_cpu_devices", cores())
        os.environ["XLA_FLAGS"] = f"{flags} {flag}=false".strip()


def use_compilation_cache(folder: os.PathLike | str) -> None:
    """Keep compiled programs in `folder` between processes, unless the user chose a folder already."""
    if SETTINGS.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class Layout(NamedTuple):
    """How work is laid out over the devices of each process.

    Attributes:
      tasks: most devices that tasks are split over; None: all.
      params: devices that each large tensor of the init, the rates and their optimizer is split over, for models that
        one device does not hold (as FSDP does; Zhao et al. 2023); every group of them works on the same tasks.
    """

    tasks: int | None = None
    params: int = 1


def task_mesh(tasks: int, *, all_processes: bool = False, layout: Layout = Layout()) -> Mesh:  # noqa: B008 - a tuple
    """A mesh over the most devices that divide `tasks` evenly: this process's, or the same number in all processes.

    Its axis is "tasks"; with layout.params above 1 it has "params" as a second one.

    Raises ConfigError if `tasks` cannot be split evenly over all processes, or there are fewer devices than asked for.
    """
    processes = jax.process_count() if all_processes else 1
    if tasks % processes:
        raise ConfigError(f"outer.meta_batch: expected a multiple of the {processes} processes, got {tasks}")
    local = local_devices()
    groups = len(local) // layout.params
    if groups < (layout.tasks or 1):
        wanted = f"mesh.tasks {layout.tasks or 'auto'} x mesh.params {layout.params}"
        raise ConfigError(f"mesh: expected at most {len(local)} devices of a process, got {wanted}")
    each = max(n for n in range(1, min(groups, layout.tasks or groups) + 1) if tasks // processes % n == 0)
    if all_processes and layout.tasks and each < layout.tasks:
        raise ConfigError(
            f"mesh.tasks: expected a number that divides the {tasks // processes} tasks of a process, got "
            f"{layout.tasks}"
        )
    size = each * layout.params
    devices = local[:size]
    if processes > 1:
        devices = [
            device
            for index in range(processes)
            for device in [d for d in jax.devices(local[0].platform) if d.process_index == index][:size]
        ]
    if layout.params == 1:
        return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    shape = len(devices) // layout.params, layout.params
    return jax.make_mesh(shape, (AXIS, PARAMS), axis_types=(AxisType.Auto,) * 2, devices=devices)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Where each array of a pytree (or its shape) belongs: the largest dimension of a large one split over "params"."""

    def of(leaf: Any) -> NamedSharding:
        count = mesh.shape.get(PARAMS, 1)
        fitting = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % count == 0]
        if count == 1 or leaf.size < SMALLEST_SPLIT or not fitting:
            return NamedSharding(mesh, P())
        axis = max(fitting, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*[None] * axis, PARAMS))

    return jax.tree.map(of, tree)


def place(tree: Any, mesh: Mesh) -> Any:
    """A pytree of arrays on a mesh, each as `shardings` says; costs nothing for what is there already."""
    if PARAMS not in mesh.shape:
        return replicate(tree, mesh)

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        there = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return leaf if there else jax.device_put(leaf, sharding)

    return jax.tree.map(put, tree, shardings(tree, mesh))


def keep_placed(tree: Any, mesh: Mesh) -> Any:
    """Inside a compiled function: `tree` laid out as `place` does."""
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh)) if PARAMS in mesh.shape else tree


def local(tree: Any) -> Any:
    """A pytree off its mesh, so that computations on another one take it.

    What is on several devices of this process becomes an array of one; what other processes hold too becomes numpy;
    what is split over this process's devices stays.
    """

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        if leaf.is_fully_addressable:
            several = len(leaf.sharding.device_set) > 1
            return jnp.asarray(np.asarray(leaf)) if several and leaf.is_fully_replicated else leaf
        if leaf.is_fully_replicated:
            return np.asarray(leaf)
        found = np.empty(leaf.shape, leaf.dtype)
        for part in leaf.addressable_shards:  # a process holds all parts, see task_mesh
            found[part.index] = part.data
        return found

    return jax.tree.map(whole, tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A pytree of arrays on every device of a mesh, of other processes too; costs nothing if it is there already."""
    if all(device.process_index == jax.process_index() for device in mesh.devices.flat):
        return tree if mesh.size == 1 else jax.device_put(tree, NamedSharding(mesh, P()))

    def put(leaf: jax.Array) -> jax.Array:
        if not leaf.is_fully_addressable:  # there already
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return jax.device_put(np.asarray(leaf), NamedSharding(mesh, P()))

    return jax.tree.map(put, tree)


def split_tasks(function: Callable[..., Any], mesh: Mesh, replicated: int, *, mean: bool) -> Callable[..., Any]:
    """`function` with its arguments after the first `replicated` split over the mesh along their leading axis.

    mean: average the results over devices (gradients); otherwise they are put together along their leading axis.
    """
    if mesh.size == 1:
        return function

    def per_device(*args: Any) -> Any:
        result = function(*args)
        if not mean:
            return result
        if PARAMS in mesh.shape:  # tensors that are split stay so
            return jax.lax.pmean(result, AXIS)
        flat, restore = ravel_pytree(result)  # one reduction, not one a tensor: each waits for all devices
        return restore(jax.lax.pmean(flat, AXIS))

    @functools.wraps(function)
    def split(*args: Any) -> Any:
        specs = tuple(P() if i < replicated else P(AXIS) for i in range(len(args)))
        out = P() if mean else P(AXIS)
        return jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=out, axis_names={AXIS}, check_vma=False)(
            *args
        )

    return split


def place_tasks(tasks: Any, mesh: Mesh) -> Any:
    """Arrays with a leading task axis, put on the mesh's devices as `split_tasks` will want them."""
    return jax.device_put(tasks, NamedSharding(mesh, P(AXIS)))


every_platform = jax.make_user_context(default_value=False)
"""`with every_platform(True):` programs are traced in the forms of all platforms: those that are lowered for others."""


def _traced_platform() -> str | None:
    """The platform that programs are traced for, as lowering calls it: that of the default device; None: all."""
    if every_platform.value:
        return None
    device = _default_device()
    return "cuda" if "cuda" in device.client.platform_version else device.platform


def by_platform(
    model: Model,
    function: Callable[..., Any],
    *args: Any,
    cpu_group: int = 1,
    accelerator_group: Callable[[], int] = lambda: 1,
) -> Any:
    """`function(apply, group, *args)` in the form that suits the platform of JAX's default device.

    On CPUs: convolution as products, and tasks in small groups (1 unless a form gains from more), because what fits the
    cache is fastest. On NVIDIA GPUs: products too (a kernel a task makes lax.conv a grouped convolution, four to six
    times slower; benchmarks/results/accelerator.json), and many tasks at once. Elsewhere: lax.conv, many tasks at once.

    Only that form is traced: each of the others costs as much again. Data that are put on a device of another platform
    are computed in it too, rightly but not as fast; for programs in all forms, see every_platform. accelerator_group:
    asked only where it matters.
    """
    products, platform = model.cpu_apply or model.apply, _traced_platform()
    if platform == "cpu":
        return function(products, cpu_group, *args)
    many = accelerator_group()
    if platform is not None:
        return function(products if platform == "cuda" else model.apply, many, *args)
    return jax.lax.platform_dependent(
        *args,
        cpu=functools.partial(function, products, cpu_group),
        cuda=functools.partial(function, products, many),
        default=functools.partial(function, model.apply, many),
    )


def bytes_of(function: Callable[..., Any], *args: Any) -> int:
    """What all intermediate results of one call take together: an upper bound of its memory, from shapes alone."""

    def of(jaxpr: Any) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            total += sum(int(np.prod(v.aval.shape)) * getattr(v.aval.dtype, "itemsize", 4) for v in eqn.outvars)
            for value in eqn.params.values():
                for each in value if isinstance(value, (tuple, list)) else (value,):
                    inner = getattr(each, "jaxpr", each)
                    if hasattr(inner, "eqns"):
                        total += of(inner)
        return total

    return of(jax.make_jaxpr(function)(*args).jaxpr)


def fitting_group(function: Callable[[Any], Any], tasks: Any) -> int:
    """How many of `tasks` (leading axis) may be vmapped together on an accelerator: what ACCELERATOR_BYTES hold."""
    count = jax.tree.leaves(tasks)[0].shape[0]
    one = jax.tree.map(lambda v: v[0], tasks)
    return max(1, min(count, ACCELERATOR_BYTES // max(1, bytes_of(function, one))))


def map_tasks(function: Callable[..., Any], tasks: Any, group: int) -> Any:
    """`function` over the leading axis of `tasks`, `group` of them vmapped at a time."""
    return jax.lax.map(function, tasks, batch_size=None if group == 1 else group)


def spread(
    work: Callable[[Any, jax.Device, Callable[[], None]], None],
    jobs: Sequence[Any],
    devices: Sequence[jax.Device],
    between: Callable[[], None] = lambda: None,
) -> None:
    """`work(job, device, go_on)` for every job, one on each device at a time, in threads; for work of unequal length.

    Work calls go_on() where it can end. It raises what `between` raises, and CancelledError when another job failed;
    what failed first is raised when all have ended, and jobs that had not begun never do.
    """
    free, failed = list(devices), threading.Event()

    def go_on() -> None:
        if failed.is_set():
            raise CancelledError
        between()

    def run(job: Any) -> None:
        device = free.pop()
        try:
            go_on()
            with jax.default_device(device):
                work(job, device, go_on)
        except BaseException:
            failed.set()
            raise
        finally:
            free.append(device)

    with ThreadPoolExecutor(len(free)) as threads:
        futures = [threads.submit(run, job) for job in jobs]
        wait(futures, return_when=FIRST_EXCEPTION)
        if failed.is_set():
            for future in futures:
                future.cancel()
            wait(futures)
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, CancelledError)):
            raise error


def at_once(values: Sequence[float]) -> list[list[float]]:
    """Values of one setting in the groups that a dispatch takes side by side.

    One on CPUs, where more at a time gain nothing and a signal would be heard late; all on accelerators, which wait for
    each small step and have room for all of them.
    """
    return [[value] for value in values] if _default_device().platform == "cpu" else [list(values)] if values else []


def vmap_group(function: Callable[[Any], Any], tasks: Any) -> Any:
    """vmap over the leading axis of `tasks`, left out where it has size 1."""
    if jax.tree.leaves(tasks)[0].shape[0] > 1:
        return jax.vmap(function)(tasks)
    return jax.tree.map(lambda v: v[None], function(jax.tree.map(lambda v: v[0], tasks)))


def mean_over_tasks(model: Model, function: Callable[[Apply, Any], Any], tasks: Any, *, cpu_group: int = 1) -> Any:
    """The mean of `function(apply, group of tasks)` over groups along the leading axis of `tasks`.

    `function` gives the mean of its group; one running sum is kept, not every group's result.
    """

    def mean(apply: Apply, group: int, tasks: Any) -> Any:
        count = jax.tree.leaves(tasks)[0].shape[0]
        size = max(n for n in range(1, min(group, count) + 1) if count % n == 0)
        groups = jax.tree.map(lambda v: v.reshape(count // size, size, *v.shape[1:]), tasks)
        if count == size:
            return function(apply, tasks)
        shapes = jax.eval_shape(functools.partial(function, apply), jax.tree.map(lambda v: v[0], groups))

        def body(total: Any, tasks: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, function(apply, tasks)), None

        total, _ = jax.lax.scan(body, jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes), groups)
        return jax.tree.map(lambda v: v * (size / count), total)

    one = functools.partial(function, model.cpu_apply or model.apply)

    def group() -> int:
        return fitting_group(lambda task: one(jax.tree.map(lambda v: v[None], task)), tasks)

    return by_platform(model, mean, tasks, cpu_group=cpu_group, accelerator_group=group)
