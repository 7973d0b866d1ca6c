# SPDX-License-Identifier: Apache-2.0
"""Pools, section 1 of docs/arithmetic.md."""

from __future__ import annotations

import numpy as np

from trainlet.ir import Bound, Node
from trainlet.ops import AvgPool
from trainlet.ops.geometry import Conv2d, conv_out_hw
from trainlet.reference.arithmetic import Tensor
from trainlet.reference.linear import pad, taps
from trainlet.reference.run import Run


def ref_avg_pool(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """x -> its mean over windows; padding is not counted."""
    a, x = node.attrs, ins["x"]
    assert isinstance(a, AvgPool)
    windows = Conv2d(a.kernel, a.stride, a.pads)
    out_hw = conv_out_hw(windows, *x.shape[-3:-1])
    wide = x if np.issubdtype(x.dtype, np.floating) else x.astype(np.int64)
    padded, inside = pad(wide, a.pads), pad(np.ones((*x.shape[-3:-1], 1), np.int64), a.pads)
    total, count = 0 * padded[..., : out_hw[0], : out_hw[1], :], np.zeros((*out_hw, 1), np.int64)
    for _, _, rows, cols in taps(windows, out_hw):
        total = total + padded[..., rows, cols, :]
        count = count + inside[rows, cols]
    return (run.rounding.mean(total, count),)
