/* SPDX-License-Identifier: Apache-2.0 */
/* Depthwise convolution: forward and input gradient. Work goes by blocks of channels, whose weights are
 * transposed to [tap][channel] in scratch, so that inner loops run over neighboring channels. */
#include "tl_math.h"
#include "tl_move.h"
#include "tl_requant.h"
#include "tl_round.h"
#include "tl_tile.h"

#define BLOCK TL_LANES

/* A vector of sums that straddles cache lines costs 20 % of an input gradient. */
#if defined(__AVX2__)
#define ALIGNED __attribute__((aligned(4 * BLOCK)))
#else
#define ALIGNED
#endif

/* How many trained channels lie below c, for tables in ascending order. */
static int32_t trained_below(tl_weights w, int32_t c)
{
    int32_t n = 0;
    while (w.channels && n < w.n && w.channels[n] < c) n++;
    return n;
}

/* Where column kx of a block's weights lies: every jump-th one is its neighbor. */
static int32_t column_at(int32_t kx, int32_t kw, int32_t jump)
{
    int32_t at = kx / jump;
    for (int32_t phase = 0; phase < kx % jump; phase++) at += (kw - 1 - phase) / jump + 1;
    return at;
}

/* out[ky][column_at][BLOCK] = weights of channels c0 .. c0 + count - 1; lanes past count are 0. */
static void load_block(const tl_conv *c, tl_weights w, int32_t c0, int32_t count, int32_t jump, int32_t *out)
{
    const int32_t taps = c->kh * c->kw;
    const int8_t *from[BLOCK];
    int32_t below = trained_below(w, c0);
    for (int32_t j = 0; j < count; j++) {
        const int32_t ch = c0 + j;
        const int trained = w.channels ? below < w.n && w.channels[below] == ch : w.n > 0;
        from[j] = trained ? w.trained + (w.channels ? below : ch) * taps : w.frozen + (ch - below) * taps;
        below += w.channels && trained;
    }
    for (int32_t kx = 0; kx < c->kw; kx++) {
        int32_t *to = out + column_at(kx, c->kw, jump) * BLOCK;
        for (int32_t t = kx; t < taps; t += c->kw, to += c->kw * BLOCK) {
            for (int32_t j = 0; j < count; j++) to[j] = from[j][t];
            for (int32_t j = count; j < BLOCK; j++) to[j] = 0;
        }
    }
}

/* First and past-the-last tap k whose position start + k * dil lies in 0..size-1. */
static int32_t first_tap(int32_t start, int32_t dil)
{
    return start >= 0 ? 0 : dil == 1 ? -start : (dil - 1 - start) / dil;
}

static int32_t past_tap(int32_t start, int32_t dil, int32_t size, int32_t taps)
{
    const int32_t room = size - 1 - start;
    return room < 0 ? 0 : TL_MIN(taps, (dil == 1 ? room : room / dil) + 1);
}

static void multiply_add(const int8_t *restrict x, const int32_t *restrict w, int32_t zero, int32_t count,
                         int32_t *restrict acc)
{
    if (count == BLOCK) {
        for (int32_t j = 0; j < BLOCK; j++) acc[j] += (x[j] - zero) * w[j];
        return;
    }
    for (int32_t j = 0; j < count; j++) acc[j] += (x[j] - zero) * w[j];
}

/* The taps ky0 .. ky1 - 1, kx0 .. kx1 - 1 of a kernel. */
typedef struct {
    int32_t ky0, ky1, kx0, kx1;
} taps;

#define ROWS 8

/* Adds the products of the taps that lie inside the input, for the window whose corner is (top, left). */
static void sum_taps(const tl_conv *c, tl_view x, const taps *t, int32_t top, int32_t left, int32_t c0, int32_t count,
                     const int32_t *weights, int32_t *acc)
{
    const int32_t step = c->dil_w * x.pixel, w_row = c->kw * BLOCK;
    const int32_t column = (left + t->kx0 * c->dil_w) * x.pixel + c0;
    const int8_t *rows[ROWS];
    for (int32_t ky = t->ky0; ky < t->ky1; ky += ROWS) {
        const int32_t n = TL_MIN(ROWS, t->ky1 - ky);
        const int32_t *w = weights + ky * w_row + t->kx0 * BLOCK;
        for (int32_t i = 0; i < n; i++) rows[i] = x.data + (top + (ky + i) * c->dil_h) % x.ring * x.row + column;
        if (count == BLOCK) {
            tl_tile_taps(rows, n, t->kx1 - t->kx0, step, c->x_zero, w, w_row, acc);
            continue;
        }
        for (int32_t i = 0; i < n; i++)
            for (int32_t kx = 0; kx < t->kx1 - t->kx0; kx++)
                multiply_add(rows[i] + kx * step, w + i * w_row + kx * BLOCK, c->x_zero, count, acc);
    }
}

/* What is still needed of a block of channels while its output is written over it: the rows under the window. */
typedef struct {
    tl_view from, rows;
    int32_t height, width, ahead; /* row y of the output needs rows up to y + ahead */
} keep;

static keep keep_of(const tl_conv *c, tl_view x, int32_t ahead, void *scratch)
{
    const keep k = {x, {scratch, BLOCK, c->in_w * BLOCK, (c->kh - 1) * c->dil_h + 1}, c->in_h, c->in_w, ahead};
    return k;
}

/* Keeps what row y of the output needs and has not been kept before. */
static void keep_rows(const keep *k, int32_t y, int32_t c0, int32_t count)
{
    const int32_t end = TL_MIN(y + k->ahead + 1, k->height);
    for (int32_t r = y == 0 ? 0 : y + k->ahead; r < end; r++) {
        const int8_t *from = k->from.data + r % k->from.ring * k->from.row + c0;
        int8_t *to = k->rows.data + r % k->rows.ring * k->rows.row;
        for (int32_t i = 0; i < k->width; i++, from += k->from.pixel, to += BLOCK) tl_copy8(to, from, count, BLOCK);
    }
}

int32_t tl_depthwise_ring(const tl_conv *c)
{
    return ((c->kh - 1) * c->dil_h + 1) * c->in_w * BLOCK;
}

int32_t tl_depthwise_scratch(const tl_conv *c)
{
    return c->kh * c->kw * BLOCK * 4;
}

void tl_depthwise_s8(const tl_conv *c, const tl_requant *q, tl_weights w, const int32_t *bias, tl_view x, tl_view y,
                     int32_t y0, int32_t y1, void *scratch)
{
    int32_t *weights = scratch;
    const int over = x.data == y.data;
    const keep k = keep_of(c, x, (c->kh - 1) * c->dil_h - c->pad_h, weights + c->kh * c->kw * BLOCK);
    const tl_view in = over ? k.rows : x;
    tl_lanes b;
    for (int32_t c0 = 0; c0 < c->in_c; c0 += BLOCK) {
        const int32_t count = TL_MIN(BLOCK, c->in_c - c0);
        load_block(c, w, c0, count, 1, weights);
        tl_lanes_load(&b, q, bias, c->kh * c->kw, c0, count);
        for (int32_t oy = y0; oy < y1; oy++) {
            const int32_t top = oy * c->stride_h - c->pad_h;
            const int32_t ky0 = first_tap(top, c->dil_h), ky1 = past_tap(top, c->dil_h, c->in_h, c->kh);
            int8_t *out = y.data + (oy % y.ring) * y.row + c0;
            if (over) keep_rows(&k, oy, c0, count);
            for (int32_t ox = 0; ox < c->out_w; ox++, out += y.pixel) {
                const int32_t left = ox * c->stride_w - c->pad_w;
                const int32_t kx0 = first_tap(left, c->dil_w), kx1 = past_tap(left, c->dil_w, c->in_w, c->kw);
                const taps t = {ky0, ky1, kx0, kx1};
                int32_t acc[BLOCK] ALIGNED;
                tl_copy32(acc, b.bias, BLOCK);
                sum_taps(c, in, &t, top, left, over ? 0 : c0, count, weights, acc);
                tl_lanes_store(&b, q, acc, count, out);
            }
        }
    }
}

int32_t tl_depthwise_dx_scratch(const tl_conv *c)
{
    return 4 + c->kh * c->kw * BLOCK * 4;
}

/* The taps of one axis that an input position feeds: the n taps k, k + jump, ... lead to outputs at, at - back, ... */
typedef struct {
    int32_t k, n, at;
} reach;

/* jump: the smallest step between taps that lead to outputs from one position; back: how many outputs it goes. */
typedef struct {
    int32_t dil, stride, size, taps, jump, back;
} fan;

static fan fan_of(int32_t dil, int32_t stride, int32_t size, int32_t taps)
{
    fan f = {dil, stride, size, taps, 1, 0};
    while (f.jump * dil % stride != 0) f.jump++;
    f.back = f.jump * dil / stride;
    return f;
}

/* padded: the input position plus the padding in front; tap k leads to output (padded - k dil) / stride. */
static reach reach_of(const fan *f, int32_t padded)
{
    reach r = {0, 0, padded};
    if (f->stride > 1) {
        while (r.k < f->jump && (padded - r.k * f->dil) % f->stride != 0) r.k++;
        if (r.k == f->jump) return r;
        r.at = (padded - r.k * f->dil) / f->stride;
    }
    for (; r.at >= f->size; r.at -= f->back) r.k += f->jump;
    for (int32_t k = r.k, at = r.at; k < f->taps && at >= 0; k += f->jump, at -= f->back) r.n++;
    return r;
}

/* Sums of one input pixel. */
static void sum_reach(const tl_conv *c, tl_view g, const fan *fy, const fan *fx, const reach *y, const reach *x,
                      int32_t c0, int32_t count, const int32_t *weights, int32_t *acc)
{
    const int32_t step = -fx->back * g.pixel, w_row = fy->jump * c->kw * BLOCK;
    const int32_t column = x->at * g.pixel + c0;
    const int8_t *rows[ROWS];
    if (x->n == 0) return;
    weights += (y->k * c->kw + column_at(x->k, c->kw, fx->jump)) * BLOCK;
    for (int32_t i0 = 0; i0 < y->n; i0 += ROWS, weights += ROWS * w_row) {
        const int32_t n = TL_MIN(ROWS, y->n - i0);
        for (int32_t i = 0; i < n; i++) rows[i] = g.data + (y->at - (i0 + i) * fy->back) % g.ring * g.row + column;
        if (count == BLOCK) {
            tl_tile_taps(rows, n, x->n, step, 0, weights, w_row, acc);
            continue;
        }
        for (int32_t i = 0; i < n; i++)
            for (int32_t k = 0; k < x->n; k++)
                multiply_add(rows[i] + k * step, weights + i * w_row + k * BLOCK, 0, count, acc);
    }
}

void tl_depthwise_dx_s8(tl_step *step, const tl_conv *c, const tl_dx_scale *v, tl_weights w, tl_grad g,
                        const tl_site *site, int8_t *rx, int32_t y0, int32_t y1, void *scratch)
{
    const fan fy = fan_of(c->dil_h, c->stride_h, c->out_h, c->kh), fx = fan_of(c->dil_w, c->stride_w, c->out_w, c->kw);
    int32_t *weights = (int32_t *)scratch + 1;
    const int over = g.r.data == rx;
    const keep k = keep_of(c, g.r, c->pad_h, weights + c->kh * c->kw * BLOCK);
    const tl_view in = over ? k.rows : g.r;
    tl_round r;
    tl_round_begin(&r, step, site, v, 1, g.e, c->in_w, c->in_c, scratch, y0 == 0);
    for (int32_t c0 = 0; c0 < c->in_c; c0 += BLOCK) {
        const int32_t count = TL_MIN(BLOCK, c->in_c - c0);
        load_block(c, w, c0, count, fx.jump, weights);
        tl_round_lanes(&r, c0, count);
        for (int32_t iy = y0; iy < y1; iy++) {
            const reach y = reach_of(&fy, iy + c->pad_h);
            int8_t *out = rx + iy * c->in_w * c->in_c + c0;
            if (over) keep_rows(&k, iy, c0, count);
            for (int32_t ix = 0; ix < c->in_w; ix++, out += c->in_c) {
                const reach x = reach_of(&fx, ix + c->pad_w);
                int32_t acc[BLOCK] ALIGNED;
                tl_zero32(acc, BLOCK);
                sum_reach(c, in, &fy, &fx, &y, &x, over ? 0 : c0, count, weights, acc);
                tl_round_pixel(&r, iy, ix, acc, out);
            }
        }
    }
    tl_round_end(&r, y1 == c->in_h);
}
