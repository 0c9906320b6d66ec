#include "attention_amx.h"

#include "attention_amx_units.h"
#include "tile_unit.h"

#include <stdalign.h>
#include <string.h>

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

void ts_amx_begin(ts_amx_work *work, ts_dtype dtype)
{
    work->dtype = dtype;
    alignas(64) unsigned char config[64] = {1};
    for (int i = 0; i < 8; i++) {
        config[16 + 2 * i] = 64;
        config[48 + i] = 16;
    }
    TILE_CONFIGURE(config);
}

void ts_amx_end(void)
{
    TILE_RELEASE();
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

/* Puts a pair of q's elements, in each of its splits, where its column is. */
INLINE void place_pairs(const float *even, const float *odd, uint32_t row, char *q_tiles,
                        uint32_t (*place)(uint32_t pair))
{
    __m512 a = _mm512_loadu_ps(even), b = _mm512_loadu_ps(odd);
    for (uint32_t s = 0; s < SPLITS; s++) {
        alignas(64) uint32_t pairs[16];
        _mm512_store_si512(pairs, split(&a, &b));
        for (uint32_t k = 0; k < 16; k++)
            memcpy(q_tiles + place(k) * 64 + (s * TS_AMX_ROWS + row) * 4, &pairs[k], 4);
    }
}

/* Of 32 dims' pairs widening puts 8 into one tile, fours of them, and 8 into the next. */
INLINE uint32_t fp8_place(uint32_t pair)
{
    return pair / 4 % 2 * 16 + pair / 8 * 4 + pair % 4;
}

INLINE uint32_t bf16_place(uint32_t pair)
{
    return pair;
}

void ts_amx_load_queries(ts_dtype dtype, const float *q, uint32_t rows, uint32_t padded,
                         uint32_t head_dim, void *q_tiles)
{
    memset(q_tiles, 0, ts_amx_chunk_bytes(head_dim));
    for (uint32_t r = 0; r < rows; r++, q += padded)
        for (uint32_t d = 0; d < head_dim; d += 64) {
            char *tiles = (char *)q_tiles + d / 32 * TILE;
            if (dtype == TS_DTYPE_BF16) {
                place_pairs(q + d, q + d + 16, r, tiles, bf16_place);
                place_pairs(q + d + 32, q + d + 48, r, tiles + TILE, bf16_place);
            } else {
                place_pairs(q + d, q + d + 32, r, tiles, fp8_place);
                place_pairs(q + d + 16, q + d + 48, r, tiles + 8 * 64, fp8_place);
            }
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

/*
 * Between a tile's load and its product, and between that and the next load, something else is
 * widened: a core may have only two writers of tile registers under way (kernels/doc/).
 */

/* Scores of the chunk of q that is held with 16 tokens, in SCORES_1 or SCORES_0. Between the
 * products `meanwhile` is widened, and what waits in the other is stored. */
INLINE void score_unit(ts_dtype dtype, bool odd, const char *keys, const char *q, uint32_t head_dim,
                       waiting *other, unit_kind kind, unit meanwhile, ts_streams *next)
{
    const ts_fp8_tables w = ts_fp8_load_tables();
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
#define BETWEEN(i) widen_step(dtype, kind, w, &ahead, meanwhile, head_dim, i, 2 * tiles, next)
    lines ahead = first_lines(dtype, kind, meanwhile, head_dim, 2 * tiles);
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
INLINE void score_one(ts_dtype dtype, ts_amx_work *work, const ts_amx_rows *k, const ts_amx_rows *v,
                      const char *q, uint32_t head_dim, uint32_t tokens, float *scores)
{
    char *even = work->units, *odd = second_unit(work, head_dim);
    waiting in_0 = {NULL, tokens}, in_1 = {NULL, tokens};
    ts_streams next = *k->next;
    load_queries(q, head_dim);
    for (uint32_t t = 0; t < tokens; t += 2 * UNIT_KEYS) {
        if (head_dim > 128 && t > 0)
            load_queries(q, head_dim);
        score_unit(dtype, false, even, q, head_dim, &in_1, KEYS_OF_16,
                   keys_unit(k, t + UNIT_KEYS, odd), &next);
        in_0.scores = scores + t;
        if (head_dim > 128)
            load_queries(q, head_dim);
        if (t + 2 * UNIT_KEYS < tokens)
            score_unit(dtype, true, odd, q, head_dim, &in_0, KEYS_OF_16,
                       keys_unit(k, t + 2 * UNIT_KEYS, even), &next);
        else
            score_unit(dtype, true, odd, q, head_dim, &in_0, VALUES_OF_32,
                       values_unit(dtype, v, 0, 0, even), &next);
        in_1.scores = scores + t + UNIT_KEYS;
    }
    store_waiting(true, &in_1);
    *k->next = next;
}

/* Of several: the units of 64 tokens serve all of them. The first chunk's are widened as above,
 * into a ring of five, of which the fifth is the next 64 tokens' first. */
#define KEYS_RING (TS_AMX_TOKENS / UNIT_KEYS + 1)
INLINE char *keys_slot(ts_amx_work *work, uint32_t head_dim, uint32_t slot)
{
    return work->units + slot % KEYS_RING * keys_bytes(head_dim);
}

/* 64 tokens' scores of a chunk; widens the next units meanwhile, up to token `end`. */
INLINE void score_64(ts_dtype dtype, ts_amx_work *work, bool first, const ts_amx_rows *k,
                     const char *q, uint32_t head_dim, uint32_t token, uint32_t end, uint32_t slot,
                     float *scores, uint32_t stride, ts_streams *next)
{
    waiting in_0 = {NULL, stride}, in_1 = {NULL, stride};
    load_queries(q, head_dim);
    for (uint32_t t = 0; t < TS_AMX_TOKENS; t += 2 * UNIT_KEYS, slot += 2) {
        const char *even = keys_slot(work, head_dim, slot);
        char *odd = keys_slot(work, head_dim, slot + 1);
        const uint32_t then = token + t + 2 * UNIT_KEYS;
        if (head_dim > 128 && t > 0)
            load_queries(q, head_dim);
        score_unit(dtype, false, even, q, head_dim, &in_1, first ? KEYS_OF_16 : NOTHING,
                   keys_unit(k, token + t + UNIT_KEYS, odd), next);
        in_0.scores = scores + t;
        if (head_dim > 128)
            load_queries(q, head_dim);
        if (first && then < end)
            score_unit(dtype, true, odd, q, head_dim, &in_0, KEYS_OF_16,
                       keys_unit(k, then, keys_slot(work, head_dim, slot + 2)), next);
        else
            score_unit(dtype, true, odd, q, head_dim, &in_0, NOTHING, (unit){0}, next);
        in_1.scores = scores + t + UNIT_KEYS;
    }
    store_waiting(true, &in_1);
}

INLINE void score_many(ts_dtype dtype, ts_amx_work *work, const ts_amx_rows *k, const char *q,
                       uint32_t chunks, uint32_t head_dim, uint32_t tokens, float *scores)
{
    ts_streams next = *k->next;
    for (uint32_t t = 0, slot = 0; t < tokens; t += TS_AMX_TOKENS, slot += KEYS_RING - 1) {
        score_64(dtype, work, true, k, q, head_dim, t, tokens, slot, scores + t, tokens, &next);
        for (uint32_t c = 1; c < chunks; c++)
            score_64(dtype, work, false, k, q + c * ts_amx_chunk_bytes(head_dim), head_dim, t,
                     tokens, slot, scores + (size_t)c * TS_AMX_ROWS * tokens + t, tokens, &next);
    }
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

/* Of one chunk: half of the second unit each time; of several: the first, then the second. */
INLINE void widen_part(ts_dtype dtype, ts_amx_work *work, const ts_amx_rows *v, uint32_t chunks,
                       uint32_t head_dim, uint32_t part)
{
    const ts_fp8_tables w = ts_fp8_load_tables();
    ts_streams next = *v->next;
    if (chunks == 1)
        widen_unit(dtype, VALUES_OF_32, w,
                   values_unit(dtype, v, UNIT_VALUES, 0, second_unit(work, head_dim)), head_dim,
                   part * UNIT_ROWS / 2, (part + 1) * UNIT_ROWS / 2, &next);
    else
        widen_unit(dtype, VALUES_OF_32, w,
                   values_unit(dtype, v, part * UNIT_VALUES, 0, work->units + part * VALUES_BYTES),
                   head_dim, 0, UNIT_ROWS, &next);
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

/* acc[r] += the sums of 64 dims, in acc's order. fp8: two tiles have the even ones, 4 of them in
 * turns, two the odd; bf16: two tiles have 32 dims, 4 of them in turns. */
INLINE void add_out(ts_dtype dtype, float (*sums)[TILE / 4], uint32_t first, uint32_t end,
                    float *acc, uint32_t padded)
{
    const bool bf16 = dtype == TS_DTYPE_BF16;
    const __m512i lower =
        bf16 ? _mm512_setr_epi32(0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30)
             : _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(bf16 ? 1 : 8));
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
INLINE void weigh_unit(ts_dtype dtype, const char *values, const char *weights, uint32_t head_dim,
                       unit_kind kind, unit meanwhile, ts_streams *next)
{
    const ts_fp8_tables w = ts_fp8_load_tables();
    TILE_LOAD(WEIGHTS, weights);
    TILE_LOAD(OPERAND_0, values);
#define PRODUCT(i, out, operand, following)                                                        \
    TILE_MULTIPLY(out, WEIGHTS, operand);                                                          \
    BETWEEN(2 * (i));                                                                              \
    if ((i) + 1 < 4)                                                                               \
        TILE_LOAD(following, values + ((i) + 1) * TILE);                                           \
    BETWEEN(2 * (i) + 1)
#define BETWEEN(i) widen_step(dtype, kind, w, &ahead, meanwhile, head_dim, i, 8, next)
    lines ahead = first_lines(dtype, kind, meanwhile, head_dim, 8);
    PRODUCT(0, HELD_0, OPERAND_0, OPERAND_1);
    PRODUCT(1, HELD_1, OPERAND_1, OPERAND_0);
    PRODUCT(2, HELD_2, OPERAND_0, OPERAND_1);
    PRODUCT(3, HELD_3, OPERAND_1, OPERAND_0);
#undef BETWEEN
#undef PRODUCT
}

/* Adds 64 dims of a chunk's sums to its rows of acc that are asked for. */
INLINE void add_chunk(ts_dtype dtype, uint32_t chunk, uint32_t first_row, uint32_t end_row,
                      float *acc, uint32_t padded)
{
    alignas(64) float sums[4][TILE / 4];
    const uint32_t begin = chunk * TS_AMX_ROWS;
    const uint32_t first = first_row > begin ? first_row - begin : 0;
    const uint32_t end = end_row - begin < TS_AMX_ROWS ? end_row - begin : TS_AMX_ROWS;
    store_out(sums);
    add_out(dtype, sums, first, end, acc + (size_t)(begin + first) * padded, padded);
}

/* Of one chunk: units take turns; the first two are widened already. */
INLINE void weigh_one(ts_dtype dtype, ts_amx_work *work, const ts_amx_rows *v, const ts_amx_rows *k,
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
                weigh_unit(dtype, even, tile, head_dim, NOTHING, (unit){0}, &next);
            else
                weigh_unit(dtype, even, tile, head_dim, VALUES_OF_32,
                           values_unit(dtype, v, t + UNIT_VALUES, d, odd), &next);
            if (end < tokens || d + 64 < head_dim)
                weigh_unit(dtype, odd, tile + WEIGHTS_BYTES, head_dim, VALUES_OF_32,
                           end < tokens ? values_unit(dtype, v, end, d, even)
                                        : values_unit(dtype, v, 0, d + 64, even),
                           &next);
            else if (k != NULL)
                weigh_unit(dtype, odd, tile + WEIGHTS_BYTES, head_dim, KEYS_OF_16,
                           keys_unit(k, 0, even), &next);
            else
                weigh_unit(dtype, odd, tile + WEIGHTS_BYTES, head_dim, NOTHING, (unit){0}, &next);
        }
        add_chunk(dtype, first_row / TS_AMX_ROWS, first_row, end_row, acc + d, padded);
    }
    *v->next = next;
}

/* Of several: the units of 64 dims serve all of them; the first chunk's are widened as above, into
 * a ring that takes those of the longest run and one more. */
#define VALUES_RING (TS_AMX_RUN / UNIT_VALUES + 1)
INLINE char *values_slot(ts_amx_work *work, uint32_t slot)
{
    return work->units + slot % VALUES_RING * VALUES_BYTES;
}

INLINE void weigh_many(ts_dtype dtype, ts_amx_work *work, const ts_amx_rows *v,
                       const ts_amx_rows *k, const char *weights, uint32_t first_row,
                       uint32_t end_row, uint32_t head_dim, uint32_t tokens, float *acc,
                       uint32_t padded)
{
    const uint32_t units = tokens / UNIT_VALUES, first = first_row / TS_AMX_ROWS;
    ts_streams next = *v->next;
    for (uint32_t d = 0, slot = 0; d < head_dim; d += 64, slot += units) {
        const char *tile = weights;
        for (uint32_t c = first; c < ts_amx_chunks(end_row); c++) {
            zero_out();
            for (uint32_t i = 0; i < units; i++, tile += WEIGHTS_BYTES) {
                const bool last = i + 1 == units;
                if (c > first || (d == 0 && i == 0) || (last && d + 64 == head_dim))
                    weigh_unit(dtype, values_slot(work, slot + i), tile, head_dim, NOTHING,
                               (unit){0}, &next);
                else
                    weigh_unit(dtype, values_slot(work, slot + i), tile, head_dim, VALUES_OF_32,
                               values_unit(dtype, v, last ? 0 : (i + 1) * UNIT_VALUES,
                                           last ? d + 64 : d, values_slot(work, slot + i + 1)),
                               &next);
            }
            add_chunk(dtype, c, first_row, end_row, acc + d, padded);
        }
    }
    if (k != NULL)
        widen_unit(dtype, KEYS_OF_16, ts_fp8_load_tables(), keys_unit(k, 0, work->units), head_dim,
                   0, UNIT_ROWS, &next);
    *v->next = next;
}

/* The type and head_dim are constants in each. */
#define FOR_TYPE(call, dim)                                                                        \
    if (work->dtype == TS_DTYPE_BF16)                                                              \
        call(TS_DTYPE_BF16, dim);                                                                  \
    else                                                                                           \
        call(TS_DTYPE_FP8_E4M3, dim);                                                              \
    break
#define FOR_EACH(call)                                                                             \
    switch (head_dim) {                                                                            \
    case 64:                                                                                       \
        FOR_TYPE(call, 64);                                                                        \
    case 128:                                                                                      \
        FOR_TYPE(call, 128);                                                                       \
    case 192:                                                                                      \
        FOR_TYPE(call, 192);                                                                       \
    default:                                                                                       \
        FOR_TYPE(call, 256);                                                                       \
    }

INLINE void widen_first(ts_dtype dtype, ts_amx_work *work, const ts_amx_rows *k, uint32_t head_dim)
{
    ts_streams next = *k->next;
    widen_unit(dtype, KEYS_OF_16, ts_fp8_load_tables(), keys_unit(k, 0, work->units), head_dim, 0,
               UNIT_ROWS, &next);
    *k->next = next;
}

void ts_amx_widen_first(ts_amx_work *work, const ts_amx_rows *k, uint32_t head_dim)
{
#define CALL(dtype, dim) widen_first(dtype, work, k, dim)
    FOR_EACH(CALL)
#undef CALL
}

void ts_amx_score(ts_amx_work *work, const ts_amx_rows *k, const ts_amx_rows *v,
                  const void *q_tiles, uint32_t chunks, uint32_t head_dim, uint32_t tokens,
                  float *scores)
{
#define ONE(dtype, dim) score_one(dtype, work, k, v, q_tiles, dim, tokens, scores)
#define MANY(dtype, dim) score_many(dtype, work, k, q_tiles, chunks, dim, tokens, scores)
    if (chunks == 1)
        FOR_EACH(ONE)
    else
        FOR_EACH(MANY)
#undef ONE
#undef MANY
}

void ts_amx_widen_part(ts_amx_work *work, const ts_amx_rows *v, uint32_t chunks, uint32_t head_dim,
                       uint32_t part)
{
#define CALL(dtype, dim) widen_part(dtype, work, v, chunks, dim, part)
    FOR_EACH(CALL)
#undef CALL
}

void ts_amx_weigh(ts_amx_work *work, const ts_amx_rows *v, const ts_amx_rows *k,
                  const void *weight_tiles, uint32_t first_row, uint32_t end_row, uint32_t head_dim,
                  uint32_t tokens, float *acc, uint32_t padded)
{
    const uint32_t chunk = first_row / TS_AMX_ROWS;
    const char *weights = (const char *)weight_tiles + ts_amx_weights_bytes(chunk, tokens);
#define ONE(dtype, dim)                                                                            \
    weigh_one(dtype, work, v, k, weights, first_row, end_row, dim, tokens, acc, padded)
#define MANY(dtype, dim)                                                                           \
    weigh_many(dtype, work, v, k, weights, first_row, end_row, dim, tokens, acc, padded)
    if (ts_amx_chunks(end_row) - chunk == 1)
        FOR_EACH(ONE)
    else
        FOR_EACH(MANY)
#undef ONE
#undef MANY
}
