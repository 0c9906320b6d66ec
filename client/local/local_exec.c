/* Local execution: this process attends itself, over the mapped pool, with the daemon's kernels. */
#include "local_exec.h"

#include "block_table_cache.h"
#include "dtypes.h"
#include "error.h"
#include "local_gpu.h"
#include "pool_map.h"
#include "ring_client.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The kernels, made at the first need: those that the daemon uses. */
static ts_status open_kernels(ts_client *c)
{
    if (c->attention != NULL)
        return TS_OK;
    ts_isa isa = (ts_isa)c->rings->isa;
    if (isa < TS_ISA_PORTABLE || isa > TS_ISA_LAST)
        return ts_fail(c, TS_EPROTO,
                       "the daemon's kernels are of kind %d, which this library has not", (int)isa);
    if (ts_isa_resolve(isa) != isa)
        return ts_fail(c, TS_EPROTO, "the daemon's kernels are %s's, which this process can't run",
                       ts_isa_name(isa));
    c->attention = ts_attention_new(c->threads, isa);
    return c->attention != NULL ? TS_OK
                                : ts_fail(c, TS_ENOMEM, "no memory or threads to attend with");
}

static ts_status lacks_rings(ts_client *c)
{
    if (c->pid != getpid())
        return ts_not_ours(c);
    if (c->transport == TS_TRANSPORT_MESSAGES)
        return ts_fail(
            c, TS_EINVAL,
            "local execution needs the rings, by which the block tables come; the client "
            "was connected with TS_TRANSPORT_MESSAGES");
    if (c->rings_lost)
        return ts_fail(
            c, TS_EINVAL,
            "local execution needs the rings, by which the block tables come; the daemon "
            "at %s gives none, or has ended them: its log says why, and a new "
            "connection may have some",
            c->path);
    return ts_fail(c, TS_EBUSY,
                   "local execution needs the rings, by which the block tables come; they wait for "
                   "the answer to a call that had none within %llu ms: begin again when the "
                   "daemon has answered",
                   (unsigned long long)(c->ring_late_ms != 0 ? c->ring_late_ms : c->timeout_ms));
}

static ts_status can_attend(ts_client *c, const ts_pool *p, bool rings)
{
    if (!p->writable)
        return ts_fail(c, TS_EPERM,
                       "local execution writes K and V: open the pool with TS_POOL_WRITABLE");
    if (!rings)
        return lacks_rings(c);
    if (!p->on_gpu)
        return open_kernels(c);
    if (c->exchange_kind == TS_EXCHANGE_HOST || c->exchange_kind == TS_EXCHANGE_NONE)
        return ts_fail(c, TS_EINVAL,
                       "local execution on %s needs q, k, v and out in its memory: see "
                       "ts_exchange_device and ts_exchange_register",
                       p->device);
    return ts_local_gpu_open(c, p);
}

ts_status ts_local_require(ts_client *c, const ts_pool *p)
{
    bool rings;
    ts_status status = ts_rings_use(c, &rings);
    return status == TS_OK ? can_attend(c, p, rings) : status;
}

ts_status ts_local_choose(ts_client *c, const ts_pool *p, ts_exec *exec)
{
    bool rings;
    *exec = TS_EXEC_DAEMON;
    if (c->exec == TS_EXEC_DAEMON)
        return TS_OK;
    ts_status status = ts_rings_use(c, &rings);
    if (status != TS_OK)
        return status;
    const ts_last_error last = c->error;
    status = can_attend(c, p, rings);
    if (status == TS_OK)
        *exec = c->exec;
    else if (c->exec == TS_EXEC_AUTO) {
        if (status == TS_EPROTO) /* which won't change, and costs a while to find out */
            c->exec = TS_EXEC_DAEMON;
        c->error = last;
        status = TS_OK;
    }
    return status;
}

/* Memory for `num_seqs` sequences: the last step's, if there is any. NULL: none. */
static ts_local *take(ts_client *c, size_t num_seqs)
{
    ts_local *l = c->local_spare != NULL ? c->local_spare : calloc(1, sizeof *l);
    c->local_spare = l; /* until it is large enough */
    if (l != NULL && l->seqs_room < num_seqs) {
        free(l->seqs);
        l->seqs = malloc(num_seqs * sizeof *l->seqs);
        l->seqs_room = l->seqs != NULL ? (uint32_t)num_seqs : 0;
    }
    if (l == NULL || l->seqs == NULL)
        return NULL;
    c->local_spare = NULL;
    return l;
}

ts_status ts_local_new(ts_pool *p, uint64_t step, const ts_seq *seqs, const uint32_t *new_tokens,
                       const ts_begun *b, ts_local **out)
{
    *out = NULL;
    ts_status status = TS_OK;
    ts_local *l = *out = take(p->client, b->num_seqs);
    if (l == NULL)
        return ts_fail(p->client, TS_ENOMEM, "no memory for a step of %zu sequences", b->num_seqs);
    memset(l->seqs, 0, b->num_seqs * sizeof *l->seqs);
    l->num_seqs = (uint32_t)b->num_seqs;
    const uint32_t *blocks = b->blocks;
    for (uint32_t i = 0; i < b->num_seqs && status == TS_OK; i++) {
        ts_attention_seq *s = &l->seqs[i];
        uint32_t touched = (uint32_t)ts_whole_blocks(b->starts[i], p->geometry.block_tokens);
        s->q_tokens = new_tokens[i];
        s->kv_tokens = b->starts[i] + new_tokens[i];
        if (new_tokens[i] == 0) /* its table isn't told, and not read */
            continue;
        status = ts_tables_update(p, step,
                                  &(ts_table_delta){.seq = seqs[i],
                                                    .first = b->firsts[i],
                                                    .count = b->counts[i],
                                                    .touched = touched,
                                                    .blocks = blocks},
                                  &s->blocks);
        blocks += b->counts[i];
    }
    return status;
}

ts_status ts_local_plan(ts_pool *p, ts_local *l, uint32_t heads, ts_dtype io_dtype,
                        const char *kernel)
{
    return ts_local_gpu_plan(p, l->seqs, l->num_seqs, heads, io_dtype, kernel, &l->plan);
}

ts_status ts_local_plan_in(ts_pool *p, ts_local *l, ts_gpu_plan *plan)
{
    ts_local_gpu_plan_free(p->client, l->plan); /* an earlier step's */
    l->plan = plan;
    l->plan_is_kept = true;
    return ts_local_gpu_persistent_set(p->client, plan, l->seqs, l->num_seqs);
}

void ts_local_free(ts_client *c, ts_local *l)
{
    if (l == NULL)
        return;
    if (l->plan_is_kept)
        l->plan = NULL;
    l->plan_is_kept = false;
    ts_local_close(c);
    c->local_spare = l;
}

void ts_local_close(ts_client *c)
{
    ts_local *l = c->local_spare;
    if (l == NULL)
        return;
    ts_local_gpu_plan_free(c, l->plan);
    free(l->seqs);
    free(l);
    c->local_spare = NULL;
}

ts_status ts_local_attend(ts_pool *p, ts_local *l, const ts_local_run *local)
{
    ts_client *c = p->client;
    const ts_geometry *g = &p->geometry;
    const ts_layer_run *run = &local->run;
    const ts_attention_variant given = ts_layer_run_variant(run);
    if (c->pid != getpid())
        return ts_not_ours(c);
    ts_status status = ts_pool_check_layer(p, run->layer);
    if (status != TS_OK)
        return status;
    char why[sizeof c->error.text];
    if ((run->flags & TS_RUN_SCALES) && ts_dtype_scales_check(g->dtype, why, sizeof why) != TS_OK)
        return ts_fail(c, TS_EINVAL, "%s", why);
    status = ts_attention_variant_check(&given, g->head_dim, why, sizeof why);
    if (status != TS_OK)
        return ts_fail(c, status, "%s", why);
    if (p->on_gpu)
        return ts_local_gpu_attend(p, l->plan, local);
    if (run->flags & TS_RUN_ON_STREAM)
        return ts_fail(c, TS_EINVAL, "a run on a stream, but the pool is in host memory");
    size_t first = 0;
    for (uint32_t i = 0; i < l->num_seqs; i++) {
        ts_layer_run_point(run, c->exchange, g, local->heads, local->io_dtype, first, &l->seqs[i]);
        first += l->seqs[i].q_tokens;
    }
    const ts_attention_call call = {.geometry = *g,
                                    .base = p->base,
                                    .heads = local->heads,
                                    .io_dtype = local->io_dtype,
                                    .variant = ts_layer_run_resolve(run, local->scale, g->head_dim),
                                    .seqs = l->seqs,
                                    .num_seqs = l->num_seqs};
    status = ts_attention_run(c->attention, &call);
    return status == TS_OK ? TS_OK : ts_fail(c, status, "no scratch memory for attention");
}
