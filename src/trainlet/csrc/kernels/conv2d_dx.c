/* SPDX-License-Identifier: Apache-2.0 */
/* Input gradient of a general convolution. For each block of TL_LANES input channels the weights are packed once,
 * terms being (tap, output channel); tiles of TL_ROWS input pixels gather t[o] = r[o] mt[o] of the outputs that they reach. */
#include "tl_math.h"
#include "tl_move.h"
#include "tl_round.h"
#include "tl_tile.h"

int32_t tl_conv2d_dx_scratch(const tl_conv *c)
{
    return 4 + tl_tiles_scratch(c, c->out_c / c->groups, c->in_h * c->in_w);
}

/* The weights of one output channel and tap for input channels i0 .. i0 + count - 1 of the group, in `row` where they
 * must be merged; `first` trained channels lie below i0. */
static const int8_t *weight_row(const tl_conv *c, tl_weights w, int32_t at, int32_t i0, int32_t count, int32_t first,
                                int8_t *row)
{
    const int32_t cg = c->in_c / c->groups, frozen = cg - w.n;
    if (!w.channels) return (w.n ? w.trained : w.frozen) + at * cg + i0;
    const int8_t *f = w.frozen + at * frozen + i0 - first, *t = w.trained + at * w.n + first;
    for (int32_t j = 0, below = first; j < TL_LANES && j < count; j++) {
        const int trained = below < w.n && w.channels[below] == i0 + j;
        row[j] = trained ? *t++ : *f++;
        below += trained;
    }
    return row;
}

/* Packs the weights of input channels i0 .. i0 + count - 1 of a group for the output channels `of`; lanes past count are
 * 0. */
static void pack_weights(const tl_conv *c, tl_weights w, tl_part of, int32_t i0, int32_t count, int8_t *restrict packed)
{
    const int32_t taps = c->kh * c->kw, terms = taps * of.count;
    int8_t merged[2][TL_LANES];
    const int8_t *even = merged[0];
    int32_t first = 0, k = 0;
    while (w.channels && first < w.n && w.channels[first] < i0) first++;
    if (count < TL_LANES) tl_zero8(packed, TL_EVEN(terms) * TL_LANES);
    for (int32_t tap = 0; tap < taps; tap++) {
        for (int32_t at = of.first * taps + tap, i = 0; i < of.count; i++, k++, at += taps) {
            const int8_t *row = weight_row(c, w, at, i0, count, first, merged[k & 1]);
            if (k & 1) tl_pack_pair(even, row, k - 1, count, packed);
            even = row;
        }
    }
    if (terms & 1) tl_pack_pair(even, NULL, terms - 1, count, packed);
}

/* The output row or column whose tap meets the input `at` steps past its first one; -1 if there is none. */
static int32_t reached(int32_t at, int32_t stride, int32_t limit)
{
    const int32_t out = stride == 1 || at < 0 ? at : at % stride == 0 ? at / stride : -1;
    return out < limit ? out : -1;
}

/* The scaled output gradients that input pixel (iy, ix) reaches, [tap][output channel]; else 0. */
static void gather(const tl_conv *c, tl_view r, const int16_t *mt, int32_t iy, int32_t ix, tl_part of,
                   int16_t *restrict to)
{
    for (int32_t ky = 0; ky < c->kh; ky++) {
        const int32_t oy = reached(iy + c->pad_h - ky * c->dil_h, c->stride_h, c->out_h);
        const int8_t *row = oy >= 0 ? r.data + tl_ring(oy, r.ring) * r.row + of.first : NULL;
        for (int32_t kx = 0; kx < c->kw; kx++, to += of.count) {
            const int32_t ox = row ? reached(ix + c->pad_w - kx * c->dil_w, c->stride_w, c->out_w) : -1;
            if (ox >= 0) {
                tl_multiply(row + ox * r.pixel, mt + of.first, of.count, to);
            } else {
                tl_zero16(to, of.count);
            }
        }
    }
}

/* patch[row][n] = what the `rows` pixels from (iy, ix) on reach of the channels `of`; the rest is 0. */
static void gather_tile(const tl_conv *c, tl_view r, const int16_t *mt, int32_t iy, int32_t ix, int32_t rows, tl_part of,
                        int16_t *restrict patch)
{
    const int32_t terms = c->kh * c->kw * of.count, n = TL_EVEN(terms);
    if (rows < TL_ROWS) tl_zero16(patch + rows * n, (TL_ROWS - rows) * n);
    for (int32_t p = 0; p < rows; p++, patch += n) {
        gather(c, r, mt, iy, ix, of, patch);
        if (terms < n) patch[terms] = 0;
        if (++ix == c->in_w) {
            ix = 0;
            iy++;
        }
    }
}

void tl_conv2d_dx_s8(tl_step *step, const tl_conv *c, const tl_dx_scale *v, tl_weights w, tl_grad g, const tl_site *site,
                     int8_t *rx, int32_t y0, int32_t y1, void *scratch)
{
    const int32_t cg = c->in_c / c->groups, og = c->out_c / c->groups, taps = c->kh * c->kw;
    const int32_t pixels = (y1 - y0) * c->in_w, at_once = tl_channels_at_once(c, og, c->in_h * c->in_w);
    int16_t *patch = (int16_t *)scratch + 2;
    int8_t *packed = (int8_t *)(patch + TL_ROWS * TL_EVEN(taps * at_once));
    int32_t(*sums)[TL_LANES] = (void *)(packed + TL_LANES * TL_EVEN(taps * at_once)); /* of all pixels, if at_once < og */
    tl_round r;
    tl_round_begin(&r, step, site, v, 0, g.e, c->in_w, c->in_c, scratch, y0 == 0);
    for (int32_t c0 = 0, group = 0; c0 < c->in_c; group = c0 / cg) {
        const int32_t count = TL_MIN(TL_LANES, (group + 1) * cg - c0);
        tl_round_lanes(&r, c0, count);
        for (int32_t o0 = 0; o0 < og; o0 += at_once) {
            const tl_part of = {group * og + o0, TL_MIN(at_once, og - o0)};
            int32_t iy = y0, ix = 0;
            pack_weights(c, w, of, c0 - group * cg, count, packed);
            for (int32_t p0 = 0; p0 < pixels; p0 += TL_ROWS) {
                const int32_t rows = TL_MIN(TL_ROWS, pixels - p0);
                int32_t tile[TL_ROWS][TL_LANES], (*acc)[TL_LANES] = at_once < og ? sums + p0 : tile;
                gather_tile(c, g.r, v->mt, iy, ix, rows, of, patch);
                for (int32_t p = 0; p < TL_ROWS && o0 == 0; p++) tl_zero32(acc[p], TL_LANES);
                tl_tile(patch, packed, TL_EVEN(taps * of.count), acc);
                for (int32_t p = 0; p < rows; p++) {
                    int8_t *out = rx + (iy * c->in_w + ix) * c->in_c + c0;
                    if (o0 + at_once >= og) tl_round_pixel(&r, iy, ix, acc[p], out);
                    if (++ix == c->in_w) {
                        ix = 0;
                        iy++;
                    }
                }
            }
        }
        c0 += count;
    }
    tl_round_end(&r, y1 == c->in_h);
}
