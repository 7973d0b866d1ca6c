/* SPDX-License-Identifier: Apache-2.0 */
/* The four functions that a compiler may call in any program. Compiled with -fno-tree-loop-distribute-patterns, or the
 * compiler would find a memcpy in memcpy and call itself. */
#include <stddef.h>
#include <stdint.h>

void *memcpy(void *restrict to, const void *restrict from, size_t n);
void *memmove(void *to, const void *from, size_t n);
void *memset(void *to, int value, size_t n);
int memcmp(const void *a, const void *b, size_t n);

typedef uint32_t __attribute__((may_alias)) word;

void *memcpy(void *restrict to, const void *restrict from, size_t n)
{
    uint8_t *d = to;
    const uint8_t *s = from;
    if ((((uintptr_t)d | (uintptr_t)s) & 3u) == 0)
        for (; n >= 4; n -= 4, d += 4, s += 4) *(word *)(void *)d = *(const word *)(const void *)s;
    for (; n; n--) *d++ = *s++;
    return to;
}

void *memmove(void *to, const void *from, size_t n)
{
    uint8_t *d = to;
    const uint8_t *s = from;
    if ((uintptr_t)d <= (uintptr_t)s) {
        for (; n; n--) *d++ = *s++;
    } else {
        while (n--) d[n] = s[n];
    }
    return to;
}

void *memset(void *to, int value, size_t n)
{
    uint8_t *d = to;
    const uint32_t four = 0x01010101u * (uint8_t)value;
    for (; n && ((uintptr_t)d & 3u); n--) *d++ = (uint8_t)value;
    for (; n >= 4; n -= 4, d += 4) *(word *)(void *)d = four;
    for (; n; n--) *d++ = (uint8_t)value;
    return to;
}

int memcmp(const void *a, const void *b, size_t n)
{
    const uint8_t *x = a, *y = b;
    for (; n; n--, x++, y++)
        if (*x != *y) return *x - *y;
    return 0;
}
