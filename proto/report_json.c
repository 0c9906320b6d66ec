#include "report_json.h"

#include "cache_figures.h"
#include "namespace_text.h"
#include "tinyserve_types.h"

frag_figures frag_work_out(const Tspb__PoolStatsReply *r)
{
    const Tspb__PoolSummary *p = r->pool;
    uint64_t held = r->used_slots - r->reserved_slots;
    uint64_t token_bytes = p->block_bytes / p->block_tokens, shown = 0;
    for (size_t i = 0; i < r->n_length_histogram; i++)
        shown += r->length_histogram[i];
    return (frag_figures){
        .efficiency = held == 0 ? 1.0 : (double)r->stored_tokens / (double)held,
        .tail_bytes = (held - r->stored_tokens) * token_bytes,
        .stored_bytes = p->used_blocks * p->block_bytes,
        .seen_bytes = r->table_blocks * p->block_bytes,
        .sharing = p->used_blocks == 0 ? 1.0 : (double)r->table_blocks / (double)p->used_blocks,
        .contiguous_bytes = shown * r->longest_tokens * token_bytes,
    };
}

static json_int_t integer(uint64_t n)
{
    return (json_int_t)n;
}

/* An id as tsctl's tables, its orders and the log have it. A number of JSON's can't hold all. */
static json_t *id(uint64_t n)
{
    return json_sprintf("%llx", (unsigned long long)n);
}

const char *report_dtype(const Tspb__PoolSummary *p)
{
    const char *name = ts_dtype_name((ts_dtype)p->dtype);
    return name == NULL ? "unknown" : name;
}

/* As the configuration has it; a newer daemon may have others. */
static const char *layout_of(const Tspb__PoolSummary *p)
{
    return p->layout == TS_LAYOUT_NHD ? "nhd" : p->layout == TS_LAYOUT_HND ? "hnd" : "unknown";
}

static json_t *summary(const Tspb__PoolSummary *p)
{
    return json_pack(
        "{s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:i, s:i, s:i, s:i, s:I, s:I, s:I, s:I, s:I, s:I, "
        "s:I, s:I, s:I, s:i, s:i, s:i, s:I, s:i, s:b, s:I, s:I, s:I, s:b}",
        "name", p->name, "device", p->device, "device_name", p->device_name, "memory", p->memory,
        "kernel", p->kernel, "dtype", report_dtype(p), "layout", layout_of(p), "layers", p->layers,
        "kv_heads", p->kv_heads, "head_dim", p->head_dim, "block_tokens", p->block_tokens,
        "block_bytes", integer(p->block_bytes), "blocks", integer(p->blocks), "used_blocks",
        integer(p->used_blocks), "shared_blocks", integer(p->shared_blocks), "cached_blocks",
        integer(p->cached_blocks), "free_blocks",
        integer(p->blocks - p->used_blocks - p->cached_blocks), "sequences", integer(p->sequences),
        "kept_sequences", integer(p->kept_sequences), "open_steps", integer(p->open_steps),
        "slab_blocks", p->slab_blocks, "slabs", p->slabs, "granted_slabs", p->granted_slabs,
        "max_blocks", integer(p->max_blocks), "waiting_sessions", p->waiting_sessions, "cache",
        !p->cache_off, "asked_tokens", integer(p->asked_tokens), "found_tokens",
        integer(p->found_tokens), "evicted_blocks", integer(p->evicted_blocks), "mps", p->mps);
}

json_t *json_pools(const Tspb__StatusReply *r)
{
    json_t *pools = json_array();
    for (size_t i = 0; i < r->n_pools; i++)
        json_array_append_new(pools, summary(r->pools[i]));
    return pools;
}

static const char *holder_of(const Tspb__RestartStatus *r)
{
    return r->holder == TSPB__RESTART_STATUS__HOLDER__SYSTEMD      ? "systemd"
           : r->holder == TSPB__RESTART_STATUS__HOLDER__SUPERVISOR ? "supervisor"
           : r->holder == TSPB__RESTART_STATUS__HOLDER__NOBODY     ? "nobody"
                                                                   : "unknown";
}

static json_t *verify(const Tspb__RestartStatus *r)
{
    return r->verify == TSPB__RESTART_STATUS__VERIFY__RESTART ? json_string("restart")
           : r->verify == TSPB__RESTART_STATUS__VERIFY__OFF   ? json_string("off")
                                                              : json_null();
}

/* What the daemon has no figure for is null; all of it, where an older daemon tells nothing. */
static json_t *restart(const Tspb__RestartStatus *r)
{
    if (r == NULL)
        return json_null();
    json_t *journal = json_null(), *last = json_null(), *check = json_null();
    if (r->journaled)
        journal =
            json_pack("{s:I, s:I, s:I, s:i, s:I, s:f}", "bytes", integer(r->journal_bytes),
                      "used_bytes", integer(r->journal_used_bytes), "waits",
                      integer(r->journal_waits), "snapshots", (int)r->snapshots, "snapshot_bytes",
                      integer(r->snapshot_bytes), "snapshot_seconds", r->snapshot_seconds);
    if (r->checked)
        check = json_pack("{s:I, s:I, s:I, s:I, s:f}", "full_blocks", integer(r->full_blocks),
                          "checked_blocks", integer(r->checked_blocks), "wrong_blocks",
                          integer(r->wrong_blocks), "lost_sequences", integer(r->lost_sequences),
                          "seconds", r->check_seconds);
    if (r->took_over)
        last = json_pack("{s:o, s:f, s:I, s:I, s:i, s:o}", "cause",
                         r->cause[0] == '\0' ? json_null() : json_string(r->cause), "seconds",
                         r->seconds, "entries", integer(r->entries), "sequences",
                         integer(r->sequences), "awaited_sessions", (int)r->awaited_sessions,
                         "check", check);
    else
        json_decref(check);
    return json_pack("{s:s, s:i, s:o, s:o, s:o, s:o, s:i, s:i, s:I, s:I}", "holder", holder_of(r),
                     "restarts", (int)r->restarts, "journal", journal, "last", last, "failure",
                     r->failure[0] == '\0' ? json_null() : json_string(r->failure), "verify",
                     verify(r), "unsummed_pools", (int)r->unsummed_pools, "unsummed_blocks",
                     (int)r->unsummed_blocks, "wrong_blocks", integer(r->all_wrong_blocks),
                     "lost_sequences", integer(r->all_lost_sequences));
}

json_t *json_status(const Tspb__StatusReply *r)
{
    return json_pack(
        "{s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:s, s:i, s:b, s:I, s:o, s:o}", "version",
        r->version, "pid", integer(r->pid), "uptime_ms", integer(r->uptime_ms), "sessions",
        integer(r->sessions), "requests", integer(r->requests), "refused", integer(r->refused),
        "runs", integer(r->runs), "launches", integer(r->launches), "tokens", integer(r->tokens),
        "kernel", r->kernel, "threads", r->threads, "draining", r->draining, "longest_wait_ms",
        integer(r->longest_wait_ms), "restart", restart(r->restart), "pools", json_pools(r));
}

void json_sessions(json_t *list, const Tspb__SessionList *r)
{
    for (size_t i = 0; i < r->n_sessions; i++) {
        const Tspb__SessionInfo *s = r->sessions[i];
        json_array_append_new(
            list, json_pack("{s:o, s:i, s:i, s:s, s:I, s:I, s:i, s:I, s:I, s:b}", "session",
                            id(s->session), "uid", s->uid, "pid", s->pid, "program", s->program,
                            "sequences", integer(s->sequences), "blocks", integer(s->blocks),
                            "open_steps", s->steps, "exchange_bytes", integer(s->exchange_bytes),
                            "requests", integer(s->requests), "awaited", s->awaited));
    }
}

void json_seqs(json_t *list, const Tspb__SeqList *r)
{
    for (size_t i = 0; i < r->n_seqs; i++) {
        const Tspb__SeqInfo *s = r->seqs[i];
        json_array_append_new(
            list,
            json_pack("{s:o, s:i, s:i, s:i, s:i, s:o, s:s, s:b, s:b, s:o}", "seq", id(s->seq),
                      "tokens", s->length, "blocks", s->blocks, "shared_blocks", s->shared_blocks,
                      "uid", s->uid, "session", s->session == 0 ? json_null() : id(s->session),
                      "name", s->name, "in_step", s->in_step, "on_ticket", s->on_ticket, "left_ms",
                      s->left_ms == 0 ? json_null() : json_integer(integer(s->left_ms))));
    }
}

/* Bin i of the daemon's histograms begins at 2^i; the first at `lowest`. */
static json_t *histogram(const uint64_t *bins, size_t count, uint64_t lowest)
{
    json_t *list = json_array();
    for (size_t i = 0; i < count; i++)
        if (bins[i] > 0)
            json_array_append_new(list, json_pack("{s:I, s:I}", "from",
                                                  integer(i == 0 ? lowest : (uint64_t)1 << i),
                                                  "count", integer(bins[i])));
    return list;
}

json_t *json_frag(const Tspb__PoolStatsReply *r)
{
    frag_figures f = frag_work_out(r);
    json_t *tenants = json_array();
    for (size_t i = 0; i < r->n_tenants; i++)
        json_array_append_new(
            tenants,
            json_pack("{s:I, s:I, s:I, s:I, s:I, s:i}", "uid", integer(r->tenants[i]->uid),
                      "sequences", integer(r->tenants[i]->sequences), "used_blocks",
                      integer(r->tenants[i]->used_blocks), "used_bytes",
                      integer(r->tenants[i]->used_blocks * r->pool->block_bytes), "cached_blocks",
                      integer(r->tenants[i]->cached_blocks), "slabs", r->tenants[i]->slabs));
    return json_pack(
        "{s:o, s:I, s:I, s:I, s:I, s:f, s:I, s:I, s:I, s:f, s:I, s:I, s:o, s:o, s:o, s:b}", "pool",
        summary(r->pool), "stored_tokens", integer(r->stored_tokens), "seen_tokens",
        integer(r->seen_tokens), "used_slots", integer(r->used_slots), "reserved_slots",
        integer(r->reserved_slots), "efficiency", f.efficiency, "tail_waste_bytes",
        integer(f.tail_bytes), "stored_bytes", integer(f.stored_bytes), "seen_bytes",
        integer(f.seen_bytes), "sharing", f.sharing, "contiguous_bytes",
        integer(f.contiguous_bytes), "longest_tokens", integer(r->longest_tokens), "lengths",
        histogram(r->length_histogram, r->n_length_histogram, 0), "free_runs",
        histogram(r->free_run_histogram, r->n_free_run_histogram, 1), "tenants", tenants,
        "others_hidden", r->others_hidden);
}

static json_t *numbers(const uint32_t *values, size_t count)
{
    json_t *list = json_array();
    for (size_t i = 0; i < count; i++)
        json_array_append_new(list, json_integer(values[i]));
    return list;
}

json_t *json_map(const Tspb__PoolMapReply *r)
{
    return json_pack("{s:o, s:i, s:o, s:o, s:o, s:o, s:o, s:b}", "pool", summary(r->pool),
                     "blocks_per_cell", r->blocks_per_cell, "used", numbers(r->used, r->n_used),
                     "shared", numbers(r->shared, r->n_shared), "cached",
                     numbers(r->cached, r->n_cached), "tokens", numbers(r->tokens, r->n_tokens),
                     "owners", numbers(r->owners, r->n_owners), "others_hidden", r->others_hidden);
}

static json_t *causes(const Tspb__PoolSummary *p)
{
    json_t *all = json_object();
    for (size_t i = 0; i < p->n_evicted_by_cause && i < TS_CACHE_CAUSES; i++)
        json_object_set_new(all, ts_cache_causes[i], json_integer(integer(p->evicted_by_cause[i])));
    return all;
}

static json_t *ages(const Tspb__PoolSummary *p)
{
    json_t *list = json_array();
    for (size_t i = 0; i < p->n_evicted_by_age && i <= TS_CACHE_AGES; i++)
        json_array_append_new(
            list, json_pack("{s:o, s:I}", "up_to_s",
                            i < TS_CACHE_AGES ? json_integer(ts_cache_ages[i]) : json_null(),
                            "blocks", integer(p->evicted_by_age[i])));
    return list;
}

json_t *json_cache(const Tspb__CacheStatsReply *r)
{
    const Tspb__PoolSummary *p = r->pool;
    char shown[TS_NAMESPACE_TEXT_BYTES];
    json_t *largest = json_array();
    for (size_t i = 0; i < r->n_largest; i++) {
        const Tspb__SpaceUse *u = r->largest[i];
        json_array_append_new(
            largest, json_pack("{s:s, s:I, s:I, s:I, s:I, s:I}", "namespace",
                               ts_namespace_show(u->space.data, u->space.len, shown), "uid",
                               integer(u->uid), "blocks", integer(u->blocks), "asked_tokens",
                               integer(u->asked_tokens), "found_tokens", integer(u->found_tokens),
                               "sequences", integer(u->sequences)));
    }
    return json_pack("{s:o, s:f, s:o, s:o, s:f, s:I, s:o, s:b}", "pool", summary(p), "hit_rate",
                     ts_cache_hit_rate(p->found_tokens, p->asked_tokens), "evicted_by_cause",
                     causes(p), "evicted_by_age", ages(p), "evicted_mean_age_s",
                     ts_cache_mean_age(p), "namespaces", integer(r->namespaces),
                     "largest_namespaces", largest, "others_hidden", r->others_hidden);
}

json_t *json_check(const Tspb__CheckReply *r)
{
    json_t *problems = json_array();
    for (size_t i = 0; i < r->n_problems; i++)
        json_array_append_new(problems, json_string(r->problems[i]));
    return json_pack("{s:I, s:o, s:I}", "checked", integer(r->checked), "problems", problems,
                     "held_us", integer(r->held_us));
}
