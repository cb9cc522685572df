"""A search's folder: what is in it, going on after a stop, what is refused."""

import csv
import dataclasses
import json

import pytest

from metalr import cli
from metalr.config import ModelConfig, SearchConfig, SpaceConfig, TaskConfig, files
from metalr.errors import ConfigError, StoppedError
from metalr.runs import searching
from metalr.runs.progress import ConsoleReporter
from metalr.search import searchers

QUIET = ConsoleReporter(quiet=True)


@pytest.fixture
def config(blobs_npz, tmp_path):
    return SearchConfig(
        data=str(blobs_npz),
        model=ModelConfig(widths=(16,), dropout=0.2),
        space=SpaceConfig(learning_rates=(1e-3, 1e-2), epochs=(1, 2), batch_sizes=(32, 64)),
        out=tmp_path / "search",
    )


def trials(folder):
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("searcher", ["grid", "random"])
def test_stopped_and_gone_on_with_is_never_stopped(config, tmp_path, monkeypatch, searcher):
    config = dataclasses.replace(config, searcher=searcher, seeds=2)
    whole = searching.run(config, reporter=QUIET)
    assert sorted(p.name for p in config.out.iterdir()) == [
        "config.json", "cv_results.csv", "data.json", "provenance.json", "results.json", "trials.jsonl",
    ]  # fmt: skip
    with (config.out / "cv_results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == whole["trials"] == 8
    best = rows[whole["best_index_"]]
    assert float(best["mean_test_score"]) == whole["best_score_"] == max(float(r["mean_test_score"]) for r in rows)
    assert best["rank_test_score"] == "1"

    stopped = dataclasses.replace(config, out=tmp_path / "stopped")
    append = searching.folders.append_rows

    def torn(file, rows):
        append(file, rows)
        if len(file.read_bytes().splitlines()) == 3:
            with file.open("ab") as log:
                log.write(b'{"number": 5, "learn')  # a kill in the middle of a line
            raise StoppedError("stopped")

    monkeypatch.setattr(searching.folders, "append_rows", torn)
    with pytest.raises(StoppedError):
        searching.run(stopped, reporter=QUIET)
    monkeypatch.undo()
    again = searching.resume(stopped.out, reporter=QUIET)
    assert {k: again[k] for k in ("best_params_", "best_score_", "final_test_score", "trials")} == {
        k: whole[k] for k in ("best_params_", "best_score_", "final_test_score", "trials")
    }
    found = searching.folders.read_rows(stopped.out / "trials.jsonl")
    assert sorted(row["number"] for row in found) == list(range(8))  # none lost, none doubled
    with pytest.raises(ConfigError, match="this search is finished"):
        searching.resume(stopped.out, reporter=QUIET)


def test_one_task_of_a_family(config, capsys):
    cli.main(
        ["search", "grid", "--data", config.data, "--task", "3", "--tasks.family", "permuted", "--tasks.shot", "5",
         "--tasks.query", "5", "--model.widths", "16", "--space.epochs", "1", "--space.batch-sizes", "8",
         "--out", str(config.out), "--json"]
    )  # fmt: skip
    results = json.loads(capsys.readouterr().out)
    assert results["trials"] == 3
    assert results["example_gradients"] == 3 * 40
    assert json.loads((config.out / "config.json").read_text())["task"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": SpaceConfig(epochs=())}, "space.epochs: expected at least one value"),
        ({"space": SpaceConfig(batch_sizes=(481,))}, "space.batch_sizes: expected at most 480"),
        ({"trials": 0, "searcher": "random"}, "trials: expected at least 1"),
        ({"trials": 3}, "trials: expected None with grid, which takes all 8 cells, got 3"),
        ({"seeds": 0}, "seeds, seed: expected at least 1"),
        ({"task": -1}, "task: expected 0 or more"),
        ({"task": 0, "tasks": TaskConfig(family="rotated", way=10, shot=99)}, "tasks.shot"),
        ({"validation": 0.0}, "validation: expected a share between 0 and 1"),
        ({"optimizer": "adm"}, "optimizer: expected an optax optimizer"),
    ],
)
def test_refused_before_anything_is_written(config, change, message):
    with pytest.raises(ConfigError, match=message):
        searching.run(dataclasses.replace(config, **change), reporter=QUIET)
    assert not config.out.exists()


def test_a_search_can_be_given_more_trials(config, tmp_path):
    """The longer one is the one that was longer from the start; a finished one goes on too."""
    asked = dataclasses.replace(config, searcher="random", trials=2, space=SpaceConfig(epochs=(1,), batch_sizes=(40,)))
    whole = searching.run(dataclasses.replace(asked, trials=4, out=tmp_path / "whole"), reporter=QUIET)
    searching.run(asked, reporter=QUIET)
    with pytest.raises(ConfigError, match=r"this search is finished \(it has results.json\); for more, --trials N"):
        searching.resume(config.out, reporter=QUIET)
    stored = files.read_config(config.out, SearchConfig)
    with pytest.raises(ConfigError, match="trials: expected at least the 2 that are done"):
        searching.resume(config.out, dataclasses.replace(stored, trials=1), reporter=QUIET)
    more = searching.resume(config.out, dataclasses.replace(stored, trials=4), reporter=QUIET)

    def without_seconds(folder):
        rows = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert without_seconds(config.out) == without_seconds(tmp_path / "whole")
    assert more["best_params_"] == whole["best_params_"]
    assert files.read_config(config.out, SearchConfig).trials == 4


def test_other_settings_and_other_files_are_refused(config):
    config.out.mkdir()
    (config.out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="expected a run to overwrite, found other files|exists and is not empty"):
        searching.run(dataclasses.replace(config, overwrite=True), reporter=QUIET)
    (config.out / "notes.txt").unlink()
    (config.out / "config.json").write_text(json.dumps(config.to_json()))
    with pytest.raises(ConfigError, match=r"seed: expected 0 as in .*, got 1"):
        searching.resume(config.out, dataclasses.replace(config, seed=1), reporter=QUIET)


def test_the_table_and_the_command_line_have_the_same_searchers():
    from typing import get_args, get_type_hints

    assert set(get_args(get_type_hints(SearchConfig)["searcher"])) == set(searchers.SEARCHERS)
