/* SPDX-License-Identifier: Apache-2.0 */
/* Weight update of a general convolution. For each tap, tiles of TL_ROWS output gradients are gathered over the output
 * pixels and multiplied with blocks of TL_LANES kept input channels, so that the weights of a row lie side by side. The
 * lanes hold x, not x - x_zero (which is no int8), padding is x_zero, and x_zero times the sum of the row is taken off. */
#include "tl_math.h"
#include "tl_move.h"
#include "tl_round.h"
#include "tl_tile.h"

#define CHUNK 256 /* pixels gathered at once; even */
#define STEP_MAX ((int32_t)1 << 17) /* more than twice any weight in full form: all that such a step can do */

int32_t tl_conv2d_dw_scratch(const tl_conv *c, int32_t kept)
{
    (void)kept;
    return TL_EVEN(TL_MIN(CHUNK, c->out_h * c->out_w)) * (TL_LANES + 2 * TL_ROWS);
}

/* to[row][p] = gradient of output channels o0 .. o0 + rows - 1 at output pixels p0 .. p0 + n - 1; the rest is 0. */
static void gather_gradient(const tl_conv *c, tl_view r, int32_t o0, int32_t rows, int32_t p0, int32_t n,
                            int16_t *restrict to)
{
    const int32_t width = TL_EVEN(n);
    int32_t oy = p0 / c->out_w, ox = p0 % c->out_w;
    const int8_t *from = r.data + tl_ring(oy, r.ring) * r.row + ox * r.pixel + o0;
    if (rows < TL_ROWS || n < width) tl_zero16(to, TL_ROWS * width);
    for (int32_t p = 0; p < n; p++, from += r.pixel) {
        if (ox == c->out_w) {
            ox = 0;
            from = r.data + tl_ring(++oy, r.ring) * r.row + o0;
        }
        ox++;
        if (rows == TL_ROWS) {
            for (int32_t i = 0; i < TL_ROWS; i++) to[i * width + p] = from[i];
        } else {
            for (int32_t i = 0; i < rows; i++) to[i * width + p] = from[i];
        }
    }
}

/* The inputs of tap row ky at output row oy, from channel i0 on; NULL outside. */
static const int8_t *input_row(const tl_conv *c, tl_view x, int32_t ky, int32_t i0, int32_t oy)
{
    const int32_t iy = oy * c->stride_h - c->pad_h + ky * c->dil_h;
    return iy < 0 || iy >= c->in_h ? NULL : x.data + tl_ring(iy, x.ring) * x.row + i0;
}

/* Packs the inputs of a tap for channels i0 .. i0 + count - 1 at output pixels p0 .. p0 + n - 1; other lanes are 0. */
static void pack_input(const tl_conv *c, tl_view x, int32_t tap, int32_t i0, int32_t count, int32_t p0, int32_t n,
                       int8_t *restrict packed)
{
    const int32_t ky = tap / c->kw, kx = tap % c->kw, left = kx * c->dil_w - c->pad_w;
    int8_t padding[TL_LANES];
    const int8_t *even = padding;
    int32_t oy = p0 / c->out_w, ox = p0 % c->out_w;
    const int8_t *row = input_row(c, x, ky, i0, oy);
    for (int32_t j = 0; j < TL_LANES; j++) padding[j] = (int8_t)c->x_zero;
    if (count < TL_LANES) tl_zero8(packed, TL_EVEN(n) * TL_LANES);
    for (int32_t p = 0; p < n; p++, ox++) {
        if (ox == c->out_w) {
            ox = 0;
            row = input_row(c, x, ky, i0, ++oy);
        }
        const int32_t ix = ox * c->stride_w + left;
        const int8_t *at = row && ix >= 0 && ix < c->in_w ? row + ix * x.pixel : padding;
        if (p & 1) tl_pack_pair(even, at, p - 1, count, packed);
        even = at;
    }
    if (n & 1) tl_pack_pair(even, NULL, n - 1, count, packed);
}

/* The weights that a row of sums belongs to: `count` from place `at` of the stored ones, in words from `word` on. */
typedef struct {
    int8_t *w;
    uint8_t *fraction;
    int32_t at, count, bits;
    uint32_t word;
    const int32_t *channel; /* of each lane */
} weight_row;

/* by[lane] = tl_rate_step, within +-STEP_MAX. */
static void steps(const tl_rate *rate, const int32_t *restrict acc, int32_t off, const weight_row *row,
                  int32_t *restrict by)
{
    const int32_t n = rate->shift.n, d = rate->shift.d, pre = rate->pre, mult = rate->shift.none ? 0 : rate->mult;
    if (n < 0) { /* a step of many units; rare */
        for (int32_t j = 0; j < TL_LANES; j++)
            by[j] = tl_clamp(tl_rate_step(rate, acc[j] - off, 0), -STEP_MAX, STEP_MAX);
        return;
    }
    for (int32_t j = 0; j < TL_LANES; j++) {
        const int32_t h = tl_round_shift(tl_smmulr(tl_shl(acc[j] - off, pre), mult), d);
        const uint32_t w = tl_mix(row->word + (uint32_t)row->channel[j]);
        by[j] = tl_clamp(tl_sround_right(h, n, w), -STEP_MAX, STEP_MAX);
    }
}

static void update(const weight_row *row, const int32_t *restrict by)
{
    const int32_t bits = row->bits, one = (int32_t)1 << bits, count = row->count;
    int32_t full[TL_LANES], top[TL_LANES];
    int8_t stored[TL_LANES];
    if (count < TL_LANES) tl_zero8(stored, TL_LANES);
    tl_copy8(stored, row->w + row->at, count, TL_LANES);
    for (int32_t j = 0; j < TL_LANES; j++) full[j] = stored[j] * one;
    for (int32_t j = 0; bits && j < count; j++) full[j] += tl_fraction_get(row->fraction, row->at + j, bits);
    for (int32_t j = 0; j < TL_LANES; j++) {
        full[j] = tl_clamp(full[j] - by[j], -127 * one, 127 * one);
        top[j] = (full[j] + (one >> 1)) >> bits;
        stored[j] = (int8_t)top[j];
    }
    tl_copy8(row->w + row->at, stored, count, TL_LANES);
    for (int32_t j = 0; bits && j < count; j++)
        tl_fraction_put(row->fraction, row->at + j, bits, full[j] - top[j] * one);
}

/* A tile: output channels o0 .. o0 + rows - 1 of a group, whose gradients lie in `gradient`, pixels first .. . */
typedef struct {
    int32_t group, o0, rows, first;
    int16_t *gradient;
    int8_t *packed;
} tile;

/* sums[row][lane] of all pixels for kept channels j0 .. j0 + count - 1 of a tap. */
static void sum(const tl_conv *c, const tl_view *r, const tl_view *x, tile *t, int32_t tap, int32_t i0, int32_t count,
                int32_t sums[TL_ROWS][TL_LANES], int32_t total[TL_ROWS])
{
    const int32_t pixels = c->out_h * c->out_w, size = TL_MIN(CHUNK, pixels);
    tl_zero32(total, TL_ROWS);
    for (int32_t i = 0; i < TL_ROWS; i++) tl_zero32(sums[i], TL_LANES);
    for (int32_t p0 = 0; p0 < pixels; p0 += size) {
        const int32_t n = TL_MIN(size, pixels - p0), width = TL_EVEN(n);
        if (t->first != p0) gather_gradient(c, *r, t->o0, t->rows, p0, n, t->gradient);
        t->first = p0;
        pack_input(c, *x, tap, i0, count, p0, n, t->packed);
        tl_tile(t->gradient, t->packed, width, sums);
        for (int32_t i = 0; i < TL_ROWS; i++)
            for (int32_t p = 0; p < width; p++) total[i] += t->gradient[i * width + p];
    }
}

void tl_conv2d_dw_s8(const tl_step *step, const tl_conv *c, const tl_dw *d, tl_grad g, tl_view x, float lr, int8_t *w,
                     uint8_t *fraction, void *scratch)
{
    const int32_t og = c->out_c / c->groups, cg = c->in_c / c->groups, taps = c->kh * c->kw;
    const int32_t blocks = (d->kept + TL_LANES - 1) / TL_LANES;
    const uint32_t key = tl_site_key(step->key, d->site);
    tile t;
    t.gradient = scratch;
    t.packed = (int8_t *)(t.gradient + TL_ROWS * TL_EVEN(TL_MIN(CHUNK, c->out_h * c->out_w)));
    for (int32_t o0 = 0; o0 < c->out_c; o0 += t.rows) {
        tl_rate rate[TL_ROWS];
        t.group = o0 / og;
        t.o0 = o0;
        t.rows = TL_MIN(TL_ROWS, (t.group + 1) * og - o0);
        t.first = -1;
        for (int32_t i = 0; i < t.rows; i++) rate[i] = tl_rate_of(lr * d->rate[o0 + i], g.e, d->pre, d->bits);
        for (int32_t b = 0; b < taps * blocks; b++) {
            const int32_t tap = b / blocks, j0 = b % blocks * TL_LANES, count = TL_MIN(TL_LANES, d->kept - j0);
            int32_t sums[TL_ROWS][TL_LANES], total[TL_ROWS], channel[TL_LANES], by[TL_LANES];
            sum(c, &g.r, &x, &t, tap, t.group * d->kept + j0, count, sums, total);
            if (count < TL_LANES) tl_zero32(channel, TL_LANES);
            for (int32_t j = 0; j < count; j++) channel[j] = d->channels ? d->channels[j0 + j] : j0 + j;
            for (int32_t i = 0; i < t.rows; i++) {
                const int32_t place = (o0 + i) * taps + tap;
                const weight_row row = {w, fraction, place * d->kept + j0, count, d->bits,
                                        key + (uint32_t)(place * cg), channel};
                if (rate[i].mult == 0) continue; /* v = 0 */
                steps(&rate[i], sums[i], c->x_zero * total[i], &row, by);
                update(&row, by);
            }
        }
    }
}
