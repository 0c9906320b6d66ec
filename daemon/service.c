#define _GNU_SOURCE
#include "service.h"

#include "codec.h"
#include "log.h"
#include "report.h"
#include "version.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

/* ---- connections ---- */

static ts_connection **bucket_of(ts_service *s, uint32_t pipe)
{
    return &s->connections[pipe % TS_CONNECTION_BUCKETS];
}

ts_connection *ts_service_connection(const ts_service *s, uint32_t pipe)
{
    ts_connection *c = s->connections[pipe % TS_CONNECTION_BUCKETS];
    while (c != NULL && c->pipe != pipe)
        c = c->next;
    return c;
}

ts_connection *ts_service_connection_of(const ts_service *s, uint64_t session)
{
    uint32_t index = (uint32_t)session;
    ts_connection *c = index < s->engine->limits.sessions ? s->by_session[index] : NULL;
    return c != NULL && c->session == session ? c : NULL;
}

static void exchange_release(ts_exchange *x)
{
    if (x == NULL || --x->users > 0)
        return;
    munmap(x->base, x->bytes);
    close(x->fd);
    free(x);
}

void ts_service_pipe_added(ts_work *work, void *service)
{
    ts_service *s = service;
    ts_pipe_event *event = (ts_pipe_event *)work;
    ts_connection *c = calloc(1, sizeof *c);
    if (c == NULL) {
        ts_log(TS_LOG_ERROR, "no memory for a connection from pid %u", event->pid);
    } else {
        c->pipe = event->pipe;
        c->uid = event->uid;
        c->pid = event->pid;
        c->next = *bucket_of(s, c->pipe);
        *bucket_of(s, c->pipe) = c;
    }
    free(event);
}

static void connection_free(ts_service *s, ts_connection *c)
{
    if (c->session != 0) {
        ts_answer answer;
        s->by_session[(uint32_t)c->session] = NULL;
        ts_engine_apply(s->engine, &(ts_command){.op = TS_OP_SESSION_CLOSE, .session = c->session},
                        &answer);
        ts_log(TS_LOG_INFO, "session %llx closed (uid %u, pid %u)", (unsigned long long)c->session,
               c->uid, c->pid);
    }
    exchange_release(c->exchange);
    for (uint32_t i = 0; i < TS_REPLIES_KEPT; i++)
        /* Nobody is there to read it, but each request is answered once. */
        for (ts_request *w = c->replies.slots[i].waiters, *next; w != NULL; w = next) {
            next = w->next_waiter;
            w->send(w, NULL, 0);
        }
    ts_replies_fini(&c->replies);
    free(c);
}

void ts_service_pipe_removed(ts_work *work, void *service)
{
    ts_service *s = service;
    ts_pipe_event *event = (ts_pipe_event *)work;
    ts_connection **at = bucket_of(s, event->pipe);
    while (*at != NULL && (*at)->pipe != event->pipe)
        at = &(*at)->next;
    ts_connection *c = *at;
    if (c != NULL) {
        *at = c->next;
        connection_free(s, c);
    }
    free(event);
}

/* ---- replies ---- */

static bool pack(ts_service *s, const Tspb__Reply *reply, size_t *size)
{
    *size = tspb__reply__get_packed_size(reply);
    if (!ts_engine_grow((void **)&s->packed, &s->packed_capacity, *size, 1))
        return false;
    tspb__reply__pack(reply, s->packed);
    return true;
}

/* Packs the reply and keeps it for repeats if `kept` says so. Returns its size in s->packed. */
static size_t finish(ts_service *s, ts_connection *c, ts_kept_reply *kept, Tspb__Reply *reply)
{
    size_t size;
    s->refused += reply->status != TS_OK;
    if (reply->status != TS_OK && reply->body_case != TSPB__REPLY__BODY__NOT_SET)
        reply->body_case = TSPB__REPLY__BODY__NOT_SET;
    if (!pack(s, reply, &size))
        return 0;
    if (kept != NULL)
        ts_replies_keep(&c->replies, kept, s->packed, size);
    return size;
}

static void send_refusal(ts_service *s, ts_request *request, uint64_t id, const ts_answer *answer)
{
    Tspb__Reply reply = TSPB__REPLY__INIT;
    size_t size;
    reply.request_id = id;
    reply.status = (uint32_t)answer->status;
    reply.message = (char *)answer->message;
    s->refused++;
    if (pack(s, &reply, &size))
        request->send(request, s->packed, size);
    else
        request->send(request, NULL, 0);
}

/*
 * Where to keep the reply to a request with this id; NULL if the request was dealt with: it repeats
 * an earlier one, or its id is too old to tell.
 */
static ts_kept_reply *reply_slot(ts_service *s, ts_connection *c, ts_request *request)
{
    uint64_t id = request->message->request_id;
    ts_kept_reply *kept = ts_replies_at(&c->replies, id);
    ts_answer answer = {0};
    if (kept->id == id && kept->pending) {
        request->next_waiter = kept->waiters;
        kept->waiters = request;
        return NULL;
    }
    if (kept->id == id && kept->bytes != NULL) {
        request->send(request, kept->bytes, kept->size);
        return NULL;
    }
    if (kept->id >= id) {
        ts_refuse(&answer, TS_ESTALE,
                  "request %llu is repeated, but its answer is no longer kept: the last %u are, up "
                  "to %u bytes",
                  (unsigned long long)id, TS_REPLIES_KEPT, TS_REPLY_BYTES_KEPT);
        send_refusal(s, request, id, &answer);
        return NULL;
    }
    if (kept->pending) {
        ts_refuse(&answer, TS_EBUSY, "request %llu is still in progress; at most %u may be",
                  (unsigned long long)kept->id, TS_REPLIES_KEPT);
        send_refusal(s, request, id, &answer);
        return NULL;
    }
    ts_replies_start(&c->replies, kept, id);
    return kept;
}

/* ---- jobs for the kernels ---- */

/* A job, the request that waits for it, and what to tell the engine afterwards. */
typedef struct service_job {
    ts_job job;
    ts_work work;
    ts_service *service;
    ts_request *request;
    uint64_t request_id, step;
    uint32_t pipe, layer;
    ts_exchange *exchange;
    unsigned char *reply; /* to a begun step; NULL for a run, whose reply is empty */
    size_t reply_size;
} service_job;

static void job_done(ts_job *job)
{
    service_job *j = (service_job *)job;
    ts_queue_run(&j->service->queue, &j->work, j->service);
}

static void finish_job(ts_work *work, void *service)
{
    ts_service *s = service;
    service_job *j = (service_job *)((char *)work - offsetof(service_job, work));
    ts_answer answer;
    ts_engine_apply(
        s->engine,
        &(ts_command){
            .op = TS_OP_STEP_DONE,
            .step_done = {.step = j->step, .layer = j->layer, .failed = j->job.status != TS_OK}},
        &answer);
    exchange_release(j->exchange);

    ts_connection *c = ts_service_connection(s, j->pipe);
    ts_kept_reply *kept = c == NULL ? NULL : ts_replies_at(&c->replies, j->request_id);
    if (kept != NULL && kept->id != j->request_id)
        kept = NULL; /* another connection by now */
    const unsigned char *bytes = j->reply;
    size_t size = j->reply_size;
    if (bytes == NULL) {
        Tspb__Reply reply = TSPB__REPLY__INIT;
        reply.request_id = j->request_id;
        reply.status = (uint32_t)j->job.status;
        reply.message = (char *)(j->job.status == TS_OK      ? ""
                                 : j->job.status == TS_ECONN ? "the daemon is stopping"
                                                             : "no scratch memory for attention");
        s->refused += j->job.status != TS_OK;
        size = pack(s, &reply, &size) ? size : 0;
        bytes = s->packed;
    }
    if (kept != NULL) {
        for (ts_request *w = kept->waiters, *next; w != NULL; w = next) {
            next = w->next_waiter;
            w->send(w, bytes, size);
        }
        kept->waiters = NULL;
        ts_replies_keep(&c->replies, kept, bytes, size);
    }
    j->request->send(j->request, bytes, size);
    free(j->job.copies);
    free(j->job.seqs);
    free(j->reply);
    free(j);
}

/* A job of the step's, with room for `count` things of `bytes` in *things. */
static service_job *job_new(ts_service *s, ts_connection *c, ts_request *request,
                            const ts_step *step, void **things, size_t count, size_t bytes)
{
    service_job *j = calloc(1, sizeof *j);
    *things = malloc(count * bytes);
    if (j == NULL || *things == NULL) {
        free(j);
        free(*things);
        return NULL;
    }
    j->job.geometry = s->engine->pools[step->pool].config.geometry;
    j->job.base = s->memory[step->pool]->base;
    j->job.done = job_done;
    j->work.run = finish_job;
    j->service = s;
    j->request = request;
    j->request_id = request->message->request_id;
    j->step = step->id;
    j->pipe = c->pipe;
    j->layer = TS_NONE;
    return j;
}

static service_job *copy_job(ts_service *s, ts_connection *c, ts_request *request,
                             const ts_answer *a, const Tspb__Reply *reply)
{
    void *copies;
    service_job *j =
        job_new(s, c, request, a->begun.step, &copies, a->begun.num_copies, sizeof(ts_block_copy));
    if (j == NULL)
        return NULL;
    memcpy(copies, a->begun.copies, a->begun.num_copies * sizeof(ts_block_copy));
    j->job.copies = copies;
    j->job.num_copies = a->begun.num_copies;
    if (!pack(s, reply, &j->reply_size) || (j->reply = malloc(j->reply_size)) == NULL) {
        free(copies);
        free(j);
        return NULL;
    }
    memcpy(j->reply, s->packed, j->reply_size);
    return j;
}

static service_job *run_job(ts_service *s, ts_connection *c, ts_request *request,
                            const ts_command *command, const ts_step *step)
{
    void *memory;
    service_job *j =
        job_new(s, c, request, step, &memory, step->num_seqs, sizeof(ts_attention_seq));
    if (j == NULL)
        return NULL;
    ts_attention_seq *seqs = memory;
    const ts_geometry *g = &j->job.geometry;
    size_t row = g->head_dim * ts_dtype_bytes(step->io_dtype), first = 0;
    for (uint32_t i = 0; i < step->num_seqs; i++) {
        const ts_step_seq *part = &step->seqs[i];
        seqs[i] = (ts_attention_seq){
            .blocks = part->table,
            .kv_tokens = part->start + part->new_tokens,
            .q_tokens = part->new_tokens,
            .layer = command->step_run.layer,
            .q = c->exchange->base + command->step_run.q + first * row * step->heads,
            .k = c->exchange->base + command->step_run.k + first * row * g->kv_heads,
            .v = c->exchange->base + command->step_run.v + first * row * g->kv_heads,
            .out = c->exchange->base + command->step_run.out + first * row * step->heads,
        };
        first += part->new_tokens;
    }
    j->job.seqs = seqs;
    j->job.num_seqs = step->num_seqs;
    j->job.heads = step->heads;
    j->job.io_dtype = step->io_dtype;
    j->job.scale = step->scale;
    j->layer = command->step_run.layer;
    j->exchange = c->exchange;
    j->exchange->users++;
    return j;
}

/* ---- requests ---- */

/* Applies the command, finding memory for slabs until it has enough. */
static void apply(ts_service *s, const ts_command *command, ts_answer *a)
{
    for (;;) {
        ts_engine_apply(s->engine, command, a);
        if (a->status != TS_NEED_SLABS)
            return;
        uint32_t pool = a->need.pool, tenant = a->need.tenant;
        uint32_t slab = ts_engine_next_slab(s->engine, pool, tenant);
        char why[TS_MESSAGE_BYTES];
        ts_status status = ts_memory_renew(
            s->memory[pool], slab,
            s->engine->pools[pool].config.client_write != TS_CLIENT_WRITE_NONE, why, sizeof why);
        if (status != TS_OK) {
            ts_log(TS_LOG_ERROR, "pool '%s', slab %u: %s", s->engine->pools[pool].config.name, slab,
                   why);
            return ts_refuse(a, status, "pool '%s': %s", s->engine->pools[pool].config.name, why);
        }
        ts_answer granted;
        ts_engine_apply(s->engine,
                        &(ts_command){.op = TS_OP_SLAB_GRANT,
                                      .pool = pool,
                                      .slab_grant = {.slab = slab, .tenant = tenant}},
                        &granted);
        if (granted.status != TS_OK)
            return ts_refuse(a, TS_EINTERNAL, "%s", granted.message);
    }
}

/* The memory comes first, so that applying the command is all that changes the engine. */
static void open_exchange(ts_service *s, ts_connection *c, const ts_command *command, ts_answer *a)
{
    uint64_t bytes = command->exchange_open.bytes;
    ts_exchange *x = NULL;
    if (bytes > 0 && bytes <= s->engine->limits.exchange_bytes) { /* else apply says why not */
        void *base = NULL;
        char why[TS_MESSAGE_BYTES];
        x = malloc(sizeof *x);
        if (x == NULL)
            return ts_refuse(a, TS_ENOMEM, "no memory for an exchange");
        ts_status status =
            ts_memory_shared_new("tinyserve-exchange", bytes, &x->fd, &base, why, sizeof why);
        if (status != TS_OK) {
            free(x);
            return ts_refuse(a, status, "an exchange: %s", why);
        }
        x->base = base;
        x->bytes = bytes;
        x->users = 1;
    }
    ts_engine_apply(s->engine, command, a);
    if (a->status != TS_OK)
        return exchange_release(x);
    exchange_release(c->exchange);
    c->exchange = x;
}

static void open_session(ts_service *s, ts_connection *c, const Tspb__Request *request,
                         ts_answer *a, Tspb__Reply *reply, Tspb__SessionOpened *opened)
{
    if (request->session_open->protocol != TS_PROTOCOL)
        return ts_refuse(a, TS_EPROTO, "protocol version %u; this daemon speaks %u",
                         request->session_open->protocol, TS_PROTOCOL);
    if (c->session != 0)
        return ts_refuse(a, TS_EEXIST, "this connection has session %llx already",
                         (unsigned long long)c->session);
    if (getrandom(c->token, sizeof c->token, 0) != (ssize_t)sizeof c->token)
        return ts_refuse(a, TS_ENOMEM, "no randomness for a token: %s", strerror(errno));
    ts_command command = {
        .op = TS_OP_SESSION_OPEN,
        .session_open = {.uid = c->uid, .pid = c->pid, .program = request->session_open->program}};
    ts_engine_apply(s->engine, &command, a);
    if (a->status != TS_OK)
        return;
    c->session = a->session;
    s->by_session[(uint32_t)c->session] = c;
    ts_log(TS_LOG_INFO, "session %llx opened: %.63s (uid %u, pid %u)",
           (unsigned long long)c->session, request->session_open->program, c->uid, c->pid);
    tspb__session_opened__init(opened);
    opened->session = c->session;
    opened->token.data = c->token;
    opened->token.len = sizeof c->token;
    opened->handle_socket = s->handle_path;
    opened->exchange_bytes_max = s->engine->limits.exchange_bytes;
    opened->version = (char *)TS_VERSION;
    opened->tenant_uid = c->uid;
    opened->message_bytes_max = s->message_bytes_max;
    reply->body_case = TSPB__REPLY__BODY_SESSION_OPENED;
    reply->session_opened = opened;
}

/* Lists the slabs of `count` blocks, each once. False if out of memory. */
static bool list_slabs(ts_service *s, uint32_t pool, const uint32_t *blocks, size_t count,
                       Tspb__Slab ***list, size_t *num)
{
    const ts_pool_books *books = &s->engine->pools[pool].books;
    size_t before = s->slab_seen_capacity,
           most = count < books->num_slabs ? count : books->num_slabs;
    if (!ts_engine_grow((void **)&s->slab_seen, &s->slab_seen_capacity, books->num_slabs,
                        sizeof *s->slab_seen) ||
        !ts_engine_grow((void **)&s->slabs, &s->slabs_capacity, most, sizeof *s->slabs) ||
        !ts_engine_grow((void **)&s->slab_pointers, &s->slab_pointers_capacity, most,
                        sizeof *s->slab_pointers))
        return false;
    memset(s->slab_seen + before, 0, (s->slab_seen_capacity - before) * sizeof *s->slab_seen);
    if (++s->slab_stamp == 0) {
        memset(s->slab_seen, 0, s->slab_seen_capacity * sizeof *s->slab_seen);
        s->slab_stamp = 1;
    }
    *num = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t slab = blocks[i] / books->slab_blocks;
        if (s->slab_seen[slab] == s->slab_stamp)
            continue;
        s->slab_seen[slab] = s->slab_stamp;
        Tspb__Slab *entry = &s->slabs[*num];
        tspb__slab__init(entry);
        entry->slab = slab;
        entry->generation = books->slabs[slab].generation;
        s->slab_pointers[(*num)++] = entry;
    }
    *list = s->slab_pointers;
    return true;
}

static bool add_slabs(ts_service *s, const ts_command *command, const ts_answer *a,
                      Tspb__Reply *reply)
{
    if (reply->body_case == TSPB__REPLY__BODY_BLOCKS)
        return list_slabs(s, command->pool, a->blocks.blocks, a->blocks.count,
                          &reply->blocks->slabs, &reply->blocks->n_slabs);
    if (reply->body_case == TSPB__REPLY__BODY_STEP_BEGUN)
        return list_slabs(s, command->pool, a->begun.blocks, a->begun.num_blocks,
                          &reply->step_begun->slabs, &reply->step_begun->n_slabs);
    return true;
}

/*
 * Applies the command and fills in the reply. Returns a job if the reply must wait for the kernels,
 * else NULL.
 */
static service_job *execute(ts_service *s, ts_connection *c, ts_request *request,
                            const ts_command *command, ts_answer *a, Tspb__Reply *reply,
                            ts_reply_body *body)
{
    if (command->op == TS_OP_EXCHANGE_OPEN)
        open_exchange(s, c, command, a);
    else
        apply(s, command, a);
    ts_encode(s->engine, command, a, reply, body);
    service_job *job = NULL;
    bool waits =
        a->status == TS_OK && (command->op == TS_OP_STEP_RUN ||
                               (command->op == TS_OP_STEP_BEGIN && a->begun.num_copies > 0));
    bool ok = a->status != TS_OK || add_slabs(s, command, a, reply);
    if (ok && waits) {
        job = command->op == TS_OP_STEP_RUN ? run_job(s, c, request, command, a->step)
                                            : copy_job(s, c, request, a, reply);
        ok = job != NULL;
    }
    if (ok)
        return job;
    /* Out of memory for the answer: undo what can be undone. */
    if (waits)
        ts_engine_apply(
            s->engine,
            &(ts_command){.op = TS_OP_STEP_DONE,
                          .step_done = {.step = command->op == TS_OP_STEP_RUN ? a->step->id
                                                                              : a->begun.step->id,
                                        .layer = TS_NONE,
                                        .failed = true}},
            &(ts_answer){0});
    if (command->op == TS_OP_STEP_BEGIN && body->step_begun.step != 0)
        ts_engine_apply(s->engine,
                        &(ts_command){.op = TS_OP_STEP_ABORT,
                                      .session = command->session,
                                      .step_end = {.step = body->step_begun.step}},
                        &(ts_answer){0});
    ts_refuse(a, TS_ENOMEM, "no memory for the answer");
    reply->status = TS_ENOMEM;
    reply->message = a->message;
    return NULL;
}

void ts_service_request(ts_work *work, void *service)
{
    ts_service *s = service;
    ts_request *request = (ts_request *)work;
    ts_connection *c = ts_service_connection(s, request->pipe);
    ts_answer a = {0};
    s->requests++;
    if (c == NULL) /* it is gone: nobody will read this */
        return request->send(request, NULL, 0);
    c->requests++;
    const Tspb__Request *message = request->message;
    if (message == NULL || message->request_id == 0 ||
        message->body_case == TSPB__REQUEST__BODY__NOT_SET) {
        ts_refuse(&a, TS_EPROTO, "%s",
                  message == NULL ? "the message is not a tspb.Request, or is made to take far "
                                    "more memory than its size"
                  : message->request_id == 0 ? "request_id is 0; ids count from 1"
                                             : "the request has no body that this daemon knows");
        return send_refusal(s, request, message == NULL ? 0 : message->request_id, &a);
    }

    ts_command command;
    ts_reply_body body;
    Tspb__SessionOpened opened;
    Tspb__Reply reply = TSPB__REPLY__INIT;
    reply.request_id = message->request_id;
    if (ts_report(s, c, message, &reply)) { /* changes nothing: not kept for repeats */
        char *owned_message = reply.status != TS_OK ? reply.message : NULL;
        Tspb__Reply whole = reply;
        size_t size = finish(s, c, NULL, &reply);
        request->send(request, s->packed, size);
        whole.message = owned_message;
        ts_report_free(&whole);
        return;
    }
    ts_kept_reply *kept = reply_slot(s, c, request);
    if (kept == NULL)
        return;
    service_job *job = NULL;
    if (message->body_case == TSPB__REQUEST__BODY_SESSION_OPEN)
        open_session(s, c, message, &a, &reply, &opened);
    else if (ts_decode(message, c->session, &command, &a))
        job = execute(s, c, request, &command, &a, &reply, &body);
    else if (a.status == TS_OK)
        ts_refuse(&a, TS_EPROTO, "the request has no body that this daemon knows");
    if (job != NULL) {
        kept->pending = true;
        ts_batch_submit(s->batch, &job->job);
        return;
    }
    reply.status = (uint32_t)a.status;
    reply.message = a.message;
    size_t size = finish(s, c, kept, &reply);
    request->send(request, s->packed, size);
}

/* ---- handles ---- */

static ts_status find_handle(ts_service *s, ts_handle_ask *ask, char *why, size_t why_bytes)
{
    const ts_handle_request *r = &ask->request;
    ts_connection *c = ts_service_connection_of(s, r->session);
    if (r->magic != TS_HANDLE_MAGIC || r->protocol != TS_PROTOCOL) {
        snprintf(why, why_bytes, "not a handle request of protocol version %u", TS_PROTOCOL);
        return TS_EPROTO;
    }
    if (r->session == 0 || c == NULL || c->uid != ask->uid ||
        memcmp(c->token, r->token, sizeof c->token) != 0) {
        snprintf(why, why_bytes, "uid %u has no session %llx with this token", ask->uid,
                 (unsigned long long)r->session);
        return TS_EPERM;
    }
    const ts_session *session = ts_engine_session(s->engine, c->session);
    if (r->kind == TS_HANDLE_EXCHANGE) {
        if (c->exchange == NULL) {
            snprintf(why, why_bytes, "the session has opened no exchange");
            return TS_ENOENT;
        }
        ask->fd = dup(c->exchange->fd);
        ask->reply.bytes = c->exchange->bytes;
        ask->reply.writable = 1;
        if (ask->fd >= 0)
            return TS_OK;
        snprintf(why, why_bytes, "no descriptor: %s", strerror(errno));
        return TS_ENOMEM;
    }
    if (r->kind != TS_HANDLE_SLAB || r->pool >= s->engine->num_pools ||
        !(session->opened_pools >> r->pool & 1)) {
        snprintf(why, why_bytes, "the session has not opened a pool %u", r->pool);
        return TS_ENOENT;
    }
    const ts_pool_books *books = &s->engine->pools[r->pool].books;
    if (r->slab >= books->num_slabs || books->slabs[r->slab].tenant != session->tenant) {
        snprintf(why, why_bytes, "slab %u of pool %u is not uid %u's", r->slab, r->pool, c->uid);
        return TS_EPERM;
    }
    if (r->writable && !(session->writable_pools >> r->pool & 1)) {
        snprintf(why, why_bytes, "the session didn't open pool %u to write", r->pool);
        return TS_EPERM;
    }
    ask->reply.bytes = s->memory[r->pool]->slab_bytes;
    ask->reply.generation = books->slabs[r->slab].generation;
    ask->reply.writable = r->writable != 0;
    return ts_memory_export(s->memory[r->pool], r->slab, r->writable != 0, &ask->fd, why,
                            why_bytes);
}

void ts_service_handle(ts_work *work, void *service)
{
    ts_handle_ask *ask = (ts_handle_ask *)work;
    ask->fd = -1;
    ask->reply = (ts_handle_reply){.magic = TS_HANDLE_MAGIC};
    ask->reply.status =
        (uint32_t)find_handle(service, ask, ask->reply.message, sizeof ask->reply.message);
    ask->done(ask);
}

void ts_service_run(ts_service *s)
{
    ts_work *work;
    while ((work = ts_queue_take(&s->queue)) != NULL)
        for (ts_work *next; work != NULL; work = next) {
            next = work->next;
            work->run(work, s);
        }
}

void ts_service_fini(ts_service *s)
{
    for (uint32_t i = 0; i < TS_CONNECTION_BUCKETS; i++)
        for (ts_connection *c = s->connections[i], *next; c != NULL; c = next) {
            next = c->next;
            connection_free(s, c);
        }
    for (uint32_t i = 0; i < TS_POOLS_MAX; i++)
        ts_memory_free(s->memory[i]);
    ts_engine_free(s->engine);
    ts_attention_free(s->attention);
    free(s->by_session);
    free(s->slab_seen);
    free(s->slabs);
    free(s->slab_pointers);
    free(s->packed);
}
