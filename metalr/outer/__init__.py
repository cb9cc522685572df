"""The outer loop: the table of algorithms, meta-gradients, meta-updates, and tasks over devices."""

from metalr.outer.directions import Evolution, Forward, Implicit, Joint, Method, Problem, Reptile, Reverse, TaskSize
from metalr.outer.meta_gradients import (
    AT_ONCE_BYTES,
    AT_ONCE_STEPS,
    FORWARD_NUMBERS,
    choose_derivative,
    initial,
    initial_shapes,
    meta_gradient,
)

__all__ = [
    "AT_ONCE_BYTES",
    "AT_ONCE_STEPS",
    "FORWARD_NUMBERS",
    "Evolution",
    "Forward",
    "Implicit",
    "Joint",
    "Method",
    "Problem",
    "Reptile",
    "Reverse",
    "TaskSize",
    "choose_derivative",
    "initial",
    "initial_shapes",
    "meta_gradient",
]
