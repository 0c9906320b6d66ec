/* What several tests need: CMocka with its prerequisites, and a small seeded generator. */
#ifndef TS_TEST_UTIL_H
#define TS_TEST_UTIL_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* splitmix64: the same numbers on every machine. */
typedef struct rng {
    uint64_t state;
} rng;

static inline uint64_t rng_next(rng *r)
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* 0..limit-1 */
static inline uint32_t rng_below(rng *r, uint32_t limit)
{
    return (uint32_t)((rng_next(r) >> 32) * limit >> 32);
}

/* Roughly normal, mean 0, variance 1: four uniform numbers of 16 bits, each of variance 1/12. */
static inline float rng_normal(rng *r)
{
    const uint64_t x = rng_next(r);
    const uint32_t sum = (uint32_t)(x & 0xffff) + (uint32_t)(x >> 16 & 0xffff) +
                         (uint32_t)(x >> 32 & 0xffff) + (uint32_t)(x >> 48);
    return ((float)sum * 0x1p-16f - 2.0f) * 1.7320508f;
}

#endif
