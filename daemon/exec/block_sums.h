/*
 * Checksums of what full blocks hold, so that a restart can compare its memory with them (key
 * `verify`). They lie in stored memory, 8 bytes for each block of a pool, and are made by a thread
 * of their own when a step is committed: nobody waits for them, and blocks that still wait for
 * theirs when the daemon dies have none. A block keeps its checksum until a step may write it anew.
 * Blocks with appended tokens have none: the worker may write these when it likes.
 *
 * Thread: the engine's owner of the moment (work_queue.h).
 */
#ifndef TS_BLOCK_SUMS_H
#define TS_BLOCK_SUMS_H

#include "engine.h"
#include "gpu.h"
#include "memory.h"
#include "store.h"

typedef struct ts_block_sums ts_block_sums;

/* What a look at a pool's memory came to. */
typedef struct ts_blocks_checked {
    uint64_t blocks;      /* full ones that sequences have, or that are cached */
    uint64_t checked;     /* of these: that had a checksum */
    uint64_t wrong;       /* of those: that no longer matched it */
    uint64_t block_bytes; /* of each */
    double seconds;
} ts_blocks_checked;

/* For the engine's pools; they are stored there. NULL: no memory, or no thread. */
ts_block_sums *ts_block_sums_new(const ts_engine *engine, ts_store *store);

/* Ends the thread; what is stored stays. NULL is fine, here and in all that follows
 * ts_block_sums_take. */
void ts_block_sums_free(ts_block_sums *sums);

/* Begins to keep checksums of the pool, whose blocks lie in this memory; none has one yet. gpu
 * NULL: it is the host's. Refused as ts_store_put refuses, or TS_ENOMEM, with a sentence. */
ts_status ts_block_sums_add(ts_block_sums *sums, uint32_t pool, const ts_memory *memory,
                            ts_gpu *gpu, char *why, size_t why_bytes);

/*
 * The same for a pool that an earlier daemon had, whose memory is there: takes its checksums from
 * the store and compares the memory with them. *wrong, the caller's to free, are the checked->wrong
 * blocks that don't match. Without checksums in the store there is nothing to check. TS_EDEVICE:
 * the GPU can't be read. Where it fails otherwise, with a sentence, the pool has no checksums from
 * then on.
 */
ts_status ts_block_sums_take(ts_block_sums *sums, uint32_t pool, const ts_memory *memory,
                             ts_gpu *gpu, ts_blocks_checked *checked, uint32_t **wrong, char *why,
                             size_t why_bytes);

/* Called before and after every command: notes which blocks it fills, and which it lets be written
 * anew. */
void ts_block_sums_before(ts_block_sums *sums, const ts_command *command);
void ts_block_sums_after(ts_block_sums *sums, const ts_command *command, const ts_answer *answer);

/* How many blocks wait for their checksum; whether checksums of the pool are kept. */
uint32_t ts_block_sums_waiting(ts_block_sums *sums);
bool ts_block_sums_keeps(const ts_block_sums *sums, uint32_t pool);

/* The slab's memory goes: nothing is read there any more. */
void ts_block_sums_leave_slab(ts_block_sums *sums, uint32_t pool, uint32_t slab);

/* The pool goes. */
void ts_block_sums_remove(ts_block_sums *sums, uint32_t pool);

#endif
