"""What meta-training leaves behind: a Learner, and its folder on disk."""

from metalr.learner.artifact import load, save
from metalr.learner.learner import Learner

__all__ = ["Learner", "load", "save"]
