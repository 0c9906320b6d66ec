/*
 * What goes into an item's rows and what comes out of them, for attention_kernel.inc.h: q, states
 * of the softmax, which are merged, and the output.
 */
#include <float.h>

/* The running maximum before any score. It is finite, so that a score of -infinity less the maximum
 * is -infinity, whose weight is 0, and not NaN. */
#define LEAST_MAX (-FLT_MAX)

static void reset(const ts_attention_state *state, uint32_t rows, uint32_t padded)
{
    for (uint32_t r = 0; r < rows; r++)
        state->max[r] = LEAST_MAX;
    memset(state->sum, 0, rows * sizeof(float));
    memset(state->acc, 0, (size_t)rows * padded * sizeof(float));
}

/* all = all merged with part; a row of `part` that gave no token any weight changes nothing. */
static void merge_state(const ts_attention_state *all, const ts_attention_state *part,
                        uint32_t rows, uint32_t padded)
{
    for (uint32_t r = 0; r < rows; r++) {
        if (part->sum[r] == 0.0f)
            continue;
        float *a = all->acc + (size_t)r * padded;
        const float *b = part->acc + (size_t)r * padded;
        if (all->sum[r] == 0.0f) {
            all->max[r] = part->max[r];
            all->sum[r] = part->sum[r];
            memcpy(a, b, padded * sizeof(float));
            continue;
        }
        float max = all->max[r] > part->max[r] ? all->max[r] : part->max[r];
        float x = exp2_scalar(all->max[r] - max), y = exp2_scalar(part->max[r] - max);
        all->max[r] = max;
        all->sum[r] = all->sum[r] * x + part->sum[r] * y;
        for (uint32_t d = 0; d < padded; d += VL)
            store(a + d, load(a + d) * x + load(b + d) * y);
    }
}

/* q of the item's rows, turned, times scale * log2(e) and K's own scale, padded with zeros. */
static void load_queries(ts_dtype dtype, const ts_attention_item *item, float *q)
{
    const ts_attention_call *call = item->call;
    const ts_rope *rope = &call->variant.rope;
    const uint32_t head_dim = call->geometry.head_dim, padded = ts_attention_padded(head_dim);
    const uint32_t group = call->heads / call->geometry.kv_heads;
    const float *scales = item->seq->scales;
    float table[TS_HEAD_DIM_MAX], row[TS_HEAD_DIM_MAX];
    for (uint32_t i = 0; i < item->q_count; i++) {
        if (rope->theta != 0)
            ts_rope_table(rope, item->seq->kv_tokens - item->seq->q_tokens + item->q_first + i,
                          table);
        for (uint32_t h = 0; h < item->head_count; h++) {
            float scale = call->variant.scale * LOG2E;
            if (scales != NULL)
                scale *= scales[item->head_first + h];
            if (is_fp8_quads(dtype))
                scale *= FP8_UNIT;
            for (uint32_t j = 0; j < group; j++) {
                size_t from = ((size_t)(item->q_first + i) * call->heads +
                               (size_t)(item->head_first + h) * group + j) *
                              head_dim;
                float *to = q + ((size_t)(h * item->q_count + i) * group + j) * padded;
                ts_load_elements(item->seq->q, call->io_dtype, from, head_dim, row);
                if (rope->theta != 0)
                    ts_rope_turn(rope, table, row);
                for (uint32_t d = 0; d < head_dim; d++)
                    to[place_of(dtype, d)] = row[d] * scale;
                memset(to + head_dim, 0, (padded - head_dim) * sizeof(float));
            }
        }
    }
}

static void write_out(ts_dtype dtype, const ts_attention_item *item,
                      const ts_attention_state *state)
{
    const ts_attention_call *call = item->call;
    const uint32_t head_dim = call->geometry.head_dim, padded = ts_attention_padded(head_dim);
    const uint32_t group = call->heads / call->geometry.kv_heads;
    uint32_t r = 0;
    for (uint32_t h = 0; h < item->head_count; h++)
        for (uint32_t i = 0; i < item->q_count; i++)
            for (uint32_t j = 0; j < group; j++, r++) {
                size_t to = ((size_t)(item->q_first + i) * call->heads +
                             (size_t)(item->head_first + h) * group + j) *
                            head_dim;
                const float *acc = state->acc + (size_t)r * padded;
                uint32_t head = (item->head_first + h) * group + j;
                /* A sum of 0: every score is -infinity, and the row is 0. */
                const bool none = state->sum[r] == 0.0f;
                float inverse = none ? 0.0f : 1.0f / state->sum[r];
                if (item->seq->lse != NULL)
                    item->seq->lse[(size_t)(item->q_first + i) * call->heads + head] =
                        (state->max[r] + log2f(state->sum[r])) / LOG2E;
                if (item->seq->sinks != NULL && !none) {
                    float sink = item->seq->sinks[head] * LOG2E;
                    float max = sink > state->max[r] ? sink : state->max[r];
                    float shrink = exp2_scalar(state->max[r] - max);
                    inverse = shrink / (state->sum[r] * shrink + exp2_scalar(sink - max));
                }
                if (item->seq->scales != NULL) /* V's */
                    inverse *= item->seq->scales[call->geometry.kv_heads + item->head_first + h];
                if (is_fp8_quads(dtype))
                    inverse *= FP8_UNIT;
                float row[TS_HEAD_DIM_MAX];
                for (uint32_t d = 0; d < head_dim; d++)
                    row[d] = acc[place_of(dtype, d)] * inverse;
                ts_store_elements(item->seq->out, call->io_dtype, to, head_dim, row);
            }
}

static ts_attention_state partial_at(const ts_attention_item *item, uint32_t part, uint32_t rows,
                                     uint32_t head_dim)
{
    float *p =
        item->partials + (part - item->first_seen) * ts_attention_partial_floats(rows, head_dim);
    return (ts_attention_state){.max = p, .sum = p + rows, .acc = p + 2 * (size_t)rows};
}
