"""Tasks a second of the meta-gradient, metalr beside PyTorch's ways and the obvious JAX.

    python benchmarks/throughput.py [--workload NAME] [--repeats N] [--json]

Second-order per-layer Meta-SGD, 5 inner steps, 15 query images a class, meta-batch 32. Before anything is timed, all
systems must give the same meta-gradient on the same episodes to 1e-4, in float64 (in float32, ReLUs whose input rounds
to another sign make larger differences between any two of them); timing is in float32. Each system's runs are
interleaved with the others'; medians. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from metalr.outer import devices

devices.use_all_cores()

import jax
import jax.numpy as jnp
import measure
import numpy as np

from metalr import data, inner, models, outer, tasks
from metalr.inner import hyperparameters
from metalr.runs.provenance import provenance
from metalr.trees import named_arrays
from metalr.types import Episode, MetaParams

META_BATCH, STEPS = 32, 5


class Workload(NamedTuple):
    """A model and the shape of its tasks."""

    model: Callable[[int], models.Model]
    way: int
    shot: int


def _mlp(way: int) -> models.Model:
    return models.mlp(way, widths=(256, 128, 64, 64), dropout=0.0)


WORKLOADS = {
    "mlp_1shot": Workload(_mlp, 5, 1),
    "mlp_5shot": Workload(_mlp, 5, 5),
    "reference_mlp": Workload(lambda way: models.mlp(way, dropout=0.0), 10, 10),
    "conv4_1shot": Workload(models.conv4, 5, 1),
    "conv4_5shot": Workload(models.conv4, 5, 5),
    "gru": Workload(models.rnn, 5, 1),
}
System = Callable[[], Any]


def episodes_of(work: Workload) -> Episode:
    """META_BATCH real episodes, numpy arrays with a leading task axis."""
    family = "rotated" if work.way == 10 else "digits"
    split = tasks.make_splits(data.bundled(), family).train
    pool, sample = tasks.make_sampler(split, work.way, work.shot, 15)
    keys = jax.random.split(jax.random.key(0), META_BATCH)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(sample, (None, 0)))(pool, keys))


def with_metalr(model: models.Model, spec: hyperparameters.RatesSpec, meta: MetaParams, episodes: Episode) -> System:
    """What `train` calls: outer.meta_gradient, tasks split over all devices."""
    keys = jax.random.split(jax.random.key(1), META_BATCH)
    mesh = devices.task_mesh(META_BATCH)
    gradient = jax.jit(
        devices.split_tasks(lambda *args: outer.meta_gradient(model, spec, *args), mesh, replicated=1, mean=True)
    )
    episodes, keys = devices.place_tasks((episodes, keys), mesh)
    meta = devices.replicate(meta, mesh)  # stays on the devices, as in `train`
    return lambda: jax.block_until_ready(gradient(meta, episodes, keys)[0])


def with_plain_jax(model: models.Model, spec: hyperparameters.RatesSpec, meta: MetaParams, episodes: Episode) -> System:
    """What one writes first: vmap of grad over tasks, lax.conv, one device."""

    def loss(meta: MetaParams, episode: Episode) -> jax.Array:
        fast, actual = meta.init, hyperparameters.actual(spec, meta.rates)
        for _ in range(STEPS):
            grads = jax.grad(lambda p: inner.cross_entropy(model.apply(p, episode.support_x), episode.support_y))(fast)
            fast = jax.tree_util.tree_map_with_path(
                lambda path, p, g: p - actual[hyperparameters.group_of(spec, path)] * g, fast, grads
            )
        return inner.cross_entropy(model.apply(fast, episode.query_x), episode.query_y)

    @jax.jit
    def gradient(meta: MetaParams, episodes: Episode) -> MetaParams:
        return jax.tree.map(lambda v: v.mean(0), jax.vmap(jax.grad(loss), (None, 0))(meta, episodes))

    episodes = jax.device_put(episodes)
    return lambda: jax.block_until_ready(gradient(meta, episodes))


def torch_systems(model: models.Model, meta: MetaParams, episodes: Episode) -> dict[str, System]:
    """The PyTorch peers, bound to the same numbers; torch.func in two chunk sizes."""
    import torch
    import torch_peers

    params = torch_peers.to_torch({k.removeprefix("init/"): v for k, v in named_arrays(meta.init, "init").items()})
    log_rates = {name: torch.tensor(np.asarray(value)) for name, value in meta.rates.items()}
    batch = [torch.tensor(np.asarray(v)) for v in episodes]
    batch[1], batch[3] = batch[1].long(), batch[3].long()
    function = torch_peers.MODELS[model.name]
    makers = {
        "torch.func vmap": torch_peers.torch_func(function, STEPS, META_BATCH),
        "torch.func vmap, 8 at a time": torch_peers.torch_func(function, STEPS, 8),
        "higher": torch_peers.with_higher(function, STEPS),
        "torchopt": torch_peers.with_torchopt(function, STEPS),
    }
    return {name: lambda run=run: run(params, log_rates, *batch) for name, run in makers.items()}


def flat(gradient: Any) -> dict[str, np.ndarray]:
    """Any system's gradient as arrays by name."""
    if isinstance(gradient, MetaParams):
        return named_arrays(gradient.init, "init") | {f"rates/{k}": np.asarray(v) for k, v in gradient.rates.items()}
    import torch_peers

    params, rates_gradient = (torch_peers.to_numpy(part) for part in gradient[:2])
    return {f"init/{k}": v for k, v in params.items()} | {f"rates/{k}": v for k, v in rates_gradient.items()}


def check_same(gradients: dict[str, dict[str, np.ndarray]]) -> float:
    """The largest difference of any system's tensor from metalr's, relative to the largest entry of metalr's gradient
    of the same part (init or rates). Exits if it exceeds 1e-4.
    """
    worst, reference = 0.0, gradients["metalr"]
    for part in ("init/", "rates/"):
        names = [name for name in reference if name.startswith(part)]
        scale = max(float(np.abs(reference[name]).max()) for name in names)
        for system, gradient in gradients.items():
            for name in names:
                error = float(np.abs(gradient[name] - reference[name]).max()) / scale
                worst = max(worst, error)
                if not error < 1e-4:
                    raise SystemExit(
                        f"{system}: meta-gradient of {name} differs from metalr's by {error:.2e} (relative)"
                    )
    return worst


def run(name: str, repeats: int) -> list[dict[str, Any]]:
    """Rows of one workload, best peer first in no order: as the systems are listed."""
    work = WORKLOADS[name]
    model, spec = work.model(work.way), hyperparameters.RatesSpec("layer", steps=STEPS, initial=0.05)
    meta = jax.tree.map(jnp.asarray, outer.initial(model, spec, jax.random.key(0)))
    episodes = episodes_of(work)

    def systems_of(meta: MetaParams, episodes: Episode) -> dict[str, System]:
        return {
            "metalr": with_metalr(model, spec, meta, episodes),
            "plain JAX vmap(grad)": with_plain_jax(model, spec, meta, episodes),
            **torch_systems(model, meta, episodes),
        }

    with jax.enable_x64(True):
        double = jax.tree.map(lambda v: np.asarray(v, np.float64) if v.dtype == np.float32 else v, (meta, episodes))
        error = check_same({system: flat(call()) for system, call in systems_of(*double).items()})
    systems = systems_of(meta, episodes)
    seconds = measure.side_by_side(systems, repeats)
    rate = measure.product_rate()
    one = jax.tree.map(lambda v: v[:4], episodes)
    keys = jax.random.split(jax.random.key(1), 4)
    flops = measure.product_flops(lambda m, e, k: outer.meta_gradient(model, spec, m, e, k), meta, one, keys) / 4
    best = min(s for system, s in seconds.items() if system != "metalr")
    return [
        {
            "workload": name,
            "system": system,
            "tasks_per_second": round(META_BATCH / s, 2),
            "ratio_to_best_peer": round(best / s, 3),
            "share_of_limit": round(META_BATCH / s * flops / rate, 4),
            "megaflops_a_task": round(flops / 1e6, 1),
            "product_gflops_per_second": round(rate / 1e9, 1),
            "largest_gradient_error": error,
            "repeats": repeats,
        }
        for system, s in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, help="only this one; the results file keeps the others' rows")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    rows = []
    for name in [options.workload] if options.workload else WORKLOADS:
        rows += run(name, options.repeats)
        if not options.json:
            for row in rows[-6:]:
                print(
                    f"{row['workload']:14} {row['system']:30} {row['tasks_per_second']:9.1f} tasks/s "
                    f"{row['ratio_to_best_peer']:7.2f} x best peer  {row['share_of_limit']:6.3f} of the limit",
                    flush=True,
                )
    if options.json:
        print(json.dumps(rows, indent=1))
    made = provenance()
    rows = [row | {"commit": made["commit"], "date": made["date"]} for row in rows]
    stored = measure.RESULTS / "throughput.json"
    if options.workload and stored.is_file():  # the other workloads stay as they were measured
        others = [row for row in json.loads(stored.read_text())["rows"] if row["workload"] != options.workload]
        rows = sorted([*others, *rows], key=lambda row: list(WORKLOADS).index(row["workload"]))
    measure.save("throughput", rows)


if __name__ == "__main__":
    main()
