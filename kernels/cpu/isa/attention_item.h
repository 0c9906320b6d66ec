/*
 * What attention.c hands to the kernels of one instruction set: one item of work and a thread's
 * scratch memory. The kernels themselves are in attention_kernel.inc.h, compiled once for each set.
 */
#ifndef TS_ATTENTION_ITEM_H
#define TS_ATTENTION_ITEM_H

#include "attention_call.h"
#include "convert.h"

#define TS_TILE 16u    /* tokens of one softmax update */
#define TS_PART 1024u  /* tokens of one independent partial result; whole tiles */
#define TS_ROW_PAD 16u /* rows of q and acc are padded to this many floats */
#define TS_STATE_FLOATS                                                                            \
    32768u /* rows * padded head_dim that one item may hold, unless one token needs more */

/* The state of online softmax for a set of rows (query token x query head). */
typedef struct ts_attention_state {
    float *max; /* [rows], in units of log2 */
    float *sum; /* [rows] */
    float *acc; /* [rows][padded head_dim] */
} ts_attention_state;

typedef struct ts_attention_scratch {
    float *q; /* [rows][padded head_dim], scaled */
    ts_attention_state part, all;
    float *sums;   /* [rows][TS_ROW_PAD]: the part's sums, one a vector lane */
    float *scores; /* [query rows of one KV head][TS_TILE] */
    char *tiles;   /* of attention_tiles.inc.h, at a multiple of 64 */
} ts_attention_scratch;

typedef struct ts_attention_item {
    const ts_attention_call *call;
    const ts_attention_seq *seq;
    uint32_t q_first, q_count;
    uint32_t head_first, head_count; /* KV heads */
    uint32_t part_first, part_end;
    /* Partial results of every part that one of this item's rows sees, from first_seen on, [parts]
     * [rows] states of (max, sum, acc) each; NULL: the item has all parts and writes `out`. */
    float *partials;
    uint32_t first_seen;
} ts_attention_item;

/* Rows of an item are [kv head][query token][query head of the group]. */
static inline uint32_t ts_attention_item_rows(const ts_attention_item *item)
{
    return item->head_count * item->q_count * (item->call->heads / item->call->geometry.kv_heads);
}

static inline uint32_t ts_attention_padded(uint32_t head_dim)
{
    return (head_dim + TS_ROW_PAD - 1) / TS_ROW_PAD * TS_ROW_PAD;
}

/* Floats that one part's partial result of `rows` rows takes. */
static inline size_t ts_attention_partial_floats(uint32_t rows, uint32_t head_dim)
{
    return (size_t)rows * (ts_attention_padded(head_dim) + 2);
}

typedef struct ts_attention_isa_ops {
    /* Computes the item's parts; writes partials or `out`. */
    void (*item)(const ts_attention_item *item, const ts_attention_scratch *scratch);
    /* Merges the partials of all parts in order and writes `out`. */
    void (*merge)(const ts_attention_item *item, const ts_attention_scratch *scratch);
} ts_attention_isa_ops;

extern const ts_attention_isa_ops ts_attention_portable;
#if defined(__x86_64__)
extern const ts_attention_isa_ops ts_attention_avx2;
extern const ts_attention_isa_ops ts_attention_avx512;
extern const ts_attention_isa_ops ts_attention_vbmi; /* avx512, fp8 by look-ups: the same bits */
extern const ts_attention_isa_ops ts_attention_amx;
#elif defined(__aarch64__)
extern const ts_attention_isa_ops ts_attention_neon;
#endif

#endif
