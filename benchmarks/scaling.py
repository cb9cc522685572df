"""How cost grows: with tasks, inner steps, width, classes; what compiles how long; what the outer loop adds.

    python benchmarks/scaling.py [--section NAME ...] [--json]

Sections: tasks, steps, width, way (time, compile time and memory of one meta-gradient, with the exponent of a power
law fitted to them), dtype (bfloat16 beside float32), compile (a new process with an empty and with a filled
compilation cache), outer (time outside the compiled steps), seeds (several as one program), start (import and --help),
launch (until the first compiled step, beside a plain script), listing (10,000 runs).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metalr.outer import devices

devices.use_all_cores()

import jax
import measure
import numpy as np

from metalr import config, data, models, outer
from metalr.inner import hyperparameters
from metalr.outer import loop
from metalr.runs import meta_training, progress, setup, training
from metalr.types import Episode

Row = dict[str, Any]
MODELS: dict[str, Callable[..., models.Model]] = {
    "mlp": lambda way, **s: models.mlp(way, **{"widths": (256, 128, 64, 64), "dropout": 0.0} | s),
    "reference_mlp": lambda way, **s: models.mlp(way, **{"dropout": 0.0} | s),
    "conv4": models.conv4,
    "gru": models.rnn,
}


def random_episodes(tasks: int, way: int, shot: int) -> Episode:
    """Episodes of noise: cost does not depend on what the images show."""
    rng = np.random.default_rng(0)

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.tile(np.repeat(np.arange(way, dtype=np.int32), count), (tasks, 1))
        return rng.random((tasks, way * count, 28, 28, 1), np.float32), labels

    return Episode(*part(shot), *part(15))


def cost(
    workload: str, *, tasks: int = 32, steps: int = 5, way: int = 5, shot: int = 5, remat: bool = False, **settings: Any
) -> Row:
    """One meta-gradient of second-order per-layer Meta-SGD: seconds, seconds to compile, memory."""
    model = MODELS[workload](way, **settings)
    spec = hyperparameters.RatesSpec("layer", steps=steps, initial=0.01)
    method = outer.Reverse(remat=remat)
    meta = outer.initial(model, spec, jax.random.key(0))
    mesh = devices.task_mesh(tasks)
    args = devices.place_tasks((random_episodes(tasks, way, shot), jax.random.split(jax.random.key(1), tasks)), mesh)
    gradient = jax.jit(
        devices.split_tasks(lambda *a: outer.meta_gradient(model, spec, *a, method), mesh, replicated=1, mean=True)
    )
    began = time.perf_counter()
    compiled = gradient.lower(meta, *args).compile()
    compile_seconds = time.perf_counter() - began
    seconds = measure.side_by_side({"it": lambda: jax.block_until_ready(compiled(meta, *args))}, 3)["it"]
    memory = compiled.memory_analysis()
    return {
        "workload": workload,
        "tasks": tasks,
        "steps": steps,
        "way": way,
        "shot": shot,
        "remat": remat,
        **{k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()},
        "params": sum(leaf.size for leaf in jax.tree.leaves(meta.init)),
        "seconds": round(seconds, 6),
        "tasks_per_second": round(tasks / seconds, 2),
        "compile_seconds": round(compile_seconds, 2),
        "temporary_bytes_a_device": memory.temp_size_in_bytes,
        "devices": mesh.size,
    }


def exponent(rows: list[Row], of: str, over: str) -> float:
    """b of `of` = a * over^b, by least squares on logarithms."""
    return float(np.polyfit(np.log([row[over] for row in rows]), np.log([row[of] for row in rows]), 1)[0])


def with_exponents(section: str, over: str, rows: list[Row]) -> list[Row]:
    """Rows and a last one with the fits: over all points, and over the upper half, where fixed costs weigh less."""
    upper = rows[len(rows) // 2 :]
    fits = {
        f"exponent_of_{of}{name}": round(exponent(part, of, over), 3)
        for of in ("seconds", "temporary_bytes_a_device", "compile_seconds")
        for name, part in (("", rows), ("_upper_half", upper))
    }
    head = {"section": section, "workload": rows[0]["workload"], "remat": rows[0]["remat"], "over": over}
    return [{"section": section, **row} for row in rows] + [head | fits]


def tasks_section() -> list[Row]:
    rows = []
    for workload, shot, most in (("mlp", 1, 512), ("mlp", 5, 512), ("conv4", 1, 128)):
        counts = [n for n in (2, 4, 8, 16, 32, 64, 128, 256, 512) if n <= most]
        rows += with_exponents("tasks", "tasks", [cost(workload, tasks=n, shot=shot) for n in (*counts,)])
    return [{"section": "tasks", **cost("mlp", tasks=1, shot=1)}, *rows]


def steps_section() -> list[Row]:
    rows = []
    for remat in (False, True):
        of = [
            cost("reference_mlp", tasks=2, steps=n, way=10, remat=remat) for n in (1, 2, 5, 10, 20, 50, 100, 200, 500)
        ]
        rows += with_exponents("steps", "steps", of)
    return rows


def width_section() -> list[Row]:
    of_mlp = [cost("reference_mlp", way=10, widths=(n,)) | {"width": n} for n in (32, 64, 128, 256, 512, 1024, 2048)]
    of_conv = [cost("conv4", shot=1, tasks=8, channels=n) | {"width": n} for n in (16, 32, 64, 128)]
    return with_exponents("width", "width", of_mlp) + with_exponents("width", "width", of_conv)


def way_section() -> list[Row]:
    of_mlp = [cost("reference_mlp", way=n, tasks=8) for n in (2, 5, 10, 20, 50, 100)]
    of_conv = [cost("conv4", way=n, tasks=4, shot=1) for n in (2, 5, 10, 20)]
    return with_exponents("way", "way", of_mlp) + with_exponents("way", "way", of_conv)


def dtype_section() -> list[Row]:
    rows = [
        cost(name, shot=1, tasks=16, dtype=dtype)
        for name in ("mlp", "conv4", "gru")
        for dtype in ("float32", "bfloat16")
    ]
    return [{"section": "dtype", **row} for row in rows]


def compile_section() -> list[Row]:
    """A new process that compiles a workload's meta-gradient, without and with the cache that the command line uses."""
    rows = []
    for workload in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            env = os.environ | {"METALR_CACHE_DIR": folder}
            env.pop("XLA_FLAGS", None)
            call = [sys.executable, __file__, "--child", workload]
            times = [
                float(subprocess.run(call, env=env, check=True, capture_output=True, text=True).stdout.split()[-1])
                for _ in range(4)
            ]
        rows.append(
            {
                "section": "compile",
                "workload": workload,
                "compile_seconds": times[0],
                "with_cache_seconds": round(float(np.median(times[1:])), 2),
            }
        )
    return rows


def compile_child(workload: str) -> None:
    """Print the seconds from Python functions to a compiled meta-gradient."""
    devices.use_compilation_cache(data.cache_dir() / "compiled")
    print(cost(workload, shot=1, tasks=4)["compile_seconds"])


def outer_section() -> list[Row]:
    """The outer loop as `metalr train` runs it, beside the same steps in one dispatch."""
    rows = []
    small = config.TaskConfig(family="digits", way=3, shot=1)
    for workload, model, tasks, steps in (
        ("quickstart", config.ModelConfig(), config.QUICKSTART.tasks, 200),
        ("conv4", config.ModelConfig(name="conv4", channels=32), small, 60),
    ):
        settings = dataclasses.replace(config.QUICKSTART, model=model, tasks=tasks, grid=config.GridConfig())
        settings = dataclasses.replace(
            settings, outer=dataclasses.replace(settings.outer, steps=steps, validate_every=steps)
        )
        parts = setup.set_up(settings)
        pool, sample = parts.parts.train
        one = loop.make_chunk(parts.model, parts.spec, parts.method, parts.optimizer, sample, settings.outer.meta_batch)
        alone, looped = [], []
        for repeat in range(4):
            state = loop.start(parts.model, parts.spec, parts.optimizer, jax.random.key(0))
            began = time.perf_counter()
            jax.block_until_ready(one(state, pool, jax.random.key(1), steps))
            alone.append(time.perf_counter() - began)
            if repeat == 0:
                continue  # compiled only now; the loop below compiles every time, and takes that off
            with tempfile.TemporaryDirectory() as folder:
                quiet = progress.ConsoleReporter(quiet=True)
                *_, facts = meta_training.meta_train(settings, parts, Path(folder), quiet)
            looped.append(facts["seconds"] - facts["validation_seconds"] - facts["step_seconds"])
        step_seconds = float(np.median(alone[1:]))
        rows.append(
            {
                "section": "outer",
                "workload": workload,
                "outer_steps": steps,
                "one_dispatch_seconds": round(step_seconds, 4),
                "outside_dispatch_seconds": round(float(np.median(looped)), 4),
                "share_outside": round(float(np.median(looped)) / step_seconds, 5),
            }
        )
    return rows


def seeds_section() -> list[Row]:
    """Outer steps of three seeds as one program, beside one seed after the other; the quickstart's settings."""
    settings = dataclasses.replace(config.QUICKSTART, grid=config.GridConfig())
    parts = setup.set_up(settings)
    pool, sample = parts.parts.train
    keys = jax.random.split(jax.random.key(0), 3)
    made = parts.model, parts.spec, parts.method, parts.optimizer, sample, settings.outer.meta_batch
    alone, together = loop.make_chunk(*made), loop.make_chunk(*made, seeds=3)
    begin = [loop.start(parts.model, parts.spec, parts.optimizer, key) for key in keys]
    steps, seconds = np.int32(20), {"one by one": list[float](), "together": list[float]()}
    for _ in range(7):
        fresh = [jax.tree.map(np.asarray, state) for state in begin]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *fresh)
        began = time.perf_counter()
        for state, key in zip(fresh, keys, strict=True):
            jax.block_until_ready(alone(state, pool, key, steps))
        seconds["one by one"].append(time.perf_counter() - began)
        began = time.perf_counter()
        jax.block_until_ready(together(stacked, pool, keys, steps))
        seconds["together"].append(time.perf_counter() - began)
    return [
        {"section": "seeds", "how": how, "seeds": 3, "outer_steps": int(steps), "first_seconds": round(values[0], 2)}
        | {"seconds": round(float(np.median(values[1:])), 3)}
        for how, values in seconds.items()
    ]


def start_section() -> list[Row]:
    """Seconds of new processes, the median of five."""
    metalr = str(Path(sys.executable).with_name("metalr"))
    calls = {
        "metalr --help": [metalr, "--help"],
        "metalr train --help": [metalr, "train", "--help"],
        "import metalr": [sys.executable, "-c", "import metalr"],
        "import metalr; metalr.load": [sys.executable, "-c", "import metalr; metalr.load"],
        "import jax": [sys.executable, "-c", "import jax"],
    }
    rows = []
    for name, call in calls.items():
        seconds = []
        for _ in range(6):
            began = time.perf_counter()
            subprocess.run(call, check=True, capture_output=True)
            seconds.append(time.perf_counter() - began)
        rows.append({"section": "start", "call": name, "seconds": round(float(np.median(seconds[1:])), 3)})
    return rows


PLAIN = """
import sys, time
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np, optax
data = np.load(sys.argv[1])
images = jnp.asarray(data[data.files[0]][:1000])
params = jax.jit(nn.Dense(10).init)(jax.random.key(0), jnp.zeros((1, 784)))
state = jax.jit(optax.adam(1e-3).init)(params)
print(time.time())
"""  # up to where a script of one's own would call its compiled step for the first time
TRAIN = """
import sys, time
from metalr import cli
from metalr.outer import loop
class Reached(BaseException): pass
def first(*given, **named):
    print(time.time())
    raise Reached
loop.run_chunks = first
try:
    cli.main(["train", "--out", sys.argv[1] + "/run"])
except Reached:
    pass
"""


def launch_section() -> list[Row]:
    """Seconds from starting a process to its first compiled outer step, beside a plain script; the median of five."""
    images = str(Path(data.__file__).parent / "bundled" / "mnist12k.npz")
    rows = []
    for name, code in (("a plain script", PLAIN), ("metalr train", TRAIN)):
        seconds = []
        for _ in range(6):
            with tempfile.TemporaryDirectory() as folder:
                given = images if code is PLAIN else folder
                began = time.time()
                said = subprocess.run([sys.executable, "-c", code, given], check=True, capture_output=True, text=True)
                seconds.append(float(said.stdout.split()[-1]) - began)
        rows.append({"section": "launch", "call": name, "seconds": round(float(np.median(seconds[1:])), 3)})
    return rows


def listing_section() -> list[Row]:
    """Seconds and memory of `metalr runs list` for 10,000 finished runs, the median of five."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "one"
        settings = config.TrainConfig(outer=config.OuterConfig(steps=20, validate_every=10), out=made)
        settings = dataclasses.replace(settings, evaluation=config.EvaluationConfig(10, 10, shown_tasks=0))
        training.run(settings, name="one", reporter=progress.ConsoleReporter(quiet=True))
        stored = json.loads((made / "config.json").read_text())
        results = json.loads((made / "results.json").read_text())
        for i in range(10_000):
            run = Path(folder) / "many" / f"run{i}"
            shutil.copytree(made / "artifact", run / "artifact")
            stored["seed"] = results["config"]["seed"] = i
            (run / "config.json").write_text(json.dumps(stored))
            (run / "results.json").write_text(json.dumps(results))
        call = [sys.executable, "-c", LIST, str(Path(folder) / "many")]
        seconds, peak = [], 0
        for _ in range(6):
            began = time.perf_counter()
            said = subprocess.run(call, check=True, capture_output=True, text=True).stderr
            seconds.append(time.perf_counter() - began)
            peak = max(peak, int(said.split()[-1]))
    median = round(float(np.median(seconds[1:])), 2)
    return [{"section": "listing", "runs": 10_000, "seconds": median, "peak_mebibytes": round(peak / 1024)}]


LIST = """
import sys
from metalr import cli
cli.main(["runs", "list", sys.argv[1]])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""

SECTIONS = {
    "tasks": tasks_section,
    "steps": steps_section,
    "width": width_section,
    "way": way_section,
    "dtype": dtype_section,
    "compile": compile_section,
    "outer": outer_section,
    "seeds": seeds_section,
    "start": start_section,
    "launch": launch_section,
    "listing": listing_section,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=SECTIONS, nargs="+", help="only these; the file keeps the others' rows")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        compile_child(options.child)
        return
    rows = []
    for name in options.section or SECTIONS:
        rows += (part := SECTIONS[name]())
        if not options.json:
            for row in part:
                print(*(f"{k}={v}" for k, v in row.items() if k not in ("devices", "shot")), flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))
    stored = measure.RESULTS / "scaling.json"
    if options.section and stored.is_file():
        content = json.loads(stored.read_text())
        of = {name: content["provenance"][name] for name in ("commit", "machine")}
        kept = [of | row for row in content["rows"] if row["section"] not in options.section]
        here = {name: measure.provenance()[name] for name in of}
        rows = kept + [here | row for row in rows]
    measure.save("scaling", rows)


if __name__ == "__main__":
    main()
