/* SPDX-License-Identifier: Apache-2.0 */
/* Gradients as tensors of int32 sums, for graphs whose sums are not fused with what rounds them. Plain loops in the order
 * of the formula; a sum is exact in any order. */
#include "tl.h"
#include "tl_math.h"

/* acc[i] += t times the weight of input channel i; `at` numbers the row (output channel, tap) of cg weights. */
static void add_weights(tl_weights w, int32_t at, int32_t cg, int32_t t, int32_t *acc)
{
    if (!w.channels) {
        const int8_t *row = (w.n ? w.trained : w.frozen) + at * cg;
        for (int32_t i = 0; i < cg; i++) acc[i] += row[i] * t;
        return;
    }
    for (int32_t i = 0, below = 0; i < cg; i++) {
        const int trained = below < w.n && w.channels[below] == i;
        acc[i] += t * (trained ? w.trained[at * w.n + below] : w.frozen[at * (cg - w.n) + i - below]);
        below += trained;
    }
}

/* The output position whose tap k meets input position `in`; -1 if there is none. */
static int32_t reached(int32_t in, int32_t k, int32_t pad, int32_t dil, int32_t stride, int32_t size)
{
    const int32_t at = in + pad - k * dil;
    return at < 0 || at % stride != 0 || at / stride >= size ? -1 : at / stride;
}

/* The input position that tap k of output position `out` meets; -1 if it is padding. */
static int32_t met(int32_t out, int32_t k, int32_t pad, int32_t dil, int32_t stride, int32_t size)
{
    const int32_t at = out * stride - pad + k * dil;
    return at < 0 || at >= size ? -1 : at;
}

static const int8_t *pixel(tl_view v, int32_t y, int32_t x)
{
    return v.data + (y % v.ring) * v.row + x * v.pixel;
}

void tl_conv2d_dx_s32(const tl_conv *c, const int16_t *mt, tl_weights w, tl_view r, int32_t *acc)
{
    const int32_t cg = c->in_c / c->groups, og = c->out_c / c->groups, taps = c->kh * c->kw;
    for (int32_t p = 0; p < c->in_h * c->in_w; p++, acc += c->in_c) {
        for (int32_t i = 0; i < c->in_c; i++) acc[i] = 0;
        for (int32_t tap = 0; tap < taps; tap++) {
            const int32_t oy = reached(p / c->in_w, tap / c->kw, c->pad_h, c->dil_h, c->stride_h, c->out_h);
            const int32_t ox = reached(p % c->in_w, tap % c->kw, c->pad_w, c->dil_w, c->stride_w, c->out_w);
            const int8_t *from = oy < 0 || ox < 0 ? NULL : pixel(r, oy, ox);
            for (int32_t o = 0; from && o < c->out_c; o++)
                if (from[o]) add_weights(w, o * taps + tap, cg, from[o] * mt[o], acc + o / og * cg);
        }
    }
}

void tl_depthwise_dx_s32(const tl_conv *c, tl_weights w, tl_view r, int32_t *acc)
{
    const int32_t taps = c->kh * c->kw;
    for (int32_t ch = 0, below = 0; ch < c->in_c; ch++) {
        const int chosen = w.channels ? below < w.n && w.channels[below] == ch : w.n > 0;
        const int8_t *row = chosen ? w.trained + below * taps : w.frozen + (ch - below) * taps;
        below += chosen;
        for (int32_t p = 0; p < c->in_h * c->in_w; p++) {
            int32_t sum = 0;
            for (int32_t tap = 0; tap < taps; tap++) {
                const int32_t oy = reached(p / c->in_w, tap / c->kw, c->pad_h, c->dil_h, c->stride_h, c->out_h);
                const int32_t ox = reached(p % c->in_w, tap % c->kw, c->pad_w, c->dil_w, c->stride_w, c->out_w);
                if (oy >= 0 && ox >= 0) sum += row[tap] * pixel(r, oy, ox)[ch];
            }
            acc[p * c->in_c + ch] = sum;
        }
    }
}

void tl_conv2d_dw_s32(const tl_conv *c, int32_t kept, tl_view r, tl_view x, int32_t *dw)
{
    const int32_t og = c->out_c / c->groups, taps = c->kh * c->kw;
    for (int32_t i = 0; i < c->out_c * taps * kept; i++) dw[i] = 0;
    for (int32_t p = 0; p < c->out_h * c->out_w; p++) {
        const int8_t *from = pixel(r, p / c->out_w, p % c->out_w);
        for (int32_t tap = 0; tap < taps; tap++) {
            const int32_t iy = met(p / c->out_w, tap / c->kw, c->pad_h, c->dil_h, c->stride_h, c->in_h);
            const int32_t ix = met(p % c->out_w, tap % c->kw, c->pad_w, c->dil_w, c->stride_w, c->in_w);
            const int8_t *in = iy < 0 || ix < 0 ? NULL : pixel(x, iy, ix);
            for (int32_t o = 0; in && o < c->out_c; o++) {
                int32_t *to = dw + (o * taps + tap) * kept;
                for (int32_t j = 0; from[o] && j < kept; j++) to[j] += from[o] * (in[o / og * kept + j] - c->x_zero);
            }
        }
    }
}

void tl_depthwise_dw_s32(const tl_conv *c, const uint16_t *channels, int32_t kept, tl_view r, tl_view x, int32_t *dw)
{
    const int32_t taps = c->kh * c->kw;
    for (int32_t i = 0; i < kept * taps; i++) {
        const int32_t j = i / taps, tap = i % taps, ch = channels ? channels[j] : j;
        int32_t sum = 0;
        for (int32_t p = 0; p < c->out_h * c->out_w; p++) {
            const int32_t oy = p / c->out_w, ox = p % c->out_w;
            const int32_t iy = met(oy, tap / c->kw, c->pad_h, c->dil_h, c->stride_h, c->in_h);
            const int32_t ix = met(ox, tap % c->kw, c->pad_w, c->dil_w, c->stride_w, c->in_w);
            if (iy >= 0 && ix >= 0) sum += pixel(r, oy, ox)[ch] * (pixel(x, iy, ix)[j] - c->x_zero);
        }
        dw[i] = sum;
    }
}
