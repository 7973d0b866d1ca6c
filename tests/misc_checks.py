# SPDX-License-Identifier: Apache-2.0
"""Checks of the kernels of head, pool, addition, masks and biases; each raises AssertionError where one is wrong."""

from __future__ import annotations

import ctypes
import math
from ctypes import byref, c_float

import numpy as np
from conv_cases import ConvCase
from depthwise_checks import same
from kernel_library import (
    NOT_FINITE,
    OK,
    ZERO_GRADIENT,
    Add,
    Block,
    Conv,
    Grad,
    Mask,
    Step,
    View,
    block,
    plain,
    scratch,
    vector,
)  # fmt: skip
from kernel_model import (
    clamp,
    headroom,
    mbqm,
    mix,
    quantize_multiplier,
    rate_step,
    sat32,
    sround,
    word,
)  # fmt: skip

F = np.float32
LIMIT = 2**30


def bits_of(a: np.ndarray) -> np.ndarray:
    return np.asarray(a, F).view(np.uint32)


def same_bits(got: np.ndarray, want: np.ndarray, what: str) -> None:
    same(bits_of(got), bits_of(want), what)


# --- exp and log, from section 3 ------------------------------------------------------------------------------


def model_exp(x: np.float32) -> np.float32:
    if x < F(-80):
        return F(0)
    n = F(math.floor(F(F(x * F(1.44269504)) + F(0.5))))
    r = F(x - F(n * F(0.693359375)))
    r = F(r - F(n * F(-2.12194440e-4)))
    p = F(1.3888889e-3)
    for c in (8.3333333e-3, 4.1666667e-2, 1.6666667e-1, 0.5, 1, 1):
        p = F(F(p * r) + F(c))
    return F(np.ldexp(p, int(n)))


def model_log(z: np.float32) -> np.float32:
    f, e = np.frexp(F(z))
    if f < F(0.70710678):
        f, e = F(2) * f, e - 1
    s = F(F(f - F(1)) / F(f + F(1)))
    t = F(s * s)
    p = F(0.22222222)
    for c in (0.28571429, 0.4, 0.66666667, 2):
        p = F(F(p * t) + F(c))
    return F(F(F(e) * F(0.69314718)) + F(s * p))


def check_exp_and_log(lib: ctypes.CDLL) -> None:
    rng = np.random.default_rng(0)
    edge = [F(0), F(-0.0), F(-80), np.nextafter(F(-80), F(-81)), F(-1e30), F(-np.inf), F(-1e-30)]
    xs = np.concatenate([edge, -F(90) * rng.random(3000, F), -np.exp2(-F(30) * rng.random(500, F))]).astype(F)
    same_bits(np.array([lib.probe_exp(c_float(x)) for x in xs]), np.array([model_exp(x) for x in xs]), "exp")
    zs = np.concatenate([[F(1), F(2), F(3.4e38)], np.exp2(F(40) * rng.random(3000, F)), 1 + rng.random(500, F)])
    got = np.array([lib.probe_log(c_float(z)) for z in zs.astype(F)])
    same_bits(got, np.array([model_log(z) for z in zs.astype(F)]), "log")


# --- head -----------------------------------------------------------------------------------------------------


def features(x: np.ndarray, zero: int, scale: np.float32) -> np.ndarray:
    return (x.astype(np.int32) - zero).astype(F) * scale


def model_softmax(z: np.ndarray, label: int) -> tuple[np.float32, np.ndarray]:
    top = z.max()
    e = np.array([model_exp(F(v - top)) for v in z], F)
    total = F(0)
    for v in e:
        total = F(total + v)
    p = e / total
    p = np.where(p < F(2.0**-60), F(0), p)
    loss = F(model_log(total) - F(z[label] - top))
    return loss, p - (np.arange(z.size) == label).astype(F)


def softmax(lib: ctypes.CDLL, z: np.ndarray, label: int) -> tuple[int, float, np.ndarray]:
    """(status, loss, g); 7 and sevens where nothing was written."""
    zb, g, loss = block(z, F), block(np.full(z.size, 7, F)), c_float(7)
    return lib.tl_softmax_xent_f32(zb.ctypes, z.size, label, byref(loss), g.ctypes), loss.value, g


def check_head(lib: ctypes.CDLL, seed: int) -> None:
    """A whole step of the head: logits, loss, gradients, update."""
    rng = np.random.default_rng(seed)
    k, c = (int(v) for v in rng.choice((1, 2, 3, 5, 10, 31, 33, 100), 2))
    zero, scale = int(rng.integers(-128, 128)), F(2.0 ** rng.uniform(-8, -2))
    x = block(rng.integers(-128, 128, c), np.int8)
    w, b = rng.normal(0, 2.0 ** rng.uniform(-4, 3), (k, c)).astype(F), rng.normal(0, 1, k).astype(F)
    wb, bb = block(w), block(b)
    f = features(x, zero, scale)
    logits, a = block(np.zeros(k, F)), np.zeros(k, F)
    for i in range(c):
        a = a + w[:, i] * f[i]
    lib.tl_dense_f32(x.ctypes, zero, c_float(scale), wb.ctypes, bb.ctypes, k, c, logits.ctypes)
    same_bits(logits, a + b, "logits")
    label, lr = int(rng.integers(k)), F(2.0 ** rng.uniform(-14, 3))
    status, loss, g = softmax(lib, np.asarray(logits), label)
    want_loss, want_g = model_softmax(np.asarray(logits), label)
    assert status == OK
    same_bits(np.array([loss]), np.array([want_loss]), "loss")
    same_bits(g, want_g, "g")
    gf, want = block(np.zeros(c, F)), np.zeros(c, F)
    for i in range(k):
        want = want + w[i] * want_g[i]
    lib.tl_dense_dx_f32(g.ctypes, wb.ctypes, k, c, gf.ctypes)
    same_bits(gf, want, "feature gradient")
    lib.tl_dense_sgd_f32(g.ctypes, x.ctypes, zero, c_float(scale), c_float(lr), k, c, wb.ctypes, bb.ctypes)
    step = lr * want_g
    step = np.where(np.abs(step) < F(2.0**-100), F(0), step)
    same_bits(wb, w - step[:, None] * f, "head weights")
    same_bits(bb, b - step, "head biases")


def check_small_probabilities(lib: ctypes.CDLL) -> None:
    """p is cut below 2^-60: 41.588 below the largest logit."""
    z = np.array([0, -41.5, -41.65, -79, -81], F)
    _, _, g = softmax(lib, z, 0)
    same_bits(g, model_softmax(z, 0)[1], "g")
    assert g[1] > 0
    assert list(g[2:]) == [0, 0, 0]
    z = np.array([35, 0, 0, 0], F)
    _, _, g = softmax(lib, z, 0)
    same_bits(g, model_softmax(z, 0)[1], "g")


def check_small_steps(lib: ctypes.CDLL) -> None:
    """l is cut below 2^-100, and 2^-100 itself is not."""
    x = block([1], np.int8)
    for lr, moved in ((2.0**-100, True), (np.nextafter(F(2.0**-100), F(0)), False), (1e-30, True), (7e-31, False)):
        for g in (1.0, -1.0):
            w, b, gb = block([[0.0]], F), block([0.0], F), block([g], F)
            lib.tl_dense_sgd_f32(gb.ctypes, x.ctypes, 0, c_float(1), c_float(lr), 1, 1, w.ctypes, b.ctypes)
            assert (b[0] != 0) == (w[0, 0] != 0) == moved, (lr, g)


def check_random_head(lib: ctypes.CDLL) -> None:
    for seed, k, c in ((0, 3, 5), (17, 10, 160), (2**32 - 1, 1, 1)):
        w, scale = block(np.ones((k, c), F)), F(1.0 / math.sqrt(c))
        lib.tl_random_f32(ctypes.c_uint32(seed), k * c, c_float(scale), w.ctypes)
        words = [word(mix(seed), 0xFFFFFFFF, i) >> 8 for i in range(k * c)]
        want = (np.array(words, F) * F(2.0**-23) - F(1)) * scale
        same_bits(w.reshape(-1), want, "head")
        assert np.abs(w).max() <= scale


# --- entry into integers --------------------------------------------------------------------------------------


def entry(
    lib: ctypes.CDLL, gf: np.ndarray, inverse: float, key: int = 1, site: int = 9
) -> tuple[int, np.ndarray, int, Step]:  # fmt: skip
    """(status, r, e, step); r = 99 and e = 99 where nothing was written."""
    step, g, r, e = Step(key, 33, 2, 3), block(gf, F), block(np.full(gf.size, 99, np.int8)), block([99], np.int16)
    status = lib.tl_enter_grad_s8(
        byref(step), site, g.ctypes, gf.size, c_float(inverse), r.ctypes, e.ctypes
    )  # fmt: skip
    return status, r, int(e[0]), step


def check_entry(lib: ctypes.CDLL, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, inverse = int(rng.choice((1, 3, 31, 33))), F(1.0 / rng.integers(1, 300))
    gf = (rng.normal(0, 1, n) * 2.0 ** rng.uniform(-60, 60) * 2.0 ** rng.uniform(-40, 0, n)).astype(F)
    key = int(rng.integers(2**32))
    status, r, e, step = entry(lib, gf, inverse, key)
    v = gf * inverse
    v = np.where(np.abs(v) < F(2.0**-100), F(0), v)
    anchor = math.frexp(float(np.abs(v).max()))[1]
    h = [math.trunc(math.ldexp(float(a), 20 - (anchor - 7))) for a in v]
    q = [sround(a, 20, word(key, 9, c)) for c, a in enumerate(h)]
    want = [clamp(a, -127, 127) for a in q]
    assert (status, e) == (OK, anchor - 7)
    same(r, np.array(want), "entry")
    saturated = sum(a != b for a, b in zip(q, want, strict=True))
    assert step.tuple() == (key, anchor, 2 + saturated, 3 + n)


def check_entry_truncates(lib: ctypes.CDLL) -> None:
    """h = trunc(v 2^(20-e)), not floor: a value just below -u, where word = u 2^12 rounds -u up to 0."""
    key = next(k for k in range(1000) if 2 < (word(k, 9, 1) >> 12) < 2**18)
    u = word(key, 9, 1) >> 12
    status, r, e, _ = entry(lib, np.array([1, -(u + 0.5) * 2.0**-26], F), 1.0, key)
    assert (status, e) == (OK, -6)
    assert r[1] == 0


def check_entry_is_clamped(lib: ctypes.CDLL) -> None:
    """Just above -2^A rounds to -128 with most words, and to 128 from below 2^A."""
    top = 1 - 2.0**-24
    _, r, _, step = entry(lib, np.full(31, -top, F), 1.0)
    assert set(r.tolist()) == {-127}
    assert step.saturated == 2 + 31
    _, r, _, step = entry(lib, np.full(31, top, F), 1.0)
    assert set(r.tolist()) == {127}
    assert step.saturated == 2 + 31


def check_entry_cut(lib: ctypes.CDLL) -> None:
    """2^-100 is kept, what is smaller is 0; all zero and not finite change nothing."""
    untouched = (1, 33, 2, 3)
    assert entry(lib, np.array([2.0**-100], F), 1.0)[:1] == (OK,)
    for gf, inverse in (([2.0**-101, -0.0, 1e-45], 1.0), ([2.0**-100], 0.5), ([0.0], 1.0)):
        status, r, e, step = entry(lib, np.array(gf, F), inverse)
        assert (status, e, step.tuple()) == (ZERO_GRADIENT, 99, untouched)
        assert set(r.tolist()) == {99}
    for bad in (np.inf, -np.inf, np.nan):
        for at in (0, 2):
            gf = np.ones(3, F)
            gf[at] = bad
            status, r, e, step = entry(lib, gf, 1.0)
            assert (status, e, step.tuple()) == (NOT_FINITE, 99, untouched)
            assert set(r.tolist()) == {99}


# --- addition and pool ----------------------------------------------------------------------------------------


def add_views(rng: np.random.Generator, a: np.ndarray, gap: int) -> tuple[Block, View]:
    """``a`` (H, W, C) with ``gap`` bytes between pixels."""
    h, w, c = a.shape
    held = block(rng.integers(-128, 128, (h, w, c + gap)), np.int8)
    held[..., :c] = a
    return held, View(held.at, c + gap, w * (c + gap), h)


def check_add(lib: ctypes.CDLL, seed: int) -> None:
    """TFLite's ADD; y alone, or in the place of a or b; rows of a part."""
    rng = np.random.default_rng(seed)
    h, w, c = (int(v) for v in rng.choice((1, 3, 5, 31, 33), 3))
    h = min(h, 5)
    a, b = (rng.integers(-128, 128, (h, w, c)).astype(np.int8) for _ in range(2))
    if seed % 4 == 0:
        a[...], b[...] = 127, 127
    sa, sb, sy = (float(2.0**e) for e in rng.uniform(-9, -2, 3))
    if seed % 5 == 0:
        sy = max(sa, sb) * 2.0**-21  # a left shift at the end
    zeros = [int(v) for v in rng.choice((-128, 127, 0, 5, -7), 3)]
    twice = 2 * max(sa, sb)
    factors = [quantize_multiplier(v) for v in (sa / twice, sb / twice, twice / (2**20 * sy))]
    lo, hi = sorted(int(v) for v in rng.choice(np.arange(-128, 128), 2, replace=False))
    p = Add(*zeros, lo, hi, *(m for m, _ in factors), *(s for _, s in factors))
    want = np.zeros((h, w, c), np.int8)
    flat = want.reshape(-1)
    for i, (qa, qb) in enumerate(zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True)):
        parts = (mbqm((q - z) * 2**20, *f) for q, z, f in zip((qa, qb), zeros, factors, strict=False))
        flat[i] = clamp(sat32(mbqm(sum(parts), *factors[2]) + zeros[2]), lo, hi)
    gap = int(rng.integers(2)) * 3
    (ab, va), (bb, vb) = add_views(rng, a, gap), add_views(rng, b, gap)
    held, vy = ((block(np.zeros((h, w, c), np.int8)), None), (ab, va), (bb, vb))[seed % 3]
    vy = vy or plain(held)
    y0 = int(rng.integers(h))
    lib.tl_add_s8(byref(p), va, vb, vy, w, c, 0, y0)
    lib.tl_add_s8(byref(p), va, vb, vy, w, c, y0, h)
    same(held[..., :c], want, "sum")


def check_pool(lib: ctypes.CDLL, seed: int) -> None:
    """TFLite's AVERAGE_POOL_2D."""
    rng = np.random.default_rng(seed)
    h, w, c = (int(v) for v in rng.choice((1, 3, 5, 31), 3))
    kh, kw = int(rng.integers(1, h + 1)), int(rng.integers(1, w + 1))
    kh, kw = min(kh, 8), min(kw, 8)
    (sh, sw), (t, left) = rng.integers(1, 4, 2).tolist(), (int(rng.integers(kh)), int(rng.integers(kw)))
    bottom, right = int(rng.integers(kh)), int(rng.integers(kw))
    oh, ow = (h + t + bottom - kh) // sh + 1, (w + left + right - kw) // sw + 1
    x = rng.integers(-128, 128, (h, w, c)).astype(np.int8)
    if seed % 2:
        x = np.where(rng.integers(2, size=x.shape) == 0, -3, -2).astype(np.int8)  # ties below zero
    want = np.zeros((oh, ow, c), np.int8)
    for oy in range(oh):
        for ox in range(ow):
            rows = slice(max(oy * sh - t, 0), oy * sh - t + kh)
            part = x[rows, max(ox * sw - left, 0) : ox * sw - left + kw].reshape(-1, c).astype(int)
            n = len(part)
            for ch, s in enumerate(part.sum(0).tolist()):
                want[oy, ox, ch] = (s + n // 2) // n if s > 0 else -((n // 2 - s) // n)
    conv = Conv(h, w, c, oh, ow, c, kh, kw, sh, sw, 1, 1, t, left, 1, 0)
    xb, y, work = block(x), block(np.zeros(want.shape, np.int8)), scratch(4 * c, rng)
    cut = int(rng.integers(oh))
    for y0, y1 in ((0, cut), (cut, oh)):
        lib.tl_avg_pool_s8(byref(conv), plain(xb), plain(y), y0, y1, work.ctypes)
    same(y, want, "pool")


# --- masks and kept channels ----------------------------------------------------------------------------------


def check_masks(lib: ctypes.CDLL, seed: int) -> None:
    rng = np.random.default_rng(seed)
    h, w, c = (int(v) for v in rng.choice((1, 3, 5, 31, 33), 3))
    h = min(h, 5)
    lo, hi = sorted(int(v) for v in rng.choice(np.arange(-128, 128), 2, replace=False))
    if seed % 3 == 0:
        lo, hi = -128, 127
    y = block(rng.choice((-128, 127, lo, hi, 0, max(lo - 1, -128), min(hi + 1, 127)), (h, w, c)), np.int8)
    passes = (np.asarray(y, int) > lo) & (np.asarray(y, int) < hi)
    want = np.packbits(passes.reshape(-1), bitorder="little")
    bits = block(np.full(want.size, 255), np.uint8)
    lib.tl_clip_mask_s8(y.ctypes, h * w * c, lo, hi, bits.ctypes)
    same(bits, want, "mask")
    r = rng.integers(-127, 128, (c,) if seed % 2 else (h, w, c)).astype(np.int8)
    rb, out = block(r), block(np.full((h, w, c), 55), np.int8)
    view = vector(rb) if r.ndim == 1 else plain(rb)
    masks = ((Mask(bits.at, None, 0, 0), passes), (Mask(None, y.at, lo, hi), passes), (Mask(None, None, 0, 0), True))
    for mask, where in masks:
        lib.tl_mask_grad_s8(view, mask, h, w, c, out.ctypes)
        same(out, np.where(where, np.broadcast_to(r, (h, w, c)), 0), "masked gradient")


def check_select(lib: ctypes.CDLL, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels, groups, per = (int(v) for v in rng.choice((1, 3, 5, 31), 3))
    channels = np.sort(rng.choice(per, int(rng.integers(1, per + 1)), replace=False))
    x, table = block(rng.integers(-128, 128, (pixels, groups, per)), np.int8), block(channels, np.uint16)
    out = block(np.zeros((pixels, groups, len(channels)), np.int8))
    lib.tl_select_channels_s8(x.ctypes, pixels, groups * per, groups, table.ctypes, len(channels), out.ctypes)
    same(out, np.asarray(x)[..., channels], "kept channels")


# --- biases ---------------------------------------------------------------------------------------------------


def run_bias(
    lib: ctypes.CDLL, r: np.ndarray, hw: tuple[int, int], e: int, rate: np.ndarray, lr: float, bias: np.ndarray,
    key: int, site: int,
) -> np.ndarray:  # fmt: skip
    c = rate.size
    rb, rates, b = block(r), block(rate, F), block(bias, np.int32)
    g, step, work = Grad(vector(rb) if r.ndim == 1 else plain(rb), e), Step(key, 0, 0, 0), block(np.ones(c), np.int32)
    pre = headroom(127 * hw[0] * hw[1])
    lib.tl_bias_sgd_s8(
        byref(step), site, g, *hw, c, rates.ctypes, c_float(lr), pre, b.ctypes, work.ctypes
    )  # fmt: skip
    return b


def check_bias_vector(lib: ctypes.CDLL, case: ConvCase) -> None:
    """The bias update of a case of the vectors."""
    i, a = case.info, case.arrays
    rate = a["kb"].astype(F).copy()
    rate[list(case.dead)] = 0
    key = mix(i["seed"] + 0x9E3779B9 * i["step"])
    got = run_bias(lib, a["r"], a["r"].shape[:2], i["e_y"], rate, i["lr"], a["b"], key, i["sites"][2])
    same(got, a["b_after"], "biases")


def check_bias(lib: ctypes.CDLL, seed: int) -> None:
    """Any lr up to 1e9 and biases up to the limit; dead channels; a gradient that stands for every pixel."""
    rng = np.random.default_rng(seed)
    h, w, c = (int(v) for v in rng.choice((1, 3, 5, 31, 33), 3))
    r = rng.integers(-127, 128, (c,) if seed % 3 == 0 else (h, w, c)).astype(np.int8)
    lr = F(2.0 ** rng.uniform(-40, 30)) if seed % 5 else F(0)
    rate = (2.0 ** rng.uniform(-30, 20, c)).astype(F)
    rate[rng.integers(c)] = 0
    bias = rng.choice((-LIMIT, LIMIT, 0, 1000, LIMIT - 1, 1 - LIMIT), c)
    e, key = int(rng.integers(-60, 3)), int(rng.integers(2**32))
    sums = np.broadcast_to(r, (h, w, c)).reshape(-1, c).astype(int).sum(0)
    want = bias.copy()
    for o in range(c):
        v = lr * rate[o]
        if v != 0:
            by = rate_step(int(sums[o]), v, e, headroom(127 * h * w), 0, word(key, 5, o))
            want[o] = clamp(sat32(int(bias[o]) - by), -LIMIT, LIMIT)
    same(run_bias(lib, r, (h, w), e, rate, float(lr), bias, key, 5), want, "biases")


def check_tiny_rate(lib: ctypes.CDLL) -> None:
    """v is subnormal in fp32: its bits still count. e makes the step as large as the gradient."""
    r, key = np.array([[[100]]], np.int8), 77
    for lr, rate in ((1e-38, 1e-2), (1.5e-45, 1.0), (3e-39, 0.7)):
        v = F(lr) * F(rate)
        assert 0 < v < F(1.2e-38)
        e = -math.frexp(float(v))[1]
        want = -rate_step(100, v, e, headroom(127), 0, word(key, 5, 0))
        got = run_bias(lib, r, (1, 1), e, np.array([rate], F), lr, np.array([0]), key, 5)
        assert got[0] == want != 0
