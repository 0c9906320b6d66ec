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

/* Roughly normal, mean 0, variance 1. */
static inline float rng_normal(rng *r)
{
    float sum = 0;
    for (int i = 0; i < 12; i++)
        sum += (float)(rng_next(r) >> 40) * 0x1p-24f;
    return sum - 6.0f;
}

#endif
