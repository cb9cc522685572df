"""Jobs in a folder of their own: training, searching, comparing, studies; set-up, progress, provenance."""

import importlib
from typing import Any

from metalr.runs.api import meta_train
from metalr.runs.training import (
    resume,
    run,
)

_JOBS = ("comparing", "searching", "sweeping")  # loaded on first use
__all__ = ["meta_train", "resume", "run"]


def __getattr__(name: str) -> Any:
    if name in _JOBS:
        return importlib.import_module(f"metalr.runs.{name}")
    raise AttributeError(f"module 'metalr.runs' has no attribute {name!r}")
