"""`metalr quickstart` as a new user runs it: wall time, peak memory, its table; and what --help and import cost.

    python benchmarks/quickstart.py

Runs the commands in processes of their own with an empty cache folder, so that all compilation is in the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

METALR = [sys.executable, "-c", "from metalr.cli import main; main()"]


def seconds_of(*call: str, repeats: int = 5) -> float:
    """Fastest wall time of a process."""
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run(call, check=True, capture_output=True)
        best = min(best, time.perf_counter() - began)
    return round(best, 3)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"METALR_CACHE_DIR": str(Path(folder) / "cache")}
        for cache in ("empty", "filled"):
            out = Path(folder) / cache
            began = time.perf_counter()
            subprocess.run([*METALR, "quickstart", "--out", str(out)], check=True, env=env, stdout=subprocess.DEVNULL)
            seconds = round(time.perf_counter() - began, 1)
            results = json.loads((out / "results.json").read_text())
            memory = results["peak_memory_bytes"]
            rows.append({"compilation_cache": cache, "seconds": seconds, "peak_memory_bytes": memory})
    measure.save(
        "quickstart",
        rows,
        help_seconds=seconds_of(*METALR, "--help"),
        train_help_seconds=seconds_of(*METALR, "train", "--help"),
        import_metalr_seconds=seconds_of(sys.executable, "-c", "import metalr"),
        import_metalr_with_jax_seconds=seconds_of(sys.executable, "-c", "import metalr; metalr.load"),
        comparison=results["comparison"],
        training=results["training"],
        config=results["config"],
    )


if __name__ == "__main__":
    main()
