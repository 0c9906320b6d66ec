/* What the books' own files share: how a block's state lies in its count of references, and
 * the lists that slabs are on.
 *
 * Locking: none; the engine's owner of the moment (work_queue.h) owns it.
 */
#ifndef TS_BLOCK_POOL_INTERNAL_H
#define TS_BLOCK_POOL_INTERNAL_H

#include "block_pool.h"

#define FREE 0x80000000u /* set in refs of a block that was freed; the rest is the next one */
#define LAST 0x7fffffffu /* ... or this, at the end of the list */
#define CACHED TS_POOL_CACHED

static inline uint32_t slab_free(const ts_slab *s)
{
    return s->blocks - s->used - s->cached;
}

/* ---- block_pool_homes.c ---- */

/* Puts a slab that has free blocks on its tenant's list of them, or takes it off. Slabs that are
 * nobody's come first. */
void ts_pool_avail_add(ts_pool_books *pool, uint32_t slab);
void ts_pool_avail_remove(ts_pool_books *pool, uint32_t slab);

/* Moves a slab to the front or the end of its session's own: it has free blocks again, or none. */
void ts_pool_home_move(ts_pool_books *pool, uint32_t slab, bool first);

/* Makes the slab the session's own, or with TS_NONE nobody's. */
void ts_pool_set_home(ts_pool_books *pool, uint32_t slab, uint32_t session);

/* The slab that the session's next block comes from. The tenant must have a free block. */
uint32_t ts_pool_slab_for(ts_pool_books *pool, uint32_t tenant, uint32_t session);

#endif
