/* What only all keys together show: what a configuration lacks, which keys can't go together, and
 * blocks, slabs, quotas and the socket, which are worked out. */
#include "config.h"

#include "config_keys.h"
#include "socket_place.h"

#include <limits.h>
#include <string.h>

/* What a slab is a multiple of: a page, or a granule of device memory. */
#define HOST_GRANULE 4096u
#define DEVICE_GRANULE (2u << 20)

static bool has(const ts_config_pool *p, const char *name)
{
    const ts_config_key *key = ts_config_find_key(&ts_config_pools, name);
    return p->given.keys >> (key - ts_config_pools.keys) & 1;
}

/* Complains of keys that must be there; false: some aren't. */
static bool complete(ts_config *c, const ts_config_pool *p)
{
    const char *name = p->pool.name;
    bool ok = !p->bad;
    for (uint32_t i = 0; i < ts_config_pools.num_keys; i++) {
        const ts_config_key *key = &ts_config_pools.keys[i];
        if (!key->required || (p->given.keys >> i & 1))
            continue;
        ts_config_complain(c, p->given.line, "pool '%s': %s is missing: it is %llu..%llu", name,
                           key->name, (unsigned long long)key->least,
                           (unsigned long long)key->most);
        ok = false;
    }
    if (has(p, "memory") == has(p, "blocks")) {
        bool both = has(p, "memory");
        uint32_t line = both ? ts_config_pool_line(p, "blocks") : p->given.line;
        ts_config_complain(c, line, "pool '%s': give either memory or blocks", name);
        ok = false;
    }
    return ok;
}

/* One request gives a whole sequence back, so its block table has a limit. */
static void finish_sequence_tokens(ts_config *c, ts_config_pool *p)
{
    const uint32_t most = TS_COMMAND_ENTRIES * p->pool.geometry.block_tokens;
    if (p->pool.sequence_tokens_max <= most)
        return;
    if (has(p, "sequence_tokens"))
        ts_config_complain(c, ts_config_pool_line(p, "sequence_tokens"),
                           "pool '%s': sequence_tokens = %u: with blocks of %u tokens the limit is "
                           "%u, %u blocks",
                           p->pool.name, p->pool.sequence_tokens_max, p->pool.geometry.block_tokens,
                           most, TS_COMMAND_ENTRIES);
    p->pool.sequence_tokens_max = most;
}

/* Keys that can't go together. */
static void check_place(ts_config *c, const ts_config_pool *p)
{
    const char *name = p->pool.name;
    const bool host = strcmp(p->pool.device, "host") == 0;
    const bool cuda = strncmp(p->pool.device, "cuda:", 5) == 0;
    if ((host && p->provider > TS_PROVIDER_HOST) || (cuda && p->provider == TS_PROVIDER_HOST))
        ts_config_complain(c, ts_config_pool_line(p, "provider"),
                           "pool '%s': provider = %s can't be used with device = %s", name,
                           ts_provider_name(p->provider), p->pool.device);
    if ((host || p->provider == TS_PROVIDER_HOST) && p->pool.kernel != TS_KERNEL_AUTO)
        ts_config_complain(c, ts_config_pool_line(p, "kernel"),
                           "pool '%s': kernel = %s runs on a GPU, and the pool is in host memory",
                           name, ts_kernel_name(p->pool.kernel));
}

/* Blocks of a slab. It is no larger than what the pool may grow to. */
static uint32_t slab_blocks_of(const ts_config_pool *p, uint32_t blocks, bool host)
{
    const size_t granule = host ? HOST_GRANULE : DEVICE_GRANULE;
    const uint32_t wanted = ts_geometry_slab_blocks(&p->pool.geometry, p->slab, granule);
    const uint32_t least = ts_geometry_slab_blocks(&p->pool.geometry, 1, granule);
    const uint64_t max = p->memory_max / ts_geometry_block_bytes(&p->pool.geometry);
    const uint64_t most = max > blocks ? max : blocks;
    /* The one slab of a GPU's pool that can't grow need not be whole granules; others are, and in
     * host memory have whole pages. */
    const uint64_t all = host || max > 0 ? (most + least - 1) / least * least : most;
    return wanted > all ? (uint32_t)all : wanted;
}

/* Blocks, slabs and what the pool may grow to. False: they can't be. */
static bool finish_memory(ts_config *c, ts_config_pool *p)
{
    const char *name = p->pool.name;
    const size_t block_bytes = ts_geometry_block_bytes(&p->pool.geometry);
    const bool host = strcmp(p->pool.device, "host") == 0;
    const uint32_t max_line = ts_config_pool_line(p, "memory_max");
    uint64_t blocks = p->blocks != 0 ? p->blocks : p->memory / block_bytes;
    if (blocks == 0 || blocks > TS_POOL_BLOCKS_MAX) {
        ts_config_complain(c, ts_config_pool_line(p, "memory"),
                           "pool '%s': %llu blocks of %zu bytes; the limits are 1..%u blocks", name,
                           (unsigned long long)blocks, block_bytes, TS_POOL_BLOCKS_MAX);
        return false;
    }
    p->pool.num_blocks = (uint32_t)blocks;
    p->pool.slab_blocks = slab_blocks_of(p, (uint32_t)blocks, host);
    const uint64_t max = p->memory_max / block_bytes, slab = p->pool.slab_blocks;
    if (p->memory_max != 0 && max < blocks) {
        ts_config_complain(c, max_line, "pool '%s': memory_max is less than its memory", name);
        return false;
    }
    if (max > TS_POOL_BLOCKS_MAX) {
        ts_config_complain(c, max_line,
                           "pool '%s': memory_max would be %llu blocks; the limit is %u", name,
                           (unsigned long long)max, TS_POOL_BLOCKS_MAX);
        return false;
    }
    p->pool.max_blocks = (uint32_t)(max > blocks ? max : blocks);
    if (max > blocks) { /* whole slabs, up to the last */
        blocks = (blocks + slab - 1) / slab * slab;
        p->pool.num_blocks = (uint32_t)(blocks < max ? blocks : max);
    }
    return true;
}

/* What tenants may have of it. */
static void finish_quotas(ts_config *c, ts_config_pool *p)
{
    const size_t block_bytes = ts_geometry_block_bytes(&p->pool.geometry);
    const struct {
        const char *key;
        uint64_t bytes;
    } quotas[] = {{"tenant_memory", p->tenant_memory}, {"tenant_pinned", p->tenant_pinned}};
    for (size_t i = 0; i < sizeof quotas / sizeof *quotas; i++)
        if (quotas[i].bytes != 0 && quotas[i].bytes < block_bytes)
            ts_config_complain(c, ts_config_pool_line(p, quotas[i].key),
                               "pool '%s': %s = %llu bytes is less than a block, which has %zu",
                               p->pool.name, quotas[i].key, (unsigned long long)quotas[i].bytes,
                               block_bytes);
    ts_config_set_quotas(p, &p->pool);
}

void ts_config_set_quotas(const ts_config_pool *p, ts_pool_config *to)
{
    const uint64_t block_bytes = ts_geometry_block_bytes(&to->geometry);
    const uint32_t blocks = to->max_blocks > to->num_blocks ? to->max_blocks : to->num_blocks;
    const uint64_t least = 1; /* none would shut everybody out */
    to->tenant_blocks_max = p->tenant_memory == 0 ? UINT64_MAX : p->tenant_memory / block_bytes;
    to->tenant_pinned_max =
        p->tenant_pinned == 0 ? (blocks + 1) / 2 : p->tenant_pinned / block_bytes;
    to->tenant_blocks_max = to->tenant_blocks_max > least ? to->tenant_blocks_max : least;
    to->tenant_pinned_max = to->tenant_pinned_max > least ? to->tenant_pinned_max : least;
    if (!has(p, "tenant_sequences") || to->tenant_sequences_max == 0)
        to->tenant_sequences_max = (to->sequences_max + 3) / 4;
    if (!has(p, "tenant_entries") || to->tenant_entries_max == 0)
        to->tenant_entries_max = TS_ENTRIES_PER_BLOCK * (uint64_t)blocks;
}

void ts_config_set_sessions(const ts_config *c, ts_engine_limits *to)
{
    const ts_config_key *key = ts_config_find_key(&ts_config_daemon, "tenant_sessions");
    const bool given = c->given.keys >> (key - ts_config_daemon.keys) & 1;
    if (!given || to->tenant_sessions == 0)
        to->tenant_sessions = (to->sessions + 3) / 4;
}

static void finish_pool(ts_config *c, ts_config_pool *p)
{
    char why[160];
    if (!complete(c, p))
        return;
    if (ts_geometry_check(&p->pool.geometry, why, sizeof why) != TS_OK)
        return ts_config_complain(c, p->given.line, "pool '%s': %s", p->pool.name, why);
    check_place(c, p);
    if (!finish_memory(c, p))
        return;
    finish_quotas(c, p);
    finish_sequence_tokens(c, p);
}

/* A user who isn't the system's has a socket of their own, unless they set one. */
static void finish_socket(ts_config *c)
{
    const ts_config_key *key = ts_config_find_key(&ts_config_daemon, "socket");
    char own[PATH_MAX];
    if (c->given.keys >> (key - ts_config_daemon.keys) & 1)
        return;
    size_t length = ts_own_socket(own, sizeof own);
    if (length > TS_CONFIG_SOCKET_MAX)
        return ts_config_complain(c, 0,
                                  "socket: by XDG_RUNTIME_DIR it has a path of %zu bytes; the "
                                  "limit is %zu: set another",
                                  length, TS_CONFIG_SOCKET_MAX);
    c->socket_is_own = length > 0;
    if (c->socket_is_own)
        memcpy(c->socket, own, length + 1);
}

ts_status ts_config_finish_pools(ts_config *c)
{
    for (uint32_t i = 0; i < c->num_pools; i++)
        finish_pool(c, &c->pools[i]);
    return c->num_problems == 0 ? TS_OK : TS_EINVAL;
}

ts_status ts_config_finish(ts_config *c)
{
    finish_socket(c);
    if (c->num_pools == 0)
        ts_config_complain(c, 0, "no pool is configured: add a [pool NAME] section");
    (void)ts_config_finish_pools(c);
    ts_config_set_sessions(c, &c->limits);
    return c->num_problems == 0 ? TS_OK : TS_EINVAL;
}
