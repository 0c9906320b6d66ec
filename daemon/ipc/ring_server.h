/*
 * The daemon's side of the rings (proto/rings.h): a thread of its own looks after all of them. It
 * polls those that were used a moment ago, and sleeps on the doorbells of the others. What it finds
 * it hands to the engine's owner like any request; attends of the processor's that have come
 * together by then, or soon will have (ring_joins.h), it runs as one call, unless the executor's
 * thread is at work or they are long: then they join what waits there.
 *
 * A ring gives 8 entries a turn, and at most one of them a run: so a session waits for no more
 * than that from each other session, however much that has submitted.
 *
 * Thread: the engine's owner (work_queue.h), but for ts_rings_new, ts_rings_stop and ts_rings_free.
 */
#ifndef TS_RING_SERVER_H
#define TS_RING_SERVER_H

#include "ring_joins.h"
#include "rings.h"
#include "server.h"
#include "step_work.h"

#include <stdatomic.h>

typedef struct ts_rings ts_rings;

typedef struct ts_ring {
    ts_work work;     /* takes what was submitted */
    ts_work detached; /* the thread has it no more */
    ts_rings *rings;
    struct ts_ring *next, **at; /* among all */
    uint32_t pipe;
    uint32_t users; /* the connection, and each job that will complete an entry */
    int doorbell;
    ts_rings_memory *shared;
    size_t bytes;
    uint32_t max_blocks, max_slabs; /* that a begin's answer has room for, and where: */
    uint32_t max_ids;               /* of tokens, that a begin has room for */
    uint32_t *blocks;
    ts_ring_slab *slabs;
    atomic_uint taken;        /* submissions */
    uint32_t posted;          /* completions */
    ts_ring_completion begun; /* of a step whose copies are being made; step 0: none is */
    atomic_bool queued;       /* `work` is in the queue */
    bool taking;              /* an entry is being carried out; the engine's owner's */
    atomic_bool closed;  /* the connection has ended, or the client has written what can't be */
    atomic_bool blocked; /* the next entry waits: for runs that are under way, */
    bool parked;         /* ... or as parked.h has it; the engine's owner's, as is */
    ts_parked wait;
    bool polled;        /* the thread knows it */
    bool asleep;        /* the thread waits for the doorbell; the thread's own */
    uint64_t used_ns;   /* when there was something last; the thread's own */
    ts_close_hook hook; /* of the connection's session */
} ts_ring;

/* What the thread and the engine's owner share; ring_server.c's and ring_requests.c's own. */
struct ts_rings {
    ts_service *service;
    uint64_t spin_ns;
    pthread_t thread;
    int epoll, wake;
    ts_ring *all; /* the engine's owner's */
    uint32_t num_blocked;
    atomic_bool ended; /* no thread any more; set under the lock */
    uint64_t *seqs;    /* copies of what a begin or a commit brings; the engine's owner's */
    uint32_t *words;   /* ... */
    uint32_t *firsts;  /* what a begin is answered, as are these: the same owner's */
    uint32_t *tables;
    uint32_t *ids; /* of a begin's tokens, copied */
    pthread_mutex_t lock;
    ts_job *jobs, **jobs_tail; /* under the lock */
    atomic_uint num_jobs;      /* of them; changed under the lock */
    ts_ring_joins joins;       /* the thread's own, until it has ended */
    atomic_bool stop, sleeps, goes_first;
    ts_ring **active; /* rings that are polled; the thread's own */
    uint32_t num_active, active_capacity;
    bool waits_for_owner; /* likewise: entries lie in a ring that only the engine's owner takes */
};

/* Starts the thread, and joins the service: rings go on when runs have ended. spin_us: how long it
 * polls a ring after its last use. join_us: how long a run waits for others at most (ring_joins.h).
 * NULL: no memory, no thread. */
ts_rings *ts_rings_new(ts_service *service, uint32_t spin_us, uint32_t join_us);

/* Has the thread go first (thread_first.h). Thread: any. */
void ts_rings_go_first(ts_rings *rings);

/* Ends the thread; what is submitted after that stays untaken. NULL is fine. */
void ts_rings_stop(ts_rings *rings);

/* The connections are freed, and no job is under way. NULL is fine. */
void ts_rings_free(ts_rings *rings);

/* Tells every session why the daemon ends; before its connections do. The engine's owner. */
void ts_rings_device_failed(ts_rings *rings);

/* Makes the connection's ring, which ends with its session, of the memory that the client has
 * filled, in place of the ring that it has, if any. TS_EINVAL, TS_EPROTO or TS_ENOMEM with a
 * sentence. */
ts_status ts_ring_new(ts_rings *rings, ts_connection *connection, char *why, size_t why_bytes);

/* One user more, and one less; NULL is fine. */
ts_ring *ts_ring_use(ts_ring *ring);
void ts_ring_release(ts_ring *ring);

/* The `run` of a ring's work: takes up to 8 entries, a run being the last of them. */
void ts_ring_take(ts_work *work, void *service);

/* Takes all that was submitted by now, as far as nothing waits: what its client asks for by message
 * comes behind. */
void ts_ring_take_all(ts_ring *ring);

/* Has the thread look at the ring, as its doorbell does. */
void ts_ring_look(ts_ring *ring);

/* The ring is of no use any more: the thread sees it and lets it go. */
void ts_ring_end(ts_ring *ring);

/* A job of a ring's that is for the processor: run it soon. */
void ts_rings_submit(ts_rings *rings, ts_job *job);

#endif
