/*
 * fp8 and bf16 on the tile unit (attention_amx.h), runs of tokens of a KV head at once, for the
 * rows that see all of a run; the others see it in tiles of 64 tokens, and what they don't see all
 * of takes attend_tile's way. Which it is depends on the row, on the tokens' positions and on the
 * geometry and the number of heads alone, so the bits do too. While something is multiplied what
 * comes next is widened.
 */
#include "attention_amx.h"

static size_t token_bytes(const ts_geometry *g)
{
    return 2 * (size_t)g->kv_heads * g->head_dim * ts_dtype_bytes(g->dtype);
}

/* Tokens of a run. */
static uint32_t run_tokens(const ts_geometry *g)
{
    uint32_t tokens = TS_AMX_RUN;
    while (tokens > TS_AMX_TOKENS && tokens * token_bytes(g) > TS_AMX_RUN_BYTES)
        tokens /= 2;
    return tokens;
}

/* A thread's scratch memory for tiles; a chunk is one of a KV head's rows of q. */
typedef struct tiles {
    ts_amx_work *work;
    float *scores; /* [rows of a KV head, in whole chunks][tokens] */
    char *weights; /* of each chunk */
    char *q;       /* of each KV head, of each chunk */
} tiles;

static tiles tiles_of(const ts_attention_scratch *scratch, uint32_t head_rows)
{
    const uint32_t chunks = ts_amx_chunks(head_rows);
    char *scores = scratch->tiles + sizeof(ts_amx_work);
    char *weights = scores + chunks * TS_AMX_CHUNK_SCORES;
    return (tiles){.work = (ts_amx_work *)(void *)scratch->tiles,
                   .scores = (float *)(void *)scores,
                   .weights = weights,
                   .q = weights + chunks * TS_AMX_CHUNK_WEIGHTS};
}

static void load_query_tiles(const ts_attention_item *item, const ts_attention_scratch *scratch)
{
    const uint32_t head_dim = item->call->geometry.head_dim;
    const uint32_t padded = ts_attention_padded(head_dim);
    const uint32_t rows = ts_attention_item_rows(item) / item->head_count;
    char *q = tiles_of(scratch, rows).q;
    for (uint32_t h = 0; h < item->head_count; h++)
        for (uint32_t r = 0; r < rows; r += TS_AMX_ROWS, q += ts_amx_chunk_bytes(head_dim))
            ts_amx_load_queries(
                item->call->geometry.dtype, scratch->q + ((size_t)h * rows + r) * padded,
                rows - r < TS_AMX_ROWS ? rows - r : TS_AMX_ROWS, padded, head_dim, q);
}

/* Tokens of the sequence that are attended to together. */
typedef struct span {
    uint32_t start, tokens; /* whole tiles */
    const unsigned char *const *rows;
    uint32_t from, end; /* what the item's rows see of the part */
} span;

/* One KV head, for the rows that see all of the span, of whose K the first unit is widened
 * already. next_k: the next head's, or NULL. */
INLINE void attend_whole(const ts_attention_item *item, uint32_t h, const span *span,
                         uint32_t first_row, uint32_t end_row, const ts_attention_scratch *scratch,
                         const ts_attention_state *state, const ts_amx_rows *k,
                         const ts_amx_rows *v, const ts_amx_rows *next_k)
{
    const ts_attention_call *call = item->call;
    const bool varied = ts_attention_is_varied(&call->variant, item->seq->alibi);
    const uint32_t head_dim = call->geometry.head_dim, padded = ts_attention_padded(head_dim);
    const uint32_t group = call->heads / call->geometry.kv_heads, rows = item->q_count * group;
    const uint32_t first = item->seq->kv_tokens - item->seq->q_tokens + item->q_first;
    const uint32_t chunk = first_row / TS_AMX_ROWS, chunks = ts_amx_chunks(end_row) - chunk;
    const uint32_t tokens = span->tokens;
    const tiles t = tiles_of(scratch, rows);
    float *scores = t.scores + (size_t)chunk * TS_AMX_ROWS * tokens;
    ts_amx_score(t.work, k, v,
                 t.q + (h * ts_amx_chunks(rows) + chunk) * ts_amx_chunk_bytes(head_dim), chunks,
                 head_dim, tokens, scores);
    for (uint32_t r = first_row; r < end_row; r++) {
        float *row = t.scores + (size_t)r * tokens;
        for (uint32_t i = 0; i < tokens && varied; i += TS_TILE)
            apply_score_mods(item, row + i, TS_TILE, (item->head_first + h) * group + r % group,
                             span->start + i, first + r / group);
        size_t i = (size_t)h * rows + r;
        softmax_update(row, tokens, head_dim, &state->max[i], scratch->sums + i * VL,
                       state->acc + i * padded);
        if (r == (first_row + end_row) / 2) /* while a row waits for itself */
            ts_amx_widen_part(t.work, v, chunks, head_dim, 0);
    }
    ts_amx_split_weights(scores, chunks, tokens, t.weights + ts_amx_weights_bytes(chunk, tokens));
    ts_amx_widen_part(t.work, v, chunks, head_dim, 1);
    ts_amx_weigh(t.work, v, next_k, t.weights, first_row, end_row, head_dim, tokens,
                 state->acc + (size_t)h * rows * padded, padded);
}

/* attend_head of bf16 in pairs, where nothing is fetched. */
NOINLINE void attend_head_pairs(const ts_attention_item *item, const unsigned char *const *rows,
                                uint32_t h, uint32_t tile, uint32_t first_row, uint32_t end_row,
                                const ts_attention_scratch *scratch,
                                const ts_attention_state *state)
{
    static const fetch nothing;
    attend_head(BF16_PAIRS, item, rows, h, tile, first_row, end_row, scratch, state, &nothing);
}

/* Rows from_row..to_row - 1 of each KV head with a tile, 16 tokens at a time. */
static void attend_narrow(const ts_attention_item *item, const span *span, uint32_t from_row,
                          uint32_t to_row, const ts_attention_scratch *scratch,
                          const ts_attention_state *state)
{
    static const fetch nothing;
    for (uint32_t h = 0; h < item->head_count && from_row < to_row; h++)
        for (uint32_t t = 0; t < span->tokens && span->start + t < span->end; t += TS_TILE) {
            if (span->start + t < span->from)
                continue;
            if (item->call->geometry.dtype == TS_DTYPE_BF16)
                attend_head_pairs(item, span->rows + t, h, span->start + t, from_row, to_row,
                                  scratch, state);
            else
                attend_head_fp8_quads(item, span->rows + t, h, span->start + t, from_row, to_row,
                                      scratch, state, &nothing);
        }
}

/* Rows from_row..to_row - 1 of each KV head with a span: those that see all of it together, the
 * others in smaller ones. */
static void attend_span(const ts_attention_item *item, const span *span, uint32_t from_row,
                        uint32_t to_row, const ts_attention_scratch *scratch,
                        const ts_attention_state *state, ts_streams *next)
{
    const ts_attention_variant *variant = &item->call->variant;
    const ts_geometry *g = &item->call->geometry;
    const size_t plane = ts_geometry_plane_bytes(g), head_stride = ts_geometry_head_stride(g);
    const uint32_t rows = ts_attention_item_rows(item) / item->head_count;
    const uint32_t group = rows / item->q_count;
    const uint32_t first = item->seq->kv_tokens - item->seq->q_tokens + item->q_first;
    if (from_row == to_row || span->start >= span->end || span->start + span->tokens <= span->from)
        return;
    /* The query tokens that see all of it. */
    uint32_t low = span->start + span->tokens - 1, high = item->q_count;
    low = low <= first ? 0 : low - first < item->q_count ? low - first : item->q_count;
    while (high > low && ts_attention_first_key(variant, first + high - 1) > span->start)
        high--;
    uint32_t first_row = low * group, end_row = high * group;
    first_row = first_row < from_row ? from_row : first_row > to_row ? to_row : first_row;
    end_row = end_row < first_row ? first_row : end_row > to_row ? to_row : end_row;
    if (first_row < end_row) {
        ts_amx_rows k = {
            .rows = span->rows, .offset = item->head_first * head_stride, .next = next};
        ts_amx_widen_first(tiles_of(scratch, rows).work, &k, g->head_dim);
        for (uint32_t h = 0; h < item->head_count; h++) {
            ts_amx_rows v = k, next_k = k;
            v.offset += plane;
            next_k.offset += head_stride;
            attend_whole(item, h, span, first_row, end_row, scratch, state, &k, &v,
                         h + 1 < item->head_count ? &next_k : NULL);
            k = next_k;
        }
    }
    if (span->tokens == TS_AMX_TOKENS) {
        attend_narrow(item, span, from_row, first_row, scratch, state);
        attend_narrow(item, span, end_row, to_row, scratch, state);
        return;
    }
    for (uint32_t t = 0; t < span->tokens; t += TS_AMX_TOKENS) {
        struct span tile = *span;
        tile.start += t;
        tile.rows += t;
        tile.tokens = TS_AMX_TOKENS;
        attend_span(item, &tile, from_row, first_row, scratch, state, next);
        attend_span(item, &tile, end_row, to_row, scratch, state, next);
    }
}

/* Whether one of a row's sums is NaN. */
INLINE bool sums_to_nan(const ts_attention_state *state, uint32_t r, uint32_t padded)
{
    const float *acc = state->acc + (size_t)r * padded;
    vi nan = {0};
    for (uint32_t d = 0; d < padded; d += VL)
        nan |= load(acc + d) != load(acc + d);
    return state->sum[r] != state->sum[r] || any(nan);
}

/*
 * Works out anew, without the tile unit, the rows of a part that came out as NaN. bf16 has
 * infinities, and the unit multiplies an infinity by the three parts of a number, of which one may
 * be 0 or of the other sign; the number itself gives an infinity.
 */
static void attend_nan_rows(const ts_attention_item *item, uint32_t part,
                            const ts_attention_scratch *scratch, const ts_attention_state *state)
{
    const uint32_t padded = ts_attention_padded(item->call->geometry.head_dim);
    const uint32_t head_rows = ts_attention_item_rows(item) / item->head_count;
    uint32_t end;
    const uint32_t start = seen_of_part(item, part, &end);
    for (uint32_t r = 0; r < ts_attention_item_rows(item); r++) {
        if (!sums_to_nan(state, r, padded))
            continue;
        ts_attention_state row = {
            .max = state->max + r, .sum = state->sum + r, .acc = state->acc + (size_t)r * padded};
        reset(&row, 1, padded);
        float *sums = scratch->sums + (size_t)r * VL;
        store(sums, (vf){0});
        for (uint32_t tile = start; tile < end; tile += TS_TILE) {
            const unsigned char *rows[TS_TILE];
            find_rows(item, tile, end, TS_TILE, rows);
            attend_head_pairs(item, rows, r / head_rows, tile, r % head_rows, r % head_rows + 1,
                              scratch, state);
        }
        state->sum[r] = reduce_sum(load(sums));
    }
}

static void attend_part_tiles(const ts_attention_item *item, uint32_t part,
                              const ts_attention_scratch *scratch, const ts_attention_state *state)
{
    const ts_geometry *g = &item->call->geometry;
    const uint32_t rows = ts_attention_item_rows(item) / item->head_count, run = run_tokens(g);
    uint32_t item_end = item->seq->kv_tokens - item->seq->q_tokens + item->q_first + item->q_count;
    if (item_end > item->part_end * TS_PART)
        item_end = item->part_end * TS_PART;
    const unsigned char *addresses[2][TS_AMX_RUN];
    span span = {.tokens = run};
    span.from = begin_part(item, part, scratch, state, &span.end);
    span.start = span.from / run * run;
    ts_streams next = {.tokens = run, .item = item};
    if (span.start < span.end)
        find_rows(item, span.start, item_end, run, addresses[0]);
    /* The first run's rows; the others are fetched by those before. */
    if (span.start < span.end && part == item->part_first) {
        const size_t bytes = run * (token_bytes(g) / g->kv_heads * item->head_count);
        ts_streams_begin(&next, addresses[0]);
        for (uint32_t i = 0; i < bytes / TS_STREAM_STEP; i++)
            ts_streams_ask(&next, i);
    }
    for (uint32_t turn = 0; span.start < span.end; span.start += run, turn ^= 1) {
        const bool more = span.start + run < item_end;
        if (more)
            find_rows(item, span.start + run, item_end, run, addresses[turn ^ 1]);
        ts_streams_begin(&next, more ? addresses[turn ^ 1] : NULL);
        span.rows = addresses[turn];
        attend_span(item, &span, 0, rows, scratch, state, &next);
    }
    end_part(item, scratch, state);
    if (g->dtype == TS_DTYPE_BF16)
        attend_nan_rows(item, part, scratch, state);
}
