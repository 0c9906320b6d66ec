/*
 * The slabs of blocks, each listed once, as replies tell them.
 *
 * Thread: the engine's owner.
 */
#ifndef TS_SLAB_LIST_H
#define TS_SLAB_LIST_H

#include "exec.h"
#include "tinyserve.pb-c.h"

/* All 0 to start with. */
typedef struct ts_slab_list {
    uint32_t *seen; /* by slab: the stamp of the list it is in */
    uint32_t stamp;
    Tspb__Slab *slabs;
    Tspb__Slab **pointers; /* to them: the list */
    size_t seen_capacity, slabs_capacity, pointers_capacity;
    size_t count;
} ts_slab_list;

/* Lists the slabs of `count` blocks in list->pointers and list->count, good until the next call.
 * False: out of memory. */
bool ts_slab_list_fill(ts_slab_list *list, const ts_exec *exec, uint32_t pool,
                       const uint32_t *blocks, size_t count);

void ts_slab_list_fini(ts_slab_list *list);

#endif
