/* SPDX-License-Identifier: Apache-2.0 */
#include "tl_math.h"
#include "tl.h"

#define BIAS_LIMIT ((int32_t)1 << 30)

void tl_bias_grad_s32(tl_view r, int32_t height, int32_t width, int32_t channels, int32_t *db)
{
    for (int32_t c = 0; c < channels; c++) db[c] = 0;
    for (int32_t y = 0; y < height; y++) {
        for (int32_t x = 0; x < width; x++) {
            const int8_t *p = r.data + (y % r.ring) * r.row + x * r.pixel;
            for (int32_t c = 0; c < channels; c++) db[c] += p[c];
        }
    }
}

void tl_bias_sgd_s32(const tl_step *step, uint32_t site, const int32_t *db, int32_t e, int32_t channels,
                     const float *rate, float lr, int32_t pre, int32_t *bias)
{
    const uint32_t key = tl_site_key(step->key, site);
    for (int32_t c = 0; c < channels; c++) {
        const float v = lr * rate[c];
        if (v == 0.0f) continue;
        const tl_rate scale = tl_rate_of(v, e, pre, 0);
        bias[c] = tl_sub_clamp(bias[c], tl_rate_step(&scale, db[c], tl_word(key, (uint32_t)c)), BIAS_LIMIT);
    }
}

void tl_bias_sgd_s8(const tl_step *step, uint32_t site, tl_grad g, int32_t height, int32_t width, int32_t channels,
                    const float *rate, float lr, int32_t pre, int32_t *bias, void *scratch)
{
    tl_bias_grad_s32(g.r, height, width, channels, scratch);
    tl_bias_sgd_s32(step, site, scratch, g.e, channels, rate, lr, pre, bias);
}
