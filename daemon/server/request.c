#define _GNU_SOURCE
#include "request.h"

#include "admin.h"
#include "codec.h"
#include "exchange_open.h"
#include "parked.h"
#include "plain_text.h"
#include "refusals.h"
#include "report.h"
#include "resume.h"
#include "slab_supply.h"
#include "step_work.h"
#include "stream_runs.h"
#include "test_point.h"
#include "tinyserve_version.h"
#include "unconst.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

/* ---- replies ---- */

/* Packs the reply into s->packed; false: out of memory. */
static bool pack(ts_service *s, const Tspb__Reply *reply, size_t *size)
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
    return pack(s, reply, &size) ? size : 0;
}

/* Sends the packed reply, keeps it for repeats and sends it to those that came already. c NULL: the
 * connection is gone. */
static void deliver(ts_connection *c, ts_request *request, uint64_t id, const void *bytes,
                    size_t size)
{
    ts_kept_reply *kept = c == NULL ? NULL : ts_reply_cache_at(&c->replies, id);
    if (kept != NULL) { /* else another connection by now */
        for (ts_request *w = kept->waiters, *next; w != NULL; w = next) {
            next = w->next_waiter;
            w->send(w, bytes, size);
        }
        kept->waiters = NULL;
        ts_reply_cache_keep(&c->replies, kept, bytes, size);
    }
    ts_point("answering", 0);
    request->send(request, bytes, size);
    ts_point("answered", 0);
}

static void send_refusal(ts_service *s, ts_request *request, uint64_t id, const ts_answer *answer)
{
    Tspb__Reply reply = TSPB__REPLY__INIT;
    size_t size;
    reply.request_id = id;
    ts_encode_status(answer, &reply);
    ts_refused(s, request->message, answer->status);
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
    ts_kept_reply *kept = ts_reply_cache_at(&c->replies, id);
    ts_answer answer = {0};
    if (kept == NULL) {
        kept = ts_reply_cache_start(&c->replies, id);
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

static void encode_opened(ts_service *s, ts_connection *c, Tspb__Reply *reply,
                          Tspb__SessionOpened *opened)
{
    tspb__session_opened__init(opened);
    opened->session = c->session;
    opened->token.data = c->token;
    opened->token.len = sizeof c->token;
    opened->exchange_bytes_max = s->exec.engine->limits.exchange_bytes;
    opened->message_bytes_max = s->message_bytes;
    opened->version = (char *)TS_VERSION;
    if (s->exec.books != NULL) {
        opened->epoch.data = s->epoch;
        opened->epoch.len = sizeof s->epoch;
    }
    opened->has_exchange = c->memory.exchange != NULL;
    opened->has_signals = c->memory.signals != NULL;
    reply->body_case = TSPB__REPLY__BODY_SESSION_OPENED;
    reply->session_opened = opened;
}

static void open_session(ts_service *s, ts_connection *c, const Tspb__Request *request,
                         ts_answer *answer, Tspb__Reply *reply, Tspb__SessionOpened *opened)
{
    const Tspb__SessionOpen *open = request->session_open;
    if (open->protocol != TS_PROTOCOL) {
        char version[32];
        return ts_refuse(answer, TS_EPROTO,
                         "protocol version %u of libtinyserve %s; tinyserved " TS_VERSION
                         " speaks %u: the older of them must be upgraded, and then started again",
                         open->protocol,
                         open->version[0] == '\0'
                             ? "(an earlier one)"
                             : ts_text_escape(open->version, version, sizeof version),
                         TS_PROTOCOL);
    }
    if (c->session != 0)
        return ts_refuse(answer, TS_EEXIST, "this connection has session %llx already",
                         (unsigned long long)c->session);
    const uint64_t before = ts_resume_opened(s, c, &open->nonce);
    if (before != 0) { /* the answer went with the daemon that gave it */
        ts_resume_attach(s, c, before);
        return encode_opened(s, c, reply, opened);
    }
    if (getrandom(c->token, sizeof c->token, 0) != (ssize_t)sizeof c->token)
        return ts_refuse(answer, TS_ENOMEM, "no randomness for a token: %s", strerror(errno));
    char program[TS_PROGRAM_BYTES];
    ts_text_escape(open->program, program, sizeof program);
    ts_command command = {
        .op = TS_OP_SESSION_OPEN,
        .session_open = {.uid = c->uid,
                         .pid = c->pid,
                         .process_started = s->exec.books == NULL ? 0 : ts_process_started(c->pid),
                         .program = program,
                         .is_operator = ts_service_is_operator(s, c->uid, c->gid)}};
    memcpy(command.session_open.token, c->token, sizeof c->token);
    if (open->nonce.len == sizeof command.session_open.nonce)
        memcpy(command.session_open.nonce, open->nonce.data, open->nonce.len);
    ts_exec_apply(&s->exec, &command, answer);
    if (answer->status != TS_OK)
        return;
    c->session = answer->session;
    c->idle_since_ms = 0;
    s->by_session[(uint32_t)c->session] = c;
    ts_log_on(ts_service_session_level(s, c),
              &(ts_log_about){.session = c->session, .uid = c->uid, .pid = c->pid},
              "session %llx opened: %s (uid %u, pid %u)", (unsigned long long)c->session, program,
              c->uid, c->pid);
    encode_opened(s, c, reply, opened);
}

/* Tells the slabs of the blocks that the reply tells. False: out of memory. */
static bool add_slabs(ts_service *s, const ts_command *command, const ts_answer *answer,
                      Tspb__Reply *reply)
{
    ts_slab_list *list = &s->slab_list;
    if (reply->body_case == TSPB__REPLY__BODY_BLOCKS) {
        if (!ts_slab_list_fill(list, &s->exec, command->pool, answer->blocks.blocks,
                               answer->blocks.count))
            return false;
        reply->blocks->slabs = list->pointers;
        reply->blocks->n_slabs = list->count;
    } else if (reply->body_case == TSPB__REPLY__BODY_STEP_BEGUN) {
        if (!ts_slab_list_fill(list, &s->exec, command->pool, answer->begun.blocks,
                               answer->begun.num_blocks))
            return false;
        reply->step_begun->slabs = list->pointers;
        reply->step_begun->n_slabs = list->count;
    }
    return true;
}

/* The kernels are done with what the request asked for. */
static void on_done(const ts_completion *completion, const ts_step_result *result)
{
    ts_request *request = completion->context;
    ts_service *s = request->service;
    const uint64_t id = request->message->request_id;
    const unsigned char *bytes = request->held;
    size_t size = request->held_bytes;
    unsigned char *held = request->held;
    request->held = NULL;
    if (bytes == NULL || result->status != TS_OK) {
        Tspb__Reply reply = TSPB__REPLY__INIT;
        reply.request_id = id;
        reply.status = (uint32_t)result->status;
        reply.message = result->status == TS_OK ? "" : ts_unconst(result->why);
        ts_refused(s, request->message, result->status);
        size = finish(s, &reply);
        bytes = s->packed;
    }
    deliver(ts_service_connection(s, request->pipe), request, id, bytes, size);
    free(held);
}

/* Keeps the answer until the copies of a begun step are made. False: out of memory. */
static bool hold(ts_service *s, ts_request *request, const Tspb__Reply *reply)
{
    size_t size;
    if (!pack(s, reply, &size) || (request->held = malloc(size)) == NULL)
        return false;
    memcpy(request->held, s->packed, size);
    request->held_bytes = size;
    return true;
}

/* Hands what was accepted to the kernels, which complete the request. False: out of memory. */
static bool hand_on(ts_service *s, ts_connection *c, ts_request *request, const ts_command *command,
                    const ts_answer *answer, const Tspb__Reply *reply)
{
    const ts_completion completion = {.done = on_done, .context = request};
    if (command->op == TS_OP_STEP_RUN)
        return ts_step_work_run(&s->exec, &c->memory, &completion, command, answer->step);
    if (!hold(s, request, reply))
        return false;
    if (ts_step_work_copy(&s->exec, &completion, answer))
        return true;
    free(request->held);
    request->held = NULL;
    return false;
}

/* The bytes of a ticket that the command asks for; without an entropy source the answer refuses. */
static bool draw_ticket(ts_command *command, ts_answer *answer)
{
    uint8_t *ticket = command->seq_ticket.ticket;
    if (getrandom(ticket, TS_TICKET_BYTES, 0) == (ssize_t)TS_TICKET_BYTES)
        return true;
    ts_refuse(answer, TS_ENOMEM, "no randomness for a ticket: %s", strerror(errno));
    return false;
}

/*
 * Applies the command and fills in the reply. Returns true if the reply must wait for the kernels,
 * which have the request then.
 */
static bool execute(ts_service *s, ts_connection *c, ts_request *request, ts_command *command,
                    ts_answer *answer, Tspb__Reply *reply, ts_reply_body *body)
{
    const Tspb__Request *message = request->message;
    const bool run = command->op == TS_OP_STEP_RUN;
    const bool known = run && ts_engine_run_is_known(s->exec.engine, command);
    const bool no_ticket = command->op == TS_OP_SEQ_TICKET && !draw_ticket(command, answer);
    /* A run that is known is with the kernels: its answer was lost with an earlier daemon. */
    if (command->op == TS_OP_EXCHANGE_OPEN)
        ts_exchange_open(s, c, message->exchange_open, command, answer);
    else if (!no_ticket && !known &&
             (!run || ts_step_work_check_run(&s->exec, &c->memory, command, answer)))
        ts_exec_supply(&s->exec, command, answer);
    ts_encode(s->exec.engine, message, command, answer, reply, body);
    if (answer->status != TS_OK)
        return false;
    if (command->op == TS_OP_EXCHANGE_OPEN)
        ts_exchange_encode(c, &body->exchange_opened, reply);
    const bool copies = command->op == TS_OP_STEP_BEGIN && answer->begun.num_copies > 0;
    if (add_slabs(s, command, answer, reply) &&
        ((!run && !copies) || known || hand_on(s, c, request, command, answer, reply)))
        return copies || (run && !(command->step_run.run.flags & TS_RUN_ON_STREAM));
    /* Out of memory for the answer: undo what can be undone. */
    if (run || command->op == TS_OP_STEP_BEGIN)
        ts_step_work_undo(&s->exec, command,
                          run      ? answer->step->id
                          : copies ? answer->begun.step->id
                                   : body->step_begun.step);
    ts_refuse(answer, TS_ENOMEM, "no memory for the answer");
    ts_encode_status(answer, reply);
    return false;
}

/* The request is answered later (resume); the first to come is the first to be answered.
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

/* How long the request may wait. */
static uint32_t wait_of(const Tspb__Request *m)
{
    if (m->body_case == TSPB__REQUEST__BODY_SEQ_MATCH)
        return m->seq_match->wait_ms;
    return m->body_case == TSPB__REQUEST__BODY_STEP_BEGIN ? m->step_begin->wait_ms : 0;
}

static void go_on(ts_parked *parked);
static void drop(ts_parked *parked);

/* Refuses what comes when the daemon, or the connection's session, has been ended. */
static bool is_over(const ts_service *s, const ts_connection *c, ts_answer *answer)
{
    if (s->ending)
        ts_refuse(answer, TS_ECONN, "the daemon ends");
    else if (c->kicked != 0)
        ts_refuse(answer, TS_ECONN, "session %llx was ended%s", (unsigned long long)c->kicked,
                  c->kept_slabs    ? ": it did not give back GPU memory that is others' now"
                  : c->freed_pages ? ": it has freed pages of its exchange"
                                   : " by an operator");
    return answer->status != TS_OK;
}

/* Gives the answer, and keeps it. */
static void conclude(ts_service *s, ts_connection *c, ts_request *request, ts_answer *answer,
                     Tspb__Reply *reply)
{
    ts_encode_status(answer, reply);
    ts_refused(s, request->message, answer->status);
    size_t size = finish(s, reply);
    deliver(c, request, request->message->request_id, s->packed, size);
}

/* Answers a request whose place among the kept replies is taken. */
static void answer_request(ts_service *s, ts_connection *c, ts_request *request,
                           ts_kept_reply *kept)
{
    const Tspb__Request *message = request->message;
    ts_answer answer = {0};
    ts_command command;
    ts_reply_body body;
    ts_admin_body admin;
    Tspb__SessionOpened opened;
    Tspb__Reply reply = TSPB__REPLY__INIT;
    reply.request_id = message->request_id;
    bool waits = false;
    if (c->ring != NULL && s->take_ring != NULL) /* its client has submitted that before */
        s->take_ring(c->ring);
    if (is_over(s, c, &answer))
        return conclude(s, c, request, &answer, &reply);
    if (ts_admin(s, c, message, &answer, &reply, &admin)) {
        if (answer.status == TS_NEED_SWEEP)
            return wait_on(s, request, kept);
    } else if (message->body_case == TSPB__REQUEST__BODY_SESSION_OPEN) {
        open_session(s, c, message, &answer, &reply, &opened);
    } else if (message->body_case == TSPB__REQUEST__BODY_SESSION_RESUME) {
        ts_resume(s, c, message->session_resume, &answer);
        if (answer.status == TS_OK)
            encode_opened(s, c, &reply, &opened);
    } else if (message->body_case == TSPB__REQUEST__BODY_SESSION_CLOSE) {
        ts_service_end_session(s, c, NULL);
    } else if (ts_decode(message, c->session, &command, &answer) &&
               ts_parked_prepare(s, c, &request->wait, wait_of(message), &command, &answer)) {
        if (ts_stream_run_comes_before(&s->exec, &c->memory, &command) || /* by rings, now lost */
            ts_step_work_must_wait(&s->exec, &command))
            return wait_on(s, request, kept);
        waits = execute(s, c, request, &command, &answer, &reply, &body);
        if (answer.status == TS_NEED_SWEEP)
            return wait_on(s, request, kept);
        if (answer.status == TS_WAITS) {
            kept->pending = true;
            request->wait.go_on = go_on;
            request->wait.drop = drop;
            return ts_parked_add(s, c, &request->wait, wait_of(message));
        }
    } else if (answer.status == TS_OK) {
        ts_refuse(&answer, TS_EPROTO, "the request has no body that this daemon knows");
    }
    if (waits) {
        kept->pending = true;
        return;
    }
    conclude(s, c, request, &answer, &reply);
}

static ts_request *request_of(ts_parked *parked)
{
    return (ts_request *)((char *)parked - offsetof(ts_request, wait));
}

static void go_on(ts_parked *parked)
{
    ts_request *request = request_of(parked);
    ts_connection *c = parked->connection;
    answer_request(request->service, c, request,
                   ts_reply_cache_at(&c->replies, request->message->request_id));
}

static void drop(ts_parked *parked)
{
    ts_request *request = request_of(parked);
    request->send(request, NULL, 0);
}

static void woken(void *service)
{
    ts_parked_wake(service);
}

static void resume(void *service)
{
    ts_service *s = service;
    ts_request *waiting = s->waiting;
    s->waiting = NULL;
    if (s->resume_rings != NULL)
        s->resume_rings(s->rings);
    for (ts_request *request = waiting, *next; request != NULL; request = next) {
        next = request->next_waiter;
        ts_connection *c = ts_service_connection(s, request->pipe);
        answer_request(s, c, request, ts_reply_cache_at(&c->replies, request->message->request_id));
    }
}

/* A report's request that waits for figures. */
typedef struct report_waiter {
    ts_pool_stats_waiter waiter; /* first: the cache hands it back */
    ts_request *request;
} report_waiter;

static bool answer_report(ts_service *s, ts_connection *c, ts_request *request);

static void report_ready(ts_pool_stats_waiter *waiter, void *service)
{
    ts_service *s = service;
    ts_request *request = ((report_waiter *)waiter)->request;
    ts_connection *c = ts_service_connection(s, request->pipe);
    free(waiter);
    if (c == NULL)
        request->send(request, NULL, 0);
    else
        (void)answer_report(s, c, request);
}

/* Whether the request may be for a report; cheaper than to ask ts_report. */
static bool is_report(const Tspb__Request *message)
{
    const int body = (int)message->body_case;
    return (body >= TSPB__REQUEST__BODY_STATUS && body <= TSPB__REQUEST__BODY_CHECK) ||
           body == TSPB__REQUEST__BODY_CACHE_STATS;
}

/* Answers the request, now or later, if it is for a report; such an answer changes nothing, and
 * isn't kept for repeats. */
static bool answer_report(ts_service *s, ts_connection *c, ts_request *request)
{
    const Tspb__Request *message = request->message;
    if (!is_report(message))
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

/* Ends the session's waits. It may be done again, so that the answer isn't kept: many of them don't
 * make the daemon forget the answer to the call that waits, or one that another thread sends. */
static void end_waits(ts_service *s, ts_connection *c, ts_request *request)
{
    ts_answer answer = {0};
    Tspb__Reply reply = TSPB__REPLY__INIT;
    reply.request_id = request->message->request_id;
    if (c->ring != NULL && s->take_ring != NULL) /* its client has submitted that before */
        s->take_ring(c->ring);
    if (!is_over(s, c, &answer))
        (void)ts_service_go_on(s, c, true);
    ts_encode_status(&answer, &reply);
    ts_refused(s, request->message, answer.status);
    size_t size = finish(s, &reply);
    request->send(request, s->packed, size);
}

void ts_service_request(ts_work *work, void *service)
{
    ts_service *s = service;
    ts_request *request = (ts_request *)work;
    ts_connection *c = ts_service_connection(s, request->pipe);
    ts_answer answer = {0};
    request->service = s;
    s->requests++;
    if (c == NULL) /* it is gone: nobody will read this */
        return request->send(request, NULL, 0);
    c->requests++;
    const Tspb__Request *message = request->message;
    if (message == NULL || message->request_id == 0 ||
        message->body_case == TSPB__REQUEST__BODY__NOT_SET) {
        ts_refuse(&answer, TS_EPROTO, "%s",
                  message == NULL ? "the message is not a tspb.Request, or is made to take far "
                                    "more memory than its size"
                  : message->request_id == 0 ? "request_id is 0; ids count from 1"
                                             : "the request has no body that this daemon knows");
        return send_refusal(s, request, message == NULL ? 0 : message->request_id, &answer);
    }
    if (!ts_decode_plain(message, &answer))
        return send_refusal(s, request, message->request_id, &answer);

    if (answer_report(s, c, request))
        return;
    if (message->body_case == TSPB__REQUEST__BODY_WAIT_END)
        return end_waits(s, c, request);
    ts_kept_reply *kept = reply_slot(s, c, request);
    if (kept != NULL)
        answer_request(s, c, request, kept);
}

bool ts_service_init(ts_service *s, const ts_engine_limits *limits)
{
    return ts_service_init_with(s, ts_engine_new(limits));
}

bool ts_service_init_with(ts_service *s, ts_engine *engine)
{
    ts_queue_init(&s->exec.queue);
    s->exec.owner = s;
    s->exec.resumed = resume;
    s->exec.slab_goes = ts_service_slab_goes;
    s->exec.woken = woken;
    s->alarm.run = ts_parked_alarm;
    s->quarantine_ms = TS_QUARANTINE_MS;
    s->return_ms = TS_RETURN_MS;
    s->exec.engine = engine;
    if (engine == NULL)
        return false;
    s->by_session = calloc(engine->limits.sessions, sizeof *s->by_session);
    s->pool_stats = ts_pool_stats_cache_new(&s->exec);
    return s->by_session != NULL && s->pool_stats != NULL;
}
