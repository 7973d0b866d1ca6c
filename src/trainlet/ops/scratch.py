# SPDX-License-Identifier: Apache-2.0
"""Scratch of the kernels in bytes, the same figures as their tl_*_scratch functions, for planning without a compiler.

All take (in_h, in_w, in_c, out_h, out_w, out_c, kh, kw, groups, kept).
"""

from __future__ import annotations

_LANES, _ROWS = 16, 8  # of the inner tile, csrc/kernels/tl_tile.h
_CHUNK = 256
_PART = 64


def _even(n: int) -> int:
    return (n + 1) // 2 * 2


def _tiles(channels: int, pixels: int, taps: int) -> int:
    """Inputs and weights of a tile. Of many channels with one tap only some at a time, with the sums of all pixels,
    where that is less."""
    whole = _even(taps * channels) * (_LANES + 2 * _ROWS)
    parts = _PART * (_LANES + 2 * _ROWS) + -(-pixels // _ROWS) * _ROWS * _LANES * 4
    return parts if taps == 1 and parts < whole else whole


def conv2d_scratch(
    in_h: int, in_w: int, in_c: int, out_h: int, out_w: int, out_c: int, kh: int, kw: int, groups: int, kept: int
) -> int:
    """tl_conv2d_s8: the weights of a block of outputs, and a tile of input patches."""
    return _tiles(in_c // groups, out_h * out_w, kh * kw)


def conv2d_packed_scratch(
    in_h: int, in_w: int, in_c: int, out_h: int, out_w: int, out_c: int, kh: int, kw: int, groups: int, kept: int
) -> int:
    """tl_conv2d_s8 where the weights are packed in flash: a tile of input patches."""
    return _even(kh * kw * (in_c // groups)) * 2 * _ROWS


def conv2d_dx_scratch(
    in_h: int, in_w: int, in_c: int, out_h: int, out_w: int, out_c: int, kh: int, kw: int, groups: int, kept: int
) -> int:
    """tl_conv2d_dx_s8: as forward, with output channels, and the statistics of the rounding."""
    return 4 + _tiles(out_c // groups, in_h * in_w, kh * kw)


def conv2d_dw_scratch(
    in_h: int, in_w: int, in_c: int, out_h: int, out_w: int, out_c: int, kh: int, kw: int, groups: int, kept: int
) -> int:
    """tl_conv2d_dw_s8: a chunk of pixels of a tile of inputs and of a block of gradients."""
    return _even(min(_CHUNK, out_h * out_w)) * (_LANES + 2 * _ROWS)


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
    """tl_depthwise_dw_s8: the sums of a block of channels, a row of gradients and a row of inputs."""
    return _LANES * (4 * kh * kw + 2 * (out_w + in_w))


def depthwise_ring(width: int, rows: int) -> int:
    """More for a depthwise kernel that overwrites what it reads: the rows of a block of channels under the window."""
    return rows * width * _LANES
