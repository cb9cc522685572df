"""Runs the blocks of docs/tutorial.md from top to bottom, and keeps what they print.

python experiments/tutorial.py      (about 3 minutes on 2 CPU cores; writes experiments/results/tutorial.json)
"""

import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

import metalr
from metalr.evaluation import protocol
from metalr.outer import devices
from metalr.report.figures import Series, standalone
from metalr.runs.provenance import command, provenance

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"
FIGURE = PAGE.parent / "figures" / "init_and_rates.svg"
ADAM_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
RESULTS = Path(__file__).parent / "results" / "tutorial.json"


def curves_of(tasks: metalr.Tasks, model: metalr.models.Model, learned: metalr.Learner) -> dict[str, list[list[float]]]:
    """Mean accuracy on 200 held-out tasks after 0 to 10 steps, and its 95 % interval over tasks, of some fine-tunes."""
    pool, sample = tasks.sampler("test")
    keys, steps = protocol.episode_keys(0, 200), list(range(11))
    curve = learned.evaluate(tasks, episodes=200)
    found = {"learned init + learned rates": (curve.mean, curve.ci95)}
    for name, rate in (("learned init + SGD 0.01, too small", 0.01), ("learned init + SGD 1, too large", 1.0)):
        curve = protocol.make_baseline(model, sample, optax.sgd, steps)(pool, learned.init, jnp.float32(rate), keys)
        found[name] = (curve.mean, curve.ci95)
    evaluate = protocol.make_baseline(model, sample, optax.adam, steps, random_init=True)
    searched = {rate: evaluate(pool, learned.init, jnp.float32(rate), keys) for rate in ADAM_RATES}
    best = max(searched, key=lambda rate: searched[rate].mean[-1])
    for rate, said in ((best, "the best of five"), (1e-3, "the usual rate")):
        found[f"random init + Adam {rate:g}, {said}"] = (searched[rate].mean, searched[rate].ci95)
    return {name: [np.round(part, 4).tolist() for part in parts] for name, parts in found.items()}


def main() -> None:
    devices.use_all_cores()
    scope: dict = {}
    printed = []
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(sys.argv[1] if sys.argv[1:] else temporary):
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(block, scope)
            if output.getvalue():
                printed.append(output.getvalue().strip())
        curves = curves_of(scope["tasks"], scope["model"], scope["learned"])
    facts = {"command": command(), "provenance": provenance(), "seed": 0, "printed": printed, "curves": curves}
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    lines = [
        Series(name, list(range(len(mean))), mean, [a - b for a, b in zip(mean, ci95, strict=True)],
               [a + b for a, b in zip(mean, ci95, strict=True)])
        for name, (mean, ci95) in curves.items()
    ]  # fmt: skip
    FIGURE.write_text(
        standalone(
            "What the init does, and what the rates do", "Accuracy on 200 new tasks over inner steps.", lines,
            x_label="inner steps", y_label="accuracy", percent=True,
        )
    )  # fmt: skip
    print("\n".join(printed))


if __name__ == "__main__":
    main()
