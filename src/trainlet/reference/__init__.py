# SPDX-License-Identifier: Apache-2.0
"""Executes a graph of any stage in numpy, exact to the bit, for tests and as a judge of the C.

It is written from docs/arithmetic.md alone and shares no rounding code with ``trainlet.numerics`` or the kernels."""

from trainlet.reference.executor import (
    REFERENCE,
    Status,
    StepResult,
    TrainState,
    infer,
    initial_state,
    random_head,
    run,
    train_step,
)

__all__ = [
    "REFERENCE",
    "Status",
    "StepResult",
    "TrainState",
    "infer",
    "initial_state",
    "random_head",
    "run",
    "train_step",
]
