/* Block tables that this process knows, kept from one step to the next. */
#include "block_table_cache.h"

#include "error.h"
#include "pool_map.h"

#include <stdlib.h>
#include <string.h>

/* The index that the daemon has the sequence under. */
static uint32_t index_of(ts_seq seq)
{
    return (uint32_t)seq;
}

static ts_table *find(const ts_pool *p, ts_seq seq)
{
    uint32_t index = index_of(seq);
    return index < p->num_tables && p->tables[index].seq == seq ? &p->tables[index] : NULL;
}

void ts_tables_known_steps(const ts_pool *p, const ts_seq *seqs, uint32_t count, uint64_t *steps)
{
    for (uint32_t i = 0; i < count; i++) {
        const ts_table *t = find(p, seqs[i]);
        steps[i] = t != NULL ? t->known_step : 0;
    }
}

/* The sequence's place, which may be another's still; NULL: no memory. Ids are the daemon's here,
 * whose indices are as few as its sequences. */
static ts_table *place_of(ts_pool *p, ts_seq seq)
{
    uint32_t index = index_of(seq);
    if (index >= p->num_tables) {
        size_t count = 64;
        while (count <= index)
            count *= 2;
        ts_table *grown = realloc(p->tables, count * sizeof *grown);
        if (grown == NULL)
            return NULL;
        memset(grown + p->num_tables, 0, (count - p->num_tables) * sizeof *grown);
        p->tables = grown;
        p->num_tables = (uint32_t)count;
    }
    ts_table *t = &p->tables[index];
    if (t->seq != seq)
        t->known_step = t->count = 0;
    t->seq = seq;
    return t;
}

static bool make_room(ts_table *t, uint32_t entries)
{
    if (entries <= t->room)
        return true;
    uint32_t room = entries + entries / 2 + 8;
    uint32_t *grown = realloc(t->blocks, room * sizeof *grown);
    if (grown == NULL)
        return false;
    t->blocks = grown;
    t->room = room;
    return true;
}

/* Maps entries from `first` on: those from `touched` on, which get the new tokens, to be written.
 */
static ts_status map(ts_pool *p, const ts_table *t, uint32_t first, uint32_t touched)
{
    ts_status status = TS_OK;
    uint32_t lowest = 0, same = 0; /* blocks from `lowest` on that lie in the slab mapped last */
    for (uint32_t b = first; b < touched && status == TS_OK; b++) {
        if (t->blocks[b] - lowest < same)
            continue;
        status = ts_pool_map_block(p, t->blocks[b], false);
        lowest = t->blocks[b] / p->slab_blocks * p->slab_blocks;
        same = p->slab_blocks;
    }
    for (uint32_t b = touched; b < t->count && status == TS_OK; b++)
        status = ts_pool_map_block(p, t->blocks[b], true);
    return status;
}

ts_status ts_tables_update(ts_pool *p, uint64_t step, const ts_table_delta *d,
                           const uint32_t **blocks)
{
    ts_table *t = place_of(p, d->seq);
    uint32_t known = t != NULL && t->known_step != 0 ? t->count : 0;
    if (t != NULL)
        t->known_step = 0; /* until all of it is there */
    if (t == NULL || !make_room(t, d->first + d->count))
        return ts_fail(p->client, TS_ENOMEM, "no memory for a block table of %u entries",
                       d->first + d->count);
    if (d->first > known)
        return ts_fail(p->client, TS_EPROTO,
                       "the daemon tells of entries from %u on of a block table of which %u are "
                       "known",
                       d->first, known);
    if (d->count == 0 || d->touched >= d->first + d->count)
        return ts_fail(p->client, TS_EPROTO,
                       "the daemon tells of %u entries of a block table; new tokens go to entry %u",
                       d->first + d->count, d->touched);
    memcpy(t->blocks + d->first, d->blocks, d->count * sizeof *t->blocks);
    t->count = d->first + d->count;
    ts_status status = map(p, t, d->first, d->touched);
    if (status != TS_OK)
        return status;
    t->known_step = step;
    *blocks = t->blocks;
    return TS_OK;
}

void ts_tables_forget(ts_pool *p, const ts_seq *seqs, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        ts_table *t = find(p, seqs[i]);
        if (t == NULL)
            continue;
        free(t->blocks);
        *t = (ts_table){0};
    }
}

void ts_tables_fini(ts_pool *p)
{
    for (uint32_t i = 0; i < p->num_tables; i++)
        free(p->tables[i].blocks);
    free(p->tables);
}
