/* SPDX-License-Identifier: Apache-2.0 */
/* The inner loops of convolutions: an outer product over TL_ROWS rows and TL_LANES lanes, and the taps of a depthwise
 * window. Both take their sums two at a time, since every fast integer multiply does: operands are padded with zeros to
 * an even number n of terms, and packed weights hold the two terms of a lane side by side. */
#ifndef TL_TILE_H
#define TL_TILE_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) && !defined(TL_PLAIN_TILE)
#include <immintrin.h>
#define TL_X86
#endif

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

/* The row of a ring of rows that holds row y; a plain buffer has as many as rows. */
static inline int32_t tl_ring(int32_t y, int32_t ring)
{
    return y < ring ? y : y % ring;
}

/* to[i] = from[i] - zero. */
static inline void tl_widen(const int8_t *restrict from, int32_t zero, int32_t n, int16_t *restrict to)
{
    int32_t i = 0;
#ifdef TL_X86
    const __m256i z = _mm256_set1_epi16((int16_t)zero);
    for (; i + 16 <= n; i += 16) {
        const __m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(from + i)));
        _mm256_storeu_si256((__m256i *)(void *)(to + i), _mm256_sub_epi16(v, z));
    }
    for (; i + 8 <= n; i += 8) {
        const __m128i v = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)(const void *)(from + i)));
        _mm_storeu_si128((__m128i *)(void *)(to + i), _mm_sub_epi16(v, _mm256_castsi256_si128(z)));
    }
#endif
    for (; i < n; i++) to[i] = (int16_t)(from[i] - zero);
}

/* to[i] = from[i] * by[i], which fits. */
static inline void tl_multiply(const int8_t *restrict from, const int16_t *restrict by, int32_t n, int16_t *restrict to)
{
    int32_t i = 0;
#ifdef TL_X86
    for (; i + 16 <= n; i += 16) {
        const __m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(from + i)));
        const __m256i m = _mm256_loadu_si256((const __m256i *)(const void *)(by + i));
        _mm256_storeu_si256((__m256i *)(void *)(to + i), _mm256_mullo_epi16(v, m));
    }
    for (; i + 8 <= n; i += 8) {
        const __m128i v = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)(const void *)(from + i)));
        const __m128i m = _mm_loadu_si128((const __m128i *)(const void *)(by + i));
        _mm_storeu_si128((__m128i *)(void *)(to + i), _mm_mullo_epi16(v, m));
    }
#endif
    for (; i < n; i++) to[i] = (int16_t)(from[i] * by[i]);
}

/* to[2 j] = a[j], to[2 j + 1] = b[j] for all lanes; compilers make poor vectors of the plain form. */
static inline void tl_interleave(const int8_t *restrict a, const int8_t *restrict b, int8_t *restrict to)
{
#if defined(TL_X86) && TL_LANES == 16
    const __m128i x = _mm_loadu_si128((const __m128i *)(const void *)a);
    const __m128i y = _mm_loadu_si128((const __m128i *)(const void *)b);
    _mm_storeu_si128((__m128i *)(void *)to, _mm_unpacklo_epi8(x, y));
    _mm_storeu_si128((__m128i *)(void *)(to + TL_LANES), _mm_unpackhi_epi8(x, y));
#else
    for (int32_t j = 0; j < TL_LANES; j++) {
        to[2 * j] = a[j];
        to[2 * j + 1] = b[j];
    }
#endif
}

/* Packs terms k and k + 1 (k even) of `count` lanes; b may be NULL for a term of zeros. Other lanes are not touched. */
static inline void tl_pack_pair(const int8_t *restrict a, const int8_t *restrict b, int32_t k, int32_t count,
                                int8_t *restrict packed)
{
    int8_t *to = packed + k * TL_LANES;
    if (count == TL_LANES && b) {
        tl_interleave(a, b, to);
        return;
    }
    for (int32_t j = 0; j < count; j++) {
        to[2 * j] = a[j];
        to[2 * j + 1] = b ? b[j] : 0;
    }
}

#endif
