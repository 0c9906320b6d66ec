/*
 * Inside the executor of a GPU: gpu_executor.c has the thread that decides what is launched when,
 * gpu_launches.c what a launch is made of, what it waits for and tells, and how runs are joined.
 *
 * Thread: the executor's, unless a function says otherwise.
 */
#ifndef TS_GPU_EXECUTOR_INTERNAL_H
#define TS_GPU_EXECUTOR_INTERNAL_H

#include "gpu_executor.h"
#include "held_runs.h"

#include <pthread.h>
#include <stdatomic.h>

/* A crowd: at least so many sessions have runs here. Fewer are faster queued ahead
 * (tests/results/h200.md). */
#define CROWD_SESSIONS 6u

#define JOIN_LAUNCHES 4u /* a ready run waits while these are under way */

/* Whom a launch of one job waits for: its worker, and the session's run before it. */
typedef enum ts_gpu_wait_for { FOR_NOBODY, FOR_WORKER, FOR_BOTH } ts_gpu_wait_for;

/* What came of trying to launch a job. */
typedef enum ts_gpu_tried {
    TRIED_GONE,    /* it is launched or over, and no longer the executor's thread's */
    TRIED_PLANNED, /* its plan is there */
    TRIED_FULL,    /* there is no launch to be had now */
    TRIED_EARLY,   /* it failed before its turn; its status says how */
} ts_gpu_tried;

/* The word that tells that a crowd's launch is over (gpu_executor.c: a crowd); NULL: none does. */
typedef struct ts_gpu_joined {
    const uint32_t *word;
    uint32_t number;
} ts_gpu_joined;

/* A launch under way: the jobs that it serves. */
typedef struct in_flight {
    struct in_flight *prev, *next;
    ts_gpu_executor *executor;
    ts_job *jobs;           /* NULL: they have been told */
    ts_signals_page *waits; /* for this session's worker; NULL: for nobody, or not any more */
} in_flight;

struct ts_gpu_executor {
    ts_gpu *gpu;
    uint32_t submit_ms;
    uint64_t join_ns;
    void (*failed)(const char *why);
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t event;
    ts_job *head, **tail; /* under the lock: what was submitted */
    in_flight *launched;  /* under the lock */
    uint32_t waiting;     /* under the lock: launches that wait for workers */
    uint32_t sessions;    /* under the lock: sessions of those */
    bool completed, stop; /* under the lock; the first: a launch, while `holds` */
    bool holds;           /* under the lock: jobs wait here, maybe for a launch to be over */
    atomic_bool lost;     /* written under the lock: the device failed; `why` stays then */
    char why[TS_GPU_WHY_BYTES + 128];
    ts_held_runs held; /* the thread's own: jobs that can't be launched yet */
    uint64_t round;    /* the thread's own: of trying to launch them */
    bool full;         /* the thread's own: in that round there was no launch for one */
    bool unseen;       /* the thread's own: nobody tells when a held run's worker submits */
    uint64_t gone_ns;  /* the thread's own: when it launched something last */
    bool ahead;        /* the thread's own: one of a crowd's runs may be launched ahead */
    ts_gpu_run *parts; /* the thread's own: of a launch */
    size_t capacity;
    uint64_t health_ms;            /* the thread's own: when it looks at the device next */
    uint64_t late_ms;              /* the thread's own: when it looked for late workers last */
    uint32_t active;               /* under the lock: sessions that have runs here */
    atomic_uint_fast64_t crowd_ns; /* until then there is a crowd */
    uint64_t ready_ns;             /* the thread's own: since when a run of a crowd's is ready */
    ts_gpu_joined joined[JOIN_LAUNCHES]; /* the thread's own: a crowd's last launches */
    atomic_uint_fast64_t runs, launches;
};

/* Whether the word, which only grows, has come to the value. Any thread. */
static inline bool ts_gpu_reached(const uint32_t *word, uint32_t value)
{
    return (int32_t)(__atomic_load_n(word, __ATOMIC_ACQUIRE) - value) >= 0;
}

/* Whether the job need not wait on the GPU. Any thread. */
static inline bool ts_gpu_is_ready(const ts_job *job)
{
    return job->signals == NULL ||
           (ts_gpu_reached(&job->signals->host->submitted, job->run_number) &&
            ts_gpu_reached(job->signals->done, job->run_number - 1));
}

/* The next daemon is to know that the job's run failed, or was late; of a refused one it does. Any
 * thread. */
void ts_gpu_note_late(const ts_job *job);

/* Counts a job of the session's that comes, or is over. Any thread. */
void ts_gpu_count_job(ts_gpu_executor *x, ts_signals_page *page, bool comes);

/* Tells that these jobs are over. Any thread. */
void ts_gpu_complete_jobs(ts_gpu_executor *x, ts_job *jobs, ts_status status, const char *why);

/* The device is lost: the owner is told once, and nothing is launched any more. Any thread. */
void ts_gpu_device_lost(ts_gpu_executor *x, const char *why);
bool ts_gpu_device_is_lost(const ts_gpu_executor *x);

/* Makes the job's plan, unless it is there. TRIED_PLANNED, TRIED_GONE (the job is over, and no
 * other), TRIED_EARLY (never of one that is ready). */
ts_gpu_tried ts_gpu_prepare_job(ts_gpu_executor *x, ts_job *job);

/* Appends to `first`, a list of one, the held jobs like it that are ready. */
void ts_gpu_join_jobs(ts_gpu_executor *x, ts_job *first);

/* Whether one more launch may wait for this job's worker, who is one of a crowd or isn't. */
bool ts_gpu_may_wait_for(ts_gpu_executor *x, const ts_job *job, bool crowd);

/* Whether a launch waits for this job's worker. */
bool ts_gpu_is_waited_for(ts_gpu_executor *x, const ts_job *job);

/* Launches the jobs as one. TRIED_GONE, TRIED_FULL, TRIED_EARLY. */
ts_gpu_tried ts_gpu_launch_jobs(ts_gpu_executor *x, ts_job *jobs, ts_gpu_wait_for wait);

/* The jobs' last one. */
static inline const ts_job *ts_gpu_last_job(const ts_job *jobs)
{
    while (jobs->next != NULL)
        jobs = jobs->next;
    return jobs;
}

#endif
