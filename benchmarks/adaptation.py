"""Fine-tuning one held-out task, and a thousand: `learned.adapt` beside a PyTorch loop; and the cold start.

    python benchmarks/adaptation.py [--repeats N]

5 inner steps with per-layer rates, the adapted params checked against PyTorch's to 1e-3 of the largest (in float32 a
ReLU whose input rounds to another sign makes larger differences than rounding alone). Beside it what no inner loop
can save: a compiled call with the same arguments that only doubles the params, and for a thousand tasks filling as much
new memory as their params take. Predicting: fine-tuning and the logits of 75 query images, `learned.predictor` beside
the loop and a forward pass. Cold start: a new process loads an artifact, compiles, adapts; with an empty and with a
filled compilation cache. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import os
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
import torch
import torch_peers

import metalr
from metalr import data, models, outer, tasks
from metalr.inner import hyperparameters as rates
from metalr.trees import named_arrays

STEPS, TASKS = 5, 1000
MODELS = {
    "mlp 784-256-128-64-64": lambda: models.mlp(5, widths=(256, 128, 64, 64), dropout=0.0),
    "conv4-64": lambda: models.conv4(5),
}
COLD = """
import sys, time
began = time.perf_counter()
import numpy as np
import metalr
from metalr import data
from metalr.outer import devices
devices.use_all_cores()
devices.use_compilation_cache(data.cache_dir() / "compiled")
learned = metalr.load(sys.argv[1])
x = np.load(sys.argv[2])
fast = learned.adapt(x["support_x"][0], x["support_y"][0], steps=5)
learned.apply(fast, x["query_x"][0]).block_until_ready()
print(time.perf_counter() - began)
"""


def learner_of(model: models.Model) -> metalr.Learner:
    """An untrained learner: speed does not depend on what was learned."""
    spec = rates.RatesSpec("layer", steps=STEPS, initial=0.05)
    meta = outer.initial(model, spec, jax.random.key(0))
    return metalr.Learner(model, spec, meta.init, rates.actual(spec, meta.rates))


def torch_adapt(learner: metalr.Learner, x: np.ndarray, y: np.ndarray) -> Callable[[], dict[str, torch.Tensor]]:
    """The loop that a PyTorch user writes: SGD with a parameter group a layer."""
    function = torch_peers.MODELS[learner.model.name]
    start = torch_peers.to_torch({k.removeprefix("init/"): v for k, v in named_arrays(learner.init, "init").items()})
    images, labels = torch.tensor(x), torch.tensor(y).long()

    def run() -> dict[str, torch.Tensor]:
        params = {name: value.clone().requires_grad_() for name, value in start.items()}
        groups = [
            {"params": [v for n, v in params.items() if n.rpartition("/")[0] == layer], "lr": float(rate)}
            for layer, rate in learner.rates.items()
        ]
        optimizer = torch.optim.SGD(groups)
        for _ in range(STEPS):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(function(params, images), labels).backward()
            optimizer.step()
        return params

    return run


def cold_start(folder: Path, learner: metalr.Learner, arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Seconds of a new process, without and with the compilation cache."""
    path = metalr.save(folder / "artifact", learner)
    np.savez(folder / "task.npz", **arrays)
    env = os.environ | {"METALR_CACHE_DIR": str(folder / "cache")}
    env.pop("XLA_FLAGS", None)
    seconds = []
    for _ in range(4):
        call = [sys.executable, "-c", COLD, str(path), str(folder / "task.npz")]
        seconds.append(float(subprocess.run(call, check=True, capture_output=True, text=True, env=env).stdout))
    return {"cold_start_seconds": round(seconds[0], 2), "cold_start_cached_seconds": round(min(seconds[1:]), 2)}


def run(name: str, shot: int, repeats: int) -> dict[str, Any]:
    """One row."""
    learner = learner_of(MODELS[name]())
    pool, sample = tasks.make_sampler(tasks.make_splits(data.bundled(), "digits").train, 5, shot, 15)
    keys = jax.random.split(jax.random.key(0), TASKS)
    episodes = jax.jit(lambda keys: jax.lax.map(lambda key: sample(pool, key), keys))(keys)
    arrays = {name: np.asarray(value) for name, value in episodes._asdict().items()}
    x, y = arrays["support_x"], arrays["support_y"]
    peer = torch_adapt(learner, x[0], y[0])
    ours = named_arrays(learner.adapt(x[0], y[0], steps=STEPS), "p")
    theirs = torch_peers.to_numpy(peer())
    largest = max(float(np.abs(v).max()) for v in theirs.values())
    error = max(float(np.abs(ours[f"p/{k}"] - v).max()) for k, v in theirs.items()) / largest
    if not error < 1e-3:
        raise SystemExit(f"{name}: adapted params differ from PyTorch's by {error:.2e}")
    query, function = arrays["query_x"][0], torch_peers.MODELS[learner.model.name]
    images = torch.tensor(query)

    def predict_by_torch() -> torch.Tensor:
        fast = peer()
        with torch.no_grad():
            return function(fast, images)

    def predict() -> jax.Array:
        return learner.predictor(x[0], y[0], steps=STEPS)(query)

    apart = float(np.abs(np.asarray(predict()) - predict_by_torch().numpy()).max())
    if not apart < 1e-2:
        raise SystemExit(f"{name}: predictions differ from PyTorch's by {apart:.2e}")
    double = jax.jit(lambda init, rates, x, y: jax.tree.map(lambda leaf: 2 * leaf, init), keep_unused=True)
    seconds = measure.side_by_side(
        {
            "metalr": lambda: jax.block_until_ready(learner.adapt(x[0], y[0], steps=STEPS)),
            "torch": peer,
            "predict": lambda: jax.block_until_ready(predict()),
            "torch predict": predict_by_torch,
            "double": lambda: jax.block_until_ready(double(learner.init, learner.rates, x[0], y[0])),
        },
        repeats,
    )
    bulk, fill = [], []
    for _ in range(4):  # the first compiles
        began = time.perf_counter()
        jax.block_until_ready(learner.adapt(x, y, steps=STEPS))
        bulk.append(time.perf_counter() - began)
        began = time.perf_counter()
        np.full((TASKS, sum(leaf.size for leaf in jax.tree.leaves(learner.init))), 1, np.float32)
        fill.append(time.perf_counter() - began)
    many = float(np.median(bulk[1:]))
    with tempfile.TemporaryDirectory() as folder:
        cold = cold_start(Path(folder), learner, {k: v[:1] for k, v in arrays.items()})
    return {
        "model": name,
        "shot": shot,
        "milliseconds_a_task": round(1e3 * seconds["metalr"], 3),
        "torch_milliseconds_a_task": round(1e3 * seconds["torch"], 3),
        "times_faster": round(seconds["torch"] / seconds["metalr"], 2),
        "predicting_milliseconds": round(1e3 * seconds["predict"], 3),
        "torch_predicting_milliseconds": round(1e3 * seconds["torch predict"], 3),
        "times_faster_predicting": round(seconds["torch predict"] / seconds["predict"], 2),
        "doubling_milliseconds": round(1e3 * seconds["double"], 3),
        "thousand_tasks_seconds": round(many, 3),
        "filling_their_memory_seconds": round(float(np.median(fill[1:])), 3),
        "times_faster_in_bulk": round(TASKS * seconds["torch"] / many, 2),
        "largest_difference": error,
        **cold,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    rows = [run(name, shot, options.repeats) for name in MODELS for shot in (1, 5)]
    for row in rows:
        print(row)
    measure.save("adaptation", rows)


if __name__ == "__main__":
    main()
