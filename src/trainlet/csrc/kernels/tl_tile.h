/* SPDX-License-Identifier: Apache-2.0 */
/* The inner loops of convolutions: an outer product over TL_ROWS rows and TL_LANES lanes, and the taps of a depthwise
 * window. Both take their sums two at a time, since every fast integer multiply does: operands are padded with zeros to
 * an even number n of terms, and packed weights hold the two terms of a lane side by side. */
#ifndef TL_TILE_H
#define TL_TILE_H

#include <stdint.h>
#include <string.h>

#include "tl.h"
#include "tl_arm.h"

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
 * int32. x and acc are aligned to 4 bytes. */
void tl_tile(const int16_t *restrict x, const int8_t *restrict w, int32_t n, int32_t acc[restrict TL_ROWS][TL_LANES]);

/* acc[lane] += sum over ky < ny, kx < nx of (rows[ky][kx * step + lane] - zero) * w[ky * w_row + kx * TL_LANES + lane].
 * Each w fits 16 bits, zero is in -128..127. */
void tl_tile_taps(const int8_t *const *rows, int32_t ny, int32_t nx, int32_t step, int32_t zero,
                  const int32_t *restrict w, int32_t w_row, int32_t acc[restrict TL_LANES]);

/* Channels of a group: all that a sum runs over, or some of them. */
typedef struct {
    int32_t first, count;
} tl_part;

#define TL_CHUNK 64

/* How many of the `channels` that a sum runs over, with all taps, are packed and gathered at once: all, but of many with
 * one tap TL_CHUNK, if the sums of all pixels, which then have to be kept, take less room than is saved. */
static inline int32_t tl_channels_at_once(const tl_conv *c, int32_t channels, int32_t pixels)
{
    const int32_t sums = (pixels + TL_ROWS - 1) / TL_ROWS * TL_ROWS * TL_LANES * 4;
    const int32_t saved = (TL_EVEN(channels) - TL_CHUNK) * (TL_LANES + 2 * TL_ROWS);
    return c->kh * c->kw == 1 && sums < saved ? TL_CHUNK : channels;
}

/* Scratch in bytes of inputs and weights of a tile, and of the sums that are kept. */
static inline int32_t tl_tiles_scratch(const tl_conv *c, int32_t channels, int32_t pixels)
{
    const int32_t step = tl_channels_at_once(c, channels, pixels);
    const int32_t sums = step < channels ? (pixels + TL_ROWS - 1) / TL_ROWS * TL_ROWS * TL_LANES * 4 : 0;
    return TL_EVEN(c->kh * c->kw * step) * (TL_LANES + 2 * TL_ROWS) + sums;
}

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
#elif defined(TL_DSP)
    const int32_t minus = tl_lower(-zero, -zero);
    for (; i + 4 <= n; i += 4) {
        const int32_t v = tl_load_word(from + i), even = tl_even_bytes(minus, v), odd = tl_odd_bytes(minus, v);
        tl_store_word(to + i, tl_lower(even, odd));
        tl_store_word(to + i + 2, tl_upper(even, odd));
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
#elif defined(TL_DSP)
    for (; i + 4 <= n; i += 4) {
        const int32_t v = tl_load_word(from + i), even = tl_even_bytes(0, v), odd = tl_odd_bytes(0, v);
        const int32_t m = tl_load_word(by + i), next = tl_load_word(by + i + 2);
        tl_store_word(to + i, tl_lower((int16_t)even * (int16_t)m, (int16_t)odd * (m >> 16)));
        tl_store_word(to + i + 2, tl_lower((even >> 16) * (int16_t)next, (odd >> 16) * (next >> 16)));
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
