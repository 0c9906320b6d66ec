#include "admin.h"

#include "log.h"
#include "namespace_text.h"
#include "parked.h"
#include "plain_text.h"
#include "pool_memory.h"
#include "refusals.h"
#include "resume.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* An order, as a call of the operator's session: a restarted daemon that is asked again tells what
 * came of it. */
static ts_caller caller_of(const ts_connection *by, const Tspb__Request *r)
{
    return (ts_caller){.session = by->session, .call = by->session == 0 ? 0 : r->request_id};
}

static void order_kick(ts_service *s, const ts_connection *by, const Tspb__Request *r,
                       ts_answer *answer)
{
    const ts_caller caller = caller_of(by, r);
    const uint64_t session = r->admin_kick->session;
    ts_connection *c = ts_service_connection_of(s, session);
    if (c == NULL && ts_resume_end(s, session, "an operator ended it before it came back", &caller))
        return;
    if (c == NULL)
        return ts_refuse(answer, TS_ENOENT, "there is no session %llx",
                         (unsigned long long)session);
    ts_log_on(TS_LOG_WARNING, &(ts_log_about){.session = session, .uid = by->uid, .pid = by->pid},
              "session %llx is ended by uid %u (pid %u)", (unsigned long long)session, by->uid,
              by->pid);
    c->kicked = session;
    ts_service_end_session(s, c, &caller);
}

static void order_free(ts_service *s, const ts_connection *by, const Tspb__Request *r,
                       ts_answer *answer)
{
    const Tspb__AdminFree *body = r->admin_free;
    const ts_engine *e = s->exec.engine;
    const ts_caller caller = caller_of(by, r);
    ts_command command = {.op = TS_OP_SEQ_REMOVE,
                          .session = caller.session,
                          .call = caller.call,
                          .pool = ts_engine_pool_named(e, body->pool, answer),
                          .seq_remove.seq = body->seq};
    if (command.pool == TS_NONE)
        return;
    ts_exec_apply(&s->exec, &command, answer);
    if (answer->status == TS_OK)
        ts_log_on(TS_LOG_WARNING,
                  &(ts_log_about){
                      .pool = e->pools[command.pool].config.name, .uid = by->uid, .pid = by->pid},
                  "sequence %llx of pool '%s' is freed by uid %u (pid %u)",
                  (unsigned long long)body->seq, e->pools[command.pool].config.name, by->uid,
                  by->pid);
}

static void order_drain(ts_service *s, const ts_connection *by, const Tspb__Request *r,
                        ts_answer *answer)
{
    const ts_caller caller = caller_of(by, r);
    const bool on = !r->admin_drain->off;
    if (s->exec.engine->draining != on)
        ts_log_on(TS_LOG_WARNING, &(ts_log_about){.uid = by->uid, .pid = by->pid},
                  "%s new sessions, as uid %u (pid %u) says", on ? "taking no" : "taking", by->uid,
                  by->pid);
    ts_exec_apply(
        &s->exec,
        &(ts_command){
            .op = TS_OP_DRAIN, .session = caller.session, .call = caller.call, .drain.on = on},
        answer);
    if (on)
        ts_parked_hurry_all(s);
}

/* What was done to a pool. */
static void note_pool(const ts_connection *by, const char *pool, const char *what)
{
    ts_log_on(TS_LOG_WARNING, &(ts_log_about){.pool = pool, .uid = by->uid, .pid = by->pid},
              "pool '%s' is %s by uid %u (pid %u)", pool, what, by->uid, by->pid);
}

static void order_create(ts_service *s, const ts_connection *by, const Tspb__Request *r,
                         ts_answer *answer)
{
    const ts_caller caller = caller_of(by, r);
    char why[TS_MESSAGE_BYTES];
    ts_config *c = malloc(sizeof *c);
    if (c == NULL)
        return ts_refuse(answer, TS_ENOMEM, "no memory for a configuration");
    ts_config_init(c);
    if (ts_config_add_pool(c, r->admin_pool_create->text) != TS_OK ||
        ts_config_finish_pools(c) != TS_OK) {
        ts_refuse(answer, TS_EINVAL, "%s", c->problems[0].text);
    } else {
        ts_status status = ts_pool_memory_add(&s->exec, &c->pools[0], &caller, why, sizeof why);
        if (status == TS_OK)
            note_pool(by, c->pools[0].pool.name, "made");
        else
            ts_refuse(answer, status, "pool '%.64s': %.150s", c->pools[0].pool.name, why);
    }
    free(c);
}

/* The pool's index; with the name in `named`, since the pool may go. */
static uint32_t pool_of(const ts_service *s, const char *name, char (*named)[64], ts_answer *answer)
{
    uint32_t pool = ts_engine_pool_named(s->exec.engine, name, answer);
    if (pool != TS_NONE)
        memcpy(*named, s->exec.engine->pools[pool].config.name, sizeof *named);
    return pool;
}

static void order_delete(ts_service *s, const ts_connection *by, const Tspb__Request *r,
                         ts_answer *answer)
{
    const ts_caller caller = caller_of(by, r);
    char named[64];
    uint32_t pool = pool_of(s, r->admin_pool_delete->pool, &named, answer);
    if (pool != TS_NONE && ts_pool_memory_remove(&s->exec, pool, &caller, answer) == TS_OK) {
        ts_refusals_forget_pool(s, pool);
        note_pool(by, named, "deleted");
    }
}

static void order_resize(ts_service *s, const ts_connection *by, const Tspb__Request *r,
                         ts_answer *answer)
{
    const Tspb__AdminPoolResize *body = r->admin_pool_resize;
    const ts_caller caller = caller_of(by, r);
    char named[64], what[64], shown[64];
    uint64_t bytes = 0;
    uint32_t pool = pool_of(s, body->pool, &named, answer);
    if (pool == TS_NONE)
        return;
    char why[TS_MESSAGE_BYTES];
    if (ts_config_memory(body->memory, &bytes, why, sizeof why) != TS_OK)
        return ts_refuse(answer, TS_EINVAL, "%s", why);
    const ts_pool_config *config = &s->exec.engine->pools[pool].config;
    const uint64_t block_bytes = ts_geometry_block_bytes(&config->geometry);
    const uint64_t blocks = bytes / block_bytes;
    const uint32_t most = s->exec.engine->pools[pool].books.max_blocks;
    if (blocks == 0 || blocks > most)
        return ts_refuse(answer, TS_EINVAL,
                         "memory = %.40s: that is %llu blocks of %llu bytes; pool '%s' may have 1 "
                         "to %u, its memory_max",
                         ts_text_escape(body->memory, shown, sizeof shown),
                         (unsigned long long)blocks, (unsigned long long)block_bytes, named, most);
    if (ts_pool_memory_resize(&s->exec, pool, (uint32_t)blocks, &caller, answer) != TS_OK)
        return;
    snprintf(what, sizeof what, "given %u blocks", config->num_blocks);
    note_pool(by, named, what);
}

static void order_cache_drop(ts_service *s, const ts_connection *by, const Tspb__Request *r,
                             ts_answer *answer)
{
    const Tspb__AdminCacheDrop *body = r->admin_cache_drop;
    const ts_caller caller = caller_of(by, r);
    char named[64], shown[TS_NAMESPACE_TEXT_BYTES], tenant[32] = "", space[160] = "";
    const uint32_t pool = pool_of(s, body->pool, &named, answer);
    if (pool == TS_NONE)
        return;
    if (body->space.len > TS_NAMESPACE_BYTES_MAX)
        return ts_refuse_beyond(answer, TS_EINVAL, body->space.len, TS_NAMESPACE_BYTES_MAX,
                                "a namespace of %zu bytes; the limit is %u", body->space.len,
                                TS_NAMESPACE_BYTES_MAX);
    const ts_command command = {
        .op = TS_OP_CACHE_DROP,
        .session = caller.session,
        .call = caller.call,
        .pool = pool,
        .cache_drop = {.has_uid = body->has_tenant,
                       .uid = body->tenant,
                       .has_space = body->space.len > 0,
                       .space = {.bytes = body->space.data, .count = body->space.len}}};
    ts_exec_apply(&s->exec, &command, answer);
    if (body->has_tenant)
        snprintf(tenant, sizeof tenant, " of uid %u", body->tenant);
    if (body->space.len > 0)
        snprintf(space, sizeof space, " in namespace '%s'",
                 ts_namespace_show(body->space.data, body->space.len, shown));
    ts_log_on(TS_LOG_WARNING, &(ts_log_about){.pool = named, .uid = by->uid, .pid = by->pid},
              "the prefix cache of pool '%s'%s%s is dropped by uid %u (pid %u): %llu blocks", named,
              tenant, space, by->uid, by->pid, (unsigned long long)answer->dropped);
}

/* The answer is on its way. */
static void restart_now(ts_work *work, void *service)
{
    (void)work;
    ((ts_service *)service)->restart();
}

static void order_restart(ts_service *s, const ts_connection *by, const Tspb__Request *r,
                          ts_answer *answer)
{
    const Tspb__AdminRestart *body = r->admin_restart;
    if (body->pid != (uint64_t)getpid() || s->restarting.run != NULL)
        return; /* it was done */
    if (!body->empty && (s->exec.books == NULL || !ts_store_holds(s->exec.store)))
        return ts_refuse(answer, TS_EINVAL,
                         "nobody holds the daemon's memory: a restart loses all that "
                         "is stored, and only one with --empty is allowed to");
    if (body->empty)
        ts_books_discard(s->exec.books);
    ts_log_on(TS_LOG_WARNING, &(ts_log_about){.uid = by->uid, .pid = by->pid},
              "ending, to be started again%s, as uid %u (pid %u) says",
              body->empty ? " with nothing of what is stored" : "", by->uid, by->pid);
    s->restarting.run = restart_now;
    ts_queue_put(&s->exec.queue, &s->restarting);
}

/* Fills in what the answer has beside its status. */
static void encode(const Tspb__Request *request, const ts_answer *answer, Tspb__Reply *reply,
                   ts_admin_body *body)
{
    if (request->body_case != TSPB__REQUEST__BODY_ADMIN_CACHE_DROP || answer->status != TS_OK)
        return;
    tspb__cache_dropped__init(&body->cache_dropped);
    body->cache_dropped.blocks = answer->dropped;
    reply->body_case = TSPB__REPLY__BODY_CACHE_DROPPED;
    reply->cache_dropped = &body->cache_dropped;
}

/* `op`: the order's command, by which its answer is found again after a restart; 0: it has none. */
static const struct order {
    Tspb__Request__BodyCase body;
    ts_op op;
    void (*run)(ts_service *s, const ts_connection *by, const Tspb__Request *r, ts_answer *answer);
} orders[] = {
    {TSPB__REQUEST__BODY_ADMIN_KICK, TS_OP_SESSION_CLOSE, order_kick},
    {TSPB__REQUEST__BODY_ADMIN_FREE, TS_OP_SEQ_REMOVE, order_free},
    {TSPB__REQUEST__BODY_ADMIN_DRAIN, TS_OP_DRAIN, order_drain},
    {TSPB__REQUEST__BODY_ADMIN_POOL_CREATE, TS_OP_POOL_ADD, order_create},
    {TSPB__REQUEST__BODY_ADMIN_POOL_DELETE, TS_OP_POOL_REMOVE, order_delete},
    {TSPB__REQUEST__BODY_ADMIN_POOL_RESIZE, TS_OP_POOL_RESIZE, order_resize},
    {TSPB__REQUEST__BODY_ADMIN_CACHE_DROP, TS_OP_CACHE_DROP, order_cache_drop},
    {TSPB__REQUEST__BODY_ADMIN_RESTART, (ts_op)0, order_restart}, /* it names the daemon it means */
};

bool ts_admin(ts_service *s, ts_connection *c, const Tspb__Request *request, ts_answer *answer,
              Tspb__Reply *reply, ts_admin_body *body)
{
    size_t i = 0;
    while (i < sizeof orders / sizeof *orders && orders[i].body != request->body_case)
        i++;
    if (i == sizeof orders / sizeof *orders)
        return false;
    if (ts_service_is_operator(s, c->uid, c->gid)) {
        const ts_caller caller = caller_of(c, request);
        if (!ts_books_ordered(s->exec.books, &caller, orders[i].op, answer))
            orders[i].run(s, c, request, answer);
        encode(request, answer, reply, body);
        return true;
    }
    const char *group = s->operators.group;
    ts_refuse(answer, TS_EPERM, "uid %u is no operator: root%s uid %u%s%s are", c->uid,
              group[0] == '\0' ? " and" : ",", s->admin_uid, group[0] == '\0' ? "" : " and group ",
              group);
    return true;
}
