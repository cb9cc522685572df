"""The command line, end to end on small data: run folders, refusals, speed of --help."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import metalr
from metalr import cli, config, data, models, outer
from metalr.config import files
from metalr.errors import ConfigError
from metalr.evaluation import protocol
from metalr.inner import hyperparameters
from metalr.runs import setup

SMALL = [
    "--tasks.family", "permuted", "--tasks.way", "10", "--tasks.shot", "2", "--tasks.query", "3",
    "--outer.steps", "6", "--outer.meta-batch", "2", "--evaluation.episodes", "8", "--evaluation.shown-tasks", "0",
    "--evaluation.validation-episodes", "4", "--model.widths", "16", "--inner.steps", "2", "--evaluation.steps", "3",
]  # fmt: skip


ITS_OWN = ["--model.widths", "128"]  # SMALL's widths put back to the default, for networks that take none


def call(*argv):
    cli.main([str(a) for a in argv])


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        call(*argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("metalr: error: "), error
    assert "\n" not in error
    return error


def test_train_evaluate_adapt(blobs, blobs_npz, tmp_path, capsys):
    grid = ["--grid.run", "--grid.steps", "1", "--grid.learning-rates", "0.001"]
    call("train", "--data", blobs_npz, *SMALL, *grid, "--out", tmp_path / "run")
    out = capsys.readouterr()
    assert "learned init + learned rates" in out.out
    first = out.err.splitlines()
    assert first[0].startswith("data    blobs: 600 train + 300 test images")
    assert [line.split()[0] for line in first[1:3]] == ["device", "tasks"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "artifact", "checkpoints", "config.json", "data.json", "grid.jsonl", "metrics.jsonl", "provenance.json",
        "report.html", "results.json",
    ]  # fmt: skip
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(6))
    assert len(results["curve"]) == 4
    methods = {row["method"] for row in results["comparison"]}
    assert "random init + grid, best cell at 2 steps" in methods
    assert len(methods) == 7
    assert results["grid"]["cells"]

    call("evaluate", tmp_path / "run", "--json")
    again = json.loads(capsys.readouterr().out)
    assert again["curve"] == results["curve"]  # the same tasks, the same numbers
    call("evaluate", tmp_path / "run", "--episodes", "12", "--steps", "3")
    assert "12 held-out tasks" in capsys.readouterr().out

    task = tmp_path / "task.npz"
    x, y = data.load(str(blobs_npz)).test_images[..., 0], blobs.test_labels
    np.savez(task, support_x=x[:50], support_y=y[:50], query_x=x[50:], query_y=y[50:])
    call("adapt", tmp_path / "run", task, "--json", "--out", tmp_path / "fast.safetensors")
    result = json.loads(capsys.readouterr().out)
    assert len(result["predictions"]) == 250
    assert 0 <= result["accuracy"] <= 1
    assert (tmp_path / "fast.safetensors").stat().st_size > 1000
    np.savez(task, support_x=x[:50])
    assert "missing ['support_y', 'query_x']" in refused(capsys, "adapt", tmp_path / "run", task)

    learned = metalr.load(tmp_path / "run" / "artifact")
    assert learned.facts["split_sha256"] == results["split_sha256"]
    assert "exists and is not empty" in refused(capsys, "train", "--data", blobs_npz, *SMALL, "--out", tmp_path / "run")


def test_long_schedules_and_show(blobs_npz, tmp_path, capsys):
    inner = ["--inner.steps", "12", "--inner.knots", "3", "--inner.batch-size", "5", "--inner.momentum", "0.5"]
    inner += ["--inner.signed", "--inner.lowest", "0", "--inner.highest", "1", "--inner.derivative", "forward"]
    inner += ["--evaluation.steps", "12"]
    call("train", "--data", blobs_npz, *SMALL, *inner, "--out", tmp_path / "run")
    assert "12" in capsys.readouterr().out
    call("show", tmp_path / "run")
    shown = capsys.readouterr().out
    assert "3 knots over any number of steps" in shown
    assert "momentum:dense_0" in shown
    call("show", tmp_path / "run" / "artifact", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["rates"]["head"]) == 3
    assert facts["rates_health"]["head"] == {"negative": 0.0, "dead": 0.0}
    learned = metalr.load(tmp_path / "run" / "artifact")
    x = np.zeros((20, 8, 8), np.uint8)
    learned.apply(learned.adapt(x, np.arange(20) % 10, steps=30), x)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["rates"]["momentum:head"] > 0

    curves = {}
    for steps in (12, 24):  # what is asked for is what the schedule is stretched over
        call("evaluate", tmp_path / "run", "--steps", steps, "--episodes", "4", "--json")
        curves[steps] = json.loads(capsys.readouterr().out)["curve"]
    parts = setup.set_up(files.read_config(tmp_path / "run"))
    evaluator = protocol.make_evaluator(learned.model, learned.spec, parts.parts.test[1], 24, of_steps=24, at=[24])
    keys = protocol.episode_keys(0, 4)
    expected = evaluator(parts.parts.test[0], learned.init, learned.rates, keys).mean[0]
    assert curves[24][-1]["accuracy"] == pytest.approx(float(expected), abs=1e-6)
    assert curves[12][-1]["steps"] == 12


def test_head_only_is_shown_as_such(blobs_npz, tmp_path, capsys):
    call("train", "--data", blobs_npz, *SMALL, "--inner.algorithm", "anil", "--out", tmp_path / "run")
    capsys.readouterr()
    call("show", tmp_path / "run")
    assert "without a rate, so not adapted: dense_0/bias, dense_0/kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--inner.algorithm", "imaml", "--inner.learned", "True"], "inner.learned: expected False with imaml"),
        (["--inner.algorithm", "maml", "--outer.learns", "rates"], "outer.learns: expected both or init"),
        (
            ["--model.name", "conv4", *ITS_OWN, "--inner.dropout", "0.1"],
            "inner.dropout: expected None with the model 'conv4'",
        ),
        (["--outer.multi-step", "0.5", "--inner.derivative", "forward"], "outer.multi_step: expected 0"),
        (["--outer.multi-step", "1", "--inner.steps", "9000", "--evaluation.steps", "9000"], "auto (Forward("),
        (
            ["--model.name", "rnn", *ITS_OWN, "--model.dropout", "0.5"],
            "model.dropout: expected 0.0, because nothing else",
        ),
        (["--model.name", "rnn", "--model.widths", "8"], "model.widths: expected (128,), because"),
        (["--model.channels", "8"], "model.channels: expected 64, because nothing else is used here (the network mlp"),
        (["--inner.solver-steps", "3"], "inner.solver_steps: expected 5, because"),
        (["--inner.derivative", "remat", "--inner.last", "3"], "inner.last: expected 10, because"),
        (["--inner.pairs", "3"], "inner.pairs: expected 4, because"),
        (["--inner.derivative", "evolution"], "inner.derivative: expected evolution only with outer.learns one of"),
        (
            ["--inner.derivative", "evolution", "--outer.learns", "rates", "--inner.signed"],
            "inner.signed: expected False with inner.derivative evolution",
        ),
        (
            ["--inner.derivative", "evolution", "--outer.learns", "rates", "--outer.first-order-share", "0.5"],
            "outer.first_order_share: expected None, because",
        ),
        (["--inner.extend", "mean"], "inner.extend: expected 'hold', because nothing else is used here"),
        (["--inner.algorithm", "maml", "--outer.rates-rate", "1"], "outer.rates_rate: expected 0.01, because"),
        (["--outer.learns", "rates", "--outer.init-rate", "1"], "outer.init_rate: expected 0.001, because"),
        (["--inner.algorithm", "reptile", "--inner.first-order", "False"], "inner.first_order: expected None, because"),
        (["--grid.steps", "7"], "grid.steps: expected (1, 5, 20), because nothing else"),
        (["--outer.first-order-share", "2"], "outer.first_order_share: expected a share"),
        (["--inner.knots", "1"], "inner.knots: expected 0"),
    ],
)
def test_choices_that_do_not_go_together(flags, message, capsys, tmp_path):
    assert message in refused(capsys, "train", *SMALL, *flags, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_same_seed_same_artifact(blobs_npz, tmp_path):
    for name in ("a", "b"):
        call("train", "--data", blobs_npz, *SMALL, "--out", tmp_path / name)
    a, b = ((tmp_path / name / "artifact" / "learner.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tasks.way", "5"], "tasks.way: family 'permuted' uses all 10 classes, got 5"),
        (["--tasks.shot", "0"], "tasks.shot: expected at least 1, got 0"),
        (["--tasks.shot", "500"], "tasks.shot + tasks.query: expected at most 50"),
        (["--data", "nothing"], "data 'nothing': expected a prepared dataset"),
        (["--data", "./no/such.csv.gz"], "data: ./no/such.csv.gz: no such file"),
        (["--data", "."], "data: .: expected a file .npz, .csv or .parquet, or the name of a prepared dataset"),
        (["--data", "nothing.npz"], "nothing.npz: expected an .npz file, found none"),
        (["--inner.rate", "-1"], "inner.rate: expected 0 < rate"),
        (["--inner.steps", "0"], "inner.steps: expected at least 1"),
        (["--outer.steps", "0"], "outer.steps: expected at least 1"),
        (["--outer.meta-batch", "0"], "outer.meta_batch: expected at least 1"),
        (["--outer.init-rate", "nan"], "outer.init_rate: expected a positive number"),
        (["--outer.optimizer", "adamm"], "outer.optimizer: expected an optax optimizer"),
        (["--outer.validate-every", "0"], "outer.validate_every"),
        (["--outer.checkpoint-every", "0"], "outer.checkpoint_every"),
        (["--evaluation.episodes", "1"], "evaluation.episodes: expected at least 2"),
        (["--grid.run", "--grid.learning-rates", "0"], "grid.learning_rates: expected positive"),
        (["--outer.optimizer", "lbfgs"], "outer.optimizer: expected an optax optimizer"),
        (["--outer.optimizer", "scale"], "outer.optimizer: expected an optax optimizer"),
        (["--evaluation.validation-episodes", "1"], "evaluation.validation_episodes: expected at least 2"),
        (["--evaluation.seed", "-1"], "evaluation.seed: expected 0 <= seed"),
        (["--grid.run", "--evaluation.steps", "1"], "evaluation.steps: expected at least inner.steps (2)"),
        (["--inner.algorithm", "reptile", "--inner.learned", "True"], "inner.learned: expected False with reptile"),
        (["--seed", "-1"], "seed: expected 0 <= seed"),
        (["--seed", "99999999999999999999"], "seed: expected 0 <= seed"),
        (["--inner.extend", "error", "--inner.algorithm", "lslr"], "evaluation.steps: expected at most the 2 trained"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(blobs_npz, tmp_path, capsys, change, message):
    before = sorted(tmp_path.iterdir())
    error = refused(capsys, "train", "--data", blobs_npz, *SMALL, *change, "--out", tmp_path / "run")
    assert message in error
    assert sorted(p for p in tmp_path.iterdir() if p.name != "cache") == before


def test_damaged_runs(tmp_path, capsys):
    assert "expected a run folder" in refused(capsys, "evaluate", tmp_path)
    (tmp_path / "config.json").write_text('{"datas": 1}')
    assert "datas: no such setting; did you mean data?" in refused(capsys, "evaluate", tmp_path)
    (tmp_path / "config.json").write_text('{"seed": "x"}')
    assert "seed: expected int, got 'x'" in refused(capsys, "evaluate", tmp_path)
    (tmp_path / "config.json").unlink()
    assert "expected a folder with metalr.json" in refused(capsys, "adapt", tmp_path, tmp_path / "x.npz")


def test_predictions_name_the_classes_of_the_task(blobs, blobs_npz, tmp_path, capsys):
    call("train", "--data", blobs_npz, *SMALL, "--out", tmp_path / "run")
    rows = [np.flatnonzero(blobs.test_labels == c)[:4] for c in (3, 7)]
    x, y = blobs.test_images[np.concatenate(rows)], np.repeat(["seven", "three"], 4)
    np.savez(tmp_path / "task.npz", support_x=x, support_y=y, query_x=x, query_y=y)
    capsys.readouterr()
    call("adapt", tmp_path / "run", tmp_path / "task.npz", "--steps", "20", "--json")
    found = json.loads(capsys.readouterr().out)
    assert set(found["predictions"]) == {"seven", "three"}
    assert found["accuracy"] == np.mean(np.array(found["predictions"]) == y)
    np.savez(tmp_path / "task.npz", support_x=x, support_y=y, query_x=x, query_y=np.array(["nine"] * 8))
    assert "expected labels of the support set, ['seven', 'three'], got nine" in refused(
        capsys, "adapt", tmp_path / "run", tmp_path / "task.npz"
    )


def test_predicting_later_is_predicting_at_once(blobs, blobs_npz, tmp_path, capsys):
    call("train", "--data", blobs_npz, *SMALL, "--out", tmp_path / "run")
    rows = [np.flatnonzero(blobs.test_labels == c)[:4] for c in (3, 7)]
    x, y = blobs.test_images[np.concatenate(rows)], np.repeat(["seven", "three"], 4)
    np.savez(tmp_path / "task.npz", support_x=x, support_y=y, query_x=x[:3])
    np.savez(tmp_path / "later.npz", x=x[:3])
    capsys.readouterr()
    call("adapt", tmp_path / "run", tmp_path / "task.npz", "--out", tmp_path / "fast.safetensors", "--json")
    at_once = json.loads(capsys.readouterr().out)["predictions"]
    call("predict", tmp_path / "run", tmp_path / "fast.safetensors", tmp_path / "later.npz", "--json")
    assert json.loads(capsys.readouterr().out)["predictions"] == at_once
    damaged = bytearray((tmp_path / "fast.safetensors").read_bytes())
    damaged[-3] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(damaged)
    for name, message in (("bad", "damaged: its content is not"), ("none", "expected a file of fine-tuned params")):
        file = tmp_path / f"{name}.safetensors"
        assert message in refused(capsys, "predict", tmp_path / "run", file, tmp_path / "later.npz")
    fast = tmp_path / "fast.safetensors"
    assert "expected an array x" in refused(capsys, "predict", tmp_path / "run", fast, tmp_path / "task.npz")


TABLE = ["--data.task-column", "store", "--data.shot", "5", "--data.query", "5", "--outer.steps", "40",
         "--evaluation.episodes", "20", "--evaluation.validation-episodes", "10"]  # fmt: skip


def test_evaluate_says_what_the_order_of_labels_does(blobs_npz, tmp_path, capsys):
    """Where labels are in random order; not where each class has its own."""
    random_labels = [*SMALL, "--tasks.family", "digits", "--tasks.way", "3", "--outer.steps", "40"]
    call("train", "--data", blobs_npz, *random_labels, "--out", tmp_path / "digits")
    call("train", "--data", blobs_npz, *SMALL, "--out", tmp_path / "permuted")
    capsys.readouterr()
    call("evaluate", tmp_path / "digits", "--orders", "3", "--json")
    found = json.loads(capsys.readouterr().out)["label_orders"]
    assert (found["orders"], found["episodes"]) == (3, 100)
    assert 0 < found["spread"] < 0.5
    call("evaluate", tmp_path / "digits")
    assert "the order of its labels alone moves a task's accuracy by" in capsys.readouterr().out
    for flags in (["digits", "--orders", "0"], ["permuted"]):
        call("evaluate", tmp_path / flags[0], *flags[1:], "--json")
        assert "label_orders" not in json.loads(capsys.readouterr().out)
    assert "orders: expected 0, or at least 2" in refused(capsys, "evaluate", tmp_path / "digits", "--orders", "1")


def test_a_table_needs_no_python(tmp_path, capsys):
    """Numbers: train, evaluate, adapt to a new store, predict later, compare; the file may move."""
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    store = np.repeat(np.arange(30), 12)
    size = rng.uniform(0, 100, 360)
    frame = pandas.DataFrame({"store": store, "size": size, "sales": 900 + size * (store % 3)})
    frame.to_csv(tmp_path / "t.csv", index=False)
    flags = ["--data", tmp_path / "t.csv", *TABLE, "--data.target", "sales", "--objective", "squared_error"]
    call("train", *flags, "--out", tmp_path / "run")
    out = capsys.readouterr()
    assert "mse: less is better" in out.out
    assert "loss of a random init: train" in out.err  # what tasks.check found
    new = frame[frame.store == 5].drop(columns="store")
    new.loc[new.index[8:], "sales"] = None
    new.to_csv(tmp_path / "new.csv", index=False)
    call(
        "adapt", tmp_path / "run", tmp_path / "new.csv", "--steps", "20", "--out", tmp_path / "f.safetensors", "--json"
    )
    predicted = json.loads(capsys.readouterr().out)["predictions"]
    assert len(predicted) == 4
    assert np.abs(np.array(predicted) - frame[frame.store == 5].sales[8:]).mean() < 60  # in the units of sales
    own = frame[frame.store == 5]
    np.savez(tmp_path / "task.npz", support_x=own[["size"]][:8], support_y=own.sales[:8], query_x=own[["size"]][8:],
             query_y=own.sales[8:])  # fmt: skip
    call("adapt", tmp_path / "run", tmp_path / "task.npz", "--steps", "20", "--json")
    scored = json.loads(capsys.readouterr().out)
    assert scored["mse"] == pytest.approx(np.square(np.array(scored["predictions"]) - own.sales[8:]).mean(), rel=1e-3)
    new[["size"]][8:].to_csv(tmp_path / "later.csv", index=False)
    assert "expected the rows of one task, got 30 in the column 'store', such as 0 and 1" in refused(
        capsys, "adapt", tmp_path / "run", tmp_path / "t.csv"
    )
    call("predict", tmp_path / "run", tmp_path / "f.safetensors", tmp_path / "later.csv", "--json")
    assert json.loads(capsys.readouterr().out)["predictions"] == pytest.approx(predicted)
    assert "data: expected images, got the table" in refused(
        capsys, "compare", tmp_path / "run", "--data", tmp_path / "t.csv", "--out", tmp_path / "compared"
    )
    (tmp_path / "t.csv").rename(tmp_path / "moved.csv")
    call("evaluate", tmp_path / "run", "--data", tmp_path / "moved.csv", "--json")
    curve = json.loads(capsys.readouterr().out)["curve"]
    assert curve == json.loads((tmp_path / "run" / "results.json").read_text())["curve"]
    assert "expected the data that" in refused(capsys, "evaluate", tmp_path / "run")


def test_a_table_of_classes_gives_their_names_back(tmp_path, capsys):
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    store = np.repeat(np.arange(30), 12)
    x = rng.normal(size=360)
    kind = np.where(x * (-1) ** store > 0, "low", np.where(rng.random(360) < 0.1, "odd", "high"))
    frame = pandas.DataFrame({"store": store, "x": x, "kind": kind})
    frame.to_csv(tmp_path / "t.csv", index=False)
    flags = ["--data", tmp_path / "t.csv", *TABLE, "--data.target", "kind"]
    call("train", *flags, "--out", tmp_path / "run")
    new = frame[(frame.store == 4) & (frame.kind != "odd")].drop(columns="store")
    new.loc[new.index[6:], "kind"] = None
    new.to_csv(tmp_path / "new.csv", index=False)
    capsys.readouterr()
    call("adapt", tmp_path / "run", tmp_path / "new.csv", "--json")
    assert set(json.loads(capsys.readouterr().out)["predictions"]) <= {"low", "high"}  # never one that it was not shown
    given = frame[(frame.store == 4) & (frame.kind == "low")]
    support = given.x.to_numpy(np.float32)[:4, None]
    np.savez(tmp_path / "named.npz", support_x=support, support_y=given.kind.to_numpy(str)[:4], query_x=support[:2])
    call("adapt", tmp_path / "run", tmp_path / "named.npz", "--json")
    assert json.loads(capsys.readouterr().out)["predictions"] == ["low", "low"]
    np.savez(tmp_path / "new.npz", support_x=support, support_y=np.array(["new"] * 4), query_x=support[:2])
    assert "support_y: expected one of the classes ['high', 'low', 'odd'], got 'new'" in refused(
        capsys, "adapt", tmp_path / "run", tmp_path / "new.npz"
    )
    frame.to_csv(tmp_path / "index.csv")
    for change, message in (
        (["--data.target", "kinds"], "data.target: expected columns of t.csv"),
        (["--objective", "squared_error"], "such as 'low'; for classes leave --objective out"),
        (["--data", tmp_path / "index.csv"], "expected a name for every column, got 'Unnamed: 0', such as the row"),
        (
            ["--data", tmp_path / "t.tsv"],
            "nothing else is used here (only with --data FILE.csv or FILE.parquet, and not with ",
        ),
        (["--objective", "binary_cross_entropy"], "objective: expected two classes"),
        (["--objective", "hinge"], "objective: expected one of"),
        (["--tasks.shot", "3"], "tasks.shot: expected 1, because nothing else is used here (a table's tasks"),
        (["--model.name", "conv4"], "model.name: expected mlp with a table"),
    ):
        assert message in refused(capsys, "train", *flags, *change, "--out", tmp_path / "none")
    assert "data.target: expected ()" in refused(capsys, "train", "--data.target", "kind")
    assert "objective: expected cross_entropy with images" in refused(capsys, "train", "--objective", "squared_error")
    assert not (tmp_path / "none").exists()


def test_a_run_again_with_one_thing_changed(blobs_npz, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call("train", "--data", blobs_npz, *SMALL, "--out", "runs/first")
    call("train", "--config", "runs/first", "--out", "runs/same")
    for name in ("metrics.jsonl", "artifact/learner.safetensors"):
        assert (tmp_path / "runs/first" / name).read_bytes() == (tmp_path / "runs/same" / name).read_bytes()
    (tmp_path / "elsewhere").mkdir()
    shutil.move(blobs_npz, tmp_path / "elsewhere" / "moved.npz")
    call("train", "--config", "runs/first/config.json", "--data", "elsewhere/moved.npz", "--outer.steps", "3",
         "--out", "runs/short")  # fmt: skip
    capsys.readouterr()
    call("runs", "diff", "runs/first", "runs/same", "runs/short")
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.split()}
    assert lines["outer.steps"] == ["6", "6", "3"]
    assert lines["status"] == ["finished"] * 3
    call("runs", "show", "runs/short", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"]["outer.steps"] == 3
    assert len(shown["data_sha256"]) == 64
    assert {"python", "jax", "optax", "metalr"} == set(shown["versions"])
    assert "got both" in refused(capsys, "train", "--config", "runs/first", "--resume", "runs/first")
    assert "expected a run folder" in refused(capsys, "train", "--config", "runs/none")
    (tmp_path / "runs" / "first" / "notes.txt").write_text("mine")
    assert "found ['notes.txt']" in refused(capsys, "runs", "rm", "runs/first", "--yes")
    call("runs", "rm", "runs/same", "runs/short", "--yes")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["first"]


def test_a_run_again_is_of_the_same_data_by_content(blobs, tmp_path, capsys, monkeypatch):
    for name, images in (("here", blobs.train_images), ("there", 255 - blobs.train_images)):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "d.npz", images=images, labels=blobs.train_labels, test_images=blobs.test_images,
                 test_labels=blobs.test_labels)  # fmt: skip
    monkeypatch.chdir(tmp_path / "here")
    call("train", "--data", "d.npz", *SMALL, "--out", tmp_path / "run")
    monkeypatch.chdir(tmp_path / "there")  # where other data has the same name
    call("train", "--config", tmp_path / "run", "--out", tmp_path / "again")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "again" / "metrics.jsonl").read_bytes()
    (tmp_path / "here" / "d.npz").unlink()
    capsys.readouterr()
    assert "expected the data that" in refused(capsys, "train", "--config", tmp_path / "run", "--out", tmp_path / "no")


def test_removing_runs(tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.TrainConfig().to_json()))
    (tmp_path / "run" / ".artifact-tmp-x").mkdir()  # of a kill
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert "expected a run folder, got a link" in refused(capsys, "runs", "rm", tmp_path / "link", "--yes")
    assert "expected one or more run folders" in refused(capsys, "runs", "rm", "--yes")
    monkeypatch.chdir(tmp_path)
    call("runs", "rm", "run", tmp_path / "run", "--yes")  # the same one twice
    assert not (tmp_path / "run").exists()


def test_a_run_that_failed_says_so(blobs_npz, tmp_path, capsys):
    flags = ["train", "--data", blobs_npz, *SMALL, "--outer.init-rate", "1e30", "--outer.clip", "None", "--out"]
    with pytest.raises(SystemExit):
        call(*flags, tmp_path / "bad")
    capsys.readouterr()
    call("runs", "list", tmp_path, "--json")
    (run,) = json.loads(capsys.readouterr().out)
    assert run["status"] == "failed"
    call("runs", "show", tmp_path / "bad")
    assert "outer step" in capsys.readouterr().out


def test_a_table_of_yes_and_no(tmp_path, capsys):
    """One output, two names; and a head for any number of classes."""
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    store = np.repeat(np.arange(30), 12)
    x = rng.normal(size=360)
    frame = pandas.DataFrame({"store": store, "x": x, "y": np.where(x * (-1) ** store > 0, "yes", "no")})
    frame.to_csv(tmp_path / "t.csv", index=False)
    flags = ["train", "--data", tmp_path / "t.csv", *TABLE, "--data.target", "y", "--out"]
    new = frame[frame.store == 4].drop(columns="store")
    new.loc[new.index[8:], "y"] = None
    new.to_csv(tmp_path / "new.csv", index=False)
    later = new[8:].assign(y="never seen")  # what is asked about needs no known target
    later.to_csv(tmp_path / "later.csv", index=False)
    for name, own in (
        ("binary", ["--objective", "binary_cross_entropy"]),
        ("shared", ["--inner.head-start", "shared"]),
    ):
        call(*flags, tmp_path / name, *own)
        capsys.readouterr()
        call("adapt", tmp_path / name, tmp_path / "new.csv", "--json", "--out", tmp_path / f"{name}.safetensors")
        predicted = json.loads(capsys.readouterr().out)["predictions"]
        assert len(predicted) == 4
        assert set(predicted) <= {"yes", "no"}
        call("predict", tmp_path / name, tmp_path / f"{name}.safetensors", tmp_path / "later.csv", "--json")
        assert json.loads(capsys.readouterr().out)["predictions"] == predicted
    assert "inner.head_start: expected learned with binary_cross_entropy" in refused(
        capsys, *flags, tmp_path / "no", "--objective", "binary_cross_entropy", "--inner.head-start", "zero"
    )


def test_show_needs_no_code_of_a_custom_network(tmp_path, capsys):
    model = dataclasses.replace(models.mlp(3, (8, 8, 1), widths=(6,)), name="custom", settings={})
    spec = hyperparameters.RatesSpec("layer", steps=3)
    meta = outer.initial(model, spec, jax.random.key(0))
    learned = metalr.Learner(model, spec, meta.init, hyperparameters.actual(spec, meta.rates))
    metalr.save(tmp_path / "run" / "artifact", learned)
    (tmp_path / "run" / "config.json").write_text("{}")
    call("show", tmp_path / "run")
    assert "dense_0" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "artifact")
    said = refused(capsys, "show", tmp_path / "run")
    assert "expected a finished run, found one without an artifact; go on with: metalr train --resume" in said


def test_a_mistyped_flag_is_answered_once(capsys):
    with pytest.raises(SystemExit):
        call("train", "--outer.stepz", "1")
    assert capsys.readouterr().err.count("--outer.steps INT") == 1


def test_data_commands(blobs_npz, tmp_path, capsys):
    call("data", "list")
    assert "mnist12k: 10,000 train + 2,000 test" in capsys.readouterr().out
    call("data", "import", blobs_npz, "--name", "mine")
    capsys.readouterr()
    call("data", "list", "--json")
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["mnist12k", "mine"]
    assert "another name" in refused(capsys, "data", "import", blobs_npz, "--name", "mnist12k")
    folder = tmp_path / "clothes"
    folder.mkdir()
    for kind, array in (("images-idx3", np.zeros((30, 8, 8), np.uint8)), ("labels-idx1", np.arange(30) % 3)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (folder / f"train-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    call("data", "import", folder)
    assert "clothes: 27 train + 3 test images, 8x8x1, 3 classes" in capsys.readouterr().out
    assert "size, gray: expected a folder of pictures" in refused(capsys, "data", "import", folder, "--gray")
    assert "found none" in refused(capsys, "data", "prepare", "mnist", "--idx", "nowhere")


def test_resume_from_the_command_line(blobs_npz, tmp_path, capsys):
    call("train", "--data", blobs_npz, *SMALL, "--out", tmp_path / "whole")
    call("train", "--data", blobs_npz, *SMALL, "--out", tmp_path / "cut")
    capsys.readouterr()
    (tmp_path / "cut" / "results.json").unlink()  # as if it had been killed just before the end
    assert "outer.steps: expected 6 as in" in refused(
        capsys, "train", "--resume", tmp_path / "cut", "--outer.steps", "9"
    )
    assert "is finished" in refused(capsys, "train", "--resume", tmp_path / "whole")
    elsewhere = "--out", tmp_path / "other"
    assert "out: expected none beside --resume" in refused(capsys, "train", "--resume", tmp_path / "cut", *elsewhere)
    assert "expected a run folder" in refused(capsys, "train", "--resume", tmp_path / "none")
    call("train", f"--resume={tmp_path / 'cut'}", "--evaluation.episodes", "12", "--json")
    assert json.loads(capsys.readouterr().out)["config"]["evaluation"]["episodes"] == 12


def test_a_comparison_goes_on_with_its_own_settings_only(tmp_path, capsys):
    for change in (["--tasks", "50"], ["--pretrained", str(tmp_path)], [str(tmp_path)]):
        assert "resume: expected no runs and no settings" in refused(
            capsys, "compare", *change, "--resume", tmp_path / "comparison"
        )


def test_the_defaults_of_train_fit_together():
    setup.set_up(config.TrainConfig())


def test_mistyped_settings_are_answered_with_the_nearest(tmp_path, capsys):
    for mistyped, meant in (("--outer.stepps", "--outer.steps"), ("--inner.algoritm", "--inner.algorithm")):
        with pytest.raises(SystemExit) as caught:
            call("train", mistyped, "3")
        assert caught.value.code == 2
        assert meant in capsys.readouterr().err
    for mistyped, message in (
        ({"outer": {"metabatch": 3}}, r"outer.metabatch: no such setting; did you mean outer.meta_batch\?"),
        ({"tasks": {"way": True}}, "tasks.way: expected int, got True"),
        ({"grid": {"steps": 3}}, "grid.steps: expected a list, got 3"),
        ({"grid": {"steps": ["a"]}}, "grid.steps: expected int, got 'a'"),
        ({"model": 3}, "model: expected an object of settings, got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            files.from_json(mistyped)


def test_config_round_trip():
    assert files.from_json(json.loads(json.dumps(config.QUICKSTART.to_json()))) == config.QUICKSTART


def test_a_run_that_nobody_named_is_named_by_its_settings():
    settings = config.TrainConfig(seed=3)
    name = files.run_name(settings)
    assert name.startswith("mnist12k-digits-meta_sgd_layer-seed3-")
    assert files.run_name(dataclasses.replace(settings, out=Path("x"), overwrite=True)) == name
    assert files.run_name(dataclasses.replace(settings, outer=config.OuterConfig(steps=7))) != name
    table = dataclasses.replace(settings, data="some/stores.csv", table=config.TableConfig(task_column="store"))
    assert files.run_name(table).startswith("stores-meta_sgd_layer-seed3-")


@pytest.mark.smoke
def test_help_imports_no_jax_and_is_fast():
    code = "import sys; from metalr import cli\ntry: cli.main(['{}', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'jax' not in sys.modules and 'tensorflow_datasets' not in sys.modules"
    for command in ("quickstart", "train"):
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code.format(command)], check=True, capture_output=True)
            seconds.append(time.perf_counter() - began)
        assert min(seconds) < 2, seconds  # a bound for slow machines; the measured figure is in benchmarks/results


def test_the_version_is_said(capsys):
    call("--version")
    assert capsys.readouterr().out.startswith(f"metalr {metalr.__version__} (jax {jax.__version__}, flax ")


@pytest.mark.smoke
def test_quickstart_in_small(tmp_path, capsys):
    """The real command on the bundled data, with less of everything."""
    call(
        "quickstart", "--outer.steps", "60", "--evaluation.episodes", "16", "--evaluation.validation-episodes", "8",
        "--grid.steps", "5", "--grid.learning-rates", "0.01", "--grid.batch-sizes", "1000", "--out", tmp_path / "q",
    )  # fmt: skip
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "q" / "results.json").read_text())["comparison"]
    assert {"learned init + learned rates", "random init + grid, best cell at 5 steps"} <= {r["method"] for r in rows}
    # Which is better is measured by benchmarks/quickstart.py; here: that the table says what was found.
    for row in rows:
        lines = [line for line in printed.splitlines() if line.startswith(row["method"])]
        line = next(line for line in lines if f" {row['steps']}  " in line)
        assert f"{100 * row['accuracy']:.2f} %" in line
        assert 0 <= row["accuracy"] <= 1


def test_a_reader_that_goes_away_is_no_error():
    code = "import sys; sys.argv[0] = 'metalr'; from metalr import cli; cli.main({})"
    for argv in (["--help"], ["train", "--help"]):
        child = subprocess.Popen(
            [sys.executable, "-c", code.format(argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == 141
        child.stderr.close()
