#include "append.h"

#include "convert.h"

#include <string.h>

/* Writes a row of K or V: of the cache's type, divided by `scale`. table: K's angles; NULL: it
 * isn't turned. */
static void write_row(const ts_attention_call *call, unsigned char *to, const void *from,
                      size_t first, float scale, const float *table)
{
    ts_dtype to_type = call->geometry.dtype;
    uint32_t count = call->geometry.head_dim;
    if (to_type == call->io_dtype && table == NULL) {
        size_t bytes = ts_dtype_bytes(to_type);
        memcpy(to, (const unsigned char *)from + first * bytes, count * bytes);
        return;
    }
    float row[TS_HEAD_DIM_MAX];
    ts_load_elements(from, call->io_dtype, first, count, row);
    if (table != NULL)
        ts_rope_turn(&call->variant.rope, table, row);
    for (uint32_t i = 0; i < count && scale != 1; i++)
        row[i] /= scale;
    ts_store_elements(to, to_type, 0, count, row);
}

void ts_append_tokens(const ts_attention_call *call, const ts_attention_seq *seq, uint32_t first,
                      uint32_t count)
{
    const ts_geometry *g = &call->geometry;
    size_t plane = ts_geometry_plane_bytes(g);
    const ts_rope *rope = &call->variant.rope;
    float table[TS_HEAD_DIM_MAX];
    for (uint32_t i = first; i < first + count; i++) {
        uint32_t token = seq->kv_tokens - seq->q_tokens + i;
        if (rope->theta != 0)
            ts_rope_table(rope, token, table);
        unsigned char *row =
            call->base + seq->blocks[token / g->block_tokens] * ts_geometry_block_bytes(g) +
            (size_t)seq->layer * 2 * plane + token % g->block_tokens * ts_geometry_token_stride(g);
        for (uint32_t h = 0; h < g->kv_heads; h++) {
            size_t from = ((size_t)i * g->kv_heads + h) * g->head_dim;
            unsigned char *to = row + h * ts_geometry_head_stride(g);
            const float *scales = seq->scales;
            write_row(call, to, seq->k, from, scales == NULL ? 1 : scales[h],
                      rope->theta != 0 ? table : NULL);
            write_row(call, to + plane, seq->v, from, scales == NULL ? 1 : scales[g->kv_heads + h],
                      NULL);
        }
    }
}
