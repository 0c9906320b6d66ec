#include "attention_amx.h"

#include <immintrin.h>
#include <stdalign.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#define TILE 1024                                 /* bytes: 16 rows of 64 */
#define SPLITS 3                                  /* a float is the sum of three bf16 numbers */
#define WEIGHTS_BYTES (SPLITS * TS_AMX_ROWS * 64) /* of a tile of weights */

/* Numbers of the tile registers, which instructions have in them. */
#define SCORES_0 0 /* [token][split][row], fp32, of 16 tokens */
#define SCORES_1 1
#define KEYS 2      /* [token][32 dims] */
#define OPERAND 3   /* [16 pairs][16 columns][2]: q, then V */
#define WEIGHTS_0 4 /* [split][row][16 pairs][2] of the first 32 tokens */
#define WEIGHTS_1 5
#define OUT_0 6 /* [split][row][16 dims], fp32 */
#define OUT_1 7

/* The instructions; the compilers' own functions for them don't all say that they read memory. */
#define NAME(tile) NAME_(tile)
#define NAME_(tile) "%%tmm" #tile
#define TILE_ZERO(tile) __asm__ volatile("tilezero " NAME(tile)::)
#define TILE_LOAD(tile, from)                                                                      \
    __asm__ volatile("tileloadd (%0,%1,1), " NAME(tile)::"r"(from), "r"(64L) : "memory")
#define TILE_STORE(tile, to)                                                                       \
    __asm__ volatile("tilestored " NAME(tile) ", (%0,%1,1)" ::"r"(to), "r"(64L) : "memory")
#define TILE_MULTIPLY(sums, a, b)                                                                  \
    __asm__ volatile("tdpbf16ps " NAME(b) ", " NAME(a) ", " NAME(sums)::)

void ts_amx_begin(ts_amx_work *work)
{
    alignas(64) unsigned char config[64] = {1};
    static const unsigned char rows[8] = {
        [SCORES_0] = 16,  [SCORES_1] = 16,  [KEYS] = 16,  [OPERAND] = 16,
        [WEIGHTS_0] = 12, [WEIGHTS_1] = 12, [OUT_0] = 12, [OUT_1] = 12};
    for (int i = 0; i < 8; i++)
        config[16 + 2 * i] = 64;
    memcpy(config + 48, rows, sizeof rows);
    __asm__ volatile("ldtilecfg (%0)" ::"r"(config) : "memory");
    for (uint32_t i = 0; i < 128; i++) {
        uint16_t wide = ts_fp32_to_bf16(ts_fp8_to_fp32((uint8_t)i) / 256);
        work->low[i] = (unsigned char)wide;
        work->high[i] = (unsigned char)(wide >> 8);
    }
}

void ts_amx_end(void)
{
    __asm__ volatile("tilerelease");
}

/* The upper halves of a, which are bf16, and of b, in turns; what they leave of a and b remains. */
INLINE __m512i split(__m512 *a, __m512 *b)
{
    const __m512i mask = _mm512_set1_epi32((int)0xffff0000u);
    __m512i x = _mm512_and_si512((__m512i)*a, mask), y = _mm512_and_si512((__m512i)*b, mask);
    *a -= (__m512)x;
    *b -= (__m512)y;
    return _mm512_or_si512(_mm512_srli_epi32(x, 16), y);
}

void ts_amx_load_queries(const float *q, uint32_t rows, uint32_t padded, uint32_t head_dim,
                         void *q_tiles)
{
    memset(q_tiles, 0, ts_amx_chunk_bytes(head_dim));
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; i < head_dim / 32; i++) {
            /* Pair k of 32 dims, of which widening puts 8 into one tile and 8 into the next. */
            const float *row = q + r * padded + i / 2 * 64 + i % 2 * 16;
            __m512 even = _mm512_loadu_ps(row), odd = _mm512_loadu_ps(row + 32);
            for (uint32_t s = 0; s < SPLITS; s++) {
                alignas(64) uint32_t pairs[16];
                _mm512_store_si512(pairs, split(&even, &odd));
                for (uint32_t k = 0; k < 16; k++) {
                    uint32_t tile = i / 2 * 2 + k / 4 % 2, place = i % 2 * 8 + k / 8 * 4 + k % 4;
                    memcpy((char *)q_tiles + tile * TILE + place * 64 + (s * TS_AMX_ROWS + r) * 4,
                           &pairs[k], 4);
                }
            }
        }
}

typedef struct widening {
    __m512i low[2], high[2];
} widening;

INLINE widening load_widening(const ts_amx_work *work)
{
    widening w;
    for (int i = 0; i < 2; i++) {
        w.low[i] = _mm512_load_si512(work->low + i * 64);
        w.high[i] = _mm512_load_si512(work->high + i * 64);
    }
    return w;
}

/* 64 elements to bf16, of each 16 bytes the first 8 to `first`, the others to `second`. */
INLINE void widen(widening w, __m512i x, void *first, void *second)
{
    __m512i low = _mm512_permutex2var_epi8(w.low[0], x, w.low[1]);
    __m512i high = _mm512_permutex2var_epi8(w.high[0], x, w.high[1]);
    high = _mm512_ternarylogic_epi32(high, x, _mm512_set1_epi8((char)0x80), 0xf8); /* the sign */
    _mm512_store_si512(first, _mm512_unpacklo_epi8(low, high));
    _mm512_store_si512(second, _mm512_unpackhi_epi8(low, high));
}

/* What is widened at a time: keys of 32 tokens, [2][head_dim / 32] tiles, or 64 dims of values,
 * [2][4] tiles, from 32 rows, or from 32 pairs of rows. */
typedef enum unit_kind { NOTHING, KEYS_OF_32, DIMS_OF_64 } unit_kind;
#define UNIT_ROWS 32u

typedef struct unit {
    const ts_amx_rows *rows;
    uint32_t from; /* the first token, the first dim */
    char *to;
} unit;

/* Rows first..end - 1 of a unit. */
INLINE void widen_unit(unit_kind kind, widening w, unit u, uint32_t head_dim, uint32_t first,
                       uint32_t end, ts_streams *next)
{
    if (kind == KEYS_OF_32)
        _Pragma("GCC unroll 8") for (uint32_t t = first; t < end; t++)
        {
            char *to = u.to + t / 16 * (head_dim / 32) * TILE + t % 16 * 64;
            const unsigned char *row = u.rows->rows[u.from + t] + u.rows->offset;
            for (uint32_t d = 0; d < head_dim; d += 64, to += 2 * TILE)
                widen(w, _mm512_loadu_si512(row + d), to, to + TILE);
            for (uint32_t i = t * head_dim / 128; i < (t + 1) * head_dim / 128; i++)
                ts_streams_ask(next, i);
        }
    if (kind == DIMS_OF_64)
        _Pragma("GCC unroll 8") for (uint32_t t = first; t < end; t++)
        {
            /* A tile's row has tokens t and t + 16. */
            const unsigned char *const *rows = u.rows->rows + t / 16 * 32 + t % 16;
            const size_t offset = u.rows->offset + u.from;
            char *to = u.to + t / 16 * 4 * TILE + t % 16 * 64;
            __m512i x = _mm512_loadu_si512(rows[0] + offset);
            __m512i y = _mm512_loadu_si512(rows[16] + offset);
            widen(w, _mm512_unpacklo_epi8(x, y), to, to + TILE);
            widen(w, _mm512_unpackhi_epi8(x, y), to + 2 * TILE, to + 3 * TILE);
            ts_streams_ask(next, t);
        }
}

/* Four tokens' [split][row] become their sums over splits, [token][row]. */
INLINE __m512 add_splits(const float *tile)
{
    __m512 a = _mm512_load_ps(tile), b = _mm512_load_ps(tile + 16), c = _mm512_load_ps(tile + 32),
           d = _mm512_load_ps(tile + 48);
    __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44), cd = _mm512_shuffle_f32x4(c, d, 0x44);
    __m512 low = _mm512_shuffle_f32x4(_mm512_shuffle_f32x4(a, b, 0xee),
                                      _mm512_shuffle_f32x4(c, d, 0xee), 0x88);
    return _mm512_shuffle_f32x4(ab, cd, 0x88) + (_mm512_shuffle_f32x4(ab, cd, 0xdd) + low);
}

/* 16 tokens' [token][split][row] become [row][token], rows 64 floats apart. */
INLINE void store_scores(const float *sums, float *scores)
{
    const __m512i rows_01 =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i rows_23 = _mm512_add_epi32(rows_01, _mm512_set1_epi32(2));
    __m512 a = add_splits(sums), b = add_splits(sums + 64);
    __m512 c = add_splits(sums + 128), d = add_splits(sums + 192);
    __m512 ab = _mm512_permutex2var_ps(a, rows_01, b), cd = _mm512_permutex2var_ps(c, rows_01, d);
    _mm512_storeu_ps(scores, _mm512_shuffle_f32x4(ab, cd, 0x44));
    _mm512_storeu_ps(scores + 64, _mm512_shuffle_f32x4(ab, cd, 0xee));
    ab = _mm512_permutex2var_ps(a, rows_23, b);
    cd = _mm512_permutex2var_ps(c, rows_23, d);
    _mm512_storeu_ps(scores + 128, _mm512_shuffle_f32x4(ab, cd, 0x44));
    _mm512_storeu_ps(scores + 192, _mm512_shuffle_f32x4(ab, cd, 0xee));
}

/* Scores of one chunk of q with 32 tokens; `meanwhile` is widened between the products. */
INLINE void score_unit(const ts_amx_work *work, const char *keys, const char *q, uint32_t head_dim,
                       float *scores, unit_kind kind, unit meanwhile, ts_streams *next)
{
    const widening w = load_widening(work);
    const uint32_t tiles = head_dim / 32, rows = UNIT_ROWS / 2;
    alignas(64) float sums[2][16 * 16];
    TILE_ZERO(SCORES_0);
    TILE_ZERO(SCORES_1);
    _Pragma("GCC unroll 4") for (uint32_t i = 0; i < tiles; i++)
    {
        TILE_LOAD(OPERAND, q + i * TILE);
        TILE_LOAD(KEYS, keys + i * TILE);
        TILE_MULTIPLY(SCORES_0, KEYS, OPERAND);
        widen_unit(kind, w, meanwhile, head_dim, 2 * i * rows / tiles, (2 * i + 1) * rows / tiles,
                   next);
        TILE_LOAD(KEYS, keys + (tiles + i) * TILE);
        TILE_MULTIPLY(SCORES_1, KEYS, OPERAND);
        widen_unit(kind, w, meanwhile, head_dim, (2 * i + 1) * rows / tiles,
                   (2 * i + 2) * rows / tiles, next);
    }
    TILE_STORE(SCORES_0, sums[0]);
    TILE_STORE(SCORES_1, sums[1]);
    store_scores(sums[0], scores);
    store_scores(sums[1], scores + 16);
}

INLINE void score(ts_amx_work *work, const ts_amx_rows *k, const ts_amx_rows *v, const char *q,
                  uint32_t chunks, uint32_t head_dim, float *scores)
{
    char *first = work->units[work->turn], *second = work->units[work->turn ^ 1];
    const uint32_t chunk_tiles = head_dim / 32 * TILE;
    ts_streams next = *k->next;
    score_unit(work, first, q, head_dim, scores, KEYS_OF_32, (unit){k, 32, second}, &next);
    for (uint32_t c = 1; c < chunks; c++)
        score_unit(work, first, q + c * chunk_tiles, head_dim,
                   scores + c * TS_AMX_ROWS * TS_AMX_TOKENS, NOTHING, (unit){0}, &next);
    score_unit(work, second, q, head_dim, scores + 32, DIMS_OF_64, (unit){v, 0, first}, &next);
    for (uint32_t c = 1; c < chunks; c++)
        score_unit(work, second, q + c * chunk_tiles, head_dim,
                   scores + c * TS_AMX_ROWS * TS_AMX_TOKENS + 32, NOTHING, (unit){0}, &next);
    *k->next = next;
}

void ts_amx_split_weights(const float *weights, uint32_t chunks, void *weight_tiles)
{
    char *to = weight_tiles;
    for (; chunks > 0; chunks--, weights += TS_AMX_ROWS * TS_AMX_TOKENS)
        for (uint32_t i = 0; i < 2; i++, to += WEIGHTS_BYTES)
            for (uint32_t r = 0; r < TS_AMX_ROWS; r++) {
                __m512 a = _mm512_loadu_ps(weights + r * TS_AMX_TOKENS + i * 32);
                __m512 b = _mm512_loadu_ps(weights + r * TS_AMX_TOKENS + i * 32 + 16);
                for (uint32_t s = 0; s < SPLITS; s++)
                    _mm512_store_si512(to + (s * TS_AMX_ROWS + r) * 64, split(&a, &b));
            }
}

/* What comes after the first 64 dims of V: the next ones, or the next K. */
INLINE void widen_part(ts_amx_work *work, const ts_amx_rows *v, const ts_amx_rows *k,
                       uint32_t head_dim, uint32_t part)
{
    const widening w = load_widening(work);
    char *to = work->units[work->turn ^ 1];
    ts_streams next = *v->next;
    if (head_dim > 64)
        widen_unit(DIMS_OF_64, w, (unit){v, 64, to}, head_dim, part * 8, part * 8 + 8, &next);
    else if (k != NULL)
        widen_unit(KEYS_OF_32, w, (unit){k, 0, to}, head_dim, part * 8, part * 8 + 8, &next);
    *v->next = next;
}

/* One row's sums of a tile of OUT. */
INLINE __m512 out_row(const float *tile, uint32_t row)
{
    return _mm512_load_ps(tile + row * 16) + (_mm512_load_ps(tile + (TS_AMX_ROWS + row) * 16) +
                                              _mm512_load_ps(tile + (2 * TS_AMX_ROWS + row) * 16));
}

INLINE void add_to(float *acc, __m512 x)
{
    _mm512_storeu_ps(acc, _mm512_loadu_ps(acc) + x);
}

/* acc[r] += the sums of 64 dims: four tiles have 4 of each 16 in turns, and even and odd ones are
 * wanted apart. */
INLINE void add_out(const float (*sums)[WEIGHTS_BYTES / 4], uint32_t first, uint32_t end,
                    float *acc, uint32_t padded)
{
    const __m512i even =
        _mm512_setr_epi32(0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    for (uint32_t r = first; r < end; r++, acc += padded) {
        __m512 a = out_row(sums[0], r), b = out_row(sums[1], r);
        __m512 c = out_row(sums[2], r), d = out_row(sums[3], r);
        __m512 ab = _mm512_permutex2var_ps(a, even, b), cd = _mm512_permutex2var_ps(c, even, d);
        add_to(acc, _mm512_permutex2var_ps(ab, lower, cd));
        add_to(acc + 16, _mm512_permutex2var_ps(ab, upper, cd));
        ab = _mm512_permutex2var_ps(a, odd, b);
        cd = _mm512_permutex2var_ps(c, odd, d);
        add_to(acc + 32, _mm512_permutex2var_ps(ab, lower, cd));
        add_to(acc + 48, _mm512_permutex2var_ps(ab, upper, cd));
    }
}

/* The weights in the tile registers times 64 dims of V; rows from first_row on of `meanwhile` are
 * widened between the products. */
INLINE void weigh_unit(const ts_amx_work *work, const char *values,
                       float (*sums)[WEIGHTS_BYTES / 4], uint32_t head_dim, unit_kind kind,
                       unit meanwhile, uint32_t first_row, ts_streams *next)
{
    const widening w = load_widening(work);
    const uint32_t rows = (UNIT_ROWS - first_row) / 8; /* a product */
#define BETWEEN(product)                                                                           \
    widen_unit(kind, w, meanwhile, head_dim, first_row + (product)*rows,                           \
               first_row + ((product) + 1) * rows, next)
    for (uint32_t i = 0; i < 2; i++, values += 2 * TILE) {
        TILE_ZERO(OUT_0);
        TILE_ZERO(OUT_1);
        TILE_LOAD(OPERAND, values);
        TILE_MULTIPLY(OUT_0, WEIGHTS_0, OPERAND);
        BETWEEN(4 * i);
        TILE_LOAD(OPERAND, values + TILE);
        TILE_MULTIPLY(OUT_1, WEIGHTS_0, OPERAND);
        BETWEEN(4 * i + 1);
        TILE_LOAD(OPERAND, values + 4 * TILE);
        TILE_MULTIPLY(OUT_0, WEIGHTS_1, OPERAND);
        BETWEEN(4 * i + 2);
        TILE_LOAD(OPERAND, values + 5 * TILE);
        TILE_MULTIPLY(OUT_1, WEIGHTS_1, OPERAND);
        BETWEEN(4 * i + 3);
        TILE_STORE(OUT_0, sums[2 * i]);
        TILE_STORE(OUT_1, sums[2 * i + 1]);
    }
#undef BETWEEN
}

INLINE void weigh(ts_amx_work *work, const ts_amx_rows *v, const ts_amx_rows *k,
                  const void *weight_tiles, uint32_t first_row, uint32_t end_row, uint32_t head_dim,
                  float *acc, uint32_t padded)
{
    const uint32_t chunk = first_row / TS_AMX_ROWS, chunks = ts_amx_chunks(end_row);
    alignas(64) float sums[4][WEIGHTS_BYTES / 4];
    ts_streams next = *v->next;
    for (uint32_t d = 0; d < head_dim; d += 64) {
        const char *values = work->units[work->turn];
        char *to = work->units[work->turn ^ 1];
        for (uint32_t c = chunk; c < chunks; c++) {
            const uint32_t begin = c * TS_AMX_ROWS;
            const uint32_t first = first_row > begin ? first_row - begin : 0;
            const uint32_t end = end_row - begin < TS_AMX_ROWS ? end_row - begin : TS_AMX_ROWS;
            if (d == 0 || chunks - chunk > 1) {
                const char *tiles = (const char *)weight_tiles + c * 2 * WEIGHTS_BYTES;
                TILE_LOAD(WEIGHTS_0, tiles);
                TILE_LOAD(WEIGHTS_1, tiles + WEIGHTS_BYTES);
            }
            if (c > chunk || (d + 64 == head_dim && k == NULL))
                weigh_unit(work, values, sums, head_dim, NOTHING, (unit){0}, 0, &next);
            else if (d + 64 == head_dim)
                weigh_unit(work, values, sums, head_dim, KEYS_OF_32, (unit){k, 0, to},
                           head_dim == 64 ? UNIT_ROWS / 2 : 0, &next);
            else if (d == 0)
                weigh_unit(work, values, sums, head_dim, DIMS_OF_64, (unit){v, 64, to},
                           UNIT_ROWS / 2, &next);
            else
                weigh_unit(work, values, sums, head_dim, DIMS_OF_64, (unit){v, d + 64, to}, 0,
                           &next);
            add_out(sums, first, end, acc + (size_t)(begin + first) * padded + d, padded);
        }
        work->turn ^= 1;
    }
    *v->next = next;
}

/* head_dim is a constant in each. */
#define FOR_HEAD_DIM(call)                                                                         \
    switch (head_dim) {                                                                            \
    case 64:                                                                                       \
        call(64);                                                                                  \
        break;                                                                                     \
    case 128:                                                                                      \
        call(128);                                                                                 \
        break;                                                                                     \
    case 192:                                                                                      \
        call(192);                                                                                 \
        break;                                                                                     \
    default:                                                                                       \
        call(256);                                                                                 \
    }

void ts_amx_widen_first(ts_amx_work *work, const ts_amx_rows *k, uint32_t head_dim)
{
    ts_streams next = *k->next;
    work->turn = 0;
    widen_unit(KEYS_OF_32, load_widening(work), (unit){k, 0, work->units[0]}, head_dim, 0,
               UNIT_ROWS, &next);
    *k->next = next;
}

void ts_amx_score(ts_amx_work *work, const ts_amx_rows *k, const ts_amx_rows *v,
                  const void *q_tiles, uint32_t chunks, uint32_t head_dim, float *scores)
{
#define CALL(dim) score(work, k, v, q_tiles, chunks, dim, scores)
    FOR_HEAD_DIM(CALL)
#undef CALL
}

void ts_amx_widen_part(ts_amx_work *work, const ts_amx_rows *v, const ts_amx_rows *k,
                       uint32_t head_dim, uint32_t part)
{
#define CALL(dim) widen_part(work, v, k, dim, part)
    FOR_HEAD_DIM(CALL)
#undef CALL
}

void ts_amx_weigh(ts_amx_work *work, const ts_amx_rows *v, const ts_amx_rows *k,
                  const void *weight_tiles, uint32_t first_row, uint32_t end_row, uint32_t head_dim,
                  float *acc, uint32_t padded)
{
#define CALL(dim) weigh(work, v, k, weight_tiles, first_row, end_row, dim, acc, padded)
    FOR_HEAD_DIM(CALL)
#undef CALL
}
