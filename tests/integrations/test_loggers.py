"""Loggers against the real libraries, offline. They are not in the extra `test`: .ci/integrations installs them."""

import numpy as np
import pytest

from metalr.runs import loggers


@pytest.fixture
def offline(tmp_path, monkeypatch):
    for name, value in {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(tmp_path), "WANDB_DIR": str(tmp_path),
        "MLFLOW_TRACKING_URI": f"file:{tmp_path}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_run_and_its_continuation_are_taken(offline, name):
    pytest.importorskip(loggers.MODULES[name])
    said = []
    for steps in ((1, 2), (3,)):
        with loggers.opened([name], [], offline, {"seed": 0, "outer.steps": 3}, said.append) as log:
            for step in steps:
                log.numbers(step, {"loss": 1 / step, "rates": {"head": [0.1, 0.2]}})
                log.picture(step, "held-out tasks/best", lambda: np.zeros((8, 8, 3), np.uint8))
    assert said == []
    assert (offline / "loggers.json").is_file()
    if name == "mlflow":
        import mlflow

        (run,) = mlflow.search_runs(experiment_names=["metalr"], output_format="list")
        assert run.data.metrics["loss"] == pytest.approx(1 / 3)
        assert run.data.params["outer.steps"] == "3"
