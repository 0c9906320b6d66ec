/*
 * One client's connection, its session, and what the session has been given.
 *
 * Thread: the engine's owner of the moment (work_queue.h).
 */
#ifndef TS_CONNECTION_H
#define TS_CONNECTION_H

#include "handle_wire.h"
#include "reply_cache.h"
#include "session_memory.h"

/* Something that ends with a session: `close` is called once. */
typedef struct ts_close_hook {
    struct ts_close_hook *next;
    void (*close)(struct ts_close_hook *hook);
} ts_close_hook;

/* What waits of a connection (parked.h): a request, or an entry of its ring. */
typedef struct ts_parked {
    struct ts_parked *next, **at; /* among all that wait */
    struct ts_connection *connection;
    uint64_t deadline_ms;                    /* CLOCK_MONOTONIC; 0: it has never waited */
    uint64_t since_ms;                       /* that it has waited */
    size_t bytes;                            /* that are held meanwhile */
    void (*go_on)(struct ts_parked *parked); /* carries it out again */
    void (*drop)(struct ts_parked *parked);  /* nobody is there to be answered */
} ts_parked;

typedef struct ts_connection {
    struct ts_connection *next; /* in its bucket */
    uint32_t pipe, uid, gid, pid;
    uint64_t session; /* 0: none opened */
    uint64_t kicked;  /* the session that was ended though its worker lives; 0: none */
    bool kept_slabs;  /* ... for want of GPU memory that it was to give back, */
    bool freed_pages; /* ... or of pages of its exchange; else by an operator */
    uint8_t token[TS_TOKEN_BYTES];
    ts_session_memory memory;
    struct ts_ring *ring;  /* of the rings (ring_server.h), which closes by a hook; NULL: none */
    ts_close_hook *on_end; /* of the session */
    ts_parked *parked;     /* what waits; NULL: nothing does */
    uint64_t requests;
    uint64_t idle_since_ms; /* that it has no session; 0: it has one */
    ts_reply_cache replies;
} ts_connection;

#endif
