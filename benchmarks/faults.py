"""Faults, injected: what is lost when a run is killed, its disk fills, its files are damaged or its input is wrong.

    python benchmarks/faults.py [--quick] [--only NAME ...] [--json]

Every row says how often a fault was injected (n) and how often the outcome was not the promised one (failures), and,
where it applies, the same injection on a tool that people trust (peer_failures). Works in temporary folders only, and
ends by itself. --quick is a smaller n of all of it, for CI. Needs the extra `bench` for the peers and fuzzing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
from fault_children import CONFIG, TINY
from fault_files import damaged_files, fuzz, hostile
from fault_runs import (
    Reference,
    damaged_newest,
    kill_at_every_call,
    killed_processes,
    killed_search,
    killed_sweep,
    many_on_one_folder,
    overwrite_at_every_call,
    resume_at_every_step,
    sigkill,
    sigterm,
)
from fault_trials import QUIET, SEED, Failed, Row, count, expect

from metalr import cli, config, outer, runs, tasks
from metalr.config import files
from metalr.errors import ConfigError, StorageError
from metalr.outer import devices, loop
from metalr.runs import meta_training, progress, setup
from metalr.runs.provenance import provenance
from metalr.storage import checkpoints, folders


def tiny_run(folder: Path, **changes: Any) -> dict[str, Any]:
    return runs.run(dataclasses.replace(TINY, out=folder, **changes), name="x", reporter=QUIET)


def full_disk(root: Path, n: int) -> Row:
    """Runs on a small file system of its own that fills at 20 sizes (needs the right to mount one)."""
    mount = root / "disk"
    mount.mkdir()
    tiny_run(root / "whole")
    whole = sum(f.stat().st_size for f in (root / "whole").rglob("*") if f.is_file())

    def trial(size: int) -> None:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)], check=True, capture_output=True
        )
        try:
            folder = mount / "run"
            try:
                tiny_run(folder)
            except StorageError as error:
                expect(str(mount) in str(error) and "free" in str(error), f"says too little: {error}")
            else:
                raise Failed("the disk was not full")
            expect(not folders.leftovers(folder) and not folders.leftovers(folder / "checkpoints"), "leftovers")
            if any((folder / "checkpoints").glob("step_*")):
                setup_ = setup.set_up(TINY)
                state = loop.start(setup_.model, setup_.spec, setup_.optimizer, jax.random.key(0))
                like = {"state": state, "best": loop.learned(setup_.spec, state.meta)}
                expect(checkpoints.load(folder / "checkpoints", like, lambda line: None) is not None, "no checkpoint")
        finally:
            subprocess.run(["umount", str(mount)], check=True)

    sizes = [int(4096 * -(-whole * (i + 1) / (n + 1) // 4096)) for i in range(n)]
    return count("disk full at different sizes", [lambda s=s: trial(s) for s in sizes], run_bytes=whole)


def vanished(root: Path, n: int) -> Row:
    """The run folder is removed, or its file system becomes read-only, while the run goes on."""
    mount = root / "ro"
    mount.mkdir()

    class Interfering(progress.ConsoleReporter):
        def __init__(self, act: Callable[[], Any], after: int) -> None:
            super().__init__(quiet=True)
            self.act, self.left = act, after

        @contextlib.contextmanager
        def bar(self, text: str, total: int, done: int = 0) -> Any:
            def advance(steps: int, note: str) -> None:
                self.left -= steps
                if self.left <= 0 and self.act is not None:
                    self.act()
                    self.act = None  # type: ignore[assignment]

            yield advance

    def trial(kind: str, after: int) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)], check=True)
        folder = mount / "run"
        store = str(folder / "checkpoints")

        def read_only() -> None:
            subprocess.run(["mount", "--bind", store, store], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", store], check=True)

        act = read_only if kind == "read-only" else lambda: shutil.rmtree(folder)
        try:
            runs.run(dataclasses.replace(TINY, out=folder), name="x", reporter=Interfering(act, after))
        except StorageError as error:
            expect(str(folder) in str(error), f"does not name the folder: {error}")
        else:
            raise Failed("ended as if nothing had happened")
        finally:
            subprocess.run(["umount", "-R", "-l", str(mount)], check=True)

    cases = list(itertools.product(("removed", "read-only"), (1, 2, 3)))[:n]
    return count("run folder removed or read-only under the run", [lambda c=c: trial(*c) for c in cases])


def settings_of(kind: Any, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(kind):
        value = getattr(kind(), field.name)
        names += (
            settings_of(type(value), f"{prefix}{field.name}.")
            if dataclasses.is_dataclass(value)
            else [prefix + field.name]
        )
    return names


def typos(in_file: int | None, as_flag: int) -> list[Row]:
    """One-edit mutants of every setting's name: in a config file (so many a setting; None: all), and as a flag."""
    rng, names = random.Random(SEED + 5), settings_of(config.TrainConfig)
    letters = "abcdefghijklmnopqrstuvwxyz_"

    def mutants(word: str) -> list[str]:
        cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
        edits = [a + b[1:] for a, b in cuts if b] + [a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1]
        edits += [a + c + b[1:] for a, b in cuts if b for c in letters] + [a + c + b for a, b in cuts for c in letters]
        return sorted({e for e in edits if e} - {word})

    def default(name: str) -> Any:
        value = config.TrainConfig().to_json()
        for part in name.split("."):
            value = value[part]
        return value

    def nested(name: str, value: Any) -> dict[str, Any]:
        head, _, rest = name.partition(".")
        return {head: nested(rest, value) if rest else value}

    rows = []
    for form, n in (("config file", in_file), ("flag", as_flag)):
        refused = suggested = tried = 0
        for name in names:
            parent, _, last = name.rpartition(".")
            siblings = {other.rpartition(".")[2] for other in names if other.rpartition(".")[0] == parent}
            siblings |= {other.split(".")[0] for other in names} if not parent else set()
            every = [m for m in mutants(last) if m not in siblings]
            for mutant in every if n is None else rng.sample(every, n):
                wrong = f"{parent}.{mutant}" if parent else mutant
                tried += 1
                said = ""
                if form == "config file":
                    try:
                        files.from_json(nested(wrong, default(name)))
                    except ConfigError as error:
                        said = str(error)
                    refused += bool(said)
                    suggested += f"did you mean {name}?" in said
                else:
                    output = io.StringIO()
                    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
                        try:
                            cli.main(["train", "--" + wrong.replace("_", "-"), "1"])
                        except SystemExit as stop:
                            refused += stop.code == 2
                    suggested += "--" + name.replace("_", "-") in output.getvalue()
        row = {"fault": f"one-edit typo in a setting's name, {form}", "n": tried, "failures": tried - refused}
        rows.append(row | {"right_suggestion_share": round(suggested / tried, 4)})
    return rows


def divergence(root: Path, n: int) -> Row:
    """Half the runs get tasks of NaNs, half a rate 1000 times too large; with both policies."""

    def trial(i: int) -> None:
        policy, poison = loop.POLICIES[i % 2], i % 4 < 2
        inner = dataclasses.replace(TINY.inner, rate=0.1 if poison else 100.0)
        outer_ = dataclasses.replace(TINY.outer, on_divergence=policy, init_rate=1e-3 if poison else 1e30, clip=None)
        changed = dataclasses.replace(TINY, inner=inner, outer=outer_, seed=i)
        parts = setup.set_up(changed)
        pool, sample = parts.parts.train
        if poison:

            def sampler(pool: Any, key: jax.Array) -> Any:
                episode, bad = sample(pool, key), jax.random.bernoulli(jax.random.fold_in(key, 9), 0.15)
                return episode._replace(support_x=jnp.where(bad, jnp.nan, episode.support_x))

            parts = parts._replace(parts=parts.parts._replace(train=tasks.Part(pool, sampler)))
        folder = root / f"diverge{i}"
        folder.mkdir()
        try:
            meta_training.meta_train(changed, parts, folder, QUIET)
        except loop.DivergedError as error:
            expect("tasks [" in str(error) or "the update" in str(error), f"names no task: {error}")
        stored = list((folder / "checkpoints").glob(f"step_*/{checkpoints.TENSORS}"))
        expect(bool(stored), "nothing saved")
        from safetensors.numpy import load_file

        for file in stored:
            expect(all(np.isfinite(v).all() for v in load_file(file).values()), f"{file}: not finite")

    return count("poisoned tasks, rates x 1000: no non-finite checkpoint", [lambda i=i: trial(i) for i in range(n)])


def overhead(repeats: int) -> Row:
    """The share of time that the checks take: the step as it is, beside one whose results nobody checks."""
    parts = setup.set_up(dataclasses.replace(config.QUICKSTART, grid=config.GridConfig()))
    pool, sample = parts.parts.train
    chunk = loop.make_chunk(parts.model, parts.spec, parts.method, parts.optimizer, sample, 16)

    @jax.jit
    def unchecked(state: Any, pool: Any, key: jax.Array, steps: int) -> Any:
        import optax

        def body(_: Any, state: Any) -> Any:
            keys = loop.task_keys(key, state.step, 16)

            def gradient(meta: Any, pool: Any, keys: jax.Array) -> Any:
                episodes = jax.vmap(lambda k: sample(pool, k))(keys)
                return outer.meta_gradient(parts.model, parts.spec, meta, episodes, keys)

            grads, _ = devices.split_tasks(gradient, devices.task_mesh(16), 2, mean=True)(state.meta, pool, keys)
            updates, opt_state = parts.optimizer.update(grads, state.opt_state, state.meta)
            return loop.TrainState(optax.apply_updates(state.meta, updates), opt_state, state.step + 1)

        return jax.lax.fori_loop(0, steps, body, state)

    def start() -> Any:
        return loop.start(parts.model, parts.spec, parts.optimizer, jax.random.key(0))

    systems = {
        "checked": lambda: jax.block_until_ready(chunk(start(), pool, jax.random.key(1), 40)),
        "unchecked": lambda: jax.block_until_ready(unchecked(start(), pool, jax.random.key(1), 40)),
    }
    seconds = measure.side_by_side(systems, repeats)
    share = seconds["checked"] / seconds["unchecked"] - 1
    return {
        "fault": "none: what checking every step costs",
        "n": repeats,
        "failures": int(share >= 0.02),
        "share": round(share, 4),
    }


def can_mount(root: Path) -> bool:
    """Whether this process may mount a small file system, as the faults of disks need."""
    point = tempfile.mkdtemp(dir=root)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", point], capture_output=True, check=False)
    return mounted.returncode == 0 and subprocess.run(["umount", point], check=False).returncode == 0


def merged(rows: list[Row], order: list[str]) -> list[Row]:
    """These rows, and those of other groups that the results file has."""
    stored = measure.RESULTS / "faults.json"
    old = json.loads(stored.read_text())["rows"] if stored.is_file() else []
    fresh = {row["group"] for row in rows}
    return sorted([row for row in old if row["group"] not in fresh] + rows, key=lambda row: order.index(row["group"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small n of everything; writes no results file")
    parser.add_argument(
        "--only", nargs="+", default=[], help="only these groups; the results file keeps the rows of the others"
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    few, commit = options.quick, provenance()["commit"]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="metalr-faults-") as temporary:
        root = Path(temporary)
        os.environ["METALR_CACHE_DIR"] = str(root / "cache")
        devices.use_compilation_cache(root / "cache" / "compiled")
        made: list[Reference] = []

        def reference() -> Reference:
            if not made:
                made.append(Reference(root))
            return made[0]

        mounts = can_mount(root)
        groups: dict[str, Callable[[], Row | list[Row]]] = {
            "files": lambda: damaged_files(root, 100 if few else 1000, 50 if few else 300),
            "hostile": lambda: hostile(root),
            "fuzz": lambda: fuzz(root, 500 if few else 100_000),
            "typos": lambda: typos(20, 1) if few else typos(None, 10),
            "divergence": lambda: divergence(root, 4 if few else 100),
            "overhead": lambda: overhead(9),
            "disk": lambda: full_disk(root, 4 if few else 20) if mounts else [],
            "vanished": lambda: vanished(root, 6) if mounts else [],
            "calls": lambda: kill_at_every_call(root),
            "overwrite": lambda: overwrite_at_every_call(root),
            "newest": lambda: damaged_newest(root),
            "processes": lambda: killed_processes(root, 1 if few else 5),
            "sigkill": lambda: sigkill(reference(), 4 if few else 200),
            "resume": lambda: resume_at_every_step(reference(), 3 if few else CONFIG.outer.steps),
            "sigterm": lambda: sigterm(reference(), 4 if few else 100),
            "folder": lambda: many_on_one_folder(root, 1 if few else 20),
            "search": lambda: killed_search(reference(), 1 if few else 20),
            "sweep": lambda: killed_sweep(root, *((2, 1) if few else (12, 3))),
        }
        unknown = set(options.only) - set(groups)
        if unknown:
            parser.error(f"--only: expected some of {sorted(groups)}, got {sorted(unknown)}")
        if few and not options.only:
            del groups["overhead"]  # a timing: too noisy for a few repeats
            del groups["processes"]  # once is what tests/outer/test_processes.py does
        for name in options.only or groups:
            began = time.perf_counter()
            found = groups[name]()
            for row in found if isinstance(found, list) else [found]:
                facts = {"seed": SEED, "group": name, "commit": commit}
                rows.append({**row, **facts, "seconds": round(time.perf_counter() - began, 1)})
                print(
                    *(f"{k}={v}" for k, v in rows[-1].items() if k not in ("seed", "group", "commit")),
                    file=sys.stderr,
                    flush=True,
                )
            if not options.quick:
                measure.save("faults", merged(rows, list(groups)))  # after every group: all of them take an hour
    if options.json:
        print(json.dumps(rows, indent=1))
    sys.exit(any(row["failures"] for row in rows))


if __name__ == "__main__":
    main()
