#include "block_pool_internal.h"
#include "large_array.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void empty_add(ts_pool_books *p, uint32_t slab)
{
    ts_slab *s = &p->slabs[slab];
    s->empty_prev = TS_NONE;
    s->empty_next = p->empty;
    if (p->empty != TS_NONE)
        p->slabs[p->empty].empty_prev = slab;
    p->empty = slab;
    p->num_empty++;
    p->empty_blocks += s->blocks;
    p->tenants[s->tenant].empty_blocks += s->blocks;
    if (s->home != 0)
        ts_pool_set_home(p, slab, TS_NONE);
}

static void empty_remove(ts_pool_books *p, uint32_t slab)
{
    ts_slab *s = &p->slabs[slab];
    if (s->empty_prev != TS_NONE)
        p->slabs[s->empty_prev].empty_next = s->empty_next;
    else
        p->empty = s->empty_next;
    if (s->empty_next != TS_NONE)
        p->slabs[s->empty_next].empty_prev = s->empty_prev;
    p->num_empty--;
    p->empty_blocks -= s->blocks;
    p->tenants[s->tenant].empty_blocks -= s->blocks;
}

/* ---- cached blocks ---- */

static void idle_add(ts_pool_books *p, uint32_t slab)
{
    ts_slab *s = &p->slabs[slab];
    s->idle_prev = p->idle_newest;
    s->idle_next = TS_NONE;
    if (p->idle_newest != TS_NONE)
        p->slabs[p->idle_newest].idle_next = slab;
    else
        p->idle_oldest = slab;
    p->idle_newest = slab;
    p->idle_blocks += s->blocks;
    p->tenants[s->tenant].idle_blocks += s->blocks;
}

static void idle_remove(ts_pool_books *p, uint32_t slab)
{
    ts_slab *s = &p->slabs[slab];
    if (s->idle_prev != TS_NONE)
        p->slabs[s->idle_prev].idle_next = s->idle_next;
    else
        p->idle_oldest = s->idle_next;
    if (s->idle_next != TS_NONE)
        p->slabs[s->idle_next].idle_prev = s->idle_prev;
    else
        p->idle_newest = s->idle_prev;
    p->idle_blocks -= s->blocks;
    p->tenants[s->tenant].idle_blocks -= s->blocks;
}

/* A block has lost its last reference, and the index knows it. */
static void cached_add(ts_pool_books *p, ts_slab *s, uint32_t block)
{
    ts_pool_tenant *t = &p->tenants[s->tenant];
    p->refs[block] = CACHED;
    uint32_t *oldest = &t->cached_oldest[p->classes[block]];
    uint32_t *newest = &t->cached_newest[p->classes[block]];
    p->cached_since[block] = p->now_s;
    p->cached_prev[block] = *newest;
    p->cached_next[block] = TS_NONE;
    if (*newest != TS_NONE)
        p->cached_next[*newest] = block;
    else
        *oldest = block;
    *newest = block;
    t->cached++;
    s->cached++;
    p->cached++;
}

static void cached_remove(ts_pool_books *p, ts_slab *s, uint32_t block)
{
    ts_pool_tenant *t = &p->tenants[s->tenant];
    uint32_t prev = p->cached_prev[block], next = p->cached_next[block];
    if (prev != TS_NONE)
        p->cached_next[prev] = next;
    else
        t->cached_oldest[p->classes[block]] = next;
    if (next != TS_NONE)
        p->cached_prev[next] = prev;
    else
        t->cached_newest[p->classes[block]] = prev;
    t->cached--;
    s->cached--;
    p->cached--;
}

/* The block, which is neither used nor cached any more, is free. */
static void give_back(ts_pool_books *p, uint32_t slab, uint32_t block)
{
    ts_slab *s = &p->slabs[slab];
    p->refs[block] = FREE | (s->free_head == TS_NONE ? LAST : s->free_head);
    s->free_head = block;
    if (slab_free(s) == 1) {
        ts_pool_avail_add(p, slab);
        ts_pool_home_move(p, slab, true);
    }
    p->tenants[s->tenant].free++;
}

/* Takes a leaf out of the index. */
static void index_remove(ts_pool_books *p, uint32_t block)
{
    ts_index_remove(p->index, block);
    p->classes[block] = 0;
}

static void note_age(ts_pool_books *p, uint32_t block)
{
    static const uint32_t bounds[TS_AGE_BINS - 1] = {1, 10, 60, 600, 3600};
    const uint32_t age = p->now_s - p->cached_since[block];
    uint32_t bin = 0;
    while (bin < TS_AGE_BINS - 1 && age > bounds[bin])
        bin++;
    p->ages[bin]++;
    p->age_sum += age;
}

/* Evicts a cached block that no other hangs from. */
static void evict(ts_pool_books *p, uint32_t block, ts_evict_cause cause)
{
    uint32_t slab = ts_pool_slab_of(p, block);
    cached_remove(p, &p->slabs[slab], block);
    index_remove(p, block);
    give_back(p, slab, block);
    note_age(p, block);
    p->evicted[cause]++;
    if (p->slabs[slab].used == 0 && p->slabs[slab].cached == 0) {
        idle_remove(p, slab);
        empty_add(p, slab);
    }
}

/* Evicts a cached block, and before it what hangs from it. */
static void evict_tree(ts_pool_books *p, uint32_t block, ts_evict_cause cause, uint32_t *budget)
{
    uint32_t at = ts_index_leaf_below(p->index, block);
    for (; *budget > 0 && at != block; --*budget) {
        uint32_t parent = ts_index_parent_of(p->index, at);
        evict(p, at, cause);
        at = ts_index_leaf_below(p->index, parent);
    }
    if (*budget == 0)
        return;
    evict(p, block, cause);
    --*budget;
}

void ts_pool_evict(ts_pool_books *p, uint32_t tenant, uint64_t blocks, ts_evict_cause cause,
                   uint32_t *budget)
{
    const ts_pool_tenant *t = &p->tenants[tenant];
    for (uint32_t class = 0; class < TS_CACHE_CLASSES; class ++)
        for (; blocks > 0 && *budget > 0 && t->cached_oldest[class] != TS_NONE; blocks--) {
            evict(p, t->cached_oldest[class], cause);
            --*budget;
        }
}

void ts_pool_evict_slab(ts_pool_books *p, uint32_t slab, ts_evict_cause cause, uint32_t *budget)
{
    const ts_slab *s = &p->slabs[slab];
    assert(s->used == 0);
    for (uint32_t b = slab * p->slab_blocks; s->cached > 0 && *budget > 0; b++)
        if (p->refs[b] == CACHED)
            evict_tree(p, b, cause, budget);
}

bool ts_pool_empty_other(ts_pool_books *p, uint32_t tenant, uint32_t share, bool beyond,
                         uint32_t *budget)
{
    uint32_t slab = p->idle_oldest;
    for (; slab != TS_NONE; slab = p->slabs[slab].idle_next) {
        const uint32_t theirs = p->slabs[slab].tenant;
        if (theirs != tenant && (!beyond || p->tenants[theirs].slabs > share))
            break;
    }
    if (slab == TS_NONE)
        return false;
    ts_pool_evict_slab(p, slab, TS_EVICT_OTHERS, budget);
    return true;
}

void ts_pool_drop_retired(ts_pool_books *p, uint32_t *budget)
{
    uint32_t near = TS_NO_BLOCK, block;
    for (; *budget > 0 && (block = ts_index_retired_leaf(p->index, &near)) != TS_NO_BLOCK;
         --*budget)
        if (p->refs[block] == CACHED)
            evict(p, block, TS_EVICT_DROP);
        else
            index_remove(p, block);
}

void ts_pool_drop_block(ts_pool_books *p, uint32_t block)
{
    while (p->index != NULL && ts_index_has(p->index, block)) {
        const uint32_t leaf = ts_index_leaf_below(p->index, block);
        if (p->refs[leaf] == CACHED)
            evict(p, leaf, TS_EVICT_DROP);
        else
            index_remove(p, leaf);
    }
}

bool ts_pool_raise_class(ts_pool_books *p, uint32_t block, uint8_t class)
{
    assert(ts_pool_refs(p, block) > 0);
    if (p->classes[block] >= class)
        return false;
    p->classes[block] = class;
    return true;
}

void ts_pool_forget(ts_pool_books *p, uint32_t block)
{
    assert(ts_pool_refs(p, block) == 1);
    index_remove(p, block);
}

uint64_t ts_pool_evicted(const ts_pool_books *p)
{
    uint64_t all = 0;
    for (uint32_t i = 0; i < TS_EVICT_CAUSES; i++)
        all += p->evicted[i];
    return all;
}

ts_status ts_pool_use_index(ts_pool_books *p, uint32_t block_tokens, uint64_t seed)
{
    p->index = malloc(sizeof *p->index);
    p->cached_prev = ts_large_array_new(p->max_blocks, sizeof *p->cached_prev);
    p->cached_next = ts_large_array_new(p->max_blocks, sizeof *p->cached_next);
    p->cached_since = ts_large_array_new(p->max_blocks, sizeof *p->cached_since);
    p->classes = ts_large_array_new(p->max_blocks, sizeof *p->classes);
    if (p->index != NULL && !ts_index_init(p->index, p->max_blocks, block_tokens, seed)) {
        free(p->index);
        p->index = NULL;
    }
    return p->index != NULL && p->cached_prev != NULL && p->cached_next != NULL &&
                   p->cached_since != NULL && p->classes != NULL
               ? TS_OK
               : TS_ENOMEM;
}

/* ---- slabs ---- */

static uint32_t slabs_of(uint32_t blocks, uint32_t slab_blocks)
{
    return (uint32_t)(((uint64_t)blocks + slab_blocks - 1) / slab_blocks);
}

uint32_t ts_pool_slabs_max(const ts_pool_books *p)
{
    return slabs_of(p->max_blocks, p->slab_blocks);
}

ts_status ts_pool_init(ts_pool_books *p, uint32_t num_blocks, uint32_t max_blocks,
                       uint32_t slab_blocks)
{
    assert(num_blocks >= 1 && slab_blocks >= 1 && max_blocks <= TS_POOL_BLOCKS_MAX);
    assert(num_blocks == max_blocks || (num_blocks < max_blocks && num_blocks % slab_blocks == 0));
    uint32_t max_slabs = slabs_of(max_blocks, slab_blocks);
    *p = (ts_pool_books){
        .num_blocks = num_blocks,
        .slab_blocks = slab_blocks,
        .num_slabs = slabs_of(num_blocks, slab_blocks),
        .max_blocks = max_blocks,
        .empty = TS_NONE,
        .idle_oldest = TS_NONE,
        .idle_newest = TS_NONE,
    };
    p->refs = ts_large_array_new(max_blocks, sizeof *p->refs);
    p->pins = ts_large_array_new(max_blocks, sizeof *p->pins);
    p->slabs = calloc(max_slabs, sizeof *p->slabs);
    if (p->refs == NULL || p->pins == NULL || p->slabs == NULL) {
        ts_pool_fini(p);
        return TS_ENOMEM;
    }
    for (uint32_t i = 0; i < max_slabs; i++) {
        uint32_t first = i * slab_blocks, rest = max_blocks - first;
        p->slabs[i] = (ts_slab){.tenant = TS_NONE,
                                .free_head = TS_NONE,
                                .blocks = rest < slab_blocks ? rest : slab_blocks};
    }
    return TS_OK;
}

void ts_pool_use_large_pages(ts_pool_books *p, bool large)
{
    ts_large_array_pages(p->refs, p->max_blocks, sizeof *p->refs, large);
    ts_large_array_pages(p->pins, p->max_blocks, sizeof *p->pins, large);
    ts_large_array_pages(p->cached_prev, p->max_blocks, sizeof *p->cached_prev, large);
    ts_large_array_pages(p->cached_next, p->max_blocks, sizeof *p->cached_next, large);
    ts_large_array_pages(p->cached_since, p->max_blocks, sizeof *p->cached_since, large);
    ts_large_array_pages(p->classes, p->max_blocks, sizeof *p->classes, large);
    if (p->index != NULL)
        ts_index_use_large_pages(p->index, large);
}

void ts_pool_fini(ts_pool_books *p)
{
    if (p->index != NULL)
        ts_index_fini(p->index);
    free(p->index);
    ts_large_array_free(p->cached_prev, p->max_blocks, sizeof *p->cached_prev);
    ts_large_array_free(p->cached_next, p->max_blocks, sizeof *p->cached_next);
    ts_large_array_free(p->cached_since, p->max_blocks, sizeof *p->cached_since);
    ts_large_array_free(p->classes, p->max_blocks, sizeof *p->classes);
    ts_large_array_free(p->refs, p->max_blocks, sizeof *p->refs);
    ts_large_array_free(p->pins, p->max_blocks, sizeof *p->pins);
    free(p->slabs);
    free(p->homes);
    free(p->tenants);
    *p = (ts_pool_books){0};
}

uint32_t ts_pool_first_used(const ts_pool_books *p, uint32_t first)
{
    for (uint32_t i = first; i < p->num_blocks; i++)
        if (ts_pool_refs(p, i) > 0)
            return i;
    return TS_NONE;
}

void ts_pool_resize(ts_pool_books *p, uint32_t num_blocks)
{
    uint32_t num_slabs = slabs_of(num_blocks, p->slab_blocks);
    for (uint32_t i = num_slabs; i < p->ungranted; i++) {
        ts_slab *s = &p->slabs[i];
        assert(s->used == 0 && s->cached == 0);
        ts_pool_avail_remove(p, i);
        empty_remove(p, i);
        p->tenants[s->tenant].slabs--;
        p->tenants[s->tenant].free -= s->blocks;
        s->tenant = TS_NONE;
        s->touched = 0;
        s->free_head = TS_NONE;
        memset(p->refs + (size_t)i * p->slab_blocks, 0, s->blocks * sizeof *p->refs);
    }
    if (p->ungranted > num_slabs)
        p->ungranted = num_slabs;
    p->num_slabs = num_slabs;
    p->num_blocks = num_blocks;
}

ts_status ts_pool_add_tenant(ts_pool_books *p, uint32_t tenant)
{
    if (tenant < p->num_tenants)
        return TS_OK;
    ts_pool_tenant *grown = realloc(p->tenants, (tenant + 1) * sizeof *grown);
    if (grown == NULL)
        return TS_ENOMEM;
    p->tenants = grown;
    while (p->num_tenants <= tenant)
        p->tenants[p->num_tenants++] =
            (ts_pool_tenant){.avail = TS_NONE,
                             .avail_last = TS_NONE,
                             .cached_oldest = {TS_NONE, TS_NONE, TS_NONE},
                             .cached_newest = {TS_NONE, TS_NONE, TS_NONE}};
    return TS_OK;
}

/* Blocks in the slabs that were never granted. */
static uint64_t ungranted_blocks(const ts_pool_books *p)
{
    if (p->ungranted == p->num_slabs)
        return 0;
    return p->num_blocks - (uint64_t)p->ungranted * p->slab_blocks;
}

uint64_t ts_pool_grantable(const ts_pool_books *p, uint32_t tenant)
{
    return ungranted_blocks(p) + p->empty_blocks - p->tenants[tenant].empty_blocks;
}

uint64_t ts_pool_available(const ts_pool_books *p, uint32_t tenant)
{
    const ts_pool_tenant *t = &p->tenants[tenant];
    return (uint64_t)t->free + t->cached + ts_pool_grantable(p, tenant) + p->idle_blocks -
           t->idle_blocks;
}

uint32_t ts_pool_next_slab(const ts_pool_books *p, uint32_t tenant)
{
    if (p->ungranted < p->num_slabs)
        return p->ungranted;
    for (uint32_t s = p->empty; s != TS_NONE; s = p->slabs[s].empty_next)
        if (p->slabs[s].tenant != tenant)
            return s;
    return TS_NONE;
}

ts_status ts_pool_grant(ts_pool_books *p, uint32_t slab, uint32_t tenant)
{
    if (slab >= p->num_slabs || tenant >= p->num_tenants)
        return TS_ENOENT;
    ts_slab *s = &p->slabs[slab];
    if (s->used > 0 || s->cached > 0)
        return TS_EBUSY;
    if (s->tenant == TS_NONE) {
        if (slab != p->ungranted) /* never granted slabs go in order */
            return TS_EINVAL;
        p->ungranted++;
    } else {
        ts_pool_avail_remove(p, slab);
        empty_remove(p, slab);
        p->tenants[s->tenant].slabs--;
        p->tenants[s->tenant].free -= s->blocks;
    }
    memset(p->refs + (size_t)slab * p->slab_blocks, 0, s->blocks * sizeof *p->refs);
    s->tenant = tenant;
    s->generation++;
    s->touched = 0;
    s->free_head = TS_NONE;
    p->tenants[tenant].slabs++;
    p->tenants[tenant].free += s->blocks;
    ts_pool_avail_add(p, slab);
    empty_add(p, slab);
    return TS_OK;
}

uint32_t ts_pool_take(ts_pool_books *p, uint32_t tenant, uint32_t session)
{
    ts_pool_tenant *t = &p->tenants[tenant];
    assert(t->avail != TS_NONE);
    const uint32_t slab = ts_pool_slab_for(p, tenant, session);
    ts_slab *s = &p->slabs[slab];
    uint32_t block = s->free_head;
    if (block != TS_NONE) {
        uint32_t next = p->refs[block] & LAST;
        s->free_head = next == LAST ? TS_NONE : next;
    } else {
        block = slab * p->slab_blocks + s->touched++;
    }
    p->refs[block] = 1;
    if (s->used == 0 && s->cached == 0)
        empty_remove(p, slab);
    else if (s->used == 0)
        idle_remove(p, slab);
    s->used++;
    if (slab_free(s) == 0) {
        ts_pool_avail_remove(p, slab);
        ts_pool_home_move(p, slab, false);
    }
    t->free--;
    t->used++;
    p->used++;
    return block;
}

void ts_pool_ref(ts_pool_books *p, uint32_t block)
{
    assert(p->refs[block] > 0 && !(p->refs[block] & FREE));
    if (p->refs[block] == CACHED) {
        uint32_t slab = ts_pool_slab_of(p, block);
        ts_slab *s = &p->slabs[slab];
        if (s->used++ == 0)
            idle_remove(p, slab);
        cached_remove(p, s, block);
        p->tenants[s->tenant].used++;
        p->used++;
        p->refs[block] = 1;
    } else if (++p->refs[block] == 2) {
        p->shared++;
    }
}

void ts_pool_unref(ts_pool_books *p, uint32_t block)
{
    assert(ts_pool_refs(p, block) > 0);
    uint32_t left = --p->refs[block];
    if (left == 1)
        p->shared--;
    if (left > 0)
        return;
    uint32_t slab = ts_pool_slab_of(p, block);
    ts_slab *s = &p->slabs[slab];
    s->used--;
    p->tenants[s->tenant].used--;
    p->used--;
    if (p->index != NULL && ts_index_has(p->index, block))
        cached_add(p, s, block);
    else
        give_back(p, slab, block);
    if (s->used == 0)
        (s->cached == 0 ? empty_add : idle_add)(p, slab);
}

void ts_pool_pin(ts_pool_books *p, uint32_t tenant, uint32_t block)
{
    p->tenants[tenant].pinned += p->pins[block]++ == 0;
}

void ts_pool_unpin(ts_pool_books *p, uint32_t tenant, uint32_t block)
{
    assert(p->pins[block] > 0);
    p->tenants[tenant].pinned -= --p->pins[block] == 0;
}

bool ts_pool_is_cached(const ts_pool_books *p, uint32_t block)
{
    return p->refs[block] == CACHED;
}
