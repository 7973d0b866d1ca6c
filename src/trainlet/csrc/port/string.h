/* SPDX-License-Identifier: Apache-2.0 */
/* The part of string.h that is used, where no C library is installed. Small copies of a constant size must become
 * instructions, not calls, and a freestanding compiler makes them so only under these names. */
#ifndef TL_PORT_STRING_H
#define TL_PORT_STRING_H

#include <stddef.h>

void *memcpy(void *restrict to, const void *restrict from, size_t n);
void *memset(void *to, int value, size_t n);
int memcmp(const void *a, const void *b, size_t n);

#define memcpy(to, from, n) __builtin_memcpy((to), (from), (n))
#define memset(to, value, n) __builtin_memset((to), (value), (n))

#endif
