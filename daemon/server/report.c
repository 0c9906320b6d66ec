#define _GNU_SOURCE
#include "report.h"

#include "admin.h"
#include "block_sums.h"
#include "cache_report.h"
#include "clock.h"
#include "invariants.h"
#include "parked.h"
#include "plain_text.h"
#include "report_parts.h"
#include "resume.h"
#include "tinyserve_version.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LIST_MAX 200u /* an answer holds up everybody else: it is short */
#define CELLS_MAX 8192u
#define LIST_ENTRIES (1u << 13) /* table entries and places that one list looks at */
#define PROBLEMS_MAX 100u
#define CHECK_QUICK_US                                                                             \
    10000u /* a check that holds the daemon no longer may follow another at once, */
#define CHECK_REST_MS 10000u /* ... after others comes a rest */

ts_view ts_report_view(const ts_service *s, const ts_connection *c)
{
    const ts_engine *e = s->exec.engine;
    ts_view view = {.all = ts_service_is_operator(s, c->uid, c->gid), .tenant = TS_NONE};
    for (uint32_t t = 0; t < e->num_tenants; t++)
        if (e->tenants[t] == c->uid)
            view.tenant = t;
    return view;
}

ts_view ts_report_view_http(const ts_service *s)
{
    return (ts_view){.all = s->http_shows_all, .tenant = TS_NONE};
}

/* Whether memory is checked, and what came of it. */
static void describe_verify(const ts_exec *x, Tspb__RestartStatus *r)
{
    r->verify =
        x->verify ? TSPB__RESTART_STATUS__VERIFY__RESTART : TSPB__RESTART_STATUS__VERIFY__OFF;
    for (uint32_t i = 0; x->verify && i < x->engine->num_pools; i++)
        r->unsummed_pools += ts_engine_has_pool(x->engine, i) && !ts_block_sums_keeps(x->sums, i);
    r->unsummed_blocks = ts_block_sums_waiting(x->sums);
    r->checked = x->checked.done;
    r->full_blocks = x->checked.full;
    r->checked_blocks = x->checked.summed;
    r->wrong_blocks = x->checked.wrong;
    r->lost_sequences = x->checked.lost;
    r->check_seconds = x->checked.seconds;
    r->all_wrong_blocks = x->engine->wrong_blocks;
    r->all_lost_sequences = x->engine->lost_sequences;
}

static Tspb__RestartStatus *describe_restart(const ts_service *s)
{
    Tspb__RestartStatus *r = malloc(sizeof *r);
    ts_books_figures figures;
    if (r == NULL)
        return NULL;
    tspb__restart_status__init(r);
    ts_books_get_figures(s->exec.books, &figures);
    r->holder = !ts_store_holds(s->exec.store)       ? TSPB__RESTART_STATUS__HOLDER__NOBODY
                : ts_store_supervised(s->exec.store) ? TSPB__RESTART_STATUS__HOLDER__SUPERVISOR
                                                     : TSPB__RESTART_STATUS__HOLDER__SYSTEMD;
    r->journaled = s->exec.books != NULL;
    r->journal_bytes = figures.journal_bytes;
    r->journal_used_bytes = figures.journal_used;
    r->journal_waits = figures.waits;
    r->behind = figures.behind;
    r->snapshots = figures.snapshots;
    r->snapshot_bytes = figures.snapshot_bytes;
    r->snapshot_seconds = figures.snapshot_seconds;
    r->restarts = s->started.restarts;
    r->took_over = s->started.restored;
    r->seconds = s->taken_over.seconds;
    r->entries = s->started.entries;
    r->sequences = s->taken_over.sequences;
    r->awaited_sessions = ts_resume_absent(s);
    r->cause = strdup(s->taken_over.cause);
    r->failure = strdup(s->started.restored ? "" : s->started.why);
    describe_verify(&s->exec, r);
    return r;
}

static void report_status(const ts_service *s, Tspb__Reply *reply)
{
    Tspb__StatusReply *r = malloc(sizeof *r);
    if (r == NULL)
        return ts_report_no_memory(reply);
    tspb__status_reply__init(r);
    reply->body_case = TSPB__REPLY__BODY_STATUS_REPLY;
    reply->status_reply = r;
    r->version = strdup(TS_VERSION);
    r->kernel = strdup(ts_isa_name(ts_attention_isa(s->exec.attention)));
    r->pools = ts_report_zalloc(s->exec.engine->num_pools, sizeof *r->pools);
    r->pid = (uint64_t)getpid();
    r->uptime_ms = ts_now_ms() - s->started_ms;
    r->sessions = s->exec.engine->live_sessions;
    r->requests = s->requests;
    r->refused = s->refused;
    ts_host_executor_counts(s->exec.host, &r->runs, &r->launches);
    for (uint32_t i = 0; i < s->exec.num_gpus; i++) {
        uint64_t runs, launches;
        ts_gpu_executor_counts(s->exec.gpus[i].executor, &runs, &launches);
        r->runs += runs;
        r->launches += launches;
    }
    r->tokens = s->exec.engine->tokens_committed;
    r->draining = s->exec.engine->draining;
    r->longest_wait_ms = ts_parked_longest_ms(s);
    r->threads = ts_attention_threads(s->exec.attention);
    r->restart = describe_restart(s);
    bool ok = r->version != NULL && r->kernel != NULL && r->pools != NULL && r->restart != NULL &&
              r->restart->cause != NULL && r->restart->failure != NULL;
    for (uint32_t i = 0; ok && i < s->exec.engine->num_pools; i++) {
        if (!ts_engine_has_pool(s->exec.engine, i))
            continue;
        r->pools[r->n_pools] = ts_report_summarise(s, i);
        ok = r->pools[r->n_pools] != NULL;
        r->n_pools += ok;
    }
    if (!ok)
        ts_report_no_memory(reply);
}

static uint64_t *copy_bins(const uint64_t *bins, size_t *count)
{
    *count = TS_HISTOGRAM_BINS;
    while (*count > 0 && bins[*count - 1] == 0)
        (*count)--;
    return ts_report_copy(bins, *count);
}

static bool add_tenants(const ts_service *s, ts_view view, const ts_engine_pool *pool,
                        Tspb__PoolStatsReply *r)
{
    const ts_engine *e = s->exec.engine;
    r->tenants = ts_report_zalloc(e->num_tenants, sizeof *r->tenants);
    bool ok = r->tenants != NULL;
    for (uint32_t t = 0; ok && t < e->num_tenants; t++) {
        const ts_pool_tenant *use = &pool->books.tenants[t];
        if ((use->slabs == 0 && use->sequences == 0) || !ts_view_sees(view, t))
            continue;
        Tspb__TenantUse *u = malloc(sizeof *u);
        ok = u != NULL;
        if (!ok)
            break;
        tspb__tenant_use__init(u);
        u->uid = e->tenants[t];
        u->sequences = use->sequences;
        u->used_blocks = use->used;
        u->cached_blocks = use->cached;
        u->slabs = use->slabs;
        r->tenants[r->n_tenants++] = u;
    }
    return ok;
}

/* The pool's figures, or refuses (TS_EBUSY: they come later). */
static ts_status get_stats(ts_service *s, uint32_t pool, ts_pool_stats_waiter *waiter,
                           const ts_pool_stats **stats, Tspb__Reply *reply)
{
    ts_status status = ts_pool_stats_cache_get(s->pool_stats, pool, waiter, stats);
    if (status != TS_OK && status != TS_EBUSY)
        ts_report_no_memory(reply);
    return status;
}

static ts_report_state report_stats(ts_service *s, ts_view view, const char *name,
                                    ts_pool_stats_waiter *waiter, Tspb__Reply *reply)
{
    uint32_t index;
    const ts_pool_stats *stats;
    if (!ts_report_find_pool(s, name, &index, reply))
        return TS_REPORT_ANSWER;
    ts_status status = get_stats(s, index, waiter, &stats, reply);
    if (status != TS_OK)
        return status == TS_EBUSY ? TS_REPORT_LATER : TS_REPORT_ANSWER;
    Tspb__PoolStatsReply *r = malloc(sizeof *r);
    if (r == NULL) {
        ts_report_no_memory(reply);
        return TS_REPORT_ANSWER;
    }
    ts_pool_stats_lengths lengths = ts_pool_stats_lengths_of(stats, view);
    tspb__pool_stats_reply__init(r);
    reply->body_case = TSPB__REPLY__BODY_POOL_STATS_REPLY;
    reply->pool_stats_reply = r;
    r->pool = ts_report_summarise(s, index);
    r->others_hidden = !view.all;
    r->stored_tokens = stats->stored_tokens;
    r->seen_tokens = stats->seen_tokens;
    r->used_slots = stats->used_slots;
    r->reserved_slots = stats->reserved_slots;
    r->table_blocks = stats->table_blocks;
    r->longest_tokens = lengths.longest;
    r->length_histogram = copy_bins(lengths.bins, &r->n_length_histogram);
    r->free_run_histogram = copy_bins(stats->free_runs, &r->n_free_run_histogram);
    if (r->pool == NULL || r->length_histogram == NULL || r->free_run_histogram == NULL ||
        !add_tenants(s, view, &s->exec.engine->pools[index], r))
        ts_report_no_memory(reply);
    return TS_REPORT_ANSWER;
}

/* Adds the figures' cells up to the map's, which are as many of them each. */
static void fill_map(const ts_pool_stats *stats, ts_view view, Tspb__PoolMapReply *r)
{
    for (uint32_t i = 0; i < stats->num_cells; i++) {
        const ts_pool_stats_cell *from = &stats->cells[i];
        uint32_t cell = (uint32_t)((uint64_t)i * stats->cell_blocks / r->blocks_per_cell);
        r->used[cell] += from->used;
        r->cached[cell] += from->cached;
        if (!ts_view_sees(view, from->tenant)) {
            if (from->used > 0)
                r->owners[cell] = TS_OWNER_SEVERAL;
            continue;
        }
        r->shared[cell] += from->shared;
        r->tokens[cell] += from->tokens;
        r->owners[cell] = ts_owner_of_both(r->owners[cell], from->owner);
    }
}

static ts_report_state report_map(ts_service *s, ts_view view, const Tspb__PoolMap *request,
                                  ts_pool_stats_waiter *waiter, Tspb__Reply *reply)
{
    uint32_t index, wanted = request->cells;
    const ts_pool_stats *stats;
    if (!ts_report_find_pool(s, request->pool, &index, reply))
        return TS_REPORT_ANSWER;
    if (wanted == 0 || wanted > CELLS_MAX) {
        char cells[48];
        snprintf(cells, sizeof cells, "%u cells; the limits are 1..%u", wanted, CELLS_MAX);
        ts_report_refuse(reply, TS_EINVAL, "a map of %s", cells);
        return TS_REPORT_ANSWER;
    }
    ts_status status = get_stats(s, index, waiter, &stats, reply);
    if (status != TS_OK)
        return status == TS_EBUSY ? TS_REPORT_LATER : TS_REPORT_ANSWER;
    Tspb__PoolMapReply *r = malloc(sizeof *r);
    if (r == NULL) {
        ts_report_no_memory(reply);
        return TS_REPORT_ANSWER;
    }
    tspb__pool_map_reply__init(r);
    reply->body_case = TSPB__REPLY__BODY_POOL_MAP_REPLY;
    reply->pool_map_reply = r;
    uint32_t per_cell = (stats->num_blocks - 1) / wanted + 1; /* in whole cells of the figures */
    per_cell = (per_cell - 1) / stats->cell_blocks * stats->cell_blocks + stats->cell_blocks;
    uint32_t cells = (stats->num_blocks - 1) / per_cell + 1;
    r->blocks_per_cell = per_cell;
    r->others_hidden = !view.all;
    r->pool = ts_report_summarise(s, index);
    r->used = ts_report_zalloc(cells, sizeof *r->used);
    r->shared = ts_report_zalloc(cells, sizeof *r->shared);
    r->cached = ts_report_zalloc(cells, sizeof *r->cached);
    r->tokens = ts_report_zalloc(cells, sizeof *r->tokens);
    r->owners = ts_report_zalloc(cells, sizeof *r->owners);
    if (r->pool != NULL && r->used != NULL && r->shared != NULL && r->cached != NULL &&
        r->tokens != NULL && r->owners != NULL) {
        r->n_used = r->n_shared = r->n_cached = r->n_tokens = r->n_owners = cells;
        fill_map(stats, view, r);
    } else {
        ts_report_no_memory(reply);
    }
    return TS_REPORT_ANSWER;
}

static void report_sessions(const ts_service *s, ts_view view, const Tspb__ListSessions *request,
                            Tspb__Reply *reply)
{
    const ts_engine *e = s->exec.engine;
    uint32_t limit = request->limit == 0 || request->limit > LIST_MAX ? LIST_MAX : request->limit;
    Tspb__SessionList *list = malloc(sizeof *list);
    if (list == NULL)
        return ts_report_no_memory(reply);
    tspb__session_list__init(list);
    reply->body_case = TSPB__REPLY__BODY_SESSION_LIST;
    reply->session_list = list;
    list->sessions = ts_report_zalloc(limit, sizeof *list->sessions);
    /* In order of their place in the table, the low half of an id. */
    for (uint32_t i = request->after == 0 ? 0 : (uint32_t)request->after + 1;
         list->sessions != NULL && i < e->num_sessions; i++) {
        const ts_session *session = &e->sessions[i];
        if (!session->live || !ts_view_sees(view, session->tenant))
            continue;
        if (list->n_sessions == limit) {
            list->more = true;
            break;
        }
        Tspb__SessionInfo *info = malloc(sizeof *info);
        if (info == NULL)
            return ts_report_no_memory(reply);
        tspb__session_info__init(info);
        list->sessions[list->n_sessions++] = info;
        info->session = ts_engine_session_id(e, i);
        info->uid = e->tenants[session->tenant];
        info->pid = session->pid;
        info->program = strdup(session->program);
        info->sequences = session->sequences;
        info->blocks = session->blocks;
        info->steps = session->steps;
        info->exchange_bytes = session->exchange_bytes;
        const ts_connection *own = ts_service_connection_of(s, info->session);
        info->requests = own == NULL ? 0 : own->requests;
        info->awaited = ts_resume_awaits(s, info->session);
        if (info->program == NULL)
            return ts_report_no_memory(reply);
    }
    if (list->sessions == NULL)
        ts_report_no_memory(reply);
}

static Tspb__SeqInfo *describe(const ts_engine *e, const ts_engine_pool *pool, uint32_t i,
                               uint64_t now_ms)
{
    const ts_sequence *seq = &pool->seqs.all[i];
    Tspb__SeqInfo *info = malloc(sizeof *info);
    if (info == NULL)
        return NULL;
    tspb__seq_info__init(info);
    info->seq = ts_sequence_id(&pool->seqs, i);
    info->length = seq->length;
    info->blocks = seq->num_blocks;
    for (uint32_t b = 0; b < seq->num_blocks; b++)
        info->shared_blocks += ts_pool_refs(&pool->books, seq->blocks[b]) > 1;
    info->uid = e->tenants[seq->tenant];
    info->session = seq->owner == TS_NONE ? 0 : ts_engine_session_id(e, seq->owner);
    info->in_step = seq->step != TS_NONE;
    info->on_ticket = ts_sequence_has_ticket(&pool->seqs, seq);
    info->left_ms = ts_sequence_left_ms(&pool->seqs, seq, now_ms);
    info->name = strdup(seq->name != NULL ? seq->name : "");
    if (info->name == NULL) {
        free(info);
        return NULL;
    }
    return info;
}

static void report_seqs(const ts_service *s, ts_view view, const Tspb__ListSeqs *request,
                        Tspb__Reply *reply)
{
    const ts_engine *e = s->exec.engine;
    uint32_t index;
    if (!ts_report_find_pool(s, request->pool, &index, reply))
        return;
    const ts_engine_pool *pool = &e->pools[index];
    uint32_t limit = request->limit == 0 || request->limit > LIST_MAX ? LIST_MAX : request->limit;
    Tspb__SeqList *list = malloc(sizeof *list);
    if (list == NULL)
        return ts_report_no_memory(reply);
    tspb__seq_list__init(list);
    reply->body_case = TSPB__REPLY__BODY_SEQ_LIST;
    reply->seq_list = list;
    list->seqs = ts_report_zalloc(limit, sizeof *list->seqs);
    const uint64_t now_ms = ts_now_ms();
    uint64_t entries = 0; /* looked at: a list that would take too many goes on in the next */
    for (uint64_t i = request->after; list->seqs != NULL && i < pool->seqs.count; i++) {
        const ts_sequence *seq = &pool->seqs.all[i];
        if (list->n_seqs == limit || entries > LIST_ENTRIES) {
            list->next = i;
            break;
        }
        entries++;
        if (seq->tenant == TS_NONE || seq->step == TS_SEQUENCE_DYING ||
            ts_sequence_is_over(&pool->seqs, seq, now_ms) || !ts_view_sees(view, seq->tenant))
            continue;
        entries += seq->num_blocks;
        Tspb__SeqInfo *info = describe(e, pool, (uint32_t)i, now_ms);
        if (info == NULL)
            return ts_report_no_memory(reply);
        list->seqs[list->n_seqs++] = info;
    }
    if (list->seqs == NULL)
        ts_report_no_memory(reply);
}

static void add_problem(void *arg, const char *sentence)
{
    Tspb__CheckReply *r = arg;
    char *copy = r->n_problems < PROBLEMS_MAX ? strdup(sentence) : NULL;
    if (copy != NULL)
        r->problems[r->n_problems++] = copy;
}

/* Processor time of this thread. */
static uint64_t thread_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void report_check(ts_service *s, ts_view view, Tspb__Reply *reply)
{
    uint64_t now_ms = ts_now_ms();
    char wait[64];
    if (!view.all)
        return ts_report_refuse(reply, TS_EPERM, "a check holds up everybody: it is for %s",
                                "operators");
    if (now_ms < s->check_after_ms) {
        snprintf(wait, sizeof wait, "the next may begin in %llu s",
                 (unsigned long long)(s->check_after_ms - now_ms + 999) / 1000);
        return ts_report_refuse(reply, TS_EBUSY, "a check has just held up everybody: %s", wait);
    }
    Tspb__CheckReply *r = malloc(sizeof *r);
    if (r == NULL)
        return ts_report_no_memory(reply);
    tspb__check_reply__init(r);
    reply->body_case = TSPB__REPLY__BODY_CHECK_REPLY;
    reply->check_reply = r;
    r->problems = ts_report_zalloc(PROBLEMS_MAX, sizeof *r->problems);
    if (r->problems == NULL)
        return ts_report_no_memory(reply);
    const uint64_t began_ns = ts_now_ns(), began_cpu_ns = thread_ns();
    r->checked = ts_invariants_check(s->exec.engine, add_problem, r);
    r->held_us = (ts_now_ns() - began_ns) / 1000;
    if ((thread_ns() - began_cpu_ns) / 1000 > CHECK_QUICK_US) /* others' work aside */
        s->check_after_ms = ts_now_ms() + CHECK_REST_MS;
}

ts_report_state ts_report(ts_service *s, ts_view view, const Tspb__Request *request,
                          ts_pool_stats_waiter *waiter, Tspb__Reply *reply)
{
    switch ((int)request->body_case) { /* most requests are no such question */
    case TSPB__REQUEST__BODY_STATUS:
        report_status(s, reply);
        return TS_REPORT_ANSWER;
    case TSPB__REQUEST__BODY_POOL_STATS:
        return report_stats(s, view, request->pool_stats->pool, waiter, reply);
    case TSPB__REQUEST__BODY_POOL_MAP:
        return report_map(s, view, request->pool_map, waiter, reply);
    case TSPB__REQUEST__BODY_LIST_SESSIONS:
        report_sessions(s, view, request->list_sessions, reply);
        return TS_REPORT_ANSWER;
    case TSPB__REQUEST__BODY_LIST_SEQS:
        report_seqs(s, view, request->list_seqs, reply);
        return TS_REPORT_ANSWER;
    case TSPB__REQUEST__BODY_CACHE_STATS:
        ts_report_cache(s, view, request->cache_stats, reply);
        return TS_REPORT_ANSWER;
    case TSPB__REQUEST__BODY_CHECK:
        report_check(s, view, reply);
        return TS_REPORT_ANSWER;
    default:
        return TS_REPORT_NONE;
    }
}

void ts_report_free(Tspb__Reply *reply)
{
    switch ((int)reply->body_case) { /* the bodies of other answers aren't freed here */
    case TSPB__REPLY__BODY_STATUS_REPLY:
        tspb__status_reply__free_unpacked(reply->status_reply, NULL);
        break;
    case TSPB__REPLY__BODY_POOL_STATS_REPLY:
        tspb__pool_stats_reply__free_unpacked(reply->pool_stats_reply, NULL);
        break;
    case TSPB__REPLY__BODY_POOL_MAP_REPLY:
        tspb__pool_map_reply__free_unpacked(reply->pool_map_reply, NULL);
        break;
    case TSPB__REPLY__BODY_SESSION_LIST:
        tspb__session_list__free_unpacked(reply->session_list, NULL);
        break;
    case TSPB__REPLY__BODY_SEQ_LIST:
        tspb__seq_list__free_unpacked(reply->seq_list, NULL);
        break;
    case TSPB__REPLY__BODY_CACHE_STATS_REPLY:
        tspb__cache_stats_reply__free_unpacked(reply->cache_stats_reply, NULL);
        break;
    case TSPB__REPLY__BODY_CHECK_REPLY:
        tspb__check_reply__free_unpacked(reply->check_reply, NULL);
        break;
    default:
        break;
    }
    if (reply->status != TS_OK)
        free(reply->message);
}

bool ts_report_http_ready(ts_service *s, ts_pool_stats_waiter *waiter)
{
    const ts_pool_stats *stats;
    for (uint32_t i = 0; i < s->exec.engine->num_pools; i++)
        if (ts_engine_has_pool(s->exec.engine, i) &&
            ts_pool_stats_cache_get(s->pool_stats, i, waiter, &stats) == TS_EBUSY)
            return false;
    return true;
}

/* The figures came too late for the question. */
static void told_too_late(ts_pool_stats_waiter *waiter, void *service)
{
    (void)service;
    free(waiter);
}

bool ts_report_http(ts_service *s, const Tspb__Request *request, Tspb__Reply *reply)
{
    ts_pool_stats_waiter *waiter = malloc(sizeof *waiter);
    tspb__reply__init(reply);
    if (waiter == NULL)
        return false;
    waiter->ready = told_too_late;
    ts_report_state state = ts_report(s, ts_report_view_http(s), request, waiter, reply);
    if (state != TS_REPORT_LATER)
        free(waiter);
    if (state == TS_REPORT_ANSWER && reply->status == TS_OK && ts_text_escape_all(&reply->base))
        return true;
    ts_report_free(reply);
    return false;
}
