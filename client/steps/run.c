/* Runs of a step's layers: by message, by ring, in this process, or both ways. */
#include "step.h"

#include "error.h"
#include "gpu_context.h"
#include "options.h"
#include "ring_client.h"
#include "rpc.h"
#include "stream_signals.h"

/* What the options come to. `number`: 0 of a run that isn't on a stream. */
static ts_layer_run layer_run(const ts_step *s, uint32_t layer, const ts_run_options *o,
                              uint32_t number)
{
    ts_layer_run run = s->at;
    run.layer = layer;
    run.flags = 0;
#define NUMBER(type, name, place, most, what) run.name = o->name;
#define FLAG(flag, name) run.flags |= o->name ? TS_RUN_##flag : 0u;
    TS_RUN_NUMBERS(NUMBER)
    TS_RUN_ARRAYS(FLAG)
    TS_RUN_SWITCHES(FLAG)
#undef NUMBER
#undef FLAG
    run.number = number;
    return run;
}

static ts_status run_by_message(ts_step *s, const ts_layer_run *run)
{
    Tspb__StepRun body = TSPB__STEP_RUN__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    body.step = s->id;
    body.layer = run->layer;
    body.q = run->q;
    body.k = run->k;
    body.v = run->v;
    body.out = run->out;
#define NUMBER(type, name, place, most, what) body.name = run->name;
#define ARRAY(flag, name)                                                                          \
    body.has_##name = run->flags & TS_RUN_##flag;                                                  \
    body.name = run->name;
#define SWITCH(flag, name) body.name = run->flags & TS_RUN_##flag;
    TS_RUN_NUMBERS(NUMBER)
    TS_RUN_ARRAYS(ARRAY)
    TS_RUN_SWITCHES(SWITCH)
#undef NUMBER
#undef ARRAY
#undef SWITCH
    body.number = run->number;
    request.body_case = TSPB__REQUEST__BODY_STEP_RUN;
    request.step_run = &body;
    return ts_call_plain(s->pool->client, &request);
}

/* Whether two runs of a step differ in layer and number alone. */
static bool is_alike(const ts_layer_run *a, const ts_layer_run *b)
{
    bool alike = a->flags == b->flags;
#define NUMBER(type, name, place, most, what) alike = alike && a->name == b->name;
    TS_RUN_NUMBERS(NUMBER)
#undef NUMBER
    return alike;
}

/* Whether the run needs no answer before its worker goes on: one like it was accepted. */
static bool may_post(const ts_step *s, const ts_layer_run *run)
{
    bool accepted = false;
    for (uint32_t i = 0; i < s->num_accepted; i++)
        accepted = accepted || is_alike(run, &s->accepted[i]);
    return accepted && run->layer < s->pool->geometry.layers && run->number != 0;
}

/* The two kinds that came last are remembered. */
static void note_accepted(ts_step *s, const ts_layer_run *run)
{
    s->accepted[1] = s->accepted[0];
    s->accepted[0] = *run;
    s->num_accepted += s->num_accepted < 2;
}

static ts_status run_by_daemon(ts_step *s, uint32_t layer, const ts_run_options *o, uint32_t number)
{
    ts_client *c = s->pool->client;
    const ts_layer_run run = layer_run(s, layer, o, number);
    ts_ring_entry entry = {.op = TS_RING_RUN, .step = s->id, .run = run};
    ts_ring_completion done;
    bool use;
    ts_status status = ts_rings_use(c, &use);
    if (status == TS_OK)
        status = ts_ring_posted_status(c, s->id);
    if (status != TS_OK)
        return status;
    if (use && may_post(s, &run)) {
        bool posted;
        status = ts_ring_post(c, &entry, &posted);
        if (status != TS_OK || posted)
            return status;
        use = !c->rings_lost;
    }
    if (!use)
        return run_by_message(s, &run);
    status = ts_ring_call(c, &entry, &done);
    if (status == TS_OK && o->on_stream)
        note_accepted(s, &run);
    return status;
}

static ts_status run_locally(ts_step *s, uint32_t layer, const ts_run_options *o)
{
    const ts_local_run run = {.run = layer_run(s, layer, o, 0),
                              .heads = s->heads,
                              .io_dtype = s->io_dtype,
                              .scale = s->scale,
                              .stream = o->stream};
    return ts_local_attend(s->pool, s->local, &run);
}

/* Asks for the run, and hands over to the daemon's stream and back. */
static ts_status run_on_stream(ts_step *s, uint32_t layer, const ts_run_options *o)
{
    ts_pool *p = s->pool;
    ts_client *c = p->client;
    ts_cuda *cuda;
    ts_status status = ts_client_cuda(c, p, &cuda);
    if (status == TS_OK)
        status = ts_signals_open(c, p);
    if (status != TS_OK)
        return status;
    if (c->order_lost)
        return ts_fail(c, TS_ECONN,
                       "an earlier run went unanswered: the number is lost, connect again");
    uint32_t number = atomic_load(&c->runs_on_stream) + 1;
    status = run_by_daemon(s, layer, o, number);
    c->order_lost = status == TS_ETIMEOUT && c->posted.op == 0;
    if (status != TS_OK)
        return status;
    /* The daemon's stream waits already, or will; what is queued now lets it go on when q, k and v
     * are there. If the daemon goes meanwhile, this stream must not wait for it for ever. */
    atomic_store(&c->runs_on_stream, number);
    status =
        ts_cuda_hand_over(c, cuda, o->stream, c->signals_there + offsetof(ts_signals, submitted),
                          c->signals_there + offsetof(ts_signals, completed), number);
    if (atomic_load(&c->broken))
        ts_signals_daemon_gone(c);
    return status;
}

/* One run's arguments, for ts_autotune_runs. */
typedef struct run_args {
    ts_step *step;
    uint32_t layer;
    const ts_run_options *options;
} run_args;

static ts_status local_run(void *arg)
{
    const run_args *a = arg;
    return run_locally(a->step, a->layer, a->options);
}

static ts_status daemon_run(void *arg)
{
    const run_args *a = arg;
    return a->options->on_stream ? run_on_stream(a->step, a->layer, a->options)
                                 : run_by_daemon(a->step, a->layer, a->options, 0);
}

/* Both ways; a graph takes the one that can be captured. */
static ts_status run_both(run_args *a)
{
    static const ts_autotune_runs runs = {local_run, daemon_run};
    ts_step *s = a->step;
    ts_client *c = s->pool->client;
    if (!a->options->on_stream)
        return ts_autotune_run(c, &s->autotune, &runs, a);
    ts_cuda *cuda;
    bool captured;
    ts_status status = ts_client_cuda(c, s->pool, &cuda);
    if (status == TS_OK)
        status = ts_cuda_is_captured(c, cuda, a->options->stream, &captured);
    if (status != TS_OK)
        return status;
    if (captured) {
        c->last_exec = TS_EXEC_LOCAL;
        return local_run(a);
    }
    return ts_autotune_run_on_stream(c, cuda, &s->autotune, a->options->stream, &runs, a);
}

static ts_status run(ts_step *s, uint32_t layer, const ts_run_options *o)
{
    run_args args = {s, layer, o};
    s->pool->client->last_exec = s->exec;
    if (s->exec == TS_EXEC_DAEMON)
        return daemon_run(&args);
    ts_status status = s->exec == TS_EXEC_AUTO ? run_both(&args) : local_run(&args);
    if (status != TS_EINVAL && layer < s->pool->geometry.layers) { /* it was begun, at least */
        s->ran_here = true;
        ts_layer_set_put(&s->run_here, layer, status == TS_OK);
    }
    return status;
}

ts_status ts_step_run_with(ts_step *s, uint32_t layer, const ts_run_options *options)
{
    TS_ENTER(s->pool->client);
    ts_run_options o;
    ts_status status = ts_options_read(s->pool->client, TS_STRUCT_RUN_OPTIONS, options, &o);
    return status == TS_OK ? run(s, layer, &o) : status;
}

ts_status ts_step_run(ts_step *s, uint32_t layer)
{
    TS_ENTER(s->pool->client);
    static const ts_run_options plain;
    return run(s, layer, &plain);
}
