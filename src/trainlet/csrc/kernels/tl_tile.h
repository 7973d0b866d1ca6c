/* SPDX-License-Identifier: Apache-2.0 */
/* The inner loop of all general convolutions: an outer product over TL_ROWS rows and TL_LANES lanes. Plain C in a form
 * that compilers keep in vector registers: one accumulator array per row, constant bounds. */
#ifndef TL_TILE_H
#define TL_TILE_H

#include <stdint.h>
#include <string.h>

#define TL_ROWS 8
#ifndef TL_LANES
#define TL_LANES 16
#endif

/* acc[row][lane] += sum over k of x[row * n + k] * w[k * TL_LANES + lane], k in 0..n-1. */
static inline void tl_tile(const int32_t *restrict x, const int8_t *restrict w, int32_t n,
                           int32_t acc[restrict TL_ROWS][TL_LANES])
{
    int32_t a0[TL_LANES], a1[TL_LANES], a2[TL_LANES], a3[TL_LANES], a4[TL_LANES], a5[TL_LANES], a6[TL_LANES],
        a7[TL_LANES];
    const int32_t *x0 = x, *x1 = x0 + n, *x2 = x1 + n, *x3 = x2 + n, *x4 = x3 + n, *x5 = x4 + n, *x6 = x5 + n,
                  *x7 = x6 + n;
    memcpy(a0, acc[0], sizeof a0);
    memcpy(a1, acc[1], sizeof a1);
    memcpy(a2, acc[2], sizeof a2);
    memcpy(a3, acc[3], sizeof a3);
    memcpy(a4, acc[4], sizeof a4);
    memcpy(a5, acc[5], sizeof a5);
    memcpy(a6, acc[6], sizeof a6);
    memcpy(a7, acc[7], sizeof a7);
    for (int32_t k = 0; k < n; k++) {
        for (int32_t j = 0; j < TL_LANES; j++) {
            const int32_t v = w[k * TL_LANES + j];
            a0[j] += x0[k] * v;
            a1[j] += x1[k] * v;
            a2[j] += x2[k] * v;
            a3[j] += x3[k] * v;
            a4[j] += x4[k] * v;
            a5[j] += x5[k] * v;
            a6[j] += x6[k] * v;
            a7[j] += x7[k] * v;
        }
    }
    memcpy(acc[0], a0, sizeof a0);
    memcpy(acc[1], a1, sizeof a1);
    memcpy(acc[2], a2, sizeof a2);
    memcpy(acc[3], a3, sizeof a3);
    memcpy(acc[4], a4, sizeof a4);
    memcpy(acc[5], a5, sizeof a5);
    memcpy(acc[6], a6, sizeof a6);
    memcpy(acc[7], a7, sizeof a7);
}

#endif
