"""`metalr.meta_train` on tasks of one's own: regression learns, resumes to the same bits, and is refused in time."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metalr
from metalr import inner, report
from metalr.config import CompareConfig, EvaluationConfig, GridConfig, InnerConfig, OuterConfig, SpaceConfig
from metalr.errors import ArtifactError, ConfigError, DataError, StoppedError
from metalr.inner import squared_error
from metalr.runs import comparing, training
from metalr.runs.progress import ConsoleReporter

QUIET = ConsoleReporter(quiet=True)


def network(width=16):
    def init(key):
        keys = jax.random.split(key, 2)
        return {
            "dense_0": {"kernel": jax.random.normal(keys[0], (1, width)), "bias": jnp.zeros(width)},
            "head": {"kernel": 0.1 * jax.random.normal(keys[1], (width, 1)), "bias": jnp.zeros(1)},
        }

    def apply(params, x):
        hidden = jnp.tanh(x @ params["dense_0"]["kernel"] + params["dense_0"]["bias"][None])
        return hidden @ params["head"]["kernel"] + params["head"]["bias"][None]

    return metalr.models.from_function(init, apply)


def line(key):
    """y = slope * x with a slope of its own for each task."""
    slope_key, x_key = jax.random.split(key)
    x = jax.random.uniform(x_key, (10, 1), minval=-1.0)
    y = x * jax.random.uniform(slope_key, minval=-2.0, maxval=2.0)
    return metalr.Episode(x[:5], y[:5], x[5:], y[5:])


def broken(key):
    return line(key)._replace(query_y=jnp.full((5, 1), jnp.nan))


LINES = metalr.Tasks(line, line, line, name="lines")


def train(out, **changes):
    settings = {
        "objective": "squared_error", "steps": 3, "outer_steps": 60, "meta_batch": 8, "out": out, "reporter": QUIET,
        "inner": InnerConfig(rate=0.1),
        "outer": OuterConfig(validate_every=20, checkpoint_every=20, init_rate=1e-2),
        "evaluation": EvaluationConfig(episodes=100, validation_episodes=50),
    }  # fmt: skip
    return metalr.meta_train(changes.pop("tasks", LINES), changes.pop("model", network()), **(settings | changes))


def test_regression_learns_to_adapt(tmp_path):
    learned = train(tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metric"] == {"name": "mse", "maximise": False}
    assert results["split_sha256"] == LINES.sha256
    before, after = results["curve"][0]["mse"], results["curve"][3]["mse"]
    assert after < 0.5 * before
    curve = learned.evaluate(LINES, episodes=100)
    np.testing.assert_allclose(curve.mean[3], after, rtol=1e-4)
    episode = LINES.test(jax.random.key(5))
    fast = learned.adapt(episode.support_x, episode.support_y)
    errors = [float(squared_error(learned.apply(p, episode.query_x), episode.query_y)) for p in (learned.init, fast)]
    assert errors[1] < errors[0]
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert any("validation_mse" in json.loads(row) for row in log.splitlines())
    assert results["training"]["validation_mse"] == min(score for _, score, _ in results["training"]["validations"])


def test_what_was_learned_is_loaded_with_its_network(tmp_path):
    learned = train(tmp_path / "run")
    again = metalr.load(tmp_path / "run", model=network())
    jax.tree.map(np.testing.assert_array_equal, learned.init, again.init)
    assert again.objective.name == "squared_error"
    with pytest.raises(ArtifactError, match="custom model; pass it"):
        metalr.load(tmp_path / "run")
    own = metalr.Objective("mine", squared_error)
    train(tmp_path / "own", objective=own)
    with pytest.raises(ArtifactError, match="has an objective of your own, 'mine'; pass it"):
        metalr.load(tmp_path / "own", model=network())
    assert metalr.load(tmp_path / "own", model=network(), objective=own).objective is own


def test_a_stopped_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    train(tmp_path / "whole")
    calls = iter(range(1000))
    monkeypatch.setattr(training.processes, "in_any_process", lambda asked: next(calls) == 3)
    with pytest.raises(StoppedError, match=r"go on with: metalr.meta_train\(..., out='.*cut', resume=True\)"):
        train(tmp_path / "cut")
    monkeypatch.undo()
    train(tmp_path / "cut", resume=True)
    for name in ("metrics.jsonl", "artifact/learner.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert train(tmp_path / "cut", resume=True).objective.name == "squared_error"  # finished: what is there
    assert train(tmp_path / "new", resume=True) is not None  # none there: a new one


def test_tasks_of_your_own_are_compared_with_everything_else_by_their_own_metric(tmp_path):
    for seed in (0, 1):
        train(tmp_path / f"run{seed}", outer_steps=40, seed=seed)
    folders = [tmp_path / f"run{seed}" for seed in (0, 1)]
    with pytest.raises(ConfigError, match="is of tasks of your own; pass them as given=..."):
        comparing.run(folders, CompareConfig(), model=network())
    with pytest.raises(ConfigError, match=r"given: expected the tasks of .*, got others \('sinusoid', by facts\)"):
        comparing.run(folders, CompareConfig(), model=network(), given=metalr.tasks.sinusoid(shot=6))
    space = SpaceConfig((1e-3, 1e-1), (1, 3), (4,))
    config = CompareConfig(
        tasks=6, searched=2, tuning_tasks=4, lengths=(1, 3), space=space, searchers=("grid", "tpe"), budgets=(2,),
        rivals=("momo", "adam_cosine"),
        out=tmp_path / "compare",
    )  # fmt: skip
    results = comparing.run(folders, config, model=network(), given=LINES, reporter=QUIET)
    assert results["metric"] == {"name": "mse", "maximise": False}
    rows = {(row["method"], row["steps"]): row for row in results["rows"]}
    ours, tuned = rows["learned init + learned rates", 3], rows["random init + one tuned rate", 3]
    assert len(ours["mse_of_seeds"]) == 2
    assert ours["ci95"] >= ours["ci95_over_tasks"]  # over seeds and tasks together
    assert ours["mse"] < tuned["mse"]
    assert tuned["learned_minus_this_at_the_end"][0] == pytest.approx(ours["mse"] - tuned["mse"], abs=2e-6)
    for name in ("momo", "adam_cosine"):
        assert rows[f"random init, no search ({name})", 3]["example_gradients"] == 15
    grid = rows["random init + grid, 4 cells", None]
    flattered = rows["random init + grid, best cell on the test part", None]
    assert flattered["mse"] <= grid["mse"]  # the lowest error is the best
    text = report.contest_text(results)
    assert f"{ours['mse']:.4g}" in text
    assert "%  " not in text.splitlines()[3]


def test_a_small_grid_on_tasks_of_your_own_chooses_the_lowest_error(tmp_path):
    grid = GridConfig(run=True, learning_rates=(1e-3, 0.1, 1e30), steps=(1, 3), batch_sizes=(5,), optimizers=("sgd",))
    train(tmp_path / "run", grid=grid, outer_steps=10)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    cells = [cell for cell in results["grid"]["cells"] if cell["init"] == "random"]
    best = next(r for r in results["comparison"] if r["method"] == "random init + grid, best cell of all")
    assert best["mse"] == min(cell["mse"] for cell in cells if cell["mse"] is not None)
    assert None in [cell["mse"] for cell in cells]  # the largest rate diverges, and JSON has no NaN
    assert f"{best['mse']:.4g}" in report.text(results | {"folder": "x"})


def test_several_seeds_are_reported_over_seeds_and_tasks(tmp_path):
    learners = train(tmp_path / "both", seed=(0, 3), outer_steps=20)
    alone = train(tmp_path / "alone", seed=3, outer_steps=20)
    assert [each.facts["seed"] for each in learners] == [0, 3]
    jax.tree.map(np.testing.assert_array_equal, learners[1].init, alone.init)
    summary = json.loads((tmp_path / "both" / "seeds.json").read_text())
    means = [
        json.loads((tmp_path / "both" / f"seed{s}" / "results.json").read_text())["curve"][3]["mse"] for s in (0, 3)
    ]
    last = summary["curve"][3]
    assert last["mse"] == pytest.approx(np.mean(means), abs=1e-6)
    assert last["ci95"] > last["ci95_over_tasks"]
    with pytest.raises(ConfigError, match=r"seed: expected one number, or several that differ, got \[1, 1\]"):
        train(tmp_path / "twice", seed=(1, 1))
    with pytest.raises(ConfigError, match="exists"):
        train(tmp_path / "both", seed=(3, 4))
    assert not (tmp_path / "both" / "seed4").exists()


def drawn(rng):
    """The same lines by numpy: what a loader or a simulator gives."""
    x = rng.uniform(-1, 1, (10, 1))
    y = x * rng.uniform(-2, 2)
    return x[:5], y[:5], x[5:], y[5:]


def test_host_arrays_resume_to_the_same_bits(tmp_path, monkeypatch):
    tasks = metalr.Tasks.from_host(drawn, drawn, drawn, name="host")
    train(tmp_path / "whole", tasks=tasks)
    curve = json.loads((tmp_path / "whole" / "results.json").read_text())["curve"]
    assert curve[3]["mse"] < 0.6 * curve[0]["mse"]
    calls = iter(range(1000))
    monkeypatch.setattr(training.processes, "in_any_process", lambda asked: next(calls) == 3)
    with pytest.raises(StoppedError):
        train(tmp_path / "cut", tasks=tasks)
    monkeypatch.undo()
    plain = metalr.Tasks.from_host(drawn, drawn, drawn, name="host", ahead=0)  # nothing ahead: the same episodes
    train(tmp_path / "cut", tasks=plain, resume=True)
    for name in ("metrics.jsonl", "artifact/learner.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_what_is_said_twice_or_has_no_folder_is_refused(tmp_path):
    for changes, message in (
        (
            {"outer": OuterConfig(steps=50)},
            "outer_steps: expected it in one place, got 60, and 50 in OuterConfig",
        ),
        ({"inner": InnerConfig(steps=20)}, r"steps: expected it in one place, got 3, and 20 in InnerConfig.steps"),
        ({"out": None, "resume": True}, r"resume: expected the run folder as out, .* got out=None"),
        ({"resume": True, "overwrite": True}, r"resume: expected .* overwrite False"),
        ({"seed": [0.5]}, r"seed: expected an integer, or several, got \(0.5,\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(changes.pop("out", tmp_path / "run"), **changes)
    assert not (tmp_path / "run").exists()
    settings = OuterConfig(steps=2, meta_batch=3, validate_every=2)
    train(tmp_path / "run", outer_steps=None, meta_batch=None, outer=settings)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["outer"]["steps"], config["outer"]["meta_batch"]) == (2, 3)
    assert "metalr.meta_train</code> with the same tasks" in (tmp_path / "run" / "report.html").read_text()


def test_a_finished_run_is_given_back_only_to_the_same_call(tmp_path):
    train(tmp_path / "run", outer_steps=2)
    assert train(tmp_path / "run", outer_steps=2, resume=True).spec.steps == 3
    with pytest.raises(ConfigError, match="evaluation.episodes: expected 100 as in .*, which is finished, got 700"):
        train(
            tmp_path / "run",
            outer_steps=2,
            evaluation=EvaluationConfig(episodes=700, validation_episodes=50),
            resume=True,
        )
    with pytest.raises(ConfigError, match="outer.steps: expected 2 as in .*, got 50"):
        train(tmp_path / "run", outer_steps=50, resume=True)
    with pytest.raises(ConfigError, match=r"tasks: expected those that .* was begun with, got others \('sinusoid'"):
        train(tmp_path / "run", outer_steps=2, tasks=metalr.tasks.sinusoid(shot=5, query=5), resume=True)


def test_what_a_host_function_raises_is_told_in_one_line(tmp_path):
    calls = iter(range(10**6))

    def varying(rng):
        rows = 10 if next(calls) < 3 else 12
        x = rng.random((rows, 1))
        return x[:5], x[:5], x[5:], x[5:]

    with pytest.raises(DataError, match="draws episodes on the host failed: .*expected the same shapes"):
        metalr.Tasks.from_host(varying, drawn, drawn).check(network(), inner.OBJECTIVES["squared_error"])
    count = iter(range(10**6))

    def breaking(rng):
        if next(count) > 60:
            raise OSError("the disk is gone")
        return drawn(rng)

    with pytest.raises(DataError, match="failed: OSError: the disk is gone"):
        train(tmp_path / "run", tasks=metalr.Tasks.from_host(breaking, drawn, drawn))
    assert "the disk is gone" in (tmp_path / "run" / "failed.json").read_text()


def test_host_functions_that_give_no_episode_are_refused():
    with pytest.raises(DataError, match="expected a function that gives an Episode, got float"):
        metalr.Tasks.from_host(lambda rng: rng.random(), drawn, drawn)
    with pytest.raises(DataError, match="expected numbers, got <U1"):
        metalr.Tasks.from_host(lambda rng: (np.array(["a"]),) * 4, drawn, drawn)


def test_rows_of_a_table_in_a_few_lines(tmp_path):
    rng = np.random.default_rng(0)
    store = np.repeat(np.arange(30), 25)
    x = rng.uniform(-1, 1, (750, 1))
    y = x * rng.uniform(-2, 2, 30)[store][:, None]
    tasks = metalr.Tasks.from_arrays(x, y, store, shot=5, query=5)
    train(tmp_path / "run", tasks=tasks)
    curve = json.loads((tmp_path / "run" / "results.json").read_text())["curve"]
    assert curve[3]["mse"] < curve[0]["mse"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"objective": "mse"}, ConfigError, "objective: expected one of"),
        ({"model": lambda x: x}, ConfigError, "model: expected a metalr.models.Model"),
        ({"tasks": line}, ConfigError, "tasks: expected a metalr.Tasks, got function"),
        ({"algorithm": "mamml"}, ConfigError, "inner.algorithm: expected one of"),
        ({"steps": 0}, ConfigError, "inner.steps"),
        ({"seed": None}, ConfigError, "seed: expected an integer, or several, got None"),
        ({"inner": InnerConfig(dropout=0.1)}, ConfigError, "inner.dropout: expected None"),
        ({"tasks": metalr.Tasks(broken, line, line)}, DataError, "tasks.train: query_y: expected finite"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(change, error, message, tmp_path):
    with pytest.raises(error, match=message):
        train(tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()


def test_other_tasks_are_refused_at_resume(tmp_path, monkeypatch):
    calls = iter(range(1000))
    monkeypatch.setattr(training.processes, "in_any_process", lambda asked: next(calls) > 1)
    with pytest.raises(StoppedError):
        train(tmp_path / "cut")
    monkeypatch.undo()
    other = dataclasses.replace(LINES, facts={"slopes": 3})
    with pytest.raises(ConfigError, match="tasks: expected those that .* was begun with, got others"):
        train(tmp_path / "cut", tasks=other, resume=True)
