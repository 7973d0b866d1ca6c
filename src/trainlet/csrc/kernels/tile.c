/* SPDX-License-Identifier: Apache-2.0 */
/* Two forms of the same sums: plain C, which defines the answer, and x86 vectors, since compilers do not make vectors of
 * the plain form reliably. TL_PLAIN_TILE forces the plain form. */
#include "tl_tile.h"

#if defined(TL_PLAIN_TILE) || !defined(__AVX2__)

void tl_tile(const int16_t *restrict x, const int8_t *restrict w, int32_t n, int32_t acc[restrict TL_ROWS][TL_LANES])
{
    for (int32_t r = 0; r < TL_ROWS; r++)
        for (int32_t k = 0; k < n; k += 2)
            for (int32_t j = 0; j < TL_LANES; j++)
                acc[r][j] += x[r * n + k] * w[TL_PACKED(k, j)] + x[r * n + k + 1] * w[TL_PACKED(k + 1, j)];
}

void tl_tile_taps(const int8_t *const *rows, int32_t ny, int32_t nx, int32_t step, int32_t zero,
                  const int32_t *restrict w, int32_t w_row, int32_t acc[restrict TL_LANES])
{
    for (int32_t ky = 0; ky < ny; ky++)
        for (int32_t kx = 0; kx < nx; kx++)
            for (int32_t j = 0; j < TL_LANES; j++)
                acc[j] += (rows[ky][kx * step + j] - zero) * w[ky * w_row + kx * TL_LANES + j];
}

#else

#include <immintrin.h>

#if defined(__AVX512BW__)
typedef __m512i wide;
#define PARTS 1 /* registers that hold TL_LANES sums */
#define LOAD(p) _mm512_loadu_si512(p)
#define STORE(p, v) _mm512_storeu_si512(p, v)
#define WIDEN16(p) _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)(p)))
#define WIDEN32(p) _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p)))
#define SPLAT(v) _mm512_set1_epi32(v)
#define ADD(a, b) _mm512_add_epi32(a, b)
#define SUB(a, b) _mm512_sub_epi32(a, b)
#define MUL(a, b) _mm512_mullo_epi32(a, b)
#define PAIRS(a, b) _mm512_madd_epi16(a, b)
#else
typedef __m256i wide;
#define PARTS 2
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(const void *)(p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *)(void *)(p), v)
#define WIDEN16(p) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(p)))
#define WIDEN32(p) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(p)))
#define SPLAT(v) _mm256_set1_epi32(v)
#define ADD(a, b) _mm256_add_epi32(a, b)
#define SUB(a, b) _mm256_sub_epi32(a, b)
#define MUL(a, b) _mm256_mullo_epi32(a, b)
#define PAIRS(a, b) _mm256_madd_epi16(a, b)
#endif
#define WIDTH (TL_LANES / PARTS)
#define GROUP (TL_ROWS / PARTS) /* rows whose sums fit the registers */

static inline int32_t two(const int16_t *p)
{
    int32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

void tl_tile(const int16_t *restrict x, const int8_t *restrict w, int32_t n, int32_t acc[restrict TL_ROWS][TL_LANES])
{
    for (int32_t first = 0; first < TL_ROWS; first += GROUP) {
        wide a[GROUP][PARTS];
        const int16_t *rows = x + first * n;
        for (int32_t r = 0; r < GROUP; r++)
            for (int32_t i = 0; i < PARTS; i++) a[r][i] = LOAD(acc[first + r] + i * WIDTH);
        for (int32_t k = 0; k < n; k += 2) {
            for (int32_t i = 0; i < PARTS; i++) {
                const wide v = WIDEN16(w + k * TL_LANES + i * 2 * WIDTH);
                for (int32_t r = 0; r < GROUP; r++) a[r][i] = ADD(a[r][i], PAIRS(SPLAT(two(rows + r * n + k)), v));
            }
        }
        for (int32_t r = 0; r < GROUP; r++)
            for (int32_t i = 0; i < PARTS; i++) STORE(acc[first + r] + i * WIDTH, a[r][i]);
    }
}

void tl_tile_taps(const int8_t *const *rows, int32_t ny, int32_t nx, int32_t step, int32_t zero,
                  const int32_t *restrict w, int32_t w_row, int32_t acc[restrict TL_LANES])
{
    const wide z = SPLAT(zero);
    wide a[PARTS];
    for (int32_t i = 0; i < PARTS; i++) a[i] = LOAD(acc + i * WIDTH);
    for (int32_t ky = 0; ky < ny; ky++) {
        const int8_t *x = rows[ky];
        const int32_t *v = w + ky * w_row;
        for (int32_t kx = 0; kx < nx; kx++, x += step, v += TL_LANES)
            for (int32_t i = 0; i < PARTS; i++)
                a[i] = ADD(a[i], MUL(SUB(WIDEN32(x + i * WIDTH), z), LOAD(v + i * WIDTH)));
    }
    for (int32_t i = 0; i < PARTS; i++) STORE(acc + i * WIDTH, a[i]);
}

#endif
