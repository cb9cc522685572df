"""Jobs in a folder of their own: training, searching, comparing, studies; set-up, progress, provenance."""

from metalr.runs.api import meta_train
from metalr.runs.training import (
    resume,
    run,
)

__all__ = ["meta_train", "resume", "run"]
