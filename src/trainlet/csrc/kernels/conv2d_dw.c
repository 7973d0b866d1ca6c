/* SPDX-License-Identifier: Apache-2.0 */
/* Weight update of a general convolution. For each tap, tiles of TL_ROWS kept input channels are gathered over the output
 * pixels as x - x_zero, and multiplied with blocks of TL_LANES output gradients. */
#include "tl_math.h"
#include "tl_round.h"
#include "tl_tile.h"

#define CHUNK 256 /* pixels gathered at once; even */

int32_t tl_conv2d_dw_scratch(const tl_conv *c, int32_t kept)
{
    (void)kept;
    return TL_EVEN(TL_MIN(CHUNK, c->out_h * c->out_w)) * (TL_LANES + 2 * TL_ROWS);
}

/* to[row][p] = input of tap (ky, kx) at output pixels p0 .. p0 + n - 1 for `rows` channels from i0 on; padding is 0. */
static void gather(const tl_conv *c, tl_view x, int32_t ky, int32_t kx, int32_t i0, int32_t rows, int32_t p0, int32_t n,
                   int16_t *restrict to)
{
    const int32_t width = TL_EVEN(n);
    memset(to, 0, (size_t)(TL_ROWS * width) * sizeof *to);
    for (int32_t p = 0; p < n; p++) {
        const int32_t iy = (p0 + p) / c->out_w * c->stride_h - c->pad_h + ky * c->dil_h;
        const int32_t ix = (p0 + p) % c->out_w * c->stride_w - c->pad_w + kx * c->dil_w;
        if (iy < 0 || iy >= c->in_h || ix < 0 || ix >= c->in_w) continue;
        const int8_t *from = x.data + (iy % x.ring) * x.row + ix * x.pixel + i0;
        for (int32_t i = 0; i < rows; i++) to[i * width + p] = (int16_t)(from[i] - c->x_zero);
    }
}

/* The gradient of output channels o0 .. at pixel p. */
static const int8_t *gradient_at(const tl_conv *c, tl_view r, int32_t o0, int32_t p)
{
    return r.data + (p / c->out_w % r.ring) * r.row + p % c->out_w * r.pixel + o0;
}

/* Packs the gradient of output channels o0 .. o0 + count - 1 at pixels p0 .. p0 + n - 1; other lanes are 0. */
static void load_gradient(const tl_conv *c, tl_view r, int32_t o0, int32_t count, int32_t p0, int32_t n,
                          int8_t *restrict packed)
{
    if (count < TL_LANES || (n & 1)) memset(packed, 0, (size_t)(TL_EVEN(n) * TL_LANES));
    for (int32_t p = 0; p < n; p += 2)
        tl_pack_pair(gradient_at(c, r, o0, p0 + p), p + 1 < n ? gradient_at(c, r, o0, p0 + p + 1) : NULL, p, count, packed);
}

/* Where a tile of sums goes: kept channels j0 .. of the group, output channels o0 .. . */
typedef struct {
    int32_t tap, j0, rows, o0, count;
} tile_place;

static void update(const tl_conv *c, const tl_dw *d, uint32_t key, int32_t e_y, float lr, const tile_place *at,
                   int32_t sums[TL_ROWS][TL_LANES], int8_t *w, uint8_t *fraction)
{
    const int32_t taps = c->kh * c->kw, cg = c->in_c / c->groups;
    for (int32_t lane = 0; lane < at->count; lane++) {
        const int32_t o = at->o0 + lane, place = o * taps + at->tap;
        const float v = lr * d->rate[o];
        if (v == 0.0f) continue;
        const tl_rate rate = tl_rate_of(v, e_y, d->pre, d->bits);
        for (int32_t i = 0; i < at->rows; i++) {
            const int32_t j = at->j0 + i;
            const uint32_t word = tl_word(key, (uint32_t)(place * cg + (d->channels ? d->channels[j] : j)));
            tl_weight_sub(w, fraction, place * d->kept + j, d->bits, tl_rate_step(&rate, sums[i][lane], word));
        }
    }
}

void tl_conv2d_dw_s8(const tl_step *step, const tl_conv *c, const tl_dw *d, tl_grad g, tl_view x, float lr, int8_t *w,
                     uint8_t *fraction, void *scratch)
{
    const int32_t og = c->out_c / c->groups, pixels = c->out_h * c->out_w, size = TL_MIN(CHUNK, pixels);
    const uint32_t key = tl_site_key(step->key, d->stream);
    int16_t *patch = scratch;
    int8_t *gradient = (int8_t *)(patch + TL_ROWS * TL_EVEN(size));
    const int32_t tiles = (d->kept + TL_ROWS - 1) / TL_ROWS;
    for (int32_t i = 0; i < c->groups * c->kh * c->kw * tiles; i++) {
        const int32_t j0 = i % tiles * TL_ROWS, tap = i / tiles % (c->kh * c->kw), group = i / tiles / (c->kh * c->kw);
        const int32_t rows = TL_MIN(TL_ROWS, d->kept - j0);
        const int32_t end = (group + 1) * og;
        int32_t gathered = -1; /* first pixel of what lies in patch */
        for (int32_t o0 = group * og; o0 < end; o0 += TL_LANES) {
            const int32_t count = TL_MIN(TL_LANES, end - o0);
            int32_t sums[TL_ROWS][TL_LANES] = {{0}};
            for (int32_t p0 = 0; p0 < pixels; p0 += size) {
                const int32_t n = TL_MIN(size, pixels - p0);
                if (gathered != p0) gather(c, x, tap / c->kw, tap % c->kw, group * d->kept + j0, rows, p0, n, patch);
                gathered = p0;
                load_gradient(c, g.r, o0, count, p0, n, gradient);
                tl_tile(patch, gradient, TL_EVEN(n), sums);
            }
            const tile_place at = {tap, j0, rows, o0, count};
            update(c, d, key, g.e, lr, &at, sums, w, fraction);
        }
    }
}
