/*
 * Attention over fp8 on the processor's tile unit (Intel AMX), 64 tokens of one KV head at a time:
 * e4m3 is widened to bf16, which has all its numbers, and q and the weights are sums of three bf16
 * numbers, so products are as exact as in fp32, and sums are of fp32.
 *
 * Rows of K and V are in the cache's order; rows of q and acc in that of FP8_FOURS
 * (attention_vectors.inc.h), with its unit. head_dim is a multiple of 64, at most 256. A thread
 * calls ts_amx_begin before and ts_amx_end after the others.
 */
#ifndef TS_ATTENTION_AMX_H
#define TS_ATTENTION_AMX_H

#include "attention_streams.h"

#define TS_AMX_TOKENS 64u
#define TS_AMX_ROWS 4u /* of q, at once */

/* Bytes of what 64 tokens of K, or of V, become; and of TS_AMX_ROWS rows of q. Aligned to 64. */
static inline size_t ts_amx_tokens_bytes(uint32_t head_dim)
{
    return (size_t)TS_AMX_TOKENS * head_dim * 2;
}

static inline size_t ts_amx_rows_bytes(uint32_t head_dim)
{
    return (size_t)head_dim / 32 * 1024;
}

void ts_amx_begin(void);
void ts_amx_end(void);

/* The tiles of up to TS_AMX_ROWS rows of q. */
void ts_amx_load_queries(const float *q, uint32_t rows, uint32_t padded, uint32_t head_dim,
                         void *q_tiles);

/* Rows of 64 tokens' K or V, each at rows[token] + offset, and what becomes of them; `next` is
 * fetched meanwhile. */
typedef struct ts_amx_rows {
    const unsigned char *const *rows;
    size_t offset;
    ts_streams *next;
    void *tiles;
} ts_amx_rows;

void ts_amx_widen_k(const ts_amx_rows *k, uint32_t head_dim);

/* q·K: scores is [TS_AMX_ROWS][64]. Widens v meanwhile, unless it is NULL. */
void ts_amx_score(const void *k_tiles, const void *q_tiles, uint32_t head_dim, float *scores,
                  const ts_amx_rows *v);

/* acc[r] += weights[r]·V for rows first_row..end_row - 1 of weights, which is [TS_AMX_ROWS][64];
 * acc is the first of these rows, the others are `padded` floats apart. Widens k (the next head's)
 * meanwhile, unless it is NULL. */
void ts_amx_weigh(const void *v_tiles, const float *weights, uint32_t first_row, uint32_t end_row,
                  uint32_t head_dim, float *acc, uint32_t padded, const ts_amx_rows *k);

#endif
