/*
 * The way to the processor's kernels: jobs (block copies, and attends of one step at one layer)
 * that are ready wait here, and one thread has them done.
 *
 * - Attends of like shape, whoever sent them, become one kernel call, unless that would be long.
 *   Each of them ends when its own sequences are done.
 * - A job that takes long is done bit by bit: after some milliseconds it makes way for others.
 * - Tenants have their turn one after another, and a tenant's sessions.
 * - A job that is dropped (nobody wants its results any more) ends at the next of its items.
 *
 * Thread: the engine's owner submits and drops. `done` is called on the executor's own thread, or
 * on that of ts_host_executor_try_run, and others of its launch may not be done then: it must
 * neither wait for the executor nor call ts_host_executor_try_run.
 */
#ifndef TS_HOST_EXECUTOR_H
#define TS_HOST_EXECUTOR_H

#include "attention.h"
#include "gpu.h"
#include "session_memory.h"

#include <stdatomic.h>

/* A step's plan on a GPU. */
typedef struct ts_job_plan {
    ts_gpu_plan *plan; /* until it is made: NULL, or an earlier step's that nothing uses any more */
    bool made;
} ts_job_plan;

typedef struct ts_job {
    struct ts_job *next;
    uint32_t tenant, session; /* indices: whose turn it is */
    bool dropped;             /* atomic; the job's sequences look at it, too */
    ts_attention_task *task;  /* the executor's: of an attend that has begun and takes long */
    uint32_t copied;          /* the executor's: copies made */
    ts_geometry geometry;
    unsigned char *base;
    /* copies: num_copies > 0 */
    ts_block_copy *copies;
    uint32_t num_copies;
    /* or one attend */
    ts_attention_seq *seqs;
    uint32_t num_seqs, heads;
    ts_dtype io_dtype;
    ts_attention_variant variant;
    ts_kernel kernel;  /* on a GPU */
    ts_job_plan *plan; /* on a GPU: the step's, which the first of its runs makes */
    /* on a GPU: the attend starts when run `run_number` was submitted and the one before it is
     * done; NULL: at once */
    ts_signals_page *signals;
    uint32_t run_number;
    uint64_t deadline_ms;       /* CLOCK_MONOTONIC: until then the worker must have submitted */
    bool late;                  /* it has not */
    ts_status status;           /* what came of it; of a refused run, from the start */
    char why[TS_GPU_WHY_BYTES]; /* ... unless TS_OK */
    void (*done)(struct ts_job *job);
} ts_job;

/* Whether the job, on a GPU, is a posted run that was refused: there is nothing to be done, but in
 * its turn. */
static inline bool ts_job_is_refused(const ts_job *job)
{
    return job->num_seqs == 0 && job->num_copies == 0;
}

typedef struct ts_host_executor ts_host_executor;

/* The executor uses `attention` from now on; the caller frees it after the executor. NULL if out of
 * memory or threads. */
ts_host_executor *ts_host_executor_new(ts_attention *attention);

/* Finishes what was submitted, then ends. */
void ts_host_executor_free(ts_host_executor *executor);

/* The job is the executor's until it calls done. */
void ts_host_executor_submit(ts_host_executor *executor, ts_job *job);

/* The results of a job that was submitted to the executor aren't wanted any more: `done` is called
 * soon, with TS_ECONN unless it was done already. Any thread. */
static inline void ts_job_drop(ts_job *job)
{
    __atomic_store_n(&job->dropped, true, __ATOMIC_RELAXED);
}

/* Multiplications that an attend takes, about. */
double ts_job_work(const ts_job *job);

/* Runs the jobs (linked by `next`, attends alone) here and now, alike ones together; their `done`
 * is called. False: other jobs are being run, and these are still the caller's. */
bool ts_host_executor_try_run(ts_host_executor *executor, ts_job *jobs);

/* Attends done or begun so far, and how many kernel calls they took. Any thread. */
void ts_host_executor_counts(const ts_host_executor *executor, uint64_t *runs, uint64_t *launches);

/* How often a long job has made way for others. Any thread. */
uint64_t ts_host_executor_pauses(const ts_host_executor *executor);

#endif
