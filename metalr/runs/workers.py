"""The runs of a sweep in processes of their own: side by side, taken up again after kills, each run once."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metalr.config import SweepConfig, TrainConfig
from metalr.runs import launchers
from metalr.runs.progress import duration
from metalr.storage import folders

RUNS, LOGS = "runs", "logs"
POLL_SECONDS = 0.2
GRACE_SECONDS = 60.0  # between asking a run to save and stop, and killing it
STOPPED = 75  # exit code of a run that saved and stopped, see cli
IN_USE = ": in use by the run with pid"  # in the words of a run that found another one in its folder

Point = dict[str, Any]  # dotted name of a setting -> value


class Trial(NamedTuple):
    """One run of a sweep: its number, the name of its folder, what it changes, and its seed."""

    number: int
    name: str
    point: Point
    seed: int
    config: TrainConfig


class _Worker(NamedTuple):
    """A run, or several seeds together, that goes on in a process of its own. slot: its share of cores and devices."""

    trials: tuple[Trial, ...]
    slot: int
    process: launchers.Process
    began: float


Ended = tuple[Trial, dict[str, Any]]  # a trial, and the row that says how it ended


class Carrier:
    """Carries out the trials of a sweep, as many at a time as launchers.most_at_once says.

    A run that goes on by itself, because its sweep was killed, takes the place of a worker until it is over.

    Args:
      seeds: how many trials in a row are seeds of one combination.
      ended: rows of trials that ended before, by name.
      say: called with a line of text.
    """

    def __init__(
        self,
        trials: Iterator[Trial],
        seeds: int,
        config: SweepConfig,
        folder: Path,
        ended: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.trials, self.config, self.folder, self.ended, self.say = trials, config, folder, ended, say
        self.together = seeds if config.seeds_together else 1
        self.most = launchers.most_at_once(config)
        self.free, self.running = list(range(self.most)), list[_Worker]()
        self.waiting: collections.deque[Trial] = collections.deque()  # to be taken up again
        self.elsewhere: list[Trial] = []
        self.tries: collections.Counter[str] = collections.Counter()
        self.more = True

    def rows(self, between: Callable[[], None]) -> Iterator[Ended]:
        """Each trial as it ends. between: asked all the time; what it raises ends all."""
        try:
            while self.more or self.waiting or self.running or self.elsewhere:
                for trial in [one for one in self.elsewhere if folders.holder(self._out(one)) is None]:
                    self.elsewhere.remove(trial)
                    self.waiting.append(trial)
                yield from self._begin()
                between()
                time.sleep(POLL_SECONDS if self.running or self.elsewhere else 0)
                for worker in list(self.running):
                    yield from self._gather(worker)
        finally:
            _stop(self.running)

    def _out(self, trial: Trial) -> Path:
        return self.folder / RUNS / trial.name

    def _begin(self) -> Iterator[Ended]:
        """Start what there is room for; what ended before is given at once."""
        begun: list[tuple[Trial, ...]] = []
        while len(self.running) + len(begun) + len(self.elsewhere) < self.most and (self.waiting or self.more):
            group = [self.waiting.popleft()] if self.waiting else list(itertools.islice(self.trials, self.together))
            self.more = self.more and bool(group)
            left = []
            for trial in group:
                if trial.name in self.ended:
                    yield trial, self.ended[trial.name]
                elif folders.holder(self._out(trial)) is not None:
                    self._wait_for(trial)
                elif (self._out(trial) / "results.json").is_file():  # finished as the sweep was killed
                    yield trial, _row(trial, self.folder, "", self.tries[trial.name])
                else:
                    left.append(trial)
            if len(left) > 1 and any(self._out(trial).exists() for trial in left):
                self.waiting.extend(left)  # begun already: each goes on alone
            elif left:
                self.tries.update(trial.name for trial in left)
                begun.append(tuple(left))
        if begun:
            self.running += _start(begun, [self.free.pop(0) for _ in begun], self.config, self.folder)

    def _gather(self, worker: _Worker) -> Iterator[Ended]:
        """The trials of a worker that is over, or took too long; those that can go on wait for it."""
        config = self.config
        given = (config.timeout or math.inf) * len(worker.trials)  # seeds that run together share their seconds out
        late = time.perf_counter() - worker.began > given
        if late:
            _stop([worker])
        if worker.process.poll() is None:
            return
        self.running.remove(worker)
        self.free.append(worker.slot)
        error = f"not finished after {duration(given)}" if late else _reason(worker, self.folder)
        several = len(worker.trials) > 1
        if several and worker.process.returncode and not late:
            self.say(f"seeds of {worker.trials[0].name} ended together ({error}); each goes on alone")
        for trial in worker.trials:
            out = self._out(trial)
            # Its job is over: a lock left on another machine holds nothing, unless it ended because another one has it.
            if config.launcher == "slurm" and IN_USE not in error:
                (out / folders.LOCK).unlink(missing_ok=True)
            if several and not late and not (out / "results.json").is_file():
                self.tries[trial.name] -= 1
                self.waiting.append(trial)
            elif IN_USE in error and not late:  # begun twice, before the first one had its lock
                self.tries[trial.name] -= 1
                self._wait_for(trial)
            elif _killed(worker) and not late and self.tries[trial.name] < config.attempts:
                self.waiting.append(trial)
            else:
                yield trial, _row(trial, self.folder, error, self.tries[trial.name])

    def _wait_for(self, trial: Trial) -> None:
        holder = folders.holder(self._out(trial)) or {}
        who = f"pid {holder.get('pid', '?')} on {holder.get('host', '?')}"
        lock = self._out(trial) / folders.LOCK
        self.say(f"waits for {trial.name}, which {who} still carries out; if that is gone, delete {lock}")
        self.elsewhere.append(trial)


def _start(
    groups: Sequence[tuple[Trial, ...]], slots: Sequence[int], config: SweepConfig, folder: Path
) -> list[_Worker]:
    """Begin runs, or go on with those that were cut off."""
    calls = []
    for group, slot in zip(groups, slots, strict=True):
        files = [folder / LOGS / f"{trial.name}.json" for trial in group]
        for trial, file in zip(group, files, strict=True):
            folders.write_json(file, dataclasses.replace(trial.config, out=folder / RUNS / trial.name).to_json())
        out = folder / RUNS / group[0].name
        given = ["--config", str(files[0]), "--out", str(out)]
        if len(group) > 1:
            given = [str(file) for file in files]
        elif (out / "config.json").is_file():
            given = ["--resume", str(out)]
        calls.append(launchers.Call(given, folder / LOGS / f"{group[0].name}.txt", slot, len(group) > 1))
    processes, now = launchers.start(calls, config), time.perf_counter()
    return [_Worker(*each, now) for each in zip(groups, slots, processes, strict=True)]


def _killed(worker: _Worker) -> bool:
    """Whether a run ended by a signal that was not this process's: it may be taken up again."""
    code = worker.process.returncode
    return code < 0 or code in (STOPPED, 128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGKILL)


def _stop(running: Sequence[_Worker]) -> None:
    """Ask runs to save and stop; kill those that do not."""
    for worker in running:
        if worker.process.poll() is None:
            worker.process.send_signal(signal.SIGTERM)
    until = time.perf_counter() + GRACE_SECONDS
    for worker in running:
        try:
            worker.process.wait(max(0.0, until - time.perf_counter()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


def _row(trial: Trial, folder: Path, error: str, attempts: int) -> dict[str, Any]:
    """How a run ended, for sweep.jsonl. error: why, if it has no results."""
    out = folder / RUNS / trial.name
    facts = {"name": trial.name, "number": trial.number, "point": trial.point, "seed": trial.seed, "attempts": attempts}
    if (out / "results.json").is_file():
        results = json.loads((out / "results.json").read_text())
        metric, training = results["metric"]["name"], results["training"]
        if training[f"validation_{metric}"] is None:
            return facts | {"status": "failed", "error": f"no validation gave a finite {metric}"}
        at = next(p for p in results["curve"] if p["steps"] == trial.config.inner.steps)
        return facts | {
            "status": "finished",
            "metric": metric,
            "maximise": results["metric"]["maximise"],
            "validation": training[f"validation_{metric}"],
            "test": at[metric],
            "example_gradients": training["example_gradients"],
            "seconds": round(training["seconds"] + training["compile_seconds"], 1),
        }
    return facts | {"status": "failed", "error": error}


def _reason(worker: _Worker, folder: Path) -> str:
    """Why a run has no results: its last words."""
    log = folder / LOGS / f"{worker.trials[0].name}.txt"  # a job of a cluster that never started has none
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    said = next((line for line in reversed(lines) if line.startswith("metalr:")), lines[-1] if lines else "nothing")
    return f"exit code {worker.process.returncode} after {duration(time.perf_counter() - worker.began)}: {said}"
