/*
 * Figures of pools for everybody who asks. So that no flood of questions holds up the engine, a
 * small pool is walked at once; a large one bit by bit, with others' work in between, by one walk
 * for all who ask meanwhile, whose figures then serve for up to a second.
 *
 * Thread: the engine's owner.
 */
#ifndef TS_POOL_STATS_CACHE_H
#define TS_POOL_STATS_CACHE_H

#include "exec.h"
#include "pool_stats.h"

#define TS_POOL_STATS_BIT (1u << 15) /* table entries and blocks that are looked at in one go */

/* Somebody who waits for a pool's figures: `ready` is called once, and asks again. */
typedef struct ts_pool_stats_waiter {
    struct ts_pool_stats_waiter *next;
    void (*ready)(struct ts_pool_stats_waiter *waiter, void *owner); /* the exec's owner */
} ts_pool_stats_waiter;

typedef struct ts_pool_stats_cache ts_pool_stats_cache;

/* NULL: out of memory. */
ts_pool_stats_cache *ts_pool_stats_cache_new(ts_exec *exec);
void ts_pool_stats_cache_free(ts_pool_stats_cache *cache);

/*
 * The pool's figures, good until this is called again. TS_EBUSY: they aren't there yet, and the
 * waiter is told when they are. TS_ENOMEM.
 */
ts_status ts_pool_stats_cache_get(ts_pool_stats_cache *cache, uint32_t pool,
                                  ts_pool_stats_waiter *waiter, const ts_pool_stats **out);

/* How many bits of walks were made so far. */
uint64_t ts_pool_stats_cache_bits(const ts_pool_stats_cache *cache);

#endif
