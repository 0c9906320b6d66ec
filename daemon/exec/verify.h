/*
 * The key `verify`: a restart compares all pools' memory with checksums of their blocks
 * (block_sums.h) before anything is served.
 *
 * Thread: the engine's owner of the moment (work_queue.h).
 */
#ifndef TS_VERIFY_H
#define TS_VERIFY_H

#include "exec.h"

/* A pool was added, whose memory is there: its blocks get checksums, if that is wanted and somebody
 * holds what is stored. Where they can't be had the log says so. */
void ts_verify_begin(ts_exec *exec, uint32_t pool);

/*
 * After a restart, when all pools have their memory: forgets the blocks that don't hold what was
 * stored, and frees the sequences that had one. exec->checked has how many. A pool whose checksums
 * can't be had, or not be looked at for want of memory, goes on unchecked, and the log says so.
 * TS_EDEVICE: a GPU can't be read, with a sentence.
 */
ts_status ts_verify_all(ts_exec *exec, char *why, size_t why_bytes);

#endif
