/*
 * A pool's prefix index: which blocks hold the K and V of which tokens.
 *
 * It is a forest. A root is a tenant's *namespace* (bytes that name the model and whatever else
 * changes K and V). A node is a full block; its parent is the block before it, or the root. A child
 * is found by the hash of its token ids and its parent, and its ids are compared: a collision costs
 * a comparison and never finds another prompt's block.
 *
 * The token id of each slot is stored as soon as it is known, also of blocks that aren't full or
 * not indexed. References to blocks are the books' matter (block_pool.h).
 *
 * A namespace can be *retired*: its name leads nowhere at once, and its blocks are taken out of the
 * index bit by bit, those in use too.
 *
 * Cost: 32 bytes and the token ids a block, touched when a block is first used.
 *
 * Locking: none; the engine's owner of the moment (work_queue.h) owns it.
 */
#ifndef TS_PREFIX_INDEX_H
#define TS_PREFIX_INDEX_H

#include "kept_names.h"

#include <stdbool.h>

#define TS_NO_BLOCK UINT32_MAX
#define TS_TOKEN_UNKNOWN UINT32_MAX /* in place of an id: this token's isn't known */
#define TS_NAMESPACE_BYTES_MAX 64u
#define TS_NAMESPACES_MAX 1024u /* of one tenant */
#define TS_INDEX_CHAIN_MAX 32u  /* blocks of one hash bucket; more aren't indexed */
#define TS_INDEX_PARTIAL_MAX 8u /* children that a match looks at for a part of a block */

/* What a node hangs from: a block, or a root. 0: it is not in the index. */
typedef uint32_t ts_index_parent;

static inline ts_index_parent ts_index_block(uint32_t block)
{
    return block + 1;
}
static inline ts_index_parent ts_index_root(uint32_t space)
{
    return 0x80000000u | space;
}

typedef struct ts_index_node {
    ts_index_parent parent;
    uint32_t first_child;  /* the newest; block + 1, as all here; 0: none */
    uint32_t older, newer; /* children of the same parent */
    uint32_t hash, next_in_chain;
    uint32_t space;
} ts_index_node;

typedef struct ts_index_space {
    uint32_t tenant;
    uint32_t first_child;
    uint64_t seed;      /* of its hashes, the tenant's: none can fill another's chains by design */
    uint32_t users;     /* sequences; without any and without children it may go */
    uint32_t next_free; /* or the next that is retired and has blocks; TS_NO_BLOCK: the last */
    uint32_t blocks;    /* of the index */
    uint64_t asked_tokens, found_tokens; /* of prompts that were matched */
    bool live, retired;
    char name[2 * TS_NAMESPACE_BYTES_MAX + 1]; /* in hexadecimal */
} ts_index_space;

typedef struct ts_prefix_index {
    uint32_t num_blocks, block_tokens;
    uint64_t seed;        /* of the namespaces' */
    uint32_t count;       /* nodes */
    ts_index_node *nodes; /* by block */
    uint32_t *ids;        /* by slot */
    uint32_t *buckets;    /* block + 1 */
    uint32_t bucket_mask;
    ts_index_space *spaces;
    uint32_t num_spaces, free_space;
    uint32_t retired_space;  /* the first of those that have blocks; TS_NO_BLOCK: none has */
    uint32_t *tenant_spaces; /* live ones, by tenant */
    uint32_t next_space;     /* where the search for one to retire goes on */
    bool off;                /* nothing is added */
    uint32_t num_tenants;
    ts_names names; /* of namespaces */
} ts_prefix_index;

/* False: out of memory. */
bool ts_index_init(ts_prefix_index *index, uint32_t num_blocks, uint32_t block_tokens,
                   uint64_t seed);
void ts_index_use_large_pages(ts_prefix_index *index, bool large); /* ts_pool_use_large_pages */
void ts_index_fini(ts_prefix_index *index);

/*
 * The tenant's namespace of this name, with one user more; *space is its number. TS_EQUOTA: it has
 * TS_NAMESPACES_MAX already. TS_ENOMEM.
 */
ts_status ts_index_use_space(ts_prefix_index *index, uint32_t tenant, const void *name,
                             size_t bytes, uint32_t *space);
void ts_index_share_space(ts_prefix_index *index, uint32_t space); /* one user more */
void ts_index_leave_space(ts_prefix_index *index, uint32_t space); /* one less */

/* The namespace if it is there, else TS_NO_BLOCK; changes nothing. */
uint32_t ts_index_find_space(const ts_prefix_index *index, uint32_t tenant, const void *name,
                             size_t bytes);

/* Its name leads nowhere from now on, and nothing is added to it. It is in use still, or has
 * blocks; ts_index_retired_leaf tells these, one by one. */
void ts_index_retire(ts_prefix_index *index, uint32_t space);
void ts_index_retire_all(ts_prefix_index *index);

/* A namespace of the tenant's that no sequence uses, in turn; TS_NO_BLOCK: there is none. */
uint32_t ts_index_unused_space(ts_prefix_index *index, uint32_t tenant);

/* A leaf of a retired namespace, to be removed, below *near if that is one of its blocks;
 * TS_NO_BLOCK: there is none. *near is for the next call, and TS_NO_BLOCK in the first. */
uint32_t ts_index_retired_leaf(ts_prefix_index *index, uint32_t *near);

/* The namespace's name; how many bytes it has. */
size_t ts_index_space_name(const ts_index_space *space,
                           unsigned char bytes[TS_NAMESPACE_BYTES_MAX]);

/* Whether that is the namespace's name. */
bool ts_index_space_is(const ts_prefix_index *index, uint32_t space, const void *name,
                       size_t bytes);

/* The ids of a block's slots, block_tokens of them. */
static inline uint32_t *ts_index_ids(const ts_prefix_index *index, uint32_t block)
{
    return index->ids + (size_t)block * index->block_tokens;
}

static inline bool ts_index_has(const ts_prefix_index *index, uint32_t block)
{
    return index->nodes[block].parent != 0;
}

static inline bool ts_index_is_leaf(const ts_prefix_index *index, uint32_t block)
{
    return index->nodes[block].first_child == 0;
}

/* The hash by which the parent's child with these ids is found. */
uint32_t ts_index_hash(const ts_prefix_index *index, ts_index_parent parent, const uint32_t *ids);

/* The child with these ids (block_tokens of them), or TS_NO_BLOCK; the same where the hash is
 * known.
 */
uint32_t ts_index_find_hashed(const ts_prefix_index *index, ts_index_parent parent, uint32_t hash,
                              const uint32_t *ids);
uint32_t ts_index_find(const ts_prefix_index *index, ts_index_parent parent, const uint32_t *ids);

/* The child that shares the longest beginning of `count` ids with them, of the newest
 * TS_INDEX_PARTIAL_MAX; *agree is how many, at least 1. TS_NO_BLOCK: none shares any. */
uint32_t ts_index_find_part(const ts_prefix_index *index, ts_index_parent parent,
                            const uint32_t *ids, uint32_t count, uint32_t *agree);

/* Adds the block, whose ids are stored and whose parent has no such child. False: its chain is full
 * (TS_INDEX_CHAIN_MAX), its namespace is retired, or the index is off. */
bool ts_index_add(ts_prefix_index *index, ts_index_parent parent, uint32_t block);

/* Takes out a leaf. */
void ts_index_remove(ts_prefix_index *index, uint32_t block);

/* The block that this one, which hangs from a block, hangs from. */
static inline uint32_t ts_index_parent_of(const ts_prefix_index *index, uint32_t block)
{
    return index->nodes[block].parent - 1;
}

/* A leaf below the block, or the block itself: what must go first. */
uint32_t ts_index_leaf_below(const ts_prefix_index *index, uint32_t block);

/* Holds the index against itself; TS_EINTERNAL with the first contradiction in `why`. */
ts_status ts_index_check(const ts_prefix_index *index, char *why, size_t why_bytes);

#endif
