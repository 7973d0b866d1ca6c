/* SPDX-License-Identifier: Apache-2.0 */
/* Requantization of forward convolutions, TL_LANES channels at a time. */
#ifndef TL_REQUANT_H
#define TL_REQUANT_H

#include "tl.h"
#include "tl_math.h"
#include "tl_move.h"
#include "tl_tile.h"

/* The constants of a block of channels; simple: all shifts go right and no sum reaches 2^30. */
typedef struct {
    int32_t bias[TL_LANES], mult[TL_LANES], n[TL_LANES], half[TL_LANES], some[TL_LANES], shift[TL_LANES];
    int simple;
} tl_lanes;

/* The lanes of channels o0 .. o0 + count - 1; fan_in is the number of products in a sum. */
static inline void tl_lanes_load(tl_lanes *l, const tl_requant *q, const int32_t *bias, int32_t fan_in, int32_t o0,
                                 int32_t count)
{
    const int32_t room = (1 << 30) - 1 - TL_MIN(127 * 255 * fan_in, (1 << 30) - 1);
    l->simple = 1;
    for (int32_t j = 0; j < TL_LANES; j++) {
        const int32_t o = o0 + TL_MIN(j, count - 1);
        l->bias[j] = bias[o];
        l->mult[j] = q->mult[o];
        l->shift[j] = q->shift[o];
        l->n[j] = TL_MAX(-q->shift[o], 0);
        l->half[j] = (int32_t)(((uint32_t)1 << l->n[j]) >> 1);
        l->some[j] = l->n[j] > 0 ? -1 : 0;
        l->simple &= q->shift[o] <= 0 && bias[o] <= room && bias[o] >= -room;
    }
}

/* out[count] = the requantized sums of a pixel. */
static inline void tl_lanes_store(const tl_lanes *l, const tl_requant *q, const int32_t *acc, int32_t count, int8_t *out)
{
    int32_t v[TL_LANES];
    int8_t b[TL_LANES];
    if (l->simple) {
        for (int32_t j = 0; j < TL_LANES; j++)
            v[j] = tl_clamp(tl_mbqm_fast(acc[j], l->mult[j], l->n[j], l->half[j], l->some[j]) + q->y_zero, q->lo, q->hi);
    } else {
        for (int32_t j = 0; j < TL_LANES; j++)
            v[j] = tl_clamp(tl_sat32((int64_t)tl_mbqm(acc[j], l->mult[j], l->shift[j]) + q->y_zero), q->lo, q->hi);
    }
    for (int32_t j = 0; j < TL_LANES; j++) b[j] = (int8_t)v[j];
    tl_copy8(out, b, count, TL_LANES);
}

#endif
