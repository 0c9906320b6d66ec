#include "verify.h"

#include "block_sums.h"
#include "log.h"
#include "plain_text.h"

#include <stdio.h>
#include <stdlib.h>

/* Whether pools have checksums. */
static bool keeps_sums(ts_exec *x)
{
    if (x->sums == NULL && x->verify && x->books != NULL &&
        (x->sums = ts_block_sums_new(x->engine, x->store)) == NULL)
        ts_log(TS_LOG_WARNING, "verify = restart: no memory or thread for checksums of blocks");
    return x->sums != NULL;
}

static ts_gpu *gpu_of(const ts_exec *x, uint32_t pool)
{
    return x->gpu_of[pool] == NULL ? NULL : x->gpu_of[pool]->gpu;
}

void ts_verify_begin(ts_exec *x, uint32_t pool)
{
    const char *name = x->engine->pools[pool].config.name;
    char why[TS_MESSAGE_BYTES];
    if (keeps_sums(x) && ts_block_sums_add(x->sums, pool, x->memory[pool], gpu_of(x, pool), why,
                                           sizeof why) != TS_OK)
        ts_log_on(TS_LOG_WARNING, &(ts_log_about){.pool = name},
                  "pool '%s': verify = restart: no restart will check it: %s", name, why);
}

/* Holds the pool's memory against its checksums. */
static ts_status verify_pool(ts_exec *x, uint32_t pool, char *why, size_t why_bytes)
{
    const ts_log_about about = {.pool = x->engine->pools[pool].config.name};
    ts_blocks_checked c;
    uint32_t *wrong;
    uint64_t lost = 0;
    char checked[32];
    ts_status status = ts_block_sums_take(x->sums, pool, x->memory[pool], gpu_of(x, pool), &c,
                                          &wrong, why, why_bytes);
    if (status == TS_EDEVICE) { /* the next daemon may read it */
        char unread[TS_MESSAGE_BYTES];
        snprintf(unread, sizeof unread, "%s", why);
        snprintf(why, why_bytes, "pool '%s': %.160s", about.pool, unread);
        return status;
    }
    if (status != TS_OK) {
        ts_log_on(TS_LOG_ERROR, &about,
                  "pool '%s': verify = restart: it wasn't checked, and no restart will check it: "
                  "%s",
                  about.pool, why);
        x->checked.full += c.blocks;
        return TS_OK;
    }
    ts_log_on(TS_LOG_INFO, &about,
              "pool '%s': %llu of %llu full blocks (%s) were checked in %.3f s", about.pool,
              (unsigned long long)c.checked, (unsigned long long)c.blocks,
              ts_text_bytes(c.checked * c.block_bytes, checked, sizeof checked), c.seconds);
    for (uint32_t i = 0; i < c.wrong; i++) {
        ts_answer answer;
        ts_exec_apply(
            x, &(ts_command){.op = TS_OP_BLOCK_LOST, .pool = pool, .block_lost.block = wrong[i]},
            &answer);
        lost += answer.dropped;
    }
    free(wrong);
    x->checked.full += c.blocks;
    x->checked.summed += c.checked;
    x->checked.wrong += c.wrong;
    x->checked.lost += lost;
    x->checked.seconds += c.seconds;
    if (c.wrong > 0)
        ts_log_on(TS_LOG_ERROR, &about,
                  "pool '%s': %llu blocks don't hold what was stored in them: they are forgotten, "
                  "and the %llu sequences that had one are lost",
                  about.pool, (unsigned long long)c.wrong, (unsigned long long)lost);
    return TS_OK;
}

ts_status ts_verify_all(ts_exec *x, char *why, size_t why_bytes)
{
    ts_status status = TS_OK;
    for (uint32_t i = 0; i < x->engine->num_pools && status == TS_OK && keeps_sums(x); i++)
        if (ts_engine_has_pool(x->engine, i))
            status = verify_pool(x, i, why, why_bytes);
    x->checked.done = x->sums != NULL;
    return status;
}
