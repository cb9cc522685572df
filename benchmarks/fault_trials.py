"""Counting what goes wrong: a trial that raises is a failure."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from metalr.runs import progress

Row = dict[str, Any]
SEED = 0
QUIET = progress.ConsoleReporter(quiet=True)


class Failed(Exception):
    """One injection whose outcome was not the promised one."""


def count(fault: str, trials: list[Callable[[], None]], workers: int = 1, **facts: Any) -> Row:
    """Run trials; the ones that raise are failures, and the first few say why."""

    def attempt(trial: Callable[[], None]) -> str:
        try:
            trial()
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return ""

    with ThreadPoolExecutor(workers) as pool:
        reasons = [reason for reason in pool.map(attempt, trials) if reason]
    return {"fault": fault, "n": len(trials), "failures": len(reasons), **facts, "reasons": reasons[:5]}


def expect(condition: bool, text: str) -> None:
    if not condition:
        raise Failed(text)
