/* The books held against themselves. */
#include "block_pool_internal.h"

#include <stdio.h>

#define WRONG(...)                                                                                 \
    do {                                                                                           \
        snprintf(why, why_bytes, __VA_ARGS__);                                                     \
        return TS_EINTERNAL;                                                                       \
    } while (0)

static ts_status check_slab(const ts_pool_books *p, uint32_t slab, char *why, size_t why_bytes)
{
    const ts_slab *s = &p->slabs[slab];
    uint32_t first = slab * p->slab_blocks, used = 0, cached = 0, freed = 0, listed = 0;
    const bool indexed = p->index != NULL && p->index->count > 0; /* ts_index_check counts them */
    for (uint32_t b = first; b < first + s->blocks; b++) {
        used += ts_pool_refs(p, b) > 0;
        cached += p->refs[b] == CACHED;
        freed += (p->refs[b] & FREE) != 0;
        if (indexed && ts_index_has(p->index, b) ? ts_pool_refs(p, b) == 0 && p->refs[b] != CACHED
                                                 : p->refs[b] == CACHED)
            WRONG("block %u is in the index and free, or cached and not in the index", b);
        if (indexed && ts_index_has(p->index, b) && p->index->nodes[b].parent >> 31 == 0 &&
            p->classes[ts_index_parent_of(p->index, b)] < p->classes[b])
            WRONG("block %u is of class %u, and what it hangs from of a lower one", b,
                  p->classes[b]);
        if (p->refs[b] != 0 && b - first >= s->touched)
            WRONG("block %u is in use, but slab %u says only %u blocks were touched", b, slab,
                  s->touched);
    }
    if (used != s->used || cached != s->cached)
        WRONG("slab %u has %u used and %u cached blocks, its counts say %u and %u", slab, used,
              cached, s->used, s->cached);
    if (used + cached + freed != s->touched)
        WRONG("slab %u: %u used, %u cached and %u freed blocks, but %u touched", slab, used, cached,
              freed, s->touched);
    for (uint32_t b = s->free_head; b != TS_NONE && listed <= freed; listed++) {
        if (b < first || b >= first + s->blocks || !(p->refs[b] & FREE))
            WRONG("block %u is on slab %u's free list but isn't free there", b, slab);
        b = (p->refs[b] & LAST) == LAST ? TS_NONE : p->refs[b] & LAST;
    }
    if (listed != freed)
        WRONG("slab %u has %u freed blocks, %u on its list", slab, freed, listed);
    return TS_OK;
}

/* The slabs that are a session's own, and those of a tenant that are nobody's. */
static ts_status check_homes(const ts_pool_books *p, char *why, size_t why_bytes)
{
    uint32_t own = 0, listed = 0;
    for (uint32_t i = 0; i < p->num_slabs; i++) {
        const ts_slab *s = &p->slabs[i];
        own += s->home != 0;
        if (s->home > p->num_homes || (s->home != 0 && s->used == 0 && s->cached == 0))
            WRONG("slab %u is session %u's own, and empty, or there is no such session", i,
                  s->home - 1);
    }
    for (uint32_t h = 0; h < p->num_homes; h++) {
        uint32_t last = TS_NONE;
        for (uint32_t i = p->homes[h].first; i != TS_NONE && listed <= own;
             last = i, i = p->slabs[i].home_next, listed++)
            if (p->slabs[i].home != h + 1 || p->slabs[i].home_prev != last ||
                (last != TS_NONE && slab_free(&p->slabs[i]) > 0 && slab_free(&p->slabs[last]) == 0))
                WRONG("slab %u is out of its place among session %u's own", i, h);
        if (p->homes[h].last != last)
            WRONG("slab %u is the last of session %u's own, not %u", last, h, p->homes[h].last);
    }
    if (own != listed)
        WRONG("%u slabs are sessions' own, %u listed", own, listed);
    return TS_OK;
}

/* A tenant's slabs with free blocks: nobody's first. */
static ts_status check_nobodys(const ts_pool_books *p, uint32_t tenant, char *why, size_t why_bytes)
{
    const ts_pool_tenant *t = &p->tenants[tenant];
    uint32_t nobodys = 0, homes = 0, last = TS_NONE;
    for (uint32_t i = t->avail; i != TS_NONE; last = i, i = p->slabs[i].avail_next) {
        if (p->slabs[i].home == 0 && last != TS_NONE && p->slabs[last].home != 0)
            WRONG("slab %u is nobody's, and behind one of a session's own", i);
        nobodys += p->slabs[i].home == 0;
    }
    for (uint32_t i = 0; i < p->num_slabs; i++)
        homes += p->slabs[i].tenant == tenant && p->slabs[i].home != 0 &&
                 p->slabs[i].home_prev == TS_NONE;
    if (nobodys != t->nobodys || homes != t->homes || last != t->avail_last)
        WRONG("tenant %u: %u slabs with free blocks are nobody's, %u sessions have their own, the "
              "last is %u; the counts say %u, %u, %u",
              tenant, nobodys, homes, last, t->nobodys, t->homes, t->avail_last);
    return TS_OK;
}

/* What the slabs of one tenant add up to. */
typedef struct tenant_sums {
    uint32_t slabs, used, free, cached;
    uint32_t avail; /* slabs with free blocks */
    uint64_t empty_blocks, idle_blocks;
} tenant_sums;

static tenant_sums sum_tenant(const ts_pool_books *p, uint32_t tenant)
{
    tenant_sums sums = {0};
    for (uint32_t i = 0; i < p->num_slabs; i++) {
        const ts_slab *s = &p->slabs[i];
        if (s->tenant != tenant)
            continue;
        sums.slabs++;
        sums.used += s->used;
        sums.cached += s->cached;
        sums.free += slab_free(s);
        if (s->used == 0)
            *(s->cached > 0 ? &sums.idle_blocks : &sums.empty_blocks) += s->blocks;
        sums.avail += slab_free(s) > 0;
    }
    return sums;
}

/* The blocks that only the cache has, in the order in which they would go; *count is how many. */
static ts_status check_cached_order(const ts_pool_books *p, uint32_t tenant, uint32_t most,
                                    uint32_t *count, char *why, size_t why_bytes)
{
    const ts_pool_tenant *t = &p->tenants[tenant];
    *count = 0;
    for (uint32_t class = 0; class < TS_CACHE_CLASSES; class ++)
        for (uint32_t b = t->cached_oldest[class]; b != TS_NONE && *count <= most;
             b = p->cached_next[b], (*count)++)
            if (p->refs[b] != CACHED || p->slabs[ts_pool_slab_of(p, b)].tenant != tenant ||
                p->classes[b] != class)
                WRONG("block %u is on tenant %u's list of cached blocks of class %u", b, tenant,
                      class);
    return TS_OK;
}

/* Adds what the tenant has in empty and in idle slabs to the two sums. */
static ts_status check_tenant(const ts_pool_books *p, uint32_t t, uint64_t *all_empty,
                              uint64_t *all_idle, char *why, size_t why_bytes)
{
    const ts_pool_tenant *tenant = &p->tenants[t];
    const tenant_sums sums = sum_tenant(p, t);
    uint32_t on_list = 0, in_order;
    for (uint32_t i = tenant->avail; i != TS_NONE && on_list <= sums.avail;
         i = p->slabs[i].avail_next, on_list++)
        if (p->slabs[i].tenant != t || slab_free(&p->slabs[i]) == 0)
            WRONG("slab %u is on tenant %u's list of slabs with free blocks", i, t);
    if (check_cached_order(p, t, sums.cached, &in_order, why, why_bytes) != TS_OK)
        return TS_EINTERNAL;
    if (sums.empty_blocks != tenant->empty_blocks || sums.idle_blocks != tenant->idle_blocks)
        WRONG("tenant %u: %llu blocks in empty slabs and %llu in idle ones, the counts say %llu "
              "and %llu",
              t, (unsigned long long)sums.empty_blocks, (unsigned long long)sums.idle_blocks,
              (unsigned long long)tenant->empty_blocks, (unsigned long long)tenant->idle_blocks);
    *all_empty += sums.empty_blocks;
    *all_idle += sums.idle_blocks;
    if (sums.cached != tenant->cached || in_order != sums.cached)
        WRONG("tenant %u: %u cached blocks, %u counted, %u listed", t, sums.cached, tenant->cached,
              in_order);
    if (sums.slabs != tenant->slabs || sums.used != tenant->used || sums.free != tenant->free ||
        sums.avail != on_list)
        WRONG("tenant %u: %u slabs, %u used, %u free, %u slabs with free blocks; the counts say "
              "%u, %u, %u, %u",
              t, sums.slabs, sums.used, sums.free, sums.avail, tenant->slabs, tenant->used,
              tenant->free, on_list);
    return check_nobodys(p, t, why, why_bytes);
}

/* Each block's references, and how many have some. */
static ts_status check_blocks(const ts_pool_books *p, const uint32_t *expected, char *why,
                              size_t why_bytes)
{
    uint32_t used = 0, shared = 0;
    for (uint32_t b = 0; b < p->num_blocks; b++) {
        const uint32_t refs = ts_pool_refs(p, b);
        if (refs != expected[b])
            WRONG("block %u has %u references, its count says %u", b, expected[b], refs);
        used += refs > 0;
        shared += refs > 1;
    }
    if (used != p->used || shared != p->shared)
        WRONG("%u used and %u shared blocks, the counts say %u and %u", used, shared, p->used,
              p->shared);
    return TS_OK;
}

/* Each slab, and the lists of those that are empty or have cached blocks alone. */
static ts_status check_slabs(const ts_pool_books *p, char *why, size_t why_bytes)
{
    uint32_t empty = 0, idle = 0, cached = 0, listed = 0;
    for (uint32_t i = 0; i < p->num_slabs; i++) {
        const ts_slab *s = &p->slabs[i];
        if ((s->tenant == TS_NONE) != (i >= p->ungranted))
            WRONG("slab %u: tenant %u, but %u slabs were granted", i, s->tenant, p->ungranted);
        if (check_slab(p, i, why, why_bytes) != TS_OK)
            return TS_EINTERNAL;
        empty += s->tenant != TS_NONE && s->used == 0 && s->cached == 0;
        idle += s->used == 0 && s->cached > 0;
        cached += s->cached;
    }
    if (cached != p->cached || (p->index != NULL && p->index->count < cached))
        WRONG("%u cached blocks, the count says %u", cached, p->cached);
    if (p->index != NULL && ts_index_check(p->index, why, why_bytes) != TS_OK)
        return TS_EINTERNAL;
    for (uint32_t i = p->empty; i != TS_NONE && listed <= empty; i = p->slabs[i].empty_next)
        listed++;
    if (empty != p->num_empty || empty != listed)
        WRONG("%u empty slabs, %u counted, %u listed", empty, p->num_empty, listed);
    listed = 0;
    for (uint32_t i = p->idle_oldest; i != TS_NONE && listed <= idle; i = p->slabs[i].idle_next)
        listed += p->slabs[i].used == 0 && p->slabs[i].cached > 0;
    if (idle != listed)
        WRONG("%u slabs of cached blocks alone, %u listed", idle, listed);
    return TS_OK;
}

ts_status ts_pool_check(const ts_pool_books *p, const uint32_t *expected, char *why,
                        size_t why_bytes)
{
    uint64_t all_empty = 0, all_idle = 0;
    ts_status status = check_blocks(p, expected, why, why_bytes);
    if (status == TS_OK)
        status = check_slabs(p, why, why_bytes);
    for (uint32_t t = 0; status == TS_OK && t < p->num_tenants; t++)
        status = check_tenant(p, t, &all_empty, &all_idle, why, why_bytes);
    if (status == TS_OK)
        status = check_homes(p, why, why_bytes);
    if (status != TS_OK)
        return status;
    if (all_empty != p->empty_blocks || all_idle != p->idle_blocks)
        WRONG("%llu blocks in empty slabs and %llu in idle ones, the counts say %llu and %llu",
              (unsigned long long)all_empty, (unsigned long long)all_idle,
              (unsigned long long)p->empty_blocks, (unsigned long long)p->idle_blocks);
    return TS_OK;
}
