"""Where the runs of a sweep are carried out: processes on this machine, or jobs of a Slurm cluster through submitit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from metalr.config import SlurmConfig, SweepConfig
from metalr.errors import ConfigError

TRAIN = (sys.executable, "-m", "metalr.cli", "train")
PREEMPTED = -signal.SIGTERM  # stands for the exit code of a job that was cancelled, preempted, or lost with its node


class Process(Protocol):
    """A run that goes on somewhere, as subprocess.Popen has it. returncode: None while it runs."""

    returncode: Any

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


def start(arguments: Sequence[str], log: Path, slot: int, config: SweepConfig) -> Process:
    """Begin `metalr train ARGUMENTS`.

    Args:
      log: file that what it prints is added to.
      slot: number of the worker, 0..workers - 1, which says its share of cores and devices.
    """
    if config.launcher == "slurm":
        return _SlurmJob(submit([*TRAIN, *arguments], log, config.slurm))
    environment = dict(os.environ)
    if config.devices:
        environment["CUDA_VISIBLE_DEVICES"] = config.devices[slot % len(config.devices)]
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*TRAIN, *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment,
            start_new_session=True,  # a Ctrl-C is the sweep's, which asks its runs to stop
        )  # fmt: skip
    if hasattr(os, "sched_setaffinity") and config.workers > 1:
        cores = sorted(os.sched_getaffinity(0))
        share = cores[slot % len(cores) :: config.workers] or cores
        with contextlib.suppress(OSError):  # gone already
            os.sched_setaffinity(process.pid, share)
    return process


def import_submitit() -> Any:
    """submitit. Raises ConfigError where it is not installed."""
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("launcher: expected submitit for slurm; pip install 'metalr[slurm]'") from error
    return submitit


def executor(folder: Path, slurm: SlurmConfig) -> Any:
    """submitit's executor for jobs that leave their files in `folder`.

    Raises ConfigError where submitit is missing, or the commands of Slurm are.
    """
    submitit = import_submitit()
    if slurm.cluster != "slurm":
        made = submitit.AutoExecutor(folder, cluster=slurm.cluster)
        made.update_parameters(timeout_min=slurm.minutes)
        return made
    try:
        made = submitit.SlurmExecutor(folder)
    except RuntimeError as error:
        raise ConfigError(f"launcher: expected a machine with Slurm's commands (srun, sbatch): {error}") from error
    made.update_parameters(**parameters(slurm))
    return made


def parameters(slurm: SlurmConfig) -> dict[str, Any]:
    """The settings of a job under submitit's names; those that are None are left to the cluster."""
    named = {
        "partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "constraint": slurm.constraint,
        "gpus_per_node": slurm.gpus, "cpus_per_task": slurm.cores, "mem": slurm.memory,
        "setup": list(slurm.setup) or None,
    }  # fmt: skip
    # A job that is stopped a while before its time, or preempted, saves and ends with 75; the sweep submits it again.
    fixed = {"time": slurm.minutes, "job_name": "metalr", "signal_delay_s": 120, "stderr_to_stdout": True}
    return fixed | {name: value for name, value in named.items() if value is not None}


def script(config: SlurmConfig, folder: Path) -> str:
    """The script that is given to sbatch for each run, to look at; made without Slurm."""
    import_submitit()
    from submitit.slurm.slurm import _make_sbatch_string  # what its executor writes; there is no public name for it

    return _make_sbatch_string(
        command=f"{sys.executable} -u -m submitit.core._submit {folder}", folder=folder, **parameters(config)
    )


def submit(command: Sequence[str], log: Path, slurm: SlurmConfig) -> Any:
    """Submit a command as a job; submitit's handle of it."""
    submitit = import_submitit()
    with submitit.helpers.clean_env():  # also from inside a job, whose SLURM_ variables are not the new one's
        return executor(log.parent / "slurm", slurm).submit(_run, list(command), str(log))


def _run(command: list[str], log: str) -> int:
    """What a job does: run the command, and tell its exit code. A signal to the job is the command's too.

    SIGUSR2, which says that time is nearly up and which ends a process that does not know it, comes to it as SIGTERM.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the command's too
    with open(log, "ab") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    for number in (signal.SIGTERM, signal.SIGUSR2):  # preempted; soon out of time
        signal.signal(number, lambda *_: process.send_signal(signal.SIGTERM))
    return process.wait()


class _SlurmJob:
    """A job as a process."""

    def __init__(self, job: Any) -> None:
        self.job = job
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self.job.done():
            self.returncode = self._code()
        return self.returncode

    def _code(self) -> int:
        try:
            return int(self.job.result())
        except Exception:  # whatever submitit makes of a job that left no result: it was cancelled, or its node is gone
            return PREEMPTED

    def send_signal(self, sig: int) -> None:
        self.job.cancel(check=False)

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("job", timeout or 0.0)
            time.sleep(0.2)
        return self.returncode or 0

    def kill(self) -> None:
        self.job.cancel(check=False)
        self.returncode = PREEMPTED
