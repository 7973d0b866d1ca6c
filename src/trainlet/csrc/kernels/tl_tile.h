/* SPDX-License-Identifier: Apache-2.0 */
/* The inner loops of convolutions: an outer product over TL_ROWS rows and TL_LANES lanes, and the taps of a depthwise
 * window. Both take their sums two at a time, since every fast integer multiply does: operands are padded with zeros to
 * an even number n of terms, and packed weights hold the two terms of a lane side by side. */
#ifndef TL_TILE_H
#define TL_TILE_H

#include <stdint.h>
#include <string.h>

#define TL_ROWS 8
#ifndef TL_LANES
#define TL_LANES 16
#endif
#define TL_EVEN(n) (((n) + 1) & ~1)
/* Place of term k of a lane in packed weights. */
#define TL_PACKED(k, lane) (((k) >> 1) * 2 * TL_LANES + (lane) * 2 + ((k) & 1))

/* acc[row][lane] += sum over k of x[row * n + k] * w[TL_PACKED(k, lane)], k in 0..n-1, n even. Every partial sum fits
 * int32. x is aligned to 4 bytes. */
void tl_tile(const int16_t *restrict x, const int8_t *restrict w, int32_t n, int32_t acc[restrict TL_ROWS][TL_LANES]);

/* acc[lane] += sum over ky < ny, kx < nx of (rows[ky][kx * step + lane] - zero) * w[ky * w_row + kx * TL_LANES + lane]. */
void tl_tile_taps(const int8_t *const *rows, int32_t ny, int32_t nx, int32_t step, int32_t zero,
                  const int32_t *restrict w, int32_t w_row, int32_t acc[restrict TL_LANES]);

/* Packs terms k and k + 1 (k even) of `count` lanes; b may be NULL for a term of zeros. Other lanes are not touched. */
static inline void tl_pack_pair(const int8_t *restrict a, const int8_t *restrict b, int32_t k, int32_t count,
                                int8_t *restrict packed)
{
    int8_t *to = packed + k * TL_LANES;
    if (count == TL_LANES && b) {
        for (int32_t j = 0; j < TL_LANES; j++) {
            to[2 * j] = a[j];
            to[2 * j + 1] = b[j];
        }
        return;
    }
    for (int32_t j = 0; j < count; j++) {
        to[2 * j] = a[j];
        to[2 * j + 1] = b ? b[j] : 0;
    }
}

#endif
