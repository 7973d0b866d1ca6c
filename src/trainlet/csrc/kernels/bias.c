/* SPDX-License-Identifier: Apache-2.0 */
#include "tl_math.h"
#include "tl.h"

#define BIAS_LIMIT ((int32_t)1 << 30)

void tl_bias_sgd_s8(const tl_step *step, uint32_t stream, tl_grad g, int32_t height, int32_t width, int32_t channels,
                    const float *rate, float lr, int32_t pre, int32_t *bias, void *scratch)
{
    const uint32_t key = tl_site_key(step->key, stream);
    int32_t *sum = scratch;
    for (int32_t c = 0; c < channels; c++) sum[c] = 0;
    for (int32_t y = 0; y < height; y++) {
        for (int32_t x = 0; x < width; x++) {
            const int8_t *r = g.r.data + (y % g.r.ring) * g.r.row + x * g.r.pixel;
            for (int32_t c = 0; c < channels; c++) sum[c] += r[c];
        }
    }
    for (int32_t c = 0; c < channels; c++) {
        const float v = lr * rate[c];
        if (v == 0.0f) continue;
        const tl_rate scale = tl_rate_of(v, g.e, pre, 0);
        bias[c] = tl_sub_clamp(bias[c], tl_rate_step(&scale, sum[c], tl_word(key, (uint32_t)c)), BIAS_LIMIT);
    }
}
