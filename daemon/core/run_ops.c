/* The engine's commands for a run, one layer of a step, and for its end. */
#include "dtypes.h"
#include "engine_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool check_range(const ts_session *s, const char *what, uint64_t offset, uint64_t bytes,
                        ts_answer *answer)
{
    if (offset % TS_EXCHANGE_ALIGN == 0 && offset <= s->exchange_bytes &&
        bytes <= s->exchange_bytes - offset)
        return true;
    ts_refuse(answer, TS_EINVAL,
              "%s takes %llu bytes at offset %llu; the exchange has %llu, and offsets must be "
              "multiples of %u",
              what, (unsigned long long)bytes, (unsigned long long)offset,
              (unsigned long long)s->exchange_bytes, TS_EXCHANGE_ALIGN);
    return false;
}

uint32_t ts_engine_step_runs_max(const ts_engine *e, const ts_step *step)
{
    const ts_pool_config *pool = &e->pools[step->pool].config;
    return pool->on_gpu && pool->geometry.layers > e->limits.step_runs ? pool->geometry.layers
                                                                       : e->limits.step_runs;
}

static bool check_scales(const ts_session *s, const ts_layer_run *run, const ts_geometry *g,
                         ts_answer *answer)
{
    if (!(run->flags & TS_RUN_SCALES))
        return true;
    char why[160];
    if (ts_dtype_scales_check(g->dtype, why, sizeof why) == TS_OK)
        return check_range(s, "scales", run->scales, 2 * g->kv_heads * sizeof(float), answer);
    ts_refuse(answer, TS_EINVAL, "%s", why);
    return false;
}

static bool check_variant(const ts_session *s, const ts_layer_run *run, const ts_step *step,
                          const ts_geometry *g, ts_answer *answer)
{
    const ts_attention_variant v = ts_layer_run_variant(run);
    uint64_t each_head = step->heads * sizeof(float);
    answer->status =
        ts_attention_variant_check(&v, g->head_dim, answer->message, sizeof answer->message);
    return answer->status == TS_OK && check_scales(s, run, g, answer) &&
           (!(run->flags & TS_RUN_SINKS) ||
            check_range(s, "sinks", run->sinks, each_head, answer)) &&
           (!(run->flags & TS_RUN_ALIBI) ||
            check_range(s, "alibi", run->alibi, each_head, answer)) &&
           (!(run->flags & TS_RUN_LSE) ||
            check_range(s, "lse", run->lse, each_head * step->tokens, answer));
}

/* What a run reads or writes in the exchange. */
typedef struct range {
    const char *what;
    uint64_t offset, bytes;
} range;

/* A run that writes where it reads can't be done again after the daemon's death. */
static bool check_overlap(const ts_layer_run *run, const ts_step *step, const ts_geometry *g,
                          ts_answer *answer)
{
    const uint64_t row = g->head_dim * ts_dtype_bytes(step->io_dtype) * (uint64_t)step->tokens;
    const uint64_t each_head = step->heads * sizeof(float);
    range ranges[8] = {{"out", run->out, row * step->heads}};
    uint32_t count = 1;
    if (run->flags & TS_RUN_LSE)
        ranges[count++] = (range){"lse", run->lse, each_head * step->tokens};
    const uint32_t written = count;
    ranges[count++] = (range){"q", run->q, row * step->heads};
    ranges[count++] = (range){"k", run->k, row * g->kv_heads};
    ranges[count++] = (range){"v", run->v, row * g->kv_heads};
    if (run->flags & TS_RUN_SINKS)
        ranges[count++] = (range){"sinks", run->sinks, each_head};
    if (run->flags & TS_RUN_ALIBI)
        ranges[count++] = (range){"alibi", run->alibi, each_head};
    if (run->flags & TS_RUN_SCALES)
        ranges[count++] = (range){"scales", run->scales, 2 * g->kv_heads * sizeof(float)};
    for (uint32_t i = 0; i < written; i++)
        for (uint32_t k = i + 1; k < count; k++) {
            const range *x = &ranges[i], *y = &ranges[k];
            if (x->offset >= y->offset + y->bytes || y->offset >= x->offset + x->bytes)
                continue;
            ts_refuse(answer, TS_EINVAL,
                      "%s takes %llu bytes at offset %llu and overlaps %s, %llu bytes at %llu: "
                      "what a run writes must lie apart",
                      x->what, (unsigned long long)x->bytes, (unsigned long long)x->offset, y->what,
                      (unsigned long long)y->bytes, (unsigned long long)y->offset);
            return false;
        }
    return true;
}

bool ts_engine_run_is_known(const ts_engine *e, const ts_command *c)
{
    const ts_session *s = ts_engine_session(e, c->session);
    const ts_layer_run *run = &c->step_run.run;
    return s != NULL && (run->flags & TS_RUN_ON_STREAM) && run->number == s->stream_number &&
           (run->flags & TS_RUN_POSTED || (c->call != 0 && c->call == s->call));
}

/* A run on a stream gets its place in the session's order. */
static bool take_number(ts_session *s, ts_step *step, const ts_layer_run *run, ts_answer *answer)
{
    const uint32_t n = step->num_stream_runs;
    if (run->number != s->stream_number + 1) {
        ts_refuse(answer, TS_EINVAL, "run number %u; the session's next is %u", run->number,
                  s->stream_number + 1);
        return false;
    }
    if ((n & (n - 1)) == 0) { /* doubling */
        ts_layer_run *grown = realloc(step->stream_runs, (n == 0 ? 1 : 2 * n) * sizeof *grown);
        if (grown == NULL) {
            ts_refuse(answer, TS_ENOMEM, "no memory for %u runs on a stream", n + 1);
            return false;
        }
        step->stream_runs = grown;
    }
    step->stream_runs[step->num_stream_runs++] = *run;
    s->stream_number = run->number;
    return true;
}

void ts_engine_step_run(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    ts_step *step = ts_engine_own_step(e, s, c->step_run.step, answer);
    if (step == NULL)
        return;
    const ts_geometry *g = &e->pools[step->pool].config.geometry;
    const ts_layer_run *run = &c->step_run.run;
    if (step->heads == 0)
        return ts_refuse(answer, TS_EINVAL, "step %llx was begun with no_run: it can't be run",
                         (unsigned long long)step->id);
    if (run->layer >= g->layers)
        return ts_refuse_beyond(answer, TS_EINVAL, run->layer, g->layers,
                                "layer %u; the pool has %u", run->layer, g->layers);
    if (step->crashes >= TS_STEP_CRASHES)
        return ts_refuse(answer, TS_EINTERNAL,
                         "runs of step %llx were under way at %u crashes of the daemon: it isn't "
                         "run again",
                         (unsigned long long)step->id, step->crashes);
    uint32_t most = ts_engine_step_runs_max(e, step);
    if (step->in_flight >= most)
        return ts_refuse_more(answer, TS_EBUSY, step->in_flight, 1, most,
                              "step %llx has %u runs in flight; the limit is %u",
                              (unsigned long long)step->id, step->in_flight, most);
    uint64_t row = g->head_dim * ts_dtype_bytes(step->io_dtype) * (uint64_t)step->tokens;
    if (!check_range(s, "q", run->q, row * step->heads, answer) ||
        !check_range(s, "k", run->k, row * g->kv_heads, answer) ||
        !check_range(s, "v", run->v, row * g->kv_heads, answer) ||
        !check_range(s, "out", run->out, row * step->heads, answer) ||
        !check_variant(s, run, step, g, answer) || !check_overlap(run, step, g, answer))
        return;
    if ((run->flags & TS_RUN_ON_STREAM) && !take_number(s, step, run, answer))
        return;
    step->in_flight++;
    answer->step = step;
}

/* The run, if it is on a stream, isn't in flight any more. True: it counts as one of its layer. */
static bool end_stream_run(ts_step *step, const ts_command *c)
{
    uint32_t i = 0;
    while (i < step->num_stream_runs && step->stream_runs[i].number != c->step_done.number)
        i++;
    if (!c->step_done.on_stream || i == step->num_stream_runs)
        return true;
    const bool counts = !(step->stream_runs[i].flags & TS_RUN_OUTDATED);
    step->num_stream_runs--;
    memmove(step->stream_runs + i, step->stream_runs + i + 1,
            (step->num_stream_runs - i) * sizeof *step->stream_runs);
    return counts;
}

/* The step has no K and V of the layer. */
static void note_failed(ts_step *step, const ts_command *c)
{
    const uint32_t layer = c->step_done.layer;
    if (layer < TS_LAYERS_MAX)
        ts_layer_set_put(&step->layers, layer, false);
    if (step->failed == TS_OK) {
        step->failed = c->step_done.status;
        step->failed_layer = layer;
    }
}

/* A posted run that isn't accepted takes its place in the session's order all the same. */
static void note_refused(ts_engine *e, const ts_command *c, ts_answer *answer)
{
    ts_session *s = ts_engine_session(e, c->session);
    ts_step *step = ts_engine_find_step(e, c->step_done.step);
    if (s == NULL || c->step_done.number != s->stream_number + 1)
        return ts_refuse(answer, TS_ENOENT, "run number %u isn't the next of session %llx",
                         c->step_done.number, (unsigned long long)c->session);
    s->stream_number = c->step_done.number;
    if (c->call > s->call)
        s->call = c->call;
    if (step == NULL || &e->sessions[step->session] != s)
        return;
    note_failed(step, c);
    for (uint32_t i = 0; i < step->num_stream_runs; i++) /* which say nothing of the layer now */
        if (step->stream_runs[i].layer == c->step_done.layer)
            step->stream_runs[i].flags |= TS_RUN_OUTDATED;
}

void ts_engine_step_done(ts_engine *e, ts_session *none, const ts_command *c, ts_answer *answer)
{
    (void)none;
    if (c->step_done.refused)
        return note_refused(e, c, answer);
    ts_step *step = ts_engine_find_step(e, c->step_done.step);
    uint32_t layer = c->step_done.layer;
    if (step == NULL || step->in_flight == 0)
        return ts_refuse(answer, TS_ENOENT, "no step %llx is in flight",
                         (unsigned long long)c->step_done.step);
    step->in_flight--;
    const bool counts = end_stream_run(step, c);
    if (c->step_done.undone)
        e->sessions[step->session].stream_number = c->step_done.number - 1;
    if (layer == TS_NONE)
        step->copying = false;
    if (layer != TS_NONE && c->step_done.status != TS_OK) {
        note_failed(step, c);
    } else if (layer != TS_NONE && counts) {
        ts_layer_set_put(&step->layers, layer, true);
        if (layer == step->failed_layer)
            step->failed = TS_OK;
    }
    ts_session *s = &e->sessions[step->session];
    if (s->closing)
        (void)ts_engine_reclaim(e, s, TS_SWEEP_ENTRIES);
    else if (step->append) /* which nobody can abort */
        ts_engine_step_settle(e, step, NULL, c->step_done.status == TS_OK);
    else if (step->aborted && step->in_flight == 0)
        ts_engine_step_abort(e, step);
}
