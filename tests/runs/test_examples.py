"""The held-out tasks that a run leaves for its report are those of its curve."""

import base64
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalr import Objective, Tasks, models, runs
from metalr import tasks as metalr_tasks
from metalr.config import EvaluationConfig, InnerConfig, ModelConfig, OuterConfig, TaskConfig, TrainConfig
from metalr.errors import ConfigError
from metalr.report import page

TINY = TrainConfig(
    tasks=TaskConfig("digits", 3, 2, 8),
    model=ModelConfig(widths=(16,)),
    inner=InnerConfig(steps=2),
    outer=OuterConfig(steps=4, meta_batch=2),
    evaluation=EvaluationConfig(episodes=8, validation_episodes=4, steps=3),
)


def test_the_best_the_median_and_the_worst_task_are_left_for_the_report(blobs_npz, tmp_path):
    results = runs.run(dataclasses.replace(TINY, data=str(blobs_npz), out=tmp_path / "run"), name="run")
    facts = json.loads((tmp_path / "run" / "examples.json").read_text())
    assert [task["which"] for task in facts["tasks"]] == ["best", "median", "worst"]
    scores = [task["score"] for task in facts["tasks"]]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[2]
    mean = next(point["accuracy"] for point in results["curve"] if point["steps"] == 2)
    assert scores[2] <= mean <= scores[0]
    for task in facts["tasks"]:
        query = task["query"]
        right = np.mean(np.array(query["after"]) == np.array(query["y"]))
        assert right == pytest.approx(task["score"], abs=1e-6), "what is shown is what was scored"
        assert query["size"] == len(query["y"]) == 24
        assert len(base64.b64decode(query["x"])) == 24 * np.prod(facts["shape"])
        assert np.frombuffer(base64.b64decode(query["x"]), np.uint8).max() == 255
    assert "the worst task" in page.page([tmp_path / "run"])


def test_no_task_is_shown_if_nobody_asked(blobs_npz, tmp_path):
    quiet = dataclasses.replace(TINY.evaluation, shown_tasks=0)
    runs.run(dataclasses.replace(TINY, data=str(blobs_npz), out=tmp_path / "run", evaluation=quiet), name="run")
    assert not (tmp_path / "run" / "examples.json").exists()
    many = dataclasses.replace(TINY.evaluation, shown_tasks=4)
    with pytest.raises(ConfigError, match="evaluation.shown_tasks: expected 0 to 3, got 4"):
        runs.run(dataclasses.replace(TINY, data=str(blobs_npz), out=tmp_path / "none", evaluation=many), name="none")


def test_curves_of_one_number_are_left_too_and_of_more_are_not(tmp_path):
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(8), 12)
    settings = {
        "objective": "squared_error", "outer_steps": 3, "meta_batch": 2, "steps": 1,
        "evaluation": EvaluationConfig(episodes=4, validation_episodes=4, shown_tasks=1),
    }  # fmt: skip
    for inputs, left in ((1, True), (2, False)):
        x = rng.normal(size=(96, inputs)).astype(np.float32)
        tasks = Tasks.from_arrays(x, x[:, :1] * task[:, None], task, shot=4, query=5)
        out = tmp_path / f"inputs{inputs}"
        runs.meta_train(tasks, models.mlp(1, (inputs,), widths=(8,)), out=out, **settings)
        assert (out / "examples.json").exists() == left
        assert ("the median task" in (out / "report.html").read_text()) == left
    x = rng.uniform(100, 200, (96, 1)).astype(np.float32)
    in_units = Tasks.from_arrays(x, x * 1000 + task[:, None], task, shot=4, query=5, standardise="both")
    runs.meta_train(in_units, models.mlp(1, (1,), widths=(8,)), out=tmp_path / "units", **settings)
    (shown,) = json.loads((tmp_path / "units" / "examples.json").read_text())["tasks"]
    assert 100 <= min(shown["query"]["x"]) <= max(shown["support"]["x"] + shown["query"]["x"]) <= 200
    residuals = np.array(shown["query"]["after"]) - np.array(shown["query"]["y"])
    assert np.square(residuals).mean() == pytest.approx(shown["score"], rel=1e-3), "in the units of its score"
    facts = json.loads((tmp_path / "inputs1" / "examples.json").read_text())
    (shown,) = facts["tasks"]
    assert shown["which"] == "median"
    assert [len(shown["query"][name]) for name in ("x", "y", "before", "after")] == [5] * 4
    assert np.square(np.array(shown["query"]["after"]) - np.array(shown["query"]["y"])).mean() == pytest.approx(
        shown["score"], rel=1e-4
    )


def test_outputs_that_are_no_single_number_are_not_drawn(tmp_path):
    network = models.from_function(
        lambda key: {"head": {"kernel": jax.random.normal(key, (1, 2))}},
        lambda params, x: dict(zip(("mean", "spread"), jnp.split(x @ params["head"]["kernel"], 2, 1), strict=True)),
    )
    objective = Objective("of the mean", lambda outputs, y: jnp.square(outputs["mean"] - y).mean())
    runs.meta_train(
        metalr_tasks.sinusoid(4, 4), network, objective=objective, outer_steps=2, meta_batch=2, steps=1,
        out=tmp_path / "run", evaluation=EvaluationConfig(episodes=4, validation_episodes=4),
    )  # fmt: skip
    assert not (tmp_path / "run" / "examples.json").exists()
