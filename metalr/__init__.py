"""metalr: meta-learn an initialization and the inner-loop learning rates; fine-tune later tasks without a search.

learned = metalr.meta_train(tasks, model, objective="squared_error", out="runs/mine")
learned = metalr.load("runs/mine", model=model)
fast = learned.adapt(support_x, support_y, steps=5)
outputs = learned.apply(fast, query_x)
"""

import importlib
from typing import TYPE_CHECKING, Any

from metalr.errors import MetalrError

if TYPE_CHECKING:
    from metalr import config, data, models, runs, tasks
    from metalr.inner import Objective
    from metalr.learner import Learner, load, save
    from metalr.runs import meta_train
    from metalr.tasks import Tasks
    from metalr.types import Episode

__version__ = "0.1.0"
__all__ = [
    "Episode",
    "Learner",
    "MetalrError",
    "Objective",
    "Tasks",
    "__version__",
    "config",
    "data",
    "load",
    "meta_train",
    "models",
    "runs",
    "save",
    "tasks",
]

# Loaded on first use: the command line's --help must not wait for jax.
_FROM = {
    "Episode": "metalr.types",
    "Learner": "metalr.learner",
    "Objective": "metalr.inner",
    "Tasks": "metalr.tasks",
    "load": "metalr.learner",
    "meta_train": "metalr.runs",
    "save": "metalr.learner",
}
_PACKAGES = ("config", "data", "models", "runs", "tasks")


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"metalr.{name}")
    raise AttributeError(f"module 'metalr' has no attribute {name!r}")
