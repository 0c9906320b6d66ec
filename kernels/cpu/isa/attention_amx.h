/*
 * Attention over fp8 and bf16 on the processor's tile unit (Intel AMX), some tokens of one KV head
 * at a time: e4m3 is widened to bf16, which has all its numbers, and q and the weights are sums of
 * three bf16 numbers, so products are as exact as in fp32, and sums are of fp32. The unit takes
 * subnormals of bf16 for 0, and an infinite element of the cache comes out as NaN, which
 * attention_tiles.inc.h looks for.
 *
 * Rows of K and V are in the cache's order; rows of q and acc in that of FP8_QUADS, with its unit,
 * or of BF16_PAIRS (attention_vectors.inc.h). head_dim is a multiple of 64, at most 256; `tokens` a
 * multiple of TS_AMX_TOKENS, at most TS_AMX_RUN. A thread calls ts_amx_begin before and ts_amx_end
 * after the others.
 */
#ifndef TS_ATTENTION_AMX_H
#define TS_ATTENTION_AMX_H

#include "attention_streams.h"

#define TS_AMX_TOKENS 64u
#define TS_AMX_RUN 256u
/* What is worked on and what is fetched meanwhile are to fit into the second-level cache twice, as
 * two threads of a core share it. */
#define TS_AMX_RUN_BYTES ((size_t)256 << 10)
#define TS_AMX_ROWS 4u /* of q, at once: a chunk */
/* Bytes of a chunk's scores and tiles of weights. */
#define TS_AMX_CHUNK_SCORES (TS_AMX_ROWS * TS_AMX_RUN * sizeof(float))
#define TS_AMX_CHUNK_WEIGHTS (TS_AMX_CHUNK_SCORES / 2 * 3)

/* Whether attention of `heads` query heads over such a cache is worked on here. bf16 only where
 * there is enough to multiply, and TS_AMX_TOKENS tokens and the next ones fit into the second-level
 * cache: else AVX-512 alone is as fast or faster (kernels/doc/). */
static inline bool ts_amx_takes(const ts_geometry *g, uint32_t heads)
{
    const size_t bytes = 2 * (size_t)g->kv_heads * g->head_dim * ts_dtype_bytes(g->dtype);
    return g->head_dim % 64 == 0 &&
           (g->dtype == TS_DTYPE_FP8_E4M3 ||
            (g->dtype == TS_DTYPE_BF16 && g->layout == TS_LAYOUT_NHD && heads >= 4 * g->kv_heads &&
             bytes * TS_AMX_TOKENS <= TS_AMX_RUN_BYTES));
}

/* The chunks in which `rows` rows of q are worked on. */
static inline uint32_t ts_amx_chunks(uint32_t rows)
{
    return (rows + TS_AMX_ROWS - 1) / TS_AMX_ROWS;
}

/* Bytes of the tiles of a chunk of q; they are aligned to 64. */
static inline size_t ts_amx_chunk_bytes(uint32_t head_dim)
{
    return (size_t)head_dim / 32 * 1024;
}

/*
 * K of 16 tokens, or 64 dims of V of 32, is widened into a unit while another is multiplied. For
 * one chunk there are two, as all that is touched again has to stay in the first-level cache, of
 * which two threads of a core have but a half each. Several chunks share the units of 64 tokens' K,
 * and the next; or of 64 dims of all tokens' V, and the next.
 */
typedef struct ts_amx_work {
    ts_dtype dtype;
    _Alignas(64) char units[40960];
} ts_amx_work;

/* dtype: the cache's, fp8 or bf16. */
void ts_amx_begin(ts_amx_work *work, ts_dtype dtype);
void ts_amx_end(void);

/* The tiles of up to TS_AMX_ROWS rows of q. */
void ts_amx_load_queries(ts_dtype dtype, const float *q, uint32_t rows, uint32_t padded,
                         uint32_t head_dim, void *q_tiles);

/* K or V of the tokens, at rows[token] + offset; `next` is fetched while they are widened. */
typedef struct ts_amx_rows {
    const unsigned char *const *rows;
    size_t offset;
    ts_streams *next;
} ts_amx_rows;

/* These are called in this order for each KV head; ts_amx_widen_first only for the first. k and v
 * have one `next`. */

/* Widens the first unit of k. */
void ts_amx_widen_first(ts_amx_work *work, const ts_amx_rows *k, uint32_t head_dim);

/* q·K, of which the first unit is widened: scores is [chunks][TS_AMX_ROWS][tokens]. Meanwhile
 * widens the others, then, for one chunk, the first unit of V. */
void ts_amx_score(ts_amx_work *work, const ts_amx_rows *k, const ts_amx_rows *v,
                  const void *q_tiles, uint32_t chunks, uint32_t head_dim, uint32_t tokens,
                  float *scores);

/* Widens part 0, then part 1, of what is to be widened of V while scores become weights. */
void ts_amx_widen_part(ts_amx_work *work, const ts_amx_rows *v, uint32_t chunks, uint32_t head_dim,
                       uint32_t part);

/* The tiles of weights, which are [chunks][TS_AMX_ROWS][tokens]; and their bytes. */
void ts_amx_split_weights(const float *weights, uint32_t chunks, uint32_t tokens,
                          void *weight_tiles);
static inline size_t ts_amx_weights_bytes(uint32_t chunks, uint32_t tokens)
{
    return chunks * (TS_AMX_CHUNK_WEIGHTS / TS_AMX_RUN * tokens);
}

/* acc[r] += weights[r]·V for r in first_row..end_row - 1; weight_tiles are those of all rows, rows
 * of acc are `padded` floats apart. Meanwhile widens the rest of V, then the first unit of k, the
 * next head's (NULL: there is none). */
void ts_amx_weigh(ts_amx_work *work, const ts_amx_rows *v, const ts_amx_rows *k,
                  const void *weight_tiles, uint32_t first_row, uint32_t end_row, uint32_t head_dim,
                  uint32_t tokens, float *acc, uint32_t padded);

#endif
