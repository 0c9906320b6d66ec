/*
 * Numbers of the cache's types, to and from fp32.
 */
#ifndef TS_CONVERT_H
#define TS_CONVERT_H

#include "tinyserve_types.h"

#include <stddef.h>
#include <stdint.h>

/* Conversions with round-to-nearest-even, as IEEE 754 and bfloat16 have it; NaN stays NaN. fp8 is
 * e4m3 as the OCP 8-bit floating point specification has it; beyond 448 lies 448. */
uint16_t ts_fp32_to_fp16(float value);
uint16_t ts_fp32_to_bf16(float value);
float ts_fp16_to_fp32(uint16_t bits);
float ts_bf16_to_fp32(uint16_t bits);
uint8_t ts_fp32_to_fp8(float value);
float ts_fp8_to_fp32(uint8_t bits);

/* `count` elements from element `first` of an array of any type, to and from fp32. */
void ts_load_elements(const void *from, ts_dtype dtype, size_t first, uint32_t count, float *to);
void ts_store_elements(void *to, ts_dtype dtype, size_t first, uint32_t count, const float *from);

static inline float ts_element(const void *array, ts_dtype dtype, size_t i)
{
    float x;
    ts_load_elements(array, dtype, i, 1, &x);
    return x;
}

#endif
