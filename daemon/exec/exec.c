#include "exec.h"

#include "cgroup.h"
#include "clock.h"
#include "log.h"
#include "stored_memory.h"
#include "test_point.h"

#include <stdlib.h>

static void sweep(ts_exec *x)
{
    ts_answer a;
    ts_exec_apply(x, &(ts_command){.op = TS_OP_SWEEP}, &a);
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

void ts_exec_apply(ts_exec *x, const ts_command *command, ts_answer *a)
{
    ts_command timed = *command;
    timed.now_ms = ts_now_ms();
    ts_books_begin(x->books, &timed);
    ts_point("applying", timed.op);
    ts_engine_apply(x->engine, &timed, a);
    ts_point("applied", 0);
    ts_books_note(x->books, x->engine, &timed, a);
    ts_point("published", 0);
    ts_exec_look_for_woken(x);
    if (x->sweeping || !ts_engine_sweeps(x->engine))
        return;
    x->sweeping = true;
    x->sweep.run = run_sweep;
    ts_queue_put(&x->queue, &x->sweep);
}

void ts_exec_let_go(ts_exec *x, uint32_t pool, uint32_t slab)
{
    if (x->gpu_of[pool] != NULL && x->memory[pool]->ipc_handle == NULL)
        x->slab_goes(x->owner, pool, slab);
}

/* Makes the slab's memory. A sentence in `why` if that can't be. */
static ts_status make_slab(ts_exec *x, uint32_t pool, uint32_t slab, char *why, size_t why_bytes)
{
    ts_memory *memory = x->memory[pool];
    if (x->gpu_of[pool] == NULL && !ts_cgroup_allows(memory->export_bytes, why, why_bytes))
        return TS_ENOMEM;
    ts_status status = ts_memory_renew(
        memory, slab, x->engine->pools[pool].config.client_write != TS_CLIENT_WRITE_NONE, why,
        why_bytes);
    if (status != TS_OK) /* the slab stays what it is, and whose it is */
        return status;
    ts_exec_let_go(x, pool, slab);
    const uint32_t next = x->engine->pools[pool].books.slabs[slab].generation + 1;
    return ts_stored_slab_put(x->store, &(ts_stored_slab){memory, pool, slab, next}, why,
                              why_bytes);
}

void ts_exec_supply(ts_exec *x, ts_command *command, ts_answer *a)
{
    if (ts_books_answered(x->books, x->engine, command, a))
        return;
    for (;;) {
        ts_exec_apply(x, command, a);
        if (a->status != TS_NEED_SLABS)
            return;
        const uint32_t pool = a->need.pool, tenant = a->need.tenant;
        const uint32_t slab = ts_engine_next_slab(x->engine, pool, tenant);
        const char *name = x->engine->pools[pool].config.name;
        char why[TS_MESSAGE_BYTES];
        ts_status status = make_slab(x, pool, slab, why, sizeof why);
        if (status != TS_OK) {
            ts_command within = *command;
            within.step_begin.no_new_slabs = true; /* no other command needs slabs */
            ts_exec_apply(x, &within, a);
            if (a->status != TS_NEED_SLABS)
                return;
            ts_log_on(TS_LOG_ERROR, &(ts_log_about){.pool = name}, "pool '%s', slab %u: %s", name,
                      slab, why);
            return ts_refuse(a, status, "pool '%s': %s", name, why);
        }
        ts_answer granted;
        ts_exec_apply(x,
                      &(ts_command){.op = TS_OP_SLAB_GRANT,
                                    .pool = pool,
                                    .slab_grant = {.slab = slab, .tenant = tenant}},
                      &granted);
        if (granted.status != TS_OK)
            return ts_refuse(a, TS_EINTERNAL, "%s", granted.message);
        const uint32_t last = x->engine->pools[pool].books.slabs[slab].generation - 1;
        ts_stored_slab_forget(x->store, &(ts_stored_slab){x->memory[pool], pool, slab, last});
    }
}

void ts_exec_fini(ts_exec *x)
{
    for (uint32_t i = 0; i < TS_POOLS_MAX; i++)
        ts_memory_free(x->memory[i]);
    for (uint32_t i = 0; i < x->num_gpus; i++) {
        ts_gpu_close(x->gpus[i].gpu);
        free(x->gpus[i].exchange_bytes);
    }
    ts_engine_free(x->engine);
    ts_attention_free(x->attention);
}
