"""Where a result comes from: command, commit, versions, machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import optax

import metalr
from metalr.outer.devices import cores, local_devices

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def command() -> str:
    """The command line of this process, as a person would type it again."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":  # python -m metalr.cli
        typed = ["metalr"]
    else:
        typed = ["python", sys.argv[0]] if program.suffix == ".py" else [program.name]
    return shlex.join([*typed, *sys.argv[1:]])


PACKAGE = Path(metalr.__file__).parent


def provenance() -> dict[str, Any]:
    """Commit of the source checkout (with "+changes" if the package differs from it), versions and machine."""

    def git(*args: str) -> str:
        call = subprocess.run(["git", *args], cwd=PACKAGE, capture_output=True, text=True, check=False)
        return call.stdout.strip() if call.returncode == 0 else ""

    try:
        ours = git("ls-files", "--", "__init__.py")  # not the checkout of a project that we are installed in
        commit = ours and git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except OSError:
        commit = ""
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.machine(),
    )
    devices = local_devices()
    return {
        "commit": commit or "not a checkout",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "optax": optax.__version__}
        | {"metalr": metalr.__version__},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "machine": f"{model}, {cores()} cores, {len(devices)} x {devices[0].device_kind}, {platform.system()}",
    }


def peak_memory() -> int:
    """The most memory that this process has had, in bytes; 0 where the system does not say (Windows)."""
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
