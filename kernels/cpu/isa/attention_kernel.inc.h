/*
 * The host attention kernels, written once in vectors of VL floats (GCC's and Clang's vector
 * extensions) and compiled once for each instruction set. The including file defines VL,
 * FMA(a,b,c), TS_ATTENTION_OPS, what attention_vectors.inc.h takes beside them, and may define
 * TS_ATTENTION_OTHERS: operations that have all but fp8 in quads, which alone is compiled then; and
 * TS_ATTENTION_TILES: the name of operations that use the tile unit where they can.
 *
 * An item goes over its tokens in tiles of 16. For each KV head of a tile: scores = q·K for up to 4
 * rows that share each read of K, one online-softmax update per row, then acc += p·V, again 4 rows
 * to a read of V. Every sum has one fixed order per (row, token), so how rows are grouped does not
 * show in the bits: see attention.h.
 */
#include "attention_vectors.inc.h"

#include "attention_products.inc.h"

INLINE bool any(vi mask)
{
#if VL == 16
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif VL == 8
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

/*
 * One row's softmax update: turns `tokens` scores into weights. The running maximum moves, and what
 * was summed so far shrinks, only when a score passes it, which soon becomes rare. row_sums has one
 * sum for each lane.
 */
INLINE void softmax_update(float *s, uint32_t tokens, uint32_t head_dim, float *row_max,
                           float *row_sums, float *acc)
{
    static const int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    uint32_t used = (tokens + VL - 1) / VL * VL;
    if (tokens < used) {
        vi lane;
        memcpy(&lane, lanes, sizeof lane);
        vi in = lane < (vi){0} + (int32_t)(tokens + VL - used);
        store(s + used - VL, choose(in, load(s + used - VL), broadcast(-INFINITY)));
    }
    vf base = broadcast(*row_max), best = base;
    for (uint32_t t = 0; t < used; t += VL)
        best = maximum(best, load(s + t));
    vf sums = load(row_sums);
    if (any(best > base)) {
        float max = reduce_max(best);
        float shrink = exp2_scalar(*row_max - max);
        sums *= shrink;
        for (uint32_t d = 0; d < head_dim; d += VL)
            store(acc + d, load(acc + d) * shrink);
        *row_max = max;
        base = broadcast(max);
    }
    for (uint32_t t = 0; t < used; t += VL) {
        vf weight = exp2_negative(load(s + t) - base);
        store(s + t, weight);
        sums += weight;
    }
    store(row_sums, sums);
}

#include "attention_score_mods.inc.h"

/* One KV head of one tile, for rows first_row..end_row - 1. */
INLINE void attend_tile(ts_dtype dtype, const ts_attention_item *item,
                        const unsigned char *const *rows, size_t k_offset, size_t v_offset,
                        uint32_t tile, uint32_t first_head, uint32_t first_row, uint32_t end_row,
                        const float *q, float *scores, float *max, float *sums, float *acc,
                        const fetch *next)
{
    const ts_attention_variant *variant = &item->call->variant;
    const bool varied = ts_attention_is_varied(variant, item->seq->alibi);
    const uint32_t head_dim = item->call->geometry.head_dim;
    const uint32_t padded = ts_attention_padded(head_dim);
    const uint32_t group = item->call->heads / item->call->geometry.kv_heads;
    static const fetch nothing;
    const uint32_t first = item->seq->kv_tokens - item->seq->q_tokens + item->q_first;

    for (uint32_t r = first_row; r < end_row;) {
        /* Tokens of this tile that the first and the last row of the next four may see. */
        uint32_t n = end_row - r >= 4 ? 4 : end_row - r >= 2 ? 2 : 1;
        uint32_t low = first + r / group + 1, high = first + (r + n - 1) / group + 1;
        /* ... and the first of them that the first and the last row see. */
        uint32_t from = ts_attention_first_key(variant, low - 1);
        uint32_t last_from = ts_attention_first_key(variant, high - 1);
        if (high <= tile || from >= tile + TS_TILE) {
            r += n;
            continue;
        }
        from = from <= tile ? 0 : from - tile;
        last_from = last_from <= tile ? 0 : last_from - tile;
        low = low <= tile ? 0 : low - tile < TS_TILE ? low - tile : TS_TILE;
        high = high - tile < TS_TILE ? high - tile : TS_TILE;
        bool together = low == high && from == last_from;
        float *s = scores + (size_t)r * TS_TILE;
        if (n == 4)
            score_rows(dtype, 4, head_dim, q + r * padded, padded, rows, k_offset, high, s,
                       r == first_row ? next : &nothing);
        else if (n == 2)
            score_rows(dtype, 2, head_dim, q + r * padded, padded, rows, k_offset, high, s,
                       r == first_row ? next : &nothing);
        else
            score_rows(dtype, 1, head_dim, q + r * padded, padded, rows, k_offset, high, s,
                       r == first_row ? next : &nothing);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t position = first + (r + i) / group, seen = position + 1;
            uint32_t hidden = ts_attention_first_key(variant, position);
            hidden = hidden <= tile ? 0 : hidden - tile;
            if (seen <= tile || hidden >= TS_TILE)
                continue;
            seen = seen - tile < TS_TILE ? seen - tile : TS_TILE;
            float *row = s + i * TS_TILE;
            if (varied)
                apply_score_mods(item, row, seen, first_head + (r + i) % group, tile, position);
            for (uint32_t t = 0; t < hidden; t++)
                row[t] = -INFINITY;
            softmax_update(row, seen, head_dim, &max[r + i], sums + (size_t)(r + i) * VL,
                           acc + (size_t)(r + i) * padded);
        }
        float *block = acc + (size_t)r * padded;
        const fetch *then = together && r == first_row ? next : &nothing;
        if (together && n == 4)
            accumulate_pv(dtype, 4, head_dim, s + from, rows + from, v_offset, high - from, block,
                          padded, then);
        else if (together && n == 2)
            accumulate_pv(dtype, 2, head_dim, s + from, rows + from, v_offset, high - from, block,
                          padded, then);
        else
            for (uint32_t i = 0; i < n; i++) {
                /* If the rows see different tokens, none may touch another V. */
                if (!together) {
                    uint32_t position = first + (r + i) / group;
                    from = ts_attention_first_key(variant, position);
                    from = from <= tile ? 0 : from - tile;
                    high = position < tile ? 0 : position + 1 - tile;
                    high = high < TS_TILE ? high : TS_TILE;
                    if (from >= high)
                        continue;
                }
                accumulate_pv(dtype, 1, head_dim, s + i * TS_TILE + from, rows + from, v_offset,
                              high - from, block + i * padded, padded, then);
            }
        r += n;
    }
}

#include "attention_rows.inc.h"

/* Whether one of a tile's rows of K or V, of fp8, has a NaN. */
INLINE bool has_nan(const unsigned char *const *rows, size_t k_offset, size_t plane, uint32_t bytes)
{
    vu found = {0};
    for (uint32_t t = 0; t < TS_TILE; t++)
        found |= nans_of(rows[t] + k_offset, bytes) | nans_of(rows[t] + k_offset + plane, bytes);
    return any((vi)found);
}

/*
 * Puts the rows that are to be fetched into an order in which neighbours lie in different pages:
 * lines of one page, asked for one after the other, come slower (kernels/doc/). Where a head's
 * rows are a page (HND), the next tile's heads take turns, one row of each: 16 rows for every head
 * that is worked on.
 */
INLINE void spread_rows(fetch *next, const unsigned char **spread, const ts_attention_item *item,
                        const unsigned char *const *next_tile, bool is_next_tile, uint32_t h,
                        size_t plane)
{
    const ts_geometry *g = &item->call->geometry;
    const uint32_t heads = item->head_count;
    const size_t head_stride = ts_geometry_head_stride(g);
    if (g->layout == TS_LAYOUT_HND && TS_TILE % heads == 0 && is_next_tile) {
        for (uint32_t t = 0; t < TS_TILE; t++)
            spread[t] = next_tile[h * (TS_TILE / heads) + t / heads] +
                        (item->head_first + t % heads) * head_stride;
        next->k_offset = 0;
        next->v_offset = plane;
    } else {
        for (uint32_t t = 0; t < TS_TILE; t++)
            spread[t] = next->rows[t % 4 * 4 + t / 4];
    }
    next->rows = spread;
}

/* fp32 has but one copy of attend_tile: an fp8 tile with a NaN takes it, too. */
NOINLINE void attend_tile_fp32(const ts_attention_item *item, const unsigned char *const *rows,
                               size_t k_offset, size_t v_offset, uint32_t tile, uint32_t first_head,
                               uint32_t first_row, uint32_t end_row, const float *q, float *scores,
                               float *max, float *sums, float *acc, const fetch *next)
{
    attend_tile(TS_DTYPE_FP32, item, rows, k_offset, v_offset, tile, first_head, first_row, end_row,
                q, scores, max, sums, acc, next);
}

#ifndef LOOK_UP_FP8
/* A tile of fp8 in quads in which there is a NaN: as fp32, in the same order. */
NOINLINE void attend_tile_with_nan(const ts_attention_item *item, const unsigned char *const *rows,
                                   size_t k_offset, size_t v_offset, uint32_t tile,
                                   uint32_t first_head, uint32_t first_row, uint32_t end_row,
                                   const float *q, float *scores, float *max, float *sums,
                                   float *acc)
{
    static const fetch nothing;
    const uint32_t head_dim = item->call->geometry.head_dim;
    float wide[2][TS_TILE][TS_HEAD_DIM_MAX];
    const unsigned char *wide_rows[TS_TILE];
    for (uint32_t t = 0; t < TS_TILE; t++) {
        wide_rows[t] = (const unsigned char *)wide[0][t];
        for (uint32_t d = 0; d < head_dim; d += VL) {
            store(wide[0][t] + d, load_quads_with_nan(rows[t] + k_offset, d));
            store(wide[1][t] + d, load_quads_with_nan(rows[t] + v_offset, d));
        }
    }
    attend_tile_fp32(item, wide_rows, 0, sizeof wide[0], tile, first_head, first_row, end_row, q,
                     scores, max, sums, acc, &nothing);
}
#endif

/* KV head h of the item, for its rows first_row..end_row - 1. */
INLINE void attend_head(ts_dtype dtype, const ts_attention_item *item,
                        const unsigned char *const *rows, uint32_t h, uint32_t tile,
                        uint32_t first_row, uint32_t end_row, const ts_attention_scratch *scratch,
                        const ts_attention_state *state, const fetch *next)
{
    const ts_geometry *g = &item->call->geometry;
    const uint32_t group = item->call->heads / g->kv_heads, r = h * item->q_count * group;
    const uint32_t padded = ts_attention_padded(g->head_dim), head = item->head_first + h;
    const size_t k = head * ts_geometry_head_stride(g), v = k + ts_geometry_plane_bytes(g);
    const float *q = scratch->q + (size_t)r * padded;
    float *sums = scratch->sums + (size_t)r * VL, *acc = state->acc + (size_t)r * padded;
#ifndef LOOK_UP_FP8 /* there it has its place in the tables */
    if (dtype == FP8_QUADS && has_nan(rows, k, v - k, g->head_dim))
        attend_tile_with_nan(item, rows, k, v, tile, head * group, first_row, end_row, q,
                             scratch->scores, state->max + r, sums, acc);
    else
#endif
        if (dtype == TS_DTYPE_FP32)
        attend_tile_fp32(item, rows, k, v, tile, head * group, first_row, end_row, q,
                         scratch->scores, state->max + r, sums, acc, next);
    else
        attend_tile(dtype, item, rows, k, v, tile, head * group, first_row, end_row, q,
                    scratch->scores, state->max + r, sums, acc, next);
}

/* The same of fp8 in quads, which has but one copy. */
NOINLINE void attend_head_fp8_quads(const ts_attention_item *item, const unsigned char *const *rows,
                                    uint32_t h, uint32_t tile, uint32_t first_row, uint32_t end_row,
                                    const ts_attention_scratch *scratch,
                                    const ts_attention_state *state, const fetch *next)
{
    attend_head(FP8_QUADS, item, rows, h, tile, first_row, end_row, scratch, state, next);
}

/* The first tile of a part that any of the item's rows sees; *end gets the end of what they see of
 * the part. */
static uint32_t seen_of_part(const ts_attention_item *item, uint32_t part, uint32_t *end)
{
    const uint32_t first = item->seq->kv_tokens - item->seq->q_tokens + item->q_first;
    *end =
        first + item->q_count < (part + 1) * TS_PART ? first + item->q_count : (part + 1) * TS_PART;
    uint32_t key = ts_attention_first_key(&item->call->variant, first);
    return key > part * TS_PART ? key / TS_TILE * TS_TILE : part * TS_PART;
}

/* Begins a part; returns what seen_of_part does. */
static uint32_t begin_part(const ts_attention_item *item, uint32_t part,
                           const ts_attention_scratch *scratch, const ts_attention_state *state,
                           uint32_t *end)
{
    const uint32_t rows = ts_attention_item_rows(item);
    reset(state, rows, ts_attention_padded(item->call->geometry.head_dim));
    memset(scratch->sums, 0, (size_t)rows * VL * sizeof(float));
    return seen_of_part(item, part, end);
}

static void end_part(const ts_attention_item *item, const ts_attention_scratch *scratch,
                     const ts_attention_state *state)
{
    for (uint32_t r = 0; r < ts_attention_item_rows(item); r++)
        state->sum[r] = reduce_sum(load(scratch->sums + (size_t)r * VL));
}

/* Addresses of `count` rows of K from token `tile` on; past the end they repeat the last, which is
 * safe to read and masked. */
static void find_rows(const ts_attention_item *item, uint32_t tile, uint32_t end, uint32_t count,
                      const unsigned char **rows)
{
    const ts_geometry *g = &item->call->geometry;
    const size_t block_bytes = ts_geometry_block_bytes(g);
    const unsigned char *base =
        item->call->base + (size_t)item->seq->layer * 2 * ts_geometry_plane_bytes(g);
    uint32_t block = tile / g->block_tokens, offset = tile % g->block_tokens;
    for (uint32_t t = 0; t < count; t++) {
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

INLINE void attend_part(ts_dtype dtype, const ts_attention_item *item, uint32_t part,
                        const ts_attention_scratch *scratch, const ts_attention_state *state)
{
    const ts_attention_call *call = item->call;
    const ts_geometry *g = &call->geometry;
    const uint32_t head_rows = item->q_count * (call->heads / g->kv_heads);
    const size_t plane = ts_geometry_plane_bytes(g), head_stride = ts_geometry_head_stride(g);

    uint32_t heads_ahead =
        (uint32_t)(FETCH_AHEAD / (2 * TS_TILE * g->head_dim * ts_dtype_bytes(g->dtype)));
    heads_ahead = heads_ahead < 1                  ? 1
                  : heads_ahead > item->head_count ? item->head_count
                                                   : heads_ahead;
    uint32_t end, start = begin_part(item, part, scratch, state, &end);
    const unsigned char *rows[2][TS_TILE];
    if (start < end)
        find_rows(item, start, end, TS_TILE, rows[0]);
    for (uint32_t tile = start, turn = 0; tile < end; tile += TS_TILE, turn ^= 1) {
        const bool more = tile + TS_TILE < end;
        if (more)
            find_rows(item, tile + TS_TILE, end, TS_TILE, rows[turn ^ 1]);
        for (uint32_t h = 0; h < item->head_count; h++) {
            bool later = h + heads_ahead >= item->head_count; /* in the next tile */
            size_t then = item->head_first + h + heads_ahead - (later ? item->head_count : 0);
            fetch next = {.rows = !later ? rows[turn]
                                  : more ? rows[turn ^ 1]
                                         : NULL,
                          .k_offset = then * head_stride,
                          .v_offset = plane + then * head_stride};
            const unsigned char *spread[TS_TILE];
            if (!is_fp8_quads(dtype) &&
                next.rows != NULL) /* which waits for arithmetic, not memory */
                spread_rows(&next, spread, item, rows[turn ^ 1], more, h, plane);
            if (dtype == FP8_QUADS)
                attend_head_fp8_quads(item, rows[turn], h, tile, 0, head_rows, scratch, state,
                                      &next);
            else
                attend_head(dtype, item, rows[turn], h, tile, 0, head_rows, scratch, state, &next);
        }
    }
    end_part(item, scratch, state);
}

#ifdef TS_ATTENTION_TILES
#include "attention_tiles.inc.h"
#endif

INLINE void compute_part(ts_dtype dtype, const ts_attention_item *item, uint32_t part,
                         const ts_attention_scratch *scratch, const ts_attention_state *state)
{
#ifdef TS_ATTENTION_TILES
    if (dtype == FP8_TILES || dtype == BF16_TILES) {
        attend_part_tiles(item, part, scratch, state);
        return;
    }
#endif
    attend_part(dtype, item, part, scratch, state);
}

INLINE void attend_parts(ts_dtype dtype, const ts_attention_item *item,
                         const ts_attention_scratch *scratch)
{
    const uint32_t head_dim = item->call->geometry.head_dim;
    const uint32_t rows = ts_attention_item_rows(item), padded = ts_attention_padded(head_dim);
    const bool whole = item->partials == NULL;
    if (whole)
        reset(&scratch->all, rows, padded);
    for (uint32_t part = item->part_first; part < item->part_end; part++) {
        const ts_attention_state state =
            whole ? scratch->part : partial_at(item, part, rows, head_dim);
        compute_part(dtype, item, part, scratch, &state);
        if (whole)
            merge_state(&scratch->all, &state, rows, padded);
    }
    if (whole)
        write_out(dtype, item, &scratch->all);
}

INLINE void attend_item(ts_dtype dtype, const ts_attention_item *item,
                        const ts_attention_scratch *scratch)
{
    load_queries(dtype, item, scratch->q);
    attend_parts(dtype, item, scratch);
}

/* The one place where the cache's type becomes a constant. */
#ifndef TS_ATTENTION_OTHERS
static void item_fp32(const ts_attention_item *item, const ts_attention_scratch *scratch)
{
    attend_item(TS_DTYPE_FP32, item, scratch);
}

static void item_fp16(const ts_attention_item *item, const ts_attention_scratch *scratch)
{
    attend_item(TS_DTYPE_FP16, item, scratch);
}

static void item_bf16(const ts_attention_item *item, const ts_attention_scratch *scratch)
{
    attend_item(TS_DTYPE_BF16, item, scratch);
}

static void item_fp8(const ts_attention_item *item, const ts_attention_scratch *scratch)
{
    attend_item(TS_DTYPE_FP8_E4M3, item, scratch);
}

static void item_bf16_pairs(const ts_attention_item *item, const ts_attention_scratch *scratch)
{
    attend_item(BF16_PAIRS, item, scratch);
}
#endif

static void item_fp8_quads(const ts_attention_item *item, const ts_attention_scratch *scratch)
{
    attend_item(FP8_QUADS, item, scratch);
}

/* How the cache's rows are read. */
static ts_dtype order_of(const ts_geometry *g)
{
    return g->dtype == TS_DTYPE_BF16 && g->head_dim % (2 * VL) == 0       ? BF16_PAIRS
           : g->dtype == TS_DTYPE_FP8_E4M3 && g->head_dim % (4 * VL) == 0 ? FP8_QUADS
                                                                          : g->dtype;
}

TS_KNOWS_DTYPES(4);
static void run_item(const ts_attention_item *item, const ts_attention_scratch *scratch)
{
    switch ((int)order_of(&item->call->geometry)) {
    case FP8_QUADS:
        item_fp8_quads(item, scratch);
        break;
#ifdef TS_ATTENTION_OTHERS
    default:
        TS_ATTENTION_OTHERS.item(item, scratch);
#else
    case BF16_PAIRS:
        item_bf16_pairs(item, scratch);
        break;
    case TS_DTYPE_FP32:
        item_fp32(item, scratch);
        break;
    case TS_DTYPE_FP16:
        item_fp16(item, scratch);
        break;
    case TS_DTYPE_BF16:
        item_bf16(item, scratch);
        break;
    case TS_DTYPE_FP8_E4M3:
        item_fp8(item, scratch);
        break;
#endif
    }
}

static void merge_item(const ts_attention_item *item, const ts_attention_scratch *scratch)
{
    const uint32_t head_dim = item->call->geometry.head_dim;
    const uint32_t rows = ts_attention_item_rows(item), padded = ts_attention_padded(head_dim);
    reset(&scratch->all, rows, padded);
    for (uint32_t part = item->part_first; part < item->part_end; part++) {
        ts_attention_state state = partial_at(item, part, rows, head_dim);
        merge_state(&scratch->all, &state, rows, padded);
    }
    const ts_geometry *g = &item->call->geometry;
    write_out(order_of(g), item, &scratch->all);
}

const ts_attention_isa_ops TS_ATTENTION_OPS = {.item = run_item, .merge = merge_item};

#ifdef TS_ATTENTION_TILES
INLINE void attend_item_tiles(ts_dtype dtype, const ts_attention_item *item,
                              const ts_attention_scratch *scratch)
{
    const uint32_t rows = ts_attention_item_rows(item) / item->head_count;
    load_queries(dtype, item, scratch->q);
    load_query_tiles(item, scratch);
    ts_amx_begin(tiles_of(scratch, rows).work, item->call->geometry.dtype);
    attend_parts(dtype, item, scratch);
    ts_amx_end();
}

static void run_item_tiles(const ts_attention_item *item, const ts_attention_scratch *scratch)
{
    const ts_geometry *g = &item->call->geometry;
    const uint32_t end = item->seq->kv_tokens - item->seq->q_tokens + item->q_first + item->q_count;
    const ts_dtype order = order_of(g);
    if (!ts_amx_takes(g, item->call->heads) || end < TS_AMX_TOKENS)
        run_item(item, scratch);
    else if (order == BF16_PAIRS)
        attend_item_tiles(BF16_TILES, item, scratch);
    else
        attend_item_tiles(FP8_TILES, item, scratch);
}

const ts_attention_isa_ops TS_ATTENTION_TILES = {.item = run_item_tiles, .merge = merge_item};
#endif
