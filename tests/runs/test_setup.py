"""What a config stands for: choices that there are not, and the cost of a task by its derivative."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import metalr
from metalr import runs
from metalr.config import EvaluationConfig, InnerConfig, ModelConfig, OuterConfig, TaskConfig, TrainConfig
from metalr.errors import ConfigError
from metalr.inner import optimizers
from metalr.runs import progress, setup
from metalr.runs.setup import set_up, task_cost


@pytest.fixture
def small(blobs_npz):
    return TrainConfig(
        data=str(blobs_npz),
        tasks=TaskConfig(family="permuted", way=10, shot=2, query=3),
        model=ModelConfig(widths=(16,)),
        inner=InnerConfig(steps=2),
        outer=OuterConfig(steps=4, meta_batch=2),
        evaluation=EvaluationConfig(episodes=6, validation_episodes=2, steps=3, shown_tasks=0),
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"outer": OuterConfig(learns="rate")}, "outer.learns"),
        ({"inner": InnerConfig(derivative="Forward")}, "inner.derivative"),
        ({"inner": InnerConfig(adapts="heads")}, "inner.adapts"),
        ({"model": ModelConfig(name="resnet")}, "model.name"),
    ],
)
def test_a_value_that_is_no_choice_is_refused(small, changes, named):
    with pytest.raises(ConfigError, match=rf"{named}: expected one of \(.*, got '"):
        set_up(dataclasses.replace(small, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner": InnerConfig(steps=2.5)}, "inner.steps: expected int, got 2.5"),
        ({"outer": OuterConfig(steps="10")}, "outer.steps: expected int, got '10'"),
        ({"outer": OuterConfig(learns="init"), "inner": InnerConfig(learned=True)}, "inner.learned: expected None or"),
        ({"inner": InnerConfig(steps=2, horizons=(2, 2))}, "inner.horizons: expected different values"),
        ({"outer": OuterConfig(learns="rates_of_init")}, "init: expected a run or an artifact with outer.learns"),
        (
            {"outer": OuterConfig(part="validation")},
            r"outer.part: expected train unless outer.learns is one of \('rates', 'rates_of_init'\)",
        ),
        (
            {"inner": InnerConfig("reptile"), "outer": OuterConfig(calibrate=True)},
            r"outer.calibrate: expected False, .*\(reptile has no query loss\), got True",
        ),
        (
            {"inner": InnerConfig(steps=2, horizons=(0, 2))},
            "inner.horizons: expected numbers of inner steps of at least 1",
        ),
        ({"inner": InnerConfig("maml_pp", 2, horizons=(1, 2))}, "inner.horizons: .* outer.multi_step 0; got"),
        ({"inner": InnerConfig("joint", 2, horizons=(1, 2))}, "inner.horizons: .*, joint, 0"),
        (
            {"inner": InnerConfig("reptile"), "outer": OuterConfig(first_order_share=0.5)},
            r"outer.first_order_share: expected None, .*\(reptile does not differentiate through the inner steps\)",
        ),
        (
            {"inner": InnerConfig("fomaml"), "outer": OuterConfig(first_order_share=0.5)},
            r"outer.first_order_share: expected None, .*\(all outer steps are first order\)",
        ),
        ({"inner": InnerConfig("maml", lowest=1e-3)}, r"inner.lowest: expected None, .*\(rates do not learn\)"),
        ({"tasks": TaskConfig("permuted", 10, 2, 3, shots=(1, 1))}, "tasks.shots: expected different values"),
        ({"tasks": TaskConfig("permuted", 10, 2, 3, shots=(0, 1))}, "tasks.shot: expected at least 1, got 0"),
        (
            {"inner": InnerConfig(steps=2, support_power=0.1)},
            "inner.support_power: expected None unless tasks.shots are",
        ),
        (
            {"inner": InnerConfig(steps=2, horizons=(5,), horizon_power=0.5)},
            "inner.horizon_power: expected None unless",
        ),
    ],
)
def test_wrong_types_and_contradictions_are_refused(small, changes, message):
    with pytest.raises(ConfigError, match=message):
        set_up(dataclasses.replace(small, **changes))


def module_of(file, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def test_every_experiment_uses_all_that_it_sets(monkeypatch):
    """No document asks for a setting that its other settings leave nothing to do."""
    seen = 0
    for file in (Path(__file__).parents[2] / "experiments").glob("*.py"):
        for value in vars(module_of(file, monkeypatch)).values():
            for config in value.values() if isinstance(value, dict) else (value,):
                if isinstance(config, TrainConfig):
                    setup.check_choices_of(config, None)
                    seen += 1
    assert seen > 20


def test_the_benchmark_of_searches_uses_all_that_it_sets(monkeypatch):
    """Its cases, in full and in small, and the pre-trained rival that is derived from each."""
    module = module_of(Path(__file__).parents[2] / "benchmarks" / "grid_search.py", monkeypatch)
    trained = [case for case in module.CASES.values() if case.train is not None]
    for case in (*trained, *map(module.small, trained)):
        steps = case.pretraining_steps
        own = steps is not None and not case.pretrained_of
        for config in (case.train, *([module.pretraining(case.train, steps)] if own else [])):
            setup.check_choices_of(dataclasses.replace(config, model=ModelConfig()), None)
    assert len(trained) > 3


def test_optimizers_that_are_none_are_told_why():
    with pytest.raises(ConfigError, match=r"such as 'adam'; optax has no 'adm', but 'adam'"):
        optimizers.by_name("adm")
    with pytest.raises(ConfigError, match=r"got 'apply_updates': TypeError: "):
        optimizers.by_name("apply_updates")


def test_metalr_runs_under_strict_promotion(small, tmp_path):
    """Where the user's own code is held to it; optax's Adam is not up to it."""
    with jax.numpy_dtype_promotion("strict"):
        convolution = {"name": "conv4", "channels": 2, "layers": 1}
        for model, family in (({"widths": (8,)}, "rotated"), (convolution, "permuted")):
            config = dataclasses.replace(
                small, model=ModelConfig(**model), tasks=dataclasses.replace(small.tasks, family=family),
                out=tmp_path / family,
            )  # fmt: skip
            runs.run(config, name="x", reporter=progress.ConsoleReporter(quiet=True))
            learned = metalr.load(tmp_path / family)
            x = np.random.default_rng(0).random((20, 8, 8), np.float32)
            learned.apply(learned.adapt(x, np.arange(20) % 10), x)


def test_a_setting_that_may_be_none_may_be_none(small):
    set_up(dataclasses.replace(small, outer=OuterConfig(steps=4, meta_batch=2, clip=None)))


def test_a_curve_ends_at_the_trained_steps_where_rates_cannot_be_extended(small):
    config = dataclasses.replace(
        small, inner=InnerConfig(steps=2, per_step=True, extend="error"), evaluation=EvaluationConfig(episodes=6)
    )
    set_up(config)
    assert config.curve_steps == 2


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        ({}, 3 * 4 * 20),
        ({"derivative": "remat"}, 4 * 4 * 20),
        ({"derivative": "truncated", "last": 3}, (4 + 3 * 3) * 20),
        ({"derivative": "forward"}, (2 * 2 + 1) * 4 * 20),
        ({"derivative": "evolution", "pairs": 3}, 2 * 3 * 4 * 20 + 30),  # six forward passes of the query set
        ({"first_order": True}, 4 * 20),
        ({"batch_size": 5}, 3 * 4 * 5),
        ({"algorithm": "reptile"}, 4 * 20),
        ({"algorithm": "imaml", "solver_steps": 5}, 4 * 20 + 2 * 7 * 20),
        ({"algorithm": "joint"}, 20),
    ],
)
def test_cost_of_a_task_is_that_of_its_derivative(small, inner, expected):
    """20 support images, 4 steps, 30 query images; two learned numbers. docs/long.md has the factors."""
    config = dataclasses.replace(small, inner=InnerConfig(**{"steps": 4} | inner), evaluation=EvaluationConfig(steps=4))
    if config.inner.derivative == "evolution":
        config = dataclasses.replace(config, outer=dataclasses.replace(config.outer, learns="rates"))
    assert task_cost(config, set_up(config)) == expected + 30


def test_cost_of_a_task_at_several_horizons_is_their_mean(small):
    one, other, both = (
        dataclasses.replace(small, inner=InnerConfig(steps=2, horizons=horizons)) for horizons in ((1,), (3,), (1, 3))
    )
    costs = [task_cost(config, set_up(config)) for config in (one, other, both)]
    assert costs[2] == (costs[0] + costs[1]) / 2
    plain = dataclasses.replace(small, inner=InnerConfig(steps=1))
    assert costs[0] == task_cost(plain, set_up(plain))


def test_cost_of_a_task_of_several_sizes_is_their_mean(small):
    one, other, both = (
        dataclasses.replace(small, tasks=dataclasses.replace(small.tasks, shots=shots))
        for shots in ((1,), (3,), (1, 3))
    )
    parts = [set_up(config) for config in (one, other, both)]
    costs = [task_cost(config, setup) for config, setup in zip((one, other, both), parts, strict=True)]
    assert costs[2] == (costs[0] + costs[1]) / 2
    assert [amount.support for amount in parts[2].amounts] == [10, 30]
    assert parts[2].support == 10 * small.tasks.shot
    assert "meta-training with 1, 3 support images per class" in parts[2].source.tasks


def test_cost_of_a_first_order_start_is_in_between(small):
    config = dataclasses.replace(small, outer=dataclasses.replace(small.outer, first_order_share=0.5))
    assert task_cost(config, set_up(config)) == (0.5 + 0.5 * 3) * 2 * 20 + 30


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [("reptile", "which need a head that stays"), ("imaml", "which need a head that stays"), ("maml", None)],
)
def test_a_head_that_is_made_for_each_task_needs_the_derivative_through_it(small, algorithm, message):
    settings = {"inner": InnerConfig(algorithm, steps=2, head_start="shared")}
    if message is None:
        assert set_up(dataclasses.replace(small, **settings)).model.settings["head_start"] == "shared"
    else:
        with pytest.raises(ConfigError, match=message):
            set_up(dataclasses.replace(small, **settings))


def test_views_are_of_prototypes_and_are_charged(small):
    looks = dataclasses.replace(small, inner=InnerConfig(steps=2, head_start="prototypes", views=3))
    plain = dataclasses.replace(small, inner=InnerConfig(steps=2, head_start="prototypes"))
    learned = dataclasses.replace(small, inner=InnerConfig(steps=2))
    made = set_up(looks)
    assert made.model.settings["views"] == 3
    costs = [task_cost(config, set_up(config)) for config in (learned, plain, looks)]
    assert np.diff(costs).tolist() == [made.support, 3 * made.support]
    with pytest.raises(ConfigError, match=r"inner.views: expected 0.*only with inner.head_start prototypes.*got 3"):
        set_up(dataclasses.replace(small, inner=InnerConfig(steps=2, views=3)))
