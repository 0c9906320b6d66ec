/*
 * Pools' slabs, and sessions' exchanges and pages of signals, in the store, where the next daemon
 * finds them: under names that the books tell (restart/books.h). Memory that doesn't outlive the
 * daemon isn't stored, and nothing is done for it.
 *
 * Thread: the engine's owner of the moment (work_queue.h); a slab that nobody has yet is put by the
 * thread that makes it (slab_supply.h).
 */
#ifndef TS_STORED_MEMORY_H
#define TS_STORED_MEMORY_H

#include "memory.h"
#include "store.h"

/* A slab of a pool, as of a generation. */
typedef struct ts_stored_slab {
    ts_memory *memory; /* the pool's */
    uint32_t pool, slab, generation;
} ts_stored_slab;

/* Stores its memory, refused as ts_store_put refuses; or has the store forget it. */
ts_status ts_stored_slab_put(ts_store *store, const ts_stored_slab *slab, char *why,
                             size_t why_bytes);
void ts_stored_slab_forget(ts_store *store, const ts_stored_slab *slab);

/* Gives it the memory that was stored. TS_ENOENT: there is none. Else as ts_memory_adopt. */
ts_status ts_stored_slab_take(ts_store *store, const ts_stored_slab *slab, char *why,
                              size_t why_bytes);

/* The same of a session's exchange, its `number`th; -1: none is stored. */
ts_status ts_stored_exchange_put(ts_store *store, uint64_t session, uint32_t number, int fd,
                                 char *why, size_t why_bytes);
void ts_stored_exchange_forget(ts_store *store, uint64_t session, uint32_t number);
int ts_stored_exchange_take(ts_store *store, uint64_t session, uint32_t number);

/* The same of its page of signals, of which it has one. */
ts_status ts_stored_signals_put(ts_store *store, uint64_t session, int fd, char *why,
                                size_t why_bytes);
void ts_stored_signals_forget(ts_store *store, uint64_t session);
int ts_stored_signals_take(ts_store *store, uint64_t session);

/* The same of a pool's checksums (block_sums.h). */
ts_status ts_stored_sums_put(ts_store *store, uint32_t pool, int fd, char *why, size_t why_bytes);
void ts_stored_sums_forget(ts_store *store, uint32_t pool);
int ts_stored_sums_take(ts_store *store, uint32_t pool);

#endif
