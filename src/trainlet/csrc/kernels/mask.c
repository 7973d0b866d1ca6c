/* SPDX-License-Identifier: Apache-2.0 */
#include "tl_math.h"
#include "tl.h"

void tl_clip_mask_s8(const int8_t *y, int32_t n, int32_t lo, int32_t hi, uint8_t *bits)
{
    int32_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint32_t b = 0;
        for (int32_t k = 0; k < 8; k++) b |= (uint32_t)((y[i + k] > lo) & (y[i + k] < hi)) << k;
        bits[i >> 3] = (uint8_t)b;
    }
    if (i < n) bits[i >> 3] = 0;
    for (; i < n; i++) bits[i >> 3] |= (uint8_t)(((y[i] > lo) & (y[i] < hi)) << (i & 7));
}

void tl_select_channels_s8(const int8_t *x, int32_t pixels, int32_t channels_in, int32_t groups, const uint16_t *channels,
                           int32_t n, int8_t *out)
{
    const int32_t per_group = channels_in / groups;
    for (int32_t p = 0; p < pixels; p++)
        for (int32_t g = 0; g < groups; g++)
            for (int32_t j = 0; j < n; j++)
                out[(p * groups + g) * n + j] = x[p * channels_in + g * per_group + channels[j]];
}

void tl_mask_grad_s8(tl_view r, tl_mask mask, int32_t height, int32_t width, int32_t channels, int8_t *out)
{
    int32_t i = 0;
    for (int32_t y = 0; y < height; y++) {
        for (int32_t x = 0; x < width; x++) {
            const int8_t *in = r.data + (y % r.ring) * r.row + x * r.pixel;
            for (int32_t c = 0; c < channels; c++, i++) {
                const int pass = mask.bits  ? mask.bits[i >> 3] >> (i & 7) & 1
                                 : mask.y ? mask.y[i] > mask.lo && mask.y[i] < mask.hi
                                          : 1;
                out[i] = pass ? in[c] : 0;
            }
        }
    }
}
