# SPDX-License-Identifier: Apache-2.0
"""Microseconds of each depthwise layer of a checkpoint on one core: forward, input gradient, weight update of all
channels. The best of many calls, timed inside C, so neither Python nor what else the machine does is in the figure.

    TRAINLET_ASSETS=... python bench/kernels_depthwise.py [--model mcunet-5fps] [--json]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from dataclasses import asdict, dataclass

from protocol import assets, describe_machine

from trainlet.build import build_library
from trainlet.frontends import load
from trainlet.ops import Conv2d

KINDS = ("forward", "dx", "dw")
REPETITIONS = 200
# Junk data: no kernel's time depends on values, but for saturation, which a shift of -7 keeps rare.
TIMING_C = """
#define _POSIX_C_SOURCE 199309L
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include "tl.h"
double bench_depthwise(const tl_conv *c, int32_t kind, int32_t repetitions);
static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}
static int8_t *junk(size_t n)
{
    int8_t *p = malloc(n);
    for (size_t i = 0; p && i < n; i++) p[i] = (int8_t)(i * 2654435761u >> 13) % 127;
    return p;
}
double bench_depthwise(const tl_conv *c, int32_t kind, int32_t repetitions)
{
    const int32_t n = c->in_c;
    const size_t in = (size_t)(c->in_h * c->in_w * n), out = (size_t)(c->out_h * c->out_w * n);
    int8_t *x = junk(in), *y = junk(out), *w = junk((size_t)(c->kh * c->kw * n)), *rx = junk(in), rho = 4;
    int8_t *shift = malloc((size_t)n);
    int32_t *mult = malloc(4 * (size_t)n), *bias = malloc(4 * (size_t)n);
    int16_t *exponent = malloc(2 * (size_t)n), e;
    float *rate = malloc(4 * (size_t)n);
    const int32_t sizes[] = {tl_depthwise_scratch(c), tl_depthwise_dx_scratch(c), tl_depthwise_dw_scratch(c, n)};
    void *scratch = malloc((size_t)sizes[kind]);
    double best = 1e30;
    for (int32_t i = 0; i < n; i++) {
        mult[i] = 1500000000 + i;
        shift[i] = -7;
        bias[i] = 10 * i;
        exponent[i] = -5;
        rate[i] = 1;
    }
    const tl_requant q = {mult, shift, -128, -128, 127};
    const tl_weights frozen = {w, NULL, NULL, 0};
    const tl_view vx = {x, n, c->in_w * n, c->in_h}, vy = {y, n, c->out_w * n, c->out_h};
    const tl_site site = {7, &rho, &e, NULL, 0, {NULL, NULL, 0, 0}};
    const tl_dx_scale v = {NULL, mult, exponent, 8};
    const tl_dw d = {8, NULL, n, 0, 0, rate};
    tl_step step = {1, -8, 0, 0};
    const tl_grad g = {vy, -15};
    for (int32_t i = 0; i < repetitions; i++) {
        const double start = now();
        if (kind == 0) tl_depthwise_s8(c, &q, frozen, bias, vx, vy, 0, c->out_h, scratch);
        if (kind == 1) tl_depthwise_dx_s8(&step, c, &v, frozen, g, &site, rx, 0, c->in_h, scratch);
        if (kind == 2) tl_depthwise_dw_s8(&step, c, &d, g, vx, 1e-3f, w, NULL, scratch);
        const double took = now() - start;
        best = took < best ? took : best;
    }
    free(x); free(y); free(w); free(rx); free(shift); free(mult); free(bias); free(exponent); free(rate); free(scratch);
    return best;
}
"""


@dataclass(frozen=True)
class Row:
    """One layer; microseconds by kernel."""

    layer: str
    shape: str
    macs: int
    microseconds: dict[str, float]


def layers(model: str) -> list[tuple[str, Conv2d, tuple[int, ...], tuple[int, ...], int]]:
    """(layer, attributes, input shape, output shape, zero point) of each depthwise convolution."""
    graph = load(assets() / "models" / f"{model}.pkl")
    found = []
    for n in graph.find("conv2d"):
        assert isinstance(n.attrs, Conv2d)
        x, y = graph.values[n.inputs[0]], graph.values[n.outputs[0]]
        if n.attrs.depthwise:
            found.append((n.layer, n.attrs, x.shape, y.shape, x.q.zero if x.q else 0))
    return found


def measure(model: str, repetitions: int) -> list[Row]:
    """All layers of a model."""
    lib = ctypes.CDLL(str(build_library({"timing.c": TIMING_C})))
    lib.bench_depthwise.restype = ctypes.c_double
    rows = []
    for layer, a, x, y, zero in layers(model):
        geometry = (*x, *y, *a.kernel, *a.stride, *a.dilation, a.pads[0], a.pads[2], a.groups, zero)
        c = (ctypes.c_int32 * len(geometry))(*geometry)
        took = {k: lib.bench_depthwise(c, i, repetitions) for i, k in enumerate(KINDS)}
        kernel = "x".join(map(str, a.kernel))
        shape = f"{x[0]}x{x[1]}x{x[2]}, {kernel}, stride {a.stride[0]}"
        rows.append(Row(layer, shape, y[0] * y[1] * y[2] * a.kernel[0] * a.kernel[1], took))
    return rows


def main() -> None:
    """Prints a table, or one JSON object."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="mcunet-5fps", help="name of a checkpoint in TRAINLET_ASSETS/models")
    p.add_argument("--repetitions", type=int, default=REPETITIONS)
    p.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="the core to run on")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = p.parse_args()
    os.sched_setaffinity(0, {args.core})
    rows = measure(args.model, args.repetitions)
    total = {k: sum(r.microseconds[k] for r in rows) for k in KINDS}
    if args.json:
        print(json.dumps({"machine": describe_machine(), "rows": [asdict(r) for r in rows], "total": total}))
        return
    print(f"{'layer':24} {'shape':28} {'kMAC':>6} " + " ".join(f"{k + ' us':>11}" for k in KINDS) + "  MAC/ns forward")
    for r in rows:
        times = " ".join(f"{r.microseconds[k]:11.1f}" for k in KINDS)
        rate = r.macs / r.microseconds["forward"] / 1e3
        print(f"{r.layer:24} {r.shape:28} {r.macs // 1000:6} {times} {rate:8.2f}")
    macs = sum(r.macs for r in rows) // 1000
    print(f"{'all':24} {'':28} {macs:6} " + " ".join(f"{total[k]:11.1f}" for k in KINDS))


if __name__ == "__main__":
    main()
