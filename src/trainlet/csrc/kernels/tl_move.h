/* SPDX-License-Identifier: Apache-2.0 */
/* Filling and copying inside loops. On a PC memset and memcpy become vector instructions; on a chip they are calls, which
 * take longer than the few elements do, so that there these are loops. GCC makes calls of them again unless it is told
 * -fno-tree-loop-distribute-patterns, as a build for a chip does. */
#ifndef TL_MOVE_H
#define TL_MOVE_H

#include <stdint.h>
#include <string.h>

#if (defined(__x86_64__) || defined(__aarch64__)) && !defined(TL_PLAIN_TILE)
#define TL_ON_PC 1
#else
#define TL_ON_PC 0
#endif

/* Whether a memcpy of a few bytes becomes instructions, too: where words may lie at any address. */
#if TL_ON_PC || defined(__ARM_FEATURE_UNALIGNED)
#define TL_FEW_IN_PLACE 1
#else
#define TL_FEW_IN_PLACE 0
#endif

/* n is a multiple of 4. */
static inline void tl_zero8(int8_t *to, int32_t n)
{
    if (TL_ON_PC) {
        memset(to, 0, (size_t)n);
        return;
    }
    for (int32_t i = 0; i < n; i += 4) to[i] = to[i + 1] = to[i + 2] = to[i + 3] = 0;
}

static inline void tl_zero16(int16_t *to, int32_t n)
{
    if (TL_ON_PC) {
        memset(to, 0, (size_t)n * sizeof *to);
        return;
    }
    for (int32_t i = 0; i < n; i++) to[i] = 0;
}

/* n is a multiple of 4. */
static inline void tl_zero32(int32_t *to, int32_t n)
{
    if (TL_ON_PC) {
        memset(to, 0, (size_t)n * sizeof *to);
        return;
    }
    for (int32_t i = 0; i < n; i += 4) to[i] = to[i + 1] = to[i + 2] = to[i + 3] = 0;
}

/* n is a constant of at most 16. */
static inline void tl_copy32(int32_t *restrict to, const int32_t *restrict from, int32_t n)
{
    if (TL_FEW_IN_PLACE) {
        memcpy(to, from, (size_t)n * sizeof *to);
        return;
    }
    for (int32_t i = 0; i < n; i++) to[i] = from[i];
}

/* Two bytes. */
static inline void tl_copy_pair(int8_t *restrict to, const int8_t *restrict from)
{
    if (TL_FEW_IN_PLACE) {
        memcpy(to, from, 2);
        return;
    }
    to[0] = from[0];
    to[1] = from[1];
}

/* `count` bytes; the usual number `all` is a constant of at most 16. */
static inline void tl_copy8(int8_t *restrict to, const int8_t *restrict from, int32_t count, int32_t all)
{
    if (TL_FEW_IN_PLACE && count == all) {
        memcpy(to, from, (size_t)all);
    } else if (TL_ON_PC) {
        memcpy(to, from, (size_t)count);
    } else {
        for (int32_t i = 0; i < count; i++) to[i] = from[i];
    }
}

#endif
