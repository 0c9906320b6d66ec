#include "client.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct ts_step {
    ts_pool *pool;
    uint64_t id;
    uint32_t count, tokens;
    uint32_t *starts, *new_tokens; /* per sequence */
    uint64_t *slots;               /* per new token */
    ts_region region;              /* of the exchange: q, k, v, out */
    size_t q, k, v, out;           /* offsets into the exchange */
    size_t sinks, alibi, lse, scales;
    uint32_t heads;
    ts_dtype io_dtype;
    float scale;
    ts_exec exec;    /* AUTO: both ways, to see which is quicker */
    ts_local *local; /* NULL: the daemon attends alone */
    ts_trial trial;
};

static void step_free(ts_step *s)
{
    if (s == NULL)
        return;
    free(s->starts);
    free(s->new_tokens);
    free(s->slots);
    ts_local_free(s->pool->client, s->local);
    ts_trial_drop(&s->trial);
    free(s);
}

static ts_step *step_new(ts_pool *p, const uint32_t *new_tokens, uint32_t count, uint32_t tokens)
{
    ts_step *s = calloc(1, sizeof *s);
    if (s == NULL)
        return NULL;
    s->pool = p;
    s->count = count;
    s->tokens = tokens;
    s->starts = malloc(count * sizeof *s->starts);
    s->new_tokens = malloc(count * sizeof *s->new_tokens);
    s->slots = malloc(tokens * sizeof *s->slots);
    if (s->starts == NULL || s->new_tokens == NULL || s->slots == NULL) {
        step_free(s);
        return NULL;
    }
    memcpy(s->new_tokens, new_tokens, count * sizeof *new_tokens);
    return s;
}

static ts_status call_end(ts_step *s, bool commit, const uint32_t *accepted);

/* What the daemon answers to a begin. */
typedef struct begun {
    const uint32_t *starts, *counts, *blocks; /* counts of blocks that the new tokens touch */
    size_t num_seqs, num_blocks;
    bool whole; /* they are whole block tables */
} begun;

/* Notes starts and slots, after checking that they add up. */
static ts_status fill_step(ts_step *s, const begun *b)
{
    ts_pool *p = s->pool;
    uint32_t block_tokens = p->geometry.block_tokens, token = 0;
    size_t block = 0;
    bool ok = b->num_seqs == s->count;
    for (uint32_t i = 0; ok && i < s->count; i++) {
        uint64_t end = (uint64_t)b->starts[i] + s->new_tokens[i];
        uint32_t first = b->whole ? 0 : b->starts[i] / block_tokens, count = b->counts[i];
        ok = count == (end - 1) / block_tokens + 1 - first && b->num_blocks - block >= count;
        s->starts[i] = b->starts[i];
        for (uint64_t t = s->starts[i]; ok && t < end; t++)
            s->slots[token++] =
                (uint64_t)b->blocks[block + t / block_tokens - first] * block_tokens +
                t % block_tokens;
        block += count;
    }
    return ok ? TS_OK : ts_fail(p->client, TS_EPROTO, "the daemon's answer doesn't fit the step");
}

/* Begins a step, or appends, in one message. The step's region is taken already. */
static ts_status begin_by_message(ts_step *s, const ts_seq *seqs, const ts_step_options *o,
                                  bool append)
{
    Tspb__StepBegin body = TSPB__STEP_BEGIN__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    body.pool = s->pool->index;
    body.seqs = (uint64_t *)seqs;
    body.new_tokens = s->new_tokens;
    body.n_seqs = body.n_new_tokens = s->count;
    body.heads = append || o->no_run ? 0 : o->heads;
    body.io_dtype = o->io_dtype;
    body.scale = o->scale;
    body.append = append;
    if (o->kernel != NULL)
        body.kernel = (char *)o->kernel;
    request.body_case = TSPB__REQUEST__BODY_STEP_BEGIN;
    request.step_begin = &body;
    ts_status status = ts_call(s->pool->client, &request, &reply);
    if (status != TS_OK)
        return status;
    const Tspb__StepBegun *b = reply->step_begun;
    if (reply->body_case != TSPB__REPLY__BODY_STEP_BEGUN || b->n_starts != b->n_counts) {
        status = ts_fail(s->pool->client, TS_EPROTO, "the daemon's answer begins no step");
    } else {
        s->id = b->step;
        status = fill_step(
            s, &(begun){b->starts, b->counts, b->blocks, b->n_starts, b->n_blocks, false});
        if (status == TS_OK)
            status = ts_pool_note_slabs(s->pool, b->slabs, b->n_slabs);
    }
    tspb__reply__free_unpacked(reply, NULL);
    return status;
}

/* The handle of memory that is one allocation comes in messages alone. */
static bool lacks_handle(const ts_pool *p)
{
    return strcmp(p->memory, "cuda-ipc") == 0 && !p->has_ipc_handle;
}

/* Whether a begin can go by the rings. */
static bool fits_ring(const ts_step *s, const ts_step_options *o)
{
    const ts_pool *p = s->pool;
    uint64_t blocks = 0;
    if (s->count > TS_RING_BATCH ||
        (o->kernel != NULL && strlen(o->kernel) >= sizeof(((ts_ring_entry *)0)->begin.kernel)))
        return false;
    if (p->num_slabs > TS_RING_SLABS)
        return false;
    if (lacks_handle(p))
        return false;
    for (uint32_t i = 0; i < s->count; i++)
        blocks += ts_ring_blocks(s->new_tokens[i], p->geometry.block_tokens);
    return blocks <= TS_RING_BLOCKS;
}

static ts_status begin_by_ring(ts_step *s, const ts_seq *seqs, const ts_step_options *o)
{
    ts_client *c = s->pool->client;
    ts_rings_memory *m = c->rings;
    ts_ring_completion done;
    ts_ring_entry entry = {.op = TS_RING_BEGIN,
                           .begin = {.pool = s->pool->index,
                                     .count = s->count,
                                     .heads = o->no_run ? 0 : o->heads,
                                     .io_dtype = o->io_dtype,
                                     .scale = o->scale,
                                     .flags = s->exec != TS_EXEC_DAEMON ? TS_RING_TABLES : 0u}};
    if (o->kernel != NULL)
        memcpy(entry.begin.kernel, o->kernel, strlen(o->kernel));
    memcpy(m->batch_seqs, seqs, s->count * sizeof *seqs);
    memcpy(m->batch_words, s->new_tokens, s->count * sizeof *s->new_tokens);
    ts_status status = ts_ring_call(c, &entry, &done);
    if (status != TS_OK)
        return status;
    s->id = done.step;
    if (done.num_blocks > TS_RING_BLOCKS || done.num_slabs > TS_RING_SLABS)
        return ts_fail(c, TS_EPROTO, "the daemon's answer doesn't fit the step");
    status = fill_step(s, &(begun){m->begun_starts, m->begun_counts, m->begun_blocks, s->count,
                                   done.num_blocks, s->exec != TS_EXEC_DAEMON});
    for (uint32_t i = 0; i < done.num_slabs && status == TS_OK; i++)
        status = ts_pool_note_slab(s->pool, m->begun_slabs[i].slab, m->begun_slabs[i].generation);
    return status;
}

static ts_status call_begin(ts_step *s, const ts_seq *seqs, const ts_step_options *o, bool append)
{
    ts_client *c = s->pool->client;
    bool use = false;
    ts_status status = append ? TS_OK : ts_rings_use(c, &use);
    if (status == TS_OK && !append && !o->no_run)
        status = ts_local_choose(c, s->pool, &s->exec);
    if (status != TS_OK)
        return status;
    if (s->exec != TS_EXEC_DAEMON && lacks_handle(s->pool)) { /* once: begun and dropped for it */
        status = begin_by_message(s, seqs, o, false);
        if (status == TS_OK)
            status = call_end(s, false, NULL);
        if (status != TS_OK)
            return status;
    }
    if (!use || !fits_ring(s, o)) {
        if (s->exec == TS_EXEC_LOCAL)
            return ts_fail(c, TS_EINVAL,
                           "local execution of a step of %u sequences and %u tokens: a ring begins "
                           "%u sequences and %u blocks at most",
                           s->count, s->tokens, TS_RING_BATCH, TS_RING_BLOCKS);
        s->exec = TS_EXEC_DAEMON;
        return begin_by_message(s, seqs, o, append);
    }
    status = begin_by_ring(s, seqs, o);
    if (status == TS_EINVAL && s->exec != TS_EXEC_DAEMON && c->exec == TS_EXEC_AUTO) {
        s->exec = TS_EXEC_DAEMON; /* the block tables may be more than a ring can tell of */
        status = begin_by_ring(s, seqs, o);
    }
    if (status != TS_OK || s->exec == TS_EXEC_DAEMON)
        return status;
    const ts_rings_memory *m = c->rings;
    size_t num_blocks = 0;
    for (uint32_t i = 0; i < s->count; i++)
        num_blocks +=
            ((size_t)s->starts[i] + s->new_tokens[i] - 1) / s->pool->geometry.block_tokens + 1;
    status = ts_local_new(s->pool, m->begun_blocks, m->begun_counts, num_blocks, s->starts,
                          s->new_tokens, s->count, &s->local);
    if (status == TS_OK && s->pool->on_gpu)
        status = ts_local_plan(s->pool, s->local, s->heads, s->io_dtype, o->kernel);
    if (status != TS_OK) /* the daemon has begun it */
        (void)call_end(s, false, NULL);
    return status;
}

/* The sum of new_tokens, or refuses. */
static ts_status add_tokens(ts_pool *p, const uint32_t *new_tokens, uint32_t count,
                            uint32_t *tokens)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < count; i++)
        sum += new_tokens[i];
    if (count == 0 || sum == 0 || sum > UINT32_MAX)
        return ts_fail(p->client, TS_EINVAL,
                       "%llu new tokens for %u sequences; each gets at least 1",
                       (unsigned long long)sum, count);
    *tokens = (uint32_t)sum;
    return TS_OK;
}

static size_t align(size_t bytes)
{
    return (bytes + TS_EXCHANGE_ALIGN - 1) / TS_EXCHANGE_ALIGN * TS_EXCHANGE_ALIGN;
}

ts_status ts_step_begin(ts_pool *p, const ts_seq *seqs, const uint32_t *new_tokens, uint32_t count,
                        const ts_step_options *options, ts_step **out)
{
    ts_step_options o = options != NULL ? *options : (ts_step_options){0};
    const ts_geometry *g = &p->geometry;
    uint32_t tokens;
    *out = NULL;
    if (o.heads == 0)
        o.heads = g->kv_heads;
    if (o.heads > TS_HEADS_MAX)
        return ts_fail(p->client, TS_EINVAL, "%u query heads; the limit is %u", o.heads,
                       TS_HEADS_MAX);
    ts_status status = add_tokens(p, new_tokens, count, &tokens);
    if (status != TS_OK)
        return status;
    ts_step *s = step_new(p, new_tokens, count, tokens);
    if (s == NULL)
        return ts_fail(p->client, TS_ENOMEM, "no memory for a step of %u tokens", tokens);
    size_t row = (size_t)tokens * g->head_dim * ts_dtype_bytes(o.io_dtype);
    size_t q = align(row * o.heads), kv = align(row * g->kv_heads);
    size_t each_head = align(o.heads * sizeof(float));
    if (!o.no_run) {
        s->region.bytes = 2 * q + 2 * kv + 2 * each_head + align(tokens * o.heads * sizeof(float)) +
                          align(2 * g->kv_heads * sizeof(float));
        status = ts_exchange_take(p->client, &s->region);
    }
    if (status != TS_OK) {
        step_free(s);
        return status;
    }
    s->q = s->region.offset;
    s->k = s->q + q;
    s->v = s->k + kv;
    s->out = s->v + kv;
    s->sinks = s->out + q;
    s->alibi = s->sinks + each_head;
    s->lse = s->alibi + each_head;
    s->scales = s->lse + align(tokens * o.heads * sizeof(float));
    s->heads = o.heads;
    s->io_dtype = o.io_dtype;
    s->scale = o.scale > 0 ? o.scale : 1.0f / sqrtf((float)g->head_dim);
    status = call_begin(s, seqs, &o, false);
    if (status != TS_OK) {
        ts_exchange_give(p->client, &s->region);
        step_free(s);
        return status;
    }
    *out = s;
    return TS_OK;
}

ts_status ts_seq_append(ts_pool *p, const ts_seq *seqs, const uint32_t *new_tokens, uint32_t count,
                        uint64_t *slots)
{
    static const ts_step_options none;
    uint32_t tokens;
    ts_status status = add_tokens(p, new_tokens, count, &tokens);
    if (status != TS_OK)
        return status;
    ts_step *s = step_new(p, new_tokens, count, tokens);
    if (s == NULL)
        return ts_fail(p->client, TS_ENOMEM, "no memory for an append of %u tokens", tokens);
    status = call_begin(s, seqs, &none, true);
    if (status == TS_OK && slots != NULL)
        memcpy(slots, s->slots, tokens * sizeof *slots);
    step_free(s);
    return status;
}

uint32_t ts_step_tokens(const ts_step *s)
{
    return s->tokens;
}

uint32_t ts_step_start(const ts_step *s, uint32_t i)
{
    return i < s->count ? s->starts[i] : 0;
}

void *ts_step_q(const ts_step *s)
{
    return s->pool->client->exchange + s->q;
}

void *ts_step_k(const ts_step *s)
{
    return s->pool->client->exchange + s->k;
}

void *ts_step_v(const ts_step *s)
{
    return s->pool->client->exchange + s->v;
}

const void *ts_step_out(const ts_step *s)
{
    return s->pool->client->exchange + s->out;
}

static float *floats_at(const ts_step *s, size_t offset)
{
    return (float *)(void *)(s->pool->client->exchange + offset); /* aligned to 64 bytes */
}

float *ts_step_sinks(const ts_step *s)
{
    return floats_at(s, s->sinks);
}

float *ts_step_alibi(const ts_step *s)
{
    return floats_at(s, s->alibi);
}

float *ts_step_scales(const ts_step *s)
{
    return floats_at(s, s->scales);
}

const float *ts_step_lse(const ts_step *s)
{
    return floats_at(s, s->lse);
}

void ts_step_slots(const ts_step *s, uint64_t *slots)
{
    memcpy(slots, s->slots, s->tokens * sizeof *slots);
}

static ts_status run_by_message(ts_step *s, uint32_t layer, const ts_run_options *o, uint32_t order)
{
    Tspb__StepRun body = TSPB__STEP_RUN__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    body.step = s->id;
    body.layer = layer;
    body.q = s->q;
    body.k = s->k;
    body.v = s->v;
    body.out = s->out;
    body.scale = o->scale;
    body.soft_cap = o->soft_cap;
    body.window = o->window;
    body.rope_theta = o->rope_theta;
    body.rope_dims = o->rope_dims;
    body.rope_interleaved = o->rope_interleaved;
    body.has_sinks = o->sinks;
    body.sinks = s->sinks;
    body.has_scales = o->scales;
    body.scales = s->scales;
    body.has_alibi = o->alibi;
    body.alibi = s->alibi;
    body.has_lse = o->lse;
    body.lse = s->lse;
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
                .q = s->q,
                .k = s->k,
                .v = s->v,
                .out = s->out,
                .sinks = s->sinks,
                .alibi = s->alibi,
                .lse = s->lse,
                .scales = s->scales,
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
    unsigned char *x = s->pool->client->exchange;
    const ts_local_run run = {
        .layer = layer,
        .heads = s->heads,
        .io_dtype = s->io_dtype,
        .variant = {.scale = o->scale != 0 ? o->scale : s->scale,
                    .soft_cap = o->soft_cap,
                    .window = o->window,
                    .rope = {o->rope_theta, o->rope_dims, o->rope_interleaved}},
        .q = x + s->q,
        .k = x + s->k,
        .v = x + s->v,
        .out = x + s->out,
        .sinks = o->sinks ? floats_at(s, s->sinks) : NULL,
        .alibi = o->alibi ? floats_at(s, s->alibi) : NULL,
        .lse = o->lse ? floats_at(s, s->lse) : NULL,
        .scales = o->scales ? floats_at(s, s->scales) : NULL,
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

ts_status ts_step_run_with(ts_step *s, uint32_t layer, const ts_run_options *o)
{
    run_args args = {s, layer, o};
    s->pool->client->last_exec = s->exec;
    return s->exec == TS_EXEC_AUTO    ? run_both(&args)
           : s->exec == TS_EXEC_LOCAL ? way_here(&args)
                                      : way_there(&args);
}

ts_status ts_step_run(ts_step *s, uint32_t layer)
{
    static const ts_run_options plain;
    return ts_step_run_with(s, layer, &plain);
}

static void step_end(ts_step *s)
{
    ts_exchange_give(s->pool->client, &s->region);
    step_free(s);
}

/* Commits (accepted NULL: all), or aborts. */
static ts_status call_end(ts_step *s, bool commit, const uint32_t *accepted)
{
    ts_client *c = s->pool->client;
    Tspb__StepCommit body = TSPB__STEP_COMMIT__INIT;
    Tspb__StepAbort abort = TSPB__STEP_ABORT__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    bool use;
    /* Blocks whose K and V are still being written, or read, are nobody else's yet. */
    ts_status status = s->local != NULL && s->pool->on_gpu ? ts_local_gpu_await(c) : TS_OK;
    if (status != TS_OK && commit)
        return status;
    status = ts_rings_use(c, &use);
    if (status != TS_OK)
        return status;
    if (use && (accepted == NULL || s->count <= TS_RING_BATCH)) {
        ts_ring_completion done;
        ts_ring_entry entry = {.op = commit ? TS_RING_COMMIT : TS_RING_ABORT, .step = s->id};
        if (accepted != NULL) {
            memcpy(c->rings->batch_words, accepted, s->count * sizeof *accepted);
            entry.commit.count = s->count;
        }
        return ts_ring_call(c, &entry, &done);
    }
    abort.step = body.step = s->id;
    body.accepted = (uint32_t *)accepted;
    body.n_accepted = accepted != NULL ? s->count : 0;
    request.body_case = commit ? TSPB__REQUEST__BODY_STEP_COMMIT : TSPB__REQUEST__BODY_STEP_ABORT;
    if (commit)
        request.step_commit = &body;
    else
        request.step_abort = &abort;
    return ts_call_plain(c, &request);
}

ts_status ts_step_commit(ts_step *s, const uint32_t *accepted)
{
    ts_status status = call_end(s, true, accepted);
    if (status != TS_OK)
        return status;
    if (s->exec == TS_EXEC_AUTO)
        ts_trial_settle(s->pool->client, &s->trial);
    step_end(s);
    return TS_OK;
}

ts_status ts_step_abort(ts_step *s)
{
    if (s == NULL)
        return TS_OK;
    ts_status status = call_end(s, false, NULL);
    step_end(s);
    return status;
}
