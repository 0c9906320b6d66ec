#include "snapshot.h"

#include "engine_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

/* A new array of the records that come next; `spare` more have room behind. NULL after an error,
 * which is reader->why, or out of memory. */
static void *get_array(ts_record_reader *r, ts_record type, uint64_t count, uint64_t spare)
{
    void *array = calloc(count + spare + 1, ts_record_types[type].bytes);
    if (array != NULL && ts_records_get_all(r, type, array, count))
        return array;
    free(array);
    return NULL;
}

/* Calls `name` for each name. */
static bool get_names(ts_record_reader *r,
                      bool (*name)(void *arg, const ts_stored_name *stored, const char *text),
                      void *arg)
{
    const uint64_t count = ts_records_next(r, TS_RECORD_NAME);
    ts_stored_name *names = r->why != NULL ? NULL : calloc(count + 1, sizeof *names);
    bool ok = names != NULL && ts_records_get(r, TS_RECORD_NAME, names, count);
    uint64_t bytes = ok ? ts_records_next(r, TS_RECORD_BYTE) : 0;
    char *text = ok ? malloc(bytes + 1) : NULL, *at = text;
    ok = text != NULL && ts_records_get(r, TS_RECORD_BYTE, text, bytes);
    for (uint64_t i = 0; i < count && ok; i++) {
        ok = names[i].bytes > 0 && names[i].bytes <= bytes && at[names[i].bytes - 1] == '\0' &&
             name(arg, &names[i], at);
        at += names[i].bytes;
        bytes -= names[i].bytes;
    }
    free(text);
    free(names);
    return ok;
}

static bool add_space_name(void *arg, const ts_stored_name *n, const char *text)
{
    ts_prefix_index *x = arg;
    const char *kept;
    return n->value < x->num_spaces &&
           ts_names_add(&x->names, n->tenant, text, n->value, &kept) == TS_OK;
}

static bool add_kept_name(void *arg, const ts_stored_name *n, const char *text)
{
    ts_sequences *s = arg;
    const char *kept;
    if (n->value >= s->count || ts_names_add(&s->names, n->tenant, text, n->value, &kept) != TS_OK)
        return false;
    s->all[n->value].name = kept;
    return ts_name_order_add(&s->order, n->tenant, kept);
}

static bool add_ticket(void *arg, const ts_stored_name *n, const char *text)
{
    ts_sequences *s = arg;
    const char *kept;
    if (n->value >= s->count || s->all[n->value].life >= s->num_lives ||
        ts_names_add(&s->tickets, n->tenant, text, n->value, &kept) != TS_OK)
        return false;
    s->lives[s->all[n->value].life].ticket = kept;
    return true;
}

static bool get_blocks(ts_record_reader *r, const ts_pool_books *b, ts_record type, void *array,
                       uint32_t each)
{
    const size_t block = (size_t)ts_record_types[type].bytes * each;
    unsigned char *bytes = array;
    uint64_t count = 0;
    uint8_t *has = get_array(r, TS_RECORD_BYTE, b->ungranted, 0);
    for (uint32_t i = 0; has != NULL && i < b->ungranted; i++)
        count += has[i] ? b->slabs[i].touched : 0;
    bool ok = has != NULL && ts_records_next(r, type) == count * each;
    for (uint32_t i = 0; i < b->ungranted && ok; i++)
        ok = !has[i] || ts_records_get(r, type, bytes + (size_t)i * b->slab_blocks * block,
                                       (uint64_t)b->slabs[i].touched * each);
    free(has);
    return ok;
}

static uint32_t power_of_two(uint32_t least, uint32_t count)
{
    uint32_t power = least;
    while (power < count)
        power *= 2;
    return power;
}

static bool get_index(ts_record_reader *r, ts_pool_books *b, uint32_t block_tokens)
{
    if (ts_pool_use_index(b, block_tokens, 0) != TS_OK)
        return false;
    ts_pool_use_large_pages(b, true);
    ts_prefix_index *x = b->index, stored = *x;
    const uint32_t mask = x->bucket_mask;
    if (!ts_records_get_all(r, TS_RECORD_INDEX, &stored, 1) || stored.bucket_mask != mask ||
        stored.num_blocks != b->max_blocks || stored.block_tokens != block_tokens)
        return false;
    *x = stored;
    if (!get_blocks(r, b, TS_RECORD_WORD, b->cached_prev, 1) ||
        !get_blocks(r, b, TS_RECORD_WORD, b->cached_next, 1) ||
        !get_blocks(r, b, TS_RECORD_WORD, b->cached_since, 1) ||
        !get_blocks(r, b, TS_RECORD_BYTE, b->classes, 1) ||
        !get_blocks(r, b, TS_RECORD_NODE, x->nodes, 1) ||
        !get_blocks(r, b, TS_RECORD_WORD, x->ids, block_tokens) ||
        !ts_records_get_all(r, TS_RECORD_WORD, x->buckets, (uint64_t)mask + 1))
        return false;
    const uint32_t spaces = x->num_spaces;
    x->spaces = get_array(r, TS_RECORD_SPACE, spaces, power_of_two(1, spaces) - spaces);
    x->tenant_spaces = get_array(r, TS_RECORD_WORD, x->num_tenants, 0);
    return x->spaces != NULL && x->tenant_spaces != NULL && get_names(r, add_space_name, x);
}

static bool get_tables(ts_record_reader *r, ts_sequences *s)
{
    uint32_t *entries = get_array(r, TS_RECORD_WORD, s->count, 0);
    uint64_t all = 0;
    for (uint32_t i = 0; entries != NULL && i < s->count; i++)
        all += entries[i];
    bool ok = entries != NULL && ts_records_next(r, TS_RECORD_WORD) == all;
    for (uint32_t i = 0; i < s->count; i++) { /* all, so that none is what it was when written */
        s->all[i].blocks = NULL;
        s->all[i].name = NULL;
        s->all[i].capacity = 0;
    }
    for (uint32_t i = 0; i < s->count && ok; i++)
        ok = entries[i] == 0 || (entries[i] <= TS_POOL_BLOCKS_MAX &&
                                 ts_sequence_reserve(&s->all[i], entries[i]) == TS_OK &&
                                 ts_records_get(r, TS_RECORD_WORD, s->all[i].blocks, entries[i]));
    free(entries);
    return ok;
}

static bool get_sequences(ts_record_reader *r, const ts_engine *e, ts_sequences *s)
{
    s->order.seed = e->limits.hash_seed;
    if (!ts_records_get_all(r, TS_RECORD_SEQUENCES, s, 1))
        return false;
    const uint32_t count = s->count;
    s->count = 0; /* until they are there, for whoever frees them */
    s->capacity = power_of_two(64, count);
    s->all = get_array(r, TS_RECORD_SEQUENCE, count, s->capacity - count);
    if (s->all == NULL)
        return false;
    s->count = count;
    if (!get_tables(r, s))
        return false;
    s->lives_capacity = power_of_two(16, s->num_lives);
    s->lives = get_array(r, TS_RECORD_LIFE, s->num_lives, s->lives_capacity - s->num_lives);
    for (uint32_t i = 0; s->lives != NULL && i < s->num_lives; i++)
        s->lives[i].ticket = NULL;
    return s->lives != NULL && get_names(r, add_kept_name, s) && get_names(r, add_ticket, s);
}

static bool get_books(ts_record_reader *r, const ts_engine *e, const ts_pool_config *config,
                      ts_pool_books *b)
{
    ts_pool_books stored = {0};
    if (!ts_records_get_all(r, TS_RECORD_BOOKS, &stored, 1) || stored.slab_blocks == 0 ||
        stored.num_blocks == 0 || stored.max_blocks > TS_POOL_BLOCKS_MAX ||
        stored.num_blocks > stored.max_blocks || stored.ungranted > stored.num_slabs ||
        (stored.num_blocks != stored.max_blocks && stored.num_blocks % stored.slab_blocks != 0) ||
        ts_pool_init(b, stored.num_blocks, stored.max_blocks, stored.slab_blocks) != TS_OK)
        return false;
    const uint32_t slabs = b->num_slabs;
    stored.refs = b->refs;
    stored.pins = b->pins;
    stored.slabs = b->slabs;
    *b = stored;
    b->tenants = NULL;
    if (b->num_slabs != slabs ||
        !ts_records_get_all(r, TS_RECORD_SLAB, b->slabs, ts_pool_slabs_max(b)))
        return false;
    for (uint32_t i = 0; i < b->ungranted; i++)
        if (b->slabs[i].touched > b->slabs[i].blocks || b->slabs[i].blocks > b->slab_blocks)
            return false;
    b->tenants = get_array(r, TS_RECORD_TENANT, b->num_tenants, 0);
    if (b->tenants == NULL || (config->on_gpu && ts_pool_use_homes(b, e->limits.sessions) != TS_OK))
        return false;
    ts_pool_find_homes(b);
    ts_pool_use_large_pages(b, true); /* until it has been read and checked */
    return get_blocks(r, b, TS_RECORD_WORD, b->refs, 1) &&
           get_blocks(r, b, TS_RECORD_WORD, b->pins, 1) &&
           get_index(r, b, config->geometry.block_tokens);
}

static bool get_pool(ts_record_reader *r, const ts_engine *e, ts_engine_pool *p)
{
    char why[96];
    if (!ts_records_get_all(r, TS_RECORD_POOL_CONFIG, &p->config, 1) ||
        !ts_records_get_all(r, TS_RECORD_POOL, p, 1))
        return false;
    if (p->config.name[0] == '\0')
        return true;
    return ts_geometry_check(&p->config.geometry, why, sizeof why) == TS_OK &&
           get_books(r, e, &p->config, &p->books) && get_sequences(r, e, &p->seqs);
}

static bool get_sessions(ts_record_reader *r, ts_engine *e, uint32_t count)
{
    if (count > e->limits.sessions || !ts_records_get_all(r, TS_RECORD_SESSION, e->sessions, count))
        return false;
    uint64_t live = 0;
    for (uint32_t i = 0; i < count; i++) {
        e->sessions[i].owned = NULL;
        live += e->sessions[i].live;
    }
    e->num_sessions = count;
    bool ok = ts_records_next(r, TS_RECORD_WORD) == live * TS_POOLS_MAX;
    for (uint32_t i = 0; i < count && ok; i++)
        if (e->sessions[i].live) {
            uint32_t *owned = e->sessions[i].owned = malloc(TS_POOLS_MAX * sizeof *owned);
            ok = owned != NULL && ts_records_get(r, TS_RECORD_WORD, owned, TS_POOLS_MAX);
        }
    return ok;
}

/* The blocks of a part's sequence lie where the sequence's table does. */
static bool point_part(const ts_engine *e, const ts_step *step, ts_step_seq *part)
{
    if (step->pool >= e->num_pools || part->seq >= e->pools[step->pool].seqs.count)
        return false;
    part->table = e->pools[step->pool].seqs.all[part->seq].blocks;
    return true;
}

/* A version before had none. */
static bool get_stream_runs(ts_record_reader *r, ts_engine *e)
{
    uint64_t runs = 0;
    for (uint32_t i = 0; i < e->num_steps; i++)
        runs += e->steps[i].live ? e->steps[i].num_stream_runs : 0;
    if (!ts_records_has(r, TS_RECORD_RUN))
        return runs == 0;
    bool ok = ts_records_next(r, TS_RECORD_RUN) == runs;
    for (uint32_t i = 0; i < e->num_steps && ok; i++) {
        ts_step *step = &e->steps[i];
        const uint32_t n = step->live ? step->num_stream_runs : 0;
        if (n == 0)
            continue;
        step->stream_runs = calloc(power_of_two(1, n), sizeof *step->stream_runs);
        ok = step->stream_runs != NULL && ts_records_get(r, TS_RECORD_RUN, step->stream_runs, n);
    }
    return ok;
}

static bool get_steps(ts_record_reader *r, ts_engine *e, uint32_t count)
{
    e->steps = get_array(r, TS_RECORD_STEP, count, power_of_two(1, count) - count);
    if (e->steps == NULL)
        return false;
    for (uint32_t i = 0; i < count; i++) {
        e->steps[i].seqs = NULL;
        e->steps[i].stream_runs = NULL;
    }
    e->num_steps = count;
    uint64_t parts = 0;
    for (uint32_t i = 0; i < count; i++)
        parts += e->steps[i].live ? e->steps[i].num_seqs : 0;
    bool ok = ts_records_next(r, TS_RECORD_STEP_SEQ) == parts;
    for (uint32_t i = 0; i < count && ok; i++) {
        ts_step *step = &e->steps[i];
        if (!step->live)
            continue;
        step->seqs = calloc(step->num_seqs + 1ull, sizeof *step->seqs);
        ok =
            step->seqs != NULL && ts_records_get(r, TS_RECORD_STEP_SEQ, step->seqs, step->num_seqs);
        for (uint32_t j = 0; j < step->num_seqs && ok; j++)
            ok = point_part(e, step, &step->seqs[j]);
    }
    return ok && get_stream_runs(r, e);
}

static bool get_claims(ts_record_reader *r, ts_claims *c)
{
    if (!ts_records_get_all(r, TS_RECORD_CLAIMS, c, 1))
        return false;
    const uint32_t count = c->count;
    c->count = 0;
    c->capacity = power_of_two(64, count);
    c->all = get_array(r, TS_RECORD_CLAIM, count, c->capacity - count);
    if (c->all == NULL)
        return false;
    for (uint32_t i = 0; i < count; i++)
        c->all[i].ids = NULL;
    c->count = count;
    uint8_t *has = get_array(r, TS_RECORD_BYTE, count, 0);
    uint64_t all = 0;
    for (uint32_t i = 0; has != NULL && i < count; i++)
        all += has[i] && c->all[i].end > c->all[i].from ? c->all[i].end - c->all[i].from : 0;
    bool ok = has != NULL && ts_records_next(r, TS_RECORD_WORD) == all;
    for (uint32_t i = 0; i < count && ok; i++) {
        const uint32_t ids = c->all[i].end - c->all[i].from;
        if (has[i])
            ok = c->all[i].end > c->all[i].from &&
                 (c->all[i].ids = malloc(ids * sizeof *c->all[i].ids)) != NULL &&
                 ts_records_get(r, TS_RECORD_WORD, c->all[i].ids, ids);
    }
    free(has);
    return ok;
}

static bool get_graves(ts_record_reader *r, ts_engine *e)
{
    const uint64_t count = ts_records_next(r, TS_RECORD_WORD);
    ts_engine_grave **last = &e->graves;
    for (uint64_t i = 0; i < count && r->why == NULL; i++) {
        ts_engine_grave *grave = calloc(1, sizeof *grave);
        if (grave == NULL)
            return false;
        *last = grave;
        last = &grave->next;
        uint32_t seqs = 0;
        if (!ts_records_get(r, TS_RECORD_WORD, &seqs, 1))
            return false;
        grave->seqs.all = calloc(seqs + 1ull, sizeof *grave->seqs.all);
        grave->seqs.count = grave->seqs.all == NULL ? 0 : seqs;
    }
    return r->why == NULL;
}

static bool get_pools(ts_record_reader *r, const ts_engine *e)
{
    bool ok = true;
    for (uint32_t i = 0; i < e->num_pools && ok; i++)
        ok = get_pool(r, e, &e->pools[i]);
    return ok;
}

static bool get_engine(ts_record_reader *r, ts_engine *e)
{
    ts_engine stored = {0};
    if (!ts_records_get_all(r, TS_RECORD_ENGINE, &stored, 1) || stored.num_pools > TS_POOLS_MAX ||
        stored.num_tenants > TS_TENANTS_MAX)
        return false;
    const ts_engine made = *e;
    *e = stored;
    e->limits = made.limits;
    e->pools = made.pools;
    e->tenants = made.tenants;
    e->tenant_sessions = made.tenant_sessions;
    e->tenant_claim_ids = made.tenant_claim_ids;
    e->sessions = made.sessions;
    e->claims = made.claims;
    e->num_sessions = e->num_steps = 0; /* until they are there */
    return ts_records_get_all(r, TS_RECORD_WORD, e->tenants, e->num_tenants) &&
           ts_records_get_all(r, TS_RECORD_WORD, e->tenant_sessions, e->num_tenants) &&
           ts_records_get_all(r, TS_RECORD_WORD, e->tenant_claim_ids, e->num_tenants) &&
           get_pools(r, e) && get_sessions(r, e, stored.num_sessions) &&
           get_steps(r, e, stored.num_steps) && get_claims(r, &e->claims) && get_graves(r, e);
}

ts_status ts_snapshot_read(const void *bytes, uint64_t count, ts_engine **out, ts_answers *answers,
                           char *why, size_t why_bytes)
{
    ts_record_reader r;
    ts_engine_limits limits = {0};
    ts_engine *e = NULL;
    *out = NULL;
    *answers = (ts_answers){0};
    errno = 0; /* what has no memory sets it */
    if (ts_records_open(&r, bytes, count) && ts_records_get_all(&r, TS_RECORD_LIMITS, &limits, 1) &&
        limits.sessions > 0 && (e = ts_engine_new(&limits)) != NULL &&
        ts_answers_init(answers, limits.sessions) && get_engine(&r, e) &&
        ts_answers_read(answers, &r)) {
        *out = e;
        return TS_OK;
    }
    const bool no_memory = r.why == NULL && errno == ENOMEM;
    snprintf(why, why_bytes, "the snapshot can't be read: %s%s",
             r.why != NULL ? "at "
             : no_memory   ? "there is no memory"
                           : "what it says can't be",
             r.why != NULL ? r.why : "");
    ts_answers_fini(answers);
    ts_engine_free(e);
    return no_memory ? TS_ENOMEM : TS_EPROTO;
}
