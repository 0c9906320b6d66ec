#include "wait_ops.h"

#include <assert.h>

void ts_waits_add(ts_engine *e, ts_wait_list *list, uint32_t session)
{
    ts_wait *w = &e->sessions[session].wait;
    w->prev = list->last;
    w->next = TS_NONE;
    if (list->last != TS_NONE)
        e->sessions[list->last].wait.next = session;
    else
        list->first = session;
    list->last = session;
}

void ts_waits_remove(ts_engine *e, ts_wait_list *list, uint32_t session)
{
    const ts_wait *w = &e->sessions[session].wait;
    if (w->prev != TS_NONE)
        e->sessions[w->prev].wait.next = w->next;
    else
        list->first = w->next;
    if (w->next != TS_NONE)
        e->sessions[w->next].wait.prev = w->prev;
    else
        list->last = w->prev;
}

void ts_waits_wake(ts_engine *e, uint32_t session)
{
    ts_wait *w = &e->sessions[session].wait;
    assert(w->kind != TS_WAIT_NONE);
    if (w->woken)
        return;
    w->woken = true;
    w->prev_woken = e->woken.last;
    w->next_woken = TS_NONE;
    if (e->woken.last != TS_NONE)
        e->sessions[e->woken.last].wait.next_woken = session;
    else
        e->woken.first = session;
    e->woken.last = session;
}

void ts_waits_answered(ts_engine *e, ts_session *s)
{
    ts_wait *w = &s->wait;
    if (!w->woken)
        return;
    w->woken = false;
    if (w->prev_woken != TS_NONE)
        e->sessions[w->prev_woken].wait.next_woken = w->next_woken;
    else
        e->woken.first = w->next_woken;
    if (w->next_woken != TS_NONE)
        e->sessions[w->next_woken].wait.prev_woken = w->prev_woken;
    else
        e->woken.last = w->prev_woken;
}

uint64_t ts_engine_woken(const ts_engine *e)
{
    return e->woken.first == TS_NONE ? 0 : ts_engine_session_id(e, e->woken.first);
}

void ts_waits_end(ts_engine *e, ts_session *s)
{
    const uint32_t session = (uint32_t)(s - e->sessions);
    ts_waits_answered(e, s);
    if (s->wait.kind == TS_WAIT_CLAIM && s->wait.claim != TS_NONE)
        ts_waits_remove(e, &e->claims.all[s->wait.claim].waiters, session);
    if (s->wait.kind == TS_WAIT_ROOM) {
        ts_waits_remove(e, &e->pools[s->wait.pool].room, session);
        e->waiting_for_room--;
    }
    if (s->wait.kind != TS_WAIT_NONE)
        e->pools[s->wait.pool].waiting--;
    s->wait = (ts_wait){0};
}

void ts_waits_for_room(ts_engine *e, ts_session *s, uint32_t pool, uint32_t blocks)
{
    if (s->wait.kind != TS_WAIT_ROOM) {
        s->wait = (ts_wait){.kind = TS_WAIT_ROOM, .pool = pool, .since_ms = e->now_ms};
        ts_waits_add(e, &e->pools[pool].room, (uint32_t)(s - e->sessions));
        e->waiting_for_room++;
        e->pools[pool].waiting++;
    }
    s->wait.blocks = blocks;
}

/* Whether the session's tenant may use the blocks that it waits for. */
static bool within_limit(const ts_engine_pool *pool, const ts_session *s)
{
    return pool->books.tenants[s->tenant].used + (uint64_t)s->wait.blocks <=
           pool->config.tenant_blocks_max;
}

/* Whether the session's tenant would use more than its share of the pool if it had `blocks` blocks
 * more. The share is an equal part for each tenant that has a session. */
static bool is_beyond_share(const ts_engine *e, const ts_engine_pool *pool, const ts_session *s,
                            uint64_t blocks)
{
    return pool->books.tenants[s->tenant].used + blocks >
           pool->books.num_blocks / e->present_tenants;
}

/* How many tenants' turns come before the session's. */
static uint32_t turn_of(const ts_engine *e, const ts_engine_pool *pool, uint32_t session)
{
    return (e->sessions[session].tenant + e->num_tenants - pool->room_turn) % e->num_tenants;
}

/* The first session of the tenant whose turn it is; with `after` set, of the tenants whose turn
 * comes after that session's. TS_NONE: nobody waits there but at its tenant's limit. */
static uint32_t next_in_turn(const ts_engine *e, const ts_engine_pool *pool, uint32_t after)
{
    uint32_t next = TS_NONE;
    for (uint32_t i = pool->room.first; i != TS_NONE; i = e->sessions[i].wait.next)
        if (!e->sessions[i].away && within_limit(pool, &e->sessions[i]) &&
            (after == TS_NONE || turn_of(e, pool, i) > turn_of(e, pool, after)) &&
            (next == TS_NONE || turn_of(e, pool, i) < turn_of(e, pool, next)))
            next = i;
    return next;
}

/* The head of the pool's queue, or TS_NONE. */
static uint32_t head_of(const ts_engine *e, const ts_engine_pool *pool)
{
    const uint32_t first = next_in_turn(e, pool, TS_NONE);
    for (uint32_t i = first; i != TS_NONE; i = next_in_turn(e, pool, i))
        if (!is_beyond_share(e, pool, &e->sessions[i], e->sessions[i].wait.blocks))
            return i;
    return first;
}

uint64_t ts_waits_withheld(const ts_engine *e, const ts_session *s, uint32_t index, uint64_t blocks,
                           bool is_small)
{
    const ts_engine_pool *pool = &e->pools[index];
    const uint32_t head = pool->room.first == TS_NONE ? TS_NONE : head_of(e, pool);
    if (head == TS_NONE || &e->sessions[head] == s)
        return 0;
    const ts_wait *w = &e->sessions[head].wait;
    if (is_small && e->now_ms - w->since_ms <= TS_WAIT_OVERTAKEN_MS)
        return 0;
    if (e->sessions[head].tenant == s->tenant)
        return w->blocks;
    if (is_beyond_share(e, pool, &e->sessions[head], w->blocks) &&
        !is_beyond_share(e, pool, s, blocks))
        return 0;
    /* What lies in slabs that the session's tenant uses is of no use to another. */
    const ts_pool_tenant *t = &pool->books.tenants[s->tenant];
    uint64_t shared = ts_pool_available(&pool->books, s->tenant) - t->free - t->cached;
    return shared < w->blocks ? shared : w->blocks;
}

void ts_waits_look_again(ts_engine *e, uint32_t pool)
{
    for (uint32_t i = e->pools[pool].room.first; i != TS_NONE; i = e->sessions[i].wait.next)
        if (!e->sessions[i].away)
            ts_waits_wake(e, i);
}

void ts_waits_look_for_room(ts_engine *e)
{
    for (uint32_t i = 0; i < e->num_pools && e->waiting_for_room > 0; i++) {
        const ts_engine_pool *pool = &e->pools[i];
        const uint32_t head = pool->room.first == TS_NONE ? TS_NONE : head_of(e, pool);
        if (head == TS_NONE)
            continue;
        const ts_session *s = &e->sessions[head];
        if (ts_pool_available(&pool->books, s->tenant) >= s->wait.blocks)
            ts_waits_wake(e, head);
    }
}
