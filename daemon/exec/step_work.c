#include "step_work_internal.h"

#include "log.h"
#include "test_point.h"

#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What attends of a step need on a GPU, made by the first of its runs (gpu.h). */
typedef struct ts_step_plan {
    uint64_t step;
    uint32_t users; /* jobs, the exec's table, and the step's session */
    uint32_t jobs;  /* of them */
    ts_job_plan plan;
} ts_step_plan;

void ts_step_plan_release(ts_step_plan *p)
{
    if (p == NULL || --p->users > 0)
        return;
    ts_gpu_plan_free(p->plan.plan);
    free(p);
}

/* The plan of the connection's step that ran before, if that has ended: a step of the same
 * sequences, some tokens later, needs one much like it. Else NULL. */
static ts_gpu_plan *take_earlier(const ts_exec *x, ts_step_plan *p)
{
    if (p == NULL || p->jobs > 0 || ts_engine_find_step(x->engine, p->step) != NULL)
        return NULL;
    ts_gpu_plan *plan = p->plan.plan;
    p->plan = (ts_job_plan){0};
    return plan;
}

/* The step's plan, for a job to give back; NULL: out of memory. The one of an earlier step in the
 * same place is given up. */
static ts_step_plan *plan_of(ts_exec *x, ts_session_memory *m, const ts_step *step)
{
    uint32_t index = (uint32_t)step->id;
    if (index >= x->num_step_plans) {
        uint32_t count = (index + 1) * 2;
        ts_step_plan **grown = realloc(x->step_plans, count * sizeof *grown);
        if (grown == NULL)
            return NULL;
        memset(grown + x->num_step_plans, 0, (count - x->num_step_plans) * sizeof *grown);
        x->step_plans = grown;
        x->num_step_plans = count;
    }
    ts_step_plan **place = &x->step_plans[index];
    if (*place == NULL || (*place)->step != step->id) {
        ts_step_plan *p = malloc(sizeof *p);
        if (p == NULL)
            return NULL;
        *p = (ts_step_plan){.step = step->id, .users = 2, .plan.plan = take_earlier(x, m->plan)};
        ts_step_plan_release(*place);
        ts_step_plan_release(m->plan);
        *place = m->plan = p;
    }
    (*place)->users++;
    (*place)->jobs++;
    return *place;
}

static void give_back(ts_step_plan *p)
{
    if (p == NULL)
        return;
    p->jobs--;
    ts_step_plan_release(p);
}

void ts_step_plans_free(ts_exec *x)
{
    for (uint32_t i = 0; i < x->num_step_plans; i++)
        ts_step_plan_release(x->step_plans[i]);
    free(x->step_plans);
}

void ts_step_job_free(ts_step_job *j)
{
    if (ts_step_job_is_refused(j) && j->job.signals != NULL) /* which it has */
        j->job.signals->refused--;
    ts_exchange_release(j->exchange);
    ts_signals_release(j->job.signals);
    give_back(j->plan);
    free(j->job.copies);
    free(j->job.seqs);
    free(j);
}

static void job_done(ts_job *job)
{
    ts_step_job *j = (ts_step_job *)job;
    /* One thread sees all launches' ends: it does nobody's work but this, and sees none meanwhile.
     */
    void (*run)(ts_queue *, ts_work *, void *) = j->gpu != NULL ? ts_queue_run_alone : ts_queue_run;
    run(&j->exec->queue, &j->work, j->exec->owner);
}

static void finish_job(ts_work *work, void *owner)
{
    ts_step_job *j = (ts_step_job *)((char *)work - offsetof(ts_step_job, work));
    ts_exec *x = j->exec;
    ts_answer answer;
    *j->at_live = j->next_live;
    if (j->next_live != NULL)
        j->next_live->at_live = j->at_live;
    /* What a lost device left undone is the next daemon's: this one ends, and tells nobody. */
    const bool outlives = j->job.signals != NULL ? j->job.signals->outlives : x->books != NULL;
    const bool is_next = outlives && j->job.status == TS_EDEVICE;
    const ts_command done = {.op = TS_OP_STEP_DONE,
                             .step_done = {.step = j->step,
                                           .layer = j->layer,
                                           .status = j->job.status,
                                           .on_stream = j->job.signals != NULL,
                                           .number = j->job.run_number}};
    if (!is_next && !ts_step_job_is_refused(j))
        ts_exec_apply(x, &done, &answer);
    if (j->job.status != TS_OK && !j->job.dropped && !is_next && !ts_step_job_is_refused(j))
        ts_log(TS_LOG_WARNING, "step %llx, layer %d: %s", (unsigned long long)j->step,
               (int)j->layer, j->job.why);
    if (j->completion.done != NULL && !is_next)
        j->completion.done(&j->completion, &(ts_step_result){.step = j->step,
                                                             .run = j->layer != TS_NONE,
                                                             .status = j->job.status,
                                                             .why = j->job.why});
    ts_step_job_free(j);
    x->resumed(owner);
}

/* A job of the step's, with room for `count` things of `bytes` in *things. */
static ts_step_job *job_new(ts_exec *x, const ts_completion *completion, const ts_step *step,
                            void **things, size_t count, size_t bytes)
{
    ts_step_job *j = calloc(1, sizeof *j);
    *things = malloc(count * bytes);
    if (j == NULL || *things == NULL) {
        free(j);
        free(*things);
        return NULL;
    }
    j->job.geometry = x->engine->pools[step->pool].config.geometry;
    j->job.base = x->memory[step->pool]->base;
    j->job.done = job_done;
    j->work.run = finish_job;
    j->exec = x;
    j->gpu = x->gpu_of[step->pool];
    j->completion = *completion;
    j->job.session = step->session;
    j->job.tenant = x->engine->sessions[step->session].tenant;
    j->step = step->id;
    j->layer = TS_NONE;
    return j;
}

void ts_step_job_submit(ts_exec *x, ts_step_job *j)
{
    if (!ts_step_job_is_refused(j))
        ts_point("running", 0);
    j->at_live = &x->live_jobs;
    j->next_live = x->live_jobs;
    if (j->next_live != NULL)
        j->next_live->at_live = &j->next_live;
    x->live_jobs = j;
    if (j->gpu != NULL)
        ts_gpu_executor_submit(j->gpu->executor, &j->job);
    else if (j->completion.submit != NULL)
        j->completion.submit(&j->completion, &j->job);
    else
        ts_host_executor_submit(x->host, &j->job);
}

bool ts_step_work_copy(ts_exec *x, const ts_completion *completion, const ts_answer *answer)
{
    void *copies;
    ts_step_job *j = job_new(x, completion, answer->begun.step, &copies, answer->begun.num_copies,
                             sizeof(ts_block_copy));
    if (j == NULL)
        return false;
    memcpy(copies, answer->begun.copies, answer->begun.num_copies * sizeof(ts_block_copy));
    j->job.copies = copies;
    j->job.num_copies = answer->begun.num_copies;
    ts_step_job_submit(x, j);
    return true;
}

/* A job that a thread waits for. */
typedef struct awaited_job {
    ts_job job; /* first: the executor hands it back */
    sem_t done;
} awaited_job;

static void awaited(ts_job *job)
{
    sem_post(&((awaited_job *)job)->done);
}

ts_status ts_step_work_copy_again(ts_exec *x, const ts_step *step, char *why, size_t why_bytes)
{
    const ts_exec_gpu *gpu = x->gpu_of[step->pool];
    ts_block_copy *copies =
        ts_point_fails("copying again") ? NULL : calloc(step->num_seqs + 1ull, sizeof *copies);
    uint32_t count = 0;
    if (copies == NULL) {
        snprintf(why, why_bytes, "no memory for the copies of a step of %u sequences",
                 step->num_seqs);
        return TS_ENOMEM;
    }
    ts_engine_step_copies(x->engine, step, copies, &count);
    awaited_job j = {.job = {.geometry = x->engine->pools[step->pool].config.geometry,
                             .base = x->memory[step->pool]->base,
                             .done = awaited,
                             .session = step->session,
                             .tenant = x->engine->sessions[step->session].tenant,
                             .copies = copies,
                             .num_copies = count}};
    sem_init(&j.done, 0, 0);
    if (gpu != NULL)
        ts_gpu_executor_submit(gpu->executor, &j.job);
    else
        ts_host_executor_submit(x->host, &j.job);
    while (sem_wait(&j.done) != 0)
        ;
    sem_destroy(&j.done);
    free(copies);
    if (j.job.status != TS_OK)
        snprintf(why, why_bytes, "the copies of a step: %s", j.job.why);
    return j.job.status;
}

void ts_step_work_undo(ts_exec *x, const ts_command *command, uint64_t step)
{
    ts_answer answer;
    const ts_layer_run *run = &command->step_run.run;
    const bool on_stream = command->op == TS_OP_STEP_RUN && (run->flags & TS_RUN_ON_STREAM);
    ts_exec_apply(x,
                  &(ts_command){.op = TS_OP_STEP_DONE,
                                .step_done = {.step = step,
                                              .layer = TS_NONE,
                                              .status = TS_ENOMEM,
                                              .on_stream = on_stream,
                                              .undone = on_stream,
                                              .number = on_stream ? run->number : 0}},
                  &answer);
    if (command->op == TS_OP_STEP_BEGIN)
        ts_exec_apply(x,
                      &(ts_command){.op = TS_OP_STEP_ABORT,
                                    .session = command->session,
                                    .step_end = {.step = step}},
                      &answer);
}

static void drop_step(ts_exec *x, uint64_t step)
{
    for (ts_step_job *j = x->live_jobs; j != NULL; j = j->next_live)
        if (j->step == step)
            ts_job_drop(&j->job);
}

void ts_step_work_drop_session(ts_exec *x, uint64_t session)
{
    for (ts_step_job *j = x->live_jobs; j != NULL; j = j->next_live)
        if (ts_engine_session_id(x->engine, j->job.session) == session)
            ts_job_drop(&j->job);
}

bool ts_step_work_uses_replaced(const ts_exec *x, uint64_t session, const ts_exchange *exchange)
{
    for (const ts_step_job *j = x->live_jobs; j != NULL; j = j->next_live)
        if (j->exchange != NULL && j->exchange != exchange &&
            ts_engine_session_id(x->engine, j->job.session) == session)
            return true;
    return false;
}

bool ts_step_work_must_wait(ts_exec *x, const ts_command *command)
{
    bool run = command->op == TS_OP_STEP_RUN && (command->step_run.run.flags & TS_RUN_ON_STREAM) &&
               !ts_engine_run_is_known(x->engine, command);
    bool end = command->op == TS_OP_STEP_COMMIT || command->op == TS_OP_STEP_ABORT;
    if (!run && !end)
        return false;
    const ts_step *step =
        ts_engine_find_step(x->engine, run ? command->step_run.step : command->step_end.step);
    bool wait = step != NULL && (end || x->gpu_of[step->pool] != NULL) &&
                ts_engine_session_id(x->engine, step->session) == command->session &&
                step->in_flight >= (run ? ts_engine_step_runs_max(x->engine, step) : 1);
    if (wait && command->op == TS_OP_STEP_ABORT)
        drop_step(x, step->id);
    return wait;
}

void ts_step_work_abort(ts_exec *x, uint64_t session, uint64_t step)
{
    const ts_command abort = {
        .op = TS_OP_STEP_ABORT,
        .session = session,
        .step_end = {.step = step, .once_idle = true},
    };
    ts_answer answer;
    const ts_step *its = ts_engine_find_step(x->engine, step);
    if (its == NULL || ts_engine_session_id(x->engine, its->session) != session)
        return;
    (void)ts_step_work_must_wait(x, &abort);
    ts_exec_apply(x, &abort, &answer);
}

ts_status ts_step_work_reach(const ts_exec_gpu *gpu, const ts_session_memory *m, bool on_stream,
                             char *why, size_t why_bytes)
{
    ts_status status = ts_exchange_reach(m->exchange, gpu->gpu, why, why_bytes);
    if (status != TS_OK || !on_stream)
        return status;
    return ts_signals_reach(m->signals, gpu->gpu, gpu->words, why, why_bytes);
}

bool ts_step_work_check_run(ts_exec *x, const ts_session_memory *m, const ts_command *run,
                            ts_answer *answer)
{
    char why[TS_MESSAGE_BYTES];
    bool on_stream = run->step_run.run.flags & TS_RUN_ON_STREAM;
    const ts_step *step = ts_engine_find_step(x->engine, run->step_run.step);
    if (step == NULL || m->exchange == NULL ||
        ts_engine_session_id(x->engine, step->session) != run->session)
        return true; /* the engine refuses it */
    const char *pool = x->engine->pools[step->pool].config.name;
    const ts_exec_gpu *gpu = x->gpu_of[step->pool];
    ts_status status = TS_OK;
    if (gpu == NULL) {
        if (on_stream)
            ts_refuse(answer, TS_EINVAL, "a run on a stream, but pool '%s' is in host memory",
                      pool);
        else if (m->exchange->host == NULL)
            ts_refuse(answer, TS_EINVAL,
                      "the exchange is device memory, but pool '%s' is in host memory", pool);
        return answer->status == TS_OK;
    }
    if (on_stream && m->signals == NULL) {
        ts_refuse(answer, TS_EINVAL,
                  "run %u on a stream: the session must get its page of signals first, and its "
                  "first run is number 1",
                  run->step_run.run.number);
        return false;
    }
    status = ts_step_work_reach(gpu, m, on_stream, why, sizeof why);
    if (status != TS_OK && ts_exec_leaves_to_next(x, step->pool))
        answer->status = TS_NEED_SWEEP;
    else if (status != TS_OK)
        ts_refuse(answer, status, "pool '%s': %s", pool, why);
    return status == TS_OK;
}

ts_step_job *ts_step_job_of_run(ts_exec *x, ts_session_memory *m, const ts_completion *completion,
                                const ts_layer_run *run, const ts_step *step)
{
    void *memory;
    ts_step_job *j =
        job_new(x, completion, step, &memory, step->num_seqs, sizeof(ts_attention_seq));
    if (j == NULL)
        return NULL;
    if (j->gpu != NULL) {
        j->plan = plan_of(x, m, step);
        if (j->plan == NULL) {
            j->job.seqs = memory;
            ts_step_job_free(j);
            return NULL;
        }
        j->job.plan = &j->plan->plan;
    }
    ts_attention_seq *seqs = memory;
    const ts_geometry *g = &j->job.geometry;
    unsigned char *base = j->gpu == NULL ? m->exchange->host : m->exchange->there;
    size_t first = 0;
    for (uint32_t i = 0; i < step->num_seqs; i++) {
        const ts_step_seq *part = &step->seqs[i];
        seqs[i] = (ts_attention_seq){.blocks = part->table,
                                     .kv_tokens = part->start + part->new_tokens,
                                     .q_tokens = part->new_tokens,
                                     .dropped = &j->job.dropped};
        ts_layer_run_point(run, base, g, step->heads, step->io_dtype, first, &seqs[i]);
        first += part->new_tokens;
    }
    j->job.seqs = seqs;
    j->job.num_seqs = step->num_seqs;
    j->job.heads = step->heads;
    j->job.io_dtype = step->io_dtype;
    j->job.variant = ts_layer_run_resolve(run, step->scale, g->head_dim);
    j->job.kernel = step->kernel;
    j->layer = run->layer;
    j->exchange = m->exchange;
    j->exchange->users++;
    if (run->flags & TS_RUN_ON_STREAM) { /* answered now */
        j->job.signals = m->signals;
        j->job.run_number = run->number;
        m->signals->users++;
        j->completion.done = NULL;
    }
    return j;
}

bool ts_step_work_run(ts_exec *x, ts_session_memory *m, const ts_completion *completion,
                      const ts_command *command, const ts_step *step)
{
    const ts_layer_run *run = &command->step_run.run;
    ts_step_job *j = ts_step_job_of_run(x, m, completion, run, step);
    if (j == NULL)
        return false;
    if (j->job.signals != NULL)
        __atomic_store_n(&m->signals->last_number, run->number, __ATOMIC_RELEASE);
    ts_step_job_submit(x, j);
    return true;
}

ts_step_job *ts_step_job_in_turn(ts_exec *x, ts_signals_page *page, uint64_t session,
                                 uint32_t number, ts_status status)
{
    ts_step_job *j = calloc(1, sizeof *j);
    if (j == NULL)
        return NULL;
    j->job.session = (uint32_t)session;
    j->job.tenant = x->engine->sessions[j->job.session].tenant;
    j->job.signals = page;
    page->users++;
    page->refused++;
    j->job.run_number = number;
    j->job.status = status == TS_EDEVICE ? TS_EINTERNAL : status; /* the next daemon has no part */
    j->job.done = job_done;
    j->work.run = finish_job;
    j->exec = x;
    j->layer = TS_NONE;
    for (uint32_t i = 0; i < x->num_gpus; i++)
        if (x->gpus[i].gpu == page->gpu)
            j->gpu = &x->gpus[i];
    return j;
}
