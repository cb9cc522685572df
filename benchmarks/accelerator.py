"""What an accelerator does with metalr: one command for any GPU machine with jax[cuda] (and torch), under 8 minutes.

    python benchmarks/accelerator.py [--minutes 8] [--out FILE] [--only SECTION ...]

Needs no network. Every row is written as soon as it is measured, with the device and the versions, so that a run that
is cut off leaves what it had; sections begin with what matters most, and none begins after --minutes. Throughput is
measured as in throughput.py: second-order per-layer Meta-SGD, 5-way, 5 inner steps, 15 query images a class. Matrix
products of float32 use TF32 on NVIDIA GPUs, in JAX and in PyTorch alike, unless a row says "highest". Where no
accelerator is at hand it measures the CPU, and the rows say so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory too

import jax
import jax.numpy as jnp
import measure
import numpy as np
import throughput

import metalr
from metalr import data as data_lib
from metalr import models, outer, tasks
from metalr.inner import hyperparameters
from metalr.runs.provenance import command, provenance
from metalr.trees import named_arrays

Row = dict[str, Any]
SIZES = (32, 512)
NO_SEARCH = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"  # for the fastest kernels
FORMS = {"metalr": "as metalr chooses", "metalr, lax.conv": "the standard form of a convolution"}


def seconds_of(call: Callable[[], Any], window: float = 1.5) -> tuple[float, float]:
    """(seconds of the first call, which compiles; median seconds of the calls after it)."""
    began = time.perf_counter()
    call()
    first, found = time.perf_counter() - began, []
    call()
    until = time.perf_counter() + window
    while len(found) < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return first, float(np.median(found))


def episodes_of(work: throughput.Workload, count: int) -> Any:
    split = tasks.make_splits(data_lib.bundled(), "rotated" if work.way == 10 else "digits").train
    pool, sample = tasks.make_sampler(split, work.way, work.shot, 15)
    return jax.jit(jax.vmap(sample, (None, 0)))(pool, jax.random.split(jax.random.key(0), count))


def parts(
    name: str, count: int, *, standard: bool = False
) -> tuple[models.Model, hyperparameters.RatesSpec, Any, Any, Any]:
    work = throughput.WORKLOADS[name]
    model = work.model(work.way)
    if standard:
        model = models.Model(**{**vars(model), "cpu_apply": None})
    spec = hyperparameters.RatesSpec("layer", steps=throughput.STEPS, initial=0.05)
    meta = jax.tree.map(jnp.asarray, outer.initial(model, spec, jax.random.key(0)))
    return model, spec, meta, episodes_of(work, count), jax.random.split(jax.random.key(1), count)


def with_torch(model: models.Model, meta: Any, episodes: Any) -> Callable[[], Any]:
    """torch.func on the same device and the same numbers."""
    import torch
    import torch_peers

    place = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    named = {k.removeprefix("init/"): v for k, v in named_arrays(meta.init, "init").items()}
    params = {name: value.to(place) for name, value in torch_peers.to_torch(named).items()}
    logs = {name: torch.tensor(np.asarray(value), device=place) for name, value in meta.rates.items()}
    batch = [torch.tensor(np.asarray(v), device=place) for v in episodes]
    batch[1], batch[3] = batch[1].long(), batch[3].long()
    run = torch_peers.torch_func(torch_peers.MODELS[model.name], throughput.STEPS, len(batch[0]))

    def call() -> None:
        run(params, logs, *batch)
        if place == "cuda":
            torch.cuda.synchronize()

    return call


def throughput_rows(wanted: list[tuple[str, int, str]]) -> Iterator[Row]:
    for name, count, system in wanted:
        model, spec, meta, episodes, keys = parts(name, count, standard=system == "metalr, lax.conv")
        precision = "highest" if system.endswith("highest") else None
        with jax.default_matmul_precision(precision):
            if system == "torch.func vmap":
                call = with_torch(model, meta, episodes)
            elif system == "plain JAX vmap(grad)":
                call = throughput.with_plain_jax(model, spec, meta, episodes)
            else:
                gradient = jax.jit(lambda m, e, k, model=model, spec=spec: outer.meta_gradient(model, spec, m, e, k)[0])
                call = lambda g=gradient, m=meta, e=episodes, k=keys: jax.block_until_ready(g(m, e, k))  # noqa: E731
            first, seconds = seconds_of(call)
        row = {"workload": name, "meta_batch": count, "system": system, "tasks_per_second": round(count / seconds, 1)}
        row |= {"seconds_a_step": round(seconds, 6), "first_call_seconds": round(first, 2)}
        if system.startswith("metalr"):
            one = jax.tree.map(lambda v: v[:4], episodes)
            grad = lambda m, e, k, model=model, spec=spec: outer.meta_gradient(model, spec, m, e, k)  # noqa: E731
            flops = measure.product_flops(grad, meta, one, keys[:4]) / 4
            row["product_gflops_per_second"] = round(count / seconds * flops / 1e9, 1)
        yield row


def compilation_rows() -> Iterator[Row]:
    """What a step takes to trace and to compile, and then, with XLA's search for the fastest kernels and without."""
    for flags, name in ((flags, name) for name in ("conv4_1shot", "mlp_1shot") for flags in ("", NO_SEARCH)):
        env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
        call = [sys.executable, __file__, "--compile", name]
        done = subprocess.run(call, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-200:])
        yield {"workload": name, "meta_batch": 32, "xla_flags": flags} | json.loads(done.stdout.splitlines()[-1])


def compiled_once(name: str) -> Row:
    """Of a process that has compiled nothing before."""
    model, spec, meta, episodes, keys = parts(name, 32)
    gradient = jax.jit(lambda m, e, k: outer.meta_gradient(model, spec, m, e, k)[0])
    began = time.perf_counter()
    lowered = gradient.lower(meta, episodes, keys)
    traced = time.perf_counter() - began
    program = lowered.compile()
    compiled = time.perf_counter() - began - traced
    _, seconds = seconds_of(lambda: jax.block_until_ready(program(meta, episodes, keys)))
    row = {"trace_seconds": traced, "compile_seconds": compiled, "seconds_a_step": seconds}
    return {key: float(f"{value:.3g}") for key, value in row.items()}


def product_rows() -> Iterator[Row]:
    for precision in ("default", "highest"):
        with jax.default_matmul_precision(None if precision == "default" else "highest"):
            x = jax.random.normal(jax.random.key(0), (8192 if jax.default_backend() != "cpu" else 1024,) * 2)
            product = jax.jit(lambda a: a @ a)
            _, seconds = seconds_of(lambda p=product, x=x: p(x).block_until_ready())
            yield {"precision": precision, "size": len(x), "gflops_per_second": round(2 * len(x) ** 3 / seconds / 1e9)}


def adaptation_rows() -> Iterator[Row]:
    for name in ("mlp_1shot", "conv4_1shot"):
        for count in (1, 10_000):
            if count > 1 and jax.default_backend() == "cpu":
                count = 100
            work = throughput.WORKLOADS[name]
            model, spec = work.model(work.way), hyperparameters.RatesSpec("layer", steps=throughput.STEPS, initial=0.05)
            meta = outer.initial(model, spec, jax.random.key(0))
            learned = metalr.Learner(model, spec, meta.init, hyperparameters.actual(spec, meta.rates))
            episode = jax.tree.map(np.asarray, episodes_of(work, min(count, 500)))
            repeats = -(-count // len(episode.support_x))
            x, y = (np.concatenate([v] * repeats)[:count] for v in (episode.support_x, episode.support_y))
            x, y = jax.device_put((x[0], y[0]) if count == 1 else (x, y))
            first, seconds = seconds_of(lambda a=learned.adapt, x=x, y=y: jax.block_until_ready(a(x, y)))
            yield {
                "workload": name, "tasks": count, "seconds": round(seconds, 5), "first_call_seconds": round(first, 2),
                "tasks_per_second": round(count / seconds, 1),
            }  # fmt: skip


def quickstart_rows(limit: float) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"METALR_CACHE_DIR": folder, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        began = time.perf_counter()
        call = [sys.executable, "-m", "metalr.cli", "quickstart", "--out", f"{folder}/run", "--json"]
        try:
            done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            yield {"ended": False, "limit_seconds": round(limit)}
            return
        row = {"ended": done.returncode == 0, "wall_seconds": round(time.perf_counter() - began, 1)}
        if done.returncode == 0:
            training = json.loads(done.stdout)["training"]
            row |= {key: training[key] for key in ("seconds", "compile_seconds", "tasks_per_second")}
        else:
            row["error"] = done.stderr[-300:]
        yield row


def memory_rows() -> Iterator[Row]:
    stats = jax.local_devices()[0].memory_stats() or {}
    yield {"peak_bytes_in_use": stats.get("peak_bytes_in_use"), "bytes_limit": stats.get("bytes_limit")}


def sections(left: Callable[[], float]) -> dict[str, Callable[[], Iterator[Row]]]:
    """In the order of what matters most."""
    few = ["mlp_1shot", "conv4_1shot", "conv4_5shot", "gru"]
    conv = ["conv4_1shot", "conv4_5shot"]
    return {
        "products": product_rows,
        "throughput": lambda: throughput_rows([(name, 32, "metalr") for name in few]),
        "standard form": lambda: throughput_rows([(name, 32, "metalr, lax.conv") for name in conv]),
        "torch": lambda: throughput_rows([(name, 32, "torch.func vmap") for name in few]),
        "large meta-batch": lambda: throughput_rows([(name, 512, "metalr") for name in few]),
        "plain JAX": lambda: throughput_rows([(name, 32, "plain JAX vmap(grad)") for name in few]),
        "compilation": compilation_rows,
        "adaptation": adaptation_rows,
        "quickstart": lambda: quickstart_rows(max(30.0, min(150.0, left()))),
        "torch, large": lambda: throughput_rows([(name, 512, "torch.func vmap") for name in few[:2]]),
        "float32": lambda: throughput_rows([(name, 32, "metalr, highest") for name in few[:2]]),
        "memory": memory_rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="no section begins after that")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "accelerator.json")
    parser.add_argument("--only", nargs="+", default=[], help="only these sections")
    parser.add_argument("--compile", metavar="WORKLOAD", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        print(json.dumps(compiled_once(options.compile)))
        return
    until = time.perf_counter() + 60 * options.minutes
    rows: list[Row] = []
    head = {"command": command(), "provenance": provenance()}
    for name, section in sections(lambda: until - time.perf_counter()).items():
        if options.only and name not in options.only:
            continue
        if time.perf_counter() > until:
            rows.append({"section": name, "not_measured": "no time was left"})
        else:
            try:
                for row in section():
                    rows.append({"section": name} | row)
                    print(json.dumps(rows[-1]), flush=True)
                    options.out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
            except (ImportError, RuntimeError, jax.errors.JaxRuntimeError) as error:  # no torch, or no memory
                rows.append({"section": name, "not_measured": f"{type(error).__name__}: {error}"[:300]})
                print(json.dumps(rows[-1]), flush=True)
        options.out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
