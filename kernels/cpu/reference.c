/* The float64 reference: plain on purpose, one query and one head at a time. K and V of a head are
 * decoded once, K by tiles in which equal elements of neighbouring tokens lie side by side, so that
 * a compiler vectorises over tokens and each sum keeps its order. */
#include "attention.h"

#include "convert.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TILE = 256 }; /* tokens */

/* Wider vectors where the processor has them, of the same bits: tests wait for the reference. */
#if defined(__x86_64__)
#define WIDE_VECTORS __attribute__((target_clones("avx2", "default")))
#else
#define WIDE_VECTORS
#endif

/* The tokens of one KV head that a sequence's rows see, decoded. */
typedef struct decoded_head {
    uint32_t first;  /* token, a multiple of TILE */
    double *keys;    /* [tile][element][token] */
    double *values;  /* [token][element] */
    double *weights; /* of one row, [token] */
} decoded_head;

/* One row of q, turned as rope.h says. */
static void query_row(const ts_attention_call *call, const ts_attention_seq *seq, size_t first,
                      uint32_t position, double *q)
{
    const ts_rope *r = &call->variant.rope;
    for (uint32_t d = 0; d < call->geometry.head_dim; d++)
        q[d] = (double)ts_element(seq->q, call->io_dtype, first + d);
    for (uint32_t i = 0; r->theta != 0 && i < r->dims / 2; i++) {
        double angle = position * pow((double)r->theta, -2.0 * i / r->dims);
        uint32_t a = ts_rope_first(r, i), b = ts_rope_second(r, i);
        /* NOLINTNEXTLINE(clang-analyzer-core.uninitialized.Assign): pairs lie in head_dim */
        double x = q[a], y = q[b];
        q[a] = x * cos(angle) - y * sin(angle);
        q[b] = x * sin(angle) + y * cos(angle);
    }
}

static void decode_head(const ts_attention_call *call, const ts_attention_seq *seq,
                        uint32_t kv_head, decoded_head *d)
{
    const ts_geometry *g = &call->geometry;
    const size_t plane = ts_geometry_plane_bytes(g);
    const uint32_t seen = ts_attention_first_key(&call->variant, seq->kv_tokens - seq->q_tokens);
    for (uint32_t t = seen; t < seq->kv_tokens; t++) {
        const unsigned char *k = call->base + (size_t)seq->layer * 2 * plane +
                                 seq->blocks[t / g->block_tokens] * ts_geometry_block_bytes(g) +
                                 t % g->block_tokens * ts_geometry_token_stride(g) +
                                 kv_head * ts_geometry_head_stride(g);
        const size_t i = t - d->first;
        double *key = d->keys + i / TILE * TILE * g->head_dim + i % TILE;
        for (uint32_t e = 0; e < g->head_dim; e++) {
            key[(size_t)e * TILE] = (double)ts_element(k, g->dtype, e);
            d->values[i * g->head_dim + e] = (double)ts_element(k + plane, g->dtype, e);
        }
    }
}

/* One row: the query token at `position`, one head. `scales` are K's and V's. */
WIDE_VECTORS static void attend_row(const ts_attention_call *call, const ts_attention_seq *seq,
                                    uint32_t head, uint32_t position, const double *q,
                                    const double scales[2], const decoded_head *d, double *out,
                                    double *lse)
{
    const ts_attention_variant *variant = &call->variant;
    const uint32_t head_dim = call->geometry.head_dim;
    const uint32_t first = ts_attention_first_key(variant, position);
    double *weights = d->weights, max = -INFINITY, sum = 0;
    for (size_t tile = (first - d->first) / TILE; tile <= (position - d->first) / TILE; tile++) {
        double *scores = weights + tile * TILE;
        size_t count = position - d->first + 1 - tile * TILE; /* tokens that are seen */
        count = count < TILE ? (count + 7) / 8 * 8 : TILE;
        memset(scores, 0, count * sizeof *scores);
        for (uint32_t e = 0; e < head_dim; e++)
            for (size_t t = 0; t < count; t++)
                scores[t] += q[e] * d->keys[(tile * head_dim + e) * TILE + t];
    }
    for (uint32_t t = first; t <= position; t++) {
        double score = weights[t - d->first] * (scales[0] * (double)variant->scale);
        if (variant->soft_cap > 0)
            score = (double)variant->soft_cap * tanh(score / (double)variant->soft_cap);
        if (seq->alibi != NULL)
            score += (double)seq->alibi[head] * ((double)t - (double)position);
        weights[t - d->first] = score;
        max = fmax(max, score);
    }
    if (isinf(max) && max < 0) /* every key is hidden: the weights are 0 */
        max = 0;
    for (uint32_t t = first; t <= position; t++)
        sum += weights[t - d->first] = exp(weights[t - d->first] - max);
    if (lse != NULL)
        *lse = log(sum) + max;
    if (seq->sinks != NULL)
        sum += exp((double)seq->sinks[head] - max);
    if (sum == 0) /* 0 / 1 in place of 0 / 0 */
        sum = 1;
    memset(out, 0, head_dim * sizeof *out);
    for (uint32_t t = first; t <= position; t++) {
        const double *value = d->values + (size_t)(t - d->first) * head_dim;
        const double weight = weights[t - d->first] / sum;
        for (uint32_t e = 0; e < head_dim; e++)
            out[e] += weight * value[e] * scales[1];
    }
}

ts_status ts_attention_reference(const ts_attention_call *call, const ts_attention_seq *seq,
                                 double *out, double *lse)
{
    const ts_geometry *g = &call->geometry;
    const uint32_t before = seq->kv_tokens - seq->q_tokens; /* tokens before the rows' own */
    if (seq->q_tokens == 0)
        return TS_OK;
    decoded_head d = {.first = ts_attention_first_key(&call->variant, before) / TILE * TILE};
    const size_t tokens = ((size_t)seq->kv_tokens - d.first + TILE - 1) / TILE * TILE;
    d.keys = calloc(tokens * g->head_dim, sizeof *d.keys); /* 0 where no token is */
    d.values = malloc(tokens * g->head_dim * sizeof *d.values);
    d.weights = malloc(tokens * sizeof *d.weights);
    ts_status status = d.keys != NULL && d.values != NULL && d.weights != NULL ? TS_OK : TS_ENOMEM;
    const uint32_t group = call->heads / g->kv_heads;
    for (uint32_t h = 0; status == TS_OK && h < call->heads; h++) {
        const uint32_t kv_head = h / group;
        const double scales[2] = {seq->scales == NULL ? 1 : (double)seq->scales[kv_head],
                                  seq->scales == NULL ? 1
                                                      : (double)seq->scales[g->kv_heads + kv_head]};
        if (h % group == 0)
            decode_head(call, seq, kv_head, &d);
        for (uint32_t i = 0; i < seq->q_tokens; i++) {
            const size_t row = (size_t)i * call->heads + h;
            double q[TS_HEAD_DIM_MAX];
            query_row(call, seq, row * g->head_dim, before + i, q);
            attend_row(call, seq, h, before + i, q, scales, &d, out + row * g->head_dim,
                       lse == NULL ? NULL : lse + row);
        }
    }
    free(d.keys);
    free(d.values);
    free(d.weights);
    return status;
}
