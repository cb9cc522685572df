"""Where a run reports its progress: a bar on a terminal, a few plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def duration(seconds: float) -> str:
    """Seconds in words: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Reporter(Protocol):
    """Where lines of progress go: a rich console, or plain lines."""

    def line(self, text: str) -> None:
        """Print a line."""
        ...

    def bar(self, text: str, total: int, done: int = 0) -> Any:
        """A context manager that gives `advance(count, note)`."""
        ...


class ConsoleReporter:
    """Progress bar on a terminal, plain lines otherwise; `quiet` prints nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def bar(self, text: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console) as progress:
                bar = progress.add_task(text, total=total, completed=done, note="")
                yield lambda count, note: progress.update(bar, advance=count, note=note)
            return
        shown = 10 * done // total - 1
        first: tuple[float, int] | None = (
            None  # when something was done first, and how much then: compilation is before
        )

        def advance(count: int, note: str) -> None:
            nonlocal done, shown, first
            done += count
            now = time.perf_counter()
            if (tenth := 10 * done // total) > shown:  # ten lines at most in a log
                shown = tenth
                left = ""
                if first is not None and first[1] < done < total:
                    left = f"  about {duration((now - first[0]) / (done - first[1]) * (total - done))} left"
                self.line(f"{text} {done}/{total}  {note}".rstrip() + left)
            first = first or (now, done)

        yield advance
