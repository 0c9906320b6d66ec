/* Runs of a step's layers: by message, by ring, here, or both ways. */
#include "step.h"

#include "error.h"
#include "gpu_context.h"
#include "options.h"
#include "ring_client.h"
#include "rpc.h"
#include "stream_signals.h"

static ts_status run_by_message(ts_step *s, uint32_t layer, const ts_run_options *o, uint32_t order)
{
    Tspb__StepRun body = TSPB__STEP_RUN__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    body.step = s->id;
    body.layer = layer;
    body.q = s->at.q;
    body.k = s->at.k;
    body.v = s->at.v;
    body.out = s->at.out;
    body.scale = o->scale;
    body.soft_cap = o->soft_cap;
    body.window = o->window;
    body.rope_theta = o->rope_theta;
    body.rope_dims = o->rope_dims;
    body.rope_interleaved = o->rope_interleaved;
    body.has_sinks = o->sinks;
    body.sinks = s->at.sinks;
    body.has_scales = o->scales;
    body.scales = s->at.scales;
    body.has_alibi = o->alibi;
    body.alibi = s->at.alibi;
    body.has_lse = o->lse;
    body.lse = s->at.lse;
    body.ordered = o->on_stream;
    body.order = order;
    request.body_case = TSPB__REQUEST__BODY_STEP_RUN;
    request.step_run = &body;
    return ts_call_plain(s->pool->client, &request);
}

static ts_status run_by_ring(ts_step *s, uint32_t layer, const ts_run_options *o, uint32_t order)
{
    ts_ring_completion done;
    ts_ring_entry entry = {
        .op = TS_RING_RUN,
        .step = s->id,
        .run = {.layer = layer,
                .flags = (o->sinks ? TS_RING_SINKS : 0u) | (o->alibi ? TS_RING_ALIBI : 0u) |
                         (o->scales ? TS_RING_SCALES : 0u) | (o->lse ? TS_RING_LSE : 0u) |
                         (o->rope_interleaved ? TS_RING_INTERLEAVED : 0u) |
                         (o->on_stream ? TS_RING_ORDERED : 0u),
                .q = s->at.q,
                .k = s->at.k,
                .v = s->at.v,
                .out = s->at.out,
                .sinks = s->at.sinks,
                .alibi = s->at.alibi,
                .lse = s->at.lse,
                .scales = s->at.scales,
                .scale = o->scale,
                .soft_cap = o->soft_cap,
                .rope_theta = o->rope_theta,
                .window = o->window,
                .rope_dims = o->rope_dims,
                .order = order}};
    return ts_ring_call(s->pool->client, &entry, &done);
}

static ts_status run_there(ts_step *s, uint32_t layer, const ts_run_options *o, uint32_t order)
{
    bool use;
    ts_status status = ts_rings_use(s->pool->client, &use);
    if (status != TS_OK)
        return status;
    return use ? run_by_ring(s, layer, o, order) : run_by_message(s, layer, o, order);
}

static ts_status run_here(ts_step *s, uint32_t layer, const ts_run_options *o)
{
    const ts_local_run run = {
        .layer = layer,
        .heads = s->heads,
        .io_dtype = s->io_dtype,
        .variant = {.scale = o->scale != 0 ? o->scale : s->scale,
                    .soft_cap = o->soft_cap,
                    .window = o->window,
                    .rope = {o->rope_theta, o->rope_dims, o->rope_interleaved}},
        .q = ts_step_q(s),
        .k = ts_step_k(s),
        .v = ts_step_v(s),
        .out = s->pool->client->exchange + s->at.out,
        .sinks = o->sinks ? ts_step_sinks(s) : NULL,
        .alibi = o->alibi ? ts_step_alibi(s) : NULL,
        .lse = o->lse ? (float *)(void *)(s->pool->client->exchange + s->at.lse) : NULL,
        .scales = o->scales ? ts_step_scales(s) : NULL,
        .on_stream = o->on_stream,
        .stream = o->stream,
    };
    return ts_local_attend(s->pool, s->local, &run);
}

/* Asks for the run and, when the daemon has taken it, hands over to its stream and back. */
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
                       "an earlier run went unanswered: the order is lost, connect again");
    uint32_t order = atomic_load(&c->ordered) + 1;
    status = run_there(s, layer, o, order);
    c->order_lost = status == TS_ETIMEOUT;
    if (status != TS_OK)
        return status;
    /* The daemon's stream waits already; what is queued now lets it go on when q, k and v are
     * there. If the daemon goes meanwhile, this stream must not wait for it. */
    atomic_store(&c->ordered, order);
    status =
        ts_cuda_hand_over(c, cuda, o->stream, c->signals_there + offsetof(ts_signals, submitted),
                          c->signals_there + offsetof(ts_signals, completed), order);
    if (atomic_load(&c->broken))
        ts_signals_let_go(c);
    return status;
}

/* One run's arguments, for ts_trial_ways. */
typedef struct run_args {
    ts_step *step;
    uint32_t layer;
    const ts_run_options *options;
} run_args;

static ts_status way_here(void *arg)
{
    const run_args *a = arg;
    return run_here(a->step, a->layer, a->options);
}

static ts_status way_there(void *arg)
{
    const run_args *a = arg;
    return a->options->on_stream ? run_on_stream(a->step, a->layer, a->options)
                                 : run_there(a->step, a->layer, a->options, 0);
}

/* Both ways; a graph takes the one that can be captured. */
static ts_status run_both(run_args *a)
{
    static const ts_trial_ways ways = {way_here, way_there};
    ts_step *s = a->step;
    ts_client *c = s->pool->client;
    if (!a->options->on_stream)
        return ts_trial_run(c, &s->trial, &ways, a);
    ts_cuda *cuda;
    bool captured;
    ts_status status = ts_client_cuda(c, s->pool, &cuda);
    if (status == TS_OK)
        status = ts_cuda_is_captured(c, cuda, a->options->stream, &captured);
    if (status != TS_OK)
        return status;
    if (captured) {
        c->last_exec = TS_EXEC_LOCAL;
        return way_here(a);
    }
    return ts_trial_run_on_stream(c, cuda, &s->trial, a->options->stream, &ways, a);
}

static ts_status run(ts_step *s, uint32_t layer, const ts_run_options *o)
{
    run_args args = {s, layer, o};
    s->pool->client->last_exec = s->exec;
    return s->exec == TS_EXEC_AUTO    ? run_both(&args)
           : s->exec == TS_EXEC_LOCAL ? way_here(&args)
                                      : way_there(&args);
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
