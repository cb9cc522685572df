"""A run of several processes: how they join, agree, and notice that one of them is gone."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from metalr.errors import ConfigError, one_line

SIGNS_OF_LOSS = ("Gloo", "NCCL", "heartbeat", "Connection closed by peer", "Connection reset by peer", "UNAVAILABLE")
COUNTS = {  # what a launcher sets in each process that it starts: (how many there are, which one this is)
    "Slurm": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}


def launched(environment: Mapping[str, str]) -> int:
    """How many processes srun or mpirun started this one with; 1 for none.

    Only what they set in the processes themselves counts: in the shell of an allocation other SLURM_ variables are set
    too, where nobody else would come to join.
    """
    found = [environment[count] for count, number in COUNTS.values() if count in environment and number in environment]
    return next((int(count) for count in found if count.isdigit()), 1)


def join_processes() -> bool:
    """Join a run of several processes, if there are any; True in all of them but the first.

    There are if JAX_COORDINATOR_ADDRESS is set (JAX_NUM_PROCESSES and JAX_PROCESS_ID say how many and which), or if
    srun or mpirun started several, of which JAX finds the coordinator by itself. Call it before anything runs.

    Raises ConfigError where JAX cannot join, and for a coordinator that other machines cannot reach.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None and launched(os.environ) == 1:
        return False
    if address is not None and os.environ.get("SLURM_STEP_NUM_NODES", "1") != "1":
        host = address.rpartition(":")[0]
        with contextlib.suppress(OSError):
            if socket.gethostbyname(host).startswith("127."):  # every rank on another machine would wait for itself
                raise ConfigError(
                    f"JAX_COORDINATOR_ADDRESS: expected a host that all machines reach, got {address}, which is this "
                    "one alone; give its name in the network, or leave it out under srun"
                )
    try:
        given: dict[str, Any] = {
            setting: int(os.environ[name])
            for setting, name in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID"))
            if name in os.environ
        }
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID: expected host:port, a count, and a number "
            f"below it; cannot join: {one_line(error)}"
        ) from error
    return jax.process_index() > 0


def lost_process(error: Exception) -> bool:
    """Whether an error of JAX says that another process of this run is gone, as collectives of gloo and NCCL do."""
    return jax.process_count() > 1 and any(word in str(error) for word in SIGNS_OF_LOSS)


def from_first_process(content: bytes) -> bytes:
    """The first process's bytes, in all processes of a run; all of them must call it."""
    if jax.process_count() == 1:
        return content
    from jax.experimental import multihost_utils

    (size,) = multihost_utils.broadcast_one_to_all(np.array([len(content)], np.int32))
    mine = np.frombuffer(content, np.uint8) if jax.process_index() == 0 else np.zeros(int(size), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).astype(np.uint8).tobytes()


def in_any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process of a run; all of them must call it."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array([flag]))))


def check_same_in_all_processes(facts: dict[str, str]) -> None:
    """Raises ConfigError in a process whose facts are not those of the first one; all of them must call it."""
    first = json.loads(from_first_process(json.dumps(facts).encode()))
    differing = sorted(name for name in facts if facts[name] != first.get(name))
    if in_any_process(bool(differing)):
        what = f"this one differs in {differing}" if differing else "another one differs"
        raise ConfigError(f"processes: expected the same settings, data and versions in all; {what} from the first")
