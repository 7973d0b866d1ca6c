# SPDX-License-Identifier: Apache-2.0
"""The general convolution kernels and the plain rounding on random layers against ``kernel_model``. A check raises
AssertionError where a kernel is wrong, so that planted faults can be seen to be caught."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import byref
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from depthwise_checks import pack, same, unpack
from kernel_library import (
    Block,
    Conv,
    Dw,
    DxScale,
    Grad,
    Mask,
    Requant,
    Site,
    Step,
    View,
    Weights,
    block,
    plain,
    scratch,
    vector,
)  # fmt: skip
from kernel_model import (
    Layer,
    Rounded,
    clamp,
    further,
    headroom,
    quantize_multiplier,
    rate_step,
    requantize,
    round_gradient,
    sat32,
    scale_of,
    sround,
    store_weight,
    word,
)  # fmt: skip

from trainlet.ops import scratch as sizes

Rest = list[tuple[np.ndarray, int]]  # further gradients (H, W, C) or (C,), and their exponents


@dataclass(frozen=True)
class Net:
    """A general convolution: the input's geometry, output channels, groups."""

    layer: Layer
    out_c: int
    groups: int

    @property
    def cg(self) -> int:
        """Input channels of a group."""
        return self.layer.size[2] // self.groups

    @property
    def og(self) -> int:
        """Output channels of a group."""
        return self.out_c // self.groups

    @property
    def taps(self) -> int:
        return self.layer.kernel[0] * self.layer.kernel[1]

    def struct(self) -> Conv:
        a = self.layer
        pads = (a.pads[0], a.pads[2])
        return Conv(*a.size, *a.out, self.out_c, *a.kernel, *a.stride, *a.dilation, *pads, self.groups, a.x_zero)

    def places(self) -> Iterator[tuple[slice, slice, tuple[int, ...]]]:
        """(inputs of a group, its outputs, (oy, ox, ky, kx, iy, ix)) of each tap that meets data."""
        for at in self.layer.taps():
            for g in range(self.groups):
                yield slice(g * self.cg, (g + 1) * self.cg), slice(g * self.og, (g + 1) * self.og), at


def forward_sums(net: Net, x: np.ndarray, w: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """int64 (out_h, out_w, O)."""
    acc = np.tile(bias.astype(np.int64), (*net.layer.out, 1))
    real, w = x.astype(np.int64) - net.layer.x_zero, w.astype(np.int64)
    for i, o, (oy, ox, ky, kx, iy, ix) in net.places():
        acc[oy, ox, o] += w[o, ky, kx] @ real[iy, ix, i]
    return acc


def dx_sums(net: Net, r: np.ndarray, mt: np.ndarray, w: np.ndarray) -> np.ndarray:
    """int64 (in_h, in_w, C)."""
    acc = np.zeros(net.layer.size, np.int64)
    t, w = r.astype(np.int64) * mt, w.astype(np.int64)
    for i, o, (oy, ox, ky, kx, iy, ix) in net.places():
        acc[iy, ix, i] += t[oy, ox, o] @ w[o, ky, kx]
    return acc


def dw_sums(net: Net, r: np.ndarray, x: np.ndarray) -> np.ndarray:
    """int64 (O, kh, kw, C_in/groups)."""
    acc = np.zeros((net.out_c, *net.layer.kernel, net.cg), np.int64)
    r, real = r.astype(np.int64), x.astype(np.int64) - net.layer.x_zero
    for i, o, (oy, ox, ky, kx, iy, ix) in net.places():
        acc[o, ky, kx] += np.outer(r[oy, ox, o], real[iy, ix, i])
    return acc


# --- calls ----------------------------------------------------------------------------------------------------


def planned(lib: ctypes.CDLL, name: str, c: Conv, kept: int) -> Block:
    """Scratch of the size on which planner and kernel agree, full of junk."""
    args = (byref(c), kept) if name == "conv2d_dw_scratch" else (byref(c),)
    n = getattr(lib, f"tl_{name}")(*args)
    shape = (c.in_h, c.in_w, c.in_c, c.out_h, c.out_w, c.out_c, c.kh, c.kw, c.groups, kept)
    assert n == getattr(sizes, name)(*shape)
    return scratch(n, np.random.default_rng(1))


def split(w: np.ndarray, channels: np.ndarray) -> tuple[Weights, list[Block]]:
    """Weights of which ``channels`` are trained, and the buffers to keep alive."""
    n, whole = len(channels), w.shape[3]
    frozen = block(np.delete(w, channels, 3)) if n < whole else None
    trained = block(w[..., channels]) if n else None
    table = block(channels, np.uint16) if 0 < n < whole else None
    kept = [b for b in (frozen, trained, table) if b is not None]
    return Weights(*(None if b is None else b.at for b in (frozen, trained, table)), n), kept


def spread(a: np.ndarray, gap: int) -> tuple[Block, View]:
    """A copy of (H, W, C) in which pixels lie C + gap and rows W (C + gap) + gap bytes apart."""
    h, w, c = a.shape
    row = w * (c + gap) + gap
    room = np.full(h * row, 99, np.int8)
    inner = np.lib.stride_tricks.as_strided(room, a.shape, (row, c + gap, 1))
    inner[...] = a
    kept = block(room)
    return kept, View(kept.at, c + gap, row, h)


def view_of(b: Block) -> View:
    return vector(b) if b.ndim == 1 else plain(b)


@dataclass(frozen=True)
class Quant:
    """Requantization: (m, sh) per output channel, zero point, clamp."""

    scales: list[tuple[int, int]]
    bounds: tuple[int, int, int]


def run_forward(
    lib: ctypes.CDLL, net: Net, w: np.ndarray, channels: np.ndarray, bias: np.ndarray, x: np.ndarray, quant: Quant,
    gap: int,
) -> np.ndarray:  # fmt: skip
    """Whole in one call, with ``gap`` bytes between pixels of x; gap < 0: row by row, with rings of just the needed
    rows behind x and two rows behind y."""
    mult, shift = (block([s[i] for s in quant.scales], t) for i, t in ((0, np.int32), (1, np.int8)))
    q, c, layer = Requant(mult.at, shift.at, *quant.bounds), net.struct(), net.layer
    weights, kept = split(w, channels)
    b, work = block(bias, np.int32), planned(lib, "conv2d_scratch", c, 0)
    shape = (*layer.out, net.out_c)
    if gap >= 0:
        xb, seen = spread(x, gap)
        y = block(np.zeros(shape, np.int8))
        lib.tl_conv2d_s8(byref(c), byref(q), weights, b.ctypes, seen, plain(y), 0, shape[0], work.ctypes)
        del xb, kept
        return y
    n = (layer.kernel[0] - 1) * layer.dilation[0] + 1
    ring, out_ring = (block(np.zeros(s, np.int8)) for s in ((n, *layer.size[1:]), (2, *shape[1:])))
    y = np.zeros(shape, np.int8)
    for oy in range(shape[0]):
        top = oy * layer.stride[0] - layer.pads[0]
        ring[...] = 77
        for iy in range(max(top, 0), min(top + n, layer.size[0])):
            ring[iy % n] = x[iy]
        views = (plain(ring), plain(out_ring))
        lib.tl_conv2d_s8(byref(c), byref(q), weights, b.ctypes, *views, oy, oy + 1, work.ctypes)
        y[oy] = out_ring[oy % 2]
    return y


@dataclass(frozen=True)
class Place:
    """A rounding site and its step. mask: bool, or int8 values that pass between -100 and 100."""

    key: int
    anchor: int
    site: int
    rho: int
    rest: Rest
    mask: np.ndarray | None

    @property
    def passes(self) -> np.ndarray | None:
        m = self.mask
        return m if m is None or m.dtype == np.bool_ else (m > -100) & (m < 100)

    def whole(self, shape: tuple[int, ...]) -> Rest:
        """Further gradients as tensors."""
        return [(np.broadcast_to(r, shape), e) for r, e in self.rest]


@dataclass
class Opened:
    """A site as the kernels take it."""

    site: Site
    step: Step
    rho: Block
    e: Block
    kept: list[object]

    def check(self, rx: np.ndarray, want: Rounded, what: str) -> None:
        same(rx, want.rx, what)
        assert (int(self.e[0]), int(self.rho[0])) == (want.e_x, want.rho), what
        assert (self.step.saturated, self.step.rounded) == (5 + want.saturated, 7 + want.rx.size), what


def open_site(p: Place) -> Opened:
    more = [block(r) for r, _ in p.rest]
    grads = (Grad * max(len(more), 1))(*(Grad(view_of(b), e) for b, (_, e) in zip(more, p.rest, strict=True)))
    rho, e, kept = block([p.rho], np.int8), block([0], np.int16), None
    m = Mask(None, None, 0, 0)
    if p.mask is not None and p.mask.dtype == np.bool_:
        kept = block(np.packbits(p.mask.reshape(-1), bitorder="little"))
        m = Mask(kept.at, None, 0, 0)
    elif p.mask is not None:
        kept = block(p.mask)
        m = Mask(None, kept.at, -100, 100)
    site = Site(p.site, rho.at, e.at, grads, len(more), m)
    return Opened(site, Step(p.key, p.anchor, 5, 7), rho, e, [more, grads, kept])


# --- random layers --------------------------------------------------------------------------------------------

SIZES = (1, 3, 5, 31, 33)


def random_net(rng: np.random.Generator) -> Net:
    """A layer over few pixels: odd sizes, any kernel, stride, dilation, padding and groups; one in three pointwise."""
    pointwise = rng.integers(3) == 0
    while True:
        h, w = (int(v) for v in rng.choice((1, 2, 3, 5, 8, 9, 31, 33), 2))
        groups = int(rng.choice((1, 1, 2, 3)))
        c, o = (int(rng.choice((*SIZES, 2, 4, 16, 17, 32))) * groups for _ in range(2))
        pads = tuple(int(v) for v in rng.integers(0, 4, 4))
        pair = [tuple(int(v) for v in rng.integers(1, top, 2)) for top in (5, 4, 3)]
        zero = int(rng.choice((-128, 127, 0, 5)))
        layer = Layer((h, w, c), *pair, pads, zero)
        if pointwise:
            layer = Layer((h, w, c), (1, 1), x_zero=zero)
        if h * w <= 64 and min(layer.out) > 0 and np.prod(layer.out) <= 64 and c * o * np.prod(layer.kernel) < 20000:
            return Net(layer, o, groups)


def check_random(lib: ctypes.CDLL, seed: int) -> None:
    """Forward, input gradient and weight update of a random layer, and a plain rounding of its input's size."""
    rng = np.random.default_rng(seed)
    net = random_net(rng)
    w = rng.integers(-127, 128, (net.out_c, *net.layer.kernel, net.cg)).astype(np.int8)
    x = rng.integers(-128, 128, net.layer.size).astype(np.int8)
    if seed % 3 == 0:  # the largest products
        w, x = np.where(w < 0, -127, 127).astype(np.int8), np.where(x < 0, -128, 127).astype(np.int8)
    kept = int(rng.choice((0, net.cg, rng.integers(0, net.cg + 1))))
    channels = np.sort(rng.choice(net.cg, kept, replace=False))
    _check_forward(lib, rng, net, w, channels, x)
    _check_dx(lib, rng, net, w, channels)
    _check_round(lib, rng, net.layer.size)
    if kept:
        _check_dw(lib, rng, net, w, channels, x)


def _check_forward(
    lib: ctypes.CDLL, rng: np.random.Generator, net: Net, w: np.ndarray, channels: np.ndarray, x: np.ndarray
) -> None:
    wild = rng.integers(4, size=3) == 0  # sums near 2^31; left shifts, multipliers of 0, shifts by 31; a narrow clamp
    top = 2**30 if wild[0] else 2**17
    bias = rng.integers(-top, top + 1, net.out_c)
    exps = rng.uniform(*(((-34, 2), (-33, -28))[rng.integers(2)] if wild[1] else (-14, -4)), net.out_c)
    lo, hi = sorted(int(v) for v in rng.choice(np.arange(-128, 128), 2, replace=False))
    bounds = (int(rng.integers(-128, 128)), *((lo, hi) if wild[2] else (-128, 127)))
    quant = Quant([quantize_multiplier(float(2.0**e)) for e in exps], bounds)
    want = requantize(forward_sums(net, x, w, bias), quant.scales, *bounds)
    got = run_forward(lib, net, w, channels, bias, x, quant, int(rng.choice((-1, 0, 3))))
    same(got, want, f"forward of {net}")


def random_gradient(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(-127, 128, shape).astype(np.int8)


def random_place(rng: np.random.Generator, shape: tuple[int, int, int], e_y: int) -> Place:
    """``e_y`` relative to the anchor; rho such that the rounding leaves something, or at its ends."""
    anchor = int(rng.integers(-30, 10))
    rho = clamp(e_y + int(rng.integers(0, 14)), -60, 60) if rng.integers(3) else int(rng.choice((-60, -59, 59, 60)))
    e_x = anchor + rho - 6
    rest = [
        (random_gradient(rng, shape if rng.integers(3) else shape[2:]), e_x + int(rng.integers(-30, 12)))
        for _ in range(rng.integers(3))
    ]
    values = rng.integers(-128, 128, shape).astype(np.int8)
    mask = (None, values > 0, values, values > 127)[int(rng.integers(4))]
    return Place(int(rng.integers(2**32)), anchor, 3, rho, rest, mask)


def _check_dx(lib: ctypes.CDLL, rng: np.random.Generator, net: Net, w: np.ndarray, channels: np.ndarray) -> None:
    shape, out = net.layer.size, (*net.layer.out, net.out_c)
    r = random_gradient(rng, out if rng.integers(3) else out[2:])
    relative = int(rng.choice((-90, 0, 70))) if rng.integers(4) == 0 else int(rng.integers(-20, 20))
    p = random_place(rng, shape, relative)
    fan = net.og * net.taps
    b = max(n for n in range(1, 8) if 127 * 127 * (2**n - 1) * fan < 2**31)
    mt = rng.integers(1, 2**b, net.out_c)
    mt[rng.integers(net.out_c)] = 2**b - 1
    scale, pre = scale_of(float(np.float32(2.0 ** rng.uniform(-18, -2)))), headroom(127 * 127 * (2**b - 1) * fan)
    e_y = p.anchor + relative
    acc = dx_sums(net, np.broadcast_to(r, out), mt, w)
    want = round_gradient(
        acc, [scale] * shape[2], pre, e_y, p.anchor, p.rho, p.whole(shape), p.passes, p.key, p.site
    )  # fmt: skip
    tables = [block([scale[0]], np.int32), block([scale[1]], np.int16), block(mt, np.int16)]
    v = DxScale(tables[2].at, tables[0].at, tables[1].at, pre)
    c, opened, rb = net.struct(), open_site(p), block(r)
    weights, kept = split(w, channels)
    rx, work = block(np.zeros(shape, np.int8)), planned(lib, "conv2d_dx_scratch", c, 0)
    cuts = sorted({int(n) for n in rng.integers(0, shape[0], 2)} - {0}) if rng.integers(2) else []
    for y0, y1 in pairwise((0, *cuts, shape[0])):
        lib.tl_conv2d_dx_s8(
            byref(opened.step), byref(c), byref(v), weights, Grad(view_of(rb), e_y), byref(opened.site), rx.ctypes,
            y0, y1, work.ctypes,
        )  # fmt: skip
    opened.check(rx, want, f"input gradient of {net}")
    del kept


def _check_round(lib: ctypes.CDLL, rng: np.random.Generator, shape: tuple[int, int, int]) -> None:
    """tl_round_grad_s8: h = 0 with n = 16."""
    p = random_place(rng, shape, int(rng.integers(-20, 20)))
    p = replace(p, rest=[*p.rest, (random_gradient(rng, shape), p.anchor + int(rng.integers(-40, 12)))])
    want = round_plain(p, shape)
    opened, rx = open_site(p), block(np.zeros(shape, np.int8))
    lib.tl_round_grad_s8(byref(opened.step), byref(opened.site), *shape, rx.ctypes)
    opened.check(rx, want, f"rounding of {shape}")


def round_plain(p: Place, shape: tuple[int, int, int]) -> Rounded:
    """The rounding where no consumer computes."""
    e_x, n, seen = p.anchor + p.rho - 6, 16, 0
    out = Rounded(np.zeros(shape, np.int8), e_x, p.rho)
    flat, rest, passes = out.rx.reshape(-1), p.whole(shape), p.passes
    for i in range(flat.size):
        h = 0
        for r, e in rest:
            h = further(h, int(r.reshape(-1)[i]), e - e_x + n)
        if passes is not None and not passes.reshape(-1)[i]:
            h = 0
        seen |= h ^ (h >> 31)
        q = sround(h, n, word(p.key, p.site, i))
        flat[i] = clamp(q, -127, 127)
        out.saturated += q != flat[i]
    if seen:
        out.rho = clamp(max(seen.bit_length() + e_x - n - p.anchor, p.rho - 1), -60, 60)
    return out


def _check_dw(
    lib: ctypes.CDLL, rng: np.random.Generator, net: Net, w: np.ndarray, channels: np.ndarray, x: np.ndarray
) -> None:
    out, c = (*net.layer.out, net.out_c), net.struct()
    r = random_gradient(rng, out if rng.integers(3) else out[2:])
    bits, e_y, key, site = int(rng.choice((0, 4, 8))), int(rng.integers(-25, -5)), int(rng.integers(2**32)), 1
    lr = np.float32(2.0 ** rng.uniform(-12, 24 if rng.integers(4) == 0 else 6))
    rate = (2.0 ** rng.uniform(-3, 6, net.out_c)).astype(np.float32)
    rate[rng.integers(net.out_c)] = 0
    limit, pre = 127 << bits, headroom(127 * 255 * out[0] * out[1])
    kept = w[..., channels].astype(np.int64) << bits
    full = np.clip(kept + rng.integers(-(2**bits), 2**bits + 1, kept.shape), -limit, limit)
    acc, want = dw_sums(net, np.broadcast_to(r, out), x)[..., channels], full.copy()
    for at in np.ndindex(want.shape):
        v = lr * rate[at[0]]
        if v == 0:
            continue
        index = (at[0] * net.taps + at[1] * net.layer.kernel[1] + at[2]) * net.cg + int(channels[at[3]])
        by = rate_step(int(acc[at]), v, e_y, pre, bits, word(key, site, index))
        want[at] = clamp(sat32(int(full[at]) - by), -limit, limit)
    pairs = [store_weight(int(f), bits) for f in full.reshape(-1)]
    stored, packed = block([a for a, _ in pairs], np.int8), pack(np.array([b for _, b in pairs]), bits)
    fraction = None if packed is None else block(packed)
    table = None if len(channels) == net.cg and rng.integers(2) else block(channels, np.uint16)
    rates, rb = block(rate), block(r)
    columns = np.concatenate([g * net.cg + channels for g in range(net.groups)])
    xb, seen = spread(x[..., columns], int(rng.choice((0, 2))))
    d = Dw(site, None if table is None else table.at, len(channels), bits, pre, rates.at)
    work = planned(lib, "conv2d_dw_scratch", c, len(channels))
    lib.tl_conv2d_dw_s8(
        byref(Step(key, 0, 0, 0)), byref(c), byref(d), Grad(view_of(rb), e_y), seen, ctypes.c_float(lr), stored.ctypes,
        None if fraction is None else fraction.ctypes, work.ctypes,
    )  # fmt: skip
    got = ((stored.astype(np.int64) << bits) + unpack(fraction, stored.size, bits)).reshape(full.shape)
    same(got, want, f"weights of {net}")
    del xb


def check_pads_after(lib: ctypes.CDLL) -> None:
    """Padding below or to the right alone: also a kernel of one tap has outputs past its input then."""
    rng = np.random.default_rng(0)
    for pads in ((0, 2, 0, 0), (0, 0, 0, 2), (0, 1, 0, 1)):
        net = Net(Layer((3, 5, 16), (1, 1), pads=pads, x_zero=5), 20, 1)
        w, x = (rng.integers(-127, 128, s).astype(np.int8) for s in ((20, 1, 1, 16), net.layer.size))
        bias, quant = rng.integers(-(2**12), 2**12, 20), Quant([quantize_multiplier(2.0**-9)] * 20, (3, -128, 127))
        want = requantize(forward_sums(net, x, w, bias), quant.scales, *quant.bounds)
        same(run_forward(lib, net, w, np.arange(0), bias, x, quant, 0), want, f"forward of {net}")
        _check_dx(lib, rng, net, w, np.arange(3))
        _check_dw(lib, rng, net, w, np.arange(3), x)


# --- the largest sums -----------------------------------------------------------------------------------------


def check_largest_forward(lib: ctypes.CDLL) -> None:
    """K = 33,155 is the largest that the import lets through: sums reach the ends of int32 on the way."""
    for zero, value, bias in ((-128, 127, 2**30), (127, -128, -(2**30))):
        net = Net(Layer((1, 3, 33155), (1, 1), x_zero=zero), 3, 1)
        w, x = np.full((3, 1, 1, 33155), 127, np.int8), np.full(net.layer.size, value, np.int8)
        quant = Quant([quantize_multiplier(d) for d in (2.0**-24, 2.0**-26, 0.99 * 2.0**-31)], (0, -128, 127))
        sums = forward_sums(net, x, w, np.full(3, bias))
        assert np.abs(sums).max() > 2**31 - 2**23
        got = run_forward(lib, net, w, np.arange(0), np.full(3, bias), x, quant, 0)
        same(got, requantize(sums, quant.scales, *quant.bounds), "largest sums")


def check_largest_dw(lib: ctypes.CDLL) -> None:
    """As many output pixels as a row may have, and the largest products: the sum reaches -2^31 almost."""
    net = Net(Layer((1, 65535, 1), (2, 1), pads=(0, 1, 0, 0), x_zero=-128), 1, 1)
    assert net.layer.out == (1, 65535)
    r, x = np.full((1, 65535, 1), -127, np.int8), np.full(net.layer.size, 127, np.int8)
    want = -127 * 255 * 65535
    rate, w = block(np.ones(1, np.float32)), block([[[[0]], [[0]]]], np.int8)
    c, rb, xb, key, e_y, lr = net.struct(), block(r), block(x), 9, -20, np.float32(2.0**-4)
    pre = headroom(127 * 255 * 65535)
    d = Dw(1, None, 1, 0, pre, rate.at)
    work = planned(lib, "conv2d_dw_scratch", c, 1)
    lib.tl_conv2d_dw_s8(
        byref(Step(key, 0, 0, 0)), byref(c), byref(d), Grad(plain(rb), e_y), plain(xb), ctypes.c_float(lr), w.ctypes,
        None, work.ctypes,
    )  # fmt: skip
    by = [rate_step(a, lr, e_y, pre, 0, word(key, 1, i)) for i, a in enumerate((want, 0))]
    assert abs(by[0]) > 20
    same(w.reshape(-1), np.clip([-by[0], -by[1]], -127, 127), "weights of many pixels")
