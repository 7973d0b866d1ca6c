# SPDX-License-Identifier: Apache-2.0
"""The loss and the check of the learning rate, section 3 and 4 of docs/arithmetic.md."""

from __future__ import annotations

import numpy as np

from trainlet.errors import UsageError
from trainlet.ir import Bound, Node
from trainlet.ops import CheckLr
from trainlet.reference.arithmetic import Tensor
from trainlet.reference.run import Run, need_finite


def ref_check_lr(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """lr -> nothing, or UsageError where it is negative, not finite, or too large for a layer's scale."""
    assert isinstance(node.attrs, CheckLr)
    lr = ins["lr"].item()
    if not np.isfinite(lr) or lr < 0:
        raise UsageError(f"learning rate {lr}: it is a finite number of at least 0; give one such as 0.0004")
    real = run.rounding.real
    if not np.isfinite(real.type(lr) * real.type(node.attrs.largest)):
        raise UsageError(
            f"learning rate {lr}: times {node.attrs.largest:g}, a layer's largest factor, it is not finite; "
            "give a smaller one"
        )
    return ()


def ref_softmax_xent(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """(logits, label) -> (loss (1,), g), or UsageError (label) or MismatchError (logits)."""
    logits, label = ins["logits"], int(ins["label"].item())
    if not 0 <= label < logits.size:
        raise UsageError(f"label {label}: the model has {logits.size} classes; give one from 0 to {logits.size - 1}")
    need_finite(node, "a logit", logits)
    shifted = logits - logits.max()
    e = run.rounding.exp(shifted)
    z = run.rounding.real.type(0)
    for k in range(e.size):
        z = z + e[k]
    p = run.rounding.flush(e / z, -60)
    loss = run.rounding.log(np.asarray([z])) - shifted[label]
    return loss, p - np.eye(1, p.size, label, dtype=p.dtype)[0]
