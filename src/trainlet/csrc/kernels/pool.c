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
