/* SPDX-License-Identifier: Apache-2.0 */
/* What a Cortex-M is good at: TL_DSP where it has the DSP extension and words may lie at any address, TL_SMALL_CORE
 * where not. Below, the instructions of the extension for which C has no operator; a word holds two 16-bit or four
 * 8-bit numbers, the first one lowest. TL_PLAIN_TILE takes both away. */
#ifndef TL_ARM_H
#define TL_ARM_H

#include <stdint.h>

#if defined(__ARM_ARCH_PROFILE) && defined(__GNUC__) && !defined(TL_PLAIN_TILE)
#if __ARM_ARCH_PROFILE == 'M' && defined(__ARM_FEATURE_DSP) && defined(__ARM_FEATURE_UNALIGNED) && \
    !defined(__ARM_BIG_ENDIAN)
#define TL_DSP
#elif __ARM_ARCH_PROFILE == 'M'
#define TL_SMALL_CORE
#endif
#endif

#ifdef TL_DSP

/* Of any type, at any address: the compiler may then use LDR and STR, but neither LDRD nor LDM, which fault. */
typedef int32_t __attribute__((may_alias, aligned(1))) tl_any_word;

static inline int32_t tl_load_word(const void *p)
{
    return *(const tl_any_word *)p;
}

static inline void tl_store_word(void *p, int32_t v)
{
    *(tl_any_word *)p = v;
}

/* Bytes 0 and 2 of v, widened, plus the two numbers of `add`. */
static inline int32_t tl_even_bytes(int32_t add, int32_t v)
{
    int32_t sum;
    __asm__("sxtab16 %0, %1, %2" : "=r"(sum) : "r"(add), "r"(v));
    return sum;
}

/* Bytes 1 and 3 likewise. */
static inline int32_t tl_odd_bytes(int32_t add, int32_t v)
{
    int32_t sum;
    __asm__("sxtab16 %0, %1, %2, ror #8" : "=r"(sum) : "r"(add), "r"(v));
    return sum;
}

/* The lower halves of a and b. */
static inline int32_t tl_lower(int32_t a, int32_t b)
{
    int32_t both;
    __asm__("pkhbt %0, %1, %2, lsl #16" : "=r"(both) : "r"(a), "r"(b));
    return both;
}

/* The upper halves of a and b. */
static inline int32_t tl_upper(int32_t a, int32_t b)
{
    int32_t both;
    __asm__("pkhtb %0, %1, %2, asr #16" : "=r"(both) : "r"(b), "r"(a));
    return both;
}

#endif

#endif
