/* SPDX-License-Identifier: Apache-2.0 */
#include "tl_math.h"
#include "tl.h"

void tl_avg_pool_s8(const tl_conv *c, tl_view x, tl_view y, int32_t y0, int32_t y1, void *scratch)
{
    int32_t *sum = scratch;
    for (int32_t oy = y0; oy < y1; oy++) {
        const int32_t top = oy * c->stride_h - c->pad_h;
        const int32_t first = TL_MAX(top, 0), last = TL_MIN(top + c->kh, c->in_h);
        for (int32_t ox = 0; ox < c->out_w; ox++) {
            const int32_t left = ox * c->stride_w - c->pad_w;
            const int32_t from = TL_MAX(left, 0), to = TL_MIN(left + c->kw, c->in_w);
            const int32_t n = (last - first) * (to - from);
            int8_t *out = y.data + (oy % y.ring) * y.row + ox * y.pixel;
            for (int32_t ch = 0; ch < c->in_c; ch++) sum[ch] = 0;
            for (int32_t iy = first; iy < last; iy++) {
                for (int32_t ix = from; ix < to; ix++) {
                    const int8_t *in = x.data + (iy % x.ring) * x.row + ix * x.pixel;
                    for (int32_t ch = 0; ch < c->in_c; ch++) sum[ch] += in[ch];
                }
            }
            for (int32_t ch = 0; ch < c->in_c; ch++) {
                const int32_t v = sum[ch] > 0 ? (sum[ch] + n / 2) / n : (sum[ch] - n / 2) / n;
                out[ch] = (int8_t)tl_clamp(v, -128, 127);
            }
        }
    }
}

/* The element of the window of output (oy, ox) that wins in channel ch, by its number in row-major order; the first of
 * equals. */
static int32_t winner(const tl_conv *c, tl_view x, int32_t oy, int32_t ox, int32_t ch)
{
    int32_t best = -1, most = 0;
    for (int32_t k = 0; k < c->kh * c->kw; k++) {
        const int32_t iy = oy * c->stride_h - c->pad_h + k / c->kw, ix = ox * c->stride_w - c->pad_w + k % c->kw;
        if (iy < 0 || iy >= c->in_h || ix < 0 || ix >= c->in_w) continue;
        const int32_t v = x.data[(iy % x.ring) * x.row + ix * x.pixel + ch];
        if (best >= 0 && v <= most) continue;
        best = k;
        most = v;
    }
    return best;
}

void tl_max_pool_s8(const tl_conv *c, tl_view x, tl_view y, int32_t y0, int32_t y1)
{
    for (int32_t oy = y0; oy < y1; oy++) {
        const int32_t top = oy * c->stride_h - c->pad_h;
        const int32_t first = TL_MAX(top, 0), last = TL_MIN(top + c->kh, c->in_h);
        for (int32_t ox = 0; ox < c->out_w; ox++) {
            const int32_t left = ox * c->stride_w - c->pad_w;
            const int32_t from = TL_MAX(left, 0), to = TL_MIN(left + c->kw, c->in_w);
            int8_t *out = y.data + (oy % y.ring) * y.row + ox * y.pixel;
            for (int32_t ch = 0; ch < c->in_c; ch++) out[ch] = -128;
            for (int32_t iy = first; iy < last; iy++) {
                for (int32_t ix = from; ix < to; ix++) {
                    const int8_t *in = x.data + (iy % x.ring) * x.row + ix * x.pixel;
                    for (int32_t ch = 0; ch < c->in_c; ch++) out[ch] = TL_MAX(out[ch], in[ch]);
                }
            }
        }
    }
}

void tl_max_pool_winners_s8(const tl_conv *c, tl_view x, tl_view winners, int32_t y0, int32_t y1)
{
    for (int32_t oy = y0; oy < y1; oy++) {
        for (int32_t ox = 0; ox < c->out_w; ox++) {
            int8_t *out = winners.data + (oy % winners.ring) * winners.row + ox * winners.pixel;
            for (int32_t ch = 0; ch < c->in_c; ch++) out[ch] = (int8_t)winner(c, x, oy, ox, ch);
        }
    }
}

/* Where in the input the window of output (oy, ox) has its element k. */
static int32_t element(const tl_conv *c, int32_t oy, int32_t ox, int32_t k)
{
    const int32_t iy = oy * c->stride_h - c->pad_h + k / c->kw, ix = ox * c->stride_w - c->pad_w + k % c->kw;
    return (iy * c->in_w + ix) * c->in_c;
}

void tl_max_pool_dx_s8(const tl_conv *c, tl_view r, const int8_t *winners, int8_t *rx)
{
    for (int32_t i = 0; i < c->in_h * c->in_w * c->in_c; i++) rx[i] = 0;
    for (int32_t oy = 0; oy < c->out_h; oy++) {
        for (int32_t ox = 0; ox < c->out_w; ox++, winners += c->in_c) {
            const int8_t *in = r.data + (oy % r.ring) * r.row + ox * r.pixel;
            for (int32_t ch = 0; ch < c->in_c; ch++) rx[element(c, oy, ox, winners[ch]) + ch] = in[ch];
        }
    }
}

void tl_max_pool_dx_s32(const tl_conv *c, tl_view r, const int8_t *winners, int32_t *acc)
{
    for (int32_t i = 0; i < c->in_h * c->in_w * c->in_c; i++) acc[i] = 0;
    for (int32_t oy = 0; oy < c->out_h; oy++) {
        for (int32_t ox = 0; ox < c->out_w; ox++, winners += c->in_c) {
            const int8_t *in = r.data + (oy % r.ring) * r.row + ox * r.pixel;
            for (int32_t ch = 0; ch < c->in_c; ch++) acc[element(c, oy, ox, winners[ch]) + ch] += in[ch];
        }
    }
}
