/*
 * The return of GPU memory: a thread that unmaps slabs which the daemon gives to others
 * (proto/revocations.h), also while the worker is idle.
 *
 * Nothing that this process has queued on the GPU uses them: a slab goes when none of its blocks is
 * in use, and a step's blocks are until its kernels are done. What the thread changes of the
 * client's pools it changes under the lock that is here; there is none, and no thread, before the
 * first slab of a GPU pool is mapped.
 */
#ifndef TS_SLAB_RETURNS_H
#define TS_SLAB_RETURNS_H

#include "client.h"

typedef struct ts_slab_returns ts_slab_returns;

/* Unmaps a slab of a pool if it is mapped in this generation or an earlier one: it is others'. */
typedef void ts_give_back(ts_pool *pool, uint32_t slab, uint32_t generation);

/* Starts the thread, unless it runs; it calls give_back under the lock. Thread: the client's. */
ts_status ts_slab_returns_start(ts_client *client, ts_give_back *give_back);

/* Goes on with the next daemon, which is told what is mapped; what has become others' meanwhile is
 * unmapped. TS_ECONN: it has gone, too. Thread: the client's. */
ts_status ts_slab_returns_reopen(ts_client *client);

/* Ends it. In a forked child, which has no such thread, it is forgotten. Thread: the client's. */
void ts_slab_returns_stop(ts_client *client);

/* Nothing is unmapped between these two, and the client's list of pools may be changed. */
void ts_slab_returns_lock(ts_client *client);
void ts_slab_returns_unlock(ts_client *client);

#endif
