#define _GNU_SOURCE
#include "nng_server_internal.h"

#include "clock.h"
#include "log.h"
#include "unix_listen.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TICK_MS 1000
#define EPOLL_BATCH 4096 /* all that there is to do, as a rule */
#define ACCEPTS_PER_TURN 16u
#define TURNED_AWAY_MAX 64u /* at a time, that are told why */

/* ---- coming and going; on the thread ---- */

/* Memory to tell of a connection's end, however long it takes: without it its session would stay.
 */
static ts_pipe_event *end_event(uint32_t pipe)
{
    ts_pipe_event *event;
    while ((event = calloc(1, sizeof *event)) == NULL)
        (void)poll(NULL, 0, 1);
    event->pipe = pipe;
    event->work.run = ts_service_pipe_removed;
    return event;
}

static bool watch(ts_nng_server *t, source *source)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = source};
    return epoll_ctl(t->epoll, EPOLL_CTL_ADD, source->fd, &event) == 0;
}

/* Ends the connection: its descriptors, what has come of a message, what it has not read. */
static void end(ts_nng_server *t, connection *c)
{
    bool told = c->refusal == NULL;
    ts_unwatch(t->epoll, c->socket.fd);
    ts_hurry_begin(&t->hurry);
    close(c->socket.fd);
    ts_hurry_end(&t->hurry);
    if (c->process.fd >= 0) {
        ts_unwatch(t->epoll, c->process.fd);
        close(c->process.fd);
    }
    pthread_mutex_lock(&t->lock);
    c->ended = true;
    if (c->paused)
        c->holding->paused--;
    ts_nng_give_back_request_bytes(t, c->holding, c->content_bytes);
    for (unsent *u = c->first_unsent, *next; u != NULL; u = next) {
        next = u->next;
        c->holding->answer_bytes -= u->bytes;
        free(u);
    }
    c->first_unsent = NULL;
    free(c->content);
    free(c->refusal);
    c->content = NULL;
    c->refusal = NULL;
    *c->at = c->next;
    if (c->next != NULL)
        c->next->at = c->at;
    if (told)
        ts_crowd_leave(&t->crowd, &c->guest);
    else
        t->turned_away--;
    uint32_t pipe = c->pipe;
    ts_nng_unref(t, c);
    pthread_mutex_unlock(&t->lock);
    if (told)
        ts_queue_put(&t->service->exec.queue, &end_event(pipe)->work);
}

/* Whether this event is a connection's end. A peer that has gone reads nothing, and what it has
 * sent is of no use to it. */
static bool is_end(const source *s, uint32_t events)
{
    return s->kind == PROCESS || (s->kind == SOCKET && (events & (EPOLLHUP | EPOLLERR)) != 0);
}

/* Ends those that are to end. */
static void end_doomed(ts_nng_server *t)
{
    pthread_mutex_lock(&t->lock);
    connection *c = t->ended;
    t->ended = NULL;
    pthread_mutex_unlock(&t->lock);
    for (connection *next; c != NULL; c = next) {
        next = c->next_ended;
        end(t, c);
    }
}

/* Ends what has closed by now, which epoll may yet have to tell. Between the events of one turn
 * and the next, since those may name what this frees. */
static void end_closed(ts_nng_server *t)
{
    struct epoll_event events[EPOLL_BATCH];
    int n = epoll_wait(t->epoll, events, EPOLL_BATCH, 0);
    pthread_mutex_lock(&t->lock);
    for (int i = 0; i < n; i++) {
        const source *s = events[i].data.ptr;
        if (is_end(s, events[i].events))
            ts_nng_doom(t, s->c);
    }
    pthread_mutex_unlock(&t->lock);
    end_doomed(t);
}

/* A client may have closed one connection before it made this one: before this is turned away,
 * the daemon looks whether it has. */
static bool may_enter(ts_nng_server *t, const connection *c, char *why, size_t why_bytes)
{
    for (bool again = false;; again = true) {
        pthread_mutex_lock(&t->lock);
        const bool may = ts_crowd_enter(&t->crowd, &c->guest, why, why_bytes);
        pthread_mutex_unlock(&t->lock);
        if (may || again)
            return may;
        end_closed(t);
    }
}

/* Lets the connection in, or has it told why not. False: neither can be done. */
static bool enter(ts_nng_server *t, connection *c)
{
    char why[TS_MESSAGE_BYTES];
    bool ok = true;
    const bool may = may_enter(t, c, why, sizeof why);
    pthread_mutex_lock(&t->lock);
    c->holding = ts_nng_holding_of(t, c->guest.uid);
    if (c->holding == NULL) {
        if (may)
            ts_crowd_leave(&t->crowd, &c->guest);
        ok = false;
    } else if (!may) {
        if (t->turned_away == TURNED_AWAY_MAX || (c->refusal = strdup(why)) == NULL) {
            ts_nng_leave_holding(t, c->holding);
            ok = false;
        } else {
            t->turned_away++;
        }
        ts_log(TS_LOG_WARNING, "a connection of uid %u was turned away: %s", c->guest.uid, why);
    }
    if (ok) {
        do
            c->pipe = ++t->next_pipe;
        while (c->pipe == 0 || ts_nng_find(t, c->pipe) != NULL);
        c->at = &t->buckets[c->pipe % BUCKETS];
        c->next = *c->at;
        if (c->next != NULL)
            c->next->at = &c->next;
        *c->at = c;
    }
    pthread_mutex_unlock(&t->lock);
    return ok;
}

/* False: there is no other now. */
static bool accept_one(ts_nng_server *t)
{
    int fd = accept4(t->listener.fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
        if (ts_accept_must_pause(errno)) {
            t->accept_paused = true;
            ts_accept_pause(t->epoll, t->listener.fd, &t->listener, true);
        }
        return false;
    }
    connection *c = calloc(1, sizeof *c);
    ts_pipe_event *event = calloc(1, sizeof *event);
    if (c == NULL || event == NULL || !ts_guest_of(fd, &c->guest))
        goto refuse;
    c->guest.is_operator = ts_service_is_operator(t->service, c->guest.uid, c->guest.gid);
    c->socket = (source){.kind = SOCKET, .c = c, .fd = fd};
    c->process = (source){.kind = PROCESS, .c = c, .fd = -1};
    c->refs = 1;
    c->events = EPOLLIN;
    c->last_unsent = &c->first_unsent;
    c->deadline_ms = ts_now_ms() + t->options.idle_ms;
    if (!enter(t, c))
        goto refuse;
    if (c->refusal == NULL) {
        event->work.run = ts_service_pipe_added;
        event->pipe = c->pipe;
        event->uid = c->guest.uid;
        event->gid = c->guest.gid;
        event->pid = c->guest.pid;
        ts_queue_put(&t->service->exec.queue, &event->work);
    } else {
        free(event);
    }
    /* The kernel closes a dead worker's socket only when nobody else holds it, and a child that
     * the worker forked may. */
    if (c->guest.pid != 0)
        c->process.fd = (int)syscall(SYS_pidfd_open, (pid_t)c->guest.pid, 0);
    bool dead = c->process.fd < 0 && c->guest.pid != 0 && errno == ESRCH;
    bool ok = !dead && (c->process.fd < 0 || watch(t, &c->process)) && watch(t, &c->socket) &&
              send(fd, ts_sp_greeting_rep, TS_SP_GREETING_BYTES, MSG_DONTWAIT | MSG_NOSIGNAL) ==
                  TS_SP_GREETING_BYTES;
    pthread_mutex_lock(&t->lock);
    if (!ok)
        ts_nng_doom(t, c);
    pthread_mutex_unlock(&t->lock);
    return true;
refuse:
    free(c);
    free(event);
    ts_hurry_begin(&t->hurry);
    close(fd);
    ts_hurry_end(&t->hurry);
    return true;
}

static void run_tick(ts_work *work, void *service)
{
    tick *t = (tick *)work;
    ts_service_tick(service, t->idle_since_ms);
    atomic_store(&t->out, false);
}

/* It isn't the client that is slow: its messages wait, or waited a moment ago, for its user's. */
static bool is_held(const ts_nng_server *t, const connection *c, uint64_t now_ms)
{
    return c->paused || now_ms < c->held_ms + t->options.idle_ms;
}

/* Ends what has had its time. */
static void on_tick(ts_nng_server *t, uint64_t now_ms)
{
    uint32_t idle_ms = t->options.idle_ms;
    pthread_mutex_lock(&t->lock);
    for (uint32_t i = 0; i < BUCKETS; i++)
        for (connection *c = t->buckets[i]; c != NULL; c = c->next) {
            bool unread = c->first_unsent != NULL && now_ms >= c->unread_ms + idle_ms;
            if (unread)
                ts_log(TS_LOG_WARNING,
                       "a connection of uid %u is ended: it doesn't read its answers",
                       c->guest.uid);
            if (unread ||
                (c->deadline_ms != 0 && now_ms >= c->deadline_ms && !is_held(t, c, now_ms)))
                ts_nng_doom(t, c);
        }
    pthread_mutex_unlock(&t->lock);
    if (t->accept_paused) {
        t->accept_paused = false;
        ts_accept_pause(t->epoll, t->listener.fd, &t->listener, false);
    }
    if (!atomic_exchange(&t->tick.out, true)) {
        t->tick.idle_since_ms = now_ms > idle_ms ? now_ms - idle_ms : 0;
        ts_queue_put(&t->service->exec.queue, &t->tick.work);
    }
}

static void on_wake(ts_nng_server *t)
{
    uint64_t times;
    while (read(t->wake.fd, &times, sizeof times) < 0 && errno == EINTR)
        ;
    pthread_mutex_lock(&t->lock);
    ts_nng_resume_paused(t);
    pthread_mutex_unlock(&t->lock);
}

/* Of a connection: its end, or what it can do. */
static void on_event(ts_nng_server *t, const source *s, uint32_t events)
{
    connection *c = s->c;
    pthread_mutex_lock(&t->lock);
    if (is_end(s, events))
        ts_nng_doom(t, c);
    else if ((events & EPOLLOUT) != 0)
        ts_nng_send_unsent(t, c);
    ts_nng_look_for(t, c);
    bool doomed = c->doomed;
    pthread_mutex_unlock(&t->lock);
    if (!doomed && (events & EPOLLIN) != 0)
        ts_nng_on_readable(t, c);
}

static void *transport_main(void *arg)
{
    prctl(PR_SET_NAME, "messages");
    ts_nng_server *t = arg;
    struct epoll_event events[EPOLL_BATCH];
    uint64_t next_tick = ts_now_ms() + TICK_MS;
    if (!t->refuses && !ts_hurry_init(&t->hurry))
        ts_log(TS_LOG_ERROR, "no timer for the daemon's socket: %s", strerror(errno));
    while (!atomic_load(&t->stopping)) {
        uint64_t now = ts_now_ms();
        if (now >= next_tick) {
            on_tick(t, now);
            next_tick = now + TICK_MS;
        }
        int n = epoll_wait(t->epoll, events, EPOLL_BATCH, (int)(next_tick - now));
        bool arrive = false;
        t->turn++;
        for (int i = 0; i < n; i++) {
            const source *s = events[i].data.ptr;
            if (s->kind == LISTENER)
                arrive = true;
            else if (s->kind == WAKE)
                on_wake(t);
            else
                on_event(t, s, events[i].events);
        }
        end_doomed(t); /* after the events of this turn, which may name them */
        for (uint32_t i = 0; arrive && i < ACCEPTS_PER_TURN && accept_one(t); i++)
            ;
    }
    ts_hurry_fini(&t->hurry);
    return NULL;
}

/* ---- life ---- */

ts_status ts_nng_server_start(ts_service *service, const ts_nng_server_options *o,
                              ts_nng_server **out, char *why, size_t why_bytes)
{
    ts_nng_server *t = calloc(1, sizeof *t);
    *out = t;
    if (t == NULL) {
        snprintf(why, why_bytes, "no memory for the daemon's socket");
        return TS_ENOMEM;
    }
    t->service = service;
    t->options = *o;
    snprintf(t->path, sizeof t->path, "%s", o->path);
    t->options.path = t->path;
    t->tick.work.run = run_tick;
    t->crowd = (ts_crowd){.max = o->connections_max, .tenant_max = o->tenant_connections_max};
    pthread_mutex_init(&t->lock, NULL);
    t->listener = (source){.kind = LISTENER, .fd = -1};
    t->wake = (source){.kind = WAKE, .fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    t->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (t->wake.fd >= 0 && t->epoll >= 0 && watch(t, &t->wake))
        return TS_OK;
    snprintf(why, why_bytes, "no descriptors for the daemon's socket: %s", strerror(errno));
    ts_nng_server_free(t);
    *out = NULL;
    return TS_ENOMEM;
}

ts_status ts_nng_server_listen(ts_nng_server *t, char *why, size_t why_bytes)
{
    t->listener.fd = ts_unix_listen(t->path, SOCK_STREAM, t->options.mode);
    t->refuses = t->listener.fd >= 0 && ts_passed_refuse(t->listener.fd);
    if (t->listener.fd < 0 || !watch(t, &t->listener) ||
        (errno = pthread_create(&t->thread, NULL, transport_main, t)) != 0) {
        snprintf(why, why_bytes, "listening at %s failed: %s", t->path, strerror(errno));
        return TS_ECONN;
    }
    t->runs = true;
    return TS_OK;
}

void ts_nng_server_end(ts_nng_server *t, uint32_t pipe, bool idle)
{
    pthread_mutex_lock(&t->lock);
    connection *c = ts_nng_find(t, pipe);
    if (c != NULL && !(idle && is_held(t, c, ts_now_ms())))
        ts_nng_doom(t, c);
    pthread_mutex_unlock(&t->lock);
}

void ts_nng_server_stop(ts_nng_server *t)
{
    if (t == NULL || !t->runs)
        return;
    atomic_store(&t->stopping, true);
    ts_nng_wake(t);
    pthread_join(t->thread, NULL);
    t->runs = false;
    (void)unlink(t->path);
    ts_queue_flush(&t->service->exec.queue); /* the tick that may be out is not touched any more */
}

void ts_nng_server_free(ts_nng_server *t)
{
    if (t == NULL)
        return;
    if (!t->refuses)
        (void)ts_hurry_init(&t->hurry);
    for (uint32_t i = 0; i < BUCKETS; i++)
        while (t->buckets[i] != NULL)
            end(t, t->buckets[i]);
    ts_hurry_begin(&t->hurry);
    if (t->listener.fd >= 0)
        close(t->listener.fd);
    ts_hurry_fini(&t->hurry);
    if (t->wake.fd >= 0)
        close(t->wake.fd);
    if (t->epoll >= 0)
        close(t->epoll);
    ts_crowd_fini(&t->crowd);
    pthread_mutex_destroy(&t->lock);
    free(t);
}
