#include "pool_stats_cache.h"

#include "clock.h"

#include <stdlib.h>

/* The figures of a walk are reused for REST times as long as it took, at most for FRESH_MS. */
#define FRESH_MS 1000u
#define REST 10u

/* Of one pool. */
typedef struct pool_walks {
    ts_pool_stats *walk; /* that is being made; NULL: none */
    ts_pool_stats *last; /* NULL: none */
    uint64_t began_ms, fresh_until_ms;
    ts_pool_stats_waiter *waiters, **last_waiter;
} pool_walks;

struct ts_pool_stats_cache {
    ts_exec *exec;
    pool_walks pools[TS_POOLS_MAX];
    ts_work work;
    bool queued;
    bool telling; /* waiters are being told: what is there serves them */
    uint64_t bits;
};

ts_pool_stats_cache *ts_pool_stats_cache_new(ts_exec *exec)
{
    ts_pool_stats_cache *s = calloc(1, sizeof *s);
    if (s != NULL)
        s->exec = exec;
    return s;
}

void ts_pool_stats_cache_free(ts_pool_stats_cache *s)
{
    if (s == NULL)
        return;
    for (uint32_t i = 0; i < TS_POOLS_MAX; i++) {
        ts_pool_stats_free(s->pools[i].walk);
        ts_pool_stats_free(s->pools[i].last);
    }
    free(s);
}

static void tell_waiters(ts_pool_stats_cache *s, pool_walks *p)
{
    ts_pool_stats_waiter *waiter = p->waiters;
    p->waiters = NULL;
    s->telling = true;
    for (ts_pool_stats_waiter *next; waiter != NULL; waiter = next) {
        next = waiter->next;
        waiter->ready(waiter, s->exec->owner);
    }
    s->telling = false;
}

/* One bit of each walk. */
static void run_walks(ts_work *work, void *owner)
{
    ts_pool_stats_cache *s =
        (ts_pool_stats_cache *)((char *)work - offsetof(ts_pool_stats_cache, work));
    bool more = false;
    (void)owner;
    s->queued = false;
    for (uint32_t i = 0; i < TS_POOLS_MAX; i++) {
        pool_walks *p = &s->pools[i];
        if (p->walk == NULL)
            continue;
        s->bits++;
        if (!ts_pool_stats_go_on(p->walk, s->exec->engine, TS_POOL_STATS_BIT)) {
            more = true;
            continue;
        }
        uint64_t now = ts_now_ms(), rest = (now - p->began_ms) * REST;
        ts_pool_stats_free(p->last);
        p->last = p->walk;
        p->walk = NULL;
        p->fresh_until_ms = now + (rest < FRESH_MS ? rest : FRESH_MS);
        tell_waiters(s, p);
    }
    if (more && !s->queued) {
        s->queued = true;
        ts_queue_put(&s->exec->queue, &s->work); /* behind what others have put there */
    }
}

ts_status ts_pool_stats_cache_get(ts_pool_stats_cache *s, uint32_t pool,
                                  ts_pool_stats_waiter *waiter, const ts_pool_stats **out)
{
    pool_walks *p = &s->pools[pool];
    bool small = ts_pool_stats_cost(s->exec->engine, pool) <= TS_POOL_STATS_BIT / 2;
    bool fits =
        p->last != NULL && p->last->num_blocks == s->exec->engine->pools[pool].books.num_blocks;
    if (!small && fits && (s->telling || ts_now_ms() < p->fresh_until_ms)) {
        *out = p->last;
        return TS_OK;
    }
    if (p->walk == NULL) {
        p->walk = ts_pool_stats_new(s->exec->engine, pool);
        if (p->walk == NULL)
            return TS_ENOMEM;
        p->began_ms = ts_now_ms();
        p->last_waiter = &p->waiters;
    }
    if (small && p->waiters == NULL) {
        s->bits++;
        while (!ts_pool_stats_go_on(p->walk, s->exec->engine, TS_POOL_STATS_BIT))
            ;
        ts_pool_stats_free(p->last);
        *out = p->last = p->walk;
        p->walk = NULL;
        p->fresh_until_ms = 0;
        return TS_OK;
    }
    waiter->next = NULL;
    *p->last_waiter = waiter;
    p->last_waiter = &waiter->next;
    if (!s->queued) {
        s->queued = true;
        s->work.run = run_walks;
        ts_queue_put(&s->exec->queue, &s->work);
    }
    return TS_EBUSY;
}

uint64_t ts_pool_stats_cache_bits(const ts_pool_stats_cache *s)
{
    return s->bits;
}
