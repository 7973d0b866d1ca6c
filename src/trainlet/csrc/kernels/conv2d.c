/* SPDX-License-Identifier: Apache-2.0 */
/* General convolution, forward. For each block of TL_LANES output channels the weights are packed once, terms being
 * (tap, channel); then tiles of TL_ROWS output pixels are gathered as x - x_zero and multiplied. */
#include "tl_math.h"
#include "tl_requant.h"

int32_t tl_conv2d_scratch(const tl_conv *c)
{
    return TL_EVEN(c->kh * c->kw * (c->in_c / c->groups)) * (TL_LANES + 2 * TL_ROWS);
}

/* The weights of output channel o where some are trained, [tap][channel], merged in `row`. */
static void merge(const tl_conv *c, tl_weights w, int32_t o, int8_t *restrict row)
{
    const int32_t taps = c->kh * c->kw, cg = c->in_c / c->groups, frozen = cg - w.n;
    const int8_t *f = w.frozen + o * taps * frozen, *t = w.trained + o * taps * w.n;
    for (int32_t tap = 0; tap < taps; tap++, row += cg, t += w.n) {
        int32_t from = 0;
        for (int32_t i = 0; i <= w.n; i++) {
            const int32_t to = i < w.n ? w.channels[i] : cg;
            for (; from < to; from++) row[from] = *f++;
            if (i < w.n) row[from++] = t[i];
        }
    }
}

/* Packs the weights of output channels o0 .. o0 + count - 1; lanes past count are 0. row: as many bytes as terms. */
static void pack_weights(const tl_conv *c, tl_weights w, int32_t o0, int32_t count, int8_t *restrict row,
                         int8_t *restrict packed)
{
    const int32_t n = c->kh * c->kw * (c->in_c / c->groups);
    if (count < TL_LANES || (n & 1)) memset(packed, 0, (size_t)(TL_EVEN(n) * TL_LANES));
    for (int32_t j = 0; j < count; j++) {
        const int8_t *from = row;
        int8_t *to = packed + 2 * j;
        if (w.channels) {
            merge(c, w, o0 + j, row);
        } else {
            from = (w.n ? w.trained : w.frozen) + (o0 + j) * n;
        }
        for (int32_t k = 0; k + 1 < n; k += 2, from += 2, to += 2 * TL_LANES) memcpy(to, from, 2);
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
            memset(to, 0, (size_t)row_terms * sizeof *to);
            continue;
        }
        const int8_t *from = x.data + tl_ring(iy, x.ring) * x.row + (ix + first * c->dil_w) * x.pixel + i0;
        if (end - first < c->kw) memset(to, 0, (size_t)row_terms * sizeof *to);
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
    return one && !padded && x.pixel == c->in_c && x.row == c->in_w * c->in_c && x.ring >= c->in_h;
}

/* patch[row][n] = inputs of the output pixels p0 .. p0 + rows - 1 of the range that begins at row y0; the rest is 0. */
static void gather_tile(const tl_conv *c, tl_view x, int32_t y0, int32_t p0, int32_t rows, int32_t group,
                        int16_t *restrict patch)
{
    const int32_t cg = c->in_c / c->groups, terms = c->kh * c->kw * cg, n = TL_EVEN(terms);
    if (rows < TL_ROWS) memset(patch + rows * n, 0, (size_t)((TL_ROWS - rows) * n) * sizeof *patch);
    if (n == terms && is_pointwise(c, x)) {
        tl_widen(x.data + (y0 * c->out_w + p0) * n, c->x_zero, rows * n, patch);
        return;
    }
    int32_t oy = y0 + p0 / c->out_w, ox = p0 % c->out_w;
    for (int32_t p = 0; p < rows; p++, patch += n) {
        gather(c, x, oy, ox, group * cg, cg, patch);
        if (terms < n) patch[terms] = 0;
        if (++ox == c->out_w) {
            ox = 0;
            oy++;
        }
    }
}

void tl_conv2d_s8(const tl_conv *c, const tl_requant *q, tl_weights w, const int32_t *bias, tl_view x, tl_view y,
                  int32_t y0, int32_t y1, void *scratch)
{
    const int32_t cg = c->in_c / c->groups, og = c->out_c / c->groups, terms = c->kh * c->kw * cg, n = TL_EVEN(terms);
    const int32_t pixels = (y1 - y0) * c->out_w;
    int16_t *patch = scratch;
    int8_t *packed = (int8_t *)(patch + TL_ROWS * n);
    tl_lanes l;
    for (int32_t o0 = 0, group = 0; o0 < c->out_c; group = o0 / og) {
        const int32_t count = TL_MIN(TL_LANES, (group + 1) * og - o0);
        pack_weights(c, w, o0, count, scratch, packed);
        tl_lanes_load(&l, q, bias, terms, o0, count);
        int32_t oy = y0, ox = 0;
        int8_t *to = y.data + tl_ring(oy, y.ring) * y.row + o0;
        for (int32_t p0 = 0; p0 < pixels; p0 += TL_ROWS) {
            const int32_t rows = TL_MIN(TL_ROWS, pixels - p0);
            int32_t acc[TL_ROWS][TL_LANES];
            gather_tile(c, x, y0, p0, rows, group, patch);
            for (int32_t p = 0; p < TL_ROWS; p++) memcpy(acc[p], l.bias, sizeof l.bias);
            tl_tile(patch, packed, n, acc);
            for (int32_t p = 0; p < rows; p++, to += y.pixel) {
                tl_lanes_store(&l, q, acc[p], count, to);
                if (++ox == c->out_w) {
                    ox = 0;
                    oy++;
                    to = y.data + tl_ring(oy, y.ring) * y.row + o0 - y.pixel;
                }
            }
        }
        o0 += count;
    }
}
