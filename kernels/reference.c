/* The float64 reference: one query, one head, one token at a time. Slow and plain on purpose. */
#include "attention.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

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
        double x = q[a], y = q[b];
        q[a] = x * cos(angle) - y * sin(angle);
        q[b] = x * sin(angle) + y * cos(angle);
    }
}

ts_status ts_attention_reference(const ts_attention_call *call, const ts_attention_seq *seq,
                                 double *out, double *lse)
{
    const ts_geometry *g = &call->geometry;
    const ts_attention_variant *variant = &call->variant;
    size_t plane = ts_geometry_plane_bytes(g);
    uint32_t group = call->heads / g->kv_heads;
    double *weights = malloc(seq->kv_tokens * sizeof *weights);
    if (weights == NULL)
        return TS_ENOMEM;

    for (uint32_t qi = 0; qi < seq->q_tokens; qi++) {
        uint32_t position = seq->kv_tokens - seq->q_tokens + qi;
        uint32_t first = ts_attention_first_key(variant, position);
        for (uint32_t h = 0; h < call->heads; h++) {
            size_t row = ((size_t)qi * call->heads + h) * g->head_dim;
            const unsigned char *head = call->base + (size_t)seq->layer * 2 * plane +
                                        (h / group) * ts_geometry_head_stride(g);
            double max = -INFINITY, sum = 0, q[TS_HEAD_DIM_MAX];
            double k_scale = seq->scales == NULL ? 1 : (double)seq->scales[h / group];
            double v_scale = seq->scales == NULL ? 1 : (double)seq->scales[g->kv_heads + h / group];
            query_row(call, seq, row, position, q);
            for (uint32_t t = first; t <= position; t++) {
                const unsigned char *k =
                    head + seq->blocks[t / g->block_tokens] * ts_geometry_block_bytes(g) +
                    t % g->block_tokens * ts_geometry_token_stride(g);
                double score = 0;
                for (uint32_t d = 0; d < g->head_dim; d++)
                    score += q[d] * (double)ts_element(k, g->dtype, d);
                score *= k_scale * (double)variant->scale;
                if (variant->soft_cap > 0)
                    score = (double)variant->soft_cap * tanh(score / (double)variant->soft_cap);
                if (seq->alibi != NULL)
                    score += (double)seq->alibi[h] * ((double)t - (double)position);
                weights[t] = score;
                max = fmax(max, score);
            }
            if (isinf(max) && max < 0) /* every key is hidden: the weights are 0 */
                max = 0;
            for (uint32_t t = first; t <= position; t++)
                sum += weights[t] = exp(weights[t] - max);
            if (lse != NULL)
                lse[(size_t)qi * call->heads + h] = log(sum) + max;
            if (seq->sinks != NULL)
                sum += exp((double)seq->sinks[h] - max);
            if (sum == 0) /* 0 / 1 in place of 0 / 0 */
                sum = 1;
            memset(out + row, 0, g->head_dim * sizeof *out);
            for (uint32_t t = first; t <= position; t++) {
                const unsigned char *v =
                    head + plane + seq->blocks[t / g->block_tokens] * ts_geometry_block_bytes(g) +
                    t % g->block_tokens * ts_geometry_token_stride(g);
                for (uint32_t d = 0; d < g->head_dim; d++)
                    out[row + d] += weights[t] / sum * (double)ts_element(v, g->dtype, d) * v_scale;
            }
        }
    }
    free(weights);
    return TS_OK;
}
