/* What the books' own files share: how a block's state lies in its count of references.
 *
 * Locking: none; the engine's owner of the moment (work_queue.h) owns it.
 */
#ifndef TS_BLOCK_POOL_INTERNAL_H
#define TS_BLOCK_POOL_INTERNAL_H

#include "block_pool.h"

#define FREE 0x80000000u   /* set in refs of a block that was freed; the rest is the next one */
#define LAST 0x7fffffffu   /* ... or this, at the end of the list */
#define CACHED 0x7ffffffeu /* refs of a block that is cached */

static inline uint32_t slab_of(const ts_pool_books *p, uint32_t block)
{
    return block / p->slab_blocks;
}

static inline uint32_t slab_free(const ts_slab *s)
{
    return s->blocks - s->used - s->cached;
}

#endif
