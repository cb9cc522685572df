"""`metalr runs`: list, show, compare and remove run folders. No jax."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from metalr.config import CompareConfig, SearchConfig, TrainConfig
from metalr.errors import ConfigError
from metalr.storage import folders

Json = Annotated[bool, tyro.conf.arg(name="json")]
ABOUT = "Runs: list, show, diff, path, rm."


def list_runs(folder: tyro.conf.Positional[Path] = Path("runs"), json_: Json = False) -> None:
    """List runs, searches and comparisons: how they stand, what they found, in which settings they differ.

    Args:
      folder: where they are, or the folders they are in.
      json_: print JSON.
    """
    from metalr.report import runs as listed

    found = listed.find(folder)
    if json_:
        print(json.dumps([listed.facts(run) for run in found]))
        return
    print(listed.listing(found))


def show(run: tyro.conf.Positional[Path], json_: Json = False) -> None:
    """Show how a run stands, what began it (command, commit, versions, machine) and its settings.

    Args:
      run: a run folder.
      json_: print JSON.
    """
    from metalr.report import runs as listed

    found = listed.read(run)
    kinds = {"search": SearchConfig, "comparison": CompareConfig}
    facts = listed.details(found, listed.flat(kinds.get(found.kind, TrainConfig)().to_json()))
    print(json.dumps(facts, indent=1) if json_ else listed.details_text(facts))


def diff(
    first: tyro.conf.Positional[Path], others: tyro.conf.Positional[tuple[Path, ...]], json_: Json = False
) -> None:
    """Show the settings in which runs differ, and what each found.

    Args:
      first: a run folder.
      others: one or more run folders.
      json_: print JSON.
    """
    from metalr.report import runs as listed

    if not others:
        raise ConfigError(f"others: expected another run beside {first}, got none")
    found = [listed.read(folder) for folder in (first, *others)]
    if json_:
        names = listed.differing(found)
        rows = [
            {"folder": str(run.folder), "status": run.status, run.metric or "score": run.score}
            | {name: run.setting(name) for name in names}
            for run in found
        ]
        print(json.dumps(rows, indent=1))
        return
    print(listed.comparison(found))


def path(name: tyro.conf.Positional[str], folder: Path = Path("runs")) -> None:
    """Print the folder of the newest run of a name (NAME, or NAME-2 and so on), for scripts.

    Args:
      name: the name.
      folder: where runs are.
    """
    from metalr.report import runs as listed

    print(listed.newest(folder, name).folder.resolve())


def remove(targets: tyro.conf.Positional[tuple[Path, ...]], yes: bool = False) -> None:
    """Remove run folders. Asks first on a terminal; refuses one that is running, and folders with files of others.

    Args:
      targets: run folders.
      yes: do not ask.
    """
    from metalr.report import runs as listed

    if not targets:
        raise ConfigError("targets: expected one or more run folders, got none")
    for folder in targets:
        if folder.is_symlink():
            raise ConfigError(f"{folder}: expected a run folder, got a link; remove what it stands for, or the link")
    found = [listed.read(folder) for folder in dict.fromkeys(folder.resolve() for folder in targets)]
    for run in found:
        folders.refuse_if_locked(run.folder)
        for inside in (run.folder / "runs").glob("*") if run.kind == "sweep" else ():
            folders.refuse_if_locked(inside)
        extra = listed.not_its_own(run)
        if extra:
            raise ConfigError(f"{run.folder}: expected a run's files only, found {extra}; move them away")
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("yes: expected --yes where nobody can be asked")
        print(listed.listing(found))
        if input(f"remove {len(found)} folders? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing removed")
            return
    for run in found:
        try:
            shutil.rmtree(run.folder)
        except OSError as error:
            folders.refuse(run.folder, error)
        print(f"removed {run.folder}")


COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_runs,
    "show": show,
    "diff": diff,
    "path": path,
    "rm": remove,
}
