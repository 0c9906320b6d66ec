#include "slab_list.h"

#include "unconst.h"

#include <stdlib.h>
#include <string.h>

/* Room for `most` slabs, and a new stamp. */
static bool begin_list(ts_slab_list *l, uint32_t num_slabs, size_t most)
{
    const size_t before = l->seen_capacity;
    if (!ts_engine_grow((void **)&l->seen, &l->seen_capacity, num_slabs, sizeof *l->seen))
        return false;
    memset(l->seen + before, 0, (l->seen_capacity - before) * sizeof *l->seen);
    if (!ts_engine_grow((void **)&l->slabs, &l->slabs_capacity, most, sizeof *l->slabs) ||
        !ts_engine_grow((void **)&l->pointers, &l->pointers_capacity, most, sizeof *l->pointers))
        return false;
    if (++l->stamp == 0) {
        memset(l->seen, 0, l->seen_capacity * sizeof *l->seen);
        l->stamp = 1;
    }
    l->count = 0;
    return true;
}

bool ts_slab_list_fill(ts_slab_list *l, const ts_exec *x, uint32_t pool, const uint32_t *blocks,
                       size_t count)
{
    const ts_pool_books *books = &x->engine->pools[pool].books;
    const ts_memory *memory = x->memory[pool];
    if (!begin_list(l, books->num_slabs, count < books->num_slabs ? count : books->num_slabs))
        return false;
    uint32_t first = 0, same = 0; /* blocks from `first` on that lie in the slab seen last */
    for (size_t i = 0; i < count; i++) {
        if (blocks[i] - first < same) /* neighbours, as a rule: spares a division */
            continue;
        const uint32_t slab = blocks[i] / books->slab_blocks;
        first = slab * books->slab_blocks;
        same = books->slab_blocks;
        if (l->seen[slab] == l->stamp)
            continue;
        l->seen[slab] = l->stamp;
        Tspb__Slab *entry = &l->slabs[l->count];
        tspb__slab__init(entry);
        entry->slab = slab;
        entry->generation = books->slabs[slab].generation;
        if (memory->ipc_handle != NULL) {
            entry->ipc_handle.data = ts_unconst(memory->ipc_handle);
            entry->ipc_handle.len = TS_IPC_HANDLE_BYTES;
        }
        l->pointers[l->count++] = entry;
    }
    return true;
}

void ts_slab_list_fini(ts_slab_list *l)
{
    free(l->seen);
    free(l->slabs);
    free(l->pointers);
}
