/*
 * Whether there is room for NNG's threads. Where a process may not have them all (ulimit -u, a
 * container's pids.max) or has no memory for their stacks (ulimit -v), NNG 1.5 crashes in its first
 * call, or never returns from it. So they are tried first.
 *
 * Thread: any, one at a time.
 */
#ifndef TS_THREAD_TRIAL_H
#define TS_THREAD_TRIAL_H

#include <stdint.h>

/* How many threads NNG 1.5 starts on this machine. */
uint32_t ts_nng_threads(void);

/* Starts as many threads, all there at the same time, and ends them. Returns 0, or why it can't:
 * an error of pthread_create(3), and how many could be started in *started. */
int ts_threads_try(uint32_t count, uint32_t *started);

#endif
