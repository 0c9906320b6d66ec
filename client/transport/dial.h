/*
 * Reaches a daemon's socket, in the caller's time.
 *
 * Thread: the client's.
 */
#ifndef TS_DIAL_H
#define TS_DIAL_H

#include "client.h"

/* Connects client->socket to client->path. 0, or NNG's error: NNG_ETIMEDOUT: somebody listens
 * there, and takes no connection until then. */
int ts_dial(ts_client *client, uint64_t until_ms);

#endif
