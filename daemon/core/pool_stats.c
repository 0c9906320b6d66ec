#include "pool_stats.h"

#include <stdlib.h>

static uint32_t bin_of(uint32_t n)
{
    return n < 2 ? 0 : 31u - (uint32_t)__builtin_clz(n);
}

ts_pool_stats *ts_pool_stats_new(const ts_engine *e, uint32_t pool)
{
    uint32_t blocks = e->pools[pool].books.num_blocks, tenants = e->num_tenants;
    ts_pool_stats *s = calloc(1, sizeof *s);
    if (s == NULL)
        return NULL;
    s->fill = calloc(blocks, sizeof *s->fill);
    s->owners = calloc(blocks, sizeof *s->owners);
    s->lengths = calloc(tenants + 1, sizeof *s->lengths);
    s->cell_blocks = (blocks - 1) / TS_POOL_STATS_CELLS_MAX + 1;
    s->num_cells = (blocks - 1) / s->cell_blocks + 1;
    s->cells = calloc(s->num_cells, sizeof *s->cells);
    s->num_blocks = blocks;
    s->num_tenants = tenants;
    s->pool = pool;
    if (s->fill == NULL || s->owners == NULL || s->lengths == NULL || s->cells == NULL) {
        ts_pool_stats_free(s);
        return NULL;
    }
    return s;
}

void ts_pool_stats_free(ts_pool_stats *s)
{
    if (s == NULL)
        return;
    free(s->fill);
    free(s->owners);
    free(s->lengths);
    free(s->cells);
    free(s);
}

uint64_t ts_pool_stats_cost(const ts_engine *e, uint32_t pool)
{
    const ts_engine_pool *p = &e->pools[pool];
    uint64_t cost = (uint64_t)p->seqs.count + p->books.num_blocks;
    for (uint32_t t = 0; t < p->books.num_tenants; t++)
        cost += p->books.tenants[t].entries;
    return cost;
}

static void look_at_block(ts_pool_stats *s, uint32_t block, uint32_t tokens, uint32_t owner)
{
    if (block >= s->num_blocks) /* the pool has grown meanwhile */
        return;
    s->owners[block] = ts_owner_of_both(s->owners[block], owner);
    if (s->fill[block] < tokens)
        s->fill[block] = (uint16_t)tokens;
}

/* Goes on with the table of a sequence; false: there was not enough left for all of it. */
static bool walk_sequence(ts_pool_stats *s, const ts_engine_pool *pool, const ts_sequence *seq,
                          uint32_t *left)
{
    const uint32_t block_tokens = pool->seqs.block_tokens;
    uint32_t owner =
        seq->owner == TS_NONE ? (uint32_t)TS_OWNER_KEPT : TS_OWNER_SESSIONS + seq->owner;
    for (; s->at.entry < seq->num_blocks; s->at.entry++, (*left)--) {
        if (*left == 0)
            return false;
        /* The tail of one that is in a step may be a copy: the step tells (walk_step). */
        uint32_t i = s->at.entry, tokens = block_tokens;
        if (i + 1 == seq->num_blocks)
            tokens = seq->step == TS_NONE ? seq->length - i * block_tokens : 0;
        look_at_block(s, seq->blocks[i], tokens, owner);
    }
    s->seen_tokens += seq->length;
    s->table_blocks += seq->num_blocks;
    if (seq->tenant < s->num_tenants) {
        ts_pool_stats_lengths *l = &s->lengths[seq->tenant];
        l->bins[bin_of(seq->length)]++;
        l->longest = seq->length > l->longest ? seq->length : l->longest;
    }
    return true;
}

/* The same of a step's table. */
static bool walk_step(ts_pool_stats *s, const ts_engine_pool *pool, const ts_step *step,
                      uint32_t *left)
{
    const uint32_t block_tokens = pool->seqs.block_tokens;
    for (; s->at.entry < step->num_seqs; s->at.entry++) {
        const ts_step_seq *part = &step->seqs[s->at.entry];
        uint32_t before = ts_blocks_for(part->start, block_tokens);
        uint32_t all = before + part->reserved;
        if (*left == 0)
            return false;
        if (before > 0)
            look_at_block(s, part->original != TS_NONE ? part->original : part->table[before - 1],
                          part->start - (before - 1) * block_tokens, TS_OWNER_NONE);
        for (uint32_t b = before > 0 ? before - 1 : 0; b < all; b++)
            look_at_block(s, part->table[b], 0, TS_OWNER_SESSIONS + step->session);
        *left -= 1 + part->reserved < *left ? 1 + part->reserved : *left;
    }
    return true;
}

static void walk_block(ts_pool_stats *s, const ts_pool_books *books, uint32_t block_tokens)
{
    uint32_t b = s->at.index, refs = b < books->num_blocks ? ts_pool_refs(books, b) : 0;
    uint32_t tenant = b < books->num_blocks ? books->slabs[b / books->slab_blocks].tenant : TS_NONE;
    ts_pool_stats_cell *cell = &s->cells[b / s->cell_blocks];
    cell->tenant = b % s->cell_blocks == 0 || cell->tenant == tenant ? tenant : TS_NONE;
    cell->used += refs > 0;
    cell->shared += refs > 1;
    cell->cached += b < books->num_blocks && ts_pool_is_cached(books, b);
    cell->tokens += s->fill[b];
    cell->owner = ts_owner_of_both(cell->owner, s->owners[b]);
    if (refs == 0) {
        s->run++;
        return;
    }
    if (s->run > 0)
        s->free_runs[bin_of(s->run)]++;
    s->run = 0;
    s->stored_tokens += s->fill[b];
    s->used_slots += block_tokens;
    if (s->fill[b] == 0)
        s->reserved_slots += block_tokens;
}

/* The next thing of the part, or the next part. */
static void advance(ts_pool_stats *s, bool part_is_over)
{
    s->at.entry = 0;
    s->at.index = part_is_over ? 0 : s->at.index + 1;
    s->at.part += part_is_over;
}

bool ts_pool_stats_go_on(ts_pool_stats *s, const ts_engine *e, uint32_t entries)
{
    const ts_engine_pool *pool = &e->pools[s->pool];
    uint32_t left = entries;
    if (!ts_engine_has_pool(e, s->pool)) /* it was removed meanwhile */
        s->at.part = TS_POOL_STATS_DONE;
    while (left > 0 && s->at.part != TS_POOL_STATS_DONE) {
        uint32_t i = s->at.index;
        left--;
        switch (s->at.part) {
        case TS_POOL_STATS_SEQUENCES:
            if (i < pool->seqs.count && pool->seqs.all[i].tenant != TS_NONE &&
                pool->seqs.all[i].step != TS_SEQUENCE_DYING &&
                !walk_sequence(s, pool, &pool->seqs.all[i], &left))
                break;
            advance(s, i >= pool->seqs.count);
            break;
        case TS_POOL_STATS_STEPS:
            if (i < e->num_steps && e->steps[i].live && e->steps[i].pool == s->pool &&
                !walk_step(s, pool, &e->steps[i], &left))
                break;
            advance(s, i >= e->num_steps);
            break;
        case TS_POOL_STATS_BLOCKS:
            if (i < s->num_blocks)
                walk_block(s, &pool->books, pool->seqs.block_tokens);
            else if (s->run > 0)
                s->free_runs[bin_of(s->run)]++;
            advance(s, i >= s->num_blocks);
            break;
        case TS_POOL_STATS_DONE:
            break;
        }
    }
    if (s->at.part != TS_POOL_STATS_DONE)
        return false;
    free(s->fill); /* the cells tell what is of interest */
    free(s->owners);
    s->fill = NULL;
    s->owners = NULL;
    return true;
}

ts_pool_stats_lengths ts_pool_stats_lengths_of(const ts_pool_stats *s, ts_view view)
{
    ts_pool_stats_lengths all = {0};
    for (uint32_t t = 0; t < s->num_tenants; t++) {
        const ts_pool_stats_lengths *l = &s->lengths[t];
        if (!ts_view_sees(view, t))
            continue;
        all.longest = l->longest > all.longest ? l->longest : all.longest;
        for (int i = 0; i < TS_HISTOGRAM_BINS; i++)
            all.bins[i] += l->bins[i];
    }
    return all;
}
