# SPDX-License-Identifier: Apache-2.0
"""The arithmetic in plain Python integers, element by element, for tests of single kernels. Shares nothing with
``trainlet``, nor with its reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

U32 = 0xFFFFFFFF
LO32, HI32 = -(2**31), 2**31 - 1
H_MAX = 2**30


def sat32(x: int) -> int:
    return max(LO32, min(HI32, x))


def clamp(x: int, lo: int, hi: int) -> int:
    return max(lo, min(hi, x))


# --- random words and rounding --------------------------------------------------------------------------------


def mix(x: int) -> int:
    x &= U32
    x ^= x >> 16
    x = x * 0x7FEB352D & U32
    x ^= x >> 15
    x = x * 0x846CA68B & U32
    return x ^ x >> 16


def word(step_key: int, site: int, index: int) -> int:
    """word(index) of a site; ``step_key`` = mix(seed + 0x9e3779b9 step)."""
    return mix(mix(step_key + site) + index)


def quantize_multiplier(d: float) -> tuple[int, int]:
    f, e = math.frexp(d)
    m = math.floor(f * 2.0**31 + 0.5)
    if m == 2**31:
        m, e = m // 2, e + 1
    return (0, 0) if e < -31 else (m, e)


def mbqm(x: int, m: int, sh: int) -> int:
    p = sat32(x << max(sh, 0)) * m
    p += 2**30 if p >= 0 else 1 - 2**30
    high = abs(p) // 2**31 * (1 if p >= 0 else -1)
    n = max(-sh, 0)
    rest = high & 2**n - 1
    return (high >> n) + (rest > ((2**n - 1) >> 1) + (high < 0))


def scale_of(v: float) -> tuple[int, int]:
    """(mult, E) of v = mult 2^(E - 31) > 0."""
    f, e = math.frexp(v)
    return math.floor(f * 2.0**31 + 0.5), e


def smmulr(a: int, m: int) -> int:
    return (a * m + 2**31) >> 32


def prescale(h: int, n: int) -> tuple[int, int]:
    d = max(n - 20, 0)
    if d > 30:
        h = 0
    elif d > 0:
        h = (h + 2 ** (d - 1)) >> d
    return h, min(n, 20)


def sround(h: int, n: int, w: int) -> int:
    return (h + (w >> (32 - n))) >> n if n > 0 else sat32(h << -n)


def headroom(bound: int) -> int:
    return max(p for p in range(17) if bound * 2**p < 2**31)


def further(h: int, r: int, k: int) -> int:
    more = clamp(r * 2 ** min(k, 24), -H_MAX, H_MAX) if k >= 0 else 0 if k < -7 else r + 2 ** (-k - 1) >> -k
    return clamp(sat32(h + more), -H_MAX, H_MAX)


def rate_step(acc: int, v: np.float32, e_y: int, pre: int, bits: int, w: int) -> int:
    """What an update subtracts: v = lr * rate as fp32, not 0."""
    mult, e = scale_of(float(v))
    h, n = prescale(smmulr(acc << pre, mult), -(e + e_y - pre + 1 + bits))
    return sround(h, n, w)


def store_weight(full: int, bits: int) -> tuple[int, int]:
    """(w, l) of F."""
    w = (full + ((1 << bits) >> 1)) >> bits
    return w, full - (w << bits)


# --- a depthwise layer ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Geometry: input h x w x c, kernel, stride, dilation, pads (top, bottom, left, right)."""

    size: tuple[int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    x_zero: int = 0

    @property
    def out(self) -> tuple[int, int]:
        (h, w, _), (t, b, left, r) = self.size, self.pads
        reach = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        return (h + t + b - reach[0]) // self.stride[0] + 1, (w + left + r - reach[1]) // self.stride[1] + 1

    def taps(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """(oy, ox, ky, kx, iy, ix) of each tap that meets data."""
        (h, w, _), (oh, ow) = self.size, self.out
        for oy in range(oh):
            for ky in range(self.kernel[0]):
                iy = oy * self.stride[0] - self.pads[0] + ky * self.dilation[0]
                if not 0 <= iy < h:
                    continue
                for ox in range(ow):
                    for kx in range(self.kernel[1]):
                        ix = ox * self.stride[1] - self.pads[2] + kx * self.dilation[1]
                        if 0 <= ix < w:
                            yield oy, ox, ky, kx, iy, ix


def forward_sums(layer: Layer, x: np.ndarray, w: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """int64 (out_h, out_w, C); w is (C, kh, kw)."""
    acc = np.tile(bias.astype(np.int64), (*layer.out, 1))
    for oy, ox, ky, kx, iy, ix in layer.taps():
        acc[oy, ox] += w[:, ky, kx].astype(np.int64) * (x[iy, ix].astype(np.int64) - layer.x_zero)
    return acc


def dx_sums(layer: Layer, r: np.ndarray, w: np.ndarray) -> np.ndarray:
    acc = np.zeros(layer.size, np.int64)
    for oy, ox, ky, kx, iy, ix in layer.taps():
        acc[iy, ix] += w[:, ky, kx].astype(np.int64) * r[oy, ox]
    return acc


def dw_sums(layer: Layer, r: np.ndarray, x: np.ndarray) -> np.ndarray:
    acc = np.zeros((layer.size[2], *layer.kernel), np.int64)
    for oy, ox, ky, kx, iy, ix in layer.taps():
        acc[:, ky, kx] += r[oy, ox].astype(np.int64) * (x[iy, ix].astype(np.int64) - layer.x_zero)
    return acc


def requantize(acc: np.ndarray, scales: Sequence[tuple[int, int]], y_zero: int, lo: int, hi: int) -> np.ndarray:
    """int8; scales (m, sh) per channel."""
    channels = acc.shape[-1]
    flat = [clamp(mbqm(int(v), *scales[i % channels]) + y_zero, lo, hi) for i, v in enumerate(acc.reshape(-1).tolist())]
    return np.array(flat, np.int8).reshape(acc.shape)


@dataclass
class Rounded:
    """What the rounding of a gradient tensor gives."""

    rx: np.ndarray
    e_x: int
    rho: int
    saturated: int = 0
    rels: list[int] = field(default_factory=list)


def round_gradient(
    acc: np.ndarray,
    scales: Sequence[tuple[int, int]],
    pre: int,
    e_y: int,
    anchor: int,
    rho: int,
    rest: Sequence[tuple[np.ndarray, int]],
    mask: np.ndarray | None,
    step_key: int,
    site: int,
) -> Rounded:
    """Section 4; scales (mult, E) per channel; rest: further gradients and their exponents."""
    e_x = anchor + rho - 6
    channels = acc.shape[-1]
    out = Rounded(np.zeros(acc.shape, np.int8), e_x, rho)
    flat, seen, shifts = out.rx.reshape(-1), [0] * channels, [0] * channels
    for i, a in enumerate(acc.reshape(-1).tolist()):
        c = i % channels
        mult, e = scales[c]
        h, n = prescale(smmulr(a << pre, mult), e_x - (e + e_y - pre + 1))
        shifts[c] = n
        for r, e_r in rest:
            h = further(h, int(r.reshape(-1)[i]), e_r - e_x + n)
        if mask is not None and not mask.reshape(-1)[i]:
            h = 0
        seen[c] |= h ^ (h >> 31)
        q = sround(h, n, word(step_key, site, i))
        flat[i] = clamp(q, -127, 127)
        out.saturated += q != flat[i]
    out.rels = [o.bit_length() + e_x - n - anchor for o, n in zip(seen, shifts, strict=True) if o > 0]
    if out.rels:
        out.rho = clamp(max(max(out.rels), rho - 1), -60, 60)
    return out
