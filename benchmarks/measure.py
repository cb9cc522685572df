"""What every benchmark shares: interleaved timing, provenance, results files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metalr.outer import devices
from metalr.runs.provenance import command, provenance

RESULTS = Path(__file__).parent / "results"


def side_by_side(systems: dict[str, Callable[[], Any]], repeats: int, window: float = 0.3) -> dict[str, float]:
    """Median seconds of one call of each system, over `repeats` rounds that take every system in turn.

    In its turn a system rests (so that another library's spinning threads go to sleep), is called once untimed, and
    then for `window` seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for call in systems.values():
        call()
    for _ in range(repeats):
        for name, call in systems.items():
            time.sleep(0.3)
            call()
            began, calls = time.perf_counter(), 0
            while not calls or time.perf_counter() - began < window:
                call()
                calls += 1
            seconds[name].append((time.perf_counter() - began) / calls)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def product_rate(size: int = 1024, repeats: int = 20) -> float:
    """FLOP/s of float32 matrix products on all devices at once: the fastest of several."""
    count = jax.local_device_count()
    x = np.random.default_rng(0).random((count, size, size), np.float32)
    mesh = devices.task_mesh(count)
    product = jax.jit(devices.split_tasks(lambda a: a @ a, mesh, 0, mean=False))
    product(x).block_until_ready()
    best = np.inf
    for _ in range(repeats):
        began = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return count * 2 * size**3 / best


def product_flops(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs of all matrix products in one call of `function`, read off its jaxpr (the CPU form, loops unrolled)."""

    def of(jaxpr: Any) -> float:
        total = 0.0
        for eqn in jaxpr.eqns:
            times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            if eqn.primitive.name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                shape = eqn.invars[0].aval.shape
                total += 2 * eqn.outvars[0].aval.size * np.prod([shape[i] for i in contracted])
            if "branches" in eqn.params:  # platform_dependent: the CPU branch stands first
                total += of(eqn.params["branches"][0].jaxpr)
                continue
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    total += times * of(inner)
        return total

    return of(jax.make_jaxpr(function)(*args).jaxpr)


def save(name: str, rows: list[dict[str, Any]], **facts: Any) -> Path:
    """Write benchmarks/results/NAME.json: command, provenance, facts, rows."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"command": command(), "provenance": provenance(), **facts, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
