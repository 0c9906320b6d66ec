/*
 * Threads that workers wait for. A worker that waits for its stream spins, and where as many
 * workers spin as there are processors, a thread of the daemon's would have its turn after
 * milliseconds.
 *
 * Thread: any.
 */
#ifndef TS_THREAD_FIRST_H
#define TS_THREAD_FIRST_H

#include <sys/resource.h>

#define TS_NICE_FIRST (-10) /* what the unit's LimitNICE= allows */

/* Has the calling thread run before threads of the usual priority, if the process may (RLIMIT_NICE,
 * CAP_SYS_NICE); else it stays as it is. */
static inline void ts_thread_first(void)
{
    (void)setpriority(PRIO_PROCESS, 0, TS_NICE_FIRST); /* on Linux: of the thread alone */
}

#endif
