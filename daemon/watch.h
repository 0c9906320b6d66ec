/*
 * Ends the connections of processes that died. The kernel closes a dead worker's socket only when
 * nobody else holds it, and a child that the worker forked may: so each connection's process is
 * watched by a pidfd too.
 *
 * Thread: any for add and remove; `ended` is called on the watch's own.
 */
#ifndef TS_WATCH_H
#define TS_WATCH_H

#include "tinyserve_types.h"

typedef struct ts_watch ts_watch;

/* `ended` is told the key of each process that died; it may be told of one that was just removed.
 * NULL if out of memory, descriptors or threads. */
ts_watch *ts_watch_new(void (*ended)(void *arg, uint32_t key), void *arg);
void ts_watch_free(ts_watch *watch);

/* Watches the process; one that can't be watched (pid 0: of another pid namespace) isn't. */
void ts_watch_add(ts_watch *watch, uint32_t key, uint32_t pid);
void ts_watch_remove(ts_watch *watch, uint32_t key);

#endif
