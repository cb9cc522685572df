"""The command line of a sweep: any setting with several values; and two real runs."""

import json

import pytest

from metalr import cli
from metalr.cli import sweeps
from metalr.config import TrainConfig
from metalr.errors import ConfigError
from metalr.runs.sweeping import Range

BASE = TrainConfig()


def test_arguments_are_the_sweeps_own_or_settings_of_runs():
    argv = [
        "runs/a",
        "--workers",
        "2",
        "--outer.init-rate",
        "1e-3",
        "3e-3",
        "--seed=4",
        "--json",
        "--model.widths",
        "8 4",
    ]
    own, swept = sweeps.split(argv)
    assert own == ["runs/a", "--workers", "2", "--json"]
    assert swept == {"--outer.init-rate": ["1e-3", "3e-3"], "--seed": ["4"], "--model.widths": ["8 4"]}
    with pytest.raises(ConfigError, match="--seed: expected it once"):
        sweeps.split(["--seed", "1", "--seed", "2"])


@pytest.mark.parametrize(
    ("flag", "values", "expected"),
    [
        ("--outer.init-rate", ["1e-3", "0.001"], ("outer.init_rate", [1e-3, 1e-3])),
        ("--model.widths", ["64 64", "128"], ("model.widths", [[64, 64], [128]])),
        ("--tasks.turns", ["False", "True"], ("tasks.turns", [False, True])),
        ("--grid.run", [], ("grid.run", [True])),
        ("--inner.signed", ["True", "False"], ("inner.signed", [True, False])),
        ("--data.task-column", ["store id"], ("table.task_column", ["store id"])),
        ("--data.target", ["'unit sales'"], ("table.target", [["unit sales"]])),
        ("--data", ["a/../b.csv"], ("data", ["a/../b.csv"])),
        ("--data.target", ["y", "y z"], ("table.target", [["y"], ["y", "z"]])),
        ("--inner.rate", ["None", "0.1"], ("inner.rate", [None, 0.1])),
        ("--outer.init-rate", ["1e-4..1e-2"], ("outer.init_rate", Range(1e-4, 1e-2))),
        ("--outer.init-rate", ["0.5..1"], ("outer.init_rate", Range(0.5, 1.0))),
        ("--outer.init-rate", ["1.5e-3..1.5e-2"], ("outer.init_rate", Range(1.5e-3, 1.5e-2))),
        ("--outer.meta-batch", ["2..8"], ("outer.meta_batch", Range(2, 8))),
    ],
)
def test_values_are_read_as_a_run_reads_them(flag, values, expected):
    assert sweeps.axis_of(flag, values, BASE) == expected


@pytest.mark.parametrize(
    ("flag", "values", "message"),
    [
        ("--outer.init-rate", ["fast"], "--outer.init-rate fast: .*"),
        ("--outer.init-rates", ["1"], "--outer.init-rates: no such setting; did you mean --outer.init-rate?"),
        ("--data.task-colum", ["1"], "--data.task-colum: no such setting; did you mean --data.task-column?"),
        ("--nonsense", ["1"], "--nonsense: no such setting$"),
        ("--outer.init-rate", [], "--outer.init-rate: expected one or more values, got none"),
        ("--model.name", ["mlp..rnn"], "--model.name"),
        ("--inner.signed", ["yes"], "--inner.signed: expected True or False, got 'yes'"),
    ],
)
def test_what_no_run_takes_is_refused(flag, values, message):
    with pytest.raises(ConfigError, match=message):
        sweeps.axis_of(flag, values, BASE)


def test_two_real_runs(blobs_npz, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = (
        f"--data {blobs_npz} --tasks.family permuted --tasks.way 10 --tasks.shot 2 --tasks.query 3 --model.widths 16 "
        "--inner.steps 2 --outer.steps 3 --outer.meta-batch 2 --evaluation.episodes 4 "
        "--evaluation.validation-episodes 2"
    ).split()
    cli.main(["sweep", *shared, "--outer.init-rate", "1e-3", "1e-2", "--workers", "2", "--out", "s", "--json"])
    results = json.loads(capsys.readouterr().out)
    assert results["failed"] == {}
    assert [row["point"] for row in results["rows"]] == [{"outer.init_rate": 1e-3}, {"outer.init_rate": 1e-2}]
    assert all(0 <= row["validation"] <= 1 and row["seconds"] > 0 for row in results["rows"])
    assert (tmp_path / "s" / "report.html").stat().st_size > 1000
    folder = tmp_path / "s" / "runs" / results["best"]["runs"][0]
    cli.main(["runs", "show", str(folder), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["status"] == "finished"
    assert shown["settings"]["outer.steps"] == 3
    assert "metalr" in shown["command"]
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--resume", "s"])
    assert "this sweep is finished" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--resume", "s", "--timeout", "5", "--outer.steps", "3"])
    assert "expected nothing beside it but --workers" in capsys.readouterr().err
