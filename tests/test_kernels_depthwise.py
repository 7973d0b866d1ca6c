# SPDX-License-Identifier: Apache-2.0
"""The depthwise kernels, bit for bit: the vectors, random layers against plain Python, ring buffers, split weights."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from conv_cases import COUNT, load_case
from depthwise_checks import Split, check_random, check_vector, conv_of, run_forward, same
from kernel_library import RUNNABLE, library
from kernel_model import Layer, forward_sums, quantize_multiplier, requantize

from trainlet.ops import scratch as sizes

RANDOM = 150
VECTORS = range(10, 18), (25, 35)


@pytest.fixture(params=RUNNABLE)
def lib(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return library(request.param)


def test_all_depthwise_cases_are_listed(assets: Path) -> None:
    found = [i for i in range(COUNT) if load_case(assets, i).info["depthwise"]]
    assert found == [i for part in VECTORS for i in part]


@pytest.mark.parametrize("index", [i for part in VECTORS for i in part])
def test_vectors(assets: Path, lib: ctypes.CDLL, index: int) -> None:
    check_vector(lib, load_case(assets, index))


def all_random(lib: ctypes.CDLL) -> None:
    for seed in range(RANDOM):
        check_random(lib, seed)


def test_random_layers(lib: ctypes.CDLL) -> None:
    all_random(lib)


def test_largest_sums(lib: ctypes.CDLL) -> None:
    """K = 33,155 is the largest that the import lets through: sums reach the ends of int32 on the way."""
    rng = np.random.default_rng(0)
    for zero, value, bias in ((-128, 127, 2**30), (127, -128, -(2**30))):
        layer = Layer((255, 130, 2), (255, 130), x_zero=zero)
        w = np.full((2, 255, 130), 127, np.int8)
        x = np.full(layer.size, value, np.int8)
        scales = [quantize_multiplier(2.0**-24), quantize_multiplier(2.0**-26)]
        quant = (np.array([s[0] for s in scales]), np.array([s[1] for s in scales]))
        sums = forward_sums(layer, x, w, np.full(2, bias))
        assert np.abs(sums).max() > 2**31 - 2**23
        got = run_forward(lib, layer, Split(w, np.arange(0)), np.full(2, bias), x, quant, (0, -128, 127), rng, False)
        same(got, requantize(sums, scales, 0, -128, 127), "largest sums")


def test_scratch_is_what_the_planner_reserves_and_modest(lib: ctypes.CDLL) -> None:
    for k in (1, 3, 5, 7):
        layer = Layer((64, 64, 576), (k, k), pads=(k // 2,) * 4)
        c = ctypes.byref(conv_of(layer))
        args = (*layer.size, *layer.out, 576, k, k, 576)
        found = [
            (lib.tl_depthwise_scratch(c), sizes.depthwise_scratch(*args, 0)),
            (lib.tl_depthwise_dx_scratch(c), sizes.depthwise_dx_scratch(*args, 0)),
            (lib.tl_depthwise_dw_scratch(c, 9), sizes.depthwise_dw_scratch(*args, 9)),
        ]
        for kernel, planned in found:
            assert kernel == planned
            assert kernel % 4 == 0
            assert kernel <= 8192


# --- planted faults -------------------------------------------------------------------------------------------

FAULTS = {
    "a tap too many": ("depthwise.c", "(dil == 1 ? room : room / dil) + 1", "(dil == 1 ? room : room / dil) + 2"),
    "a tap too few": ("depthwise.c", "dil == 1 ? -start :", "dil == 1 ? 1 - start :"),
    "the first trained channel for all": ("depthwise.c", "(w.channels ? below : ch) * taps", "(w.channels ? 0 : ch) * taps"),
    "the column of another phase": ("depthwise.c", "column_at(x->k, c->kw, fx->jump)", "x->k / fx->jump"),
    "an output too far back": ("depthwise.c", "f.jump * dil / stride", "f.jump"),
    "the word of the kept channel": ("depthwise_dw.c", "(uint32_t)(ch * taps + t)", "(uint32_t)((j0 + j) * taps + t)"),
    "the word of the next tap": ("depthwise_dw.c", "(uint32_t)(ch * taps + t)", "(uint32_t)(ch * taps + t + 1)"),
    "padding counts as zero, not as the zero point": ("depthwise.c", "c->x_zero, count,", "0, count,"),
    "the gradient of the neighbor": ("depthwise_dw.c", "channels ? channels[j0 + j] : j0 + j;\n    for", "j0 + j;\n    for"),
    "a row of the gradient too early": ("depthwise_dw.c", "load_r(c, d->channels, g.r, oy,", "load_r(c, d->channels, g.r, TL_MAX(oy - 1, 0),"),
    "a column of the gradient is left out": ("depthwise_dw.c", "(c->in_w - 1 - start) / c->stride_w + 1", "(c->in_w - 1 - start) / c->stride_w"),
    "single rounding": ("tl_math.h", "(x + ((x >> 31) & some) + half) >> n", "(x + half) >> n"),
    "a saturating shift that wraps": ("tl_math.h", "tl_sat32((int64_t)x * ((int64_t)1 << left))",
                                      "(int32_t)(uint32_t)((int64_t)x * ((int64_t)1 << left))"),
    "rounding of a further gradient": ("round.c", "tl_round_shift(tl_clamp(tl_shl(more[j], up), -TL_H_MAX, TL_H_MAX), down)", "(tl_clamp(tl_shl(more[j], up), -TL_H_MAX, TL_H_MAX) >> down)"),
    "rho below its floor": ("round.c", "-60, 60)", "-70, 60)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str) -> None:
    file, old, new = FAULTS[fault]
    broken = library(changes={file: (old, new)})
    with pytest.raises(AssertionError):
        all_random(broken)
