# SPDX-License-Identifier: Apache-2.0
"""The primitives of the arithmetic, vectorized over int64, uint32 and float32 arrays; docs/arithmetic.md is normative.

Nothing here is shared with ``numerics.py``, which makes the compiler's constants, nor with the C kernels: that the
three agree is what the tests show. Integers that are int32 in the page are int64 here, so nothing can wrap; functions
saturate where the page does.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

Tensor = NDArray[Any]
Int = NDArray[np.int64]

INT32: Final = (-(1 << 31), (1 << 31) - 1)
GOLDEN: Final = 0x9E3779B9


def _int(a: ArrayLike) -> Int:
    return np.asarray(a, np.int64)


# --- section 1: requantization ------------------------------------------------------------------------------


def _mantissa(d: Tensor) -> tuple[Int, Int]:
    """(floor(f 2^31 + 0.5), e) of d = f 2^e, kept within [2^30, 2^31); (0, 0) of 0."""
    f, e = np.frexp(np.asarray(d, np.float64))
    m, e64 = np.floor(f * 2.0**31 + 0.5).astype(np.int64), e.astype(np.int64)
    over = m == 1 << 31
    return np.where(over, m >> 1, m), np.where(over, e64 + 1, e64)


def quantize_multiplier(d: ArrayLike) -> tuple[Int, Int]:
    """(m, sh) with d = m 2^(sh - 31), d >= 0; (0, 0) where d < 2^-32."""
    m, e = _mantissa(np.asarray(d, np.float64))
    lost = e < -31
    return np.where(lost, 0, m), np.where(lost, 0, e)


def srdhm(a: ArrayLike, b: ArrayLike) -> Int:
    """(a b + (a b >= 0 ? 2^30 : 1 - 2^30)) / 2^31, truncating, for b >= 0.

    Rounding a negative product up from half and cutting it towards zero is the same as one floor."""
    return (_int(a) * _int(b) + (1 << 30)) >> 31


def rdbpot(x: ArrayLike, n: ArrayLike) -> Int:
    """x / 2^n, rounded to nearest, half away from zero; 0 <= n <= 31."""
    x, n = _int(x), _int(n)
    mask = (np.int64(1) << n) - 1
    return (x >> n) + ((x & mask) > (mask >> 1) + (x < 0))


def mbqm(x: ArrayLike, m: ArrayLike, sh: ArrayLike) -> Int:
    """x m 2^(sh - 31) with TFLite's double rounding; the left shift saturates to 32 bits."""
    x, sh = _int(x), _int(sh)
    left, right = np.clip(sh, 0, 31), np.clip(-sh, 0, 31)
    if left.any():
        x = np.clip(x << left, *INT32)
    return rdbpot(srdhm(x, m), right)


# --- section 2: random words and stochastic rounding --------------------------------------------------------


def mix(x: ArrayLike) -> NDArray[np.uint32]:
    """The hash of one 32-bit word."""
    y = np.atleast_1d(np.asarray(x)).astype(np.uint32)  # one element at least: scalars would warn where they wrap
    y = (y ^ (y >> np.uint32(16))) * np.uint32(0x7FEB352D)
    y = (y ^ (y >> np.uint32(15))) * np.uint32(0x846CA68B)
    y = y ^ (y >> np.uint32(16))
    return y.reshape(np.shape(x))


def key(seed: int, step: int, site: int) -> int:
    """The key of one rounding site in one step."""
    of_step = int(mix((seed + GOLDEN * step) & 0xFFFFFFFF))
    return int(mix((of_step + site) & 0xFFFFFFFF))


def word(site: int, index: ArrayLike) -> NDArray[np.uint32]:
    """The random word of the element ``index`` at the site with that key."""
    return mix((_int(index) + site) & 0xFFFFFFFF)


def smmulr(a: ArrayLike, m: ArrayLike) -> Int:
    """(a m + 2^31) >> 32; |a| and m below 2^31."""
    return (_int(a) * _int(m) + (1 << 31)) >> 32


def prescale(h: ArrayLike, n: ArrayLike) -> tuple[Int, Int]:
    """Rounds away what lies more than 20 bits below the unit: (h, n) with n <= 20."""
    h, n = _int(h), _int(n)
    d = np.maximum(n - 20, 0)
    shift = np.clip(d, 1, 31)
    rounded = (h + (np.int64(1) << (shift - 1))) >> shift
    return np.where(d > 30, 0, np.where(d > 0, rounded, h)), np.minimum(n, 20)


def sround(h: ArrayLike, n: ArrayLike, w: ArrayLike) -> Int:
    """h 2^-n, rounded up with the probability of its fraction; |h| <= 2^30, n <= 32, ``w`` the random word."""
    h, n = _int(h), _int(n)
    right, left = np.clip(n, 1, 32), np.clip(-n, 0, 31)
    down = (h + (_int(w) >> (32 - right))) >> right
    return np.where(n > 0, down, np.clip(h << left, *INT32))


def headroom(bound: int) -> int:
    """p: the largest shift in 0..16 with bound 2^p < 2^31; ValueError if the sum itself does not fit."""
    if bound >= 1 << 31:
        raise ValueError(f"a sum of up to {bound} does not fit into 32 bits")
    return max(p for p in range(17) if bound << p < 1 << 31)


def scaled(acc: ArrayLike, v: ArrayLike, bound: int) -> tuple[Int, Int]:
    """(h, x) with acc v = h 2^x; |acc| <= bound; v >= 0 is finite and broadcasts to acc."""
    p = headroom(bound)
    mult, e = _mantissa(np.asarray(v, np.float64))
    return smmulr(_int(acc) << p, mult), e - p + 1


# --- section 3: exponential and logarithm in single precision -----------------------------------------------

_F = np.float32
_EXP: Final = tuple(_F(c) for c in (8.3333333e-3, 4.1666667e-2, 1.6666667e-1, 0.5, 1, 1))
_LOG: Final = tuple(_F(c) for c in (0.28571429, 0.4, 0.66666667, 2))


def expf(x: ArrayLike) -> NDArray[np.float32]:
    """e^x for x <= 0; 0 below -80."""
    given = np.asarray(x, _F)
    y = np.maximum(given, _F(-80))  # what is lower gives 0 anyway, and must not meet the integers
    n = np.floor(y * _F(1.44269504) + _F(0.5))
    r = y - n * _F(0.693359375)
    r = r - n * _F(-2.12194440e-4)
    p = np.full_like(r, _F(1.3888889e-3))
    for c in _EXP:
        p = p * r + c
    return np.where(given < _F(-80), _F(0), np.ldexp(p, n.astype(np.int32)))


def logf(z: ArrayLike) -> NDArray[np.float32]:
    """ln z for z >= 1."""
    f, e = np.frexp(np.asarray(z, _F))
    low = f < _F(0.70710678)
    f, e = np.where(low, _F(2) * f, f), np.where(low, e - 1, e)
    s = (f - _F(1)) / (f + _F(1))
    t = s * s
    p = np.full_like(s, _F(0.22222222))
    for c in _LOG:
        p = p * t + c
    return np.asarray(e.astype(_F) * _F(0.69314718) + s * p, _F)
