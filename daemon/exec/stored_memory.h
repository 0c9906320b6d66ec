/*
 * Pools' slabs and sessions' exchanges in the store, where the next daemon finds them: under names
 * that the books tell (restart/books.h).
 *
 * Thread: the engine's owner of the moment (work_queue.h).
 */
#ifndef TS_STORED_MEMORY_H
#define TS_STORED_MEMORY_H

#include "exec.h"

/* Whether what is made outlives this daemon: there are books, and a store. */
bool ts_stored_outlives(const ts_exec *exec);

/* Stores the slab's memory as of this generation, or has the store forget it. Without books nothing
 * is done. Refused as ts_store_put refuses. */
ts_status ts_stored_slab_put(ts_exec *exec, uint32_t pool, uint32_t slab, uint32_t generation,
                             char *why, size_t why_bytes);
void ts_stored_slab_forget(ts_exec *exec, uint32_t pool, uint32_t slab, uint32_t generation);

/* Gives a granted slab the memory that was stored for it. False: there is none, or it can't be
 * used, which is logged. */
bool ts_stored_slab_take(ts_exec *exec, uint32_t pool, uint32_t slab);

/* The same of a session's exchange in host memory, its `number`th; -1: none is stored. */
ts_status ts_stored_exchange_put(ts_exec *exec, uint64_t session, uint32_t number, int fd,
                                 char *why, size_t why_bytes);
void ts_stored_exchange_forget(ts_exec *exec, uint64_t session, uint32_t number);
int ts_stored_exchange_take(ts_exec *exec, uint64_t session, uint32_t number);

#endif
