/* The float64 reference: one query, one head, one token at a time. Slow and plain on purpose. */
#include "attention.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double element(const void *row, ts_dtype dtype, size_t i)
{
    switch (dtype) {
    case TS_DTYPE_FP32:
        return ((const float *)row)[i];
    case TS_DTYPE_FP16:
        return ts_fp16_to_fp32(((const uint16_t *)row)[i]);
    case TS_DTYPE_BF16:
        return ts_bf16_to_fp32(((const uint16_t *)row)[i]);
    }
    return NAN;
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
            double max = -INFINITY, sum = 0;
            for (uint32_t t = first; t <= position; t++) {
                const unsigned char *k =
                    head + seq->blocks[t / g->block_tokens] * ts_geometry_block_bytes(g) +
                    t % g->block_tokens * ts_geometry_token_stride(g);
                double score = 0;
                for (uint32_t d = 0; d < g->head_dim; d++)
                    score += element(seq->q, call->io_dtype, row + d) * element(k, g->dtype, d);
                score *= (double)variant->scale;
                if (variant->soft_cap > 0)
                    score = (double)variant->soft_cap * tanh(score / (double)variant->soft_cap);
                if (seq->alibi != NULL)
                    score += (double)seq->alibi[h] * ((double)t - (double)position);
                weights[t] = score;
                max = fmax(max, score);
            }
            for (uint32_t t = first; t <= position; t++)
                sum += weights[t] = exp(weights[t] - max);
            if (lse != NULL)
                lse[(size_t)qi * call->heads + h] = log(sum) + max;
            if (seq->sinks != NULL)
                sum += exp((double)seq->sinks[h] - max);
            memset(out + row, 0, g->head_dim * sizeof *out);
            for (uint32_t t = first; t <= position; t++) {
                const unsigned char *v =
                    head + plane + seq->blocks[t / g->block_tokens] * ts_geometry_block_bytes(g) +
                    t % g->block_tokens * ts_geometry_token_stride(g);
                for (uint32_t d = 0; d < g->head_dim; d++)
                    out[row + d] += weights[t] / sum * element(v, g->dtype, d);
            }
        }
    }
    free(weights);
    return TS_OK;
}
