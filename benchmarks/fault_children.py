"""What the processes that faults.py kills do: `python fault_children.py KIND FOLDER ...`; and their configs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from metalr.config import EvaluationConfig, GridConfig, InnerConfig, ModelConfig, OuterConfig, TaskConfig, TrainConfig

TINY = TrainConfig(
    tasks=TaskConfig(family="permuted", way=10, shot=1, query=2),
    model=ModelConfig(widths=(16,)),
    inner=InnerConfig(steps=2),
    outer=OuterConfig(steps=6, meta_batch=2, validate_every=2, checkpoint_every=2),
    evaluation=EvaluationConfig(episodes=4, validation_episodes=2, steps=2, shown_tasks=0),
)
CONFIG = dataclasses.replace(  # dispatches stay short, so that kills fall everywhere
    TINY,
    outer=OuterConfig(steps=40, meta_batch=4, validate_every=20, checkpoint_every=5),
    model=ModelConfig(widths=(64,)),
)
SEARCH = GridConfig(run=True, learning_rates=(0.01, 0.1, 1.0), steps=(1, 2), batch_sizes=(10,))


def run(folder: str) -> None:
    _train(dataclasses.replace(CONFIG, out=Path(folder)))


def search(folder: str) -> None:
    _train(dataclasses.replace(TINY, out=Path(folder), grid=SEARCH))


def resume(folder: str) -> None:
    _train(None, Path(folder))


def stop_after(folder: str, step: str) -> None:
    """Train up to a step and stop there, as on a signal; the dispatches end at that step, whatever the clock says."""
    from metalr.outer import loop

    real = loop.run_chunks

    def until(chunk: Any, state: Any, pool: Any, key: Any, steps: int, every: Any, **options: Any) -> Any:
        return real(chunk, state, pool, key, int(step), every, **options)

    loop.run_chunks = until
    run(folder)


def race(folder: str, go: str, times: str) -> None:
    """Start when told to, at the same moment as others; write down how long it took to run or to be refused."""
    from metalr import runs  # noqa: F401

    Path(f"{times}.ready").touch()
    while not Path(go).exists():
        time.sleep(0.001)
    began = time.perf_counter()
    try:
        _train(dataclasses.replace(TINY, out=Path(folder)))
    finally:
        Path(times).write_text(str(time.perf_counter() - began))


def _train(config: TrainConfig | None, resumed: Path | None = None) -> None:
    """As the command line does it, exit codes and all."""
    from metalr import cli
    from metalr.outer import devices

    def go() -> None:
        from metalr.storage import folders

        folder = resumed or config.out  # type: ignore[union-attr]
        folders.refuse_if_locked(folder)
        from metalr import data, runs
        from metalr.runs import progress

        devices.use_compilation_cache(data.cache_dir() / "compiled")
        import jax

        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        quiet = progress.ConsoleReporter(quiet=True)
        runs.run(config, name="x", reporter=quiet) if config else runs.resume(folder, reporter=quiet)

    cli.guard(go)


def save_killed(folder: str, when: str, k: str) -> None:
    """Save a checkpoint over an older one and die before or after the k-th call of a kind; "none" counts the calls."""
    from metalr.storage import checkpoints

    store = Path(folder) / "checkpoints"
    store.mkdir(parents=True)
    checkpoints.save(store, 1, {"w": np.full(1000, 1, np.float32)}, {})
    calls = _die_at(when, int(k))
    checkpoints.save(store, 2, {"w": np.full(1000, 2, np.float32)}, {})
    (Path(folder) / "calls.json").write_text(json.dumps(calls))


def overwrite_killed(folder: str, form: str, when: str, k: str) -> None:
    """Write an artifact's folder over an older one, with names exchanged or with two renames, and die as above."""
    from metalr.storage import folders

    path = Path(folder)
    path.mkdir()
    folders.write_folder(path / "artifact", {"a": b"1" * 1000, "b": b"1" * 1000})
    if form == "renames":
        folders._exchange = lambda a, b: False
    calls = _die_at(when, int(k))
    folders.write_folder(path / "artifact", {"a": b"2" * 1000, "b": b"2" * 1000})
    (path / "calls.json").write_text(json.dumps(calls))


def npz_killed(folder: str, when: str, k: str) -> None:
    """The same for numpy.savez over the old file, whose writes are hooked at the file object."""
    Path(folder).mkdir()
    file = Path(folder) / "state.npz"
    np.savez(file, w=np.full(1000, 1, np.float32))
    count, goal, after = 0, int(k), when.startswith("after")

    class Hooked:
        def __init__(self, opened: Any) -> None:
            self.opened = opened

        def __getattr__(self, name: str) -> Any:
            return getattr(self.opened, name)

        def write(self, content: Any) -> int:
            nonlocal count
            count += 1
            if count == goal and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            written = self.opened.write(content)
            self.opened.flush()
            if count == goal:
                os.kill(os.getpid(), signal.SIGKILL)
            return written

    with file.open("wb") as opened:
        np.savez(Hooked(opened), w=np.full(1000, 2, np.float32))  # type: ignore[arg-type]


def _die_at(when: str, k: int) -> dict[str, int]:
    """Hook os.open, write, fsync, rename and so on: SIGKILL before or after the k-th call of one; gives the counts."""
    from metalr.storage import folders

    places: dict[str, Any] = dict.fromkeys(("open", "write", "fsync", "rename", "unlink", "rmdir"), os)
    places["_exchange"] = folders
    calls = dict.fromkeys(places, 0)

    def hook(kind: str) -> None:
        real = getattr(places[kind], kind)

        def hooked(*args: Any, **kwargs: Any) -> Any:
            calls[kind] += 1
            if when == f"before-{kind}" and calls[kind] == k:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if when == f"after-{kind}" and calls[kind] == k:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(places[kind], kind, hooked)

    for kind in calls:
        hook(kind)
    return calls


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
