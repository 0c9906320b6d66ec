/*
 * Inside the server of NNG's protocol: nng_server.c has its thread, and who comes and goes;
 * nng_messages.c what comes of messages; nng_peers.c what connections and users hold, and answers.
 *
 * Thread: the server's own; what says "under the lock" any.
 */
#ifndef TS_NNG_SERVER_INTERNAL_H
#define TS_NNG_SERVER_INTERNAL_H

#include "nng_server.h"
#include "passed_fds.h"
#include "peer_limits.h"
#include "request.h"
#include "sp_wire.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/uio.h>

#define BUCKETS 4096u
#define UID_QUEUED 4u /* requests of one uid that the engine has yet to begin */

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
    uint64_t held_ms;     /* when it was last left unread for its user's other messages */
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
    ts_nng_server *server;
    connection *c;
    uint8_t backtrace[TS_SP_BACKTRACE_BYTES];
    size_t backtrace_bytes;
} slot;

/* The service looks for connections without a session, on the engine's side. */
typedef struct tick {
    ts_work work;
    uint64_t idle_since_ms;
    atomic_bool out; /* the engine has it */
} tick;

struct ts_nng_server {
    ts_service *service;
    ts_nng_server_options options;
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

holding *ts_nng_holding_of(ts_nng_server *t, uint32_t uid);

void ts_nng_leave_holding(ts_nng_server *t, holding *h);

connection *ts_nng_find(ts_nng_server *t, uint32_t pipe);

void ts_nng_unref(ts_nng_server *t, connection *c);

/* Has epoll look for what the connection can do now. */
void ts_nng_look_for(ts_nng_server *t, connection *c);

void ts_nng_wake(const ts_nng_server *t);

/* Has the thread end the connection. */
void ts_nng_doom(ts_nng_server *t, connection *c);

void ts_nng_give_back_request_bytes(ts_nng_server *t, holding *h, size_t bytes);

/* Reads the connections again that waited for room. */
void ts_nng_resume_paused(ts_nng_server *t);

/* Sends what waits, as far as the peer takes it. */
void ts_nng_send_unsent(ts_nng_server *t, connection *c);

/* Answers the request (no bytes: not at all), and lets go of it. Nothing more is read if it is the
 * last one: the peer ends the connection when it has read this, or its time ends it. */
void ts_nng_answer(slot *s, const void *reply, size_t bytes, bool last);

/* The `send` of a request: on the thread of the engine's owner. */
void ts_nng_send_reply(ts_request *request, const void *reply, size_t bytes);

void ts_nng_on_readable(ts_nng_server *t, connection *c);

#endif
