"""Task families, their disjoint splits, and samplers `key -> Episode`."""

from metalr.tasks.checks import Checked, check_labels
from metalr.tasks.images import (
    ARC,
    ARCS,
    FAMILIES,
    PERMUTATIONS,
    Family,
    Pool,
    Splits,
    TaskSplit,
    make_sampler,
    make_samplers,
    make_splits,
)
from metalr.tasks.mixtures import mixture
from metalr.tasks.samplers import OfCountedTasks, Part, Parts, Sampler, second_key
from metalr.tasks.sets import Tasks
from metalr.tasks.sinusoids import sinusoid
from metalr.tasks.standardisation import Standardisation

__all__ = [
    "ARC",
    "ARCS",
    "FAMILIES",
    "PERMUTATIONS",
    "Checked",
    "Family",
    "OfCountedTasks",
    "Part",
    "Parts",
    "Pool",
    "Sampler",
    "Splits",
    "Standardisation",
    "TaskSplit",
    "Tasks",
    "check_labels",
    "make_sampler",
    "make_samplers",
    "make_splits",
    "mixture",
    "second_key",
    "sinusoid",
]
