"""metalr: meta-learn an initialization and the inner-loop learning rates; fine-tune later tasks without a search.

learned = metalr.load("runs/x")
fast = learned.adapt(support_x, support_y, steps=5)
logits = learned.apply(fast, query_x)
"""

import importlib
from typing import TYPE_CHECKING, Any

from metalr.errors import MetalrError

if TYPE_CHECKING:
    from metalr.learner.artifact import Learner, load, save

__version__ = "0.1.0"
__all__ = ["Learner", "MetalrError", "__version__", "load", "save"]

# Loaded on first use: the command line's --help must not wait for jax.
_FROM = {"Learner": "metalr.learner", "load": "metalr.learner", "save": "metalr.learner"}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    raise AttributeError(f"module 'metalr' has no attribute {name!r}")
