/*
 * Where slabs' memory comes from.
 *
 * To make a slab of a GPU's memory, to zero it and to store it takes 0.3 to 5 ms, since it waits
 * for the GPU and for whoever holds descriptors. If the engine's owner did it, all workers would
 * wait. So a slab that nobody had is made by a thread: when a command needs it, and ahead, so that
 * few commands need one (ts_engine_wants_spare). One is under way at a time. Slabs of host memory,
 * and those that another tenant had, are made by the engine's owner.
 *
 * Thread: the engine's owner of the moment (work_queue.h).
 */
#ifndef TS_SLAB_SUPPLY_H
#define TS_SLAB_SUPPLY_H

#include "exec.h"
#include "stored_memory.h"

/* ts_exec_apply, finding memory for slabs until the command has enough. TS_NEED_SWEEP: it must wait
 * for what is freed bit by bit, or for a slab, and be applied again when `resumed` is called. A
 * call that was answered before the daemon was restarted gets that answer again. */
void ts_exec_supply(ts_exec *exec, ts_command *command, ts_answer *answer);

/* Gives the slab's memory back (ts_memory_drop). The log says where that fails. Thread: also the
 * supply's. */
void ts_slab_drop(const ts_stored_slab *slab);

/* Waits for the slab that is under way, and grants it. False: there was none. */
bool ts_slab_supply_finish(ts_exec *exec);

/* Ends the thread, when the slab that it has under way is made. Thread: any, before the queue is
 * closed. */
void ts_slab_supply_stop(ts_exec *exec);

/* Frees the supply. The queue is closed and empty. */
void ts_slab_supply_free(ts_exec *exec);

#endif
