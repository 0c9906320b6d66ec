/*
 * A pool's books: which blocks are free, how often each used one is referred to, and which tenant
 * each slab belongs to. No memory is touched here; ids stand for it.
 *
 * A slab belongs to one tenant at a time. A tenant's blocks come from its own slabs alone; a slab
 * without used blocks may be granted to another tenant (its memory must be renewed then). Taking
 * and giving back a block is O(1), granting a slab too.
 *
 * Cost: 8 bytes a block and 40 bytes a slab.
 *
 * Locking: none; the engine's owner of the moment (work_queue.h) owns it.
 */
#ifndef TS_BLOCK_POOL_H
#define TS_BLOCK_POOL_H

#include "tinyserve_types.h"

#include <stdbool.h>

#define TS_NONE UINT32_MAX
#define TS_POOL_BLOCKS_MAX 0x7fffffffu

typedef struct ts_slab {
    uint32_t tenant;     /* TS_NONE: nobody's */
    uint32_t generation; /* grows with every grant */
    uint32_t used;       /* blocks with references */
    uint32_t touched;   /* blocks that were ever used since the grant; the others follow in order */
    uint32_t free_head; /* first of the freed blocks, linked through refs; TS_NONE: none */
    uint32_t blocks;    /* the last slab may have fewer */
    uint32_t avail_prev, avail_next; /* tenant's slabs with free blocks */
    uint32_t empty_prev, empty_next; /* granted slabs without used blocks */
} ts_slab;

typedef struct ts_pool_tenant {
    uint32_t avail; /* head of its slabs with free blocks */
    uint32_t slabs;
    uint32_t free; /* blocks free in its slabs */
    uint32_t used;
    uint32_t sequences;
    uint32_t pinned;  /* blocks that its kept sequences refer to, each counted once */
    uint64_t entries; /* in its sequences' block tables, reserved ones included */
} ts_pool_tenant;

typedef struct ts_pool_books {
    uint32_t num_blocks, slab_blocks, num_slabs;
    uint32_t max_blocks; /* that there are books for */
    uint32_t used;       /* blocks with references */
    uint32_t shared;     /* blocks with more than one */
    uint32_t ungranted;  /* slabs [ungranted, num_slabs) were never granted */
    uint32_t empty;      /* head of the granted slabs without used blocks */
    uint32_t num_empty;
    uint32_t *refs; /* per block: references; 0 or FREE | next free block */
    uint32_t *pins; /* per block: kept sequences that refer to it */
    ts_slab *slabs;
    ts_pool_tenant *tenants;
    uint32_t num_tenants;
} ts_pool_books;

/* TS_ENOMEM if the books can't be had. max_blocks 1..2^31-1, slab_blocks >= 1; num_blocks, what the
 * pool starts with, is max_blocks or whole slabs. */
ts_status ts_pool_init(ts_pool_books *pool, uint32_t num_blocks, uint32_t max_blocks,
                       uint32_t slab_blocks);
void ts_pool_fini(ts_pool_books *pool);

/* The first block from `first` on that is in use; TS_NONE: none is. */
uint32_t ts_pool_first_used(const ts_pool_books *pool, uint32_t first);

/* Lets the pool have num_blocks (max_blocks, or whole slabs). Slabs past the last, which have no
 * block in use, are nobody's then, and never granted. */
void ts_pool_resize(ts_pool_books *pool, uint32_t num_blocks);

/* Makes room for tenants 0..tenant. */
ts_status ts_pool_add_tenant(ts_pool_books *pool, uint32_t tenant);

/* How many more slabs the tenant needs to have `blocks` free blocks, counting from the front of
 * ts_pool_next_slab; TS_NONE if the pool hasn't got them. */
uint32_t ts_pool_slabs_needed(const ts_pool_books *pool, uint32_t tenant, uint64_t blocks);

/* Free blocks that the tenant could get, with every slab that may still be granted to it. */
uint64_t ts_pool_available(const ts_pool_books *pool, uint32_t tenant);

/* The slab that ts_pool_grant should give to the tenant next; TS_NONE if there is none. */
uint32_t ts_pool_next_slab(const ts_pool_books *pool, uint32_t tenant);

/* Gives a slab without used blocks to the tenant; its generation grows. */
ts_status ts_pool_grant(ts_pool_books *pool, uint32_t slab, uint32_t tenant);

/* A block of the tenant's with one reference. The tenant must have a free one. */
uint32_t ts_pool_take(ts_pool_books *pool, uint32_t tenant);

/* One reference more, or one less; a block without any is free again. */
void ts_pool_ref(ts_pool_books *pool, uint32_t block);
void ts_pool_unref(ts_pool_books *pool, uint32_t block);

/* A kept sequence of the tenant's refers to the block, or does no longer. */
void ts_pool_pin(ts_pool_books *pool, uint32_t tenant, uint32_t block);
void ts_pool_unpin(ts_pool_books *pool, uint32_t tenant, uint32_t block);

/* References to the block; 0 if it is free. */
uint32_t ts_pool_refs(const ts_pool_books *pool, uint32_t block);

/*
 * Holds the books against themselves and against `expected` references of each block. Writes the
 * first contradiction to `why` and returns TS_EINTERNAL, or TS_OK.
 */
ts_status ts_pool_check(const ts_pool_books *pool, const uint32_t *expected, char *why,
                        size_t why_bytes);

#endif
