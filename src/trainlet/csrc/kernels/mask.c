/* SPDX-License-Identifier: Apache-2.0 */
#include "tl_math.h"
#include "tl.h"

/* Bits of eight flags that are 0 or 1, the first lowest: a product gathers those of four bytes in its top bits. */
static uint32_t gather_bits(const uint8_t *f)
{
    const uint32_t a = f[0] | (uint32_t)f[1] << 8 | (uint32_t)f[2] << 16 | (uint32_t)f[3] << 24;
    const uint32_t b = f[4] | (uint32_t)f[5] << 8 | (uint32_t)f[6] << 16 | (uint32_t)f[7] << 24;
    return (a * 0x10204080u) >> 28 | (b * 0x10204080u) >> 28 << 4;
}

void tl_clip_mask_s8(const int8_t *y, int32_t n, int32_t low, int32_t high, uint8_t *bits)
{
    const int8_t lo = (int8_t)low, hi = (int8_t)high; /* so that bytes are compared with bytes */
    uint8_t flag[64];
    for (int32_t i = 0; i < n; i += 64) {
        const int32_t count = TL_MIN(64, n - i);
        for (int32_t k = 0; k < count; k++) flag[k] = (uint8_t)((y[i + k] > lo) & (y[i + k] < hi));
        for (int32_t k = count; k & 7; k++) flag[k] = 0;
        for (int32_t k = 0; k < count; k += 8) bits[(i + k) >> 3] = (uint8_t)gather_bits(flag + k);
    }
}

void tl_select_channels_s8(const int8_t *x, int32_t pixels, int32_t channels_in, int32_t groups,
                           const uint16_t *channels, int32_t n, int8_t *out)
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
