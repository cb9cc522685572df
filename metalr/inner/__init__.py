"""The inner loop: fine-tune params on one task; the learned hyperparameters and what they make of a gradient."""

from metalr.inner.loop import (
    UNROLLED_STEPS,
    Carry,
    Step,
    adapt,
    adaptation_curve,
    check_stops,
    make_step,
    scores_after,
    take,
)
from metalr.inner.objective import (
    CROSS_ENTROPY,
    OBJECTIVES,
    Loss,
    Objective,
    accuracy,
    cross_entropy,
    objective_of,
    squared_error,
)

__all__ = [
    "CROSS_ENTROPY",
    "OBJECTIVES",
    "UNROLLED_STEPS",
    "Carry",
    "Loss",
    "Objective",
    "Step",
    "accuracy",
    "adapt",
    "adaptation_curve",
    "check_stops",
    "cross_entropy",
    "make_step",
    "objective_of",
    "scores_after",
    "squared_error",
    "take",
]
