/*
 * Two e4m3 numbers become fp16, bit for bit as the hardware does it from compute capability 8.9 on
 * (NaN of either sign is 0x7fff), in a few integer operations and a product, for GPUs before that.
 * e4m3's bits, a place further left, are those of an fp16 number 256 times as small, so:
 *
 *     small = ts_fp8_small_halves(x);
 *     halves = ts_fp8_halves(small, both halves of small times 256);
 *
 * The product is exact. Plain C: test_numbers has all 65536 pairs.
 */
#ifndef TS_GPU_FP8_HALVES_H
#define TS_GPU_FP8_HALVES_H

#include <stdint.h>

#ifdef __CUDACC__
#define TS_FP8_FUNCTION __host__ __device__ static inline
#else
#define TS_FP8_FUNCTION static inline
#endif

/* Those of the numbers in x's bytes 0 and 1, over 256; NaN becomes 1.875. */
TS_FP8_FUNCTION uint32_t ts_fp8_small_halves(uint32_t x)
{
    uint32_t upper = (x & 0xffu) << 8 | (x & 0xff00u) << 16; /* each the upper byte of its half */
    return (upper & 0x80008000u) | (upper >> 1 & 0x3f803f80u);
}

/* times_256: what the product came to, in which NaN is 480. */
TS_FP8_FUNCTION uint32_t ts_fp8_halves(uint32_t small, uint32_t times_256)
{
    uint32_t nan = ((small & 0x3f803f80u) + 0x00800080u) & 0x40004000u; /* no other gets so far */
    uint32_t sign = nan << 1;
    return (times_256 & ~sign) | (sign - (nan >> 14));
}

#endif
