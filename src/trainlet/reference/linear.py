# SPDX-License-Identifier: Apache-2.0
"""The sums of a convolution and of its two gradients: linear algebra without any rounding.

Integers are summed in floating point as long as every partial sum is exact there, which makes a matrix product fast;
then they are int64 again. Reals are summed in float64. Activations are (..., H, W, C).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from trainlet.ops.geometry import Conv2d, conv_out_hw
from trainlet.reference.arithmetic import Tensor

F32: Final[np.dtype[Any]] = np.dtype(np.float32)
F64: Final[np.dtype[Any]] = np.dtype(np.float64)

Tap = tuple[int, int, slice, slice]  # row and column of the kernel, and the pixels of the padded input that it meets


def carrier(bound: float, *arrays: Tensor) -> np.dtype[Any]:
    """The floating type in which sums of the arrays' products, of magnitude up to ``bound``, are exact integers;
    float64 for reals. ValueError where there is none."""
    if any(np.issubdtype(a.dtype, np.floating) for a in arrays):
        return F64
    if bound >= 2**53:
        raise ValueError(f"sums of up to {bound:g} are not exact in float64")
    return F32 if bound < 2**24 else F64


def _restore(acc: Tensor, *arrays: Tensor) -> Tensor:
    """Integers again, if the operands were integers."""
    if any(np.issubdtype(a.dtype, np.floating) for a in arrays):
        return acc
    return acc.astype(np.int64)


def taps(conv: Conv2d, out_hw: tuple[int, int]) -> Iterator[Tap]:
    """Every element of the kernel in turn."""
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel, conv.stride, conv.dilation
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dh, i * dh + sh * (out_hw[0] - 1) + 1, sh)
            cols = slice(j * dw, j * dw + sw * (out_hw[1] - 1) + 1, sw)
            yield i, j, rows, cols


def pad(x: Tensor, pads: tuple[int, int, int, int]) -> Tensor:
    """x with zeros around it; ``pads`` is (top, bottom, left, right)."""
    if not any(pads):
        return x
    around = [(0, 0)] * (x.ndim - 3) + [pads[:2], pads[2:], (0, 0)]
    return np.pad(x, around)


def _groups(width: int, groups: int) -> Iterator[slice]:
    step = width // groups
    for g in range(groups):
        yield slice(g * step, (g + 1) * step)


def _product(x: Tensor, w: Tensor, groups: int) -> Tensor:
    """x (..., C_in) times w (C_out, C_in/groups), group by group, to (..., C_out)."""
    flat = x.reshape(-1, x.shape[-1])
    if groups == 1:
        return (flat @ w.T).reshape(*x.shape[:-1], w.shape[0])
    pairs = zip(_groups(flat.shape[1], groups), _groups(w.shape[0], groups), strict=True)
    return np.concatenate([flat[:, c] @ w[o].T for c, o in pairs], axis=1).reshape(*x.shape[:-1], w.shape[0])


def conv_sum(x: Tensor, zero: int, w: Tensor, conv: Conv2d) -> Tensor:
    """sum W (x - zero) of x (..., H, W, C) and w (C_out, kh, kw, C_in/groups), depthwise (C, kh, kw, 1); padding
    contributes 0."""
    bound = 255.0 * float(np.abs(w.astype(np.float64)).reshape(w.shape[0], -1).sum(axis=1).max())
    kind = carrier(bound, x, w)
    out_hw = conv_out_hw(conv, *x.shape[-3:-1])
    padded, wk = pad(x.astype(kind) - kind.type(zero), conv.pads), w.astype(kind)
    acc = np.zeros((*x.shape[:-3], *out_hw, w.shape[0]), kind)
    for i, j, rows, cols in taps(conv, out_hw):
        window = padded[..., rows, cols, :]
        acc += window * wk[:, i, j, 0] if conv.depthwise else _product(window, wk[:, i, j], conv.groups)
    return _restore(acc, x, w)


def conv_dx_sum(t: Tensor, w: Tensor, conv: Conv2d, in_hw: tuple[int, int], t_bound: int) -> Tensor:
    """sum over o, kh, kw of W t: t (H_out, W_out, C_out), |t| <= t_bound, to (*in_hw, C_in)."""
    out_c, kh, kw, cg = w.shape
    kind = carrier(float(t_bound) * 127 * out_c * kh * kw, t, w)
    top, bottom, left, right = conv.pads
    out = np.zeros((in_hw[0] + top + bottom, in_hw[1] + left + right, cg * conv.groups), kind)
    tk, wk = t.astype(kind), w.astype(kind)
    for i, j, rows, cols in taps(conv, conv_out_hw(conv, *in_hw)):
        out[rows, cols] += tk * wk[:, i, j, 0] if conv.depthwise else _transposed(tk, wk[:, i, j], conv.groups)
    return _restore(out[top : top + in_hw[0], left : left + in_hw[1]], t, w)


def _transposed(t: Tensor, w: Tensor, groups: int) -> Tensor:
    """t (..., C_out) times w (C_out, C_in/groups), group by group, to (..., C_in)."""
    flat = t.reshape(-1, t.shape[-1])
    parts = [flat[:, o] @ w[o] for o in _groups(w.shape[0], groups)]
    return np.concatenate(parts, axis=1).reshape(*t.shape[:-1], -1)


def conv_dw_sum(r: Tensor, x: Tensor, zero: int, conv: Conv2d) -> Tensor:
    """sum over pixels of r (x - zero): r (H_out, W_out, C_out) and x with the kept channels of each group only, to
    (C_out, kh, kw, kept). Depthwise, r too has the kept channels only, and the sums are (kept, kh, kw, 1)."""
    out_hw, out_c = r.shape[:2], r.shape[2]
    kind = carrier(127.0 * 255 * out_hw[0] * out_hw[1], r, x)
    padded, rk = pad(x.astype(kind) - kind.type(zero), conv.pads), r.astype(kind)
    kept = 1 if conv.depthwise else x.shape[2] // conv.groups
    dw = np.zeros((out_c, *conv.kernel, kept), kind)
    for i, j, rows, cols in taps(conv, (out_hw[0], out_hw[1])):
        window = padded[rows, cols]
        dw[:, i, j] = _pixels(rk, window)[:, None] if conv.depthwise else _outer(rk, window, conv.groups)
    return _restore(dw, r, x)


def _pixels(r: Tensor, x: Tensor) -> Tensor:
    """Sum over pixels of r x, channel by channel."""
    return np.asarray((r * x).sum(axis=(0, 1)))


def _outer(r: Tensor, x: Tensor, groups: int) -> Tensor:
    """Sum over pixels of r (C_out) times x (groups * kept), group by group: (C_out, kept)."""
    rf, xf = r.reshape(-1, r.shape[2]), x.reshape(-1, x.shape[2])
    pairs = zip(_groups(rf.shape[1], groups), _groups(xf.shape[1], groups), strict=True)
    return np.concatenate([rf[:, o].T @ xf[:, c] for o, c in pairs], axis=0)
