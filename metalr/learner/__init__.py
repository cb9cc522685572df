"""What meta-training leaves behind: a Learner, and its folder on disk."""

from metalr.learner.artifact import (
    Learner,
    load,
    save,
)

__all__ = ["Learner", "load", "save"]
