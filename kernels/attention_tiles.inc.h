/*
 * fp8 on the tile unit, 64 tokens of a KV head at once (attention_amx.h), for the rows that see all
 * of them; the others, and tokens that don't fill 64, take attend_tile's way. Which it is depends
 * on the row and on the tokens' positions alone, so the bits do too. While something is
 * multiplied what comes next is widened.
 */
#include "attention_amx.h"

/* A thread's scratch memory for tiles. */
typedef struct tiles {
    ts_amx_work *work;
    char *q;       /* of each KV head the tiles of its chunks */
    char *weights; /* of a KV head's chunks */
    float *scores; /* [rows of a KV head, in whole chunks][64] */
} tiles;

static tiles tiles_of(const ts_attention_scratch *scratch, uint32_t head_rows)
{
    const uint32_t chunks = ts_amx_chunks(head_rows);
    char *weights = scratch->tiles + sizeof(ts_amx_work);
    char *scores = weights + chunks * TS_AMX_CHUNK_WEIGHTS;
    return (tiles){.work = (ts_amx_work *)(void *)scratch->tiles,
                   .q = scores + chunks * TS_AMX_CHUNK_SCORES,
                   .weights = weights,
                   .scores = (float *)(void *)scores};
}

static void load_query_tiles(const ts_attention_item *item, const ts_attention_scratch *scratch)
{
    const uint32_t head_dim = item->call->geometry.head_dim;
    const uint32_t padded = ts_attention_padded(head_dim);
    const uint32_t rows = ts_attention_item_rows(item) / item->head_count;
    char *q = tiles_of(scratch, rows).q;
    for (uint32_t h = 0; h < item->head_count; h++)
        for (uint32_t r = 0; r < rows; r += TS_AMX_ROWS, q += ts_amx_chunk_bytes(head_dim))
            ts_amx_load_queries(scratch->q + ((size_t)h * rows + r) * padded,
                                rows - r < TS_AMX_ROWS ? rows - r : TS_AMX_ROWS, padded, head_dim,
                                q);
}

/* Addresses of a tile's rows of K; past the end they repeat the last. */
static void find_rows(const ts_attention_item *item, uint32_t tile, uint32_t end,
                      const unsigned char **rows)
{
    const ts_geometry *g = &item->call->geometry;
    const size_t block_bytes = ts_geometry_block_bytes(g);
    const unsigned char *base =
        item->call->base + (size_t)item->seq->layer * 2 * ts_geometry_plane_bytes(g);
    uint32_t block = tile / g->block_tokens, offset = tile % g->block_tokens;
    for (uint32_t t = 0; t < TS_AMX_TOKENS; t++) {
        if (tile + t >= end) {
            rows[t] = rows[t - 1];
            continue;
        }
        rows[t] =
            base + item->seq->blocks[block] * block_bytes + offset * ts_geometry_token_stride(g);
        if (++offset == g->block_tokens) {
            offset = 0;
            block++;
        }
    }
}

/* One KV head, for the rows that see all of the tile, the first half of whose K is widened already.
 * next_k: the next head's, or NULL. */
INLINE void attend_whole(const ts_attention_item *item, uint32_t h, uint32_t tile,
                         uint32_t first_row, uint32_t end_row, const ts_attention_scratch *scratch,
                         const ts_attention_state *state, const ts_amx_rows *k,
                         const ts_amx_rows *v, const ts_amx_rows *next_k)
{
    const ts_attention_call *call = item->call;
    const bool varied = call->variant.soft_cap > 0 || item->seq->alibi != NULL;
    const uint32_t head_dim = call->geometry.head_dim, padded = ts_attention_padded(head_dim);
    const uint32_t group = call->heads / call->geometry.kv_heads, rows = item->q_count * group;
    const uint32_t first = item->seq->kv_tokens - item->seq->q_tokens + item->q_first;
    const uint32_t chunk = first_row / TS_AMX_ROWS, chunks = ts_amx_chunks(end_row) - chunk;
    const tiles t = tiles_of(scratch, rows);
    float *scores = t.scores + (size_t)chunk * TS_AMX_ROWS * TS_AMX_TOKENS;
    ts_amx_score(t.work, k, v,
                 t.q + (h * ts_amx_chunks(rows) + chunk) * ts_amx_chunk_bytes(head_dim), chunks,
                 head_dim, scores);
    for (uint32_t r = first_row; r < end_row; r++) {
        float *row = t.scores + (size_t)r * TS_AMX_TOKENS;
        for (uint32_t i = 0; i < TS_AMX_TOKENS && varied; i += TS_TILE)
            vary_scores(item, row + i, TS_TILE, (item->head_first + h) * group + r % group,
                        tile + i, first + r / group);
        size_t i = (size_t)h * rows + r;
        soften_row(row, TS_AMX_TOKENS, head_dim, &state->max[i], scratch->sums + i * VL,
                   state->acc + i * padded);
        if (r == (first_row + end_row) / 2) /* while a row waits for itself */
            ts_amx_widen_part(t.work, v, next_k, head_dim, 0);
    }
    ts_amx_split_weights(scores, chunks, t.weights + chunk * TS_AMX_CHUNK_WEIGHTS);
    ts_amx_widen_part(t.work, v, next_k, head_dim, 1);
    ts_amx_weigh(t.work, v, next_k, t.weights, first_row, end_row, head_dim,
                 state->acc + (size_t)h * rows * padded, padded);
}

static void attend_part_tiles(const ts_attention_item *item, uint32_t part,
                              const ts_attention_scratch *scratch, const ts_attention_state *state)
{
    const ts_attention_variant *variant = &item->call->variant;
    const ts_geometry *g = &item->call->geometry;
    const uint32_t head_dim = g->head_dim;
    const size_t plane = ts_geometry_plane_bytes(g), head_stride = ts_geometry_head_stride(g);
    const uint32_t rows = ts_attention_item_rows(item) / item->head_count;
    const uint32_t group = rows / item->q_count;
    const uint32_t first = item->seq->kv_tokens - item->seq->q_tokens + item->q_first;
    uint32_t item_end = first + item->q_count, part_end;
    if (item_end > item->part_end * TS_PART)
        item_end = item->part_end * TS_PART;
    const uint32_t seen_from = begin_part(item, part, scratch, state, &part_end);
    const uint32_t start = seen_from / TS_AMX_TOKENS * TS_AMX_TOKENS;
    const unsigned char *addresses[2][TS_AMX_TOKENS];
    static const fetch nothing;
    ts_streams next = {.tokens = TS_AMX_TOKENS, .item = item};
    if (start < part_end)
        find_rows(item, start, item_end, addresses[0]);
    if (start < part_end && part == item->part_first) { /* the others are fetched by those before */
        const size_t bytes = 2 * TS_AMX_TOKENS * (size_t)item->head_count * head_dim;
        ts_streams_begin(&next, addresses[0]);
        for (uint32_t i = 0; i < bytes / TS_STREAM_STEP; i++)
            ts_streams_ask(&next, i);
    }
    for (uint32_t tile = start, turn = 0; tile < part_end; tile += TS_AMX_TOKENS, turn ^= 1) {
        const bool more = tile + TS_AMX_TOKENS < item_end;
        if (more)
            find_rows(item, tile + TS_AMX_TOKENS, item_end, addresses[turn ^ 1]);
        ts_streams_begin(&next, more ? addresses[turn ^ 1] : NULL);
        /* The query tokens that see all of the tile. */
        uint32_t low = tile + TS_AMX_TOKENS - 1, high = item->q_count;
        low = low <= first ? 0 : low - first < item->q_count ? low - first : item->q_count;
        while (high > low && ts_attention_first_key(variant, first + high - 1) > tile)
            high--;
        const uint32_t first_row = low * group, end_row = high * group;
        ts_amx_rows k = {.rows = addresses[turn], .next = &next}, v = k, next_k = k;
        k.offset = item->head_first * head_stride;
        if (first_row < end_row)
            ts_amx_widen_first(tiles_of(scratch, rows).work, &k, head_dim);
        for (uint32_t h = 0; h < item->head_count; h++) {
            k.offset = (item->head_first + h) * head_stride;
            v.offset = k.offset + plane;
            next_k.offset = k.offset + head_stride;
            if (first_row < end_row)
                attend_whole(item, h, tile, first_row, end_row, scratch, state, &k, &v,
                             h + 1 < item->head_count ? &next_k : NULL);
            for (uint32_t t = 0; t < TS_AMX_TOKENS && tile + t < part_end; t += TS_TILE) {
                if (tile + t < seen_from)
                    continue;
                if (first_row > 0)
                    attend_head(FP8_FOURS, item, addresses[turn] + t, h, tile + t, 0, first_row,
                                scratch, state, &nothing);
                if (end_row < rows)
                    attend_head(FP8_FOURS, item, addresses[turn] + t, h, tile + t, end_row, rows,
                                scratch, state, &nothing);
            }
        }
    }
    end_part(item, scratch, state);
}
