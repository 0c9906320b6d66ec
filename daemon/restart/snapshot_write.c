#include "snapshot.h"

#include "engine_internal.h"

#include <stdlib.h>
#include <string.h>

static int compare_names(const void *a, const void *b)
{
    const ts_name_entry *x = *(const ts_name_entry *const *)a,
                        *y = *(const ts_name_entry *const *)b;
    return x->tenant != y->tenant ? (x->tenant < y->tenant ? -1 : 1) : strcmp(x->name, y->name);
}

/* The table's names; where they lie in it depends on what was there before, so what is plain has
 * them in their order. NULL: out of memory. */
static const ts_name_entry **list_names(const ts_names *names, bool plain)
{
    const ts_name_entry **list = malloc((names->count + 1ull) * sizeof *list);
    uint32_t count = 0;
    for (uint32_t i = 0; list != NULL && i < names->capacity; i++)
        if (names->entries[i].name != NULL && count < names->count)
            list[count++] = &names->entries[i];
    if (list != NULL && plain)
        qsort(list, count, sizeof *list, compare_names);
    return list;
}

/* False: out of memory. */
static bool put_names(ts_record_writer *w, const ts_names *names)
{
    const ts_name_entry **list = list_names(names, w->plain);
    if (list == NULL)
        return false;
    uint64_t bytes = 0;
    ts_records_put_count(w, TS_RECORD_NAME, names->count);
    for (uint32_t i = 0; i < names->count; i++) {
        /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): a table has `count` names */
        const ts_stored_name stored = {list[i]->tenant, list[i]->value,
                                       (uint32_t)strlen(list[i]->name) + 1};
        ts_records_put_more(w, TS_RECORD_NAME, &stored, 1);
        bytes += stored.bytes;
    }
    ts_records_put_count(w, TS_RECORD_BYTE, bytes);
    for (uint32_t i = 0; i < names->count; i++)
        ts_records_put_more(w, TS_RECORD_BYTE, list[i]->name, strlen(list[i]->name) + 1);
    free(list);
    return true;
}

static bool all_zero(const unsigned char *bytes, size_t count)
{
    return count == 0 || (bytes[0] == 0 && memcmp(bytes, bytes + 1, count - 1) == 0);
}

/* Of each slab that is granted, what there is of the blocks that were ever used; first, for each,
 * whether there is anything but 0. */
static void put_blocks(ts_record_writer *w, const ts_pool_books *b, ts_record type,
                       const void *array, uint32_t each)
{
    const unsigned char *bytes = array;
    const size_t block = (size_t)ts_record_types[type].bytes * each;
    uint64_t count = 0;
    ts_records_put_count(w, TS_RECORD_BYTE, b->ungranted);
    for (uint32_t i = 0; i < b->ungranted; i++) {
        const unsigned char *slab = bytes + (size_t)i * b->slab_blocks * block;
        const uint8_t has = !all_zero(slab, b->slabs[i].touched * block);
        ts_records_put_more(w, TS_RECORD_BYTE, &has, 1);
        count += has ? b->slabs[i].touched : 0;
    }
    ts_records_put_count(w, type, count * each);
    for (uint32_t i = 0; i < b->ungranted; i++) {
        const unsigned char *slab = bytes + (size_t)i * b->slab_blocks * block;
        if (!all_zero(slab, b->slabs[i].touched * block))
            ts_records_put_more(w, type, slab, (uint64_t)b->slabs[i].touched * each);
    }
}

/* The same of what has a meaning for cached blocks alone, or for those of the index. What is plain
 * has nothing of the others, for which it is what an earlier block left. */
static void put_blocks_of(ts_record_writer *w, const ts_pool_books *b, bool cached,
                          const uint32_t *array, uint32_t each)
{
    if (!w->plain)
        return put_blocks(w, b, TS_RECORD_WORD, array, each);
    uint32_t *none = calloc(each, sizeof *none);
    ts_records_put_count(w, TS_RECORD_WORD, (uint64_t)b->num_blocks * each);
    for (uint32_t i = 0; none != NULL && i < b->num_blocks; i++) {
        const bool has = cached ? ts_pool_is_cached(b, i) : ts_index_has(b->index, i);
        ts_records_put_more(w, TS_RECORD_WORD, has ? array + (size_t)i * each : none, each);
    }
    free(none);
}

static bool put_index(ts_record_writer *w, const ts_pool_books *b)
{
    const ts_prefix_index *x = b->index;
    ts_records_put(w, TS_RECORD_INDEX, x, 1);
    put_blocks_of(w, b, true, b->cached_prev, 1);
    put_blocks_of(w, b, true, b->cached_next, 1);
    put_blocks_of(w, b, true, b->cached_since, 1);
    put_blocks(w, b, TS_RECORD_BYTE, b->classes, 1);
    put_blocks(w, b, TS_RECORD_NODE, x->nodes, 1);
    put_blocks_of(w, b, false, x->ids, x->block_tokens);
    ts_records_put(w, TS_RECORD_WORD, x->buckets, (uint64_t)x->bucket_mask + 1);
    ts_records_put(w, TS_RECORD_SPACE, x->spaces, x->num_spaces);
    ts_records_put(w, TS_RECORD_WORD, x->tenant_spaces, x->num_tenants);
    return put_names(w, &x->names);
}

/* Entries of the sequence's block table, reserved ones included. */
static uint32_t entries_of(const ts_engine *e, const ts_sequence *seq, uint32_t index)
{
    if (seq->tenant == TS_NONE)
        return 0;
    if (seq->step >= e->num_steps) /* it is in none */
        return seq->num_blocks;
    const ts_step *step = &e->steps[seq->step];
    for (uint32_t i = 0; i < step->num_seqs; i++)
        if (step->seqs[i].seq == index)
            return seq->num_blocks + step->seqs[i].reserved;
    return seq->num_blocks;
}

static bool put_sequences(ts_record_writer *w, const ts_engine *e, const ts_sequences *s)
{
    uint64_t all = 0;
    ts_records_put(w, TS_RECORD_SEQUENCES, s, 1);
    ts_records_put(w, TS_RECORD_SEQUENCE, s->all, s->count);
    ts_records_put_count(w, TS_RECORD_WORD, s->count);
    for (uint32_t i = 0; i < s->count; i++) {
        const uint32_t entries = entries_of(e, &s->all[i], i);
        ts_records_put_more(w, TS_RECORD_WORD, &entries, 1);
        all += entries;
    }
    ts_records_put_count(w, TS_RECORD_WORD, all);
    for (uint32_t i = 0; i < s->count; i++)
        ts_records_put_more(w, TS_RECORD_WORD, s->all[i].blocks, entries_of(e, &s->all[i], i));
    ts_records_put(w, TS_RECORD_LIFE, s->lives, s->num_lives);
    return put_names(w, &s->names) && put_names(w, &s->tickets);
}

static bool put_pool(ts_record_writer *w, const ts_engine *e, const ts_engine_pool *p)
{
    ts_records_put(w, TS_RECORD_POOL_CONFIG, &p->config, 1);
    ts_records_put(w, TS_RECORD_POOL, p, 1);
    if (p->config.name[0] == '\0')
        return true;
    ts_records_put(w, TS_RECORD_BOOKS, &p->books, 1);
    ts_records_put(w, TS_RECORD_SLAB, p->books.slabs, ts_pool_slabs_max(&p->books));
    ts_records_put(w, TS_RECORD_TENANT, p->books.tenants, p->books.num_tenants);
    put_blocks(w, &p->books, TS_RECORD_WORD, p->books.refs, 1);
    put_blocks(w, &p->books, TS_RECORD_WORD, p->books.pins, 1);
    return put_index(w, &p->books) && put_sequences(w, e, &p->seqs);
}

static void put_sessions(ts_record_writer *w, const ts_engine *e)
{
    ts_records_put(w, TS_RECORD_SESSION, e->sessions, e->num_sessions);
    uint64_t live = 0;
    for (uint32_t i = 0; i < e->num_sessions; i++)
        live += e->sessions[i].live;
    ts_records_put_count(w, TS_RECORD_WORD, live * TS_POOLS_MAX);
    for (uint32_t i = 0; i < e->num_sessions; i++)
        if (e->sessions[i].live)
            ts_records_put_more(w, TS_RECORD_WORD, e->sessions[i].owned, TS_POOLS_MAX);
}

static void put_steps(ts_record_writer *w, const ts_engine *e)
{
    uint64_t parts = 0;
    ts_records_put(w, TS_RECORD_STEP, e->steps, e->num_steps);
    for (uint32_t i = 0; i < e->num_steps; i++)
        parts += e->steps[i].live ? e->steps[i].num_seqs : 0;
    ts_records_put_count(w, TS_RECORD_STEP_SEQ, parts);
    for (uint32_t i = 0; i < e->num_steps; i++)
        if (e->steps[i].live)
            ts_records_put_more(w, TS_RECORD_STEP_SEQ, e->steps[i].seqs, e->steps[i].num_seqs);
    uint64_t runs = 0;
    for (uint32_t i = 0; i < e->num_steps; i++)
        runs += e->steps[i].live ? e->steps[i].num_stream_runs : 0;
    ts_records_put_count(w, TS_RECORD_RUN, runs);
    for (uint32_t i = 0; i < e->num_steps; i++)
        if (e->steps[i].live)
            ts_records_put_more(w, TS_RECORD_RUN, e->steps[i].stream_runs,
                                e->steps[i].num_stream_runs);
}

static void put_claims(ts_record_writer *w, const ts_claims *c)
{
    uint64_t all = 0;
    ts_records_put(w, TS_RECORD_CLAIMS, c, 1);
    ts_records_put(w, TS_RECORD_CLAIM, c->all, c->count);
    ts_records_put_count(w, TS_RECORD_BYTE, c->count); /* whether it has ids of its own */
    for (uint32_t i = 0; i < c->count; i++) {
        const uint8_t has = c->all[i].live && c->all[i].ids != NULL;
        ts_records_put_more(w, TS_RECORD_BYTE, &has, 1);
        all += has ? c->all[i].end - c->all[i].from : 0;
    }
    ts_records_put_count(w, TS_RECORD_WORD, all);
    for (uint32_t i = 0; i < c->count; i++)
        if (c->all[i].live && c->all[i].ids != NULL)
            ts_records_put_more(w, TS_RECORD_WORD, c->all[i].ids, c->all[i].end - c->all[i].from);
}

static void put_graves(ts_record_writer *w, const ts_engine *e)
{
    uint64_t count = 0;
    for (const ts_engine_grave *g = e->graves; g != NULL; g = g->next)
        count++;
    ts_records_put_count(w, TS_RECORD_WORD, count);
    for (const ts_engine_grave *g = e->graves; g != NULL; g = g->next)
        ts_records_put_more(w, TS_RECORD_WORD, &g->seqs.count, 1);
}

bool ts_snapshot_write(const ts_engine *e, const ts_answers *answers, ts_record_writer *w)
{
    ts_records_begin(w);
    ts_records_put(w, TS_RECORD_LIMITS, &e->limits, 1);
    ts_records_put(w, TS_RECORD_ENGINE, e, 1);
    ts_records_put(w, TS_RECORD_WORD, e->tenants, e->num_tenants);
    ts_records_put(w, TS_RECORD_WORD, e->tenant_sessions, e->num_tenants);
    ts_records_put(w, TS_RECORD_WORD, e->tenant_claim_ids, e->num_tenants);
    for (uint32_t i = 0; i < e->num_pools; i++)
        if (!put_pool(w, e, &e->pools[i]))
            return false;
    put_sessions(w, e);
    put_steps(w, e);
    put_claims(w, &e->claims);
    put_graves(w, e);
    ts_answers_write(answers, w);
    return true;
}
