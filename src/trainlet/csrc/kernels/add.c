/* SPDX-License-Identifier: Apache-2.0 */
/* TFLite's int8 ADD, by runs of elements: widened, scaled and narrowed in passes that compilers make vectors of. */
#include "tl_math.h"
#include "tl.h"

#define RUN 64
#define LEFT_SHIFT 20

/* A factor of mbqm; half and some are for tl_mbqm_fast. */
typedef struct {
    int32_t mult, shift, half, some;
} factor;

static factor factor_of(int32_t mult, int32_t shift)
{
    const int32_t n = TL_MAX(-shift, 0);
    const factor f = {mult, shift, (int32_t)(((uint32_t)1 << n) >> 1), n > 0 ? -1 : 0};
    return f;
}

/* v = mbqm(v); |v| < 2^30 where the shift goes right. Always a whole run: constant bounds make the better vectors. */
static void scale(int32_t v[restrict RUN], const factor *restrict f)
{
    const factor k = *f;
    if (k.shift > 0) {
        for (int32_t i = 0; i < RUN; i++) v[i] = tl_mbqm(v[i], k.mult, k.shift);
        return;
    }
    for (int32_t i = 0; i < RUN; i++) v[i] = tl_mbqm_fast(v[i], k.mult, -k.shift, k.half, k.some);
}

static void load(const int8_t *restrict x, int32_t n, int32_t zero, int32_t v[restrict RUN])
{
    if (n == RUN) {
        for (int32_t i = 0; i < RUN; i++) v[i] = (x[i] - zero) * ((int32_t)1 << LEFT_SHIFT);
        return;
    }
    for (int32_t i = 0; i < n; i++) v[i] = (x[i] - zero) * ((int32_t)1 << LEFT_SHIFT);
    for (int32_t i = n; i < RUN; i++) v[i] = 0;
}

/* y may be a or b: a run is read before it is written. */
static void add_run(const tl_add *p, const factor f[3], const int8_t *a, const int8_t *b, int8_t *y, int32_t n)
{
    const int32_t lo = p->lo - p->y_zero, hi = p->hi - p->y_zero;
    int32_t va[RUN], vb[RUN];
    load(a, n, p->a_zero, va);
    load(b, n, p->b_zero, vb);
    scale(va, f);
    scale(vb, f + 1);
    for (int32_t i = 0; i < RUN; i++) va[i] += vb[i];
    scale(va, f + 2);
    for (int32_t i = 0; i < RUN; i++) va[i] = TL_MIN(TL_MAX(va[i], lo), hi) + p->y_zero;
    if (n == RUN) {
        for (int32_t i = 0; i < RUN; i++) y[i] = (int8_t)va[i];
    } else {
        for (int32_t i = 0; i < n; i++) y[i] = (int8_t)va[i];
    }
}

static int whole_rows(tl_view v, int32_t channels) { return v.pixel == channels; }

void tl_add_s8(const tl_add *p, tl_view a, tl_view b, tl_view y, int32_t width, int32_t channels, int32_t y0,
               int32_t y1)
{
    const factor f[3] = {factor_of(p->a_mult, p->a_shift), factor_of(p->b_mult, p->b_shift),
                         factor_of(p->y_mult, p->y_shift)};
    if (whole_rows(a, channels) && whole_rows(b, channels) && whole_rows(y, channels)) {
        channels *= width;
        width = 1;
    }
    for (int32_t row = y0; row < y1; row++) {
        const int8_t *pa = a.data + (row % a.ring) * a.row, *pb = b.data + (row % b.ring) * b.row;
        int8_t *py = y.data + (row % y.ring) * y.row;
        for (int32_t x = 0; x < width; x++, pa += a.pixel, pb += b.pixel, py += y.pixel) {
            for (int32_t c = 0; c < channels; c += RUN)
                add_run(p, f, pa + c, pb + c, py + c, TL_MIN(RUN, channels - c));
        }
    }
}
