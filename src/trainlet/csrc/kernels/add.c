/* SPDX-License-Identifier: Apache-2.0 */
#include "tl_math.h"
#include "tl.h"

#define ADD_LEFT_SHIFT 20

void tl_add_s8(const tl_add *p, tl_view a, tl_view b, tl_view y, int32_t width, int32_t channels, int32_t y0, int32_t y1)
{
    for (int32_t row = y0; row < y1; row++) {
        for (int32_t x = 0; x < width; x++) {
            const int8_t *pa = a.data + (row % a.ring) * a.row + x * a.pixel;
            const int8_t *pb = b.data + (row % b.ring) * b.row + x * b.pixel;
            int8_t *py = y.data + (row % y.ring) * y.row + x * y.pixel;
            for (int32_t c = 0; c < channels; c++) {
                const int32_t va = tl_mbqm((pa[c] - p->a_zero) * (1 << ADD_LEFT_SHIFT), p->a_mult, p->a_shift);
                const int32_t vb = tl_mbqm((pb[c] - p->b_zero) * (1 << ADD_LEFT_SHIFT), p->b_mult, p->b_shift);
                const int32_t sum = tl_mbqm(tl_sat32((int64_t)va + vb), p->y_mult, p->y_shift);
                py[c] = (int8_t)tl_clamp(tl_sat32((int64_t)sum + p->y_zero), p->lo, p->hi);
            }
        }
    }
}
