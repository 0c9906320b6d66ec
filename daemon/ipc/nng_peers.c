/* What connections and users hold, and answers on their way. */
#define _GNU_SOURCE
#include "nng_server_internal.h"

#include "clock.h"
#include "log.h"
#include "unconst.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

/* ---- connections; under the lock ---- */

holding *ts_nng_holding_of(ts_nng_server *t, uint32_t uid)
{
    holding *h = t->holdings;
    while (h != NULL && h->uid != uid)
        h = h->next;
    if (h == NULL && (h = calloc(1, sizeof *h)) != NULL) {
        h->uid = uid;
        h->next = t->holdings;
        t->holdings = h;
    }
    if (h != NULL)
        h->connections++;
    return h;
}

void ts_nng_leave_holding(ts_nng_server *t, holding *h)
{
    if (--h->connections > 0)
        return;
    holding **at = &t->holdings;
    while (*at != h)
        at = &(*at)->next;
    *at = h->next;
    free(h);
}

connection *ts_nng_find(ts_nng_server *t, uint32_t pipe)
{
    connection *c = t->buckets[pipe % BUCKETS];
    while (c != NULL && c->pipe != pipe)
        c = c->next;
    return c;
}

void ts_nng_unref(ts_nng_server *t, connection *c)
{
    if (--c->refs > 0)
        return;
    ts_nng_leave_holding(t, c->holding);
    free(c);
}

/* Has epoll look for what the connection can do now. */
void ts_nng_look_for(ts_nng_server *t, connection *c)
{
    bool full =
        c->requests >= TS_PEER_REQUESTS || c->first_unsent != NULL || c->paused || c->told_off;
    uint32_t events = (full ? 0 : EPOLLIN) | (c->first_unsent != NULL ? EPOLLOUT : 0);
    if (c->ended || events == c->events)
        return;
    struct epoll_event event = {.events = events, .data.ptr = &c->socket};
    c->events = events;
    (void)epoll_ctl(t->epoll, EPOLL_CTL_MOD, c->socket.fd, &event);
}

void ts_nng_wake(const ts_nng_server *t)
{
    uint64_t one = 1;
    while (write(t->wake.fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* The connection is to end; the thread does it. */
void ts_nng_doom(ts_nng_server *t, connection *c)
{
    if (c->doomed)
        return;
    c->doomed = true;
    c->next_ended = t->ended;
    t->ended = c;
    ts_nng_wake(t);
}

void ts_nng_give_back_request_bytes(ts_nng_server *t, holding *h, size_t bytes)
{
    h->request_bytes -= bytes;
    if (bytes > 0 && h->paused > 0)
        ts_nng_wake(t);
}

/* Reads the connections again that waited for room. */
void ts_nng_resume_paused(ts_nng_server *t)
{
    bool any = false;
    for (holding *h = t->holdings; h != NULL && !any; h = h->next)
        any = h->paused > 0;
    for (uint32_t i = 0; any && i < BUCKETS; i++)
        for (connection *c = t->buckets[i]; c != NULL; c = c->next)
            if (c->paused && c->holding->request_bytes < TS_UID_BYTES &&
                c->holding->queued < UID_QUEUED) {
                c->paused = false;
                c->held_ms = ts_now_ms();
                c->holding->paused--;
                ts_nng_look_for(t, c);
            }
}

/* ---- answers; under the lock ---- */

/* Sends what waits, as far as the peer takes it. */
void ts_nng_send_unsent(ts_nng_server *t, connection *c)
{
    for (unsent *u; (u = c->first_unsent) != NULL;) {
        ssize_t n =
            send(c->socket.fd, u->data + u->sent, u->bytes - u->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            if (errno != EAGAIN && errno != EWOULDBLOCK)
                ts_nng_doom(t, c);
            break;
        }
        c->unread_ms = ts_now_ms();
        u->sent += (size_t)n;
        if (u->sent < u->bytes)
            continue;
        c->holding->answer_bytes -= u->bytes;
        c->first_unsent = u->next;
        if (u->next == NULL)
            c->last_unsent = &c->first_unsent;
        free(u);
    }
}

/* Sends an answer, or as much as the peer takes now; the rest waits. */
static void send_answer(ts_nng_server *t, const slot *s, const void *reply, size_t bytes)
{
    connection *c = s->c;
    uint8_t head[TS_SP_HEAD_BYTES];
    struct iovec parts[3] = {{head, sizeof head},
                             {ts_unconst(s->backtrace), s->backtrace_bytes},
                             {ts_unconst(reply), bytes}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 3};
    size_t all = sizeof head + s->backtrace_bytes + bytes;
    ssize_t n = 0;
    ts_sp_head(head, s->backtrace_bytes + bytes);
    if (c->first_unsent == NULL)
        while ((n = sendmsg(c->socket.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)) < 0 &&
               errno == EINTR)
            ;
    if (n == (ssize_t)all)
        return;
    if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
        return ts_nng_doom(t, c);
    size_t sent = n < 0 ? 0 : (size_t)n;
    const size_t others = c->holding->answer_bytes;
    const bool fits = others + all <= TS_UID_BYTES || others == 0;
    unsent *u = fits ? malloc(sizeof *u + all) : NULL;
    if (u == NULL) { /* a peer that reads asks again */
        if (fits)
            ts_log(TS_LOG_WARNING,
                   "a connection of uid %u is ended: no memory for an answer of %zu bytes",
                   c->guest.uid, all);
        else
            ts_log(TS_LOG_WARNING,
                   "a connection of uid %u is ended: %zu bytes of answers to this user aren't "
                   "read; the limit is %u",
                   c->guest.uid, others, TS_UID_BYTES);
        return ts_nng_doom(t, c);
    }
    *u = (unsent){.bytes = all, .sent = sent};
    memcpy(u->data, head, sizeof head);
    memcpy(u->data + sizeof head, s->backtrace, s->backtrace_bytes);
    memcpy(u->data + sizeof head + s->backtrace_bytes, reply, bytes);
    if (c->first_unsent == NULL)
        c->unread_ms = ts_now_ms();
    c->holding->answer_bytes += all;
    *c->last_unsent = u;
    c->last_unsent = &u->next;
}

/* Answers the request (no bytes: not at all), and lets go of it. Nothing more is read if it is the
 * last one: the peer ends the connection when it has read this, or its time ends it. */
void ts_nng_answer(slot *s, const void *reply, size_t bytes, bool last)
{
    ts_nng_server *t = s->server;
    connection *c = s->c;
    if (s->request.message != NULL)
        tspb__request__free_unpacked(s->request.message, NULL);
    pthread_mutex_lock(&t->lock);
    if (bytes > 0 && !c->ended && !c->doomed && !atomic_load(&t->stopping))
        send_answer(t, s, reply, bytes);
    c->requests--;
    ts_nng_give_back_request_bytes(t, c->holding, s->request.wait.bytes);
    c->told_off |= last;
    ts_nng_look_for(t, c);
    ts_nng_unref(t, c);
    pthread_mutex_unlock(&t->lock);
    free(s);
}

/* The `send` of a request: on the thread of the engine's owner. */
void ts_nng_send_reply(ts_request *request, const void *reply, size_t bytes)
{
    slot *s = (slot *)request;
    ts_latency_add(&s->server->service->message_times, ts_now_ns() - request->received_ns);
    ts_nng_answer(s, reply, bytes, false);
}
