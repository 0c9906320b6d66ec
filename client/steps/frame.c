/* Frames: steps whose data, and what their kernels are told, stays where it lay. */
#include "step.h"

#include "dtypes.h"
#include "error.h"
#include "exchange.h"
#include "local_gpu.h"
#include "options.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static ts_status check(const ts_pool *p, const ts_frame_options *o)
{
    ts_client *c = p->client;
    const ts_geometry *g = &p->geometry;
    uint64_t blocks = o->seqs * ts_ring_blocks(o->new_tokens, g->block_tokens);
    if (!p->on_gpu)
        return ts_fail(c, TS_EINVAL, "a frame is for CUDA graphs, and the pool is in host memory");
    if (o->seqs == 0 || o->seqs > TS_RING_BATCH)
        return ts_fail_beyond(c, TS_EINVAL, o->seqs, TS_RING_BATCH,
                              "a frame of %u sequences; the limits are 1..%u", o->seqs,
                              TS_RING_BATCH);
    if (blocks > TS_RING_BLOCKS)
        return ts_fail_beyond(
            c, TS_EINVAL, blocks, TS_RING_BLOCKS,
            "a frame of %u sequences with %u new tokens: their %llu blocks are more "
            "than the %u that a ring tells of",
            o->seqs, o->new_tokens, (unsigned long long)blocks, TS_RING_BLOCKS);
    if (o->tokens > (uint64_t)UINT32_MAX / 2)
        return ts_fail_beyond(c, TS_EINVAL, o->tokens, UINT32_MAX / 2,
                              "a frame of %llu tokens; the limit is %u",
                              (unsigned long long)o->tokens, UINT32_MAX / 2);
    if (o->step->no_run)
        return ts_fail(c, TS_EINVAL, "a frame whose steps have no layer run");
    if (o->step->tokens != NULL)
        return ts_fail(c, TS_EINVAL, "token ids for a frame; each step has its own");
    if (o->step->heads % g->kv_heads != 0 || o->step->heads > TS_HEADS_MAX)
        return ts_fail_beyond(
            c, TS_EINVAL, o->step->heads, TS_HEADS_MAX,
            "%u query heads; they must be a multiple of the pool's %u KV heads, at most "
            "%u",
            o->step->heads, g->kv_heads, TS_HEADS_MAX);
    char why[160];
    if (ts_dtype_io_check(o->step->io_dtype, g->dtype, why, sizeof why) != TS_OK)
        return ts_fail(c, TS_EINVAL, "%s", why);
    if (!isfinite(o->step->scale) || o->step->scale < 0)
        return ts_fail(c, TS_EINVAL, "a scale of %g; it must be finite and not negative",
                       (double)o->step->scale);
    if (o->step->kernel != NULL && strlen(o->step->kernel) >= sizeof(((ts_frame *)0)->kernel))
        return ts_fail(c, TS_EINVAL, "no kernel has the name '%s'", o->step->kernel);
    return ts_local_require(c, p);
}

ts_status ts_frame_new(ts_pool *p, const ts_frame_options *options, ts_frame **out)
{
    ts_client *c = p->client;
    const ts_geometry *g = &p->geometry;
    ts_frame_options o;
    ts_step_options step;
    *out = NULL;
    TS_ENTER(c);
    ts_status status = ts_options_read(c, TS_STRUCT_FRAME_OPTIONS, options, &o);
    if (status == TS_OK)
        status = ts_options_read(c, TS_STRUCT_STEP_OPTIONS, o.step, &step);
    if (status != TS_OK)
        return status;
    o.step = &step;
    if (o.new_tokens == 0)
        o.new_tokens = 1;
    if (o.tokens == 0)
        o.tokens = (uint64_t)p->num_blocks * g->block_tokens;
    if (step.heads == 0)
        step.heads = g->kv_heads;
    status = check(p, &o);
    if (status != TS_OK)
        return status;
    if (step.scale == 0)
        step.scale = 1.0f / sqrtf((float)g->head_dim);
    ts_frame *f = calloc(1, sizeof *f);
    if (f != NULL)
        f->new_tokens = malloc(o.seqs * sizeof *f->new_tokens);
    if (f == NULL || f->new_tokens == NULL) {
        free(f);
        return ts_fail(c, TS_ENOMEM, "no memory for a frame of %u sequences", o.seqs);
    }
    f->pool = p;
    f->options = o;
    f->step = step;
    f->options.step = &f->step;
    if (step.kernel != NULL) {
        snprintf(f->kernel, sizeof f->kernel, "%s", step.kernel);
        f->step.kernel = f->kernel;
    }
    for (uint32_t i = 0; i < o.seqs; i++)
        f->new_tokens[i] = o.new_tokens;
    uint32_t tokens = o.seqs * o.new_tokens;
    f->region.bytes = ts_step_lay_out(g, step.heads, step.io_dtype, tokens, 0, &f->at);
    status = ts_exchange_take(c, &f->region);
    if (status == TS_OK) {
        (void)ts_step_lay_out(g, step.heads, step.io_dtype, tokens, f->region.offset, &f->at);
        status = ts_local_gpu_persistent_new(p, &f->options, &f->plan);
        if (status != TS_OK)
            ts_exchange_give(c, &f->region);
    }
    if (status != TS_OK) {
        free(f->new_tokens);
        free(f);
        return status;
    }
    *out = f;
    return TS_OK;
}

/* Whether the frame's graphs, which were captured with its options, serve a step with these. */
static ts_status check_own(const ts_frame *f, const ts_step_options *own)
{
    ts_client *c = f->pool->client;
    const ts_step_options *all = &f->step;
    char why[160];
    if (own->heads != 0 && own->heads != all->heads)
        return ts_fail(c, TS_EINVAL, "a step of %u query heads; its frame has %u", own->heads,
                       all->heads);
    if (own->io_dtype != 0 &&
        ts_dtype_io_check(own->io_dtype, f->pool->geometry.dtype, why, sizeof why) != TS_OK)
        return ts_fail(c, TS_EINVAL, "%s", why);
    if (own->io_dtype != 0 && own->io_dtype != all->io_dtype)
        return ts_fail(c, TS_EINVAL, "a step of io_dtype %s; its frame's is %s",
                       ts_dtype_name(own->io_dtype), ts_dtype_name(all->io_dtype));
    if (own->scale != 0 && own->scale != all->scale)
        return ts_fail(c, TS_EINVAL, "a step with a scale of %g; its frame's is %g",
                       (double)own->scale, (double)all->scale);
    if (own->no_run)
        return ts_fail(c, TS_EINVAL, "a step of a frame that has no layer run");
    if (own->kernel != NULL && strcmp(own->kernel, f->kernel) != 0)
        return ts_fail(c, TS_EINVAL, "a step with kernel '%.20s'; its frame's is %s", own->kernel,
                       f->kernel[0] != '\0' ? f->kernel : "the pool's");
    return TS_OK;
}

/* The frame's options with what one step may have of its own. */
static ts_status merge(const ts_frame *f, const ts_step_options *own, ts_step_options *out)
{
    const ts_step_options *all = &f->step;
    ts_status status = check_own(f, own);
    if (status != TS_OK)
        return status;
    *out = *all;
    if (own->tokens != NULL)
        out->tokens = own->tokens;
    if (own->wait_ms != 0)
        out->wait_ms = own->wait_ms;
    if (own->priority != 0)
        out->priority = own->priority;
    return TS_OK;
}

ts_status ts_frame_begin(ts_frame *f, const ts_seq *seqs, uint32_t count,
                         const ts_step_options *options, ts_step **out)
{
    ts_client *c = f->pool->client;
    ts_step_options own, o;
    *out = NULL;
    TS_ENTER(c);
    ts_status status = ts_options_read(c, TS_STRUCT_STEP_OPTIONS, options, &own);
    if (status == TS_OK)
        status = merge(f, &own, &o);
    if (status != TS_OK)
        return status;
    if (f->in_use)
        return ts_fail(c, TS_EBUSY, "the frame has a step that hasn't ended");
    if (count == 0 || count > f->options.seqs)
        return ts_fail_beyond(c, TS_EINVAL, count, f->options.seqs,
                              "a step of %u sequences; the frame's limits are 1..%u", count,
                              f->options.seqs);
    uint32_t tokens = count * f->options.new_tokens;
    ts_step *s = ts_step_new(f->pool, seqs, f->new_tokens, count, tokens);
    if (s == NULL)
        return ts_fail(c, TS_ENOMEM, "no memory for a step of %u tokens", tokens);
    s->frame = f;
    s->at = f->at;
    s->heads = f->step.heads;
    s->io_dtype = f->step.io_dtype;
    s->scale = f->step.scale;
    s->exec = TS_EXEC_LOCAL;
    status = ts_step_call_begin(s, seqs, &o, false);
    if (status != TS_OK) {
        ts_step_free(s);
        return status;
    }
    f->in_use = true;
    f->region.step = s;
    c->last_exec = s->exec; /* a graph may be all that runs */
    *out = s;
    return TS_OK;
}

void ts_frame_free(ts_frame *f)
{
    if (f == NULL)
        return;
    TS_ENTER_LAST(f->pool->client);
    ts_local_gpu_plan_free(f->pool->client, f->plan);
    ts_exchange_give(f->pool->client, &f->region);
    free(f->new_tokens);
    free(f);
}
