#include "admin.h"

#include "log.h"

#include <string.h>

bool ts_is_admin(const ts_service *s, const ts_connection *c)
{
    return c->uid == 0 || c->uid == s->admin_uid;
}

static void kick(ts_service *s, const ts_connection *by, uint64_t session, ts_answer *a)
{
    ts_connection *c = ts_service_connection_of(s, session);
    if (c == NULL)
        return ts_refuse(a, TS_ENOENT, "there is no session %llx", (unsigned long long)session);
    ts_log_on(TS_LOG_WARNING, &(ts_log_about){.session = session, .uid = by->uid, .pid = by->pid},
              "session %llx is ended by uid %u (pid %u)", (unsigned long long)session, by->uid,
              by->pid);
    c->kicked = session;
    ts_service_end_session(s, c);
}

static void remove_seq(ts_service *s, const ts_connection *by, const Tspb__AdminFree *body,
                       ts_answer *a)
{
    const ts_engine *e = s->engine;
    ts_command command = {.op = TS_OP_SEQ_REMOVE, .seq_remove.seq = body->seq};
    bool only = body->pool[0] == '\0';
    if (only && e->num_pools > 1)
        return ts_refuse(a, TS_EINVAL, "there are several pools: name one");
    while (command.pool < e->num_pools && !only &&
           strcmp(e->pools[command.pool].config.name, body->pool) != 0)
        command.pool++;
    if (command.pool == e->num_pools)
        return ts_refuse(a, TS_ENOENT, "there is no pool '%.64s'", body->pool);
    ts_engine_apply(s->engine, &command, a);
    if (a->status == TS_OK)
        ts_log_on(TS_LOG_WARNING,
                  &(ts_log_about){
                      .pool = e->pools[command.pool].config.name, .uid = by->uid, .pid = by->pid},
                  "sequence %llx of pool '%s' is freed by uid %u (pid %u)",
                  (unsigned long long)body->seq, e->pools[command.pool].config.name, by->uid,
                  by->pid);
}

static void drain(ts_service *s, const ts_connection *by, bool on)
{
    if (s->draining != on)
        ts_log_on(TS_LOG_WARNING, &(ts_log_about){.uid = by->uid, .pid = by->pid},
                  "%s new sessions, as uid %u (pid %u) says", on ? "taking no" : "taking", by->uid,
                  by->pid);
    s->draining = on;
}

bool ts_admin(ts_service *s, ts_connection *c, const Tspb__Request *request, ts_answer *a)
{
    if (request->body_case != TSPB__REQUEST__BODY_ADMIN_KICK &&
        request->body_case != TSPB__REQUEST__BODY_ADMIN_FREE &&
        request->body_case != TSPB__REQUEST__BODY_ADMIN_DRAIN)
        return false;
    if (!ts_is_admin(s, c)) {
        ts_refuse(a, TS_EPERM, "uid %u is no operator: root and uid %u are", c->uid, s->admin_uid);
        return true;
    }
    switch (request->body_case) {
    case TSPB__REQUEST__BODY_ADMIN_KICK:
        kick(s, c, request->admin_kick->session, a);
        break;
    case TSPB__REQUEST__BODY_ADMIN_FREE:
        remove_seq(s, c, request->admin_free, a);
        break;
    default:
        drain(s, c, !request->admin_drain->off);
    }
    return true;
}
