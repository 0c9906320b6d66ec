/*
 * What is done around the engine: looking up who asks, answering repeated requests from memory,
 * finding memory for slabs and exchanges, handing jobs to the kernels, packing replies. Everything
 * in a ts_service belongs to the engine's owner of the moment (queue.h); others put ts_work into
 * its queue.
 */
#ifndef TS_SERVICE_H
#define TS_SERVICE_H

#include "batch.h"
#include "engine.h"
#include "filled.h"
#include "gpu_batch.h"
#include "handle_wire.h"
#include "memory.h"
#include "operators.h"
#include "queue.h"
#include "replies.h"
#include "tinyserve.pb-c.h"

/* A request on its way. The transport owns it; `send` is called exactly once, by the engine's
 * owner. */
typedef struct ts_request {
    ts_work work;
    uint32_t pipe;
    uint64_t received_ns;   /* CLOCK_MONOTONIC */
    Tspb__Request *message; /* NULL: could not be unpacked */
    void (*send)(struct ts_request *request, const void *reply, size_t bytes);
    struct ts_request *next_waiter; /* for the same answer, or for a step's runs */
} ts_request;

#define TS_REQUEST_BUCKETS 17u

/* How long requests took to be answered (metrics.h); the last count is of those beyond all borders.
 */
typedef struct ts_request_times {
    uint64_t counts[TS_REQUEST_BUCKETS + 1], sum_ns;
} ts_request_times;

/* A connection came or went (both kinds are freed by the service). */
typedef struct ts_pipe_event {
    ts_work work;
    uint32_t pipe, uid, gid, pid;
} ts_pipe_event;

/* Asks for a descriptor; `done` is called by the engine's owner, and *fd is then the asker's. */
typedef struct ts_handle_ask {
    ts_work work;
    ts_handle_request request;
    uint32_t uid; /* of the peer on the handle socket */
    ts_handle_reply reply;
    int fd; /* -1: there is none */
    void (*done)(struct ts_handle_ask *ask);
} ts_handle_ask;

typedef struct ts_ring ts_ring;   /* ring.h */
typedef struct ts_rings ts_rings; /* the same */

typedef struct ts_step_plan ts_step_plan;     /* jobs.c */
typedef struct ts_service_job ts_service_job; /* the same */
typedef struct ts_refusals ts_refusals;       /* refusals.h */

typedef struct ts_connection {
    struct ts_connection *next; /* in its bucket */
    uint32_t pipe, uid, gid, pid;
    uint64_t session; /* 0: none opened */
    uint64_t kicked;  /* the session that an operator has ended; 0: none */
    uint8_t token[TS_TOKEN_BYTES];
    ts_exchange *exchange;
    ts_filling new_exchange, new_rings; /* that the client is to fill */
    ts_signals_page *signals;           /* NULL: never asked for */
    ts_ring *ring;                      /* the same */
    ts_step_plan *plan;                 /* of the step that ran on a GPU last; NULL: none has */
    uint64_t requests;
    uint64_t idle_since_ms; /* that it has no session; 0: it has one */
    ts_replies replies;
} ts_connection;

#define TS_CONNECTION_BUCKETS 4096u
#define TS_GPUS_MAX 16u

typedef struct ts_service_gpu {
    ts_gpu *gpu;
    ts_gpu_batch *batch;
} ts_service_gpu;

typedef struct ts_service {
    ts_queue queue;
    ts_engine *engine;
    ts_memory *memory[TS_POOLS_MAX];
    ts_attention *attention;
    ts_batch *batch;
    ts_rings *rings;
    ts_service_gpu gpus[TS_GPUS_MAX];
    uint32_t num_gpus;
    const ts_service_gpu *gpu_of[TS_POOLS_MAX]; /* by pool; NULL: in host memory */
    ts_step_plan **step_plans;                  /* by a step's index; NULL: none yet */
    uint32_t num_step_plans;
    ts_service_job *live_jobs; /* with the kernels */
    ts_reply_account *reply_accounts;
    struct ts_surveys *surveys; /* surveys.h */
    uint64_t check_after_ms;    /* the next check of the books may begin then */
    ts_work sweep;              /* goes on with what the engine frees bit by bit */
    bool sweeping;              /* it is in the queue */
    ts_request *waiting;        /* commits and aborts, for their step's runs */
    ts_connection *connections[TS_CONNECTION_BUCKETS]; /* by pipe */
    ts_connection **by_session;                        /* by a session's index */
    uint32_t message_bytes_max;
    uint32_t admin_uid;             /* beside root */
    ts_operators operators;         /* changed under the lock; its owner reads without */
    pthread_mutex_t operators_lock; /* for other threads that read */
    uint32_t submit_ms;             /* of GPUs' batches */
    void (*device_failed)(const char *why);
    void (*end_connection)(void *arg, uint32_t pipe); /* has the transport end it */
    void *end_connection_arg;
    bool draining;       /* only operators' sessions are opened */
    bool http_shows_all; /* and not totals alone */
    uint64_t started_ms, requests, refused;
    ts_refusals *refusals; /* NULL: there was none yet */
    double started_unix;   /* seconds */
    ts_request_times message_times, ring_times;
    uint32_t *slab_seen; /* stamps, for listing each slab of an answer once */
    uint32_t slab_stamp;
    Tspb__Slab *slabs;
    Tspb__Slab **slab_pointers;
    size_t slab_seen_capacity, slabs_capacity, slab_pointers_capacity;
    unsigned char *packed;
    size_t packed_capacity;
} ts_service;

/* Runs what is put into the queue until it is closed and empty. */
void ts_service_run(ts_service *service);

/* The `run` of the three kinds of work. */
void ts_service_request(ts_work *work, void *service);
void ts_service_pipe_added(ts_work *work, void *service);
void ts_service_pipe_removed(ts_work *work, void *service);
void ts_service_handle(ts_work *work, void *service);

/* Has the connections ended that have had no session since then. */
void ts_service_drop_idle(ts_service *service, uint64_t since_ms);

/* Whether it may order the daemon about (operators.h). Any thread. */
bool ts_service_is_operator(const ts_service *service, uint32_t uid, uint32_t gid);

/* Closes every session and gives back all that `service` holds but the queue. The batches must be
 * free. */
void ts_service_fini(ts_service *service);

/* Used by the files of the service. */

/* Ends the connection's session, if it has one, and what belongs to it. */
void ts_service_end_session(ts_service *service, ts_connection *connection);

/* Applies the command to the engine, and has what is freed bit by bit go on. */
void ts_service_tell(ts_service *service, const ts_command *command, ts_answer *answer);

/* Applies the command, finding memory for slabs until it has enough. TS_NEED_SWEEP: it must wait
 * for what is freed bit by bit, and be applied again when ts_service_resume is called. */
void ts_service_apply(ts_service *service, const ts_command *command, ts_answer *answer);

/* Takes what the client has filled (new_exchange) as the connection's exchange. */
ts_status ts_service_take_exchange(ts_service *service, ts_connection *c, uint64_t *bytes,
                                   char *why, size_t why_bytes);

/* Whether the command ends a step of its session whose runs are still under way, or would put one
 * more ordered run behind too many. An abort has the runs dropped. */
bool ts_service_must_wait(ts_service *service, const ts_command *command);

/* Lists the slabs of `count` blocks, each once; the list is the service's. False: out of memory. */
bool ts_service_list_slabs(ts_service *service, uint32_t pool, const uint32_t *blocks, size_t count,
                           Tspb__Slab ***list, size_t *num);

/* Packs the reply into service->packed; false: out of memory. */
bool ts_service_pack(ts_service *service, const Tspb__Reply *reply, size_t *size);

/* Sends the packed reply, keeps it for repeats and sends it to those that came already. c NULL: the
 * connection is gone. */
void ts_service_deliver(ts_connection *c, ts_request *request, uint64_t id, const void *bytes,
                        size_t size);

/* Goes on with the requests that waited for runs; those whose runs aren't done wait on. */
void ts_service_resume(ts_service *service);

ts_connection *ts_service_connection(const ts_service *service, uint32_t pipe);
ts_connection *ts_service_connection_of(const ts_service *service, uint64_t session);

#endif
