"""What training, searching and comparing have in common: a folder of one's own, a lock, going on, and stopping.

A job's folder holds config.json from its first moment, data.json once it knows its data, files of its own that grow,
and results.json at the end. Everything that can be refused is refused before the folder is made or taken up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from metalr.config.files import differences
from metalr.errors import ConfigError, MetalrError, StoppedError, StorageError, one_line
from metalr.runs import preemption
from metalr.runs.provenance import command, provenance
from metalr.storage import folders
from metalr.tasks.host import host_failure

Parts = TypeVar("Parts")
Stored = TypeVar("Stored")
Results = dict[str, Any]


class Job(NamedTuple):
    """One kind of job.

    Attributes:
      kind: what messages call it.
      files: what its folder may hold, so that overwriting it deletes nothing else.
      may_change: settings, and beginnings of their dotted names, that may differ when it is taken up again.
      inside: folders in it where writing may have been cut off.
    """

    kind: str
    files: frozenset[str]
    may_change: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()

    def begin(
        self,
        config: Any,
        name: str,
        make: Callable[[], Parts],
        carry_out: Callable[[Parts, Path], Results],
        record: Callable[[Path], dict[str, Any]] | None = None,
    ) -> Results:
        """Start in a new folder; the results.

        Args:
          config: its settings, with `out` and `overwrite`.
          name: of the default folder, runs/NAME.
          make: checks everything and makes the parts; called before anything is written.
          carry_out: does the work in the folder.
          record: what config.json holds; default: the settings.
        """
        folders.check_free(config.out, self.files, overwrite=config.overwrite)
        parts = make()
        with folders.taken(config.out, name, self.files, overwrite=config.overwrite) as folder:
            folders.write_json(folder / "config.json", config.to_json() if record is None else record(folder))
            folders.write_json(folder / folders.MADE, {"command": command(), **provenance()})
            return self._work(folder, parts, carry_out)

    def go_on(
        self,
        folder: Path,
        make: Callable[[], Parts],
        carry_out: Callable[[Parts, Path], Results],
        stored: Any = None,
        given: Any = None,
    ) -> Results:
        """Take up a folder that was stopped or killed; the results.

        Args:
          stored, given: the settings in the folder, and those to go on with; what changed is written down.
        """
        parts = make()
        with folders.locked(folder):
            for place in (folder, *(folder / name for name in self.inside)):
                folders.sweep(place)
            if given is not None:
                kept = dataclasses.replace(given, out=stored.out, overwrite=stored.overwrite)
                if kept != stored:  # whoever takes it up next goes by these
                    folders.write_json(folder / "config.json", kept.to_json())
            return self._work(folder, parts, carry_out)

    def _work(self, folder: Path, parts: Parts, carry_out: Callable[[Parts, Path], Results]) -> Results:
        """Carry out; an error that ends it is written down, for `metalr runs list`."""
        with contextlib.suppress(OSError):
            (folder / folders.FAILED).unlink(missing_ok=True)
        try:
            return carry_out(parts, folder)
        except StoppedError:
            raise
        except Exception as raised:
            error = raised if isinstance(raised, MetalrError) else host_failure(raised)
            text = f"{type(raised).__name__}: {one_line(raised)}" if error is None else str(error)
            with contextlib.suppress(StorageError, OSError):  # the error itself counts
                folders.write_json(folder / folders.FAILED, {"error": text})
            if error is None or error is raised:
                raise
            raise error from raised

    def check_changes(self, folder: Path, stored: Any, given: Any) -> None:
        """Raises ConfigError for a changed setting that the result depends on."""
        for field, (old, new) in differences(stored, given).items():
            if not any(field == free or field.startswith(f"{free}.") for free in self.may_change):
                raise ConfigError(
                    f"{field}: expected {old!r} as in {folder}, got {new!r}; leave it out, or start a new {self.kind}"
                )

    def stored(self, folder: Path, read: Callable[[dict[str, Any]], Stored]) -> Stored:
        """What config.json of a folder to take up holds, as `read` makes of it.

        Raises ConfigError for a folder of something else, LockedError for one in use.
        """
        folders.refuse_if_locked(folder)
        try:
            return read(json.loads((folder / "config.json").read_text()))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"resume: {folder}: expected a {self.kind}, found none: {one_line(error)}") from error

    def refuse_finished(self, folder: Path, else_: str = "nothing to go on with") -> None:
        """Raises ConfigError for a folder with results."""
        if (folder / "results.json").exists():
            raise ConfigError(f"resume: {folder}: this {self.kind} is finished (it has results.json); {else_}")


@contextlib.contextmanager
def stoppable(text: str) -> Iterator[Callable[[], None]]:
    """Gives `between()`, to be called where stopping loses nothing: raises StoppedError(text) if a signal came."""
    with preemption.watch() as asked:

        def between() -> None:
            if asked():
                raise StoppedError(text)

        yield between
