# SPDX-License-Identifier: Apache-2.0
"""Compile-time constants of the arithmetic: scale -> multiplier and shift, bounds -> pre-shifts, update rates.

All in double, evaluated left to right, rounded once (docs/arithmetic.md, sections 1, 2 and 4). The reference executor
shares no line with this file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
MAX_INT32 = 1 << 31
MAX_UPDATE_PIXELS = 66_311  # 127 * 255 * pixels < 2^31
RHO_START = 4


def quantize_multiplier(d: float) -> tuple[int, int]:
    """(m, sh) with d close to m 2^(sh - 31), m in [2^30, 2^31) or (0, 0) for d < 2^-32. ``d`` >= 0, finite."""
    f, e = math.frexp(d)
    m = math.floor(f * 2**31 + 0.5)
    if m == 2**31:
        m, e = m // 2, e + 1
    return (0, 0) if e < -31 else (m, e)


def mantissa(v: float) -> tuple[int, int]:
    """(mult, E) with v = mult 2^(E - 31), mult in [2^30, 2^31). ``v`` > 0, finite."""
    f, e = math.frexp(v)
    m = math.floor(f * 2**31 + 0.5)
    return (m // 2, e + 1) if m == 2**31 else (m, e)


def pre_shift(bound: int) -> int:
    """The largest p in 0..16 with bound 2^p < 2^31. ``bound`` < 2^31 is the worst case of an accumulator."""
    return max(p for p in range(17) if bound << p < MAX_INT32)


def dx_bits(fan_out: int) -> int:
    """b: bits of the per-channel weight scales inside an input gradient's sum; 0 where even one bit overflows.
    ``fan_out`` = C_out/groups kh kw."""
    return max((b for b in range(1, 8) if 127 * 127 * (2**b - 1) * fan_out < MAX_INT32), default=0)


def dx_levels(fan_out: int) -> int:
    """2^b - 1: the largest factor of a channel inside an input gradient's sum; 0 where even one bit overflows."""
    return (1 << dx_bits(fan_out)) - 1


@dataclass(frozen=True, slots=True)
class SumsScale:
    """The real unit v = mult 2^(exp - 31) of sums, one or one per channel, and ``pre`` = p of their bound."""

    mult: NDArray[np.int32]
    exp: NDArray[np.int16]
    pre: int


def sums_scale(units: Sequence[float], bound: int) -> SumsScale:
    """Constants of sums of at most ``bound`` with those units (> 0)."""
    mult, exp = zip(*(mantissa(v) for v in units), strict=True)
    return SumsScale(np.array(mult, np.int32), np.array(exp, np.int16), pre_shift(bound))


def sums_units(scale: F32 | None, levels: int) -> list[float]:
    """v of sums (``ops.op.Sums``): 1, or the largest of ``scale`` over ``levels``, or each of ``scale``."""
    if scale is None:
        return [1.0]
    wide = [float(v) for v in scale]
    return [max(wide) / levels] if levels else wide


def channel_factors(scale: F32, levels: int) -> NDArray[np.int16]:
    """mt[o] = floor(levels s_w[o] / max(s_w) + 0.5)."""
    wide = [float(v) for v in scale]
    largest = max(wide)
    return np.array([math.floor(levels * v / largest + 0.5) for v in wide], np.int16)


def requantize(x_scale: float, scale: F32, y_scale: float) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
    """Multiplier and shift per output channel of a forward convolution: of s_x s_w[o] / s_y."""
    pairs = [quantize_multiplier(x_scale * float(v) / y_scale) for v in scale]
    mult, shift = zip(*pairs, strict=True)
    return np.array(mult, np.int32), np.array(shift, np.int8)


def weight_rate(dead: Sequence[int], scale: F32, x_scale: float) -> F32:
    """kw[o] = (fp32)(s_x / s_w[o]): integer steps of a weight per real gradient; 0 for dead channels."""
    rate = np.array([x_scale / float(v) for v in scale], np.float32)
    rate[list(dead)] = 0
    return rate


def bias_rate(dead: Sequence[int], scale: F32, x_scale: float) -> F32:
    """kb[o] = (fp32)(1 / (s_w[o] s_x)); 0 for dead channels."""
    rate = np.array([1 / (float(v) * x_scale) for v in scale], np.float32)
    rate[list(dead)] = 0
    return rate


@dataclass(frozen=True, slots=True)
class AddScale:
    """(multiplier, shift) of both inputs and of the output of TFLite's int8 ADD."""

    a: tuple[int, int]
    b: tuple[int, int]
    y: tuple[int, int]


def add_scale(a: float, b: float, y: float) -> AddScale:
    """Constants of an addition of tensors with scales ``a`` and ``b`` to one with scale ``y``."""
    twice = 2 * max(a, b)
    out = quantize_multiplier(twice / (2**20 * y))
    return AddScale(quantize_multiplier(a / twice), quantize_multiplier(b / twice), out)
