"""A few held-out tasks to look at, for reports: their examples, and what is predicted before and after fine-tuning."""

from __future__ import annotations

import base64
from typing import Any

import jax
import numpy as np

from metalr import inner
from metalr.evaluation import protocol
from metalr.inner import descent
from metalr.learner import Learner
from metalr.models import predict
from metalr.runs.setup import Setup
from metalr.trees import count
from metalr.types import Curve, Episode

MOST = 24  # examples of a set that are kept
WHICH = {1: ("median",), 2: ("best", "worst"), 3: ("best", "median", "worst")}


def of_learner(learner: Learner, setup: Setup, curve: Curve, seed: int, tasks: int) -> dict[str, Any] | None:
    """The best, the median and the worst of the held-out tasks of a curve, as plain JSON values.

    Args:
      curve: of `seed`, as `evaluating.held_out` gives it.
      tasks: how many, 1 to 3.

    Returns:
      None where an example is neither an image with a class nor a number with a number. Else
      {"kind": "images" or "curves", "steps", "metric", "tasks": [{"which", "score", "support", "query"}]}, with
      {"size", "x", "y"} of a set, where size counts the examples that are left out too, and "before" and "after" of the
      query set. Images are base64 of bytes [n, height, width, channels] of "shape", scaled to the brightest one.
    """
    kind = _kind(learner, setup)
    if kind is None or not tasks:
        return None
    steps, objective = learner.spec.steps, learner.objective
    scores = curve.tasks[:, list(curve.steps).index(steps)]
    ranked = np.argsort(-scores if objective.maximise else scores)
    at = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    pool, sample = setup.parts.test
    keys = protocol.episode_keys(seed, len(scores))
    own = setup.standardisation

    @jax.jit
    def one(pool: Any, key: jax.Array, init: Any, rates: Any) -> tuple[Any, ...]:
        fresh = setup.phases.fresh_init
        episode, step_key, start = protocol.begin(learner.model, sample, pool, init, fresh, key)
        support = count(episode.support_y)
        optimizer, options = descent.fine_tune(learner.spec, rates, support, dropout=learner.model.dropout)
        data = episode.support_x, episode.support_y
        apply = learner.model.apply
        fast, _ = inner.adapt(apply, start, *data, optimizer, steps, loss=objective.loss, key=step_key, **options)
        outputs = [predict(apply, params, episode.support_x, episode.query_x) for params in (start, fast)]
        return episode, *outputs

    found = []
    for which in WHICH[tasks]:
        episode, *outputs = jax.device_get(one(pool, keys[at[which]], learner.init, learner.rates))
        if own is not None and kind == "curves":
            episode = Episode(
                own.own_inputs(episode.support_x), own.outputs(episode.support_y),
                own.own_inputs(episode.query_x), own.outputs(episode.query_y),
            )  # fmt: skip
            outputs = [own.outputs(value) for value in outputs]
        before, after = (_predicted(kind, value) for value in outputs)
        facts: dict[str, Any] = {"which": which, "score": protocol.rounded(scores[at[which]])}
        facts["support"] = _set(kind, episode.support_x, episode.support_y)
        facts["query"] = _set(kind, episode.query_x, episode.query_y) | {"before": before, "after": after}
        found.append(facts)
    facts = {"kind": kind, "steps": steps, "metric": objective.choose_by, "tasks": found}
    return facts | ({"shape": list(learner.model.image_shape)} if kind == "images" else {})


def _kind(learner: Learner, setup: Setup) -> str | None:
    pool, sample = setup.parts.test
    episode = jax.eval_shape(sample, pool, jax.random.key(0))
    x, y = episode.query_x, episode.query_y
    if learner.classifies_images and learner.model.image_shape[2] in (1, 3):
        return "images"
    if learner.objective.targets != "numbers":
        return None

    def outputs_of(init: Any, episode: Episode) -> Any:
        start = learner.model.begin(init, episode.support_x, episode.support_y)
        return predict(learner.model.apply, start, episode.support_x, episode.query_x)

    outputs = jax.eval_shape(outputs_of, learner.init, episode)
    single = all(isinstance(v, jax.ShapeDtypeStruct) and v.size == v.shape[0] for v in (x, y, outputs))
    return "curves" if single else None


def _set(kind: str, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    size, x, y = len(y), np.asarray(x, np.float32)[:MOST], np.asarray(y)[:MOST]
    if kind == "curves":
        return {"size": size, "x": _numbers(x), "y": _numbers(y)}
    pixels = (255 * x / max(float(x.max()), 1e-9)).clip(0, 255).round().astype(np.uint8)
    return {"size": size, "x": base64.b64encode(pixels.tobytes()).decode(), "y": y.tolist()}


def _predicted(kind: str, outputs: np.ndarray) -> list[Any]:
    outputs = np.asarray(outputs)[:MOST]
    return _numbers(outputs) if kind == "curves" else outputs.argmax(-1).tolist()


def _numbers(values: np.ndarray) -> list[float | None]:
    return [protocol.rounded(float(value)) for value in values.reshape(-1)]
