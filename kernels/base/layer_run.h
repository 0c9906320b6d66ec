/*
 * How one layer of a step is attended: where its data lies, and what becomes of a score. One struct
 * for all that passes it on: the library, the rings (proto/rings.h; the layout is shared by two
 * programs), the daemon's commands and jobs.
 */
#ifndef TS_LAYER_RUN_H
#define TS_LAYER_RUN_H

#include "attention_call.h"

/* Which of the optional things a run has, and how it is done. */
enum {
    TS_RUN_SINKS = 1,
    TS_RUN_ALIBI = 2,
    TS_RUN_LSE = 4,
    TS_RUN_INTERLEAVED = 8, /* pairs of rotary embedding are neighbours */
    TS_RUN_ON_STREAM = 16,  /* after the session's run `number` - 1 (proto/signals.h) */
    TS_RUN_SCALES = 32,
    TS_RUN_REPLACED = 64,  /* in the books alone: the exchange isn't the session's any more */
    TS_RUN_POSTED = 128,   /* on a stream: its worker goes on before it is answered */
    TS_RUN_OUTDATED = 256, /* in the books alone: a later run of the layer was refused */
};

/* Flag and name of the optional arrays (ts_run_options has a bool of that name, StepRun an offset
 * and has_ before it), and of what is only switched on. */
#define TS_RUN_ARRAYS(X)                                                                           \
    X(SINKS, sinks)                                                                                \
    X(ALIBI, alibi)                                                                                \
    X(LSE, lse)                                                                                    \
    X(SCALES, scales)
#define TS_RUN_SWITCHES(X)                                                                         \
    X(INTERLEAVED, rope_interleaved)                                                               \
    X(ON_STREAM, on_stream)

/* Places are bytes from the start of the exchange; rows of the step's sequences follow each other.
 * Values are ts_attention_variant's; scale 0: the step's, rope_dims 0: head_dim. New fields go to
 * the end: the journal has the struct as it is. */
typedef struct ts_layer_run {
    uint64_t q, k, v, out;
    uint64_t sinks, alibi, lse, scales; /* with their flags */
    float scale, soft_cap, rope_theta;
    uint32_t window, rope_dims;
    uint32_t layer, flags, number;
} ts_layer_run;

_Static_assert(sizeof(ts_layer_run) == 96, "two programs share it: raise TS_PROTOCOL, too");

/* Which layers of a step were run. */
typedef struct ts_layer_set {
    uint64_t bits[TS_LAYERS_MAX / 64];
    uint32_t count;
} ts_layer_set;

/* The layer's last run went well, or failed. */
static inline void ts_layer_set_put(ts_layer_set *set, uint32_t layer, bool well)
{
    uint64_t *bits = &set->bits[layer / 64], bit = (uint64_t)1 << layer % 64;
    set->count += well && !(*bits & bit);
    set->count -= !well && (*bits & bit);
    *bits = well ? *bits | bit : *bits & ~bit;
}

/* As it is given: scale and rope.dims may be 0. */
static inline ts_attention_variant ts_layer_run_variant(const ts_layer_run *r)
{
    ts_attention_variant v = {.rope.interleaved = (r->flags & TS_RUN_INTERLEAVED) != 0};
#define TS_TAKE(type, name, place, most, what) v.place = r->name;
    TS_RUN_NUMBERS(TS_TAKE)
#undef TS_TAKE
    return v;
}

/* What 0 stands for is filled in. */
static inline ts_attention_variant ts_layer_run_resolve(const ts_layer_run *r, float step_scale,
                                                        uint32_t head_dim)
{
    ts_attention_variant v = ts_layer_run_variant(r);
    v.scale = v.scale != 0 ? v.scale : step_scale;
    v.rope.dims = v.rope.dims != 0 ? v.rope.dims : head_dim;
    return v;
}

/* fp32 numbers that the run has if the flag is set; offsets are multiples of 64. */
static inline float *ts_layer_run_floats(const ts_layer_run *r, unsigned char *base, uint32_t flag,
                                         uint64_t offset)
{
    return r->flags & flag ? (float *)(void *)(base + offset) : NULL;
}

/* Points the sequence, whose rows are those from token `first` of the step on, into the exchange at
 * `base`. */
static inline void ts_layer_run_point(const ts_layer_run *r, unsigned char *base,
                                      const ts_geometry *g, uint32_t heads, ts_dtype io_dtype,
                                      size_t first, ts_attention_seq *seq)
{
    const size_t row = first * g->head_dim * ts_dtype_bytes(io_dtype);
    float *lse = ts_layer_run_floats(r, base, TS_RUN_LSE, r->lse);
    seq->layer = r->layer;
    seq->q = base + r->q + row * heads;
    seq->k = base + r->k + row * g->kv_heads;
    seq->v = base + r->v + row * g->kv_heads;
    seq->out = base + r->out + row * heads;
    seq->sinks = ts_layer_run_floats(r, base, TS_RUN_SINKS, r->sinks);
    seq->alibi = ts_layer_run_floats(r, base, TS_RUN_ALIBI, r->alibi);
    seq->scales = ts_layer_run_floats(r, base, TS_RUN_SCALES, r->scales);
    seq->lse = lse != NULL ? lse + first * heads : NULL;
}

#endif
