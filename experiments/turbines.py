"""A small regression task a turbine: power curves of wind turbines from five of their points.

    pip install --no-deps windpowerlib && python experiments/turbines.py [--seeds 0 1 2 3 4] [--curves power_curves.csv]

67 measured power curves with 20 to 71 points each (windpowerlib, MIT licence; data of the OpenEnergy platform). A task
is one turbine: from 5 random points of its curve, predict all others. Wind speed and power are scaled (speed by 10 m/s,
power by the turbine's largest). 17 turbines are held out for the test, 10 for validation. Turbines of one maker are
alike, so a held-out turbine is seldom of a new kind.

Beside learned init and rates: a pooled network (trained on all turbines, no fine-tune); the pooled network fine-tuned
at one rate that was tuned on the validation turbines; and what a person would do without other turbines: a search for
each turbine over rates and lengths by leaving each of its five points out in turn, from a random init.
Intervals are over meta-training seeds and test turbines; each turbine counts once, with the mean of 10 draws of points.
Expected: see results/turbines.json and docs/own_tasks.md; about 10 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metalr
from metalr import inner
from metalr.config import EvaluationConfig, InnerConfig, OuterConfig
from metalr.evaluation import protocol
from metalr.inner import descent, squared_error
from metalr.runs.provenance import command, provenance

SHOT, DRAWS, STEPS = 5, 10, 10
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
SEARCHED = [(rate, steps) for rate in (1e-3, 3e-3, 1e-2, 3e-2) for steps in (30, 100, 300, 1000)]  # of Adam


def read(path: Path | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(speed [rows, 1], power [rows, 1], turbine [rows]), scaled."""
    if path is None:
        found = importlib.util.find_spec("windpowerlib")
        if found is None or not found.submodule_search_locations:
            raise SystemExit(
                "expected windpowerlib, found none: pip install --no-deps windpowerlib, or pass --curves FILE"
            )
        path = Path(found.submodule_search_locations[0]) / "oedb" / "power_curves.csv"
    with path.open() as file:
        head, *lines = csv.reader(file)
    rows = [
        (float(speed) / 10, float(power) / max(float(v) for v in line[1:] if v), line[0])
        for line in lines
        for speed, power in zip(head[1:], line[1:], strict=True)
        if power
    ]
    speed, power, turbine = zip(*rows, strict=True)
    return np.array(speed, np.float32)[:, None], np.array(power, np.float32)[:, None], np.array(turbine)


def network() -> metalr.models.Model:
    """1-64-64-1 with tanh."""
    sizes, names = (1, 64, 64, 1), ("dense_0", "dense_1", "head")

    def init(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, len(names))
        return {
            name: {"kernel": jax.random.normal(k, (a, b)) / jnp.sqrt(a), "bias": jnp.zeros(b)}
            for name, k, a, b in zip(names, keys, sizes[:-1], sizes[1:], strict=True)
        }

    def apply(params: dict[str, Any], x: jax.Array) -> jax.Array:
        x = 2 * x - 2  # speeds 0..3.5 about zero
        for name in names[:-1]:
            x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"][None])
        return x @ params["head"]["kernel"] + params["head"]["bias"][None]

    return metalr.models.from_function(init, apply)


def draws(data: tuple[np.ndarray, ...], turbines: list[str]) -> dict[str, np.ndarray]:
    """DRAWS episodes of each turbine, [turbines * DRAWS, ...]: support, and all other points with a mask."""
    x, y, turbine = data
    rng, longest = np.random.default_rng(0), max(int((turbine == t).sum()) for t in turbines)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("sx", "sy", "qx", "qy", "mask")}
    for name in turbines:
        rows = np.flatnonzero(turbine == name)
        for _ in range(DRAWS):
            order = rng.permutation(rows)
            support, query = order[:SHOT], order[SHOT:]
            padded = np.resize(query, longest)
            values = x[support], y[support], x[padded], y[padded], np.arange(longest) < len(query)
            for key, value in zip(found, values, strict=True):
                found[key].append(value)
    return {key: np.stack(value) for key, value in found.items()}


def error_of(model: metalr.models.Model, params: Any, d: dict[str, jax.Array]) -> jax.Array:
    wrong = jnp.square(model.apply(params, d["qx"]) - d["qy"])[:, 0]
    return jnp.where(d["mask"], wrong, 0).sum() / d["mask"].sum()


def by_turbine(errors: Any) -> np.ndarray:
    """[turbines] mean squared error of [turbines * DRAWS]."""
    return np.asarray(errors, np.float64).reshape(-1, DRAWS).mean(1)


def fine_tuned(model: metalr.models.Model, init: Any, tx: Any, steps: int, episodes: Any) -> np.ndarray:
    def one(d: dict[str, jax.Array]) -> jax.Array:
        fast, _ = inner.adapt(model.apply, init, d["sx"], d["sy"], tx, steps, loss=squared_error)
        return error_of(model, fast, d)

    return by_turbine(jax.jit(lambda e: jax.lax.map(one, e))(episodes))


def searched(model: metalr.models.Model, episodes: Any, seed: int) -> np.ndarray:
    """Each turbine's own search from a random init: rate and length by leaving points out, then all five."""
    init = model.init(jax.random.key(seed))

    @functools.partial(jax.jit, static_argnums=1)
    def run(d: dict[str, jax.Array], steps: int, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        def fit(sx: jax.Array, sy: jax.Array) -> Any:
            return inner.adapt(model.apply, init, sx, sy, optax.adam(rate), steps, loss=squared_error)[0]

        def one(d: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            left_out = 0.0
            for i in range(SHOT):
                params = fit(jnp.delete(d["sx"], i, 0), jnp.delete(d["sy"], i, 0))
                left_out += squared_error(model.apply(params, d["sx"][i : i + 1]), d["sy"][i : i + 1])
            return left_out / SHOT, error_of(model, fit(d["sx"], d["sy"]), d)

        return jax.vmap(one)(d)

    found = [run(episodes, steps, np.float32(rate)) for rate, steps in SEARCHED]
    chosen = np.argmin(np.stack([np.asarray(validation) for validation, _ in found]), axis=0)
    return by_turbine(np.stack([np.asarray(test) for _, test in found])[chosen, np.arange(len(chosen))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--curves", type=Path, help="the file power_curves.csv of windpowerlib; default: the installed one"
    )
    options = parser.parse_args()
    data, model = read(options.curves), network()
    tasks = metalr.Tasks.from_arrays(*data, shot=SHOT, query=10, validation=0.15, test=0.25, name="turbines")
    held = tasks.facts["tasks"]
    test, validation = (jax.tree.map(jnp.asarray, draws(data, held[part])) for part in ("test", "validation"))
    found: dict[str, list[np.ndarray]] = {}
    for seed in options.seeds:
        common: dict[str, Any] = {
            "objective": "squared_error", "steps": STEPS, "outer_steps": 3000, "meta_batch": 16, "seed": seed,
            "outer": OuterConfig(validate_every=250, init_rate=3e-3), "evaluation": EvaluationConfig(steps=STEPS),
            "resume": True,
        }  # fmt: skip
        out = Path("runs/turbines")
        learned = metalr.meta_train(
            tasks, model, algorithm="meta_sgd_layer", inner=InnerConfig(rate=0.02), out=out / f"learned{seed}", **common
        )
        pooled = metalr.meta_train(
            tasks, model, algorithm="joint", inner=InnerConfig(rate=0.003), out=out / f"pooled{seed}", **common
        )
        tx = descent.optimizer(learned.spec, learned.rates)
        tuned = [fine_tuned(model, pooled.init, optax.sgd(rate), STEPS, validation).mean() for rate in RATES]
        best = RATES[int(np.nanargmin(tuned))]
        for method, errors in (
            ("learned init + learned rates", fine_tuned(model, learned.init, tx, STEPS, test)),
            ("pooled network, no fine-tune", fine_tuned(model, pooled.init, optax.sgd(0.0), 0, test)),
            ("pooled network + one tuned rate", fine_tuned(model, pooled.init, optax.sgd(best), STEPS, test)),
            ("random init + a search for each turbine", searched(model, test, seed)),
        ):
            found.setdefault(method, []).append(errors)
        print(f"seed {seed}: the pooled network's tuned rate is {best:g}", flush=True)
    rows, reference = [], found["learned init + learned rates"]
    for method, errors in found.items():
        row: dict[str, Any] = {"method": method}
        for name, values in (
            ("mse", errors),
            ("minus_learned", [e - r for e, r in zip(errors, reference, strict=True)]),
        ):
            means = [float(v.mean()) for v in values]
            over = [float(protocol.half_width(v)) for v in values]
            both = protocol.over_seeds_and_tasks(means, over) if len(means) > 1 else over[0]
            row |= {name: round(float(np.mean(means)), 6), f"{name}_ci95": round(both, 6)}
            row |= {f"{name}_of_seeds": [round(m, 6) for m in means]}
        rows.append(row)
        print(f"{method:42} mse {1000 * row['mse']:.3f} ± {1000 * row['mse_ci95']:.3f} (x 1000)", flush=True)
    facts = {"name": "turbines", "seeds": options.seeds, "turbines": held, "draws": DRAWS, "shot": SHOT}
    head = {"command": command(), "provenance": provenance(), "split_sha256": tasks.sha256}
    folder = Path(__file__).parent / "results" if options.seeds == [0, 1, 2, 3, 4] else Path("runs/turbines")
    (folder / "turbines.json").write_text(json.dumps(facts | head | {"lines": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
