/*
 * A step's work for the kernels: what is handed to the executors, and what is told to the engine
 * and to the caller when it is done.
 *
 * Thread: the engine's owner of the moment (work_queue.h).
 */
#ifndef TS_STEP_WORK_H
#define TS_STEP_WORK_H

#include "exec.h"
#include "session_memory.h"

/* What came of a run, or of a begin's copies. */
typedef struct ts_step_result {
    uint64_t step;
    bool run; /* else the copies of a begin */
    ts_status status;
    const char *why; /* unless TS_OK; the callee's for the call */
} ts_step_result;

/* Who waits for it. */
typedef struct ts_completion {
    /* Called once, when the work is done; NULL: nobody waits. */
    void (*done)(const struct ts_completion *completion, const ts_step_result *result);
    /* Takes a job for the processor's kernels, and has it run soon; NULL: the executor's thread. */
    void (*submit)(const struct ts_completion *completion, ts_job *job);
    void *context;
    uint64_t taken_ns; /* the caller's own, as are `context` and `tag` */
    uint32_t tag;
} ts_completion;

/* Checks what the engine doesn't know of a run: whether the session's exchange can be used with the
 * pool, and the order on a GPU. False: the answer refuses, or is TS_NEED_SWEEP: it must wait. */
bool ts_step_work_check_run(ts_exec *exec, const ts_session_memory *memory, const ts_command *run,
                            ts_answer *answer);

/* Whether the command ends a step of its session whose runs are still under way, or would put one
 * more run on a stream behind too many. An abort has the runs dropped. */
bool ts_step_work_must_wait(ts_exec *exec, const ts_command *command);

/* Aborts the session's step once its runs are over, which are dropped. An unknown step is fine. */
void ts_step_work_abort(ts_exec *exec, uint64_t session, uint64_t step);

/* Hands the run that the engine has accepted to the kernels. Unless it is on a stream they will
 * complete it. False: out of memory, nothing was done. */
bool ts_step_work_run(ts_exec *exec, ts_session_memory *memory, const ts_completion *completion,
                      const ts_command *command, const ts_step *step);

/* Hands the copies of a step that was begun to the kernels, which will complete it. False: out of
 * memory, nothing was done. */
bool ts_step_work_copy(ts_exec *exec, const ts_completion *completion, const ts_answer *begun);

/* Undoes what the engine was told of a run, or of a begin with copies, that no kernel will get. */
void ts_step_work_undo(ts_exec *exec, const ts_command *command, uint64_t step);

/* The results of the session's jobs aren't wanted any more: those on the processor end soon, those
 * on a GPU as ever. */
void ts_step_work_drop_session(ts_exec *exec, uint64_t session);

/* Whether the kernels have a run of the session's with an exchange that this one has replaced. */
bool ts_step_work_uses_replaced(const ts_exec *exec, uint64_t session, const ts_exchange *exchange);

/* A session ends: its plan may go. NULL is fine. */
void ts_step_plan_release(struct ts_step_plan *plan);

/* Frees all that is kept for steps. No job is under way. */
void ts_step_plans_free(ts_exec *exec);

/* Makes the copies that a step was begun with, which an earlier daemon may or may not have made,
 * and waits for them: nobody has run a layer of it. TS_ENOMEM or TS_EDEVICE with a sentence. */
ts_status ts_step_work_copy_again(ts_exec *exec, const ts_step *step, char *why, size_t why_bytes);

#endif
