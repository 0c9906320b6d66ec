/*
 * fp8 on the tile unit, 64 tokens of a KV head at once (attention_amx.h), for the rows that see all
 * of them; the others, and tokens that don't fill 64, take attend_tile's way. Which it is depends
 * on the row and on the tokens' positions alone, so the bits do too. While one head's scores are
 * multiplied its V is widened, and while its V is weighed the next head's K is.
 */
#include "attention_amx.h"

/* Where the parts of a thread's scratch memory for tiles are. */
INLINE void *tiles_k(const ts_attention_scratch *scratch)
{
    return scratch->tiles;
}

INLINE void *tiles_v(const ts_attention_scratch *scratch, uint32_t head_dim)
{
    return scratch->tiles + ts_amx_tokens_bytes(head_dim);
}

INLINE void *tiles_q(const ts_attention_scratch *scratch, uint32_t head_dim, uint32_t index)
{
    return scratch->tiles + 2 * ts_amx_tokens_bytes(head_dim) + index * ts_amx_rows_bytes(head_dim);
}

INLINE uint32_t row_chunks(uint32_t rows)
{
    return (rows + TS_AMX_ROWS - 1) / TS_AMX_ROWS;
}

static void load_query_tiles(const ts_attention_item *item, const ts_attention_scratch *scratch)
{
    const uint32_t head_dim = item->call->geometry.head_dim;
    const uint32_t padded = ts_attention_padded(head_dim);
    const uint32_t rows = ts_attention_item_rows(item) / item->head_count;
    for (uint32_t h = 0; h < item->head_count; h++)
        for (uint32_t r = 0; r < rows; r += TS_AMX_ROWS)
            ts_amx_load_queries(scratch->q + ((size_t)h * rows + r) * padded,
                                rows - r < TS_AMX_ROWS ? rows - r : TS_AMX_ROWS, padded, head_dim,
                                tiles_q(scratch, head_dim, h * row_chunks(rows) + r / TS_AMX_ROWS));
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

/* One KV head, for the rows that see all of the tile, whose K is widened already. k: the next
 * head's, or NULL. */
INLINE void attend_whole(const ts_attention_item *item, uint32_t h, uint32_t tile,
                         uint32_t first_row, uint32_t end_row, const ts_attention_scratch *scratch,
                         const ts_attention_state *state, const ts_amx_rows *k,
                         const ts_amx_rows *v)
{
    const ts_attention_call *call = item->call;
    const bool varied = call->variant.soft_cap > 0 || item->seq->alibi != NULL;
    const uint32_t head_dim = call->geometry.head_dim, padded = ts_attention_padded(head_dim);
    const uint32_t group = call->heads / call->geometry.kv_heads, rows = item->q_count * group;
    const uint32_t first = item->seq->kv_tokens - item->seq->q_tokens + item->q_first;
    const uint32_t chunks = row_chunks(end_row);
    for (uint32_t c = first_row / TS_AMX_ROWS; c < chunks; c++) {
        _Alignas(64) float s[TS_AMX_ROWS * TS_AMX_TOKENS];
        uint32_t begin = c * TS_AMX_ROWS, from = begin < first_row ? first_row : begin;
        uint32_t to = begin + TS_AMX_ROWS < end_row ? begin + TS_AMX_ROWS : end_row;
        ts_amx_score(tiles_k(scratch), tiles_q(scratch, head_dim, h * row_chunks(rows) + c),
                     head_dim, s, from == first_row ? v : NULL);
        for (uint32_t r = from; r < to; r++) {
            float *row = s + (r - begin) * TS_AMX_TOKENS;
            for (uint32_t t = 0; t < TS_AMX_TOKENS && varied; t += TS_TILE)
                vary_scores(item, row + t, TS_TILE, (item->head_first + h) * group + r % group,
                            tile + t, first + r / group);
            size_t i = (size_t)h * rows + r;
            soften_row(row, TS_AMX_TOKENS, head_dim, &state->max[i], scratch->sums + i * VL,
                       state->acc + i * padded);
        }
        ts_amx_weigh(tiles_v(scratch, head_dim), s, from - begin, to - begin, head_dim,
                     state->acc + ((size_t)h * rows + from) * padded, padded,
                     c + 1 == chunks ? k : NULL);
    }
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
    uint32_t start = begin_part(item, part, scratch, state, &part_end);
    start = start / TS_AMX_TOKENS * TS_AMX_TOKENS;
    const unsigned char *addresses[2][TS_AMX_TOKENS];
    static const fetch nothing;
    ts_streams next = {.tokens = TS_AMX_TOKENS, .item = item};
    if (start < part_end)
        find_rows(item, start, item_end, addresses[0]);
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
        ts_amx_rows k = {.rows = addresses[turn], .next = &next, .tiles = tiles_k(scratch)};
        ts_amx_rows v = {
            .rows = addresses[turn], .next = &next, .tiles = tiles_v(scratch, head_dim)};
        if (first_row < end_row) {
            k.offset = item->head_first * head_stride;
            ts_amx_widen_k(&k, head_dim);
        }
        for (uint32_t h = 0; h < item->head_count; h++) {
            v.offset = plane + (item->head_first + h) * head_stride;
            k.offset = (item->head_first + h + 1) * head_stride;
            if (first_row < end_row)
                attend_whole(item, h, tile, first_row, end_row, scratch, state,
                             h + 1 < item->head_count ? &k : NULL, &v);
            for (uint32_t t = 0; t < TS_AMX_TOKENS && tile + t < part_end; t += TS_TILE) {
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
