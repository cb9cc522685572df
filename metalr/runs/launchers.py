"""Where the runs of a sweep are carried out: processes on this machine, or jobs of a Slurm cluster through submitit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from metalr.config import SweepConfig
from metalr.errors import ConfigError

TRAIN = (sys.executable, "-m", "metalr.cli", "train")
TOGETHER = (sys.executable, "-m", "metalr.cli.together")
ARRAY_JOBS = 1000  # of one array; a cluster's own MaxArraySize is 1001 unless somebody changed it
SLURM, JOBS = "slurm", "jobs.txt"  # folder for submitit's files; numbers of the jobs that were submitted
PREEMPTED = -signal.SIGTERM  # stands for the exit code of a job that was cancelled, preempted, or lost with its node


class Process(Protocol):
    """A run that goes on somewhere, as subprocess.Popen has it. returncode: None while it runs."""

    returncode: Any

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


class Call(NamedTuple):
    """One `metalr train ARGUMENTS`, or several seeds together, whose arguments are their settings' files.

    Attributes:
      log: file that what it prints is added to.
      slot: number of the worker, 0..workers - 1, which says its share of this machine's cores and devices.
    """

    arguments: Sequence[str]
    log: Path
    slot: int
    together: bool = False

    @property
    def command(self) -> list[str]:
        """What is run."""
        return [*(TOGETHER if self.together else TRAIN), *self.arguments]


def most_at_once(config: SweepConfig) -> int:
    """How many runs are handed over before one of them has ended."""
    # Slurm holds them back by itself, as one array; tpe wants the score of one before it draws the next.
    return ARRAY_JOBS if config.launcher == "slurm" and config.sampler != "tpe" else config.workers


def start(calls: Sequence[Call], config: SweepConfig) -> list[Process]:
    """Begin several runs: processes of this machine, or the jobs of one array."""
    if config.launcher == "slurm":
        return [_SlurmJob(job) for job in submit(calls, config)]
    return [_local(call, config) for call in calls]


def _local(call: Call, config: SweepConfig) -> Process:
    log, slot = call.log, call.slot
    environment = dict(os.environ)
    if config.devices:
        environment["CUDA_VISIBLE_DEVICES"] = config.devices[slot % len(config.devices)]
    with log.open("ab") as file:
        process = subprocess.Popen(
            call.command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment,
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


def executor(folder: Path, config: SweepConfig) -> Any:
    """submitit's executor for jobs that leave their files in `folder`.

    Raises ConfigError where submitit is missing, or the commands of Slurm are.
    """
    submitit, slurm = import_submitit(), config.slurm
    if slurm.cluster != "slurm":
        made = submitit.AutoExecutor(folder, cluster=slurm.cluster)
        made.update_parameters(timeout_min=slurm.minutes, nodes=slurm.nodes, tasks_per_node=slurm.processes)
        return made
    try:
        made = submitit.SlurmExecutor(folder)
    except RuntimeError as error:
        raise ConfigError(f"launcher: expected a machine with Slurm's commands (srun, sbatch): {error}") from error
    made.update_parameters(**parameters(config))
    return made


def parameters(config: SweepConfig) -> dict[str, Any]:
    """The settings of a job under submitit's names; those that are None are left to the cluster."""
    slurm = config.slurm
    named = {
        "partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "constraint": slurm.constraint,
        "gpus_per_node": slurm.gpus, "cpus_per_task": slurm.cores, "mem": slurm.memory,
        "setup": list(slurm.setup) or None,
    }  # fmt: skip
    # A job that is stopped a while before its time, or preempted, saves and ends with 75; the sweep submits it again.
    fixed = {
        "time": slurm.minutes, "job_name": "metalr", "signal_delay_s": 120, "stderr_to_stdout": True,
        "nodes": slurm.nodes, "ntasks_per_node": slurm.processes, "array_parallelism": config.workers,
    }  # fmt: skip
    return fixed | {name: value for name, value in named.items() if value is not None}


def script(config: SweepConfig, folder: Path, jobs: int) -> str:
    """The script that is given to sbatch for an array of so many runs, to look at; made without Slurm."""
    import_submitit()
    from submitit.slurm.slurm import _make_sbatch_string  # what its executor writes; there is no public name for it

    return _make_sbatch_string(
        command=f"{sys.executable} -u -m submitit.core._submit {folder}", folder=folder,
        map_count=min(jobs, most_at_once(config)), **parameters(config),
    )  # fmt: skip


def submit(calls: Sequence[Call], config: SweepConfig) -> list[Any]:
    """Submit runs as one array of jobs; submitit's handles of them."""
    if not calls:
        return []
    submitit = import_submitit()
    with submitit.helpers.clean_env():  # also from inside a job, whose SLURM_ variables are not the new one's
        files = calls[0].log.parent / SLURM
        through = executor(files, config)
        with through.batch():
            jobs = [through.submit(_run, call.command, str(call.log)) for call in calls]
        if config.slurm.cluster == "slurm":
            with (files / JOBS).open("a") as written:
                written.writelines(f"{job.job_id}\n" for job in jobs)
        return jobs


def cancel_left(logs: Path) -> None:
    """Take back the jobs that a killed sweep has left, waiting or at work: what they did is saved, and goes on."""
    written = logs / SLURM / JOBS
    if written.is_file():
        with contextlib.suppress(FileNotFoundError):  # no Slurm here any more
            subprocess.run(["scancel", "--quiet", *written.read_text().split()], check=False)
        written.unlink()


def joined(environment: Mapping[str, str], rank: int, processes: int, job: str) -> dict[str, str]:
    """What a process of a job needs to know of the others, where Slurm does not say it: submitit's stand-in."""
    if processes == 1 or "SLURM_STEP_NUM_TASKS" in environment:
        return {}
    port = 20000 + zlib.crc32(job.encode()) % 20000  # the same in all of them
    names = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    return dict(zip(names, (f"127.0.0.1:{port}", str(processes), str(rank)), strict=True))


def _run(command: list[str], log: str) -> int:
    """What a process of a job does: run the command, and tell its exit code. A signal to it is the command's too.

    SIGUSR2, which says that time is nearly up and which ends a process that does not know it, comes to it as SIGTERM.
    """
    here = import_submitit().JobEnvironment()
    others = joined(os.environ, here.global_rank, here.num_tasks, here.job_id)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the command's too
    with open(log, "ab") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=os.environ | others)
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
            codes = [int(code) for code in self.job.results()]  # of each process of the job
            return next((code for code in codes if code), 0)
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
