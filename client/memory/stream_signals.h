/*
 * The page of signals that keeps the order of runs on a GPU (proto/signals.h).
 *
 * Thread: the client's, unless a function says otherwise.
 */
#ifndef TS_STREAM_SIGNALS_H
#define TS_STREAM_SIGNALS_H

#include "client.h"

typedef struct ts_signals_watch ts_signals_watch;

/* Maps and pins the page of signals at the first need. */
ts_status ts_signals_open(ts_client *client, const ts_pool *pool);

/*
 * The connection has ended. Where the session doesn't outlive its daemon, streams that wait for it
 * go on at once. Else the next daemon does their runs, whether or not this process calls anything;
 * only where none is at it for the client's timeout do they go on, and the session is over then:
 * what they have read is no attention. Any thread.
 */
void ts_signals_daemon_gone(ts_client *client);

/* Streams that wait for the daemon go on, since nothing will come of the session. Any thread. */
void ts_signals_release_waiters(ts_client *client);
void ts_signals_close(ts_client *client);

#endif
