/* SPDX-License-Identifier: Apache-2.0 */
/* Forms of the same sums: plain C, which defines the answer; x86 vectors, since compilers do not make vectors of the
 * plain form reliably; the DSP instructions of a Cortex-M; and C that keeps sums in registers, for smaller cores.
 * TL_PLAIN_TILE forces the plain form. */
#include "tl_tile.h"

#if defined(TL_DSP)

#if TL_ROWS != 8 || TL_LANES != 16
#error "the blocks below are parts of a tile of 8 rows and 16 lanes"
#endif

/* The next pair of terms of a block: 16 products in 17 instructions. A word of weights, those of two lanes, becomes two
 * words of 16-bit numbers, r3 and r12; then one word of x for each row. */
#define PAIR                         \
    "ldr   r3, [r1], #32\n"          \
    "sxtb16 lr, r3, ror #8\n"        \
    "sxtb16 r3, r3\n"                \
    "pkhtb r12, lr, r3, asr #16\n"   \
    "pkhbt r3, r3, lr, lsl #16\n"    \
    "ldr   lr, [r0, r2]\n"           \
    "smlad r6, lr, r3, r6\n"         \
    "smlad r7, lr, r12, r7\n"        \
    "ldr   lr, [r0, r2, lsl #1]\n"   \
    "smlad r8, lr, r3, r8\n"         \
    "smlad r9, lr, r12, r9\n"        \
    "ldr   lr, [r0, r2, lsl #2]\n"   \
    "smlad r10, lr, r3, r10\n"       \
    "smlad r11, lr, r12, r11\n"      \
    "ldr   lr, [r0], #4\n"           \
    "smlad r4, lr, r3, r4\n"         \
    "smlad r5, lr, r12, r5\n"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"

/* A block: two lanes of the rows 0, 1, 2 and 4 from x on, `apart` bytes from each other, which may be negative. Those
 * are what a load reaches with one register for the distance; and they are half of the rows of a tile both from its
 * first row down and from its last row up. acc: the sums of the row at x; those of the next row lie acc_apart bytes
 * further. w .. end: the weights, not empty. All registers are in use, which compilers do not manage without moving
 * some of them to and fro, so this is written by hand. It pushes nothing, since a report of stack sizes would not know:
 * the caller's registers go to `save`, behind acc; the three arguments on the stack are read in place. */
__attribute__((naked, noinline, used)) static void tile_block(const int16_t *x, const int8_t *w, int32_t apart,
                                                              int32_t *acc, const int8_t *end, int32_t acc_apart,
                                                              int32_t save[10])
{
    __asm__(".syntax unified\n"
            "ldr   r12, [sp, #8]\n"
            "stm   r12, {r3-r11, lr}\n"
            "ldr   lr, [sp, #4]\n"
            "ldrd  r4, r5, [r3]\n"
            "add   r12, r3, lr\n"
            "ldrd  r6, r7, [r12]\n"
            "add   r12, r3, lr, lsl #1\n"
            "ldrd  r8, r9, [r12]\n"
            "add   r12, r3, lr, lsl #2\n"
            "ldrd  r10, r11, [r12]\n"
            "ldr   lr, [sp]\n"
            "sub   lr, lr, r1\n"
            "tst   lr, #32\n" /* an odd number of pairs begins with the second one */
            "bne   2f\n"
            "1:\n" PAIR
            "2:\n" PAIR
            "ldr   lr, [sp]\n"
            "cmp   r1, lr\n"
            "bne   1b\n"
            "ldrd  r12, lr, [sp, #4]\n"
            "ldr   r3, [lr], #4\n"
            "strd  r4, r5, [r3]\n"
            "add   r0, r3, r12\n"
            "strd  r6, r7, [r0]\n"
            "add   r0, r3, r12, lsl #1\n"
            "strd  r8, r9, [r0]\n"
            "add   r0, r3, r12, lsl #2\n"
            "strd  r10, r11, [r0]\n"
            "ldm   lr, {r4-r11, pc}\n");
}

#pragma GCC diagnostic pop

void tl_tile(const int16_t *restrict x, const int8_t *restrict w, int32_t n, int32_t acc[restrict TL_ROWS][TL_LANES])
{
    const int32_t row = 2 * n, acc_row = 4 * TL_LANES;
    int32_t save[10];
    if (n <= 0) return;
    for (int32_t j = 0; j < TL_LANES; j += 2, w += 4) {
        const int8_t *end = w + n * TL_LANES;
        tile_block(x, w, row, &acc[0][j], end, acc_row, save);
        tile_block(x + 7 * n, w, -row, &acc[7][j], end, -acc_row, save);
    }
}

/* Adds nx > 0 taps to four lanes; minus: -zero, twice. Weights fit 16 bits, so that one instruction multiplies and
 * adds; told so in C, compilers load them one by one. */
static inline void row_of_taps(const int8_t *x, int32_t nx, int32_t step, int32_t minus, const int32_t *w, int32_t *acc)
{
    const int32_t *const past = w + nx * TL_LANES;
    int32_t a0 = acc[0], a1 = acc[1], a2 = acc[2], a3 = acc[3];
    do {
        const int32_t four = tl_load_word(x);
        int32_t even, odd, u, v;
        __asm__("ldrd %0, %1, [%2], #8" : "=&r"(u), "=&r"(v), "+r"(w) : : "memory");
        even = tl_even_bytes(minus, four);
        odd = tl_odd_bytes(minus, four);
        __asm__("smlabb %[a0], %[even], %[u], %[a0]\n\t"
                "smlabb %[a1], %[odd], %[v], %[a1]\n\t"
                "ldrd %[u], %[v], [%[w]], %[next]\n\t"
                "smlatb %[a2], %[even], %[u], %[a2]\n\t"
                "smlatb %[a3], %[odd], %[v], %[a3]"
                : [a0] "+&r"(a0), [a1] "+&r"(a1), [a2] "+&r"(a2), [a3] "+&r"(a3), [w] "+&r"(w), [u] "+&r"(u),
                  [v] "+&r"(v)
                : [even] "r"(even), [odd] "r"(odd), [next] "i"(4 * TL_LANES - 8)
                : "memory");
        x += step;
    } while (w != past);
    acc[0] = a0;
    acc[1] = a1;
    acc[2] = a2;
    acc[3] = a3;
}

#elif defined(TL_SMALL_CORE)

void tl_tile(const int16_t *restrict x, const int8_t *restrict w, int32_t n, int32_t acc[restrict TL_ROWS][TL_LANES])
{
    for (int32_t r = 0; r < TL_ROWS; r++, x += n) {
        for (int32_t j = 0; j < TL_LANES; j += 4) {
            int32_t *a = &acc[r][j], a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];
            const int8_t *v = w + 2 * j;
            for (int32_t k = 0; k < n; k += 2, v += 2 * TL_LANES) {
                const int32_t even = x[k], odd = x[k + 1];
                a0 += even * v[0];
                a0 += odd * v[1];
                a1 += even * v[2];
                a1 += odd * v[3];
                a2 += even * v[4];
                a2 += odd * v[5];
                a3 += even * v[6];
                a3 += odd * v[7];
            }
            a[0] = a0;
            a[1] = a1;
            a[2] = a2;
            a[3] = a3;
        }
    }
}

/* Adds nx > 0 taps to four lanes. */
static inline void row_of_taps(const int8_t *x, int32_t nx, int32_t step, int32_t zero, const int32_t *w, int32_t *acc)
{
    const int32_t *const past = w + nx * TL_LANES;
    int32_t a0 = acc[0], a1 = acc[1], a2 = acc[2], a3 = acc[3];
    for (; w != past; x += step, w += TL_LANES) {
        a0 += (x[0] - zero) * w[0];
        a1 += (x[1] - zero) * w[1];
        a2 += (x[2] - zero) * w[2];
        a3 += (x[3] - zero) * w[3];
    }
    acc[0] = a0;
    acc[1] = a1;
    acc[2] = a2;
    acc[3] = a3;
}

#endif

#if defined(TL_DSP) || defined(TL_SMALL_CORE)

void tl_tile_taps(const int8_t *const *rows, int32_t ny, int32_t nx, int32_t step, int32_t zero,
                  const int32_t *restrict w, int32_t w_row, int32_t acc[restrict TL_LANES])
{
#ifdef TL_DSP
    zero = tl_lower(-zero, -zero);
#endif
    if (nx <= 0) return;
    for (int32_t ky = 0; ky < ny; ky++, w += w_row)
        for (int32_t j = 0; j < TL_LANES; j += 4) row_of_taps(rows[ky] + j, nx, step, zero, w + j, acc + j);
}

#elif defined(TL_PLAIN_TILE) || !defined(__AVX2__)

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
