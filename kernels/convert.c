/* fp16 and bf16 to and from fp32, one value at a time, in integer arithmetic. */
#include "attention.h"

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
