/*
 * Around the engine: connections with their sessions, and what all requests share. request.h has
 * what a request does.
 *
 * Everything in a ts_service belongs to the engine's owner of the moment (work_queue.h); others put
 * ts_work into its queue.
 */
#ifndef TS_SERVER_H
#define TS_SERVER_H

#include "connection.h"
#include "engine.h"
#include "exec.h"
#include "gpu_executor.h"
#include "handle_wire.h"
#include "latency.h"
#include "log.h"
#include "operators.h"
#include "slab_list.h"
#include "tinyserve.pb-c.h"
#include "work_queue.h"

/* A request on its way. The transport owns it; `send` is called exactly once, by the engine's
 * owner. */
typedef struct ts_request {
    ts_work work;
    uint32_t pipe;
    uint64_t received_ns;       /* CLOCK_MONOTONIC */
    Tspb__Request *message;     /* NULL: could not be unpacked */
    struct ts_service *service; /* request.c's own, as what follows `send` */
    void (*send)(struct ts_request *request, const void *reply, size_t bytes);
    struct ts_request *next_waiter; /* for the same answer, or for a step's runs */
    unsigned char *held; /* the answer, packed, until the kernels are done; NULL: it is empty */
    size_t held_bytes;
    ts_parked wait; /* its bytes are the message's, and set by the transport */
} ts_request;

/* A connection came or went (both kinds are freed by the service). */
typedef struct ts_pipe_event {
    ts_work work;
    uint32_t pipe, uid, gid, pid;
} ts_pipe_event;

typedef struct ts_refusals ts_refusals; /* refusals.h */

/* What this daemon took over, beside ts_books_start. */
typedef struct ts_taken_over {
    uint64_t began_ns, sequences;
    double seconds; /* until books, pools and sessions were there */
    /* How the last daemon ended, if the holder says so: "signal 9"; "signal 9, then status 2": the
     * last one that served, and the last of those that followed and didn't. */
    char cause[48];
} ts_taken_over;

#define TS_CONNECTION_BUCKETS 4096u
#define TS_RETURN_MS 10000u
#define TS_QUARANTINE_MS 1000u /* under MPS a process's work can outlive it */

typedef struct ts_service {
    ts_exec exec;
    ts_reply_account *reply_accounts;
    struct ts_pool_stats_cache *pool_stats; /* pool_stats_cache.h */
    uint64_t check_after_ms;                /* the next check of the books may begin then */
    ts_request *waiting;                    /* for their step's runs, or for more sweeping */
    ts_parked *parked;                      /* what waits (parked.h) */
    ts_work alarm;                          /* for their first deadline, ... */
    uint64_t look_ms; /* ... or to look at claims and quarantines; 0: there are none */
    void (*look_for_absent)(struct ts_service *service, bool last); /* NULL: none were taken over */
    struct ts_absent *absent;          /* sessions whose clients have yet to come back (resume.h) */
    struct ts_quarantine *quarantines; /* sessions whose processes may still write */
    uint32_t quarantine_ms;            /* ... for how long after the process has ended */
    uint32_t return_ms; /* a session that owes slabs and returns none for this long is ended */
    ts_connection *connections[TS_CONNECTION_BUCKETS]; /* by pipe */
    ts_connection **by_session;                        /* by a session's index */
    uint64_t message_bytes;                            /* of a request, at most */
    uint32_t admin_uid;                                /* beside root */
    ts_operators operators;                  /* changed under the lock; its owner reads without */
    pthread_mutex_t operators_lock;          /* for other threads that read */
    void (*resume_rings)(void *rings);       /* has them go on with what waited for runs */
    void (*take_ring)(struct ts_ring *ring); /* takes what was submitted by now */
    void *rings;
    /* Has the transport end the connection; for being idle, unless its messages wait there. */
    void (*end_connection)(void *arg, uint32_t pipe, bool idle);
    void *end_connection_arg;
    bool ending;         /* nothing is asked of the engine or the kernels any more */
    bool http_shows_all; /* and not totals alone */
    uint64_t started_ms, requests, refused;
    ts_refusals *refusals;  /* NULL: there was none yet */
    double started_unix;    /* seconds */
    ts_books_start started; /* what it took over */
    ts_taken_over taken_over;
    void (*restart)(void); /* has the process end, to be started again */
    ts_work restarting;    /* admin.c's own */
    uint8_t epoch[TS_EPOCH_BYTES];
    ts_latency message_times, ring_times;
    ts_slab_list slab_list;
    unsigned char *packed;
    size_t packed_capacity;
} ts_service;

/* From now on each request is refused, so no job is begun. Waits until that holds. Thread: any but
 * the engine's owner. */
void ts_service_stop(ts_service *service);

/* Runs what is put into the queue until it is closed and empty. */
void ts_service_run(ts_service *service);

/* The `run` of a ts_pipe_event. */
void ts_service_pipe_added(ts_work *work, void *service);
void ts_service_pipe_removed(ts_work *work, void *service);

/* The exec's `slab_goes`: tells sessions that may map the slab to unmap it. */
void ts_service_slab_goes(void *service, uint32_t pool, uint32_t slab);

/* Called now and then: ends sequences whose time is over, sessions that keep GPU memory that is
 * others', and connections that have had no session since idle_since_ms. */
void ts_service_tick(ts_service *service, uint64_t idle_since_ms);

/* Whether the user is an operator (operators.h). Any thread. */
bool ts_service_is_operator(const ts_service *service, uint32_t uid, uint32_t gid);

/* Closes every connection with its session. */
void ts_service_close_connections(ts_service *service);

/* Gives back all that `service` holds but the queue. The connections are closed, the executors
 * freed. */
void ts_service_fini(ts_service *service);

/* Carries out again what waits of the connection (parked.h), as if its time were over if it is
 * late. False: nothing waits. */
bool ts_service_go_on(ts_service *service, ts_connection *connection, bool is_late);

/* Sets the alarm to the first deadline of what waits, or sooner while there are claims or
 * quarantines to look at. */
void ts_service_set_alarm(ts_service *service);

/* Ends quarantines whose time is over. */
void ts_service_end_quarantines(ts_service *service, uint64_t now_ms);

/* Ends the connection's session, if it has one, and what belongs to it. `by`, here and below: the
 * operator who orders it; NULL: none does. */
void ts_service_end_session(ts_service *service, ts_connection *connection, const ts_caller *by);

/* Gives up what a session shares with the daemon. What waits on a GPU for its worker goes on. */
void ts_service_free_memory(ts_session_memory *memory);

/* Closes the engine's session, which has no connection (any more), of this process. */
void ts_service_close_session(ts_service *service, uint64_t session, uint32_t pid,
                              const ts_caller *by);

/* The session closes, and its process's kernels may still write: waits for them anew. */
void ts_service_quarantine_again(ts_service *service, uint64_t session, uint32_t pid);

/* The level at which a session's coming and going is logged: an operator's look is no event. */
ts_log_level ts_service_session_level(const ts_service *service, const ts_connection *c);

ts_connection *ts_service_connection(const ts_service *service, uint32_t pipe);
ts_connection *ts_service_connection_of(const ts_service *service, uint64_t session);

#endif
