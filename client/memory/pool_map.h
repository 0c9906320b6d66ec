/*
 * A pool's slabs in this process's addresses, as the daemon spoke of them last.
 *
 * Thread: the client's.
 */
#ifndef TS_POOL_MAP_H
#define TS_POOL_MAP_H

#include "client.h"

/* TS_EINVAL: the pool has no such layer. */
ts_status ts_pool_check_layer(ts_pool *pool, uint32_t layer);

/* Makes sure that the block's slab is mapped, as the daemon spoke of it last. */
ts_status ts_pool_map_block(ts_pool *pool, uint64_t block, bool writable);

/* Makes sure that the pool has its addresses, p->base; its slabs may be mapped later. Memory that
 * is one allocation, cuda-ipc, has them when it is mapped. */
ts_status ts_pool_reserve(ts_pool *pool);

/* Notes which generation of its slabs an answer speaks of. */
ts_status ts_pool_note_slab(ts_pool *pool, uint32_t slab, uint32_t generation);
ts_status ts_pool_note_slabs(ts_pool *pool, Tspb__Slab **slabs, size_t count);

/* Unmaps all of it. */
void ts_pool_unmap(ts_pool *pool);

#endif
