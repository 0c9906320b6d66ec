/*
 * e4m3's magnitudes, over 256, as bf16, which has all of them exactly: tables of the lower and of
 * the upper bytes, for look-ups by AVX-512's byte permutations (VBMI).
 */
#ifndef TS_FP8_BYTES_H
#define TS_FP8_BYTES_H

#include <immintrin.h>

/* By magnitude: 0, the subnormals 1..7 times 2^-9, NaN, the others. */
#define TS_FP8_AS_BF16(i)                                                                          \
    ((i) == 0     ? 0                                                                              \
     : (i) == 1   ? 110 << 7                                                                       \
     : (i) < 4    ? 111 << 7 | (i) % 2 << 6                                                        \
     : (i) < 8    ? 112 << 7 | (i) % 4 << 5                                                        \
     : (i) == 127 ? 0x7fc0                                                                         \
                  : ((i) / 8 + 112) << 7 | (i) % 8 << 4)
#define TS_FP8_LOW(i) TS_FP8_AS_BF16(i) & 0xff
#define TS_FP8_HIGH(i) TS_FP8_AS_BF16(i) >> 8
#define TS_FP8_4(f, i) f(i), f((i) + 1), f((i) + 2), f((i) + 3)
#define TS_FP8_16(f, i)                                                                            \
    TS_FP8_4(f, i), TS_FP8_4(f, (i) + 4), TS_FP8_4(f, (i) + 8), TS_FP8_4(f, (i) + 12)
#define TS_FP8_64(f, i)                                                                            \
    TS_FP8_16(f, i), TS_FP8_16(f, (i) + 16), TS_FP8_16(f, (i) + 32), TS_FP8_16(f, (i) + 48)

static const _Alignas(64) unsigned char ts_fp8_low[2][64] = {{TS_FP8_64(TS_FP8_LOW, 0)},
                                                             {TS_FP8_64(TS_FP8_LOW, 64)}};
static const _Alignas(64) unsigned char ts_fp8_high[2][64] = {{TS_FP8_64(TS_FP8_HIGH, 0)},
                                                              {TS_FP8_64(TS_FP8_HIGH, 64)}};

typedef struct ts_fp8_tables {
    __m512i low[2], high[2];
} ts_fp8_tables;

static inline __attribute__((always_inline)) ts_fp8_tables ts_fp8_load_tables(void)
{
    return (ts_fp8_tables){{_mm512_load_si512(ts_fp8_low[0]), _mm512_load_si512(ts_fp8_low[1])},
                           {_mm512_load_si512(ts_fp8_high[0]), _mm512_load_si512(ts_fp8_high[1])}};
}

/* 64 elements to bf16, of each 16 the first 8 to *first, the others to *second. */
static inline __attribute__((always_inline)) void ts_fp8_widen(ts_fp8_tables t, __m512i x,
                                                               __m512i *first, __m512i *second)
{
    __m512i low = _mm512_permutex2var_epi8(t.low[0], x, t.low[1]);
    __m512i high = _mm512_permutex2var_epi8(t.high[0], x, t.high[1]);
    high = _mm512_ternarylogic_epi32(high, x, _mm512_set1_epi8((char)0x80), 0xf8); /* the sign */
    *first = _mm512_unpacklo_epi8(low, high);
    *second = _mm512_unpackhi_epi8(low, high);
}

#endif
