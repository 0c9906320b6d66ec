#include "attention_amx.h"

#include <immintrin.h>
#include <stdalign.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#define TILE 1024                                 /* bytes: 16 rows of 64 */
#define SPLITS 3                                  /* a float is the sum of three bf16 numbers */
#define WEIGHTS_BYTES (SPLITS * TS_AMX_ROWS * 64) /* of a tile of weights; the rest isn't used */

/* Numbers of the tile registers, which instructions have in them. All have 16 rows. */
#define SCORES_0 0 /* [token][split][row], fp32, of 16 tokens */
#define SCORES_1 1
#define WEIGHTS 0   /* [split][row][16 pairs][2] of 32 tokens */
#define OPERAND_0 2 /* K: [token][32 dims]; q and V: [16 pairs][16 columns][2] */
#define OPERAND_1 3
#define HELD_0 4 /* q as above, the first four tiles; or outputs: [split][row][16 dims], fp32 */
#define HELD_1 5
#define HELD_2 6
#define HELD_3 7

/* Between a tile's load and its product, and between that and the next load, something else is
 * widened: a core may have only two writers of tile registers under way (README.md).
 *
 * The instructions; the compilers' own functions for them don't all say that they read memory. */
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
    for (int i = 0; i < 8; i++) {
        config[16 + 2 * i] = 64;
        config[48 + i] = 16;
    }
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

static inline unit values_unit(const ts_amx_rows *v, uint32_t token, uint32_t dim, char *to)
{
    return (unit){v->rows + token, v->offset + dim, to};
}

/* Rows first..end - 1 of a unit. */
INLINE void widen_unit(unit_kind kind, widening w, unit u, uint32_t head_dim, uint32_t first,
                       uint32_t end, ts_streams *next)
{
    if (kind == KEYS_OF_16)
        _Pragma("GCC unroll 16") for (uint32_t t = first; t < end; t++)
        {
            char *to = u.to + t * 64;
            const unsigned char *row = u.rows[t] + u.offset;
            for (uint32_t d = 0; d < head_dim; d += 64, to += 2 * TILE)
                widen(w, _mm512_loadu_si512(row + d), to, to + TILE);
            for (uint32_t i = t * head_dim / 128; i < (t + 1) * head_dim / 128; i++)
                ts_streams_ask(next, i);
        }
    if (kind == VALUES_OF_32)
        _Pragma("GCC unroll 16") for (uint32_t t = first; t < end; t++)
        {
            /* A tile's row has tokens t and t + 16. */
            char *to = u.to + t * 64;
            __m512i x = _mm512_loadu_si512(u.rows[t] + u.offset);
            __m512i y = _mm512_loadu_si512(u.rows[t + 16] + u.offset);
            pair(x, y, &x, &y);
            widen(w, x, to, to + TILE);
            widen(w, y, to + 2 * TILE, to + 3 * TILE);
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

/* 16 tokens' [token][split][row] become [row][token], rows `stride` floats apart. */
INLINE void store_scores(const float *sums, float *scores, uint32_t stride)
{
    const __m512i rows_01 =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i rows_23 = _mm512_add_epi32(rows_01, _mm512_set1_epi32(2));
    __m512 a = add_splits(sums), b = add_splits(sums + 64);
    __m512 c = add_splits(sums + 128), d = add_splits(sums + 192);
    __m512 ab = _mm512_permutex2var_ps(a, rows_01, b), cd = _mm512_permutex2var_ps(c, rows_01, d);
    _mm512_storeu_ps(scores, _mm512_shuffle_f32x4(ab, cd, 0x44));
    _mm512_storeu_ps(scores + stride, _mm512_shuffle_f32x4(ab, cd, 0xee));
    ab = _mm512_permutex2var_ps(a, rows_23, b);
    cd = _mm512_permutex2var_ps(c, rows_23, d);
    _mm512_storeu_ps(scores + 2 * stride, _mm512_shuffle_f32x4(ab, cd, 0x44));
    _mm512_storeu_ps(scores + 3 * stride, _mm512_shuffle_f32x4(ab, cd, 0xee));
}

INLINE void load_queries(const char *q, uint32_t head_dim)
{
    TILE_LOAD(HELD_0, q);
    TILE_LOAD(HELD_1, q + TILE);
    if (head_dim > 64) {
        TILE_LOAD(HELD_2, q + 2 * TILE);
        TILE_LOAD(HELD_3, q + 3 * TILE);
    }
}

/* Scores that are in a tile register yet, and where they go: NULL, if there are none. */
typedef struct waiting {
    float *scores;
    uint32_t stride;
} waiting;

INLINE void store_waiting(bool odd, waiting *w)
{
    alignas(64) float sums[TILE / 4];
    if (w->scores == NULL)
        return;
    if (odd)
        TILE_STORE(SCORES_1, sums);
    else
        TILE_STORE(SCORES_0, sums);
    store_scores(sums, w->scores, w->stride);
    w->scores = NULL;
}

/* Scores of the chunk of q that is held with 16 tokens, in SCORES_1 or SCORES_0. Between the
 * products `meanwhile` is widened, and what waits in the other is stored. */
INLINE void score_unit(bool odd, const ts_amx_work *work, const char *keys, const char *q,
                       uint32_t head_dim, waiting *other, unit_kind kind, unit meanwhile,
                       ts_streams *next)
{
    const widening w = load_widening(work);
    const uint32_t tiles = head_dim / 32;
    if (odd)
        TILE_ZERO(SCORES_1);
    else
        TILE_ZERO(SCORES_0);
    TILE_LOAD(OPERAND_0, keys);
#define PRODUCT(i, operand, query, following)                                                      \
    if (odd)                                                                                       \
        TILE_MULTIPLY(SCORES_1, operand, query);                                                   \
    else                                                                                           \
        TILE_MULTIPLY(SCORES_0, operand, query);                                                   \
    BETWEEN(2 * (i));                                                                              \
    if ((i) + 1 < tiles)                                                                           \
        TILE_LOAD(following, keys + ((i) + 1) * TILE);                                             \
    BETWEEN(2 * (i) + 1)
#define BETWEEN(i)                                                                                 \
    widen_unit(kind, w, meanwhile, head_dim, (i)*UNIT_ROWS / (2 * tiles),                          \
               ((i) + 1) * UNIT_ROWS / (2 * tiles), next)
    PRODUCT(0, OPERAND_0, HELD_0, OPERAND_1);
    store_waiting(!odd, other);
    PRODUCT(1, OPERAND_1, HELD_1, OPERAND_0);
    if (head_dim > 64) {
        PRODUCT(2, OPERAND_0, HELD_2, OPERAND_1);
        PRODUCT(3, OPERAND_1, HELD_3, OPERAND_0);
    }
    if (head_dim > 128) {
        TILE_LOAD(HELD_0, q + 4 * TILE);
        TILE_LOAD(HELD_1, q + 5 * TILE);
        PRODUCT(4, OPERAND_0, HELD_0, OPERAND_1);
        PRODUCT(5, OPERAND_1, HELD_1, OPERAND_0);
    }
    if (head_dim > 192) {
        TILE_LOAD(HELD_2, q + 6 * TILE);
        TILE_LOAD(HELD_3, q + 7 * TILE);
        PRODUCT(6, OPERAND_0, HELD_2, OPERAND_1);
        PRODUCT(7, OPERAND_1, HELD_3, OPERAND_0);
    }
#undef BETWEEN
#undef PRODUCT
}

/* Of one chunk: units take turns, one is multiplied while the next is widened. */
INLINE void score_one(ts_amx_work *work, const ts_amx_rows *k, const ts_amx_rows *v, const char *q,
                      uint32_t head_dim, uint32_t tokens, float *scores)
{
    char *even = work->units, *odd = second_unit(work, head_dim);
    waiting in_0 = {NULL, tokens}, in_1 = {NULL, tokens};
    ts_streams next = *k->next;
    load_queries(q, head_dim);
    for (uint32_t t = 0; t < tokens; t += 2 * UNIT_KEYS) {
        if (head_dim > 128 && t > 0)
            load_queries(q, head_dim);
        score_unit(false, work, even, q, head_dim, &in_1, KEYS_OF_16,
                   keys_unit(k, t + UNIT_KEYS, odd), &next);
        in_0.scores = scores + t;
        if (head_dim > 128)
            load_queries(q, head_dim);
        if (t + 2 * UNIT_KEYS < tokens)
            score_unit(true, work, odd, q, head_dim, &in_0, KEYS_OF_16,
                       keys_unit(k, t + 2 * UNIT_KEYS, even), &next);
        else
            score_unit(true, work, odd, q, head_dim, &in_0, VALUES_OF_32,
                       values_unit(v, 0, 0, even), &next);
        in_1.scores = scores + t + UNIT_KEYS;
    }
    store_waiting(true, &in_1);
    *k->next = next;
}

/* Of several: the units of 64 tokens are widened first, then serve all chunks. */
INLINE void score_many(ts_amx_work *work, const ts_amx_rows *k, const ts_amx_rows *v, const char *q,
                       uint32_t chunks, uint32_t head_dim, uint32_t tokens, float *scores)
{
    const uint32_t bytes = keys_bytes(head_dim);
    const widening w = load_widening(work);
    ts_streams next = *k->next;
    for (uint32_t t = 0; t < tokens; t += TS_AMX_TOKENS) {
        for (uint32_t i = t == 0 ? 1 : 0; i < TS_AMX_TOKENS / UNIT_KEYS; i++)
            widen_unit(KEYS_OF_16, w, keys_unit(k, t + i * UNIT_KEYS, work->units + i * bytes),
                       head_dim, 0, UNIT_ROWS, &next);
        for (uint32_t c = 0; c < chunks; c++) {
            const char *chunk = q + c * ts_amx_chunk_bytes(head_dim), *keys = work->units;
            float *to = scores + (size_t)c * TS_AMX_ROWS * tokens + t;
            waiting in_0 = {NULL, tokens}, in_1 = {NULL, tokens};
            load_queries(chunk, head_dim);
            for (uint32_t i = 0; i < TS_AMX_TOKENS; i += 2 * UNIT_KEYS, keys += 2 * bytes) {
                if (head_dim > 128 && i > 0)
                    load_queries(chunk, head_dim);
                score_unit(false, work, keys, chunk, head_dim, &in_1, NOTHING, (unit){0}, &next);
                in_0.scores = to + i;
                if (head_dim > 128)
                    load_queries(chunk, head_dim);
                score_unit(true, work, keys + bytes, chunk, head_dim, &in_0, NOTHING, (unit){0},
                           &next);
                in_1.scores = to + i + UNIT_KEYS;
            }
            store_waiting(true, &in_1);
        }
    }
    widen_unit(VALUES_OF_32, w, values_unit(v, 0, 0, work->units), head_dim, 0, UNIT_ROWS, &next);
    *k->next = next;
}

void ts_amx_split_weights(const float *weights, uint32_t chunks, uint32_t tokens,
                          void *weight_tiles)
{
    char *to = weight_tiles;
    for (; chunks > 0; chunks--, weights += TS_AMX_ROWS * tokens)
        for (uint32_t t = 0; t < tokens; t += 32, to += WEIGHTS_BYTES)
            for (uint32_t r = 0; r < TS_AMX_ROWS; r++) {
                __m512 a = _mm512_loadu_ps(weights + r * tokens + t);
                __m512 b = _mm512_loadu_ps(weights + r * tokens + t + 16);
                for (uint32_t s = 0; s < SPLITS; s++)
                    _mm512_store_si512(to + (s * TS_AMX_ROWS + r) * 64, split(&a, &b));
            }
}

INLINE void widen_part(ts_amx_work *work, const ts_amx_rows *v, uint32_t chunks, uint32_t head_dim,
                       uint32_t part)
{
    char *to = chunks == 1 ? second_unit(work, head_dim) : work->units + VALUES_BYTES;
    ts_streams next = *v->next;
    widen_unit(VALUES_OF_32, load_widening(work), values_unit(v, UNIT_VALUES, 0, to), head_dim,
               part * UNIT_ROWS / 2, (part + 1) * UNIT_ROWS / 2, &next);
    *v->next = next;
}

/* One row's sums of a tile of outputs. */
INLINE __m512 out_row(const float *tile, uint32_t row)
{
    return _mm512_load_ps(tile + row * 16) + (_mm512_load_ps(tile + (TS_AMX_ROWS + row) * 16) +
                                              _mm512_load_ps(tile + (2 * TS_AMX_ROWS + row) * 16));
}

INLINE void add_to(float *acc, __m512 x)
{
    _mm512_storeu_ps(acc, _mm512_loadu_ps(acc) + x);
}

/* acc[r] += the sums of 64 dims: two tiles have the even ones, 4 of them in turns, two the odd. */
INLINE void add_out(const float (*sums)[TILE / 4], uint32_t first, uint32_t end, float *acc,
                    uint32_t padded)
{
    const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    for (uint32_t r = first; r < end; r++, acc += padded)
        for (uint32_t i = 0; i < 2; i++) {
            __m512 a = out_row(sums[2 * i], r), b = out_row(sums[2 * i + 1], r);
            add_to(acc + i * 32, _mm512_permutex2var_ps(a, lower, b));
            add_to(acc + i * 32 + 16, _mm512_permutex2var_ps(a, upper, b));
        }
}

INLINE void store_out(float (*sums)[TILE / 4])
{
    TILE_STORE(HELD_0, sums[0]);
    TILE_STORE(HELD_1, sums[1]);
    TILE_STORE(HELD_2, sums[2]);
    TILE_STORE(HELD_3, sums[3]);
}

INLINE void zero_out(void)
{
    TILE_ZERO(HELD_0);
    TILE_ZERO(HELD_1);
    TILE_ZERO(HELD_2);
    TILE_ZERO(HELD_3);
}

/* Weights of 32 tokens times 64 dims of V are added to what is held; `meanwhile` is widened between
 * the products. */
INLINE void weigh_unit(const ts_amx_work *work, const char *values, const char *weights,
                       uint32_t head_dim, unit_kind kind, unit meanwhile, ts_streams *next)
{
    const widening w = load_widening(work);
    TILE_LOAD(WEIGHTS, weights);
    TILE_LOAD(OPERAND_0, values);
#define PRODUCT(i, out, operand, following)                                                        \
    TILE_MULTIPLY(out, WEIGHTS, operand);                                                          \
    BETWEEN(2 * (i));                                                                              \
    if ((i) + 1 < 4)                                                                               \
        TILE_LOAD(following, values + ((i) + 1) * TILE);                                           \
    BETWEEN(2 * (i) + 1)
#define BETWEEN(i)                                                                                 \
    widen_unit(kind, w, meanwhile, head_dim, (i)*UNIT_ROWS / 8, ((i) + 1) * UNIT_ROWS / 8, next)
    PRODUCT(0, HELD_0, OPERAND_0, OPERAND_1);
    PRODUCT(1, HELD_1, OPERAND_1, OPERAND_0);
    PRODUCT(2, HELD_2, OPERAND_0, OPERAND_1);
    PRODUCT(3, HELD_3, OPERAND_1, OPERAND_0);
#undef BETWEEN
#undef PRODUCT
}

/* Adds 64 dims of a chunk's sums to its rows of acc that are asked for. */
INLINE void add_chunk(uint32_t chunk, uint32_t first_row, uint32_t end_row, float *acc,
                      uint32_t padded)
{
    alignas(64) float sums[4][TILE / 4];
    const uint32_t begin = chunk * TS_AMX_ROWS;
    const uint32_t first = first_row > begin ? first_row - begin : 0;
    const uint32_t end = end_row - begin < TS_AMX_ROWS ? end_row - begin : TS_AMX_ROWS;
    store_out(sums);
    add_out(sums, first, end, acc + (size_t)(begin + first) * padded, padded);
}

/* Of one chunk: units take turns; the first two are widened already. */
INLINE void weigh_one(ts_amx_work *work, const ts_amx_rows *v, const ts_amx_rows *k,
                      const char *weights, uint32_t first_row, uint32_t end_row, uint32_t head_dim,
                      uint32_t tokens, float *acc, uint32_t padded)
{
    char *even = work->units, *odd = second_unit(work, head_dim);
    ts_streams next = *v->next;
    for (uint32_t d = 0; d < head_dim; d += 64) {
        const char *tile = weights;
        zero_out();
        for (uint32_t t = 0; t < tokens; t += 2 * UNIT_VALUES, tile += 2 * WEIGHTS_BYTES) {
            const uint32_t end = t + 2 * UNIT_VALUES;
            if (d == 0 && t == 0)
                weigh_unit(work, even, tile, head_dim, NOTHING, (unit){0}, &next);
            else
                weigh_unit(work, even, tile, head_dim, VALUES_OF_32,
                           values_unit(v, t + UNIT_VALUES, d, odd), &next);
            if (end < tokens || d + 64 < head_dim)
                weigh_unit(work, odd, tile + WEIGHTS_BYTES, head_dim, VALUES_OF_32,
                           end < tokens ? values_unit(v, end, d, even)
                                        : values_unit(v, 0, d + 64, even),
                           &next);
            else if (k != NULL)
                weigh_unit(work, odd, tile + WEIGHTS_BYTES, head_dim, KEYS_OF_16,
                           keys_unit(k, 0, even), &next);
            else
                weigh_unit(work, odd, tile + WEIGHTS_BYTES, head_dim, NOTHING, (unit){0}, &next);
        }
        add_chunk(first_row / TS_AMX_ROWS, first_row, end_row, acc + d, padded);
    }
    *v->next = next;
}

/* Of several: the units of 64 dims are widened first, then serve all chunks. */
INLINE void weigh_many(ts_amx_work *work, const ts_amx_rows *v, const ts_amx_rows *k,
                       const char *weights, uint32_t first_row, uint32_t end_row, uint32_t head_dim,
                       uint32_t tokens, float *acc, uint32_t padded)
{
    const uint32_t units = tokens / UNIT_VALUES;
    const widening w = load_widening(work);
    ts_streams next = *v->next;
    for (uint32_t d = 0; d < head_dim; d += 64) {
        const char *tile = weights;
        for (uint32_t i = d == 0 ? 2 : 0; i < units; i++)
            widen_unit(VALUES_OF_32, w,
                       values_unit(v, i * UNIT_VALUES, d, work->units + i * VALUES_BYTES), head_dim,
                       0, UNIT_ROWS, &next);
        for (uint32_t c = first_row / TS_AMX_ROWS; c < ts_amx_chunks(end_row); c++) {
            zero_out();
            for (uint32_t i = 0; i < units; i++, tile += WEIGHTS_BYTES)
                weigh_unit(work, work->units + i * VALUES_BYTES, tile, head_dim, NOTHING, (unit){0},
                           &next);
            add_chunk(c, first_row, end_row, acc + d, padded);
        }
    }
    if (k != NULL)
        widen_unit(KEYS_OF_16, w, keys_unit(k, 0, work->units), head_dim, 0, UNIT_ROWS, &next);
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
    widen_unit(KEYS_OF_16, load_widening(work), keys_unit(k, 0, work->units), head_dim, 0,
               UNIT_ROWS, &next);
    *k->next = next;
}

void ts_amx_score(ts_amx_work *work, const ts_amx_rows *k, const ts_amx_rows *v,
                  const void *q_tiles, uint32_t chunks, uint32_t head_dim, uint32_t tokens,
                  float *scores)
{
#define ONE(dim) score_one(work, k, v, q_tiles, dim, tokens, scores)
#define MANY(dim) score_many(work, k, v, q_tiles, chunks, dim, tokens, scores)
    if (chunks == 1)
        FOR_HEAD_DIM(ONE)
    else
        FOR_HEAD_DIM(MANY)
#undef ONE
#undef MANY
}

void ts_amx_widen_part(ts_amx_work *work, const ts_amx_rows *v, uint32_t chunks, uint32_t head_dim,
                       uint32_t part)
{
#define CALL(dim) widen_part(work, v, chunks, dim, part)
    FOR_HEAD_DIM(CALL)
#undef CALL
}

void ts_amx_weigh(ts_amx_work *work, const ts_amx_rows *v, const ts_amx_rows *k,
                  const void *weight_tiles, uint32_t first_row, uint32_t end_row, uint32_t head_dim,
                  uint32_t tokens, float *acc, uint32_t padded)
{
    const uint32_t chunk = first_row / TS_AMX_ROWS;
    const char *weights = (const char *)weight_tiles + ts_amx_weights_bytes(chunk, tokens);
#define ONE(dim) weigh_one(work, v, k, weights, first_row, end_row, dim, tokens, acc, padded)
#define MANY(dim) weigh_many(work, v, k, weights, first_row, end_row, dim, tokens, acc, padded)
    if (ts_amx_chunks(end_row) - chunk == 1)
        FOR_HEAD_DIM(ONE)
    else
        FOR_HEAD_DIM(MANY)
#undef ONE
#undef MANY
}
