/* The prefix index as operators change it: dropped, switched off and on. */
#include "engine_internal.h"

#include <string.h>

void ts_engine_cache_drop(ts_engine *e, ts_session *none, const ts_command *c, ts_answer *answer)
{
    (void)none;
    if (!ts_engine_has_pool(e, c->pool))
        return ts_refuse(answer, TS_ENOENT, "there is no pool %u", c->pool);
    ts_prefix_index *x = e->pools[c->pool].books.index;
    for (uint32_t i = 0; i < x->num_spaces; i++) {
        const ts_index_space *space = &x->spaces[i];
        if (!space->live || space->retired ||
            (c->cache_drop.has_uid && e->tenants[space->tenant] != c->cache_drop.uid) ||
            (c->cache_drop.has_space &&
             !ts_index_space_is(x, i, c->cache_drop.space.bytes, c->cache_drop.space.count)))
            continue;
        answer->dropped += space->blocks;
        ts_index_retire(x, i);
    }
}

void ts_engine_cache_set(ts_engine *e, ts_session *none, const ts_command *c, ts_answer *answer)
{
    (void)none;
    if (!ts_engine_has_pool(e, c->pool))
        return ts_refuse(answer, TS_ENOENT, "there is no pool %u", c->pool);
    ts_engine_pool *pool = &e->pools[c->pool];
    pool->config.cache = c->cache_set.on ? TS_CACHE_ON : TS_CACHE_OFF;
    pool->books.index->off = !c->cache_set.on;
    if (!c->cache_set.on)
        ts_index_retire_all(pool->books.index);
}
