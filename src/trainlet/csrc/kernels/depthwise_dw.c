/* SPDX-License-Identifier: Apache-2.0 */
/* Weight update of a depthwise convolution. Sums are made row by row: a row of r and a row of x - x_zero lie in scratch
 * as [column][lane], 16 bits wide, so that the inner loop runs over whole lanes of one width. */
#include "tl_math.h"
#include "tl_move.h"
#include "tl_round.h"

#define BLOCK TL_LANES

/* gcc 12 unrolls a short loop inside another one before it looks for vectors, and then finds worse ones. */
#if defined(__GNUC__) && !defined(__clang__)
#define KEEP_LOOP _Pragma("GCC unroll 1")
#else
#define KEEP_LOOP
#endif

/* Sums [tap][lane], a row of r, a row of x. */
int32_t tl_depthwise_dw_scratch(const tl_conv *c, int32_t kept)
{
    (void)kept;
    return BLOCK * (4 * c->kh * c->kw + 2 * (c->out_w + c->in_w));
}

/* out[column][BLOCK] = row y of r for kept channels j0 .. j0 + count - 1; lanes past those are 0. */
static void load_r(const tl_conv *c, const uint16_t *channels, tl_view r, int32_t y, int32_t j0, int32_t count,
                   int16_t *restrict out)
{
    int32_t from[BLOCK];
    const int8_t *p = r.data + (y % r.ring) * r.row;
    for (int32_t j = 0; j < count; j++) from[j] = channels ? channels[j0 + j] : j0 + j;
    for (int32_t x = 0; x < c->out_w; x++, p += r.pixel, out += BLOCK) {
        for (int32_t j = 0; j < count; j++) out[j] = p[from[j]];
        for (int32_t j = count; j < BLOCK; j++) out[j] = 0;
    }
}

/* The same for row y of x - x_zero, which holds the kept channels only. */
static void load_x(const tl_conv *c, tl_view x, int32_t y, int32_t j0, int32_t count, int16_t *restrict out)
{
    const int8_t *p = x.data + (y % x.ring) * x.row + j0;
    for (int32_t i = 0; i < c->in_w; i++, p += x.pixel, out += BLOCK) {
        for (int32_t j = 0; j < count; j++) out[j] = (int16_t)(p[j] - c->x_zero);
        for (int32_t j = count; j < BLOCK; j++) out[j] = 0;
    }
}

/* sums[lane] += sum of r x over n columns; |r| <= 127 and |x| <= 255, so that a product fits 16 bits. */
static void correlate(const int16_t *restrict r, const int16_t *restrict x, int32_t x_step, int32_t n,
                      int32_t *restrict sums)
{
    for (int32_t i = 0; i < n; i++, r += BLOCK, x += x_step) {
        KEEP_LOOP
        for (int32_t j = 0; j < BLOCK; j++) sums[j] += (int16_t)(r[j] * x[j]);
    }
}

/* Adds the products of one row of r and one row of x to the sums of the taps of one row of the kernel. */
static void add_row(const tl_conv *c, const int16_t *r, const int16_t *x, int32_t *sums)
{
    const int16_t *x0;
    for (int32_t kx = 0; kx < c->kw; kx++, sums += BLOCK) {
        const int32_t start = kx * c->dil_w - c->pad_w; /* the column that output column 0 reads */
        const int32_t first = start >= 0 ? 0 : (c->stride_w - 1 - start) / c->stride_w;
        const int32_t past = start >= c->in_w ? 0 : TL_MIN(c->out_w, (c->in_w - 1 - start) / c->stride_w + 1);
        if (first >= past) continue;
        x0 = x + (start + first * c->stride_w) * BLOCK;
        correlate(r + first * BLOCK, x0, c->stride_w * BLOCK, past - first, sums);
    }
}

void tl_depthwise_dw_s8(const tl_step *step, const tl_conv *c, const tl_dw *d, tl_grad g, tl_view x, float lr,
                        int8_t *w, uint8_t *fraction, void *scratch)
{
    const int32_t taps = c->kh * c->kw;
    const uint32_t key = tl_site_key(step->key, d->site);
    int32_t *sums = scratch;
    int16_t *r = (int16_t *)(sums + taps * BLOCK), *row = r + c->out_w * BLOCK;
    for (int32_t j0 = 0; j0 < d->kept; j0 += BLOCK) {
        const int32_t count = TL_MIN(BLOCK, d->kept - j0);
        tl_zero32(sums, taps * BLOCK);
        for (int32_t oy = 0; oy < c->out_h; oy++) {
            load_r(c, d->channels, g.r, oy, j0, count, r);
            for (int32_t ky = 0; ky < c->kh; ky++) {
                const int32_t iy = oy * c->stride_h - c->pad_h + ky * c->dil_h;
                if (iy < 0 || iy >= c->in_h) continue;
                load_x(c, x, iy, j0, count, row);
                add_row(c, r, row, sums + ky * c->kw * BLOCK);
            }
        }
        for (int32_t j = 0; j < count; j++) {
            const int32_t ch = d->channels ? d->channels[j0 + j] : j0 + j;
            const float v = lr * d->rate[ch];
            if (v == 0.0f) continue;
            const tl_rate rate = tl_rate_of(v, g.e, d->pre, d->bits);
            for (int32_t t = 0; t < taps; t++) {
                const uint32_t word = tl_word(key, (uint32_t)(ch * taps + t));
                const int32_t by = tl_rate_step(&rate, sums[t * BLOCK + j], word);
                tl_weight_sub(w, fraction, (j0 + j) * taps + t, d->bits, by);
            }
        }
    }
}
