#define _GNU_SOURCE
#include "service.h"

#include "admin.h"
#include "cgroup.h"
#include "clock.h"
#include "codec.h"
#include "jobs.h"
#include "log.h"
#include "plain_text.h"
#include "refusals.h"
#include "report.h"
#include "ring.h"
#include "tinyserve_version.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

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

void ts_service_pipe_added(ts_work *work, void *service)
{
    ts_service *s = service;
    ts_pipe_event *event = (ts_pipe_event *)work;
    ts_connection *c = calloc(1, sizeof *c);
    if (c == NULL || !ts_replies_init(&c->replies, &s->reply_accounts, event->uid)) {
        free(c);
        ts_log(TS_LOG_ERROR, "no memory for a connection from pid %u", event->pid);
    } else {
        c->pipe = event->pipe;
        c->uid = event->uid;
        c->gid = event->gid;
        c->pid = event->pid;
        c->idle_since_ms = ts_now_ms();
        c->next = *bucket_of(s, c->pipe);
        *bucket_of(s, c->pipe) = c;
    }
    free(event);
}

/* An operator's look is no event. Others that call themselves tsctl are. */
static ts_log_level session_level(const ts_service *s, const ts_connection *c)
{
    const ts_session *session = ts_engine_session(s->engine, c->session);
    bool look = session != NULL && strcmp(session->program, "tsctl") == 0 &&
                ts_service_is_operator(s, c->uid, c->gid);
    return look ? TS_LOG_DEBUG : TS_LOG_INFO;
}

void ts_service_end_session(ts_service *s, ts_connection *c)
{
    if (c->session != 0) {
        ts_answer answer;
        ts_jobs_drop_connection(s, c);
        ts_log_level level = session_level(s, c);
        s->by_session[(uint32_t)c->session] = NULL;
        ts_service_tell(s, &(ts_command){.op = TS_OP_SESSION_CLOSE, .session = c->session},
                        &answer);
        ts_log_on(level, &(ts_log_about){.session = c->session, .uid = c->uid, .pid = c->pid},
                  "session %llx closed (uid %u, pid %u)", (unsigned long long)c->session, c->uid,
                  c->pid);
        c->session = 0;
        c->idle_since_ms = ts_now_ms();
    }
    ts_filling_end(&c->new_exchange);
    ts_filling_end(&c->new_rings);
    ts_exchange_release(c->exchange);
    ts_signals_let_go(c->signals);
    ts_signals_release(c->signals);
    ts_ring_close(c->ring);
    ts_jobs_release_plan(c->plan);
    c->exchange = NULL;
    c->signals = NULL;
    c->ring = NULL;
    c->plan = NULL;
}

static void connection_free(ts_service *s, ts_connection *c)
{
    ts_service_end_session(s, c);
    /* Nobody is there to read it, but each request is answered once. */
    for (ts_request **at = &s->waiting, *w; (w = *at) != NULL;) {
        if (w->pipe != c->pipe) {
            at = &w->next_waiter;
            continue;
        }
        *at = w->next_waiter;
        w->send(w, NULL, 0);
    }
    for (uint32_t i = 0; i < TS_REPLIES_SLOTS; i++)
        for (ts_request *w = c->replies.slots[i].waiters, *next; w != NULL; w = next) {
            next = w->next_waiter;
            w->send(w, NULL, 0);
        }
    ts_replies_fini(&c->replies, &s->reply_accounts);
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

void ts_service_drop_idle(ts_service *s, uint64_t since_ms)
{
    for (uint32_t i = 0; i < TS_CONNECTION_BUCKETS; i++)
        for (const ts_connection *c = s->connections[i]; c != NULL; c = c->next)
            if (c->idle_since_ms != 0 && c->idle_since_ms <= since_ms)
                s->end_connection(s->end_connection_arg, c->pipe);
}

bool ts_service_is_operator(const ts_service *s, uint32_t uid, uint32_t gid)
{
    if (uid == 0 || uid == s->admin_uid)
        return true;
    pthread_mutex_t *lock = (pthread_mutex_t *)&s->operators_lock;
    pthread_mutex_lock(lock);
    bool is = ts_operators_have(&s->operators, uid, gid);
    pthread_mutex_unlock(lock);
    return is;
}

/* ---- replies ---- */

bool ts_service_pack(ts_service *s, const Tspb__Reply *reply, size_t *size)
{
    *size = tspb__reply__get_packed_size(reply);
    if (!ts_engine_grow((void **)&s->packed, &s->packed_capacity, *size, 1))
        return false;
    tspb__reply__pack(reply, s->packed);
    return true;
}

/* Packs the reply. Returns its size in s->packed; 0: out of memory. */
static size_t finish(ts_service *s, Tspb__Reply *reply)
{
    size_t size;
    if (reply->status != TS_OK && reply->body_case != TSPB__REPLY__BODY__NOT_SET)
        reply->body_case = TSPB__REPLY__BODY__NOT_SET;
    return ts_service_pack(s, reply, &size) ? size : 0;
}

void ts_service_deliver(ts_connection *c, ts_request *request, uint64_t id, const void *bytes,
                        size_t size)
{
    ts_kept_reply *kept = c == NULL ? NULL : ts_replies_at(&c->replies, id);
    if (kept != NULL) { /* else another connection by now */
        for (ts_request *w = kept->waiters, *next; w != NULL; w = next) {
            next = w->next_waiter;
            w->send(w, bytes, size);
        }
        kept->waiters = NULL;
        ts_replies_keep(&c->replies, kept, bytes, size);
    }
    request->send(request, bytes, size);
}

static void send_refusal(ts_service *s, ts_request *request, uint64_t id, const ts_answer *answer)
{
    Tspb__Reply reply = TSPB__REPLY__INIT;
    size_t size;
    reply.request_id = id;
    reply.status = (uint32_t)answer->status;
    reply.message = (char *)answer->message;
    ts_refused(s, request->message, answer->status);
    if (ts_service_pack(s, &reply, &size))
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
    if (kept == NULL) {
        kept = ts_replies_start(&c->replies, id);
        if (kept != NULL)
            return kept;
    } else if (kept->pending) {
        request->next_waiter = kept->waiters;
        kept->waiters = request;
        return NULL;
    } else if (kept->bytes != NULL) {
        request->send(request, kept->bytes, kept->size);
        return NULL;
    }
    ts_refuse(&answer, TS_ESTALE,
              "request %llu is repeated, but its answer is no longer kept: the last %u are, up "
              "to %u bytes",
              (unsigned long long)id, TS_REPLIES_KEPT, TS_REPLY_BYTES_KEPT);
    send_refusal(s, request, id, &answer);
    return NULL;
}

/* ---- requests ---- */

/* One bit at a time, and others' work in between. */
static void run_sweep(ts_work *work, void *service)
{
    ts_service *s = service;
    ts_answer a;
    (void)work;
    s->sweeping = false;
    ts_service_tell(s, &(ts_command){.op = TS_OP_SWEEP}, &a);
    ts_service_resume(s);
}

void ts_service_tell(ts_service *s, const ts_command *command, ts_answer *a)
{
    ts_engine_apply(s->engine, command, a);
    if (s->sweeping || !ts_engine_sweeps(s->engine))
        return;
    s->sweeping = true;
    s->sweep.run = run_sweep;
    ts_queue_put(&s->queue, &s->sweep);
}

void ts_service_apply(ts_service *s, const ts_command *command, ts_answer *a)
{
    for (;;) {
        ts_service_tell(s, command, a);
        if (a->status != TS_NEED_SLABS)
            return;
        uint32_t pool = a->need.pool, tenant = a->need.tenant;
        uint32_t slab = ts_engine_next_slab(s->engine, pool, tenant);
        char why[TS_MESSAGE_BYTES];
        ts_status status = TS_ENOMEM;
        if (s->gpu_of[pool] != NULL ||
            ts_cgroup_allows(s->memory[pool]->export_bytes, why, sizeof why))
            status =
                ts_memory_renew(s->memory[pool], slab,
                                s->engine->pools[pool].config.client_write != TS_CLIENT_WRITE_NONE,
                                why, sizeof why);
        if (status != TS_OK) {
            ts_log_on(TS_LOG_ERROR, &(ts_log_about){.pool = s->engine->pools[pool].config.name},
                      "pool '%s', slab %u: %s", s->engine->pools[pool].config.name, slab, why);
            return ts_refuse(a, status, "pool '%s': %s", s->engine->pools[pool].config.name, why);
        }
        ts_answer granted;
        ts_service_tell(s,
                        &(ts_command){.op = TS_OP_SLAB_GRANT,
                                      .pool = pool,
                                      .slab_grant = {.slab = slab, .tenant = tenant}},
                        &granted);
        if (granted.status != TS_OK)
            return ts_refuse(a, TS_EINTERNAL, "%s", granted.message);
    }
}

/* The device that an exchange is to be shared with, or NULL and the answer refuses. */
static ts_gpu *exchange_gpu(const ts_service *s, const ts_connection *c,
                            const Tspb__ExchangeOpen *open, ts_answer *a)
{
    const ts_session *session = ts_engine_session(s->engine, c->session);
    if (session == NULL || open->pool >= s->engine->num_pools ||
        !(session->opened_pools >> open->pool & 1)) {
        ts_refuse(a, TS_ENOENT, "the session has not opened a pool %u", open->pool);
        return NULL;
    }
    if (s->gpu_of[open->pool] == NULL) {
        ts_refuse(a, TS_EINVAL,
                  "pool '%s' is in host memory: there is no device to share an "
                  "exchange with",
                  s->engine->pools[open->pool].config.name);
        return NULL;
    }
    if (open->ipc_handle.len != 0 && open->ipc_handle.len != TS_IPC_HANDLE_BYTES) {
        ts_refuse(a, TS_EINVAL, "an IPC handle of %zu bytes; it has %u", open->ipc_handle.len,
                  TS_IPC_HANDLE_BYTES);
        return NULL;
    }
    return s->gpu_of[open->pool]->gpu;
}

/* The memory takes the place of the connection's, unless the engine refuses. */
static void replace_exchange(ts_service *s, ts_connection *c, ts_exchange *x,
                             const ts_command *command, ts_answer *a)
{
    ts_service_tell(s, command, a);
    if (a->status != TS_OK)
        return ts_exchange_release(x);
    ts_exchange_release(c->exchange);
    c->exchange = x;
}

/* The memory comes first, so that applying the command is all that changes the engine. */
static void open_exchange(ts_service *s, ts_connection *c, const Tspb__ExchangeOpen *open,
                          ts_command *command, ts_answer *a)
{
    uint64_t bytes = open->bytes;
    ts_gpu *gpu;
    ts_exchange *x = NULL;
    char why[TS_MESSAGE_BYTES];
    if (!open->on_device && open->ipc_handle.len == 0)
        return ts_refuse(a, TS_EINVAL,
                         "an exchange in host memory is opened at the handle socket, not by a "
                         "message");
    if ((gpu = exchange_gpu(s, c, open, a)) == NULL)
        return;
    if (bytes > 0 && bytes <= s->engine->limits.exchange_bytes) { /* else apply says why not */
        ts_status status;
        if (open->ipc_handle.len > 0)
            status = ts_exchange_import(gpu, open->ipc_handle.data, open->ipc_offset, bytes, &x,
                                        why, sizeof why);
        else
            status = ts_exchange_device_new(gpu, s->memory[open->pool]->ipc_handle == NULL, bytes,
                                            &x, why, sizeof why);
        if (status != TS_OK)
            return ts_refuse(a, status, "an exchange: %s", why);
    }
    command->exchange_open.other_memory = c->exchange != NULL;
    replace_exchange(s, c, x, command, a);
}

ts_status ts_service_take_exchange(ts_service *s, ts_connection *c, uint64_t *bytes, char *why,
                                   size_t why_bytes)
{
    ts_exchange *x;
    ts_answer a;
    ts_status status = ts_exchange_take(&c->new_exchange, &x, why, why_bytes);
    if (status != TS_OK)
        return status;
    ts_command command = {
        .op = TS_OP_EXCHANGE_OPEN,
        .session = c->session,
        .exchange_open = {.bytes = x->bytes,
                          .other_memory = c->exchange != NULL && c->exchange->host == NULL}};
    *bytes = x->bytes;
    replace_exchange(s, c, x, &command, &a);
    snprintf(why, why_bytes, "%s", a.message);
    return a.status;
}

static void encode_exchange(const ts_connection *c, Tspb__Reply *reply, ts_reply_body *body)
{
    Tspb__ExchangeOpened *opened = &body->exchange_opened;
    tspb__exchange_opened__init(opened);
    opened->has_descriptor = c->exchange->fd >= 0;
    if (c->exchange->host == NULL && c->exchange->fd < 0) {
        opened->ipc_handle.data = c->exchange->shared.ipc;
        opened->ipc_handle.len = sizeof c->exchange->shared.ipc;
    }
    reply->body_case = TSPB__REPLY__BODY_EXCHANGE_OPENED;
    reply->exchange_opened = opened;
}

static void open_session(ts_service *s, ts_connection *c, const Tspb__Request *request,
                         ts_answer *a, Tspb__Reply *reply, Tspb__SessionOpened *opened)
{
    const Tspb__SessionOpen *open = request->session_open;
    if (open->protocol != TS_PROTOCOL) {
        char version[32];
        return ts_refuse(a, TS_EPROTO,
                         "protocol version %u of libtinyserve %s; tinyserved " TS_VERSION
                         " speaks %u: the older of them must be upgraded, and then started again",
                         open->protocol,
                         open->version[0] == '\0'
                             ? "(an earlier one)"
                             : ts_text_escape(open->version, version, sizeof version),
                         TS_PROTOCOL);
    }
    if (s->draining && !ts_service_is_operator(s, c->uid, c->gid))
        return ts_refuse(a, TS_EBUSY, "the daemon is being drained: it takes no new sessions");
    if (c->session != 0)
        return ts_refuse(a, TS_EEXIST, "this connection has session %llx already",
                         (unsigned long long)c->session);
    if (getrandom(c->token, sizeof c->token, 0) != (ssize_t)sizeof c->token)
        return ts_refuse(a, TS_ENOMEM, "no randomness for a token: %s", strerror(errno));
    char program[TS_PROGRAM_BYTES];
    ts_text_escape(open->program, program, sizeof program);
    ts_command command = {
        .op = TS_OP_SESSION_OPEN,
        .session_open = {.uid = c->uid,
                         .pid = c->pid,
                         .program = program,
                         .is_operator = ts_service_is_operator(s, c->uid, c->gid)}};
    ts_service_tell(s, &command, a);
    if (a->status != TS_OK)
        return;
    c->session = a->session;
    c->idle_since_ms = 0;
    s->by_session[(uint32_t)c->session] = c;
    ts_log_on(session_level(s, c),
              &(ts_log_about){.session = c->session, .uid = c->uid, .pid = c->pid},
              "session %llx opened: %s (uid %u, pid %u)", (unsigned long long)c->session, program,
              c->uid, c->pid);
    tspb__session_opened__init(opened);
    opened->session = c->session;
    opened->token.data = c->token;
    opened->token.len = sizeof c->token;
    opened->exchange_bytes_max = s->engine->limits.exchange_bytes;
    opened->version = (char *)TS_VERSION;
    opened->tenant_uid = c->uid;
    opened->message_bytes_max = s->message_bytes_max;
    reply->body_case = TSPB__REPLY__BODY_SESSION_OPENED;
    reply->session_opened = opened;
}

bool ts_service_list_slabs(ts_service *s, uint32_t pool, const uint32_t *blocks, size_t count,
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
    uint32_t first = 0, same = 0; /* blocks from `first` on that lie in the slab seen last */
    for (size_t i = 0; i < count; i++) {
        if (blocks[i] - first < same) /* neighbours, as a rule: spares a division */
            continue;
        uint32_t slab = blocks[i] / books->slab_blocks;
        first = slab * books->slab_blocks;
        same = books->slab_blocks;
        if (s->slab_seen[slab] == s->slab_stamp)
            continue;
        s->slab_seen[slab] = s->slab_stamp;
        Tspb__Slab *entry = &s->slabs[*num];
        tspb__slab__init(entry);
        entry->slab = slab;
        entry->generation = books->slabs[slab].generation;
        if (s->memory[pool]->ipc_handle != NULL) {
            entry->ipc_handle.data = (uint8_t *)s->memory[pool]->ipc_handle;
            entry->ipc_handle.len = TS_IPC_HANDLE_BYTES;
        }
        s->slab_pointers[(*num)++] = entry;
    }
    *list = s->slab_pointers;
    return true;
}

static bool add_slabs(ts_service *s, const ts_command *command, const ts_answer *a,
                      Tspb__Reply *reply)
{
    if (reply->body_case == TSPB__REPLY__BODY_BLOCKS)
        return ts_service_list_slabs(s, command->pool, a->blocks.blocks, a->blocks.count,
                                     &reply->blocks->slabs, &reply->blocks->n_slabs);
    if (reply->body_case == TSPB__REPLY__BODY_STEP_BEGUN)
        return ts_service_list_slabs(s, command->pool, a->begun.blocks, a->begun.num_blocks,
                                     &reply->step_begun->slabs, &reply->step_begun->n_slabs);
    return true;
}

/*
 * Applies the command and fills in the reply. Returns true if the reply must wait for the kernels,
 * which have the request then.
 */
static bool execute(ts_service *s, ts_connection *c, ts_request *request, ts_command *command,
                    ts_answer *a, Tspb__Reply *reply, ts_reply_body *body)
{
    const Tspb__Request *message = request->message;
    bool run = command->op == TS_OP_STEP_RUN;
    if (command->op == TS_OP_EXCHANGE_OPEN)
        open_exchange(s, c, message->exchange_open, command, a);
    else if (!run || ts_jobs_check_run(s, c, command, a))
        ts_service_apply(s, command, a);
    ts_encode(s->engine, command, a, reply, body);
    if (command->op == TS_OP_EXCHANGE_OPEN && a->status == TS_OK)
        encode_exchange(c, reply, body);
    bool copies = command->op == TS_OP_STEP_BEGIN && a->status == TS_OK && a->begun.num_copies > 0;
    bool ok = a->status != TS_OK || add_slabs(s, command, a, reply);
    ts_asker asker = {.request = request};
    if (ok && a->status == TS_OK && run)
        ok = ts_jobs_run(s, c, asker, command, a->step);
    else if (ok && copies)
        ok = ts_jobs_copy(s, c, asker, a, reply);
    if (ok)
        return copies || (a->status == TS_OK && run && !command->step_run.ordered);
    /* Out of memory for the answer: undo what can be undone. */
    if (run || command->op == TS_OP_STEP_BEGIN)
        ts_jobs_undo(s, command, run ? a->step->id : body->step_begun.step);
    ts_refuse(a, TS_ENOMEM, "no memory for the answer");
    reply->status = TS_ENOMEM;
    reply->message = a->message;
    return false;
}

bool ts_service_must_wait(ts_service *s, const ts_command *command)
{
    bool run = command->op == TS_OP_STEP_RUN && command->step_run.ordered;
    bool end = command->op == TS_OP_STEP_COMMIT || command->op == TS_OP_STEP_ABORT;
    if (!run && !end)
        return false;
    const ts_step *step =
        ts_engine_find_step(s->engine, run ? command->step_run.step : command->step_end.step);
    bool wait = step != NULL && (end || s->gpu_of[step->pool] != NULL) &&
                ts_engine_session_id(s->engine, step->session) == command->session &&
                step->in_flight >= (run ? ts_engine_step_runs_max(s->engine, step) : 1);
    if (wait && command->op == TS_OP_STEP_ABORT)
        ts_jobs_drop_step(s, step->id);
    return wait;
}

/* The request is answered later (ts_service_resume); the first to come is the first to be answered.
 */
static void wait_on(ts_service *s, ts_request *request, ts_kept_reply *kept)
{
    ts_request **end = &s->waiting;
    while (*end != NULL)
        end = &(*end)->next_waiter;
    kept->pending = true;
    request->next_waiter = NULL;
    *end = request;
}

/* Answers a request whose place among the kept replies is taken. */
static void answer(ts_service *s, ts_connection *c, ts_request *request, ts_kept_reply *kept)
{
    const Tspb__Request *message = request->message;
    ts_answer a = {0};
    ts_command command;
    ts_reply_body body;
    Tspb__SessionOpened opened;
    Tspb__Reply reply = TSPB__REPLY__INIT;
    reply.request_id = message->request_id;
    bool waits = false;
    if (c->kicked != 0) {
        ts_refuse(&a, TS_ECONN, "session %llx was ended by an operator",
                  (unsigned long long)c->kicked);
    } else if (ts_admin(s, c, message, &a)) {
        ;
    } else if (message->body_case == TSPB__REQUEST__BODY_SESSION_OPEN) {
        open_session(s, c, message, &a, &reply, &opened);
    } else if (ts_decode(message, c->session, &command, &a)) {
        if (ts_service_must_wait(s, &command))
            return wait_on(s, request, kept);
        waits = execute(s, c, request, &command, &a, &reply, &body);
        if (a.status == TS_NEED_SWEEP)
            return wait_on(s, request, kept);
    } else if (a.status == TS_OK) {
        ts_refuse(&a, TS_EPROTO, "the request has no body that this daemon knows");
    }
    if (waits) {
        kept->pending = true;
        return;
    }
    reply.status = (uint32_t)a.status;
    reply.message = a.message;
    ts_refused(s, message, a.status);
    size_t size = finish(s, &reply);
    ts_service_deliver(c, request, message->request_id, s->packed, size);
}

void ts_service_resume(ts_service *s)
{
    ts_request *waiting = s->waiting;
    s->waiting = NULL;
    for (ts_request *request = waiting, *next; request != NULL; request = next) {
        next = request->next_waiter;
        ts_connection *c = ts_service_connection(s, request->pipe);
        answer(s, c, request, ts_replies_at(&c->replies, request->message->request_id));
    }
    ts_rings_resume(s->rings);
}

/* A report's request that waits for figures. */
typedef struct report_waiter {
    ts_survey_waiter waiter; /* first: surveys hand it back */
    ts_request *request;
} report_waiter;

static bool answer_report(ts_service *s, ts_connection *c, ts_request *request);

static void report_ready(ts_survey_waiter *waiter, ts_service *s)
{
    ts_request *request = ((report_waiter *)waiter)->request;
    ts_connection *c = ts_service_connection(s, request->pipe);
    free(waiter);
    if (c == NULL)
        request->send(request, NULL, 0);
    else
        (void)answer_report(s, c, request);
}

/* Answers the request, now or later, if it is for a report; such an answer changes nothing, and
 * isn't kept for repeats. */
static bool answer_report(ts_service *s, ts_connection *c, ts_request *request)
{
    const Tspb__Request *message = request->message;
    if (message->body_case < TSPB__REQUEST__BODY_STATUS ||
        message->body_case > TSPB__REQUEST__BODY_CHECK)
        return false;
    report_waiter *w = malloc(sizeof *w);
    Tspb__Reply reply = TSPB__REPLY__INIT;
    reply.request_id = message->request_id;
    if (w == NULL) {
        request->send(request, NULL, 0);
        return true;
    }
    *w = (report_waiter){.waiter.ready = report_ready, .request = request};
    ts_report_state state = ts_report(s, ts_report_view(s, c), message, &w->waiter, &reply);
    if (state == TS_REPORT_LATER)
        return true;
    free(w);
    if (state == TS_REPORT_NONE)
        return false;
    char *owned_message = reply.status != TS_OK ? reply.message : NULL;
    Tspb__Reply whole = reply;
    ts_refused(s, message, (ts_status)reply.status);
    size_t size = finish(s, &reply);
    request->send(request, s->packed, size);
    whole.message = owned_message;
    ts_report_free(&whole);
    return true;
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
    if (!ts_decode_plain(message, &a))
        return send_refusal(s, request, message->request_id, &a);

    if (answer_report(s, c, request))
        return;
    ts_kept_reply *kept = reply_slot(s, c, request);
    if (kept != NULL)
        answer(s, c, request, kept);
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
    ts_rings_free(s->rings);
    ts_surveys_free(s->surveys);
    for (uint32_t i = 0; i < TS_POOLS_MAX; i++)
        ts_memory_free(s->memory[i]);
    ts_jobs_fini(s);
    for (uint32_t i = 0; i < s->num_gpus; i++)
        ts_gpu_close(s->gpus[i].gpu);
    ts_engine_free(s->engine);
    ts_attention_free(s->attention);
    free(s->by_session);
    free(s->refusals);
    free(s->slab_seen);
    free(s->slabs);
    free(s->slab_pointers);
    free(s->packed);
}
