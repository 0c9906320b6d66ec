/*
 * A pool's books: which blocks are free, how often each used one is referred to, and which tenant
 * each slab belongs to. No memory is touched here; ids stand for it.
 *
 * A slab belongs to one tenant at a time. A tenant's blocks come from its own slabs alone; a slab
 * without used blocks may be granted to another tenant (its memory must be renewed then). Taking
 * and giving back a block is O(1), granting a slab too.
 *
 * With a prefix index (prefix_index.h), a block that is in it and loses its last reference becomes
 * *cached*: it can be referred to again, and is evicted when room is needed: of the tenant's lowest
 * class that has any, the one released longest ago first. A block's class is at least those of its
 * descendants in the index. References go from the last block of a sequence to its first, so a
 * block's descendants in the index are always released, and evicted, before it.
 *
 * A pool may have slabs that are sessions' own (ts_pool_use_homes): who maps a pool's memory slab
 * by slab maps fewer of them if its blocks don't lie among everybody's. A session gets blocks of
 * slabs that are its own, then of the tenant's slabs that are nobody's, one of which becomes its
 * own, and last of those of the tenant's other sessions. A slab is nobody's again when none of its
 * blocks is used or cached, or when its session ends.
 *
 * Cost: 8 bytes a block and 64 bytes a slab, and for what is cached 13 bytes a block more and the
 * index's own, touched when a block is first cached.
 *
 * Locking: none; the engine's owner of the moment (work_queue.h) owns it.
 */
#ifndef TS_BLOCK_POOL_H
#define TS_BLOCK_POOL_H

#include "blocks.h"
#include "prefix_index.h"
#include "tinyserve_types.h"

#include <stdbool.h>

#define TS_NONE UINT32_MAX
#define TS_POOL_BLOCKS_MAX 0x7fffffffu
#define TS_POOL_CACHED 0x7ffffffeu /* refs of a cached block; more: it is free */
#define TS_CACHE_CLASSES 3u        /* ts_step_options.priority, from the lowest */
#define TS_CLASS_NORMAL 1u
#define TS_AGE_BINS 6u /* of what is evicted: up to 1, 10, 60, 600, 3600 seconds, and more */

/* Why a cached block goes. */
typedef enum ts_evict_cause {
    TS_EVICT_ROOM,   /* its tenant's step needs it */
    TS_EVICT_LIMIT,  /* its tenant would use more than it may */
    TS_EVICT_OTHERS, /* another tenant needs its slab */
    TS_EVICT_RESIZE, /* the pool becomes smaller */
    TS_EVICT_DROP,   /* its namespace is given up */
    TS_EVICT_CAUSES
} ts_evict_cause;

typedef struct ts_slab {
    uint32_t tenant;     /* TS_NONE: nobody's */
    uint32_t generation; /* grows with every grant */
    uint32_t used;       /* blocks with references */
    uint32_t cached;     /* blocks without, that the index knows */
    uint32_t touched;   /* blocks that were ever used since the grant; the others follow in order */
    uint32_t free_head; /* first of the freed blocks, linked through refs; TS_NONE: none */
    uint32_t blocks;    /* the last slab may have fewer */
    uint32_t avail_prev, avail_next; /* tenant's slabs with free blocks */
    uint32_t empty_prev, empty_next; /* granted slabs without used and cached blocks */
    uint32_t idle_prev, idle_next;   /* slabs with cached blocks alone, the oldest first */
    uint32_t home;                   /* 1 + the session whose own it is; 0: nobody's */
    uint32_t home_prev, home_next;   /* that one's slabs: those with free blocks come first */
} ts_slab;

/* The first and the last of a session's own slabs; TS_NONE: it has none. */
typedef struct ts_slab_home {
    uint32_t first, last;
} ts_slab_home;

typedef struct ts_pool_tenant {
    uint32_t avail;      /* head of its slabs with free blocks: first those that are nobody's */
    uint32_t avail_last; /* the end of that list */
    uint32_t nobodys;    /* slabs on it that are nobody's */
    uint32_t homes;      /* its sessions that have slabs of their own */
    uint32_t slabs;
    uint32_t free; /* blocks free in its slabs */
    uint32_t used;
    uint32_t cached; /* blocks */
    /* Of them, by class, as they were released; TS_NONE: none. */
    uint32_t cached_oldest[TS_CACHE_CLASSES], cached_newest[TS_CACHE_CLASSES];
    uint64_t empty_blocks, idle_blocks; /* in its slabs on those lists */
    uint32_t sequences;
    uint32_t tickets; /* sequences of those that are on one */
    uint32_t pinned;  /* blocks that its kept sequences refer to, each counted once */
    uint64_t entries; /* in its sequences' block tables, reserved ones included */
    uint64_t asked_tokens, found_tokens; /* of prompts that were matched; the engine's */
} ts_pool_tenant;

typedef struct ts_pool_books {
    uint32_t num_blocks, slab_blocks, num_slabs;
    uint32_t max_blocks; /* that there are books for */
    uint32_t used;       /* blocks with references */
    uint32_t shared;     /* blocks with more than one */
    uint32_t ungranted;  /* slabs [ungranted, num_slabs) were never granted */
    uint32_t empty;      /* head of the granted slabs without used and cached blocks */
    uint32_t num_empty;
    uint32_t cached;                     /* blocks */
    uint32_t idle_oldest, idle_newest;   /* slabs with cached blocks alone; TS_NONE: none */
    uint64_t empty_blocks, idle_blocks;  /* in the slabs on those lists */
    uint64_t evicted[TS_EVICT_CAUSES];   /* blocks, ever */
    uint64_t ages[TS_AGE_BINS], age_sum; /* of them: how many, and seconds */
    uint32_t now_s;                      /* the caller's clock */
    ts_prefix_index *index;              /* NULL: nothing is cached */
    uint32_t *cached_prev, *cached_next; /* per block, of its tenant's list */
    uint32_t *cached_since;              /* per block: now_s of then */
    uint8_t *classes;                    /* per block of the index */
    uint32_t *refs; /* per block: references; 0, CACHED, or FREE | next free block */
    uint32_t *pins; /* per block: kept sequences that refer to it */
    ts_slab *slabs;
    ts_slab_home *homes; /* by session; NULL: slabs aren't sessions' own */
    uint32_t num_homes;
    ts_pool_tenant *tenants;
    uint32_t num_tenants;
} ts_pool_books;

/* TS_ENOMEM if the books can't be had. max_blocks 1..2^31-1, slab_blocks >= 1; num_blocks, what the
 * pool starts with, is max_blocks or whole slabs. */
ts_status ts_pool_init(ts_pool_books *pool, uint32_t num_blocks, uint32_t max_blocks,
                       uint32_t slab_blocks);
void ts_pool_fini(ts_pool_books *pool);

/* Whether memory of the books, the index's too, that is touched from now on gets large pages
 * (large_array.h): while a daemon takes the pool over. */
void ts_pool_use_large_pages(ts_pool_books *pool, bool large);

/* The most slabs that the pool may have. Each keeps its generation while the pool is smaller. */
uint32_t ts_pool_slabs_max(const ts_pool_books *pool);

/* From now on blocks of the index are cached; it is the books', which free it. TS_ENOMEM. */
ts_status ts_pool_use_index(ts_pool_books *pool, uint32_t block_tokens, uint64_t seed);

/* From now on slabs are sessions' own, of at most `sessions` sessions. TS_ENOMEM. */
ts_status ts_pool_use_homes(ts_pool_books *pool, uint32_t sessions);

/* The session has ended: its slabs are nobody's. */
void ts_pool_leave_home(ts_pool_books *pool, uint32_t session);

/* Finds from the slabs, of a pool that was read, what isn't stored of the lists they are on. */
void ts_pool_find_homes(ts_pool_books *pool);

/* Whether the tenant should have a slab more before it is needed, of those that were never granted:
 * as many that are nobody's as it has sessions with slabs of their own, but no more than an eighth
 * of the pool. Slabs that aren't sessions' own aren't granted ahead. */
bool ts_pool_wants_spare(const ts_pool_books *pool, uint32_t tenant);

/* What follows evicts *budget blocks at most, and lessens it by those that it evicted. */

/* Evicts up to `blocks` of the tenant's cached blocks. */
void ts_pool_evict(ts_pool_books *pool, uint32_t tenant, uint64_t blocks, ts_evict_cause cause,
                   uint32_t *budget);

/* Evicts what is cached in the slab, and what hangs from that elsewhere. The slab has no block in
 * use. */
void ts_pool_evict_slab(ts_pool_books *pool, uint32_t slab, ts_evict_cause cause, uint32_t *budget);

/* Evicts what is cached in another tenant's slab that has cached blocks alone: the one that was
 * last in use longest ago, of tenants with more than `share` slabs, or if not `beyond` of any.
 * False: there is none. */
bool ts_pool_empty_other(ts_pool_books *pool, uint32_t tenant, uint32_t share, bool beyond,
                         uint32_t *budget);

/* Takes blocks of retired namespaces out of the index, cached ones and those in use. */
void ts_pool_drop_retired(ts_pool_books *pool, uint32_t *budget);

/* Takes the block out of the index, and before it what hangs from it. What is cached of that is
 * free then. */
void ts_pool_drop_block(ts_pool_books *pool, uint32_t block);

/* Makes the class of the block, which the index has, at least this one. False: it was. */
bool ts_pool_raise_class(ts_pool_books *pool, uint32_t block, uint8_t class);

/* Takes a leaf of the index that one sequence refers to out of it: it won't be cached. */
void ts_pool_forget(ts_pool_books *pool, uint32_t block);

static inline uint32_t ts_pool_slab_of(const ts_pool_books *pool, uint32_t block)
{
    return (uint32_t)ts_whole_blocks(block, pool->slab_blocks);
}

/* Blocks that were evicted, for any cause. */
uint64_t ts_pool_evicted(const ts_pool_books *pool);

/* The first block from `first` on that is in use; TS_NONE: none is. */
uint32_t ts_pool_first_used(const ts_pool_books *pool, uint32_t first);

/* Lets the pool have num_blocks (max_blocks, or whole slabs). Slabs past the last, which are empty,
 * are nobody's then, and never granted. */
void ts_pool_resize(ts_pool_books *pool, uint32_t num_blocks);

/* Makes room for tenants 0..tenant. */
ts_status ts_pool_add_tenant(ts_pool_books *pool, uint32_t tenant);

/* Blocks of the slabs that may be granted to the tenant now: nobody's, and others' empty ones. */
uint64_t ts_pool_grantable(const ts_pool_books *pool, uint32_t tenant);

/* Blocks that the tenant could get: free and cached ones of its own, and every slab that may still
 * be granted to it, those that have another's cached blocks alone included. */
uint64_t ts_pool_available(const ts_pool_books *pool, uint32_t tenant);

/* The slab that ts_pool_grant should give to the tenant next; TS_NONE if there is none. */
uint32_t ts_pool_next_slab(const ts_pool_books *pool, uint32_t tenant);

/* Gives a slab without used blocks to the tenant; its generation grows. */
ts_status ts_pool_grant(ts_pool_books *pool, uint32_t slab, uint32_t tenant);

/* A block of the tenant's with one reference, for this session. The tenant must have a free one. */
uint32_t ts_pool_take(ts_pool_books *pool, uint32_t tenant, uint32_t session);

/* One reference more (also of a cached block), or one less; a block without any is free again, or
 * cached. */
void ts_pool_ref(ts_pool_books *pool, uint32_t block);
void ts_pool_unref(ts_pool_books *pool, uint32_t block);

/* A kept sequence of the tenant's refers to the block, or does no longer. */
void ts_pool_pin(ts_pool_books *pool, uint32_t tenant, uint32_t block);
void ts_pool_unpin(ts_pool_books *pool, uint32_t tenant, uint32_t block);

/* References to the block; 0 if it is free or cached. */
static inline uint32_t ts_pool_refs(const ts_pool_books *pool, uint32_t block)
{
    return pool->refs[block] < TS_POOL_CACHED ? pool->refs[block] : 0;
}

bool ts_pool_is_cached(const ts_pool_books *pool, uint32_t block);

/*
 * Holds the books against themselves and against `expected` references of each block. Writes the
 * first contradiction to `why` and returns TS_EINTERNAL, or TS_OK.
 */
ts_status ts_pool_check(const ts_pool_books *pool, const uint32_t *expected, char *why,
                        size_t why_bytes);

#endif
