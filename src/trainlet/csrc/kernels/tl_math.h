/* SPDX-License-Identifier: Apache-2.0 */
/* Every integer rounding of a training step, once (page sections 1, 2 and 4). All functions are exact; nothing here
 * depends on the order of calls. `>>` on a negative number is arithmetic: every supported compiler does that, and
 * tests/test_kernels_conv2d.py checks it. */
#ifndef TL_MATH_H
#define TL_MATH_H

#include <stdint.h>
#include <string.h>

#define TL_MIN(a, b) ((a) < (b) ? (a) : (b))
#define TL_MAX(a, b) ((a) > (b) ? (a) : (b))

static inline int32_t tl_clamp(int32_t x, int32_t lo, int32_t hi) { return x < lo ? lo : x > hi ? hi : x; }

static inline int32_t tl_sat32(int64_t x) {
    return x < INT32_MIN ? INT32_MIN : x > INT32_MAX ? INT32_MAX : (int32_t)x;
}

/* x 2^n for n in 0..31 without overflow checks; the caller knows that it fits. */
static inline int32_t tl_shl(int32_t x, int32_t n) { return (int32_t)((uint32_t)x << n); }

/* Number of bits of x: 0 for 0, 32 for 2^31 and above. */
static inline int32_t tl_bitlen(uint32_t x) {
    int32_t n = 0;
    for (int32_t s = 16; s > 0; s >>= 1) {
        if (x >> s) {
            n += s;
            x >>= s;
        }
    }
    return n + (int32_t)x;
}

/* ---- random words, section 2 ---- */

static inline uint32_t tl_mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

/* tl_step.key of one training step, and the key of a rounding site in it. */
static inline uint32_t tl_step_key(uint32_t seed, uint32_t step) { return tl_mix(seed + 0x9e3779b9u * step); }
static inline uint32_t tl_site_key(uint32_t step_key, uint32_t site) { return tl_mix(step_key + site); }
static inline uint32_t tl_word(uint32_t site_key, uint32_t index) { return tl_mix(site_key + index); }

/* ---- requantisation, section 1 ---- */

/* b > INT32_MIN. "Half away, then truncate" of the page is the same as "add half, then floor" for a positive b or any
 * product that is no tie; at a tie below zero both give the upper neighbor. */
static inline int32_t tl_srdhm(int32_t a, int32_t b) {
    return (int32_t)(((int64_t)a * b + ((int64_t)1 << 30)) >> 31);
}

/* n in 0..31. */
static inline int32_t tl_rdbpot(int32_t x, int32_t n) {
    const int32_t mask = (int32_t)(((uint32_t)1 << n) - 1);
    return (x >> n) + ((x & mask) > (mask >> 1) + (x < 0));
}

/* (m, sh) from quantize_multiplier: m = 0 or 2^30..2^31-1, sh >= -31. */
static inline int32_t tl_mbqm(int32_t x, int32_t m, int32_t sh) {
    const int32_t left = TL_MIN(TL_MAX(sh, 0), 31);
    return tl_rdbpot(tl_srdhm(tl_sat32((int64_t)x * ((int64_t)1 << left)), m), TL_MAX(-sh, 0));
}

/* The same for |x| < 2^30 and sh <= 0; half = n > 0 ? 2^(n-1) : 0 and some = n > 0 ? -1 : 0 for n = -sh. Cheap in
 * vectors and on a Cortex-M: no comparison. */
static inline int32_t tl_mbqm_fast(int32_t x, int32_t m, int32_t n, int32_t half, int32_t some) {
    x = tl_srdhm(x, m);
    return (x + ((x >> 31) & some) + half) >> n;
}

/* ---- scaling and stochastic rounding, section 2 ---- */

static inline int32_t tl_smmulr(int32_t a, int32_t m) {
    return (int32_t)(((int64_t)a * m + ((int64_t)1 << 31)) >> 32);
}

/* A shift count n of any size, taken apart: first d bits with rounding (h = 0 where `none`), then n <= 20 bits. */
typedef struct {
    int32_t n, d, none;
} tl_shift;

static inline tl_shift tl_shift_of(int32_t n) {
    tl_shift s;
    s.d = TL_MAX(n - 20, 0);
    s.none = s.d > 30;
    s.d = s.none ? 0 : s.d;
    s.n = TL_MIN(n, 20);
    return s;
}

/* (h + 2^(d-1)) >> d, and h for d = 0; |h| <= 2^30, d in 0..30. */
static inline int32_t tl_round_shift(int32_t h, int32_t d) {
    return (h + (int32_t)(((uint32_t)1 << d) >> 1)) >> d;
}

/* |h| <= 2^30; s from tl_shift_of(n). Loops that want no branch take a multiplier of 0 for `none`. */
static inline int32_t tl_prescale(int32_t h, tl_shift s) {
    return s.none ? 0 : tl_round_shift(h, s.d);
}

/* sround for n in 0..20, without a branch; |h| <= 2^30. */
static inline int32_t tl_sround_right(int32_t h, int32_t n, uint32_t w) {
    return (h + (int32_t)((w >> 1) >> (31 - n))) >> n;
}

/* |h| <= 2^30, n <= 20. */
static inline int32_t tl_sround(int32_t h, int32_t n, uint32_t w) {
    if (n >= 0) return tl_sround_right(h, n, w);
    if (n < -31) return h > 0 ? INT32_MAX : h < 0 ? INT32_MIN : 0;
    return tl_sat32((int64_t)h * ((int64_t)1 << -n));
}

/* A real factor v = mult 2^(exp - 31), mult in 2^30..2^31-1; mult = exp = 0 for v = 0. */
typedef struct {
    int32_t mult, exp;
} tl_scale;

/* v is 0 or positive and finite; subnormals are exact too. */
static inline tl_scale tl_scale_of(float v) {
    tl_scale s = {0, 0};
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    uint32_t m = bits & 0x7fffffu;
    int32_t e = (int32_t)(bits >> 23 & 0xff);
    m |= e ? 0x800000u : 0;
    if (m == 0) return s;
    const int32_t len = tl_bitlen(m);
    s.mult = (int32_t)(m << (31 - len));
    s.exp = TL_MAX(e, 1) - 150 + len;
    return s;
}

/* ---- parameter updates, section 4 ---- */

/* What an integer sum is scaled by in an update: v = lr * rate, its exponent taken apart. */
typedef struct {
    int32_t mult, pre;
    tl_shift shift;
} tl_rate;

/* fraction_bits is L (0 for a bias), e_y the gradient's exponent, pre is p. */
static inline tl_rate tl_rate_of(float v, int32_t e_y, int32_t pre, int32_t fraction_bits) {
    const tl_scale s = tl_scale_of(v);
    tl_rate r;
    r.mult = s.mult;
    r.pre = pre;
    r.shift = tl_shift_of(-(s.exp + e_y - pre + 1 + fraction_bits));
    return r;
}

/* What to subtract from the parameter; |acc| 2^pre < 2^31. */
static inline int32_t tl_rate_step(const tl_rate *r, int32_t acc, uint32_t word) {
    return tl_sround(tl_prescale(tl_smmulr(tl_shl(acc, r->pre), r->mult), r->shift), r->shift.n, word);
}

/* clamp(x - step, -bound, bound); the difference saturates first. */
static inline int32_t tl_sub_clamp(int32_t x, int32_t step, int32_t bound) {
    return tl_clamp(tl_sat32((int64_t)x - step), -bound, bound);
}

/* Fraction bits of stored weight i: bits = 0 (fraction is not read), 4 (packed nibbles, low first) or 8. */
static inline int32_t tl_fraction_get(const uint8_t *fraction, int32_t i, int32_t bits) {
    if (bits == 0) return 0;
    if (bits == 8) return (int8_t)fraction[i];
    const int32_t nibble = fraction[i >> 1] >> (i & 1 ? 4 : 0) & 15;
    return nibble - (nibble & 8 ? 16 : 0);
}

static inline void tl_fraction_put(uint8_t *fraction, int32_t i, int32_t bits, int32_t l) {
    if (bits == 0) return;
    if (bits == 8) {
        fraction[i] = (uint8_t)l;
        return;
    }
    const int32_t at = i & 1 ? 4 : 0;
    fraction[i >> 1] = (uint8_t)((fraction[i >> 1] & (0xf0 >> at)) | ((l & 15) << at));
}

/* Subtracts `step` from the full form F = w 2^L + l of stored weight i. */
static inline void tl_weight_sub(int8_t *w, uint8_t *fraction, int32_t i, int32_t bits, int32_t step) {
    const int32_t one = (int32_t)1 << bits;
    const int32_t full = tl_sub_clamp(w[i] * one + tl_fraction_get(fraction, i, bits), step, 127 * one);
    const int32_t top = (full + (one >> 1)) >> bits;
    w[i] = (int8_t)top;
    tl_fraction_put(fraction, i, bits, full - top * one);
}

#endif
