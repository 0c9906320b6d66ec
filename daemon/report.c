#define _GNU_SOURCE
#include "report.h"

#include "admin.h"
#include "clock.h"
#include "plain_text.h"
#include "tinyserve_version.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LIST_MAX 4096u
#define CELLS_MAX 65536u
#define PROBLEMS_MAX 100u

ts_view ts_report_view(const ts_service *s, const ts_connection *c)
{
    const ts_engine *e = s->engine;
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

/* Replies are built of malloc'ed parts, so that protobuf-c's own free function fits them. */
static void *zalloc(size_t count, size_t bytes)
{
    return calloc(count > 0 ? count : 1, bytes);
}

static void refuse(Tspb__Reply *reply, ts_status status, const char *format, const char *word)
{
    char *message = NULL;
    if (asprintf(&message, format, word) < 0)
        message = strdup("no memory");
    reply->status = (uint32_t)status;
    reply->message = message;
}

static void no_memory(Tspb__Reply *reply)
{
    refuse(reply, TS_ENOMEM, "no memory for the %s", "answer");
}

static Tspb__PoolSummary *summarise(const ts_service *s, uint32_t index)
{
    const ts_engine_pool *pool = &s->engine->pools[index];
    const ts_geometry *g = &pool->config.geometry;
    Tspb__PoolSummary *p = malloc(sizeof *p);
    if (p == NULL)
        return NULL;
    tspb__pool_summary__init(p);
    p->name = strdup(pool->config.name);
    p->device = strdup(pool->config.device);
    p->memory = strdup(pool->config.memory);
    p->device_name = strdup(pool->config.device_name);
    p->kernel = strdup(pool->config.on_gpu ? ts_kernel_name(pool->config.kernel)
                                           : ts_isa_name(ts_attention_isa(s->attention)));
    if (p->name == NULL || p->device == NULL || p->memory == NULL || p->device_name == NULL ||
        p->kernel == NULL) {
        tspb__pool_summary__free_unpacked(p, NULL);
        return NULL;
    }
    p->layers = g->layers;
    p->kv_heads = g->kv_heads;
    p->head_dim = g->head_dim;
    p->block_tokens = g->block_tokens;
    p->dtype = g->dtype;
    p->layout = g->layout;
    p->blocks = pool->books.num_blocks;
    p->max_blocks = pool->books.max_blocks;
    p->used_blocks = pool->books.used;
    p->shared_blocks = pool->books.shared;
    p->sequences = pool->seqs.live;
    p->kept_sequences = pool->seqs.kept;
    p->open_steps = pool->open_steps;
    p->block_bytes = ts_geometry_block_bytes(g);
    p->slab_blocks = pool->books.slab_blocks;
    p->slabs = pool->books.num_slabs;
    p->granted_slabs = pool->books.ungranted;
    return p;
}

static void report_status(const ts_service *s, Tspb__Reply *reply)
{
    Tspb__StatusReply *r = malloc(sizeof *r);
    if (r == NULL)
        return no_memory(reply);
    tspb__status_reply__init(r);
    reply->body_case = TSPB__REPLY__BODY_STATUS_REPLY;
    reply->status_reply = r;
    r->version = strdup(TS_VERSION);
    r->kernel = strdup(ts_isa_name(ts_attention_isa(s->attention)));
    r->pools = zalloc(s->engine->num_pools, sizeof *r->pools);
    r->pid = (uint64_t)getpid();
    r->uptime_ms = ts_now_ms() - s->started_ms;
    r->sessions = s->engine->live_sessions;
    r->requests = s->requests;
    r->refused = s->refused;
    ts_batch_counts(s->batch, &r->runs, &r->launches);
    for (uint32_t i = 0; i < s->num_gpus; i++) {
        uint64_t runs, launches;
        ts_gpu_batch_counts(s->gpus[i].batch, &runs, &launches);
        r->runs += runs;
        r->launches += launches;
    }
    r->tokens = s->engine->tokens_committed;
    r->draining = s->draining;
    r->threads = ts_attention_threads(s->attention);
    bool ok = r->version != NULL && r->kernel != NULL && r->pools != NULL;
    for (uint32_t i = 0; ok && i < s->engine->num_pools; i++) {
        if (!ts_engine_has_pool(s->engine, i))
            continue;
        r->pools[r->n_pools] = summarise(s, i);
        ok = r->pools[r->n_pools] != NULL;
        r->n_pools += ok;
    }
    if (!ok)
        no_memory(reply);
}

/* The pool's index, or refuses. An empty name means the only pool. */
static bool find_pool(const ts_service *s, const char *name, uint32_t *index, Tspb__Reply *reply)
{
    ts_answer a = {0};
    *index = ts_engine_pool_named(s->engine, name, &a);
    if (*index == TS_NONE)
        refuse(reply, a.status, "%s", a.message);
    return *index != TS_NONE;
}

static uint64_t *copy_bins(const uint64_t *bins, size_t *count)
{
    *count = TS_HISTOGRAM_BINS;
    while (*count > 0 && bins[*count - 1] == 0)
        (*count)--;
    uint64_t *copy = zalloc(*count, sizeof *copy);
    if (copy != NULL && *count > 0)
        memcpy(copy, bins, *count * sizeof *copy);
    return copy;
}

static bool add_tenants(const ts_service *s, ts_view view, const ts_engine_pool *pool,
                        Tspb__PoolStatsReply *r)
{
    const ts_engine *e = s->engine;
    uint64_t *sequences = zalloc(e->num_tenants, sizeof *sequences);
    r->tenants = zalloc(e->num_tenants, sizeof *r->tenants);
    bool ok = sequences != NULL && r->tenants != NULL;
    for (uint32_t i = 0; ok && i < pool->seqs.count; i++)
        if (pool->seqs.all[i].tenant != TS_NONE)
            sequences[pool->seqs.all[i].tenant]++;
    for (uint32_t t = 0; ok && t < e->num_tenants; t++) {
        const ts_pool_tenant *use = &pool->books.tenants[t];
        if (use->slabs == 0 && sequences[t] == 0)
            continue;
        if (!ts_view_sees(view, t))
            continue;
        Tspb__TenantUse *u = malloc(sizeof *u);
        ok = u != NULL;
        if (!ok)
            break;
        tspb__tenant_use__init(u);
        u->uid = e->tenants[t];
        u->sequences = sequences[t];
        u->used_blocks = use->used;
        u->slabs = use->slabs;
        r->tenants[r->n_tenants++] = u;
    }
    free(sequences);
    return ok;
}

static void report_stats(const ts_service *s, ts_view view, const char *name, Tspb__Reply *reply)
{
    uint32_t index;
    ts_survey survey;
    if (!find_pool(s, name, &index, reply))
        return;
    Tspb__PoolStatsReply *r = malloc(sizeof *r);
    if (r == NULL)
        return no_memory(reply);
    tspb__pool_stats_reply__init(r);
    reply->body_case = TSPB__REPLY__BODY_POOL_STATS_REPLY;
    reply->pool_stats_reply = r;
    if (ts_survey_pool(s->engine, index, view, &survey) != TS_OK)
        return no_memory(reply);
    free(survey.fill);
    r->pool = summarise(s, index);
    r->others_hidden = !view.all;
    r->stored_tokens = survey.stored_tokens;
    r->seen_tokens = survey.seen_tokens;
    r->used_slots = survey.used_slots;
    r->reserved_slots = survey.reserved_slots;
    r->table_blocks = survey.table_blocks;
    r->longest_tokens = survey.longest;
    r->length_histogram = copy_bins(survey.lengths, &r->n_length_histogram);
    r->free_run_histogram = copy_bins(survey.free_runs, &r->n_free_run_histogram);
    if (r->pool == NULL || r->length_histogram == NULL || r->free_run_histogram == NULL ||
        !add_tenants(s, view, &s->engine->pools[index], r))
        no_memory(reply);
}

static void report_map(const ts_service *s, ts_view view, const Tspb__PoolMap *request,
                       Tspb__Reply *reply)
{
    uint32_t index;
    ts_survey survey;
    if (!find_pool(s, request->pool, &index, reply))
        return;
    const ts_pool_books *books = &s->engine->pools[index].books;
    uint32_t wanted = request->cells;
    if (wanted == 0 || wanted > CELLS_MAX)
        return refuse(reply, TS_EINVAL, "a map has %s cells", "1..65536");
    Tspb__PoolMapReply *r = malloc(sizeof *r);
    if (r == NULL)
        return no_memory(reply);
    tspb__pool_map_reply__init(r);
    reply->body_case = TSPB__REPLY__BODY_POOL_MAP_REPLY;
    reply->pool_map_reply = r;
    if (ts_survey_pool(s->engine, index, view, &survey) != TS_OK)
        return no_memory(reply);
    uint32_t per_cell = (books->num_blocks - 1) / wanted + 1;
    uint32_t cells = (books->num_blocks - 1) / per_cell + 1;
    r->blocks_per_cell = per_cell;
    r->others_hidden = !view.all;
    r->pool = summarise(s, index);
    r->used = zalloc(cells, sizeof *r->used);
    r->shared = zalloc(cells, sizeof *r->shared);
    r->tokens = zalloc(cells, sizeof *r->tokens);
    r->owners = zalloc(cells, sizeof *r->owners);
    uint32_t *owners = zalloc(books->num_blocks, sizeof *owners);
    if (r->pool != NULL && r->used != NULL && r->shared != NULL && r->tokens != NULL &&
        r->owners != NULL && owners != NULL) {
        r->n_used = r->n_shared = r->n_tokens = r->n_owners = cells;
        ts_survey_owners(s->engine, index, owners);
        for (uint32_t b = 0; b < books->num_blocks; b++) {
            uint32_t refs = ts_pool_refs(books, b), cell = b / per_cell;
            r->used[cell] += refs > 0;
            if (!ts_view_sees(view, books->slabs[b / books->slab_blocks].tenant)) {
                if (refs > 0)
                    r->owners[cell] = TS_OWNER_SEVERAL;
                continue;
            }
            r->shared[cell] += refs > 1;
            r->tokens[cell] += survey.fill[b];
            r->owners[cell] = ts_owner_of_both(r->owners[cell], owners[b]);
        }
    } else {
        no_memory(reply);
    }
    free(owners);
    free(survey.fill);
}

static void report_sessions(const ts_service *s, ts_view view, const Tspb__ListSessions *request,
                            Tspb__Reply *reply)
{
    const ts_engine *e = s->engine;
    uint32_t limit = request->limit == 0 || request->limit > LIST_MAX ? LIST_MAX : request->limit;
    Tspb__SessionList *list = malloc(sizeof *list);
    if (list == NULL)
        return no_memory(reply);
    tspb__session_list__init(list);
    reply->body_case = TSPB__REPLY__BODY_SESSION_LIST;
    reply->session_list = list;
    list->sessions = zalloc(limit, sizeof *list->sessions);
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
            return no_memory(reply);
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
        if (info->program == NULL)
            return no_memory(reply);
    }
    if (list->sessions == NULL)
        no_memory(reply);
}

static Tspb__SeqInfo *describe(const ts_engine *e, const ts_engine_pool *pool, uint32_t i)
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
    const ts_engine *e = s->engine;
    uint32_t index;
    if (!find_pool(s, request->pool, &index, reply))
        return;
    const ts_engine_pool *pool = &e->pools[index];
    uint32_t limit = request->limit == 0 || request->limit > LIST_MAX ? LIST_MAX : request->limit;
    Tspb__SeqList *list = malloc(sizeof *list);
    if (list == NULL)
        return no_memory(reply);
    tspb__seq_list__init(list);
    reply->body_case = TSPB__REPLY__BODY_SEQ_LIST;
    reply->seq_list = list;
    list->seqs = zalloc(limit, sizeof *list->seqs);
    for (uint64_t i = request->after; list->seqs != NULL && i < pool->seqs.count; i++) {
        uint32_t tenant = pool->seqs.all[i].tenant;
        if (tenant == TS_NONE || !ts_view_sees(view, tenant))
            continue;
        if (list->n_seqs == limit) {
            list->next = i;
            break;
        }
        Tspb__SeqInfo *info = describe(e, pool, (uint32_t)i);
        if (info == NULL)
            return no_memory(reply);
        list->seqs[list->n_seqs++] = info;
    }
    if (list->seqs == NULL)
        no_memory(reply);
}

typedef struct problems {
    Tspb__CheckReply *reply;
    ts_view view;
} problems;

static void add_problem(void *arg, const char *sentence)
{
    const problems *p = arg;
    if (p->reply->n_problems < PROBLEMS_MAX) {
        char *copy = strdup(p->view.all ? sentence : "a problem, which operators are told");
        if (copy != NULL)
            p->reply->problems[p->reply->n_problems++] = copy;
    }
}

static void report_check(const ts_service *s, ts_view view, Tspb__Reply *reply)
{
    Tspb__CheckReply *r = malloc(sizeof *r);
    if (r == NULL)
        return no_memory(reply);
    tspb__check_reply__init(r);
    reply->body_case = TSPB__REPLY__BODY_CHECK_REPLY;
    reply->check_reply = r;
    r->problems = zalloc(PROBLEMS_MAX, sizeof *r->problems);
    if (r->problems == NULL)
        return no_memory(reply);
    r->checked = ts_survey_check(s->engine, add_problem, &(problems){r, view});
}

bool ts_report(ts_service *s, ts_view view, const Tspb__Request *request, Tspb__Reply *reply)
{
    switch (request->body_case) {
    case TSPB__REQUEST__BODY_STATUS:
        report_status(s, reply);
        return true;
    case TSPB__REQUEST__BODY_POOL_STATS:
        report_stats(s, view, request->pool_stats->pool, reply);
        return true;
    case TSPB__REQUEST__BODY_POOL_MAP:
        report_map(s, view, request->pool_map, reply);
        return true;
    case TSPB__REQUEST__BODY_LIST_SESSIONS:
        report_sessions(s, view, request->list_sessions, reply);
        return true;
    case TSPB__REQUEST__BODY_LIST_SEQS:
        report_seqs(s, view, request->list_seqs, reply);
        return true;
    case TSPB__REQUEST__BODY_CHECK:
        report_check(s, view, reply);
        return true;
    default:
        return false;
    }
}

void ts_report_free(Tspb__Reply *reply)
{
    switch (reply->body_case) {
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
    case TSPB__REPLY__BODY_CHECK_REPLY:
        tspb__check_reply__free_unpacked(reply->check_reply, NULL);
        break;
    default:
        break;
    }
    if (reply->status != TS_OK)
        free(reply->message);
}

bool ts_report_http(ts_service *s, const Tspb__Request *request, Tspb__Reply *reply)
{
    tspb__reply__init(reply);
    if (ts_report(s, ts_report_view_http(s), request, reply) && reply->status == TS_OK &&
        ts_text_escape_all(&reply->base))
        return true;
    ts_report_free(reply);
    return false;
}
