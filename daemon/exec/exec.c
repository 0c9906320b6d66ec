#include "exec.h"

#include "block_sums.h"
#include "clock.h"
#include "log.h"
#include "test_point.h"

#include <stdlib.h>

static void sweep(ts_exec *x)
{
    ts_answer answer;
    ts_exec_apply(x, &(ts_command){.op = TS_OP_SWEEP}, &answer);
    x->resumed(x->owner);
}

/* One bit at a time, and others' work in between. */
static void run_sweep(ts_work *work, void *owner)
{
    ts_exec *x = (ts_exec *)((char *)work - offsetof(ts_exec, sweep));
    (void)owner;
    x->sweeping = false;
    sweep(x);
}

void ts_exec_tick(ts_exec *x)
{
    if (!x->sweeping && ts_engine_ends_by(x->engine, ts_now_ms()))
        sweep(x);
}

static void run_wake(ts_work *work, void *owner)
{
    ts_exec *x = (ts_exec *)((char *)work - offsetof(ts_exec, wake));
    x->waking = false;
    x->woken(owner);
}

void ts_exec_look_for_woken(ts_exec *x)
{
    if (x->waking || ts_engine_woken(x->engine) == 0)
        return;
    x->waking = true;
    x->wake.run = run_wake;
    ts_queue_put(&x->queue, &x->wake);
}

void ts_exec_apply(ts_exec *x, const ts_command *command, ts_answer *answer)
{
    ts_command timed = *command;
    timed.now_ms = ts_now_ms();
    ts_books_begin(x->books, &timed);
    ts_point("applying", timed.op);
    ts_block_sums_before(x->sums, &timed);
    ts_engine_apply(x->engine, &timed, answer);
    ts_point("applied", 0);
    ts_books_note(x->books, x->engine, &timed, answer);
    ts_point("published", 0);
    ts_block_sums_after(x->sums, &timed, answer);
    ts_exec_look_for_woken(x);
    if (x->sweeping || !ts_engine_sweeps(x->engine))
        return;
    x->sweeping = true;
    x->sweep.run = run_sweep;
    ts_queue_put(&x->queue, &x->sweep);
}

void ts_exec_slab_goes(ts_exec *x, uint32_t pool, uint32_t slab)
{
    if (x->gpu_of[pool] != NULL && x->memory[pool]->ipc_handle == NULL)
        x->slab_goes(x->owner, pool, slab);
}

bool ts_exec_leaves_to_next(ts_exec *x, uint32_t pool)
{
    return x->books != NULL && x->gpu_of[pool] != NULL &&
           ts_gpu_executor_is_lost(x->gpu_of[pool]->executor);
}

void ts_exec_fini(ts_exec *x)
{
    ts_block_sums_free(x->sums);
    for (uint32_t i = 0; i < TS_POOLS_MAX; i++)
        ts_memory_free(x->memory[i]);
    for (uint32_t i = 0; i < x->num_gpus; i++) {
        ts_done_words_release(x->gpus[i].words);
        ts_gpu_close(x->gpus[i].gpu);
        free(x->gpus[i].exchange_bytes);
    }
    ts_engine_free(x->engine);
    ts_attention_free(x->attention);
}
