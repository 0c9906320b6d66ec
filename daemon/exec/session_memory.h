/*
 * Memory that a session and the daemon share: the exchange, where q, k, v and out lie, and the page
 * of signals that keeps the order on a GPU. Each lives until the connection and the last run that
 * uses it have let it go.
 *
 * Locking: none; the engine's owner of the moment (work_queue.h) owns them.
 */
#ifndef TS_SESSION_MEMORY_H
#define TS_SESSION_MEMORY_H

#include "done_words.h"
#include "filled_memory.h"
#include "gpu.h"
#include "signals.h"

typedef struct ts_exchange {
    uint64_t bytes;
    uint32_t users;       /* the connection, and each run in flight */
    int fd;               /* to hand out, of device memory; -1: none */
    int kept_fd;          /* of host memory that outlives the daemon; else -1 */
    unsigned char *host;  /* where the processor finds it; NULL: device memory */
    ts_gpu *gpu;          /* that can use it too; NULL: none */
    unsigned char *there; /* where that GPU finds it */
    ts_gpu_shared shared; /* the device memory */
} ts_exchange;

/* Host memory that the client has filled. TS_EINVAL or TS_ENOMEM with a sentence. */
ts_status ts_exchange_take(ts_filling *filling, ts_exchange **out, char *why, size_t why_bytes);

/* Host memory that an earlier daemon took, by its descriptor, which becomes the exchange's or is
 * closed. TS_EINVAL: its size isn't `bytes`, or pages are missing. TS_ENOMEM. */
ts_status ts_exchange_adopt(int fd, uint64_t bytes, ts_exchange **out, char *why, size_t why_bytes);

/* Memory of a device that an earlier daemon made; the rest as ts_exchange_adopt's. */
ts_status ts_exchange_adopt_device(ts_gpu *gpu, int fd, uint64_t bytes, uint64_t *held,
                                   ts_exchange **out, char *why, size_t why_bytes);

/* The descriptor by which the next daemon can have it; -1: there is none. */
int ts_exchange_descriptor(const ts_exchange *exchange);

/* Memory of the device, shared as the pool's memory is; *held counts it: see ts_gpu_shared_new. */
ts_status ts_exchange_device_new(ts_gpu *gpu, bool vmm, uint64_t bytes, uint64_t *held,
                                 ts_exchange **out, char *why, size_t why_bytes);

/* The session's own device memory: see ts_gpu_shared_import. */
ts_status ts_exchange_import(ts_gpu *gpu, const uint8_t *handle, uint64_t offset, uint64_t bytes,
                             ts_exchange **out, char *why, size_t why_bytes);

/* Makes sure that the device can use it. TS_EINVAL: it is another device's memory. */
ts_status ts_exchange_reach(ts_exchange *exchange, ts_gpu *gpu, char *why, size_t why_bytes);

/* One user less. NULL is fine. */
void ts_exchange_release(ts_exchange *exchange);

/* A session's runs that its GPU's executor holds (held_runs.h). */
typedef struct ts_held_queue {
    struct ts_job *first, *last;
    struct ts_held_queue *prev, *next; /* queues that hold something */
    uint64_t tried;                    /* the executor's: the last round in which it had to wait */
} ts_held_queue;

/* A session's signals, and the daemon's own count of what is completed, which no client can write.
 */
typedef struct ts_signals_page {
    uint32_t users;
    int fd;
    bool outlives; /* the daemon: the next one takes its words for what was done */
    ts_signals *host;
    ts_gpu *gpu;          /* NULL: not pinned yet */
    ts_signals *there;    /* where the GPU finds it */
    ts_done_words *words; /* of the GPU, of which `done` is one: the last run that is done */
    uint32_t *done, *done_there;
    uint32_t first_done;      /* what `done` begins with: an earlier daemon's last run */
    uint32_t last_number;     /* of the runs asked for; atomic: an executor that ends reads it */
    ts_gpu_position alone_at; /* the executor's: of run `alone_number`, if it had its own launch */
    uint32_t alone_number;
    uint32_t waiting; /* the executor's: launches that wait for the worker */
    uint32_t jobs;    /* the executor's: that it has of the session */
    uint32_t refused; /* posted runs that were refused and whose turn is yet to come */
    ts_held_queue held;
} ts_signals_page;

ts_status ts_signals_new(ts_signals_page **out, char *why, size_t why_bytes);

/* The page of an earlier daemon's session, by its descriptor, which becomes the page's or is
 * closed. `last_number` is that of the last run that was asked for. TS_EINVAL or TS_ENOMEM with a
 * sentence. */
ts_status ts_signals_adopt(int fd, uint32_t last_number, ts_signals_page **out, char *why,
                           size_t why_bytes);

/* Whether the run was over, or its worker was late with it, at an earlier daemon. */
bool ts_signals_had_completed(const ts_signals_page *page, uint32_t number);
bool ts_signals_had_late(const ts_signals_page *page, uint32_t number);

/* Whether the worker has posted the run of this number (proto/signals.h), which then is *run. */
bool ts_signals_posted(const ts_signals_page *page, uint32_t number, ts_posted_run *run);

/* How many of the runs that were asked for weren't over at an earlier daemon. */
uint32_t ts_signals_open_runs(const ts_signals_page *page);

/* None of the runs that were asked for will come: the worker's stream waits no longer. */
void ts_signals_give_up(ts_signals_page *page);

/* Lets the device, whose words these are, use the page. TS_EINVAL: another device does. TS_ENOMEM,
 * or what ts_gpu_pin returns. */
ts_status ts_signals_reach(ts_signals_page *page, ts_gpu *gpu, ts_done_words *words, char *why,
                           size_t why_bytes);

/* The session won't submit any more: what waits for it goes on. */
void ts_signals_release_waiters(ts_signals_page *page);

void ts_signals_release(ts_signals_page *page);

/* What one session shares with the daemon; all NULL until it is asked for. */
typedef struct ts_session_memory {
    struct ts_slab_holder *slabs; /* of GPU pools, that it may map (slab_holder.h) */
    ts_exchange *exchange;
    ts_signals_page *signals;
    struct ts_step_plan *plan;          /* of the step that ran on a GPU last (step_work.h) */
    ts_filling new_exchange, new_rings; /* that the client fills */
} ts_session_memory;

#endif
