/*
 * What attention is asked for, whoever computes it: sequences by their block tables, where their
 * rows lie, and what becomes of a score.
 */
#ifndef TS_ATTENTION_CALL_H
#define TS_ATTENTION_CALL_H

#include "rope.h"
#include "tinyserve_types.h"

#include <float.h>
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

/*
 * The numbers among a run's options: type, name, place in ts_attention_variant, limit, and what a
 * refusal calls it. ts_run_options (tinyserve.h), StepRun (tinyserve.proto) and ts_layer_run have
 * fields of that name. Whatever copies, compares, checks or stores the numbers goes over this
 * table.
 */
#define TS_RUN_NUMBERS(X)                                                                          \
    X(float, scale, scale, FLT_MAX, "scale")                                                       \
    X(float, soft_cap, soft_cap, TS_SOFT_CAP_MAX, "soft cap")                                      \
    X(float, rope_theta, rope.theta, FLT_MAX, "rope theta")                                        \
    X(uint32_t, window, window, UINT32_MAX, "window")                                              \
    X(uint32_t, rope_dims, rope.dims, UINT32_MAX, "number of rope dimensions")

static inline bool ts_attention_same_variant(const ts_attention_variant *a,
                                             const ts_attention_variant *b)
{
#define TS_SAME(type, name, place, most, what) a->place == b->place &&
    return TS_RUN_NUMBERS(TS_SAME) a->rope.interleaved == b->rope.interleaved;
#undef TS_SAME
}

/* Whether something happens to scores beside scaling and hiding. */
static inline bool ts_attention_is_varied(const ts_attention_variant *v, const float *alibi)
{
    return v->soft_cap > 0 || alibi != NULL;
}

/* TS_EINVAL with a sentence in `why`: a number is negative, not finite or beyond its limit, or the
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
    /* Called at most once for a sequence, on the thread that runs the call, between two of its
     * items, when the sequence is done: nothing that it points to is read any more. Those that it
     * isn't called for are done when the call returns. It must not use the attention. NULL: nobody
     * is told. Not on a GPU. */
    void (*seq_done)(void *arg, uint32_t seq);
    void *seq_done_arg;
} ts_attention_call;

typedef struct ts_block_copy {
    uint32_t src, dst;
} ts_block_copy;

#endif
