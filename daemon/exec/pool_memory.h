/*
 * Where pools lie: opens the GPUs that the configuration names, decides what `auto` means, sees
 * that the pools fit, and makes their memory. Says in the log what was chosen and why.
 *
 * Thread: main's before the engine runs, then the engine's owner.
 */
#ifndef TS_POOL_MEMORY_H
#define TS_POOL_MEMORY_H

#include "config.h"
#include "exec.h"

/* Whether this machine has what the pools need: GPUs, and memory for all of them, as if nothing
 * else took any. Complains of what doesn't fit (config.h). TS_EINVAL: there are problems. */
ts_status ts_pool_memory_check(ts_config *config);

/* Adds one pool to the engine, with its memory and, on a GPU, its executor; also while the daemon
 * runs. Where it opens a GPU that had no pool yet, everybody
 * waits for as long as CUDA takes for that. `by`, here and below: the operator who orders it; NULL:
 * none does. */
ts_status ts_pool_memory_add(ts_exec *exec, const ts_config_pool *wanted, const ts_caller *by,
                             char *why, size_t why_bytes);

/*
 * Gives the pools that the engine has, after a restart, their memory again, and makes the copies
 * that begun steps lack. Sequences in memory that isn't there any more are freed; the log says how
 * many. crashed: the last daemon ended itself (ts_books_start). A pool whose GPU isn't
 * there is TS_EDEVICE, with a sentence.
 */
ts_status ts_pool_memory_restore(ts_exec *exec, bool crashed, char *why, size_t why_bytes);

/* Whether a tenant's exchanges may take `bytes` more of the memory of the pool's GPU: TS_EQUOTA, or
 * TS_ENOMEM if the GPU hasn't that much beside what its pools were promised. */
ts_status ts_pool_memory_check_exchange(const ts_exec *exec, uint32_t pool, uint32_t tenant,
                                        uint64_t bytes, char *why, size_t why_bytes);

/* The engine's TS_OP_POOL_RESIZE and TS_OP_POOL_REMOVE, with the pool's memory. */
ts_status ts_pool_memory_resize(ts_exec *exec, uint32_t pool, uint32_t num_blocks,
                                const ts_caller *by, ts_answer *answer);
ts_status ts_pool_memory_remove(ts_exec *exec, uint32_t pool, const ts_caller *by,
                                ts_answer *answer);

/* Ends the thread that makes slabs, and frees the GPUs' executors; the GPUs go with the exec. */
void ts_pool_memory_stop(ts_exec *exec);

/* "pool 'x' on cuda:0: bf16, 32 layers, ...: up to 8192 tokens" */
void ts_pool_memory_describe(const ts_pool_config *pool, char *text, size_t bytes);

#endif
