/* SPDX-License-Identifier: Apache-2.0 */
/* The one rounding of a gradient tensor (page section 4), shared by the convolution, depthwise and plain round_grad
 * kernels: from int32 sums to r_x, with further gradients, mask, statistics and counters.
 *
 * Use, for rows y0..y1-1 of a tensor of `width` x `channels`:
 *
 *     tl_round r;
 *     tl_round_begin(&r, step, site, v, per_channel, e_y, width, channels, seen, y0 == 0);
 *     for each run of up to TL_LANES channels c0 .. c0 + count - 1      (outer loop: the lanes are set up once)
 *         tl_round_lanes(&r, c0, count);
 *         for each pixel (y, x) of the rows
 *             tl_round_pixel(&r, y, x, acc, rx + ((y * width) + x) * channels + c0);
 *     tl_round_end(&r, y1 == height);
 *
 * Any order of pixels and lanes gives the same bytes; switching lanes costs about as much as five pixels.
 */
#ifndef TL_ROUND_H
#define TL_ROUND_H

#include "tl.h"

#define TL_LANES 16

typedef struct {
    tl_step *step;
    const tl_site *site;
    const int32_t *mult; /* one, or one per channel; NULL: there are no sums, h starts at 0 with n = 16 */
    const int16_t *exp;
    int32_t per_channel, pre, e_y, e_x, width, channels;
    uint32_t key, rounded;
    int32_t *seen;
    int32_t c0, count;          /* the lanes' channels */
    int32_t lane_mult[TL_LANES]; /* 0 where the prescale leaves nothing */
    int32_t lane_n[TL_LANES], lane_d[TL_LANES];
    uint32_t lane_or[TL_LANES];  /* o of the lanes, not yet in *seen */
    uint32_t lane_met[TL_LANES]; /* elements that met the clamp */
} tl_round;

/* v: NULL where no consumer computes. per_channel: v->mult and v->exp have an entry per channel. e_y: exponent of the
 * output gradient that the sums were made from. seen: 4 bytes that live from the first to the last call for one
 * tensor; `first` initializes them. Writes e_x to *site->e; the anchor of this step must be set. */
void tl_round_begin(tl_round *r, tl_step *step, const tl_site *site, const tl_dx_scale *v, int32_t per_channel,
                    int32_t e_y, int32_t width, int32_t channels, int32_t *seen, int32_t first);
/* The following pixels are about channels c0 .. c0 + count - 1, count in 1..TL_LANES. */
void tl_round_lanes(tl_round *r, int32_t c0, int32_t count);
/* Rounds the sums of one pixel's lanes to out[count] = &rx(y, x, c0). acc has TL_LANES entries of which those past
 * `count` must be 0 (they are computed and thrown away); it is not read where v was NULL, and may be NULL then. */
void tl_round_pixel(tl_round *r, int32_t y, int32_t x, const int32_t *acc, int8_t *out);
/* Adds to the step's counters; `last` updates rho. */
void tl_round_end(tl_round *r, int32_t last);

#endif
