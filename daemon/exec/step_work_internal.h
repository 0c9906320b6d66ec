/*
 * Inside a step's work: step_work.c has what is handed to the kernels and what comes of it,
 * stream_runs.c the runs on streams that go another way.
 *
 * Thread: the engine's owner of the moment (work_queue.h).
 */
#ifndef TS_STEP_WORK_INTERNAL_H
#define TS_STEP_WORK_INTERNAL_H

#include "step_work.h"

/* A job of a step, who waits for it, and what to tell the engine afterwards. */
typedef struct ts_step_job {
    ts_job job;
    ts_work work;
    ts_exec *exec;
    const ts_exec_gpu *gpu; /* NULL: the processor's kernels */
    ts_completion completion;
    uint64_t step;  /* 0: of a refused run, which the engine knows */
    uint32_t layer; /* TS_NONE: a begin's copies */
    ts_exchange *exchange;
    struct ts_step_plan *plan;                /* on a GPU, of a run */
    struct ts_step_job *next_live, **at_live; /* of those that are with the kernels */
} ts_step_job;

static inline bool ts_step_job_is_refused(const ts_step_job *j)
{
    return j->step == 0;
}

/* A job for a run of the step's; NULL: out of memory. */
ts_step_job *ts_step_job_of_run(ts_exec *exec, ts_session_memory *memory,
                                const ts_completion *completion, const ts_layer_run *run,
                                const ts_step *step);

/* A job in place of the session's run of this number, of the page's GPU, that does nothing but to
 * come in its turn; NULL: out of memory. */
ts_step_job *ts_step_job_in_turn(ts_exec *exec, ts_signals_page *page, uint64_t session,
                                 uint32_t number, ts_status status);

/* Hands the job to the kernels, which complete it. */
void ts_step_job_submit(ts_exec *exec, ts_step_job *job);

/* Gives up a job that wasn't submitted, or is over, and what it uses. */
void ts_step_job_free(ts_step_job *job);

/* Lets the GPU use what a run of the session's needs of its memory. */
ts_status ts_step_work_reach(const ts_exec_gpu *gpu, const ts_session_memory *memory,
                             bool on_stream, char *why, size_t why_bytes);

#endif
