/*
 * The page of signals that keeps the order of runs on a GPU (proto/signals.h).
 *
 * Thread: the client's, unless a function says otherwise.
 */
#ifndef TS_STREAM_SIGNALS_H
#define TS_STREAM_SIGNALS_H

#include "client.h"

/* Maps and pins the page of signals at the first need. */
ts_status ts_signals_open(ts_client *client, const ts_pool *pool);

/* Streams that wait for the daemon go on: it is gone. Any thread. */
void ts_signals_release_waiters(ts_client *client);
void ts_signals_close(ts_client *client);

#endif
