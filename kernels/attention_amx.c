#include "attention_amx.h"

#include <immintrin.h>
#include <stdalign.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#define TILE 1024 /* bytes: 16 rows of 64 */
#define SPLITS 3  /* a float is the sum of three bf16 numbers */

/* Numbers of the tile registers, which instructions have in them. */
#define SCORES 0    /* [token][split][row], fp32 */
#define KEYS 1      /* [token][32 dims] */
#define OPERAND 2   /* [16 pairs][16 columns][2]: q, then V */
#define WEIGHTS_0 3 /* [split][row][16 pairs][2] of the first 32 tokens */
#define WEIGHTS_1 4
#define OUT_0 5 /* [split][row][16 dims], fp32 */
#define OUT_1 6

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

/* bf16 of e4m3's magnitudes over 2^8 (FP8_UNIT): the low bytes, then the high bytes. */
static alignas(64) const unsigned char widened[2][128] = {
#define LOW_ROW(e) (e) % 2 * 128
#define LOW(e)                                                                                     \
    LOW_ROW(e), LOW_ROW(e) + 16, LOW_ROW(e) + 32, LOW_ROW(e) + 48, LOW_ROW(e) + 64,                \
        LOW_ROW(e) + 80, LOW_ROW(e) + 96, LOW_ROW(e) + 112
#define HIGH(e)                                                                                    \
    ((e) + 112) / 2, ((e) + 112) / 2, ((e) + 112) / 2, ((e) + 112) / 2, ((e) + 112) / 2,           \
        ((e) + 112) / 2, ((e) + 112) / 2, ((e) + 112) / 2
    {0,       0x00,    0x80,   0xc0,   0x00,   0x20,   0x40,   0x60,    LOW(1),  LOW(2),
     LOW(3),  LOW(4),  LOW(5), LOW(6), LOW(7), LOW(8), LOW(9), LOW(10), LOW(11), LOW(12),
     LOW(13), LOW(14), 0x80,   0x90,   0xa0,   0xb0,   0xc0,   0xd0,    0xe0,    0xc0},
    {0,        55,       55,      55,      56,      56,      56,      56,       HIGH(1),  HIGH(2),
     HIGH(3),  HIGH(4),  HIGH(5), HIGH(6), HIGH(7), HIGH(8), HIGH(9), HIGH(10), HIGH(11), HIGH(12),
     HIGH(13), HIGH(14), 63,      63,      63,      63,      63,      63,       63,       0x7f},
};

void ts_amx_begin(void)
{
    alignas(64) unsigned char config[64] = {1};
    static const unsigned char rows[8] = {
        [SCORES] = 16,    [KEYS] = 16,  [OPERAND] = 16, [WEIGHTS_0] = 12,
        [WEIGHTS_1] = 12, [OUT_0] = 12, [OUT_1] = 12};
    for (int i = 0; i < 8; i++)
        config[16 + 2 * i] = rows[i] > 0 ? 64 : 0;
    memcpy(config + 48, rows, sizeof rows);
    __asm__ volatile("ldtilecfg (%0)" ::"r"(config) : "memory");
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
    memset(q_tiles, 0, ts_amx_rows_bytes(head_dim));
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; i < head_dim / 32; i++) {
            /* Pair k of 32 dims, of which widen_k puts 8 into one tile and 8 into the next. */
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

INLINE widening load_widening(void)
{
    widening w;
    for (int i = 0; i < 2; i++) {
        w.low[i] = _mm512_load_si512(widened[0] + i * 64);
        w.high[i] = _mm512_load_si512(widened[1] + i * 64);
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

INLINE void widen_k_row(widening w, const ts_amx_rows *k, uint32_t head_dim, uint32_t t,
                        ts_streams *next)
{
    char *to = (char *)k->tiles + t / 16 * (head_dim / 32) * TILE + t % 16 * 64;
    for (uint32_t d = 0; d < head_dim; d += 64, to += 2 * TILE)
        widen(w, _mm512_loadu_si512(k->rows[t] + k->offset + d), to, to + TILE);
    for (uint32_t i = t * head_dim / 128; i < (t + 1) * head_dim / 128; i++)
        ts_streams_ask(next, i);
}

/* Rows 2 * t and 2 * t + 1, of those that a tile has. */
INLINE void widen_v_rows(widening w, const ts_amx_rows *v, uint32_t head_dim, uint32_t t,
                         ts_streams *next)
{
    /* A tile's row has tokens t and t + 16. */
    const uint32_t token = t / 16 * 32 + t % 16;
    const unsigned char *a = v->rows[token] + v->offset, *b = v->rows[token + 16] + v->offset;
    char *to = (char *)v->tiles + t / 16 * (head_dim / 16) * TILE + t % 16 * 64;
    for (uint32_t d = 0; d < head_dim; d += 64, to += 4 * TILE) {
        __m512i x = _mm512_loadu_si512(a + d), y = _mm512_loadu_si512(b + d);
        widen(w, _mm512_unpacklo_epi8(x, y), to, to + TILE);
        widen(w, _mm512_unpackhi_epi8(x, y), to + 2 * TILE, to + 3 * TILE);
    }
    for (uint32_t i = 0; i < head_dim / 64; i++)
        ts_streams_ask(next, t * (head_dim / 64) + i);
}

INLINE void widen_k(const ts_amx_rows *k, uint32_t head_dim)
{
    const widening w = load_widening();
    ts_streams next = *k->next;
    _Pragma("GCC unroll 8") for (uint32_t t = 0; t < TS_AMX_TOKENS; t++)
        widen_k_row(w, k, head_dim, t, &next);
    *k->next = next;
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

INLINE void score(const void *k_tiles, const void *q_tiles, uint32_t head_dim, float *scores,
                  const ts_amx_rows *v)
{
    const widening w = load_widening();
    const uint32_t tiles = head_dim / 32;
    ts_streams next = v != NULL ? *v->next : (ts_streams){0};
    alignas(64) float sums[2][16 * 16];
    for (uint32_t t = 0; t < TS_AMX_TOKENS / 16; t++) {
        const char *k = (const char *)k_tiles + t * tiles * TILE;
        TILE_ZERO(SCORES);
        _Pragma("GCC unroll 8") for (uint32_t i = 0; i < 8; i++)
        {
            if (v != NULL)
                widen_v_rows(w, v, head_dim, t * 8 + i, &next);
            for (uint32_t j = i * tiles / 8; j < (i + 1) * tiles / 8; j++) {
                TILE_LOAD(KEYS, k + j * TILE);
                TILE_LOAD(OPERAND, (const char *)q_tiles + j * TILE);
                TILE_MULTIPLY(SCORES, KEYS, OPERAND);
            }
        }
        TILE_STORE(SCORES, sums[t % 2]);
        if (t > 0)
            store_scores(sums[(t - 1) % 2], scores + (t - 1) * 16);
    }
    store_scores(sums[1], scores + 48);
    if (v != NULL)
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
INLINE void add_out(const float (*sums)[SPLITS * TS_AMX_ROWS * 16], uint32_t first, uint32_t end,
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

INLINE void weigh(const void *v_tiles, const float *weights, uint32_t first_row, uint32_t end_row,
                  uint32_t head_dim, float *acc, uint32_t padded, const ts_amx_rows *k)
{
    alignas(64) unsigned char tiles[2][SPLITS * TS_AMX_ROWS * 64];
    for (uint32_t r = 0; r < TS_AMX_ROWS; r++)
        for (uint32_t i = 0; i < 2; i++) {
            __m512 a = _mm512_loadu_ps(weights + r * 64 + i * 32);
            __m512 b = _mm512_loadu_ps(weights + r * 64 + i * 32 + 16);
            for (uint32_t s = 0; s < SPLITS; s++)
                _mm512_store_si512(tiles[i] + (s * TS_AMX_ROWS + r) * 64, split(&a, &b));
        }
    TILE_LOAD(WEIGHTS_0, tiles[0]);
    TILE_LOAD(WEIGHTS_1, tiles[1]);

    const widening w = load_widening();
    ts_streams next = k != NULL ? *k->next : (ts_streams){0};
    /* K's rows are widened between the products, of which there are head_dim / 8. */
#define BETWEEN(product)                                                                           \
    for (uint32_t t = (d / 8 + (product)) * 512 / head_dim;                                        \
         k != NULL && t < (d / 8 + (product) + 1) * 512 / head_dim; t++)                           \
    widen_k_row(w, k, head_dim, t, &next)
    const char *first = v_tiles, *second = first + head_dim / 16 * TILE;
    alignas(64) float sums[2][4][SPLITS * TS_AMX_ROWS * 16];
    for (uint32_t d = 0; d < head_dim; d += 64) {
        _Pragma("GCC unroll 2") for (uint32_t i = 0; i < 4;
                                     i += 2, first += 2 * TILE, second += 2 * TILE)
        {
            TILE_ZERO(OUT_0);
            TILE_ZERO(OUT_1);
            TILE_LOAD(OPERAND, first);
            TILE_MULTIPLY(OUT_0, WEIGHTS_0, OPERAND);
            BETWEEN(2 * i + 0);
            TILE_LOAD(OPERAND, first + TILE);
            TILE_MULTIPLY(OUT_1, WEIGHTS_0, OPERAND);
            BETWEEN(2 * i + 1);
            TILE_LOAD(OPERAND, second);
            TILE_MULTIPLY(OUT_0, WEIGHTS_1, OPERAND);
            BETWEEN(2 * i + 2);
            TILE_LOAD(OPERAND, second + TILE);
            TILE_MULTIPLY(OUT_1, WEIGHTS_1, OPERAND);
            BETWEEN(2 * i + 3);
            TILE_STORE(OUT_0, sums[d / 64 % 2][i]);
            TILE_STORE(OUT_1, sums[d / 64 % 2][i + 1]);
            if (i == 0 && d > 0)
                add_out(sums[(d / 64 - 1) % 2], first_row, end_row, acc + d - 64, padded);
        }
    }
    add_out(sums[(head_dim / 64 - 1) % 2], first_row, end_row, acc + head_dim - 64, padded);
    if (k != NULL)
        *k->next = next;
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

void ts_amx_widen_k(const ts_amx_rows *k, uint32_t head_dim)
{
#define CALL(dim) widen_k(k, dim)
    FOR_HEAD_DIM(CALL)
#undef CALL
}

void ts_amx_score(const void *k_tiles, const void *q_tiles, uint32_t head_dim, float *scores,
                  const ts_amx_rows *v)
{
#define CALL(dim) score(k_tiles, q_tiles, dim, scores, v)
    FOR_HEAD_DIM(CALL)
#undef CALL
}

void ts_amx_weigh(const void *v_tiles, const float *weights, uint32_t first_row, uint32_t end_row,
                  uint32_t head_dim, float *acc, uint32_t padded, const ts_amx_rows *k)
{
#define CALL(dim) weigh(v_tiles, weights, first_row, end_row, dim, acc, padded, k)
    FOR_HEAD_DIM(CALL)
#undef CALL
}
