"""Listing runs: how they stand, in what they differ, many of them, and without jax."""

import json
import subprocess
import sys
import time

import pytest

from metalr.config import TrainConfig
from metalr.errors import ConfigError
from metalr.report import runs
from metalr.storage import folders


def made(folder, status="finished", accuracy=0.9, **settings):
    folder.mkdir(parents=True)
    config = TrainConfig().to_json() | settings
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(40)) + '{"st'
    )
    curve = [{"steps": n, "accuracy": accuracy * n / 5, "ci95": 0.01} for n in range(11)]
    if status == "finished":
        (folder / "results.json").write_text(
            json.dumps({"config": config, "curve": curve, "metric": {"name": "accuracy"}})
        )
    if status == "failed":
        (folder / "failed.json").write_text('{"error": "loss nan"}')
    return folder


def test_how_runs_stand(tmp_path):
    made(tmp_path / "a", seed=0)
    made(tmp_path / "sweep" / "b", accuracy=0.8, seed=1)
    made(tmp_path / "c", "stopped", seed=2)
    made(tmp_path / "d", "failed", seed=3)
    with folders.locked(made(tmp_path / "e", "running", seed=4)):
        found = {run.folder.name: run for run in runs.find(tmp_path)}
    assert {name: run.status for name, run in found.items()} == {
        "a": "finished", "b": "finished", "c": "stopped", "d": "failed", "e": "running",
    }  # fmt: skip
    assert (found["a"].score, found["a"].steps, found["b"].score) == (0.9, 5, 0.8)
    assert found["c"].done == 40  # the line that was cut off does not count
    text = runs.listing(list(found.values()))
    head, first = text.splitlines()[:2]
    assert head.split()[-1] == "seed"  # what differs
    assert "90.00 %" in first
    assert "40/2000" in text
    assert runs.details(found["d"], {})["error"] == "loss nan"


def test_settings_that_a_run_does_not_go_by_are_not_shown(tmp_path):
    table = TrainConfig().to_json()["table"] | {"task_column": "store"}
    images, of_table = made(tmp_path / "a"), made(tmp_path / "b", table=table)
    text = runs.comparison([runs.read(images), runs.read(of_table)])
    assert runs.read(images).setting("table") is None
    assert runs.read(of_table).setting("tasks") is None
    assert runs.read(of_table).setting("table.task_column") == "store"
    assert "table.task_column" in text


def test_what_differs(tmp_path):
    one = made(tmp_path / "a", inner=TrainConfig().to_json()["inner"] | {"rate": 0.1})
    other = made(tmp_path / "b", accuracy=0.5, inner=TrainConfig().to_json()["inner"] | {"rate": 0.2})
    text = runs.comparison([runs.read(one), runs.read(other)])
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["status", "finished", "finished"],
        ["accuracy", "90.00", "%", "±", "1.00", "50.00", "%", "±", "1.00"],
        ["inner.rate", "0.1", "0.2"],
    ]
    same = runs.comparison([runs.read(one), runs.read(one)])
    assert same.endswith("their settings are the same")


def test_each_metric_has_a_row_of_its_own(tmp_path):
    for name, metric in (("a", "accuracy"), ("b", "mse")):
        folder = made(tmp_path / name)
        curve = [{"steps": 5, metric: 0.25, "ci95": 0.1}]
        facts = {"metric": {"name": metric}, "config": json.loads((folder / "config.json").read_text()), "curve": curve}
        (folder / "results.json").write_text(json.dumps(facts))
    lines = runs.comparison([runs.read(tmp_path / "a"), runs.read(tmp_path / "b")]).splitlines()
    found = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert found["accuracy"] == ["25.00", "%", "±", "10.00"]
    assert found["mse"][0] == "0.25"


def test_the_newest_of_a_name(tmp_path):
    for name in ("mine", "mine-2", "mine-too"):
        made(tmp_path / name)
        time.sleep(0.01)
    assert runs.newest(tmp_path, "mine").folder.name == "mine-2"
    with pytest.raises(ConfigError, match="expected a run of that name"):
        runs.newest(tmp_path, "other")
    with pytest.raises(ConfigError, match="expected a folder with runs"):
        runs.find(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"expected a run with config.json"):
        runs.read(tmp_path)


def test_a_folder_of_a_thousand_runs_is_listed_at_once(tmp_path):
    for i in range(1000):
        made(tmp_path / f"run{i}", seed=i)
    began = time.perf_counter()
    text = runs.listing(runs.find(tmp_path))
    assert time.perf_counter() - began < 5  # a tenth of it on a machine with nothing else to do
    assert len(text.splitlines()) == 1001


def test_listing_imports_no_jax(tmp_path):
    made(tmp_path / "a")
    script = (
        "import sys; from metalr import cli; cli.main(['runs', 'list', sys.argv[1]]); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_a_thousand_runs_are_listed_in_a_moment(tmp_path):
    """10,000 take about 1.6 s, once their files are in memory; here a tenth of them, on a busy machine."""
    config, curve = TrainConfig().to_json(), [{"steps": 5, "accuracy": 0.5, "ci95": 0.1}]
    for i in range(1000):
        folder = tmp_path / f"run{i:04d}"
        (folder / "artifact").mkdir(parents=True)
        (folder / "artifact" / "a").write_bytes(b"12345")
        settings = config | {"seed": i}
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "results.json").write_text(
            json.dumps({"metric": {"name": "accuracy"}, "config": settings, "curve": curve})
        )
    began = time.perf_counter()
    found = runs.find(tmp_path)
    text = runs.listing(found)
    assert time.perf_counter() - began < 2
    assert len(found) == 1000
    assert found[0].bytes > 5
    assert "50.00 %" in text
    assert runs.differing(found) == ["seed"]


def test_a_comparison_without_searches_is_one_too(tmp_path):
    """It has no file that only comparisons have."""
    folder = tmp_path / "compare"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"runs": ["a"], "config": {"tasks": 3}}))
    assert runs.read(folder).kind == "comparison"
    row = {"method": "learned init + learned rates", "steps": 5, "accuracy": 0.9, "ci95": 0.1}
    (folder / "results.json").write_text(json.dumps({"rows": [row], "metric": {"name": "accuracy"}}))
    found = runs.read(folder)
    assert (found.kind, found.score, found.steps) == ("comparison", 0.9, 5)
    assert found.settings == {"tasks": 3}


def test_a_model_repository_is_no_run(tmp_path):
    """Its config.json is another: metalr export --to hub-folder, or anyone's model beside the runs."""
    (tmp_path / "hub").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "hub" / name).write_text("{}")
    assert runs.find(tmp_path) == []
    with pytest.raises(ConfigError, match="expected a run with config.json, found none"):
        runs.read(tmp_path / "hub")
    kept = made(tmp_path / "run")
    (kept / "model.safetensors").write_text("")  # a user's own, in the folder of a run
    assert [run.folder for run in runs.find(tmp_path)] == [kept]


@pytest.mark.parametrize("results", [{"curve": []}, {"curve": [{"steps": 1}], "config": {}}, {"curve": 3}])
def test_results_of_another_program_end_no_listing(tmp_path, results):
    made(tmp_path / "a")
    other = tmp_path / "odd"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "results.json").write_text(json.dumps(results))
    found = runs.find(tmp_path)
    assert {run.folder.name for run in found} >= {"a"}
    assert all(run.score is None for run in found if run.folder.name == "odd")
