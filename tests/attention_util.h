/*
 * Attention problems for kernels of any device: random q and caches whose unread parts are NaN, the
 * float64 reference, and the error against it.
 */
#ifndef TS_ATTENTION_UTIL_H
#define TS_ATTENTION_UTIL_H

#include "test_util.h"

#include "attention.h"
#include "convert.h"
#include "dtypes.h"

#include <math.h>

typedef struct problem {
    ts_attention_call call;
    ts_attention_seq *seqs;
    uint32_t num_seqs;
    unsigned char *cache;
    size_t cache_bytes;
    uint32_t **tables;
    unsigned char *q, *k, *v, *out;
    float *sinks, *alibi, *lse; /* NULL: see problem_vary */
    float *scales;              /* of an fp8 cache */
    size_t lse_elements;
    size_t q_elements, kv_elements;
} problem;

typedef struct shape {
    ts_dtype dtype, io;
    ts_layout layout;
    uint32_t heads, kv_heads, head_dim, block_tokens, layers;
} shape;

static inline void put(unsigned char *to, ts_dtype dtype, size_t i, float x)
{
    ts_store_elements(to, dtype, i, 1, &x);
}

static inline float get(const unsigned char *from, ts_dtype dtype, size_t i)
{
    return ts_element(from, dtype, i);
}

/* K of a cached token, in the cache; V lies a plane further. */
static inline unsigned char *key_in_cache(const problem *p, const ts_attention_seq *seq, uint32_t t,
                                          uint32_t h)
{
    const ts_geometry *g = &p->call.geometry;
    return p->cache + seq->blocks[t / g->block_tokens] * ts_geometry_block_bytes(g) +
           seq->layer * 2 * ts_geometry_plane_bytes(g) +
           t % g->block_tokens * ts_geometry_token_stride(g) + h * ts_geometry_head_stride(g);
}

/* Random q, and sequences over blocks in random order; the cached tokens are random numbers, all
 * that no sequence may read (tails, other layers' spare blocks) is NaN. */
static inline void problem_new(problem *p, shape s, const uint32_t (*lengths)[2], uint32_t num_seqs,
                               rng *r)
{
    memset(p, 0, sizeof *p);
    ts_geometry g = {.layers = s.layers,
                     .kv_heads = s.kv_heads,
                     .head_dim = s.head_dim,
                     .block_tokens = s.block_tokens,
                     .dtype = s.dtype,
                     .layout = s.layout};
    uint32_t blocks = 1, tokens = 0;
    for (uint32_t i = 0; i < num_seqs; i++) {
        blocks += (lengths[i][0] + s.block_tokens - 1) / s.block_tokens;
        tokens += lengths[i][1];
    }
    p->num_seqs = num_seqs;
    p->seqs = calloc(num_seqs, sizeof *p->seqs);
    p->tables = calloc(num_seqs, sizeof *p->tables);
    p->cache_bytes = blocks * ts_geometry_block_bytes(&g);
    p->cache = malloc(p->cache_bytes);
    memset(p->cache, 0xff, p->cache_bytes); /* NaN in every type */
    uint32_t *order = malloc(blocks * sizeof *order);
    for (uint32_t i = 0; i < blocks; i++)
        order[i] = i;
    for (uint32_t i = blocks - 1; i > 0; i--) {
        uint32_t j = rng_below(r, i + 1), x = order[i];
        order[i] = order[j];
        order[j] = x;
    }
    p->q_elements = (size_t)tokens * s.heads * s.head_dim;
    p->kv_elements = (size_t)tokens * s.kv_heads * s.head_dim;
    size_t e = ts_dtype_bytes(s.io);
    p->q = malloc(p->q_elements * e);
    p->out = malloc(p->q_elements * e);
    p->k = malloc(p->kv_elements * e);
    p->v = malloc(p->kv_elements * e);
    for (size_t i = 0; i < p->q_elements; i++)
        put(p->q, s.io, i, rng_normal(r));
    for (size_t i = 0; i < p->kv_elements; i++) {
        put(p->k, s.io, i, rng_normal(r));
        put(p->v, s.io, i, rng_normal(r));
    }
    if (s.dtype == TS_DTYPE_FP8_E4M3) {
        p->scales = malloc(2 * s.kv_heads * sizeof *p->scales);
        for (uint32_t h = 0; h < 2 * s.kv_heads; h++)
            p->scales[h] = 0.25f + (float)rng_below(r, 1000) / 500;
    }
    p->call = (ts_attention_call){
        .geometry = g,
        .base = p->cache,
        .heads = s.heads,
        .io_dtype = s.io,
        .variant.scale = 1.0f / sqrtf((float)s.head_dim),
        .seqs = p->seqs,
        .num_seqs = num_seqs,
    };
    uint32_t next = 0, row = 0;
    size_t plane = ts_geometry_plane_bytes(&g);
    for (uint32_t i = 0; i < num_seqs; i++) {
        uint32_t count = (lengths[i][0] + s.block_tokens - 1) / s.block_tokens;
        p->tables[i] = malloc(count * sizeof(uint32_t));
        memcpy(p->tables[i], order + next, count * sizeof(uint32_t));
        next += count;
        uint32_t layer = rng_below(r, s.layers);
        p->seqs[i] = (ts_attention_seq){
            .blocks = p->tables[i],
            .kv_tokens = lengths[i][0],
            .q_tokens = lengths[i][1],
            .layer = layer,
            .scales = p->scales,
            .q = p->q + (size_t)row * s.heads * s.head_dim * e,
            .k = p->k + (size_t)row * s.kv_heads * s.head_dim * e,
            .v = p->v + (size_t)row * s.kv_heads * s.head_dim * e,
            .out = p->out + (size_t)row * s.heads * s.head_dim * e,
        };
        row += lengths[i][1];
        for (uint32_t t = 0; t < lengths[i][0] - lengths[i][1]; t++)
            for (uint32_t h = 0; h < s.kv_heads; h++) {
                float k[TS_HEAD_DIM_MAX], v[TS_HEAD_DIM_MAX];
                for (uint32_t d = 0; d < s.head_dim; d++) {
                    k[d] = rng_normal(r);
                    v[d] = rng_normal(r);
                }
                unsigned char *at = key_in_cache(p, &p->seqs[i], t, h);
                ts_store_elements(at, s.dtype, 0, s.head_dim, k);
                ts_store_elements(at + plane, s.dtype, 0, s.head_dim, v);
            }
    }
    free(order);
}

static inline void problem_free(problem *p)
{
    for (uint32_t i = 0; i < p->num_seqs; i++)
        free(p->tables[i]);
    free(p->tables);
    free(p->seqs);
    free(p->cache);
    free(p->q);
    free(p->k);
    free(p->v);
    free(p->sinks);
    free(p->alibi);
    free(p->lse);
    free(p->scales);
    free(p->out);
}

/* A variant of attention; 0 and false: not that. Scale 0: as it is; rope_dims 0: head_dim, 1: half
 * of it (even). */
typedef struct variety {
#define NUMBER(type, name, place, most, what) type name;
    TS_RUN_NUMBERS(NUMBER)
#undef NUMBER
    bool sinks, alibi, rope_interleaved;
} variety;

static const variety varieties[] = {
    {.window = 1},
    {.window = 5},
    {.window = 16},
    {.window = 17, .soft_cap = 30},
    {.window = 1000, .sinks = true},
    {.window = 1024, .alibi = true},
    {.window = 1500},
    {.soft_cap = 20},
    {.soft_cap = 1.5f, .scale = 0.7f},
    {.sinks = true},
    {.alibi = true},
    {.rope_theta = 10000},
    {.rope_theta = 500000, .rope_interleaved = true},
    {.rope_theta = 100, .rope_dims = 1, .window = 100},
    {.rope_theta = 1e6f, .rope_dims = 1, .rope_interleaved = true},
    {.window = 200, .soft_cap = 50, .scale = 0.3f, .sinks = true, .alibi = true},
};
#define VARIETIES (sizeof varieties / sizeof *varieties)

/* The shape, one of 3, to try variety i with. */
static inline shape variety_shape(size_t i, size_t which)
{
    static const uint32_t heads[][2] = {{4, 4}, {6, 2}, {5, 1}};
    return (shape){.dtype = (ts_dtype)((i + which) % TS_DTYPE_COUNT),
                   .io = TS_DTYPE_FP32,
                   .layout = (ts_layout)(i % 2),
                   .heads = heads[which][0],
                   .kv_heads = heads[which][1],
                   .head_dim = which == 1 ? 40 : 64,
                   .block_tokens = which == 2 ? 7 : 16,
                   .layers = 2};
}

/* Turns the problem into a variant of itself, with the log-sum-exp asked for. */
static inline void problem_vary(problem *p, variety v, rng *r)
{
    uint32_t heads = p->call.heads, head_dim = p->call.geometry.head_dim;
    v.scale = v.scale > 0 ? v.scale : p->call.variant.scale;
    v.rope_dims = v.rope_dims == 0 ? head_dim : head_dim / 4 * 2;
    p->call.variant.rope.interleaved = v.rope_interleaved;
#define NUMBER(type, name, place, most, what) p->call.variant.place = v.name;
    TS_RUN_NUMBERS(NUMBER)
#undef NUMBER
    p->lse_elements = p->q_elements / head_dim;
    p->lse = malloc(p->lse_elements * sizeof *p->lse);
    if (v.sinks)
        p->sinks = malloc(heads * sizeof *p->sinks);
    if (v.alibi)
        p->alibi = malloc(heads * sizeof *p->alibi);
    for (uint32_t h = 0; h < heads; h++) {
        if (v.sinks)
            p->sinks[h] = 2 * rng_normal(r);
        if (v.alibi)
            p->alibi[h] = exp2f(-8.0f * (float)(h + 1) / (float)heads);
    }
    for (uint32_t i = 0; i < p->num_seqs; i++) {
        size_t row = (size_t)((unsigned char *)p->seqs[i].out - p->out) /
                     ts_dtype_bytes(p->call.io_dtype) / head_dim;
        p->seqs[i].sinks = p->sinks;
        p->seqs[i].alibi = p->alibi;
        p->seqs[i].lse = p->lse + row;
    }
}

static inline void poison(problem *p)
{
    if (p->lse != NULL)
        memset(p->lse, 0xff, p->lse_elements * sizeof *p->lse);
    memset(p->out, 0xff, p->q_elements * ts_dtype_bytes(p->call.io_dtype)); /* NaN in every type */
}

/* The reference's output, and behind it its log-sum-exps. */
static inline double *reference_of(const problem *p, const ts_attention_seq *seq)
{
    size_t rows = (size_t)seq->q_tokens * p->call.heads, n = rows * p->call.geometry.head_dim;
    double *ref = malloc((n + rows) * sizeof *ref);
    assert_int_equal(ts_attention_reference(&p->call, seq, ref, ref + n), TS_OK);
    return ref;
}

/* The largest error of a log-sum-exp; 0 where none is asked for. */
static inline double lse_error(const problem *p, const ts_attention_seq *seq, const double *ref)
{
    size_t rows = (size_t)seq->q_tokens * p->call.heads;
    double worst = 0;
    for (size_t i = 0; i < rows && seq->lse != NULL; i++) {
        double error = fabs(seq->lse[i] - ref[rows * p->call.geometry.head_dim + i]);
        worst = error <= worst ? worst : error; /* NaN stays */
    }
    return worst;
}

/* The largest difference of a stored new K from k turned as rope.h says, in parts of the length of
 * its pair. */
static inline double key_error(const problem *p, const ts_attention_seq *seq,
                               const unsigned char *cache)
{
    /* The smallest normal number of a type; of the wide ones no test comes near it. */
    static const double normals[TS_DTYPE_COUNT] = {
        [TS_DTYPE_FP16] = 0x1p-14, [TS_DTYPE_FP8_E4M3] = 0x1p-6};
    const ts_geometry *g = &p->call.geometry;
    const ts_rope *rope = &p->call.variant.rope;
    double worst = 0;
    for (uint32_t i = 0; i < seq->q_tokens; i++)
        for (uint32_t h = 0; h < g->kv_heads; h++) {
            uint32_t t = seq->kv_tokens - seq->q_tokens + i;
            const unsigned char *stored =
                cache + seq->blocks[t / g->block_tokens] * ts_geometry_block_bytes(g) +
                seq->layer * 2 * ts_geometry_plane_bytes(g) +
                t % g->block_tokens * ts_geometry_token_stride(g) + h * ts_geometry_head_stride(g);
            size_t first = ((size_t)i * g->kv_heads + h) * g->head_dim;
            double scale = seq->scales == NULL ? 1 : (double)seq->scales[h];
            double least = scale * normals[g->dtype];
            for (uint32_t j = 0; rope->theta != 0 && j < rope->dims / 2; j++) {
                uint32_t a = ts_rope_first(rope, j), b = ts_rope_second(rope, j);
                double x = get(seq->k, p->call.io_dtype, first + a);
                double y = get(seq->k, p->call.io_dtype, first + b);
                double angle = t * pow((double)rope->theta, -2.0 * j / rope->dims);
                double c = cos(angle), s = sin(angle);
                double error = fmax(fabs(get(stored, g->dtype, a) * scale - (x * c - y * s)),
                                    fabs(get(stored, g->dtype, b) * scale - (x * s + y * c)));
                error /= fmax(sqrt(x * x + y * y), least);
                worst = error <= worst ? worst : error; /* NaN stays */
            }
            for (uint32_t d = rope->theta == 0 ? 0 : rope->dims; d < g->head_dim; d++) {
                double x = get(seq->k, p->call.io_dtype, first + d);
                double y = get(stored, g->dtype, d) * scale;
                double error = fabs(y - x) / fmax(fabs(x), least);
                worst = error <= worst ? worst : error;
            }
        }
    return worst;
}

/* What rounding to the type may cost, in that measure. */
static inline double key_limit(ts_dtype dtype)
{
    TS_KNOWS_DTYPES(4);
    static const double limits[TS_DTYPE_COUNT] = {[TS_DTYPE_FP32] = 4e-7,
                                                  [TS_DTYPE_FP16] = 6e-4,
                                                  [TS_DTYPE_BF16] = 4.2e-3,
                                                  [TS_DTYPE_FP8_E4M3] = 0.07};
    return limits[dtype];
}

/* ||out - reference|| / ||reference|| over one sequence. */
static inline double relative_error(const problem *p, const ts_attention_seq *seq,
                                    const double *ref)
{
    size_t n = (size_t)seq->q_tokens * p->call.heads * p->call.geometry.head_dim;
    double diff = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        double x = get(seq->out, p->call.io_dtype, i);
        diff += (x - ref[i]) * (x - ref[i]);
        norm += ref[i] * ref[i];
    }
    return sqrt(diff / norm);
}

/* Gives the first `count` tokens of a sequence scores of -infinity: q[0] is positive everywhere,
 * and their K[0] is -infinity. */
static inline void hide_keys(problem *p, const ts_attention_seq *seq, uint32_t count)
{
    const ts_geometry *g = &p->call.geometry;
    const uint32_t past = seq->kv_tokens - seq->q_tokens;
    for (uint32_t r = 0; r < seq->q_tokens * p->call.heads; r++) {
        size_t first = (size_t)r * g->head_dim;
        put((unsigned char *)(uintptr_t)seq->q, p->call.io_dtype, first,
            0.5f + fabsf(get(seq->q, p->call.io_dtype, first)));
    }
    for (uint32_t t = 0; t < count; t++)
        for (uint32_t h = 0; h < g->kv_heads; h++)
            if (t < past)
                put(key_in_cache(p, seq, t, h), g->dtype, 0, -INFINITY);
            else
                put((unsigned char *)(uintptr_t)seq->k, p->call.io_dtype,
                    ((size_t)(t - past) * g->kv_heads + h) * g->head_dim, -INFINITY);
}

/* The largest difference from the reference, of an output or, in *lse, of a log-sum-exp; those that
 * are -infinity in both are equal. */
static inline double largest_error(const problem *p, const ts_attention_seq *seq, const double *ref,
                                   double *lse)
{
    const size_t rows = (size_t)seq->q_tokens * p->call.heads, n = rows * p->call.geometry.head_dim;
    double worst = 0;
    *lse = 0;
    for (size_t i = 0; i < n; i++) {
        double error = fabs(get(seq->out, p->call.io_dtype, i) - ref[i]);
        worst = error <= worst ? worst : error; /* NaN stays */
    }
    for (size_t i = 0; i < rows && seq->lse != NULL; i++) {
        double error = seq->lse[i] == ref[n + i] ? 0 : fabs(seq->lse[i] - ref[n + i]);
        *lse = error <= *lse ? *lse : error;
    }
    return worst;
}

/* Lengths of sequences whose first hidden[i] keys are hidden: up to each border of a tile, part and
 * chunk, and all keys of a row. */
static const uint32_t with_hidden[][2] = {
    {17, 1},   {20, 1}, {18, 1},  {65, 1},  {257, 1},  {300, 1},  {513, 1},  {1025, 1}, {2049, 1},
    {2100, 1}, {1, 1},  {16, 16}, {40, 20}, {200, 90}, {1500, 9}, {5000, 1}, {5000, 33}};
static const uint32_t hidden[] = {16,   3, 17, 64, 256, 256,  512,  1024, 2048,
                                  2100, 1, 16, 30, 128, 1500, 4096, 4980};
#define WITH_HIDDEN (sizeof hidden / sizeof *hidden)

static const variety hidden_varieties[] = {{0},
                                           {.sinks = true},
                                           {.alibi = true},
                                           {.window = 100},
                                           {.soft_cap = 5, .window = 1030, .sinks = true}};

static const float caps[] = {1e-30f, 0.5f, 5,     30,    50,    1000, 1e4f,
                             1e6f,   1e8f, 1e12f, 1e20f, 1e30f, 1e38f};

/* Sequences of one token, whose scores go from tiny ones to many times the cap: q is one number,
 * and K is 1. */
static inline shape problem_of_scores(problem *p, float cap)
{
    enum { SEQS = 16, HEADS = 64, DIM = 32 };
    const shape s = {
        .heads = HEADS, .kv_heads = 1, .head_dim = DIM, .block_tokens = 16, .layers = 1};
    uint32_t lengths[SEQS][2];
    for (uint32_t i = 0; i < SEQS; i++)
        lengths[i][0] = lengths[i][1] = 1;
    rng r = {5};
    problem_new(p, s, lengths, SEQS, &r);
    problem_vary(p, (variety){.soft_cap = cap, .scale = 1}, &r);
    for (size_t i = 0; i < p->q_elements; i++) {
        double x =
            ldexp(1 + rng_below(&r, 1 << 23) / (double)(1 << 23), (int)rng_below(&r, 34) - 30);
        x = fmin(x * (rng_below(&r, 2) == 0 ? 1 : (double)cap), 1e37);
        put(p->q, TS_DTYPE_FP32, i, i % DIM == 0 ? (float)(i / DIM % 2 == 0 ? x : -x) : 0);
    }
    for (size_t i = 0; i < p->kv_elements; i++)
        put(p->k, TS_DTYPE_FP32, i, 1);
    return s;
}

/* The largest error of a log-sum-exp, in units in the last place of max(1, |score|); *score is the
 * score before it was capped. */
static inline double worst_ulp(const problem *p, double *score)
{
    const double cap = (double)p->call.variant.soft_cap;
    double worst = 0;
    *score = 0;
    for (size_t i = 0; i < p->lse_elements; i++) {
        double x = get(p->q, TS_DTYPE_FP32, i * p->call.geometry.head_dim);
        double right = cap * tanh(x / cap);
        double error = fabs(p->lse[i] - right) / ldexp(1, ilogb(fmax(1, fabs(right))) - 23);
        if (!(error <= worst)) {
            worst = error;
            *score = x;
        }
    }
    return worst;
}

/* One query at position 2^24 + 23 that sees 16 keys, with ALiBi. All of the context lies in a few
 * blocks, in turn. Free *table. */
static inline shape far_problem_new(problem *p, ts_dtype dtype, uint32_t **table)
{
    enum { TOKENS = (1 << 24) + 24, BLOCK = 8, NEAR = 64, ENTRIES = TOKENS / BLOCK };
    static const uint32_t lengths[][2] = {{NEAR, 1}};
    const shape s = {.dtype = dtype,
                     .heads = 4,
                     .kv_heads = 1,
                     .head_dim = 64,
                     .block_tokens = BLOCK,
                     .layers = 1};
    rng r = {29};
    problem_new(p, s, lengths, 1, &r);
    problem_vary(p, (variety){.window = 16, .alibi = true}, &r);
    p->alibi[0] = 0.5f;
    *table = malloc(ENTRIES * sizeof **table);
    for (uint32_t i = 0; i < ENTRIES; i++) /* the last token is the last of both */
        (*table)[ENTRIES - 1 - i] = p->tables[0][(NEAR / BLOCK - 1 - i % (NEAR / BLOCK))];
    p->seqs[0].blocks = *table;
    p->seqs[0].kv_tokens = TOKENS;
    return s;
}

/* Lengths (cached + new, new) around every border: block, tile (16), part (1024). */
static const uint32_t mixed[][2] = {{1, 1},    {2, 1},    {15, 1},   {16, 16},   {17, 3},
                                    {63, 1},   {64, 64},  {65, 2},   {129, 100}, {1023, 1},
                                    {1024, 1}, {1025, 1}, {1030, 9}, {2100, 10}};
#define MIXED (sizeof mixed / sizeof *mixed)

#endif
