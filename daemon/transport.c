#include "transport.h"

#include "clock.h"
#include "log.h"
#include "metrics.h"
#include "watch.h"

#include <nng/nng.h>
#include <nng/protocol/reqrep0/rep.h>
#include <nng/protocol/reqrep0/req.h>
#include <nng/supplemental/util/platform.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SELF_TEST_SECONDS 1

typedef enum phase { RECEIVING, ANSWERING, SENDING } phase;

/* One of the requests that may be in progress at a time. */
typedef struct slot {
    ts_request request; /* first: the service hands it back */
    ts_transport *transport;
    nng_ctx ctx;
    nng_aio *aio;
    phase phase;
} slot;

struct ts_transport {
    ts_service *service;
    char url[128];
    uint32_t mode;
    nng_socket socket;
    ts_watch *watch; /* of the processes at the other ends */
    atomic_bool stopping;
    sem_t self_seen; /* a connection from this process came through */
    slot *slots;
    uint32_t num_slots;
};

static void receive(slot *s)
{
    if (atomic_load(&s->transport->stopping))
        return;
    s->phase = RECEIVING;
    nng_ctx_recv(s->ctx, s->aio);
}

static void send_reply(ts_request *request, const void *reply, size_t bytes)
{
    slot *s = (slot *)request;
    nng_msg *message = NULL;
    ts_metrics_answered(&s->transport->service->message_times, ts_now_ns() - request->received_ns);
    if (request->message != NULL)
        tspb__request__free_unpacked(request->message, NULL);
    request->message = NULL;
    /* Nothing to say (the peer is gone, or there is no memory): receive the next; NNG forgets this.
     */
    if (bytes == 0 || atomic_load(&s->transport->stopping) || nng_msg_alloc(&message, bytes) != 0)
        return receive(s);
    memcpy(nng_msg_body(message), reply, bytes);
    s->phase = SENDING;
    nng_aio_set_msg(s->aio, message);
    nng_ctx_send(s->ctx, s->aio);
}

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

static Tspb__Request *unpack(nng_msg *message)
{
    size_t bytes = nng_msg_len(message);
    budget b = {.left = BUDGET_BASE + bytes * BUDGET_FACTOR};
    ProtobufCAllocator allocator = {
        .alloc = budget_alloc, .free = budget_free, .allocator_data = &b};
    return tspb__request__unpack(&allocator, bytes, nng_msg_body(message));
}

static void slot_event(void *arg)
{
    slot *s = arg;
    int error = nng_aio_result(s->aio);
    if (s->phase == SENDING) {
        if (error != 0)
            nng_msg_free(nng_aio_get_msg(s->aio));
        if (error == NNG_ECLOSED || error == NNG_ECANCELED)
            return;
        return receive(s);
    }
    if (error != 0) {
        if (error == NNG_ECLOSED || error == NNG_ECANCELED)
            return; /* stopping */
        ts_log(TS_LOG_WARNING, "receiving failed: %s", nng_strerror(error));
        return receive(s);
    }
    nng_msg *message = nng_aio_get_msg(s->aio);
    s->request.received_ns = ts_now_ns();
    s->request.pipe = (uint32_t)nng_pipe_id(nng_msg_get_pipe(message));
    s->request.message =
        unpack(message); /* freed by free_unpacked(..., NULL): it is all malloc'ed */
    nng_msg_free(message);
    s->phase = ANSWERING;
    ts_queue_run(&s->transport->service->queue, &s->request.work, s->transport->service);
}

/* Memory to tell of a connection's end, however long it takes: without it its session would stay.
 */
static ts_pipe_event *end_event(uint32_t pipe)
{
    ts_pipe_event *event;
    while ((event = calloc(1, sizeof *event)) == NULL)
        nng_msleep(1);
    event->pipe = pipe;
    event->work.run = ts_service_pipe_removed;
    return event;
}

/*
 * A process died: for the service its connection has ended, even if a child of it holds the socket.
 * NNG finds out by itself; closing its pipe from here can stall NNG 1.5's reaper for good.
 */
static void process_ended(void *arg, uint32_t pipe)
{
    ts_transport *t = arg;
    ts_queue_put(&t->service->queue, &end_event(pipe)->work);
}

static void pipe_event(nng_pipe pipe, nng_pipe_ev kind, void *arg)
{
    ts_transport *t = arg;
    uint32_t id = (uint32_t)nng_pipe_id(pipe);
    if (kind == NNG_PIPE_EV_REM_POST) {
        ts_watch_remove(t->watch, id);
        ts_queue_put(&t->service->queue, &end_event(id)->work);
        return;
    }
    uint64_t uid, gid, pid = 0;
    ts_pipe_event *event = NULL;
    (void)nng_pipe_get_uint64(pipe, NNG_OPT_IPC_PEER_PID, &pid);
    if (pid == (uint64_t)getpid()) { /* ts_transport_revive has seen enough */
        sem_post(&t->self_seen);
        nng_pipe_close(pipe);
        return;
    }
    if (nng_pipe_get_uint64(pipe, NNG_OPT_IPC_PEER_UID, &uid) != 0 ||
        nng_pipe_get_uint64(pipe, NNG_OPT_IPC_PEER_GID, &gid) != 0 ||
        (event = calloc(1, sizeof *event)) == NULL) {
        ts_log(TS_LOG_WARNING, "a connection was turned away: no memory, or its peer has no uid");
        nng_pipe_close(pipe);
        return;
    }
    event->work.run = ts_service_pipe_added;
    event->pipe = id;
    event->uid = (uint32_t)uid;
    event->gid = (uint32_t)gid;
    event->pid = (uint32_t)pid;
    ts_queue_put(&t->service->queue, &event->work);
    ts_watch_add(t->watch, id, (uint32_t)pid);
}

/* A listener more; those that were there keep their connections. */
static int listen_more(ts_transport *t)
{
    nng_listener listener;
    int error = nng_listener_create(&listener, t->socket, t->url);
    if (error == 0)
        error = nng_listener_set_int(listener, NNG_OPT_IPC_PERMISSIONS, (int)t->mode);
    if (error == 0)
        error = nng_listener_start(listener, 0);
    return error;
}

bool ts_transport_revive(ts_transport *t)
{
    nng_socket self;
    struct timespec until;
    while (sem_trywait(&t->self_seen) == 0) /* of earlier tests that came late */
        ;
    if (nng_req0_open(&self) != 0)
        return false;
    bool seen = nng_dial(self, t->url, NULL, 0) == 0;
    if (seen) {
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += SELF_TEST_SECONDS;
        seen = sem_timedwait(&t->self_seen, &until) == 0;
    }
    nng_close(self);
    if (seen)
        return false;
    /* The deaf listener must stay, for closing it would end its connections; its name is taken
     * over. */
    (void)unlink(t->url + strlen("ipc://"));
    int error = listen_more(t);
    if (error == 0)
        ts_log(TS_LOG_WARNING, "NNG's listener had stopped accepting; the daemon listens anew");
    else
        ts_log(TS_LOG_ERROR, "NNG's listener had stopped accepting; listening anew failed: %s",
               nng_strerror(error));
    return error == 0;
}

ts_status ts_transport_start(ts_service *service, const char *url, uint32_t mode, uint32_t contexts,
                             size_t message_bytes, ts_transport **out, char *why, size_t why_bytes)
{
    ts_transport *t = calloc(1, sizeof *t);
    *out = t;
    if (t != NULL)
        t->slots = calloc(contexts, sizeof *t->slots);
    if (t == NULL || t->slots == NULL) {
        free(t);
        *out = NULL;
        snprintf(why, why_bytes, "no memory for %u contexts", contexts);
        return TS_ENOMEM;
    }
    t->service = service;
    t->mode = mode;
    snprintf(t->url, sizeof t->url, "%s", url);
    sem_init(&t->self_seen, 0, 0);
    t->watch = ts_watch_new(process_ended, t);
    int error = t->watch == NULL ? NNG_ENOMEM : nng_rep0_open(&t->socket);
    if (error == 0)
        error = nng_socket_set_size(t->socket, NNG_OPT_RECVMAXSZ, message_bytes);
    if (error == 0)
        error = nng_pipe_notify(t->socket, NNG_PIPE_EV_ADD_PRE, pipe_event, t);
    if (error == 0)
        error = nng_pipe_notify(t->socket, NNG_PIPE_EV_REM_POST, pipe_event, t);
    for (uint32_t i = 0; i < contexts && error == 0; i++) {
        slot *s = &t->slots[i];
        s->transport = t;
        s->request.work.run = ts_service_request;
        s->request.send = send_reply;
        error = nng_ctx_open(&s->ctx, t->socket);
        if (error == 0)
            error = nng_aio_alloc(&s->aio, slot_event, s);
        t->num_slots += error == 0;
    }
    if (error == 0)
        return TS_OK;
    snprintf(why, why_bytes, "making a socket for %s failed: %s", url, nng_strerror(error));
    return TS_ECONN;
}

ts_status ts_transport_listen(ts_transport *t, char *why, size_t why_bytes)
{
    int error = listen_more(t);
    if (error != 0) {
        snprintf(why, why_bytes, "listening at %s failed: %s", t->url, nng_strerror(error));
        return TS_ECONN;
    }
    for (uint32_t i = 0; i < t->num_slots; i++)
        receive(&t->slots[i]);
    return TS_OK;
}

void ts_transport_stop(ts_transport *t)
{
    if (t == NULL)
        return;
    atomic_store(&t->stopping, true);
    for (uint32_t i = 0; i < t->num_slots; i++)
        nng_aio_stop(t->slots[i].aio);
}

void ts_transport_free(ts_transport *t)
{
    if (t == NULL)
        return;
    nng_pipe_notify(t->socket, NNG_PIPE_EV_ADD_PRE, NULL, NULL);
    nng_pipe_notify(t->socket, NNG_PIPE_EV_REM_POST, NULL, NULL);
    ts_watch_free(t->watch);
    nng_close(t->socket);
    for (uint32_t i = 0; i < t->num_slots; i++) {
        if (t->slots[i].request.message != NULL)
            tspb__request__free_unpacked(t->slots[i].request.message, NULL);
        nng_aio_free(t->slots[i].aio);
    }
    sem_destroy(&t->self_seen);
    free(t->slots);
    free(t);
}
