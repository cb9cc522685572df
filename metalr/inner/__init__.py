"""The inner loop: fine-tune params on one task; the learned hyperparameters and what they make of a gradient."""

from metalr.inner.loop import (
    UNROLLED_STEPS,
    Carry,
    Loss,
    Step,
    accuracy,
    adapt,
    adaptation_curve,
    cross_entropy,
    make_step,
    take,
)

__all__ = [
    "UNROLLED_STEPS",
    "Carry",
    "Loss",
    "Step",
    "accuracy",
    "adapt",
    "adaptation_curve",
    "cross_entropy",
    "make_step",
    "take",
]
