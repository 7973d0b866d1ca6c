# SPDX-License-Identifier: Apache-2.0
"""The depthwise kernels on one case of the vectors, or on a random layer against ``kernel_model``. A check raises
AssertionError where a kernel is wrong, so that planted faults can be seen to be caught."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass, field

import numpy as np
from conv_cases import ConvCase
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
    Weights,
    block,
    plain,
    scratch,
    vector,
)  # fmt: skip
from kernel_model import (
    Layer,
    clamp,
    dw_sums,
    dx_sums,
    forward_sums,
    headroom,
    mix,
    quantize_multiplier,
    rate_step,
    requantize,
    round_gradient,
    sat32,
    scale_of,
    store_weight,
    word,
)  # fmt: skip

from trainlet.ops import scratch as sizes


def same(got: np.ndarray, want: np.ndarray, what: str) -> None:
    np.testing.assert_array_equal(got, want, err_msg=what, strict=False)


# --- calls ----------------------------------------------------------------------------------------------------


def conv_of(layer: Layer) -> Conv:
    (h, w, c), (oh, ow) = layer.size, layer.out
    pads = (layer.pads[0], layer.pads[2])
    return Conv(h, w, c, oh, ow, c, *layer.kernel, *layer.stride, *layer.dilation, *pads, c, layer.x_zero)


def _planned(lib: ctypes.CDLL, kind: str, layer: Layer, kept: int, rng: np.random.Generator) -> Block:
    """Scratch of the size that the planner and the kernel agree on."""
    c = conv_of(layer)
    args = (ctypes.byref(c), kept) if kind == "dw" else (ctypes.byref(c),)
    name = "depthwise_scratch" if kind == "forward" else f"depthwise_{kind}_scratch"
    want = getattr(lib, f"tl_{name}")(*args)
    assert getattr(sizes, name)(*layer.size, *layer.out, layer.size[2], *layer.kernel, layer.size[2], kept) == want
    return scratch(want, rng)


@dataclass
class Split:
    """Weights of which ``channels`` are trained; keeps the buffers alive."""

    w: np.ndarray
    channels: np.ndarray
    buffers: list[Block] = field(default_factory=list)

    def struct(self) -> Weights:
        c, n = self.w.shape[0], len(self.channels)
        frozen = block(np.delete(self.w, self.channels, 0)) if n < c else None
        trained = block(self.w[self.channels]) if n else None
        table = block(self.channels, np.uint16) if 0 < n < c else None
        self.buffers = [b for b in (frozen, trained, table) if b is not None]
        return Weights(*(None if b is None else b.at for b in (frozen, trained, table)), n)


def run_forward(
    lib: ctypes.CDLL, layer: Layer, split: Split, bias: np.ndarray, x: np.ndarray, quant: tuple[np.ndarray, np.ndarray],
    bounds: tuple[int, int, int], rng: np.random.Generator, rings: bool,
) -> np.ndarray:  # fmt: skip
    """Whole, or row by row with rings of just the needed rows behind x and two rows behind y."""
    mult, shift = block(quant[0], np.int32), block(quant[1], np.int8)
    q, c = Requant(mult.at, shift.at, *bounds), conv_of(layer)
    b, w = block(bias, np.int32), split.struct()
    work = _planned(lib, "forward", layer, 0, rng)
    shape = (*layer.out, layer.size[2])
    if not rings:
        xb, y = block(x), block(np.zeros(shape, np.int8))
        lib.tl_depthwise_s8(
            ctypes.byref(c), ctypes.byref(q), w, b.ctypes, plain(xb), plain(y), 0, shape[0], work.ctypes
        )
        return y
    n = (layer.kernel[0] - 1) * layer.dilation[0] + 1
    ring = block(np.zeros((n, *layer.size[1:]), np.int8))
    out_ring = block(np.zeros((2, *shape[1:]), np.int8))
    y = np.zeros(shape, np.int8)
    for oy in range(shape[0]):
        top = oy * layer.stride[0] - layer.pads[0]
        ring[...] = 77
        for iy in range(max(top, 0), min(top + n, layer.size[0])):
            ring[iy % n] = x[iy]
        views = (plain(ring), plain(out_ring))
        lib.tl_depthwise_s8(ctypes.byref(c), ctypes.byref(q), w, b.ctypes, *views, oy, oy + 1, work.ctypes)
        y[oy] = out_ring[oy % 2]
    return y


@dataclass
class Gradient:
    """What run_dx gives."""

    rx: np.ndarray
    e_x: int
    rho: int
    step: Step


def run_dx(
    lib: ctypes.CDLL, layer: Layer, split: Split, r: np.ndarray, e_y: int, scales: list[tuple[int, int]], pre: int,
    site: tuple[int, int, list[tuple[np.ndarray, int]], np.ndarray | None], key: int, anchor: int,
    rng: np.random.Generator, cuts: tuple[int, ...] = (),
) -> Gradient:  # fmt: skip
    """site: site, rho, further gradients, mask (bool, or int8 values that pass between -100 and 100). r of shape (C,)
    stands for every pixel. cuts: rows where a call ends and the next begins."""
    site, rho, rest, mask = site
    mult, exp = (block([s[i] for s in scales], t) for i, t in ((0, np.int32), (1, np.int16)))
    rb, w = block(r), split.struct()
    more = [block(g) for g, _ in rest]
    further = (Grad * max(len(more), 1))(*(Grad(plain(g), e) for g, (_, e) in zip(more, rest, strict=True)))
    rho_b, e_b = block([rho], np.int8), block([0], np.int16)
    kept = None
    m = Mask(None, None, 0, 0)
    if mask is not None and mask.dtype == np.bool_:
        kept = block(np.packbits(mask.reshape(-1), bitorder="little"))
        m = Mask(kept.at, None, 0, 0)
    elif mask is not None:
        kept = block(mask)
        m = Mask(None, kept.at, -100, 100)
    s = Site(site, rho_b.at, e_b.at, further, len(more), m)
    step, c, v = Step(key, anchor, 5, 7), conv_of(layer), DxScale(None, mult.at, exp.at, pre)
    g = Grad(vector(rb) if r.ndim == 1 else plain(rb), e_y)
    rx, work = block(np.zeros(layer.size, np.int8)), _planned(lib, "dx", layer, 0, rng)
    stops = (0, *cuts, layer.size[0])
    for y0, y1 in itertools.pairwise(stops):
        lib.tl_depthwise_dx_s8(
            ctypes.byref(step), ctypes.byref(c), ctypes.byref(v), w, g, ctypes.byref(s), rx.ctypes, y0, y1, work.ctypes
        )
    return Gradient(rx, int(e_b[0]), int(rho_b[0]), step)


def pack(fraction: np.ndarray, bits: int) -> np.ndarray | None:
    """Fractions as the kernels store them."""
    if bits == 0:
        return None
    flat = fraction.reshape(-1).astype(np.int8)
    if bits == 8:
        return flat.view(np.uint8)
    low = np.concatenate([flat, np.zeros(flat.size % 2, np.int8)]).view(np.uint8) & 15
    return low[0::2] | low[1::2] << 4


def unpack(stored: np.ndarray | None, count: int, bits: int) -> np.ndarray:
    if stored is None:
        return np.zeros(count, np.int64)
    if bits == 8:
        return stored.view(np.int8).astype(np.int64)
    nibbles = np.stack([stored & 15, stored >> 4], 1).reshape(-1)[:count].astype(np.int64)
    return nibbles - 16 * (nibbles > 7)


def run_dw(
    lib: ctypes.CDLL, layer: Layer, channels: np.ndarray | None, r: np.ndarray, e_y: int, x: np.ndarray,
    full: np.ndarray, rate: np.ndarray, lr: float, bits: int, pre: int, site: tuple[int, int], rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """F (kept, kh, kw) after the update; x and full hold the kept channels only. site: step key, site."""
    kept = full.shape[0]
    pairs = [store_weight(int(f), bits) for f in full.reshape(-1)]
    w = block([p[0] for p in pairs], np.int8)
    packed = pack(np.array([p[1] for p in pairs]), bits)
    fraction = None if packed is None else block(packed)
    table = None if channels is None else block(channels, np.uint16)
    rates = block(rate, np.float32)
    d = Dw(site[1], None if table is None else table.at, kept, bits, pre, rates.at)
    step, c = Step(site[0], 0, 0, 0), conv_of(layer)
    rb, xb = block(r), block(x)
    g = Grad(vector(rb) if r.ndim == 1 else plain(rb), e_y)
    work = _planned(lib, "dw", layer, kept, rng)
    lib.tl_depthwise_dw_s8(
        ctypes.byref(step), ctypes.byref(c), ctypes.byref(d), g, plain(xb), ctypes.c_float(lr), w.ctypes,
        None if fraction is None else fraction.ctypes, work.ctypes,
    )  # fmt: skip
    return ((w.astype(np.int64) << bits) + unpack(fraction, w.size, bits)).reshape(full.shape)


# --- the cases of the vectors ---------------------------------------------------------------------------------


def check_vector(lib: ctypes.CDLL, case: ConvCase) -> None:
    """Forward, input gradient and weight update of a depthwise case."""
    i, a, rng = case.info, case.arrays, np.random.default_rng(0)
    k = (i["kernel"],) * 2
    layer = Layer(
        tuple(a["x"].shape), k, (i["stride"],) * 2, (i["dilation"],) * 2, tuple(i["pads_tblr"]), i["x_zero"]
    )  # fmt: skip
    w, channels = a["w"][..., 0], case.channels.astype(np.int64)
    split = Split(w, channels)
    pairs = [quantize_multiplier(i["x_scale"] * float(s) / i["y_scale"]) for s in a["sw"]]
    quant = (np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs]))
    bounds = (i["y_zero"], *i["clamp"])
    for rings in (False, True):
        same(run_forward(lib, layer, split, a["b"], a["x"], quant, bounds, rng, rings), a["y"], "forward")
    key = mix(i["seed"] + 0x9E3779B9 * i["step"])
    s_dx, s_w, _ = i["sites"]
    mask = a["mask"].astype(bool) if i["masked"] else None
    scales = [scale_of(float(s)) for s in a["sw"]]
    got = run_dx(
        lib, layer, split, a["r"], i["e_y"], scales, i["p"], (s_dx, i["rho"], case.residuals, mask), key, i["A"], rng
    )
    same(got.rx, a["rx"], "input gradient")
    assert (got.e_x, got.rho) == (i["e_x"], i["rho_after"])
    bits, rate = i["fraction_bits"], a["kw"].astype(np.float32).copy()
    rate[list(case.dead)] = 0
    pixels = layer.out[0] * layer.out[1]
    full = run_dw(
        lib, layer, channels, a["r"], i["e_y"], np.ascontiguousarray(a["x"][..., channels]),
        w[channels].astype(np.int64) << bits, rate, i["lr"], bits, headroom(127 * 255 * pixels), (key, s_w), rng,
    )  # fmt: skip
    same(full, a["full"][channels][..., 0], "weights")


# --- random layers --------------------------------------------------------------------------------------------

SIZES = (1, 3, 5, 31, 33)


def random_layer(rng: np.random.Generator) -> Layer:
    """A layer over few pixels: odd sizes, any kernel, stride, dilation and padding."""
    while True:
        h, w = (int(v) for v in rng.choice((1, 2, 3, 5, 8, 9, 31, 33), 2))
        if h * w > 99:
            continue
        c = int(rng.choice((*SIZES, 16, 17, 48)))
        pads = tuple(int(v) for v in rng.integers(0, 5, 4))
        pair = [tuple(int(v) for v in rng.integers(1, top, 2)) for top in (8, 4, 4)]
        layer = Layer((h, w, c), *pair, pads, int(rng.choice((-128, 127, 0, 5))))
        if min(layer.out) > 0 and layer.out[0] * layer.out[1] <= 120:
            return layer


def check_random(lib: ctypes.CDLL, seed: int) -> None:
    """Forward, input gradient and weight update of a random layer."""
    rng = np.random.default_rng(seed)
    layer = random_layer(rng)
    c = layer.size[2]
    w = rng.integers(-127, 128, (c, *layer.kernel)).astype(np.int8)
    x = rng.integers(-128, 128, layer.size).astype(np.int8)
    if seed % 3 == 0:  # the largest products
        w, x = np.where(w < 0, -127, 127).astype(np.int8), np.where(x < 0, -128, 127).astype(np.int8)
    kept = int(rng.choice((0, c, rng.integers(0, c + 1))))
    channels = np.sort(rng.choice(c, kept, replace=False))
    split = Split(w, channels)
    _check_forward(lib, rng, layer, split, x)
    _check_dx(lib, rng, layer, split)
    if kept:
        _check_dw(lib, rng, layer, w, channels, np.ascontiguousarray(x[..., channels]))


def _check_forward(lib: ctypes.CDLL, rng: np.random.Generator, layer: Layer, split: Split, x: np.ndarray) -> None:
    c, wild = layer.size[2], bool(rng.integers(4) == 0)
    top = 2**30 if wild else 2**17
    bias = rng.integers(-top, top + 1, c)
    scales = [quantize_multiplier(float(2.0 ** rng.uniform(-34 if wild else -14, 2 if wild else -4))) for _ in range(c)]
    lo, hi = sorted(int(v) for v in rng.choice(np.arange(-128, 128), 2, replace=False))
    bounds = (int(rng.integers(-128, 128)), *((lo, hi) if wild else (-128, 127)))
    quant = (np.array([s[0] for s in scales]), np.array([s[1] for s in scales]))
    want = requantize(forward_sums(layer, x, split.w, bias), scales, *bounds)
    got = run_forward(lib, layer, split, bias, x, quant, bounds, rng, rings=bool(rng.integers(2)))
    same(got, want, f"forward of {layer}")


def _check_dx(lib: ctypes.CDLL, rng: np.random.Generator, layer: Layer, split: Split) -> None:
    c, (oh, ow) = layer.size[2], layer.out
    everywhere = bool(rng.integers(3) == 0)
    r = rng.integers(-127, 128, (c,) if everywhere else (oh, ow, c)).astype(np.int8)
    whole = np.broadcast_to(r, (oh, ow, c))
    anchor, rho, e_y = (int(rng.integers(*v)) for v in ((-30, 10), (-60, 61), (-20, 20)))
    e_y += anchor
    scales = [scale_of(float(np.float32(2.0 ** rng.uniform(-12, -2)))) for _ in range(c)]
    if rng.integers(2):  # exponents for which neither all nor nothing is left
        rho = clamp(e_y - anchor + int(rng.integers(0, 12)), -60, 60)
    elif rng.integers(2):  # the ends of rho
        rho = int(rng.choice((-60, 60)))
        e_y = anchor + int(rng.choice((-90, 0, 70)))
    e_x = anchor + rho - 6
    rest = [
        (rng.integers(-127, 128, layer.size).astype(np.int8), e_x + int(rng.integers(-30, 12)))
        for _ in range(rng.integers(3))
    ]  # fmt: skip
    values = rng.integers(-128, 128, layer.size).astype(np.int8)
    mask = (None, values > 0, values, values > 127)[int(rng.integers(4))]
    passes = mask if mask is None or mask.dtype == np.bool_ else (mask > -100) & (mask < 100)
    pre, key, site = headroom(127 * 127 * layer.kernel[0] * layer.kernel[1]), int(rng.integers(2**32)), 3
    want = round_gradient(
        dx_sums(layer, whole, split.w), scales, pre, e_y, anchor, rho, rest, passes, key, site
    )  # fmt: skip
    cuts = tuple(sorted({int(v) for v in rng.integers(1, layer.size[0], rng.integers(3))} if layer.size[0] > 1 else ()))
    got = run_dx(lib, layer, split, r, e_y, scales, pre, (site, rho, rest, mask), key, anchor, rng, cuts)
    same(got.rx, want.rx, f"input gradient of {layer}")
    assert (got.e_x, got.rho) == (want.e_x, want.rho)
    assert got.step.tuple() == (key, anchor, 5 + want.saturated, 7 + want.rx.size)


def _check_dw(
    lib: ctypes.CDLL, rng: np.random.Generator, layer: Layer, w: np.ndarray, channels: np.ndarray, x: np.ndarray
) -> None:
    c, (oh, ow), taps = layer.size[2], layer.out, layer.kernel[0] * layer.kernel[1]
    everywhere = bool(rng.integers(3) == 0)
    r = rng.integers(-127, 128, (c,) if everywhere else (oh, ow, c)).astype(np.int8)
    whole = np.broadcast_to(r, (oh, ow, c))[..., channels]
    bits, e_y, key, site = int(rng.choice((0, 4, 8))), int(rng.integers(-25, -5)), int(rng.integers(2**32)), 1
    lr = float(np.float32(2.0 ** rng.uniform(-8, 24)))
    rate = (2.0 ** rng.uniform(-3, 6, c)).astype(np.float32)
    rate[rng.integers(0, c)] = 0
    limit = 127 << bits
    full = clamp_array((w[channels].astype(np.int64) << bits) + rng.integers(-(2**bits), 2**bits + 1), limit)
    kept_layer = Layer((*layer.size[:2], len(channels)), *_rest(layer))
    acc, pre = dw_sums(kept_layer, whole, x), headroom(127 * 255 * oh * ow)
    want = full.copy()
    for j, ch in enumerate(channels):
        v = np.float32(lr) * rate[ch]
        if v == 0:
            continue
        for t in range(taps):
            at = (j, t // layer.kernel[1], t % layer.kernel[1])
            by = rate_step(int(acc[at]), v, e_y, pre, bits, word(key, site, int(ch) * taps + t))
            want[at] = clamp(sat32(int(full[at]) - by), -limit, limit)
    table = None if len(channels) == c and rng.integers(2) else channels
    got = run_dw(lib, layer, table, r, e_y, x, full, rate, lr, bits, pre, (key, site), rng)
    same(got, want, f"weights of {layer}")


def clamp_array(a: np.ndarray, limit: int) -> np.ndarray:
    return np.clip(a, -limit, limit)


def _rest(layer: Layer) -> tuple[object, ...]:
    return layer.kernel, layer.stride, layer.dilation, layer.pads, layer.x_zero
