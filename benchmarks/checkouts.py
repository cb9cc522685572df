"""Meta-gradients of two checkouts of metalr side by side: does a change cost speed?

    python benchmarks/checkouts.py OLD_CHECKOUT [--rounds 15] [--save]

Each checkout runs in a process of its own, which waits while the other one is timed; in every round they take turns,
workload by workload. Reported is the median over rounds of new / old. Second-order per-layer Meta-SGD, 5 inner steps,
15 query images a class, 32 tasks of random pixels.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent
WORKLOADS = ("mlp_1shot", "mlp_5shot", "reference_mlp", "conv4_1shot", "gru")
WINDOW = 0.6  # seconds


def calls() -> dict[str, Any]:
    """A call of each workload; of this process's metalr, whose modules may stand where they stood once."""

    def module(*names: str) -> Any:
        for name in names:
            try:
                return importlib.import_module(name)
            except ImportError:
                continue
        raise SystemExit(f"none of {names} in {sys.path[0]}")

    devices = module("metalr.outer.devices", "metalr.devices")
    devices.use_all_cores()
    import jax
    import numpy as np

    spec_of = module("metalr.inner.hyperparameters", "metalr.rates").RatesSpec
    models, outer, types = (importlib.import_module(f"metalr.{name}") for name in ("models", "outer", "types"))
    made = {
        "mlp_1shot": (models.mlp(5, widths=(256, 128, 64, 64), dropout=0.0), 5, 1),
        "mlp_5shot": (models.mlp(5, widths=(256, 128, 64, 64), dropout=0.0), 5, 5),
        "reference_mlp": (models.mlp(10, dropout=0.0), 10, 10),
        "conv4_1shot": (models.conv4(5), 5, 1),
        "gru": (models.rnn(5), 5, 1),
    }
    found = {}
    for name, (model, way, shot) in made.items():
        spec, rng = spec_of("layer", steps=5, initial=0.01), np.random.default_rng(0)
        meta = outer.initial(model, spec, jax.random.key(0))
        sets = []
        for size in (way * shot, way * 15):
            labels = np.tile(np.arange(size, dtype=np.int32) % way, (32, 1))
            sets += [rng.random((32, size, 28, 28, 1), np.float32), labels]
        mesh = devices.task_mesh(32)
        args = devices.place_tasks((types.Episode(*sets), jax.random.split(jax.random.key(1), 32)), mesh)

        def gradient(*given: Any, model: Any = model, spec: Any = spec) -> Any:
            return outer.meta_gradient(model, spec, *given)

        compiled = jax.jit(devices.split_tasks(gradient, mesh, replicated=1, mean=True))
        jax.block_until_ready(compiled(meta, *args))
        found[name] = lambda compiled=compiled, given=(meta, *args): jax.block_until_ready(compiled(*given))
    return found


def child() -> None:
    """Time a workload for each line that comes in."""
    made = calls()
    print("ready", flush=True)
    for line in sys.stdin:
        call, count = made[line.strip()], 0
        call()
        began = time.perf_counter()
        while not count or time.perf_counter() - began < WINDOW:
            call()
            count += 1
        print((time.perf_counter() - began) / count, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="to results/checkouts.json")
    options = parser.parse_args()
    places = {"old": options.old.resolve(), "new": HERE}
    processes = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(place)}, cwd=place,
        )
        for name, place in places.items()
    }  # fmt: skip

    def ask(name: str, workload: str | None = None) -> str:
        process = processes[name]
        assert process.stdin is not None
        assert process.stdout is not None
        if workload is not None:
            process.stdin.write(f"{workload}\n")
            process.stdin.flush()
        return process.stdout.readline().strip()

    for name in processes:
        if ask(name) != "ready":
            raise SystemExit(f"{places[name]}: did not start")
    seconds: dict[str, dict[str, list[float]]] = {w: {"old": [], "new": []} for w in WORKLOADS}
    for number in range(options.rounds):
        for workload in WORKLOADS:
            for name in ("old", "new") if number % 2 else ("new", "old"):
                seconds[workload][name].append(float(ask(name, workload)))
    for process in processes.values():
        process.kill()
    import numpy as np

    rows = []
    for workload, found in seconds.items():
        ratios = np.array(found["new"]) / np.array(found["old"])
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        medians = {f"{name}_seconds": round(float(np.median(values)), 5) for name, values in found.items()}
        rows.append({"workload": workload, **medians, "new_over_old": round(float(middle), 3)})
        rows[-1] |= {"quartiles": [round(float(low), 3), round(float(high), 3)], "rounds": options.rounds}
        print(rows[-1], flush=True)
    if options.save:
        import measure

        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=places["old"], capture_output=True, text=True, check=True
        )
        measure.save("checkouts", rows, old_commit=commit.stdout.strip())


if __name__ == "__main__":
    child() if sys.argv[1:] == ["--child"] else main()
