# SPDX-License-Identifier: Apache-2.0
"""The general convolution kernels alone: the cases of the test vectors bit for bit, in the x86 and the plain form,
whole and in ranges of rows; scratch as the planner reserves it; random sizes; planted faults."""

from __future__ import annotations

import ctypes
from ctypes import byref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
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
    scratch,
)  # fmt: skip
from kernel_model import mix, store_weight

from trainlet import numerics
from trainlet import scratch as sizes
from trainlet.ops import Conv2d, conv_out_hw

FAULTS = {
    "a tap further": ("conv2d.c", ("- c->pad_h + ky * c->dil_h", "- c->pad_h + (ky + 1) * c->dil_h")),
    "forward truncates": ("tl_math.h", ("+ ((int64_t)1 << 30)) >> 31", ") >> 31")),
    "the next random word": ("conv2d_dw.c", ("d->channels[j] : j)", "d->channels[j] : j) + 1")),
    "a gradient that overwrites": ("round.c", ("site->n_further; i++", "site->n_further - 1; i++")),
    "one pixel short": ("conv2d_dw.c", ("n = TL_MIN(size, pixels - p0);", "n = TL_MIN(size, pixels - p0) - 1;")),
}  # fmt: skip


@pytest.fixture(params=RUNNABLE)
def lib(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return library(request.param)


def geometry(conv: Conv2d, x: tuple[int, ...], out_c: int, x_zero: int) -> Conv:
    out = conv_out_hw(conv, x[0], x[1])
    pads = (conv.pads[0], conv.pads[2])
    return Conv(*x, *out, out_c, *conv.kernel, *conv.stride, *conv.dilation, *pads, conv.groups, x_zero)


def split(w: np.ndarray, channels: np.ndarray) -> tuple[Weights, list[np.ndarray]]:
    """Weights of which ``channels`` are trained, and the buffers to keep alive."""
    n, whole = len(channels), w.shape[3]
    frozen = block(np.delete(w, channels, 3)) if n < whole else None
    trained = block(w[..., channels]) if n else None
    table = block(channels, np.uint16) if 0 < n < whole else None
    kept = [b for b in (frozen, trained, table) if b is not None]
    return Weights(*(None if b is None else b.at for b in (frozen, trained, table)), n), kept


def planned(lib: ctypes.CDLL, name: str, c: Conv, kept: int) -> np.ndarray:
    """Scratch of the size on which planner and kernel agree, full of junk."""
    args = (byref(c), kept) if name == "conv2d_dw_scratch" else (byref(c),)
    n = getattr(lib, f"tl_{name}")(*args)
    shape = (c.in_h, c.in_w, c.in_c, c.out_h, c.out_w, c.out_c, c.kh, c.kw, c.groups, kept)
    assert n == getattr(sizes, name)(*shape)
    return scratch(n, np.random.default_rng(1))


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
    s = numerics.dx_scale(case.conv, a["sw"].astype(np.float32))
    assert s.mt is not None
    assert (numerics.dx_bits(a["w"].shape[0] // i["groups"] * i["kernel"] ** 2), s.pre) == (i["b"], i["p"])
    mt, mult, exp = block(s.mt), block(s.mult), block(s.exp)
    v = DxScale(mt.at, mult.at, exp.at, s.pre)
    more = [block(g) for g, _ in case.residuals]
    grads = (Grad * max(len(more), 1))(*(Grad(plain(g), e) for g, (_, e) in zip(more, case.residuals, strict=True)))
    bits = block(np.packbits(a["mask"].reshape(-1), bitorder="little")) if i["masked"] else None
    r, work = block(a["r"]), planned(lib, "conv2d_dx_scratch", c, 0)
    key = mix(i["seed"] + 0x9E3779B9 * i["step"])
    for cuts in ((0, c.in_h), tuple(range(c.in_h + 1))):
        rho, e, rx = block([i["rho"]], np.int8), block([0], np.int16), block(np.zeros_like(a["rx"]))
        mask = Mask(bits.at if bits is not None else None, None, 0, 0)
        site = Site(i["streams"][0], rho.at, e.at, grads, len(more), mask)
        step = Step(key, i["A"], 0, 0)
        for y0, y1 in pairwise(cuts):
            g = Grad(plain(r), i["e_y"])
            lib.tl_conv2d_dx_s8(
                byref(step), byref(c), byref(v), w, g, byref(site), rx.ctypes, y0, y1, work.ctypes
            )
        np.testing.assert_array_equal(rx, a["rx"], "input gradient")
        assert (int(e[0]), int(rho[0]), step.rounded) == (i["e_x"], i["rho_after"], rx.size)


def check_dw(lib: ctypes.CDLL, case: ConvCase, c: Conv) -> None:
    i, a = case.info, case.arrays
    bits, channels = i["fraction_bits"], case.channels.astype(np.int64)
    scale = a["sw"].astype(np.float32)
    rate = numerics.weight_rate(case.conv, scale, i["x_scale"])
    live = np.setdiff1d(np.arange(len(scale)), case.dead)
    np.testing.assert_array_equal(rate[live], a["kw"][live])
    np.testing.assert_array_equal(numerics.bias_rate(case.conv, scale, i["x_scale"])[live], a["kb"][live])
    w = block(a["w"][..., channels])
    packed = pack(np.zeros(w.size, np.int64), bits)
    fraction = None if packed is None else block(packed)
    cg = a["w"].shape[3]
    kept = np.concatenate([g * cg + channels for g in range(i["groups"])])
    x, r, rates, table = block(a["x"][..., kept]), block(a["r"]), block(rate), block(channels, np.uint16)
    d = Dw(i["streams"][1], table.at, len(channels), bits, numerics.pre_shift(127 * 255 * c.out_h * c.out_w), rates.at)
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


def test_vectors(assets: Path, lib: ctypes.CDLL) -> None:
    cases = general(assets)
    assert len(cases) > 20
    for case in cases:
        check(lib, case)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(assets: Path, fault: str) -> None:
    name, change = FAULTS[fault]
    broken = library(RUNNABLE[0], {name: change})
    caught = 0
    for case in general(assets):
        try:
            check(broken, case)
        except AssertionError:
            caught += 1
    assert caught > 0


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


def test_padding_below_and_to_the_right_of_a_pointwise_layer(lib: ctypes.CDLL) -> None:
    """Outputs past the input see only padding, so they are the bias."""
    conv = Conv2d((1, 1), pads=(0, 2, 0, 1))
    x = block(np.arange(2 * 3 * 4).reshape(2, 3, 4) - 12, np.int8)
    w, bias = np.ones((5, 1, 1, 4), np.int8), np.arange(5, dtype=np.int32)
    c = geometry(conv, x.shape, 5, 3)
    weights, kept = split(w, np.zeros(0, np.int64))
    mult, shift = (block(t) for t in numerics.requantize(1.0, np.ones(5, np.float32), 1.0))
    q, b = Requant(mult.at, shift.at, 0, -128, 127), block(bias)
    y, work = block(np.zeros((4, 4, 5)), np.int8), planned(lib, "conv2d_scratch", c, 0)
    lib.tl_conv2d_s8(byref(c), byref(q), weights, b.ctypes, plain(x), plain(y), 0, 4, work.ctypes)
    sums = np.zeros((4, 4, 5), np.int64) + bias
    sums[:2, :3] += (x.astype(np.int64) - 3).sum(axis=2)[..., None]
    np.testing.assert_array_equal(y, np.clip(sums, -128, 127))
    del kept
