#include "server.h"

#include "clock.h"
#include "pool_stats_cache.h"
#include "slab_holder.h"
#include "slab_supply.h"
#include "step_work.h"
#include "stored_memory.h"
#include "stream_runs.h"
#include "unconst.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOOK_MS 250u              /* between looks at claims, while anybody waits */
#define QUARANTINE_LOOK_MS 50u    /* ... at processes, while there are quarantines */
#define QUARANTINE_MOST_MS 10000u /* for a process that lives on */

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
    ts_connection *c = index < s->exec.engine->limits.sessions ? s->by_session[index] : NULL;
    return c != NULL && c->session == session ? c : NULL;
}

void ts_service_pipe_added(ts_work *work, void *service)
{
    ts_service *s = service;
    ts_pipe_event *event = (ts_pipe_event *)work;
    ts_connection *c = calloc(1, sizeof *c);
    if (c == NULL || !ts_reply_cache_init(&c->replies, &s->reply_accounts, event->uid)) {
        free(c);
        ts_log(TS_LOG_ERROR, "no memory for a connection from pid %u", event->pid);
        s->end_connection(s->end_connection_arg, event->pipe, false); /* its worker asks again */
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

/* Others that call themselves tsctl are events. */
ts_log_level ts_service_session_level(const ts_service *s, const ts_connection *c)
{
    const ts_session *session = ts_engine_session(s->exec.engine, c->session);
    bool look = session != NULL && strcmp(session->program, "tsctl") == 0 &&
                ts_service_is_operator(s, c->uid, c->gid);
    return look ? TS_LOG_DEBUG : TS_LOG_INFO;
}

static ts_parked *take_parked(ts_connection *c)
{
    ts_parked *p = c->parked;
    if (p == NULL)
        return NULL;
    *p->at = p->next;
    if (p->next != NULL)
        p->next->at = p->at;
    c->parked = NULL;
    return p;
}

bool ts_service_go_on(ts_service *s, ts_connection *c, bool is_late)
{
    ts_answer answer;
    const uint64_t session = c->session;
    ts_parked *p = take_parked(c);
    if (p == NULL)
        return false;
    if (is_late)
        p->deadline_ms = 1; /* long ago */
    p->go_on(p);
    if (c->parked == NULL && session != 0) /* it was answered: its session waits for nothing */
        ts_exec_apply(&s->exec, &(ts_command){.op = TS_OP_WAIT_END, .session = session}, &answer);
    return true;
}

/* A session that has ended, whose process's kernels may write into its steps' blocks yet. */
typedef struct ts_quarantine {
    struct ts_quarantine *next;
    uint64_t session;
    int process;                /* a descriptor of it; -1: it is gone, or can't be watched */
    uint64_t began_ms, gone_ms; /* gone_ms 0: it isn't yet */
} ts_quarantine;

/* False: out of memory. */
static bool quarantine(ts_service *s, uint64_t session, uint32_t pid)
{
    ts_quarantine *q = malloc(sizeof *q);
    if (q == NULL)
        return false;
    *q = (ts_quarantine){.next = s->quarantines,
                         .session = session,
                         .process = pid == 0 ? -1 : (int)syscall(SYS_pidfd_open, pid, 0u),
                         .began_ms = ts_now_ms()};
    if (q->process < 0)
        q->gone_ms = q->began_ms;
    s->quarantines = q;
    ts_service_set_alarm(s);
    return true;
}

void ts_service_end_quarantines(ts_service *s, uint64_t now_ms)
{
    for (ts_quarantine **at = &s->quarantines, *q; (q = *at) != NULL;) {
        ts_answer answer;
        if (q->gone_ms == 0 &&
            poll(&(struct pollfd){.fd = q->process, .events = POLLIN}, 1, 0) != 0)
            q->gone_ms = now_ms;
        if ((q->gone_ms == 0 || now_ms - q->gone_ms < s->quarantine_ms) &&
            now_ms - q->began_ms < QUARANTINE_MOST_MS) {
            at = &q->next;
            continue;
        }
        ts_exec_apply(&s->exec, &(ts_command){.op = TS_OP_SESSION_GONE, .session = q->session},
                      &answer);
        *at = q->next;
        if (q->process >= 0)
            close(q->process);
        free(q);
    }
}

void ts_service_set_alarm(ts_service *s)
{
    const bool claims = s->parked != NULL && s->exec.engine->claims.live > 0;
    const uint64_t next_ms = ts_now_ms() + (s->quarantines != NULL ? QUARANTINE_LOOK_MS : LOOK_MS);
    if (!claims && s->quarantines == NULL)
        s->look_ms = 0;
    else if (s->look_ms == 0 || s->look_ms > next_ms) /* later ones don't put it off */
        s->look_ms = next_ms;
    uint64_t at = s->look_ms;
    for (const ts_parked *p = s->parked; p != NULL; p = p->next)
        if (at == 0 || p->deadline_ms < at)
            at = p->deadline_ms;
    ts_queue_set_alarm(&s->exec.queue, &s->alarm, at);
}

void ts_service_free_memory(ts_session_memory *m)
{
    ts_filling_end(&m->new_exchange);
    ts_filling_end(&m->new_rings);
    ts_exchange_release(m->exchange);
    ts_signals_release_waiters(m->signals);
    ts_signals_release(m->signals);
    ts_step_plan_release(m->plan);
    ts_slab_holder_free(m->slabs);
    *m = (ts_session_memory){0};
}

void ts_service_close_session(ts_service *s, uint64_t session, uint32_t pid, const ts_caller *by)
{
    const ts_session *about = ts_engine_session(s->exec.engine, session);
    ts_answer answer;
    const bool writes = ts_engine_session_writes(s->exec.engine, session);
    if (about->exchange_bytes > 0)
        ts_stored_exchange_forget(s->exec.store, session, about->exchanges);
    ts_stored_signals_forget(s->exec.store, session);
    ts_exec_apply(
        &s->exec,
        &(ts_command){.op = TS_OP_SESSION_CLOSE,
                      .session = session,
                      .session_close = {.quarantine = writes && quarantine(s, session, pid),
                                        .by = by == NULL ? (ts_caller){0} : *by}},
        &answer);
}

void ts_service_quarantine_again(ts_service *s, uint64_t session, uint32_t pid)
{
    ts_answer answer;
    if (!quarantine(s, session, pid))
        ts_exec_apply(&s->exec, &(ts_command){.op = TS_OP_SESSION_GONE, .session = session},
                      &answer);
}

void ts_service_end_session(ts_service *s, ts_connection *c, const ts_caller *by)
{
    if (c->session != 0) {
        ts_step_work_drop_session(&s->exec, c->session);
        ts_log_level level = ts_service_session_level(s, c);
        s->by_session[(uint32_t)c->session] = NULL;
        ts_service_close_session(s, c->session, c->pid, by);
        ts_log_on(level, &(ts_log_about){.session = c->session, .uid = c->uid, .pid = c->pid},
                  "session %llx closed (uid %u, pid %u)", (unsigned long long)c->session, c->uid,
                  c->pid);
        c->session = 0;
        c->idle_since_ms = ts_now_ms();
        (void)ts_service_go_on(s, c, true);
    }
    ts_service_free_memory(&c->memory);
    for (ts_close_hook *hook = c->on_end, *next; hook != NULL; hook = next) {
        next = hook->next;
        hook->close(hook);
    }
    c->on_end = NULL;
    c->ring = NULL;
}

static void connection_free(ts_service *s, ts_connection *c)
{
    ts_parked *parked = take_parked(c);
    if (parked != NULL)
        parked->drop(parked);
    ts_service_end_session(s, c, NULL);
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
    ts_reply_cache_fini(&c->replies, &s->reply_accounts);
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

void ts_service_slab_goes(void *service, uint32_t pool, uint32_t slab)
{
    const ts_service *s = service;
    const uint64_t now_ms = ts_now_ms();
    for (uint32_t i = 0; i < s->exec.engine->limits.sessions; i++)
        if (s->by_session[i] != NULL)
            ts_slab_holder_revoke(s->by_session[i]->memory.slabs, pool, slab, now_ms);
}

/* Ends sessions that keep what they were to give back. */
static void look_for_returns(ts_service *s)
{
    const uint64_t now_ms = ts_now_ms();
    for (uint32_t i = 0; i < s->exec.engine->limits.sessions; i++) {
        ts_connection *c = s->by_session[i];
        if (c == NULL || !ts_slab_holder_look(c->memory.slabs, now_ms, s->return_ms))
            continue;
        ts_log_on(TS_LOG_WARNING,
                  &(ts_log_about){.session = c->session, .uid = c->uid, .pid = c->pid},
                  "session %llx (uid %u, pid %u) is ended: it maps %u slabs of GPU memory that are "
                  "others', and has not given back any for %u s",
                  (unsigned long long)c->session, c->uid, c->pid,
                  ts_slab_holder_owes(c->memory.slabs), s->return_ms / 1000);
        c->kicked = c->session;
        c->kept_slabs = true;
        ts_service_end_session(s, c, NULL);
    }
}

/* Ends sessions that have freed pages of their exchange where that can't be forbidden: the daemon
 * would be charged with them. */
static void look_at_exchanges(ts_service *s)
{
    for (uint32_t i = 0; i < s->exec.engine->limits.sessions; i++) {
        ts_connection *c = s->by_session[i];
        const ts_exchange *x = c == NULL ? NULL : c->memory.exchange;
        if (x == NULL || x->kept_fd < 0 || ts_filled_is_whole(x->kept_fd))
            continue;
        ts_log_on(TS_LOG_WARNING,
                  &(ts_log_about){.session = c->session, .uid = c->uid, .pid = c->pid},
                  "session %llx (uid %u, pid %u) is ended: it has freed pages of its exchange",
                  (unsigned long long)c->session, c->uid, c->pid);
        c->kicked = c->session;
        c->freed_pages = true;
        ts_service_end_session(s, c, NULL);
    }
}

void ts_service_tick(ts_service *s, uint64_t idle_since_ms)
{
    ts_exec_tick(&s->exec);
    look_for_returns(s);
    look_at_exchanges(s);
    if (s->look_for_absent != NULL)
        s->look_for_absent(s, false);
    for (uint32_t i = 0; i < TS_CONNECTION_BUCKETS; i++)
        for (ts_connection *c = s->connections[i]; c != NULL; c = c->next) {
            ts_stream_run_take_posted(&s->exec, c->session, &c->memory);
            if (c->idle_since_ms != 0 && c->idle_since_ms <= idle_since_ms)
                s->end_connection(s->end_connection_arg, c->pipe, true);
        }
}

bool ts_service_is_operator(const ts_service *s, uint32_t uid, uint32_t gid)
{
    if (uid == 0 || uid == s->admin_uid)
        return true;
    pthread_mutex_t *lock = ts_unconst(&s->operators_lock);
    pthread_mutex_lock(lock);
    bool is = ts_operators_have(&s->operators, uid, gid);
    pthread_mutex_unlock(lock);
    return is;
}

static void set_ending(ts_work *work, void *service)
{
    (void)work;
    ts_service *s = service;
    s->ending = true;
    /* The transport, which has the requests, goes before connections do. */
    while (s->parked != NULL)
        (void)ts_service_go_on(s, s->parked->connection, true);
}

void ts_service_stop(ts_service *s)
{
    ts_work last = {.run = set_ending};
    ts_queue_put(&s->exec.queue, &last);
    ts_queue_flush(&s->exec.queue);
}

void ts_service_run(ts_service *s)
{
    ts_work *work;
    while ((work = ts_queue_take(&s->exec.queue)) != NULL)
        for (ts_work *next; work != NULL; work = next) {
            next = work->next;
            work->run(work, s);
        }
}

void ts_service_close_connections(ts_service *s)
{
    for (uint32_t i = 0; i < TS_CONNECTION_BUCKETS; i++)
        for (ts_connection *c = s->connections[i], *next; c != NULL; c = next) {
            next = c->next;
            s->connections[i] = next;
            connection_free(s, c);
        }
}

void ts_service_fini(ts_service *s)
{
    for (ts_quarantine *q = s->quarantines, *next; q != NULL; q = next) {
        next = q->next;
        if (q->process >= 0)
            close(q->process);
        free(q);
    }
    if (s->look_for_absent != NULL)
        s->look_for_absent(s, true);
    ts_pool_stats_cache_free(s->pool_stats);
    ts_step_plans_free(&s->exec);
    ts_slab_supply_free(&s->exec);
    ts_exec_fini(&s->exec);
    free(s->by_session);
    free(s->refusals);
    ts_slab_list_fini(&s->slab_list);
    free(s->packed);
}
