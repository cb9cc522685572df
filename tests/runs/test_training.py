"""Run folders: what may be overwritten, seeds, and one policy for every row of a comparison."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metalr
from metalr import cli, data, models, report, runs, tasks
from metalr.config import (
    CompareConfig,
    EvaluationConfig,
    GridConfig,
    InnerConfig,
    ModelConfig,
    OuterConfig,
    SearchConfig,
    SpaceConfig,
    TaskConfig,
    TrainConfig,
)
from metalr.config import files as config_files
from metalr.errors import ConfigError, DataError, StoppedError
from metalr.evaluation import protocol
from metalr.inner import hyperparameters as rates
from metalr.outer import loop
from metalr.report import tables
from metalr.runs import comparing, meta_training, progress, searching, studies, training
from metalr.runs.setup import set_up
from metalr.storage import checkpoints


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


def run(config, **changes):
    return runs.run(dataclasses.replace(config, **changes), name="x", reporter=progress.ConsoleReporter(quiet=True))


def test_only_a_run_is_overwritten(small, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("my own")
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match=r"expected a run to overwrite, found other files: \['thesis.txt'\]"):
        run(small, out=mine, overwrite=True)
    assert (mine / "config.json").read_text() == "my own"
    first = run(small, out=tmp_path / "run")
    again = run(small, out=tmp_path / "run", overwrite=True)
    assert first["curve"] == again["curve"]


def test_an_artifact_knows_after_how_many_steps_it_was_best(small, tmp_path):
    results = run(small, inner=InnerConfig(steps=2, horizons=(1, 3)), out=tmp_path / "run")
    training = results["training"]
    each = training["validated_steps"]
    assert each.keys() == {"1", "3"}
    assert np.mean([*each.values()]) == pytest.approx(training["validation_accuracy"], abs=2e-6)
    learned = metalr.load(tmp_path / "run")
    assert learned.best_steps() == max((1, 3), key=lambda steps: each[str(steps)])
    assert learned.best_steps(at_most=2) == 1
    one = metalr.load(run(small, out=tmp_path / "one")["folder"])
    assert one.facts["validated_steps"] == {"2": one.facts["validation_accuracy"]}
    assert one.best_steps() == 2
    assert one.facts["support"] == 10 * 2


def test_default_folders_are_numbered(small):
    assert [run(small)["folder"] for _ in range(2)] == ["runs/x", "runs/x-2"]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_all_rows_of_a_comparison_follow_one_policy(small, dropout):
    """MAML's rate is fixed, and said to be; its row and the grid's SGD cell are the same thing."""
    results = run(
        small,
        model=ModelConfig(widths=(16,), dropout=dropout),
        inner=InnerConfig(algorithm="maml", steps=3),
        evaluation=EvaluationConfig(episodes=200, validation_episodes=2, steps=3, shown_tasks=0),
        grid=GridConfig(run=True, learning_rates=(0.1,), steps=(3,), batch_sizes=(1000,), optimizers=("sgd",)),
    )
    rows = {row["method"]: row for row in results["comparison"] if row["steps"] == 3}
    learned, cell = rows["learned init + fixed rates"], rows["learned init + grid, best cell at 3 steps"]
    assert abs(learned["accuracy"] - cell["accuracy"]) < (0.03 if dropout else 1e-3)


def test_seeds_are_checked_before_any_is_trained(small, tmp_path):
    for given, message in (((), "seeds: expected"), ((1, 1), "seeds: expected"), ((0, -1), "seed: expected 0 <= seed")):
        with pytest.raises(ConfigError, match=message):
            studies.run_seeds(dataclasses.replace(small, out=tmp_path / "s"), "x", given, tmp_path)
    assert not (tmp_path / "s").exists()


def test_seeds_are_averaged_and_their_choices_listed(small, tmp_path):
    config = dataclasses.replace(
        small, out=tmp_path / "s", grid=GridConfig(run=True, learning_rates=(0.01, 0.1), steps=(1,), batch_sizes=(5,))
    )
    results = studies.run_seeds(config, "x", (0, 1), tmp_path)
    assert json.loads((tmp_path / "results" / "x.json").read_text())["seeds"] == [0, 1]
    assert (tmp_path / "artifacts" / "x" / "metalr.json").is_file()
    for row, *each in zip(results["comparison"], *(r["comparison"] for r in results["runs"]), strict=True):
        assert row["accuracy"] == pytest.approx(sum(r["accuracy"] for r in each) / 2, abs=1e-5)
        cells = [r["cell"] for r in each]
        assert row["cell"] == (cells[0] if cells[0] == cells[1] else cells)


def test_rates_learn_by_evolution(small, tmp_path):
    """With minibatches, dropout and several lengths: what the ways through a derivative take too."""
    inner = InnerConfig(steps=2, horizons=(1, 3), batch_size=8, dropout=0.1, derivative="evolution", pairs=2)
    run(small, inner=inner, outer=dataclasses.replace(small.outer, learns="rates"), out=tmp_path / "run")
    learned = metalr.load(tmp_path / "run")
    assert all(np.isfinite(value).all() for value in learned.rates.values())
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    norms = [row["gradient_norm"] for row in log if "gradient_norm" in row]
    assert len(norms) == 4
    assert min(norms) > 0


def test_a_study_compares_variants_and_horizons_and_goes_on(small, tmp_path, monkeypatch):
    inner = InnerConfig(steps=3, knots=2, batch_size=5, momentum=0.5)
    variants = {
        "both": dataclasses.replace(small, inner=inner),
        "rates / alone": dataclasses.replace(
            small, inner=inner, outer=dataclasses.replace(small.outer, learns="rates")
        ),
    }
    options = {
        "horizons": (3, 12),
        "grid": GridConfig(learning_rates=(0.1,), steps=(1, 5, 10, 50), batch_sizes=(8, 32, 128), optimizers=("sgd",)),
    }
    results = studies.run_study(variants, "x", (0,), tmp_path, **options)
    assert [row["variant"] for row in results["rows"]] == list(variants)
    assert results["rows"][0]["steps"] == 3
    methods = {(h["horizon"], h["method"]) for h in results["rows"][1]["horizons"]}
    expected = {"random init + learned rates", "random init + grid, best fixed rate"}
    assert methods == {(n, method) for n in (3, 12) for method in expected}
    assert "learned init + grid, best fixed rate" in str(results["rows"][0]["horizons"])
    assert "rates / alone" in report.study_text(results)
    init = metalr.load("runs/x/rates___alone/seed0/artifact").init
    fresh = loop.start(
        (s := set_up(variants["both"])).model, s.spec, s.optimizer, jax.random.fold_in(jax.random.key(0), 0)
    )
    jax.tree.map(np.testing.assert_array_equal, init, fresh.meta.init)  # the init did not learn

    def no_run(*_, **__):
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(studies, "run", no_run)
    again = studies.run_study(variants, "x", (0,), tmp_path, **options)
    assert again["rows"] == results["rows"]
    for wrong in ({"horizons": (3,), "grid": GridConfig(optimizers=("nope",))}, {"horizons": (0,)}):
        with pytest.raises(ConfigError):  # before anything is trained
            studies.run_study(variants, "other", (0,), tmp_path, **wrong)
    with pytest.raises(ConfigError, match="expected a run with this study's settings"):
        studies.run_study({"both": dataclasses.replace(small, inner=InnerConfig(steps=2))}, "x", (0,), tmp_path)


QUIET = progress.ConsoleReporter(quiet=True)


class Interrupted(Exception):
    """Stands for a kill: nothing catches it."""


class KillAfter(progress.ConsoleReporter):
    """A reporter that ends the run once so many outer steps are done."""

    def __init__(self, steps):
        super().__init__(quiet=True)
        self.left = steps

    def bar(self, text, total, done=0):
        from contextlib import contextmanager

        @contextmanager
        def bar():
            def advance(count, note):
                self.left -= count
                if self.left <= 0:
                    raise Interrupted

            yield advance

        return bar()


def everything(folder):
    """What must be the same bits: metrics, artifact, and the last checkpoint's tensors."""
    last = max((folder / "checkpoints").iterdir())
    files = folder / "metrics.jsonl", folder / "artifact" / "learner.safetensors", last / checkpoints.TENSORS
    return [file.read_bytes() for file in files]


@pytest.fixture
def longer(small):
    outer = OuterConfig(steps=12, meta_batch=2, validate_every=5, checkpoint_every=3)
    return dataclasses.replace(small, outer=outer)


@pytest.mark.parametrize("killed_after", [1, 3, 4, 5, 11])
def test_a_killed_run_resumes_to_the_same_bits(longer, tmp_path, killed_after):
    whole = run(longer, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        runs.run(dataclasses.replace(longer, out=tmp_path / "cut"), name="x", reporter=KillAfter(killed_after))
    (tmp_path / "cut" / ".results.json.1.part").write_text("left half-written")
    resumed = runs.resume(tmp_path / "cut", reporter=QUIET)
    assert everything(tmp_path / "whole") == everything(tmp_path / "cut")
    assert resumed["curve"] == whole["curve"]
    assert resumed["name"] == "x" or killed_after < 3
    for results in (whole, resumed):
        training_ = results["training"]
        assert results["seconds"] > 0.99 * (training_["seconds"] + training_["compile_seconds"])
    assert not list((tmp_path / "cut").glob(".*"))
    with pytest.raises(ConfigError, match="this run is finished"):
        runs.resume(tmp_path / "cut", reporter=QUIET)


def test_a_damaged_checkpoint_costs_its_steps_only(longer, tmp_path, capsys):
    run(longer, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        runs.run(dataclasses.replace(longer, out=tmp_path / "cut"), name="x", reporter=KillAfter(10))
    last = max((tmp_path / "cut" / "checkpoints").iterdir())
    (last / checkpoints.TENSORS).write_bytes(b"")
    runs.resume(tmp_path / "cut", reporter=progress.ConsoleReporter())
    assert f"{last.name} is passed over" in capsys.readouterr().err
    assert everything(tmp_path / "whole") == everything(tmp_path / "cut")


def test_resume_refuses_changes_that_matter_and_takes_the_others(longer, tmp_path):
    with pytest.raises(Interrupted):
        runs.run(dataclasses.replace(longer, out=tmp_path / "cut"), name="x", reporter=KillAfter(4))
    stored = dataclasses.replace(longer, out=tmp_path / "cut")
    for changed, field in (
        (dataclasses.replace(stored, seed=3), "seed"),
        (dataclasses.replace(stored, outer=dataclasses.replace(stored.outer, meta_batch=4)), "outer.meta_batch"),
        (dataclasses.replace(stored, model=ModelConfig(widths=(8,))), "model.widths"),
    ):
        with pytest.raises(ConfigError, match=rf"^{field}: expected .* as in .*; leave it out"):
            runs.resume(tmp_path / "cut", changed, reporter=QUIET)
    more = dataclasses.replace(stored.evaluation, episodes=9, steps=7)
    results = runs.resume(tmp_path / "cut", dataclasses.replace(stored, evaluation=more), reporter=QUIET)
    assert len(results["curve"]) == 8
    assert config_files.read_config(tmp_path / "cut").evaluation == more  # what another resume or evaluate goes by
    with pytest.raises(ConfigError, match="expected a run folder with config.json"):
        runs.resume(tmp_path / "nowhere", reporter=QUIET)


def test_resume_refuses_other_data(longer, blobs_npz, tmp_path):
    with pytest.raises(Interrupted):
        runs.run(dataclasses.replace(longer, out=tmp_path / "cut"), name="x", reporter=KillAfter(4))
    with np.load(blobs_npz) as arrays:
        changed = dict(arrays) | {"images": arrays["images"][::-1]}
    np.savez(blobs_npz, **changed)
    with pytest.raises(ConfigError, match=r"data: expected the data that .*cut was begun with \(sha256 "):
        runs.resume(tmp_path / "cut", reporter=QUIET)


@pytest.mark.parametrize("moved", ["elsewhere", "together", "data alone"])
def test_a_run_knows_its_data_by_its_content(moved, small, longer, blobs_npz, tmp_path, monkeypatch, few_rates):
    """From another working directory, moved together with its data, or with the data said to be elsewhere."""
    place = tmp_path / "place"
    (place / "inside").mkdir(parents=True)
    shutil.copy(blobs_npz, place / "blobs.npz")
    monkeypatch.chdir(place)
    config = dataclasses.replace(longer, data="blobs.npz", out=Path("inside/cut"))
    with pytest.raises(Interrupted):
        runs.run(config, name="x", reporter=KillAfter(4))
    if moved == "together":
        place = place.rename(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    blobs_npz.unlink()
    folder, given = place / "inside" / "cut", None
    if moved == "data alone":
        (place / "blobs.npz").rename(tmp_path / "new.npz")
        with pytest.raises(DataError, match=r"begun with \(sha256 .*\), found none; say where they are with --data"):
            runs.resume(folder, reporter=QUIET)
        given = dataclasses.replace(config_files.read_config(folder), data=str(tmp_path / "new.npz"))
    results = runs.resume(folder, given, reporter=QUIET)
    cli.main(["evaluate", str(folder), "--json"])
    comparison = dataclasses.replace(CompareConfig(), tasks=2, searched=0, lengths=(1.0,), tuning_tasks=2, rivals=())
    found = comparing.run([folder], dataclasses.replace(comparison, out=tmp_path / "c"), reporter=QUIET)
    assert found["data_sha256"] == results["data"]["sha256"]


def test_data_of_other_content_is_refused_wherever_a_run_is_taken_up(small, blobs_npz, tmp_path, capsys):
    run(small, out=tmp_path / "run")
    with np.load(blobs_npz) as arrays:
        np.savez(tmp_path / "other.npz", **(dict(arrays) | {"images": arrays["images"][::-1]}))
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "other.npz")])
    assert "found others" in capsys.readouterr().err


def test_a_warm_start_takes_init_and_rates(small, tmp_path):
    first = run(small, out=tmp_path / "first")
    before = metalr.load(tmp_path / "first" / "artifact")
    config = dataclasses.replace(small, init=tmp_path / "first", outer=dataclasses.replace(small.outer, steps=1))
    parts = set_up(config)
    warm = meta_training.warm_start(config, parts)
    jax.tree.map(np.testing.assert_array_equal, before.init, warm.meta.init)
    actual = rates.actual(parts.spec, warm.meta.rates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), before.rates, actual)
    second = run(config, out=tmp_path / "second")
    assert second["training"]["warm_start"]["takes"] == "init and rates"
    one, both = first["training"], second["training"]
    outer = (
        both["example_gradients"] - both["validation_example_gradients"] - one["example_gradients"]
    )  # is charged too
    assert outer == (one["example_gradients"] - one["validation_example_gradients"]) / small.outer.steps
    # A pre-trained init has no learned rates: the init alone is taken, whatever the rates are to be.
    run(dataclasses.replace(small, inner=InnerConfig(algorithm="joint", steps=2)), out=tmp_path / "joint")
    third = run(dataclasses.replace(config, init=tmp_path / "joint" / "artifact"), out=tmp_path / "third")
    assert third["training"]["warm_start"]["takes"] == "init"
    adam = dataclasses.replace(config, inner=dataclasses.replace(config.inner, base="adam"))
    with pytest.raises(ConfigError, match=r"init: .*: its rates are of another kind: expected base 'adam' as .* 'sgd'"):
        run(adam, out=tmp_path / "wrong")
    with pytest.raises(ConfigError, match=r"init: .*: its init do not fit these settings: expected dense_0/bias"):
        run(dataclasses.replace(config, model=ModelConfig(widths=(8,))), out=tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_what_it_started_from_is_kept_if_nothing_is_better(small, tmp_path):
    """Where the init has seen its training tasks, more meta-training may make it worse on new ones."""
    more = dataclasses.replace(small, evaluation=EvaluationConfig(episodes=6, validation_episodes=40, shown_tasks=0))
    first = run(more, out=tmp_path / "first", outer=OuterConfig(steps=60, meta_batch=2))
    ruined = OuterConfig(steps=3, meta_batch=2, init_rate=1.0, validate_every=1)
    second = run(more, init=tmp_path / "first", out=tmp_path / "second", outer=ruined)["training"]
    assert [step for step, *_ in second["validations"]] == [0, 1, 2, 3]
    assert second["best_step"] == 0
    start, what_to_do = tables.advice(json.loads((tmp_path / "second" / "results.json").read_text()))
    assert "No outer step was better on meta-validation tasks than what it started from" in start
    assert "--outer.learns rates_of_init --outer.part validation --outer.calibrate" in what_to_do
    assert second["validation_accuracy"] == first["training"]["validation_accuracy"]
    start, kept = (metalr.load(tmp_path / name) for name in ("first", "second"))
    jax.tree.map(np.testing.assert_array_equal, start.init, kept.init)


def test_rates_are_learned_for_an_init_that_stays_as_it_is(small, tmp_path):
    """On meta-validation tasks: the init has seen those of meta-training."""
    run(small, inner=InnerConfig("joint", 2), out=tmp_path / "joint")
    outer = OuterConfig(steps=4, meta_batch=2, learns="rates_of_init", part="validation", calibrate=True)
    config = dataclasses.replace(small, init=tmp_path / "joint", outer=outer)
    start, given = metalr.load(tmp_path / "joint"), data.load(small.data)
    parts = set_up(config, given=given)
    assert parts.parts.train is parts.parts.validation
    warm = meta_training.warm_start(config, parts)
    begun = jax.tree.map(np.array, warm.meta.rates)  # what is trained is donated
    folder = tmp_path / "state"
    folder.mkdir()
    meta_training.meta_train(config, parts, folder, QUIET, warm=warm)
    state = meta_training._begun(config, parts, folder, QUIET, "", None, meta_training.mesh_of(config))[0].state
    assert int(state.step) == 4
    jax.tree.map(np.testing.assert_array_equal, start.init, state.meta.init)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), begun, state.meta.rates)
    assert min(jax.tree.leaves(moved)) > 1e-4
    run(config, out=tmp_path / "run")
    learned = metalr.load(tmp_path / "run")
    assert not learned.rates_alone
    jax.tree.map(np.testing.assert_array_equal, start.init, learned.init)
    with pytest.raises(ConfigError, match="expected rates that were learned alone with outer.learns rates"):
        run(dataclasses.replace(config, outer=OuterConfig(learns="rates")), out=tmp_path / "no")


def test_a_warm_started_run_resumes_without_what_it_started_from(small, tmp_path):
    run(small, out=tmp_path / "first")
    longer = dataclasses.replace(small, init=tmp_path / "first", outer=dataclasses.replace(small.outer, steps=6))
    whole = run(longer, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        runs.run(dataclasses.replace(longer, out=tmp_path / "cut"), name="x", reporter=KillAfter(1))
    shutil.rmtree(tmp_path / "first")
    resumed = runs.resume(tmp_path / "cut", reporter=QUIET)
    assert resumed["training"]["warm_start"] == whole["training"]["warm_start"]
    assert everything(tmp_path / "whole") == everything(tmp_path / "cut")


def test_times_are_what_was_done(small, tmp_path):
    training = run(small, out=tmp_path / "x")["training"]
    done = small.outer.steps * small.outer.meta_batch / (training["seconds"] + training["compile_seconds"])
    assert training["tasks_per_second_in_all"] == pytest.approx(done, rel=0.01, abs=0.06)
    assert training["tasks_per_second"] > training["tasks_per_second_in_all"]


def test_a_curve_that_ends_before_the_trained_steps_is_refused_at_once(small, tmp_path):
    evaluation = dataclasses.replace(small.evaluation, steps=1)
    with pytest.raises(ConfigError, match=r"evaluation.steps: expected at least inner.steps \(2\)"):
        run(small, evaluation=evaluation, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_wish_to_stop_is_heard_at_the_next_step(longer, tmp_path):
    run(longer, out=tmp_path / "whole")
    folder = tmp_path / "cut"
    folder.mkdir()
    setup, asked = set_up(longer), iter([False, False, True, True])
    with pytest.raises(StoppedError, match=r"stopped after 1 of 12 outer steps, and saved; go on with: .*--resume"):
        meta_training.meta_train(longer, setup, folder, QUIET, lambda: next(asked), name="x")
    with pytest.raises(StoppedError, match="stopped after 1 of 12"):
        meta_training.meta_train(longer, setup, folder, QUIET, lambda: True)
    spaced = str(meta_training.stopped(tmp_path / "my run", "here", longer))
    assert spaced.endswith(f"metalr train --resume '{tmp_path / 'my run'}'")
    (folder / "config.json").write_text(json.dumps(longer.to_json()))
    assert runs.resume(folder, reporter=QUIET)["name"] == "x"
    assert everything(tmp_path / "whole") == everything(folder)


def test_the_grid_goes_on_where_it_was_stopped(small, tmp_path, monkeypatch):
    grid = GridConfig(run=True, learning_rates=(0.1, 0.2), steps=(1, 2), batch_sizes=(5,))
    config = dataclasses.replace(small, grid=grid)
    whole = run(config, out=tmp_path / "whole")
    real = training._kept_cells

    def stopping(*given):
        known, keep = real(*given)
        left = iter(range(3))

        def once(cells):
            keep(cells)
            if next(left) == 2:
                raise Interrupted

        return known, once

    monkeypatch.setattr(training, "_kept_cells", stopping)
    for _ in range(2):
        with pytest.raises(Interrupted):
            runs.resume(tmp_path / "cut", reporter=QUIET) if (tmp_path / "cut").exists() else run(
                config, out=tmp_path / "cut"
            )
    with (tmp_path / "cut" / "grid.jsonl").open("a") as log:
        log.write('{"init": "rando')  # a line that a kill cut off
    monkeypatch.undo()
    resumed = runs.resume(tmp_path / "cut", reporter=QUIET)
    assert resumed["grid"]["cells"] == whole["grid"]["cells"]
    lines = [json.loads(line) for line in (tmp_path / "cut" / "grid.jsonl").read_text().splitlines() if line[-1] == "}"]
    keys = [tuple(line[k] for k in ("init", "optimizer", "learning_rate", "batch_size", "steps")) for line in lines]
    assert len(keys) == len(set(keys)) == len(whole["grid"]["cells"])


def poisoned(setup, chance):
    """The same setup with a training sampler that now and then gives an episode of NaNs."""
    pool, sample = setup.parts.train

    def sampler(pool, key):
        import jax

        bad = jax.random.bernoulli(jax.random.fold_in(key, 9), chance)
        episode = sample(pool, key)
        return episode._replace(support_x=jnp.where(bad, jnp.nan, episode.support_x))

    return setup._replace(parts=setup.parts._replace(train=tasks.Part(pool, sampler)))


def test_divergence_stops_with_step_task_and_rates_and_saves_the_last_finite_state(longer, tmp_path):
    setup = poisoned(set_up(longer), 0.2)
    message = r"outer step (\d+): loss nan.*\(tasks \[\d.*\] of 2; rates {.*\); lower outer.init_rate"
    with pytest.raises(loop.DivergedError, match=message) as caught:
        meta_training.meta_train(longer, setup, tmp_path, QUIET)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in line] == list(range(caught.value.step))
    state = caught.value.state
    like = {"state": state, "best": loop.learned(setup.spec, state.meta)}
    tree, _ = checkpoints.load(tmp_path / "checkpoints", like, print)
    assert int(tree["state"].step) == caught.value.step


def test_skipping_leaves_out_the_update_and_logs_it(longer, tmp_path):
    config = dataclasses.replace(longer, outer=dataclasses.replace(longer.outer, on_divergence="skip"))
    setup = poisoned(set_up(config), 0.2)
    init, rates, facts = meta_training.meta_train(config, setup, tmp_path, QUIET)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(12))
    skipped = [line for line in steps if line.get("skipped")]
    assert 0 < len(skipped) == facts["skipped_updates"] < 12
    assert all(line["loss"] is None for line in skipped)
    assert all(np.isfinite(v).all() for v in (*map(np.asarray, rates.values()), np.asarray(init["head"]["bias"])))
    (tmp_path / "b").mkdir()
    everything_bad = dataclasses.replace(config, outer=dataclasses.replace(config.outer, steps=60))
    with pytest.raises(loop.DivergedError, match="outer step 49"):
        meta_training.meta_train(everything_bad, poisoned(set_up(everything_bad), 1.0), tmp_path / "b", QUIET)


@pytest.mark.smoke
def test_sigterm_saves_and_exits_with_75(longer, blobs_npz, tmp_path):
    outer = ["--outer.steps", "100000", "--outer.meta-batch", "2", "--model.widths", "16", "--evaluation.episodes", "4"]
    tasks = ["--data", str(blobs_npz), "--tasks.family", "permuted", "--tasks.way", "10", "--tasks.query", "3"]
    call = [sys.executable, "-m", "metalr.cli", "train", *tasks, *outer, "--out", str(tmp_path / "run")]
    with subprocess.Popen(call, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        metrics, began = tmp_path / "run" / "metrics.jsonl", time.monotonic()
        while not metrics.exists() and time.monotonic() - began < 120:
            time.sleep(0.05)
        second = subprocess.run(call, capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert f"in use by the run with pid {process.pid}" in second.stderr
        process.send_signal(signal.SIGTERM)
        errors = process.stderr.read()
    assert process.returncode == 75, errors
    assert "go on with: metalr train --resume" in errors
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert not (tmp_path / "run" / "lock").exists()


class Own(nn.Module):
    """A user's network."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10, name="last")(jnp.tanh(nn.Dense(4, name="body")(x.reshape(len(x), -1))))


def test_a_network_of_your_own_from_training_to_comparison(small, tmp_path, few_rates):
    model = models.from_linen(Own(), np.zeros((1, 8, 8, 1), np.float32), head="last")
    quiet = progress.ConsoleReporter(quiet=True)
    folder = tmp_path / "own"
    results = runs.run(dataclasses.replace(small, out=folder), name="x", model=model, reporter=quiet)
    assert results["config"]["model"]["name"] == "custom"
    assert sorted(metalr.load(folder / "artifact", model).init) == ["body", "last"]
    anil = dataclasses.replace(small, inner=dataclasses.replace(small.inner, algorithm="anil"))
    runs.run(dataclasses.replace(anil, out=tmp_path / "anil"), name="x", model=model, reporter=quiet)
    adapted = metalr.load(tmp_path / "anil" / "artifact", model).spec
    assert (adapted.head, adapted.adapts) == ("last", "head")

    (folder / "results.json").unlink()  # as if it had been killed before its end
    with pytest.raises(ConfigError, match="a network of your own; expected it as model=..., got None"):
        runs.resume(folder, reporter=quiet)
    with pytest.raises(ConfigError, match="model.name: expected 'custom' as in .*, got 'mlp'"):
        runs.resume(folder, model=models.mlp(10, (8, 8, 1)), reporter=quiet)
    given = dataclasses.replace(small, out=folder)
    assert runs.resume(folder, given, model=model, reporter=quiet)["curve"] == results["curve"]

    compared = comparing.run(
        [folder],
        CompareConfig(tasks=2, searched=0, lengths=(1,), tuning_tasks=2, rivals=()),
        model=model,
        reporter=quiet,
    )
    assert compared["rows"][0]["method"] == "learned init + learned rates"
    space = SpaceConfig(learning_rates=(1e-2,), epochs=(1,), batch_sizes=(32,))
    found = searching.run(SearchConfig(data=small.data, space=space), model=model, reporter=quiet)
    assert found["trials"] == 1
    with pytest.raises(ConfigError, match=r"model: expected 10 outputs for images of shape \[8, 8, 1\], got 10 for"):
        set_up(small, models.mlp(10))
    built = models.mlp(10, (8, 8, 1), widths=(5, 3), dropout=0.1)
    assert ModelConfig.of(built) == ModelConfig(widths=(5, 3), dropout=0.1)


def test_tasks_of_several_sizes(small, tmp_path):
    """Validation is the mean over the sizes, results are of the one that is asked for."""
    config = dataclasses.replace(small, tasks=dataclasses.replace(small.tasks, shots=(1, 4)), out=tmp_path / "sizes")
    results = run(config)
    setup = set_up(config)
    learned = metalr.load(tmp_path / "sizes")
    keys = protocol.episode_keys(config.evaluation.seed, config.evaluation.validation_episodes)
    scores = []
    for shot in (1, 4):
        _, sample = tasks.make_sampler(tasks.make_splits(data.load(config.data), "permuted").val, 10, shot, 3)
        steps = config.inner.steps
        of = protocol.make_evaluator(setup.model, setup.spec, sample, steps, of_steps=steps, at=[steps])
        scores.append(of(setup.parts.validation[0], learned.init, learned.rates, keys).mean[-1])
    assert results["training"]["validation_accuracy"] == pytest.approx(float(np.mean(scores)), abs=1e-5)
    assert config.tasks.shot == 2
    assert setup.support == 20


def test_rates_learn_how_they_go_with_the_size_of_tasks(small, tmp_path):
    sizes = dataclasses.replace(small.tasks, shots=(1, 4))
    inner = dataclasses.replace(small.inner, support_power=0.1)
    run(small, tasks=sizes, inner=inner, out=tmp_path / "sizes")
    learned = metalr.load(tmp_path / "sizes")
    assert learned.spec.support == 20
    powers = [float(v) for name, v in learned.rates.items() if name.startswith("support_power")]
    assert len(powers) == 2
    assert all(power != pytest.approx(0.1, abs=1e-6) for power in powers)  # it was moved
    rng = np.random.default_rng(0)
    x, y = rng.random((10, 8, 8, 1), np.float32), np.arange(10)
    params, tx = learned.init, learned.as_optax(support=10)
    state = tx.init(params)
    for _ in range(2):
        grads = jax.grad(lambda p: inner_objective(learned.model.apply(p, x), y))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), learned.adapt(x, y, 2), params)


def inner_objective(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def test_seeds_together_are_what_each_is_alone(small, tmp_path):
    small = dataclasses.replace(small, outer=dataclasses.replace(small.outer, validate_every=2))
    quiet = progress.ConsoleReporter(quiet=True)
    configs = [dataclasses.replace(small, seed=seed, out=tmp_path / f"together{seed}") for seed in (3, 7)]
    together = training.run_together(configs, name="x", reporter=quiet)
    for config, results in zip(configs, together, strict=True):
        alone = run(config, out=tmp_path / f"alone{config.seed}")
        assert results["curve"] == alone["curve"]
        assert results["config"]["seed"] == config.seed
        assert [v[:2] for v in results["training"]["validations"]] == [v[:2] for v in alone["training"]["validations"]]
        lines = [
            [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
            for folder in (results["folder"], alone["folder"])
        ]
        assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
        assert [line.get("loss") for line in lines[0]] == pytest.approx(
            [line.get("loss") for line in lines[1]], abs=1e-5
        )
    assert together[0]["curve"] != together[1]["curve"]
    assert (tmp_path / "together7" / "artifact" / "metalr.json").is_file()


def test_seeds_together_that_are_cut_off_go_on_alone(small, tmp_path, monkeypatch):
    """Asked to stop, all are saved; a checkpoint of one of them is an ordinary one."""
    small = dataclasses.replace(small, outer=dataclasses.replace(small.outer, validate_every=2))
    quiet = progress.ConsoleReporter(quiet=True)
    configs = [dataclasses.replace(small, seed=seed, out=tmp_path / f"s{seed}") for seed in (3, 7)]
    asked = iter([False, False, True])
    monkeypatch.setattr(training.preemption, "watch", lambda: contextlib.nullcontext(lambda: next(asked, True)))
    with pytest.raises(StoppedError, match="stopped after 1 of 4 outer steps"):
        training.run_together(configs, name="x", reporter=quiet)
    monkeypatch.undo()
    for config in configs:
        resumed = runs.resume(config.out, reporter=quiet)
        alone = run(config, out=tmp_path / f"alone{config.seed}")
        assert resumed["curve"] == alone["curve"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "seed: expected different values"),
        ({"outer": OuterConfig(steps=5, meta_batch=2)}, "outer.steps: expected the same for all seeds"),
        ({"both": {"tasks": {"shots": (1, 2)}}}, "seeds: expected settings .* all alike .* 2 sizes of tasks"),
        ({"both": {"inner": {"horizons": (1, 2)}}}, "seeds: expected settings whose outer steps are all alike"),
    ],
)
def test_what_cannot_run_together_is_refused(small, tmp_path, changes, message):
    changes = dict(changes)
    for part, values in changes.pop("both", {}).items():
        small = dataclasses.replace(small, **{part: dataclasses.replace(getattr(small, part), **values)})
    one = dataclasses.replace(small, seed=3, out=tmp_path / "a")
    other = dataclasses.replace(small, **{"seed": 4, "out": tmp_path / "b"} | changes)
    with pytest.raises(ConfigError, match=message):
        training.run_together([one, other], name="x")
    assert not (tmp_path / "a").exists()


def test_together_nothing_is_written_where_one_folder_is_taken(small, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("years")
    configs = [dataclasses.replace(small, seed=seed, out=tmp_path / name) for seed, name in ((3, "a"), (4, "b"))]
    with pytest.raises(ConfigError, match="b: "):
        training.run_together(configs, name="x")
    assert not (tmp_path / "a").exists()


def test_one_seed_that_diverges_ends_all_and_says_which_step(small, tmp_path, monkeypatch):
    config = dataclasses.replace(small, outer=dataclasses.replace(small.outer, steps=6))
    setup = poisoned(set_up(config), 0.3)
    monkeypatch.setattr(training, "set_up", lambda _: setup)
    configs = [dataclasses.replace(config, seed=seed, out=tmp_path / f"s{seed}") for seed in (0, 1)]
    with pytest.raises(loop.DivergedError, match="one of 2 seeds; all were saved"):
        training.run_together(configs, name="x", reporter=progress.ConsoleReporter(quiet=True))
    assert all(any((tmp_path / f"s{seed}" / "checkpoints").glob("step_*")) for seed in (0, 1))


def test_a_seed_beside_one_that_diverged_goes_on_as_if_alone(small, tmp_path, monkeypatch):
    """It was saved at the end of a dispatch, where a validation was due that it had not had."""
    small = dataclasses.replace(small, outer=dataclasses.replace(small.outer, validate_every=2))
    make_chunk = loop.make_chunk

    def failing(*given, **options):
        chunk = make_chunk(*given, **options)

        def last_step_of_the_second_is_not_finite(state, pool, key, count):
            new, metrics = chunk(state, pool, key, count)
            if int(new.step[0]) == small.outer.steps and count:
                new = new._replace(step=new.step.at[1].add(-1))
            return new, metrics

        return last_step_of_the_second_is_not_finite

    monkeypatch.setattr(loop, "make_chunk", failing)
    configs = [dataclasses.replace(small, seed=seed, out=tmp_path / f"s{seed}") for seed in (3, 7)]
    with pytest.raises(loop.DivergedError, match="one of 2 seeds"):
        training.run_together(configs, name="x", reporter=QUIET)
    monkeypatch.undo()
    resumed, alone = runs.resume(tmp_path / "s3", reporter=QUIET), run(small, seed=3, out=tmp_path / "alone")
    of_both = [[v[:2] for v in results["training"]["validations"]] for results in (resumed, alone)]
    assert of_both[0] == of_both[1]
    assert [step for step, _ in of_both[0]] == [2, 4]
    assert resumed["curve"] == alone["curve"]


def test_seeds_together_cannot_share_a_logger_of_one_run_a_process(small, tmp_path):
    configs = [dataclasses.replace(small, seed=seed, out=tmp_path / f"s{seed}", loggers=("mlflow",)) for seed in (3, 7)]
    with pytest.raises(ConfigError, match=r"loggers: expected none of .* with seeds that run together.*got \['mlflow"):
        training.run_together(configs, name="x", reporter=QUIET)
    assert not (tmp_path / "s3").exists()


def test_what_a_run_starts_from_has_the_same_columns(small):
    """Shapes alone do not tell them apart."""
    of_run = {"features": ["a", "b"], "targets": ["y"], "table": {"classes": ["no", "yes"], "task_column": "shop"}}
    same = of_run | {"table": {"classes": ["no", "yes"], "task_column": "store"}}
    meta_training._check_same_columns(small, of_run, same)
    meta_training._check_same_columns(small, {}, of_run)
    for changed, message in (
        ({"features": ["b", "a"]}, r"expected features \['b', 'a'\], in this order, .* got \['a', 'b'\]"),
        ({"targets": ["z"]}, "expected targets"),
        ({"table": {"classes": ["yes", "no"]}}, "expected classes"),
    ):
        with pytest.raises(ConfigError, match=message):
            meta_training._check_same_columns(small, of_run, of_run | changed)
