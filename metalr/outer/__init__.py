"""The outer loop: the table of algorithms, meta-gradients, meta-updates, and tasks over devices."""

from metalr.outer.meta_gradients import (
    AT_ONCE_BYTES,
    AT_ONCE_STEPS,
    DERIVATIVES,
    FORWARD_NUMBERS,
    Method,
    choose_derivative,
    initial,
    initial_shapes,
    meta_gradient,
    query_logits,
)

__all__ = [
    "AT_ONCE_BYTES",
    "AT_ONCE_STEPS",
    "DERIVATIVES",
    "FORWARD_NUMBERS",
    "Method",
    "choose_derivative",
    "initial",
    "initial_shapes",
    "meta_gradient",
    "query_logits",
]
