# SPDX-License-Identifier: Apache-2.0
"""Microseconds and GMAC/s of each convolution of a checkpoint on one core: forward, input gradient with its rounding,
weight update of all channels. The best of many calls, timed inside C, so neither Python nor what else the machine does
is in the figure.

    TRAINLET_ASSETS=... python bench/kernels.py [--model mcunet-5fps] [--plain] [--json]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from dataclasses import asdict, dataclass
from itertools import groupby

from protocol import assets, describe_machine

from trainlet.frontends import load
from trainlet.ops import Conv2d
from trainlet.toolchain.host import NATIVE, build_library

KINDS = ("forward", "dx", "dw")
REPETITIONS = 100
# Junk data: no kernel's time depends on values, but for saturation, which a shift of -7 keeps rare.
TIMING_C = """
#define _POSIX_C_SOURCE 199309L
#include <stdlib.h>
#include <time.h>
#include "tl.h"
double bench(const tl_conv *c, int32_t depthwise, int32_t kind, int32_t repetitions);
static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}
static int8_t *junk(size_t n)
{
    int8_t *p = malloc(n);
    for (size_t i = 0; p && i < n; i++) p[i] = (int8_t)((int32_t)((uint32_t)i * 2654435761u >> 13) % 127);
    return p;
}
double bench(const tl_conv *c, int32_t depthwise, int32_t kind, int32_t repetitions)
{
    const int32_t cg = c->in_c / c->groups, kept = depthwise ? c->in_c : cg;
    const size_t in = (size_t)(c->in_h * c->in_w * c->in_c), out = (size_t)(c->out_h * c->out_w * c->out_c);
    const size_t o = (size_t)c->out_c;
    int8_t *x = junk(in), *y = junk(out), *w = junk(o * (size_t)(c->kh * c->kw * cg)), *rx = malloc(in), rho = 4;
    int8_t *shift = malloc(o), *mask = junk(in / 8 + 1);
    int32_t *mult = malloc(4 * o), *bias = malloc(4 * o);
    int16_t *mt = malloc(2 * o), *exponent = malloc(2 * o), e;
    float *rate = malloc(4 * o);
    const int32_t sizes[2][3] = {
        {tl_conv2d_scratch(c), tl_conv2d_dx_scratch(c), tl_conv2d_dw_scratch(c, kept)},
        {tl_depthwise_scratch(c), tl_depthwise_dx_scratch(c), tl_depthwise_dw_scratch(c, kept)},
    };
    void *scratch = malloc((size_t)sizes[depthwise][kind]);
    double best = 1e30;
    for (int32_t i = 0; i < c->out_c; i++) {
        mult[i] = 1500000000 + i;
        shift[i] = -7;
        bias[i] = 10 * i;
        mt[i] = (int16_t)(1 + i % 127);
        exponent[i] = depthwise ? -5 : -12;
        rate[i] = 1;
    }
    const tl_requant q = {mult, shift, -128, -128, 127};
    const tl_weights frozen = {w, NULL, NULL, 0};
    const tl_view vx = {x, c->in_c, c->in_w * c->in_c, c->in_h}, vy = {y, c->out_c, c->out_w * c->out_c, c->out_h};
    const tl_site site = {7, &rho, &e, NULL, 0, {(const uint8_t *)mask, NULL, 0, 0}};
    const tl_dx_scale v = {depthwise ? NULL : mt, mult, exponent, depthwise ? 8 : 2};
    const tl_dw d = {8, NULL, kept, 0, 0, rate};
    tl_step step = {1, -8, 0, 0};
    const tl_grad g = {vy, -15};
    for (int32_t i = 0; i < repetitions; i++) {
        const double start = now();
        switch (3 * depthwise + kind) {
        case 0: tl_conv2d_s8(c, &q, frozen, bias, vx, vy, 0, c->out_h, scratch); break;
        case 1: tl_conv2d_dx_s8(&step, c, &v, frozen, g, &site, rx, 0, c->in_h, scratch); break;
        case 2: tl_conv2d_dw_s8(&step, c, &d, g, vx, 1e-3f, w, NULL, scratch); break;
        case 3: tl_depthwise_s8(c, &q, frozen, bias, vx, vy, 0, c->out_h, scratch); break;
        case 4: tl_depthwise_dx_s8(&step, c, &v, frozen, g, &site, rx, 0, c->in_h, scratch); break;
        default: tl_depthwise_dw_s8(&step, c, &d, g, vx, 1e-3f, w, NULL, scratch); break;
        }
        const double took = now() - start;
        best = took < best ? took : best;
    }
    free(x); free(y); free(w); free(rx); free(shift); free(mask); free(mult); free(bias); free(mt); free(exponent);
    free(rate); free(scratch);
    return best;
}
"""


@dataclass(frozen=True)
class Row:
    """One layer; microseconds by kernel. ``kind``: its place in a block, the last part of its name."""

    layer: str
    kind: str
    shape: str
    macs: int
    microseconds: dict[str, float]


def layers(model: str) -> list[tuple[str, Conv2d, tuple[int, ...], tuple[int, ...], int]]:
    """(layer, attributes, input shape, output shape, zero point) of each convolution over more than a pixel."""
    graph = load(assets() / "models" / f"{model}.pkl")
    found = []
    for n in graph.find("conv2d"):
        assert isinstance(n.attrs, Conv2d)
        x, y = graph.values[n.inputs[0]], graph.values[n.outputs[0]]
        if x.shape[0] * x.shape[1] > 1:
            found.append((n.layer, n.attrs, x.shape, y.shape, x.q.zero if x.q else 0))
    return found


def measure(model: str, repetitions: int, plain: bool) -> list[Row]:
    """All layers of a model."""
    extra = (*NATIVE, "-DTL_PLAIN_TILE") if plain else NATIVE
    lib = ctypes.CDLL(str(build_library({"timing.c": TIMING_C}, extra=extra)))
    lib.bench.restype = ctypes.c_double
    rows = []
    for layer, a, x, y, zero in layers(model):
        geometry = (*x, *y, *a.kernel, *a.stride, *a.dilation, a.pads[0], a.pads[2], a.groups, zero)
        c = (ctypes.c_int32 * len(geometry))(*geometry)
        took = {k: lib.bench(c, a.depthwise, i, repetitions) for i, k in enumerate(KINDS)}
        kernel = f"{a.kernel[0]}x{a.kernel[1]}/{a.stride[0]}"
        macs = y[0] * y[1] * y[2] * a.kernel[0] * a.kernel[1] * (x[2] // a.groups)
        rows.append(Row(layer, layer.rsplit(".", 1)[-1], f"{x[0]}x{x[1]}x{x[2]} {kernel} {y[2]}", macs, took))
    return rows


def line(name: str, shape: str, rows: list[Row]) -> str:
    """One line of the table: the sum of ``rows``."""
    macs = sum(r.macs for r in rows)
    took = [sum(r.microseconds[k] for r in rows) for k in KINDS]
    return f"{name:24} {shape:22} {macs // 1000:6} " + " ".join(f"{us:9.1f} {macs / us / 1e3:6.2f}" for us in took)


def main() -> None:
    """Prints a table, or one JSON object."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="mcunet-5fps", help="name of a checkpoint in TRAINLET_ASSETS/models")
    p.add_argument("--repetitions", type=int, default=REPETITIONS)
    p.add_argument("--plain", action="store_true", help="the portable inner loops instead of the x86 ones")
    p.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="the core to run on")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = p.parse_args()
    os.sched_setaffinity(0, {args.core})
    rows = measure(args.model, args.repetitions, args.plain)
    if args.json:
        print(json.dumps({"machine": describe_machine(), "plain": args.plain, "rows": [asdict(r) for r in rows]}))
        return
    print(f"{'layer':24} {'shape':22} {'kMAC':>6} " + " ".join(f"{k + ' us':>9} {'GMAC/s':>6}" for k in KINDS))
    for r in rows:
        print(line(r.layer, r.shape, [r]))
    for kind, part in groupby(sorted(rows, key=lambda r: r.kind), lambda r: r.kind):
        print(line(f"all {kind}", "", list(part)))
    print(line("all", "", rows))


if __name__ == "__main__":
    main()
