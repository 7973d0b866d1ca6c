# SPDX-License-Identifier: Apache-2.0
"""Pools, section 1 and 4 of docs/arithmetic.md."""

from __future__ import annotations

import math

import numpy as np

from trainlet.ir import Bound, Node
from trainlet.ops import AvgPool, MaxPool, MaxPoolDx
from trainlet.ops.geometry import Conv2d, conv_out_hw
from trainlet.reference.arithmetic import Tensor
from trainlet.reference.linear import pad, taps
from trainlet.reference.rounding import Sums
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


def _padded(x: Tensor, a: MaxPool) -> Tensor:
    """x with padding that is less than anything."""
    wide = x.astype(np.float64)
    (t, b, left, r), rest = a.pads, [(0, 0)] * (x.ndim - 3)
    return np.pad(wide, [*rest, (t, b), (left, r), (0, 0)], constant_values=-np.inf)


def _elements(x: Tensor, a: MaxPool) -> Tensor:
    """The elements of each window in row-major order, (kh kw, ..., H_out, W_out, C)."""
    windows = Conv2d(a.kernel, a.stride, a.pads)
    out_hw = conv_out_hw(windows, *x.shape[-3:-1])
    padded = _padded(x, a)
    return np.stack([padded[..., rows, cols, :] for _, _, rows, cols in taps(windows, out_hw)])


def ref_max_pool(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """x -> the largest of each window; padding never is."""
    assert isinstance(node.attrs, MaxPool)
    return (_elements(ins["x"], node.attrs).max(axis=0).astype(ins["x"].dtype),)


def ref_max_pool_winners(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """x -> which element of each window is the largest, the first of equals."""
    assert isinstance(node.attrs, MaxPool)
    return (_elements(ins["x"], node.attrs).argmax(axis=0).astype(np.int8),)


def ref_max_pool_dx(run: Run, node: Node, ins: Bound[Tensor]) -> tuple[Tensor, ...]:
    """(g, winners) -> each gradient at the element that won, or the sums of them."""
    a, winners = node.attrs, ins["winners"]
    assert isinstance(a, MaxPoolDx)
    g = np.broadcast_to(ins["g"], winners.shape)
    wide = g if g.dtype.kind == "f" else g.astype(np.int64)
    (h, w), (t, b, left, r) = a.in_hw, a.pool.pads
    out = np.zeros((h + t + b, w + left + r, winners.shape[2]), wide.dtype)
    windows = Conv2d(a.pool.kernel, a.pool.stride, a.pool.pads)
    for i, j, rows, cols in taps(windows, (winners.shape[0], winners.shape[1])):
        out[rows, cols] += np.where(winners == i * a.pool.kernel[1] + j, wide, 0)
    dx = out[t : t + h, left : left + w]
    if a.moves:
        return (dx.astype(g.dtype),)
    return run.made_sums(node, Sums(dx, np.ones(1), 127 * _wins(a.pool), run.exponent(node["g"])))


def _wins(a: MaxPool) -> int:
    """How many windows an element can win."""
    return math.ceil(a.kernel[0] / a.stride[0]) * math.ceil(a.kernel[1] / a.stride[1])
