"""Several devices: two CPU devices beside one, and two processes beside one process with two devices.

    python benchmarks/parallel.py [--workload NAME ...] [--repeats N] [--json]

Each cell runs in a process of its own, because the number of devices is fixed when JAX starts. Rows: tasks a second of
the second-order meta-gradient on two single-threaded CPU devices, on one that is held to one core, on one with XLA's
threads off by its flag and on (what JAX does untold), and with what `devices.use_all_cores` chooses; then whether 2
processes joined by jax.distributed over loopback end meta-training with the same bits as one process with 2 devices.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SINGLE = "--xla_cpu_multi_thread_eigen=false"
LAYOUTS = {
    "two single-threaded devices": {"JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": SINGLE},
    "one device on one core": {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": SINGLE, "ON_ONE_CORE": "1"},
    "one single-threaded device": {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": SINGLE},
    "one device with threads": {"JAX_NUM_CPU_DEVICES": "1"},
    "as metalr chooses": {},
}
WORKLOADS = ("mlp_1shot", "mlp_5shot", "reference_mlp", "conv4_1shot", "conv4_5shot", "gru")


def child(workload: str) -> None:
    """Print the seconds of one meta-gradient with the devices of this process."""
    if "ON_ONE_CORE" in os.environ:  # XLA's flag alone does not do it: products in its YNN library use all cores
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import jax
    import jax.numpy as jnp
    import measure
    import throughput

    from metalr import outer
    from metalr.inner import hyperparameters

    work = throughput.WORKLOADS[workload]
    model, spec = work.model(work.way), hyperparameters.RatesSpec("layer", steps=throughput.STEPS, initial=0.05)
    meta = jax.tree.map(jnp.asarray, outer.initial(model, spec, jax.random.key(0)))
    system = throughput.with_metalr(model, spec, meta, throughput.episodes_of(work))
    print(measure.side_by_side({"it": system}, 3)["it"])


def seconds(workload: str, layout: dict[str, str]) -> float:
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")} | layout
    call = [sys.executable, __file__, "--child", workload]
    return float(subprocess.run(call, env=env, check=True, capture_output=True, text=True).stdout.split()[-1])


def device_rows(workloads: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    rows = []
    for workload in workloads:
        times: dict[str, list[float]] = {name: [] for name in LAYOUTS}
        for _ in range(repeats):
            for name, layout in LAYOUTS.items():
                times[name].append(seconds(workload, layout))
        median = {name: float(np.median(values)) for name, values in times.items()}
        rows += [
            {
                "workload": workload,
                "devices": name,
                "tasks_per_second": round(32 / value, 2),
                "times_one_core": round(median["one device on one core"] / value, 3),
            }
            for name, value in median.items()
        ]
    return rows


def processes_row(model: str, devices: int = 1) -> dict[str, Any]:
    """Meta-train by the command line with two processes and with one; compare init, rates and every metric.

    devices: of each of the two; the one has twice as many.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["--tasks.way", "3", "--outer.steps", "20", "--outer.validate-every", "20"]
        sizes += ["--outer.meta-batch", str(8 * devices), "--evaluation.shown-tasks", "0"]
        sizes += ["--model.name", model, "--evaluation.episodes", "20"]
        sizes += ["--model.channels", "16"] if model == "conv4" else []
        call = [str(Path(sys.executable).with_name("metalr")), "train", *sizes, "--out"]
        clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
        both = [
            subprocess.Popen(
                [*call, f"{folder}/two"],
                env=clean
                | LAYOUTS["one single-threaded device"]
                | {
                    "JAX_NUM_CPU_DEVICES": str(devices),
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": "2",
                    "JAX_PROCESS_ID": str(index),
                },
                stdout=subprocess.DEVNULL,
            )
            for index in (0, 1)
        ]
        codes = [process.wait(timeout=600) for process in both]
        subprocess.run(
            [*call, f"{folder}/one"],
            env=clean | LAYOUTS["two single-threaded devices"] | {"JAX_NUM_CPU_DEVICES": str(2 * devices)},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        hashes = {
            name: [hashlib.sha256((Path(folder) / run / name).read_bytes()).hexdigest() for run in ("one", "two")]
            for name in ("metrics.jsonl", "artifact/learner.safetensors")
        }
        losses = [
            [line["loss"] for line in map(json.loads, (Path(folder) / run / "metrics.jsonl").open()) if "loss" in line]
            for run in ("one", "two")
        ]
        return {
            "model": model,
            "devices_of_each_process": devices,
            "exit_codes": codes,
            "largest_difference_of_a_loss": float(np.max(np.abs(np.subtract(*losses)))),
            **{f"same_bits_{Path(name).stem}": a == b for name, (a, b) in hashes.items()},
            "sha256": hashes["artifact/learner.safetensors"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=WORKLOADS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--processes", action="store_true", help="only the two processes; the file keeps other rows")
    parser.add_argument("--child", choices=WORKLOADS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    from measure import RESULTS, provenance, save

    here = {name: provenance()[name] for name in ("commit", "machine")}
    rows = [here | processes_row(*each) for each in (("mlp",), ("conv4",), ("mlp", 8))]
    if options.processes:
        content = json.loads((RESULTS / "parallel.json").read_text())
        before = {name: content["provenance"][name] for name in here}
        rows += [before | row for row in content["rows"] if "exit_codes" not in row]
    else:
        rows += device_rows(options.workload, options.repeats)
    print(json.dumps(rows, indent=1) if options.json else "\n".join(map(str, rows)))
    save("parallel", rows)


if __name__ == "__main__":
    main()
