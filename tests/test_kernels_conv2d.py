# SPDX-License-Identifier: Apache-2.0
"""The general convolution kernels and the plain rounding alone: the cases of the test vectors bit for bit, random layers
against plain Python, in the x86 and the plain form, whole and in ranges of rows; scratch as the planner reserves it;
planted faults."""

from __future__ import annotations

import ctypes
from ctypes import byref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conv2d_checks import (
    check_largest_dw,
    check_largest_forward,
    check_pads_after,
    check_random,
    planned,
    split,
)
from conv_cases import COUNT, ConvCase, load_case
from depthwise_checks import pack, unpack
from kernel_library import (
    RUNNABLE,
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
    library,
    plain,
)  # fmt: skip
from kernel_model import mix, store_weight

from trainlet.ops import Conv2d, conv_out_hw, numerics
from trainlet.ops.conv2d_dx import sums_of_dx

RANDOM = 300


@pytest.fixture(params=RUNNABLE)
def lib(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return library(request.param)


def geometry(conv: Conv2d, x: tuple[int, ...], out_c: int, x_zero: int) -> Conv:
    out = conv_out_hw(conv, x[0], x[1])
    pads = (conv.pads[0], conv.pads[2])
    return Conv(*x, *out, out_c, *conv.kernel, *conv.stride, *conv.dilation, *pads, conv.groups, x_zero)


def check_forward(lib: ctypes.CDLL, case: ConvCase, w: Weights, c: Conv) -> None:
    i, a = case.info, case.arrays
    mult, shift = (block(t) for t in numerics.requantize(i["x_scale"], a["sw"].astype(np.float32), i["y_scale"]))
    q = Requant(mult.at, shift.at, i["y_zero"], *i["clamp"])
    x, bias, work = block(a["x"]), block(a["b"]), planned(lib, "conv2d_scratch", c, 0)
    for cuts in ((0, c.out_h), tuple(range(c.out_h + 1))):
        y = block(np.zeros_like(a["y"]))
        for y0, y1 in pairwise(cuts):
            lib.tl_conv2d_s8(byref(c), byref(q), w, bias.ctypes, plain(x), plain(y), y0, y1, work.ctypes)
        np.testing.assert_array_equal(y, a["y"], "forward")


def check_dx(lib: ctypes.CDLL, case: ConvCase, w: Weights, c: Conv) -> None:
    i, a = case.info, case.arrays
    scale = a["sw"].astype(np.float32)
    levels, bound = sums_of_dx(case.conv, a["w"].shape[0])
    s = numerics.sums_scale(numerics.sums_units(scale, levels), bound)
    assert (numerics.dx_bits(a["w"].shape[0] // i["groups"] * i["kernel"] ** 2), s.pre) == (i["b"], i["p"])
    mt, mult, exp = block(numerics.channel_factors(scale, levels)), block(s.mult), block(s.exp)
    v = DxScale(mt.at, mult.at, exp.at, s.pre)
    more = [block(g) for g, _ in case.residuals]
    grads = (Grad * max(len(more), 1))(*(Grad(plain(g), e) for g, (_, e) in zip(more, case.residuals, strict=True)))
    bits = block(np.packbits(a["mask"].reshape(-1), bitorder="little")) if i["masked"] else None
    r, work = block(a["r"]), planned(lib, "conv2d_dx_scratch", c, 0)
    key = mix(i["seed"] + 0x9E3779B9 * i["step"])
    for cuts in ((0, c.in_h), tuple(range(c.in_h + 1))):
        rho, e, rx = block([i["rho"]], np.int8), block([0], np.int16), block(np.zeros_like(a["rx"]))
        mask = Mask(bits.at if bits is not None else None, None, 0, 0)
        site = Site(i["sites"][0], rho.at, e.at, grads, len(more), mask)
        step = Step(key, i["A"], 0, 0)
        for y0, y1 in pairwise(cuts):
            g = Grad(plain(r), i["e_y"])
            lib.tl_conv2d_dx_s8(byref(step), byref(c), byref(v), w, g, byref(site), rx.ctypes, y0, y1, work.ctypes)
        np.testing.assert_array_equal(rx, a["rx"], "input gradient")
        assert (int(e[0]), int(rho[0]), step.rounded) == (i["e_x"], i["rho_after"], rx.size)


def check_dw(lib: ctypes.CDLL, case: ConvCase, c: Conv) -> None:
    i, a = case.info, case.arrays
    bits, channels = i["fraction_bits"], case.channels.astype(np.int64)
    scale = a["sw"].astype(np.float32)
    rate = numerics.weight_rate(case.conv.dead, scale, i["x_scale"])
    live = np.setdiff1d(np.arange(len(scale)), case.dead)
    np.testing.assert_array_equal(rate[live], a["kw"][live])
    np.testing.assert_array_equal(numerics.bias_rate(case.conv.dead, scale, i["x_scale"])[live], a["kb"][live])
    w = block(a["w"][..., channels])
    packed = pack(np.zeros(w.size, np.int64), bits)
    fraction = None if packed is None else block(packed)
    cg = a["w"].shape[3]
    kept = np.concatenate([g * cg + channels for g in range(i["groups"])])
    x, r, rates, table = block(a["x"][..., kept]), block(a["r"]), block(rate), block(channels, np.uint16)
    d = Dw(i["sites"][1], table.at, len(channels), bits, numerics.pre_shift(127 * 255 * c.out_h * c.out_w), rates.at)
    step = Step(mix(i["seed"] + 0x9E3779B9 * i["step"]), 0, 0, 0)
    work = planned(lib, "conv2d_dw_scratch", c, len(channels))
    lib.tl_conv2d_dw_s8(
        byref(step), byref(c), byref(d), Grad(plain(r), i["e_y"]), plain(x), ctypes.c_float(i["lr"]), w.ctypes,
        None if fraction is None else fraction.ctypes, work.ctypes,
    )  # fmt: skip
    full = (w.astype(np.int64) << bits) + unpack(fraction, w.size, bits).reshape(w.shape)
    np.testing.assert_array_equal(full, a["full"][..., channels], "weights")
    assert all(store_weight(int(f), bits)[0] == v for f, v in zip(full.reshape(-1)[:50], w.reshape(-1), strict=False))


def check(lib: ctypes.CDLL, case: ConvCase) -> None:
    a = case.arrays
    c = geometry(case.conv, a["x"].shape, a["w"].shape[0], case.info["x_zero"])
    w, kept = split(a["w"], case.channels.astype(np.int64))
    check_forward(lib, case, w, c)
    check_dx(lib, case, w, c)
    check_dw(lib, case, c)
    del kept


def general(assets: Path) -> list[ConvCase]:
    return [case for case in (load_case(assets, n) for n in range(COUNT)) if not case.info["depthwise"]]


def check_all(lib: ctypes.CDLL, cases: list[ConvCase]) -> None:
    for case in cases:
        check(lib, case)


def test_vectors(assets: Path, lib: ctypes.CDLL) -> None:
    cases = general(assets)
    assert len(cases) > 20
    check_all(lib, cases)


def everything(lib: ctypes.CDLL) -> None:
    """All but the vectors."""
    check_pads_after(lib)
    check_largest_forward(lib)
    check_largest_dw(lib)
    for seed in range(RANDOM):
        check_random(lib, seed)


def test_random_layers_and_ends(lib: ctypes.CDLL) -> None:
    everything(lib)


def test_plain_and_vector_tiles_give_the_same_sums() -> None:
    rng = np.random.default_rng(0)
    libs = [library(b) for b in RUNNABLE]
    for n in (1, 2, 3, 5, 31, 32, 33, 576):
        even = (n + 1) // 2 * 2
        x = block(np.pad(rng.integers(-16129, 16130, (8, n)), ((0, 0), (0, even - n))), np.int16)
        w = block(rng.integers(-127, 128, (even // 2, 16, 2)), np.int8)
        got = []
        for lib in libs:
            acc = block(np.full((8, 16), 3), np.int32)
            lib.tl_tile(x.ctypes, w.ctypes, even, acc.ctypes)
            got.append(acc)
        pairs = w.astype(np.int64).transpose(0, 2, 1).reshape(even, 16)
        for acc in got:
            np.testing.assert_array_equal(acc, 3 + x.astype(np.int64) @ pairs)


# --- planted faults -------------------------------------------------------------------------------------------

VECTOR_FAULTS = {
    "a tap further": ("conv2d.c", "- c->pad_h + ky * c->dil_h", "- c->pad_h + (ky + 1) * c->dil_h"),
    "forward truncates": ("tl_math.h", "+ ((int64_t)1 << 30)) >> 31", ") >> 31"),
    "the next random word": ("conv2d_dw.c", "(uint32_t)row->channel[j]", "(uint32_t)row->channel[j] + 1"),
    "a gradient that overwrites": ("round.c", "site->n_further; i++", "site->n_further - 1; i++"),
    "one pixel short": ("conv2d_dw.c", "n = TL_MIN(size, pixels - p0),", "n = TL_MIN(size, pixels - p0) - 1,"),
}  # fmt: skip
RANDOM_FAULTS = {
    "padding to the right is forgotten": ("conv2d.c", "|| c->out_w != c->in_w", ""),
    "padding is not the zero point": ("conv2d.c", "            tl_zero16(to, row_terms);", "            for (int32_t i = 0; i < row_terms; i++) to[i] = 1;"),
    "pixels without their gap": ("conv2d.c", "&& x.pixel == c->in_c && x.row == c->in_w * c->in_c;", ";"),
    "a ring that does not turn": ("conv2d.c", "tl_ring(iy, x.ring)", "TL_MIN(iy, x.ring - 1)"),
    "an output ring that does not turn": ("conv2d.c", "y.data + tl_ring(y0, y.ring)", "y.data + TL_MIN(y0, y.ring - 1)"),
    "forward: the trained channels come first": ("conv2d.c", "i < w.n ? TL_MIN(w.channels[i], end) : end", "i < w.n ? TL_MIN(i, end) : end"),
    "forward: the input of group 0": ("conv2d.c", "of = {group * cg + i0, p.count}", "of = {i0, p.count}"),
    "no slow way for left shifts": ("tl_requant.h", "q->shift[o] <= 0 &&", ""),
    "no slow way for large biases": ("tl_requant.h", "bias[o] <= room && bias[o] >= -room", "1"),
    "dx: dilation is stride": ("conv2d_dx.c", "iy + c->pad_h - ky * c->dil_h", "iy + c->pad_h - ky * c->stride_h"),
    "dx: a column past the output": ("conv2d_dx.c", "out < limit ? out", "out <= limit ? out"),
    "dx: the scale of group 0": ("conv2d_dx.c", "mt + of.first, of.count", "mt, of.count"),
    "dx: a trained channel too far": ("conv2d_dx.c", "below < w.n && w.channels[below] == i0 + j", "below < w.n && w.channels[below] == j"),
    "dw: the word of the kept channel": ("conv2d_dw.c", "d->channels ? d->channels[j0 + j] : j0 + j", "j0 + j"),
    "dw: the input of group 0": ("conv2d_dw.c", "t.group * d->kept + j0", "j0"),
    "dw: padding is 0": ("conv2d_dw.c", "padding[j] = (int8_t)c->x_zero", "padding[j] = 0"),
    "dw: the sum of the last chunk only": ("conv2d_dw.c", "total[i] += t->", "total[i] = t->"),
    "dw: a step that wraps": ("conv2d_dw.c", "tl_clamp(tl_rate_step(rate, acc[j] - off, 0), -STEP_MAX, STEP_MAX)", "tl_rate_step(rate, acc[j] - off, 0)"),
    "dw: padding reads": ("conv2d_dw.c", "ix < c->in_w ?", "ix <= c->in_w ?"),
    "further: no rounding of the shift": ("round.c", "tl_round_shift(tl_clamp(tl_shl(more[j], up), -TL_H_MAX, TL_H_MAX), down)", "(tl_clamp(tl_shl(more[j], up), -TL_H_MAX, TL_H_MAX) >> down)"),
    "further: shifts up to 23": ("round.c", "tl_clamp(k, 0, 24)", "tl_clamp(k, 0, 22)"),
    "further: none beyond 6 bits": ("round.c", "tl_clamp(-k, 0, 8)", "tl_clamp(-k, 0, 6)"),
    "rho rises above its ceiling": ("round.c", "-60, 60)", "-60, 62)"),
    "rho falls by 2": ("round.c", "*r->site->rho - 1)", "*r->site->rho - 2)"),
    "rho moves on nothing": ("round.c", "if (!last || *r->seen == TL_NOTHING_SEEN)", "if (!last)"),
    "statistics before the prescale": ("round.c", "tl_bitlen(r->lane_or[j]) - r->lane_n[j]", "tl_bitlen(r->lane_or[j]) - TL_MIN(r->lane_n[j], 19)"),
    "statistics start anew with each range": ("round.c", "if (first) *seen", "*seen"),
    "rounding without a word": ("round.c", "tl_mix(at + (uint32_t)j)", "0"),
    "a clamp at -128": ("round.c", "tl_clamp(v[j], -127, 127)", "tl_clamp(v[j], -128, 127)"),
    "the mask of the neighbor": ("round.c", "word >>= index & 7;", "word >>= (index + 1) & 7;"),
    "a mask with >=": ("round.c", "lo < y[j] && y[j] < hi", "lo <= y[j] && y[j] < hi"),
    "a rounding from n = 15": ("round.c", "+ 1) : 16);", "+ 1) : 15);"),
    "saturation is not counted": ("round.c", "v[j] < -127 || v[j] > 127", "v[j] > 127"),
}  # fmt: skip


@pytest.mark.parametrize("fault", VECTOR_FAULTS)
def test_a_planted_fault_is_caught_by_the_vectors(assets: Path, fault: str) -> None:
    name, old, new = VECTOR_FAULTS[fault]
    broken = library("plain", {name: (old, new)})
    small = [c for c in general(assets) if c.arrays["x"].size < 5000]
    with pytest.raises(AssertionError):
        check_all(broken, small)


@pytest.mark.parametrize("fault", RANDOM_FAULTS)
def test_a_planted_fault_is_caught(fault: str) -> None:
    name, old, new = RANDOM_FAULTS[fault]
    broken = library("plain", {name: (old, new)})
    with pytest.raises(AssertionError):
        everything(broken)
