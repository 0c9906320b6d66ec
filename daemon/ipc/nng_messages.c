/* Messages: read piece by piece, unpacked within a budget, handed to the engine's queue. */
#define _GNU_SOURCE
#include "nng_server_internal.h"

#include "clock.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define MESSAGES_PER_TURN 4u /* that a uid gives before the others have their turn */

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
    ts_nng_answer(s, packed, tspb__reply__pack(&reply, packed), true);
}

/* The `run` of a request. Once the engine has begun it, it holds up nobody else. */
static void run_request(ts_work *work, void *service)
{
    slot *s = (slot *)work;
    ts_nng_server *t = s->server;
    connection *c = s->c;
    work->run = ts_service_request; /* if it must wait it is run again */
    ts_service_request(work, service);
    pthread_mutex_lock(&t->lock);
    if (--c->holding->queued == UID_QUEUED / 2 && c->holding->paused > 0)
        ts_nng_wake(t);
    ts_nng_unref(t, c);
    pthread_mutex_unlock(&t->lock);
}

/* A whole message has come. False: it is no request, or there is no memory for it. */
static bool on_message(ts_nng_server *t, connection *c)
{
    slot *s = calloc(1, sizeof *s);
    size_t backtrace = ts_sp_backtrace(c->content, c->content_bytes);
    if (s == NULL || backtrace == 0) {
        free(s);
        return false;
    }
    s->server = t;
    s->c = c;
    s->request.wait.bytes = c->content_bytes;
    s->backtrace_bytes = backtrace;
    memcpy(s->backtrace, c->content, backtrace);
    s->request.work.run = run_request;
    s->request.send = ts_nng_send_reply;
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
static progress receive(const ts_nng_server *t, connection *c, void *to, size_t bytes, size_t *came)
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
static progress begin_content(ts_nng_server *t, connection *c)
{
    uint64_t bytes;
    if (!ts_sp_length(c->head, &bytes) || bytes < 4)
        return OVER;
    if (bytes > t->options.message_bytes + TS_SP_BACKTRACE_BYTES) {
        ts_log(TS_LOG_WARNING,
               "a connection of uid %u, pid %u is ended: a message of %llu bytes; message_max is "
               "%zu",
               c->guest.uid, c->guest.pid, (unsigned long long)bytes, t->options.message_bytes);
        return OVER;
    }
    pthread_mutex_lock(&t->lock);
    holding *h = c->holding;
    bool room = h->request_bytes == 0 || h->request_bytes + bytes <= TS_UID_BYTES;
    if (room) {
        h->request_bytes += bytes;
    } else {
        c->paused = true; /* and has its time anew when it is read on: is_held */
        h->paused++;
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
static progress read_on(ts_nng_server *t, connection *c)
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
static bool has_turn(const ts_nng_server *t, connection *c)
{
    holding *h = c->holding;
    if (h->turn != t->turn) {
        h->turn = t->turn;
        h->given = 0;
    }
    if (h->queued >= UID_QUEUED) {
        c->paused = true;
        c->held_ms = ts_now_ms();
        h->paused++;
    }
    return !c->paused && h->given < MESSAGES_PER_TURN;
}

static bool may_read(ts_nng_server *t, connection *c)
{
    pthread_mutex_lock(&t->lock);
    bool may = !c->doomed && !c->paused && !c->told_off && c->requests < TS_PEER_REQUESTS &&
               c->first_unsent == NULL && has_turn(t, c);
    pthread_mutex_unlock(&t->lock);
    return may;
}

void ts_nng_on_readable(ts_nng_server *t, connection *c)
{
    progress p = MORE;
    while (p == MORE && may_read(t, c))
        p = read_on(t, c);
    pthread_mutex_lock(&t->lock);
    if (p == OVER)
        ts_nng_doom(t, c);
    ts_nng_look_for(t, c);
    pthread_mutex_unlock(&t->lock);
}
