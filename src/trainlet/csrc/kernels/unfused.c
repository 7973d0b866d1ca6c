/* SPDX-License-Identifier: Apache-2.0 */
/* What rounds and applies gradients that are stored as sums; the arithmetic is that of the fused kernels. */
#include "tl_math.h"
#include "tl_move.h"
#include "tl_round.h"

void tl_round_grad_s32(tl_step *step, const tl_dx_scale *v, int32_t per_channel, const int32_t *acc, int32_t e,
                       const tl_site *site, int32_t height, int32_t width, int32_t channels, int8_t *rx)
{
    tl_round r;
    int32_t seen;
    tl_round_begin(&r, step, site, v, per_channel, e, width, channels, &seen, 1);
    for (int32_t c = 0; c < channels; c += TL_LANES) {
        const int32_t count = TL_MIN(TL_LANES, channels - c);
        tl_round_lanes(&r, c, count);
        for (int32_t p = 0; p < height * width; p++) {
            int32_t lanes[TL_LANES];
            tl_zero32(lanes, TL_LANES);
            for (int32_t j = 0; j < count; j++) lanes[j] = acc[p * channels + c + j];
            tl_round_pixel(&r, p / width, p % width, lanes, rx + p * channels + c);
        }
    }
    tl_round_end(&r, 1);
}

void tl_weight_sgd_s32(const tl_step *step, const tl_conv *c, const tl_dw *d, const int32_t *dw, int32_t e, float lr,
                       int8_t *w, uint8_t *fraction)
{
    const uint32_t key = tl_site_key(step->key, d->site);
    const int depthwise = c->groups == c->in_c && c->groups == c->out_c;
    const int32_t taps = c->kh * c->kw, cg = c->in_c / c->groups;
    const int32_t row = depthwise ? 1 : d->kept; /* weights of one tap */
    const int32_t rows = depthwise ? d->kept : c->out_c;
    for (int32_t o = 0; o < rows; o++) {
        const int32_t ch = depthwise && d->channels ? d->channels[o] : o;
        const tl_rate rate = tl_rate_of(lr * d->rate[ch], e, d->pre, d->bits);
        if (rate.mult == 0) continue; /* v = 0 */
        for (int32_t i = 0; i < taps * row; i++) {
            const int32_t tap = i / row, j = i % row, in = depthwise ? 0 : d->channels ? d->channels[j] : j;
            const uint32_t word = tl_word(key, (uint32_t)((ch * taps + tap) * cg + in));
            const int32_t at = o * taps * row + i;
            tl_weight_sub(w, fraction, at, d->bits, tl_rate_step(&rate, dw[at], word));
        }
    }
}
