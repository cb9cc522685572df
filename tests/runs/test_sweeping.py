"""Sweeps: what is run, side by side, after kills and failures, and what is chosen; with a stand-in for training."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types

import numpy as np
import pytest

from metalr import report
from metalr.config import OuterConfig, SlurmConfig, SweepConfig, TrainConfig
from metalr.config.files import read_settings
from metalr.errors import ConfigError, LockedError, StoppedError
from metalr.report import runs as listed
from metalr.runs import launchers, sweeping, workers
from metalr.runs.progress import ConsoleReporter
from metalr.runs.sweeping import Range, Sweep
from metalr.storage import folders

QUIET = ConsoleReporter(quiet=True)
BASE = TrainConfig(outer=OuterConfig(steps=7))
# Stands in for `metalr train`: logs each start, and is as good as outer.init_rate is near to 0.01.
STAND_IN = """
import json, os, pathlib, signal, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(given.get("--resume") or given["--out"])
out.mkdir(parents=True, exist_ok=True)
config = json.loads(pathlib.Path(given["--config"] if "--config" in given else out / "config.json").read_text())
(out / "config.json").write_text(json.dumps(config))
with open(os.environ["STARTS"], "a") as file:
    file.write(f"{out.name} {'resume' if '--resume' in given else 'begin'}\\n")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
meta_batch = config["outer"]["meta_batch"]
if meta_batch == 2 and "--resume" not in given:
    os.kill(os.getpid(), signal.SIGKILL)
if meta_batch == 3:
    print("metalr: error: outer.meta_batch: expected another number")
    sys.exit(2)
time.sleep(60 if meta_batch == 4 else float(os.environ.get("SLEEP", 0)))
score = 1 - abs(config["outer"]["init_rate"] - 0.01) - 0.001 * config["seed"]
training = {"validation_accuracy": score, "example_gradients": 10, "seconds": 1.0, "compile_seconds": 0.5}
if meta_batch == 5:
    training["validation_accuracy"] = None
results = {"metric": {"name": "accuracy", "maximise": True}, "training": training, "config": config,
           "curve": [{"steps": config["inner"]["steps"], "accuracy": score - 0.1}]}
(out / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Runs end at once. Gives `starts()`: the starts so far."""
    script = tmp_path / "train.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(launchers, "TRAIN", (sys.executable, str(script)))
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(sweeping.page, "write", lambda path, targets: path.write_text(""))
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))
    file = tmp_path / "starts"
    return lambda: file.read_text().split("\n")[:-1] if file.exists() else []


def test_every_combination_is_run_for_every_seed_and_the_best_is_kept(stand_in, tmp_path):
    sweep = Sweep(BASE, {"outer.init_rate": [0.003, 0.01], "model.widths": [[8], [8, 4]]}, (0, 1))
    config = SweepConfig(workers=3, out=tmp_path / "s")
    results = sweeping.run(sweep, config, reporter=QUIET)
    assert len(results["rows"]) == 4
    assert len(stand_in()) == len(set(stand_in())) == 8
    best = results["best"]
    assert best["point"] == {"outer.init_rate": 0.01, "model.widths": [8]}
    assert best["validation"] == pytest.approx(1 - 0.0005)
    assert best["validation_ci95_over_seeds"] == pytest.approx(0.0005 * 12.7062, rel=1e-4)
    assert best["test"] == pytest.approx(0.9 - 0.0005)
    assert results["example_gradients"] == 80
    kept = read_settings(tmp_path / "s" / "best.json")
    assert (kept.outer.init_rate, kept.model.widths, kept.outer.steps) == (0.01, (8,), 7)
    text = report.tables.sweep_text(results)
    assert "best on meta-validation tasks: outer.init_rate 0.01, model.widths 8" in text
    assert text.splitlines()[1].startswith("0.01")  # the best first
    found = listed.find(tmp_path / "s")
    assert [run.kind for run in found].count("run") == 8
    whole = listed.read(tmp_path / "s")
    assert (whole.kind, whole.status) == ("sweep", "finished")
    with pytest.raises(ConfigError, match="this sweep is finished"):
        sweeping.resume(tmp_path / "s", reporter=QUIET)


def test_a_killed_run_goes_on_and_a_failed_one_does_not_stop_the_others(stand_in, tmp_path):
    sweep = Sweep(BASE, {"outer.meta_batch": [1, 2, 3]})
    results = sweeping.run(sweep, SweepConfig(workers=2, out=tmp_path / "s"), reporter=QUIET)
    assert [row["failed"] for row in results["rows"]] == [0, 0, 1]
    killed = [line for line in stand_in() if line.startswith("meta_batch=2")]
    assert [line.split()[1] for line in killed] == ["begin", "resume"]
    (error,) = results["failed"].values()
    assert "exit code 2" in error
    assert "outer.meta_batch: expected another number" in error
    assert "1 failed" in report.tables.sweep_text(results)
    ended = [json.loads(line) for line in (tmp_path / "s" / "sweep.jsonl").read_text().splitlines()]
    assert sorted(row["attempts"] for row in ended) == [1, 1, 2]


def test_runs_that_failed_are_taken_up_again_when_asked(stand_in, tmp_path):
    sweep, place = Sweep(BASE, {"outer.meta_batch": [1, 3]}), tmp_path / "s"
    first = sweeping.run(sweep, SweepConfig(out=place), reporter=QUIET)
    assert [row["failed"] for row in first["rows"]] == [0, 1]
    with pytest.raises(ConfigError, match="this sweep is finished .*--retry-failed"):
        sweeping.resume(place, reporter=QUIET)
    script = tmp_path / "train.py"
    script.write_text(STAND_IN.replace("if meta_batch == 3", "if False"))  # what was in the way is gone
    again = sweeping.resume(place, retry_failed=True, reporter=QUIET)
    assert [row["failed"] for row in again["rows"]] == [0, 0]
    assert len(stand_in()) == 3  # the one that had finished was not run again
    with pytest.raises(ConfigError, match="retry_failed: .*: expected a run that failed, found none"):
        sweeping.resume(place, retry_failed=True, reporter=QUIET)


def test_a_run_without_a_finite_score_does_not_stop_the_others(stand_in, tmp_path):
    sweep = Sweep(BASE, {"outer.meta_batch": [5, 1]})
    results = sweeping.run(sweep, SweepConfig(out=tmp_path / "s"), reporter=QUIET)
    assert [row["failed"] for row in results["rows"]] == [1, 0]
    assert results["best"]["point"] == {"outer.meta_batch": 1}
    assert [*results["failed"].values()] == ["no validation gave a finite accuracy"]


def test_a_sweep_is_not_overwritten_while_one_of_its_runs_goes_on(tmp_path):
    run = tmp_path / "s" / "runs" / "one"
    run.mkdir(parents=True)
    (tmp_path / "s" / "config.json").write_text("{}")
    with folders.locked(run), pytest.raises(LockedError, match="in use by the run with pid"):
        sweeping.run(Sweep(BASE, {}, (0, 1)), SweepConfig(out=tmp_path / "s", overwrite=True), reporter=QUIET)
    assert run.is_dir()


def test_a_run_that_takes_too_long_is_stopped(stand_in, tmp_path):
    sweep = Sweep(BASE, {"outer.meta_batch": [4, 1]})
    results = sweeping.run(sweep, SweepConfig(timeout=1.0, out=tmp_path / "s"), reporter=QUIET)
    assert [row["failed"] for row in results["rows"]] == [1, 0]
    assert list(results["failed"].values()) == ["not finished after 1 s"]
    assert len(stand_in()) == 2


def test_a_sweep_that_is_stopped_goes_on_with_nothing_doubled(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("SLEEP", "0.3")
    sweep = Sweep(BASE, {"outer.init_rate": [0.001, 0.002, 0.003, 0.004]})
    ended = tmp_path / "s" / "sweep.jsonl"

    def stop():
        while not ended.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(StoppedError, match="go on with: metalr sweep --resume"):
        sweeping.run(sweep, SweepConfig(workers=2, out=tmp_path / "s"), reporter=QUIET)
    thread.join()
    done = {json.loads(line)["name"] for line in ended.read_text().splitlines()}
    assert 0 < len(done) < 4
    before = len(stand_in())
    results = sweeping.resume(tmp_path / "s", workers=4, reporter=QUIET)
    assert [row["failed"] for row in results["rows"]] == [0] * 4
    again = {line.split()[0] for line in stand_in()[before:]}
    assert not again & done
    assert len(ended.read_text().splitlines()) == 4


def test_a_run_left_over_by_a_killed_sweep_is_waited_for(stand_in, tmp_path):
    """The sweep died, its run goes on by itself: it must not be begun a second time."""
    sweep = Sweep(BASE, {"outer.init_rate": [0.001]}, (0, 1))
    out = tmp_path / "s"
    names = [
        sweeping.name_of({"outer.init_rate": 0.001}, seed, sweep.config({"outer.init_rate": 0.001}, seed))
        for seed in (0, 1)
    ]
    folder = out / "runs" / names[0]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    facts = {"sweep": sweep.to_json(), "config": dataclasses.replace(SweepConfig(), out=out).to_json()}
    (out / "config.json").write_text(json.dumps(facts))
    finished = {
        "metric": {"name": "accuracy", "maximise": True}, "curve": [{"steps": 5, "accuracy": 0.5}],
        "training": {"validation_accuracy": 0.25, "example_gradients": 1, "seconds": 1.0, "compile_seconds": 1.0},
    }  # fmt: skip
    orphan = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(
            f"""
            import json, pathlib, time
            from metalr.storage import folders
            folder = pathlib.Path({str(folder)!r})
            with folders.locked(folder):
                print("locked", flush=True)
                time.sleep(1)
                (folder / "results.json").write_text({json.dumps(json.dumps(finished))})
            """
        )],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    with orphan:
        assert orphan.stdout.readline() == b"locked\n"
        results = sweeping.resume(out, reporter=QUIET)
    assert [line.split()[0] for line in stand_in()] == [names[1]]
    assert results["rows"][0]["seeds"] == [0, 1]
    assert results["rows"][0]["validation"] == pytest.approx((0.25 + 1 - 0.009 - 0.001) / 2)


def test_random_draws_depend_on_the_seed_and_the_number_alone():
    axes = {"outer.init_rate": Range(1e-4, 1e-2), "outer.meta_batch": Range(2, 9), "model.name": ["mlp", "rnn"]}
    config = SweepConfig(sampler="random", trials=60)
    drawn = list(sweeping._points(Sweep(BASE, axes), config, list))
    assert drawn == list(sweeping._points(Sweep(BASE, axes), config, list))
    assert drawn[:5] == list(sweeping._points(Sweep(BASE, axes), dataclasses.replace(config, trials=5), list))
    rates = np.array([point["outer.init_rate"] for point in drawn])
    assert 1e-4 <= rates.min() < 3e-4 < 3e-3 < rates.max() <= 1e-2
    assert abs(np.log10(rates).mean() + 3) < 0.25  # log-uniform
    batches = {point["outer.meta_batch"] for point in drawn}
    assert batches <= set(range(2, 10))
    assert all(isinstance(batch, int) for batch in batches)
    assert {point["model.name"] for point in drawn} == {"mlp", "rnn"}


def test_a_range_is_whole_where_the_setting_is():
    config = SweepConfig(sampler="random", trials=20)
    drawn = sweeping._points(Sweep(BASE, {"model.dropout": Range(0, 1), "outer.meta_batch": Range(2, 9)}), config, list)
    points = list(drawn)
    assert len({point["model.dropout"] for point in points}) == 20
    assert {type(point["outer.meta_batch"]) for point in points} == {int}


def test_tpe_goes_by_the_scores_on_validation_tasks(stand_in, tmp_path, monkeypatch):
    axes = {"outer.init_rate": Range(1e-4, 1.0), "model.name": ["mlp"]}
    config = SweepConfig(sampler="tpe", trials=16, out=tmp_path / "s")
    told = []
    asked = sweeping._asked
    monkeypatch.setattr(sweeping, "_asked", lambda *given: told.append(given[-1]) or asked(*given))
    results = sweeping.run(Sweep(BASE, axes, (0, 1)), config, reporter=QUIET)
    assert len(results["rows"]) == 16
    assert [len(known) for known in told] == list(range(16))  # with one worker, all that was run before
    for point, score in told[-1]:
        assert score == pytest.approx(1 - abs(point["outer.init_rate"] - 0.01) - 0.0005)
    assert results["best"]["validation"] == max(row["validation"] for row in results["rows"])
    again = sweeping.run(Sweep(BASE, axes, (0, 1)), dataclasses.replace(config, out=tmp_path / "t"), reporter=QUIET)
    assert [row["point"] for row in again["rows"]] == [row["point"] for row in results["rows"]]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_no_combination_is_drawn_twice(sampler, stand_in, tmp_path):
    """Three combinations and eight trials: each is run once, side by side, and that is all there is."""
    sweep = Sweep(BASE, {"outer.init_rate": [0.001, 0.002, 0.003]}, (0, 1))
    config = SweepConfig(sampler=sampler, trials=8, workers=2, out=tmp_path / "s")
    results = sweeping.run(sweep, config, reporter=QUIET)
    assert sorted(row["point"]["outer.init_rate"] for row in results["rows"]) == [0.001, 0.002, 0.003]
    assert all(row["seeds"] == [0, 1] and not row["failed"] for row in results["rows"])
    assert len(stand_in()) == 6


def test_a_resumed_sweep_takes_its_combinations_and_names_from_what_was_drawn(stand_in, tmp_path):
    """TPE would ask for others now, and another version would name the folders otherwise."""
    sweep = Sweep(BASE, {"outer.init_rate": Range(1e-4, 1.0)})
    out = tmp_path / "s"
    (out / "runs").mkdir(parents=True)
    config = SweepConfig(sampler="tpe", trials=2, out=out)
    (out / "config.json").write_text(json.dumps({"sweep": sweep.to_json(), "config": config.to_json()}))
    (out / "drawn.jsonl").write_text(json.dumps({"point": {"outer.init_rate": 0.5}, "names": ["old-name"]}) + "\n")
    results = sweeping.resume(out, reporter=QUIET)
    assert results["rows"][0]["point"] == {"outer.init_rate": 0.5}
    assert stand_in()[0].startswith("old-name ")
    assert len(results["rows"]) == 2


def test_a_run_that_was_begun_twice_is_waited_for(stand_in, tmp_path, monkeypatch):
    """The first one takes its lock some seconds after it began: until then nobody sees it."""
    script = tmp_path / "locks.py"
    script.write_text(
        "print('metalr: error: out: x: in use by the run with pid 1 on y; choose another folder'); exit(2)"
    )
    real, begin, starts = launchers.TRAIN, launchers.start, []

    def start(*given):
        starts.append(given)
        monkeypatch.setattr(launchers, "TRAIN", real if len(starts) > 1 else (sys.executable, str(script)))
        return begin(*given)

    monkeypatch.setattr(launchers, "start", start)
    results = sweeping.run(
        Sweep(BASE, {"outer.init_rate": [0.1, 0.2]}), SweepConfig(out=tmp_path / "s"), reporter=QUIET
    )
    assert [row["failed"] for row in results["rows"]] == [0, 0]
    assert len(starts) == 3


def test_scores_of_different_tasks_are_not_ranked(stand_in, tmp_path):
    sweep = Sweep(BASE, {"tasks.shot": [1, 5]})
    results = sweeping.run(sweep, SweepConfig(out=tmp_path / "s"), reporter=QUIET)
    assert results["best"] is None
    assert not (tmp_path / "s" / "best.json").exists()
    assert "no best one: tasks.shot change what a score means" in report.tables.sweep_text(results)
    with pytest.raises(ConfigError, match="sampler: expected grid or random with"):
        sweeping.run(sweep, SweepConfig(sampler="tpe", trials=2, out=tmp_path / "t"), reporter=QUIET)


@pytest.mark.parametrize(
    ("axes", "changes", "message"),
    [
        ({}, {}, "sweep: expected a setting with values, or several seeds"),
        ({"outer.init_rates": [1.0]}, {}, "outer.init_rates: no such setting"),
        ({"outer.init_rate": [0.1, "x"]}, {}, "outer.init_rate: expected float, got 'x'"),
        ({"outer.init_rate": [0.1, 0.1]}, {}, "outer.init_rate: expected different values"),
        ({"outer.learns": ["both", "all"]}, {}, "outer.learns: expected one of"),
        (
            {"outer.init_rate": Range(0.1, 1.0)},
            {},
            "outer.init_rate: expected values with --sampler grid, got the range",
        ),
        ({"outer.init_rate": Range(1.0, 0.1)}, {"sampler": "random", "trials": 2}, "with LOW < HIGH, got 1..0.1"),
        ({"outer.init_rate": [0.1, 1.0]}, {"trials": 2}, "trials: expected None with grid"),
        ({"outer.init_rate": [0.1, 1.0]}, {"sampler": "random"}, "trials: expected a number, got None"),
        ({"outer.init_rate": [0.1, 1.0]}, {"workers": 0}, "workers: expected more than 0, got 0"),
        ({"outer.init_rate": [0.1, 1.0]}, {"sampler": "bayes"}, "sampler: expected one of"),
        ({"seed": [1, 2]}, {}, "axes: expected settings that runs share, got 'seed'; seeds are given as `seeds`"),
        ({"outer.steps.x": [1, 2]}, {}, "outer.steps.x: no such setting"),
        ({"outer.init_rate": [0.1, 1.0]}, {"sampler_seed": -1}, "sampler_seed: expected 0 <= seed < "),
    ],
)
def test_refusals_come_before_anything_is_written(axes, changes, message, tmp_path):
    config = dataclasses.replace(SweepConfig(out=tmp_path / "s"), **changes)
    with pytest.raises(ConfigError, match=message):
        sweeping.run(Sweep(BASE, axes), config, reporter=QUIET)
    assert not (tmp_path / "s").exists()
    with pytest.raises(ConfigError, match="resume: .*: expected a sweep, found none"):
        sweeping.resume(tmp_path, reporter=QUIET)


def test_a_document_of_experiments_is_a_base(tmp_path):
    document = tmp_path / "mine.py"
    document.write_text("from metalr.config import TrainConfig\nCONFIG = TrainConfig(seed=3)\n")
    assert sweeping.base_of(document).seed == 3
    document.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="expected a document with CONFIG = "):
        sweeping.base_of(document)


def test_runs_go_as_jobs_through_submitit(stand_in, tmp_path):
    """submitit's executor for this machine in place of Slurm's: the same path but for sbatch."""
    sweep = Sweep(BASE, {"outer.meta_batch": [1, 2, 3]})
    slurm = SlurmConfig(cluster="local", minutes=2)
    config = SweepConfig(launcher="slurm", slurm=slurm, workers=3, out=tmp_path / "s")
    results = sweeping.run(sweep, config, reporter=QUIET)
    assert [row["failed"] for row in results["rows"]] == [0, 0, 1]
    assert "expected another number" in next(iter(results["failed"].values()))
    killed = [line.split()[1] for line in stand_in() if line.startswith("meta_batch=2")]
    assert killed == ["begin", "resume"]


def test_a_job_that_never_started_has_no_words(tmp_path):
    trial, process = types.SimpleNamespace(name="a"), types.SimpleNamespace(returncode=75)
    worker = types.SimpleNamespace(trials=[trial], process=process, began=time.perf_counter())
    assert re.fullmatch(r"exit code 75 after .*: nothing", workers._reason(worker, tmp_path))


def test_the_script_of_a_job(tmp_path):
    slurm = SlurmConfig(
        partition="gpu", account="lab", minutes=90, gpus=2, cores=8, memory="16GB", setup=("module load cuda",),
        nodes=2, processes=4,
    )  # fmt: skip
    config = SweepConfig(launcher="slurm", slurm=slurm, workers=3, out=tmp_path / "s")
    text = sweeping.plan(Sweep(BASE, {"outer.init_rate": [0.1, 0.2]}, (0, 1)), config)
    for line in (
        "--partition=gpu", "--account=lab", "--time=90", "--gpus-per-node=2", "--cpus-per-task=8", "--mem=16GB",
        "--nodes=2", "--ntasks-per-node=4", "--array=0-3%3",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in text
    assert "\nmodule load cuda\n" in text
    assert "4 runs, 3 at a time" in text
    alone = dataclasses.replace(config, slurm=dataclasses.replace(slurm, nodes=1, processes=1), seeds_together=True)
    text = sweeping.plan(Sweep(BASE, {"outer.init_rate": [0.1, 0.2, 0.3]}, (0, 1)), alone)
    assert "6 runs in 3 programs of 2 seeds, 3 at a time" in text
    assert "#SBATCH --array=0-2%3\n" in text
    with pytest.raises(ConfigError, match="loggers: expected none of"):
        sweeping.plan(Sweep(dataclasses.replace(BASE, loggers=("wandb",)), {}, (0, 1)), alone)
    assert not (tmp_path / "s").exists()
    with pytest.raises(ConfigError, match="slurm: expected nothing of it without --launcher slurm"):
        sweeping.plan(Sweep(BASE, {}, (0, 1)), dataclasses.replace(config, launcher="local"))
    with pytest.raises(ConfigError, match="expected a machine with Slurm's commands"):
        launchers.executor(tmp_path / "x", config)
    with pytest.raises(ConfigError, match="slurm.nodes: expected at least 1, got 0"):
        sweeping.plan(Sweep(BASE, {}, (0, 1)), dataclasses.replace(config, slurm=SlurmConfig(nodes=0)))


def test_a_plan_says_which_runs_would_fail():
    sweep = Sweep(BASE, {"outer.learns": ["both", "init"], "outer.rates_rate": [0.01, 0.02]}, (0, 1))
    lines = sweeping.plan(sweep, SweepConfig()).splitlines()
    failing = [i for i, line in enumerate(lines) if line.startswith("  would fail: outer.rates_rate: expected 0.01")]
    assert [lines[i - 1].startswith("learns=init,rates_rate=0.02,seed=") for i in failing] == [True, True]
    assert lines[-1] == "8 runs, 1 at a time"


def test_the_processes_of_a_job_are_one_run(stand_in, tmp_path, monkeypatch):
    """submitit's executor for this machine, whose processes have no SLURM_ variables to find each other by."""
    script = tmp_path / "who.py"
    names = "JAX_PROCESS_ID", "JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS"
    script.write_text(
        "import os\n"
        f"with open(os.environ['STARTS'], 'a') as file: print(*(os.environ[n] for n in {names}), file=file, flush=True)"
    )
    monkeypatch.setattr(launchers, "TRAIN", (sys.executable, str(script)))
    slurm = SlurmConfig(cluster="local", minutes=2, processes=2)
    config = SweepConfig(launcher="slurm", slurm=slurm, attempts=1, out=tmp_path / "s")
    sweeping.run(Sweep(BASE, {}, (0,)), config, reporter=QUIET)
    found = [line.split() for line in stand_in()]
    assert sorted(number for number, *_ in found) == ["0", "1"]
    assert {tuple(rest) for _, *rest in found} == {("2", found[0][2])}
    assert found[0][2].startswith("127.0.0.1:")
    assert launchers.joined({"SLURM_STEP_NUM_TASKS": "2"}, 0, 2, "7") == {}


def test_jobs_of_a_killed_sweep_are_taken_back(tmp_path, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scancel").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/cancelled\n')
    (tools / "scancel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    jobs = tmp_path / "logs" / launchers.SLURM / launchers.JOBS
    jobs.parent.mkdir(parents=True)
    jobs.write_text("17_0\n17_1\n")
    launchers.cancel_left(tmp_path / "logs")
    launchers.cancel_left(tmp_path / "logs")
    assert (tmp_path / "cancelled").read_text() == "--quiet 17_0 17_1\n"


TOGETHER = """
import json, os, pathlib, sys
configs = [json.loads(pathlib.Path(file).read_text()) for file in sys.argv[1:]]
with open(os.environ["STARTS"], "a") as file:
    file.write(" ".join(pathlib.Path(config["out"]).name for config in configs) + "\\n")
for config in configs:
    out = pathlib.Path(config["out"])
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config))
    if config["outer"]["meta_batch"] == 2 and config["seed"] == 1:
        print("metalr: error: outer step 3: loss nan")
        sys.exit(2)
    training = {"validation_accuracy": 0.5, "example_gradients": 10, "seconds": 1.0, "compile_seconds": 0.5}
    results = {"metric": {"name": "accuracy", "maximise": True}, "training": training, "config": config,
               "curve": [{"steps": config["inner"]["steps"], "accuracy": 0.4}]}
    (out / "results.json").write_text(json.dumps(results))
"""


def test_seeds_run_together_and_those_that_did_not_end_go_on_alone(stand_in, tmp_path, monkeypatch):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    monkeypatch.setattr(launchers, "TOGETHER", (sys.executable, str(script)))
    monkeypatch.setattr(launchers, "TRAIN", (sys.executable, str(tmp_path / "train.py")))
    sweep = Sweep(BASE, {"outer.meta_batch": [1, 2]}, (0, 1, 2))
    config = SweepConfig(seeds_together=True, out=tmp_path / "s")
    results = sweeping.run(sweep, config, reporter=QUIET)
    assert [row["failed"] for row in results["rows"]] == [0, 0]
    starts = [line.split() for line in stand_in()]
    assert [len(names) for names in starts[:2]] == [3, 3]
    assert starts[2][0].startswith("meta_batch=2,seed=1")
    assert starts[2][1] == "resume"  # what it had saved
    assert [start[0][:19] for start in starts[3:]] == ["meta_batch=2,seed=2"] * 2  # which is killed once
    ended = [json.loads(line) for line in (tmp_path / "s" / "sweep.jsonl").read_text().splitlines()]
    assert len(ended) == 6
    with pytest.raises(ConfigError, match="seeds_together: expected several seeds"):
        sweeping.plan(Sweep(BASE, {"outer.meta_batch": [1, 2]}, (0,)), config)
