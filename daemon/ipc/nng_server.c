#define _GNU_SOURCE
#include "nng_server.h"

#include "clock.h"
#include "log.h"
#include "passed_fds.h"
#include "request.h"
#include "sp_wire.h"
#include "unix_listen.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define TICK_MS 1000
#define EVENTS 4096 /* all that there is to do, as a rule */
#define ACCEPTS_PER_TURN 16u
#define MESSAGES_PER_TURN 4u /* that a uid gives before the others have their turn */
#define UID_QUEUED 4u        /* requests of one uid that the engine has yet to begin */
#define BUCKETS 4096u
#define TURNED_AWAY_MAX 64u /* at a time, that are told why */

/* What one uid's connections hold together. */
typedef struct holding {
    struct holding *next;
    uint32_t uid, connections;
    size_t request_bytes, answer_bytes;
    uint32_t paused; /* connections that aren't read: request_bytes or queued is at its limit */
    uint32_t queued; /* requests that the engine has yet to begin */
    uint32_t turn, given; /* messages that it has given in that turn */
} holding;

/* An answer, or the rest of one, that the peer has yet to take. */
typedef struct unsent {
    struct unsent *next;
    size_t bytes, sent;
    uint8_t data[];
} unsent;

/* What epoll tells of: the data pointer of its events. */
typedef enum source_kind { LISTENER, WAKE, SOCKET, PROCESS } source_kind;

typedef struct connection connection;

typedef struct source {
    source_kind kind;
    connection *c;
    int fd;
} source;

struct connection {
    connection *next, **at; /* of its bucket's list */
    connection *next_ended;
    source socket, process; /* process.fd -1: it can't be watched */
    uint32_t pipe;
    ts_guest guest;
    holding *holding;
    char *refusal;   /* why it was turned away, to be told; NULL: it is in */
    uint32_t refs;   /* the table's, and one for each request in progress */
    uint32_t events; /* that epoll looks for */
    bool ended, paused, doomed;
    bool told_off;        /* why it was turned away */
    uint32_t requests;    /* in progress */
    uint64_t deadline_ms; /* of the greeting or message that has begun to come; 0: none has */
    uint64_t unread_ms;   /* since when the first unsent answer waits */
    unsent *first_unsent, **last_unsent;
    /* what has come of a greeting or a message */
    bool greeted;
    uint8_t head[TS_SP_HEAD_BYTES];
    uint32_t head_bytes;
    uint8_t *content;
    size_t content_bytes, content_came;
};

/* One request in progress. */
typedef struct slot {
    ts_request request; /* first: the service hands it back */
    ts_transport *transport;
    connection *c;
    size_t bytes; /* that it is charged with */
    uint8_t backtrace[TS_SP_BACKTRACE_BYTES];
    size_t backtrace_bytes;
} slot;

/* The service looks for connections without a session, on the engine's side. */
typedef struct tick {
    ts_work work;
    uint64_t idle_since_ms;
    atomic_bool out; /* the engine has it */
} tick;

struct ts_transport {
    ts_service *service;
    ts_transport_options options;
    char path[128];
    pthread_t thread;
    bool runs;
    source listener, wake;
    int epoll;
    bool accept_paused; /* until the next tick: there was no descriptor */
    uint32_t turn;      /* of looking for events */
    ts_hurry hurry;     /* the thread's, where the kernel doesn't refuse descriptors; else all 0 */
    bool refuses;       /* descriptors that peers pass */
    atomic_bool stopping;
    tick tick;

    pthread_mutex_t lock; /* of all that follows, and of the connections */
    ts_crowd crowd;
    holding *holdings;
    connection *buckets[BUCKETS];
    connection *ended; /* to be let go of by the thread */
    uint32_t next_pipe, turned_away;
};

/* ---- connections; under the lock ---- */

static holding *holding_of(ts_transport *t, uint32_t uid)
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

static void leave_holding(ts_transport *t, holding *h)
{
    if (--h->connections > 0)
        return;
    holding **at = &t->holdings;
    while (*at != h)
        at = &(*at)->next;
    *at = h->next;
    free(h);
}

static connection *find(ts_transport *t, uint32_t pipe)
{
    connection *c = t->buckets[pipe % BUCKETS];
    while (c != NULL && c->pipe != pipe)
        c = c->next;
    return c;
}

static void unref(ts_transport *t, connection *c)
{
    if (--c->refs > 0)
        return;
    leave_holding(t, c->holding);
    free(c);
}

/* Has epoll look for what the connection can do now. */
static void look_for(ts_transport *t, connection *c)
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

static void wake(const ts_transport *t)
{
    uint64_t one = 1;
    while (write(t->wake.fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* The connection is to end; the thread does it. */
static void doom(ts_transport *t, connection *c)
{
    if (c->doomed)
        return;
    c->doomed = true;
    c->next_ended = t->ended;
    t->ended = c;
    wake(t);
}

static void give_back_request_bytes(ts_transport *t, holding *h, size_t bytes)
{
    h->request_bytes -= bytes;
    if (bytes > 0 && h->paused > 0)
        wake(t);
}

/* Reads the connections again that waited for room. */
static void resume_paused(ts_transport *t)
{
    bool any = false;
    for (holding *h = t->holdings; h != NULL && !any; h = h->next)
        any = h->paused > 0;
    for (uint32_t i = 0; any && i < BUCKETS; i++)
        for (connection *c = t->buckets[i]; c != NULL; c = c->next)
            if (c->paused && c->holding->request_bytes < TS_UID_BYTES &&
                c->holding->queued < UID_QUEUED) {
                c->paused = false;
                c->holding->paused--;
                look_for(t, c);
            }
}

/* ---- answers; under the lock ---- */

/* Sends what waits, as far as the peer takes it. */
static void send_unsent(ts_transport *t, connection *c)
{
    for (unsent *u; (u = c->first_unsent) != NULL;) {
        ssize_t n =
            send(c->socket.fd, u->data + u->sent, u->bytes - u->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            if (errno != EAGAIN && errno != EWOULDBLOCK)
                doom(t, c);
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
static void send_answer(ts_transport *t, const slot *s, const void *reply, size_t bytes)
{
    connection *c = s->c;
    uint8_t head[TS_SP_HEAD_BYTES];
    struct iovec parts[3] = {
        {head, sizeof head}, {(void *)s->backtrace, s->backtrace_bytes}, {(void *)reply, bytes}};
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
        return doom(t, c);
    size_t sent = n < 0 ? 0 : (size_t)n;
    unsent *u = NULL;
    if (c->holding->answer_bytes + all <= TS_UID_BYTES || c->holding->answer_bytes == 0)
        u = malloc(sizeof *u + all);
    if (u == NULL) { /* a peer that reads asks again */
        ts_log(TS_LOG_WARNING, "a connection of uid %u is ended: it doesn't read its answers",
               c->guest.uid);
        return doom(t, c);
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
static void answer(slot *s, const void *reply, size_t bytes, bool last)
{
    ts_transport *t = s->transport;
    connection *c = s->c;
    if (s->request.message != NULL)
        tspb__request__free_unpacked(s->request.message, NULL);
    pthread_mutex_lock(&t->lock);
    if (bytes > 0 && !c->ended && !c->doomed && !atomic_load(&t->stopping))
        send_answer(t, s, reply, bytes);
    c->requests--;
    give_back_request_bytes(t, c->holding, s->bytes);
    c->told_off |= last;
    look_for(t, c);
    unref(t, c);
    pthread_mutex_unlock(&t->lock);
    free(s);
}

/* The `send` of a request: on the thread of the engine's owner. */
static void send_reply(ts_request *request, const void *reply, size_t bytes)
{
    slot *s = (slot *)request;
    ts_latency_add(&s->transport->service->message_times, ts_now_ns() - request->received_ns);
    answer(s, reply, bytes, false);
}

/* ---- requests ---- */

/*
 * What unpacking one message may take: some times its size. Messages of this protocol need less
 * than half of it; one made of unknown fields or of the smallest unpacked elements would need far
 * more.
 */
typedef struct budget {
    size_t left;
} budget;

#define BUDGET_FACTOR 8u
#define BUDGET_BASE 65536u

static void *budget_alloc(void *data, size_t bytes)
{
    budget *b = data;
    if (bytes > b->left)
        return NULL;
    b->left -= bytes;
    return malloc(bytes);
}

static void budget_free(void *data, void *memory)
{
    (void)data;
    free(memory);
}

static Tspb__Request *unpack(const uint8_t *message, size_t bytes)
{
    budget b = {.left = BUDGET_BASE + bytes * BUDGET_FACTOR};
    ProtobufCAllocator allocator = {
        .alloc = budget_alloc, .free = budget_free, .allocator_data = &b};
    return tspb__request__unpack(&allocator, bytes, message);
}

/* Answers the first request of a connection that was turned away. */
static void turn_away(slot *s)
{
    uint8_t packed[TS_MESSAGE_BYTES + 64];
    Tspb__Reply reply = TSPB__REPLY__INIT;
    reply.request_id = s->request.message == NULL ? 0 : s->request.message->request_id;
    reply.status = TS_EQUOTA;
    reply.message = s->c->refusal;
    answer(s, packed, tspb__reply__pack(&reply, packed), true);
}

/* The `run` of a request. Once the engine has begun it, it holds up nobody else. */
static void run_request(ts_work *work, void *service)
{
    slot *s = (slot *)work;
    ts_transport *t = s->transport;
    connection *c = s->c;
    work->run = ts_service_request; /* if it must wait it is run again */
    ts_service_request(work, service);
    pthread_mutex_lock(&t->lock);
    if (--c->holding->queued == UID_QUEUED / 2 && c->holding->paused > 0)
        wake(t);
    unref(t, c);
    pthread_mutex_unlock(&t->lock);
}

/* A whole message has come. False: it is no request, or there is no memory for it. */
static bool on_message(ts_transport *t, connection *c)
{
    slot *s = calloc(1, sizeof *s);
    size_t backtrace = ts_sp_backtrace(c->content, c->content_bytes);
    if (s == NULL || backtrace == 0) {
        free(s);
        return false;
    }
    s->transport = t;
    s->c = c;
    s->bytes = c->content_bytes;
    s->backtrace_bytes = backtrace;
    memcpy(s->backtrace, c->content, backtrace);
    s->request.work.run = run_request;
    s->request.send = send_reply;
    s->request.pipe = c->pipe;
    s->request.received_ns = ts_now_ns();
    /* freed by free_unpacked(..., NULL): it is all malloc'ed */
    s->request.message = unpack(c->content + backtrace, c->content_bytes - backtrace);
    free(c->content);
    c->content = NULL;
    c->content_bytes = 0; /* the charge is the slot's now */
    c->head_bytes = 0;
    if (c->refusal == NULL)
        c->deadline_ms = 0;
    pthread_mutex_lock(&t->lock);
    c->requests++;
    c->refs += c->refusal == NULL ? 2 : 1; /* one is run_request's */
    c->holding->queued += c->refusal == NULL;
    c->holding->given++;
    pthread_mutex_unlock(&t->lock);
    if (c->refusal != NULL)
        turn_away(s);
    else
        ts_queue_run(&t->service->exec.queue, &s->request.work, t->service);
    return true;
}

/* What reading came to. */
typedef enum progress { MORE, NOTHING_YET, OVER } progress;

/* Receives up to `bytes`; *came counts them. */
static progress receive(const ts_transport *t, connection *c, void *to, size_t bytes, size_t *came)
{
    ssize_t n;
    ts_hurry_begin(&t->hurry);
    do
        n = recv(c->socket.fd, to, bytes, MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    int error = errno;
    ts_hurry_end(&t->hurry);
    if (n <= 0)
        return n < 0 && (error == EAGAIN || error == EWOULDBLOCK) ? NOTHING_YET : OVER;
    *came = (size_t)n;
    return MORE;
}

/* Room for the content of a message whose head has come. NOTHING_YET: the uid has too much in
 * progress. */
static progress begin_content(ts_transport *t, connection *c)
{
    uint64_t bytes;
    if (!ts_sp_length(c->head, &bytes) || bytes < 4 ||
        bytes > t->options.message_bytes + TS_SP_BACKTRACE_BYTES)
        return OVER;
    pthread_mutex_lock(&t->lock);
    holding *h = c->holding;
    bool room = h->request_bytes == 0 || h->request_bytes + bytes <= TS_UID_BYTES;
    if (room) {
        h->request_bytes += bytes;
    } else {
        c->paused = true;
        h->paused++;
        c->deadline_ms = 0; /* it isn't the client that is slow */
    }
    pthread_mutex_unlock(&t->lock);
    if (!room)
        return NOTHING_YET;
    c->content = malloc(bytes);
    c->content_bytes = bytes;
    c->content_came = 0;
    return c->content == NULL ? OVER : MORE;
}

/* Reads on in what is coming: the greeting, a head, or a content. */
static progress read_on(ts_transport *t, connection *c)
{
    size_t came = 0;
    uint32_t head = c->greeted ? TS_SP_HEAD_BYTES : TS_SP_GREETING_BYTES;
    if (c->head_bytes < head) {
        progress p = receive(t, c, c->head + c->head_bytes, head - c->head_bytes, &came);
        if (p == MORE && c->deadline_ms == 0)
            c->deadline_ms = ts_now_ms() + t->options.idle_ms;
        c->head_bytes += (uint32_t)came;
        if (p != MORE || c->head_bytes < head)
            return p;
    }
    if (!c->greeted) {
        c->greeted = true;
        c->head_bytes = 0;
        if (c->refusal == NULL) /* else the first request must come in time too */
            c->deadline_ms = 0;
        return ts_sp_greets(c->head) ? MORE : OVER;
    }
    if (c->content == NULL)
        return begin_content(t, c);
    progress p =
        receive(t, c, c->content + c->content_came, c->content_bytes - c->content_came, &came);
    c->content_came += came;
    if (p != MORE || c->content_came < c->content_bytes)
        return p;
    return on_message(t, c) ? MORE : OVER;
}

/* Whether the uid has the turn; if it is for the engine to go on first, the connection is paused.
 */
static bool has_turn(const ts_transport *t, connection *c)
{
    holding *h = c->holding;
    if (h->turn != t->turn) {
        h->turn = t->turn;
        h->given = 0;
    }
    if (h->queued >= UID_QUEUED) {
        c->paused = true;
        h->paused++;
    }
    return !c->paused && h->given < MESSAGES_PER_TURN;
}

static bool may_read(ts_transport *t, connection *c)
{
    pthread_mutex_lock(&t->lock);
    bool may = !c->doomed && !c->paused && !c->told_off && c->requests < TS_PEER_REQUESTS &&
               c->first_unsent == NULL && has_turn(t, c);
    pthread_mutex_unlock(&t->lock);
    return may;
}

static void on_readable(ts_transport *t, connection *c)
{
    progress p = MORE;
    while (p == MORE && may_read(t, c))
        p = read_on(t, c);
    pthread_mutex_lock(&t->lock);
    if (p == OVER)
        doom(t, c);
    look_for(t, c);
    pthread_mutex_unlock(&t->lock);
}

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

static bool watch(ts_transport *t, source *source)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = source};
    return epoll_ctl(t->epoll, EPOLL_CTL_ADD, source->fd, &event) == 0;
}

/* Ends the connection: its descriptors, what has come of a message, what it has not read. */
static void end(ts_transport *t, connection *c)
{
    bool told = c->refusal == NULL;
    ts_hurry_begin(&t->hurry);
    close(c->socket.fd);
    ts_hurry_end(&t->hurry);
    if (c->process.fd >= 0)
        close(c->process.fd);
    pthread_mutex_lock(&t->lock);
    c->ended = true;
    if (c->paused)
        c->holding->paused--;
    give_back_request_bytes(t, c->holding, c->content_bytes);
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
    unref(t, c);
    pthread_mutex_unlock(&t->lock);
    if (told)
        ts_queue_put(&t->service->exec.queue, &end_event(pipe)->work);
}

/* Ends those that are to end. */
static void end_doomed(ts_transport *t)
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

/* Lets the connection in, or has it told why not. False: neither can be done. */
static bool enter(ts_transport *t, connection *c)
{
    char why[TS_MESSAGE_BYTES];
    bool ok = true;
    pthread_mutex_lock(&t->lock);
    c->holding = holding_of(t, c->guest.uid);
    if (c->holding == NULL) {
        ok = false;
    } else if (!ts_crowd_enter(&t->crowd, &c->guest, why, sizeof why)) {
        if (t->turned_away == TURNED_AWAY_MAX || (c->refusal = strdup(why)) == NULL) {
            leave_holding(t, c->holding);
            ok = false;
        } else {
            t->turned_away++;
        }
        ts_log(TS_LOG_WARNING, "a connection of uid %u was turned away: %s", c->guest.uid, why);
    }
    if (ok) {
        do
            c->pipe = ++t->next_pipe;
        while (c->pipe == 0 || find(t, c->pipe) != NULL);
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
static bool accept_one(ts_transport *t)
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
        doom(t, c);
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
    ts_service_drop_idle(service, t->idle_since_ms);
    atomic_store(&t->out, false);
}

/* Ends what has had its time. */
static void on_tick(ts_transport *t, uint64_t now_ms)
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
            if (unread || (c->deadline_ms != 0 && now_ms >= c->deadline_ms))
                doom(t, c);
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

static void on_event(ts_transport *t, const source *s, uint32_t events)
{
    connection *c = s->c;
    switch (s->kind) {
    case LISTENER:
        for (uint32_t i = 0; i < ACCEPTS_PER_TURN && accept_one(t); i++)
            ;
        return;
    case WAKE: {
        uint64_t times;
        while (read(s->fd, &times, sizeof times) < 0 && errno == EINTR)
            ;
        pthread_mutex_lock(&t->lock);
        resume_paused(t);
        pthread_mutex_unlock(&t->lock);
        return;
    }
    case PROCESS:
        pthread_mutex_lock(&t->lock);
        doom(t, c);
        pthread_mutex_unlock(&t->lock);
        return;
    case SOCKET:
        break;
    }
    pthread_mutex_lock(&t->lock);
    /* A peer that has gone reads nothing, and what it has sent is of no use to it. */
    if ((events & (EPOLLHUP | EPOLLERR)) != 0)
        doom(t, c);
    else if ((events & EPOLLOUT) != 0)
        send_unsent(t, c);
    look_for(t, c);
    bool doomed = c->doomed;
    pthread_mutex_unlock(&t->lock);
    if (!doomed && (events & EPOLLIN) != 0)
        on_readable(t, c);
}

static void *transport_main(void *arg)
{
    ts_transport *t = arg;
    struct epoll_event events[EVENTS];
    uint64_t next_tick = ts_now_ms() + TICK_MS;
    if (!t->refuses && !ts_hurry_init(&t->hurry))
        ts_log(TS_LOG_ERROR, "no timer for the daemon's socket: %s", strerror(errno));
    while (!atomic_load(&t->stopping)) {
        uint64_t now = ts_now_ms();
        if (now >= next_tick) {
            on_tick(t, now);
            next_tick = now + TICK_MS;
        }
        int n = epoll_wait(t->epoll, events, EVENTS, (int)(next_tick - now));
        t->turn++;
        for (int i = 0; i < n; i++)
            on_event(t, events[i].data.ptr, events[i].events);
        end_doomed(t); /* after the events of this turn, which may name them */
    }
    ts_hurry_fini(&t->hurry);
    return NULL;
}

/* ---- life ---- */

ts_status ts_transport_start(ts_service *service, const ts_transport_options *o, ts_transport **out,
                             char *why, size_t why_bytes)
{
    ts_transport *t = calloc(1, sizeof *t);
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
    ts_transport_free(t);
    *out = NULL;
    return TS_ENOMEM;
}

ts_status ts_transport_listen(ts_transport *t, char *why, size_t why_bytes)
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

void ts_transport_end(ts_transport *t, uint32_t pipe)
{
    pthread_mutex_lock(&t->lock);
    connection *c = find(t, pipe);
    if (c != NULL)
        doom(t, c);
    pthread_mutex_unlock(&t->lock);
}

void ts_transport_stop(ts_transport *t)
{
    if (t == NULL || !t->runs)
        return;
    atomic_store(&t->stopping, true);
    wake(t);
    pthread_join(t->thread, NULL);
    t->runs = false;
    (void)unlink(t->path);
    ts_queue_flush(&t->service->exec.queue); /* the tick that may be out is not touched any more */
}

void ts_transport_free(ts_transport *t)
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
