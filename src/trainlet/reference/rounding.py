# SPDX-License-Identifier: Apache-2.0
"""Everything in a step that is more than linear algebra, in two versions with one interface: ``EXACT`` gives the bytes
that the C gives, ``UNROUNDED`` puts the identity in the place of every rounding, over float64.

The operators do not know which one runs. A FLOAT graph is the unrounded
arithmetic with scale 1 and zero point 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from trainlet.reference.arithmetic import (
    INT32,
    Int,
    Tensor,
    expf,
    logf,
    mbqm,
    prescale,
    quantize_multiplier,
    scaled,
    sround,
    word,
)
from trainlet.reference.linear import F32, F64

LIMIT: Final = 1 << 30  # of a gradient's sum before it is rounded


@dataclass(frozen=True)
class Sums:
    """Sums of a gradient, whoever made them: real value = acc v 2^e, |acc| <= bound; ``v`` broadcasts to acc."""

    acc: Tensor
    v: Tensor
    bound: int
    e: int


@dataclass(frozen=True)
class Site:
    """Where and when a gradient is rounded."""

    key: int
    anchor: int
    rho: int


@dataclass(frozen=True)
class Gradient:
    """A rounded gradient, real value r 2^e, the site's next rho, and how many elements the clamp changed."""

    r: Tensor
    e: int
    rho: int
    saturated: int


@dataclass(frozen=True)
class Entry:
    """The feature gradient as it enters the backward pass; ``zero`` where there is nothing to propagate."""

    r: Tensor
    e: int
    anchor: int
    saturated: int
    zero: bool


Further = Sequence[tuple[Tensor, int]]
Clamp = tuple[float, float] | None


class Rounding(Protocol):
    """One arithmetic. ``real`` is the type of the head, the loss and lr."""

    real: np.dtype[Any]

    def load(self, data: Tensor, dtype: str) -> Tensor:
        """An input, constant or state of that dtype as the arithmetic works on it."""

    def requantize(self, acc: Tensor, scale: Tensor, zero: int, clamp: Clamp) -> Tensor:
        """clamp(acc scale + zero)."""

    def add(self, a: Tensor, b: Tensor, scales: tuple[float, float, float], zero: int, clamp: Clamp) -> Tensor:
        """clamp((a scales[0] + b scales[1]) / scales[2] + zero); a and b without their zero points."""

    def mean(self, total: Tensor, count: Tensor) -> Tensor:
        """total / count."""

    def exp(self, x: Tensor) -> Tensor:
        """e^x, x <= 0."""

    def log(self, z: Tensor) -> Tensor:
        """ln z, z >= 1."""

    def flush(self, v: Tensor, exponent: int) -> Tensor:
        """v, with 0 where |v| < 2^exponent."""

    def channel_factors(self, w_scale: Tensor, levels: int) -> Tensor:
        """mt: w_scale in units of its largest / levels."""

    def enter(self, v: Tensor, site: int) -> Entry:
        """The entry of a finite feature gradient (C,) into the backward pass; ``site`` is its key."""

    def gradient(
        self, shape: tuple[int, ...], sums: Sums | None, further: Further, mask: Tensor | None, site: Site
    ) -> Gradient:
        """The one rounding of a gradient tensor of that shape."""

    def rate(self, lr: Tensor, factor: Tensor) -> Tensor:
        """lr factor, where ``factor`` is a constant in double."""

    def delta(self, sums: Sums, bits: int, site: int, index: Tensor) -> Tensor:
        """The step acc v 2^(e + bits) that is subtracted from a parameter of ``bits`` fraction bits."""

    def split(self, full: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """(w, l) with full = w 2^bits + l."""


# --- the bytes of the page ----------------------------------------------------------------------------------


def add_further(h: Int, r: Tensor, k: Tensor) -> Int:
    """h + r 2^k with h in units of 2^-k; rounded to nearest, saturated to +-2^30."""
    r, k = r.astype(np.int64), np.asarray(k, np.int64)
    up = np.clip(r << np.clip(k, 0, 24), -LIMIT, LIMIT)
    right = np.clip(-k, 1, 31)
    down = np.where(k < -7, 0, (r + (np.int64(1) << (right - 1))) >> right)
    total = np.clip(h + np.where(k >= 0, up, down), *INT32)
    return np.clip(total, -LIMIT, LIMIT)


def magnitude(h: Int, n: Tensor) -> int | None:
    """The largest bitlen(o) - n over channels, o the bitwise or of a channel's h ^ (h >> 31); None if all o are 0."""
    channels = h.reshape(-1, h.shape[-1])
    o = np.bitwise_or.reduce(channels ^ (channels >> 63), axis=0)
    shifts = np.broadcast_to(n, o.shape)
    return max((int(a).bit_length() - int(b) for a, b in zip(o, shifts, strict=True) if a), default=None)


def _clip_gradient(q: Int) -> tuple[Tensor, int]:
    r = np.clip(q, -127, 127)
    return r.astype(np.int8), int(np.count_nonzero(r != q))


class Exact:
    """Integers and single precision, as docs/arithmetic.md says."""

    real = F32

    def load(self, data: Tensor, dtype: str) -> Tensor:
        return data

    def requantize(self, acc: Tensor, scale: Tensor, zero: int, clamp: Clamp) -> Tensor:
        return _bounded(mbqm(acc, *quantize_multiplier(scale)) + zero, clamp)

    def add(self, a: Tensor, b: Tensor, scales: tuple[float, float, float], zero: int, clamp: Clamp) -> Tensor:
        twice = 2.0 * max(scales[:2])
        parts = zip((a, b), scales[:2], strict=True)
        left, right = (mbqm(x.astype(np.int64) << 20, *quantize_multiplier(s / twice)) for x, s in parts)
        total = mbqm(left + right, *quantize_multiplier(twice / ((1 << 20) * scales[2])))
        return _bounded(total + zero, clamp)

    def mean(self, total: Tensor, count: Tensor) -> Tensor:
        half = count // 2
        up, down = (total + half) // count, -((half - total) // count)  # the division truncates
        return _bounded(np.where(total > 0, up, down), None)

    def exp(self, x: Tensor) -> Tensor:
        return expf(x)

    def log(self, z: Tensor) -> Tensor:
        return logf(z)

    def flush(self, v: Tensor, exponent: int) -> Tensor:
        return np.where(np.abs(v) < np.float32(2.0**exponent), np.float32(0), v)

    def channel_factors(self, w_scale: Tensor, levels: int) -> Tensor:
        s = w_scale.astype(np.float64)
        return np.floor(levels * s / float(s.max()) + 0.5).astype(np.int64)

    def enter(self, v: Tensor, site: int) -> Entry:
        largest = float(np.abs(v).max())
        if largest == 0:
            return Entry(np.zeros(v.shape, np.int8), 0, 0, 0, zero=True)
        anchor = int(np.frexp(largest)[1])
        e = anchor - 7
        h = np.trunc(np.ldexp(v.astype(np.float64), 20 - e)).astype(np.int64)
        r, saturated = _clip_gradient(sround(h, 20, word(site, np.arange(v.size))))
        return Entry(r, e, anchor, saturated, zero=False)

    def gradient(
        self, shape: tuple[int, ...], sums: Sums | None, further: Further, mask: Tensor | None, site: Site
    ) -> Gradient:
        e_x = site.anchor + site.rho - 6
        h, n = np.zeros(shape, np.int64), np.asarray(16, np.int64)
        if sums is not None:
            h, x = scaled(sums.acc, sums.v, sums.bound)
            h, n = prescale(h, e_x - (x + sums.e))
        for r, e in further:
            h = add_further(h, r, e - e_x + n)
        if mask is not None:
            h = np.where(mask, h, 0)
        index = np.arange(h.size).reshape(h.shape)
        rounded, saturated = _clip_gradient(sround(h, n, word(site.key, index)))
        return Gradient(rounded, e_x, self._next_rho(magnitude(h, n), e_x, site), saturated)

    @staticmethod
    def _next_rho(top: int | None, e_x: int, site: Site) -> int:
        if top is None:
            return site.rho
        return min(max(top + e_x - site.anchor, site.rho - 1, -60), 60)

    def rate(self, lr: Tensor, factor: Tensor) -> Tensor:
        return np.asarray(lr * factor.astype(np.float32), np.float32)

    def delta(self, sums: Sums, bits: int, site: int, index: Tensor) -> Tensor:
        h, x = scaled(sums.acc, sums.v, sums.bound)
        h, n = prescale(h, -(x + sums.e + bits))
        return sround(h, n, word(site, index))

    def split(self, full: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        w = (full + ((1 << bits) >> 1)) >> bits
        return w.astype(np.int8), (full - (w << bits)).astype(np.int8)


def _bounded(y: Int, clamp: Clamp) -> Tensor:
    lo, hi = clamp or (-128, 127)
    return np.clip(y, int(lo), int(hi)).astype(np.int8)


# --- real numbers -------------------------------------------------------------------------------------------

_KEEPS_ITS_TYPE: Final = frozenset({"u16", "b1"})  # tables and masks are no numbers


def _clamped(y: Tensor, clamp: Clamp) -> Tensor:
    return y if clamp is None else np.clip(y, *clamp)


class Unrounded:
    """float64 with the identity in the place of every rounding; all exponents are 0 and rho rests."""

    real = F64

    def load(self, data: Tensor, dtype: str) -> Tensor:
        return data if dtype in _KEEPS_ITS_TYPE else data.astype(np.float64)

    def requantize(self, acc: Tensor, scale: Tensor, zero: int, clamp: Clamp) -> Tensor:
        return _clamped(acc * scale + zero, clamp)

    def add(self, a: Tensor, b: Tensor, scales: tuple[float, float, float], zero: int, clamp: Clamp) -> Tensor:
        return _clamped((a * scales[0] + b * scales[1]) / scales[2] + zero, clamp)

    def mean(self, total: Tensor, count: Tensor) -> Tensor:
        return np.asarray(total / count)

    def exp(self, x: Tensor) -> Tensor:
        return np.asarray(np.exp(x))

    def log(self, z: Tensor) -> Tensor:
        return np.asarray(np.log(z))

    def flush(self, v: Tensor, exponent: int) -> Tensor:
        return v

    def channel_factors(self, w_scale: Tensor, levels: int) -> Tensor:
        s = w_scale.astype(np.float64)
        return np.asarray(levels * s / s.max())

    def enter(self, v: Tensor, site: int) -> Entry:
        return Entry(v, 0, 0, 0, zero=False)

    def gradient(
        self, shape: tuple[int, ...], sums: Sums | None, further: Further, mask: Tensor | None, site: Site
    ) -> Gradient:
        total: Any = np.zeros(shape) if sums is None else sums.acc * sums.v
        for r, _ in further:
            total = total + r
        if mask is not None:
            total = np.where(mask, total, 0.0)
        return Gradient(total, 0, site.rho, 0)

    def rate(self, lr: Tensor, factor: Tensor) -> Tensor:
        return np.asarray(lr.astype(np.float64) * factor)

    def delta(self, sums: Sums, bits: int, site: int, index: Tensor) -> Tensor:
        return np.asarray(sums.acc * sums.v * 2.0**bits)

    def split(self, full: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        w = full / 2.0**bits
        return w, np.zeros_like(w)


EXACT: Final = Exact()
UNROUNDED: Final = Unrounded()
