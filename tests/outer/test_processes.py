"""Several processes: refusals, two that train as one, and one that is lost."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from metalr.cli import commands as cli
from metalr.errors import ConfigError
from metalr.outer import processes
from metalr.storage import checkpoints

TRAIN = [
    "--tasks.way", "3", "--tasks.query", "3", "--outer.steps", "6", "--outer.meta-batch", "4", "--outer.validate-every",
    "3", "--inner.steps", "2", "--evaluation.steps", "3", "--evaluation.episodes", "8", "--evaluation.shown-tasks", "0",
    "--evaluation.validation-episodes", "8", "--model.widths", "16",
]  # fmt: skip


def test_a_wrong_process_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES.*cannot join.*two"):
        processes.join_processes()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 1),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, 1),  # the shell of an allocation: nobody else comes
        ({"SLURM_STEP_NUM_TASKS": "4"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, 4),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0"}, 3),
        ({"OMPI_COMM_WORLD_SIZE": "many", "OMPI_COMM_WORLD_RANK": "0"}, 1),
    ],
)
def test_how_many_processes_a_launcher_started(environment, expected):
    assert processes.launched(environment) == expected


def test_processes_of_a_launcher_join_and_a_coordinator_that_nobody_reaches_is_refused(monkeypatch):
    calls = []
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **given: calls.append(given))
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"):
        monkeypatch.delenv(name, raising=False)
    assert not processes.join_processes()
    assert calls == []
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    processes.join_processes()
    assert calls == [{}]
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1234")
    with pytest.raises(ConfigError, match="expected a host that all machines reach, got 127.0.0.1:1234"):
        processes.join_processes()
    assert len(calls) == 1


def train(out, *more, **env):
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    flags = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0"}
    call = [sys.executable, "-m", "metalr.cli", "train", *(more or [*TRAIN, "--out", str(out)])]
    return subprocess.Popen(call, env=clean | flags | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes, code=0, timeout=300):
    """What each of them printed, as (output, errors); a failure shows all of it."""
    printed = [process.communicate(timeout=timeout) for process in processes]
    assert {process.returncode for process in processes} == {code}, "\n".join(text for both in printed for text in both)
    return printed


def two_processes(out, *more):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        join = ["--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--processes", "2", "--process"]
    call = more or [*TRAIN, "--out", str(out)]
    return [train(out, *call, *join, str(i), JAX_NUM_CPU_DEVICES="1") for i in (0, 1)]


def test_two_killed_processes_go_on_and_end_with_the_bits_of_one(tmp_path):
    """Both are killed once a checkpoint is there; the second one never sees the run folder's checkpoints itself."""
    longer = ["--outer.steps", "1500", "--outer.checkpoint-every", "20", "--outer.validate-every", "500"]
    both = two_processes(tmp_path / "two", *TRAIN, *longer, "--out", str(tmp_path / "two"))
    store, until = tmp_path / "two" / "checkpoints", time.monotonic() + 200
    while not any(store.glob("step_*")) and time.monotonic() < until and both[0].poll() is None:
        time.sleep(0.05)
    for process in both:
        process.kill()
        process.communicate()
    assert any(store.glob("step_*"))
    assert not (tmp_path / "two" / "results.json").exists()
    again = two_processes(tmp_path / "two", "--resume", str(tmp_path / "two"))
    printed = finish(*again)
    assert "resumed at outer step" in printed[0][1]
    assert "accuracy" in printed[0][0]
    assert "accuracy" not in "".join(printed[1]), "only the first process reports"
    alone = train(tmp_path / "one", *TRAIN, *longer, "--out", str(tmp_path / "one"), JAX_NUM_CPU_DEVICES="2")
    finish(alone)
    for name in ("metrics.jsonl", "artifact/learner.safetensors"):
        one, two = (Path(tmp_path / run / name).read_bytes() for run in ("one", "two"))
        assert one == two, name
    assert np.size(list(tmp_path.glob("*/artifact"))) == 2


def test_a_run_goes_on_with_another_number_of_devices(tmp_path):
    """A sum over tasks is taken in another order then, so the last digits may differ, and nothing else."""
    longer = ["--outer.steps", "600", "--outer.checkpoint-every", "20", "--outer.validate-every", "300"]
    begun = train("", *TRAIN, *longer, "--out", str(tmp_path / "moved"), JAX_NUM_CPU_DEVICES="2")
    store, until = tmp_path / "moved" / "checkpoints", time.monotonic() + 200
    while not any(store.glob("step_*")) and time.monotonic() < until and begun.poll() is None:
        time.sleep(0.02)
    begun.terminate()
    finish(begun, code=cli.EXIT_STOPPED)
    again = train("", "--resume", str(tmp_path / "moved"), JAX_NUM_CPU_DEVICES="1")
    finish(again)
    whole = train("", *TRAIN, *longer, "--out", str(tmp_path / "whole"), JAX_NUM_CPU_DEVICES="1")
    finish(whole)
    moved, other = ((tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("moved", "whole"))
    assert len(moved) == len(other) == 602
    for a, b in zip(moved, other, strict=True):
        a, b = json.loads(a), json.loads(b)
        assert a.keys() == b.keys()
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5), a["step"]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_other_and_what_was_saved_goes_on(tmp_path, lost):
    longer = ["--outer.steps", "200000", "--outer.checkpoint-every", "20", "--outer.validate-every", "100000"]
    both = two_processes(tmp_path / "two", *TRAIN, *longer, "--out", str(tmp_path / "two"))
    store, until = tmp_path / "two" / "checkpoints", time.monotonic() + 200
    while not any(store.glob("step_*")) and time.monotonic() < until and both[0].poll() is None:
        time.sleep(0.05)
    assert any(store.glob("step_*"))
    both[lost].kill()
    began = time.monotonic()
    _, said = both[1 - lost].communicate(timeout=200)
    assert time.monotonic() - began < 60
    both[lost].communicate()
    if lost == 1:
        assert both[0].returncode == cli.EXIT_STOPPED, said
        assert f"metalr train --resume {tmp_path / 'two'}" in said
    else:  # JAX ends a process whose coordinator is gone by itself
        assert both[1].returncode != 0
        assert "another task died" in said or "another process of this run is gone" in said
    assert any(checkpoints._is_whole(path) for path in store.glob("step_*"))


def test_processes_of_different_settings_are_refused(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        join = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    both = [
        train("", *TRAIN, "--seed", str(i), "--out", str(tmp_path / "x"), **join, JAX_PROCESS_ID=str(i)) for i in (0, 1)
    ]
    printed = finish(*both, code=2)
    assert "processes: expected the same settings, data and versions in all" in printed[0][1]
    assert "this one differs in ['settings']" in printed[1][1]
