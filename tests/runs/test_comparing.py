"""Comparing finished runs with their rivals, end to end on small data."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest

from metalr import cli, data, models, report, runs
from metalr.comparison import rivals
from metalr.config import (
    CompareConfig,
    EvaluationConfig,
    InnerConfig,
    ModelConfig,
    OuterConfig,
    SpaceConfig,
    TaskConfig,
    TrainConfig,
)
from metalr.errors import ConfigError
from metalr.evaluation import protocol
from metalr.inner import CROSS_ENTROPY, OBJECTIVES
from metalr.runs import comparing
from metalr.runs.progress import ConsoleReporter
from metalr.search import trials
from metalr.tasks import Tasks

QUIET = ConsoleReporter(quiet=True)


@pytest.fixture(scope="module")
def trained(blobs, tmp_path_factory):
    """Two seeds of a run, and a jointly pre-trained init, with Adam inside."""
    root = tmp_path_factory.mktemp("trained")
    arrays = {part: getattr(blobs, part) for part in data.PARTS}
    np.savez(root / "blobs.npz", images=arrays.pop("train_images"), labels=arrays.pop("train_labels"), **arrays)
    config = TrainConfig(
        data=str(root / "blobs.npz"),
        tasks=TaskConfig(family="permuted", way=10, shot=4, query=3),
        model=ModelConfig(widths=(8,)),
        inner=InnerConfig(steps=4, base="adam", rate=1e-2, batch_size=8, knots=2),
        outer=OuterConfig(steps=3, meta_batch=2),
        evaluation=EvaluationConfig(episodes=4, validation_episodes=2, steps=4, shown_tasks=0),
    )
    variants = {"a": {}, "b": {"seed": 1}, "joint": {"inner": InnerConfig(algorithm="joint", steps=4)}}
    for name, changes in variants.items():
        runs.run(dataclasses.replace(config, out=root / name, **changes), name="x", reporter=QUIET)
    return [root / name for name in variants]


CONFIG = CompareConfig(
    rivals=("cocob",),
    shot=5, query=3, tasks=4, searched=2, lengths=(1.0, 2.0), batch_size=8, tuning_tasks=2, budgets=(1.0, 3.0),
    space=SpaceConfig(learning_rates=(1e-3, 1e-1), epochs=(1, 2), batch_sizes=(8,)),
)  # fmt: skip


def test_all_methods_meet_the_same_tasks(trained, tmp_path, few_rates):
    *seeds, joint = trained
    config = dataclasses.replace(CONFIG, out=tmp_path / "compared")
    results = comparing.run(seeds, config, pretrained=[joint], reporter=QUIET)
    methods = {row["method"] for row in results["rows"]}
    assert methods >= {
        "learned init + learned rates",
        "random init + learned rates",
        "learned init, no search (Adam 0.001)",
        "learned init + one tuned rate",
        "random init, no search (Adam 0.001)",
        "pre-trained init, no search (Adam 0.001)",
        "random init + grid, 4 cells",
        "pre-trained init + grid, 4 cells",
        "random init + grid, 4 cells, trained again on all",
        "random init + random, cost of 3 cells",
        "random init + tpe, cost of 1 cells",
        "random init + asha, cost of 3 cells, trained again on all",
        "random init + tpe, learned rates first, cost of 1 cells",
        "pre-trained init + one tuned rate",
        "random init + one tuned rate",
    }
    first, second = results["rows"][:2]
    assert (first["steps"], second["steps"]) == (6, 12)  # epochs of 50 // 8 steps
    assert first["example_gradients"] == 48
    assert len(first["accuracy_of_seeds"]) == 2
    assert np.mean(first["accuracy_of_seeds"]) == pytest.approx(first["accuracy"], abs=1e-6)
    assert first["learned_minus_this_at_equal_cost"] == [0.0, 0.0]
    grid = next(row for row in results["rows"] if row["method"] == "random init + grid, 4 cells")
    assert grid["tasks"] == 2
    assert grid["naive_example_gradients"] == 2 * (1 + 2) * 40  # 20 % of each class validates
    assert grid["example_gradients"] == 2 * 2 * 40  # epochs are snapshots
    assert grid["paid_once_example_gradients"] == 0 < first["paid_once_example_gradients"]
    ends = results["conclusions"]
    assert len(ends) == len(results["rows"]) - 2
    assert all(end["learned_reaches_it_with"] is None or end["share_of_its_cost"] > 0 for end in ends)
    text = report.contest_text(results)
    assert "random init + grid, 4 cells" in text
    assert "permuted, few-shot: 4 held-out tasks, 2 of them searched" in text
    assert results["label_noise"] == 0.0
    assert len((config.out / "searches.jsonl").read_text().splitlines()) == 2 * 6


def test_a_comparison_that_was_killed_goes_on(trained, tmp_path, few_rates):
    config = dataclasses.replace(CONFIG, rivals=(), searchers=("grid", "random", "tpe+"), out=tmp_path / "compared")
    results = comparing.run(trained[:1], config, pretrained=trained[2:], reporter=QUIET)
    kept = (config.out / "searches.jsonl").read_text().splitlines()
    assert len(kept) == 2 * 4
    (config.out / "results.json").unlink()
    (config.out / "searches.jsonl").write_text("\n".join(kept[:5]) + '\n{"init": "ran')  # killed in a line
    again = comparing.resume(config.out, reporter=QUIET)
    same = [{k: v for k, v in row.items() if "seconds" not in k} for row in results["rows"]]
    assert [{k: v for k, v in row.items() if "seconds" not in k} for row in again["rows"]] == same
    with pytest.raises(ConfigError, match="this comparison is finished"):
        comparing.resume(config.out, reporter=QUIET)


def test_tasks_of_another_family(trained, capsys, few_rates):
    run = trained[0]
    cli.main(
        ["compare", str(run), "--tasks", "3", "--searched", "0", "--lengths", "0.4", "1", "--tuning-tasks",
         "2", "--early-stopping", "--data", json.loads((run / "config.json").read_text())["data"],
         "--family", "rotated",
         "--label-noise", "0.3", "--rivals", "cocob", "--json"]
    )  # fmt: skip
    other = json.loads(capsys.readouterr().out)
    assert (other["family"], other["label_noise"]) == ("rotated", 0.3)
    assert other["trained_on"]["family"] == "permuted"
    lengths = sorted({row["steps"] for row in other["rows"]})
    assert len(lengths) == 2
    for row in other["rows"]:
        early = "learned rates" in row["method"] or "tuned" in row["method"]
        assert ("steps" in row["chosen"]) == early
        steps = row["chosen"]["steps"] if early else row["steps"]
        assert steps in lengths
        assert row["example_gradients"] == steps * 8  # the run's own minibatch
        assert steps <= row["steps"]
    learned, tuned = (
        [row for row in other["rows"] if row["method"] == f"learned init + {what}"]
        for what in ("learned rates", "one tuned rate")
    )
    for ours, theirs in zip(learned, tuned, strict=True):  # beside what may take as many steps
        difference = ours["accuracy"] - theirs["accuracy"]
        assert theirs["learned_minus_this_at_equal_cost"][0] == pytest.approx(difference, abs=2e-6)


def test_label_noise_makes_training_parts_of_different_sizes(trained, tmp_path, few_rates):
    """Classes differ in size then, and so does what a task's search trains on: all of it means all of each."""
    space = SpaceConfig(learning_rates=(1e-2,), epochs=(1, 2), batch_sizes=(999,))
    config = dataclasses.replace(
        CONFIG,
        rivals=(),
        label_noise=0.6,
        space=space,
        searched=2,
        searchers=("grid", "tpe+"),
        seed=2,
        out=tmp_path / "noisy",
    )
    comparing.run(trained[:1], config, reporter=QUIET)
    rows = [json.loads(line) for line in (config.out / "searches.jsonl").read_text().splitlines()]
    sizes = {row["trials"][0]["batch_size"] for row in rows}
    assert len(sizes) > 1
    assert max(sizes) < 50
    for row in rows:  # the winner was trained again on all 50
        assert row["again_example_gradients"] in (50, 100)


def test_learned_rates_on_another_network(trained, tmp_path, few_rates, capsys):
    config = dataclasses.replace(CONFIG, widths=(12,), fan_in=1.0, searched=0, rivals=(), out=tmp_path / "wide")
    results = comparing.run(trained[:2], config, reporter=QUIET)
    methods = {row["method"] for row in results["rows"]}
    assert methods == {
        "random init + learned rates", "random init, no search (Adam 0.001)", "random init + one tuned rate"
    }  # fmt: skip
    rates = comparing.load_runs(trained[:2], comparing.Own())[0][0]
    wide = rates.for_network(models.mlp(10, (8, 8, 1), widths=(12,)), fan_in=1.0)
    assert wide.rates["head/kernel"] == pytest.approx(np.asarray(rates.rates["head"]) * 8 / 12, rel=1e-6)
    assert "an mlp of 12" in report.contest_text(results)
    again = {"widths": (12, 12)}, {"fan_in": 1.0}
    for changes, message in zip(
        again, ("widths: expected one hidden layer", "fan_in: expected 0 without"), strict=True
    ):
        with pytest.raises(ConfigError, match=message):
            comparing.run(trained[:2], dataclasses.replace(CONFIG, out=tmp_path / "x", **changes), reporter=QUIET)
    with pytest.raises(ConfigError, match="pretrained: expected none with --widths"):
        comparing.run(
            trained[:2], dataclasses.replace(config, out=tmp_path / "x"), pretrained=trained[2:], reporter=QUIET
        )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("setting", "value", "same"),
    [("outer.init_rate", 0.5, False), ("outer.learns", "init", False), ("mesh.tasks", 1, True), ("seed", 7, True),
     ("outer.checkpoint_every", 3, True), ("evaluation.seed", 9, True)],
)  # fmt: skip
def test_runs_of_one_comparison_differ_in_their_seed_alone(trained, tmp_path, setting, value, same):
    other = tmp_path / "other"
    shutil.copytree(trained[0], other)
    config = json.loads((other / "config.json").read_text())
    at, *name = setting.split(".")
    config["seed"] = 7
    config[at] = config[at] | {name[0]: value} if name else value
    (other / "config.json").write_text(json.dumps(config))
    if same:
        assert len(comparing.load_runs([trained[0], other], comparing.Own())[0]) == 2
        return
    with pytest.raises(ConfigError, match=f"differ in their seed only, .* also in .*{setting}"):
        comparing.load_runs([trained[0], other], comparing.Own())


def test_a_conclusion_counts_the_steps_that_were_allowed():
    """With early stopping the learned method may have taken fewer: what may take as many is no dearer."""

    def row(method, steps, stopped, accuracy, less):
        return {
            "method": method, "steps": steps, "accuracy": accuracy, "ci95": 0.01, "example_gradients": 10 * stopped,
            "chosen": {"steps": stopped}, "learned_minus_this_at_the_end": [less, 0.01],
        }  # fmt: skip

    learned = [row("learned init + learned rates", n, 1, 0.8, 0.0) for n in (1, 50)]
    rivals_ = [row("pre-trained init + one tuned rate", 50, 20, 0.9, -0.1), row("random", 1, 1, 0.3, 0.5)]
    results = {
        "rows": [*learned, *rivals_], "metric": {"name": "accuracy", "maximise": True}, "seeds": [0, 1], "config": {}
    }  # fmt: skip
    said = report.tables.contest_conclusion(results)
    assert "80.00 % ± 1.00 after 1 step (of at most 50)" in said
    assert "The best other one at no more cost is pre-trained init + one tuned rate with 90.00 %" in said


def test_budgets_in_any_order_end_with_the_largest(trained, tmp_path, few_rates):
    config = dataclasses.replace(CONFIG, rivals=(), searchers=("random",), budgets=(3.0, 1.0), out=tmp_path / "budgets")
    rows = comparing.run(trained[:1], config, reporter=QUIET)["rows"]
    names = [row["method"] for row in rows if row["steps"] is None]
    assert names == [
        "random init + random, cost of 1 cells", "random init + random, cost of 3 cells",
        "random init + random, cost of 3 cells, trained again on all",
    ]  # fmt: skip


def test_refusals(trained, tmp_path):
    a, b, joint = trained
    config, copy = dataclasses.replace(CONFIG, out=tmp_path / "compared"), tmp_path / "copy"
    shutil.copytree(a, copy)
    for runs_, change, message in (
        ([], {}, "runs: expected at least one"),
        ([a, joint], {}, "runs: expected runs that differ in their seed only, .* also in .*inner.algorithm"),
        ([a], {"searchers": ("gird",)}, r"searchers: expected some of .*, got \['gird'\]"),
        ([a], {"searchers": ()}, r"searchers: expected some of .*, got none"),
        ([a], {"tasks": 1}, "tasks, tuning_tasks, searched: expected"),
        ([a], {"searched": 1}, "tasks, tuning_tasks, searched: expected"),
        ([a], {"lengths": ()}, "lengths: expected one or more positive"),
        ([a], {"budgets": (0.0,)}, "budgets: expected one or more positive"),
        ([a], {"batch_size": 0}, "batch_size: expected at least 1"),
        ([a], {"shot": 0}, "shot: expected at least 1"),
        ([a], {"seed": -1}, "seed: expected 0 <= seed"),
        ([a], {"tasks": 2.5}, "tasks: expected int, got 2.5"),
        ([a, a], {}, "runs: expected different run folders"),
        ([a], {"shot": 99}, "tasks.shot"),
        ([a], {"part": "val"}, r"part: expected one of \('test', 'validation'\), got 'val'"),
        ([a], {"searchers": ("grid", "grid")}, "searchers: expected each once"),
        ([a], {"rivals": ("cocob", "cocob")}, "rivals: expected each once"),
        ([a], {"data": "mnist12k"}, "data: expected images of shape"),
        ([a, copy], {}, "runs: expected runs of different seeds, because each counts as one more, got 0 twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            comparing.run(runs_, dataclasses.replace(config, **change), reporter=QUIET)
        assert not config.out.exists()
    of_validation = tmp_path / "of_validation"
    shutil.copytree(a, of_validation)
    for name in ("config.json", "results.json"):
        stored = json.loads((of_validation / name).read_text())
        (stored if name == "config.json" else stored["config"])["outer"]["part"] = "validation"
        (of_validation / name).write_text(json.dumps(stored))
    for change, name in (({"part": "validation"}, "part"), ({"early_stopping": True}, "early_stopping")):
        with pytest.raises(ConfigError, match=f"{name}: expected .* with runs that learned on meta-validation tasks"):
            comparing.run([of_validation], dataclasses.replace(config, **change), reporter=QUIET)
    with pytest.raises(ConfigError, match="pretrained: .*: expected a run of --inner.algorithm joint, got"):
        comparing.run([a], config, pretrained=[b], reporter=QUIET)
    assert not config.out.exists()
    with pytest.raises(ConfigError, match="resume: .*: expected a comparison, found none"):
        comparing.resume(tmp_path / "nothing", reporter=QUIET)
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match="choosing: .*search: expected a run of metalr train, found results of"):
        comparing.run([a], config, choosing=[tmp_path / "search"], reporter=QUIET)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "drawn.jsonl").write_text("")
    with pytest.raises(ConfigError, match="choosing: .*sweep: expected a sweep with finished runs, found none"):
        comparing.run([a], config, choosing=[tmp_path / "sweep"], reporter=QUIET)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(a, unfinished)
    (unfinished / "results.json").unlink()
    with pytest.raises(ConfigError, match="expected a finished run"):
        comparing.run([unfinished], config, reporter=QUIET)


def test_searchers_that_cannot_be_asked(trained):
    """Learned rates that scale no step of Adam's are no first trial of a search of Adam's rate."""
    learner = comparing.load_runs(trained[:1], comparing.Own())[0][0]
    assert comparing._fitting_searchers(CONFIG, learner) == [*CONFIG.searchers]
    sgd = dataclasses.replace(learner, spec=dataclasses.replace(learner.spec, base="sgd"))
    assert "tpe+" not in comparing._fitting_searchers(CONFIG, sgd)
    only = dataclasses.replace(CONFIG, searchers=("tpe+",))
    with pytest.raises(ConfigError, match="searchers: expected others with inner.base sgd"):
        comparing._fitting_searchers(only, sgd)
    assert comparing._fitting_searchers(dataclasses.replace(only, searched=0), sgd) == []
    support = dataclasses.replace(learner, model=models.conv4(10, (8, 8, 1), channels=2, layers=2, norm="support"))
    with pytest.raises(ConfigError, match="searched: expected 0 with model.norm support"):
        comparing._fitting_searchers(CONFIG, support)


def test_meta_validation_tasks_to_tune_on_are_others_than_those_to_be_judged_on():
    """Of a table, whose few tasks come again and again under other keys."""
    y = np.arange(120.0)
    table = Tasks.from_arrays(y[:, None], y, np.repeat(np.arange(12), 10), shot=3, query=3, validation=0.4)
    pool, sample = table.sampler("validation")
    config = dataclasses.replace(CONFIG, tasks=9, tuning_tasks=7)
    judged, tuning = comparing._two_parts(config, pool, sample)
    assert (len(judged), len(tuning)) == (9, 7)
    of_judged, of_tuning = (set(protocol.groups_of(sample, pool, keys).tolist()) for keys in (judged, tuning))
    assert of_judged.isdisjoint(of_tuning)
    assert of_judged | of_tuning == set(range(len(of_judged | of_tuning)))
    one = Tasks.from_arrays(y[:, None], y, np.repeat(np.arange(12), 10), shot=3, query=3, validation=1 / 12)
    with pytest.raises(ConfigError, match="part: expected test, because there is one meta-validation task alone"):
        comparing._two_parts(config, *one.sampler("validation"))


def test_an_init_pretrained_on_other_tasks_is_refused():
    train = TrainConfig(data="a", tasks=TaskConfig("rotated", 10, 5, 15))
    joint = dataclasses.replace(train, inner=InnerConfig(algorithm="joint"))
    comparing._check_pretrained("pretrained", dataclasses.replace(joint, tasks=TaskConfig("rotated", 10, 1, 5)), train)
    other = dataclasses.replace(joint, tasks=TaskConfig("permuted", 10, 5, 15))
    with pytest.raises(ConfigError, match="expected tasks.family 'rotated' as in the runs, got 'permuted'"):
        comparing._check_pretrained("pretrained", other, train)


def test_what_a_search_found_within_a_budget():
    def trial(number, validation, test):
        return trials.Trial(number, 0.1, 16, 2, (validation,), (test,), {2: validation}, 10, 1.0)

    searches = [
        rivals.Searched([trial(0, 0.2, 0.5), trial(1, 0.6, 0.4)], 0.45, 12),
        rivals.Searched([trial(0, 0.3, 0.7), trial(1, 0.1, 0.9)], 0.75, 12),
    ]
    whole, first = rivals.best_of("x", searches), rivals.best_of("x", searches, 10)
    assert whole.tasks.tolist() == [0.4, 0.7]
    assert (whole.example_gradients, first.example_gradients) == (20, 10)
    assert first.tasks.tolist() == [0.5, 0.7]
    assert rivals.best_of("x", searches, choose="test").tasks.tolist() == [0.5, 0.9]
    again = rivals.best_of("x", searches, choose="again")
    assert again.tasks.tolist() == [0.45, 0.75]
    assert again.example_gradients == 32


def test_a_portfolio_is_of_cells_that_do_well_together():
    """Cell 1 is best on average; 2 is the best where 1 fails, though its own mean is the worst."""

    def grid(scores):
        made = [trials.Trial(i, 0.1 * (i + 1), 8, 1, (0.0,), (s,), {1: 0.0}, 10, 1.0) for i, s in enumerate(scores)]
        return rivals.Searched(made, 0.0, 0)

    space = SpaceConfig((0.1, 0.2, 0.1 * 3), (1,), (8,))
    found = [grid([0.7, 0.9, 0.1]), grid([0.7, 0.8, 0.2]), grid([0.5, 0.5, 0.9])]
    chosen = rivals.portfolio(found, space, 2, CROSS_ENTROPY)
    assert [cell["learning_rate"] for cell in chosen] == pytest.approx([0.2, 0.3])
    assert len(rivals.portfolio(found, space, 9, CROSS_ENTROPY)) == 3
    errors = rivals.portfolio(found, space, 1, OBJECTIVES["squared_error"])
    assert errors[0]["learning_rate"] == pytest.approx(0.3)
    found = [grid([math.nan] * 3), grid([0.1, 0.9, math.nan]), grid([0.1, 0.9, 0.2])]  # the first one says nothing
    chosen = rivals.portfolio(found, space, 2, CROSS_ENTROPY)
    assert [cell["learning_rate"] for cell in chosen] == pytest.approx([0.2, 0.1])


def test_a_portfolio_of_tasks_whose_training_parts_differ_in_size():
    """Batches of 32, 64 and 128 are 32, 63 and 63 of 63 examples: two cells there, three of 200."""

    def grid(scores):
        made = [trials.Trial(i, 0.1, b, 1, (0.0,), (s,), {1: 0.0}, 10, 1.0) for i, (b, s) in enumerate(scores.items())]
        return rivals.Searched(made, 0.0, 0)

    space = SpaceConfig((0.1,), (1,), (32, 64, 128))
    small, large = grid({32: 0.2, 63: 0.6}), grid({32: 0.9, 64: 0.1, 128: 0.8})
    chosen = rivals.portfolio([small, large], space, 3, CROSS_ENTROPY)
    assert [cell["batch_size"] for cell in chosen] == [128, 32, 64]
    assert [cell["batch_size"] for cell in rivals.portfolio([small, small], space, 3, CROSS_ENTROPY)] == [64, 32]


def test_portfolios_validation_tasks_and_what_choosing_cost(trained, tmp_path, few_rates):
    *seeds, joint = trained
    base = dataclasses.replace(CONFIG, searchers=("portfolio",), rivals=())
    config = dataclasses.replace(base, out=tmp_path / "portfolio")
    results = comparing.run(seeds, config, pretrained=[joint], choosing=[joint], reporter=QUIET)
    rows = {row["method"]: row for row in results["rows"] if row["steps"] is None}
    assert set(rows) == {
        f"{init} init + portfolio of {text}"
        for init in ("random", "pre-trained")
        for text in ("1", "4", "4, trained again on all")
    }
    one, four = rows["random init + portfolio of 1"], rows["random init + portfolio of 4"]
    assert one["example_gradients"] in (48, 96)  # one run of one or two epochs on all 50, in batches of 8
    assert four["example_gradients"] == four["naive_example_gradients"] == 2 * (1 + 2) * 40
    assert one["paid_once_example_gradients"] == 2 * 2 * 2 * 40  # the grid on two tasks, epochs as snapshots
    of_joint = json.loads((joint / "results.json").read_text())["training"]
    assert results["choosing_example_gradients"] == 0  # it is compared, and so charged already
    assert of_joint["validation_example_gradients"] == len(of_joint["validations"]) * 2 * 4 * 40 > 0
    row = rivals.Scores("x", 2, np.array([[0.5]]), 100.0, 100.0, 0.0, None, paid_once=0.0)
    reference = [row._replace(example_gradients=40.0, paid_once=90.0)]
    end = comparing._conclusion(row, reference, CROSS_ENTROPY, 60.0)
    assert (end["break_even_tasks"], end["break_even_tasks_with_choosing"]) == (2, 3)  # 90 / 60, 150 / 60

    lines = (config.out / "searches.jsonl").read_text().splitlines()
    (config.out / "results.json").unlink()
    (config.out / "searches.jsonl").write_text("\n".join(lines[:5]) + "\n")
    again = comparing.resume(config.out, reporter=QUIET)
    assert [row["accuracy"] for row in again["rows"]] == [row["accuracy"] for row in results["rows"]]

    validated = comparing.run(
        seeds, dataclasses.replace(base, part="validation", searched=0, out=tmp_path / "val"), choosing=[joint],
        reporter=QUIET,
    )  # fmt: skip
    assert validated["part"] == "validation"
    assert validated["choosing_example_gradients"] == of_joint["example_gradients"]
    assert validated["rows"][0]["accuracy_of_seeds"] != results["rows"][0]["accuracy_of_seeds"]


def test_a_sweep_stands_for_its_runs_and_nothing_is_charged_twice(tmp_path):
    for name in "ab":
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "results.json").write_text("{}")
    (tmp_path / "runs" / "failed").mkdir()
    (tmp_path / "drawn.jsonl").write_text("")
    a, b = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    assert comparing._tried([tmp_path, a], [b]) == [a]
    assert comparing._tried([a, b], []) == [a, b]


def test_a_tuned_rate_at_an_end_of_its_range_widens_the_range():
    """The best rate of Adam here is 0.3 after one step and 1e-5 after two; both are beyond the range."""
    targets = np.log10([0.3, 1e-5])
    seen = []

    def runs(optimizer, val):
        def run(init, rates):
            seen.extend((optimizer, rate) for rate in rates) if val else None
            of_rates = -np.abs(np.log10(rates)[:, None] - targets) - (optimizer != "adam")  # [rates, lengths]
            return np.tile(of_rates[:, None], (1, 3, 1))

        return run

    keys = jax.random.split(jax.random.key(0), 3)
    field = rivals.Field(((), None), ((), None), keys, keys, support=8, train=6, lengths=(1, 2), batch_size=8)
    one, two = rivals.tuned("random", [None], field, runs)
    assert one.chosen["optimizer"] == two.chosen["optimizer"] == "adam"
    assert one.chosen["learning_rate"] == pytest.approx(0.316, rel=1e-2)
    assert two.chosen["learning_rate"] == pytest.approx(9.5e-6, rel=1e-2)
    rates = [rate for optimizer, rate in seen if optimizer == "adam"]
    assert min(rates) < two.chosen["learning_rate"]
    assert max(rates) > one.chosen["learning_rate"]
    of_length = sum(optimizer == "adam_cosine" for optimizer, _ in seen)  # a run for each length
    assert one.paid_once == (len(seen) * 2 + of_length) * 3 * 8
    assert len(seen) == len(set(seen))
