/* Pools: made, found, opened, given more blocks or fewer, and ended. */
#include "engine_internal.h"
#include "wait_ops.h"

#include <stdio.h>
#include <string.h>
#include <xxhash.h>

bool ts_engine_has_pool(const ts_engine *e, uint32_t pool)
{
    return pool < e->num_pools && e->pools[pool].config.name[0] != '\0';
}

ts_status ts_engine_pool_place(const ts_engine *e, const ts_pool_config *config, uint32_t *out,
                               char *why, size_t why_bytes)
{
    ts_status status = ts_geometry_check(&config->geometry, why, why_bytes);
    if (status != TS_OK)
        return status;
    uint32_t free_place = TS_NONE;
    for (uint32_t i = 0; i < e->num_pools; i++) {
        if (!ts_engine_has_pool(e, i)) {
            free_place = i < free_place ? i : free_place;
        } else if (strcmp(e->pools[i].config.name, config->name) == 0) {
            snprintf(why, why_bytes, "there is a pool '%s' already", config->name);
            return TS_EEXIST;
        }
    }
    uint32_t place = free_place == TS_NONE ? e->num_pools : free_place;
    if (place == TS_POOLS_MAX) {
        snprintf(why, why_bytes, "there are %u pools already; the limit is %u", e->num_pools,
                 TS_POOLS_MAX);
        return TS_EINVAL;
    }
    if (config->num_blocks == 0 || config->num_blocks > TS_POOL_BLOCKS_MAX) {
        snprintf(why, why_bytes, "a pool of %u blocks; the limits are 1..%u", config->num_blocks,
                 TS_POOL_BLOCKS_MAX);
        return TS_EINVAL;
    }
    *out = place;
    return TS_OK;
}

/* The books of a pool that isn't there yet. */
static ts_status make_books(const ts_engine *e, const ts_pool_config *config, ts_pool_books *books)
{
    uint32_t max =
        config->max_blocks > config->num_blocks ? config->max_blocks : config->num_blocks;
    ts_status status = ts_pool_init(books, config->num_blocks, max, config->slab_blocks);
    if (status == TS_OK)
        status = ts_pool_use_index(books, config->geometry.block_tokens, e->limits.hash_seed);
    if (status == TS_OK && config->on_gpu) /* workers map its memory slab by slab */
        status = ts_pool_use_homes(books, e->limits.sessions);
    if (status == TS_OK)
        books->index->off = config->cache == TS_CACHE_OFF;
    books->now_s = (uint32_t)(e->now_ms / 1000);
    if (status == TS_OK && e->num_tenants > 0)
        status = ts_pool_add_tenant(books, e->num_tenants - 1);
    return status;
}

/* Of the ids of a new pool's sequences (less than 2^31): others than those of a pool in another
 * place, or of one that had this place, and this name, until a millisecond ago. */
static uint32_t first_generation(const ts_engine *e, uint32_t place)
{
    const uint64_t now[] = {e->now_ms, e->tokens_committed, place};
    const uint64_t seed = e->limits.hash_seed + e->limits.first_generation;
    return (uint32_t)(XXH3_64bits_withSeed(now, sizeof now, seed) >> 33);
}

void ts_engine_pool_add(ts_engine *e, ts_session *none, const ts_command *c, ts_answer *answer)
{
    const ts_pool_config *config = c->pool_add.config;
    uint32_t place;
    char why[TS_MESSAGE_BYTES];
    (void)none;
    ts_status status = ts_engine_pool_place(e, config, &place, why, sizeof why);
    if (status != TS_OK)
        return ts_refuse(answer, status, "%s", why);
    ts_engine_pool *pool = &e->pools[place];
    if (make_books(e, config, &pool->books) != TS_OK) {
        ts_pool_fini(&pool->books);
        return ts_refuse(answer, TS_ENOMEM, "no memory for the books of %u blocks",
                         config->num_blocks);
    }
    pool->config = *config;
    pool->room = (ts_wait_list){TS_NONE, TS_NONE};
    ts_sequences_init(&pool->seqs, config->sequences_max, config->geometry.block_tokens,
                      first_generation(e, place));
    pool->seqs.order.seed = e->limits.hash_seed;
    e->num_pools += place == e->num_pools;
    e->live_pools++;
    answer->pool = place;
}

void ts_engine_pool_quotas(ts_engine *e, ts_session *none, const ts_command *c, ts_answer *answer)
{
    (void)none;
    if (!ts_engine_has_pool(e, c->pool))
        return ts_refuse(answer, TS_ENOENT, "there is no pool %u", c->pool);
    ts_pool_config *config = &e->pools[c->pool].config, next = *c->pool_quotas.config;
    next.cache = config->cache; /* TS_OP_CACHE_SET changes it */
    *config = next;
    ts_waits_look_again(e, c->pool);
}

/* The pools' names, as many as there is room for, and then "...". */
static void list_pools(const ts_engine *e, char *list, size_t bytes)
{
    static const char more[] = ", ...";
    size_t used = 0;
    list[0] = '\0';
    for (uint32_t i = 0; i < e->num_pools; i++) {
        if (!ts_engine_has_pool(e, i))
            continue;
        const char *name = e->pools[i].config.name, *comma = used == 0 ? "" : ", ";
        if (used + strlen(comma) + strlen(name) + 2 + sizeof more > bytes) {
            snprintf(list + used, bytes - used, "%s", used == 0 ? "..." : more);
            return;
        }
        used += (size_t)snprintf(list + used, bytes - used, "%s'%s'", comma, name);
    }
}

uint32_t ts_engine_pool_named(const ts_engine *e, const char *name, ts_answer *answer)
{
    const bool only = name[0] == '\0' && e->live_pools == 1;
    char known[128];
    for (uint32_t i = 0; i < e->num_pools; i++)
        if (ts_engine_has_pool(e, i) && (only || strcmp(e->pools[i].config.name, name) == 0))
            return i;
    list_pools(e, known, sizeof known);
    if (name[0] == '\0' && e->live_pools > 1)
        ts_refuse(answer, TS_EINVAL, "there are several pools: name one of %s", known);
    else
        ts_refuse(answer, TS_ENOENT, "there is no pool '%.64s'; there %s %s", name,
                  e->live_pools == 1 ? "is" : "are", e->live_pools == 0 ? "no pools" : known);
    return TS_NONE;
}

void ts_engine_pool_open(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    uint32_t i = ts_engine_pool_named(e, c->pool_open.name, answer);
    if (i == TS_NONE)
        return;
    const ts_pool_config *config = &e->pools[i].config;
    if (c->pool_open.writable && config->client_write == TS_CLIENT_WRITE_NONE)
        return ts_refuse(answer, TS_EPERM,
                         "pool '%s' may not be mapped writable by uid %u: its configuration says "
                         "client_write = none",
                         config->name, e->tenants[s->tenant]);
    s->opened_pools |= (uint64_t)1 << i;
    if (c->pool_open.writable)
        s->writable_pools |= (uint64_t)1 << i;
    answer->pool = i;
}

void ts_engine_pool_close(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    const bool waits = s->wait.kind != TS_WAIT_NONE && s->wait.pool == c->pool;
    bool has_step = false;
    for (uint32_t i = s->step_list; i != TS_NONE && !has_step; i = e->steps[i].next)
        has_step = e->steps[i].pool == c->pool;
    if (has_step || waits || s->owned[c->pool] != TS_NONE)
        return ts_refuse(answer, TS_EBUSY,
                         "the session has %s in pool '%s', which stays open in it",
                         has_step ? "an open step"
                         : waits  ? "a call that waits"
                                  : "sequences",
                         e->pools[c->pool].config.name);
    s->opened_pools &= ~((uint64_t)1 << c->pool);
    s->writable_pools &= ~((uint64_t)1 << c->pool);
    ts_pool_leave_home(&e->pools[c->pool].books, (uint32_t)(s - e->sessions));
}

void ts_engine_pool_room(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    const ts_engine_pool *pool = &e->pools[c->pool];
    const ts_pool_books *books = &pool->books;
    const ts_pool_tenant *tenant = &books->tenants[s->tenant];
    const uint64_t most = pool->config.tenant_blocks_max;
    const uint64_t left = most > tenant->used ? most - tenant->used : 0;
    const uint64_t available = ts_pool_available(books, s->tenant);
    answer->room = (ts_room){.blocks = books->num_blocks,
                             .available = available < left ? available : left,
                             .used = tenant->used,
                             .cached = tenant->cached,
                             .pinned = tenant->pinned,
                             .limit = most < books->num_blocks ? most : books->num_blocks,
                             .others = books->used - tenant->used,
                             .sequences = tenant->sequences,
                             .waiting = pool->waiting,
                             .asked_tokens = tenant->asked_tokens,
                             .found_tokens = tenant->found_tokens};
}

void ts_engine_pool_remove(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    (void)s;
    ts_engine_pool *pool = &e->pools[c->pool];
    uint32_t users = 0, first = 0;
    for (uint32_t i = 0; i < e->num_sessions; i++)
        if (e->sessions[i].live && (e->sessions[i].opened_pools >> c->pool & 1) && users++ == 0)
            first = i;
    if (users > 0) /* a session that ends while its runs are under way is one too */
        return ts_refuse(answer, TS_EBUSY, "pool '%s' is open in %u session%s (%llx, %s, pid %u%s)",
                         pool->config.name, users, users == 1 ? "" : "s",
                         (unsigned long long)ts_engine_session_id(e, first),
                         e->sessions[first].program, e->sessions[first].pid,
                         users == 1 ? "" : ", ...");
    ts_pool_fini(&pool->books);
    ts_engine_bury(e, &pool->seqs); /* what is left are kept sequences, and tickets' */
    *pool = (ts_engine_pool){.room = {TS_NONE, TS_NONE}};
    e->live_pools--;
}

void ts_engine_pool_resize(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    (void)s;
    ts_engine_pool *pool = &e->pools[c->pool];
    ts_pool_books *books = &pool->books;
    uint32_t slab = books->slab_blocks;
    uint64_t wanted = ((uint64_t)c->pool_resize.num_blocks + slab - 1) / slab * slab;
    if (wanted > books->max_blocks)
        wanted = books->max_blocks;
    if (c->pool_resize.num_blocks == 0 || c->pool_resize.num_blocks > books->max_blocks)
        return ts_refuse_beyond(answer, TS_EINVAL, c->pool_resize.num_blocks, books->max_blocks,
                                "%u blocks for pool '%s'; the limits are 1..%u, its memory_max",
                                c->pool_resize.num_blocks, pool->config.name, books->max_blocks);
    uint32_t used = ts_pool_first_used(books, (uint32_t)wanted);
    if (used != TS_NONE)
        return ts_refuse(
            answer, TS_EBUSY,
            "pool '%s' can't have %u blocks: block %u is in use, and blocks don't move",
            pool->config.name, (uint32_t)wanted, used);
    uint32_t budget = TS_SWEEP_ENTRIES;
    for (uint32_t i = (uint32_t)(wanted / slab); i < books->ungranted && budget > 0; i++)
        ts_pool_evict_slab(books, i, TS_EVICT_RESIZE, &budget);
    if (budget == 0)
        return ts_engine_go_on_later(e, answer);
    ts_pool_resize(books, (uint32_t)wanted);
    pool->config.num_blocks = (uint32_t)wanted;
    ts_waits_look_again(e, c->pool);
}

uint32_t ts_engine_next_slab(const ts_engine *e, uint32_t pool, uint32_t tenant)
{
    return ts_pool_next_slab(&e->pools[pool].books, tenant);
}

bool ts_engine_wants_spare(const ts_engine *e, uint32_t pool, uint32_t tenant)
{
    return ts_engine_has_pool(e, pool) && ts_pool_wants_spare(&e->pools[pool].books, tenant);
}

void ts_engine_slab_grant(ts_engine *e, ts_session *s, const ts_command *c, ts_answer *answer)
{
    (void)s;
    if (!ts_engine_has_pool(e, c->pool))
        return ts_refuse(answer, TS_ENOENT, "there is no pool %u", c->pool);
    ts_status status =
        ts_pool_grant(&e->pools[c->pool].books, c->slab_grant.slab, c->slab_grant.tenant);
    if (status != TS_OK)
        ts_refuse(answer, status, "slab %u can't be granted to tenant %u", c->slab_grant.slab,
                  c->slab_grant.tenant);
}
