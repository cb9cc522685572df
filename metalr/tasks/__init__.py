"""Task families, their disjoint splits, and samplers `key -> Episode`."""

from metalr.tasks.images import (
    ARC,
    ARCS,
    FAMILIES,
    PERMUTATIONS,
    Family,
    Part,
    Parts,
    Pool,
    Sampler,
    Splits,
    TaskSplit,
    make_sampler,
    make_samplers,
    make_splits,
    second_key,
)
from metalr.tasks.sets import Checked, OfCountedTasks, Tasks, check_labels, mixture, sinusoid
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
