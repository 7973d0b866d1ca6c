# SPDX-License-Identifier: Apache-2.0
"""tl_math.h: its functions against the test vectors and against plain Python at the ends of their ranges."""

from __future__ import annotations

import ctypes
import math
import subprocess
from ctypes import c_float, c_int32, c_uint32
from pathlib import Path

import numpy as np
import pytest
from depthwise_checks import pack, unpack
from kernel_library import BUILDS, FLAGS, RUNNABLE, WARNINGS, block
from kernel_model import HI32, LO32, mbqm, mix, prescale, sat32, scale_of, smmulr, sround, store_weight

from trainlet.toolchain.host import find_compiler, kernel_sources

SHIM = """#include "tl_math.h"
int32_t probe_mbqm(int32_t x, int32_t m, int32_t sh);
int32_t probe_mbqm_fast(int32_t x, int32_t m, int32_t n);
int32_t probe_smmulr(int32_t a, int32_t m);
int32_t probe_prescale(int32_t h, int32_t n, int32_t *left);
int32_t probe_sround(int32_t h, int32_t n, uint32_t w);
int32_t probe_bitlen(uint32_t x);
int32_t probe_scale(float v, int32_t *exp);
uint32_t probe_key(uint32_t seed, uint32_t step, uint32_t site);
uint32_t probe_word(uint32_t key, uint32_t index);
void probe_weight_sub(int8_t *w, uint8_t *fraction, int32_t i, int32_t bits, int32_t step);
int32_t probe_mbqm(int32_t x, int32_t m, int32_t sh) { return tl_mbqm(x, m, sh); }
int32_t probe_mbqm_fast(int32_t x, int32_t m, int32_t n)
{
    return tl_mbqm_fast(x, m, n, (int32_t)(((uint32_t)1 << n) >> 1), n > 0 ? -1 : 0);
}
int32_t probe_smmulr(int32_t a, int32_t m) { return tl_smmulr(a, m); }
int32_t probe_prescale(int32_t h, int32_t n, int32_t *left)
{
    const tl_shift s = tl_shift_of(n);
    *left = s.n;
    return tl_prescale(h, s);
}
int32_t probe_sround(int32_t h, int32_t n, uint32_t w) { return tl_sround(h, n, w); }
int32_t probe_bitlen(uint32_t x) { return tl_bitlen(x); }
int32_t probe_scale(float v, int32_t *exp)
{
    const tl_scale s = tl_scale_of(v);
    *exp = s.exp;
    return s.mult;
}
uint32_t probe_key(uint32_t seed, uint32_t step, uint32_t site)
{
    return tl_site_key(tl_step_key(seed, step), site);
}
uint32_t probe_word(uint32_t key, uint32_t index) { return tl_word(key, index); }
void probe_weight_sub(int8_t *w, uint8_t *fraction, int32_t i, int32_t bits, int32_t step)
{
    tl_weight_sub(w, fraction, i, bits, step);
}
"""


def build(folder: Path, kind: str, old: str = "", new: str = "") -> ctypes.CDLL:
    """The functions of tl_math.h, in which ``old`` is replaced by ``new``."""
    header = kernel_sources()["tl_math.h"]
    assert old in header, f"tl_math.h has no {old!r} any more; plant the fault anew"
    (folder / "tl_math.h").write_text(header.replace(old, new) if old else header)
    (folder / "shim.c").write_text(SHIM)
    made, flags = folder / f"{kind}.so", (*FLAGS, *(() if old else WARNINGS), *BUILDS[kind])
    subprocess.run([*find_compiler(), *flags, "-shared", str(folder / "shim.c"), "-o", str(made)], check=True)
    lib = ctypes.CDLL(str(made))
    lib.probe_key.restype = lib.probe_word.restype = c_uint32
    return lib


@pytest.fixture(scope="module", params=RUNNABLE)
def lib(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("math"), request.param)


def test_vectors(assets: Path, lib: ctypes.CDLL) -> None:
    with np.load(assets / "vectors2" / "primitives.npz", allow_pickle=False) as f:
        p = {k: v.tolist() for k, v in f.items()}
    assert [lib.probe_mbqm(*a) for a in zip(p["x"], p["m"], p["sh"], strict=True)] == p["mbqm"]
    assert [lib.probe_key(*a) for a in p["key_in"]] == p["key"]
    key = lib.probe_key(5, 9, 11)
    assert [lib.probe_word(key, i) for i in range(len(p["word"]))] == p["word"]
    assert [lib.probe_smmulr(h, m) for h, m in zip(p["h"], p["m"], strict=True)] == p["smmulr"]
    left = c_int32()
    for h, n, pre_h, pre_n in zip(p["h"], p["n"], p["pre_h"], p["pre_n"], strict=True):
        assert (lib.probe_prescale(h, n, ctypes.byref(left)), left.value) == (pre_h, pre_n)
    rounded = zip(p["pre_h"], p["pre_n"], p["word"], strict=True)
    assert [lib.probe_sround(h, n, c_uint32(w)) for h, n, w in rounded] == p["sround"]


# --- against plain Python -------------------------------------------------------------------------------------

WORDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 0x12345678)
EDGES = sorted({s * (2**k + d) for k in range(31) for d in (-1, 0, 1) for s in (-1, 1)})
MULTS = (0, 2**30, 2**30 + 1, 1518500250, 2**31 - 1)


def check_mbqm(lib: ctypes.CDLL) -> None:
    for x in (*EDGES, LO32, HI32):
        for m in MULTS:
            for sh in (-31, -30, -8, -1, 0, 1, 2, 9, 30, 40):
                assert lib.probe_mbqm(x, m, sh) == mbqm(x, m, sh), (x, m, sh)
                if sh <= 0 and abs(x) < 2**30:
                    assert lib.probe_mbqm_fast(x, m, -sh) == mbqm(x, m, sh), (x, m, sh)


def check_mbqm_random(lib: ctypes.CDLL) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20000):
        x, m, sh = int(rng.integers(-(2**30) + 1, 2**30)), int(rng.integers(2**30, 2**31)), int(rng.integers(-31, 5))
        x >>= int(rng.integers(0, 24))
        want = mbqm(x, m, sh)
        assert lib.probe_mbqm(x, m, sh) == want, (x, m, sh)
        if sh <= 0:
            assert lib.probe_mbqm_fast(x, m, -sh) == want, (x, m, sh)


def check_scaling(lib: ctypes.CDLL) -> None:
    left = c_int32()
    for h in EDGES:
        for m in MULTS:
            assert lib.probe_smmulr(h, m) == smmulr(h, m)
        for n in (-300, -32, -31, -1, 0, 1, 7, 20, 21, 35, 49, 50, 51, 52, 400):
            assert (lib.probe_prescale(h, n, ctypes.byref(left)), left.value) == prescale(h, n), (h, n)
        for n in (-300, -33, -32, -31, -30, -2, -1, 0, 1, 2, 19, 20):
            for w in WORDS:
                assert lib.probe_sround(h, n, c_uint32(w)) == sround(h, n, w), (h, n, w)


def check_scale_of(lib: ctypes.CDLL) -> None:
    """All exponents, subnormals too."""
    exp = c_int32()
    assert (lib.probe_scale(c_float(0.0), ctypes.byref(exp)), exp.value) == (0, 0)
    for e in range(-149, 128):
        for f in (1.0, 1.5, 2.0 - 2.0**-23):
            v = float(np.float32(math.ldexp(f, e)))
            if not math.isfinite(v):
                continue
            assert (lib.probe_scale(c_float(v), ctypes.byref(exp)), exp.value) == scale_of(v), v


def check_words(lib: ctypes.CDLL) -> None:
    for x in (0, 1, 7, 2**31, 2**32 - 1):
        assert lib.probe_word(c_uint32(x), 5) == mix(x + 5)
        assert lib.probe_bitlen(c_uint32(x)) == x.bit_length()
    for k in range(32):
        assert lib.probe_bitlen(c_uint32(2**k)) == k + 1


def check_weights(lib: ctypes.CDLL) -> None:
    """Every full form, steps of all sizes; the neighbors of a nibble stay."""
    for bits in (0, 4, 8):
        limit = 127 << bits
        values = np.unique(np.r_[-limit : limit + 1 : 1 if bits < 8 else 37, limit])
        pairs = [store_weight(int(v), bits) for v in values]
        for step in (0, 1, -1, 7, -100, limit, 2 * limit, LO32, HI32):
            w = block([a for a, _ in pairs], np.int8)
            packed = pack(np.array([b for _, b in pairs]), bits)
            fraction = None if packed is None else block(packed)
            for i in range(0, len(values), 3):
                lib.probe_weight_sub(w.ctypes, None if fraction is None else fraction.ctypes, i, bits, step)
            want = values.copy()
            want[::3] = [max(-limit, min(limit, sat32(int(v) - step))) for v in values[::3]]
            np.testing.assert_array_equal((w.astype(np.int64) << bits) + unpack(fraction, len(values), bits), want)


CHECKS = {
    "mbqm": check_mbqm,
    "mbqm random": check_mbqm_random,
    "scaling": check_scaling,
    "scale of": check_scale_of,
    "words": check_words,
    "weights": check_weights,
}


@pytest.mark.parametrize("check", CHECKS)
def test_plain_python(lib: ctypes.CDLL, check: str) -> None:
    CHECKS[check](lib)


FAULTS = {
    "half up": ("mbqm", "> (mask >> 1) + (x < 0)", "> (mask >> 1)"),
    "the fast form rounds up": ("mbqm", "((x >> 31) & some)", "0 * some"),
    "a left shift that wraps": ("mbqm", "tl_sat32((int64_t)x * ((int64_t)1 << left))", "tl_shl(x, left)"),
    "prescale cuts at 29": ("scaling", "s.d > 30", "s.d > 29"),
    "prescale floors": ("scaling", "(h + (int32_t)(((uint32_t)1 << d) >> 1)) >> d", "h >> d"),
    "a random word of n - 1 bits": ("scaling", "(w >> 1) >> (31 - n)", "(w >> 1) >> (31 - n) >> 1"),
    "saturation from 2^-30 on": ("scaling", "if (n < -31)", "if (n < -29)"),
    "subnormals off by one": ("scale of", "TL_MAX(e, 1)", "e"),
    "the high nibble first": ("weights", "i & 1 ? 4 : 0;\n    fraction", "i & 1 ? 0 : 4;\n    fraction"),
    "a nibble without sign": ("weights", "nibble & 8 ? 16 : 0", "0"),
    "weights reach -128": ("weights", "step, 127 * one", "step, 128 * one"),
    "a difference that wraps": ("weights", "tl_sat32((int64_t)x - step)", "(int32_t)((uint32_t)x - (uint32_t)step)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, tmp_path: Path) -> None:
    check, old, new = FAULTS[fault]
    broken = build(tmp_path, RUNNABLE[0], old, new)
    with pytest.raises(AssertionError):
        CHECKS[check](broken)
