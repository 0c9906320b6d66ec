/*
 * Paged attention on host memory: writing new K and V into their slots, copying blocks, and causal
 * attention of any number of query tokens over any cached length, for many sequences in one call.
 * Knows no sequence object and no socket: it is given block tables.
 *
 * Numbers: fp32 arithmetic whatever the cache holds, online softmax over tiles of 16 tokens (on the
 * tile unit: of 64 to 256 where a query sees all of them) and parts of 1024 tokens whose borders
 * depend on the token's position alone. One (query token, head) therefore comes out with the same
 * bits whatever else is in the call and however many threads work on it; different instruction sets
 * (`ts_attention_isa`) differ in the last bits.
 */
#ifndef TS_ATTENTION_H
#define TS_ATTENTION_H

#include "rope.h"
#include "threads.h"
#include "tinyserve_types.h"

#include <stdbool.h>

/* One sequence's part of a call. q, k, v and out have rows of [heads or kv_heads][head_dim]. */
typedef struct ts_attention_seq {
    const uint32_t *blocks; /* block table; covers kv_tokens */
    uint32_t kv_tokens;     /* cached tokens, the new ones included */
    uint32_t q_tokens;      /* 0..kv_tokens: query i stands at position kv_tokens - q_tokens + i */
    uint32_t layer;
    const void *q;
    const void *k; /* rows of the new tokens, to be written first; NULL: they are in the cache */
    const void *v;
    void *out;
    const float
        *sinks; /* [heads]: a logit each that joins the softmax and has no value; NULL: none */
    const float *alibi;  /* [heads]: slopes; NULL: none */
    const float *scales; /* [2][kv_heads], of an fp8 cache: what a stored element of K, then of V,
                            is to be multiplied by; NULL: all are 1 */
    float *lse; /* [q_tokens][heads]: gets the natural log of the sum of exponentials of the
                   scores, the sink left out; NULL: isn't wanted */
    const bool *dropped; /* read atomically: once it is true nobody wants the results, and what is
                            left of the work is skipped; NULL: they are wanted. Not on a GPU */
} ts_attention_seq;

/*
 * Variants of attention. What becomes of a score q·k of a query at position p and a key at position
 * j, in this order: scaled; capped: soft_cap * tanh(score / soft_cap); with ALiBi, slope * (j - p)
 * is added; hidden unless p - window < j <= p. A row all of whose scores are -infinity is 0, and
 * its log-sum-exp is -infinity.
 */
#define TS_SOFT_CAP_MAX 1e38f /* times log2(e), which scores are multiplied by, it is finite */
typedef struct ts_attention_variant {
    float scale;     /* of q·k */
    float soft_cap;  /* 0: none; at most TS_SOFT_CAP_MAX */
    uint32_t window; /* tokens that a token sees, itself included; 0: all */
    ts_rope rope;    /* of q before it attends, and of the new k before it is written */
} ts_attention_variant;

static inline bool ts_attention_same_variant(const ts_attention_variant *a,
                                             const ts_attention_variant *b)
{
    return a->scale == b->scale && a->soft_cap == b->soft_cap && a->window == b->window &&
           ts_rope_same(&a->rope, &b->rope);
}

/* TS_EINVAL with a sentence in `why`: scale, soft cap or theta is negative or not finite, or the
 * rotary embedding doesn't fit the heads. */
ts_status ts_attention_variant_check(const ts_attention_variant *variant, uint32_t head_dim,
                                     char *why, size_t why_bytes);

/* The first key that a query at this position sees. */
static inline uint32_t ts_attention_first_key(const ts_attention_variant *v, uint32_t position)
{
    return v->window == 0 || position < v->window ? 0 : position + 1 - v->window;
}

/* All the sequences of a call share the cache's shape and these. */
typedef struct ts_attention_call {
    ts_geometry geometry;
    unsigned char *base; /* of block 0 */
    uint32_t heads;      /* query heads: a multiple of kv_heads, at most 1024 */
    ts_dtype io_dtype;   /* of q, k, v and out: see ts_dtype_is_io */
    ts_attention_variant variant;
    const ts_attention_seq *seqs;
    uint32_t num_seqs;
} ts_attention_call;

/* Which instructions to use. AMX: AVX-512, and the tile unit for fp8 and bf16 (ts_amx_takes). */
typedef enum ts_isa {
    TS_ISA_AUTO = 0,
    TS_ISA_PORTABLE,
    TS_ISA_AVX2,
    TS_ISA_AVX512,
    TS_ISA_AMX
} ts_isa;

const char *ts_isa_name(ts_isa isa);

/* The best that this processor has (AUTO), or `isa` itself if the processor has it, else AUTO. */
ts_isa ts_isa_resolve(ts_isa isa);

/* Owns threads and scratch memory. Thread: one call at a time. */
typedef struct ts_attention ts_attention;

/* threads 0: all processors. NULL if out of memory. */
ts_attention *ts_attention_new(uint32_t threads, ts_isa isa);
void ts_attention_free(ts_attention *attention);
uint32_t ts_attention_threads(const ts_attention *attention);
ts_isa ts_attention_isa(const ts_attention *attention);

/*
 * Writes every sequence's new K and V (where given), then attends. TS_ENOMEM: no scratch memory,
 * nothing attended. The block tables and sizes are trusted: check before.
 */
ts_status ts_attention_run(ts_attention *attention, const ts_attention_call *call);

/*
 * A call that is run bit by bit, with others between: the results have the same bits. `call`'s
 * sequences and tables must stay until the task is freed. NULL: out of memory.
 */
typedef struct ts_attention_task ts_attention_task;
ts_attention_task *ts_attention_task_new(ts_attention *attention, const ts_attention_call *call);
void ts_attention_task_free(ts_attention_task *task);

/*
 * Goes on with it until it is done, or until `pause` says so, which is asked between two items of
 * work of at most TS_ITEM_WORK multiplications each, by several threads. *done: nothing is left.
 */
#define TS_ITEM_WORK ((uint64_t)1 << 26)
ts_status ts_attention_task_run(ts_attention_task *task, ts_threads_pause_fn pause, void *pause_arg,
                                bool *done);

/* Multiplications that a call takes, about. */
double ts_attention_work(const ts_attention_call *call);

/* Makes calls under way and later ones return TS_ECONN soon, their outputs unfinished. Any thread.
 */
void ts_attention_cancel(ts_attention *attention);

typedef struct ts_block_copy {
    uint32_t src, dst;
} ts_block_copy;

/* Copies whole blocks of block_bytes. No dst may be another copy's src or dst. */
void ts_attention_copy_blocks(ts_attention *attention, unsigned char *base, size_t block_bytes,
                              const ts_block_copy *copies, uint32_t num_copies);

/*
 * The judge: the same attention (k and v of the sequences are ignored: nothing is written) in
 * float64 and plain loops, on the stored values. out is [q_tokens][heads][head_dim] of one
 * sequence, lse (may be NULL) [q_tokens][heads]. Returns TS_ENOMEM without scratch memory.
 */
ts_status ts_attention_reference(const ts_attention_call *call, const ts_attention_seq *seq,
                                 double *out, double *lse);

/* Conversions with round-to-nearest-even, as IEEE 754 and bfloat16 have it; NaN stays NaN. fp8 is
 * e4m3 as the OCP 8-bit floating point specification has it; beyond 448 lies 448. */
uint16_t ts_fp32_to_fp16(float value);
uint16_t ts_fp32_to_bf16(float value);
float ts_fp16_to_fp32(uint16_t bits);
float ts_bf16_to_fp32(uint16_t bits);
uint8_t ts_fp32_to_fp8(float value);
float ts_fp8_to_fp32(uint8_t bits);

/* `count` elements from element `first` of an array of any type, to and from fp32. */
void ts_load_elements(const void *from, ts_dtype dtype, size_t first, uint32_t count, float *to);
void ts_store_elements(void *to, ts_dtype dtype, size_t first, uint32_t count, const float *from);

static inline float ts_element(const void *array, ts_dtype dtype, size_t i)
{
    float x;
    ts_load_elements(array, dtype, i, 1, &x);
    return x;
}

#endif
