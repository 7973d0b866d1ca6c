# SPDX-License-Identifier: Apache-2.0
"""Scratch of the kernels in bytes, the same figures as their tl_*_scratch functions, for planning without a compiler.

All take (in_h, in_w, in_c, out_h, out_w, out_c, kh, kw, groups, kept).
"""

from __future__ import annotations

_LANES = 16


def conv2d_scratch(
    in_h: int, in_w: int, in_c: int, out_h: int, out_w: int, out_c: int, kh: int, kw: int, groups: int, kept: int
) -> int:
    """tl_conv2d_s8."""
    return 0


def conv2d_dx_scratch(
    in_h: int, in_w: int, in_c: int, out_h: int, out_w: int, out_c: int, kh: int, kw: int, groups: int, kept: int
) -> int:
    """tl_conv2d_dx_s8."""
    return 4


def conv2d_dw_scratch(
    in_h: int, in_w: int, in_c: int, out_h: int, out_w: int, out_c: int, kh: int, kw: int, groups: int, kept: int
) -> int:
    """tl_conv2d_dw_s8."""
    return 0


def depthwise_scratch(
    in_h: int, in_w: int, in_c: int, out_h: int, out_w: int, out_c: int, kh: int, kw: int, groups: int, kept: int
) -> int:
    """tl_depthwise_s8: the weights of a block of channels."""
    return 4 * kh * kw * _LANES


def depthwise_dx_scratch(
    in_h: int, in_w: int, in_c: int, out_h: int, out_w: int, out_c: int, kh: int, kw: int, groups: int, kept: int
) -> int:
    """tl_depthwise_dx_s8: the weights of a block of channels, and the statistics of the rounding."""
    return 4 + 4 * kh * kw * _LANES


def depthwise_dw_scratch(
    in_h: int, in_w: int, in_c: int, out_h: int, out_w: int, out_c: int, kh: int, kw: int, groups: int, kept: int
) -> int:
    """tl_depthwise_dw_s8: the sums of a block of channels."""
    return 4 * kh * kw * _LANES
