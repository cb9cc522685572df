"""Faults of runs in processes of their own: kills, signals, races. See faults.py."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from fault_children import CONFIG
from fault_trials import SEED, Row, count, expect

from metalr import cli
from metalr.storage import checkpoints, folders

CHILD = Path(__file__).with_name("fault_children.py")


def child(kind: str, *args: Any, **env: str) -> subprocess.Popen:
    """A fresh process that runs one of fault_children.py's functions."""
    call = [sys.executable, str(CHILD), kind, *map(str, args)]
    log = subprocess.DEVNULL if not os.environ.get("FAULTS_DEBUG") else None
    return subprocess.Popen(
        call,
        stdout=log,
        stderr=log,
        env=os.environ | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_NUM_CPU_DEVICES": "1"} | env,
    )


def finish(process: subprocess.Popen, expected: tuple[int, ...] = (0,)) -> int:
    code = process.wait(timeout=300)
    expect(code in expected, f"exit code {code}")
    return code


def everything(folder: Path) -> list[bytes]:
    """What must be the same bits: metrics, learned init and rates, the last checkpoint (with the optimizer's state)."""
    last = max((folder / "checkpoints").glob("step_*"))
    files = folder / "metrics.jsonl", folder / "artifact" / "learner.safetensors", last / checkpoints.TENSORS
    return [file.read_bytes() for file in files]


class Reference:
    """One uninterrupted run, and how long it took: what all interrupted ones are compared with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        finish(child("run", root / "warm-up"))  # fills the compilation cache
        began = time.perf_counter()
        finish(child("run", root / "reference"))
        self.seconds = time.perf_counter() - began
        self.files = everything(root / "reference")
        self.trajectory = [json.loads(line) for line in (root / "reference" / "metrics.jsonl").read_text().splitlines()]

    def same(self, folder: Path) -> None:
        """Raise unless `folder` ended as the reference did."""
        names = ("metrics", "artifact", "checkpoint")
        wrong = [n for n, a, b in zip(names, self.files, everything(folder), strict=True) if a != b]
        expect(not wrong, f"other bits: {wrong}")
        expect((folder / "results.json").exists() and not list(folder.glob(".*")), "no results, or leftovers")
        shutil.rmtree(folder)


def sigkill(reference: Reference, n: int) -> Row:
    rng = random.Random(SEED)
    moments = [rng.uniform(0.3, reference.seconds) for _ in range(n)]

    def trial(i: int, moment: float) -> None:
        folder = reference.root / f"kill{i}"
        process = child("run", folder)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        process.kill()
        process.wait()
        if not (folder / "results.json").exists():
            finish(child("resume" if (folder / "config.json").exists() else "run", folder))
        reference.same(folder)

    trials = [lambda i=i, m=m: trial(i, m) for i, m in enumerate(moments)]
    return count("SIGKILL at a random moment of a run, then resume", trials, 2, run_seconds=round(reference.seconds, 2))


def resume_at_every_step(reference: Reference, n: int) -> Row:
    steps = range(1, CONFIG.outer.steps, max(1, (CONFIG.outer.steps - 1) // n))

    def trial(step: int) -> None:
        folder = reference.root / f"step{step}"
        finish(child("stop_after", folder, step), (cli.EXIT_STOPPED,))
        finish(child("resume", folder))
        reference.same(folder)

    return count("stopped after every outer step, resumed in a fresh process", [lambda s=s: trial(s) for s in steps], 2)


def sigterm(reference: Reference, n: int) -> Row:
    """At random moments from the start of set-up to the end; SIGTERM and SIGINT in turn."""
    rng = random.Random(SEED + 1)
    saved = []

    def trial(i: int) -> None:
        folder = reference.root / f"term{i}"
        process = child("run", folder)
        while not (folder / "config.json").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(0.05 + rng.random() * max(0.2, reference.seconds - 1.5))  # past the lines that install handlers
        process.send_signal((signal.SIGTERM, signal.SIGINT)[i % 2])
        # A signal may also come between the end of the run and that of the process: then nothing is to be saved.
        ended = (folder / "results.json").exists()
        code = finish(process, (0, cli.EXIT_STOPPED, -signal.SIGTERM, 130) if ended else (0, cli.EXIT_STOPPED))
        if code == cli.EXIT_STOPPED:
            saved.append(i)
            expect(bool(list((folder / "checkpoints").glob("step_*"))), "nothing saved")
            finish(child("resume", folder))
        reference.same(folder)

    row = count(
        "SIGTERM or SIGINT at a random moment, compiling and saving too", [lambda i=i: trial(i) for i in range(n)], 2
    )
    return row | {"stopped_and_resumed": len(saved)}


def _moments(calls: dict[str, int]) -> list[tuple[str, int, str]]:
    """(kind of call, its number, before or after it), for every call of a kind that was counted."""
    return [(kind, k, when) for kind, n in calls.items() for k in range(1, n + 1) for when in ("before", "after")]


def overwrite_at_every_call(root: Path) -> list[Row]:
    """An artifact's folder written over an older one, killed before and after its k-th call into the disk.

    Where names are exchanged, the folder is the old or the new at once; with two renames, after the next run's sweep.
    """
    rows = []
    for form in ("exchange", "renames"):
        probe = root / f"overwrite-{form}"
        finish(child("overwrite_killed", probe, form, "none", 0))
        calls = json.loads((probe / "calls.json").read_text())

        def trial(kind: str, k: int, when: str, form: str = form) -> None:
            folder = root / f"overwrite-{form}-{when}-{kind}-{k}"
            finish(child("overwrite_killed", folder, form, f"{when}-{kind}", k), (-signal.SIGKILL,))
            if form == "renames":
                folders.sweep(folder)
            found = {path.name: path.read_bytes() for path in (folder / "artifact").iterdir()}
            expect(found in [{"a": n * 1000, "b": n * 1000} for n in (b"1", b"2")], "neither old nor new")
            folders.sweep(folder)
            expect([path.name for path in folder.iterdir()] == ["artifact"], "leftovers")
            shutil.rmtree(folder)

        trials = [lambda p=p: trial(*p) for p in _moments(calls)]
        title = "names exchanged" if form == "exchange" else "two renames and a sweep"
        rows.append(
            count(f"SIGKILL before and after every call of overwriting a folder, {title}", trials, 2, calls=calls)
        )
    return rows


def killed_processes(root: Path, n: int) -> Row:
    """Two processes that train as one, killed together at a random moment, resumed: bits of one with two devices."""
    small = [
        "--tasks.way", "3", "--tasks.query", "3", "--outer.steps", "400", "--outer.meta-batch", "4",
        "--inner.steps", "2", "--outer.validate-every", "100", "--outer.checkpoint-every", "10", "--model.widths", "16",
        "--evaluation.episodes", "8", "--evaluation.validation-episodes", "8",
    ]  # fmt: skip
    rng = random.Random(SEED + 7)
    flags = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}

    def start(arguments: list[str], **env: str) -> subprocess.Popen:
        call = [sys.executable, "-m", "metalr.cli", "train", *arguments]
        return subprocess.Popen(
            call, env=os.environ | flags | env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def both(arguments: list[str]) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = f"127.0.0.1:{free.getsockname()[1]}"
        join = {"JAX_COORDINATOR_ADDRESS": place, "JAX_NUM_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "1"}
        return [start(arguments, **join, JAX_PROCESS_ID=str(i)) for i in (0, 1)]

    finish(start([*small, "--out", str(root / "alone")], JAX_NUM_CPU_DEVICES="2"))
    began = time.perf_counter()
    for process in both([*small, "--out", str(root / "pair")]):
        finish(process)
    seconds = time.perf_counter() - began
    expected = everything(root / "alone")

    def trial(i: int) -> None:
        folder = root / f"pair{i}"
        pair = both([*small, "--out", str(folder)])
        time.sleep(rng.uniform(0.5, 0.95) * seconds)
        for process in pair:
            process.kill()
        for process in pair:
            process.wait()
        if not (folder / "results.json").exists():
            again = ["--resume", str(folder)] if (folder / "config.json").exists() else [*small, "--out", str(folder)]
            for process in both(again):
                finish(process)
        expect(everything(folder) == expected, "other bits")
        shutil.rmtree(folder)

    expect(everything(root / "pair") == expected, "other bits without a kill")
    return count("two processes killed together, then resumed", [lambda i=i: trial(i) for i in range(n)])


def damaged_newest(root: Path) -> Row:
    """The newest checkpoint damaged, at every step of a run that goes on: one that is whole is always there."""

    def trial(at: int) -> None:
        store = root / f"newest{at}"
        store.mkdir()
        like = {"w": np.zeros(1000, np.float32)}
        for step in range(1, 8):
            path = checkpoints.save(store, step, {"w": np.full(1000, step, np.float32)}, {})
            if step in (at, at + 1):
                file = path / checkpoints.TENSORS
                file.write_bytes(file.read_bytes()[:-1] + b"!")
            found = checkpoints.load(store, like, lambda line: None)
            expect(found is not None, "no checkpoint")
        again = checkpoints.save(store, at, {"w": np.full(1000, at, np.float32)}, {})
        expect(checkpoints._is_whole(again), "a damaged one was not written anew")

    return count("the newest checkpoints damaged while a run goes on", [lambda i=i: trial(i) for i in range(2, 8)])


def kill_at_every_call(root: Path) -> list[Row]:
    """One checkpoint written over the one before, killed before and after its k-th call into the disk."""
    probe = root / "probe"
    finish(child("save_killed", probe, "none", 0))
    calls = json.loads((probe / "calls.json").read_text())

    def trial(kind: str, k: int, when: str) -> None:
        folder = root / f"save-{when}-{kind}-{k}"
        finish(child("save_killed", folder, f"{when}-{kind}", k), (-signal.SIGKILL,))
        found = checkpoints.load(folder / "checkpoints", {"w": np.zeros(1000, np.float32)}, lambda line: None)
        expect(found is not None, "no checkpoint")
        assert found is not None
        value = float(found[0]["w"][0])
        expect(value in (1.0, 2.0) and bool((found[0]["w"] == value).all()), f"neither old nor new: {value}")
        shutil.rmtree(folder)

    def peer(kind: str, k: int, when: str) -> None:
        folder = root / f"peer-{when}-{kind}-{k}"
        finish(child("npz_killed", folder, f"{when}-{kind}", k), (-signal.SIGKILL, 0))
        value = float(np.load(folder / "state.npz")["w"].mean())
        expect(value in (1.0, 2.0), f"neither old nor new: {value}")

    row = count(
        "SIGKILL before and after every open, write, fsync, rename of one save",
        [lambda p=p: trial(*p) for p in _moments(calls)],
        2,
        calls=calls,
    )
    moments = [("write", k, when) for k in range(1, 4) for when in ("before", "after")]
    beside = count("", [lambda p=p: peer(*p) for p in moments], 2)
    return [
        row
        | {
            "peer": "numpy.savez over the old file, killed at its writes",
            "peer_n": len(moments),
            "peer_failures": beside["failures"],
        }
    ]


def many_on_one_folder(root: Path, n: int) -> list[Row]:
    rows = []
    for runners in (2, 5, 10):
        slowest = [0.0]

        def trial(i: int, runners: int = runners, slowest: list[float] = slowest) -> None:
            folder = root / f"race{runners}-{i}"
            go = root / f"go{runners}-{i}"
            processes = [child("race", folder, go, root / f"time{runners}-{i}-{j}") for j in range(runners)]
            while sum((root / f"time{runners}-{i}-{j}.ready").exists() for j in range(runners)) < runners:
                time.sleep(0.01)
            go.touch()
            codes = sorted(process.wait(timeout=300) for process in processes)
            expect(codes == [0] + [cli.EXIT_ERROR] * (runners - 1), f"exit codes {codes}")
            times = [float((root / f"time{runners}-{i}-{j}").read_text()) for j in range(runners)]
            slowest[0] = max(slowest[0], *sorted(times)[:-1])
            expect((folder / "results.json").exists(), "the winner did not finish")

        row = count(
            f"{runners} runs started at once on one folder: one winner, the others refused by name",
            [lambda i=i: trial(i) for i in range(n)],
        )
        rows.append(row | {"slowest_refusal_seconds": round(slowest[0], 2)})
    return rows


def killed_search(reference: Reference, n: int) -> Row:
    """Studies of 12 cells for each of 2 inits, killed three times each while cells are being written."""
    rng = random.Random(SEED + 2)
    cells = [0]

    def trial(i: int) -> None:
        folder = reference.root / f"search{i}"
        log = folder / "grid.jsonl"
        for goal in sorted(rng.sample(range(2, 23, 2), 3)):
            process = child("search" if not (folder / "config.json").exists() else "resume", folder)
            while process.poll() is None and (not log.exists() or len(log.read_bytes().splitlines()) < goal):
                time.sleep(0.002)
            process.kill()
            process.wait()
        if not (folder / "results.json").exists():
            finish(child("resume", folder))
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
        keys = [tuple(line[k] for k in ("init", "optimizer", "learning_rate", "batch_size", "steps")) for line in lines]
        expect(len(keys) == len(set(keys)) == 24, f"{len(keys)} cells, {len(set(keys))} different")
        shown = json.loads((folder / "results.json").read_text())["grid"]["cells"]
        if not expected:
            expected.extend(shown)
        expect(shown == expected, "other results")
        cells[0] += len(set(keys))

    expected: list[Any] = []
    row = count(
        "search killed 3 times per study of 24 cells (12 for each init), then resumed",
        [lambda i=i: trial(i) for i in range(n)],
        2,
    )
    return row | {"cells": cells[0], "cells_expected": 24 * n}


def killed_sweep(root: Path, cells: int, seeds: int) -> Row:
    """A sweep on 2 workers whose runs, and which itself, are killed at random moments until it is done.

    Every run must have ended once, none may be missing or doubled, and each must have the bits of one never killed.
    """
    rng = random.Random(SEED + 3)
    folder, whole, kills = root / "sweep", root / "sweep-whole", [0, 0]
    rates = [f"{1e-3 * (i + 1):g}" for i in range(cells)]
    settings = ["--outer.init-rate", *rates, "--seed", *map(str, range(seeds)), "--workers", "2", "--attempts", "99"]
    environment = os.environ | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_NUM_CPU_DEVICES": "1"}

    def begin(*arguments: str) -> subprocess.Popen:
        call = [sys.executable, "-m", "metalr.cli", "sweep", *arguments]
        log = subprocess.DEVNULL if not os.environ.get("FAULTS_DEBUG") else None
        return subprocess.Popen(call, stdout=log, stderr=log, env=environment)

    def of_runs(path: Path) -> list[int]:
        """Processes of the sweep's runs."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if "train" in words and any(str(path / "runs") in word for word in words):
                    found.append(int(process.name))
        return found

    def trial() -> None:
        base = root / "sweep-base.json"
        base.write_text(json.dumps(CONFIG.to_json()))
        finish(begin(str(base), *settings, "--out", str(whole)))
        process = begin(str(base), *settings, "--out", str(folder))
        # A kill may also come between the end of the sweep and that of its process: then nothing is left to go on with.
        while process.poll() is None or (process.returncode < 0 and not (folder / "results.json").exists()):
            time.sleep(rng.uniform(1.0, 6.0))
            if process.poll() is not None and process.returncode < 0:
                process = begin("--resume", str(folder))
            elif rng.random() < 0.15 and (folder / "config.json").exists():
                process.kill()
                process.wait()
                kills[1] += 1
            else:
                for number in of_runs(folder)[:1]:
                    with contextlib.suppress(OSError):
                        os.kill(number, signal.SIGKILL)
                        kills[0] += 1
        expect(process.returncode <= 0, f"exit code {process.returncode}")
        rows = [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]
        names = [row["name"] for row in rows]
        expect(len(names) == len(set(names)) == cells * seeds, f"{len(names)} rows, {len(set(names))} runs")
        expect(all(row["status"] == "finished" for row in rows), "a run failed")
        expect({path.name for path in (folder / "runs").iterdir()} == set(names), "other folders than runs")
        for name in names:
            expect(everything(folder / "runs" / name) == everything(whole / "runs" / name), f"other bits: {name}")

    row = count(f"sweep of {cells} cells x {seeds} seeds on 2 workers, killed at random moments", [trial])
    return row | {"runs": cells * seeds, "runs_killed": kills[0], "sweeps_killed": kills[1]}
