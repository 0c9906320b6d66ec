/* Steps: how they begin and end, and where their data lies. */
#include "step.h"

#include "block_table_cache.h"
#include "error.h"
#include "exchange.h"
#include "gpu_context.h"
#include "local_gpu.h"
#include "options.h"
#include "pool_map.h"
#include "ring_client.h"
#include "rpc.h"
#include "unanswered.h"
#include "unconst.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void ts_step_free(ts_step *s)
{
    if (s == NULL)
        return;
    free(s->seqs);
    free(s->starts);
    free(s->new_tokens);
    free(s->slots);
    ts_local_free(s->pool->client, s->local);
    ts_autotune_drop(&s->autotune);
    free(s);
}

ts_step *ts_step_new(ts_pool *p, const ts_seq *seqs, const uint32_t *new_tokens, uint32_t count,
                     uint32_t tokens)
{
    ts_step *s = calloc(1, sizeof *s);
    if (s == NULL)
        return NULL;
    s->pool = p;
    s->count = count;
    s->tokens = tokens;
    s->seqs = malloc(count * sizeof *s->seqs);
    s->starts = malloc(count * sizeof *s->starts);
    s->new_tokens = malloc(count * sizeof *s->new_tokens);
    s->slots = malloc(tokens * sizeof *s->slots);
    if (s->seqs == NULL || s->starts == NULL || s->new_tokens == NULL || s->slots == NULL) {
        ts_step_free(s);
        return NULL;
    }
    memcpy(s->seqs, seqs, count * sizeof *seqs);
    memcpy(s->new_tokens, new_tokens, count * sizeof *new_tokens);
    return s;
}

static ts_status call_end(ts_step *s, bool commit, const uint32_t *accepted);
static ts_status call_abort(ts_step *s);

/* Notes starts and slots, after checking that they add up. */
static ts_status fill_step(ts_step *s, const ts_begun *b)
{
    ts_pool *p = s->pool;
    uint32_t block_tokens = p->geometry.block_tokens, token = 0;
    size_t block = 0;
    bool ok = b->num_seqs == s->count;
    for (uint32_t i = 0; ok && i < s->count; i++) {
        uint64_t end = (uint64_t)b->starts[i] + s->new_tokens[i];
        uint32_t touched = ts_first_touched(b->starts[i], s->new_tokens[i], block_tokens);
        uint32_t count = b->counts[i];
        uint32_t first = b->firsts != NULL ? b->firsts[i] : touched;
        uint32_t told = s->new_tokens[i] == 0 ? 0 : ts_blocks_for(end, block_tokens) - first;
        ok = first <= touched && count == told && b->num_blocks - block >= count;
        s->starts[i] = b->starts[i];
        for (uint64_t t = s->starts[i]; ok && t < end; t++) {
            uint64_t entry = ts_whole_blocks(t, block_tokens);
            s->slots[token++] = (uint64_t)b->blocks[block + entry - first] * block_tokens +
                                (t - entry * block_tokens);
        }
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
    body.seqs = ts_unconst(seqs);
    body.new_tokens = s->new_tokens;
    body.n_seqs = body.n_new_tokens = s->count;
    body.heads = append || o->no_run ? 0 : o->heads;
    body.io_dtype = o->io_dtype;
    body.scale = o->scale;
    body.append = append;
    body.wait_ms = o->wait_ms;
    body.priority = o->priority;
    if (o->tokens != NULL) {
        body.tokens = ts_unconst(o->tokens);
        body.n_tokens = s->tokens;
    }
    if (o->kernel != NULL)
        body.kernel = ts_unconst(o->kernel);
    request.body_case = TSPB__REQUEST__BODY_STEP_BEGIN;
    request.step_begin = &body;
    if (!append)
        s->pool->client->last_transport = TS_TRANSPORT_MESSAGES;
    ts_status status = ts_call(s->pool->client, &request, &reply);
    if (status == TS_ETIMEOUT && !append)
        ts_unanswered_by_message(s->pool->client, &request, s->pool->index);
    if (status != TS_OK)
        return status;
    const Tspb__StepBegun *b = reply->step_begun;
    if (reply->body_case != TSPB__REPLY__BODY_STEP_BEGUN || b->n_starts != b->n_counts) {
        status = ts_fail(s->pool->client, TS_EPROTO, "the daemon's answer begins no step");
    } else {
        s->id = b->step;
        status = fill_step(s, &(ts_begun){.starts = b->starts,
                                          .blocks = b->blocks,
                                          .counts = b->counts,
                                          .num_seqs = b->n_starts,
                                          .num_blocks = b->n_blocks});
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
    if (p->num_slabs > p->client->ring_slabs ||
        (o->tokens != NULL && s->tokens > p->client->ring_ids))
        return false;
    if (lacks_handle(p))
        return false;
    for (uint32_t i = 0; i < s->count; i++)
        blocks += ts_ring_blocks(s->new_tokens[i], p->geometry.block_tokens);
    return blocks <= p->client->ring_blocks;
}

/* *b lies in the rings' memory until the next begin. */
static ts_status begin_by_ring(ts_step *s, const ts_seq *seqs, const ts_step_options *o,
                               ts_begun *b)
{
    ts_client *c = s->pool->client;
    ts_rings_memory *m = c->rings;
    bool tables = s->exec != TS_EXEC_DAEMON;
    ts_ring_completion done;
    ts_ring_entry entry = {.op = TS_RING_BEGIN,
                           .begin = {.pool = s->pool->index,
                                     .count = s->count,
                                     .heads = o->no_run ? 0 : o->heads,
                                     .io_dtype = o->io_dtype,
                                     .scale = o->scale,
                                     .flags = (tables ? TS_RING_TABLES : 0u) |
                                              (o->tokens != NULL ? TS_RING_TOKENS : 0u),
                                     .wait_ms = o->wait_ms,
                                     .priority = o->priority}};
    if (o->kernel != NULL)
        memcpy(entry.begin.kernel, o->kernel, strlen(o->kernel));
    if (tables)
        ts_tables_known_steps(s->pool, seqs, s->count, m->batch_known_step);
    memcpy(m->batch_seqs, seqs, s->count * sizeof *seqs);
    memcpy(m->batch_words, s->new_tokens, s->count * sizeof *s->new_tokens);
    if (o->tokens != NULL)
        memcpy(ts_rings_ids(m, c->ring_blocks, c->ring_slabs), o->tokens,
               s->tokens * sizeof *o->tokens);
    c->last_transport = TS_TRANSPORT_RING;
    ts_status status = ts_ring_call(c, &entry, &done);
    if (status == TS_ETIMEOUT)
        ts_unanswered_by_ring(c, s->pool->index, 0);
    if (status != TS_OK)
        return status;
    s->id = done.step;
    if (done.num_blocks > c->ring_blocks || done.num_slabs > c->ring_slabs)
        return ts_fail(c, TS_EPROTO, "the daemon's answer doesn't fit the step");
    *b = (ts_begun){.starts = m->begun_starts,
                    .firsts = tables ? m->begun_firsts : NULL,
                    .counts = m->begun_counts,
                    .blocks = ts_rings_blocks(m, c->ring_slabs),
                    .num_seqs = s->count,
                    .num_blocks = done.num_blocks};
    status = fill_step(s, b);
    const ts_ring_slab *slabs = ts_rings_slabs(m);
    for (uint32_t i = 0; i < done.num_slabs && status == TS_OK; i++)
        status = ts_pool_note_slab(s->pool, slabs[i].slab, slabs[i].generation);
    return status;
}

static ts_status call_begin(ts_step *s, const ts_seq *seqs, const ts_step_options *o, bool append)
{
    ts_client *c = s->pool->client;
    bool use = false;
    ts_status status = TS_OK;
    if (o->tokens != NULL)
        ts_rings_want_ids(c, s->tokens);
    if (!append && !o->no_run)
        status =
            s->frame != NULL ? ts_local_require(c, s->pool) : ts_local_choose(c, s->pool, &s->exec);
    if (status == TS_OK && !append) /* last: they may have become free for use just now */
        status = ts_rings_use(c, &use);
    if (status != TS_OK)
        return status;
    if (s->exec != TS_EXEC_DAEMON && lacks_handle(s->pool)) { /* once: begun and dropped for it */
        status = begin_by_message(s, seqs, o, false);
        if (status == TS_OK)
            status = call_abort(s);
        if (status != TS_OK)
            return status;
    }
    if (!use || !fits_ring(s, o)) {
        if (s->exec == TS_EXEC_LOCAL)
            return ts_fail(c, TS_EINVAL,
                           "local execution of a step of %u sequences and %u tokens: a ring begins "
                           "%u sequences and %u blocks at most",
                           s->count, s->tokens, TS_RING_BATCH, c->ring_blocks);
        s->exec = TS_EXEC_DAEMON;
        return begin_by_message(s, seqs, o, append);
    }
    ts_begun b;
    const ts_last_error last = c->error;
    status = begin_by_ring(s, seqs, o, &b);
    if (status == TS_EINVAL && s->exec != TS_EXEC_DAEMON && c->exec == TS_EXEC_AUTO) {
        c->error = last;
        s->exec = TS_EXEC_DAEMON; /* the block tables may be more than a ring can tell of */
        status = begin_by_ring(s, seqs, o, &b);
    }
    if (status != TS_OK || s->exec == TS_EXEC_DAEMON)
        return status;
    status = ts_local_new(s->pool, s->id, seqs, s->new_tokens, &b, &s->local);
    if (status == TS_OK && s->frame != NULL)
        status = ts_local_plan_in(s->pool, s->local, s->frame->plan);
    else if (status == TS_OK && s->pool->on_gpu)
        status = ts_local_plan(s->pool, s->local, s->heads, s->io_dtype, o->kernel);
    if (status != TS_OK) { /* the daemon has begun it */
        const ts_last_error why = c->error;
        (void)call_abort(s);
        c->error = why;
    }
    return status;
}

ts_status ts_step_call_begin(ts_step *s, const ts_seq *seqs, const ts_step_options *o, bool append)
{
    ts_client *c = s->pool->client;
    s->publishes = o->tokens != NULL;
    c->wait_ms = o->wait_ms;
    ts_status status = call_begin(s, seqs, o, append);
    c->wait_ms = 0;
    return status;
}

/* The daemon is asked for up to this many new tokens even if the pool has no slots for them: its
 * sentence says more. */
#define ASKED_ANYWAY (1u << 20)

/* The sum of new_tokens; or refuses, before anything is allocated for them. */
static ts_status add_tokens(ts_pool *p, const ts_seq *seqs, const uint32_t *new_tokens,
                            uint32_t count, uint32_t *tokens)
{
    uint64_t sum = 0, slots = (uint64_t)p->num_blocks * p->geometry.block_tokens;
    for (uint32_t i = 0; i < count; i++) {
        sum += new_tokens[i];
        if (new_tokens[i] > p->sequence_tokens_max)
            return ts_fail_beyond(
                p->client, TS_EINVAL, new_tokens[i], p->sequence_tokens_max,
                "%u new tokens for sequence %llx; the pool's limit is %u tokens a "
                "sequence",
                new_tokens[i], (unsigned long long)seqs[i], p->sequence_tokens_max);
    }
    if (count == 0 || sum == 0)
        return ts_fail(p->client, TS_EINVAL,
                       "a step of %u sequences has 0 new tokens; it needs at least 1", count);
    if (sum > UINT32_MAX)
        return ts_fail_beyond(p->client, TS_EINVAL, sum, UINT32_MAX,
                              "%llu new tokens for %u sequences; the limit is %u",
                              (unsigned long long)sum, count, UINT32_MAX);
    if (sum > slots && sum > ASKED_ANYWAY)
        return ts_fail_beyond(p->client, TS_ENOSPC, sum, slots,
                              "%llu new tokens; the pool has %llu slots in all",
                              (unsigned long long)sum, (unsigned long long)slots);
    *tokens = (uint32_t)sum;
    return TS_OK;
}

/* Sets *at, and says where what follows may lie. */
static size_t lay(uint64_t *at, size_t where, size_t bytes)
{
    *at = where;
    return where + (bytes + TS_EXCHANGE_ALIGN - 1) / TS_EXCHANGE_ALIGN * TS_EXCHANGE_ALIGN;
}

size_t ts_step_lay_out(const ts_geometry *g, uint32_t heads, ts_dtype io_dtype, uint32_t tokens,
                       size_t start, ts_layer_run *at)
{
    size_t row = (size_t)tokens * g->head_dim * ts_dtype_bytes(io_dtype);
    size_t end = lay(&at->q, start, row * heads);
    end = lay(&at->k, end, row * g->kv_heads);
    end = lay(&at->v, end, row * g->kv_heads);
    end = lay(&at->out, end, row * heads);
    end = lay(&at->sinks, end, heads * sizeof(float));
    end = lay(&at->alibi, end, heads * sizeof(float));
    end = lay(&at->lse, end, (size_t)tokens * heads * sizeof(float));
    end = lay(&at->scales, end, 2 * g->kv_heads * sizeof(float));
    return end - start;
}

/* Asks for a step that has more tokens than the pool has slots before any memory is taken for them:
 * the daemon refuses it, unless the pool has grown; then nothing has happened. */
static ts_status ask_first(ts_step *s, const ts_seq *seqs, const ts_step_options *o)
{
    ts_client *c = s->pool->client;
    c->wait_ms = o->wait_ms;
    const ts_status status = begin_by_message(s, seqs, o, false);
    c->wait_ms = 0;
    return status == TS_OK ? call_abort(s) : status;
}

/* Ids that are compared to say more of an error. */
#define COMPARED_MOST (1u << 20)

static bool has_sequence(const ts_step *s, ts_seq seq)
{
    for (uint32_t i = 0; i < s->count; i++)
        if (s->seqs[i] == seq)
            return true;
    return false;
}

/* The exchange has no room beside the steps that are open. One of them may have a sequence of this
 * one, as when its commit was forgotten: more room would be of no use then. */
static ts_status no_room(const ts_step *s)
{
    ts_client *c = s->pool->client;
    for (const ts_region *r = c->regions; r != NULL; r = r->next)
        for (uint32_t i = 0; r->step != NULL && r->step->pool == s->pool && i < s->count &&
                             (uint64_t)s->count * r->step->count <= COMPARED_MOST;
             i++)
            if (has_sequence(r->step, s->seqs[i]))
                return ts_fail(c, TS_EBUSY,
                               "sequence %llx is in open step %llx of this client: commit or abort "
                               "that first",
                               (unsigned long long)s->seqs[i], (unsigned long long)r->step->id);
    return TS_EBUSY;
}

ts_status ts_step_begin(ts_pool *p, const ts_seq *seqs, const uint32_t *new_tokens, uint32_t count,
                        const ts_step_options *options, ts_step **out)
{
    ts_step_options o;
    const ts_geometry *g = &p->geometry;
    uint32_t tokens;
    *out = NULL;
    TS_ENTER(p->client);
    ts_status status = ts_options_read(p->client, TS_STRUCT_STEP_OPTIONS, options, &o);
    if (status != TS_OK)
        return status;
    if (o.heads == 0)
        o.heads = g->kv_heads;
    if (o.heads > TS_HEADS_MAX)
        return ts_fail_beyond(p->client, TS_EINVAL, o.heads, TS_HEADS_MAX,
                              "%u query heads; the limit is %u", o.heads, TS_HEADS_MAX);
    status = add_tokens(p, seqs, new_tokens, count, &tokens);
    if (status != TS_OK)
        return status;
    ts_step *s = ts_step_new(p, seqs, new_tokens, count, tokens);
    if (s == NULL)
        return ts_fail(p->client, TS_ENOMEM, "no memory for a step of %u tokens", tokens);
    s->heads = o.heads;
    s->io_dtype = o.io_dtype;
    s->scale = o.scale > 0 ? o.scale : 1.0f / sqrtf((float)g->head_dim);
    s->writes_itself = o.no_run && p->on_gpu;
    if (!o.no_run && tokens > (uint64_t)p->num_blocks * g->block_tokens)
        status = ask_first(s, seqs, &o);
    if (status == TS_OK && !o.no_run) {
        s->region.bytes = ts_step_lay_out(g, o.heads, o.io_dtype, tokens, 0, &s->at);
        status = ts_exchange_take(p->client, &s->region);
        if (status == TS_EBUSY)
            status = no_room(s);
        s->region.step = s;
    }
    if (status != TS_OK) {
        ts_step_free(s);
        return status;
    }
    (void)ts_step_lay_out(g, o.heads, o.io_dtype, tokens, s->region.offset, &s->at);
    status = ts_step_call_begin(s, seqs, &o, false);
    if (status != TS_OK) {
        ts_exchange_give(p->client, &s->region);
        ts_step_free(s);
        return status;
    }
    *out = s;
    return TS_OK;
}

ts_status ts_seq_append(ts_pool *p, const ts_seq *seqs, const uint32_t *new_tokens, uint32_t count,
                        uint64_t *slots)
{
    TS_ENTER(p->client);
    static const ts_step_options none;
    uint32_t tokens;
    ts_status status = add_tokens(p, seqs, new_tokens, count, &tokens);
    if (status != TS_OK)
        return status;
    ts_step *s = ts_step_new(p, seqs, new_tokens, count, tokens);
    if (s == NULL)
        return ts_fail(p->client, TS_ENOMEM, "no memory for an append of %u tokens", tokens);
    status = ts_step_call_begin(s, seqs, &none, true);
    if (status == TS_OK && slots != NULL)
        memcpy(slots, s->slots, tokens * sizeof *slots);
    ts_step_free(s);
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
    return s->pool->client->exchange + s->at.q;
}

void *ts_step_k(const ts_step *s)
{
    return s->pool->client->exchange + s->at.k;
}

void *ts_step_v(const ts_step *s)
{
    return s->pool->client->exchange + s->at.v;
}

const void *ts_step_out(const ts_step *s)
{
    return s->pool->client->exchange + s->at.out;
}

static float *floats_at(const ts_step *s, size_t offset)
{
    return (float *)(void *)(s->pool->client->exchange + offset); /* aligned to 64 bytes */
}

float *ts_step_sinks(const ts_step *s)
{
    return floats_at(s, s->at.sinks);
}

float *ts_step_alibi(const ts_step *s)
{
    return floats_at(s, s->at.alibi);
}

float *ts_step_scales(const ts_step *s)
{
    return floats_at(s, s->at.scales);
}

const float *ts_step_lse(const ts_step *s)
{
    return floats_at(s, s->at.lse);
}

void ts_step_slots(const ts_step *s, uint32_t layer, uint64_t *slots)
{
    (void)layer; /* all have one block table */
    memcpy(slots, s->slots, s->tokens * sizeof *slots);
}

/* The frame's step has ended: graphs of it do nothing until the next one begins. */
static void leave_frame(ts_frame *f)
{
    ts_local_gpu_persistent_clear(f->pool->client, f->plan);
    f->in_use = false;
    f->region.step = NULL;
}

static void step_end(ts_step *s)
{
    if (s->frame != NULL)
        leave_frame(s->frame);
    ts_exchange_give(s->pool->client, &s->region);
    ts_step_free(s);
}

/* Commits (accepted NULL: all), or aborts. */
static ts_status call_end(ts_step *s, bool commit, const uint32_t *accepted)
{
    ts_client *c = s->pool->client;
    Tspb__StepCommit body = TSPB__STEP_COMMIT__INIT;
    Tspb__StepAbort abort = TSPB__STEP_ABORT__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    bool use = false;
    /* Blocks whose K and V are still being written, or read, are nobody else's yet. */
    ts_status status = TS_OK;
    if (s->writes_itself && c->cuda != NULL &&
        (!commit || accepted != NULL || s->publishes)) /* blocks are given back, or found */
        status = ts_cuda_await(c, c->cuda);
    else if (s->local != NULL && s->pool->on_gpu)
        status = ts_local_gpu_await(c);
    if (status != TS_OK && commit)
        return status;
    if (commit || c->posted.op == 0) /* an abort waits for no run */
        status = ts_rings_use(c, &use);
    if (status == TS_OK && commit)
        status = ts_ring_posted_status(c, s->id);
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
    body.accepted = ts_unconst(accepted);
    body.n_accepted = accepted != NULL ? s->count : 0;
    request.body_case = commit ? TSPB__REQUEST__BODY_STEP_COMMIT : TSPB__REQUEST__BODY_STEP_ABORT;
    if (commit)
        request.step_commit = &body;
    else
        request.step_abort = &abort;
    return ts_call_plain(c, &request);
}

/* Whether the tokens have K and V in all layers. The daemon knows of its own runs, and nobody of
 * those that a frame's graph replays. */
static ts_status check_layers(const ts_step *s, const uint32_t *accepted)
{
    const uint32_t layers = s->pool->geometry.layers, run = s->run_here.count;
    bool keeps = accepted == NULL;
    for (uint32_t i = 0; accepted != NULL && i < s->count; i++)
        keeps = keeps || accepted[i] > 0;
    if (!keeps || s->frame != NULL || !s->ran_here || run == layers)
        return TS_OK;
    return ts_fail(s->pool->client, TS_EINVAL, "only %u of %u layers of step %llx were run", run,
                   layers, (unsigned long long)s->id);
}

ts_status ts_step_commit(ts_step *s, const uint32_t *accepted)
{
    TS_ENTER(s->pool->client);
    ts_status status = check_layers(s, accepted);
    if (status == TS_OK)
        status = call_end(s, true, accepted);
    if (status != TS_OK)
        return status;
    if (s->exec == TS_EXEC_AUTO)
        ts_autotune_settle(s->pool->client, &s->autotune);
    step_end(s);
    return TS_OK;
}

/* Without an answer, the step is aborted by a later call or by the next daemon. */
static ts_status call_abort(ts_step *s)
{
    ts_client *c = s->pool->client;
    c->aborts = true;
    const ts_status status = call_end(s, false, NULL);
    c->aborts = false;
    ts_note_end(c, status);
    if ((status == TS_ETIMEOUT || status == TS_ECONN) && !c->lost)
        ts_unanswered_abort(c, s->id);
    return status;
}

ts_status ts_step_abort(ts_step *s)
{
    if (s == NULL)
        return TS_OK;
    TS_ENTER_LAST(s->pool->client);
    const ts_status status = call_abort(s);
    step_end(s);
    return status;
}
