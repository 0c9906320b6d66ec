/* fp16, bf16 and fp8 to and from fp32, one value at a time, in integer arithmetic. */
#include "convert.h"

#include <string.h>

static uint32_t bits_of(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static float float_of(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

uint16_t ts_fp32_to_bf16(float value)
{
    uint32_t u = bits_of(value);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((u >> 16) | 0x40u); /* quiet NaN */
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

float ts_bf16_to_fp32(uint16_t bits)
{
    return float_of((uint32_t)bits << 16);
}

uint16_t ts_fp32_to_fp16(float value)
{
    uint32_t u = bits_of(value);
    uint32_t sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u);
    if (u >= 0x477ff000u) /* 65520 and more round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    if (u < 0x38800000u) { /* below 2^-14: the adder rounds it to a multiple of 2^-24 */
        uint32_t m = bits_of(float_of(u) + 0.5f) - bits_of(0.5f);
        return (uint16_t)(sign | m);
    }
    u += 0xfffu + ((u >> 13) & 1u);
    return (uint16_t)(sign | ((u - 0x38000000u) >> 13));
}

float ts_fp16_to_fp32(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000u) << 16;
    uint32_t u = (uint32_t)(bits & 0x7fffu) << 13;
    if (u >= 0x0f800000u) /* infinity and NaN */
        return float_of(sign | (u + 0x70000000u));
    if (u < 0x00800000u) /* zero and subnormal: let the adder normalise */
        return float_of(sign | bits_of(float_of(u + 0x38800000u) - 6.103515625e-05f));
    return float_of(sign | (u + 0x38000000u));
}

uint8_t ts_fp32_to_fp8(float value)
{
    uint32_t u = bits_of(value), sign = u >> 24 & 0x80u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u)
        return (uint8_t)(sign | 0x7fu);
    if (u >= 0x43e80000u) /* 464, half way past 448, and more */
        return (uint8_t)(sign | 0x7eu);
    if (u < 0x3c800000u) /* below 2^-6: the adder rounds it to a multiple of 2^-9 */
        return (uint8_t)(sign | (bits_of(float_of(u) + 16384.0f) - bits_of(16384.0f)));
    u += 0x7ffffu + (u >> 20 & 1u);
    return (uint8_t)(sign | ((u - 0x3c000000u) >> 20));
}

float ts_fp8_to_fp32(uint8_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x80u) << 24, u = (uint32_t)(bits & 0x7fu) << 20;
    if (u == 0x07f00000u)
        return float_of(sign | 0x7fc00000u);
    if (u < 0x00800000u) /* zero and subnormal: let the adder normalise */
        return float_of(sign | bits_of(float_of(u + 0x3c800000u) - 0.015625f));
    return float_of(sign | (u + 0x3c000000u));
}

void ts_load_elements(const void *from, ts_dtype dtype, size_t first, uint32_t count, float *to)
{
    const uint16_t *halves = (const uint16_t *)from + first;
    switch (dtype) {
    case TS_DTYPE_FP32:
        memcpy(to, (const float *)from + first, count * sizeof *to);
        break;
    case TS_DTYPE_FP16:
        for (uint32_t i = 0; i < count; i++)
            to[i] = ts_fp16_to_fp32(halves[i]);
        break;
    case TS_DTYPE_BF16:
        for (uint32_t i = 0; i < count; i++)
            to[i] = ts_bf16_to_fp32(halves[i]);
        break;
    case TS_DTYPE_FP8_E4M3:
        for (uint32_t i = 0; i < count; i++)
            to[i] = ts_fp8_to_fp32(((const uint8_t *)from)[first + i]);
        break;
    }
}

void ts_store_elements(void *to, ts_dtype dtype, size_t first, uint32_t count, const float *from)
{
    uint16_t *halves = (uint16_t *)to + first;
    switch (dtype) {
    case TS_DTYPE_FP32:
        memcpy((float *)to + first, from, count * sizeof *from);
        break;
    case TS_DTYPE_FP16:
        for (uint32_t i = 0; i < count; i++)
            halves[i] = ts_fp32_to_fp16(from[i]);
        break;
    case TS_DTYPE_BF16:
        for (uint32_t i = 0; i < count; i++)
            halves[i] = ts_fp32_to_bf16(from[i]);
        break;
    case TS_DTYPE_FP8_E4M3:
        for (uint32_t i = 0; i < count; i++)
            ((uint8_t *)to)[first + i] = ts_fp32_to_fp8(from[i]);
        break;
    }
}
