/* Runs on streams beyond their ordinary life: posted ones that are refused, or that no daemon has
 * taken, and those that an earlier daemon left. */
#include "stream_runs.h"

#include "log.h"
#include "step_work_internal.h"

#include <stdio.h>

/* Posted runs of a session that were refused and wait for their turn. */
#define REFUSED_MOST 16u
/* Runs whose step is lost, or that were refused, between others that the next daemon does again. */
#define LOST_MOST 1024u

void ts_stream_run_refuse(ts_exec *x, const ts_session_memory *m, const ts_command *run,
                          const ts_answer *answer)
{
    const ts_command done = {.op = TS_OP_STEP_DONE,
                             .session = run->session,
                             .call = run->call,
                             .step_done = {.step = run->step_run.step,
                                           .layer = run->step_run.run.layer,
                                           .status = answer->status,
                                           .on_stream = true,
                                           .number = run->step_run.run.number,
                                           .refused = true}};
    ts_answer taken;
    ts_exec_apply(x, &done, &taken);
    if (taken.status != TS_OK || m->signals == NULL)
        return;
    __atomic_store_n(&m->signals->last_number, run->step_run.run.number, __ATOMIC_RELEASE);
    /* Where no GPU uses the page no run is before it. Without memory those that are may make the
     * stream wait until the session ends. */
    ts_step_job *j = m->signals->gpu == NULL
                         ? NULL
                         : ts_step_job_in_turn(x, m->signals, run->session,
                                               run->step_run.run.number, answer->status);
    if (j == NULL)
        return ts_signals_give_up(m->signals);
    ts_step_job_submit(x, j);
}

bool ts_stream_run_refusal_waits(const ts_session_memory *m)
{
    return m->signals != NULL && m->signals->refused >= REFUSED_MOST;
}

void ts_stream_run_take_posted(ts_exec *x, uint64_t session, ts_session_memory *m)
{
    const ts_session *s = ts_engine_session(x->engine, session);
    ts_posted_run posted;
    ts_answer answer = {0};
    if (s == NULL || m->signals == NULL || ts_stream_run_refusal_waits(m) ||
        !ts_signals_posted(m->signals, s->stream_number + 1, &posted))
        return;
    const ts_command run = {.op = TS_OP_STEP_RUN,
                            .session = session,
                            .call = posted.call,
                            .step_run = {.step = posted.step, .run = posted.run}};
    if (ts_step_work_must_wait(x, &run))
        return;
    if (ts_step_work_check_run(x, m, &run, &answer))
        ts_exec_apply(x, &run, &answer);
    if (answer.status == TS_NEED_SWEEP) /* the daemon after this one's */
        return;
    if (answer.status == TS_OK && !ts_step_work_run(x, m, &(ts_completion){0}, &run, answer.step)) {
        ts_step_work_undo(x, &run, posted.step);
        ts_refuse(&answer, TS_ENOMEM, "no memory for a run");
    }
    if (answer.status != TS_OK)
        ts_stream_run_refuse(x, m, &run, &answer);
    ts_log_on(TS_LOG_INFO, &(ts_log_about){.session = session},
              "run %u of session %llx, found in its page of signals, is %s", posted.number,
              (unsigned long long)session, answer.status == TS_OK ? "done" : answer.message);
}

bool ts_stream_run_comes_before(ts_exec *x, ts_session_memory *m, const ts_command *c)
{
    const ts_session *s = ts_engine_session(x->engine, c->session);
    ts_posted_run posted;
    if (c->op != TS_OP_STEP_RUN || !(c->step_run.run.flags & TS_RUN_ON_STREAM) || s == NULL)
        return false;
    ts_stream_run_take_posted(x, c->session, m);
    return m->signals != NULL && ts_signals_posted(m->signals, s->stream_number + 1, &posted) &&
           (int32_t)(c->step_run.run.number - posted.number) > 0;
}

/* The engine hears what came of a run on a stream that no kernel gets any more. */
static void tell_over(ts_exec *x, uint64_t step, const ts_layer_run *run, ts_status status)
{
    ts_answer answer;
    ts_exec_apply(x,
                  &(ts_command){.op = TS_OP_STEP_DONE,
                                .step_done = {.step = step,
                                              .layer = run->layer,
                                              .status = status,
                                              .on_stream = true,
                                              .number = run->number}},
                  &answer);
}

/* The session's oldest run on a stream that is less than `before` runs older than its last one, and
 * its step; NULL: there is none. */
static const ts_step *oldest_run(const ts_engine *e, const ts_session *s, uint32_t before,
                                 ts_layer_run *run)
{
    const ts_step *found = NULL;
    uint32_t oldest = 0;
    for (uint32_t i = s->step_list; i != TS_NONE; i = e->steps[i].next)
        for (uint32_t k = 0; k < e->steps[i].num_stream_runs; k++) {
            const uint32_t age = s->stream_number - e->steps[i].stream_runs[k].number;
            if (age >= before || (found != NULL && age <= oldest))
                continue;
            found = &e->steps[i];
            oldest = age;
            *run = found->stream_runs[k];
        }
    return found;
}

/* A job for a run that an earlier daemon was given; NULL with a sentence. */
static ts_step_job *job_again(ts_exec *x, ts_session_memory *m, const ts_layer_run *run,
                              const ts_step *step, char *why, size_t why_bytes)
{
    const ts_exec_gpu *gpu = x->gpu_of[step->pool];
    if (step->crashes >= TS_STEP_CRASHES) {
        snprintf(why, why_bytes, "runs of its step were under way at %u crashes of the daemon",
                 step->crashes);
        return NULL;
    }
    if (gpu == NULL || m->exchange == NULL || m->signals == NULL ||
        (run->flags & TS_RUN_REPLACED)) {
        snprintf(why, why_bytes, "its exchange or its page of signals is gone");
        return NULL;
    }
    if (ts_step_work_reach(gpu, m, true, why, why_bytes) != TS_OK)
        return NULL;
    ts_step_job *j = ts_step_job_of_run(x, m, &(ts_completion){0}, run, step);
    if (j == NULL)
        snprintf(why, why_bytes, "no memory for it");
    else
        j->job.late = ts_signals_had_late(m->signals, run->number);
    return j;
}

/* Tells the engine of those that are over; how many runs that leaves. */
static uint32_t tell_of_done(ts_exec *x, const ts_session *s, const ts_signals_page *page)
{
    ts_layer_run run;
    uint32_t left = 0, before = UINT32_MAX;
    for (const ts_step *step; (step = oldest_run(x->engine, s, before, &run)) != NULL;) {
        before = s->stream_number - run.number;
        if (page == NULL || !ts_signals_had_completed(page, run.number))
            left++;
        else
            tell_over(x, step->id, &run,
                      ts_signals_had_late(page, run.number) ? TS_ETIMEOUT : TS_OK);
    }
    return left;
}

/* Lets a GPU use the page, if one has a pool of the runs'. */
static bool reach_page(const ts_exec *x, const ts_session *s, const ts_session_memory *m)
{
    ts_layer_run run;
    char why[TS_MESSAGE_BYTES];
    uint32_t before = UINT32_MAX;
    for (const ts_step *step; (step = oldest_run(x->engine, s, before, &run)) != NULL;) {
        const ts_exec_gpu *gpu = x->gpu_of[step->pool];
        before = s->stream_number - run.number;
        if (gpu != NULL &&
            ts_signals_reach(m->signals, gpu->gpu, gpu->words, why, sizeof why) == TS_OK)
            return true;
    }
    return false;
}

/* A job for the session's run of this number: the run, or, where it can't be done or is of a step
 * that there is no more, one that only comes in its turn, and a sentence. NULL: out of memory. */
static ts_step_job *job_of_number(ts_exec *x, uint64_t session, ts_session_memory *m,
                                  uint32_t number, char *why, size_t why_bytes)
{
    const ts_session *s = ts_engine_session(x->engine, session);
    ts_layer_run run;
    const ts_step *step = oldest_run(x->engine, s, s->stream_number - number + 1, &run);
    if (step != NULL && run.number == number) {
        const uint64_t id = step->id;
        ts_step_job *j = job_again(x, m, &run, step, why, why_bytes);
        if (j != NULL)
            return j;
        tell_over(x, id, &run, TS_EINTERNAL);
    } else {
        snprintf(why, why_bytes, "its step is lost, or it was refused");
    }
    return ts_step_job_in_turn(x, m->signals, session, number, TS_EINTERNAL);
}

void ts_stream_runs_give_up(ts_exec *x, uint64_t session)
{
    const ts_session *s = ts_engine_session(x->engine, session);
    ts_layer_run run;
    for (const ts_step *step; (step = oldest_run(x->engine, s, UINT32_MAX, &run)) != NULL;)
        tell_over(x, step->id, &run, TS_EINTERNAL);
}

void ts_stream_runs_resume(ts_exec *x, uint64_t session, ts_session_memory *m)
{
    const ts_session *s = ts_engine_session(x->engine, session);
    const uint32_t left = tell_of_done(x, s, m->signals);
    const uint32_t open = m->signals == NULL ? left : ts_signals_open_runs(m->signals);
    bool well = left > 0 && m->signals != NULL && open - left <= LOST_MOST && reach_page(x, s, m);
    ts_step_job *jobs = NULL, **end = &jobs; /* linked by next_live, the oldest first */
    char why[TS_MESSAGE_BYTES] = "all are";
    uint32_t again = 0;
    for (uint32_t age = open; well && age > 0; age--) {
        *end = job_of_number(x, session, m, s->stream_number - age + 1, why, sizeof why);
        well = *end != NULL;
        again += well && !ts_step_job_is_refused(*end);
        end = well ? &(*end)->next_live : end;
    }
    if (well)
        ts_log_on(again < open ? TS_LOG_WARNING : TS_LOG_INFO, &(ts_log_about){.session = session},
                  "%u of %u runs on a stream of session %llx are done again: %s", again, open,
                  (unsigned long long)session, why);
    for (ts_step_job *j = jobs, *next; j != NULL; j = next) {
        next = j->next_live;
        if (well)
            ts_step_job_submit(x, j);
        else
            ts_step_job_free(j);
    }
    if (well || open == 0)
        return;
    ts_log_on(TS_LOG_WARNING, &(ts_log_about){.session = session},
              "%u runs of session %llx, of which %u are lost, aren't done again", open,
              (unsigned long long)session, open - left);
    ts_stream_runs_give_up(x, session);
    ts_signals_give_up(m->signals);
}
