#include "step_work.h"

#include "log.h"
#include "refusals.h"
#include "ring_server.h"

#include <stdlib.h>
#include <string.h>

/* A job, the request that waits for it, and what to tell the engine afterwards. */
typedef struct ts_service_job {
    ts_job job;
    ts_work work;
    ts_service *service;
    const ts_service_gpu *gpu; /* NULL: the processor's kernels */
    ts_request *request;       /* NULL: the rings, or nobody, waits */
    ts_ring *ring;             /* NULL: nobody waits there */
    ts_asker asker;            /* of the rings */
    uint64_t request_id, step;
    uint32_t pipe, layer;
    ts_exchange *exchange;
    ts_step_plan *plan;                          /* on a GPU, of a run */
    struct ts_service_job *next_live, **at_live; /* of the service's, that are with the kernels */
    unsigned char *reply; /* to a begun step; NULL for a run, whose reply is empty */
    size_t reply_size;
} service_job;

/* What attends of a step need on a GPU, made by the first of its runs (gpu.h). */
struct ts_step_plan {
    uint64_t step;
    uint32_t users; /* jobs, the service's table, and the step's connection */
    uint32_t jobs;  /* of them */
    ts_job_plan plan;
};

void ts_jobs_release_plan(ts_step_plan *p)
{
    if (p == NULL || --p->users > 0)
        return;
    ts_gpu_plan_free(p->plan.plan);
    free(p);
}

/* The plan of the connection's step that ran before, if that has ended: a step of the same
 * sequences, some tokens later, needs one much like it. Else NULL. */
static ts_gpu_plan *take_earlier(const ts_service *s, ts_step_plan *p)
{
    if (p == NULL || p->jobs > 0 || ts_engine_find_step(s->engine, p->step) != NULL)
        return NULL;
    ts_gpu_plan *plan = p->plan.plan;
    p->plan = (ts_job_plan){0};
    return plan;
}

/* The step's plan, for a job to give back; NULL: out of memory. The one of an earlier step in the
 * same place is given up. */
static ts_step_plan *plan_of(ts_service *s, ts_connection *c, const ts_step *step)
{
    uint32_t index = (uint32_t)step->id;
    if (index >= s->num_step_plans) {
        uint32_t count = (index + 1) * 2;
        ts_step_plan **grown = realloc(s->step_plans, count * sizeof *grown);
        if (grown == NULL)
            return NULL;
        memset(grown + s->num_step_plans, 0, (count - s->num_step_plans) * sizeof *grown);
        s->step_plans = grown;
        s->num_step_plans = count;
    }
    ts_step_plan **place = &s->step_plans[index];
    if (*place == NULL || (*place)->step != step->id) {
        ts_step_plan *p = malloc(sizeof *p);
        if (p == NULL)
            return NULL;
        *p = (ts_step_plan){.step = step->id, .users = 2, .plan.plan = take_earlier(s, c->plan)};
        ts_jobs_release_plan(*place);
        ts_jobs_release_plan(c->plan);
        *place = c->plan = p;
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
    ts_jobs_release_plan(p);
}

void ts_jobs_fini(ts_service *s)
{
    for (uint32_t i = 0; i < s->num_step_plans; i++)
        ts_jobs_release_plan(s->step_plans[i]);
    free(s->step_plans);
}

static void job_done(ts_job *job)
{
    service_job *j = (service_job *)job;
    ts_queue_run(&j->service->queue, &j->work, j->service);
}

static void reply_to_job(ts_service *s, service_job *j)
{
    const unsigned char *bytes = j->reply;
    size_t size = j->reply_size;
    if (bytes == NULL || j->job.status != TS_OK) {
        Tspb__Reply reply = TSPB__REPLY__INIT;
        reply.request_id = j->request_id;
        reply.status = (uint32_t)j->job.status;
        reply.message = j->job.status == TS_OK ? (char *)"" : j->job.why;
        ts_refused(s, j->request->message, j->job.status);
        size = ts_service_pack(s, &reply, &size) ? size : 0;
        bytes = s->packed;
    }
    ts_service_deliver(ts_service_connection(s, j->pipe), j->request, j->request_id, bytes, size);
}

static void finish_job(ts_work *work, void *service)
{
    ts_service *s = service;
    service_job *j = (service_job *)((char *)work - offsetof(service_job, work));
    ts_answer answer;
    *j->at_live = j->next_live;
    if (j->next_live != NULL)
        j->next_live->at_live = j->at_live;
    ts_service_tell(
        s,
        &(ts_command){.op = TS_OP_STEP_DONE,
                      .step_done = {.step = j->step, .layer = j->layer, .status = j->job.status}},
        &answer);
    if (j->job.status != TS_OK && !j->job.dropped)
        ts_log(TS_LOG_WARNING, "step %llx, layer %d: %s", (unsigned long long)j->step,
               (int)j->layer, j->job.why);
    ts_exchange_release(j->exchange);
    ts_signals_release(j->job.signals);
    give_back(j->plan);
    if (j->request != NULL)
        reply_to_job(s, j);
    if (j->ring != NULL) {
        ts_refused_step(
            s, j->layer == TS_NONE ? TSPB__REQUEST__BODY_STEP_BEGIN : TSPB__REQUEST__BODY_STEP_RUN,
            j->step, j->job.status);
        ts_ring_complete(j->ring, &j->asker, j->job.status, j->job.why);
        ts_ring_release(j->ring);
    }
    free(j->job.copies);
    free(j->job.seqs);
    free(j->reply);
    free(j);
    ts_service_resume(s);
}

/* A job of the step's, with room for `count` things of `bytes` in *things. */
static service_job *job_new(ts_service *s, ts_connection *c, ts_asker asker, const ts_step *step,
                            void **things, size_t count, size_t bytes)
{
    service_job *j = calloc(1, sizeof *j);
    *things = malloc(count * bytes);
    if (j == NULL || *things == NULL) {
        free(j);
        free(*things);
        return NULL;
    }
    j->job.geometry = s->engine->pools[step->pool].config.geometry;
    j->job.base = s->memory[step->pool]->base;
    j->job.done = job_done;
    j->work.run = finish_job;
    j->service = s;
    j->gpu = s->gpu_of[step->pool];
    j->request = asker.request;
    if (asker.request != NULL)
        j->request_id = asker.request->message->request_id;
    else
        j->ring = ts_ring_use(c->ring);
    j->asker = asker;
    j->job.session = step->session;
    j->job.tenant = s->engine->sessions[step->session].tenant;
    j->step = step->id;
    j->pipe = c->pipe;
    j->layer = TS_NONE;
    return j;
}

/* A job that will not be. */
static bool job_drop(service_job *j, void *things)
{
    ts_ring_release(j->ring);
    free(things);
    free(j);
    return false;
}

static void submit(ts_service *s, service_job *j)
{
    j->at_live = &s->live_jobs;
    j->next_live = s->live_jobs;
    if (j->next_live != NULL)
        j->next_live->at_live = &j->next_live;
    s->live_jobs = j;
    if (j->gpu != NULL)
        ts_gpu_batch_submit(j->gpu->batch, &j->job);
    else if (j->ring != NULL)
        ts_rings_submit(s->rings, &j->job);
    else
        ts_batch_submit(s->batch, &j->job);
}

bool ts_jobs_copy(ts_service *s, ts_connection *c, ts_asker asker, const ts_answer *a,
                  const Tspb__Reply *reply)
{
    void *copies;
    service_job *j =
        job_new(s, c, asker, a->begun.step, &copies, a->begun.num_copies, sizeof(ts_block_copy));
    if (j == NULL)
        return false;
    memcpy(copies, a->begun.copies, a->begun.num_copies * sizeof(ts_block_copy));
    j->job.copies = copies;
    j->job.num_copies = a->begun.num_copies;
    if (asker.request != NULL) {
        if (!ts_service_pack(s, reply, &j->reply_size) ||
            (j->reply = malloc(j->reply_size)) == NULL)
            return job_drop(j, copies);
        memcpy(j->reply, s->packed, j->reply_size);
    }
    submit(s, j);
    return true;
}

void ts_jobs_undo(ts_service *s, const ts_command *command, uint64_t step)
{
    ts_answer answer;
    ts_service_tell(
        s,
        &(ts_command){.op = TS_OP_STEP_DONE,
                      .step_done = {.step = step, .layer = TS_NONE, .status = TS_ENOMEM}},
        &answer);
    if (command->op == TS_OP_STEP_BEGIN)
        ts_service_tell(s,
                        &(ts_command){.op = TS_OP_STEP_ABORT,
                                      .session = command->session,
                                      .step_end = {.step = step}},
                        &answer);
}

void ts_jobs_drop_step(ts_service *s, uint64_t step)
{
    for (service_job *j = s->live_jobs; j != NULL; j = j->next_live)
        if (j->step == step)
            ts_job_drop(&j->job);
}

void ts_jobs_drop_connection(ts_service *s, const ts_connection *c)
{
    for (service_job *j = s->live_jobs; j != NULL; j = j->next_live)
        if (j->pipe == c->pipe)
            ts_job_drop(&j->job);
}

bool ts_jobs_check_run(ts_service *s, ts_connection *c, const ts_command *run, ts_answer *a)
{
    char why[TS_MESSAGE_BYTES];
    bool ordered = run->step_run.ordered;
    uint32_t order = run->step_run.order;
    const ts_step *step = ts_engine_find_step(s->engine, run->step_run.step);
    if (step == NULL || c->exchange == NULL ||
        ts_engine_session_id(s->engine, step->session) != c->session)
        return true; /* the engine refuses it */
    const char *pool = s->engine->pools[step->pool].config.name;
    const ts_service_gpu *gpu = s->gpu_of[step->pool];
    ts_status status = TS_OK;
    if (gpu == NULL) {
        if (ordered)
            ts_refuse(a, TS_EINVAL, "an ordered run, but pool '%s' is in host memory", pool);
        else if (c->exchange->host == NULL)
            ts_refuse(a, TS_EINVAL,
                      "the exchange is device memory, but pool '%s' is in host memory", pool);
        return a->status == TS_OK;
    }
    status = ts_exchange_reach(c->exchange, gpu->gpu, why, sizeof why);
    if (status == TS_OK && ordered) {
        if (c->signals == NULL || order != c->signals->ordered + 1) {
            ts_refuse(a, TS_EINVAL, "run number %u; the session's next is %u%s", order,
                      c->signals == NULL ? 1 : c->signals->ordered + 1,
                      c->signals == NULL ? ", after it has asked for its page of signals" : "");
            return false;
        }
        uint32_t *done, *done_there;
        ts_gpu_batch_word(gpu->batch, (uint32_t)c->session, &done, &done_there);
        status = ts_signals_reach(c->signals, gpu->gpu, done, done_there, why, sizeof why);
    }
    if (status != TS_OK)
        ts_refuse(a, status, "pool '%s': %s", pool, why);
    return status == TS_OK;
}

/* Offsets were checked: multiples of 64. */
static float *floats_at(unsigned char *base, uint64_t offset)
{
    return (float *)(void *)(base + offset);
}

bool ts_jobs_run(ts_service *s, ts_connection *c, ts_asker asker, const ts_command *command,
                 const ts_step *step)
{
    void *memory;
    service_job *j = job_new(s, c, asker, step, &memory, step->num_seqs, sizeof(ts_attention_seq));
    if (j == NULL)
        return false;
    if (j->gpu != NULL) {
        j->plan = plan_of(s, c, step);
        if (j->plan == NULL)
            return job_drop(j, memory);
        j->job.plan = &j->plan->plan;
    }
    ts_attention_seq *seqs = memory;
    const ts_geometry *g = &j->job.geometry;
    unsigned char *base = j->gpu == NULL ? c->exchange->host : c->exchange->there;
    size_t row = g->head_dim * ts_dtype_bytes(step->io_dtype), first = 0;
    for (uint32_t i = 0; i < step->num_seqs; i++) {
        const ts_step_seq *part = &step->seqs[i];
        seqs[i] = (ts_attention_seq){
            .blocks = part->table,
            .kv_tokens = part->start + part->new_tokens,
            .q_tokens = part->new_tokens,
            .layer = command->step_run.layer,
            .q = base + command->step_run.q + first * row * step->heads,
            .k = base + command->step_run.k + first * row * g->kv_heads,
            .v = base + command->step_run.v + first * row * g->kv_heads,
            .out = base + command->step_run.out + first * row * step->heads,
            .sinks = command->step_run.has_sinks ? floats_at(base, command->step_run.sinks) : NULL,
            .scales =
                command->step_run.has_scales ? floats_at(base, command->step_run.scales) : NULL,
            .alibi = command->step_run.has_alibi ? floats_at(base, command->step_run.alibi) : NULL,
            .lse = command->step_run.has_lse
                       ? floats_at(base, command->step_run.lse) + first * step->heads
                       : NULL,
            .dropped = &j->job.dropped,
        };
        first += part->new_tokens;
    }
    j->job.seqs = seqs;
    j->job.num_seqs = step->num_seqs;
    j->job.heads = step->heads;
    j->job.io_dtype = step->io_dtype;
    j->job.variant = command->step_run.variant;
    if (j->job.variant.scale == 0)
        j->job.variant.scale = step->scale;
    if (j->job.variant.rope.dims == 0)
        j->job.variant.rope.dims = g->head_dim;
    j->job.kernel = step->kernel;
    j->layer = command->step_run.layer;
    j->exchange = c->exchange;
    j->exchange->users++;
    if (command->step_run.ordered) { /* answered now */
        __atomic_store_n(&c->signals->ordered, command->step_run.order, __ATOMIC_RELEASE);
        j->job.signals = c->signals;
        j->job.order = command->step_run.order;
        c->signals->users++;
        j->request = NULL;
        ts_ring_release(j->ring);
        j->ring = NULL;
    }
    submit(s, j);
    return true;
}
