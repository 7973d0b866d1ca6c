/* SPDX-License-Identifier: Apache-2.0 */
/* General convolution, forward. For each block of TL_LANES output channels the weights are packed once, terms being
 * (tap, channel), unless they come so; then tiles of TL_ROWS output pixels are gathered as x - x_zero and multiplied. */
#include "tl_math.h"
#include "tl_move.h"
#include "tl_requant.h"

static int32_t channels_at_once(const tl_conv *c)
{
    return tl_channels_at_once(c, c->in_c / c->groups, c->out_h * c->out_w);
}

int32_t tl_conv2d_scratch(const tl_conv *c)
{
    return tl_tiles_scratch(c, c->in_c / c->groups, c->out_h * c->out_w);
}

int32_t tl_conv2d_packed_scratch(const tl_conv *c)
{
    return TL_EVEN(c->kh * c->kw * (c->in_c / c->groups)) * 2 * TL_ROWS;
}

/* The weights of output channel o where some are trained, [tap][channel of p], merged in `row`; `below` trained channels
 * lie below p. */
static void merge(const tl_conv *c, tl_weights w, int32_t o, tl_part p, int32_t below, int8_t *restrict row)
{
    const int32_t taps = c->kh * c->kw, frozen = c->in_c / c->groups - w.n, end = p.first + p.count;
    for (int32_t tap = 0; tap < taps; tap++, row += p.count) {
        const int8_t *f = w.frozen + (o * taps + tap) * frozen + p.first - below, *t = w.trained + (o * taps + tap) * w.n;
        for (int32_t i = below, from = p.first; from < end; i++) {
            const int32_t to = i < w.n ? TL_MIN(w.channels[i], end) : end;
            for (; from < to; from++) row[from - p.first] = *f++;
            if (from < end) row[from++ - p.first] = t[i];
        }
    }
}

/* Packs the weights of output channels o0 .. o0 + count - 1 for the input channels p of their group; lanes past count
 * are 0. row: as many bytes as terms. */
static void pack_weights(const tl_conv *c, tl_weights w, int32_t o0, int32_t count, tl_part p, int8_t *restrict row,
                         int8_t *restrict packed)
{
    const int32_t taps = c->kh * c->kw, n = taps * p.count, all = taps * (c->in_c / c->groups);
    int32_t below = 0;
    while (w.channels && below < w.n && w.channels[below] < p.first) below++;
    if (count < TL_LANES) {
        tl_zero8(packed, TL_EVEN(n) * TL_LANES);
    } else if (n & 1) {
        tl_zero8(packed + TL_PACKED(n - 1, 0), 2 * TL_LANES); /* the pair that n ends within */
    }
    for (int32_t j = 0; j < count; j++) {
        const int8_t *from = row;
        int8_t *to = packed + 2 * j;
        if (w.channels) {
            merge(c, w, o0 + j, p, below, row);
        } else {
            from = (w.n ? w.trained : w.frozen) + (o0 + j) * all + p.first;
        }
        for (int32_t k = 0; k + 1 < n; k += 2, from += 2, to += 2 * TL_LANES) tl_copy_pair(to, from);
        if (n & 1) *to = *from;
    }
}

/* How many of kw taps from column ix on lie before `limit`. */
static int32_t taps_before(const tl_conv *c, int32_t ix, int32_t limit)
{
    if (ix >= limit) return 0;
    return TL_MIN(c->dil_w == 1 ? limit - ix : (limit - ix - 1) / c->dil_w + 1, c->kw);
}

/* The input of output pixel (oy, ox) for channels i0 .. i0 + cg - 1: [tap][channel], padding is 0. */
static void gather(const tl_conv *c, tl_view x, int32_t oy, int32_t ox, int32_t i0, int32_t cg, int16_t *restrict to)
{
    const int32_t ix = ox * c->stride_w - c->pad_w, first = taps_before(c, ix, 0), end = taps_before(c, ix, c->in_w);
    const int32_t apart = c->dil_w * x.pixel, row_terms = c->kw * cg;
    for (int32_t ky = 0; ky < c->kh; ky++, to += row_terms) {
        const int32_t iy = oy * c->stride_h - c->pad_h + ky * c->dil_h;
        if (iy < 0 || iy >= c->in_h || first >= end) {
            tl_zero16(to, row_terms);
            continue;
        }
        const int8_t *from = x.data + tl_ring(iy, x.ring) * x.row + (ix + first * c->dil_w) * x.pixel + i0;
        if (end - first < c->kw) tl_zero16(to, row_terms);
        if (apart == cg) {
            tl_widen(from, c->x_zero, (end - first) * cg, to + first * cg);
            continue;
        }
        for (int32_t kx = first; kx < end; kx++, from += apart) tl_widen(from, c->x_zero, cg, to + kx * cg);
    }
}

/* Whether neighboring output pixels read neighboring inputs, all of a pixel's channels: then a tile is one run. */
static int is_pointwise(const tl_conv *c, tl_view x)
{
    const int one = (c->kh | c->kw | c->stride_h | c->stride_w | c->groups) == 1;
    const int padded = c->pad_h || c->pad_w || c->out_h != c->in_h || c->out_w != c->in_w; /* below and right too */
    return one && !padded && x.pixel == c->in_c && x.row == c->in_w * c->in_c;
}

/* patch[row][n] = the channels `of` of the inputs of the output pixels p0 .. p0 + rows - 1 of the rows y0 .. y1 - 1; the
 * rest is 0. */
static void gather_tile(const tl_conv *c, tl_view x, int32_t y0, int32_t y1, int32_t p0, int32_t rows, tl_part of,
                        int16_t *restrict patch)
{
    const int32_t terms = c->kh * c->kw * of.count, n = TL_EVEN(terms);
    if (rows < TL_ROWS) tl_zero16(patch + rows * n, (TL_ROWS - rows) * n);
    if (n == terms && of.count == c->in_c && is_pointwise(c, x) && (y1 == y0 + 1 || x.ring >= c->in_h)) {
        tl_widen(x.data + tl_ring(y0, x.ring) * x.row + p0 * n, c->x_zero, rows * n, patch);
        return;
    }
    int32_t oy = y0 + p0 / c->out_w, ox = p0 % c->out_w;
    for (int32_t p = 0; p < rows; p++, patch += n) {
        gather(c, x, oy, ox, of.first, of.count, patch);
        if (terms < n) patch[terms] = 0;
        if (++ox == c->out_w) {
            ox = 0;
            oy++;
        }
    }
}

/* Where the result of a pixel of rows y0 .. goes. */
typedef struct {
    tl_view y;
    int32_t oy, ox, out_w, o0;
    int8_t *at;
} target;

static target target_of(const tl_conv *c, tl_view y, int32_t y0, int32_t o0)
{
    const target t = {y, y0, 0, c->out_w, o0, y.data + tl_ring(y0, y.ring) * y.row + o0};
    return t;
}

static void next_pixel(target *t)
{
    t->at += t->y.pixel;
    if (++t->ox < t->out_w) return;
    t->ox = 0;
    t->oy++;
    t->at = t->y.data + tl_ring(t->oy, t->y.ring) * t->y.row + t->o0;
}

void tl_conv2d_s8(const tl_conv *c, const tl_requant *q, tl_weights w, const int32_t *bias, tl_view x, tl_view y,
                  int32_t y0, int32_t y1, void *scratch)
{
    const int32_t cg = c->in_c / c->groups, og = c->out_c / c->groups, taps = c->kh * c->kw;
    const int32_t pixels = (y1 - y0) * c->out_w, ready = w.n == TL_READY, step = ready ? cg : channels_at_once(c);
    int16_t *patch = scratch;
    int8_t *packed = (int8_t *)(patch + TL_ROWS * TL_EVEN(taps * step));
    int32_t(*sums)[TL_LANES] = (void *)(packed + TL_LANES * TL_EVEN(taps * step)); /* of all pixels, if step < cg */
    const int8_t *weights = ready ? w.frozen : packed;
    tl_lanes l;
    for (int32_t o0 = 0, group = 0; o0 < c->out_c; group = o0 / og) {
        const int32_t count = TL_MIN(TL_LANES, (group + 1) * og - o0);
        target to = target_of(c, y, y0, o0);
        tl_lanes_load(&l, q, bias, taps * cg, o0, count);
        for (int32_t i0 = 0; i0 < cg; i0 += step) {
            const tl_part p = {i0, TL_MIN(step, cg - i0)}, of = {group * cg + i0, p.count};
            if (!ready) pack_weights(c, w, o0, count, p, scratch, packed);
            for (int32_t p0 = 0; p0 < pixels; p0 += TL_ROWS) {
                const int32_t rows = TL_MIN(TL_ROWS, pixels - p0);
                int32_t tile[TL_ROWS][TL_LANES], (*acc)[TL_LANES] = step < cg ? sums + p0 : tile;
                gather_tile(c, x, y0, y1, p0, rows, of, patch);
                for (int32_t r = 0; r < TL_ROWS && i0 == 0; r++) tl_copy32(acc[r], l.bias, TL_LANES);
                tl_tile(patch, weights, TL_EVEN(taps * p.count), acc);
                for (int32_t r = 0; r < rows && i0 + step >= cg; r++, next_pixel(&to))
                    tl_lanes_store(&l, q, acc[r], count, to.at);
            }
        }
        if (ready) weights += TL_LANES * TL_EVEN(taps * cg);
        o0 += count;
    }
}
