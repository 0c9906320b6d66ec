/*
 * Units of K and V for attention_amx.c: what is widened at a time, from rows of the cache into
 * tiles in memory. The cache's type, the kind of unit and head_dim are constants where these are
 * used.
 */
#ifndef TS_ATTENTION_AMX_UNITS_H
#define TS_ATTENTION_AMX_UNITS_H

#include "attention_amx.h"
#include "fp8_bytes.h"

/* Copies in which constants are folded are fast, and slow to compile. Where tests run the code, one
 * copy of each function will do: TS_COMPACT. */
#ifdef TS_COMPACT
#define INLINE static __attribute__((unused))
#else
#define INLINE static inline __attribute__((always_inline))
#endif

#define TILE 1024 /* bytes: 16 rows of 64 */

/* 64 elements of fp8 to bf16, of each 16 the first 8 to `first`, the others to `second`. */
INLINE void widen(ts_fp8_tables tables, __m512i x, void *first, void *second)
{
    __m512i a, b;
    ts_fp8_widen(tables, x, &a, &b);
    _mm512_store_si512(first, a);
    _mm512_store_si512(second, b);
}

/* Pairs of a's and b's even elements, and of the odd ones; not by unpacking, as that takes the port
 * that look-ups take. */
INLINE void pair(__m512i a, __m512i b, __m512i *even, __m512i *odd)
{
    const __m512i lower = _mm512_set1_epi16(0xff);
    *even = _mm512_ternarylogic_epi32(a, _mm512_slli_epi16(b, 8), lower, 0xe4);
    *odd = _mm512_ternarylogic_epi32(_mm512_srli_epi16(a, 8), b, lower, 0xe4);
}

/* What is widened at a time: keys of 16 tokens, [head_dim / 32] tiles, or 64 dims of values of 32
 * tokens, [4] tiles, from 16 rows, or from 16 pairs of rows. */
typedef enum unit_kind { NOTHING, KEYS_OF_16, VALUES_OF_32 } unit_kind;
#define UNIT_ROWS 16u
#define UNIT_KEYS 16u
#define UNIT_VALUES 32u

typedef struct unit {
    const unsigned char *const *rows;
    size_t offset;
    char *to;
} unit;

static inline uint32_t keys_bytes(uint32_t head_dim)
{
    return head_dim / 32 * TILE;
}
#define VALUES_BYTES (4u * TILE)

/* Where the second of two units lies, which may be of either kind. */
static inline char *second_unit(ts_amx_work *work, uint32_t head_dim)
{
    return work->units + (head_dim > 128 ? keys_bytes(head_dim) : VALUES_BYTES);
}

static inline unit keys_unit(const ts_amx_rows *k, uint32_t token, char *to)
{
    return (unit){k->rows + token, k->offset, to};
}

INLINE unit values_unit(ts_dtype dtype, const ts_amx_rows *v, uint32_t token, uint32_t dim,
                        char *to)
{
    return (unit){v->rows + token, v->offset + dim * ts_dtype_bytes(dtype), to};
}

/* The lines of a unit's rows first..end - 1, loaded some time before they are widened. */
typedef struct lines {
    __m512i x[16];
} lines;
#define LINES_AHEAD 8 /* lines that are loaded ahead, at most: there are 32 registers */

INLINE uint32_t lines_of(ts_dtype dtype, unit_kind kind, uint32_t head_dim, uint32_t rows)
{
    const uint32_t bytes = (uint32_t)ts_dtype_bytes(dtype);
    return kind == KEYS_OF_16 ? rows * head_dim * bytes / 64 : rows * 2 * bytes;
}

INLINE lines load_lines(ts_dtype dtype, unit_kind kind, unit u, uint32_t head_dim, uint32_t first,
                        uint32_t end)
{
    const uint32_t bytes = (uint32_t)ts_dtype_bytes(dtype);
    lines l;
    uint32_t n = 0;
    if (kind == KEYS_OF_16)
        _Pragma("GCC unroll 16") for (uint32_t t = first; t < end; t++)
            _Pragma("GCC unroll 8") for (uint32_t b = 0; b < head_dim * bytes; b += 64)
                l.x[n++] = _mm512_loadu_si512(u.rows[t] + u.offset + b);
    if (kind == VALUES_OF_32) /* a tile's row has tokens t and t + 16 */
        _Pragma("GCC unroll 16") for (uint32_t t = first; t < end; t++)
            _Pragma("GCC unroll 2") for (uint32_t b = 0; b < 64 * bytes; b += 64)
        {
            l.x[n++] = _mm512_loadu_si512(u.rows[t] + u.offset + b);
            l.x[n++] = _mm512_loadu_si512(u.rows[t + 16] + u.offset + b);
        }
    return l;
}

/* 32 dims of 2 tokens, of each 8 dims the first 4 to `first`, the others to `second`. */
INLINE void interleave(__m512i x, __m512i y, void *first, void *second)
{
    _mm512_store_si512(first, _mm512_unpacklo_epi16(x, y));
    _mm512_store_si512(second, _mm512_unpackhi_epi16(x, y));
}

/* Asks for what comes next, as many lines as row t of a unit was made of. */
INLINE void ask(ts_streams *next, uint32_t t, uint32_t bytes)
{
    for (uint32_t i = t * bytes / 128; i < (t + 1) * bytes / 128; i++)
        ts_streams_ask(next, i);
}

INLINE void widen_lines(ts_dtype dtype, unit_kind kind, ts_fp8_tables w, lines l, unit u,
                        uint32_t head_dim, uint32_t first, uint32_t end, ts_streams *next)
{
    const uint32_t bytes = (uint32_t)ts_dtype_bytes(dtype);
    uint32_t n = 0;
    if (kind == KEYS_OF_16)
        _Pragma("GCC unroll 16") for (uint32_t t = first; t < end; t++)
        {
            char *to = u.to + t * 64;
            _Pragma("GCC unroll 8") for (uint32_t d = 0; d < head_dim; d += 64, to += 2 * TILE)
            {
                if (dtype == TS_DTYPE_BF16) {
                    _mm512_store_si512(to, l.x[n++]);
                    _mm512_store_si512(to + TILE, l.x[n++]);
                } else
                    widen(w, l.x[n++], to, to + TILE);
            }
            ask(next, t, head_dim * bytes);
        }
    if (kind == VALUES_OF_32)
        _Pragma("GCC unroll 16") for (uint32_t t = first; t < end; t++)
        {
            char *to = u.to + t * 64;
            if (dtype == TS_DTYPE_BF16) {
                interleave(l.x[n], l.x[n + 1], to, to + TILE);
                interleave(l.x[n + 2], l.x[n + 3], to + 2 * TILE, to + 3 * TILE);
                n += 4;
            } else {
                __m512i even, odd;
                pair(l.x[n], l.x[n + 1], &even, &odd);
                widen(w, even, to, to + TILE);
                widen(w, odd, to + 2 * TILE, to + 3 * TILE);
                n += 2;
            }
            ask(next, t, 128 * bytes);
        }
}

/* Rows first..end - 1 of a unit. */
INLINE void widen_unit(ts_dtype dtype, unit_kind kind, ts_fp8_tables w, unit u, uint32_t head_dim,
                       uint32_t first, uint32_t end, ts_streams *next)
{
    _Pragma("GCC unroll 16") for (uint32_t t = first; t < end; t++)
        widen_lines(dtype, kind, w, load_lines(dtype, kind, u, head_dim, t, t + 1), u, head_dim, t,
                    t + 1, next);
}

/* Step `i` of the `steps` in which a unit is widened. If its lines are few, they were loaded in the
 * step before, as those of the next step are in this one. */
INLINE void widen_step(ts_dtype dtype, unit_kind kind, ts_fp8_tables w, lines *ahead, unit u,
                       uint32_t head_dim, uint32_t i, uint32_t steps, ts_streams *next)
{
    const uint32_t first = i * UNIT_ROWS / steps, end = (i + 1) * UNIT_ROWS / steps;
    const uint32_t then = (i + 2) * UNIT_ROWS / steps; /* of the next step */
    const bool few = lines_of(dtype, kind, head_dim, UNIT_ROWS) <= LINES_AHEAD * steps;
    lines l = few ? *ahead : load_lines(dtype, kind, u, head_dim, first, end);
    if (few && i + 1 < steps)
        *ahead = load_lines(dtype, kind, u, head_dim, end, then);
    widen_lines(dtype, kind, w, l, u, head_dim, first, end, next);
}

INLINE lines first_lines(ts_dtype dtype, unit_kind kind, unit u, uint32_t head_dim, uint32_t steps)
{
    if (lines_of(dtype, kind, head_dim, UNIT_ROWS) > LINES_AHEAD * steps)
        return (lines){0};
    return load_lines(dtype, kind, u, head_dim, 0, UNIT_ROWS / steps);
}

#endif
