#include "prefix_index.h"

#include "large_array.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

bool ts_index_init(ts_prefix_index *x, uint32_t num_blocks, uint32_t block_tokens, uint64_t seed)
{
    uint32_t buckets = 16;
    while (buckets < num_blocks)
        buckets *= 2;
    *x = (ts_prefix_index){.num_blocks = num_blocks,
                           .block_tokens = block_tokens,
                           .seed = seed,
                           .bucket_mask = buckets - 1,
                           .free_space = TS_NO_BLOCK,
                           .retired_space = TS_NO_BLOCK};
    x->nodes = ts_large_array_new(num_blocks, sizeof *x->nodes);
    x->ids = ts_large_array_new(num_blocks, block_tokens * sizeof *x->ids);
    x->buckets = ts_large_array_new(buckets, sizeof *x->buckets);
    if (x->nodes != NULL && x->ids != NULL && x->buckets != NULL)
        return true;
    ts_index_fini(x);
    return false;
}

void ts_index_use_large_pages(ts_prefix_index *x, bool large)
{
    ts_large_array_pages(x->nodes, x->num_blocks, sizeof *x->nodes, large);
    ts_large_array_pages(x->ids, x->num_blocks, x->block_tokens * sizeof *x->ids, large);
    ts_large_array_pages(x->buckets, x->bucket_mask + 1ull, sizeof *x->buckets, large);
}

void ts_index_fini(ts_prefix_index *x)
{
    ts_large_array_free(x->nodes, x->num_blocks, sizeof *x->nodes);
    ts_large_array_free(x->ids, x->num_blocks, x->block_tokens * sizeof *x->ids);
    ts_large_array_free(x->buckets, x->bucket_mask + 1ull, sizeof *x->buckets);
    free(x->spaces);
    free(x->tenant_spaces);
    ts_names_fini(&x->names);
    *x = (ts_prefix_index){0};
}

static bool is_root(ts_index_parent parent)
{
    return parent >> 31 != 0;
}

/* ---- namespaces ---- */

static void to_hex(const void *name, size_t bytes, char *hex)
{
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < bytes; i++) {
        unsigned char byte = ((const unsigned char *)name)[i];
        *hex++ = digits[byte >> 4];
        *hex++ = digits[byte & 15];
    }
    *hex = '\0';
}

uint32_t ts_index_find_space(const ts_prefix_index *x, uint32_t tenant, const void *name,
                             size_t bytes)
{
    char hex[2 * TS_NAMESPACE_BYTES_MAX + 1];
    assert(bytes <= TS_NAMESPACE_BYTES_MAX);
    to_hex(name, bytes, hex);
    return ts_names_find(&x->names, tenant, hex);
}

static unsigned value_of(char digit)
{
    return (unsigned)(digit <= '9' ? digit - '0' : digit - 'a' + 10);
}

size_t ts_index_space_name(const ts_index_space *space, unsigned char bytes[TS_NAMESPACE_BYTES_MAX])
{
    const size_t count = strlen(space->name) / 2;
    for (size_t i = 0; i < count; i++)
        bytes[i] =
            (unsigned char)(value_of(space->name[2 * i]) << 4 | value_of(space->name[2 * i + 1]));
    return count;
}

bool ts_index_space_is(const ts_prefix_index *x, uint32_t space, const void *name, size_t bytes)
{
    char hex[2 * TS_NAMESPACE_BYTES_MAX + 1];
    if (bytes > TS_NAMESPACE_BYTES_MAX)
        return false;
    to_hex(name, bytes, hex);
    return strcmp(hex, x->spaces[space].name) == 0;
}

/* Room for one namespace more, and for the tenant's count. */
static bool grow_spaces(ts_prefix_index *x, uint32_t tenant)
{
    if (tenant >= x->num_tenants) {
        uint32_t *grown = realloc(x->tenant_spaces, (tenant + 1) * sizeof *grown);
        if (grown == NULL)
            return false;
        memset(grown + x->num_tenants, 0, (tenant + 1 - x->num_tenants) * sizeof *grown);
        x->tenant_spaces = grown;
        x->num_tenants = tenant + 1;
    }
    if (x->free_space != TS_NO_BLOCK || (x->num_spaces & (x->num_spaces - 1)) != 0)
        return true;
    size_t capacity = x->num_spaces == 0 ? 1 : (size_t)x->num_spaces * 2;
    ts_index_space *grown = realloc(x->spaces, capacity * sizeof *grown);
    if (grown == NULL)
        return false;
    x->spaces = grown;
    return true;
}

ts_status ts_index_use_space(ts_prefix_index *x, uint32_t tenant, const void *name, size_t bytes,
                             uint32_t *space)
{
    const char *unused;
    *space = ts_index_find_space(x, tenant, name, bytes);
    if (*space != TS_NO_BLOCK) {
        x->spaces[*space].users++;
        return TS_OK;
    }
    if (!grow_spaces(x, tenant))
        return TS_ENOMEM;
    if (x->tenant_spaces[tenant] == TS_NAMESPACES_MAX)
        return TS_EQUOTA;
    uint32_t at = x->free_space != TS_NO_BLOCK ? x->free_space : x->num_spaces;
    char hex[2 * TS_NAMESPACE_BYTES_MAX + 1] = ""; /* all of it is stored */
    to_hex(name, bytes, hex);
    if (ts_names_add(&x->names, tenant, hex, at, &unused) != TS_OK)
        return TS_ENOMEM;
    if (at == x->num_spaces)
        x->num_spaces++;
    else
        x->free_space = x->spaces[at].next_free;
    x->spaces[at] = (ts_index_space){.tenant = tenant,
                                     .users = 1,
                                     .seed = XXH3_64bits_withSeed(&tenant, sizeof tenant, x->seed),
                                     .live = true};
    memcpy(x->spaces[at].name, hex, sizeof hex);
    x->tenant_spaces[tenant]++;
    *space = at;
    return TS_OK;
}

static void drop_if_unused(ts_prefix_index *x, uint32_t space)
{
    ts_index_space *s = &x->spaces[space];
    if (s->users > 0 || s->first_child != 0)
        return;
    if (!s->retired) {
        ts_names_remove(&x->names, s->tenant, s->name);
        x->tenant_spaces[s->tenant]--;
    }
    s->live = false;
    s->next_free = x->free_space;
    x->free_space = space;
}

void ts_index_share_space(ts_prefix_index *x, uint32_t space)
{
    assert(x->spaces[space].live);
    x->spaces[space].users++;
}

void ts_index_leave_space(ts_prefix_index *x, uint32_t space)
{
    assert(x->spaces[space].live && x->spaces[space].users > 0);
    x->spaces[space].users--;
    drop_if_unused(x, space);
}

void ts_index_retire(ts_prefix_index *x, uint32_t space)
{
    ts_index_space *s = &x->spaces[space];
    assert(s->live && !s->retired);
    ts_names_remove(&x->names, s->tenant, s->name);
    x->tenant_spaces[s->tenant]--;
    s->retired = true;
    if (s->first_child != 0) {
        s->next_free = x->retired_space;
        x->retired_space = space;
    }
    drop_if_unused(x, space);
}

/* Nothing of a retired namespace is left to be taken out. */
static void unlist_retired(ts_prefix_index *x, uint32_t space)
{
    uint32_t *at = &x->retired_space;
    while (*at != space)
        at = &x->spaces[*at].next_free;
    *at = x->spaces[space].next_free;
}

void ts_index_retire_all(ts_prefix_index *x)
{
    for (uint32_t i = 0; i < x->num_spaces; i++)
        if (x->spaces[i].live && !x->spaces[i].retired)
            ts_index_retire(x, i);
}

uint32_t ts_index_unused_space(ts_prefix_index *x, uint32_t tenant)
{
    for (uint32_t tried = 0; tried < x->num_spaces; tried++) {
        const uint32_t space = x->next_space++ % x->num_spaces;
        const ts_index_space *s = &x->spaces[space];
        if (s->live && !s->retired && s->tenant == tenant && s->users == 0)
            return space;
    }
    return TS_NO_BLOCK;
}

uint32_t ts_index_retired_leaf(ts_prefix_index *x, uint32_t *near)
{
    uint32_t at = *near;
    if (at == TS_NO_BLOCK || !ts_index_has(x, at) || !x->spaces[x->nodes[at].space].retired) {
        if (x->retired_space == TS_NO_BLOCK)
            return TS_NO_BLOCK;
        at = x->spaces[x->retired_space].first_child - 1;
    }
    at = ts_index_leaf_below(x, at);
    const ts_index_parent parent = x->nodes[at].parent;
    *near = is_root(parent) ? TS_NO_BLOCK : parent - 1;
    return at;
}

/* ---- nodes ---- */

/* The namespace of what hangs from it. */
static uint32_t space_of(const ts_prefix_index *x, ts_index_parent parent)
{
    return is_root(parent) ? parent & 0x7fffffffu : x->nodes[parent - 1].space;
}

uint32_t ts_index_hash(const ts_prefix_index *x, ts_index_parent parent, const uint32_t *ids)
{
    uint64_t seed = x->spaces[space_of(x, parent)].seed + parent * 0x9e3779b97f4a7c15u;
    return (uint32_t)XXH3_64bits_withSeed(ids, x->block_tokens * sizeof *ids, seed);
}

static uint32_t *children_of(const ts_prefix_index *x, ts_index_parent parent)
{
    return is_root(parent) ? &x->spaces[parent & 0x7fffffffu].first_child
                           : &x->nodes[parent - 1].first_child;
}

uint32_t ts_index_find(const ts_prefix_index *x, ts_index_parent parent, const uint32_t *ids)
{
    return ts_index_find_hashed(x, parent, ts_index_hash(x, parent, ids), ids);
}

uint32_t ts_index_find_hashed(const ts_prefix_index *x, ts_index_parent parent, uint32_t hash,
                              const uint32_t *ids)
{
    for (uint32_t at = x->buckets[hash & x->bucket_mask]; at != 0;
         at = x->nodes[at - 1].next_in_chain) {
        const ts_index_node *n = &x->nodes[at - 1];
        if (n->hash == hash && n->parent == parent &&
            memcmp(ts_index_ids(x, at - 1), ids, x->block_tokens * sizeof *ids) == 0)
            return at - 1;
    }
    return TS_NO_BLOCK;
}

uint32_t ts_index_find_part(const ts_prefix_index *x, ts_index_parent parent, const uint32_t *ids,
                            uint32_t count, uint32_t *agree)
{
    uint32_t best = TS_NO_BLOCK, looked = 0;
    *agree = 0;
    for (uint32_t at = *children_of(x, parent); at != 0 && looked < TS_INDEX_PARTIAL_MAX;
         at = x->nodes[at - 1].older, looked++) {
        const uint32_t *theirs = ts_index_ids(x, at - 1);
        uint32_t same = 0;
        while (same < count && same < x->block_tokens && theirs[same] == ids[same])
            same++;
        if (same > *agree) {
            *agree = same;
            best = at - 1;
        }
    }
    return best;
}

bool ts_index_add(ts_prefix_index *x, ts_index_parent parent, uint32_t block)
{
    ts_index_node *n = &x->nodes[block];
    uint32_t hash = ts_index_hash(x, parent, ts_index_ids(x, block)), length = 0;
    uint32_t *bucket = &x->buckets[hash & x->bucket_mask], *children = children_of(x, parent);
    const uint32_t space = space_of(x, parent);
    assert(n->parent == 0);
    if (x->off || x->spaces[space].retired)
        return false;
    for (uint32_t at = *bucket; at != 0; at = x->nodes[at - 1].next_in_chain)
        if (++length == TS_INDEX_CHAIN_MAX)
            return false;
    *n = (ts_index_node){.parent = parent,
                         .older = *children,
                         .hash = hash,
                         .next_in_chain = *bucket,
                         .space = space};
    if (*children != 0)
        x->nodes[*children - 1].newer = block + 1;
    *children = *bucket = block + 1;
    x->count++;
    x->spaces[space].blocks++;
    return true;
}

void ts_index_remove(ts_prefix_index *x, uint32_t block)
{
    ts_index_node *n = &x->nodes[block];
    assert(n->parent != 0 && n->first_child == 0);
    uint32_t *at = &x->buckets[n->hash & x->bucket_mask];
    while (*at != block + 1)
        at = &x->nodes[*at - 1].next_in_chain;
    *at = n->next_in_chain;
    if (n->newer != 0)
        x->nodes[n->newer - 1].older = n->older;
    else
        *children_of(x, n->parent) = n->older;
    if (n->older != 0)
        x->nodes[n->older - 1].newer = n->newer;
    ts_index_parent parent = n->parent;
    x->spaces[n->space].blocks--;
    *n = (ts_index_node){0};
    x->count--;
    if (!is_root(parent))
        return;
    const uint32_t space = parent & 0x7fffffffu;
    if (x->spaces[space].retired && x->spaces[space].first_child == 0)
        unlist_retired(x, space);
    drop_if_unused(x, space);
}

uint32_t ts_index_leaf_below(const ts_prefix_index *x, uint32_t block)
{
    while (x->nodes[block].first_child != 0)
        block = x->nodes[block].first_child - 1;
    return block;
}

#define WRONG(...)                                                                                 \
    do {                                                                                           \
        snprintf(why, why_bytes, __VA_ARGS__);                                                     \
        return TS_EINTERNAL;                                                                       \
    } while (0)

ts_status ts_index_check(const ts_prefix_index *x, char *why, size_t why_bytes)
{
    uint32_t count = 0, children = 0, chained = 0;
    for (uint32_t b = 0; b < x->num_blocks; b++) {
        const ts_index_node *n = &x->nodes[b];
        if (n->parent == 0) {
            if (n->first_child != 0)
                WRONG("block %u is not in the index and has children there", b);
            continue;
        }
        count++;
        if (is_root(n->parent) ? (n->parent & 0x7fffffffu) >= x->num_spaces ||
                                     !x->spaces[n->parent & 0x7fffffffu].live
                               : !ts_index_has(x, n->parent - 1))
            WRONG("the parent of block %u in the index isn't there", b);
        if (!x->spaces[n->space].live ||
            n->space !=
                (is_root(n->parent) ? n->parent & 0x7fffffffu : x->nodes[n->parent - 1].space))
            WRONG("block %u is of namespace %u, and its parent isn't", b, n->space);
        if (ts_index_find(x, n->parent, ts_index_ids(x, b)) != b)
            WRONG("block %u isn't found by its tokens", b);
        for (uint32_t at = n->first_child; at != 0; at = x->nodes[at - 1].older, children++)
            if (x->nodes[at - 1].parent != ts_index_block(b))
                WRONG("block %u lists block %u, which isn't its child", b, at - 1);
    }
    uint64_t in_spaces = 0;
    for (uint32_t i = 0; i < x->num_spaces; i++)
        in_spaces += x->spaces[i].live ? x->spaces[i].blocks : 0;
    for (uint32_t i = 0; i < x->num_spaces; i++)
        for (uint32_t at = x->spaces[i].live ? x->spaces[i].first_child : 0; at != 0;
             at = x->nodes[at - 1].older, children++)
            if (x->nodes[at - 1].parent != ts_index_root(i))
                WRONG("namespace %u lists block %u, which isn't its child", i, at - 1);
    for (uint32_t i = 0; i <= x->bucket_mask; i++)
        for (uint32_t at = x->buckets[i]; at != 0; at = x->nodes[at - 1].next_in_chain)
            chained++;
    if (count != x->count || children != count || chained != count || in_spaces != count)
        WRONG(
            "the index has %u blocks, %u as children, %u in chains, %llu of namespaces; the count "
            "says %u",
            count, children, chained, (unsigned long long)in_spaces, x->count);
    return TS_OK;
}
