"""Loggers get the numbers of a run, go on where a stopped run did, and never end one."""

import dataclasses
import json
import struct
import sys
import types

import pytest

from metalr import Tasks, models, runs
from metalr.config import EvaluationConfig, InnerConfig, ModelConfig, OuterConfig, TaskConfig, TrainConfig
from metalr.errors import ConfigError
from metalr.runs import loggers, meta_training

TINY = TrainConfig(
    tasks=TaskConfig("digits", 3, 2, 3),
    model=ModelConfig(widths=(16,)),
    inner=InnerConfig(steps=2, per_step=True),
    outer=OuterConfig(steps=4, meta_batch=2, validate_every=2),
    evaluation=EvaluationConfig(episodes=4, validation_episodes=4, steps=2, shown_tasks=0),
)


class Mine:
    def __init__(self):
        self.lines, self.closed = [], False

    def log(self, step, values):
        self.lines.append((step, values))

    def close(self):
        self.closed = True


def train(blobs_npz, out, *own, **changes):
    runs.run(dataclasses.replace(TINY, data=str(blobs_npz), out=out, **changes), name="run", loggers=own)


def test_a_logger_of_ones_own_gets_what_the_metrics_file_has(blobs_npz, tmp_path):
    mine = Mine()
    train(blobs_npz, tmp_path / "run", mine)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "validation_accuracy" in line]
    logged = [(step, values) for step, values in mine.lines if "validation_accuracy" in values]
    assert [step for step, _ in logged] == [line["step"] for line in validations] == [2, 4]
    assert [v["validation_accuracy"] for _, v in logged] == [line["validation_accuracy"] for line in validations]
    assert logged[0][1]["rates/dense_0/1"] == validations[0]["rates"]["dense_0"][0]
    assert all({"loss", "accuracy", "gradient_norm"} <= set(v) for s, v in mine.lines if "validation_accuracy" not in v)
    assert mine.closed


def test_a_logger_that_takes_pictures_gets_the_rates_and_the_held_out_tasks(blobs_npz, tmp_path):
    class Seeing(Mine):
        def __init__(self):
            super().__init__()
            self.seen = {}

        def picture(self, step, name, image):
            self.seen[step, name] = image

    seeing = Seeing()
    shown = dataclasses.replace(TINY.evaluation, shown_tasks=2)
    train(blobs_npz, tmp_path / "run", seeing, Mine(), evaluation=shown)
    tasks = [(4, "held-out tasks/best"), (4, "held-out tasks/worst")]
    assert sorted(seeing.seen) == [(2, "rates"), *tasks, (4, "rates")]
    assert all(image.dtype == "uint8" and image.shape[2] == 3 for image in seeing.seen.values())


def test_a_picture_that_cannot_be_drawn_ends_no_run(blobs_npz, tmp_path, capsys, monkeypatch):
    class Seeing(Mine):
        def picture(self, step, name, image):
            raise AssertionError("there is none")

    def broken(*given):
        raise ValueError("no room to draw")

    monkeypatch.setattr(meta_training.pictures, "heat_map", broken)
    mine = Mine()
    train(blobs_npz, tmp_path / "run", Seeing(), mine)
    assert "Seeing 1 failed and is left out from here on: ValueError: no room to draw" in capsys.readouterr().err
    assert len(mine.lines) > 2


def test_a_logger_that_fails_is_left_out_and_the_run_goes_on(blobs_npz, tmp_path, capsys):
    class Broken(Mine):
        def log(self, step, values):
            super().log(step, values)
            raise OSError("no network")

    broken, mine = Broken(), Mine()
    train(blobs_npz, tmp_path / "run", broken, mine)
    assert len(broken.lines) == 1
    assert len(mine.lines) > 1
    assert "logger Broken 1 failed and is left out from here on: OSError: no network" in capsys.readouterr().err
    assert (tmp_path / "run" / "results.json").is_file()


def test_tensorboard_gets_scalars_without_tensorflow(blobs_npz, tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    train(blobs_npz, tmp_path / "run", loggers=("tensorboard",))
    (file,) = (tmp_path / "run" / "tensorboard").glob("events.*")
    content, at, found, pictures = file.read_bytes(), 0, {}, set()
    while at < len(content):  # TFRecord: length, its checksum, the record, its checksum
        (length,) = struct.unpack_from("<Q", content, at)
        event = Event.FromString(content[at + 12 : at + 12 + length])
        at += 16 + length
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        pictures |= {(value.tag, event.step) for value in event.summary.value if value.image.encoded_image_string}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in lines if "validation_accuracy" in line and line["step"] == 4)
    assert found["validation_accuracy", 4] == pytest.approx(last["validation_accuracy"], abs=1e-6)
    assert found["rates/head/2", 4] == pytest.approx(last["rates"]["head"][1], rel=1e-6)
    assert {("rates", 2), ("rates", 4)} <= pictures
    assert "tensorflow" not in sys.modules


class Service:
    """What wandb, mlflow and trackio have in common, as calls."""

    def __init__(self):
        self.calls, self.id, self.info = [], "id7", types.SimpleNamespace(run_id="id7")

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call


@pytest.mark.parametrize(
    ("name", "begin", "resumed", "log"),
    [
        ("wandb", "init", {"id": "id7", "resume": "allow"}, "log"),
        ("mlflow", "start_run", {"run_id": "id7"}, "log_metrics"),
        ("trackio", "init", {"resume": "allow"}, "log"),
    ],
)
def test_services_get_the_same_and_a_second_process_goes_on(tmp_path, monkeypatch, name, begin, resumed, log):
    service, folder = Service(), tmp_path / "run"
    folder.mkdir()
    monkeypatch.setitem(sys.modules, loggers.MODULES[name], service)
    for step in (5, 10):
        with loggers.opened([name], [], folder, {"seed": 3}, pytest.fail) as to:
            to.numbers(step, {"loss": 0.5, "skipped": True, "rates": {"head": [0.1, 0.2]}})
    begun = [kwargs for call, _, kwargs in service.calls if call == begin]
    assert "id7" not in str(begun[0])
    assert resumed.items() <= begun[1].items()
    if name == "trackio":
        assert begun[0]["name"] == begun[1]["name"] != "run"
    written = [(args[0], kwargs) for call, args, kwargs in service.calls if call == log]
    assert written == [({"loss": 0.5, "rates/head/1": 0.1, "rates/head/2": 0.2}, {"step": step}) for step in (5, 10)]


def test_a_library_that_is_missing_is_named_before_anything_is_written(blobs_npz, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"loggers: expected wandb for wandb; pip install 'metalr\[wandb\]'"):
        train(blobs_npz, tmp_path / "run", loggers=("wandb",))
    assert not (tmp_path / "run").exists()


def test_two_loggers_of_one_class_both_get_the_numbers(blobs_npz, tmp_path):
    one, two = Mine(), Mine()
    train(blobs_npz, tmp_path / "run", one, two)
    assert one.lines == two.lines != []
    assert one.closed
    assert two.closed


def test_loggers_of_ones_own_are_of_one_seed():
    tasks, model = Tasks.from_images("mnist12k", "digits", 3, 1), models.mlp(3)
    with pytest.raises(ConfigError, match="loggers: expected names with several seeds, got objects"):
        runs.meta_train(tasks, model, seed=(0, 1), loggers=[Mine()])
